"""Do a tokenizer's features serve dense tasks as well as its teacher's? CamVid and two indoor sequences, one GPU.

    T="train.py --teacher tiny --recipe fast --size 64 --steps 6000 --data tiny-imagenet-100-train-*.zip"
    python $T --out out/distilled && python $T --lambda_d 0 --out out/pixels
    python -m experiments.dense.study all --camvid camvid_seg.zip --indoor indoor_depth.zip \
        --images tiny-imagenet-100-train-*.zip --val tiny-imagenet-100-val.zip \
        --distilled out/distilled/model.safetensors --pixels out/pixels/model.safetensors
    python -m experiments.dense.study seg:student:linear@0 seg:teacher:linear@0 --camvid camvid_seg.zip
    python -m experiments.dense.study quick:student quick:teacher --camvid camvid_seg.zip --thin 8 4     # on a CPU

Rows are TASK:CODE:HEAD@SEED; a part alone, like seg or seg:student, stands for all rows that begin with it.
  CODE   student, the shipped tokenizer's encoder; teacher, what it was distilled from; random, that network untrained;
         distilled and pixels, two tokenizers of the same short training, with distillation and with --lambda_d 0
  HEAD   linear, a linear layer on the frozen encoder; frozen, UperNet or DPT on it; finetuned, both trained together
  TASK   seg, CamVid: trained on train, mIoU of test; depth, indoor_depth: trained on train, errors on val;
         harder, trained on the office's pictures, errors on the kitchen's; probe, MAE's linear probe on --images, its
         accuracy on --val (HEAD is mae; beside it stands `python eval.py --probe --fit IMAGES --data VAL`)
quick:CODE is no training: a softmax regression on the last layer's tokens of the pictures as they are (L-BFGS, on 1,000
pixels of each --thin TRAIN-th picture), the mIoU of each --thin TEST-th picture of test.

Each row is a run of downstream.segment, depth or linear_probe and then its `test`, by the commands in results.jsonl
beside this file. Rows that stand there are not run again. Needs nothing from the network.
"""
import argparse
import json
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from downstream import segment
from downstream.upernet import IGNORED, Segmenter
from encoder import Encoder, load_teacher
from tools.run import command_line, finite
from tools.script import SHIPPED, commit, run_module

RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "results.jsonl")
CODES = {"student": ["--weights", SHIPPED], "teacher": ["--teacher", "tiny"],
         "random": ["--teacher", "tiny", "--teacher_weights", "random"], "distilled": None, "pixels": None}
LOOP = "--eval_every 0 --save_every 100000"
# by task and head: the flags of training, then those of test
SEG = "--crop 352 --batch_size 16 --width 256 --lr_decay 1"
DEPTH = "--size 224 --batch_size 16 --lr_decay 1"
FLAGS = {
    "seg": ("downstream.segment", "--split test --stride 176", {
        "linear": f"{SEG} --frozen --head linear --lr 1e-3 --steps 1000",
        "frozen": f"{SEG} --frozen --lr 5e-4 --steps 2000",
        "finetuned": f"{SEG} --lr 2e-4 --layer_decay 0.8 --drop_path 0.1 --steps 3000"}),
    "depth": ("downstream.depth", "", {
        "linear": f"{DEPTH} --frozen --head linear --lr 1e-3 --steps 1000",
        "frozen": f"{DEPTH} --frozen --lr 5e-4 --steps 2000",
        "finetuned": f"{DEPTH} --lr 2e-4 --layer_decay 0.8 --drop_path 0.1 --steps 3000"}),
    "probe": ("downstream.linear_probe", "", {
        "mae": "--size 64 --batch_size 1024 --micro_batch 1024 --eval_every 488"})}  # ten epochs of 50,000 images
FLAGS["harder"] = FLAGS["depth"]
FIGURES = "miou aacc macc rmse absrel log10 delta1 delta2 delta3 pooled cls".split()
ROWS = [f"{task}:{code}:{head}@{seed}" for task in FLAGS for code in CODES for head in FLAGS[task][2]
        for seed in (0, 1)]
ROWS += [f"quick:{code}" for code in CODES]


def backbone_flags(args, code):
    """How train is told which encoder to take."""
    return CODES[code] or ["--weights", getattr(args, code)]


def split_by_sequence(args):
    """WORK/harder: the office's pictures of indoor_depth as `train`, the kitchen's as `val`."""
    out = os.path.join(args.work, "harder")
    with zipfile.ZipFile(args.indoor) as z:
        for name in z.namelist():
            split, _, rest = name.partition("/")
            if split in ("train", "val") and not name.endswith("/"):
                new = os.path.join(out, "train" if "office" in rest else "val", rest)
                os.makedirs(os.path.dirname(new), exist_ok=True)
                with open(new, "wb") as f:
                    f.write(z.read(name))
    return out


def run_row(args, row):
    """Train and test a row: what to write of it."""
    task, code, head = row.partition("@")[0].split(":")
    module, test, heads = FLAGS[task]
    data = {"seg": [args.camvid], "depth": [args.indoor], "harder": [os.path.join(args.work, "harder")],
            "probe": args.images}[task]
    val = ["--val", *args.val] if task == "probe" else []
    out = os.path.join(args.work, row.replace(":", "-"))
    train = [module, "train", "--data", *data, *val, *backbone_flags(args, code), *LOOP.split(), *heads[head].split(),
             "--seed", row[-1], "--workers", args.workers, "--out", out, *args.more.split()]
    start = time.time()
    run_module(args.work, *train)
    seconds, report = time.time() - start, os.path.join(out, "test.json")
    run_module(args.work, module, "test", "--run", out, "--data", *(val[1:] or data), *test.split(), "--workers",
               args.workers, "--out", report)
    with open(report) as f:
        found = json.load(f)
    return {**{k: found[k] for k in FIGURES if k in found}, "iou": found.get("iou"), "images": found["images"],
            "protocol": found["protocol"], "seconds": round(seconds), "command": " ".join(map(str, train))}


@torch.no_grad()
def quick_row(args, row, device):
    """mIoU of a linear classifier of the frozen last tokens, fitted without a training run."""
    code = row.split(":")[1]
    flags = segment.parse_args(["train", "--data", args.camvid, *backbone_flags(args, code), "--head", "linear"])
    backbone = Encoder(load_teacher(flags.teacher, flags.teacher_weights)) if flags.teacher else \
        Encoder.from_pretrained(flags.weights)
    labels, autocast = segment.describe_labels(flags), torch.autocast(device.type, torch.bfloat16)
    model = Segmenter(backbone, len(labels["names"]), "linear").to(device).eval()
    classifier, model.head.classifier = model.head.classifier, torch.nn.Identity()
    data, start = segment.Masks(args.camvid, "train", labels), time.time()
    x, y, random = [], [], torch.Generator().manual_seed(0)
    for i in range(0, len(data), args.thin[0]):
        img, classes = data.load(i)
        classes = torch.from_numpy(classes).flatten()
        with autocast:
            maps = model.outputs(img[None].to(device) / 255)[0].float()
        known = (classes != IGNORED).nonzero()[:, 0]
        pixels = known[torch.randperm(len(known), generator=random)[:1000]]
        H, W = img.shape[1:]
        places = torch.stack([(pixels % W + 0.5) / W, (pixels // W + 0.5) / H], 1) * 2 - 1  # as F.interpolate sees them
        x.append(F.grid_sample(maps, places[None, None].to(device), "bilinear", "border", False)[0, :, 0].T)
        y.append(classes[pixels].long().to(device))
    x, y = torch.cat(x), torch.cat(y)
    weight, bias = fit(x, y, len(labels["names"]))
    classifier.weight.copy_(weight[:, :, None, None]), classifier.bias.copy_(bias)
    model.head.classifier = classifier
    test = segment.Masks(args.camvid, "test", labels)
    windows = argparse.Namespace(crop=10_000, stride=10_000, short=0, batch_size=1, workers=0)
    with autocast:
        found = segment.figures(segment.count_pixels(model, test, windows, args.thin[1]))
    seen = [len(range(0, len(part), k)) for part, k in zip((data, test), args.thin)]
    return {**{k: found[k] for k in ("miou", "aacc", "macc", "iou")}, "images": seen[1],
            "protocol": f"linear on frozen tokens, fitted to {len(y):,} pixels of {seen[0]} pictures, bf16",
            "seconds": round(time.time() - start)}


def fit(x, y, classes):
    """(weight (classes, D), bias) of the softmax regression of y on x (n, D) with a small ridge, by L-BFGS."""
    mean, std = x.mean(0), x.std(0)
    x = (x - mean) / std
    weight, bias = x.new_zeros(classes, x.shape[1]).requires_grad_(), x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + 1e-4 * weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    weight = (weight / std).detach()
    return weight, bias.detach() - weight @ mean


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("rows", nargs="+", metavar="ROW", help="all, or rows, or what they begin with")
    add("--camvid", metavar="ZIP", help="for seg and quick")
    add("--indoor", metavar="ZIP", help="for depth and harder")
    add("--distilled", metavar="FILE", help="a tokenizer trained with distillation")
    add("--pixels", metavar="FILE", help="the same without, by --lambda_d 0")
    add("--images", nargs="+", metavar="PATH", help="to train probes on, at 64 px")
    add("--val", nargs="+", metavar="PATH", help="images to measure probes on")
    add("--work", default="out/dense", metavar="FOLDER", help="[%(default)s]")
    add("--results", default=RESULTS, metavar="FILE", help="[%(default)s]")
    add("--thin", type=int, nargs=2, default=[1, 1], metavar=("TRAIN", "TEST"), help="pictures of quick [%(default)s]")
    add("--workers", type=int, default=4, help="of each training [%(default)s]")
    add("--parallel", type=int, default=3, help="rows side by side on the GPU [%(default)s]")
    add("--more", default="", metavar="FLAGS", help="more flags of training")
    args = ap.parse_args(argv)
    begins = lambda row, given: given == "all" or row == given or row.startswith((given + ":", given + "@"))
    for given in args.rows:
        if not any(begins(row, given) for row in ROWS):
            ap.error(f"no row begins with {given}; there are {' '.join(ROWS)}")
    lines = [json.loads(x) for x in open(args.results)] if os.path.exists(args.results) else []
    rows = [row for row in ROWS if any(begins(row, given) for given in args.rows)]
    rows = [row for row in rows if row not in {x["row"] for x in lines}]
    tasks, codes = ({row.split(":")[k].partition("@")[0] for row in rows} for k in (0, 1))
    needed = {"camvid": tasks & {"seg", "quick"}, "indoor": tasks & {"depth", "harder"}, "images": tasks & {"probe"},
              "val": tasks & {"probe"}, "distilled": codes & {"distilled"}, "pixels": codes & {"pixels"}}
    for name, why in needed.items():
        if why and not getattr(args, name):
            ap.error(f"--{name} is missing, for the rows of {' '.join(sorted(why))}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.makedirs(args.work, exist_ok=True)
    if "harder" in tasks:
        split_by_sequence(args)

    def write(row, measured):
        line = {"row": row, **measured, "commit": commit(),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
        with open(args.results, "a") as f:
            f.write(json.dumps(finite(line), allow_nan=False) + "\n")
        print(f"{row:28s} " + "  ".join(f"{k} {line[k]:.4g}" for k in FIGURES if k in line), flush=True)
    with ThreadPoolExecutor(args.parallel) as pool:
        for row in filter(lambda row: row.startswith("quick"), rows):
            write(row, quick_row(args, row, device))
        list(pool.map(lambda row: write(row, run_row(args, row)), [row for row in rows if not row.startswith("quick")]))


if __name__ == "__main__":
    command_line(main, "experiments.dense.study")
