"""downstream/linear_probe.py and lars.py: MAE's linear probe, its optimizer, its crops, and the command line"""
from tests.helpers import (  # first: it sets the environment that torch reads
    MICRO_VIT, close, log_lines, picture, raises, run_ranks, same_weights, tokenizer_file)

import contextlib
import io
import math
import os
import tempfile
import types
import unittest.mock
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from downstream import finetune, linear_probe
from downstream.lars import LARS, BatchNorm
from downstream.linear_probe import Probe, ProbeImages
from encoder import Encoder, UserError, ViT
from tools.optimizer import rate_factor
from tools.script import USER_ERRORS

SMALL = ["--size", "16", "--batch_size", "4", "--lr", "5", "--workers", "0", "--log_every", "1", "--eval_every", "0"]


def quietly(*flags):
    """What downstream.linear_probe returns, and what it prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        return linear_probe.main(list(map(str, flags))), out.getvalue()


def colours(folder, n=6):
    """A folder of n noisy pictures of each of three colours, a class each."""
    rng = np.random.default_rng(0)
    for name, colour in ("blue", (30, 60, 200)), ("green", (40, 180, 60)), ("red", (220, 40, 50)):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
        for i in range(n):
            x = np.array(colour) + rng.normal(0, 25, (20, 26, 3))
            Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(f"{folder}/{name}/{i}.png")
    return folder


def backbone(**changes):
    torch.manual_seed(0)
    return Encoder(ViT(replace(MICRO_VIT, **changes)), 8)


def test_lars_is_the_literal_step():
    rng, lr, decay = np.random.default_rng(0), 0.3, 0.1
    matrix, vector, still, dead = rng.normal(size=(4, 3)), rng.normal(size=3), np.zeros((2, 2)), rng.normal(size=(2, 2))
    weights = [nn.Parameter(torch.tensor(x)) for x in (matrix, vector, still, dead)]
    untouched = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([*weights, untouched], lr, weight_decay=decay)
    velocity = [0 * x for x in (matrix, vector, still, dead)]
    expected = [matrix, vector, still, dead]
    for _ in range(3):
        gradients = [rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=(2, 2)), None]
        gradients[3] = -decay * expected[3]  # with the decay it is exactly 0
        for k, (w, g) in enumerate(zip(list(expected), gradients)):
            weights[k].grad = torch.tensor(g)
            if g.ndim > 1:  # the decay, and the trust ratio, are of matrices alone
                g = g + decay * w
                sizes = np.sqrt((w ** 2).sum()), np.sqrt((g ** 2).sum())
                g = g * (0.001 * sizes[0] / sizes[1] if min(sizes) > 1e-12 else 1)
            velocity[k] = 0.9 * velocity[k] + g
            expected[k] = w - lr * velocity[k]
        optimizer.step()
    for w, x in zip(weights[:3], expected):
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=1e-10)
    np.testing.assert_allclose(weights[3].detach().numpy(), dead, rtol=1e-10)
    assert (untouched == 1).all(), "no gradient, no step"
    defaults = LARS(weights, 1.0).defaults
    assert (defaults["momentum"], defaults["trust"], defaults["weight_decay"]) == (0.9, 0.001, 0.0)


def test_batch_norm_is_torchs():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5, eps=1e-6, affine=False)
    assert not list(ours.parameters())
    for _ in range(3):
        x = torch.randn(7, 5) * torch.rand(5) + 100 * torch.rand(5)
        close(ours(x), theirs(x), 1e-4)
        close(ours.running_mean, theirs.running_mean), close(ours.running_var, theirs.running_var, 1e-4)
    ours.eval(), theirs.eval()
    close(ours(x), theirs(x), 1e-5)
    assert ours.train()(torch.ones(1, 5)).abs().max() == 0, "one row: no nan"


def test_recipes_are_maes_and_the_papers():
    """The rate of each step, as MAE's lr_sched gives it for fractional epochs; it begins one step later."""
    parse = lambda *flags: linear_probe.parse_args(["train", "--data", "x", "--val", "y", "--weights", "z", *flags])
    mae, paper = parse(), parse("--recipe", "paper")
    assert (mae.epochs, mae.batch_size) == (90, 16384) and math.isclose(mae.lr, 6.4)
    assert (paper.epochs, paper.batch_size) == (100, 128) and math.isclose(paper.lr, 0.05)
    for args in mae, paper:
        assert args.weight_decay == 0 and args.clip == 0 and args.frozen and args.decay_shape == "cosine"
    assert math.isclose(parse("--batch_size", "512").lr, 0.2) and parse("--lr", "0").lr == 0
    assert parse("--epochs", "3").epochs == 3 and parse("--steps", "5").epochs is None
    seen = []

    def look(args, model, data, evaluate, config, **rest):
        args.steps = args.steps or args.epochs * len(data) // args.batch_size
        seen.append((args, rest["optimizer"], len(data)))
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(finetune, "train", look):
        data = colours(f"{tmp}/data", 16)  # 48
        base = ["train", "--data", data, "--val", data, "--weights", tokenizer_file(tmp), "--batch_size", 8]
        for flags, total, warm in ([], 90, 10), (["--recipe", "paper"], 100, 10):
            quietly(*base, *flags)
            args, optimizer, n = seen.pop()
            assert args.steps == total * 6 and isinstance(optimizer, LARS)
            assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 2 * (32 * 3 + 3)
            assert math.isclose(optimizer.param_groups[0]["lr"], 0.1 * 8 / 256)
            for step in (0, 17, 59, 60, 61, 300, args.steps - 1):
                epoch = step / 6
                mae = epoch / warm if epoch < warm else 0.5 + 0.5 * math.cos(math.pi * (epoch - warm) / (total - warm))
                mae += 1 / (6 * warm) if epoch < warm else 0  # ours reaches the rate a step earlier
                assert math.isclose(rate_factor(step, args), mae, abs_tol=1e-9), step
        quietly(*base, "--warmup", 0, "--lr_decay", 0.5, "--weight_decay", 0.25)
        args, optimizer, _ = seen.pop()
        assert (args.warmup, args.lr_decay) == (0, 0.5) and optimizer.param_groups[0]["weight_decay"] == 0.25


def test_random_crops_are_maes():
    """Red tells the column and green the row, so that a crop tells which part it is."""
    W, H = 240, 200
    ramp = np.zeros((H, W, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(W), np.arange(H)[:, None]
    areas, shapes, mirrored, centres = [], [], 0, []
    for seed in range(400):
        x = np.array(linear_probe.resized_crop(Image.fromarray(ramp), 64, np.random.default_rng(seed))).astype(float)
        assert x.shape == (64, 64, 3)
        mirrored += int(x[0, 0, 0] > x[0, -1, 0])
        w, h = (abs(x[32, 48, 0] - x[32, 16, 0]) * 2, abs(x[48, 32, 1] - x[16, 32, 1]) * 2)
        areas.append(w * h / (W * H)), shapes.append(w / h), centres.append(x[32, 32, :2])
    areas, shapes = np.array(areas), np.array(shapes)
    assert 160 < mirrored < 240
    assert 0.06 < areas.min() < 0.12 and 0.9 < areas.max() < 1.03 and 0.45 < areas.mean() < 0.57  # uniform: 0.54
    assert 0.70 < shapes.min() < 0.8 and 1.25 < shapes.max() < 1.45 and abs(np.log(shapes).mean()) < 0.08
    assert np.std(centres, 0).min() > 12, "all over the picture"
    rng = types.SimpleNamespace(uniform=lambda low, high: high, integers=lambda n: 0, random=lambda: 0.7)
    x = linear_probe.resized_crop(Image.fromarray(ramp), 64, rng)  # all of the area at 4:3 is wider than the picture
    height = round((W * H * 3 / 4) ** 0.5)
    expected = Image.fromarray(ramp[:height]).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(np.array(x), np.array(expected))
    tiny = linear_probe.resized_crop(Image.fromarray(ramp[:1, :1]), 8, np.random.default_rng(0))
    assert tiny.size == (8, 8)


def test_the_centre_is_224_of_256():
    img = picture(0, 300, 400)
    resized = img.resize((256, 341), Image.Resampling.BICUBIC)
    assert np.array_equal(linear_probe.centre(img, 224), resized.crop((16, 58, 240, 282)))
    assert linear_probe.centre(img, 64).size == (64, 64)
    resized = img.resize((73, 97), Image.Resampling.BICUBIC)
    assert np.array_equal(linear_probe.centre(img, 64), resized.crop((4, 16, 68, 80)))
    assert linear_probe.centre(Image.new("RGB", (5000, 2)), 16).size == (16, 16)


def test_features_are_the_mean_token_and_cls():
    for prefix, names in (0, ["pooled"]), (1, ["pooled", "cls"]), (5, ["pooled", "cls"]):
        model = Probe(backbone(num_prefix=prefix), 3)
        assert list(model.heads) == names
        assert all(not p.requires_grad for p in model.backbone.parameters())
        img, vit = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), model.backbone.vit
        tokens = F.layer_norm(vit(img / 255)[-1], (32,), vit.norm.weight, vit.norm.bias, 1e-6)
        features = {"pooled": tokens[:, prefix:].mean(1), "cls": tokens[:, 0]}
        losses, labels = model(img, torch.tensor([0, 1, 2, 0, 1, 2])), torch.tensor([0, 1, 2, 0, 1, 2])
        for name in names:
            x, linear = features[name], model.heads[name][1]
            assert linear.bias.abs().max() == 0 and 0.008 < linear.weight.std() < 0.012
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
            logits = x @ linear.weight.T + linear.bias
            close(losses[name], -logits.log_softmax(1)[range(6), labels].mean(), 1e-5)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.heads.parameters())
    assert model.train().backbone.vit(img / 255)[0].requires_grad is False


def trained(tmp, out, *flags):
    """Path of a run of 4 steps, as far as its flags leave it so."""
    data = colours(f"{tmp}/data")
    quietly("train", "--data", data, "--val", data, "--weights", tokenizer_file(tmp), *SMALL, "--steps", 4, "--out",
            f"{tmp}/{out}", *flags)
    return f"{tmp}/{out}"


def test_a_probe_learns_and_its_encoder_stays():
    with tempfile.TemporaryDirectory() as tmp:
        out = trained(tmp, "run", "--batch_size", 18, "--steps", 60, "--lr", 30)
        last = log_lines(out)[-1]
        assert last["pooled"] > 90 and last["cls"] > 50 and last["pooled_top5"] == 100, last
        found, tokenizer = load_file(f"{out}/model.safetensors"), load_file(tokenizer_file(tmp))
        assert all(torch.equal(found[f"backbone.{k[8:]}"], x) for k, x in tokenizer.items() if k[:12] == "encoder.vit.")
        few = colours(f"{tmp}/few", 3)  # of two classes, which have other numbers here than in training
        for i in range(3):
            os.remove(f"{few}/blue/{i}.png")
        report, said = quietly("test", "--run", out, "--data", few, "--workers", 0, "--batch_size", 4)
        model, config = finetune.load_model(out, linear_probe.build, "cpu")
        data, hits = ProbeImages(f"{tmp}/data", 16, False), {"pooled": [], "cls": []}
        for i in (*range(6, 9), *range(12, 15)):  # green and red 0 to 2: the same pictures
            img, label = data[i]
            for name, x in model.logits(img[None] / 255).items():
                hits[name].append(float(x.argmax() == label))
        assert report["images"] == 6 and config["classes"] == ["blue", "green", "red"]
        for name in hits:
            assert abs(report[name] - 100 * np.mean(hits[name])) < 1e-6 and f"{name:8s}  {report[name]:6.2f}" in said
        _, said = quietly("predict", f"{tmp}/data/red/0.png", "--run", out)
        line, = (x for x in said.splitlines() if "pooled" in x)
        x = model.logits(data[12][0][None] / 255)["pooled"][0].softmax(0)
        assert f"pooled:  {config['classes'][x.argmax()]} {100 * x.max():.0f}%" in line and "cls:" in said


def test_a_probe_resumes_exactly_and_two_ranks_are_one():
    with tempfile.TemporaryDirectory() as tmp:
        whole, plain, calls = trained(tmp, "whole", "--save_every", 2), finetune.step, []

        def step(s, batches):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return plain(s, batches)
        with unittest.mock.patch.object(finetune, "step", step), contextlib.suppress(KeyboardInterrupt):
            trained(tmp, "killed", "--save_every", 2)
        killed = trained(tmp, "killed", "--save_every", 2)
        assert log_lines(killed) == log_lines(whole) and len(log_lines(whole)) == 5
        assert same_weights(f"{whole}/model.safetensors", f"{killed}/model.safetensors")
        data = f"{tmp}/data"
        done = run_ranks(2, "python", "-m", "downstream.linear_probe", "train", "--data", data, "--val", data,
                         "--weights", tokenizer_file(tmp), *SMALL, "--steps", "4", "--out", f"{tmp}/two")
        assert all(x.returncode == 0 for x in done), done
        for one, both in zip(log_lines(whole), log_lines(f"{tmp}/two")):  # the batch norm's statistics, too, are of all
            for k in one:
                assert one[k] == both[k] or abs(one[k] - both[k]) < 1e-4 * abs(one[k]), (k, one, both)
        a, b = (load_file(f"{folder}/model.safetensors") for folder in (whole, f"{tmp}/two"))
        for k in a:
            close(b[k], a[k], 1e-4)


def test_the_probe_says_what_is_wrong():
    with tempfile.TemporaryDirectory() as tmp:
        data, weights = colours(f"{tmp}/data", 2), tokenizer_file(tmp)
        train = ["train", "--data", data, "--weights", weights, *SMALL, "--steps", 1, "--out", f"{tmp}/run"]
        other = colours(f"{tmp}/other", 1)
        os.rename(f"{other}/red", f"{other}/pink")
        raises(UserError, quietly, *train, "--val", other, words="1 classes that training does not know: pink")
        raises(UserError, quietly, *train, "--val", data, "--size", 18, words="no multiple of the patch 4: try 16")
        open(f"{data}/red/0.png", "w").write("no picture")
        raises(USER_ERRORS, quietly, *train, "--val", data, "--batch_size", 6, words="red/0.png: cannot be read")
        raises(UserError, quietly, "test", "--run", weights, "--data", data, words="no run of a downstream task")
        _, said = quietly("bench", "--teacher", "tiny", "--size", 16, "--batch_size", 2)
        assert "linear probe of tiny, 16x16 px, batch 2" in said and "hours for 90 epochs of ImageNet" in said
