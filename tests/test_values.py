"""Values that other tests only see move: random draws, ends of ranges, one rank's loss."""
import contextlib
import errno
import http.client
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import struct
import sys
import tempfile
import types
import unittest.mock
import warnings
import zipfile
import zlib
from dataclasses import asdict, replace

from tests.helpers import (
    HERE, MICRO_DECODER, MICRO_VIT, clip, close, picture, picture_folder, raises, refused, tokenizer_file)

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import data
import decoder
import distill
import encoder
import eval as evaluation
import train
import tools.drawn as drawn
import tools.latents as latents
import tools.pictures as pictures
import tools.speed as speed

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
                                   (10, (0.5, 1), range(10, 21)), (10, (0.97, 0.97), range(11, 12)),
                                   (8, None, range(8, 11))):  # 0.8 to 1 if nothing is said
        seen = []
        with patch.object(data, "shrink", lambda img, short: seen.append(short) or img.resize((short, short))):
            for _ in range(300):
                data.random_crop(img, size, rng, *[fractions] * bool(fractions))
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


# ---- the networks ----

def test_what_a_configuration_may_be():
    """Every number of both configurations at its least, one below, 65,536 and one above, by the message's own words."""
    vit = lambda **how: encoder.ViTConfig(**{**asdict(MICRO_VIT), "depth": 1, "heads": 1, "patch": 1, **how})
    dec = lambda **how: decoder.DecoderConfig(**{**asdict(MICRO_DECODER), "heads": 1, **how})
    for activation in "", "gel", "gelu quick_gelu":
        refused(encoder.UserError, lambda: vit(activation=activation),
                says=f"activation must be one of gelu gelu_tanh quick_gelu: {said_of(vit(), activation=activation)}")
    for build, error, zero, below_1000 in ((vit, encoder.UserError, {"num_prefix"}, {"depth"}),
                                           (dec, decoder.UserError, {"gtb_depth", "flow_depth"},
                                            {"gtb_depth", "flow_depth"})):
        numbers = [f for f, x in asdict(build()).items() if type(x) is int]
        assert len(numbers) == (7 if build is vit else 8)
        for name in numbers:
            low = 0 if name in zero else 1
            least = 4 if (build, name) == (dec, "width") else low
            build(**{name: least})
            if name == "num_prefix":
                build(num_prefix=5)
                refused(error, lambda: build(num_prefix=6),
                        says=f"depth must be at most 1000, num_prefix at most 5: {said_of(vit(), num_prefix=6)}")
            elif name in below_1000:
                build(**{name: 1000})
                rule = ("depth must be at most 1000, num_prefix at most 5" if build is vit
                        else "gtb_depth and flow_depth must be at most 1000")
                refused(error, lambda: build(**{name: 1001}), says=f"{rule}: {said_of(build(), **{name: 1001})}")
            elif name != "heads":
                build(**{name: 65536, **({"size": 65536} if (build, name) == (vit, "patch") else {})})
            for wrong in (low - 1, 65537, True, 2.0, "8"):
                refused(error, lambda: build(**{name: wrong}),
                        says=f"{name} is {wrong!r}; expected int from {low} to 65536")
        refused(error, lambda: build(pixel_stats=1), says="pixel_stats is 1; expected str")
        refused(error, lambda: build(pixel_stats="x"),
                says=f"pixel_stats must be one of imagenet half openai: {said_of(build(), pixel_stats='x')}")
    long = "x" * 60  # of what is wrong 50 characters are shown
    shown = repr(long)[:50]
    for build, error in (vit, encoder.UserError), (dec, decoder.UserError):
        refused(error, lambda: build(width=long), says=f"width is {shown}; expected int from 1 to 65536")
    refused(encoder.UserError, encoder.Encoder, encoder.ViT(MICRO_VIT), long,
            says=f"latent_dim is {shown}, expected an integer from 1 to 65536")
    refused(encoder.UserError, encoder.Encoder, encoder.ViT(MICRO_VIT), 8, long,
            says=f"projector {shown} is unknown; it is mlp or linear")
    for wrong, rule in (dict(width=30, heads=4), "width must be a multiple of heads"), (
            dict(size=18, patch=4), "size must be a multiple of patch"), (
            dict(activation="relu"), "activation must be one of gelu gelu_tanh quick_gelu"), *(
            (wrong, "eps must be in (0, 1), layer_scale in [0, 1e6)")
            for wrong in (dict(eps=0.0), dict(eps=1.0), dict(layer_scale=1e6), dict(layer_scale=-0.1))):
        refused(encoder.UserError, lambda: vit(**wrong), says=f"{rule}: {said_of(vit(), **wrong)}")
    vit(eps=0.999, layer_scale=999999.0), vit(layer_scale=0.0)
    for wrong, rule in (dict(width=30), "width must be a multiple of 4 and of heads"), (
            dict(width=32, heads=5), "width must be a multiple of 4 and of heads"), (
            dict(projector="x"), "projector must be mlp or linear"), (
            dict(objective="x"), "objective must be flow or pixel"):
        refused(decoder.UserError, lambda: dec(**wrong), says=f"{rule}: {said_of(dec(), **wrong)}")
    for dim in (1, 65536):
        assert encoder.Encoder(encoder.ViT(replace(MICRO_VIT, width=2, heads=1)), dim).latent_dim == dim
    for wrong in (0, 65537, True, "8"):
        refused(encoder.UserError, encoder.Encoder, encoder.ViT(MICRO_VIT), wrong,
                says=f"latent_dim is {wrong!r}, expected an integer from 1 to 65536")


def said_of(config, **how):
    """How a configuration with these other values is printed, without building it."""
    return f"{type(config).__name__}({', '.join(f'{k}={v!r}' for k, v in {**asdict(config), **how}.items())})"


def test_initial_values_of_each_kind():
    """Scales, epsilons and tokens of a ViT that has all of them; the second position table of a decoder is the
    first's."""
    torch.manual_seed(0)
    config = replace(MICRO_VIT, width=512, pre_norm=True, layer_scale=0.5, num_prefix=5, eps=0.25)
    vit = encoder.ViT(config)
    norms = [m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)]
    assert norms == [0.25] * (2 + 2 * 3), norms
    scales = [p for name, p in vit.named_parameters() if ".scale" in name]
    assert len(scales) == 6 and all((p == 0.5).all() for p in scales)
    for p in vit.cls_token, vit.register_tokens, vit.pos_embed:
        assert abs(p.std() / 0.02 - 1) < 0.1
    assert (vit.register_tokens.shape, vit.pos_embed.shape) == ((1, 4, 512), (1, 17, 512))
    dec = decoder.Decoder(MICRO_DECODER)
    assert torch.equal(dec.pos_embed, dec.head_pos_embed) and dec.pos_embed.abs().max() == 1

    # before the first block all layers below count: CLIP's first norm, too
    groups = encoder.parameter_groups(vit, lr=1.0, layer_decay=0.5)
    rate = {p: g["lr"] for g in groups for p in g["params"]}
    assert rate[vit.norm_pre.weight] == 0.5 ** 4 and rate[vit.norm.weight] == 1


def test_stochastic_depth_is_recomputed_alike():
    """With the activations recomputed the same branches are skipped; which they are differs from image to image."""
    torch.manual_seed(1)
    vit, img, found = encoder.ViT(MICRO_VIT).train(), torch.rand(1, 3, 8, 8).expand(6, -1, -1, -1), []
    vit.drop_path = 0.8
    for vit.checkpoint in False, True:
        torch.manual_seed(7)
        vit.zero_grad()
        out = vit(img)[-1]
        out.square().sum().backward()
        found.append((out.detach(), vit.patch_embed.weight.grad.clone()))
    for a, b in zip(*found):
        assert torch.equal(a, b)
    assert len({x.sum().item() for x in out}) > 2, "six equal images"


class Doubled(nn.Linear):
    """A layer that is a Linear, but computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_only_descends_from_linear():
    block = encoder.ViT(replace(MICRO_VIT, depth=1, layer_scale=0.5)).blocks[0]
    x, doubled = torch.randn(2, 5, 32), Doubled(32, 32)
    for given, scale, expected in ((doubled, block.scale1, x @ doubled.weight.T + doubled.bias),
                                   (doubled, None, 2 * (x @ doubled.weight.T + doubled.bias)),
                                   (block.proj, block.scale1, (x @ block.proj.weight.T + block.proj.bias) / 2)):
        close(encoder.scaled(given, x, scale), expected, 1e-5)


def test_times_and_weights_are_fp32_in_half_precision():
    """Euler's times of a half-precision flow; the layers' weights of half-precision distances."""
    seen = []

    def velocity(x, t):
        seen.append(t)
        return 0 * x
    decoder.euler(velocity, torch.zeros(2, 3, 4, dtype=torch.bfloat16), 3)
    assert [t.dtype for t in seen] == [torch.float32] * 3 and all(t.shape == (2, 3) for t in seen)
    assert [t[1, 2].item() for t in seen] == [torch.tensor(1 - i / 3).item() for i in range(3)]
    alpha = torch.tensor([0.5, 0.2, 0.1]).bfloat16()
    weights = distill.layer_weights(alpha)
    exact = np.arange(1, 4) / 3 * np.exp(2 * alpha.double().numpy())
    assert weights.dtype == torch.float32
    close(weights.double(), torch.tensor(exact / exact.sum()), 1e-6)


def test_messages_of_the_method():
    tokens = lambda *shapes: [torch.ones(shape) for shape in shapes]
    wanted = "expected the same (B, N, D) for every layer of both, N at least 1"
    for student, teacher, words in (
            (tokens((2, 3, 4), (2, 3, 4)), tokens((2, 3, 4)),
             "student has 2 layers of [(2, 3, 4)], teacher 1 of [(2, 3, 4)]"),
            (tokens((2, 3, 4), (1, 3, 4)), tokens((2, 3, 5), (2, 3, 5)),
             "student has 2 layers of [(1, 3, 4), (2, 3, 4)], teacher 2 of [(2, 3, 5)]"),
            (tokens((3, 4)), tokens((3, 4)), "student has 1 layers of [(3, 4)], teacher 1 of [(3, 4)]"),
            (tokens((2, 0, 4)), tokens((2, 0, 4)), "student has 1 layers of [(2, 0, 4)], teacher 1 of [(2, 0, 4)]"),
            ([], [], "student has 0 layers of [], teacher 0 of []")):
        refused(ValueError, distill.layer_distances, student, teacher, says=f"{words}; {wanted}")
    refused(ValueError, distill.layer_weights, torch.ones(2), 2.0, "mean",
            says="strategy 'mean' is not one of final uniform progressive adaptive")
    refused(ValueError, decoder.flow_loss, None, torch.zeros(2, 4), 0.5, torch.zeros(2, 4),
            says="t is float; expected a floating-point tensor (2)")
    img = torch.zeros(1, 3, 16, 16)
    enc, dec = encoder.Encoder(encoder.ViT(MICRO_VIT), 8), decoder.Decoder(MICRO_DECODER)
    z = torch.zeros(1, 8, 4, 4)
    for low, high in (-0.5, 1.0), (0.0, 1.5):
        img[0, 0, 0, :2] = torch.tensor([low, high])
        refused(ValueError, enc, img, says=f"img has values from {low:.3g} to {high:.3g}; expected [0, 1]: the network "
                "normalises inside")
        refused(ValueError, dec.loss, z, img, says=f"img has values from {low:.3g} to {high:.3g}; expected [0, 1]")
    img[0, 0, 0, :2] = torch.tensor([-0.49, 1.49])
    enc(img), dec.loss(z, img)
    for (H, W), near in (((13, 21), "20x12"), ((16, 0), "4x16"), ((0, 16), "16x4"), ((15, 14), "16x16"),
                         ((1, 30), "32x4")):
        refused(ValueError, enc, torch.zeros(1, 3, H, W),
                says=f"image is {W}x{H} pixels; sides must be multiples of the patch 4: try {near}")
    for layer in 3, -4, [0, 3], []:
        refused(ValueError, enc.features, img, layer,
                says=f"layer is {layer}; expected None or integers from -3 to 2")
    for wide in 5, 9:  # either side below the window, of either kind
        for window, n in ("gaussian", 11), ("uniform", 7):
            for H, W in (wide, 20), (20, wide), (n, n):
                if min(H, W) < n:
                    refused(ValueError, evaluation.ssim, torch.zeros(1, 3, H, W), torch.zeros(1, 3, H, W), window,
                            says=f"images are {W}x{H}; SSIM with its {window} window needs at least {n}x{n}")
                else:
                    assert evaluation.ssim(torch.ones(1, 1, H, W), torch.ones(1, 1, H, W), window).item() == 1
    refused(ValueError, evaluation.ssim, img, img, "box", says="window 'box' is unknown; it is gaussian or uniform")
    for shapes in (3, 4, 3, 3), (3, 3, 4, 3), (3, 3, 3, 4), (4, 3, 3, 3):
        mus, sigmas = [np.zeros(n) for n in shapes[::2]], [np.eye(n) for n in shapes[1::2]]
        a, s, b, t = (tuple(x.shape) for x in (mus[0], sigmas[0], mus[1], sigmas[1]))
        refused(ValueError, evaluation.frechet_distance, mus[0], sigmas[0], mus[1], sigmas[1],
                says=f"statistics of {a}, {s} and {b}, {t} have no distance: both need a mean (D,) and a covariance "
                "(D, D) of the same features")


def test_few_images_and_few_neighbours():
    """Three sure classes in three splits score 1 each; five images have five neighbours."""
    assert evaluation.inception_score(1000 * torch.eye(3)) == (1.0, 0.0)
    score, deviation = evaluation.inception_score(torch.tensor([[1000.0, 0], [0, 1000], [0, 1000]]), splits=2)
    # whichever two images share a split: of one class or of both
    assert (round(score, 6), round(deviation, 6)) in ((1, 0), (1.5, 0.5))
    x, y = torch.eye(5), torch.tensor([0, 1, 1, 1, 1])
    assert evaluation.nearest_neighbours(x, y, x, y) == 100 and evaluation.nearest_neighbours(
        x, y, x[:3], torch.tensor([0, 1, 0])) == 100 * 2 / 3
    # many pictures, of which the last 100 are called what they are not; classes without a picture in between
    many, labels = torch.eye(2).repeat(500, 1), torch.tensor([0, 5]).repeat(500)
    labels[900:] = 5 - labels[900:]
    assert evaluation.nearest_neighbours(torch.eye(2), torch.tensor([0, 5]), many, labels, k=1) == 90
    assert evaluation.linear_probe(many[:900], labels[:900], many, labels, epochs=2)[0] == 90
    img = torch.rand(2, 3, 8, 12) * 1.5 - 0.25  # beyond [0, 1], where the code's pictures may not be
    mean, basis = torch.zeros(48).double(), torch.eye(48).double()
    assert torch.equal(evaluation.patch_pca(img, mean, basis, 4), img.double().clamp(0, 1))
    a, b = torch.full((3, 1, 1), 0.5), torch.tensor([0.6, 0.3, 0.9]).view(3, 1, 1)
    close(evaluation.comparison(a, b).flatten(), torch.tensor([0.5, 0.6, 0.4, 0.5, 0.3, 0.8, 0.5, 0.9, 1.0]), 1e-6)


# ---- files of weights ----

def test_what_a_file_of_weights_may_hold():
    """Halves and doubles are read, by encoder and decoder; a training dump's wrapping is taken off; a name is one line
    of at most 300 characters."""
    with tempfile.TemporaryDirectory() as tmp:
        path, other = tokenizer_file(tmp), os.path.join(tmp, "other.safetensors")
        config, tensors = encoder.read_config(path), load_file(path)
        plain = {k: x.half().float() for k, x in tensors.items()}  # so that each type holds the same numbers
        for dtype in torch.float16, torch.float32, torch.float64:
            encoder.write_model(other, config, {k: x.to(dtype).mT.contiguous().mT if x.ndim == 2 else x.to(dtype)
                                                for k, x in plain.items()})  # laid out otherwise
            for part, module in ("encoder", encoder.Encoder), ("decoder", decoder.Decoder):
                for k, x in module.from_pretrained(other).named_parameters():
                    assert torch.equal(x, plain[f"{part}.{k}"]) and x.dtype == torch.float32, (dtype, k)
        for key, part in ("decoder", "encoder"), ("size", "encoder"):
            without = {k: v for k, v in config.items() if k != key}
            encoder.write_model(other, without, tensors)
            refused(encoder.UserError, encoder.Encoder.from_pretrained, other,
                    says=f"{other} is a model file, but no tokenizer; train.py writes out/model.safetensors")
        with safe_open(path, "pt") as f:
            assert f.metadata() == {"format": "pt", "config": json.dumps(config)}, "transformers asks for the format"
        about = (f"{other} is damaged, or is no model file of this project: such a file's metadata have config = "
                 '{"vit": ...} (')
        for changes, words in (({"size": 18}, "ValueError: size is 18, expected a multiple of the patch 4)"),
                               ({"size": True}, "ValueError: size is True, expected a multiple of the patch 4)"),
                               ({"size": 65540}, "ValueError: size is 65540, expected a multiple of the patch 4)"),
                               ({"size": "x" * 60},
                                f"ValueError: size is '{'x' * 49}, expected a multiple of the patch 4)"),
                               ({"vit": {**config["vit"], "more": 1}},
                                "TypeError: ViTConfig.__init__() got an unexpected keyword argument 'more')")):
            encoder.write_model(other, {**config, **changes}, tensors)
            refused(encoder.UserError, encoder.read_config, other, says=about + words)
        encoder.write_model(other, {**config, "size": 65536}, tensors)
        assert encoder.read_config(other)["size"] == 65536, "the largest"
        vit = {"vit": {**config["vit"], "size": 12}}  # the size is that of the ViT where the file has no other
        encoder.write_model(other, vit, tensors)
        assert encoder.read_config(other) == vit
        for part, words in ((3, "TypeError: 'int' object is not subscriptable"), ({}, "KeyError: 'latent_dim'"), (
                {"latent_dim": 8, "projector": "x"}, "UserError: projector 'x' is unknown; it is mlp or linear")):
            encoder.write_model(other, {**config, "decoder": part}, tensors)
            refused(encoder.UserError, encoder.Encoder.from_pretrained, other,
                    says=f"{other} describes no UniFlow encoder ({words})")
        # what is wrong with a decoder is one line of at most 300 characters, though torch lists every tensor
        encoder.write_model(other, config, {k.replace("decoder.", "decoder.odd_"): x for k, x in tensors.items()})
        try:
            raise AssertionError(decoder.Decoder.from_pretrained(other))
        except decoder.UserError as e:
            start, end = f"{other} does not hold a UniFlow decoder (RuntimeError: ", ")"
            assert str(e).startswith(start + "Error(s) in loading state_dict for Decoder: Missing key(s) in state_dict")
            assert str(e).endswith(end) and len(str(e)) == len(start) + 300 + len(end)
        with patch.object(encoder, "safe_open", side_effect=SafetensorError("torn\nhere")):
            refused(encoder.UserError, encoder.open_weights, path,
                    says=f"{path} is damaged, or no safetensors file (torn here): delete it, and fetch it again")
        # a file that opens, but holds what this torch has no type for, or is torn further on
        for error in AttributeError("no such type"), SafetensorError("torn"):
            opened = types.SimpleNamespace(keys=lambda: ["a"], get_tensor=unittest.mock.Mock(side_effect=error))
            with patch.object(encoder, "safe_open", lambda *how: opened):
                refused(encoder.UserError, encoder.open_weights(path)[1], "a\nb",
                        says=f"{path}: a b cannot be read ({error})")
        # a decoder's deviation may be small, but not 0
        for std, fits in (1e-30, True), (0.0, False):
            encoder.write_model(other, config, {**tensors, "latent_std": torch.full((8,), std)})
            if fits:
                assert (decoder.Decoder.from_pretrained(other).latent_std == torch.tensor(std)).all()
                continue
            why = "latent_std is torch.float32; expected finite floating-point numbers, deviations above 0"
            refused(encoder.UserError, encoder.Encoder.from_pretrained, other,
                    says=f"{other} does not fit the model (1 tensors): {why}")
            refused(decoder.UserError, decoder.Decoder.from_pretrained, other,
                    says=f"{other} does not hold a UniFlow decoder (ValueError: {why})")
        dump, names = os.path.join(tmp, "dump.pth"), ["module.a", "b.module.c", "d"]
        state = {name: torch.full((2,), float(k)) for k, name in enumerate(names)}
        extra = {"step": 3, "sparse": torch.eye(2).to_sparse(), "none": None}
        for content in state | extra, {"state_dict": state | extra, "optimizer": torch.zeros(1)}:
            torch.save(content, dump)
            present, get = encoder.open_weights(dump)
            expected = {"a": 0, "b.module.c": 1, "d": 2}
            assert present == expected.keys() and all(get(name)[0].item() == x for name, x in expected.items())
        for read in encoder.read_config, encoder.open_weights, encoder.Encoder.from_pretrained:
            refused(encoder.MissingFile, read, os.path.join(tmp, "gone"), says=f"{tmp}/gone: no such file")
        with patch.object(torch, "load", side_effect=KeyError("x")):
            refused(encoder.UserError, encoder.open_weights, dump,
                    says=f"{dump} is not a file of tensors (KeyError); it was not executed")
        assert encoder.one_line("a\n  b\tc ") == "a b c" and encoder.one_line("x " * 400) == ("x " * 150)
        vit, file = encoder.ViT(MICRO_VIT), os.path.join(tmp, "vit.safetensors")
        own = vit.state_dict()
        save_file({k: torch.ones(1) for k in "fcebad"}, file)
        refused(encoder.UserError, encoder.load_vit, vit, file,
                says=f"{file} is of no known layout ({', '.join(encoder.LAYOUTS)}); it holds a, b, c ...")
        wrong = {**own, "x.one": torch.ones(1), "pos_embed": torch.ones(1, 3, 32), "norm.bias": torch.ones(32).int()}
        del wrong["norm.weight"]
        save_file(wrong, file)
        refused(encoder.UserError, encoder.load_vit, vit, file,
                says=f"{file} does not fit the model (4 tensors): missing norm.weight; norm.bias is torch.int32; "
                "expected finite floating-point numbers, deviations above 0; pos_embed is (1, 3, 32), expected "
                "(1, 17, 32)")
        # as many numbers in another shape are another tensor, except for leading ones
        save_file({**own, "cls_token": own["cls_token"].flatten()}, file)
        encoder.load_vit(vit, file)
        save_file({**own, "cls_token": own["cls_token"].view(1, 32, 1)}, file)
        refused(encoder.UserError, encoder.load_vit, vit, file,
                says=f"{file} does not fit the model (1 tensors): cls_token is (1, 32, 1), expected (1, 1, 32)")


def test_what_a_model_would_weigh_by_hand():
    """A file that is too small for its configuration is told how many weights that asks for: each matrix once."""
    vit = dict(width=64, depth=5, heads=2, mlp_width=96, patch=3, size=21)
    dec = dict(latent_dim=8, width=64, heads=2, gtb_depth=3, flow_depth=2, flow_width=40, patch=3, grid=7)
    of_vit = 5 * (4 * 64 * 64 + 2 * 64 * 96) + 64 * 27 + 64 * 49
    # 4 matrices of attention and 2 x 4 of the MLP; the condition's projection; two tables; 5 matrices a flow block;
    # pixels in and out
    of_dec = 3 * 12 * 64 * 64 + 64 * 40 + 2 * 64 * 49 + 2 * 5 * 40 * 40 + 2 * 40 * 27
    for module, least in ((encoder.ViT(encoder.ViTConfig(**vit)), of_vit),
                          (decoder.Decoder(decoder.DecoderConfig(**dec)), of_dec)):
        numbers = sum(p.numel() for p in module.parameters())
        assert least < numbers < 1.35 * least, (least, numbers)
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "x.safetensors")
        latent = {"latent_mean": torch.zeros(8), "latent_std": torch.ones(8), "more": torch.zeros(300)}
        encoder.write_model(path, {"vit": vit, "decoder": dec, "size": 21}, latent)
        size = os.path.getsize(path)
        assert size > 1000, "a number with a comma"
        about = "such a file's metadata have config = {\"vit\": ...}"
        refused(encoder.UserError, encoder.read_config, path,
                says=f"{path} is damaged, or is no model file of this project: {about} (ValueError: its config asks "
                     f"for {of_vit:,} weights, but it has {size:,} bytes)")
        refused(decoder.UserError, decoder.Decoder.from_pretrained, path,
                says=f"{path} does not hold a UniFlow decoder (ValueError: its config asks for {of_dec:,} weights, but "
                f"it has {size:,} bytes)")
        for least, read in (of_vit, encoder.read_config), (of_dec, decoder.Decoder.from_pretrained):
            for bytes_, enough in (2 * least - 1, False), (2 * least, True):  # two bytes a number
                with patch.object(os.path, "getsize", lambda path: bytes_):
                    try:
                        read(path)
                        assert enough
                    except ValueError as e:
                        assert ("asks for" in str(e)) != enough, e


def test_where_downloads_are_looked_for_offline():
    """Hugging Face's variables, one after the other; each value that stands for "no"; what is said where nothing is."""
    with tempfile.TemporaryDirectory() as tmp, patch.dict(os.environ, TORCH_HOME=os.path.join(tmp, "torch")):
        hub = "models--org--repo/snapshots/abc/model.safetensors"
        places = {"HF_HUB_CACHE": "a[1]", "HF_HOME": "b/hub", "XDG_CACHE_HOME": "c/huggingface/hub"}
        for name in (*places, "HF_HUB_OFFLINE", "HF_ENDPOINT"):
            os.environ.pop(name, None)
        with patch.dict(encoder.PUBLISHED, {"model": "org/repo/model.safetensors"}):
            for name, place in reversed(places.items()):  # each comes before those that were set already
                os.environ[name] = os.path.join(tmp, place.split("/")[0])
                path = os.path.join(tmp, place, hub)
                os.makedirs(os.path.dirname(path)), open(path, "w").close()
                assert encoder.fetch("model") == path, name
            for name in places:
                os.environ[name] = os.path.join(tmp, "nothing")
            target = os.path.join(tmp, "torch", "hub", "checkpoints", "org--repo--model.safetensors")
            url = "https://huggingface.co/org/repo/resolve/main/model.safetensors"
            by_hand = f"; or put the file at {target} by hand: curl -L -o {target} {url}"
            refused(encoder.MissingFile, encoder.fetch, "model", True, says=f"{url} is not on this machine{by_hand}")
            asked = []

            def download(*args):
                asked.append(args)
                raise OSError("no network")
            with patch.object(torch.hub, "download_url_to_file", download):
                for value in "1", "true", "YES", "on":
                    with patch.dict(os.environ, HF_HUB_OFFLINE=value):
                        refused(encoder.MissingFile, encoder.fetch, "model",
                                says=f"{url} is not on this machine and HF_HUB_OFFLINE is set: unset it{by_hand}")
                assert not asked
                for value in "0", "", "False", "no":
                    with patch.dict(os.environ, HF_HUB_OFFLINE=value):
                        refused(encoder.MissingFile, encoder.fetch, "model",
                                says=f"{url} could not be fetched (no network): run it again; HF_ENDPOINT sets a "
                                f"mirror, TORCH_HOME the folder{by_hand}")
                assert asked == [(url, target, None)] * 4
            for error, why in ((OSError(), "OSError"), (http.client.BadStatusLine("odd"), "odd"),
                               (RuntimeError("another hash"), "another hash")):
                with patch.object(torch.hub, "download_url_to_file", side_effect=error):
                    refused(encoder.MissingFile, encoder.fetch, "model",
                            says=f"{url} could not be fetched ({why}): run it again; HF_ENDPOINT sets a mirror, "
                            f"TORCH_HOME the folder{by_hand}")
            refused(encoder.MissingFile, encoder.fetch, "other",
                    says=f"other: no such file, no URL, and none of the names {' '.join(encoder.PUBLISHED)}")
            # where another process has fetched it meanwhile, it is not fetched again; the lock is that of the target
            @contextlib.contextmanager
            def locked(path):
                asked.append(path)
                os.makedirs(os.path.dirname(path), exist_ok=True), open(path, "w").close()
                yield
            with patch.object(encoder, "locked", locked), \
                    patch.object(torch.hub, "download_url_to_file", side_effect=AssertionError("a second time")):
                asked.clear()
                assert encoder.fetch("model") == encoder.fetch("model") == target and asked == [target]
                asked += [None] * 3
        # the lock is another file, held by one process alone; its folder is made
        import fcntl
        path, held = os.path.join(tmp, "new", "x"), []
        with patch.object(fcntl, "flock", lambda file, how: held.append((file.name, how))), encoder.locked(path):
            assert held == [(path + ".lock", fcntl.LOCK_EX)] and os.listdir(os.path.join(tmp, "new")) == ["x.lock"]
        # weights that are given come before the published ones
        given = os.path.join(tmp, "given.safetensors")
        with patch.dict(encoder.PUBLISHED, {"micro": "org/repo/model.safetensors"}), \
                patch.dict(encoder.TEACHERS, micro=MICRO_VIT), \
                patch.object(encoder, "fetch", lambda *args: asked.append(args)):
            save_file(encoder.ViT(MICRO_VIT).state_dict(), given)
            assert torch.equal(encoder.load_teacher("micro", given).pos_embed, load_file(given)["pos_embed"])
            assert len(asked) == 4
            for how in (), (None, False), (None, True):
                with contextlib.suppress(TypeError):  # there is no file
                    encoder.load_teacher("micro", *how)
            assert asked[4:] == [("micro", False), ("micro", False), ("micro", True)]
        # a random teacher is announced once under torchrun
        for rank, lines in ("0", 1), ("1", 0):
            with patch.dict(os.environ, RANK=rank), contextlib.redirect_stdout(io.StringIO()) as said:
                encoder.load_teacher("tiny", "random")
            assert said.getvalue().count("\n") == lines
        assert said.getvalue() == ""


# ---- data ----

def test_many_classes_and_several_roots():
    """300 classes in two folders; a path object, a folder that is named with its slash, and numbers beyond the last."""
    names = {"one": [f"{k:03d}/a.png" for k in range(300)], "two/": ["b.png", "299/c.png"]}
    with patch.object(data, "list_folder", lambda root: ((name, *[-1] * 5) for name in names[root])), \
            patch.object(os.path, "isdir", lambda path: True):
        both = data.ImageDataset(["one", "two/"], 16, False)
        assert both.labels.tolist() == [*range(300), 299, 300] and both.classes[298:] == ["298", "299", "two"]
        assert [both.path(i) for i in (0, 299, 300, 301)] == ["one/000/a.png", "one/299/a.png", "two/299/c.png",
                                                              "two/b.png"]
        assert data.ImageDataset(pathlib.Path("one"), 16, False).roots == ["one"]
        assert both.index(301) == both.index(-1) == 301 and both.index(0) == both.index(-302) == 0
        for wrong in 302, -303:
            with contextlib.suppress(IndexError):
                raise AssertionError(f"there is no image {both.index(wrong)}")
        training = data.ImageDataset("one", 16, True)
        order = [np.random.default_rng([0, epoch]).permutation(300) for epoch in (0, 1)]
        for n in 0, 300, 1, 301, 299, 599:  # epochs in turn
            assert training.index(n) == order[n // 300][n % 300]
        for scale in (0, 1), (-0.1, 0.5), (0.5, 1.1), (0.9, 0.5):
            refused(data.UserError, data.ImageDataset, "one", 16, True, 0, scale,
                    says=f"crop_scale is {scale}; expected two fractions in (0, 1], the smaller first")
        data.ImageDataset("one", 16, True, 0, (1, 1))


def test_what_is_said_of_pictures_that_cannot_be_read():
    """At most 100 are tried, and the first is named; limits of pixels and bytes, each at its last value."""
    with tempfile.TemporaryDirectory() as tmp:
        for n, tail in (1, ""), (3, ", nor can the 2 after it"), (101, ", nor can the 99 after it"):
            names = [f"{k:03d}.png" for k in range(n)]
            tried = []

            def load(self, i, short=None):
                tried.append((i, short))
                raise data.UserError(f"is number {i}")
            with patch.object(data, "list_folder", lambda root: ((name, *[-1] * 5) for name in names)), \
                    patch.object(data.ImageDataset, "load", load):
                training, plain = (data.ImageDataset(tmp, 16, train, 0, (0.3, 0.5)) for train in (True, False))
                last = n - 1
                at = next(k for k in range(n) if training.index(k) == last)
                refused(data.UserError, training.__getitem__, at,
                        says=f"{os.path.join(tmp, names[last])}: is number {last}{tail}")
                # 16 / 0.3 = 53.3; then from the first on
                assert tried == [((last + k) % n, 54) for k in range(min(n, 100))]
                tried.clear()
                refused(data.UserError, plain.__getitem__, last,
                        says=f"{os.path.join(tmp, names[last])}: is number {last}")
                assert tried == [(last, None)]
        path, archive = os.path.join(tmp, "x.png"), os.path.join(tmp, "x.zip")
        picture(0, 9, 6).save(path, "JPEG")
        with open(path, "rb") as f:
            whole = f.read()
        for length, says in (2, "none of JPEG, PNG"), (6, "Truncated File Read"), (177, "annot load this image"):
            raises(data.UserError, data.load_image, io.BytesIO(whole[:length]), words=says)  # in PIL's words
        picture(0, 9, 6).save(path)
        with patch.object(data, "MAX_PIXELS", 54):
            assert data.load_image(path).size == (9, 6)
        with patch.object(data, "MAX_PIXELS", 53):
            refused(data.UserError, data.load_image, path,
                    says="cannot be read as an image (UserError: 9x6 pixels, more than 53)")
        with patch.object(data, "open_image", side_effect=ValueError("long text\n" * 60)):
            refused(data.UserError, data.load_image, path,
                    says=f"cannot be read as an image ({('ValueError: ' + 'long text ' * 60)[:200]})")
        size = os.path.getsize(path)
        with patch.object(data, "MAX_BYTES", size):
            assert data.load_image(path).size == (9, 6)
        with patch.object(data, "MAX_BYTES", size - 1):
            refused(data.UserError, data.load_image, path, says=f"is no plain file, or longer than {size - 1:,} bytes")
        refused(data.UserError, data.load_image, tmp, says=f"is no plain file, or longer than {data.MAX_BYTES:,} bytes")
        for method, (packed, whole) in {8: (20, 5000), 0: (5000, 5000)}.items():
            with zipfile.ZipFile(archive, "w", method) as z:
                z.writestr("a.png", bytes(5000))
            zipped = data.ImageDataset(archive, 16, False)
            assert zipped.spans[0, 1] in range(packed, packed + 15) and zipped.spans[0, 3] == whole
            with patch.object(data, "MAX_BYTES", 4999):
                refused(data.UserError, zipped.read, 0, says="is 5,000 bytes long; at most 4,999 are read")
            with patch.object(data, "MAX_BYTES", 5000):
                assert zipped.read(0) == bytes(5000)
            if method:
                with patch.object(zlib, "decompressobj", side_effect=zlib.error("odd")):
                    refused(data.UserError, zipped.read, 0, says="damaged in the archive (odd)")
        with patch.object(data.zipfile, "ZipFile", side_effect=OSError(errno.EMFILE, "Too many open files")):
            refused(OSError, data.ImageDataset, archive, 16, False, says=f"[Errno 24] Too many open files: {archive!r}")
        with patch.object(data.zipfile, "ZipFile", side_effect=OSError(errno.EACCES, "not allowed")):
            refused(data.UserError, data.ImageDataset, archive, 16, False,
                    says=f"{archive} is neither a folder nor a .zip archive that can be read ([Errno 13] not allowed)")
        for wrong in 4999, 5001:  # a directory that tells another length
            zipped.spans[0, 3] = wrong
            refused(data.UserError, zipped.read, 0,
                    says="damaged in the archive, or the archive was changed meanwhile (CRC-32)")
        read = data.ImageDataset([tmp], 16, False)
        for e, code in (OSError("no number"), errno.EIO), (MemoryError(), errno.ENOMEM), (OSError(5, "x"), errno.EIO):
            waits = []
            with patch.object(data, "load_image", side_effect=e), patch.object(data.time, "sleep", waits.append):
                refused(OSError, read.load, 0,
                        says=f"[Errno {code}] {os.strerror(code)} in each of 4 attempts: {path!r}")
            assert waits == [0.1, 0.4, 1.5]


def test_what_pil_warns_of_is_not_shown():
    """Odd metadata of a picture or an animation are no business of the user, whatever filters are set."""
    with tempfile.TemporaryDirectory() as tmp:
        path, plain = clip(os.path.join(tmp, "a.webp")), data.open_image
        odd = lambda file: warnings.warn("odd") or plain(file)
        with patch.object(data, "open_image", odd), patch.object(pictures, "open_image", odd), \
                warnings.catch_warnings(record=True, action="always") as shown:
            assert data.load_image(path).size == (40, 30) and len(pictures.load_frames(path, 0)[0]) == 4
            assert not shown
        # what is wrong with an animation is said in one line; what the user is to know is said as it is
        plain_tensor, frames = pictures.to_tensor, []

        def second(img):
            frames.append(img)
            if len(frames) == 3:  # the still, the first frame, then this one
                raise error
            return plain_tensor(img)
        clip(path)
        for error, says in ((EOFError("no more\nframes"), "is a damaged animation (EOFError: no more frames)"),
                            (data.UserError("of the user"), "of the user")):
            frames.clear()
            with patch.object(pictures, "to_tensor", second):
                refused(ValueError, pictures.load_frames, path, 0, says=says)


def test_jpegs_that_are_decoded_smaller_keep_their_last_rows():
    """A side that is no multiple of 8 is cut where shrink would cut it; a turned picture is then decoded whole."""
    def jpeg(width, height, orientation=1):
        file, exif = io.BytesIO(), Image.Exif()
        exif[274] = orientation
        picture(0, width, height).save(file, "JPEG", exif=exif)
        return file
    for width, height in (323, 240), (320, 243), (325, 246):
        assert data.load_image(jpeg(width, height), 30).size == (width // 4, height // 4), "a quarter"
        for orientation in 3, 6:
            file = jpeg(width, height, orientation)
            whole, small = data.load_image(file), data.load_image(file, 30)
            assert np.array_equal(whole, small) and sorted(whole.size) == sorted((width, height))
    assert data.load_image(jpeg(320, 240, 6), 30).size == (60, 80)


# ---- training ----

def test_what_a_run_trains_and_evaluates_on():
    """--data and --val, one, the other, both or none: sets, seeds, sizes, names; whose bad pictures are replaced."""
    with tempfile.TemporaryDirectory() as tmp:
        (a, _), (b, _) = picture_folder(os.path.join(tmp, "a"), 4), picture_folder(os.path.join(tmp, "b"), 2)
        flags = ["--size", "24", "--seed", "7", "--crop_scale", "0.5", "0.75"]
        build = lambda *more: train.build_data(train.parse_args([*flags, *more]))
        drawn_sets = lambda *sets: [(type(x), x.size, x.train, x.seed) for x in sets]
        train_set, val, name = build()
        assert drawn_sets(train_set, val) == [(drawn.ProceduralDataset, 24, train, 7) for train in (True, False)]
        assert name == "other drawn pictures"
        train_set, val, name = build("--val", b, a)
        assert drawn_sets(train_set) == [(drawn.ProceduralDataset, 24, True, 7)]
        of_folder = lambda x: (x.roots, x.size, x.train, x.seed, x.crop_scale, x.replace)
        assert of_folder(val) == ([b, a], 24, False, 0, (0.8, 1.0), False) and name == f"{b} {a}"
        for more, roots, replaced, expected in (([], [a, b], True, "the training images"),
                                                (["--val", b], [b], False, b)):
            train_set, val, name = build("--data", a, b, *more)
            assert of_folder(train_set) == ([a, b], 24, True, 7, (0.5, 0.75), True)
            assert of_folder(val) == (roots, 24, False, 0, (0.8, 1.0), replaced) and name == expected
        open(os.path.join(b, "class1", "1.png"), "w").close()
        with patch.dict(os.environ, RANK="0"):
            refused_by_name = os.path.join(b, "class1", "1.png") + ": cannot be read as an image"
            try:
                build("--val", b)
                raise AssertionError("a bad image of --val is an error before the training")
            except data.UserError as e:
                assert str(e).startswith(refused_by_name)
            build("--data", b)
            seen = []  # of many pictures those are tried that an evaluation reads
            with patch.object(train, "spread", lambda n: seen.append(n) or [0]):
                build("--val", b)
            assert seen == [2]
        with patch.dict(os.environ, RANK="1"):
            build("--val", b)  # rank 0 says it


def test_a_start_from_another_tokenizer():
    """--init: what differs, and the file's value first; statistics are set back and named, the mean's or the
    deviation's alone, by rank 0."""
    with tempfile.TemporaryDirectory() as tmp:
        path, other = tokenizer_file(tmp), os.path.join(tmp, "other.safetensors")
        config, tensors = encoder.read_config(path), load_file(path)
        flags = ["--teacher", os.path.join(tmp, "teacher.safetensors"), "--latent_dim", "8", "--gtb_depth", "2",
                 "--flow_depth", "2", "--flow_width", "96", "--init", other]
        build = lambda *more: train.build_models(train.parse_args([*flags, *more]))
        mean, std = (tensors[f"latent_{name}"].clone() for name in ("mean", "std"))
        mean[3], std[5] = 0.5, 2.0
        warning = (f"{other} has latent statistics: they are set back, because training moves the latent; run `python "
                   "-m tools.latents stats` again afterwards\n")
        for changed, words in ({}, ""), ({"latent_mean": mean}, warning), ({"latent_std": std}, warning):
            encoder.write_model(other, config, {**tensors, **changed})
            for rank in "0", "1":
                with patch.dict(os.environ, RANK=rank), contextlib.redirect_stdout(io.StringIO()) as said:
                    _, enc, dec = build("--size", "24")  # another grid does not matter
                assert said.getvalue() == words * (rank == "0")
                assert all(not m.latent_mean.any() and (m.latent_std == 1).all() and m.training for m in (enc, dec))
                assert torch.equal(enc.vit.pos_embed, tensors["encoder.vit.pos_embed"])
        with patch.object(train, "find_weights", lambda given: {other: given, "by its name": path}[given]):
            _, enc, _ = build("--init", "by its name")
        assert torch.equal(enc.latent_down[2].weight, tensors["encoder.latent_down.2.weight"])
        refused(encoder.UserError, build, "--flow_width", "48", "--gtb_depth", "1",
                says=f"{other} has gtb_depth 2, not 1, flow_width 96, not 48: pass what it was trained with")


def test_losses_of_pictures_that_are_not_square():
    """A time for each patch of 8 x 12 pixels, by the code that train.py runs."""
    seen, plain = [], train.sample_t
    teacher, dec = encoder.ViT(MICRO_VIT), decoder.Decoder(MICRO_DECODER)
    args = train.parse_args(["--endpoint", "0.5", "--size", "64"])
    with patch.object(train, "sample_t", lambda shape, *rest: seen.append((shape, *rest)) or plain(shape, *rest)):
        train.losses(teacher, encoder.Encoder(encoder.ViT(MICRO_VIT), 8), dec, torch.rand(5, 3, 8, 12), args)
    assert seen == [((5, 6), 0.5, torch.device("cpu"))]


def test_neither_cls_nor_registers_are_distilled():
    """Of 0, 1 and 5 prefix tokens none is compared, in training and in its bench: student and teacher on their 6
    patches, in this order, and with the flags' beta and strategy."""
    img, dec = torch.rand(2, 3, 8, 12), decoder.Decoder(MICRO_DECODER)
    args = train.parse_args(["--beta", "3", "--strategy", "uniform", "--size", "64"])
    for prefix in 0, 1, 5:
        torch.manual_seed(0)
        teacher, vit = (encoder.ViT(replace(MICRO_VIT, num_prefix=prefix)) for _ in range(2))
        enc, seen = encoder.Encoder(vit, 8), []

        def compare(student, teacher, *how):
            seen.append(([*student], [*teacher], how))
            return distill.distill_loss(student, teacher, *how[:2])
        with patch.object(train, "distill_loss", compare):
            train.losses(teacher, enc, dec, img, args)
        with patch.object(speed, "distill", types.SimpleNamespace(distill_loss=compare, layer_distances="bench's")):
            for part in speed.training_parts(args, teacher, enc, dec, img).values():
                part()
        for (student, theirs, how), distances in zip(seen, (distill.layer_distances, "bench's"), strict=True):
            assert how == (3.0, "uniform", distances)
            for found, whole in (student, vit(img)), (theirs, teacher(img)):
                assert len(found) == 3 and all(torch.equal(a, b[:, prefix:]) for a, b in zip(found, whole)), prefix


# ---- what is printed, what is known by its number ----

def test_the_networks_tell_their_shapes():
    """What `python encoder.py` and `python decoder.py` print: shapes, and parameters counted by hand."""
    block = lambda D, mlp: 4 * D + 4 * (D * D + D) + 2 * D * mlp + mlp + D  # two norms; q, k, v, proj; MLP
    D = 192
    ours = {
        "encoder": D + 65 * D + D * (3 * 64 + 1) + 12 * block(D, 4 * D) + 2 * D + D * D + D + D * 16 + 16,
        "decoder": 17 * D + D * D + D + 2 * 64 * D + 3 * block(D, 4 * D)  # P_up, two tables, GTB; then the flow head
        + 384 * (192 + 1 + 256 + 1 + 385 + D + 1) + 6 * (2 * 384 + 5 * 384 * 385) + 2 * 384 * 385 + 385 * 192}
    printed = {"encoder": [
        "teacher tiny: a seeded RANDOM initialisation, no pretrained weights, so it teaches no semantics",
        "image    (2, 3, 64, 96) in [0, 1]", "hidden   12 x (2, 97, 192)", "latent   (2, 16, 8, 12) normalised",
        "features (2, 96, 192)", f"parameters {ours['encoder']:,}"], "decoder": [
        "latent z   (2, 16, 8, 12)", "condition  (2, 96, 192)", "loss       N (untrained: v = 0)",
        "image      (2, 3, 64, 96) in [0, 1], one step", "image      (2, 3, 64, 96) in [0, 1], four steps",
        f"parameters {ours['decoder']:,}"]}
    for leaf, lines in printed.items():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(os.path.join(HERE, leaf + ".py"), run_name="__main__")
        assert re.sub(r"\d\.\d{4}", "N", said.getvalue()).splitlines() == lines


def test_data_py_tells_what_is_found():
    with tempfile.TemporaryDirectory() as tmp:
        folder, archive = picture_folder(tmp, 3)
        for paths, lines in (([folder], ["3 images of 2 classes", "label  0 = class0"]),
                             ([os.path.join(folder, "class1"), archive],
                              ["4 images of 2 classes", "label  1 = class1"])):
            said = io.TextIOWrapper(io.BytesIO())
            with contextlib.redirect_stdout(said), patch.object(sys, "argv", ["data.py", *paths]):
                runpy.run_path(os.path.join(HERE, "data.py"), run_name="__main__")
            said.seek(0)
            assert said.read().splitlines() == [lines[0], "image  (3, 64, 64) torch.uint8", lines[1]]


def test_numbers_and_names_that_data_knows():
    """Extensions, the limits of a picture, the errors of one file, folders that systems make, and TIFF 6.0's tags, by
    their published numbers: those that say how pixels are stored stay, and all others are hidden."""
    assert data.EXTENSIONS == tuple("." + x for x in "jpg jpeg png webp bmp gif tif tiff ppm pgm avif".split())
    # of 2^27 = 134,217,728 pixels in four bytes each
    for width, height, fits in (11585, 11585, True), (8192, 16384, True), (8192, 16385, False), (134_217_729, 1, False):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        blob = b"\x89PNG\r\n\x1a\n"
        for kind, content in (b"IHDR", header), (b"IDAT", b""), (b"IEND", b""):
            blob += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        if fits:
            with warnings.catch_warnings(action="ignore"):  # PIL's own limit is lower
                assert data.open_image(io.BytesIO(blob)).size == (width, height)
        else:
            refused(data.UserError, data.open_image, io.BytesIO(blob),
                    says=f"{width}x{height} pixels, more than 134,217,728")
    assert data.MAX_BYTES == 536_870_912
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp, 1)
        read = data.ImageDataset(folder, 16, False)
        for name in "ENOENT ENOTDIR EISDIR ELOOP ENAMETOOLONG EACCES EPERM EINVAL EILSEQ".split():
            with patch.object(data.os, "stat", side_effect=OSError(getattr(errno, name), "x")):
                refused(data.UserError, read.read, 0, says="cannot be opened (x)")
        for name in "@eaDir #recycle $RECYCLE.BIN __MACOSX lost+found".split() + ["System Volume Information", ".x"]:
            shutil.copytree(os.path.join(folder, "class0"), os.path.join(folder, name))
        assert len(data.ImageDataset(folder, 16, False)) == 1
        shutil.copytree(os.path.join(folder, "class0"), os.path.join(folder, "recycle"))
        assert len(data.ImageDataset(folder, 16, False)) == 2
    # subfile types, size, bits, compression, photometric, threshholding, cells, fill order; strips, samples, rows;
    # planes; T4, T6; predictor; palette; tiles; inks; extra samples, their format; JPEG's tables; JPEG's own; YCbCr's
    stored = {254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322,
              323, 324, 325, 332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532}
    # names, places and dates, the turn, resolutions, pages, response curves, white point and colours, half tones, dots;
    # XMP, copyright, IPTC, Photoshop, EXIF, a colour profile, GPS
    others = {269, 270, 271, 272, 274, 280, 281, 282, 283, 285, 286, 287, 288, 289, 290, 291, 296, 297, 301, 305, 306,
              315, 316, 318, 319, 321, 333, 334, 336, 337, 340, 341, 342, 533, 700, 33432, 33723, 34377, 34665, 34675,
              34853}
    for order, mark in ("<", b"II"), (">", b"MM"):
        for tag in stored | others:
            tiff = mark + struct.pack(order + "HIH", 42, 8, 1) + struct.pack(order + "HHII", tag, 4, 1, 7) + bytes(4)
            patched, tags = data.patch_tiff(tiff)
            assert tags == {tag: 7} and len(patched) == len(tiff)
            found = struct.unpack_from(order + "H", patched, 10)[0]
            assert found == (tag if tag in stored else 65000), (tag, found)


def test_other_tensors_that_published_files_hold():
    """Names as they are in files of the models that the layouts are of, and names that nobody has accounted for."""
    known = """mean std text_model.embeddings.token_embedding.weight model.language_model.layers.0.mlp.up_proj.weight
        language_model.lm_head.weight model.multi_modal_projector.linear_1.weight multi_modal_projector.linear_1.bias
        transformer.resblocks.0.ln_1.weight token_embedding.weight positional_embedding ln_final.weight ln_final.bias
        text_projection text_projection.weight visual_projection.weight visual.proj logit_scale logit_bias
        attn_pool.latent attn_pool.kv.weight head.weight vision_model.head.probe
        vision_model.head.attention.in_proj_bias pooler.dense.weight classifier.bias mask_token embeddings.mask_token
        embeddings.position_ids text_model.embeddings.position_ids vision_model.embeddings.position_ids
        model.text_model.x""".split()
    for name in known:
        assert encoder.KNOWN_EXTRAS.match(name), name
    for name in """meaning standard visual.projector heads.weight blocks.0.head.weight norm.mean vision_model.header.x
            logit_scales embeddings.mask_tokens visual.transformer.resblocks.0.ln_1.weight models.text_model.x
            encoder.layers.24.norm1.weight pos_embed_2""".split():
        assert not encoder.KNOWN_EXTRAS.match(name), name
    with tempfile.TemporaryDirectory() as tmp:  # each prefix that transformers' models give a tower's names
        path, own = os.path.join(tmp, "x.safetensors"), encoder.ViT(MICRO_VIT).state_dict()
        for prefix in "", "vision_model.", "vision_tower.", "model.vision_tower.", "vit.":
            vit = encoder.ViT(MICRO_VIT)
            save_file({prefix + k: x for k, x in own.items() if k not in ("mean", "std")}, path)
            encoder.load_vit(vit, path)
            assert all(torch.equal(x, own[k]) for k, x in vit.state_dict().items()), prefix
