"""Reconstruct pictures with a trained tokenizer: image -> 64-channel latent -> image.

    python sample.py img.png                         # writes img_recon.png: original | reconstruction | error x4
    python sample.py photos/ a.jpg --out results --size 0
    python sample.py --bench                         # how many pictures a second

Weights: --weights, else out/model.safetensors, else the file that ships in weights/. Any size and aspect ratio goes in.
A picture that cannot be read is named, the others go on, and the exit status is 1.
"""
import argparse
import os
import sys
import time

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import EXTENSIONS, MAX_PIXELS, is_image, load_image, to_tensor
from decoder import Decoder, DecoderConfig
from encoder import TEACHERS, Encoder, ViT, fetch, read_config
from eval import comparison, image_noise, psnr, round_uint8, ssim

HERE = os.path.dirname(os.path.abspath(__file__))
SUFFIX = "_recon.png"


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description="Reconstruct pictures with a trained UniFlow tokenizer.")
    ap.add_argument("files", nargs="*", metavar="FILES", help="pictures, or folders of pictures")
    ap.add_argument("--weights", metavar="FILE", help="tokenizer: a file, or uniflow-internvit, the authors' [out/model.safetensors, else the shipped weights]")
    ap.add_argument("--size", type=int, help="short side in pixels, 0 for the picture's own [the model's native size]")
    ap.add_argument("--steps", type=int, default=1, help="Euler steps of the decoder [%(default)s]")
    ap.add_argument("--seed", type=int, default=0, help="of the decoding noise [%(default)s]")
    ap.add_argument("--out", metavar="FOLDER", help="where to write [beside each picture]")
    ap.add_argument("--bench", action="store_true", help="measure encoding and decoding; without weights, InternViT's size at random")
    args = ap.parse_args(argv)
    if not args.files and not args.bench:
        ap.error("no FILES: pictures or folders of pictures, or --bench")
    if args.steps < 1 or (args.size or 0) < 0:
        ap.error(f"--steps is {args.steps}, at least 1; --size is {args.size}, at least 0")
    return args


def find_weights(given):
    """The tokenizer file to use: the one given (a path, a name or a URL), or the first there is of out/ and the shipped one."""
    if given:
        return fetch(given)
    choices = ["out/model.safetensors", os.path.join(HERE, "weights", "uniflow-tiny.safetensors")]
    for path in choices:
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"no tokenizer at {' or '.join(choices)}: train one with `python train.py`, or give --weights")


def find_pictures(files):
    """Files as they are, folders replaced by the pictures in them (without earlier results), in sorted order."""
    pictures = []
    for f in files:
        if os.path.isdir(f):
            inside = sorted(n for n in os.listdir(f) if is_image(n) and not n.endswith(SUFFIX))
            if not inside:
                raise ValueError(f"{f} holds no pictures ({' '.join(EXTENSIONS)})")
            pictures += [os.path.join(f, n) for n in inside]
        elif os.path.exists(f):
            pictures.append(f)
        else:
            raise FileNotFoundError(f"{f}: no such picture or folder")
    return pictures


def resize_short_side(img, short):
    """PIL image with its shorter side at `short` pixels (bicubic, antialiased); 0: as it is."""
    if not short:
        return img
    W, H = (max(1, round(s * short / min(img.size))) for s in img.size)
    if W * H > MAX_PIXELS:
        raise ValueError(f"would grow from {img.width}x{img.height} to {W}x{H} pixels: give a smaller --size, or 0")
    return img.resize((W, H), Image.Resampling.BICUBIC)


def pad_to_patches(img, p):
    """img (B, 3, H, W) -> the same, its last row and column repeated until both sides are multiples of p."""
    H, W = img.shape[2:]
    return F.pad(img, (0, -W % p, 0, -H % p), mode="replicate")


@torch.no_grad()
def reconstruct(enc, dec, img, steps=1, seed=0):
    """img (1, 3, H, W) in [0, 1], any H and W -> latent (1, C, h, w), reconstruction (1, 3, H, W) in [0, 1]."""
    p, (H, W) = dec.config.patch, img.shape[2:]
    z = enc.encode(pad_to_patches(img, p))
    noise = image_noise([0], z.shape[2] * z.shape[3], 3 * p * p, seed).to(img.device)
    return z, dec.decode(z, steps, noise)[:, :, :H, :W]


def fast(enc, dec, img, steps=1):
    """(encode, decode) for images of one shape (B, 3, H, W) on a GPU: bf16, compiled, each replayed as a CUDA graph.

    Casts the matrices of enc and dec to bf16, for good. A result stays valid until the next call of the same function.
    Without a GPU there is nothing to gain: then they are enc.encode and dec.decode.
    """
    if img.device.type != "cuda":
        return enc.encode, lambda z: dec.decode(z, steps)
    for x in (*enc.parameters(), *dec.parameters()):
        if x.ndim in (2, 4):
            x.data = x.data.bfloat16()
    enc.compile(dynamic=False)
    dec.condition, dec.velocity = (torch.compile(f, dynamic=False) for f in (dec.condition, dec.velocity))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        z = enc.encode(img)
        return torch.cuda.make_graphed_callables((enc.encode, lambda z: dec.decode(z, steps)), ((img,), (z,)))


def bench(enc, dec, size, device):
    """Print how many random pictures a second are encoded and decoded: batches of 32 and 1; several steps."""
    name = f"{torch.cuda.get_device_name()}, bf16, compiled, CUDA graphs" if device.type == "cuda" else "CPU, fp32, not compiled"
    print(f"{name}, torch {torch.__version__}, {size} px")
    for B, steps in ((32, (1, 2, 4, 25)), (1, (1,))) if device.type == "cuda" else ((2, (1, 2)),):
        img = torch.rand(B, 3, size, size, device=device)
        for n in steps:
            encode, decode = fast(enc, dec, img, n)
            z = encode(img)
            both = (("encode + decode", lambda: decode(encode(img))), ("encode", lambda: encode(img))) if n == 1 else ()
            for what, f in (*both, (f"decode in {n} step{'s' * (n > 1)}", lambda: decode(z))):
                took = []
                for _ in range(25):
                    start = time.perf_counter()
                    f()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    took.append(time.perf_counter() - start)
                took = sorted(took)[len(took) // 2]  # the first ones warm up
                print(f"batch {B:2d} | {what:18s} | {B / took:8.1f} img/s | {took * 1e3:7.2f} ms", flush=True)


def main(argv=None):
    args = parse_args(argv)
    if args.bench:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            weights = find_weights(args.weights)
            enc, dec, size = Encoder.from_pretrained(weights), Decoder.from_pretrained(weights), args.size or read_config(weights)["size"]
        except FileNotFoundError as e:
            if args.weights:
                raise
            print(f"{e}\nRANDOM weights of the InternViT tokenizer's size, for measuring")
            enc, dec, size = Encoder(ViT(TEACHERS["internvit"])).eval(), Decoder(DecoderConfig()).eval(), args.size or 448
        return bench(enc.to(device), dec.to(device), size, device)
    weights, pictures = find_weights(args.weights), find_pictures(args.files)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    enc, dec = Encoder.from_pretrained(weights).to(device), Decoder.from_pretrained(weights).to(device)
    size = read_config(weights)["size"] if args.size is None else args.size
    print(f"weights {weights}, {'short side ' + str(size) + ' px' if size else 'original size'}, on {device.type}")
    if args.out:
        os.makedirs(args.out, exist_ok=True)

    written, unread = set(), 0
    for picture in tqdm(pictures, disable=None if len(pictures) > 1 else True):
        try:
            img = to_tensor(resize_short_side(load_image(picture), size))[None].to(device) / 255  # (1, 3, H, W)
        except ValueError as e:  # the others go on
            tqdm.write(f"sample.py: {picture} {e}", file=sys.stderr)
            unread += 1
            continue
        start = time.perf_counter()
        z, rec = reconstruct(enc, dec, img, args.steps, args.seed)
        rec = round_uint8(rec).cpu()  # also waits for the GPU
        seconds, img = time.perf_counter() - start, img.cpu()

        folder, name = os.path.split(picture)
        stem = os.path.join(args.out or folder, os.path.splitext(name)[0])
        path = next(p for k in range(len(pictures)) if (p := f"{stem}_{k + 1}{SUFFIX}" if k else stem + SUFFIX) not in written)
        written.add(path)
        triple = (comparison(img[0], rec[0]) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(triple).save(path)
        similarity = f"{ssim(img, rec).item():.4f}" if min(img.shape[2:]) >= 11 else "n/a"
        C, h, w = z.shape[1:]
        tqdm.write(f"{path}: latent {C}x{h}x{w} | {img.numel() / z.numel():.1f}x | PSNR {psnr(img, rec).item():.2f} dB | "
                   f"SSIM {similarity} | {seconds:.2f} s")
    return 1 if unread else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)
