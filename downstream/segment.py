"""Semantic segmentation: train UperNet or a linear layer on a tokenizer's encoder, test it, use it (Table 4d).

    T="torchrun --nproc_per_node=8 -m downstream.segment"; ADE="--data ADEChallengeData2016"
    $T train $ADE --short 512 --weights W --out ade                     # the tokenizer's encoder, fine-tuned
    $T train $ADE --short 512 --teacher internvit --out ade-teacher     # the control: the encoder that it came from
    $T train $ADE --short 512 --weights W --frozen --head linear --out ade-linear
    $T test $ADE --run ade                                              # mIoU, aAcc, mAcc by sliding windows
    python -m downstream.segment predict --run ade photo.jpg            # an overlay with a legend, and the raw mask
    python -m downstream.segment bench                                  # speed at the paper's size, random weights

A data set is a folder or archive with <split>/images and <split>/masks, or ADE20K's own: see pairs.py. A classes.json
at its top, a list, names the classes from label 0 on; without it give --classes. The network is in upernet.py, the
training loop in finetune.py. A run's files are those of train.py; RUN/samples/ has truth | prediction. Without --lr it
is 2e-5, with --frozen 1e-3; without --warmup the first hundredth of the steps, at most 1,500.
"""
import argparse
import colorsys
import json
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import to_tensor
from downstream import finetune
from downstream.bench import measure_speed
from downstream.pairs import Pairs, list_some, read_beside
from downstream.upernet import IGNORED, Segmenter, resize, slide
from encoder import TEACHERS, Encoder, UserError, ViT, write_atomically
from tools.batches import split_batch
from tools.job import Job
from tools.pictures import free_path, read_pictures
from tools.run import command_line
from tools.script import default_workers, make_folder, number, rank_and_device

NO_CLASS = "unlabelled", "unlabeled", "void", "ignore", "ignored"  # names of pixels that do not count, in any case
# BEiT-L's and MAE-L's on ADE20K; the paper says UperNet, 100 epochs (126,000 steps) of 16, and no more
RECIPE = dict(steps=160_000, batch_size=16, lr=None, weight_decay=0.05, layer_decay=0.95, drop_path=0.2, warmup=None,
              lr_decay=1.0, eval_every=16_000, save_every=2000, out="segmenter")


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | test | predict | bench")
    on_gpu, count = torch.cuda.is_available(), number(int, 1)
    train = commands.add_parser("train", help="train a segmenter; the same command again resumes")
    test = commands.add_parser("test", help="mIoU, aAcc and mAcc of a run")
    predict = commands.add_parser("predict", help="overlays and masks of pictures")
    bench = commands.add_parser("bench", help="speed of training and prediction, with random weights")
    for part in train, test:
        part.add_argument("--data", nargs="+", required=True, metavar="PATH", help="folders or .zip archives")
    for part in train, bench:
        part.add_argument("--head", choices=["upernet", "linear"], default="upernet", help="[%(default)s]")
        part.add_argument("--width", type=count, default=512, help="of UperNet's maps [%(default)s]")
        part.add_argument("--crop", type=number(int, 2), default=512,
                          help="side in training, of a window later [%(default)s]")
    add = train.add_argument
    add("--split", default="train", help="to train on [%(default)s]")
    add("--val_split", default="val", help="for --eval_every and the end [%(default)s]")
    add("--classes", type=number(int, 1, 254), help="how many, if there is no classes.json")
    add("--ignore", type=int, nargs="*", default=[255], metavar="LABEL",
        help="numbers in masks that are no class [255]")
    add("--reduce_zero_label", action="store_true", help="0 is no class, classes count from 1 [with ADE20K]")
    add("--short", type=number(int, 0), default=0, metavar="PIXELS", help="pictures are first resized to this "
        "shorter side, the longer at most 4 times that; 0: not [0; ADE20K's protocol is 512]")
    finetune.add_flags(train, **RECIPE)
    for part in test, predict:
        add = part.add_argument
        add("--run", required=True, metavar="FOLDER", help="of training, or the file model.safetensors in it")
        add("--stride", type=count, metavar="PIXELS", help="from window to window [2/3 of the run's --crop]")
        add("--short", type=number(int, 0), metavar="PIXELS", help="as in training [the run's]")
        add("--batch_size", type=count, default=8, help="windows at a time [%(default)s]")
        add("--bf16", action="store_true", default=on_gpu, help="[with a GPU]")
        add("--fp32", dest="bf16", action="store_false", help="without TF32 [without a GPU]")
    test.add_argument("--split", default="val", help="[%(default)s]")
    test.add_argument("--workers", type=number(int, 0), default=default_workers(4), help="load pictures [%(default)s]")
    test.add_argument("--out", metavar="FILE", help="also write the report as JSON")
    predict.add_argument("files", nargs="+", metavar="FILES", help="pictures, or folders of them")
    predict.add_argument("--out", metavar="FOLDER", default="predictions", help="[%(default)s]")
    bench.add_argument("--teacher", choices=TEACHERS, default="internvit", help="whose shape [%(default)s]")
    bench.add_argument("--batch_size", type=number(int, 2), default=16, help="[%(default)s]")
    return ap.parse_args(argv)


def build(config, backbone=None):
    """The Segmenter of a run's configuration; without a backbone with random weights."""
    backbone = backbone or finetune.build_backbone(config)
    return Segmenter(backbone, len(config["names"]), config["head"], config["width"])


class Masks(Pairs):
    """Images and class numbers of a split. labels: a dict of describe_labels. In training [n] is the n-th sample:
    uint8 (3, crop, crop), and uint8 (crop, crop) class numbers, IGNORED where a pixel does not count."""

    def __init__(self, roots, split, labels, crop=None, short=0, train=False, seed=0):
        super().__init__(roots, split, "masks", train, seed)
        self.crop, self.short, self.classes, self.ignore = crop, short, labels["labels"], labels["ignore"]

    def load(self, i):
        """Pair i: uint8 (3, H, W), and uint8 (H, W) class numbers."""
        img, numbers = self.read(i)
        classes = np.full(numbers.shape, IGNORED, np.uint8)
        for value in np.unique(numbers).tolist():
            if value in self.classes:
                classes[numbers == value] = self.classes.index(value)
            elif value not in self.ignore:
                raise UserError(f"{self.path(i, True)} has the label {value}; expected {self.classes[0]} to "
                                f"{self.classes[-1]}, or {list_some(list(map(str, self.ignore)))} for none")
        return img, classes

    def __getitem__(self, n):
        img, classes = self.load(self.index(n))
        return augment(img, classes, self.crop, self.short, np.random.default_rng([self.seed, n, 1]))


def augment(img, classes, size, short, rng):
    """A random crop of size x size for training, of uint8 img (3, H, W) and classes (H, W). Before, the picture becomes
    0.5 to 2 times as large as `short` says; no class fills more than 3/4 of the crop, if one of ten draws avoids it;
    half are mirrored; colours are distorted. Where the picture ends, the crop is grey and IGNORED."""
    H, W = classes.shape
    scale = rng.uniform(0.5, 2) * factor(H, W, short)
    h, w = max(1, round(H * scale)), max(1, round(W * scale))
    classes = np.array(Image.fromarray(classes).resize((w, h), Image.Resampling.NEAREST))
    for _ in range(10):
        top, left = (int(rng.integers(max(0, side - size) + 1)) for side in (h, w))
        part = classes[top:top + size, left:left + size]
        counts = np.bincount(part[part != IGNORED])
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    picture = Image.fromarray(img.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.BILINEAR)
    picture = distort(np.array(picture)[top:top + size, left:left + size], rng)
    if rng.random() < 0.5:
        picture, part = picture[:, ::-1], part[:, ::-1]
    h, w = part.shape
    out, labels = np.full((size, size, 3), (124, 116, 104), np.uint8), np.full((size, size), IGNORED, np.uint8)
    out[:h, :w], labels[:h, :w] = picture, part  # (124, 116, 104): ImageNet's mean
    return torch.from_numpy(out).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)


def distort(picture, rng):
    """uint8 (H, W, 3) -> the same with other brightness, contrast, saturation and hue, each in half of the calls."""
    draw = lambda low, high, none: rng.uniform(low, high) if rng.random() < 0.5 else none
    brightness, contrast, saturation, hue = draw(-32, 32, 0), draw(0.5, 1.5, 1), draw(0.5, 1.5, 1), draw(-0.1, 0.1, 0)
    picture = ((picture + brightness) * contrast).clip(0, 255).astype(np.uint8)
    h, s, v = Image.fromarray(picture).convert("HSV").split()
    h, s = h.point(lambda x: (x + 256 * hue) % 256), s.point(lambda x: min(255, x * saturation))
    return np.array(Image.merge("HSV", (h, s, v)).convert("RGB"))


def describe_labels(args):
    """What the masks' numbers mean: {names, labels (the number in a mask of each class), ignore}."""
    root, names = args.data[0], [str(k) for k in range(args.classes or 0)]
    ade, listed = read_beside(root, "objectInfo150.txt"), read_beside(root, "classes.json")
    if not names and ade:
        names = [line.split("\t")[-1].split(",")[0].strip() for line in ade.decode().splitlines()[1:]]
    elif not names and listed:
        try:
            names = list(map(str, json.loads(listed) + []))  # + []: a dict or a text is none
        except (ValueError, TypeError):
            raise UserError(f'classes.json of {root} is no list of names, such as ["sky", "road"]') from None
    first = int(args.reduce_zero_label or ade is not None)  # ADE20K's masks: 0 is none, classes are 1 to 150
    ignore = set(args.ignore) | ({0} if first else set())
    ignore |= {k for k, name in enumerate(names, first) if name.lower() in NO_CLASS}
    labels = [k for k in range(first, first + len(names)) if k not in ignore]
    if not 0 < len(labels) <= IGNORED:
        raise UserError(f"{root}: {len(labels)} classes, by its classes.json or --classes, less --ignore; expected 1 "
                        f"to {IGNORED}: give a classes.json, a list of names, or --classes")
    return {"names": [names[k - first] for k in labels], "labels": labels, "ignore": sorted(ignore)}


def factor(H, W, short):
    """How many times larger a picture becomes by --short."""
    return min(short / min(H, W), 4 * short / max(H, W)) if short else 1.0


def predict_classes(model, img, args):
    """uint8 img (3, H, W) -> int64 class numbers (H, W), on its device. args: crop, stride, short, batch_size."""
    H, W = img.shape[1:]
    img = img.to(model.backbone.latent_mean.device)[None] / 255
    if args.short:
        size = [max(1, round(side * factor(H, W, args.short))) for side in (H, W)]
        img = F.interpolate(img, size, mode="bilinear", antialias=True)
    logits = slide(model.logits, img[0], args.crop, args.stride, args.batch_size)
    best, classes = img.new_full((H, W), -torch.inf), torch.zeros(H, W, dtype=torch.long, device=img.device)
    for k, x in enumerate(logits):  # one at a time, as all 150 of a photo of 12 megapixels would take 7 GB
        x = resize(x[None, None], (H, W))[0, 0]
        classes.masked_fill_(x > best, k)
        best = torch.maximum(best, x)
    return classes


def gather(x):
    """Every rank's x, on every rank."""
    parts = [x]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, x)
    return parts


def count_pixels(model, data, args, every=1):
    """How many pixels of a Masks data set are of class i and predicted as j, over all ranks: (classes, classes). every:
    3 looks at each third picture alone."""
    rank, ranks, _ = rank_and_device()
    C = len(data.classes)
    counts = torch.zeros(C * C, dtype=torch.long)
    for img, classes in data.every(data.load, range(every * rank, len(data), every * ranks), args.workers, gather):
        truth, predicted = torch.as_tensor(classes).long(), predict_classes(model, img, args).cpu()
        known = truth != IGNORED
        counts += torch.bincount(C * truth[known] + predicted[known], minlength=C * C)
    return sum(gather(counts)).view(C, C)


def figures(counts):
    """mIoU, aAcc and mAcc in %, and the IoU of each class, of the pixel counts of a whole data set. A class that is
    neither in the masks nor predicted has no IoU, and does not count in the mean."""
    if not counts.sum():
        raise UserError("the masks have no pixel of any class, so there are no figures")
    hits, true, predicted = (x.double() for x in (counts.diagonal(), counts.sum(1), counts.sum(0)))
    iou = 100 * hits / (true + predicted - hits)
    return {"miou": iou.nanmean().item(), "aacc": (100 * hits.sum() / true.sum()).item(),
            "macc": (100 * hits / true).nanmean().item(), "iou": iou.tolist()}


def colour(k):
    """The RGB colour of class k: hues a golden section apart, in three shades."""
    rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.9, 0.55)[k // 3 % 2], (1, 0.75)[k % 2])
    return tuple(round(255 * x) for x in rgb)


def overlay(img, classes, names):
    """uint8 img (3, H, W) and class numbers (H, W) -> a PIL image: the classes' colours over the picture, and below a
    legend of those that are there, the largest first."""
    picture, classes = img.permute(1, 2, 0).numpy(), np.asarray(classes)
    colours = np.array([colour(k) for k in range(len(names))] + [(0, 0, 0)] * (256 - len(names)), np.float32)
    mixed = Image.fromarray((0.45 * picture + 0.55 * colours[classes]).astype(np.uint8))
    found = sorted(((classes == k).mean(), k) for k in np.unique(classes) if k < len(names))[::-1]
    columns, font = max(1, mixed.width // 150), ImageFont.load_default(12)
    canvas = Image.new("RGB", (max(mixed.width, 150), mixed.height + 18 * -(-len(found) // columns) + 4), "white")
    canvas.paste(mixed)
    draw = ImageDraw.Draw(canvas)
    for n, (share, k) in enumerate(found):
        x, y = n % columns * 150 + 4, mixed.height + n // columns * 18 + 4
        draw.rectangle((x, y, x + 12, y + 12), fill=colour(k))
        draw.text((x + 18, y - 1), f"{names[k]:.14} {100 * share:.0f}%", fill="black", font=font)
    return canvas


def train(args, on_signal=None):
    labels, (rank, ranks, device) = describe_labels(args), rank_and_device()
    together, _ = split_batch(args.batch_size, args.micro_batch or args.batch_size, ranks)
    together *= ranks if device.type == "cuda" else 1  # see finetune.py
    if args.head == "upernet" and together == 1:
        raise UserError("UperNet's batch normalisation needs two pictures at a time, and here it gets one: give a "
                        "larger --micro_batch or --batch_size")
    data = Masks(args.data, args.split, labels, args.crop, args.short, train=True, seed=args.seed)
    val = Masks(args.data, args.val_split, labels)
    if rank == 0:
        ignored = " ".join(map(str, labels["ignore"]))
        print(f"data: {len(data):,} pairs to train on, {len(val):,} to evaluate, {len(labels['names'])} classes; "
              f"labels {ignored} do not count; each pair is read before the first step", flush=True)
        there = {k for _, classes in data.every(data.load, workers=args.workers) for k in np.unique(classes).tolist()}
        if absent := [name for k, name in enumerate(labels["names"]) if k not in there]:
            print(f"warning: no mask has a pixel of {list_some(absent)}; is a label of --ignore a class?", flush=True)
    steps = args.steps or args.epochs * len(data) // args.batch_size
    finetune.follow_length(args, warmup=min(1500, steps // 100))
    args.lr = args.lr if args.lr is not None else 1e-3 if args.frozen else 2e-5
    config = {**labels, "head": args.head, "width": args.width, "crop": args.crop, "short": args.short}
    model = build(config, finetune.load_backbone(args))
    args.stride = args.crop * 2 // 3

    def evaluate():
        found = figures(count_pixels(model, val, args))
        return {k: found[k] for k in ("miou", "aacc", "macc")}

    def picture():
        img, classes = val.load(0)
        truth, found = (overlay(img, x, labels["names"]) for x in (classes, predict_classes(model, img, args).cpu()))
        canvas = Image.new("RGB", (2 * truth.width, max(truth.height, found.height)), "white")
        canvas.paste(truth), canvas.paste(found, (truth.width, 0))
        return canvas
    finetune.train(args, model, data, evaluate, config, on_signal=on_signal, picture=picture)


def load(args, device):
    """(model in eval mode, its run's configuration) for test and predict; args gets what is the run's."""
    model, config = finetune.load_model(args.run, build, device)
    args.crop, args.short = config["crop"], config["short"] if args.short is None else args.short
    args.stride = args.stride or args.crop * 2 // 3
    if args.stride > args.crop:
        raise UserError(f"--stride {args.stride} leaves pixels that no window sees: windows are {args.crop} px wide, "
                        "the --crop of training")
    return model, config


def test(args):
    """Print mIoU, aAcc and mAcc of a split, and the IoU of each class. -> the report"""
    job = Job(args, *args.data)
    model, config = load(args, job.device)
    data = Masks(args.data, args.split, config)
    with job.autocast:
        found = figures(count_pixels(model, data, args))
    size = f"resized to a shorter side of {args.short}" if args.short else "at its own size"
    protocol = (f"each picture {size}; windows of {args.crop} every {args.stride} px, logits averaged and resized to "
                f"the mask; intersections and unions summed over all {len(data):,} pictures of {args.split}; labels "
                f"{' '.join(map(str, config['ignore']))} do not count; {job.precision}")
    table = [f"{name:24.24} {iou:6.2f}" for name, iou in zip(config["names"], found["iou"])]
    table += ["", f"mIoU {found['miou']:.2f}   aAcc {found['aacc']:.2f}   mAcc {found['macc']:.2f}"]
    return job.finish({"run": args.run, "step": config["step"], "data": args.data, "images": len(data), **found,
                       "names": config["names"], "protocol": protocol}, table)


def predict(args):
    """For each picture NAME_overlay.png, and NAME_mask.png with the numbers that the training masks use."""
    job, taken = Job(args), set()
    model, config = load(args, job.device)
    numbers = np.array(config["labels"])
    for img, path, _ in read_pictures(args.files):
        img = to_tensor(img)
        with torch.no_grad(), job.autocast:
            classes = predict_classes(model, img, args).cpu().numpy()
        make_folder(args.out)
        stem = free_path(args.out, os.path.splitext(os.path.basename(path))[0], "_overlay.png", taken)
        mask = Image.fromarray(numbers[classes].astype(np.uint8 if numbers.max() < 256 else np.uint16))
        for ending, picture in ("_overlay.png", overlay(img, classes, config["names"])), ("_mask.png", mask):
            write_atomically(stem + ending, lambda f: picture.save(f, "PNG"))
        print(f"{stem}_overlay.png, {stem}_mask.png")


def bench(args):
    """Print what training and prediction reach on this machine at the paper's size."""
    with rank_and_device()[2]:
        model = Segmenter(Encoder(ViT(TEACHERS[args.teacher])), 150, args.head, args.width)
        img = torch.randint(256, (args.batch_size, 3, args.crop, args.crop), dtype=torch.uint8)
        labels = torch.randint(150, (args.batch_size, args.crop, args.crop), dtype=torch.uint8)
    measure_speed(f"{args.teacher} with {args.head}", model, (img, labels), lambda: model.logits(img / 255),
                  {"160,000 steps of 16": 2_560_000, "100 epochs of ADE20K, the paper's": 2_021_000})


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    other = {"test": test, "predict": predict, "bench": bench}
    return other[args.command](args) if args.command in other else train(args, on_signal)


if __name__ == "__main__":
    command_line(main, "downstream.segment")
