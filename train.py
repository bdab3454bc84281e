"""Train UniFlow (Sec. 3): a student encoder that stays near its frozen teacher, and a pixel flow decoder, end to end.

    L = lambda_d L_dist + lambda_f L_flow            eq. 6; L_dist is in distill.py, L_flow in decoder.py

    python train.py                                  # a laptop: tiny, drawn pictures, about three minutes on two cores
    python train.py --data train.zip --val val.zip   # your own pictures: folders or .zip archives
    torchrun --nproc_per_node=8 train.py --teacher internvit --data imagenet/train --val imagenet/val
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py --teacher internvit --data ...
    python train.py --teacher internvit --bench      # only measure speed and memory, without data

The same command again resumes from out/state.pt, to the same result. Leaves out/model.safetensors, out/log.jsonl,
out/samples/*.png, and out/bad_images.txt if pictures could not be read. SIGTERM, SIGINT, SIGHUP, SIGUSR1 save and stop.
"""
import argparse
import copy
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import uuid
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import distill
from data import ImageDataset, ProceduralDataset, collate, cores, sample_numbers, split_batch
from decoder import Decoder, DecoderConfig, sample_t
from encoder import (TEACHERS, Encoder, UserError, ViT, fetch, load_exactly, load_teacher, parameter_groups, read_config,
                     teacher_config, write_atomically, write_model)
from eval import (SAVE_AND_STOP, check_locks, commit, ignore_signals, open_streams, rank_and_device, spread,
                  user_message, validate)

try:
    import fcntl
except ImportError:  # Windows: what this file defines can be imported, main says that it cannot run
    fcntl = None

# The paper's Tables 6-9 for the foundation models (where they and the text disagree on the batch, the text's 512); small
# and tiny are ours. micro_batch: images a GPU holds at once, for 80 GB.
PAPER = dict(lr=2e-4, lr_decay=0.0, latent_dim=64, gtb_depth=6, flow_depth=12, flow_width=1024, batch_size=512, micro_batch=32,
             epochs=30, endpoint=0.0)
OURS = dict(lr_decay=0.5, size=64, latent_dim=16, gtb_depth=3, flow_depth=6, batch_size=256, micro_batch=256, steps=20_000, endpoint=0.0)
RECIPES = {
    "internvit": dict(PAPER, size=448),
    "internvit-v2_5": dict(PAPER, size=448),
    "dinov2": dict(PAPER, size=378),
    "dinov2-reg": dict(PAPER, size=378),
    "siglip2": dict(PAPER, size=256, micro_batch=64, flow_width=1152),
    "siglip2-l": dict(PAPER, size=256, micro_batch=64),
    "clip": dict(PAPER, size=224, micro_batch=128),
    "small": dict(OURS, lr=5e-4, flow_width=512),
    "tiny": dict(OURS, lr=1e-3, flow_width=384),
}
# small and tiny without a GPU. Differs from the authors: in 400 steps their times leave t = 1, where one-step decoding looks, almost
# untrained (16.6 dB on drawn pictures against 19.9), and a constant rate ends in noise (19.1 dB against 22.5).
ON_CPU = dict(batch_size=8, micro_batch=8, steps=400, endpoint=0.5)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "4090": 165, "3090": 71}  # dense bf16
MAY_DIFFER = set("data val out steps epochs workers micro_batch compile log_every eval_every save_every keep_every "
                 "max_bad_images resume_anyway bench".split())  # when a run is resumed; not images, val_images
STATE = "encoder decoder optimizer latent_mean latent_std step samples sums faults bad args id config".split()  # of state.pt
TOO_MANY_SKIPPED = 10  # steps in a row with a loss or gradient that is not finite
INTERRUPTS = []  # signals that asked the run to save and stop


def parse_args(argv=None):
    """The command line, completed by the teacher's recipe: everything that decides a run is in the result."""
    ap = argparse.ArgumentParser(add_help=False, epilog="Run the same command again to resume.")
    ap.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS,
                    help="show this, with the defaults of the teacher that --teacher names")
    add = ap.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="training images: folders or .zip archives [drawn pictures]")
    add("--val", nargs="+", metavar="PATH", help="images to evaluate on during training")
    add("--size", type=int, help="training size in pixels, a multiple of the patch [%(default)s]")
    add("--crop_scale", type=float, nargs=2, default=[0.8, 1.0], metavar=("MIN", "MAX"), help="random crop, fractions of the short side %(default)s")
    add("--max_bad_images", type=float, default=0.01, metavar="FRACTION", help="stop if more of the training images cannot be read [%(default)s]")
    add("--workers", type=int, help="data loading processes per rank "
        "[%(default)s: cores / ranks, at most 16; 1 without a GPU]")
    add = ap.add_argument_group("model").add_argument
    add("--teacher", default="tiny", help=f"{' '.join(TEACHERS)}, or a self-describing .safetensors file [%(default)s]")
    add("--teacher_weights", metavar="PATH|random", help="its weights in any published layout, or random [the published file, downloaded]")
    add("--init", metavar="FILE", help="start from this tokenizer (a file, or uniflow-internvit) instead of a copy of the teacher")
    add("--latent_dim", type=int, help="latent channels [%(default)s]")
    add("--projector", default="mlp", choices=["mlp", "linear"], help="latent projections [%(default)s]")
    add("--gtb_depth", type=int, help="global transformer blocks, 0 for none [%(default)s]")
    add("--flow_depth", type=int, help="residual blocks of the flow head [%(default)s]")
    add("--flow_width", type=int, help="width of the flow head [%(default)s]")
    add("--decoder", default="flow", choices=["flow", "pixel"], help="pixel regresses the pixels, Table 5c [%(default)s]")
    add = ap.add_argument_group("method").add_argument
    add("--strategy", default="adaptive", choices=distill.STRATEGIES, help="layer weights, Table 5a [%(default)s]")
    add("--beta", type=float, default=2.0, help="temperature of eq. 1 [%(default)s]")
    add("--lambda_d", type=float, default=1.0, help="weight of the distillation loss [%(default)s]")
    add("--lambda_f", type=float, default=1.0, help="weight of the flow loss [%(default)s]")
    add("--endpoint", type=float, help="fraction of patches trained at exactly t = 1, where one-step decoding "
        "evaluates [%(default)s]")
    add("--freeze_encoder", action="store_true", help="train only the projection and the decoder")
    add = ap.add_argument_group("optimization").add_argument
    add("--batch_size", type=int, help="global batch [%(default)s]")
    add("--micro_batch", type=int, help="images per rank and forward pass [%(default)s]")
    length = ap.add_argument_group("length of the run").add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="in optimizer steps [%(default)s]")
    length.add_argument("--epochs", type=int, help="or in passes over the data [%(default)s]")
    add("--lr", type=float, help="AdamW learning rate [%(default)s]")
    add("--lr_decay", type=float, metavar="FRACTION", help="the last part of the run, over which the rate falls linearly to 0, and rises "
        "again if --steps extend it [%(default)s]")
    add("--decay_shape", default="linear", choices=["linear", "cosine"], help="how the rate falls in that part [%(default)s]")
    add("--warmup", type=int, default=0, metavar="STEPS", help="the first steps, over which the rate rises linearly from 0 [%(default)s]")
    add("--beta1", type=float, default=0.5, help="AdamW's momentum [%(default)s]")
    add("--beta2", type=float, default=0.95, help="AdamW's decay of the squared gradients [%(default)s]")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="average the weights over the steps, and evaluate and export the averages; "
        "state.pt holds both; 0 for none [%(default)s]")
    add("--encoder_lr_scale", type=float, default=1.0, help="times lr for the pretrained encoder [%(default)s]")
    add("--weight_decay", type=float, default=0.0, help="of linear and convolution weights; the paper is silent [%(default)s]")
    add("--clip", type=float, default=1.0, help="gradient norm limit, 0 for none; the paper is silent [%(default)s]")
    add("--drop_path", type=float, default=0.0, help="stochastic depth of the student [%(default)s]")
    add("--seed", type=int, default=0, help="of initialisation, sample order, crops, times and noise [%(default)s]")
    add = ap.add_argument_group("machine").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="compile the blocks, and on "
        "a single GPU replay the step as a CUDA graph [%(default)s: with a GPU]")
    add("--checkpoint_activations", action="store_true", help="recompute blocks in the backward pass: less memory, slower")
    add = ap.add_argument_group("output").add_argument
    add("--out", default="out", metavar="FOLDER", help="where the run lives [%(default)s]")
    add("--log_every", type=int, default=50, metavar="STEPS", help="[%(default)s]")
    add("--eval_every", type=int, default=1000, metavar="STEPS", help="evaluation and sample grid, also at the end; "
        "0: only there [%(default)s]")
    add("--save_every", type=int, default=1000, metavar="STEPS", help="state.pt and model.safetensors, also at the "
        "end; 0: only there [%(default)s]")
    add("--keep_every", type=int, metavar="STEPS", help="keep a copy of the model for good [never]")
    add("--resume_anyway", action="store_true", help="resume although arguments differ")
    add("--bench", action="store_true", help="only measure the speed and memory of the step, without data")
    args = ap.parse_args(argv)

    config = teacher_config(args.teacher)
    own = dict(PAPER, size=config.size, flow_width=max(1024, config.width))  # a teacher of one's own: the paper's recipe
    workers = max(1, min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if torch.cuda.is_available() else 1
    recipe = {**RECIPES.get(args.teacher, own), "workers": workers}
    if args.teacher in ("small", "tiny") and not torch.cuda.is_available():
        recipe.update(ON_CPU)
    if hasattr(args, "help"):
        ap.description = f"Train a UniFlow tokenizer. In brackets: the defaults, here of --teacher {args.teacher}."
        ap.set_defaults(**{"steps": "-", "epochs": "-", **recipe})
        ap.print_help()
        sys.exit()
    if args.steps or args.epochs:
        recipe = {k: v for k, v in recipe.items() if k not in ("steps", "epochs")}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    at_least_1 = "size batch_size micro_batch steps epochs latent_dim flow_depth flow_width log_every"
    at_least_0 = ("workers gtb_depth beta lambda_d lambda_f lr encoder_lr_scale weight_decay clip eval_every "
                  "save_every keep_every warmup")
    for low, high, names in (
            (1, math.inf, at_least_1), (0, math.inf, at_least_0), (0, 1, "endpoint lr_decay max_bad_images"),
            (0, 0.9, "drop_path"), (0, 0.999999, "beta1 beta2 ema"), (0, 2 ** 63 - 1, "seed")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:  # also catches nan
                ap.error(f"--{name} is {value}; it must be at least {low}" + f" and at most {high}" * (high < math.inf))
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        ap.error(f"--crop_scale is {args.crop_scale}; it is two fractions above 0, at most 1, the smaller first")
    if args.size % config.patch:
        near = max(1, round(args.size / config.patch)) * config.patch
        ap.error(f"--size {args.size} is no multiple of the patch {config.patch} of teacher {args.teacher}: try --size {near}")
    return args


def rate_factor(step, args):
    """What the learning rates are multiplied by at step 0, 1, ..: the warm-up times the decay over the last part of the run."""
    left = min(1.0, (args.steps - step) / max(1.0, args.lr_decay * args.steps))
    if args.decay_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return left * min(1.0, (step + 1) / max(1, args.warmup))


def average_weights(averages, weights, step, decay):
    """Move the averages (a list of tensors) toward the weights after step 0, 1, ..: a <- d a + (1 - d) w. The first steps forget
    faster, d = min(decay, (step + 1) / (step + 10)), so that the initial weights do not stay in a short run's average."""
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (step + 1) / (step + 10)))


def losses(teacher, encoder, decoder, img, args, t=None, noise=None):
    """Section 3 on one micro-batch: img (B, 3, H, W) in [0, 1] -> L_dist, L_flow, layer weights (L,), distances (L,)."""
    P, p = teacher.num_prefix, teacher.config.patch
    with torch.no_grad():
        h_teacher = teacher(img)  # H_T: L x (B, P+N, D)
    z, h_student = encoder(img)  # z (B, C, h, w) = P_down(H_U^(L)); H_U: L x (B, P+N, D)
    loss_dist, weight, alpha = distill.distill_loss(h_student, h_teacher, args.beta, args.strategy, P)  # spatial tokens only
    if t is None:
        t = sample_t((len(img), img.shape[2] * img.shape[3] // p ** 2), args.endpoint, img.device)  # per patch (B, N)
    loss_flow = decoder(z, img, t, noise)
    return loss_dist, loss_flow, weight, alpha


def seed_step(*numbers):
    """Make all random draws that follow (times, noise, stochastic depth) a function of these integers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def model_flops(encoder, decoder, size):
    """Matrix-product FLOPs of one image of a training step: teacher 1 x, student and decoder 3 x (forward and backward)."""
    with torch.device("meta"):
        enc, dec = Encoder(ViT(encoder.vit.config), encoder.latent_dim, encoder.projector), Decoder(decoder.config)
        img = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as teacher_flops:
        enc.vit(img)
    with FlopCounterMode(display=False) as tokenizer_flops:
        dec(enc(img)[0], img)
    return teacher_flops.get_total_flops() + 3 * tokenizer_flops.get_total_flops()


def record(micro_step, img, clear):
    """micro_step (uint8 image batch -> statistics) as a CUDA graph: recorded once, then replayed on each batch of that shape.
    clear() sets the gradients back before: where it leaves None, the graph will write them, and add to those it finds.

    Python launches the kernels of a small model one by one more slowly than the GPU runs them.
    """
    img, side = img.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and let the libraries set up
        for _ in range(3):
            micro_step(img)
    torch.cuda.current_stream().wait_stream(side)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = micro_step(img)

    def replay(batch, last=True):
        img.copy_(batch)
        graph.replay()
        return stats
    return replay


def training_step(args, teacher, encoder, decoder, optimizer, autocast, micro_batch, accumulation, ranks=1):
    """The training step: micro_step, which adds a micro-batch's gradients, and update, the optimizer's turn after the last."""
    device, trained = decoder.mean.device, [p for group in optimizer.param_groups for p in group["params"]]
    on_gpu = device.type == "cuda"
    graphed = args.compile and on_gpu and ranks == 1
    overwrites = graphed and accumulation == 1  # the last step's gradients: one pass less over them, and nothing to clear
    if args.compile:  # block by block: all blocks of a kind share one compilation
        for block in (*teacher.blocks, *encoder.vit.blocks, *decoder.blocks, decoder.head):
            block.compile(dynamic=False)
        distill.cosine = torch.compile(distill.cosine, dynamic=False)
    student, flow_decoder = encoder, decoder
    if ranks > 1:  # the teacher stays outside
        student, flow_decoder = (DistributedDataParallel(m, [device] if on_gpu else None, gradient_as_bucket_view=True) for m in (encoder, decoder))
        student.require_forward_param_sync = flow_decoder.require_forward_param_sync = False  # all buffers are constants

    def micro_step(img, last=True):
        """Add the gradients of a uint8 micro-batch; returns L_flow, L_dist, alpha and w of each layer, (2 + 2L,)."""
        student.require_backward_grad_sync = flow_decoder.require_backward_grad_sync = last
        with autocast:
            loss_dist, loss_flow, weight, alpha = losses(teacher, student, flow_decoder, img / 255, args)
            loss = args.lambda_d * loss_dist + args.lambda_f * loss_flow  # eq. 6
        (loss / accumulation).backward()
        return torch.cat([torch.stack([loss_flow, loss_dist]), alpha, weight]).detach()

    def update(stats):
        """Clip the gradients, step, and clear them; returns the step's statistics, their norm, and 1. If any of these is not
        finite (on one rank, so on all), the weights and the optimizer stay as they are."""
        row = torch.cat([stats, torch.nn.utils.clip_grad_norm_(trained, args.clip or math.inf)[None], torch.ones_like(stats[:1])])
        optimizer.found_inf = (~row.isfinite().all()).float()  # where GradScaler tells a fused optimizer, without a wait for the GPU
        optimizer.step()
        if not overwrites:
            optimizer.zero_grad(set_to_none=not graphed)  # a graph writes where it was recorded
        return row

    if graphed:
        micro_step = record(micro_step, torch.zeros(micro_batch, 3, args.size, args.size, dtype=torch.uint8, device=device),
                            lambda: optimizer.zero_grad(set_to_none=overwrites))
    return micro_step, update


def seconds(f, repeats=10):
    """Mean wall-clock time of f(), after calls to warm up; on a CPU of a single one."""
    for n in (3, repeats) if torch.cuda.is_available() else (1, 1):
        start = time.perf_counter()
        for _ in range(n):
            f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def bench(args, teacher, encoder, decoder, optimizer, autocast, ranks, say):
    """Print what the training step does in a second on random pictures: several micro-batches, modes, and its parts."""
    device, n, on_gpu = decoder.mean.device, args.micro_batch, torch.cuda.is_available()
    side, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    ceiling, tflop = 2 * side ** 3 / seconds(lambda: a @ b, 50) / 1e12, model_flops(encoder, decoder, args.size) / 1e12
    say(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {args.teacher} at {args.size} px, {tflop:.2f} TFLOP "
        f"an image, {ranks} rank{'s' * (ranks > 1)}; a matrix product of {side} reaches {ceiling:.3g} TFLOP/s")

    def row(name, images, took):
        rate = images / took
        say(f"{name:36s} | {rate * ranks:8,.1f} img/s | {took * 1e3:7.1f} ms | {rate * tflop:6.4g} TFLOP/s a GPU | "
            f"{rate * tflop / ceiling:.3f} of the ceiling" + (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""))

    rows = [(n, 1, False, False), (max(n // 2, 1), 1, args.compile, False), (2 * n, 1, args.compile, False),
            (max(n // 4, 1), 1, args.compile, True), (n, 1, args.compile, True), (n, 1, args.compile, False)]
    if ranks > 1:
        rows = [(n, 1, args.compile, False), (n, 2, args.compile, False)]
    for micro, accumulation, compiled, checkpointed in rows:
        args.compile = compiled
        encoder.vit.checkpoint = decoder.checkpoint = checkpointed
        took = micro_step = None  # frees the last row's graph
        optimizer.zero_grad()
        torch.compiler.reset()
        name = f"{micro:4d} x {accumulation}{'' if compiled else ', not compiled'}{', checkpoint_activations' * checkpointed}"
        try:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            img = torch.randint(256, (micro, 3, args.size, args.size), dtype=torch.uint8, device=device)
            micro_step, update = training_step(args, teacher, encoder, decoder, optimizer, autocast, micro, accumulation, ranks)
            took = seconds(lambda: update(sum(micro_step(img, m == accumulation - 1) for m in range(accumulation))))
            row(name, micro * accumulation, took)
        except torch.OutOfMemoryError:
            say(f"{name:36s} | out of memory")
    if ranks > 1 or not took:
        return

    # the last row's parts, one after the other
    adding = seconds(lambda: micro_step(img))
    row(f"{args.batch_size} images a step (micro-batch x {args.batch_size / n:g})", args.batch_size, args.batch_size / n * adding + took - adding)
    micro_step = None  # frees its graph
    with autocast:
        x = img / 255
        h_teacher, (z, h) = teacher(x), encoder(x)
        z, h = z.detach().requires_grad_(), [y.detach().requires_grad_() for y in h]

        def student():
            y, hidden = encoder(x)
            torch.autograd.backward([y, *hidden], [z, *h])
        parts = {"teacher": lambda: teacher(x), "student": student, "decoder": lambda: decoder(z, x).backward(),
                 "distance": lambda: torch.autograd.grad(distill.distill_loss(h, h_teacher, args.beta, args.strategy, teacher.num_prefix)[0], h)}
        times = {name: 1e3 * seconds(part) for name, part in parts.items()} | {"optimizer": 1e3 * (took - adding)}
    optimizer.zero_grad()
    say("parts: " + ", ".join(f"{name} {t:.1f} ms" for name, t in times.items()) + f"; sum {sum(times.values()):.1f} ms of {1e3 * took:.1f}")


def export(state, path):
    """The self-describing tokenizer file of a state."""
    weights = state.get("averaged", state)  # with --ema the averages
    tensors = {f"{part}.{k}": v for part in ("encoder", "decoder") for k, v in weights[part].items()}
    tensors.update(latent_mean=state["latent_mean"], latent_std=state["latent_std"])
    write_model(path, {**state["config"], "step": state["step"], "id": state["id"]}, tensors)


def load_state(path, args):
    """The checkpoint of an earlier run in the same folder. UserError names the arguments that differ."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if set(state) - {"averaged"} != set(STATE):
            raise KeyError("not what train.py saves")
    except Exception as e:  # torch.load raises many types; all mean that the file is not what train.py wrote
        if user_message(e):  # but not a disk's trouble
            raise
        raise UserError(f"{path} is damaged or no checkpoint of train.py ({type(e).__name__}); move it away to start "
                        "afresh") from None
    changed = [f"{k} was {v}, is now {getattr(args, k, None)}" for k, v in state["args"].items()
               if k not in MAY_DIFFER and v != getattr(args, k, None)]
    if changed and not args.resume_anyway:
        raise UserError(f"{path} is of another run ({'; '.join(changed)}): use another --out, or --resume_anyway")
    return state


def restore(state, path, encoder, decoder, optimizer, averaged={}):
    """Copy a checkpoint's weights and the optimizer's moments; learning rate and weight decay are this command's, not the file's."""
    load_exactly(dict(encoder.named_parameters()), state["encoder"], path)
    load_exactly(dict(decoder.named_parameters()), state["decoder"], path)
    for part, module in averaged.items():  # a run that begins to average does so from its weights
        load_exactly(dict(module.named_parameters()), state.get("averaged", state)[part], path)
    ours = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as e:  # of --resume_anyway with another --freeze_encoder
        raise UserError(f"{path} has the optimizer of other parameters ({e}): use another --out") from None
    for group, settings in zip(optimizer.param_groups, ours):
        group.update(settings)


def set_aside(folder):
    """Rename what a run without state.pt has left, so that nothing is overwritten or appended to."""
    for name in "log.jsonl", "bad_images.txt", "model.safetensors", "model_[0-9]*.safetensors", os.path.join("samples", "step_[0-9]*.png"):
        for path in glob.glob(os.path.join(glob.escape(folder), name)):
            aside = path + ".old"
            while os.path.exists(aside):
                aside += ".old"
            os.replace(path, aside)


def open_log(path, step):
    """The log to append to, without lines that are later than the checkpoint at `step` or that a crash has torn."""
    def kept(line):
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False
    if os.path.exists(path):
        with open(path, errors="replace") as f:
            lines = [line for line in f if kept(line)]
        write_atomically(path, lambda f: f.write("".join(lines).encode()))
    return open(path, "a")


def finite(x):
    """x with None for each number in it that JSON has no word for."""
    if isinstance(x, (dict, list)):
        return {k: finite(v) for k, v in x.items()} if isinstance(x, dict) else [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_names(path, names):
    write_atomically(path, lambda f: f.write("".join(name + "\n" for name in names).encode(errors="surrogateescape")))


def build_data(args):
    """(training set, evaluation set, what to call it): --val, else other drawn pictures, else the training images."""
    data = ImageDataset(args.data, args.size, True, args.seed, tuple(args.crop_scale)) if args.data else ProceduralDataset(args.size, True, args.seed)
    if not (args.val or args.data):
        return data, ProceduralDataset(args.size, False, args.seed), "other drawn pictures"
    val = ImageDataset(args.val or args.data, args.size, False)
    val.replace = not args.val  # training images that cannot be read do not stop the run, those of --val must be readable
    if args.val and os.environ.get("RANK", "0") == "0":  # of which the first evaluation would tell much later
        for n in spread(len(val)):
            val[n]
    return data, val, " ".join(args.val) if args.val else "the training images"


def build_models(args):
    """(teacher, encoder, decoder) as the arguments say: the student is a copy of its teacher, or both parts are from --init."""
    teacher = load_teacher(args.teacher, args.teacher_weights)
    torch.manual_seed(args.seed)
    c = teacher.config
    encoder = Encoder(copy.deepcopy(teacher), args.latent_dim, args.projector)
    decoder = Decoder(DecoderConfig(
        latent_dim=args.latent_dim, width=c.width, heads=c.heads, gtb_depth=args.gtb_depth, flow_depth=args.flow_depth,
        flow_width=args.flow_width, patch=c.patch, grid=args.size // c.patch, projector=args.projector,
        objective=args.decoder, pixel_stats=c.pixel_stats))
    if args.init:
        wanted = {**asdict(c), **asdict(decoder.config)}
        path = fetch(args.init)
        encoder, decoder = Encoder.from_pretrained(path), Decoder.from_pretrained(path)
        have = {**asdict(encoder.vit.config), **asdict(decoder.config)}
        differ = [f"{k} {have[k]}, not {wanted[k]}" for k in have if have[k] != wanted[k] and k != "grid"]  # grids are resized
        if differ:
            raise UserError(f"{args.init} has {', '.join(differ)}: pass what it was trained with")
        if (encoder.latent_mean.any() or (encoder.latent_std != 1).any()) and os.environ.get("RANK", "0") == "0":
            print(f"{args.init} has latent statistics: set back, as training moves the latent; afterwards run eval.py --latent_stats again")
        for module in (encoder, decoder):
            module.latent_mean.zero_()
            module.latent_std.fill_(1)
    encoder.vit.requires_grad_(not args.freeze_encoder)
    encoder.vit.norm.requires_grad_(False)  # the distances are taken before it, so L_flow alone would move it, and features() with it
    encoder.vit.drop_path = args.drop_path
    encoder.vit.checkpoint = decoder.checkpoint = args.checkpoint_activations
    return teacher, encoder.train(), decoder.train()


def save(args, config, now, encoder, decoder, optimizer, averaged={}):
    """Write state.pt, which alone is enough to resume, and the tokenizer exported from it."""
    weights = lambda module: {k: p.detach() for k, p in module.named_parameters()}
    state = {**vars(now), "encoder": weights(encoder), "decoder": weights(decoder), "optimizer": optimizer.state_dict(),
             "latent_mean": encoder.latent_mean.flatten(), "latent_std": encoder.latent_std.flatten(), "args": vars(args), "config": config}
    if averaged:
        state["averaged"] = {part: weights(module) for part, module in averaged.items()}
    path = os.path.join(args.out, "state.pt")
    try:
        if args.keep_every and now.step % args.keep_every == 0:  # first, as a resume from this step would not write it again
            export(state, os.path.join(args.out, f"model_{now.step:07d}.safetensors"))
        write_atomically(path, lambda f: torch.save(state, f))
        export(state, os.path.join(args.out, "model.safetensors"))
    except (OSError, RuntimeError) as e:
        why = e if isinstance(e, OSError) else e.__context__  # torch.save on a full disk raises its own
        if not isinstance(why, OSError):
            raise
        raise UserError(f"step {now.step} could not be saved ({why}); {path}, if there is one, is of the last save and "
                        "whole: make room, and run the same command again") from None


def lock_folder(folder):
    """Make the folder, and in it a file whose lock keeps a second run out. The system lets go of it when this process
    ends, however it ends."""
    try:
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w")
    except OSError as e:
        raise UserError(f"--out {folder} is no folder to write to ({e})") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, EACCES
        raise UserError(f"another run is writing to {folder}: wait for it, or use another --out") from None
    except OSError as e:  # a file system without locks
        print(f"{folder} cannot be locked ({e}): nothing keeps a second run out of it")
    for name in os.listdir(folder):  # what a run that was killed has half written, not what another process writes now
        path = os.path.join(folder, name)
        if re.fullmatch(r"\.[0-9a-f]{12}\.tmp", name) and time.time() - os.path.getmtime(path) > 600:
            os.remove(path)
    return lock


def stop_as_not_finite(args, data, now, last_finite, rank):
    """After too many skipped steps in a row: name the last batch in a file, and say from where to go on."""
    files = [data.path(data.index(n)) for n in range(now.samples - args.batch_size, now.samples)] if args.data else ["drawn pictures"]
    names = os.path.join(args.out, "not_finite.txt")
    if rank == 0:
        write_names(names, files)
    flow, distance, *_ = (last_finite / last_finite[-1]).tolist()  # nan if there was none since the start
    raise UserError(f"at step {now.step} the loss or its gradient is not finite, {int(now.faults[1])} steps in a row "
                    f"(the last finite one: flow {flow:.4f}, distillation {distance:.4f}); the last batch is "
                    f"{', '.join(files[:3])} .. (all of it in {names}). The last save is "
                    f"{os.path.join(args.out, 'state.pt')}: the same command with a lower --lr and "
                    "--resume_anyway goes on from there")


def as_text(x, steps, peak, eta):
    """A training line of log.jsonl, to be read: alpha and w of the first, middle and last layer. peak: the GPU's TFLOP/s, or None."""
    three = lambda layers: " ".join(f"{layers[l]:.3f}" for l in (0, len(layers) // 2, -1))
    return (f"step {x['step']:6d}/{steps} | loss {x['loss']:.4f} | flow {x['loss_flow']:.4f} | dist {x['loss_dist']:.4f} "
            f"| alpha {three(x['alpha'])} | w {three(x['weight'])} | grad {x['grad_norm']:.2f} | lr {x['lr']:.1e} "
            f"| {x['img_s']:,.{int(x['img_s'] < 100)}f} img/s | {x['tflops_per_gpu']:.1f} TFLOP/s"
            + (f" ({x['tflops_per_gpu'] / peak:.0%} of peak)" if peak else "")
            + (f" | {x['memory_gib']:.1f} GiB" if x["memory_gib"] else "") + (f" | {x['skipped']} steps skipped" if x["skipped"] else "")
            + f" | eta {tqdm.format_interval(eta)}")


def main(argv=None, on_signal=None):
    """Train as the command line asks. on_signal handles the signals that end a run from where there is something to save."""
    args = parse_args(argv)
    if fcntl is None:
        raise UserError("it needs a POSIX system, whose locks keep a second run out of --out: use Linux, macOS or WSL")

    # one process per GPU (torchrun), or a single process
    rank, ranks, device = rank_and_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)  # losses and ODE state stay fp32

    def say(text):
        if rank == 0:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:  # nobody reads any more: head, a tee that died
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                INTERRUPTS.append(signal.SIGPIPE)

    # data (a wrong path is said before anything is downloaded), teacher, student, decoder, optimizer
    micro_batch, accumulation = split_batch(args.batch_size, args.micro_batch, ranks)
    data, val, val_name = (None, None, None) if args.bench else build_data(args)
    teacher, encoder, decoder = (m.to(device) for m in build_models(args))
    groups = [parameter_groups(module, args.lr * scale, args.weight_decay) for module, scale in
              ((encoder.vit, args.encoder_lr_scale), (encoder.latent_down, 1.0), (decoder, 1.0))]
    optimizer = torch.optim.AdamW(sum(groups, []), betas=(args.beta1, args.beta2), fused=True)
    models, averaged = {"encoder": encoder, "decoder": decoder}, {}  # the latter: what --ema keeps
    if args.ema:
        averaged = {part: copy.deepcopy(module).requires_grad_(False) for part, module in models.items()}
        averages, weights = zip(*[(a, p) for part, module in models.items()
                                  for a, p in zip(averaged[part].parameters(), module.parameters()) if p.requires_grad])
    if ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        control = dist.new_group(backend="gloo")  # what the ranks must agree on, without a wait for the GPU
    if args.bench:
        return bench(args, teacher, encoder, decoder, optimizer, autocast, ranks, say)
    args.steps = args.steps or max(1, args.epochs * len(data) // args.batch_size)
    args.images, args.val_images = (  # a resume compares them: how many, and their names below --data and --val
        f"{len(x):,} images" + (f" ({hashlib.sha256(x.names).hexdigest()[:8]})" if paths else "")
        for x, paths in ((data, args.data), (val, args.val)))
    L, grid = len(teacher.blocks), args.size // teacher.config.patch
    config = {"vit": asdict(teacher.config), "decoder": asdict(decoder.config), "size": args.size, "teacher": args.teacher,
              "teacher_weights": args.teacher_weights, "commit": commit()}  # what the exported file says of itself
    state_path, model_path, log_path, bad_path = (os.path.join(args.out, f) for f in ("state.pt", "model.safetensors", "log.jsonl", "bad_images.txt"))
    if rank == 0:
        lock = lock_folder(args.out)  # before anything is read: its state.pt may be replaced meanwhile
    state = load_state(state_path, args) if os.path.isfile(state_path) else None
    say(f"data: {len(data):,} {'images' if args.data else 'procedurally drawn pictures (no --data)'} at {args.size} px; evaluation on {val_name}")
    say(f"model: student of {sum(p.numel() for p in encoder.parameters()) / 1e6:.1f}M and decoder of "
        f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.1f}M parameters; latent {args.latent_dim}x{grid}x{grid}")
    say(f"run: {args.steps:,} steps of {args.batch_size} = micro-batch {micro_batch} x accumulation {accumulation} x {ranks} "
        f"rank{'s' * (ranks > 1)} on {device.type}")
    if micro_batch < min(args.micro_batch, args.batch_size // ranks):
        say(f"micro_batch {args.micro_batch} does not divide a rank's share of {args.batch_size // ranks}: using {micro_batch}")

    # resume: rank 0 decides from where, all ranks agree
    here = [state["id"], state["step"]] if state else [None, 0]
    start = list(here)
    if ranks > 1:
        dist.broadcast_object_list(start, group=control)
    if here != start:
        raise UserError(f"rank {rank} sees another {state_path} than rank 0: --out must lie on a file system that all "
                        "nodes share")
    now = SimpleNamespace(  # what state.pt holds beside weights, optimizer and arguments
        id=here[0] or uuid.uuid4().hex[:12], step=here[1], samples=0,
        bad=[],  # numbers of the images that could not be read, in the order found
        sums=torch.zeros(4 + 2 * L, dtype=torch.float64, device=device),  # since the last log line: statistics, gradient norm, steps
        faults=torch.zeros(2, device=device))  # steps skipped, and skipped in a row
    if state:
        restore(state, state_path, encoder, decoder, optimizer, averaged)
        now.samples, now.bad, now.sums, now.faults = state["samples"], state["bad"], state["sums"].to(device), state["faults"].to(device)
        say(f"resumed from {state_path} at step {now.step:,}")
        try:
            exported = read_config(model_path)
        except UserError:  # absent or damaged: state.pt is enough to write it again
            exported = {}
        if rank == 0 and (exported.get("id"), exported.get("step")) != (now.id, now.step):
            say(f"{model_path} is not of that step (it is of {exported.get('step', 'none')}): written again")
            export(state, model_path)
        del state
    if now.step >= args.steps:
        longer = f"--epochs {math.ceil(2 * now.samples / len(data))}" if args.epochs else f"--steps {2 * now.step}"
        say(f"the run is finished: {model_path}; to extend it, the same command with {longer}")
        return
    if rank == 0:
        if now.step == 0:
            set_aside(args.out)
        log = open_log(log_path, now.step)

    def write(**line):
        if rank == 0:
            try:
                print(json.dumps(finite(line), allow_nan=False), file=log, flush=True)
            except OSError as e:
                raise UserError(f"{log_path} cannot be written ({e}): make room, and run the same command again, which "
                                "goes on from the last save") from None

    micro_step, update = training_step(args, teacher, encoder, decoder, optimizer, autocast, micro_batch, accumulation, ranks)
    for number in SAVE_AND_STOP if on_signal else ():
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # of nohup
            signal.signal(number, on_signal)
    check_locks(2 * args.workers)  # those of training and of an evaluation
    flops = model_flops(encoder, decoder, args.size)
    peak = next((v for k, v in PEAK_TFLOPS.items() if on_gpu and k in torch.cuda.get_device_name()), None)
    loader = iter(DataLoader(data, num_workers=args.workers, pin_memory=on_gpu, prefetch_factor=4 if args.workers else None, worker_init_fn=ignore_signals, collate_fn=collate,
                             batch_sampler=sample_numbers(now.samples, args.batch_size, micro_batch, rank, ranks, args.steps - now.step)))
    bar = tqdm(total=args.steps, initial=now.step, desc="train", unit="step", disable=None if rank == 0 else True)
    rates = [group["lr"] for group in optimizer.param_groups]
    tick, timed, interrupted = time.time(), 0, 0
    last_finite = now.sums  # statistics of the last step that was
    while now.step < args.steps and not interrupted:
        # one training step
        factor = rate_factor(now.step, args)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
        stats, unread = 0, set()
        for m in range(accumulation):
            img, labels = next(loader)
            unread.update(-1 - y for y in labels if y < 0)  # so data.py tells of a picture that another stands in for
            seed_step(args.seed, now.step, m, rank)
            stats = stats + micro_step(img.to(device, non_blocking=True), m == accumulation - 1) / accumulation
        if ranks > 1:
            dist.all_reduce(stats)  # alpha and w are equal on all ranks
        row = update(stats / ranks)
        if averaged:
            average_weights(averages, weights, now.step, args.ema)
        skip = ~row.isfinite().all()
        now.sums += torch.where(skip, 0, row)
        last_finite = torch.where(skip, last_finite, row)
        now.faults = torch.stack([now.faults[0] + skip, (now.faults[1] + 1) * skip])
        now.step, now.samples, timed = now.step + 1, now.samples + args.batch_size, timed + 1
        bar.update()

        # faults: pictures that cannot be read, losses that are not finite, signals
        news = torch.tensor([len(INTERRUPTS), len(unread.difference(now.bad))])
        if ranks > 1:
            dist.all_reduce(news, group=control)
        interrupted, found = news.tolist()
        if found:
            everyones = [unread] * ranks
            if ranks > 1:
                dist.all_gather_object(everyones, unread, group=control)
            now.bad.extend(sorted(set().union(*everyones).difference(now.bad)))
            if rank == 0:
                write_names(bad_path, [data.path(i) for i in now.bad])
            say(f"{len(now.bad)} of {len(data):,} images cannot be read, others stand in for them: see {bad_path}")
            if len(now.bad) > args.max_bad_images * len(data):
                raise UserError(f"{len(now.bad)} of {len(data):,} images cannot be read, more than --max_bad_images "
                                f"{args.max_bad_images} allows: see {bad_path}")
        if (not on_gpu or now.step % 10 == 0) and now.faults[1] >= TOO_MANY_SKIPPED:
            stop_as_not_finite(args, data, now, last_finite, rank)

        # log, evaluate, save; all three also at the end
        due = lambda every: now.step == args.steps or every and now.step % every == 0
        logging, evaluating, saving = due(args.log_every), due(args.eval_every), due(args.save_every) or due(args.keep_every)
        if logging:
            loss_flow, loss_dist, *layers, grad_norm, _ = (now.sums / now.sums[-1]).tolist()
            seconds_a_step = (time.time() - tick) / timed
            img_s = args.batch_size / seconds_a_step
            line = dict(step=now.step, loss=args.lambda_d * loss_dist + args.lambda_f * loss_flow, loss_flow=loss_flow, loss_dist=loss_dist,
                        alpha=layers[:L], weight=layers[L:], grad_norm=grad_norm, lr=args.lr * factor, skipped=int(now.faults[0]), img_s=img_s,
                        tflops_per_gpu=img_s / ranks * flops / 1e12, memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None)
            say(as_text(line, args.steps, peak, (args.steps - now.step) * seconds_a_step))
            write(**line)
            if now.step % args.log_every == 0:
                now.sums = torch.zeros_like(now.sums)
        if evaluating:
            try:
                quality, flow_by_t, picture = validate(*(averaged or models).values(), val, micro_batch, args.seed, autocast, args.workers,
                                                       rank, ranks)
            except Exception:
                if rank == 0:
                    save(args, config, now, encoder, decoder, optimizer, averaged)
                raise
            say(f"eval {now.step:6d} | one-step PSNR {quality:.2f} dB on {val_name} | flow loss by tenth of t, image to noise: "
                + " ".join(f"{x:.3f}" for x in flow_by_t))
            write(kind="eval", step=now.step, psnr=quality, flow_by_t=flow_by_t, on=val_name)
            if rank == 0:
                write_atomically(os.path.join(args.out, "samples", f"step_{now.step:06d}.png"), lambda f: Image.fromarray(picture).save(f, "PNG"))
        if (saving or interrupted) and rank == 0:
            save(args, config, now, encoder, decoder, optimizer, averaged)
        if logging or evaluating or saving:
            tick, timed = time.time(), 0
    bar.close()
    if interrupted:
        write(kind="interrupted", step=now.step)
        say(f"interrupted and saved at step {now.step:,}: the same command goes on from there")
    else:
        say(f"done: {model_path}, pictures in {os.path.join(args.out, 'samples')}; try: python sample.py YOUR.png --weights {model_path}")
    if rank == 0:
        log.close(), lock.close()


def interrupt(number, frame):
    """Save and stop after this step; a second Ctrl-C stops at once (of SIGTERM torchrun may hand on a second one)."""
    INTERRUPTS.append(number)
    if INTERRUPTS.count(signal.SIGINT) > 1:
        os._exit(128 + number)


def run():
    """main() for the command line, which ends the process. After an exception at once: Python would wait for the loader's workers,
    which ignore signals, and a process group for the other ranks."""
    open_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & has children ignore
    who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    try:
        main(on_signal=interrupt)
        if dist.is_initialized():  # it must end on all ranks together
            dist.barrier()
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:  # before the first step
        status = 130
    except Exception as e:
        if said := user_message(e):
            print(f"{who}train.py: {said}", file=sys.stderr)
        else:
            traceback.print_exc()
        status = 2 if said else 1
    sys.stdout.flush(), sys.stderr.flush()
    if fcntl:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's, which would complain
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


if __name__ == "__main__":
    run()
