"""Guards values that other tests only see move: random draws, the ends of ranges, one rank's loss, a precision that was
asked for, and what a drawn picture shows."""
import contextlib
import io
import os
import tempfile
import unittest.mock

from tests.helpers import close, picture_folder, tokenizer_file

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import data
import distill
import encoder
import tools.drawn as drawn
import tools.latents as latents

patch = unittest.mock.patch


def test_loading_a_teacher_leaves_the_callers_draws_alone():
    """A program that seeds, loads a frozen teacher and draws gets the draws of its own seed."""
    torch.manual_seed(5)
    expected = torch.rand(4)
    seen = []
    for weights in None, "random":
        torch.manual_seed(5)
        with contextlib.redirect_stdout(io.StringIO()):
            teacher = encoder.load_teacher("tiny", weights)
        assert torch.equal(torch.rand(4), expected), weights
        assert not any(p.requires_grad for p in teacher.parameters())
        seen.append(teacher.pos_embed)
    torch.manual_seed(0)  # "random" is the initialisation of seed 0, whatever the caller's seed
    assert torch.equal(seen[1], encoder.ViT(encoder.TEACHERS["tiny"]).pos_embed) and not torch.equal(*seen)


def test_each_rank_returns_the_loss_of_its_own_tokens():
    """Two ranks, of which the other has distances 1.5 and 0.25: weights and distances are the mean's, loss and gradient
    are of this rank's own tokens."""
    teacher = [torch.tensor([[[1.0, 0.0]]])] * 2
    angles = torch.tensor([0.5, 1.25], requires_grad=True)  # radians between student and teacher
    student = [torch.stack([3 * a.cos(), 3 * a.sin()]).view(1, 1, 2) for a in angles]

    def all_reduce(x):
        x += torch.tensor([1.5, 0.25])
    with patch.multiple(distill.dist, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce):
        loss, weights, alpha = distill.distill_loss(student, teacher, beta=3.0)
    own = 1 - np.cos([0.5, 1.25])
    mean = (own + [1.5, 0.25]) / 2
    w = np.array([0.5, 1]) * np.exp(3 * mean)
    w /= w.sum()
    close(alpha.double(), torch.tensor(mean), 1e-6)
    close(weights.double(), torch.tensor(w), 1e-6)
    assert abs(loss.item() - (w * own).sum()) < 1e-6, "each rank's own, so that the mean over ranks is that of all"
    gradient, = torch.autograd.grad(loss, angles)
    close(gradient.double(), torch.tensor(w * np.sin([0.5, 1.25])), 1e-5)


def first_place(crop):
    """The least place in a picture whose pixels hold their place along the longer side, and whether it is mirrored."""
    x = np.array(crop).astype(int)
    along = x[..., 0] + 256 * x[..., 1]
    return along.min(), along[0, 0] > along[0, -1]


def test_the_piece_of_a_long_picture_by_hand():
    """Of 400 x 5 pixels the piece is 80 long, and begins at one of 320 places; lying and standing, for the centre and
    for random crops. A picture of 16 : 1 is its own piece, and costs no draw."""
    numbers = np.stack([np.arange(400) % 256, np.arange(400) // 256, np.zeros(400)], -1).astype(np.uint8)
    wide = Image.fromarray(np.repeat(numbers[None], 5, 0))
    tall = wide.transpose(Image.Transpose.ROTATE_270)  # the left end is its top
    assert tall.size == (5, 400) and tall.getpixel((0, 399)) == wide.getpixel((399, 0))
    for img in wide, tall:
        for where, first in (0, 0), (0.25, 80), (0.5, 160), (0.999, 319):
            piece = data.limit_aspect(img, where)
            assert max(piece.size) == 80 and min(piece.size) == 5 and first_place(piece)[0] == first, where
        assert first_place(data.center_crop(img, 5))[0] == 160 + 37
        for whole in img, img.crop((0, 0, min(img.width, 80), min(img.height, 80))):
            for seed in range(40):
                rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
                first = int(320 * again.random()) if whole is img else 0
                again.integers(5, 6)
                offsets = [int(again.integers(n)) for n in ((76, 1) if img is wide else (1, 76))]
                mirrored = again.random() < 0.5
                crop = data.random_crop(whole, 5, rng, (1, 1))
                assert first_place(crop)[0] == first + max(offsets), (whole.size, seed)
                assert img is tall or first_place(crop)[1] == mirrored
                assert rng.random() == again.random(), "no further draw"


def test_sides_that_a_random_crop_draws():
    """From size / high to size / low, both rounded up and both drawn."""
    img, rng = Image.new("RGB", (40, 40)), np.random.default_rng(0)
    for size, fractions, sides in ((8, (0.7, 0.9), range(9, 13)), (10, (0.3, 0.49), range(21, 35)),
                                   (10, (0.5, 1), range(10, 21)), (10, (0.97, 0.97), range(11, 12))):
        seen = []
        with patch.object(data, "shrink", lambda img, short: seen.append(short) or img.resize((short, short))):
            for _ in range(300):
                data.random_crop(img, size, rng, fractions)
        assert sorted(set(seen)) == list(sides), (size, fractions)


def test_latents_in_the_precision_that_was_asked_for():
    """Statistics and saved latents, plain and mirrored, are those of bf16 autocast with --bf16, and of fp32 without."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=6)
        read = data.ImageDataset(folder, 16, train=False)
        img = torch.stack([read[n][0] for n in range(6)]) / 255
        seen = {}
        for bf16 in False, True:
            flags = ["--data", folder, "--batch_size", "6", "--workers", "0"] + ["--bf16"] * bf16
            file, out = os.path.join(tmp, f"{bf16}.safetensors"), os.path.join(tmp, f"latents{bf16}")
            with contextlib.redirect_stdout(io.StringIO()):
                report = latents.main(["stats", "--weights", weights, "--out", file, *flags])
                latents.main(["save", "--weights", file, "--out", out, "--flip", *flags])
            assert ("bf16 autocast" in report["protocol"]) == bf16 == ("fp32" not in report["protocol"])
            plain, stored, exact = encoder.Encoder.from_pretrained(weights), encoder.Encoder.from_pretrained(file), {}
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z = plain(img)[0].double().transpose(0, 1).flatten(1)  # (C, B*h*w)
                exact = {"latent_mean": z.mean(1), "latent_std": z.std(1, correction=0),
                         "latents": stored.encode(img), "mirrored": stored.encode(img.flip(-1))}
            got = load_file(file) | load_file(os.path.join(out, "latents_00000.safetensors"))
            for name, x in exact.items():
                close(got[name].double(), x.to(got[name].dtype).double(), 1e-6)
            seen[bf16] = exact
        for name, x in seen[False].items():  # or the two could not be told apart
            gap = (seen[True][name].double() - x.double()).norm() / x.double().norm()
            assert gap > 1e-4, (name, gap)


def test_drawn_textures_and_gradients_by_numpy():
    """Each drawn once more from the same random numbers: stripes, a chess board turned by an angle, clouds; a gradient
    along a direction, or away from a point."""
    kinds = set()
    for seed in range(32):
        size, lowest, highest = ((16, 1, 2), (64, 3, 8))[seed % 2]  # waves along the picture
        S = 2 * size
        y, x = np.mgrid[:S, :S] / S
        for kind in "textures", "gradients":
            rng = np.random.default_rng(seed)
            got = np.array(drawn.draw(np.random.default_rng(seed), kind, size)).astype(float)
            dark, light, *_ = rng.integers(0, 256, (6, 3)).astype(float)
            turned = (x + 1j * y) * np.exp(-1j * rng.uniform(0, 2 * np.pi))  # along the direction, and across it
            cx, cy = rng.uniform(0.2, 0.8, 2)
            if kind == "textures":
                phase = 2j * np.pi * rng.uniform(lowest, highest) * turned
                clouds = np.asarray(Image.fromarray(rng.random((8, 8)).astype(np.float32)).resize((S, S), 3))
                along, across = np.sin(phase.imag), np.sin(-phase.real)
                which = int(rng.integers(3))
                mix = [(1 + along) / 2, (np.sign(along) == np.sign(across)) * 1.0, clouds.clip(0, 1)][which]
            else:
                which = 3 + (rng.random() >= 0.5)
                mix = turned.real if which == 3 else np.abs(x - cx + 1j * (y - cy))
                mix = (mix - mix.min()) / (mix.max() - mix.min())
            kinds.add(which)
            mix = mix[..., None]
            expected = np.floor(dark * (1 - mix) + light * mix).reshape(size, 2, size, 2, 3).mean((1, 3))
            error = np.abs(got - expected).max(-1)
            assert (error > 1).mean() < 0.02, (seed, kind, which, error.max())  # a sign of about 0 may be either
    assert kinds == {0, 1, 2, 3, 4}


def test_what_drawn_pictures_are_made_of():
    """One to four shapes or letters: ellipses, boxes and triangles, A to Z, within the ranges of place and size."""
    size, S, calls = 24, 48, []
    names = "ellipse", "rectangle", "polygon", "text"
    spies = {name: (lambda name: lambda pen, *args, **kw: calls[-1].append((name, args, kw)))(name) for name in names}
    with patch.multiple(ImageDraw.ImageDraw, **spies):
        for seed in range(300):
            for kind in "shapes", "letters", "textures", "gradients":
                calls.append([])
                drawn.draw(np.random.default_rng(seed), kind, size)
    shapes, letters = calls[::4], calls[1::4]
    assert not any(calls[2::4]) and not any(calls[3::4])
    for drawings in shapes, letters:
        assert {len(x) for x in drawings} == {1, 2, 3, 4}
    assert {name for x in shapes for name, *_ in x} == {"ellipse", "rectangle", "polygon"}
    assert {args[1] for x in letters for _, args, _ in x} == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    boxes = np.array([args[0] for x in shapes for name, args, _ in x if name != "polygon"]) / S
    triangles = [np.array(args[0]) / S for x in shapes for name, args, _ in x if name == "polygon"]
    boxes = np.concatenate([boxes, [[*t.min(0), *t.max(0)] for t in triangles]])  # x0, y0, x1, y1
    fonts = np.array([kw["font"].size for x in letters for _, _, kw in x]) / S
    corners = np.array([args[0] for x in letters for _, args, _ in x]) / S
    sides = boxes[:, 2:] - boxes[:, :2]
    for values, low, high in (boxes[:, :2], 0, 0.7), (corners, 0, 0.7), (sides, 0.15, 0.5), (fonts, 0.3, 0.7):
        edge = 0.05 * (high - low)
        for column in values.reshape(len(values), -1).T:
            assert low <= column.min() < low + edge and high - edge < column.max() <= high, (low, high)
