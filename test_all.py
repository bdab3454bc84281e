"""Tests of the whole project. Each carries its oracle: a number worked by hand, a closed form, another implementation.

    python test_all.py [NAME ...]           # all tests, or those whose name contains NAME
    python test_all.py --list [NAME ...]    # what there is, with the purpose of each; slow_ ones run by their name only

The sections of this file, in its order, and the files of tests/ that run with it:

    distill.py                      equation 1, distances, and no gradient through the weights
    decoder.py                      patches, the flow's loss, Euler steps, times, the pixel objective
    encoder.py                      sizes, layout, position grids, files
    data.py                         folders and archives, crops, the order of samples, kinds of pictures
    eval.py                         PSNR, SSIM, PCA, Inception, FID, the probe, and whole evaluations
    train.py                        losses, options, optimizer, ranks, resume, log
    sample.py                       latents, features, animations, pipes
    a user's path                   each file alone, train then sample then evaluate, the shipped weights
    faults                          what a user gets wrong, and pictures that cannot be read
    this file                       its table of contents, its list, its runner
    tests/test_commands.py          Commands of README.md and docs/, the benches, the rows of the study
    tests/test_efficiency_flags.py  Flags that make training cheaper: AdamW's betas, warm-up, decay, averaged weights
    tests/test_faults.py            Hostile and damaged files, full disks, signals, bad numbers, crashes, ranks that die
    tests/test_flags.py             Every flag of every script changes the quantity that it names, by what it says
    tests/test_images.py            Odd metadata, all sorts of archives and folders, trouble of the machine, other
                                    systems
    tests/test_latents.py           Saved latents: their statistics, their order, faults of the folder
    tests/test_measures.py          Measures in any order of files, figures that never get lost, workers that end
    tests/test_modules.py           The models in other people's code: state dicts, precisions, wrappers, interfaces
    tests/test_oracles.py           What the code computes, against tables of published facts, closed forms and numpy
    tests/test_published.py         Published weights: layouts of each family, the released file, the export, downloads
    tests/test_runs.py              Scripts at their boundaries: a user's error and a bug, names, targets, moved data
    tests/test_standard_sets.py     The experiments on standard sets and on GPU time, and the flow in a frozen
                                    autoencoder's space
    tests/test_tools.py             The scripts of tools/
    tests/test_values.py            Values that other tests only see move: random draws, ends of ranges, one rank's loss
    tests/test_values_scripts.py    Values that the scripts pass on or say: counts, defaults, hints, rFID's reference
    tests/test_whole_outputs.py     Whole reports, log lines and messages of the scripts, word by word, against values
                                    computed here

What the tests share is in tests/: runner.py (what runs and lists them), helpers.py (micro models, pictures, processes),
published.py (reference networks and layouts), hostile.py (damaged files, fuzzers), crashes.py (killed runs), mutants.py
(mistakes that the tests must notice). They run on the CPU in tiny configurations and need requirements-test.txt.
`pytest test_all.py` runs the same functions. The tests of downstream/ run by `python -m tests.downstream`, those of
downstream/detect.py, which need torchvision, by `python -m tests.detection`.
"""
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import types
import unittest.mock
import zipfile
from dataclasses import asdict, replace

# first: tests.helpers sets the environment that torch reads when it is imported
from tests.helpers import (
    HERE, METHOD, MICRO_DECODER, MICRO_RUN, MICRO_VIT, QuickInception, clip, close, evaluate, inception_reference,
    log_lines, micro_models, micro_teacher, picture, picture_folder, pixels, raises, random_inception, run, run_ranks,
    same_weights, sampled, side_by_side, tokenizer_file, train_quietly)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
import decoder
import distill
import encoder
import eval as evaluation
import sample
import tools.batches
import tools.pictures
import tools.validate as validation
import train
from tests import runner
from tools.drawn import ProceduralDataset
from tools.optimizer import join_gradients

# ---- distill.py: equation 1, distances, and no gradient through the weights ----


def test_layer_weights_by_hand():
    # L = 3, beta = 2: (1/3)e^1.0 = 0.906094, (2/3)e^0.4 = 0.994550, (3/3)e^0.2 = 1.221403, sum 3.122047
    alpha = torch.tensor([0.5, 0.2, 0.1])
    by_hand = torch.tensor([0.290224, 0.318557, 0.391219])
    close(distill.layer_weights(alpha, beta=2.0), by_hand, 3e-6)
    product = torch.softmax(torch.tensor([1 / 3, 2 / 3, 1]) * 2 * alpha, 0)  # the mistake of a public copy
    assert (product - by_hand).abs().max() > 0.02, "the example must tell eq. 1 from a softmax of the product"
    close(distill.layer_weights(alpha, 9.0, "progressive"), torch.tensor([1 / 6, 2 / 6, 3 / 6]))
    close(distill.layer_weights(alpha, 9.0, "uniform"), torch.tensor([1 / 3, 1 / 3, 1 / 3]))
    assert distill.layer_weights(alpha, 9.0, "final").tolist() == [0, 0, 1]
    assert distill.layer_weights(torch.tensor([2.0, 0.0]), 1000.0).tolist() == [1, 0], "a large beta must not overflow"


def test_layer_distances():
    t = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    s = torch.tensor([[[0.0, 3.0], [2.0, 2.0]]])  # cosines 0 and 1; then -1 and -1
    close(distill.layer_distances([s, -t], [t, t]), torch.tensor([0.5, 2.0]))


def test_no_gradient_through_weights():
    torch.manual_seed(0)
    teacher = [torch.randn(2, 5, 4) for _ in range(3)]
    student = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    loss, weights, distances = distill.distill_loss(student, teacher)
    assert not weights.requires_grad and not distances.requires_grad
    got = torch.autograd.grad(loss, student)
    for l in range(3):  # d loss / d student_l = w_l d alpha_l, by the closed form of the cosine's gradient
        s, t = student[l].detach(), teacher[l]
        ns, nt = s.norm(dim=-1, keepdim=True), t.norm(dim=-1, keepdim=True)
        cos = (s * t).sum(-1, keepdim=True) / (ns * nt)
        close(got[l], -weights[l] * (t / (ns * nt) - cos * s / ns ** 2) / 10, 1e-5)


def test_fig16_table():
    """`python distill.py` prints eq. 1 for the simulated distances: recomputed here from the printed ones."""
    head, *lines, last = run("python", "distill.py").stdout.splitlines()
    rows = [line.split() for line in lines]
    alpha = np.array([float(r[1]) for r in rows])
    assert [int(r[0]) for r in rows] == list(range(1, 25)) and alpha[0] == 0.9 and alpha[-1] == 0.1
    assert head.split() == "layer alpha w(beta=0.5) w(beta=1.0) w(beta=2.0) w(beta=5.0) w(beta=2.0)".split()
    # the bars show the column of beta 2, which is printed to four decimals: 600 of it are known to 0.03
    assert all(r[6] == "#" * len(r[6]) and abs(len(r[6]) - 600 * float(r[4])) < 0.54 for r in rows)
    assert re.fullmatch(r"tokens 24 x \(2, 64, 192\) -> loss 0\.0\d{3}, weights \(24,\)", last), last
    for column, beta in ((2, 0.5), (3, 1.0), (4, 2.0), (5, 5.0)):
        w = np.arange(1, 25) / 24 * np.exp(beta * alpha)
        assert np.abs(np.array([float(r[column]) for r in rows]) - w / w.sum()).max() < 5e-4


# ---- decoder.py: patches, the flow's loss, Euler steps, times, the pixel objective ----

def test_patchify_by_hand():
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij")
    img = (100 * c + 10 * y + x)[None].float()  # each value spells its channel, row and column; 4 x 6 pixels
    patches = decoder.patchify(img, 2)
    assert patches.shape == (1, 6, 12)
    assert patches[0, 0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111, 200, 201, 210, 211]
    # second row, second column
    assert patches[0, 4].tolist() == [22, 23, 32, 33, 122, 123, 132, 133, 222, 223, 232, 233]
    close(patches, F.unfold(img, 2, stride=2).transpose(1, 2), 0)
    assert torch.equal(decoder.unpatchify(patches, 2, 4, 6), img)


def test_flow_loss_closed_form():
    _, _, dec = micro_models()
    img, z, noise, t = torch.rand(2, 3, 16, 16), torch.randn(2, 8, 4, 4), torch.randn(2, 16, 48), torch.rand(2, 16)
    x = decoder.patchify((img - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
                         / torch.tensor([0.229, 0.224, 0.225])[:, None, None], 4)
    seen = {}

    def perfect(x_t, t, c):
        seen["x_t"] = x_t
        return noise - x
    dec.velocity = perfect
    assert dec.loss(z, img, t, noise).item() < 1e-12, "the true velocity eps - x must have no loss"
    close(seen["x_t"], (1 - t[..., None]) * x + t[..., None] * noise, 1e-6)
    dec.velocity = lambda x_t, t, c: noise - x + 0.5
    assert abs(dec.loss(z, img, t, noise).item() - 0.25) < 1e-5, (
        "the loss is a mean over patches and elements: an error of 0.5 everywhere gives 0.25")


def test_euler_closed_form():
    _, _, dec = micro_models()
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    z, noise = torch.randn(2, 8, 4, 6), 0.3 * torch.randn(2, 24, 48)

    def decoded(steps):
        return ((dec.decode(z, steps, noise) - mean) / std)
    start = decoder.unpatchify(noise, 4, 16, 24)
    dec.velocity = lambda x, t, c: 0.5 * x
    for n in (1, 2, 10):  # x' = 0.5 x backwards in n steps: (1 - 0.5/n)^n x
        close(decoded(n), (1 - 0.5 / n) ** n * start, 1e-5)
    dec.velocity = lambda x, t, c: torch.full_like(x, 0.7)
    close(decoded(100), decoded(1), 1e-5)  # on a constant field one step is exact
    close(decoded(1), start - 0.7, 1e-5)
    times = []
    dec.velocity = lambda x, t, c: times.append(t[0, 0].item()) or torch.zeros_like(x)
    dec.decode(z, 4, noise)
    assert times == [1.0, 0.75, 0.5, 0.25], f"Euler steps from noise (1) to image (0) were at {times}"
    calls = []
    dec.condition = lambda z: calls.append(1) or torch.zeros(2, 24, 32)
    dec.decode(z, 4, noise)
    assert len(calls) == 1, "the condition is computed once for all steps"


def test_flow_head_is_patchwise_and_gtb_is_not():
    for depth, moved in ((2, 16), (0, 1)):
        _, _, dec = micro_models(config=decoder.DecoderConfig(**{**asdict(MICRO_DECODER), "gtb_depth": depth}))
        z, x_t, t = torch.randn(1, 8, 4, 4), torch.randn(1, 16, 48), torch.rand(1, 16)
        z2 = z.clone()
        z2[0, :, 1, 1] += 1  # one latent token, number 5
        changed = (dec.condition(z2) - dec.condition(z)).abs().sum(-1)[0] > 1e-6
        assert changed.sum() == moved and changed[5], (
            f"with {depth} global blocks one latent token moved {changed.sum()} tokens")
        c = dec.condition(z)
        c2, x2 = c.clone(), x_t.clone()
        c2[0, 3] += 1
        x2[0, 7] += 1
        for other in (dec.velocity(x_t, t, c2), dec.velocity(x2, t, c)):
            touched = (other - dec.velocity(x_t, t, c)).abs().sum(-1)[0] > 0
            assert touched.sum() == 1 and (touched[3] or touched[7]), (
                "the flow head must see one patch and its own condition")


def test_sample_t_distribution():
    torch.manual_seed(0)
    n = 400_000
    t = decoder.sample_t((n,))
    assert 0 <= t.min() and t.max() <= 1
    for q in (0.02, 0.1, 0.3, 0.5, 0.9, 0.98):  # P(t < q) = 0.9 Phi(logit q) + 0.1 q
        expected = 0.9 * 0.5 * (1 + math.erf(math.log(q / (1 - q)) / math.sqrt(2))) + 0.1 * q
        assert abs((t < q).float().mean().item() - expected) < 5 * math.sqrt(0.25 / n), q
    ends = (decoder.sample_t((n,), endpoint=0.3) == 1).float().mean().item()
    assert abs(ends - 0.3) < 0.005 and (decoder.sample_t((100,), endpoint=1.0) == 1).all()


def test_pixel_decoder_learns_from_its_own_initialisation():
    """The loss falls below half of the best constant patch's.

    A head whose zeros pass no gradient would learn that patch only.
    """
    torch.manual_seed(0)
    dec = decoder.Decoder(replace(MICRO_DECODER, objective="pixel"))
    z, img = (torch.randn(4, MICRO_DECODER.latent_dim, 4, 4),
              torch.rand(4, 3, 4 * MICRO_DECODER.patch, 4 * MICRO_DECODER.patch))
    optimizer = torch.optim.AdamW(dec.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = dec(z, img)
        loss.backward()
        optimizer.step()
    x = decoder.patchify((img - dec.mean) / dec.std, MICRO_DECODER.patch).flatten(0, 1)
    assert loss.item() < 0.5 * x.var(0, correction=0).mean().item(), loss


def test_pixel_objective_regresses_the_pixels():
    _, _, dec = micro_models(config=decoder.DecoderConfig(**{**asdict(MICRO_DECODER), "objective": "pixel"}))
    img, z = torch.rand(2, 3, 16, 16), torch.randn(2, 8, 4, 4)
    x = decoder.patchify((img - dec.mean) / dec.std, 4)
    predicted = -dec.velocity(torch.zeros_like(x), torch.ones(2, 16), dec.condition(z))
    close(dec.loss(z, img, torch.rand(2, 16), torch.randn_like(x)), F.mse_loss(predicted, x), 1e-6)
    assert torch.equal(dec.decode(z), dec.decode(z, steps=5)), "no noise goes in, and there is one step"
    close(dec.decode(z), (decoder.unpatchify(predicted, 4, 16, 16) * dec.std + dec.mean).clamp(0, 1), 1e-5)
    raises(ValueError, dec.decode, z, 0, words="steps is 0; expected at least 1")


# ---- encoder.py: sizes, layout, position grids, files ----

def test_parameter_counts_of_full_size_models():
    counts = {"internvit": 304_012_288, "dinov2": 304_367_616, "siglip2": 412_649_712, "siglip2-l": 303_361_024,
              "clip": 303_179_776}
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
    for name, expected in counts.items():  # the published backbones, TEACHERS.md
        args = train.parse_args(["--teacher", name])
        with torch.device("meta"):
            vit = encoder.ViT(encoder.TEACHERS[name])
            dec = decoder.Decoder(decoder.DecoderConfig(
                latent_dim=args.latent_dim, width=vit.config.width, heads=vit.config.heads, gtb_depth=args.gtb_depth,
                flow_depth=args.flow_depth, flow_width=args.flow_width, patch=vit.config.patch,
                grid=args.size // vit.config.patch))
            loss = dec(encoder.Encoder(vit)(torch.empty(1, 3, args.size, args.size))[0],
                       torch.empty(1, 3, args.size, args.size))
        assert count(vit) == expected, f"{name} has {count(vit):,} parameters, published {expected:,}"
        assert loss.shape == ()
        # as released: 64*1024+1024 + 1024^2+1024; 6*(12*1024^2 + 13*1024); the flow head's list
        if name == "internvit":
            assert count(dec.latent_up) == 1_116_160 and count(dec.blocks) == 75_577_344
            assert count(dec.head) == 68_667_980


def test_any_size_that_is_a_multiple_of_the_patch():
    _, enc, dec = micro_models()
    for H, W in ((16, 16), (8, 28), (36, 4)):
        z, hidden = enc(torch.rand(2, 3, H, W))
        assert z.shape == (2, 8, H // 4, W // 4)
        assert [h.shape for h in hidden] == 3 * [(2, 1 + H * W // 16, 32)]
        assert enc.features(torch.rand(2, 3, H, W)).shape == (2, H * W // 16, 32)
        assert dec.decode(z).shape == (2, 3, H, W)
    raises(ValueError, enc, torch.rand(1, 3, 18, 16), words=["16x18", "multiples of the patch 4"])


def test_random_teacher_is_seeded():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        a, b = (encoder.load_teacher("tiny", "random").state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a) and said.getvalue().count("RANDOM") == 2
    # no such teacher ships, and nothing replaces it
    raises(FileNotFoundError, encoder.load_teacher, "small",
           words=f"{HERE}/weights/teacher-small.safetensors: no such file; train it "
           "(python -m experiments.tiny_imagenet.teacher), or give --teacher_weights FILE|random")
    for wrong in "intern", None:
        raises(encoder.UserError, encoder.load_teacher, wrong,
               words=f"teacher {wrong!r} is neither a file nor one of: {' '.join(encoder.TEACHERS)}")


def test_latent_layout_is_row_major():
    _, enc, _ = micro_models()
    img = torch.rand(1, 3, 16, 24)
    z, hidden = enc(img)
    tokens = enc.latent_down(enc.vit.norm(hidden[-1])[:, 1:])  # (1, 24, 8)
    assert torch.equal(z[0, :, 2, 5], tokens[0, 2 * 6 + 5])
    assert torch.equal(enc.features(img), enc.vit.norm(hidden[-1])[:, 1:])
    assert torch.equal(enc.features(img, layer=-2), hidden[-2][:, 1:])


def test_position_grid_resize():
    """Against cubic convolution with a = -0.75 (PyTorch's and OpenCV's bicubic), written out as two matrices."""
    def cubic(n_in, n_out):
        def kernel(x):
            x = abs(x)
            return (1.25 * x - 2.25) * x * x + 1 if x <= 1 else -0.75 * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0
        matrix = torch.zeros(n_out, n_in)
        for i in range(n_out):
            x = (i + 0.5) * n_in / n_out - 0.5  # align_corners=False
            for j in range(math.floor(x) - 1, math.floor(x) + 3):
                matrix[i, min(max(j, 0), n_in - 1)] += kernel(x - j)  # the border repeats
        return matrix
    torch.manual_seed(0)
    pos = torch.randn(1, 64, 5)
    for module in (encoder, decoder):
        assert module.resize_grid(pos, 8, 8) is pos, "at its own size the grid must stay bit-identical"
        for h, w in ((16, 20), (5, 11)):  # 5 < 8: no antialiasing
            expected = torch.einsum("hi,wj,ijd->hwd", cubic(8, h), cubic(8, w), pos.view(8, 8, 5))
            close(module.resize_grid(pos, h, w), expected.reshape(1, h * w, 5), 1e-5)


def test_drop_path_and_activation_checkpointing():
    _, enc, dec = micro_models()
    img, t, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16), torch.randn(2, 16, 48)

    def gradients(recompute):
        enc.vit.checkpoint = dec.checkpoint = recompute
        enc.zero_grad(), dec.zero_grad()
        dec(enc(img)[0], img, t, noise).backward()
        return torch.cat([p.grad.flatten() for m in (enc, dec) for p in m.parameters()])
    assert torch.equal(gradients(True), gradients(False)), "recomputing activations must not change the gradients"
    enc.vit.checkpoint = False
    enc.vit.drop_path = 0.5
    plain = enc.eval()(img)[1]
    assert torch.equal(enc(img)[1][-1], plain[-1]), "no drop path in eval mode"


def test_file_round_trip_and_latent_statistics():
    _, enc, dec = micro_models()
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "model.safetensors")
        state = {"encoder": enc.state_dict(),
                 "decoder": dec.state_dict(), "latent_mean": mean, "latent_std": std, "step": 7, "id": "x",
                 "config": {"vit": asdict(MICRO_VIT), "decoder": asdict(MICRO_DECODER), "size": 16}}
        train.export(state, path)
        enc2, dec2 = encoder.Encoder.from_pretrained(path), decoder.Decoder.from_pretrained(path)
        assert encoder.read_config(path)["step"] == 7
        assert not os.path.exists(path + ".tmp")
        img, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 16, 48)
        z = enc(img)[0].detach()
        close(enc2.encode(img), (z - mean.view(8, 1, 1)) / std.view(8, 1, 1), 1e-6)
        close(dec2.decode(enc2.encode(img), noise=noise), dec.decode(z, noise=noise), 1e-5)
        # a file of another configuration says so
        state["config"]["vit"] = {**asdict(MICRO_VIT), "depth": 4}
        train.export(state, path)
        raises(ValueError, encoder.Encoder.from_pretrained, path, words="missing vit.blocks.3")


# ---- data.py: folders and archives, crops, the order of samples, kinds of pictures ----

def test_folder_and_archive_agree():
    with tempfile.TemporaryDirectory() as tmp:
        folder, archive = picture_folder(tmp)
        a, b = (data.ImageDataset(p, 16, train=False) for p in (folder, archive))
        assert len(a) == len(b) == 10 and a.classes == ["class0", "class1"]
        assert a.labels.tolist() == [0] * 5 + [1] * 5
        for n in range(10):
            assert torch.equal(a[n][0], b[n][0]) and a[n][1] == b[n][1]
        both = data.ImageDataset([folder, archive], 16, train=True)
        assert len(both) == 20 and both[3][0].shape == (3, 16, 16) and both[3][0].dtype == torch.uint8
        assert len(list(a)) == 10, "iterating must end"
        os.symlink(os.path.join(folder, "class0"), os.path.join(folder, "linked"))  # one's own subset made of links
        os.symlink(folder, os.path.join(folder, "class1", "loop"))
        open(os.path.join(folder, "class1", "._0.png"), "w").close()  # what macOS leaves
        assert len(data.ImageDataset(folder + "/", 16, train=False)) == 10, "every picture once, whatever the links"
        assert data.ImageDataset(os.path.join(folder, "class0") + "/", 16, train=False).classes == ["class0"]
        os.makedirs(os.path.join(tmp, "links"))
        os.symlink(os.path.join(folder, "class0"), os.path.join(tmp, "links", "class0"))
        assert len(data.ImageDataset(os.path.join(tmp, "links"), 16, train=False)) == 5, "linked folders are walked"
        for attribute in vars(a).values():  # millions of files must not become millions of Python objects
            assert not (isinstance(attribute, (list, dict)) and len(attribute) > 4), "entries are kept in arrays"


def test_center_crop_by_hand():
    ramp = np.zeros((8, 16, 3), np.uint8)
    ramp[:] = np.arange(16)[None, :, None]
    crop = np.array(data.center_crop(Image.fromarray(ramp), 8))
    assert crop.shape == (8, 8, 3) and crop[0, :, 0].tolist() == list(range(4, 12)), "same size: the middle columns"
    # one box halving: (0+1)/2 rounded up, ... then columns 2 to 5
    half = np.array(data.center_crop(Image.fromarray(ramp), 4))
    assert half.shape == (4, 4, 3) and half[0, :, 0].tolist() == [5, 7, 9, 11]


def test_random_crop_range():
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8))
    sides = {rng.integers(math.ceil(16 / 1.0), math.ceil(16 / 0.5) + 1) for rng in [np.random.default_rng(0)]
             for _ in range(500)}
    assert sides == set(range(16, 33)), "the oracle: shorter sides of 16 to 32 pixels at crop_scale (0.5, 1)"
    rng = np.random.default_rng(1)
    with unittest.mock.patch.object(data, "shrink", wraps=data.shrink) as shrink:
        crops = [data.random_crop(img, 16, rng, (0.5, 1.0)) for _ in range(500)]
    seen = {call.args[1] for call in shrink.call_args_list}
    assert seen == sides and {c.size for c in crops} == {(16, 16)}
    y, x = np.mgrid[:32, :32]
    # red grows to the right, green downwards
    ramps = Image.fromarray(np.stack([4 * x, 4 * y, 0 * x], -1).astype(np.uint8))
    crops = [np.array(data.random_crop(ramps, 16, rng, (0.5, 0.5))).astype(int) for _ in range(4000)]
    mirrored = sum(c[0, 0, 0] > c[0, -1, 0] for c in crops)
    assert abs(mirrored - 2000) < 5 * 32, f"half of the crops are mirrored, not {mirrored} of 4000"
    assert all(c[-1, 0, 1] > c[0, 0, 1] for c in crops), "none is upside down"
    corners = {(min(c[0, 0, 0], c[0, -1, 0]), c[0, 0, 1]) for c in crops}
    assert corners == {(4 * i, 4 * j) for i in range(17) for j in range(17)}, "every offset, and no other"


def test_long_pictures_are_cut_first():
    """A picture up to 16 times as long as wide is cropped as ever, and a longer one like it.

    Of a longer one only the rounding of the resized length differs.
    """
    rng = np.random.default_rng(0)
    strip = Image.fromarray(rng.integers(0, 256, (6, 100, 3), np.uint8)).resize((1700, 100), Image.Resampling.BICUBIC)
    for img in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        for size in (24, 100, 160):
            plain = data.shrink(img, size)
            left, top = (plain.width - size) // 2, (plain.height - size) // 2
            plain = np.array(plain.crop((left, top, left + size, top + size))).astype(int)
            error = np.abs(np.array(data.center_crop(img, size)) - plain)
            assert error.mean() < 1, f"{size}: {error.mean()}"
        same = img.crop((0, 0, min(1600, img.width), min(1600, img.height)))
        assert data.limit_aspect(same, 0.5) is same
        starts = {data.random_crop(img, 100, np.random.default_rng(n), (1, 1)).tobytes() for n in range(20)}
        assert len(starts) > 15, "the piece is drawn"


def test_large_jpegs_are_decoded_smaller_without_moving_the_crop():
    """Pixels may differ as between two resamplings; a crop that is off by one pixel differs five times as much."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    error = lambda a, b: np.abs(np.array(a, float) - np.array(b, float)).mean()
    for mode in ("RGB", "L", "CMYK"):
        for orientation in (1, 3, 6, 8):
            exif = Image.Exif()
            exif[274] = orientation
            file = io.BytesIO()
            side = (803, 605) if orientation == 1 else (800, 608)
            smooth.resize(side, Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", quality=95, exif=exif)
            full, small = data.load_image(file), data.load_image(file, 70)
            assert [s // 4 for s in full.size] == list(small.size), (
                f"{full.size} came as {small.size}: a quarter still has twice 70")
            a, b = (data.random_crop(img, 56, np.random.default_rng(1)) for img in (full, small))
            moved = error(a.crop((1, 0, 56, 56)), a.crop((0, 0, 55, 56)))
            assert error(a, b) < 0.35 * moved, (
                f"{mode} {orientation}: {error(a, b):.2f}, one pixel's shift is {moved:.2f}")
    assert data.load_image(file, 153).size == full.size, "304 pixels would be less than twice 153"


def test_sample_sequence_is_the_same_for_ranks_and_workers():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp, n=7)
        dataset = data.ImageDataset(folder, 16, train=True, seed=3)

        def sequence(ranks, workers, micro_batch, first=0, batches=3):
            numbers = [tools.batches.sample_numbers(first, 8, micro_batch, r, ranks, batches) for r in range(ranks)]
            by_rank = [torch.utils.data.DataLoader(dataset, num_workers=workers, batch_sampler=n) for n in numbers]
            parts = [torch.cat([img for img, _ in loader]).view(batches, -1, 3, 16, 16) for loader in by_rank]
            return torch.cat(parts, 1)  # (batches, 8, 3, 16, 16)
        one = sequence(1, 0, 8)
        for ranks, workers, micro_batch in ((1, 2, 4), (2, 0, 2), (2, 2, 4), (4, 0, 1)):
            assert torch.equal(sequence(ranks, workers, micro_batch), one), (ranks, workers, micro_batch)
        assert torch.equal(sequence(2, 0, 2, first=16, batches=1), one[2:]), (
            "a resumed run goes on with the next samples")
        assert sorted(dataset.index(n) for n in range(7)) == list(range(7)), "an epoch sees every image once"
        orders = [[dataset.index(n) for n in range(e * 7, e * 7 + 7)] for e in range(3)]
        assert orders[0] != orders[1] != orders[2], "each epoch has its own order"
        assert not torch.equal(dataset[0][0], data.ImageDataset(folder, 16, train=True, seed=4)[0][0])


def test_every_kind_of_picture_becomes_rgb():
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    as_array = lambda img: np.array(data.load_image(img)).astype(int)
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "x.png")
        deep = (np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
        Image.fromarray(deep).save(path)
        assert np.array_equal(as_array(path)[..., 0], deep // 256), "16 bits keep their upper 8"
        for wide in np.float32, np.int32:
            Image.fromarray(deep.astype(wide)).save(os.path.join(tmp, "wide.tif"))
            raises(ValueError, data.load_image, os.path.join(tmp, "wide.tif"), words="32 bits a channel")
        rgba = rgb.convert("RGBA")
        rgba.putalpha(Image.new("L", rgb.size, 0))
        rgba.save(path)
        assert (as_array(path) == 255).all(), "what is transparent is white"
        rgb.convert("L").save(path)
        assert np.array_equal(as_array(path)[..., 2], np.array(rgb.convert("L")))
        rgb.convert("CMYK").save(os.path.join(tmp, "x.tif"))
        assert np.abs(as_array(os.path.join(tmp, "x.tif")) - np.array(rgb)).max() <= 1
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        rgb.save(path, exif=exif)
        assert np.array_equal(as_array(path), np.rot90(np.array(rgb), -1)), "the EXIF orientation must be applied"


def test_drawn_pictures():
    a, b = ProceduralDataset(32, train=True, seed=0), ProceduralDataset(32, train=False, seed=0)
    assert all(torch.equal(a[n][0], a[n][0]) for n in range(4)) and not torch.equal(a[0][0], b[0][0])
    labels = [a[n][1] for n in range(200)]
    assert all(30 < labels.count(k) < 75 for k in range(4)), "four kinds, equally often"
    for n in range(50):  # pictures, not noise: neighbouring pixels are alike
        x = a[n][0].float()
        if a[n][1] != 2:  # textures may be fine
            assert (x[:, :, 1:] - x[:, :, :-1]).abs().mean() < 20
    assert ProceduralDataset(112, train=True)[10_000_001][0].shape == (3, 112, 112), "training never runs out"


# ---- eval.py: PSNR, SSIM, PCA, Inception, FID, the probe, and whole evaluations ----

def test_psnr_closed_form():
    a = torch.rand(2, 3, 8, 8) * 0.5
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    close(evaluation.psnr(a, b), torch.tensor([20.0, 40.0], dtype=torch.float64), 1e-5)
    mixed = evaluation.psnr(torch.zeros(1, 3, 2, 2), torch.tensor([0.0, 0.2]).view(1, 1, 1, 2).expand(1, 3, 2, 2))
    close(mixed, torch.tensor([-10 * math.log10(0.02)], dtype=torch.float64))  # half the pixels off by 0.2
    for measure in evaluation.psnr, evaluation.ssim:  # shapes that would broadcast
        raises(ValueError, measure, torch.ones(2, 3, 16, 16), torch.ones(1, 3, 16, 16),
               words="a is (2, 3, 16, 16), b is (1, 3, 16, 16); expected two batches of the same shape")


def test_ssim_equals_scikit_image():
    from skimage import data as photos
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    rng = np.random.default_rng(0)
    smooth = np.stack([np.array(picture(n, 48, 40)) for n in range(2)]) / 255
    photographs = np.stack([photos.chelsea()[:200, :300], photos.astronaut()[:200, :300]]) / 255
    for a in (rng.random((2, 40, 48, 3)), smooth, photographs):
        b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
        ta, tb = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a, b))
        ours = evaluation.ssim(ta, tb)
        paper = evaluation.ssim(ta, tb, "uniform", 2.0)
        for i in range(2):
            gaussian = structural_similarity(a[i], b[i], channel_axis=-1, data_range=1.0, gaussian_weights=True,
                                             sigma=1.5, use_sample_covariance=False)
            assert abs(ours[i].item() - gaussian) < 1e-6
            assert abs(paper[i].item() - structural_similarity(a[i], b[i], channel_axis=-1, data_range=2.0)) < 1e-6
            assert abs(evaluation.psnr(ta, tb)[i].item() - peak_signal_noise_ratio(a[i], b[i], data_range=1.0)) < 1e-6


def test_patch_pca():
    torch.manual_seed(0)
    codes = torch.randn(6, 64, 3, dtype=torch.float64)  # patches that truly have three dimensions
    patches = 0.5 + 0.02 * codes @ torch.randn(3, 48, dtype=torch.float64)
    img = decoder.unpatchify(patches, 4, 32, 32)
    assert img.min() > 0 and img.max() < 1
    mean, basis = evaluation.fit_patch_pca([img[:4], img[4:]], 4, 3)
    close(evaluation.patch_pca(img, mean, basis, 4), img, 1e-9)
    mean, basis = evaluation.fit_patch_pca([img], 4, 2)  # with one component less, the error is the smallest eigenvalue
    lost = (evaluation.patch_pca(img, mean, basis, 4) - img).square().sum() / (6 * 64)
    merged = evaluation.Moments()
    merged.add(patches.flatten(0, 1))  # what several ranks have seen together, where this one has seen little
    for ours, theirs in zip(evaluation.fit_patch_pca([img[:1]], 4, 2, lambda moments: merged), (mean, basis)):
        close(ours.abs(), theirs.abs(), 1e-9)
    _, s, _ = torch.linalg.svd(patches.flatten(0, 1) - patches.flatten(0, 1).mean(0))
    close(lost, s[2] ** 2 / (6 * 64), 1e-9)


def test_inception_equals_plain_functions():
    from scipy.ndimage import map_coordinates
    state, path = random_inception()
    ours = evaluation.InceptionV3(path)
    torch.manual_seed(0)
    img = torch.rand(2, 3, 299, 299)
    pool, logits = ours(img)
    for a, b in zip((pool, logits), inception_reference(img, state)):
        close(a, b, 1e-5)
    assert pool.shape == (2, 2048) and logits.shape == (2, 1008) and pool.std() > 0.01
    small = torch.rand(1, 3, 40, 64)  # bilinear, half-pixel centres, edges repeated, no antialiasing: by scipy
    rows, columns = ((np.arange(299) + 0.5) * n / 299 - 0.5 for n in (40, 64))
    grid = np.meshgrid(rows, columns, indexing="ij")
    large = torch.tensor(np.stack([map_coordinates(c.numpy(), grid, order=1, mode="nearest") for c in small[0]]))[None]
    close(ours(small.double())[0], ours(large)[0], 1e-5)
    assert not any(p.requires_grad for p in ours.parameters()) and not any(m.training for m in ours.modules())
    with tempfile.TemporaryDirectory() as tmp:
        broken = os.path.join(tmp, "broken.pth")
        state = torch.load(path, weights_only=True)
        for change, words in (({"fc.weight": torch.zeros(1000, 2048)}, "fc.weight"),
                              ({"extra": torch.zeros(1)}, "extra")):
            torch.save({**state, **change}, broken)
            raises(ValueError, evaluation.InceptionV3, broken, words=words)
        open(broken, "wb").write(b"junk")
        raises(ValueError, evaluation.InceptionV3, broken, words="pytorch-fid")
        raises(evaluation.MissingFile, evaluation.InceptionV3, tmp,
               words=f"{tmp}: no such file; it is {evaluation.INCEPTION_URL}")
        with unittest.mock.patch.object(torch, "load", side_effect=OSError(5, "disk")):
            raises(OSError, evaluation.InceptionV3, broken, words="[Errno 5] disk")  # no fault of the file's
        for i in range(2):  # as eval.py uses it
            os.makedirs(os.path.join(tmp, "pictures"), exist_ok=True)
            Image.fromarray((255 * img[i]).byte().permute(1, 2, 0).numpy()).save(os.path.join(tmp, "pictures",
                f"{i}.png"))
        said, _ = evaluate("--fid", os.path.join(tmp, "pictures"), "--inception", path, "--save_stats",
                           os.path.join(tmp, "stats.npz"))
        close(torch.from_numpy(np.load(os.path.join(tmp, "stats.npz"))["mu"]),
              inception_reference((255 * img).byte() / 255, state)[0].double().mean(0), 1e-5)
        assert "NOT that of pytorch-fid" in said


def slow_inception_equals_torch_fidelity():
    """The same against the published implementation; by name only, after pip install --no-deps torch-fidelity."""
    package = types.ModuleType("torch_fidelity")  # without its __init__, which needs torchvision
    package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    path = random_inception()[1]
    theirs = FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"], path)
    img = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    for a, b in zip(evaluation.InceptionV3(path)(img / 256), theirs(img)):  # it maps 128 to 0, so 256 stands for 1
        close(a, b, 1e-5)


def test_frechet_distance():
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    mu1, mu2, a, b = rng.normal(size=64), rng.normal(size=64), rng.uniform(0.1, 2, 64), rng.uniform(0.1, 2, 64)
    between = (mu1 - mu2) @ (mu1 - mu2)
    fid = evaluation.frechet_distance
    assert abs(fid(mu1, q * a @ q.T, mu2, q * a @ q.T) - between) < 1e-9, "equal covariances: the distance of the means"
    assert math.isclose(fid(mu1, q * a @ q.T, mu2, q * b @ q.T), between + ((a ** 0.5 - b ** 0.5) ** 2).sum(),
                        rel_tol=1e-9), "covariances that commute"
    a[10:], b[:5] = 0, 0  # of rank 10 and 59, with five dimensions in common
    assert math.isclose(fid(mu1, q * a @ q.T, mu2, q * b @ q.T), between + ((a ** 0.5 - b ** 0.5) ** 2).sum(),
                        rel_tol=1e-9), "covariances of low rank"
    x, y = (rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64)),
            rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64)) + 1)
    s1, s2 = np.cov(x.T), np.cov(y.T)
    by_scipy = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert math.isclose(fid(x.mean(0), s1, y.mean(0), s2), by_scipy, rel_tol=1e-6)
    assert math.isclose(fid(*map(torch.tensor, (x.mean(0), s1, y.mean(0), s2))), by_scipy, rel_tol=1e-6), (
        "numpy and torch must agree")
    a, b = np.full(64, 1e-8), np.full(64, 1e-8)  # a wide spectrum is no rounding error: only the first one differs
    a[0], b[0] = 1, 4
    assert math.isclose(fid(mu1, q * a @ q.T, mu1, q * b @ q.T), 1, rel_tol=1e-9)
    raises(ValueError, fid, mu1, s1, mu2[:32], s2[:32, :32], words="(32, 32)")
    raises(ValueError, fid, mu1 * np.nan, s1, mu2, s2, words="finite")


def test_streamed_moments():
    rng = np.random.default_rng(0)
    x = 1e6 + 1e-3 * rng.normal(size=(1000, 5)) @ rng.normal(size=(5, 5))  # a mean a billion times the deviation
    parts = [evaluation.Moments(), evaluation.Moments()]
    for i, rows in enumerate(np.split(x, [1, 8, 300, 301, 990])):
        parts[i % 2].add(torch.tensor(rows))
    whole = parts[0]
    whole.merge(parts[1].count, parts[1].mean, parts[1].scatter)
    close(whole.covariance, torch.tensor(np.cov((x - x.mean(0)).T)), 1e-6)
    assert whole.count == 1000 and (whole.mean - torch.tensor(x.mean(0))).abs().max() < 1e-8
    raises(ValueError, whole.add, torch.tensor([[0.0, 1, 2, 3, math.nan]]), words="not finite")


def test_inception_score():
    certain = 1000 * torch.eye(20).repeat(3, 1)  # each of 60 images surely one of 20 classes, three times each
    mean, std = evaluation.inception_score(certain, splits=1)
    assert abs(mean - 20) < 1e-6 and std < 1e-6, "20 equally frequent sure classes score 20"
    assert abs(evaluation.inception_score(torch.zeros(60, 20))[0] - 1) < 1e-9, "equally likely classes score 1"
    # by hand, two splits of 2: p = (.5, .5) twice: 1; p = (1, 0), (0, 1): 2
    logits = torch.tensor([[0.0, 0], [0, 0], [1000, 0], [0, 1000]])
    mean, std = evaluation.score_of_sums(evaluation.split_sums(logits, torch.tensor([0, 0, 1, 1]), 2))
    assert abs(mean - 1.5) < 1e-9 and abs(std - 0.5) < 1e-9


def test_linear_probe_and_nearest_neighbours():
    rng = torch.Generator().manual_seed(0)
    y, test_y = (torch.randint(0, 2, (n,), generator=rng) for n in (4000, 4000))
    x, test_x = (torch.randn(len(c), 16, generator=rng) * 5 + 100 for c in (y, test_y))
    # two Gaussians 10 apart, of deviation 5: the best classifier is right in Phi(1) = 84.13% of cases
    x[:, 3] += 10 * y
    test_x[:, 3] += 10 * test_y
    accuracy, rate = evaluation.linear_probe(x, y, test_x, test_y, epochs=10)
    assert abs(accuracy - 84.13) < 1.5, accuracy
    assert evaluation.linear_probe(x, y, test_x, test_y, epochs=10) == (accuracy, rate), (
        "the same seed gives the same figure")
    x, y, test_x = (torch.randn(50, 8, generator=rng), torch.randint(0, 4, (50,), generator=rng),
                    torch.randn(30, 8, generator=rng))
    right = 0
    for i, t in enumerate(test_x):  # by loops
        cosine = [float(t @ a / t.norm() / a.norm()) for a in x]
        votes = [0.0] * 4
        for j in sorted(range(50), key=lambda j: -cosine[j])[:20]:
            votes[int(y[j])] += math.exp(cosine[j] / 0.07)
        right += votes.index(max(votes)) == i % 4
    got = evaluation.nearest_neighbours(x, y, test_x, torch.arange(30) % 4)
    assert abs(got - 100 * right / 30) < 1e-9


def test_noise_depends_on_seed_and_image_number_only():
    whole = evaluation.image_noise(range(5), 4, 12, seed=1)
    assert torch.equal(evaluation.image_noise([3], 4, 12, seed=1)[0], whole[3])
    assert not torch.equal(evaluation.image_noise([3], 4, 12, seed=2)[0], whole[3])
    many = evaluation.image_noise(range(400), 4, 12)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_figures_do_not_depend_on_batch_or_ranks():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (_, archive) = tokenizer_file(tmp), picture_folder(tmp, n=11)
        more, _ = picture_folder(os.path.join(tmp, "more"), n=20)
        report = os.path.join(tmp, "report.json")
        flags = ["--data", archive, "--weights", weights, "--inception", weights, "--fit", more, "--pca"]
        script = os.path.join(tmp, "quick.py")
        open(script, "w").write(
            "import sys, eval, tests.helpers; eval.InceptionV3 = tests.helpers.QuickInception; eval.main(sys.argv[1:])")
        one, two, four = side_by_side(
            *(functools.partial(run_ranks, ranks, "python", script, *flags, "--batch_size", batch, *others)
              for ranks, batch, others in ((1, 7, ["--probe"]), (2, 1, ["--probe"]), (4, 64, ["--out", report]))))
        assert not any(done.returncode for done in (*one, *two, *four)), (
            [done.stderr[-2000:] for done in (*one, *two, *four)])
        printed = [ranks[0].stdout for ranks in (one, two, four)]
        assert not any(done.stdout for done in (*two[1:], *four[1:])), "rank 0 alone reports"
        rows = [[line for line in text.splitlines() if re.match("tokenizer|PCA", line)] for text in printed]
        assert len(rows[0]) == 2 and all(r == rows[0] for r in rows), rows
        assert re.search(r"tokenizer +\d+\.\d\d  -?0\.\d{4} +-?0\.\d{4} +\d+\.\d{3}  +\d+\.\d\d ", rows[0][0]), (
            rows[0][0])
        probes = [text[text.index("accuracy"):] for text in printed if "accuracy" in text]
        assert len(probes) == 2 and probes[0] == probes[1], probes
        assert "fewer than the 2048" in printed[0] and "NOT that of pytorch-fid" in printed[0]
        report = json.load(open(report))
        assert (report["ranks"] == 4 and report["images"] == 11
                and report["weights_sha256"] == hashlib.sha256(open(weights, "rb").read()).hexdigest())
        assert {"torch", "code", "commit", "protocol", "device", "seconds"} <= set(report)
        # and they are right: from all pictures at once
        enc, dec, network = (encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights),
                             QuickInception(weights))
        img = torch.stack([x for x, _ in data.ImageDataset(archive, 16, train=False)]) / 255
        rec = evaluation.round_uint8(dec.decode(enc.encode(img), noise=evaluation.image_noise(range(11), 16, 48)))
        (ours, logits), (theirs, _) = network(rec), network(img)
        fid = evaluation.frechet_distance(ours.double().mean(0), ours.double().T.cov(), theirs.double().mean(0),
                                          theirs.double().T.cov())
        expected = [evaluation.psnr(img, rec).mean().item(), fid, *evaluation.inception_score(logits)]
        got = [report["results"]["tokenizer"][k] for k in ("psnr", "rfid", "is", "is_std")]
        # one of the ten splits has two images
        assert np.allclose(got, expected, rtol=1e-4) and expected[2] > 1.01, (got, expected)


@unittest.mock.patch.object(evaluation, "InceptionV3", QuickInception)
def test_fid_between_anything():
    with tempfile.TemporaryDirectory() as tmp:
        path = tokenizer_file(tmp)  # any file
        a, b = os.path.join(tmp, "a"), os.path.join(tmp, "b")
        os.makedirs(a), os.makedirs(b)
        arrays = [np.stack([np.asarray(picture(10 * k + i, 24, 20)) for i in range(4)]) for k in (0, 1)]
        for folder, images in zip((a, b), arrays):
            for i, x in enumerate(images):
                Image.fromarray(x).save(os.path.join(folder, f"{i}.png"))
        with zipfile.ZipFile(os.path.join(tmp, "b.zip"), "w") as z:
            for i in range(4):
                z.write(os.path.join(b, f"{i}.png"), f"{i}.png")
        np.savez(os.path.join(tmp, "b.npz"), arrays[1])  # stored: read in place
        np.savez_compressed(os.path.join(tmp, "b2.npz"), arrays[1])
        fid = lambda *flags: evaluate("--inception", path, "--fid", *flags)
        fid(a, "--save_stats", os.path.join(tmp, "a.npz"))
        text, report = fid(os.path.join(tmp, "a.npz"), b)
        pools = [evaluation.InceptionV3(path)(torch.tensor(x).permute(0, 3, 1, 2) / 255)[0].double() for x in arrays]
        expected = evaluation.frechet_distance(*(f(p) for p in pools
                                                 for f in (lambda p: p.mean(0), lambda p: torch.cov(p.T))))
        assert (math.isclose(report["fid"], expected, rel_tol=1e-4) and f"FID {report['fid']:.3f}" in text
                and "means little" in text)
        saved = lambda name: np.load(os.path.join(tmp, name))
        fid(b, "--save_stats", os.path.join(tmp, "stats.npz"))
        for other in ("b.zip", "b.npz", "b2.npz"):
            fid(os.path.join(tmp, other), "--save_stats", os.path.join(tmp, "other.npz"))
            assert all(np.allclose(saved("stats.npz")[k], saved("other.npz")[k], rtol=1e-4, atol=1e-7)
                       for k in ("mu", "sigma")), other
        np.savez(os.path.join(tmp, "three.npz"), arrays[0][:3])
        for pair in ("three.npz", "b.npz"), ("b.npz", "three.npz"):
            assert fid(*(os.path.join(tmp, x) for x in pair))[1]["warning"].startswith("FID of 3 images"), (
                "the warning must count the smaller set")
        np.savez(os.path.join(tmp, "small.npz"), mu=np.zeros(32), sigma=np.eye(32))
        np.savez(os.path.join(tmp, "float.npz"), np.zeros((2, 8, 8, 3)))
        one = os.path.join(tmp, "one")
        os.makedirs(one), shutil.copy(os.path.join(a, "0.png"), one)
        whole = open(os.path.join(tmp, "a.npz"), "rb").read()
        for name, content in ("torn.npz", whole[:-1000]), ("empty.npz", b""), ("text.npz", b"no zip"):
            open(os.path.join(tmp, name), "wb").write(content)
        np.savez(os.path.join(tmp, "scalar.npz"), mu=1.0, sigma="x")
        np.savez(os.path.join(tmp, "alone.npz"), arrays[1][:1])
        for other, words in (("small.npz", "(32, 32)"), ("float.npz", "float64"),
                             ("none", f"{tmp}/none: no such folder, .zip or .npz"),
                             ("one", "at least 2"), ("alone.npz", "at least 2"), ("torn.npz", "neither"),
                             ("empty.npz", "neither"), ("text.npz", "neither"), ("scalar.npz", "neither")):
            raises((OSError, ValueError), fid, os.path.join(tmp, "a.npz"), os.path.join(tmp, other), words=words)
        picture(0, 30, 20).save(os.path.join(b, "0.png")), open(os.path.join(b, "3.png"), "w").write("text")
        raises(ValueError, fid, a, b, words="of 4 images cannot be used")
        picture(1, 30, 20).save(os.path.join(b, "3.png"))
        assert "ADM crops of 256 px" in fid(b, "--save_stats", os.path.join(tmp, "c.npz"), "--resolution", "256")[0]


def test_eval_at_another_size():
    """--size 24 against crop, encode, decode and PSNR by hand."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=3)
        _, report = evaluate("--data", folder, "--weights", weights, "--size", 24, "--inception", "none")
        enc, dec = encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights)
        img = torch.stack([img for img, _ in data.ImageDataset(folder, 24, train=False)]) / 255
        p = dec.config.patch
        rec = dec.decode(enc.encode(img), noise=evaluation.image_noise(range(3), (24 // p) ** 2, 3 * p * p, 0))
        mse = ((rec * 255).round() / 255 - img).double().square().mean((1, 2, 3))
        assert abs(report["results"]["tokenizer"]["psnr"] - (-10 * mse.log10()).mean().item()) < 1e-4
        assert "crop to 24 px" in report["protocol"]
        raises(ValueError, evaluate, "--data", folder, "--weights", weights, "--size", 21,
               words="21 is no multiple of the patch")


# ---- train.py: losses, options, optimizer, ranks, resume, log ----

def test_training_step_drops_cls_and_draws_t_per_patch():
    class Tokens(nn.Module):
        num_prefix, config = 1, MICRO_VIT

        def __init__(self, cls):
            super().__init__()
            self.cls = cls

        def forward(self, img):
            torch.manual_seed(0)  # the same spatial tokens, whatever the CLS token
            return [torch.cat([torch.full((len(img), 1, 32), self.cls), torch.randn(len(img), 16, 32)], 1)
                    for _ in range(3)]

    seen = {}

    def flow_loss(z, img, t, noise):
        seen["t"] = t
        return torch.zeros(())
    args = types.SimpleNamespace(**vars(METHOD))
    student = Tokens(-5.0)
    loss_dist, *_ = train.losses(Tokens(5.0), lambda img: (None, student(img)), flow_loss,
                                 torch.rand(2, 3, 16, 16), args)
    assert abs(loss_dist.item()) < 1e-6, f"opposite CLS tokens moved the distillation loss to {loss_dist.item()}"
    assert seen["t"].shape == (2, 16) and len(seen["t"].unique()) == 32, "every patch must have its own time"
    args.endpoint = 1.0
    train.losses(Tokens(5.0), lambda img: (None, student(img)), flow_loss, torch.rand(2, 3, 16, 16), args)
    assert (seen["t"] == 1).all(), "--endpoint must reach the times"


def test_student_equals_teacher_at_start():
    with tempfile.TemporaryDirectory() as tmp:
        args = train.parse_args(["--teacher", micro_teacher(tmp), *MICRO_RUN])
        teacher, enc, dec = train.build_models(args)
        *_, alpha = train.losses(teacher, enc, dec, torch.rand(2, 3, 16, 16), args)
        assert alpha.abs().max() < 1e-6, f"alpha at step 0 is {alpha}"
        assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
        assert {k for k, p in enc.named_parameters() if not p.requires_grad} == {"vit.norm.weight", "vit.norm.bias"}
        # zero-init in the assembled model: every modulation and the output layer, hence a velocity of 0
        for m in [b.modulation for b in dec.head.blocks] + [dec.head.final_modulation, dec.head.output]:
            assert not m.weight.any() and not m.bias.any()
        assert not dec.velocity(torch.randn(2, 16, 48), torch.rand(2, 16), torch.randn(2, 16, 32)).any()
        assert dec.head.blocks[0].fc1.weight.any() and dec.blocks[0].qkv.weight.any(), "the rest must not be zero"


def test_overfits_one_batch():
    teacher, _, _ = micro_models()
    torch.manual_seed(0)
    img = torch.stack([data.to_tensor(picture(n, 16, 16)) for n in range(2)]) / 255
    with tempfile.TemporaryDirectory() as tmp:
        args = train.parse_args(["--teacher", micro_teacher(tmp), *MICRO_RUN, "--endpoint", "0.5"])
        teacher, enc, dec = train.build_models(args)
    optimizer = torch.optim.AdamW(encoder.parameter_groups([enc, dec], 3e-3), betas=(0.5, 0.95))
    for step in range(400):
        train.seed_step(0, step)
        loss_dist, loss_flow, *_ = train.losses(teacher, enc, dec, img, args)
        (loss_dist + loss_flow).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            first = loss_flow.item()
    quality = evaluation.psnr(img, dec.decode(enc.encode(img))).min().item()
    assert loss_flow.item() < 0.1 * first and loss_dist.item() < 0.3, (first, loss_flow.item(), loss_dist.item())
    assert quality > 22, f"two pictures seen 400 times come back at {quality:.1f} dB"


def test_options_of_the_method():
    with tempfile.TemporaryDirectory() as tmp:
        teacher, (folder, _) = micro_teacher(tmp), picture_folder(tmp)
        frozen = load_file(teacher)
        options = [["--strategy", s] for s in distill.STRATEGIES] + [
            ["--gtb_depth", 0], ["--flow_depth", 1], ["--latent_dim", 4], ["--projector", "linear"],
            ["--decoder", "pixel"], ["--beta", 5], ["--drop_path", 0.5], ["--endpoint", 1], ["--freeze_encoder"],
            ["--lambda_f", 0], ["--lambda_d", 0], ["--checkpoint_activations"], ["--size", 20]]
        for i, option in enumerate(options):
            out = os.path.join(tmp, f"out{i}")
            train_quietly("--teacher", teacher, "--data", folder, "--steps", 4, "--out", out, *option)
            config = encoder.read_config(os.path.join(out, "model.safetensors"))
            enc = encoder.Encoder.from_pretrained(os.path.join(out, "model.safetensors"))
            dec = decoder.Decoder.from_pretrained(os.path.join(out, "model.safetensors"))
            assert dec.decode(enc.encode(torch.rand(1, 3, 20, 16))).shape == (1, 3, 20, 16), option
            moved = {k for k, v in enc.vit.state_dict().items() if not torch.equal(v, frozen[k])}
            assert (bool(moved) == ("--freeze_encoder" not in option)
                    and not moved & {"norm.weight", "norm.bias"}), (option, moved)
            last = [x for x in log_lines(out) if "alpha" in x][-1]
            if option[0] == "--strategy":
                expected = {"final": [0, 0, 1], "uniform": [1 / 3] * 3,
                            "progressive": [1 / 6, 2 / 6, 3 / 6]}.get(option[1])
                assert expected is None or np.allclose(last["weight"], expected), option
            if option[0] == "--drop_path":
                assert max(log_lines(out)[0]["alpha"]) > 1e-4, (
                    "at step 1 stochastic depth alone sets student and teacher apart")
            beta = 5 if option[0] == "--beta" else 2
            if option[0] != "--strategy":
                w = np.arange(1, 4) * np.exp(beta * np.array(last["alpha"]))  # eq. 1
                assert np.allclose(last["weight"], w / w.sum(), atol=1e-6), option
                assert option[0] != "--beta" or max(last["alpha"]) > 1e-4, "if nothing has moved, any beta would pass"
            if option == ["--size", 20]:
                assert config["size"] == 20 and dec.config.grid == 5
        start = os.path.join(tmp, "out5", "model.safetensors")  # flow_depth 1
        out = os.path.join(tmp, "init")
        train_quietly("--teacher", teacher, "--data", folder, "--steps", 1, "--out", out, "--init", start,
                      "--flow_depth", 1, "--lr", 1e-12)
        a, b = load_file(start), load_file(os.path.join(out, "model.safetensors"))
        assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a), "--init must start from the file's weights"
        raises(ValueError, train_quietly, "--teacher", teacher, "--data", folder, "--steps", 1, "--out", out + "2",
               "--init", start, words="flow_depth 1, not 2")
        os.remove(start)  # the checkpoint has these weights
        train_quietly("--teacher", teacher, "--data", folder, "--steps", 2, "--out", out, "--init", start,
                      "--flow_depth", 1, "--lr", 1e-12)
        assert [x["step"] for x in log_lines(out) if "alpha" in x] == [1, 2]


def test_recipes_are_the_papers():
    """The recipes are those of Tables 6-9, and of the text where they differ on the batch; small and tiny are ours."""
    for name, size, width in (("internvit", 448, 1024), ("dinov2", 378, 1024), ("siglip2", 256, 1152),
                              ("clip", 224, 1024)):
        args = train.parse_args(["--teacher", name])
        got = (args.size, args.flow_width, args.latent_dim, args.gtb_depth, args.flow_depth, args.lr, args.batch_size,
               args.epochs, args.steps)
        assert got == (size, width, 64, 6, 12, 2e-4, 512, 30, None), name
        assert (args.beta, args.lambda_d, args.lambda_f, args.endpoint, args.lr_decay, args.weight_decay,
                args.drop_path) == (2, 1, 1, 0, 0, 0, 0)
        assert (args.recipe, args.beta1, args.beta2, args.warmup) == ("paper", 0.5, 0.95, 0)
    assert train.parse_args(["--endpoint", "0"]).endpoint == 0 and train.parse_args(["--epochs", "2"]).steps is None


def test_each_parameter_in_one_optimizer_group_and_teacher_in_none():
    teacher, enc, dec = micro_models()
    groups = (
        encoder.parameter_groups([enc.vit], 1e-3, 0.05) + encoder.parameter_groups([enc.latent_down, dec], 1e-2, 0.05))
    ids = [id(p) for g in groups for p in g["params"]]
    everything = {id(p): p for m in (enc, dec) for p in m.parameters()}
    assert len(ids) == len(set(ids)) and set(ids) == set(everything)
    weights = {id(m.weight) for part in (enc, dec) for m in part.modules()
               if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    for g in groups:
        for p in g["params"]:
            assert (g["weight_decay"] == 0.05) == (id(p) in weights)
            assert math.isclose(g["lr"], 1e-3 if any(p is q for q in enc.vit.parameters()) else 1e-2)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(groups)
    loss_dist, loss_flow, *_ = train.losses(teacher, enc, dec, torch.rand(2, 3, 16, 16), METHOD)
    (loss_dist + loss_flow).backward()
    unmoved = [n for m in (enc, dec) for n, p in m.named_parameters() if p.grad is None]
    assert not unmoved, f"only weight decay would move {unmoved}"
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), "the teacher moved"


def test_optimizer_sees_clipped_gradients_and_this_runs_settings():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], "--weight_decay", 0.1,
                 "--encoder_lr_scale", 0]
        out = os.path.join(tmp, "out")
        train_quietly(*flags, "--out", out, "--steps", 1, "--clip", 0.01, "--keep_every", 1)
        state = torch.load(os.path.join(out, "state.pt"), weights_only=True)
        moments = state["optimizer"]["state"].values()
        norm = lambda key: sum(m[key].double().square().sum() for m in moments).sqrt().item()
        assert abs(norm("exp_avg") - 0.5 * 0.01) < 1e-7, "(1 - beta1) = 0.5 times the clipped gradient"
        assert log_lines(out)[0]["grad_norm"] > 0.1, "the log has the norm before clipping"
        squares = sum(m["exp_avg_sq"].double().sum() for m in moments).item()
        assert abs(squares - 0.05 * 0.01 ** 2) < 1e-10, "(1 - beta2) = 0.05 times its square"
        assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {0.0, 0.1}
        vit, teacher = state["encoder"], load_file(flags[1])
        assert all(torch.equal(vit["vit." + k], v) for k, v in teacher.items() if "vit." + k in vit), (
            "--encoder_lr_scale 0 must leave the ViT as it is")
        kept = os.path.join(out, "model_0000001.safetensors")
        assert os.path.exists(kept)
        train_quietly(*flags, "--out", out, "--steps", 2, "--clip", 0.01, "--lr", 1e-12, "--resume_anyway")
        a, b = load_file(kept), load_file(os.path.join(out, "model.safetensors"))
        assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a), (
            "the command's learning rate, not the checkpoint's")
        torch.save({"args": {}}, os.path.join(out, "state.pt"))
        raises(ValueError, train_quietly, *flags, "--out", out, "--steps", 3,
               words="older version, or no checkpoint of this script")


def test_learning_rate_decay():
    """--lr_decay 0.5 of four steps gives 1, 1, 1 and 1/2 of the rate, to each group its own.

    The same run by hand has another --lr for its last step.
    """
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], "--encoder_lr_scale", 0.25,
                 "--log_every", 1, "--out"]
        decayed, by_hand = os.path.join(tmp, "decayed"), os.path.join(tmp, "by_hand")
        train_quietly(*flags, decayed, "--steps", 4, "--lr", 1e-3, "--lr_decay", 0.5)
        assert [line["lr"] for line in log_lines(decayed) if "lr" in line] == [1e-3, 1e-3, 1e-3, 5e-4]
        train_quietly(*flags, by_hand, "--steps", 3, "--lr", 1e-3)
        train_quietly(*flags, by_hand, "--steps", 4, "--lr", 5e-4, "--resume_anyway")
        assert same_weights(*(os.path.join(out, "model.safetensors") for out in (decayed, by_hand)))
        again = train_quietly(*flags, decayed, "--epochs", 1, "--lr", 1e-3, "--lr_decay", 0.5)
        assert "the same command with --epochs 4" in again, "four steps of 4 of 10 images were 1.6 epochs"


def test_every_micro_step_draws_its_own_noise():
    with tempfile.TemporaryDirectory() as tmp:
        grey = os.path.join(tmp, "grey")
        os.makedirs(grey)
        # all samples are alike; at step 1, v = 0
        Image.new("RGB", (16, 16), (90, 90, 90)).save(os.path.join(grey, "0.png"))
        first = {}
        for name, batch, seed in (("two", 2, 0), ("two again", 2, 0), ("twice two", 4, 0), ("other seed", 2, 1)):
            out = os.path.join(tmp, name)
            train_quietly("--teacher", micro_teacher(tmp), "--data", grey, "--out", out, "--steps", 2,
                          "--batch_size", batch, "--micro_batch", 2, "--seed", seed, "--lr", 1e-12)
            first[name] = [x["loss_flow"] for x in log_lines(out) if "loss_flow" in x]
        assert first["two"] == first["two again"] != first["other seed"]
        assert first["two"][0] != first["two"][1], "each step draws its own"
        assert abs(first["two"][0] - first["twice two"][0]) > 1e-4, "so does each micro-step"


def test_split_batch():
    assert tools.batches.split_batch(512, 32, 8) == (32, 2)
    assert tools.batches.split_batch(24, 5, 2) == (4, 3), "12 a rank: 5 does not divide it, 4 does"
    assert tools.batches.split_batch(4, 32, 4) == (1, 1)
    raises(ValueError, tools.batches.split_batch, 10, 4, 4, words="8 or 12")


def two_ranks(rank, path):
    """A process of test_two_ranks_equal_one: loss, alpha and gradients of its half of the batch, averaged."""
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    *losses, weight, alpha, gradients = joint_step(slice(2 * rank, 2 * rank + 2))
    for x in (*losses, gradients):
        dist.all_reduce(x)
        x /= 2
    if rank == 0:
        torch.save([*losses, weight, alpha, gradients], path)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that is torn down under load


def joint_step(part):
    teacher, enc, dec = micro_models()
    torch.manual_seed(5)
    img, t, noise = torch.rand(4, 3, 16, 16), torch.rand(4, 16), torch.randn(4, 16, 48)
    gradients = join_gradients([p for m in (enc, dec) for p in m.parameters()])
    loss_dist, loss_flow, weight, alpha = train.losses(teacher, enc, dec, img[part], METHOD, t[part], noise[part])
    (loss_dist + loss_flow).backward()
    return [loss_dist.detach(), loss_flow.detach(), weight, alpha, gradients]


def test_two_ranks_equal_one():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "rank0.pt")
        torch.multiprocessing.start_processes(two_ranks, (path,), nprocs=2, start_method="forkserver")
        both, one = torch.load(path, weights_only=True), joint_step(slice(4))
        for k in range(5):  # L_dist, L_flow, w, alpha, gradients
            close(both[k], one[k], 1e-5)
        halves = [joint_step(slice(0, 2)), joint_step(slice(2, 4))]
        assert (halves[0][2] - halves[1][2]).abs().max() > 1e-3, (
            "the halves differ, so weights formed per rank would show")


def test_ranks_and_accumulation_give_one_run():
    """With the pixel objective nothing is drawn, and with fixed layer weights accumulation changes nothing: one
    process and one that accumulates must log the same. What is drawn depends on the micro-batch: one process that
    accumulates, two ranks that are resumed, and two that go on as one, must log the same."""
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp)[0], "--strategy", "progressive"]
        for name, micro_batch in ("whole", 4), ("in parts", 1):
            train_quietly(*flags, "--decoder", "pixel", "--out", os.path.join(tmp, name), "--steps", 4, "--micro_batch",
                          micro_batch)
        flags += ["--drop_path", 0.2, "--micro_batch", 1]
        train_quietly(*flags, "--out", os.path.join(tmp, "drawn"), "--steps", 4)
        flags = ["train.py", *MICRO_RUN, *flags, "--out", os.path.join(tmp, "ranks"), "--steps"]
        assert not any(done.returncode for done in run_ranks(2, "python", *flags, 2))
        shutil.copytree(os.path.join(tmp, "ranks"), os.path.join(tmp, "fewer"))
        assert "resumed" in train_quietly(*flags[1:-2], os.path.join(tmp, "fewer"), "--steps", 4)
        done = run("torchrun", "--nproc_per_node=2", *flags, 4)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "resumed" in done.stdout and "2 ranks" in done.stdout
        for pair in ("whole", "in parts"), ("drawn", "ranks"), ("drawn", "fewer"):
            one, other = ([x for x in log_lines(os.path.join(tmp, n)) if "loss" in x] for n in pair)
            assert [x["step"] for x in other] == [1, 2, 3, 4], "steps never appear twice, and rank 0 alone writes"
            for a, b in zip(one, other):
                for key in ("loss_flow", "loss_dist", "grad_norm"):
                    assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), (a["step"], key, a[key], b[key])


def test_resume_is_exact():
    with tempfile.TemporaryDirectory() as tmp:
        teacher, (folder, _) = micro_teacher(tmp), picture_folder(tmp)
        flags = ["--teacher", teacher, "--data", folder, "--drop_path", "0.2", "--micro_batch", "2"]
        whole, parts = os.path.join(tmp, "whole"), os.path.join(tmp, "parts")
        train_quietly(*flags, "--out", whole, "--steps", 4, "--eval_every", 2)
        train_quietly(*flags, "--out", parts, "--steps", 2, "--eval_every", 2)
        open(os.path.join(parts, "model.safetensors"), "w").write("damaged")  # to be written again from state.pt
        said = train_quietly(*flags, "--out", parts, "--steps", 4, "--eval_every", 2)
        assert "resumed" in said and "step 2" in said
        assert log_lines(whole) == log_lines(parts), "four steps must equal two + resume + two, bit for bit"
        assert same_weights(*(os.path.join(x, "model.safetensors") for x in (whole, parts)))
        said = train_quietly(*flags, "--out", parts, "--steps", 4)
        assert "finished" in said and "--steps 8" in said
        state = torch.load(os.path.join(parts, "state.pt"), weights_only=True)
        assert state["step"] == 4 and state["samples"] == 16
        raises(ValueError, train_quietly, *flags, "--out", parts, "--steps", 6, "--beta", "3",
               words="beta was 2.0, is now 3.0")


def test_log_has_what_it_should():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        out = os.path.join(tmp, "out")
        said = train_quietly("--teacher", micro_teacher(tmp), "--data", folder, "--val", folder, "--steps", 3,
                             "--log_every", 2, "--out", out, "--lambda_f", 2)
        training, final, judged = log_lines(out, timing=True)
        assert ({"step", "loss", "loss_flow", "loss_dist", "alpha", "weight", "grad_norm", "lr", "img_s"}
                <= training.keys())
        assert (training["step"], final["step"]) == (2, 3) and len(training["alpha"]) == len(training["weight"]) == 3
        assert math.isclose(sum(training["weight"]), 1, rel_tol=1e-5)
        assert math.isclose(training["loss"], training["loss_dist"] + 2 * training["loss_flow"], rel_tol=1e-9)
        assert judged["kind"] == "eval" and "loss" not in judged and len(judged["flow_by_t"]) == 10
        grid = Image.open(os.path.join(out, "samples", "step_000003.png"))
        assert grid.size == (2 * 3 * 16, 4 * 16), "eight pictures, original | reconstruction | error, two a row"
        assert "img/s" in said and "eta" in said
        # the first triple: the third is four times the difference of the first two
        rec = np.array(grid)[:16, :48].astype(int)
        assert np.array_equal(rec[:, 32:], np.minimum(4 * abs(rec[:, :16] - rec[:, 16:32]), 255))


@torch.no_grad()
def test_validation_during_training():
    _, enc, dec = micro_models()
    with tempfile.TemporaryDirectory() as tmp:
        read = data.ImageDataset(picture_folder(tmp, n=7)[0], 16, train=False)
        dataset = [read[n] for n in range(7)]
    img = torch.stack([image for image, _ in dataset]) / 255
    rec = evaluation.round_uint8(dec.decode(enc.encode(img), noise=evaluation.image_noise(range(7), 16, 48, seed=3)))
    expected = evaluation.psnr(img, rec)
    quality, flow_by_t, grid = validation.validate(enc, dec, dataset, 3, 3, contextlib.nullcontext())
    assert abs(quality - expected.mean().item()) < 1e-4 and enc.training and dec.training
    assert (np.array_equal(grid[:16, 16:32], (rec[0] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))
            and grid.shape == (64, 96, 3))
    dec.velocity = lambda x_t, t, c: t[..., None].expand_as(x_t)  # so that the loss tells where in [0, 1] t was drawn
    _, flow_by_t, _ = validation.validate(enc, dec, dataset, 7, 3, contextlib.nullcontext())
    x = decoder.patchify((img - dec.mean) / dec.std, 4)
    u = evaluation.image_noise(range(7), 16, 48, seed=3) - x
    for k, loss in enumerate(flow_by_t):
        assert abs(loss - (u - (k + 0.5) / 10).square().mean().item()) < 0.05 * abs(u.mean().item()) + 0.01, k
    del dec.velocity
    with unittest.mock.patch.object(dist, "all_reduce", lambda x: None):  # each rank's own share
        shares = [validation.validate(enc, dec, dataset, 3, 3, contextlib.nullcontext(), rank=r, ranks=2)[0]
                  for r in (0, 1)]
    assert abs(shares[0] - expected[0::2].mean().item()) < 1e-4 and abs(shares[1] - expected[1::2].mean().item()) < 1e-4


def test_fewer_passes_same_numbers():
    """The compiled step has the plain step's losses and gradients, and changes no module."""
    teacher, enc, dec = micro_models()
    img = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    plain, compile_, before, results, called = None, torch.compile, vars(distill).copy(), [], []
    try:
        def without_cpp(f, options=None, **kw):
            compiled_f = compile_(f, backend="aot_eager", **kw)  # the same graphs
            return (compiled_f if f is not distill.layer_distances else lambda *x: called.append(len(x))
                    or compiled_f(*x))
        torch.compile = without_cpp
        for compiled in (False, True):
            args = train.parse_args(["--size", "16", "--batch_size", "2"] + ["--compile"] * compiled)
            optimizer = torch.optim.AdamW(encoder.parameter_groups([enc, dec], 1e-3))
            optimizer.zero_grad()
            micro_step, _ = train.training_step(args, teacher, enc, dec, optimizer,
                                                torch.autocast("cpu", enabled=False), 2, 1)
            train.seed_step(1, 2)
            results.append((micro_step(img), [p.grad.clone() for p in (*enc.parameters(), *dec.parameters())]))
    finally:
        torch.compile = compile_
        torch.compiler.reset()
    assert called == [2] and all(vars(distill)[k] is x for k, x in before.items()), "only the compiled step has its own"
    (plain, plain_grads), (fast, fast_grads) = results
    close(fast, plain, 1e-5)
    for a, b in zip(plain_grads, fast_grads):
        assert (a - b).norm() <= 1e-4 * a.norm(), "the compiled step has the plain step's gradients"


def test_autocast_keeps_the_residual_stream_in_bf16():
    teacher, enc, dec = micro_models()
    for p in (*enc.parameters(), *teacher.parameters(), *dec.parameters()):
        p.data *= 0.3
    img = torch.rand(2, 3, 16, 16)
    t, noise = torch.rand(2, 16), torch.randn(2, 16, 48)
    expected = train.losses(teacher, enc, dec, img, METHOD, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        z, hidden = enc(img)
        assert {h.dtype for h in hidden} == {dec.condition(z).dtype} == {torch.bfloat16}, "half the bytes of fp32"
        found = train.losses(teacher, enc, dec, img, METHOD, t, noise)
        clip = encoder.ViT(replace(MICRO_VIT, pre_norm=True))
        clip.norm_pre.register_forward_hook(lambda norm, given, out: out.float())  # as a GPU's autocast has it
        assert {h.dtype for h in clip(img)} == {torch.bfloat16}
    for a, b in zip(expected, found):
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.03 * a.abs().max(), (
            "losses and distances are fp32 all the same")


def test_flops_against_the_closed_form():
    teacher, enc, dec = micro_models()
    def blocks(tokens, width, mlp, depth):  # qkv, proj and MLP products, then scores and their use
        return depth * (2 * tokens * (4 * width ** 2 + 2 * width * mlp) + 4 * tokens ** 2 * width)
    vit = blocks(17, 32, 64, 3) + 2 * 16 * 48 * 32
    down = 2 * 16 * (32 * 32 + 32 * 8)
    head = 2 * 16 * (48 * 96 + 256 * 96 + 96 * 96 + 32 * 96 + 2 * (2 + 3) * 96 * 96 + 2 * 96 * 96 + 96 * 48)
    up = 2 * 16 * (8 * 32 + 32 * 32) + blocks(16, 32, 128, 2)
    assert train.model_flops(enc, dec, 16) == vit + 3 * (vit + down + up + head)
    one_layer = encoder.Encoder(enc.vit, enc.latent_dim, "linear")
    assert train.model_flops(one_layer, dec, 16) == vit + 3 * (vit + 2 * 16 * 32 * 8 + up + head)


# ---- sample.py: latents, features, animations, pipes ----

@torch.no_grad()
def test_sample_decodes_what_it_saved():
    with tempfile.TemporaryDirectory() as tmp:
        weights, path, z = tokenizer_file(tmp), os.path.join(tmp, "img.png"), os.path.join(tmp, "z.safetensors")
        (_, enc, dec), result = micro_models(), os.path.join(tmp, "z_recon.png")
        for width, height in ((40, 30), (33, 90), (16, 16), (3, 50)):
            picture(width, width, height).save(path)
            for size, steps, seed in ((16, 1, 0), (0, 3, 5)):
                flags = ["--weights", weights, "--steps", steps, "--seed", seed]
                assert sampled(path, *flags, "--size", size, "--save_latent", z)[0] == 0
                img = tools.pictures.resize_short_side(data.load_image(path), size)
                padded = np.pad(np.array(img), ((0, -img.height % 4), (0, -img.width % 4), (0, 0)), "edge")
                latent = enc.encode(torch.from_numpy(padded).permute(2, 0, 1)[None] / 255)
                decoded = dec.decode(latent, steps, evaluation.image_noise([0], latent[0, 0].numel(), 48, seed))
                decoded = decoded[0, :, :img.height, :img.width]
                assert torch.equal(load_file(z)["latent"], latent) and sampled(z, *flags)[0] == 0
                triple, rec = pixels(os.path.join(tmp, "img_recon.png"))[0][0], pixels(result)[0][0]
                assert ((rec == (255 * decoded).round().permute(1, 2, 0).numpy()).all()
                        and (rec == triple[:, img.width:2 * img.width]).all()), (width, size)
        other, torn, wrong = (os.path.join(tmp, name + ".safetensors") for name in ("other", "torn", "wrong"))
        encoder.write_model(other, encoder.read_config(weights), {**load_file(weights), "latent_mean": torch.ones(8)})
        blob = open(z, "rb").read()
        open(torn, "wb").write(blob[:-9])
        about = json.loads(blob[8:8 + struct.unpack("<Q", blob[:8])[0]])["__metadata__"]["config"]
        encoder.write_model(wrong, {**json.loads(about), "width": 99}, load_file(z))
        digest = evaluation.sha256(other)
        status, _, err = sampled(path, "--weights", weights, "--save_latent", other)
        assert status == 2 and "is no latent" in err and evaluation.sha256(other) == digest, (
            "a latent is never written over a model")
        for file, by, words in ((z, other, "of other weights"), (torn, weights, "damaged"), (wrong, weights, "for 99x"),
                                (weights, weights, "no picture or")):
            status, _, err = sampled(file, "--weights", by)
            assert status == 1 and len(err.splitlines()) == 1 and words in err and file in err, err


def test_sample_features_are_principal_components():
    def colours(tokens, fit):  # by SVD, in numpy
        axes = np.linalg.svd(fit - fit.mean(0))[2][:3]
        axes = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes]).T
        low, high = np.quantile((fit - fit.mean(0)) @ axes, (0.02, 0.98), axis=0)
        return 255 * np.clip(((tokens - fit.mean(0)) @ axes - low) / (high - low), 0, 1)

    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.dict(encoder.TEACHERS, micro=MICRO_VIT), \
            unittest.mock.patch.dict(os.environ, TORCH_HOME=tmp, HF_HOME=tmp):
        weights, path, result = tokenizer_file(tmp), os.path.join(tmp, "img.png"), os.path.join(tmp, "img_features.png")
        config, tensors = encoder.read_config(weights), load_file(weights)
        teacher, copy = encoder.load_teacher(config["teacher"]), os.path.join(tmp, "copy.safetensors")
        encoder.write_model(copy, config,
                            {**tensors, **{f"encoder.vit.{k}": v for k, v in teacher.state_dict().items()}})
        alone, gone, named = (os.path.join(tmp, name + ".safetensors") for name in ("alone", "gone", "named"))
        encoder.write_model(named, {**config, "teacher": "micro", "teacher_weights": config["teacher"]}, tensors)
        encoder.write_model(alone, {**config, "teacher": "tiny", "teacher_weights": "random"}, tensors)
        encoder.write_model(gone, {**config, "teacher": "internvit"}, tensors)
        picture(0, 83, 61).save(path)  # 16 x 21 tokens, the last row and column cut
        padded = sample.pad_to_patches(data.to_tensor(Image.open(path))[None] / 255, 4)
        read = lambda vit: vit.norm(vit(padded)[-1])[0, 1:].detach().double().numpy()
        for file, words in ((weights, ""), (named, ""), (copy, ""), (alone, "a random initialisation"),
                            (gone, "internvit (not on this machine)")):
            asked = AssertionError("for a picture nothing is downloaded")
            with unittest.mock.patch.object(torch.hub, "download_url_to_file", side_effect=asked):
                status, out, err = sampled(path, "--weights", file, "--size", 0, "--features")
            assert status == 0 and words in out and out.count("--features") == bool(words), out + err
            tokens = [read(encoder.Encoder.from_pretrained(file).vit)] + [read(teacher)] * (not words)
            expected = [colours(x, tokens[-1]).reshape(16, 21, 3).repeat(4, 0).repeat(4, 1)[:61, :83] for x in tokens]
            got = pixels(result)[0][0]
            assert got.shape == (61, 83 * (1 + len(tokens)), 3) and (got[:, :83] == np.array(Image.open(path))).all()
            assert np.abs(got[:, 83:] - np.concatenate(expected, 1)).max() < 0.51, (
                "rounded colours of an independent SVD")
            if len(tokens) == 2:
                assert (got[:, 83:166] == got[:, 166:]).all() == (file == copy), (
                    "an untrained copy must have its teacher's colours, and another student must not")
        moving = clip(os.path.join(tmp, "moving.webp"))
        assert sampled(moving, "--weights", weights, "--size", 0, "--features")[0] == 0
        got = pixels(os.path.join(tmp, "moving_features.png"))[0][0]
        assert got.shape == (30, 120, 3) and (got[:, :40] == np.array(picture(0))).all(), "an animation's first frame"


def test_sample_animations():
    with tempfile.TemporaryDirectory() as tmp:
        weights, out, stills = tokenizer_file(tmp), os.path.join(tmp, "out"), os.path.join(tmp, "stills")
        os.makedirs(stills)
        for name in ("a.gif", "b.webp", "c.png"):
            path, z = clip(os.path.join(tmp, name)), os.path.join(tmp, "z.safetensors")
            status, said, err = sampled(path, "--weights", weights, "--out", out, "--seed", 4, "--save_latent", z)
            assert status == 0 and re.search(r"4 frames, latent 8x4x6 \| .* dB on average", said), said + err
            frames, durations, loop = pixels(os.path.join(out, name.replace(".", "_recon.")))
            assert (frames.shape == (4, 16, 42, 3) and durations == [100, 50, 70, 200]
                    and loop == 2), (name, frames.shape, durations, loop)
            for i, frame in enumerate(pixels(path)[0]):
                Image.fromarray(frame.astype(np.uint8)).save(os.path.join(stills, f"{i}.png"))
            said_alone = sampled(stills, "--weights", weights, "--out", out, "--seed", 4)[1]
            alone = np.stack([pixels(os.path.join(out, f"{i}_recon.png"))[0][0] for i in range(4)])
            difference = np.abs(frames - alone[:, :, :42])
            # a GIF's frame has only 256 colours for 672 different pixels; elsewhere the last bit may differ, as a batch
            # may be summed in another order
            assert (difference.mean() < 8 if name == "a.gif" else difference.max() <= 1
                    and difference.mean() < 0.01), (name, difference.max())
            figures = [float(x) for x in re.findall(r"PSNR ([\d.]+)", said_alone)]
            assert abs(float(re.search(r"PSNR ([\d.]+)", said)[1]) - sum(figures) / 4) < 0.011
            assert sampled(z, "--weights", weights, "--out", out, "--seed", 4)[0] == 0
            rec = pixels(os.path.join(out, "z_recon" + os.path.splitext(name)[1]))
            assert rec[1:] == (durations, loop) and rec[0].shape == (4, 16, 21, 3)
            assert name == "a.gif" or (rec[0] == frames[:, :, 21:]).all(), (
                "the latent of an animation decodes to the animation")
        # the still image of an APNG is none of its frames; a GIF that does not mention loops plays once; what is
        # transparent is white
        clip(os.path.join(tmp, "d.png"), default_image=True)
        clear = [Image.new("RGBA", (40, 30), (255, 0, 0, 0)), Image.new("RGBA", (40, 30), (255, 0, 0, 255))]
        clear[0].save(os.path.join(tmp, "e.webp"), save_all=True, append_images=clear[1:], lossless=True, exact=True)
        picture(0).save(os.path.join(tmp, "f.gif"), save_all=True, append_images=[picture(1)], duration=30)
        torn, blob = os.path.join(tmp, "torn.gif"), open(os.path.join(tmp, "a.gif"), "rb").read()
        open(torn, "wb").write(blob[:len(blob) * 2 // 3])
        picture(0, 520, 516).save(os.path.join(tmp, "large.png"))
        status, _, err = sampled(os.path.join(tmp, "large.png"), "--weights", weights, "--size", 0, "--out", out)
        assert status == 0, err
        picture(0, 4, 300).save(os.path.join(tmp, "strip.png"))
        status, said, err = sampled(*(os.path.join(tmp, n) for n in ("strip.png", "large.png")), "--weights", weights,
                                    "--size", 256, "--out", out)
        assert (status == 1 and "strip.png has 256x19200 pixels at this --size, more than 2,097,152" in err
                and "large_recon.png" in said), err
        status, _, err = sampled(torn, *(os.path.join(tmp, n) for n in ("d.png", "e.webp", "f.gif")), "--weights",
                                 weights, "--size", 0, "--out", out)
        assert (status == 1 and len(err.splitlines()) == 1 and torn in err
                and not os.path.exists(os.path.join(out, "torn_recon.gif"))), err
        assert (len(pixels(os.path.join(out, "d_recon.png"))[0]) == 3
                and pixels(os.path.join(out, "f_recon.gif"))[1:] == ([30, 30], None))
        assert pixels(os.path.join(out, "e_recon.webp"))[0][:, 0, 0].tolist() == [[255, 255, 255], [255, 0, 0]]
        # an animation with an orientation, after one that is too wide for its format beside the original
        turned, wide = os.path.join(tmp, "turned.webp"), os.path.join(tmp, "wide.webp")
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter clockwise
        clear[0].save(turned, save_all=True, append_images=clear[1:], lossless=True, exif=exif.tobytes())
        clear[1].resize((8200, 4)).save(wide, save_all=True, append_images=[clear[0].resize((8200, 4))])
        status, _, err = sampled(wide, turned, "--weights", weights, "--size", 0, "--out", out)
        assert status == 1 and len(err.splitlines()) == 1 and f"{wide} cannot be written as WEBP" in err, err
        assert pixels(os.path.join(out, "turned_recon.webp"))[0].shape == (2, 40, 60, 3), (
            "40 x 30, turned, and beside it the reconstruction")
        # memory: frames go to the network in batches; what does not fit together is refused
        enc, dec = (encoder.Encoder(encoder.ViT(replace(MICRO_VIT, patch=16)), 8),
                    decoder.Decoder(replace(MICRO_DECODER, patch=16)))
        seen, img = [], torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
        enc.vit.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        rec = sample.reconstruct(enc, dec, img.repeat(2 ** 11, 1, 1, 1), 16, 16, torch.device("cpu"))[1]
        assert seen == [2 ** 12, 2 ** 11], "a million pixels at a time"
        assert len(rec) == 3 * 2 ** 11 and (rec == rec[0]).all(), (
            "all frames must get the same noise, which is all that an untrained decoder shows")
        with unittest.mock.patch.object(tools.pictures, "MAX_PIXELS", 600):
            status, _, err = sampled(os.path.join(tmp, "a.gif"), "--weights", weights, "--out", out)
        assert status == 1 and "has 4 frames of 21x16, more than 1,200 pixels" in err, err


def test_sample_in_a_pipe():
    with tempfile.TemporaryDirectory() as tmp:
        weights, still, z = tokenizer_file(tmp), os.path.join(tmp, "img.png"), os.path.join(tmp, "z.safetensors")
        picture(0).save(still)
        moving = clip(os.path.join(tmp, "clip.gif"))
        pipe = lambda content: subprocess.run([sys.executable, os.path.join(HERE, "sample.py"), "-", "--weights",
                                               weights], input=content, capture_output=True)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            *results, bad = pool.map(pipe, (*(open(path, "rb").read() for path in (still, moving)), b"no picture"))
        for path, done in zip((still, moving), results):
            assert done.returncode == 0 and b"standard output: " in done.stderr, done.stderr
            sampled(path, "--weights", weights, "--save_latent", z), sampled(z, "--weights", weights)
            assert done.stdout == open(os.path.join(tmp, "z_recon" + os.path.splitext(path)[1]), "rb").read(), (
                "standard output must hold the reconstruction and nothing else")
        assert (bad.returncode == 1 and not bad.stdout
                and bad.stderr.splitlines()[-1].startswith(b"sample.py: stdin cannot be read")), bad.stderr
        for flags, words in ((["-", "--features"], "give --out FOLDER"),
                             ([still, "--save_latent", still], "must end in .safetensors"),
                             ([z, "--features"], "not latents"), ([still, moving, "--save_latent", z], "2 pictures"),
                             (["-", still], "2 pictures"), ([still, "--seed", -1], "--seed: it is -1"),
                             ([z, "--weights", still], "img.png")):
            status, out, err = sampled(*flags)
            assert status == 2 and not out and words in err and "Traceback" not in err, (flags, err)
        assert not [n for n in os.listdir(tmp) if "tmp" in n or "stdin" in n]


# ---- a user's path: each file alone, train then sample then evaluate, the shipped weights ----

def test_each_leaf_alone_in_an_empty_folder():
    prints = {"encoder": "latent", "decoder": "condition", "distill": "w(beta=5.0)", "data": "image", "eval": "psnr"}

    def alone(leaf):
        with tempfile.TemporaryDirectory() as tmp, tempfile.TemporaryDirectory() as elsewhere:
            shutil.copy(os.path.join(HERE, leaf + ".py"), tmp)
            flags = [picture_folder(elsewhere, n=2)[0]] if leaf == "data" else []
            code = (f"import {leaf}, os, runpy, sys; os.system('ls; ls >&2'); sys.argv[1:] = {flags}; "
                    f"runpy.run_path('{leaf}.py', run_name='__main__')")
            done = run("python", "-B", "-c", code, cwd=tmp)
            assert done.returncode == 0 and prints[leaf] in done.stdout, f"{leaf}: {done.stderr}"
            for said in (done.stdout, done.stderr):
                assert said.startswith(leaf + ".py\n"), f"importing {leaf} prints: {said}"
            assert os.listdir(tmp) == [leaf + ".py"], f"{leaf} writes files"
    side_by_side(*(functools.partial(alone, leaf) for leaf in prints))


def test_train_sample_eval_end_to_end():
    with tempfile.TemporaryDirectory() as tmp:
        script = lambda name: os.path.join(HERE, name)
        photos = os.path.join(tmp, "photos")
        os.makedirs(photos)
        picture(0, 130, 70).save(os.path.join(photos, "a.png"))
        done = run("python", script("train.py"), "--steps", 2, "--batch_size", 2, "--val", photos, cwd=tmp)
        assert done.returncode == 0 and "RANDOM" not in done.stdout and "procedurally drawn" in done.stdout, done.stderr
        # sample: odd sizes, a folder, two pictures of one name, no clobbering
        picture(1, 33, 90).save(os.path.join(photos, "a.jpg"))
        picture(2, 64, 64).save(os.path.join(tmp, "img.png"))
        done = run("python", script("sample.py"), "img.png", photos, cwd=tmp)
        assert done.returncode == 0, done.stderr
        assert "out/model.safetensors" in done.stdout, "it says which weights it used"
        lines = re.findall(r"latent (\d+)x(\d+)x(\d+) \| ([\d.]+)x \| PSNR ([\d.]+) dB \| SSIM (-?[\d.]+) \| [\d.]+ s",
                           done.stdout)
        assert [x[:3] for x in lines] == [("16", "8", "8"), ("16", "22", "8"), ("16", "8", "15")], done.stdout
        assert lines[0][3] == "12.0", "3 * 64 * 64 values against 16 * 8 * 8"
        assert Image.open(os.path.join(tmp, "img_recon.png")).size == (3 * 64, 64)
        assert sorted(os.listdir(photos)) == ["a.jpg", "a.png"], (
            "a folder may be data, so the results are not put into it")
        results = [Image.open(os.path.join(photos + "_recon", n)).size for n in os.listdir(photos + "_recon")]
        assert sorted(results) == [(3 * 64, 175), (3 * 119, 64)], results
        first = open(os.path.join(tmp, "img_recon.png"), "rb").read()
        again = run("python", script("sample.py"), "img.png", photos, "--out", "again", "--size", 0, cwd=tmp)
        assert again.returncode == 0 and len(os.listdir(os.path.join(tmp, "again"))) == 3
        assert Image.open(os.path.join(tmp, "again", "img_recon.png")).size == (192, 64)
        assert open(os.path.join(tmp, "again", "img_recon.png"), "rb").read() == first, (
            "the same seed gives the same picture")
        for k in range(4):
            os.makedirs(os.path.join(tmp, f"s{k}"))
            picture(k).save(os.path.join(tmp, f"s{k}", "same.png"))
        run("python", script("sample.py"), "s0", "s1", "s2", "s3", "--out", "same", cwd=tmp)
        assert len(os.listdir(os.path.join(tmp, "same"))) == 4, "pictures of one name must not overwrite each other"
        deep = os.path.join(tmp, "nested", "deep")
        os.renames(os.path.join(tmp, "s0"), deep)
        for _ in range(2):  # the second time beside the first one's results
            found = tools.pictures.find_pictures([os.path.join(tmp, "nested")])
            assert found == [(os.path.join(deep, "same.png"), os.path.join(tmp, "nested_recon", "deep"))], found
            picture(0).save(os.path.join(deep, "same_recon.png"))
        # eval: whatever the batch size, and equal to sample.py's own figure on the same picture
        folder, _ = picture_folder(tmp, n=7)
        flags = ["--inception", "none", "--weights", os.path.join(tmp, "out", "model.safetensors"), "--data"]
        (_, one), (said, three) = (evaluate(*flags, folder, "--batch_size", batch, "--pca", "--fit", folder)
                                   for batch in (1, 3))
        for row in one["results"]:
            for metric in ("psnr", "ssim", "ssim_paper"):
                assert abs(one["results"][row][metric] - three["results"][row][metric]) < 1e-4
        assert one["images"] == 7 and "ADM centre crop to 64 px" in said and "seed 0" in said
        os.renames(os.path.join(tmp, "img.png"), os.path.join(tmp, "alone", "img.png"))
        single = evaluate(*flags, os.path.join(tmp, "alone"))[1]["results"]["tokenizer"]
        assert abs(single["psnr"] - float(lines[0][4])) < 0.006 and abs(single["ssim"] - float(lines[0][5])) < 6e-5
        bigger = run("python", script("eval.py"), "--data", folder, "--resolution", 256, "--inception", "none", "--out",
                     "report.json", cwd=tmp)
        assert bigger.returncode == 0 and "compared at 256 px" in bigger.stdout
        assert json.load(open(os.path.join(tmp, "report.json")))["images"] == 7


def test_shipped_weights():
    """The shipped weights are small, their teacher is not random, and a new picture has the PSNR of the README.

    They must beat a PCA of 16 components per patch, which numpy fits on other photographs.
    """
    skimage_data = os.path.join(os.path.dirname(importlib.util.find_spec("skimage").origin), "data")
    photo = lambda name: Image.open(os.path.join(skimage_data, name)).convert("RGB")
    folder = os.path.join(HERE, "weights")
    assert sorted(os.listdir(folder)) == ["teacher-tiny.safetensors", "uniflow-tiny.safetensors"]
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 36e6
    with tempfile.TemporaryDirectory() as tmp:  # an empty folder, so no out/ to find
        photo("astronaut.png").save(os.path.join(tmp, "img.png"))
        done = run("python", os.path.join(HERE, "sample.py"), "img.png", "--features", cwd=tmp)
        assert done.returncode == 0 and os.path.exists(os.path.join(tmp, "img_features.png")), done.stderr
        found = float(re.search(r"PSNR ([\d.]+)", done.stdout)[1])
        assert "latent 16x32x32" in done.stdout and abs(found - 30.65) < 0.05, (
            f"the README says 30.65 dB: {done.stdout}")
        assert Image.open(os.path.join(tmp, "img_features.png")).size == (3 * 256, 256), "picture, student and teacher"
    def patches(img):
        return np.asarray(img, float).reshape(32, 8, -1, 8, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 192) / 255
    others = np.concatenate([patches(photo(name).resize((256, 256)))
                             for name in ("chelsea.png", "coffee.png", "rocket.jpg")])
    mean, x = others.mean(0), patches(photo("astronaut.png").resize((256, 256)))
    basis = np.linalg.svd(others - mean, full_matrices=False)[2][:16]
    error = ((x - mean) @ basis.T @ basis + mean - x) ** 2
    assert found > -10 * np.log10(error.mean()) + 1.5, "the tokenizer sees more than one patch, so it must beat the PCA"
    teacher = encoder.load_teacher("tiny")
    assert encoder.read_config(os.path.join(folder, "teacher-tiny.safetensors"))["top1"] > 50
    enc = encoder.Encoder.from_pretrained(os.path.join(folder, "uniflow-tiny.safetensors"))
    img = data.to_tensor(photo("chelsea.png").resize((64, 64)))[None] / 255
    with torch.no_grad():
        alpha = distill.layer_distances([h[:, 1:] for h in enc.vit(img)], [h[:, 1:] for h in teacher(img)])
    assert alpha.max() < 0.05, f"the student must stay near the teacher: {alpha}"
    assert (torch.equal(enc.vit.norm.weight, teacher.norm.weight)
            and torch.equal(enc.vit.norm.bias, teacher.norm.bias)), "frozen"


def test_a_clean_run_is_quiet():
    with tempfile.TemporaryDirectory() as tmp:
        done = run("python", "-X", "dev", "-W", "always", "train.py", "--teacher", micro_teacher(tmp), "--data",
                   picture_folder(tmp)[1], *MICRO_RUN, "--steps", 3, "--eval_every", 2, "--workers", 1, "--out",
                   os.path.join(tmp, "out"))
        ours = [line for line in done.stderr.splitlines() if "Warning" in line and "site-packages" not in line]
        assert done.returncode == 0 and not ours, done.stderr


# ---- faults: what a user gets wrong, and pictures that cannot be read ----

def test_bad_input_is_one_line_and_status_2():
    with tempfile.TemporaryDirectory() as tmp:
        teacher, (folder, _) = micro_teacher(tmp), picture_folder(tmp)
        empty, bad = os.path.join(tmp, "empty"), os.path.join(tmp, "bad")
        os.makedirs(empty), os.makedirs(bad)
        open(os.path.join(bad, "text.jpg"), "w").write("no image")
        open(os.path.join(tmp, "torn.zip"), "wb").write(b"PK\x03\x04 torn")
        open(os.path.join(tmp, "junk.safetensors"), "wb").write(b"junk")
        out = os.path.join(tmp, "out")
        micro = ["--teacher", teacher, *MICRO_RUN, "--out", out]
        train_quietly("--teacher", teacher, "--data", folder, "--steps", 1, "--out", os.path.join(tmp, "good"))
        good = os.path.join(tmp, "good", "model.safetensors")
        tokenizer_as_teacher = ["--teacher", "tiny", "--teacher_weights", good, "--out", out]
        cases = [  # command, what the line must name
            (["train.py", *micro, "--data", "/nonexistent"], "/nonexistent"),
            (["train.py", *micro, "--data", empty], "holds no images"),
            (["train.py", *micro, "--data", os.path.join(tmp, "torn.zip")], "torn.zip"),
            (["train.py", *micro, "--data", bad, "--steps", "1"], "text.jpg"),
            (["train.py", *micro, "--data", bad, "--steps", "1", "--workers", "1"], "text.jpg"),
            (["train.py", *micro, "--data", folder, "--size", "18"], "try --size 16"),
            (["train.py", "--teacher", "intern"], "internvit"),
            (["train.py", "--teacher", "internvit", "--out", out],
             "OpenGVLab/InternViT-300M-448px/resolve/main/model.safetensors"),
            (["train.py", "--teacher", "tiny", "--teacher_weights", "/missing", "--out", out],
             "/missing: no such file"),
            (["train.py", *tokenizer_as_teacher], "of no known layout"),
            (["train.py", *micro, "--data", folder, "--init", os.path.join(tmp, "junk.safetensors")],
             "junk.safetensors"),
            (["train.py", *micro[:-1], os.path.join(teacher, "out"), "--data", folder], "teacher.safetensors"),
            (["train.py", *micro, "--data", folder, "--steps", "0"], "--steps"),
            (["sample.py", "/missing.png", "--weights", good], "/missing.png"),
            (["sample.py", folder + "/class0", "--weights", os.path.join(tmp, "no.safetensors")], "no.safetensors"),
            (["sample.py", folder + "/class0", "--weights", teacher], "no tokenizer"),
            (["eval.py", "--data", bad, "--weights", good, "--inception", "none"], "text.jpg"),
            (["eval.py", "--data", folder, "--weights", good], "--inception none"),
            (["eval.py", "--data", folder, "--weights", os.path.join(tmp, "junk.safetensors")], "junk.safetensors"),
            (["eval.py", "--data", folder, "--weights", good, "--pca"], "--fit"),
            (["eval.py", "--fid", folder, "/misspelt"], "/misspelt: no such folder"),
            (["data.py", "/nonexistent"], "/nonexistent"),
        ]
        # a run holds its folder, so each has its own
        commands = [[f"{out}-{k}" if flag == out else flag for flag in flags] for k, (flags, _) in enumerate(cases)]
        results = side_by_side(*(functools.partial(run, "python", *flags, HF_HUB_OFFLINE="1", TORCH_HOME=tmp,
                                                   HF_HOME=tmp) for flags in commands))
        for (command, names), done in zip(cases, results):
            lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("usage:", " "))]
            assert done.returncode == 2, f"{command}: status {done.returncode}\n{done.stderr}"
            assert "Traceback" not in done.stderr and len(lines) == 1 and names in lines[0], (
                f"{command}:\n{done.stderr}")
        names = [os.path.join(bad, "text.jpg"), os.path.join(folder, "class0")]
        done = run("python", "sample.py", *names, "--weights", good, "--out", os.path.join(tmp, "reconstructed"))
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "text.jpg" in done.stderr, done.stderr
        assert len(os.listdir(os.path.join(tmp, "reconstructed"))) == 5, "the other pictures go on"
        written = set()
        for k in range(len(cases)):
            for _, _, files in os.walk(f"{out}-{k}"):
                written.update(files)
        assert written <= {".lock", "log.jsonl"}, f"half-written: {written}"
        done = run("python", "train.py", *micro, "--data", folder, RANK="0", WORLD_SIZE="3", LOCAL_RANK="0")
        assert done.returncode == 2 and "try 3 or 6" in done.stderr, done.stderr


def test_evaluation_refuses_before_it_begins():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=9)
        before, base = open(weights, "rb").read(), ["--data", folder, "--weights", weights, "--inception", "none"]
        for flags, words in ((["--out", weights], ".json"), (["--save_stats", "x.npz"], "--fid"),
                             (["--probe"], "--fit"),
                             (["--pca", "--fit", folder, "--fid", "a", "b"], "leave out --data --weights --pca"),
                             (["--batch_size", "0"], "at least 1")):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                raises(SystemExit, evaluation.main, [*base, *flags], words="2")
            assert words in said.getvalue(), said.getvalue()
        raises(ValueError, evaluate, *base, "--probe", "--fit", os.path.join(folder, "class0"), words="class1")
        raises(ValueError, evaluate, *base, "--probe", "--fit", folder, "--teacher", "tiny", words="another width")
        bare = os.path.join(tmp, "bare.safetensors")  # of the same shape, but without CLS
        vit = encoder.ViT(replace(MICRO_VIT, num_prefix=0))
        encoder.write_model(bare, {"vit": asdict(vit.config)}, dict(vit.named_parameters()))
        raises(evaluation.UserError, evaluate, *base, "--probe", "--fit", folder, "--teacher", bare,
               words="another width")
        nineteen, _ = picture_folder(os.path.join(tmp, "few"), n=19)
        raises(evaluation.UserError, evaluate, *base, "--probe", "--fit", nineteen, words="19 images")
        with unittest.mock.patch.object(evaluation, "InceptionV3", QuickInception):
            _, report = evaluate(*base, "--inception", weights, "--pca", "--fit", folder)
        assert report["warning"] == (
            "FID of 9 images, fewer than the 2048 dimensions of its covariance: such a figure means little; fitted on "
            "the images that are measured: PCA and probe mean little")
        nameless, tensors = encoder.read_config(weights), load_file(weights)
        del nameless["teacher"]
        encoder.write_model(os.path.join(tmp, "nameless.safetensors"), nameless, tensors)
        raises(ValueError, evaluate, *base, "--weights", os.path.join(tmp, "nameless.safetensors"), "--probe", "--fit",
               folder, words="teacher None is neither")
        read = decoder.Decoder.from_pretrained

        def saved(path):  # train.py saves between encoder and decoder
            return read(shutil.copy(os.path.join(tmp, "nameless.safetensors"), path))
        with unittest.mock.patch.object(decoder.Decoder, "from_pretrained", saved):
            raises(ValueError, evaluate, *base, words=f"{weights} was written anew while it was read: run this again")
        open(weights, "wb").write(before)


def test_an_evaluation_drops_no_image():
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=9)
        for i in (0, 5):  # the first in order is one of them
            open(os.path.join(folder, f"class{i % 2}", f"{i}.png"), "wb").write(b"")
        for batch in (1, 64):
            raises(ValueError, evaluate, "--data", folder, "--weights", weights, "--inception", "none", "--batch_size",
                   batch, words="2 of 9 images")


def test_training_goes_on_without_bad_pictures():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp, n=20)
        for n in (3, 8):
            open(os.path.join(folder, f"class{n % 2}", f"{n}.png"), "wb").write(b"no picture")
        flags = ["--teacher", micro_teacher(tmp), "--data", folder, *MICRO_RUN, "--eval_every", 100, "--save_every", 4]
        logs = []
        for workers in (0, 1, 4):
            out = os.path.join(tmp, str(workers))
            said = train_quietly(*flags, "--workers", workers, "--max_bad_images", 0.1, "--out", out, "--steps",
                                 3 if workers == 1 else 6)
            if workers == 1:
                said = train_quietly(*flags, "--workers", 0, "--max_bad_images", 0.1, "--out", out, "--steps", 6)
            logs.append([x for x in log_lines(out) if x["step"] != 3])
            assert "2 of the " in said and "images so far could not be read" in said
            assert (sorted(open(os.path.join(out, "bad_images.txt")).read().split())
                    == [os.path.join(folder, "class0", "8.png"), os.path.join(folder, "class1", "3.png")])
        assert logs[0] == logs[1] == logs[2], "the same for 0, 1 and 4 workers, and across a resume"
        done = run("python", "train.py", *flags, "--steps", 6, "--out", os.path.join(tmp, "strict"))
        assert done.returncode == 2 and "more than --max_bad_images 0.01" in done.stderr, done.stderr
        done = run("python", "train.py", "--teacher", flags[1], *MICRO_RUN, "--val", folder, "--out",
                   os.path.join(tmp, "val"), "--steps", 1)
        assert done.returncode == 2 and "8.png" in done.stderr and "train" not in done.stdout, (
            "an evaluation must drop no image, and it is tried before the training")


# ---- this file: its table of contents, its list, its runner ----

def contents():
    """[(name, what it guards, its tests)] of each section of this file, then of each file of tests/."""
    with open(os.path.join(HERE, "test_all.py")) as f:
        parts = re.split(r"^# ---- (.*?): (.*) ----$", f.read(), flags=re.M)[1:]  # name, what, text, name, what, ...
    return [(name, what, runner.tests_of(re.findall(r"^def (\w+)\(", text, re.M)))
            for name, what, text in zip(parts[0::3], parts[1::3], parts[2::3])] + runner.sections("tests")


def table_of_contents():
    """The table of the docstring, as it must read."""
    return "\n".join(textwrap.fill(what, 120, initial_indent=f"    {name:30}  ", subsequent_indent=" " * 36,
                                   break_on_hyphens=False) for name, what, _ in contents())


def test_the_table_of_contents_is_true():
    """The docstring names every section of this file and every file of tests/, and --list knows every test."""
    table = table_of_contents()
    assert f"\n\n{table}\n\n" in __doc__, f"the table of contents in test_all.py's docstring must read:\n{table}"
    assert sorted(test for _, _, tests in contents() for test in tests) == sorted(runner.tests_of(globals()))


def test_the_runner():
    """A test that exits has failed, and those after it run; --list shows a test once; a wrong option is refused; the
    tests before are counted, and fail the whole."""
    def exits():
        sys.exit(3)

    ran = []
    micro = {"test_0_exits": exits, "test_0_follows": lambda: ran.append(True), "test_1": lambda: None}

    def said_by(*args, tests=micro):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            try:
                return runner.main(["test_all.py"], contents(), tests, list(args)), said.getvalue()
            except SystemExit as e:
                return e.code, said.getvalue()
    status, text = said_by("test_0_")
    assert status == 1 and ran == [True] and "FAILED  test_0_exits" in text, "a failed test must give exit status 1"
    assert text.endswith("1 passed, 1 failed\n"), text
    for after, ends in ("226 passed, 0 failed", 0), ("226 passed, 3 failed", 1):
        status, text = said_by("_1", "--after", after)
        assert status == ends and text.endswith(f"\n227 passed, {after[12:]}\n"), text
    assert said_by("_1", "--after", "Segmentation fault")[0] == 2
    status, text = said_by("--list", "layer_weights", "slow_crashes", tests=globals())
    heading, test, faults, slow = text.splitlines()
    assert heading.startswith("distill.py: ") and test.split() == ["test_layer_weights_by_hand"], text
    assert faults.startswith("tests/test_faults.py: ") and "(by name only) 25 kills" in slow, text
    for wrong, words in ("--lst", "unrecognized arguments: --lst"), ("no_such_name", "no test's name contains"):
        status, text = said_by(wrong)
        assert status == 2 and words in text.splitlines()[-1], text


globals().update(runner.load("tests"))  # the tests of each file become this file's, for pytest too

if __name__ == "__main__":
    tests = {name: globals()[name] for name in runner.tests_of(globals())}
    sys.exit(runner.main([__file__], contents(), tests, sys.argv[1:], os.environ.pop("UNIFLOW_CLAIMS", None)))
