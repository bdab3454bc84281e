"""The scripts of tools/."""
from tests.helpers import (  # first: it sets the environment that torch reads
    log_lines, micro_teacher, picture, picture_folder, raises, run, tokenizer_file, train_quietly)

import json
import os
import tempfile

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import encoder
from tools import convert, plot


def test_plot_draws_what_the_log_says():
    with tempfile.TemporaryDirectory() as tmp:
        a, b, (folder, _) = *(os.path.join(tmp, name) for name in "ab"), picture_folder(tmp, n=4)
        for out, steps in ((a, 3), (b, 2)):
            train_quietly("--teacher", micro_teacher(tmp), "--data", folder, "--steps", steps, "--eval_every", 1,
                          "--out", out)
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
        assert plot.main([a, b, "--out", os.path.join(tmp, "both.png")]) == 0  # says where it is
        assert Image.open(os.path.join(tmp, "both.png")).size == (1200, 960)
        odd = [os.path.join(tmp, name) for name in (os.fsdecode(b"run-\xff"), "$lr_{1}")]  # no text; a formula
        for old, new in zip((a, b), odd):
            os.rename(old, new)
        assert plot.draw(odd).axes[0].get_legend_handles_labels()[1] == [r"run-\udcff", r"\$lr_{1}"]
        done = run("python", "-m", "tools.plot", *odd, PYTHONIOENCODING="utf-8:strict")
        assert done.returncode == 0 and done.stdout.endswith("run-\\udcff/curves.png\n"), done.stderr
        assert Image.open(os.path.join(odd[0], "curves.png")).size == (1200, 960)
        done = run("python", "-m", "tools.plot", tmp)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "log.jsonl" in done.stderr


def test_convert_on_the_command_line():
    """hf writes the folder; what is not the authors' model is one line and exit status 2, either way."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, folder, out = tokenizer_file(tmp), os.path.join(tmp, "hf"), os.path.join(tmp, "out.safetensors")
        done = run("python", "-m", "tools.convert", "hf", weights, folder)
        assert done.returncode == 0 and done.stdout == folder + "\n", done.stderr
        config, tensors = json.load(open(os.path.join(folder, "config.json"))), load_file(weights)
        written = load_file(os.path.join(folder, "model.safetensors"))
        assert config["model_type"] == "vit" and config["hidden_size"] == 32
        assert torch.equal(written["embeddings.cls_token"], tensors["encoder.vit.cls_token"])
        broken = os.path.join(tmp, "broken.safetensors")
        save_file({"chal_proj.c_fc.weight": torch.ones(1)}, broken)
        for arguments, words in {("released", broken): "missing", ("released", weights): "missing",
                                 ("ours", weights): "cannot build", ("hf", broken): "tools.convert released",
                                 ("ours", os.path.join(tmp, "gone")): "no such file"}.items():
            raises(ValueError, convert.main, [*arguments, out], words=[arguments[1], words])
        source = os.path.join(tmp, "run", "model.safetensors")  # what train.py leaves: hf writes a file of that name
        os.makedirs(os.path.dirname(source))
        os.link(weights, source)
        blob = open(weights, "rb").read()
        for to, given, target, words in (
                ("hf", source, os.path.dirname(source), "is the file to convert"),
                ("ours", source, source, "is the file to convert"),
                ("released", broken, broken, "is the file to convert"),
                ("hf", weights, weights, "is no folder to write to"),
                ("hf", weights, os.path.join(weights, "hf"), "is no folder to write to"),
                ("ours", weights, folder, "it is a folder"),
                ("released", broken, os.path.join(tmp, "gone", "x"), f"{tmp}/gone is no folder to write to")):
            raises(encoder.UserError, convert.main, [to, given, target], words=[target, words])
            assert open(weights, "rb").read() == open(source, "rb").read() == blob, "nothing is lost"
        picture(0).save(os.path.join(tmp, "x.png"))
        for command in (["-m", "tools.convert", "released", broken, out],
                        ["sample.py", os.path.join(tmp, "x.png"), "--weights", broken, "--out", tmp]):
            done = run("python", *command, TORCH_HOME=tmp)
            said = done.stderr.splitlines()
            assert done.returncode == 2 and broken in said[-1] and "missing" in said[-1], done.stderr
            assert len(said) == (1 if "-m" in command else 2), done.stderr  # sample.py says first what it converts
        assert not os.path.exists(out)
