"""Monocular depth: a DPT head on the tokenizer's encoder, trained for relative or for metric depth (Table 4c).

    python -m downstream.depth convert nyu_depth_v2_labeled.mat splits.mat --out nyu     # NYUv2's own files -> folders
    python -m downstream.depth train --target relative --data redweb diml.zip --unit disparity 0.001 --weights W --out mix
    python -m downstream.depth train --data nyu --weights W --init mix --out depth       # metres; resumes likewise
    python -m downstream.depth test --run depth --data nyu --split test --crop eigen     # NYUv2's protocol
    python -m downstream.depth predict --run depth photo.jpg                             # a picture, and the values
    python -m downstream.depth bench                                                     # speed at the paper's size

A data set is a folder or archive of <split>/images and <split>/depth: 16-bit PNGs of one channel, 0 = no measurement.

The model and its losses are in dpt.py. NYUv2 by the field's protocol: 654 pictures of 640x480, the prediction enlarged to
them and clamped to [0.001, 10] m, errors in the Eigen crop (rows 45 to 470, columns 41 to 600) where the truth is in
(0.001, 10) m, of each picture, then averaged; no median scaling; the last epoch's weights. A relative model's
disparity is aligned to each picture's truth by least squares first, and its report says so.

MIX-5 (ReDWeb, DIML, Movies, MegaDepth, WSVD) is not to be had whole: of Movies and WSVD only lists of films and videos
are public. ReDWeb, DIML and MegaDepth are; take these, or your own, as folders.
"""
import argparse
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data import cores, load_image, to_tensor
from downstream import finetune
from downstream.pairs import Pairs
from encoder import TEACHERS, Encoder, UserError, ViT, write_atomically
from tools.job import Job
from tools.run import command_line, number

EIGEN = slice(45, 471), slice(41, 601)  # rows and columns of NYUv2's 480 x 640 that are measured
LEAST = 1e-3  # metres: nearer is no measurement
COLOURS = np.array([(252, 255, 164), (249, 142, 9), (188, 55, 84), (87, 16, 110), (0, 0, 4)])  # inferno, near to far
FIGURES = "rmse absrel log10 delta1 delta2 delta3 silog".split()


# ---- data ----

class DepthPairs(Pairs):
    """The pairs of a split: [n] -> (uint8 image (3, S, S), depth in metres (S, S), 0 where there is none), cropped.

    unit: metres of one count of the PNGs; or "disparity" if they hold an inverse depth, whose unit nobody knows.
    """

    def __init__(self, root, split, unit=0.001, size=None, train=False, seed=0):
        super().__init__(root, split, "depth", train, seed)
        self.unit, self.size = unit, size

    def measured(self, i):
        """Pair i at its own size: uint8 (3, H, W), and depth (H, W) in float32."""
        img, counts = self.read(i)
        counts = torch.from_numpy(counts.astype(np.float32))
        return img, torch.where(counts > 0, 1 / counts, 0) if self.unit == "disparity" else counts * self.unit

    def __getitem__(self, n):
        img, depth = self.measured(self.index(n))
        return crop(img, depth, self.size, np.random.default_rng([self.seed, n, 1]))


def crop(img, depth, size, rng):
    """A random square of image and depth, after the shorter side is resized to `size`; half of them are mirrored."""
    H, W = (max(size, round(side * size / min(depth.shape))) for side in depth.shape)
    top, left = rng.integers(H - size + 1), rng.integers(W - size + 1)
    img = F.interpolate(img[None], (H, W), mode="bicubic", antialias=True)[0]
    depth = F.interpolate(depth[None, None], (H, W), mode="nearest-exact")[0, 0]  # no mean of near and far, or of 0
    img, depth = (x[..., top:top + size, left:left + size] for x in (img, depth))
    if rng.random() < 0.5:
        img, depth = img.flip(-1), depth.flip(-1)
    return img.contiguous(), depth.contiguous()


class Mixed(Dataset):
    """Several data sets, evenly: sample n is of set n mod K, so that every batch has as many of each."""

    def __init__(self, sets):
        self.sets = sets

    def __len__(self):
        return sum(map(len, self.sets))

    def __getitem__(self, n):
        return self.sets[n % len(self.sets)][n // len(self.sets)]

    def index(self, n):
        return n

    def path(self, n):
        """Where the image of SAMPLE n lies."""
        data = self.sets[n % len(self.sets)]
        return data.path(data.index(n // len(self.sets)))


def doubt_unit(data, max_depth):
    """A warning if the depths of a few pictures are in no range that max_depth lets expect; or None."""
    some = [data.measured(i)[1] for i in sorted({k * (len(data) - 1) // 7 for k in range(8)})]
    depths = torch.cat([depth[depth > 0] for depth in some]).numpy()
    if not len(depths):
        return f"warning: the depth pictures of {data.files.roots[0]} that were looked at have no measurement (all is 0)"
    low, middle, high = np.percentile(depths, (1, 50, 99))
    if LEAST < max_depth / 20 < high and middle < max_depth:
        return None
    return (f"warning: {data.files.roots[0]} has depths from {low:.4g} to {high:.4g} m (1% to 99%, median {middle:.4g}) "
            f"by --unit {data.unit:g}, but --max_depth is {max_depth:g} m: is it another unit?")


def convert(args):
    """NYUv2's labelled set, as published -> folders of its official split: train (795) and test (654), millimetres."""
    import h5py
    from scipy.io import loadmat

    splits = loadmat(args.splits)
    with h5py.File(args.mat, "r") as f:
        for split in "train", "test":
            for kind in "images", "depth":
                os.makedirs(os.path.join(args.out, split, kind), exist_ok=True)
            numbers = splits[split + "Ndxs"].flatten()  # from 1
            for n in tqdm(numbers, desc=split):
                img = np.transpose(f["images"][n - 1])  # MATLAB's order, read as C: (3, W, H) -> (H, W, 3)
                depth = np.transpose(f[args.field][n - 1])  # metres
                millimetres = (1000 * depth).round().clip(0, 65535).astype(np.uint16)
                for kind, x in ("images", img), ("depth", millimetres):
                    path = os.path.join(args.out, split, kind, f"{n:04d}.png")
                    write_atomically(path, lambda f: Image.fromarray(x).save(f, "PNG"))
    print(f"{args.out}: {len(splits['trainNdxs'])} pairs in train, {len(splits['testNdxs'])} in test")


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
    gather = lambda x: job.gather(x)
    for i, (img, truth) in zip(numbers, data.every(data.measured, numbers, job.args.workers, gather)):
        if crop and truth.shape != (480, 640):
            raise UserError(f"{data.path(i)} is {truth.shape[1]}x{truth.shape[0]}; the Eigen crop is of NYUv2's 640x480")
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
    canvas = Image.new("RGB", (W + 3 * bar + round(max(map(font.getlength, labels))), H), "white")
    canvas.paste(Image.fromarray(colour(x, near, far)))
    scale = np.repeat(np.linspace(near, far, H - height)[:, None], bar, 1)
    canvas.paste(Image.fromarray(colour(scale, near, far)), (W + bar, height // 2))
    for k, label in enumerate(labels):
        y = height // 2 + k * (H - height - 1) // 4
        ImageDraw.Draw(canvas).text((W + 2 * bar + bar // 2, y), label, fill="black", font=font, anchor="lm")
    return canvas


def look(job, model, data, size, path):
    """Write a picture of four pairs: image, truth (grey where there is none) and estimate, on the scale of the truth."""
    rows = []
    for i in sorted({k * (len(data) - 1) // 3 for k in range(4)}):
        img, truth = data.measured(i)
        with job.autocast:
            x = estimate(model, img, size)
        x, valid = (y[0].numpy() for y in in_metres(x[None], truth[None], model.target, model.max_depth))
        near, far = limits(truth.numpy()[valid] if valid.any() else x, "metric")
        shown = np.where(valid[..., None], colour(truth.numpy(), near, far), 128).astype(np.uint8)
        rows.append(np.concatenate([img.permute(1, 2, 0).numpy(), shown, colour(x, near, far)], 1))
    canvas = Image.new("RGB", (max(row.shape[1] for row in rows), sum(len(row) for row in rows)), "white")
    for k, row in enumerate(rows):
        canvas.paste(Image.fromarray(row), (0, sum(len(other) for other in rows[:k])))
    write_atomically(path, lambda f: canvas.save(f, "PNG"))


# ---- the command line ----

def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | test | predict | bench | convert")
    on_gpu, count = torch.cuda.is_available(), number(int, 1)

    part = commands.add_parser("train", help="train a head, and with it the encoder unless --frozen")
    add = part.add_argument
    add("--data", nargs="+", required=True, metavar="PATH", help="data sets; of several every batch has as many of each")
    add("--unit", nargs="+", type=unit, default=[0.001], help="metres of one count of the PNGs, or disparity; one for "
        "all data sets or one for each [%(default)s]")
    add("--val", nargs="+", metavar="PATH", help="a data set to measure on, in metres by the first --unit [--data]")
    add("--val_split", default="val", metavar="NAME", help="its split, or none [%(default)s]")
    add("--target", choices=["metric", "relative"], default="metric", help="[%(default)s]")
    add("--max_depth", type=number(float, 0.01), default=10.0, metavar="METRES", help="[%(default)s]")
    add("--size", type=count, default=448, help="pixels of the square crops, and of the shorter side [%(default)s]")
    add("--head", choices=HEADS, default="dpt", help="[%(default)s]")
    add("--head_width", type=number(int, 2), help="channels of its fused maps [a quarter of the ViT's, at most 256]")
    add("--init", metavar="RUN", help="start from encoder and head of this run, whose target may be another")
    finetune.add_flags(part, epochs=20, batch_size=32, lr=1e-4, out="depth")

    part = commands.add_parser("test", help="errors on a data set, each of one picture, then averaged")
    add = part.add_argument
    add("--run", required=True, metavar="FOLDER", help="of training, or its model.safetensors")
    add("--data", nargs="+", required=True, metavar="PATH", help="a data set")
    add("--split", default="val", help="[%(default)s]")
    add("--unit", type=number(float, 0), default=0.001, help="metres of one count of the PNGs [%(default)s]")
    add("--crop", choices=["none", "eigen"], default="none", help="the part that is measured [%(default)s]")
    add("--out", metavar="FILE", help="also write the report as JSON")
    add_precision(part, on_gpu)

    part = commands.add_parser("predict", help="depth of photos: a picture NAME_depth.png, and the values beside it")
    add = part.add_argument
    add("files", nargs="+", metavar="FILE")
    add("--run", required=True, metavar="FOLDER")
    add("--raw", choices=["npy", "png"], default="npy", help="values: float32, or 16 bits in millimetres [%(default)s]")
    add("--out", metavar="FOLDER", help="[beside the photo]")
    add_precision(part, on_gpu)

    part = commands.add_parser("bench", help="speed of training and of estimates, with random weights")
    add = part.add_argument
    add("--teacher", choices=TEACHERS, default="internvit", help="[%(default)s]")
    add("--size", type=count, default=448, help="pixels [%(default)s]")
    add("--batch_size", type=count, default=32, help="[%(default)s]")
    add_precision(part, on_gpu)

    part = commands.add_parser("convert", help="NYUv2's labelled set as published -> folders; needs h5py and scipy")
    add = part.add_argument
    add("mat", help="nyu_depth_v2_labeled.mat")
    add("splits", help="splits.mat")
    add("--field", choices=["rawDepths", "depths"], default="rawDepths", help="what the camera measured, or with its "
        "holes filled in [%(default)s]")
    add("--out", required=True, metavar="FOLDER")
    args = ap.parse_args(argv)
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


def build(config):
    """The DepthModel of a run's configuration, with random weights."""
    backbone = Encoder(ViT(ViTConfig(**config["vit"])), config["latent_dim"], config["projector"])
    return DepthModel(backbone, **{k: config[k] for k in ("head", "head_width", "target", "max_depth")})


def train(args, on_signal=None):
    backbone = finetune.load_backbone(args)
    config = {"vit": asdict(backbone.vit.config), "latent_dim": backbone.latent_dim, "projector": backbone.projector,
              **{k: getattr(args, k) for k in ("head", "head_width", "target", "max_depth", "size")}}
    torch.manual_seed(args.seed)
    model = DepthModel(backbone, **{k: config[k] for k in ("head", "head_width", "target", "max_depth")})
    if args.init:
        start = finetune.load_model(args.init, build, "cpu")
        ...
    units = args.unit * (1 if len(args.unit) > 1 else len(args.data))
    sets = [DepthPairs(root, "train", u, args.size, True, args.seed + k) for k, (root, u) in enumerate(zip(args.data, units))]


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    commands = {"test": test, "predict": predict, "bench": bench, "convert": convert}
    return commands[args.command](args) if args.command in commands else train(args, on_signal)


if __name__ == "__main__":
    command_line(main, "downstream.depth")
