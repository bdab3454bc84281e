"""The scripts of tools/."""
from tests.helpers import log_lines, micro_teacher, run, train_quietly  # first: it sets what torch reads when imported

import os
import tempfile

from PIL import Image

from tools import plot


def test_plot_draws_what_the_log_says():
    with tempfile.TemporaryDirectory() as tmp:
        a, b = (os.path.join(tmp, name) for name in "ab")
        for out, steps in ((a, 3), (b, 2)):
            train_quietly("--teacher", micro_teacher(tmp), "--steps", steps, "--eval_every", 1, "--out", out)
        logs = {out: log_lines(out) for out in (a, b)}
        open(os.path.join(b, "log.jsonl"), "a").write('{"step": 3, "los')  # a line that is being written
        axes = plot.draw([a, b]).axes
        for axis, key in zip(axes, ("loss_flow", "loss_dist", "psnr", "lr", "grad_norm")):
            for line, out in zip(axis.lines, (a, b), strict=True):
                steps = [1, 2, 3] if out == a else [1, 2]
                lines = [x for x in logs[out] if key in x]
                assert list(line.get_xdata()) == steps and list(line.get_ydata()) == [x[key] for x in lines], key
        layers = [x["alpha"][2] for x in log_lines(a) if "alpha" in x]  # of three
        assert len(axes[5].lines) == 3 and list(axes[5].lines[2].get_ydata()) == layers and max(layers) > 0
        done = run("python", "-m", "tools.plot", a, b, "--out", os.path.join(tmp, "both.png"))
        assert done.returncode == 0 and Image.open(os.path.join(tmp, "both.png")).size == (1200, 960), done.stderr
        odd = [os.path.join(tmp, name) for name in (os.fsdecode(b"run-\xff"), "$lr_{1}")]  # no text; a formula
        for old, new in zip((a, b), odd):
            os.rename(old, new)
        assert plot.draw(odd).axes[0].get_legend_handles_labels()[1] == [r"run-\udcff", r"\$lr_{1}"]
        done = run("python", "-m", "tools.plot", *odd, PYTHONIOENCODING="utf-8:strict")
        assert done.returncode == 0 and done.stdout.endswith("run-\\udcff/curves.png\n"), done.stderr
        assert Image.open(os.path.join(odd[0], "curves.png")).size == (1200, 960)
        done = run("python", "-m", "tools.plot", tmp)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "log.jsonl" in done.stderr
