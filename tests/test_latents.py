"""Saved latents: their statistics, their order, faults of the folder.

The code is in tools/latents.py.
"""
import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import signal
import tempfile
import unittest.mock
import zipfile

from tests.helpers import (
    HERE, MICRO_RUN, close, picture, picture_folder, raises, run, run_ranks, tokenizer_file)

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import decoder
import encoder
import eval as evaluation
import tools.latents as latents
import train

patch = unittest.mock.patch


def command(*flags):
    """(what it printed, its report) of `python -m tools.latents`, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report = latents.main([*map(str, flags), "--workers", "0"])
    return out.getvalue(), report


def with_statistics(folder):
    """Path of a tokenizer whose file has latent statistics."""
    path = tokenizer_file(folder)
    stats = {"latent_mean": torch.linspace(-1, 1, 8), "latent_std": torch.full((8,), 2.0)}
    encoder.write_model(path, encoder.read_config(path), {**load_file(path), **stats})
    return path


def small_files(folder, more=""):
    """Path of a script that is `python -m tools.latents` with four images a file, after the code `more`."""
    path = os.path.join(folder, "latents_of_four.py")
    open(path, "w").write(f"""
import os, signal, sys
sys.path.insert(0, {HERE!r})
import tools.latents as latents
latents.SHARD = 4
{more}
if __name__ == "__main__":
    latents.command_line(latents.main, "tools.latents")
""")
    return path


def raw(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


def contents(folder):
    """{file: what it says}: the two entries of a safetensors file's metadata come in an order that changes."""
    found = raw(folder)
    for name in found:
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                tensors = {key: f.get_tensor(key).numpy().tobytes() for key in f.keys()}
                found[name] = f.metadata()["config"], tensors
    return found


def test_latent_statistics_and_saved_latents():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=11)
        tensors, config = load_file(weights), encoder.read_config(weights)
        tensors["encoder.latent_down.2.bias"] += 300  # a mean far beyond the deviation
        encoder.write_model(weights, config, tensors)
        read = data.ImageDataset(folder, 16, train=False)
        img, noise = torch.stack([read[n][0] for n in range(11)]) / 255, torch.randn(11, 16, 48)
        enc, dec = encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights)
        with torch.no_grad():
            z, before = enc(img)[0], dec.decode(enc.encode(img), noise=noise)
        raises(encoder.UserError, command, "save", "--out", os.path.join(tmp, "z"), "--data", folder, "--weights",
               weights, words=f"{weights} has no latent statistics yet: python -m tools.latents stats --data TRAIN "
               f"--weights {weights}")
        files = []
        for ranks in (1, 3):
            copy = os.path.join(tmp, f"{ranks}.safetensors")
            shutil.copy(weights, copy)
            flags = ["stats", "--data", folder, "--weights", copy, "--batch_size", 2]
            if ranks == 1:
                command(*flags)
            else:
                done, *_ = run_ranks(3, "python", "-m", "tools.latents", *flags)
                assert done.returncode == 0, done.stderr[-2000:]
            files.append(load_file(copy))
        exact = z.double().transpose(0, 1).flatten(1)  # (C, B*h*w)
        for name, expected in ("latent_mean", exact.mean(1)), ("latent_std", exact.std(1, correction=0)):
            assert torch.equal(files[0][name], files[1][name]), "any number of ranks"
            # fp32 latents of size 300 carry 3e-5
            close(files[0][name].double(), expected, 1e-4 if name == "latent_std" else 1e-7)
        elsewhere = os.path.join(tmp, "new.safetensors")
        _, report = command("stats", "--data", folder, "--weights", weights, "--out", elsewhere)
        assert torch.equal(load_file(elsewhere)["latent_mean"], files[0]["latent_mean"])
        assert report["latent_mean"] == files[0]["latent_mean"].tolist() and "out" not in report
        assert not load_file(weights)["latent_mean"].any(), "the file itself stays as it is"
        enc, dec = encoder.Encoder.from_pretrained(copy), decoder.Decoder.from_pretrained(copy)
        normal = enc.encode(img).transpose(0, 1).flatten(1)
        assert normal.mean(1).abs().max() < 1e-3 and (normal.std(1) - 1).abs().max() < 0.01
        close(dec.decode(enc.encode(img), noise=noise), before, 1e-5)
        assert torch.equal(load_file(copy)["encoder.vit.pos_embed"], tensors["encoder.vit.pos_embed"])
        assert encoder.read_config(copy)["size"] == 16 and encoder.read_config(copy)["latent_images"] == 11

        out = os.path.join(tmp, "z")
        flags = ["save", "--out", out, "--data", folder, "--weights", copy, "--batch_size", 3]
        with patch.object(latents, "SHARD", 4):
            assert "3 files of 4" in command(*flags)[0]
            os.remove(os.path.join(out, "latents_00001.safetensors"))
            stamp = os.stat(os.path.join(out, "latents_00000.safetensors")).st_mtime_ns
            assert "1 files of 4" in command(*flags)[0], "what is there is not written again"
            assert os.stat(os.path.join(out, "latents_00000.safetensors")).st_mtime_ns == stamp
            raises(encoder.UserError, command, *flags, "--bf16", words="of other weights")
            raises(encoder.UserError, command, *flags, "--size", 24, words="of other weights")
            shutil.copytree(folder, os.path.join(tmp, "other"))  # the same names
            raises(encoder.UserError, command, *[os.path.join(tmp, "other") if x == folder else x for x in flags],
                   words="data")
        args = train.parse_args(["--teacher", os.path.join(tmp, "teacher.safetensors"), *MICRO_RUN, "--gtb_depth", "2",
                                 "--init", copy])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            _, *again = train.build_models(args)
        assert "set back" in said.getvalue()
        assert all(not x.latent_mean.any() and (x.latent_std == 1).all() for x in again), "of encoder and decoder"
        shards = [load_file(os.path.join(out, f"latents_{k:05d}.safetensors")) for k in range(3)]
        assert all(s.keys() == {"latents", "labels"} for s in shards)
        close(torch.cat([s["latents"] for s in shards]), enc.encode(img), 1e-5)
        labels = torch.cat([s["labels"] for s in shards])
        assert labels.tolist() == [read[n][1] for n in range(11)] and labels.dtype == torch.int64
        assert json.load(open(os.path.join(out, "index.json")))["classes"] == ["class0", "class1"]
        low = os.path.join(tmp, "low")
        command(*[low if x == out else x for x in flags], "--bf16")
        stored = load_file(os.path.join(low, "latents_00000.safetensors"))["latents"]
        assert stored.dtype == torch.bfloat16 and latents.LatentDataset(low, False)[3][0].dtype == torch.float32
        assert torch.equal(latents.LatentDataset(low, False)[3][0], stored[3].float())


def test_statistics_refuse_what_would_be_wrong():
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=9)
        before, whole = open(weights, "rb").read(), evaluation.Moments.add
        read = decoder.Decoder.from_pretrained

        def meanwhile(self, x):  # train.py saves while the statistics are being computed
            whole(self, x)
            open(weights, "ab").write(b" ")

        def saved(path):  # train.py saves between encoder and decoder
            model = read(path)
            encoder.write_model(path, {**encoder.read_config(path), "step": 7}, load_file(path))
            return model
        for place, name, fault, words in ((evaluation.Moments, "add", meanwhile,
                                           f"{weights} was overwritten meanwhile: run this again on a copy, or after"),
                                          (decoder.Decoder, "from_pretrained", saved, "while it was read")):
            with patch.object(place, name, fault):
                raises(ValueError, command, "stats", "--data", folder, "--weights", weights, words=words)
            open(weights, "wb").write(before)
        tensors = load_file(weights)
        for key in "weight", "bias":
            tensors[f"encoder.latent_down.2.{key}"][3] = 0
        encoder.write_model("constant.safetensors", encoder.read_config(weights), tensors)
        raises(encoder.UserError, command, "stats", "--data", folder, "--weights", "constant.safetensors",
               words="latent channels [3] are constant")
        raises(ValueError, command, "save", "--data", folder, "--weights", weights, "--out", "z", "--size", 18,
               words=["18 is no multiple of the patch 4", "try --size 16"])
        for flags, words in ((["stats"], "--weights FILE"), (["stats", "--out", "x.json"], ".safetensors"),
                             (["save"], "--out"),
                             (["save", "--out", "z", "--batch_size", "0"], "--batch_size: it is 0"),
                             (["stats", "--out", os.path.join(weights, "x.safetensors")], "cannot be written"),
                             (["save", "--out", "z", "--workers", "-1"], "--workers: it is -1")):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                raises(SystemExit, latents.main, [*flags, "--data", folder], words="2")
            assert words in said.getvalue(), said.getvalue()
        os.makedirs("alone"), shutil.copy(os.path.join(folder, "class0", "0.png"), "alone")
        command("stats", "--data", "alone", "--weights", weights)  # one image is enough here
        for flags, words in ((["stats", "--data", "missing", "--weights", weights], "missing"),
                             (["save", "--data", folder, "--weights", weights, "--out", weights], "is no folder")):
            done = run("python", "-m", "tools.latents", *flags)
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_files_of_latents_say_where_they_begin_and_of_which_data():
    with tempfile.TemporaryDirectory() as tmp, patch.object(latents, "SHARD", 2):
        weights, (_, archive), out = with_statistics(tmp), picture_folder(tmp, n=5), os.path.join(tmp, "latents")
        flags = ["save", "--data", archive, "--weights", weights, "--out", out]
        command(*flags)
        names = sorted(name for name in os.listdir(out) if name != "index.json")
        assert len(names) == 3 and json.load(open(os.path.join(out, "index.json")))["shard"] == 2
        for k, name in enumerate(names):
            with safe_open(os.path.join(out, name), "pt") as f:
                assert json.loads(f.metadata()["config"])["first"] == 2 * k
                assert len(f.get_tensor("labels")) == min(2, 5 - 2 * k)
        picture_folder(tmp, n=5)  # the same pictures again: nothing to do
        assert "0 files of 2" in command(*flags)[0]
        with zipfile.ZipFile(archive) as z:
            names = z.namelist()
        with zipfile.ZipFile(archive, "w") as z:  # the same names, other pictures
            for k, name in enumerate(names):
                picture(50 + k).save(f := io.BytesIO(), "PNG")
                z.writestr(name, f.getvalue())
        raises(encoder.UserError, command, *flags, words="of other weights, data, size, precision or --flip")


def test_mirrored_latents_are_those_of_mirrored_pictures():
    with tempfile.TemporaryDirectory() as tmp, patch.object(latents, "SHARD", 4):
        weights, (folder, _), out = with_statistics(tmp), picture_folder(tmp, n=7), os.path.join(tmp, "z")
        flags = ["save", "--data", folder, "--weights", weights, "--out", out, "--batch_size", 3]
        assert "and mirrored ones" in command(*flags, "--flip")[0]
        enc, read = encoder.Encoder.from_pretrained(weights), data.ImageDataset(folder, 16, train=False)
        crops = np.stack([read[n][0].numpy() for n in range(7)])
        shards = [load_file(os.path.join(out, f"latents_{k:05d}.safetensors")) for k in range(2)]
        for name, pixels in ("latents", crops), ("mirrored", crops[:, :, :, ::-1].copy()):
            with torch.no_grad():
                expected = enc.encode(torch.from_numpy(pixels) / 255)
            close(torch.cat([s[name] for s in shards]), expected, 1e-5)
        gap = (shards[0]["latents"] - shards[0]["mirrored"]).norm() / shards[0]["latents"].norm()
        assert gap > 0.01, "the pictures must tell a mirrored one from the other"
        before = raw(out)
        with patch.object(encoder.Encoder, "encode", side_effect=AssertionError("all files are there")):
            assert "0 files of 4" in command(*flags, "--flip")[0] and raw(out) == before
        raises(encoder.UserError, command, *flags,
               words=f"{out}/latents_00000.safetensors is of other weights, data, size, precision or --flip: use "
               "another folder")
        shutil.rmtree(out)
        command(*flags)
        raises(encoder.UserError, command, *flags, "--flip", words="--flip: use another folder")


def test_ranks_and_a_kill_change_no_byte():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = with_statistics(tmp), picture_folder(tmp, n=11)
        flags = ["save", "--data", folder, "--weights", weights, "--batch_size", 4, "--workers", 1, "--flip", "--out"]
        one, two, killed = (os.path.join(tmp, name) for name in ("one", "two", "killed"))
        plain = small_files(tmp)
        done = run("python", plain, *flags, one)
        assert done.returncode == 0 and "11 normalised latents" in done.stdout, done.stderr
        both = run_ranks(2, "python", plain, *flags, two)
        assert [done.returncode for done in both] == [0, 0], both
        assert "3 files of 4 written now" in both[0].stdout and not both[1].stdout, "each file by one rank"
        assert len(contents(one)) == 4 and contents(two) == contents(one)
        code = """
write, written = latents.write_model, []
def dies(path, *rest):
    write(path, *rest)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
latents.write_model = dies
"""
        done = run("python", small_files(tmp, code), *flags, killed)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert sorted(raw(killed)) == ["latents_00000.safetensors", "latents_00001.safetensors"]
        raises(encoder.MissingFile, latents.LatentDataset, killed, True,
               words=["index.json is missing", "python -m tools.latents save"])
        stamp = os.stat(os.path.join(killed, "latents_00001.safetensors")).st_mtime_ns
        done = run("python", small_files(tmp), *flags, killed)
        assert "1 files of 4 written now" in done.stdout and contents(killed) == contents(one), done.stderr
        assert os.stat(os.path.join(killed, "latents_00001.safetensors")).st_mtime_ns == stamp


def test_latents_come_in_the_order_of_the_closed_rule():
    with tempfile.TemporaryDirectory() as tmp, patch.object(latents, "SHARD", 4):
        weights, (folder, _), out = with_statistics(tmp), picture_folder(tmp, n=11), os.path.join(tmp, "z")
        command("save", "--data", folder, "--weights", weights, "--out", out, "--flip")
        shards = [load_file(os.path.join(out, f"latents_{k:05d}.safetensors")) for k in range(3)]
        whole = {name: torch.cat([s[name] for s in shards]) for name in shards[0]}
        pictures = data.ImageDataset(folder, 16, train=False)
        a = latents.LatentDataset(out, train=False)
        assert len(a) == 11 and a.classes == ["class0", "class1"] and a.about["weights"] == weights
        for n in range(11):
            latent, label = a[n]
            assert torch.equal(latent, whole["latents"][n]) and latent.dtype == torch.float32
            assert type(label) is int and label == pictures[n][1] and a.index(n) == n
        assert len(list(a)) == 11, "iterating must end"
        assert torch.equal(a[-1][0], a[10][0]) and a.path(9) == os.path.join(out, "latents_00002.safetensors") + "[1]"
        seen = []
        for seed in 3, 4:
            b, images = latents.LatentDataset(out, True, seed), data.ImageDataset(folder, 16, True, seed)
            for n in range(10_000_000, 10_000_060):
                epoch, k = divmod(n, 11)
                i = int(np.random.default_rng([seed, epoch]).permutation(11)[k])
                name = "mirrored" if np.random.default_rng([seed, n, 1]).random() < 0.5 else "latents"
                assert b.index(n) == images.index(n) == i, "the order of pictures and latents is one"
                latent, label = b[n]
                assert torch.equal(latent, whole[name][i]) and label == whole["labels"][i], (seed, n)
                seen.append(name)
        assert 35 < seen.count("mirrored") < 85, "half of 120"
        first = latents.LatentDataset(out, True)
        assert [first.index(n) for n in range(11)] == np.random.default_rng([0, 0]).permutation(11).tolist(), "seed 0"
        for attribute in vars(b).values():
            assert not isinstance(attribute, torch.Tensor), "latents stay in their files"
        script = os.path.join(tmp, "look.py")  # its workers forked and spawned
        open(script, "w").write(f"""
import torch
from tools import latents
if __name__ == "__main__":
    a = latents.LatentDataset({out!r}, True, 3)
    a[0]
    for start in "fork", "spawn":
        loader = torch.utils.data.DataLoader(a, 5, sampler=range(20), num_workers=1, multiprocessing_context=start)
        print([y for _, labels in loader for y in labels.tolist()], sum(x.double().sum() for x, _ in loader).item())
""")
        b = latents.LatentDataset(out, True, 3)
        done, expected = run("python", script), [b[n][1] for n in range(20)]
        total = sum(torch.stack([b[n][0] for n in range(k, k + 5)]).double().sum() for k in range(0, 20, 5)).item()
        assert done.stdout.splitlines() == [f"{expected} {total}"] * 2, done.stdout + done.stderr


def test_a_folder_of_latents_that_is_not_whole():
    with tempfile.TemporaryDirectory() as tmp, patch.object(latents, "SHARD", 4):
        weights, (folder, _), good = with_statistics(tmp), picture_folder(tmp, n=11), os.path.join(tmp, "good")
        save = functools.partial(command, "save", "--data", folder, "--weights", weights, "--out")
        save(good)
        other = os.path.join(tmp, "other")
        save(other, "--size", 24)
        index, second = "index.json", "latents_00001.safetensors"
        out = os.path.join(tmp, "z")

        def refused(name, content, words, kind=encoder.UserError):
            """A good folder in which one file has this content, or is gone, is refused in one line that names it."""
            shutil.rmtree(out, ignore_errors=True), shutil.copytree(good, out)
            os.remove(os.path.join(out, name))
            if content is not None:
                open(os.path.join(out, name), "wb").write(content)
            raises(kind, latents.LatentDataset, out, True, words=[os.path.join(out, name), "again", *words])
        whole, theirs = raw(good), raw(other)
        refused(index, None, ["is missing"], encoder.MissingFile)
        refused(second, None, ["is missing", "goes on where it stopped"], encoder.MissingFile)
        for content in b"", whole[second][:-40], whole[second][:60], b"\xff" * 400, bytes(400):
            refused(second, content, ["is damaged", "delete it"])
        for content in b"", b"[]", b"{}", whole[index][:-30], b"\xff\xfe", b"3":
            refused(index, content, ["is damaged"])
        refused(index, b"{}", [
            "is damaged (KeyError: 'classes'): delete it and run `python -m tools.latents save` again"])
        refused(second, theirs[second], ["of different latents"])  # of another size
        refused(second, whole["latents_00000.safetensors"], ["of different latents"])
        tensors = load_file(os.path.join(good, second))
        save_file(tensors, os.path.join(tmp, "bare.safetensors"))  # without metadata
        refused(second, open(os.path.join(tmp, "bare.safetensors"), "rb").read(), ["is damaged"])
        raises(encoder.MissingFile, latents.LatentDataset, os.path.join(tmp, "nowhere"), True, words="nowhere")
        raises(encoder.MissingFile, latents.LatentDataset, weights, True, words=weights)  # a file
        raises(encoder.UserError, save, out,  # as the last of them left it
               words=[f"{out}/{second} is damaged ('NoneType' object is not subscriptable)", "delete it and run this"])


def test_files_of_latents_stay_mapped():
    with tempfile.TemporaryDirectory() as tmp, patch.object(latents, "SHARD", 4):
        weights, (folder, _), out = with_statistics(tmp), picture_folder(tmp, n=11), os.path.join(tmp, "z")
        command("save", "--data", folder, "--weights", weights, "--out", out)
        a, opened = latents.LatentDataset(out, train=False), []

        def spy(path, framework):
            opened.append(os.path.basename(path))
            return safe_open(path, framework)
        with patch.object(latents, "safe_open", spy):
            first = [a[n][0] for n in range(11)]
            again = [a[n][0] for n in reversed(range(11))]
            assert sorted(opened) == [f"latents_0000{k}.safetensors" for k in range(3)], "each file is mapped once"
            opened.clear()
            other = pickle.loads(pickle.dumps(a))
            assert not other.mapped and torch.equal(other[9][0], a[9][0]) and len(opened) == 1, "a worker maps its own"
            with patch.object(latents, "MAPPED", 2):
                for n in 0, 4, 8, 5, 1, 9, 2:
                    assert torch.equal(other[n][0], first[n]) and len(other.mapped) <= 2
        assert all(torch.equal(x, y) for x, y in zip(first, reversed(again)))
        a[3][0].zero_()  # what a caller does with a latent is not in the file, nor in what is mapped
        assert first[3].any() and torch.equal(a[3][0], first[3])
        late = latents.LatentDataset(out, train=False)
        os.remove(os.path.join(out, "latents_00001.safetensors"))
        raises(encoder.MissingFile, late.__getitem__, 5, words="latents_00001.safetensors is gone")
        assert torch.equal(late[8][0], first[8]) and torch.equal(a[5][0], first[5]), "a mapped file is still there"


def test_reports_of_latents_say_what_was_done():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=4)
        given, made = ["--data", folder, "--weights", weights, "--size", 24], os.path.join(tmp, "made.safetensors")
        for flags, precision in ([], "fp32 without TF32"), (["--bf16"], "bf16 autocast"):
            said, report = command("stats", *given, "--out", made, *flags)
            mean, std = (load_file(made)[f"latent_{k}"] for k in ("mean", "std"))
            assert report["latent_mean"] == mean.tolist() and report["latent_std"] == std.tolist()
            assert f"ADM centre crops to 24 px, {precision}, per channel over" in report["protocol"]
            for name, figures in ("mean      ", mean), ("deviation ", std):
                assert name + " ".join(f"{x:.3f}" for x in figures) + "\n" in said, said
            assert f"written to {made}: " in said and encoder.read_config(made)["latent_images"] == 4
            out = os.path.join(tmp, precision)
            command("save", *given[:2], "--weights", made, *given[4:], "--out", out, *flags)
            index = json.load(open(os.path.join(out, "index.json")))
            assert index["protocol"] == f"ADM centre crops to 24 px, {precision}"
            assert (index["weights"], index["data"], index["images"], index["size"]) == (made, [folder], 4, 24)
