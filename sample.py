"""Reconstruct pictures with a trained tokenizer: image -> latent -> image.

    python sample.py img.png                             # writes img_recon.png: original | reconstruction | error x4
    python sample.py photos/ a.jpg --out results --size 0
    python sample.py clip.gif                            # GIF, WebP, APNG frame by frame: original | reconstruction, in its timing
    python sample.py img.png --save_latent z.safetensors # keeps the latent (of an animation, each frame's) ...
    python sample.py z.safetensors                       # ... which decodes, in as many --steps as you like: z_recon.png
    python sample.py img.png --features                  # img_features.png: picture | student's tokens | teacher's, as colours
    cat img.png | python sample.py - > rec.png           # in a pipe: the reconstruction alone
    python sample.py photos/ --reconstruction --out recs # files of it alone, as eval.py --fid reads them

Weights: --weights, else out/model.safetensors, else the file that ships in weights/. Any size and aspect ratio goes in, and
one noise, the seed's, for all frames. A picture that cannot be read, or whose result cannot be written, is named,
the others go on, and the exit status is 1.
"""
import argparse
import errno
import hashlib
import io
import json
import os
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from data import EXTENSIONS, MAX_BYTES, MAX_PIXELS, TURNS, list_folder, load_image, open_image, to_tensor
from decoder import Decoder
from encoder import (Encoder, MissingFile, UserError, file_sha256, load_teacher, one_line, open_weights, read_config,
                     write_atomically, write_model)
from eval import comparison, image_noise, psnr, refuse_unless_finite, ssim
from tools.script import USER_ERRORS, find_weights, name_weights, open_streams, user_message

LATENT = ".safetensors"  # how the names of latents end
MAX_NAME = 255  # bytes, what file systems allow
MAX_TOKENS = 2 ** 17  # of a picture: 3840 x 2160 pixels in patches of 8 are as many, a strip of 3 x 500 enlarged would be more


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("files", nargs="+", metavar="FILES", help="pictures, animations, folders of them, latents that --save_latent wrote, - for standard input")
    add("--weights", metavar="FILE", help="tokenizer: a file, or uniflow-internvit, the authors' [out/model.safetensors, else the shipped weights]")
    add("--size", type=int, help="short side in pixels, 0 for the picture's own; a latent has its own [the model's native size]")
    add("--steps", type=int, default=1, help="Euler steps of the decoder [%(default)s]")
    add("--seed", type=int, default=0, help="of the decoding noise [%(default)s]")
    add("--out", metavar="FOLDER", help="where to write; - for standard output: the reconstruction alone [beside each picture; - if FILES is -]")
    add("--reconstruction", action="store_true", help="write the reconstruction alone, as PNG (an animation as an "
        "animated one), under the picture's own name: into --out, where the folders of a folder are kept, else into "
        "NAME_reconstruction beside a folder NAME")
    add("--save_latent", metavar="FILE", help="also write the latent of the one picture given, (frames, C, h, w), normalised, as .safetensors")
    add("--features", action="store_true", help="also write the tokens' first three principal components as colours, the teacher's beside them "
        "where it is on this machine (same colour, same direction); of an animation, the first frame's")
    args = ap.parse_args(argv)
    args.out = args.out or ("-" if "-" in args.files else None)
    for wrong, why in (
            (args.steps < 1, f"--steps is {args.steps}, it must be at least 1"),
            (args.seed < 0, f"--seed is {args.seed}, it must be at least 0"),
            ((args.size or 0) < 0, f"--size is {args.size}, it must be at least 0"),
            (not (args.save_latent or LATENT).endswith(LATENT), f"--save_latent is {args.save_latent}: its name must end in {LATENT}"),
            ((args.save_latent or args.features or args.size is not None) and any(f.endswith(LATENT) for f in args.files),
                "--save_latent, --features, --size: of pictures, not latents"),
            (args.features and args.reconstruction, "--features would lie among the reconstructions: in two runs"),
            (args.features and args.out == "-", "--features writes a file beside the reconstruction's: give --out FOLDER"),
            (args.out == "-" and sys.stdout is sys.stderr,
                "standard output is closed: redirect it (> rec.png), or give --out FOLDER"),
            (args.out == "-" and sys.stdout.isatty(), "standard output is a terminal: redirect it (> rec.png), or give --out FOLDER")):
        if wrong:
            ap.error(why)
    return args


def within(path, folder):
    """Whether a path is a folder or lies in it, links resolved."""
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(os.path.realpath(folder), ""))


def find_pictures(files, out=None, alone=False):
    """[(picture, the folder for its results)]: `out`, else beside a file, and in NAME_recon beside a folder NAME, which
    may be data to train or measure on. Of a folder the pictures in it and below it (but no earlier results), in sorted
    order; - stays. alone: for reconstructions under the pictures' own names; `out` keeps the folders of a folder, and
    no picture may be overwritten."""
    pictures = []
    for f in files:
        if f != "-" and not os.path.exists(f):
            raise MissingFile(f"{f}: no such picture or folder")
        if alone and "-" not in (f, out) and out and (within(f, out) or os.path.isdir(f) and within(out, f)):
            raise UserError(f"--reconstruction keeps the names of the pictures and would overwrite some: {f} and --out "
                            f"{out} lie in each other; give another --out")
        if f == "-" or not os.path.isdir(f):
            pictures.append((f, out or os.path.dirname(f)))
            continue
        result = lambda name: os.path.splitext(name)[0].endswith(("_recon", "_features"))
        inside = sorted(name for name, *_ in list_folder(f) if not result(name))
        if not inside:
            raise UserError(f"{f} holds no pictures ({' '.join(EXTENSIONS)})")
        keep = lambda name: os.path.dirname(name) if alone or not out else ""
        results = out or beside(f, "_reconstruction" if alone else "_recon")
        pictures += [(os.path.join(f, name), os.path.join(results, keep(name))) for name in inside]
    return pictures


def beside(folder, ending):
    """The path of a folder for results: of that name and ending, and not in the folder itself, however it was given."""
    plain, real = folder.rstrip(os.sep + (os.altsep or "")), os.path.realpath(folder)
    named = os.path.basename(plain) not in ("", ".", "..")
    for path in [plain] * named + [real]:  # the second if the first is a link that leads upwards
        if not within(path + ending, folder):
            return path + ending
    raise UserError(f"{folder} has nothing beside it, and results are not put among the pictures: give --out FOLDER")


def result_name(name, ending):
    """The name, or where a file system would not take name + ending, its beginning and eight digits of its SHA-256."""
    name_bytes, room = os.fsencode(name), MAX_NAME - len(ending)
    if len(name_bytes) <= room:
        return name
    return name_bytes[:room - 9].decode(errors="ignore") + "-" + hashlib.sha256(name_bytes).hexdigest()[:8]


def resize_short_side(img, short):
    """PIL image with its shorter side at `short` pixels (bicubic, antialiased); 0: as it is."""
    if not short:
        return img
    W, H = (max(1, round(s * short / min(img.size))) for s in img.size)
    if W * H > MAX_PIXELS:
        raise UserError(f"would grow from {img.width}x{img.height} to {W}x{H} pixels: give a smaller --size, or 0")
    return img.resize((W, H), Image.Resampling.BICUBIC)


def pad_to_patches(img, p):
    """img (B, 3, H, W) -> the same, its last row and column repeated until both sides are multiples of p."""
    H, W = img.shape[2:]
    return F.pad(img, (0, -W % p, 0, -H % p), mode="replicate")


def load_frames(file, size):
    """A path, or - for standard input -> frames uint8 (T, 3, H, W), their (H, W), and what PIL is to be told when it writes such a
    file: the format, and an animation's durations in ms and loops. Of a still, T = 1. UserError if it is damaged."""
    file = io.BytesIO(sys.stdin.buffer.read(MAX_BYTES)) if file == "-" else file
    still = to_tensor(resize_short_side(load_image(file), size))[None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of odd metadata
            img = open_image(file)  # without the metadata that make PIL refuse sound pixels
            turn = TURNS.get(img.info["orientation"])
            first = int(img.info.get("default_image", False))  # 1: an APNG begins with one for where nothing moves
            T = (getattr(img, "n_frames", 1) if img.format in ("GIF", "PNG", "WEBP") else 1) - first
            if T < 2:
                return still, still.shape[2:], {"format": "PNG"}
            if T * still.numel() > 6 * MAX_PIXELS:
                raise UserError(f"has {T} frames of {still.shape[3]}x{still.shape[2]}, more than {2 * MAX_PIXELS:,} "
                                "pixels in all: give a smaller --size")
            white, frames, durations = Image.new("RGBA", img.size, "white"), [], []
            for i in range(first, first + T):
                img.seek(i)
                frame = Image.alpha_composite(white, img.convert("RGBA").crop((0, 0, *white.size))).convert("RGB")
                frames.append(to_tensor(resize_short_side(frame if turn is None else frame.transpose(turn), size)))
                durations.append(img.info.get("duration", 0))  # which a WebP tells once the frame is read
            loop = {"loop": img.info["loop"]} if "loop" in img.info else {}  # a GIF without it plays once
            return torch.stack(frames), still.shape[2:], {"format": img.format, "duration": durations, **loop}
    except USER_ERRORS:
        raise
    except Exception as e:  # damage makes PIL raise nearly any type
        raise UserError(f"is a damaged animation ({type(e).__name__}: {one_line(e)})") from None


def load_latent(path, dec, digest):
    """A file of --save_latent -> latent (T, C, h, w), and the rest that load_frames told of the picture. UserError if
    it is damaged, or of other weights than those of `dec`, whose SHA-256 is `digest`."""
    try:
        with safe_open(path, "pt") as f:
            about, z = json.loads(f.metadata()["config"]), f.get_tensor("latent")
        theirs, H, W, kind = about["weights_sha256"], int(about["height"]), int(about["width"]), about["file"]
        kind = {"format": kind["format"], **{k: kind[k] for k in ("duration", "loop") if k in kind}}
    except Exception as e:  # damage raises nearly any type
        raise UserError(f"is damaged, or no picture or latent ({type(e).__name__}: {one_line(e)})") from None
    if theirs != digest:
        raise UserError(f"is a latent of other weights (SHA-256 {theirs!s:.12}..., these are {digest:.12}...): give "
                        "those with --weights")
    shape = (dec.config.latent_dim, -(-H // dec.config.patch), -(-W // dec.config.patch))
    if z.dtype != torch.float32 or not z.isfinite().all() or z.shape[1:] != shape or not 0 < len(z) * H * W <= 2 * MAX_PIXELS:
        raise UserError(f"holds {z.dtype} {tuple(z.shape)}, expected finite float32 (frames, {str(shape)[1:]} for "
                        f"{W}x{H} pixels")
    return z, (H, W), kind


@torch.no_grad()
def reconstruct(enc, dec, x, H, W, device, steps=1, seed=0):
    """Frames uint8 (T, 3, H, W), any H and W, or their latent -> latent (T, C, h, w), reconstruction uint8 (T, 3, H, W), on the CPU:
    all from one noise, the seed's, and so many at a time as make a million pixels."""
    p, parts, done = dec.config.patch, x.split(max(1, 2 ** 20 // (H * W))), []
    noise = image_noise([0], -(-H // p) * -(-W // p), 3 * p * p, seed).to(device)  # (1, N, 3p^2)
    for part in tqdm(parts, "frames", leave=False, disable=None if len(parts) > 1 else True):
        z = part.to(device) if x.is_floating_point() else enc.encode(pad_to_patches(part.to(device) / 255, p))
        rec = dec.decode(z, steps, noise.expand(len(z), -1, -1))[:, :, :H, :W]
        refuse_unless_finite(rec, "reconstructions")
        done.append((z.cpu(), (255 * rec).round().to(torch.uint8).cpu()))
    return [torch.cat(both) for both in zip(*done)]


def picture_file(frames, kind):
    """Frames, each uint8 (3, H, W), and what load_frames told of their file -> the bytes of such a file (a WebP's without loss)."""
    first, *others = (Image.fromarray(x.permute(1, 2, 0).numpy()) for x in frames)
    try:
        first.save(file := io.BytesIO(), save_all=bool(others), append_images=others, lossless=True, **kind)
    except Exception as e:  # sides or durations that the format cannot hold
        raise UserError(f"cannot be written as {kind['format']} ({type(e).__name__}: {one_line(e)})") from None
    return file.getvalue()


def find_teacher(info, enc, device):
    """The teacher of the tokenizer, as an Encoder for its `features`, if its weights are on this machine; else None, saying why."""
    name, given = str(info.get("teacher")), info.get("teacher_weights")
    try:
        if given == "random":
            raise UserError("a random initialisation, it has no semantics to show")
        vit = load_teacher(name, given and str(given), offline=True)  # for a picture nothing is downloaded
        teacher = Encoder(vit).eval().to(device)
        if teacher.vit.config != enc.vit.config:
            raise UserError("its structure is another")
        return teacher
    except (*USER_ERRORS, OSError) as e:
        print(f"--features: without the teacher {one_line(name)} ({'not on this machine' if isinstance(e, FileNotFoundError) else one_line(e)})")


@torch.no_grad()
def feature_picture(enc, teacher, frame, device):
    """frame uint8 (3, H, W) -> uint8 (3, H, 2W or 3W): it | the student's tokens | the teacher's, if there is one. Red, green, blue:
    the first three principal components of the last one's tokens, from their 2nd to their 98th percentile."""
    (H, W), p = frame.shape[1:], enc.vit.config.patch
    img = pad_to_patches(frame[None].to(device) / 255, p)
    tokens = [e.features(img)[0].double().cpu() for e in (enc, teacher) if e is not None]  # (N, D)
    centred = [x - tokens[-1].mean(0) for x in tokens]
    axes = torch.linalg.eigh(centred[-1].T @ centred[-1])[1][:, -3:].flip(1)  # (D, 3), the largest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # whose sign is arbitrary: its largest entry is to be positive
    low, high = (centred[-1] @ axes).quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    colours = [(255 * (x @ axes - low) / (high - low).clamp(min=1e-12)).clamp(0, 255).round().to(torch.uint8) for x in centred]  # (N, 3)
    panels = [x.T.view(3, -1, img.shape[3] // p).repeat_interleave(p, 1).repeat_interleave(p, 2)[:, :H, :W] for x in colours]
    return torch.cat([frame, *panels], dim=2)


def fast(enc, dec, img, steps=1):
    """(encode, decode) for images of one shape (B, 3, H, W) on a GPU: bf16, compiled, each replayed as a CUDA graph.

    Casts the matrices of enc and dec to bf16, for good. A result stays valid until the next call of the same function.
    Without a GPU there is nothing to gain: then they are enc.encode and dec.decode.
    """
    if img.device.type != "cuda":
        return torch.no_grad()(enc.encode), torch.no_grad()(lambda latent: dec.decode(latent, steps))
    for x in (*enc.parameters(), *dec.parameters()):
        if x.ndim in (2, 4):
            x.data = x.data.bfloat16()
    enc.compile(dynamic=False)
    dec.condition, dec.velocity = (torch.compile(f, dynamic=False) for f in (dec.condition, dec.velocity))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        z = enc.encode(img)
        return torch.cuda.make_graphed_callables((enc.encode, lambda z: dec.decode(z, steps)), ((img,), (z,)))


def main(argv=None):
    args = parse_args(argv)
    pictures = find_pictures(args.files, args.out, args.reconstruction)
    if len(pictures) > 1 and (args.save_latent or args.out == "-"):
        raise UserError(f"{len(pictures)} pictures, and --save_latent or -, which are for one (eval.py --save_latents "
                        "is for data sets)")
    device, log = torch.device("cuda" if torch.cuda.is_available() else "cpu"), sys.stderr if args.out == "-" else sys.stdout
    weights = find_weights(args.weights)
    enc, dec, info = Encoder.from_pretrained(weights), Decoder.from_pretrained(weights), read_config(weights)
    enc, dec, size = enc.to(device), dec.to(device), info["size"] if args.size is None else args.size
    sides = f"short side {size} px" if size else "original size"
    print(f"weights {name_weights(args.weights, weights)}, {sides}, on {device.type}", file=log)
    if args.save_latent and os.path.exists(args.save_latent) and open_weights(args.save_latent)[0] != {"latent"}:
        raise UserError(f"--save_latent {args.save_latent} is there and is no latent: give another name")
    digest = file_sha256(weights) if args.save_latent or any(f.endswith(LATENT) for f, _ in pictures) else None
    teacher = find_teacher(info, enc, device) if args.features else None
    try:  # the folders that were given; those beside the pictures one by one
        for folder in os.path.dirname(args.save_latent or ""), args.out:
            os.makedirs("." if folder in (None, "", "-") else folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} is no folder to write to ({e})") from None

    written, skipped = set(), []
    as_key = str.casefold if sys.platform in ("win32", "darwin") else str  # where A.png is a.png

    def convert(picture, path, folder):
        """Read a picture (called `path`), an animation or a latent, write its results; what to print of it."""
        latent = picture.endswith(LATENT)
        x, (H, W), kind = load_latent(picture, dec, digest) if latent else load_frames(picture, size)
        tokens = 0 if latent else H * W // dec.config.patch ** 2
        if tokens > MAX_TOKENS:
            raise UserError(f"has {tokens:,} tokens at {W}x{H} pixels, more than {MAX_TOKENS:,}: crop it, or give a "
                            "smaller --size")
        if tokens > 16_384:
            tqdm.write(f"{path}: {tokens:,} tokens, and attention takes a time quadratic in them; a smaller --size is "
                       "quicker", file=sys.stderr)
        start = time.perf_counter()
        z, rec = reconstruct(enc, dec, x, H, W, device, args.steps, args.seed)
        seconds, (T, *chw) = time.perf_counter() - start, z.shape
        if args.reconstruction:
            kind = {"loop": 1, **kind, "format": "PNG"}  # of several frames an animated one: no loss, and in its timing
        panels = (comparison(a / 255, b / 255)[:, :, :(3 if T == 1 else 2) * W] for a, b in zip(x, rec))
        alone = latent or args.reconstruction or args.out == "-"
        file = picture_file(rec if alone else ((255 * c).round().to(torch.uint8) for c in panels), kind)
        name, ending = os.path.splitext(os.path.basename(path))[0], "." + kind["format"].lower()
        if not args.reconstruction or folder == os.path.dirname(picture):
            ending = "_recon" + ending
        longest = "_features.png" if args.features else ending
        names = (result_name(f"{name}_{k + 1}" if k else name, longest) for k in range(len(pictures)))
        stem = next(s for s in (os.path.join(folder, n) for n in names) if as_key(s) not in written)
        written.add(as_key(stem))
        if args.out == "-":
            with open(1, "wb", closefd=False) as f:  # not sys.stdout, which at exit would try again where nobody reads
                f.write(file)
        else:
            if not os.path.basename(stem).startswith(name):
                tqdm.write(f"{path}: with {longest} its name is too long for a file, so results are called {stem}",
                           file=sys.stderr)
            os.makedirs(folder or ".", exist_ok=True)
            write_atomically(stem + ending, lambda f: f.write(file))
        if args.save_latent:
            write_model(args.save_latent, {"weights_sha256": digest, "height": H, "width": W, "file": kind}, {"latent": z})
        if args.features:
            colours = picture_file([feature_picture(enc, teacher, x[0], device)], {"format": "PNG"})
            write_atomically(stem + "_features.png", lambda f: f.write(colours))
        said = "standard output" if args.out == "-" else stem + ending
        said += ": " + f"{T} frames, " * (T > 1) + "latent " + "x".join(map(str, chw))
        if not latent:
            mean = sum(psnr(a[None] / 255, b[None] / 255).item() for a, b in zip(x, rec)) / T
            similarity = "n/a" if min(H, W) < 11 else f"{ssim(x[:1] / 255, rec[:1] / 255).item():.4f}"
            said += f" | {x.numel() / z.numel():.1f}x | PSNR {mean:.2f} dB"
            said += " on average" if T > 1 else f" | SSIM {similarity}"
        return f"{said} | {seconds:.2f} s"

    def skip(path, why):
        tqdm.write(" ".join(f"sample.py: {path} {why}".splitlines()), file=sys.stderr)
        skipped.append(path)
    for picture, folder in tqdm(pictures, disable=None if len(pictures) > 1 else True):
        path = "stdin" if picture == "-" else picture
        try:
            said = convert(picture, path, folder)
        except USER_ERRORS as e:
            skip(path, e)
        except (MemoryError, RuntimeError) as e:
            if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
                raise  # the text alone tells that the CPU has no memory left
            skip(path, "takes more memory than there is: give a smaller --size")
        except OSError as e:
            if args.out == "-":
                raise
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{path} and what follows it is left out, the disk is full ({e})") from None
            skip(path, f"is left out ({e})")
        else:
            tqdm.write(said, file=log)
    return 1 if skipped else 0


def run():
    """main() for the command line: its exit status."""
    open_streams()
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if not (said := user_message(e)):
            raise
        print(f"sample.py: {said}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
