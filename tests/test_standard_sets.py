"""The experiments on standard sets and on GPU time, and the flow in a frozen autoencoder's space."""
from tests.helpers import (  # first: it sets the environment that torch reads
    HERE, MICRO_DECODER, close, micro_teacher, picture, picture_folder, raises, tokenizer_file)

import contextlib
import io
import json
import os
import tempfile
import time
import types
import unittest.mock
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import decoder
import eval as evaluation
from experiments.efficiency import latent_flow, settings, study
from experiments.standard_sets import measure

STANDARD_SETS = os.path.join(HERE, "experiments", "standard_sets")
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
            of_the_mean = evaluation.psnr(img, img.mean((0, 2, 3), keepdim=True).expand_as(img)).mean().item()
            assert quality > of_the_mean + 0.5, (quality, of_the_mean)
            assert abs(quality - curve[-1]["psnr"]) < 0.1, "both are of all 20 images"
            if space == "pca":
                mean, basis = evaluation.fit_patch_pca([img], 4, 16)
                through = evaluation.round_uint8(evaluation.patch_pca(img, mean, basis, 4))
                alone = evaluation.psnr(img, through).mean().item()
                assert abs(line["ceiling"]["psnr"] - alone) < 1e-3 and quality < alone, "what the PCA alone gives"
                assert f"the PCA of 16 components alone has {alone:.2f} dB" in out.getvalue()


def test_stages_of_a_setting_by_hand():
    """A quarter of tiny's 384,000 images at half its batch of 256 are 750 steps of 128. grow shares the time of photos'
    1,500 steps of 32 among three sizes, whose steps take 1, 2 and 4 seconds here: 1,200, 900 and 750 steps."""
    given = types.SimpleNamespace(levers=settings.LEVERS, scale=1.0, data=["d"], val=["v"], photos=["p"], workers=2,
                                  photos_val=["pv"], small_teacher="F", more="--last")
    words = "--data d --val v --workers 2 " + settings.RUN
    (stage,) = settings.stages(given, "tiny:fast@1/4", 1e-3, 1, {})
    assert stage[:3] == (64, 128, 750) and " ".join(stage.flags) == (
        f"{words} --teacher tiny --size 64 --warmup 100 --lr 0.001 --seed 1 "
        "--batch_size 128 --micro_batch 128 --steps 750 --eval_every 93 --last")
    assert "--teacher_weights F" in " ".join(settings.stages(given, "small:base", 1e-3, 0, {})[0].flags)
    seconds_of = {"tiny/64/256": 1, "tiny/128/64": 2, "tiny/256/32": 4}
    grown = settings.stages(given, "photos:grow", 1e-3, 0, seconds_of)
    assert [stage[:3] for stage in grown] == [(64, 256, 1200), (128, 64, 900), (256, 32, 750)]
    assert all(stage.flags[:6] == ["--data", "p", "d", "--val", "pv", "--workers"] for stage in grown)
    assert ["--lr_decay 0 --last" in " ".join(stage.flags) for stage in grown] == [True, True, False]


def test_the_study_of_gpu_time_searches_the_best_rate():
    """A PSNR that is highest at 4e-3: three rates, the next two above the best, then the best again with seed 1. A row
    that fails keeps its place with the reason; one that --results has is not run again; one by rate and seed is alone.
    Two GPUs share the rows."""
    ran = []

    def run_row(args, setting, rate, seed, gpu):
        ran.append((setting, rate, seed))
        time.sleep(0.01)  # so that both GPUs are busy
        line = {"setting": setting, "rate": rate, "seed": seed}
        if setting == "tiny:ema" or rate == 2e-3 and setting == "tiny:base":
            return {**line, "failed": "it diverged"}
        return {**line, "psnr": 20 - abs(np.log2(rate / 4e-3)), "linear": 50.0, "seconds": 1}
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(study, "run_row", run_row):
        folder, results = picture_folder(tmp, 3)[0], os.path.join(tmp, "results.jsonl")
        command = ["--data", folder, "--val", folder, "--fit", folder, "--results", results, "--runs", tmp, "--gpus",
                   "0", "1"]
        names = ["tiny:fast", "tiny:ema", "tiny:base=2e-3,1", "tiny:1:0"]
        for _ in range(2):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                study.main([*names, *command])
        by_setting = {name.partition("=")[0]: [x[1:] for x in ran if x[0] == name.partition("=")[0]] for name in names}
        assert sorted(by_setting["tiny:fast"][:3]) == [(5e-4, 0), (1e-3, 0), (2e-3, 0)]
        assert by_setting["tiny:fast"][3:] == [(4e-3, 0), (8e-3, 0), (4e-3, 1)]
        assert sorted(by_setting["tiny:ema"]) == [(5e-4, 0), (1e-3, 0), (2e-3, 0)], "all failed: no more"
        assert by_setting["tiny:base"] == [(2e-3, 1)] and by_setting["tiny:1:0"] == [(1e-3, 0), (1e-3, 1)]
        assert out.getvalue() == "", "all rows stand in --results"
        lines = [json.loads(x) for x in open(results)]
        assert sorted((x["setting"], x["rate"], x["seed"]) for x in lines) == sorted(ran) and len(lines) == 12
        assert sum("failed" in x for x in lines) == 4
        for wrong in "tiny:none", "huge:base", "tiny:base@1/0", "tiny:base=1e-3":
            raises(settings.UserError, study.main, [wrong, *command], words=f"no such setting: {wrong};")
        raises(data.UserError, study.main, ["tiny:base", *command, "--fit", tmp + "/x.zip"], words="no such folder")


def test_a_row_that_fails_keeps_its_reason():
    """A training that fails: the line has the last words that it printed, and what was known before."""
    with tempfile.TemporaryDirectory() as tmp:
        def run_module(folder, *command, **variables):
            assert variables["CUDA_VISIBLE_DEVICES"] == "3"
            with open(os.path.join(folder, "output.txt"), "a") as f:
                f.write("much\nthe loss is nan\n")
            raise RuntimeError("train failed")
        given = types.SimpleNamespace(levers=settings.LEVERS, scale=1.0, data=["d"], val=["v"], workers=2, more="",
                                      speeds=os.path.join(tmp, "none"), runs=tmp)
        with unittest.mock.patch.object(study, "run_module", run_module):
            line = study.run_row(given, "tiny:batch/2", 1e-3, 0, "3")
        assert line == {"setting": "tiny:batch/2", "rate": 1e-3, "seed": 0,
                        "failed": "the loss is nan (RuntimeError: train failed)"}
        assert os.path.isfile(os.path.join(tmp, "tiny_batch-2_0.001_0", "output.txt"))
        line = study.run_row(given, "photos:grow", 1e-3, 0, "3")
        assert line["failed"] == " (KeyError: 'tiny/256/32')", "no speed was measured"


def grey_clip(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def test_flicker_by_hand():
    """Frames 0, 0.5, 0.5 come back as 0.1, 0.6, 0.4. Each is off by 0.1: PSNR 20 dB. Their differences are 0.5, 0
    against 0.5, -0.2: no error (100 dB), then 0.2, whose square is 0.04: 13.979 dB. Independent noise of deviation 0.01
    (40 dB) has twice its variance in differences: 36.99 dB."""
    x, r = grey_clip(0, 0.5, 0.5), grey_clip(0.1, 0.6, 0.4)
    assert (measure.flicker(x, r) - torch.tensor([100, 13.9794])).abs().max() < 1e-4
    assert (evaluation.psnr(x, r) - 20).abs().max() < 1e-4
    noise = 0.01 * torch.randn(5, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    assert (measure.flicker(torch.zeros_like(noise), noise) - 36.99).abs().max() < 0.2


def test_measure_takes_one_noise_for_a_clip():
    """A tokenizer that adds a tenth of its noise: every frame's error is the same, so flicker is perfect, also over the
    borders of batches. A picture's noise is that of its number. A PCA that adds 0.2 has 13.98 dB."""
    enc = types.SimpleNamespace(encode=lambda img: img)
    seen = []

    def decode(z, noise):
        seen.append(noise)
        return z + 0.1 * decoder.unpatchify(noise, 4, *z.shape[2:]).clamp(-2, 2)
    dec = types.SimpleNamespace(mean=torch.zeros(1), config=types.SimpleNamespace(patch=4), decode=decode)
    img = torch.randint(60, 190, (5, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    items = [("Kodak, ADM", "a", 7, img[:1]), ("DAVIS, b", "b", 0, img)]
    rows, shown = measure.measure(enc, dec, lambda x: x + 51 / 255, items, ["a"], batch=2)
    assert [len(x) for x in seen] == [1, 2, 2, 1] and torch.equal(seen[0], evaluation.image_noise([7], 12, 48))
    assert torch.equal(seen[2], evaluation.image_noise([0], 12, 48).expand(2, -1, -1))
    clip, one = rows["DAVIS, b"], rows["Kodak, ADM"]
    assert clip["tokenizer"]["flicker"] == [100] * 4 and len(clip["tokenizer"]["psnr"]) == 5
    assert "flicker" not in one["PCA"], "a picture has none"
    assert max(abs(x - 13.9794) for x in clip["PCA"]["psnr"] + one["PCA"]["psnr"]) < 1e-3
    rec = evaluation.round_uint8(decode(img[:1] / 255, seen[0]))
    assert abs(one["tokenizer"]["psnr"][0] - evaluation.psnr(img[:1] / 255, rec).item()) < 1e-9
    assert abs(one["tokenizer"]["ssim"][0] - evaluation.ssim(img[:1] / 255, rec).item()) < 1e-9
    decibels, beside = shown["a"]
    assert decibels == one["tokenizer"]["psnr"][0] and torch.equal(beside, evaluation.comparison(img[0] / 255, rec[0]))


def toy_sets(folder):
    """Archives of pictures of 40x28 and 28x40, and of two clips of three frames of 16x16, the last frame first."""
    kodak, davis = (os.path.join(folder, name) for name in ("kodak.zip", "davis.zip"))
    for path, names, sizes in (kodak, ("k/b.png", "k/a.png"), ((40, 28), (28, 40))), (
            davis, [f"{clip}/{i:05d}.png" for clip in ("two", "one") for i in (10, 9, 8)], [(16, 16)] * 6):
        with zipfile.ZipFile(path, "w") as z:
            for seed, (name, size) in enumerate(zip(names, sizes)):
                picture(seed, *size).save(content := io.BytesIO(), "PNG")
                z.writestr(name, content.getvalue())
    return kodak, davis


def test_pictures_of_the_sets():
    array = lambda seed, *size: torch.from_numpy(np.array(picture(seed, *size))).permute(2, 0, 1)
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(measure, "SIZE", 16):
        found = list(measure.pictures(*toy_sets(tmp)))
    assert [x[0].split(",")[0] for x in found] == ["Kodak"] * 6 + ["DAVIS"] * 2
    assert [x[1:3] for x in found] == [("a", 0)] * 3 + [("b", 1)] * 3 + [("one", 0), ("two", 0)]
    assert torch.equal(found[0][3][0], array(1, 28, 40)), "whole"
    assert torch.equal(found[1][3][0], array(1, 28, 40)[:, 12:28, 6:22]) and "central 16x16" in found[1][0]
    assert torch.equal(found[5][3][0], data.to_tensor(data.center_crop(picture(0, 40, 28), 16)))
    in_order = torch.stack([array(n, 16, 16) for n in (5, 4, 3)])
    assert torch.equal(found[6][3], in_order), "frames in the order of their names"


def test_table_of_the_sets():
    """Means over pictures, for clips over frames, in the last line over clips; each label has its columns, PCA once."""
    def rows(a):
        figures = lambda x, y: {"psnr": [x] * 3, "ssim": [0.5] * 3, "flicker": [y, y + 1]}
        clip = lambda x, y: {"tokenizer": figures(x, y), "PCA": figures(x, y)}
        kodak = {"tokenizer": {"psnr": [a, a + 1], "ssim": [0.5, 0.7]}, "PCA": {"psnr": [20, 21], "ssim": [0.25, 0.75]}}
        return {"Kodak, whole": kodak, "DAVIS, one": clip(30, 40), "DAVIS, two": clip(31, 44)}
    assert measure.table({"before": {"rows": rows(30)}, "now": {"rows": rows(31)}}).splitlines() == [
        "| | before: PSNR, ssim | flicker | now: PSNR, ssim | flicker | PCA: PSNR, ssim | flicker |",
        "|---|---|---|---|---|---|---|",
        "| Kodak, whole | 30.50, 0.6000 | – | 31.50, 0.6000 | – | 20.50, 0.5000 | – |",
        "| DAVIS, one | 30.00, 0.5000 | 40.50" + " | 30.00, 0.5000 | 40.50" * 2 + " |",
        "| DAVIS, two | 31.00, 0.5000 | 44.50" + " | 31.00, 0.5000 | 44.50" * 2 + " |",
        "| DAVIS, mean of 2 clips | 30.50, 0.5000 | 42.50" + " | 30.50, 0.5000 | 42.50" * 2 + " |"]
    shown = open(os.path.join(STANDARD_SETS, "README.md")).read()
    assert measure.table(json.load(open(os.path.join(STANDARD_SETS, "results.json")))) in shown, "run measure.py"


def test_standard_sets_command():
    """The command on toy sets: PSNR of its tokenizer and PCA as the functions give them, a picture, and a README whose
    own words stay when it is run again under another label."""
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(measure, "SIZE", 16):
        (kodak, davis), weights, readme = toy_sets(tmp), tokenizer_file(tmp), os.path.join(tmp, "README.md")
        open(readme, "w").write("before\n" + measure.MARKS[0] + "old\n" + measure.MARKS[1] + "after\n")
        command = ["--kodak", kodak, "--davis", davis, "--fit", kodak, "--weights", weights, "--out", tmp, "--show"]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            for label in "one", "two":
                measure.main([*command, "b", "--label", label])
            raises(measure.UserError, measure.main, [*command, "c"], words="has no c")
        text, results = open(readme).read(), json.load(open(os.path.join(tmp, "results.json")))
        assert text.startswith("before\n" + measure.MARKS[0] + measure.table(results)) and text.endswith("-->\nafter\n")
        assert "old" not in text and text.count("![b](b.png)") == 1 and list(results) == ["one", "two"]
        assert results["one"]["rows"] == results["two"]["rows"], "the same command gives the same figures"
        assert Image.open(os.path.join(tmp, "b.png")).size == (48, 16)
        img = torch.stack([x for x, _ in data.ImageDataset(kodak, 16, train=False)]) / 255
        pca = evaluation.patch_pca(img, *evaluation.fit_patch_pca([img], 4, 8), 4)
        enc, dec = measure.Encoder.from_pretrained(weights), measure.Decoder.from_pretrained(weights)
        with torch.no_grad():
            rec = dec.decode(enc.encode(img), noise=evaluation.image_noise([0, 1], 16, 48))
        row = next(x for name, x in results["one"]["rows"].items() if "ADM" in name)
        for who, r in ("tokenizer", rec), ("PCA", pca):
            close(torch.tensor(row[who]["psnr"]).double(), evaluation.psnr(img, evaluation.round_uint8(r)), 1e-5)
