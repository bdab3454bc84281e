"""UperNet on a plain ViT: semantic segmentation from the tokens of four blocks.

    strides 4, 8, 16, 32    four blocks' tokens as maps, resized by transposed convolutions or pooling
    the coarsest            joined with its averages over 1, 4, 9 and 36 parts of the picture (pyramid pooling)
    each finer one          a 1x1 convolution, plus the coarser one resized (FPN), smoothed
    logits                  of all four joined, at stride 4; an auxiliary head reads the third block in training

    model = Segmenter(Encoder.from_pretrained("out/model.safetensors"), classes=150)
    losses = model(img, labels)       # uint8 (B, 3, H, W), uint8 (B, H, W) -> {name: loss}
    logits = model.logits(img)        # (B, 3, H, W) in [0, 1], any H and W -> (B, 150, H, W)
    logits = slide(model.logits, img[0], crop=512, stride=341)  # of a whole picture (3, H, W), by windows

Xiao et al. 2018, as BEiT and MAE use it: blocks 8, 12, 16, 24 of 24, width 512, batch normalisation (of a micro-batch,
over all ranks if the trainer makes it SyncBatchNorm). Differs from theirs: tokens are normalised first, because blocks
and teachers differ in scale; the loss is the mean over the pixels that count; with patches of 8 the strides are the
same. LinearHead is the control.
`python -m downstream.upernet` prints shapes and parameter counts.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = 255  # the class number of pixels that do not count


def conv(channels_in, channels_out, kernel):
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(channels_out), nn.ReLU())


def resize(x, size):
    """Maps (B, C, h, w) -> (B, C, *size), bilinear."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def rescale(D, power):
    """A map (B, D, h, w) -> 2^power times as large: transposed convolutions, or max pooling."""
    if power <= 0:
        return nn.MaxPool2d(2 ** -power, ceil_mode=True) if power else nn.Identity()
    layers = [nn.ConvTranspose2d(D, D, 2, 2)]
    for _ in range(power - 1):
        layers += [nn.BatchNorm2d(D), nn.GELU(), nn.ConvTranspose2d(D, D, 2, 2)]
    return nn.Sequential(*layers)


class LinearHead(nn.Module):
    """A linear classifier of the last tokens: maps -> logits (B, classes, h, w), and none of an auxiliary head."""

    def __init__(self, D, classes, depth, patch, width):
        super().__init__()
        self.layers = [None]
        self.classifier = nn.Conv2d(D, classes, 1)

    def forward(self, maps):
        return self.classifier(maps[0]), None


class UperHead(nn.Module):
    """Maps of four blocks, each (B, D, h, w) -> logits at stride 4, and the auxiliary head's at the patches."""

    def __init__(self, D, classes, depth, patch, width):
        super().__init__()
        blocks = depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1  # 7, 11, 15 of 24, and the last
        self.layers = [*(max(0, n) for n in blocks), None]
        finest = round(math.log2(patch)) - 2  # patch 14 or 16: 4, 2, 1 and 1/2 times the grid; patch 8: 2, 1, 1/2, 1/4
        self.rescale = nn.ModuleList(rescale(D, finest - k) for k in range(4))
        self.pool = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(D, width, 1)) for n in (1, 2, 3, 6))
        self.pooled = conv(D + 4 * width, width, 3)
        self.lateral = nn.ModuleList(conv(D, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in range(3))
        self.join = conv(4 * width, width, 3)
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1))
        self.auxiliary = nn.Sequential(conv(D, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    def forward(self, maps):
        maps = [scale(x) for scale, x in zip(self.rescale, maps)]  # strides 4, 8, 16, 32
        coarsest = maps[3]
        pools = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pool]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        levels.append(self.pooled(torch.cat([coarsest, *pools], dim=1)))
        for k in (2, 1, 0):
            levels[k] = levels[k] + resize(levels[k + 1], levels[k].shape[2:])
        levels = [*(smooth(x) for smooth, x in zip(self.smooth, levels)), levels[3]]
        joined = self.join(torch.cat([resize(x, levels[0].shape[2:]) for x in levels], dim=1))
        return self.classifier(joined), self.auxiliary(maps[2])


class Segmenter(nn.Module):
    """An Encoder and a head. Calling it gives the training losses; `logits` is what it predicts."""

    def __init__(self, backbone, classes, head="upernet", width=512):
        super().__init__()
        c, self.backbone = backbone.vit.config, backbone
        backbone.latent_down.requires_grad_(False)  # no gradient reaches it
        self.head = {"upernet": UperHead, "linear": LinearHead}[head](c.width, classes, c.depth, c.patch, width)
        for m in self.head.modules():
            if isinstance(m, nn.Conv2d) and m.bias is not None:  # the classifiers: all others have a norm instead
                nn.init.normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)

    def outputs(self, img):
        """img (B, 3, H, W) in [0, 1], any H and W -> logits of the head, and of the auxiliary head, on their grids."""
        p = self.backbone.vit.config.patch
        h, w = (max(1, round(side / p)) for side in img.shape[2:])
        img = resize(img, (h * p, w * p))  # the nearest whole patches: 512 px are 37 patches of 14, 518 px
        tokens = self.backbone.features(img, self.head.layers)
        return self.head([F.layer_norm(x, x.shape[2:]).mT.unflatten(2, (h, w)) for x in tokens])  # maps (B, D, h, w)

    def logits(self, img):
        """img (B, 3, H, W) in [0, 1] -> (B, classes, H, W), in fp32."""
        return resize(self.outputs(img)[0].float(), img.shape[2:])

    def forward(self, img, labels):
        """img uint8 (B, 3, H, W), labels uint8 (B, H, W), IGNORED where a pixel does not count -> {name: loss}."""
        labels, counted = labels.long(), (labels != IGNORED).sum().clamp(min=1)

        def loss(logits):
            logits = resize(logits.float(), labels.shape[1:])
            return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / counted
        main, auxiliary = self.outputs(img / 255)
        return {"loss_seg": loss(main)} | ({} if auxiliary is None else {"loss_aux": 0.4 * loss(auxiliary)})


@torch.no_grad()
def slide(predict, img, crop, stride, batch=8):
    """The mean of predict(windows (b, 3, h, w)) -> (b, C, h, w) over all windows of img (3, H, W) -> (C, H, W).

    Windows are crop x crop, or what the picture has of it, and start every `stride` pixels; the last ends at the edge.
    """
    if not 0 < stride <= crop:
        raise ValueError(f"stride is {stride}, expected 1 to {crop}: windows of that side would leave gaps")
    H, W = img.shape[1:]
    h, w = min(H, crop), min(W, crop)
    starts = lambda side, length: sorted({min(k, side - length) for k in range(0, side - length + stride, stride)})
    corners = [(y, x) for y in starts(H, h) for x in starts(W, w)]
    total, seen = 0, img.new_zeros(H, W)
    for i in range(0, len(corners), batch):
        part = corners[i:i + batch]
        for (y, x), logits in zip(part, predict(torch.stack([img[:, y:y + h, x:x + w] for y, x in part]))):
            total = img.new_zeros(len(logits), H, W) if isinstance(total, int) else total
            total[:, y:y + h, x:x + w] += logits
            seen[y:y + h, x:x + w] += 1
    return total / seen


if __name__ == "__main__":
    from encoder import TEACHERS, Encoder, ViT

    for name, head in ("internvit", "upernet"), ("internvit", "linear"), ("siglip2", "upernet"), ("tiny", "upernet"):
        with torch.device("meta"):
            model = Segmenter(Encoder(ViT(TEACHERS[name])), 150, head).eval()
            logits, _ = model.outputs(torch.empty(1, 3, 512, 512))
        numbers = sum(p.numel() for p in model.head.parameters())
        print(f"{name:10s} {head:8s} {numbers / 1e6:6.2f}M parameters in the head, 512 px -> logits "
              f"{tuple(logits.shape)}")
