"""The unified encoder E_U of UniFlow: a pretrained vision transformer plus a projection to a small latent.

    H^(l) = Block_l(H^(l-1)),  l = 1..L          every block's tokens, what the distillation compares
    z     = P_down(norm(H^(L)))                  the latent, C channels per patch (paper, Sec. 3.1)

Symbols: B batch, D width, L layers, P prefix (CLS) tokens, N = h*w spatial tokens of a grid of p-pixel patches,
C latent channels, H = h*p and W = w*p pixels. Images are (B, 3, H, W) in [0, 1]; the network normalises inside.

    enc = Encoder.from_pretrained("out/model.safetensors")
    z = enc.encode(img)           # (B, C, h, w), normalised by the statistics stored in the file
    f = enc.features(img)         # (B, N, D), what a linear probe or a multimodal LLM reads

`python encoder.py` prints the shapes. Needs torch and safetensors; no other file of this project.
Structure of the ViT: Dosovitskiy et al. 2021, with the differences of InternViT, DINOv2, SigLIP2 and CLIP as flags.
"""
import json
import os
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

PIXEL_STATS = {  # per-channel mean and standard deviation that a network expects its [0, 1] input normalised with
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class ViTConfig:
    width: int = 1024              # D
    depth: int = 24                # L
    heads: int = 16
    mlp_width: int = 4096
    patch: int = 14                # p, pixels
    size: int = 448                # side of the square image whose patch grid the position embedding covers
    num_prefix: int = 1            # P: 1 with a CLS token, 0 without
    patch_bias: bool = True        # bias in the patch convolution
    pre_norm: bool = False         # LayerNorm before the first block (CLIP)
    final_norm: bool = True        # LayerNorm after the last block; InternViT has none
    layer_scale: float = 0.0       # initial value of the learned per-channel scale of each branch; 0: no such scale
    eps: float = 1e-6              # of every LayerNorm
    activation: str = "gelu"       # a key of ACTIVATIONS
    pixel_stats: str = "imagenet"  # a key of PIXEL_STATS

    def __post_init__(self):
        if self.width % self.heads or self.size % self.patch:
            raise ValueError(f"ViT width {self.width} must be a multiple of heads {self.heads}, "
                             f"and size {self.size} of patch {self.patch}")


TEACHERS = {
    # OpenGVLab/InternViT-300M-448px; facebook/dinov2-large; google/siglip2-{so400m,large}-patch16-256; apple/DFN2B-CLIP-ViT-L-14
    "internvit": ViTConfig(final_norm=False, layer_scale=1.0),
    "dinov2": ViTConfig(size=518, layer_scale=1.0),
    "siglip2": ViTConfig(width=1152, depth=27, mlp_width=4304, patch=16, size=256, num_prefix=0,
                         activation="gelu_tanh", pixel_stats="half"),
    "siglip2-l": ViTConfig(patch=16, size=256, num_prefix=0, activation="gelu_tanh", pixel_stats="half"),
    "clip": ViTConfig(size=224, patch_bias=False, pre_norm=True, eps=1e-5,
                      activation="quick_gelu", pixel_stats="openai"),
    # our own, for work at 64 px: ViT-S/8 and ViT-Ti/8
    "small": ViTConfig(width=384, depth=12, heads=6, mlp_width=1536, patch=8, size=64),
    "tiny": ViTConfig(width=192, depth=12, heads=3, mlp_width=768, patch=8, size=64),
}


class Block(nn.Module):
    """Pre-norm transformer block on x (B, T, D): x + s1*Attention(LN(x)), then x + s2*MLP(LN(x)).

    s1, s2: layer scale, where the model has one. keep: two (B, 1, 1) masks with mean 1 that drop the branches of
    some images in training (stochastic depth), or None.
    """

    def __init__(self, c):
        super().__init__()
        self.heads, self.activation = c.heads, ACTIVATIONS[c.activation]
        self.norm1 = nn.LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)  # rows: all of q, all of k, all of v; heads contiguous inside each
        self.proj = nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, c.eps)
        self.fc1 = nn.Linear(c.width, c.mlp_width)
        self.fc2 = nn.Linear(c.mlp_width, c.width)
        self.scale1 = nn.Parameter(torch.full((c.width,), c.layer_scale)) if c.layer_scale else None
        self.scale2 = nn.Parameter(torch.full((c.width,), c.layer_scale)) if c.layer_scale else None

    def attention(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))  # (B, T, D)

    def mlp(self, x):
        return self.fc2(self.activation(self.fc1(x)))

    def forward(self, x, keep=(None, None)):
        x = x + branch(self.attention(self.norm1(x)), self.scale1, keep[0])
        return x + branch(self.mlp(self.norm2(x)), self.scale2, keep[1])


def branch(h, scale, keep):
    """A residual branch's output (B, T, D) with its layer scale and stochastic-depth mask, where given."""
    if scale is not None:
        h = h * scale
    return h if keep is None else h * keep


class ViT(nn.Module):
    """A vision transformer: img (B, 3, H, W) in [0, 1] -> list of L block outputs, each (B, P+N, D).

    H and W may be any multiples of the patch: the position grid is resized (see resize_grid). The outputs are before
    `norm`, the final LayerNorm (identity for models without one). P = `num_prefix` CLS tokens come first.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        mean, std = PIXEL_STATS[c.pixel_stats]
        self.num_prefix = c.num_prefix
        self.drop_path = 0.0     # stochastic depth of the last block, rising linearly from 0 at the first; training only
        self.checkpoint = False  # recompute each block in the backward pass instead of keeping its activations
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch, bias=c.patch_bias)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, c.width)) if c.num_prefix else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, c.num_prefix + (c.size // c.patch) ** 2, c.width))
        self.norm_pre = nn.LayerNorm(c.width, c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, c.eps) if c.final_norm else nn.Identity()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, img):
        P, p, (B, _, H, W) = self.num_prefix, self.config.patch, img.shape
        if H % p or W % p or not H * W:
            fit = [max(p, round(s / p) * p) for s in (W, H)]
            raise ValueError(f"image is {W}x{H} pixels; sides must be multiples of the patch {p}: try {fit[0]}x{fit[1]}")
        x = self.patch_embed((img - self.mean) / self.std)  # (B, D, h, w)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + resize_grid(self.pos_embed[:, P:], h, w)
        if P:
            cls = (self.cls_token + self.pos_embed[:, :P]).expand(B, -1, -1)
            x = torch.cat([cls.to(x.dtype), x], dim=1)  # (B, P+N, D)
        x = self.norm_pre(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            keep = (None, None)
            if self.training and self.drop_path:
                rate = self.drop_path * i / max(len(self.blocks) - 1, 1)
                keep = (torch.rand(2, B, 1, 1, device=x.device) >= rate).to(x.dtype) / (1 - rate)
            recompute = self.checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False) if recompute else block(x, keep)
            outputs.append(x)
        return outputs


def resize_grid(pos, h, w):
    """Position embedding of a square grid (1, g*g, D) -> (1, h*w, D), row-major: bicubic, by size, in fp32, no antialias.

    The rule of InternViT and of Hugging Face's models. DINOv2's hub code adds an offset of 0.1 to the size, which
    moves the sample points by up to 0.23 source cells at the far edge.
    """
    g = round(pos.shape[1] ** 0.5)
    if (h, w) == (g, g):
        return pos
    grid = pos.float().reshape(1, g, g, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(pos.dtype)  # (1, h*w, D)


class Encoder(nn.Module):
    """The tokenizer's encoder: a ViT and the projection of its last tokens to C = latent_dim channels.

    projector: "mlp", Linear(D, D)-GELU-Linear(D, C) as in the released model, or "linear", the paper's words.
    """

    def __init__(self, vit, latent_dim=64, projector="mlp"):
        super().__init__()
        D = vit.config.width
        self.vit, self.latent_dim, self.projector = vit, latent_dim, projector
        if projector == "linear":
            self.latent_down = nn.Linear(D, latent_dim)
        elif projector == "mlp":
            self.latent_down = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, latent_dim))
        else:
            raise ValueError(f"projector {projector!r} is unknown; it is mlp or linear")
        # statistics of the latent, identity until computed; one copy in the file serves encoder and decoder
        self.register_buffer("latent_mean", torch.zeros(latent_dim, 1, 1), persistent=False)
        self.register_buffer("latent_std", torch.ones(latent_dim, 1, 1), persistent=False)

    def forward(self, img):
        """img (B, 3, H, W) in [0, 1] -> z (B, C, h, w), not normalised, and [H^(1)..H^(L)], each (B, P+N, D)."""
        B, p = img.shape[0], self.vit.config.patch
        hidden = self.vit(img)
        z = self.latent_down(self.vit.norm(hidden[-1][:, self.vit.num_prefix:]))  # (B, N, C)
        return z.transpose(1, 2).reshape(B, self.latent_dim, img.shape[2] // p, img.shape[3] // p), hidden

    @torch.no_grad()
    def encode(self, img):
        """img (B, 3, H, W) in [0, 1] -> latent (B, C, h, w), normalised per channel by the stored statistics."""
        return (self(img)[0] - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def features(self, img, layer=None):
        """img (B, 3, H, W) in [0, 1] -> semantic tokens (B, N, D), row-major, without CLS.

        layer=None: the last block's, after the final norm; an integer: that block's output, un-normed (0 is the
        first, -2 the second-to-last, which LLaVA reads).
        """
        hidden = self.vit(img)
        x = self.vit.norm(hidden[-1]) if layer is None else hidden[layer]
        return x[:, self.vit.num_prefix:]

    @classmethod
    def from_pretrained(cls, path):
        """The encoder of a tokenizer file that train.py wrote, in eval mode on the CPU in fp32.

        Raises FileNotFoundError, or ValueError if the file is no such tokenizer or its tensors do not fit its
        configuration.
        """
        config = read_config(path)
        if "decoder" not in config:
            raise ValueError(f"{path} is a model file, but no tokenizer; train.py writes out/model.safetensors")
        enc = cls(ViT(vit_config(path)), config["decoder"]["latent_dim"], config["decoder"]["projector"])
        tensors = safetensors.torch.load_file(path)
        load_exactly(enc, {k[8:]: v for k, v in tensors.items() if k.startswith("encoder.")}, path)
        enc.latent_mean.copy_(tensors["latent_mean"].view(-1, 1, 1))
        enc.latent_std.copy_(tensors["latent_std"].view(-1, 1, 1))
        return enc.eval()


def read_config(path):
    """What a model file of this project says of itself: the JSON of its metadata entry "config"."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            return json.loads(f.metadata()["config"])
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not a model file of this project ({type(e).__name__}: {e})") from None


def vit_config(path):
    """The ViTConfig in a model file."""
    try:
        return ViTConfig(**read_config(path)["vit"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} does not describe a ViT ({e}); its metadata needs config = {{\"vit\": ...}}") from None


def write_model(path, config, tensors):
    """Write {name: tensor} as safetensors, with `config` as JSON in the metadata entry "config", atomically."""
    data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", "config": json.dumps(config)})
    write_atomically(path, lambda f: f.write(data))


def write_atomically(path, write):
    """Call write(binary file) on a temporary file beside `path`, which takes its name when it is safely on disk."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def load_exactly(module, state, path):
    """Copy `state` into `module` after comparing the key sets both ways and every shape; ValueError names the misfits."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"unknown {k}" for k in state.keys() - own.keys()]
    wrong += [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the configuration ({len(wrong)} tensors): " + "; ".join(sorted(wrong)[:3]))
    module.load_state_dict(state)


def teacher_config(name_or_path):
    """The ViTConfig of a key of TEACHERS or of a self-describing safetensors file. Raises ValueError for neither."""
    if name_or_path in TEACHERS:
        return TEACHERS[name_or_path]
    if not os.path.isfile(name_or_path):
        raise ValueError(f"teacher {name_or_path!r} is neither a file nor one of: {' '.join(TEACHERS)}")
    return vit_config(name_or_path)


def load_teacher(name_or_path, weights=None):
    """A frozen foundation model in eval mode, on the CPU in fp32.

    name_or_path: a key of TEACHERS, or a self-describing safetensors file: a ViT's state dict with the metadata entry
    "config" = JSON {"vit": {fields of ViTConfig}}. weights: such a file, "random" (a seeded initialisation, which is
    announced), or None: the file that belongs to the name. Raises ValueError or FileNotFoundError with what to do.
    """
    config = teacher_config(name_or_path)
    if name_or_path not in TEACHERS:
        if weights is not None:
            raise ValueError(f"teacher {name_or_path} is a file and brings its weights: leave out teacher_weights {weights}")
        weights = name_or_path
    elif weights is None and name_or_path in ("tiny", "small"):
        shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", f"teacher-{name_or_path}.safetensors")
        weights = shipped if os.path.isfile(shipped) else "random"
    elif weights is None:
        raise ValueError(f"no weights for teacher {name_or_path}: give a file as teacher_weights, or `random` for a seeded initialisation")

    if weights == "random":
        if os.environ.get("RANK", "0") == "0":  # once, under torchrun
            print(f"teacher {name_or_path}: a seeded RANDOM initialisation, no pretrained weights, so it teaches no semantics")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ViT(config).eval().requires_grad_(False)
    if vit_config(weights) != config:
        raise ValueError(f"{weights} holds another configuration than {name_or_path}: {vit_config(weights)}; "
                         "to use it, name the file itself as the teacher")
    vit = ViT(config)
    load_exactly(vit, safetensors.torch.load_file(weights), weights)
    return vit.eval().requires_grad_(False)


if __name__ == "__main__":
    vit = load_teacher("tiny", "random")
    enc = Encoder(vit, latent_dim=16).eval()
    img = torch.rand(2, 3, 64, 96)
    z, hidden = enc(img)
    print("image   ", tuple(img.shape), "in [0, 1]")
    print("hidden  ", len(hidden), "x", tuple(hidden[0].shape))
    print("latent  ", tuple(enc.encode(img).shape))
    print("features", tuple(enc.features(img).shape))
    print("parameters", f"{sum(p.numel() for p in enc.parameters()):,}")
