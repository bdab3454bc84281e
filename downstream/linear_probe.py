"""Linear probe: a linear classifier on a frozen encoder's features, by MAE's protocol (Table 4a).

    torchrun --nproc_per_node=8 -m downstream.linear_probe train --data imagenet/train --val imagenet/val --weights W \\
        --out probe                                                     # MAE's; --recipe paper: 100 epochs of 128
    python -m downstream.linear_probe train --teacher tiny --data train.zip --val val.zip --out control    # the teacher
    python -m downstream.linear_probe test --run probe --data imagenet/val
    python -m downstream.linear_probe predict --run probe photo.jpg     # its five likeliest classes
    python -m downstream.linear_probe bench                             # speed of a frozen ViT-L/14 at 448 px

Protocol (He et al. 2022): batch norm without gain and bias, then a linear layer; LARS without weight decay, 90 epochs of
16,384, rate 0.1 * batch / 256, which rises over 10 epochs and then falls by half a cosine to 0; random resized crops and
mirroring, no other augmentation; the central 224 of 256 pixels, or their like at another --size, are classified. The
accuracy is that after the last epoch, not the best one.

Two classifiers learn from the same pass, each as if alone: of the mean of the spatial tokens ("pooled"), and, where the
model has one, of the CLS token ("cls"), both after the final norm. MAE's figure is that of CLS; the paper says neither
which one it took, nor at which size. eval.py --probe is another, quicker one: fixed features without augmentation.
"""
import argparse
import json
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import ImageDataset, limit_aspect, load_image, to_tensor

# warmup: epochs over which the rate rises; blr: the rate at a batch of 256, with which it grows
RECIPES = {"mae": dict(epochs=90, batch_size=16384, blr=0.1, warmup=10),
           "paper": dict(epochs=100, batch_size=128, blr=0.1, warmup=10)}  # the paper's B.4; what it leaves out is MAE's


# ---- the model ----

class BatchNorm(nn.BatchNorm1d):
    """Batch norm without gain and bias, of inputs that need no gradient. The statistics are those of all ranks."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6, affine=False)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        rows = x.detach().double()
        moments = torch.stack([rows.sum(0), (rows ** 2).sum(0), torch.full_like(rows[0], len(rows))])
        if dist.is_initialized():
            dist.all_reduce(moments)
        n, mean = moments[2], moments[0] / moments[2]
        variance = moments[1] / n - mean ** 2
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * n / (n - 1).clamp_min(1)).float(), self.momentum)
            self.num_batches_tracked += 1
        return ((rows - mean) / (variance + self.eps).sqrt()).float()


class Probe(nn.Module):
    """Classifiers of the backbone's (an Encoder's) features: pooled, and cls where it has a CLS token."""

    def __init__(self, backbone, classes):
        super().__init__()
        vit = backbone.vit
        self.backbone = backbone.requires_grad_(False)
        names = ["pooled", "cls"][:1 + (vit.num_prefix > 0)]
        self.heads = nn.ModuleDict({name: nn.Sequential(BatchNorm(vit.config.width),
                                                        nn.Linear(vit.config.width, classes)) for name in names})
        for head in self.heads.values():
            nn.init.trunc_normal_(head[1].weight, std=0.01)
            nn.init.zeros_(head[1].bias)

    def logits(self, img):
        """img (B, 3, S, S) in [0, 1] -> {name of the features: (B, classes)}."""
        vit = self.backbone.vit
        with torch.no_grad():
            tokens = vit.norm(vit(img)[-1]).float()  # (B, P+N, D)
        features = {"pooled": tokens[:, vit.num_prefix:].mean(1), "cls": tokens[:, 0]}
        return {name: head(features[name]) for name, head in self.heads.items()}

    def forward(self, img, labels):
        """{name: cross-entropy} of uint8 images (B, 3, S, S)."""
        return {name: F.cross_entropy(x.float(), labels) for name, x in self.logits(img / 255).items()}


class LARS(torch.optim.Optimizer):
    """SGD with momentum, in which a matrix W with gradient g moves at the rate lr * trust * |W| / |g| (You et al. 2017).

    v <- momentum v + q g;  W <- W - lr v,  where q = trust |W| / |g|, or 1 for vectors and where one of the two is 0.
    """

    def __init__(self, params, lr, momentum=0.9, trust=0.001, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    size, slope = p.norm(), g.norm()
                    g = g * torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1)
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * state["velocity"])


# ---- data ----

class ProbeImages(ImageDataset):
    """[n] -> (uint8 (3, S, S), label): in training a random resized crop, else the centre. All must be readable."""

    def __getitem__(self, n):
        i = self.index(n)
        try:
            img = self.load(i)
        except ValueError as e:
            raise type(e)(f"{self.path(i)}: {e}") from None
        img = resized_crop(img, self.size, np.random.default_rng([self.seed, n, 1])) if self.train else \
            centre(img, self.size)
        return to_tensor(img), torch.tensor(int(self.labels[i]))


def resized_crop(img, size, rng):
    """A part of a PIL image, of 8% to 100% of its area and 3:4 to 4:3 in shape, as size x size; half are mirrored.

    As in MAE, a box that is larger than the image is cut to it (torchvision would draw again).
    """
    area = img.width * img.height * rng.uniform(0.08, 1)
    shape = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))  # width / height
    w, h = min(round((area * shape) ** 0.5), img.width), min(round((area / shape) ** 0.5), img.height)
    w, h = max(w, 1), max(h, 1)
    left, top = int(rng.integers(img.width - w + 1)), int(rng.integers(img.height - h + 1))
    img = img.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else img


def centre(img, size):
    """The central size x size pixels of a PIL image whose shorter side is resized to 256/224 of that."""
    img = limit_aspect(img, 0.5)
    scale = round(size * 256 / 224) / min(img.size)
    img = img.resize([round(side * scale) for side in img.size], Image.Resampling.BICUBIC)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((left, top, left + size, top + size))
