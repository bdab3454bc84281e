"""What trains this tokenizer for the least GPU time? Every setting is train.py with some flags, at its own rate.

    T="--data TRAIN-0.zip --val VAL.zip --fit TRAIN-0.zip"; S="python experiments/efficiency/study.py"
    $S speed                                                   # seconds of a step, alone on a GPU
    $S tiny:all $T --gpus 0 0 0 0 1 1 1 1                      # 64 px, tiny; four rows on each GPU
    $S small:paper=5e-4,0 small:fast@1/3 $T --small_teacher F  # F: what tiny_imagenet/teacher.py small writes
    $S photos:all $T --photos P.zip .. --photos_val V.zip      # 256 px, tiny

A setting first trains at three rates with seed 0. While the best of them is the highest or lowest tried, it trains at
the next one (twice, half), up to MOST_RATES; then the best rate again with seed 1. BASE:LEVER=RATE,SEED is that row
alone. "Best" is the one-step PSNR on --val (photos: on --photos_val). Each row appends a line to results.jsonl, also if
it fails, with the reason; rows that stand there already are not run again. tables.py and plot.py read it.
"""
import argparse
import copy
import json
import os
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.join(HERE, "..", "..")
sys.path.insert(0, TOP)

MOST_RATES = 5
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
SHAPES = ("tiny/64/64 tiny/64/128 tiny/64/256 small/64/64 small/64/128 small/64/256 tiny/128/64 tiny/256/16 "
          "tiny/256/32 tiny/256/64").split()  # teacher/size/batch


def speed(shapes, path):
    """Seconds of a training step alone on this GPU, from images on it, and of its teacher; appended to `path`."""
    import torch

    import train
    from tools.optimizer import average_weights
    from tools.speed import seconds
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    for shape in shapes:
        teacher, size, batch = shape.split("/")
        args = train.parse_args(["--teacher", teacher, "--teacher_weights", "random", "--size", size, "--steps", "1",
                                 "--batch_size", batch, "--micro_batch", batch])
        torch.compiler.reset()
        models = teacher, encoder, decoder = [m.to(device) for m in train.build_models(args)]
        averages = [copy.deepcopy(p.detach()) for m in models[1:] for p in m.parameters()]
        weights = [p.detach() for m in models[1:] for p in m.parameters()]
        optimizer = train.build_optimizer(args, encoder, decoder)
        micro_step, update = train.training_step(args, *models, optimizer, autocast, args.batch_size, 1)
        img = torch.randint(256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8, device=device)
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        step = lambda: update(micro_step(img))
        averaging = lambda: (step(), average_weights(averages, weights, 9, 0.9))
        line = {"shape": shape, "device": card, "torch": torch.__version__, "seconds": seconds(step, 50),
                "seconds_ema": seconds(averaging, 50)}
        with torch.no_grad(), autocast:
            line["seconds_teacher"] = seconds(lambda: models[0](img / 255), 50)  # not as a graph: launches count
        line["gflop"] = train.model_flops(encoder, decoder, args.size) / 1e9
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"{shape}: {1e3 * line['seconds']:.2f} ms a step, {args.batch_size / line['seconds']:,.0f} img/s; "
              f"{1e3 * line['seconds_ema']:.2f} with --ema; teacher {1e3 * line['seconds_teacher']:.2f}", flush=True)
        del micro_step, update, optimizer, models, teacher, encoder, decoder


def load(path):
    """Lines of a .jsonl file, none if it does not exist."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


def stages(setting, rate, seed, args):
    """A row's commands, each a list of flags of train.py, and their (flags, batch, steps): one each, but for "grow"."""
    base, lever = setting.split(":", 1)
    flags, images, batch, _ = BASES[base]
    lever, _, length = lever.partition("@")  # base@1/4: a quarter of the images
    top, _, bottom = length.partition("/")
    images *= args.scale * (float(top) / float(bottom or 1) if length else 1)
    given = args.levers.get(lever, LEVERS.get(lever)).split()
    batch *= float(([x[6:] for x in given if x.startswith("batch=")] or ["1"])[-1])
    given = [x for x in given if "batch=" not in x and x != "grow"]
    data, val = ([*args.photos, *args.data], args.photos_val) if base == "photos" else (args.data, args.val)
    common = ["--data", *data, "--val", *val, "--workers", str(args.workers), *RUN.split(), *flags.split(),
              *["--teacher_weights", args.small_teacher] * (base == "small"), *given,
              "--lr", f"{rate:g}", "--seed", str(seed)]
    plan = [([], round(batch), max(1, round(images / batch)))]  # flags, batch, steps
    if lever.startswith("grow"):
        seconds = {x["shape"]: x["seconds"] for x in load(args.speeds)}
        total = plan[0][2] * seconds["tiny/256/32"]
        plan = [(["--size", str(size)] + ["--lr_decay", "0"] * (size < 256), n,
                 max(1, round(share * total / seconds[f"tiny/{size}/{n}"]))) for size, n, share in GROW]
    commands = [[*common, "--batch_size", str(n), "--micro_batch", str(n), "--steps", str(steps), "--eval_every",
                 str(max(1, steps // 8)), *more, *args.more.split()] for more, n, steps in plan]
    return commands, plan


def row(setting, rate, seed, gpu, args):
    """Train and measure one row on one GPU; its line of results.jsonl."""
    name = f"{setting} {rate:g} {seed}"
    out = os.path.join(args.runs, name.replace(":", "_").replace("/", "-").replace("*", "x").replace(" ", "_"))
    os.makedirs(out, exist_ok=True)
    line, base = {"setting": setting, "rate": rate, "seed": seed}, setting.split(":")[0]
    text, report = os.path.join(out, "output.txt"), os.path.join(out, "report.json")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}

    def script(file, *arguments):
        with open(text, "a") as f:
            command = [sys.executable, os.path.join(TOP, file), *arguments]
            subprocess.run(command, check=True, stdout=f, stderr=f, env=env)

    def measured(*arguments):
        script("eval.py", "--weights", weights, "--inception", "none", "--bf16", "--out", report, *arguments)
        with open(report) as f:
            return json.load(f)

    start, curve = time.time(), []  # curve: (stage, step, PSNR)
    try:
        commands, plan = stages(setting, rate, seed, args)
        for k, command in enumerate(commands):
            part, before = os.path.join(out, f"stage{k}"), os.path.join(out, f"stage{k - 1}", "model.safetensors")
            script("train.py", *command, *["--init", before] * (k > 0), "--out", part)
            log = load(os.path.join(part, "log.jsonl"))
            curve += [(k, x["step"], x["psnr"]) for x in log if x.get("kind") == "eval"]
        weights, trained = os.path.join(part, "model.safetensors"), time.time()
        last = [x for x in log if "alpha" in x][-1]
        line.update(flags=" ; ".join(" ".join(c[c.index("--log_every"):]) for c in commands), curve=curve,
                    images=[n * steps for _, n, steps in plan], steps=[x[2] for x in plan], batch=[x[1] for x in plan],
                    size=[x[0] for x in GROW] if len(plan) > 1 else [256 if base == "photos" else 64],
                    **{key: last[key] for key in ("loss_dist", "loss_flow", "alpha", "skipped", "img_s")})
        if base == "photos":
            line.update(measured("--data", *args.photos_val, "--batch_size", "20")["results"]["tokenizer"])
            if args.kept:
                line["kept"] = measured("--data", *args.kept, "--batch_size", "20")["results"]["tokenizer"]
        at_64 = measured("--data", *args.val, "--size", "64", "--batch_size", "500", "--fit", *args.fit, "--probe",
                         *["--teacher_weights", args.small_teacher] * (base == "small"))
        if base != "photos":
            line.update(at_64["results"]["tokenizer"])
        probe = at_64["probe"]["last layer"]
        line.update(linear=probe["student"]["linear"], linear_teacher=probe["teacher"]["linear"],
                    knn=probe["student"]["knn"], knn_teacher=probe["teacher"]["knn"], cosine=at_64["cosine_to_teacher"],
                    protocol=at_64["protocol"], device=at_64["device"], commit=args.commit or at_64["code"],
                    seconds_train=round(trained - start, 1), seconds=round(time.time() - start, 1))
    except Exception as e:  # it stays in the results, with its reason
        said = open(text, errors="replace").read().strip().splitlines()[-1:] if os.path.exists(text) else []
        line["failed"] = f"{said[0] if said else ''} ({type(e).__name__}: {str(e)[-200:]})"
    return line


def wanted(setting, lines, rows=(), seeds=2):
    """The (rate, seed) that a setting still asks for, given the lines there are. rows: only these."""
    rates, lever = BASES[setting.split(":")[0]][3], setting.split(":", 1)[1].partition("@")[0]
    if lever in ONE_RATE:
        rates = rates[1:2]
    seen = {(x["rate"], x["seed"]): x.get("psnr", -1) for x in lines if x["setting"] == setting}
    first = [x for x in rows or [(rate, 0) for rate in rates] if x not in seen]
    if first or rows:
        return first
    tried = sorted((psnr, rate) for (rate, seed), psnr in seen.items() if seed == 0)
    if tried[-1][0] < 0:  # all have failed
        return []
    best, edges = tried[-1][1], (min(rate for _, rate in tried), max(rate for _, rate in tried))
    if lever not in ONE_RATE and best in edges and len(tried) < MOST_RATES:
        return [(best / 2 if best == edges[0] else best * 2, 0)]
    return [(best, seed) for seed in range(1, seeds) if (best, seed) not in seen]


def main():
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
    add("--small_teacher", metavar="FILE", help="of experiments/tiny_imagenet/teacher.py small")
    add("--gpus", nargs="+", default=["0"], help="a row runs on each GPU named here; a GPU may be named more than once")
    add("--workers", type=int, default=2, help="data loading processes of a row [%(default)s]")
    add("--scale", type=float, default=1.0, help="times the images of all rows [%(default)s]")
    add("--more", default="", metavar="FLAGS", help="of train.py, after the row's")
    add("--runs", default="out/efficiency", metavar="FOLDER")
    add("--results", default=os.path.join(HERE, "results.jsonl"), metavar="FILE", help="[%(default)s]")
    add("--speeds", default=os.path.join(HERE, "speeds.jsonl"), metavar="FILE", help="[%(default)s]")
    add("--shapes", nargs="+", default=SHAPES, help="of speed: teacher/size/batch")
    add("--commit", help="what the results say of the code, where there is no git")
    args = ap.parse_args()
    if args.settings == ["speed"]:
        return speed(args.shapes, args.speeds)
    args.levers = dict(args.lever)
    only, levers = {}, {**LEVERS, **args.levers}  # only: setting -> the rows that were asked for by rate and seed
    for given in args.settings:
        base, _, lever = given.partition(":")
        lever, _, asked = lever.partition("=")
        every = [name for name in LEVERS if base == "photos" or "grow" not in name]
        for name in every if lever == "all" else [lever]:
            if base not in BASES or name.partition("@")[0] not in levers:
                ap.error(f"no such setting: {given}")
            rate, _, seed = asked.partition(",")
            only.setdefault(f"{base}:{name}", []).extend([(float(rate), int(seed))] if asked else [])
    os.makedirs(args.runs, exist_ok=True)
    lines, running, turn = load(args.results), set(), threading.Condition()

    def next_row():
        """The first row that is wanted and not running; None while running rows may lead to more."""
        for setting in only:
            for rate, seed in wanted(setting, lines, only[setting], args.seeds):
                if (setting, rate, seed) not in running:
                    return setting, rate, seed
        if running:
            return None
        raise StopIteration

    def work(gpu):
        while True:
            with turn:
                try:
                    while (job := next_row()) is None:
                        turn.wait()
                except StopIteration:
                    turn.notify_all()
                    return
                running.add(job)
            line = row(*job, gpu, args)
            with turn:
                running.remove(job)
                lines.append(line)
                with open(args.results, "a") as f:
                    f.write(json.dumps(line) + "\n")
                said = line.get("failed") or "{psnr:.2f} dB, probe {linear:.2f}, {seconds:.0f} s".format(**line)
                print(f"{job[0]} lr {job[1]:g} seed {job[2]}: {said}", flush=True)
                turn.notify_all()

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in args.gpus]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


if __name__ == "__main__":
    main()
