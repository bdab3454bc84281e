"""The paper's ablations on Tiny-ImageNet-100 at 64 px: every row is one command, which trains and measures.

    T="--data TRAIN-0.zip ... TRAIN-3.zip --val VAL.zip --teacher_weights teacher-small.safetensors"
    python experiments/tiny_imagenet/study.py default $T                    # one row; default@1 is the same with seed 1
    python experiments/tiny_imagenet/study.py all all@1 $T --gpus 0 0 0 0 1 1 1 1 --workers 2 --results mine.jsonl    # four a GPU

Several rows skip what --results has already: to run one again, name it alone, or use another file. all@1: the second seeds.

A row is train.py with ALWAYS and the row's flags, then eval.py on all of --val (probe and 20-NN fitted on --data). It appends one
line to results.jsonl beside this file: arguments, seed, commit, device, seconds, figures. tables.py makes tables and plots of it.
"""
import argparse
import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.join(HERE, "..", "..")
sys.path.insert(0, TOP)
from data import ImageDataset, cores
from decoder import Decoder, patchify
from encoder import Encoder
from eval import image_noise

ALWAYS = "--teacher small --recipe paper --batch_size 64 --steps 10000 --lr_decay 0.5 --log_every 100 --eval_every 2500 --save_every 100000"
ROWS = {  # name -> flags of train.py
    "default": "",                                             # adaptive, beta 2, 1:1, GTB 3, latent 16, the authors' times
    "final": "--strategy final", "uniform": "--strategy uniform", "progressive": "--strategy progressive",  # Table 5a
    "none": "--lambda_d 0", "100:1": "--lambda_f 0.01", "1:100": "--lambda_d 0.01",  # Table 5b; a weight of 100 would meet --clip at every step
    "1:100-final": "--lambda_d 0.01 --strategy final", "1:100-uniform": "--lambda_d 0.01 --strategy uniform",
    "1:100-progressive": "--lambda_d 0.01 --strategy progressive",                     # Table 5a again, where distances are large
    "pixel": "--decoder pixel", "gtb-0": "--gtb_depth 0", "gtb-6": "--gtb_depth 6",    # Table 5c
    "pixel-gtb-0": "--decoder pixel --gtb_depth 0",                                    # the paper's D_pixel
    "beta-0.5": "--beta 0.5", "beta-1": "--beta 1", "beta-3": "--beta 3", "beta-5": "--beta 5", "latent-8": "--latent_dim 8",  # Fig. 4
    "endpoint-0.25": "--endpoint 0.25", "endpoint-0.5": "--endpoint 0.5", "endpoint-1": "--endpoint 1",  # ours
    "sum": "--lambda_f 192",                                   # eq. 5's norm read as a sum over the 3 x 8 x 8 elements of a patch
    "1:192": "--lambda_d 0.0052083",                           # the same ratio, out of --clip's way
    "longer": "--steps 20000",                                 # has the default flattened out?
    "best": "--endpoint 0.9 --batch_size 256 --steps 16000",   # for the quality, not for a table of the paper
    "best-20": "--endpoint 0.9 --batch_size 128 --steps 80000 --eval_every 10000",  # the same with 20 minutes of an H200
}
ROWS.update({f"{name}@{seed}": f"{flags} --seed {seed}" for name, flags in list(ROWS.items()) for seed in (1, 2)})
IN_STEPS = "default", "endpoint-0.5", "endpoint-1", "best", "best-20"  # decoded in 2, 4 and 25 steps besides one


@torch.no_grad()
def grid_artifact(weights, val):
    """Mean squared error on the outermost pixels of all patches over that on their other pixels, one-step decoding of --val."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    enc, dec = (part.from_pretrained(weights).to(device) for part in (Encoder, Decoder))
    p = dec.config.patch
    border = torch.ones(p, p, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    data, error = ImageDataset(val, 64, train=False), torch.zeros(p, p, dtype=torch.float64)
    for k, (img, _) in enumerate(DataLoader(data, 500, num_workers=min(4, cores()))):
        img = img.to(device) / 255
        noise = image_noise(range(500 * k, 500 * k + len(img)), (64 // p) ** 2, 3 * p * p, 0).to(device)
        wrong = patchify(dec.decode(enc.encode(img), noise=noise) - img, p).square()
        error += wrong.view(-1, p, p).sum(0).double().cpu()
    return (error[border].mean() / error[~border].mean()).item()


def row(name, args):
    """Train and measure one row in runs/NAME; append its line to results.jsonl."""
    out, flags = os.path.join(args.runs, name.replace(":", "-")), f"{ALWAYS} {ROWS[name]} {args.more}".split()
    weights, report, start = os.path.join(out, "model.safetensors"), os.path.join(out, "report.json"), time.time()
    os.makedirs(out, exist_ok=True)
    script = lambda file, *arguments: subprocess.run([sys.executable, os.path.join(TOP, file), *arguments], check=True)
    script("train.py", "--data", *args.data, "--val", *args.val, "--teacher_weights", args.teacher_weights, "--workers", str(args.workers), *flags, "--out", out)
    trained = time.time()
    measure = ["eval.py", "--data", *args.val, "--weights", weights, "--inception", "none", "--batch_size", "250", "--bf16", "--out", report]
    script(*measure, "--fit", *args.data, "--probe", *["--pca"] * (name == "default"))
    with open(report) as f:
        measured = json.load(f)
    last, latent = (measured["probe"][layer] for layer in ("last layer", "latent"))
    line = {"row": name, "flags": " ".join(flags), **measured["results"]["tokenizer"],
            "linear": last["student"]["linear"], "linear_teacher": last["teacher"]["linear"],
            "knn": last["student"]["knn"], "knn_teacher": last["teacher"]["knn"], "linear_latent": latent["student"]["linear"],
            "cosine": measured["cosine_to_teacher"], "pca": next((r for k, r in measured["results"].items() if k.startswith("PCA")), None),
            "grid_artifact": grid_artifact(weights, args.val), "psnr_steps": {}}
    for n in (2, 4, 25) if name in IN_STEPS else ():
        script(*measure, "--steps", str(n))
        with open(report) as f:
            line["psnr_steps"][n] = json.load(f)["results"]["tokenizer"]["psnr"]
    with open(os.path.join(out, "log.jsonl")) as f:
        log = [json.loads(x) for x in f]
    last = [x for x in log if "alpha" in x][-1]
    line.update(psnr_seen={x["step"]: x["psnr"] for x in log if x.get("kind") == "eval"}, alpha=last["alpha"], weight=last["weight"],
                commit=measured["code"], torch=torch.__version__, device=measured["device"], seconds_train=round(trained - start),
                seconds=round(time.time() - start), protocol=measured["protocol"])
    with open(args.results, "a") as f:
        f.write(json.dumps(line) + "\n")


def main():
    ap = argparse.ArgumentParser(description="Train and measure rows of the ablation tables.", epilog="rows: " + " ".join(ROWS))
    ap.add_argument("rows", nargs="+", metavar="ROW", help="names, or all, or all@1 (the second seeds of all but the longer runs)")
    ap.add_argument("--data", nargs="+", required=True, metavar="PATH", help="training archives")
    ap.add_argument("--val", nargs="+", required=True, metavar="PATH")
    ap.add_argument("--teacher_weights", required=True, metavar="FILE", help="of teacher.py small")
    ap.add_argument("--gpus", nargs="+", help="run several rows side by side, one for each GPU named here; a GPU may be named more than once")
    ap.add_argument("--workers", type=int, default=4, help="data loading processes of a run [%(default)s]")
    ap.add_argument("--more", default="", metavar="FLAGS", help="of train.py, after the row's; they are kept in the results")
    ap.add_argument("--runs", default="out/study", metavar="FOLDER", help="where the runs live [%(default)s]")
    ap.add_argument("--results", default=os.path.join(HERE, "results.jsonl"), metavar="FILE", help="[%(default)s]")
    args = ap.parse_args()
    every = {"all": [n for n in ROWS if "@" not in n], "all@1": [n for n in ROWS if n.endswith("@1") and n not in ("longer@1", "best@1", "best-20@1")]}
    names = [name for given in args.rows for name in every.get(given, [given])]
    if unknown := [n for n in names if n not in ROWS]:
        ap.error(f"no such rows: {' '.join(unknown)}; there are {' '.join(ROWS)}")
    if not args.gpus and len(names) == 1:
        return row(names[0], args)
    if os.path.exists(args.results):
        with open(args.results) as f:
            done = {line["row"] for line in map(json.loads, f)}.intersection(names)
        print(f"{args.results} has already: {' '.join(done) or 'none of them'}")
        names = [n for n in names if n not in done]

    free = queue.Queue()
    for gpu in args.gpus or ["0"]:
        free.put(gpu)
    rest = ["--data", *args.data, "--val", *args.val, "--teacher_weights", args.teacher_weights, "--workers", str(args.workers), "--more", args.more,
            "--runs", args.runs, "--results", args.results]

    def one(name):
        gpu, log = free.get(), os.path.join(args.runs, name.replace(":", "-") + ".txt")
        start = time.time()
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # rows share the cores
        with open(log, "w") as f:
            status = subprocess.run([sys.executable, __file__, name, *rest], stdout=f, stderr=f, env=env).returncode
        free.put(gpu)
        print(f"{name}: {'done' if status == 0 else f'FAILED, see {log}'} in {time.time() - start:.0f} s on GPU {gpu}", flush=True)
        return status

    os.makedirs(args.runs, exist_ok=True)
    with ThreadPoolExecutor(free.qsize()) as pool:
        return int(any([*pool.map(one, names)]))  # a row that a signal killed has a negative status


if __name__ == "__main__":
    sys.exit(main())
