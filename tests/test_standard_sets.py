"""The experiments on standard sets, and the flow in a frozen autoencoder's space."""
from tests.helpers import (  # first: it sets the environment that torch reads
    HERE, MICRO_DECODER, close, micro_teacher, picture_folder)

import contextlib
import io
import json
import os
import sys
import tempfile

import torch
import torch.nn.functional as F

import data
import decoder
import eval as evaluation

sys.path.insert(0, os.path.join(HERE, "experiments", "efficiency"))
import latent_flow
sys.path.pop(0)

LATENT_FLOW_RUN = ("--size 16 --latent_dim 8 --gtb_depth 1 --flow_depth 2 --flow_width 96 --batch_size 8 "
                   "--micro_batch 8 --steps 48 --lr 1e-2 --endpoint 1 --workers 0 --seed 3")


def made_up_images(n=40):
    """Images (n, 3, 16, 16) in [0, 1], smooth enough that a few components hold most of them."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 4, 4, generator=g)
    return F.interpolate(coarse, size=16, mode="bilinear") + 0.02 * torch.rand(n, 3, 16, 16, generator=g)


def latent_flow_decoder(K, isotropic=False):
    torch.manual_seed(1)
    return latent_flow.LatentFlow(MICRO_DECODER, *latent_flow.fit_space([made_up_images()], 4, K, isotropic))


def test_space_of_the_latent_flow():
    """Codes of the images it was fitted on have mean 0 and variance 1 in each coefficient (isotropic: on average, and
    distances are those of patches times one number). All 48 components give the images back; 16 give what eval's PCA
    gives, also under autocast, where the codes must stay fp32."""
    img = made_up_images()
    whole, part, iso = latent_flow_decoder(48), latent_flow_decoder(16), latent_flow_decoder(16, isotropic=True)
    close(whole.picture(whole.code(img), 16, 16), img.clamp(0, 1), 1e-4)
    x = part.code(img).flatten(0, 1).double()
    assert x.mean(0).abs().max() < 1e-3 and (x.var(0) - 1).abs().max() < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        got = part.picture(part.code(img), 16, 16)
    mean, basis = evaluation.fit_patch_pca([img], 4, 16)
    close(got, evaluation.patch_pca(img, mean, basis, 4).float(), 1e-4)
    x = iso.code(img).flatten(0, 1)
    y = decoder.patchify(evaluation.patch_pca(img, mean, basis, 4).float(), 4).flatten(0, 1)
    assert abs(x.double().var(0).mean() - 1) < 1e-3 and x.var(0).max() > 4 * x.var(0).min()
    close((x[:50] - x[50:100]).norm(dim=1) * iso.deviation[0], (y[:50] - y[50:100]).norm(dim=1), 1e-3)


def test_latent_flow_loss_and_decoding_by_hand():
    """A velocity that knows the code x solves the flow: v = (x_t - x) / t = noise - x. Its loss is 0, one step from any
    noise ends at x, and the picture is the PCA's. With a velocity of 0 the loss is the mean of (noise - x)^2."""
    img, dec, h = made_up_images(2), latent_flow_decoder(16), 4
    x, z = dec.code(img), torch.zeros(2, 8, h, h)
    noise = torch.randn(2, h * h, 48, generator=torch.Generator().manual_seed(2))  # the pixel flow's: 16 of 48 are used
    t = torch.rand(2, h * h, generator=torch.Generator().manual_seed(3))
    close(dec(z, img, t, noise), (noise[..., :16] - x).square().mean(), 1e-5)  # the output layer is zero at first
    dec.velocity = lambda x_t, t, c: (x_t - x) / t[..., None]
    assert dec.loss(z, img, t, noise).item() < 1e-6
    close(dec.decode(z, noise=noise), dec.picture(x, 16, 16), 1e-5)


def test_latent_flow_learns():
    """A toy run of the command: the loss falls, and one-step decoding is nearer to the images than their mean is."""
    with tempfile.TemporaryDirectory() as tmp:
        folder, results = picture_folder(tmp, 20)[0], os.path.join(tmp, "results.jsonl")
        flags = ["--data", folder, "--val", folder, "--teacher", micro_teacher(tmp), "--results", results]
        for space in "pca", "pixel":
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
                latent_flow.main([*flags, "--space", space, *LATENT_FLOW_RUN.split()])
            line = json.loads(open(results).read().splitlines()[-1])
            curve, quality = line["curve"], line["psnr"]
            assert f"{space}, seed 3: {quality:.2f} dB, ssim {line['ssim']:.4f}" in out.getvalue()
            assert line["space"] == space and [x["step"] for x in curve] == [12, 24, 36, 48]
            assert curve[-1]["loss_flow"] < 0.8 * curve[0]["loss_flow"], curve
            img = torch.stack([x for x, _ in data.ImageDataset(folder, 16, train=False)]) / 255
            of_the_mean = evaluation.psnr(img, img.mean((0, 2, 3), keepdim=True)).mean().item()
            assert quality > of_the_mean + 0.5, (quality, of_the_mean)
            assert abs(quality - curve[-1]["psnr"]) < 0.1, "both are of all 20 images"
            if space == "pca":
                mean, basis = evaluation.fit_patch_pca([img], 4, 16)
                through = evaluation.round_uint8(evaluation.patch_pca(img, mean, basis, 4))
                alone = evaluation.psnr(img, through).mean().item()
                assert abs(line["ceiling"]["psnr"] - alone) < 1e-3 and quality < alone, "what the PCA alone gives"
                assert f"the PCA of 16 components alone has {alone:.2f} dB" in out.getvalue()
