"""Train the semantic teachers of this study: a ViT-S/8 (small) or ViT-Ti/8 (tiny) classifier of Tiny-ImageNet-100.

    python -m experiments.tiny_imagenet.teacher small --data TRAIN.zip .. --val VAL.zip \
        --out weights/teacher-small.safetensors

All pictures, of 64 px, lie on the device and are augmented there: random resized crop, flip, colour, and mixup or
cutmix of some batches. The head reads the mean of the spatial tokens after the final norm. Only the trunk is kept, as a
self-describing file that `train.py --teacher FILE` reads. The script prints the top-1 accuracy of the whole validation
set after every tenth of the run, but keeps the last weights: nothing is chosen by that accuracy.
"""
import argparse
import math
import os
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from data import ImageDataset, cores
from encoder import TEACHERS, UserError, ViT, write_model
from tools.optimizer import capture_graph
from tools.script import commit, run_command


def load(paths, size, workers):
    """All images of a data set on the CPU: uint8 (n, 3, size, size), labels (n,), class names."""
    data = ImageDataset(paths, size, train=False)
    batches = list(DataLoader(data, 500, num_workers=workers))
    return torch.cat([img for img, _ in batches]), torch.cat([y for _, y in batches]), data.classes


def augment(img, scale=(0.35, 1.0)):
    """uint8 (B, 3, S, S) -> float in [0, 1]: a random crop, with a share of the area within `scale`, is resized; then
    flip, brightness, contrast, saturation."""
    B, device = len(img), img.device

    def uniform(low, high):
        return low + (high - low) * torch.rand(B, device=device)  # (B,)

    area = uniform(*scale)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x = (1 - w) * uniform(-1, 1)
    y = (1 - h) * uniform(-1, 1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(w)
    theta = torch.stack([torch.stack([w * flip, zero, x], 1), torch.stack([zero, h, y], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, img.shape, align_corners=False)
    img = F.grid_sample(img / 255, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (uniform(0.6, 1.4).view(B, 1, 1, 1) for _ in range(3))
    img = img * brightness
    img = img.mean((1, 2, 3), keepdim=True).lerp(img, contrast)
    return img.mean(1, keepdim=True).lerp(img, saturation).clamp(0, 1)


def mix(img, labels):
    """Mixup or cutmix, half each, of a batch of images (B, 3, S, S) and soft labels (B, classes) with its reverse."""
    share, S = np.random.random(), img.shape[2]
    if np.random.random() < 0.5:  # cutmix
        side = int(S * math.sqrt(1 - share))
        top, left = np.random.randint(S - side + 1, size=2)
        square = ..., slice(top, top + side), slice(left, left + side)
        reverse, img = img.flip(0), img.clone()
        img[square] = reverse[square]
        share = 1 - side ** 2 / S ** 2
    else:
        img = share * img + (1 - share) * img.flip(0)
    return img, share * labels + (1 - share) * labels.flip(0)


class Classifier(nn.Module):
    def __init__(self, config, classes):
        super().__init__()
        self.vit, self.head = ViT(config), nn.Linear(config.width, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, img):
        tokens = self.vit.norm(self.vit(img)[-1])  # (B, prefix + N, D)
        return self.head(tokens[:, self.vit.num_prefix:].mean(1))  # (B, classes)


def build_optimizer(args, model):
    """AdamW, whose weight decay is for matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def gradient_step(args, model, optimizer, autocast, labels):
    """A function of a batch of images in [0, 1] that computes the gradients of the loss against `labels`, a tensor that
    the caller fills, and returns the loss. On a GPU it is a CUDA graph."""
    device = labels.device
    on_gpu = device.type == "cuda"
    network = torch.compile(model, dynamic=False) if on_gpu else model

    def step(img):
        if not on_gpu:  # the graph overwrites the gradients
            optimizer.zero_grad()
        with autocast:
            logits = network(img)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        return loss.detach()

    if not on_gpu:
        return step
    size = model.vit.config.size
    return capture_graph(step, torch.zeros(args.batch_size, 3, size, size, device=device), optimizer.zero_grad)


@torch.no_grad()
def top1(model, images, labels, autocast):
    """The accuracy in percent on uint8 images (n, 3, S, S)."""
    model.eval()
    with autocast:
        found = torch.cat([model(part / 255).argmax(1) for part in images.split(500)])
    model.train()
    return 100 * found.eq(labels).double().mean().item()


def train(args, model, images, labels, val_images, val_labels, start):
    """Train the classifier. Returns its accuracy at the end."""
    device = images.device
    optimizer = build_optimizer(args, model)
    steps_an_epoch = len(images) // args.batch_size
    steps = args.epochs * steps_an_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1, cycle_momentum=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    classes = model.head.out_features
    batch_labels = torch.zeros(args.batch_size, classes, device=device)
    gradients = gradient_step(args, model, optimizer, autocast, batch_labels)
    for step in range(steps):
        place = step % steps_an_epoch * args.batch_size  # in the order of the epoch
        if place == 0:
            order = torch.randperm(len(images), device=device)
        chosen = order[place:place + args.batch_size]
        img, soft = augment(images[chosen]), F.one_hot(labels[chosen], classes).float()
        if np.random.random() < args.mix:
            img, soft = mix(img, soft)
        batch_labels.copy_(soft)
        loss = gradients(img)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            accuracy = top1(model, val_images, val_labels, autocast)
            print(f"step {step + 1:6d}/{steps} | loss {loss.item():.3f} | top-1 {accuracy:.2f}% "
                  f"| {time.time() - start:.0f} s", flush=True)
    return accuracy


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = ap.add_argument
    add("name", choices=["small", "tiny"])
    add("--data", nargs="+", required=True, metavar="PATH", help="training archives")
    add("--val", nargs="+", required=True, metavar="PATH")
    add("--out", required=True, metavar="FILE", help="the trunk, .safetensors, fp16")
    add("--epochs", type=int, default=100)
    add("--batch_size", type=int, default=512)
    add("--lr", type=float, default=1e-3)
    add("--weight_decay", type=float, default=0.05)
    add("--mix", type=float, default=0.5, help="share of the batches that mixup or cutmix mixes [%(default)s]")
    add("--drop_path", type=float, help="[0.1 for small, 0 for tiny]")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=cores())
    args = ap.parse_args(argv)
    if args.drop_path is None:
        args.drop_path = {"small": 0.1, "tiny": 0.0}[args.name]
    start, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = TEACHERS[args.name]
    *images, classes = load(args.data, config.size, args.workers)
    *val_images, val_classes = load(args.val, config.size, args.workers)
    if val_classes != classes:
        raise UserError("--val has other classes than --data: give folders or archives of the same classes")
    if len(images[0]) < args.batch_size:
        raise UserError(f"--data has {len(images[0])} images, less than a batch: give --batch_size")
    images, labels, val_images, val_labels = (x.to(device) for x in (*images, *val_images))
    print(f"{len(images):,} images of {len(classes)} classes, read in {time.time() - start:.0f} s")
    model = Classifier(config, len(classes)).to(device)
    model.vit.drop_path = args.drop_path
    accuracy = train(args, model, images, labels, val_images, val_labels, start)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    about = {"vit": asdict(config), "classes": classes, "top1": accuracy, "epochs": args.epochs, "seed": args.seed,
             "commit": commit()}
    write_model(args.out, about, {name: x.half() for name, x in model.vit.named_parameters()})
    print(f"{args.out}: top-1 {accuracy:.2f}% on {len(val_images):,} validation images")


if __name__ == "__main__":
    run_command(main, "experiments.tiny_imagenet.teacher")
