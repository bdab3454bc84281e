"""How good is a tokenizer? PSNR, SSIM, rFID, Inception score, a linear probe and 20-NN, with the protocol beside the numbers.

    PSNR = -10 log10(mean squared error)                                                          per image, of [0, 1]
    SSIM = mean of (2 ma mb + c1)(2 sab + c2) / ((ma^2 + mb^2 + c1)(sa^2 + sb^2 + c2))            Wang et al. 2004
    FID  = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))     of Inception's pool features         Heusel et al. 2017
    IS   = exp(mean of KL(p(y|x) || p(y)))                   of Inception's class probabilities   Salimans et al. 2016

    python eval.py --data VAL --weights out/model.safetensors [--pca --fit TRAIN] [--probe --fit TRAIN]
    torchrun --nproc_per_node=8 eval.py ...                       # the same figures, sooner
    python eval.py --fid A B                                      # FID between folders, archives, .npz of images or statistics
    python eval.py --latent_stats --data TRAIN --weights W        # per-channel statistics, into the weights file
    python eval.py --save_latents DIR --data TRAIN --weights W    # normalised latents for a generator's trainer

The metrics are plain functions on images (B, 3, H, W) in [0, 1]; `python eval.py` without arguments shows them on noise.
To copy: needs torch and numpy for the metrics. The command line uses data.py, encoder.py and decoder.py beside it.
Structure of the Inception network: Szegedy et al. 2015, with the differences of TensorFlow's 2015 graph as in pytorch-fid.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import time
import weakref
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # how it starts
PERFECT = 100.0  # dB, the most that a picture counts with, as in x264, libvpx and libaom


class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file that the user named is not there."""


def psnr(a, b):
    """Peak signal-to-noise ratio of each image in dB: a, b (B, 3, H, W) in [0, 1] -> (B,), float64.

    Equal images give inf; the means of this file count them with PERFECT = 100 dB.
    """
    return -10 * (a.double() - b.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(a, b, window="gaussian", data_range=1.0):
    """Structural similarity of each image: a, b (B, 3, H, W) in [0, 1] -> (B,), float64, mean over valid windows and channels.

    window: "gaussian", 11x11 with sigma 1.5 and population covariance (Wang et al.), or "uniform", 7x7 with sample
    covariance (scikit-image's default). data_range: the span of the pixel values, 1 for images in [0, 1]. The released
    UniFlow notebook passes 2 and the uniform window: ssim(a, b, "uniform", 2.0) is that figure, here called ssim_paper;
    it is higher. Raises ValueError for images smaller than the window.
    """
    if window == "gaussian":
        taps = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64) - 5) / 1.5) ** 2)
        bias = 1.0
    elif window == "uniform":
        taps, bias = torch.ones(7, dtype=torch.float64), 49 / 48  # n / (n - 1): sample covariance
    else:
        raise ValueError(f"window {window!r} is unknown; it is gaussian or uniform")
    n, C = len(taps), a.shape[1]
    if min(a.shape[2:]) < n:
        raise ValueError(f"images are {a.shape[3]}x{a.shape[2]}; SSIM with its {window} window needs at least {n}x{n}")
    taps = (taps / taps.sum()).to(a.device)

    def local_mean(x):  # (B, C, H, W) -> (B, C, H-n+1, W-n+1), a separable filter
        x = F.conv2d(x, taps.view(1, 1, n, 1).expand(C, 1, n, 1), groups=C)
        return F.conv2d(x, taps.view(1, 1, 1, n).expand(C, 1, 1, n), groups=C)

    a, b = a.double(), b.double()
    ma, mb = local_mean(a), local_mean(b)
    var_a, var_b = bias * (local_mean(a * a) - ma * ma), bias * (local_mean(b * b) - mb * mb)
    cov = bias * (local_mean(a * b) - ma * mb)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def round_uint8(img):
    """Images in [0, 1] -> the same, rounded to the 256 values that a picture file can hold."""
    return (img * 255).round() / 255


def comparison(img, rec):
    """original | reconstruction | 4 x absolute error, side by side: two (3, H, W) in [0, 1] -> (3, H, 3W) in [0, 1]."""
    return torch.cat([img, rec, (4 * (img - rec).abs()).clamp(0, 1)], dim=2)


def image_noise(numbers, N, channels, seed=0):
    """Decoding noise as a function of (seed, image number): a list of B numbers -> (B, N, channels), on the CPU."""
    draws = []
    for n in numbers:
        state = np.random.SeedSequence([seed, n]).generate_state(1, np.uint64)
        draws.append(torch.randn(N, channels, generator=torch.Generator().manual_seed(int(state[0]))))
    return torch.stack(draws)


def refuse_unless_finite(x, what="features"):
    """UserError if a row of x (n, ..), features or images, is not finite."""
    if not x.isfinite().all():
        rows = (~x.isfinite()).flatten(1).any(1).sum()
        raise UserError(f"{what} are not finite in {rows} of {len(x)} rows: the weights are damaged")


class Moments:
    """Mean and covariance of the rows seen so far, in float64. The rows are not kept, and a mean that is large beside the
    standard deviation costs no accuracy (Chan et al. 1979). `mean` (D,), `covariance` (D, D), unbiased."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def add(self, x):
        """Rows x (n, D). Raises UserError if one is not finite."""
        x = x.double()
        refuse_unless_finite(x)
        mean = x.mean(0)
        self.merge(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, count, mean, scatter):
        """Other rows, of which these are the number, the mean and the sum of outer products about the mean."""
        total, step = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean, self.count = self.mean + step * (count / total), total

    @property
    def covariance(self):
        return self.scatter / (self.count - 1)


def fit_patch_pca(batches, p, components, over_ranks=lambda moments: moments):
    """Per-patch linear PCA from an iterable of images (B, 3, H, W) in [0, 1], streamed, in float64.

    Returns the mean patch (3p^2,) and an orthonormal basis (3p^2, components). It is the best linear code of one patch
    at that size, so a tokenizer with as many latent channels that does not beat it has not used its context.
    """
    patches = Moments()
    for img in batches:
        patches.add(F.unfold(img.double(), p, stride=p).transpose(1, 2).flatten(0, 1))  # (B*N, 3p^2)
    patches = over_ranks(patches)
    return patches.mean, torch.linalg.eigh(patches.covariance)[1][:, -components:]  # eigenvalues ascend


def patch_pca(img, mean, basis, p):
    """Images (B, 3, H, W) in [0, 1] through the code of fit_patch_pca and back, clamped to [0, 1]."""
    x = F.unfold(img.double(), p, stride=p).transpose(1, 2) - mean  # (B, N, 3p^2)
    x = x @ basis @ basis.T + mean
    return F.fold(x.transpose(1, 2), img.shape[2:], p, stride=p).clamp(0, 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two Gaussians: means (D,), covariances (D, D), numpy or torch -> float, computed in float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2, S = L L^T. L comes from the eigenvalues of S above
    rounding, so a covariance of low rank does no harm. Raises ValueError for shapes that differ or entries that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mu1, sigma1, mu2, sigma2))
    D = len(mu1)
    if not mu1.shape == mu2.shape == (D,) or not sigma1.shape == sigma2.shape == (D, D):
        raise ValueError(f"statistics of {tuple(mu1.shape)}, {tuple(sigma1.shape)} and {tuple(mu2.shape)}, {tuple(sigma2.shape)} have no "
                         "distance: both need a mean (D,) and a covariance (D, D) of the same features")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics are not finite")

    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1] * D * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()  # (D, rank)
    cross = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp(min=0).item()


def split_sums(logits, split, splits):
    """What the Inception score sums over images: logits (B, K), the split (B,) of each image ->
    (splits, 2 + K): number of images, sum of p log p, sum of the probabilities p."""
    p, log_p = logits.double().softmax(1), logits.double().log_softmax(1)
    rows = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], dim=1)
    return rows.new_zeros(splits, rows.shape[1]).index_add(0, split.to(rows.device), rows)


def score_of_sums(sums):
    """The Inception score (mean, standard deviation over splits) from the split_sums of all images."""
    p = sums[:, 2:] / sums[:, :1]  # p(y) in each split
    score = (sums[:, 1] / sums[:, 0] - torch.xlogy(p, p).sum(1)).exp()
    return score.mean().item(), score.std(correction=0).item()


def draw_splits(n, splits):
    """The split of each of n images, (n,), by a permutation that is a function of n alone: files in the order of their
    classes would give each split a few classes, and a low score."""
    return torch.from_numpy(np.random.default_rng(n).permutation(n)) * splits // n


def inception_score(logits, splits=10):
    """Inception score of N images from their bias-free logits (N, K): (mean, standard deviation) over `splits` parts of
    equal size (fewer if there are fewer images), drawn by a permutation that is a function of N alone."""
    splits = min(splits, len(logits))
    return score_of_sums(split_sums(logits, draw_splits(len(logits), splits), splits))


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size unless `valid`; stride 2 takes no padding."""

    def __init__(self, c_in, c_out, kernel, stride=1, valid=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, "valid" if valid or stride == 2 else "same", bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)  # TensorFlow's epsilon; PyTorch's default is 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: branches on the same input, of which branch_pool begins with `pooling`, concatenated. branches: {name: layers};
    a layer is the (channels, kernel[, stride]) of a convolution, or a list of two convolutions side by side."""

    def __init__(self, c_in, pooling, branches):
        super().__init__()
        self.pooling, self.channels = pooling, 0
        self.branches = {}  # for each branch its layers, each the names of one convolution or of two side by side
        for name, layers in branches.items():
            c, self.branches[name] = c_in, []
            for i, layer in enumerate(layers, 1):
                pair = layer if isinstance(layer, list) else [layer]
                number = f"_{i}" if len(layers) > 1 else ""  # as torchvision's names
                names = [name + number + letter for letter in ("ab" if len(pair) > 1 else [""])]
                for n, spec in zip(names, pair):
                    self.add_module(n, ConvBN(c, *spec))
                c = sum(spec[0] for spec in pair)
                self.branches[name].append(names)
            self.channels += c

    def forward(self, x):
        outputs = []
        for name, layers in self.branches.items():
            y = self.pooling(x) if name == "branch_pool" else x
            for names in layers:
                y = torch.cat([getattr(self, n)(y) for n in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def mixed_5(pool):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]}


def mixed_6(c):
    row, column = (1, 7), (7, 1)
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, row), (192, column)],
            "branch7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)], "branch_pool": [(192, 1)]}


def refuse_pickle(path):
    """UserError for another pickle than pytorch-fid's where torch is not safe from it (CVE-2025-32434, CVE-2026-24747)."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10) and not sha256(path).startswith(INCEPTION_SHA256):
        raise UserError(f"{path} is not the file {INCEPTION_URL}, and torch {torch.__version__} does not read other "
                        "pickles safely: use torch 2.10 or newer")


class InceptionV3(nn.Module):
    """The network of FID and IS: img (B, 3, H, W) in [0, 1], any size -> pool features (B, 2048), bias-free logits (B, 1008).

    path: pytorch-fid's pt_inception-2015-12-05-6726825d.pth (INCEPTION_URL), a port of TensorFlow's 2015 graph. Raises
    MissingFile, and UserError for another file. In eval mode on the CPU, without gradients.
    """

    def __init__(self, path):
        super().__init__()
        stem = {"Conv2d_1a_3x3": ConvBN(3, 32, 3, 2), "Conv2d_2a_3x3": ConvBN(32, 32, 3, valid=True), "Conv2d_2b_3x3": ConvBN(32, 64, 3),
                "maxpool1": nn.MaxPool2d(3, 2), "Conv2d_3b_1x1": ConvBN(64, 80, 1), "Conv2d_4a_3x3": ConvBN(80, 192, 3, valid=True),
                "maxpool2": nn.MaxPool2d(3, 2)}
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # TensorFlow leaves the padding out of the count; PyTorch's default does not
        maximum, halved = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)
        fork = [(384, (1, 3)), (384, (3, 1))]
        mixed_7 = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork], "branch_pool": [(192, 1)]}
        blocks = {
            "Mixed_5b": (average, mixed_5(32)), "Mixed_5c": (average, mixed_5(64)), "Mixed_5d": (average, mixed_5(64)),
            "Mixed_6a": (halved, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "branch_pool": []}),
            "Mixed_6b": (average, mixed_6(128)), "Mixed_6c": (average, mixed_6(160)), "Mixed_6d": (average, mixed_6(160)),
            "Mixed_6e": (average, mixed_6(192)),
            "Mixed_7a": (halved, {"branch3x3": [(192, 1), (320, 3, 2)],
                                  "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []}),
            # the 2015 graph pools by maximum in its last block, where the published architecture averages
            "Mixed_7b": (average, mixed_7), "Mixed_7c": (maximum, mixed_7),
        }
        for name, module in stem.items():
            self.add_module(name, module)
        channels = 192
        for name, spec in blocks.items():
            self.add_module(name, Mixed(channels, *spec))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, 1008)  # TensorFlow's 1008 classes, of which 1000 are ImageNet's

        if not os.path.isfile(path):
            raise MissingFile(f"{path}: no such file; it is {INCEPTION_URL}")
        refuse_pickle(path)
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except OSError:
            raise
        except Exception as e:  # torch.load raises many types; all others mean that the file is another
            why = " ".join(str(e).split())[:300]
            raise UserError(f"{path} is not pytorch-fid's Inception ({type(e).__name__}: {why}); "
                            f"it is {INCEPTION_URL}") from None
        self.eval().requires_grad_(False)

    def forward(self, img):
        # bilinear, half-pixel centres, no antialiasing: pytorch-fid's resize, part of what makes FIDs comparable
        x = F.interpolate(img.float(), size=(299, 299), mode="bilinear", align_corners=False)
        x = 2 * x - 1  # the 2015 graph takes [-1, 1], torchvision's network ImageNet's mean and deviation
        *blocks, fc = self.children()
        for block in blocks:
            x = block(x)
        pool = x.mean(dim=(2, 3))  # (B, 2048)
        return pool, pool @ fc.weight.T  # IS was defined on TensorFlow's logits before their bias


def linear_probe(x, y, test_x, test_y, seed=0, epochs=40, batch=1024, rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """Accuracy in % of a linear classifier on frozen features: x (n, D), labels y (n,) to fit, test_x and test_y to measure.

    Softmax regression on standardised features by SGD (momentum 0.9, cosine schedule), one classifier for each learning
    rate; a tenth of x, kept back, chooses among them. Returns (accuracy, learning rate), the same for the same seed.
    Raises UserError for features that are not finite.
    """
    refuse_unless_finite(x), refuse_unless_finite(test_x)
    mean, std, classes = x.mean(0), x.std(0) + 1e-6, int(y.max()) + 1
    x, test_x = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (x, test_x))  # the last column is the bias'
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=random).to(x.device)
    held, kept = order[:len(x) // 10], order[len(x) // 10:]
    heads, rate = x.new_zeros(len(rates), x.shape[1], classes), x.new_tensor(rates).view(-1, 1, 1)
    velocity, steps = torch.zeros_like(heads), epochs * -(-len(kept) // batch)
    batches = (i for _ in range(epochs) for i in kept[torch.randperm(len(kept), generator=random).to(x.device)].split(batch))
    for step, i in enumerate(batches):
        inputs = x[i]
        error = (inputs @ heads).softmax(-1) - F.one_hot(y[i], classes)  # the gradient of the cross-entropy with respect to the logits
        velocity = 0.9 * velocity + inputs.T @ error / len(i)
        heads -= rate * (0.5 + 0.5 * math.cos(math.pi * step / steps)) * velocity
    accuracy = lambda head, x, y: 100 * ((x @ head).argmax(1) == y).double().mean().item()
    best = max(range(len(rates)), key=lambda i: accuracy(heads[i], x[held], y[held]))
    return accuracy(heads[best], test_x, test_y), rates[best]


def nearest_neighbours(x, y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy in % of k-NN by cosine on features x (n, D), labels y (n,): votes weigh exp(cosine / temperature).

    The weights of the votes are DINO's. Raises UserError for features that are not finite.
    """
    refuse_unless_finite(x), refuse_unless_finite(test_x)
    x, right = F.normalize(x.float(), dim=1), 0
    for i in range(0, len(test_x), 512):
        cosine, nearest = (F.normalize(test_x[i:i + 512].float(), dim=1) @ x.T).topk(min(k, len(x)))  # (b, k)
        votes = cosine.new_zeros(len(cosine), int(y.max()) + 1).scatter_add_(1, y[nearest], (cosine / temperature).exp())
        right += (votes.argmax(1) == test_y[i:i + 512]).sum().item()
    return 100 * right / len(test_x)


class Readable(Dataset):
    """Items of datasets of the same files: (number, images, label, None), or (number, None, None, why) for a file that
    cannot be used, so that an evaluation can name them all. An image of another size than the first that can be read is
    one of these, as a batch has one size."""

    def __init__(self, *datasets):
        from tools.script import USER_ERRORS

        self.datasets, self.shape = datasets, None
        for n in range(len(self)):
            with contextlib.suppress(*USER_ERRORS):
                self.shape = datasets[0][n][0].shape
                break

    def __len__(self):
        return len(self.datasets[0])

    def __getitem__(self, n):
        from tools.script import USER_ERRORS

        try:
            images, labels = zip(*(d[n] for d in self.datasets))
        except USER_ERRORS as e:
            return n, None, None, str(e)
        if images[0].shape != self.shape:
            sizes = [f"{s[2]}x{s[1]}" for s in (images[0].shape, self.shape)]
            return n, None, None, f"{self.datasets[0].path(n)} is {sizes[0]}, the first is {sizes[1]}: --resolution 256 crops all to 256x256"
        return n, images, labels[0], None


def collate(items):
    """Items of Readable -> (numbers, batches uint8 (b, 3, H, W), labels) of what can be used, and reasons of the rest.

    Workers send arrays through a pipe. They would send tensors through /dev/shm, by a thread that loses its errors:
    where /dev/shm is small (64 MB in Docker), or descriptors run out, the main process would wait for ever.
    """
    bad, good = [x[3] for x in items if x[3]], [x for x in items if not x[3]]
    numbers, images, labels, _ = zip(*good) if good else ((), (), (), ())
    return list(numbers), [torch.stack(x).numpy() for x in zip(*images)], list(labels), bad


class NpzImages(Dataset):
    """Images of an .npz in the layout of ADM's sample batches: `arr_0`, uint8 (N, H, W, 3), read where they lie.

    Each rank first unpacks a compressed one into the temporary folder, which takes 3 bytes a pixel there.
    """

    def __init__(self, path):
        self.name = self.file = path
        with zipfile.ZipFile(path) as z:
            entry = z.getinfo("arr_0.npy")
            with z.open(entry) as f:
                np.lib.format.read_magic(f)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)  # later versions: lists of columns
                start = f.tell()
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran:
                raise UserError(f"arr_0 is {dtype} {shape}; it must be uint8 (N, H, W, 3)")
            if entry.compress_type == zipfile.ZIP_STORED:
                with open(path, "rb") as f:  # the entry's local header
                    f.seek(entry.header_offset)
                    start += entry.header_offset + 30 + sum(struct.unpack("<26xHH", f.read(30)))
            else:
                folder = tempfile.mkdtemp()
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                try:
                    self.file = z.extract(entry, folder)
                except OSError as e:
                    raise OSError(e.errno, f"{path} cannot be unpacked into {folder} ({e.strerror}): make room, or set "
                                  "TMPDIR to a folder that has it") from None
        self.start, self.shape = start, shape
        if start + math.prod(shape) > os.path.getsize(self.file):
            raise UserError(f"arr_0 of {shape} is cut off: {self.file} is too short")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, n):
        size = math.prod(self.shape[1:])
        img = np.fromfile(self.file, np.uint8, size, offset=self.start + range(len(self))[n] * size)
        return torch.from_numpy(img.reshape(self.shape[1:])).permute(2, 0, 1), 0  # uint8 (3, H, W)

    def path(self, n):
        return f"{self.name}[{n}]"


def read_npz(path):
    """(mu (D,), sigma (D, D)) of an .npz of statistics, or the NpzImages of one of images. UserError for another."""
    from tools.script import machines_trouble

    try:
        with np.load(path) as f:
            if {"mu", "sigma"} <= set(f.files):
                mu, sigma = (np.asarray(f[key], np.float64) for key in ("mu", "sigma"))
                if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.isfinite(mu.sum() + sigma.sum()):
                    raise UserError(f"mu is {mu.shape}, sigma {sigma.shape}; they must be (D,) and (D, D), and finite")
                return mu, sigma
        return NpzImages(path)
    except Exception as e:  # damage makes zipfile, zlib and numpy raise nearly any type
        if machines_trouble(e):
            raise
        raise UserError(f"{path} is neither images nor statistics ({type(e).__name__}: {e}): an .npz holds arr_0, "
                        "or mu and sigma") from None


def sha256(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def parse_args(argv=None):
    from data import cores

    ap = argparse.ArgumentParser(description="How good is a tokenizer? Runs the same under torchrun. Every report says its protocol.")
    add = ap.add_argument
    add("--data", nargs="+", metavar="PATH", help="images to measure: folders or .zip archives")
    add("--weights", metavar="FILE",
        help="tokenizer: a file, or uniflow-internvit, the authors' [out/model.safetensors, else the shipped weights]")
    add("--fit", nargs="+", metavar="PATH", help="images that PCA and probe are fitted on")
    # what to measure
    add("--inception", default=INCEPTION_URL, metavar="FILE", help="pytorch-fid's file or a URL; none: no rFID, no IS [downloaded once, 91 MB]")
    add("--pca", action="store_true", help="add the row of a per-patch linear PCA with as many components as the latent has channels")
    add("--probe", action="store_true", help="add a linear probe and 20-NN of the encoder and its teacher, and their cosine at every layer")
    add("--teacher", metavar="NAME|FILE", help="for --probe [as the weights file says]")
    add("--teacher_weights", metavar="PATH|random", help="for --probe [as the weights file says]")
    # or
    add("--fid", nargs="+", metavar="A", help="instead: FID between A and B: folders, .zip, .npz of images (arr_0) or statistics (mu, sigma)")
    add("--save_stats", metavar="FILE", help="with --fid: write mu and sigma of A to this .npz; B may be left out")
    add("--latent_stats", action="store_true", help="instead: mean and deviation of the latent channels over --data, into the weights file or --out")
    add("--save_latents", metavar="FOLDER", help="instead: write the normalised latents of --data and their labels as safetensors; resumes")
    # how
    add("--size", type=int, help="pixels of the crops that go in, a multiple of the patch [the model's native size]")
    add("--resolution", default="native", choices=["native", "256"], help="size at which reconstructions are compared: native, the size that went in "
        "(the paper's Table 3a), or resized to 256 (Table 1); with --fid, images as they are or cropped to 256 [%(default)s]")
    add("--steps", type=int, default=1, help="Euler steps of the decoder [%(default)s]")
    add("--seed", type=int, default=0, help="of the decoding noise and of the probe [%(default)s]")
    add("--batch_size", type=int, default=32, help="images at a time, on each rank [%(default)s]")
    add("--workers", type=int, default=max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))),
        help="processes that load images, on each rank; 0: none [%(default)s: CPU cores / ranks, at most 8]")
    add("--bf16", action="store_true", help="run the tokenizer in bf16 autocast instead of fp32 without TF32; with --save_latents also store bf16")
    add("--out", metavar="FILE", help="also write the report as JSON")
    args = ap.parse_args(argv)
    others = [bool(x) for x in (args.fid, args.latent_stats, args.save_latents)]
    refusals = {
        f"batch_size {args.batch_size} and steps {args.steps} must be at least 1": min(args.batch_size, args.steps) < 1,
        f"workers {args.workers} must be at least 0": args.workers < 0,
        "--fid, --latent_stats and --save_latents are jobs of their own: give one": sum(others) > 1,
        f"--fid compares A and B, got {len(args.fid or ())}; --fid A --save_stats FILE.npz only saves":
            args.fid and len(args.fid) != 2 and not (args.save_stats and len(args.fid) == 1),
        "--save_stats goes with --fid": args.save_stats and not args.fid,
        "--pca and --probe measure a tokenizer: leave them out of --fid, --latent_stats and --save_latents": (args.pca or args.probe) and any(others),
        f"--out {args.out}: with --latent_stats it is a weights file, .safetensors, and else a report, .json":
            args.out and args.out.endswith(".safetensors") != args.latent_stats,
        "--size is of what goes into a tokenizer: leave it out of --fid (--resolution 256 crops)": args.fid and args.size,
        "--latent_stats writes into the weights file: give --weights FILE, or --out NEW.safetensors":
            args.latent_stats and not (args.weights or args.out),
        "--fid needs --inception": args.fid and args.inception == "none",
        "--data PATH is needed: the images to measure": not args.fid and not args.data,
        "--pca and --probe need --fit PATH, images that they are fitted on (not those they are measured on)": (args.pca or args.probe) and not args.fit,
    }
    for why, refused in refusals.items():
        if refused:
            ap.error(why)
    target = args.weights if args.latent_stats and os.path.isfile(args.weights or "") else None
    for path in filter(None, (args.out or target, args.save_stats)):
        folder = os.path.dirname(path) or "."
        if not os.access(folder, os.W_OK) or os.path.isdir(path):
            ap.error(f"{path}: there is no folder {folder} that can be written to, or this is one")
    return args


class Job:
    """One run of the command line: its arguments, this rank's share of the images, exchange among ranks, the report."""

    def __init__(self, args):
        from tools.script import rank_and_device

        self.args, self.start = args, time.time()
        self.rank, self.ranks, self.device = rank_and_device()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16)
        self.precision = "bf16 autocast" if args.bf16 else "fp32 without TF32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        if self.ranks > 1 and not dist.is_initialized():
            # little is exchanged: sums, at the end; others may have to wait for rank 0 longer than the usual half an hour
            dist.init_process_group("gloo", timeout=timedelta(days=1))

    def gather(self, x, everywhere=True):
        """Every rank's x, in rank order, on every rank, or on rank 0 alone (elsewhere an empty list)."""
        parts = [x] * self.ranks
        if self.ranks > 1 and everywhere:
            dist.all_gather_object(parts, x)
        elif self.ranks > 1:
            dist.gather_object(x, parts if self.rank == 0 else None)
        return parts if everywhere or self.rank == 0 else []

    def merge_ranks(self, moments):
        """The Moments of all ranks' rows, on the CPU."""
        whole = Moments()
        for count, mean, scatter in self.gather((moments.count, moments.mean.cpu(), moments.scatter.cpu())):
            if count:
                whole.merge(count, mean, scatter)
        return whole

    def crops(self, paths, size):
        from data import ImageDataset

        return ImageDataset(paths, size, train=False)

    def images(self, note, *datasets, numbers=None):
        """Yields this rank's images: (numbers, one batch (b, 3, H, W) in [0, 1] of each dataset, labels). All ranks must exhaust it.

        An image that cannot be used is never left out: the others are then read only to find out how many there are, and
        UserError names them.
        """
        from tqdm import tqdm

        from tools.script import check_locks

        numbers = range(self.rank, len(datasets[0]), self.ranks) if numbers is None else numbers
        threaded = self.device.type == "cuda"  # pin_memory's thread receives the batches; arrays it does not pin
        loader = DataLoader(Subset(Readable(*datasets), numbers), self.args.batch_size, num_workers=self.args.workers,
                            collate_fn=collate, pin_memory=threaded)
        check_locks(self.args.workers)
        bad = []
        with tqdm(total=len(numbers), desc=note, unit="img", disable=None if self.rank == 0 else True, leave=False) as bar:
            for n, batch, labels, reasons in loader:
                bad += reasons
                bar.update(len(n) + len(reasons))
                if n and not bad:
                    yield n, *(torch.from_numpy(img).to(self.device) / 255 for img in batch), torch.tensor(labels)
        bad = sum(self.gather(bad), [])
        if bad:
            raise UserError(f"{len(bad)} of {len(datasets[0])} images cannot be used, so there are no figures: "
                            + "; ".join(bad[:10]) + "; ..." * (len(bad) > 10))

    def inception(self):
        """(network, what to call it) as --inception says, (None, None) for none."""
        from encoder import fetch
        from tools.script import USER_ERRORS

        if self.args.inception == "none":
            return None, None
        try:
            path = fetch(self.args.inception)
        except USER_ERRORS as e:
            raise UserError(f"{e}" + "; or leave rFID and IS out: --inception none" * (not self.args.fid)) from None
        network, digest = InceptionV3(path).to(self.device), sha256(path)
        known = digest.startswith(INCEPTION_SHA256)
        return network, (f"Inception {os.path.basename(path)} (sha256 {digest[:8]}{'' if known else ', NOT that of pytorch-fid: compare with nothing'}), "
                         "bilinear resize to 299 without antialiasing, float64 statistics")

    def finish(self, report, table):
        """On rank 0 write the report to --out as JSON and print it, if need be to stderr. Returns it."""
        from encoder import write_atomically
        from tools.script import commit, name_weights

        on_gpu = self.device.type == "cuda"
        report.update(code=commit(), torch=torch.__version__, ranks=self.ranks, seconds=round(time.time() - self.start, 1),
                      device=torch.cuda.get_device_name() if on_gpu else "cpu",
                      memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None)
        if self.rank == 0:
            lines = []
            for key in ("weights", "step", "teacher", "data", "fit", "images", "protocol", "warning"):
                if report.get(key) is not None:
                    said = name_weights(self.args.weights, report[key]) if key == "weights" else report[key]
                    lines.append(f"{key:9s} {' '.join(said) if isinstance(said, list) else said}")
            text = "\n".join([*lines, "", *table])
            finite = json.loads(json.dumps(report), parse_constant=lambda name: None)  # JSON knows no NaN
            content = json.dumps(finite, indent=1, allow_nan=False).encode()
            try:
                if self.args.out and not self.args.latent_stats:
                    write_atomically(self.args.out, lambda f: f.write(content))
            finally:  # one of them may fail
                try:
                    print(text, file=sys.stdout or sys.stderr, flush=True)  # None where it was closed
                except (OSError, ValueError) as e:
                    print(text, file=sys.stderr)
                    raise UserError(f"standard output cannot be written ({e}): the report is above"
                                    + f" and in {self.args.out}" * bool(self.args.out)) from None
        if self.ranks > 1:
            dist.barrier()
        return report


class FidStatistics:
    """What FID and the Inception score need of the `total` images of `name`, added in any order, on any rank."""

    def __init__(self, network, total, name):
        if total < 2:
            raise UserError(f"{name} holds {total} image; a covariance, and so an FID, needs at least 2 "
                            "(or --inception none)")
        self.network, self.pools, splits = network, Moments(), min(10, total)
        self.split, self.sums = draw_splits(total, splits), torch.zeros(splits, 1010, dtype=torch.float64)

    def add(self, img, numbers):
        """Images (b, 3, H, W) in [0, 1] and their numbers among all."""
        pool, logits = self.network(img)
        self.pools.add(pool)
        self.sums += split_sums(logits, self.split[numbers], len(self.sums)).cpu()

    def over_ranks(self, job):
        """(mean, covariance) of the pool features and (mean, deviation) of the Inception score, of all ranks' images."""
        pools = job.merge_ranks(self.pools)
        return (pools.mean, pools.covariance), score_of_sums(sum(job.gather(self.sums)))


def warn_of_few(n):
    """A covariance of 2048 dimensions from fewer images has not even full rank."""
    return f"FID of {n} images, fewer than the 2048 dimensions of its covariance: such a figure means little" if n < 2048 else None


@torch.no_grad()
def between_sets(job):
    """--fid A B: the distance between two sets of images or statistics; the Inception score of images."""
    from encoder import write_atomically

    args, table, found, counts = job.args, [], [], []
    for path in args.fid:
        if not os.path.exists(path):
            raise MissingFile(f"{path}: no such folder, .zip or .npz")
    sets = [read_npz(path) if path.endswith(".npz") else job.crops([path], None if args.resolution == "native" else 256)
            for path in args.fid]
    network, name = job.inception()
    for which, path, data in zip("AB", args.fid, sets):
        if isinstance(data, tuple):
            found.append(data)
            table.append(f"{which}: statistics of {path}")
            continue
        rated, start = FidStatistics(network, len(data), path), time.time()
        for n, img, _ in job.images(f"features of {which}", data):
            rated.add(img, n)
        statistics, score = rated.over_ranks(job)
        found.append(statistics)
        counts.append(len(data))
        table.append(f"{which}: {len(data):,} images of {path}, IS {score[0]:.2f} +- {score[1]:.2f}, {len(data) / (time.time() - start):.0f} img/s")
    unsaved = None
    if args.save_stats and job.rank == 0:
        mu, sigma = map(np.asarray, found[0])
        try:
            write_atomically(args.save_stats, lambda f: np.savez(f, mu=mu, sigma=sigma))
            table.append(f"statistics of A in {args.save_stats}")
        except OSError as e:  # the figures come first
            unsaved = e
    shapes = [tuple(sigma.shape) for _, sigma in found]
    if len(set(shapes)) > 1:
        raise UserError(f"{' and '.join(args.fid)} have no distance: covariances of {shapes[0]} and {shapes[1]}; "
                        "take the features of one network")
    crops = "images as they are" if args.resolution == "native" else "folders and archives in ADM crops of 256 px"
    report = {"fid": frechet_distance(*found[0], *found[1]) if len(found) == 2 and job.rank == 0 else None,
              "sets": table, "warning": warn_of_few(min(counts, default=2048)),
              "protocol": f"{name}; {crops}"
                          + "; IS in 10 splits (of fewer images in as many) by a fixed permutation" * bool(counts)}
    if report["fid"] is not None:
        table.append(f"FID {report['fid']:.3f}")
    job.finish(report, table)
    if unsaved:
        raise UserError(f"{args.save_stats} could not be written ({unsaved})")
    return report


@torch.no_grad()
def latent_statistics(job, enc, dec, inputs, info, about):
    """--latent_stats: per-channel mean and standard deviation of the latents, into the weights file."""
    from encoder import write_model
    from safetensors.torch import load_file

    weights, latents = about["weights"], Moments()
    if "released" in info and not job.args.out:
        raise UserError(f"{weights} is the authors' file and stays as it is: give --out NEW.safetensors")
    for _, img, _ in job.images("latents", inputs):
        with job.autocast:
            latents.add(enc(img)[0].transpose(0, 1).flatten(1).T)  # (b*h*w, C), not normalised
    latents = job.merge_ranks(latents)
    mean, std = latents.mean.float(), (latents.scatter.diagonal() / latents.count).sqrt().float()
    if not (std > 0).all():
        constant = torch.nonzero(std <= 0).flatten().tolist()
        raise UserError(f"latent channels {constant} are constant, nothing to normalise by: train longer")
    target = job.args.out or weights
    if job.rank == 0:
        if sha256(weights) != about["weights_sha256"]:
            raise UserError(f"{weights} was written anew meanwhile: run this again on a copy, or after its training")
        if "released" in info:
            tensors = {f"{part}.{k}": x for part, module in (("encoder", enc), ("decoder", dec)) for k, x in module.cpu().named_parameters()}
            info = {**{k: v for k, v in info.items() if k != "released"}, "decoder": vars(dec.config)}
        else:
            tensors = load_file(weights)
        write_model(target, {**info, "latent_images": len(inputs)}, {**tensors, "latent_mean": mean, "latent_std": std})
    return job.finish({**about, "latent_mean": mean.tolist(), "latent_std": std.tolist(),
                       "protocol": f"ADM centre crops to {inputs.size} px, {job.precision}, per channel over images and positions"},
                      [f"mean      {' '.join(f'{x:.3f}' for x in mean)}", f"deviation {' '.join(f'{x:.3f}' for x in std)}",
                       f"in {target}: encode now returns latents of mean 0 and deviation 1 there, and decode undoes it"])


@torch.no_grad()
def save_latents(job, enc, inputs, info, about, shard=1024):
    """--save_latents: normalised latents and labels in files of `shard` images, each written whole or not at all; what is there stays."""
    from encoder import write_atomically, write_model
    from safetensors import SafetensorError, safe_open

    folder, dtype = job.args.save_latents, torch.bfloat16 if job.args.bf16 else torch.float32
    if not (enc.latent_mean.any() or (enc.latent_std != 1).any()):
        raise UserError(f"{about['weights']} has no latent statistics yet: "
                        f"python eval.py --latent_stats --data TRAIN --weights {about['weights']}")
    identity = hashlib.sha256(json.dumps([os.path.abspath(r) for r in inputs.roots]).encode() + inputs.names)
    identity.update(inputs.name_ends.tobytes() + inputs.spans.tobytes())  # of archives: lengths and CRC-32
    made_of = {"weights_sha256": about["weights_sha256"], "data_sha256": identity.hexdigest(), "images": len(inputs), "size": inputs.size, "dtype": str(dtype)}
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"--save_latents {folder} is no folder to write to ({e})") from None
    path_of, missing = lambda k: os.path.join(folder, f"latents_{k:05d}.safetensors"), []
    for k in range(job.rank, -(-len(inputs) // shard), job.ranks):
        if not os.path.exists(path_of(k)):
            missing.append(range(k * shard, min(len(inputs), (k + 1) * shard)))
            continue
        try:
            with safe_open(path_of(k), "pt") as f:
                have = json.loads(f.metadata()["config"])
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path_of(k)} is damaged ({e}): delete it and run this again") from None
        if any(have.get(key) != value for key, value in made_of.items()):
            raise UserError(f"{path_of(k)} is of other weights, data, size or precision: use another folder")
    z, labels = [], []
    for n, img, y in job.images("latents", inputs, numbers=[i for numbers in missing for i in numbers]):
        with job.autocast:
            latents = enc.encode(img).to(dtype).cpu()
        for i, x, label in zip(n, latents, y.tolist()):
            z.append(x)
            labels.append(label)
            if (i + 1) % shard == 0 or i + 1 == len(inputs):  # the last of its file
                k, tensors = i // shard, {"latents": torch.stack(z), "labels": torch.tensor(labels)}
                write_model(path_of(k), {**made_of, "first": k * shard}, tensors)
                z, labels = [], []
    if job.rank == 0:
        index = {**made_of, **about, "classes": inputs.classes, "shard": shard, "protocol": f"ADM centre crops to {inputs.size} px, {job.precision}"}
        write_atomically(os.path.join(folder, "index.json"), lambda f: f.write(json.dumps(index, indent=1).encode()))
    return job.finish(about, [f"{len(inputs):,} normalised latents with labels in {folder}, {sum(job.gather(len(missing)))} files of {shard} written now"])


@torch.no_grad()
def reconstruction(job, enc, dec, inputs, fit):
    """({row: figures} of the tokenizer and of the PCA beside it, on rank 0; the protocol)."""
    from PIL import Image

    from data import to_tensor

    args, p, C, native = job.args, dec.config.patch, dec.config.latent_dim, inputs.size
    size = native if args.resolution == "native" else int(args.resolution)
    if size < 11:
        raise UserError(f"pictures of {size}x{size} are smaller than SSIM's window of 11x11: give a larger --size")
    rows, results = ["tokenizer"] + [f"PCA, {C} per patch"] * args.pca, {}
    network, name = job.inception()
    rated = {row: FidStatistics(network, len(inputs), " ".join(args.data)) for row in ("reference", *rows)} if network else {}

    def compare_at(rec):  # (b, 3, native, native) -> (b, 3, size, size), rounded to uint8 before and after the resize
        rec = (rec * 255).round().to(torch.uint8).cpu()
        if size != native:
            shape, how = (size, size), Image.Resampling.BICUBIC
            rec = torch.stack([to_tensor(Image.fromarray(r.permute(1, 2, 0).numpy()).resize(shape, how)) for r in rec])
        return rec.to(job.device) / 255

    if args.pca:
        mean, basis = (x.to(job.device) for x in fit_patch_pca((img for _, img, _ in job.images("fit PCA", fit)), p, C, job.merge_ranks))
    scores = {row: torch.zeros(4, dtype=torch.float64) for row in rows}  # sums: PSNR, ssim, ssim_paper, perfect
    for n, *imgs, _ in job.images("reconstruct", inputs, *([job.crops(args.data, size)] if size != native else [])):
        img, ref = imgs[0], imgs[-1]  # what goes in, and the ADM crop of the original at the size of comparison
        noise = image_noise(n, (native // p) ** 2, 3 * p * p, args.seed).to(job.device)
        with job.autocast:
            recs = [dec.decode(enc.encode(img), args.steps, noise).float()]
        refuse_unless_finite(recs[0], "reconstructions")  # rounded to uint8 they would be black
        if args.pca:
            recs.append(patch_pca(img, mean, basis, p))
        if network:
            rated["reference"].add(ref, n)
        for row, rec in zip(rows, map(compare_at, recs)):
            decibels = psnr(ref, rec)
            measures = decibels.clamp(max=PERFECT), ssim(ref, rec), ssim(ref, rec, "uniform", 2.0), decibels.isposinf()
            scores[row] += torch.stack([x.double().sum() for x in measures]).cpu()
            if network:
                rated[row].add(rec, n)
    scores = {row: sum(job.gather(x)) / len(inputs) for row, x in scores.items()}
    rated = {row: x.over_ranks(job) for row, x in rated.items()}
    for row in rows if job.rank == 0 else ():
        *means, perfect = scores[row].tolist()
        results[row] = {**dict(zip(("psnr", "ssim", "ssim_paper"), means)), "perfect": round(perfect * len(inputs))}
        if network:
            (reference, _), (statistics, (score, deviation)) = rated["reference"], rated[row]
            results[row].update({"rfid": frechet_distance(*reference, *statistics), "is": score, "is_std": deviation})
    protocol = (f"ADM centre crop to {native} px in; compared at {size} px as uint8{', PIL bicubic,' if size != native else ''} with the ADM crop of the "
                f"original; {args.steps} Euler step{'s' * (args.steps > 1)}, noise from (seed {args.seed}, image number); {job.precision}; PSNR per image, "
                f"at most {PERFECT:.0f} dB, then averaged; ssim: Gaussian 11x11, sigma 1.5, data_range 1; "
                "ssim_paper: uniform 7x7, data_range 2 (the released notebook's, flattering)")
    if network:
        protocol += (f"; rFID against the same crops of the same images, IS in {min(10, len(inputs))} splits, "
                     f"drawn by a fixed permutation; {name}")
    return results, protocol


@torch.no_grad()
def understanding(job, enc, teacher, inputs, fit):
    """--probe: ({layer: {student and teacher: linear and 20-NN accuracy}}, mean cosine to the teacher of every layer), on rank 0."""
    P, cosines = teacher.num_prefix, torch.zeros(len(teacher.blocks), dtype=torch.float64)

    def features(data, note):
        """({(layer, who): (n, D)}, labels (n,)) of all ranks' images in order, averaged over positions; elsewhere than on rank 0 ({}, None)."""
        parts = {}
        for n, img, y in job.images(note, data):
            with job.autocast:
                z, student = enc(img)
                hidden = {"student": student, "teacher": teacher(img)}
                pooled = {"number": torch.tensor(n), "label": y, ("latent", "student"): z.flatten(2).mean(2).float()}
                for who, vit in ("student", enc.vit), ("teacher", teacher):
                    pooled["last layer", who] = vit.norm(hidden[who][-1])[:, P:].mean(1).float()
                    pooled["second to last", who] = hidden[who][-2][:, P:].mean(1).float()
            for name, x in pooled.items():
                parts.setdefault(name, []).append(x.cpu())
            if data is inputs:
                for l, (s, t) in enumerate(zip(*hidden.values())):
                    cosines[l] += F.cosine_similarity(s[:, P:].float(), t[:, P:].float(), dim=-1).mean(1).double().sum().item()
        shares = [s for s in job.gather({name: torch.cat(x) for name, x in parts.items()}, everywhere=False) if s]  # of ranks with images
        if not shares:
            return {}, None
        whole = {name: torch.cat([s[name] for s in shares]) for name in shares[0]}
        order, labels = whole.pop("number").argsort(), whole.pop("label")
        return {name: x[order].to(job.device) for name, x in whole.items()}, labels[order].to(job.device)

    x, y = features(fit, "features of --fit")
    test_x, test_y = features(inputs, "features of --data")
    cosines, probe = (sum(job.gather(cosines)) / len(inputs)).tolist(), {}
    if job.rank == 0:
        test_y = torch.tensor([fit.classes.index(c) for c in inputs.classes], device=job.device)[test_y]  # --fit's numbers of the classes
    for layer, who in x:
        one = x[layer, who], y, test_x[layer, who], test_y
        linear, rate = linear_probe(*one, job.args.seed)
        probe.setdefault(layer, {})[who] = {"linear": linear, "learning_rate": rate, "knn": nearest_neighbours(*one)}
    return probe, cosines


def main(argv=None):
    """Measure as the command line asks, print the report, and return it as a dict; figures of many images are rank 0's alone."""
    args = parse_args(argv)
    job = Job(args)
    if args.fid:
        return between_sets(job)
    from decoder import Decoder
    from encoder import Encoder, load_teacher, read_config
    from tools.script import find_weights

    weights = find_weights(args.weights)
    digest = sha256(weights)
    enc, dec = Encoder.from_pretrained(weights).to(job.device), Decoder.from_pretrained(weights).to(job.device)
    info = read_config(weights)
    if sha256(weights) != digest:
        raise UserError(f"{weights} was written anew while it was read: run this again")
    size, p = args.size or info["size"], dec.config.patch
    if size < p or size % p:
        nearest = max(1, round(size / p)) * p
        raise UserError(f"--size {size} is no multiple of the patch {p} of {weights}: try --size {nearest}")
    inputs = job.crops(args.data, size)
    about = {"weights": weights, "weights_sha256": digest, "step": info.get("step"), "teacher": info.get("teacher"),
             "commit": info.get("commit"), "data": args.data, "images": len(inputs)}
    if args.latent_stats:
        return latent_statistics(job, enc, dec, inputs, info, about)
    if args.save_latents:
        return save_latents(job, enc, inputs, info, about)

    fit = job.crops(args.fit, size) if args.pca or args.probe else None
    if args.probe:
        named = args.teacher or info.get("teacher"), args.teacher_weights or (None if args.teacher else info.get("teacher_weights"))
        teacher = load_teacher(*named).to(job.device)
        shape = lambda c: (c.width, c.depth, c.patch, c.num_prefix)
        if shape(teacher.config) != shape(enc.vit.config):
            raise UserError(f"teacher {named[0]} has another width, depth or patch than {weights}: "
                            "give its own with --teacher")
        unknown = sorted(set(inputs.classes) - set(fit.classes))
        if unknown or len(fit) < 20:
            raise UserError(f"--fit has {len(fit)} images and lacks the classes {' '.join(unknown[:5]) or '-'}: it "
                            "needs at least 20 images, and every class of --data (the folder that an image is in)")
    results, protocol = reconstruction(job, enc, dec, inputs, fit)
    rated = args.inception != "none"
    perfect = [f"{row}: {r['perfect']} of {len(inputs)} pictures equal the original, and count with {PERFECT:.0f} dB"
               for row, r in results.items() if r["perfect"]]
    warnings = [*perfect, warn_of_few(len(inputs)) if rated else None,
                "fitted on the images that are measured: PCA and probe mean little" if args.fit == args.data else None]
    report = {**about, "fit": args.fit, "results": results, "protocol": protocol, "warning": "; ".join(filter(None, warnings)) or None}
    table = [f"{'':18s}  PSNR dB    ssim  ssim_paper" + "      rFID             IS" * rated]
    for row, r in results.items():
        table.append(f"{row:18s}  {r['psnr']:7.2f}  {r['ssim']:.4f}      {r['ssim_paper']:.4f}"
                     + (f"  {r['rfid']:8.3f}  {r['is']:6.2f} +- {r['is_std']:.2f}" if rated else ""))
    if args.probe:
        report["probe"], report["cosine_to_teacher"] = understanding(job, enc, teacher, inputs, fit)
        report["protocol"] += ("; probe: features averaged over positions; softmax regression, 40 epochs of SGD, learning rate chosen on a tenth of "
                               "--fit; 20-NN by cosine, votes exp(cosine / 0.07)")
        table += ["", f"{'accuracy in %':18s}  linear: student  teacher   20-NN: student  teacher"]
        for layer, r in report["probe"].items():
            cells = [f"{r[who][kind]:7.2f}" if who in r else "      -" for kind in ("linear", "knn") for who in ("student", "teacher")]
            table.append("{:18s}          {}  {}          {}  {}".format(layer, *cells))
        table.append("cosine to the teacher, layer by layer: " + " ".join(f"{c:.3f}" for c in report["cosine_to_teacher"]))
    return job.finish(report, table)


def demo():
    img = torch.full((2, 3, 64, 64), 0.5)
    rec = img + 0.1 * torch.randn(2, 3, 64, 64).clamp(-3, 3)
    print("images    ", tuple(img.shape), "grey, with noise of standard deviation 0.1")
    print("psnr      ", [f"{x:.2f}" for x in psnr(img, rec)], "dB (20 expected)")
    print("ssim      ", [f"{x:.4f}" for x in ssim(img, rec)])
    print("ssim_paper", [f"{x:.4f}" for x in ssim(img, rec, "uniform", 2.0)])
    print("to measure a tokenizer: python eval.py --data VAL --weights out/model.safetensors")


def run():
    """main() for the command line. What the user gave, and the machine's trouble, is one line and status 2."""
    from tools.script import open_streams, user_message

    open_streams()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if not (said := user_message(e)):
            raise
        who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{who}eval.py: {said}", file=sys.stderr)
        sys.stdout = None  # if it cannot be written, Python would try again at its end, and change the status
        sys.exit(2)


if __name__ == "__main__":
    if sys.argv[1:]:
        import eval as itself  # here this file is `__main__`, whose UserError is not the one that the siblings know

        itself.run()
    else:
        demo()
