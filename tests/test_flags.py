"""Every flag of every script changes the quantity that it names, by what it says."""
from tests.helpers import (  # first: it sets the environment that torch reads when it is imported
    HERE, MICRO_VIT, QuickInception, close, evaluate, log_lines, micro_teacher, picture, picture_folder,
    raises, tokenizer_file, train_quietly)

import argparse
import contextlib
import glob
import io
import itertools
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
import types
import unittest.mock
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import data
import decoder
import encoder
import eval as evaluation
import sample
import train
from tools.drawn import ProceduralDataset

MEAN, STD = np.array((0.485, 0.456, 0.406))[:, None, None], np.array((0.229, 0.224, 0.225))[:, None, None]

# The test that checks the quantity behind each flag. A new flag needs a line here, and so a test.
CHECKED = {
    "train.py": {
        "test_losses_and_clipping": "lambda_d lambda_f clip decoder",
        "test_data_flags_of_training": "data val seed crop_scale size batch_size",
        "test_flags_of_the_optimizer": "lr weight_decay encoder_lr_scale beta1 beta2 warmup decay_shape ema",
        "test_learning_rate_decay": "lr_decay",
        "test_flags_of_the_networks": "teacher teacher_weights latent_dim projector gtb_depth flow_depth flow_width "
                                      "freeze_encoder drop_path endpoint",
        "test_options_of_the_method": "strategy beta init",
        "test_recipes_by_hand": "recipe",
        "test_flags_of_the_machine": "workers micro_batch compile no-compile checkpoint_activations",
        "test_flags_of_the_output": "out log_every eval_every save_every keep_every steps epochs",
        "test_training_goes_on_without_bad_pictures": "max_bad_images",
        "test_learning_rate_decay ": "resume_anyway"},
    "eval.py": {
        "test_flags_of_eval": "data weights size steps seed batch_size bf16 out resolution workers",
        "test_the_probe_sees_the_right_tokens_and_labels": "fit probe",
        "test_the_probes_teacher_is_the_one_named": "teacher teacher_weights",
        "test_eval_measures_the_pca_of_fit": "pca",
        "test_fid_between_anything": "fid inception",
        "test_fid_statistics_by_numpy": "save_stats"},
    "sample.py": {
        "test_sample_against_numpy": "size steps seed save_latent",
        "test_train_sample_eval_end_to_end": "out",
        "test_reconstructions_alone": "reconstruction",
        "test_sample_decodes_what_it_saved": "weights",
        "test_sample_features_are_principal_components": "features"},
}


# What a command does that does not say otherwise: the paper's and the README's values, by hand.
DEFAULTS = {
    "train.py": dict(data=None, val=None, crop_scale=[0.8, 1.0], max_bad_images=0.01, teacher="tiny",
                     teacher_weights=None, init=None, projector="mlp",
                     decoder="flow", strategy="adaptive", beta=2.0, lambda_d=1.0, lambda_f=1.0, freeze_encoder=False,
                     encoder_lr_scale=1.0,
                     weight_decay=0.0, clip=1.0, decay_shape="linear", ema=0.0,
                     drop_path=0.0, seed=0, checkpoint_activations=False, out="out", log_every=50, eval_every=1000,
                     save_every=1000, keep_every=None, resume_anyway=False, compile=False, workers=1),
    "eval.py": dict(weights=None, fit=None, pca=False, probe=False, teacher=None, teacher_weights=None,
                    fid=None, save_stats=None, size=None, resolution="native", steps=1, seed=0, batch_size=32,
                    bf16=False, out=None,
                    inception="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                              "pt_inception-2015-12-05-6726825d.pth"),
    "sample.py": dict(weights=None, size=None, steps=1, seed=0, out=None, reconstruction=False, save_latent=None,
                      features=False)}
# Tables 6-9 of the paper; on the batch its text. AdamW, times and rate of the two recipes; what is ours: sizes, rates.
FOUNDATION = dict(latent_dim=64, gtb_depth=6, flow_depth=12, flow_width=1024, lr=2e-4, batch_size=512, micro_batch=32,
                  epochs=30, steps=None)
OURS = dict(size=64, latent_dim=16, gtb_depth=3, flow_depth=6, micro_batch=256, steps=20_000, epochs=None)
TEACHERS = {
    "internvit": dict(FOUNDATION, size=448), "internvit-v2_5": dict(FOUNDATION, size=448),
    "dinov2": dict(FOUNDATION, size=378), "dinov2-reg": dict(FOUNDATION, size=378),
    "siglip2": dict(FOUNDATION, size=256, micro_batch=64, flow_width=1152),
    "siglip2-l": dict(FOUNDATION, size=256, micro_batch=64), "clip": dict(FOUNDATION, size=224, micro_batch=128),
    "small": dict(OURS, flow_width=512), "tiny": dict(OURS, flow_width=384)}
RECIPES = {"paper": dict(recipe="paper", beta1=0.5, beta2=0.95, endpoint=0.0, lr_decay=0.0, warmup=0),
           "fast": dict(recipe="fast", beta1=0.9, beta2=0.95, endpoint=0.9, lr_decay=0.5, warmup=100)}
OUR_RATES = {("small", "paper"): (5e-4, 256), ("small", "fast"): (1e-3, 128),
             ("tiny", "paper"): (1e-3, 256), ("tiny", "fast"): (2e-3, 128)}  # lr and batch


def test_defaults_and_recipes_by_hand():
    parsed = {"train.py": train.parse_args([]), "eval.py": evaluation.parse_args(["--data", "x"]),
              "sample.py": sample.parse_args(["x.png"])}
    for script, expected in DEFAULTS.items():
        found = {k: getattr(parsed[script], k) for k in expected}
        assert found == expected, (script, {k for k in expected if found[k] != expected[k]})
    for flag, low in (("--steps", 0), ("--batch_size", 0), ("--latent_dim", 0), ("--flow_width", 0), ("--log_every", 0),
                      ("--micro_batch", 0), ("--epochs", 0), ("--size", 0), ("--flow_depth", 0),
                      ("--lr", -1), ("--beta", -1), ("--lambda_f", -1), ("--seed", -1), ("--weight_decay", -1),
                      ("--endpoint", 1.5), ("--endpoint", -0.1), ("--lambda_d", "nan"), ("--clip", -0.5),
                      ("--workers", -1), ("--gtb_depth", -1), ("--warmup", -1), ("--encoder_lr_scale", -1),
                      ("--eval_every", -1), ("--save_every", -1), ("--keep_every", -1),
                      ("--lr_decay", 1.1), ("--drop_path", 0.95), ("--max_bad_images", 2)):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                train.parse_args([flag, str(low)])
                raise AssertionError(f"{flag} {low} was accepted")
            except SystemExit as e:
                assert e.code == 2 and f"argument {flag}: it is {low}; it must be at least" in said.getvalue()


def test_recipes_by_hand():
    """What each teacher and recipe stands for, with and without a GPU alike; a flag that is given wins over both."""
    for gpu in True, False:
        with unittest.mock.patch.object(torch.cuda, "is_available", lambda: gpu):
            for name, recipe in itertools.product(TEACHERS, ("paper", "fast", None)):
                chosen = recipe or ("fast" if name in ("small", "tiny") else "paper")
                expected = {**TEACHERS[name], **RECIPES[chosen]}
                expected.update(zip(("lr", "batch_size"), OUR_RATES.get((name, chosen), (2e-4, 512))))
                given = ["--teacher", name, "--data", "x"] + ["--recipe", recipe] * bool(recipe)
                found = vars(train.parse_args(given))
                differ = {k: (found[k], x) for k, x in expected.items() if found[k] != x}
                assert not differ, (gpu, name, recipe, differ)
                assert found["compile"] == gpu, "where there is a GPU"
                if name in ("small", "tiny"):  # without --data a short trial, by the same method
                    found = vars(train.parse_args([x for x in given if x not in ("--data", "x")]))
                    expected.update(steps=300, batch_size=16)
                    assert {k: found[k] for k in expected} == expected, (gpu, name, recipe)
            flags = dict(beta1=0.7, beta2=0.8, endpoint=0.25, lr_decay=0.125, warmup=7, lr=0.5, batch_size=48, steps=9)
            for given in [], ["--recipe", "paper"], ["--recipe", "fast"], ["--data", "x"]:
                found = vars(train.parse_args([*given, *(w for k, v in flags.items() for w in (f"--{k}", str(v)))]))
                assert {k: found[k] for k in flags} == flags, given
            zeros = vars(train.parse_args("--beta1 0 --beta2 0 --endpoint 0 --lr_decay 0 --warmup 0 --lr 0".split()))
            assert not any(zeros[k] for k in "beta1 beta2 endpoint lr_decay warmup lr".split()), "0 is a value, too"
    with tempfile.TemporaryDirectory() as tmp:  # a teacher of one's own has the paper's recipe at its own size
        teacher = micro_teacher(tmp)
        for flags, recipe in ([], "paper"), (["--recipe", "fast"], "fast"):
            expected = {**FOUNDATION, **RECIPES[recipe], "size": 16}
            found = vars(train.parse_args(["--teacher", teacher, *flags]))
            assert {k: found[k] for k in expected} == expected
        # a resume compares what the recipe stands for, not its name
        out = ["--teacher", teacher, "--out", os.path.join(tmp, "out")]
        train_quietly(*out, "--steps", 1)
        words = ["beta1 was 0.5, is now 0.9", "endpoint was 0.0, is now 0.9", "lr_decay was 0.0, is now 0.5",
                 "warmup was 0, is now 100"]
        raises(encoder.UserError, train_quietly, *out, "--steps", 2, "--recipe", "fast", words=words)
        same = "--recipe fast --beta1 0.5 --beta2 0.95 --endpoint 0 --lr_decay 0 --warmup 0".split()
        assert "resumed" in train_quietly(*out, "--steps", 2, *same)


class Stop(BaseException):
    """Ends a script at its parse_args."""


def options(script):
    """The option strings that the parser of a script knows."""
    def seen(self, args=None, namespace=None):
        raise Stop([s for action in self._actions for s in action.option_strings])
    with unittest.mock.patch.object(argparse.ArgumentParser,
                                    "parse_args", seen), unittest.mock.patch.object(sys, "argv", [script, "--x"]):
        try:
            {"train.py": train.parse_args, "eval.py": evaluation.parse_args, "sample.py": sample.parse_args,
             "data.py": lambda args: runpy.run_path(os.path.join(HERE, script), run_name="__main__")}[script]([])
        except Stop as e:
            return {s.removeprefix("--") for s in e.args[0]} - {"-h", "help"}


def test_every_flag_has_a_test_of_its_quantity():
    texts = "".join(open(path).read() for path in (os.path.join(HERE, "test_all.py"),
                                                   *glob.glob(os.path.join(HERE, "tests", "test_*.py"))))
    for script, tests in CHECKED.items():
        named = [flag for flags in tests.values() for flag in flags.split()]
        assert sorted(named) == sorted(options(script)), f"{script}: {set(named) ^ options(script)}"
        for test in tests:
            assert f"def {test.strip()}(" in texts, f"{test} is no test"


def trained(tmp, *flags):
    """A micro run in a folder of its own (without a val set): what it said, its log, its checkpoint and its model."""
    out = tempfile.mkdtemp(dir=tmp)
    said = train_quietly("--teacher", micro_teacher(tmp), "--steps", 1, "--out", out, *flags)
    lines, path = log_lines(out), os.path.join(out, "model.safetensors")
    return types.SimpleNamespace(
        out=out, said=said, lines=[x for x in lines if "loss" in x],
        evals=[x for x in lines if x.get("kind") == "eval"],
        state=torch.load(os.path.join(out, "state.pt"), weights_only=True), tensors=load_file(path),
        config=encoder.read_config(path))


def normalised(folder, numbers, size=16, **how):
    """Pictures of these sample numbers in training, as float64 (n, 3, S, S), in the normalised pixels of ImageNet's
    statistics."""
    read = data.ImageDataset(folder, size, train=True, **how)
    return np.stack([(read[n][0].numpy() / 255 - MEAN) / STD for n in numbers])


def bias_gradient(run):
    """Gradient of the flow head's last bias at the first step: Adam's first moment is (1 - beta1) = 0.5 of it."""
    moment, = (m["exp_avg"] for m in run.state["optimizer"]["state"].values() if m["exp_avg"].shape == (48,))
    return moment / 0.5


def test_losses_and_clipping():
    """An untrained head gives 0, so the regression's loss is the mean of x^2, and its gradient by the last bias -+2/48
    of the mean x over patches, times lambda_f, whatever the number of micro-batches; --clip 0 leaves it, --clip c
    scales the whole to c."""
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        flags = ["--data", folder, "--decoder", "pixel"]
        x = normalised(folder, range(4))
        by_hand = torch.tensor(2 / 48 * x.reshape(4, 3, 4, 4, 4, 4).mean((0, 2, 4)).flatten())
        for lambda_f, micro in ((1, 4), (3, 2), (0.25, 1)):
            run = trained(tmp, *flags, "--clip", 0, "--lambda_f", lambda_f, "--micro_batch", micro)
            close(bias_gradient(run).abs().double(), lambda_f * by_hand.abs(), 1e-4)
            line, = run.lines
            assert abs(line["loss_flow"] - (x ** 2).mean()) < 1e-4
            assert abs(line["loss"] - lambda_f * (x ** 2).mean()) < 1e-4 * lambda_f
        clipped = trained(tmp, *flags, "--clip", 0.01)
        close(bias_gradient(clipped).abs().double(), by_hand.abs() * 0.01 / clipped.lines[0]["grad_norm"], 1e-4)
        loose = trained(tmp, *flags, "--clip", 1000)
        close(bias_gradient(loose).abs().double(), by_hand.abs(), 1e-4)
        # the distillation alone, whose gradient at the first step is stochastic depth's, which is drawn alike; eq. 2
        # and eq. 6 from the log
        one, three = (trained(tmp, "--data", folder, "--lambda_f", 0, "--lambda_d", d, "--drop_path", 0.8,
                              "--clip", 0).lines[0] for d in (1, 3))
        norms = one["grad_norm"], three["grad_norm"]
        assert norms[0] > 1e-3 and abs(norms[1] / norms[0] - 3) < 1e-4, norms
        assert one["loss_dist"] == three["loss_dist"] and abs(three["loss"] / one["loss"] - 3) < 1e-9
        assert abs(one["loss_dist"] - np.dot(one["weight"], one["alpha"])) < 1e-6, "sum of w alpha"
        both = trained(tmp, "--data", folder, "--lambda_f", 0.5, "--lambda_d", 7, "--drop_path", 0.8).lines[0]
        assert abs(both["loss"] - 7 * one["loss_dist"] - 0.5 * both["loss_flow"]) < 1e-5 and both["loss_flow"] > 0.5


def test_data_flags_of_training():
    """The regression's first losses are the energies of the pictures that the flags ask for, in the order that the seed
    asks for."""
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        seen, starts = set(), []
        for size, seed, scale, batch in ((16, 0, (0.8, 1.0), 4), (16, 5, (0.8, 1.0), 4), (16, 0, (0.3, 0.4), 4),
                                         (24, 0, (0.8, 1.0), 4), (16, 0, (0.8, 1.0), 3)):
            run = trained(tmp, "--data", folder, "--decoder", "pixel", "--size", size, "--seed", seed, "--crop_scale",
                          *scale, "--batch_size", batch,
                          "--steps", 2, "--lr", 1e-12)
            expected = [(normalised(folder, range(k, k + batch), size, seed=seed, crop_scale=scale) ** 2).mean()
                        for k in (0, batch)]
            assert np.allclose([x["loss_flow"] for x in run.lines], expected, rtol=1e-4), (size, seed, scale, batch)
            assert run.state["samples"] == 2 * batch
            seen.add(run.lines[0]["loss_flow"])
            starts.append(torch.cat([run.tensors[k].flatten()
                                     for k in ("decoder.blocks.0.qkv.weight", "encoder.latent_down.0.weight")]))
        assert len(seen) == 5, "the example must tell the flags apart"
        same = [(starts[0] - other).abs().max() < 1e-9 for other in starts]
        assert same == [True, False, True, True,
                        True], "--seed, which the second run has another of, is the initialisation's, too"
        # drawn pictures, too; and --val: of another folder, against the mean colour, which an untrained regression
        # gives
        run = trained(tmp, "--decoder", "pixel", "--seed", 5)
        drawn = np.stack([ProceduralDataset(16, train=True, seed=5)[n][0].numpy() for n in range(4)])
        assert abs(run.lines[0]["loss_flow"] - (((drawn / 255 - MEAN) / STD) ** 2).mean()) < 1e-4
        val = os.path.join(tmp, "val")
        os.makedirs(val)
        for i in range(6):
            picture(50 + i).point(lambda v: v // 3).save(os.path.join(val, f"{i}.png"))

        def against_mean_colour(root):
            img = np.stack([x.numpy() for x, _ in data.ImageDataset(root, 16, train=False)]) / 255
            return np.mean([-10 * np.log10(((x - (255 * MEAN).round() / 255) ** 2).mean()) for x in img])
        for flags, root in ((["--val", val], val), ([], folder)):
            line, = trained(tmp, "--data", folder, *flags, "--decoder", "pixel", "--lr", 1e-12).evals
            assert abs(line["psnr"] - against_mean_colour(root)) < 1e-3, flags
        assert abs(against_mean_colour(val) - against_mean_colour(folder)) > 0.1
        # the mean colour is 123.7, 116.3, 103.5, rounded 124, 116, 104: off by one everywhere
        one = os.path.join(tmp, "one")
        os.makedirs(one), Image.new("RGB", (16, 16), (125, 117, 105)).save(os.path.join(one, "0.png"))
        line, = trained(tmp, "--data", folder, "--val", one, "--decoder", "pixel", "--lr", 1e-12).evals
        assert abs(line["psnr"] - 20 * np.log10(255)) < 1e-3, "rounded to what a file can hold"
        Image.new("RGB", (16, 16), (124, 116, 104)).save(os.path.join(one, "0.png"))
        line, = trained(tmp, "--data", folder, "--val", one, "--decoder", "pixel", "--lr", 1e-12).evals
        assert line["psnr"] == 100, "a perfect picture counts with 100 dB"


def test_flags_of_the_optimizer():
    """Adam's first step moves whatever has a gradient by exactly its learning rate; AdamW shrinks the other matrices by
    lr * decay."""
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        still = trained(tmp, "--data", folder, "--lr", 0).tensors
        moved = lambda run, key: (run.tensors[key] - still[key]).abs().double()
        run = trained(tmp, "--data", folder, "--lr", 3e-3)
        close(moved(run, "decoder.head.output.bias"), torch.full((48,), 3e-3).double(), 1e-2)
        plain, other = (trained(tmp, "--data", folder, "--beta1", b1, "--beta2", b2).state["optimizer"]["state"] for b1,
                        b2 in ((0.5, 0.95), (0.8, 0.6)))
        for i, m in plain.items():  # the moments are (1 - beta) times the gradient and its square
            if m["exp_avg"].norm() > 1e-6:
                close(other[i]["exp_avg"],
                      m["exp_avg"] * 0.2 / 0.5, 1e-4), close(other[i]["exp_avg_sq"], m["exp_avg_sq"] * 0.4 / 0.05, 1e-4)
        run = trained(tmp, "--data", folder, "--lr", 1e-3, "--warmup", 4)
        close(moved(run, "decoder.head.output.bias"), torch.full((48,), 1e-3 / 4).double(), 1e-2)
        rates = lambda *flags: [line["lr"] / 1e-3 for line in trained(tmp, "--data", folder, "--lr", 1e-3, "--steps", 4,
                                                                      "--eval_every", 0, *flags).lines]
        assert np.allclose(rates("--warmup", 3), [1 / 3, 2 / 3, 1, 1])
        assert np.allclose(rates("--lr_decay", 1, "--decay_shape", "cosine"),
                           [1, 0.5 + 2 ** 0.5 / 4, 0.5, 0.5 - 2 ** 0.5 / 4])
        assert np.allclose(rates("--lr_decay", 1), [1, 0.75, 0.5, 0.25])
        out, average = tempfile.mkdtemp(dir=tmp), still["decoder.head.output.weight"]
        # what is exported is the average: a <- d a + (1 - d) w, d = min(0.15, step / (step + 9))
        for step in (1, 2, 3):
            train_quietly("--teacher", micro_teacher(tmp), "--data", folder, "--out", out, "--ema", 0.15,
                          "--eval_every", 0, "--steps", step)
            state, d = torch.load(os.path.join(out, "state.pt"), weights_only=True), (0.1, 0.15, 0.15)[step - 1]
            average = d * average + (1 - d) * state["decoder"]["head.output.weight"]
            close(load_file(os.path.join(out, "model.safetensors"))["decoder.head.output.weight"], average, 1e-5)
        # a gradient for the ViT at the first step
        flags = ["--data", folder, "--lambda_f", 0, "--drop_path", 0.8, "--clip", 0, "--lr", 1e-3]
        for scale in (1, 0.1):
            run = trained(tmp, *flags, "--encoder_lr_scale", scale)
            most = max(moved(run, k).max().item() for k in still if k.startswith("encoder.vit."))
            assert abs(most / (scale * 1e-3) - 1) < 1e-2, f"the ViT moved by {most}, expected {scale} of 1e-3"
        run = trained(tmp, "--data", folder, "--lr", 1e-3, "--weight_decay", 0.5, "--encoder_lr_scale", 0.1,
                      "--lambda_d", 0)
        for key, x in still.items():  # at the first step, only the last layer has a gradient
            if key.startswith("decoder.head.output.") or key.startswith("latent_"):
                continue
            matrix = key.endswith("weight") and x.ndim in (2, 4)
            rate = (1e-4 if key.startswith("encoder.vit.") else 1e-3) * 0.5 * matrix
            assert torch.allclose(run.tensors[key], x * (1 - rate), rtol=1e-6, atol=1e-9), f"{key}: decays by {rate}"


def test_flags_of_the_networks():
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.dict(encoder.TEACHERS, micro=MICRO_VIT):
        folder, _ = picture_folder(tmp)
        teacher = load_file(micro_teacher(tmp))
        shapes = trained(tmp, "--data", folder, "--latent_dim", 5, "--gtb_depth", 3, "--flow_depth", 1,
                         "--flow_width", 40).tensors
        count = lambda pattern: len({m[1] for m in (re.match(pattern, k) for k in shapes) if m})
        assert (count(r"decoder\.blocks\.(\d+)"), count(r"decoder\.head\.blocks\.(\d+)")) == (3, 1)
        for key, shape in {"encoder.latent_down.2.weight": (5, 32), "decoder.latent_up.0.weight": (32, 5),
                           "decoder.head.input_proj.weight": (40, 48), "latent_mean": (5,)}.items():
            assert shapes[key].shape == shape, key
        linear = trained(tmp, "--data", folder, "--projector", "linear").tensors
        assert linear["encoder.latent_down.weight"].shape == linear["decoder.latent_up.weight"].mT.shape == (8, 32)
        # the student starts as its teacher, of the file that is named
        other = {k: v + 1 for k, v in teacher.items()}
        path = os.path.join(tmp, "other.safetensors")
        encoder.write_model(path, {"vit": asdict(MICRO_VIT)}, other)
        frozen = ["--data", folder, "--freeze_encoder", "--steps", 4]
        for flags, weights in ((["--teacher", path], other), (["--teacher", "micro", "--teacher_weights", path], other),
                               ([], teacher)):
            run = trained(tmp, *frozen, *flags)
            vit = {k.removeprefix("encoder.vit."): v for k, v in run.tensors.items() if k.startswith("encoder.vit.")}
            assert len(vit) > 30 and all(torch.equal(v, weights[k]) for k, v in vit.items()), flags
            still = trained(tmp, *frozen, *flags, "--lr", 0).tensors
            assert not torch.equal(run.tensors["encoder.latent_down.0.weight"],
                                   still["encoder.latent_down.0.weight"]), "the projection is trained"
            assert max(run.lines[-1]["alpha"]) < 1e-6, "and the teacher is the same"
        random = trained(tmp, *frozen, "--teacher", "micro", "--teacher_weights", "random")
        assert "RANDOM" in random.said and random.config["teacher_weights"] == "random"
        with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
            assert torch.equal(random.tensors["encoder.vit.pos_embed"],
                               encoder.load_teacher("micro", "random").pos_embed)
        # times and stochastic depth, as the networks see them
        times, rates, velocity, forward = [], set(), decoder.Decoder.velocity, encoder.ViT.forward

        def seen(self, x_t, t, c):
            if t.device.type != "meta":  # where FLOPs are counted
                times.append(t.detach().clone())
            return velocity(self, x_t, t, c)

        def seen_vit(self, img):
            rates.update({(self.training, self.drop_path)} if img.device.type != "meta" else ())
            return forward(self, img)
        with unittest.mock.patch.object(decoder.Decoder,
                                        "velocity", seen), unittest.mock.patch.object(encoder.ViT, "forward", seen_vit):
            for endpoint in (1, 0.5, 0):
                times.clear(), rates.clear()
                trained(tmp, "--data", folder, "--size", 32, "--endpoint", endpoint, "--drop_path", 0.3,
                        "--eval_every", 100)
                ends, others = (times[0] == 1).float(), times[0][times[0] < 1]
                assert times[0].shape == (4, 64) and abs(ends.mean() - endpoint) < 0.12, (endpoint, ends.mean())
                assert endpoint == 1 or 0.2 < others.mean() < 0.8 and len(others.unique()) > 100, "each patch its own"
            assert {rate for training,
                    rate in rates if training} == {0.3} and (False, 0.0) in rates, "the teacher is whole"


def test_flags_of_the_machine():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        workers, batches, compiled, recomputed, locks = [], [], [], [], []
        init, forward = DataLoader.__init__, encoder.Encoder.forward

        def loader(self, *args, **kw):
            workers.append(kw.get("num_workers", 0))
            init(self, *args, **kw)

        def seen(self, img):
            if img.device.type != "meta":  # where FLOPs are counted
                batches.append(len(img))
            return forward(self, img)

        def recompute(block, *args, **kw):
            recomputed.append(type(block).__name__)
            return block(*args)
        with contextlib.ExitStack() as stack:
            for where, name, instead in ((DataLoader, "__init__", loader), (encoder.Encoder, "forward", seen),
                                         (nn.Module, "compile", lambda self,
                                          **how: compiled.append(type(self).__name__)),
                                         (torch, "compile", lambda f, **how: f), (train, "check_locks", locks.append),
                                         (encoder, "checkpoint", recompute), (decoder, "checkpoint", recompute)):
                stack.enter_context(unittest.mock.patch.object(where, name, instead))
            trained(tmp, "--data", folder, "--workers", 2, "--micro_batch", 2, "--steps", 2, "--no-compile",
                    "--eval_every", 100)
            assert set(workers) == {2} and batches[:4] == [2] * 4, (workers, batches)
            assert locks == [4], "for the workers of training and of an evaluation, which live at the same time"
            assert not compiled and not recomputed, (compiled, recomputed)
            batches.clear()
            run = trained(tmp, "--data", folder, "--micro_batch", 3, "--compile", "--checkpoint_activations")
            assert batches[:2] == [2, 2] and "using 2" in run.said, "the largest divisor of 4 that is at most 3"
            assert sorted(compiled) == ["Block"] * 6 + ["FlowHead", "GlobalBlock"], compiled
            assert recomputed.count("Block") == 2 * 3 and {"GlobalBlock", "FlowHead"} <= set(recomputed), recomputed


def test_flags_of_the_output():
    with tempfile.TemporaryDirectory() as tmp:
        folder, _ = picture_folder(tmp)
        saved, replace_ = [], os.replace

        def seen(a, b, **how):
            replace_(a, b, **how)
            name = os.path.relpath(b, out)
            saved.append((name, torch.load(b, weights_only=True)["step"] if name == "state.pt" else
                          encoder.read_config(b)["step"] if name.endswith(".safetensors") else None))
        flags = ["--teacher", micro_teacher(tmp), "--data", folder, "--drop_path", 0.5, "--steps", 5]
        out = os.path.join(tmp, "each")
        train_quietly(*flags, "--out", out, "--eval_every", 100, "--save_every", 100)
        each = log_lines(out)[:5]
        out = os.path.join(tmp, "some")
        with unittest.mock.patch.object(os, "replace", seen):
            said = train_quietly(*flags, "--out", out, "--log_every", 2, "--eval_every", 3, "--save_every", 2,
                                 "--keep_every", 4)
        some = log_lines(out)
        training, judged = ([x for x in some if ("loss" in x) == kind] for kind in (True, False))
        assert [x["step"] for x in training] == [2, 4, 5] and [x["step"] for x in judged] == [3, 5]
        for line, steps in zip(training, (each[:2], each[2:4], each[4:])):
            for key in ("loss_flow", "loss_dist", "grad_norm", "alpha", "weight", "loss"):
                assert np.allclose(line[key],
                                   np.mean([x[key] for x in steps], axis=0),
                                   rtol=1e-6), f"{key}: the mean since the last line"
        models = [(name, step) for name, step in saved if name in ("state.pt", "model.safetensors")
                  or name.startswith("model_")]
        assert models == [("state.pt", 2), ("model.safetensors", 2), ("model_0000004.safetensors", 4), ("state.pt", 4),
                          ("model.safetensors", 4),
                          ("state.pt", 5), ("model.safetensors",
                                            5)], "the copy that is kept, what alone is enough to resume, then the model"
        assert sorted(os.listdir(os.path.join(out, "samples"))) == ["step_000003.png", "step_000005.png"]
        three = lambda layers: " ".join(f"{layers[k]:.3f}" for k in (0, 1, 2))
        for line in training:  # what is printed is what is logged; the first, middle and last of three layers are all
            assert (f"step {line['step']:6d}/5 | loss {line['loss']:.4f} | flow {line['loss_flow']:.4f} | "
                    f"dist {line['loss_dist']:.4f} | alpha {three(line['alpha'])} | w {three(line['weight'])} | "
                    f"grad {line['grad_norm']:.2f} | lr {line['lr']:.1e} | ") in said, said
        for line in judged:
            assert f"one-step PSNR {line['psnr']:.2f} dB" in said and " ".join(f"{x:.3f}"
                                                                               for x in line["flow_by_t"]) in said
        config = encoder.read_config(os.path.join(out, "model.safetensors"))
        last_state = torch.load(os.path.join(out, "state.pt"), weights_only=True)
        assert config == {
            "vit": asdict(MICRO_VIT), "size": 16, "teacher": flags[1], "teacher_weights": None, "step": 5,
            "commit": train.commit(), "id": last_state["id"], "decoder": dict(
                latent_dim=8, width=32, heads=2, gtb_depth=1, flow_depth=2, flow_width=96, patch=4, grid=4,
                projector="mlp", objective="flow", pixel_stats="imagenet")}
        last = trained(tmp, "--data", folder, "--steps", 5, "--drop_path", 0.5)
        assert all(torch.equal(last.tensors[k], x) for k,
                   x in load_file(os.path.join(out, "model.safetensors")).items())
        # speed: by a clock that the networks alone move, two seconds a step; evaluations do not count
        clock, forward = [1e9], encoder.Encoder.forward

        def slow(self, img):
            clock[0] += 2 * (img.device.type != "meta")
            return forward(self, img)
        out = os.path.join(tmp, "clock")
        with unittest.mock.patch.object(encoder.Encoder,
                                        "forward", slow), unittest.mock.patch("time.time", lambda: clock[0]):
            said = train_quietly(*flags, "--out", out, "--log_every", 2, "--eval_every", 3)
        timed = [x for x in log_lines(out, timing=True) if "loss" in x]
        assert [x["img_s"] for x in timed] == [2, 2, 2] and "eta 00:06" in said and "eta 00:02" in said, (timed, said)
        blocks = lambda tokens, width, mlp, depth: depth * (2 * tokens * (4 * width ** 2 + 2 * width * mlp)
                                                            + 4 * tokens ** 2 * width)
        vit = blocks(17, 32, 64, 3) + 2 * 16 * 48 * 32
        head = 2 * 16 * (48 * 96 + 256 * 96 + 96 * 96 + 32 * 96 + 2 * (2 + 3) * 96 * 96 + 2 * 96 * 96 + 96 * 48)
        rest = 2 * 16 * (32 * 32 + 32 * 8 + 8 * 32 + 32 * 32) + blocks(16, 32, 128, 1)
        assert all(abs(x["tflops_per_gpu"] * 1e12 / (2 * (4 * vit + 3 * (rest + head))) - 1) < 1e-9
                   for x in timed), "teacher once, the rest three times"
        for epochs, steps in ((1, 2), (3, 7)):  # of 10 images in batches of 4
            out = os.path.join(tmp, f"epochs{epochs}")
            train_quietly(*flags[:-2], "--epochs", epochs, "--eval_every", 100, "--out", out)
            assert [x["step"] for x in log_lines(out) if "loss" in x] == list(range(1, steps + 1))


def by_hand(weights, folder, size=16, steps=1, seed=0):
    """(images, reconstructions) float in [0, 1] of a folder: encode, Euler's steps from 1 to 0, rounded."""
    enc, dec = encoder.Encoder.from_pretrained(weights), decoder.Decoder.from_pretrained(weights)
    img = torch.stack([x for x, _ in data.ImageDataset(folder, size, train=False)]) / 255
    x = evaluation.image_noise(range(len(img)), (size // 4) ** 2, 48, seed)
    with torch.no_grad():
        c = dec.condition(enc(img)[0])
        for i in range(steps):
            x = x - dec.velocity(x, torch.full(x.shape[:2], 1 - i / steps), c) / steps
    x = x.view(len(img), size // 4, size // 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(img.shape)
    rec = (x.double().numpy() * STD + MEAN).clip(0, 1)
    return img.double().numpy(), (255 * rec).round() / 255


def mean_psnr(a, b):
    return np.mean([-10 * np.log10(((x - y) ** 2).mean()) for x, y in zip(a, b)])


def test_flags_of_eval():
    from skimage.metrics import structural_similarity
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _), report = tokenizer_file(tmp), picture_folder(tmp, n=5), os.path.join(tmp, "report.json")
        base = ["--data", folder, "--weights", weights, "--inception", "none"]
        seen = set()
        for steps, seed, size in ((1, 0, 16), (3, 0, 16), (1, 8, 16), (2, 1, 20)):
            said, found = evaluate(*base, "--steps", steps, "--seed", seed, "--size", size, "--out", report)
            quality = found["results"]["tokenizer"]["psnr"]
            assert abs(quality - mean_psnr(*by_hand(weights, folder, size, steps, seed))) < 1e-3, (steps, seed, size)
            row = found["results"]["tokenizer"]
            assert json.load(open(report))["results"] == found["results"] and re.search(
                rf"\ntokenizer +{quality:.2f}  {row['ssim']:.4f}      {row['ssim_paper']:.4f}\n", said + "\n"), said
            assert (found["images"], found["data"], found["step"],
                    found["teacher"]) == (5, [folder], None, os.path.join(tmp, "teacher.safetensors"))
            seen.add(round(quality, 4))
        assert len(seen) == 4, "the example must tell the flags apart"
        # --resolution 256: what came out is resized, and compared with a crop of the original that never went through
        # 16 pixels
        _, found = evaluate(*base, "--resolution", "256")
        _, rec = by_hand(weights, folder)
        ref, large, figures = [], [], []
        for path, x in zip(sorted(glob.glob(os.path.join(folder, "*", "*.png"))), rec):
            ref.append(np.array(data.center_crop(Image.open(path).convert("RGB"), 256)) / 255)
            small = Image.fromarray((255 * x).round().astype(np.uint8).transpose(1, 2, 0))
            large.append(np.array(small.resize((256, 256), Image.Resampling.BICUBIC)) / 255)
            figures.append((structural_similarity(ref[-1], large[-1], channel_axis=-1, data_range=1.0,
                                                  gaussian_weights=True, sigma=1.5,
                                                  use_sample_covariance=False),
                            structural_similarity(ref[-1], large[-1], channel_axis=-1, data_range=2.0)))
        expected = [mean_psnr(ref, large), *np.mean(figures, axis=0)]
        row = found["results"]["tokenizer"]
        assert np.allclose([row[k] for k in ("psnr", "ssim", "ssim_paper")], expected, atol=1e-4), (row, expected)
        # so is what a tokenizer above 256 px gives, here negatives, and not what one of just 256 px gives
        some = sorted(glob.glob(os.path.join(folder, "class1", "*.png")))
        with unittest.mock.patch.object(encoder.Encoder, "encode", lambda self, img: img), \
                unittest.mock.patch.object(decoder.Decoder, "decode", lambda self, latent, steps, noise: 1 - latent):
            for size in 272, 256:
                _, found = evaluate(*base, "--data", os.path.dirname(some[0]), "--size", size, "--resolution", "256")
                ref, rec = ([data.center_crop(Image.open(path).convert("RGB"), side) for path in some]
                            for side in (256, size))
                rec = [Image.fromarray(255 - np.array(x)).resize((256, 256), Image.Resampling.BICUBIC) for x in rec]
                expected = mean_psnr(*(np.array([np.array(x) for x in images]) / 255 for images in (ref, rec)))
                assert abs(found["results"]["tokenizer"]["psnr"] - expected) < 1e-3, (size, found, expected)
                assert ("as uint8, PIL bicubic, with" in found["protocol"]) == (size == 272), found["protocol"]
        # --bf16 and --batch_size, as the networks see them
        sizes, types_, workers, forward, init = [], set(), [], encoder.Encoder.forward, DataLoader.__init__

        def loader(self, *args, **kw):
            workers.append(kw.get("num_workers", 0))
            init(self, *args, **kw)

        def watched(self, img):
            z, hidden = forward(self, img)
            sizes.append(len(img)), types_.add(z.dtype)
            return z, hidden
        with unittest.mock.patch.object(encoder.Encoder,
                                        "forward", watched), unittest.mock.patch.object(DataLoader, "__init__", loader):
            evaluate(*base, "--batch_size", 2, "--workers", 2)
            assert set(workers) == {2}, workers
            assert sizes == [2, 2, 1] and types_ == {torch.float32}
            types_.clear()
            _, found = evaluate(*base, "--bf16")
            assert types_ == {torch.bfloat16}
        assert abs(found["results"]["tokenizer"]["psnr"] - mean_psnr(*by_hand(weights, folder))) < 0.2
        before = os.getcwd()
        try:  # the default of --weights
            os.makedirs(os.path.join(tmp, "out")), shutil.copy(weights, os.path.join(tmp, "out", "model.safetensors"))
            os.chdir(tmp)
            assert evaluate("--data", folder, "--inception", "none")[1]["weights_sha256"] == evaluation.sha256(weights)
        finally:
            os.chdir(before)


def test_the_probes_teacher_is_the_one_named():
    """Cosine 1 at every layer against a teacher whose weights are the student's; else that of the file named."""
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.dict(encoder.TEACHERS, micro=MICRO_VIT):
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=20)
        itself = os.path.join(tmp, "itself.safetensors")
        encoder.write_model(itself, {"vit": asdict(MICRO_VIT)},
                            {k.removeprefix("encoder.vit."): v for k, v in load_file(weights).items() if "vit." in k})
        base = ["--data", folder, "--fit", folder, "--weights", weights, "--inception", "none", "--probe"]
        cosine = lambda *flags: np.array(evaluate(*base, *flags)[1]["cosine_to_teacher"])
        figures = itertools.count(10)  # each another, so that the columns of the table can be told apart
        with unittest.mock.patch.multiple(evaluation, linear_probe=lambda *a, **k: (float(next(figures)), 0.1),
                                          nearest_neighbours=lambda *a, **k: float(next(figures))):
            text, report = evaluate(*base)
            a, b = report["probe"]["last layer"]["student"], report["probe"]["last layer"]["teacher"]
            assert [float(x) for x in re.search(r"\nlast layer +([\d. ]+)\n", text)[1].split()] == [
                a["linear"], b["linear"], a["knn"], b["knn"]] and len({*a.values(), *b.values()}) == 5, text
            assert cosine().max() < 0.9, "as the weights file says, a random one"
            assert np.allclose(cosine("--teacher", itself), 1, atol=1e-5)
            assert np.allclose(cosine("--teacher", "micro", "--teacher_weights", itself), 1, atol=1e-5)
            named = os.path.join(tmp, "named.safetensors")  # a file that names a teacher and its weights
            config = {**encoder.read_config(weights), "teacher": "micro", "teacher_weights": itself}
            encoder.write_model(named, config, load_file(weights))
            assert np.allclose(cosine("--weights", named), 1, atol=1e-5)
            other = os.path.join(tmp, "teacher.safetensors")  # which brings its own
            assert cosine("--weights", named, "--teacher", other).max() < 0.9


@unittest.mock.patch.object(evaluation, "InceptionV3", QuickInception)
def test_eval_measures_the_pca_of_fit():
    """The PCA's row by numpy: fitted on --fit, measured on --data, as many components as the latent has channels."""
    with tempfile.TemporaryDirectory() as tmp:
        weights, (folder, _) = tokenizer_file(tmp), picture_folder(tmp, n=5)
        fit, _ = picture_folder(os.path.join(tmp, "fit"), n=9)
        _, report = evaluate("--data", folder, "--fit", fit, "--weights", weights, "--inception", weights, "--pca",
                             "--batch_size", 4)
        (row, found), = ((k, v) for k, v in report["results"].items() if k != "tokenizer")
        patches = {}
        for root in (fit, folder):
            img = np.stack([x.numpy() for x, _ in data.ImageDataset(root, 16, train=False)]) / 255
            patches[root] = img.reshape(-1, 3, 4, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
        mean = patches[fit].mean(0)
        basis = np.linalg.svd(patches[fit] - mean, full_matrices=False)[2][:8]
        rec = ((patches[folder] - mean) @ basis.T @ basis + mean).clip(0, 1)
        rec = (255 * rec).round() / 255
        assert "8 per patch" in row and abs(found["psnr"] - mean_psnr(patches[folder].reshape(5, -1),
                                                                      rec.reshape(5, -1))) < 1e-3
        images = (torch.tensor(x).float().view(5, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(5, 3, 16, 16)
                  for x in (patches[folder], rec))
        a, b = (QuickInception(weights)(img)[0].double() for img in images)
        expected = evaluation.frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
        assert abs(found["rfid"] / expected - 1) < 1e-3, "against the same crops of the same images"
