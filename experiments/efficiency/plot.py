"""PSNR over GPU time, the paper's recipe against ours, into psnr.png: python -m experiments.efficiency.plot"""
import os

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.efficiency.tables import HERE, best, by_setting, gpu_seconds, load

PANELS = {  # title -> {setting: (colour, label)}; the first is the line to beat
    "tiny, 64 px": {"tiny:paper@2": ("C3", "paper"), "tiny:paper-decay": ("C7", "paper, falling rate"),
                    "tiny:fast@1/4": ("C0", "fast, four lengths"), "tiny:fast@1/3": ("C0", None),
                    "tiny:fast@1/2": ("C0", None), "tiny:fast": ("C0", None)},
    "small, 64 px": {"small:paper": ("C3", "paper"), "small:fast@1/4=0.001": ("C0", "fast, two lengths"),
                     "small:fast@1/3=0.001": ("C0", None)},
    "tiny, 256 px": {"photos:paper@2": ("C3", "paper"), "photos:base=0.001": ("C1", "base: full size all along"),
                     "photos:growfast@1/4=0.001": ("C0", "fast, two lengths: its part at 256 px"),
                     "photos:growfast@1/2=0.001": ("C0", None)},
}


def points(line, speeds):
    """(GPU seconds, PSNR) of a row while it trained; of the last stage, as others are measured at their size."""
    *before, last = gpu_seconds(line, speeds)
    n = len(before)
    return [(sum(before) + last * step / line["steps"][n], psnr) for stage, step, psnr in line["curve"] if stage == n]


def main():
    settings, speeds = by_setting(load("results.jsonl")), {x["shape"]: x["seconds"] for x in load("speeds.jsonl")}
    figure = Figure(figsize=(13, 4), layout="constrained")
    for ax, (title, names) in zip(figure.subplots(1, 3), PANELS.items()):
        for name, (colour, label) in names.items():
            for line, style in zip(best(settings, name), ("-", "--")):
                curve = points(line, speeds)
                ax.plot(*zip(*curve), style, color=colour, label=label if style == "-" else None)
                ax.plot(*curve[-1], "o", color=colour)
        paper = best(settings, next(iter(names)))
        final = sum(points(line, speeds)[-1][1] for line in paper) / len(paper)
        ax.axhline(final, color="C3", lw=0.8, ls=":")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(title=title, xlabel="seconds of one H200", ylabel="one-step PSNR, dB", ylim=(final - 5, None))
        ax.legend(loc="lower right", fontsize=8)
    figure.savefig(os.path.join(HERE, "psnr.png"), dpi=80)


if __name__ == "__main__":
    main()
