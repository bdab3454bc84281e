"""A tokenizer on the Kodak set and on eight clips of DAVIS, a per-patch PCA of the same rate beside it.

    python -m experiments.standard_sets.measure --kodak kodak24.zip --davis davis_video.zip --fit PHOTOGRAPHS

    PSNR      of each image, one-step reconstruction against original, both rounded to uint8, in [0, 1]; then the mean
    ssim      likewise: Gaussian 11x11, sigma 1.5, data range 1
    flicker   of a clip x_1 .. x_T and its reconstruction r_1 .. r_T: the PSNR, with peak 1, between x_{t+1} - x_t and
              r_{t+1} - r_t, then the mean over t = 1 .. T-1. An error that stands still costs nothing; one that is
              independent from frame to frame costs 3.01 dB against the PSNR.

A picture's noise is that of its number, as in eval.py; all frames of a clip have one noise, as in sample.py. The PCA is
fitted on crops of --fit at 256 px. Writes the figures into results.json under --label, the table of all labels there
into README.md, and two pictures, all beside this file. Nothing was tuned on these sets, and nothing should be.
"""
import argparse
import json
import os

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ImageDataset, cores
from decoder import Decoder
from encoder import Encoder, UserError, write_atomically
from eval import PERFECT, comparison, fit_patch_pca, image_noise, patch_pca, psnr, round_uint8, sha256, ssim
from tools.script import SHIPPED, commit, replace_between, run_command, write_file

HERE = os.path.dirname(os.path.abspath(__file__))
MARKS = "<!-- measure.py writes from here -->\n", "<!-- to here -->\n"
SIZE = 256  # of the crops


def flicker(x, r):
    """PSNR of the frame differences of two clips (T, 3, H, W) in [0, 1] -> (T-1,), at most PERFECT."""
    return psnr(x[1:] - x[:-1], r[1:] - r[:-1]).clamp(max=PERFECT)


def pictures(kodak, davis):
    """Yields (row of the table, name, number of the noise, uint8 images (B, 3, H, W)): a Kodak picture, or a clip."""
    whole, crops = ImageDataset(kodak, None, train=False), ImageDataset(kodak, SIZE, train=False)
    for n in range(len(whole)):
        name = os.path.splitext(os.path.basename(whole.path(n)))[0]
        img = whole[n][0][None]
        top, left = ((side - SIZE) // 2 for side in img.shape[2:])
        yield "Kodak, whole", name, n, img
        yield f"Kodak, the central {SIZE}x{SIZE} pixels", name, n, img[:, :, top:top + SIZE, left:left + SIZE]
        yield f"Kodak, ADM crops of {SIZE} px (halved)", name, n, crops[n][0][None]
    frames = ImageDataset(davis, None, train=False)  # sorted, so the frames of a clip are in their order
    for label, clip in enumerate(frames.classes):
        yield f"DAVIS, {clip}", clip, 0, torch.stack([frames[i][0] for i in np.flatnonzero(frames.labels == label)])


@torch.no_grad()
def measure(enc, dec, pca, items, show=(), batch=11):
    """{row: {"tokenizer": {"psnr", "ssim", "flicker"}, "PCA": ..}}, lists of one figure for each image (flicker: each
    pair of frames); {name in show: (psnr, original | reconstruction | 4 x error)} of the ADM crops.

    pca: images -> images. items: what pictures yields."""
    device, p = dec.mean.device, dec.config.patch
    rows, shown = {}, {}
    for row, name, number, img in items:
        x = img.to(device) / 255
        noise = image_noise([number], x.shape[2] * x.shape[3] // p ** 2, 3 * p * p).to(device)
        parts = [dec.decode(enc.encode(part), noise=noise.expand(len(part), -1, -1)) for part in x.split(batch)]
        rec = round_uint8(torch.cat(parts))
        for who, r in ("tokenizer", rec), ("PCA", round_uint8(pca(x))):
            found = {"psnr": psnr(x, r).clamp(max=PERFECT), "ssim": ssim(x, r)}
            if len(x) > 1:
                found["flicker"] = flicker(x, r)
            for key, values in found.items():
                rows.setdefault(row, {}).setdefault(who, {}).setdefault(key, []).extend(values.tolist())
        if name in show and "ADM" in row:
            shown[name] = rows[row]["tokenizer"]["psnr"][-1], comparison(x[0], rec[0])
    return rows, shown


def mean_of(found, key):
    """The mean over dicts of figures of the means of their lists."""
    return np.mean([np.mean(figures[key]) for figures in found])


def table(results):
    """The Markdown table of results.json: {label: {"rows": what measure returns, ..}}; the PCA of the last."""
    columns = [(label, found["rows"], "tokenizer") for label, found in results.items()]
    last = columns[-1][1]
    columns.append(("PCA", last, "PCA"))
    lines = ["| | " + " | ".join(f"{label}: PSNR, ssim | flicker" for label, *_ in columns) + " |",
             "|---|" + "---|---|" * len(columns)]
    clips = [row for row in last if row.startswith("DAVIS")]
    for title, members in [(row, [row]) for row in last] + [(f"DAVIS, mean of {len(clips)} clips", clips)]:
        cells = []
        for _, rows, who in columns:
            found = [rows[row][who] for row in members]
            cells.append(f"{mean_of(found, 'psnr'):.2f}, {mean_of(found, 'ssim'):.4f}")
            cells.append(f"{mean_of(found, 'flicker'):.2f}" if members[0] in clips else "–")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_picture(path, picture):
    """Write an image (3, H, W) in [0, 1] as a PNG file."""
    pixels = (255 * picture).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    write_atomically(path, lambda f: Image.fromarray(pixels).save(f, "PNG", optimize=True))


def write_results(folder, label, found, shown):
    """results.json with `found` under its label, the table and captions in README.md, the pictures. Returns the table
    and the captions."""
    path, results = os.path.join(folder, "results.json"), {}
    if os.path.exists(path):
        with open(path) as f:
            results = json.load(f)
    results.pop(label, None)  # the newest comes last
    results[label] = found
    lines = json.dumps(results).replace('"rows"', '\n"rows"') + "\n"  # two for each label
    write_file(path, lines.encode())
    text = table(results)
    for name, (decibels, picture) in shown.items():
        write_picture(os.path.join(folder, f"{name}.png"), picture)
        text += f"\n![{name}]({name}.png)\n\n*{name}: original, reconstruction ({decibels:.2f} dB), error x4.*\n"
    readme = os.path.join(folder, "README.md")
    if not os.path.exists(readme):
        write_file(readme, "".join(MARKS).encode())
    replace_between(readme, *MARKS, text)
    return text


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = ap.add_argument
    add("--kodak", nargs="+", required=True, metavar="PATH", help="kodak24.zip, or a folder of its pictures")
    add("--davis", nargs="+", required=True, metavar="PATH", help="davis_video.zip: a folder for each clip")
    add("--fit", nargs="+", required=True, metavar="PATH", help="photographs that the PCA is fitted on")
    add("--weights", default=SHIPPED, metavar="FILE", help="[the shipped tokenizer]")
    add("--label", default="shipped", help="of these figures in results.json and in the table [%(default)s]")
    add("--show", nargs="*", default=["kodim19", "kodim23"], metavar="NAME", help="pictures to write [%(default)s]")
    add("--out", default=HERE, metavar="FOLDER", help="[beside this file]")
    args = ap.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    enc, dec = (part.from_pretrained(args.weights).to(device) for part in (Encoder, Decoder))
    p, C = dec.config.patch, dec.config.latent_dim
    images, frames = (ImageDataset(paths, None, train=False) for paths in (args.kodak, args.davis))
    photographs = ImageDataset(args.fit, SIZE, train=False)
    loader = DataLoader(photographs, 32, num_workers=min(4, cores()))
    mean, basis = fit_patch_pca((img.to(device) / 255 for img, _ in tqdm(loader, "fit PCA")), p, C)
    items = tqdm(pictures(args.kodak, args.davis), "pictures and clips", 3 * len(images) + len(frames.classes))
    rows, shown = measure(enc, dec, lambda x: patch_pca(x, mean, basis, p), items, args.show)
    unknown = set(args.show) - set(shown)
    if unknown:
        raise UserError(f"--show: --kodak has no {' '.join(sorted(unknown))}")
    found = {"weights": os.path.basename(args.weights), "weights_sha256": sha256(args.weights),
             "code": commit(), "torch": torch.__version__, "device": device, "fit_images": len(photographs),
             "pca": f"{C} components of {p}x{p} patches", "rows": rows}
    print(write_results(args.out, args.label, found, shown))


if __name__ == "__main__":
    run_command(main, "experiments.standard_sets.measure")
