"""MAR (Li et al. 2024, "Autoregressive Image Generation without Vector Quantization") on the tokenizer's latents.

    x    = the N = h*w tokens of a latent, in a random order, of which the first V are visible
    e    = Encoder([class token, 64 times | visible tokens])       they alone: masked tokens are left out
    c_i  = Decoder([e | a mask token at every masked place])_i     one condition for each masked token i
    L    = mean over masked i of |v(x_i(t), t, c_i) - (eps - x_i)|^2,    x_i(t) = (1 - t) x_i + t eps
    N - V_k = floor(N cos(pi/2 (k + 1) / K))                       tokens still masked after iteration k of K
    s_k  = 1 + (cfg - 1) V_k / N,    v = v_c + (s_k - 1) (v_c - v_none)        guidance grows with what is visible

Everything is as published, except the head: where MAR has a DDPM of 1000 steps, its noise schedule, a variational bound
and 100 sampling steps, this has rectified flow by decoder.FlowHead, the same MLP with half as many outputs. The loss is
the tokenizer's own flow_loss at its own times. Two savings change no result: the head runs on masked tokens alone (MAR
runs it on all and weighs the loss by the mask), and in sampling on the tokens of the iteration alone.
Differs from MAR: the flow's steps add no noise, so `temperature` scales the noise that they start from.

Symbols: B batch, C latent channels, h, w latent grid, N = h*w tokens, D width, V visible tokens, M tokens that are
asked for. Latents (B, C, h, w) are normalised, as Encoder.encode returns them. A label of -1 is "no class".

    model = MAR(config("mar-l", channels=64, grid=32))
    loss = model(latent, labels)
    latent = model.sample(labels, noise, order, iterations=256, cfg=3.0)

`python -m downstream.mar` prints shapes and parameter counts. Needs torch, and decoder.py and encoder.py.
Structure, names and numbers of MAR: github.com/LTH14/mar, which is also where its released checkpoints are.
"""
import argparse
import math
import os
import pickle
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from decoder import FlowHead, euler, flow_loss, sample_t
from encoder import MissingFile, UserError, one_line, refuse_pickle


@dataclass(frozen=True)
class MARConfig:
    channels: int = 64        # C of the latent
    grid: int = 32            # side of the latent: N = grid^2 tokens
    classes: int = 1000
    width: int = 1024         # D of encoder and decoder
    depth: int = 16           # blocks of the encoder, and as many of the decoder
    heads: int = 16
    head_width: int = 1280    # of the flow head
    head_depth: int = 8
    buffer: int = 64          # copies of the class token in front of the tokens
    dropout: float = 0.1      # of attention, of its output, and twice in the MLP
    label_drop: float = 0.1   # how often training hides the class, for guidance
    mask_least: float = 0.7   # the least part of the tokens that is masked in training
    repeats: int = 4          # times and noises drawn for each masked token of a training image


SIZES = {  # b, l, h are the released ones; s is ours, for small latents
    "mar-s": MARConfig(width=384, depth=8, heads=6, head_width=768, head_depth=4),
    "mar-b": MARConfig(width=768, depth=12, heads=12, head_width=1024, head_depth=6),
    "mar-l": MARConfig(width=1024, depth=16, heads=16, head_width=1280, head_depth=8),
    "mar-h": MARConfig(width=1280, depth=20, heads=16, head_width=1536, head_depth=12),
}
RELEASED_NAMES = [  # a released MAR checkpoint -> ours, replaced one after the other
    ("class_emb.", "class_embed."), ("fake_latent", "no_class"), ("z_proj_ln", "token_norm"), ("z_proj", "token_proj"),
    ("encoder_pos_embed_learned", "encoder_pos"), ("encoder_blocks", "encoder"), ("decoder_embed", "decoder_proj"),
    ("decoder_pos_embed_learned", "decoder_pos"), ("decoder_blocks", "decoder"),
    ("diffusion_pos_embed_learned", "head_pos"), (".attn.", "."), (".mlp.fc", ".fc"),
    ("diffloss.net.", "head."), ("time_embed.mlp.0", "time_fc1"), ("time_embed.mlp.2", "time_fc2"),
    ("cond_embed", "cond_proj"), ("res_blocks", "blocks"), ("in_ln", "norm"), (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."), ("final_layer.adaLN_modulation.1", "final_modulation"), ("final_layer.linear", "output"),
    ("adaLN_modulation.1", "modulation"),
]


def config(name, **changes):
    """The MARConfig of a key of SIZES, with fields changed."""
    return replace(SIZES[name], **changes)


def mask_ratio(least, u):
    """The part of the tokens that is masked in training, of u uniform in [0, 1): normal with mean 1 and deviation 0.25,
    cut off outside [least, 1]."""
    low, high = (torch.special.ndtr(torch.tensor((x - 1) / 0.25, dtype=torch.float64)) for x in (least, 1.0))
    return min(1.0, max(least, 1 + 0.25 * torch.special.ndtri(low + u * (high - low)).item()))


def portions(N, iterations):
    """Yields (done, until, masked) of each iteration of a sampling run: it predicts the tokens done..until of an order
    of N, and by the cosine schedule leaves `masked` tokens: fewer than the last one did, but at least 1, which the last
    iteration predicts, too. Iterations that are one too many, and have no token to predict, are left out."""
    masked = N
    for k in range(iterations):
        done = N - masked
        masked = max(1, min(masked - 1, math.floor(N * math.cos(math.pi / 2 * (k + 1) / iterations))))
        until = N - masked if k + 1 < iterations else N
        if until > done:
            yield done, until, masked


def drop_labels(labels, rate):
    """labels (B,), each replaced by -1, no class, with probability `rate`."""
    return torch.where(torch.rand(labels.shape, device=labels.device) < rate, -1, labels)


def take(x, index):
    """Rows x (B, N, D) at index (B, M) -> (B, M, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class Block(nn.Module):
    """Transformer block on x (B, N, D): pre-norm self-attention and MLP, with dropout."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.drop(self.proj(h.transpose(1, 2).reshape(B, N, D)))
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x))))))


class MAR(nn.Module):
    """A generator of latents (B, C, h, w). Calling it gives the training loss."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        N, D = c.grid ** 2, c.width
        sizes = [x for x in vars(c).values() if isinstance(x, int)]
        parts = c.dropout, c.label_drop, c.mask_least
        if min(sizes) < 1 or D % c.heads or not all(0 <= part <= 1 for part in parts):
            raise ValueError("sizes must be at least 1, width a multiple of heads, and dropout, label_drop and "
                             f"mask_least between 0 and 1: {c}")
        self.class_embed = nn.Embedding(c.classes, D)
        self.no_class = nn.Parameter(torch.empty(1, D))
        self.token_proj = nn.Linear(c.channels, D)
        self.token_norm = nn.LayerNorm(D, 1e-6)
        self.encoder_pos = nn.Parameter(torch.empty(1, c.buffer + N, D))
        self.encoder = nn.ModuleList(Block(D, c.heads, c.dropout) for _ in range(c.depth))
        self.encoder_norm = nn.LayerNorm(D, 1e-6)
        self.decoder_proj = nn.Linear(D, D)
        self.mask_token = nn.Parameter(torch.empty(1, 1, D))
        self.decoder_pos = nn.Parameter(torch.empty(1, c.buffer + N, D))
        self.decoder = nn.ModuleList(Block(D, c.heads, c.dropout) for _ in range(c.depth))
        self.decoder_norm = nn.LayerNorm(D, 1e-6)
        self.head_pos = nn.Parameter(torch.empty(1, N, D))
        self.head = FlowHead(c.channels, D, c.head_width, c.head_depth)
        self.init_weights()

    def init_weights(self):
        """Tables and the free parameters normal with deviation 0.02, linear weights Xavier-uniform, biases 0; then the
        zeros of the head."""
        for p in (self.class_embed.weight, self.no_class, self.mask_token, self.encoder_pos, self.decoder_pos,
                  self.head_pos):
            nn.init.normal_(p, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        self.head.zero_init()

    def compile_blocks(self):
        """Compile what takes the time. How many tokens are visible, and how many are asked for, changes at every step;
        the decoder always sees all."""
        for block in (*self.encoder, self.head):
            block.compile(dynamic=True)
        for block in self.decoder:
            block.compile(dynamic=False)

    def condition(self, x, labels, visible, wanted):
        """Conditions of the tokens `wanted` (B, M) -> (B, M, D), given the tokens x (B, N, C) at `visible` (B, V).

        visible and wanted are numbers of tokens, row-major; x is read at the visible ones alone. labels (B,), -1: none.
        """
        B, b = len(x), self.config.buffer
        known = self.class_embed(labels.clamp(min=0))
        known = torch.where(labels[:, None] < 0, self.no_class, known)[:, None]  # (B, 1, D)
        tokens = self.token_proj(take(x, visible))  # (B, V, D)
        dtype = tokens.dtype  # of the residual streams: bf16 under autocast
        tokens = tokens + take(self.encoder_pos[:, b:].expand(B, -1, -1), visible)
        h = self.token_norm(torch.cat([known + self.encoder_pos[:, :b], tokens], dim=1)).to(dtype)  # (B, b + V, D)
        for block in self.encoder:
            h = block(h)
        h = self.decoder_proj(self.encoder_norm(h))
        places = visible[..., None].expand(-1, -1, h.shape[2])
        full = self.mask_token.to(dtype).expand(B, x.shape[1], -1).scatter(1, places, h[:, b:])  # (B, N, D)
        h = torch.cat([h[:, :b], full], dim=1) + self.decoder_pos.to(dtype)
        for block in self.decoder:
            h = block(h)
        h = self.decoder_norm(take(h[:, b:], wanted))  # (B, M, D)
        return h + take(self.head_pos.expand(B, -1, -1), wanted)

    def velocity(self, x_t, t, c):
        """v in fp32: the head on noisy tokens x_t (B, M, C), times t (B, M) with 1 = noise, conditions c (B, M, D)."""
        return self.head(x_t, t, c).float()

    def loss(self, latent, labels, ratio=None):
        """The training loss of latents (B, C, h, w) and labels (B,), a scalar. It draws orders, times, noises, labels
        to drop, and for the batch the ratio of tokens that are masked, if that is not given."""
        check(latent, labels, self.config)
        c = self.config
        x = latent.flatten(2).transpose(1, 2)  # (B, N, C)
        B, N, _ = x.shape
        order = torch.rand(B, N, device=x.device).argsort(dim=1)
        ratio = mask_ratio(c.mask_least, torch.rand((), dtype=torch.float64)) if ratio is None else ratio
        V = N - math.ceil(N * ratio)
        visible, masked = order[:, :V], order[:, V:]
        cond = self.condition(x, drop_labels(labels, c.label_drop), visible, masked)
        x, cond = (y.repeat(c.repeats, 1, 1) for y in (take(x, masked), cond))  # (repeats * B, N - V, ..)
        return flow_loss(lambda x_t, t: self.velocity(x_t, t, cond), x, sample_t(x.shape[:2], device=x.device),
                         torch.randn_like(x))

    forward = loss  # model(latent, labels)

    @torch.no_grad()
    def sample(self, labels, noise, order, iterations=256, steps=25, cfg=1.0, temperature=1.0, schedule="linear",
               tick=lambda: None):
        """Latents (B, C, h, w) of classes labels (B,), from noise of their shape; `order` (B, N) is that of the tokens.

        steps: Euler steps of the head. cfg: guidance, 1 for none, which also halves the work; schedule: "linear" as in
        the docstring above, or "constant". tick is called after each iteration.
        """
        check(noise, labels, self.config)
        noise = noise.flatten(2).transpose(1, 2)  # (B, N, C)
        (B, N, C), x = noise.shape, torch.zeros_like(noise)
        guided = cfg != 1
        twice = (lambda y: torch.cat([y, y])) if guided else (lambda y: y)
        classes = torch.cat([labels, torch.full_like(labels, -1)]) if guided else labels
        for done, until, masked in portions(N, iterations):
            scale = 1 + (cfg - 1) * (N - masked) / N if schedule == "linear" else cfg
            visible, wanted = order[:, :done], order[:, done:until]
            cond = self.condition(twice(x), classes, twice(visible), twice(wanted))

            def velocity(x_t, t):
                v, *none = self.velocity(twice(x_t), twice(t), cond).split(B)
                return v + (scale - 1) * (v - none[0]) if guided else v
            tokens = euler(velocity, temperature * take(noise, wanted), steps)
            x = x.scatter(1, wanted[..., None].expand(-1, -1, C), tokens)
            tick()
        return x.transpose(1, 2).reshape(B, C, self.config.grid, self.config.grid)


def check(latent, labels, config):
    """ValueError unless latent is (B, C, h, w) of this configuration, with one label each."""
    expected = (config.channels, config.grid, config.grid)
    if latent.shape[1:] != expected or labels.shape != latent.shape[:1]:
        raise ValueError(f"latents are {tuple(latent.shape)}, labels {tuple(labels.shape)}; expected (B, "
                         f"{', '.join(map(str, expected))}) and (B,)")


def released_name(name):
    """Our name of a tensor of a released MAR checkpoint."""
    for theirs, ours in RELEASED_NAMES:
        name = name.replace(theirs, ours)
    return name


def load_released(model, path):
    """Start `model` from the averaged weights of a released checkpoint-last.pth; returns the names that it left alone.

    These are of another shape (positions, token projection and classes of other data) or of the head, whose output and
    time mean something else there. Raises UserError for a file that is no MAR of this size.
    """
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file; expected a released checkpoint-last.pth")
    refuse_pickle(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # their arguments, which lie beside the weights
            theirs = torch.load(path, map_location="cpu", weights_only=True)["model_ema"]
        state = {released_name(k): v for k, v in theirs.items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{path} is no checkpoint of MAR ({type(e).__name__}: {one_line(e)})") from None
    own = dict(model.named_parameters())
    if state.keys() != own.keys():
        raise UserError(f"{path} is a MAR of another size; missing or unknown: {sorted(state.keys() ^ own.keys())[:3]}")
    others = ("encoder_pos", "decoder_pos", "head_pos", "token_proj.weight", "class_embed.weight")
    wrong = [k for k in own if own[k].shape != state[k].shape and k not in others and not k.startswith("head.")]
    if wrong:
        raise UserError(f"{path} is a MAR of another size: {wrong[0]} is {tuple(state[wrong[0]].shape)}, expected "
                        f"{tuple(own[wrong[0]].shape)}")
    left = [k for k in own if own[k].shape != state[k].shape or k.startswith("head.")]
    with torch.no_grad():
        for k in own.keys() - set(left):
            own[k].copy_(state[k])
    return left


if __name__ == "__main__":
    for name in SIZES:
        with torch.device("meta"):
            model = MAR(config(name))
        count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
        print(f"{name}  latent 64x32x32  {count(model):6.1f}M parameters, {count(model.head):6.1f}M of them the head")
    model = MAR(config("mar-s", channels=16, grid=8, classes=100))
    latent, labels = torch.randn(2, 16, 8, 8), torch.tensor([3, 7])
    print("latent    ", tuple(latent.shape), " loss", f"{model(latent, labels).item():.4f} (untrained: v = 0)")
    places = torch.arange(64).expand(2, -1)
    cond = model.condition(latent.flatten(2).mT, labels, places[:, :20], places[:, 20:])
    print("condition ", tuple(cond.shape), "of 44 masked tokens, 20 are visible")
    sampled = model.eval().sample(labels, torch.randn(2, 16, 8, 8), torch.rand(2, 64).argsort(1), iterations=8, cfg=3.0)
    print("sampled   ", tuple(sampled.shape), "in 8 iterations of 25 Euler steps")
