"""Does the student detect as well as its teacher, and what does a tokenizer without distillation lose? One small GPU.

    python -m experiments.detection.study all --data DATA --pixels out/pixels/model.safetensors
    python -m experiments.detection.study student teacher --more "--epochs 120" --results mine.jsonl ...

DATA holds fruit_det.zip and coco_mini.zip. Rows, all at one setting (TRAINING):
  student     the shipped tokenizer's encoder (ViT-Ti/8)        teacher    its teacher
  pixels      a tokenizer trained without distillation: train.py --teacher tiny --recipe fast --lambda_d 0
  random      the same ViT with random weights
  overfit     eight pictures of coco_mini.zip with their masks, learned by heart: trained and tested on the same ones
  format      the AP of what `overfit` finds on coco_mini's val part, by downstream.detect test and by pycocotools from
              the two files alone; and of the truth itself as the result, which is 100
  bench       ViT-L/14 at 1024 px, batch 4 and 8, plain attention and windows of 16: prints, and writes no results
ROW@SEED is the row with another seed. Rows that stand in results.jsonl are not run again. A line: what was measured
(percent), the flags, seconds, and the machine.
"""
import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from downstream.coco import CocoDetection
from downstream.coco_eval import FIGURES, average_precision
from tools.run import command_line
from tools.script import SHIPPED, commit, run_module

TRAINING = ("--size 384 --channels 128 --batch_size 16 --epochs 60 --lr 5e-4 --weight_decay 0.05 --layer_decay 0.8 "
            "--drop_path 0.1 --warmup 100 --lr_decay 0.5 --jitter 0.5 1.5 --eval_every 150 --save_every 100000")
OVERFIT = ("--size 512 --channels 128 --batch_size 8 --steps 600 --lr 5e-4 --weight_decay 0 --layer_decay 1 "
           "--drop_path 0 --warmup 50 --lr_decay 0.5 --jitter 1 1 --eval_every 200 --save_every 100000")
ROWS = "student teacher pixels random overfit format bench".split()
RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "results.jsonl")


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def merge(*texts):
    """The flags of several texts as a list. The last text that has a flag decides; --steps and --epochs are one."""
    found = {}
    for part in " ".join(texts).split("--")[1:]:
        name, *values = part.split()
        found["length" if name in ("steps", "epochs") else name] = ["--" + name, *values]
    return [x for flag in found.values() for x in flag]


def backbone(args, row):
    """Flags of downstream.detect train that name a row's encoder."""
    return {"student": ["--weights", SHIPPED], "teacher": ["--teacher", "tiny"], "overfit": ["--weights", SHIPPED],
            "pixels": ["--weights", args.pixels], "random": ["--teacher", "tiny", "--teacher_weights", "random"]}[row]


def train(args, row, seed, data, flags):
    """Train a row, or go on with it. Returns its figures and flags."""
    out, start = os.path.join(args.work, f"{row}-{seed}"), time.time()
    flags = merge(flags, args.more)
    run_module(args.work, "downstream.detect", "train", "--data", data, *backbone(args, row), *flags, "--seed", seed,
               "--workers", args.workers, "--out", out)
    lines = log_of(out)
    if lines[-1].get("kind") != "eval":  # a signal has ended it
        raise RuntimeError(f"{row} was interrupted at step {lines[-1]['step']}: the same command goes on from there")
    figures = {k: x for k, x in lines[-1].items() if k not in ("kind", "step")}
    curve = [[x["step"], round(x["box_AP50"], 2)] for x in lines if x.get("kind") == "eval"]
    return {**figures, "AP50_by_step": curve, "seconds": round(time.time() - start), "flags": " ".join(flags)}


def eight_pictures(args):
    """Path of a data set whose two parts are the same eight pictures of coco_mini.zip: the first with 2 to 8 objects
    and no crowd region, whose polygons are COCO's own."""
    folder = os.path.join(args.work, "eight")
    with zipfile.ZipFile(os.path.join(args.data, "coco_mini.zip")) as z:
        content = json.loads(z.read("train/instances.json"))
        of = lambda picture: [a for a in content["annotations"] if a["image_id"] == picture["id"]]
        fits = lambda picture: (picture["source"] == "mini" and 2 <= len(of(picture)) <= 8
                                and not any(a["iscrowd"] for a in of(picture)))
        chosen = [picture for picture in content["images"] if fits(picture)][:8]
        annotations = [a for picture in chosen for a in of(picture)]
        for split in "train", "val":
            os.makedirs(os.path.join(folder, split, "images"), exist_ok=True)
            for picture in chosen:
                with open(os.path.join(folder, split, "images", picture["file_name"]), "wb") as f:
                    f.write(z.read("train/images/" + picture["file_name"]))
            with open(os.path.join(folder, split, "instances.json"), "w") as f:
                json.dump({**content, "images": chosen, "annotations": annotations}, f)
    return folder


def by_files(truth, results, kind):
    """The six figures as any program that has the two files computes them. Masks are scored without their boxes."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco, rows = COCO(truth), json.load(open(results))
        assert rows, f"{results} holds no object: train longer"
        rows = [{k: x for k, x in row.items() if kind == "bbox" or k != "bbox"} for row in rows]
        scored = COCOeval(coco, coco.loadRes(rows), kind)
        scored.evaluate(), scored.accumulate(), scored.summarize()
    return [100 * x for x in scored.stats[:6]]


def check_format(args, seed):
    """The row `format`. Raises AssertionError where two figures differ."""
    data, found = os.path.join(args.data, "coco_mini.zip"), os.path.join(args.work, "found.json")
    report, truth = os.path.join(args.work, "report.json"), os.path.join(args.work, "truth.json")
    run_module(args.work, "downstream.detect", "test", "--run", os.path.join(args.work, f"overfit-{seed}"), "--data",
               data, "--results", found, "--out", report, "--workers", args.workers)
    figures = json.load(open(report))["results"]
    with zipfile.ZipFile(data) as z, open(truth, "wb") as f:
        f.write(z.read("val/instances.json"))
    for name, kind in ("box", "bbox"), ("mask", "segm"):
        assert [figures[f"{name}_{k}"] for k in FIGURES] == by_files(truth, found, kind), f"{name}: two figures differ"
    val = CocoDetection(data, "val", 512, train=False)
    perfect = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
               for a in val.content()["annotations"] if not a["iscrowd"]]
    return {**figures, "objects_found": len(json.load(open(found))), "pictures": len(val),
            "truth_as_result": average_precision(val.content(), perfect, "bbox")}


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("rows", nargs="+", metavar="ROW", help=f"all, or some of {' '.join(ROWS)}")
    add("--data", required=True, metavar="FOLDER", help="of the two archives")
    add("--work", default="out/detection", metavar="FOLDER", help="[%(default)s]")
    add("--results", default=RESULTS, metavar="FILE", help="[%(default)s]")
    add("--pixels", metavar="FILE", help="the tokenizer of the row pixels")
    add("--workers", type=int, default=8, help="of each training [%(default)s]")
    add("--more", default="", metavar="FLAGS", help="more flags of downstream.detect train")
    args = ap.parse_args(argv)
    rows = [row if "@" in row else row + "@0" for row in (ROWS if "all" in args.rows else args.rows)]
    if unknown := [row for row in rows if row.split("@")[0] not in ROWS]:
        ap.error(f"unknown rows: {' '.join(unknown)}; there are {' '.join(ROWS)}")
    if any(row.startswith("pixels") for row in rows) and not args.pixels:
        ap.error("--pixels FILE is missing, for the row pixels")
    os.makedirs(args.work, exist_ok=True)
    done = set()
    if os.path.exists(args.results):
        with open(args.results) as f:
            done = {json.loads(line)["row"] for line in f}
    for row in [row for row in rows if row not in done]:
        kind, seed = row.split("@")
        if kind == "bench":
            for window in 0, 16:
                print(f"window {window}:", flush=True)
                command = "downstream.detect", "bench", "--window", str(window)
                subprocess.run([sys.executable, "-m", *command], check=True)
            continue
        found = (check_format(args, seed) if kind == "format" else
                 train(args, kind, seed, eight_pictures(args), OVERFIT) if kind == "overfit" else
                 train(args, kind, seed, os.path.join(args.data, "fruit_det.zip"), TRAINING))
        line = {"row": row, **found, "commit": commit(), "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
        with open(args.results, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"{row:12s} " + "  ".join(f"{k} {found[k]:.2f}" for k in ("box_AP", "box_AP50", "mask_AP", "mask_AP50")
                                        if found.get(k) is not None), flush=True)


if __name__ == "__main__":
    command_line(main, "experiments.detection.study")
