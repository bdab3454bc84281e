"""What monocular depth is trained and measured on: pairs of pictures and depth maps, and NYUv2 in its published form.

    data = DepthPairs("nyu", "train", unit=0.001, size=448, train=True)
    img, depth = data[n]             # sample n: uint8 (3, 448, 448), metres (448, 448), 0 where nothing is measured
    img, depth = data.measured(i)    # pair i at its own size

A data set is a folder or archive with <split>/images and <split>/depth: PNGs of one channel, 0 = no measurement.
"""
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from downstream.pairs import Pairs
from encoder import UserError, one_line, write_atomically
from tools.script import make_folder

LEAST = 1e-3  # metres: what is nearer is no measurement


class DepthPairs(Pairs):
    """The pairs of a split: [n] -> (uint8 image (3, S, S), depth in metres (S, S), 0 where there is none), cropped.

    unit: metres of one count of the PNGs; or "disparity" if they hold an inverse depth, whose unit nobody knows.
    """

    def __init__(self, root, split, unit=0.001, size=None, train=False, seed=0):
        super().__init__(root, split, "depth", train, seed)
        self.split, self.unit, self.size = split, unit, size

    def measured(self, i):
        """Pair i at its own size: uint8 (3, H, W), and depth (H, W) in float32."""
        img, counts = self.read(i)
        counts = torch.from_numpy(counts.astype(np.float32))
        return img, torch.where(counts > 0, 1 / counts, 0) if self.unit == "disparity" else counts * self.unit

    def spread(self, i):
        """The depths of pair i below which 1%, 50% and 99% lie, or None if nothing is measured."""
        _, depth = self.measured(i)
        return np.percentile(depth[depth > 0].numpy(), (1, 50, 99)) if (depth > 0).any() else None

    def __getitem__(self, n):
        img, depth = self.measured(self.index(n))
        return crop(img, depth, self.size, np.random.default_rng([self.seed, n, 1]))


def crop(img, depth, size, rng):
    """A random square of image and depth, after the shorter side is resized to `size`; half of them are mirrored."""
    H, W = (max(size, round(side * size / min(depth.shape))) for side in depth.shape)
    top, left = rng.integers(H - size + 1), rng.integers(W - size + 1)
    img = F.interpolate(img[None], (H, W), mode="bicubic", antialias=True)[0]
    depth = F.interpolate(depth[None, None], (H, W), mode="nearest-exact")[0, 0]  # no mean of near and far, or of 0
    img, depth = (x[..., top:top + size, left:left + size] for x in (img, depth))
    if rng.random() < 0.5:
        img, depth = img.flip(-1), depth.flip(-1)
    return img.contiguous(), depth.contiguous()


class Mixed(Dataset):
    """Several data sets, evenly: sample n is of set n mod K, so that every batch has as many of each."""

    def __init__(self, sets):
        self.sets = sets

    def __len__(self):
        return sum(map(len, self.sets))

    def __getitem__(self, n):
        return self.sets[n % len(self.sets)][n // len(self.sets)]

    def index(self, n):
        return n

    def path(self, n):
        """Where the image of SAMPLE n lies."""
        data = self.sets[n % len(self.sets)]
        return data.path(data.index(n // len(self.sets)))


def check(data, max_depth, workers, most=10_000):
    """Read a set once, or `most` pairs of it, so that every fault is named. Returns a line on its depths, and a warning
    if max_depth makes them unlikely to be metres. max_depth None: the unit does not matter."""
    spreads = [x for x in data.every(data.spread, range(0, len(data), -(-len(data) // most)), workers) if x is not None]
    where = ", ".join(data.files.roots)
    if not spreads:
        raise UserError(f"{where}: no depth picture of {data.split} has a measurement, all their numbers are 0")
    low, middle, high = np.median(spreads, 0)
    line = f"{where}: {len(data):,} pairs in {data.split}, depths from {low:.3g} to {high:.3g}, median {middle:.3g}"
    if max_depth and not max_depth / 25 < middle < max_depth:
        line += (f"\nwarning: by --unit {data.unit:g} and --max_depth {max_depth:g} these are metres, and most are too "
                 f"{'large' if middle >= max_depth else 'small'} for that: is it another unit?")
    return line


def open_nyu(mat, splits):
    """NYUv2's labelled set as an open HDF5 file, and the numbers, from 1, of the pairs in each of its splits."""
    try:
        import h5py
        from scipy.io import loadmat
    except ImportError as e:
        raise UserError(f"convert needs h5py and scipy ({e}): pip install -r downstream/requirements.txt") from None
    try:
        found = loadmat(splits)
        return h5py.File(mat, "r"), {split: found[split + "Ndxs"].flatten() for split in ("train", "test")}
    except (OSError, ValueError, KeyError, NotImplementedError) as e:
        raise UserError(f"{mat} and {splits} are not NYUv2's nyu_depth_v2_labeled.mat and splits.mat, in this order "
                        f"({type(e).__name__}: {one_line(e)})") from None


def convert(args):
    """NYUv2's labelled set, as published -> folders of its official split: train (795) and test (654), millimetres."""
    f, numbers_of = open_nyu(args.mat, args.splits)
    with f:
        for split, numbers in numbers_of.items():
            for kind in "images", "depth":
                make_folder(os.path.join(args.out, split, kind))
            for n in tqdm(numbers, desc=split):
                img = np.transpose(f["images"][n - 1])  # MATLAB's order, read as C: (3, W, H) -> (H, W, 3)
                depth = np.transpose(f[args.field][n - 1])  # metres
                millimetres = (1000 * depth).round().clip(0, 65535).astype(np.uint16)
                for kind, x in ("images", img), ("depth", millimetres):
                    path = os.path.join(args.out, split, kind, f"{n:04d}.png")
                    write_atomically(path, lambda f: Image.fromarray(x).save(f, "PNG"))
    print(f"{args.out}: {len(numbers_of['train'])} pairs in train, {len(numbers_of['test'])} in test")
