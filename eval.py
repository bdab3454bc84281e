"""How good are the reconstructions? PSNR and SSIM of a tokenizer, with the protocol beside the numbers.

    PSNR = -10 log10(mean squared error)                                                          per image, of [0, 1]
    SSIM = mean of (2 ma mb + c1)(2 sab + c2) / ((ma^2 + mb^2 + c1)(sa^2 + sb^2 + c2))            Wang et al. 2004

    python eval.py --data VAL --weights out/model.safetensors [--pca --fit TRAIN]

The metrics are plain functions on images (B, 3, H, W) in [0, 1]; `python eval.py` without arguments shows them on noise.
To copy: needs torch and numpy for the metrics. The command line uses data.py, encoder.py and decoder.py beside it.
"""
import argparse
import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset


def psnr(a, b):
    """Peak signal-to-noise ratio of each image in dB: a, b (B, 3, H, W) in [0, 1] -> (B,), float64; equal images give inf."""
    return -10 * (a.double() - b.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(a, b, window="gaussian", data_range=1.0):
    """Structural similarity of each image: a, b (B, 3, H, W) in [0, 1] -> (B,), float64, mean over valid windows and channels.

    window: "gaussian", 11x11 with sigma 1.5 and population covariance (Wang et al.), or "uniform", 7x7 with sample
    covariance (scikit-image's default). data_range: the span of the pixel values, 1 for images in [0, 1]. The released
    UniFlow notebook passes 2 and the uniform window: ssim(a, b, "uniform", 2.0) is that figure, here called ssim_paper;
    it is higher. Raises ValueError for images smaller than the window.
    """
    if window == "gaussian":
        taps = torch.exp(-0.5 * ((torch.arange(11) - 5) / 1.5) ** 2)
        bias = 1.0
    elif window == "uniform":
        taps, bias = torch.ones(7), 49 / 48  # n / (n - 1): sample covariance
    else:
        raise ValueError(f"window {window!r} is unknown; it is gaussian or uniform")
    n, C = len(taps), a.shape[1]
    if min(a.shape[2:]) < n:
        raise ValueError(f"images are {a.shape[3]}x{a.shape[2]}; SSIM with its {window} window needs at least {n}x{n}")
    taps = (taps / taps.sum()).to(a.device, torch.float64)

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


@torch.no_grad()
def validate(encoder, decoder, dataset, batch, seed, autocast, workers=0, rank=0, ranks=1, images=512):
    """What train.py looks at while it runs, over the first `images` of `dataset` (pairs of uint8 (3, S, S) and a label).

    Returns the one-step PSNR in dB, the flow loss in each tenth of t (on the first batch), and on rank 0 a uint8 picture
    (H, W, 3) of eight images, original | reconstruction | error x4, two triples a row. The images are shared out over the
    ranks, and the decoding noise is a function of (seed, image number).
    """
    device, p = decoder.mean.device, decoder.config.patch
    numbers = range(rank, min(len(dataset), images), ranks)
    total = torch.zeros(12, dtype=torch.float64, device=device)  # PSNR, images, flow loss of ten tenths: sums over images
    triples = []
    encoder.eval(), decoder.eval()
    for i, (img, _) in enumerate(DataLoader(Subset(dataset, numbers), batch, num_workers=workers)):
        img = img.to(device) / 255
        N = img.shape[2] * img.shape[3] // p ** 2
        noise = image_noise(numbers[i * batch:i * batch + len(img)], N, 3 * p * p, seed).to(device)
        with autocast:
            z = encoder.encode(img)  # in training its statistics are the identity
            rec = round_uint8(decoder.decode(z, noise=noise))
            for k in range(10) if i == 0 else ():
                t = (k + torch.rand(len(img), N, generator=torch.Generator().manual_seed(k)).to(device)) / 10
                total[2 + k] = decoder.loss(z, img, t, noise) * len(numbers)
        total[0] += psnr(img, rec).sum()
        total[1] += len(img)
        triples += [comparison(*pair) for pair in zip(img, rec)][:8 - len(triples)]
    encoder.train(), decoder.train()
    if ranks > 1:
        dist.all_reduce(total)
    psnr_mean, _, *flow_by_t = (total / total[1]).tolist()
    if rank > 0:
        return psnr_mean, flow_by_t, None
    triples += [torch.zeros_like(triples[0])] * (len(triples) % 2)
    grid = torch.cat([torch.cat(triples[i::2], dim=1) for i in (0, 1)], dim=2)  # (3, H, W)
    return psnr_mean, flow_by_t, (grid * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def fit_patch_pca(batches, p, components):
    """Per-patch linear PCA from an iterable of images (B, 3, H, W) in [0, 1], streamed, in float64.

    Returns the mean patch (3p^2,) and an orthonormal basis (3p^2, components). It is the best linear code of one patch
    at that size, so a tokenizer with as many latent channels that does not beat it has not used its context.
    """
    count, total, second = 0, 0, 0
    for img in batches:
        x = F.unfold(img.double(), p, stride=p).transpose(1, 2).flatten(0, 1)  # (B*N, 3p^2)
        count, total, second = count + len(x), total + x.sum(0), second + x.T @ x
    mean = total / count
    basis = torch.linalg.eigh(second / count - mean[:, None] * mean)[1]  # ascending eigenvalues
    return mean, basis[:, -components:]


def patch_pca(img, mean, basis, p):
    """Images (B, 3, H, W) in [0, 1] through the code of fit_patch_pca and back, clamped to [0, 1]."""
    x = F.unfold(img.double(), p, stride=p).transpose(1, 2) - mean  # (B, N, 3p^2)
    x = x @ basis @ basis.T + mean
    return F.fold(x.transpose(1, 2), img.shape[2:], p, stride=p).clamp(0, 1)


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description="PSNR and SSIM of a tokenizer's reconstructions")
    ap.add_argument("--data", nargs="+", required=True, metavar="PATH", help="images to measure: folders or .zip archives")
    ap.add_argument("--weights", default="out/model.safetensors", help="tokenizer: a file, or uniflow-internvit, the authors' [%(default)s]")
    ap.add_argument("--resolution", default="native", choices=["native", "256"], help="size at which reconstructions are "
                    "compared: the model's native size (the paper's Table 3a), or resized to 256 (Table 1) [%(default)s]")
    ap.add_argument("--steps", type=int, default=1, help="Euler steps of the decoder [%(default)s]")
    ap.add_argument("--seed", type=int, default=0, help="of the decoding noise [%(default)s]")
    ap.add_argument("--batch_size", type=int, default=32, help="images at a time [%(default)s]")
    ap.add_argument("--bf16", action="store_true", help="bf16 autocast instead of fp32 without TF32")
    ap.add_argument("--pca", action="store_true", help="add the row of a per-patch linear PCA with as many components as "
                    "the latent has channels, fitted on --fit")
    ap.add_argument("--fit", nargs="+", metavar="PATH", help="images that the PCA is fitted on")
    ap.add_argument("--out", metavar="FILE", help="also write the report as JSON")
    args = ap.parse_args(argv)
    if args.batch_size < 1 or args.steps < 1:
        ap.error(f"batch_size {args.batch_size} and steps {args.steps} must be at least 1")
    if args.pca and not args.fit:
        ap.error("--pca needs --fit PATH, the images that the PCA is fitted on (not those it is measured on)")
    return args


@torch.no_grad()
def main(argv=None):
    """Measure a tokenizer as the command line asks, print the report, and return it as a dict."""
    from PIL import Image
    from torch.utils.data import StackDataset
    from tqdm import tqdm

    from data import ImageDataset, to_tensor
    from decoder import Decoder
    from encoder import Encoder, fetch, read_config

    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    weights = fetch(args.weights)
    enc, dec = Encoder.from_pretrained(weights).to(device), Decoder.from_pretrained(weights).to(device)
    info = read_config(weights)
    native, p = info["size"], dec.config.patch
    size = native if args.resolution == "native" else int(args.resolution)

    def batches(dataset, note):
        loader = DataLoader(dataset, args.batch_size, num_workers=min(8, os.cpu_count()), pin_memory=device.type == "cuda")
        return tqdm(loader, desc=note, disable=None, leave=False)

    def compare_at(rec):  # (B, 3, native, native) -> (B, 3, size, size), rounded to uint8 before and after the resize
        rec = (rec * 255).round().to(torch.uint8).cpu()
        if size != native:
            shape, how = (size, size), Image.Resampling.BICUBIC
            rec = torch.stack([to_tensor(Image.fromarray(r.permute(1, 2, 0).numpy()).resize(shape, how)) for r in rec])
        return rec.to(device) / 255

    inputs = ImageDataset(args.data, native, train=False)
    pairs = inputs if size == native else StackDataset(inputs, ImageDataset(args.data, size, train=False))
    if args.pca:
        fit = ImageDataset(args.fit, native, train=False)
        mean, basis = fit_patch_pca((img.to(device) / 255 for img, _ in batches(fit, "fit PCA")), p, dec.config.latent_dim)

    values = {}  # row -> metric -> one float per image
    done = 0
    for pair in batches(pairs, "evaluate"):
        (img, _), (ref, _) = (pair, pair) if size == native else pair
        img, ref = img.to(device) / 255, ref.to(device) / 255
        noise = image_noise(range(done, done + len(img)), (native // p) ** 2, 3 * p * p, args.seed).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            rec = dec.decode(enc.encode(img), args.steps, noise).float()
        rows = {"tokenizer": rec}
        if args.pca:
            rows[f"PCA, {dec.config.latent_dim} per patch"] = patch_pca(img, mean, basis, p)
        for row, rec in rows.items():
            rec = compare_at(rec)
            scores = {"psnr": psnr(ref, rec), "ssim": ssim(ref, rec), "ssim_paper": ssim(ref, rec, "uniform", 2.0)}
            for metric, x in scores.items():
                values.setdefault(row, {}).setdefault(metric, []).extend(x.tolist())
        done += len(img)
    report = {
        "weights": weights, "step": info.get("step"), "teacher": info.get("teacher"), "commit": info.get("commit"),
        "data": args.data, "images": done, "fit": args.fit if args.pca else None,
        "protocol": f"ADM centre crop to {native} px in; compared at {size} px as uint8"
                    + (", PIL bicubic," if size != native else "") + f" with the ADM crop of the original; {args.steps} Euler "
                    f"step{'s' * (args.steps > 1)}, noise from (seed {args.seed}, image number); "
                    f"{'bf16 autocast' if args.bf16 else 'fp32 without TF32'}; PSNR per image, then averaged; ssim: Gaussian 11x11, "
                    "sigma 1.5, data_range 1; ssim_paper: uniform 7x7, data_range 2 (the released notebook's, flattering)",
        "torch": torch.__version__, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "results": {row: {m: sum(x) / done for m, x in v.items()} for row, v in values.items()},
    }
    for key in ("weights", "step", "teacher", "data", "images", "protocol"):
        print(f"{key:9s} {report[key]}")
    print(f"\n{'':18s}  PSNR dB    ssim  ssim_paper")
    for row, r in report["results"].items():
        print(f"{row:18s}  {r['psnr']:7.2f}  {r['ssim']:.4f}      {r['ssim_paper']:.4f}")
    if args.out:
        with open(args.out, "w") as f:
            json.dump(report, f, indent=1)
    return report


def demo():
    img = torch.full((2, 3, 64, 64), 0.5)
    rec = img + 0.1 * torch.randn(2, 3, 64, 64).clamp(-3, 3)
    print("images    ", tuple(img.shape), "grey, with noise of standard deviation 0.1")
    print("psnr      ", [f"{x:.2f}" for x in psnr(img, rec)], "dB (20 expected)")
    print("ssim      ", [f"{x:.4f}" for x in ssim(img, rec)])
    print("ssim_paper", [f"{x:.4f}" for x in ssim(img, rec, "uniform", 2.0)])
    print("to measure a tokenizer: python eval.py --data VAL --weights out/model.safetensors")


if __name__ == "__main__":
    try:
        main() if sys.argv[1:] else demo()
    except (OSError, ValueError) as e:
        print(f"eval.py: {str(e).splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
