"""Pictures and what lies beside each of them: a mask, or a depth map.

    data = Pairs("camvid.zip", "train", "masks")      # also a folder, or several of either
    img, mask = data.read(0)                          # uint8 (3, H, W) in RGB, and the stored numbers (H, W)

An image and its target have the same name, whatever their extensions. They lie in `<split>/images` and `<split>/masks`,
or, as in ADE20K, in `images/<split>` and `annotations/<split>`; folders above and below may be there. Sample numbers
are those of data.py: a subclass gives samples by __getitem__(n), with self.index(n).
"""
import io
import os
import re
import zipfile

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data import EXTENSIONS, TURNS, ImageDataset, MissingFile, Samples, UserError, open_image, to_tensor
from tools.script import USER_ERRORS, check_locks, ignore_signals

ADE20K = {"train": "training", "val": "validation", "masks": "annotations"}  # its names of splits and targets


class Pairs(Samples):
    """The pairs of a split. `names` are sorted. UserError for a split without pairs, or for files without a partner."""

    def __init__(self, roots, split, target, train=False, seed=0):
        self.files, self.train, self.seed = ImageDataset(roots, None, train=False), train, seed
        where = f"{', '.join(self.files.roots)}, split {split}"
        images, targets = self.find(split, "images"), self.find(split, target)
        if not images.keys() & targets.keys():
            raise UserError(f"{where}: there are no pairs of {split}/images ({len(images)} files) and {split}/{target} "
                            f"({len(targets)}) with the same name; endings are {' '.join(EXTENSIONS)}")
        if alone := sorted(images.keys() ^ targets.keys()):
            paths = [self.files.path(images[name] if name in images else targets[name]) for name in alone]
            raise UserError(f"{where}: {len(paths)} files of images or {target} have no partner: {list_some(paths)}")
        self.names = sorted(images)
        self.numbers = np.array([(images[name], targets[name]) for name in self.names])  # in self.files

    def find(self, split, kind):
        """{name: its number in self.files} of the images, or of the targets, of a split."""
        splits, kinds = (f"(?:{re.escape(x)}|{ADE20K.get(x, re.escape(x))})" for x in (split, kind))
        pattern, found = re.compile(rf"(.*?/|)(?:{splits}/{kinds}|{kinds}/{splits})/(.+)\.\w+"), {}
        for i, root in enumerate(self.files.root_of):
            folder, path = self.files.roots[root], self.files.path(i)
            if match := pattern.fullmatch(os.path.relpath(path, folder).replace(os.sep, "/")):
                name = f"{folder}/" * (len(self.files.roots) > 1) + match[1] + match[2]
                if name in found:
                    raise UserError(f"{path} and {self.files.path(found[name])} have the same name")
                found[name] = i
        return found

    def __len__(self):
        return len(self.names)

    def path(self, i, target=False):
        """Where the image of pair i lies, or its target."""
        return self.files.path(self.numbers[i, int(target)])

    def read(self, i):
        """Pair i: uint8 (3, H, W) in RGB, turned as its EXIF says, and an array (H, W) of the numbers in the target."""
        try:
            target = False
            img = to_tensor(self.files.load(self.numbers[i, 0]))
            target = True
            numbers = read_numbers(self.files.read(self.numbers[i, 1]))
        except USER_ERRORS as e:
            raise UserError(f"{self.path(i, target)}: {e}") from None
        if numbers.shape != img.shape[1:]:
            (h, w), (H, W) = numbers.shape, img.shape[1:]
            raise UserError(f"{self.path(i, True)} is {w}x{h}, its image {W}x{H}")
        return img, numbers

    def every(self, use, numbers=None, workers=0, gather=lambda x: [x]):
        """Yields use(i) of each pair in `numbers` [all], in this order, computed by `workers` processes.

        After a pair for which `use` raises a UserError nothing more is yielded. The others are still read, so that a
        UserError at the end names all. gather(x) gives every rank's x; each rank must use up its generator.
        """
        check_locks(workers)
        numbers, bad = range(len(self)) if numbers is None else numbers, []
        for result, why in DataLoader(Uses(use, numbers), None, num_workers=workers, collate_fn=tuple,
                                      worker_init_fn=ignore_signals):
            bad += [why] * bool(why)
            if not bad:
                yield result
        if bad := sum(gather(bad), []):
            raise UserError(f"{len(bad)} of {len(self)} pairs cannot be used: {list_some(bad, '; ')}")


class Uses(Dataset):
    """(use(i), None) of each i in `numbers`, or (None, why it cannot be used)."""

    def __init__(self, use, numbers):
        self.use, self.numbers = use, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, k):
        try:
            return self.use(self.numbers[k]), None
        except USER_ERRORS as e:
            return None, str(e)


def read_numbers(blob):
    """The numbers (H, W) that an image file of one channel stores: labels, indices of a palette, 16-bit depth."""
    try:
        img = open_image(io.BytesIO(blob))
        if img.format == "JPEG" or len(img.getbands()) > 1:
            raise UserError(f"it is {img.format} in mode {img.mode}; expected one channel without loss, as a grey PNG")
        turn, step = TURNS.get(img.info["orientation"]), {"L;2": 85, "L;4": 17}.get(img.tile[0][3], 1)
        numbers = np.array(img if turn is None else img.transpose(turn))
    except (OSError, ValueError, SyntaxError, LookupError) as e:
        raise UserError(f"it cannot be read as labels or depth, whole numbers in one channel "
                        f"({' '.join(str(e).split())[:200]})") from None
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers // step  # PIL stretches 2 and 4 bits to 8


def read_beside(root, name):
    """The bytes of a file at the top of a data set, a folder or an archive; None if it is not there."""
    if os.path.isfile(os.path.join(root, name)):
        with open(os.path.join(root, name), "rb") as f:
            return f.read()
    if not os.path.exists(root):
        raise MissingFile(f"{root}: no such folder or archive")
    if not zipfile.is_zipfile(root):
        return None
    with zipfile.ZipFile(root) as z:
        found = [n for n in z.namelist() if n.split("/")[-1] == name]
        return z.read(min(found, key=len)) if found else None


def list_some(names, between=", "):
    """The names in one text; of very many only the first 20."""
    return between.join(names[:20]) + f"{between}and {len(names) - 20} more" * (len(names) > 20)
