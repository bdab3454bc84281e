"""Pictures with boxes and masks in COCO's format, to train and test a detector on.

    data = CocoDetection("coco", "train", side=1024, train=True)    # a folder or a .zip archive, and a part of it
    img, boxes, labels, masks = data[n]     # uint8 (3, S, S); (k, 4) x1 y1 x2 y2; (k,) from 1 on; uint8 (k, S, S)

In training n is the global sample number, as for data.ImageDataset, and the augmentation is a mirror image and
large-scale jitter (Ghiasi et al. 2021): the picture is resized to `jitter` (0.1 to 2) times the size at which it fits
the canvas of S x S pixels (see canvas.py), and a random part of it is shown. Crowd regions and boxes without area are
not trained on, nor are pictures that have no others. Testing shows every picture whole. Needs pycocotools for masks.
"""
import json
import os
import zipfile

import numpy as np
import torch
from PIL import Image

from data import ImageDataset, MissingFile, Samples, UserError
from downstream.canvas import place, to_canvas

LAYOUTS = ("{}/images", "{}/instances.json"), ("{}2017", "annotations/instances_{}2017.json")  # ours, COCO's own
SLACK = 1.0  # pixels by which a box may leave its picture, as rounded ones do; it is cut off there


def read_split(root, split):
    """(what instances.json holds, its path, the folder of the pictures below `root`) of a part of a data set."""
    if not os.path.exists(root):
        raise MissingFile(f"{root}: no such folder or .zip archive")
    for images, file in LAYOUTS:
        images, file = images.format(split), file.format(split)
        path = os.path.join(root, file)
        try:
            if os.path.isdir(root):
                with open(path, "rb") as f:
                    return json.load(f), path, images
            with zipfile.ZipFile(root) as z, z.open(file) as f:
                return json.load(f), path, images
        except (FileNotFoundError, KeyError):
            continue
        except (zipfile.BadZipFile, ValueError, RecursionError) as e:
            raise UserError(f"{path} cannot be read as JSON, or {root} as an archive ({e})") from None
    raise MissingFile(f"{root} has no part {split}: neither " + " nor ".join(x.format(split) for _, x in LAYOUTS))


def check_annotation(a, size, masks):
    """(x1 y1 x2 y2 inside of its picture) of an annotation. UserError if box or mask do not fit the picture."""
    what, mask, (x, y, w, h) = f"annotation {a['id']}", a.get("segmentation"), map(float, a["bbox"])
    if not (min(x, y) >= -SLACK and 0 <= w <= size[0] + SLACK - x and 0 <= h <= size[1] + SLACK - y):  # refuses nan
        raise UserError(f"{what} has the box {a['bbox']} (x y w h), outside of its picture of {size[0]}x{size[1]}")
    if masks and not mask:
        raise UserError(f"{what} has no mask, but others have: give all masks, or none")
    if isinstance(mask, dict):
        runs = mask["counts"] if isinstance(mask["counts"], list) else [size[0] * size[1]]  # text is packed
        if tuple(mask["size"][::-1]) != size or sum(runs) != size[0] * size[1] or min(runs) < 0:
            raise UserError(f"{what} has a mask of {mask['size']} (height, width), or runs that do not fill it; its "
                            f"picture is {size[0]}x{size[1]}")
    elif any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask or ()):
        raise UserError(f"{what} has a polygon of less than three points, or a half one")
    return max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])


class CocoDetection(Samples):
    """The pictures of a part ("train", "val") of a data set. In training [n] is as above, but without masks if the data
    have none; in testing [i] is (uint8 (3, S, S), i). Label k is categories[k - 1], whose id is category_ids[k - 1].

    UserError, which names the annotation or the file, for what does not fit together.
    """

    def __init__(self, root, split, side, train, seed=0, jitter=(0.1, 2.0)):
        self.root, self.split, self.side = os.fspath(root), split, side
        self.train, self.seed, self.jitter = train, seed, jitter
        content, self.truth, folder = read_split(self.root, split)
        try:
            self.read(content, folder)
        except UserError as e:
            raise type(e)(f"{self.truth}: {e}") from None
        except (LookupError, TypeError, AttributeError, ValueError) as e:
            raise UserError(f"{self.truth} is not in COCO's format ({type(e).__name__}: {e})") from None

    def read(self, content, folder):
        pictures, annotations = {x["id"]: x for x in content["images"]}, content["annotations"]
        sizes = {k: (x["width"], x["height"]) for k, x in pictures.items()}
        self.categories, self.category_ids = zip(*((x["name"], x["id"]) for x in content["categories"]))
        label, found = {x: k + 1 for k, x in enumerate(self.category_ids)}, {k: [] for k in pictures}
        if len(label) < len(self.categories) or len(pictures) < len(content["images"]):
            raise UserError("two categories or two pictures have one id")
        self.has_masks = any(a.get("segmentation") for a in annotations)
        for a in annotations:
            for key, known in ("image_id", pictures), ("category_id", label):
                if a[key] not in known:
                    raise UserError(f"annotation {a['id']} has the {key} {a[key]}, which the file does not list")
            if not self.train and not {"area", "iscrowd"} <= a.keys():
                raise UserError(f"annotation {a['id']} lacks area or iscrowd, by which AP is measured")
            box = check_annotation(a, sizes[a["image_id"]], self.has_masks)
            if not a.get("iscrowd") and box[2] > box[0] and box[3] > box[1]:
                found[a["image_id"]].append((box, label[a["category_id"]], json.dumps(a.get("segmentation")).encode()))
        self.image_ids = [k for k in pictures if found[k] or not self.train]
        if not self.image_ids:
            raise UserError("no box to train on" if self.train else "no pictures")
        # arrays and bytes, which workers share; millions of objects each of them would copy by and by
        kept = [x for k in self.image_ids for x in found[k]]
        self.sizes = [sizes[k] for k in self.image_ids]
        self.first = np.cumsum([0, *(len(found[k]) for k in self.image_ids)])
        self.boxes, self.labels = np.array([x[0] for x in kept]).reshape(-1, 4), np.array([x[1] for x in kept], int)
        self.masks, self.mask_ends = b"".join(x[2] for x in kept), np.cumsum([0, *(len(x[2]) for x in kept)])
        in_folder = os.path.isdir(self.root)
        self.images = ImageDataset(os.path.join(self.root, folder) if in_folder else self.root, None, train=False)
        numbers = {self.images.path(i): i for i in range(len(self.images))}
        names = [os.path.join(self.root, folder, pictures[k]["file_name"]) for k in self.image_ids]
        if missing := [name for name in names if name not in numbers]:
            raise MissingFile(f"{missing[0]} is not there ({len(missing)} of {len(names)} pictures are missing)")
        self.files = np.array([numbers[name] for name in names])

    def __len__(self):
        return len(self.files)

    def content(self):
        """What the instances.json holds, read again: nothing else needs all of it."""
        return read_split(self.root, self.split)[0]

    def path(self, i):
        """Where picture i lies."""
        return self.images.path(self.files[i])

    def load(self, i):
        """Picture i, a PIL image."""
        try:
            img = self.images.load(self.files[i])
            if img.size != self.sizes[i]:
                raise UserError("is {}x{}, but {} says {}x{}".format(*img.size, self.truth, *self.sizes[i]))
            return img
        except UserError as e:
            raise type(e)(f"{self.path(i)}: {e}") from None

    def mask(self, i, j):
        """Annotation j, which is of picture i: a PIL image, 0 or 1."""
        from pycocotools import mask as runs

        content = json.loads(self.masks[self.mask_ends[j]:self.mask_ends[j + 1]])
        if isinstance(content, list) or isinstance(content["counts"], list):  # polygons, or runs that are not packed
            content = runs.frPyObjects(content, *self.sizes[i][::-1])
        return Image.fromarray(runs.decode(runs.merge(content) if isinstance(content, list) else content))

    def __getitem__(self, n):
        i, S = self.index(n), self.side
        img, (first, last) = self.load(i), self.first[i:i + 2]
        if not self.train:
            return to_canvas(img, place(img.size, S), S), i
        view = place(img.size, S, self.jitter, np.random.default_rng([self.seed, n, 1]))
        boxes, labels, masks = [np.zeros((0, 4))], [], [np.zeros((0, S, S), np.uint8)]
        for j, box in enumerate(view.boxes(self.boxes[first:last]), first):
            if min(box[2:] - box[:2]) < 1:  # less than a pixel of it is shown
                continue
            if self.has_masks:
                mask = np.zeros((S, S), np.uint8)
                mask[:view.shown[1], :view.shown[0]] = view.pixels(self.mask(i, j), Image.Resampling.NEAREST)
                if not mask.any():
                    continue
                x, y = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
                box = np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])  # of an object cut off, what is left of it
                masks.append(mask[None])
            boxes.append(box[None]), labels.append(self.labels[j])
        item = to_canvas(img, view, S), torch.from_numpy(np.concatenate(boxes)).float(), torch.tensor(labels).long()
        return (*item, torch.from_numpy(np.concatenate(masks))) if self.has_masks else item


def collate(samples):
    """Training samples -> uint8 (B, 3, S, S), boxes (M, 4) and labels (M,) of all, their number (B,) in each picture,
    and, if there are masks, uint8 (M, S, S)."""
    img, boxes, labels, *masks = zip(*samples)
    return (torch.stack(img), torch.cat(boxes), torch.cat(labels), torch.tensor([len(x) for x in labels]),
            *(torch.cat(x) for x in masks))
