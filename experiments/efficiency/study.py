"""What trains this tokenizer for the least GPU time? Every setting is train.py with some flags, at its own rate.

    T="--data TRAIN-0.zip --val VAL.zip --fit TRAIN-0.zip"; S="python -m experiments.efficiency.study"
    $S speed                                                   # seconds of a step, alone on a GPU
    $S tiny:all $T --gpus 0 0 0 0 1 1 1 1                      # 64 px, tiny; four rows on each GPU
    $S small:paper=5e-4,0 small:fast@1/3 $T --small_teacher F  # F: experiments.tiny_imagenet.teacher small wrote it
    $S photos:all $T --photos P.zip .. --photos_val V.zip      # 256 px, tiny

A setting first trains at three rates with seed 0. While the best of them is the highest or lowest tried, it trains at
the next one (twice, half), up to MOST_RATES; then the best rate again with seed 1. BASE:LEVER=RATE,SEED is that row
alone. "Best" is the one-step PSNR on --val (photos: on --photos_val). Each row appends a line to results.jsonl, also if
it fails, with the reason; rows that stand there already are not run again. tables.py and plot.py read it.
"""
import argparse
import json
import os
import threading
import time

from data import ImageDataset
from encoder import open_weights
from experiments.efficiency.settings import BASES, LEVERS, ONE_RATE, parse_settings, stages, teacher_flags
from experiments.efficiency.speed import SHAPES, measure_speed
from tools.run import command_line
from tools.script import run_module

HERE = os.path.dirname(os.path.relpath(__file__))
MOST_RATES = 5


def load(path):
    """Lines of a .jsonl file, none if it does not exist."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


def append(path, line):
    with open(path, "a") as f:
        f.write(json.dumps(line) + "\n")


def last_line(path):
    """The last line of a text file, empty if there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, errors="replace") as f:
        lines = f.read().strip().splitlines()
    return lines[-1] if lines else ""


def train_and_measure(args, line, out, gpu):
    """Train a row and measure it. All that is known of it is put into `line`, also if something fails later."""
    base, start = line["setting"].split(":")[0], time.time()
    report = os.path.join(out, "report.json")

    def run(*command):
        run_module(out, *command, CUDA_VISIBLE_DEVICES=gpu, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="4")

    def measured(*flags):
        run("eval", "--weights", weights, "--inception", "none", "--bf16", "--out", report, *flags)
        with open(report) as f:
            return json.load(f)

    weights, curve = None, []  # curve: (stage, step, PSNR)
    seconds_of = {x["shape"]: x["seconds"] for x in load(args.speeds)}
    plan = stages(args, line["setting"], line["rate"], line["seed"], seconds_of)
    for k, stage in enumerate(plan):
        folder = os.path.join(out, f"stage{k}")
        init = ["--init", weights] if weights else []
        run("train", *stage.flags, *init, "--out", folder)
        weights, log = os.path.join(folder, "model.safetensors"), load(os.path.join(folder, "log.jsonl"))
        curve += [(k, x["step"], x["psnr"]) for x in log if x.get("kind") == "eval"]
    seconds_train = time.time() - start
    last = [x for x in log if "alpha" in x][-1]
    flags = [" ".join(stage.flags[stage.flags.index("--log_every"):]) for stage in plan]
    line.update(flags=" ; ".join(flags), curve=curve, images=[stage.batch * stage.steps for stage in plan],
                steps=[stage.steps for stage in plan], batch=[stage.batch for stage in plan],
                size=[stage.size for stage in plan],
                **{key: last[key] for key in ("loss_dist", "loss_flow", "alpha", "skipped", "img_s")})
    if base == "photos":
        line.update(measured("--data", *args.photos_val, "--batch_size", 20)["results"]["tokenizer"])
        if args.kept:
            line["kept"] = measured("--data", *args.kept, "--batch_size", 20)["results"]["tokenizer"]
    at_64 = measured("--data", *args.val, "--size", 64, "--batch_size", 500, "--fit", *args.fit, "--probe",
                     *teacher_flags(args, base))
    if base != "photos":
        line.update(at_64["results"]["tokenizer"])
    student, teacher = (at_64["probe"]["last layer"][who] for who in ("student", "teacher"))
    line.update(linear=student["linear"], linear_teacher=teacher["linear"], knn=student["knn"],
                knn_teacher=teacher["knn"], cosine=at_64["cosine_to_teacher"], protocol=at_64["protocol"],
                device=at_64["device"], commit=args.commit or at_64["code"],
                seconds_train=round(seconds_train, 1), seconds=round(time.time() - start, 1))


def run_row(args, setting, rate, seed, gpu):
    """Train and measure one row on one GPU. Returns its line of results.jsonl, which has the reason if it failed."""
    name = f"{setting}_{rate:g}_{seed}".replace(":", "_").replace("/", "-").replace("*", "x")
    out, line = os.path.join(args.runs, name), {"setting": setting, "rate": rate, "seed": seed}
    os.makedirs(out, exist_ok=True)
    try:
        train_and_measure(args, line, out, gpu)
    except Exception as e:  # other rows go on
        said = last_line(os.path.join(out, "output.txt"))
        line["failed"] = f"{said} ({type(e).__name__}: {str(e)[-200:]})"
    return line


def wanted(setting, lines, rows=(), seeds=2):
    """The (rate, seed) that a setting still asks for, given the lines there are. rows: only these."""
    base, lever = setting.split(":", 1)
    rates, one_rate = BASES[base][3], lever.partition("@")[0] in ONE_RATE
    if one_rate:
        rates = rates[1:2]
    seen = {(x["rate"], x["seed"]): x.get("psnr", -1) for x in lines if x["setting"] == setting}  # -1: it failed
    first = [row for row in rows or [(rate, 0) for rate in rates] if row not in seen]
    if first or rows:
        return first
    psnr = {rate: x for (rate, seed), x in seen.items() if seed == 0}
    best = max(psnr, key=lambda rate: (psnr[rate], rate))
    if psnr[best] < 0:  # all have failed
        return []
    if not one_rate and len(psnr) < MOST_RATES and best in (min(psnr), max(psnr)):
        return [(best / 2 if best == min(psnr) else best * 2, 0)]
    return [(best, seed) for seed in range(1, seeds) if (best, seed) not in seen]


class Turns:
    """Which row comes next, for the threads of all GPUs. asked: what parse_settings returns."""

    def __init__(self, args, asked):
        self.args, self.asked = args, asked
        self.lines, self.running, self.change = load(args.results), set(), threading.Condition()

    def take(self):
        """The next row that is wanted and not running: (setting, rate, seed). None if there will be no more."""
        with self.change:
            while True:
                for setting, rows in self.asked.items():
                    for row in wanted(setting, self.lines, rows, self.args.seeds):
                        if (setting, *row) not in self.running:
                            self.running.add((setting, *row))
                            return setting, *row
                if not self.running:
                    return None
                self.change.wait()  # a running row may lead to others

    def finish(self, row, line):
        with self.change:
            self.running.remove(row)
            self.lines.append(line)
            append(self.args.results, line)
            said = line.get("failed") or "{psnr:.2f} dB, probe {linear:.2f}, {seconds:.0f} s".format(**line)
            print(f"{row[0]} lr {row[1]:g} seed {row[2]}: {said}", flush=True)
            self.change.notify_all()

    def work(self, gpu):
        while True:
            row = self.take()
            if row is None:
                return
            self.finish(row, run_row(self.args, *row, gpu))


def check(ap, args, bases):
    """End with a line, before hours of work, if something that these bases need is missing."""
    needed = {"data": bases - {"photos"}, "val": bases, "fit": bases, "photos_val": bases & {"photos"},
              "small_teacher": bases & {"small"}}
    for name, why in needed.items():
        if why and not getattr(args, name):
            ap.error(f"--{name} is missing, for {' '.join(sorted(why))}")
    for paths in args.data, args.val, args.fit, args.photos, args.photos_val, args.kept:
        if paths:
            ImageDataset(paths, 64, train=False)  # UserError if there are no images
    if args.small_teacher:
        open_weights(args.small_teacher)  # likewise


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                 epilog="bases: " + " ".join(BASES) + "; levers: " + " ".join(LEVERS))
    add = ap.add_argument
    add("settings", nargs="+", metavar="BASE:LEVER", help="in the order of their turn; BASE:all; BASE:LEVER@1/4, with "
        "a quarter of the images; BASE:LEVER=RATE,SEED, only that row; or speed")
    add("--seeds", type=int, default=2, help="of the best rate [%(default)s]")
    add("--lever", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"), help="a further lever")
    add("--data", nargs="+", default=[], metavar="PATH", help="training pictures of 64 px")
    add("--val", nargs="+", metavar="PATH", help="validation pictures of 64 px: PSNR of tiny and small, probe of all")
    add("--fit", nargs="+", metavar="PATH", help="what the probe is fitted on")
    add("--photos", nargs="+", default=[], metavar="PATH", help="training photographs, beside --data")
    add("--photos_val", nargs="+", metavar="PATH", help="photographs that settings are chosen by")
    add("--kept", nargs="+", metavar="PATH", help="photographs that are measured and choose nothing")
    add("--small_teacher", metavar="FILE", help="what experiments.tiny_imagenet.teacher small wrote")
    add("--gpus", nargs="+", default=["0"], help="a row runs on each GPU named here; a GPU may be named more than once")
    add("--workers", type=int, default=2, help="data loading processes of a row [%(default)s]")
    add("--scale", type=float, default=1.0, help="times the images of all rows [%(default)s]")
    add("--more", default="", metavar="FLAGS", help="of train.py, after the row's")
    add("--runs", default="out/efficiency", metavar="FOLDER")
    add("--results", default=os.path.join(HERE, "results.jsonl"), metavar="FILE", help="[%(default)s]")
    add("--speeds", default=os.path.join(HERE, "speeds.jsonl"), metavar="FILE", help="[%(default)s]")
    add("--shapes", nargs="+", default=SHAPES, help="of speed: teacher/size/batch")
    add("--commit", help="what the results say of the code, where there is no git")
    args = ap.parse_args(argv)
    if args.settings == ["speed"]:
        for shape in args.shapes:
            append(args.speeds, measure_speed(shape))
        return
    args.levers = {**LEVERS, **dict(args.lever)}
    asked = parse_settings(args)
    check(ap, args, {setting.split(":")[0] for setting in asked})
    os.makedirs(args.runs, exist_ok=True)
    turns = Turns(args, asked)
    threads = [threading.Thread(target=turns.work, args=(gpu,)) for gpu in args.gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    command_line(main, "experiments.efficiency.study")
