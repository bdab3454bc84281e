"""Object detection on a tokenizer's encoder: Mask R-CNN with a feature pyramid on a plain ViT (Table 4b).

    torchrun --nproc_per_node=8 -m downstream.detect train --data coco --weights W --out out/detect
    python -m downstream.detect test --run out/detect --data coco --results found.json
    python -m downstream.detect predict --run out/detect img.png
    python -m downstream.detect bench --teacher internvit --window 16    # speed and memory, with random weights

--data is a folder or a .zip archive: train/images/*.jpg, train/instances.json in COCO's format and the same of val, or
COCO's own folders (train2017, val2017, annotations). Where the data have no masks, the detector finds boxes only.

RPN, heads, RoIAlign and NMS are torchvision's, AP is pycocotools'. Ours is what joins a plain ViT to them:

    canvas (S, S) -> encoder -> maps of stride s, a power of two -> pyramid of strides 4, 8, 16, 32, 64 -> RPN, heads

    --neck fpn      the paper's: the ViT's blocks in four subsets, the last map of each resized by convolutions to one
                    level, early blocks to the fine levels, and a feature pyramid network on top
    --neck simple   ViTDet's: all levels from the last map
    --window w      attention inside of windows of w x w tokens, but in the last block of each quarter: ViTDet's way to
                    afford large pictures. A window as large as the canvas is plain attention.

Four things that go wrong in silence, and what is done here:
- torchvision's pixels: its transform normalises, and so does the encoder. Here only the encoder does.
- strides: torchvision rounds a map's stride to a power of two, and infers it from the first batch. A ViT of patch 14
  has none: it sees the canvas resized (1024 -> 896), so that its map has exactly S / 16. RoIAlign is told the stride.
- half pixels: a map's first value is the mean of x = 0 .. s and lies at x = s / 2, so RoIAlign is used with `aligned`.
- bf16: torchvision decodes boxes in the type that the heads give, whose 8 bits are up to 4 pixels off at 1024.

Rates, decay, drop path and schedule are ViTDet's for ViT-L (Li et al. 2022). The trainer is finetune.py, the data are
in coco.py. Needs torchvision and pycocotools.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, RPNHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from data import load_image
from downstream.coco import CocoDetection, collate, place, to_canvas
from encoder import Encoder, TEACHERS, UserError, ViT, ViTConfig, write_atomically

STRIDES = (4, 8, 16, 32)  # of the levels from which boxes are read; the RPN has one more, 64
COLOURS = "#e6194b #3cb44b #4363d8 #f58231 #911eb4 #0b9c9c #f032e6 #808000 #9a6324 #000075".split()
FIGURES = "AP AP50 AP75 APs APm APl".split()  # the first of COCOeval.stats


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, h, w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def resize_maps(width, factor, narrow):
    """Layers that make maps (B, width, h, w) larger by `factor`, a power of two, and how many channels come out. narrow:
    as ViTDet, where a larger map has fewer channels, and a smaller one is a maximum."""
    layers = []
    while factor > 1:
        layers += [LayerNorm2d(width), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(width, width // 2 if narrow else width, 2, 2))
        width, factor = layers[-1].out_channels, factor / 2
    while factor < 1:
        layers.append(nn.MaxPool2d(2) if narrow else nn.Conv2d(width, width, 2, 2))
        factor *= 2
    return nn.Sequential(*layers), width


class Pyramid(nn.Module):
    """Four maps (B, width, h, w) of one stride -> {"0": (B, channels, S/4, S/4), "1", "2", "3", "pool": .. S/64}."""

    def __init__(self, width, stride, channels, neck):
        super().__init__()
        resized, widths = zip(*(resize_maps(width, stride / level, neck == "simple") for level in STRIDES))
        self.resized, self.fpn, self.plain = nn.ModuleList(resized), None, None
        if neck == "fpn":
            self.fpn = FeaturePyramidNetwork(list(widths), channels, norm_layer=LayerNorm2d)
        else:  # without a path from the coarse levels to the fine ones
            self.plain = nn.ModuleList(nn.Sequential(
                nn.Conv2d(w, channels, 1, bias=False), LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)) for w in widths)
        self.coarsest = LastLevelMaxPool()

    def forward(self, maps):
        maps = {str(k): resize(x) for k, (resize, x) in enumerate(zip(self.resized, maps))}
        maps = self.fpn(maps) if self.fpn else {k: layers(x) for layers, (k, x) in zip(self.plain, maps.items())}
        levels, names = self.coarsest(list(maps.values()), [], list(maps))
        return {k: x.float() for k, x in zip(names, levels)}


class RoIAlign(nn.Module):
    """Features (M, C, side, side) of boxes, from the level that suits a box's size: 2^k pixels of 224 belong to stride
    16 / 2^k (Lin et al. 2017, eq. 1). In place of torchvision's MultiScaleRoIAlign, which infers the strides."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, maps, boxes, image_sizes=None):
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # (M, 5): picture, x1 y1 x2 y2
        sizes = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        level = (2 + (sizes / 224 + 1e-8).log2()).floor().clamp(0, len(STRIDES) - 1)  # index into STRIDES
        out = rois.new_zeros(len(rois), maps["0"].shape[1], self.side, self.side)
        for k, stride in enumerate(STRIDES):
            here = level == k
            out[here] = roi_align(maps[str(k)], rois[here], self.side, 1 / stride, sampling_ratio=2, aligned=True)
        return out


def attend_in_windows(attention, window, prefix, x):
    """attention(x) inside of windows: x (B, P+N, D), whose N tokens are a square grid. Each window sees the P prefix
    tokens too, which leave as the mean of what the windows make of them."""
    B, T, D = x.shape
    side = math.isqrt(T - prefix)
    n = side // window
    first, x = x[:, :prefix].repeat_interleave(n * n, 0), x[:, prefix:]
    x = x.reshape(B, n, window, n, window, D).transpose(2, 3).reshape(B * n * n, window * window, D)
    x = attention(torch.cat([first, x], 1))
    first, x = x[:, :prefix].unflatten(0, (B, n * n)).mean(1), x[:, prefix:]
    x = x.reshape(B, n, n, window, window, D).transpose(2, 3).reshape(B, side * side, D)
    return torch.cat([first, x], 1)


class Detector(nn.Module):
    """Mask R-CNN on an Encoder. Calling it gives the losses, `find` the objects of canvases of size x size pixels."""

    def __init__(self, backbone, classes, size=1024, neck="fpn", window=0, channels=256, masks=True):
        super().__init__()
        vit, C = backbone.vit, channels
        L, P = len(vit.blocks), vit.num_prefix
        self.backbone, self.size, self.stride = backbone, size, 2 ** round(math.log2(vit.config.patch))
        if size % 64:
            raise UserError(f"--size {size} is no multiple of 64, the coarsest stride: try {max(64, round(size / 64) * 64)}")
        grid = size // self.stride
        if window and grid % window:
            fits = [w for w in range(1, grid + 1) if grid % w == 0]
            raise UserError(f"--window {window} does not divide the {grid} x {grid} tokens of {size} px: try "
                            f"{min(fits, key=lambda w: abs(w - window))}")
        quarters = [-(-k * L // 4) - 1 for k in (1, 2, 3, 4)]  # the last block of each; the last map has the final norm
        self.layers = [*quarters[:3], None] if neck == "fpn" else [None]
        for i, block in enumerate(vit.blocks):
            if window and i not in quarters:
                block.attention = functools.partial(attend_in_windows, block.attention, window, P)
        backbone.latent_down.requires_grad_(False)  # not used
        self.neck = Pyramid(vit.config.width, self.stride, C, neck)
        anchors = AnchorGenerator(tuple((8 * s,) for s in (*STRIDES, 64)), ((0.5, 1.0, 2.0),) * 5)
        counts = dict(training=2000, testing=1000), dict(training=1000, testing=1000)  # proposals before and after NMS
        self.rpn = RegionProposalNetwork(anchors, RPNHead(C, 3, conv_depth=2), 0.7, 0.3, 256, 0.5, *counts, 0.7)
        mask = dict(mask_roi_pool=RoIAlign(14), mask_head=MaskRCNNHeads(C, [C] * 4, 1, LayerNorm2d),
                    mask_predictor=MaskRCNNPredictor(C, C, classes + 1)) if masks else {}
        self.roi_heads = RoIHeads(RoIAlign(7), FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], LayerNorm2d),
                                  FastRCNNPredictor(4 * C, classes + 1), 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100, **mask)
        nn.init.normal_(self.roi_heads.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.roi_heads.box_predictor.bbox_pred.weight, std=0.001)
        to_float = lambda module, given, out: out.float() if isinstance(out, torch.Tensor) else type(out)(
            [x.float() for x in part] if isinstance(part, list) else part.float() for part in out)
        for head in filter(None, (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor)):
            head.register_forward_hook(to_float)

    def pyramid(self, img):
        """img (B, 3, S, S) in [0, 1] -> the levels of the pyramid."""
        inside = img.shape[-1] // self.stride * self.backbone.vit.config.patch
        if inside != img.shape[-1]:
            img = F.interpolate(img, (inside, inside), mode="bilinear")
        maps = self.backbone.features(img, self.layers, grid=True)
        return self.neck(maps * (len(STRIDES) // len(maps)))

    def detect(self, img, targets=None):
        """Canvases uint8 (B, 3, S, S), and in training what is on them -> (objects, losses) as torchvision gives them."""
        img = img.float() / 255
        images = ImageList(img, [tuple(img.shape[-2:])] * len(img))
        levels = self.pyramid(img)
        proposals, losses = self.rpn(images, levels, targets)
        found, more = self.roi_heads(levels, proposals, images.image_sizes, targets)
        return found, {**losses, **more}

    def forward(self, img, boxes, labels, counts, masks=None):
        """A batch of coco.collate -> a dict of losses."""
        counts = counts.tolist()
        targets = [dict(boxes=b, labels=l) for b, l in zip(boxes.split(counts), labels.split(counts))]
        for target, m in zip(targets, masks.split(counts) if masks is not None else ()):
            target["masks"] = m
        return self.detect(img, targets)[1]

    @torch.no_grad()
    def find(self, img, views):
        """Objects of whole pictures, whose canvases are uint8 img (B, 3, S, S): a list of dicts of tensors on the CPU,
        by falling score: boxes (k, 4) in the picture's own pixels, labels (k,), scores (k,), masks bool (k, H, W)."""
        found, _ = self.detect(img)
        for x, view in zip(found, views):
            x["boxes"] = view.back(x["boxes"])
            if "masks" in x:
                x["masks"] = paste_masks(x["masks"][:, 0], x["boxes"], view.size)
            x.update({k: v.cpu() for k, v in x.items()})
        return found


def paste_masks(masks, boxes, size):
    """Probabilities (k, m, m) on the boxes (k, 4) -> bool (k, H, W) of a picture of (W, H): above 1/2 at a pixel's
    centre, interpolated between the centres of the mask's cells; outside of it is 0."""
    out = torch.zeros(len(boxes), size[1], size[0], dtype=torch.bool, device=boxes.device)
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = math.floor(x1), math.floor(y1)
        right, bottom = min(math.ceil(x2), size[0]), min(math.ceil(y2), size[1])
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]  # (1, h, w, 2)
        out[k, top:bottom, left:right] = F.grid_sample(masks[k][None, None], grid, align_corners=False)[0, 0] >= 0.5
    return out
