"""Tables of results.jsonl and speeds.jsonl, into README.md beside this file: python -m experiments.efficiency.tables"""
import json
import math
import os

from tools.script import replace_between, run_command

HERE = os.path.dirname(os.path.abspath(__file__))
MARKS = "<!-- tables.py writes from here -->\n", "<!-- to here -->\n"
HEADLINE = {  # title -> settings, the paper's first; =rate where the best PSNR costs semantics or has a single seed
    "64 px, tiny": "tiny:paper@2 tiny:paper tiny:paper-decay tiny:fast@1/4 tiny:fast@1/3 tiny:fast@1/2 tiny:fast",
    "64 px, small": "small:paper small:fast@1/4=0.001 small:fast@1/3=0.001 small:fast@1/3",
    "256 px, tiny": "photos:paper@2 photos:paper photos:growfast@1/4 photos:growfast@1/2=0.001 photos:growfast@1/2 "
                    "photos:growfast-crop@1/2=0.001 photos:growfast-crop@1/2 photos:warmup@1/2=0.001 "
                    "photos:warmup@1/2=0.002 photos:base=0.001 photos:base",
}
LEVERS = {  # title -> {setting: what it is}
    "64 px, tiny": {
        "tiny:base": "**base**", "tiny:m0.5": "beta1 0.5", "tiny:m0.95": "beta1 0.95", "tiny:v0.99": "beta2 0.99",
        "tiny:v0.999": "beta2 0.999", "tiny:m0.95-v0.99": "betas 0.95, 0.99", "tiny:m0.5-v0.99": "betas 0.5, 0.99",
        "tiny:m0.5-v0.999": "betas 0.5, 0.999", "tiny:m0.95-v0.999": "betas 0.95, 0.999", "tiny:e0": "endpoint 0",
        "tiny:e0.5": "endpoint 0.5", "tiny:e1": "endpoint 1", "tiny:batch/2": "batch 128", "tiny:batch/4": "batch 64",
        "tiny:constant": "constant rate", "tiny:linear": "linear decay over all",
        "tiny:cosine": "cosine decay over all", "tiny:cosine-half": "cosine decay over half",
        "tiny:warmup": "warm-up of 100 steps", "tiny:ema": "EMA 0.99", "tiny:ema-constant": "constant rate, EMA 0.998",
        "tiny:fast": "batch 128, warm-up: **fast**", "tiny:fast@1/2": "fast, 1/2 of the images",
        "tiny:fast@1/3": "fast, 1/3", "tiny:fast@1/4": "fast, 1/4",
        "tiny:fast-crop@1/2": "fast, 1/2, `--crop_scale 1 1`", "tiny:base@1/2": "base, 1/2",
        "tiny:base@1/4": "base, 1/4", "tiny:paper": "**paper**: beta1 0.5, endpoint 0, constant",
        "tiny:paper@2": "paper, 2 times the images", "tiny:paper-decay": "paper, with the base's decay",
        "tiny:1:0": "base, `--lambda_f 0`"},
    "64 px, small": {"small:paper": "paper", "small:fast@1/3": "fast, 1/3", "small:fast@1/4": "fast, 1/4",
                     "small:fast-crop@1/3": "fast, 1/3, `--crop_scale 1 1`"},
    "256 px, tiny": {
        "photos:base": "**base**, batch 32", "photos:m0.5": "beta1 0.5",
        "photos:e0@1/2": "endpoint 0, 1/2 of the images",
        "photos:base@1/2": "base, 1/2", "photos:warmup@1/2": "warm-up of 100 steps, 1/2",
        "photos:base@1/3": "base, 1/3", "photos:base@1/4": "base, 1/4",
        "photos:growfast@1/2": "64, 128, 256 px, warm-up: **fast**, 1/2 of the time",
        "photos:growfast-crop@1/2": "fast, 1/2 of the time, `--crop_scale 0.8 1`",
        "photos:growfast-photos@1/2": "fast, 1/2 of the time, 3 photographs for each small picture",
        "photos:growfast@1/4": "fast, 1/4 of the time", "photos:paper": "**paper**",
        "photos:paper@2": "paper, 2 times the images", "photos:e0.5": "endpoint 0.5", "photos:e1": "endpoint 1",
        "photos:m0.95": "beta1 0.95",
        "photos:v0.99": "beta2 0.99", "photos:batch/2": "batch 16", "photos:batch*2": "batch 64",
        "photos:linear": "linear decay over all", "photos:ema": "EMA 0.99"},
}
RATES = 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3


def load(name):
    with open(os.path.join(HERE, name)) as f:
        return [json.loads(line) for line in f]


def gpu_seconds(line, speeds):
    """What the row's steps take alone on a GPU, one number for each stage."""
    model = "small" if line["setting"].startswith("small") else "tiny"
    shapes = [f"{model}/{size}/{batch}" for size, batch in zip(line["size"], line["batch"])]
    return [steps * speeds[shape] for steps, shape in zip(line["steps"], shapes)]


def by_setting(lines):
    """{setting: {(rate, seed): line}}."""
    settings = {}
    for line in lines:
        settings.setdefault(line["setting"], {})[line["rate"], line["seed"]] = line
    return settings


def best(settings, name):
    """The lines of a setting, one for each seed, at the best rate of seed 0; or at the rate after an = in the name."""
    name, _, rate = name.partition("=")
    rows = settings[name]
    rate = float(rate or max((x["psnr"], rate) for (rate, seed), x in rows.items() if seed == 0 and "psnr" in x)[1])
    return [rows[rate, seed] for seed in (0, 1) if (rate, seed) in rows]


def both(lines, key, digits=2):
    return " / ".join(f"{x[key]:.{digits}f}" for x in lines) or "–"


def is_constant(name):
    """Whether a setting keeps its learning rate constant."""
    return name.partition(":")[2].partition("@")[0] in ("paper", "constant", "ema-constant")


def seed_pairs(settings):
    """The two lines of each row that has seeds 0 and 1, both with a PSNR."""
    for rows in settings.values():
        for (rate, seed), line in rows.items():
            first = rows.get((rate, 0), {})
            if seed == 1 and "psnr" in line and "psnr" in first:
                yield first, line


def deviation(pairs, key):
    """The standard deviation of a figure between two seeds, pooled over pairs of lines."""
    return math.sqrt(sum((a[key] - b[key]) ** 2 / 2 for a, b in pairs) / len(pairs))


def headline(settings, speeds):
    """The table of the settings that are compared with the paper's, as lines of Markdown."""
    yield "| seeds 0 / 1 | rate | steps | GPU s | share | PSNR | probe | 42 kept back |"
    yield "|---" * 8 + "|"
    for title, names in HEADLINE.items():
        seconds_of_paper = None
        for name in names.split():
            lines = best(settings, name)
            seconds = sum(gpu_seconds(lines[0], speeds))
            seconds_of_paper = seconds_of_paper or seconds  # it comes first
            lever = name.partition(":")[2].partition("=")[0]
            steps = " + ".join(map(str, lines[0]["steps"]))
            kept = [x["kept"] for x in lines if "kept" in x]
            yield (f"| {title}: {lever} | {lines[0]['rate']:g} | {steps} | {seconds:.1f} "
                   f"| {seconds / seconds_of_paper:.2f} | {both(lines, 'psnr')} | {both(lines, 'linear')} "
                   f"| {both(kept, 'psnr')} |")


def levers(title, settings, speeds):
    """The table of all settings of one base, as lines of Markdown: the PSNR at every rate, then the best."""
    rates = " | ".join(f"{rate:g}" for rate in RATES)
    yield f"| {title}: PSNR of seed 0 at rate | {rates} | best, seed 1 | probe | L_dist | GPU s |"
    yield "|---" * (5 + len(RATES)) + "|"
    for name, label in LEVERS[title].items():
        if name not in settings:
            yield f"| {label} | not run |" + " |" * (3 + len(RATES))
            continue
        psnr = {rate: f"{x['psnr']:.2f}" if "psnr" in x else "diverged"
                for (rate, seed), x in settings[name].items() if seed == 0}
        lines = best(settings, name)
        yield (f"| {label} | " + " | ".join(psnr.get(rate, "") for rate in RATES) + f" | {both(lines[1:], 'psnr')} "
               f"| {both(lines, 'linear')} | {both(lines, 'loss_dist', 4)} "
               f"| {sum(gpu_seconds(lines[0], speeds)):.1f} |")


def noise(settings):
    """One line: the teachers' probes, and how much two seeds differ."""
    teachers = " and ".join(f"{best(settings, name)[0]['linear_teacher']:.2f} (`{name.partition(':')[0]}`)"
                            for name in ("tiny:base", "small:paper"))
    falling = {name: rows for name, rows in settings.items() if not is_constant(name)}
    kinds = {
        "at 64 px with a falling rate": {k: x for k, x in falling.items() if not k.startswith("photos:")},
        "at 256 px with a falling rate": {k: x for k, x in falling.items() if k.startswith("photos:")},
        "with the paper's constant rate": {k: x for k, x in settings.items() if is_constant(k) and "paper" in k}}
    parts = []
    for kind, some in kinds.items():
        pairs = list(seed_pairs(some))
        parts.append(f"{deviation(pairs, 'psnr'):.2f} dB and {deviation(pairs, 'linear'):.2f} points of the probe "
                     f"{kind} ({len(pairs)} pairs)")
    return f"Teachers: probe {teachers}. Standard deviation between two seeds: {', '.join(parts)}."


def step_times(lines):
    """The table of speeds.jsonl, as lines of Markdown."""
    yield "| alone on one H200: teacher/size/batch | ms a step | img/s | ms with `--ema` |"
    yield "|---|---|---|---|"
    rows = []
    for x in lines:
        teacher, size, batch = x["shape"].split("/")
        rows.append((teacher, int(size), int(batch), x["seconds"], x["seconds_ema"]))
    for teacher, size, batch, seconds, seconds_ema in sorted(rows):
        yield (f"| {teacher}/{size}/{batch} | {1e3 * seconds:.2f} | {batch / seconds:,.0f} "
               f"| {1e3 * seconds_ema:.2f} |")


def main():
    settings, times = by_setting(load("results.jsonl")), load("speeds.jsonl")
    speeds = {x["shape"]: x["seconds"] for x in times}
    lines = ["", *headline(settings, speeds)]
    for title in LEVERS:
        lines += ["", *levers(title, settings, speeds)]
    lines += ["", noise(settings), "", *step_times(times), ""]
    replace_between(os.path.join(HERE, "README.md"), *MARKS, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(main, "experiments.efficiency.tables")
