"""Images for training and evaluation: folders and zip archives, and drawn pictures when there is no data.

    data = ImageDataset(["imagenet/train", "more.zip"], size=448, train=True, seed=0)
    img, label = data[n]          # uint8 (3, S, S) and the index of the parent folder's name in data.classes

In training n is the GLOBAL SAMPLE NUMBER, counted from the first step of the run: epoch = n // len(data), the order of an
epoch is a permutation drawn from (seed, epoch), crop and flip are drawn from (seed, n). What a sample looks like
therefore depends on nothing else, so workers, ranks and a resumed run need no state. Otherwise n counts the
files in sorted order. Crops are those of ADM (Dhariwal & Nichol 2021), the usual protocol of ImageNet generation.

An image that cannot be read is a ValueError that names it. In training it is replaced by the next in sorted order that can be
read, and the label tells, so that workers need count nothing: it is -1 - i for image i, whose file is data.path(i).

`python data.py [PATHS]` shows what is found, `--bench PATH` how quickly it loads. Needs torch, numpy and pillow; no other file of this project.
"""
import argparse
import io
import os
import struct
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # PIL would also hand a file to Ghostscript, whatever its name
MAX_PIXELS = 2 ** 27  # of a picture, and MAX_BYTES of its file: what a hostile one can make a worker allocate
MAX_BYTES = 4 * MAX_PIXELS


class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A UserError of a file that is not there."""


def load_image(file, short=None):
    """A path or binary file -> PIL image in RGB, turned as its EXIF says, transparency over white.

    short: a JPEG may come out 2, 4 or 8 times smaller, decoded so (which is quicker), its shorter side still >= 2 * short.
    Raises ValueError, saying why, if it cannot be read as an image. Of an animation it is the first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of odd metadata
            img = Image.open(file, formats=FORMATS)
            if img.width * img.height > MAX_PIXELS:  # the header says so, nothing is decoded yet
                raise UserError(f"{img.width}x{img.height} pixels, more than {MAX_PIXELS:,}")
            if img.mode == "F" or img.format == "TIFF" and img.mode == "I":
                raise UserError("32 bits a channel, of which nothing says what white is: save it with 8 or 16")
            full, upright = img.size, img.getexif().get(274, 1) == 1
            if short and (upright or full[0] % 8 == full[1] % 8 == 0):
                img.draft(None, (2 * short, 2 * short))
            img.load()
            scale = round(full[0] / img.width)
            img = ImageOps.exif_transpose(img)
        if scale > 1 and upright:  # an odd last row or column is dropped, as shrink does
            img = img.crop((0, 0, full[0] // scale, full[1] // scale))
        if img.mode.startswith("I"):  # 16 bits a channel: keep the upper 8
            img = Image.fromarray((np.asarray(img) // 256).clip(0, 255).astype(np.uint8))
        if img.has_transparency_data:
            return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA")).convert("RGB")
        return img.convert("RGB")
    except Exception as e:  # damage makes PIL raise nearly any type; all mean that no picture can be read from the file
        why = f"none of {', '.join(FORMATS)}" if isinstance(e, Image.UnidentifiedImageError) else f"{type(e).__name__}: {e}"
        raise UserError(f"cannot be read as an image ({' '.join(why.split())[:200]})") from None


def cut(img, where):
    """The piece of a picture that its crop comes from: all of it, unless it is more than 16 times as long as wide (20,000 x 10
    would first grow to 896,000 x 448), then 16 times, at the fraction `where` of its length."""
    w, h = (min(side, 16 * min(img.size)) for side in img.size)
    left, top = int(where * (img.width - w)), int(where * (img.height - h))
    return img if (w, h) == img.size else img.crop((left, top, left + w, top + h))


def shrink(img, short):
    """Resize so that the shorter side is `short` pixels: halved by box filter while twice too large, then bicubic (ADM)."""
    while min(img.size) >= 2 * short:
        img = img.resize((img.width // 2, img.height // 2), Image.Resampling.BOX)
    scale = short / min(img.size)
    return img.resize((round(img.width * scale), round(img.height * scale)), Image.Resampling.BICUBIC)


def center_crop(img, size):
    """The central size x size pixels of a PIL image whose shorter side is resized to `size` (ADM's evaluation crop)."""
    img = shrink(cut(img, 0.5), size)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((left, top, left + size, top + size))


def random_crop(img, size, rng, crop_scale=(0.8, 1.0)):
    """ADM's training crop: the shorter side of the crop is a random fraction crop_scale of the picture's; half are flipped."""
    if max(img.size) > 16 * min(img.size):
        img = cut(img, rng.random())
    low, high = np.ceil(size / crop_scale[1]), np.ceil(size / crop_scale[0])
    img = shrink(img, int(rng.integers(low, high + 1)))
    left, top = rng.integers(img.width - size + 1), rng.integers(img.height - size + 1)
    img = img.crop((left, top, left + size, top + size))
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else img


def to_tensor(img):
    """PIL RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()


class ImageDataset(Dataset):
    """All images of `roots` (a path or several: folders, searched recursively, and .zip archives), size x size pixels (None,
    without train: whole, as they are).

    Files and archive entries are known by their extension; which there are is kept in a few arrays, so that workers share
    the memory and a list of millions costs each of them nothing. Raises FileNotFoundError and ValueError for roots that
    are missing, empty or damaged, and ValueError naming the file for one that cannot be read when it is asked for. In
    training (only) the next in sorted order that can be read stands in for image i, with the label -1 - i; ValueError if
    none of 100 can.
    """

    def __init__(self, roots, size, train, seed=0, crop_scale=(0.8, 1.0)):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"crop_scale is {crop_scale}; it is two fractions in (0, 1], the smaller first")
        self.roots = [os.fspath(r) for r in ([roots] if isinstance(roots, (str, os.PathLike)) else roots)]
        self.size, self.train, self.seed, self.crop_scale = size, train, seed, crop_scale
        self.replace = train  # by the next, an image that cannot be read
        names, root_of, spans = [], [], []  # span of an archive entry: offset, compressed length, method, length, CRC-32
        for r, root in enumerate(self.roots):
            found = sorted(list_folder(root) if os.path.isdir(root) else list_archive(root))
            if not found:
                raise UserError(f"{root} holds no images ({' '.join(EXTENSIONS)})")
            names += [name for name, *_ in found]
            spans += [span for _, *span in found]
            root_of += [r] * len(found)
        folders = [os.path.basename(os.path.dirname(name)) or os.path.basename(os.path.abspath(self.roots[r])) for name, r in zip(names, root_of)]
        self.classes = sorted(set(folders))
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([index[f] for f in folders], np.int32)
        self.root_of, self.spans = np.array(root_of, np.int32), np.array(spans, np.int64).reshape(-1, 5)
        encoded = [os.fsencode(name) for name in names]
        self.name_ends, self.names = np.cumsum([len(name) for name in encoded]), b"".join(encoded)
        self.files, self.permutation = {}, (None, None)  # open archives; the last epoch's order

    def __len__(self):
        return len(self.labels)

    def __getstate__(self):
        return {**self.__dict__, "files": {}}  # open files do not travel to another process

    def path(self, i):
        """Where image i (in sorted order) lies: root and name."""
        end = self.name_ends[i]
        start = self.name_ends[i - 1] if i else 0
        return os.path.join(self.roots[self.root_of[i]], os.fsdecode(self.names[start:end]))

    def read(self, i):
        """The bytes of image file i. Archives are opened once and read by position, which forked workers can share."""
        offset, length, method, size, crc = self.spans[i].tolist()
        if length < 0:
            path = self.path(i)
            if not os.path.isfile(path) or os.path.getsize(path) > MAX_BYTES:  # a pipe or a device could be read for ever
                raise UserError(f"is gone, no plain file, or longer than {MAX_BYTES:,} bytes")
            with open(path, "rb") as f:
                return f.read()
        if max(length, size) > MAX_BYTES:
            raise UserError(f"is {max(length, size):,} bytes long, at most {MAX_BYTES:,} are read")
        root = self.roots[self.root_of[i]]
        if root not in self.files:
            self.files[root] = open(root, "rb")
        fd = self.files[root].fileno()
        name_length, extra_length = struct.unpack("<26xHH", os.pread(fd, 30, offset))  # the entry's local header
        data = os.pread(fd, length, offset + 30 + name_length + extra_length)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, size + 1)  # no more than that, whatever is in it
        if len(data) != size or zlib.crc32(data) != crc:
            raise UserError("damaged in the archive, or the archive was changed meanwhile (CRC-32)")
        return data

    def index(self, n):
        """Sample number n -> number of the image in sorted order."""
        if not self.train:
            return range(len(self))[n]
        epoch, k = divmod(n, len(self))
        if self.permutation[0] != epoch:
            self.permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return int(self.permutation[1][k])

    def __getitem__(self, n):
        i = self.index(n)
        # in training a JPEG may be decoded smaller, to what shrink would have made of it: draws and crop do not depend on its size
        # (but within a pixel of 16:1)
        short = int(np.ceil(self.size / self.crop_scale[0])) if self.train else None
        error, tries = None, min(len(self), 100) if self.replace else 1
        for j in range(i, i + tries):
            try:
                img = load_image(io.BytesIO(self.read(j % len(self))), short)
                break
            except (OSError, ValueError, struct.error, zlib.error) as e:
                error = error or f"{self.path(i)}: {e}"
        else:
            raise UserError(error + f", nor can the {tries - 1} after it" * (tries > 1))
        if self.train:  # the 1 sets this stream apart from the permutations'
            img = random_crop(img, self.size, np.random.default_rng([self.seed, n, 1]), self.crop_scale)
        elif self.size:
            img = center_crop(img, self.size)
        return to_tensor(img), -1 - i if error else int(self.labels[i])


def list_folder(root):
    """(name, -1, -1, -1, -1, -1) of every image file below a folder."""
    def stop(error):
        raise error
    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link to a folder that was walked already
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in filter(is_image, files):
            yield os.path.relpath(os.path.join(folder, name), root), *[-1] * 5


def is_image(name):
    """Whether a file's name is that of a picture; the ._ files that macOS puts beside them are none."""
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith("._")


def list_archive(path):
    """(name, offset of the local header, compressed length, method, length, CRC-32) of every image in a zip archive."""
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such folder or .zip archive")
    try:
        with zipfile.ZipFile(path) as z:
            entries, end = z.infolist(), os.path.getsize(path)
    except Exception as e:  # zipfile, too, raises many types
        raise UserError(f"{path} is no folder, and no .zip archive or a damaged one ({e})") from None
    for e in entries:
        if is_image(e.filename) and not e.is_dir():
            if e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or e.flag_bits & 1:
                raise UserError(f"{path}: {e.filename} is encrypted or compressed by an unknown method; repack the archive")
            if not 0 <= e.header_offset <= end - e.compress_size:
                raise UserError(f"{path} is a damaged .zip archive: {e.filename} is said to lie outside of it")
            yield e.filename, e.header_offset, e.compress_size, e.compress_type, min(e.file_size, MAX_BYTES + 1), e.CRC


def split_batch(batch, micro_batch, ranks):
    """(micro-batch, accumulation steps) of each rank: micro-batch * accumulation * ranks = batch, exactly.

    A micro-batch that does not divide the rank's share becomes the largest divisor below it.
    """
    if batch % ranks:
        low = batch // ranks * ranks
        near = " or ".join(str(b) for b in (low, low + ranks) if b)
        raise UserError(f"batch_size {batch} does not divide among {ranks} ranks: try {near}")
    share = batch // ranks
    micro_batch = next(m for m in range(min(micro_batch, share), 0, -1) if share % m == 0)
    return micro_batch, share // micro_batch


def sample_numbers(first, batch, micro_batch, rank, ranks, batches):
    """Yields this rank's micro-batches as lists of global sample numbers, for `batches` global batches from sample `first`.

    Whatever the ranks, the global batches are the same samples: rank r has the r-th contiguous share of each.
    """
    share = batch // ranks
    for start in range(first + rank * share, first + rank * share + batches * batch, batch):
        for m in range(start, start + share, micro_batch):
            yield list(range(m, m + micro_batch))


class ProceduralDataset(Dataset):
    """Drawn pictures with the interface of ImageDataset, so that everything runs without data: shapes, gradients,
    textures, letters (the label says which). Picture n depends on (seed, train, n) alone."""

    classes = ["shapes", "gradients", "textures", "letters"]

    def __init__(self, size, train, seed=0, length=10_000):
        self.size, self.train, self.seed, self.length = size, train, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        n = n if self.train else range(self.length)[n]  # as ImageDataset.index
        rng = np.random.default_rng([self.seed, n, int(self.train)])
        label = int(rng.integers(4))
        return to_tensor(draw(rng, self.classes[label], self.size)), label


def draw(rng, kind, size):
    """A PIL picture of the kind (a name in ProceduralDataset.classes), drawn at twice the size and halved."""
    S = 2 * size
    colors = rng.integers(0, 256, (6, 3))
    y, x = np.mgrid[:S, :S] / S  # in [0, 1)
    angle, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8, 2)
    along = x * np.cos(angle) + y * np.sin(angle)
    if kind == "textures":
        freq = rng.uniform(min(3, size / 16), size / 8)
        waves = np.sin(2 * np.pi * freq * along), np.sin(2 * np.pi * freq * (y * np.cos(angle) - x * np.sin(angle)))
        coarse = Image.fromarray(rng.random((8, 8)).astype(np.float32)).resize((S, S), Image.Resampling.BICUBIC)
        mix = (0.5 + 0.5 * waves[0], (waves[0] * waves[1] > 0).astype(float), np.asarray(coarse))[rng.integers(3)]
    else:  # a gradient, linear or radial, which shapes and letters have as their background
        mix = along if rng.random() < 0.5 else np.hypot(x - cx, y - cy)
        mix = (mix - mix.min()) / np.ptp(mix)
    mix = np.clip(mix, 0, 1)[..., None]  # (S, S, 1)
    img = Image.fromarray((colors[0] * (1 - mix) + colors[1] * mix).astype(np.uint8))
    pen = ImageDraw.Draw(img)
    for color in map(tuple, colors[2:2 + rng.integers(1, 5)].tolist()):
        (x0, y0), (w, h) = rng.uniform(0, 0.7, 2) * S, rng.uniform(0.15, 0.5, 2) * S
        if kind == "shapes":
            shape = rng.integers(3)
            if shape == 0:
                pen.ellipse((x0, y0, x0 + w, y0 + h), fill=color)
            elif shape == 1:
                pen.rectangle((x0, y0, x0 + w, y0 + h), fill=color)
            else:
                pen.polygon([(x0, y0 + h), (x0 + w * rng.random(), y0), (x0 + w, y0 + h)], fill=color)
        elif kind == "letters":
            letter = chr(rng.integers(ord("A"), ord("Z") + 1))
            pen.text((x0, y0), letter, fill=color, font=ImageFont.load_default(rng.uniform(0.3, 0.7) * S))
    return img.reduce(2)


def bench(roots, size, seconds):
    """Print how many training samples a second are decoded, cropped and brought to the device, by 1, 2, 4.. workers."""
    data, on_gpu = ImageDataset(roots, size, train=True), torch.cuda.is_available()
    start = time.perf_counter()
    np.random.default_rng([0, 0]).permutation(1_281_167)
    print(f"{len(data):,} images at {size} px; the order of an epoch of ImageNet takes {1e3 * (time.perf_counter() - start):.0f} ms "
          f"and {1_281_167 * 8 / 2**20:.0f} MiB a worker")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for workers in sorted({2 ** k for k in range(cores.bit_length())} | {cores}):
        loader = iter(DataLoader(data, num_workers=workers, pin_memory=on_gpu, prefetch_factor=4,
                                 batch_sampler=sample_numbers(0, 32, 32, 0, 1, 1_000_000)))
        for _ in range(2 * workers):  # until all are at work
            next(loader)
        start, n = time.perf_counter(), 0
        while (took := time.perf_counter() - start) < seconds:
            img = next(loader)[0]
            n += len(img.cuda(non_blocking=True) if on_gpu else img)
        print(f"{workers:3d} workers | {n / took:8.1f} img/s | {n / took / workers:7.1f} a worker", flush=True)
        del loader


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description="Show what images are found, or how quickly they load.")
    ap.add_argument("paths", nargs="*", metavar="PATHS", help="folders or .zip archives [drawn pictures]")
    ap.add_argument("--bench", nargs="+", metavar="PATH", help="measure decoding, cropping and the transfer to the device")
    ap.add_argument("--size", type=int, default=448, help="of the measured crops [%(default)s]")
    ap.add_argument("--seconds", type=float, default=5.0, help="of each measurement [%(default)s]")
    args = ap.parse_args()
    try:
        if args.bench:
            sys.exit(bench(args.bench, args.size, args.seconds))
        data = ImageDataset(args.paths, 64, train=False) if args.paths else ProceduralDataset(64, train=False)
        img, label = data[0]
    except (OSError, ValueError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(data):,} images of {len(data.classes)} classes{'' if args.paths else ', drawn (no PATHS were given)'}")
    print("image ", tuple(img.shape), img.dtype)
    print("label ", label, "=", data.classes[label])
