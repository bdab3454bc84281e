"""Tables and plots of results.jsonl: python experiments/tiny_imagenet/tables.py

Prints the tables that README.md beside this file shows, and writes layers.png (the paper's Fig. 16: weights and distances of all
layers in training, from log-default.jsonl), beta.png (Fig. 4) and endpoint.png. Needs matplotlib.
"""
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
TABLES = {
    "Table 5a, distillation strategy": ["final", "uniform", "progressive", "default", "none"],
    "Table 5b, lambda_d : lambda_f": ["100:1", "default", "1:100", "none"],
    "Table 5c, decoder": ["pixel", "gtb-0", "default", "gtb-6"],
    "Fig. 4, beta and latent channels": ["progressive", "beta-0.5", "beta-1", "default", "beta-3", "beta-5", "latent-8"],
    "Ours, times at t = 1, and the loss as a sum": ["default", "endpoint-0.25", "endpoint-0.5", "endpoint-1", "sum"],
}


def load(path):
    """{row name without its seed: [results, one for each seed]}."""
    rows = {}
    with open(path) as f:
        lines = {line["row"]: line for line in map(json.loads, f)}  # the last one of a row that was run again
    for name, line in lines.items():
        rows.setdefault(name.split("@")[0], []).append(line)
    return rows


def cell(lines, key, digits=2):
    """One value for each seed, of the lines that have it; key is a name or a function of a line."""
    value = key if callable(key) else lambda x: x[key]
    return " / ".join(f"{value(x):.{digits}f}" for x in lines if "psnr" in x or key is seen) or "–"


def seen(line):
    """What train.py itself saw last: the one-step PSNR of the first 512 validation images."""
    return list(line["psnr_seen"].values())[-1]


def table(rows, names):
    yield "| row | PSNR of 512 | PSNR | ssim | ssim_paper | linear probe | 20-NN | mean cosine | linear, latent | grid artifact |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in names:
        if name not in rows:
            yield f"| {name} | not run | | | | | | | | |"
            continue
        r = rows[name]
        yield (f"| {name} | {cell(r, seen)} | {cell(r, 'psnr')} | {cell(r, 'ssim', 4)} | {cell(r, 'ssim_paper', 4)} | {cell(r, 'linear')} | {cell(r, 'knn')} | "
               f"{cell(r, lambda x: np.mean(x['cosine']), 3)} | {cell(r, 'linear_latent')} | {cell(r, 'grid_artifact', 3)} |")


def curves(rows, names, xs, xlabel, path):
    """PSNR and linear probe over a setting, a point for each seed."""
    rows = {name: [x for x in lines if "psnr" in x] for name, lines in rows.items()}
    if sum(bool(rows.get(name)) for name in names) < 3:
        return print(f"{path}: fewer than three points, not drawn")
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for ax, key, label in (left, "psnr", "one-step PSNR, dB"), (right, "linear", "linear probe, %"):
        points = [(x, line[key]) for x, name in zip(xs, names) for line in rows.get(name, [])]
        ax.plot(*zip(*points), "o")
        means = [(x, np.mean([line[key] for line in rows[name]])) for x, name in zip(xs, names) if rows.get(name)]
        ax.plot(*zip(*means), "-", color="C0")
        ax.set(xlabel=xlabel, ylabel=label)
    right.axhline(rows["default"][0]["linear_teacher"], color="grey", ls="--", label="teacher")
    right.legend()
    fig.savefig(path, dpi=80)


def layers(path, out):
    """Weights and distances of the layers over the steps of the default row (Fig. 16)."""
    with open(path) as f:
        log = [x for x in map(json.loads, f) if "alpha" in x]
    steps = [x["step"] for x in log]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for ax, key, label in (axes[0], "alpha", "distance alpha"), (axes[1], "weight", "weight w"):
        values = np.array([x[key] for x in log])  # (steps, L)
        for layer, colour in enumerate(plt.cm.viridis(np.linspace(0, 1, values.shape[1]))):
            ax.plot(steps, values[:, layer], color=colour, label=f"layer {layer + 1}" if layer % 11 == 0 else None)
        ax.set(xlabel="step", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].legend()
    fig.savefig(out, dpi=80)


def main():
    rows = load(os.path.join(HERE, "results.jsonl"))
    default = rows["default"][0]
    for title, names in TABLES.items():
        print(f"**{title}**\n")
        print("\n".join(table(rows, names)) + "\n")
    pca = default["pca"]
    print(f"teacher: linear probe {default['linear_teacher']:.2f}, 20-NN {default['knn_teacher']:.2f}; PCA of 16 components per patch: "
          f"PSNR {pca['psnr']:.2f}, ssim {pca['ssim']:.4f}, ssim_paper {pca['ssim_paper']:.4f}\n")
    print("| PSNR decoded in | 1 step | 2 | 4 | 25 |\n|---|---|---|---|---|")
    for name, r in rows.items():
        if r[0].get("psnr_steps"):
            print(f"| {name} | {r[0]['psnr']:.2f} | " + " | ".join(f"{x:.2f}" for x in r[0]["psnr_steps"].values()) + " |")
    print("\n| PSNR of the row 'default' at step | " + " | ".join(default["psnr_seen"]) + " |\n|---" + "|---" * len(default["psnr_seen"]) + "|")
    print("| | " + " | ".join(f"{x:.2f}" for x in default["psnr_seen"].values()) + " |")
    betas, endpoints = [0, 0.5, 1, 2, 3, 5], [0, 0.25, 0.5, 1]
    curves(rows, ["progressive", "beta-0.5", "beta-1", "default", "beta-3", "beta-5"], betas, "beta", os.path.join(HERE, "beta.png"))
    curves(rows, ["default", "endpoint-0.25", "endpoint-0.5", "endpoint-1"], endpoints, "fraction of patches at t = 1", os.path.join(HERE, "endpoint.png"))
    layers(os.path.join(HERE, "log-default.jsonl"), os.path.join(HERE, "layers.png"))


if __name__ == "__main__":
    main()
