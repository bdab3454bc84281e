"""What a training run needs around its loop: ranks, a locked folder, a log, checkpoints, signals, and its end.

    run = Run("out")                   # this process's rank and device
    now = run.counts(3)                # step, samples, sums of 3 statistics: what changes, and is saved
    run.hold_folder()                  # rank 0 keeps every other run out of it
    state = run.load(...)              # the checkpoint; run.restore(state, now, optimizer)
    run.open_log(now.step)             # log.jsonl, without lines later than the checkpoint
    loop(run, now, args, step, log, evaluate, save)
    if __name__ == "__main__":
        command_line(main, "train.py") # one line and status 2 for what the user or the machine did wrong

train.py uses it, and so does every trainer in downstream/. All files are written whole or not at all. Beside it,
tools/batches.py says which samples a step sees, and tools/optimizer.py how it moves the weights.
"""
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
import uuid
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from encoder import UserError, write_atomically
from tools.checkpoint import explain_failed_save, load_checkpoint, restore_optimizer
from tools.script import SAVE_AND_STOP, open_streams, print_user_message, rank_and_device, read_names, write_names

try:
    import fcntl
except ImportError:  # Windows: this can be imported, hold_folder says that it cannot run
    fcntl = None

INTERRUPTS = []  # signals that asked the run to save and stop
TOO_MANY_SKIPPED = 10  # steps in a row with a loss or gradient that is not finite


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
        self.allow_tf32()

    def allow_tf32(self):
        """Let a GPU round the factors of fp32 products to TF32; a Job forbids it, and a run may evaluate by one."""
        if self.on_gpu:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True

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

    def agree(self, value, otherwise):
        """Raise UserError unless all ranks have the same `value`: "rank N", and the text `otherwise`."""
        first = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(first, group=self.control)
        if first != [value]:
            raise UserError(f"rank {self.rank} {otherwise}")

    def agree_on_weights(self, *models):
        """Raise UserError unless the models are the same on all ranks: the shape of each weight, and the sum of its
        bits as integers, which no order of adding changes."""
        if self.ranks == 1:
            return
        weights = [p.detach() for model in models for p in model.parameters()]
        sums = torch.stack([p.view(torch.int32).sum() for p in weights]).tolist()  # of int64
        self.agree([[list(p.shape), n] for p, n in zip(weights, sums)], "starts from other weights than rank 0: start "
                   "all nodes by the same command, with the same files")

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
        self.agree([state["id"], state["step"]] if state else [None, 0], f"sees another {self.path('state.pt')} than "
                   "rank 0: --out must lie on a file system that all nodes share")
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

    def counts(self, statistics):
        """What a step changes and a checkpoint holds beside the weights, at the start of a run. A step has that many
        statistics; the last of them is 1."""
        return SimpleNamespace(
            id=uuid.uuid4().hex[:12], step=0, samples=0,
            sums=torch.zeros(statistics, dtype=torch.float64, device=self.device),  # since the last log line
            faults=torch.zeros(2, device=self.device))  # steps skipped so far, and steps skipped in a row

    def count(self, now, row, samples):
        """Count a step of that many samples, and add its statistics `row` to now.sums if all are finite. The sums stay
        on the GPU, so that Python need not wait for it."""
        skipped = ~row.isfinite().all()
        now.sums += torch.where(skipped, 0, row)
        now.faults = torch.stack([now.faults[0] + skipped, (now.faults[1] + 1) * skipped])
        self.last_finite = torch.where(skipped, self.last_finite, row)
        now.step, now.samples = now.step + 1, now.samples + samples

    def must_stop(self, now):
        """Whether too many steps in a row were not finite. Python waits for a GPU to read that: there it does so at
        every tenth step alone."""
        return (not self.on_gpu or now.step % 10 == 0) and now.faults[1] >= TOO_MANY_SKIPPED

    def restore(self, state, now, optimizer=None):
        """Set `now`, and the optimizer if the checkpoint has its moments apart, to a checkpoint of run.load."""
        if optimizer:
            restore_optimizer(optimizer, state["optimizer"], self.path("state.pt"))
        vars(now).update({k: state[k] for k in vars(now)})
        now.sums, now.faults = now.sums.to(self.device), now.faults.to(self.device)
        self.say(f"resumed from {self.path('state.pt')} at step {now.step:,}")

    def save(self, state, keep_every, export):
        """Rank 0 writes state.pt, which alone is enough to resume, and by export(path) the model. Every `keep_every`
        steps a copy of the model stays."""
        if self.rank > 0:
            return
        path, step = self.path("state.pt"), state["step"]
        with explain_failed_save(path, step):
            # before state.pt: a run that is killed in between resumes from an earlier step, and writes this copy then
            if keep_every and step % keep_every == 0:
                export(self.path(f"model_{step:07d}.safetensors"))
            write_atomically(path, lambda f: torch.save(state, f))
            export(self.path("model.safetensors"))

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

    def stop_not_finite(self, now, last_finite, files):
        """Raise UserError, because too many steps in a row were not finite. last_finite: the losses of the last finite
        step, as text. files: those of the last batch, which rank 0 writes to not_finite.txt."""
        if self.rank == 0:
            write_names(self.path("not_finite.txt"), files)
        raise UserError(f"at step {now.step} the loss or its gradient is not finite, {int(now.faults[1])} steps in a "
                        f"row (the last finite one: {last_finite}); the last batch is {', '.join(files[:3])} .. (all "
                        f"of it in {self.path('not_finite.txt')}). The last save is {self.path('state.pt')}: the same "
                        "command with a lower --lr and --resume_anyway goes on from there")

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


def loop(run, now, args, step, log, evaluate, save):
    """Train until args.steps, or until a signal asks to save and stop. Returns whether it was a signal.

    step() makes a step, and returns whether some rank received a signal. log(seconds a step), evaluate() and save()
    follow at their intervals args.log_every, eval_every, save_every and keep_every, and at the end.
    """
    def due(every):
        return now.step == args.steps or every and now.step % every == 0
    bar = tqdm(total=args.steps, initial=now.step, desc="train", unit="step", disable=None if run.rank == 0 else True)
    run.last_finite = now.sums  # statistics of the last finite step; until there is one, the sums stand in
    tick, timed, interrupted = time.time(), 0, False  # timed: the steps since tick
    while now.step < args.steps and not interrupted:
        interrupted = step()
        timed += 1
        bar.update()
        logging, evaluating = due(args.log_every), due(args.eval_every)
        saving = due(args.save_every) or due(args.keep_every)
        if logging:
            if run.on_gpu:
                torch.cuda.synchronize()  # Python may be steps ahead of the GPU
            log((time.time() - tick) / timed)
        if interrupted:  # before an evaluation, which may outlast the patience of a scheduler
            save()
        if evaluating:
            evaluate()
        if saving and not interrupted:
            save()
        if logging or evaluating or saving:  # their time is not the steps'
            tick, timed = time.time(), 0
    bar.close()
    return bool(interrupted)


def seed_step(*numbers):
    """Make all random draws that follow (times, noise, stochastic depth) a function of these integers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def finite(x):
    """x, a number or dicts and lists that hold numbers, with None for nan and inf, which JSON does not know."""
    if isinstance(x, (dict, list)):
        return {k: finite(v) for k, v in x.items()} if isinstance(x, dict) else [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def listen(on_signal):
    """From now on signals ask the run to save and stop. Under nohup, SIGHUP stays ignored."""
    for received in SAVE_AND_STOP:
        if received != getattr(signal, "SIGHUP", None) or signal.getsignal(received) != signal.SIG_IGN:
            signal.signal(received, on_signal)


def interrupt(received, frame):
    """Save and stop after this step. A second Ctrl-C stops at once, but no second SIGTERM: torchrun may send two."""
    INTERRUPTS.append(received)
    if len(INTERRUPTS) == 1 and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody reads; and print must not be called by a signal
            os.write(2, b"saving after this step; Ctrl-C again stops at once\n")
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
