"""Hostile files: pickles that would run, damaged weights, damaged pictures and archives, and the fuzzers over them."""
import collections
import faulthandler
import io
import json
import math
import os
import re
import struct
import tempfile
import zipfile
import zlib

# first: tests.helpers sets the environment that torch reads when it is imported
from tests.helpers import MICRO_VIT, peak, picture, run, tokenizer_file

import numpy as np
import torch
from PIL import Image

import data
import decoder
import encoder


class Payload:
    """A pickle that makes a folder when it is executed."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def ways_in(path):
    """What each function that reads weights makes of `path`: {name: its result, or its error's text}.

    An error must be of the right kind, and name the file in one line.
    """
    results = {}
    for name, load in {"read_config": encoder.read_config, "encoder": encoder.Encoder.from_pretrained,
                       "decoder": decoder.Decoder.from_pretrained, "own teacher": encoder.load_teacher,
                       "teacher": lambda p: encoder.load_teacher("micro", p)}.items():
        try:
            results[name] = load(path)
        except (ValueError, FileNotFoundError) as e:
            assert len(str(e).splitlines()) == 1 and path in str(e) and len(str(e)) < 1000, f"{name}: {e!r}"
            results[name] = str(e)
    return results


def png(width, height, *chunks):
    """The bytes of a grey PNG of that size whose pixels are all 0 (compressed: 1/1000), with chunks (kind, content)
    before them."""
    deflate, pixels = zlib.compressobj(), b""
    for _ in range(height):
        pixels += deflate.compress(bytes(width + 1))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks,
              (b"IDAT", pixels + deflate.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c))
                                           for k, c in chunks)


def sources():
    """{name: bytes} of pictures in each format, and each mode and compression that its files commonly have."""
    rgb, exif, files = picture(5), Image.Exif(), {}
    exif[0x0112], exif[0x010E] = 6, "of a test"
    alpha = rgb.convert("RGBA")
    alpha.putalpha(picture(6).convert("L"))
    palette, frames = rgb.quantize(50), [picture(k) for k in (1, 2)]
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)

    def add(ext, *images, **kinds):
        for img in images:
            for kind, how in (kinds or {"": {}}).items():
                f = io.BytesIO()
                img.save(f, {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(ext, ext), **how)
                files[f"{img.mode.replace(';', '')}{kind}.{ext}"] = f.getvalue()
    animated = dict(save_all=True, append_images=frames)
    add("jpg", rgb, rgb.convert("L"), rgb.convert("CMYK"), plain={}, progressive={"progressive": True},
        exif={"exif": exif})
    add("png", rgb, rgb.convert("L"), rgb.convert("1"), alpha, alpha.convert("LA"), palette, deep)
    add("png", palette, transparent={"transparency": 3}, icc={"icc_profile": bytes(3000), "exif": exif})
    add("png", rgb, apng=animated)
    add("webp", rgb, alpha, plain={}, lossless={"lossless": True}, animated=animated, exif={"exif": exif})
    if "AVIF" in data.FORMATS:
        add("avif", rgb, alpha)
    add("bmp", rgb, rgb.convert("L"), rgb.convert("1"), palette, alpha)
    add("gif", palette, plain={}, transparent={"transparency": 3}, animated=animated)
    # no JPEG in TIFF: of a damaged one, Pillow 10.1 shows uninitialised memory, other pixels each time
    add("tif", rgb, **{c or "raw": {"compression": c} for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")})
    add("tif", alpha, palette, deep, rgb.convert("CMYK"), plain={}, several=dict(save_all=True, append_images=[rgb]))
    add("ppm", rgb), add("pgm", rgb.convert("L"))
    files["deep.pgm"] = b"P5 40 30 65535\n" + np.asarray(deep).astype(">u2").tobytes()
    return files


def mutated(rng, blob, other):
    """The bytes with one to three kinds of damage: cut, flipped bits, extreme bytes near the start, a piece of `other`,
    a piece twice."""
    for kind in rng.integers(0, 6, rng.integers(1, 4)):
        at, n = int(rng.integers(len(blob) + 1)), int(rng.integers(1, 40))
        b = bytearray(blob)
        if kind == 0:
            b = b[:at]
        elif kind == 1 and b:
            for k in rng.integers(0, len(b), n):
                b[k] ^= 1 << rng.integers(8)
        elif kind in (2, 3) and b:
            for k in rng.integers(0, min(len(b), 60 if kind == 2 else len(b)), 1 + n % 4):
                b[k] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 4:
            b[at:at + n] = other[at:at + int(rng.integers(200))]
        else:
            b[at:at] = b[at:at + 10 * n]
        blob = bytes(b)
    return blob


def damaged_weights(rng, blob):
    """The bytes of a safetensors file with damage to its header's meaning, or to its bytes."""
    n = struct.unpack("<Q", blob[:8])[0]
    header, body = json.loads(blob[8:8 + n]), bytearray(blob[8 + n:])
    kind, names = rng.integers(8), sorted(k for k in header if k != "__metadata__")
    name, other = rng.choice(names, 2, False)
    values = [0, 1, -1, 2, 3, 7, 10 ** 6, 10 ** 9, 2 ** 63, 2 ** 70, 1e3, 0.5, math.nan, math.inf, "24", "",
              "x\ny" * 999, True, None, [], {}, [[[]]]]
    if kind == 0:  # a value of the configuration, and perhaps a name
        config = json.loads(header["__metadata__"]["config"])
        inside = config[rng.choice(["vit", "decoder"])] if "decoder" in config and rng.random() < 0.9 else config
        if rng.random() < 0.2:
            inside.pop(rng.choice(list(inside)))
        elif rng.random() < 0.1:
            inside["new\nfield"] = 1
        else:
            inside[rng.choice(list(inside))] = values[rng.integers(len(values))]
        header["__metadata__"]["config"] = json.dumps(config)
    elif kind == 1:  # the text of the metadata
        text = header["__metadata__"]["config"]
        header["__metadata__"] = ({"config": mutated(rng, text.encode(), b"[{" * 99).decode("latin1")}
                                  if rng.random() < 0.9 else {})
    elif kind == 2:  # names
        header[(str(name) + "x", str(other), "a\nb\x85", "encoder.vit.mean")[rng.integers(4)]] = header.pop(name)
    elif kind == 3:  # types, shapes and places
        field = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][field] = (str(rng.choice(["I32", "U32", "F16", "F64", "F8_E4M3", "C64", "BOOL", "F4", "X"]))
                               if field == "dtype" else
                               [values[rng.integers(8)] for _ in header[name][field]] if rng.random() < 0.5
                               else header[name][field][::-1])
    elif kind == 4:  # numbers
        a, b = header[name]["data_offsets"]
        at = a + 4 * int(rng.integers((b - a) // 4))
        body[at:at + 4] = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf, 0, -1, 1]))
    text = json.dumps(header).encode()
    blob = struct.pack("<Q", len(text)) + text + bytes(body)
    return (blob if kind < 5 else mutated(rng, blob[:n], bytes(99)) + blob[n:] if kind == 5
            else mutated(rng, blob, bytes(99)))


def fuzz_weights(count):
    """`count` damaged files of weights through all that reads them. Prints what came of them."""
    encoder.TEACHERS["micro"] = MICRO_VIT
    rng, seen, start = np.random.default_rng(count), collections.Counter(), 0
    torch.set_num_threads(1)
    img, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 16, 48)
    with tempfile.TemporaryDirectory() as tmp:
        tokenizer_file(tmp)
        vit = encoder.ViT(MICRO_VIT).state_dict()
        for new in (True, False):
            torch.save(vit, os.path.join(tmp, f"good{int(new)}.pt"), _use_new_zipfile_serialization=new)
        good = [open(os.path.join(tmp, name), "rb").read()
                for name in ("tokenizer.safetensors", "teacher.safetensors", "good0.pt", "good1.pt")]
        for i in range(count):
            which = rng.choice(4, p=[0.6, 0.2, 0.1, 0.1])
            path = os.path.join(tmp, "bad.safetensors" if which < 2 else "bad.pt")
            with open(path, "wb") as f:
                f.write(damaged_weights(rng, good[which]) if which < 2
                        else mutated(rng, good[which], good[which - 1][:3000]))
            faulthandler.dump_traceback_later(30, exit=True)  # a hang
            results = ways_in(path)
            for way, r in results.items():
                if isinstance(r, torch.nn.Module):
                    with torch.no_grad():
                        out = (r.decode(torch.ones(1, 8, 4, 4), noise=noise) if way == "decoder" else
                               r.encode(img) if way == "encoder" else r(img)[-1])
                    extreme = any(x.abs().max() > 1e3 or k == "latent_std" and x.min() < 1e-3
                                  for k, x in [*r.state_dict().items(), *r.named_buffers()])
                    assert out.isfinite().all() or extreme, f"{way}: not finite"
                    seen[way + (" loaded" if out.isfinite().all()
                                else " loaded; a flipped bit made a huge finite weight")] += 1
                elif isinstance(r, str):
                    seen[way + " refused"] += 1
            start = start if i > 50 else peak()
    faulthandler.cancel_dump_traceback_later()
    print(f"{count:,} files, peak memory {peak() - start:.0f} MB higher than after the first fifty")
    print("\n".join(f"{v:6d} {k}" for k, v in seen.most_common()))
    assert peak() < start + 150, "memory grows, or a file took too much"


def fuzz_pictures(count):
    """`count` damaged pictures, and count // 10 damaged archives, through ImageDataset. Prints what came of them."""
    good, seen, start = sources(), collections.Counter(), 0
    data.MAX_PIXELS = 2 ** 22  # so that a tester's machine need not have the memory of a trainer's
    rng, kinds = np.random.default_rng(count), list(good)
    original = {name: data.to_tensor(data.center_crop(data.load_image(io.BytesIO(x)), 16)) for name, x in good.items()}

    def look(dataset, n):
        faulthandler.dump_traceback_later(20, exit=True)  # a hang
        try:
            return dataset[n]
        except ValueError as e:
            assert len(str(e).splitlines()) == 1 and (dataset.train or dataset.path(n) in str(e)), repr(e)
            return str(e)
    for first in range(0, count, 100):
        with tempfile.TemporaryDirectory() as tmp:
            blobs = {f"{i:03d}{kinds[i % len(kinds)]}": mutated(rng, good[kinds[i % len(kinds)]],
                                                                good[rng.choice(kinds)])
                     for i in rng.choice(1000, min(100, count - first), False).tolist()}
            blobs.update({f"{k}99{name}": good[name] for k, name in enumerate(rng.choice(kinds, 10))})
            os.makedirs(os.path.join(tmp, "folder"))
            with zipfile.ZipFile(os.path.join(tmp, "a.zip"), "w") as z:
                for name, blob in blobs.items():
                    z.writestr(name, blob, zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED)
                    open(os.path.join(tmp, "folder", name), "wb").write(blob)
            a, b = (data.ImageDataset(os.path.join(tmp, x), 16, train=False) for x in ("folder", "a.zip"))
            results = [look(a, n) for n in range(len(a))]
            for n, r in enumerate(results):
                seen[re.search(r"cannot be read as an image \((none|\w+)", r)[1] if isinstance(r, str) else "read"] += 1
                same = look(b, n)
                assert type(same) is type(r) and (isinstance(r, str) or torch.equal(r[0], same[0])), (
                    "folder and archive differ")
            a, b = (data.ImageDataset(os.path.join(tmp, x), 16, train=True) for x in ("folder", "a.zip"))
            for n in range(len(a)):
                i = a.index(n)
                j = next(j % len(a) for j in range(i, i + len(a)) if not isinstance(results[j % len(a)], str))
                expected = data.random_crop(data.load_image(io.BytesIO(a.read(j))), 16,
                                            np.random.default_rng([0, n, 1]))
                for img, label in (look(a, n), look(b, n)):
                    assert torch.equal(img, data.to_tensor(expected)), "the next readable image, cropped as sample n"
                    assert label == (0 if i == j else -1 - i)
            for k in range(10):  # the archive itself is damaged
                names = rng.choice(kinds, 4, False)
                with zipfile.ZipFile(os.path.join(tmp, "b.zip"), "w",
                                     zipfile.ZIP_DEFLATED if k % 2 else zipfile.ZIP_STORED) as z:
                    for name in names:
                        z.writestr(name, good[name])
                blob = mutated(rng, open(os.path.join(tmp, "b.zip"), "rb").read(), bytes(100))
                open(os.path.join(tmp, "b.zip"), "wb").write(blob)
                try:
                    c = data.ImageDataset(os.path.join(tmp, "b.zip"), 16, train=False)
                except ValueError as e:
                    assert len(str(e).splitlines()) == 1 and "b.zip" in str(e)
                    seen["archive refused"] += 1
                    continue
                for r in (look(c, n) for n in range(len(c))):
                    seen["archive damaged, image " + ("refused" if isinstance(r, str) else "read")] += 1
                    assert isinstance(r, str) or any(torch.equal(r[0], original[name]) for name in names), (
                        "bit rot went unnoticed")
        start = start or peak()
    faulthandler.cancel_dump_traceback_later()
    print(f"{sum(seen.values()):,} images, peak memory {peak() - start:.0f} MB higher than after the first hundred")
    print("\n".join(f"{v:6d} {k}" for k, v in seen.most_common()))
    assert peak() < start + 150, "memory grows, or a picture took too much"


def fuzz(function, count):
    """Run a fuzzing function in a process of its own, so that a crash, a hang and what C libraries print are seen.

    Allowed are the lines that libtiff and Pillow's TIFF reader print themselves (ZIPDecode: ..., tempfile.tif: ...).
    """
    with tempfile.TemporaryDirectory() as tmp:
        script = os.path.join(tmp, "fuzz.py")
        open(script, "w").write("import faulthandler; from tests import hostile; faulthandler.enable(); "
                                f"hostile.{function}({count})")
        done = run("python", script)
    said = [line for line in done.stderr.splitlines()
            if not re.match(r"(tempfile\.tif|\w+|More samples[\w ]*): |$", line)]
    assert done.returncode == 0 and not said, f"status {done.returncode}\n{done.stdout}\n" + "\n".join(said[-40:])
    return done.stdout
