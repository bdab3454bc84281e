"""The paper's ablations on Tiny-ImageNet-100 at 64 px: every row is one command, which trains and measures.

    T="--data TRAIN-0.zip .. TRAIN-3.zip --val VAL.zip --teacher_weights teacher-small.safetensors"
    python -m experiments.tiny_imagenet.study default $T      # one row; default@1 is the same with seed 1
    python -m experiments.tiny_imagenet.study all all@1 $T --gpus 0 0 0 0 1 1 1 1 --workers 2 --results mine.jsonl

The second command runs four rows on each of two GPUs; all@1 are the second seeds. Of several rows, those that
--results has already are left out: to run one again, name it alone, or give another file.

A row is train.py with the flags ALWAYS and its own, then eval.py on all of --val; the probe and the 20 nearest
neighbours are fitted on --data. What they print is in RUNS/ROW/output.txt. A row appends a line to results.jsonl beside
this file: flags, commit, device, seconds, figures. tables.py makes tables and plots of it.
"""
import argparse
import json
import os
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

from data import ImageDataset, cores
from decoder import Decoder, patchify
from encoder import Encoder, open_weights
from eval import image_noise
from tools.run import command_line
from tools.script import run_module

RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "results.jsonl")
ALWAYS = ("--teacher small --recipe paper --batch_size 64 --steps 10000 --lr_decay 0.5 --log_every 100 "
          "--eval_every 2500 --save_every 100000")
ROWS = {  # name -> flags of train.py
    # adaptive weights, beta 2, 1:1, three global blocks, 16 latent channels, the authors' times
    "default": "",
    # Table 5a: strategies of distillation
    "final": "--strategy final", "uniform": "--strategy uniform", "progressive": "--strategy progressive",
    # Table 5b: lambda_d : lambda_f; the weight that is not 1 is below it, since --clip would cut the gradients of 100
    "none": "--lambda_d 0", "100:1": "--lambda_f 0.01", "1:100": "--lambda_d 0.01",
    # Table 5a again, where distances are large
    "1:100-final": "--lambda_d 0.01 --strategy final", "1:100-uniform": "--lambda_d 0.01 --strategy uniform",
    "1:100-progressive": "--lambda_d 0.01 --strategy progressive",
    # Table 5c: decoders; the last one is the paper's D_pixel
    "pixel": "--decoder pixel", "gtb-0": "--gtb_depth 0", "gtb-6": "--gtb_depth 6",
    "pixel-gtb-0": "--decoder pixel --gtb_depth 0",
    # Fig. 4
    "beta-0.5": "--beta 0.5", "beta-1": "--beta 1", "beta-3": "--beta 3", "beta-5": "--beta 5",
    "latent-8": "--latent_dim 8",
    # ours: the share of patches at t = 1
    "endpoint-0.25": "--endpoint 0.25", "endpoint-0.5": "--endpoint 0.5", "endpoint-1": "--endpoint 1",
    # eq. 5's norm as a sum over the 3 x 8 x 8 elements of a patch; then the same ratio, out of --clip's way
    "sum": "--lambda_f 192", "1:192": "--lambda_d 0.0052083",
    "longer": "--steps 20000",  # has the default flattened out?
    # for the quality, not for a table of the paper; the second takes 20 minutes of an H200
    "best": "--endpoint 0.9 --batch_size 256 --steps 16000",
    "best-20": "--endpoint 0.9 --batch_size 128 --steps 80000 --eval_every 10000",
}
ROWS.update({f"{row}@{seed}": f"{flags} --seed {seed}" for row, flags in list(ROWS.items()) for seed in (1, 2)})
GROUPS = {  # what a name on the command line may stand for; the longer runs have one seed
    "all": [row for row in ROWS if "@" not in row],
    "all@1": [row for row in ROWS if row.endswith("@1") and row not in ("longer@1", "best@1", "best-20@1")],
}
IN_STEPS = "default", "endpoint-0.5", "endpoint-1", "best", "best-20"  # decoded in 2, 4 and 25 steps besides one


def folder_of(args, row):
    return os.path.join(args.runs, row.replace(":", "-"))


@torch.no_grad()
def grid_artifact(weights, val):
    """The mean squared error on the outermost pixels of all patches over that on their other pixels, of the one-step
    reconstructions of the images in `val`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    enc, dec = (part.from_pretrained(weights).to(device) for part in (Encoder, Decoder))
    p = dec.config.patch
    images = ImageDataset(val, 64, train=False)
    error, first = torch.zeros(p, p, dtype=torch.float64), 0  # first: the number of a batch's first image
    for img, _ in DataLoader(images, 500, num_workers=min(4, cores())):
        img = img.to(device) / 255
        noise = image_noise(range(first, first + len(img)), (64 // p) ** 2, 3 * p * p, 0).to(device)
        wrong = patchify(dec.decode(enc.encode(img), noise=noise) - img, p).square()
        error += wrong.view(-1, p, p).sum(0).double().cpu()
        first += len(img)
    border = torch.ones(p, p, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return (error[border].mean() / error[~border].mean()).item()


def evaluate(args, out, *flags):
    """eval.py's report of all of --val, by the tokenizer in the folder `out`."""
    report = os.path.join(out, "report.json")
    run_module(out, "eval", "--data", *args.val, "--weights", os.path.join(out, "model.safetensors"), "--inception",
               "none", "--batch_size", 250, "--bf16", "--out", report, *flags)
    with open(report) as f:
        return json.load(f)


def figures(report):
    """What a line of the results takes from eval.py's report with --probe."""
    last, latent = report["probe"]["last layer"], report["probe"]["latent"]
    pca = next((result for name, result in report["results"].items() if name.startswith("PCA")), None)
    return {**report["results"]["tokenizer"],
            "linear": last["student"]["linear"], "linear_teacher": last["teacher"]["linear"],
            "knn": last["student"]["knn"], "knn_teacher": last["teacher"]["knn"],
            "linear_latent": latent["student"]["linear"], "cosine": report["cosine_to_teacher"], "pca": pca}


def run_row(args, row):
    """Train and measure one row in its folder. Returns its line of the results, and writes it there."""
    start, out = time.time(), folder_of(args, row)
    os.makedirs(out, exist_ok=True)
    flags = f"{ALWAYS} {ROWS[row]} {args.more}".split()
    run_module(out, "train", "--data", *args.data, "--val", *args.val, "--teacher_weights", args.teacher_weights,
               "--workers", args.workers, *flags, "--out", out)
    seconds_train = time.time() - start
    pca = ["--pca"] if row == "default" else []
    report = evaluate(args, out, "--fit", *args.data, "--probe", *pca)
    artifact = grid_artifact(os.path.join(out, "model.safetensors"), args.val)
    steps = (2, 4, 25) if row in IN_STEPS else ()
    in_steps = {n: evaluate(args, out, "--steps", n)["results"]["tokenizer"]["psnr"] for n in steps}
    with open(os.path.join(out, "log.jsonl")) as f:
        log = [json.loads(x) for x in f]
    last = [x for x in log if "alpha" in x][-1]
    line = {"row": row, "flags": " ".join(flags), **figures(report), "grid_artifact": artifact, "psnr_steps": in_steps,
            "psnr_seen": {x["step"]: x["psnr"] for x in log if x.get("kind") == "eval"},
            "alpha": last["alpha"], "weight": last["weight"], "commit": report["code"], "torch": torch.__version__,
            "device": report["device"], "seconds_train": round(seconds_train), "seconds": round(time.time() - start),
            "protocol": report["protocol"]}
    with open(args.results, "a") as f:
        f.write(json.dumps(line) + "\n")
    return line


def run_side_by_side(args, rows):
    """Run each row as a process of its own on the next free GPU. Returns the rows that failed."""
    free, failed = queue.Queue(), []
    for gpu in args.gpus or ["0"]:
        free.put(gpu)

    def run(row):
        gpu, out = free.get(), folder_of(args, row)
        start = time.time()
        os.makedirs(out, exist_ok=True)
        try:
            run_module(out, "experiments.tiny_imagenet.study", row, "--data", *args.data, "--val", *args.val,
                       "--teacher_weights", args.teacher_weights, "--workers", args.workers, f"--more={args.more}",
                       "--runs", args.runs, "--results", args.results, CUDA_VISIBLE_DEVICES=gpu,
                       OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="4")  # rows share the CPU cores
            said = "done"
        except RuntimeError:
            said = f"FAILED, see {out}/output.txt,"
            failed.append(row)
        free.put(gpu)
        print(f"{row}: {said} in {time.time() - start:.0f} s on GPU {gpu}", flush=True)

    with ThreadPoolExecutor(free.qsize()) as pool:
        list(pool.map(run, rows))
    return failed


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="rows: " + " ".join(ROWS))
    add = ap.add_argument
    add("rows", nargs="+", metavar="ROW", help="names, or all, or all@1 (the second seeds of all but the longer runs)")
    add("--data", nargs="+", required=True, metavar="PATH", help="training images")
    add("--val", nargs="+", required=True, metavar="PATH", help="validation images")
    add("--teacher_weights", required=True, metavar="FILE", help="what experiments.tiny_imagenet.teacher has written")
    add("--gpus", nargs="+", help="run a row on each of them at a time; a GPU may be named more than once")
    add("--workers", type=int, default=4, help="data loading processes of a run [%(default)s]")
    add("--more", default="", metavar="FLAGS", help="of train.py, after the row's; they are kept in the results")
    add("--runs", default="out/study", metavar="FOLDER", help="where the runs live [%(default)s]")
    add("--results", default=RESULTS, metavar="FILE", help="[%(default)s]")
    args = ap.parse_args(argv)
    rows = [row for given in args.rows for row in GROUPS.get(given, [given])]
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        ap.error(f"no such rows: {' '.join(unknown)}; there are {' '.join(ROWS)}")
    for paths in args.data, args.val:
        ImageDataset(paths, 64, train=False)  # UserError, before hours of work, if there are no images
    if args.teacher_weights != "random":
        open_weights(args.teacher_weights)  # likewise
    if len(rows) == 1 and not args.gpus:
        line = run_row(args, rows[0])
        return print(f"{rows[0]}: {line['psnr']:.2f} dB, linear probe {line['linear']:.2f}, {line['seconds']} s")
    if os.path.exists(args.results):
        with open(args.results) as f:
            done = {json.loads(x)["row"] for x in f}.intersection(rows)
        print(f"{args.results} has already: {' '.join(sorted(done)) or 'none of them'}")
        rows = [row for row in rows if row not in done]
    failed = run_side_by_side(args, rows)
    if failed:
        sys.exit(f"experiments.tiny_imagenet.study: these rows failed: {' '.join(failed)}")


if __name__ == "__main__":
    command_line(main, "experiments.tiny_imagenet.study")
