"""Tokenizers in other projects' formats: the authors' released file, and models of Hugging Face's transformers.

    python -m tools.convert released AUTHORS.safetensors OURS.safetensors   # the authors' file -> one of ours
    python -m tools.convert ours OURS.safetensors AUTHORS.safetensors       # the way back, for the authors' code
    python -m tools.convert hf out/model.safetensors folder                 # the encoder's ViT, for transformers

Where a script takes a tokenizer by name or path, the authors' file needs no command: it is converted at its first use
(find_weights in tools/script.py). `hf` writes what LLaVA's or InternVL's code reads as a vision tower.
"""
import argparse
import json
import os
import re
import sys
from dataclasses import asdict

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from decoder import Decoder, DecoderConfig
from encoder import (PIXEL_STATS, TEACHERS, Encoder, UserError, ViT, locked, names_in, one_line,
                     open_weights, resize_grid, write_atomically)
from eval import sha256

# ---- the authors' released file ----

VIT, DECODER, SIZE = TEACHERS["internvit"], DecoderConfig(), 448  # the released model; its file does not say it
RELEASED_NAMES = {  # ours: theirs; # stands for the number of a block. The ViT's names are in encoder.LAYOUTS.
    "encoder.latent_down.0": "chal_proj.c_fc",
    "encoder.latent_down.2": "chal_proj.c_proj",
    "decoder.latent_up.0": "chal_unproj.c_fc",
    "decoder.latent_up.2": "chal_unproj.c_proj",
    "decoder.pos_embed": "global_block_pos_embed",
    "decoder.blocks.#.norm1": "global_blocks.#.norm1",
    "decoder.blocks.#.qkv": "global_blocks.#.attn.qkv",
    "decoder.blocks.#.proj": "global_blocks.#.attn.proj",
    "decoder.blocks.#.norm2": "global_blocks.#.norm2",
    "decoder.blocks.#.fc1": "global_blocks.#.mlp.fc1",
    "decoder.blocks.#.fc2": "global_blocks.#.mlp.fc2",
    "decoder.head_pos_embed": "decoder_pos_embed",
    "decoder.head.input_proj": "flow_head.net.input_proj",
    "decoder.head.time_fc1": "flow_head.net.time_embed.mlp.0",
    "decoder.head.time_fc2": "flow_head.net.time_embed.mlp.2",
    "decoder.head.cond_proj": "flow_head.net.cond_embed",
    "decoder.head.blocks.#.norm": "flow_head.net.res_blocks.#.in_ln",
    "decoder.head.blocks.#.fc1": "flow_head.net.res_blocks.#.mlp.0",
    "decoder.head.blocks.#.fc2": "flow_head.net.res_blocks.#.mlp.2",
    "decoder.head.blocks.#.modulation": "flow_head.net.res_blocks.#.adaLN_modulation.1",
    "decoder.head.final_modulation": "flow_head.net.final_layer.adaLN_modulation.1",
    "decoder.head.output": "flow_head.net.final_layer.linear",
}


def released_name(name):
    """The authors' name of our tensor `name`, for instance decoder.blocks.3.qkv.weight."""
    if name.startswith("encoder.vit."):
        return names_in("InternViT, UniFlow", name.removeprefix("encoder.vit."))[0]
    number = re.search(r"blocks\.(\d+)", name)
    part = name.replace(number[0], "blocks.#") if number else name
    ending = ""
    if part not in RELEASED_NAMES:
        part, ending = re.fullmatch(r"(.*)(\.weight|\.bias)", part).groups()
    return RELEASED_NAMES[part].replace("#", number[1] if number else "") + ending


def parameters():
    """[(our name, the authors' name, shape)] of all parameters of the released model."""
    with torch.device("meta"):
        parts = {"encoder": Encoder(ViT(VIT), DECODER.latent_dim), "decoder": Decoder(DECODER)}
    return [(f"{part}.{key}", released_name(f"{part}.{key}"), x.shape)
            for part, module in parts.items() for key, x in module.named_parameters()]


def read_renamed(path, table):
    """The file's tensors under new names, {new name: tensor}, and the file's names that are not in the table. table:
    [(name in the file, new name, shape)]. UserError if a name of the table is missing or has another shape."""
    present, get = open_weights(path)
    tensors, wrong = {}, []
    for name, new, shape in table:
        if name not in present:
            wrong.append(f"missing {name}")
        elif (x := get(name)).shape != shape:
            wrong.append(f"{name} is {tuple(x.shape)}, expected {tuple(shape)}")
        else:
            tensors[new] = x
    if wrong:
        raise UserError(f"{path} lacks tensors of that model ({len(wrong)}): {one_line('; '.join(wrong[:4]))}")
    return tensors, sorted(present - {name for name, *_ in table})


def is_released(path):
    """Whether a file is in the authors' layout. False also for what is no safetensors file: who reads it says so."""
    try:
        with safe_open(path, "pt") as f:
            return "chal_proj.c_fc.weight" in f.keys()
    except (SafetensorError, OSError):
        return False


def from_released(path, out):
    """Write the authors' released file `path` as a file of ours, the same numbers in the same type."""
    tensors, others = read_renamed(path, [(theirs, ours, shape) for ours, theirs, shape in parameters()])
    if others:
        print(f"{path}: ignored {len(others)} tensors that the tokenizer does not use: {one_line(' '.join(others))}",
              file=sys.stderr)
    C = DECODER.latent_dim
    tensors |= {"latent_mean": torch.zeros(C), "latent_std": torch.ones(C)}
    config = {"vit": asdict(VIT), "decoder": asdict(DECODER), "size": SIZE, "teacher": "internvit",
              "released": sha256(path)}
    # One entry of metadata alone: safetensors writes several in any order, but the SHA-256 must not vary.
    data = safetensors.torch.save(tensors, {"config": json.dumps(config)})
    write_atomically(out, lambda f: f.write(data))


def to_released(path, out):
    """Write a file of ours in the authors' layout. UserError if it holds a model that their code cannot build."""
    enc, dec = Encoder.from_pretrained(path), Decoder.from_pretrained(path)
    have = {**asdict(enc.vit.config), **asdict(dec.config), "trained at size": enc.size}
    wanted = {**asdict(VIT), **asdict(DECODER), "trained at size": SIZE}
    differ = [f"{k} {have[k]!r} instead of {wanted[k]!r}" for k in wanted if have[k] != wanted[k]]
    if differ:
        raise UserError(f"the authors' code cannot build the model of {path}, which has {', '.join(differ)}")
    if enc.latent_mean.any() or (enc.latent_std != 1).any():
        print(f"{path}: its latent statistics are left out: the authors' layout has no place for them", file=sys.stderr)
    data = safetensors.torch.save(read_renamed(path, parameters())[0], {"format": "pt"})
    write_atomically(out, lambda f: f.write(data))


def convert_once(path):
    """Convert the authors' file `path` if that was not done before; the path of our file, beside torch.hub's downloads.
    Its name holds the size and the time of the authors' file, so that it is found again."""
    folder, about = os.path.join(torch.hub.get_dir(), "checkpoints"), os.stat(path)
    out = os.path.join(folder, f"uniflow-converted-from-{about.st_size}-{about.st_mtime_ns}.safetensors")
    if not os.path.isfile(out):
        with locked(out):  # one process converts, the others wait
            if not os.path.isfile(out):
                print(f"{path} is the authors' file: converting it, once, to {out}", file=sys.stderr)
                from_released(path, out)
    return out


# ---- transformers ----

HF_FAMILIES = {  # a ViT's structure: transformers' model_type and class for it, and the layout of its files
    "pre_norm final_norm cls": ("clip_vision_model", "CLIPVisionModel", "SigLIP, CLIP of transformers"),
    "patch_bias final_norm": ("siglip_vision_model", "SiglipVisionModel", "SigLIP, CLIP of transformers"),
    "patch_bias layer_scale cls": ("internvl_vision", "InternVLVisionModel", "InternVL of transformers"),
    "patch_bias final_norm layer_scale cls": ("dinov2", "Dinov2Model", "DINOv2 of transformers"),
    "patch_bias final_norm layer_scale cls registers":
        ("dinov2_with_registers", "Dinov2WithRegistersModel", "DINOv2 of transformers"),
    "patch_bias final_norm cls": ("vit", "ViTModel", "ViT of transformers"),
}


def save_hf(enc, folder):
    """Write an Encoder's ViT as the Hugging Face model of its family: config.json, model.safetensors in fp32 and
    preprocessor_config.json, for images of the size that it was trained at. UserError if no family has its structure.
    """
    c = enc.vit.config
    parts = {"pre_norm": c.pre_norm, "patch_bias": c.patch_bias, "final_norm": c.final_norm,
             "layer_scale": c.layer_scale, "cls": c.num_prefix, "registers": c.num_prefix > 1}
    structure = " ".join(name for name, present in parts.items() if present)
    if structure not in HF_FAMILIES:
        raise UserError(f"transformers has no vision model with {structure}; only the structures of InternViT, DINOv2 "
                        "(with or without registers), SigLIP2, CLIP and the plain ViT can be saved")
    family, model, layout = HF_FAMILIES[structure]
    content = {"config.json": hf_config(c, family, model, enc.size),
               "preprocessor_config.json": hf_preprocessor(c, family, enc.size)}
    data = safetensors.torch.save(hf_tensors(enc.vit, layout, enc.size), {"format": "pt"})
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} is no folder to write to ({e})") from None
    write_atomically(os.path.join(folder, "model.safetensors"), lambda f: f.write(data))
    for name, entries in content.items():
        write_atomically(os.path.join(folder, name), lambda f: f.write(json.dumps(entries, indent=2).encode()))


def hf_config(c, family, model, size):
    """config.json: the ViTConfig c in transformers' words."""
    extra = {}  # entries of one family alone
    if family == "siglip_vision_model":
        extra = {"vision_use_head": False}
    elif family == "internvl_vision":
        extra = {"attention_bias": True, "image_size": [size] * 2, "patch_size": [c.patch] * 2}
    elif family.startswith("dinov2"):
        if c.mlp_width % c.width:
            raise UserError(f"mlp_width {c.mlp_width} is no multiple of width {c.width}, but transformers' DINOv2 "
                            "stores their ratio as an integer: this ViT cannot be saved for it")
        extra = {"mlp_ratio": c.mlp_width // c.width, "use_mask_token": False}
        extra |= {"num_register_tokens": c.num_prefix - 1} if c.num_prefix > 1 else {}
    activation = c.activation.replace("gelu_tanh", "gelu_pytorch_tanh")
    return dict(model_type=family, architectures=[model], dtype="float32", hidden_size=c.width,
                num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.mlp_width,
                layer_norm_eps=c.eps, image_size=size, patch_size=c.patch, hidden_act=activation) | extra


def hf_preprocessor(c, family, size):
    """preprocessor_config.json: how a picture becomes the ViT's input."""
    square = {"height": size, "width": size}
    entries = dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": size}, crop_size=square,
                   resample=3)  # the shorter side resized, bicubic, then the centre
    if family == "siglip_vision_model":  # resized to a square, bilinear
        entries = dict(image_processor_type="SiglipImageProcessor", size=square, resample=2)
    mean, std = PIXEL_STATS[c.pixel_stats]
    return entries | dict(image_mean=mean, image_std=std)


def hf_tensors(vit, layout, size):
    """The ViT's parameters under a layout's names, in fp32, with positions for images of that size."""
    c, tensors = vit.config, {}
    siglip_or_clip = layout == "SigLIP, CLIP of transformers"
    prefix = "vision_model." if siglip_or_clip else ""
    for key, x in vit.named_parameters():
        x = x.detach().float()
        if key == "pos_embed":
            cls, side = min(c.num_prefix, 1), size // c.patch
            x = torch.cat([x[:, :cls], resize_grid(x[:, cls:], side, side)], dim=1)
        if siglip_or_clip and key in ("cls_token", "pos_embed"):
            x = x.squeeze((0, 1) if key == "cls_token" else 0)  # (D) and (N, D), without leading ones
        names = names_in(layout, key)
        tensors.update({prefix + name: part.clone() for name, part in zip(names, x.chunk(len(names)))})
    if c.num_prefix > 1:  # transformers' DINOv2 with registers always has a mask token, used in training alone
        tensors["embeddings.mask_token"] = torch.zeros(1, c.width)
    return tensors


def check_output(to, weights, out):
    """Raise UserError if OUT would overwrite the file that is converted, or cannot be written."""
    path = os.path.join(out, "model.safetensors") if to == "hf" else out
    if os.path.exists(weights) and os.path.realpath(path) == os.path.realpath(weights):
        raise UserError(f"{path} is the file to convert, and would be overwritten: give another OUT")
    folder = os.path.dirname(path) or "."
    if to != "hf" and (os.path.isdir(path) or not os.access(folder, os.W_OK)):  # save_hf makes its folder
        raise UserError(f"{path} cannot be written: it is a folder, or {folder} is no folder to write to")


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("to", choices=("released", "ours", "hf"),
                    help="released: the authors' file to ours; ours: the way back; hf: to a folder for transformers")
    ap.add_argument("weights", metavar="WEIGHTS", help="the file to convert")
    ap.add_argument("out", metavar="OUT", help="the file to write; for hf, a folder")
    args = ap.parse_args(argv)
    check_output(args.to, args.weights, args.out)
    if args.to == "hf":
        save_hf(Encoder.from_pretrained(args.weights), args.out)
    else:
        {"released": from_released, "ours": to_released}[args.to](args.weights, args.out)
    print(args.out)


if __name__ == "__main__":
    from tools.run import command_line
    command_line(main, "tools.convert")
