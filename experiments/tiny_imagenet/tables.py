"""Tables and plots of results.jsonl and results-short.jsonl, beside this file.

    python -m experiments.tiny_imagenet.tables

Writes the tables into README.md, between its two comments, and draws layers.png (the paper's Fig. 16: distances and
weights of all layers in training, from log-default.jsonl), beta.png (Fig. 4) and endpoint.png. Needs matplotlib.
"""
import argparse
import json
import math
import os

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from tools.script import replace_between, run_command

HERE = os.path.dirname(os.path.abspath(__file__))
MARKS = "<!-- tables.py writes from here -->\n", "<!-- to here -->\n"
DEFAULT = "adaptive, beta 2, 1:1, GTB 3, latent 16 (default)"
TABLES = {  # title -> (which of the paper's figures stand beside, {row: (what it is, the paper's figures)})
    "Table 5a, distillation": ("paper: PSNR, rFID, MME-P", {
        "final": ("final layer", "33.41, 0.25, 1435.6"),
        "uniform": ("uniform", "30.77, 0.45, 1518.2"),
        "progressive": ("progressive (beta 0)", "31.91, 0.38, 1495.3"),
        "default": (DEFAULT, "33.23, 0.26, 1513.7"),
        "none": ("none", "–")}),
    "Table 5b, lambda_d : lambda_f": ("paper: MME-P, PSNR", {
        "100:1": ("100:1", "1521.4, 26.57"),
        "default": ("1:1 (default)", "1513.7, 32.48"),
        "1:100": ("1:100", "1453.0, 32.88"),
        "none": ("0:1", "817.2, 33.69")}),
    "Table 5a again, at 1:100": ("", {
        "1:100-final": ("final layer", ""),
        "1:100-uniform": ("uniform", ""),
        "1:100-progressive": ("progressive", ""),
        "1:100": ("adaptive", "")}),
    "Table 5c, decoder": ("paper: PSNR, rFID", {
        "pixel-gtb-0": ("pixel regression, no GTB", "25.12, 1.89"),
        "pixel": ("pixel regression, GTB 3", "–"),
        "gtb-0": ("pixel flow, no GTB", "30.15, 0.51"),
        "default": ("pixel flow, GTB 3 (default)", "–"),
        "gtb-6": ("pixel flow, GTB 6", "33.23, 0.26")}),
    "Fig. 4, beta and latent channels": ("", {
        "progressive": ("beta 0", ""),
        "beta-0.5": ("beta 0.5", ""),
        "beta-1": ("beta 1", ""),
        "default": ("beta 2, latent 16 (default)", ""),
        "beta-3": ("beta 3", ""),
        "beta-5": ("beta 5", ""),
        "latent-8": ("latent 8", "")}),
    "Ours: patches at t = 1 in training, the loss as a sum, longer runs": ("", {
        "default": (DEFAULT, ""),
        "endpoint-0.25": ("`--endpoint 0.25`", ""),
        "endpoint-0.5": ("`--endpoint 0.5`", ""),
        "endpoint-1": ("`--endpoint 1`", ""),
        "sum": ("eq. 5 as a sum, `--lambda_f 192`", ""),
        "1:192": ("the same as `--lambda_d 0.0052083`", ""),
        "longer": ("default, 20,000 steps", ""),
        "best": ("`--endpoint 0.9`, 16,000 steps of 256", ""),
        "best-20": ("`--endpoint 0.9`, 80,000 steps of 128", "")}),
}
LABELS = {row: label for _, rows in TABLES.values() for row, (label, _) in rows.items()}
COLUMNS = {  # title -> (key of the results, decimals)
    "PSNR": ("psnr", 2), "ssim": ("ssim", 4), "ssim_paper": ("ssim_paper", 4), "linear probe": ("linear", 2),
    "20-NN": ("knn", 2), "linear, of the latent": ("linear_latent", 2), "cosine": ("cosine", 3),
    "grid artifact": ("grid_artifact", 3)}
BETAS = {"progressive": 0, "beta-0.5": 0.5, "beta-1": 1, "default": 2, "beta-3": 3, "beta-5": 5}
ENDPOINTS = {"default": 0, "endpoint-0.25": 0.25, "endpoint-0.5": 0.5, "endpoint-1": 1}


def load(path):
    """{row name without its seed: [results, one for each seed]}. Of a row that was run again, the last results."""
    with open(path) as f:
        lines = {line["row"]: line for line in map(json.loads, f)}
    rows = {}
    for name in sorted(lines):
        rows.setdefault(name.split("@")[0], []).append(lines[name])
    return rows


def values(lines, key):
    """One value for each seed; of the cosines the mean over layers."""
    return [float(np.mean(line[key])) for line in lines]


def spread(rows, key):
    """Standard deviation between seeds, pooled over the rows that have two or more."""
    squares, freedom = 0.0, 0
    for lines in rows.values():
        x = values(lines, key)
        squares += sum((x - np.mean(x)) ** 2)
        freedom += len(x) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def cell(lines, column):
    """A column's value for each seed, as text."""
    key, digits = COLUMNS[column]
    return " / ".join(f"{x:.{digits}f}" for x in values(lines, key))


def table(header, rows):
    """The lines of a Markdown table, an empty one before it. header and rows: lists of cells."""
    lines = ["|" + "".join(f" {x} |" if x else " |" for x in cells) for cells in (header, *rows)]
    return ["", lines[0], "|---" * len(header) + "|", *lines[1:]]


def ablations(rows):
    """The lines of TABLES."""
    lines = []
    for title, (of_paper, described) in TABLES.items():
        cells = []
        for name, (label, paper) in described.items():
            measured = [cell(rows[name], column) if name in rows else "not run" for column in COLUMNS]
            cells.append([label, paper, *measured] if of_paper else [label, *measured])
        lines += table([title, of_paper, *COLUMNS] if of_paper else [title, *COLUMNS], cells)
    return lines


def references(rows):
    """Two sentences: what the figures stand beside, and how much two seeds differ."""
    default, pca = rows["default"][0], rows["default"][0]["pca"]
    keep = {name: lines for name, lines in rows.items() if min(values(lines, "linear")) > 50}
    lose = {name: lines for name, lines in rows.items() if name not in keep}
    return ["", f"Teacher: linear probe {default['linear_teacher']:.2f}, 20-NN {default['knn_teacher']:.2f}. PCA, "
            f"16 components per patch: PSNR {pca['psnr']:.2f}, ssim {pca['ssim']:.4f}, ssim_paper "
            f"{pca['ssim_paper']:.4f}.",
            "Standard deviation between two seeds, pooled over the rows that have both: PSNR "
            f"{spread(rows, 'psnr'):.2f} dB; linear probe {spread(keep, 'linear'):.2f}, 20-NN "
            f"{spread(keep, 'knn'):.2f} points where the probe stays above 50%, {spread(lose, 'linear'):.2f} and "
            f"{spread(lose, 'knn'):.2f} below."]


def text(rows, short):
    """All tables, as Markdown. short: the rows of an earlier, shorter study."""
    lines = ablations(rows) + references(rows)
    first = {name: of_seeds[0] for name, of_seeds in rows.items()}
    cells = [[LABELS[name], f"{x['psnr']:.2f}", *(f"{psnr:.2f}" for psnr in x["psnr_steps"].values())]
             for name, x in first.items() if x["psnr_steps"]]
    lines += table(["PSNR, seed 0, decoded in", "1 step", "2", "4", "25"], cells)
    for name in "default", "longer":
        if name in first:
            seen = first[name]["psnr_seen"]
            title = f"PSNR of 512 images in training, {LABELS[name]}, at step"
            lines += table([title, *seen], [["", *(f"{psnr:.2f}" for psnr in seen.values())]])
    columns = "PSNR", "linear probe", "20-NN"
    cells = [[name, *(cell(of_seeds, column) for column in columns)] for name, of_seeds in short.items()]
    lines += table(["after 2,500 steps of 256", *columns], cells)
    return "\n".join(lines) + "\n\n"


def curves(rows, setting, xlabel, path):
    """PSNR and linear probe over a setting, {row: number}: a point for each seed, a line through their means."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    done = {name: x for name, x in setting.items() if name in rows}
    for ax, key, label, span in (left, "psnr", "one-step PSNR, dB", 1.5), (right, "linear", "linear probe, %", 6):
        found = {name: values(rows[name], key) for name in done}
        ax.plot(*zip(*[(x, y) for name, x in done.items() for y in found[name]]), "o")
        ax.plot(list(done.values()), [np.mean(y) for y in found.values()], "-", color="C0")
        low, high = ax.get_ylim()
        middle, half = (low + high) / 2, max(high - low, span) / 2  # a wide axis, or noise looks like a trend
        ax.set(xlabel=xlabel, ylabel=label, ylim=(middle - half, middle + half))
    right.axhline(rows["default"][0]["linear_teacher"], color="grey", ls="--", label="teacher")
    right.legend()
    figure.savefig(path, dpi=80)


def layers(path, out):
    """Distances and weights of the layers over the steps of the default row (Fig. 16)."""
    with open(path) as f:
        log = [x for x in map(json.loads, f) if "alpha" in x]
    steps = [x["step"] for x in log]
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, key, label in (left, "alpha", "distance alpha"), (right, "weight", "weight w"):
        lines = np.array([x[key] for x in log]).T  # (L, steps)
        for layer, colour in enumerate(colormaps["viridis"](np.linspace(0, 1, len(lines)))):
            label_of_layer = f"layer {layer + 1}" if layer % 11 == 0 else None
            ax.plot(steps, lines[layer], color=colour, label=label_of_layer)
        ax.set(xlabel="step", ylabel=label)
    left.set_yscale("log")
    left.legend()
    figure.savefig(out, dpi=80)


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    rows, short = (load(os.path.join(HERE, name)) for name in ("results.jsonl", "results-short.jsonl"))
    replace_between(os.path.join(HERE, "README.md"), *MARKS, text(rows, short))
    curves(rows, BETAS, "beta", os.path.join(HERE, "beta.png"))
    curves(rows, ENDPOINTS, "fraction of patches at t = 1", os.path.join(HERE, "endpoint.png"))
    layers(os.path.join(HERE, "log-default.jsonl"), os.path.join(HERE, "layers.png"))


if __name__ == "__main__":
    run_command(main, "experiments.tiny_imagenet.tables")
