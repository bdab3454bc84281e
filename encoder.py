"""The unified encoder E_U of UniFlow: a pretrained vision transformer, and a projection to a small latent.

    H^(l) = Block_l(H^(l-1)),  l = 1..L          every block's tokens, which the distillation compares
    z     = P_down(norm(H^(L)))                  the latent, C channels per patch (paper, Sec. 3.1)

Symbols: B batch, D width, L layers, P prefix (CLS) tokens, N = h*w spatial tokens of a grid of p-pixel patches,
C latent channels, H = h*p and W = w*p pixels. Images are (B, 3, H, W) in [0, 1]; the network normalises inside.

    enc = Encoder.from_pretrained("out/model.safetensors")
    latent = enc.encode(img)      # (B, C, h, w), NORMALISED by the statistics in the file: for Decoder.decode
    z, hidden = enc(img)          # z (B, C, h, w), RAW: for Decoder.loss and Decoder.condition
    f = enc.features(img)         # (B, N, D): for a linear probe or a multimodal LLM

`python encoder.py` prints the shapes. Needs torch, safetensors and tqdm, and no other file of this project.
Structure of the ViT: Dosovitskiy et al. 2021, with the differences of InternViT, DINOv2, SigLIP2 and CLIP as flags.
"""
import contextlib
import glob
import hashlib
import http.client
import json
import os
import re
import urllib.parse
import uuid
import warnings
from dataclasses import dataclass, fields

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """Something that the user gave is wrong (an argument, a path, a file): scripts print one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file is not there, and cannot be fetched."""


PIXEL_STATS = {  # per channel, the mean and the standard deviation by which a network wants its pixels normalised
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
    num_prefix: int = 1            # P: 0, 1 with a CLS token, 2 to 5 with 1 to 4 register tokens after it
    patch_bias: bool = True        # bias in the patch convolution
    pre_norm: bool = False         # LayerNorm before the first block (CLIP)
    final_norm: bool = True        # LayerNorm after the last block; InternViT has none
    layer_scale: float = 0.0       # initial value of a learned scale per channel of each branch; 0: no such scale
    eps: float = 1e-6              # of every LayerNorm
    activation: str = "gelu"       # a key of ACTIVATIONS
    pixel_stats: str = "imagenet"  # a key of PIXEL_STATS

    def __post_init__(self):  # the values may come from a file
        for f in fields(self):
            x, low = getattr(self, f.name), (0 if f.name == "num_prefix" else 1)
            if type(x) is not f.type or (f.type is int and not low <= x <= 65536):
                bounds = f" from {low} to 65536" if f.type is int else ""
                raise UserError(f"{f.name} is {x!r:.50}; expected {f.type.__name__}{bounds}")
        rules = {"width must be a multiple of heads": self.width % self.heads == 0,
                 "size must be a multiple of patch": self.size % self.patch == 0,
                 "depth must be at most 1000, num_prefix at most 5": self.depth <= 1000 and self.num_prefix <= 5,
                 "eps must be in (0, 1), layer_scale in [0, 1e6)": 0 < self.eps < 1 and 0 <= self.layer_scale < 1e6,
                 f"activation must be one of {' '.join(ACTIVATIONS)}": self.activation in ACTIVATIONS,
                 f"pixel_stats must be one of {' '.join(PIXEL_STATS)}": self.pixel_stats in PIXEL_STATS}
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"{rule}: {self}")


TEACHERS = {  # the paper's foundation models; PUBLISHED says where their files are
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

    s1, s2: layer scale, where the model has one. keep: a factor for each of the two branches: 1, or with stochastic
    depth a mask (B, 1, 1) of mean 1, which is 0 for the images that skip the branch.
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
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        return scaled(self.proj, x, self.scale1)  # (B, T, D)

    def mlp(self, x):
        return scaled(self.fc2, ACTIVATIONS[self.activation](self.fc1(x)), self.scale2)

    def forward(self, x, keep=(1, 1)):
        x = x + keep[0] * self.attention(norm_rows(self.norm1, x))
        return x + keep[1] * self.mlp(norm_rows(self.norm2, x))


def norm_rows(norm, x):
    """norm(x), computed on rows (B*T, D): compiled, it then passes over the memory once; on (B, T, D) twice."""
    return norm(x.flatten(0, 1)).view_as(x)


def scaled(linear, x, scale):
    """scale * linear(x), where None is a scale of 1. The scale goes into the weights: on the activations it would cost
    5% of a training step and 4 GiB, at InternViT's size on an H100."""
    if scale is None:
        return linear(x)
    if type(linear) is not nn.Linear:  # for instance LoRA's layer, which computes more than weight and bias
        return scale * linear(x)
    return F.linear(x, scale[:, None] * linear.weight, scale * linear.bias)


class ViT(nn.Module):
    """A vision transformer: img (B, 3, H, W) in [0, 1] -> list of L block outputs, each (B, P+N, D).

    H and W may be any multiples of the patch: the position grid is resized (see resize_grid). The outputs have not
    passed `norm`, the final LayerNorm (the identity in models without one). P = `num_prefix` tokens come first: CLS,
    then registers (Darcet et al. 2024), which have no position. depth: run only the first `depth` blocks.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        mean, std = PIXEL_STATS[c.pixel_stats]
        self.num_prefix = c.num_prefix
        self.drop_path = 0.0     # stochastic depth in training: rate of the last block; it rises linearly from 0
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
            prefix = [self.cls_token + self.pos_embed[:, :1], self.register_tokens][:self.num_prefix]  # P = 1: CLS
            x = torch.cat([*(token.expand(B, -1, -1).to(x.dtype) for token in prefix), x], dim=1)  # (B, P+N, D)
        x = self.norm_pre(x).to(x.dtype)
        outputs = []
        for i, block in enumerate(list(self.blocks)[:depth]):
            keep = (1, 1)
            if self.training and self.drop_path:
                rate = self.drop_path * i / max(len(self.blocks) - 1, 1)
                keep = (torch.rand(2, B, 1, 1, device=x.device) >= rate).to(x.dtype) / (1 - rate)
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, keep)
            outputs.append(x)
        return outputs


def check_image(img, patch):
    """Raise ValueError unless img is floating point, (B, 3, H, W), H and W multiples of the patch, in about [0, 1].

    Only values on the CPU are looked at: reading them from a GPU would make the program wait for it.
    """
    if not isinstance(img, torch.Tensor) or img.ndim != 4 or img.shape[1] != 3 or not img.is_floating_point():
        got = f"{img.dtype} {tuple(img.shape)}" if isinstance(img, torch.Tensor) else type(img).__name__
        raise ValueError(f"img is {got}; expected a floating-point tensor (B, 3, H, W) in [0, 1]: img.float() / 255?")
    H, W = img.shape[2:]
    if H % patch or W % patch or not H * W:
        w, h = (max(patch, round(side / patch) * patch) for side in (W, H))
        raise ValueError(f"image is {W}x{H} pixels; sides must be multiples of the patch {patch}: try {w}x{h}")
    if img.device.type == "cpu" and not torch.compiler.is_compiling():
        with contextlib.suppress(RuntimeError):  # an empty batch and vmap's tensors have no values
            low, high = (x.item() for x in img.detach().aminmax())
            if not (low > -0.5 and high < 1.5):  # a resize may overshoot a little; this form also catches nan
                raise ValueError(f"img has values from {low:.3g} to {high:.3g}; expected [0, 1]: the network "
                                 "normalises inside")


def resize_grid(pos, h, w):
    """Position embedding of a square grid (1, g*g, D) -> (1, h*w, D), row-major: bicubic, in fp32, no antialias.

    The scale is the ratio of the sizes, as in InternViT and in Hugging Face's models. DINOv2's hub code adds 0.1 to
    the size, which moves the sample points by up to 0.23 source cells at the far edge.
    """
    g = round(pos.shape[1] ** 0.5)
    if (h, w) == (g, g):
        return pos
    grid = pos.float().reshape(1, g, g, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(pos.dtype)  # (1, h*w, D)


class Encoder(nn.Module):
    """The tokenizer's encoder: a ViT, and the projection of its last tokens to C = latent_dim channels.

    projector: "mlp", Linear(D, D)-GELU-Linear(D, C) as in the released model, or "linear", the paper's words.
    There are two latents: calling the module gives the raw z, for Decoder.loss and condition; `encode` gives the
    normalised latent, for Decoder.decode. No call stops gradients: use torch.no_grad() where they are not wanted.
    Under FSDP (fully_shard), register "features" with register_fsdp_forward_method; the other calls need nothing.
    """

    def __init__(self, vit, latent_dim=64, projector="mlp"):
        super().__init__()
        if type(latent_dim) is not int or not 0 < latent_dim <= 65536:
            raise UserError(f"latent_dim is {latent_dim!r:.50}, expected an integer from 1 to 65536")
        D = vit.config.width
        self.vit, self.latent_dim, self.projector = vit, latent_dim, projector
        self.size = vit.config.size  # side of the training images in pixels; from_pretrained takes it from the file
        if projector == "linear":
            self.latent_down = nn.Linear(D, latent_dim)
        elif projector == "mlp":
            self.latent_down = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, latent_dim))
        else:
            raise UserError(f"projector {projector!r:.50} is unknown; it is mlp or linear")
        # the latent's statistics, 0 and 1 until computed; the file holds one copy for encoder and decoder
        self.register_buffer("latent_mean", torch.zeros(latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_dim, 1, 1))

    def forward(self, img):
        """img (B, 3, H, W) in [0, 1] -> the RAW z (B, C, h, w), and the list [H^(1)..H^(L)], each (B, P+N, D)."""
        hidden, p = self.vit(img), self.vit.config.patch
        z = self.latent_down(self.vit.norm(hidden[-1][:, self.vit.num_prefix:]))  # (B, N, C)
        return z.transpose(1, 2).unflatten(2, (img.shape[2] // p, -1)), hidden  # (B, C, h, w)

    def encode(self, img):
        """img (B, 3, H, W) in [0, 1] -> the NORMALISED latent (B, C, h, w): (z - stored mean) / stored deviation."""
        return (self(img)[0] - self.latent_mean) / self.latent_std

    def features(self, img, layer=None, grid=False):
        """img (B, 3, H, W) in [0, 1] -> semantic tokens (B, N, D), row-major, without CLS and registers.

        layer=None: the last block's, after the final norm. An integer: that block's output, before any norm (0 is the
        first, -2 the second-to-last, which LLaVA reads). A list of these gives a list, from one pass that stops after
        the deepest block. grid: maps (B, D, h, w) instead. Raises ValueError for a layer that does not exist.
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
        """The encoder of a tokenizer file, in eval mode, on the CPU, in fp32.

        Raises MissingFile, or UserError if the file holds no tokenizer or its tensors do not fit its configuration.
        """
        config = read_config(path)
        if not {"decoder", "size"} <= config.keys():
            raise UserError(f"{path} is a model file, but no tokenizer; train.py writes out/model.safetensors")
        try:
            enc = cls(ViT(ViTConfig(**config["vit"])), config["decoder"]["latent_dim"], config["decoder"]["projector"])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path} describes no UniFlow encoder ({type(e).__name__}: {one_line(e)})") from None
        present, get = open_weights(path)
        # The file has the statistics as (C), the module as (C, 1, 1). Files of train.py lack the other buffers.
        statistics = {"latent_mean": enc.latent_mean.flatten(), "latent_std": enc.latent_std.flatten()}  # views
        state = {k: x for k, x in enc.named_buffers() if k not in statistics}
        state |= {k.removeprefix("encoder."): get(k) for k in present if k.startswith("encoder.")}
        state |= {k: get(k) for k in statistics.keys() & present}
        load_exactly(enc.state_dict() | statistics, state, path)
        enc.size = config["size"]
        return enc.eval()


def parameter_groups(modules, lr, weight_decay=0.0, layer_decay=1.0):
    """The trainable parameters of `modules` (a module or several) as an optimizer's groups, each in exactly one group.

    Only weights of linear layers and convolutions decay: no bias, norm, scale, token or position does. layer_decay
    d < 1 gives early layers a lower rate (BEiT): in each ViT of L layers, block l = 1..L learns at lr * d^(L + 1 - l),
    what comes before the blocks at lr * d^(L + 1). Its final norm and all other parameters learn at lr.
    """
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    below = {}  # for each parameter of a ViT, the number of layers from it to the output
    for vit in [m for module in modules for m in module.modules() if isinstance(m, ViT)]:
        for name, p in vit.named_parameters():
            number = int(name.split(".")[1]) if name.startswith("blocks.") else -1  # -1: before the blocks
            below[p] = 0 if name.startswith("norm.") else len(vit.blocks) - number
    embeddings = {m.weight for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    groups, params = {}, {p: name for module in modules for name, p in module.named_parameters() if p.requires_grad}
    for decays in True, False:
        for p, name in params.items():
            if (p.ndim > 1 and name.endswith("weight") and p not in embeddings) == decays:
                groups.setdefault((lr * layer_decay ** below.get(p, 0), decays), []).append(p)
    return [dict(params=group, lr=rate, weight_decay=weight_decay * decays) for (rate, decays), group in groups.items()]


# ---- files ----

# Each model's smallest published safetensors file: a Hugging Face repository, and the file in it. timm's files hold the
# vision tower alone.
PUBLISHED = {
    "internvit": "OpenGVLab/InternViT-300M-448px/model.safetensors",
    "internvit-v2_5": "OpenGVLab/InternViT-300M-448px-V2_5/model.safetensors",
    "dinov2": "facebook/dinov2-large/model.safetensors",
    "dinov2-reg": "facebook/dinov2-with-registers-large/model.safetensors",
    "siglip2": "timm/vit_so400m_patch16_siglip_256.v2_webli/model.safetensors",
    "siglip2-l": "timm/vit_large_patch16_siglip_256.v2_webli/model.safetensors",
    "clip": "timm/vit_large_patch14_clip_224.dfn2b/model.safetensors",  # apple/DFN2B-CLIP-ViT-L-14, not ...-14-39B
    "uniflow-internvit": "yuezhengrong/UniFlow/model.safetensors",  # the authors' tokenizer, for tools/convert.py
}

# How published files name our ViT's parameters, in the order of PARAMETERS. {q,k,v} are three matrices that we keep as
# one. - is a parameter that no model of the layout has. A file may have one of PREFIXES before every name.
PARAMETERS = ("cls_token register_tokens pos_embed patch_embed norm_pre norm blocks "
              "norm1 qkv proj scale1 norm2 fc1 fc2 scale2").split()
LAYOUTS = {
    "ours": PARAMETERS,
    "InternViT, UniFlow": """embeddings.class_embedding - embeddings.position_embedding embeddings.patch_embedding - -
        encoder.layers norm1 attn.qkv attn.proj ls1 norm2 mlp.fc1 mlp.fc2 ls2""".split(),
    "InternVL of transformers": """embeddings.cls_token - embeddings.position_embeddings
        embeddings.patch_embeddings.projection - - encoder.layer
        layernorm_before attention.{q_proj,k_proj,v_proj} attention.projection_layer lambda_1
        layernorm_after mlp.fc1 mlp.fc2 lambda_2""".split(),
    "timm, DINOv2": """cls_token register_tokens pos_embed patch_embed.proj norm_pre norm blocks
        norm1 attn.qkv attn.proj ls1.gamma norm2 mlp.fc1 mlp.fc2 ls2.gamma""".split(),
    "DINOv2 of transformers": """embeddings.cls_token embeddings.register_tokens embeddings.position_embeddings
        embeddings.patch_embeddings.projection - layernorm encoder.layer
        norm1 attention.attention.{query,key,value} attention.output.dense layer_scale1.lambda1
        norm2 mlp.fc1 mlp.fc2 layer_scale2.lambda1""".split(),
    "ViT of transformers": """embeddings.cls_token - embeddings.position_embeddings
        embeddings.patch_embeddings.projection - layernorm encoder.layer
        layernorm_before attention.attention.{query,key,value} attention.output.dense -
        layernorm_after intermediate.dense output.dense -""".split(),
    "SigLIP, CLIP of transformers": """embeddings.class_embedding - embeddings.position_embedding.weight
        embeddings.patch_embedding pre_layrnorm post_layernorm encoder.layers
        layer_norm1 self_attn.{q_proj,k_proj,v_proj} self_attn.out_proj - layer_norm2 mlp.fc1 mlp.fc2 -""".split(),
    "open_clip": """visual.class_embedding - visual.positional_embedding visual.conv1 visual.ln_pre visual.ln_post
        visual.transformer.resblocks ln_1 attn.in_proj_ attn.out_proj - ln_2 mlp.c_fc mlp.c_proj -""".split(),
}
PREFIXES = ("", "vision_model.", "vision_tower.", "model.vision_tower.", "vit.")
# Other tensors of such files, which we do not need: pixel statistics, text towers, pooling heads, projections into
# other spaces, mask tokens, position indices.
KNOWN_EXTRAS = re.compile(r"(mean|std|(model\.)?(text_model|language_model|multi_modal_projector|transformer|"
                          r"token_embedding|positional_embedding|ln_final|text_projection|visual_projection|"
                          r"visual\.proj|logit_scale|logit_bias|attn_pool|(vision_model\.)?head|pooler|classifier|"
                          r".*mask_token|.*position_ids)(\..*)?)$")


def read_config(path):
    """The JSON, a dict, that a model file of this project has in its metadata entry "config". UserError if the file is
    another one, if "vit" or "size" is not valid, or if the file is too small for the model that they describe."""
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            if "chal_proj.c_fc.weight" in f.keys():
                raise ValueError("it is the authors' released file; convert it: "
                                 f"python -m tools.convert released {path} OUT.safetensors")
            config = json.loads(f.metadata()["config"])
        c = ViTConfig(**config["vit"])
        size = config.get("size", c.size)
        if type(size) is not int or not 0 < size <= 65536 or size % c.patch:
            raise ValueError(f"size is {size!r:.50}, expected a multiple of the patch {c.patch}")
        numbers = c.width * (c.depth * (4 * c.width + 2 * c.mlp_width) + 3 * c.patch ** 2 + (c.size // c.patch) ** 2)
        if 2 * numbers > os.path.getsize(path):  # a weight takes 2 bytes or more; checked before they are allocated
            raise ValueError(f"its config asks for {numbers:,} weights, but it has {os.path.getsize(path):,} bytes")
        return config
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged, or is no model file of this project: such a file's metadata have config = "
                        f"{{\"vit\": ...}} ({type(e).__name__}: {one_line(e)})") from None


def write_model(path, config, tensors):
    """Write {name: tensor} as a safetensors file, atomically, with `config` as JSON in the metadata entry "config"."""
    tensors = {k: x.contiguous() for k, x in tensors.items()}
    data = safetensors.torch.save(tensors, {"format": "pt", "config": json.dumps(config)})
    write_atomically(path, lambda f: f.write(data))


def write_atomically(path, write):
    """Call write(binary file) on a temporary file beside `path`; rename it to `path` when it is safely on disk.

    The temporary name is unique: if two processes write one path, the file that stays is whole.
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
    """x as text for an error message: one line, at most 300 characters."""
    return " ".join(str(x).split())[:300]


def open_weights(path):
    """The set of a file's tensor names, and a function that reads a tensor by its name. The file is .safetensors, or a
    .pth or .bin file that holds nothing but tensors; code in it is never run."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file")
    try:
        f = safe_open(path, "pt")
        names, read = set(f.keys()), f.get_tensor
    except SafetensorError as e:
        if path.endswith(".safetensors"):
            raise UserError(f"{path} is damaged, or no safetensors file ({one_line(e)}): delete it, and fetch it "
                            "again") from None
        refuse_pickle(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the pickle's version
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)  # training dumps wrap them
            tensors = {k.removeprefix("module."): x for k, x in tensors.items()
                       if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.device.type == "cpu"}
        except Exception as e:  # torch.load raises many types; all mean that this is no plain file of tensors
            raise UserError(f"{path} is not a file of tensors ({type(e).__name__}); it was not executed") from None
        names, read = set(tensors), tensors.__getitem__

    def get(name):
        try:
            return read(name)
        except (SafetensorError, AttributeError) as e:  # a type that this version of torch lacks
            raise UserError(f"{path}: {one_line(name)} cannot be read ({one_line(e)})") from None
    return names, get


def refuse_pickle(path, torch_version=torch.__version__):
    """Raise UserError where reading a pickle is not safe, even with torch.load(weights_only=True): torch before 2.6 can
    be made to run its code (CVE-2025-32434), torch before 2.10 to damage memory (CVE-2026-24747)."""
    if tuple(int(n) for n in torch_version.split(".")[:2]) < (2, 10):
        raise UserError(f"{path} is a pickle, which torch {torch_version} does not read safely: use torch 2.10 or "
                        "newer, or save the file as .safetensors with such a torch")


def names_in(layout, key):
    """The names under which a file of that layout keeps our ViT's parameter `key`: one, or three to be stacked."""
    theirs, parts = dict(zip(PARAMETERS, LAYOUTS[layout])), key.split(".")  # blocks.3.qkv.weight, or pos_embed
    block = f"{theirs['blocks']}.{parts[1]}." if parts[0] == "blocks" else ""
    part, *kind = parts[2:] if block else parts  # kind: weight, bias, or nothing
    name = block + ".".join([theirs[part], *kind]).replace("_.", "_")  # open_clip: attn.in_proj_weight, no dot
    braces = re.search(r"\{(.*)\}", name)
    return [name.replace(braces[0], x) for x in braces[1].split(",")] if braces else [name]


def load_vit(vit, path):
    """Copy the tensors of a file of any known layout into `vit`. UserError, and nothing is copied, if a tensor is
    missing, does not fit, or is neither the ViT's nor one of KNOWN_EXTRAS."""
    present, get = open_weights(path)
    signs = "blocks.0.proj.weight", "blocks.0.norm1.weight", "pos_embed"  # a file that has these is of that layout
    found = [(prefix, layout) for prefix in PREFIXES for layout in LAYOUTS
             if {prefix + name for key in signs for name in names_in(layout, key)} <= present]
    if not found:
        raise UserError(f"{path} is of no known layout ({', '.join(LAYOUTS)}); it holds "
                        f"{one_line(', '.join(sorted(present)[:3]))} ...")
    prefix, layout = found[0]
    own, state = {}, {}  # the ViT's and the file's tensors, both by the names in the file
    for key, x in vit.named_parameters():
        names = names_in(layout, key)
        own.update(zip([prefix + name for name in names], x.detach().chunk(len(names))))  # views of the parameter
    for name in present:
        if name in own:
            x, shape = get(name), own[name].shape
            lacks_ones = x.numel() == own[name].numel() and x.shape == shape[-x.ndim:]  # (D) for (1, 1, D)
            state[name] = x.reshape(shape) if lacks_ones else x
        elif not KNOWN_EXTRAS.match(name):
            state[name] = None  # load_exactly refuses the name
    load_exactly(own, state, path)


@torch.no_grad()
def load_exactly(own, state, path):
    """Copy `state`, the tensors of the file `path`, into `own`, those of a module; both are {name: tensor}. UserError,
    and nothing is copied, if a name is in one of them alone, a shape or type is wrong, or a number is not finite."""
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"unknown {k}" for k in state.keys() - own.keys()]
    for k in own.keys() & state.keys():
        x = state[k]
        usable = x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if x.shape != own[k].shape:
            wrong.append(f"{k} is {tuple(x.shape)}, expected {tuple(own[k].shape)}")
        elif not usable or not x.float().isfinite().all() or (k == "latent_std" and x.float().min() <= 0):
            wrong.append(f"{k} is {x.dtype}; expected finite floating-point numbers, deviations above 0")
    if wrong:
        few = one_line("; ".join(sorted(wrong)[:3]))
        raise UserError(f"{path} does not fit the model ({len(wrong)} tensors): {few}")
    for k, x in own.items():
        x.copy_(state[k])


def teacher_config(name_or_path):
    """The ViTConfig of a key of TEACHERS, or of a self-describing safetensors file. UserError for anything else."""
    if name_or_path in TEACHERS:
        return TEACHERS[name_or_path]
    if not os.path.isfile(str(name_or_path)):  # None where a model file names no teacher
        raise UserError(f"teacher {name_or_path!r} is neither a file nor one of: {' '.join(TEACHERS)}")
    return ViTConfig(**read_config(name_or_path)["vit"])


def load_teacher(name_or_path, weights=None, offline=False):
    """A frozen foundation model in eval mode, on the CPU, in fp32.

    name_or_path: a key of TEACHERS, or a self-describing safetensors file: a ViT's state dict with the metadata entry
    "config" = JSON {"vit": {fields of ViTConfig}}. weights: a file in any of LAYOUTS; "random" for a seeded
    initialisation, which prints a line; or None for the published file, which is downloaded if it is not here yet,
    except if `offline`. Raises UserError or OSError, which say what to do.
    """
    config = teacher_config(name_or_path)
    if name_or_path not in TEACHERS:
        if weights is not None:
            raise UserError(f"teacher {name_or_path} is a file and brings its weights: leave out teacher_weights "
                            f"{weights}")
        weights = name_or_path
    elif weights is None and name_or_path in PUBLISHED:
        weights = fetch(name_or_path, offline)
    elif weights is None:
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")
        weights = os.path.join(folder, f"teacher-{name_or_path}.safetensors")
        if not os.path.isfile(weights):
            raise MissingFile(f"{weights}: no such file; train it (python -m experiments.tiny_imagenet.teacher), or "
                              "give --teacher_weights FILE|random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = ViT(config)
    if weights != "random":
        load_vit(vit, weights)
    elif os.environ.get("RANK", "0") == "0":  # once, under torchrun
        print(f"teacher {name_or_path}: a seeded RANDOM initialisation, no pretrained weights, so it teaches no "
              "semantics")
    return vit.eval().requires_grad_(False)


def fetch(name_or_url, offline=False):
    """The path of a file on this machine: a path stays as it is; a name in PUBLISHED or a URL is downloaded once.

    Hugging Face's cache is searched first, then torch.hub's, which also receives downloads. If a file's name holds a
    SHA-256, torch.hub checks the download by it; a .safetensors that is cut off is refused when it is read. offline: do
    not download. The environment's HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are obeyed. Raises
    MissingFile, which tells the URL and where to put the file by hand.
    """
    given = os.fspath(name_or_url)
    if os.path.isfile(given):
        return given
    url, name = given, os.path.basename(urllib.parse.urlsplit(given).path)
    sha = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$", name)  # torch.hub's names end in its first digits
    if given in PUBLISHED:
        org, repo, file = PUBLISHED[given].split("/")
        name = f"{org}--{repo}--{file}"
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        url = f"{endpoint}/{org}/{repo}/resolve/main/{file}"
        home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
        cache = glob.escape(os.path.expanduser(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))))
        cached = glob.glob(os.path.join(cache, f"models--{org}--{repo}", "snapshots", "*", file))
        if cached:
            return max(cached, key=os.path.getmtime)
    elif not url.startswith(("http://", "https://")):
        raise MissingFile(f"{url}: no such file, no URL, and none of the names {' '.join(PUBLISHED)}")
    elif not sha:  # different URLs may end in one name, such as model.safetensors
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}--{name}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    by_hand = f"; or put the file at {path} by hand: curl -L -o {path} {url}"
    if os.path.isfile(path):
        return path
    if offline or os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false", "no"):
        hint = "" if offline else " and HF_HUB_OFFLINE is set: unset it"
        raise MissingFile(f"{url} is not on this machine{hint}{by_hand}")
    try:
        with locked(path):  # one process downloads, the others wait
            if not os.path.isfile(path):
                torch.hub.download_url_to_file(url, path, sha and sha[1])
    except (OSError, RuntimeError, http.client.HTTPException) as e:  # RuntimeError: torch.hub's, of a wrong hash
        raise MissingFile(f"{url} could not be fetched ({one_line(e) or type(e).__name__}): run it again; "
                          f"HF_ENDPOINT sets a mirror, TORCH_HOME the folder{by_hand}") from None
    return path


@contextlib.contextmanager
def locked(path):
    """Hold the lock of `path`, once no other process holds it; a process that dies lets go. Makes the folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as lock:
        if os.name == "posix":
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    enc = Encoder(load_teacher("tiny", "random"), latent_dim=16).eval()
    img = torch.rand(2, 3, 64, 96)
    z, hidden = enc(img)
    print("image   ", tuple(img.shape), "in [0, 1]")
    print("hidden  ", len(hidden), "x", tuple(hidden[0].shape))
    print("latent  ", tuple(enc.encode(img).shape), "normalised")
    print("features", tuple(enc.features(img).shape))
    print("parameters", f"{sum(p.numel() for p in enc.parameters()):,}")
