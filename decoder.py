"""The patch-wise pixel flow decoder of UniFlow: a latent back to pixels in one step (paper, Sec. 3.2).

    C    = GTB(P_up(z) + PE)                         globally coherent condition tokens, eq. 3
    x_t  = (1 - t) x + t eps,    u = eps - x         rectified flow on each p x p patch, t = 1 noise, t = 0 image, eq. 4
    L    = mean (v(x_t, t, c) - u)^2                 eq. 5, over patches and elements
    x   <- x - v(x, t, c) / steps                    Euler steps from noise; one is the default

x: patches of the image normalised by the encoder's pixel mean and std, in order (channel, row, column). v: an MLP that
sees one patch and its own condition token, and nothing of its neighbours. Symbols: B batch, C latent channels, D width,
h, w token grid, N = h*w patches, p patch side, H = h*p, W = w*p. Images are (B, 3, H, W) in [0, 1].

    dec = Decoder.from_pretrained("out/model.safetensors")
    img = dec.decode(latent)                         # latent (B, C, h, w), NORMALISED: what Encoder.encode returns
    loss = dec.loss(z, img)                          # z (B, C, h, w), RAW: what calling an Encoder returns

`python decoder.py` prints the shapes. Needs torch and safetensors; no other file of this project.
The MLP is the flow head of the authors' release, whose ancestors are DiT (Peebles & Xie 2023) and MAR (Li et al. 2024).
"""
import contextlib
import json
import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """Something that the user gave is wrong (an argument, a path, a file): scripts print one line and exit with 2."""


PIXEL_STATS = {  # per channel, the mean and the standard deviation of the normalised pixels: the encoder's
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclass(frozen=True)
class DecoderConfig:
    latent_dim: int = 64           # C
    width: int = 1024              # D of the condition tokens
    heads: int = 16                # of the global transformer blocks
    gtb_depth: int = 6             # K global transformer blocks; 0 leaves them out
    flow_depth: int = 12           # residual blocks of the flow head
    flow_width: int = 1024         # of the flow head; at small patches, less than 2 * 3p^2 costs PSNR
    patch: int = 14                # p, pixels
    grid: int = 32                 # side of the patch grid that the position embeddings cover (size / p)
    projector: str = "mlp"         # "mlp": Linear-GELU-Linear as released; "linear": the paper's words
    objective: str = "flow"        # "flow": eq. 5; "pixel": the same network regresses the pixels (Table 5c)
    pixel_stats: str = "imagenet"  # a key of PIXEL_STATS

    def __post_init__(self):  # the values may come from a file
        for f in fields(self):
            x, low = getattr(self, f.name), (0 if "depth" in f.name else 1)
            if type(x) is not f.type or (f.type is int and not low <= x <= 65536):
                bounds = f" from {low} to 65536" if f.type is int else ""
                raise UserError(f"{f.name} is {x!r:.50}; expected {f.type.__name__}{bounds}")
        rules = {"width must be a multiple of 4 and of heads": self.width % 4 == 0 and self.width % self.heads == 0,
                 "gtb_depth and flow_depth must be at most 1000": max(self.gtb_depth, self.flow_depth) <= 1000,
                 "projector must be mlp or linear": self.projector in ("mlp", "linear"),
                 "objective must be flow or pixel": self.objective in ("flow", "pixel"),
                 f"pixel_stats must be one of {' '.join(PIXEL_STATS)}": self.pixel_stats in PIXEL_STATS}
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"{rule}: {self}")


def check_tensor(name, x, shape):
    """Raise ValueError unless x is a floating-point tensor of that shape. A letter is any size; B may be 0, too."""
    fits = isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == len(shape)
    for size, wanted in zip(x.shape if fits else (), shape):
        fits = fits and ((size > 0 or wanted == "B") if isinstance(wanted, str) else size == wanted)
    if not fits:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} is {got}; expected a floating-point tensor ({', '.join(map(str, shape))})")


def at_least_fp32(x):
    """x in fp32, or in fp64 if it has that type: for losses and the flow's state, also in half-precision modules."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def patchify(x, p):
    """Pixels (B, 3, H, W) -> patches (B, N, 3p^2): N row-major over the grid, elements by channel, row, column."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)
    return x.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(x, p, H, W):
    """Patches (B, N, 3p^2) -> pixels (B, 3, H, W), the inverse of patchify."""
    B, _, n = x.shape
    x = x.reshape(B, H // p, W // p, n // p ** 2, p, p).permute(0, 3, 1, 4, 2, 5)  # (B, C, h, p, w, p)
    return x.reshape(B, n // p ** 2, H, W)


def sample_t(shape, endpoint=0.0, device=None):
    """Training times in [0, 1], 1 = noise: sigmoid(N(0, 1)), a tenth of them uniform instead (the authors' schedule).

    endpoint: the fraction set to exactly t = 1, the only time at which one-step decoding evaluates the network.
    """
    # Differs from the paper: `endpoint` is ours; its default 0 leaves the authors' schedule as it is.
    t = torch.sigmoid(torch.randn(shape, device=device))
    t = torch.where(torch.rand(shape, device=device) < 0.1, torch.rand(shape, device=device), t)
    return torch.where(torch.rand(shape, device=device) < endpoint, torch.ones_like(t), t)


def flow_loss(velocity, x, t, noise):
    """Rectified flow's loss, eq. 4-5: x_t = (1 - t) x + t eps, u = eps - x, mean (v(x_t, t) - u)^2; a scalar.

    velocity: a callable v(x_t, t) -> like x. x: data (B, ...). noise: eps, like x. t: 1 = noise; its shape is the
    beginning of x's: (B) is a time for each image, (B, N) a time for each patch. Any flow model can use this function.
    """
    check_tensor("noise", noise, x.shape)
    check_tensor("t", t, x.shape[:getattr(t, "ndim", 1)])
    share = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))  # of noise: t in a shape that broadcasts with x
    v = velocity((1 - share) * x + share * noise, t)
    check_tensor("velocity", v, x.shape)  # broadcasting a wrong shape would silently change the loss
    # Differs from the paper: eq. 5 reads as a sum over the patch, 3p^2 times this mean (--lambda_f 588 at p = 14).
    return (v - (noise - x)).square().mean()


def euler(velocity, noise, steps=1):
    """Solve dx/dt = v(x, t) from noise at t = 1 to data at t = 0 by Euler steps: x <- x - v(x, t) / steps.

    velocity: a callable v(x, t) -> like x, for vectors x (B, ..., D) and their times t (B, ...). Returns x at t = 0.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    x = noise
    for i in range(steps):
        t = torch.full(x.shape[:-1], 1 - i / steps, dtype=torch.float32, device=x.device)
        v = velocity(x, t)
        check_tensor("velocity", v, x.shape)
        x = x - v / steps
    return x


class GlobalBlock(nn.Module):
    """Global transformer block: pre-norm self-attention and MLP over all condition tokens (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, 1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, 1e-5)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + self.proj(h)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FlowBlock(nn.Module):
    """Residual block of the flow head: x + gate * MLP(LN(x) * (1 + scale) + shift), where y sets gate, scale, shift."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x, y):  # both (..., width)
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.fc2(F.silu(self.fc1(h)))


class FlowHead(nn.Module):
    """The velocity MLP v(x_t, t, c): x (..., channels), times t (...), 1 = noise, c (..., cond_width) -> like x.

    Each vector is a sample of its own: here a patch (B, N), in MAR a token. The modulations and the output layer start
    at zero, so each residual block starts as the identity and the velocity starts at 0.
    """

    def __init__(self, channels, cond_width, width, depth):
        super().__init__()
        self.input_proj = nn.Linear(channels, width)
        self.time_fc1 = nn.Linear(256, width)
        self.time_fc2 = nn.Linear(width, width)
        self.cond_proj = nn.Linear(cond_width, width)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels)
        self.zero_init()

    def zero_init(self):
        for m in [b.modulation for b in self.blocks] + [self.final_modulation, self.output]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, c):
        check_tensor("t", t, x.shape[:-1])
        check_tensor("c", c, (*x.shape[:-1], self.cond_proj.in_features))
        dtype = self.output.weight.dtype
        s = 1 - t  # the released network counts time from noise, s = 0, to data; its output is x - eps = -v
        time = self.time_fc2(F.silu(self.time_fc1(sinusoid(1000 * s, 256).to(dtype))))  # (..., width)
        y = F.silu(time + self.cond_proj(c.to(dtype)))
        x = self.input_proj(x.to(dtype))  # (..., width)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.final_modulation(y).chunk(2, dim=-1)
        return -self.output(self.final_norm(x) * (1 + scale) + shift)  # (..., channels)


def sinusoid(t, dim):
    """Transformer features of positions t (...) -> (..., dim): cosines, then sines, of frequencies from 1 to 1e-4."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_grid(grid, width):
    """2-D sin-cos position embedding of a square grid, (1, grid*grid, width): one half for rows, one for columns."""
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    both = torch.cat([sinusoid(rows.flatten(), width // 2), sinusoid(cols.flatten(), width // 2)], dim=-1)
    return both[None].to(torch.get_default_dtype())


def resize_grid(pos, h, w):
    """Position embedding of a square grid (1, g*g, D) -> (1, h*w, D), row-major: bicubic, in fp32, no antialias."""
    g = round(pos.shape[1] ** 0.5)
    if (h, w) == (g, g):
        return pos
    grid = pos.float().reshape(1, g, g, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(pos.dtype)  # (1, h*w, D)


class Decoder(nn.Module):
    """A latent -> the image (B, 3, h*p, w*p) in [0, 1].

    There are two latents: `loss` (= `forward`) and `condition` take the raw z (B, C, h, w), which calling an Encoder
    returns; `decode` takes the normalised latent of Encoder.encode. No call stops gradients: use torch.no_grad() where
    they are not wanted. Under FSDP (fully_shard), register "decode", "condition" and "velocity" with
    register_fsdp_forward_method, and call the loss as dec(z, img).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        mean, std = PIXEL_STATS[c.pixel_stats]
        self.checkpoint = False  # recompute each block in the backward pass instead of keeping its activations
        self.latent_up = (nn.Linear(c.latent_dim, c.width) if c.projector == "linear" else
                          nn.Sequential(nn.Linear(c.latent_dim, c.width), nn.GELU(), nn.Linear(c.width, c.width)))
        self.pos_embed = nn.Parameter(position_grid(c.grid, c.width))
        self.blocks = nn.ModuleList(GlobalBlock(c.width, c.heads) for _ in range(c.gtb_depth))
        # Differs from the paper: the released model adds a second position embedding before the flow head.
        self.head_pos_embed = nn.Parameter(position_grid(c.grid, c.width))
        self.head = FlowHead(3 * c.patch ** 2, c.width, c.flow_width, c.flow_depth)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        # the latent's statistics, 0 and 1 until computed; the file holds one copy for encoder and decoder
        self.register_buffer("latent_mean", torch.zeros(c.latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(c.latent_dim, 1, 1))
        # Differs from the released code: there, all linear weights are drawn with deviation 0.02, which overwrites the
        # flow head's zeros.
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        self.head.zero_init()
        if c.objective == "pixel":  # the head's input is zero: a zero bias would give LN(0), which passes no gradient
            nn.init.normal_(self.head.input_proj.bias)

    def run_block(self, block, *args):
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def condition(self, z):
        """The RAW z (B, C, h, w), not a normalised latent -> condition tokens of eq. 3 (B, N, D), N = h*w row-major."""
        check_tensor("z", z, ("B", self.config.latent_dim, "h", "w"))
        h, w = z.shape[2:]
        x = self.latent_up(z.flatten(2).transpose(1, 2).to(self.pos_embed.dtype))  # (B, N, D)
        x = x + resize_grid(self.pos_embed, h, w).to(x.dtype)  # under autocast the residual stream is bf16 from here on
        for block in self.blocks:
            x = self.run_block(block, x)
        return x + resize_grid(self.head_pos_embed, h, w).to(x.dtype)

    def velocity(self, x_t, t, c):
        """v of eq. 5, fp32: noisy patches x_t (B, N, 3p^2), times t (B, N), condition c (B, N, D) -> like x_t."""
        return at_least_fp32(self.run_block(self.head, x_t, t, c))

    def loss(self, z, img, t=None, noise=None):
        """The RAW z (B, C, h, w), not a normalised latent, and img (B, 3, H, W) -> L_flow of eq. 5, a scalar in fp32.

        t (B, N) and noise (B, N, 3p^2) are drawn if not given (t by sample_t). The "pixel" objective runs the same
        network at t = 1 with zeros for noise. Then -v are the predicted pixels, and the loss is their squared error.
        """
        p = self.config.patch
        check_tensor("z", z, ("B", self.config.latent_dim, "h", "w"))
        B, _, h, w = z.shape
        check_tensor("img", img, (B, 3, h * p, w * p))
        if img.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU's values are not waited for
            with contextlib.suppress(RuntimeError):  # an empty batch and vmap's tensors have no values
                low, high = (x.item() for x in img.detach().aminmax())
                if not (low > -0.5 and high < 1.5):  # a resize may overshoot a little; this form also catches nan
                    raise ValueError(f"img has values from {low:.3g} to {high:.3g}; expected [0, 1]")
        x = patchify((at_least_fp32(img) - self.mean) / self.std, p)  # (B, N, 3p^2)
        if self.config.objective == "pixel":
            t, noise = torch.ones(x.shape[:2], device=x.device), torch.zeros_like(x)
        t = sample_t(x.shape[:2], device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        check_tensor("t", t, x.shape[:2])
        c = self.condition(z)
        return flow_loss(lambda x_t, t: self.velocity(x_t, t, c), x, t, noise)

    forward = loss  # what DDP and FSDP call

    def decode(self, latent, steps=1, noise=None):
        """The NORMALISED latent (B, C, h, w) of Encoder.encode, not the raw z -> image (B, 3, h*p, w*p) in [0, 1].

        `steps` Euler steps lead from noise to the image; the condition is computed once. noise: (B, N, 3p^2), N
        row-major; standard normal noise is drawn if it is not given.
        """
        check_tensor("latent", latent, ("B", self.config.latent_dim, "h", "w"))
        (B, _, h, w), p = latent.shape, self.config.patch
        x = torch.randn(B, h * w, 3 * p * p, device=latent.device) if noise is None else noise
        check_tensor("noise", x, (B, h * w, 3 * p * p))
        c = self.condition(latent * self.latent_std + self.latent_mean)
        if self.config.objective == "pixel":  # a regression: one step from zeros
            x, steps = torch.zeros_like(x), min(steps, 1)
        x = euler(lambda x, t: self.velocity(x, t, c), x, steps)
        return (unpatchify(x, p, h * p, w * p) * self.std + self.mean).clamp(0, 1)

    @classmethod
    def from_pretrained(cls, path):
        """The decoder of a tokenizer file, in eval mode, on the CPU, in fp32. UserError if the file holds no decoder,
        or one whose tensors do not fit its configuration."""
        try:
            with safe_open(path, "pt") as f:
                if "chal_proj.c_fc.weight" in f.keys():
                    raise ValueError("it is the authors' released file; convert it: "
                                     f"python -m tools.convert released {path} OUT.safetensors")
                c = DecoderConfig(**json.loads(f.metadata()["config"])["decoder"])
                state = {k.removeprefix("decoder."): f.get_tensor(k) for k in f.keys() if k.startswith("decoder.")}
                state |= {k: f.get_tensor(k)[:, None, None] for k in ("latent_mean", "latent_std")}  # (C) in the file
            D, M = c.width, c.flow_width
            least = D * (12 * c.gtb_depth * D + M + 2 * c.grid ** 2) + M * (5 * c.flow_depth * M + 6 * c.patch ** 2)
            if 2 * least > os.path.getsize(path):  # a weight takes 2 bytes or more; checked before they are allocated
                raise ValueError(f"its config asks for {least:,} weights, but it has {os.path.getsize(path):,} bytes")
            for k, x in state.items():
                usable = x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
                if not usable or not x.float().isfinite().all() or (k == "latent_std" and x.float().min() <= 0):
                    raise ValueError(f"{k} is {x.dtype}; expected finite floating-point numbers, deviations above 0")
            dec = cls(c)
            dec.load_state_dict({"mean": dec.mean, "std": dec.std} | state)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as e:
            why = " ".join(str(e).split())[:300]
            raise UserError(f"{path} does not hold a UniFlow decoder ({type(e).__name__}: {why})") from None
        return dec.eval()


if __name__ == "__main__":
    dec = Decoder(DecoderConfig(16, width=192, heads=3, gtb_depth=3, flow_depth=6, flow_width=384, patch=8, grid=8))
    z, img = torch.randn(2, 16, 8, 12), torch.rand(2, 3, 64, 96)
    print("latent z  ", tuple(z.shape))
    print("condition ", tuple(dec.condition(z).shape))
    print("loss      ", f"{dec.loss(z, img).item():.4f} (untrained: v = 0)")
    with torch.no_grad():  # this decoder has no stored statistics, so the normalised latent is z itself
        print("image     ", tuple(dec.decode(z).shape), "in [0, 1], one step")
        print("image     ", tuple(dec.decode(z, steps=4).shape), "in [0, 1], four steps")
    print("parameters", f"{sum(p.numel() for p in dec.parameters()):,}")
