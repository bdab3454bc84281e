"""The paper's Fig. 5b at our scale: do pictures of one class lie together? t-SNE of what three codes say of a picture.

    python -m experiments.understanding.tsne --data tiny-imagenet-100-val.zip

Writes tsne.png and tsne.json beside this file. Every point is a picture, every colour a class: --classes of the classes
at equal distances in their sorted order, all their pictures. The codes: the mean of the last layer's tokens of the
teacher and of the tokenizer (--weights, the shipped one); a PCA of each patch with as many components as the latent
has channels, fitted on the same pictures, as the mean over the patches and with all of them one after another.

All figures are of the codes, not of the picture: centred, compared by the cosine.
    silhouette   (b - a) / max(a, b), mean over the pictures; a, b: the mean distance to the pictures of its own class,
                 and of the nearest other class. From -1 to 1, 0 is no clusters
    20-NN        percent of the pictures whose class most of the 20 nearest others have; chance is 100 / --classes
Needs matplotlib and scikit-learn (requirements-test.txt).
"""
import argparse
import io
import json
import os

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from data import ImageDataset
from decoder import patchify
from encoder import TEACHERS, Encoder, UserError, load_teacher, write_atomically
from eval import fit_patch_pca, sha256
from tools.script import SHIPPED, find_weights, run_command

HERE = os.path.dirname(os.path.relpath(__file__))


def spread_classes(labels, number):
    """`number` of the classes, at equal distances in their order."""
    classes = np.unique(labels)
    if number > len(classes):
        raise UserError(f"--classes {number}, but --data has {len(classes)}")
    return classes[np.arange(number) * len(classes) // number]


@torch.no_grad()
def codes(batches, teacher, enc):
    """{name of a code: (n, its length) numpy} of images, a list of batches (B, 3, H, W) in [0, 1]."""
    p, channels = enc.vit.config.patch, enc.latent_mean.numel()
    mean, basis = fit_patch_pca(batches, p, channels)
    pca = [((patchify(img.double(), p) - mean) @ basis).float() for img in batches]  # (B, N, channels)
    found = {"teacher": [teacher.features(img).mean(1) for img in batches],
             "UniFlow": [enc.features(img).mean(1) for img in batches],
             f"PCA, {channels} a patch: mean": [z.mean(1) for z in pca],
             f"PCA, {channels} a patch: all": [z.flatten(1) for z in pca]}
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def directions(x):
    """Centred, and each of length 1."""
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def neighbours_accuracy(x, labels, k=20):
    """Percent of the rows whose label most of the k nearest other rows have (of equally many, the smallest label)."""
    similar = x @ x.T
    np.fill_diagonal(similar, -np.inf)
    nearest = labels[np.argsort(-similar, axis=1, kind="stable")[:, :k]]  # (n, k)
    votes = (nearest[:, :, None] == np.unique(labels)).sum(1)  # (n, classes)
    return 100 * float((np.unique(labels)[votes.argmax(1)] == labels).mean())


def draw(panels, labels, names, path):
    """panels: {title: points (n, 2)}, side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.6), dpi=80, layout="constrained")
    for axis, (title, points) in zip(axes, panels.items()):
        axis.scatter(*points.T, c=labels, cmap="tab20", s=5, linewidths=0)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(128)  # fewer bytes
    write_atomically(path, lambda f: picture.save(f, "PNG", optimize=True))


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("--data", nargs="+", required=True, metavar="PATH", help="pictures by class: tiny-imagenet-100-val.zip")
    add("--weights", default=SHIPPED, metavar="FILE", help="[the shipped tokenizer]")
    add("--teacher", default="tiny", help=f"of {', '.join(TEACHERS)}, or a file [%(default)s]")
    add("--size", type=int, default=64, help="of the pictures, in pixels [%(default)s: their own]")
    add("--classes", type=int, default=15, help="how many [%(default)s]")
    add("--seed", type=int, default=0, help="of t-SNE [%(default)s]")
    add("--out", default=HERE, metavar="FOLDER", help="[beside this file]")
    args = ap.parse_args(argv)
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    enc, teacher = Encoder.from_pretrained(find_weights(args.weights)), Encoder(load_teacher(args.teacher)).eval()
    data = ImageDataset(args.data, args.size, train=False)
    chosen = np.flatnonzero(np.isin(data.labels, spread_classes(data.labels, args.classes)))
    labels = np.unique(np.asarray(data.labels)[chosen], return_inverse=True)[1]
    batches = [img / 255 for img, _ in DataLoader(Subset(data, chosen.tolist()), 50)]
    found, panels = {}, {}
    for name, x in codes(batches, teacher, enc).items():
        x = directions(x)
        found[name] = {"silhouette": float(silhouette_score(x, labels, metric="cosine")),
                       "20-NN": neighbours_accuracy(x, labels)}
        title = f"{name}\nsilhouette {found[name]['silhouette']:.3f}, 20-NN {found[name]['20-NN']:.1f}%"
        panels[title] = TSNE(init="pca", random_state=args.seed).fit_transform(x)
        print(title.replace("\n", ": "), flush=True)
    draw(panels, labels, data.classes, os.path.join(args.out, "tsne.png"))
    protocol = {"pictures": len(labels), "size": args.size, "classes": args.classes,
                "weights": os.path.basename(args.weights), "weights_sha256": sha256(args.weights),
                "teacher": args.teacher, "seed": args.seed}
    text = json.dumps({**protocol, "codes": found}, indent=1) + "\n"
    write_atomically(os.path.join(args.out, "tsne.json"), lambda f: f.write(text.encode()))


if __name__ == "__main__":
    run_command(main, "tsne.py")
