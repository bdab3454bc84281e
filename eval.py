"""How good is a tokenizer? PSNR, SSIM, rFID, Inception score, a linear probe and 20-NN, each with its protocol.

    PSNR = -10 log10(mean squared error)                                                  per image, of [0, 1]
    SSIM = mean of (2 ma mb + c1)(2 sab + c2) / ((ma^2 + mb^2 + c1)(sa^2 + sb^2 + c2))    Wang et al. 2004
    FID  = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))   of Inception's pool features   Heusel et al. 2017
    IS   = exp(mean of KL(p(y|x) || p(y)))           of Inception's class probabilities   Salimans et al. 2016

    python eval.py --data VAL --weights out/model.safetensors [--pca --fit TRAIN] [--probe --fit TRAIN]
    torchrun --nproc_per_node=8 eval.py ...       # the same figures, sooner
    python eval.py --fid A B                      # FID between folders, archives, .npz of images or of statistics

Part 1 is plain functions on images (B, 3, H, W) in [0, 1]. Copy this file alone to use them; they need torch and numpy.
`python eval.py` without arguments shows some of them on noise. Part 2 evaluates a tokenizer. Part 3 is the command
line. These two need the files beside this one; --fid goes on in tools/fid.py. The structure of the Inception network
is from Szegedy et al. 2015, with the differences of TensorFlow's 2015 graph as in pytorch-fid.
"""
import argparse
import hashlib
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---- 1. measures: plain functions and the Inception network, to copy ----

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"  # the first digits
PERFECT = 100.0  # dB: in a mean a picture counts with at most this, as in x264, libvpx and libaom


class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file that the user named is not there."""


def check_shapes(a, b):
    """Raise ValueError unless two batches have one shape: broadcasting would give figures that mean nothing."""
    if a.shape != b.shape:
        raise ValueError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}; expected two batches of the same shape")


def psnr(a, b):
    """Peak signal-to-noise ratio of each image in dB: a, b (B, 3, H, W) in [0, 1] -> (B,), float64.

    Equal images give inf. A mean over images counts these with PERFECT = 100 dB. Raises ValueError for two shapes.
    """
    check_shapes(a, b)
    return -10 * (a.double() - b.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(a, b, window="gaussian", data_range=1.0):
    """Structural similarity of each image: a, b (B, 3, H, W) in [0, 1] -> (B,), float64. It is a mean over the channels
    and over all windows that lie inside the image.

    window: "gaussian" is 11x11 with sigma 1.5 and population covariance (Wang et al.); "uniform" is 7x7 with sample
    covariance (scikit-image's default). data_range: the span of the pixel values, 1 for images in [0, 1]. The released
    UniFlow notebook takes the uniform window and a span of 2: ssim(a, b, "uniform", 2.0) is that figure. Reports call
    it ssim_paper; it is higher. Raises ValueError for two shapes, and for images smaller than the window.
    """
    check_shapes(a, b)
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
    """Original, reconstruction and 4 x absolute error side by side: two (3, H, W) in [0, 1] -> (3, H, 3W) in [0, 1]."""
    return torch.cat([img, rec, (4 * (img - rec).abs()).clamp(0, 1)], dim=2)


def image_noise(numbers, N, channels, seed=0):
    """Decoding noise as a function of (seed, image number): a list of B numbers -> (B, N, channels), on the CPU."""
    draws = []
    for n in numbers:
        state = np.random.SeedSequence([seed, n]).generate_state(1, np.uint64)
        draws.append(torch.randn(N, channels, generator=torch.Generator().manual_seed(int(state[0]))))
    return torch.stack(draws)


def refuse_unless_finite(x, what="features"):
    """Raise UserError if a number in x (n, ...), features or images, is not finite."""
    if not x.isfinite().all():
        rows = (~x.isfinite()).flatten(1).any(1).sum()
        raise UserError(f"{what} are not finite in {rows} of {len(x)} rows: the weights are damaged")


class Moments:
    """`mean` (D,) and unbiased `covariance` (D, D) of the rows added so far, in float64. The rows are not kept. A mean
    that is large beside the standard deviation costs no accuracy (Chan et al. 1979)."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def add(self, x):
        """Add the rows x (n, D). Raises UserError if one is not finite."""
        x = x.double()
        refuse_unless_finite(x)
        mean = x.mean(0)
        self.merge(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, count, mean, scatter):
        """Add other rows, given by their number, their mean and their sum of outer products about that mean."""
        total, step = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean, self.count = self.mean + step * (count / total), total

    @property
    def covariance(self):
        return self.scatter / (self.count - 1)


def fit_patch_pca(batches, p, components, merge_ranks=lambda moments: moments):
    """Linear PCA of single patches, from an iterable of images (B, 3, H, W) in [0, 1], in float64.

    Returns the mean patch (3p^2,) and an orthonormal basis (3p^2, components). No linear code of a patch with as
    many numbers is better. A tokenizer with as many latent channels also sees what is around the patch: it should win.
    merge_ranks: given the Moments of this rank's patches, returns those of all ranks' patches.
    """
    patches = Moments()
    for img in batches:
        patches.add(F.unfold(img.double(), p, stride=p).transpose(1, 2).flatten(0, 1))  # (B*N, 3p^2)
    patches = merge_ranks(patches)
    return patches.mean, torch.linalg.eigh(patches.covariance)[1][:, -components:]  # eigenvalues ascend


def patch_pca(img, mean, basis, p):
    """Encode and decode images (B, 3, H, W) in [0, 1] by the code of fit_patch_pca; the result is clamped to [0, 1]."""
    x = F.unfold(img.double(), p, stride=p).transpose(1, 2) - mean  # (B, N, 3p^2)
    x = x @ basis @ basis.T + mean
    return F.fold(x.transpose(1, 2), img.shape[2:], p, stride=p).clamp(0, 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two Gaussians: means (D,), covariances (D, D), numpy or torch -> float, computed in float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2, where S = L L^T. L is made of those eigenvalues of S
    that are above rounding errors, so a covariance of low rank does no harm. Raises ValueError for shapes that differ
    or for entries that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mu1, sigma1, mu2, sigma2))
    D = len(mu1)
    if not mu1.shape == mu2.shape == (D,) or not sigma1.shape == sigma2.shape == (D, D):
        shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
        raise ValueError("statistics of {}, {} and {}, {} have no distance: both need a mean (D,) and a covariance "
                         "(D, D) of the same features".format(*shapes))
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics are not finite")

    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1] * D * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()  # (D, rank)
    cross = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp(min=0).item()


def split_sums(logits, split, splits):
    """The sums over images that the Inception score is made of: logits (B, K) and the split (B,) of each image ->
    (splits, 2 + K), in each row the number of images, the sum of p log p, the sums of the K probabilities p."""
    p, log_p = logits.double().softmax(1), logits.double().log_softmax(1)
    rows = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], dim=1)
    return rows.new_zeros(splits, rows.shape[1]).index_add(0, split.to(rows.device), rows)


def score_of_sums(sums):
    """The Inception score, (mean, standard deviation) over splits, from the split_sums of all images."""
    p = sums[:, 2:] / sums[:, :1]  # p(y) in each split
    score = (sums[:, 1] / sums[:, 0] - torch.xlogy(p, p).sum(1)).exp()
    return score.mean().item(), score.std(correction=0).item()


def draw_splits(n, splits):
    """The split of each of n images, (n,), by a permutation that depends on n alone. If files are sorted by class,
    splits in their order would hold few classes each, and score low."""
    return torch.from_numpy(np.random.default_rng(n).permutation(n)) * splits // n


def inception_score(logits, splits=10):
    """Inception score of N images from their bias-free logits (N, K): (mean, standard deviation) over `splits` parts of
    equal size, drawn by draw_splits. Fewer images than splits make as many splits as images."""
    splits = min(splits, len(logits))
    return score_of_sums(split_sums(logits, draw_splits(len(logits), splits), splits))


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. At stride 1 padding keeps the size, unless `valid`; at stride 2 there is none."""

    def __init__(self, c_in, c_out, kernel, stride=1, valid=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, "valid" if valid or stride == 2 else "same", bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)  # TensorFlow's epsilon; PyTorch's default is 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: all branches see the same input, and their outputs are concatenated.

    branches: {name: layers}. A layer is (channels, kernel[, stride]) of one convolution, or a list of two of these,
    which see the same input and are concatenated. The branch called branch_pool begins with `pooling`.
    """

    def __init__(self, c_in, pooling, branches):
        super().__init__()
        self.pooling, self.channels = pooling, 0
        self.branches = {}  # {name: layers}, where a layer is the list of its convolutions' names
        for branch, layers in branches.items():
            c, self.branches[branch] = c_in, []
            for i, layer in enumerate(layers, 1):
                side_by_side = layer if isinstance(layer, list) else [layer]
                name = f"{branch}_{i}" if len(layers) > 1 else branch  # torchvision's names
                names = [name + "a", name + "b"] if isinstance(layer, list) else [name]
                for n, spec in zip(names, side_by_side):
                    self.add_module(n, ConvBN(c, *spec))
                c = sum(spec[0] for spec in side_by_side)
                self.branches[branch].append(names)
            self.channels += c

    def forward(self, x):
        outputs = []
        for branch, layers in self.branches.items():
            y = self.pooling(x) if branch == "branch_pool" else x
            for names in layers:
                y = torch.cat([getattr(self, n)(y) for n in names], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def mixed_5(pool):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(pool, 1)]}


def mixed_6(c):
    row, column = (1, 7), (7, 1)
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, row), (192, column)],
            "branch7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)], "branch_pool": [(192, 1)]}


def sha256(path):
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_pickle(path):
    """Where torch does not read pickles safely (CVE-2025-32434, CVE-2026-24747), refuse all but pytorch-fid's file."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10) and not sha256(path).startswith(INCEPTION_SHA256):
        raise UserError(f"{path} is not the file {INCEPTION_URL}, and torch {torch.__version__} does not read other "
                        "pickles safely: use torch 2.10 or newer")


class InceptionV3(nn.Module):
    """The network of FID and IS: img (B, 3, H, W) in [0, 1] of any size -> pool features (B, 2048) and bias-free logits
    (B, 1008).

    path: pytorch-fid's pt_inception-2015-12-05-6726825d.pth (INCEPTION_URL), a port of TensorFlow's 2015 graph. Raises
    MissingFile, and UserError for another file. In eval mode on the CPU, without gradients.
    """

    def __init__(self, path):
        super().__init__()
        stem = {"Conv2d_1a_3x3": ConvBN(3, 32, 3, 2), "Conv2d_2a_3x3": ConvBN(32, 32, 3, valid=True),
                "Conv2d_2b_3x3": ConvBN(32, 64, 3), "maxpool1": nn.MaxPool2d(3, 2),
                "Conv2d_3b_1x1": ConvBN(64, 80, 1), "Conv2d_4a_3x3": ConvBN(80, 192, 3, valid=True),
                "maxpool2": nn.MaxPool2d(3, 2)}
        # TensorFlow's average leaves the padding out of the count; PyTorch's default does not
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        maximum, halved = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)
        mixed_6a = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "branch_pool": []}
        mixed_7a = {"branch3x3": [(192, 1), (320, 3, 2)],
                    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []}
        fork = [(384, (1, 3)), (384, (3, 1))]
        mixed_7 = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
                   "branch3x3dbl": [(448, 1), (384, 3), fork], "branch_pool": [(192, 1)]}
        blocks = {
            "Mixed_5b": (average, mixed_5(32)), "Mixed_5c": (average, mixed_5(64)), "Mixed_5d": (average, mixed_5(64)),
            "Mixed_6a": (halved, mixed_6a), "Mixed_6b": (average, mixed_6(128)), "Mixed_6c": (average, mixed_6(160)),
            "Mixed_6d": (average, mixed_6(160)), "Mixed_6e": (average, mixed_6(192)),
            # the 2015 graph pools by maximum in its last block, where the published architecture averages
            "Mixed_7a": (halved, mixed_7a), "Mixed_7b": (average, mixed_7), "Mixed_7c": (maximum, mixed_7),
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
        except Exception as e:  # torch.load raises many types; all of them mean that this is another file
            why = " ".join(str(e).split(". ")[0].split())[:300]  # torch's next sentence advises to run the file's code
            raise UserError(f"{path} is not pytorch-fid's Inception ({type(e).__name__}: {why}); "
                            f"it is {INCEPTION_URL}") from None
        self.eval().requires_grad_(False)

    def forward(self, img):
        # bilinear, half-pixel centres, no antialiasing: pytorch-fid's resize, part of what makes FIDs comparable
        x = F.interpolate(img.float(), size=(299, 299), mode="bilinear", align_corners=False)
        x = 2 * x - 1  # the 2015 graph takes [-1, 1]; torchvision's network takes ImageNet's mean and deviation
        *blocks, fc = self.children()
        for block in blocks:
            x = block(x)
        pool = x.mean(dim=(2, 3))  # (B, 2048)
        return pool, pool @ fc.weight.T  # IS was defined on TensorFlow's logits before their bias


def linear_probe(x, y, test_x, test_y, seed=0, epochs=40, batch=1024, rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)):
    """Accuracy in % of a linear classifier on frozen features: fitted on x (n, D), y (n,), measured on test_x, test_y.

    It is a softmax regression on standardised features by SGD (momentum 0.9, cosine schedule). Each learning rate fits
    a classifier to nine tenths of x; the last tenth chooses the best. Returns (accuracy, learning rate), the same for
    the same seed. Raises UserError for features that are not finite, and ValueError for n < 10.
    """
    refuse_unless_finite(x), refuse_unless_finite(test_x)
    if len(x) < 10:
        raise ValueError(f"x has {len(x)} rows; a linear probe needs at least 10, of which a tenth chooses the rate")
    mean, std, classes = x.mean(0), x.std(0) + 1e-6, int(y.max()) + 1
    x, test_x = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (x, test_x))  # 1: the bias
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=random).to(x.device)
    held, kept = order[:len(x) // 10], order[len(x) // 10:]
    heads, rate = x.new_zeros(len(rates), x.shape[1], classes), x.new_tensor(rates).view(-1, 1, 1)
    velocity, steps = torch.zeros_like(heads), epochs * -(-len(kept) // batch)
    shuffles = (kept[torch.randperm(len(kept), generator=random).to(x.device)] for _ in range(epochs))
    for step, i in enumerate(i for shuffled in shuffles for i in shuffled.split(batch)):
        inputs = x[i]
        error = (inputs @ heads).softmax(-1) - F.one_hot(y[i], classes)  # d cross-entropy / d logits
        velocity = 0.9 * velocity + inputs.T @ error / len(i)
        heads -= rate * (0.5 + 0.5 * math.cos(math.pi * step / steps)) * velocity
    accuracy = lambda head, x, y: 100 * ((x @ head).argmax(1) == y).double().mean().item()
    best = max(range(len(rates)), key=lambda i: accuracy(heads[i], x[held], y[held]))
    return accuracy(heads[best], test_x, test_y), rates[best]


def nearest_neighbours(x, y, test_x, test_y, k=20, temperature=0.07):
    """Accuracy in % of k nearest neighbours by cosine: among x (n, D) with labels y (n,), for each row of test_x.

    A vote weighs exp(cosine / temperature), as DINO's do. Raises UserError for features that are not finite.
    """
    refuse_unless_finite(x), refuse_unless_finite(test_x)
    x, right = F.normalize(x.float(), dim=1), 0
    for i in range(0, len(test_x), 512):
        cosine, nearest = (F.normalize(test_x[i:i + 512].float(), dim=1) @ x.T).topk(min(k, len(x)))  # (b, k)
        votes = cosine.new_zeros(len(cosine), int(y.max()) + 1)
        votes.scatter_add_(1, y[nearest], (cosine / temperature).exp())
        right += (votes.argmax(1) == test_y[i:i + 512]).sum().item()
    return 100 * right / len(test_x)


# ---- 2. the evaluation of a tokenizer ----
# `job` (tools/job.py) has the arguments, this rank's share of the images, the exchange among ranks, and the report.

@torch.no_grad()
def measure_reconstructions(job, enc, dec, images, fit):
    """Returns ({row: figures}, protocol). The rows are the tokenizer and, with --pca, the PCA; only rank 0 has them."""
    from tools.fid import FidStatistics, load_inception
    from tools.pictures import as_pictures

    args, p, C, native = job.args, dec.config.patch, dec.config.latent_dim, images.size
    size = native if args.resolution == "native" else int(args.resolution)
    if size < 11:
        raise UserError(f"pictures of {size}x{size} are smaller than SSIM's window of 11x11: give a larger --size")
    network, network_name = load_inception(job)
    rows = ["tokenizer"] + [f"PCA, {C} per patch"] * args.pca
    sums = {row: torch.zeros(4, dtype=torch.float64) for row in rows}  # PSNR, ssim, ssim_paper, perfect or not
    rated = ["originals", *rows] if network else []  # what the Inception network looks at
    statistics = {row: FidStatistics(network, len(images), " ".join(args.data)) for row in rated}
    if args.pca:
        batches = (img for _, img, _ in job.images("fit PCA", fit))
        mean, basis = (x.to(job.device) for x in fit_patch_pca(batches, p, C, job.merge_ranks))
    original_at_size = [job.crops(args.data, size)] if size != native else []
    for n, *imgs, _ in job.images("reconstruct", images, *original_at_size):
        img, original = imgs[0], imgs[-1]  # the crop that goes in; the crop to compare with
        noise = image_noise(n, (native // p) ** 2, 3 * p * p, args.seed).to(job.device)
        with job.autocast:
            recs = [dec.decode(enc.encode(img), args.steps, noise).float()]
        refuse_unless_finite(recs[0], "reconstructions")  # uint8 would hide this as black pixels
        if args.pca:
            recs.append(patch_pca(img, mean, basis, p))
        recs = {row: as_pictures(rec, size) for row, rec in zip(rows, recs)}
        for row, rec in recs.items():
            decibels = psnr(original, rec)
            measures = [decibels.clamp(max=PERFECT), ssim(original, rec), ssim(original, rec, "uniform", 2.0),
                        decibels.isposinf()]
            sums[row] += torch.stack([x.double().sum() for x in measures]).cpu()
        for row in rated:
            statistics[row].add(original if row == "originals" else recs[row], n)
    means = {row: (sum(job.gather(x)) / len(images)).tolist() for row, x in sums.items()}
    merged = {row: statistics[row].of_all_ranks(job) for row in rated}
    results = {}
    for row in rows if job.rank == 0 else ():
        *quality, perfect = means[row]
        results[row] = {**dict(zip(("psnr", "ssim", "ssim_paper"), quality)), "perfect": round(perfect * len(images))}
        if network:
            (reference, _), (gaussian, (score, deviation)) = merged["originals"], merged[row]
            results[row].update({"rfid": frechet_distance(*reference, *gaussian), "is": score, "is_std": deviation})
    resized = ", PIL bicubic," if size != native else ""
    protocol = (f"ADM centre crop to {native} px in; compared at {size} px as uint8{resized} with the ADM crop of the "
                f"original; {args.steps} Euler step{'s' * (args.steps > 1)}, noise from (seed {args.seed}, image "
                f"number); {job.precision}; PSNR per image, at most {PERFECT:.0f} dB, then averaged; "
                "ssim: Gaussian 11x11, sigma 1.5, data_range 1; "
                "ssim_paper: uniform 7x7, data_range 2 (the released notebook's, flattering)")
    if network:
        protocol += (f"; rFID against the same crops of the same images, IS in {min(10, len(images))} splits, "
                     f"drawn by a fixed permutation; {network_name}")
    return results, protocol


def pooled_features(job, enc, teacher, images, note, compare=False):
    """Features of all ranks' images in order, averaged over positions: ({(layer, "student" or "teacher"): (n, D)},
    labels (n,), with `compare` the mean cosine of the two at each layer). Only rank 0 gets features and labels."""
    P, parts, cosines = teacher.num_prefix, {}, torch.zeros(len(teacher.blocks), dtype=torch.float64)
    for n, img, y in job.images(note, images):
        with job.autocast:
            z, student = enc(img)
            hidden = {"student": student, "teacher": teacher(img)}
            pooled = {"number": torch.tensor(n), "label": y, ("latent", "student"): z.flatten(2).mean(2).float()}
            for who, vit in ("student", enc.vit), ("teacher", teacher):
                pooled["last layer", who] = vit.norm(hidden[who][-1])[:, P:].mean(1).float()
                pooled["second to last", who] = hidden[who][-2][:, P:].mean(1).float()
        for name, x in pooled.items():
            parts.setdefault(name, []).append(x.cpu())
        for l, (s, t) in enumerate(zip(*hidden.values()) if compare else ()):
            cosines[l] += F.cosine_similarity(s[:, P:].float(), t[:, P:].float(), dim=-1).mean(1).double().sum().item()
    cosines = (sum(job.gather(cosines)) / len(images)).tolist()
    parts = {name: torch.cat(x) for name, x in parts.items()}
    shares = [share for share in job.gather(parts, everywhere=False) if share]  # a rank may have no image
    if not shares:
        return {}, None, cosines
    whole = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    order, labels = whole.pop("number").argsort(), whole.pop("label")
    return {name: x[order].to(job.device) for name, x in whole.items()}, labels[order].to(job.device), cosines


@torch.no_grad()
def measure_features(job, enc, teacher, images, fit):
    """Returns ({layer: {who: accuracies}}, which only rank 0 has, and the mean cosine to the teacher at each layer)."""
    x, y, _ = pooled_features(job, enc, teacher, fit, "features of --fit")
    test_x, test_y, cosines = pooled_features(job, enc, teacher, images, "features of --data", compare=True)
    number_in_fit = torch.tensor([fit.classes.index(name) for name in images.classes], device=job.device)
    accuracies = {}
    for layer, who in x:
        sets = x[layer, who], y, test_x[layer, who], number_in_fit[test_y]
        linear, rate = linear_probe(*sets, job.args.seed)
        accuracies.setdefault(layer, {})[who] = {"linear": linear, "learning_rate": rate,
                                                 "knn": nearest_neighbours(*sets)}
    return accuracies, cosines


def load_probe_teacher(job, enc, info, images, fit):
    """The teacher for --probe: the one named, or else the weights file's. UserError if it or --fit cannot be used."""
    from encoder import load_teacher

    args = job.args
    name = args.teacher or info.get("teacher")
    teacher = load_teacher(name, args.teacher_weights or (None if args.teacher else info.get("teacher_weights")))
    shape = lambda c: (c.width, c.depth, c.patch, c.num_prefix)
    if shape(teacher.config) != shape(enc.vit.config):
        raise UserError(f"teacher {name} has another width, depth or patch than the tokenizer: "
                        "give its own with --teacher")
    missing = sorted(set(images.classes) - set(fit.classes))
    if missing or len(fit) < 20:
        raise UserError(f"--fit has {len(fit)} images and lacks the classes {' '.join(missing[:5]) or '-'}: it needs "
                        "at least 20 images, and every class of --data (the folder that an image is in)")
    return teacher.to(job.device)


def evaluate_tokenizer(job):
    """Measure what the command line asks for, print the report and return it. Only rank 0 has all of the figures."""
    from tools.fid import warn_of_few
    from tools.job import load_tokenizer

    args = job.args
    enc, dec, info, images, about = load_tokenizer(job)
    fit = job.crops(args.fit, images.size) if args.pca or args.probe else None
    teacher = load_probe_teacher(job, enc, info, images, fit) if args.probe else None
    results, protocol = measure_reconstructions(job, enc, dec, images, fit)
    with_fid = args.inception != "none"
    warnings = [f"{row}: {r['perfect']} of {len(images)} pictures equal the original, and count with {PERFECT:.0f} dB"
                for row, r in results.items() if r["perfect"]]
    warnings.append(warn_of_few(len(images)) if with_fid else None)
    if args.fit == args.data:
        warnings.append("fitted on the images that are measured: PCA and probe mean little")
    report = {**about, "fit": args.fit, "results": results, "protocol": protocol,
              "warning": "; ".join(filter(None, warnings)) or None}
    table = [f"{'':18s}  PSNR dB    ssim  ssim_paper" + "      rFID             IS" * with_fid]
    for row, r in results.items():
        table.append(f"{row:18s}  {r['psnr']:7.2f}  {r['ssim']:.4f}      {r['ssim_paper']:.4f}")
        if with_fid:
            table[-1] += f"  {r['rfid']:8.3f}  {r['is']:6.2f} +- {r['is_std']:.2f}"
    if args.probe:
        report["probe"], report["cosine_to_teacher"] = measure_features(job, enc, teacher, images, fit)
        report["protocol"] += ("; probe: features averaged over positions; softmax regression, 40 epochs of SGD, "
                               "learning rate chosen on a tenth of --fit; 20-NN by cosine, votes exp(cosine / 0.07)")
        table += ["", f"{'accuracy in %':18s}  linear: student  teacher   20-NN: student  teacher"]
        for layer, r in report["probe"].items():
            cells = [f"{r[who][kind]:7.2f}" if who in r else "      -"
                     for kind in ("linear", "knn") for who in ("student", "teacher")]
            table.append("{:18s}          {}  {}          {}  {}".format(layer, *cells))
        table += ["cosine to the teacher, layer by layer: " + " ".join(f"{c:.3f}" for c in report["cosine_to_teacher"])]
    return job.finish(report, table)


# ---- 3. the command line; --fid goes on in tools/fid.py ----

def parse_args(argv=None):
    from tools.script import default_workers, number

    ap = argparse.ArgumentParser(description="How good is a tokenizer? Every report states its protocol. "
                                 "Under torchrun the figures are the same, and come sooner.")
    add = ap.add_argument_group("measure a tokenizer: PSNR, SSIM, rFID, Inception score").add_argument
    add("--data", nargs="+", metavar="PATH", help="the images to measure: folders or .zip archives")
    add("--weights", metavar="FILE", help="the tokenizer: a file, or uniflow-internvit, the authors' "
        "[out/model.safetensors, or else the shipped weights]")
    add("--resolution", default="native", choices=["native", "256"], help="compare at the size that went in (native, "
        "the paper's Table 3a), or resized to 256 (Table 1); for --fid: images as they are, or crops to 256 "
        "[%(default)s]")
    add("--size", type=number(int, 1), help="pixels of the crops that go in, a multiple of the patch [the native size]")
    add("--steps", type=number(int, 1), default=1, help="Euler steps of the decoder [%(default)s]")
    add("--inception", default=INCEPTION_URL, metavar="FILE", help="the network of FID and IS: pytorch-fid's file or a "
        "URL; none: no rFID, no IS [downloaded once, 91 MB]")
    add = ap.add_argument_group("also: compare it with PCA, ask whether its encoder still understands").add_argument
    add("--fit", nargs="+", metavar="PATH", help="the images that --pca and --probe are fitted on")
    add("--pca", action="store_true", help="also measure PCA of single patches, with one component per latent channel")
    add("--probe", action="store_true", help="also measure a linear probe and 20-NN on features of the encoder and of "
        "its teacher, and the cosine between the two at every layer")
    add("--teacher", metavar="NAME|FILE", help="for --probe [the weights file names it]")
    add("--teacher_weights", metavar="PATH|random", help="for --probe [the weights file names them]")
    add = ap.add_argument_group("or: measure the FID between two sets of images").add_argument
    add("--fid", nargs="+", metavar=("A", "B"), help="two of these: folders, .zip archives, .npz files of images "
        "(arr_0) or of statistics (mu, sigma)")
    add("--save_stats", metavar="FILE", help="write mu and sigma of A to this .npz; B may be left out")
    add = ap.add_argument_group("how to run, for all of these").add_argument
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of decoding noise and probe [%(default)s]")
    add("--batch_size", type=number(int, 1), default=32, help="images at a time, on each rank [%(default)s]")
    add("--workers", type=number(int, 0), default=default_workers(8),
        help="processes that load images, on each rank; 0: none [%(default)s: CPU cores / ranks, at most 8]")
    add("--bf16", action="store_true", help="run the tokenizer in bf16 autocast [fp32 without TF32]")
    add("--out", metavar="FILE", help="also write the report as JSON")
    args = ap.parse_args(argv)
    of_tokenizers = [f"--{name}" for name in "data weights size pca probe bf16".split() if getattr(args, name)]
    refusals = [
        (args.fid and len(args.fid) != 2 and not (args.save_stats and len(args.fid) == 1),
         f"--fid compares A and B, got {len(args.fid or ())}; --fid A --save_stats FILE.npz only saves"),
        (args.fid and of_tokenizers,
         f"--fid measures no tokenizer, and crops by --resolution 256 alone: leave out {' '.join(of_tokenizers)}"),
        (args.fid and args.inception == "none", "--fid needs --inception"),
        (args.save_stats and not args.fid, "--save_stats goes with --fid"),
        (not args.fid and not args.data, "--data PATH is needed: the images to measure"),
        ((args.pca or args.probe) != bool(args.fit),
         "--pca and --probe need --fit PATH, images to fit them on that --data has not; --fit needs one of the two"),
        ((args.teacher or args.teacher_weights) and not args.probe, "--teacher and --teacher_weights are for --probe"),
        (not (args.save_stats or ".npz").endswith(".npz"), f"--save_stats {args.save_stats}: it must end in .npz"),
        (args.out and args.out.endswith(".safetensors"),
         f"--out {args.out} is the name of a weights file: the report is JSON, give it a name in .json"),
    ]
    read = [*(args.data or []), *(args.fit or []), *(args.fid or []), args.weights or "", args.inception]
    for path in filter(None, (args.out, args.save_stats)):
        folder = os.path.dirname(path) or "."
        refusals += [(os.path.isdir(path), f"{path} is a folder: give the name of a file"),
                     (os.path.realpath(path) in map(os.path.realpath, read), f"{path} would be read and overwritten"),
                     (not os.access(folder, os.W_OK), f"{path}: there is no folder {folder} that can be written to")]
    for refused, why in refusals:
        if refused:
            ap.error(why)
    return args


def main(argv=None):
    """Do what the command line asks for; print the report and return it."""
    args = parse_args(argv)
    from tools.fid import compare_sets
    from tools.job import Job

    job = Job(args)
    return compare_sets(job) if args.fid else evaluate_tokenizer(job)


def demo():
    img = torch.full((2, 3, 64, 64), 0.5)
    rec = img + 0.1 * torch.randn(2, 3, 64, 64).clamp(-3, 3)
    print("images    ", tuple(img.shape), "grey, with noise of standard deviation 0.1")
    print("psnr      ", [f"{x:.2f}" for x in psnr(img, rec)], "dB (20 expected)")
    print("ssim      ", [f"{x:.4f}" for x in ssim(img, rec)])
    print("ssim_paper", [f"{x:.4f}" for x in ssim(img, rec, "uniform", 2.0)])
    print("to measure a tokenizer: python eval.py --data VAL --weights out/model.safetensors")


if __name__ == "__main__":
    if sys.argv[1:]:
        import eval as itself  # this file runs as `__main__`; the other files import and catch the classes of `eval`
        from tools.script import run_command

        run_command(itself.main, "eval.py")
    else:
        demo()
