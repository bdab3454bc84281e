"""downstream/generate.py by its command line: training, sampling, scoring, refusals."""
from tests.helpers import (  # first: it sets the environment that torch reads
    QuickInception, close, killed_in_step, log_lines, picture_folder, raises, refused, run, run_ranks, same_weights,
    tokenizer_file)

import contextlib
import glob
import io
import json
import math
import os
import tempfile
import unittest.mock

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file

import eval as evaluation
from downstream import generate, mar
from encoder import UserError, read_config, write_model
from experiments.generation import study
from tools.latents import LatentDataset
from tools.latents import main as save_latents
from tools.run import seed_step

SMALL = ["--set", "width=32", "depth=1", "heads=2", "--batch_size", "4", "--micro_batch", "2", "--workers", "0"]
SMALL_MAR = [*SMALL[:4], "head_width=32", "head_depth=1", "buffer=2", *SMALL[4:]]


def tokenizer(folder):
    """Path of a micro tokenizer with latent statistics: 8 channels on 4 x 4, images of 16 px."""
    path = os.path.join(folder, "tokenizer.safetensors")
    if os.path.exists(path):
        return path
    tokenizer_file(folder)
    config, tensors = read_config(path), load_file(path)
    tensors.update(latent_mean=torch.linspace(-1, 1, 8), latent_std=torch.linspace(0.5, 2, 8))
    write_model(path, config, tensors)
    return path


def latents(folder, weights):
    """Path of a folder of the latents of 10 pictures of 2 classes, with those of the mirrored pictures."""
    out = os.path.join(folder, "latents")
    if not os.path.exists(out):
        flags = "save", "--flip", "--out", out, "--data", picture_folder(folder)[0], "--weights", weights
        with contextlib.redirect_stdout(io.StringIO()):
            save_latents([*flags, "--workers", "0"])
    return out


def quietly(*flags):
    """What downstream.generate returns, and what it prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        return generate.main(list(map(str, flags))), out.getvalue()


def trained(folder, model, *flags):
    """Path of a run of 2 steps, as far as its flags leave it so."""
    weights, out = tokenizer(folder), os.path.join(folder, model)
    quietly("train", "--model", model, "--latents", latents(folder, weights), *(SMALL_MAR if "mar" in model else SMALL),
            "--steps", 2, "--lr", 1e-2, "--ema", 0.5, "--warmup", 0, "--out", out, *flags)
    return out, weights


def test_recipes_are_the_papers_and_mars():
    parse = lambda *flags: generate.parse_args(["train", "--latents", "x", *map(str, flags)])
    own, paper = parse("--model", "mar-l"), parse("--model", "mar-l", "--recipe", "paper")
    plain = parse("--model", "dit-xl")
    assert (own.epochs, own.batch_size, own.ema, own.weight_decay, own.clip) == (400, 2048, 0.9999, 0.02, 3.0)
    assert math.isclose(own.lr, 8e-4) and own.warmup_part * own.epochs == 100 and (own.beta1, own.beta2) == (0.9, 0.95)
    assert (paper.epochs, paper.batch_size, paper.ema) == (400, 1024, 0.999) and math.isclose(paper.lr, 1e-5)
    assert math.isclose(plain.lr, 2e-4) and (plain.batch_size, plain.weight_decay, plain.clip) == (1024, 0, 1.0)
    assert math.isclose(parse("--model", "mar-b", "--batch_size", 512).lr, 2e-4)
    assert parse("--model", "mar-b", "--batch_size", 512, "--lr", 3e-3).lr == 3e-3
    few = parse("--model", "mar-b", "--steps", 7)
    assert (few.steps, few.epochs) == (7, None)
    model = mar.MAR(mar.MARConfig(grid=4, classes=8, width=32, depth=1, heads=2, head_width=8, head_depth=1))
    decayed, plain = generate.build_optimizer(model, few).param_groups
    names = {id(p): k for k, p in model.named_parameters()}
    named = {names[id(p)] for p in decayed["params"]}
    assert decayed["weight_decay"] == 0.02 and plain["weight_decay"] == 0 and len(names) == sum(
        len(group["params"]) for group in (decayed, plain))
    assert {"encoder.0.qkv.weight", "encoder_pos", "class_embed.weight", "mask_token"} < named
    assert not [k for k in named if k.startswith("head.") or k.endswith("bias") or "norm" in k]


def test_training_resumes_exactly_and_averages_its_weights():
    with tempfile.TemporaryDirectory() as tmp:
        for model in ("mar-s", "dit-s"):
            whole, _ = trained(tmp, model, "--steps", 5, "--save_every", 1, "--log_every", 1, "--eval_every", 0)
            killed = os.path.join(tmp, model + "-killed")
            flags = [model, "--steps", 5, "--save_every", 2, "--log_every", 1, "--eval_every", 0, "--out", killed]
            with killed_in_step(generate, 4):
                trained(tmp, *flags)
            assert torch.load(os.path.join(killed, "state.pt"))["step"] == 2
            trained(tmp, *flags)
            assert log_lines(killed) == log_lines(whole) and len(log_lines(whole)) == 5
            a, b = (torch.load(os.path.join(folder, "state.pt")) for folder in (whole, killed))
            for part in ("model", "averaged"):
                assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), f"{model}: {part} differs"
            assert same_weights(*(os.path.join(folder, "model.safetensors") for folder in (whole, killed)))
            assert all(torch.equal(a["averaged"][k], x)
                       for k, x in load_file(os.path.join(whole, "model.safetensors")).items())
            # averages: a <- d a + (1 - d) w, d = min(0.5, (step + 1) / (step + 10)), from the first weights
            states, out = [], os.path.join(tmp, model + "-averaged")
            for steps in (1, 2):
                trained(tmp, model, "--steps", steps, "--eval_every", 0, "--out", out)
                states.append(torch.load(os.path.join(out, "state.pt")))
            torch.manual_seed(0)
            config = {k: v for k, v in states[0]["config"]["config"].items()}
            first = dict(generate.sampling.build(model, **config).named_parameters())
            for k, w0 in first.items():
                once = 0.1 * w0 + 0.9 * states[0]["model"][k]
                close(states[0]["averaged"][k], once, 1e-4)
                close(states[1]["averaged"][k], 2 / 11 * once + 9 / 11 * states[1]["model"][k], 1e-4)


def test_two_ranks_train_on_their_shares():
    with tempfile.TemporaryDirectory() as tmp:
        weights, out = tokenizer(tmp), os.path.join(tmp, "two")
        folder = latents(tmp, weights)
        done = run_ranks(2, "python", "-m", "downstream.generate", "train", "--model", "mar-s", "--latents", folder,
                         *SMALL_MAR, "--steps", "1", "--out", out)
        assert all(x.returncode == 0 for x in done), done
        line, = log_lines(out)
        data, losses = LatentDataset(folder, True, 0), []
        torch.manual_seed(0)
        config = torch.load(os.path.join(out, "state.pt"))["config"]["config"]
        model = generate.sampling.build("mar-s", **config)
        for rank in range(2):  # the batch of 4 is samples 0, 1 and 2, 3
            x, y = zip(*(data[n] for n in (2 * rank, 2 * rank + 1)))
            seed_step(0, 0, rank)
            loss = model(torch.stack(x).float(), torch.tensor(y))
            (loss / 2).backward()
            losses.append(loss.item())
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        assert math.isclose(line["loss"], sum(losses) / 2, rel_tol=1e-4), (line, losses)
        assert math.isclose(line["grad_norm"], norm, rel_tol=1e-3), (line, norm)


def test_images_depend_on_seed_class_and_number_alone():
    with tempfile.TemporaryDirectory() as tmp:
        for model in ("mar-s", "dit-s"):
            out, weights = trained(tmp, model)
            sample = ["sample", "--run", out, "--number", 3, "--cfg", 2, "--steps", 3]
            if model == "mar-s":
                sample += ["--iterations", 5]
            else:
                for command in sample, ["score", "--run", out]:
                    refused(UserError, quietly, *command, "--iterations", 5, says=(
                        f"--iterations 5 is MAR's, and {out} is a dit-s: leave it out; a DiT's number of steps is "
                        "--steps"))
                quietly(*sample, "--iterations", 256, "--save", os.path.join(tmp, "default.png"))
            found = {}
            for batch in (1, 16):
                path = os.path.join(tmp, f"{model}-{batch}.npz")
                _, said = quietly(*sample, "--batch_size", batch, "--save", path)
                found[batch] = np.load(path)
            images = found[1]["arr_0"].astype(int)
            assert images.shape == (6, 16, 16, 3) and found[1]["arr_1"].tolist() == [0, 0, 0, 1, 1, 1]
            assert np.abs(images - found[16]["arr_0"]).max() <= 1 and (images == found[16]["arr_0"]).mean() > 0.999
            assert all(np.abs(images[i] - images[j]).max() > 8 for i in range(6) for j in range(i)), "all are different"
            folder = os.path.join(tmp, model + "-images")
            flags = [*map(str, sample), "--batch_size", "2", "--classes", "1", "--save", folder]
            if model == "mar-s":
                done = run_ranks(2, "python", "-m", "downstream.generate", *flags)
                assert all(x.returncode == 0 for x in done) and "3 images of 1 classes" in done[0].stdout, done
            else:
                quietly(*flags)
            files = [os.path.join(folder, "0001-class1", f"{k:05d}.png") for k in range(3)]
            assert sorted(glob.glob(os.path.join(folder, "**", "*.png"), recursive=True)) == files
            for k, file in enumerate(files):
                assert np.abs(np.asarray(Image.open(file)).astype(int) - images[3 + k]).max() <= 1
            raises(UserError, quietly, *flags, words="no empty folder")
            quietly(*sample, "--save", os.path.join(tmp, "grid.png"))
            grid = np.asarray(Image.open(os.path.join(tmp, "grid.png"))).astype(int)
            assert grid.shape == (2 * 30, 3 * 16, 3) and np.abs(grid[44:60, 16:32] - images[4]).max() <= 1
            assert (grid[:14] < 128).any() and (grid[30:44] < 128).any(), "a label above each row"
            path = os.path.join(tmp, "other.npz")
            quietly(*sample, "--seed", 1, "--save", path)
            assert np.abs(images - np.load(path)["arr_0"]).max() > 8
            quietly(*sample, "--resolution", 8, "--save", path)
            assert np.load(path)["arr_0"].shape == (6, 8, 8, 3)
        assert sorted(os.listdir(os.path.join(out, "samples"))) == ["step_0000002.png"]
        assert not glob.glob(os.path.join(tmp, "*.part"))


class InceptionOfFiles(QuickInception):
    """It takes images as a picture file holds them."""

    def forward(self, img):
        assert (255 * img - (255 * img).round()).abs().max() < 1e-3, "not rounded"
        return super().forward(img)


def test_score_is_the_distance_of_its_own_images():
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(evaluation, "InceptionV3", InceptionOfFiles):
        out, weights = trained(tmp, "dit-s")
        statistics, report = os.path.join(tmp, "reference.npz"), os.path.join(tmp, "report.json")
        rng = np.random.default_rng(0)
        mu, sigma = rng.normal(size=64), np.diag(rng.uniform(0.5, 2, 64))
        np.savez(statistics, mu=mu, sigma=sigma)
        score = ["score", "--run", out, "--steps", 2, "--inception", weights, "--batch_size", 8, "--workers", 0]
        result, said = quietly(*score, "--reference", statistics, "--images", 21, "--sweep", 20, "--cfg", 1, 4,
                               "--out", report)
        assert [(r["cfg"], r["images"]) for r in result["results"]] == [
            (1, 20), (4, 20), (min(result["results"][:2], key=lambda r: r["gfid"])["cfg"], 21)]
        for row in result["results"]:
            path = os.path.join(tmp, "images.npz")
            quietly("sample", "--run", out, "--steps", 2, "--number", 11, "--cfg", row["cfg"], "--save", path)
            numbers = [11 * (i % 2) + i // 2 for i in range(row["images"])]  # image i is of class i mod 2
            img = torch.tensor(np.load(path)["arr_0"][numbers]).permute(0, 3, 1, 2) / 255
            pool, logits = QuickInception("")(img)
            pool = pool.double().numpy()
            both = scipy.linalg.sqrtm(np.cov(pool.T) @ sigma)
            distance = ((pool.mean(0) - mu) ** 2).sum() + np.trace(np.cov(pool.T) + sigma - 2 * both.real)
            assert math.isclose(row["gfid"], distance, rel_tol=1e-4), (row, distance)
            assert math.isclose(row["is"], evaluation.inception_score(logits)[0], rel_tol=1e-4)
        assert "image i of class i mod 2" in said and "temperature 1" in said and json.load(open(report))["step"] == 2
        pictures, _ = picture_folder(tmp)
        assert "; IS in 10 splits by a fixed permutation" in result["protocol"]
        few = quietly(*score, "--reference", statistics, "--images", 7)[0]["protocol"]
        assert "; IS in 7 splits by a fixed permutation" in few, few
        result, _ = quietly(*score, "--reference", pictures, "--images", 12)
        assert len(result["results"]) == 1 and "10 images" in result["protocol"] and result["results"][0]["gfid"] > 0


def test_latents_of_the_studys_pca_are_those_of_tools_latents():
    img = torch.rand(40, 3, 16, 16)
    coder = study.PCA([img[:20], img[20:]], p=8, channels=16)
    mean, basis = evaluation.fit_patch_pca([img], 8, 16)
    z = coder.encode(img)
    close(coder.decode(z), evaluation.patch_pca(img, mean, basis, 8).float(), 1e-4)
    assert z.shape == (40, 16, 2, 2)
    close(z.transpose(0, 1).flatten(1).std(1), torch.ones(16), 1e-3)
    with tempfile.TemporaryDirectory() as tmp:
        pictures, labels = (255 * img).to(torch.uint8), torch.arange(40) % 2
        study.save_pca(coder, tmp, pictures, labels, ["a", "b"], torch.device("cpu"))
        data = LatentDataset(tmp, False)
        assert len(data) == 40 and [data[i][1] for i in range(4)] == [0, 1, 0, 1]
        close(data[7][0], coder.encode(pictures[7:8] / 255)[0])
    assert len(set(study.JUDGE_CLASSES)) == 100 and study.JUDGE_CLASSES == sorted(study.JUDGE_CLASSES)


def test_a_resume_of_generation_needs_no_init():
    """state.pt alone has all weights: the released checkpoint is read at the start only."""
    with tempfile.TemporaryDirectory() as tmp:
        started = []
        with unittest.mock.patch.object(generate.mar, "load_released", lambda model, path: started.append(path) or []):
            for steps in 1, 2:
                out, _ = trained(tmp, "mar-s", "--init", "theirs.pth", "--steps", steps)
                assert torch.load(os.path.join(out, "state.pt"))["step"] == steps and started == ["theirs.pth"]


def test_generation_refuses_what_is_wrong():
    with tempfile.TemporaryDirectory() as tmp:
        out, weights = trained(tmp, "dit-s")
        folder, other = latents(tmp, weights), os.path.join(tmp, "other.safetensors")
        write_model(other, read_config(weights), {k: 2 * x for k, x in load_file(weights).items()})
        train = ["train", "--model", "dit-s", *SMALL, "--steps", 3, "--ema", 0.5, "--warmup", 0, "--lr", 1e-2]
        sample = ["sample", "--run", out, "--steps", 1, "--save", os.path.join(tmp, "x.png")]
        for flags, words in [
                ([*sample, "--weights", other], "is not the tokenizer of"),
                ([*sample, "--classes", 0, 2], "--classes 2: " + out + " has 2 classes, 0 (class0) to 1 (class1)"),
                ([*sample, "--classes", -1], "--classes -1"),
                (["sample", "--run", tmp], "no such file"),
                (["sample", "--run", weights], "no generator of this project"),
                ([*train, "--latents", folder, "--weights", other, "--out", out], "is not the tokenizer of"),
                ([*train, "--latents", folder, "--set", "depths=3"], "--set depths=3: it takes FIELD=VALUE"),
                ([*train, "--latents", folder, "--set", "heads=5"], "cannot be built"),
                ([*train, "--latents", os.path.join(tmp, "pictures")], "these latents are not complete"),
                ([*train, "--latents", "none"], "none: no such folder of latents; `python -m tools.latents save`"),
                (["score", "--run", out, "--reference", "none.npz", "--inception", weights], "none.npz: no such")]:
            with unittest.mock.patch.object(evaluation, "InceptionV3", QuickInception):
                raises(ValueError, quietly, *flags, words=words)
        bare = os.path.join(tmp, "bare")
        os.makedirs(bare)
        plain = tokenizer_file(bare)  # without statistics
        pictures, _ = picture_folder(tmp)
        raises(UserError, quietly, *train, "--data", pictures, "--weights", plain,
               words=f"has no latent statistics yet: python -m tools.latents stats --data {pictures} --weights {plain}")
        quietly(*train, "--data", pictures, "--weights", weights, "--out", os.path.join(tmp, "images"))  # on the fly
        raises(UserError, quietly, *train, "--data", pictures, "--weights", weights, "--size", 18, words=(
            f"--size 18 is no multiple of the patch 4 of {weights}: try --size 16"))
        reference = os.path.join(tmp, "statistics.npz")
        with open(reference, "w") as f:
            f.write("kept")
        refused(UserError, quietly, "score", "--run", out, "--reference", reference, "--out", reference,
                says=f"{reference} would be read and overwritten: give another name")
        assert open(reference).read() == "kept"
        info = generate.sampling.load_generator(os.path.join(tmp, "images"), "cpu")[1]
        assert info["classes"] == ["class0", "class1"] and info["size"] == 16 and info["config"]["channels"] == 8
        for flags, words in [(["train", "--model", "dit-s"], "give --latents"),
                             (["train", "--latents", "x", "--ema", "1"], "argument --ema: it is 1"),
                             *((["bench", "--model", "dit-s", "--cfg", x], f"argument --cfg: it is {x}")
                               for x in ("inf", "nan", "-1")),
                             (["train", "--latents", "x", "--set", "grid=4"], "are those of the latents"),
                             (["sample", "--run", out, "--number", "0"], "argument --number: it is 0"),
                             (["train", "--latents", "x", "--init", "y"], "--init starts a MAR")]:
            done = run("python", "-m", "downstream.generate", *flags)
            assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done
