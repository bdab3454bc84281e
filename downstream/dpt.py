"""DPT for monocular depth on a plain ViT, and its losses: metric and relative depth.

Metric: depth = max_depth * sigmoid(x), and for each picture, with d = log depth - log truth (Eigen et al. 2014),
    L = sqrt(mean d^2 - 0.5 (mean d)^2)
Relative: x is a disparity of unknown scale and shift. x and 1 / truth, each minus its median and divided by its mean
absolute deviation, differ by R; of M pixels that are measured (Ranftl et al. 2022)
    L = sum of the smallest 80% of |R| / 2M  +  0.5 sum over 4 scales of (sum |dR/dx| + |dR/dy|) / M of that scale
Every term is of one picture, and the loss is their mean, so that it does not depend on how a batch is split.

    model = DepthModel(Encoder.from_pretrained("uniflow.safetensors"), target="metric", max_depth=10)
    losses = model(img, truth)         # uint8 (B, 3, S, S), metres (B, S, S), 0 where nothing is measured
    depth = model.predict(img / 255)   # (B, H, W) in metres, of any size

The head (Ranftl et al. 2021) reads four blocks, in a ViT of 24 [4, 11, 17, 23]. Differs from DPT: no batch norm, as in
its ViT-L; CLS is left out and tokens are normalised, both as in Depth Anything; 1x1 convolutions come before the
upsampling, with which they commute; relative depth has no last ReLU, which could die.
"""
import torch
import torch.nn.functional as F
from torch import nn


def in_fp32(layer, x):
    """layer(x) in fp32 where autocast would use bf16, whose three digits are too few for depths and close classes."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Add the map of a shallower block, if there is one, and enlarge the sum."""

    def __init__(self, width, with_skip):
        super().__init__()
        self.skip = Residual(width) if with_skip else None
        self.sum = Residual(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x, skip, size):
        if self.skip is not None:
            x = x + self.skip(skip)
        return F.interpolate(self.out(self.sum(x)), size, mode="bilinear", align_corners=True)


class DPTHead(nn.Module):
    """Maps of four blocks, each (B, D, h, w), shallow first -> (B, 1, H, W). w below is `width`."""

    def __init__(self, D, width):
        super().__init__()
        w = width
        channels = w, 2 * w, 4 * w, 4 * w
        self.project = nn.ModuleList(nn.Conv2d(D, c, 1) for c in channels)
        self.resize = nn.ModuleList([nn.ConvTranspose2d(w, w, 4, 4), nn.ConvTranspose2d(2 * w, 2 * w, 2, 2),
                                     nn.Identity(), nn.Conv2d(4 * w, 4 * w, 3, 2, 1)])  # to 4h, 2h, h, h/2
        self.narrow = nn.ModuleList(nn.Conv2d(c, w, 3, padding=1, bias=False) for c in channels)
        self.fuse = nn.ModuleList(Fusion(w, with_skip=i < 3) for i in range(4))
        self.conv = nn.Conv2d(w, w // 2, 3, padding=1)
        self.refine = nn.Conv2d(w // 2, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 1, 1)

    def forward(self, maps, size):
        maps = [narrow(resize(project(x)))
                for x, project, resize, narrow in zip(maps, self.project, self.resize, self.narrow)]
        x = maps[3]  # (B, w, h/2, w/2)
        for i in (3, 2, 1):
            x = self.fuse[i](x, maps[i], maps[i - 1].shape[2:])
        x = self.fuse[0](x, maps[0], [2 * side for side in maps[0].shape[2:]])  # (B, w, 8h, 8w)
        x = F.interpolate(self.conv(x), size, mode="bilinear", align_corners=True)
        return in_fp32(self.out, F.relu(self.refine(x)))  # (B, 1, H, W)


class LinearHead(nn.Module):
    """A linear map of the last block's tokens, enlarged: what the features say without a network of one's own."""

    def __init__(self, D, width=None):
        super().__init__()
        self.out = nn.Conv2d(D, 1, 1)

    def forward(self, maps, size):
        return F.interpolate(in_fp32(self.out, maps[-1]), size, mode="bilinear", align_corners=False)


HEADS = {"dpt": DPTHead, "linear": LinearHead}


def blocks_to_read(depth):
    """The four blocks that the head reads: [4, 11, 17, 23] of 24, [2, 5, 8, 11] of 12."""
    return [-(-depth * part // 24) - 1 for part in (5, 12, 18, 24)]


class DepthModel(nn.Module):
    """A backbone (an Encoder) and a head. target: "metric" gives metres up to max_depth, "relative" a disparity."""

    def __init__(self, backbone, head="dpt", head_width=None, target="metric", max_depth=10.0):
        super().__init__()
        vit = backbone.vit.config
        backbone.vit.norm.requires_grad_(False)  # it is not used
        self.backbone, self.target, self.max_depth = backbone, target, max_depth
        self.blocks = blocks_to_read(vit.depth)
        self.head = HEADS[head](vit.width, head_width or max(2, min(256, vit.width // 4)))

    def predict(self, img):
        """img (B, 3, H, W) in [0, 1], of any size -> (B, H, W) in fp32: metres, or a disparity."""
        p, (H, W) = self.backbone.vit.config.patch, img.shape[2:]
        size = [max(1, round(side / p)) * p for side in (H, W)]  # what the patches can cover
        if size != [H, W]:
            img = F.interpolate(img, size, mode="bicubic", antialias=True).clamp(0, 1)
        maps = self.backbone.features(img, self.blocks, grid=True)  # 4 x (B, D, h, w)
        maps = [F.layer_norm(x.movedim(1, 3), x.shape[1:2]).movedim(3, 1) for x in maps]
        x = self.head(maps, size)
        if size != [H, W]:
            x = F.interpolate(x, (H, W), mode="bilinear", align_corners=False)
        return self.max_depth * x[:, 0].sigmoid() if self.target == "metric" else x[:, 0]

    def forward(self, img, truth):
        """{name: loss} of uint8 images (B, 3, S, S), whose depth is `truth` (B, S, S), 0 where there is none."""
        x = self.predict(img / 255)
        if self.target == "metric":
            return {"silog": silog(x, torch.where(truth < self.max_depth, truth, 0))}
        return relative_losses(x, truth)


# ---- losses and errors; truth, valid and the predictions are (B, H, W) ----

def mean_of(x, valid):
    """The mean of each picture's valid pixels (B, 1, 1); 0 without any."""
    return torch.where(valid, x, 0).sum((1, 2), True) / valid.sum((1, 2), True).clamp_min(1)


def silog(depth, truth, weight=0.5):
    """The scale-invariant logarithmic loss: sqrt(mean d^2 - weight (mean d)^2) of each picture, averaged."""
    valid = truth > 0
    d = depth.clamp_min(1e-6).log() - torch.where(valid, truth, 1).log()
    variance = mean_of(d ** 2, valid) - weight * mean_of(d, valid) ** 2
    return variance.clamp_min(1e-12).sqrt().mean()  # a root has no gradient at 0


def align(x, y, valid):
    """(s, t), each (B, 1, 1), for which s x + t is nearest to y by least squares; s = 0 where x is constant."""
    x_mean, y_mean = mean_of(x, valid), mean_of(y, valid)
    dx = x - x_mean
    s = mean_of(dx * (y - y_mean), valid) / mean_of(dx ** 2, valid).clamp_min(1e-12)
    return s, y_mean - s * x_mean


def standardise(x, valid):
    """x minus its median, over its mean absolute deviation, of each picture's valid pixels; 0 elsewhere."""
    median = torch.where(valid, x, torch.nan).flatten(1).nanmedian(1).values.nan_to_num()[:, None, None]
    x = torch.where(valid, x - median, 0)
    return x / mean_of(x.abs(), valid).clamp_min(1e-6)


def trimmed_loss(residual, valid, kept=0.8):
    """The sum of the smallest |residual|, a part `kept` of the M valid ones, over 2M (B,). It is 0 where not valid."""
    M = valid.sum((1, 2))
    ordered = residual.abs().flatten(1).sort(1).values  # the pixels that are not valid come first
    last = ordered.shape[1] - M + (kept * M).long()
    return torch.where(torch.arange(ordered.shape[1], device=M.device) < last[:, None], ordered, 0).sum(1) / (
        2 * M.clamp_min(1))


def gradient_loss(residual, valid, scales=4):
    """The sum over scales, each of every second pixel of the one before, of the mean |dR/dx| + |dR/dy| (B,)."""
    total = 0
    for step in (2 ** k for k in range(scales)):
        r, v = residual[:, ::step, ::step], valid[:, ::step, ::step]
        down = (r[:, 1:] - r[:, :-1]).abs() * (v[:, 1:] & v[:, :-1])
        right = (r[:, :, 1:] - r[:, :, :-1]).abs() * (v[:, :, 1:] & v[:, :, :-1])
        total = total + (down.sum((1, 2)) + right.sum((1, 2))) / v.sum((1, 2)).clamp_min(1)
    return total


def relative_losses(x, truth, alpha=0.5):
    """{name: loss} of a disparity x. Both are the same for every a x + b with a > 0."""
    valid = truth > 0
    residual = standardise(x, valid) - standardise(1 / torch.where(valid, truth, 1), valid)
    return {"trimmed": trimmed_loss(residual, valid).mean(), "gradient": alpha * gradient_loss(residual, valid).mean()}
