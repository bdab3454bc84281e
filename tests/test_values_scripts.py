"""Values that the scripts pass on or say: counts, defaults, hints, rFID's reference."""
from tests.helpers import (
    MICRO_RUN, MICRO_VIT, QuickInception, close, evaluate, log_lines, micro_models, micro_teacher, picture,
    picture_folder, raises, refused, same_weights, sampled, tokenizer_file, train_quietly)

import argparse
import contextlib
import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest.mock
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import decoder
import distill
import encoder
import eval as evaluation
import sample
import tools.fid as fid_command
import tools.job as jobs
import tools.latents as latents
import tools.run as running
import tools.script as script
import tools.speed as speed
import tools.validate as validation
import train
from tools import batches, convert, optimizer, pictures, plot, recipes
from tools.batches import split_batch
from tools.checkpoint import explain_failed_save

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
    # one number of 196,608 is off by one: 101.07 dB count as 100, but the picture is not equal
    grey = lambda self, latent, steps, noise: torch.full((len(latent), 3, 256, 256), 128 / 255)
    with tempfile.TemporaryDirectory() as tmp, patch.object(decoder.Decoder, "decode", grey):
        off = np.full((256, 256, 3), 128, np.uint8)
        off[3, 4, 0] = 129
        os.makedirs(os.path.join(tmp, "one"))
        Image.fromarray(off).save(os.path.join(tmp, "one", "a.png"))
        said, report = evaluate("--data", os.path.join(tmp, "one"), "--weights", tokenizer_file(tmp), "--size", 256,
                                "--inception", "none", "--workers", 0)
        assert report["results"]["tokenizer"]["psnr"] == 100 and report["results"]["tokenizer"]["perfect"] == 0, said


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


def test_ranks_must_start_from_the_same_weights():
    """A number that is off by its last bit, two rows that changed places in shape, another model: each is another
    start. 0x3f800000 are the bits of 1.0."""
    sent = []
    with tempfile.TemporaryDirectory() as tmp, patch.dict(os.environ, RANK="1", WORLD_SIZE="2"):
        run = running.Run(tmp)
        model = lambda *rows: torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(x)) for x in rows])
        with patch.object(dist, "broadcast_object_list", lambda first, group: sent.append(first[0])):
            run.agree_on_weights(model([1.0, 1.0], [[0.0]]), model([2.0]))
        assert sent == [[[[2], 2 * 0x3f800000], [[1, 1], 0], [[1], 0x40000000]]]

        def broadcast(first, group):
            first[0] = sent[0]
        with patch.object(dist, "broadcast_object_list", broadcast):
            run.agree_on_weights(model([1.0, 1.0], [[0.0]]), model([2.0]))
            for others in ([1.0, 1.0000001], [[0.0]], [2.0]), ([[1.0, 1.0]], [[0.0]], [2.0]), ([1.0, 1.0], [[0.0]]):
                refused(encoder.UserError, run.agree_on_weights, model(*others),
                        says="rank 1 starts from other weights than rank 0: start all nodes by the same command, with "
                             "the same files")
        run.ranks = 1
        run.agree_on_weights(model([5.0]))


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
            refused(evaluation.UserError, fid_command.read_npz, path,
                    says=f"{path} is neither images nor statistics (UserError: mu is {wrong[0].shape}, sigma "
                    f"{wrong[1].shape}; they must be (D,) and (D, D), and finite): an .npz holds arr_0, or mu and "
                    "sigma")


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


def test_a_folder_is_no_tokenizer():
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        os.makedirs(script.RUNS_FILE)
        assert script.find_weights(None) == script.SHIPPED
        os.rmdir(script.RUNS_FILE), open(script.RUNS_FILE, "w").close()
        assert script.find_weights(None) == script.RUNS_FILE
        with patch.object(script, "SHIPPED", "gone"):
            os.remove(script.RUNS_FILE)
            refused(encoder.MissingFile, script.find_weights, None,
                    says="no tokenizer at out/model.safetensors or gone: train one with `python train.py`, or give "
                    "--weights")


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


# ---- what command lines refuse, word by word ----

def ends(parse, flags):
    """What a command line that is refused prints in its last line, after the script's name."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            raise AssertionError(f"{flags} is accepted: {parse(flags)}")
        except SystemExit as e:
            assert e.code == 2, flags
    return said.getvalue().splitlines()[-1].split(": error: ", 1)[1]


def test_every_refusal_of_eval_and_latents():
    """One thing that is wrong at a time, so that no other condition can stand in for it; and what is just allowed."""
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        os.makedirs("folder"), os.makedirs("x.npz"), open("w.safetensors", "w").close()
        alien = "--fid measures no tokenizer, and crops by --resolution 256 alone: leave out {}".format
        fitted = ("--pca and --probe need --fit PATH, images to fit them on that --data has not; --fit needs one of "
                  "the two")
        bound = "argument --{}: it is {}; it must be at least {}".format
        got = "--fid compares A and B, got {}; --fid A --save_stats FILE.npz only saves"
        for flags, words in {
                "--data x --size 0": bound("size", 0, 1), "--data x --size -8": bound("size", -8, 1),
                "--fid a b --size 0": bound("size", 0, 1),
                "--data x --seed -1": bound("seed", -1, f"0 and at most {2 ** 63 - 1}"),
                f"--data x --seed {2 ** 63}": bound("seed", 2 ** 63, f"0 and at most {2 ** 63 - 1}"),
                "--data x --batch_size 0": bound("batch_size", 0, 1), "--data x --steps 0": bound("steps", 0, 1),
                "--data x --workers -1": bound("workers", -1, 0),
                "--fid a": got.format(1), "--fid a b c": got.format(3), "--fid a b c --save_stats s": got.format(3),
                "--data x --pca": fitted, "--data x --probe": fitted, "--data x --fit y": fitted,
                "--fid a b --fit y": fitted,
                **{f"--fid a b {flags}": alien(flags.split()[0]) for flags in (
                    "--data x", "--weights w", "--size 8", "--pca --fit y", "--probe --fit y", "--bf16")},
                "--fid a b --weights w --data x": alien("--data --weights"),
                **{f"--data x {flags} --pca --fit y": "--teacher and --teacher_weights are for --probe"
                   for flags in ("--teacher tiny", "--teacher_weights random")},
                "--fid a b --inception none": "--fid needs --inception",
                "--data x --save_stats s": "--save_stats goes with --fid",
                "--fid a --save_stats s": "--save_stats s: it must end in .npz",
                **{f"{flags} {path}": f"{path} would be read and overwritten" for flags, path in {
                    "--fid a ./b.npz --save_stats": "b.npz", "--fid b.npz --save_stats": "folder/../b.npz",
                    "--data x y.zip --out": "y.zip", "--data x --pca --fit y --out": "y",
                    "--data x --weights w --out": "w", "--data x --inception i.pth --out": "./i.pth"}.items()},
                "--weights w": "--data PATH is needed: the images to measure",
                "--data x --out w.safetensors": "--out w.safetensors is the name of a weights file: the report is "
                                                "JSON, give it a name in .json",
                **{f"--fid a b --{flag} x.npz": "x.npz is a folder: give the name of a file"
                   for flag in ("out", "save_stats")},
                **{f"--fid a b --{flag} no/x.npz": "no/x.npz: there is no folder no that can be written to"
                   for flag in ("out", "save_stats")}}.items():
            assert ends(evaluation.parse_args, flags.split()) == words, flags
        for flags in (f"--data x --size 1 --seed {2 ** 63 - 1}",
                      "--data x --batch_size 1 --steps 1 --workers 0 --seed 0 --out folder/x",
                      "--fid a --save_stats s.npz", "--fid a b --save_stats folder/s.npz --seed 1 --batch_size 8",
                      "--data x --pca --fit y --out z",
                      "--data x --probe --fit y --teacher t --teacher_weights random"):
            evaluation.parse_args(flags.split())
        unwritable = "{} cannot be written: it is a folder, or {} is no folder to write to"
        for flags, words in {
                **{f"{part} --out z.safetensors --size {size}": f"argument --size: it is {size}; it must be at least 1"
                   for part in ("stats", "save") for size in (0, -8)},
                "save --out z --batch_size 0": bound("batch_size", 0, 1),
                "save --out z --workers -1": bound("workers", -1, 0),
                "stats": "stats writes into the weights file: give --weights FILE, or --out NEW.safetensors",
                "stats --out x.json": "--out x.json is a weights file, and must end in .safetensors"}.items():
            assert ends(latents.parse_args, [*flags.split(), "--data", "x"]) == words, flags
        latents.parse_args("stats --data x --out new/deep/x.safetensors".split())
        assert os.path.isdir("new/deep"), "as save and the other commands make it"
        os.makedirs("folder/x.safetensors")
        assert ends(latents.parse_args, "stats --data x --out folder/x.safetensors".split()) == unwritable.format(
            "folder/x.safetensors", "folder")
        with patch.object(os, "access", lambda path, mode: path != "folder" and os.path.isdir(path)):
            open("folder/w", "w").close()
            assert ends(latents.parse_args, "stats --data x --out folder/w/x.safetensors".split()) == (
                "--out folder/w/x.safetensors cannot be written ([Errno 17] File exists: 'folder/w')")
            assert ends(latents.parse_args, "stats --data x --weights folder/w".split()) == unwritable.format(
                "folder/w", "folder")
            latents.parse_args("stats --data x --weights folder/none".split())  # a name: the tokenizer may be published
        for flags, target in {"stats --weights w.safetensors": None, "stats --out x.safetensors": "x.safetensors",
                              "save --out z --batch_size 1 --workers 0": "z"}.items():
            args = latents.parse_args([*flags.split(), "--data", "x"])
            assert (args.target, args.out, args.bf16) == (target, None, False), flags
        for part in "save --data x --out z --size 1", "stats --data x --weights w --size 1":
            args = latents.parse_args(part.split())
            assert (args.batch_size, args.size) == (32, 1)
        assert (latents.SHARD, latents.MAPPED) == (1024, 2048)


def test_statistics_go_into_a_file_of_the_users_alone():
    """Not into the converted copy of a published tokenizer; latents are saved once a file has either statistic."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(os.path.join(tmp, "p"), 2)
        run = lambda *flags: latents.main([*flags, "--data", folder, "--workers", "0"])
        out = os.path.join(tmp, "new.safetensors")
        with patch.object(jobs, "find_weights", lambda given: weights), contextlib.redirect_stdout(io.StringIO()):
            refused(encoder.UserError, run, "stats", "--weights", "uniflow-internvit",
                    says="uniflow-internvit is no file to write into: give --out NEW.safetensors")
            run("stats", "--weights", "uniflow-internvit", "--out", out)
        assert not load_file(weights)["latent_mean"].any() and load_file(out)["latent_mean"].any()
        tensors, config = load_file(weights), encoder.read_config(weights)
        for name, value in ("latent_mean", 0.5), ("latent_std", 2.0):
            x = tensors[name].clone()
            x[3] = value
            encoder.write_model(out, {**config, "latent_images": 99}, {**tensors, name: x})
            with contextlib.redirect_stdout(io.StringIO()):
                run("save", "--weights", out, "--out", os.path.join(tmp, name))
            assert os.path.exists(os.path.join(tmp, name, "index.json"))
        before = os.path.join(tmp, "under")
        open(before, "w").close()
        refused(encoder.UserError, run, "save", "--weights", out, "--out", os.path.join(before, "z"),
                says=f"--out {before}/z is no folder to write to ([Errno 20] Not a directory: '{before}/z')")
        with contextlib.redirect_stdout(io.StringIO()):
            run("stats", "--weights", out)  # again: the count is this one's
        assert encoder.read_config(out)["latent_images"] == 2


def test_every_refusal_of_sample():
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        for_pictures = "--save_latent, --features, --size are for pictures, not latents"
        z = "z.safetensors"
        with patch.object(sys, "stdout", unittest.mock.Mock(isatty=lambda: False)):
            for flags, words in {
                    "x.png --steps 0": "argument --steps: it is 0; it must be at least 1", "x.png --seed -1":
                    "argument --seed: it is -1; it must be at least 0", "x.png --size -1":
                    "argument --size: it is -1; it must be at least 0",
                    "x.png --save_latent z.pt": "--save_latent is z.pt: its name must end in .safetensors",
                    f"{z} x.png --size 0": for_pictures, f"x.png {z} --features": for_pictures,
                    f"{z} --save_latent y.safetensors": for_pictures,
                    "x.png --features --reconstruction": "--features would put its files among the reconstructions: "
                                                         "make them in two runs",
                    "- --features": "--features writes a file beside the reconstruction's: give --out FOLDER",
                    "x --out - --features": "--features writes a file beside the reconstruction's: give --out FOLDER",
                    }.items():
                assert ends(sample.parse_args, flags.split()) == words, flags
            for flags, out in {"-": "-", "- --out x": "x", "a.png": None, "a.png --out -": "-", "a.png - b": "-",
                               "- --out x --features": "x", f"{z} --steps 1 --seed 0 --reconstruction": None,
                               "a.png --size 0": None}.items():
                assert sample.parse_args(flags.split()).out == out, flags
        closed = "standard output is closed or a terminal: redirect it (> rec.png), or give --out FOLDER"
        with patch.object(sys, "stdout", unittest.mock.Mock(isatty=lambda: True)):
            assert ends(sample.parse_args, ["-"]) == closed
            sample.parse_args(["a.png"])
        # several pictures, or a latent's name that is taken
        for name in "a.png", "b.png":
            picture(0).save(name)
        weights = tokenizer_file(tmp)
        several = "--save_latent and standard output are for one picture, not for 2 pictures"
        for flags in ["--save_latent", z], ["--out", "-"]:
            assert sampled("a.png", "b.png", "--weights", weights, *flags)[2] == several + "\n"
        # latents that do not fit, each in one way
        assert sampled("a.png", "--weights", weights, "--save_latent", z)[0] == 0
        with safe_open(z, "pt") as f:
            about = json.loads(f.metadata()["config"])
        latent = load_file(z)["latent"]
        assert latent.shape == (1, 8, 4, 6) and (about["height"], about["width"]) == (16, 21)
        start, end = f"sample.py: {z} holds ", ", expected finite float32 (frames, {}) for {} pixels\n"
        nan = latent.clone()
        nan[0, 1, 2, 3] = float("nan")
        for x, changes, words in (
                (latent.double(), {}, "torch.float64 (1, 8, 4, 6)" + end.format("8, 4, 6", "21x16")),
                (nan, {}, "torch.float32 (1, 8, 4, 6)" + end.format("8, 4, 6", "21x16")),
                (latent[:, :7], {}, "torch.float32 (1, 7, 4, 6)" + end.format("8, 4, 6", "21x16")),
                (latent[:0], {}, "torch.float32 (0, 8, 4, 6)" + end.format("8, 4, 6", "21x16")),
                (latent, {"width": 25}, "torch.float32 (1, 8, 4, 6)" + end.format("8, 4, 7", "25x16")),
                (latent, {"height": 17}, "torch.float32 (1, 8, 4, 6)" + end.format("8, 5, 6", "21x17"))):
            encoder.write_model(z, {**about, **changes}, {"latent": x})
            assert sampled(z, "--weights", weights) == (
                1, f"weights {weights}, short side 16 px, on cpu\n", start + words), words
        encoder.write_model(z, {**about, "file": {}}, {"latent": latent})
        assert sampled(z, "--weights", weights)[::2] == (
            1, f"sample.py: {z} is damaged, or no picture or latent (KeyError: 'format')\n")
        encoder.write_model(z, about, {"latent": latent})
        for limit, status in (16 * 21 / 2, 0), (16 * 21 / 2 - 1, 1):
            with patch.object(sample, "MAX_PIXELS", limit):
                assert sampled(z, "--weights", weights)[0] == status
        nothing = lambda self, latent, *rest: torch.full((len(latent), 3, 16, 24), float("nan"))
        with patch.object(decoder.Decoder, "decode", nothing):
            for file in z, "a.png":
                status, _, err = sampled(file, "--weights", weights)
                assert (status, err) == (1, f"sample.py: {file} reconstructions are not finite in 1 of 1 rows: the "
                                            "weights are damaged\n")
        encoder.write_model(z, {**about, "weights_sha256": "f" * 64}, {"latent": latent})
        own = evaluation.sha256(weights)
        assert sampled(z, "--weights", weights)[2] == (
            f"sample.py: {z} is a latent of other weights (their SHA-256 is {'f' * 12}..., that of these "
            f"{own[:12]}...): give its own with --weights\n")


def test_the_name_of_standard_input():
    """Its result and its faults are called stdin, into a folder as well as into a pipe."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, out, f = tokenizer_file(tmp), os.path.join(tmp, "out"), io.BytesIO()
        picture(0).save(f, "PNG")
        for content, status in (f.getvalue(), 0), (b"no picture", 1):
            with patch.object(sys, "stdin", argparse.Namespace(buffer=io.BytesIO(content))):
                found, said, err = sampled("-", "--weights", weights, "--out", out)
            assert found == status and os.listdir(out) == ["stdin_recon.png"], err
            assert f"{out}/stdin_recon.png: latent" in said if status == 0 else err.startswith(
                "sample.py: stdin cannot be read as an image (none of"), err


def test_whose_fault_a_picture_is():
    """One picture's: it is left out; the machine's: the run ends, except for a result that cannot be written there."""
    memory = "takes more memory than there is: give a smaller --size"
    for error, out, expected in (
            (data.UserError("why"), None, "why"), (encoder.UserError("why"), "-", "why"), (MemoryError(), None, memory),
            (torch.OutOfMemoryError("x"), "-", memory),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), None, memory),
            (RuntimeError("a bug"), None, None), (ValueError("a bug"), None, None),
            (PermissionError(errno.EACCES, "no"), "folder", "is left out ([Errno 13] no)"),
            (PermissionError(errno.EACCES, "no"), None, "is left out ([Errno 13] no)"),
            (BrokenPipeError(errno.EPIPE, "no"), "-", None), (OSError(errno.ENOSPC, "full"), None, None),
            (OSError(errno.EDQUOT, "full"), "folder", None)):
        assert sample.why_left_out(error, argparse.Namespace(out=out)) == expected, error


def test_bounds_of_trainings_numbers():
    """The last value that is allowed and the first that is not; a size that is too small for a patch."""
    for flag, good, bad, words in (
            ("beta1", "0.999999", "1", "0 and at most 0.999999"), ("beta2", "0.999999", "1", "0 and at most 0.999999"),
            ("ema", "0.999999", "1", "0 and at most 0.999999"), ("drop_path", "0.9", "0.91", "0 and at most 0.9"),
            ("lr_decay", "1", "1.01", "0 and at most 1"), ("endpoint", "1", "1.01", "0 and at most 1"),
            ("max_bad_images", "1", "1.01", "0 and at most 1"),
            ("seed", str(2 ** 63 - 1), str(2 ** 63), f"0 and at most {2 ** 63 - 1}"),
            ("beta", "0", "-0.1", "0"), ("clip", "0", "-0.1", "0"), ("warmup", "0", "-1", "0"),
            ("steps", "1", "0", "1"), ("gtb_depth", "0", "-1", "0"), ("keep_every", "0", "-1", "0"),
            ("log_every", "1", "0", "1"), ("lr", "1e308", "inf", "0 and finite"),
            ("endpoint", "1", "inf", "0 and at most 1")):
        value = getattr(recipes.parse_args([f"--{flag}", good]), flag)
        assert value == type(value)(good) and type(value) in (int, float), flag
        assert ends(recipes.parse_args, [f"--{flag}", bad]) == (
            f"argument --{flag}: it is {bad}; it must be at least {words}"), flag
    assert ends(recipes.parse_args, ["--steps", "2.5"]) == "argument --steps: invalid int value: '2.5'"
    assert ends(recipes.parse_args, ["--lr", "x"]) == "argument --lr: invalid float value: 'x'"
    for size, patch_, near, teacher in ((3, 14, 14, "internvit"), (21, 14, 28, "dinov2"), (20, 14, 14, "dinov2"),
                                        (1, 8, 8, "tiny"), (100, 16, 96, "siglip2")):
        refused(encoder.UserError, recipes.parse_args, ["--teacher", teacher, "--size", str(size)],
                says=f"--size {size} is no multiple of the patch {patch_} of teacher {teacher}: try --size {near}")
    assert ends(recipes.parse_args, ["--crop_scale", "0.5", "1.5"]) == (
        "--crop_scale is [0.5, 1.5]; it is two fractions above 0, at most 1, the smaller first")
    for init, out in ("out/model.safetensors", "out"), ("a/../x.safetensors", "."), ("x.safetensors", "a/.."):
        assert ends(recipes.parse_args, ["--init", init, "--out", out]) == (
            f"--init {init} lies in --out {out}, where this run writes its own: give another --out")
    assert recipes.parse_args(["--init", "out/a/model.safetensors", "--out", "out"]).init
    for parse, *flags in ((recipes.parse_args, "--decay_shape", "x"), (recipes.parse_args, "--decoder", "x"),
                          (recipes.parse_args, "--projector", "x"), (recipes.parse_args, "--strategy", "x"),
                          (recipes.parse_args, "--recipe", "x"), (evaluation.parse_args, "--resolution", "512")):
        assert ends(parse, flags).startswith(f"argument {flags[0]}: invalid choice: {flags[1]!r}"), flags
    assert ends(recipes.parse_args, ["--steps", "3", "--epochs", "3"]) == (
        "argument --epochs: not allowed with argument --steps")
    for given, length in ((["--epochs", "3"], (None, 3)), (["--steps", "3"], (3, None))):
        for teacher in "tiny", "internvit":
            args = recipes.parse_args(["--teacher", teacher, *given])
            assert (args.steps, args.epochs) == length, "the other length is not the default's"
    with patch.object(torch.cuda, "is_available", lambda: True), patch.object(data, "cores", lambda: 3), \
            patch.dict(os.environ, LOCAL_WORLD_SIZE="8"):
        assert recipes.parse_args([]).workers == 1


def test_batches_that_ranks_do_not_divide():
    for batch, ranks, near in (7, 3, "6 or 9"), (2, 3, "3"), (13, 4, "12 or 16"), (17, 8, "16 or 24"):
        refused(encoder.UserError, split_batch, batch, 1, ranks,
                says=f"batch_size {batch} does not divide among {ranks} ranks: try {near}")


# ---- the folder of a run ----

def test_the_list_of_pictures_that_cannot_be_read():
    """New ones come after the old, sorted, by bytes of any kind; each rank has its own list and counts its own."""
    odd = [os.fsdecode(b"caf\xe9.png"), "carriage\rreturn.png", "form\x0cfeed\x85.png", "b.png"]
    with tempfile.TemporaryDirectory() as tmp:
        for rank, name in ("0", "bad_images.txt"), ("3", "bad_images.rank3.txt"):
            with patch.dict(os.environ, RANK=rank, WORLD_SIZE="4"):
                run, path = running.Run(tmp), os.path.join(tmp, name)
                assert run.list_unreadable([]) == 0 and not os.path.exists(path)
                assert run.list_unreadable(["d.png", "c.png", "d.png"]) == 2
                assert run.list_unreadable(["a.png", "c.png", *odd]) == 5
                assert run.list_unreadable(["d.png", *odd]) == 0
                assert running.read_names(path) == ["c.png", "d.png", *sorted(["a.png", *odd])]
                assert open(path, "rb").read() == b"".join(os.fsencode(x) + b"\n" for x in running.read_names(path))


def test_a_run_from_its_folder_to_its_end():
    """The lock is let go at the end; a log that is no text is cut; the last line of a run that was interrupted; what
    is said of one that is not finite."""
    with tempfile.TemporaryDirectory() as tmp:
        out, said = os.path.join(tmp, "out"), io.StringIO()
        with contextlib.redirect_stdout(said):
            for interrupted in True, False:
                run = running.Run(out)
                run.hold_folder()
                with open(run.path("log.jsonl"), "ab") as f:
                    f.write(b'{"step": 1}\n\xff\xfe\n')
                run.open_log(1)
                run.write(step=2, loss=float("inf"), more=[{"a": float("nan")}])
                assert '"step": 2' in open(run.path("log.jsonl")).read(), "at once, not when the file is closed"
                run.end(1234, interrupted, "what is done")
                assert run.lock.closed and run.log.closed
        one = '{"step": 1}\n'
        two = '{"step": 2, "loss": null, "more": [{"a": null}]}\n'
        # the second run begins at step 1 again
        assert open(os.path.join(out, "log.jsonl")).read() == one + one + two
        assert said.getvalue() == ("interrupted and saved at step 1,234: the same command goes on from there\n"
                                   "done: what is done\n")
        run.hold_folder(), run.open_log(1)
        with contextlib.redirect_stdout(io.StringIO()):
            run.end(1234, True, "")
        assert log_lines(out)[-1] == {"kind": "interrupted", "step": 1234}
        names = [f"{k}.png" for k in range(5)]
        stopped = argparse.Namespace(step=7, faults=torch.tensor([12.0, 10.0]))
        words = (f"at step 7 the loss or its gradient is not finite, 10 steps in a row (the last finite one: flow 1); "
                 f"the last batch is 0.png, 1.png, 2.png .. (all of it in {out}/not_finite.txt). The last save is "
                 f"{out}/state.pt: the same command with a lower --lr and --resume_anyway goes on from there")
        refused(encoder.UserError, run.stop_not_finite, stopped, "flow 1", names, says=words)
        assert running.read_names(os.path.join(out, "not_finite.txt")) == names
        os.remove(os.path.join(out, "not_finite.txt"))
        with patch.dict(os.environ, RANK="1", WORLD_SIZE="2"), contextlib.redirect_stdout(io.StringIO()) as said:
            other = running.Run(os.path.join(tmp, "other"))
            other.hold_folder(), other.open_log(1), other.write(step=1), other.say("x"), other.end(1, True, "")
            refused(encoder.UserError, other.stop_not_finite, stopped, "flow 1", names,
                    says=words.replace(out, os.path.join(tmp, "other")))
            with patch.object(running, "load_checkpoint", lambda *args: None), patch.object(other, "agree"):
                with patch.object(other, "set_aside", side_effect=AssertionError("rank 0 does it")):
                    assert other.load([], None, ()) is None
        assert not os.path.exists(os.path.join(tmp, "other")) and said.getvalue() == ""
        file = os.path.join(tmp, "file")
        open(file, "w").close()
        no_folder = f"--out {file}/x is no folder to write to ([Errno 20] Not a directory: '{file}/x')"
        refused(encoder.UserError, running.Run(os.path.join(file, "x")).hold_folder, says=no_folder)
        with patch.object(train, "load_teacher", side_effect=AssertionError("a download before the folder")):
            refused(encoder.UserError, train.setup, train.parse_args(["--teacher", "tiny"]),
                    running.Run(os.path.join(file, "x")), says=no_folder)
        held = running.Run(tmp)
        for e in BlockingIOError(errno.EAGAIN, "x"), PermissionError(errno.EACCES, "x"):
            with patch.object(running.fcntl, "lockf", side_effect=e):
                refused(encoder.UserError, held.hold_folder,
                        says=f"another run is writing to {tmp}: wait for it, or use another --out")
        with patch.object(running.fcntl, "lockf", side_effect=OSError(errno.ENOLCK, "no locks")), \
                contextlib.redirect_stdout(io.StringIO()) as said:
            held.hold_folder()
        why = "[Errno 37] no locks"
        assert said.getvalue() == f"{tmp} cannot be locked ({why}): nothing keeps a second run out of it\n"
        full = OSError(errno.ENOSPC, "full")
        held.log = unittest.mock.Mock(write=unittest.mock.Mock(side_effect=full))
        refused(encoder.UserError, held.write, says=f"{tmp}/log.jsonl cannot be written ([Errno 28] full): make room, "
                                                    "and run the same command again, which goes on from the last save")

        def save(error, hidden=None):
            with explain_failed_save("state.pt", 9):
                try:
                    raise hidden or error
                except OSError:
                    raise error
        why = ("step 9 could not be saved ([Errno 28] full); state.pt, if there is one, is of the last save and whole: "
               "make room, and run the same command again")
        refused(encoder.UserError, save, full, says=why)
        refused(encoder.UserError, save, RuntimeError("unexpected pos"), full, says=why)
        refused(RuntimeError, save, RuntimeError("a bug"), says="a bug")


def test_a_copy_is_kept_though_nothing_else_is_saved():
    """--keep_every without a save at that step; as many steps as a pass has whole batches, and at least one; the time
    of what is written is no step's."""
    with tempfile.TemporaryDirectory() as tmp:
        folder, out = picture_folder(tmp, 3)[0], os.path.join(tmp, "out")
        clock, forward, replace_ = [1e9], encoder.Encoder.forward, os.replace

        def slow(self, img):
            clock[0] += 2 * (img.device.type != "meta")
            return forward(self, img)

        def slower(*args):
            clock[0] += 1000
            return replace_(*args)
        flags = ["--teacher", micro_teacher(tmp), "--data", folder, "--eval_every", 0, "--out"]
        with patch.object(encoder.Encoder, "forward", slow), patch.object(os, "replace", slower), \
                patch("time.time", lambda: clock[0]):
            train_quietly(*flags, out, "--steps", 3, "--keep_every", 2, "--save_every", 0, "--log_every", 3)
        kept = os.path.join(out, "model_0000002.safetensors")
        assert encoder.read_config(kept)["step"] == 2 and [n for n in os.listdir(out) if n.startswith("model_")] == [
            "model_0000002.safetensors"]
        timed, = (x for x in log_lines(out, timing=True) if "loss" in x)
        assert timed["step"] == 3 and timed["img_s"] == 2, "four images in two seconds"
        train_quietly(*flags, os.path.join(tmp, "short"), "--epochs", 1)  # three pictures, a batch of four
        assert [x["step"] for x in log_lines(os.path.join(tmp, "short"))] == [1, 1]


# ---- ranks, errors, jobs ----

def test_a_run_on_a_gpu_sets_it_up_and_joins_the_others():
    """Its GPU becomes the current one, and fp32 products may use TF32; gradients go by NCCL, what CPUs agree on by
    gloo. Without a GPU all goes by gloo; a process alone joins nobody."""
    did, (products, convolutions) = [], (torch.backends.cuda.matmul, torch.backends.cudnn)
    note = lambda name: lambda *args, **how: did.append((name, *args, *how.items())) or name
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    with patch.object(torch.cuda, "set_device", note("gpu")), patch.multiple(
            dist, init_process_group=note("join"), new_group=note("group")):
        for place, expected in (
                ((2, 4, gpu), [("gpu", gpu), ("join", "nccl", ("device_id", gpu)), ("group", ("backend", "gloo"))]),
                ((2, 4, cpu), [("join", "gloo", ("device_id", None)), ("group", ("backend", "gloo"))]),
                ((0, 1, gpu), [("gpu", gpu)]), ((0, 1, cpu), [])):
            did.clear()
            products.allow_tf32 = convolutions.allow_tf32 = False
            with patch.object(running, "rank_and_device", lambda: place):
                run = running.Run("out")
                run.connect()
            assert did == expected and (run.rank, run.ranks, run.device) == place
            assert products.allow_tf32 == convolutions.allow_tf32 == run.on_gpu
            assert run.on_gpu == (place[2] is gpu) and run.control == ("group" if place[1] > 1 else None)
    products.allow_tf32, convolutions.allow_tf32 = False, True  # torch's defaults


def test_a_line_that_nobody_reads_stops_the_run():
    """Each line is sent on at once; where nobody reads any more, the rest goes nowhere, and the run saves and stops."""
    with tempfile.TemporaryDirectory() as tmp:
        run, sent = running.Run(tmp), []
        for broken in None, "write", "flush":
            def fail(name, text=""):
                sent.append(name)
                if name == broken:
                    raise BrokenPipeError
            out = unittest.mock.Mock(write=lambda text: fail("write"), flush=lambda: fail("flush"))
            with patch.object(sys, "stdout", out), patch.object(running, "INTERRUPTS", []) as came, \
                    patch.object(os, "dup2") as moved:
                run.say("a line")
            assert sent[-1] == "flush" if broken != "write" else sent == ["write"], (broken, sent)
            assert came == [signal.SIGPIPE] * bool(broken) and moved.call_count == bool(broken)
            if broken:
                (null, to), = (call.args for call in moved.call_args_list)
                assert to == 1 and os.path.samestat(os.fstat(null), os.stat(os.devnull))
                os.close(null)
            sent.clear()


def test_counts_and_draws_of_a_step():
    """Counts begin at 0, sums in double precision; a step's draws are numpy's SeedSequence of its numbers; which
    signals a run and its workers heed."""
    with tempfile.TemporaryDirectory() as tmp:
        run = running.Run(tmp)
        now, other = run.counts(3), run.counts(3)
        assert (now.step, now.samples, now.sums.dtype, now.faults.tolist()) == (0, 0, torch.float64, [0, 0])
        assert now.sums.tolist() == [0, 0, 0] and len(now.id) == 12 and now.id != other.id
        run.last_finite = now.sums
        for row, samples, sums, faults, finite in (([1, 2, 1], 4, [1, 2, 1], [0, 0], [1, 2, 1]),
                                                   ([float("nan"), 5, 1], 4, [1, 2, 1], [1, 1], [1, 2, 1]),
                                                   ([7, float("inf"), 1], 3, [1, 2, 1], [2, 2], [1, 2, 1]),
                                                   ([3, 4, 1], 2, [4, 6, 2], [2, 0], [3, 4, 1])):
            before = now.step, now.samples
            run.count(now, torch.tensor(row, dtype=torch.float32), samples)
            assert (now.step, now.samples) == (before[0] + 1, before[1] + samples)
            assert (now.sums.tolist(), now.faults.tolist(), run.last_finite.tolist()) == (sums, faults, finite)
        assert now.sums.dtype == torch.float64
        with contextlib.redirect_stdout(io.StringIO()) as said:  # without an optimizer
            run.restore({**vars(other), "step": 1234, "samples": 5, "more": 1}, now)
        assert said.getvalue() == f"resumed from {tmp}/state.pt at step 1,234\n"
        assert vars(now).keys() == vars(other).keys() and (now.id, now.step, now.samples) == (other.id, 1234, 5)
        assert not now.sums.any() and not now.faults.any()
    for numbers in (0, 0, 0, 0), (1, 2, 3, 4), (2 ** 63 - 1, 5, 0, 1):
        running.seed_step(*numbers)
        low, high = map(int, np.random.SeedSequence(numbers).generate_state(2))  # its words of 32 bits
        assert torch.initial_seed() % 2 ** 64 == low + (high << 32)
    heard = "SIGTERM SIGINT SIGHUP SIGUSR1".split()
    for ignored, expected in (signal.SIG_DFL, heard), (signal.SIG_IGN, "SIGTERM SIGINT SIGUSR1".split()):  # nohup's
        set_ = []
        with patch.object(signal, "getsignal", lambda number: ignored), \
                patch.object(signal, "signal", lambda *what: set_.append(what)):
            running.listen("save")
            assert set_ == [(getattr(signal, name), "save") for name in expected]
            set_.clear()
            script.ignore_signals(0)
        assert set_ == [(getattr(signal, name), signal.SIG_IGN) for name in heard]


def test_batches_are_loaded_for_the_rank_and_the_device():
    made = []

    def loader(data_, batch_sampler, **how):
        made.append((data_, [*batch_sampler], how))
        return []
    now = argparse.Namespace(step=3, samples=100)
    with patch.object(batches, "DataLoader", loader):
        for workers, gpu, rank in (0, False, 0), (3, True, 1):
            run = argparse.Namespace(rank=rank, ranks=2, on_gpu=gpu)
            args = argparse.Namespace(batch_size=8, steps=5, workers=workers)
            batches.load_batches(run, "data", args, now, 2)
            first = 100 + 4 * rank  # two steps are left; a rank's share is four
            assert made.pop() == ("data", [[n, n + 1] for n in (first, first + 2, first + 8, first + 10)], dict(
                num_workers=workers, collate_fn=batches.collate, prefetch_factor=4 if workers else None,
                pin_memory=gpu, worker_init_fn=script.ignore_signals))
    batches_of = lambda *how: [split_batch(*how)[0], split_batch(*how)[1]]
    assert batches_of(24, 5, 2) == [4, 3] and batches_of(24, 100, 2) == [12, 1] and batches_of(7, 3, 1) == [1, 7]


def set_up(tmp, *flags):
    """What train.setup gives a run that says it is on a GPU, while all is computed on the CPU; flags of a micro run."""
    run = running.Run(os.path.join(tmp, "out"))
    run.on_gpu = True
    args = train.parse_args(["--teacher", micro_teacher(tmp), *MICRO_RUN, *map(str, flags)])
    with contextlib.redirect_stdout(io.StringIO()):
        return train.setup(args, run)


def test_what_a_gpu_computes_in_bf16():
    """Student, teacher, decoder and the evaluation's networks run under autocast to bf16 on a GPU; the losses are
    fp32. A resume and what is evaluated have no say in it."""
    seen, nets = [], {"vit": encoder.ViT, "encoder": encoder.Encoder, "decoder": decoder.Decoder}
    plain = {name: kind.forward for name, kind in nets.items()}

    def spy(name):
        def forward(self, img, *rest):
            seen.append((name, self.training, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return plain[name](self, img, *rest)
        return forward
    with tempfile.TemporaryDirectory() as tmp, contextlib.ExitStack() as stack:
        s = set_up(tmp, "--data", picture_folder(tmp, 3)[0], "--steps", 1)
        for name, kind in nets.items():
            stack.enter_context(patch.object(kind, "forward", spy(name)))
        micro_step, _ = train.training_step(s.args, s.teacher, s.encoder, s.decoder, s.optimizer, s.autocast, 4, 1)
        stats = micro_step(torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8))
        bf16 = True, torch.bfloat16
        assert seen == [("vit", False, *bf16), ("encoder", True, *bf16), ("vit", True, *bf16), ("decoder", True, *bf16)]
        assert stats.dtype == torch.float32 and stats.isfinite().all() and not torch.is_autocast_enabled("cpu")
        assert s.optimizer.defaults["fused"], "so that Python need not wait for the GPU"
        seen.clear()
        validation.validate(s.encoder, s.decoder, s.val, 3, 0, s.autocast)
        assert {x[0] for x in seen} == {"vit", "encoder"} and {x[1:] for x in seen} == {(False, *bf16)}


def test_a_log_line_of_several_gpus():
    """By hand: speed, FLOPs and memory of each GPU, the rate of the step that was made, the means since the last line;
    then what a run on drawn pictures says when it stops."""
    with tempfile.TemporaryDirectory() as tmp:
        s = set_up(tmp, "--steps", 10, "--log_every", 2, "--lambda_d", 3, "--lambda_f", 0.5, "--lr_decay", 1, "--lr",
                   0.5)
        assert s.args.images == s.args.val_images == "10,000 images"
        run, told, compared = running.Run(os.path.join(tmp, "two")), [], []
        run.ranks, run.connect, run.say = 2, lambda: None, told.append
        run.agree_on_weights = lambda *models: compared.append(models)
        for batch, micro, lines in ((24, 5, ["run: 10 steps of 24 = micro-batch 4 x accumulation 3 x 2 ranks on cpu",
                                             "micro_batch 5 does not divide a rank's share of 12: using 4"]),
                                    (8, 6, ["run: 10 steps of 8 = micro-batch 4 x accumulation 1 x 2 ranks on cpu"])):
            told.clear()
            of_two = train.setup(train.parse_args(["--teacher", s.args.teacher, *MICRO_RUN, "--steps", "10",
                                                   "--batch_size", str(batch), "--micro_batch", str(micro)]), run)
            assert told[2:] == lines, told
            assert compared.pop() == (of_two.teacher, of_two.encoder, of_two.decoder) and not compared
        L = 3
        s.flops, s.now.step, s.now.faults = 5e12, 6, torch.tensor([2.0, 1.0])
        s.now.sums = 2 * torch.tensor([0.5, 0.25, 1, 2, 3, 4, 5, 6, 8, 1], dtype=torch.float64)  # of two steps
        wrote, said = [], []
        s.run.write, s.run.say, s.run.ranks = lambda **line: wrote.append(line), said.append, 2
        with patch.object(torch.cuda, "max_memory_allocated", lambda: 3 * 2 ** 29):
            train.log(s, 2.0)
        line = dict(step=6, loss=3 * 0.25 + 0.5 * 0.5, loss_flow=0.5, loss_dist=0.25, alpha=[1, 2, 3], weight=[4, 5, 6],
                    grad_norm=8, lr=0.5 * (10 - 5) / 10, skipped=2, img_s=2, tflops_per_gpu=5, memory_gib=1.5)
        assert wrote == [line] and said == [train.as_text(line, 10, 8.0)] and not s.now.sums.any(), (wrote, said)
        # an evaluation is of what is averaged, in this rank's micro-batches, which are not those that were asked for
        judged, s.args.micro_batch, s.micro_batch = [], 16, 8
        s.averaged = {"encoder": "averaged encoder", "decoder": "averaged decoder"}
        picture_ = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
        s.run.rank, s.args.seed, s.args.workers = 0, 9, 3
        with patch.object(train, "validate", lambda *what: judged.append(what) or (20.456, [0.5, 0.25], picture_)):
            train.evaluate(s)
            s.run.rank = 1
            train.evaluate(s)
        given = ("averaged encoder", "averaged decoder", s.val, 8, 9, s.autocast, 3)
        assert judged == [(*given, 0, 2), (*given, 1, 2)]
        assert said[1] == (
            "eval      6 | one-step PSNR 20.46 dB on other drawn pictures | flow loss by tenth of t, image to noise: "
            "0.500 0.250") and wrote[1] == dict(kind="eval", step=6, psnr=20.456, flow_by_t=[0.5, 0.25],
                                                on="other drawn pictures")
        assert os.listdir(os.path.join(s.run.out, "samples")) == ["step_000006.png"]
        assert np.array_equal(Image.open(os.path.join(s.run.out, "samples", "step_000006.png")), picture_)
        del said[1:]
        # ten steps in a row that were not finite; a run that has no files names none
        s.now.step, s.now.samples, s.now.faults = 20, 80, torch.tensor([30.0, 10.0])
        s.run.last_finite = 4 * torch.tensor([0.5, 0.25, *range(2 * L), 8, 1])
        stopped, s.args.val = [], ["evaluated on"]
        s.run.stop_not_finite, s.run.ranks, s.run.rank = lambda *what: stopped.append(what), 1, 0
        train.check(s, [])
        assert stopped == [(s.now, "flow 0.5000, distillation 0.2500", ["drawn pictures"])]
        s.now.faults = torch.tensor([30.0, 9.0])
        with patch.object(train, "INTERRUPTS", [15, 10]):
            assert train.check(s, []) == 2 and len(stopped) == 1, "how many signals came"
        # the third bad picture of a first pass over 10,000, of which 0.0002 may be bad
        s.args.max_bad_images, s.now.unreadable = 0.0002, 2
        s.data.path = lambda i: f"{i}.png"
        assert train.check(s, []) == 0 and not said[1:]
        refused(encoder.UserError, train.check, s, [7],
                says="3 of the 80 images so far could not be read, more than --max_bad_images 0.0002 allows in 1 "
                     f"pass over 10,000 images: see {s.run.out}/bad_images*.txt")
        assert said[1:] == ["3 of the 80 images so far could not be read, other images replaced them: see "
                            f"{s.run.out}/bad_images*.txt"]
        s.now.samples = 10_000  # the first pass to its end
        refused(encoder.UserError, train.check, s, [],
                says="3 of the 10,000 images so far could not be read, more than --max_bad_images 0.0002 allows in 1 "
                     f"pass over 10,000 images: see {s.run.out}/bad_images*.txt")
        s.now.samples = 10_001  # a second pass has begun, which may meet them again
        assert train.check(s, [7]) == 0 and s.now.unreadable == 4 and not said[2:], "named already"


def test_a_step_by_hand_on_the_second_rank():
    """Two micro-batches: what each is seeded with, which pictures were bad, the sum of their statistics, and the rate
    of each group; then the averages, after the weights have moved."""
    did = []
    note = lambda name, result=None: lambda *what: did.append((name, *what)) or result

    def micro_step(img):
        did.append(("micro", img.tolist()))
        return torch.tensor([4.0, 2.0]) * img
    args = argparse.Namespace(steps=10, lr_decay=1.0, decay_shape="linear", warmup=0, seed=5, batch_size=8, ema=0.25)
    s = argparse.Namespace(args=args, now=argparse.Namespace(step=4), accumulation=2, rates=[1.0, 0.5],
                           optimizer=argparse.Namespace(param_groups=[{"lr": 0}, {"lr": 0}]), averages="a", weights="w",
                           run=argparse.Namespace(device="cpu", rank=1, ranks=2, count=note("count")))
    batches_ = iter([(torch.tensor([1]), [3, -1, -8]), (torch.tensor([2]), [-4, 0])])
    for ema in 0.25, 0:
        args.ema = ema
        with patch.multiple(train, seed_step=note("seed"), average_weights=note("average")):
            found = train.step(s, batches_, micro_step, lambda stats: did.append(("update", stats.tolist())) or "row")
        assert did == [("seed", 5, 4, 2), ("micro", [1]), ("seed", 5, 4, 3), ("micro", [2]),
                       ("update", [12.0, 6.0]), *[("average", "a", "w", 4, 0.25)] * bool(ema),
                       ("count", s.now, "row", 8)], did
        assert found == [0, 7, 3] and [g["lr"] for g in s.optimizer.param_groups] == [0.6, 0.3]
        batches_ = iter([(torch.tensor([1]), [3, -1, -8]), (torch.tensor([2]), [-4, 0])])
        did.clear()


def test_gradients_are_means_over_micro_batches_and_ranks():
    """Four micro-batches on each of three ranks: each adds a twelfth of lambda_d L_dist + lambda_f L_flow, and of the
    statistics. The ranks add up both once a step; then the gradients are zeros of the same tensor again."""
    x = torch.nn.Parameter(torch.tensor([[2.0, 3.0]]))  # L_dist and L_flow
    frozen, exchanged, updated = torch.nn.Parameter(torch.ones(1)), [], []

    def losses(teacher, student, flow_decoder, img, args, distances):
        assert (teacher, student, flow_decoder, distances) == ("teacher", enc, dec, distill.layer_distances)
        assert img.tolist() == [1, 0]
        return x[0, 0], x[0, 1], torch.tensor([7.0, 8.0]), torch.tensor([5.0, 6.0])

    def all_reduce(values):
        exchanged.append(values.tolist())
        values.mul_(3)  # the others have the same
    enc, dec = argparse.Namespace(), argparse.Namespace(mean=torch.zeros(3))
    args = argparse.Namespace(compile=False, lambda_d=0.5, lambda_f=4.0, clip=1.5)
    note = lambda optimizer, weights, clip, stats: updated.append(
        (weights == [x], clip, x.grad.tolist(), stats.tolist())) or "row"
    with patch.multiple(train, losses=losses, update_weights=note), patch.object(dist, "all_reduce", all_reduce):
        micro_step, update = train.training_step(args, "teacher", enc, dec, torch.optim.SGD([x], 1.0),
                                                 contextlib.nullcontext(), 2, 4, 3)
        for repeat in range(2):
            parts = [micro_step(torch.tensor([255, 0], dtype=torch.uint8)) for _ in range(4)]
            for part in parts:
                assert not part.requires_grad
                close(part * 12, torch.tensor([3.0, 2, 5, 6, 7, 8]), 1e-5)
            assert update(sum(parts)) == "row" and x.grad.eq(0).all()
    for gradients, stats in (exchanged[:2], exchanged[2:]):
        close(torch.tensor(gradients), torch.tensor([0.5, 4.0]) / 3, 1e-5)
        close(torch.tensor(stats), torch.tensor([3.0, 2, 5, 6, 7, 8]) / 3, 1e-5)
    for ours, clip, gradients, stats in updated:
        assert ours and clip == 1.5
        close(torch.tensor(gradients), torch.tensor([[0.5, 4.0]]), 1e-5)
        close(torch.tensor(stats), torch.tensor([3.0, 2, 5, 6, 7, 8]), 1e-5)
    assert len(updated) == 2


def test_joined_gradients_lie_in_one_tensor():
    """In the order of the weights; backward passes add to it in place, and what is written there is their gradient."""
    a, b = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2))
    a.grad = torch.ones(2, 3)  # forgotten
    joined = optimizer.join_gradients([a, b])
    assert joined.tolist() == [0] * 8 and (a.grad.shape, b.grad.shape) == (a.shape, b.shape)
    for _ in range(2):
        ((a * torch.arange(6.0).view(2, 3)).sum() + (b * torch.tensor([6.0, 7.0])).sum()).backward()
    assert joined.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    joined.mul_(2)
    assert a.grad.tolist() == [[0, 4, 8], [12, 16, 20]] and b.grad.tolist() == [24, 28]


def test_when_a_run_logs_evaluates_and_saves():
    """At its intervals and at the end, in this order; a signal saves after its step. A step's time is the mean since
    the clock was set: at the start, and after whatever was written."""
    def go(steps, first=0, signal_at=None, rank=1, on_gpu=False, **every):
        did, clock, now = [], [100.0], argparse.Namespace(step=first, sums="sums")
        args = argparse.Namespace(**{**dict.fromkeys(("log_every", "eval_every", "save_every", "keep_every"), 0),
                                     "steps": steps, **every})

        def step():
            now.step, clock[0] = now.step + 1, clock[0] + now.step + 1
            return 2 * (now.step == signal_at)

        def note(what):
            def act(*seconds):
                did.append((what, now.step, *seconds))
                clock[0] += 1000
            return act
        run = argparse.Namespace(rank=rank, on_gpu=on_gpu)
        waits = lambda: clock.__setitem__(0, clock[0] + 60)  # the GPU is a minute behind
        with patch.object(torch.cuda, "synchronize", waits), patch("time.time", lambda: clock[0]), \
                patch.object(running, "tqdm") as bar:
            stopped = running.loop(run, now, args, step, note("log"), note("evaluate"), note("save"))
        bar.assert_called_once_with(total=steps, initial=first, desc="train", unit="step", disable=rank > 0 or None)
        assert bar.return_value.method_calls == [unittest.mock.call.update()] * (now.step - first) + [
            unittest.mock.call.close()]
        assert run.last_finite == "sums" and type(stopped) is bool
        return did, stopped
    for rank in 0, 1:
        assert go(3, rank=rank) == ([("log", 3, 2.0), ("evaluate", 3), ("save", 3)], False)
    assert go(5, log_every=2, eval_every=3, save_every=5, keep_every=4) == ([
        ("log", 2, 1.5), ("evaluate", 3), ("log", 4, 4.0), ("save", 4), ("log", 5, 5.0), ("evaluate", 5), ("save", 5)],
        False)
    assert go(2, on_gpu=True) == ([("log", 2, (1 + 2 + 60) / 2), ("evaluate", 2), ("save", 2)], False)
    assert go(9, 2, 4, log_every=3, save_every=8) == ([("log", 3, 3.0), ("save", 4)], True)
    assert go(9, 2, 3, eval_every=3, save_every=3) == ([("save", 3), ("evaluate", 3)], True), "saved before all else"
    assert go(4, 4) == ([], False)


def test_an_evaluations_workers():
    """They get the run's number, send arrays through pipes, and leave signals to the run."""
    made, plain, (_, enc, dec) = [], validation.DataLoader, micro_models()
    here = lambda *what, **how: made.append(how) or plain(*what, **{**how, "num_workers": 0})
    with patch.object(validation, "DataLoader", here), patch.object(dist, "all_reduce", made.append):
        pictures_ = [(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)] * 5
        assert validation.validate(enc, dec, pictures_, 2, 0, contextlib.nullcontext(), 3, 1, 2)[2] is None
    total = made.pop()
    assert total.shape == (12,) and total[1] == 2
    # the second of two ranks has numbers 1 and 3, and draws no picture
    assert made == [dict(batch_sampler=[[1, 3]], collate_fn=validation.pixels, num_workers=3,
                         worker_init_fn=script.ignore_signals)]
    x = [(torch.full((3, 2, 2), k, dtype=torch.uint8), k) for k in range(2)]
    assert np.array_equal(validation.pixels(x), np.repeat([0, 1], 12).reshape(2, 3, 2, 2))
    assert validation.spread(3) == [0, 1, 2] and validation.spread(1024)[:3] == [0, 2, 4]
    assert validation.spread(10, 4) == [0, 2, 5, 7] and len(validation.spread(513)) == 512


def test_a_training_graph_is_for_gpus():
    """Captured if the step is compiled, on a GPU. With one micro-batch a step it writes the gradients, so that nobody
    clears them; with several, or several ranks, it adds to tensors that are cleared to zeros. Without a graph one rank
    clears them to None, but several ranks keep the tensor that they exchange."""
    block = lambda: unittest.mock.Mock(spec=["compile"])
    parts = lambda device: [argparse.Namespace(
        vit=argparse.Namespace(blocks=[block()]), blocks=[block()], head=block(),
        mean=argparse.Namespace(device=device)) for _ in range(3)]
    zeros = lambda *shape, **how: (shape, how)
    for compile_, kind, ranks, accumulation in itertools.product((False, True), ("cpu", "cuda"), (1, 2), (1, 4)):
        device, captured, joined, distances = argparse.Namespace(type=kind), [], [], []
        capture = lambda step, img, clear: captured.append((img, clear)) or "graph"
        optimizer, models = unittest.mock.Mock(param_groups=[]), parts(device)
        args = argparse.Namespace(compile=compile_, size=24, clip=1.0)
        join = lambda weights: joined.append(weights) or "joined"
        faster = lambda f, **how: distances.append((f, how)) or f
        with patch.multiple(train, capture_graph=capture, join_gradients=join), \
                patch.object(torch, "zeros", zeros), patch.object(torch, "compile", faster):
            micro_step, update = train.training_step(args, *models, optimizer, None, 5, accumulation, ranks)
        graphed, overwrites = compile_ and kind == "cuda", accumulation * ranks == 1
        assert (micro_step == "graph") == graphed == bool(captured)
        assert joined == [[]] * (ranks > 1)
        assert distances == [(distill.layer_distances, dict(dynamic=False))] * compile_
        compiled = [x.compile.call_args_list for x in (models[0].blocks[0], models[1].vit.blocks[0],
                                                       models[2].blocks[0], models[2].head)]
        assert compiled == [[unittest.mock.call(dynamic=False)] * compile_] * 4
        optimizer.reset_mock()
        exchanged = []
        with patch.object(train, "update_weights", lambda *what: what), \
                patch.object(dist, "all_reduce", exchanged.append):
            assert update("stats") == (optimizer, [], 1.0, "stats")
        assert exchanged == ["joined", "stats"] * (ranks > 1)
        cleared = [] if graphed and overwrites else [unittest.mock.call(set_to_none=not graphed and ranks == 1)]
        assert optimizer.zero_grad.call_args_list == cleared
        for img, clear in captured:
            assert img == ((5, 3, 24, 24), dict(dtype=torch.uint8, device=device))
            optimizer.reset_mock()
            clear()
            assert optimizer.zero_grad.call_args_list == [unittest.mock.call(set_to_none=overwrites)]


def test_when_steps_that_are_not_finite_stop_a_run():
    """At ten in a row; where a GPU would have to be waited for, at every tenth step alone."""
    with tempfile.TemporaryDirectory() as tmp:
        run = running.Run(tmp)
        for run.on_gpu, step, in_a_row, stops in ((False, 13, 10, True), (False, 13, 9, False), (True, 13, 10, False),
                                                  (True, 20, 10, True), (True, 20, 9, False), (False, 10, 11, True)):
            now = argparse.Namespace(step=step, faults=torch.tensor([50.0, in_a_row]))
            assert bool(run.must_stop(now)) == stops, (run.on_gpu, step, in_a_row)


def test_what_a_probe_lacks():
    """Twenty images and every class: what there is and, of what is missing, five classes in their order."""
    about = ("--fit has {} images and lacks the classes {}: it needs at least 20 images, and every class of --data "
             "(the folder that an image is in)")

    def of(n, *classes):
        return unittest.mock.Mock(classes=list(classes), __len__=lambda self: n)
    vit = encoder.ViT(MICRO_VIT)
    job = unittest.mock.Mock(args=argparse.Namespace(teacher=None, teacher_weights="w"), device="cpu")
    enc = argparse.Namespace(vit=vit)
    with patch.object(encoder, "load_teacher", lambda *args: vit if args == ("t", "w") else None):
        load = lambda images, fit: evaluation.load_probe_teacher(job, enc, {"teacher": "t", "teacher_weights": "x"},
                                                                 images, fit)
        assert load(of(3, "a", "c"), of(20, "a", "b", "c")) is vit
        for changes in dict(width=64), dict(depth=2), dict(patch=8), dict(num_prefix=2):  # one of them alone
            enc.vit = encoder.ViT(replace(MICRO_VIT, **changes))
            refused(evaluation.UserError, load, of(3, "a"), of(20, "a"),
                    says="teacher t has another width, depth or patch than the tokenizer: give its own with --teacher")
        enc.vit = vit
        for images, fit, says in ((of(3, *"gabcdef"), of(20, "b"), (20, "a c d e f")),
                                  (of(3, "a"), of(19, "a"), (19, "-")), (of(3, "a"), of(20, "b"), (20, "a"))):
            refused(evaluation.UserError, load, images, fit, says=about.format(*says))


def test_ranks_and_their_gpus():
    """torchrun's numbers: the rank among all, and the GPU among those of this machine."""
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    nothing = {k: v for k, v in os.environ.items() if k not in env}
    for gpus, variables, expected in ((0, env, (5, 8, "cpu")), (2, env, (5, 8, "cuda:1")), (1, {}, (0, 1, "cuda:0")),
                                      (0, {}, (0, 1, "cpu"))):
        with patch.dict(os.environ, {**nothing, **variables}, clear=True), \
                patch.object(torch.cuda, "is_available", lambda: gpus > 0), \
                patch.object(torch.cuda, "device_count", lambda: gpus):
            rank, ranks, device = script.rank_and_device()
            assert (rank, ranks, str(device)) == expected
    with patch.dict(os.environ, {**nothing, **env, "LOCAL_RANK": "3"}, clear=True), \
            patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 2):
        refused(encoder.UserError, script.rank_and_device,
                says="rank 3 has no GPU, there are 2: lower --nproc_per_node")
    with patch.dict(os.environ, {**nothing, **env, "LOCAL_RANK": "2"}, clear=True), \
            patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 2):
        raises(encoder.UserError, script.rank_and_device)  # the first that there is none for


def test_errors_that_quote_others():
    """What counts is the last of the errors in a worker's traceback, and the errno at its end."""
    quoted = ("Caught UserError in DataLoader worker process 3.\nTraceback:\n  x\nOSError: [Errno 28] full\n\nDuring "
              "handling:\nTraceback:\n  y\ndata.UserError: a.png: is\nbad, all of it")
    assert script.user_message(data.UserError(quoted)) == "a.png: is bad, all of it"
    assert script.user_message(data.UserError("data.UserError: x")) == "data.UserError: x", "no worker's"
    quoted = quoted.replace("data.UserError: a.png: is\nbad, all of it", "FileNotFoundError: [Errno 2] gone: 'x'")
    assert not script.machines_trouble(FileNotFoundError(quoted)) and script.user_message(OSError(quoted)) is None
    assert script.machines_trouble(OSError(quoted.replace("[Errno 2] gone", "[Errno 5] disk")))
    assert not script.machines_trouble(OSError("[Errno 28] full\nand then")) and not script.machines_trouble(
        ValueError("[Errno 28] full"))
    for workers in 1, 2, 5:
        made = []
        with patch.object(script.multiprocessing, "Lock", lambda: made.append(1)):
            script.check_locks(workers)
        assert len(made) == 16 + 4 * workers


@patch.object(evaluation, "InceptionV3", QuickInception)
def test_how_many_bad_pictures_are_named():
    """Ten; of more it says that there are more. After the first nothing is measured. Their place is the first set's."""
    with tempfile.TemporaryDirectory() as tmp:
        for n in 10, 11:
            folder = os.path.join(tmp, str(n))
            os.makedirs(folder)
            for k in range(n):
                open(os.path.join(folder, f"{k:02d}.png"), "w").close()
            picture(0).save(os.path.join(folder, "99.png"))
            why = "cannot be read as an image (none of " + ", ".join(data.FORMATS) + ")"
            names = "; ".join(f"{folder}/{k:02d}.png: {why}" for k in range(10)) + "; ..." * (n > 10)
            job = jobs.Job(evaluation.parse_args(["--data", "x", "--workers", "0", "--batch_size", "3"]))
            sets = job.crops([folder], 16), job.crops([folder], 32)
            seen = []

            def look():
                seen.extend(numbers for numbers, *_ in job.images("look", *sets))
            refused(evaluation.UserError, look,
                    says=f"{n} of {n + 1} images cannot be used, so there are no figures: {names}")
            assert not seen
        both = jobs.ImagesOrReasons(*sets)
        assert both.shape == (3, 16, 16) and both[0][3] == f"{folder}/00.png: {why}" and both[0][:3] == (0, None, None)
        n, images, label, reason = both[11]
        assert (n, [tuple(x.shape) for x in images], label, reason) == (11, [(3, 16, 16), (3, 32, 32)], 0, None)
        numbers, batches, labels, reasons = jobs.collate([both[11], both[0], both[11]])
        assert (numbers, [x.shape for x in batches], labels, reasons) == (
            [11, 11], [(2, 3, 16, 16), (2, 3, 32, 32)], [0, 0], [both[0][3]])
        assert jobs.collate([both[0]]) == ([], [], [], [both[0][3]])
        # a report for a broken pipe goes to standard error, and says where else it is
        job.args.weights = None
        for out, tail in (None, ""), ("r.json", " and in r.json"):
            job.args.out = out
            broken = unittest.mock.Mock(write=unittest.mock.Mock(side_effect=OSError("broken")))
            with patch.object(sys, "stdout", broken), patch.object(sys, "stderr", io.StringIO()) as err:
                try:
                    job.print_report({"images": 0, "step": None, "data": ["a", "b"]}, ["row"])
                    raise AssertionError("nobody could read it")
                except evaluation.UserError as e:
                    assert str(e) == f"standard output cannot be written (broken): the report is above{tail}"
            assert err.getvalue() == "data      a b\nimages    0\n\nrow\n"
        refused(encoder.UserError, evaluate, "--data", tmp, "--weights", tokenizer_file(tmp), "--size", 3,
                "--workers", 0,
                says=f"--size 3 is no multiple of the patch 4 of {tmp}/tokenizer.safetensors: try --size 4")


def test_sizes_that_have_an_ssim():
    """What is compared needs 11 pixels, not what goes in."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(os.path.join(tmp, "p"), 1)
        flags = ["--data", folder, "--weights", weights, "--inception", "none", "--workers", 0, "--size"]
        refused(evaluation.UserError, evaluate, *flags, 8,
                says="pictures of 8x8 are smaller than SSIM's window of 11x11: give a larger --size")
        for more in [12], [8, "--resolution", 256]:
            assert evaluate(*flags, *more)[1]["images"] == 1
        for size, fits in (11, True), (10, False):  # a patch of 1 makes sides of any size
            vit = replace(MICRO_VIT, patch=1, size=size, depth=1)
            dec = decoder.DecoderConfig(latent_dim=2, width=32, heads=2, gtb_depth=0, flow_depth=1, flow_width=8,
                                        patch=1,
                                        grid=size)
            path = os.path.join(tmp, f"{size}.safetensors")
            tensors = {f"{part}.{k}": v for part, module in (
                ("encoder", encoder.Encoder(encoder.ViT(vit), 2)), ("decoder", decoder.Decoder(dec)))
                for k, v in module.named_parameters()}
            encoder.write_model(path, {"vit": asdict(vit), "decoder": asdict(dec), "size": size},
                                {**tensors, "latent_mean": torch.zeros(2), "latent_std": torch.ones(2)})
            try:
                evaluate(*flags[:3], path, *flags[4:-1])
                assert fits
            except evaluation.UserError as e:
                assert not fits and "10x10" in str(e)


# ---- pictures, archives of arrays ----

def test_results_on_systems_that_do_not_tell_case():
    for platform, second in ("linux", "a"), ("darwin", "a_2"), ("win32", "a_2"):
        taken = set()
        with patch.object(pictures.sys, "platform", platform):
            assert [pictures.free_path("x", name, ".png", taken) for name in "Aa"] == ["x/A", f"x/{second}"]


def test_sizes_of_pictures_and_animations():
    """The short side by hand; a strip keeps one pixel; the limits at their last value, named as width x height."""
    for size, short, expected in (((30, 20), 10, (15, 10)), ((20, 30), 10, (10, 15)), ((30, 20), 0, (30, 20)),
                                  ((7, 3), 2, (5, 2)), ((20, 20), 64, (64, 64))):
        assert pictures.resize_short_side(Image.new("RGB", size), short).size == expected
    img = Image.new("RGB", (9, 6))
    assert pictures.resize_short_side(img, 0, 54).size == (9, 6)
    refused(encoder.UserError, pictures.resize_short_side, img, 12, 54,
            says="has 18x12 pixels at this --size, more than 54: give a smaller one, or crop it")
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "a.webp")
        frames = [picture(k, 9, 6) for k in range(3)]
        exif = Image.Exif()
        exif[274] = 6
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=[10, 20, 30], lossless=True, exif=exif)
        x, (H, W), options = pictures.load_frames(path, 0)
        turned = np.stack([np.array(f).transpose(1, 0, 2)[:, ::-1] for f in frames])
        assert (H, W) == (9, 6) and np.array_equal(x.permute(0, 2, 3, 1), turned), "every frame is turned"
        assert options == {"format": "WEBP", "duration": [10, 20, 30], "loop": 0}
        Image.new("RGB", (1, 1)).save(path + ".png")
        refused(encoder.UserError, pictures.load_frames, path + ".png", 11_600, says="has 11600x11600 pixels at this "
                "--size, more than 134,217,728: give a smaller one, or crop it")
        for limit, fits in (81, True), (80, False):
            with patch.object(pictures, "MAX_PIXELS", limit):
                if fits:
                    assert len(pictures.load_frames(path, 0)[0]) == 3
                else:
                    refused(encoder.UserError, pictures.load_frames, path, 0,
                            says="has 3 frames of 6x9, more than 160 pixels in all: give a smaller --size")
        pages = os.path.join(tmp, "pages.tif")
        frames[0].save(pages, save_all=True, append_images=frames[1:])
        x, _, options = pictures.load_frames(pages, 0)
        assert len(x) == 1 and options == {"format": "PNG"}, "pages are no animation"
        one = pictures.picture_file([torch.zeros(3, 6, 9, dtype=torch.uint8)], {"format": "PNG"})
        assert not getattr(Image.open(io.BytesIO(one)), "is_animated", False)
        # what is given and where results go
        os.makedirs(os.path.join(tmp, "d", "sub"))
        inner = shutil.copy(path, os.path.join(tmp, "d", "sub", "a.webp"))
        d, out = os.path.join(tmp, "d"), os.path.join(tmp, "out")
        for given, alone, to, expected in ((d, False, None, d + "_recon/sub"), (d, False, out, out + "/"),
                                           (d, True, None, d + "_reconstruction/sub"), (d, True, out, out + "/sub"),
                                           (inner, False, None, d + "/sub"), (inner, True, None, d + "/sub"),
                                           (inner, False, out, out), (inner, True, out, out), (d, False, d, d + "/"),
                                           (d, False, tmp, tmp + "/"), (inner, False, d, d)):
            assert pictures.find_pictures([given], to, alone) == [(inner, expected)], (given, alone, to)
        for alone, to, expected in (False, None, d + "_depth/sub"), (True, None, d + "_reconstruction/sub"), (
                False, out, out + "/"):
            assert pictures.find_pictures([d], to, alone, "_depth") == [(inner, expected)], (alone, to)
        assert pictures.find_pictures(["-"], out) == [("-", out)] and pictures.find_pictures(["-"]) == [("-", None)]
        given = ["-", inner, "-", inner]  # in the order given, which is not the alphabet's
        assert [path for path, _ in pictures.find_pictures(given)] == given
        for given, to in (d, d), (d, tmp), (d, d + "/sub"), (inner, d), (inner, d + "/sub"):
            refused(encoder.UserError, pictures.find_pictures, [given], to, True,
                    says=f"--reconstruction would overwrite pictures, because --out {to} overlaps with {given}: give "
                    "another --out")


def test_arrays_that_are_no_pictures():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "x.npz")
        for x in (np.zeros((2, 8, 9, 4), np.uint8), np.zeros((2, 8, 9), np.uint8), np.zeros((0, 8, 9, 3), np.uint8),
                  np.zeros((2, 8, 9, 3), np.int8), np.zeros((2, 0, 9, 3), np.uint8), np.zeros((2, 3, 8, 9), np.uint8)):
            np.savez(path, x)
            refused(evaluation.UserError, fid_command.read_npz, path,
                    says=f"{path} is neither images nor statistics (UserError: arr_0 is {x.dtype} {x.shape}; it must "
                         "be uint8 (N, H, W, 3)): an .npz holds arr_0, or mu and sigma")
        np.savez(path, mu=np.zeros(3), arr_0=np.zeros((2, 8, 9, 3), np.uint8))  # without sigma mu says nothing
        assert len(fid_command.read_npz(path)) == 2
        with patch.object(np, "load", side_effect=OSError(errno.EIO, "disk")):
            refused(OSError, fid_command.read_npz, path, says="[Errno 5] disk")


# ---- validation, export, curves, speed ----

@torch.no_grad()
def test_the_flow_loss_of_each_tenth_exactly():
    """By the draws of ten generators, on the first batch of a set of 7; the eighth place of the picture is black."""
    _, enc, dec = micro_models()
    img = (255 * torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))).byte()
    _, found, grid = validation.validate(enc, dec, [(x, 0) for x in img], 4, 3, contextlib.nullcontext())
    first = [0, 2, 4, 6]  # two batches
    noise = evaluation.image_noise(first, 16, 48, 3)
    for k in range(10):
        t = (k + torch.rand(4, 16, generator=torch.Generator().manual_seed(k))) / 10
        expected = dec.loss(enc.eval().encode(img[first] / 255), img[first] / 255, t, noise).item()
        assert abs(found[k] / expected - 1) < 1e-5, k
    assert grid.shape == (64, 96, 3) and not grid[48:, 48:].any() and grid[48:, :48].any()
    for place in range(7):
        top, left = 16 * (place // 2), 48 * (place % 2)
        assert np.array_equal(grid[top:top + 16, left:left + 16], img[place].permute(1, 2, 0))


def test_export_of_one_register_and_what_cannot_be_exported():
    with tempfile.TemporaryDirectory() as tmp:
        build = lambda **how: encoder.Encoder(encoder.ViT(replace(MICRO_VIT, **how)), 8)
        for again in range(2):  # a folder that is there is written to
            convert.save_hf(build(num_prefix=2, layer_scale=0.5, eps=0.25), tmp)
        said = json.load(open(os.path.join(tmp, "config.json")))
        assert said == dict(
            model_type="dinov2_with_registers", architectures=["Dinov2WithRegistersModel"], dtype="float32",
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, layer_norm_eps=0.25,
            image_size=16, patch_size=4, hidden_act="gelu", mlp_ratio=2, use_mask_token=False, num_register_tokens=1)
        assert json.load(open(os.path.join(tmp, "preprocessor_config.json"))) == dict(
            image_processor_type="CLIPImageProcessor", size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16}, resample=3,
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
        assert load_file(os.path.join(tmp, "model.safetensors"))["embeddings.register_tokens"].shape == (1, 1, 32)
        convert.save_hf(build(num_prefix=0, pixel_stats="half"), os.path.join(tmp, "siglip"))
        assert json.load(open(os.path.join(tmp, "siglip", "preprocessor_config.json"))) == dict(
            image_processor_type="SiglipImageProcessor", size={"height": 16, "width": 16}, resample=2,
            image_mean=[0.5] * 3, image_std=[0.5] * 3)
        refused(encoder.UserError, convert.save_hf, build(layer_scale=0.5, mlp_width=80), tmp,
                says="mlp_width 80 is no multiple of width 32, but transformers' DINOv2 stores their ratio as an "
                     "integer: this ViT cannot be saved for it")
        refused(encoder.UserError, convert.save_hf, build(pre_norm=True), tmp,
                says="transformers has no vision model with pre_norm patch_bias final_norm cls; only the structures of "
                "InternViT, DINOv2 (with or without registers), SigLIP2, CLIP and the plain ViT can be saved")
        weights, out = tokenizer_file(tmp), os.path.join(tmp, "out.safetensors")
        assert not any(map(convert.is_released, (weights, tmp, os.path.join(tmp, "gone"))))
        # the authors' code cannot build ours; if it could, statistics would be left out, the mean's as the deviation's
        config, tensors = encoder.read_config(weights), load_file(weights)
        encoder.write_model(weights, {**config, "size": 24}, tensors)
        same = dict(VIT=MICRO_VIT, DECODER=decoder.DecoderConfig(**config["decoder"]))
        with patch.multiple(convert, **same, SIZE=16):
            refused(encoder.UserError, convert.to_released, weights, out,
                    says=f"the authors' code cannot build the model of {weights}, which has trained at size 24 "
                         "instead of 16")
        with patch.multiple(convert, **{**same, "DECODER": replace(same["DECODER"], projector="linear")}, SIZE=24):
            refused(encoder.UserError, convert.to_released, weights, out,
                    says=f"the authors' code cannot build the model of {weights}, which has projector 'mlp' instead of "
                         "'linear'")
        for name, value in (None, None), ("latent_mean", 0.5), ("latent_std", 2.0):
            changed = {name: torch.full((8,), value)} if name else {}
            encoder.write_model(weights, config, {**tensors, **changed})
            with patch.multiple(convert, **same, SIZE=16, parameters=lambda: []), \
                    contextlib.redirect_stderr(io.StringIO()) as said:
                convert.to_released(weights, out)
            assert said.getvalue() == (f"{weights}: its latent statistics are left out: the authors' layout has no "
                                       "place for them\n") * bool(name)
        table = [(f"x{k}", f"y{k}", (1,)) for k in range(6)] + [("latent_mean", "z", (8,))]
        refused(encoder.UserError, convert.read_renamed, weights, table,
                says=f"{weights} lacks tensors of that model (6): " + "; ".join(f"missing x{k}" for k in range(4)))


def test_curves_have_their_names():
    """Titles, labels, scales and colours of two runs, of which one has a single layer; null is left out."""
    import matplotlib
    with tempfile.TemporaryDirectory() as tmp:
        for name, L, dist in ("a", 3, 0.0), ("b", 1, 0.5):
            os.makedirs(os.path.join(tmp, name))
            lines = [dict(step=s, loss=1, loss_flow=None if s == 2 else s / 10, loss_dist=0.0, lr=s * 1e-3,
                          grad_norm=0.5,
                          alpha=[0.1 * s + l for l in range(L)]) for s in (1, 2, 3)]
            lines += [dict(kind="eval", step=2, psnr=20.5), dict(kind="interrupted", step=3), dict(kind="eval", step=3,
                                                                                                 psnr=None)]
            with open(os.path.join(tmp, name, "log.jsonl"), "w") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines)
        figure = plot.draw([os.path.join(tmp, "a"), os.path.join(tmp, "b")])
        axes = figure.axes
        assert [ax.get_title() for ax in axes] == [
            "flow loss", "distillation loss", "one-step PSNR in dB", "learning rate", "gradient norm, before clipping",
            "alpha of each layer: a", "alpha of each layer: b", "", ""]
        assert [ax.get_visible() for ax in axes] == [True] * 7 + [False] * 2
        assert tuple(figure.get_size_inches()) == (15, 12)
        # of the distillation loss all are 0
        assert [ax.get_yscale() for ax in axes[:7]] == ["log", "linear", "linear", "linear", "log", "linear", "linear"]
        assert {ax.get_xlabel() for ax in axes[:7]} == {"step"}
        for axis, xs in zip(axes, ([1, 3], [1, 2, 3], [2], [1, 2, 3], [1, 2, 3])):
            assert [list(line.get_xdata()) for line in axis.lines] == [xs] * 2
            assert [line.get_label() for line in axis.lines] == ["a", "b"]
        assert [line.get_marker() for line in axes[2].lines] == ["."] * 2 and axes[3].lines[0].get_marker() == "None"
        legends = [[x.get_text() for x in ax.get_legend().get_texts()] if ax.get_legend() else None for ax in axes]
        assert legends == [["a", "b"], *[None] * 4, ["layer 1", "layer 3"], ["layer 1"], None, None]
        viridis = matplotlib.colormaps["viridis"]
        assert [line.get_color() for line in axes[5].lines] == [viridis(0.0), viridis(0.5), viridis(1.0)]
        assert axes[6].lines[0].get_color() == viridis(0.0)
        os.makedirs(os.path.join(tmp, "task"))  # a run of downstream/
        with open(os.path.join(tmp, "task", "log.jsonl"), "w") as f:
            f.writelines(json.dumps(dict(step=s, loss=0.5 / s, lr=0.1, grad_norm=2.0)) + "\n" for s in (1, 2))
        drawn = plot.draw([os.path.join(tmp, "task")]).axes
        assert [(ax.get_title(), ax.get_yscale()) for ax in drawn] == [
            ("loss", "log"), ("learning rate", "linear"), ("gradient norm, before clipping", "log")]
        assert list(drawn[0].lines[0].get_ydata()) == [0.5, 0.25]
        for missing, words in (("c", "no such file; give the folder that train.py writes to (its --out)"),
                               ("d", "has no training line yet: wait for --log_every steps")):
            path = os.path.join(tmp, missing, "log.jsonl")
            os.makedirs(os.path.dirname(path))
            if missing == "d":
                open(path, "w").write('{"kind": "eval", "step": 1}\n')
            refused(ValueError, plot.draw, [os.path.join(tmp, missing)],
                    says=f"{path}{': ' if missing == 'c' else ' '}{words}")


def test_curves_without_matplotlib():
    with tempfile.TemporaryDirectory() as tmp:
        for error, tail in ((ModuleNotFoundError("No module named 'matplotlib'"), ": pip install matplotlib"),
                            (ValueError("no log"), ""), (PermissionError(errno.EACCES, "no"), "")):
            with patch.object(plot, "draw", side_effect=error), patch.object(sys, "stdout"), \
                    contextlib.redirect_stderr(io.StringIO()) as said:
                assert plot.main([tmp]) == 2
            assert said.getvalue() == f"tools.plot: {error}{tail}\n"
        for flags, path in ([], os.path.join(tmp, "curves.png")), (["--out", "x.pdf"], "x.pdf"):
            with patch.object(plot, "draw") as draw, patch.object(sys, "stdout"):
                assert plot.main([tmp, "other", *flags]) == 0
            draw.assert_called_once_with([tmp, "other"])
            draw.return_value.savefig.assert_called_once_with(path, dpi=80)


def test_clocks_of_the_benches():
    """By a clock that the measured function moves: the mean of the calls that count, the median of all."""
    clock, took = [0.0], itertools.cycle([5.0, 1.0, 2.0])

    def f():
        clock[0] += next(took)
    with patch.object(speed.time, "perf_counter", lambda: clock[0]):
        assert speed.seconds(f) == 1.0, "on a CPU the first call warms up"
        took = itertools.cycle([9.0, 1.0, 1.0, 3.0, 2.0])
        assert speed.median_seconds(f, 5) == 2.0

        def synchronize():
            clock[0] += 0.75
        with patch.multiple(torch.cuda, is_available=lambda: True, synchronize=synchronize):
            took = itertools.chain([100.0] * 3, [1.0, 2.0, 6.0])
            assert speed.seconds(f, 3) == 3.25, "on a GPU the first three; its work has ended when all are timed"
            took = itertools.cycle([9.0, 1.0, 1.0, 3.0, 2.0])
            assert speed.median_seconds(f, 5) == 2.75, "each with the work that it has begun"


def test_the_bench_of_two_ranks():
    """Both ranks' pictures count, in one micro-batch a step and in two; the parts are one rank's and are left out. What
    is timed is the whole step. A setting that does not fit is said so."""
    rows, asked, steps = [], [], []

    class TwoRanks(running.Run):
        def __init__(self, out):
            super().__init__(out)
            self.ranks, self.say, self.on_gpu = 2, rows.append, gpu

        def connect(self):
            rows.append("connected")

    def training_step(args, teacher, enc, dec, optimizer, autocast, micro, accumulation, ranks):
        asked.append((args.compile, enc.vit.checkpoint, dec.checkpoint, autocast._enabled, micro, accumulation, ranks))
        if accumulation == 2 and fails:
            raise torch.OutOfMemoryError
        return (lambda img: steps.append((tuple(img.shape), img.dtype)) or 1.0), steps.append
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), *MICRO_RUN, "--micro_batch", "4", "--no-compile"]
        for fails, gpu in (False, False), (True, False), (False, True):
            rows.clear(), asked.clear(), steps.clear()
            on_gpu = dict(get_device_name=lambda: "a GPU", max_memory_allocated=lambda: 5 * 2 ** 29,
                          empty_cache=lambda: None, reset_peak_memory_stats=lambda: None)
            with patch.multiple(torch.cuda, **on_gpu), patch.multiple(
                    speed, Run=TwoRanks, training_step=training_step, model_flops=lambda *what: 3e12,
                    seconds=lambda f, repeats=10: (f(), 0.25)[1], matrix_ceiling=lambda d: (7, 6e13)):
                speed.train_speed(flags)
            assert asked == [(False, False, False, gpu, 4, n, 2) for n in (1, 2)]
            step = (4, 3, 16, 16), torch.uint8
            assert steps == [step, 1.0, *([] if fails else [step, step, 2.0])]
            assert rows[:2] == ["connected", f"{'a GPU' if gpu else 'CPU'}, torch {torch.__version__}, {flags[1]} at "
                                "16 px, 3.00 TFLOP an image, 2 ranks; a matrix product of 7 reaches 60 TFLOP/s"]
            tail = lambda n: (f" | {2 * n / 0.25:8,.1f} img/s |   250.0 ms | {n / 0.25 * 3:6.4g} TFLOP/s a GPU | "
                              f"{n / 0.25 * 3 / 60:.3f} of the ceiling" + " | 2.5 GiB" * gpu)
            assert rows[2:] == [f"{'   4 x 1, not compiled':36s}" + tail(4),
                                f"{'   4 x 2, not compiled':36s}" + (" | out of memory" if fails else tail(8))]
    # one rank whose last setting, that of the parts, does not fit: there is nothing more to say
    class OneRank(TwoRanks):
        def __init__(self, out):
            super().__init__(out)
            self.ranks = 1
    rows.clear(), asked.clear()
    gpu = fails = False
    with tempfile.TemporaryDirectory() as tmp, patch.multiple(
            speed, Run=OneRank, training_step=training_step, model_flops=lambda *what: 3e12,
            seconds=unittest.mock.Mock(side_effect=[0.25] * 5 + [torch.OutOfMemoryError]),
            matrix_ceiling=lambda d: (7, 6e13)):
        flags[1] = micro_teacher(tmp)
        speed.train_speed(flags)
    assert [row.split(" | ")[1] for row in rows[2:]] == [
        *(f"{n / 0.25:8,.1f} img/s" for n in (4, 2, 8, 1, 4)), "out of memory"] and len(rows) == 8
    product = []
    with patch.object(speed, "seconds", lambda f, repeats: product.append((tuple(f().shape), repeats)) or 0.5):
        assert speed.matrix_ceiling(torch.device("cpu")) == (1024, 2 * 1024 ** 3 / 0.5)
    assert product == [((1024, 1024), 50)]


def test_the_benches_of_a_gpu():
    """What is measured there: InternViT's size at random in batches of 32 and 1; and how encode and decode become fast:
    matrices in bf16, compiled, autocast, without gradients, a graph of each for one shape and number of steps."""
    rows, made = [], []
    model = lambda *what: made.append(what) or unittest.mock.Mock(
        eval=lambda: model("eval"), to=lambda d: model(d.type), config=decoder.DecoderConfig())
    with patch.object(torch.cuda, "is_available", lambda: True), \
            patch.object(torch.cuda, "get_device_name", lambda: "a GPU"), \
            patch.object(torch, "rand", lambda *shape, device: (shape, device.type)), \
            patch.multiple(speed, ViT=lambda c: c, Encoder=model, Decoder=model,
                           fast=lambda enc, dec, img, steps: (lambda x: rows.append((img, steps)), lambda z: None),
                           median_seconds=lambda f: 0.5):
        said = printed(speed.sample_speed, None, None)
        small = printed(speed.sample_speed, None, 224)
    assert made[:6] == [(encoder.TEACHERS["internvit"],), ("eval",), (decoder.DecoderConfig(),), ("eval",), ("cuda",),
                        ("cuda",)]
    line = lambda B, what: f"batch {B:2d} | {what:18s} | {B / 0.5:8.1f} img/s |  500.00 ms"
    steps = "decode in 1 step", "decode in 2 steps", "decode in 4 steps", "decode in 25 steps"
    both = "encode + decode", "encode"
    assert said == ["RANDOM weights of the InternViT tokenizer's size, for measuring",
                    f"a GPU, bf16, compiled, CUDA graphs, torch {torch.__version__}, 448 px",
                    *(line(32, what) for what in (*both, *steps)), *(line(1, what) for what in (*both, steps[0]))]
    assert small[1].endswith(" 224 px") and rows == [
        (((B, 3, side, side), "cuda"), n) for side in (448, 224) for B, ns in ((32, (1, 2, 4, 25)), (1, (1,)))
        for n in ns]

    def noted(name, result=None):
        return lambda *args, **how: did.append((name, args, how, torch.is_grad_enabled())) or result

    def part():
        module, kinds = torch.nn.Module(), dict(a=(2,), b=(2, 3), c=(2, 3, 4), d=(2, 3, 1, 1))
        for name, shape in kinds.items():
            module.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        return module
    did, enc, dec, img = [], part(), part(), argparse.Namespace(device=argparse.Namespace(type="cuda"))
    enc.encode, enc.compile, dec.decode = noted("encode", "latent"), noted("compile"), noted("decode", "picture")
    dec.condition, dec.velocity = "condition", "velocity"
    with patch.object(torch, "compile", lambda f, **how: (f, how)), \
            patch.object(torch, "autocast", noted("autocast", contextlib.nullcontext())), \
            patch.object(torch.cuda, "make_graphed_callables", lambda *what: what):
        (encode, decode), shapes = speed.fast(enc, dec, img, 4)
    assert encode is enc.encode and shapes == ((img,), ("latent",)) and decode("z") == "picture"
    assert did == [("compile", (), dict(dynamic=False), True),
                   ("autocast", ("cuda", torch.bfloat16), dict(cache_enabled=False), False),
                   ("encode", (img,), {}, False), ("decode", ("z", 4), {}, True)], did
    assert [dec.condition, dec.velocity] == [(name, dict(dynamic=False)) for name in ("condition", "velocity")]
    for module in enc, dec:
        assert [p.dtype for p in module.parameters()] == [torch.float32, torch.bfloat16] * 2, "no norm, bias or table"


def test_a_graph_is_recorded_after_three_rounds_and_replayed():
    """By stand-ins for torch.cuda: on a stream of its own the step runs three times, then gradients are cleared, then
    it is recorded on pictures of its own, which each replay fills. What it gives are the recording's tensors."""
    did = []

    @contextlib.contextmanager
    def within(name, what):
        did.append((name, what))
        yield
        did.append("end")

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            did.append(f"{self.name} waits for {other.name}")
    batch, own = torch.full((2, 3), 7, dtype=torch.uint8), []

    def micro_step(img):
        own.append(img)
        did.append(("step", img.tolist()))
        return f"statistics {len(own)}"
    graph = unittest.mock.Mock(replay=lambda: did.append(("replay", own[-1].tolist())))
    with patch.multiple(torch.cuda, Stream=Stream, current_stream=lambda: Stream("main"), CUDAGraph=lambda: graph,
                        stream=lambda s: within("on", s.name), graph=lambda g: within("record", g is graph)):
        replay = optimizer.capture_graph(micro_step, batch, lambda: did.append("clear"))
        step = ("step", [[7] * 3] * 2)
        assert did == ["side waits for main", ("on", "side"), step, step, step, "end", "main waits for side", "clear",
                       ("record", True), step, "end"], did
        assert len(set(map(id, own))) == 1 and own[0] is not batch
        did.clear()
        for value in 1, 5:
            assert replay(torch.full((2, 3), value, dtype=torch.uint8)) == "statistics 4"
        assert did == [("replay", [[1] * 3] * 2), ("replay", [[5] * 3] * 2)] and batch.eq(7).all()


def test_frames_are_coded_in_parts_of_a_million_pixels():
    """1024 x 512 pixels: two frames a part; beyond a million, one. All from the noise of picture 0, from the padded
    frames, in as many steps; what comes back is cut to the frames again."""
    parts = []

    def decode(z, steps, noise):
        parts[-1] += [steps, tuple(noise.shape), noise[-1, -1, -3:].tolist(), torch.equal(noise[0], noise[-1])]
        return z
    enc = argparse.Namespace(encode=lambda img: parts.append([tuple(img.shape)]) or img)
    dec = argparse.Namespace(config=argparse.Namespace(patch=16), decode=decode)
    for (H, W), counts in ((512, 1024), [2, 1]), ((1030, 1021), [1, 1, 1]), ((9, 33), [3]):
        x = torch.randint(256, (3, 3, H, W), dtype=torch.uint8)
        h, w = math.ceil(H / 16), math.ceil(W / 16)
        noise = evaluation.image_noise([0], h * w, 768, 5)[0, -1, -3:].tolist()
        parts.clear()
        z, rec = sample.reconstruct(enc, dec, x, H, W, torch.device("cpu"), 4, 5)
        assert parts == [[(n, 3, 16 * h, 16 * w), 4, (n, h * w, 768), noise, True] for n in counts]
        assert torch.equal(rec, x) and z.shape == (3, 3, 16 * h, 16 * w)
        assert torch.equal(z[:, :, H - 1:, :W], (x[:, :, -1:] / 255).expand(-1, -1, 16 * h - H + 1, -1))
    assert sample.MAX_TOKENS == 131_072, "3840 x 2160 pixels in patches of 8 are 129,600"


def printed(f, *args):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        f(*args)
    return said.getvalue().splitlines()


def test_what_the_benches_print():
    """By times that are given: rates, shares and sums of the training step, of sampling and of loading."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(os.path.join(tmp, "p"), 3)
        with patch.object(speed, "median_seconds", lambda f: 0.5):
            for size, px in (None, 16), (24, 24):
                assert printed(speed.sample_speed, weights, size) == [
                    f"CPU, fp32, not compiled, torch {torch.__version__}, {px} px",
                    *(f"batch  2 | {what:18s} |      4.0 img/s |  500.00 ms" for what in (
                        "encode + decode", "encode", "decode in 1 step", "decode in 2 steps"))]
            with patch.object(speed, "find_weights", {None: weights}.get):  # without a GPU sample.py's weights
                assert printed(speed.sample_speed, None, 20)[0].endswith(", 20 px")
        rows, did = [], []

        def fast(enc, dec, img, steps):
            return lambda x: did.append("encode") or x, lambda z: did.append(f"decode {steps}")
        with patch.object(speed, "median_seconds", lambda f: (did.clear(), f(), rows.append([*did]), 0.5)[-1]), \
                patch.object(speed, "fast", fast):
            printed(speed.sample_speed, weights, 16)
        assert rows == [["encode", "decode 1"], ["encode"], ["decode 1"], ["decode 2"]], "what each row measures"
        with patch.object(speed, "data_speed", lambda *args: rows.append(args)):
            speed.main(["data", folder]), speed.main(["data", folder, "more.zip", "--size", "9", "--seconds", "2"])
        assert rows[4:] == [([folder], 448, 5.0), ([folder, "more.zip"], 9, 2.0)]
        with patch.multiple(speed, sample_speed=lambda *args: rows.append(args), train_speed=rows.append):
            speed.main(["sample"]), speed.main(["sample", "--weights", "w", "--size", "24"])
            speed.main(["train", "--lr", "1", "train"])
        assert rows[6:] == [(None, None), ("w", 24), ["--lr", "1", "train"]]
        for flags, words in {"sample --size 0": "size: it is 0; it must be at least 1",
                             "data x --size -8": "size: it is -8; it must be at least 1",
                             "data x --seconds 0": "seconds: it is 0; it must be at least 0.01"}.items():
            assert ends(speed.main, flags.split()) == f"argument --{words}"
        for size, near in (17, 16), (19, 20), (1, 4):
            refused(encoder.UserError, speed.sample_speed, weights, size,
                    says=f"--size {size} is no multiple of the patch 4: try --size {near}")
        clock, loaders, taken = itertools.count(0.0), [], []

        def loader(data_, num_workers, batch_sampler, **how):
            loaders.append((len(data_), data_.train, data_.size, num_workers, next(iter(batch_sampler))))
            return map(lambda n: taken.append(n) or (torch.zeros(32, 3, 4, 4), []), itertools.count())
        with patch.object(speed.time, "perf_counter", lambda: next(clock)), patch.object(speed, "DataLoader", loader), \
                patch.object(speed, "cores", lambda: 3):
            assert printed(speed.data_speed, [folder], 24, 3.0) == [
                "3 images at 24 px; the order of an epoch of ImageNet takes 1000 ms and 10 MiB a worker",
                # two batches of 32 in a clock of three seconds
                *(f"{n:3d} workers |     21.3 img/s | {64 / 3 / n:7.1f} a worker" for n in (1, 2, 3))]
        assert loaders == [(3, True, 24, n, list(range(32))) for n in (1, 2, 3)]
        # two batches of each worker until all have begun, which are not timed
        assert taken == [k for n in (1, 2, 3) for k in range(2 * n + 2)]
        teacher = os.path.join(tmp, "teacher.safetensors")
        flags = ["--teacher", teacher, "--latent_dim", "8", "--gtb_depth", "1", "--flow_depth", "2", "--flow_width",
                 "96",
                 "--batch_size", "10", "--micro_batch", "4", "--no-compile"]
        # the matrix product; five settings and the last; a micro-batch alone; the four parts
        given = [0.125, 0.5, 0.25, 1.0, 0.125, 0.75, 0.5, 0.375, 0.01, 0.02, 0.03, 0.04]
        times = iter(given)
        with patch.object(speed, "seconds", lambda f, repeats=10: next(times)):
            said = printed(speed.train_speed, flags)
        _, enc, dec = train.build_models(train.parse_args(flags))
        tflop, ceiling = train.model_flops(enc, dec, 16) / 1e12, 2 * 1024 ** 3 / 0.125 / 1e12
        row = lambda name, images, took: (f"{name:36s} | {images / took:8,.1f} img/s | {took * 1e3:7.1f} ms | "
                                          f"{images / took * tflop:6.4g} TFLOP/s a GPU | "
                                          f"{images / took * tflop / ceiling:.3f} of the ceiling")
        assert said == [
            f"CPU, torch {torch.__version__}, {teacher} at 16 px, {tflop:.2f} TFLOP an image, 1 rank; a matrix "
            f"product of 1024 reaches {ceiling:.3g} TFLOP/s",
            row("   4 x 1, not compiled", 4, 0.5), row("   2 x 1, not compiled", 2, 0.25),
            row("   8 x 1, not compiled", 8, 1.0), row("   1 x 1, not compiled, checkpoint_activations", 1, 0.125),
            row("   4 x 1, not compiled, checkpoint_activations", 4, 0.75), row("   4 x 1, not compiled", 4, 0.5),
            row("10 images a step (micro-batch x 2.5)", 10, 2.5 * 0.375 + 0.125),
            "parts: teacher 10.0 ms, student 20.0 ms, decoder 30.0 ms, distance 40.0 ms, optimizer 125.0 ms; sum "
            "225.0 ms of 500.0"], said
        times = iter(given)
        with patch.object(speed, "seconds", lambda f, repeats=10: next(times)):
            whole = printed(speed.train_speed, [*flags, "--batch_size", "4"])
        assert whole == [line for line in said if "images a step" not in line], "one micro-batch is a step"
