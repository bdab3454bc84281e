"""The pictures that a user names, as tensors, and their results as files: stills and animations.

    for path, folder in find_pictures(["photos/", "clip.gif"]):        # folder: where the results of this one go
        frames, (H, W), options = load_frames(path, size=256)          # uint8 (T, 3, H, W)
        content = picture_file(frames, options)                        # the bytes of such a file

The options are what PIL is told when it saves such a file: the format and, of an animation, the durations of the frames
in ms and the number of loops.
"""
import io
import itertools
import os
import sys
import warnings

import numpy as np
import torch
from PIL import Image

from data import EXTENSIONS, MAX_BYTES, MAX_PIXELS, TURNS, list_folder, load_image, open_image, to_tensor
from encoder import MissingFile, UserError, one_line
from tools.script import USER_ERRORS

MAX_NAME = 255  # bytes of a file's name, the limit of most file systems


def as_pictures(img, size):
    """Images (b, 3, H, W) in [0, 1] as picture files of size x size would hold them: rounded to uint8, then resized by
    PIL's bicubic filter and rounded again if H is another size. The result is in [0, 1] again."""
    pixels = (img * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    if size != img.shape[2]:
        pixels = np.stack([Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in pixels])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(img.device) / 255


def find_pictures(files, out=None, alone=False, ending="_recon"):
    """[(picture, folder for its results)] of the files given, and of the pictures in and below the folders given.

    Results go to `out`. Without it they go beside a picture; those of a folder NAME, which may be training data, go to
    NAME + ending beside it. alone (--reconstruction): the results have the pictures' own names. So they go to
    NAME_reconstruction, subfolders are kept below `out`, too, and `out` may not overlap with what was given.
    """
    pictures = []
    for path in files:
        if path == "-":  # standard input
            pictures.append((path, out))
            continue
        if not os.path.exists(path):
            raise MissingFile(f"{path}: no such picture or folder")
        if alone and out and (is_within(path, out) or os.path.isdir(path) and is_within(out, path)):
            raise UserError(f"--reconstruction would overwrite pictures, because --out {out} overlaps with {path}: "
                            "give another --out")
        if not os.path.isdir(path):
            pictures.append((path, out or os.path.dirname(path)))
            continue
        names = sorted(name for name, *_ in list_folder(path))
        names = [name for name in names if not os.path.splitext(name)[0].endswith(("_recon", "_features"))]
        if not names:
            raise UserError(f"{path} holds no pictures ({' '.join(EXTENSIONS)})")
        results = out or folder_beside(path, "_reconstruction" if alone else ending)
        for name in names:
            subfolder = os.path.dirname(name) if alone or not out else ""
            pictures.append((os.path.join(path, name), os.path.join(results, subfolder)))
    return pictures


def is_within(path, folder):
    """Whether a path is that folder or lies in it, links resolved."""
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(os.path.realpath(folder), ""))


def folder_beside(folder, ending):
    """The path of a folder that is named like this one and lies beside it, not in it."""
    path = os.path.normpath(folder) + ending
    # "." gives "._recon", which lies in it; so may the path of a link that leads upwards
    return os.path.realpath(folder) + ending if is_within(path, folder) else path


def free_path(folder, name, ending, taken):
    """The path for a result, without its ending: `name`, cut to the length that file systems allow, and numbered if an
    earlier result of this run has that path. `taken` is the set of those paths; this one is added."""
    for number in itertools.chain([""], (f"_{k}" for k in itertools.count(2))):
        stem = name
        while len(os.fsencode(stem + number + ending)) > MAX_NAME:
            stem = stem[:-1]
        path = os.path.join(folder, stem + number)
        key = path.casefold() if sys.platform in ("win32", "darwin") else path  # there A.png and a.png are one file
        if key not in taken:
            taken.add(key)
            return path


def resize_short_side(img, short, max_pixels=MAX_PIXELS):
    """PIL image with its shorter side at `short` pixels (bicubic, antialiased); with 0 it keeps its size."""
    W, H = (max(1, round(s * short / min(img.size))) for s in img.size) if short else img.size
    if W * H > max_pixels:
        raise UserError(f"has {W}x{H} pixels at this --size, more than {max_pixels:,}: give a smaller one, or crop it")
    return img.resize((W, H), Image.Resampling.BICUBIC)


def read_pictures(files, out=None, ending="_recon"):
    """Yields (PIL image in RGB, its path, the folder for its results) of find_pictures. One that cannot be read is
    passed over; after the last a UserError names all of these."""
    pictures, bad = find_pictures(files, out, ending=ending), []
    for path, folder in pictures:
        try:
            img = load_image(path)
        except USER_ERRORS as e:
            bad.append(f"{path} {e}")
        else:
            yield img, path, folder
    if bad:
        raise UserError(f"{len(bad)} of {len(pictures)} pictures cannot be read: {'; '.join(bad)}")


def load_frames(file, size, max_pixels=MAX_PIXELS):
    """A path, or - for standard input -> frames uint8 (T, 3, H, W), (H, W), options. A still has T = 1.

    size: the short side in pixels, 0 to keep it. max_pixels: the most that a frame may have. Raises UserError if the
    file is damaged or too large.
    """
    def to_frame(img):
        return to_tensor(resize_short_side(img, size, max_pixels))

    file = io.BytesIO(sys.stdin.buffer.read(MAX_BYTES)) if file == "-" else file
    still = to_frame(load_image(file))
    _, H, W = still.shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about odd metadata
            img = open_image(file)
            turn = TURNS.get(img.info["orientation"])
            first = int(img.info.get("default_image", False))  # 1: an APNG begins with a still for old viewers
            T = (getattr(img, "n_frames", 1) if img.format in ("GIF", "PNG", "WEBP") else 1) - first
            if T < 2:
                return still[None], (H, W), {"format": "PNG"}
            if T * H * W > 2 * MAX_PIXELS:
                raise UserError(f"has {T} frames of {W}x{H}, more than {2 * MAX_PIXELS:,} pixels in all: give a "
                                "smaller --size")
            white, frames, durations = Image.new("RGBA", img.size, "white"), [], []
            for i in range(first, first + T):
                img.seek(i)
                frame = Image.alpha_composite(white, img.convert("RGBA").crop((0, 0, *white.size))).convert("RGB")
                frames.append(to_frame(frame if turn is None else frame.transpose(turn)))
                durations.append(img.info.get("duration", 0))  # after the frame: a WebP does not know it before
            loop = {"loop": img.info["loop"]} if "loop" in img.info else {}  # a GIF without it plays once
            return torch.stack(frames), (H, W), {"format": img.format, "duration": durations, **loop}
    except USER_ERRORS:
        raise
    except Exception as e:  # damage makes PIL raise nearly any type
        raise UserError(f"is a damaged animation ({type(e).__name__}: {one_line(e)})") from None


def picture_file(frames, options):
    """Frames, each uint8 (3, H, W), and the options of load_frames -> the bytes of such a file, a WebP without loss."""
    file = io.BytesIO()
    first, *others = (Image.fromarray(x.permute(1, 2, 0).numpy()) for x in frames)
    try:
        first.save(file, save_all=bool(others), append_images=others, lossless=True, **options)
    except Exception as e:  # sides or durations that the format cannot hold
        raise UserError(f"cannot be written as {options['format']} ({type(e).__name__}: {one_line(e)})") from None
    return file.getvalue()
