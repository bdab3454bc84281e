"""Tables and plots of results.jsonl and results-short.jsonl: python experiments/tiny_imagenet/tables.py

Writes the tables into README.md beside this file, between its two comments, and draws layers.png (the paper's Fig. 16: distances and
weights of all layers in training, from log-default.jsonl), beta.png (Fig. 4) and endpoint.png. Needs matplotlib.
"""
import json
import math
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT = "adaptive, beta 2, 1:1, GTB 3, latent 16 (default)"
TABLES = {  # title -> (the paper's figures, {row: (what it is, the paper's figures for it)})
    "Table 5a, distillation": ("paper: PSNR, rFID, MME-P", {
        "final": ("final layer", "33.41, 0.25, 1435.6"), "uniform": ("uniform", "30.77, 0.45, 1518.2"),
        "progressive": ("progressive (beta 0)", "31.91, 0.38, 1495.3"), "default": (DEFAULT, "33.23, 0.26, 1513.7"), "none": ("none", "–")}),
    "Table 5b, lambda_d : lambda_f": ("paper: MME-P, PSNR", {
        "100:1": ("100:1", "1521.4, 26.57"), "default": ("1:1 (default)", "1513.7, 32.48"), "1:100": ("1:100", "1453.0, 32.88"),
        "none": ("0:1", "817.2, 33.69")}),
    "Table 5a again, at 1:100": ("", {
        "1:100-final": ("final layer", ""), "1:100-uniform": ("uniform", ""), "1:100-progressive": ("progressive", ""), "1:100": ("adaptive", "")}),
    "Table 5c, decoder": ("paper: PSNR, rFID", {
        "pixel-gtb-0": ("pixel regression, no GTB", "25.12, 1.89"), "pixel": ("pixel regression, GTB 3", "–"),
        "gtb-0": ("pixel flow, no GTB", "30.15, 0.51"), "default": ("pixel flow, GTB 3 (default)", "–"), "gtb-6": ("pixel flow, GTB 6", "33.23, 0.26")}),
    "Fig. 4, beta and latent channels": ("", {
        "progressive": ("beta 0", ""), "beta-0.5": ("beta 0.5", ""), "beta-1": ("beta 1", ""), "default": ("beta 2, latent 16 (default)", ""),
        "beta-3": ("beta 3", ""), "beta-5": ("beta 5", ""), "latent-8": ("latent 8", "")}),
    "Ours: patches at t = 1 in training, the loss as a sum, longer runs": ("", {
        "default": (DEFAULT, ""), "endpoint-0.25": ("`--endpoint 0.25`", ""), "endpoint-0.5": ("`--endpoint 0.5`", ""),
        "endpoint-1": ("`--endpoint 1`", ""), "sum": ("eq. 5 as a sum, `--lambda_f 192`", ""), "1:192": ("the same as `--lambda_d 0.0052083`", ""),
        "longer": ("default, 20,000 steps", ""), "best": ("`--endpoint 0.9`, 16,000 steps of 256", ""),
        "best-20": ("`--endpoint 0.9`, 80,000 steps of 128", "")}),
}
COLUMNS = {"PSNR": ("psnr", 2), "ssim": ("ssim", 4), "ssim_paper": ("ssim_paper", 4), "linear probe": ("linear", 2), "20-NN": ("knn", 2),
           "linear, of the latent": ("linear_latent", 2), "cosine": ("cosine", 3), "grid artifact": ("grid_artifact", 3)}


def load(path):
    """{row name without its seed: [results, one for each seed]}."""
    rows = {}
    with open(path) as f:
        lines = {line["row"]: line for line in map(json.loads, f)}  # the last one of a row that was run again
    for name in sorted(lines):
        rows.setdefault(name.split("@")[0], []).append(lines[name])
    return rows


def values(lines, key):
    """One value for each seed; of the cosines the mean over layers."""
    return [float(np.mean(line[key])) for line in lines]


def spread(rows, key):
    """Standard deviation between seeds, pooled over the rows that have two or more."""
    squares = [(x - np.mean(v)) ** 2 for lines in rows.values() for v in [values(lines, key)] for x in v]
    freedom = sum(len(lines) - 1 for lines in rows.values())
    return math.sqrt(sum(squares) / freedom) if freedom else math.nan


def cell(lines, column):
    """A column's value for each seed, as text."""
    key, digits = COLUMNS[column]
    return " / ".join(f"{v:.{digits}f}" for v in values(lines, key))


def text(rows, short):
    """All tables, as lines of Markdown; short: the rows of an earlier, shorter study."""
    default, label_of = rows["default"][0], {name: label for _, names in TABLES.values() for name, (label, _) in names.items()}
    for title, (of_paper, names) in TABLES.items():
        yield from ("", f"| {title} | " + f"{of_paper} | " * bool(of_paper) + " | ".join(COLUMNS) + " |", "|---" * (1 + bool(of_paper) + len(COLUMNS)) + "|")
        for name, (label, paper) in names.items():
            cells = [cell(rows[name], column) if name in rows else "not run" for column in COLUMNS]
            yield f"| {label} | " + f"{paper} | " * bool(of_paper) + " | ".join(cells) + " |"
    pca = default["pca"]
    yield from ("", f"Teacher: linear probe {default['linear_teacher']:.2f}, 20-NN {default['knn_teacher']:.2f}. PCA, 16 components per patch: PSNR "
                f"{pca['psnr']:.2f}, ssim {pca['ssim']:.4f}, ssim_paper {pca['ssim_paper']:.4f}.")
    keep, lose = ({n: x for n, x in rows.items() if (min(values(x, "linear")) > 50) == above} for above in (True, False))
    yield (f"Standard deviation between two seeds, pooled over the rows that have both: PSNR {spread(rows, 'psnr'):.2f} dB; linear probe "
           f"{spread(keep, 'linear'):.2f}, 20-NN {spread(keep, 'knn'):.2f} points where the probe stays above 50%, "
           f"{spread(lose, 'linear'):.2f} and {spread(lose, 'knn'):.2f} below.")
    yield from ("", "| PSNR, seed 0, decoded in | 1 step | 2 | 4 | 25 |", "|---|---|---|---|---|")
    for name, lines in rows.items():
        if lines[0]["psnr_steps"]:
            yield f"| {label_of[name]} | {lines[0]['psnr']:.2f} | " + " | ".join(f"{x:.2f}" for x in lines[0]["psnr_steps"].values()) + " |"
    for name in filter(rows.get, ("default", "longer")):
        seen = rows[name][0]["psnr_seen"]
        yield from ("", f"| PSNR of 512 images in training, {label_of[name]}, at step | " + " | ".join(seen) + " |", "|---" * (1 + len(seen)) + "|")
        yield "| | " + " | ".join(f"{x:.2f}" for x in seen.values()) + " |"
    columns = "PSNR", "linear probe", "20-NN"
    yield from ("", "| after 2,500 steps of 256 | " + " | ".join(columns) + " |", "|---|---|---|---|")
    for name, lines in short.items():
        yield f"| {name} | " + " | ".join(cell(lines, column) for column in columns) + " |"
    yield ""


def curves(rows, names, xs, xlabel, path):
    """PSNR and linear probe over a setting: a point for each seed, a line through their means."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for ax, key, label, span in (left, "psnr", "one-step PSNR, dB", 1.5), (right, "linear", "linear probe, %", 6):
        points = [(x, v) for x, name in zip(xs, names) for v in values(rows.get(name, []), key)]
        ax.plot(*zip(*points), "o")
        ax.plot(*zip(*[(x, np.mean(values(rows[name], key))) for x, name in zip(xs, names) if name in rows]), "-", color="C0")
        low, high = ax.get_ylim()
        half = max(high - low, span) / 2  # or noise looks like a trend
        ax.set(xlabel=xlabel, ylabel=label, ylim=((low + high) / 2 - half, (low + high) / 2 + half))
    right.axhline(rows["default"][0]["linear_teacher"], color="grey", ls="--", label="teacher")
    right.legend()
    fig.savefig(path, dpi=80)


def layers(path, out):
    """Distances and weights of the layers over the steps of the default row (Fig. 16)."""
    with open(path) as f:
        log = [x for x in map(json.loads, f) if "alpha" in x]
    steps = [x["step"] for x in log]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for ax, key, label in (axes[0], "alpha", "distance alpha"), (axes[1], "weight", "weight w"):
        lines = np.array([x[key] for x in log])  # (steps, L)
        for layer, colour in enumerate(plt.cm.viridis(np.linspace(0, 1, lines.shape[1]))):
            ax.plot(steps, lines[:, layer], color=colour, label=f"layer {layer + 1}" if layer % 11 == 0 else None)
        ax.set(xlabel="step", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].legend()
    fig.savefig(out, dpi=80)


def main():
    rows, short = (load(os.path.join(HERE, name)) for name in ("results.jsonl", "results-short.jsonl"))
    readme = os.path.join(HERE, "README.md")
    with open(readme) as f:
        before, begin, rest = f.read().partition("<!-- tables.py writes from here -->\n")
    _, end, after = rest.partition("<!-- to here -->\n")
    assert end, f"{readme} has lost the comments that the tables stand between"
    with open(readme, "w") as f:
        f.write(before + begin + "\n".join(text(rows, short)) + "\n" + end + after)
    betas, endpoints = [0, 0.5, 1, 2, 3, 5], [0, 0.25, 0.5, 1]
    curves(rows, ["progressive", "beta-0.5", "beta-1", "default", "beta-3", "beta-5"], betas, "beta", os.path.join(HERE, "beta.png"))
    curves(rows, ["default", "endpoint-0.25", "endpoint-0.5", "endpoint-1"], endpoints, "fraction of patches at t = 1", os.path.join(HERE, "endpoint.png"))
    layers(os.path.join(HERE, "log-default.jsonl"), os.path.join(HERE, "layers.png"))


if __name__ == "__main__":
    main()
