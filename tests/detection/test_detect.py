"""downstream/detect.py, coco.py and canvas.py: geometry, data, AP, training, commands."""
from tests.helpers import (  # first: it sets the environment that torch reads when it is imported
    HERE, MICRO_VIT, close, killed_in_step, log_lines, raises, run, run_ranks, same_weights, tokenizer_file)

import contextlib
import io
import json
import math
import os
import re
import tempfile
import unittest.mock
import zipfile
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from data import UserError as BadData
from downstream import detect
from downstream.canvas import at_corners, paste_masks, place, to_canvas
from downstream.coco import CocoDetection, collate
from downstream.coco_eval import FIGURES, average_precision, to_results
from encoder import Encoder, UserError, ViT

RED, BLUE, GREY = (250, 20, 20), (20, 20, 250), (128, 128, 128)


def micro_detector(patch=4, size=64, prefix=1, depth=4, **options):
    """A Detector with random weights, on a micro ViT."""
    torch.manual_seed(0)
    vit = ViT(replace(MICRO_VIT, patch=patch, size=4 * patch, num_prefix=prefix, depth=depth))
    options = {"channels": 8, "masks": False, **options}
    return detect.Detector(Encoder(vit, 8), 3, size, **options).eval()


def runs_of(mask):
    """A mask (H, W) as COCO's runs that are not packed: lengths, by columns, of zeros first."""
    flat = mask.T.flatten().astype(int)
    starts = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], starts])).tolist()}


def shapes(folder, masks=True, n=4, layout="ours"):
    """Path of a data set of n pictures for each part: a red rectangle (category 3, a polygon) and a blue ellipse
    (category 90, runs) on grey; in picture 2 (train 102) nothing, in picture 3 a crowd besides."""
    for split, start in ("train", 100), ("val", 0):
        images, truth = {"ours": (f"{split}/images", f"{split}/instances.json"),
                         "coco": (f"{split}2017", f"annotations/instances_{split}2017.json")}[layout]
        for path in (images, os.path.dirname(truth)):
            os.makedirs(os.path.join(folder, path), exist_ok=True)
        pictures, annotations = [], []
        for k in range(n):
            rng, W, H = np.random.default_rng(k), 60 + 4 * k, 48 + 6 * (k % 3)
            img, number = Image.new("RGB", (W, H), GREY), start + k
            pictures.append({"id": number, "file_name": f"{k}.png", "width": W, "height": H})
            if k != 2:
                x, y, w, h = (int(v) for v in (*rng.integers(2, 8, 2), *rng.integers(16, 22, 2)))
                ImageDraw.Draw(img).rectangle((x, y, x + w - 1, y + h - 1), fill=RED)
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                ellipse = Image.new("L", (W, H))
                box = int(rng.integers(30, 36)), int(rng.integers(18, 24)), 24, 22
                corners = *box[:2], box[0] + box[2] - 1, box[1] + box[3] - 1
                ImageDraw.Draw(ellipse).ellipse(corners, fill=1)
                ImageDraw.Draw(img).ellipse(corners, fill=BLUE)
                for category, where, mask in (3, (x, y, w, h), [polygon]), (90, box, runs_of(np.array(ellipse))):
                    annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category,
                                        "bbox": list(where), "area": where[2] * where[3], "iscrowd": 0,
                                        **({"segmentation": mask} if masks else {"segmentation": []})})
            if k == 3:
                crowd = np.zeros((H, W), int)
                crowd[:, 40:] = 1
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 7, "iscrowd": 1,
                                    "bbox": [40, 0, W - 40, H], "area": int(crowd.sum()),
                                    "segmentation": runs_of(crowd) if masks else []})
            img.save(os.path.join(folder, images, f"{k}.png"))
        categories = [{"id": i, "name": name} for i, name in ((3, "rectangle"), (7, "nothing"), (90, "ellipse"))]
        json.dump({"images": pictures, "annotations": annotations, "categories": categories},
                  open(os.path.join(folder, truth), "w"))
    return folder


# ---- geometry ----

def test_features_of_a_ramp():
    """RoIAlign on maps of a linear ramp gives the ramp at the bins' centres, whatever the patch, at every level."""
    at = torch.arange(1024) + 0.5  # of the pixels' centres
    img = torch.stack([at.expand(1024, 1024), at[:, None].expand(1024, 1024), torch.zeros(1024, 1024)])[None] / 1024
    boxes = torch.tensor([[200, 300, 290, 390], [300, 410, 480, 570], [200, 150, 560, 500], [180.5, 220, 800, 850.25]])
    for patch in (14, 16, 8):
        model = micro_detector(patch, 1024, channels=3)
        model.backbone.features = lambda img, layers, grid: [F.avg_pool2d(img, patch)] * len(layers)
        s = model.stride
        assert s == {14: 16, 16: 16, 8: 8}[patch]
        resize = lambda x, k: (F.avg_pool2d(x, k // s) if k > s else
                               F.interpolate(x, scale_factor=s / k, mode="bilinear"))
        model.neck.forward = lambda maps: {str(i): resize(x, k) for i, (x, k) in enumerate(zip(maps, detect.STRIDES))}
        levels = model.pyramid(img)
        assert [x.shape[-1] for x in levels.values()] == [256, 128, 64, 32]
        for side in (7, 14):
            found = detect.RoIAlign(side)(levels, [boxes])
            bins = (torch.arange(side) + 0.5) / side
            x, y = (boxes[:, a, None] + bins * (boxes[:, a + 2] - boxes[:, a])[:, None] for a in (0, 1))
            assert (found[:, 0] * 1024 - x[:, None]).abs().max() < 0.02, patch
            assert (found[:, 1] * 1024 - y[:, :, None]).abs().max() < 0.02, patch


def test_boxes_go_to_the_level_of_their_size():
    """224 pixels belong to stride 16, half of that to 8, and so on; a box of the second picture reads its maps."""
    maps = {str(k): torch.tensor([10.0, 20.0])[:, None, None, None] * torch.ones(2, 1, 1024 // s, 1024 // s) + k
            for k, s in enumerate((4, 8, 16, 32))}
    sides = [20, 111, 113, 223, 225, 447, 449, 470]  # of the square of that area
    boxes = torch.tensor([[50.0, 50, 50 + 2 * s, 50 + s / 2] for s in sides])
    found = detect.RoIAlign(2)(maps, [boxes, boxes[:3]])
    assert found.mean((1, 2, 3)).tolist() == [10, 10, 11, 11, 12, 12, 13, 13, 20, 20, 21]


def test_anchors():
    """Their centres are the multiples of each level's stride, their areas (8 strides)^2, their shapes 1:2, 1:1, 2:1."""
    for patch in (14, 16):
        model = micro_detector(patch, 192)
        levels = model.pyramid(torch.rand(1, 3, 192, 192))
        assert [x.shape[-1] for x in levels.values()] == [48, 24, 12, 6, 3]
        anchors, = model.rpn.anchor_generator(ImageList(torch.zeros(1, 3, 192, 192), [(192, 192)]),
                                              list(levels.values()))
        parts = anchors.split([3 * (192 // s) ** 2 for s in (4, 8, 16, 32, 64)])
        for s, part in zip((4, 8, 16, 32, 64), parts):
            grid = torch.arange(192 // s) * s
            rows, columns = torch.meshgrid(grid, grid, indexing="ij")
            x1, y1, x2, y2 = part.view(-1, 3, 4).unbind(-1)
            assert torch.equal((x1 + x2) / 2, columns.flatten()[:, None].expand(-1, 3).float())
            assert torch.equal((y1 + y2) / 2, rows.flatten()[:, None].expand(-1, 3).float())
            assert ((x2 - x1) * (y2 - y1) / (8 * s) ** 2 - 1).abs().max() < 0.05
            assert (((y2 - y1) / (x2 - x1))[0] / torch.tensor([0.5, 1, 2]) - 1).abs().max() < 0.05


def test_the_pyramid_reads_its_subsets():
    """Level k of the paper's pyramid is built on the last block of subset k, and on those of the coarser levels."""
    for depth, expected in ((24, [5, 11, 17]), (27, [6, 13, 20]), (12, [2, 5, 8]), (4, [0, 1, 2])):
        assert micro_detector(depth=depth).layers == [*expected, None]
        assert micro_detector(depth=depth, neck="simple").layers == [None], "the last map, after the final norm"
    for patch in (14, 16, 8, 4):
        size, model = 128, micro_detector(patch, 128)
        seen = []
        plain = model.backbone.features
        model.backbone.features = lambda img, layers, grid: seen.append(img) or plain(img, layers, grid=grid)
        for neck in (model, micro_detector(patch, 128, neck="simple")):
            sides = {k: x.shape[1:] for k, x in neck.pyramid(torch.rand(1, 3, size, size)).items()}
            assert sides == {k: (8, size // s, size // s) for k, s in zip(["0", "1", "2", "3", "pool"],
                                                                         (4, 8, 16, 32, 64))}, (patch, sides)
        assert seen[0].shape[-1] == {14: 112}.get(patch, 128)
        maps = plain(seen[0], model.layers, grid=True)
        before = model.neck(maps)
        for k in range(4):
            other = [x + (torch.randn_like(x) if i == k else 0) for i, x in enumerate(maps)]
            changed = [not torch.equal(a, b) for a, b in zip(before.values(), model.neck(other).values())]
            assert changed == [*(j <= k for j in range(4)), k == 3], (k, changed)


def test_windows():
    """Attention in windows is attention under a mask; a window as large as the canvas changes nothing; the last block
    of each quarter sees everything."""
    torch.manual_seed(0)
    whole, windowed, plain = (micro_detector(window=w, prefix=2) for w in (16, 4, 0))
    img = torch.rand(2, 3, 64, 64)
    for a, b in zip(whole.backbone.features(img, range(4)), plain.backbone.features(img, range(4))):
        close(a, b, 1e-6)
    block, x = plain.backbone.vit.blocks[0], torch.randn(2, 64, 32)
    window = torch.arange(8).view(8, 1) // 4 * 2 + torch.arange(8) // 4  # number of the window of each token of 8 x 8
    mask = window.flatten()[:, None] == window.flatten()
    q, k, v = block.qkv(x).view(2, 64, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = block.proj((((q @ k.mT) / 4).masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
    close(detect.attend_in_windows(block.attention, 4, 0, x), expected, 1e-5)
    first = torch.randn(2, 3, 32)  # of three prefix tokens: the mean over the windows
    got = detect.attend_in_windows(block.attention, 4, 3, torch.cat([first, x], 1))
    by_window = [block.attention(torch.cat([first, x[:, window.flatten() == w]], 1)) for w in range(4)]
    close(got[:, :3], sum(part[:, :3] for part in by_window) / 4, 1e-5)
    close(got[:, 3:][:, window.flatten() == 2], by_window[2][:, 3:], 1e-5)
    blocks = micro_detector(depth=24, window=4).backbone.vit.blocks
    assert [i for i, b in enumerate(blocks) if "attention" not in vars(b)] == [5, 11, 17, 23]
    raises(UserError, lambda: micro_detector(window=5), words="--window 5 does not divide the 16 x 16 tokens of 64 px: "
           "try 4")
    raises(UserError, lambda: micro_detector(size=100), words="--size 100 is no multiple of 64, the coarsest stride: "
           "try 128")
    assert windowed.backbone.vit.state_dict().keys() == plain.backbone.vit.state_dict().keys()


def test_pixels_are_normalised_once():
    """The encoder gets the canvas's bytes as they are, in [0, 1]."""
    model, seen = micro_detector(), []
    plain = model.backbone.features
    model.backbone.features = lambda img, layers, grid: seen.append(img) or plain(img, layers, grid=grid)
    img = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        model.detect(img)
    assert torch.equal(seen[0], img.float() / 255)


def test_boxes_are_exact_in_bf16():
    """Heads that move no box give the anchors themselves as proposals, and those as objects."""
    model = micro_detector(16, 1024)
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        for module in model.rpn.head.bbox_pred, predictor.bbox_pred, predictor.cls_score:
            module.weight.zero_(), module.bias.zero_()
    model.roi_heads.nms_thresh = model.rpn.nms_thresh = 1.0
    img = torch.randint(0, 256, (1, 3, 1024, 1024), dtype=torch.uint8)
    seen, forward = [], model.roi_heads.forward
    model.roi_heads.forward = lambda levels, boxes, *rest: seen.append((levels, boxes)) or forward(levels, boxes, *rest)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.detect(img)[0][0]["boxes"]
    levels, proposals = seen[0]
    anchors, = model.rpn.anchor_generator(ImageList(img, [(1024, 1024)]), [x.float() for x in levels.values()])
    known = {tuple(box) for box in anchors.clamp(0, 1024).tolist()}
    assert found.dtype == torch.float32 and len(found) == 100
    off = [box for box in [*proposals[0].tolist(), *found.tolist()]
           if tuple(box) not in known and not any(np.abs(np.subtract(box, x)).max() < 0.01 for x in known)]
    assert not off, off[:3]


def test_canvas_and_back():
    """By hand: a picture of 80 x 40 on a canvas of 64: at 0.8, 64 x 32, in the upper left corner."""
    view = place((80, 40), 64)
    assert (view.resized, view.start, view.shown, view.mirrored) == ((64, 32), (0, 0), (64, 32), False)
    close(torch.tensor(view.boxes(np.array([[10.0, 20, 40, 30]]))), torch.tensor([[8.0, 16, 32, 24]]).double())
    back = view.back(torch.tensor([[8.0, 16, 32, 24], [-3, 8, 70, 40]]))
    close(back, torch.tensor([[10.0, 20, 40, 30], [0, 10, 80, 40]]))
    close(view.scale(torch.tensor([[-3.0, 8, 70, 40]])), torch.tensor([[-3.75, 10, 87.5, 50]]))
    assert place((3000, 1), 64).resized == (64, 1)
    img = Image.new("RGB", (80, 40), RED)
    canvas = to_canvas(img, view, 64)
    assert (canvas[:, :32] == torch.tensor(RED)[:, None, None]).all()
    assert (canvas[:, 32:] == torch.tensor([124, 116, 104])[:, None, None]).all()
    rng = np.random.default_rng(0)
    views = [place((80, 40), 64, (0.5, 2.0), rng) for _ in range(300)]
    widths = np.array([v.resized[0] for v in views]) / 64
    assert widths.min() < 0.53 and widths.max() > 1.96 and 0.4 < np.mean([v.mirrored for v in views]) < 0.6
    large = [v for v in views if v.resized[0] > 100]
    assert {v.shown[0] for v in large} == {64} and min(v.start[0] for v in large) < 4
    assert max(v.start[0] + 64 - v.resized[0] for v in large) > -4, "all parts of it are shown at times"


def test_pasted_masks():
    """A full mask fills the pixels whose centres are in the box; of one that is full on its left half, half of it."""
    boxes = torch.tensor([[2.3, 1.6, 9.4, 7.4], [0.0, 0.0, 12.0, 8.0], [5.0, 5.0, 5.0, 8.0]])
    left = torch.ones(28, 28)
    left[:, 14:] = 0
    found = paste_masks(torch.stack([torch.ones(28, 28), left, left]), boxes, (12, 8))
    x, y = torch.arange(12) + 0.5, torch.arange(8)[:, None] + 0.5
    assert torch.equal(found[0], (x > 2.3) & (x < 9.4) & (y > 1.6) & (y < 7.4))
    assert torch.equal(found[1], (x < 6).expand(8, 12)) and not found[2].any()
    two = torch.tensor([[[0.9, 0.3], [0.9, 0.3]]])  # at x = 2 and 6 of 0 .. 8, so 0.5 is at x = 4.67
    inside = paste_masks(two, torch.tensor([[0.0, 0, 8, 8]]), (8, 8))[0, 4]
    assert inside.tolist() == [x + 0.5 < 4.67 and 0.9 * min(1, (x + 2.5) / 4) >= 0.5 for x in range(8)]
    beside = torch.tensor([[-4.0, -4, 4, 4], [20, 2, 30, 6], [2, 9, 6, 14]])  # boxes of the canvas may lie there
    found = paste_masks(torch.ones(3, 28, 28), beside, (12, 8))
    assert torch.equal(found[0], (x < 4) & (y < 4)) and not found[1:].any()
    assert found.shape == (3, 8, 12) and paste_masks(torch.rand(0, 28, 28), boxes[:0], (12, 8)).shape == (0, 8, 12)


# ---- data ----

def seen_by_colour(img, colour):
    """Where a canvas has about that colour: bool (S, S)."""
    return (img.float() - torch.tensor(colour)[:, None, None].float()).abs().amax(0) < 60


def test_augmentation_moves_all_together():
    """Boxes and masks are where the coloured shapes are, in every random view."""
    for masks in (True, False):
        with tempfile.TemporaryDirectory() as tmp:
            data = CocoDetection(shapes(tmp, masks), "train", 96, True, seed=1, jitter=(0.5, 2.0))
            few = 0
            for n in range(60):
                img, boxes, labels, *rest = data[n]
                assert img.shape == (3, 96, 96) and img.dtype == torch.uint8 and set(labels.tolist()) <= {1, 3}
                for k, (box, label) in enumerate(zip(boxes, labels.tolist())):
                    where = seen_by_colour(img, {1: RED, 3: BLUE}[label])
                    if where.sum() < 150:
                        continue
                    few += 1
                    rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
                    around = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                    # a round shape that is cut off is smaller than what is left of its box
                    cut = not masks and label == 3 and (box.min() == 0 or box.max() > 90)
                    assert (around - box).abs().max() <= (30 if cut else 2.01), (n, around, box)
                    if masks:
                        mask = rest[0][k].bool()
                        assert rest[0].dtype == torch.uint8 and rest[0].shape == (len(boxes), 96, 96)
                        assert (mask & where).sum() / (mask | where).sum() > 0.85, n
            assert few > 50
            again = data[7]
            assert all(torch.equal(a, b) for a, b in zip(again, data[7])) and len(data) == 3
            other = next(n for n in range(9, 12) if data.index(n) == data.index(7))
            assert not torch.equal(again[0], data[other][0]), "each epoch shows another view of a picture"
            other = CocoDetection(tmp, "train", 96, True, seed=2, jitter=(0.5, 2.0))[7]
            assert not torch.equal(again[0], other[0])


def test_what_is_trained_on():
    """No crowd region and no empty picture in training; in testing every picture. A batch is what collate says."""
    with tempfile.TemporaryDirectory() as tmp:
        train, val = (CocoDetection(shapes(tmp), part, 64, part == "train", jitter=(1, 1)) for part in ("train", "val"))
        assert train.image_ids == [100, 101, 103] and len(train.boxes) == 6 and len(val) == 4
        assert list(val.categories) == ["rectangle", "nothing", "ellipse"] and list(val.category_ids) == [3, 7, 90]
        img, i = val[2]
        assert i == 2 and val.path(2).endswith("val/images/2.png") and train.path(2).endswith("train/images/3.png")
        img, boxes, labels, counts, masks = collate([train[0], train[1]])
        assert img.shape == (2, 3, 64, 64) and boxes.shape == (4, 4) and labels.tolist() == [1, 3, 1, 3]
        assert counts.tolist() == [2, 2] and masks.shape == (4, 64, 64)
        order = [train.index(n) for n in range(6)]
        assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2], "each picture once an epoch"


def test_layouts():
    """A folder, an archive of it and COCO's own folders give the same samples."""
    with tempfile.TemporaryDirectory() as tmp:
        ours, coco = (shapes(os.path.join(tmp, layout), layout=layout) for layout in ("ours", "coco"))
        archive = os.path.join(tmp, "ours.zip")
        with zipfile.ZipFile(archive, "w") as z:
            for folder, _, names in os.walk(ours):
                for name in names:
                    z.write(os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), ours))
        for n in (0, 4):
            first, *others = (CocoDetection(root, "train", 64, True)[n] for root in (ours, coco, archive))
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_annotations_that_do_not_fit():
    """Each is refused in one line that names the file, the annotation and the numbers."""
    def refuses(words, change, split="train", masks=True):
        with tempfile.TemporaryDirectory() as tmp:
            path = os.path.join(shapes(tmp, masks), split, "instances.json")
            content = json.load(open(path))
            change(content, tmp)
            json.dump(content, open(path, "w"))

            def use():
                data = CocoDetection(tmp, split, 64, split == "train")
                return [data[n] for n in range(len(data))]
            try:
                use()
            except BadData as e:
                assert all(w in str(e) for w in words) and "\n" not in str(e), (words, str(e))
                return
            raise AssertionError(f"{words}: accepted")
    at = lambda k, **changes: lambda content, tmp: content["annotations"][k].update(changes)
    for box in ([50, 10, 20, 10], [-5, 0, 10, 10], [0, 40, 10, 20], [0, 0, -1, 5], [0, 0, math.nan, 5]):
        refuses(["instances.json: annotation 1 has the box", "outside of its picture of 60x48"], at(0, bbox=box))
    refuses(["annotation 2 has the category_id 4, which the file does not list"], at(1, category_id=4))
    refuses(["annotation 2 has the image_id 9, which the file does not list"], at(1, image_id=9))
    for mask in ({"size": [40, 60], "counts": [0, 2400]}, {"size": [48, 60], "counts": [0, 2400]},
                 {"size": [48, 60], "counts": [100, -100, 2880]}, {"size": [60, 48], "counts": "abc"}):
        refuses([f"annotation 2 has a mask of {mask['size']} (height, width), or", "its picture is 60x48"],
                at(1, segmentation=mask))
    refuses(["annotation 1 has a polygon of less than three points"], at(0, segmentation=[[1, 2, 3, 4]]))
    refuses(["annotation 4 has no mask, but others have"], at(3, segmentation=[]))
    refuses(["images/1.png is not there (1 of 3 pictures are missing)"],
            lambda content, tmp: os.remove(os.path.join(tmp, "train", "images", "1.png")))
    refuses(["images/3.png is not there (1 of 4 pictures"],
            lambda content, tmp: os.remove(os.path.join(tmp, "val", "images", "3.png")), "val")
    refuses(["images/0.png: is 60x48, but", "says 61x48"], lambda content, tmp: content["images"][0].update(width=61),
            masks=False)
    refuses(["images/0.png: cannot be read as an image"],
            lambda content, tmp: open(os.path.join(tmp, "train", "images", "0.png"), "wb").write(b"no picture"))
    refuses(["two categories or two pictures have one id"], lambda content, tmp: content["categories"][1].update(id=3))
    refuses(["is not in COCO's format (KeyError: 'bbox')"], lambda content, tmp: content["annotations"][0].pop("bbox"))
    refuses(["is not in COCO's format (ValueError"], at(0, bbox=[1, 2, 3]))
    for key in "area", "iscrowd":  # pycocotools would fail at the first evaluation
        refuses(["annotation 2 lacks area or iscrowd"], lambda content, tmp: content["annotations"][1].pop(key), "val")
    refuses(["is not in COCO's format"], at(0, segmentation=[5, 6, 7]))
    refuses(["no box to train on"], lambda content, tmp: content["annotations"].clear())
    with tempfile.TemporaryDirectory() as tmp:
        shapes(tmp)
        raises(BadData, CocoDetection, tmp, "test", 64, False, words="has no part test: neither test/instances.json "
               "nor annotations/instances_test2017.json")
        raises(BadData, CocoDetection, tmp + "x", "val", 64, False, words="no such folder or .zip archive")
        open(os.path.join(tmp, "val", "instances.json"), "w").write("{")
        raises(BadData, CocoDetection, tmp, "val", 64, False, words="instances.json cannot be read as JSON")
        slightly = shapes(os.path.join(tmp, "slightly"))
        path = os.path.join(slightly, "train", "instances.json")
        content = json.load(open(path))
        content["annotations"][0].update(bbox=[-0.5, 0, 10, 10], segmentation=[[0, 0, 9, 0, 9, 9]])
        content["annotations"][1].update(bbox=[5, 5, 0, 10])
        json.dump(content, open(path, "w"))
        data = CocoDetection(slightly, "train", 64, True)
        assert data.boxes[0].tolist() == [0, 0, 9.5, 10] and len(data.boxes) == 5, "cut off; without area: left out"


# ---- AP ----

def objects(*rows, masks=None):
    """What Detector.find gives: rows of (box x1 y1 x2 y2, label, score)."""
    found = {"boxes": torch.tensor([r[0] for r in rows], dtype=torch.float32).view(-1, 4),
             "labels": torch.tensor([r[1] for r in rows], dtype=torch.long),
             "scores": torch.tensor([r[2] for r in rows], dtype=torch.float32)}
    return {**found, **({"masks": masks} if masks is not None else {})}


def test_average_precision_by_hand():
    """Three objects, in order of score a hit, a miss, a hit of IoU 0.82; one is not found. With the hit precision is 1
    up to recall 1/3 (34 of 101 points) and 2/3 up to 2/3 (33 points); from IoU 0.85 on there is the first alone."""
    boxes = {1: [[10, 10, 110, 110], [200, 50, 300, 150]], 2: [[20, 20, 120, 120]], 5: []}
    content = {"images": [{"id": k, "width": 400, "height": 200} for k in boxes],
               "categories": [{"id": 13, "name": "a"}, {"id": 90, "name": "b"}], "annotations": []}
    for k, rows in boxes.items():
        for x1, y1, x2, y2 in rows:
            content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": k, "category_id": 90,
                                           "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 10_000, "iscrowd": 0,
                                           "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]})
    rows = {1: [([10, 10, 110, 110], 2, 0.9), ([200, 50, 300, 132], 2, 0.7)], 2: [([220, 20, 320, 120], 2, 0.8)], 5: []}
    results = []
    for k, found in rows.items():
        masks = torch.zeros(len(found), 200, 400, dtype=torch.bool)
        for mask, ((x1, y1, x2, y2), *_) in zip(masks, found):
            mask[y1:y2, x1:x2] = True
        results += to_results(objects(*found, masks=masks), k, [13, 90])
    results = json.loads(json.dumps(results))
    both, one = 100 * (34 + 33 * 2 / 3) / 101, 100 * 34 / 101
    assert [x["category_id"] for x in results] == [90] * 3 and results[1]["bbox"] == [200, 50, 100, 82]
    for kind in ("bbox", "segm"):
        found = average_precision(content, results, kind)
        assert found["APs"] is None and found["APm"] is None, "there are no such objects"
        expected = dict(AP=(7 * both + 3 * one) / 10, AP50=both, AP75=both, APl=(7 * both + 3 * one) / 10)
        assert all(abs(found[k] - x) < 1e-9 for k, x in expected.items()), (kind, found, expected)
    assert average_precision(content, [], "bbox")["AP"] == 0, "nothing is found"
    from_zero = dict(content, annotations=[dict(a, id=a["id"] - 1) for a in content["annotations"]])
    assert average_precision(from_zero, results, "bbox") == average_precision(content, results, "bbox")


def test_masks_are_small_by_their_own_area():
    """A miss of a thin mask of 400 pixels in a box of 50 x 50 counts among the small: precision 1/2 there."""
    content = {"images": [{"id": 1, "width": 200, "height": 200}], "categories": [{"id": 1, "name": "a"}],
               "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400,
                                "iscrowd": 0, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}]}
    masks = torch.zeros(2, 200, 200, dtype=torch.bool)
    masks[0, 100:108, 100:150] = True
    masks[1, 10:30, 10:30] = True
    found = objects(([100, 100, 150, 150], 1, 0.9), ([10, 10, 30, 30], 1, 0.8), masks=masks)
    assert abs(average_precision(content, to_results(found, 1, [1]), "segm")["APs"] - 50) < 1e-9


# ---- the model ----

def test_losses_of_pictures_without_objects():
    """They are finite, teach what is no object, and no masks; every parameter that is trained gets a gradient."""
    for neck in ("fpn", "simple"):
        model = micro_detector(masks=True, neck=neck).train()
        img = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.tensor([0, 0]), torch.zeros(
            0, 64, 64, dtype=torch.uint8)
        losses = model(img, *nothing)
        assert all(x.isfinite() for x in losses.values()) and losses["loss_mask"] == losses["loss_box_reg"] == 0
        assert losses["loss_objectness"] > 0.5
        sum(losses.values()).backward()
        without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, without
        assert not any(p.requires_grad for p in model.backbone.latent_down.parameters())


def test_targets_belong_to_their_pictures():
    """The losses of a batch of two are those of torchvision's parts on each picture's own boxes, labels and masks."""
    model = micro_detector(masks=True).train()
    seen = []
    model.detect = lambda img, targets: seen.append(targets) or (None, {})
    boxes, masks = torch.rand(3, 4), torch.randint(0, 2, (3, 64, 64), dtype=torch.uint8)
    model(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), boxes, torch.tensor([1, 2, 3]), torch.tensor([1, 0, 2]), masks)
    assert [t["labels"].tolist() for t in seen[0]] == [[1], [], [2, 3]]
    assert torch.equal(seen[0][2]["boxes"], boxes[1:]) and torch.equal(seen[0][2]["masks"], at_corners(masks)[1:])
    model(torch.zeros(3, 3, 64, 64, dtype=torch.uint8), boxes, torch.tensor([1, 2, 3]), torch.tensor([1, 0, 2]))
    assert "masks" not in seen[1][0]


def test_masks_are_taught_where_they_lie():
    """What torchvision cuts from a batch's masks to learn, pasted on the same boxes, is these masks again: round and
    straight ones, also at the edges. Of masks as they are it would be shifted by half a pixel."""
    assert at_corners(torch.tensor([[[1, 0], [0, 0]]], dtype=torch.uint8)).tolist() == [[[1, 0.5], [0.5, 0.25]]]
    x, y = torch.arange(64) + 0.5, torch.arange(64)[:, None] + 0.5
    masks = torch.stack([(x - 30) ** 2 + (y - 26) ** 2 < 144, (x > 20) & (x < 45) & (y > 10) & (y < 30),
                         (x < 9) & (y < 20), (x > 50) & (y > 40)])
    boxes = torch.tensor([[18.0, 14, 42, 38], [20, 10, 45, 30], [0, 0, 9, 20], [50, 40, 64, 64]])
    model, seen = micro_detector(masks=True).train(), []
    model.detect = lambda img, targets: seen.append(targets) or (None, {})
    model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), boxes, torch.ones(4).long(), torch.tensor([1, 3]), masks.byte())
    for target, expected in zip(seen[0], masks.split([1, 3])):
        taught = project_masks_on_boxes(target["masks"], target["boxes"], torch.arange(len(expected)), 28)
        assert taught.dtype == torch.float32 and torch.equal(paste_masks(taught, target["boxes"], (64, 64)), expected)


def test_objects_are_in_the_pictures_own_pixels():
    """What the heads find on the canvas comes back scaled to each picture, cut off at its edges, from `least` on."""
    model = micro_detector(masks=True)
    found = {"boxes": torch.tensor([[8.0, 16, 32, 24], [0, 0, 64, 64]]), "labels": torch.tensor([2, 1]),
             "scores": torch.tensor([0.9, 0.3]), "masks": torch.ones(2, 1, 28, 28)}
    model.detect = lambda img: ([{k: v.clone() for k, v in found.items()} for _ in img], {})
    one, two = model.find(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [place((80, 40), 64), place((32, 64), 64)])
    assert one["boxes"].tolist() == [[10, 20, 40, 30], [0, 0, 80, 40]] and one["masks"].shape == (2, 40, 80)
    assert two["boxes"].tolist() == [[8, 16, 32, 24], [0, 0, 32, 64]] and two["masks"][1].all()
    assert one["masks"][0].sum() == 300 and one["labels"].tolist() == [2, 1]
    found["masks"][1, :, 14:] = 0  # the upper half of a box, of which the lower half lies beside the first picture
    one, two = model.find(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [place((80, 40), 64), place((32, 64), 64)])
    assert one["masks"][1, 5:, 5:75].all() and two["masks"][1, 5:30, 5:].all() and not two["masks"][1, 34:].any()
    best, = model.find(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [place((80, 40), 64)], 0.5)
    assert best["labels"].tolist() == [2] and len(best["masks"]) == len(best["boxes"]) == 1


# ---- training and commands ----

def quietly(*flags):
    """What downstream.detect prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        detect.main(list(map(str, flags)))
    return out.getvalue()


def training(folder, out, *flags):
    """Flags of a short training on shapes."""
    data = os.path.join(folder, "data")
    if not os.path.exists(data):
        shapes(data)
    return ["train", "--data", data, "--weights", tokenizer_file(folder), "--size", 64, "--channels", 8, "--batch_size",
            2, "--workers", 0, "--lr", 2e-3, "--warmup", 5, "--weight_decay", 0.01, "--layer_decay", 1, "--drop_path",
            0, "--jitter", 0.8, 1.2, "--log_every", 1, "--eval_every", 0, "--out", os.path.join(folder, out), *flags]


def test_training_resumes_exactly():
    """Killed after step 3, saved after step 2: the same weights and the same log as without, bit for bit."""
    with tempfile.TemporaryDirectory() as tmp:
        more = ["--steps", 4, "--save_every", 2, "--drop_path", 0.5, "--layer_decay", 0.7, "--window", 4]
        quietly(*training(tmp, "whole", *more))
        with killed_in_step(detect.finetune, 4):
            quietly(*training(tmp, "killed", *more))
        assert torch.load(os.path.join(tmp, "killed", "state.pt"))["step"] == 2
        quietly(*training(tmp, "killed", *more))
        whole, killed = (os.path.join(tmp, name) for name in ("whole", "killed"))
        assert same_weights(*(os.path.join(x, "model.safetensors") for x in (whole, killed)))
        assert log_lines(whole) == log_lines(killed) and len(log_lines(whole)) == 5
        last = log_lines(whole)[-1]
        assert last["kind"] == "eval" and {"box_AP", "box_AP50", "mask_AP", "mask_APs"} <= last.keys()
        with Image.open(os.path.join(whole, "samples", "step_0000004.png")) as img:
            assert img.height == 256 and img.width > 3 * 256, "four pictures"


def test_two_ranks_are_one():
    """Where torchvision samples no boxes at random, two ranks train as one does, and measure the same."""
    with tempfile.TemporaryDirectory() as tmp:
        script = os.path.join(tmp, "ordered.py")
        open(script, "w").write(f"import sys, torch\nsys.path.insert(0, {HERE!r})\nfrom downstream import detect\n"
                                "torch.randperm = lambda n, device=None: torch.arange(n, device=device)\n"
                                "detect.command_line(detect.main, 'downstream.detect')\n")
        more = "--steps", 2, "--micro_batch", 1
        one = run("python", script, *training(tmp, "one", *more))
        two = run_ranks(2, "python", script, *training(tmp, "two", *more))
        assert one.returncode == 0 and [x.returncode for x in two] == [0, 0], one.stderr + two[0].stderr + two[1].stderr
        a, b = (log_lines(os.path.join(tmp, name)) for name in ("one", "two"))
        for x, y in zip(a, b):
            assert all(x[k] == y[k] or abs(x[k] - y[k]) < 1e-4 * abs(x[k]) + 1e-6 for k in x), (x, y)
        state = [torch.load(os.path.join(tmp, name, "state.pt"))["model"] for name in ("one", "two")]
        for k, x in state[0].items():
            assert (x - state[1][k]).norm() <= 1e-4 * x.norm() + 1e-6, k


def test_commands():
    """train learns two shapes; test gives pycocotools' own figures of the file that it writes; predict draws."""
    with tempfile.TemporaryDirectory() as tmp:
        said = quietly(*training(tmp, "run", "--steps", 45, "--lr", 4e-3, "--channels", 16))
        assert "Detector of" in said and "box_AP50" in said
        folder, results, report = (os.path.join(tmp, name) for name in ("run", "found.json", "report.json"))
        truth = os.path.join(tmp, "data", "val", "instances.json")
        flags = "test", "--run", folder, "--data", os.path.join(tmp, "data"), "--workers", 0
        said = quietly(*flags, "--results", results, "--out", report, "--batch_size", 3)
        found = json.load(open(report))["results"]
        assert found["box_AP50"] > 30 and found["mask_AP50"] > 30, found
        last = log_lines(folder)[-1]
        assert all(abs(last[k] - x) < 1e-6 for k, x in found.items() if x is not None), "as training has measured"
        rows = {}
        for name, kind in ("box", "bbox"), ("mask", "segm"):
            with contextlib.redirect_stdout(io.StringIO()):
                coco = COCO(truth)
                content = json.load(open(results))
                if kind == "segm":
                    [x.pop("bbox") for x in content]
                scored = COCOeval(coco, coco.loadRes(content), kind)
                scored.evaluate(), scored.accumulate(), scored.summarize()
            rows[name] = [100 * x if x >= 0 else None for x in scored.stats[:6]]
            assert [found[f"{name}_{k}"] for k in FIGURES] == rows[name], kind
            printed = next(line for line in said.splitlines() if line.startswith(name)).split()[1:]
            assert printed == ["-" if x is None else f"{x:.2f}" for x in rows[name]], said
        with unittest.mock.patch.object(detect, "find_all", None):  # before the work
            for name, path, *more in (("--results", truth), ("--out", truth), ("--out", report, "--results", report)):
                kept = open(path).read()
                raises(UserError, quietly, *flags, name, path, *more, words=f"{path} would be read and overwritten")
                assert open(path).read() == kept
            raises(UserError, quietly, *flags, "--results", folder, words=f"{folder} is a folder: give the name of a")
        raises(UserError, quietly, "predict", "--run", folder, "--out", report, f"{tmp}/data/val/images", words=(
            f"{report}", "cannot be made a folder, because a file is in its place"))
        two = run_ranks(2, "python", "-m", "downstream.detect", *flags, "--results", results + "2")
        assert [x.returncode for x in two] == [0, 0], two[0].stderr
        one, two = (json.load(open(path)) for path in (results, results + "2"))
        assert [x["image_id"] for x in one] == [x["image_id"] for x in two] == sorted(x["image_id"] for x in one)
        assert max(abs(x["score"] - y["score"]) for x, y in zip(one, two)) < 1e-4
        train = quietly(*flags, "--split", "train")
        assert "4" in next(line for line in train.splitlines() if line.startswith("images")), train
        picture = os.path.join(tmp, "data", "val", "images", "0.png")
        out = os.path.join(tmp, "drawn")
        said = quietly("predict", "--run", folder, "--out", out, "--score", 0.1, picture)
        assert "0_objects.png: " in said and "rectangle 0." in said and "ellipse 0." in said, said
        drawn, plain = (np.array(Image.open(path)) for path in (os.path.join(out, "0_objects.png"), picture))
        assert drawn.shape == plain.shape and (drawn != plain).any()
        assert "nothing" in quietly("predict", "--run", folder, "--out", out, "--score", 1, picture)
        said = quietly("predict", "--run", folder, os.path.dirname(picture))
        assert said.startswith(os.path.join(tmp, "data", "val", "images_objects", "0_objects.png: ")), said
        damaged = os.path.join(tmp, "damaged.png")
        open(damaged, "wb").write(b"no picture")
        done = run("python", "-m", "downstream.detect", "predict", "--run", folder, damaged)
        assert done.returncode == 2 and f"{damaged} cannot be read as an image" in done.stderr, done.stderr
        content = json.load(open(truth))
        content["categories"][1]["name"] = "something"
        json.dump(content, open(truth, "w"))
        raises(UserError, quietly, *flags, words="has other categories than")


def test_without_masks():
    """Data of boxes alone make a detector of boxes alone."""
    with tempfile.TemporaryDirectory() as tmp:
        shapes(os.path.join(tmp, "data"), masks=False)
        quietly(*training(tmp, "run", "--steps", 1))
        first, last = log_lines(os.path.join(tmp, "run"))
        assert "loss_mask" not in first and "loss_box_reg" in first and "mask_AP" not in last and "box_AP" in last
        with Image.open(os.path.join(tmp, "run", "samples", "step_0000001.png")) as img:
            assert img.height == 256
        said = quietly("test", "--run", os.path.join(tmp, "run"), "--data", os.path.join(tmp, "data"), "--workers", 0)
        assert "box " in said and "mask" not in said.split("protocol")[1].split("\n", 1)[1], said


def test_nothing_else_needs_torchvision():
    """So the other tests run beside a torch that it was not built for."""
    needs = []
    for folder, folders, names in os.walk(HERE):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in [os.path.join(folder, name) for name in names if name.endswith(".py")]:
            if re.search(r"^ *(import|from) torchvision", open(path).read(), re.M):
                needs.append(os.path.relpath(path, HERE))
    assert sorted(needs) == ["downstream/detect.py", "tests/detection/test_detect.py"], needs


def test_defaults_and_refusals():
    """The recipe is ViTDet's of ViT-L; the other defaults by hand."""
    args = detect.parse_args(["train", "--data", "coco", "--teacher", "internvit"])
    expected = dict(size=1024, neck="fpn", window=0, channels=256, jitter=[0.1, 2.0], epochs=100, batch_size=64,
                    lr=1e-4, weight_decay=0.1, layer_decay=0.8, drop_path=0.4, warmup=250, lr_decay=0.11, frozen=False,
                    eval_every=10_000, seed=0)
    assert {k: getattr(args, k) for k in expected} == expected
    args = detect.parse_args(["test", "--run", "x", "--data", "y"])
    assert (args.split, args.bf16, args.results, args.out, args.batch_size) == ("val", False, None, None, 8)
    assert detect.parse_args(["predict", "--run", "x", "y"]).score == 0.5
    assert detect.parse_args(["bench"]).batch_size == [4, 8]
    for wrong, words in (["--jitter", "2", "1"], "the smaller first"), (["--size", "32"], "at least 64"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            raises(SystemExit, detect.parse_args, ["train", "--data", "x", "--weights", "y", *wrong], words="2")
        assert words in said.getvalue()
    said = quietly("bench", "--teacher", "tiny", "--size", 64, "--channels", 4, "--batch_size", 1, 2)
    assert "batch 1 | " in said and "batch 2 | " in said and "hours for 100 epochs of COCO" in said
