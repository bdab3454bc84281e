"""Scripts at their boundaries: a user's error and a bug, names, targets, moved data."""
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import types
import unittest.mock
from dataclasses import asdict

from tests.helpers import (
    MICRO_RUN, QuickInception, clip, evaluate, faulty_training, log_lines, micro_models, micro_teacher, picture,
    picture_folder, pixels, raises, run, same_weights, sampled, side_by_side, tokenizer_file, train_quietly,
    windows_like)

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch._utils import ExceptionWrapper

import data
import decoder
import encoder
import eval as evaluation
import sample
import tools.pictures
import tools.batches
import tools.checkpoint
import tools.run
import tools.speed
import train
import tools.script as script
from tools.checkpoint import explain_failed_save
from tools.run import Run, finite

patch = unittest.mock.patch


def test_a_bug_is_no_users_error():
    """By kind, and as torch hands on what a worker raises: the type, the traceback as its text, and no errno."""
    def from_worker(error):
        try:
            raise error
        except Exception:
            wrapper = ExceptionWrapper(where="in DataLoader worker process 3")
        try:
            wrapper.reraise()
        except Exception as e:
            return e
    lost, full = FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError(errno.ENOSPC, "No space left", "x")
    for error in ValueError("too many values to unpack"), TypeError("t"), lost, OSError("no number"), KeyError("User"):
        assert script.user_message(error) is None and script.user_message(from_worker(error)) is None, error
    for module in encoder, decoder, data, evaluation:
        for e in (module.UserError("a.png: none\nof PNG"), from_worker(module.UserError("a.png: none\nof PNG"))):
            assert script.user_message(e) == "a.png: none of PNG", script.user_message(e)
        assert script.user_message(module.UserError()) == "UserError()", "without a word it is the user's all the same"
    for e in (full, from_worker(full)):
        assert script.user_message(e) == "[Errno 28] No space left: 'x'"
    # errno(3): no room or no right to write, a limit of the process or the system, a disk or a mount that fails; and
    # the mistakes of a program, which no user can mend
    for name in (
            "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EMFILE ENFILE ENOMEM EAGAIN ENOLCK EBUSY EIO ENXIO ENODEV ESTALE "
                 "ENOTCONN ETIMEDOUT EHOSTDOWN EREMOTEIO EPIPE ENAMETOOLONG").split():
        assert script.user_message(from_worker(OSError(getattr(errno, name), name, "x"))), name
    for name in "EBADF EINVAL ENOENT EEXIST ENOTDIR EISDIR ESPIPE EFAULT ENOTEMPTY".split():
        assert script.user_message(OSError(getattr(errno, name), name, "x")) is None, name
    with contextlib.redirect_stderr(io.StringIO()) as err:
        for error, status in (data.UserError("of the user"), 2), (full, 2), (KeyboardInterrupt(), 130):
            with patch.object(sample, "main", side_effect=error), patch.object(sys, "stdout"):
                try:
                    sample.run()
                    raise AssertionError("it must end the process")
                except SystemExit as e:
                    assert e.code == status
                # what is left of the output must not be written at exit: if that fails, Python's status is another
                assert (sys.stdout is None) == (status == 2)
        with patch.object(sample, "main", side_effect=lost), patch.object(sys, "stdout"):
            with contextlib.suppress(FileNotFoundError):
                assert not sample.run(), "a bug passes through, for Python to show"
    assert err.getvalue().splitlines() == ["sample.py: of the user", "sample.py: [Errno 28] No space left: 'x'"]


def test_training_tells_a_bug_from_a_users_error():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        val = shutil.copytree(folder, os.path.join(tmp, "val"))
        flags = ["--teacher", micro_teacher(tmp), *MICRO_RUN, "--data", folder, "--steps", 3, "--out"]
        scripts, damaging = [], f"open({val + '/class0/0.png'!r}, 'wb').close()"
        for k, code in enumerate(("z, h, extra = args[1](args[3])", "open('/no/such/file')", damaging)):
            os.makedirs(os.path.join(tmp, f"s{k}"))
            scripts.append(faulty_training(os.path.join(tmp, f"s{k}"), f"    if step == 2: {code}"))
        start = lambda k, *more: lambda: run("python", scripts[k], *flags, os.path.join(tmp, f"out{k}"), *more)
        evaluating = start(2, "--val", val, "--eval_every", 2, "--workers", 1)
        unpack, lost, damaged = side_by_side(start(0), start(1), evaluating)
        for done, words in (unpack, "ValueError: not enough values to unpack"), (lost, "FileNotFoundError: [Errno 2]"):
            assert done.returncode == 1 and "Traceback" in done.stderr and words in done.stderr, done.stderr
        one_line = rf"train.py: {re.escape(val)}/class0/0.png\b.*\n"
        assert damaged.returncode == 2 and re.fullmatch(one_line, damaged.stderr), damaged.stderr
        state = torch.load(os.path.join(tmp, "out2", "state.pt"), weights_only=True)
        assert state["step"] == 2, "saved before the evaluation stopped it"
        # what torch.save says of a full disk is the user's, what it says of a bug is none
        for cause, kind, words in ((OSError(errno.EFBIG, "File too large"), encoder.UserError, "File too large"),
                                   (TypeError("bug"), RuntimeError, "unexpected pos")):
            def save(state, f):
                try:
                    raise cause
                except Exception:
                    raise RuntimeError("unexpected pos 704 vs 598")
            def write():
                with explain_failed_save("state.pt", 1):
                    save({}, None)
            raises(kind, write, words=words)


def test_the_log_is_json():
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")
    given = {"a": float("nan"), "b": [1.5, float("-inf")], "c": "NaN", "d": None}
    assert finite(given) == {"a": None, "b": [1.5, None], "c": "NaN", "d": None}
    with tempfile.TemporaryDirectory() as tmp:
        folder, out = os.path.join(tmp, "NaN, -Infinity"), os.path.join(tmp, "out")
        shutil.move(picture_folder(tmp)[0], folder)
        plain = train.losses

        def losses(*args, **how):
            loss_dist, loss_flow, weight, alpha = plain(*args, **how)
            return loss_dist, loss_flow * float("inf"), weight, alpha
        with patch.object(train, "losses", losses):
            flags = "--data", folder, "--val", folder, "--steps", 1, "--out", out
            said = train_quietly("--teacher", micro_teacher(tmp), *flags)
        training, judged = (json.loads(line, parse_constant=refuse) for line in open(os.path.join(out, "log.jsonl")))
        assert training["loss_flow"] is None and training["alpha"] == [None] * 3 and training["skipped"] == 1
        assert judged["on"] == folder and f"evaluation on {folder}" in said and f"dB on {folder}" in said


def test_data_that_moved_resume():
    with tempfile.TemporaryDirectory() as tmp:
        first, archive = picture_folder(os.path.join(tmp, "job1"))
        val, _ = picture_folder(os.path.join(tmp, "val1"), n=5)
        flags = ["--teacher", micro_teacher(tmp), "--eval_every", 1, "--out"]
        whole, parts = os.path.join(tmp, "whole"), os.path.join(tmp, "parts")
        train_quietly(*flags, whole, "--data", first, "--val", val, "--steps", 3)
        train_quietly(*flags, parts, "--data", first, "--val", val, "--steps", 1)
        second, val2 = (shutil.move(x, os.path.join(tmp, name)) for x, name in ((first, "job2"), (val, "val2")))
        assert "resumed" in train_quietly(*flags, parts, "--data", second, "--val", val2, "--steps", 2)
        said = train_quietly(*flags, parts, "--data", archive, "--val", val2, "--steps", 3)
        assert "resumed" in said, "the same names in an archive"
        a, b = ([{k: v for k, v in x.items() if k != "on"} for x in log_lines(out)] for out in (whole, parts))
        assert a == b and same_weights(*(os.path.join(out, "model.safetensors") for out in (whole, parts)))
        assert [x["on"] for x in log_lines(parts) if "on" in x] == [val, val2, val2]
        differ = f"val_images was 5 images ({name_hash(val2)}), is now 10 images ({name_hash(second)})"
        other_order = [os.path.join(second, f"class{k}") for k in (1, 0)]
        for paths, words in (([second, "--val", second], differ), ([second], "val_images was 5 images"),
                             ([val2, "--val", val2], "images was 10 images"),
                             ([*other_order, "--val", val2], "images was 10 images")):
            raises(encoder.UserError, train_quietly, *flags, parts, "--steps", 4, "--data", *paths, words=words)
        again = *flags, parts, "--data", second, "--val", val2, "--steps", 4
        with patch.object(torch, "load", side_effect=OSError(errno.ESTALE, "Stale file handle")):
            raises(OSError, train_quietly, *again, words="Stale")  # it is not damaged, to be moved away
        refused = functools.partial(raises, encoder.UserError, train_quietly, *again, words="other parameters")
        refused("--freeze_encoder", "--resume_anyway")


def name_hash(folder):
    """Of the files' names below the folder, in sorted order."""
    names = sorted(os.path.relpath(os.path.join(f, name), folder) for f, _, names in os.walk(folder) for name in names)
    return hashlib.sha256("".join(names).encode()).hexdigest()[:8]


def test_never_but_at_the_end():
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "out")
        with patch.object(train, "save", side_effect=train.save) as save:
            never = "--eval_every", 0, "--save_every", 0, "--keep_every", 0
            train_quietly("--teacher", micro_teacher(tmp), "--steps", 3, *never, "--out", out)
        assert save.call_count == 1 and save.call_args.args[0].now.step == 3
        assert not [n for n in os.listdir(out) if n.startswith("model_")]
        assert [x["step"] for x in log_lines(out) if x.get("kind") == "eval"] == [3]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            for flags in (["--log_every", "0"], ["--crop_scale", "0.9", "0.8"], ["--seed", str(2 ** 63)]):
                raises(SystemExit, train.parse_args, flags, words="2")
                assert f"{flags[0]} is" in err.getvalue() or f"argument {flags[0]}: it is" in err.getvalue()
    line = dict.fromkeys("step loss loss_flow loss_dist grad_norm lr tflops_per_gpu memory_gib skipped".split(), 0)
    line.update(alpha=[0], weight=[1])
    for rate, words in (0.26, "0.3"), (42.04, "42.0"), (1234.5, "1,234"):
        assert f"| {words} img/s |" in train.as_text({**line, "img_s": rate}, 2, 0)


def test_help_shows_the_defaults_of_the_teacher():
    with patch.dict(os.environ, COLUMNS="500"):
        for teacher, recipe in (("internvit", ""), ("siglip2", "--recipe fast"), ("tiny", ""),
                                ("tiny", "--recipe paper")):
            flags = ["--teacher", teacher, *recipe.split()]
            text, args = show([*flags, "--help"]), train.parse_args(flags)
            for name in ("size latent_dim gtb_depth flow_depth flow_width batch_size micro_batch lr lr_decay endpoint "
                         "beta beta1 beta2 warmup recipe steps epochs").split():
                shown, = re.findall(rf"^  --{name} [^\[]*\[([^\[]*)\]$", text, re.M)
                value = getattr(args, name)
                assert shown == ("-" if value is None else str(value)), (teacher, name, shown, value)
            assert f"--teacher {teacher} --recipe {args.recipe}." in text
            groups = ["options", "data", "model", "method", "optimization", "length of the run", "machine", "output"]
            assert re.findall(r"^(\w[\w ]*):$", text, re.M) == groups
    assert not hasattr(args, "help"), "or a resume would compare it"


def show(flags):
    """What train.py prints before it ends with 0."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            raise AssertionError(f"it goes on with {train.parse_args(flags)}")
        except SystemExit as e:
            assert not e.code
    return out.getvalue()


def test_training_workers_follow_the_affinity():
    with patch.object(torch.cuda, "is_available", return_value=True), patch.object(os, "cpu_count", return_value=64):
        for cores, ranks, expected in (6, 2, 3), (1, 8, 1), (40, 1, 16):
            affinity = patch.object(os, "sched_getaffinity", create=True, return_value=set(range(cores)))
            with affinity, patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks)):
                assert train.parse_args([]).workers == expected
        with patch.object(os, "sched_getaffinity", create=True), patch.dict(os.environ, LOCAL_WORLD_SIZE="8"):
            del os.sched_getaffinity  # macOS and Windows
            assert train.parse_args([]).workers == 8
            with patch.object(os, "cpu_count", return_value=None):
                assert data.cores() == 1, "a system that does not tell"


def test_train_imports_where_there_is_no_posix():
    done = run("python", "-c", windows_like() + "import train; print(train.parse_args([]).teacher); train.run()")
    assert done.returncode == 2 and done.stdout.startswith("tiny"), "its functions serve there"
    assert done.stderr == ("train.py: it needs a POSIX system, whose locks keep a second run out of --out: use Linux, "
                           "macOS or WSL\n"), done.stderr


def test_signals_of_a_run_in_the_background():
    """A shell without job control has `&` ignore SIGINT: here it still means stop, at once before the first step."""
    with tempfile.TemporaryDirectory() as tmp:
        stop = "os.kill(os.getpid(), signal.SIGINT)"
        early = f"import os, signal, train; train.build_models = lambda args: {stop}; train.run()"
        flags = f"--teacher {micro_teacher(tmp)} --out {tmp}/out"
        done = run("bash", "-c", f"trap '' INT; exec {sys.executable} -c '{early}' {flags}")
        assert done.returncode == 130 and not done.stderr, done


def test_names_that_are_no_text_and_pictures_that_fail():
    """The results are those of the same pictures under plain names; who fails is named, the others go on."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, photos, plain = tokenizer_file(tmp), os.path.join(tmp, "photos"), os.path.join(tmp, "plain")
        os.makedirs(photos), os.makedirs(plain)
        long = ["n" * 245 + "é" + x for x in "ab"]  # 248 bytes: with _recon.png they are 258
        names = [os.fsdecode(b"caf\xe9"), *long, "taken", "torn", "z" * 245, "zz"]
        for k, name in enumerate(names):
            picture(k).save(os.path.join(plain, f"{k}.png"))
            shutil.copy(os.path.join(plain, f"{k}.png"), os.path.join(photos, name + ".png"))
        open(os.path.join(photos, "torn.png"), "wb").write(b"no picture")
        os.makedirs(os.path.join(tmp, "photos_recon", "taken_recon.png"))
        flags = ["--weights", weights]
        done, (status, _, err) = side_by_side(
            lambda: run(sys.executable, "sample.py", photos, *flags, PYTHONIOENCODING="utf-8:strict"),
            lambda: sampled(plain, *flags))
        assert status == 0 and done.returncode == 1 and "Traceback" not in done.stderr, done.stderr + err
        short = ["n" * 245, "n" * 243 + "_2"]  # of 255 bytes, _recon.png takes 10
        expected = {k: name for k, name in enumerate([names[0], *short, None, None, *names[5:]]) if name}
        for k, name in expected.items():
            result = os.path.join(tmp, "photos_recon", name + "_recon.png")
            alike = os.path.join(tmp, "plain_recon", f"{k}_recon.png")
            assert open(result, "rb").read() == open(alike, "rb").read(), name
        assert len(os.listdir(os.path.join(tmp, "photos_recon"))) == len(expected) + 1, "and nothing half-written"
        told = [line for line in done.stderr.splitlines() if line.startswith("sample.py: ")]
        assert len(told) == 2 and "taken.png is left out ([Errno 21]" in told[0], done.stderr
        assert "torn.png cannot be read" in told[1], done.stderr
        assert r"caf\udce9_recon.png: latent" in done.stdout, done.stdout
        assert done.stdout.count(": latent ") == len(expected)
        # a failure in the middle, by kind; out of memory is one picture's, a full disk everyone's, a bug nobody's
        plain_reconstruct = sample.reconstruct
        for error, expected in ((data.UserError("is odd"), 1), (OSError(errno.EIO, "Input/output error"), 1),
                                (MemoryError(), 1), (torch.OutOfMemoryError(), 1), (no_memory(), 1),
                                (RuntimeError("a bug"), RuntimeError),
                                (ValueError("a bug"), ValueError), (OSError(errno.ENOSPC, "full"), OSError)):
            def reconstruct(enc, dec, x, *args):
                if x.shape[3] == 21:  # of 40 x 30
                    raise error
                return plain_reconstruct(enc, dec, x, *args)
            picture(7, 30, 30).save(os.path.join(plain, "square.png"))
            files = [os.path.join(plain, name) for name in ("0.png", "square.png")]
            with patch.object(sample, "reconstruct", reconstruct), contextlib.redirect_stderr(io.StringIO()) as err:
                if expected != 1:
                    raises(expected, sample.main, [*files, *flags])
                    continue
                status, said, err = sampled(*files, *flags)
            assert status == 1 and "square_recon.png" in said and len(err.splitlines()) == 1 and files[0] in err, err


def no_memory():
    """What torch raises where the CPU has no memory left: here for 2^62 bytes."""
    try:
        torch.empty(2 ** 60)
    except RuntimeError as e:
        return e


def test_streams_that_are_closed():
    """Text goes to standard error, results are the same; a picture for a closed pipe is refused, not lost."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, photos = tokenizer_file(tmp), os.path.join(tmp, "photos")
        os.makedirs(photos)
        for k, name in enumerate(("a.png", "new\nline.png")):
            picture(k).save(os.path.join(photos, name))
        open(os.path.join(photos, "torn\n.png"), "w").write("no picture")
        closed = lambda *command: run("bash", "-c", 'exec "$@" >&-', "-", sys.executable, *command)
        flags = ["--weights", weights, "--out"]
        sampling, training = side_by_side(
            lambda: closed("sample.py", photos, *flags, os.path.join(tmp, "closed")),
            lambda: closed("train.py", *MICRO_RUN, "--teacher", micro_teacher(tmp), "--steps", 1, "--out",
                           os.path.join(tmp, "run")))
        status, said, err = sampled(photos, *flags, os.path.join(tmp, "open"))
        assert sampling.returncode == status == 1 and training.returncode == 0, sampling.stderr + training.stderr
        assert "done: " in training.stderr and said.splitlines()[0] in sampling.stderr, sampling.stderr
        names = sorted(os.listdir(os.path.join(tmp, "open")))
        assert names == ["a_recon.png", "new\nline_recon.png"] == sorted(os.listdir(os.path.join(tmp, "closed")))
        for name in names:
            assert np.array_equal(*(pixels(os.path.join(tmp, out, name))[0] for out in ("open", "closed")))
        assert err.count("\n") == 1 and "torn .png cannot be read" in err, "one line, whatever the name"
        with patch.object(sys, "stdout", None), patch.object(sys, "stderr", io.StringIO()) as err:
            err.reconfigure = lambda errors: None
            with patch.object(sys, "argv", ["sample.py", photos, *flags, "-"]), contextlib.suppress(SystemExit):
                raise AssertionError(sample.run())
        assert "standard output is closed" in err.getvalue()


def test_a_full_disk_names_the_log():
    with tempfile.TemporaryDirectory() as tmp:
        full = os.path.join(tmp, "out", "log.jsonl")
        log = unittest.mock.Mock(write=unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        with patch.object(Run, "open_log", lambda run, step: setattr(run, "log", log)):
            flags = "--teacher", micro_teacher(tmp), "--steps", 1, "--out", os.path.join(tmp, "out")
            raises(encoder.UserError, train_quietly, *flags, words=[full, "No space left"])


def test_training_with_names_that_are_no_text():
    with tempfile.TemporaryDirectory() as tmp:
        folder = os.path.join(tmp, os.fsdecode(b"daten-\xff"))
        shutil.move(picture_folder(tmp)[0], folder)
        bad = os.path.join(os.fsencode(folder), b"class0", b"\xe9.png")
        open(bad, "wb").write(b"no picture")
        out = folder + "-out"
        flags = ["--teacher", micro_teacher(tmp), "--data", folder, "--max_bad_images", 1, "--out", out, "--steps"]
        done = run("python", "train.py", *MICRO_RUN, *flags, 3)
        assert done.returncode == 0 and r"daten-\udcff-out" in done.stdout, done.stderr
        assert open(os.path.join(out, "bad_images.txt"), "rb").read() == bad + b"\n"
        assert "resumed" in train_quietly(*flags, 4)
        assert torch.load(os.path.join(out, "state.pt"), weights_only=True)["args"]["data"] == [folder]


def test_a_run_without_a_checkpoint_sets_all_others_aside():
    """Three runs into one folder, each without a state.pt: every file of every run is there, the oldest .old.old; what
    is the user's own keeps its name."""
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "a[b]")  # which a glob would read as a pattern
        os.makedirs(os.path.join(out, "samples"))
        names = ["bad_images.txt", "bad_images.rank12.txt", "log.jsonl", "model.safetensors",
                 "model_0000010.safetensors", "samples/step_000010.png"]
        own = ["notes.txt", "bad_images.mine.txt", "model_best.safetensors", "samples/step_by_step.png"]
        for name in own:
            open(os.path.join(out, name), "w").write("own")
        for k in "123":
            for name in names:
                open(os.path.join(out, name), "w").write(k)
            Run(out).set_aside()
        found = {os.path.relpath(os.path.join(folder, f), out): open(os.path.join(folder, f)).read()
                 for folder, _, files in os.walk(out) for f in files}
        assert found == {**dict.fromkeys(own, "own"), **{
            name + end: k for name in names for end, k in ((".old", "1"), (".old.old", "2"), (".old.old.old", "3"))}}


def test_half_written_files_of_a_killed_run_alone_are_removed():
    with tempfile.TemporaryDirectory() as tmp:
        now, left = time.time(), []
        # may be written now
        for name, age, stays in ((".0123456789ab.tmp", 700, False), (".0123456789ac.tmp", 500, True),
                                 (".0123456789ab.tmp2", 700, True), (".mine.tmp", 700, True), ("state.pt", 700, True)):
            open(os.path.join(tmp, name), "w").close()
            os.utime(os.path.join(tmp, name), (now - age, now - age))
            left += [name] * stays
        held = Run(tmp)
        held.hold_folder()
        assert set(os.listdir(tmp)) == {*left, ".lock", "samples"}
        held.close()


def test_a_script_says_which_rank_and_ends_with_its_status():
    full, none = OSError(errno.ENOSPC, "No space left"), {k: v for k, v in os.environ.items() if k != "RANK"}
    for error, status, said in ((encoder.UserError("wrong"), 2, "x.py: wrong\n"), (KeyboardInterrupt(), 130, ""),
                                (full, 2, "x.py: [Errno 28] No space left\n"), (KeyError("k"), 1, "Traceback")):
        for environ, who in (none, ""), ({**none, "RANK": "3"}, "[rank 3] "):
            def fail(**_):
                print("two of three")
                raise error
            main, workers = unittest.mock.Mock(side_effect=fail), [unittest.mock.Mock(), unittest.mock.Mock()]
            pipe, written = io.BytesIO(), []
            with patch.dict(os.environ, environ, clear=True), patch.object(signal, "signal") as heeds, \
                    patch.object(os, "_exit", side_effect=lambda status: written.append(pipe.getvalue())) as ended, \
                    contextlib.redirect_stdout(io.TextIOWrapper(pipe)), \
                    contextlib.redirect_stderr(io.StringIO()) as err, patch.object(tools.run, "open_streams"), \
                    patch.object(tools.run.multiprocessing, "active_children", lambda: workers):
                tools.run.command_line(main, "x.py")
            assert written == [b"two of three\n"], "what it said before is not lost with the process"
            ended.assert_called_once_with(status), main.assert_called_once_with(on_signal=tools.run.interrupt)
            assert [worker.method_calls for worker in workers] == [[unittest.mock.call.kill()]] * 2
            assert [call.args for call in heeds.call_args_list] == [
                (signal.SIGINT, signal.default_int_handler), (signal.SIGCHLD, signal.SIG_DFL)]
            told = err.getvalue()
            assert told.startswith(said) if status == 1 else told == (who + said) * bool(said), told
    for ranks in False, True:  # one that ends well leaves the others after all have come
        did, main = [], unittest.mock.Mock()
        with patch.object(signal, "signal"), patch.object(os, "_exit") as ended, \
                patch.object(tools.run, "open_streams"), patch.multiple(
                    tools.run.dist, is_initialized=lambda: ranks, barrier=lambda: did.append("all have come"),
                    destroy_process_group=lambda: did.append("left")):
            tools.run.command_line(main, "x.py")
        assert did == ["all have come", "left"] * ranks and not ended.called and main.call_count == 1


def test_a_study_runs_modules_and_keeps_what_they_print():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "x.json")
        with open(path, "w") as f:
            f.write("[1, 2]")
        for _ in range(2):
            tools.script.run_module(tmp, "json.tool", "--indent", 1, path)
        words = f"json.tool --indent 1 {path}.none failed: see the end of {tmp}/output.txt"
        raises(RuntimeError, tools.script.run_module, tmp, "json.tool", "--indent", 1, path + ".none", words=words)
        with open(os.path.join(tmp, "a_module.py"), "w") as f:
            f.write("print('found')")
        tools.script.run_module(tmp, "a_module", PYTHONPATH=tmp)
        with open(os.path.join(tmp, "output.txt")) as f:
            said = f.read()
        assert said.startswith(2 * "[\n 1,\n 2\n]\n") and "No such file" in said, said
        assert said.endswith("found\n") and os.environ.get("PYTHONPATH") != tmp, "a variable of that run alone"


def test_a_table_is_put_between_two_lines():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "README.md")

        def replaced(content, text):
            with open(path, "w", encoding="utf-8") as f:
                f.write(content)
            tools.script.replace_between(path, "<begin>\n", "<end>\n", text)
            with open(path, encoding="utf-8") as f:
                return f.read()
        assert replaced("a–b\n<begin>\nold\n<end>\nc\n<end>\n", "new\n") == "a–b\n<begin>\nnew\n<end>\nc\n<end>\n"
        for wrong in "a\n<end>\n", "a\n<begin>\n", "<end>\n<begin>\n":
            raises(encoder.UserError, replaced, wrong, "new\n", words=f"{path} lacks the line <begin>")
            with open(path) as f:
                assert f.read() == wrong, "it stays as it was"


def test_a_disk_that_fails_is_no_damaged_checkpoint():
    """Who is told that a file is damaged moves it away; where the disk was at fault it is whole."""
    with tempfile.TemporaryDirectory() as tmp:
        path, args = os.path.join(tmp, "state.pt"), types.SimpleNamespace(resume_anyway=False)
        load = lambda: tools.checkpoint.load_checkpoint(path, ["step"], args, ())
        assert load() is None
        torch.save({"step": 3, "args": {"flag_of_an_older_version": 1}}, path)
        assert load()["step"] == 3
        torch.save({"args": {}}, path)
        raises(encoder.UserError, load, words=["older version", "it lacks step", "move it away"])
        torch.save({"args": {}, "step": 3, "more": 1}, path)
        raises(encoder.UserError, tools.checkpoint.load_checkpoint, path, ["step", "id", "args", "a"], args, (),
               words=f"{path} is of an older version, or no checkpoint of this script (it lacks a id): move it away to "
                     "start afresh")
        torch.save({"step": 3, "args": {"seed": 1, "lr": 0.5, "data": "x"}}, path)
        now = types.SimpleNamespace(resume_anyway=False, seed=2, lr=0.25, data="y")
        raises(encoder.UserError, tools.checkpoint.load_checkpoint, path, ["step"], now, {"data"},
               words=f"{path} is of another run (seed was 1, is now 2; lr was 0.5, is now 0.25): use another --out, or "
                     "--resume_anyway")
        now.resume_anyway = True
        assert tools.checkpoint.load_checkpoint(path, ["step"], now, {"data"})["step"] == 3
        for code in errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES:
            with patch.object(torch, "load", side_effect=OSError(code, os.strerror(code), path)):
                raises(OSError, load, words=f"[Errno {code}]")
        for damage in RuntimeError("x"), EOFError("x"), KeyError("x"), OSError("x"):
            with patch.object(torch, "load", side_effect=damage):
                kind = type(damage).__name__
                raises(encoder.UserError, load, words=f"{path} is damaged or no checkpoint of this script ({kind}): "
                       "move it away to start afresh")


def test_moments_of_other_parameters_are_a_users_error():
    a, b, c = (nn.Linear(n, 2) for n in (2, 2, 3))
    adam = lambda *modules: torch.optim.AdamW([dict(params=list(m.parameters())) for m in modules], lr=0.5,
                                              weight_decay=0.25)
    first, second, more = adam(a), adam(b), adam(b, c)
    a(torch.ones(1, 2)).sum().backward(), first.step()
    for group in second.param_groups:
        group["lr"] = 0.125
    tools.checkpoint.restore_optimizer(second, first.state_dict(), "x")
    assert second.state[b.weight]["exp_avg"].equal(first.state[a.weight]["exp_avg"])
    assert second.param_groups[0]["lr"] == 0.125, "settings are this command's"
    words = ("state.pt has the optimizer of other parameters (loaded state dict has a different number of parameter "
             "groups): use another --out")
    raises(encoder.UserError, tools.checkpoint.restore_optimizer, more, first.state_dict(), "state.pt", words=words)


def test_a_log_is_cut_at_the_checkpoint_and_where_it_is_torn():
    with tempfile.TemporaryDirectory() as tmp:
        path, run_ = os.path.join(tmp, "log.jsonl"), Run(tmp)
        kept = '{"step": 1}\n{"step": 3, "kind": "eval"}\n'
        for torn in ('{"step": 3, "loss": 0.5}', '{"step": 3, "lo', "", "\n", "3\n", '{"loss": 1}\n', '{"step": 4}\n',
                     '{"step": null}\n'):
            with open(path, "w") as f:
                f.write(kept + torn)  # a whole line, too, ends with its newline
            run_.open_log(3)
            run_.write(step=4)
            run_.close()
            assert open(path).read() == kept + '{"step": 4}\n', torn


def test_what_command_lines_refuse():
    """Each script names the flag, what came and what to do, before it begins; status 2."""
    refused = {
        sample.parse_args: {"x.png --seed -1": "--seed: it is -1", "x.png --steps 0": "--steps: it is 0",
                            "x.png --size -1": "--size: it is -1", "x.png --save_latent z.pt": "z.pt",
                            "z.safetensors --size 8": "not latents", "x.png --features --reconstruction": "in two runs",
                            "- --features": "give --out FOLDER"},
        train.parse_args: {"--drop_path 1": "--drop_path", "--clip -1": "--clip", "--beta nan": "--beta",
                           "--crop_scale 0.5 1.1": "[0.5, 1.1]", "--crop_scale 0.9 0.5": "the smaller first",
                           "--crop_scale 0 1": "above 0"},
        evaluation.parse_args: {"--data x --workers -1": "--workers: it is -1",
                                "--data x --steps 0": "--steps: it is 0",
                                "--data x --batch_size 0": "--batch_size: it is 0",
                                "--fid a b c": "got 3", "--fid a": "got 1", "--fid a b --size 8": "--resolution 256",
                                "--fid a b --inception none": "needs --inception",
                                "--weights w": "--data PATH is needed"}}
    for parse, cases in refused.items():
        for flags, words in cases.items():
            with contextlib.redirect_stderr(io.StringIO()) as err:
                raises(SystemExit, parse, flags.split(), words="2")
            assert words in err.getvalue().splitlines()[-1], (flags, err.getvalue())
    with tempfile.TemporaryDirectory() as tmp:
        teacher, weights, (folder, _) = micro_teacher(tmp), tokenizer_file(tmp), picture_folder(tmp, n=2)
        raises(encoder.UserError, encoder.load_teacher, teacher, weights,
               words=f"teacher {teacher} is a file and brings its weights: leave out teacher_weights {weights}")
        for size, near in (15, 16), (18, 16), (19, 20), (1, 4):
            raises(encoder.UserError, evaluate, "--data", folder, "--weights", weights, "--size", size,
                   words=f"try --size {near}")
        raises(encoder.UserError, tools.batches.split_batch, 1, 1, 2, words="try 2")  # not 0
        os.makedirs(os.path.join(tmp, "empty"))
        raises(encoder.UserError, tools.pictures.find_pictures, [os.path.join(tmp, "empty")],
               words=f"{tmp}/empty holds no pictures (.jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif)")
        raises(encoder.MissingFile, tools.pictures.find_pictures, ["none.png"],
               words="none.png: no such picture or folder")
        before = open(weights, "rb").read()  # a latent must not take a tokenizer's place
        status, _, err = sampled(os.path.join(folder, "class0", "0.png"), "--weights", weights,
                                 "--save_latent", weights)
        assert err == f"--save_latent {weights} is there and is no latent: give another name\n"
        assert status == 2 and open(weights, "rb").read() == before


def test_a_second_signal():
    """Of SIGTERM torchrun may hand on two, which end no save; a second Ctrl-C does not wait for one."""
    for signals, status in (([signal.SIGTERM] * 3, None), ([signal.SIGINT], None),
                            ([signal.SIGTERM, signal.SIGINT], None), ([signal.SIGINT] * 2, 130),
                            ([signal.SIGINT, signal.SIGTERM, signal.SIGINT], 130)):
        for rank, terminal in ("0", None), ("3", None), ("0", OSError):  # one that was closed
            with patch.object(tools.run, "INTERRUPTS", []) as noted, patch.object(os, "_exit") as ended, \
                    patch.dict(os.environ, RANK=rank), patch.object(os, "write", side_effect=terminal) as said:
                for number in signals:
                    assert not ended.called
                    tools.run.interrupt(number, None)
                assert noted == signals and ended.call_args_list == [unittest.mock.call(status)] * (status is not None)
                assert said.call_args_list == [unittest.mock.call(2, b"saving after this step; Ctrl-C again stops at "
                                                                  b"once\n")] * (rank == "0")


def test_sample_at_its_limits():
    with tempfile.TemporaryDirectory() as tmp:
        weights, out = tokenizer_file(tmp), os.path.join(tmp, "out")
        flags = ["--weights", weights, "--size", 0, "--out", out]
        for side, figure in (10, "n/a"), (11, r"-?[01]\.\d{4}"):  # the window of SSIM is 11 x 11
            picture(0, 30, side).save(os.path.join(tmp, f"{side}.png"))
            assert re.search(rf"SSIM {figure} ", sampled(os.path.join(tmp, f"{side}.png"), *flags)[1])
        long = os.path.join(tmp, "n" * 244 + ".png")  # of 255 bytes _recon.png takes 10, but _features.png 13
        picture(0, 30, 20).save(long)
        status, _, err = sampled(long, *flags, "--features")
        endings = sorted(name.split("_")[-1] for name in os.listdir(out) if name.startswith("nnn"))
        assert status == 0 and endings == ["features.png", "recon.png"], err
        # a teacher whose tokens are of another width shows nothing beside the student's
        large, other = os.path.join(tmp, "large.safetensors"), os.path.join(tmp, "other.safetensors")
        own = encoder.read_config(weights)
        config = {**own, "teacher": large}
        encoder.write_model(other, config, load_file(weights))
        for changes in dict(width=64), dict(depth=own["vit"]["depth"] + 1), dict(eps=0.1), dict(pixel_stats="half"):
            assert changes.keys() <= own["vit"].keys()
            vit = encoder.ViT(encoder.ViTConfig(**{**own["vit"], **changes}))
            encoder.write_model(large, {"vit": asdict(vit.config)}, dict(vit.named_parameters()))
            status, said, err = sampled(os.path.join(tmp, "11.png"), "--weights", other, "--size", 0, "--out", out,
                                        "--features")
            assert status == 0 and "without the teacher" in said and "structure differs" in said, said + err
        assert pixels(os.path.join(out, "11_features.png"))[0].shape == (1, 11, 60, 3)
        encoder.write_model(other, {**own, "teacher": "tiny", "teacher_weights": 3}, load_file(weights))  # no path
        said = sampled(os.path.join(tmp, "11.png"), "--weights", other, "--size", 0, "--out", out, "--features")[1]
        assert "--features: without the teacher tiny (not on this machine)\n" in said, said


def test_fast_takes_as_many_steps():
    """Without a GPU fast's functions are encode and decode themselves: by the same noise as many Euler steps, no
    gradient."""
    _, enc, dec = micro_models()
    img = torch.rand(2, 3, 16, 16)
    for steps in 1, 3:
        encode, decode = tools.speed.fast(enc, dec, img, steps)
        with torch.no_grad():
            latent = enc.encode(img)
        torch.manual_seed(steps)
        expected = dec.decode(latent, steps, torch.randn(2, 16, 48))
        torch.manual_seed(steps)
        got = decode(encode(img))
        assert torch.equal(got, expected) and not got.requires_grad
        assert steps == 1 or (got - dec.decode(latent, 1, torch.randn(2, 16, 48))).abs().max() > 0.01


def test_the_psnr_of_an_animation_is_the_mean_of_its_frames():
    with tempfile.TemporaryDirectory() as tmp:
        weights, path = tokenizer_file(tmp), os.path.join(tmp, "a.webp")
        frames = [Image.new("RGB", (16, 16), (v, v, v)) for v in (0, 128, 255)]  # far from one another's PSNR
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
        status, said, err = sampled(path, "--weights", weights, "--size", 0)
        assert status == 0, err
        both = pixels(os.path.join(tmp, "a_recon.webp"))[0]
        error = ((both[:, :, :16] - both[:, :, 16:]) / 255) ** 2
        each = -10 * np.log10(error.mean((1, 2, 3)))
        assert (np.ptp(each) > 0.5
                and abs(float(re.search(r"PSNR ([\d.]+)", said)[1]) - each.mean()) < 0.006), (said, each)


def test_results_are_not_put_into_the_data():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = os.path.realpath(tmp)
        photos, before = os.path.join(tmp, "photos"), os.getcwd()
        os.makedirs(os.path.join(photos, "deep")), os.makedirs(os.path.join(tmp, "links"))
        picture(0).save(os.path.join(photos, "deep", "a.png"))
        os.symlink(photos, os.path.join(tmp, "links", "link")), os.symlink("..", os.path.join(photos, "deep", "up"))
        given = {"photos": "photos_recon", "photos/": "photos_recon", "photos//": "photos_recon",
                 "links/link": "links/link_recon", "links/link/": "links/link_recon",
                 "photos/deep": "photos/deep_recon",
                 "photos/.": "photos_recon", "photos/././/": "photos_recon", "photos/deep/..": "photos_recon",
                 "photos/deep/../../photos": "photos_recon", "links/link/.": "links/link_recon",
                 "photos/deep/up": f"{tmp}/photos_recon"}
        for earlier in "a_recon.png", "a_features.png":  # results are no pictures
            picture(1).save(os.path.join(photos, "deep", earlier))
        try:
            os.chdir(tmp)
            for given, expected in given.items():
                (_, folder), = tools.pictures.find_pictures([given])
                assert folder == os.path.join(expected, "" if given.endswith("deep") else "deep"), (given, folder)
            for where, given in (photos, "."), (os.path.join(photos, "deep"), ".."):
                os.chdir(where)
                found = tools.pictures.find_pictures([given])
                assert found == [(os.path.join(given, "deep", "a.png"), f"{tmp}/photos_recon/deep")], found
        finally:
            os.chdir(before)
        with patch.object(tools.pictures, "list_folder", lambda f: [("a.png",)]):
            assert tools.pictures.find_pictures(["/"], "out") == [("/a.png", "out/")]
        with patch.object(tools.pictures, "list_folder", lambda f: [("b.png",), ("a/x.png",)]):  # as os.walk has them
            assert tools.pictures.find_pictures(["/"], "out") == [("/a/x.png", "out/"), ("/b.png", "out/")]


def test_reconstructions_alone():
    """The middle panel of the usual result, in files of the originals' names and folders, which eval.py reads."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _), recs = tokenizer_file(tmp), picture_folder(tmp, n=4), os.path.join(tmp, "recs")
        clip(os.path.join(folder, "class1", "moving.webp"))
        picture(9, 30, 50).save(os.path.join(folder, "class1", "1.jpg"))
        flags = ["--weights", weights]
        assert sampled(folder, *flags)[0] == 0
        for again, target in (["--out", recs], recs), ([], folder + "_reconstruction"):
            status, said, err = sampled(folder, *flags, "--reconstruction", *again)
            assert status == 0 and not err and target in said, err
            a, b = (data.ImageDataset(root, None, train=False) for root in (folder, target))
            names = [os.path.relpath(b.path(i), target) for i in range(len(b))]
            assert names == ["class0/0.png", "class0/2.png", "class1/1.png", "class1/1_2.png", "class1/3.png",
                             "class1/moving.png"], "1.jpg and 1.png"
            assert b.labels.tolist() == a.labels.tolist()
            for i in range(len(b)):
                usual = os.path.splitext(names[i])[0] + ("_recon.webp" if i == 5 else "_recon.png")
                triple, rec = pixels(os.path.join(folder + "_recon", usual)), pixels(b.path(i))
                W = rec[0].shape[2]
                assert np.array_equal(triple[0][:, :, W:2 * W], rec[0]), usual
                assert triple[0].shape[2] == (3 if i < 5 else 2) * W
                first = torch.from_numpy(rec[0][0]).permute(2, 0, 1)
                assert torch.equal(b[i][0], first), "eval.py reads an animation's first frame"
            assert rec[1:] == ([100, 50, 70, 200], 2), "an animation keeps its timing"
        once = os.path.join(tmp, "once.gif")  # a GIF that says nothing of loops plays once
        picture(0).save(once, save_all=True, append_images=[picture(1)], duration=30)
        assert sampled(once, *flags, "--reconstruction", "--out", os.path.join(tmp, "once"))[0] == 0
        blob = open(os.path.join(tmp, "once", "once.png"), "rb").read()
        at = blob.index(b"acTL") + 4
        assert struct.unpack(">II", blob[at:at + 8]) == (2, 1), "frames and plays of an APNG, 0 for ever"
        with patch.object(evaluation, "InceptionV3", QuickInception):
            report = evaluate("--fid", folder, recs, "--inception", weights, "--resolution", 256)[1]
        assert "fid" in json.dumps(report).lower()
        class0 = os.path.join(folder, "class0")
        one, new = os.path.join(class0, "0.png"), os.path.join(folder, "new")
        before = {name: open(os.path.join(class0, name), "rb").read() for name in os.listdir(class0)}
        for files, out in (folder, folder), (folder, new), (folder, tmp), (one, class0), (one, folder):
            status, _, err = sampled(files, *flags, "--reconstruction", "--out", out)
            assert status == 2 and "overlaps with" in err, err
        with contextlib.redirect_stderr(io.StringIO()):
            raises(SystemExit, sample.main, [one, "--reconstruction", "--features"])
        for target in [], ["--out", recs]:
            assert sampled(one, *flags, "--reconstruction", *target)[0] == 0
        alone = pixels(os.path.join(folder, "class0", "0_recon.png"))[0]  # beside a picture its own name is taken
        assert np.array_equal(alone, pixels(os.path.join(recs, "0.png"))[0])
        assert all(open(os.path.join(class0, name), "rb").read() == content for name, content in before.items())
