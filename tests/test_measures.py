"""Measures in any order of files, figures that never get lost, workers that end."""
from tests.helpers import (
    HERE, QuickInception, evaluate, micro_models, picture, picture_folder, raises, refused, sampled, tokenizer_file)

import contextlib
import errno
import gc
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import multiprocessing.synchronize
import os
import pickle
import resource
import signal
import sys
import tempfile
import types
import unittest.mock
from datetime import timedelta
import zipfile

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image

import data
import decoder
import encoder
import eval as evaluation
import tools.fid as fid_command
import tools.job as jobs
import tools.latents as latents
import tools.script as script
import tools.validate as validation
from tests.hostile import Payload

patch = unittest.mock.patch


@contextlib.contextmanager
def no_longer_than(seconds):
    """TimeoutError if the block takes longer: a hang must fail, not wait."""
    def stop(number, frame):
        raise TimeoutError(f"still at work after {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process and its children can become longer. Shared memory is such a file: this needs no root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def as_command(*flags, stdout=None):
    """(exit status, stdout, stderr) of eval.py's command line, in this process."""
    out, err = stdout or io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    status = 0
    argv = ["eval.py", *map(str, flags)]
    with patch.object(sys, "argv", argv), patch.object(sys, "stdout", out), patch.object(sys, "stderr", err):
        try:
            script.run_command(evaluation.main, "eval.py")
        except SystemExit as e:
            status = e.code
    return status, b"" if stdout else out.buffer.getvalue(), err.getvalue()


def strict_json(path):
    """A JSON file, read as the standard has it: without NaN and Infinity."""
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")
    return json.load(open(path), parse_constant=refuse)


def test_inception_score_of_any_order():
    """Perfect predictions: the score of a split is exp of the entropy of its class counts, which are hypergeometric."""
    from scipy.stats import hypergeom
    n, classes = 50_000, 100
    counts = np.arange(1, 501)  # of one class among the 5,000 images of a split
    share = counts / 5000
    expected = math.exp(-classes * (hypergeom(n, 500, 5000).pmf(counts) * share * np.log(share)).sum())
    assert 99.0 < expected < 99.2  # near 100: ln 100 - 0.9 * 99 / 10,000
    in_order = torch.arange(n) * classes // n
    shuffled = in_order[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    for labels in in_order, shuffled, torch.arange(n) % classes:
        logits = 1000.0 * torch.nn.functional.one_hot(labels, classes)
        score, deviation = evaluation.inception_score(logits)
        assert abs(score - expected) < 0.1 and deviation < 0.2, (score, deviation, expected)
    assert evaluation.inception_score(logits[:100], splits=1)[0] > 99.999, "one split holds each class once"
    # streamed: any batches, on any ranks
    logits = 5 * torch.randn(301, 1008, generator=torch.Generator().manual_seed(0))
    network, shares = lambda n: (torch.zeros(len(n), 4), logits[n]), []
    for ranks, batch in ((1, 301), (3, 7)):
        rated = [fid_command.FidStatistics(network, 301, "these") for _ in range(ranks)]
        for rank in range(ranks):
            mine = list(range(rank, 301, ranks))
            for i in range(0, len(mine), batch):
                rated[rank].add(mine[i:i + batch], mine[i:i + batch])
        shares.append(evaluation.score_of_sums(sum(r.sums for r in rated)))
    assert np.allclose(shares, [evaluation.inception_score(logits)] * 2, rtol=1e-12), shares
    sizes = torch.bincount(evaluation.draw_splits(301, 10))
    assert sorted(sizes.tolist()) == [30] * 9 + [31], "parts of equal size"
    # the split of an image must not change: NumPy's permutation for that many images, cut in ten
    assert evaluation.draw_splits(301, 10).tolist() == [
        int(place) * 10 // 301 for place in np.random.default_rng(301).permutation(301)]


def test_validation_strides_through_the_whole_set():
    class Colours:  # image n is one colour that tells n, and says that it was read
        def __init__(self):
            self.read = []

        def __len__(self):
            return 1500

        def __getitem__(self, n):
            self.read.append(n)
            return self.image(n), 0

        def image(self, n):
            return torch.tensor([n // 256, n % 256, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16).contiguous()

    _, enc, dec = micro_models()
    whole, expected = Colours(), [math.floor(i * 1500 / 512) for i in range(512)]
    plain, _, grid = validation.validate(enc, dec, whole, 100, 0, contextlib.nullcontext())
    assert sorted(whole.read[:512]) == expected and expected[-1] == 1497, "512 of 1,500, to near the last"
    assert np.ptp(whole.read[:86]) > 1400, "the first batch, of the flow loss, strides through it too"
    assert grid.shape == (4 * 16, 2 * 3 * 16, 3)
    tiles = [grid[16 * (j // 2), 48 * (j % 2)] for j in range(8)]
    assert [256 * int(r) + int(g) for r, g, b in tiles] == [expected[64 * j] for j in range(8)], "so do the pictures"
    totals = []
    with patch.object(dist, "all_reduce", lambda x: totals.append(x.clone())):
        rank = lambda r: validation.validate(enc, dec, Colours(), 100, 0, contextlib.nullcontext(), rank=r, ranks=3)
        shares = [rank(r) for r in range(3)]
    total = sum(totals)
    assert total[1] == 512 and abs((total[0] / total[1]).item() - plain) < 1e-4, "any number of ranks"
    assert np.abs(shares[0][2].astype(int) - grid).max() <= 4 and shares[1][2] is None, "the same pictures on any"
    assert validation.spread(3) == [0, 1, 2] and validation.spread(0) == [] and validation.spread(1024)[:3] == [0, 2, 4]
    batches = [expected[k::6] for k in range(6)] + [expected[::64]]
    dec.decode = lambda latent, noise: torch.stack([whole.image(n) for n in batches.pop(0)]) / 255
    plain, *_ = validation.validate(enc, dec, whole, 100, 0, contextlib.nullcontext())
    assert plain == 100, "perfect pictures: 100 dB, not inf"


def test_perfect_pictures_count_with_100_dB():
    with tempfile.TemporaryDirectory() as tmp:
        weights, report = tokenizer_file(tmp), os.path.join(tmp, "report.json")
        for name, grey in (("a", 128), ("b", 118), ("c", 128)):
            Image.new("RGB", (16, 16), (grey,) * 3).save(os.path.join(tmp, name + ".png"))
        flags = ["--data", tmp, "--weights", weights, "--inception", "none", "--out", report]
        grey = lambda self, latent, steps, noise: torch.full((len(latent), 3, 16, 16), 128 / 255)
        with patch.object(decoder.Decoder, "decode", grey):
            said, _ = evaluate(*flags)
            result = strict_json(report)["results"]["tokenizer"]
            # b is off by 10 everywhere: 20 log10(25.5) = 28.1308 dB
            assert abs(result["psnr"] - (100 + 28.1308 + 100) / 3) < 1e-4 and result["perfect"] == 2
            assert "2 of 3 pictures equal the original" in said and "at most 100 dB" in said and "   76.04 " in said
            os.remove(os.path.join(tmp, "b.png"))
            evaluate(*flags)
            assert strict_json(report)["results"]["tokenizer"]["psnr"] == 100
            with patch.object(evaluation, "psnr", lambda a, b: torch.full((len(a),), math.nan)):
                evaluate(*flags)
            assert strict_json(report)["results"]["tokenizer"]["psnr"] is None, "what is not finite is null"
        equal = torch.rand(2, 3, 4, 4)
        assert evaluation.psnr(equal, equal).tolist() == [math.inf] * 2


def test_no_console_loses_the_report():
    with tempfile.TemporaryDirectory() as tmp:
        weights, report = tokenizer_file(tmp), os.path.join(tmp, "report.json")
        folder = os.path.join(tmp, os.fsdecode(b"caf\xc3\xa9\xff"))  # the last byte is no UTF-8
        os.makedirs(folder)
        picture(0).save(os.path.join(folder, "0.png"))
        flags = ["--data", folder, "--weights", weights, "--inception", "none", "--workers", "0"]
        console = io.TextIOWrapper(io.BytesIO(), "ascii")
        status, _, err = as_command(*flags, stdout=console)
        out = console.buffer.getvalue()
        assert status == 0 and rb"caf\xe9\udcff" in out and b"PSNR dB" in out, err
        _, expected = evaluate(*flags, "--out", report)
        for broken in "pipe", "closed":
            os.remove(report)
            read, write = os.pipe()
            os.close(read)
            with open(write, "w") as nobody:
                if broken == "closed":
                    nobody.close()
                console = nobody if broken == "pipe" else ClosedLater(nobody)
                status, _, err = as_command(*flags, "--out", report, stdout=console)
                with contextlib.suppress(OSError):
                    nobody.close()
            assert status == 2 and "standard output cannot be written" in err.splitlines()[-1] and report in err, err
            assert f"{expected['results']['tokenizer']['psnr']:.2f}" in err, "the figures are on stderr"
            assert strict_json(report)["results"] == expected["results"]
        full = unittest.mock.Mock(side_effect=OSError(errno.ENOSPC, "disk full"))
        with patch.object(encoder, "write_atomically", full):
            status, out, err = as_command(*flags, "--out", report)
        assert status == 2 and b"PSNR dB" in out and "disk full" in err, "nor does a full disk"
        with patch.object(sys, "stderr", io.StringIO()) as err, patch.object(sys, "stdout", None):  # python eval.py >&-
            evaluation.main(list(map(str, flags)))
        assert "PSNR dB" in err.getvalue()
        # a name that no file system takes is no bug, and costs no figures; nor does a disk without room for statistics
        status, out, err = as_command(*flags, "--out", os.path.join(tmp, "x" * 251 + ".json"))
        assert status == 2 and b"PSNR dB" in out and err.startswith(f"eval.py: [Errno {errno.ENAMETOOLONG}]"), err
        assert err.count("\n") == 1, err
        two, (pictures, _) = ["--inception", weights, "--workers", 0], picture_folder(tmp, n=4)
        with patch.object(evaluation, "InceptionV3", QuickInception):
            said, _ = evaluate("--fid", pictures, pictures, "--resolution", 256, *two)
            with patch.object(np, "savez", full):
                stats = ["--save_stats", os.path.join(tmp, "stats.npz")]
                status, out, err = as_command("--fid", pictures, pictures, "--resolution", 256, *two, *stats)
        assert status == 2 and "stats.npz could not be written" in err and "disk full" in err, err
        assert said.splitlines()[-1].startswith("FID ") and said.splitlines()[-1] in out.decode(), "the same figure"


class ClosedLater:
    """A closed text file whose encoding can be set."""
    def __init__(self, file):
        self.write, self.flush, self.reconfigure = file.write, file.flush, lambda errors: None


def test_a_bug_shows_its_traceback():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=2)
        flags = ["--data", folder, "--weights", weights, "--inception", "none", "--workers", "0"]

        def unpack(self, img):
            z, h, extra = 1, 2
        with patch.object(encoder.Encoder, "encode", unpack):
            raises(ValueError, as_command, *flags, words="not enough values to unpack")
        fails = lambda e: patch.object(evaluation, "main", unittest.mock.Mock(side_effect=e))
        for e in OSError("x"), FileNotFoundError(errno.ENOENT, "x"), KeyError():
            with fails(e):
                raises(type(e), as_command, "--data", "x")
        for e in (evaluation.UserError("last"), evaluation.MissingFile("last"), data.UserError("last"),
                  encoder.UserError("last"), decoder.UserError("last"), OSError(errno.ENOSPC, "last"),
                  PermissionError(errno.EACCES, "last"), BrokenPipeError(errno.EPIPE, "last")):
            with fails(e):
                status, out, err = as_command("--data", "x")
            assert status == 2 and not out and err in ("eval.py: last\n", f"eval.py: {e}\n"), err
        with fails(KeyboardInterrupt()):
            assert as_command("--data", "x") == (130, b"", ""), "as a shell says of SIGINT"
        one_class = os.path.join(folder, "class0")
        for wrong in (["--weights", "missing.safetensors"], ["--data", "missing"], ["--size", 8], ["--size", 17],
                      ["--inception", "missing.pth"], ["--inception", os.path.join(one_class, "0.png")],
                      ["--fid", folder, weights], ["--probe", "--fit", one_class]):
            status, _, err = as_command(*([] if "--fid" in wrong else flags), *wrong)
            assert status == 2 and err.startswith("eval.py: ") and err.count("\n") == 1, (wrong, err)


def test_workers_need_no_shared_memory():
    """With 50 KB a shared memory object, and with none at all, for the semaphores of the workers' queues."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=8)  # a batch at 64 px has 98 KB
        flags = ["--data", folder, "--weights", weights, "--inception", "none", "--size", 64, "--batch_size", 8]
        _, alone = evaluate(*flags, "--workers", 0)
        with no_longer_than(60):
            with file_size_limit(50_000):
                raises(RuntimeError, torch.zeros(98_304, dtype=torch.uint8).share_memory_)  # what a worker would do
                _, report = evaluate(*flags, "--workers", 1)
            assert report["results"] == alone["results"]
            with file_size_limit(0):
                raises(encoder.UserError, evaluate, *flags, "--workers", 1, words=["/dev/shm", "--workers 0"])
                assert evaluate(*flags, "--workers", 0)[1]["results"] == alone["results"]


def test_locks_are_all_there_before_workers_start():
    """What check_locks makes is at least what two loaders that work at the same time make: those of train.py."""
    made, plain = [], multiprocessing.synchronize.SemLock.__init__

    def count(self, *args, **kwargs):
        made.append(plain(self, *args, **kwargs))
    with patch.object(multiprocessing.synchronize.SemLock, "__init__", count):
        for workers in 1, 3:
            made.clear()
            loaders = [iter(torch.utils.data.DataLoader(range(4), num_workers=workers)) for _ in range(2)]
            needed = len(made)
            for loader in loaders:
                loader._shutdown_workers()
            made.clear()
            script.check_locks(2 * workers)
            assert needed <= len(made) <= 2 * needed and needed > 2 * workers, (workers, needed, len(made))
        made.clear()
        script.check_locks(0)
        assert not made
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(multiprocessing.synchronize.SemLock, "__init__", side_effect=[None] * 12 + [full]):
        refused(encoder.UserError, script.check_locks, 1,
                says="the processes that load images need locks ([Errno 28] No space left on device): make room in "
                "/dev/shm (docker run --shm-size 1g), or give --workers 0")


def test_pictures_that_are_not_finite_are_no_black_ones():
    """uint8 has no NaN: what a network of weights that overflow gives must not be compared as if it were dark."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=2)
        decode = lambda self, latent, *args: torch.full((len(latent), 3, 16, 16), float("nan"))
        flags = ["--data", folder, "--weights", weights, "--inception", "none", "--workers", 0]
        with patch.object(decoder.Decoder, "decode", decode):
            raises(evaluation.UserError, evaluate, *flags, words="reconstructions are not finite in 2 of 2")


def test_workers_follow_the_affinity():
    default = lambda: evaluation.parse_args(["--data", "x"]).workers
    saving = lambda: latents.parse_args(["save", "--data", "x", "--out", "z"]).workers
    for cores, ranks, expected in ((3, 1, 3), (64, 1, 8), (64, 16, 4), (1, 1, 1), (2, 8, 1)):
        affinity = patch.object(os, "sched_getaffinity", lambda pid: set(range(cores)), create=True)
        with affinity, patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks)):
            assert default() == saving() == expected, (cores, ranks, default(), saving())
    with contextlib.redirect_stderr(io.StringIO()) as said:
        raises(SystemExit, evaluation.main, ["--data", "x", "--workers", "-1"], words="2")
    assert "at least 0" in said.getvalue()


class Troubled:
    """Three images, of which one raises."""
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 3

    def __getitem__(self, n):
        if n == 1:
            raise self.error
        return torch.zeros(3, 16, 16, dtype=torch.uint8), 0


def test_trouble_in_a_worker_keeps_its_kind():
    def look(error, workers):
        job = jobs.Job(evaluation.parse_args(["--data", "x", "--workers", str(workers)]))
        try:
            return list(job.images("look", Troubled(error)))
        except Exception as e:
            for loader in filter(lambda x: hasattr(type(x), "_shutdown_workers"), gc.get_objects()):
                loader._shutdown_workers()  # else it takes 5 s, once the exception is gone
            return e
    disk = OSError(errno.EIO, "Input/output error", "1.png")
    for workers in 0, 1:
        e = look(data.UserError("1.png is bad"), workers)
        assert isinstance(e, evaluation.UserError) and "1 of 3 images" in str(e) and "1.png is bad" in str(e)
        e = look(disk, workers)
        assert script.machines_trouble(e), "a disk that fails, though DataLoader drops the errno"
        assert str(e).splitlines()[-1].endswith("[Errno 5] Input/output error: '1.png'")
    e = look(FileNotFoundError(errno.ENOENT, "No such file", "1.png"), 1)
    assert isinstance(e, FileNotFoundError) and not script.machines_trouble(e), "a bug"
    e = look(ValueError("not enough values"), 1)
    assert not isinstance(e, script.USER_ERRORS) and "not enough values" in str(e), "a bug is no bad picture"


def test_features_that_are_not_finite_are_refused():
    good, y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    for value in math.nan, math.inf:
        bad = good.clone()
        bad[7, 2] = bad[9, 1] = value
        for measure in evaluation.linear_probe, evaluation.nearest_neighbours:
            for x, test_x in ((bad, good), (good, bad)):
                refused(evaluation.UserError, measure, x, y, test_x, y,
                        says="features are not finite in 2 of 40 rows: the weights are damaged")


@patch.object(evaluation, "InceptionV3", QuickInception)
def test_npz_travels_to_workers_as_a_path():
    """Under forkserver, as under spawn, what a worker gets is pickled."""
    with tempfile.TemporaryDirectory() as tmp:
        inception = tokenizer_file(tmp)
        pictures = np.random.default_rng(0).integers(0, 256, (50, 24, 20, 3), np.uint8)
        stored, packed = os.path.join(tmp, "stored.npz"), os.path.join(tmp, "packed.npz")
        np.savez(stored, pictures), np.savez_compressed(packed, pictures)
        for path in stored, packed:
            images = fid_command.read_npz(path)
            assert np.array_equal(images[7][0].permute(1, 2, 0), pictures[7]), "now the file is open"
            assert len(pickle.dumps(images)) < 500, "not its 72,000 pixels"
            copy = pickle.loads(pickle.dumps(images))
            assert len(copy) == 50 and copy.path(3) == f"{path}[3]"
            assert all(np.array_equal(copy[n][0].permute(1, 2, 0), pictures[n]) for n in (0, 1, 49, 3))
            raises(IndexError, copy.__getitem__, 50)
            mine = images.file
            with patch.object(os, "getpid", lambda: -1):
                assert np.array_equal(images[8][0].permute(1, 2, 0), pictures[8]) and images.file is not mine, (
                    "a forked worker opens the file for itself")
        cut = open(stored, "rb").read()
        open(os.path.join(tmp, "cut.npz"), "wb").write(cut[:20_000] + cut[-500:])
        raises(evaluation.UserError, fid_command.read_npz, os.path.join(tmp, "cut.npz"), words="neither")
        damaged, short = os.path.join(tmp, "damaged.npz"), os.path.join(tmp, "short.npz")
        with zipfile.ZipFile(packed) as z:
            content = z.read("arr_0.npy")
        with zipfile.ZipFile(short, "w") as z:
            z.writestr("arr_0.npy", content[:-1])
        wrong = bytearray(open(packed, "rb").read())
        wrong[40_000] ^= 1  # noise is not compressed: only the checksum tells
        open(damaged, "wb").write(wrong)
        raises(evaluation.UserError, evaluate, "--fid", damaged, stored, "--inception", inception, "--workers", 0,
               words=["of 50 images cannot be used",
                      f"{damaged}[49] is damaged or cut off (Bad CRC-32 for file 'arr_0.npy')"])
        raises(evaluation.UserError, evaluate, "--fid", short, stored, "--inception", inception, "--workers", 0,
               words=["1 of 50 images cannot be used",
                      f"{short}[49] is damaged or cut off (cannot reshape array of size 1439"])
        fid = lambda *flags: evaluate("--fid", stored, packed, "--inception", inception, *flags)[1]
        method, plain = multiprocessing.get_start_method(), fid("--workers", 0)
        assert fid("--workers", 2)["fid"] == plain["fid"]
        multiprocessing.set_start_method("forkserver", force=True)
        try:
            with no_longer_than(60):
                forked = fid("--workers", 1)
        finally:
            multiprocessing.set_start_method(method, force=True)
        scores = lambda report: [line.rsplit(", ", 1)[0] for line in report["sets"][:2]]
        assert forked["fid"] == plain["fid"] and scores(forked) == scores(plain)


def test_imports_where_posix_is_missing():
    """As on Windows: no fcntl, SIGHUP, SIGUSR1, affinity; the metrics work."""
    hidden = [(signal, "SIGHUP"), (signal, "SIGUSR1"), (os, "sched_getaffinity"), (os, "pread"), (os, "fork"),
              (errno, "EDQUOT"), (errno, "ESTALE")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"))))
        for module, name in hidden:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name))  # puts it back at the end
                delattr(module, name)
        modules = []
        for path in "eval.py", "tools/script.py":
            spec = importlib.util.spec_from_file_location("elsewhere", os.path.join(HERE, path))
            modules.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(modules[-1])
        measures, scripts = modules
        assert abs(measures.psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)).item() - 20) < 1e-5
        assert measures.parse_args(["--data", "x"]).workers in range(1, 9)
        assert list(scripts.SAVE_AND_STOP) == [signal.SIGTERM, signal.SIGINT]
        assert errno.ENOSPC in scripts.MACHINES_TROUBLE
        before = [signal.getsignal(n) for n in scripts.SAVE_AND_STOP]
        scripts.ignore_signals(0)
        for number, handler in zip(scripts.SAVE_AND_STOP, before):
            assert signal.signal(number, handler) == signal.SIG_IGN
    with tempfile.NamedTemporaryFile() as file:
        assert evaluation.sha256(file.name).startswith("e3b0c44298fc1c14"), "SHA-256 of nothing"
        content = bytes(1 << 24) + b"more than is read at a time"
        file.write(content), file.flush()
        assert evaluation.sha256(file.name) == hashlib.sha256(content).hexdigest()


def test_inceptions_where_torch_does_not_read_pickles_safely():
    """Up to torch 2.9 no file but the published one is read, which its SHA-256 tells; a stand-in has "abc" in it."""
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "inception.pth")
        open(path, "w").write("abc")
        for version, digest, words in (("2.5.1", None, "other pickles"), ("2.9.1+cu128", None, "other pickles"),
                                       ("2.9.1", "ba7816bf", "is not pytorch-fid's"),  # FIPS 180-4's example
                                       ("2.10.0", None, "is not pytorch-fid's")):
            with (patch.object(torch, "__version__", version),
                  patch.object(evaluation, "INCEPTION_SHA256", digest or "6726825d")):
                raises(evaluation.UserError, evaluation.InceptionV3, path, words=words)
        with patch.object(evaluation, "refuse_pickle"), \
                patch.object(torch, "load", side_effect=KeyError("one\nor two " + "x " * 200)):
            why = ("'one\\nor two " + "x " * 200)[:300]
            refused(evaluation.UserError, evaluation.InceptionV3, path,
                    says=f"{path} is not pytorch-fid's Inception (KeyError: {why}); it is {evaluation.INCEPTION_URL}")
        trap = Payload(os.path.join(tmp, "executed"))
        torch.save({"fc.weight": trap}, path)
        try:
            raise AssertionError(f"{evaluation.InceptionV3(path)} was read")
        except evaluation.UserError as e:
            assert "is not pytorch-fid's" in str(e)
            assert "`weights_only`" not in str(e), "torch advises to read it unsafely"
        assert not os.path.exists(trap.folder)


def test_arrays_and_statistics_that_are_no_measure():
    with tempfile.TemporaryDirectory() as tmp:
        path, images = os.path.join(tmp, "x.npz"), np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
        np.savez(path, images)
        read = fid_command.read_npz(path)
        assert all(np.array_equal(read[n][0].permute(1, 2, 0), images[n]) for n in range(5)), "row by row"
        np.savez(path, np.asfortranarray(images))  # which lies column by column
        raises(evaluation.UserError, fid_command.read_npz, path, words="uint8 (N, H, W, 3)")
        for mu, sigma in ((np.array([0, np.nan]), np.eye(2)), (np.zeros(2), np.array([[1, 0], [0, np.inf]]))):
            np.savez(path, mu=mu, sigma=sigma)
            raises(evaluation.UserError, fid_command.read_npz, path, words="finite")


def test_fp32_is_no_tf32():
    """The protocol's words are "fp32 without TF32", of convolutions and of products, whatever was set before."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        job = jobs.Job(evaluation.parse_args(["--data", "x"]))
        assert job.precision == "fp32 without TF32" and not any(place.allow_tf32 for place in places)
        assert (not job.autocast._enabled
                and jobs.Job(evaluation.parse_args(["--data", "x", "--bf16"])).autocast._enabled)
    finally:
        for place, value in zip(places, before):
            place.allow_tf32 = value


@patch.object(evaluation, "InceptionV3", QuickInception)
def test_only_rank_0_writes_and_prints():
    """What rank 1 does of each command, as if it were alone: its share begins with the second picture."""
    with tempfile.TemporaryDirectory() as tmp, patch.dict(os.environ, RANK="1"):
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=5)
        out, stats, z = (os.path.join(tmp, name) for name in ("out.json", "stats.npz", "z"))
        more = os.path.join(tmp, "more.safetensors")
        flags = ["--inception", weights, "--workers", 0, "--out", out]
        said, report = evaluate("--fid", folder, folder, "--resolution", 256, "--save_stats", stats, *flags)
        assert said == "" and report["fid"] is None and len(report["sets"]) == 2
        said, report = evaluate("--data", folder, "--weights", weights, *flags)
        assert said == "" and report["results"] == {}
        with contextlib.redirect_stdout(io.StringIO()) as said:
            given = ["--data", folder, "--workers", "0", "--weights"]
            latents.main(["stats", *given, weights, "--out", more])
            assert not os.path.exists(more)
            tensors = safetensors.torch.load_file(weights)
            encoder.write_model(more, encoder.read_config(weights), {**tensors, "latent_std": torch.full((8,), 2.0)})
            with patch.object(latents, "SHARD", 2):  # of three files the first is another's
                latents.main(["save", *given, more, "--out", z])
        assert said.getvalue() == "" and sorted(os.listdir(z)) == [f"latents_0000{k}.safetensors" for k in (1, 2)]
        assert not any(map(os.path.exists, (out, stats)))


def test_what_a_job_asks_of_its_surroundings():
    args = evaluation.parse_args(["--data", "x", "--workers", "3", "--batch_size", "7"])
    job, bars, loaders = jobs.Job(args), [], []
    with tempfile.TemporaryDirectory() as tmp:
        for name in "bcde":
            picture(0, 20, 20).save(os.path.join(tmp, name + ".png"))
        images = job.crops([tmp], 16)

        class Bar:
            def __init__(self, **how):
                bars.append(how)

            def __enter__(self):
                return types.SimpleNamespace(update=bars.append)

            def __exit__(self, *trouble):
                pass
        args.workers, args.batch_size = 0, 2
        open(os.path.join(tmp, "d.png"), "w").close()
        for rank, quiet in (0, None), (1, True):
            job.rank, job.gather = rank, lambda x, everywhere=True: [x, ["of another rank"]]
            bars.clear()
            with patch.object(jobs, "tqdm", Bar):  # b, c, then d, which is bad, and nothing after it
                found = job.images("note", images, numbers=[0, 1, 2])
                assert next(found)[0] == [0, 1]
                raises(evaluation.UserError, lambda: next(found), words=["2 of 4 images", "d.png: ", "; of another"])
            assert bars == [dict(total=3, desc="note", unit="img", disable=quiet, leave=False), 2, 1]
        # on a GPU: a thread receives the batches
        job.device, args.workers, args.batch_size, locks = torch.device("cuda"), 3, 7, []
        job.gather = lambda x, everywhere=True: [x]

        def loader(subset, batch_size, **how):
            loaders.append((list(subset.indices), batch_size, how))
            return []
        with patch.object(jobs, "DataLoader", loader), patch.object(jobs, "check_locks", locks.append):
            assert not list(job.images("note", images))
        how = dict(num_workers=3, collate_fn=jobs.collate, pin_memory=True)
        assert loaders == [([1, 2, 3], 7, how)] and locks == [3]
        job.rank, job.start = 0, job.start - 12.3
        with patch.multiple(torch.cuda, get_device_name=lambda: "a GPU", max_memory_allocated=lambda: 3 * 2 ** 29), \
                contextlib.redirect_stdout(io.StringIO()):
            report = job.finish({}, [])
        assert (report["device"], report["memory_gib"]) == ("a GPU", 1.5) and 12.3 <= report["seconds"] < 72
    # ranks wait for each other for a day: reading what rank 0 downloads may take long
    with patch.dict(os.environ, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1"), patch.multiple(
            dist, is_initialized=lambda: False, init_process_group=lambda *how, **more: bars.append((how, more))):
        jobs.Job(args)
    assert bars[-1] == (("gloo",), dict(timeout=timedelta(days=1)))
    with patch.dict(os.environ, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1"), patch.multiple(
            dist, is_initialized=lambda: True, init_process_group=lambda *how, **more: bars.append("again")):
        assert jobs.Job(args).ranks == 2 and bars[-1] != "again", "a second job of this process"


def test_what_eval_shows_of_itself():
    """By the same draws, and numpy: half a grey, and noise of a tenth."""
    torch.manual_seed(3)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        evaluation.demo()
    torch.manual_seed(3)
    noise = 0.1 * torch.randn(2, 3, 64, 64).clamp(-3, 3).double().numpy()
    quality = [f"{-10 * np.log10((x ** 2).mean()):.2f}" for x in noise]
    lines = said.getvalue().splitlines()
    assert lines[0] == "images     (2, 3, 64, 64) grey, with noise of standard deviation 0.1"
    assert lines[1] == f"psnr       {quality} dB (20 expected)" and all(abs(float(x) - 20) < 0.3 for x in quality)
    from skimage.metrics import structural_similarity
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for line, name, how in (lines[2], "ssim", {"data_range": 1, **how}), (lines[3], "ssim_paper", {"data_range": 2}):
        figures = [structural_similarity(np.full((64, 64, 3), 0.5), 0.5 + x.transpose(1, 2, 0), channel_axis=-1, **how)
                   for x in noise]
        assert line == f"{name:10s} {[f'{x:.4f}' for x in figures]}", (line, figures)
    assert len(lines) == 5


def test_a_report_says_where_the_weights_come_from():
    """Step, commit and teacher are those of the weights file, and the commit of this code stands beside them."""
    with tempfile.TemporaryDirectory() as tmp:
        plain, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=2)
        weights, said = os.path.join(tmp, "said.safetensors"), {"step": 1234, "commit": "theirs",
                                                                "teacher": "a teacher"}
        encoder.write_model(weights, {**encoder.read_config(plain), **said}, safetensors.torch.load_file(plain))
        report = evaluate("--data", folder, "--weights", weights, "--inception", "none", "--workers", 0)[1]
        assert {k: report[k] for k in said} == said and report["code"] == script.commit() and report["images"] == 2
    assert fid_command.warn_of_few(2048) is None, "as many as dimensions"
    assert fid_command.warn_of_few(2047).startswith("FID of 2047 images")


def test_a_distance_is_never_below_0():
    """Of equal statistics rounding would make it a little more or less than 0."""
    torch.manual_seed(0)
    found = []
    for n in range(40):
        x = torch.randn(20 + n, 24, dtype=torch.float64)
        found.append(evaluation.frechet_distance(x.mean(0), torch.cov(x.T), x.mean(0), torch.cov(x.T)))
    assert min(found) >= 0 and max(found) < 1e-9, (min(found), max(found))


def test_weights_that_are_not_given():
    with tempfile.TemporaryDirectory() as tmp, contextlib.chdir(tmp):
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=2)
        shipped = os.path.join(HERE, "weights", "uniflow-tiny.safetensors")
        flags = ["--data", folder, "--inception", "none", "--workers", 0]
        said, report = evaluate(*flags)
        assert report["weights"] == shipped and shipped in said
        os.makedirs("out"), os.rename(weights, "out/model.safetensors")
        said, report = evaluate(*flags)
        assert report["weights"] == "out/model.safetensors", "and the JSON has the path alone"
        told, = (line for line in said.splitlines() if line.startswith("weights"))
        assert "there is no --weights" in told and f"--weights {shipped}" in told, told
        assert sampled("pictures/class0/0.png", "--out", "here")[1].splitlines()[0].startswith(told.replace("   ", " "))
        for weights in "out/model.safetensors", shipped:  # who names one, or has no other, is told nothing
            assert "there is no --weights" not in evaluate(*flags, "--weights", weights)[0]
        assert "there is no --weights" not in said.replace(told, "")
