"""A detector's canvas: how a picture lies on it, and how what is found there comes back to the picture.

    view = place(img.size, 1024)              # or a random View: place(size, 1024, (0.1, 2.0), rng)
    x = to_canvas(img, view, 1024)            # uint8 (3, 1024, 1024)
    boxes = view.back(boxes)                  # from the canvas to the picture
    masks = paste_masks(masks, boxes, view.size)
    draw(img, found, names, 0.5).save("objects.png")

A picture lies, resized, in the upper left corner of a canvas of S x S pixels. Boxes are x1 y1 x2 y2: x = 0 is the left
edge of the first pixel, x = 1 its right edge. Needs torch, numpy and pillow, and data.py beside it.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

from data import to_tensor

PAD = (124, 116, 104)  # the canvas beside a picture: ImageNet's mean colour, which networks see as about zero
COLOURS = "#e6194b #3cb44b #4363d8 #f58231 #911eb4 #0b9c9c #f032e6 #808000 #9a6324 #000075".split()


@dataclass(frozen=True)
class View:
    """How a picture lies on the canvas. All pairs are (across, down)."""
    size: tuple     # the picture's
    resized: tuple  # it is resized to this
    start: tuple    # the left upper pixel of the part of it that is shown
    shown: tuple    # how large this part is
    mirrored: bool

    def pixels(self, img, resample):
        """The part of a PIL image, as large as the picture, that is shown."""
        scale = np.divide(self.size, self.resized)
        corners = self.start * scale, np.minimum(np.add(self.start, self.shown) * scale, self.size)
        img = img.resize(self.shown, resample, np.concatenate(corners).tolist())
        return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else img

    def boxes(self, boxes):
        """Boxes (k, 4) in the picture -> on the canvas, cut off where the picture is."""
        boxes = boxes.reshape(-1, 2, 2) * np.divide(self.resized, self.size) - self.start  # (k, 2 corners, x and y)
        boxes = boxes.clip(0, self.shown)
        if self.mirrored:
            boxes[:, :, 0] = self.shown[0] - boxes[:, ::-1, 0]
        return boxes.reshape(-1, 4)

    def scale(self, boxes):
        """Boxes, a tensor (k, 4), on the canvas of a whole picture -> in the picture, and beyond its edges."""
        return boxes * boxes.new_tensor(self.size * 2) / boxes.new_tensor(self.resized * 2)

    def back(self, boxes):
        """The same, cut off at the picture's edges."""
        return torch.minimum(self.scale(boxes).clamp(min=0), boxes.new_tensor(self.size * 2))


def place(size, side, jitter=(1.0, 1.0), rng=None):
    """The View of a picture (width, height) on a canvas of side x side: whole, or drawn by the generator `rng`."""
    scale = side / max(size) * (rng.uniform(*jitter) if rng else 1)
    resized = tuple(max(1, round(x * scale)) for x in size)
    shown = tuple(min(side, x) for x in resized)
    start = tuple(int(rng.integers(a - b + 1)) if rng else 0 for a, b in zip(resized, shown))
    return View(tuple(size), resized, start, shown, bool(rng and rng.random() < 0.5))


def to_canvas(img, view, side):
    """A PIL picture -> uint8 (3, S, S)."""
    canvas = Image.new("RGB", (side, side), PAD)
    canvas.paste(view.pixels(img, Image.Resampling.BILINEAR))
    return to_tensor(canvas)


def at_corners(masks):
    """Masks uint8 (M, S, S) -> their values (M, S, S) at the upper left corners of the pixels: the mean of the four
    pixels around. torchvision cuts from such values what a mask head learns; from pixels it is half a pixel off."""
    masks = F.pad(masks[:, None].half(), (1, 0, 1, 0), mode="replicate")
    return F.avg_pool2d(masks, 2, 1)[:, 0]


def paste_masks(masks, boxes, size):
    """Probabilities (k, m, m) on boxes (k, 4) of a picture -> bool (k, H, W), size = (W, H): at least 1/2 at a pixel's
    centre, interpolated between the centres of the mask's cells; outside of the mask is 0. Boxes may leave the picture.
    """
    out = torch.zeros(len(boxes), size[1], size[0], dtype=torch.bool, device=boxes.device)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
        right, bottom = min(math.ceil(x2), size[0]), min(math.ceil(y2), size[1])
        if x1 < x2 and y1 < y2 and left < right and top < bottom:
            x = (torch.arange(left, right, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
            y = (torch.arange(top, bottom, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]  # (1, h, w, 2)
            out[k, top:bottom, left:right] = F.grid_sample(masks[k][None, None], grid, align_corners=False)[0, 0] >= 0.5
    return out


def draw(img, found, names, least):
    """A copy of a PIL picture with the objects of a score of at least `least`: masks, boxes, names."""
    pixels, chosen = np.array(img), (found["scores"] >= least).nonzero().flatten().tolist()
    colour = {k: ImageColor.getrgb(COLOURS[found["labels"][k] % len(COLOURS)]) for k in chosen}
    for k in chosen if "masks" in found else ():
        inside = found["masks"][k].numpy()
        pixels[inside] = pixels[inside] // 2 + np.array(colour[k], np.uint8) // 2
    canvas = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(8, max(img.size) // 40))
    for k in reversed(chosen):  # the best on top
        box, text = found["boxes"][k].tolist(), f"{names[found['labels'][k] - 1]} {found['scores'][k]:.2f}"
        pen.rectangle(box, outline=colour[k], width=max(1, max(img.size) // 250))
        _, _, right, bottom = pen.textbbox((0, 0), text, font)
        at = max(0, min(box[0], img.width - right)), max(0, box[1] - bottom)  # above the box, where there is room
        pen.rectangle(pen.textbbox(at, text, font), fill=colour[k])
        pen.text(at, text, "white", font)
    return canvas


def side_by_side(pictures, height=256):
    """PIL pictures in a row, of one height."""
    pictures = [img.resize((max(1, round(img.width * height / img.height)), height)) for img in pictures]
    row, x = Image.new("RGB", (sum(img.width for img in pictures), height)), 0
    for img in pictures:
        row.paste(img, (x, 0))
        x += img.width
    return row
