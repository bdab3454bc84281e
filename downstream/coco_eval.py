"""What a detector finds in a data set, in COCO's format, and its AP, which is pycocotools'.

    results, figures = find_all(model, data, batch_size=8, workers=4, bf16=False)     # a Detector, a CocoDetection
    average_precision(json.load(file), results, "bbox")
"""
import contextlib
import io

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from downstream.canvas import draw, place, side_by_side
from tools.script import ignore_signals

FIGURES = "AP AP50 AP75 APs APm APl".split()  # the first of COCOeval.stats


def to_results(found, picture, category_ids):
    """What a Detector has found in the picture of that id -> a list of results in COCO's format."""
    from pycocotools import mask as runs

    results = []
    for k, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
        results.append(dict(image_id=picture, category_id=category_ids[found["labels"][k] - 1],
                            bbox=[x1, y1, x2 - x1, y2 - y1], score=found["scores"][k].item()))
        if "masks" in found:
            mask = runs.encode(np.asfortranarray(found["masks"][k].numpy().view(np.uint8)))
            results[-1]["segmentation"] = dict(mask, counts=mask["counts"].decode())
    return results


def average_precision(content, results, kind):
    """{"AP": .., "AP50": .., ..} in percent of results against what an instances.json holds, None where there is
    nothing to find. kind: "bbox" or "segm"."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # by masks without boxes, as else pycocotools takes the boxes' area to tell small from large
    results = [{k: v for k, v in x.items() if kind == "bbox" or k != "bbox"} for x in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        # COCOeval changes what it is given, and does not count an object whose id is 0 as found
        truth.dataset = dict(content, annotations=[dict(a, id=k) for k, a in enumerate(content["annotations"], 1)])
        found.dataset = dict(content, annotations=[])
        truth.createIndex(), found.createIndex()
        scored = COCOeval(truth, truth.loadRes(results) if results else found, kind)
        scored.evaluate(), scored.accumulate(), scored.summarize()
    return {k: 100 * x if x >= 0 else None for k, x in zip(FIGURES, scored.stats.tolist())}


def find_all(model, data, batch_size, workers, bf16):
    """(results in COCO's format of all pictures, {"box_AP": .., "mask_AP": .., ..}). Ranks share the work."""
    device = next(model.parameters()).device
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, parts = [], [None] * ranks
    loader = DataLoader(Subset(data, range(rank, len(data), ranks)), batch_size, num_workers=workers,
                        worker_init_fn=ignore_signals)
    for img, numbers in tqdm(loader, "find", disable=None if rank == 0 else True, leave=False):
        views = [place(data.sizes[i], data.side) for i in numbers]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = model.find(img.to(device), views)
        mine += [(i, to_results(x, data.image_ids[i], data.category_ids)) for i, x in zip(numbers.tolist(), found)]
    if ranks > 1:
        dist.all_gather_object(parts, mine)
        mine = sorted(sum(parts, []), key=lambda x: x[0])
    results, content, figures = [x for _, found in mine for x in found], data.content(), {}
    for name, kind in ("box", "bbox"), ("mask", "segm"):
        if name == "box" or data.has_masks and model.roi_heads.has_mask():
            figures.update({f"{name}_{k}": x for k, x in average_precision(content, results, kind).items()})
    return results, figures


def show(model, data):
    """A PIL image of the first four pictures, with what is found there."""
    pictures = [data.load(i) for i in range(min(4, len(data)))]
    canvases = torch.stack([data[i][0] for i in range(len(pictures))]).to(next(model.parameters()).device)
    found = model.find(canvases, [place(img.size, data.side) for img in pictures], least=0.5)
    return side_by_side([draw(img, x, data.categories, 0.5) for img, x in zip(pictures, found)])
