"""Images for training and evaluation from folders and zip archives.

    data = ImageDataset(["imagenet/train", "more.zip"], size=448, train=True, seed=0)
    img, label = data[n]          # uint8 (3, S, S) and the index of the parent folder's name in data.classes

In training n is the GLOBAL SAMPLE NUMBER, counted from the first step of the run: epoch = n // len(data), the order of
an epoch is a permutation drawn from (seed, epoch), crop and flip are drawn from (seed, n). What a sample looks like
depends on nothing else, so workers, ranks and a resumed run need no state. Otherwise n counts the files in sorted
order. Crops are those of ADM (Dhariwal & Nichol 2021), the usual protocol of ImageNet generation.

A picture that is damaged raises UserError. In training the next one replaces it, and the label tells so: see
ImageDataset. Trouble of the machine (a disk, a mount, memory, descriptors) is never taken for a picture's damage: it
raises OSError.

`python data.py PATHS` shows what is found. Needs torch, numpy and pillow; no other file of this project.
"""
import argparse
import contextlib
import errno
import io
import os
import posixpath
import stat
import struct
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image, features
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # no others: for some, PIL starts Ghostscript
if "avif" in features.modules and features.check_module("avif"):  # not every Pillow has it
    FORMATS += ("AVIF",)
MAX_PIXELS = 2 ** 27  # of a picture, so that a hostile one cannot take all memory
MAX_BYTES = 4 * MAX_PIXELS  # of its file
SYSTEM_FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information")
WAITS = (0.1, 0.4, 1.5)  # seconds before each new attempt, where the machine could not read
FILE_FAULTS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM,
               errno.EINVAL, errno.EILSEQ)  # the fault of one file or its name; all other errors are the machine's
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # what each value of ORIENTATION asks for
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF files and of EXIF data
TIFF_PIXELS = {*range(254, 267), 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347,
               *range(512, 533)}  # the TIFF tags that say how pixels are stored


class UserError(ValueError):
    """What the user gave is wrong (an argument, a path, a file): scripts print it as one line and exit with 2."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


def cores():
    """How many cores this process may use: its affinity (taskset, Slurm, cpuset), where the system tells it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_image(file, short=None):
    """A path or binary file -> PIL image in RGB, turned as its EXIF says, transparency on white, the first frame.

    short: a JPEG may be decoded 2, 4 or 8 times smaller, which is quicker; its shorter side stays >= 2 * short.
    Raises UserError if the file cannot be read as an image; OSError and MemoryError are the machine's trouble.
    """
    blob = read_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's
            img = open_image(io.BytesIO(blob))
            full, turn = img.size, TURNS.get(img.info["orientation"])
            if short and (turn is None or full[0] % 8 == full[1] % 8 == 0):  # turned: only where no odd row is cut
                img.draft(None, (2 * short, 2 * short))
            img.load()
        scale = round(full[0] / img.width)
        if scale > 1 and turn is None:  # drop an odd last row or column, as shrink would
            img = img.crop((0, 0, full[0] // scale, full[1] // scale))
        if img.mode.startswith("I") or img.info.get("signed"):
            img = upper_bits(img)
        if turn is not None:
            img = img.transpose(turn)
        if img.has_transparency_data:
            return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA")).convert("RGB")
        return img.convert("RGB")
    except MemoryError:
        raise
    except Exception as e:  # damage makes PIL raise nearly any type
        if "out of memory" in str(e).lower():  # AVIF's decoder says it in words
            raise MemoryError from None
        unknown = isinstance(e, Image.UnidentifiedImageError)
        why = f"none of {', '.join(FORMATS)}" if unknown else f"{type(e).__name__}: {e}"
        raise UserError(f"cannot be read as an image ({' '.join(why.split())[:200]})") from None


def read_file(file):
    """The bytes of a path or binary file. UserError for a fault of the file, OSError for one of the machine."""
    if hasattr(file, "read"):
        file.seek(0)
        return file.read()
    try:
        about = os.stat(file)
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:  # a pipe could be read for ever
            raise UserError(f"is no plain file, or longer than {MAX_BYTES:,} bytes")
        with open(file, "rb") as f:
            return f.read()
    except OSError as e:
        if e.errno in FILE_FAULTS:
            raise UserError(f"cannot be opened ({e.strerror})") from None
        raise


def open_image(file):
    """A path or binary file -> PIL image, not decoded yet; TURNS.get(img.info["orientation"]) says how to transpose it.

    Because of odd metadata PIL refuses some pictures with sound pixels, so it gets the file without metadata.
    """
    blob, tags = read_file(file), {}
    strips = {b"\xff\xd8": strip_jpeg, b"\x89P": strip_png, b"II": patch_tiff, b"MM": patch_tiff}
    strip = strip_avif if blob[4:8] == b"ftyp" else strips.get(blob[:2])
    if strip:
        with contextlib.suppress(struct.error, LookupError, ValueError):  # damaged: PIL says how
            blob, tags = strip(blob)
    img = Image.open(io.BytesIO(blob), formats=FORMATS)
    if img.width * img.height > MAX_PIXELS:  # from the header: nothing is decoded yet
        raise UserError(f"{img.width}x{img.height} pixels, more than {MAX_PIXELS:,}")
    if img.mode == "F" or (img.format == "TIFF" and img.mode == "I" and img.tag_v2[BITS] != (16,)):
        raise UserError("has 32 bits a channel, and nothing says which number is white: save it with 8 or 16")
    tags = tags or patch_tiff(img.info.get("exif", b""))[1]
    img.info["orientation"] = tags.get(ORIENTATION)
    if img.format == "TIFF":  # tags has what the file says, img.tag_v2 what patch_tiff changed it to
        photometric, kind = (tags.get(tag, img.tag_v2.get(tag)) for tag in (PHOTOMETRIC, SAMPLE_FORMAT))
        img.info.update(white_is_zero=photometric == 0, signed=kind in (2, (2,)))
    if clear := img.info.get("transparency"):  # a colour; PIL compares it with pixels that it has made 8 bits deep
        scale = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(img.tile[0][3])
        if scale:
            scaled = np.multiply(clear, scale).astype(int).tolist()
            img.info["transparency"] = tuple(scaled) if isinstance(clear, tuple) else scaled
    return img


def upper_bits(img):
    """A grey PIL image of 12 or 16 bits, or of signed numbers -> its upper 8 bits, with black at the least number."""
    bits, deep = img.tag_v2[BITS][0] if img.format == "TIFF" else 16, np.asarray(img)
    if img.info.get("signed"):
        deep = (deep & ((1 << bits) - 1)) ^ (1 << (bits - 1))  # unsigned: the least number becomes 0
    grey = (deep >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if img.info.get("white_is_zero"):
        grey = 255 - grey
    if "transparency" in img.info:
        grey = np.stack([grey, np.where(deep == img.info["transparency"], 0, 255).astype(np.uint8)], -1)
    return Image.fromarray(grey)


def patch_tiff(tiff):
    """A TIFF file, or EXIF data, which have the same form -> (the file for PIL, {tag: its value, if one integer}).

    In the file for PIL the metadata are hidden. PIL does not read all kinds of 12 or 16 bits, so these are declared to
    be unsigned with black at 0; upper_bits then does what the tags said. An odd entry does not spoil the others.
    """
    tiff = tiff.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")  # some programs write it twice
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or 42 not in tiff[2:4]:  # 43: a BigTIFF, which PIL gets as it is
        return tiff, {}
    tiff, tags, places = bytearray(tiff + bytes(12)), {}, {}  # zeros, as EXIF's last entry may be cut
    with contextlib.suppress(struct.error):
        start, = struct.unpack_from(order + "I", tiff, 4)
        count, = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, n = struct.unpack_from(order + "HHI4x", tiff, at)
            form = {1: "B", 3: "H", 4: "I"}.get(kind) if n == 1 else None  # several values lie elsewhere in the file
            tags[tag] = struct.unpack_from(order + form, tiff, at + 8)[0] if form else None
            places[tag] = at
    deep = tags.get(BITS) in (12, 16) and tags.get(PHOTOMETRIC) in (0, 1)
    for tag, at in places.items():
        if tag not in TIFF_PIXELS:
            struct.pack_into(order + "HHII", tiff, at, 65000, 4, 1, 0)  # a tag that means nothing
        elif deep and (tag == PHOTOMETRIC or (tag == SAMPLE_FORMAT and tags[tag] == 2)):
            struct.pack_into(order + "HHIHH", tiff, at, tag, 3, 1, 1, 0)  # the value 1: black is 0; unsigned
    return bytes(tiff[:-12]), tags


def strip_avif(blob):
    """An AVIF file -> (the file with its EXIF hidden, no tags). AVIF itself says how it is turned; PIL tells it."""
    at = blob.index(b"meta")
    end = at - 4 + struct.unpack_from(">I", blob, at - 4)[0]
    return blob[:at] + blob[at:end].replace(b"Exif", b"skip") + blob[end:], {}


def strip_jpeg(blob):
    """A JPEG file -> (the file without metadata, its EXIF tags). JFIF's and Adobe's segments tell colours, and stay."""
    kept, exif, at = [blob[:2]], b"", 2
    while blob[at] == 0xFF and 0xC0 <= blob[at + 1] < 0xFF and blob[at + 1] != 0xDA:  # until the pixels begin
        end = at + 2 + struct.unpack_from(">H", blob, at + 2)[0]
        if blob[at + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):
            kept.append(blob[at:end])
        elif blob[at + 4:at + 10] == b"Exif\0\0":
            exif = exif or blob[at + 4:end]
        at = end
    return b"".join(kept) + blob[at:], patch_tiff(exif)[1]


def strip_png(blob):
    """A PNG file -> (the file without metadata, its EXIF tags). Pixels, palette, transparency and animation stay."""
    kept, exif, at, kind = [blob[:8]], b"", 8, b""
    while at < len(blob) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", blob, at)
        if kind == b"eXIf":
            exif = blob[at + 8:at + 8 + length]
        elif kind[:1].isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT"):
            kept.append(blob[at:at + 12 + length])
        at += 12 + length
    return b"".join(kept), patch_tiff(exif)[1]


def limit_aspect(img, where):
    """The picture, but at most 16 times as long as wide, since 20,000 x 10 pixels would first grow to 896,000 x 448.
    The rest is cut off at both ends: `where`, from 0 to 1, places the part that stays."""
    w, h = (min(side, 16 * min(img.size)) for side in img.size)
    left, top = int(where * (img.width - w)), int(where * (img.height - h))
    return img if (w, h) == img.size else img.crop((left, top, left + w, top + h))


def shrink(img, short):
    """Resize so that the shorter side is `short` pixels: halved by box filter while twice too large, then bicubic."""
    while min(img.size) >= 2 * short:
        img = img.resize((img.width // 2, img.height // 2), Image.Resampling.BOX)
    scale = short / min(img.size)
    return img.resize((round(img.width * scale), round(img.height * scale)), Image.Resampling.BICUBIC)


def center_crop(img, size):
    """The central size x size pixels of a PIL image whose shorter side is resized to `size` (ADM's evaluation crop)."""
    img = shrink(limit_aspect(img, 0.5), size)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((left, top, left + size, top + size))


def random_crop(img, size, rng, crop_scale=(0.8, 1.0)):
    """ADM's training crop: its side is a random fraction, within crop_scale, of the shorter side; half are mirrored."""
    if max(img.size) > 16 * min(img.size):
        img = limit_aspect(img, rng.random())
    low, high = np.ceil(size / crop_scale[1]), np.ceil(size / crop_scale[0])
    img = shrink(img, int(rng.integers(low, high + 1)))
    left, top = rng.integers(img.width - size + 1), rng.integers(img.height - size + 1)
    img = img.crop((left, top, left + size, top + size))
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else img


def to_tensor(img):
    """PIL RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()


class Samples(Dataset):
    """What data sets share: which image a sample number means, from their `labels`, `train` and `seed`."""

    permutation = None, None  # the last epoch and its order

    def __len__(self):
        return len(self.labels)

    def index(self, n):
        """Sample number n -> number of the image in sorted order."""
        if not self.train:
            return range(len(self))[n]
        epoch, k = divmod(n, len(self))
        if self.permutation[0] != epoch:
            self.permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return int(self.permutation[1][k])


class ImageDataset(Samples):
    """All images of `roots`, one or several folders (searched recursively) and .zip archives, as size x size pixels.

    With train=False and size=None they come whole. Images are known by their extension; hidden files and SYSTEM_FOLDERS
    are passed over. The list is kept in a few arrays, which workers share: millions of names cost a worker nothing.
    Raises UserError for roots that are missing (MissingFile), empty or damaged, and for an image i that is damaged,
    gone or not permitted. In training, the next readable one replaces image i, with the label -1 - i; path(i) tells its
    file. UserError if none of 100 is readable. Raises OSError if the machine cannot read in several attempts.
    """

    def __init__(self, roots, size, train, seed=0, crop_scale=(0.8, 1.0)):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"crop_scale is {crop_scale}; expected two fractions in (0, 1], the smaller first")
        self.roots = [os.fspath(r) for r in ([roots] if isinstance(roots, (str, os.PathLike)) else roots)]
        self.size, self.train, self.seed, self.crop_scale = size, train, seed, crop_scale
        self.replace = train  # whether the next image replaces one that cannot be read
        names, folders, root_of, spans = [], [], [], []
        for r, root in enumerate(self.roots):
            if os.path.isdir(root):  # names are kept as bytes, which are the same in any locale
                found = sorted((os.fsencode(name), *span) for name, *span in list_folder(root))
            else:
                found = sorted((name.encode("utf-8", "surrogatepass"), *span) for name, *span in list_archive(root))
            if not found:
                raise UserError(f"{root} holds no images ({' '.join(EXTENSIONS)})")
            names += [name for name, *_ in found]
            top = os.fsencode(os.path.basename(os.path.abspath(root)))
            folders += [os.path.basename(os.path.dirname(name)) or top for name, *_ in found]
            spans += [span for _, *span in found]
            root_of += [r] * len(found)
        classes = {name: k for k, name in enumerate(sorted(set(folders)))}
        self.classes = [name.decode("utf-8", "backslashreplace") for name in classes]
        self.labels = np.array([classes[name] for name in folders], np.int32)
        # a span: an archive entry's offset, compressed length, method, length, CRC-32; of a file in a folder, all -1
        self.root_of, self.spans = np.array(root_of, np.int32), np.array(spans, np.int64).reshape(-1, 5)
        self.name_ends, self.names = np.cumsum([len(name) for name in names]), b"".join(names)

    def path(self, i):
        """Where image i lies: its root, folder or archive, and its name there."""
        start, end = self.name_ends[i - 1] if i else 0, self.name_ends[i]
        name, in_archive = self.names[start:end], self.spans[i, 1] >= 0
        name = name.decode("utf-8", "surrogatepass") if in_archive else os.fsdecode(name)
        return os.path.join(self.roots[self.root_of[i]], name)

    def read(self, i):
        """The bytes of image file i. An archive is opened anew each time, so that processes share no open file."""
        offset, length, method, size, crc = self.spans[i].tolist()
        if length < 0:
            return read_file(self.path(i))
        if max(length, size) > MAX_BYTES:
            raise UserError(f"is {max(length, size):,} bytes long; at most {MAX_BYTES:,} are read")
        root = self.roots[self.root_of[i]]
        try:
            with open(root, "rb") as f:
                f.seek(offset)  # the entry's local header: 30 bytes, then a name and an extra field
                f.seek(sum(struct.unpack("<26xHH", f.read(30))), os.SEEK_CUR)
                data = f.read(length)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-15).decompress(data, size + 1)  # at most one byte too many
        except FileNotFoundError:  # a whole archive is gone: no picture of it is replaced
            raise MissingFile(f"{root} is gone") from None
        except (struct.error, zlib.error) as e:
            raise UserError(f"damaged in the archive ({e})") from None
        if len(data) != size or zlib.crc32(data) != crc:
            raise UserError("damaged in the archive, or the archive was changed meanwhile (CRC-32)")
        return data

    def load(self, i, short=None):
        """Image file i -> PIL image. What the machine cannot read is tried again, and then raises OSError."""
        for wait in (*WAITS, None):
            try:
                return load_image(io.BytesIO(self.read(i)), short)
            except MissingFile:
                raise
            except (OSError, MemoryError) as e:
                if wait is None:
                    code = errno.ENOMEM if isinstance(e, MemoryError) else e.errno or errno.EIO
                    why = f"{os.strerror(code)} in each of {len(WAITS) + 1} attempts"
                    raise OSError(code, why, self.path(i)) from e
            time.sleep(wait)

    def __getitem__(self, n):
        i = self.index(n)
        # in training a JPEG may be decoded smaller, as shrink would make it: draws and crop stay the same (not at 16:1)
        short = int(np.ceil(self.size / self.crop_scale[0])) if self.train else None
        error, tries = None, min(len(self), 100) if self.replace else 1
        for j in range(i, i + tries):
            try:
                img = self.load(j % len(self), short)
                break
            except MissingFile:
                raise
            except UserError as e:
                error = error or f"{self.path(i)}: {e}"
        else:
            raise UserError(error + f", nor can the {tries - 1} after it" * (tries > 1))
        if self.train:  # the 1 sets this stream apart from that of the permutations
            img = random_crop(img, self.size, np.random.default_rng([self.seed, n, 1]), self.crop_scale)
        elif self.size:
            img = center_crop(img, self.size)
        return to_tensor(img), -1 - i if error else int(self.labels[i])


def list_folder(root):
    """Yields (name, -1, -1, -1, -1, -1) of every image file below a folder, always in the same order."""
    def stop(error):
        raise UserError(f"the folder cannot be read: {error}") if error.errno in FILE_FAULTS else error
    seen = set()
    for folder, subfolders, files in os.walk(root, onerror=stop, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link to a folder that was walked already
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(filter(is_visible, subfolders), key=os.fsencode)  # the same order on all machines
        for name in sorted(filter(is_visible, files)):
            if name.lower().endswith(EXTENSIONS):
                yield os.path.relpath(os.path.join(folder, name), root), *[-1] * 5


def is_visible(name):
    """Whether a file or folder of that name is the user's own: not hidden, nor what systems keep beside pictures."""
    return not name.startswith(".") and name not in SYSTEM_FOLDERS


def list_archive(path):
    """Yields (name, offset of the local header, compressed length, method, length, CRC-32) of an archive's images."""
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such folder or .zip archive")
    try:
        with zipfile.ZipFile(path) as z:
            entries, end = z.infolist(), os.path.getsize(path)
    except Exception as e:  # zipfile, too, raises many types
        if getattr(e, "errno", None) and e.errno not in FILE_FAULTS:
            raise OSError(e.errno, e.strerror, path) from e
        raise UserError(f"{path} is neither a folder nor a .zip archive that can be read ({e})") from None
    found = {}
    for e in entries:
        name = e.filename.replace("\\", "/")  # some tools of Windows write backslashes
        if name.lower().endswith(EXTENSIONS):
            found[posixpath.normpath("/" + name).lstrip("/")] = e  # the last of one name, as unzip does
    for name, e in found.items():
        if not all(map(is_visible, name.split("/"))):
            continue
        if e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or e.flag_bits & 1:
            raise UserError(f"{path}: {e.filename} is encrypted or compressed by an unknown method; repack the archive")
        if not 0 <= e.header_offset <= end - e.compress_size:
            raise UserError(f"{path} is a damaged .zip archive: its entry {e.filename} lies outside of the file")
        yield name, e.header_offset, e.compress_size, e.compress_type, min(e.file_size, MAX_BYTES + 1), e.CRC


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description="Show what images are found.")
    ap.add_argument("paths", nargs="+", metavar="PATHS", help="folders or .zip archives")
    args = ap.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may hold what the console cannot show
    try:
        data = ImageDataset(args.paths, 64, train=False)
        img, label = data[0]
    except (UserError, OSError) as e:
        print(f"data.py: {' '.join(str(e).splitlines())}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(data):,} images of {len(data.classes)} classes")
    print("image ", tuple(img.shape), img.dtype)
    print("label ", label, "=", data.classes[label])
