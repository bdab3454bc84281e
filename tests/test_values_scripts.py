"""Values that the scripts pass on or say: counts, defaults, hints, rFID's reference."""
from tests.helpers import (
    MICRO_VIT, QuickInception, evaluate, micro_teacher, picture, picture_folder, raises, same_weights,
    tokenizer_file, train_quietly)

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import tempfile
import unittest.mock
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

import data
import decoder
import encoder
import eval as evaluation
import tools.fid as fid_command
import tools.run as running
import tools.script as script
from tools import convert, pictures, recipes

patch = unittest.mock.patch


def test_perfect_pictures_are_counted_exactly():
    """One of 49: the mean of 49 values of which one is 1, times 49, is a little less than 1. Then 3 of 49, and none."""
    grey = lambda self, latent, steps, noise: torch.full((len(latent), 3, 16, 16), 128 / 255)
    with tempfile.TemporaryDirectory() as tmp, patch.object(decoder.Decoder, "decode", grey):
        weights, folder = tokenizer_file(tmp), os.path.join(tmp, "pictures")
        os.makedirs(folder)
        for perfect in [5], [0, 7, 48], []:
            for n in range(49):
                Image.new("RGB", (16, 16), (128 if n in perfect else 118,) * 3).save(os.path.join(folder, f"{n}.png"))
            said, report = evaluate("--data", folder, "--weights", weights, "--inception", "none", "--workers", 0)
            row, n = report["results"]["tokenizer"], len(perfect)
            # off by ten: 20 log10(25.5) = 28.1308 dB
            assert abs(row["psnr"] - (100 * n + 28.1308 * (49 - n)) / 49) < 1e-4 and row["perfect"] == n, row
            assert (f"tokenizer: {n} of 49 pictures equal" in said) == (n > 0) == ("pictures equal" in said), said


@patch.object(evaluation, "InceptionV3", QuickInception)
@torch.no_grad()
def test_rfid_at_256_compares_with_the_original_at_256():
    """rFID by numpy: pools of what came out, resized, and of crops of the originals that never were 16 pixels wide."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=5)
        flags = ["--data", folder, "--weights", weights, "--inception", weights, "--workers", 0]
        small = torch.stack([x for x, _ in data.ImageDataset(folder, 16, train=False)]) / 255
        enc, dec = encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights)
        rec = dec.decode(enc.encode(small), 1, evaluation.image_noise(range(5), 16, 48))
        rec = [Image.fromarray(x) for x in (rec * 255).round().byte().permute(0, 2, 3, 1).numpy()]
        paths = sorted(os.path.join(folder, f"class{k % 2}", f"{k}.png") for k in range(5))
        for size, extra in (16, []), (256, ["--resolution", 256]):
            resized = [x.resize((size, size), Image.Resampling.BICUBIC) if size > 16 else x for x in rec]
            pictures = [data.center_crop(Image.open(path).convert("RGB"), size) for path in paths], resized
            pools = [QuickInception(None)(torch.tensor(np.stack(x)).permute(0, 3, 1, 2) / 255)[0].double().numpy()
                     for x in pictures]
            (a, b), (u, v) = [x - x.mean(0) for x in pools], [x.mean(0) for x in pools]
            # tr (A'A B'B)^(1/2) is the sum of the singular values of A B'
            trace = (a ** 2).sum() + (b ** 2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")
            expected = ((u - v) ** 2).sum() + trace / 4
            found = evaluate(*flags, *extra)[1]["results"]["tokenizer"]["rfid"]
            assert abs(found / expected - 1) < 1e-3, (size, found, expected)


def test_a_model_of_another_run_is_written_again():
    """A resume writes model.safetensors unless it is of this run and this step: another run's may have the same step,
    and an older one is of the same run."""
    with tempfile.TemporaryDirectory() as tmp:
        out, right = os.path.join(tmp, "out"), os.path.join(tmp, "right.safetensors")
        train = lambda: train_quietly("--teacher", micro_teacher(tmp), "--out", out, "--steps", 2)
        path = os.path.join(out, "model.safetensors")
        train()
        shutil.copy(path, right)
        config, nothing = encoder.read_config(right), {k: 0 * x for k, x in load_file(right).items()}
        for other in {"id": "another"}, {"step": 1}:
            encoder.write_model(path, {**config, **other}, {**nothing, "latent_std": torch.ones(8)})
            assert "not of that step" in train(), other
            assert encoder.read_config(path) == config and same_weights(path, right), other
        stamp = os.stat(path).st_mtime_ns
        assert "not of that step" not in train() and os.stat(path).st_mtime_ns == stamp, "one that is right stays"


def test_crops_of_one_scale_are_allowed():
    for scale in (1.0, 1.0), (0.5, 0.5), (0.001, 1.0):
        assert recipes.parse_args(["--crop_scale", *map(str, scale)]).crop_scale == list(scale)
    for scale in (0.0, 0.0), (-0.5, 0.5), (0.5, 1.001), (0.51, 0.5):
        with contextlib.redirect_stderr(io.StringIO()):
            raises(SystemExit, recipes.parse_args, ["--crop_scale", *map(str, scale)])


def test_a_wide_teacher_has_a_wide_flow_head():
    """As wide as the ViT, of a teacher of one's own; below 1,024 the foundation models' width stays."""
    for width, wide in (1000, 1024), (1024, 1024), (1536, 1536):
        with patch.object(recipes, "teacher_config", lambda path: replace(MICRO_VIT, width=width)):
            assert recipes.parse_args(["--teacher", "own.safetensors"]).flow_width == wide


def test_ranks_must_see_one_checkpoint():
    """Rank 1 beside a rank 0 that sees the same state.pt, another step's, another run's, or none."""
    with tempfile.TemporaryDirectory() as tmp, patch.dict(os.environ, RANK="1", WORLD_SIZE="2"):
        run, args, path = running.Run(tmp), argparse.Namespace(resume_anyway=False), os.path.join(tmp, "state.pt")
        there = {"id": "a", "step": 3, "args": {}}
        for state, theirs, same in ((there, ["a", 3], True), (there, ["a", 2], False), (there, ["b", 3], False),
                                    (there, [None, 0], False), (None, [None, 0], True), (None, ["a", 3], False)):
            if state:
                torch.save(state, path)
            elif os.path.exists(path):
                os.remove(path)

            def broadcast(first, group):
                first[0] = theirs
            load = lambda: run.load(["id", "step", "args"], args, set())
            with patch.object(dist, "broadcast_object_list", broadcast):
                if same:
                    assert load() == state
                else:
                    raises(encoder.UserError, load, words=["rank 1 sees another", path])


@patch.object(evaluation, "InceptionV3", QuickInception)
def test_images_of_several_sizes_are_named_by_width_and_height():
    with tempfile.TemporaryDirectory() as tmp:
        for name, size in ("a", (40, 30)), ("b", (40, 30)), ("c", (20, 36)):
            picture(0, *size).save(os.path.join(tmp, name + ".png"))
        path = os.path.join(tmp, "c.png")
        raises(evaluation.UserError, evaluate, "--fid", tmp, tmp, "--inception", path, "--workers", 0,
               words=f"1 of 3 images cannot be used, so there are no figures: {path} is 20x36, the first is 40x30:")


def test_statistics_of_shapes_that_are_no_gaussian():
    """A mean and a square covariance of as many features, in any floating type, and nothing else."""
    mu, sigma = np.arange(3.0), np.eye(3)
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "s.npz")
        np.savez(path, mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
        found = fid_command.read_npz(path)
        assert all(np.array_equal(a, b) and a.dtype == np.float64 for a, b in zip(found, (mu, sigma), strict=True))
        for wrong in (mu[None], sigma), (mu, sigma[:2]), (mu, sigma[:, :2]), (mu[:2], sigma), (mu, mu), (sigma, sigma):
            np.savez(path, mu=wrong[0], sigma=wrong[1])
            raises(evaluation.UserError, fid_command.read_npz, path, words=[path, "they must be (D,) and (D, D)"])


def test_the_commit_is_that_of_the_code():
    """Not of the folder that a script is started in; "unknown" outside a checkout, and where there is no git."""
    with tempfile.TemporaryDirectory() as tmp:
        env = {"GIT_CEILING_DIRECTORIES": os.path.realpath(tmp), "GIT_CONFIG_GLOBAL": os.devnull}
        with patch.dict(os.environ, env), patch.object(script, "TOP", os.path.join(tmp, "code")):
            os.makedirs(script.TOP)
            assert script.commit() == "unknown"
            git = lambda *words: subprocess.run(
                ["git", "-C", script.TOP, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, text=True,
                capture_output=True).stdout.strip()
            git("init", "-q")
            open(os.path.join(script.TOP, "file"), "w").write("1")
            git("add", "."), git("commit", "-qm", "one")
            whole, found = git("rev-parse", "HEAD"), script.commit()
            assert len(found) >= 7 and whole.startswith(found), (whole, found)
            open(os.path.join(script.TOP, "file"), "w").write("2")
            assert script.commit() == found + "-dirty"
            with patch.dict(os.environ, PATH=tmp):
                assert script.commit() == "unknown"


def test_only_a_run_found_unasked_is_explained():
    shipped = script.SHIPPED
    assert script.name_weights(None, shipped) == shipped
    for named in "x", script.RUNS_FILE:
        assert script.name_weights(named, named) == named
    assert script.name_weights(None, script.RUNS_FILE) == (
        f"out/model.safetensors (there is no --weights; the shipped tokenizer is --weights {shipped})")


def test_a_released_file_is_converted_once_and_again_when_it_changes():
    """The authors' file is told by size and time: either alone may stay the same where the file is another. Where the
    conversion is there already nothing is locked; where another process made it meanwhile, it is not made again."""
    def converted(path, out):
        made.append(open(path).read())
        open(out, "w").write(made[-1])

    @contextlib.contextmanager
    def locked(out):
        locks.append(out)
        if content == "theirs":
            open(out, "w").write(content)
        yield
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stderr(io.StringIO()) as said, \
            patch.object(torch.hub, "get_dir", lambda: tmp), \
            patch.multiple(convert, from_released=converted, locked=locked):
        path, made, locks = os.path.join(tmp, "authors.safetensors"), [], []
        os.makedirs(os.path.join(tmp, "checkpoints"))
        for content, time in ("one", 10), ("two", 20), ("three", 20), ("theirs", 30):
            for again in range(2):
                open(path, "w").write(content)
                os.utime(path, ns=(time, time))
                assert open(convert.convert_once(path)).read() == content, (content, again)
        assert made == ["one", "two", "three"] and said.getvalue().count("converting it, once") == 3
        assert len(locks) == len(set(locks)) == 4, locks


def test_results_have_names_of_255_bytes_at_most():
    """_recon.png takes 10 of them, and a number 2; a letter may take several, and is never cut in two."""
    for name, first, second in (("n" * 245, "n" * 245, "n" * 243 + "_2"), ("n" * 300, "n" * 245, "n" * 243 + "_2"),
                                ("é" * 122, "é" * 122, "é" * 121 + "_2"),
                                ("é" * 200, "é" * 122, "é" * 121 + "_2"),
                                ("n" + "中" * 200, "n" + "中" * 81, "n" + "中" * 80 + "_2"), ("a", "a", "a_2")):
        taken = set()
        for expected in first, second:
            assert pictures.free_path("results", name, "_recon.png", taken) == os.path.join("results", expected), name
        assert len(taken) == 2
