"""What a training run needs around its loop: ranks, a locked folder, a log, checkpoints, signals, and its end.

    run = Run("out")                   # this process's rank and device
    run.hold_folder()                  # rank 0 keeps every other run out of it
    run.open_log(step)                 # log.jsonl, without lines later than the checkpoint
    run.say("...") ; run.write(step=1, loss=0.5)
    add("--lr", type=number(float, 0)) # for argparse: refuses what is out of range
    if __name__ == "__main__":
        command_line(main, "train.py") # one line and status 2 for what the user or the machine did wrong

train.py uses it, and so does every trainer in downstream/. All files are written whole or not at all.
"""
import argparse
import contextlib
import glob
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import default_collate
from tqdm import tqdm

from encoder import UserError, write_atomically
from tools.script import SAVE_AND_STOP, open_streams, print_user_message, rank_and_device, user_message

try:
    import fcntl
except ImportError:  # Windows: this can be imported, hold_folder says that it cannot run
    fcntl = None

INTERRUPTS = []  # signals that asked the run to save and stop


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float (kind is which) that is at least `low` and at most `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also refuses nan
            raise argparse.ArgumentTypeError(
                f"it is {text}; it must be at least {low}" + f" and at most {high}" * (high < math.inf))
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


class Run:
    """A training run as one of its processes sees it: `rank` of `ranks`, its `device`, and the folder `out`.

    The process runs alone, or is one of torchrun's. Only rank 0 prints, writes the log and locks the folder; on the
    other ranks these methods do nothing.
    """

    def __init__(self, out):
        self.out = out
        self.rank, self.ranks, self.device = rank_and_device()
        self.on_gpu = self.device.type == "cuda"
        self.control = self.log = self.lock = None
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")

    def path(self, *names):
        """The path of a file in the folder."""
        return os.path.join(self.out, *names)

    def connect(self):
        """Join the other ranks: NCCL exchanges gradients, gloo what CPUs must agree on without waiting for a GPU."""
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.on_gpu else "gloo", device_id=self.device if self.on_gpu else None)
            self.control = dist.new_group(backend="gloo")

    def say(self, text):
        """Print a line beside the progress bar. If nobody reads any more (head, a dead tee), save and stop."""
        if self.rank == 0:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                INTERRUPTS.append(signal.SIGPIPE)

    def hold_folder(self):
        """Rank 0 makes the folder, and locks it until this process ends, however it ends."""
        if fcntl is None:
            raise UserError("it needs a POSIX system, whose locks keep a second run out of --out: use Linux, macOS or "
                            "WSL")
        if self.rank > 0:
            return
        try:
            os.makedirs(self.path("samples"), exist_ok=True)
            self.lock = open(self.path(".lock"), "w")
        except OSError as e:
            raise UserError(f"--out {self.out} is no folder to write to ({e})") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN, EACCES
            raise UserError(f"another run is writing to {self.out}: wait for it, or use another --out") from None
        except OSError as e:  # a file system without locks
            print(f"{self.out} cannot be locked ({e}): nothing keeps a second run out of it")
        # remove half-written files of killed runs; a file of the last ten minutes may still be in work
        for name in os.listdir(self.out):
            if re.fullmatch(r"\.[0-9a-f]{12}\.tmp", name) and time.time() - os.path.getmtime(self.path(name)) > 600:
                os.remove(self.path(name))

    def agree(self, checkpoint):
        """Raise UserError unless all ranks see the same checkpoint. checkpoint: a list that identifies it."""
        first = [checkpoint]
        if self.ranks > 1:
            dist.broadcast_object_list(first, group=self.control)
        if first != [checkpoint]:
            raise UserError(f"rank {self.rank} sees another {self.path('state.pt')} than rank 0: --out must lie on a "
                            "file system that all nodes share")

    def sum(self, *numbers):
        """Sums of integers over the ranks."""
        total = torch.tensor(numbers)
        if self.ranks > 1:
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def list_unreadable(self, paths):
        """Add the paths of images that cannot be read to this rank's bad_images.txt. Returns how many are new there."""
        if not paths:
            return 0
        listed = self.path("bad_images.txt" if self.rank == 0 else f"bad_images.rank{self.rank}.txt")
        known = read_names(listed) if os.path.exists(listed) else []
        new = sorted(set(paths).difference(known))
        if new:
            write_names(listed, known + new)
        return len(new)

    def load(self, keys, args, may_differ):
        """The checkpoint in the folder, the same on all ranks, or None if there is none; see load_checkpoint. If there
        is none, rank 0 sets aside what an earlier run has left."""
        state = load_checkpoint(self.path("state.pt"), keys, args, may_differ)
        self.agree([state["id"], state["step"]] if state else [None, 0])
        if state is None and self.rank == 0:
            self.set_aside()
        return state

    def set_aside(self):
        """Rename what a run without a checkpoint has left, so that nothing is overwritten or appended to."""
        for name in ("log.jsonl", "bad_images.txt", "bad_images.rank[0-9]*.txt", "model.safetensors",
                     "model_[0-9]*.safetensors", "samples/step_[0-9]*.png"):
            for path in glob.glob(os.path.join(glob.escape(self.out), name)):
                aside = path + ".old"
                while os.path.exists(aside):
                    aside += ".old"
                os.replace(path, aside)

    def open_log(self, step):
        """Rank 0 opens the log to append to, without lines later than the checkpoint or torn by a crash."""
        if self.rank > 0:
            return

        def is_kept(line):
            try:
                return line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                return False
        path = self.path("log.jsonl")
        if os.path.exists(path):
            with open(path, errors="replace") as f:
                lines = [line for line in f if is_kept(line)]
            write_atomically(path, lambda f: f.write("".join(lines).encode()))
        self.log = open(path, "a")

    def write(self, **line):
        """Write a line to the log. Raises UserError if the disk is full."""
        if self.rank == 0:
            try:
                print(json.dumps(finite(line), allow_nan=False), file=self.log, flush=True)
            except OSError as e:
                raise UserError(f"{self.path('log.jsonl')} cannot be written ({e}): make room, and run the same "
                                "command again, which goes on from the last save") from None

    def stop_not_finite(self, step, in_a_row, last_finite, files):
        """Raise UserError, because that many steps in a row were not finite. last_finite: the losses of the last finite
        step, as text. files: those of the last batch, which rank 0 writes to not_finite.txt."""
        if self.rank == 0:
            write_names(self.path("not_finite.txt"), files)
        raise UserError(f"at step {step} the loss or its gradient is not finite, {in_a_row} steps in a row (the last "
                        f"finite one: {last_finite}); the last batch is {', '.join(files[:3])} .. (all of it in "
                        f"{self.path('not_finite.txt')}). The last save is {self.path('state.pt')}: the same command "
                        "with a lower --lr and --resume_anyway goes on from there")

    def end(self, step, interrupted, done):
        """Say how the run has ended, at a signal or `done` (a text), and close its files."""
        if interrupted:
            self.write(kind="interrupted", step=step)
            self.say(f"interrupted and saved at step {step:,}: the same command goes on from there")
        else:
            self.say(f"done: {done}")
        self.close()

    def close(self):
        for file in filter(None, (self.log, self.lock)):
            file.close()


def rate_factor(step, args):
    """The factor of the learning rates at a step (0 is the first): the warm-up times the decay at the end."""
    left = min(1.0, (args.steps - step) / max(1.0, args.lr_decay * args.steps))
    if args.decay_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return left * min(1.0, (step + 1) / max(1, args.warmup))


def average_weights(averages, weights, step, decay):
    """After a step (0 is the first) move each average toward its weight: a <- d a + (1 - d) w. In the first steps
    d = (step + 1) / (step + 10) is below `decay`, so that the averages of a short run forget its initial weights."""
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (step + 1) / (step + 10)))


def seed_step(*numbers):
    """Make all random draws that follow (times, noise, stochastic depth) a function of these integers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def capture_graph(micro_step, img, clear):
    """Record micro_step (uint8 image batch -> statistics) as a CUDA graph. Returns a function that replays it on
    batches of that shape. Python launches the kernels of a small model one by one, more slowly than the GPU runs them.

    clear() clears the gradients just before the recording. Where it leaves None, the graph writes gradients; where it
    leaves zeros, the graph adds to them.
    """
    img, side = img.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and let the libraries set up
        for _ in range(3):
            micro_step(img)
    torch.cuda.current_stream().wait_stream(side)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = micro_step(img)

    def replay(batch, last=True):  # `last` is for several ranks (see train.py), and a graph has one
        img.copy_(batch)
        graph.replay()
        return stats
    return replay


def finite(x):
    """x, a number or dicts and lists that hold numbers, with None for nan and inf, which JSON does not know."""
    if isinstance(x, (dict, list)):
        return {k: finite(v) for k, v in x.items()} if isinstance(x, dict) else [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_names(path, names):
    """Write names of files, one a line, as bytes: a file's name need not be text."""
    write_atomically(path, lambda f: f.write("".join(name + "\n" for name in names).encode(errors="surrogateescape")))


def read_names(path):
    """What write_names has written."""
    with open(path, "rb") as f:
        return f.read().decode(errors="surrogateescape").split("\n")[:-1]


def load_checkpoint(path, keys, args, may_differ):
    """The state at `path`, a dict with at least these keys, or None if there is none. Unless args.resume_anyway, raises
    UserError if a saved argument (in state["args"]) differs from `args` and is not in `may_differ`."""
    if not os.path.isfile(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = set(keys).difference(state)
    except Exception as e:  # torch.load raises many types
        if user_message(e):  # trouble of the machine: the file may be whole
            raise
        raise UserError(f"{path} is damaged or no checkpoint of this script ({type(e).__name__}): move it away to "
                        "start afresh") from None
    if missing:
        raise UserError(f"{path} is of an older version, or no checkpoint of this script (it lacks "
                        f"{' '.join(sorted(missing))}): move it away to start afresh")
    now = vars(args)
    changed = [f"{k} was {v}, is now {now[k]}" for k, v in state["args"].items()
               if k in now and k not in may_differ and v != now[k]]
    if changed and not args.resume_anyway:
        raise UserError(f"{path} is of another run ({'; '.join(changed)}): use another --out, or --resume_anyway")
    return state


def restore_optimizer(optimizer, state, path):
    """Load the moments of a checkpoint. Learning rate, weight decay and other settings remain those of this command."""
    ours = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as e:  # --resume_anyway with another --freeze_encoder
        raise UserError(f"{path} has the optimizer of other parameters ({e}): use another --out") from None
    for group, settings in zip(optimizer.param_groups, ours):
        group.update(settings)


@contextlib.contextmanager
def explain_failed_save(path, step):
    """A context for all that a save writes. A full disk becomes a UserError, which says that the last save is whole."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        why = e if isinstance(e, OSError) else e.__context__  # torch.save hides the OSError behind its own
        if not isinstance(why, OSError):
            raise
        raise UserError(f"step {step} could not be saved ({why}); {path}, if there is one, is of the last save and "
                        "whole: make room, and run the same command again") from None


def split_batch(batch, micro_batch, ranks):
    """(micro-batch, accumulation steps) of each rank: micro-batch * accumulation * ranks = batch, exactly.

    A micro-batch that does not divide the rank's share becomes the largest divisor below it.
    """
    if batch % ranks:
        low = batch // ranks * ranks
        near = " or ".join(str(b) for b in (low, low + ranks) if b)
        raise UserError(f"batch_size {batch} does not divide among {ranks} ranks: try {near}")
    share = batch // ranks
    micro_batch = next(m for m in range(min(micro_batch, share), 0, -1) if share % m == 0)
    return micro_batch, share // micro_batch


def collate(samples):
    """Samples of a dataset -> (uint8 (B, 3, S, S), their labels as a list). A worker sends a list through a pipe; a
    tensor of labels would go through /dev/shm, by a thread that loses its errors."""
    images, labels = zip(*samples)
    return default_collate(images), list(labels)


def sample_numbers(first, batch, micro_batch, rank, ranks, batches):
    """Yields this rank's micro-batches as lists of global sample numbers: `batches` global batches from sample `first`.

    Whatever the ranks, the global batches are the same samples: rank r has the r-th contiguous share of each.
    """
    share = batch // ranks
    for start in range(first + rank * share, first + rank * share + batches * batch, batch):
        for m in range(start, start + share, micro_batch):
            yield list(range(m, m + micro_batch))


def listen(on_signal):
    """From now on signals ask the run to save and stop. Under nohup, SIGHUP stays ignored."""
    for received in SAVE_AND_STOP:
        if received != getattr(signal, "SIGHUP", None) or signal.getsignal(received) != signal.SIG_IGN:
            signal.signal(received, on_signal)


def interrupt(received, frame):
    """Save and stop after this step. A second Ctrl-C stops at once, but no second SIGTERM: torchrun may send two."""
    INTERRUPTS.append(received)
    if INTERRUPTS.count(signal.SIGINT) > 1:
        os._exit(128 + received)


def command_line(main, name):
    """Call main(on_signal=interrupt) as the script `name`. What the user or the machine did wrong ends the process with
    one line and status 2, a bug with a traceback and status 1.

    After an exception the process ends at once. Otherwise Python would wait for the workers, which ignore signals, and
    torch for the other ranks.
    """
    open_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes `command &` ignore it
    try:
        main(on_signal=interrupt)
        if dist.is_initialized():
            dist.barrier()  # all ranks leave the group together
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:  # Ctrl-C before the first step
        status = 130
    except Exception as e:
        status = 2 if print_user_message(e, name) else 1
        if status == 1:
            traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    if fcntl:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report the killed workers
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)
