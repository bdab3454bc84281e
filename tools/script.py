"""What every script of this project needs: which tokenizer, which device, and how it ends when something is wrong.

    weights = find_weights(args.weights)    # the file given, else that in out/, else the one that ships
    rank, ranks, device = rank_and_device()
    add("--lr", type=number(float, 0))      # for argparse: refuses what is out of range
    user_message(error)                     # one line if the user or the machine caused the error; None for a bug
    run_command(main, "sample.py")          # main() as a script: such a line and status 2, or a bug's traceback
    write_file("out/figures.json", b"{}")   # whole or not at all; its folder is made
    check_output("out/figures.json", "run") # before the work: nothing that is read may be overwritten
    write_names("out/bad.txt", paths)       # of files, which need not be text; read_names reads them
    replace_between("README.md", begin, end, text)  # a table that a program writes, between two comments
    run_module("out", "train", "--size", 64)  # another script, as a study calls it; what it prints: out/output.txt
"""
import argparse
import errno
import logging
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import torch

import data
import decoder
import encoder
import eval as evaluation
from encoder import MissingFile, UserError, fetch
from tools.convert import convert_once, is_released

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS_FILE = "out/model.safetensors"  # what train.py leaves without --out
SHIPPED = os.path.join(TOP, "weights", "uniflow-tiny.safetensors")
USER_ERRORS = data.UserError, decoder.UserError, encoder.UserError, evaluation.UserError
# errors of the machine or its disk, which are neither a bug nor the user's mistake
MACHINES_TROUBLE = {getattr(errno, name, None) for name in (
    "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO EMFILE ENFILE ENOMEM EAGAIN EBUSY ESTALE ENOLCK ENODEV ENXIO ENOTCONN "
    "ETIMEDOUT EHOSTDOWN EREMOTEIO EPIPE ENAMETOOLONG").split()} - {None}
# the signals on which a training run saves and stops; Windows lacks two of them
SAVE_AND_STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def number(kind, low, high=math.inf):
    """A type for argparse: a finite int or float (kind is which) that is at least `low` and at most `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # also refuses nan
            upper = f" and at most {high}" if high < math.inf else " and finite" * (value == math.inf)
            raise argparse.ArgumentTypeError(f"it is {text}; it must be at least {low}{upper}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def default_workers(most):
    """Data loading processes of a rank where the user names no number: its share of the CPU cores, at most `most`."""
    return max(1, min(most, data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check_size(size, patch, whose=""):
    """Raise UserError unless --size is a multiple of the patch. The message names whose patch it is: " of FILE"."""
    if size % patch:
        near = max(1, round(size / patch)) * patch
        raise UserError(f"--size {size} is no multiple of the patch {patch}{whose}: try --size {near}")


def find_weights(given):
    """The path of the tokenizer to use: the one given (a path, a name or a URL), else that in out/, else the shipped
    one. The authors' released file is converted once, and the path is that of the result."""
    if given:
        path = fetch(given)
        return convert_once(path) if is_released(path) else path
    for path in filter(os.path.isfile, (RUNS_FILE, SHIPPED)):
        return path
    raise MissingFile(f"no tokenizer at {RUNS_FILE} or {SHIPPED}: train one with `python train.py`, or give --weights")


def name_weights(given, found):
    """How to print the file that find_weights found. If a run's file was taken without --weights, the text also says
    how to get the shipped one."""
    by_default = not given and found == RUNS_FILE
    return found + f" (there is no --weights; the shipped tokenizer is --weights {SHIPPED})" * by_default


def commit():
    """The commit that this code is at, or "unknown" outside a git checkout."""
    command = ["git", "-C", TOP, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def rank_and_device():
    """(rank, number of ranks, device) of this process under torchrun; alone (0, 1, device)."""
    variables = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, ranks, local_rank = (int(os.environ.get(name, default)) for name, default in variables)
    if not torch.cuda.is_available():
        return rank, ranks, torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} has no GPU, there are {torch.cuda.device_count()}: lower --nproc_per_node")
    return rank, ranks, torch.device("cuda", local_rank)


def machines_trouble(e):
    """Whether the machine or its disk caused an exception. One from a DataLoader's worker has its errno in the text."""
    number = re.search(r"\[Errno (\d+)\][^\n]*$", str(e))
    return isinstance(e, OSError) and (int(number[1]) if number else e.errno) in MACHINES_TROUBLE


def user_message(error):
    """The line that a script prints about an error that the user or the machine caused; None for a bug."""
    if not isinstance(error, USER_ERRORS) and not machines_trouble(error):
        return None
    text = str(error)
    if "in DataLoader worker process" in text:  # then it holds the worker's traceback
        text = re.split(r"^[\w.]+: ", text, flags=re.M)[-1]
    return " ".join(text.splitlines()) or repr(error)


def print_user_message(error, name):
    """Print that line as the script `name`, under torchrun with the rank. Returns False for a bug, which has none."""
    said = user_message(error)
    if said:
        who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{who}{name}: {said}", file=sys.stderr)
    return bool(said)


def open_streams():
    """Make print work for a script. What cannot be encoded (a file's name may be any bytes) is printed with
    backslashes. If standard output was closed (>&-), the text goes to standard error. What PIL logs of a damaged file
    is left out: our own line says it."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout = sys.stdout or sys.stderr
    sys.stdout.reconfigure(errors="backslashreplace")  # stderr does so by itself


def run_command(main, name):
    """Call main() as the script `name`, and return its result. What the user or the machine did wrong ends the process
    with one line and status 2."""
    open_streams()
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if not print_user_message(e, name):
            raise
        sys.stdout = None  # at exit Python would write the rest, and if that fails, change the status
        sys.exit(2)


def make_folder(path):
    """Make a folder, unless it is there. UserError if it, or one above it, is a file."""
    try:
        os.makedirs(path or ".", exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} cannot be made a folder, because a file is in its place: give another one") from None


def check_output(path, *read):
    """Make the folder of an output file, or raise UserError if `path` is a folder, or one of the files that are read.
    path None: there is no output."""
    if path is None:
        return
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give the name of a file")
    if os.path.realpath(path) in map(os.path.realpath, read):
        raise UserError(f"{path} would be read and overwritten: give another name")
    make_folder(os.path.dirname(path))


def check_report(path, *read):
    """check_output for a report, which is JSON: it may not take the name of a weights file, such as a run's."""
    if (path or "").endswith(".safetensors"):
        raise UserError(f"--out {path} is the name of a weights file: the report is JSON, give it a name in .json")
    check_output(path, *read)


def write_file(path, content):
    """Write bytes to a file, whole or not at all; its folder is made. UserError if `path` is a folder."""
    check_output(path)
    encoder.write_atomically(path, lambda f: f.write(content))


def write_names(path, names):
    """Write names of files, one a line, as bytes: a file's name need not be text."""
    content = "".join(name + "\n" for name in names).encode(errors="surrogateescape")
    encoder.write_atomically(path, lambda f: f.write(content))


def read_names(path):
    """What write_names has written."""
    with open(path, "rb") as f:
        return f.read().decode(errors="surrogateescape").split("\n")[:-1]


def replace_between(path, begin, end, text):
    """Put `text` between two lines of a text file, such as comments of a README. UserError if it lacks one of them."""
    with open(path, encoding="utf-8") as f:
        before, found_begin, rest = f.read().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{path} lacks the line {begin.strip()} or, below it, the line {end.strip()}: put them back")
    write_file(path, (before + begin + text + end + after).encode())


def run_module(folder, *command, **variables):
    """Run a module of this project as a script, with its flags. What it prints goes to the end of FOLDER/output.txt.
    variables: of the environment, beside those of this process. RuntimeError if it fails."""
    with open(os.path.join(folder, "output.txt"), "a") as f:
        done = subprocess.run([sys.executable, "-m", *map(str, command)], stdout=f, stderr=f,
                              env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: see the end of {folder}/output.txt")


def ignore_signals(worker):
    """Let a worker that loads data ignore signals: a scheduler signals all processes, but the main one needs its
    workers to finish its step."""
    for received in SAVE_AND_STOP:
        signal.signal(received, signal.SIG_IGN)


def check_locks(workers):
    """Raise UserError if /dev/shm has no room for the locks of so many processes that load images; a lock is a file."""
    locks = 16 + 4 * workers if workers else 0  # torch needs 8, and 3 more for each worker
    try:
        [multiprocessing.Lock() for _ in range(locks)]
    except OSError as e:
        raise UserError(f"the processes that load images need locks ({e}): make room in /dev/shm (docker run "
                        "--shm-size 1g), or give --workers 0") from None
