"""Flags that make training cheaper: AdamW's betas, warm-up, decay, averaged weights."""
import contextlib
import io
import math
import os
import tempfile
import types

import torch
from safetensors.torch import load_file

from tests.helpers import log_lines, micro_teacher, picture_folder, raises, same_weights, train_quietly

import data
import train
from decoder import Decoder
from encoder import Encoder
from tools.validate import validate


def test_rate_factor_by_hand():
    """10 steps, warm-up over 4, decay over the last 5: step k of the warm-up (counted from 1) has k / 4, then 1, then a
    fall whose first step has all of it. Cosine: (1 - cos(pi f)) / 2 of the linear f = 1, 4/5, .. 1/5."""
    args = types.SimpleNamespace(steps=10, lr_decay=0.5, warmup=4, decay_shape="linear")
    factors = [train.rate_factor(step, args) for step in range(10)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    args.decay_shape = "cosine"
    factors = [train.rate_factor(step, args) for step in range(10)]
    by_hand = [0.25, 0.5, 0.75, 1, 1, 1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]
    assert max(abs(a - b) for a, b in zip(factors, by_hand)) < 1e-7
    args = types.SimpleNamespace(steps=10, lr_decay=0.0, warmup=0, decay_shape="cosine")
    assert [train.rate_factor(step, args) for step in range(10)] == [1] * 10, "without both the rate is constant"


def test_average_of_a_known_sequence():
    """Weights 1, 2, 3, .. after an initial 0. Decay 0.2: d is (step + 1) / (step + 10) = 1/10, 2/11, then 0.2.
    a = 0.9 * 1 = 0.9; a = 2/11 * 0.9 + 9/11 * 2 = 1.8; a = 0.2 * 1.8 + 0.8 * 3 = 2.76; 0.2 * 2.76 + 0.8 * 4 = 3.752."""
    averages = [torch.zeros(2), torch.zeros(1)]
    for step, by_hand in enumerate([0.9, 1.8, 2.76, 3.752]):
        train.average_weights(averages, [torch.full((2,), step + 1.0), torch.full((1,), 10 * (step + 1.0))], step, 0.2)
        assert abs(averages[0] - by_hand).max() < 1e-5 and abs(averages[1] - 10 * by_hand).max() < 1e-5


def test_betas_and_warmup_reach_the_optimizer():
    """After one step from zero moments AdamW holds (1 - beta1) g and (1 - beta2) g^2; its first update moves each
    weight by the rate times sign(g), and by the rate's first warm-up fraction of that with --warmup."""
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], "--steps", 1, "--clip", 0.01,
                 "--lr_decay", 0]
        moved = {}
        for warmup in 0, 8:
            out = os.path.join(tmp, str(warmup))
            train_quietly(*flags, "--out", out, "--beta1", 0.8, "--beta2", 0.99, "--warmup", warmup)
            state = torch.load(os.path.join(out, "state.pt"), weights_only=True)
            moments = list(state["optimizer"]["state"].values())
            assert abs(sum(m["exp_avg"].double().square().sum() for m in moments).sqrt() - 0.2 * 0.01) < 1e-7
            assert abs(sum(m["exp_avg_sq"].double().sum() for m in moments) - 0.01 * 0.01 ** 2) < 1e-10
            lr = log_lines(out)[0]["lr"]
            assert math.isclose(lr, 1e-3 / (warmup or 1)), "the first of 8 warm-up steps has an eighth of the rate"
            moved[warmup] = state["decoder"]["head.output.weight"].abs().max().item()  # it starts at zero
        assert math.isclose(moved[0], 1e-3, rel_tol=0.01) and math.isclose(moved[8], 1e-3 / 8, rel_tol=0.01)
        for name in "--beta1", "--beta2", "--ema":
            with contextlib.redirect_stderr(io.StringIO()) as said:
                raises(SystemExit, train.parse_args, [name, "1"])
            assert f"{name}: it is 1; it must be at least 0 and at most 0.999999" in said.getvalue()


def test_ema_is_exported_evaluated_and_resumed_exactly():
    """The oracle averages the weights that a plain run kept at every step. Two steps and two more equal four."""
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], "--lr", 1e-2, "--lr_decay", 0,
                 "--eval_every", 2]
        out = lambda name: os.path.join(tmp, name)
        plain, whole, parts = out("plain"), out("whole"), out("parts")
        train_quietly(*flags, "--out", plain, "--steps", 4, "--keep_every", 1)
        train_quietly(*flags, "--out", whole, "--steps", 4, "--ema", 0.25)
        train_quietly(*flags, "--out", parts, "--steps", 2, "--ema", 0.25)
        os.remove(os.path.join(parts, "model.safetensors"))  # to be written again from state.pt
        train_quietly(*flags, "--out", parts, "--steps", 4, "--ema", 0.25)
        assert log_lines(whole) == log_lines(parts)
        assert same_weights(*(os.path.join(x, "model.safetensors") for x in (whole, parts)))
        weights = [load_file(os.path.join(plain, f"model_{n:07d}.safetensors")) for n in (1, 2, 3, 4)]
        key = next(k for k in weights[0] if k.startswith("decoder.blocks") and weights[0][k].ndim == 2)
        state = torch.load(os.path.join(whole, "state.pt"), weights_only=True)
        part, name = key.split(".", 1)
        assert torch.equal(state[part][name], weights[3][key]), "the averages must not change the training"
        d1, d2, d3, d4 = 0.1, 2 / 11, 0.25, 0.25  # (step + 1) / (step + 10), at most 0.25
        # the weights at the start, from the first average, a1 = d1 start + (1 - d1) w1, which a run of one step exports
        train_quietly(*flags, "--out", out("one"), "--steps", 1, "--ema", 0.25)
        a = load_file(os.path.join(out("one"), "model.safetensors"))[key].double()
        start = (a - (1 - d1) * weights[0][key].double()) / d1
        assert (start - weights[0][key]).abs().max() < 1.02e-2, "AdamW's first step is at most the rate"
        for d, w in (d2, weights[1]), (d3, weights[2]), (d4, weights[3]):
            a = d * a + (1 - d) * w[key].double()
        exported = load_file(os.path.join(whole, "model.safetensors"))[key]
        assert (exported - a).abs().max() < 1e-6 and (exported - weights[3][key]).abs().max() > 1e-4
        assert torch.equal(exported, state["averaged"][part][name]), "the file holds the averages"
        seen = [[x["psnr"] for x in log_lines(folder) if x.get("kind") == "eval"] for folder in (plain, whole)]
        assert seen[0] != seen[1], "the evaluation uses the averages"
        # averages that begin at the second step begin at the weights of the first, and may be given up again
        late, exported = out("late"), os.path.join(out("late"), "model.safetensors")
        train_quietly(*flags, "--out", late, "--steps", 1)
        train_quietly(*flags, "--out", late, "--steps", 2, "--ema", 0.25, "--resume_anyway")
        a = d2 * weights[0][key].double() + (1 - d2) * weights[1][key].double()
        assert (load_file(exported)[key] - a).abs().max() < 1e-6
        train_quietly(*flags, "--out", late, "--steps", 3, "--resume_anyway")
        assert torch.equal(load_file(exported)[key], weights[2][key])
        for folder, (*_, last) in zip((plain, whole), seen):  # with --ema and without, what is exported is evaluated
            enc, dec = (part.from_pretrained(os.path.join(folder, "model.safetensors")) for part in (Encoder, Decoder))
            measured, *_ = validate(enc, dec, data.ImageDataset(flags[3], 16, train=False), 4, 0,
                                    contextlib.nullcontext())
            assert abs(last - measured) < 1e-4, folder
