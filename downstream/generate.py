"""Class-conditional generation: train MAR or a DiT on a tokenizer's latents, sample images, score them (Table 3b).

    python -m tools.latents stats --data TRAIN --weights W       # what the latents are normalised by, into the file W
    python -m tools.latents save --data TRAIN --weights W --out latents/ --flip          # once, with mirrored images
    torchrun --nproc_per_node=8 -m downstream.generate train --model mar-l --latents latents/ --out gen
    python -m downstream.generate sample --run gen --weights W --classes 3 7 --number 8 --cfg 3 --save grid.png
    torchrun --nproc_per_node=8 -m downstream.generate score --run gen --weights W --reference adm.npz --cfg 2 2.5 3
    python -m downstream.generate bench --model mar-l            # how fast training and sampling are on this GPU

The loss is the model's own, in mar.py or dit.py; this is training: AdamW, a warm-up, averaged weights, and a run that
resumes exactly. sample and score are in sampling.py, bench in speed.py. `train --data IMAGES --weights W` encodes on
the fly: a pass of the encoder for each step; it crops at a random place of the longer side. Training leaves
RUN/state.pt, RUN/log.jsonl, RUN/samples/*.png, and RUN/model.safetensors, which sample and score read: the averaged
weights, what the generator is, and which tokenizer its latents are of.
"""
import argparse
import copy
import os
import shlex
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import ImageDataset
from decoder import Decoder
from downstream import mar, sampling, speed
from encoder import Encoder, UserError, load_exactly, read_config, write_atomically, write_model
from eval import sha256
from tools.batches import load_batches, split_batch
from tools.checkpoint import has_checkpoint
from tools.latents import LatentDataset
from tools.optimizer import average_weights, capture_graph, join_gradients, rate_factor, take_means, update_weights
from tools.run import INTERRUPTS, Run, command_line, listen, loop, seed_step
from tools.script import check_locks, check_size, commit, default_workers, find_weights, number

# blr: the rate at a batch of 256, with which it grows; warmup: the part of the run over which it rises
MAR_RECIPE = dict(epochs=400, batch_size=2048, blr=1e-4, warmup=0.25, ema=0.9999, weight_decay=0.02, clip=3.0)
RECIPES = {
    "mar": MAR_RECIPE,  # MAR's own command: a rate of 8e-4 at its batch of 2048
    # The paper's B.3: batch 1024, EMA 0.999, rate 1e-5. That is 1/40 of what MAR takes at that batch, 4e-4: perhaps a
    # misprint of MAR's 1e-4 for 256. What the paper does not say is MAR's.
    "paper": dict(MAR_RECIPE, batch_size=1024, blr=1e-5 / 4, ema=0.999),
    "dit": dict(epochs=80, batch_size=1024, blr=5e-5, warmup=1 / 16, ema=0.9999, weight_decay=0.0, clip=1.0),
}
MAY_DIFFER = set("latents data weights init out steps epochs workers micro_batch compile graph log_every "
                 "eval_every save_every keep_every resume_anyway warmup".split())  # when a run is resumed
STATE = "model averaged optimizer step samples sums faults args id config".split()


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | sample | score | bench")
    workers = default_workers(16)
    on_gpu, count, share = torch.cuda.is_available(), number(int, 1), number(float, 0, 0.999999)
    every = dict(type=number(int, 0), metavar="STEPS")

    train = commands.add_parser("train", help="train a generator; the same command again resumes")
    add = train.add_argument  # its defaults of None are the recipe's
    add("--model", choices=sampling.MODELS, default="dit-b", help="[%(default)s]")
    add("--latents", metavar="FOLDER", help="what tools.latents save has written")
    add("--data", nargs="+", metavar="PATH", help="or images, encoded on the fly: folders or .zip archives")
    add("--weights", metavar="FILE", help="the tokenizer [with --latents the one that made them]")
    add("--init", metavar="FILE", help="for MAR: start its blocks from a released checkpoint-last.pth")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="other fields of its configuration: dropout=0")
    add("--size", type=count, help="with --data: pixels [the tokenizer's native size]")
    add("--recipe", choices=RECIPES, help="defaults [mar or dit, as the model]")
    add("--batch_size", type=count, help="global batch")
    add("--micro_batch", type=count, default=64, help="latents per rank and forward pass [%(default)s]")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="in optimizer steps")
    length.add_argument("--epochs", type=count, help="or in passes over the data")
    add("--lr", type=number(float, 0), help="AdamW's rate [the recipe's for a batch of 256, times the batch / 256]")
    add("--warmup", type=number(int, 0), metavar="STEPS", help="the first steps, over which the rate rises from 0")
    add("--lr_decay", type=number(float, 0, 1), default=0.0, metavar="FRACTION",
        help="the last part, over which it falls [none]")
    add("--decay_shape", default="linear", choices=["linear", "cosine"], help="how it falls there [%(default)s]")
    add("--ema", type=share, metavar="DECAY", help="of the averaged weights")
    add("--beta1", type=share, default=0.9, help="AdamW's momentum [%(default)s]")
    add("--beta2", type=share, default=0.95, help="AdamW's decay of the squared gradients [%(default)s]")
    add("--weight_decay", type=number(float, 0), help="of matrices and tables, outside of MAR's head")
    add("--clip", type=number(float, 0), help="gradient norm limit, 0 for none")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of initialisation, order and draws [%(default)s]")
    add("--workers", type=number(int, 0), default=workers, help="data loading processes per rank [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="[%(default)s: with a GPU]")
    add("--graph", action=argparse.BooleanOptionalAction, help="replay a DiT's micro-batch as a CUDA graph, which "
        "spares small models the time of launching kernels [with a GPU: yes]")
    add("--out", default="gen", metavar="FOLDER", help="where the run lives [%(default)s]")
    add("--log_every", type=count, default=100, metavar="STEPS", help="[%(default)s]")
    add("--eval_every", **every, default=5000, help="sample grid, also at the end [%(default)s]")
    add("--save_every", **every, default=1000, help="state.pt and model.safetensors, also at the end [%(default)s]")
    add("--keep_every", **every, help="keep a copy of the model for good [never]")
    add("--resume_anyway", action="store_true", help="resume although arguments differ")
    sampling.add_commands(commands, on_gpu, workers)
    speed.add_command(commands, on_gpu)

    args = ap.parse_args(argv)
    if args.command != "train":
        return args
    if bool(args.latents) == bool(args.data):
        train.error("give --latents FOLDER, or --data IMAGES and the tokenizer's --weights")
    if args.latents and args.size:
        train.error(f"--size {args.size} is for --data: latents are of the size at which they were saved")
    if {x.partition("=")[0] for x in args.set} & {"channels", "grid", "classes"}:
        train.error("--set: channels, grid and classes are those of the latents")
    if args.init and not args.model.startswith("mar"):
        train.error(f"--init starts a MAR from a released one, and --model is {args.model}")
    graph_fits = on_gpu and not args.model.startswith("mar")
    args.graph = graph_fits if args.graph is None else args.graph
    if args.graph and not graph_fits:
        train.error("--graph needs a GPU and a DiT: MAR masks another number of tokens at each step")
    args.recipe = args.recipe or args.model.split("-")[0]
    recipe = RECIPES[args.recipe]
    for name in recipe.keys() & vars(args).keys() - {"warmup", "epochs" if args.steps else ""}:
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    args.lr = recipe["blr"] * args.batch_size / 256 if args.lr is None else args.lr
    args.warmup_part = recipe["warmup"] if args.warmup is None else None
    return args


def build_data(args, device):
    """(data, encode, decoder or None, what the model file says of them): training data whose batches `encode` makes
    normalised latents, and the decoder that shows them."""
    if args.latents:
        data, dec = LatentDataset(args.latents, True, args.seed), None
        if args.weights or os.path.isfile(data.about["weights"]):
            weights = sampling.find_tokenizer(args.weights, data.about, args.latents)
            dec = Decoder.from_pretrained(weights).to(device)
        return data, torch.Tensor.float, dec, data.about
    weights = find_weights(args.weights)
    enc, dec = Encoder.from_pretrained(weights).to(device), Decoder.from_pretrained(weights).to(device)
    if not (enc.latent_mean.any() or (enc.latent_std != 1).any()):
        raise UserError(f"{weights} has no latent statistics yet: python -m tools.latents stats --data "
                        f"{' '.join(args.data)} --weights {weights}")
    size = args.size or read_config(weights)["size"]
    check_size(size, dec.config.patch, f" of {weights}")
    data = ImageDataset(args.data, size, True, args.seed, (1.0, 1.0))
    data.replace = False  # another image that stands in would have no label
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    @torch.no_grad()
    def encode(img):
        with autocast:
            return enc.encode(img / 255).float()
    return data, encode, dec, dict(weights=weights, weights_sha256=sha256(weights), size=size, data=args.data)


def build_optimizer(model, args):
    """AdamW; the weight decay is MAR's: not of vectors, biases and the head."""
    decays = lambda name, p: p.ndim > 1 and not name.endswith("bias") and not name.startswith("head.")
    groups = [dict(params=[p for name, p in model.named_parameters() if decays(name, p) == decayed],
                   weight_decay=args.weight_decay * decayed) for decayed in (True, False)]
    return torch.optim.AdamW(groups, args.lr, betas=(args.beta1, args.beta2), fused=True)


def setup(args, run):
    """All that a run holds, as a namespace `s`: data, model, optimizer, and in `s.now` what changes and is saved."""
    s = SimpleNamespace(args=args, run=run)
    s.micro_batch, s.accumulation = split_batch(args.batch_size, args.micro_batch, run.ranks)
    s.data, s.encode, s.decoder, about = build_data(args, run.device)
    torch.manual_seed(args.seed)
    shape = s.encode(s.data[0][0][None].to(run.device)).shape[1:]
    changes = sampling.changes(args.model, args.set)
    changes.update(channels=shape[0], grid=shape[1], classes=len(s.data.classes))
    s.model = sampling.build(args.model, **changes).to(run.device)
    begins = args.init and not has_checkpoint(args.out)
    left = mar.load_released(s.model, args.init) if begins else None
    s.averaged = copy.deepcopy(s.model).requires_grad_(False).eval()
    s.weights, s.averages = list(s.model.parameters()), list(s.averaged.parameters())
    s.optimizer = build_optimizer(s.model, args)
    run.connect()
    run.agree_on_weights(s.model)
    args.steps = args.steps or max(1, args.epochs * len(s.data) // args.batch_size)
    args.warmup = round(args.warmup_part * args.steps) if args.warmup is None else args.warmup
    args.images = f"{len(s.data):,} latents of {'x'.join(map(str, shape))} by tokenizer {about['weights_sha256'][:12]}"
    s.config = {"generator": args.model, "config": asdict(s.model.config), "classes": s.data.classes,
                **{k: about.get(k) for k in ("weights", "weights_sha256", "size", "data")}, "commit": commit()}
    s.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_gpu)  # the flow loss stays fp32
    s.flops = speed.training_flops(args.model, changes)
    s.now = run.counts(3)  # loss, gradient norm, steps
    run.say(f"data: {args.images}, {len(s.data.classes)} classes")  # args.images a resume compares
    run.say(f"model: {args.model} of {sum(p.numel() for p in s.weights) / 1e6:.1f}M parameters")
    if begins:
        run.say(f"its blocks start from {args.init}, but not {len(left)} tensors: {' '.join(left)[:80]} ..")
    run.say(f"run: {args.steps:,} steps of {args.batch_size} = micro-batch {s.micro_batch} x accumulation "
            f"{s.accumulation} x {run.ranks} rank{'s' * (run.ranks > 1)} on {run.device.type}; recipe {args.recipe}: "
            f"rate {args.lr:.2e} after {args.warmup:,} steps of warm-up, EMA {args.ema}")
    if s.decoder is None:
        run.say(f"{about['weights']} is not there, so there will be no pictures: give the tokenizer's --weights")
    if args.compile:
        s.model.compile_blocks()
    s.gradients = join_gradients(s.weights) if run.ranks > 1 else None  # what the ranks exchange
    return s


def resume(s):
    """Go on from RUN/state.pt if there is one, on all ranks from the same; whether there are steps left."""
    args, run, now, path = s.args, s.run, s.now, s.run.path("state.pt")
    if state := run.load(STATE, args, MAY_DIFFER):
        for part, module in ("model", s.model), ("averaged", s.averaged):
            load_exactly(dict(module.named_parameters()), state[part], path)
        run.restore(state, now, s.optimizer)
        if run.rank == 0:  # a run that was killed between the two has not written it
            export(s, run.path("model.safetensors"))
    if now.step >= args.steps:
        run.say(f"the run is finished: {run.path('model.safetensors')}; to extend it, give more --steps or --epochs")
    return now.step < args.steps


def micro_step(s):
    """The function that adds the gradients of a micro-batch (latent, labels), and returns its share of the loss."""
    def add_gradients(latent, labels):
        with s.autocast:
            part = s.model(latent, labels) / (s.accumulation * s.run.ranks)
        part.backward()
        return part.detach()
    if not s.args.graph:
        return add_gradients
    c, B, device = s.model.config, s.micro_batch, s.run.device
    kept = torch.zeros(B, dtype=torch.long, device=device)  # where the graph reads labels
    replay = capture_graph(lambda latent: add_gradients(latent, kept),
                           torch.zeros(B, c.channels, c.grid, c.grid, device=device),
                           lambda: s.optimizer.zero_grad(set_to_none=False))

    def replay_with(latent, labels):
        kept.copy_(labels)
        return replay(latent)
    return replay_with


def step(s, batches):
    """One optimizer step from `accumulation` micro-batches. Returns whether some rank received a signal."""
    args, now, run, loss = s.args, s.now, s.run, 0
    for group in s.optimizer.param_groups:
        group["lr"] = args.lr * rate_factor(now.step, args)
    for m in range(s.accumulation):
        batch, labels = next(batches)
        latent = s.encode(batch.to(run.device, non_blocking=True))
        labels = torch.tensor(labels).to(run.device, non_blocking=True)
        seed_step(args.seed, now.step, run.rank * s.accumulation + m)  # as in train.py
        loss = loss + s.micro_step(latent, labels)
    if run.ranks > 1:
        dist.all_reduce(s.gradients)
        dist.all_reduce(loss)
    row = update_weights(s.optimizer, s.weights, args.clip, loss[None])
    # a graph and the ranks' exchange know the gradients by their place in memory: keep it
    s.optimizer.zero_grad(set_to_none=not args.graph and run.ranks == 1)
    average_weights(s.averages, s.weights, now.step, args.ema)
    run.count(now, row, args.batch_size)
    if run.must_stop(now):
        batch = range(now.samples - args.batch_size, now.samples)
        run.stop_not_finite(now, f"{(run.last_finite[0] / run.last_finite[2]).item():.4f}",
                            [s.data.path(s.data.index(n)) for n in batch])
    return run.sum(len(INTERRUPTS))[0] > 0


def log(s, seconds_a_step):
    """A line of log.jsonl and of the screen: the means since the last one."""
    args, now, run = s.args, s.now, s.run
    loss, norm, _ = take_means(now, args.log_every)
    img_s, lr = args.batch_size / seconds_a_step, args.lr * rate_factor(now.step - 1, args)
    tflops = img_s / run.ranks * s.flops / 1e12
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.on_gpu else None
    run.write(step=now.step, loss=loss, grad_norm=norm, lr=lr, skipped=int(now.faults[0]), img_s=img_s,
              tflops_per_gpu=tflops, memory_gib=memory)
    eta = tqdm.format_interval((args.steps - now.step) * seconds_a_step)
    run.say(f"step {now.step:6d}/{args.steps} | loss {loss:.4f} | grad {norm:.2f} | lr {lr:.1e} | {img_s:,.1f} img/s | "
            f"{tflops:.3g} TFLOP/s" + (f" | {memory:.1f} GiB" if run.on_gpu else "") + f" | eta {eta}")


def evaluate(s):
    """On rank 0 images of four classes in RUN/samples/, by the averaged weights."""
    if s.run.rank == 0 and s.decoder is not None:
        with s.autocast:
            picture = sampling.look(s.averaged, s.decoder, s.data.classes, s.args.seed)
        path = s.run.path("samples", f"step_{s.now.step:07d}.png")
        write_atomically(path, lambda f: picture.save(f, "PNG"))


def export(s, path):
    """The generator as a file that says what it is."""
    write_model(path, {**s.config, "step": s.now.step, "id": s.now.id}, dict(s.averaged.named_parameters()))


def save(s):
    """Write state.pt, and the averaged model."""
    weights = lambda module: {k: p.detach() for k, p in module.named_parameters()}
    state = {**vars(s.now), "model": weights(s.model), "averaged": weights(s.averaged), "config": s.config,
             "optimizer": s.optimizer.state_dict(), "args": vars(s.args)}
    s.run.save(state, s.args.keep_every, lambda path: export(s, path))


def train(args, on_signal=None):
    """Train as the command line asks. on_signal: handles signals, once there is something to save."""
    run = Run(args.out)
    s = setup(args, run)
    run.hold_folder()  # before anything in it is read
    if not resume(s):
        return
    now, s.micro_step = s.now, micro_step(s)
    run.open_log(now.step)
    if on_signal:
        listen(on_signal)
    check_locks(args.workers)
    batches = load_batches(run, s.data, args, now, s.micro_batch)
    interrupted = loop(run, now, args, step=lambda: step(s, batches), log=lambda seconds: log(s, seconds),
                       evaluate=lambda: evaluate(s), save=lambda: save(s))
    run.end(now.step, interrupted,
            f"{run.path('model.safetensors')}; try: python -m downstream.generate sample --run "
            + shlex.quote(args.out))


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    other = {"sample": sampling.sample, "score": sampling.score, "bench": speed.bench}
    return other[args.command](args) if args.command in other else train(args, on_signal)


if __name__ == "__main__":
    command_line(main, "downstream.generate")
