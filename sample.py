"""Reconstruct pictures with a trained tokenizer: image -> latent -> image.

    python sample.py img.png                             # writes img_recon.png: original | reconstruction | error x4
    python sample.py photos/ a.jpg --out results --size 0
    python sample.py clip.gif                            # GIF, WebP, APNG, frame by frame: original | reconstruction
    python sample.py img.png --save_latent z.safetensors # keeps the latent, one for each frame ...
    python sample.py z.safetensors                       # ... and decodes it, in any number of --steps: z_recon.png
    python sample.py img.png --features                  # img_features.png: picture | student's tokens | teacher's
    cat img.png | python sample.py - > rec.png           # in a pipe: the reconstruction alone
    python sample.py photos/ --reconstruction --out recs # files of it alone, as eval.py --fid reads them

Without --weights the tokenizer is out/model.safetensors, or if there is none, the one that ships in weights/. Pictures
may have any size and aspect ratio. All frames are decoded from the same noise, that of --seed. A picture that cannot be
read, or whose result cannot be written, is named on standard error; the others go on, and the exit status is 1.
"""
import argparse
import errno
import json
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

from data import MAX_PIXELS
from decoder import Decoder
from encoder import (Encoder, UserError, load_teacher, one_line, open_weights, read_config,
                     write_atomically, write_model)
from eval import comparison, image_noise, psnr, refuse_unless_finite, sha256, ssim
from tools.pictures import find_pictures, free_path, load_frames, picture_file
from tools.script import USER_ERRORS, find_weights, name_weights, number, run_command

LATENT = ".safetensors"  # how the names of latents end
MAX_TOKENS = 2 ** 17  # of a picture; 3840 x 2160 pixels in patches of 8 make 129,600


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("files", nargs="+", metavar="FILES",
        help="pictures, animations, folders of them, latents that --save_latent wrote; - is standard input")
    add("--weights", metavar="FILE", help="the tokenizer: a file, or uniflow-internvit, which is the authors' "
        "[out/model.safetensors, else the one that ships]")
    add("--size", type=number(int, 0), help="short side in pixels; 0 keeps the picture's own [the model's native size]")
    add("--steps", type=number(int, 1), default=1, help="Euler steps of the decoder [%(default)s]")
    add("--seed", type=number(int, 0), default=0, help="of the decoding noise [%(default)s]")
    add("--out", metavar="FOLDER", help="where to write; - is standard output, for the reconstruction alone "
        "[beside each picture; - if FILES is -]")
    add("--reconstruction", action="store_true", help="write the reconstruction alone, as PNG, under the picture's own "
        "name: into --out, else into NAME_reconstruction beside a folder NAME; subfolders are kept")
    add("--save_latent", metavar="FILE", help="also write the normalised latent (frames, C, h, w) of the one picture "
        "given, as .safetensors")
    add("--features", action="store_true", help="also write a picture of the tokens: their first three principal "
        "components as colours, beside the teacher's if it is on this machine (of an animation, the first frame's)")
    args = ap.parse_args(argv)
    args.out = args.out or ("-" if "-" in args.files else None)
    if args.save_latent and not args.save_latent.endswith(LATENT):
        ap.error(f"--save_latent is {args.save_latent}: its name must end in {LATENT}")
    if any(f.endswith(LATENT) for f in args.files) and (args.save_latent or args.features or args.size is not None):
        ap.error("--save_latent, --features, --size are for pictures, not latents")
    if args.features and args.reconstruction:
        ap.error("--features would put its files among the reconstructions: make them in two runs")
    if args.features and args.out == "-":
        ap.error("--features writes a file beside the reconstruction's: give --out FOLDER")
    if args.out == "-" and (sys.stdout is sys.stderr or sys.stdout.isatty()):
        ap.error("standard output is closed or a terminal: redirect it (> rec.png), or give --out FOLDER")
    return args


def load_latent(path, dec, digest):
    """A file of --save_latent -> latent (T, C, h, w), (H, W), and the options that load_frames gave of its picture.

    Raises UserError if it is damaged, or if it was made by other weights: those of `dec` have this SHA-256.
    """
    try:
        with safe_open(path, "pt") as f:
            about, z = json.loads(f.metadata()["config"]), f.get_tensor("latent")
        theirs, H, W = about["weights_sha256"], int(about["height"]), int(about["width"])
        options = {"format": about["file"]["format"], **about["file"]}
    except Exception as e:  # damage raises nearly any type
        raise UserError(f"is damaged, or no picture or latent ({type(e).__name__}: {one_line(e)})") from None
    if theirs != digest:
        raise UserError(f"is a latent of other weights (their SHA-256 is {theirs!s:.12}..., that of these "
                        f"{digest:.12}...): give its own with --weights")
    shape = (dec.config.latent_dim, -(-H // dec.config.patch), -(-W // dec.config.patch))
    fits = z.dtype == torch.float32 and z.isfinite().all() and z.shape[1:] == shape
    if not fits or not 0 < len(z) * H * W <= 2 * MAX_PIXELS:
        raise UserError(f"holds {z.dtype} {tuple(z.shape)}, expected finite float32 (frames, "
                        f"{', '.join(map(str, shape))}) for {W}x{H} pixels")
    return z, (H, W), options


def pad_to_patches(img, p):
    """img (B, 3, H, W) -> the same, its last row and column repeated until both sides are multiples of p."""
    H, W = img.shape[2:]
    return F.pad(img, (0, -W % p, 0, -H % p), mode="replicate")


@torch.no_grad()
def reconstruct(enc, dec, x, H, W, device, steps=1, seed=0):
    """Frames x, uint8 (T, 3, H, W) with any H and W, or their latent -> latent (T, C, h, w), reconstructed frames.

    Both are on the CPU. All frames are decoded from the same noise, in parts of about a million pixels.
    """
    p, done = dec.config.patch, []
    parts = x.split(max(1, 2 ** 20 // (H * W)))
    noise = image_noise([0], -(-H // p) * -(-W // p), 3 * p * p, seed).to(device)  # (1, N, 3p^2)
    for part in tqdm(parts, "frames", leave=False, disable=None if len(parts) > 1 else True):
        z = part.to(device) if x.is_floating_point() else enc.encode(pad_to_patches(part.to(device) / 255, p))
        rec = dec.decode(z, steps, noise.expand(len(z), -1, -1))[:, :, :H, :W]
        refuse_unless_finite(rec, "reconstructions")
        done.append((z.cpu(), (255 * rec).round().to(torch.uint8).cpu()))
    return [torch.cat(both) for both in zip(*done)]


@torch.no_grad()
def feature_picture(enc, teacher, frame, device):
    """frame uint8 (3, H, W) -> uint8 (3, H, 2W or 3W): frame | the student's tokens | the teacher's, if there is one.

    Red, green and blue are the first three principal components of the tokens on the right, each from its 2nd to its
    98th percentile there.
    """
    (H, W), p = frame.shape[1:], enc.vit.config.patch
    img = pad_to_patches(frame[None].to(device) / 255, p)
    tokens = [e.features(img)[0].double().cpu() for e in (enc, teacher) if e is not None]  # (N, D)
    centred = [x - tokens[-1].mean(0) for x in tokens]
    axes = torch.linalg.eigh(centred[-1].T @ centred[-1])[1][:, -3:].flip(1)  # (D, 3), the largest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # a fixed sign: the largest entry positive
    low, high = (centred[-1] @ axes).quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    panels = [frame]
    for x in centred:
        colours = (255 * (x @ axes - low) / (high - low).clamp(min=1e-12)).clamp(0, 255).round().to(torch.uint8)
        grid = colours.T.view(3, -1, img.shape[3] // p)  # (3, h, w)
        panels.append(grid.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, :H, :W])
    return torch.cat(panels, dim=2)


@dataclass
class Tokenizer:
    enc: Encoder
    dec: Decoder
    size: int  # short side of pictures, 0 for their own
    device: torch.device
    digest: str  # SHA-256 of the weights; None if no latent is read or written
    teacher: Encoder  # None without --features, or if find_teacher has none to show


def load_tokenizer(args, log):
    """The Tokenizer that the arguments ask for. Says which one that is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = find_weights(args.weights)
    enc, dec = Encoder.from_pretrained(path).to(device), Decoder.from_pretrained(path).to(device)
    info = read_config(path)
    size = info["size"] if args.size is None else args.size
    sides = f"short side {size} px" if size else "original size"
    print(f"weights {name_weights(args.weights, path)}, {sides}, on {device.type}", file=log)
    needs_digest = args.save_latent or any(f.endswith(LATENT) for f in args.files)
    return Tokenizer(enc, dec, size, device, sha256(path) if needs_digest else None,
                     find_teacher(info, enc, device) if args.features else None)


def find_teacher(info, enc, device):
    """The tokenizer's teacher, as an Encoder for its `features`, if it is on this machine; else None, saying why."""
    name, given = str(info.get("teacher")), info.get("teacher_weights")
    try:
        if given == "random":
            raise UserError("a random initialisation, it has no semantics to show")
        vit = load_teacher(name, given and str(given), offline=True)  # a picture is not worth a download
        if vit.config != enc.vit.config:
            raise UserError("its structure differs from the encoder's")
        return Encoder(vit).eval().to(device)
    except (*USER_ERRORS, OSError) as e:
        why = "not on this machine" if isinstance(e, FileNotFoundError) else one_line(e)
        print(f"--features: without the teacher {one_line(name)} ({why})")


def side_by_side(x, rec):
    """Frames and their reconstructions -> an iterator of frames that show both, and those of a still the error too."""
    width = x.shape[3] * (3 if len(x) == 1 else 2)
    for a, b in zip(x, rec):
        yield (255 * comparison(a / 255, b / 255)[:, :, :width]).round().to(torch.uint8)


def convert(picture, folder, args, tokenizer, taken):
    """Reconstruct one picture, animation or latent, write its results, and return the line to print about it.

    taken: the paths of the results so far (see free_path).
    """
    enc, dec, device = tokenizer.enc, tokenizer.dec, tokenizer.device
    latent = picture.endswith(LATENT)
    if latent:
        x, (H, W), options = load_latent(picture, dec, tokenizer.digest)
    else:
        x, (H, W), options = load_frames(picture, tokenizer.size, MAX_TOKENS * dec.config.patch ** 2)
    start = time.perf_counter()
    z, rec = reconstruct(enc, dec, x, H, W, device, args.steps, args.seed)
    seconds = time.perf_counter() - start
    if args.reconstruction:
        options = {"loop": 1, **options, "format": "PNG"}  # several frames make an animated PNG, without loss
    alone = latent or args.reconstruction or args.out == "-"
    content = picture_file(rec if alone else side_by_side(x, rec), options)
    if args.out == "-":
        result = "standard output"
        with open(1, "wb", closefd=False) as f:  # not sys.stdout: if nobody reads, it would fail again at exit
            f.write(content)
    else:
        own_name = args.reconstruction and folder != os.path.dirname(picture)
        ending = ("" if own_name else "_recon") + "." + options["format"].lower()
        name = os.path.splitext(os.path.basename("stdin" if picture == "-" else picture))[0]
        stem = free_path(folder, name, "_features.png" if args.features else ending, taken)
        result = stem + ending
        os.makedirs(folder or ".", exist_ok=True)
        write_atomically(result, lambda f: f.write(content))
    if args.save_latent:
        os.makedirs(os.path.dirname(args.save_latent) or ".", exist_ok=True)
        about = {"weights_sha256": tokenizer.digest, "height": H, "width": W, "file": options}
        write_model(args.save_latent, about, {"latent": z})
    if args.features:
        colours = picture_file([feature_picture(enc, tokenizer.teacher, x[0], device)], {"format": "PNG"})
        write_atomically(stem + "_features.png", lambda f: f.write(colours))
    return f"{result}: {describe(z, rec, None if latent else x)} | {seconds:.2f} s"


def describe(z, rec, x):
    """What to print of a latent: its shape and, if the frames x are given, the compression and the quality of rec."""
    T, *shape = z.shape
    said = f"{T} frames, " * (T > 1) + "latent " + "x".join(map(str, shape))
    if x is None:
        return said
    mean = sum(psnr(a[None] / 255, b[None] / 255).item() for a, b in zip(x, rec)) / T
    said += f" | {x.numel() / z.numel():.1f}x | PSNR {mean:.2f} dB"
    if T > 1:
        return said + " on average"
    too_small = min(x.shape[2:]) < 11  # its window is 11 x 11
    return said + " | SSIM " + ("n/a" if too_small else f"{ssim(x / 255, rec / 255).item():.4f}")


def why_left_out(error, args):
    """What to say of the one picture that an error concerns; None if the error must end the run."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
        return "takes more memory than there is: give a smaller --size"
    if isinstance(error, OSError) and args.out != "-" and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"is left out ({error})"


def main(argv=None):
    args = parse_args(argv)
    pictures = find_pictures(args.files, args.out, args.reconstruction)
    if len(pictures) > 1 and (args.save_latent or args.out == "-"):
        raise UserError(f"--save_latent and standard output are for one picture, not for {len(pictures)} pictures")
    if args.save_latent and os.path.exists(args.save_latent) and open_weights(args.save_latent)[0] != {"latent"}:
        raise UserError(f"--save_latent {args.save_latent} is there and is no latent: give another name")
    log = sys.stderr if args.out == "-" else sys.stdout
    tokenizer = load_tokenizer(args, log)
    taken, left_out = set(), 0
    for picture, folder in tqdm(pictures, disable=None if len(pictures) > 1 else True):
        try:
            said = convert(picture, folder, args, tokenizer, taken)
        except Exception as e:
            why = why_left_out(e, args)
            if why is None:
                raise
            name = "stdin" if picture == "-" else picture
            tqdm.write(" ".join(f"sample.py: {name} {why}".splitlines()), file=sys.stderr)
            left_out += 1
        else:
            tqdm.write(said, file=log)
    return 1 if left_out else 0


def run():
    """main() for the command line: its exit status."""
    return run_command(main, "sample.py")


if __name__ == "__main__":
    sys.exit(run())
