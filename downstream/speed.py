"""How fast a generator trains and samples on this machine, with random weights: `python -m downstream.generate bench`.

Beside each figure stands its share of what a large matrix product reaches in the same run, which can be compared
between machines. FLOPs are those of matrix products and attention, as torch counts them on a model without memory.
"""
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from downstream import dit, mar
from downstream.sampling import IMAGES, MODELS, add_steps, build, changes, kind
from tools.script import number
from tools.speed import matrix_ceiling, seconds

IMAGENET = 1_281_167  # training images
MASKED = 0.867  # of the tokens, on average over MAR's training


def training_flops(name, changes):
    """Matrix-product FLOPs of one latent of a training step: three times the forward pass. MASKED is for MAR."""
    with torch.device("meta"):
        model = build(name, **changes)
    c = model.config
    latent = torch.empty(1, c.channels, c.grid, c.grid, device="meta")
    with FlopCounterMode(display=False) as flops:
        model(latent, torch.zeros(1, dtype=torch.long, device="meta"), *([MASKED] if kind(name) is mar else []))
    return 3 * flops.get_total_flops()


def sampling_flops(name, changes, cfg, iterations, steps):
    """Matrix-product FLOPs of sampling one latent. 16 of MAR's iterations stand for all: 256 take minutes to count."""
    with torch.device("meta"):
        model = build(name, **changes).eval()
    c = model.config
    noise = torch.empty(1, c.channels, c.grid, c.grid, device="meta")
    labels = torch.zeros(1, dtype=torch.long, device="meta")

    def count(*options):
        with FlopCounterMode(display=False) as flops:
            model.sample(labels, noise, *options, cfg=cfg)
        return flops.get_total_flops()
    if kind(name) is dit:
        return count(steps)
    order = torch.empty(1, c.grid ** 2, dtype=torch.long, device="meta")
    one, two = (count(order, 16, n) for n in (1, 2))  # two - one: the head once on all tokens
    return (2 * one - two) * iterations / 16 + (two - one) * steps


def add_command(commands, on_gpu):
    """bench for the parser of the command line."""
    part = commands.add_parser("bench", help="speed of training and sampling, with random weights")
    add = part.add_argument
    add("--model", choices=MODELS, required=True)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of its configuration [64 channels on 32 x 32]")
    add("--cfg", type=number(float, 0), default=3.0, help="guidance, 1 for none [%(default)s]")
    add_steps(part, on_gpu)


def bench(args):
    """Print what training and sampling reach on this machine with random weights, beside a large matrix product."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, autocast = device.type == "cuda", torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    changed = changes(args.model, args.set)
    side, ceiling = matrix_ceiling(device)
    model, B = build(args.model, **changed).to(device), args.batch_size
    c = model.config
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {args.model} on latents of "
          f"{c.channels}x{c.grid}x{c.grid}; a matrix product of {side} reaches {ceiling / 1e12:.3g} TFLOP/s",
          flush=True)
    if args.compile or on_gpu:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    latent = torch.randn(B, c.channels, c.grid, c.grid, device=device)
    labels = torch.arange(B, device=device) % c.classes
    ratio = [MASKED] if isinstance(model, mar.MAR) else []  # cuDNN plans attention anew for each number of tokens, once

    def row(what, flops, took):
        print(f"{what:44s} | {B / took:8.4g} img/s | {B * flops / took / 1e12:6.4g} TFLOP/s | "
              f"{B * flops / took / ceiling:.3f} of the ceiling"
              + (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""), flush=True)

    def train_step():
        with autocast:
            loss = model(latent, labels, *ratio)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    took = seconds(train_step)
    row(f"training, batch {B}", training_flops(args.model, changed), took)
    epoch = IMAGENET / B * took / 3600
    print(f"  extrapolated: {400 * epoch:,.0f} hours for 400 epochs of ImageNet, {80 * epoch:,.0f} for 80")
    optimizer = None
    model.eval().requires_grad_(False)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    order = torch.rand(B, c.grid ** 2, device=device).argsort(1)

    def run(iterations):
        with autocast:
            if isinstance(model, mar.MAR):
                return model.sample(labels, latent, order, iterations, args.steps, args.cfg)
            return model.sample(labels, latent, args.steps, args.cfg)
    run(args.iterations)  # compiles, and plans attention for each number of tokens
    start = time.perf_counter()
    run(args.iterations).sum().item()
    took = time.perf_counter() - start
    what = f"{args.iterations} x {args.steps}" if isinstance(model, mar.MAR) else f"{args.steps} Heun steps"
    row(f"sampling, batch {B}, {what}, cfg {args.cfg:g}",
        sampling_flops(args.model, changed, args.cfg, args.iterations, args.steps), took)
    print(f"  extrapolated: {IMAGES / B * took / 3600:.2f} hours for {IMAGES:,} images")
