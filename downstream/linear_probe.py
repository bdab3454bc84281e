"""Linear probe: a linear classifier on a frozen encoder's features, by MAE's protocol (Table 4a).

    torchrun --nproc_per_node=8 -m downstream.linear_probe train --data imagenet/train --val imagenet/val --weights W \\
        --out probe                                                     # MAE's; --recipe paper: 100 epochs of 128
    python -m downstream.linear_probe train --teacher tiny --data train.zip --val val.zip --out control    # the teacher
    python -m downstream.linear_probe test --run probe --data imagenet/val
    python -m downstream.linear_probe predict --run probe photo.jpg     # its five likeliest classes
    python -m downstream.linear_probe bench                             # speed of a frozen ViT-L/14 at 448 px

Protocol (He et al. 2022): batch norm without gain and bias, then a linear layer; LARS without weight decay, 90 epochs
of 16,384, rate 0.1 * batch / 256, which rises over 10 epochs and then falls by half a cosine to 0; random resized crops
and mirroring, no other augmentation; the central 224 of 256 pixels, or their like at another --size, are classified.
The accuracy is that after the last epoch, not the best one. Without --eval_every and --save_every each comes once an
epoch.

Two classifiers learn from the same pass, each as if alone: of the mean of the spatial tokens ("pooled"), and, where the
model has one, of the CLS token ("cls"), both after the final norm. MAE's figure is that of CLS; the paper says neither
which one it took, nor at which size. eval.py --probe is another, quicker one: fixed features without augmentation.
"""
import argparse
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data import ImageDataset, cores, limit_aspect, to_tensor
from downstream import finetune
from downstream.bench import measure_speed
from downstream.dpt import in_fp32
from downstream.lars import LARS, BatchNorm
from encoder import TEACHERS, Encoder, UserError, ViT
from tools.job import Job
from tools.pictures import is_within, read_pictures
from tools.run import command_line
from tools.script import check_size, number, rank_and_device

# warmup: epochs over which the rate rises; blr: the rate at a batch of 256, with which it grows
RECIPES = {"mae": dict(epochs=90, batch_size=16384, blr=0.1, warmup=10),
           "paper": dict(epochs=100, batch_size=128, blr=0.1, warmup=10)}  # the paper's B.4, the rest MAE's


# ---- the model ----

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
        """img (B, 3, S, S) in [0, 1] -> {name of the features: (B, classes)}, the classifiers in fp32."""
        vit = self.backbone.vit
        with torch.no_grad():
            tokens = vit.norm(vit(img)[-1]).float()  # (B, P+N, D)
        features = {"pooled": tokens[:, vit.num_prefix:].mean(1), "cls": tokens[:, 0]}
        return {name: in_fp32(head, features[name]) for name, head in self.heads.items()}

    def forward(self, img, labels):
        """{name: cross-entropy} of uint8 images (B, 3, S, S)."""
        return {name: F.cross_entropy(x, labels) for name, x in self.logits(img / 255).items()}


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
    img = img.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else img


def centre(img, size):
    """The central size x size pixels of a PIL image whose shorter side is resized to 256/224 of that."""
    img = limit_aspect(img, 0.5)
    scale = round(size * 256 / 224) / min(img.size)
    img = img.resize([round(side * scale) for side in img.size], Image.Resampling.BICUBIC)
    left, top = (img.width - size) // 2, (img.height - size) // 2
    return img.crop((left, top, left + size, top + size))


# ---- the command line ----

def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | test | predict | bench")
    on_gpu, count = torch.cuda.is_available(), number(int, 1)
    train = commands.add_parser("train", help="train the classifiers; the same command again resumes")
    test = commands.add_parser("test", help="accuracy of a run on other images")
    predict = commands.add_parser("predict", help="the likeliest classes of pictures")
    bench = commands.add_parser("bench", help="speed of the frozen encoder with classifiers, random weights")
    for part in train, test:
        part.add_argument("--data", nargs="+", required=True, metavar="PATH", help="folders or .zip archives; a class "
                          "is the folder that an image is in")
    train.add_argument("--val", nargs="+", required=True, metavar="PATH", help="images to measure the accuracy on")
    train.add_argument("--recipe", choices=RECIPES, default="mae", help="its batch, epochs and rate [%(default)s]")
    for part in train, bench:
        part.add_argument("--size", type=count, help="pixels [the encoder's native size]")
    finetune.add_flags(train, lr=None, epochs=None, batch_size=None, micro_batch=128, weight_decay=0.0, warmup=None,
                       lr_decay=None, decay_shape="cosine", clip=0.0, frozen=True, eval_every=None, save_every=None,
                       out="probe")
    for part in test, predict:
        part.add_argument("--run", required=True, metavar="FOLDER", help="of training, or the file in it")
    for part in test, predict:
        part.add_argument("--bf16", action="store_true", default=on_gpu, help="[with a GPU]")
        part.add_argument("--fp32", dest="bf16", action="store_false", help="without TF32 [without a GPU]")
    test.add_argument("--out", metavar="FILE", help="also write the report as JSON")
    test.add_argument("--workers", type=number(int, 0), default=max(1, min(8, cores() - 1)), help="[%(default)s]")
    predict.add_argument("files", nargs="+", metavar="FILES", help="pictures, or folders of them")
    bench.add_argument("--teacher", choices=TEACHERS, default="internvit", help="whose shape [%(default)s]")
    for part in test, bench:
        part.add_argument("--batch_size", type=count, default=128, help="[%(default)s]")
    args = ap.parse_args(argv)
    if args.command == "train":
        recipe = RECIPES[args.recipe]
        args.batch_size = args.batch_size or recipe["batch_size"]
        args.epochs = args.epochs or (None if args.steps else recipe["epochs"])
        args.lr = recipe["blr"] * args.batch_size / 256 if args.lr is None else args.lr
        if args.drop_path or args.layer_decay != 1:
            train.error("--drop_path and --layer_decay are of an encoder that learns, and the probe's is frozen")
    return args


def build(config, backbone=None):
    """The Probe of a run's configuration; without a backbone with random weights."""
    return Probe(backbone or finetune.build_backbone(config), len(config["classes"]))


def train(args, on_signal=None):
    backbone = finetune.load_backbone(args)
    size = args.size or backbone.size
    check_size(size, backbone.vit.config.patch)
    data, val = ProbeImages(args.data, size, True, args.seed), ProbeImages(args.val, size, False)
    rename_classes(val, data.classes)
    if rank_and_device()[0] == 0 and any(is_within(one, other) for one in args.val for other in args.data):
        print("warning: --val lies in --data, so the accuracy is of images that were trained on", flush=True)
    steps = args.steps or max(1, args.epochs * len(data) // args.batch_size)
    recipe = RECIPES[args.recipe]
    finetune.follow_length(args, warmup=round(steps * recipe["warmup"] / recipe["epochs"]))
    finetune.follow_length(args, lr_decay=1 - min(args.warmup, steps) / steps)  # from the end of the warm-up
    epoch = max(1, len(data) // args.batch_size)
    args.eval_every, args.save_every = (epoch if x is None else x for x in (args.eval_every, args.save_every))
    args.size, config = size, {"size": size, "classes": data.classes}
    model = build(config, backbone)
    optimizer = LARS(model.heads.parameters(), args.lr, weight_decay=args.weight_decay)

    def evaluate():
        job = Job(SimpleNamespace(bf16=torch.cuda.is_available(), workers=args.workers, batch_size=args.micro_batch))
        return accuracy(job, model, val)
    finetune.train(args, model, data, evaluate, config, optimizer=optimizer, on_signal=on_signal)


def rename_classes(data, classes):
    """Give the images of a set the class numbers of training."""
    if unknown := sorted(set(data.classes) - set(classes)):
        raise UserError(f"{', '.join(data.roots)} has {len(unknown)} classes that training does not know: "
                        f"{' '.join(unknown[:5])}")
    numbers = np.array([classes.index(name) for name in data.classes])
    data.labels = numbers[data.labels]


def accuracy(job, model, data):
    """{features: % of a set's images whose class is the likeliest, features_top5: one of the five likeliest}."""
    hits = {}
    for _, img, labels in job.images("accuracy", data):
        with torch.no_grad(), job.autocast:
            logits = model.logits(img)
        for name, x in logits.items():
            right = x.cpu().topk(min(5, x.shape[1])).indices == labels[:, None]  # (b, 5)
            for key, n in (name, 1), (f"{name}_top5", 5):
                hits[key] = hits.get(key, 0) + right[:, :n].sum().item()
    parts = job.gather(hits)
    return {key: 100 * sum(part.get(key, 0) for part in parts) / len(data) for key in parts[0]}


def test(args):
    """Print the accuracy on --data. -> the report"""
    job = Job(args, *args.data)
    model, config = finetune.load_model(args.run, build, job.device)
    data = ProbeImages(args.data, config["size"], False)
    rename_classes(data, config["classes"])
    found = accuracy(job, model, data)
    protocol = f"the central {config['size']} of {round(config['size'] * 256 / 224)} pixels, {job.precision}"
    table = [f"{'features':8s}   top-1   top-5"] + [f"{name:8s}  {found[name]:6.2f}  {found[name + '_top5']:6.2f}"
                                                    for name in model.heads]
    return job.finish({"run": args.run, "step": config["step"], "data": args.data, "images": len(data), **found,
                       "protocol": protocol}, table)


def predict(args):
    """Print the five likeliest classes of each picture, by each classifier."""
    job = Job(args)
    model, config = finetune.load_model(args.run, build, job.device)
    for img, path, _ in read_pictures(args.files):
        img = to_tensor(centre(img, config["size"]))[None].to(job.device) / 255
        with torch.no_grad(), job.autocast:
            logits = model.logits(img)
        for name, x in logits.items():
            chance, best = x[0].softmax(0).topk(min(5, len(config["classes"])))
            print(f"{path}  {name}:  " + "  ".join(f"{config['classes'][k]} {100 * p:.0f}%"
                                                  for p, k in zip(chance.tolist(), best.tolist())))


def bench(args):
    """Print what training and prediction reach on this machine with random weights."""
    config = TEACHERS[args.teacher]
    size = args.size or config.size
    check_size(size, config.patch, f" of {args.teacher}")
    with rank_and_device()[2]:
        model = Probe(Encoder(ViT(config)), 1000)
        img = torch.randint(256, (args.batch_size, 3, size, size), dtype=torch.uint8)
        labels = torch.randint(1000, (args.batch_size,))
    measure_speed(f"linear probe of {args.teacher}", model, (img, labels), lambda: model.logits(img / 255),
                  {"90 epochs of ImageNet": 90 * 1_281_167, "100 epochs, the paper's": 100 * 1_281_167})


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    if args.command == "train":
        return train(args, on_signal)
    return {"test": test, "predict": predict, "bench": bench}[args.command](args)


if __name__ == "__main__":
    command_line(main, "downstream.linear_probe")
