"""Commands of README.md and docs/, the benches, the rows of the study."""
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import unittest.mock

# first: tests.helpers sets the environment that torch reads when it is imported
from tests.helpers import (
    HERE, MICRO_RUN, QuickInception, micro_teacher, picture, picture_folder, raises, run, tokenizer_file, train_quietly)

import numpy as np
from PIL import Image

import data
import decoder
import encoder
import eval as evaluation
import sample
import train
from experiments.tiny_imagenet import study, tables
from tools import convert, latents


@unittest.mock.patch.object(evaluation, "InceptionV3", QuickInception)
def test_readme_commands():
    """Commands of README.md and docs/ that train must parse; those that sample or evaluate and the examples must run.

    test_ranks_and_accumulation_give_one_run, slow_first_command and CI run commands like those that train.
    """
    pages = ["README.md", *(f"docs/{name}.md" for name in ("evaluation", "training"))]
    text = "\n".join(open(os.path.join(HERE, page)).read() for page in pages)
    scripts = {"train.py": train, "sample.py": sample, "eval.py": evaluation, "tools.latents": latents,
               "tools.convert": convert}
    lines = [line.split("#")[0] for block in re.findall(r"```sh\n(.*?)```", text, re.S)
             for line in block.replace("\\\n", " ").splitlines()]
    commands = [c.removesuffix("&").split() for line in lines for c in map(str.strip, line.split("&&"))
                if any(s in c for s in scripts)]
    assert len(commands) >= 20, f"only {len(commands)} commands found in {pages}"
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as tmp:
        folder, archive = picture_folder(tmp, n=3)
        os.renames(picture_folder(os.path.join(tmp, "more"), n=20)[1], os.path.join(tmp, "train.zip"))
        train_quietly("--teacher", micro_teacher(tmp), "--steps", 1, "--data", folder, "--out",
                      os.path.join(tmp, "out", "mine"))
        shutil.copytree(os.path.join(tmp, "out", "mine"), os.path.join(tmp, "out", "pictures"))
        shutil.copy(os.path.join(tmp, "out", "mine", "model.safetensors"), os.path.join(tmp, "out"))
        # as if downloaded
        network = os.path.join(tmp, "hub", "checkpoints", os.path.basename(evaluation.INCEPTION_URL))
        os.makedirs(os.path.dirname(network)), shutil.copy(os.path.join(tmp, "out", "model.safetensors"), network)
        for name in ("val.zip", "samples.zip"):
            shutil.copy(archive, os.path.join(tmp, name))
        for name in ("photos", "imagenet/val"):
            shutil.copytree(folder, os.path.join(tmp, name))
        shutil.copytree(os.path.join(folder, "class0"), os.path.join(tmp, "samples"))
        shutil.copytree(os.path.join(HERE, "docs"), os.path.join(tmp, "docs"))
        shutil.copytree(os.path.join(HERE, "weights"), os.path.join(tmp, "weights"))
        picture(0).save(os.path.join(tmp, "photos", "x.png")), picture(1).save(os.path.join(tmp, "img.png"))
        for words in commands:
            script = next(w for w in words if w in scripts)
            flags = words[words.index(script) + 1:]
            os.chdir(tmp)
            try:
                getattr(scripts[script], "parse_args", list)(flags)  # convert.py parses in its main
            except SystemExit as e:
                raise AssertionError(f"README: {' '.join(words)!r} does not parse") from e
            finally:
                os.chdir(before)
            if script != "train.py" and "uniflow-internvit" not in flags:
                os.chdir(tmp)
                try:
                    with (unittest.mock.patch.dict(os.environ, TORCH_HOME=tmp),
                          contextlib.redirect_stdout(io.StringIO())):
                        assert scripts[script].main(flags) != 1, "a picture was not read"
                except Exception as e:
                    raise AssertionError(f"README: {' '.join(words)}") from e
                finally:
                    os.chdir(before)
        open(os.path.join(tmp, "wandb.py"), "w").write("def init(project): pass\ndef log(line, step): pass\n")
        for code in re.findall(r"```python\n(.*?)```", text, re.S):
            open(os.path.join(tmp, "example.py"), "w").write(code)
            done = run("python", "example.py", cwd=tmp)
            assert done.returncode == 0, f"README example:\n{code}\n{done.stderr}"
    for script in scripts:
        assert "usage" in run("python", *(["-m"] if script.startswith("tools") else []), script, "--help").stdout


def slow_first_command():
    """The README's first command, as it stands: about three minutes on two cores, then a simple picture at 18 dB or
    more. By name only: python test_all.py slow_first_command"""
    with tempfile.TemporaryDirectory() as tmp:
        start = time.time()
        done = run(sys.executable, os.path.join(HERE, "train.py"), cwd=tmp, OMP_NUM_THREADS=str(os.cpu_count()))
        print(done.stdout.splitlines()[-2], f"({time.time() - start:.0f} s)")
        assert done.returncode == 0 and time.time() - start < 300, done.stderr
        pen = Image.new("RGB", (200, 150), (230, 210, 160))
        pen.paste((60, 110, 190), (60, 40, 140, 110))
        pen.save(os.path.join(tmp, "simple.png"))
        line = run("python", os.path.join(HERE, "sample.py"), "simple.png", cwd=tmp).stdout
        print(line.splitlines()[-1])
        assert float(re.search(r"PSNR ([\d.]+)", line)[1]) >= 18


def test_benches_print_consistent_figures():
    with tempfile.TemporaryDirectory() as tmp:
        _, archive = picture_folder(tmp)
        text = run("python", "-m", "tools.speed", "train", "--teacher", micro_teacher(tmp), *MICRO_RUN,
                   "--micro_batch", 4, "--out", os.path.join(tmp, "out")).stdout
        rows = re.findall(r"^ *(\d+) x 1.*?\| +([\d.,]+) img/s \| +([\d.]+) ms", text, re.M)
        assert {int(row[0]) for row in rows} == {1, 2, 4, 8} and "teacher" in text and "checkpoint" in text, text
        for micro, rate, ms in rows:
            assert abs(float(rate.replace(",", "")) * float(ms) / 1e3 / int(micro) - 1) < 0.05, (
                f"img/s times seconds is the micro-batch: {text}")
        assert not os.path.exists(os.path.join(tmp, "out")), "measuring leaves no run behind"
        train_quietly("--teacher", micro_teacher(tmp), *MICRO_RUN, "--steps", 1, "--out", os.path.join(tmp, "out"))
        text = run("python", "-m", "tools.speed", "sample", "--weights",
                   os.path.join(tmp, "out", "model.safetensors")).stdout
        assert "encode + decode" in text and "decode in 2 steps" in text and "RANDOM" not in text, text
        text = run("python", "-m", "tools.speed", "data", archive, "--size", 16, "--seconds", 0.2).stdout
        assert "10 images at 16 px" in text and "1 workers" in text, text


def test_study_rows_are_commands():
    """Every row of the study differs from the default by its flags alone, and every result belongs to a row.

    The grid artifact is computed again by plain loops.
    """
    parsed = {name: vars(train.parse_args(f"--data x {study.ALWAYS} {flags}".split()))
              for name, flags in study.ROWS.items()}
    differ = {name: {k for k in args if args[k] != parsed["default"][k]} for name, args in parsed.items()}
    assert (differ["default"] == set() and differ["gtb-0"] == {"gtb_depth"}
            and differ["sum@1"] == {"lambda_f", "seed"}), differ
    of_two = ("default", "best", "best-20", "pixel-gtb-0", "1:100-final", "1:100-uniform", "1:100-progressive")
    assert all(len(d) == 1 for name, d in differ.items() if name not in of_two and "@" not in name), differ
    with open(study.__file__.replace("study.py", "results.jsonl")) as f:
        for line in map(json.loads, f):
            # they are older than recipes
            flags = vars(train.parse_args(f"--data x --recipe paper {line['flags']}".split()))
            output = "log_every", "eval_every"
            assert {k for k in flags if flags[k] != parsed[line["row"]][k]}.issubset(output), line["row"]
            if line["row"] == "longer":
                decimals = ("psnr", 2), ("ssim", 4), ("ssim_paper", 4), ("linear", 2)
                row = "| default, 20,000 steps |" + "".join(f" {line[k]:.{d}f} |" for k, d in decimals)
    with tempfile.TemporaryDirectory() as tmp:
        for name in ("results.jsonl", "results-short.jsonl", "log-default.jsonl", "README.md"):
            shutil.copy(study.__file__.replace("study.py", name), tmp)
        shown = open(os.path.join(tmp, "README.md")).read()
        with unittest.mock.patch.object(tables, "HERE", tmp):
            tables.main([])
        assert row in shown and open(os.path.join(tmp, "README.md")).read() == shown, (
            "README.md's tables are those of results.jsonl: run tables.py")
        assert Image.open(os.path.join(tmp, "layers.png")).size == (720, 240)
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "results.jsonl")
        open(path, "w").write("".join(json.dumps({"row": row, "psnr": x}) + "\n"
                                      for row, x in (("b", 1), ("a@1", 2), ("a", 3), ("a", 4))))
        assert ({name: tables.values(lines, "psnr") for name, lines in tables.load(path).items()}
                == {"a": [4, 2], "b": [1]}), "a row run again is no other seed"
    pair = [{"psnr": [20.0, 21.0], "cosine": [[0.5, 0.7], [0.9]]}, {"psnr": [30.0, 33.0], "cosine": [[1.0], [1.0]]}]
    rows = {i: [{key: v[seed] for key, v in row.items()} for seed in (0, 1)] for i, row in enumerate(pair)}
    assert abs(tables.spread(rows, "psnr") - math.sqrt((0.5 + 4.5) / 2)) < 1e-12  # by hand
    assert abs(tables.spread(rows, "cosine") - math.sqrt(0.045 / 2)) < 1e-12
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=2)
        enc, dec, found = (encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights),
                           study.grid_artifact(weights, [folder]))
        border, inside = [], []
        for n in range(2):
            img = data.ImageDataset(folder, 64, train=False)[n][0][None] / 255
            wrong = (dec.decode(enc.encode(img), noise=evaluation.image_noise([n], 256, 48, 0)) - img)[0]
            for y, x in itertools.product(range(64), range(64)):  # patches of 4 pixels
                (border if y % 4 in (0, 3) or x % 4 in (0, 3) else inside).append(wrong[:, y, x].square().mean().item())
        assert abs(found / (np.mean(border) / np.mean(inside)) - 1) < 1e-4


def test_study_runs_rows_side_by_side():
    """Rows that --results has are left out; the others run as this script, each on one of the GPUs. One that fails is
    named, and the others go on. Bad input is refused before anything runs."""
    with tempfile.TemporaryDirectory() as tmp:
        folder, weights = picture_folder(tmp, n=3)[0], tokenizer_file(tmp)
        results, ran = os.path.join(tmp, "results.jsonl"), {}
        open(results, "w").write(json.dumps({"row": "final"}) + "\n")
        flags = ["--data", folder, "--val", folder, "--teacher_weights", weights, "--results", results, "--runs", tmp]

        def run_module(out, module, row, *command, **variables):
            ran[row] = out, module, command, variables["CUDA_VISIBLE_DEVICES"]
            if row == "1:100":
                raise RuntimeError

        with (unittest.mock.patch.object(study, "run_module", run_module),
              contextlib.redirect_stdout(io.StringIO()) as said):
            failed = None
            try:
                study.main(["default@1", "final", "1:100", *flags, "--gpus", "5", "7", "--more", "--steps 2"])
            except SystemExit as e:
                failed = str(e)
        assert failed == "experiments.tiny_imagenet.study: these rows failed: 1:100"
        assert ran.keys() == {"default@1", "1:100"} and {gpu for *_, gpu in ran.values()} <= {"5", "7"}
        out, module, command, _ = ran["1:100"]
        assert out == os.path.join(tmp, "1-100") and os.path.isdir(out) and module == study.__name__
        assert "--more=--steps 2" in command and "--gpus" not in command
        assert "has already: final" in said.getvalue() and "default@1: done in" in said.getvalue()
        assert f"1:100: FAILED, see {out}/output.txt" in said.getvalue()
        with unittest.mock.patch.object(study, "run_module", None), contextlib.redirect_stderr(io.StringIO()) as said:
            raises(SystemExit, study.main, ["nothing", *flags], words="2")
            assert "no such rows: nothing; there are default final" in said.getvalue()
            for flag in "--data", "--val", "--teacher_weights":
                raises((data.UserError, encoder.UserError), study.main, ["default", *flags, flag, tmp + "/none"],
                       words=f"{tmp}/none: no such")
