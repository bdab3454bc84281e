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

Five things go wrong in silence where these are joined:
- pixels: torchvision's transform normalises, and so does the encoder. Here only the encoder does.
- strides: torchvision takes a map's stride from the first batch, rounded to a power of two, and patch 14 gives none.
  Here such a ViT sees the canvas resized, 1024 to 896, so that its map has S / 16, and RoIAlign is told the strides.
- half pixels: a map's first value is the mean of x = 0 .. s and lies at x = s / 2, so RoIAlign is `aligned`.
- masks: torchvision cuts those to learn by a RoIAlign that is not, so it gets their values at the pixels' corners.
- bf16: torchvision computes boxes in the type that the heads give, and bf16 is up to 4 pixels off at 1024.

Rates and schedule are ViTDet's for ViT-L (Li et al. 2022), but that the rate falls linearly over the last 11%, not in
two steps. Training is finetune.py's; data, AP and drawing are in coco.py, coco_eval.py, canvas.py. Needs torchvision
and pycocotools.
"""
import argparse
import functools
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, RPNHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from downstream import finetune
from downstream.backbone import build_backbone, load_backbone, load_model
from downstream.bench import bench_detector
from downstream.canvas import at_corners, draw, paste_masks, place, to_canvas
from downstream.coco import CocoDetection, collate
from downstream.coco_eval import FIGURES, find_all, show
from encoder import TEACHERS, Encoder, UserError, ViT, write_atomically
from tools.job import Job
from tools.pictures import free_path, read_pictures
from tools.run import command_line
from tools.script import check_output, check_report, default_workers, make_folder, number, write_file

STRIDES = (4, 8, 16, 32)  # of the levels from which boxes are read; the RPN has one more, 64


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, h, w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def resize_maps(width, factor, narrow):
    """Layers that make maps (B, width, h, w) larger by `factor`, a power of two, and how many channels come out.
    narrow: as in ViTDet, a larger map has fewer channels, and a smaller one is a maximum."""
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
    """Features (M, C, side, side) of boxes, from the level that suits a box's size (Lin et al. 2017, eq. 1): a side of
    224 pixels reads stride 16, 112 stride 8, 448 stride 32. torchvision's MultiScaleRoIAlign would infer the strides.
    """

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


def to_float(x):
    """A tensor in fp32, or tuples and lists of tensors."""
    return x.float() if isinstance(x, torch.Tensor) else type(x)(map(to_float, x))


class Detector(nn.Module):
    """Mask R-CNN on an Encoder. Calling it gives the losses, `find` the objects of canvases of size x size pixels."""

    def __init__(self, backbone, classes, size=1024, neck="fpn", window=0, channels=256, masks=True):
        super().__init__()
        vit, C = backbone.vit, channels
        L, P = len(vit.blocks), vit.num_prefix
        self.backbone, self.size, self.stride = backbone, size, 2 ** round(math.log2(vit.config.patch))
        if size % 64:
            raise UserError(f"--size {size} is no multiple of 64, the coarsest stride: try {-(-size // 64) * 64}")
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
        head = FastRCNNConvFCHead((C, 7, 7), [C] * 4, [4 * C], LayerNorm2d)
        predictor = FastRCNNPredictor(4 * C, classes + 1)
        nn.init.normal_(predictor.cls_score.weight, std=0.01)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
        self.roi_heads = RoIHeads(RoIAlign(7), head, predictor, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100, **mask)
        for head in self.rpn.head, predictor, *filter(None, [self.roi_heads.mask_predictor]):
            head.register_forward_hook(lambda module, given, out: to_float(out))

    def pyramid(self, img):
        """img (B, 3, S, S) in [0, 1] -> the levels of the pyramid."""
        inside = img.shape[-1] // self.stride * self.backbone.vit.config.patch
        if inside != img.shape[-1]:
            img = F.interpolate(img, (inside, inside), mode="bilinear")
        maps = self.backbone.features(img, self.layers, grid=True)
        return self.neck(maps * (len(STRIDES) // len(maps)))

    def detect(self, img, targets=None):
        """Canvases uint8 (B, 3, S, S), and in training what is on them -> (objects, losses), torchvision's."""
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
        for target, m in zip(targets, at_corners(masks).split(counts) if masks is not None else ()):
            target["masks"] = m
        return self.detect(img, targets)[1]

    @torch.no_grad()
    def find(self, img, views, least=0.0):
        """Objects of whole pictures, whose canvases are uint8 img (B, 3, S, S): a list of dicts of tensors on the CPU,
        by falling score, which is `least` or more: boxes (k, 4) in the picture's own pixels, labels (k,), scores (k,),
        and masks, bool (k, H, W)."""
        found = [{k: v[x["scores"] >= least] for k, v in x.items()} for x in self.detect(img)[0]]
        for x, view in zip(found, views):
            if "masks" in x:  # on the whole box, of which a part may lie beside the picture
                x["masks"] = paste_masks(x["masks"][:, 0], view.scale(x["boxes"]), view.size)
            x["boxes"] = view.back(x["boxes"])
            x.update({k: v.cpu() for k, v in x.items()})
        return found


def build(config):
    """The Detector that RUN/model.safetensors describes."""
    return Detector(build_backbone(config), len(config["categories"]), **config["detector"])


def check_categories(data, expected, whose):
    """Raise UserError unless the data's categories are the expected ones, in their order."""
    if list(data.categories) != list(expected):
        raise UserError(f"{data.truth} has other categories than {whose}: {' '.join(data.categories)[:100]}, and not "
                        f"{' '.join(expected)[:100]}")


def train(args, on_signal):
    """Train as the command line asks."""
    data, val = (CocoDetection(args.data, split, args.size, split == "train", args.seed, args.jitter)
                 for split in ("train", "val"))
    check_categories(val, data.categories, data.truth)
    detector = dict(size=args.size, neck=args.neck, window=args.window, channels=args.channels, masks=data.has_masks)
    config = dict(categories=data.categories, detector=detector)
    model = Detector(load_backbone(args), len(data.categories), **detector)
    measure = lambda: find_all(model, val, args.micro_batch, args.workers, torch.cuda.is_available())[1]
    finetune.train(args, model, data, measure, config, collate, on_signal=on_signal, picture=lambda: show(model, val))


def test(args):
    """AP of a run on a part of a data set; what it has found as a file."""
    job = Job(args)
    model, config = load_model(args.run, build, job.device)
    data = CocoDetection(args.data, args.split, model.size, train=False)
    check_categories(data, config["categories"], args.run)
    check_output(args.results, args.data, data.truth)
    check_report(args.out, args.data, data.truth, args.results or "")
    results, figures = find_all(model, data, args.batch_size, args.workers, args.bf16)
    if args.results and job.rank == 0:
        write_file(args.results, json.dumps(results).encode())
    table = [" " * 6 + "".join(f"{k:>7s}" for k in FIGURES)]
    for name in [x for x in ("box", "mask") if f"{x}_AP" in figures]:
        row = (figures[f"{name}_{k}"] for k in FIGURES)
        table.append(f"{name:6s}" + "".join("      -" if x is None else f"{x:7.2f}" for x in row))
    about = dict(data=[args.data, args.split], images=len(data), step=config["step"], protocol=f"the long side at "
                 f"{model.size} px, at most 100 objects of a score above 0.05, pycocotools, {job.precision}")
    return job.finish({**about, "run": args.run, "results": figures}, table)


def predict(args):
    """Draw what a run finds on pictures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(args.run, build, device)
    names, taken = config["categories"], set()
    for img, path, folder in read_pictures(args.files, args.out, "_objects"):
        view = place(img.size, model.size)
        found, = model.find(to_canvas(img, view, model.size)[None].to(device), [view], args.score)
        name = os.path.splitext(os.path.basename(path))[0]
        result = free_path(folder, name, "_objects.png", taken) + "_objects.png"
        make_folder(folder)
        picture = draw(img, found, names, args.score)
        write_atomically(result, lambda f: picture.save(f, "PNG"))
        said = [f"{names[label - 1]} {score:.2f}" for label, score in zip(found["labels"], found["scores"])]
        print(f"{result}: {', '.join(said) or 'nothing'}")


def bench(args):
    """Speed and memory of training, with random weights."""
    backbone = Encoder(ViT(TEACHERS[args.teacher]))
    backbone.vit.drop_path = 0.4
    bench_detector(Detector(backbone, 80, args.size, args.neck, args.window, args.channels), args.batch_size)


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | test | predict | bench")
    count, whole = number(int, 1), number(int, 0)

    part = commands.add_parser("train", help="train a detector; the same command again resumes")
    add_model(part)
    add = part.add_argument
    add("--data", required=True, metavar="PATH", help="a folder or .zip archive with the parts train and val")
    add("--jitter", nargs=2, type=number(float, 0.01, 10), default=[0.1, 2.0], metavar=("LOW", "HIGH"),
        help="how large pictures are, as a part of the size that fits [0.1 2.0]")
    finetune.add_flags(part, epochs=100, batch_size=64, micro_batch=8, lr=1e-4, weight_decay=0.1, layer_decay=0.8,
                       drop_path=0.4, warmup=250, lr_decay=0.11, eval_every=10_000, out="out/detect")

    part = commands.add_parser("test", help="the AP of a run")
    add = part.add_argument
    add("--run", required=True, metavar="FOLDER", help="what train has written")
    add("--data", required=True, metavar="PATH", help="as for train")
    add("--split", default="val", help="the part of the data [%(default)s]")
    add("--batch_size", type=count, default=8, help="[%(default)s]")
    add("--workers", type=whole, default=default_workers(4), help="data loading processes per rank [%(default)s]")
    add("--bf16", action="store_true", help="faster, figures differ a little")
    add("--results", metavar="FILE", help="write what is found, in COCO's format")
    add("--out", metavar="FILE", help="write the figures as JSON")

    part = commands.add_parser("predict", help="draw what a run finds on pictures")
    add = part.add_argument
    add("files", nargs="+", metavar="FILES", help="pictures, or folders of them")
    add("--run", required=True, metavar="FOLDER", help="what train has written")
    add("--score", type=number(float, 0, 1), default=0.5, help="the least that is drawn [%(default)s]")
    add("--out", metavar="FOLDER", help="for the results [beside a picture; of a folder NAME: NAME_objects]")

    part = commands.add_parser("bench", help="speed and memory of training, with random weights")
    add_model(part)
    part.add_argument("--teacher", choices=TEACHERS, default="internvit", help="its ViT [%(default)s]")
    part.add_argument("--batch_size", type=count, nargs="+", default=[4, 8], help="[4 8]")
    args = ap.parse_args(argv)
    if args.command == "train" and args.jitter[0] > args.jitter[1]:
        ap.error("--jitter takes two numbers, the smaller first")
    return args


def add_model(parser):
    """The flags that say what a detector is."""
    add = parser.add_argument
    add("--size", type=number(int, 64), default=1024, help="side of the canvas in pixels [%(default)s]")
    add("--neck", choices=["fpn", "simple"], default="fpn", help="the pyramid [%(default)s, the paper's]")
    add("--window", type=number(int, 0), default=0, metavar="TOKENS", help="side of attention's windows [0: none]")
    add("--channels", type=number(int, 1), default=256, help="of pyramid and heads [%(default)s]")


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    commands = dict(train=functools.partial(train, on_signal=on_signal), test=test, predict=predict, bench=bench)
    return commands[args.command](args)


if __name__ == "__main__":
    command_line(main, "downstream.detect")
