"""The unified encoder E_U of UniFlow: a pretrained vision transformer plus a projection to a small latent.

    H^(l) = Block_l(H^(l-1)),  l = 1..L          every block's tokens, what the distillation compares
    z     = P_down(norm(H^(L)))                  the latent, C channels per patch (paper, Sec. 3.1)

Symbols: B batch, D width, L layers, P prefix (CLS) tokens, N = h*w spatial tokens of a grid of p-pixel patches,
C latent channels, H = h*p and W = w*p pixels. Images are (B, 3, H, W) in [0, 1]; the network normalises inside.

    enc = Encoder.from_pretrained("out/model.safetensors")
    z = enc.encode(img)           # (B, C, h, w), normalised by the statistics stored in the file
    f = enc.features(img)         # (B, N, D), what a linear probe or a multimodal LLM reads

`python encoder.py` prints the shapes. Needs torch, safetensors (and tqdm to download); no other file of this project.
Structure of the ViT: Dosovitskiy et al. 2021, with the differences of InternViT, DINOv2, SigLIP2 and CLIP as flags.
"""
import errno
import fcntl
import glob
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import asdict, dataclass, fields

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


class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A UserError of a file that is not there."""


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
    num_prefix: int = 1            # P: 1 with a CLS token, 0 without
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
        if min(self.width, self.depth, self.heads, self.mlp_width, self.patch, self.size) < 1 or self.width % self.heads or self.size % self.patch:
            raise UserError(f"ViT width {self.width} must be a multiple of heads {self.heads}, size {self.size} of patch {self.patch}, "
                             "and all of them positive")
        if self.depth > 1000 or self.num_prefix > 1 or not 0 < self.eps < 1 or not 0 <= self.layer_scale < 1e6:
            raise UserError(f"ViT depth {self.depth} is at most 1000, num_prefix {self.num_prefix} 0 or 1, eps {self.eps} in (0, 1), "
                             f"layer_scale {self.layer_scale} at least 0")
        if self.activation not in ACTIVATIONS or self.pixel_stats not in PIXEL_STATS:
            raise UserError(f"activation {self.activation!r} must be one of {' '.join(ACTIVATIONS)}, "
                             f"pixel_stats {self.pixel_stats!r} of {' '.join(PIXEL_STATS)}")


TEACHERS = {  # the paper's foundation models; PUBLISHED has their files
    "internvit": ViTConfig(final_norm=False, layer_scale=1.0),
    "internvit-v2_5": ViTConfig(final_norm=False, layer_scale=1.0),
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
    some images in training (stochastic depth), or 1.
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
        return scaled(self.proj, x.transpose(1, 2).reshape(B, T, D), self.scale1)  # (B, T, D)

    def mlp(self, x):
        return scaled(self.fc2, self.activation(self.fc1(x)), self.scale2)

    def forward(self, x, keep=(1, 1)):
        x = x + keep[0] * self.attention(flat(self.norm1, x))
        return x + keep[1] * self.mlp(flat(self.norm2, x))


def flat(norm, x):
    """norm(x) on tokens (B*T, D): such rows inductor compiles to one pass over memory, those of (B, T, D) to two."""
    return norm(x.flatten(0, 1)).view_as(x)


def scaled(linear, x, scale):
    """scale * linear(x), layer scale or None for 1: applied to the weights, where it costs no pass over the activations."""
    return linear(x) if scale is None else F.linear(x, scale[:, None] * linear.weight, scale * linear.bias)


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
        h, w = H // p, W // p
        x = ((img - self.mean) / self.std).reshape(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1)  # (B, N, 3p^2)
        x = F.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)  # the convolution, faster: (B, N, D)
        x = x + resize_grid(self.pos_embed[:, P:], h, w).to(x.dtype)  # under autocast the residual stream is bf16 from here on
        if P:
            cls = (self.cls_token + self.pos_embed[:, :P]).expand(B, -1, -1)
            x = torch.cat([cls.to(x.dtype), x], dim=1)  # (B, P+N, D)
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
        """The encoder of a tokenizer file, ours or the authors' released one, in eval mode on the CPU in fp32.

        Raises FileNotFoundError, or ValueError if the file is no such tokenizer or its tensors do not fit its
        configuration.
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
        load_exactly(enc.state_dict(), {k.removeprefix("encoder."): get(k) for k in present if k.startswith("encoder.")}, path)
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
        which LLaVA or InternVL code reads as a vision tower, for images of the size that it was trained at. ValueError if
        it is of no such family."""
        c, size = self.vit.config, self.size
        layout, prefix, kind = "SigLIP, CLIP of transformers", "vision_model.", {}
        if c.pre_norm:
            family, model = "clip_vision_model", "CLIPVisionModel"
        elif not c.num_prefix:
            family, model, kind = "siglip_vision_model", "SiglipVisionModel", {"vision_use_head": False}
        elif not c.final_norm:
            layout, prefix, family, model = "InternVL of transformers", "", "internvl_vision", "InternVLVisionModel"
            kind = {"attention_bias": True, "image_size": [size] * 2, "patch_size": [c.patch] * 2}
        elif c.layer_scale:
            layout, prefix, family, model = "DINOv2 of transformers", "", "dinov2", "Dinov2Model"
            kind = {"mlp_ratio": c.mlp_width // c.width, "use_mask_token": False}
        else:
            raise UserError("transformers has no vision model of this structure; those of InternViT, DINOv2, SigLIP2 and CLIP can be saved")
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
        for key, x in self.vit.state_dict().items():
            if key == "pos_embed":
                x = torch.cat([x[:, :c.num_prefix], resize_grid(x[:, c.num_prefix:], size // c.patch, size // c.patch)], dim=1)
            if prefix and key in ("cls_token", "pos_embed"):
                x = x.squeeze((0, 1) if key == "cls_token" else 0)  # [D] and [N, D] in this layout
            names = names_in(layout, key)
            tensors.update({prefix + name: part.clone() for name, part in zip(names, x.chunk(len(names)))})
        data = safetensors.torch.save(tensors, {"format": "pt"})
        os.makedirs(folder, exist_ok=True)
        write_atomically(os.path.join(folder, "model.safetensors"), lambda f: f.write(data))
        for name, content in ("config.json", config), ("preprocessor_config.json", preprocessor):
            write_atomically(os.path.join(folder, name), lambda f: f.write(json.dumps(content, indent=2).encode()))


# ---- files ----

# The smallest published file of safe tensors for each name: a Hugging Face repository and the file in it. timm's files hold
# the vision tower alone.
PUBLISHED = {
    "internvit": "OpenGVLab/InternViT-300M-448px/model.safetensors",
    "internvit-v2_5": "OpenGVLab/InternViT-300M-448px-V2_5/model.safetensors",
    "dinov2": "facebook/dinov2-large/model.safetensors",
    "siglip2": "timm/vit_so400m_patch16_siglip_256.v2_webli/model.safetensors",
    "siglip2-l": "timm/vit_large_patch16_siglip_256.v2_webli/model.safetensors",
    "clip": "timm/vit_large_patch14_clip_224.dfn2b/model.safetensors",  # apple/DFN2B-CLIP-ViT-L-14; its -39B sibling is not this
    "uniflow-internvit": "yuezhengrong/UniFlow/model.safetensors",  # the authors' tokenizer
}

# How published files name our ViT's parameters, in the order of PARAMETERS. {q,k,v}: three matrices that we keep stacked as
# one. -: a parameter that no model of the layout has. A file may have one of PREFIXES before every name.
PARAMETERS = "cls_token pos_embed patch_embed norm_pre norm blocks norm1 qkv proj scale1 norm2 fc1 fc2 scale2".split()
LAYOUTS = {
    "ours": PARAMETERS,
    "InternViT, UniFlow": """embeddings.class_embedding embeddings.position_embedding embeddings.patch_embedding - - encoder.layers
        norm1 attn.qkv attn.proj ls1 norm2 mlp.fc1 mlp.fc2 ls2""".split(),
    "InternVL of transformers": """embeddings.cls_token embeddings.position_embeddings embeddings.patch_embeddings.projection - -
        encoder.layer layernorm_before attention.{q_proj,k_proj,v_proj} attention.projection_layer lambda_1
        layernorm_after mlp.fc1 mlp.fc2 lambda_2""".split(),
    "timm, DINOv2": """cls_token pos_embed patch_embed.proj norm_pre norm blocks
        norm1 attn.qkv attn.proj ls1.gamma norm2 mlp.fc1 mlp.fc2 ls2.gamma""".split(),
    "DINOv2 of transformers": """embeddings.cls_token embeddings.position_embeddings embeddings.patch_embeddings.projection - layernorm
        encoder.layer norm1 attention.attention.{query,key,value} attention.output.dense layer_scale1.lambda1
        norm2 mlp.fc1 mlp.fc2 layer_scale2.lambda1""".split(),
    "SigLIP, CLIP of transformers": """embeddings.class_embedding embeddings.position_embedding.weight embeddings.patch_embedding
        pre_layrnorm post_layernorm encoder.layers layer_norm1 self_attn.{q_proj,k_proj,v_proj} self_attn.out_proj -
        layer_norm2 mlp.fc1 mlp.fc2 -""".split(),
    "open_clip": """visual.class_embedding visual.positional_embedding visual.conv1 visual.ln_pre visual.ln_post
        visual.transformer.resblocks ln_1 attn.in_proj_ attn.out_proj - ln_2 mlp.c_fc mlp.c_proj -""".split(),
}
PREFIXES = ("", "vision_model.", "vision_tower.", "model.vision_tower.")
# What such files hold besides: text towers, pooling heads, projections into other spaces, mask tokens, position indices.
KNOWN_EXTRAS = re.compile(r"(model\.)?(text_model|language_model|multi_modal_projector|transformer|token_embedding|"
                          r"positional_embedding|ln_final|text_projection|visual_projection|visual\.proj|logit_scale|logit_bias|"
                          r"attn_pool|(vision_model\.)?head|.*mask_token|.*position_ids)(\..*)?$")


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
            raise UserError(f"size is {size!r:.50}, expected a multiple of the patch {c.patch}")
        numbers = c.width * (c.depth * (4 * c.width + 2 * c.mlp_width) + 3 * c.patch ** 2 + (c.size // c.patch) ** 2)
        if 2 * numbers > os.path.getsize(path):  # said before anybody allocates them
            raise UserError(f"it asks for {numbers:,} weights, and has {os.path.getsize(path):,} bytes")
        return config
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged or no model file of this project, whose metadata has config = {{\"vit\": ...}} "
                         f"({type(e).__name__}: {one_line(e)})") from None


def write_model(path, config, tensors):
    """Write {name: tensor} as safetensors, with `config` as JSON in the metadata entry "config", atomically."""
    data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", "config": json.dumps(config)})
    write_atomically(path, lambda f: f.write(data))


def write_atomically(path, write):
    """Call write(binary file) on a temporary file beside `path`, which takes its name when it is safely on disk."""
    temporary = os.path.join(os.path.dirname(path), f".{os.getpid():x}-{time.monotonic_ns() % 2**32:08x}.tmp")
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


def one_line(x):
    """Of an error or a name that comes from a file: at most 300 characters, in one line."""
    return " ".join(str(x).split())[:300]


def open_weights(path):
    """(set of names, function name -> tensor of floating-point numbers) of a .safetensors file, or of a .pth or .bin of
    tensors, which runs no code from it."""
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file")
    try:
        f = safe_open(path, "pt")
        names, read = set(f.keys()), f.get_tensor
    except SafetensorError as e:
        if path.endswith(".safetensors"):
            raise UserError(f"{path} is damaged or no safetensors file ({one_line(e)}): delete it, and fetch it again") from None
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

    KNOWN_EXTRAS, or with `others` any names, may be there besides. ValueError lists what does not fit.
    """
    present, get = open_weights(path)
    own, marks = vit.state_dict(), ("blocks.0.proj.weight", "blocks.0.norm1.weight", "pos_embed")
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


def load_exactly(own, state, path):
    """Copy `state`, what a file holds, into `own`, a module's state_dict, if all of it fits: names both ways, shapes, finite.
    Otherwise ValueError names the misfits, and nothing is copied."""
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
    """The ViTConfig of a key of TEACHERS or of a self-describing safetensors file. Raises ValueError for neither."""
    if name_or_path in TEACHERS:
        return TEACHERS[name_or_path]
    if not os.path.isfile(str(name_or_path)):  # None where a model file names no teacher
        raise UserError(f"teacher {name_or_path!r} is neither a file nor one of: {' '.join(TEACHERS)}")
    return ViTConfig(**read_config(name_or_path)["vit"])


def load_teacher(name_or_path, weights=None, offline=False):
    """A frozen foundation model in eval mode, on the CPU in fp32.

    name_or_path: a key of TEACHERS, or a self-describing safetensors file: a ViT's state dict with the metadata entry
    "config" = JSON {"vit": {fields of ViTConfig}}. weights: a file in any of LAYOUTS; "random", a seeded initialisation, which
    is announced; or None, the published file, downloaded if need be unless `offline`. Raises ValueError or OSError with what to do.
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
RETRIES, PATIENCE, TIMEOUT = 4, 1.0, 30.0  # tries of a download, seconds before the second (then doubled), seconds of silence


def fetch(name_or_url, offline=False):
    """A published file's path on this machine: a path stays as it is; a name in PUBLISHED or a URL is downloaded once.

    Looked for in Hugging Face's cache, then in torch.hub's, where it is downloaded to: with a progress bar, resumed where an
    earlier try broke off, once for all processes, and checked against the size and SHA-256 that the server declares
    (or the hash in its name, as torch.hub's files have) before it is used. offline: only what is on this machine. Honours HF_ENDPOINT,
    HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. Raises FileNotFoundError or OSError with the URL, where to put the file by hand, and what to do.
    """
    if os.path.isfile(name_or_url):
        return name_or_url
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if name_or_url in PUBLISHED:
        org, repo, file = PUBLISHED[name_or_url].split("/")
        url, name = f"{endpoint}/{org}/{repo}/resolve/main/{file}", f"{org}--{repo}--{file}"
        home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
        cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub")))
        cached = list(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(cache), f"models--{org}--{repo}", "snapshots", "*", file))))
        if cached:
            return max(cached, key=os.path.getmtime)
    else:
        url, name = name_or_url, os.path.basename(urllib.parse.urlsplit(name_or_url).path)
        if not HASH_IN_NAME.search(name):  # then names are no more unique than model.safetensors is
            name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}--{name}"
    if not url.startswith(("http://", "https://")):
        raise MissingFile(f"HF_ENDPOINT {endpoint} is no URL" if name_or_url in PUBLISHED else
                                f"{url}: no such file, no URL, and none of the names {' '.join(PUBLISHED)}")
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if os.path.isfile(path):
        return path
    advice = f"; or put the file at {path} by hand: curl -L -o {path} {url}"
    if offline or os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false", "no"):
        raise MissingFile(f"{url} is not on this machine" + " and HF_HUB_OFFLINE is set: unset it" * (not offline) + advice)
    token = os.environ.get("HF_TOKEN", "").strip() if url.startswith(endpoint + "/") else ""  # for no other host
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = open(path + ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait here; a dead process lets go
    except OSError as e:
        raise MissingFile(f"{path} cannot be written ({e}): set TORCH_HOME to another folder{advice}") from None
    with lock:
        if os.path.isfile(path):
            return path
        for retry in range(RETRIES):
            try:
                download(url, path, token)
                return path
            except urllib.error.HTTPError as e:
                advised = {401: "you may not read it: set HF_TOKEN", 403: "you may not read it: set HF_TOKEN, accept its licence",
                           404: "there is no such file: HF_ENDPOINT may name another mirror"}.get(e.code, "try again later")
                why, hopeless = f"HTTP status {e.code}, {advised}", e.code < 500 and e.code not in (408, 429)
            except (OSError, http.client.HTTPException) as e:  # no connection, silence, a cut: the next try goes on from there
                why = f"{one_line(e) or type(e).__name__} ({retry + 1} tries): run it again to go on from there"
                hopeless = getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS)
            if hopeless or retry == RETRIES - 1:
                raise MissingFile(f"{url}: {why}{advice}")
            time.sleep(PATIENCE * 2 ** retry)


def download(url, path, token=""):
    """One try of fetch: append what is missing to path.part, check it, and give it its name. ValueError if it is not what
    the server declared."""
    from tqdm import tqdm

    declared, authorization = {}, f"Bearer {token}"

    class Redirect(urllib.request.HTTPRedirectHandler):
        http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python follows it from 3.11 on

        def redirect_request(self, request, fp, code, msg, headers, newurl):
            declared.update({k.lower(): v for k, v in headers.items()})  # the hub declares size and hash here
            new = super().redirect_request(request, fp, 307, msg, headers, newurl)
            if token and urllib.parse.urlsplit(newurl)[:2] == urllib.parse.urlsplit(url)[:2]:  # the storage's host must not see it
                new.add_unredirected_header("Authorization", authorization)
            return new

    part = path + ".part"
    have = max(0, os.path.getsize(part) - 1) if os.path.exists(part) else 0  # the last byte again: a server does not send none
    request = urllib.request.Request(url, headers={"User-Agent": "uniflow-minimal", **({"Range": f"bytes={have}-"} if have else {})})
    if token:
        request.add_unredirected_header("Authorization", authorization)
    try:
        response = urllib.request.build_opener(Redirect).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code != 416:
            raise
        os.remove(part)
        raise OSError("the part downloaded before is longer than the file") from None
    with response, open(part, "ab") as f:
        if response.status != 206:  # all of it
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError(f"asked for the bytes from {have:,} on, the server sent {response.headers.get('Content-Range')}")
        f.truncate(have)
        length = response.headers.get("Content-Length")
        declared.update({k.lower(): v for k, v in response.headers.items()})
        size = int(declared["x-linked-size"]) if "x-linked-size" in declared else have + int(length) if length else None
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path), disable=None) as bar:
            while chunk := response.read(1 << 20):
                f.write(chunk)
                bar.update(len(chunk))
        f.flush()
        os.fsync(f.fileno())
    have = os.path.getsize(part)
    if size is not None and have < size:
        raise OSError(f"the connection broke at {have:,} of {size:,} bytes")
    named = HASH_IN_NAME.search(path)
    etag = declared.get("x-linked-etag", "").strip('"')
    expected = etag if re.fullmatch("[0-9a-f]{64}", etag) else named[1] if named else None
    sha = hashlib.sha256()
    with open(part, "rb") as f:
        while chunk := f.read(1 << 24):
            sha.update(chunk)
    digest = sha.hexdigest()
    if (size is not None and have != size) or (expected and not digest.startswith(expected)):
        os.remove(part)
        raise UserError(f"{url}: what came is not what the server declared ({have:,} bytes, SHA-256 {digest[:12]}..., expected "
                         f"{size or 0:,} bytes, {expected}); it was deleted, run it again")
    if not expected:
        print(f"{url}: the server declares no SHA-256, only the size was checked", file=sys.stderr)
    os.replace(part, path)


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
