"""Crash drivers: runs of train.py that are killed at random moments and begun again."""
import itertools
import multiprocessing.connection
import os
import tempfile
import time

# first: tests.helpers sets the environment that torch reads when it is imported
from tests.helpers import (
    HERE, MICRO_RUN, exit_status, free_port, log_lines, micro_teacher, picture_folder, same_weights, start_script)

import numpy as np


def crashing_runs(out, flags, ranks, kills, rng):
    """train.py, killed (SIGKILL, every rank) at random moments and begun again until there were `kills`; then it may
    finish."""
    log = os.path.join(out, "log.jsonl")
    lines = lambda: open(log).read().count("\n") if os.path.exists(log) else 0
    for k in itertools.count():
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        roles = ([{"RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(r)} for r in range(ranks)] if ranks > 1
                 else [{}])
        children = [start_script(["train.py", *flags, "--out", out], HERE, {**env, **role}, out + ".txt", out + ".txt")
                    for role in roles]
        if k < kills:
            target = lines() + rng.integers(16)
            while lines() < target and not multiprocessing.connection.wait([children[0].sentinel], timeout=0.002):
                pass
            time.sleep(rng.uniform(0, 0.2))  # while it starts, in a step, a save, an evaluation
            for child in children:
                child.kill()
        codes = [exit_status(child) for child in children]
        if not any(codes):
            return
        assert k < kills or -9 in codes, open(out + ".txt").read()[-3000:]


def crash_and_resume(kills, ranks, seed=0):
    """A run killed at random moments equals the uninterrupted one: log and weights, bit for bit."""
    steps = 20 + 8 * kills
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp, n=13)[1], *MICRO_RUN, "--steps",
                 str(steps), "--drop_path", "0.1", "--save_every", "7", "--eval_every", "10", "--keep_every", "11",
                 "--workers", "1"]
        whole, crashed = (os.path.join(tmp, n) for n in ("whole", "crashed"))
        for out, n in (whole, 0), (crashed, kills):
            crashing_runs(out, flags, ranks, n, np.random.default_rng(seed))
        a, b = log_lines(whole), log_lines(crashed)
        assert a == b, next((x, y) for x, y in zip(a, b) if x != y)
        assert [x["step"] for x in a if "loss" in x] == list(range(1, steps + 1)), "steps never appear twice"
        kept = [f"model_{n:07d}.safetensors" for n in range(11, steps + 1, 11)]
        assert sorted(n for n in os.listdir(whole) if n.startswith("model_")) == kept, (
            "at every 11th step, whatever --save_every")
        for name in sorted(os.listdir(whole)):
            assert not name.endswith(".safetensors") or same_weights(os.path.join(whole, name),
                                                                     os.path.join(crashed, name)), name
        resumed = open(crashed + ".txt").read().count("resumed from")
        print(f"{kills} kills, {ranks} ranks: resumed {resumed} times")
