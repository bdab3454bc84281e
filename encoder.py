"""The unified encoder E_U of UniFlow: a pretrained vision transformer plus a projection to a small latent.

    H^(l) = Block_l(H^(l-1)),  l = 1..L          every block's tokens, what the distillation compares
    z     = P_down(norm(H^(L)))                  the latent, C channels per patch (paper, Sec. 3.1)

Symbols: B batch, D width, L layers, P prefix (CLS) tokens, N = h*w spatial tokens of a grid of p-pixel patches,
C latent channels, H = h*p and W = w*p pixels. Images are (B, 3, H, W) in [0, 1]; the network normalises inside.

    enc = Encoder.from_pretrained("out/model.safetensors")
    latent = enc.encode(img)      # (B, C, h, w), NORMALISED by the statistics stored in the file: what Decoder.decode takes
    z, hidden = enc(img)          # z (B, C, h, w), RAW: what Decoder.loss and condition take
    f = enc.features(img)         # (B, N, D), what a linear probe or a multimodal LLM reads

`python encoder.py` prints the shapes. Needs torch, safetensors (and tqdm to download); no other file of this project.
Structure of the ViT: Dosovitskiy et al. 2021, with the differences of InternViT, DINOv2, SigLIP2 and CLIP as flags.
"""
import glob
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file that is not there, or cannot be had."""


PIXEL_STATS = {  # per-channel mean and standard deviation that a network expects its [0, 1] input normalised with
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def normal(x):
    """Distribution function and density of the standard normal at x, in fp32, to 3e-7 (Abramowitz & Stegun 26.2.17)."""
    x = x.float()
    density = 0.3989422804014327 * torch.exp2(-0.7213475204444817 * x * x)
    t = 1 / (1 + 0.2316419 * x.abs())
    tail = density * t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    return torch.where(x > 0, 1 - tail, tail), density


class CompiledGELU(torch.autograd.Function):
    """F.gelu, x * normal(x)[0]: to bf16's rounding the same, in fewer instructions than erf, which take longer than its bytes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * normal(x)[0]).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        below, density = normal(x)
        return (grad * (below + x * density)).to(x.dtype)


def gelu(x):
    return CompiledGELU.apply(x) if x.dtype == torch.bfloat16 and torch.compiler.is_compiling() else F.gelu(x)


ACTIVATIONS = {
    "gelu": gelu,
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
    num_prefix: int = 1            # P: 0, 1 with a CLS token, 2 to 5 with 1 to 4 register tokens after it
    patch_bias: bool = True        # bias in the patch convolution
    pre_norm: bool = False         # LayerNorm before the first block (CLIP)
    final_norm: bool = True        # LayerNorm after the last block; InternViT has none
    layer_scale: float = 0.0       # initial value of the learned per-channel scale of each branch; 0: no such scale
    eps: float = 1e-6              # of every LayerNorm
    activation: str = "gelu"       # a key of ACTIVATIONS
    pixel_stats: str = "imagenet"  # a key of PIXEL_STATS

    def __post_init__(self):
        for f in fields(self):  # which may come from a file
            x = getattr(self, f.name)
            if type(x) is not f.type or f.type is int and not 0 <= x <= 65536:
                raise UserError(f"{f.name} is {x!r:.50}, expected {f.type.__name__}" + " from 0 to 65536" * (f.type is int))
        positive = min(self.width, self.depth, self.heads, self.mlp_width, self.patch, self.size) > 0
        if not positive or self.width % self.heads or self.size % self.patch:
            raise UserError(f"ViT width {self.width} must be a multiple of heads {self.heads}, size {self.size} of patch "
                            f"{self.patch}, and all of them positive")
        if self.depth > 1000 or self.num_prefix > 5 or not 0 < self.eps < 1 or not 0 <= self.layer_scale < 1e6:
            raise UserError(f"ViT depth {self.depth} is at most 1000, num_prefix {self.num_prefix} from 0 to 5, "
                            f"eps {self.eps} in (0, 1), layer_scale {self.layer_scale} at least 0")
        if self.activation not in ACTIVATIONS or self.pixel_stats not in PIXEL_STATS:
            raise UserError(f"activation {self.activation!r} must be one of {' '.join(ACTIVATIONS)}, "
                            f"pixel_stats {self.pixel_stats!r} of {' '.join(PIXEL_STATS)}")


TEACHERS = {  # the paper's foundation models; PUBLISHED has their files
    "internvit": ViTConfig(final_norm=False, layer_scale=1.0),
    "internvit-v2_5": ViTConfig(final_norm=False, layer_scale=1.0),
    "dinov2": ViTConfig(size=518, layer_scale=1.0),
    "dinov2-reg": ViTConfig(size=518, layer_scale=1.0, num_prefix=5),
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
    some images in training (stochastic depth), or 1.
    """

    def __init__(self, c):
        super().__init__()
        self.heads, self.activation = c.heads, c.activation
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
        return scaled(self.proj, x.transpose(1, 2).reshape(B, T, D), self.scale1)  # (B, T, D)

    def mlp(self, x):
        return scaled(self.fc2, ACTIVATIONS[self.activation](self.fc1(x)), self.scale2)

    def forward(self, x, keep=(1, 1)):
        x = x + keep[0] * self.attention(flat(self.norm1, x))
        return x + keep[1] * self.mlp(flat(self.norm2, x))


def flat(norm, x):
    """norm(x) on tokens (B*T, D): such rows inductor compiles to one pass over memory, those of (B, T, D) to two."""
    return norm(x.flatten(0, 1)).view_as(x)


def scaled(linear, x, scale):
    """scale * linear(x), layer scale or None for 1: applied to the weights, where it costs no pass over the activations."""
    if scale is None:
        return linear(x)
    if type(linear) is not nn.Linear:  # what stands in for it, as LoRA's layers do, is more than a weight and a bias
        return scale * linear(x)
    return F.linear(x, scale[:, None] * linear.weight, scale * linear.bias)


class ViT(nn.Module):
    """A vision transformer: img (B, 3, H, W) in [0, 1] -> list of L block outputs, each (B, P+N, D).

    H and W may be any multiples of the patch: the position grid is resized (see resize_grid). The outputs are before
    `norm`, the final LayerNorm (identity for models without one). P = `num_prefix` tokens come first: CLS, then registers
    (Darcet et al. 2024), which have no position. `depth` stops after that many blocks. Raises ValueError as check_image does.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        mean, std = PIXEL_STATS[c.pixel_stats]
        self.num_prefix = c.num_prefix
        self.drop_path = 0.0     # stochastic depth of the last block, rising linearly from 0 at the first; training only
        self.checkpoint = False  # recompute each block in the backward pass instead of keeping its activations
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch, bias=c.patch_bias)
        cls, registers = min(c.num_prefix, 1), max(c.num_prefix - 1, 0)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, c.width)) if cls else None
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, registers, c.width)) if registers else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, cls + (c.size // c.patch) ** 2, c.width))
        self.norm_pre = nn.LayerNorm(c.width, c.eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, c.eps) if c.final_norm else nn.Identity()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, img, depth=None):
        p, weight = self.config.patch, self.patch_embed.weight
        check_image(img, p)
        B, _, H, W = img.shape
        h, w = H // p, W // p
        x = ((img - self.mean) / self.std).to(weight.dtype)  # (B, 3, H, W), normalised
        x = x.reshape(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, 3 * p * p)  # (B, N, 3p^2)
        x = F.linear(x, weight.flatten(1), self.patch_embed.bias)  # the convolution, faster: (B, N, D)
        cls = min(self.num_prefix, 1)
        # under autocast the residual stream is bf16 from here on
        x = x + resize_grid(self.pos_embed[:, cls:], h, w).to(x.dtype)
        if cls:
            prefix = [self.cls_token + self.pos_embed[:, :1], self.register_tokens][:self.num_prefix]
            x = torch.cat([*(token.expand(B, -1, -1).to(x.dtype) for token in prefix), x], dim=1)  # (B, P+N, D)
        x = self.norm_pre(x).to(x.dtype)
        outputs = []
        for i, block in enumerate(self.blocks):
            keep = (1, 1)
            if self.training and self.drop_path:
                rate = self.drop_path * i / max(len(self.blocks) - 1, 1)
                keep = (torch.rand(2, B, 1, 1, device=x.device) >= rate).to(x.dtype) / (1 - rate)
            recompute = self.checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False) if recompute else block(x, keep)
            outputs.append(x)
            if len(outputs) == depth:
                break
        return outputs


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
    Two latents: calling it gives the raw z, which Decoder.loss and condition take; `encode` gives the normalised latent,
    which Decoder.decode takes. No call stops gradients: use torch.no_grad() where they are not wanted.
    Under FSDP (fully_shard), register "features" with register_fsdp_forward_method; the other calls need nothing.
    """

    def __init__(self, vit, latent_dim=64, projector="mlp"):
        super().__init__()
        if type(latent_dim) is not int or not 0 < latent_dim <= 65536:
            raise UserError(f"latent_dim is {latent_dim!r:.50}, expected an integer from 1 to 65536")
        D = vit.config.width
        self.vit, self.latent_dim, self.projector = vit, latent_dim, projector
        self.size = vit.config.size  # pixels of a side that it was trained at; a tokenizer file says its own
        if projector == "linear":
            self.latent_down = nn.Linear(D, latent_dim)
        elif projector == "mlp":
            self.latent_down = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, latent_dim))
        else:
            raise UserError(f"projector {projector!r:.50} is unknown; it is mlp or linear")
        # statistics of the latent, identity until computed; one copy in the file serves encoder and decoder
        self.register_buffer("latent_mean", torch.zeros(latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_dim, 1, 1))

    def forward(self, img):
        """img (B, 3, H, W) in [0, 1] -> the RAW z (B, C, h, w), not for Decoder.decode, and [H^(1)..H^(L)], each (B, P+N, D)."""
        hidden, p = self.vit(img), self.vit.config.patch
        z = self.latent_down(self.vit.norm(hidden[-1][:, self.vit.num_prefix:]))  # (B, N, C)
        return z.transpose(1, 2).reshape(img.shape[0], self.latent_dim, img.shape[2] // p, img.shape[3] // p), hidden

    def encode(self, img):
        """img (B, 3, H, W) in [0, 1] -> the NORMALISED latent (B, C, h, w), for Decoder.decode: z less its stored mean, per
        channel, over its stored deviation."""
        return (self(img)[0] - self.latent_mean) / self.latent_std

    def features(self, img, layer=None, grid=False):
        """img (B, 3, H, W) in [0, 1] -> semantic tokens (B, N, D), row-major, without CLS and registers.

        layer=None: the last block's, after the final norm; an integer: that block's output, un-normed (0 is the
        first, -2 the second-to-last, which LLaVA reads); a list of them: a list, from one pass that stops after the
        deepest. grid: as maps (B, D, h, w). Raises ValueError for a layer that is not there.
        """
        several = isinstance(layer, (list, tuple, range))
        vit, wanted = self.vit, list(layer) if several else [layer]
        L, p = len(vit.blocks), vit.config.patch
        if not wanted or any(n is not None and n not in range(-L, L) for n in wanted):
            raise ValueError(f"layer is {layer}; expected None or integers from {-L} to {L - 1}")
        numbers = [L - 1 if n is None else n % L for n in wanted]
        hidden = vit(img, max(numbers) + 1)
        tokens = [vit.norm(hidden[i]) if n is None else hidden[i] for n, i in zip(wanted, numbers)]
        tokens = [x[:, vit.num_prefix:] for x in tokens]  # (B, N, D)
        if grid:
            tokens = [x.transpose(1, 2).unflatten(2, (img.shape[2] // p, -1)) for x in tokens]  # (B, D, h, w)
        return tokens if several else tokens[0]

    @classmethod
    def from_pretrained(cls, path):
        """The encoder of a tokenizer file, ours or the authors' released one, in eval mode on the CPU in fp32.

        Raises MissingFile, or UserError if the file is no such tokenizer or its tensors do not fit its configuration.
        """
        config = read_config(path)
        if "released" in config:
            return cls._from_released(path).eval()
        if not {"decoder", "size"} <= config.keys():
            raise UserError(f"{path} is a model file, but no tokenizer; train.py writes out/model.safetensors")
        try:
            enc = cls(ViT(ViTConfig(**config["vit"])), config["decoder"]["latent_dim"], config["decoder"]["projector"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path} does not describe a UniFlow encoder ({type(e).__name__}: {one_line(e)})") from None
        present, get = open_weights(path)
        state = {k.removeprefix("encoder."): get(k) for k in present if k.startswith("encoder.")}
        buffers = {k: x for k, x in enc.named_buffers() if k in state}  # of a file made of a state_dict; train.py's has none
        load_exactly({**dict(enc.named_parameters()), **buffers}, state, path)
        stats = {"latent_mean": enc.latent_mean.flatten(), "latent_std": enc.latent_std.flatten()}  # views of the buffers
        load_exactly(stats, {k: get(k) for k in stats.keys() & present}, path)
        enc.size = config["size"]
        return enc.eval()

    @classmethod
    def _from_released(cls, path):
        enc = cls(ViT(TEACHERS["internvit"]))
        used = load_vit(enc.vit, path, others=True)
        names = {k: f"chal_proj.{'c_fc' if k[0] == '0' else 'c_proj'}{k[1:]}" for k in enc.latent_down.state_dict()}
        present, get = open_weights(path)
        load_exactly(enc.latent_down.state_dict(), {k: get(name) for k, name in names.items() if name in present}, path)
        decoders = ("chal_unproj.", "global_block", "decoder_", "flow_head.")
        others = sorted(k for k in present - used.union(names.values()) if not k.startswith(decoders))
        if others:
            warnings.warn(f"{path}: ignored {len(others)} tensors that the encoder does not use: {' '.join(others)}")
        return enc

    def save_hf(self, folder):
        """Write the ViT as the Hugging Face model of its family (config.json, model.safetensors, preprocessor_config.json),
        which LLaVA or InternVL code reads as a vision tower, for images of the size that it was trained at. UserError if
        no family has its structure."""
        c, size = self.vit.config, self.size
        parts = {"pre_norm": c.pre_norm, "patch_bias": c.patch_bias, "final_norm": c.final_norm,
                 "layer_scale": c.layer_scale, "cls": c.num_prefix, "registers": c.num_prefix > 1}
        structure, kind = " ".join(name for name, present in parts.items() if present), {}
        if structure not in HF_FAMILIES:
            raise UserError(f"transformers has no vision model with {structure}; those of InternViT, DINOv2 with or without "
                            "registers, SigLIP2, CLIP and the plain ViT can be saved")
        family, model, layout = HF_FAMILIES[structure]
        prefix = "vision_model." if layout == "SigLIP, CLIP of transformers" else ""
        if family == "siglip_vision_model":
            kind = {"vision_use_head": False}
        elif family == "internvl_vision":
            kind = {"attention_bias": True, "image_size": [size] * 2, "patch_size": [c.patch] * 2}
        elif layout == "DINOv2 of transformers":
            if c.mlp_width % c.width:
                raise UserError(f"mlp_width {c.mlp_width} is no multiple of width {c.width}, and transformers' DINOv2 knows "
                                "their ratio as an integer alone: this ViT cannot be saved as one")
            kind = {"mlp_ratio": c.mlp_width // c.width, "use_mask_token": False}
            kind |= {"num_register_tokens": c.num_prefix - 1} if c.num_prefix > 1 else {}
        config = dict(model_type=family, architectures=[model], dtype="float32", hidden_size=c.width, num_hidden_layers=c.depth,
                      num_attention_heads=c.heads, intermediate_size=c.mlp_width, layer_norm_eps=c.eps, image_size=size,
                      patch_size=c.patch, hidden_act=c.activation.replace("gelu_tanh", "gelu_pytorch_tanh")) | kind
        mean, std = PIXEL_STATS[c.pixel_stats]
        square = {"height": size, "width": size}
        preprocessor = dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": size}, crop_size=square, resample=3)
        if family == "siglip_vision_model":  # resized to a square, bilinear
            preprocessor = dict(image_processor_type="SiglipImageProcessor", size=square, resample=2)
        preprocessor.update(image_mean=mean, image_std=std)
        tensors = {}
        for key, x in self.vit.named_parameters():
            x = x.detach().float()
            if key == "pos_embed":
                cls, side = min(c.num_prefix, 1), size // c.patch
                x = torch.cat([x[:, :cls], resize_grid(x[:, cls:], side, side)], dim=1)
            if prefix and key in ("cls_token", "pos_embed"):
                x = x.squeeze((0, 1) if key == "cls_token" else 0)  # [D] and [N, D] in this layout
            names = names_in(layout, key)
            tensors.update({prefix + name: part.clone() for name, part in zip(names, x.chunk(len(names)))})
        if c.num_prefix > 1:  # DINOv2's models with registers always have one, for training
            tensors["embeddings.mask_token"] = torch.zeros(1, c.width)
        data = safetensors.torch.save(tensors, {"format": "pt"})
        os.makedirs(folder, exist_ok=True)
        write_atomically(os.path.join(folder, "model.safetensors"), lambda f: f.write(data))
        for name, content in ("config.json", config), ("preprocessor_config.json", preprocessor):
            write_atomically(os.path.join(folder, name), lambda f: f.write(json.dumps(content, indent=2).encode()))


def parameter_groups(modules, lr, weight_decay=0.0, layer_decay=1.0):
    """The trainable parameters of `modules` (a module or several) as groups for an optimizer, each in exactly one.

    Only weights of linear layers and convolutions decay, so no bias, norm, scale, token or position does. layer_decay d
    < 1 lowers the rate with depth (BEiT): in each ViT of L layers, block l = 1..L learns at lr * d^(L + 1 - l), what
    comes before the blocks at lr * d^(L + 1); its final norm and all other parameters at lr.
    """
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    below = {}  # parameter: how many layers it lies below the output, if it is of a ViT
    for vit in [m for module in modules for m in module.modules() if isinstance(m, ViT)]:
        for name, p in vit.named_parameters():
            first = name.split(".")[0]
            below[p] = 0 if first == "norm" else len(vit.blocks) - (int(name.split(".")[1]) if first == "blocks" else -1)
    embeddings = {m.weight for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    groups, params = {}, {p: name for module in modules for name, p in module.named_parameters() if p.requires_grad}
    for decays in True, False:
        for p, name in params.items():
            if (p.ndim > 1 and name.endswith("weight") and p not in embeddings) == decays:
                groups.setdefault((lr * layer_decay ** below.get(p, 0), decays), []).append(p)
    return [dict(params=group, lr=rate, weight_decay=weight_decay * decays) for (rate, decays), group in groups.items()]


# ---- files ----

# The smallest published file of safe tensors for each name: a Hugging Face repository and the file in it. timm's files hold
# the vision tower alone.
PUBLISHED = {
    "internvit": "OpenGVLab/InternViT-300M-448px/model.safetensors",
    "internvit-v2_5": "OpenGVLab/InternViT-300M-448px-V2_5/model.safetensors",
    "dinov2": "facebook/dinov2-large/model.safetensors",
    "dinov2-reg": "facebook/dinov2-with-registers-large/model.safetensors",
    "siglip2": "timm/vit_so400m_patch16_siglip_256.v2_webli/model.safetensors",
    "siglip2-l": "timm/vit_large_patch16_siglip_256.v2_webli/model.safetensors",
    "clip": "timm/vit_large_patch14_clip_224.dfn2b/model.safetensors",  # apple/DFN2B-CLIP-ViT-L-14; its -39B sibling is not this
    "uniflow-internvit": "yuezhengrong/UniFlow/model.safetensors",  # the authors' tokenizer
}

# How published files name our ViT's parameters, in the order of PARAMETERS. {q,k,v}: three matrices that we keep stacked as
# one. -: a parameter that no model of the layout has. A file may have one of PREFIXES before every name.
PARAMETERS = "cls_token register_tokens pos_embed patch_embed norm_pre norm blocks norm1 qkv proj scale1 norm2 fc1 fc2 scale2".split()
LAYOUTS = {
    "ours": PARAMETERS,
    "InternViT, UniFlow": """embeddings.class_embedding - embeddings.position_embedding embeddings.patch_embedding - -
        encoder.layers norm1 attn.qkv attn.proj ls1 norm2 mlp.fc1 mlp.fc2 ls2""".split(),
    "InternVL of transformers": """embeddings.cls_token - embeddings.position_embeddings embeddings.patch_embeddings.projection - -
        encoder.layer layernorm_before attention.{q_proj,k_proj,v_proj} attention.projection_layer lambda_1
        layernorm_after mlp.fc1 mlp.fc2 lambda_2""".split(),
    "timm, DINOv2": """cls_token register_tokens pos_embed patch_embed.proj norm_pre norm blocks
        norm1 attn.qkv attn.proj ls1.gamma norm2 mlp.fc1 mlp.fc2 ls2.gamma""".split(),
    "DINOv2 of transformers": """embeddings.cls_token embeddings.register_tokens embeddings.position_embeddings
        embeddings.patch_embeddings.projection - layernorm
        encoder.layer norm1 attention.attention.{query,key,value} attention.output.dense layer_scale1.lambda1
        norm2 mlp.fc1 mlp.fc2 layer_scale2.lambda1""".split(),
    "ViT of transformers": """embeddings.cls_token - embeddings.position_embeddings embeddings.patch_embeddings.projection
        - layernorm encoder.layer layernorm_before attention.attention.{query,key,value} attention.output.dense -
        layernorm_after intermediate.dense output.dense -""".split(),
    "SigLIP, CLIP of transformers": """embeddings.class_embedding - embeddings.position_embedding.weight
        embeddings.patch_embedding pre_layrnorm post_layernorm encoder.layers
        layer_norm1 self_attn.{q_proj,k_proj,v_proj} self_attn.out_proj - layer_norm2 mlp.fc1 mlp.fc2 -""".split(),
    "open_clip": """visual.class_embedding - visual.positional_embedding visual.conv1 visual.ln_pre visual.ln_post
        visual.transformer.resblocks ln_1 attn.in_proj_ attn.out_proj - ln_2 mlp.c_fc mlp.c_proj -""".split(),
}
PREFIXES = ("", "vision_model.", "vision_tower.", "model.vision_tower.", "vit.")
HF_FAMILIES = {  # the structure of a ViT: transformers' model_type and class for it, the layout of its files
    "pre_norm final_norm cls": ("clip_vision_model", "CLIPVisionModel", "SigLIP, CLIP of transformers"),
    "patch_bias final_norm": ("siglip_vision_model", "SiglipVisionModel", "SigLIP, CLIP of transformers"),
    "patch_bias layer_scale cls": ("internvl_vision", "InternVLVisionModel", "InternVL of transformers"),
    "patch_bias final_norm layer_scale cls": ("dinov2", "Dinov2Model", "DINOv2 of transformers"),
    "patch_bias final_norm layer_scale cls registers":
        ("dinov2_with_registers", "Dinov2WithRegistersModel", "DINOv2 of transformers"),
    "patch_bias final_norm cls": ("vit", "ViTModel", "ViT of transformers"),
}
# What such files hold besides: our pixel statistics (ViTConfig says them), text towers, pooling heads, projections into
# other spaces, mask tokens, position indices.
KNOWN_EXTRAS = re.compile(r"(mean|std|(model\.)?(text_model|language_model|multi_modal_projector|transformer|token_embedding|"
                          r"positional_embedding|ln_final|text_projection|visual_projection|visual\.proj|logit_scale|logit_bias|"
                          r"attn_pool|(vision_model\.)?head|pooler|classifier|.*mask_token|.*position_ids)(\..*)?)$")


def read_config(path):
    """What a model file of this project says of itself: the JSON of its metadata entry "config", whose "vit" and "size" are
    checked. The authors' released file has none, and is known by its names."""
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            released = {"vit": asdict(TEACHERS["internvit"]), "size": 448, "teacher": "internvit", "released": True}
            config = released if "chal_proj.c_fc.weight" in f.keys() else json.loads(f.metadata()["config"])
        c = ViTConfig(**config["vit"])
        size = config.get("size", c.size)
        if type(size) is not int or not 0 < size <= 65536 or size % c.patch:
            raise ValueError(f"size is {size!r:.50}, expected a multiple of the patch {c.patch}")
        numbers = c.width * (c.depth * (4 * c.width + 2 * c.mlp_width) + 3 * c.patch ** 2 + (c.size // c.patch) ** 2)
        if 2 * numbers > os.path.getsize(path):  # said before anybody allocates them
            raise ValueError(f"it asks for {numbers:,} weights, and has {os.path.getsize(path):,} bytes")
        return config
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged or no model file of this project, whose metadata has config = {{\"vit\": ...}} "
                         f"({type(e).__name__}: {one_line(e)})") from None


def write_model(path, config, tensors):
    """Write {name: tensor} as safetensors, with `config` as JSON in the metadata entry "config", atomically."""
    data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", "config": json.dumps(config)})
    write_atomically(path, lambda f: f.write(data))


def write_atomically(path, write):
    """Call write(binary file) on a temporary file beside `path`, which takes its name when it is safely on disk.

    The temporary name is unique, so two writers of one path leave one of the two files whole.
    """
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def one_line(x):
    """Of an error or a name that comes from a file: at most 300 characters, in one line."""
    return " ".join(str(x).split())[:300]


def open_weights(path):
    """(set of names, function name -> tensor of floating-point numbers) of a .safetensors file, or of a .pth or .bin of
    tensors, which runs no code from it."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file")
    try:
        f = safe_open(path, "pt")
        names, read = set(f.keys()), f.get_tensor
    except SafetensorError as e:
        if path.endswith(".safetensors"):
            raise UserError(f"{path} is damaged or no safetensors file ({one_line(e)}): delete it, and fetch it again") from None
        refuse_pickle(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the pickle's version
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)  # training dumps wrap them
            tensors = {k.removeprefix("module."): x for k, x in tensors.items()
                       if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"}
        except Exception as e:  # torch.load raises many types; all mean that this is no plain file of tensors
            raise UserError(f"{path} is not a file of tensors ({type(e).__name__}); it was not executed") from None
        names, read = set(tensors), tensors.__getitem__

    def get(name):
        try:
            x = read(name)
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise TypeError(x.dtype)
        except (SafetensorError, AttributeError, TypeError) as e:  # the first two: types that this torch does not have
            raise UserError(f"{path}: {one_line(name)} is {one_line(e)}, expected float32, bfloat16, float16 or float64") from None
        return x
    return names, get


def refuse_pickle(path, torch_version=torch.__version__):
    """Raise UserError for a pickle where torch.load(weights_only=True) can be made to run its code (before 2.6, CVE-2025-32434)
    or to damage memory (before 2.10, CVE-2026-24747), unless the file's name carries a SHA-256 that it meets."""
    if tuple(int(n) for n in torch_version.split(".")[:2]) >= (2, 10):
        return
    named = HASH_IN_NAME.search(path)
    if not (named and file_sha256(path).startswith(named[1])):
        raise UserError(f"{path} is a pickle, which torch {torch_version} does not read safely: use torch 2.10 or newer, or "
                        "save it as .safetensors there")


def file_sha256(path):
    """SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            sha.update(chunk)
    return sha.hexdigest()


def names_in(layout, key):
    """Where a file of that layout keeps our ViT's parameter `key`: its name, or three names to stack."""
    names, parts = dict(zip(PARAMETERS, LAYOUTS[layout])), key.split(".")
    block = f"{names['blocks']}.{parts[1]}." if parts[0] == "blocks" else ""
    part, *kind = parts[2:] if block else parts
    name = block + ".".join([names[part], *kind]).replace("_.", "_")  # attn.in_proj_weight
    several = re.search(r"\{(.*)\}", name)
    return [name.replace(several[0], x) for x in several[1].split(",")] if several else [name]


def load_vit(vit, path, others=False):
    """Copy a file of any known layout into `vit`, converted to fp32, after comparing all names both ways and all shapes.
    Returns the set of the file's names that were used.

    KNOWN_EXTRAS, or with `others` any names, may be there besides. UserError lists what does not fit.
    """
    present, get = open_weights(path)
    own, marks = dict(vit.named_parameters()), ("blocks.0.proj.weight", "blocks.0.norm1.weight", "pos_embed")
    found = [(prefix, layout) for prefix in PREFIXES for layout in LAYOUTS
             if {prefix + name for key in marks for name in names_in(layout, key)} <= present]
    if not found:
        raise UserError(f"{path} is of no known layout ({', '.join(LAYOUTS)}); it holds {one_line(', '.join(sorted(present)[:3]))} ...")
    prefix, layout = found[0]
    names = {key: [prefix + name for name in names_in(layout, key)] for key in own}
    wanted = {name for group in names.values() for name in group}
    wrong = [f"missing {name}" for name in wanted - present]
    wrong += [f"unknown {name}" for name in present - wanted if not (others or KNOWN_EXTRAS.match(name))]
    state = {}
    for key, group in names.items():
        if present.issuperset(group):
            parts, shape = [get(name) for name in group], own[key].shape
            if key in ("cls_token", "pos_embed") and parts[0].shape == shape[-parts[0].ndim:]:
                parts = [parts[0].reshape(shape)]  # [D] or [N, D] in some layouts
            expected = (shape[0] // len(parts), *shape[1:])
            if any(x.shape != expected for x in parts):
                wrong.append(f"{' + '.join(group)} is {tuple(parts[0].shape)}, expected {expected}")
            else:
                state[key] = torch.cat(parts)
    if wrong:
        raise UserError(f"{path} ({layout} layout) does not fit, {len(wrong)} names: " + one_line("; ".join(sorted(wrong)[:4])))
    load_exactly(own, state, path)
    return wanted


@torch.no_grad()
def load_exactly(own, state, path):
    """Copy `state`, what a file holds, into `own`, a module's tensors by name, if all of it fits: names both ways, shapes,
    finite. Otherwise UserError names the misfits, and nothing is copied."""
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"unknown {k}" for k in state.keys() - own.keys()]
    for k in own.keys() & state.keys():
        if state[k].shape != own[k].shape:
            wrong.append(f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}")
        elif not state[k].float().isfinite().all() or k == "latent_std" and state[k].float().min() <= 0:
            wrong.append(f"{k} holds NaN, infinity, or a standard deviation that is not positive")
    if wrong:
        raise UserError(f"{path} does not fit the configuration ({len(wrong)} tensors): " + one_line("; ".join(sorted(wrong)[:3])))
    for k, x in own.items():
        x.copy_(state[k])


def teacher_config(name_or_path):
    """The ViTConfig of a key of TEACHERS or of a self-describing safetensors file. Raises UserError for neither."""
    if name_or_path in TEACHERS:
        return TEACHERS[name_or_path]
    if not os.path.isfile(str(name_or_path)):  # None where a model file names no teacher
        raise UserError(f"teacher {name_or_path!r} is neither a file nor one of: {' '.join(TEACHERS)}")
    return ViTConfig(**read_config(name_or_path)["vit"])


def load_teacher(name_or_path, weights=None, offline=False):
    """A frozen foundation model in eval mode, on the CPU in fp32.

    name_or_path: a key of TEACHERS, or a self-describing safetensors file: a ViT's state dict with the metadata entry
    "config" = JSON {"vit": {fields of ViTConfig}}. weights: a file in any of LAYOUTS; "random", a seeded initialisation, which
    is announced; or None, the published file, downloaded if need be unless `offline`. Raises UserError or OSError with what to do.
    """
    config = teacher_config(name_or_path)
    if name_or_path not in TEACHERS:
        if weights is not None:
            raise UserError(f"teacher {name_or_path} is a file and brings its weights: leave out teacher_weights {weights}")
        weights = name_or_path
    elif weights is None and name_or_path in PUBLISHED:
        weights = fetch(name_or_path, offline)
    elif weights is None:
        weights = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", f"teacher-{name_or_path}.safetensors")
        if not os.path.isfile(weights):
            raise MissingFile(f"{weights}: no such file; train it (experiments/tiny_imagenet/teacher.py), or give --teacher_weights FILE|random")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = ViT(config)
    if weights != "random":
        load_vit(vit, weights)
    elif os.environ.get("RANK", "0") == "0":  # once, under torchrun
        print(f"teacher {name_or_path}: a seeded RANDOM initialisation, no pretrained weights, so it teaches no semantics")
    return vit.eval().requires_grad_(False)


HASH_IN_NAME = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$")  # torch.hub's files carry the start of their SHA-256


def fetch(name_or_url, offline=False):
    """A published file's path on this machine: a path stays as it is; a name in PUBLISHED or a URL is downloaded once.

    Looked for in Hugging Face's cache, then in torch.hub's, where it is downloaded to: once for all processes, with a
    progress bar, and checked against the SHA-256 or the size that the server declares, or the hash in its name. offline:
    only what is on this machine. Honours HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE. Raises
    MissingFile with the URL and where to put the file by hand.
    """
    name_or_url = os.fspath(name_or_url)
    if os.path.isfile(name_or_url):
        return name_or_url
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if name_or_url in PUBLISHED:
        org, repo, file = PUBLISHED[name_or_url].split("/")
        url, name = f"{endpoint}/{org}/{repo}/resolve/main/{file}", f"{org}--{repo}--{file}"
        home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
        cache = glob.escape(os.path.expanduser(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))))
        cached = glob.glob(os.path.join(cache, f"models--{org}--{repo}", "snapshots", "*", file))
        if cached:
            return max(cached, key=os.path.getmtime)
    else:
        url, name = name_or_url, os.path.basename(urllib.parse.urlsplit(name_or_url).path)
        if not HASH_IN_NAME.search(name):  # then names are no more unique than model.safetensors is
            name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}--{name}"
    if not url.startswith(("http://", "https://")):
        raise MissingFile(f"{url}: no such file, no URL, and none of the names {' '.join(PUBLISHED)}")
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    advice = f"; or put the file at {path} by hand: curl -L -o {path} {url}"
    if os.path.isfile(path):
        return path
    if offline or os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false", "no"):
        raise MissingFile(f"{url} is not on this machine" + " and HF_HUB_OFFLINE is set: unset it" * (not offline) + advice)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".lock", "w") as lock:
            if os.name == "posix":  # one process downloads, the others wait here; a dead process lets go
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.isfile(path):
                download(url, path)
    except (OSError, RuntimeError, http.client.HTTPException) as e:  # RuntimeError: torch.hub's, of a wrong hash
        raise MissingFile(f"{url} could not be fetched ({one_line(e) or type(e).__name__}): run it again; another mirror: "
                          f"HF_ENDPOINT; another folder: TORCH_HOME{advice}") from None
    return path


def download(url, path):
    """Download by torch.hub, after asking what the server declares of the file: the hub does so before it redirects."""
    class Stay(urllib.request.HTTPRedirectHandler):
        redirect_request = lambda *args: None

    try:
        asked = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "torch.hub"})
        declared = urllib.request.build_opener(Stay).open(asked, timeout=30).headers
    except urllib.error.HTTPError as e:
        if e.code // 100 != 3:
            raise
        declared = e.headers
    sha = re.fullmatch('"?([0-9a-f]{64})"?', declared.get("X-Linked-ETag", "")) or HASH_IN_NAME.search(path)
    size = declared.get("X-Linked-Size") or (None if "Location" in declared else declared.get("Content-Length"))
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        torch.hub.download_url_to_file(url, part, sha and sha[1])
        if size and int(size) != os.path.getsize(part):
            raise OSError(f"{os.path.getsize(part):,} bytes came, {int(size):,} were declared")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    if not sha:
        print(f"{url}: the server declares no SHA-256, only the size was checked", file=sys.stderr)


if __name__ == "__main__":
    vit = load_teacher("tiny", "random")
    enc = Encoder(vit, latent_dim=16).eval()
    img = torch.rand(2, 3, 64, 96)
    z, hidden = enc(img)
    print("image   ", tuple(img.shape), "in [0, 1]")
    print("hidden  ", len(hidden), "x", tuple(hidden[0].shape))
    print("latent  ", tuple(enc.encode(img).shape), "normalised")
    print("features", tuple(enc.features(img).shape))
    print("parameters", f"{sum(p.numel() for p in enc.parameters()):,}")
