"""Monocular depth: a DPT head on the tokenizer's encoder, trained for relative or for metric depth (Table 4c).

    D="python -m downstream.depth"                # or torchrun --nproc_per_node=8 -m downstream.depth
    $D convert nyu_depth_v2_labeled.mat splits.mat --out nyu                         # NYUv2's own files -> folders
    $D train --target relative --data redweb diml.zip --unit disparity 0.001 --weights W --out mix    # several sets
    $D train --data nyu --val_split test --crop eigen --weights W --init mix --out depth              # metres
    $D test --run depth --data nyu --split test --crop eigen                         # NYUv2's protocol
    $D predict --run depth photo.jpg                                                 # a picture, and the values
    $D bench                                                                         # speed at the paper's size

A data set is a folder or archive of <split>/images and <split>/depth: 16-bit PNGs of one channel, 0 = no measurement.

Network and losses are in dpt.py. NYUv2 by the field's protocol: 654 pictures of 640x480, the prediction enlarged to
them and clamped to [0.001, 10] m, errors in the Eigen crop (rows 45 to 470, columns 41 to 600) where the truth is in
(0.001, 10) m, of each picture, then averaged; no median scaling; the last step's weights. A relative model's disparity
is first aligned to each picture's truth by least squares, and its report says so.

MIX-5 (ReDWeb, DIML, Movies, MegaDepth, WSVD) is not to be had whole: of Movies and WSVD only lists of films and videos
are public. ReDWeb, DIML and MegaDepth are; take these, or your own, as folders.
"""
import argparse
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import cores, to_tensor
from downstream import finetune
from downstream.bench import measure_speed
from downstream.depth_sets import LEAST, DepthPairs, Mixed, check, convert
from downstream.dpt import HEADS, DepthModel, align
from encoder import TEACHERS, Encoder, UserError, ViT, load_exactly, write_atomically
from tools.checkpoint import has_checkpoint
from tools.job import Job
from tools.pictures import free_path, read_pictures
from tools.run import command_line
from tools.script import make_folder, number, rank_and_device

CROPS = {"none": None, "eigen": (slice(45, 471), slice(41, 601))}  # rows and columns that are measured, of 480 x 640
COLOURS = np.array([(252, 255, 164), (249, 142, 9), (188, 55, 84), (87, 16, 110), (0, 0, 4)])  # inferno, near to far
EPOCHS = {"metric": 20, "relative": 60}  # the paper's
FIGURES = "rmse absrel log10 delta1 delta2 delta3 silog".split()


# ---- errors and pictures ----

def in_metres(x, truth, target, max_depth):
    """What the model predicts of pictures as depth. A disparity is first aligned to 1 / truth by least squares, as its
    scale and shift are unknown. Returns (depth, which pixels count)."""
    valid = (truth > LEAST) & (truth < max_depth)
    if target == "relative":
        s, t = align(x, 1 / torch.where(valid, truth, 1), valid)
        x = 1 / (s * x + t).clamp_min(1 / max_depth)
    return x.clamp(LEAST, max_depth), valid


def errors(x, truth, target, max_depth, crop=None):
    """FIGURES of one picture (H, W), of which x is predicted; or None if nothing in it is measured."""
    rows, columns = crop or (slice(None), slice(None))
    truth = truth[None, rows, columns].double()
    x, valid = in_metres(x[None, rows, columns].double(), truth, target, max_depth)
    if not valid.any():
        return None
    x, truth = x[valid], truth[valid]
    d, ratio = x.log() - truth.log(), torch.maximum(x / truth, truth / x)
    return [((x - truth) ** 2).mean().sqrt().item(), ((x - truth).abs() / truth).mean().item(),
            (d.abs() / np.log(10)).mean().item(), *((ratio < 1.25 ** k).double().mean().item() for k in (1, 2, 3)),
            ((d ** 2).mean() - 0.5 * d.mean() ** 2).sqrt().item()]


@torch.no_grad()
def estimate(model, img, size):
    """What the model predicts of a uint8 image (3, H, W), which it sees with its shorter side at `size`: (H, W)."""
    H, W = img.shape[1:]
    seen = [round(side * size / min(H, W)) for side in (H, W)]
    img = F.interpolate(img[None], seen, mode="bicubic", antialias=True)
    x = model.predict(img.to(next(model.parameters()).device) / 255)
    return F.interpolate(x[None], (H, W), mode="bilinear", align_corners=False)[0, 0].cpu()


def measure(job, model, data, size, crop=None):
    """{figure: its mean over the pictures of a set, images: how many}; the same on any number of ranks."""
    rows, numbers = [], range(job.rank, len(data), job.ranks)
    pairs = data.every(data.measured, numbers, job.args.workers, job.gather)
    for (img, truth), i in zip(pairs, numbers):  # in this order: zip ends with its first, and `pairs` must be used up
        if crop and truth.shape != (480, 640):
            raise UserError(f"{data.path(i)} is {truth.shape[1]}x{truth.shape[0]}; --crop eigen is of NYUv2's 640x480")
        with job.autocast:
            x = estimate(model, img, size)
        rows.append((i, errors(x, truth, model.target, model.max_depth, crop)))
    rows = [row for _, row in sorted(sum(job.gather(rows), [])) if row]
    if not rows:
        raise UserError(f"nothing in {', '.join(data.files.roots)} is measured from {LEAST} to {model.max_depth:g} m")
    return {**dict(zip(FIGURES, np.mean(rows, 0).tolist())), "images": len(rows), "unmeasured": len(data) - len(rows)}


def colour(depth, near, far):
    """Numbers (H, W) -> uint8 (H, W, 3), bright at `near` and dark at `far`, whichever is larger."""
    place = np.clip((depth - near) / (far - near or 1), 0, 1) * (len(COLOURS) - 1)
    return np.stack([np.interp(place, range(len(COLOURS)), c) for c in COLOURS.T], -1).round().astype(np.uint8)


def limits(x, target):
    """(near, far) of what a model predicts, without the outermost percents."""
    low, high = np.percentile(x, (1, 99)).tolist()
    return (low, high) if target == "metric" else (high, low)


def draw(x, target):
    """A PIL picture of what the model predicts (H, W), with a scale at its right: metres, or numbers without a unit."""
    (H, W), (near, far) = x.shape, limits(x, target)
    font = ImageFont.load_default(max(9, H // 20))
    labels = [f"{value:.2f}" + " m" * (target == "metric") for value in np.linspace(near, far, 5)]
    height, bar = font.size, max(8, W // 30)
    tall = max(H, 5 * height + 1)  # room for five labels
    canvas = Image.new("RGB", (W + 3 * bar + round(max(map(font.getlength, labels))), tall), "white")
    canvas.paste(Image.fromarray(colour(x, near, far)))
    scale = np.repeat(np.linspace(near, far, tall - height)[:, None], bar, 1)
    canvas.paste(Image.fromarray(colour(scale, near, far)), (W + bar, height // 2))
    for k, label in enumerate(labels):
        y = height // 2 + k * (tall - height - 1) // 4
        ImageDraw.Draw(canvas).text((W + 2 * bar + bar // 2, y), label, fill="black", font=font, anchor="lm")
    return canvas


def look(model, data, size):
    """A PIL picture of four pairs: image, truth (grey where there is none) and estimate, on the scale of the truth."""
    rows = []
    for i in sorted({k * (len(data) - 1) // 3 for k in range(4)}):
        img, truth = data.measured(i)
        x, valid = in_metres(estimate(model, img, size)[None], truth[None], model.target, model.max_depth)
        x, valid, truth = x[0].numpy(), valid[0].numpy(), truth.numpy()
        near, far = limits(truth[valid] if valid.any() else x, "metric")
        shown = np.where(valid[..., None], colour(truth, near, far), 128).astype(np.uint8)
        rows.append(np.concatenate([img.permute(1, 2, 0).numpy(), shown, colour(x, near, far)], 1))
    canvas = Image.new("RGB", (max(row.shape[1] for row in rows), sum(len(row) for row in rows)), "white")
    for k, row in enumerate(rows):
        canvas.paste(Image.fromarray(row), (0, sum(len(before) for before in rows[:k])))
    return canvas


# ---- the command line ----

def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | test | predict | bench | convert")
    on_gpu, count = torch.cuda.is_available(), number(int, 1)

    part = commands.add_parser("train", help="train a head, and with it the encoder unless --frozen")
    add = part.add_argument
    add("--data", nargs="+", required=True, metavar="PATH", help="data sets; a batch has as many pairs of each")
    add("--unit", nargs="+", type=unit, default=[0.001], help="metres of one count of the PNGs, or disparity; one for "
        "all data sets or one for each [%(default)s]")
    add("--val", nargs="+", metavar="PATH", help="a data set to measure on, in the unit of the first of --data that is "
        "in metres [that one]")
    add("--val_split", default="val", metavar="NAME", help="its split [%(default)s]")
    add("--target", choices=EPOCHS, default="metric", help="metric trains for 20 epochs, relative for 60, as in the "
        "paper [%(default)s]")
    add("--max_depth", type=number(float, 0.01), default=10.0, metavar="METRES", help="[%(default)s]")
    add("--size", type=count, default=448, help="pixels of the square crops, and of the shorter side [%(default)s]")
    add("--head", choices=HEADS, default="dpt", help="[%(default)s]")
    add("--head_width", type=number(int, 2), help="channels of its fused maps [a quarter of the ViT's, at most 256]")
    add("--crop", choices=CROPS, default="none", help="the part of val that is measured [%(default)s]")
    add("--init", metavar="RUN", help="start from encoder and head of this run, whose target may be another")
    finetune.add_flags(part, epochs=None, batch_size=32, lr=1e-4, weight_decay=0.01, eval_every=5000, out="depth")

    part = commands.add_parser("test", help="errors on a data set, each of one picture, then averaged")
    add = part.add_argument
    add("--run", required=True, metavar="FOLDER", help="of training, or its model.safetensors")
    add("--data", nargs="+", required=True, metavar="PATH", help="a data set")
    add("--split", default="val", help="[%(default)s]")
    add("--unit", type=number(float, 1e-9), default=0.001, help="metres of one count of the PNGs [%(default)s]")
    add("--crop", choices=CROPS, default="none", help="the part that is measured [%(default)s]")
    add("--out", metavar="FILE", help="also write the report as JSON")
    add_precision(part, on_gpu)

    part = commands.add_parser("predict", help="depth of photos: a picture NAME_depth.png, and the values beside it")
    add = part.add_argument
    add("files", nargs="+", metavar="FILES", help="pictures, or folders of them")
    add("--run", required=True, metavar="FOLDER")
    add("--raw", choices=["npy", "png"], default="npy", help="values: float32, or 16 bits in millimetres [%(default)s]")
    add("--out", metavar="FOLDER", help="[beside a photo; of a folder NAME: NAME_depth]")
    add_precision(part, on_gpu)

    part = commands.add_parser("bench", help="speed of training and of estimates, with random weights")
    add = part.add_argument
    add("--teacher", choices=TEACHERS, default="internvit", help="[%(default)s]")
    add("--size", type=count, default=448, help="pixels [%(default)s]")
    add("--batch_size", type=count, default=32, help="[%(default)s]")

    part = commands.add_parser("convert", help="NYUv2's labelled set as published -> folders; needs h5py and scipy")
    add = part.add_argument
    add("mat", help="nyu_depth_v2_labeled.mat")
    add("splits", help="splits.mat")
    add("--field", choices=["rawDepths", "depths"], default="rawDepths", help="what the camera measured, or with its "
        "holes filled in [%(default)s]")
    add("--out", required=True, metavar="FOLDER")
    args = ap.parse_args(argv)
    if args.command == "train" and not args.steps:
        args.epochs = args.epochs or EPOCHS[args.target]
    if args.command == "train" and len(args.unit) not in (1, len(args.data)):
        ap.error(f"--unit has {len(args.unit)} values, --data {len(args.data)}: give one, or one for each")
    if args.command == "train" and args.target == "metric" and "disparity" in args.unit:
        ap.error("--unit disparity has no metres: it needs --target relative")
    return args


def unit(text):
    """A type for argparse: metres of a count, or the word disparity."""
    return text if text == "disparity" else number(float, 1e-9)(text)


def add_precision(part, on_gpu):
    part.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=on_gpu, help="[with a GPU]")
    part.add_argument("--workers", type=number(int, 0), default=max(1, min(8, cores() - 1)), help="[%(default)s]")


def build(config, backbone=None):
    """The DepthModel of a run's configuration; without a backbone with random weights."""
    fields = {k: config[k] for k in ("head", "head_width", "target", "max_depth")}
    return DepthModel(backbone or finetune.build_backbone(config), **fields)


def train(args, on_signal=None):
    units = args.unit * (len(args.data) // len(args.unit))
    sets = [DepthPairs(root, "train", u, args.size, True, args.seed + k)
            for k, (root, u) in enumerate(zip(args.data, units))]
    metric = [(root, u) for root, u in zip(args.data, units) if u != "disparity"]
    if args.val:
        metric = [(args.val, metric[0][1] if metric else 0.001)]
    val = DepthPairs(metric[0][0], args.val_split, metric[0][1]) if metric else None
    if not val and (args.crop != "none" or args.val_split != "val"):
        raise UserError("--crop and --val_split are of what is measured, and a disparity is not: give --val, metres")
    rank = rank_and_device()[0]
    for data in sets if rank == 0 else []:
        print(check(data, args.max_depth if args.target == "metric" else None, args.workers), flush=True)
    if val and rank == 0:  # its unit may be another one, and a fault should not wait for the first evaluation
        print(check(val, args.max_depth, args.workers, most=100), flush=True)
    config = {k: getattr(args, k) for k in ("head", "head_width", "target", "max_depth", "size")}
    model = build(config, finetune.load_backbone(args))
    if args.init and not has_checkpoint(args.out):
        begin_with(model, finetune.load_model(args.init, build, "cpu")[0], args.init)

    def evaluate():
        job = Job(SimpleNamespace(bf16=torch.cuda.is_available(), workers=args.workers))
        return measure(job, model, val, args.size, CROPS[args.crop])
    finetune.train(args, model, Mixed(sets), evaluate if val else None, config, on_signal=on_signal,
                   picture=(lambda: look(model, val, args.size)) if val else None)


def begin_with(model, earlier, name):
    """Copy the weights of an earlier model, except for the last layer's if that one has another target."""
    state = earlier.state_dict()
    if model.target != earlier.target:
        state.update({k: x for k, x in model.state_dict().items() if k.startswith("head.out.")})
    load_exactly(model.state_dict(), state, name)


def load(args, *read):
    """(job, model in eval mode, its configuration) of a command that reads a run, and what a Job is told of."""
    job = Job(args, *read)
    return job, *finetune.load_model(args.run, build, job.device)


def test(args):
    """Errors of a run on a data set: the report."""
    job, model, config = load(args, *args.data)
    data = DepthPairs(args.data, args.split, args.unit)
    checked = check(data, model.max_depth, args.workers, most=100) if job.rank == 0 else ""
    found = measure(job, model, data, config["size"], CROPS[args.crop])
    protocol = (f"seen with the shorter side at {config['size']} px, {job.precision}, enlarged to the truth; truth in "
                f"({LEAST}, {model.max_depth:g}) m; crop {args.crop}; of each picture, then averaged"
                + "; DISPARITY ALIGNED TO EACH PICTURE'S TRUTH" * (model.target == "relative"))
    table = ["  ".join(f"{name:>7s}" for name in FIGURES), "  ".join(f"{found[name]:7.4f}" for name in FIGURES)]
    return job.finish({"run": args.run, "step": config["step"], "data": args.data, "split": args.split, **found,
                       "protocol": protocol, "warning": checked.partition("warning: ")[2] or None}, table)


def predict(args):
    """Of each photo NAME_depth.png with a scale, and the values: NAME_depth.npy or, in mm, NAME_depth_mm.png."""
    job, model, config = load(args)
    if args.raw == "png" and model.target == "relative":
        raise UserError("--raw png is in millimetres, which a relative model does not know: use --raw npy")
    taken = set()
    for img, path, folder in read_pictures(args.files, args.out, "_depth"):
        with job.autocast:
            x = estimate(model, to_tensor(img), config["size"]).numpy()
        make_folder(folder)
        name = os.path.splitext(os.path.basename(path))[0]
        result = free_path(folder, name, "_depth_mm.png", taken)
        refuse_others(result)
        picture = draw(x, model.target)
        write_atomically(result + "_depth.png", lambda f: picture.save(f, "PNG"))
        if args.raw == "npy":
            write_atomically(result + "_depth.npy", lambda f: np.save(f, x))
        else:
            millimetres = Image.fromarray((1000 * x).round().clip(0, 65535).astype(np.uint16))
            write_atomically(result + "_depth_mm.png", lambda f: millimetres.save(f, "PNG"))
        near, far = limits(x, model.target)
        print(f"{result}_depth.png: {near:.2f} to {far:.2f}" + " m" * (model.target == "metric"))


def refuse_others(result):
    """Raise UserError if NAME_depth.png or its values are there alone: then they are not of `predict`, which writes
    both, but perhaps what a camera measured."""
    picture, *values = (result + ending for ending in ("_depth.png", "_depth.npy", "_depth_mm.png"))
    there = [path for path in (picture, *values) if os.path.exists(path)]
    if there and (picture not in there or len(there) == 1):
        raise UserError(f"{there[0]} is there already and no estimate of this command, which writes a picture and its "
                        "values: give another --out")


def bench(args):
    """Speed at the paper's size; hours for NYUv2's 20 epochs, and for 60 epochs of each million pictures."""
    B, S = args.batch_size, args.size
    with rank_and_device()[2]:
        model = DepthModel(Encoder(ViT(TEACHERS[args.teacher])))
        img, truth = torch.randint(256, (B, 3, S, S), dtype=torch.uint8), 0.1 + 9 * torch.rand(B, S, S)
    measure_speed(f"{args.teacher} with DPT", model, (img, truth), lambda: model.predict(img / 255),
                  {"20 epochs of NYUv2's 795 pairs": 20 * 795, "60 epochs of each million pairs": 60_000_000})


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    commands = {"test": test, "predict": predict, "bench": bench, "convert": convert}
    return commands[args.command](args) if args.command in commands else train(args, on_signal)


if __name__ == "__main__":
    command_line(main, "downstream.depth")
