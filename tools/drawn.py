"""Drawn pictures with the interface of data.ImageDataset, so that everything runs without data.

    data = ProceduralDataset(size=64, train=True, seed=0)
    img, label = data[n]          # uint8 (3, 64, 64) and the index of its kind in data.classes
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from data import to_tensor


class ProceduralDataset(Dataset):
    """Shapes, gradients, textures, letters: the label says which. Picture n depends on (seed, train, n) alone."""

    classes = ["shapes", "gradients", "textures", "letters"]

    def __init__(self, size, train, seed=0, length=10_000):
        self.size, self.train, self.seed, self.length = size, train, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        n = n if self.train else range(self.length)[n]  # IndexError beyond the last, as for ImageDataset
        rng = np.random.default_rng([self.seed, n, int(self.train)])
        label = int(rng.integers(4))
        return to_tensor(draw(rng, self.classes[label], self.size)), label


def draw(rng, kind, size):
    """A PIL picture of that kind (a name in ProceduralDataset.classes), drawn at twice its size, then shrunk to it."""
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
    else:  # a gradient, linear or radial; for shapes and letters it is the background
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
