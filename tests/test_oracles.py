"""What the code computes, against tables of published facts, closed forms and numpy."""
from tests.helpers import (  # first: it sets the environment that torch reads when it is imported
    HERE, MICRO_DECODER, MICRO_RUN, MICRO_VIT, QuickInception, close, evaluate, faulty_training, log_lines,
    micro_models, micro_teacher, picture, picture_folder, pixels, raises, run_ranks, same_weights, sampled,
    tokenizer_file, train_quietly)

import glob
import inspect
import io
import itertools
import math
import os
import re
import tempfile
import types
import unittest.mock
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
import decoder
import distill
import encoder
import eval as evaluation
from tests import mutants
from tools import drawn
from tools.drawn import ProceduralDataset

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
INTERNVIT = dict(width=1024, depth=24, heads=16, mlp=4096, patch=14, grid=32, cls=1, bias=True, pre=False, last=False,
                 scale=True,
                 eps=1e-6, gelu_of_1=0.8413447, stats=IMAGENET)
# what the models' authors publish; ours, small and tiny, are ViT-S/8 and ViT-Ti/8 of Dosovitskiy and Touvron
PUBLISHED = {
    "internvit": INTERNVIT,
    "internvit-v2_5": INTERNVIT,
    "dinov2": dict(INTERNVIT, grid=37, last=True),
    "dinov2-reg": dict(INTERNVIT, grid=37, cls=5, last=True),  # CLS and four registers, which have no positions
    "siglip2": dict(INTERNVIT, width=1152, depth=27, mlp=4304, patch=16, grid=16, cls=0, last=True, scale=False,
                    gelu_of_1=0.8411920, stats=HALF),
    "siglip2-l": dict(INTERNVIT, patch=16, grid=16, cls=0, last=True, scale=False, gelu_of_1=0.8411920, stats=HALF),
    "clip": dict(INTERNVIT, grid=16, bias=False, pre=True, last=True, scale=False, eps=1e-5, gelu_of_1=0.8457958,
                 stats=OPENAI),
    "small": dict(INTERNVIT, width=384, depth=12, heads=6, mlp=1536, patch=8, grid=8, last=True, scale=False),
    "tiny": dict(INTERNVIT, width=192, depth=12, heads=3, mlp=768, patch=8, grid=8, last=True, scale=False),
}


def test_architectures_are_the_published_ones():
    """A table of TEACHERS.md's facts, read off the assembled modules. gelu_of_1: x Phi(x), its tanh form, x
    sigmoid(1.702 x)."""
    assert PUBLISHED.keys() == encoder.TEACHERS.keys()
    for name, facts in PUBLISHED.items():
        with torch.device("meta"):
            vit = encoder.ViT(encoder.TEACHERS[name])
        block, norms = vit.blocks[0], [m for m in vit.modules() if isinstance(m, nn.LayerNorm)]
        found = dict(width=vit.pos_embed.shape[2], depth=len(vit.blocks), heads=block.heads, mlp=block.fc1.out_features,
                     patch=vit.patch_embed.kernel_size[0], grid=math.isqrt(vit.pos_embed.shape[1]), cls=vit.num_prefix,
                     bias=vit.patch_embed.bias is not None, pre=isinstance(vit.norm_pre, nn.LayerNorm),
                     last=isinstance(vit.norm, nn.LayerNorm), scale=block.scale1 is not None, eps=norms[0].eps)
        assert {k: found[k] for k in found} == {k: facts[k] for k in found}, (name, found)
        assert all(m.eps == facts["eps"]
                   for m in norms) and vit.pos_embed.shape[1] == facts["grid"] ** 2 + min(facts["cls"], 1), name
        assert vit.patch_embed.stride[0] == facts["patch"], name
        small = encoder.ViT(replace(encoder.TEACHERS[name], width=24, depth=1, heads=2, mlp_width=8,
                                    size=facts["patch"]))
        mlp = small.blocks[0]
        for p, value in (mlp.fc1.weight, 0), (mlp.fc1.bias, 1), (mlp.fc2.weight, 1 / 8), (mlp.fc2.bias, 0):
            p.data.fill_(value)
        assert abs(mlp.mlp(torch.zeros(1, 1, 24))[0, 0, 0] - facts["gelu_of_1"]) < 3e-7, f"activation of {name}"
        for buffer, values in (small.mean, facts["stats"][0]), (small.std, facts["stats"][1]):
            assert torch.equal(buffer.flatten(), torch.tensor(values)), name
    c = decoder.DecoderConfig()  # the authors' released decoder
    assert (c.latent_dim, c.width, c.heads, c.gtb_depth, c.flow_depth, c.flow_width, c.patch, c.grid, c.projector,
            c.objective) == (
        64, 1024, 16, 6, 12, 1024, 14, 32, "mlp", "flow")
    for stats, values in ("imagenet", IMAGENET), ("half", HALF), ("openai", OPENAI):
        dec = decoder.Decoder(replace(MICRO_DECODER, pixel_stats=stats))
        assert torch.equal(dec.mean.flatten(),
                           torch.tensor(values[0])) and torch.equal(dec.std.flatten(), torch.tensor(values[1]))
    assert (asdict(dec.config), c.pixel_stats) == ({**asdict(MICRO_DECODER), "pixel_stats": "openai"}, "imagenet")


def test_training_builds_the_decoder_of_its_teacher():
    """Heads and pixel statistics of the decoder are its teacher's, whatever DecoderConfig's defaults."""
    vit = replace(MICRO_VIT, heads=4, pixel_stats="half", num_prefix=0, size=20)
    with tempfile.TemporaryDirectory() as tmp:
        path, out = os.path.join(tmp, "half.safetensors"), os.path.join(tmp, "out")
        torch.manual_seed(1)
        encoder.write_model(path, {"vit": asdict(vit)}, encoder.ViT(vit).state_dict())
        train_quietly("--teacher", path, "--steps", 1, "--size", 16, "--out", out)
        config = encoder.read_config(os.path.join(out, "model.safetensors"))
    expected = dict(latent_dim=8, width=32, heads=4, gtb_depth=1, flow_depth=2, flow_width=96, patch=4, grid=4,
                    projector="mlp",
                    objective="flow", pixel_stats="half")
    assert config["decoder"] == expected and config["vit"] == asdict(vit) and config["size"] == 16, config


def test_position_tables():
    """Row-major; the first half of the channels encodes the row, the second the column, each cosines before sines of
    frequencies 10000^(-k/q). At 2 x 6 patches, and at the grid's own size, `condition` of a zero latent shows the
    tables themselves."""
    g, width = 4, 32
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    table = np.array([np.concatenate([f(place * frequencies) for place in (row, column) for f in (np.cos, np.sin)])
                      for row in range(g) for column in range(g)])
    close(decoder.position_grid(g, width)[0].double(), torch.tensor(table), 1e-6)
    dec = decoder.Decoder(replace(MICRO_DECODER, gtb_depth=0, projector="linear"))
    assert torch.equal(dec.pos_embed, dec.head_pos_embed)
    dec.pos_embed.data = torch.randn(1, 16, 32)
    dec.head_pos_embed.data = torch.randn(1, 16, 32)
    sum_of_tables = (dec.pos_embed + dec.head_pos_embed).detach()[0]
    close(dec.condition(torch.zeros(1, 8, 4, 4))[0], sum_of_tables, 1e-6)
    # rows and columns resized one after the other, by PyTorch's 2-D kernel
    grid = sum_of_tables.view(4, 4, 32).permute(2, 0, 1)
    wide = F.interpolate(F.interpolate(grid[None], (2, 4), mode="bicubic"), (2, 6), mode="bicubic")[0]
    close(dec.condition(torch.zeros(1, 8, 2, 6))[0], wide.flatten(1).T, 1e-5)
    z = torch.zeros(1, 8, 2, 6)
    z[0, :, 1, 4] = 1  # row 1, column 4: token 10
    moved = (dec.condition(z) - dec.condition(torch.zeros_like(z)))[0].abs().sum(1)
    assert moved[10] > 1e-3 and (moved > 1e-6).sum() == 1


def test_positions_are_resized_in_fp32():
    pos = torch.randn(1, 64, 5).bfloat16()
    for module in encoder, decoder:
        found = module.resize_grid(pos, 12, 7)
        assert found.dtype == torch.bfloat16 and torch.equal(found, module.resize_grid(pos.float(), 12, 7).bfloat16())


def test_small_activations_show_every_epsilon():
    """GTB and flow head against their formulas on tokens of deviation 3e-3, where an epsilon of 1e-6 and one of 1e-5
    differ."""
    _, _, dec = micro_models()

    def norm(x, eps, m=None):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return y if m is None else y * m.weight + m.bias
    x, block = 3e-3 * torch.randn(2, 6, 32), dec.blocks[0]
    q, k, v = block.qkv(norm(x, 1e-5, block.norm1)).view(2, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
    # 4: the root of 16 channels a head
    y = (torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v).transpose(1, 2).flatten(2)
    y = x + block.proj(y)
    h = block.fc1(norm(y, 1e-5, block.norm2))
    close(block(x), y + block.fc2(h * 0.5 * torch.erfc(-h / 2 ** 0.5)), 1e-5)
    head = dec.head
    head.input_proj.weight.data *= 0.01
    head.input_proj.bias.data *= 0.01
    x_t, t, c = torch.randn(2, 6, 48), torch.rand(2, 6), torch.randn(2, 6, 32)
    angles = 1000 * (1 - t)[..., None] * 10000 ** (-torch.arange(128) / 128)
    time = head.time_fc2(F.silu(head.time_fc1(torch.cat([angles.cos(), angles.sin()], -1))))
    y = F.silu(time + head.cond_proj(c))
    x = head.input_proj(x_t)
    for b in head.blocks:
        shift, scale, gate = b.modulation(y).chunk(3, -1)
        gate, b.fc2.weight.data, b.fc2.bias.data = 1e-3 * gate, b.fc2.weight.data, b.fc2.bias.data
        b.modulation.weight.data[192:] *= 1e-3  # so that x stays small to the end
        b.modulation.bias.data[192:] *= 1e-3
        x = x + gate * b.fc2(F.silu(b.fc1(norm(x, 1e-6, b.norm) * (1 + scale) + shift)))
    shift, scale = head.final_modulation(y).chunk(2, -1)
    close(dec.velocity(x_t, t, c), -head.output(norm(x, 1e-6) * (1 + scale) + shift), 1e-4)


def test_published_files_and_where_they_are_looked_for():
    """Names of TEACHERS.md; of two snapshots in Hugging Face's cache, the newest, wherever the environment says that
    the cache is."""
    repositories = {"internvit": "OpenGVLab/InternViT-300M-448px",
                    "internvit-v2_5": "OpenGVLab/InternViT-300M-448px-V2_5",
                    "dinov2": "facebook/dinov2-large", "dinov2-reg": "facebook/dinov2-with-registers-large",
                    "siglip2": "timm/vit_so400m_patch16_siglip_256.v2_webli",
                    "siglip2-l": "timm/vit_large_patch16_siglip_256.v2_webli",
                    "clip": "timm/vit_large_patch14_clip_224.dfn2b",
                    "uniflow-internvit": "yuezhengrong/UniFlow"}
    assert encoder.PUBLISHED == {name: f"{repository}/model.safetensors" for name, repository in repositories.items()}
    with tempfile.TemporaryDirectory() as tmp:
        for i, (variable, below) in enumerate((("HF_HUB_CACHE", ""), ("HF_HOME", "hub"),
                                               ("XDG_CACHE_HOME", "huggingface/hub"))):
            paths = [os.path.join(tmp, str(i), below, "models--facebook--dinov2-large", "snapshots", x,
                                  "model.safetensors") for x in "abc"]
            for path, age in zip(paths, (3, 1, 2)):
                os.makedirs(os.path.dirname(path))
                open(path, "w").close()
                os.utime(path, (10 ** 9 - age,) * 2)
            clear = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")}
            with unittest.mock.patch.dict(os.environ, {**clear, variable: os.path.join(tmp, str(i))}, clear=True):
                assert encoder.fetch("dinov2", True) == paths[1], variable


def test_initial_weights_and_modes():
    """ViT: linear weights of deviation 0.02, biases 0. Decoder: Xavier's uniform bound. Whatever comes from a file is
    in eval mode."""
    torch.manual_seed(0)
    vit, dec = encoder.ViT(replace(MICRO_VIT, width=128)), decoder.Decoder(replace(MICRO_DECODER, width=128))
    for m in (vit.blocks[0].qkv, vit.blocks[2].fc2):
        assert abs(m.weight.std() / 0.02 - 1) < 0.05 and not m.bias.any()
    assert abs(vit.pos_embed.std() / 0.02 - 1) < 0.1
    for m in (dec.blocks[0].qkv, dec.head.blocks[0].fc1, dec.latent_up[0]):
        bound = (6 / sum(m.weight.shape)) ** 0.5
        assert 0.97 * bound < m.weight.abs().max() <= bound and abs(m.weight.std() / bound * 3 ** 0.5 - 1) < 0.05
        assert not m.bias.any()
    with tempfile.TemporaryDirectory() as tmp:
        path = tokenizer_file(tmp)
        encoder.write_model(path, {**encoder.read_config(path), "size": 24}, load_file(path))
        enc = encoder.Encoder.from_pretrained(path)
        assert enc.size == 24, "pixels that it was trained at"
        for module in (enc, decoder.Decoder.from_pretrained(path),
                       encoder.load_teacher(os.path.join(tmp, "teacher.safetensors"))):
            assert not any(m.training for m in module.modules())


def test_writes_are_on_disk_before_they_get_their_name():
    calls, names, fsync, replace_ = [], [], os.fsync, os.replace
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "x")
        with unittest.mock.patch.object(os, "fsync", lambda fd: calls.append(("sync", os.fstat(fd).st_size))
                                        or fsync(fd)), \
                unittest.mock.patch.object(os, "replace", lambda a,
                                           b: calls.append(("name", os.path.getsize(a))) or names.append(a)
                                           or replace_(a, b)):
            encoder.write_atomically(path, lambda f: f.write(b"12345"))
        assert calls == [("sync", 5), ("name", 5)] and open(path,
                                                            "rb").read() == b"12345" and os.listdir(tmp) == ["x"], calls
        # beside it, where a rename is one act, by a name that a later run knows for a leftover
        assert re.fullmatch(re.escape(tmp) + r"/\.[0-9a-f]{12}\.tmp", names[0]), names


def test_stochastic_depth_draws_two_masks():
    """At drop_path 0.6 the branches of blocks 1, 2, 3 are dropped with probability 0, 0.3, 0.6, each by itself, in
    every image by itself, and count 1 / (1 - rate) where they are kept: outputs are one of four, as often as that
    says."""
    _, enc, _ = micro_models()
    vit, n = enc.vit.train(), 1500
    vit.drop_path = 0.6
    torch.manual_seed(0)
    with torch.no_grad():
        hidden = vit(torch.rand(1, 3, 8, 8).repeat(n, 1, 1, 1))
        assert (hidden[0] - hidden[0][:1]).abs().max() < 1e-5, "the first block drops nothing"
        for l, rate in (1, 0.3), (2, 0.6):
            block, x, found = vit.blocks[l], hidden[l - 1], {}
            for first, second in itertools.product((0, 1), (0, 1)):
                y = x + first / (1 - rate) * block.attention(block.norm1(x))
                y = y + second / (1 - rate) * block.mlp(block.norm2(y))
                found[first, second] = ((y - hidden[l]).abs().amax((1, 2)) < 1e-3).float().mean().item()
            for (first, second), share in found.items():
                chance = (1 - rate if first else rate) * (1 - rate if second else rate)
                assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / n), (l, first, second, share, chance)
        one, img = encoder.ViT(replace(MICRO_VIT, depth=1)).train(), torch.rand(2, 3, 8, 8)
        one.drop_path = 0.9
        assert torch.equal(one(img)[0], one.eval()(img)[0]), "nor does the first of one"


def test_distillation_defaults_and_gradients():
    """Of two layers, at angles of 60 and 90 degrees: alpha 1/2 and 1, w by hand for beta 2, and a loss that is their
    sum."""
    teacher = [torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])]
    student = [torch.tensor([[[1.0, 3 ** 0.5]]]), torch.tensor([[[5.0, 0.0]]])]
    e1, e2 = 0.5 * math.exp(1), math.exp(2)
    w = np.array([e1, e2]) / (e1 + e2)
    loss, weights, alpha = distill.distill_loss(student, teacher)
    assert np.allclose(alpha, [0.5, 1], atol=1e-6) and np.allclose(weights, w,
                                                                   atol=1e-6) and abs(loss - w @ [0.5, 1]) < 1e-6
    assert np.allclose(distill.layer_weights(torch.tensor([0.5, 1.0])), w, atol=1e-6)
    assert not distill.layer_weights(torch.tensor([0.5, 1.0], requires_grad=True)).requires_grad
    swapped = lambda student, teacher: distill.layer_distances(student, teacher).flip(0)
    loss, _, alpha = distill.distill_loss(student, teacher, 0.0, measure=swapped)  # weights 1/3 and 2/3
    assert np.allclose(alpha, [1, 0.5], atol=1e-6) and abs(loss - 2 / 3) < 1e-6, "by the measure that is given"
    wide = [torch.tensor([[[1.0, 1e-3],
                           [9.0, 9.0]]]).bfloat16()], [torch.tensor([[[1.0, 0.0], [9.0, -9.0]]]).bfloat16()]
    found = distill.layer_distances(*wide)
    assert found.dtype == torch.float32 and abs(found.item() - 0.5) < 1e-5, "in fp32, the mean over tokens"


# ---- geometry of crops ----

def test_random_crops_reach_every_offset():
    """A 12 x 10 picture shrunk to a shorter side of 8: 3 x 1 offsets; drawn at its own size 10 x 10 in 8 x 8: all 9,
    each mirrored or not."""
    y, x = np.mgrid[:10, :10]
    ramps = Image.fromarray(np.stack([20 * x, 20 * y, 0 * x], -1).astype(np.uint8))
    rng = np.random.default_rng(0)
    with unittest.mock.patch.object(data, "shrink", lambda img, short: img):  # so that pixels tell where they were
        crops = [np.array(data.random_crop(ramps, 8, rng)).astype(int) for _ in range(400)]
    corners = {(min(c[0, 0, 0], c[0, -1, 0]) // 20, c[0, 0, 1] // 20, c[0, 0, 0] > c[0, -1, 0]) for c in crops}
    assert corners == set(itertools.product((0, 1, 2), (0, 1, 2), (False, True))), sorted(corners)
    seen = []
    with unittest.mock.patch.object(data, "shrink", lambda img,
                                    short: seen.append(short) or img.resize((short, short))):
        for _ in range(300):
            data.random_crop(ramps, 8, rng, (0.5, 0.8))
    assert set(seen) == set(range(10, 17)), "8 / 0.8 to 8 / 0.5, both ends drawn"


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x ** 2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def resize(x, height, width, kernel):
    """x (H, W) resized as PIL does: the kernel, widened where it shrinks, over columns, then over rows, rounded after
    each."""
    for n in (width, height):
        scale = x.shape[1] / n
        w = kernel(((np.arange(x.shape[1]) + 0.5)[None] - ((np.arange(n) + 0.5) * scale)[:, None]) / max(scale, 1))
        x = (x @ (w / w.sum(1, keepdims=True)).T).clip(0, 255).round().T
    return x


def test_shrink_is_box_halving_then_bicubic():
    for width, height, short in ((60, 50, 24), (50, 61, 40), (100, 90, 20), (30, 40, 45), (48, 60, 24)):
        x = np.random.default_rng(0).integers(0, 256, (height, width))
        got = np.array(data.shrink(Image.fromarray(x.astype(np.uint8)), short)).astype(int)
        while min(x.shape) >= 2 * short:
            x = resize(x, x.shape[0] // 2, x.shape[1] // 2, box)
        size = [round(s * short / min(x.shape)) for s in x.shape]
        expected = resize(x, *size, cubic)
        error = np.abs(got - expected).max()
        assert got.shape == tuple(size) and error <= 3, (width, height, short, error)


def test_center_crop_of_a_photograph_by_numpy():
    # 50 * 24 / 33 = 36.4; of an odd rest, 13, the smaller half is on the left
    for width, wide, left in (50, 36, 6), (51, 37, 6):
        x = np.random.default_rng(0).integers(0, 256, (33, width))
        whole = resize(x, 24, wide, cubic)
        for y, expected in (x, whole[:, left:left + 24]), (x.T, resize(x.T, wide, 24, cubic)[left:left + 24]):
            got = np.array(data.center_crop(Image.fromarray(y.astype(np.uint8)), 24)).astype(int)
            assert np.abs(got - expected).max() <= 2
        assert np.abs(whole[:, left:left + 24] - whole[:, left + 1:left
                                                       + 25]).max() > 20, "one column further would show"


def test_a_jpeg_is_decoded_no_smaller_than_its_crop_needs():
    """Fine stripes and --crop_scale 0.25 to 1: a crop of a quarter needs four times the pixels; decoded smaller, the
    stripes are gone."""
    x = np.where(np.arange(512) // 4 % 2, 220, 30).astype(np.uint8)
    img = Image.fromarray(np.repeat(np.tile(x, (512, 1))[..., None], 3, -1))
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "x.jpg")
        img.save(path, quality=95)
        # of 256 pixels: stripes of two
        crop = data.ImageDataset(tmp, 64, train=True, crop_scale=(0.25, 0.25))[0][0].float()
        assert crop.std() > 60, f"stripes of 30 and 220 came with a deviation of {crop.std():.0f}"
        read = data.ImageDataset(tmp, 64, train=True, crop_scale=(0.25, 1.0))
        for n in range(4):  # twice 64 / 0.25 are all of its pixels
            whole = data.random_crop(Image.open(path), 64, np.random.default_rng([0, n, 1]), (0.25, 1.0))
            assert np.array_equal(read[n][0].permute(1, 2, 0).numpy(),
                                  np.array(whole)), "as from a picture decoded whole"
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 640, 3), dtype=np.uint8))
        noise.save(path, quality=95)  # an evaluation decodes all of it: 1/2 would be grey levels off
        assert np.array_equal(data.ImageDataset(tmp, 64, train=False)[0][0].permute(1, 2, 0).numpy(),
                              np.array(data.center_crop(Image.open(path), 64)))
    for short, side in ((256, 512), (128, 256), (129, 512), (64, 128), (20, 64)):
        f = io.BytesIO()
        img.save(f, "JPEG")
        assert data.load_image(f, short).size == (side,
                                                  side), "the smallest of 1, 1/2, 1/4, 1/8 that has twice the pixels"


def test_every_extension_is_found():
    names = [f"{i}{ext}" for i,
             ext in enumerate(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .JPG .Png".split())]
    with tempfile.TemporaryDirectory() as tmp:
        for name in [*names, "a.txt", "b.npz", "c"]:
            open(os.path.join(tmp, name), "w").close()
        read = data.ImageDataset(tmp, 16, train=False)
        assert [os.path.basename(read.path(i)) for i in range(len(read))] == sorted(names)
        os.makedirs(os.path.join(tmp, "d"))
        raises(data.UserError, data.ImageDataset, os.path.join(tmp, "d"), 16, False,
               words=f"{tmp}/d holds no images (.jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif)")


def test_augmentation_is_a_function_of_the_number():
    """Sample n and n + len(data), the same picture of another epoch, are cropped by other draws."""
    with tempfile.TemporaryDirectory() as tmp:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3),
                                                          np.uint8)).save(os.path.join(tmp, "x.png"))
        one = data.ImageDataset(tmp, 16, train=True, seed=3, crop_scale=(0.4, 1.0))
        crops = [one[n][0] for n in range(8)]
        assert all(not torch.equal(a, b) for a,
                   b in itertools.combinations(crops, 2)), "each number has a crop of its own"
        assert torch.equal(one[5][0], crops[5])
        other = data.ImageDataset(tmp, 16, train=True, seed=4, crop_scale=(0.4, 1.0))
        assert all(not torch.equal(other[n][0], crops[n]) for n in range(8)), "the seed is in every draw"


def test_the_order_of_an_epoch_is_the_seeds():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        orders = {(seed, epoch): [data.ImageDataset(folder, 16, train=True, seed=seed).index(10 * epoch + k)
                                  for k in range(10)]
                  for seed in (3, 4) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(10))
               for order in orders.values()) and len(set(map(tuple, orders.values()))) == 4
    for (seed, epoch), order in orders.items():  # whatever the version, so that an old run goes on with its own
        assert order == np.random.default_rng([seed, epoch]).permutation(10).tolist()


def test_drawn_pictures_are_the_seeds():
    read = ProceduralDataset(16, train=True, seed=3)
    assert not torch.equal(read[0][0], ProceduralDataset(16, train=True, seed=4)[0][0])
    for train in True, False:  # in every version, so that figures on drawn pictures can be compared
        rng = np.random.default_rng([3, 7, int(train)])
        img, label = ProceduralDataset(16, train, 3)[7]
        kind = int(rng.integers(4))
        assert label == kind and torch.equal(img, data.to_tensor(drawn.draw(rng, read.classes[kind], 16)))
    assert len(list(itertools.islice(ProceduralDataset(8, train=False, length=3), 5))) == 3, "iterating must end"


# ---- eval.py ----

def test_the_probe_is_fitted_on_fit_alone():
    """Two Gaussians, means 10 apart and of deviation 5, whose best classifier is right in Phi(1) = 84.13%."""
    random = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (8000,), generator=random)
    x = torch.randn(8000, 4, generator=random) * 5
    x[:, 3] += 10 * y + 100
    test_x = torch.randn(4000, 4, generator=random) * 5
    test_x[:, 3] += 110
    accuracy, _ = evaluation.linear_probe(x, y, test_x, torch.ones(4000, dtype=torch.long), epochs=10)
    assert abs(accuracy - 84.13) < 3, f"{accuracy}: all are of class 1; by their own mean, half would be of class 0"
    far, right = 1000 * test_x, []  # a test set that has strange pictures, too: every picture is judged by itself
    for part in test_x, far, torch.cat([test_x, far]):
        right.append(len(part) * evaluation.linear_probe(x, y, part, torch.ones(len(part)).long(), epochs=10)[0])
    assert abs(right[0] + right[1] - right[2]) < 1e-6, right
    for labels, expected in ((torch.ones(4000).long(), 84.13), (torch.zeros(4000).long(), 15.87)):
        accuracy, rate = evaluation.linear_probe(x, y, test_x, labels, epochs=10, rates=(0.0, 0.1))
        assert rate == 0.1 and abs(accuracy - expected) < 3, "the rate is --fit's choice, though bad for the test set"
    # 400 dimensions and 300 pictures: SGD learns labels that mean nothing by heart; rate 0 says class 0, which 80% are
    x = torch.randn(300, 400, generator=random)
    y = (torch.rand(300, generator=random) < 0.2).long()
    assert evaluation.linear_probe(x, y, x[:100], y[:100], epochs=20, batch=64,
                                   rates=(0.0, 0.1))[1] == 0.0, "chosen on pictures kept back"


def test_the_probe_is_sgd_with_momentum_and_a_cosine_schedule():
    """Another implementation, by torch.optim and autograd, on the same draws, predicts the same classes."""
    random = torch.Generator().manual_seed(1)
    y, test_y = torch.randint(0, 5, (600,), generator=random), torch.randint(0, 5, (2000,), generator=random)
    centres = torch.randn(5, 12, generator=random)
    x, test_x = (3 + (1 + torch.arange(12)) * (centres[c] + 1.5 * torch.randn(len(c), 12, generator=random))
                 for c in (y, test_y))
    draws = torch.Generator().manual_seed(4)
    kept = torch.randperm(600, generator=draws)[60:]
    mean, std = x.mean(0), x.std(0)
    model = nn.Linear(12, 5)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 6)
    for _ in range(3):
        for i in kept[torch.randperm(540, generator=draws)].split(100):
            optimizer.zero_grad()
            F.cross_entropy(model((x[i] - mean) / std), y[i]).backward()
            optimizer.step(), schedule.step()
    expected = 100 * (model((test_x - mean) / std).argmax(1) == test_y).double().mean().item()
    found = evaluation.linear_probe(x, y, test_x, test_y, 4, epochs=3, batch=100, rates=(0.03,))
    assert found == (expected, 0.03) and 30 < expected < 90, (found, expected)
    small = evaluation.linear_probe(1e-3 * x, y, 1e-3 * test_x, test_y, 4, epochs=3, batch=100, rates=(0.03,))
    assert abs(small[0] - expected) < 0.3, "features of any scale"
    constant = [F.pad(part, (0, 1), value=7.0) for part in (x, test_x)]  # tells nothing, and divides nothing by 0
    assert evaluation.linear_probe(constant[0], y, constant[1], test_y, 4, epochs=3, batch=100, rates=(0.03,)) == found
    raises(ValueError, evaluation.linear_probe, x[:9], y[:9], test_x, test_y, words="x has 9 rows")
    assert evaluation.linear_probe(x[:10], y[:10], test_x, test_y, epochs=1)[0] > 0
    defaults = {name: p.default for name, p in inspect.signature(evaluation.linear_probe).parameters.items()}
    assert (defaults["epochs"], defaults["batch"], defaults["rates"]) == (40, 1024,
                                                                          (0.001, 0.003, 0.01, 0.03, 0.1,
                                                                           0.3)), "as the protocol says"


def test_votes_of_the_nearest_neighbours():
    def accuracy(cosines, labels, **how):  # of one picture of class 1, whose neighbours have these cosines
        c = torch.tensor(cosines, dtype=torch.float64)
        x = torch.stack([c, (1 - c * c).sqrt()], 1).float()
        return evaluation.nearest_neighbours(x, torch.tensor(labels), torch.tensor([[2.0, 0.0]]),
                                             torch.tensor([1]), **how)
    near = 0.07 * math.log(3)  # one neighbour at cosine 1 is worth three at cosine 1 - near
    assert accuracy([1.0] + [1 - 1.05 * near] * 3, [1, 0, 0, 0]) == 100
    assert accuracy([1.0] + [1 - 0.95 * near] * 3, [1, 0, 0, 0]) == 0
    assert accuracy([0.9] * 6 + [0.899] * 14, [0] * 6 + [1] * 14) == 100, "ten would say 0"
    weights = [(1.005, 1)] * 9 + [(1.0, 0)] * 10 + [(0.99, 1)] + [(0.98, 0)]
    cosines = [0.9 + 0.07 * math.log(w) for w, _ in weights]
    assert accuracy(cosines,
                    [y for _, y in weights]) == 100, "20 vote: 9 x 1.005 + 0.99 against 10; 19 or 21 would say 0"
    assert accuracy(cosines, [y for _, y in weights], k=19) == accuracy(cosines, [y for _, y in weights], k=21) == 0


def class_folder(root, classes, n, offset=0):
    """Pictures of one colour each, red, green and blue classes, with some noise: root/class/i.png."""
    rng = np.random.default_rng(offset)
    for name in classes:
        os.makedirs(os.path.join(root, name))
        for i in range(n):
            x = np.array({"a": (200, 60, 60), "b": (60, 200, 60),
                          "c": (60, 60, 200)}[name]) + rng.integers(-40, 41, (16, 16, 3))
            Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(os.path.join(root, name, f"{i}.png"))
    return root


def test_the_probe_sees_the_right_tokens_and_labels():
    """What linear_probe and k-NN are handed, against tokens by hand; --data lacks the first class of --fit, so that
    numbers differ."""
    handed, rates = [], []
    knn, linear = evaluation.nearest_neighbours, evaluation.linear_probe

    def spy(x, y, test_x, test_y, *rest):
        assert not x.requires_grad and not test_x.requires_grad, "or the graphs of all batches stay in memory"
        handed.append((x.clone(), y.clone(), test_x.clone(), test_y.clone()))
        return knn(x, y, test_x, test_y, *rest)

    def spy_linear(x, y, test_x, test_y, *rest, **how):
        rates.append((x.clone(), linear(x, y, test_x, test_y, *rest, **how), rest))
        return rates[-1][1]
    with tempfile.TemporaryDirectory() as tmp:
        weights = tokenizer_file(tmp)
        fit = class_folder(os.path.join(tmp, "fit"), "abc", 8)
        val = class_folder(os.path.join(tmp, "val"), "bc", 5, offset=9)
        with unittest.mock.patch.multiple(evaluation, nearest_neighbours=spy, linear_probe=spy_linear):
            _, report = evaluate("--data", val, "--fit", fit, "--weights", weights, "--inception", "none", "--probe",
                                    "--batch_size", 4, "--seed", 6)
        enc = encoder.Encoder.from_pretrained(weights)
        teacher = encoder.load_teacher(os.path.join(tmp, "teacher.safetensors"))
        images = [torch.stack([torch.tensor(np.array(Image.open(p))).permute(2, 0, 1)
                               for p in sorted(glob.glob(os.path.join(root, "*", "*.png")))]) / 255
                  for root in (fit, val)]
        both = []  # for --fit and --data
        for img in images:
            with torch.no_grad():
                z, student = enc(img)
                hidden = {"student": (enc.vit, student), "teacher": (teacher, teacher(img))}
            tokens = {("latent", "student"): z.mean((2, 3))}
            for who, (vit, h) in hidden.items():
                tokens["last layer", who] = vit.norm(h[-1])[:, 1:].mean(1).detach()
                tokens["second to last", who] = h[-2][:, 1:].mean(1)
            both.append(tokens)
            cosines = [F.cosine_similarity(s[:, 1:], t[:, 1:], dim=2).mean().item() for s,
                       t in zip(student, hidden["teacher"][1])]
    assert np.allclose(report["cosine_to_teacher"], cosines, atol=1e-5), "of --data, which comes last here"
    assert len(handed) == len(both[0]) == 5
    for name in both[0]:
        matching = [h for h in handed if h[0].shape == both[0][name].shape
                    and torch.allclose(h[0], both[0][name], atol=1e-4)]
        assert len(matching) == 1, f"{name} is not what was handed to the probe"
        x, y, test_x, test_y = matching[0]
        close(test_x, both[1][name], 1e-4)
        labels = y.tolist(), test_y.tolist()
        assert labels == ([0] * 8 + [1] * 8 + [2] * 8, [1] * 5 + [2] * 5), "numbers of --fit's classes"
        said = report["probe"][name[0]][name[1]]
        figures = next((found, rest) for x2, found, rest in rates if torch.equal(x2, x))
        assert (said["linear"],
                said["learning_rate"]) == figures[0] and figures[1] == (6,), "--seed is the probe's, too"
        assert said["knn"] == knn(x, y, test_x, test_y)
    assert all(report["probe"]["last layer"][who]["knn"] > 80
               for who in ("student", "teacher")), "colours are easily told apart"


def test_pools_leave_out_registers_and_ranks_without_a_picture():
    """CLS and four registers come first; rank 0 has all three pictures, in another order, and rank 1 none. In fp32 and
    in bf16, whose numbers are compared in fp32."""
    torch.manual_seed(0)
    vit = replace(MICRO_VIT, num_prefix=5)
    teacher, enc, img = encoder.ViT(vit), encoder.Encoder(encoder.ViT(vit), 8), torch.rand(3, 3, 16, 16)
    for p in (*teacher.parameters(), *enc.parameters()):
        p.data = 0.2 * torch.randn_like(p)
    batches = [([2, 0], img[[2, 0]], torch.tensor([7, 5])), ([1], img[1:2], torch.tensor([6]))]
    for bf16 in False, True:
        job = types.SimpleNamespace(
            device="cpu", autocast=torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            images=lambda note, images: iter(batches),
            gather=lambda x, everywhere=True: [x, {} if isinstance(x, dict) else torch.zeros_like(x)])
        with torch.no_grad():
            found, labels, cosines = evaluation.pooled_features(job, enc, teacher, img, "note", compare=True)
            expected, alike = {}, []
            for n, x, _ in batches:
                with job.autocast:
                    z, student = enc(x)
                    theirs = teacher(x)
                    last = {who: v.norm(h[-1]) for who, v, h in (("student", enc.vit, student),
                                                                 ("teacher", teacher, theirs))}
                for k, i in enumerate(n):
                    expected[i] = {("latent", "student"): z[k].float().mean((1, 2)), **{
                        (layer, who): (last[who] if layer == "last layer" else h[-2])[k, 5:].float().mean(0)
                        for who, h in (("student", student), ("teacher", theirs))
                        for layer in ("last layer", "second to last")}}
                    alike.append([F.cosine_similarity(s[k, 5:].float(), t[k, 5:].float(), dim=1).mean().item()
                                  for s, t in zip(student, theirs)])
        assert labels.tolist() == [5, 6, 7] and found.keys() == expected[0].keys()
        for name, x in found.items():
            assert x.dtype == torch.float32
            close(x, torch.stack([expected[i][name] for i in range(3)]), 5e-3 if bf16 else 1e-5)
        assert np.allclose(cosines, np.mean(alike, axis=0), atol=1e-6), (cosines, alike)
    job.gather = lambda x, everywhere=True: [x] if everywhere else []  # rank 1
    with torch.no_grad():
        assert evaluation.pooled_features(job, enc, teacher, img, "note")[:2] == ({}, None)


def numpy_psnr(a, b):
    """PSNR of each pair of images in [0, 1], averaged."""
    return float(np.mean([-10 * np.log10(np.mean((x.astype(np.float64) - y) ** 2)) for x, y in zip(a, b)]))


def test_validation_sees_whole_networks():
    """During a run with stochastic depth an evaluation drops nothing, and the training after it drops again."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=7)
        out = os.path.join(tmp, "out")
        flags = ["--teacher", os.path.join(tmp, "teacher.safetensors"), "--data", folder, "--init", weights,
                 "--gtb_depth", 2,
                 "--drop_path", 0.9, "--lr", 1e-12, "--steps", 2, "--seed", 3, "--eval_every"]
        train_quietly(*flags, 1, "--out", out)
        training, judged = ([x for x in log_lines(out) if ("alpha" in x) == kind] for kind in (True, False))
        enc, dec = encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights)
        with torch.no_grad():
            img = torch.stack([x for x, _ in data.ImageDataset(folder, 16, train=False)]) / 255
            rec = dec.decode(enc.encode(img), noise=evaluation.image_noise(range(7), 16, 48, seed=3))
        expected = numpy_psnr(img.numpy(), (255 * rec).round().numpy() / 255)
        assert [abs(x["psnr"] - expected) < 1e-4 for x in judged] == [True, True], (judged, expected)
        train_quietly(*flags, 100, "--out", out + "2")
        assert training == [x for x in log_lines(out + "2")
                            if "alpha" in x], "an evaluation between two steps changes neither"
        assert abs(training[1]["alpha"][-1] - training[0]["alpha"][-1]) > 1e-3, "stochastic depth of 0.9 shows"


# ---- sample.py ----

def numpy_tokenizer(folder):
    """(a tokenizer file without attention, what it computes: picture (H, W, 3) and noise -> latent, picture) in numpy:
    latent = A(patch) + a, pixels = noise - v with v = -(B silu(D(latent) + d) + b): one linear map, one MLP."""
    vit = replace(MICRO_VIT, depth=1, final_norm=False, num_prefix=0)
    config = replace(MICRO_DECODER, projector="linear", gtb_depth=0, flow_depth=0)
    torch.manual_seed(2)
    enc, dec = encoder.Encoder(encoder.ViT(vit), 8, "linear"), decoder.Decoder(config)
    for p in (*enc.parameters(), *dec.parameters()):
        p.data.zero_()
    alive = [enc.vit.patch_embed.weight, enc.vit.patch_embed.bias, enc.latent_down.weight, enc.latent_down.bias,
             dec.latent_up.weight,
             dec.head.cond_proj.weight, dec.head.cond_proj.bias, dec.head.final_modulation.bias, dec.head.output.weight,
             dec.head.output.bias]
    for p in alive:
        p.data = 0.3 * torch.randn_like(p)
    dec.head.final_modulation.weight.data = 0.3 * torch.randn_like(dec.head.final_modulation.weight)
    mean, std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    path = os.path.join(folder, "numpy.safetensors")
    tensors = {f"{part}.{k}": v for part, module in (("encoder", enc), ("decoder", dec)) for k,
               v in module.state_dict().items()}
    encoder.write_model(path, {"vit": asdict(vit), "decoder": asdict(config), "size": 16},
                        {**tensors, "latent_mean": mean, "latent_std": std})
    w = {k: v.double().numpy() for k, v in tensors.items()}
    mean, std, pixel_mean, pixel_std = mean.numpy(), std.numpy(), *map(np.array, IMAGENET)

    def reference(picture, noise):
        h, w_ = (s // 4 for s in picture.shape[:2])
        x = (picture / 255 - pixel_mean) / pixel_std
        z, rec = np.zeros((8, h, w_)), np.zeros_like(x)
        for i, j in itertools.product(range(h), range(w_)):
            patch = x[4 * i:4 * i + 4, 4 * j:4 * j + 4].transpose(2, 0, 1)  # channel, row, column
            token = np.einsum("dcyx,cyx->d",
                              w["encoder.vit.patch_embed.weight"], patch) + w["encoder.vit.patch_embed.bias"]
            raw = w["encoder.latent_down.weight"] @ token + w["encoder.latent_down.bias"]
            z[:, i, j] = (raw - mean) / std
            y = w["decoder.head.cond_proj.weight"] @ w["decoder.latent_up.weight"] @ raw
            y = y + w["decoder.head.cond_proj.bias"]
            shift = (w["decoder.head.final_modulation.weight"] @ (y / (1 + np.exp(-y)))
                     + w["decoder.head.final_modulation.bias"])[:96]
            v = -(w["decoder.head.output.weight"] @ shift + w["decoder.head.output.bias"])
            rec[4 * i:4 * i + 4, 4 * j:4 * j + 4] = (noise[i * w_ + j] - v).reshape(3, 4, 4).transpose(1, 2, 0)
        return z, 255 * (rec * pixel_std + pixel_mean).clip(0, 1)
    return path, reference


def test_sample_against_numpy():
    """A picture of 23 x 13 and its latent: padded by its last row and column to 24 x 16, and cut again."""
    with tempfile.TemporaryDirectory() as tmp:
        (weights, reference), path = numpy_tokenizer(tmp), os.path.join(tmp, "x.png")
        original = np.array(picture(3, 23, 13)).astype(float)
        picture(3, 23, 13).save(path)
        z = os.path.join(tmp, "z.safetensors")
        # the velocity does not depend on x or t, so any number of steps gives the same
        for seed, steps in ((0, 1), (7, 3)):
            status, said, err = sampled(path, "--weights", weights, "--size", 0, "--seed", seed, "--steps", steps,
                                        "--save_latent", z)
            assert status == 0, err
            state = np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)  # noise of (seed, picture number 0)
            noise = torch.randn(24, 48, generator=torch.Generator().manual_seed(int(state[0]))).double().numpy()
            padded = original[np.minimum(np.arange(16), 12)][:, np.minimum(np.arange(24), 22)]
            latent, rec = reference(padded, noise)
            assert np.abs(load_file(z)["latent"][0].numpy() - latent).max() < 1e-4
            left, middle, right = np.split(pixels(os.path.join(tmp, "x_recon.png"))[0][0], 3, axis=1)
            rec = rec[:13, :23]
            assert (left == original).all() and np.abs(middle - rec).max() < 0.51, np.abs(middle - rec).max()
            assert (right == np.minimum(4 * np.abs(middle - original), 255)).all()
            quality = numpy_psnr([original / 255], [middle / 255])
            assert f"latent 8x4x6 | {23 * 13 * 3 / (8 * 24):.1f}x | PSNR {quality:.2f} dB | SSIM" in said, said
        status, said, err = sampled(path, "--weights", weights, "--size", 26)  # 46 x 26 before padding
        resized = np.array(picture(3, 23, 13).resize((46, 26), Image.Resampling.BICUBIC))
        assert (pixels(os.path.join(tmp, "x_recon.png"))[0][0][:, :46] == resized).all()


# ---- what a run leaves and a resume restores ----

class Killed(BaseException):
    """Instead of kill -9, at a place that the test chooses."""


def test_a_kill_between_any_two_writes_changes_nothing():
    """Every os.replace of a run, one after the other, is its last act, or the one that it does not come to; begun
    again, the run leaves the same log, models and pictures as one that was never killed."""
    replace_, count, stop = os.replace, itertools.count(), (None, None)

    def counted(a, b, **how):
        k = next(count)
        if stop == (k, "before"):
            raise Killed
        replace_(a, b, **how)
        if stop == (k, "after"):
            raise Killed
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(os, "replace", counted):
        flags = ["--teacher", micro_teacher(tmp), "--data", picture_folder(tmp, n=5)[0], "--steps", 2, "--save_every",
                 1, "--eval_every", 2,
                 "--keep_every", 2, "--log_every", 2, "--size", 8, "--out"]
        count = itertools.count()
        whole = os.path.join(tmp, "whole")
        train_quietly(*flags, whole)
        total = next(count)
        assert total == 6, "checkpoint and model twice, a picture, and a model that is kept"
        files = sorted(os.path.relpath(os.path.join(d, f), whole) for d, _, names in os.walk(whole) for f in names)
        # after k is before k + 1, but for the last
        for k, when in [(k, "before") for k in range(total)] + [(total - 1, "after")]:
            out, count, stop = os.path.join(tmp, f"{k}{when}"), itertools.count(), (k, when)
            try:
                train_quietly(*flags, out)
                raise AssertionError(f"write {k} never came")
            except Killed:
                stop = None, None
            for leftover in glob.glob(os.path.join(out, "**", "*.tmp*"), recursive=True):
                os.remove(leftover)
            train_quietly(*flags, out)
            found = sorted(os.path.relpath(os.path.join(d, f), out) for d, _,
                           names in os.walk(out) for f in names if not f.endswith(".old"))
            assert found == files, (k, when, set(found) ^ set(files))
            assert log_lines(out) == log_lines(whole), (k, when)
            for name in files:
                if name.endswith(".safetensors"):
                    assert same_weights(os.path.join(out, name), os.path.join(whole, name)), (k, when, name)
            state = torch.load(os.path.join(out, "state.pt"), weights_only=True)
            said = encoder.read_config(os.path.join(out, "model.safetensors"))
            assert (said["id"], said["step"]) == (state["id"], state["step"]), (k, when)


def faulty_loss(bad_calls):
    """Decoder.forward whose calls with these numbers give infinity."""
    plain, calls = decoder.Decoder.forward, itertools.count(1)

    def forward(self, z, *args, **kw):  # on `meta`, FLOPs are counted
        return plain(self, z, *args, **kw) * (math.inf if z.device.type != "meta" and next(calls) in bad_calls else 1)
    return forward


def test_a_resume_restores_every_field():
    with tempfile.TemporaryDirectory() as tmp:
        teacher, (folder, _) = micro_teacher(tmp), picture_folder(tmp, n=10)
        state_of = lambda out: torch.load(os.path.join(out, "state.pt"), weights_only=True)
        read = data.ImageDataset(folder, 16, train=True)
        normalised = lambda n: ((read[n][0].numpy() / 255).transpose(1, 2, 0) - IMAGENET[0]) / IMAGENET[1]
        energy = lambda numbers: float(np.mean([normalised(n) ** 2 for n in numbers]))
        flags = ["--teacher", teacher, "--data", folder, "--decoder", "pixel", "--lr", 1e-12, "--eval_every",
                 100, "--out"]
        # samples: after two steps of 4 and one of 2 the next is number 10, whatever the step; id, step
        out = os.path.join(tmp, "samples")
        train_quietly(*flags, out, "--steps", 2)
        first = state_of(out)
        train_quietly(*flags, out, "--steps", 4, "--batch_size", 2, "--resume_anyway")
        lines, second = log_lines(out), state_of(out)
        # of an untrained decoder, whose output is 0, the loss is the energy of the pixels
        expected = [range(4), range(4, 8), (8, 9), (10, 11)]
        flow = [x["loss_flow"] for x in lines if "loss" in x]
        assert np.allclose(flow, [energy(n) for n in expected], rtol=1e-4), (flow, [energy(n) for n in expected])
        assert (first["samples"], second["samples"], first["step"], second["step"]) == (8, 12, 2, 4)
        assert first["id"] == second["id"] == encoder.read_config(os.path.join(out, "model.safetensors"))["id"]
        train_quietly(*flags, out, "--steps", 5, "--weight_decay", 0.3, "--beta1", 0.7, "--resume_anyway")
        groups = state_of(out)["optimizer"]["param_groups"]
        settings = {(g["weight_decay"], *g["betas"]) for g in groups}
        assert settings == {(0.0, 0.7, 0.95), (0.3, 0.7, 0.95)}, "settings are this command's, moments the checkpoint's"
        # faults: skipped steps are counted on, and those in a row, too
        out = os.path.join(tmp, "faults")
        with unittest.mock.patch.object(decoder.Decoder, "forward", faulty_loss({2, 4, 5, 6, 7, 8, 9})):
            train_quietly(*flags, out, "--steps", 9)
        assert [x["skipped"] for x in log_lines(out) if "loss" in x] == [0, 1, 1, 2, 3, 4, 5, 6, 7]
        with unittest.mock.patch.object(decoder.Decoder, "forward", faulty_loss(set(range(1, 30)))):
            # 4 to 13
            raises(ValueError, train_quietly, *flags, out, "--steps", 30, words=["step 13", "10 steps in a row"])
        out = os.path.join(tmp, "means")
        with unittest.mock.patch.object(decoder.Decoder, "forward", faulty_loss({2})):
            train_quietly(*flags, out, "--steps", 3, "--log_every", 3)
        line = log_lines(out)[0]
        expected = (energy(range(4)) + energy(range(8, 12))) / 2
        assert abs(line["loss_flow"] - expected) < 1e-4 and line["skipped"] == 1, "the mean of the steps that count"
        # sums: a line over three steps, of which two were before the interruption; moments of the optimizer
        lines = []
        for name, parts in ("whole", (3,)), ("parts", (2, 3)):
            out = os.path.join(tmp, name)
            for steps in parts:
                train_quietly("--teacher", teacher, "--data", folder, "--log_every", 3, "--eval_every", 100, "--out",
                              out, "--steps", steps, "--lr", 1e-2)
            lines.append([x for x in log_lines(out) if x["step"] == 3])
        assert lines[0] == lines[1] and same_weights(*(os.path.join(tmp, n, "model.safetensors")
                                                       for n in ("whole", "parts")))
        # bad: what was found before the interruption stays in the list, and counts
        for n in (3, 8):
            open(os.path.join(folder, f"class{n % 2}", f"{n}.png"), "wb").write(b"no picture")
        order = [read.index(n) for n in range(10)]
        names = [os.path.basename(read.path(i)) for i in order]
        at = sorted(names.index(n) for n in ("3.png", "8.png"))  # sample numbers of the bad ones
        out = os.path.join(tmp, "bad")
        flags = ["--teacher", teacher, "--data", folder, "--max_bad_images", 0.2, "--batch_size", 1, "--eval_every",
                 100, "--log_every", 100, "--out", out]
        train_quietly(*flags, "--steps", at[0] + 1)
        before = open(os.path.join(out, "bad_images.txt")).read().split()
        assert [os.path.basename(n) for n in before] == [names[at[0]]]
        train_quietly(*flags, "--steps", at[1] + 1)
        assert [os.path.basename(n)
                for n in open(os.path.join(out, "bad_images.txt")).read().split()] == [names[at[0]], names[at[1]]]
        assert state_of(out)["unreadable"] == 2
        # two passes over the ten pictures meet both twice, in a run of one rank or of two, and no pass has more than
        # 0.2 of them; with 0.15 a run stops in its first pass, at the second of them, whichever rank meets it
        for ranks in 1, 2:
            for limit, status in (0.2, 0), (0.15, 2):
                out = os.path.join(tmp, f"passes-{ranks}-{limit}")
                done = run_ranks(ranks, "python", "train.py", *MICRO_RUN, "--teacher", teacher, "--data", folder,
                                 "--batch_size", 2, "--eval_every", 100, "--out", out, "--steps", 10,
                                 "--max_bad_images", limit)
                assert [d.returncode for d in done] == [status] * ranks, [d.stderr for d in done]
                assert not status or all(f"2 of the {at[1] // 2 * 2 + 2} images so far" in d.stderr for d in done), done
                lists = [open(path).read().splitlines() for path in glob.glob(os.path.join(out, "bad_images*.txt"))]
                assert all(len(x) == len(set(x)) for x in lists), "a rank names a picture once"
                assert {os.path.basename(x) for x in sum(lists, [])} == {"3.png", "8.png"}
            state = state_of(os.path.join(tmp, f"passes-{ranks}-0.2"))
            assert state["unreadable"] == 4, "samples that others stood in for"


MAY_DIFFER = set("data val out recipe steps epochs workers micro_batch compile checkpoint_activations log_every "
                 "eval_every save_every keep_every max_bad_images resume_anyway".split())


def test_a_resume_compares_every_argument():
    """state.pt with one argument changed after the other: what decides the run is named, what does not is not asked
    for."""
    with tempfile.TemporaryDirectory() as tmp:
        out, teacher = os.path.join(tmp, "out"), micro_teacher(tmp)
        flags = ["--teacher", teacher, "--out", out, "--eval_every", 100, "--steps"]
        train_quietly(*flags, 1)
        state = torch.load(os.path.join(out, "state.pt"), weights_only=True)
        needed = ("teacher init size crop_scale latent_dim projector gtb_depth flow_depth flow_width decoder strategy "
                  "beta lambda_d lambda_f endpoint freeze_encoder batch_size lr lr_decay encoder_lr_scale weight_decay "
                  "clip drop_path seed beta1 beta2 warmup decay_shape ema")
        assert set(needed.split()) <= state["args"].keys(), "flag == saved key"
        torch.save({**state, "args": {**state["args"], **{key: 0.123 for key in needed.split()}}},
                   os.path.join(out, "state.pt"))
        raises(ValueError, train_quietly, *flags, 2, words=["resume_anyway",
                                                            *(f"{key} was 0.123" for key in needed.split())])
        torch.save({**state, "args": {**state["args"], "seed": 0.123}}, os.path.join(out, "state.pt"))
        raises(ValueError, train_quietly, *flags, 2, words="another run (seed was 0.123, is now 0)")
        torch.save({**state, "args": {**state["args"], **{key: 0.123 for key in MAY_DIFFER}}},
                   os.path.join(out, "state.pt"))
        assert "resumed" in train_quietly(*flags, 2)
        folder, out = picture_folder(tmp)[0], os.path.join(tmp, "named")
        train_quietly(*flags[:-1], "--out", out, "--data", folder, "--steps", 1)
        # as many pictures, but others
        os.rename(os.path.join(folder, "class0", "4.png"), os.path.join(folder, "class0", "40.png"))
        raises(ValueError, train_quietly, *flags[:-1], "--out", out, "--data", folder, "--steps", 2,
               words="images was 10 images")


# ---- what ranks share ----

def test_what_ranks_share():
    """Two ranks of four pictures each: bad pictures in both shares, noise of their own, a signal that only the second
    one gets, and an evaluation whose seven pictures are counted once."""
    with tempfile.TemporaryDirectory() as tmp:
        teacher, (folder, _) = micro_teacher(tmp), picture_folder(tmp, n=8)
        grey, val = os.path.join(tmp, "grey"), picture_folder(os.path.join(tmp, "val"), n=7)[0]
        os.makedirs(grey)
        Image.new("RGB", (16, 16), (90, 90, 90)).save(os.path.join(grey, "0.png"))
        read = data.ImageDataset(folder, 16, train=True)
        bad = [read.path(read.index(n)) for n in (6, 1)]  # of the second rank, and of the first
        for path in bad:
            open(path, "wb").write(b"no picture")
        flags = ["--teacher", teacher, "--latent_dim", 8, "--gtb_depth", 1, "--flow_depth", 1, "--flow_width", 96,
                 "--log_every", 1, "--workers", 0,
                 "--lr", 1e-12, "--val", val, "--out"]
        script = faulty_training(tmp, "    if step == 3 and rank == 1: os.kill(os.getpid(), signal.SIGUSR1)")
        out = os.path.join(tmp, "ranks")
        done = run_ranks(2, "python", script, *flags, out, "--data", folder, "--batch_size", 8, "--micro_batch", 2,
                         "--steps", 5, "--max_bad_images", 0.5,
                         "--eval_every", 1)
        assert not any(d.returncode for d in done), [d.stderr[-1000:] for d in done]
        listed = [open(os.path.join(out, f"bad_images{rank}.txt")).read().splitlines() for rank in (".rank1", "")]
        assert [names[0] for names in listed] == bad, "each rank names its own; in the second pass, what it meets there"
        assert all(len(names) == len(set(names)) and set(names) <= set(bad) for names in listed), listed
        lines = log_lines(out)
        assert lines[-1] == {"kind": "interrupted", "step": 2} and torch.load(os.path.join(out, "state.pt"),
                                                                              weights_only=True)["step"] == 2, lines
        assert "2 of the 8 images so far could not be read" in done[0].stdout and not done[1].stdout
        judged, by_t = ([x[key] for x in lines if x.get("kind") == "eval"] for key in ("psnr", "flow_by_t"))
        # an untrained decoder's velocity is 0, so that what it decodes is the noise
        img = np.stack([x.numpy() for x, _ in data.ImageDataset(val, 16, train=False)]) / 255
        noise = evaluation.image_noise(range(7), 16, 48).view(7, 4, 4, 3, 4,
                                                              4).permute(0, 3, 1, 4, 2, 5).reshape(7, 3, 16, 16).numpy()
        mean, std = (np.array(x)[:, None, None] for x in IMAGENET)
        expected = numpy_psnr(img, (255 * (noise * std + mean).clip(0, 1)).round() / 255)
        assert len(judged) == 2 and all(abs(x - expected) < 1e-3 for x in judged), (judged, expected)
        # at every t; of each rank's first batch, every second of its pictures, by its share of seven
        error = np.mean((noise - (img - mean) / std) ** 2, axis=(1, 2, 3))
        assert np.allclose(by_t, (4 * error[[0, 4]].mean() + 3 * error[[1, 5]].mean()) / 7, rtol=1e-4), (by_t, error)
        script = os.path.join(tmp, "seeds.py")  # a command of its own for each rank
        with open(script, "w") as f:
            f.write(f"import os, sys; sys.path.insert(0, {HERE!r}); sys.argv += ['--seed', os.environ['RANK']]; "
                    "import train; train.run()")
        done = run_ranks(2, "python", script, *flags, os.path.join(tmp, "other"), "--data", grey, "--steps", 1)
        assert done[1].returncode == 2 and "rank 1 starts from other weights than rank 0" in done[1].stderr, done
        # noise: with one grey picture and v = 0 the loss is that of the noise alone, 1 + mean(x^2) but for its sample;
        # two ranks with the same draws would have the loss of one
        losses = []
        for ranks, batch in (1, 4), (2, 8):
            out = os.path.join(tmp, f"noise{ranks}")
            done = run_ranks(ranks, "python", "train.py", *flags, out, "--data", grey, "--batch_size", batch,
                             "--steps", 1)
            assert not any(d.returncode for d in done), [d.stderr[-1000:] for d in done]
            losses.append([x["loss_flow"] for x in log_lines(out) if "loss" in x][0])
        x = (90 / 255 - np.array(IMAGENET[0])) / np.array(IMAGENET[1])
        assert abs(losses[0] - losses[1]) > 1e-4 and abs(losses[1] - 1 - (x ** 2).mean()) < 0.1, losses


def test_fid_statistics_by_numpy():
    """mu and sigma that are saved, and both sides' splits: pools of an ADM crop to 256 px, mean and unbiased
    covariance."""
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(evaluation, "InceptionV3", QuickInception):
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=6)
        stats = os.path.join(tmp, "stats.npz")
        evaluate("--fid", folder, "--resolution", "256", "--inception", weights, "--save_stats", stats,
                 "--batch_size", 4)
        paths = sorted(glob.glob(os.path.join(folder, "*", "*.png")))
        crops = torch.stack([data.to_tensor(data.center_crop(Image.open(p).convert("RGB"), 256)) for p in paths]) / 255
        pools = QuickInception(weights)(crops)[0].double().numpy()
        saved = np.load(stats)
        assert np.allclose(saved["mu"], pools.mean(0),
                           rtol=1e-4, atol=1e-6) and np.allclose(saved["sigma"], np.cov(pools.T), rtol=1e-3, atol=1e-7)
        b = picture_folder(os.path.join(tmp, "b"), n=4)[0]
        evaluate("--fid", folder, b, "--resolution", "256", "--inception", weights, "--save_stats",
                 os.path.join(tmp, "both.npz"))
        assert np.allclose(np.load(os.path.join(tmp, "both.npz"))["mu"], saved["mu"], rtol=1e-4), "of A, whatever B"


# ---- the tests themselves ----

def test_no_test_hides_another():
    """test_all.py puts the tests of all files into one namespace, where of two with one name the first would never
    run. So does tests/mutants.py with those of the folders in tests/."""
    names = [name for path in (os.path.join(HERE, "test_all.py"),
                               *glob.glob(os.path.join(HERE, "tests", "**", "test_*.py"), recursive=True))
             for name in re.findall(r"^def ((?:test|slow)_\w+)\(", open(path).read(), re.M)]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


def test_the_table_of_mutants_is_true():
    """Every text of tests/mutants.py is found exactly once in its file, every name is used once, and its tests
    exist. Not in a copy that has a mutant, whose text is gone there: this test alone would kill all of them."""
    if "UNIFLOW_MUTANT" in os.environ:
        return
    assert len(mutants.MUTANTS) >= 120 and not mutants.wrong_entries(HERE), "\n".join(mutants.wrong_entries(HERE))
