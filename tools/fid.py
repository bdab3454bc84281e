"""What `eval.py --fid` does: the FID between two sets of images or statistics.

    python eval.py --fid samples/ val.zip --resolution 256

An .npz holds images as ADM's sample batches do (`arr_0`, uint8 (N, H, W, 3)) or statistics as pytorch-fid's do (`mu`,
`sigma`). The mathematics is in eval.py, for people to copy; here are the files, the ranks and the messages. eval.py
uses load_inception and FidStatistics for its rFID.
"""
import math
import os
import time
import zipfile
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset

import eval as evaluation
from encoder import fetch, write_atomically
from eval import (INCEPTION_SHA256, MissingFile, Moments, UserError, draw_splits, frechet_distance, score_of_sums,
                  sha256, split_sums)
from tools.script import USER_ERRORS, machines_trouble


def load_inception(job):
    """(The network that --inception names, its description for the protocol); (None, None) for `--inception none`."""
    given = job.args.inception
    if given == "none":
        return None, None
    try:
        if not os.path.isfile(given) and not given.startswith(("http://", "https://")):
            raise MissingFile(f"--inception {given}: no such file, and no URL; give pytorch-fid's file, or leave "
                              "it out to download it")
        path = fetch(given)
    except USER_ERRORS as e:
        raise UserError(f"{e}" + "; or leave rFID and IS out: --inception none" * (not job.args.fid)) from None
    network, digest = evaluation.InceptionV3(path).to(job.device), sha256(path)
    other = "" if digest.startswith(INCEPTION_SHA256) else ", NOT that of pytorch-fid: compare with nothing"
    return network, (f"Inception {os.path.basename(path)} (sha256 {digest[:8]}{other}), "
                     "bilinear resize to 299 without antialiasing, float64 statistics")


class FidStatistics:
    """What FID and the Inception score need of `total` images. They may be added in any order, on any rank. `name` says
    where they are from."""

    def __init__(self, network, total, name):
        if total < 2:
            raise UserError(f"{name} holds {total} image; a covariance, and so an FID, needs at least 2 "
                            "(or --inception none)")
        self.network, self.pools, splits = network, Moments(), min(10, total)
        self.split, self.sums = draw_splits(total, splits), torch.zeros(splits, 1010, dtype=torch.float64)

    def add(self, img, numbers):
        """Add images (b, 3, H, W) in [0, 1]; numbers: which of all the images they are."""
        pool, logits = self.network(img)
        self.pools.add(pool)
        self.sums += split_sums(logits, self.split[numbers], len(self.sums)).cpu()

    def of_all_ranks(self, job):
        """((mean, covariance) of the features, (mean, deviation) of the Inception score) of all ranks' images."""
        pools = job.merge_ranks(self.pools)
        return (pools.mean, pools.covariance), score_of_sums(sum(job.gather(self.sums)))


def warn_of_few(n):
    """A warning if n images are too few for a covariance of Inception's 2048 features to have full rank, else None."""
    if n < 2048:
        return f"FID of {n} images, fewer than the 2048 dimensions of its covariance: such a figure means little"


class NpzImages(Dataset):
    """The images of an .npz in the layout of ADM's sample batches: `arr_0`, uint8 (N, H, W, 3).

    Each process opens the file itself, so a worker is sent the path only. It reads image after image, so a compressed
    file is never unpacked as a whole; to go back is slow.
    """

    def __init__(self, path):
        self.name = path
        self.open()

    def open(self):
        self.file, self.process = zipfile.ZipFile(self.name).open("arr_0.npy"), os.getpid()
        np.lib.format.read_magic(self.file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)  # later ones are for tables
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran:
            raise UserError(f"arr_0 is {dtype} {shape}; it must be uint8 (N, H, W, 3)")
        self.start, self.shape = self.file.tell(), shape

    def __getstate__(self):
        return {**vars(self), "file": None, "process": None}

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, n):
        if self.process != os.getpid():  # a worker: processes that share an open file move each other's position
            self.open()
        size = math.prod(self.shape[1:])
        try:
            self.file.seek(self.start + range(len(self))[n] * size)  # range refuses an n beyond the end
            img = np.frombuffer(bytearray(self.file.read(size)), np.uint8).reshape(self.shape[1:])
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as e:
            raise UserError(f"{self.path(n)} is damaged or cut off ({e})") from None
        return torch.from_numpy(img).permute(2, 0, 1), 0  # uint8 (3, H, W), and a label

    def path(self, n):
        return f"{self.name}[{n}]"


def read_npz(path):
    """An .npz of statistics -> (mu (D,), sigma (D, D)); one of images -> NpzImages. Raises UserError for any other."""
    try:
        with np.load(path) as f:
            if not {"mu", "sigma"} <= set(f.files):
                return NpzImages(path)
            mu, sigma = (np.asarray(f[key], np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(mu.sum() + sigma.sum()):
            raise UserError(f"mu is {mu.shape}, sigma {sigma.shape}; they must be (D,) and (D, D), and finite")
        return mu, sigma
    except Exception as e:  # damage makes zipfile, zlib and numpy raise nearly any type
        if machines_trouble(e):
            raise
        raise UserError(f"{path} is neither images nor statistics ({type(e).__name__}: {e}): an .npz holds arr_0, "
                        "or mu and sigma") from None


@torch.no_grad()
def compare_sets(job):
    """--fid A B: the distance between two sets of images or statistics, and the Inception score of images."""
    args, gaussians, counts, table = job.args, [], [], []
    for path in args.fid:
        if not os.path.exists(path):
            raise MissingFile(f"{path}: no such folder, .zip or .npz")
    size = None if args.resolution == "native" else 256
    sets = [read_npz(path) if path.endswith(".npz") else job.crops([path], size) for path in args.fid]
    network, network_name = load_inception(job)
    for which, path, images in zip("AB", args.fid, sets):
        if isinstance(images, tuple):
            gaussians.append(images)
            table.append(f"{which}: statistics of {path}")
            continue
        statistics, start = FidStatistics(network, len(images), path), time.time()
        for n, img, _ in job.images(f"features of {which}", images):
            statistics.add(img, n)
        gaussian, (score, deviation) = statistics.of_all_ranks(job)
        gaussians.append(gaussian)
        counts.append(len(images))
        rate = len(images) / (time.time() - start)
        table.append(f"{which}: {len(images):,} images of {path}, IS {score:.2f} +- {deviation:.2f}, {rate:.0f} img/s")
    unsaved = None
    if args.save_stats and job.rank == 0:
        mu, sigma = map(np.asarray, gaussians[0])
        try:
            write_atomically(args.save_stats, lambda f: np.savez(f, mu=mu, sigma=sigma))
            table.append(f"statistics of A in {args.save_stats}")
        except OSError as e:  # it is raised below, after the figures are printed
            unsaved = UserError(f"{args.save_stats} could not be written ({e})")
    shapes = [tuple(sigma.shape) for _, sigma in gaussians]
    if len(set(shapes)) > 1:
        raise UserError(f"{' and '.join(args.fid)} have no distance: covariances of {shapes[0]} and {shapes[1]}; "
                        "take the features of one network")
    fid = None
    if len(gaussians) == 2 and job.rank == 0:
        fid = frechet_distance(*gaussians[0], *gaussians[1])
        table.append(f"FID {fid:.3f}")
    crops = "folders and archives in ADM crops of 256 px" if size else "images as they are"
    splits = "; IS in 10 splits (of fewer images in as many) by a fixed permutation" * bool(counts)
    report = {"fid": fid, "sets": table, "warning": warn_of_few(min(counts, default=2048)),
              "protocol": f"{network_name}; {crops}{splits}"}
    job.finish(report, table)
    if unsaved:
        raise unsaved
    return report
