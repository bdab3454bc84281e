"""Hostile and damaged files, full disks, signals, bad numbers, crashes, ranks that die.

What makes the files is in tests/hostile.py, what kills the runs in tests/crashes.py.
"""
import contextlib
import fcntl
import functools
import io
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings
import zipfile

# first: tests.helpers sets the environment that torch reads when it is imported
from tests.helpers import (
    HERE, MICRO_RUN, MICRO_VIT, faulty_training, free_port, log_lines, micro_teacher, peak, picture, picture_folder,
    raises, run, run_ranks, same_weights, side_by_side, tokenizer_file, train_quietly)
from tests.crashes import crash_and_resume
from tests.hostile import Payload, fuzz, png, ways_in

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import encoder
import tools.pictures
from tools import convert

# ---- weights ----


def test_hostile_weights():
    encoder.TEACHERS["micro"] = MICRO_VIT
    junk = {"width": [10 ** 6, 0, -32, "32", True, None, 32.0, [], 2 ** 70],
            "depth": [10 ** 9, 1000, "24", 1e3, -1, {}], "heads": [0, 3], "patch": [0, 5], "activation": [[], "relu"],
            "eps": [math.nan, 0, -1e-6, "x"], "layer_scale": [math.inf, True, 1], "num_prefix": [6, -1],
            "patch_bias": [1, "no"], "size": [0, 17, 10 ** 9], "surprise": [1], "pixel_stats": [{}, ""]}
    junk_decoder = {"latent_dim": [0, -8, 10 ** 12, True, "8", None, [8]], "grid": [0, 65536, 10 ** 9],
                    "gtb_depth": [-1, 10 ** 9, True], "width": [65536, 30], "flow_width": [65536, 0],
                    "projector": [0, "x", []], "flow_depth": [999], "surprise": [1], "patch": [0, 65535]}
    large = {("depth", 1000), ("flow_depth", 999), ("grid", 65536), ("patch", 65535), ("width", 65536),
             ("flow_width", 65536)}
    with tempfile.TemporaryDirectory() as tmp:
        path, bad = tokenizer_file(tmp), os.path.join(tmp, "bad.safetensors")
        state, config = load_file(path), encoder.read_config(path)
        blob, before = open(path, "rb").read(), peak()

        def refused_by(path, *ways, words=""):
            results = ways_in(path)
            for way in ways:
                assert isinstance(results[way], str) and words in results[way], (
                    f"{way} of {path}, {words}: {results[way]}")
        for part, values, ways in (("vit", junk, ["read_config", "encoder", "own teacher"]),
                                   ("decoder", junk_decoder, ["decoder"])):
            for field, x in ((k, x) for k in values for x in values[k]):
                encoder.write_model(bad, {**config, part: {**config[part], field: x}}, state)
                refused_by(bad, *ways, words="asks for" if type(x) is int and (field, x) in large else field)
        sizes = 0, -16, 18, "16", None, True, 1e3, 10 ** 9, []
        for key, x in [("size", v) for v in sizes] + [("vit", 3), ("vit", []), ("vit", None)]:
            encoder.write_model(bad, {**config, key: x}, state)
            refused_by(bad, "read_config", "encoder")
        for x in (3, [], "x", None, {}):
            encoder.write_model(bad, {**config, "decoder": x}, state)
            refused_by(bad, "encoder", "decoder")
        for metadata in ({"config": "{"}, {"config": "[" * 10 ** 5}, {"config": '"x"'}, {"config": "[]"}, {"x": ""},
                         {"config": "{}"}, None):
            save_file(state, bad, metadata)
            refused_by(bad, "read_config", "encoder", "decoder", "own teacher", "teacher")
        assert peak() < before + 300, "something was allocated for a file of 900 kB"

        for name in ("encoder.vit.blocks.1.fc1.weight", "decoder.head.output.bias", "latent_mean", "latent_std"):
            way = "decoder" if name[0] == "d" else "encoder"
            both, x = (way, "decoder") if name[0] == "l" else (way,), state[name]
            poisoned = x.double()
            poisoned.view(-1)[3] = 1e300  # infinite as float32; 1e-300 is 0
            broken = [x.clone().fill_(math.nan), poisoned, torch.full_like(x, -math.inf), x.int(),
                      x.to(torch.float8_e4m3fn), x.to(torch.complex64), x.flatten()[:1].clone(), x[None].clone()]
            for y in broken + ([0 * x, -x, 1e-300 * x.double()] if name == "latent_std" else []):
                encoder.write_model(bad, config, {**state, name: y})
                refused_by(bad, *both, words=name.removeprefix(way + "."))
            encoder.write_model(bad, config, {k: v for k, v in state.items() if k != name})
            refused_by(bad, *both, words=name.removeprefix(way + "."))
            encoder.write_model(bad, config, {**state, name: x.double()})
            assert not any(isinstance(r, str) for w, r in ways_in(bad).items() if "teacher" not in w), (
                "float64 that fits is fine")

        encoder.write_model(bad, config, {k: x.bfloat16() for k, x in state.items()})
        assert not any(isinstance(r, str) for w, r in ways_in(bad).items() if "teacher" not in w), (
            "two bytes a number are fine")

        pickles = {"evil": Payload(os.path.join(tmp, "ran")),
                   "wrapped": {"state_dict": Payload(os.path.join(tmp, "ran"))}, "list": [1], "int": 3,
                   "tensor": torch.ones(3),
                   "meta": encoder.ViT(MICRO_VIT).to("meta").state_dict(), "keys": {3: torch.ones(3)},
                   "sparse": {k: v.to_sparse() for k, v in encoder.ViT(MICRO_VIT).state_dict().items()},
                   "int8": {k: v.to(torch.int8) for k, v in encoder.ViT(MICRO_VIT).state_dict().items()}}
        everything = "read_config", "encoder", "decoder", "own teacher", "teacher"
        for ending in (".pt", ".pth", ".bin", ".safetensors"):
            for name, content in pickles.items():
                for new in (True, False):
                    torch.save(content, os.path.join(tmp, name + ending), _use_new_zipfile_serialization=new)
                    refused_by(os.path.join(tmp, name + ending), *everything)
            with open(os.path.join(tmp, "bare" + ending), "wb") as f:
                pickle.dump(Payload(os.path.join(tmp, "ran")), f)
            refused_by(os.path.join(tmp, "bare" + ending), *everything)
        assert not os.path.exists(os.path.join(tmp, "ran")), "a pickle was executed"
        save_file({"chal_proj.c_fc.weight": torch.ones(1)}, bad)  # says that it is the released model
        refused_by(bad, "read_config", "encoder", "decoder",
                   words=f"python -m tools.convert released {bad} OUT.safetensors")
        raises(ValueError, convert.from_released, bad, path, words=[bad, "missing embeddings.class_embedding"])
        files = {"empty": b"", "short": b"1234567", "huge": struct.pack("<Q", 2 ** 60) + blob[8:], "zero": bytes(1000),
                 "text": b"weights\n" * 99, "deep": struct.pack("<Q", 10 ** 5) + b"[" * 10 ** 5, "truncated": blob[:-1],
                 "half": blob[:len(blob) // 2], "head": blob[:100]}
        for name, content in files.items():
            open(bad, "wb").write(content)
            refused_by(bad, *everything)
        shutil.make_archive(os.path.join(tmp, "archive"), "zip", tmp, os.path.basename(path))
        for strange in (tmp, os.path.join(tmp, "archive.zip"), os.path.join(tmp, "missing.safetensors")):
            refused_by(strange, *everything)
        del encoder.TEACHERS["micro"]
        picture(0).save(os.path.join(tmp, "x.png"))
        done = run("python", "sample.py", os.path.join(tmp, "x.png"), "--weights", os.path.join(tmp, "evil.pt"))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "evil.pt" in done.stderr, done.stderr
        assert not os.path.exists(os.path.join(tmp, "ran"))


def test_fuzz_weights():
    fuzz("fuzz_weights", 150)


def slow_fuzz_weights():
    """python test_all.py slow_fuzz_weights"""
    print(fuzz("fuzz_weights", 3000))


# ---- pictures and archives ----

def test_hostile_pictures():
    good, pcx = io.BytesIO(), io.BytesIO()
    picture(0).save(good, "PNG"), picture(0).save(pcx, "PCX")
    good = good.getvalue()
    header = lambda kind, w, h: kind + struct.pack("<HH", w, h) + bytes(20)
    bad = {"truncated": good[:-60], "flipped": good[:60] + b"\xff" + good[61:], "zero": b"", "zeros": bytes(1000),
           "text": b"no image", "pcx": pcx.getvalue(),
           "ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n",
           "bomb": png(2 ** 17, 1100), "gif": header(b"GIF89a", 65535, 65535), "tall": b"P5 1 200000000 255 ",
           "tiff": b"II*\0\x08\0\0\0\x02\0" + struct.pack(
               "<HHIIHHII", 256, 4, 1, 10 ** 6, 257, 4, 1, 10 ** 6)}
    with tempfile.TemporaryDirectory() as tmp:
        folder, archive = os.path.join(tmp, "folder"), os.path.join(tmp, "a.zip")
        os.makedirs(folder)
        for name, blob in bad.items():
            open(os.path.join(folder, name + ".jpg"), "wb").write(blob)
        open(os.path.join(folder, "good.png"), "wb").write(good)
        with zipfile.ZipFile(archive, "w") as z:
            for name in sorted(os.listdir(folder)):
                z.write(os.path.join(folder, name), name)
        os.symlink("loop.jpg", os.path.join(folder, "loop.jpg"))
        os.mkfifo(os.path.join(folder, "pipe.jpg"))  # reading it would wait for ever
        os.symlink("/dev/zero", os.path.join(folder, "endless.jpg"))
        before, said = peak(), io.StringIO()
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("error")
            for root in (folder, archive):
                plain, train_set = (data.ImageDataset(root, 16, train=t) for t in (False, True))
                for n in range(len(plain)):
                    name = os.path.basename(plain.path(n))
                    try:
                        plain[n]
                        assert name == "good.png", f"{name} was accepted"
                    except ValueError as e:
                        assert name != "good.png" and plain.path(n) in str(e) and len(str(e).splitlines()) == 1, e
                seen = sorted(train_set[n][1] for n in range(len(plain)))
                i = next(n for n in range(len(plain)) if "good" in plain.path(n))
                assert seen == sorted(0 if n == i else -1 - n for n in range(len(plain))), (
                    f"labels name what was replaced: {seen}")
                loader = torch.utils.data.DataLoader(train_set, 4, num_workers=2)
                assert sorted(torch.cat([label for _, label in loader]).tolist()) == seen, "also through workers"
                if root == folder:
                    os.remove(os.path.join(folder, "good.png"))  # while the run goes on; nothing readable is left
                    raises(ValueError, train_set.__getitem__, 0,
                           words=[f"nor can the {len(plain) - 1} after it", train_set.path(train_set.index(0))])
        assert peak() < before + 400 and not said.getvalue()
        raises(ValueError, tools.pictures.resize_short_side, Image.new("RGB", (20_000, 10)), 448,
               words=["896000x448", "--size"])
        # what is readable, whatever its shape
        for size in ((1, 1), (20_000, 10), (10, 20_000)):
            img = Image.new("RGB", size, "red")
            for crop in (data.center_crop(img, 448), data.random_crop(img, 448, np.random.default_rng(0))):
                assert crop.size == (448, 448) and crop.getpixel((200, 200)) == (255, 0, 0)
        assert peak() < before + 400, "20,000 x 10 must not grow to 896,000 x 448"
        first, rest = picture(0), [Image.new("RGB", (40, 30), "red")] * 3
        for ext in ("png", "gif", "webp"):
            first.save(os.path.join(tmp, "x." + ext), save_all=True, append_images=rest, lossless=True)
            shown = np.array(data.load_image(os.path.join(tmp, "x." + ext))).astype(int)
            assert np.abs(shown - np.array(first)).mean() < 10, f"the first frame of an animated {ext}"
        for mode, img in (("P", first.quantize(60)),
                          ("LA", Image.merge("LA", (first.convert("L"), Image.new("L", first.size, 0))))):
            img.save(os.path.join(tmp, "x.png"), **({"transparency": img.getpixel((3, 3))} if mode == "P" else {}))
            assert data.load_image(os.path.join(tmp, "x.png")).getpixel((3, 3)) == (255, 255, 255), (
                f"{mode}: what is transparent is white")


def test_archive_that_is_damaged_or_changes():
    with tempfile.TemporaryDirectory() as tmp:
        _, archive = picture_folder(tmp)
        blob, dataset = open(archive, "rb").read(), data.ImageDataset(archive, 16, train=False)
        right = [img for img, _ in dataset]
        with zipfile.ZipFile(archive) as z:
            at = z.infolist()[3].header_offset
        stored = os.path.join(tmp, "stored.zip")
        with zipfile.ZipFile(stored, "w") as z:  # a pixel of a bitmap: no decoder would notice
            f = io.BytesIO()
            picture(0).save(f, "BMP")
            z.writestr("a.bmp", f.getvalue())
        rotten = bytearray(open(stored, "rb").read())
        rotten[500] ^= 1
        open(stored, "wb").write(rotten)
        bomb = os.path.join(tmp, "bomb.zip")
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
            with z.open("a.png", "w") as f:
                for _ in range(256):
                    f.write(bytes(2 ** 20))
        claims = bytearray(open(bomb, "rb").read())
        end = claims.rindex(b"PK\x01\x02")
        claims[end + 24:end + 28] = struct.pack("<I", 100)  # the length it is said to inflate to
        open(bomb, "wb").write(claims)
        before = peak()
        for path in (stored, bomb):
            raises(ValueError, data.ImageDataset(path, 16, train=False).__getitem__, 0, words=["CRC-32", path])
        assert peak() < before + 100, "inflated without bound"
        for changed in (blob[:at + 40] + bytes(200) + blob[at + 240:], blob[:at + 100], b""):  # under our hands
            open(archive, "wb").write(changed)
            for n in range(10):
                try:
                    assert torch.equal(dataset[n][0], right[n])
                except ValueError as e:
                    assert dataset.path(n) in str(e)
        os.remove(archive)
        again = data.ImageDataset.__new__(data.ImageDataset)
        again.__dict__.update(dataset.__getstate__())  # what a new worker gets
        for path, content in ((archive, None), (archive, blob[:-40]), (archive, blob[:200]), (archive, b"")):
            if content is not None:
                open(path, "wb").write(content)
            for attempt in (lambda: again[0], lambda: data.ImageDataset(path, 16, train=False)):
                try:
                    attempt()
                    assert attempt is not data.ImageDataset and content and len(content) > 200, (
                        "a damaged archive was accepted")
                except (ValueError, FileNotFoundError) as e:
                    assert archive in str(e) and len(str(e).splitlines()) == 1


def test_fuzz_pictures():
    fuzz("fuzz_pictures", 300)


def slow_fuzz_pictures():
    """python test_all.py slow_fuzz_pictures"""
    print(fuzz("fuzz_pictures", 10_000))


# ---- a run ----

def test_signals_save_and_stop():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], *MICRO_RUN, "--steps", 12,
                 "--log_every", 2, "--save_every", 5]
        train_quietly(*flags[2:], "--teacher", flags[1], "--out", os.path.join(tmp, "whole"))
        out = os.path.join(tmp, "out")
        # before the first step, in a download for example, a signal ends the process at once
        for name, status in ("SIGTERM", -signal.SIGTERM), ("SIGINT", 130):
            early = os.path.join(tmp, "early.py")
            open(early, "w").write(f"import os, signal, sys\nsys.path.insert(0, {HERE!r})\nimport train\n"
                                   f"train.build_models = lambda args: os.kill(os.getpid(), signal.{name})\n"
                                   "train.run()\n")
            done = run("python", early, *flags, "--out", out)
            assert (done.returncode == status and "Traceback" not in done.stderr
                    and not os.path.exists(os.path.join(out, "state.pt"))), done
        # in the middle of a step, sent to the process alone or to its group
        for at, name in ((3, "SIGTERM"), (4, "SIGUSR1"), (2, "SIGINT"), (1, "SIGHUP")):
            target = "killpg(0" if name == "SIGTERM" else "kill(os.getpid()"
            script = faulty_training(tmp, f"    if step == {at}: os.{target}, signal.{name})")
            done = run("python", script, *flags, "--workers", 1, "--out", out)
            assert done.returncode == 0 and "interrupted and saved" in done.stdout, done.stdout + done.stderr
        assert [x["step"] for x in log_lines(out) if x.get("kind") == "interrupted"] == [3, 7, 9, 10]
        train_quietly(*flags[2:], "--teacher", flags[1], "--out", out)
        whole = log_lines(os.path.join(tmp, "whole"))
        assert [x for x in log_lines(out) if x.get("kind") != "interrupted"] == whole, (
            "an interrupted step must be finished, once")
        assert same_weights(os.path.join(out, "model.safetensors"), os.path.join(tmp, "whole", "model.safetensors"))
        # a terminal that closes, under nohup; an output that nobody reads any more
        text = open(script).read()
        open(script, "w").write("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + text)
        done = run("python", script, *flags, "--out", os.path.join(tmp, "nohup"))
        assert done.returncode == 0 and "kill(os.getpid(), signal.SIGHUP)" in text and "done: " in done.stdout, (
            done.stdout + done.stderr)
        flags = " ".join(map(str, flags))
        done = run("bash", "-c",
                   f"set -o pipefail; {sys.executable} train.py {flags} --steps 1000 --out {tmp}/head | head -1",
                   cwd=HERE)
        *_, last = log_lines(os.path.join(tmp, "head"))
        assert (done.returncode == 0 and not done.stderr and last["kind"] == "interrupted"
                and last["step"] < 100), (done, last)
        assert torch.load(os.path.join(tmp, "head", "state.pt"), weights_only=True)["step"] == last["step"]


def slow_torchrun_is_told_to_stop():
    """SIGTERM to torchrun with two ranks saves and stops; the same command goes on. By name only."""
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "out")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   "--max-restarts=3", "train.py", "--teacher", micro_teacher(tmp), *MICRO_RUN, "--workers", "1",
                   "--eval_every", "1000", "--save_every", "1000", "--out", out, "--steps"]
        start = subprocess.Popen([*command, "100000"], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True)
        log = os.path.join(out, "log.jsonl")
        while not os.path.exists(log) or len(open(log).readlines()) < 20:
            assert start.poll() is None, start.stdout.read()
            time.sleep(0.1)
        began = time.time()
        start.terminate()
        said = start.communicate(timeout=60)[0]
        last = log_lines(out)[-1]
        assert last["kind"] == "interrupted" and "interrupted and saved" in said, said
        print(f"stopped at step {last['step']} in {time.time() - began:.1f} s")
        done = run(*command, last["step"] + 5)
        assert done.returncode == 0 and f"resumed from {out}/state.pt at step {last['step']:,}" in done.stdout, (
            done.stdout + done.stderr)
        assert [x["step"] for x in log_lines(out) if "loss" in x] == list(range(1, last["step"] + 6))


def test_numbers_that_go_wrong():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], *MICRO_RUN, "--steps", 4,
                 "--eval_every", 100, "--save_every", 1, "--keep_every", 1]
        script = faulty_training(tmp, "    if step == 3 and rank == 1: fault = float('inf')")
        done, _ = run_ranks(2, "python", script, *flags, "--out", os.path.join(tmp, "ranks"))
        assert done.returncode == 0 and "1 steps skipped" in done.stdout, done.stdout + done.stderr
        lines = [x for x in log_lines(os.path.join(tmp, "ranks")) if "loss" in x]
        assert ([x["skipped"] for x in lines] == [0, 0, 1, 1]
                and [x["loss"] is None for x in lines] == [False, False, True, False])
        kept = [os.path.join(tmp, "ranks", f"model_{n:07d}.safetensors") for n in (1, 2, 3, 4)]
        assert same_weights(kept[1], kept[2]), "one rank's infinity must leave the weights of all as they are"
        assert not same_weights(kept[0], kept[1]) and not same_weights(kept[2], kept[3])
        moments = torch.load(os.path.join(tmp, "ranks", "state.pt"), weights_only=True)["optimizer"]["state"][0]
        assert moments["step"] == 3 and moments["exp_avg"].isfinite().all()
        # ten in a row: the run stops, and says where
        script = faulty_training(tmp, "    if step > 2: fault = float('nan')")
        out = os.path.join(tmp, "out")
        done = run("python", script, *flags[:-6], "--steps", 50, "--eval_every", 100, "--save_every", 100, "--out", out)
        assert (done.returncode == 2 and "at step 12 " in done.stderr and "10 steps in a row" in done.stderr
                and "state.pt" in done.stderr), done.stderr
        flow = [x for x in log_lines(out) if x["step"] == 2][0]["loss_flow"]
        assert f"flow {flow:.4f}" in done.stderr, "the last finite loss"
        read = data.ImageDataset(picture_folder(tmp)[0], 16, True)
        expected = [read.path(read.index(n)) for n in range(44, 48)]  # the twelfth batch of four
        assert (open(os.path.join(out, "not_finite.txt")).read().splitlines() == expected
                and os.path.basename(expected[0]) in done.stderr)


def test_a_full_disk_loses_nothing():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), *MICRO_RUN, "--eval_every", 100, "--out", os.path.join(tmp, "out")]
        train_quietly(*flags, "--steps", 2)
        state = os.path.join(tmp, "out", "state.pt")
        before = open(state, "rb").read()
        script = faulty_training(tmp, """    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)""")
        done = run("python", script, *flags, "--steps", 4)
        assert (done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "could not be saved" in done.stderr
                and state in done.stderr), done.stderr
        assert open(state, "rb").read() == before and not [n for n in os.listdir(os.path.join(tmp, "out"))
                                                           if n.endswith(".tmp")]
        # a model of another run
        shutil.copy(os.path.join(tmp, "teacher.safetensors"), os.path.join(tmp, "out", "model.safetensors"))
        with open(os.path.join(tmp, "out", "log.jsonl"), "a") as f:
            f.write('{"step": 2, "lo')  # torn
        said = train_quietly(*flags, "--steps", 4)
        assert "resumed from" in said and "is not of that step" in said and "written again" in said, said
        assert [x["step"] for x in log_lines(os.path.join(tmp, "out")) if "loss" in x] == [1, 2, 3, 4]
        more, _ = picture_folder(os.path.join(tmp, "data"))
        other = [*flags[:-1], os.path.join(tmp, "grown"), "--data", more]
        train_quietly(*other, "--steps", 1)
        picture(99).save(os.path.join(more, "class0", "99.png"))
        raises(ValueError, train_quietly, *other, "--steps", 2, words="images was 10 images")
        with open(os.path.join(tmp, "out", ".lock"), "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            model = shutil.copy(os.path.join(tmp, "teacher.safetensors"), os.path.join(tmp, "out", "model.safetensors"))
            done = run("python", "train.py", *flags, "--steps", 5)
            assert done.returncode == 2 and "another run is writing" in done.stderr, done.stderr
            assert same_weights(model, os.path.join(tmp, "teacher.safetensors")), "a second run must write nothing"
        # as on Lustre without flock
        with unittest.mock.patch.object(fcntl, "lockf", side_effect=OSError(38, "Function not implemented")):
            assert "cannot be locked" in train_quietly(*flags, "--steps", 4)
        os.remove(state)
        for n in (1, 2):  # without state.pt: a new run, the old one's files stay beside it
            train_quietly(*flags, "--steps", 1, "--keep_every", 1)
            os.remove(state)
        assert {"step_000001.png", "step_000001.png.old"} <= set(os.listdir(os.path.join(tmp, "out", "samples")))
        names = os.listdir(os.path.join(tmp, "out"))
        assert {"log.jsonl.old", "log.jsonl.old.old", "model.safetensors.old", "model.safetensors.old.old",
                "model_0000001.safetensors", "model_0000001.safetensors.old"} <= set(names), names
        assert (len(log_lines(os.path.join(tmp, "out"))) == 2
                and len(open(os.path.join(tmp, "out", "log.jsonl.old")).readlines()) >= 4)


def test_crashes_change_nothing():
    side_by_side(lambda: crash_and_resume(2, 1), lambda: crash_and_resume(1, 2))


def slow_crashes():
    """25 kills with one rank and 25 with two. By name only: python test_all.py slow_crashes"""
    crash_and_resume(25, 1, seed=1)
    crash_and_resume(25, 2, seed=2)


def slow_two_thousand_steps():
    """No growth of memory or of open files over 2,000 steps. By name only: python test_all.py
    slow_two_thousand_steps"""
    with tempfile.TemporaryDirectory() as tmp:
        script = faulty_training(tmp, """    if step in (300, 2000):
        import gc; gc.collect()
        memory = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
        print(f"step {step}: {memory} KB, {len(os.listdir('/proc/self/fd'))} files", file=sys.stderr, flush=True)""")
        done = run("python", script, "--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[1], *MICRO_RUN,
                   "--steps", 2000, "--eval_every", 50, "--save_every", 50, "--log_every", 10, "--out",
                   os.path.join(tmp, "out"))
        (first, files), (last, files_then) = (map(int, x)
                                              for x in re.findall(r"step \d+: (\d+) KB, (\d+) files", done.stderr))
        print(f"{first} KB, {files} files at step 300; {last} KB, {files_then} files at step 2000")
        assert last - first < 20_000 and files == files_then, done.stderr


# ---- ranks ----

def test_a_rank_that_dies_takes_the_others_down():
    with tempfile.TemporaryDirectory() as tmp:
        script = faulty_training(tmp, "    if step == 3 and rank == 1: raise RuntimeError('rank 1 says why')")
        start = time.time()
        done = run("torchrun", "--nproc_per_node=2", script, "--teacher", micro_teacher(tmp), *MICRO_RUN,
                   "--steps", 1000, "--out", os.path.join(tmp, "out"))
        assert done.returncode and "RuntimeError: rank 1 says why" in done.stderr and time.time() - start < 60, (
            done.stderr[-3000:])


def test_ranks_that_see_different_checkpoints_stop():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0]]
        train_quietly(*flags, "--out", os.path.join(tmp, "1"), "--steps", 1, "--batch_size", 4)
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        both = (functools.partial(run, "python", "train.py", *MICRO_RUN, *flags, "--out", os.path.join(tmp, r),
                                  "--steps", 2, RANK=r, LOCAL_RANK=r, **env)
                for r in "01")
        _, done = side_by_side(*both)
        assert done.returncode == 2 and "file system that all nodes share" in done.stderr, done.stderr
