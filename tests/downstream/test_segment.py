"""downstream/segment.py, upernet.py and pairs.py: UperNet, masks, mIoU, windows, and the command line"""
from tests.helpers import (  # first: it sets the environment that torch reads
    MICRO_VIT, bounds, close, demands, gpu_takes_bf16, killed_in_step, log_lines, micro_teacher, raises, refused,
    run_ranks, same_weights, tokenizer_file)

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
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import tools.speed
from data import UserError as DataError, cores
from downstream import bench, finetune, segment, upernet
from downstream.pairs import Pairs, list_some, read_numbers
from downstream.upernet import IGNORED, Segmenter, slide
from encoder import TEACHERS, Encoder, UserError, ViT, parameter_groups
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
    for error in OSError, ValueError, SyntaxError, KeyError, IndexError:  # what PIL raises of a damaged file
        with unittest.mock.patch("downstream.pairs.open_image", side_effect=error("a\n b")):
            words = "'a\\n b'" if error is KeyError else "a b"
            refused(DataError, read_numbers, png, says="it cannot be read as labels or depth, whole numbers in one "
                    f"channel ({words})")


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
    assert not slide(model.logits, img, 12, 5).requires_grad, "no gradients are kept"
    asked, numbered = [], iter(range(1, 100))

    def number(part):
        asked.extend(part[:, 0, 0, 0].tolist())
        return torch.stack([torch.full((1, 4, 4), float(next(numbered))) for _ in part])
    ramp = torch.arange(10.0).expand(3, 4, 10)
    # windows start at 0, 3 and 6: columns 3 and 6 are seen twice
    assert slide(number, ramp, 4, 3)[0, 0].tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3] and asked == [0, 3, 6]
    asked.clear()
    assert slide(number, ramp[:, :, :9], 4, 3).shape == (1, 4, 9) and asked == [0, 3, 5]  # the last ends at the edge
    asked.clear()
    assert slide(number, ramp, 4, 4).isfinite().all() and asked == [0, 4, 6]
    for stride in 0, 5:
        raises(ValueError, slide, number, ramp, 4, stride, words="expected 1 to 4")
    given = lambda short: types.SimpleNamespace(crop=99, stride=9, short=short, batch_size=1)
    sizes, model = [], ByRed()
    model.logits = lambda x: sizes.append(tuple(x.shape[2:])) or ByRed().logits(x)
    for short, expected in (0, (20, 30)), (40, (40, 60)), (10, (10, 15)):
        classes = segment.predict_classes(model, torch.full((3, 20, 30), 60, dtype=torch.uint8), given(short))
        assert classes.shape == (20, 30) and (classes == 3).all() and sizes[-1] == expected
    for side, short, expected in (10, 20, (8, 80)), (1, 10, (1, 40)), (50, 20, (20, 40)):
        for turned in 1, -1:  # the shorter side becomes `short`, the longer at most 4 times that, and none 0
            img = torch.zeros(3, *(side, 100)[::turned], dtype=torch.uint8)
            segment.predict_classes(model, img, given(short))
            assert sizes[-1] == expected[::turned]


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
    head = Segmenter(backbone(), 16, width=16).head  # as many classes as channels: the classifiers alone begin small
    assert [round(m.weight.std().item(), 2) for m in (head.classifier[1], head.auxiliary[2], head.join[0])] == [
        0.01, 0.01, round((1 / 3 / (4 * 16 * 9)) ** 0.5, 2)]
    assert Segmenter(backbone(depth=12), C, width=w).head.layers == [3, 5, 7, None]
    assert Segmenter(backbone(depth=1), C, width=w).head.layers == [0, 0, 0, None]
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
    for shape in (1, 60), (60, 1):  # no side becomes 0
        for seed in range(6):
            x, y = segment.augment(torch.zeros(3, *shape, dtype=torch.uint8), np.zeros(shape, np.uint8), 8, 4,
                                   np.random.default_rng(seed))
            assert x.shape == (3, 8, 8) and 0 < (y != IGNORED).sum() <= 16


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


def test_another_draw_where_a_class_fills_a_crop():
    """Ten draws at most, each of two numbers: of 3 pixels of 4 a class has too many, of 2 of 3 it has not."""
    calls = []
    rng = types.SimpleNamespace(uniform=lambda low, high: 1.0, random=lambda: 0.5,
                                integers=lambda n: calls.append(n) or 0)
    for numbers, draws in ([0, 0, 0, 1], 10), ([0, 1, 1, IGNORED], 1), ([2, 2, 2, 2], 10), ([IGNORED] * 4, 10):
        calls.clear()
        img, classes = segment.augment(torch.full((3, 2, 2), 99, dtype=torch.uint8), np.uint8([numbers[:2],
                                       numbers[2:]]), 3, 0, rng)
        assert calls == 2 * draws * [1] and classes[:2, :2].flatten().tolist() == numbers
        assert (img[:, :2, :2] == 99).all() and (classes[2] == IGNORED).all() and (classes[:, 2] == IGNORED).all()


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
    same = segment.distort(img, Draws(1, 0.5, 1, 0.5))
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
        with killed_in_step(finetune, 4):
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
        many = segment.overlay(img, 0 * classes + IGNORED, [str(k) for k in range(255)])  # 255 is no class even here
        assert many.size == (300, 24) and (np.asarray(many)[20:] == 255).all()
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
        for wrong in 5, "sky", {"0": "sky"}:
            ask(lambda folder: json.dump(wrong, open(f"{folder}/classes.json", "w")),
                ["classes.json", 'no list of names, such as ["sky", "road"]'])
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
            grads = []
            predict = lambda: grads.append(torch.is_grad_enabled()) or model(img)
            bench.measure_speed("stub", model, (img,), predict, {"some": 3.6e15})
        assert grads == [False]
        training, hours, prediction = said.getvalue().splitlines()[1:]
        ceiling = 2 * 1024 ** 3 / 2e-12
        for line, rate in (training, share * 240 / 2e-12), (prediction, 240 / 2e-12):
            assert "| %8.4g img/s | %6.4g TFLOP/s | %.3f of" % (4 / 2e-12, rate / 1e12, rate / ceiling) in line, line
        assert f"{3.6e15 / 4 * 2e-12 / 3600:,.1f} hours for some" in hours  # 0.5
    small = ["--teacher", "tiny", "--crop", "16", "--width", "16", "--batch_size", "2"]
    assert "prediction" in quietly("bench", *small)[1]
    # the memory of each is its own: training's 5 GiB are not prediction's
    peaks, last = iter([5, 2]), [0]

    class OnGPU(list):
        device, shape = torch.device("cuda"), (4, 3, 1, 2)

    def took(f, repeats=10):
        last[0] = max(last[0], next(peaks))
        return 1.0
    model = Stub()
    model.forward = lambda img: {"loss": model.linear.weight.sum()}
    with contextlib.redirect_stdout(io.StringIO()) as said, unittest.mock.patch.object(
            torch, "autocast", lambda *how, **more: contextlib.nullcontext()), unittest.mock.patch.multiple(
            bench, seconds=took, matrix_ceiling=lambda device: (1, 1.0)), unittest.mock.patch.multiple(
            torch.cuda, get_device_name=lambda: "some GPU", reset_peak_memory_stats=lambda: last.__setitem__(0, 0),
            max_memory_allocated=lambda: last[0] * 2 ** 30):
        bench.measure_speed("stub", model, (OnGPU([0] * 4),), None, {})
    assert [line.split("| ")[-1] for line in said.getvalue().splitlines()[1:]] == ["5.0 GiB", "2.0 GiB"]


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


def test_a_training_sample_is_the_literal_one():
    """Every number of it, written out again: order and draws of (seed, n), sizes, the crop's rule, colours, mirror."""
    def yes(rng, low, high, none):
        return rng.uniform(low, high) if rng.random() < 0.5 else none
    with tempfile.TemporaryDirectory() as tmp:
        shapes(tmp, 5, ["train"])
        for short, size in (20, 24), (0, 40):
            data = segment.Masks(tmp, "train", labels_of(tmp), size, short, train=True, seed=3)
            for n in range(20):
                i = np.random.default_rng([3, n // 5]).permutation(5)[n % 5]
                img, mask = (Image.open(f"{tmp}/train/{kind}/{i}.png") for kind in ("images", "masks"))
                rng = np.random.default_rng([3, n, 1])
                scale = rng.uniform(0.5, 2) * (short / 32 if short else 1)
                h, w = round(32 * scale), round(40 * scale)
                mask = np.array(mask.resize((w, h), Image.Resampling.NEAREST))
                for _ in range(10):
                    y, x = rng.integers(max(h - size, 0) + 1), rng.integers(max(w - size, 0) + 1)
                    part = mask[y:y + size, x:x + size]
                    shares = [(part == k).mean() for k in range(3)]
                    if sorted(shares)[1] > 0 and max(shares) < 0.75:
                        break
                picture = np.array(img.resize((w, h), Image.Resampling.BILINEAR))[y:y + size, x:x + size].astype(float)
                brightness, contrast = yes(rng, -32, 32, 0), yes(rng, 0.5, 1.5, 1)
                saturation, hue = yes(rng, 0.5, 1.5, 1), yes(rng, -0.1, 0.1, 0)
                picture = np.floor(((picture + brightness) * contrast).clip(0, 255)).astype(np.uint8)
                hsv = np.array(Image.fromarray(picture).convert("HSV")).astype(float)
                hsv[..., 0], hsv[..., 1] = (hsv[..., 0] + 256 * hue) % 256, hsv[..., 1] * saturation
                hsv = [Image.fromarray(x) for x in hsv.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1)]
                picture = np.array(Image.merge("HSV", hsv).convert("RGB"))
                if rng.random() < 0.5:
                    picture, part = picture[:, ::-1], part[:, ::-1]
                expected = np.tile(np.uint8((124, 116, 104)), (size, size, 1))
                labels = np.full((size, size), 255)
                expected[:len(part), :part.shape[1]], labels[:len(part), :part.shape[1]] = picture, part
                found = data[n]
                assert np.array_equal(found[1].numpy(), labels), (short, n)
                assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected).max() == 0, (short, n)


def test_names_of_classes_lie_at_the_top():
    """Of an archive's files of that very name the one nearest to its top; --classes wins; names of no class."""
    with tempfile.TemporaryDirectory() as tmp:
        path = f"{tmp}/set.zip"

        def archive(**files):
            with zipfile.ZipFile(path, "w") as z:
                for name, content in files.items():
                    z.writestr(name.replace("__", "/") + ".json", json.dumps(content))
            return path
        given = dict(old_classes=["old"], data__v2__classes=["sky", "road"], data__v2__more__deep__classes=["no"])
        assert labels_of(archive(**given))["names"] == ["sky", "road"]
        assert labels_of(archive(data__v2__more__deep__classes=["no"], data__v2__classes=["sky"]))["names"] == ["sky"]
        raises(UserError, labels_of, archive(old_classes=["old"]), words="0 classes")
        assert labels_of(archive(classes=["a", "b"]), classes=3)["names"] == ["0", "1", "2"]
        names = ["Void", "sky", "UNLABELED", "unlabelled", "road", "Ignore", "ignored", "avoid"]
        kept = dict(names=["sky", "road", "avoid"])
        assert labels_of(archive(classes=names)) == {**kept, "labels": [1, 4, 7], "ignore": [0, 2, 3, 5, 6, 255]}
        assert labels_of(path, reduce_zero_label=True) == {
            **kept, "labels": [2, 5, 8], "ignore": [0, 1, 3, 4, 6, 7, 255]}
        assert labels_of(archive(classes=[1, 2.5, None])) == dict(names=["1", "2.5", "None"], labels=[0, 1, 2],
                                                                  ignore=[255])
        for n, fits in (255, True), (256, False):
            archive(classes=[f"class {k}" for k in range(n)])
            if fits:
                assert labels_of(path, ignore=[])["labels"] == list(range(255))
            else:
                refused(UserError, lambda: labels_of(path, ignore=[]),
                        says=f"{path}: 256 classes, by its classes.json or --classes, less --ignore; expected 1 to "
                        "255: give a classes.json, a list of names, or --classes")
        archive(classes=["a"])
        assert segment.read_beside(path, "objectInfo150.txt") is None and segment.read_beside(path, "a.json") is None
        ade = f"{tmp}/ade"
        os.makedirs(ade)
        open(f"{ade}/objectInfo150.txt", "w").write("Idx\tName\n1\twall, side\n2\tsky\n")
        assert labels_of(ade) == dict(names=["wall", "sky"], labels=[1, 2], ignore=[0, 255])
        assert labels_of(ade, classes=3) == dict(names=["0", "1", "2"], labels=[1, 2, 3], ignore=[0, 255])
        save(f"{tmp}/set/val/images/x.png", np.zeros((1, 4, 3), np.uint8))
        save(f"{tmp}/set/val/masks/x.png", np.array([[1, 2, 3, 9]], np.uint8))
        data = segment.Masks(f"{tmp}/set", "val", dict(labels=[1, 2], ignore=[3, 255]))
        refused(UserError, data.load, 0, says=f"{tmp}/set/val/masks/x.png has the label 9; expected 1 to 2, or 3, 255 "
                "for none")


def test_a_prediction_is_the_literal_one():
    """The picture in [0, 1], resized with antialiasing, its windows, logits enlarged before one is chosen."""
    torch.manual_seed(0)
    img, model, weight = torch.randint(256, (3, 20, 30), dtype=torch.uint8), ByRed(), torch.randn(5, 3, 1, 1)
    model.logits = lambda x: F.conv2d(x, weight)
    asked = []

    def windows(predict, img, *rest):
        asked.append(rest)
        return slide(predict, img, *rest)
    enlarged, resize = [], upernet.resize
    with unittest.mock.patch.object(segment, "slide", windows), unittest.mock.patch.object(
            segment, "resize", lambda x, size: enlarged.append(x.shape[:2]) or resize(x, size)):
        for short, size in (0, (20, 30)), (8, (8, 12)), (33, (33, 50)):  # 49.5 is rounded to the even 50
            x = F.interpolate(img[None] / 255, size, mode="bilinear", antialias=True) if short else img[None] / 255
            logits = F.interpolate(F.conv2d(x, weight), (20, 30), mode="bilinear", align_corners=False)
            args = types.SimpleNamespace(crop=7, stride=5, short=short, batch_size=4)
            found = segment.predict_classes(model, img, args)
            assert torch.equal(found, logits[0].argmax(0)) and len(found.unique()) > 1
    assert asked == [(7, 5, 4)] * 3
    assert {*enlarged} == {(1, 1)}, "of a large photo not all classes at a time"
    model.logits = lambda x: x.new_zeros(len(x), 5, *x.shape[2:])
    assert not segment.predict_classes(model, img, args).any(), "of equal ones the first, as argmax takes"
    with tempfile.TemporaryDirectory() as tmp:  # each second picture alone
        for i in range(5):
            save(f"{tmp}/val/images/{i}.png", np.full((1, 1 + i, 3), 20, np.uint8))
            save(f"{tmp}/val/masks/{i}.png", np.full((1, 1 + i), 2, np.uint8))
        data = segment.Masks(tmp, "val", labels_of(tmp, classes=3))
        args = types.SimpleNamespace(crop=9, stride=9, short=0, batch_size=1, workers=0)
        for every, pixels in (1, 15), (2, 1 + 3 + 5), (3, 1 + 4):
            ones = lambda model, img, args: 0 * img[0].long() + 1
            with unittest.mock.patch.object(segment, "predict_classes", ones):
                assert segment.count_pixels(None, data, args, every).tolist() == [[0] * 3, [0] * 3, [0, pixels, 0]]


def test_tests_and_predictions_do_what_they_are_told():
    """What the flags of test and predict become, and every word of the report."""
    config = dict(names=["sea", "red", "grass", "none"], labels=[0, 1, 2, 256], ignore=[7, 255], crop=16, short=20,
                  step=5, head="linear", width=16)
    seen, model = [], types.SimpleNamespace()

    def guess(model, img, args):
        seen.append((args.crop, args.stride, args.short, args.batch_size, torch.is_autocast_enabled("cpu"),
                     torch.is_grad_enabled()))
        return torch.where(img[0] > 128, 3, 0).long()
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(segment, "predict_classes", guess), \
            unittest.mock.patch.object(finetune, "load_model", lambda run, build, device: (model, config)):
        for i, (mask, red) in enumerate([([[0, 0, 1, 2]], [0, 0, 0, 200]), ([[2, 255, 0]], [0, 0, 250])]):
            save(f"{tmp}/val/masks/{i}.png", np.array(mask, np.uint8))
            save(f"{tmp}/val/images/{i}.png", np.repeat(np.array([red], np.uint8)[..., None], 3, 2))
        test = ["test", "--run", "RUN", "--data", tmp, "--workers", 0]
        report, said = quietly(*test, "--bf16")
        # sea: there three times and predicted four times, twice rightly; red, grass: not found; none: predicted twice
        expected = dict(miou=40 / 4, aacc=100 * 2 / 6, macc=100 * 2 / 3 / 3)
        assert all(abs(report[k] - x) < 1e-4 for k, x in expected.items()) and report["iou"] == [40, 0, 0, 0]
        assert [report[k] for k in ("run", "step", "data", "images", "names")] == ["RUN", 5, [tmp], 2, config["names"]]
        assert report["protocol"] == (
            "each picture resized to a shorter side of 20; windows of 16 every 10 px, logits averaged and resized to "
            "the mask; intersections and unions summed over all 2 pictures of val; labels 7 255 do not count; bf16 "
            "autocast")
        assert [line.split() for line in said.splitlines()[-6:]] == [
            ["sea", "40.00"], ["red", "0.00"], ["grass", "0.00"], ["none", "0.00"], [],
            "mIoU 10.00 aAcc 33.33 mAcc 22.22".split()]
        assert seen == 2 * [(16, 10, 20, 8, True, True)]
        seen.clear()
        report, _ = quietly(*test, "--fp32", "--short", 0, "--stride", 3, "--batch_size", 2, "--out",
                            f"{tmp}/new/r.json")
        assert report["protocol"].startswith("each picture at its own size; windows of 16 every 3 px, ")
        assert report["protocol"].endswith("; fp32 without TF32") and seen == 2 * [(16, 3, 0, 2, False, True)]
        assert json.load(open(f"{tmp}/new/r.json"))["miou"] == report["miou"]
        raises(USER_ERRORS, quietly, *test, "--out", f"{tmp}/new", words=f"{tmp}/new is a folder: give the name of")
        mask = f"{tmp}/val/masks/0.png"
        refused(USER_ERRORS, quietly, "test", "--run", "RUN", "--data", tmp, mask, "--out", mask,
                says=f"{mask} would be read and overwritten: give another name")
        refused(USER_ERRORS, quietly, "predict", "--run", "RUN", f"{tmp}/val/images", "--out", mask,
                says=f"{mask} cannot be made a folder, because a file is in its place: give another one")
        seen.clear()
        save(f"{tmp}/other/0.png", np.full((9, 9, 3), 99, np.uint8))
        predict = ["predict", "--run", "RUN", f"{tmp}/val/images", f"{tmp}/other/0.png", "--out", f"{tmp}/out"]
        with unittest.mock.patch.object(segment, "overlay", lambda img, classes, names: Image.fromarray(
                np.uint8([[len(names), img[0, 0, -1], classes[0, -1]]]))):
            _, said = quietly(*predict, "--bf16", "--short", 7)
        stems = [f"{tmp}/out/{name}" for name in ("0", "1", "0_2")]  # two pictures have one name
        assert said.splitlines() == [f"{stem}_overlay.png, {stem}_mask.png" for stem in stems]
        overlays, masks = ([np.array(Image.open(f"{stem}_{kind}.png")).tolist() for stem in stems]
                           for kind in ("overlay", "mask"))
        assert overlays == [[[4, 200, 3]], [[4, 250, 3]], [[4, 99, 0]]]
        assert masks == [[[0, 0, 0, 256]], [[0, 0, 256]], [[0] * 9] * 9]  # in 16 bits, as a label is above 255
        assert seen == 3 * [(16, 10, 7, 8, True, False)]
        seen.clear(), quietly(*predict, "--fp32", "--stride", 16, "--batch_size", 3)
        assert seen == 3 * [(16, 16, 20, 3, False, False)]
        for command in test, predict:
            raises(UserError, quietly, *command, "--stride", 17,
                   words="--stride 17 leaves pixels that no window sees: windows are 16 px wide")
        for name in "damaged", "worse":  # what can be read is predicted, wherever it stands
            open(f"{tmp}/{name}.png", "w").write("no picture")
        raises(USER_ERRORS, quietly, *predict[:3], f"{tmp}/damaged.png", f"{tmp}/other/0.png", f"{tmp}/worse.png",
               "--out", f"{tmp}/rest", words=[f"2 of 3 pictures cannot be read: {tmp}/damaged.png cannot be read",
                                              f"; {tmp}/worse.png cannot be read"])
        assert sorted(os.listdir(f"{tmp}/rest")) == ["0_mask.png", "0_overlay.png"]


def test_training_and_bench_hand_on_what_they_are_told():
    seen = []
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(
            finetune, "train", lambda *args, **rest: seen.append((args, rest))):
        base = ["train", "--data", shapes(f"{tmp}/a", 4, ["train", "dusk"]), shapes(f"{tmp}/b", 3, ["train", "dusk"]),
                "--weights", tokenizer_file(tmp), *SMALL, "--val_split", "dusk"]
        _, said = quietly(*base, "--seed", 3, "--short", 20, "--ignore", 2, 9, "--lr", 0, "--drop_path", 0.25)
        assert said == ("data: 7 pairs to train on, 7 to evaluate, 2 classes; labels 2 9 do not count; each pair is "
                        "read before the first step\n")
        (args, model, data, evaluate, config), rest = seen.pop()
        assert config == dict(names=["sea", "red"], labels=[0, 1], ignore=[2, 9], head="upernet", width=16, crop=16,
                              short=20)
        assert (data.crop, data.short, data.train, data.seed) == (16, 20, True, 3) and "/train/images/" in data.path(0)
        assert (args.lr, args.stride, model.backbone.vit.drop_path, args.warmup) == (0, 10, 0.25, 0)
        assert model.head.join[0].out_channels == 16 and model.head.classifier[1].out_channels == 2
        val, calls = [], []

        def count(model, data, args, every=1):
            val.append(data), calls.append((args.crop, args.stride, args.short, every))
            return torch.tensor([[3, 1], [2, 4]])
        with unittest.mock.patch.object(segment, "count_pixels", count):
            found = evaluate()
        assert found.keys() == {"miou", "aacc", "macc"} and calls == [(16, 10, 20, 1)]
        assert abs(found["macc"] - (75 + 200 / 3) / 2) < 1e-4 and abs(found["miou"] - (50 + 400 / 7) / 2) < 1e-4
        assert len(val[0]) == 7 and not val[0].train and "/dusk/images/" in val[0].path(0)
        with unittest.mock.patch.object(segment, "predict_classes", lambda model, img, args: 0 * img[0].long() + 1):
            picture = np.array(rest["picture"]())
        img, classes = val[0].load(0)
        truth, wrong = (np.array(segment.overlay(img, x, ["sea", "red"])) for x in (classes, 0 * classes + 1))
        assert np.array_equal(picture[:len(truth), :150], truth) and np.array_equal(picture[:len(wrong), 150:], wrong)
        assert picture.shape == (max(len(truth), len(wrong)), 300, 3) and len(truth) > len(wrong)
        assert (picture[len(wrong):, 150:] == 255).all()
        part = torch.arange(32 * 40).view(32, 40) % 2  # two lines of the legend, where the truth has one
        with unittest.mock.patch.object(segment, "predict_classes", lambda model, img, args: part), \
                unittest.mock.patch.object(segment.Masks, "load", lambda self, i: (img, 0 * classes)):
            picture, found = np.array(rest["picture"]()), np.array(segment.overlay(img, part, ["sea", "red"]))
        assert np.array_equal(picture[:, 150:], found) and (picture[len(found) - 18:, :150] == 255).all()
        # two pictures at a time are what a batch norm needs, on one rank; a linear head has none
        for more in ["--batch_size", 3, "--micro_batch", 2], ["--micro_batch", 1], ["--batch_size", 1]:
            raises(UserError, quietly, *base, *more, words="needs two pictures at a time")
        two = ["--batch_size", 2]  # one a rank: on GPUs the norm sees both
        with unittest.mock.patch.object(segment, "rank_and_device", lambda: (0, 2, torch.device("cpu"))):
            raises(UserError, quietly, *base, *two, words="needs two pictures at a time")
        with unittest.mock.patch.object(segment, "rank_and_device", lambda: (0, 2, torch.device("cuda"))):
            quietly(*base, *two), seen.pop()
        with contextlib.redirect_stdout(io.StringIO()):
            segment.main(list(map(str, [*base, *more, "--head", "linear"])), "HANDLER")
        assert rest["on_signal"] is None
        (args, model, *_), rest = seen.pop()
        assert rest["on_signal"] == "HANDLER"
        assert type(model.head) is upernet.LinearHead and args.ignore == [255]
        for folder in f"{tmp}/a/train/masks", f"{tmp}/b/train/masks":  # red is called 9, and that is no class
            for name in os.listdir(folder):
                mask = np.array(Image.open(f"{folder}/{name}"))
                save(f"{folder}/{name}", np.where(mask == 1, 9, mask).astype(np.uint8))
        _, said = quietly(*base, "--ignore", 9)
        assert said.splitlines()[1:] == ["warning: no mask has a pixel of red; is a label of --ignore a class?"]
    measured = []
    with unittest.mock.patch.object(segment, "measure_speed", lambda *given: measured.append(given)), \
            unittest.mock.patch.dict(TEACHERS, micro=MICRO_VIT):
        small = ["--teacher", "micro", "--crop", 16, "--width", 12, "--batch_size", 3]
        quietly("bench", *small), quietly("bench", *small, "--head", "linear")
        with unittest.mock.patch.object(segment, "rank_and_device", lambda: (0, 1, torch.device("meta"))):
            quietly("bench", *small)
    _, model, batch, *_ = measured[2]
    assert {x.device.type for x in (*model.parameters(), *batch)} == {"meta"}, "made where they are needed"
    for (name, model, (img, labels), predict, schedules), head in zip(measured, ("upernet", "linear")):
        assert name == f"micro with {head}" and model.backbone.vit.config == MICRO_VIT
        assert type(model.head) is {"upernet": upernet.UperHead, "linear": upernet.LinearHead}[head]
        assert img.shape == (3, 3, 16, 16) and img.dtype == torch.uint8 and img.max() > 128
        assert labels.shape == (3, 16, 16) and labels.dtype == torch.uint8 and 100 < labels.max() < 150
        model.logits = lambda x: (x.min().item(), x.max().item())
        low, high = predict()
        assert low >= 0 and 0.5 < high <= 1, "pictures in [0, 1]"
        assert schedules == {"160,000 steps of 16": 160_000 * 16, "100 epochs of ADE20K, the paper's": 100 * 20_210}
    assert measured[0][1].head.join[0].out_channels == 12 and measured[0][1].head.classifier[1].out_channels == 150
    args = segment.parse_args(["bench"])
    assert (args.teacher, args.head, args.width, args.crop, args.batch_size) == ("internvit", "upernet", 512, 512, 16)


def test_flags_of_the_segmenter_by_hand():
    """Defaults and bounds; on a GPU bf16 is the default."""
    base = {"train": ["--data", "x", "--weights", "w"], "test": ["--run", "r", "--data", "x"],
            "predict": ["--run", "r", "x.png"], "bench": []}
    parse = lambda command, *flags: vars(segment.parse_args([command, *base[command], *map(str, flags)]))
    for command, expected in {
            "train": dict(split="train", val_split="val", head="upernet", classes=None, ignore=[255], short=0,
                          reduce_zero_label=False, lr=None, warmup=None, eval_every=16_000, save_every=2000,
                          out="segmenter", epochs=None, frozen=False, decay_shape="linear", seed=0),
            "test": dict(split="val", stride=None, short=None, batch_size=8, bf16=False, workers=min(4, cores()),
                         out=None),
            "predict": dict(stride=None, short=None, batch_size=8, bf16=False, out="predictions", files=["x.png"])
            }.items():
        found = parse(command)
        assert {k: found[k] for k in expected} == expected
    demands(segment.parse_args, base, "--data", "--run")
    assert parse("train", "--ignore")["ignore"] == [] and parse("train", "--ignore", 3, 0)["ignore"] == [3, 0]
    gpu_takes_bf16(parse, "--fp32")
    bounds(parse, ("train", "classes", 1, 0), ("train", "classes", 254, 255), ("train", "short", 0, -1),
           ("train", "width", 1, 0), ("train", "crop", 2, 1), ("test", "stride", 1, 0), ("test", "short", 0, -1),
           ("predict", "batch_size", 1, 0), ("test", "workers", 0, -1), ("bench", "width", 1, 0),
           ("bench", "batch_size", 2, 1), ("bench", "crop", 2, 1), ("train", "head", "linear", "dpt"),
           ("train", "head", "upernet", "dpt"), ("bench", "head", "linear", "dpt"),
           ("bench", "teacher", "tiny", "none"))


def test_colours_and_legends_by_hand():
    """Hues k * 0.618034, in three shades: of full and of 0.55 saturation (k // 3 odd), of 0.75 brightness (k odd)."""
    def by_hand(hue, saturation, value):  # hue in sixths of the circle
        rgb = [value * (1 - saturation * min(1, max(0, min(x, 4 - x)))) for x in ((hue + 5) % 6, (hue + 3) % 6,
                                                                                 (hue + 1) % 6)]
        return [255 * x for x in rgb]
    for k, (saturation, value) in enumerate([(0.9, 1), (0.9, 0.75), (0.9, 1), (0.55, 0.75), (0.55, 1), (0.55, 0.75),
                                             (0.9, 1)]):
        expected = by_hand(6 * (k * 0.618034 % 1), saturation, value)
        assert np.abs(np.array(segment.colour(k)) - expected).max() <= 0.5, (k, segment.colour(k), expected)
    img, classes = torch.full((3, 10, 320), 100, dtype=torch.uint8), np.zeros((10, 320), np.uint8)
    classes[:, 100:], classes[:, 200:], classes[:, 240:], classes[:, 300:] = 1, IGNORED, 2, 3
    drawn, write = [], lambda self, at, text, **how: drawn.append((at, text))
    with unittest.mock.patch.object(ImageDraw.ImageDraw, "text", write):
        canvas = np.array(segment.overlay(img, classes, ["sea", "a long name of a class", "sky", "hut", "not there"]))
    # the largest first, two in a row; of an equal share the later class
    assert drawn == [((22, 13), "a long name of 31%"), ((172, 13), "sea 31%"), ((22, 31), "sky 19%"),
                     ((172, 31), "hut 6%")], drawn
    for k, (x, y) in zip((1, 0, 2, 3), ((4, 14), (154, 14), (4, 32), (154, 32))):
        box = canvas[y:y + 13, x:x + 13]
        assert (box == segment.colour(k)).all() and (canvas[y:y + 13, x - 1] == 255).all()
        assert (canvas[y:y + 13, x + 13] == 255).all() and (canvas[y - 1, x:x + 13] != segment.colour(k)).any()
    assert canvas.shape == (10 + 2 * 18 + 4, 320, 3)
    narrow = segment.overlay(img[:, :, :4], classes[:, 98:102], ["sea", "red"])
    assert narrow.size == (150, 10 + 2 * 18 + 4) and narrow.getpixel((149, 5)) == (255, 255, 255)


def test_uperheads_of_other_patches_and_grids():
    """Twice enlarged maps of patch 16 by hand, odd maps are pooled to the end, how a head is drawn, and fp32 logits."""
    torch.manual_seed(0)
    grow = upernet.rescale(4, 2).eval()
    norm, x = grow[1], torch.randn(2, 4, 3, 5)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    y = torch.einsum("bihw,ioyx->bohywx", x, grow[0].weight).reshape(2, 4, 6, 10) + grow[0].bias.view(-1, 1, 1)
    mean, std, gain, shift = (v.view(-1, 1, 1) for v in (norm.running_mean, (norm.running_var + 1e-5).sqrt(),
                                                         norm.weight, norm.bias))
    y = (y - mean) / std * gain + shift
    y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))
    y = torch.einsum("bihw,ioyx->bohywx", y, grow[3].weight).reshape(2, 4, 12, 20) + grow[3].bias.view(-1, 1, 1)
    close(grow(x), y, 1e-5)
    assert [type(m).__name__ for m in upernet.rescale(4, 3)] == [
        "ConvTranspose2d", "BatchNorm2d", "GELU", "ConvTranspose2d", "BatchNorm2d", "GELU", "ConvTranspose2d"]
    ramp = torch.arange(35.0).view(1, 1, 5, 7)
    assert upernet.rescale(1, -1)(ramp)[0, 0].tolist() == [[8, 10, 12, 13], [22, 24, 26, 27], [29, 31, 33, 34]]
    assert upernet.rescale(1, 0)(ramp) is ramp and upernet.rescale(1, -2)(ramp)[0, 0].tolist() == [[24, 27], [31, 34]]
    for head in "upernet", "linear":
        model = Segmenter(backbone(), 40, head, 16)
        last = [m for m in model.head.modules() if isinstance(m, torch.nn.Conv2d) and m.out_channels == 40]
        assert len(last) == (2 if head == "upernet" else 1)
        for m in last:
            assert 0.0085 < m.weight.std() < 0.0115 and (m.bias == 0).all()
        drops = [m.p for m in model.head.modules() if isinstance(m, torch.nn.Dropout2d)]
        assert drops == ([0.1, 0.1] if head == "upernet" else [])
        model, img = model.eval(), torch.rand(1, 3, 32, 36)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model.outputs(img)[0].dtype == torch.bfloat16
            fine = model.logits(img)
        assert fine.dtype == torch.float32 and (fine != fine.bfloat16()).any(), "enlarged in fp32"
        assert fine.shape == (1, 40, 32, 36)


def test_pairs_have_their_names_and_say_which_do_not():
    """Names below several roots and subfolders, and every word of what is said of files without a partner."""
    blank = np.zeros((2, 3), np.uint8)
    with tempfile.TemporaryDirectory() as tmp:
        for root in "ab":
            save(f"{tmp}/{root}/top/val/images/city/0.jpg", np.stack(3 * [blank], -1))
            save(f"{tmp}/{root}/top/val/masks/city/0.png", blank)
        save(f"{tmp}/a/top/v.l/images/1.png", blank), save(f"{tmp}/a/top/v.l/masks/1.png", blank)
        assert Pairs(f"{tmp}/a", "val", "masks").names == ["top/city/0"]
        both = Pairs([f"{tmp}/a", f"{tmp}/b"], "val", "masks")
        assert both.names == [f"{tmp}/a/top/city/0", f"{tmp}/b/top/city/0"]
        assert both.path(1) == f"{tmp}/b/top/val/images/city/0.jpg"
        assert both.path(1, True) == f"{tmp}/b/top/val/masks/city/0.png"
        swapped = Pairs([f"{tmp}/b", f"{tmp}/a"], "val", "masks")
        assert swapped.names == both.names and swapped.path(1) == both.path(1), "by name, not as --data lists them"
        assert Pairs(f"{tmp}/a", "v.l", "masks").names == ["top/1"]
        assert Pairs(f"{tmp}/a", "val", "masks").numbers.tolist() == [[2, 3]]  # v.l sorts before val
        refused(DataError, Pairs, [f"{tmp}/a", f"{tmp}/b"], "val", "depth", says=f"{tmp}/a, {tmp}/b, split val: there "
                "are no pairs of val/images (2 files) and val/depth (0) with the same name; endings are .jpg .jpeg "
                ".png .webp .bmp .gif .tif .tiff .ppm .pgm .avif")
        save(f"{tmp}/a/top/val/masks/3.png", blank), save(f"{tmp}/a/top/val/images/2.png", blank)
        refused(DataError, Pairs, f"{tmp}/a", "val", "masks", says=f"{tmp}/a, split val: 2 files of images or masks "
                f"have no partner: {tmp}/a/top/val/images/2.png, {tmp}/a/top/val/masks/3.png")
        save(f"{tmp}/b/top/val/images/city/0.png", blank)
        refused(DataError, Pairs, f"{tmp}/b", "val", "masks", says=f"{tmp}/b/top/val/images/city/0.png and "
                f"{tmp}/b/top/val/images/city/0.jpg have the same name")
    names = [f"n{k}" for k in range(22)]
    assert list_some(names[:20]) == ", ".join(names[:20]) and list_some(["x"], "; ") == "x"
    assert list_some(names, "; ") == "; ".join(names[:20]) + "; and 2 more"


def test_pairs_go_on_reading_after_a_fault():
    """Nothing more is yielded, the rest is read nevertheless, and all ranks' faults are told."""
    read, gathered = [], []

    def use(i):
        read.append(i)
        if i in (2, 4):
            raise UserError(f"fault {i}")
        return 10 * i
    with tempfile.TemporaryDirectory() as tmp:
        pairs = Pairs(shapes(tmp, 6, ["val"]), "val", "masks")
        assert list(pairs.every(use, [5, 0, 3])) == [50, 0, 30]
        assert list(pairs.every(use, [])) == [], "a rank may have no share"
        found, read[:] = [], []

        def run():
            for x in pairs.every(use, range(1, 6), gather=lambda x: gathered.append(x) or [["other"], x]):
                found.append(x)
        refused(DataError, run, says="3 of 6 pairs cannot be used: other; fault 2; fault 4")
        assert found == [10] and read == [1, 2, 3, 4, 5] and gathered == [["fault 2", "fault 4"]]
        counts, plain = [], DataLoader.__init__

        def loader(self, *args, **more):
            counts.append((more["num_workers"], more["worker_init_fn"].__name__))
            plain(self, *args, **{**more, "num_workers": 0})
        with unittest.mock.patch.object(DataLoader, "__init__", loader), unittest.mock.patch(
                "downstream.pairs.check_locks", lambda n: counts.append(n)):
            assert list(pairs.every(lambda i: i, workers=3)) == [0, 1, 2, 3, 4, 5]
        assert counts == [3, (3, "ignore_signals")], counts


def test_masks_are_turned_as_their_images():
    """Of each orientation that EXIF knows, as PIL turns it; and grey of four bits."""
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    turned = [numbers, numbers[:, ::-1], numbers[::-1, ::-1], numbers[::-1], numbers.T, np.rot90(numbers, -1),
              numbers[::-1, ::-1].T, np.rot90(numbers)]
    with tempfile.TemporaryDirectory() as tmp:
        for k, expected in enumerate(turned, 1):
            exif = Image.Exif()
            exif[0x0112] = k
            for kind, x in ("images", np.stack(3 * [numbers], -1)), ("masks", numbers), ("depth", numbers.astype("H")):
                os.makedirs(f"{tmp}/val/{kind}", exist_ok=True)
                Image.fromarray(x).save(f"{tmp}/val/{kind}/{k}.png", exif=exif)
        for kind in "masks", "depth":
            pairs = Pairs(tmp, "val", kind)
            for i, expected in enumerate(turned):
                img, mask = pairs.read(i)
                assert np.array_equal(mask, expected) and np.array_equal(img[0].numpy(), expected), (kind, i)
    chunk = lambda kind, x: struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0\x0f\x71")) + chunk(b"IEND", b"")  # 0, 15, 7, 1 in grey of 4 bits
    assert read_numbers(png).tolist() == [[0, 15, 7, 1]]
