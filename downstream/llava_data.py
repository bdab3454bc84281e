"""Conversations about pictures as batches for the model: tiles of pictures, the order of samples.

    data = Conversations(files, folder, prompter, looker, batch_size, seed, limit)
    sample = data[n]                                # the n-th of the whole run
    batch = collate([data[n] for n in numbers])     # what LLaVA takes, and what is to be counted

Data are LLaVA's: a JSON list of {"id", "image": path (or a list; left out: text alone), "conversations": [{"from":
"human" | "gpt", "value"}, ..]}, with one <image> in the human's turns for each picture.
"""
import json
import math
import os

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data import center_crop, load_image, to_tensor
from data import UserError as UnreadableImage
from downstream.llava_model import IGNORE, IMAGE, count_tokens
from downstream.llava_prompts import MARK, plain
from encoder import PIXEL_STATS, MissingFile, UserError, one_line

SIDES = range(1, 7)  # AnyRes: grids of 1x1 to 6x6 tiles


# ---- pictures ----

class Looker:
    """How pictures become tiles. llava["aspect"]: of a single picture, `crop` (its middle), `squash`, `pad` (with the
    mean colour) or `anyres`; several pictures of one sample are padded. vit: the encoder's configuration."""

    def __init__(self, llava, vit):
        self.aspect, self.size, self.cap = llava["aspect"], llava["size"], llava["cap"]
        self.side = self.size // vit.patch // llava["pool"]  # a tile has side x side tokens
        self.colour = tuple(int(255 * x) for x in PIXEL_STATS[vit.pixel_stats][0])

    def __call__(self, pictures):
        """PIL images -> uint8 tiles (T, 3, S, S), and a layout (tiles, grid, size, tokens) of each picture."""
        tiles, layouts = [], []
        for img in pictures:
            aspect, grid = self.aspect if len(pictures) == 1 else "pad", None
            if aspect == "crop":
                cut = [center_crop(img, self.size)]
            elif aspect == "pad":
                cut = [pad(img, (max(img.size),) * 2, self.colour).resize((self.size,) * 2, Image.Resampling.BICUBIC)]
            else:
                cut = [img.resize((self.size,) * 2, Image.Resampling.BICUBIC)]
                if aspect == "anyres":
                    grid = choose_grid(*img.size, self.size)
                    cut += cut_tiles(img, grid, self.size)
            tiles += map(to_tensor, cut)
            layout = len(cut), grid, img.size
            layouts.append((*layout, count_tokens(*layout, self.side, self.cap)))
        return torch.stack(tiles) if tiles else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), layouts


def pad(img, size, colour):
    """The picture in the middle of a canvas of `size` (W, H)."""
    canvas = Image.new("RGB", size, colour)
    canvas.paste(img, ((size[0] - img.width) // 2, (size[1] - img.height) // 2))
    return canvas


def choose_grid(W, H, unit):
    """AnyRes: the grid (rows, columns) in which most of the picture's own pixels fit, of these the least wasteful."""
    def fit(grid):
        h, w = grid[0] * unit, grid[1] * unit
        scale = min(w / W, h / H)
        effective = min(int(W * scale) * int(H * scale), W * H)
        return effective, effective - w * h
    return max(((rows, columns) for columns in SIDES for rows in SIDES), key=fit)  # the first of equal ones


def cut_tiles(img, grid, unit):
    """The picture resized into a grid of tiles, its ratio kept, on black; the tiles row by row."""
    h, w = grid[0] * unit, grid[1] * unit
    if w * img.height < h * img.width:
        size = w, min(math.ceil(img.height * (w / img.width)), h)
    else:
        size = min(math.ceil(img.width * (h / img.height)), w), h
    whole = pad(img.resize(size, Image.Resampling.BICUBIC), (w, h), (0, 0, 0))
    return [whole.crop((x, y, x + unit, y + unit)) for y in range(0, h, unit) for x in range(0, w, unit)]


def open_pictures(names, folder):
    """PIL images of files below a folder. UserError names one that is missing or cannot be read."""
    pictures = []
    for name in names:
        path = os.path.join(folder, name)
        try:
            pictures.append(load_image(path))
        except UnreadableImage as e:
            raise UserError(f"{path} {e}") from None
    return pictures


# ---- samples ----

def picture_names(sample):
    """The names of a sample's pictures, a list. None if "image" is neither a name, nor a list of names."""
    names = sample.get("image") or []
    names = [names] if isinstance(names, str) else names
    right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if right else None


def read_conversations(path):
    """The samples of a LLaVA JSON file: (pictures, a list of names; turns, a list of (question, answer))."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as e:
        raise MissingFile(f"--data {path} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"--data {path} is no JSON ({one_line(e)})") from None
    if not isinstance(found, list) or not found:
        raise UserError(f"--data {path} is no list of samples: see LLaVA's docs/Finetune_Custom_Data.md")
    for k, sample in enumerate(found):
        try:
            pictures = picture_names(sample)
            said = [(turn["from"], turn["value"] + "") for turn in sample["conversations"]]
            assert pictures is not None, "image is no path, nor a list of paths"
        except (AttributeError, KeyError, TypeError, AssertionError) as e:
            raise UserError(f"--data {path}, sample {k + 1} is not LLaVA's: {{\"image\": .., \"conversations\": "
                            f"[{{\"from\": .., \"value\": ..}}, ..]}} ({type(e).__name__}: {e})") from None
        name = f"--data {path}, sample {k + 1} (id {sample.get('id')})"
        said = said[1:] if said and said[0][0] == "gpt" else said  # some of ShareGPT's begin in the middle
        said = said[:len(said) // 2 * 2]  # a last question without an answer
        if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2) or not said:
            raise UserError(f"{name}: human and gpt do not take turns")
        marks = sum(text.count(MARK) for who, text in said if who == "human")
        if marks != len(pictures):
            raise UserError(f"{name} has {len(pictures)} pictures and {marks} {MARK} in its questions: one for each")
        yield pictures, [(said[n][1], said[n + 1][1]) for n in range(0, len(said), 2)]


class Conversations(Dataset):
    """The samples of several files, in a random order for each epoch. All of a global batch have pictures, or none has;
    sorted by length, they are dealt out to the ranks, so that all have as much to do at a time. Which samples the k-th
    batch has depends on (seed, k) and the batch size alone. The texts are kept as bytes, which workers share."""

    def __init__(self, files, folder, prompter, looker, batch_size, seed, limit, ranks=1):
        self.folder, self.prompter, self.looker, self.limit = folder, prompter, looker, limit
        self.batch_size, self.seed, self.ranks, self.order = batch_size, seed, ranks, (None, None)
        blobs, lengths, pictured = [], [], []
        for pictures, turns in (sample for path in files for sample in read_conversations(path)):
            if len(turns) > 1 and prompter.template is plain:
                raise UserError(f"sample {len(blobs) + 1} of --data has {len(turns)} questions, and the plain template "
                                "takes one with its answer: give captions, or another --template")
            blobs.append(json.dumps([pictures, turns]).encode())
            lengths.append(sum(len(text.split()) for turn in turns for text in turn))
            pictured.append(bool(pictures))
        self.blob, self.ends = b"".join(blobs), np.cumsum([len(x) for x in blobs])
        self.lengths, self.pictured = np.array(lengths), np.array(pictured)
        if len(self) < batch_size:
            raise UserError(f"--data has {len(self):,} samples, which make no batch of {batch_size}: give a smaller "
                            "--batch_size")

    def __len__(self):
        return len(self.ends)

    def read(self, i):
        """(names of pictures, turns) of sample i of the files."""
        return json.loads(self.blob[self.ends[i - 1] if i else 0:self.ends[i]])

    def index(self, n):
        """Sample number n of the run -> its number in the files."""
        epoch, k = divmod(n, len(self) // self.batch_size * self.batch_size)
        if self.order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.order = epoch, grouped_order(self.lengths, self.pictured, self.batch_size, self.ranks, rng)
        return int(self.order[1][k])

    def __getitem__(self, n):
        """{ids, labels, tiles, layouts, was_cut, unreadable}. Where a picture cannot be read, the next sample that has
        pictures takes the place, and `unreadable` names it."""
        i, unreadable = self.index(n), []
        for j in range(i, i + len(self)):
            names, turns = self.read(j % len(self))
            if bool(names) != self.pictured[i]:
                continue
            try:
                tiles, layouts = self.looker(open_pictures(names, self.folder))
                break
            except UserError as e:
                unreadable.append(str(e))
            if len(unreadable) == 100:
                raise UserError(f"100 pictures in a row cannot be read: is --images {self.folder} right? "
                                f"{unreadable[0]}")
        else:
            raise UserError(f"no picture of --data can be read: {unreadable[0]}")
        ids, labels, layouts, was_cut = expand(*self.prompter.sample(turns), layouts, self.limit)
        return dict(ids=ids, labels=labels, tiles=tiles, layouts=layouts, was_cut=was_cut, unreadable=unreadable)


def grouped_order(lengths, pictured, batch, ranks, rng):
    """Numbers of samples, as many as make whole batches. A batch is of one kind, but for those of the leftovers, and
    random otherwise. Sorted by length it is dealt out: a rank's share begins with the longest of its samples."""
    batches, rest = [], []
    for kind in True, False:
        mine = rng.permutation(np.flatnonzero(pictured == kind))
        whole = len(mine) // batch * batch
        batches += list(mine[:whole].reshape(-1, batch))
        rest.append(mine[whole:])
    rest = rng.permutation(np.concatenate(rest))
    batches += list(rest[:len(rest) // batch * batch].reshape(-1, batch))
    order = []
    for k in rng.permutation(len(batches)):
        longest_first = batches[k][np.argsort(-lengths[batches[k]], kind="stable")]
        order.append(longest_first.reshape(-1, ranks).T.flatten())
    return np.concatenate(order)


def expand(ids, labels, layouts, limit):
    """Repeat every IMAGE for each of its picture's tokens, and cut what is longer than `limit`: (ids, labels, layouts
    with the tokens that stay, whether it was cut), ids and labels as tensors."""
    counts, longer, targets = iter([layout[3] for layout in layouts]), [], []
    for i, label in zip(ids, labels):
        n = next(counts) if i == IMAGE else 1
        longer += [i] * n
        targets += [label] * n
    left, kept = longer[:limit].count(IMAGE), []
    for *layout, n in layouts:
        kept.append((*layout, min(n, left)))
        left -= kept[-1][3]
    return torch.tensor(longer[:limit]), torch.tensor(targets[:limit]), kept, len(longer) > limit


def collate(samples):
    """Samples -> ids (B, S), padded at the right; places (K,), after which some sample has a target, and these targets
    (B, K); tiles and layouts; how many tokens there are, and how many samples were cut; unreadable pictures."""
    pad = lambda key, value: torch.nn.utils.rnn.pad_sequence([x[key] for x in samples], True, value)
    labels, tiles = pad("labels", IGNORE)[:, 1:], torch.cat([x["tiles"] for x in samples])
    places = (labels != IGNORE).any(0).nonzero()[:, 0]
    if not len(tiles):  # see LLaVA.embed
        tiles = torch.zeros(1, *tiles.shape[1:], dtype=torch.uint8)
    return dict(ids=pad("ids", 0), places=places, targets=labels[:, places], tiles=tiles,
                layouts=sum([x["layouts"] for x in samples], []), tokens=sum(len(x["ids"]) for x in samples),
                cut=sum(x["was_cut"] for x in samples), unreadable=sum([x["unreadable"] for x in samples], []))
