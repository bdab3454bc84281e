"""The patch-wise pixel flow decoder of UniFlow: a latent back to pixels in one step (paper, Sec. 3.2).

    C    = GTB(P_up(z) + PE)                         globally coherent condition tokens, eq. 3
    x_t  = (1 - t) x + t eps,    u = eps - x         rectified flow on each p x p patch, t = 1 noise, t = 0 image, eq. 4
    L    = mean (v(x_t, t, c) - u)^2                 eq. 5, over patches and elements
    x   <- x - v(x, t, c) / steps                    Euler steps from noise; one is the default

x: patches of the image normalised by the encoder's pixel mean and std, in order (channel, row, column); v is an MLP that
sees one patch and its own condition token, nothing of its neighbours. Symbols: B batch, C latent channels, D width,
h, w token grid, N = h*w patches, p patch side, H = h*p, W = w*p. Images are (B, 3, H, W) in [0, 1].

    dec = Decoder.from_pretrained("out/model.safetensors")
    img = dec.decode(latent)                         # latent (B, C, h, w), NORMALISED: what Encoder.encode returns
    loss = dec.loss(z, img)                          # z (B, C, h, w), RAW: what calling an Encoder returns

`python decoder.py` prints the shapes. Needs torch and safetensors; no other file of this project.
The MLP is the flow head of the authors' release, whose ancestors are DiT (Peebles & Xie 2023) and MAR (Li et al. 2024).
"""
import json
import math
import os
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file that is not there."""


PIXEL_STATS = {  # per-channel mean and standard deviation of the normalised pixel space: the encoder's
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
RELEASED_NAMES = [  # the authors' file -> ours, replaced one after the other
    ("chal_unproj.c_fc", "latent_up.0"), ("chal_unproj.c_proj", "latent_up.2"),
    ("global_block_pos_embed", "pos_embed"), ("decoder_pos_embed", "head_pos_embed"), ("global_blocks", "blocks"),
    ("flow_head.net.", "head."), ("time_embed.mlp.0", "time_fc1"), ("time_embed.mlp.2", "time_fc2"), ("cond_embed", "cond_proj"),
    ("res_blocks", "blocks"), ("in_ln", "norm"), ("final_layer.adaLN_modulation.1", "final_modulation"),
    ("final_layer.linear", "output"), ("adaLN_modulation.1", "modulation"),
    (".attn.", "."), (".mlp.0.", ".fc1."), (".mlp.2.", ".fc2."), (".mlp.", "."),
]


@dataclass(frozen=True)
class DecoderConfig:
    latent_dim: int = 64           # C
    width: int = 1024              # D of the condition tokens
    heads: int = 16                # of the global transformer blocks
    gtb_depth: int = 6             # K global transformer blocks; 0 leaves them out
    flow_depth: int = 12           # residual blocks of the flow head
    flow_width: int = 1024         # of the flow head; narrower than twice 3p^2 costs PSNR at small patches
    patch: int = 14                # p, pixels
    grid: int = 32                 # side of the patch grid that the position embeddings cover (size / p)
    projector: str = "mlp"         # "mlp": Linear-GELU-Linear as released; "linear": the paper's words
    objective: str = "flow"        # "flow": eq. 5; "pixel": the same network regresses the pixels (Table 5c)
    pixel_stats: str = "imagenet"  # a key of PIXEL_STATS

    def __post_init__(self):
        for f in fields(self):  # which may come from a file
            x = getattr(self, f.name)
            if type(x) is not f.type or f.type is int and not 0 <= x <= 65536:
                raise UserError(f"{f.name} is {x!r:.50}, expected {f.type.__name__}" + " from 0 to 65536" * (f.type is int))
        if (min(self.latent_dim, self.width, self.heads, self.flow_width, self.patch, self.grid) < 1 or self.width % self.heads
                or self.width % 4 or max(self.gtb_depth, self.flow_depth) > 1000):
            raise UserError(f"decoder width {self.width} must be a multiple of 4 and of heads {self.heads}, all sizes positive, "
                            f"and depths at most 1000: {self}")
        known = self.projector in ("mlp", "linear") and self.objective in ("flow", "pixel")
        if self.pixel_stats not in PIXEL_STATS or not known:
            raise UserError(f"projector {self.projector!r} must be mlp or linear, decoder {self.objective!r} flow or pixel, "
                            f"pixel_stats {self.pixel_stats!r} one of {' '.join(PIXEL_STATS)}")


def check_image(img, patch):
    """Raise ValueError unless img is (B, 3, H, W) floating point, H and W multiples of the patch, and in about [0, 1].

    The range is looked at on the CPU alone: a GPU would have to be waited for.
    """
    if not isinstance(img, torch.Tensor) or img.ndim != 4 or img.shape[1] != 3 or not img.is_floating_point():
        came = f"{img.dtype} {tuple(img.shape)}" if isinstance(img, torch.Tensor) else type(img).__name__
        raise ValueError(f"img is {came}; expected a floating-point tensor (B, 3, H, W) in [0, 1]: img.float() / 255?")
    H, W = img.shape[2:]
    if H % patch or W % patch or not H * W:
        fit = [max(patch, round(s / patch) * patch) for s in (W, H)]
        raise ValueError(f"image is {W}x{H} pixels; sides must be multiples of the patch {patch}: try {fit[0]}x{fit[1]}")
    if img.device.type == "cpu" and img.numel() and not torch.compiler.is_compiling():
        try:
            low, high = (x.item() for x in img.detach().aminmax())
        except RuntimeError:  # there is nothing to look at: vmap's and fake tensors have no values of their own
            return
        if not (low > -0.5 and high < 1.5):  # a resize may overshoot a little; also catches nan
            raise ValueError(f"img has values from {low:.3g} to {high:.3g}; expected [0, 1], as the network normalises inside")


def patchify(x, p):
    """Pixels (B, 3, H, W) -> patches (B, N, 3p^2): N row-major over the grid, elements in order (channel, row, column)."""
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

    velocity: a callable v(x_t, t). x: data (B, ...); noise: eps, of its shape; t: times whose shape is the first
    dimensions of x's, one time for each image (B,) or each patch (B, N); 1 = noise. Any flow model can use it.
    """
    if noise.shape != x.shape or t.shape != x.shape[:t.ndim]:
        raise ValueError(f"x is {tuple(x.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}; expected noise of "
                         "x's shape, and a t of its first dimensions")
    s = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
    # Differs from the paper: eq. 5 reads as a sum over the patch; the mean is 1/(3p^2) of it (--lambda_f 588 at p = 14).
    return (same_shape(velocity((1 - s) * x + s * noise, t), x) - (noise - x)).square().mean()


def euler(velocity, noise, steps=1):
    """Solve dx/dt = v(x, t) from noise at t = 1 to data at t = 0 by Euler steps: x <- x - v(x, t) / steps.

    velocity: a callable v(x, t), x of noise's shape (B, ..., D) and t (B, ...), a time for each vector. -> like noise.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    x = noise
    for i in range(steps):
        t = torch.full(x.shape[:-1], 1 - i / steps, dtype=torch.float32, device=x.device)
        x = x - same_shape(velocity(x, t), x) / steps
    return x


def same_shape(v, x):
    """The velocity v, if it has x's shape. What is broadcast instead would be another loss, in silence."""
    if v.shape != x.shape:
        raise ValueError(f"velocity is {tuple(v.shape)}; expected {tuple(x.shape)}, as x is")
    return v


def at_least_fp32(x):
    """What losses and the flow's state are computed in, under autocast and in half-precision modules too."""
    return x if x.dtype == torch.float64 else x.float()


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
    """Residual block of the flow head on x (B, N, width): x + gate * MLP(LN(x) * (1 + scale) + shift), modulated
    by y, of x's shape."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x, y):
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.fc2(F.silu(self.fc1(h)))


class FlowHead(nn.Module):
    """The velocity MLP v(x_t, t, c): x (..., channels), times t (...) with 1 = noise, c (..., cond_width) -> (..., channels).

    Each vector is a sample of its own: a patch of B images' (B, N) here, a token in MAR. All modulations and the output
    start at zero, so each residual block starts as the identity and the velocity at 0.
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
        if not x.shape[:-1] == t.shape == c.shape[:-1]:
            raise ValueError(f"x is {tuple(x.shape)}, t {tuple(t.shape)}, c {tuple(c.shape)}; expected one t and one c "
                             "for each vector of x")
        dtype = self.output.weight.dtype
        s = 1 - t  # the released network's time: it runs from noise at s = 0, and predicts x - eps, which is -v
        time = self.time_fc2(F.silu(self.time_fc1(sinusoid(1000 * s, 256).to(dtype))))  # (..., width)
        y = F.silu(time + self.cond_proj(c.to(dtype)))
        x = self.input_proj(x.to(dtype))  # (..., width)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.final_modulation(y).chunk(2, dim=-1)
        return -self.output(self.final_norm(x) * (1 + scale) + shift)  # (..., channels)


def sinusoid(t, dim):
    """Transformer features of positions t (...) -> (..., dim): cosines first, then sines, of angular frequencies from 1 down to almost 1/10000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_grid(grid, width):
    """2-D sin-cos position embedding of a square grid, (1, grid*grid, width): half the width for rows, half for columns."""
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


def released_name(name):
    """Our name of a decoder tensor in the authors' released file."""
    for theirs, ours in RELEASED_NAMES:
        name = name.replace(theirs, ours)
    return name


class Decoder(nn.Module):
    """A latent -> the image (B, 3, h*p, w*p) in [0, 1].

    Two latents: `loss` = `forward` and `condition` take the raw z (B, C, h, w), as calling an Encoder returns it; `decode`
    takes the latent normalised by the stored statistics, as Encoder.encode returns it. No call stops gradients: use
    torch.no_grad() where they are not wanted. Under FSDP (fully_shard), register "decode", "condition" and
    "velocity" with register_fsdp_forward_method, and call the loss as dec(z, img).
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
        # statistics of the latent, identity until computed; one copy in the file serves encoder and decoder
        self.register_buffer("latent_mean", torch.zeros(c.latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(c.latent_dim, 1, 1))
        self.init_weights()

    def init_weights(self):
        """Linear weights Xavier-uniform, biases 0; then zero: every modulation (each residual block of the flow head
        starts as the identity) and its output layer (the velocity starts at 0)."""
        # Differs from the released code: there a later parent `apply` overwrites these zeros, and draws all linear weights with deviation 0.02.
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        self.head.zero_init()
        if self.config.objective == "pixel":  # its only input to the head: from zero, LN(0) = 0 and the zeros above pass no gradient
            nn.init.normal_(self.head.input_proj.bias)

    def _run(self, block, *args):
        recompute = self.checkpoint and torch.is_grad_enabled()
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False) if recompute else block(*args)

    def check_latent(self, latent, name):
        """ValueError unless it is floating point (B, C, h, w)."""
        C, tensor = self.config.latent_dim, isinstance(latent, torch.Tensor)
        if not tensor or latent.ndim != 4 or latent.shape[1] != C or not latent.is_floating_point() or 0 in latent.shape[2:]:
            came = f"{latent.dtype} {tuple(latent.shape)}" if tensor else type(latent).__name__
            raise ValueError(f"{name} is {came}; expected a floating-point tensor (B, {C}, h, w)")

    def condition(self, z):
        """C of eq. 3 of the RAW z (B, C, h, w), not of a normalised latent -> (B, N, D), N = h*w row-major."""
        self.check_latent(z, "z")
        h, w = z.shape[2:]
        x = self.latent_up(z.flatten(2).transpose(1, 2).to(self.pos_embed.dtype))  # (B, N, D)
        x = x + resize_grid(self.pos_embed, h, w).to(x.dtype)  # under autocast the residual stream is bf16 from here on
        for block in self.blocks:
            x = self._run(block, x)
        return x + resize_grid(self.head_pos_embed, h, w).to(x.dtype)

    def velocity(self, x_t, t, c):
        """v of eq. 5: noisy patches x_t (B, N, 3p^2), times t (B, N) with 1 = noise, condition c (B, N, D) -> (B, N, 3p^2), fp32."""
        return at_least_fp32(self._run(self.head, x_t, t, c))

    def loss(self, z, img, t=None, noise=None):
        """L_flow of eq. 5 for the RAW z (B, C, h, w), not a normalised latent, and img (B, 3, H, W) in [0, 1]: a scalar, in fp32.

        t (B, N) and noise (B, N, 3p^2) are drawn if not given (t by sample_t). The "pixel" objective is the same network
        at t = 1 with zeros for noise, where the loss is the squared error of the pixels -v. Raises ValueError for what is
        no image or latent, or not of one batch and grid.
        """
        p = self.config.patch
        check_image(img, p)
        self.check_latent(z, "z")
        (B, _, H, W), (h, w) = img.shape, z.shape[2:]
        if (B, H, W) != (z.shape[0], h * p, w * p):
            raise ValueError(f"img is {tuple(img.shape)}, z {tuple(z.shape)}; expected one batch, and an image of {h * p}x{w * p} "
                             f"(HxW) for a grid of {h}x{w} patches of {p}")
        x = patchify((at_least_fp32(img) - self.mean) / self.std, p)  # (B, N, 3p^2)
        for name, given, shape in ("t", t, x.shape[:2]), ("noise", noise, x.shape):
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} is {tuple(given.shape)}; expected {tuple(shape)}")
        if self.config.objective == "pixel":
            t, noise = torch.ones(x.shape[:2], device=x.device), torch.zeros_like(x)
        t = sample_t(x.shape[:2], device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        c = self.condition(z)
        return flow_loss(lambda x_t, t: self.velocity(x_t, t, c), x, t, noise)

    forward = loss  # what DistributedDataParallel calls

    def decode(self, latent, steps=1, noise=None):
        """The NORMALISED latent (B, C, h, w) of Encoder.encode, not the raw z -> image (B, 3, h*p, w*p), clamped to [0, 1].

        `steps` Euler steps lead from noise (B, N, 3p^2), N row-major, standard normal, drawn if not given, to the image;
        the condition is computed once. Raises ValueError for what is no latent, and for fewer steps than 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; decoding takes at least 1")
        self.check_latent(latent, "latent")
        B, _, h, w = latent.shape
        p = self.config.patch
        shape = B, h * w, 3 * p * p
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}; expected {shape}")
        c = self.condition(latent * self.latent_std + self.latent_mean)
        x = torch.randn(shape, device=latent.device) if noise is None else noise
        if self.config.objective == "pixel":  # a regression: one step from zeros
            x, steps = torch.zeros_like(x), 1
        x = euler(lambda x, t: self.velocity(x, t, c), x, steps)
        return (unpatchify(x, p, h * p, w * p) * self.std + self.mean).clamp(0, 1)

    @classmethod
    def from_pretrained(cls, path):
        """The decoder of a tokenizer file, ours or the authors' released one, in eval mode on the CPU in fp32.

        Raises MissingFile, or UserError if the file is no such tokenizer or its tensors do not fit its configuration.
        """
        if not os.path.isfile(path):
            raise MissingFile(f"{path}: no such file")
        stats = {"latent_mean", "latent_std"}
        try:
            with safe_open(path, "pt") as f:
                released = "chal_proj.c_fc.weight" in f.keys()
                c = DecoderConfig() if released else DecoderConfig(**json.loads(f.metadata()["config"])["decoder"])
                D, W, mlp = c.width, c.flow_width, c.projector == "mlp"
                numbers = D * ((12 * c.gtb_depth + mlp) * D + W + 2 * c.grid ** 2) + W * ((5 * c.flow_depth + 3) * W + 6 * c.patch ** 2)
                if 2 * numbers > os.path.getsize(path):  # said before they are allocated
                    raise ValueError(f"it asks for {numbers:,} weights, and has {os.path.getsize(path):,} bytes")
                if released:  # the defaults of DecoderConfig, no statistics
                    parts = ("chal_unproj.", "global_block", "decoder_pos_embed", "flow_head.net.")
                    state = {released_name(k): f.get_tensor(k) for k in f.keys() if k.startswith(parts)}
                else:
                    ours = sorted(k for k in f.keys() if k.startswith("decoder.") or k in stats)  # the file's statistics last
                    state = {k.removeprefix("decoder."): f.get_tensor(k) for k in ours}
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as e:
            raise UserError(f"{path} does not hold a UniFlow decoder ({type(e).__name__}: {' '.join(str(e).split())[:300]})") from None
        dec = cls(c)
        own = dict(dec.named_parameters())
        if not released:  # views of the buffers; others are in a file made of a state_dict, train.py's has none
            own |= {k: x for k, x in dec.named_buffers() if k in state} | {k: getattr(dec, k).flatten() for k in stats}
        if released and state.keys() - own.keys():
            warnings.warn(f"{path}: ignored tensors that the decoder does not use: {' '.join(sorted(state.keys() - own.keys()))}")
            state = {k: v for k, v in state.items() if k in own}
        usable = lambda k: (own[k].shape == state[k].shape and state[k].dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
                            and state[k].float().isfinite().all() and not (k == "latent_std" and state[k].float().min() <= 0))
        wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if not usable(k))
        if wrong:
            raise UserError(f"{path} does not fit its configuration; missing, unknown, of another shape or type, not finite, or "
                             f"a standard deviation not positive: {wrong[:3]!s:.300}")
        with torch.no_grad():
            for k, x in own.items():
                x.copy_(state[k])
        return dec.eval()


if __name__ == "__main__":
    dec = Decoder(DecoderConfig(latent_dim=16, width=192, heads=3, gtb_depth=3, flow_depth=6, flow_width=384, patch=8, grid=8))
    z, img = torch.randn(2, 16, 8, 12), torch.rand(2, 3, 64, 96)
    print("latent z  ", tuple(z.shape))
    print("condition ", tuple(dec.condition(z).shape))
    print("loss      ", f"{dec.loss(z, img).item():.4f} (untrained: v = 0)")
    with torch.no_grad():  # without stored statistics the latent is z
        print("image     ", tuple(dec.decode(z).shape), "in [0, 1], one step")
        print("image     ", tuple(dec.decode(z, steps=4).shape), "in [0, 1], four steps")
    print("parameters", f"{sum(p.numel() for p in dec.parameters()):,}")
