"""downstream/linear_probe.py and lars.py: MAE's linear probe, its optimizer, its crops, and the command line"""
from tests.helpers import (  # first: it sets the environment that torch reads
    MICRO_VIT, bounds, close, demands, gpu_takes_bf16, killed_in_step, log_lines, picture, raises, refused, run_ranks,
    same_weights, tokenizer_file)

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
from encoder import TEACHERS, Encoder, UserError, ViT, read_config, write_model
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
    far = 1e4 + 0.1 * torch.randn(50, 5)  # in fp32 the squares would hide the variance
    rows = far.double()
    close(ours(far), ((rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-6).sqrt()).float(), 1e-5)
    theirs.running_mean.copy_(ours.running_mean), theirs.running_var.copy_(ours.running_var)
    ours.eval(), theirs.eval()
    close(ours(x), theirs(x), 1e-5)
    ours.running_var.fill_(1e-6), theirs.running_var.fill_(1e-6)
    close(ours(x), theirs(x), 1e-4)
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
    for seed in range(9):
        tiny = linear_probe.resized_crop(Image.new("RGB", (1, 1), "white"), 8, np.random.default_rng(seed))
        assert np.array(tiny).shape == (8, 8, 3) and np.array(tiny).min() == 255


def test_the_centre_is_224_of_256():
    img = picture(0, 300, 400)
    resized = img.resize((256, 341), Image.Resampling.BICUBIC)
    assert np.array_equal(linear_probe.centre(img, 224), resized.crop((16, 58, 240, 282)))
    assert linear_probe.centre(img, 64).size == (64, 64)
    resized = img.resize((73, 97), Image.Resampling.BICUBIC)
    assert np.array_equal(linear_probe.centre(img, 64), resized.crop((4, 16, 68, 80)))
    resized = img.resize((23, 31), Image.Resampling.BICUBIC)  # 20 of 22.9, rounded
    assert np.array_equal(linear_probe.centre(img, 20), resized.crop((1, 5, 21, 25)))
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
        with torch.autocast("cpu", torch.bfloat16):  # of the encoder alone
            rounded = vit.norm(vit(img / 255)[-1]).float()
            found = model.eval().logits(img / 255)["pooled"]
        norm, linear = model.heads["pooled"]
        close(found, norm(rounded[:, prefix:].mean(1)) @ linear.weight.T + linear.bias, 1e-6)
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
        whole = trained(tmp, "whole", "--save_every", 2)
        with killed_in_step(finetune, 4):
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


def test_a_probe_is_extended():
    """By more epochs: the warm-up (1/9 of them) and the decay follow from the length. What was given may not change."""
    with tempfile.TemporaryDirectory() as tmp:
        data = colours(f"{tmp}/data")  # 18 pictures, 4 batches of 4
        train = ["train", "--data", data, "--val", data, "--weights", tokenizer_file(tmp), *SMALL, "--out"]
        for out, more in (f"{tmp}/a", []), (f"{tmp}/b", ["--warmup", 1, "--lr_decay", 0.5]):
            for epochs, steps in (1, 4), (4, 18):
                quietly(*train, out, "--epochs", epochs, *more)
                state = torch.load(f"{out}/state.pt")
                assert state["step"] == steps
            assert state["args"]["warmup"] == (1 if more else 2)
            assert state["args"]["lr_decay"] == (0.5 if more else 1 - 2 / 18)
        raises(UserError, quietly, *train, f"{tmp}/b", "--epochs", 5, "--warmup", 2, "--lr_decay", 0.7,
               words="(warmup was 1, is now 2; lr_decay was 0.5, is now 0.7)")
        raises(UserError, quietly, *train, f"{tmp}/a", "--epochs", 5, "--lr_decay", 0.7, words="is now 0.7)")


def test_the_probe_says_what_is_wrong():
    with tempfile.TemporaryDirectory() as tmp:
        data, weights = colours(f"{tmp}/data", 2), tokenizer_file(tmp)
        train = ["train", "--data", data, "--weights", weights, *SMALL, "--steps", 1, "--out", f"{tmp}/run"]
        other = colours(f"{tmp}/other", 1)
        os.rename(f"{other}/red", f"{other}/pink")
        raises(UserError, quietly, *train, "--val", other, words="1 classes that training does not know: pink")
        raises(UserError, quietly, *train, "--val", data, "--size", 18, words="of the patch 4: try --size 16")
        raises(UserError, quietly, *train, "--val", data, "--size", 19, words="of the patch 4: try --size 20")
        raises(UserError, quietly, *train, "--val", data, "--size", 1, words="of the patch 4: try --size 4")
        open(f"{data}/red/0.png", "w").write("no picture")
        raises(USER_ERRORS, quietly, *train, "--val", data, "--batch_size", 6, words="red/0.png: cannot be read")
        raises(UserError, quietly, "test", "--run", weights, "--data", data, words="no run of a downstream task")
        raises(UserError, quietly, "bench", "--teacher", "tiny", "--size", 18, words="8 of tiny: try --size 16")
        _, said = quietly("bench", "--teacher", "tiny", "--size", 16, "--batch_size", 2)
        assert "linear probe of tiny, 16x16 px, batch 2" in said and "hours for 90 epochs of ImageNet" in said


def test_a_training_crop_of_the_probe_is_the_literal_one():
    """Order and draws of (seed, n): area, shape, place and mirror of MAE's crop, on tall and wide pictures."""
    with tempfile.TemporaryDirectory() as tmp:
        sizes = [(40, 30), (20, 50), (9, 9)]
        for i, size in enumerate(sizes):
            os.makedirs(f"{tmp}/{'abc'[i]}")
            picture(i, *size).save(f"{tmp}/{'abc'[i]}/x.png")
        data = ProbeImages(tmp, 12, True, 7)
        for n in range(24):
            i = np.random.default_rng([7, n // 3]).permutation(3)[n % 3]
            (W, H), rng = sizes[i], np.random.default_rng([7, n, 1])
            area, shape = W * H * rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(0.75), math.log(4 / 3)))
            w, h = min(W, round(math.sqrt(area * shape))), min(H, round(math.sqrt(area / shape)))
            x, y = rng.integers(W - w + 1), rng.integers(H - h + 1)
            img = np.array(picture(i, W, H))[y:y + h, x:x + w]
            img = np.array(Image.fromarray(img).resize((12, 12), Image.Resampling.BICUBIC))
            img = img[:, ::-1] if rng.random() < 0.5 else img
            found, label = data[n]
            assert np.array_equal(found.permute(1, 2, 0).numpy(), img) and label == i and label.dtype == torch.int64, n
    strip = np.zeros((2, 400, 3), np.uint8)  # 32 of its 400 columns are left, those about the middle
    strip[:, :, 0] = np.arange(400) // 2
    found = np.array(linear_probe.centre(Image.fromarray(strip), 28))[:, :, 0].astype(int)
    assert 98 <= found.min() and found.max() <= 101, (found.min(), found.max())


class Columns:
    """In a Probe's place: the scores of 7 classes are the reds of an image's first 7 columns; by "cls" of the last."""
    heads, seen = ["pooled", "cls"], None

    def logits(self, img):
        self.seen = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), tuple(img.shape), img.max().item()
        return {"pooled": 8 * img[:, 0, 0, :7], "cls": 8 * img[:, 0, 0, 7:14]}


def test_accuracies_and_predictions_do_what_they_are_told():
    """Hits in the first and in the first five of seven classes by hand; what the flags become; every word."""
    rng, model = np.random.default_rng(0), Columns()
    config = {"size": 14, "step": 3, "classes": list("abcdefg")}
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(
            finetune, "load_model", lambda run, build, device: (model, config)), unittest.mock.patch.object(
            linear_probe, "centre", lambda img, size: img.crop((0, 0, size, size))):
        hits = {"pooled": [], "pooled_top5": [], "cls": [], "cls_top5": []}
        for i in range(20):
            label = "bcdeg"[i % 5]
            row = np.concatenate([rng.permutation(7), rng.permutation(7)]) * 30 + 20
            os.makedirs(f"{tmp}/set/{label}", exist_ok=True)
            Image.fromarray(np.tile(row[:, None], (14, 1, 3)).astype(np.uint8)).save(f"{tmp}/set/{label}/{i:02d}.png")
            for name, scores in ("pooled", row[:7]), ("cls", row[7:]):
                place = (scores > scores["abcdefg".index(label)]).sum()  # 0: it is the likeliest
                hits[name].append(place < 1), hits[name + "_top5"].append(place < 5)
        expected = {k: 100 * np.mean(x) for k, x in hits.items()}
        assert len({*expected.values()}) == 4, expected
        test = ["test", "--run", "RUN", "--data", f"{tmp}/set", "--workers", 0, "--batch_size", 6]
        report, said = quietly(*test, "--bf16", "--out", f"{tmp}/r.json")
        assert {k: report[k] for k in expected} == expected and model.seen[:3] == (True, False, (2, 3, 14, 14))
        assert abs(model.seen[3] - 200 / 255) < 1e-6
        assert [report[k] for k in ("run", "step", "data", "images")] == ["RUN", 3, [f"{tmp}/set"], 20]
        assert report["protocol"] == "the central 14 of 16 pixels, bf16 autocast"
        assert [line.split() for line in said.splitlines()[-3:]] == [["features", "top-1", "top-5"]] + [
            [name, f"{expected[name]:.2f}", f"{expected[name + '_top5']:.2f}"] for name in ("pooled", "cls")]
        report, _ = quietly(*test, "--fp32")
        assert report["protocol"] == "the central 14 of 16 pixels, fp32 without TF32" and model.seen[0] is False
        with unittest.mock.patch.dict(config, size=20), unittest.mock.patch.object(
                linear_probe, "accuracy", lambda *given: expected):
            assert quietly(*test)[0]["protocol"].startswith("the central 20 of 23 pixels, ")
        # two ranks: the shares of both are added, by the number of all images
        job = types.SimpleNamespace(images=lambda note, data: [(None, torch.rand(2, 3, 14, 14), torch.tensor([0, 1]))],
                                    autocast=contextlib.nullcontext(), gather=lambda x: [x, {"pooled": 3}, {}])
        model.logits = lambda img: {"pooled": torch.tensor([[1.0, 0], [1, 0]])}
        assert linear_probe.accuracy(job, model, range(8)) == {"pooled": 100 * 4 / 8, "pooled_top5": 100 * 2 / 8}
        model, row = Columns(), np.array([0, 51, 102, 153, 204, 255, 25] + [255] + [0] * 6, np.uint8)
        Image.fromarray(np.tile(row[:, None], (14, 1, 3))).save(f"{tmp}/x.png")
        _, said = quietly("predict", "--run", "RUN", f"{tmp}/x.png", f"{tmp}/set/b", "--fp32")
        scores = np.exp(8.0 * row[:7] / 255)
        chances = dict(zip("abcdefg", 100 * scores / scores.sum()))
        assert said.splitlines()[0] == f"{tmp}/x.png  pooled:  " + "  ".join(f"{k} {chances[k]:.0f}%" for k in "fedcb")
        assert said.splitlines()[1].startswith(f"{tmp}/x.png  cls:  a 100%  ") and len(said.splitlines()) == 2 + 2 * 4
        assert model.seen == (False, False, (1, 3, 14, 14), model.seen[3]) and model.seen[3] <= 1
        open(f"{tmp}/damaged.png", "w").write("no picture")
        raises(USER_ERRORS, quietly, "predict", "--run", "RUN", f"{tmp}/damaged.png",
               words=f"{tmp}/damaged.png cannot be read as an image")
        quietly("predict", "--run", "RUN", f"{tmp}/x.png", "--bf16")
        assert model.seen[0] is True and model.seen[3] == 1
    small = Probe(backbone(), 3).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), unittest.mock.patch.object(
            small.heads["cls"], "forward", lambda x: x):
        assert small.logits(torch.rand(2, 3, 16, 16))["cls"].dtype == torch.float32, "statistics are of fp32 features"
        loss = small(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1]))
        assert {x.dtype for x in loss.values()} == {torch.float32}


def test_training_and_bench_of_the_probe_hand_on_what_they_are_told():
    seen, jobs = [], []
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(
            finetune, "train", lambda *args, **rest: seen.append((args, rest))):
        data, val = colours(f"{tmp}/data", 5), colours(f"{tmp}/val", 2)
        for k in range(2):
            os.remove(f"{val}/blue/{k}.png")
        base = ["train", "--data", data, "--val", val, "--weights", tokenizer_file(tmp), "--batch_size", 4, "--workers",
                0]
        quietly(*base, "--seed", 3, "--micro_batch", 2, "--lr", 0)
        (args, model, images, evaluate, config), rest = seen.pop()
        assert config == {"size": 16, "classes": ["blue", "green", "red"]} and args.size == 16, "the native size"
        assert (images.roots, images.size, images.train, images.seed) == ([data], 16, True, 3)
        assert rest["optimizer"].param_groups[0]["lr"] == 0 and model.heads["cls"][1].out_features == 3
        watch = lambda job, who, images: jobs.append((job, who, images)) or {"pooled": 1.0}
        with unittest.mock.patch.object(linear_probe, "accuracy", watch):
            assert evaluate() == {"pooled": 1.0}
        (job, who, images), = jobs
        assert (job.args.batch_size, job.args.workers, job.precision) == (2, 0, "fp32 without TF32") and who is model
        assert (images.roots, images.size, images.train) == ([val], 16, False)
        assert images.labels.tolist() == [1, 1, 2, 2], "green and red, by the numbers of training"
        quietly(*base, "--size", 24, "--epochs", 9)  # 15 pictures: 33 steps
        (args, _, images, *_), _ = seen.pop()
        assert images.size == 24 and args.warmup == 4 and args.lr_decay == 1 - 4 / 33  # 33 * 10 / 90 = 3.7
        assert args.eval_every == args.save_every == 3, "an epoch"
        quietly(*base, "--batch_size", 64, "--epochs", 1)  # less than one batch: one step, not none
        (args, *_), _ = seen.pop()
        assert args.warmup == 0 and args.lr_decay == 1 and args.eval_every == args.save_every == 1
        file = tokenizer_file(tmp)  # of a model that was trained at another size than its ViT's
        write_model(file, {**read_config(file), "size": 24}, load_file(file))
        quietly(*base)
        (args, _, images, _, config), _ = seen.pop()
        assert args.size == images.size == config["size"] == 24
        linear_probe.main(list(map(str, [*base, "--epochs", 9, "--warmup", 0, "--lr_decay", 0, "--eval_every", 0,
                                         "--save_every", 7])), "HANDLER")
        assert rest["on_signal"] is None
        (args, *_), rest = seen.pop()  # 0 is a choice, too
        assert rest["on_signal"] == "HANDLER"
        assert args.warmup == 0 and args.lr_decay == 0 and (args.eval_every, args.save_every) == (0, 7)
        for folders, warns in ((tmp, val), True), ((val, data, val), True), ((data, val), False):
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                linear_probe.main(list(map(str, ["train", "--data", *folders[:-1], "--val", folders[-1], *base[5:]])))
            assert said.getvalue() == warns * ("warning: --val lies in --data, so the accuracy is of images that were "
                                               "trained on\n"), folders
        seen.clear()
        for n in range(7):
            os.makedirs(f"{val}/new{n}")
            picture(n).save(f"{val}/new{n}/x.png")
        refused(UserError, quietly, *base, says=f"{val} has 7 classes that training does not know: new0 new1 new2 new3 "
                "new4")
    with unittest.mock.patch.object(linear_probe, "measure_speed", lambda *given: seen.append(given)), \
            unittest.mock.patch.dict(TEACHERS, micro=MICRO_VIT):
        quietly("bench", "--teacher", "micro", "--batch_size", 30), quietly("bench", "--teacher", "micro", "--size", 24)
        with unittest.mock.patch.object(linear_probe, "rank_and_device", lambda: (0, 1, torch.device("meta"))):
            quietly("bench", "--teacher", "micro")
    _, model, batch, *_ = seen.pop()
    assert {x.device.type for x in (*model.parameters(), *batch)} == {"meta"}, "made where they are needed"
    for (name, model, (img, labels), predict, schedules), B, size in zip(seen, (30, 128), (16, 24)):
        assert name == "linear probe of micro" and model.backbone.vit.config == MICRO_VIT
        assert img.shape == (B, 3, size, size) and img.dtype == torch.uint8 and img.max() > 250
        assert labels.shape == (B,) and labels.max() > 255 and model.heads["pooled"][1].out_features == 1000
        assert schedules == {"90 epochs of ImageNet": 115_305_030, "100 epochs, the paper's": 128_116_700}
        model.logits = lambda x: (x.min().item(), x.max().item())
        low, high = predict()
        assert low >= 0 and 0.9 < high <= 1, "pictures in [0, 1]"


def test_flags_of_the_probe_by_hand():
    """Defaults and bounds; on a GPU bf16 is the default."""
    base = {"train": ["--data", "x", "--val", "y", "--weights", "w"], "test": ["--run", "r", "--data", "x"],
            "predict": ["--run", "r", "x.png"], "bench": []}
    parse = lambda command, *flags: vars(linear_probe.parse_args([command, *base[command], *map(str, flags)]))
    for command, expected in {
            "train": dict(recipe="mae", size=None, micro_batch=128, warmup=None, lr_decay=None, out="probe", steps=None,
                          drop_path=0, layer_decay=1),
            "test": dict(bf16=False, out=None, workers=6, batch_size=128),
            "predict": dict(bf16=False, files=["x.png"]),
            "bench": dict(teacher="internvit", size=None, batch_size=128)}.items():
        with unittest.mock.patch.object(linear_probe, "cores", lambda: 7):
            found = parse(command)
        assert {k: found[k] for k in expected} == expected, (command, found)
    demands(linear_probe.parse_args, base, "--data", "--val", "--run")
    for cores, workers in (1, 1), (2, 1), (9, 8), (64, 8):
        with unittest.mock.patch.object(linear_probe, "cores", lambda: cores):
            assert parse("test")["workers"] == workers
    gpu_takes_bf16(parse, "--fp32")
    bounds(parse, ("train", "size", 1, 0), ("test", "workers", 0, -1), ("test", "batch_size", 1, 0),
           ("bench", "size", 1, 0), ("bench", "batch_size", 1, 0), ("train", "recipe", "paper", "x"),
           ("bench", "teacher", "tiny", "none"), ("train", "drop_path", 0, 0.1), ("train", "layer_decay", 1, 0.5))
