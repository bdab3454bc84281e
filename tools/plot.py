"""Draw the curves of one or several training runs into a picture, also while they run.

    python -m tools.plot out/                          # writes out/curves.png
    python -m tools.plot out/a out/b --out both.png    # a colour each

Read from each folder's log.jsonl: the two losses, the one-step PSNR of every evaluation, the learning rate, the
gradient norm, and alpha, the distance to the teacher (eq. 1), of every layer. Needs matplotlib (requirements-test.txt).
"""
import argparse
import json
import os
import sys


def read_log(folder):
    """The lines of a run's log: (training lines, evaluation lines), each a list of dicts in the order of their steps.

    A line that is being written, the last without an end, is left out. Raises ValueError where there is no log, or it
    holds no training line yet.
    """
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give the folder that train.py wrote to (--out)")
    with open(path) as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    training = [x for x in lines if "loss" in x]
    if not training:
        raise ValueError(f"{path} has no training line yet: wait for --log_every steps")
    return training, [x for x in lines if x.get("kind") == "eval"]


def draw(folders):
    """A matplotlib figure of the runs in `folders`: five panels that they share, and one of alpha for each run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    runs = {folder: read_log(folder) for folder in folders}
    above = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    names = [os.path.relpath(folder, above).encode(errors="backslashreplace").decode() for folder in folders]
    names = [name.replace("$", r"\$") for name in names]  # which begins a formula
    panels = [("loss_flow", "flow loss"), ("loss_dist", "distillation loss"), ("psnr", "one-step PSNR in dB"),
              ("lr", "learning rate"), ("grad_norm", "gradient norm, before clipping")]
    rows = -(-(len(panels) + len(runs)) // 3)
    figure = Figure(figsize=(15, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3).flatten()
    for axis, (key, title) in zip(axes, panels):
        for name, (training, evaluations) in zip(names, runs.values()):
            lines = evaluations if key == "psnr" else training
            points = [(x["step"], x[key]) for x in lines if x.get(key) is not None]
            axis.plot(*zip(*points) if points else ([], []), marker="." if key == "psnr" else "", label=name)
        axis.set(title=title, xlabel="step")
        if key in ("loss_flow", "loss_dist", "grad_norm") and any(x[key] for run in runs.values() for x in run[0]):
            axis.set_yscale("log")
    axes[0].legend()
    for axis, name, (training, _) in zip(axes[len(panels):], names, runs.values()):
        L = len(training[0]["alpha"])
        for l in range(L):
            axis.plot([x["step"] for x in training], [x["alpha"][l] for x in training],
                      color=colormaps["viridis"](l / max(L - 1, 1)),
                      label=f"layer {l + 1}" if l in (0, L - 1) else None)
        axis.set(title=f"alpha of each layer: {name}", xlabel="step")
        axis.legend()
    for axis in axes[len(panels) + len(runs):]:
        axis.set_visible(False)
    return figure


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no text; that of stderr is so
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
