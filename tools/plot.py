"""Draw the curves of one or several training runs into a picture, also while they run.

    python -m tools.plot out/                          # writes out/curves.png
    python -m tools.plot out/a out/b --out both.png    # a colour each

Six panels from each folder's log.jsonl: the two losses, the one-step PSNR of every evaluation, the learning rate, the
gradient norm, and alpha, the distance to the teacher (eq. 1), of every layer. Of a run of downstream/ it draws the
loss, the rate and the norm. Needs matplotlib (requirements-test.txt).
"""
import argparse
import json
import os
import sys

PANELS = {"loss": "loss", "loss_flow": "flow loss", "loss_dist": "distillation loss", "psnr": "one-step PSNR in dB",
          "lr": "learning rate", "grad_norm": "gradient norm, before clipping"}
LOG_SCALE = "loss", "loss_flow", "loss_dist", "grad_norm"


def read_log(folder):
    """The training lines and the evaluation lines of a run's log, each a list of dicts in the order of the steps.

    A last line without its end is still being written, and is left out. Raises ValueError if there is no log, or no
    training line in it yet.
    """
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give the folder that train.py writes to (its --out)")
    with open(path) as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    training = [x for x in lines if "loss" in x]
    if not training:
        raise ValueError(f"{path} has no training line yet: wait for --log_every steps")
    return training, [x for x in lines if x.get("kind") == "eval"]


def labels(folders):
    """A name for each run: its path from the folder that all share, as text that matplotlib prints unchanged."""
    shared = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    names = [os.path.relpath(folder, shared) for folder in folders]
    return [name.encode(errors="backslashreplace").decode().replace("$", r"\$") for name in names]  # $ begins a formula


def draw(folders):
    """A matplotlib figure of the runs in `folders`: the panels that they share, and one of alpha for each run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs = dict(zip(labels(folders), map(read_log, folders)))
    lines = [x for parts in runs.values() for part in parts for x in part]
    panels = {key: title for key, title in PANELS.items() if any(x.get(key) is not None for x in lines)}
    if "loss_flow" in panels:  # of train.py, whose loss is the sum of two that are drawn
        del panels["loss"]
    layered = {name: training for name, (training, _) in runs.items() if "alpha" in training[0]}
    rows = -(-(len(panels) + len(layered)) // 3)
    figure = Figure(figsize=(15, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3).flatten()
    for axis, (key, title) in zip(axes, panels.items()):
        for name, (training, evaluations) in runs.items():
            lines = [x for x in (evaluations if key == "psnr" else training) if x.get(key) is not None]
            style = ".-" if key == "psnr" else "-"
            axis.plot([x["step"] for x in lines], [x[key] for x in lines], style, label=name)
        axis.set(title=title, xlabel="step")
        if key in LOG_SCALE and any(x.get(key) for training, _ in runs.values() for x in training):  # not all are 0
            axis.set_yscale("log")
    axes[0].legend()
    for axis, (name, training) in zip(axes[len(panels):], layered.items()):
        steps, L = [x["step"] for x in training], len(training[0]["alpha"])
        for l in range(L):
            label = f"layer {l + 1}" if l in (0, L - 1) else None  # the colours of the others lie between
            colour = colormaps["viridis"](l / max(L - 1, 1))
            axis.plot(steps, [x["alpha"][l] for x in training], color=colour, label=label)
        axis.set(title=f"alpha of each layer: {name}", xlabel="step")
        axis.legend()
    for axis in axes[len(panels) + len(layered):]:
        axis.set_visible(False)
    return figure


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text; stderr does so by itself
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of training runs, each with a log.jsonl")
    ap.add_argument("--out", metavar="FILE", help="the picture, .png or .pdf or .svg [curves.png in the first folder]")
    args = ap.parse_args(argv)
    path = args.out or os.path.join(args.folders[0], "curves.png")
    try:
        draw(args.folders).savefig(path, dpi=80)
    except (OSError, ValueError, ModuleNotFoundError) as e:  # json's errors are ValueErrors
        print(f"tools.plot: {e}" + ": pip install matplotlib" * isinstance(e, ModuleNotFoundError), file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
