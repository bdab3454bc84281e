"""The settings of the study: which flags of train.py each of them stands for.

    asked = parse_settings(args)                              # {"tiny:fast@1/4": [], "tiny:base": [(5e-4, 0)]}
    plan = stages(args, "tiny:fast@1/4", 1e-3, 0, seconds_of)  # of a rate and a seed: a Stage for each training
"""
from fractions import Fraction
from typing import NamedTuple

from encoder import UserError

# what a lever changes one of, and how often to look
RUN = "--recipe paper --log_every 50 --save_every 1000000 --beta1 0.9 --beta2 0.95 --endpoint 0.9 --lr_decay 0.5"
BASES = {  # name -> (flags, images of a row, batch, rates)
    "tiny": ("--teacher tiny --size 64", 384_000, 256, (5e-4, 1e-3, 2e-3)),
    "small": ("--teacher small --size 64", 512_000, 256, (5e-4, 1e-3, 2e-3)),
    "photos": ("--teacher tiny --size 256 --crop_scale 0.5 1", 48_000, 32, (5e-4, 1e-3, 2e-3)),
}
PAPER = "--beta1 0.5 --beta2 0.95 --endpoint 0 --lr_decay 0"
LEVERS = {  # name -> flags of train.py after the base's; batch=x: times its batch, at equal images
    "paper": PAPER,                                          # AdamW, times and constant rate of Tables 6-9
    "paper-decay": "--beta1 0.5 --endpoint 0",               # small's and tiny's recipe before this study
    "base": "",
    "m0.5": "--beta1 0.5", "m0.95": "--beta1 0.95", "v0.99": "--beta2 0.99", "v0.999": "--beta2 0.999",
    "m0.5-v0.99": "--beta1 0.5 --beta2 0.99", "m0.5-v0.999": "--beta1 0.5 --beta2 0.999",
    "m0.95-v0.99": "--beta1 0.95 --beta2 0.99", "m0.95-v0.999": "--beta1 0.95 --beta2 0.999",
    "e0": "--endpoint 0", "e0.5": "--endpoint 0.5", "e1": "--endpoint 1",
    "batch/2": "batch=0.5", "batch/4": "batch=0.25", "batch*2": "batch=2",
    "constant": "--lr_decay 0", "linear": "--lr_decay 1", "cosine": "--lr_decay 1 --decay_shape cosine",
    "cosine-half": "--decay_shape cosine", "warmup": "--warmup 100",
    "ema-constant": "--lr_decay 0 --ema 0.998", "ema": "--ema 0.99",
    "1:0": "--lambda_f 0",                                   # Table 5b: distillation alone, which trains no decoder
    "grow": "grow",  # 64, 128, 256 px in a row, in the GPU time of the full size
    "fast": "batch=0.5 --warmup 100", "growfast": "grow --warmup 50",
    "fast-crop": "batch=0.5 --warmup 100 --crop_scale 1 1",  # at the size of the files, no crop: nothing is resized
    "growfast-crop": "grow --warmup 50 --crop_scale 0.8 1",
}
ONE_RATE = "1:0",  # the distance is zero from the start: there is nothing to tune
GROW = (64, 256, 0.2), (128, 64, 0.3), (256, 32, 0.5)  # size, batch, share of the GPU time


class Stage(NamedTuple):
    """One training of a row, and the flags of train.py that make it. Only "grow" has several, one after the other."""
    size: int
    batch: int
    steps: int
    flags: list


def parse_settings(args):
    """The settings of the command line in the order of their turns: {setting: its rows, a list of (rate, seed), if it
    names some; an empty list asks for the search of the best rate}."""
    asked = {}
    for given in args.settings:
        base, _, lever = given.partition(":")
        lever, _, row = lever.partition("=")
        every = [name for name in LEVERS if base == "photos" or "grow" not in name]
        for name in every if lever == "all" else [lever]:
            rows = asked.setdefault(f"{base}:{name}", [])
            try:
                name, _, length = name.partition("@")
                if base not in BASES or name not in args.levers or Fraction(length or 1) <= 0:
                    raise ValueError
                if row:
                    rate, seed = row.split(",")
                    rows.append((float(rate), int(seed)))
            except (ValueError, ZeroDivisionError):
                raise UserError(f"no such setting: {given}; give BASE:LEVER, BASE:LEVER@1/4 or BASE:LEVER=RATE,SEED; "
                                f"bases: {' '.join(BASES)}; levers: {' '.join(args.levers)}") from None
    return asked


def teacher_flags(args, base):
    return ["--teacher_weights", args.small_teacher] if base == "small" else []


def stages(args, setting, rate, seed, seconds_of):
    """The trainings of a row, a list of Stage. seconds_of: {"teacher/size/batch": seconds of a step}."""
    base, lever = setting.split(":", 1)
    flags, images, batch, _ = BASES[base]
    lever, _, length = lever.partition("@")  # base@1/4: a quarter of the images
    images *= args.scale * float(Fraction(length or 1))
    words = args.levers[lever].split()
    factors = [float(word.removeprefix("batch=")) for word in words if word.startswith("batch=")]
    batch *= factors[-1] if factors else 1
    words = [word for word in words if word != "grow" and not word.startswith("batch=")]
    steps = max(1, round(images / batch))
    if lever.startswith("grow"):
        total = steps * seconds_of["tiny/256/32"]
        parts = [(size, n, max(1, round(share * total / seconds_of[f"tiny/{size}/{n}"]))) for size, n, share in GROW]
    else:
        parts = [(256 if base == "photos" else 64, round(batch), steps)]
    data, val = args.data, args.val
    if base == "photos":
        data, val = [*args.photos, *args.data], args.photos_val
    common = ["--data", *data, "--val", *val, "--workers", args.workers, *RUN.split(), *flags.split(),
              *teacher_flags(args, base), *words, "--lr", f"{rate:g}", "--seed", seed]
    found = []
    for size, n, steps in parts:
        own = ["--batch_size", n, "--micro_batch", n, "--steps", steps, "--eval_every", max(1, steps // 8)]
        if len(parts) > 1:
            own += ["--size", size]
            own += ["--lr_decay", 0] if size < 256 else []  # the rate falls in the last stage
        found.append(Stage(size, n, steps, [*map(str, [*common, *own]), *args.more.split()]))
    return found
