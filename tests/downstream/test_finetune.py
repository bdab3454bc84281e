"""downstream/finetune.py, the trainer of the tasks on a backbone: exact resume, ranks, rates, files, refusals."""
from tests.helpers import (  # first: it sets the environment that torch reads
    MICRO_VIT, close, log_lines, micro_teacher, raises, refused, run, run_ranks, same_weights, side_by_side,
    tokenizer_file)

import argparse
import contextlib
import hashlib
import io
import math
import os
import signal
import tempfile
import unittest.mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import encoder
from data import Samples
from downstream import backbone as backbone_file, finetune
from encoder import UserError, read_config
from tools.run import command_line

CALLS = []  # of Toy, whose fifth or so a test lets fail


class Toy(nn.Module):
    """Three classes from the mean token. DIE: at this call the process gets the signal SIG; NAN: this loss is none."""

    def __init__(self, backbone, norm="batch"):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(32, 3)
        self.norm = nn.BatchNorm1d(32) if norm == "batch" else nn.LayerNorm(32)

    def logits(self, img):
        return self.head(self.norm(self.backbone.features(img / 255).mean(1)))

    def forward(self, img, labels):
        CALLS.append(self.backbone.training)
        assert self.training
        if len(CALLS) == int(os.environ.get("DIE", 0)):
            os.kill(os.getpid(), int(os.environ["SIG"]))
        logits = self.logits(img)
        loss = F.cross_entropy(logits, labels)
        return loss * math.nan if str(len(CALLS)) in os.environ.get("NAN", "").split() else loss


class Other(Toy):
    """Two losses, of a batch that collate_other makes."""

    def forward(self, images, about):
        loss = super().forward(torch.stack(images), about["labels"])
        return {"right": loss, "size": 0.1 * self.head.weight.square().sum()}


def collate_other(samples):
    images, labels = zip(*samples)
    return list(images), {"labels": torch.stack(labels), "names": ["a", "b"]}


class Blobs(Samples):
    """Sample n is a picture of one of `count` seeds, and its class."""

    def __init__(self, count=10, seed=0):
        self.labels, self.train, self.seed = np.arange(count) % 3, True, seed

    def path(self, i):
        return f"blob{i}"

    def __getitem__(self, n):
        i = self.index(n)
        img = np.random.default_rng(i).integers(0, 256, (3, 16, 16), np.uint8)
        return torch.from_numpy(img), torch.tensor(int(self.labels[i]))


def build(config):
    return Toy(finetune.build_backbone(config), config["norm"])


def main(argv=None, on_signal=None):
    """The toy task's command line. Returns the trained model."""
    ap = argparse.ArgumentParser()
    add = ap.add_argument
    add("--norm", default="batch"), add("--task", default="Toy"), add("--count", type=int, default=10)
    add("--sgd", action="store_true"), add("--data"), add("--val")
    finetune.add_flags(ap, steps=6, batch_size=4, workers=0, log_every=1, eval_every=0, save_every=0, lr=1e-2)
    args = ap.parse_args(argv)
    backbone = finetune.load_backbone(args)
    model = {"Toy": Toy, "Other": Other}[args.task](backbone, args.norm)

    def evaluate():
        assert not model.training and not torch.is_grad_enabled()
        torch.save(model.state_dict(), os.path.join(args.out, f"rank{os.environ.get('RANK', 0)}.pt"))
        return {"mean": model.head.weight.mean().item(), "of": "the head"}
    finetune.train(args, model, Blobs(args.count), evaluate, {"norm": args.norm},
                   collate_other if args.task == "Other" else None, on_signal=on_signal,
                   optimizer=torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), args.lr)
                   if args.sgd else None,
                   picture=lambda: Image.new("RGB", (8, 8)))
    return model


def trained(out, *flags):
    """(the model after training in this process, what was printed)."""
    CALLS.clear()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        model = main([*map(str, flags), "--out", out])
    return model, said.getvalue()


def initial(tmp, norm):
    """The toy before its first step."""
    args = dict(weights=None, teacher=micro_teacher(tmp), teacher_weights=None, frozen=False, drop_path=0, seed=0)
    return Toy(finetune.load_backbone(argparse.Namespace(**args)), norm)


def state(out):
    return torch.load(os.path.join(out, "state.pt"), weights_only=True)


def differences(a, b):
    """Names of tensors and numbers in which two checkpoints differ."""
    if isinstance(a, dict):
        return [f"{k}.{x}" for k in a.keys() | b.keys() for x in differences(a.get(k), b.get(k))]
    if isinstance(a, torch.Tensor):
        return [""] * (not torch.equal(a, b))
    return [""] * (a != b)


def test_finetuning_resumes_bit_for_bit_after_a_signal_and_a_kill():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--steps", 9, "--micro_batch", 2, "--drop_path", 0.3,
                 "--log_every", 4, "--eval_every", 3, "--save_every", 4, "--keep_every", 4, "--warmup", 2,
                 "--lr_decay", 0.5, "--layer_decay", 0.7]
        a, b = (os.path.join(tmp, name) for name in ("whole", "parts"))
        start = lambda **env: run("python", "-m", "tests.downstream.test_finetune", *flags, "--out", b, **env)
        trained(a, *flags)
        done = start(DIE="5", SIG=str(int(signal.SIGTERM)))  # in the third step, which it finishes
        assert done.returncode == 0 and "interrupted and saved at step 3" in done.stdout, done
        done = start(DIE="7", SIG=str(int(signal.SIGKILL)))  # in the seventh: the last save is of the fourth
        assert done.returncode == -9 and "resumed from" in done.stdout and state(b)["step"] == 4, done
        done = start()
        assert done.returncode == 0 and "at step 4" in done.stdout, done
        one, two = state(a), state(b)
        for x in one, two:
            x.pop("id"), x["args"].pop("out")
        assert not differences(one, two), differences(one, two)[:5]
        assert one["model"]["norm.num_batches_tracked"] == 18 and (one["model"]["norm.running_mean"] != 0).all()
        lines = log_lines(a)
        assert [x for x in log_lines(b) if x.get("kind") != "interrupted"] == lines
        assert [x["step"] for x in lines if "loss" in x] == [4, 8, 9]
        assert [(x["step"], x["of"]) for x in lines if x.get("kind") == "eval"] == [(3, "the head"), (6, "the head"),
                                                                                  (9, "the head")]
        for name in "model.safetensors", "model_0000004.safetensors", "model_0000008.safetensors":
            assert same_weights(os.path.join(a, name), os.path.join(b, name)), name
        steps = [read_config(os.path.join(b, f"model{name}.safetensors"))["step"]
                 for name in ("_0000004", "_0000008", "")]
        assert steps == [4, 8, 9], "a copy says of which step it is"
        assert sorted(os.listdir(os.path.join(b, "samples"))) == [f"step_000000{k}.png" for k in (3, 6, 9)]
        assert "the run is finished" in trained(b, *flags)[1]


def test_several_ranks_finetune_as_one():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--steps", 3, "--lr", 0.1, "--sgd", "--norm"]
        layer = ["layer", "--micro_batch", 1, "--drop_path", 0.2]  # drawn for each micro-batch, whatever the ranks
        start = lambda norm, *more: run_ranks(2, "python", "-m", "tests.downstream.test_finetune", *flags, norm, *more,
                                              "--out", os.path.join(tmp, norm))
        for done in side_by_side(lambda: start(*layer), lambda: start("batch")):
            assert all(x.returncode == 0 for x in done), done
        one, _ = trained(os.path.join(tmp, "one"), *flags, *layer)
        several = load_file(os.path.join(tmp, "layer", "model.safetensors"))
        for k, x in one.state_dict().items():
            close(several[k], x, 1e-5)
        for a, b in zip(log_lines(os.path.join(tmp, "one")), log_lines(os.path.join(tmp, "layer"))):
            assert all(math.isclose(a[k], b[k], rel_tol=1e-4) for k in ("loss", "grad_norm") if k in a), (a, b)
        for norm in "layer", "batch":  # evaluated on both, which hold the same
            a, b = (torch.load(os.path.join(tmp, norm, f"rank{r}.pt")) for r in range(2))
            assert not differences(a, b), differences(a, b)
        # running statistics after a step: 0.9 of the first, 0.1 of the mean over the ranks of each rank's own
        run_ranks(2, "python", "-m", "tests.downstream.test_finetune", *flags, "batch", "--steps", 1, "--out",
                  os.path.join(tmp, "step"))
        model, data = initial(tmp, "batch"), Blobs()
        with torch.no_grad():
            tokens = [model.backbone.features(torch.stack([data[n][0] for n in part]) / 255).mean(1)
                      for part in ((0, 1), (2, 3))]
        found = load_file(os.path.join(tmp, "step", "model.safetensors"))
        close(found["norm.running_mean"], 0.1 * sum(x.mean(0) for x in tokens) / 2, 1e-5)
        close(found["norm.running_var"], 0.9 + 0.1 * sum(x.var(0) for x in tokens) / 2, 1e-5)


def test_accumulated_batches_are_one_batch():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--norm", "layer", "--steps", 3, "--lr", 0.03, "--clip", 0, "--sgd"]
        one, said = trained(os.path.join(tmp, "a"), *flags)
        assert "micro-batch 4 x accumulation 1" in said
        with unittest.mock.patch.object(finetune, "seed_step") as seeded:
            several, said = trained(os.path.join(tmp, "b"), *flags, "--micro_batch", 3)
        assert [c.args for c in seeded.call_args_list] == [(0, step, m) for step in range(3) for m in range(2)]
        assert "micro-batch 2 x accumulation 2" in said
        for k, x in one.state_dict().items():
            close(several.state_dict()[k], x, 1e-5)
        for a, b in zip(*(log_lines(os.path.join(tmp, x)) for x in "ab")):
            assert all(math.isclose(a[k], b[k], rel_tol=1e-4) for k in ("loss", "grad_norm") if k in a), (a, b)


def first_step(tmp, name, *flags):
    """{name: its change in one step} of the toy's parameters, and what they were."""
    out = os.path.join(tmp, name)
    model, _ = trained(out, "--teacher", micro_teacher(tmp), "--norm", "layer", "--steps", 1, *flags)
    before = dict(initial(tmp, "layer").named_parameters())
    return {k: (p - before[k]).detach() for k, p in model.named_parameters()}, before


def test_rates_and_decay_of_named_tensors():
    """AdamW's first step moves every number by its rate, whatever the gradient; decay takes rate * decay of it."""
    with tempfile.TemporaryDirectory() as tmp:
        change, before = first_step(tmp, "a", "--layer_decay", 0.5, "--warmup", 2, "--lr", 1e-3, "--weight_decay", 0)
        rates = {"patch_embed.weight": 1 / 16, "pos_embed": 1 / 16, "cls_token": 1 / 16, "blocks.0.qkv.weight": 1 / 8,
                 "blocks.1.fc1.bias": 1 / 4, "blocks.2.norm2.weight": 1 / 2, "norm.weight": 1}
        rates = {"backbone.vit." + k: x for k, x in rates.items()} | {"head.weight": 1, "norm.bias": 1}
        for k, rate in rates.items():  # half of the rate in the first of two steps of warm-up
            found = change[k].abs().max().item()
            assert math.isclose(found, 1e-3 / 2 * rate, rel_tol=0.02), (k, found, rate)
        assert not any(change[k].any() for k in change if "latent_down" in k)
        decayed, _ = first_step(tmp, "b", "--layer_decay", 0.5, "--warmup", 2, "--lr", 1e-3, "--weight_decay", 0.3)
        for k in rates:
            matrix = k.endswith("weight") and before[k].ndim > 1
            expected = -1e-3 / 2 * rates[k] * 0.3 * before[k].detach() * matrix
            assert (decayed[k] - change[k] - expected).abs().max() < 2e-7, k


def test_frozen_backbones_do_not_move():
    with tempfile.TemporaryDirectory() as tmp:
        weights = tokenizer_file(tmp)
        frozen, _ = trained(os.path.join(tmp, "a"), "--weights", weights, "--frozen", "--drop_path", 0.5)
        assert CALLS == [False] * 6, "a frozen backbone is in eval mode"
        given = encoder.Encoder.from_pretrained(weights)
        for k, x in given.state_dict().items():
            assert torch.equal(frozen.backbone.state_dict()[k], x), k
        assert frozen.backbone.vit.drop_path == 0 and not any(p.requires_grad for p in frozen.backbone.parameters())
        saved = state(os.path.join(tmp, "a"))
        assert len(saved["optimizer"]["state"]) == 4, "norm and head"
        tuned, _ = trained(os.path.join(tmp, "b"), "--weights", weights, "--drop_path", 0.5)
        assert CALLS == [True] * 6 and tuned.backbone.vit.drop_path == 0.5
        after = dict(tuned.backbone.named_parameters())
        moved = {k for k, x in given.named_parameters() if not torch.equal(after[k], x)}
        assert moved == {k for k, _ in given.named_parameters() if not k.startswith("latent_down.")}


def test_backbones_are_those_named():
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.dict(encoder.TEACHERS, micro=MICRO_VIT):
        teacher, weights, img = micro_teacher(tmp), tokenizer_file(tmp), torch.rand(2, 3, 16, 16)
        named = dict(weights=None, teacher=None, teacher_weights=None, frozen=True, drop_path=0.1, seed=3)
        load = lambda **given: finetune.load_backbone(argparse.Namespace(**{**named, **given}))
        expected = encoder.Encoder.from_pretrained(weights).features(img)
        assert torch.equal(load(weights=weights).features(img), expected)
        assert not torch.equal(load(teacher=teacher).features(img), expected)
        for given in {"teacher": teacher}, {"teacher": "micro", "teacher_weights": teacher}, {
                "teacher": "micro", "teacher_weights": "random"}:
            with contextlib.redirect_stdout(io.StringIO()):
                vit, found = encoder.load_teacher(given["teacher"], given.get("teacher_weights")), load(**given)
            drawn = torch.rand(3)
            torch.manual_seed(3)
            assert torch.equal(drawn, torch.rand(3)), "what is built next depends on --seed alone"
            assert torch.equal(found.features(img), vit.norm(vit(img)[-1][:, 1:])), given
        for given, words in (({}, "one of the two"), ({"weights": weights, "teacher": teacher}, "one of the two"),
                             ({"weights": weights, "teacher_weights": "x"}, "--teacher_weights x"),
                             ({"weights": teacher}, "no tokenizer"), ({"teacher": "none"}, "'none' is neither")):
            raises(UserError, lambda: load(**given), words=words)


def test_model_files_are_whole():
    with tempfile.TemporaryDirectory() as tmp:
        out, weights = os.path.join(tmp, "run"), tokenizer_file(tmp)
        model, _ = trained(out, "--weights", weights)
        path = os.path.join(out, "model.safetensors")
        for given in out, path:
            again, config = finetune.load_model(given, build, "cpu")
            assert not again.training
            assert not differences(dict(again.state_dict()), dict(model.state_dict()))
        img = torch.rand(2, 3, 16, 16)
        assert torch.equal(again.logits(img), model.eval().logits(img))
        given, digest = encoder.Encoder.from_pretrained(weights).vit.state_dict(), hashlib.sha256()
        for k in sorted(k for k in given if k not in ("mean", "std")):
            digest.update(given[k].numpy().tobytes())
        assert config["backbone_sha256"] == digest.hexdigest() and config["source"] == weights
        assert (config["task"], config["norm"], config["step"], config["frozen"]) == ("Toy", "batch", 6, False)
        assert encoder.ViTConfig(**config["vit"]) == MICRO_VIT and config["id"] == state(out)["id"]
        other = os.path.join(tmp, "other.safetensors")
        tensors = load_file(path)
        for wrong, words in (({**tensors, "head.bias": tensors["head.bias"][:2]}, "head.bias is (2,), expected (3,)"),
                             ({k: x for k, x in tensors.items() if "num_batches" not in k}, "missing norm.num"),
                             ({**tensors, "more": torch.ones(3)}, "unknown more")):
            encoder.write_model(other, config, wrong)
            raises(UserError, finetune.load_model, other, build, "cpu", words=[other, words])
        raises(UserError, finetune.load_model, path, lambda c: Other(finetune.build_backbone(c)), "cpu",
               words=[path, "it is a Toy, and this command reads a Other"])
        refused(UserError, finetune.load_model, path, lambda c: c["classes"], "cpu", says=(
            f"{path} is a Toy, which this command cannot build (KeyError: 'classes')"))
        raises(encoder.MissingFile, finetune.load_model, os.path.join(tmp, "none"), build, "cpu", words="none: no such")
        for error in KeyError, TypeError, ValueError:
            with unittest.mock.patch.object(backbone_file.json, "loads", side_effect=error("a\n b")):
                words = "'a\\n b'" if error is KeyError else "a b"
                refused(UserError, finetune.load_model, path, build, "cpu", says=(
                    f"{path} is damaged, or no run of a downstream task ({words})"))
        raises(UserError, finetune.load_model, weights, build, "cpu", words="no run of a downstream task")
        open(other, "wb").write(b"no tensors")
        raises(UserError, finetune.load_model, other, build, "cpu", words="damaged")
    norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))  # each counts its batches
    given = {k: x + n for n, (k, x) in enumerate(norms.state_dict().items(), 1)}
    finetune.load_tensors(norms, given, "x")
    assert not differences(norms.state_dict(), given)


def test_several_losses_of_any_batch():
    with tempfile.TemporaryDirectory() as tmp:
        out, teacher = os.path.join(tmp, "run"), micro_teacher(tmp)
        model, said = trained(out, "--task", "Other", "--teacher", teacher, "--steps", 2, "--log_every", 2, "--lr", 0)
        line = log_lines(out)[0]
        assert math.isclose(line["size"], 0.1 * model.head.weight.square().sum().item(), rel_tol=1e-5)
        assert math.isclose(line["loss"], line["right"] + line["size"], rel_tol=1e-6) and " | right " in said
        raises(UserError, trained, out, "--teacher", teacher, "--steps", 3, words="task was Other, is now Toy")


def test_other_optimizers_skip_what_is_not_finite():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--sgd", "--frozen", "--norm", "layer", "--clip", 0.01, "--lr", 2.0]
        for name, more in ("sgd", flags), ("adamw", flags[:2] + ["--norm", "layer"]):
            out = os.path.join(tmp, name)
            with unittest.mock.patch.dict(os.environ, NAN="2"):
                trained(out, *more, "--steps", 2, "--warmup", 0)
            lines = [x for x in log_lines(out) if "loss" in x]
            assert [x["skipped"] for x in lines] == [0, 1], lines
            once, _ = trained(os.path.join(tmp, name + "-once"), *more, "--steps", 1, "--warmup", 0)
            differ = differences(state(out)["model"], dict(once.state_dict()))
            assert not differ, f"{name}: the second step changed {differ}"
        model = initial(tmp, "layer")
        after = state(os.path.join(tmp, "sgd"))["model"]
        moved = torch.cat([(after[k] - p.detach()).flatten() for k, p in model.named_parameters() if "latent" not in k])
        assert math.isclose(moved.norm().item(), 2 * 0.01, rel_tol=1e-3), "rate times the clipped norm"
        with unittest.mock.patch.dict(os.environ, NAN=" ".join(map(str, range(1, 20)))):
            raises(UserError, trained, os.path.join(tmp, "never"), *flags, "--steps", 15,
                   words=["10 steps in a row", "blob"])


def test_finetuning_refuses_what_is_wrong():
    with tempfile.TemporaryDirectory() as tmp:
        out, teacher = os.path.join(tmp, "run"), micro_teacher(tmp)
        flags = ["--teacher", teacher, "--steps", 2]
        model, _ = trained(out, *flags)
        again, _ = finetune.load_model(out, build, "cpu")  # a teacher's projection is linear, a tokenizer's is not
        assert not differences(dict(again.state_dict()), dict(model.state_dict()))
        for more, words in ((["--lr", 0.5], "lr was 0.01, is now 0.5"),
                            (["--count", 11], "training_samples was 10, is now 11"),
                            (["--norm", "layer"], "norm was batch"), (["--seed", 1], "seed was 0")):
            raises(UserError, trained, out, *flags, "--steps", 3, *more, words=words)
        raises(UserError, trained, out, "--weights", tokenizer_file(tmp), "--steps", 3, words="backbone_sha256 was")
        moved = os.path.join(tmp, "moved.safetensors")
        os.rename(teacher, moved)
        assert "resumed" in trained(out, "--teacher", moved, "--steps", 3, "--resume_anyway")[1]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            for wrong, words in (([], "one of the arguments --weights --teacher is required"),
                                 (["--weights", "x", "--teacher", "y"], "not allowed with"),
                                 ([*flags, "--epochs", "2"], "not allowed with"),
                                 ([*flags, "--layer_decay", "1.5"], "argument --layer_decay: it is 1.5")):
                raises(SystemExit, main, list(map(str, wrong)), words="2")
                assert words in err.getvalue().splitlines()[-1], err.getvalue()
        plain = Toy.logits
        with unittest.mock.patch.object(Toy, "logits", lambda self, img: plain(self, img).detach() + self.head.bias):
            idle = sum(p.requires_grad for p in initial(tmp, "batch").parameters()) - 1  # all but the head's bias
            assert idle > 3
            raises(ValueError, trained, os.path.join(tmp, "idle"), "--teacher", moved,
                   words=["not depend on backbone", f" ({idle} parameters)"])
        out = os.path.join(tmp, "unlucky")
        with unittest.mock.patch.object(Image, "new", side_effect=lambda *args: 1 / 0):  # its picture
            raises(ZeroDivisionError, trained, out, "--teacher", moved, "--steps", 4, "--eval_every", 3)
        assert state(out)["step"] == 3, "no step is lost to an evaluation that fails"


def test_lengths_given_replace_those_by_default():
    def length(defaults, *flags):
        ap = argparse.ArgumentParser()
        finetune.add_flags(ap, **defaults)
        args = ap.parse_args(["--teacher", "tiny", *flags])
        return args.steps, args.epochs
    assert length({"epochs": 20}) == (None, 20) and length({"steps": 7}) == (7, None)
    assert length({"epochs": 20}, "--steps", "3") == (3, None) and length({"steps": 7}, "--epochs", "2") == (None, 2)
    raises(AssertionError, length, {"epoch": 1}, words="no such flag")
    with tempfile.TemporaryDirectory() as tmp:
        _, said = trained(os.path.join(tmp, "a"), "--teacher", micro_teacher(tmp), "--epochs", 2)
        assert "run: 5 steps of 4 " in said, "20 samples"
        _, said = trained(os.path.join(tmp, "b"), "--teacher", micro_teacher(tmp), "--epochs", 1, "--batch_size", 64)
        assert "run: 1 steps of 64 " in said, "at least one"


def test_flags_of_the_trainer_by_hand():
    """Defaults and bounds of every flag; on a GPU the backbone is compiled."""
    def parse(*flags, **defaults):
        ap = argparse.ArgumentParser()
        finetune.add_flags(ap, **defaults)
        return vars(ap.parse_args(["--teacher", "tiny", *map(str, flags)]))
    with unittest.mock.patch.object(finetune, "default_workers", lambda most: most):
        assert parse() == dict(
            weights=None, teacher="tiny", teacher_weights=None, frozen=False, drop_path=0, batch_size=16,
            micro_batch=None, steps=None, epochs=None, lr=1e-4, weight_decay=0.05, layer_decay=1, warmup=0, lr_decay=0,
            decay_shape="linear", clip=1, seed=0, workers=16, compile=False, out="run", log_every=50, eval_every=1000,
            save_every=1000, keep_every=None, resume_anyway=False)
    with unittest.mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert parse()["compile"] and not parse("--no-compile")["compile"]
    least = dict(drop_path=0, batch_size=1, micro_batch=1, steps=1, epochs=1, lr=0, weight_decay=0, layer_decay=0,
                 warmup=0, lr_decay=0, clip=0, seed=0, workers=0, log_every=1, eval_every=0, save_every=0, keep_every=0)
    most = dict(drop_path=0.9, layer_decay=1, lr_decay=1, seed=2 ** 63 - 1)
    for name, value in [*least.items(), *most.items()]:
        assert parse(f"--{name}", value)[name] == value
    for name, value in [*((k, v - 1) for k, v in least.items()), *((k, v + 1) for k, v in most.items()),
                        ("decay_shape", "square"), ("drop_path", 0.91), ("batch_size", 1.5), ("steps", 1.5)]:
        with contextlib.redirect_stderr(io.StringIO()):
            raises(SystemExit, parse, f"--{name}", value)
    assert parse("--decay_shape", "linear", decay_shape="cosine")["decay_shape"] == "linear"
    assert parse("--frozen", "--resume_anyway", "--decay_shape", "cosine", frozen=False, out="x") == {
        **parse(out="x"), "frozen": True, "resume_anyway": True, "decay_shape": "cosine"}


def test_what_a_resume_may_change():
    """Paths, lengths, intervals and the machine's flags, all at once; each of the others is named."""
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(nn.Module, "compile") as compiled:
        first, second, weights = os.path.join(tmp, "a"), os.path.join(tmp, "b"), tokenizer_file(tmp)
        trained(first, "--weights", weights, "--data", "x", "--val", "y", "--steps", 2)
        assert not compiled.called
        os.rename(first, second), os.rename(weights, weights + "2")
        moved = ["--weights", weights + "2", "--data", "q", "--val", "r", "--steps", 3]
        assert set(state(second)) == set(finetune.STATE), "a checkpoint that lacks one of these is refused"
        os.remove(os.path.join(second, "model.safetensors"))
        _, said = trained(second, *moved, "--steps", 2)
        assert "the run is finished" in said and len(log_lines(second)) == 3
        assert os.path.exists(os.path.join(second, "model.safetensors")), "it is written again"
        locks = []
        with unittest.mock.patch.object(finetune, "check_locks", locks.append):
            _, said = trained(second, *moved, "--workers", 1, "--micro_batch", 2, "--compile", "--log_every", 2,
                              "--eval_every", 1, "--save_every", 1, "--keep_every", 1)
        assert "resumed" in said and state(second)["step"] == 3 and state(second)["args"]["data"] == "q"
        assert compiled.call_count == 3 and locks == [2], "each block; the workers of training and of an evaluation"
        wrong = dict(batch_size=(4, 2), lr=(0.01, 0.5), weight_decay=(0.05, 0.5), layer_decay=(1.0, 0.5),
                     warmup=(0, 1), lr_decay=(0.0, 0.5), decay_shape=("linear", "cosine"), clip=(1.0, 0.5), seed=(0, 1),
                     drop_path=(0.0, 0.5))
        raises(UserError, trained, second, *moved, "--steps", 4, "--frozen", *(
            x for k, (_, new) in wrong.items() for x in (f"--{k}", new)),
            words=["frozen was False, is now True", *(f"{k} was {old}, is now {new}"
                                                      for k, (old, new) in wrong.items())])


def test_what_a_run_says_of_itself():
    """The lines before the first step, the lines of the log and of the screen, and what a model's file knows."""
    class Quiet(finetune.Run):
        def __init__(self, out):
            super().__init__(out)
            self.said, self.written, self.ranks, self.on_gpu = [], [], 2, True

        def connect(self):
            pass

        def say(self, text):
            self.said.append(text)

        def write(self, **line):
            self.written.append(line)
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.object(finetune, "Run", Quiet), \
            unittest.mock.patch.dict(encoder.TEACHERS, micro=MICRO_VIT), \
            unittest.mock.patch.object(finetune, "commit", lambda: "abc"):
        ap, teacher = argparse.ArgumentParser(), micro_teacher(tmp)
        finetune.add_flags(ap, batch_size=16)
        args = ap.parse_args(["--teacher", "micro", "--teacher_weights", teacher, "--out", tmp, "--epochs", "1000",
                              "--micro_batch", "4", "--frozen", "--lr", "0.5", "--warmup", "8", "--log_every", "2"])
        model = Toy(finetune.load_backbone(args))
        model.more, model.stays = nn.Linear(1000, 1200), nn.Linear(1000, 2400).requires_grad_(False)
        s = finetune.setup(args, model, Blobs(1600), None, {"norm": "batch"}, None, None)
        assert s.run.said == [
            "data: 1,600 samples",
            f"model: Toy of 3.6M parameters, 1.2M in the optimizer; backbone of micro {teacher}, frozen",
            "run: 100,000 steps of 16 = micro-batch 4 x accumulation 2 x 2 ranks on cpu"]
        assert {k: s.config[k] for k in ("source", "frozen", "commit", "task", "norm", "latent_dim", "projector")} == {
            "source": f"micro {teacher}", "frozen": True, "commit": "abc", "task": "Toy", "norm": "batch",
            "latent_dim": 1, "projector": "linear"}
        assert s.autocast._enabled and s.autocast.fast_dtype == torch.bfloat16, "on a GPU"
        assert s.model.training and not s.model.backbone.training
        assert {id(p) for p in s.weights} == {id(p) for p in model.parameters() if p.requires_grad}
        assert s.optimizer.defaults["fused"] and [g["lr"] for g in s.optimizer.param_groups] == s.rates
        args.teacher_weights, args.frozen = None, False
        few = finetune.setup(args, model, Blobs(3), None, {}, None, None)
        assert few.config["source"] == "micro" and few.run.said[1] == (
            "warning: a batch of 16 has each of them several times: give a smaller --batch_size")
        # two steps: of a loss in two parts, the gradient's norm, and their number; one more was skipped
        s.names, s.now.sums, s.now.step = ["right", "size"], torch.tensor([3.0, 2, 1, 40, 2]).double(), 4
        s.now.faults[0] = 1
        with unittest.mock.patch.object(torch.cuda, "max_memory_allocated", lambda: 5 * 2 ** 28):
            finetune.log(s, 0.25)
            s.run.on_gpu, s.names, s.now.sums, s.now.step = False, [], torch.tensor([3.0, 40, 2]).double(), 99_999
            finetune.log(s, 0.25)
        rate = 0.5 * 4 / 8  # of the fourth step
        assert s.run.written == [
            dict(step=4, loss=1.5, right=1.0, size=0.5, grad_norm=20.0, lr=rate, skipped=1, img_s=64.0,
                 memory_gib=1.25),
            dict(step=99_999, loss=1.5, grad_norm=20.0, lr=0.5, skipped=1, img_s=64.0, memory_gib=None)]
        assert s.run.said[3:] == [
            "step      4/100000 | loss 1.5000 | right 1.0000 | size 0.5000 | grad 20.00 | lr 2.5e-01 | 64.0 img/s | "
            "1.2 GiB | eta 6:56:39",
            "step  99999/100000 | loss 1.5000 | grad 20.00 | lr 5.0e-01 | 64.0 img/s | eta 00:00"]
        # an evaluation: its figures and those of them that are numbers, its picture, both under autocast
        seen, s.run.written, s.run.said, s.now.step = [], [], [], 12
        modes = lambda: seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), model.training))
        s.evaluate = lambda: modes() or {"a": 12.34567, "b": "words", "c": 3}
        s.picture = lambda: modes() or Image.new("L", (3, 2))
        os.makedirs(os.path.join(tmp, "samples"))
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        products.allow_tf32, convolutions.allow_tf32, s.run.on_gpu = False, False, True  # as a Job leaves them
        finetune.measure(s)
        assert products.allow_tf32 and convolutions.allow_tf32, "training goes on as it was"
        products.allow_tf32 = False
        assert s.run.written == [dict(kind="eval", step=12, a=12.34567, b="words", c=3)] and model.training
        assert s.run.said == ["eval     12 | a 12.35 | c 3"] and seen == 2 * [(True, False, False)]
        assert Image.open(os.path.join(tmp, "samples", "step_0000012.png")).size == (3, 2)
        s.run.rank, s.evaluate = 1, None
        finetune.measure(s)
        assert len(seen) == 2 and len(s.run.written) == 1 and len(s.run.said) == 1, "other ranks draw nothing"
        # two ranks exchange gradients; on GPUs, which the CPU here stands for, batch norms, too
        did, s.model, args.compile, model.last = [], model, True, nn.BatchNorm1d(3)
        with unittest.mock.patch.object(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda m: [m]), \
                unittest.mock.patch.object(nn.Module, "compile", lambda self: did.append(self)), \
                unittest.mock.patch.object(finetune, "DistributedDataParallel", lambda *given, **how: did.append(
                    (given, how)) or argparse.Namespace(require_forward_param_sync=True)):
            for s.run.on_gpu, whom, devices in (True, [model], [s.run.device]), (False, model, None):
                did.clear()
                finetune.spread_over_ranks(s)
                assert did == [*model.backbone.vit.blocks, ((whom, devices), dict(gradient_as_bucket_view=True))]
                assert not s.trained.require_forward_param_sync
            args.compile, s.run.ranks = False, 1
            finetune.spread_over_ranks(s)
            assert len(did) == 1 + len(model.backbone.vit.blocks) and s.trained is model
        own = [x for norm in (model.norm, model.last) for x in (norm.running_mean, norm.running_var)]
        assert [x is y for x, y in zip(s.statistics, own, strict=True)] == [True] * 4
        # a resume: rank 0 alone writes the model's file again, and there may be no steps left
        did = []
        s.run.load = lambda *given: did.append(given) or {"model": "tensors"}
        s.run.restore = lambda state, now, optimizer: did.append((state, now is s.now, optimizer is s.optimizer))
        with unittest.mock.patch.object(finetune, "export", lambda *given: did.append(given)), \
                unittest.mock.patch.object(finetune, "load_tensors", lambda *given: did.append(given)):
            for s.run.rank, s.now.step, left in (1, 99_999, True), (0, 100_000, False):
                did.clear(), s.run.said.clear()
                assert finetune.resume(s) == left
                assert did == [(finetune.STATE, args, finetune.MAY_DIFFER), (s.model, "tensors", f"{tmp}/state.pt"),
                               ({"model": "tensors"}, True, True), (s, f"{tmp}/model.safetensors")][:4 - s.run.rank]
                assert s.run.said == [f"the run is finished: {tmp}/model.safetensors; to extend it, give more --steps "
                                      "or --epochs"] * (not left)


def test_what_is_not_finite_is_told_with_its_files():
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["--teacher", micro_teacher(tmp), "--norm", "layer", "--steps", 15, "--batch_size", 2]
        out = tmp + "/out"
        with unittest.mock.patch.dict(os.environ, NAN=" ".join(map(str, range(5, 40)))):  # calls, two of each step
            data = Blobs()
            paths = [f"blob{data.index(n)}" for n in (22, 23)]  # of the twelfth step
            whole, _ = trained(tmp + "/whole", *flags[:-4], "--steps", 2, "--batch_size", 2)
            last = log_lines(tmp + "/whole")[1]["loss"]
            refused(UserError, trained, out, *flags, "--micro_batch", 1, says=(
                f"at step 12 the loss or its gradient is not finite, 10 steps in a row (the last finite one: {last:.4f}"
                f"); the last batch is {', '.join(paths)} .. (all of it in {out}/not_finite.txt). The last save is "
                f"{out}/state.pt: the same command with a lower --lr and --resume_anyway goes on from there"))
        assert open(f"{out}/not_finite.txt").read().split() == paths
        lines = log_lines(out)
        assert [x["skipped"] for x in lines] == [0, 0, *range(1, 10)]
        rate = lambda step: min(1, step / 3) * min(1, (8 - step + 1) / 4)
        trained(tmp + "/rates", *flags[:-4], "--steps", 8, "--warmup", 3, "--lr_decay", 0.5)
        for x in log_lines(tmp + "/rates")[:-1]:
            assert math.isclose(x["lr"], 0.01 * rate(x["step"])), x


def test_batches_and_models_go_to_the_device():
    batch = [torch.ones(2), {"a": torch.ones(3), "b": [torch.ones(1), "name"]}, (torch.ones(1), 5), "text"]
    found = finetune.to_device(batch, torch.device("meta"))
    tensors = [found[0], found[1]["a"], found[1]["b"][0], found[2][0]]
    assert all(x.device.type == "meta" for x in tensors) and [len(x) for x in tensors] == [2, 3, 1, 1]
    assert (found[1]["b"][1], found[2][1], found[3]) == ("name", 5, "text")
    with tempfile.TemporaryDirectory() as tmp:
        trained(tmp + "/run", "--weights", tokenizer_file(tmp), "--steps", 1)
        model, _ = finetune.load_model(tmp + "/run", build, torch.device("meta"))
        assert {x.device.type for x in model.state_dict().values()} == {"meta"}


if __name__ == "__main__":
    command_line(main, "toy")
