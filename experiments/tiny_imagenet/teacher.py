"""Train the semantic teachers of this study: a ViT-S/8 (small) or ViT-Ti/8 (tiny) classifier of Tiny-ImageNet-100 at 64 px.

    python experiments/tiny_imagenet/teacher.py small --data TRAIN.zip ... --val VAL.zip --out weights/teacher-small.safetensors

All pictures lie on the device and are augmented there: random resized crop, flip, colour, and mixup or cutmix of some batches.
The head reads the mean of the spatial tokens after the final norm; only the trunk is kept, as a self-describing file that
`train.py --teacher FILE` reads. Prints the top-1 accuracy of the whole validation set after every tenth of the run; the last
weights are kept, nothing is chosen by it.
"""
import argparse
import math
import os
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import ImageDataset, cores
from encoder import TEACHERS, ViT, write_model
from tools.optimizer import capture_graph
from tools.script import commit


def load(paths, size, workers):
    """All images of a data set on the CPU: uint8 (n, 3, size, size), labels (n,), class names."""
    data = ImageDataset(paths, size, train=False)
    batches = list(DataLoader(data, 500, num_workers=workers))
    return torch.cat([img for img, _ in batches]), torch.cat([y for _, y in batches]), data.classes


def augment(img, scale=(0.35, 1.0)):
    """uint8 (B, 3, S, S) -> float in [0, 1]: a random crop of that share of the area resized, flips, brightness, contrast, saturation."""
    B, device = len(img), img.device
    rand = lambda low, high: low + (high - low) * torch.rand(B, device=device)
    area, ratio = rand(*scale), rand(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (1 - w) * rand(-1, 1), (1 - h) * rand(-1, 1)
    flip, zero = torch.where(rand(0, 1) < 0.5, -1.0, 1.0), torch.zeros_like(w)
    theta = torch.stack([torch.stack([w * flip, zero, x], 1), torch.stack([zero, h, y], 1)], 1)  # (B, 2, 3)
    x = F.grid_sample(img / 255, F.affine_grid(theta, img.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    factor = lambda: rand(0.6, 1.4).view(B, 1, 1, 1)
    x = x * factor()
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, factor())
    return x.mean(1, keepdim=True).lerp(x, factor()).clamp(0, 1)


def mix(x, soft):
    """Mixup or cutmix, half each, of a batch of images (B, 3, S, S) and soft labels (B, classes) with its reverse."""
    share, S = np.random.random(), x.shape[2]
    if np.random.random() < 0.5:  # cutmix
        side = int(S * math.sqrt(1 - share))
        top, left = np.random.randint(S - side + 1, size=2)
        x = x.clone()
        x[:, :, top:top + side, left:left + side] = x.flip(0)[:, :, top:top + side, left:left + side]
        share = 1 - side ** 2 / S ** 2
    else:
        x = share * x + (1 - share) * x.flip(0)
    return x, share * soft + (1 - share) * soft.flip(0)


class Classifier(nn.Module):
    def __init__(self, config, classes):
        super().__init__()
        self.vit, self.head = ViT(config), nn.Linear(config.width, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, img):
        return self.head(self.vit.norm(self.vit(img)[-1])[:, self.vit.num_prefix:].mean(1))  # mean of the spatial tokens


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("name", choices=["small", "tiny"])
    ap.add_argument("--data", nargs="+", required=True, metavar="PATH", help="training archives")
    ap.add_argument("--val", nargs="+", required=True, metavar="PATH")
    ap.add_argument("--out", required=True, metavar="FILE", help="the trunk, .safetensors, fp16")
    ap.add_argument("--epochs", type=int, default=100)
    ap.add_argument("--batch_size", type=int, default=512)
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--weight_decay", type=float, default=0.05)
    ap.add_argument("--mix", type=float, default=0.5, help="share of the batches that mixup or cutmix mixes [%(default)s]")
    ap.add_argument("--drop_path", type=float, default=None, help="[0.1 for small, 0 for tiny]")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--workers", type=int, default=cores())
    args = ap.parse_args()
    start, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed), np.random.seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = TEACHERS[args.name]
    train_x, train_y, classes = load(args.data, config.size, args.workers)
    val_x, val_y, val_classes = load(args.val, config.size, args.workers)
    assert val_classes == classes, "validation and training classes differ"
    train_x, train_y, val_x, val_y = (x.to(device) for x in (train_x, train_y, val_x, val_y))
    print(f"{len(train_x):,} images of {len(classes)} classes, read in {time.time() - start:.0f} s")

    model = Classifier(config, len(classes)).to(device)
    model.vit.drop_path = args.drop_path if args.drop_path is not None else 0.1 * (args.name == "small")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)
    steps = args.epochs * (len(train_x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1, cycle_momentum=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    soft_labels = torch.zeros(args.batch_size, len(classes), device=device)

    def gradients(img):
        with autocast:
            logits = step_model(img)
        loss = F.cross_entropy(logits.float(), soft_labels, label_smoothing=0.1)
        loss.backward()
        return loss.detach()

    step_model = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    if device.type == "cuda":  # as a CUDA graph, which overwrites the gradients
        img = torch.zeros(args.batch_size, 3, config.size, config.size, device=device)
        gradients = capture_graph(gradients, img, optimizer.zero_grad)
    top1 = lambda: 100 * torch.cat([model(x / 255).argmax(1) for x in val_x.split(500)]).eq(val_y).double().mean().item()
    for step in range(1, steps + 1):
        if (step - 1) % (len(train_x) // args.batch_size) == 0:
            order = torch.randperm(len(train_x), device=device)
        i = order[(step - 1) % (len(train_x) // args.batch_size) * args.batch_size:][:args.batch_size]
        img, soft = augment(train_x[i]), F.one_hot(train_y[i], len(classes)).float()
        if np.random.random() < args.mix:
            img, soft = mix(img, soft)
        soft_labels.copy_(soft)
        if device.type == "cpu":
            optimizer.zero_grad()
        loss = gradients(img)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps:
            model.eval()
            with torch.no_grad(), autocast:
                accuracy = top1()
            model.train()
            print(f"step {step:6d}/{steps} | loss {loss.item():.3f} | top-1 {accuracy:.2f}% | {time.time() - start:.0f} s", flush=True)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    about = {"vit": asdict(config), "classes": classes, "top1": accuracy, "epochs": args.epochs, "seed": args.seed, "commit": commit()}
    write_model(args.out, about, {k: v.half() for k, v in model.vit.named_parameters()})
    print(f"{args.out}: top-1 {accuracy:.2f}% on {len(val_x):,} validation images")


if __name__ == "__main__":
    main()
