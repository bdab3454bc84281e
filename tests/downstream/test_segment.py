"""downstream/segment.py, upernet.py and pairs.py: UperNet, masks, mIoU, windows, and the command line"""
from tests.helpers import (  # first: it sets the environment that torch reads
    MICRO_VIT, close, log_lines, micro_teacher, raises, run_ranks, same_weights, tokenizer_file)

import contextlib
import io
import json
import os
import struct
import tempfile
import types
import unittest.mock
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import tools.speed
from downstream import bench, finetune, segment, upernet
from downstream.pairs import Pairs, read_numbers
from downstream.upernet import IGNORED, Segmenter, slide
from encoder import Encoder, UserError, ViT, parameter_groups
from experiments.dense import study
from tools.script import USER_ERRORS

SMALL = ["--width", "16", "--crop", "16", "--workers", "0", "--warmup", "0", "--drop_path", "0"]
COLOURS = np.array([(40, 60, 200), (220, 40, 40), (60, 200, 60)], np.uint8)


def save(path, x):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(x).save(path)


def shapes(folder, n=8, splits=("train", "val")):
    """A data set of n pictures 40 x 32 a split: two rectangles, in the colours of their classes, on a ground."""
    rng = np.random.default_rng(0)
    for split in splits:
        for i in range(n):
            mask = np.zeros((32, 40), np.uint8)
            a, b, c, d = 4 * rng.integers(2, 6, 4)
            mask[4:4 + a, 4:4 + b], mask[12:12 + c, 20:20 + d] = 1, 2
            mask = np.roll(mask, (4 * rng.integers(8), 4 * rng.integers(10)), (0, 1))
            noise = rng.normal(0, 10, (32, 40, 3))
            save(f"{folder}/{split}/images/{i}.png", (COLOURS[mask] + noise).clip(0, 255).astype(np.uint8))
            save(f"{folder}/{split}/masks/{i}.png", mask)
    json.dump(["sea", "red", "grass"], open(f"{folder}/classes.json", "w"))
    return folder


def backbone(seed=0, **changes):
    torch.manual_seed(seed)
    return Encoder(ViT(replace(MICRO_VIT, **changes)), 8)


def quietly(*flags):
    """What downstream.segment returns, and what it prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        return segment.main(list(map(str, flags))), out.getvalue()


def labels_of(folder, **flags):
    given = dict(data=[folder], classes=None, ignore=[255], reduce_zero_label=False)
    return segment.describe_labels(types.SimpleNamespace(**{**given, **flags}))


class ByRed:
    """In a model's place: it is sure of the class that a pixel's red says, as round(255 * red / 20)."""
    backbone = types.SimpleNamespace(latent_mean=torch.zeros(1))

    def logits(self, img):
        return F.one_hot((img[:, 0] * 255 / 20).round().long(), 5).permute(0, 3, 1, 2).float()


def test_pairs_are_found_in_every_layout():
    with tempfile.TemporaryDirectory() as tmp:
        shapes(f"{tmp}/a", 3)
        with zipfile.ZipFile(f"{tmp}/a.zip", "w") as z:
            for folder, _, files in os.walk(f"{tmp}/a"):
                for file in files:
                    z.write(f"{folder}/{file}", "top/" + os.path.relpath(f"{folder}/{file}", f"{tmp}/a"))
        for split, theirs in ("train", "training"), ("val", "validation"):
            for kind, folder in ("images", "images"), ("masks", "annotations"):
                os.makedirs(f"{tmp}/ade/{folder}", exist_ok=True)
                os.symlink(f"{tmp}/a/{split}/{kind}", f"{tmp}/ade/{folder}/{theirs}")
        expected = np.stack([np.array(Image.open(f"{tmp}/a/val/masks/{i}.png")) for i in range(3)])
        for root, names in (f"{tmp}/a", ["0", "1", "2"]), (f"{tmp}/a.zip", ["top/0", "top/1", "top/2"]), (
                f"{tmp}/ade", ["0", "1", "2"]):
            data = Pairs(root, "val", "masks")
            assert data.names == names and len(data) == 3
            read = list(data.every(data.read))
            assert (np.stack([mask for _, mask in read]) == expected).all()
            assert all((img.numpy().transpose(1, 2, 0) == np.array(Image.open(f"{tmp}/a/val/images/{i}.png"))).all()
                       for i, (img, _) in enumerate(read))
        both = Pairs([f"{tmp}/a", f"{tmp}/a.zip"], "val", "masks")
        assert len(both) == 6 and {both.path(i) for i in range(6)} == {
            os.path.join(root, f"val/images/{i}.png") for root in (f"{tmp}/a", f"{tmp}/a.zip/top") for i in range(3)}
        trained = Pairs(f"{tmp}/a", "train", "masks", train=True, seed=3)
        assert sorted(trained.index(n) for n in range(3, 6)) == [0, 1, 2]  # the second epoch


def test_masks_are_read_as_the_numbers_that_they_store():
    numbers = np.arange(64).reshape(8, 8) % 2
    for mode, bits in ("P", 1), ("P", 4), ("P", 8), ("1", 1), ("L", 8), ("I;16", 16):
        img, file = Image.fromarray(numbers.astype({"1": bool, "I;16": np.uint16}.get(mode, np.uint8))), io.BytesIO()
        if mode == "P":
            img.putpalette([255, 0, 0, 0, 0, 255])
        img.save(file, "PNG", bits=bits)
        assert (read_numbers(file.getvalue()) == numbers).all(), (mode, bits)
    # a grey PNG of 2 bits, by hand: PIL would read its 0, 1, 2, 3 as 0, 85, 170, 255
    chunk = lambda kind, x: struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0" + bytes([0b00011011]))) + chunk(b"IEND", b"")
    assert read_numbers(png).tolist() == [[0, 1, 2, 3]]


def test_labels_become_classes_as_the_data_set_means_them():
    """Names and numbers of CamVid's kind (the last one is no class), of ADE20K's (0 is no class), and by flags."""
    with tempfile.TemporaryDirectory() as tmp:
        for split in "training", "validation":
            save(f"{tmp}/images/{split}/x.png", np.zeros((2, 3, 3), np.uint8))
            save(f"{tmp}/annotations/{split}/x.png", np.array([[0, 1, 2], [150, 149, 0]], np.uint8))
        assert labels_of(tmp, classes=3) == dict(names=["0", "1", "2"], labels=[0, 1, 2], ignore=[255])
        assert labels_of(tmp, classes=3, ignore=[1, 9]) == dict(names=["0", "2"], labels=[0, 2], ignore=[1, 9])
        by_flag = labels_of(tmp, classes=150, reduce_zero_label=True)
        assert by_flag["labels"] == list(range(1, 151)) and by_flag["ignore"] == [0, 255]
        with open(f"{tmp}/objectInfo150.txt", "w") as f:
            f.write("Idx\tRatio\tTrain\tVal\tStuff\tName\n")
            f.writelines(f"{k}\t0.1\t9\t9\t0\tname {k}, other\n" for k in range(1, 151))
        found = labels_of(tmp)
        assert found == {**by_flag, "names": [f"name {k}" for k in range(1, 151)]}
        _, classes = segment.Masks(tmp, "val", found).load(0)
        assert classes.tolist() == [[IGNORED, 0, 1], [149, 148, IGNORED]]
        os.remove(f"{tmp}/objectInfo150.txt")
        json.dump(["sky", "road", "Unlabelled"], open(f"{tmp}/classes.json", "w"))
        assert labels_of(tmp) == dict(names=["sky", "road"], labels=[0, 1], ignore=[2, 255])


def test_figures_by_three_lines():
    """mIoU, aAcc, mAcc of a data set against sets of pixels; an ignored label, a class that is nowhere, and one that is
    predicted but never there."""
    rng, truths, guesses = np.random.default_rng(0), [], []
    with tempfile.TemporaryDirectory() as tmp:
        for i, (h, w) in enumerate([(9, 14), (20, 7), (12, 12)]):
            truth, guess = rng.choice([0, 1, 2, 255], (h, w)), rng.choice([0, 1, 2, 3], (h, w))
            save(f"{tmp}/val/images/{i}.png", np.repeat(20 * guess[..., None], 3, 2).astype(np.uint8))
            save(f"{tmp}/val/masks/{i}.png", truth.astype(np.uint8))
            truths.append(truth[truth != 255]), guesses.append(guess[truth != 255])
        data = segment.Masks(tmp, "val", labels_of(tmp, classes=5))
        windows = types.SimpleNamespace(crop=8, stride=5, short=0, batch_size=3, workers=0)
        found = segment.figures(segment.count_pixels(ByRed(), data, windows))
    t, g = np.concatenate(truths), np.concatenate(guesses)
    iou = [100 * ((t == k) & (g == k)).sum() / ((t == k) | (g == k)).sum() for k in range(4)]
    recall = [100 * ((t == k) & (g == k)).sum() / (t == k).sum() for k in range(3)]
    np.testing.assert_allclose([found["miou"], found["aacc"], found["macc"]],
                               [np.mean(iou), 100 * (t == g).mean(), np.mean(recall)])
    np.testing.assert_allclose(found["iou"][:4], iou)
    assert np.isnan(found["iou"][4]) and found["iou"][3] == 0
    raises(UserError, segment.figures, torch.zeros(2, 2), words="no pixel of any class")


def test_windows_cover_the_picture_and_overlaps_average():
    torch.manual_seed(0)
    img, model = torch.rand(3, 20, 24), Segmenter(backbone(), 3, width=16).eval()
    with torch.no_grad():
        close(slide(model.logits, img, 24, 7), model.logits(img[None])[0])  # one window is the plain forward
        some = slide(model.logits, img, 12, 5, batch=1)
        close(slide(model.logits, img, 12, 5, batch=4), some, 1e-5)
        windows = [(y, x) for y in (0, 5, 8) for x in (0, 5, 10, 12)]
        y, x = 9, 13  # a pixel that eight windows see
        seen = [(a, b) for a, b in windows if a <= y < a + 12 and b <= x < b + 12]
        mean = sum(model.logits(img[None, :, a:a + 12, b:b + 12])[0, :, y - a, x - b] for a, b in seen) / len(seen)
        assert len(seen) == 9
        close(some[:, y, x], mean, 1e-5)
    asked, numbered = [], iter(range(1, 100))

    def number(part):
        asked.extend(part[:, 0, 0, 0].tolist())
        return torch.stack([torch.full((1, 4, 4), float(next(numbered))) for _ in part])
    ramp = torch.arange(10.0).expand(3, 4, 10)
    # windows start at 0, 3 and 6: columns 3 and 6 are seen twice
    assert slide(number, ramp, 4, 3)[0, 0].tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3] and asked == [0, 3, 6]
    asked.clear()
    assert slide(number, ramp[:, :, :9], 4, 3).shape == (1, 4, 9) and asked == [0, 3, 5]  # the last ends at the edge
    given = lambda short: types.SimpleNamespace(crop=99, stride=9, short=short, batch_size=1)
    sizes, model = [], ByRed()
    model.logits = lambda x: sizes.append(tuple(x.shape[2:])) or ByRed().logits(x)
    for short, expected in (0, (20, 30)), (40, (40, 60)), (10, (10, 15)):
        classes = segment.predict_classes(model, torch.full((3, 20, 30), 60, dtype=torch.uint8), given(short))
        assert classes.shape == (20, 30) and (classes == 3).all() and sizes[-1] == expected
    segment.predict_classes(model, torch.zeros(3, 10, 100, dtype=torch.uint8), given(20))
    assert sizes[-1] == (8, 80)  # the longer side is at most 4 * short


def test_heads_have_the_parameters_that_one_counts():
    D, C, w = 32, 7, 16
    block = lambda i, o, k: i * o * k * k + 2 * o  # a convolution without bias, and a norm
    up = 4 * D * D + D  # a transposed convolution
    for patch, scales in (4, 0), (8, up), (16, 3 * up + 2 * D):  # 16: twice and a norm, and once
        model = Segmenter(backbone(patch=patch, size=4 * patch), C, width=w)
        expected = (scales + 4 * block(D, w, 1) + block(D + 4 * w, w, 3) + 3 * block(D, w, 1) + 3 * block(w, w, 3)
                    + block(4 * w, w, 3) + w * C + C + block(D, 256, 3) + 256 * C + C)
        assert sum(p.numel() for p in model.head.parameters()) == expected, patch
    assert sum(p.numel() for p in Segmenter(backbone(), C, "linear").head.parameters()) == D * C + C
    assert Segmenter(backbone(depth=12), C, width=w).head.layers == [3, 5, 7, None]
    with torch.device("meta"):  # ViT-L/14 and ADE20K
        large = upernet.UperHead(1024, 150, 24, 14, 512)
    assert large.layers == [7, 11, 15, None]
    up, D, w = 4 * 1024 ** 2 + 1024, 1024, 512
    assert sum(p.numel() for p in large.parameters()) == (
        3 * up + 2 * D + 7 * block(D, w, 1) + block(D + 4 * w, w, 3) + 3 * block(w, w, 3) + block(4 * w, w, 3)
        + w * 150 + 150 + block(D, 256, 3) + 256 * 150 + 150)


def test_uperhead_is_what_its_parts_give():
    """The head written out again, as plain functions of its parameters."""
    model = Segmenter(backbone(patch=8, size=32), 3, width=16).eval()
    for m in model.head.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1), m.running_var.uniform_(0.5, 2), m.weight.data.uniform_(0.5, 2)
    p = {**dict(model.head.named_parameters()), **dict(model.head.named_buffers())}

    def block(x, name, padding=0):
        x = F.conv2d(x, p[name + ".0.weight"], padding=padding)
        mean, var, gain, shift = (p[f"{name}.1.{k}"].view(-1, 1, 1)
                                  for k in ("running_mean", "running_var", "weight", "bias"))
        return ((x - mean) / (var + 1e-5).sqrt() * gain + shift).relu()
    grow = lambda x, like: F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
    torch.manual_seed(1)
    img = torch.rand(2, 3, 64, 96)
    tokens = model.backbone.features(img, [0, 0, 1, None])  # blocks 1, 1, 2 and 3 of 3
    maps = [((x - x.mean(2, keepdim=True)) / (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()).transpose(1, 2)
            .reshape(2, 32, 8, 12) for x in tokens]
    a = F.conv_transpose2d(maps[0], p["rescale.0.0.weight"], p["rescale.0.0.bias"], stride=2)  # stride 4 of patch 8
    b, c, d = maps[1], F.max_pool2d(maps[2], 2), F.max_pool2d(maps[3], 4)
    pools = [grow(block(F.adaptive_avg_pool2d(d, n), f"pool.{i}.1"), d) for i, n in enumerate((1, 2, 3, 6))]
    d = block(torch.cat([d, *pools], 1), "pooled", 1)
    aux = block(c, "auxiliary.0", 1)
    c = block(c, "lateral.2") + grow(d, c)
    b = block(b, "lateral.1") + grow(c, b)
    a = block(a, "lateral.0") + grow(b, a)
    a, b, c = block(a, "smooth.0", 1), block(b, "smooth.1", 1), block(c, "smooth.2", 1)
    joined = block(torch.cat([a, grow(b, a), grow(c, a), grow(d, a)], 1), "join", 1)
    expected = F.conv2d(joined, p["classifier.1.weight"], p["classifier.1.bias"])
    expected_aux = F.conv2d(aux, p["auxiliary.2.weight"], p["auxiliary.2.bias"])
    logits, auxiliary = model.outputs(img)
    close(logits, expected, 1e-4), close(auxiliary, expected_aux, 1e-4)
    # the losses: means over the pixels that count, of logits as large as the picture
    labels = torch.randint(3, (2, 64, 96), dtype=torch.uint8)
    labels[0, :50] = IGNORED
    picture = (255 * img).round().to(torch.uint8)
    expected, expected_aux = model.outputs(picture / 255)
    losses, known = model(picture, labels), labels != IGNORED
    for name, x, weight in ("loss_seg", expected, 1.0), ("loss_aux", expected_aux, 0.4):
        x = F.interpolate(x, (64, 96), mode="bilinear", align_corners=False).log_softmax(1)
        nll = -x.gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
        close(losses[name], weight * nll[known].mean(), 1e-5)
    assert all(x == 0 for x in model(picture, torch.full_like(labels, IGNORED)).values())  # and not nan


def test_pictures_of_any_size_become_whole_patches():
    seen = []
    model = Segmenter(backbone(patch=14, size=56), 3, "linear").eval()
    plain = model.backbone.features
    model.backbone.features = lambda img, layer: seen.append(tuple(img.shape[2:])) or plain(img, layer)
    for size, expected in ((512, 512), (518, 518)), ((504, 56), (504, 56)), ((5, 30), (14, 28)):
        with torch.no_grad():
            assert model.logits(torch.rand(1, 3, *size)).shape == (1, 3, *size) and seen[-1] == expected
    image = torch.rand(1, 3, 28, 42)
    with torch.no_grad():
        tokens = plain(image)  # after the final norm
        x = F.layer_norm(tokens, (32,)) @ model.head.classifier.weight.flatten(1).T + model.head.classifier.bias
        close(model.outputs(image)[0], x.transpose(1, 2).reshape(1, 3, 2, 3), 1e-5)


def test_rates_fall_from_the_head_to_the_patches():
    model, d = Segmenter(backbone(), 3, width=16), 0.5
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"])
             for group in parameter_groups(model, 1.0, 0.05, d) for p in group["params"]}
    for name, expected in {
            "head.classifier.1.weight": (1, 0.05), "head.join.1.weight": (1, 0), "head.pooled.0.weight": (1, 0.05),
            "backbone.vit.norm.weight": (1, 0), "backbone.vit.blocks.2.fc1.weight": (d, 0.05),
            "backbone.vit.blocks.0.qkv.bias": (d ** 3, 0), "backbone.vit.patch_embed.weight": (d ** 4, 0.05),
            "backbone.vit.pos_embed": (d ** 4, 0)}.items():
        assert found[name] == expected, (name, found[name])
    assert not any("latent_down" in name for name in found)
    losses = model(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8))
    sum(losses.values()).backward()  # no parameter is left without a gradient, which DDP would wait for
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_image_and_mask_are_cropped_and_mirrored_together():
    """Red is the column and the class is the column / 8: after any crop they still agree; what lies beyond the picture
    is grey and does not count."""
    columns = np.tile(np.arange(64, dtype=np.uint8), (48, 1))
    img = torch.from_numpy(np.stack([3 * columns, 0 * columns, 0 * columns]))
    mirrored, padded, scales = 0, 0, []
    with unittest.mock.patch.object(segment, "distort", lambda x, rng: x):
        for seed in range(60):
            x, y = segment.augment(img, columns // 8, 40, 0, np.random.default_rng(seed))
            again = segment.augment(img, columns // 8, 40, 0, np.random.default_rng(seed))
            assert torch.equal(x, again[0]) and torch.equal(y, again[1])
            assert x.shape == (3, 40, 40) and x.dtype == y.dtype == torch.uint8
            known = y != IGNORED
            assert (x[:, ~known] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]).all()
            red = x[0].float()[known] / 3
            assert (red - (8 * y[known] + 3.5)).abs().max() <= 4.8, seed
            row = x[0, 0, known[0]].int()
            mirrored += int(row[0] > row[-1])
            padded += int(not known.all())
            scales.append((len(row) - 1) / max(1, abs(int(row[-1]) - int(row[0])) / 3))
    assert 18 < mirrored < 42 and 5 < padded < 50
    assert 0.45 < min(scales) < 0.75 and 1.6 < max(scales) < 2.3  # pixels of the crop for one of the picture
    plain = np.zeros((30, 60), np.uint8)
    small = segment.augment(torch.zeros(3, 30, 60, dtype=torch.uint8), plain, 400, 90, np.random.default_rng(1))[1]
    height, width = (int((small != IGNORED).any(axis).sum()) for axis in (1, 0))
    assert 45 <= height <= 180 and abs(width - 2 * height) <= 1  # --short 90, times 0.5 to 2


def test_no_class_fills_a_crop_where_another_draw_avoids_it():
    """Columns 24 to 40 of 128 are class 1, and the rest class 0, but for stripes that do not count. Without the rule
    few crops would show enough of class 1."""
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 24:40] = 1
    mask[np.arange(64) % 8 < 4] = IGNORED
    img, good, first = torch.zeros(3, 64, 128, dtype=torch.uint8), 0, 0
    fine = lambda x: 0 < (x == 1).sum() and max((x == 0).sum(), (x == 1).sum()) < 0.75 * (x != IGNORED).sum()
    for seed in range(60):
        good += int(fine(segment.augment(img, mask, 32, 0, np.random.default_rng(seed))[1].numpy()))
        rng = np.random.default_rng(seed)
        scale = rng.uniform(0.5, 2)
        size = round(128 * scale), round(64 * scale)
        large = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        y, x = (int(rng.integers(side - 32 + 1)) for side in large.shape)
        first += int(fine(large[y:y + 32, x:x + 32]))
    assert first < 35 and good > first + 20, (first, good)


def test_colours_are_distorted_as_drawn():
    class Draws:
        """A generator that gives these numbers in turn: 0 for yes and 1 for no, then what is drawn."""
        def __init__(self, *numbers):
            self.numbers = list(numbers)

        def random(self):
            return self.numbers.pop(0)

        def uniform(self, low, high):
            x = self.numbers.pop(0)
            assert low <= x <= high, (low, x, high)
            return x
    img = np.random.default_rng(0).integers(0, 200, (8, 8, 3), dtype=np.uint8)
    same = segment.distort(img, Draws(1, 1, 1, 1))
    assert np.abs(same.astype(int) - img).max() <= 4  # rounded on the way to HSV and back
    lighter = segment.distort(img, Draws(0, 20, 1, 1, 1)).astype(int)
    assert np.abs(lighter - (img.astype(int) + 20)).max() <= 4
    harder = segment.distort(img, Draws(1, 0, 1.25, 1, 1)).astype(int)
    assert np.abs(harder - 1.25 * img).max() <= 5
    grey = segment.distort(img, Draws(1, 1, 0, 0.5, 1)).astype(float)
    spread = lambda x: (x.max(2) - x.min(2)) / np.maximum(x.max(2), 1)  # saturation
    assert np.abs(spread(grey) - 0.5 * spread(img.astype(float))).max() < 0.05
    red = np.full((4, 4, 3), (200, 0, 0), np.uint8)
    turned = segment.distort(red, Draws(1, 1, 1, 0, 1 / 12)).astype(int)  # 30 degrees: half way to yellow
    assert np.abs(turned - (200, 100, 0)).max() <= 6


def test_eight_pictures_are_learned_by_heart():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        data = segment.Masks(shapes(tmp), "train", labels_of(tmp))
        img, labels = map(torch.stack, zip(*((x, torch.from_numpy(y)) for x, y in map(data.load, range(8)))))
        model = Segmenter(backbone(), 3, width=16)
        optimizer = torch.optim.AdamW(parameter_groups(model, 2e-2, 0.0, 0.7))
        for _ in range(100):
            sum(model(img, labels).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        windows = types.SimpleNamespace(crop=40, stride=30, short=0, batch_size=8, workers=0)
        found = segment.figures(segment.count_pixels(model.eval(), data, windows))
    assert found["miou"] > 95, found


def trained(folder, out, *flags):
    """Path of a run of 4 steps, as far as its flags leave it so."""
    source = [] if "--teacher" in flags else ["--weights", tokenizer_file(folder)]
    quietly("train", "--data", shapes(f"{folder}/shapes", 4), *source, *SMALL, "--steps", 4, "--batch_size", 4, "--lr",
            1e-2, "--log_every", 1, "--eval_every", 0, "--out", f"{folder}/{out}", *flags)
    return f"{folder}/{out}"


def test_a_segmenter_resumes_exactly():
    with tempfile.TemporaryDirectory() as tmp:
        whole = trained(tmp, "whole", "--micro_batch", 2, "--save_every", 2, "--drop_path", 0.3)
        plain, calls = finetune.step, []

        def step(s, batches):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return plain(s, batches)
        with unittest.mock.patch.object(finetune, "step", step), contextlib.suppress(KeyboardInterrupt):
            trained(tmp, "killed", "--micro_batch", 2, "--save_every", 2, "--drop_path", 0.3)
        assert torch.load(f"{tmp}/killed/state.pt")["step"] == 2
        killed = trained(tmp, "killed", "--micro_batch", 2, "--save_every", 2, "--drop_path", 0.3)
        assert log_lines(killed) == log_lines(whole) and len(log_lines(whole)) == 5
        assert same_weights(f"{whole}/model.safetensors", f"{killed}/model.safetensors")
        evaluation = log_lines(whole)[-1]
        report, said = quietly("test", "--run", whole, "--data", f"{tmp}/shapes", "--workers", 0)
        for figure in "miou", "aacc", "macc":  # what training logged is what test finds
            assert abs(evaluation[figure] - report[figure]) < 1e-6
        assert f"mIoU {report['miou']:.2f}   aAcc" in said and "windows of 16 every 10 px" in said
        assert Image.open(f"{whole}/samples/step_0000004.png").width == 300  # truth | prediction


def test_what_is_trained_starts_from_the_weights_given():
    with tempfile.TemporaryDirectory() as tmp:
        start = load_file(tokenizer_file(tmp))
        for name, flags in {"linear": ["--head", "linear", "--frozen"], "head": ["--frozen"], "all": []}.items():
            run = load_file(trained(tmp, name, *flags) + "/model.safetensors")
            moved = [k for k in start if k.startswith("encoder.vit.")
                     and not torch.equal(start[k], run[k.replace("encoder.", "backbone.")])]
            assert bool(moved) == (name == "all"), (name, moved)
            assert ("head.classifier.weight" in run) == (name == "linear")
            assert len(moved) in (0, sum(k.startswith("encoder.vit.") for k in start) - 2)  # all but mean and std
        run = trained(tmp, "teacher", "--teacher", micro_teacher(tmp), "--frozen")
        teacher, of_teacher = load_file(micro_teacher(tmp)), load_file(f"{run}/model.safetensors")
        assert all(torch.equal(x, of_teacher[f"backbone.vit.{k}"]) for k, x in teacher.items())
        parsed = lambda *flags: segment.parse_args(["train", "--data", "x", "--weights", "y", *flags])
        args = parsed()  # BEiT-L's recipe on ADE20K
        assert (args.steps, args.batch_size, args.weight_decay, args.layer_decay, args.drop_path, args.lr_decay,
                args.decay_shape, args.crop, args.width) == (160_000, 16, 0.05, 0.95, 0.2, 1.0, "linear", 512, 512)
        for flags, lr, warmup in ([], 2e-5, 1500), (["--frozen"], 1e-3, 1500), (["--steps", "300"], 2e-5, 3), (
                ["--epochs", "50", "--batch_size", "2", "--lr", "0.5"], 0.5, 1), (["--warmup", "7"], 2e-5, 7):
            args = segment.parse_args(["train", "--data", f"{tmp}/shapes", "--weights", tokenizer_file(tmp),
                                       "--workers", "0", *flags])
            with unittest.mock.patch.object(finetune, "train", lambda args, *others, **more: None), \
                    contextlib.redirect_stdout(io.StringIO()):
                segment.train(args)
            assert (args.lr, args.warmup) == (lr, warmup), flags


def test_ranks_give_the_figures_of_one():
    with tempfile.TemporaryDirectory() as tmp:
        run, flags = trained(tmp, "run"), ["--data", f"{tmp}/shapes", "--workers", "0", "--stride", "7"]
        alone, _ = quietly("test", "--run", run, *flags)
        done = run_ranks(2, "python", "-m", "downstream.segment", "test", "--run", run, *flags, "--out",
                         f"{tmp}/two.json")
        assert all(x.returncode == 0 for x in done), done
        two = json.load(open(f"{tmp}/two.json"))
        assert two["ranks"] == 2 and {k: two[k] for k in ("miou", "aacc", "macc", "iou", "images")} == {
            k: alone[k] for k in ("miou", "aacc", "macc", "iou", "images")}


def test_prediction_draws_a_legend_and_writes_the_masks_own_numbers():
    with tempfile.TemporaryDirectory() as tmp:
        names = ["sky", "road"]
        classes = np.zeros((20, 300), np.uint8)
        classes[:, 200:], classes[5, 5] = 1, IGNORED
        img = torch.full((3, 20, 300), 100, dtype=torch.uint8)
        drawn = np.asarray(segment.overlay(img, classes, names)).astype(int)
        assert drawn.shape == (20 + 18 + 4, 300, 3)
        for k, column in (0, 100), (1, 250):
            expected = 0.45 * 100 + 0.55 * np.array(segment.colour(k))
            assert np.abs(drawn[10, column] - expected).max() <= 1
            assert (drawn[30, 150 * k + 8] == segment.colour(k)).all()  # the larger class first
        assert np.abs(drawn[5, 5] - 45).max() <= 1
        assert len({segment.colour(k) for k in range(150)}) == 150
        config = {**labels_of(tmp, classes=3, reduce_zero_label=True), "head": "linear", "width": 16, "crop": 16,
                  "short": 0}
        model = segment.build(config, backbone())
        with unittest.mock.patch.object(finetune, "load_model", lambda run, build, device: (model.eval(), config)):
            Image.fromarray(img[:, :, :40].permute(1, 2, 0).numpy()).save(f"{tmp}/a.png")
            _, said = quietly("predict", "--run", "x", f"{tmp}/a.png", "--out", f"{tmp}/new/out")
        expected = segment.predict_classes(model, img[:, :, :40], types.SimpleNamespace(crop=16, stride=10, short=0,
                                                                                       batch_size=8))
        mask = np.array(Image.open(f"{tmp}/new/out/a_mask.png"))
        assert (mask == expected.numpy() + 1).all() and mask.dtype == np.uint8  # 1 to 3: 0 is no class
        assert Image.open(f"{tmp}/new/out/a_overlay.png").width == 150 and "a_overlay.png" in said


def test_bad_data_is_named_in_one_line():
    with tempfile.TemporaryDirectory() as tmp:
        def ask(change, words, *flags):
            folder = tempfile.mkdtemp(dir=tmp)
            shapes(folder, 3)
            change(folder)
            raises(USER_ERRORS, segment.main, ["train", "--data", folder, "--weights", tokenizer_file(tmp), "--out",
                                               f"{tmp}/out", *SMALL, *flags], words=words)
        blank, colour = np.zeros((32, 41), np.uint8), np.zeros((32, 40, 3), np.uint8)

        def two_sizes(folder):
            save(f"{folder}/train/masks/0.png", blank), save(f"{folder}/train/masks/2.png", blank)
        ask(two_sizes, ["2 of 3 pairs", "0.png is 41x32, its image 40x32", "2.png is 41x32"])
        ask(lambda folder: save(f"{folder}/train/masks/1.png", blank[:, :40] + 9), ["1.png has the label 9", "255"])
        ask(lambda folder: os.remove(f"{folder}/train/masks/1.png"), ["1 files", "train/images/1.png", "no partner"])
        ask(lambda folder: os.remove(f"{folder}/val/images/1.png"), ["val/masks/1.png", "no partner"])
        ask(lambda folder: save(f"{folder}/train/masks/1.png", colour), ["1.png", "RGB", "one channel"])
        ask(lambda folder: open(f"{folder}/train/masks/1.png", "wb").write(b"no"), ["masks/1.png", "cannot be read"])
        ask(lambda folder: open(f"{folder}/train/images/1.png", "wb").write(b"no"), ["images/1.png", "cannot be read"])

        def lossy(folder):
            os.remove(f"{folder}/train/masks/1.png"), save(f"{folder}/train/masks/1.jpg", blank[:, :40])
        ask(lossy, ["1.jpg", "JPEG", "without loss"])
        ask(lambda folder: save(f"{folder}/train/images/1.bmp", colour), ["1.bmp", "have the same name"])
        ask(lambda folder: os.remove(f"{folder}/classes.json"), ["0 classes", "classes.json", "--classes"])
        ask(lambda folder: json.dump(5, open(f"{folder}/classes.json", "w")), ["classes.json", "no list of names"])
        ask(lambda folder: os.rename(folder, folder + "x"), ["no such folder or archive"])
        ask(lambda folder: None, ["split nights", "no pairs"], "--split", "nights")
        ask(lambda folder: None, ["two pictures", "--micro_batch"], "--micro_batch", "1")


def test_bench_counts_what_a_step_costs():
    class Stub(torch.nn.Module):
        """2 x 6 x 5 FLOP a picture, in a forward pass."""
        def __init__(self):
            super().__init__()
            self.backbone, self.linear = backbone(), torch.nn.Linear(6, 5)

        def forward(self, img):
            return {"loss": self.linear(img.flatten(1)).mean()}
    for frozen, share in (False, 3), (True, 1):
        model, img = Stub(), torch.rand(4, 3, 1, 2)
        model.backbone.requires_grad_(not frozen)
        took = lambda f, repeats=10: (f(), 2e-12)[1]
        with contextlib.redirect_stdout(io.StringIO()) as said, unittest.mock.patch.object(bench, "seconds", took), \
                unittest.mock.patch.object(tools.speed, "seconds", took):
            bench.measure_speed("stub", model, (img,), lambda: model(img), {"some": 3.6e15})
        training, hours, prediction = said.getvalue().splitlines()[1:]
        ceiling = 2 * 1024 ** 3 / 2e-12
        for line, rate in (training, share * 240 / 2e-12), (prediction, 240 / 2e-12):
            assert "| %8.4g img/s | %6.4g TFLOP/s | %.3f of" % (4 / 2e-12, rate / 1e12, rate / ceiling) in line, line
        assert f"{3.6e15 / 4 * 2e-12 / 3600:,.1f} hours for some" in hours  # 0.5
    small = ["--teacher", "tiny", "--crop", "16", "--width", "16", "--batch_size", "2"]
    assert "prediction" in quietly("bench", *small)[1]


def test_the_study_fits_and_names_what_the_scripts_know():
    torch.manual_seed(0)
    x = torch.randn(300, 4) * torch.tensor([1.0, 5, 0.1, 2]) + torch.tensor([0.0, 3, 1, -2])
    y = (x @ torch.randn(4, 3) + torch.randn(300, 3)).argmax(1)
    weight, bias = study.fit(x, y, 3)
    error = (x @ weight.T + bias).softmax(1) - F.one_hot(y, 3)  # at the optimum the gradient vanishes
    std = x.std(0)
    gradient = error.T @ ((x - x.mean(0)) / std) / 300 + 2e-4 * weight * std
    assert gradient.abs().max() < 1e-3 and error.mean(0).abs().max() < 1e-3
    for flags in study.FLAGS["seg"][2].values():
        args = segment.parse_args(["train", "--data", "x", *study.CODES["random"], *study.LOOP.split(), *flags.split()])
        assert args.crop == 352 and args.lr_decay == 1
    assert len({row for row in study.ROWS if row.startswith("seg:")}) == 5 * 3 * 2
