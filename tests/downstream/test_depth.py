"""downstream/depth.py, dpt.py and depth_sets.py: DPT, its losses, NYUv2's protocol, and the command line"""
from tests.helpers import (  # first: it sets the environment that torch reads
    MICRO_VIT, bounds, close, demands, gpu_takes_bf16, killed_in_step, log_lines, raises, refused, run_ranks,
    same_weights, tokenizer_file)

import contextlib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import types
import unittest.mock
from dataclasses import replace

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from downstream import depth, depth_sets, dpt, finetune
from downstream.depth_sets import DepthPairs, Mixed
from downstream.dpt import DepthModel
from encoder import TEACHERS, Encoder, UserError, ViT, parameter_groups
from tools.script import USER_ERRORS

SMALL = ["--size", "16", "--head_width", "8", "--batch_size", "4", "--lr", "1e-2", "--workers", "0", "--log_every", "1",
         "--eval_every", "0"]
JOB = types.SimpleNamespace(rank=0, ranks=1, args=types.SimpleNamespace(workers=0), autocast=contextlib.nullcontext(),
                            gather=lambda x: [x])


def quietly(*flags):
    """What downstream.depth returns, and what it prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        return depth.main(list(map(str, flags))), out.getvalue()


def backbone(**changes):
    torch.manual_seed(0)
    return Encoder(ViT(replace(MICRO_VIT, **changes)), 8)


def save(path, x):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(x).save(path)


def scene(seed, H=24, W=32):
    """(uint8 (H, W, 3), millimetres (H, W)): a smooth depth, red where it is near, with a hole that is not measured."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.uniform(1000, 5000, (2, 3)).astype(np.float32))
    z = np.array(coarse.resize((W, H), Image.Resampling.BILINEAR))
    img = np.stack([255 - z / 20, z / 20, np.full_like(z, rng.integers(256))], -1)
    z[2:6, 3:9] = 0
    return img.clip(0, 255).astype(np.uint8), z.round().astype(np.uint16)


def scenes(folder, n=4, splits=("train", "val")):
    for split in splits:
        for i in range(n):
            img, z = scene(i)
            save(f"{folder}/{split}/images/{i}.png", img)
            save(f"{folder}/{split}/depth/{i}.png", z)
    return folder


def maps(seed=0, B=3, H=20, W=17):
    """A prediction and a truth (B, H, W) whose first rows are not measured, more of them in each picture."""
    torch.manual_seed(seed)
    x, truth = torch.rand(B, H, W) + 0.1, 1 + 4 * torch.rand(B, H, W)
    for b in range(B):
        truth[b, :b + 1] = 0
    return x, truth


def test_silog_by_hand():
    truth = torch.tensor([[[2.0, 2.0, 0.0]], [[1.0, 4.0, 3.0]]])
    x = torch.tensor([[[2 * math.e, 2 / math.e ** 2, 99.0]], [[1.0, 4.0, 3.0]]])
    # first picture: d = 1, -2, nothing; mean d^2 = 5/2, mean d = -1/2. The second one has d = 0
    first = math.sqrt(5 / 2 - 0.5 / 4)
    assert abs(dpt.silog(x, truth).item() - first / 2) < 1e-5
    assert abs(dpt.silog(x[:1], truth[:1]).item() - first) < 1e-6
    assert abs(dpt.silog(3 * truth, truth).item() - math.log(3) * math.sqrt(0.5)) < 1e-5  # one d everywhere
    assert dpt.silog(3 * truth, truth, weight=1.0).item() < 1e-3  # the whole scale is free
    assert dpt.silog(0 * x, truth).isfinite()
    x = x.requires_grad_()
    dpt.silog(x, torch.zeros_like(truth)).backward()
    assert (x.grad == 0).all(), "nothing measured: no gradient, and no nan"
    dpt.silog(x, truth).backward()
    assert x.grad.isfinite().all() and x.grad[0, 0, 2] == 0 and x.grad[0, 0, 0] > 0 > x.grad[0, 0, 1]


def test_alignment_is_least_squares():
    x, truth = maps()
    valid = truth > 0
    s, t = dpt.align(x.double(), truth.double(), valid)
    for b in range(3):
        a = np.stack([x[b][valid[b]], np.ones(valid[b].sum())], 1)
        expected = np.linalg.lstsq(a, truth[b][valid[b]].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose([s[b].item(), t[b].item()], expected, rtol=1e-4)
    s, t = dpt.align((truth.double() - 3) / 7, truth.double(), valid)
    close(s, torch.full_like(s, 7), 1e-6), close(t, torch.full_like(t, 3), 1e-6)
    close(dpt.align(1e-4 * truth.double(), truth.double(), valid)[0], torch.full_like(s, 1e4), 1e-3)
    s, t = dpt.align(torch.ones_like(x), truth, valid)
    assert (s == 0).all()
    close(t.flatten(), torch.stack([truth[b][valid[b]].mean() for b in range(3)]), 1e-5)


def literal_relative(x, truth):
    """The two relative losses of one picture (H, W), written out with numpy."""
    valid, y = truth > 0, 1 / np.where(truth > 0, truth, 1)

    def standard(z):
        median = np.sort(z[valid])[(valid.sum() - 1) // 2]
        return (z - median) / np.abs(z[valid] - median).mean()
    r, M = standard(x) - standard(y), valid.sum()
    trimmed = np.sort(np.abs(r[valid]))[:int(0.8 * M)].sum() / (2 * M)
    gradient = 0
    for k in range(4):
        q, v = r[::2 ** k, ::2 ** k], valid[::2 ** k, ::2 ** k]
        total = 0
        for i in range(q.shape[0]):
            for j in range(q.shape[1]):
                for a, b in ((i + 1, j), (i, j + 1)):
                    if a < q.shape[0] and b < q.shape[1] and v[i, j] and v[a, b]:
                        total += abs(q[a, b] - q[i, j])
        gradient += total / v.sum()
    return trimmed, 0.5 * gradient


def test_relative_losses_by_numpy_and_their_invariances():
    x, truth = (z.double() for z in maps())
    found = dpt.relative_losses(x, truth)
    expected = np.mean([literal_relative(a.numpy(), b.numpy()) for a, b in zip(x, truth)], 0)
    np.testing.assert_allclose([found["trimmed"].item(), found["gradient"].item()], expected, rtol=1e-6)
    for other, y in (3 * x + 5, truth), (x, 1 / torch.where(truth > 0, 7 / truth.clamp_min(0.1) + 2, torch.inf)):
        again = dpt.relative_losses(other, y)  # the scale and shift of x, and those of 1 / truth
        np.testing.assert_allclose([again[k].item() for k in found], [found[k].item() for k in found], rtol=1e-6)
    exact = dpt.relative_losses(2 / truth.clamp_min(0.1) - 1, truth)
    assert all(v < 1e-9 for v in exact.values()) and all(v > 0.05 for v in dpt.relative_losses(-x, truth).values())
    wrong = torch.where(truth > 0, x, 1e3)
    again = dpt.relative_losses(wrong, truth)  # what is predicted where nothing is measured does not count
    assert all(torch.equal(again[k], found[k]) for k in found)
    assert [v.item() for v in dpt.relative_losses(x, 0 * truth).values()] == [0, 0], "nothing is measured"
    x = x.requires_grad_()
    sum(dpt.relative_losses(x, truth * torch.tensor([1, 0, 1])[:, None, None]).values()).backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all() and (x.grad[0] != 0).any()
    flat = torch.ones(1, 8, 8, requires_grad=True)
    sum(dpt.relative_losses(flat, truth[:1, 8:16, :8].float()).values()).backward()
    assert flat.grad.isfinite().all()


def test_gradients_are_within_a_picture():
    """A ramp a * row + b * column, whose differences at a scale of step s are s a and s b; and a batch of two is the
    mean of both, however much they differ from one another."""
    H, W, a, b = 16, 24, 0.5, -0.25
    ramp = a * torch.arange(H)[:, None] + b * torch.arange(W)
    expected = 0
    for s in (1, 2, 4, 8):
        h, w = H // s, W // s
        expected += (s * abs(a) * (h - 1) * w + s * abs(b) * h * (w - 1)) / (h * w)
    valid = torch.ones(2, H, W, dtype=torch.bool)
    both = torch.stack([ramp, 100 + 0 * ramp])
    found = dpt.gradient_loss(both, valid)
    assert abs(found[0].item() - expected) < 1e-5 and found[1] == 0, (found, expected)
    valid[0, :, 12] = False  # column 12 is not measured: at steps 1, 2 and 4 two differences a row fall away
    found, expected = dpt.gradient_loss(both, valid)[0].item(), 0
    for s in (1, 2, 4, 8):
        h, w, hit = H // s, W // s, 12 % s == 0
        expected += (s * abs(a) * (h - 1) * (w - hit) + s * abs(b) * h * (w - 1 - 2 * hit)) / (h * (w - hit))
    assert abs(found - expected) < 1e-5


def test_errors_are_nyus():
    """Of one picture by numpy, in the Eigen crop: rows 45 to 470, columns 41 to 600, truth in (0.001, 10)."""
    rng = np.random.default_rng(0)
    truth, x = rng.uniform(0.5, 9, (480, 640)), rng.uniform(0.5, 12, (480, 640))
    truth[100:120], truth[200:210] = 0, 11
    x[300, :] = 0
    as_tensors = lambda *arrays: [torch.tensor(z) for z in arrays]
    found = depth.errors(*as_tensors(x, truth), "metric", 10.0, depth.CROPS["eigen"])
    t, p = truth[45:471, 41:601], x[45:471, 41:601].clip(1e-3, 10)
    t, p = t[(t > 1e-3) & (t < 10)], p[(t > 1e-3) & (t < 10)]
    d, ratio = np.log(p) - np.log(t), np.maximum(p / t, t / p)
    expected = [np.sqrt(((p - t) ** 2).mean()), (abs(p - t) / t).mean(), abs(np.log10(p) - np.log10(t)).mean(),
                *((ratio < 1.25 ** k).mean() for k in (1, 2, 3)), np.sqrt((d ** 2).mean() - d.mean() ** 2 / 2)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    inside = np.zeros((480, 640), bool)
    for i, j, counts in ((44, 300, 0), (45, 300, 1), (470, 300, 1), (471, 300, 0), (300, 40, 0), (300, 41, 1),
                         (300, 600, 1), (300, 601, 0)):
        one = 0 * truth
        one[i, j] = 3
        again = depth.errors(*as_tensors(x, one), "metric", 10.0, depth.CROPS["eigen"])
        assert (again is not None) == bool(counts), (i, j)
    assert depth.errors(*as_tensors(x, one), "metric", 10.0) is not None and not inside.any()
    assert depth.errors(*as_tensors(x, 0 * truth), "metric", 10.0) is None
    x32 = torch.tensor(x).float()
    assert depth.errors(x32, torch.tensor(truth), "metric", 10.0) == depth.errors(
        x32.double(), torch.tensor(truth), "metric", 10.0), "what a model gives is not rounded again"
    # the bounds themselves: of depths 0.001 and 10 none counts, and a ratio of 1.25 is not below it
    ends = torch.tensor([[1e-3, 10.0, 4.0, 4.0]], dtype=torch.float64)
    assert depth.errors(ends + 3, ends, "metric", 10.0)[0] == 3
    assert depth.in_metres(ends, ends, "metric", 10.0)[1].tolist() == [[False, False, True, True]]
    for k, passed in enumerate(([0, 1, 1], [0, 0, 1], [0, 0, 0]), 1):
        one = torch.ones(1, 1, dtype=torch.float64)
        assert depth.errors(1.25 ** k * one, one, "metric", 10.0)[3:6] == passed
    # a disparity of any scale and shift is aligned, and only where it counts; what comes out negative is far away
    disparity = 3 / truth.clip(0.1) - 1
    disparity[:45] = 50
    found = depth.errors(*as_tensors(disparity, truth), "relative", 10.0, depth.CROPS["eigen"])
    np.testing.assert_allclose(found, [0, 0, 0, 1, 1, 1, 0], atol=1e-6)


def test_depth_heads_have_the_parameters_that_one_counts():
    with torch.device("meta"):  # ViT-L
        large = DepthModel(Encoder(ViT(replace(MICRO_VIT, width=1024, depth=24))))
    D, w = 1024, 256
    project, narrow = 11 * w * D + 11 * w, 9 * 11 * w * w
    resize = 16 * w * w + w + 4 * (2 * w) ** 2 + 2 * w + 9 * (4 * w) ** 2 + 4 * w
    fusion = 7 * 2 * (9 * w * w + w) + 4 * (w * w + w)  # the deepest has one unit, the others two
    end = 9 * w * w // 2 + w // 2 + 9 * w // 2 * 32 + 32 + 32 + 1
    assert sum(p.numel() for p in large.head.parameters()) == project + resize + narrow + fusion + end == 29_766_849
    linear = DepthModel(backbone(), "linear")
    assert sum(p.numel() for p in linear.head.parameters()) == 32 + 1
    assert large.blocks == [4, 11, 17, 23]
    for L, expected in (12, [2, 5, 8, 11]), (27, [5, 13, 20, 26]), (3, [0, 1, 2, 2]), (40, [8, 19, 29, 39]):
        assert dpt.blocks_to_read(L) == expected
    small = DepthModel(backbone(), head_width=8)
    sum(small(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.ones(1, 16, 16)).values()).backward()
    idle = [name for name, p in small.named_parameters() if p.requires_grad and p.grad is None]
    assert all("latent_down" in name for name in idle), idle  # which the trainer freezes


def test_dpt_is_what_its_parts_give():
    """The head written out again, as plain functions of its parameters."""
    model = DepthModel(backbone(depth=12), head_width=8, max_depth=5.0)
    p = dict(model.head.named_parameters())
    conv = lambda x, name, **how: F.conv2d(x, p[name + ".weight"], p.get(name + ".bias"), **how)
    up = lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=True)
    unit = lambda x, name: x + conv(conv(x.relu(), name + ".conv1", padding=1).relu(), name + ".conv2", padding=1)
    torch.manual_seed(1)
    img = torch.rand(2, 3, 20, 28)
    tokens = model.backbone.features(img, [2, 5, 8, 11], grid=True)
    tokens = [(x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in tokens]
    a, b, c, d = (conv(x, f"project.{i}") for i, x in enumerate(tokens))  # (2, 8, 5, 7), ..
    a = F.conv_transpose2d(a, p["resize.0.weight"], p["resize.0.bias"], stride=4)
    b = F.conv_transpose2d(b, p["resize.1.weight"], p["resize.1.bias"], stride=2)
    d = conv(d, "resize.3", stride=2, padding=1)
    a, b, c, d = (conv(x, f"narrow.{i}", padding=1) for i, x in enumerate((a, b, c, d)))
    x = conv(up(unit(d, "fuse.3.sum"), (5, 7)), "fuse.3.out")  # enlarged first, as DPT does: the same
    x = conv(up(unit(x + unit(c, "fuse.2.skip"), "fuse.2.sum"), (10, 14)), "fuse.2.out")
    x = conv(up(unit(x + unit(b, "fuse.1.skip"), "fuse.1.sum"), (20, 28)), "fuse.1.out")
    x = conv(up(unit(x + unit(a, "fuse.0.skip"), "fuse.0.sum"), (40, 56)), "fuse.0.out")
    x = up(conv(x, "conv", padding=1), (20, 28))
    x = conv(conv(x, "refine", padding=1).relu(), "out")[:, 0]
    close(model.predict(img), 5 * x.sigmoid(), 1e-5)
    close(model.eval().predict(img), 5 * x.sigmoid(), 1e-5)
    model.target = "relative"
    close(model.predict(img), x, 1e-5)
    linear = DepthModel(backbone(depth=12), "linear", target="relative")
    x = F.conv2d(tokens[3], linear.head.out.weight, linear.head.out.bias)
    close(linear.predict(img), F.interpolate(x, (20, 28), mode="bilinear", align_corners=False)[:, 0], 1e-5)
    for head in model.head, linear.head:  # the last layer in fp32 under autocast: of its input, to fp32's digits
        head.out.register_forward_hook(lambda layer, given, x: seen.append((given[0], x)))
        seen, layer = [], head.out
        with torch.autocast("cpu", torch.bfloat16):
            x = head([x.bfloat16() for x in tokens], (20, 28))
        assert x.dtype == torch.float32
        close(seen[0][1], torch.einsum("bdhw,kdij->bkhw", seen[0][0].float(), layer.weight) + layer.bias[0], 1e-6)


def test_depth_is_trained_below_its_maximum():
    model = DepthModel(backbone(), "linear", max_depth=5.0)
    truth = torch.tensor([0.0, 4.5, 5.0, 5.5]).repeat(2, 16, 4)
    with unittest.mock.patch.object(dpt, "silog", lambda x, truth: (x, truth)):
        x, known = model(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), truth)["silog"]
    assert x.shape == truth.shape and torch.equal(known, torch.tensor([0.0, 4.5, 0, 0]).repeat(2, 16, 4))
    img, model.target = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), "relative"  # it knows no maximum
    found, expected = model(img, truth), dpt.relative_losses(model.predict(img / 255), truth)
    assert found == expected and list(found) == ["trimmed", "gradient"]


def test_depth_of_pictures_of_any_size():
    seen, model = [], DepthModel(backbone(patch=14, size=56), head_width=4)
    plain = model.backbone.features
    model.backbone.features = lambda img, *rest, **how: seen.append(tuple(img.shape[2:])) or plain(img, *rest, **how)
    with torch.no_grad():
        for size, expected in ((64, 64), (70, 70)), ((42, 56), (42, 56)), ((5, 30), (14, 28)), (
                (28, 40), (28, 42)), ((40, 28), (42, 28)), ((15, 14), (14, 14)), ((14, 15), (14, 14)):
            assert model.predict(torch.rand(1, 3, *size)).shape == (1, *size) and seen[-1] == expected
        # a picture is seen with its shorter side at `size`, and gets an answer at its own size
        for shape, expected in ((40, 80), (28, 56)), ((90, 30), (84, 28)):
            x = depth.estimate(model, torch.zeros(3, *shape, dtype=torch.uint8), 28)
            assert x.shape == shape and seen[-1] == expected


def test_image_and_depth_are_cropped_and_mirrored_together():
    """Red is the column and depth is the column, but for holes: after any crop they still agree."""
    columns = torch.arange(64).expand(48, 64)
    img, z = torch.stack([4 * columns, columns, columns]).to(torch.uint8), columns.float() + 1
    z = torch.where(columns % 16 < 2, 0, z)
    mirrored, starts = 0, set()
    for seed in range(40):
        x, y = depth_sets.crop(img, z, 24, np.random.default_rng(seed))
        again = depth_sets.crop(img, z, 24, np.random.default_rng(seed))
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
        assert x.shape == (3, 24, 24) and x.dtype == torch.uint8 and y.shape == (24, 24)
        known = y > 0
        assert known.any() and not known.all()
        assert (x[0].float() / 4 + 1 - y)[known].abs().max() <= 1.5
        assert set(y[known].tolist()) <= set(range(1, 65)), "depths are taken, not mixed"
        mirrored += int(x[0, 0, 0] > x[0, 0, -1])
        starts.add(int(x[0, 0].min()))
    assert 10 < mirrored < 30 and len(starts) > 4
    tall, z = depth_sets.crop(img.transpose(1, 2), z.T, 24, np.random.default_rng(0))
    assert tall.shape == (3, 24, 24) and z.shape == (24, 24)


def test_several_sets_are_mixed_evenly():
    with tempfile.TemporaryDirectory() as tmp:
        a, b = (scenes(f"{tmp}/{name}", n) for name, n in (("a", 2), ("b", 5)))
        sets = [DepthPairs(a, "train", 0.001, 16, True, 0), DepthPairs(b, "train", "disparity", 16, True, 1)]
        mixed = Mixed(sets)
        assert len(mixed) == 7 and all(torch.equal(mixed[n][1], sets[n % 2][n // 2][1]) for n in range(6))
        paths = [mixed.path(mixed.index(n)) for n in range(20)]
        assert [path.startswith(a) for path in paths] == 10 * [True, False]
        assert {os.path.basename(path) for path in paths[1::2][:5]} == {f"{i}.png" for i in range(5)}
        _, counts = scene(1)
        for data, expected in (sets[0], counts / 1000), (sets[1], np.divide(1, counts, where=counts > 0,
                                                                             out=np.zeros(counts.shape))):
            np.testing.assert_allclose(data.measured(1)[1].numpy(), expected, rtol=1e-6)
        one, other = (DepthPairs(b, "train", 0.001, 16, True, seed)[3] for seed in (0, 1))
        assert not torch.equal(one[0], other[0])
        # what a run measures itself on: --val, else the first set in metres, else nothing
        base = ["train", "--target", "relative", "--weights", tokenizer_file(tmp), *SMALL, "--steps", 1, "--data"]
        measured = lambda job, model, data, *rest: {"pairs": len(data), "unit": data.unit}
        for k, (flags, expected) in enumerate([
                ([a, b, "--unit", "disparity", 0.002], [5, 0.002]), ([a, "--unit", "disparity"], []),
                ([a, "--unit", "disparity", "--val", b], [5, 0.001]), ([b, "--unit", 0.5, "--val", a], [2, 0.5])]):
            with unittest.mock.patch.object(depth, "measure", measured):
                quietly(*base, *flags, "--out", f"{tmp}/{k}")
            found = [[x["pairs"], x["unit"]] for x in log_lines(f"{tmp}/{k}") if x.get("kind") == "eval"]
            assert found == [expected] * bool(expected), (flags, found)


def test_depth_of_eight_pictures_is_learned_by_heart():
    img, z = zip(*(scene(i, 16, 16) for i in range(8)))
    img = torch.from_numpy(np.stack(img)).permute(0, 3, 1, 2).contiguous()
    z = torch.from_numpy(np.stack(z).astype(np.float32)) / 1000
    model, steps = DepthModel(backbone(), head_width=16), 90
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, 2 - 2 * step / steps)
        model(img, z)["silog"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model(img, z)["silog"] < 0.05, model(img, z)
        model.max_depth = 3.0  # what is farther does not count
        near = dpt.silog(model.predict(img / 255), torch.where(z < 3, z, 0))
        assert torch.equal(model(img, z)["silog"], near)


def trained(tmp, out, *flags):
    """Path of a run of 4 steps, as far as its flags leave it so."""
    quietly("train", "--data", scenes(f"{tmp}/data"), "--weights", tokenizer_file(tmp), *SMALL, "--steps", 4,
            "--out", f"{tmp}/{out}", *flags)
    return f"{tmp}/{out}"


def test_depth_resumes_exactly_and_two_ranks_are_one():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--micro_batch", 2, "--save_every", 2, "--target", "relative"]
        whole = trained(tmp, "whole", *flags)
        with killed_in_step(finetune, 4):
            trained(tmp, "killed", *flags)
        assert torch.load(f"{tmp}/killed/state.pt")["step"] == 2
        killed = trained(tmp, "killed", *flags)
        assert log_lines(killed) == log_lines(whole) and len(log_lines(whole)) == 5
        assert same_weights(f"{whole}/model.safetensors", f"{killed}/model.safetensors")
        line, evaluation = log_lines(whole)[0], log_lines(whole)[-1]
        assert abs(line["loss"] - line["trimmed"] - line["gradient"]) < 1e-6
        test = ["test", "--run", whole, "--data", f"{tmp}/data", "--workers", "0", "--out"]
        report, said = quietly(*test, f"{tmp}/r.json")
        for figure in depth.FIGURES:  # what training logged is what test finds, and prints in this order
            assert evaluation[figure] == report[figure] == json.load(open(f"{tmp}/r.json"))[figure]
        assert [float(x) for x in said.split("\n")[-2].split()] == [round(report[k], 4) for k in depth.FIGURES]
        assert report["images"] == 4 and report["unmeasured"] == 0 and "DISPARITY ALIGNED" in said
        assert Image.open(f"{whole}/samples/step_0000004.png").size == (3 * 32, 4 * 24)
        two = ["python", "-m", "downstream.depth"]
        done = run_ranks(2, *two, "train", "--data", f"{tmp}/data", "--weights", tokenizer_file(tmp), *SMALL, "--steps",
                         "4", *map(str, flags), "--out", f"{tmp}/two")
        assert all(x.returncode == 0 for x in done), done
        for one, both in zip(log_lines(whole), log_lines(f"{tmp}/two")):
            for k in one:
                assert one[k] == both[k] or abs(one[k] - both[k]) < 1e-4 * abs(one[k]), (k, one, both)
        done = run_ranks(2, *two, *test, f"{tmp}/r2.json")
        assert all(x.returncode == 0 for x in done), done
        both = json.load(open(f"{tmp}/r2.json"))
        assert all(both[k] == report[k] for k in (*depth.FIGURES, "images"))


def test_a_run_starts_from_another_and_predicts_pictures():
    with tempfile.TemporaryDirectory() as tmp:
        mix = trained(tmp, "mix", "--target", "relative")
        start = load_file(f"{mix}/model.safetensors")
        for name, flags in ("metric", []), ("more", ["--target", "relative"]):
            out = trained(tmp, name, "--init", mix, "--lr", 0, *flags)
            found = load_file(f"{out}/model.safetensors")
            same = {k for k in start if torch.equal(start[k], found[k])}
            assert start.keys() - same == ({"head.out.weight", "head.out.bias"} if name == "metric" else set())
        frozen = load_file(trained(tmp, "frozen", "--frozen") + "/model.safetensors")
        tokenizer = load_file(tokenizer_file(tmp))
        assert all(torch.equal(frozen[f"backbone.{k[8:]}"], x) for k, x in tokenizer.items() if "encoder.vit" in k)
        photo, run = f"{tmp}/photo.png", f"{tmp}/metric"
        save(photo, scene(9, 50, 70)[0])
        quietly("predict", photo, "--run", run)
        x, img = np.load(f"{tmp}/photo_depth.npy"), torch.from_numpy(scene(9, 50, 70)[0]).permute(2, 0, 1)
        model, config = finetune.load_model(run, depth.build, "cpu")
        assert x.shape == (50, 70) and x.dtype == np.float32 and config["size"] == 16
        assert np.array_equal(x, depth.estimate(model, img, 16).numpy()) and 0 < x.min() < x.max() < 10
        picture = np.array(Image.open(f"{tmp}/photo_depth.png"))
        assert picture.shape[0] == 50 and picture.shape[1] > 90
        quietly("predict", photo, "--run", run, "--raw", "png", "--out", f"{tmp}/new")
        stored = Image.open(f"{tmp}/new/photo_depth_mm.png")
        assert stored.mode == "I;16" and np.abs(np.array(stored) - 1000 * x).max() <= 0.51
        raises(UserError, quietly, "predict", photo, "--run", mix, "--raw", "png", words="use --raw npy")


def test_a_resume_of_depth_needs_no_init():
    """state.pt alone has all weights: the run that --init named may be gone, and need not be named again."""
    with tempfile.TemporaryDirectory() as tmp:
        mix = trained(tmp, "mix", "--target", "relative")
        whole = trained(tmp, "whole", "--init", mix, "--steps", 6)
        out = trained(tmp, "out", "--init", mix)
        os.rename(mix, mix + ".away")
        trained(tmp, "out", "--init", mix, "--steps", 5)
        trained(tmp, "out", "--steps", 6)
        assert same_weights(f"{whole}/model.safetensors", f"{out}/model.safetensors")
        raises(UserError, trained, tmp, "other", "--init", mix, words="mix: no such file")


def test_estimates_do_not_overwrite_what_was_measured():
    """A file that lies beside a photo is what a camera measured, unless both files of an estimate are there."""
    with tempfile.TemporaryDirectory() as tmp:
        run, photo = trained(tmp, "run"), f"{tmp}/a/photo.png"
        save(photo, scene(9, 50, 70)[0])
        for name in "photo_depth.png", "photo_depth.npy", "photo_depth_mm.png":
            measured = f"{tmp}/a/{name}"
            for raw in "npy", "png":
                open(measured, "w").write("measured")
                refused(UserError, quietly, "predict", photo, "--run", run, "--raw", raw, says=(
                    f"{measured} is there already and no estimate of this command, which writes a picture and its "
                    "values: give another --out"))
                assert open(measured).read() == "measured" and len(os.listdir(f"{tmp}/a")) == 2
            os.remove(measured)
        for raw in "npy", "npy", "png":  # its own are written again
            quietly("predict", photo, "--run", run, "--raw", raw)
        assert sorted(os.listdir(f"{tmp}/a")) == [
            "photo.png", "photo_depth.npy", "photo_depth.png", "photo_depth_mm.png"]
        os.mkdir(f"{tmp}/b")
        for values in "photo_depth.npy", "photo_depth_mm.png":  # both without a picture
            open(f"{tmp}/b/{values}", "w").close()
        raises(UserError, quietly, "predict", photo, "--run", run, "--out", f"{tmp}/b", words="depth.npy is there")
        refused(UserError, quietly, "predict", photo, "--run", run, "--out", photo, says=(
            f"{photo} cannot be made a folder, because a file is in its place: give another one"))
        test, before = ["test", "--run", run, "--data", f"{tmp}/data", "--workers", 0], os.listdir(run)
        model = f"{run}/model.safetensors"
        refused(UserError, quietly, *test, "--out", model, says=(
            f"--out {model} is the name of a weights file: the report is JSON, give it a name in .json"))
        with unittest.mock.patch.object(depth, "measure", None):  # before the work
            raises(UserError, quietly, *test, "--out", f"{tmp}/data", words="data is a folder: give the name of a file")
            raises(UserError, quietly, *test, "--out", f"{photo}/r.json", words="photo.png cannot be made a folder")
        assert os.listdir(run) == before and load_file(model)


def test_pictures_have_a_scale():
    x = np.linspace(1, 3, 100)[:, None].repeat(120, 1).astype(np.float32)
    bright = lambda picture: np.array(picture).astype(int).sum(-1)
    metric, relative = (bright(depth.draw(x, target)) for target in ("metric", "relative"))
    assert metric[0, 5] > 600 and metric[-1, 5] < 50, "near is bright"
    assert relative[0, 5] < 50 and relative[-1, 5] > 600, "a large disparity is near"
    for picture in metric, relative:
        column = picture[10:-10, 130]  # of the scale, which begins 8 pixels right of the map
        assert (np.diff(column) <= 0).all() and column[0] > 500 and column[-1] < 120, "near above, far below"
        assert (picture[:, 145:] < 300).any(), "numbers beside it"
    for height, width, bar, size in (40, 120, 8, 9), (180, 240, 8, 9), (260, 300, 10, 13):
        drawn = depth.draw(np.linspace(1, 3, height)[:, None].repeat(width, 1), "metric")
        assert drawn.width == width + 3 * bar + round(ImageFont.load_default(size).getlength("3.00 m")), width
        across = np.array(drawn)[20]  # one bar of white, the scale
        assert (across[width:width + bar] == 255).all() and (across[width + bar:width + 2 * bar] < 255).any(1).all()
        assert (across[width + 2 * bar:width + 2 * bar + bar // 2] == 255).all()
    for height in 1, 45:  # a strip: there is room for the five labels, one above the other
        drawn = np.array(depth.draw(np.linspace(1, 3, height)[:, None].repeat(60, 1), "metric"))
        assert drawn.shape[0] == 46 and (drawn[height:, :60] == 255).all()
        dark = (drawn[:, -30:] < 128).any((1, 2)).nonzero()[0]
        assert (np.diff(dark) > 1).sum() == 4, "five labels, none over another"
    # the widest number decides
    drawn, font = depth.draw(np.linspace(2, 100, 40)[:, None].repeat(60, 1), "metric"), ImageFont.load_default(9)
    assert drawn.width == 60 + 3 * 8 + round(font.getlength("100.00 m")) > 60 + 3 * 8 + font.getlength("2.00 m")
    anchors = depth.colour(np.array([[1.0, 2.5, 5.0, 9.0]]), 1.0, 5.0)[0]
    assert anchors.tolist() == [[252, 255, 164], [218, 98, 46], [0, 0, 4], [0, 0, 4]]
    np.testing.assert_allclose(depth.limits(np.arange(101.0), "metric"), [1, 99])
    np.testing.assert_allclose(depth.limits(np.arange(101.0), "relative"), [99, 1])


class Hdf5(dict):
    """In the place of an h5py.File, where h5py is not installed."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_nyus_files_become_folders():
    """MATLAB keeps (480, 640, 3, n); h5py shows it as (n, 3, 640, 480). Numbers in splits.mat count from 1."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 8, 6)).astype(np.uint8)
    tables = {"images": images, "rawDepths": rng.uniform(0, 10, (5, 8, 6)).astype(np.float32)}
    tables["depths"] = 2 * tables["rawDepths"]
    with tempfile.TemporaryDirectory() as tmp:
        splits = {"trainNdxs": np.array([[1], [4], [5]]), "testNdxs": np.array([[2], [3]])}
        scipy.io.savemat(f"{tmp}/splits.mat", splits)
        try:
            import h5py
            with h5py.File(f"{tmp}/nyu.mat", "w") as f:
                for name, x in tables.items():
                    f[name] = x
        except ImportError:
            h5py = types.SimpleNamespace(File=lambda path, mode: Hdf5(tables))
        with unittest.mock.patch.dict(sys.modules, h5py=h5py), contextlib.redirect_stderr(io.StringIO()):
            for field in "rawDepths", "depths":
                _, said = quietly("convert", f"{tmp}/nyu.mat", f"{tmp}/splits.mat", "--field", field, "--out",
                                  f"{tmp}/{field}")
                assert said == f"{tmp}/{field}: 3 pairs in train, 2 in test\n"
        named = " are not NYUv2's nyu_depth_v2_labeled.mat and splits.mat, in this order ("
        with unittest.mock.patch.dict(sys.modules, h5py=h5py):
            for splits in f"{tmp}/none.mat", __file__:
                raises(UserError, quietly, "convert", f"{tmp}/nyu.mat", splits, "--out", f"{tmp}/x",
                       words=f"{tmp}/nyu.mat and {splits}{named}")
            scipy.io.savemat(f"{tmp}/other.mat", {"trainNdxs": np.array([[1]])})
            raises(UserError, quietly, "convert", f"{tmp}/nyu.mat", f"{tmp}/other.mat", "--out", f"{tmp}/x",
                   words="(KeyError: 'testNdxs')")
        with unittest.mock.patch.dict(sys.modules, h5py=None):
            raises(UserError, quietly, "convert", f"{tmp}/nyu.mat", f"{tmp}/splits.mat", "--out", f"{tmp}/x",
                   words=["convert needs h5py and scipy (", "): pip install -r downstream/requirements.txt"])
        assert not os.path.exists(f"{tmp}/x")
        for split, numbers in ("train", [1, 4, 5]), ("test", [2, 3]):
            data = DepthPairs(f"{tmp}/rawDepths", split)
            assert data.names == [f"{n:04d}" for n in numbers]
            for i, n in enumerate(numbers):
                img, z = data.measured(i)
                assert (img.numpy() == images[n - 1].transpose(0, 2, 1)).all()
                assert np.abs(z.numpy() - tables["rawDepths"][n - 1].T).max() < 6e-4
                assert np.abs(DepthPairs(f"{tmp}/depths", split).measured(i)[1] - 2 * z).max() < 2e-3


def test_depth_says_what_is_wrong():
    with tempfile.TemporaryDirectory() as tmp:
        data, weights = scenes(f"{tmp}/data"), tokenizer_file(tmp)
        train = ["train", "--weights", weights, *SMALL, "--steps", 1, "--out", f"{tmp}/run"]
        _, said = quietly(*train, "--data", data)
        assert "4 pairs in train, depths from" in said and "warning" not in said
        for unit, word in (1.0, "too large"), (0.00001, "too small"):
            pairs = DepthPairs(data, "val", unit)
            assert word in depth_sets.check(pairs, 10.0, 0) and "warning" not in depth_sets.check(pairs, None, 0)
        report, said = quietly("test", "--run", f"{tmp}/run", "--data", data, "--unit", 1e-5, "--workers", 0)
        assert "is it another unit?" in report["warning"] and "is it another unit?" in said
        for unit in 0.0005, 0.002:  # no false alarm at half and at twice the depth
            assert "warning" not in depth_sets.check(DepthPairs(data, "val", unit), 10.0, 0)
        # 0.25: a room in centimetres, taken for millimetres
        for middle, word in (9.99, None), (10, "large"), (11, "large"), (0.41, None), (0.4, "small"), (0.25, "small"):
            with unittest.mock.patch.object(DepthPairs, "spread", lambda self, i: [0.1, middle, 12]):
                line, *more = depth_sets.check(DepthPairs(data, "train", 0.5), 10.0, 0).splitlines()
            assert line == f"{data}: 4 pairs in train, depths from 0.1 to 12, median {middle}"
            assert more == ["warning: by --unit 0.5 and --max_depth 10 these are metres, and most are too "
                            f"{word} for that: is it another unit?"] * bool(word), more
        looked = []
        with unittest.mock.patch.object(DepthPairs, "spread", lambda self, i: looked.append(i) or [1, 2, 3]):
            depth_sets.check(DepthPairs(data, "train"), 10.0, 0, most=2)
        assert looked == [0, 2]
        raises(UserError, quietly, "test", "--run", f"{tmp}/run", "--data", data, "--crop", "eigen", "--workers", 0,
               words="0.png is 32x24; --crop eigen is of NYUv2's 640x480")
        raises(SystemExit, quietly, "test", "--run", f"{tmp}/run", "--data", data, "--unit", 0, words="2")
        for flags in ["--crop", "eigen"], ["--val_split", "test"]:
            refused(UserError, quietly, *train, "--data", data, "--unit", "disparity", "--target", "relative", *flags,
                    says="--crop and --val_split are of what is measured, and a disparity is not: give --val, metres")
        save(f"{data}/train/depth/1.png", np.ones((5, 6), np.uint16))
        save(f"{data}/train/depth/3.png", np.zeros((24, 32, 3), np.uint8))
        raises(USER_ERRORS, quietly, *train, "--data", data,
               words=["2 of 4 pairs cannot be used", "1.png is 6x5, its image 32x24", "3.png"])
        os.remove(f"{data}/train/depth/2.png")
        raises(USER_ERRORS, quietly, *train, "--data", data, words=["train/images/2.png"])
        for i in range(4):
            save(f"{data}/val/depth/{i}.png", np.zeros((24, 32), np.uint16))
        raises(UserError, quietly, "test", "--run", f"{tmp}/run", "--data", data, "--workers", 0,
               words="no depth picture of val has a measurement")
        raises(UserError, quietly, "test", "--run", weights, "--data", data, words="no run of a downstream task")
        _, said = quietly("bench", "--teacher", "tiny", "--size", 16, "--batch_size", 2)
        assert "tiny with DPT, 16x16 px, batch 2" in said and "hours for 20 epochs of NYUv2's 795 pairs" in said
        for flags in ["--unit", 1, 2, 3], ["--unit", "disparity"], ["--unit", "feet"], ["--max_depth", 0]:
            raises(SystemExit, quietly, *train, "--data", data, *flags)
        parsed = lambda *flags: depth.parse_args(["train", "--data", "x", "--weights", "y", *flags])
        plain = parsed()
        assert (plain.epochs, plain.lr, plain.batch_size, plain.size, plain.lr_decay, plain.warmup) == (
            20, 1e-4, 32, 448, 0, 0)
        assert plain.eval_every == 5000
        assert parsed("--target", "relative").epochs == 60 and parsed("--steps", "5").epochs is None


def test_a_training_crop_is_the_literal_one():
    """Every number of a sample, written out again: order and draws of (seed, n), tall and wide pictures."""
    with tempfile.TemporaryDirectory() as tmp:
        for i, size in enumerate([(24, 32), (32, 20), (12, 12)]):
            img, z = scene(i, *size)
            save(f"{tmp}/train/images/{i}.png", img), save(f"{tmp}/train/depth/{i}.png", z)
        for unit in 0.002, "disparity":
            data = DepthPairs(tmp, "train", unit, 16, True, 5)
            for n in range(9):
                i = np.random.default_rng([5, n // 3]).permutation(3)[n % 3]
                img, z = scene(i, *[(24, 32), (32, 20), (12, 12)][i])
                z = torch.from_numpy(z.astype(np.float32))
                z = torch.where(z > 0, 1 / z, 0) if unit == "disparity" else z * unit
                H, W = [(16, 21), (26, 16), (16, 16)][i]  # 16 * 32 / 24 = 21.3, 16 * 32 / 20 = 25.6
                rng = np.random.default_rng([5, n, 1])
                y, x = rng.integers(H - 15), rng.integers(W - 15)
                img = F.interpolate(torch.from_numpy(img).permute(2, 0, 1)[None], (H, W), mode="bicubic",
                                    antialias=True)[0, :, y:y + 16, x:x + 16]
                rows, columns = (np.floor((np.arange(new) + 0.5) * old / new).astype(int)  # the nearest pixel's
                                 for old, new in zip(z.shape, (H, W)))
                z = z[rows][:, columns][y:y + 16, x:x + 16]
                if rng.random() < 0.5:
                    img, z = img.flip(2), z.flip(1)
                found = data[n]
                assert torch.equal(found[0], img) and torch.equal(found[1], z), (unit, n)


class Grey:
    """In a model's place: a depth or a disparity of 1 to 5 from the mean of a pixel's channels."""
    target, max_depth = "metric", 10.0
    seen = None

    def parameters(self):
        return iter([torch.zeros(1)])

    def predict(self, img):
        self.seen = img, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        return 1 + 4 * img.mean(1)


def test_estimates_and_their_means_are_the_literal_ones():
    """What a model sees of a picture, what of its answer is compared, and of how many pictures the means are."""
    img, model = torch.from_numpy(scene(0, 40, 60)[0]).permute(2, 0, 1), Grey()
    for size, seen in (20, (20, 30)), (64, (64, 96)):
        x = F.interpolate(img[None], seen, mode="bicubic", antialias=True) / 255
        expected = F.interpolate(1 + 4 * x.mean(1)[None], (40, 60), mode="bilinear", align_corners=False)[0, 0]
        assert torch.equal(depth.estimate(model, img, size), expected)
        assert torch.equal(model.seen[0], x) and model.seen[2] is False
    job = types.SimpleNamespace(**{**vars(JOB), "autocast": torch.autocast("cpu", torch.bfloat16)})
    with tempfile.TemporaryDirectory() as tmp:
        img, z = scene(0, 480, 640)
        for i in range(3):
            truth = z // (i + 1)
            if i == 1:
                truth[45:471, 41:601] = 0  # nothing in the Eigen crop
            save(f"{tmp}/val/images/{i}.png", img), save(f"{tmp}/val/depth/{i}.png", truth)
        data = DepthPairs(tmp, "val")
        for crop, counted in (None, [0, 1, 2]), (depth.CROPS["eigen"], [0, 2]):
            rows = [depth.errors(depth.estimate(model, data.measured(i)[0], 32), data.measured(i)[1], "metric", 10.0,
                                 crop) for i in counted]
            found = depth.measure(job, model, data, 32, crop)
            assert model.seen[1] is True and model.seen[0].shape[2:] == (32, 43)
            np.testing.assert_allclose([found[k] for k in depth.FIGURES], np.mean(rows, 0), rtol=1e-12)
            assert (found["images"], found["unmeasured"]) == (len(counted), 3 - len(counted))
        both = types.SimpleNamespace(**{**vars(JOB), "rank": 1, "ranks": 2, "gather": lambda x: [[], x]})
        assert depth.measure(both, model, data, 32, None)["unmeasured"] == 2, "rank 1 of 2 sees the second picture"
        fault = types.SimpleNamespace(**{**vars(JOB), "gather": lambda x: [x, ["7.png is damaged"]]})
        raises(USER_ERRORS, depth.measure, fault, model, data, 32, None,  # what another rank cannot read stops all
               words="1 of 3 pairs cannot be used: 7.png is damaged")
        model.max_depth = 0.1
        raises(UserError, depth.measure, JOB, model, data, 32, None,
               words=f"nothing in {tmp} is measured from 0.001 to 0.1 m")
    # a disparity whose fit is not positive is as far away as can be, and what is nearer than a millimetre is at one
    truth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    x, valid = depth.in_metres(torch.tensor([[[1.0, 0.5, 0.25, -9.0]]]), truth, "relative", 4.5)
    close(x, torch.tensor([[[1.0, 2.0, 4.0, 4.5]]]), 1e-5)
    assert valid.tolist() == [[[True, True, True, False]]]
    assert depth.in_metres(torch.tensor([[0.0, 99.0]]), truth[0, :, :2], "metric", 7.0)[0].tolist() == [
        [torch.tensor(1e-3).item(), 7.0]]
    # of a size that patches do not cover, the network sees the nearest one, and its answer is enlarged
    torch.manual_seed(0)
    model, img = DepthModel(backbone(), head_width=8, max_depth=6.0), torch.rand(1, 3, 14, 21).round()
    x = F.interpolate(img, (16, 20), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        maps = [F.layer_norm(x.movedim(1, 3), (32,)).movedim(3, 1)
                for x in model.backbone.features(x, [0, 1, 2, 2], grid=True)]
        x = model.head(maps, [16, 20])
        close(model.predict(img), 6 * F.interpolate(x, (14, 21), mode="bilinear", align_corners=False)[:, 0].sigmoid())
        with torch.autocast("cpu", torch.bfloat16):
            assert model.predict(img[:, :, :12, :20]).dtype == torch.float32
    with torch.device("meta"):
        widths = [DepthModel(Encoder(ViT(replace(MICRO_VIT, width=D, heads=1, depth=1)))).head.conv.in_channels
                  for D in (4, 32, 1152)]
    assert widths == [2, 8, 256], "a quarter, at least 2 and at most 256"


def test_the_picture_of_a_run_shows_what_is_measured():
    """Of the first, the last and two between: image, truth and estimate by the truth's 1st and 99th percentiles."""
    model = Grey()
    with tempfile.TemporaryDirectory() as tmp:
        data = DepthPairs(scenes(tmp, 8, ["val"]), "val")
        save(f"{tmp}/val/depth/2.png", np.zeros((24, 32), np.uint16))  # nothing is measured there
        for target in "metric", "relative":
            model.target = target
            found = np.array(depth.look(model, data, 24))
            assert found.shape == (4 * 24, 3 * 32, 3)
            for row, i in enumerate([0, 2, 4, 7]):
                img, truth = data.measured(i)
                x, valid = depth.in_metres(depth.estimate(model, img, 24)[None], truth[None], target, 10.0)
                x, valid, truth = x[0].numpy(), valid[0].numpy(), truth.numpy()
                near, far = np.percentile(truth[valid] if i != 2 else x, (1, 99))
                expected = np.where(valid[..., None], depth.colour(truth, near, far), 128)
                part = found[24 * row:24 * row + 24]
                assert np.array_equal(part[:, :32].transpose(2, 0, 1), img.numpy())
                assert np.array_equal(part[:, 32:64], expected) and (expected[3, 4] == 128).all()
                assert np.array_equal(part[:, 64:], depth.colour(x, near, far)), (target, i)
        two = DepthPairs(scenes(f"{tmp}/two", 2, ["val"]), "val")
        assert depth.look(model, two, 24).size == (96, 48), "two pictures are not repeated"
        for kind, x in zip(("images", "depth"), scene(1, 30, 50)):  # the second is larger
            save(f"{tmp}/two/val/{kind}/1.png", x)
        found = np.array(depth.look(model, two, 24))
        assert found.shape == (24 + 30, 150, 3) and np.array_equal(found[24:, :50], scene(1, 30, 50)[0])
        assert np.array_equal(found[:24, :32], scene(0)[0]) and (found[:24, 96:] == 255).all()
    assert (depth.colour(np.full((1, 2), 3.0), 3.0, 3.0) == depth.COLOURS[0]).all(), "one depth alone is near"
    drawn = []
    x = np.linspace(1, 3, 100)[:, None].repeat(120, 1).astype(np.float32)
    with unittest.mock.patch.object(ImageDraw.ImageDraw, "text",
                                    lambda self, at, text, **how: drawn.append((at, text, how["anchor"]))):
        for target in "metric", "relative":
            depth.draw(x, target)
    low, high = 1.02, 2.98  # the 1st and the 99th percentile of 100 rows from 1 to 3
    font = ImageFont.load_default(9).size
    for k, (at, text, anchor) in enumerate(drawn):
        share, unit = k % 5 / 4, " m" if k < 5 else ""
        value = low + share * (high - low) if k < 5 else high - share * (high - low)
        assert text == f"{value:.2f}{unit}" and anchor == "lm", (k, text)
        assert at == (120 + 2 * 8 + 4, int(font // 2 + (k % 5) * (100 - font - 1) // 4)), (k, at)
    assert len(drawn) == 10


def test_tests_and_predictions_of_depth_do_what_they_are_told():
    """What the flags of test and predict become, every word of a report, and the values that are written."""
    model, config = Grey(), {"size": 20, "step": 7}
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(
            finetune, "load_model", lambda run, build, device: (model, config)):
        data, checks, given = scenes(f"{tmp}/a", 3, ["dusk"]), [], []
        figures = {**dict(zip(depth.FIGURES, (1.5, 0.25, 0.125, 0.5, 0.75, 1, 0.0625))), "images": 3, "unmeasured": 0}
        with unittest.mock.patch.object(depth, "check", lambda *x, **how: checks.append((x[1:], how)) or "line"), \
                unittest.mock.patch.object(depth, "measure", lambda *x: given.append(x) or figures):
            test = ["test", "--run", "RUN", "--data", data, "--split", "dusk", "--unit", 0.5, "--workers", 3]
            report, said = quietly(*test, "--crop", "eigen", "--bf16", "--out", f"{tmp}/r.json")
            model.target = "relative"
            other, _ = quietly(*test, "--no-bf16")
        assert report["protocol"] == ("seen with the shorter side at 20 px, bf16 autocast, enlarged to the truth; "
                                      "truth in (0.001, 10) m; crop eigen; of each picture, then averaged")
        assert other["protocol"] == ("seen with the shorter side at 20 px, fp32 without TF32, enlarged to the truth; "
                                     "truth in (0.001, 10) m; crop none; of each picture, then averaged; DISPARITY "
                                     "ALIGNED TO EACH PICTURE'S TRUTH")
        assert {k: report[k] for k in ("run", "step", "data", "split", "warning", *figures)} == {
            "run": "RUN", "step": 7, "data": [data], "split": "dusk", "warning": None, **figures}
        assert [line.split() for line in said.splitlines()[-2:]] == [
            "rmse absrel log10 delta1 delta2 delta3 silog".split(),
            "1.5000 0.2500 0.1250 0.5000 0.7500 1.0000 0.0625".split()]
        assert checks == 2 * [((10.0, 3), {"most": 100})]
        (job, _, pairs, size, crop), (_, _, _, _, none) = given
        assert job.args.workers == 3 and (pairs.split, pairs.unit, len(pairs), size) == ("dusk", 0.5, 3, 20)
        assert crop == (slice(45, 471), slice(41, 601)) and none is None
        for folder, value in (f"{tmp}/p", 255), (f"{tmp}/q", 51):
            save(f"{folder}/x.1.png", np.full((30, 40, 3), value, np.uint8))
        predict = ["predict", "--run", "RUN", f"{tmp}/p/x.1.png", f"{tmp}/q/x.1.png"]
        _, said = quietly(*predict, "--out", f"{tmp}/out", "--bf16")
        assert said.splitlines() == [f"{tmp}/out/x.1_depth.png: 5.00 to 5.00",
                                     f"{tmp}/out/x.1_2_depth.png: 1.80 to 1.80"]
        assert model.seen[1] is True and model.seen[0].shape[2:] == (20, 27)
        model.target = "metric"
        save(f"{tmp}/here/z.png", np.full((30, 40, 3), 255, np.uint8))
        with contextlib.chdir(f"{tmp}/here"):
            assert quietly("predict", "--run", "RUN", "z.png")[1] == "z_depth.png: 5.00 to 5.00 m\n"
        folder = f"{tmp}/here_depth/z_depth.png"
        os.remove(f"{tmp}/here/z_depth.png")
        assert quietly("predict", "--run", "RUN", f"{tmp}/here")[1] == f"{folder}: 5.00 to 5.00 m\n"
        for raw in "npy", "png":
            _, said = quietly(*predict, "--raw", raw, "--no-bf16")
            assert said.splitlines() == [f"{tmp}/{folder}/x.1_depth.png: {z:.2f} to {z:.2f} m"
                                         for folder, z in (("p", 5), ("q", 1.8))]
            assert model.seen[1] is False
            files = ["x.1.png", "x.1_depth.npy", "x.1_depth.png", "x.1_depth_mm.png"][:3 if raw == "npy" else 4]
            assert sorted(os.listdir(f"{tmp}/p")) == files
        assert np.abs(np.load(f"{tmp}/q/x.1_depth.npy") - 1.8).max() < 1e-6
        assert (np.array(Image.open(f"{tmp}/q/x.1_depth_mm.png")) == 1800).all()
        x = depth.estimate(model, torch.full((3, 30, 40), 51, dtype=torch.uint8), 20).numpy()
        assert np.array_equal(np.array(Image.open(f"{tmp}/q/x.1_depth.png")), np.array(depth.draw(x, "metric")))
        model.predict = lambda img: 70 + 0 * img[:, 0]  # 70 m are more than 16 bits of millimetres
        quietly(*predict, "--raw", "png")
        assert (np.array(Image.open(f"{tmp}/p/x.1_depth_mm.png")) == 65535).all()
        open(f"{tmp}/damaged.png", "w").write("no picture")
        raises(USER_ERRORS, quietly, *predict, f"{tmp}/damaged.png", words=f"{tmp}/damaged.png cannot be read as an")


def test_training_and_bench_of_depth_hand_on_what_they_are_told():
    seen, measured = [], []
    with tempfile.TemporaryDirectory() as tmp:
        a, b = scenes(f"{tmp}/a", 2, ["train", "dusk"]), scenes(f"{tmp}/b", 3, ["train", "dusk"])
        base = ["train", "--data", a, b, "--weights", tokenizer_file(tmp), *SMALL, "--val_split", "dusk"]
        checks, line = [], depth_sets.check

        def watch(data, limit, workers, **most):
            checks.append((limit, workers, *most.values()))
            return line(data, limit, workers, **most)
        with unittest.mock.patch.object(finetune, "train", lambda *args, **rest: seen.append((args, rest))), \
                unittest.mock.patch.object(depth, "check", watch):
            _, said = quietly(*base, "--seed", 3, "--unit", 0.002, 0.001, "--max_depth", 12, "--head", "linear",
                              "--crop", "eigen", "--drop_path", 0.25)
            with contextlib.redirect_stdout(io.StringIO()):
                depth.main(list(map(str, [*base[:-2], "--target", "relative", "--unit", "disparity"])), "HANDLER")
        assert [rest["on_signal"] for _, rest in seen] == [None, "HANDLER"]
        rows = (a, 2, 0.002, "train"), (b, 3, 0.001, "train"), (a, 2, 0.002, "dusk")
        for line, (root, n, unit, split) in zip(said.splitlines(), rows, strict=True):
            low, middle, high = np.median([np.percentile(unit * z[z > 0], (1, 50, 99))
                                           for z in (scene(i)[1] for i in range(n))], 0)
            assert line == f"{root}: {n} pairs in {split}, depths from {low:.3g} to {high:.3g}, median {middle:.3g}"
        assert checks == [(12, 0)] * 2 + [(12, 0, 100)] + [(None, 0)] * 2
        (args, model, mixed, evaluate, config), rest = seen[0]
        assert config == dict(head="linear", head_width=8, target="metric", max_depth=12, size=16)
        assert [(x.files.roots, x.split, x.unit, x.size, x.train, x.seed) for x in mixed.sets] == [
            ([a], "train", 0.002, 16, True, 3), ([b], "train", 0.001, 16, True, 4)]
        assert type(model.head) is dpt.LinearHead and model.max_depth == 12 and model.backbone.vit.drop_path == 0.25
        with unittest.mock.patch.object(depth, "measure", lambda *x: measured.append(x)), \
                unittest.mock.patch.object(depth, "look", lambda *x: measured.append(x)):
            evaluate(), rest["picture"]()
        (job, who, val, size, crop), looked = measured
        assert (val.files.roots, val.split, val.unit, val.train) == ([a], "dusk", 0.002, False)
        assert job.args.workers == 0 and who is model and size == 16 and crop == depth.CROPS["eigen"]
        assert looked == (model, val, 16) and job.precision == "fp32 without TF32"
        (args, model, mixed, evaluate, config), rest = seen[1]
        assert evaluate is None and rest["picture"] is None and [x.unit for x in mixed.sets] == ["disparity"] * 2
        assert (model.target, model.head.conv.in_channels) == ("relative", 8)
        built = depth.build({**config, "head_width": 6, "max_depth": 3.0}, backbone())
        assert (built.head.conv.in_channels, built.target, built.max_depth) == (6, "relative", 3.0)
    for earlier, later in itertools.product(("metric", "relative"), repeat=2):  # the last layer stays with its target
        one, other = (DepthModel(backbone(), head_width=4, target=target) for target in (earlier, later))
        own, given = ({k: x + n for k, x in model.state_dict().items()} for n, model in ((0, other), (1, one)))
        depth.begin_with(other, types.SimpleNamespace(target=earlier, state_dict=lambda: dict(given)), "earlier")
        for k, x in other.state_dict().items():
            assert torch.equal(x, own[k] if k.startswith("head.out.") and earlier != later else given[k]), (earlier, k)
    with unittest.mock.patch.object(depth, "measure_speed", lambda *given: measured.append(given)), \
            unittest.mock.patch.dict(TEACHERS, micro=MICRO_VIT):
        with unittest.mock.patch.object(depth, "rank_and_device", lambda: (0, 1, torch.device("meta"))):
            quietly("bench", "--teacher", "micro", "--size", 16, "--batch_size", 3)
        assert {x.device.type for x in (*measured[-1][1].parameters(), *measured[-1][2])} == {"meta"}
        quietly("bench", "--teacher", "micro", "--size", 16, "--batch_size", 3)
    name, model, (img, truth), predict, schedules = measured[-1]
    assert name == "micro with DPT" and model.backbone.vit.config == MICRO_VIT and type(model.head) is dpt.DPTHead
    assert img.shape == (3, 3, 16, 16) and img.dtype == torch.uint8 and img.max() > 200
    assert truth.shape == (3, 16, 16) and 0.1 <= truth.min() < 1 < 8 < truth.max() <= 9.1
    assert schedules == {"20 epochs of NYUv2's 795 pairs": 15_900, "60 epochs of each million pairs": 60e6}
    model.predict = lambda x: (x.min().item(), x.max().item())
    low, high = predict()
    assert low >= 0 and 0.8 < high <= 1, "pictures in [0, 1]"


def test_flags_of_depth_by_hand():
    """Defaults and bounds; on a GPU bf16 is the default."""
    base = {"train": ["--data", "x", "--weights", "w"], "test": ["--run", "r", "--data", "x"],
            "predict": ["--run", "r", "x.png"], "bench": [], "convert": ["a.mat", "b.mat", "--out", "o"]}
    parse = lambda command, *flags: vars(depth.parse_args([command, *base[command], *map(str, flags)]))
    for command, expected in {
            "train": dict(unit=[0.001], val=None, val_split="val", target="metric", max_depth=10, size=448, head="dpt",
                          head_width=None, crop="none", init=None, weight_decay=0.01, out="depth", frozen=False,
                          clip=1, layer_decay=1, drop_path=0, epochs=20, steps=None),
            "test": dict(split="val", unit=0.001, crop="none", out=None, bf16=False, workers=6),
            "predict": dict(raw="npy", out=None, bf16=False, workers=6, files=["x.png"]),
            "bench": dict(teacher="internvit", size=448, batch_size=32),
            "convert": dict(mat="a.mat", splits="b.mat", field="rawDepths", out="o")}.items():
        with unittest.mock.patch.object(depth, "cores", lambda: 7):
            found = parse(command)
        assert {k: found[k] for k in expected} == expected, (command, found)
    demands(depth.parse_args, base, "--data", "--run", "--out")
    for cores, workers in (1, 1), (2, 1), (9, 8), (64, 8):
        with unittest.mock.patch.object(depth, "cores", lambda: cores):
            assert parse("test")["workers"] == workers
    gpu_takes_bf16(parse, "--no-bf16")
    assert parse("train", "--target", "relative", "--epochs", 3)["epochs"] == 3
    bounds(parse, ("train", "max_depth", 0.01, 0.009), ("train", "size", 1, 0), ("train", "head_width", 2, 1),
           ("test", "unit", 1e-9, -1), ("test", "workers", 0, -1), ("bench", "size", 1, 0),
           ("bench", "batch_size", 1, 0), ("train", "head", "linear", "upernet"), ("train", "target", "relative", "x"),
           ("train", "crop", "eigen", "x"), ("test", "crop", "eigen", "x"), ("predict", "raw", "png", "jpg"),
           ("bench", "teacher", "tiny", "none"), ("convert", "field", "depths", "x"))
    assert parse("train", "--unit", 1e-9)["unit"] == [1e-9]
    for flags, says in ((["--unit", 0], "argument --unit: it is 0; it must be at least 1e-09"),
                        (["--unit", 1, 2, 3], "--unit has 3 values, --data 1: give one, or one for each"),
                        (["--unit", "disparity"], "--unit disparity has no metres: it needs --target relative")):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            raises(SystemExit, parse, "train", *flags)
        assert err.getvalue().endswith(f"error: {says}\n"), err.getvalue()
