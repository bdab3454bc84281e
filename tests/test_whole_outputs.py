"""Whole reports, log lines and messages of the scripts, word by word, against values computed here."""
from tests.helpers import (
    QuickInception, clip, evaluate, log_lines, micro_teacher, picture, picture_folder, pixels, refused,
    sampled, tokenizer_file, train_quietly)

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import unittest.mock
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import decoder
import encoder
import eval as evaluation
import tools.fid as fid_command
import tools.job as jobs
import tools.latents as latents
import tools.script as script
import tools.validate as validation
import train

patch = unittest.mock.patch
MEASURES = ("PSNR per image, at most 100 dB, then averaged; ssim: Gaussian 11x11, sigma 1.5, data_range 1; ssim_paper: "
            "uniform 7x7, data_range 2 (the released notebook's, flattering)")


def of_a_run(folder):
    """(path, SHA-256) of a tokenizer that a run has left: with its step, its commit and its teacher."""
    plain, path = tokenizer_file(folder), os.path.join(folder, "of_a_run.safetensors")
    encoder.write_model(path, {**encoder.read_config(plain), "step": 0, "commit": "theirs"}, load_file(plain))
    return path, hashlib.sha256(open(path, "rb").read()).hexdigest()


def circumstances(ranks=1):
    """What every report of a job says of this machine; the seconds are the clock's."""
    return dict(code=script.commit(), torch=torch.__version__, ranks=ranks, device="cpu", memory_gib=None)


def without_seconds(report):
    """The report, whose entry "seconds" is a rounded number."""
    assert report["seconds"] == round(report["seconds"], 1) and 0 <= report["seconds"] < 600, report["seconds"]
    return {k: v for k, v in report.items() if k != "seconds"}


@patch.object(evaluation, "InceptionV3", QuickInception)
def test_whole_reports_of_an_evaluation():
    """Report, JSON and text: with all that can be asked for, of two sets of pictures; and of the least."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, digest = of_a_run(tmp)
        teacher, out = os.path.join(tmp, "teacher.safetensors"), os.path.join(tmp, "report.json")
        (a, _), (b, _), (fit, _) = (picture_folder(os.path.join(tmp, name), n) for name, n in (("a", 2), ("b", 1),
                                                                                              ("fit", 20)))
        about = {"weights": weights, "weights_sha256": digest, "step": 0, "teacher": teacher, "commit": "theirs"}
        start = [f"weights   {weights}", "step      0", f"teacher   {teacher}"]
        figures = itertools.count(10)

        def fake(x, y, test_x, *more):
            assert x.dtype == test_x.dtype == torch.float32 and (len(x), len(test_x)) == (22, 3), "with --bf16, too"
            return float(next(figures))
        flags = ["--weights", weights, "--inception", weights, "--out", out, "--workers", 0]
        notes, images = [], jobs.Job.images
        with patch.multiple(evaluation, linear_probe=lambda *args: (fake(*args), 0.25), nearest_neighbours=fake), \
                patch.object(jobs.Job, "images", lambda job, *what: notes.append(what[0]) or images(job, *what)):
            said, report = evaluate(*flags, "--data", a, b, "--fit", fit, a, "--size", 24, "--steps", 2, "--seed", 5,
                                    "--bf16", "--pca", "--probe")
        assert notes == ["fit PCA", "reconstruct", "features of --fit", "features of --data"], "beside the bar"
        protocol = ("ADM centre crop to 24 px in; compared at 24 px as uint8 with the ADM crop of the original; "
                    f"2 Euler steps, noise from (seed 5, image number); bf16 autocast; {MEASURES}; "
                    "rFID against the same crops of the same images, IS in 3 splits, drawn by a fixed permutation; "
                    f"Inception of_a_run.safetensors (sha256 {digest[:8]}, NOT that of pytorch-fid: compare with "
                    "nothing), bilinear resize to 299 without antialiasing, float64 statistics; "
                    "probe: features averaged over positions; softmax regression, 40 epochs of SGD, learning rate "
                    "chosen on a tenth of --fit; 20-NN by cosine, votes exp(cosine / 0.07)")
        warning = ("FID of 3 images, fewer than the 2048 dimensions of its covariance: such a figure means little")
        results, probe, cosines = report["results"], {}, report["cosine_to_teacher"]
        for layer, who in (("latent", "student"), ("last layer", "student"), ("second to last", "student"),
                           ("last layer", "teacher"), ("second to last", "teacher")):
            probe.setdefault(layer, {})[who] = {"linear": 10.0 + 2 * sum(map(len, probe.values())),
                                                "learning_rate": 0.25}
            probe[layer][who]["knn"] = probe[layer][who]["linear"] + 1
        expected = {**about, "data": [a, b], "images": 3, "fit": [fit, a], "results": results, "protocol": protocol,
                    "warning": warning, "probe": probe, "cosine_to_teacher": cosines, **circumstances()}
        assert without_seconds(report) == expected, (report, expected)
        assert json.load(open(out)) == report and list(results) == ["tokenizer", "PCA, 8 per patch"]
        assert len(cosines) == 3 and len({f"{c:.3f}" for c in cosines}) == 3
        table = ["                    PSNR dB    ssim  ssim_paper      rFID             IS"]
        for row, x in results.items():
            assert list(x) == ["psnr", "ssim", "ssim_paper", "perfect", "rfid", "is", "is_std"]
            table.append(f"{row:18s}  {x['psnr']:7.2f}  {x['ssim']:.4f}      {x['ssim_paper']:.4f}  {x['rfid']:8.3f}  "
                         f"{x['is']:6.2f} +- {x['is_std']:.2f}")
        assert said.splitlines() == [
            *start, f"data      {a} {b}", f"fit       {fit} {a}", "images    3", f"protocol  {protocol}",
            f"warning   {warning}", "", *table, "",
            "accuracy in %       linear: student  teacher   20-NN: student  teacher",
            *(f"{layer:18s}          {one}  {two}          {three}  {four}" for layer, one, two, three, four in (
                ("latent", "  10.00", "      -", "  11.00", "      -"),
                ("last layer", "  12.00", "  16.00", "  13.00", "  17.00"),
                ("second to last", "  14.00", "  18.00", "  15.00", "  19.00"))),
            "cosine to the teacher, layer by layer: " + " ".join(f"{c:.3f}" for c in cosines)], said
        # the crops that go in, and those of --fit, are of --size: by hand from all pictures at once
        read = [torch.stack([x for root in roots for x, _ in data.ImageDataset(root, 24, train=False)]) / 255
                for roots in ((a, b), (fit, a))]
        noise = evaluation.image_noise(range(3), 36, 48, 5)
        enc, dec = encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rec = dec.decode(enc.encode(read[0]), 2, noise).float()
        mean, basis = evaluation.fit_patch_pca([read[1]], 4, 8)
        for row, x in (("tokenizer", rec), ("PCA, 8 per patch", evaluation.patch_pca(read[0], mean, basis, 4))):
            quality = evaluation.psnr(read[0], (255 * x).round() / 255).mean().item()
            assert abs(results[row]["psnr"] - quality) < 0.02, (row, results[row], quality)
        # the least: no FID, no warning; with 256 what is compared has another size
        for size, extra, words in (16, [], "compared at 16 px as uint8"), (256, ["--resolution", 256],
                                                                           "compared at 256 px as uint8, PIL bicubic,"):
            said, report = evaluate(*flags, "--inception", "none", "--data", b, *extra)
            protocol = (f"ADM centre crop to 16 px in; {words} with the ADM crop of the original; 1 Euler step, noise "
                        f"from (seed 0, image number); fp32 without TF32; {MEASURES}")
            x = report["results"]["tokenizer"]
            expected = {**about, "data": [b], "images": 1, "fit": None, "results": {"tokenizer": x},
                        "protocol": protocol, "warning": None, **circumstances()}
            assert without_seconds(report) == expected and list(x) == ["psnr", "ssim", "ssim_paper", "perfect"], report
            assert said.splitlines() == [
                *start, f"data      {b}", "images    1", f"protocol  {protocol}", "",
                "                    PSNR dB    ssim  ssim_paper",
                f"tokenizer           {x['psnr']:7.2f}  {x['ssim']:.4f}      {x['ssim_paper']:.4f}"], said
        # the PCA codes what goes in, and is compared where the tokenizer is
        report = evaluate(*flags, "--inception", "none", "--data", b, "--fit", fit, "--pca", "--resolution", 256)[1]
        small, large, whole = (torch.stack([x for x, _ in data.ImageDataset(root, size, train=False)]) / 255
                               for root, size in ((b, 16), (b, 256), (fit, 16)))
        mean, basis = evaluation.fit_patch_pca([whole], 4, 8)
        x = (255 * evaluation.patch_pca(small, mean, basis, 4)[0]).round().byte().permute(1, 2, 0).numpy()
        x = np.array(Image.fromarray(x).resize((256, 256), Image.Resampling.BICUBIC)) / 255
        quality = -10 * np.log10(((x - large[0].permute(1, 2, 0).numpy()) ** 2).mean())
        assert abs(report["results"]["PCA, 8 per patch"]["psnr"] - quality) < 1e-3, (report["results"], quality)
        # the fit's own images are only then the measured ones if the folders are the same
        for given, same in ([b], True), ([b, b], False):
            warning = evaluate(*flags, "--inception", "none", "--data", b, "--fit", *given, "--pca")[1]["warning"]
            assert warning == ("fitted on the images that are measured: PCA and probe mean little" if same else None)


@patch.object(evaluation, "InceptionV3", QuickInception)
def test_whole_reports_of_a_fid():
    """Two sets of unlike size, and one from its statistics; by a network that is pytorch-fid's, or another."""
    with tempfile.TemporaryDirectory() as tmp:
        network, stats, out = (os.path.join(tmp, name) for name in ("network.pth", "stats.npz", "report.json"))
        open(network, "w").write("abc")
        (a, _), (b, _) = picture_folder(os.path.join(tmp, "a"), 3), picture_folder(os.path.join(tmp, "b"), 12)
        flags = ["--inception", network, "--workers", 0]
        gaussians, lines = [], []
        for which, folder, n in ("A", a, 3), ("B", b, 12):
            img = torch.stack([x for x, _ in data.ImageDataset(folder, 256, train=False)]) / 255
            pool, logits = QuickInception(None)(img)
            gaussians.append((pool.double().mean(0), pool.double().T.cov()))
            score, deviation = evaluation.inception_score(logits)
            lines.append(f"{which}: {n} images of {folder}, IS {score:.2f} +- {deviation:.2f}, N img/s")
        assert lines[0][3:] != lines[1][3:]
        distance = evaluation.frechet_distance(*gaussians[0], *gaussians[1])
        few = "FID of {} images, fewer than the 2048 dimensions of its covariance: such a figure means little"
        # "abc" is FIPS 180-4's example
        of = ("Inception network.pth (sha256 ba7816bf{}), bilinear resize to 299 without antialiasing, float64 "
              "statistics; {}")
        other = ", NOT that of pytorch-fid: compare with nothing"
        splits = "; IS in 10 splits (of fewer images in as many) by a fixed permutation"
        adm = "folders and archives in ADM crops of 256 px"
        with patch.object(fid_command, "INCEPTION_SHA256", "ba7816bf"):
            said, report = evaluate("--fid", a, b, "--resolution", 256, *flags, "--save_stats", stats, "--out", out)
        lines += [f"statistics of A in {stats}", f"FID {distance:.3f}"]
        clean = lambda x: re.sub(r", \d+ img/s", ", N img/s", x)
        assert [clean(line) for line in said.splitlines()] == [
            f"protocol  {of.format('', adm + splits)}", f"warning   {few.format(3)}", "", *lines], said
        expected = {"fid": report["fid"], "sets": lines, "warning": few.format(3),
                    "protocol": of.format("", adm + splits), **circumstances()}
        assert abs(report["fid"] / distance - 1) < 1e-4 and json.load(open(out)) == report
        assert {**without_seconds(report), "sets": list(map(clean, report["sets"]))} == expected, report
        # statistics alone: no score, no warning
        said, report = evaluate("--fid", stats, stats, *flags)
        protocol = of.format(other, "images as they are")
        expected = {"fid": report["fid"], "sets": [f"A: statistics of {stats}", f"B: statistics of {stats}",
                                                   "FID 0.000"], "warning": None, "protocol": protocol}
        assert without_seconds(report) == {**expected, **circumstances()} and report["fid"] < 1e-6
        assert said.splitlines() == [f"protocol  {protocol}", "", *expected["sets"]], said
        said, report = evaluate("--fid", stats, b, "--resolution", 256, *flags)
        assert report["warning"] == few.format(12) and [clean(x) for x in report["sets"]] == [
            f"A: statistics of {stats}", lines[1], f"FID {distance:.3f}"], report
        clock = iter([0.0, 0.75, 10.0, 12.0])  # seconds of the one and of the other set alone
        with patch.object(fid_command, "time", SimpleNamespace(time=lambda: next(clock))):
            report = evaluate("--fid", a, b, "--resolution", 256, *flags)[1]
        assert [x.rsplit(", ", 1)[1] for x in report["sets"][:2]] == ["4 img/s", "6 img/s"]
        notes, images = [], jobs.Job.images
        with patch.object(jobs.Job, "images", lambda job, note, *what: notes.append(note) or images(job, note, *what)):
            evaluate("--fid", a, b, "--resolution", 256, *flags)
        assert notes == ["features of A", "features of B"]
        # what cannot be compared is named in its order; a network that is not there costs an evaluation its rFID only
        small = os.path.join(tmp, "small.npz")
        np.savez(small, mu=np.zeros(5), sigma=np.eye(5))
        for pair, (one, two) in ((stats, small), (64, 5)), ((small, stats), (5, 64)):
            refused(evaluation.UserError, evaluate, "--fid", *pair, *flags,
                    says=f"{' and '.join(pair)} have no distance: covariances of {one, one} and {two, two}; take the "
                    "features of one network")
        gone = os.path.join(tmp, "gone.pth")
        why = (f"--inception {gone}: no such file, and no URL; give pytorch-fid's file, or leave it out to download "
               "it")
        refused(evaluation.UserError, evaluate, "--fid", a, b, "--inception", gone, says=why)
        weights = tokenizer_file(tmp)
        refused(evaluation.UserError, evaluate, "--data", a, "--weights", weights, "--inception", gone,
                says=why + "; or leave rFID and IS out: --inception none")
        one = os.path.join(a, "class1")
        refused(evaluation.UserError, evaluate, "--fid", a, one, "--resolution", 256, *flags,
                says=f"{one} holds 1 image; a covariance, and so an FID, needs at least 2 (or --inception none)")
        refused(evaluation.UserError, evaluate, "--data", one, "--weights", weights, *flags,
                says=f"{one} holds 1 image; a covariance, and so an FID, needs at least 2 (or --inception none)")


def as_latents(*flags):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report = latents.main([*map(str, flags), "--workers", "0"])
    return out.getvalue(), report


def test_whole_reports_of_latents():
    """What is printed, the file's configuration, index.json and what each file of latents says, at another size than
    the native one and in bf16, with mirrored ones and without."""
    with tempfile.TemporaryDirectory() as tmp, patch.object(latents, "SHARD", 2):
        weights, digest = of_a_run(tmp)
        stats, teacher = os.path.join(tmp, "stats.safetensors"), os.path.join(tmp, "teacher.safetensors")
        (a, _), (b, archive) = picture_folder(os.path.join(tmp, "a"), 2), picture_folder(os.path.join(tmp, "b"), 1)
        about = lambda path, digest: {"weights": path, "weights_sha256": digest, "step": 0, "teacher": teacher,
                                      "commit": "theirs", "data": [a, archive], "images": 3}
        printed = lambda path: [f"weights   {path}", "step      0", f"teacher   {teacher}", f"data      {a} {archive}",
                                "images    3"]
        given = ["--data", a, archive, "--size", 24, "--bf16"]
        said, report = as_latents("stats", "--weights", weights, "--out", stats, *given)
        protocol = "ADM centre crops to 24 px, bf16 autocast, per channel over images and positions"
        mean, std = (load_file(stats)[f"latent_{name}"].tolist() for name in ("mean", "std"))
        assert without_seconds(report) == {**about(weights, digest), "latent_mean": mean, "latent_std": std,
                                           "protocol": protocol, **circumstances()}, report
        assert said.splitlines() == [
            *printed(weights), f"protocol  {protocol}", "", "mean      " + " ".join(f"{x:.3f}" for x in mean),
            "deviation " + " ".join(f"{x:.3f}" for x in std),
            f"written to {stats}: its encode returns latents of mean 0 and deviation 1, and its decode undoes this"]
        assert encoder.read_config(stats) == {**encoder.read_config(weights), "latent_images": 3}
        digest = hashlib.sha256(open(stats, "rb").read()).hexdigest()
        for flip in False, True:
            out = os.path.join(tmp, f"flip{flip}")
            said, report = as_latents("save", "--weights", stats, "--out", out, *given, *["--flip"] * flip)
            assert without_seconds(report) == {**about(stats, digest), **circumstances()}, report
            assert said.splitlines() == [*printed(stats), "", "3 normalised latents with labels"
                                         + " and mirrored ones" * flip + f" in {out}, 2 files of 2 written now"], said
            names = hashlib.sha256(json.dumps([a, archive]).encode() + b"class0/0.pngclass1/1.pngclass0/0.png")
            read = data.ImageDataset([a, archive], 24, False)
            names.update(np.array([12, 24, 36]).tobytes() + read.spans.tobytes())
            made_of = {"weights_sha256": digest, "data_sha256": names.hexdigest(), "images": 3, "size": 24,
                       "dtype": "torch.bfloat16", **({"flip": True} if flip else {})}
            assert json.load(open(os.path.join(out, "index.json"))) == {
                **made_of, **about(stats, digest), "classes": ["class0", "class1"], "shard": 2,
                "protocol": "ADM centre crops to 24 px, bf16 autocast"}
            for k, rows in enumerate((2, 1)):
                path = os.path.join(out, f"latents_{k:05d}.safetensors")
                with safe_open(path, "pt") as f:
                    assert json.loads(f.metadata()["config"]) == {**made_of, "first": 2 * k}
                held = {name: tuple(x.shape) for name, x in load_file(path).items()}
                assert held == {"latents": (rows, 8, 6, 6), "labels": (rows,), **({"mirrored": (rows, 8, 6, 6)}
                                                                                  if flip else {})}
            set_ = latents.LatentDataset(out, False)
            assert [set_.path(n) for n in range(3)] == [os.path.join(out, f"latents_0000{n // 2}.safetensors[{n % 2}]")
                                                        for n in range(3)]
            assert [set_[n][1] for n in range(3)] == set_.labels.tolist() == [0, 1, 0] and set_.about["images"] == 3


def test_what_sample_says_of_each_picture():
    """Its first line by --weights and --size; then for each file: result, latent, compression, PSNR and SSIM of the
    pixels in the result, seconds."""
    from skimage.metrics import structural_similarity
    with tempfile.TemporaryDirectory() as tmp:
        weights, out = tokenizer_file(tmp), os.path.join(tmp, "out")
        wide, moving = os.path.join(tmp, "wide.png"), clip(os.path.join(tmp, "moving.webp"))
        picture(0, 50, 30).save(wide)
        shorts = {None: ("short side 16 px", (16, 27)), 20: ("short side 20 px", (20, 33)),
                  0: ("original size", (30, 50))}
        for size, (words, (H, W)) in shorts.items():
            flags = ["--weights", weights, "--out", out] + ["--size", size] * (size is not None)
            status, said, err = sampled(wide, *flags)
            panels = pixels(os.path.join(out, "wide_recon.png"))[0][0]
            assert panels.shape == (H, 3 * W, 3)
            x, rec = (panels[:, k * W:(k + 1) * W] / 255 for k in (0, 1))
            assert np.array_equal(panels[:, 2 * W:], np.minimum(4 * np.abs(panels[:, :W] - panels[:, W:2 * W]), 255))
            h, w = math.ceil(H / 4), math.ceil(W / 4)
            ssim = structural_similarity(x, rec, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
                                         use_sample_covariance=False)
            line = (f"{out}/wide_recon.png: latent 8x{h}x{w} | {3 * H * W / (8 * h * w):.1f}x | PSNR "
                    f"{-10 * np.log10(((x - rec) ** 2).mean()):.2f} dB | SSIM {ssim:.4f} | N s")
            told = re.sub(r"\d+\.\d\d s$", "N s", said, flags=re.M).splitlines()
            assert (status, err) == (0, "") and told == [f"weights {weights}, {words}, on cpu", line], said
        status, said, err = sampled(moving, *flags)
        frames = pixels(os.path.join(out, "moving_recon.webp"))[0] / 255
        each = [-10 * np.log10(((f[:, :40] - f[:, 40:]) ** 2).mean()) for f in frames]
        assert frames.shape == (4, 30, 80, 3) and re.sub(r"\d+\.\d\d s$", "N s", said.splitlines()[1]) == (
            f"{out}/moving_recon.webp: 4 frames, latent 8x8x10 | {3 * 30 * 40 / (8 * 80):.1f}x | PSNR "
            f"{np.mean(each):.2f} dB on average | N s"), said
        # a latent of it: no pixels to compare with
        z = os.path.join(tmp, "new", "z.safetensors")
        assert sampled(moving, *flags, "--save_latent", z)[0] == 0
        with safe_open(z, "pt") as f:
            assert json.loads(f.metadata()["config"]) == {
                "weights_sha256": evaluation.sha256(weights), "height": 30, "width": 40,
                "file": {"format": "WEBP", "duration": [100, 50, 70, 200], "loop": 2}}
        said = sampled(z, "--weights", weights, "--out", out)[1]
        assert re.sub(r"\d+\.\d\d s$", "N s", said.splitlines()[1]) == (
            f"{out}/z_recon.webp: 4 frames, latent 8x8x10 | N s"), said
        # the clock is that of the networks alone
        clock = iter([5.0, 7.25])
        with patch("time.perf_counter", lambda: next(clock)):
            assert sampled(wide, *flags)[1].endswith(" | 2.25 s\n")


def test_what_training_says_of_itself():
    """Every line of a run that trains, of one that goes on, and of one that is finished, from its log and its files."""
    with tempfile.TemporaryDirectory() as tmp:
        teacher, (folder, _), (val, _) = micro_teacher(tmp), picture_folder(tmp), picture_folder(tmp + "/val", 3)
        out = os.path.join(tmp, "my out")
        state, model = os.path.join(out, "state.pt"), os.path.join(out, "model.safetensors")
        # parameters by hand: the ViT's of width 32, three blocks, MLP 64, patches of 4, grid 4; projections; decoder
        block = lambda mlp: 4 * 32 + 4 * (32 * 32 + 32) + 2 * 32 * mlp + mlp + 32
        student = 32 + 17 * 32 + 32 * 49 + 3 * block(64) + 64 + 32 * 33 + 33 * 8
        head = 96 * (48 + 1 + 256 + 1 + 97 + 33) + 2 * (2 * 96 + 5 * 96 * 97) + 2 * 96 * 97 + 97 * 48
        module = encoder.Encoder(encoder.ViT(encoder.teacher_config(teacher)), 8)
        assert sum(x.numel() for x in module.parameters()) == student
        dec = 32 * 9 + 32 * 33 + 2 * 16 * 32 + block(128) + head

        def lines(*flags):
            said = train_quietly("--teacher", teacher, "--out", out, "--lr", 1e-3, "--warmup", 4, *flags)
            return re.sub(r"[\d,.]+ img/s", "N img/s", said).splitlines()
        begun = lambda n, on, steps, rest: [
            f"data: {n} at 16 px; evaluation on {on}", f"model: student of {student / 1e6:.1f}M and decoder of "
            f"{dec / 1e6:.1f}M parameters; latent 8x4x4", f"run: {steps} steps of 4 = micro-batch {rest} x 1 rank on "
                                                          f"cpu"]

        def trained(step, total):
            x, = (x for x in log_lines(out, timing=True) if x["step"] == step and "loss" in x)
            three = lambda name: " ".join(f"{v:.3f}" for v in x[name])
            assert x["lr"] == 1e-3 * step / 4 and x["memory_gib"] is None and x["skipped"] == 0
            return (f"step {step:6d}/{total} | loss {x['loss']:.4f} | flow {x['loss_flow']:.4f} | dist "
                    f"{x['loss_dist']:.4f} | alpha {three('alpha')} | w {three('weight')} | grad {x['grad_norm']:.2f} "
                    f"| lr {x['lr']:.1e} | N img/s | {x['tflops_per_gpu']:.1f} TFLOP/s | eta 00:00")

        def evaluated(step, on):
            x, = (x for x in log_lines(out) if x["step"] == step and x.get("kind") == "eval")
            assert x["on"] == on
            return (f"eval {step:6d} | one-step PSNR {x['psnr']:.2f} dB on {on} | flow loss by tenth of t, image to "
                    "noise: " + " ".join(f"{v:.3f}" for v in x["flow_by_t"]))
        end = (f"done: {model}, pictures in {out}/samples; try: python sample.py YOUR.png --weights '{model}'")
        two = f"{val} {folder}"
        said = lines("--data", folder, "--val", val, folder, "--steps", 2, "--micro_batch", 3)
        assert said == [*begun("10 images", two, 2, "2 x accumulation 2"),
                        "micro_batch 3 does not divide a rank's share of 4: using 2", trained(1, 2), trained(2, 2),
                        evaluated(2, two), end], said
        done = f"the run is finished: {model}; to extend it, the same command with "
        again = ["--data", folder, "--val", val, folder, "--micro_batch", 9]  # more than the batch: nothing to say
        ready = begun("10 images", two, 2, "4 x accumulation 1") + [f"resumed from {state} at step 2"]
        assert lines(*again, "--steps", 2) == [*ready, done + "--steps 4"]
        ready[2] = ready[2].replace("run: 2", "run: 1")
        assert lines(*again, "--steps", 1) == [*ready, done + "--steps 4"], "shorter than what is there"
        # a model of another step is written again; the drawn pictures have no names
        config = encoder.read_config(model)
        encoder.write_model(model, {**config, "step": 1}, load_file(model))
        said = lines(*again, "--steps", 3)
        assert said == [*begun("10 images", two, 3, "4 x accumulation 1"), f"resumed from {state} at step 2",
                        f"{model} is not of that step (it is of 1): it is written again", trained(3, 3),
                        evaluated(3, two), end], said
        os.remove(model)
        # 12 samples so far, of 10 pictures: twice as many are 2.4 epochs
        assert lines(*again, "--epochs", 1) == [
            *begun("10 images", two, 2, "4 x accumulation 1"), f"resumed from {state} at step 3",
            f"{model} is not of that step (it is of none): it is written again", done + "--epochs 3"]
        shutil.rmtree(out)
        with patch.object(validation, "spread", lambda n, images=512: [0, 1]):
            said = lines("--steps", 1)
        assert said == [*begun("10,000 procedurally drawn pictures (no --data)", "other drawn pictures", 1,
                               "4 x accumulation 1"), trained(1, 1), evaluated(1, "other drawn pictures"), end], said


def test_a_line_of_a_run_on_a_gpu_and_of_one_that_skips():
    """All that a line can say, of four layers: the first, the third and the last are shown."""
    line = dict(step=1234, loss=2.34567, loss_flow=1.23456, loss_dist=0.98765, alpha=[0.1111, 9, 0.3333, 0.4444],
                weight=[0.5555, 9, 0.7777, 0.8888], grad_norm=12.345, lr=1.5e-4, img_s=99.96, tflops_per_gpu=345.67,
                memory_gib=56.78, skipped=7)
    start = ("step   1234/20000 | loss 2.3457 | flow 1.2346 | dist 0.9877 | alpha 0.111 0.333 0.444 | w 0.555 0.778 "
             "0.889"
             .replace("0.555", f"{0.5555:.3f}") + " | grad 12.35 | lr 1.5e-04 | ".replace("12.35", f"{12.345:.2f}"))
    assert train.as_text(line, 20000, 3723) == (
        start + "100.0 img/s | 345.7 TFLOP/s | 56.8 GiB | 7 steps skipped | eta 1:02:03")
    line.update(img_s=12345.6, memory_gib=None)
    assert train.as_text(line, 20000, 59) == start + "12,346 img/s | 345.7 TFLOP/s | 7 steps skipped | eta 00:59"
    line.update(img_s=100, memory_gib=0.04, skipped=0)
    assert train.as_text(line, 20000, 60) == start + "100 img/s | 345.7 TFLOP/s | 0.0 GiB | eta 01:00"
