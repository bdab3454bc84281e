"""What the tests share: micro models, pictures, ways to run a script, an independent Inception network.

test_all.py and the modules beside this one import it; importing it sets CUDA_VISIBLE_DEVICES and OMP_NUM_THREADS.
"""
import atexit
import concurrent.futures
import contextlib
import functools
import io
import json
import multiprocessing.connection
import multiprocessing.spawn
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import unittest.mock
import zipfile
from dataclasses import asdict

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' tolerances and recipes are the CPU's, on any machine
# on such small models more threads only wait for each other, on a busy machine ten times as long
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide that a script loses what it has not flushed
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, and so it would be in every script
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from torch import nn

import decoder
import encoder
import eval as evaluation
import sample
import train

REFUSE_PICKLE, REFUSE_OTHER = encoder.refuse_pickle, evaluation.refuse_pickle
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):  # the tests' own pickles are harmless
    encoder.refuse_pickle = evaluation.refuse_pickle = lambda path: None

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root of the repository
MICRO_VIT = encoder.ViTConfig(width=32, depth=3, heads=2, mlp_width=64, patch=4, size=16)
MICRO_DECODER = decoder.DecoderConfig(latent_dim=8, width=32, heads=2, gtb_depth=2, flow_depth=2, flow_width=96,
                                      patch=4, grid=4)
MICRO_RUN = ["--latent_dim", "8", "--gtb_depth", "1", "--flow_depth", "2", "--flow_width", "96", "--batch_size", "4",
             "--lr", "1e-3", "--log_every", "1", "--workers", "0"]
# what train.losses reads of the command line
METHOD = types.SimpleNamespace(beta=2.0, strategy="adaptive", endpoint=0.0)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "tests.helpers", "torch._dynamo"])  # the last is what an optimizer imports
# a process that starts looks after all that have ended, and two must not read the same status
STARTING = threading.Lock()


def micro_models(seed=0, config=MICRO_DECODER):
    """(teacher, encoder, decoder), with every parameter random: zero-initialised ones would hide what is tested."""
    torch.manual_seed(seed)
    teacher = encoder.ViT(MICRO_VIT).eval().requires_grad_(False)
    enc = encoder.Encoder(encoder.ViT(MICRO_VIT), config.latent_dim, config.projector)
    dec = decoder.Decoder(config)
    for module in (teacher, enc, dec):
        for p in module.parameters():
            p.data = 0.2 * torch.randn_like(p)
    return teacher, enc, dec


def micro_teacher(folder):
    """Path of a self-describing teacher file of MICRO_VIT."""
    torch.manual_seed(1)
    path = os.path.join(folder, "teacher.safetensors")
    encoder.write_model(path, {"vit": asdict(MICRO_VIT)}, encoder.ViT(MICRO_VIT).state_dict())
    return path


def as_script(command, cwd, env, out, err):
    """What `python SCRIPT FLAG ..` does in the folder cwd: the target of a process of FORKS, which has imported torch
    already."""
    os.setsid()
    for fd, path in (1, out), (2, err):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # FORKS' own would be that of the script's workers, too
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, cwd)
        sys.modules.pop(command[1], None)  # of a test that imports it
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
        runpy.run_path(command[0], run_name="__main__")


def start_script(*args):
    """A process of FORKS at work on as_script. It does not import this process's __main__, as one of multiprocessing
    would: test_all.py takes a second."""
    process, plain = FORKS.Process(target=as_script, args=args), multiprocessing.spawn.get_preparation_data
    without_main = lambda name: {k: v for k, v in plain(name).items() if not k.startswith("init_main")}
    with STARTING, unittest.mock.patch.object(multiprocessing.spawn, "get_preparation_data", without_main):
        process.start()
    return process


def exit_status(process):
    """That of a process of start_script, once it has ended. One that hangs is killed after five minutes."""
    if not multiprocessing.connection.wait([process.sentinel], 300):
        process.kill()
    with STARTING:
        process.join()
    return process.exitcode


def run(*command, cwd=HERE, **env):
    """Run a command to its end; `python` and `torchrun` mean this interpreter's. A script gets a process forked off one
    that has imported torch: an import takes longer than most scripts do."""
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    command, env = list(map(str, command)), {**os.environ, **env}
    if command[0] != "python" or command[1].startswith("-") and command[1] != "-m":
        command[:1] = start.get(command[0], command[:1])
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as tmp:
        out, err = os.path.join(tmp, "out"), os.path.join(tmp, "err")
        status = exit_status(start_script(command[1:], cwd, env, out, err))
        return subprocess.CompletedProcess(command, status, open(out).read(), open(err).read())


def windows_like():
    """First lines of a script that hide what Python lacks on Windows, or on macOS too: modules and names. Workers that
    are started by spawn or forkserver run them too, since they import the script. torch comes first: it may use what
    Linux has."""
    return """
import os, signal, sys
import torch.utils.data
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty"):
    sys.modules[name] = None  # an import fails
for module, names in ((os, "pread pwrite sched_getaffinity getuid geteuid mkfifo fchmod posix_fadvise sysconf "
                           "statvfs killpg"),
                      (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGALRM SIGPIPE")):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


def side_by_side(*functions):
    """What each of the functions gives, two of them at work at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [task.result() for task in [pool.submit(f) for f in functions]]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_ranks(n, *command, **env):
    """Run a script in n processes that find each other, as torchrun's; a list of what each gave."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(n),
           "LOCAL_WORLD_SIZE": str(n), **env}
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda rank: run(*command, RANK=str(rank), LOCAL_RANK=str(rank), **env), range(n)))


@contextlib.contextmanager
def killed_in_step(trainer, n):
    """The trainer's n-th step in this block ends the block, as a kill would: what no save has seen is lost."""
    plain, calls = trainer.step, []

    def step(s, batches):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return plain(s, batches)
    with unittest.mock.patch.object(trainer, "step", step):
        try:
            yield
        except KeyboardInterrupt:
            return
    raise AssertionError(f"there was no step {n}")


def demands(parse, commands, *flags):
    """A command, and each of the flags, {command: its arguments} with values, is required wherever it stands."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        raises(SystemExit, parse, [])
    assert "arguments are required: " in err.getvalue(), err.getvalue()
    for command, given in commands.items():
        for flag in set(flags) & set(given):
            left = [x for before, x in zip(["", *given], given) if flag not in (before, x)]
            with contextlib.redirect_stderr(io.StringIO()) as err:
                raises(SystemExit, parse, [command, *left])
            assert f"arguments are required: {flag}" in err.getvalue(), (command, flag, err.getvalue())


def bounds(parse, *rows):
    """Of each row (command, flag, value, another) the flag takes the one, and refuses the other."""
    for command, flag, good, bad in rows:
        assert parse(command, f"--{flag}", good)[flag] == good
        with contextlib.redirect_stderr(io.StringIO()):
            raises(SystemExit, parse, command, f"--{flag}", bad)


def gpu_takes_bf16(parse, otherwise):
    """On a GPU bf16 is the default of test and predict, and the flag `otherwise` turns it off."""
    with unittest.mock.patch.object(torch.cuda, "is_available", lambda: True):
        for command in "test", "predict":
            assert parse(command)["bf16"] and not parse(command, otherwise)["bf16"]


def train_quietly(*flags):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main([*MICRO_RUN, *map(str, flags)])
    return out.getvalue()


def log_lines(folder, timing=False):
    """The lines of a run's log; without what the clock and the machine decide."""
    lines = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    clock = ("img_s", "tokens_s", "tflops_per_gpu", "memory_gib")
    return lines if timing else [{k: v for k, v in x.items() if k not in clock} for x in lines]


def picture(seed, width=40, height=30):
    """A smooth colour picture as a PIL image."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def picture_folder(folder, n=10):
    """A folder of n pictures in two class folders, and the same as an archive; their two paths."""
    os.makedirs(folder, exist_ok=True)
    root, archive = os.path.join(folder, "pictures"), os.path.join(folder, "pictures.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(n):
            name = os.path.join(f"class{i % 2}", f"{i}.png")
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            picture(i, 40 + i, 30 + 2 * i).save(os.path.join(root, name))
            z.write(os.path.join(root, name), name)
    return root, archive


def inception_reference(img, state):
    """The 2015 Inception as plain functions of a state dict in pytorch-fid's names: img (B, 3, 299, 299) in [0, 1] ->
    (pool, logits). Parameters that `state` does not have are drawn and added, so that shapes, too, are this function's
    own."""
    def conv(x, name, n, kernel, stride=1, padding=0):
        if f"{name}.conv.weight" not in state:
            fan = x.shape[1] * np.prod(kernel if isinstance(kernel, tuple) else (kernel, kernel))
            size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
            state[f"{name}.conv.weight"] = torch.randn(n, x.shape[1], *size) * (2 / fan) ** 0.5
            for key, low, high in (("weight", 0.5, 1.2), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2),
                                   ("running_var", 0.8, 1.6)):
                state[f"{name}.bn.{key}"] = low + (high - low) * torch.rand(n)
        gain, shift, mean, var = (state[f"{name}.bn.{key}"].view(-1, 1, 1)
                                  for key in ("weight", "bias", "running_mean", "running_var"))
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        return ((x - mean) / (var + 0.001).sqrt() * gain + shift).clamp(min=0)

    def average(x):  # of the pixels that are there
        ones = torch.ones(1, 1, *x.shape[2:])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)
    x = conv(2 * img - 1, "Conv2d_1a_3x3", 32, 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_2a_3x3", 32, 3), "Conv2d_2b_3x3", 64, 3, 1, 1), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3), 3, 2)
    for m, pool in ("Mixed_5b.", 32), ("Mixed_5c.", 64), ("Mixed_5d.", 64):
        five = conv(conv(x, m + "branch5x5_1", 48, 1), m + "branch5x5_2", 64, 5, 1, 2)
        double = conv(conv(conv(x, m + "branch3x3dbl_1", 64, 1), m + "branch3x3dbl_2", 96, 3, 1, 1),
                      m + "branch3x3dbl_3", 96, 3, 1, 1)
        x = torch.cat([conv(x, m + "branch1x1", 64, 1), five, double, conv(average(x), m + "branch_pool", pool, 1)], 1)
    m = "Mixed_6a."
    double = conv(conv(conv(x, m + "branch3x3dbl_1", 64, 1), m + "branch3x3dbl_2", 96, 3, 1, 1),
                  m + "branch3x3dbl_3", 96, 3, 2)
    x = torch.cat([conv(x, m + "branch3x3", 384, 3, 2), double, F.max_pool2d(x, 3, 2)], 1)
    for m, c in ("Mixed_6b.", 128), ("Mixed_6c.", 160), ("Mixed_6d.", 160), ("Mixed_6e.", 192):
        seven = conv(conv(conv(x, m + "branch7x7_1", c, 1), m + "branch7x7_2", c, (1, 7), 1, (0, 3)), m + "branch7x7_3",
                     192, (7, 1), 1, (3, 0))
        double = conv(x, m + "branch7x7dbl_1", c, 1)
        for k, (n, kernel, padding) in enumerate([(c, (7, 1), (3, 0)), (c, (1, 7), (0, 3)), (c, (7, 1), (3, 0)),
                                                  (192, (1, 7), (0, 3))], 2):
            double = conv(double, f"{m}branch7x7dbl_{k}", n, kernel, 1, padding)
        x = torch.cat([conv(x, m + "branch1x1", 192, 1), seven, double, conv(average(x), m + "branch_pool", 192, 1)], 1)
    m = "Mixed_7a."
    three = conv(conv(x, m + "branch3x3_1", 192, 1), m + "branch3x3_2", 320, 3, 2)
    seven = conv(conv(conv(x, m + "branch7x7x3_1", 192, 1), m + "branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
                 m + "branch7x7x3_3", 192, (7, 1), 1, (3, 0))
    x = torch.cat([three, conv(seven, m + "branch7x7x3_4", 192, 3, 2), F.max_pool2d(x, 3, 2)], 1)
    for m in "Mixed_7b.", "Mixed_7c.":
        three = conv(x, m + "branch3x3_1", 384, 1)
        double = conv(conv(x, m + "branch3x3dbl_1", 448, 1), m + "branch3x3dbl_2", 384, 3, 1, 1)
        forks = [conv(y, m + name + letter, 384, (1, 3) if letter == "a" else (3, 1), 1,
                      (0, 1) if letter == "a" else (1, 0))
                 for y, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")) for letter in "ab"]
        pooled = average(x) if m == "Mixed_7b." else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([conv(x, m + "branch1x1", 320, 1), *forks, conv(pooled, m + "branch_pool", 192, 1)], 1)
    pool = x.mean((2, 3))
    state.setdefault("fc.weight", 0.05 * torch.randn(1008, 2048))
    state.setdefault("fc.bias", torch.randn(1008))
    return pool, F.linear(pool, state["fc.weight"])


@functools.cache
def random_inception():
    """(seeded random weights of the FID network by name, path of their file)."""
    torch.manual_seed(0)
    state, folder = {}, tempfile.mkdtemp()
    inception_reference(torch.rand(1, 3, 299, 299), state)
    atexit.register(shutil.rmtree, folder)
    path = os.path.join(folder, os.path.basename(evaluation.INCEPTION_URL))
    torch.save(state, path)
    return state, path


class QuickInception(nn.Module):
    """Instead of eval.py's network where any will do: 64 features, whose covariance has eigenvalues in no time, and
    1008 logits."""

    def __init__(self, path):
        super().__init__()
        self.weight = torch.randn(48, 64 + 1008, generator=torch.Generator().manual_seed(0))

    def forward(self, img):
        pool, logits = (F.adaptive_avg_pool2d(img.float(), 4).flatten(1) @ self.weight).split([64, 1008], dim=1)
        return pool, 3 * (10 * logits).sin()  # which tell even similar pictures apart


def raises(kind, function, *args, words=""):
    """function(*args) must raise `kind` with these words (one string or several)."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            got = function(*args)
    except kind as e:
        assert all(w in str(e) for w in ([words] if isinstance(words, str) else words)), f"{words!r} not in: {e}"
        return
    raise AssertionError(f"no {kind.__name__}, but {got}")


def refused(kind, function, *args, says):
    """function(*args) must raise `kind` with exactly this message."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            got = function(*args)
    except kind as e:
        assert str(e) == says, f"it says\n{e}\nexpected\n{says}"
        return
    raise AssertionError(f"no {kind.__name__}, but {got}: {says}")


def peak():
    """The most memory that this process has ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def close(a, b, tolerance=1e-6):
    """Relative error of tensors, asserted."""
    error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


def tokenizer_file(folder):
    """Path of a tokenizer of MICRO_VIT with random parameters, whose teacher is that of micro_teacher in the same
    folder."""
    _, enc, dec = micro_models()
    path = os.path.join(folder, "tokenizer.safetensors")
    tensors = {f"{part}.{k}": v for part, module in (("encoder", enc), ("decoder", dec))
               for k, v in module.state_dict().items()}
    encoder.write_model(path, {"vit": asdict(MICRO_VIT), "decoder": asdict(MICRO_DECODER), "size": 16,
                               "teacher": micro_teacher(folder)},
                        {**tensors, "latent_mean": torch.zeros(8), "latent_std": torch.ones(8)})
    return path


def evaluate(*flags):
    """(the printed report, the returned one) of eval.py in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report = evaluation.main(list(map(str, flags)))
    return out.getvalue(), report


def faulty_training(folder, code):
    """Path of a script that is train.py after `code`, which injects a fault; `step` counts its calls of losses."""
    path = os.path.join(folder, "faulty.py")
    open(path, "w").write(f"""
import os, signal, sys, torch
sys.path.insert(0, {HERE!r})
import train
plain, rank, step = train.losses, int(os.environ.get("RANK", 0)), 0
def losses(*args, **kwargs):
    global step
    step += 1
    fault = None
{code}
    loss_dist, loss_flow, weight, alpha = plain(*args, **kwargs)
    return loss_dist, loss_flow * (1 if fault is None else fault), weight, alpha
train.losses = losses
train.run()
""")
    return path


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sampled(*flags):
    """(exit status, what it printed, what it complained of) of sample.py in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = sample.main(list(map(str, flags)))
        except (SystemExit, OSError, ValueError) as e:
            status = print(e, file=sys.stderr) or 2
    return status, out.getvalue(), err.getvalue()


def pixels(path):
    """(frames in RGB as integers (T, H, W, 3), durations in ms, loops) of a picture file, as PIL reads it."""
    with Image.open(path) as img:  # a WebP tells the duration once it is decoded
        frames = [(np.array(frame.convert("RGB")).astype(int), frame.info.get("duration"))
                  for frame in ImageSequence.Iterator(img)]
        return np.stack([x for x, _ in frames]), [duration for _, duration in frames], img.info.get("loop")


def clip(path, **options):
    """An animation of four pictures, each shown for another time."""
    first, *others = (picture(i) for i in range(4))
    first.save(path, save_all=True, append_images=others, duration=[100, 50, 70, 200], loop=2, lossless=True, **options)
    return path
