"""train.py's command line: its flags, and the defaults, which depend on the teacher and on the recipe.

    args = parse_args(["--teacher", "internvit", "--recipe", "fast"])

`--teacher X --recipe Y --help` shows the defaults of that teacher and that recipe.
"""
import argparse
import os
import sys

import torch

from distill import STRATEGIES
from encoder import TEACHERS, teacher_config
from tools.script import check_size, default_workers, number

# What the teacher decides. The values of the foundation models are those of the paper's Tables 6-9. Tables and text
# disagree on the batch; 512 is the text's. micro_batch: how many images a GPU of 80 GB holds at once.
FOUNDATION = dict(latent_dim=64, gtb_depth=6, flow_depth=12, flow_width=1024, lr=2e-4, batch_size=512, micro_batch=32,
                  epochs=30)
OURS = dict(size=64, latent_dim=16, gtb_depth=3, flow_depth=6, micro_batch=256, steps=20_000)
SETTINGS = {
    "internvit": dict(FOUNDATION, size=448),
    "internvit-v2_5": dict(FOUNDATION, size=448),
    "dinov2": dict(FOUNDATION, size=378),
    "dinov2-reg": dict(FOUNDATION, size=378),
    "siglip2": dict(FOUNDATION, size=256, micro_batch=64, flow_width=1152),
    "siglip2-l": dict(FOUNDATION, size=256, micro_batch=64),
    "clip": dict(FOUNDATION, size=224, micro_batch=128),
    "small": dict(OURS, flow_width=512),
    "tiny": dict(OURS, flow_width=384),
}
# What the recipe decides. paper: Tables 6-9. fast: experiments/efficiency found that it needs the least GPU time with
# small and tiny. With all other teachers it is extrapolated, and takes the paper's batch and learning rate.
RECIPES = {
    "paper": dict(beta1=0.5, beta2=0.95, endpoint=0.0, lr_decay=0.0, warmup=0),
    "fast": dict(beta1=0.9, beta2=0.95, endpoint=0.9, lr_decay=0.5, warmup=100),
}
OUR_RATES = {
    ("small", "paper"): dict(lr=5e-4, batch_size=256), ("small", "fast"): dict(lr=1e-3, batch_size=128),
    ("tiny", "paper"): dict(lr=1e-3, batch_size=256), ("tiny", "fast"): dict(lr=2e-3, batch_size=128),
}
# The length of a trial, which is a run of small or tiny without --data: short enough for any machine. With tiny it
# takes less than four minutes on two cores, and ends at 24.0 dB on other drawn pictures.
TRIAL = dict(steps=300, batch_size=16)


def parse_args(argv=None):
    """The arguments of a run. What the command line leaves out has the default of the teacher or the recipe."""
    ap = argparse.ArgumentParser(add_help=False, epilog="Run the same command again to resume.")
    ap.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS,
                    help="show this, with the defaults of the --teacher and the --recipe given")
    add = ap.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="training images: folders or .zip archives [drawn pictures]")
    add("--val", nargs="+", metavar="PATH", help="images to evaluate on during training [the training images]")
    add("--size", type=number(int, 1), help="training size in pixels, a multiple of the patch [%(default)s]")
    add("--crop_scale", type=float, nargs=2, default=[0.8, 1.0], metavar=("MIN", "MAX"),
        help="random crop, fractions of the short side %(default)s")
    add("--max_bad_images", type=number(float, 0, 1), default=0.01, metavar="FRACTION",
        help="stop if more than this part of the training images cannot be read [%(default)s]")
    add("--workers", type=number(int, 0), help="data loading processes per rank "
        "[%(default)s: cores / ranks, at most 16; 1 without a GPU]")
    add = ap.add_argument_group("model").add_argument
    add("--teacher", default="tiny", help=f"{' '.join(TEACHERS)}, or a self-describing .safetensors file [%(default)s]")
    add("--teacher_weights", metavar="PATH|random",
        help="the teacher's weights in any published layout, or random [the published file, downloaded]")
    add("--init", metavar="FILE",
        help="start from this tokenizer (a file, or uniflow-internvit) instead of a copy of the teacher")
    add("--latent_dim", type=number(int, 1), help="latent channels [%(default)s]")
    add("--projector", default="mlp", choices=["mlp", "linear"], help="latent projections [%(default)s]")
    add("--gtb_depth", type=number(int, 0), help="global transformer blocks, 0 for none [%(default)s]")
    add("--flow_depth", type=number(int, 1), help="residual blocks of the flow head [%(default)s]")
    add("--flow_width", type=number(int, 1), help="width of the flow head [%(default)s]")
    add("--decoder", default="flow", choices=["flow", "pixel"],
        help="pixel regresses the pixels, Table 5c [%(default)s]")
    add = ap.add_argument_group("method").add_argument
    add("--recipe", choices=list(RECIPES),
        help="the defaults of endpoint, lr, lr_decay, warmup, beta1, beta2 and batch_size. paper: Tables 6-9. fast: as "
        "good in less GPU time (experiments/efficiency), but tried with small and tiny alone; other teachers keep the "
        "paper's batch and lr [%(default)s]")
    add("--strategy", default="adaptive", choices=STRATEGIES, help="layer weights, Table 5a [%(default)s]")
    add("--beta", type=number(float, 0), default=2.0, help="temperature of eq. 1 [%(default)s]")
    add("--lambda_d", type=number(float, 0), default=1.0, help="weight of the distillation loss [%(default)s]")
    add("--lambda_f", type=number(float, 0), default=1.0, help="weight of the flow loss [%(default)s]")
    add("--endpoint", type=number(float, 0, 1),
        help="fraction of patches trained at exactly t = 1, where one-step decoding evaluates [%(default)s]")
    add("--freeze_encoder", action="store_true", help="train only the projection and the decoder")
    add = ap.add_argument_group("optimization").add_argument
    add("--batch_size", type=number(int, 1), help="global batch [%(default)s]")
    add("--micro_batch", type=number(int, 1), help="images per rank and forward pass [%(default)s]")
    length = ap.add_argument_group("length of the run").add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(int, 1),
                        help="how many optimizer steps; without --data, small and tiny make a short trial "
                        "[%(default)s]")
    length.add_argument("--epochs", type=number(int, 1), help="or how many passes over the data [%(default)s]")
    add("--lr", type=number(float, 0), help="AdamW learning rate [%(default)s]")
    add("--lr_decay", type=number(float, 0, 1), metavar="FRACTION",
        help="the last part of the run, over which the rate falls to 0; more --steps on a resume raise it again "
        "[%(default)s]")
    add("--decay_shape", default="linear", choices=["linear", "cosine"], help="how the rate falls [%(default)s]")
    add("--warmup", type=number(int, 0), metavar="STEPS",
        help="the number of first steps, in which the rate rises linearly from 0 [%(default)s]")
    add("--beta1", type=number(float, 0, 0.999999), help="AdamW's momentum [%(default)s]")
    add("--beta2", type=number(float, 0, 0.999999), help="AdamW's decay of the squared gradients [%(default)s]")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
        help="average the weights over the steps, and evaluate and export the averages; state.pt holds both; 0: no "
        "averages [%(default)s]")
    add("--encoder_lr_scale", type=number(float, 0), default=1.0,
        help="a factor of lr for the pretrained encoder [%(default)s]")
    add("--weight_decay", type=number(float, 0), default=0.0,
        help="of linear and convolution weights; the paper is silent [%(default)s]")
    add("--clip", type=number(float, 0), default=1.0,
        help="gradient norm limit, 0 for none; the paper is silent [%(default)s]")
    add("--drop_path", type=number(float, 0, 0.9), default=0.0, help="stochastic depth of the student [%(default)s]")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0,
        help="of initialisation, sample order, crops, times and noise [%(default)s]")
    add = ap.add_argument_group("machine").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compile the blocks, and on GPUs replay each micro-batch as a CUDA graph [%(default)s: on with a GPU]")
    add("--checkpoint_activations", action="store_true",
        help="recompute blocks in the backward pass: less memory, slower")
    add = ap.add_argument_group("output").add_argument
    add("--out", default="out", metavar="FOLDER", help="where the run lives [%(default)s]")
    add("--log_every", type=number(int, 1), default=50, metavar="STEPS", help="log a line [%(default)s]")
    add("--eval_every", type=number(int, 0), default=1000, metavar="STEPS",
        help="evaluate, and draw a picture; also at the end, 0: only then [%(default)s]")
    add("--save_every", type=number(int, 0), default=1000, metavar="STEPS",
        help="save; also at the end, 0: only then [%(default)s]")
    add("--keep_every", type=number(int, 0), metavar="STEPS", help="keep a copy of the model [never]")
    add("--resume_anyway", action="store_true", help="resume although arguments differ")
    args = ap.parse_args(argv)

    config = teacher_config(args.teacher)
    values = left_open(args, config)
    if hasattr(args, "help"):
        ap.description = (f"Train a UniFlow tokenizer. The defaults in brackets are those of --teacher {args.teacher} "
                          f"--recipe {values['recipe']}.")
        ap.set_defaults(**{"steps": "-", "epochs": "-", **values})
        ap.print_help()
        sys.exit()
    if args.steps or args.epochs:  # the length is given
        values = {k: v for k, v in values.items() if k not in ("steps", "epochs")}
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        ap.error(f"--crop_scale is {args.crop_scale}; it is two fractions above 0, at most 1, the smaller first")
    if args.init and os.path.realpath(os.path.dirname(args.init) or ".") == os.path.realpath(args.out):
        ap.error(f"--init {args.init} lies in --out {args.out}, where this run writes its own: give another --out")
    check_size(args.size, config.patch, f" of teacher {args.teacher}")
    return args


def left_open(args, config):
    """Defaults of the teacher, whose ViT has this config, and of the recipe: for what the command line leaves open."""
    own = dict(FOUNDATION, size=config.size, flow_width=max(1024, config.width))  # for a teacher of the user's own
    recipe = args.recipe or ("fast" if args.teacher in ("small", "tiny") else "paper")
    values = {"recipe": recipe, **SETTINGS.get(args.teacher, own), **RECIPES[recipe],
              **OUR_RATES.get((args.teacher, recipe), {})}
    if args.teacher in ("small", "tiny") and not args.data:
        values.update(TRIAL)
    values["workers"] = default_workers(16) if torch.cuda.is_available() else 1
    return values
