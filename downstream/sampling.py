"""Images from a trained generator: sample, score and bench of downstream/generate.py, whose command line this serves.

    noise, order = a function of (seed, class c, k)      image k of class c is the same in any batch, on any rank
    latent = model.sample(labels, noise, ..)             mar.py or dit.py
    img = resize(decode(latent), 256)                    at the tokenizer's size, then resized, and rounded after that
    gFID: images with as many of each class, against the statistics of the training set; IS in 10 splits, of the same

On a GPU the network runs in bf16, where another batch size means other kernels, and so another last bit. All batches
have one size therefore: the last is filled up with images that are thrown away. Scores do not depend on the ranks.
"""
import json
import os
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import EXTENSIONS
from decoder import Decoder
from downstream import dit, mar
from encoder import MissingFile, UserError, load_exactly, one_line, write_atomically
from eval import INCEPTION_URL, frechet_distance, refuse_unless_finite, sha256
from tools.fid import FidStatistics, load_inception, read_npz, warn_of_few
from tools.job import Job
from tools.script import find_weights, number

MODELS = [*mar.SIZES, *dit.SIZES]
IMAGES = 50_000  # of Table 3b
ITERATIONS = 256  # of MAR


def kind(name):
    """The module that a model of this name is in."""
    return mar if name.startswith("mar") else dit


def build(name, **changes):
    """A generator with random weights: a key of MODELS, with fields of its configuration changed."""
    try:
        config = kind(name).config(name, **changes)
        return mar.MAR(config) if kind(name) is mar else dit.DiT(config)
    except (TypeError, ValueError) as e:
        raise UserError(f"{name} cannot be built ({one_line(e)})") from None


def changes(name, settings):
    """{field: value} of a list of FIELD=VALUE, each of the type that the configuration of that model has."""
    types, found = {f.name: f.type for f in fields(kind(name).config(name))}, {}
    for setting in settings:
        field, _, value = setting.partition("=")
        try:
            found[field] = types[field](value)
        except (KeyError, ValueError):
            known = " ".join(f"{k} ({t.__name__})" for k, t in types.items())
            raise UserError(f"--set {setting}: it takes FIELD=VALUE, for {name} of {known}") from None
    return found


def add_commands(commands, on_gpu, workers):
    """sample, score and bench for the parser of the command line."""
    sample = commands.add_parser("sample", help="images of classes: a labelled grid, a folder, or ADM's .npz")
    score = commands.add_parser("score", help="gFID and IS of a generator")
    for part in sample, score:
        add = part.add_argument
        add("--run", required=True, metavar="FOLDER", help="of training, or a generator's file")
        add("--weights", metavar="FILE", help="the tokenizer [the one whose latents it was trained on]")
        add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="[%(default)s]")
        add("--temperature", type=number(float, 0), default=1.0, help="scales the noise [%(default)s]")
        add("--resolution", type=number(int, 1), help="pixels [256, or what the tokenizer gives if that is less]")
        add_steps(part, on_gpu)
    add = sample.add_argument
    add("--cfg", type=number(float, 0), default=3.0, help="guidance, 1 for none [%(default)s]")
    add("--classes", type=int, nargs="+", metavar="CLASS", help="their numbers [all]")
    add("--number", type=number(int, 1), default=8, help="images of each [%(default)s]")
    add("--save", default="samples.png", metavar="FILE.png|FOLDER|FILE.npz", help="[%(default)s]")
    add = score.add_argument
    add("--out", metavar="FILE", help="also write the report as JSON")
    add("--reference", nargs="+", metavar="PATH", help="the training images: an .npz of statistics (mu, sigma), such "
        "as ADM's, or of images; or folders and .zip archives, which are cropped to --resolution [the generator's own]")
    add("--cfg", type=number(float, 0), nargs="+", default=[3.0],
        help="guidance; of several the best on --sweep images [3]")
    add("--images", type=number(int, 2), default=IMAGES, help="to score [%(default)s]")
    add("--sweep", type=number(int, 2), default=10_000, metavar="IMAGES", help="to choose guidance on [%(default)s]")
    add("--inception", default=INCEPTION_URL, metavar="FILE", help="pytorch-fid's file or a URL [downloaded, 91 MB]")
    add("--workers", type=number(int, 0), default=workers, help="that load the reference [%(default)s]")


def add_steps(part, on_gpu):
    """What decides the time that sampling takes, for the parser of a command."""
    add = part.add_argument
    add("--iterations", type=number(int, 1), default=ITERATIONS, help="MAR's [%(default)s]")
    add("--steps", type=number(int, 1), default=25, help="Euler's of MAR's head, Heun's of the DiT [%(default)s]")
    add("--batch_size", type=number(int, 1), default=64, help="at a time, on each rank [%(default)s]")
    add("--bf16", action="store_true", default=on_gpu, help="[with a GPU]")
    add("--fp32", dest="bf16", action="store_false", help="without TF32 [without a GPU]")
    add("--compile", action="store_true", help="worth it from some hundred images on")


def find_tokenizer(given, about, whose):
    """Path of the tokenizer of `whose` latents: the one given, or that which `about` names. UserError for another."""
    path, expected = find_weights(given) if given else about["weights"], about["weights_sha256"]
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file; give the tokenizer of {whose} with --weights")
    if sha256(path) != expected:
        raise UserError(f"{path} is not the tokenizer of {whose}, whose SHA-256 is {expected:.12}.. and not "
                        f"{sha256(path):.12}..: give that one with --weights")
    return path


def load_generator(path, device):
    """(model in eval mode, what its file says of it) of a run's folder, or a generator's file."""
    path = os.path.join(path, "model.safetensors") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise MissingFile(f"{path}: no such file; `python -m downstream.generate train` writes it")
    try:
        with safe_open(path, "pt") as f:
            info = json.loads(f.metadata()["config"])
            model = build(info["generator"], **info["config"])
            state = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is no generator of this project ({type(e).__name__}: {one_line(e)})") from None
    load_exactly(dict(model.named_parameters()), state, path)
    return model.to(device).eval(), info


def load(args, device):
    """(generator, decoder, what the generator's file says) for sample and score."""
    model, info = load_generator(args.run, device)
    if args.iterations != ITERATIONS and not isinstance(model, mar.MAR):
        raise UserError(f"--iterations {args.iterations} is MAR's, and {args.run} is a {info['generator']}: leave it "
                        "out; a DiT's number of steps is --steps")
    args.weights = find_tokenizer(args.weights, info, args.run)
    args.resolution = args.resolution or min(256, info["size"])
    if args.compile:
        model.compile_blocks()
    return model, Decoder.from_pretrained(args.weights).to(device), info


def draw(seed, c, k, config, patch):
    """For image k of class c: the noise of its latent (C, h, w), the order of its tokens (N,), and the noise that the
    tokenizer decodes from (N, 3p^2). On the CPU, as a function of these numbers alone."""
    state = np.random.SeedSequence([seed, c, k]).generate_state(1, np.uint64)
    random, N = torch.Generator().manual_seed(int(state[0])), config.grid ** 2
    noise = torch.randn(config.channels, config.grid, config.grid, generator=random)
    return noise, torch.randperm(N, generator=random), torch.randn(N, 3 * patch ** 2, generator=random)


@torch.no_grad()
def generate(model, dec, pairs, args, tick=lambda: None):
    """Images (B, 3, S, S) in [0, 1], in fp32, of pairs (class, k), as args says: seed, cfg, iterations, steps,
    temperature, resolution S (None: what the tokenizer gives)."""
    device = dec.mean.device
    draws = [draw(args.seed, c, k, model.config, dec.config.patch) for c, k in pairs]
    noise, order, decoding = (torch.stack(x).to(device) for x in zip(*draws))
    options = dict(order=order, iterations=args.iterations) if isinstance(model, mar.MAR) else {}
    latent = model.sample(torch.tensor([c for c, _ in pairs], device=device), noise, steps=args.steps, cfg=args.cfg,
                          temperature=args.temperature, tick=tick, **options)
    img = dec.decode(latent, noise=decoding).float()
    refuse_unless_finite(img, "generated images")
    if args.resolution not in (None, img.shape[2]):
        img = F.interpolate(img, size=(args.resolution,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
    return img


def images(job, model, dec, pairs, args, note):
    """Yields this rank's share of the images of pairs (class, k): (their numbers, a batch (b, 3, S, S) in [0, 1])."""
    mine, size = range(job.rank, len(pairs), job.ranks), min(args.batch_size, -(-len(pairs) // job.ranks))
    N = model.config.grid ** 2
    ticks = len(list(mar.portions(N, args.iterations))) if isinstance(model, mar.MAR) else 2 * args.steps - 1
    quiet = None if job.rank == 0 else True
    with tqdm(total=-(-len(mine) // size) * ticks, desc=note, unit="it", disable=quiet) as bar:
        for i in range(0, len(mine), size):
            numbers = list(mine[i:i + size])
            filled = [pairs[n] for n in numbers + numbers[-1:] * (size - len(numbers))]
            with job.autocast:
                img = generate(model, dec, filled, args, bar.update)
            yield numbers, img[:len(numbers)]


def to_uint8(img):
    """Images (B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3) on the CPU, rounded."""
    return (img * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def labelled_grid(img, names):
    """uint8 images (rows * k, S, S, 3) -> one PIL image: a row for each name, which stands above it."""
    S, k = img.shape[1], len(img) // len(names)
    canvas = Image.new("RGB", (k * S, len(names) * (S + 14)), "white")
    for row, name in enumerate(names):
        ImageDraw.Draw(canvas).text((2, row * (S + 14) + 1), name, fill="black", font=ImageFont.load_default(10))
        for column in range(k):
            canvas.paste(Image.fromarray(img[row * k + column]), (column * S, row * (S + 14) + 14))
    return canvas


def look(model, dec, names, seed):
    """What training shows of a generator: a PIL image of four classes, spread over all `names`, four images of each."""
    args = SimpleNamespace(cfg=3.0, seed=seed, steps=25, iterations=64, temperature=1.0, resolution=None)
    classes = sorted({i * len(names) // 4 for i in range(4)})
    img = generate(model, dec, [(c, k) for c in classes for k in range(4)], args)
    return labelled_grid(to_uint8(img), [f"{c} {names[c]}" for c in classes])


def sample(args):
    """Images of --classes, in the form that --save asks for by its ending."""
    path, one_file = args.save, args.save.endswith((".png", ".npz"))
    if not one_file and os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise UserError(f"--save {path} is there, and no empty folder: give another one")
    if not one_file and os.path.splitext(path)[1].lower() in EXTENSIONS:
        raise UserError(f"--save {path}: pictures are written as PNG: give FILE.png, FILE.npz, or a folder")
    if one_file and os.path.isdir(path):
        raise UserError(f"--save {path} is there, and no file: give another one")
    job = Job(args)
    model, dec, info = load(args, job.device)
    names, C, S = info["classes"], len(info["classes"]), args.resolution
    classes = list(range(C)) if args.classes is None else args.classes
    for c in classes:
        if not 0 <= c < C:
            raise UserError(f"--classes {c}: {args.run} has {C} classes, 0 ({names[0]}) to {C - 1} ({names[-1]})")
    pairs, part = [(c, k) for c in classes for k in range(args.number)], path + ".part"
    if job.rank == 0:
        try:
            os.makedirs(os.path.dirname(path) or "." if one_file else path, exist_ok=True)
        except OSError as e:
            raise UserError(f"--save {path} cannot be written ({e})") from None
        if one_file:  # where all ranks write
            np.lib.format.open_memmap(part, "w+", np.uint8, (len(pairs), S, S, 3))
    job.gather(None)  # it is there
    whole = np.lib.format.open_memmap(part, "r+") if one_file else None
    for numbers, img in images(job, model, dec, pairs, args, "sample"):
        for n, x in zip(numbers, to_uint8(img)):
            c, k = pairs[n]
            if one_file:
                whole[n] = x
                continue
            folder = os.path.join(path, f"{c:04d}-{names[c]}".replace(os.sep, "_"))
            os.makedirs(folder, exist_ok=True)
            write_atomically(os.path.join(folder, f"{k:05d}.png"), lambda f: Image.fromarray(x).save(f, "PNG"))
    job.gather(None)  # all have written
    if job.rank > 0:
        return
    if path.endswith(".npz"):
        labels = np.array([c for c, _ in pairs])
        write_atomically(path, lambda f: np.savez(f, arr_0=whole, arr_1=labels))
    elif one_file:
        picture = labelled_grid(whole, [f"{c} {names[c]}" for c in classes])
        write_atomically(path, lambda f: picture.save(f, "PNG"))
    if one_file:
        os.remove(part)
    print(f"{path}: {len(pairs):,} images of {len(classes)} classes at {S} px, by {info['generator']} at step "
          f"{info['step']:,}, cfg {args.cfg:g}, seed {args.seed}")


def reference_statistics(job, paths, resolution, network):
    """(mean, covariance) of an .npz, or of all images in folders and archives, and what to call it."""
    for path in paths:
        if not os.path.exists(path):
            raise MissingFile(f"{path}: no such folder, .zip or .npz; give the training images with --reference")
    names = " ".join(paths)
    data = read_npz(names) if names.endswith(".npz") and len(paths) == 1 else job.crops(paths, resolution)
    if isinstance(data, tuple):
        return data, f"the statistics in {names}"
    rated = FidStatistics(network, len(data), names)
    for n, img, _ in job.images("features of the reference", data):
        rated.add(img, n)
    return rated.of_all_ranks(job)[0], f"{len(data):,} images of {names}"


def score(args):
    """gFID and IS. Several --cfg are compared on --sweep images, the best one is scored on --images. -> the report"""
    args.fid, wanted = True, args.cfg  # an error of load_inception is not to propose to leave it out
    job = Job(args, *(args.reference or []), args.inception)
    model, dec, info = load(args, job.device)
    network, name = load_inception(job)
    if network is None:
        raise UserError("gFID and IS need --inception")
    paths = args.reference or info.get("data")
    if not paths:
        raise UserError(f"{args.run} does not say what images it was trained on: give them with --reference")
    reference, against = reference_statistics(job, paths, args.resolution, network)
    C = len(info["classes"])

    def rate(cfg, total):
        """{guidance, images, gfid, is, is_std} of `total` images, image i of class i mod C."""
        args.cfg = cfg
        rated = FidStatistics(network, total, "--images")
        for numbers, img in images(job, model, dec, [(i % C, i // C) for i in range(total)], args, f"cfg {cfg:g}"):
            rated.add((img * 255).round() / 255, numbers)
        statistics, (mean, deviation) = rated.of_all_ranks(job)
        if statistics[1].shape != reference[1].shape:
            raise UserError(f"{' '.join(paths)} has a covariance of {tuple(reference[1].shape)}, these features one of "
                            f"{tuple(statistics[1].shape)}: both must be of one network")
        return {"cfg": cfg, "images": total, "gfid": frechet_distance(*reference, *statistics), "is": mean,
                "is_std": deviation}
    rows = [rate(cfg, min(args.sweep, args.images)) for cfg in wanted] if len(wanted) > 1 else []
    best = min(rows, key=lambda row: row["gfid"])["cfg"] if rows else wanted[0]
    if not rows or args.sweep < args.images:
        rows.append(rate(best, args.images))
    steps = f"{args.iterations} iterations of {args.steps} Euler steps" if isinstance(model, mar.MAR) else \
        f"{args.steps} Heun steps"
    protocol = (f"image i of class i mod {C}, noise and order from (seed {args.seed}, class, number); {steps}, "
                f"temperature {args.temperature:g}, {job.precision}; made at {info['size']} px, resized to "
                f"{args.resolution} (bicubic, antialiased), then rounded to uint8; against {against}; IS in "
                f"{min(10, args.images)} splits by a fixed permutation; {name}")
    table = [f"{'cfg':>5s}   images      gFID             IS"]
    table += [f"{r['cfg']:5g}  {r['images']:7,}  {r['gfid']:8.3f}  {r['is']:6.2f} +- {r['is_std']:.2f}" for r in rows]
    return job.finish({"generator": info["generator"], "run": args.run, "step": info["step"], "weights": args.weights,
                       "weights_sha256": info["weights_sha256"], "results": rows, "protocol": protocol,
                       "warning": warn_of_few(min(row["images"] for row in rows))}, table)
