"""A plain diffusion transformer on the tokenizer's latents: the alternative to MAR that costs a fraction of it.

    x_t = (1 - t) x + t eps                              t = 1 noise, t = 0 the latent
    v   = (x_t - net(x_t, t, y)) / max(t, 0.05)          the network predicts the latent, the loss is the velocity's:
    L   = mean (v - (eps - x))^2                         decoder.flow_loss, with one t for each latent
    t   = s u / (1 + (s - 1) u)                          u = sigmoid(N(0, 1)) in training, a regular grid in sampling
    s   = max(1, sqrt(h w C / 4096))                     4 for 64 channels on 32 x 32: more numbers need more noise
    x  <- x - (t - t') (v(x, t) + v(x', t')) / 2         Heun's steps, x' = x - (t - t') v(x, t); the last is Euler's
    v  <- v_c + (cfg - 1) (v_c - v_none)                 guidance, while t is in an interval

Whose evidence each choice rests on (none is on 64 channels of 1,024 tokens: that together they suit is our bet):
- the latent in 2 x 2 patches, 256 tokens of 256 numbers: ours. It costs a quarter of 1,024 tokens, what a 256-px DiT
  costs. RAE (Zheng et al. 2025) finds that the width must not be below a token's numbers: here 384 and more.
- x-prediction with the loss on v: JiT (Li & He 2025) and RiT, where tokens have many numbers. `prediction="v"` is the
  plain flow. Below t = 0.05 the network's output stands for x_t - 0.05 v, so that v is right there, too.
- shifted times: Esser et al. 2024 (Stable Diffusion 3), with the base of 4,096 numbers from RAE; logit-normal times
  likewise. A smaller latent is not shifted: nobody tried, and towards t = 0 the loss of x-prediction explodes.
- latents normalised per channel: LightningDiT (Yao et al. 2025), and the tokenizer's encode does it.
- RMSNorm, SwiGLU, rotary positions beside fixed sine-cosine ones: LightningDiT, RAE and RiT alike. QK-norm:
  LightningDiT, against NaN in bf16. adaLN-zero and the sizes: DiT (Peebles & Xie 2023).
- guidance on an interval: Kynkaanniemi et al. 2024. Its ends, and 25 steps of Heun: RiT (50 steps gained it nothing).

Symbols: B batch, C latent channels, h, w latent grid, p = 2 patch side, N = h*w / p^2 tokens, D width. Latents
(B, C, h, w) are normalised, as Encoder.encode returns them. A label of -1 is "no class".

    model = DiT(config("dit-xl", channels=64, grid=32))
    loss = model(latent, labels)
    latent = model.sample(labels, noise, steps=25, cfg=3.0)

`python -m downstream.dit` prints shapes and parameter counts. Needs torch, and decoder.py beside it.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from decoder import flow_loss, patchify, position_grid, sinusoid, unpatchify


@dataclass(frozen=True)
class DiTConfig:
    channels: int = 64       # C of the latent
    grid: int = 32           # side of the latent
    classes: int = 1000
    width: int = 1152        # D
    depth: int = 28
    heads: int = 16
    patch: int = 2           # p, latent vectors
    prediction: str = "x"    # what the network gives: "x", the latent, or "v", the velocity
    shift: float = 0.0       # s; 0: by the formula above; 1: none
    t_least: float = 0.05    # below it x-prediction divides by it
    label_drop: float = 0.1  # how often training hides the class, for guidance


SIZES = {  # DiT's own
    "dit-s": DiTConfig(width=384, depth=12, heads=6),
    "dit-b": DiTConfig(width=768, depth=12, heads=12),
    "dit-l": DiTConfig(width=1024, depth=24, heads=16),
    "dit-xl": DiTConfig(width=1152, depth=28, heads=16),
}


def config(name, **changes):
    """The DiTConfig of a key of SIZES, with fields changed."""
    return replace(SIZES[name], **changes)


def shift_time(u, s):
    """Times u in [0, 1], moved towards noise (t = 1) for s > 1; the ends stay."""
    return s * u / (1 + (s - 1) * u)


def heun(velocity, noise, times):
    """Solve dx/dt = v(x, t) along `times`, floats from 1 down to 0, by Heun's steps. The last is Euler's, as v is not
    asked for at t = 0. velocity: a callable v(x, t)."""
    x = noise
    for t, after in zip(times[:-1], times[1:]):
        v = velocity(x, t)
        if after > 0:
            v = (v + velocity(x - (t - after) * v, after)) / 2
        x = x - (t - after) * v
    return x


def rotary_angles(grid, width):
    """Angles (grid^2, width / 2) that turn the pairs of an attention head's `width` numbers at each place of the grid,
    row-major: the first half of the pairs by the row, the others by the column, at frequencies from 1 to 1/10000."""
    freqs = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([rows.flatten()[:, None] * freqs, cols.flatten()[:, None] * freqs], dim=1)


def rotate(x, cos, sin):
    """x (B, heads, N, d), its pair (k, k + d/2) at place n turned by the angle whose cosine is cos[n, k]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def rms_norm(x):
    """x (..., D) divided by the root of the mean of its squares; without a gain, as the modulation has one."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Transformer block on x (B, N, D), modulated by y (B, D): attention and SwiGLU, each x + gate * f(norm(x) * (1 +
    scale) + shift). The modulation starts at zero, so that the block starts as the identity."""

    def __init__(self, width, heads):
        super().__init__()
        hidden = (8 * width // 3 + 63) // 64 * 64  # as many weights as an MLP of 4 D, to a multiple of 64
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_gain, self.k_gain = (nn.Parameter(torch.ones(width // heads)) for _ in "qk")
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x, y, cos, sin):
        B, N, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(y)[:, None].chunk(6, dim=-1)  # each (B, 1, D)
        h = rms_norm(x) * (1 + scale1) + shift1
        qkv = self.qkv(h).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        q, k = (rotate(rms_norm(a) * gain, cos, sin).to(v.dtype) for a, gain in ((q, self.q_gain), (k, self.k_gain)))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + gate1 * self.proj(h)
        gate, h = self.fc1(rms_norm(x) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return x + gate2 * self.fc2(F.silu(gate) * h)


class DiT(nn.Module):
    """A generator of latents (B, C, h, w). Calling it gives the training loss."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        sizes = [x for x in vars(c).values() if isinstance(x, int)]
        if min(sizes) < 1 or c.grid % c.patch or c.width % (4 * c.heads):
            raise ValueError(f"sizes must be at least 1, grid a multiple of patch, and width of 4 * heads: {c}")
        if c.prediction not in ("x", "v") or c.shift < 0 or c.t_least <= 0 or not 0 <= c.label_drop <= 1:
            raise ValueError("prediction must be x or v, shift at least 0, t_least above 0, and label_drop between 0 "
                             f"and 1: {c}")
        D, numbers, grid = c.width, c.channels * c.patch ** 2, c.grid // c.patch
        self.shift = c.shift or max(1.0, math.sqrt(c.channels * c.grid ** 2 / 4096))
        self.token_proj = nn.Linear(numbers, D)
        self.class_embed = nn.Embedding(c.classes, D)
        self.no_class = nn.Parameter(torch.empty(1, D))
        self.time_fc1 = nn.Linear(256, D)
        self.time_fc2 = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block(D, c.heads) for _ in range(c.depth))
        self.final_modulation = nn.Linear(D, 2 * D)
        self.output = nn.Linear(D, numbers)
        angles = rotary_angles(grid, D // c.heads)
        for name, table in ("cos", angles.cos()), ("sin", angles.sin()), ("pos", position_grid(grid, D)):
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Linear weights Xavier-uniform, biases 0, classes normal with deviation 0.02; then zero: every modulation, so
        that each block starts as the identity, and the output."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for p in self.class_embed.weight, self.no_class:
            nn.init.normal_(p, std=0.02)
        for m in [b.modulation for b in self.blocks] + [self.final_modulation, self.output]:
            nn.init.zeros_(m.weight)

    def compile_blocks(self):
        """Compile what takes the time."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def net(self, x_t, t, labels):
        """What the network gives for x_t (B, C, h, w), times t (B,), labels (B,), -1: none -> (B, C, h, w), in fp32."""
        known = torch.where(labels[:, None] < 0, self.no_class, self.class_embed(labels.clamp(min=0)))
        y = F.silu(self.time_fc2(F.silu(self.time_fc1(sinusoid(1000 * t, 256)))) + known)  # (B, D)
        x = self.token_proj(patchify(x_t, self.config.patch))  # (B, N, D)
        x = x + self.pos.to(x.dtype)
        for block in self.blocks:
            x = block(x, y, self.cos, self.sin)
        shift, scale = self.final_modulation(y)[:, None].chunk(2, dim=-1)
        x = self.output(rms_norm(x) * (1 + scale) + shift)  # (B, N, C p^2)
        return unpatchify(x.float(), self.config.patch, *x_t.shape[2:])

    def velocity(self, x_t, t, labels):
        """v for x_t (B, C, h, w), times t (B,) with 1 = noise, labels (B,), -1: none -> (B, C, h, w), in fp32."""
        out = self.net(x_t, t, labels)
        if self.config.prediction == "v":
            return out
        return (x_t - out) / t.clamp(min=self.config.t_least)[:, None, None, None]

    def loss(self, latent, labels):
        """The training loss of latents (B, C, h, w), labels (B,), a scalar. It draws times, noise, labels to drop."""
        self.check(latent, labels)
        dropped = torch.rand(labels.shape, device=labels.device) < self.config.label_drop
        labels = torch.where(dropped, -1, labels)
        t = shift_time(torch.sigmoid(torch.randn(len(latent), device=latent.device)), self.shift)
        return flow_loss(lambda x_t, t: self.velocity(x_t, t, labels), latent, t, torch.randn_like(latent))

    forward = loss  # model(latent, labels)

    @torch.no_grad()
    def sample(self, labels, noise, steps=25, cfg=1.0, interval=(0.02, 0.9), temperature=1.0, tick=lambda: None):
        """Latents (B, C, h, w) of classes labels (B,), from noise of their shape, in `steps` of Heun.

        cfg: guidance at times in `interval`, 1 for none; outside of it the network runs once, with the class.
        temperature scales the noise. tick is called after each evaluation of v, 2 * steps - 1 times.
        """
        self.check(noise, labels)

        def velocity(x, t):
            guided = cfg != 1 and interval[0] <= t <= interval[1]
            twice = (lambda y, z: torch.cat([y, z])) if guided else (lambda y, z: y)
            times = torch.full((len(x) * (1 + guided),), t, device=x.device)
            v = self.velocity(twice(x, x), times, twice(labels, torch.full_like(labels, -1)))
            tick()
            if not guided:
                return v
            v, none = v.chunk(2)
            return v + (cfg - 1) * (v - none)
        return heun(velocity, temperature * noise, [shift_time(1 - i / steps, self.shift) for i in range(steps + 1)])

    def check(self, latent, labels):
        """ValueError unless latent is (B, C, h, w) of this configuration, with one label each."""
        expected = (self.config.channels, self.config.grid, self.config.grid)
        if latent.shape[1:] != expected or labels.shape != latent.shape[:1]:
            raise ValueError(f"latents are {tuple(latent.shape)}, labels {tuple(labels.shape)}; expected (B, "
                             f"{', '.join(map(str, expected))}) and (B,)")


if __name__ == "__main__":
    for name in SIZES:
        with torch.device("meta"):
            model = DiT(config(name))
        print(f"{name:6s}  latent 64x32x32  {sum(p.numel() for p in model.parameters()) / 1e6:6.1f}M parameters, "
              f"{model.cos.shape[0]} tokens of {model.output.out_features} numbers")
    model = DiT(config("dit-s", channels=16, grid=8, classes=100))
    latent, labels = torch.randn(2, 16, 8, 8), torch.tensor([3, 7])
    print("latent  ", tuple(latent.shape), f" times are shifted by {model.shift:g}")
    print("loss    ", f"{model(latent, labels).item():.4f} (untrained: the prediction is 0)")
    sampled = model.eval().sample(labels, torch.randn(2, 16, 8, 8), cfg=3.0)
    print("sampled ", tuple(sampled.shape), "in 25 steps of Heun")
