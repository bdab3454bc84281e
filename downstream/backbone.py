"""What a task starts from, and the file that it leaves: the encoder of a tokenizer or of a teacher, a trained model.

    backbone = load_backbone(args)                         # an Encoder, of --weights or around a --teacher
    model, config = load_model("RUN", build, device)       # build(config) -> the module, with build_backbone(config)

RUN/model.safetensors holds all parameters and persistent buffers of a model, and as JSON its config, the backbone's,
and where that came from. Nothing else is needed to load it.
"""
import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open

from encoder import Encoder, MissingFile, UserError, ViT, ViTConfig, load_exactly, load_teacher, one_line
from tools.script import find_weights


def load_backbone(args):
    """The Encoder of --weights, or one around --teacher's ViT, whose latent is 0. args.backbone_sha256 becomes that of
    its ViT's tensors. Seeds torch by --seed, so that the head that is built next depends on nothing else."""
    if bool(args.weights) == bool(args.teacher):
        raise UserError("give --weights TOKENIZER or --teacher NAME, one of the two")
    if args.weights and args.teacher_weights:
        raise UserError(f"--teacher_weights {args.teacher_weights} is of a --teacher, and there is none")
    if args.weights:
        backbone = Encoder.from_pretrained(find_weights(args.weights))
    else:
        backbone = Encoder(load_teacher(args.teacher, args.teacher_weights), 1, "linear")
        for p in backbone.latent_down.parameters():
            torch.nn.init.zeros_(p)
    digest = hashlib.sha256()
    for _, p in sorted(backbone.vit.named_parameters()):
        digest.update(p.detach().numpy())
    args.backbone_sha256 = digest.hexdigest()
    backbone.vit.requires_grad_(not args.frozen)
    backbone.latent_down.requires_grad_(False)  # no head reads the latent
    backbone.vit.drop_path = 0.0 if args.frozen else args.drop_path
    torch.manual_seed(args.seed)
    return backbone


def build_backbone(config):
    """The Encoder of a run's config, with random weights: for the `build` of load_model."""
    return Encoder(ViT(ViTConfig(**config["vit"])), config["latent_dim"], config["projector"])


def load_model(run, build, device):
    """(build(config) with the run's tensors in eval mode, config) of a run's folder, or of the model's file."""
    path = os.path.join(run, "model.safetensors") if os.path.isdir(run) else run
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file; training writes RUN/model.safetensors")
    try:
        with safe_open(path, "pt") as f:
            config = json.loads(f.metadata()["config"])
            state = {k: f.get_tensor(k) for k in f.keys()}
        task = config["task"]
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is damaged, or no run of a downstream task ({one_line(e)})") from None
    try:
        model = build(config)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is a {task}, which this command cannot build ({type(e).__name__}: {one_line(e)})"
                        ) from None
    if type(model).__name__ != task:
        raise UserError(f"{path} is of another task: it is a {task}, and this command reads a {type(model).__name__}")
    load_tensors(model, state, path)
    return model.to(device).eval(), config


def load_tensors(model, state, path):
    """Copy `state`, {name: tensor} of the file `path`, into the model's parameters and buffers: all, or UserError."""
    own = model.state_dict()
    counters = [k for k, x in own.items() if not x.is_floating_point()]  # load_exactly takes no integers
    as_floats = lambda tensors: {**tensors, **{k: tensors[k].double() for k in counters if k in tensors}}
    load_exactly(as_floats(own), as_floats(state), path)
    for k in counters:
        own[k].copy_(state[k])
