"""Prepare a tokenizer's latents for a generator: their statistics, and a folder of them, read as a data set.

    python -m tools.latents stats --data TRAIN --weights out/model.safetensors
    python -m tools.latents save --data TRAIN --weights out/model.safetensors --out latents --flip
    torchrun --nproc_per_node=8 -m tools.latents save ...         # the same files, sooner
    latent, label = LatentDataset("latents", train=True)[n]       # float32 (C, h, w)

`stats` writes each latent channel's mean and standard deviation over the images into the weights file, or with --out
into a copy. From then on `encode` returns latents of mean 0 and deviation 1, and `decode` undoes this.

`save` writes normalised latents of ADM's centre crops, 1,024 images a file: latents_00000.safetensors and so on. A file
appears when it is complete, so the same command goes on where it stopped. It has `latents` (n, C, h, w), `labels` (n,),
and with --flip `mirrored`, the latents of the mirrored crops. index.json comes last.
"""
import argparse
import hashlib
import json
import os

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data import Samples
from encoder import MissingFile, UserError, write_atomically, write_model
from eval import Moments, sha256
from tools.job import Job, load_tokenizer
from tools.run import command_line
from tools.script import default_workers, number

SHARD = 1024  # images a file
MAPPED = 2048  # files that a process keeps mapped into memory


class LatentDataset(Samples):
    """The latents that `python -m tools.latents save` wrote to a folder: [n] -> (latent float32 (C, h, w), label).

    n means what it means for ImageDataset. If mirrored latents were saved, too (--flip), a coin drawn from (seed, n)
    chooses in training. `about` is what the folder's index.json says of weights, size and protocol. Raises UserError
    for a folder that is incomplete, damaged or mixed. A latent is read from its file only when it is asked for. Each
    process keeps the files that it has read mapped into memory, at most MAPPED of them: to open one takes longer than
    to read from it. A mapped file needs no file descriptor.
    """

    def __init__(self, folder, train, seed=0):
        self.folder, self.train, self.seed, self.mapped = os.fspath(folder), train, seed, {}
        path, labels = os.path.join(self.folder, "index.json"), []
        if not os.path.isdir(folder):
            raise MissingFile(f"{folder}: no such folder of latents; `python -m tools.latents save` makes one")
        try:
            with open(path) as f:
                self.about = json.load(f)
            self.classes, self.shard = self.about["classes"], self.about["shard"]
            for first in range(0, self.about["images"], self.shard):
                path = self.file(first)
                with safe_open(path, "pt") as f:
                    made_of = json.loads(f.metadata()["config"])
                    labels.append(f.get_tensor("labels"))
                if made_of.pop("first") != first or any(self.about.get(k) != made_of[k] for k in made_of):
                    raise UserError(f"{path} and index.json beside it are of different latents: save them again, into "
                                    "an empty folder")
            self.labels = torch.cat(labels).numpy().astype(np.int32)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFile(f"{path} is missing, so these latents are not complete: run `python -m tools.latents "
                              "save` again, which goes on where it stopped") from None
        except UserError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path} is damaged ({type(e).__name__}: {e}): delete it and run `python -m tools.latents "
                            "save` again") from None

    def file(self, i):
        """The file that holds image i."""
        return os.path.join(self.folder, f"latents_{i // self.shard:05d}.safetensors")

    def path(self, i):
        """Where latent i (in sorted order) lies: a file and the row in it."""
        return f"{self.file(i)}[{i % self.shard}]"

    def __getstate__(self):  # for a worker, which maps files itself
        return {**vars(self), "mapped": {}}

    def map(self, path):
        """The file at this path, mapped into memory."""
        if path not in self.mapped:
            if len(self.mapped) >= MAPPED:
                self.mapped.clear()
            try:
                self.mapped[path] = safe_open(path, "pt")
            except FileNotFoundError:
                raise MissingFile(f"{path} is gone") from None
        return self.mapped[path]

    def __getitem__(self, n):
        i, name = self.index(n), "latents"
        if self.train and self.about.get("flip") and np.random.default_rng([self.seed, n, 1]).random() < 0.5:
            name = "mirrored"
        latent = self.map(self.file(i)).get_slice(name)[i % self.shard]
        return latent.to(torch.float32, copy=True), int(self.labels[i])  # a copy: the caller may change it


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ap.add_subparsers(dest="part", required=True)
    stats = parts.add_parser("stats", help="mean and deviation of each latent channel, into the weights file")
    save = parts.add_parser("save", help="normalised latents and labels, into a folder")
    for part in stats, save:
        add = part.add_argument
        add("--data", nargs="+", required=True, metavar="PATH", help="images: folders or .zip archives")
        add("--weights", metavar="FILE", help="tokenizer" + " [needed, except with --out: then]" * (part is stats)
            + " [out/model.safetensors, else the shipped weights]")
        add("--out", metavar="FILE" if part is stats else "FOLDER", required=part is save,
            help="a new .safetensors to write to [the weights file itself]" if part is stats else "folder to write to")
        add("--size", type=number(int, 1), help="pixels of the crops, a multiple of the patch [the native size]")
        add("--batch_size", type=number(int, 1), default=32, help="images at a time, on each rank [%(default)s]")
        add("--workers", type=number(int, 0), default=default_workers(8),
            help="processes that load images, on each rank; 0: none [%(default)s: CPU cores / ranks, at most 8]")
        add("--bf16", action="store_true", help="run the tokenizer in bf16 autocast instead of fp32 without TF32"
            + ("" if part is stats else "; also store bf16"))
    save.add_argument("--flip", action="store_true", help="save the latents of the mirrored crops, too")
    args = ap.parse_args(argv)
    if args.part == "stats":
        target = args.out or args.weights
        if not target:
            ap.error("stats writes into the weights file: give --weights FILE, or --out NEW.safetensors")
        if args.out and not args.out.endswith(".safetensors"):
            ap.error(f"--out {args.out} is a weights file, and must end in .safetensors")
        folder = os.path.dirname(target) or "."
        if args.out:
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as e:
                ap.error(f"--out {args.out} cannot be written ({e})")
        if (args.out or os.path.isfile(target)) and (not os.access(folder, os.W_OK) or os.path.isdir(target)):
            ap.error(f"{target} cannot be written: it is a folder, or {folder} is no folder to write to")
    args.target, args.out = args.out, None  # because a Job would write its report to args.out
    return args


@torch.no_grad()
def save_statistics(job, enc, dec, images, info, about):
    """`stats`: per-channel mean and standard deviation of the latents, into the weights file or --out."""
    weights, target, latents = about["weights"], job.args.target or about["weights"], Moments()
    if not job.args.target and weights != job.args.weights:  # weights is then a converted copy of the authors' file
        raise UserError(f"{job.args.weights} is no file to write into: give --out NEW.safetensors")
    for _, img, _ in job.images("latents", images):
        with job.autocast:
            latents.add(enc(img)[0].transpose(0, 1).flatten(1).T)  # (b*h*w, C), not normalised
    latents = job.merge_ranks(latents)
    mean, std = latents.mean.float(), (latents.scatter.diagonal() / latents.count).sqrt().float()
    if not (std > 0).all():
        constant = torch.nonzero(std <= 0).flatten().tolist()
        raise UserError(f"latent channels {constant} are constant and cannot be normalised: train longer")
    if job.rank == 0:
        if sha256(weights) != about["weights_sha256"]:
            raise UserError(f"{weights} was overwritten meanwhile: run this again on a copy, or after its training")
        info = {**info, "latent_images": len(images)}
        write_model(target, info, {**load_file(weights), "latent_mean": mean, "latent_std": std})
    protocol = f"ADM centre crops to {images.size} px, {job.precision}, per channel over images and positions"
    report = {**about, "latent_mean": mean.tolist(), "latent_std": std.tolist(), "protocol": protocol}
    return job.finish(report, [
        f"mean      {' '.join(f'{x:.3f}' for x in mean)}", f"deviation {' '.join(f'{x:.3f}' for x in std)}",
        f"written to {target}: its encode returns latents of mean 0 and deviation 1, and its decode undoes this"])


def saved_already(path, made_of):
    """Whether a file of latents is there. UserError if it is damaged, or of other weights, data or settings."""
    if not os.path.exists(path):
        return False
    try:
        with safe_open(path, "pt") as f:
            have = json.loads(f.metadata()["config"])
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it and run this again") from None
    if any(have.get(key) != made_of.get(key) for key in (*made_of, "flip")):
        raise UserError(f"{path} is of other weights, data, size, precision or --flip: use another folder")
    return True


@torch.no_grad()
def save_latents(job, enc, images, about):
    """`save`: write normalised latents and labels in files of SHARD images; keep the files that are there."""
    args, folder, dtype = job.args, job.args.target, torch.bfloat16 if job.args.bf16 else torch.float32
    if not (enc.latent_mean.any() or (enc.latent_std != 1).any()):
        raise UserError(f"{about['weights']} has no latent statistics yet: "
                        f"python -m tools.latents stats --data TRAIN --weights {about['weights']}")
    identity = hashlib.sha256(json.dumps([os.path.abspath(r) for r in images.roots]).encode() + images.names)
    identity.update(images.name_ends.tobytes() + images.spans.tobytes())  # spans: lengths and CRC-32 in archives
    made_of = {"weights_sha256": about["weights_sha256"], "data_sha256": identity.hexdigest(), "images": len(images),
               "size": images.size, "dtype": str(dtype), **({"flip": True} if args.flip else {})}
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder} is no folder to write to ({e})") from None

    def path(first):
        return os.path.join(folder, f"latents_{first // SHARD:05d}.safetensors")
    firsts = range(job.rank * SHARD, len(images), job.ranks * SHARD)  # the first image of each file of this rank
    missing = [first for first in firsts if not saved_already(path(first), made_of)]
    numbers = [i for first in missing for i in range(first, min(len(images), first + SHARD))]
    rows = {}  # what the current file will hold: {name: list of tensors}
    for n, img, labels in job.images("latents", images, numbers=numbers):
        with job.autocast:
            batch = {"latents": enc.encode(img).to(dtype).cpu(), "labels": labels}
            if args.flip:
                batch["mirrored"] = enc.encode(img.flip(-1)).to(dtype).cpu()
        for k, i in enumerate(n):
            for name, x in batch.items():
                rows.setdefault(name, []).append(x[k])
            if (i + 1) % SHARD == 0 or i + 1 == len(images):  # the file's last image
                first = i // SHARD * SHARD
                tensors = {name: torch.stack(x) for name, x in rows.items()}
                write_model(path(first), {**made_of, "first": first}, tensors)
                rows = {}
    written = sum(job.gather(len(missing)))  # it waits for all ranks, so all files are written
    if job.rank == 0:
        index = {**made_of, **about, "classes": images.classes, "shard": SHARD,
                 "protocol": f"ADM centre crops to {images.size} px, {job.precision}"}
        write_atomically(os.path.join(folder, "index.json"), lambda f: f.write(json.dumps(index, indent=1).encode()))
    return job.finish(about, [f"{len(images):,} normalised latents with labels{' and mirrored ones' * args.flip} in "
                              f"{folder}, {written} files of {SHARD} written now"])


def main(argv=None, on_signal=None):
    """Do what the command line asks, print the report, and return it as a dict."""
    job = Job(parse_args(argv))
    enc, dec, info, images, about = load_tokenizer(job)
    if job.args.part == "stats":
        return save_statistics(job, enc, dec, images, info, about)
    return save_latents(job, enc, images, about)


if __name__ == "__main__":
    command_line(main, "tools.latents")
