"""Train UniFlow (Sec. 3): a student encoder that stays near its frozen teacher, and a pixel flow decoder, end to end.

    L = lambda_d L_dist + lambda_f L_flow            eq. 6; L_dist is in distill.py, L_flow in decoder.py

    python train.py                                  # a laptop: tiny, drawn pictures, about three minutes on two cores
    python train.py --data train.zip --val val.zip   # your own pictures: folders or .zip archives
    torchrun --nproc_per_node=8 train.py --teacher internvit --data imagenet/train --val imagenet/val
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py --teacher internvit --data ...

The same command again resumes from out/state.pt, to the same result. Leaves out/model.safetensors, out/log.jsonl,
out/samples/*.png, and out/bad_images.txt if pictures could not be read. SIGTERM, SIGINT, SIGHUP, SIGUSR1 save and stop.
"""
import argparse
import copy
import hashlib
import math
import os
import sys
import time
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
from encoder import (TEACHERS, Encoder, UserError, ViT, fetch, load_exactly, load_teacher, parameter_groups,
                     read_config, teacher_config, write_atomically, write_model)
from tools.run import INTERRUPTS, Run, command_line, listen, load_checkpoint, restore_optimizer, saving, write_names
from tools.script import check_locks, commit, ignore_signals
from tools.validate import spread, validate

# The paper's Tables 6-9 for the foundation models (where they and the text disagree on the batch, the text's 512);
# small and tiny are ours. micro_batch: images a GPU holds at once, for 80 GB.
PAPER = dict(lr=2e-4, lr_decay=0.0, latent_dim=64, gtb_depth=6, flow_depth=12, flow_width=1024, batch_size=512,
             micro_batch=32, epochs=30, endpoint=0.0)
OURS = dict(lr_decay=0.5, size=64, latent_dim=16, gtb_depth=3, flow_depth=6, batch_size=256, micro_batch=256,
            steps=20_000, endpoint=0.0)
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
# small and tiny without a GPU. Differs from the authors: in 400 steps their times leave t = 1, where one-step decoding
# looks, almost untrained (16.6 dB on drawn pictures against 19.9), and a constant rate ends in noise (19.1 dB to 22.5).
ON_CPU = dict(batch_size=8, micro_batch=8, steps=400, endpoint=0.5)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "4090": 165,
               "3090": 71}  # dense bf16
MAY_DIFFER = set("data val out steps epochs workers micro_batch compile log_every eval_every save_every keep_every "
                 "max_bad_images resume_anyway".split())  # when a run is resumed; not images, val_images
STATE = "encoder decoder optimizer latent_mean latent_std step samples sums faults bad args id config".split()
TOO_MANY_SKIPPED = 10  # steps in a row with a loss or gradient that is not finite


def parse_args(argv=None):
    """The command line, completed by the teacher's recipe: everything that decides a run is in the result."""
    ap = argparse.ArgumentParser(add_help=False, epilog="Run the same command again to resume.")
    ap.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS,
                    help="show this, with the defaults of the teacher that --teacher names")
    add = ap.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="PATH", help="training images: folders or .zip archives [drawn pictures]")
    add("--val", nargs="+", metavar="PATH", help="images to evaluate on during training")
    add("--size", type=int, help="training size in pixels, a multiple of the patch [%(default)s]")
    add("--crop_scale", type=float, nargs=2, default=[0.8, 1.0], metavar=("MIN", "MAX"),
        help="random crop, fractions of the short side %(default)s")
    add("--max_bad_images", type=float, default=0.01, metavar="FRACTION",
        help="stop if more of the training images cannot be read [%(default)s]")
    add("--workers", type=int, help="data loading processes per rank "
        "[%(default)s: cores / ranks, at most 16; 1 without a GPU]")
    add = ap.add_argument_group("model").add_argument
    add("--teacher", default="tiny", help=f"{' '.join(TEACHERS)}, or a self-describing .safetensors file [%(default)s]")
    add("--teacher_weights", metavar="PATH|random",
        help="its weights in any published layout, or random [the published file, downloaded]")
    add("--init", metavar="FILE",
        help="start from this tokenizer (a file, or uniflow-internvit) instead of a copy of the teacher")
    add("--latent_dim", type=int, help="latent channels [%(default)s]")
    add("--projector", default="mlp", choices=["mlp", "linear"], help="latent projections [%(default)s]")
    add("--gtb_depth", type=int, help="global transformer blocks, 0 for none [%(default)s]")
    add("--flow_depth", type=int, help="residual blocks of the flow head [%(default)s]")
    add("--flow_width", type=int, help="width of the flow head [%(default)s]")
    add("--decoder", default="flow", choices=["flow", "pixel"],
        help="pixel regresses the pixels, Table 5c [%(default)s]")
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
    add("--lr_decay", type=float, metavar="FRACTION", help="the last part of the run, over which the rate falls "
        "linearly to 0, and rises again if --steps extend it [%(default)s]")
    add("--decay_shape", default="linear", choices=["linear", "cosine"], help="how it falls there [%(default)s]")
    add("--warmup", type=int, default=0, metavar="STEPS", help="the first steps, over which the rate rises linearly "
        "from 0 [%(default)s]")
    add("--beta1", type=float, default=0.5, help="AdamW's momentum [%(default)s]")
    add("--beta2", type=float, default=0.95, help="AdamW's decay of the squared gradients [%(default)s]")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="average the weights over the steps, and evaluate "
        "and export the averages; state.pt holds both; 0 for none [%(default)s]")
    add("--encoder_lr_scale", type=float, default=1.0, help="times lr for the pretrained encoder [%(default)s]")
    add("--weight_decay", type=float, default=0.0,
        help="of linear and convolution weights; the paper is silent [%(default)s]")
    add("--clip", type=float, default=1.0, help="gradient norm limit, 0 for none; the paper is silent [%(default)s]")
    add("--drop_path", type=float, default=0.0, help="stochastic depth of the student [%(default)s]")
    add("--seed", type=int, default=0, help="of initialisation, sample order, crops, times and noise [%(default)s]")
    add = ap.add_argument_group("machine").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compile the blocks, and on a single GPU replay the step as a CUDA graph [%(default)s: with a GPU]")
    add("--checkpoint_activations", action="store_true",
        help="recompute blocks in the backward pass: less memory, slower")
    add = ap.add_argument_group("output").add_argument
    add("--out", default="out", metavar="FOLDER", help="where the run lives [%(default)s]")
    add("--log_every", type=int, default=50, metavar="STEPS", help="[%(default)s]")
    add("--eval_every", type=int, default=1000, metavar="STEPS", help="evaluation and sample grid, also at the end; "
        "0: only there [%(default)s]")
    add("--save_every", type=int, default=1000, metavar="STEPS", help="state.pt and model.safetensors, also at the "
        "end; 0: only there [%(default)s]")
    add("--keep_every", type=int, metavar="STEPS", help="keep a copy of the model for good [never]")
    add("--resume_anyway", action="store_true", help="resume although arguments differ")
    args = ap.parse_args(argv)

    config = teacher_config(args.teacher)
    own = dict(PAPER, size=config.size, flow_width=max(1024, config.width))  # of one's own teacher: the paper's recipe
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
        ap.error(f"--size {args.size} is no multiple of the patch {config.patch} of teacher {args.teacher}: "
                 f"try --size {near}")
    return args


def rate_factor(step, args):
    """What multiplies the learning rates at step 0, 1, ..: the warm-up times the decay at the end."""
    left = min(1.0, (args.steps - step) / max(1.0, args.lr_decay * args.steps))
    if args.decay_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return left * min(1.0, (step + 1) / max(1, args.warmup))


def average_weights(averages, weights, step, decay):
    """Move the averages (a list of tensors) toward the weights after step 0, 1, ..: a <- d a + (1 - d) w. The first
    steps forget faster, d = min(decay, (step + 1) / (step + 10)): the initial weights leave a short run's average."""
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (step + 1) / (step + 10)))


def losses(teacher, encoder, decoder, img, args, t=None, noise=None):
    """Section 3 on one micro-batch: img (B, 3, H, W) in [0, 1] -> L_dist, L_flow, layer weights and distances (L,)."""
    P, p = teacher.num_prefix, teacher.config.patch
    with torch.no_grad():
        h_teacher = teacher(img)  # H_T: L x (B, P+N, D)
    z, h_student = encoder(img)  # z (B, C, h, w) = P_down(H_U^(L)); H_U: L x (B, P+N, D)
    loss_dist, weight, alpha = distill.distill_loss(h_student, h_teacher, args.beta, args.strategy, P)  # without CLS
    if t is None:
        t = sample_t((len(img), img.shape[2] * img.shape[3] // p ** 2), args.endpoint, img.device)  # per patch (B, N)
    loss_flow = decoder(z, img, t, noise)
    return loss_dist, loss_flow, weight, alpha


def seed_step(*numbers):
    """Make all random draws that follow (times, noise, stochastic depth) a function of these integers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def model_flops(encoder, decoder, size):
    """Matrix-product FLOPs of one image of a training step: teacher 1 x, student and decoder 3 x the forward pass."""
    with torch.device("meta"):
        enc, dec = Encoder(ViT(encoder.vit.config), encoder.latent_dim, encoder.projector), Decoder(decoder.config)
        img = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as teacher_flops:
        enc.vit(img)
    with FlopCounterMode(display=False) as tokenizer_flops:
        dec(enc(img)[0], img)
    return teacher_flops.get_total_flops() + 3 * tokenizer_flops.get_total_flops()


def capture_graph(micro_step, img, clear):
    """micro_step (uint8 image batch -> statistics) as a CUDA graph: recorded once, then replayed on each batch of that
    shape. clear() sets the gradients back before: where it leaves None, the graph writes them; else it adds to them.

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
    """The training step: micro_step, which adds a micro-batch's gradients, and update, which follows the last."""
    device, trained = decoder.mean.device, [p for group in optimizer.param_groups for p in group["params"]]
    on_gpu = device.type == "cuda"
    graphed = args.compile and on_gpu and ranks == 1
    overwrites = graphed and accumulation == 1  # the last step's gradients: nothing to clear, and one pass less
    if args.compile:  # block by block: all blocks of a kind share one compilation
        for block in (*teacher.blocks, *encoder.vit.blocks, *decoder.blocks, decoder.head):
            block.compile(dynamic=False)
        distill.cosine = torch.compile(distill.cosine, dynamic=False)
    student, flow_decoder = encoder, decoder
    if ranks > 1:  # the teacher stays outside
        student, flow_decoder = (DistributedDataParallel(m, [device] if on_gpu else None, gradient_as_bucket_view=True)
                                 for m in (encoder, decoder))
        student.require_forward_param_sync = flow_decoder.require_forward_param_sync = False  # buffers are constants

    def micro_step(img, last=True):
        """Add the gradients of a uint8 micro-batch; returns L_flow, L_dist, alpha and w of each layer, (2 + 2L,)."""
        student.require_backward_grad_sync = flow_decoder.require_backward_grad_sync = last
        with autocast:
            loss_dist, loss_flow, weight, alpha = losses(teacher, student, flow_decoder, img / 255, args)
            loss = args.lambda_d * loss_dist + args.lambda_f * loss_flow  # eq. 6
        (loss / accumulation).backward()
        return torch.cat([torch.stack([loss_flow, loss_dist]), alpha, weight]).detach()

    def update(stats):
        """Clip the gradients, step, and clear them; returns the step's statistics, their norm, and 1. If any of these
        is not finite (on one rank, so on all), the weights and the optimizer stay as they are."""
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip or math.inf)
        row = torch.cat([stats, norm[None], torch.ones_like(stats[:1])])
        # where GradScaler tells a fused optimizer to leave a step out, without a wait for the GPU
        optimizer.found_inf = (~row.isfinite().all()).float()
        optimizer.step()
        if not overwrites:
            optimizer.zero_grad(set_to_none=not graphed)  # a graph writes where it was recorded
        return row

    if graphed:
        img = torch.zeros(micro_batch, 3, args.size, args.size, dtype=torch.uint8, device=device)
        micro_step = capture_graph(micro_step, img, lambda: optimizer.zero_grad(set_to_none=overwrites))
    return micro_step, update


def export(state, path):
    """The self-describing tokenizer file of a state."""
    weights = state.get("averaged", state)  # with --ema the averages
    tensors = {f"{part}.{k}": v for part in ("encoder", "decoder") for k, v in weights[part].items()}
    tensors.update(latent_mean=state["latent_mean"], latent_std=state["latent_std"])
    write_model(path, {**state["config"], "step": state["step"], "id": state["id"]}, tensors)


def build_data(args):
    """(training set, evaluation set, what to call it): --val, else other drawn pictures, else the training images."""
    if args.data:
        data = ImageDataset(args.data, args.size, True, args.seed, tuple(args.crop_scale))
    else:
        data = ProceduralDataset(args.size, True, args.seed)
    if not (args.val or args.data):
        return data, ProceduralDataset(args.size, False, args.seed), "other drawn pictures"
    val = ImageDataset(args.val or args.data, args.size, False)
    val.replace = not args.val  # those of --val must be readable; training images that are not stop no run
    if args.val and os.environ.get("RANK", "0") == "0":  # of which the first evaluation would tell much later
        for n in spread(len(val)):
            val[n]
    return data, val, " ".join(args.val) if args.val else "the training images"


def build_models(args):
    """(teacher, encoder, decoder): the student is a copy of its teacher, or both parts come from --init."""
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
        differ = [f"{k} {have[k]}, not {wanted[k]}" for k in have if have[k] != wanted[k] and k != "grid"]  # resized
        if differ:
            raise UserError(f"{args.init} has {', '.join(differ)}: pass what it was trained with")
        if (encoder.latent_mean.any() or (encoder.latent_std != 1).any()) and os.environ.get("RANK", "0") == "0":
            print(f"{args.init} has latent statistics: set back, as training moves the latent; afterwards run "
                  "eval.py --latent_stats again")
        for module in (encoder, decoder):
            module.latent_mean.zero_()
            module.latent_std.fill_(1)
    encoder.vit.requires_grad_(not args.freeze_encoder)
    # the distances are taken before the final norm, so L_flow alone would move it, and features() with it
    encoder.vit.norm.requires_grad_(False)
    encoder.vit.drop_path = args.drop_path
    encoder.vit.checkpoint = decoder.checkpoint = args.checkpoint_activations
    return teacher, encoder.train(), decoder.train()


def as_text(x, steps, peak, eta):
    """A training line of log.jsonl, to be read: alpha and w of the first, middle and last layer. peak: in TFLOP/s."""
    three = lambda layers: " ".join(f"{layers[l]:.3f}" for l in (0, len(layers) // 2, -1))
    parts = [f"step {x['step']:6d}/{steps}", f"loss {x['loss']:.4f}", f"flow {x['loss_flow']:.4f}",
             f"dist {x['loss_dist']:.4f}", f"alpha {three(x['alpha'])}", f"w {three(x['weight'])}",
             f"grad {x['grad_norm']:.2f}", f"lr {x['lr']:.1e}", f"{x['img_s']:,.{int(x['img_s'] < 100)}f} img/s",
             f"{x['tflops_per_gpu']:.1f} TFLOP/s" + (f" ({x['tflops_per_gpu'] / peak:.0%} of peak)" if peak else "")]
    parts += [f"{x['memory_gib']:.1f} GiB"] if x["memory_gib"] else []
    parts += [f"{x['skipped']} steps skipped"] if x["skipped"] else []
    return " | ".join([*parts, f"eta {tqdm.format_interval(eta)}"])


def build_optimizer(args, encoder, decoder):
    """AdamW; only the pretrained part's rate is scaled."""
    groups = [parameter_groups(module, args.lr * scale, args.weight_decay) for module, scale in
              ((encoder.vit, args.encoder_lr_scale), (encoder.latent_down, 1.0), (decoder, 1.0))]
    return torch.optim.AdamW(sum(groups, []), betas=(args.beta1, args.beta2), fused=True)


def setup(args, run):
    """All that a run holds, as a namespace `s`: data, models, optimizer, and in `s.now` what changes and is saved."""
    s = SimpleNamespace(args=args, run=run)
    s.micro_batch, s.accumulation = split_batch(args.batch_size, args.micro_batch, run.ranks)
    s.data, s.val, s.val_name = build_data(args)  # first: a wrong path is said before anything is downloaded
    s.teacher, s.encoder, s.decoder = (m.to(run.device) for m in build_models(args))
    s.optimizer = build_optimizer(args, s.encoder, s.decoder)
    s.rates = [group["lr"] for group in s.optimizer.param_groups]
    s.models = s.averaged = {"encoder": s.encoder, "decoder": s.decoder}
    if args.ema:  # the averaged weights are evaluated and exported
        s.averaged = {part: copy.deepcopy(module).requires_grad_(False) for part, module in s.models.items()}
        s.averages, s.weights = zip(*[(a, p) for part, module in s.models.items() for a, p in
                                      zip(s.averaged[part].parameters(), module.parameters()) if p.requires_grad])
    run.connect()
    args.steps = args.steps or max(1, args.epochs * len(s.data) // args.batch_size)
    args.images, args.val_images = (  # a resume compares them: how many, and their names below --data and --val
        f"{len(x):,} images" + (f" ({hashlib.sha256(x.names).hexdigest()[:8]})" if paths else "")
        for x, paths in ((s.data, args.data), (s.val, args.val)))
    s.config = {"vit": asdict(s.teacher.config), "decoder": asdict(s.decoder.config), "size": args.size,
                "teacher": args.teacher, "teacher_weights": args.teacher_weights, "commit": commit()}
    s.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_gpu)  # losses and flow stay fp32
    s.flops = model_flops(s.encoder, s.decoder, args.size)
    s.peak = next((v for k, v in PEAK_TFLOPS.items() if run.on_gpu and k in torch.cuda.get_device_name()), None)
    L, grid = len(s.teacher.blocks), args.size // s.teacher.config.patch
    s.now = SimpleNamespace(  # what state.pt holds beside weights, optimizer and arguments
        id=uuid.uuid4().hex[:12], step=0, samples=0,
        bad=[],  # numbers of the images that could not be read, in the order found
        sums=torch.zeros(4 + 2 * L, dtype=torch.float64, device=run.device),  # since the last log line: see `step`
        faults=torch.zeros(2, device=run.device))  # steps skipped, and skipped in a row
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    drawn = "images" if args.data else "procedurally drawn pictures (no --data)"
    run.say(f"data: {len(s.data):,} {drawn} at {args.size} px; evaluation on {s.val_name}")
    run.say(f"model: student of {millions(s.encoder):.1f}M and decoder of {millions(s.decoder):.1f}M parameters; "
            f"latent {args.latent_dim}x{grid}x{grid}")
    run.say(f"run: {args.steps:,} steps of {args.batch_size} = micro-batch {s.micro_batch} x accumulation "
            f"{s.accumulation} x {run.ranks} rank{'s' * (run.ranks > 1)} on {run.device.type}")
    if s.micro_batch < min(args.micro_batch, args.batch_size // run.ranks):
        run.say(f"micro_batch {args.micro_batch} does not divide a rank's share of {args.batch_size // run.ranks}: "
                f"using {s.micro_batch}")
    return s


def resume(s):
    """Go on from out/state.pt if there is one, on all ranks from the same; whether there are steps left."""
    args, run, now, path, model_path = s.args, s.run, s.now, s.run.path("state.pt"), s.run.path("model.safetensors")
    state = load_checkpoint(path, STATE, args, MAY_DIFFER)
    run.agree([state["id"], state["step"]] if state else [None, 0])
    if state:
        for part, module in s.models.items():
            load_exactly(dict(module.named_parameters()), state[part], path)
        for part, module in s.averaged.items() if args.ema else ():  # averaging may begin here, from the weights
            load_exactly(dict(module.named_parameters()), state.get("averaged", state)[part], path)
        restore_optimizer(s.optimizer, state["optimizer"], path)
        vars(now).update({k: state[k] for k in vars(now)})
        now.sums, now.faults = now.sums.to(run.device), now.faults.to(run.device)
        run.say(f"resumed from {path} at step {now.step:,}")
        try:
            exported = read_config(model_path)
        except UserError:  # absent or damaged: state.pt is enough to write it again
            exported = {}
        if run.rank == 0 and (exported.get("id"), exported.get("step")) != (now.id, now.step):
            run.say(f"{model_path} is not of that step (it is of {exported.get('step', 'none')}): written again")
            export(state, model_path)
    elif run.rank == 0:
        run.set_aside()
    if now.step >= args.steps:
        longer = f"--epochs {math.ceil(2 * now.samples / len(s.data))}" if args.epochs else f"--steps {2 * now.step}"
        run.say(f"the run is finished: {model_path}; to extend it, the same command with {longer}")
    return now.step < args.steps


def step(s, batches, micro_step, update):
    """One optimizer step from `accumulation` micro-batches; its statistics (L_flow, L_dist, alpha and w of each layer,
    gradient norm, 1) are added to now.sums. Returns the numbers of the images that could not be read."""
    args, now, run = s.args, s.now, s.run
    factor = rate_factor(now.step, args)
    for group, rate in zip(s.optimizer.param_groups, s.rates):
        group["lr"] = rate * factor
    stats, unread = 0, set()
    for m in range(s.accumulation):
        img, labels = next(batches)
        unread.update(-1 - y for y in labels if y < 0)  # so data.py tells of a picture that another stands in for
        seed_step(args.seed, now.step, m, run.rank)
        stats = stats + micro_step(img.to(run.device, non_blocking=True), m == s.accumulation - 1) / s.accumulation
    if run.ranks > 1:
        dist.all_reduce(stats)  # alpha and w are equal on all ranks
    row = update(stats / run.ranks)
    if args.ema:
        average_weights(s.averages, s.weights, now.step, args.ema)
    skipped = ~row.isfinite().all()
    now.sums += torch.where(skipped, 0, row)
    now.faults = torch.stack([now.faults[0] + skipped, (now.faults[1] + 1) * skipped])
    s.last_finite = torch.where(skipped, s.last_finite, row)
    now.step, now.samples = now.step + 1, now.samples + args.batch_size
    return unread


def check(s, unread):
    """After a step: name pictures that cannot be read, stop a run that is not finite; whether signals came."""
    args, now, run, path = s.args, s.now, s.run, s.run.path("bad_images.txt")
    interrupted, found = run.sum(len(INTERRUPTS), len(unread.difference(now.bad)))
    if found:
        now.bad.extend(sorted(run.union(unread).difference(now.bad)))
        if run.rank == 0:
            write_names(path, [s.data.path(i) for i in now.bad])
        run.say(f"{len(now.bad)} of {len(s.data):,} images cannot be read, others stand in for them: see {path}")
        if len(now.bad) > args.max_bad_images * len(s.data):
            raise UserError(f"{len(now.bad)} of {len(s.data):,} images cannot be read, more than --max_bad_images "
                            f"{args.max_bad_images} allows: see {path}")
    if (not run.on_gpu or now.step % 10 == 0) and now.faults[1] >= TOO_MANY_SKIPPED:  # a GPU would be waited for
        batch = range(now.samples - args.batch_size, now.samples)
        files = [s.data.path(s.data.index(n)) for n in batch] if args.data else ["drawn pictures"]
        if run.rank == 0:
            write_names(run.path("not_finite.txt"), files)
        flow, distance, *_ = (s.last_finite / s.last_finite[-1]).tolist()  # nan if there was none since the start
        raise UserError(f"at step {now.step} the loss or its gradient is not finite, {int(now.faults[1])} steps in a "
                        f"row (the last finite one: flow {flow:.4f}, distillation {distance:.4f}); the last batch is "
                        f"{', '.join(files[:3])} .. (all of it in {run.path('not_finite.txt')}). The last save is "
                        f"{run.path('state.pt')}: the same command with a lower --lr and --resume_anyway goes on from "
                        "there")
    return interrupted


def log(s, seconds_a_step):
    """A line of log.jsonl and of the screen: the means since the last one."""
    args, now, run, L = s.args, s.now, s.run, len(s.teacher.blocks)
    loss_flow, loss_dist, *layers, grad_norm, _ = (now.sums / now.sums[-1]).tolist()
    img_s, memory = args.batch_size / seconds_a_step, torch.cuda.max_memory_allocated() / 2**30 if run.on_gpu else None
    line = dict(step=now.step, loss=args.lambda_d * loss_dist + args.lambda_f * loss_flow, loss_flow=loss_flow,
                loss_dist=loss_dist, alpha=layers[:L], weight=layers[L:], grad_norm=grad_norm,
                lr=args.lr * rate_factor(now.step - 1, args), skipped=int(now.faults[0]), img_s=img_s,
                tflops_per_gpu=img_s / run.ranks * s.flops / 1e12, memory_gib=memory)
    run.say(as_text(line, args.steps, s.peak, (args.steps - now.step) * seconds_a_step))
    run.write(**line)
    if now.step % args.log_every == 0:  # the line at the end may come before an interval is over
        now.sums = torch.zeros_like(now.sums)


def evaluate(s):
    """The one-step PSNR and the flow loss over t on --val, and a picture in out/samples/."""
    args, now, run = s.args, s.now, s.run
    try:
        quality, flow_by_t, picture = validate(*s.averaged.values(), s.val, s.micro_batch, args.seed, s.autocast,
                                               args.workers, run.rank, run.ranks)
    except Exception:
        save(s)
        raise
    run.say(f"eval {now.step:6d} | one-step PSNR {quality:.2f} dB on {s.val_name} | "
            "flow loss by tenth of t, image to noise: " + " ".join(f"{x:.3f}" for x in flow_by_t))
    run.write(kind="eval", step=now.step, psnr=quality, flow_by_t=flow_by_t, on=s.val_name)
    if run.rank == 0:
        path = run.path("samples", f"step_{now.step:06d}.png")
        write_atomically(path, lambda f: Image.fromarray(picture).save(f, "PNG"))


def save(s):
    """Rank 0 writes state.pt, which alone is enough to resume, and the tokenizer exported from it."""
    if s.run.rank > 0:
        return
    weights = lambda models: {part: {k: p.detach() for k, p in m.named_parameters()} for part, m in models.items()}
    state = {**vars(s.now), **weights(s.models), "optimizer": s.optimizer.state_dict(), "args": vars(s.args),
             "latent_mean": s.encoder.latent_mean.flatten(), "latent_std": s.encoder.latent_std.flatten(),
             "config": s.config}
    if s.args.ema:
        state["averaged"] = weights(s.averaged)
    path, every = s.run.path("state.pt"), s.args.keep_every
    with saving(path, s.now.step):
        if every and s.now.step % every == 0:  # first, as a resume from this step would not write it again
            export(state, s.run.path(f"model_{s.now.step:07d}.safetensors"))
        write_atomically(path, lambda f: torch.save(state, f))
        export(state, s.run.path("model.safetensors"))


def main(argv=None, on_signal=None):
    """Train as the command line asks. on_signal: handles signals, once there is something to save."""
    args = parse_args(argv)
    run = Run(args.out)
    s = setup(args, run)
    run.hold_folder()  # before anything in it is read
    if not resume(s):
        return
    now = s.now
    run.open_log(now.step)
    step_parts = training_step(args, s.teacher, s.encoder, s.decoder, s.optimizer, s.autocast, s.micro_batch,
                               s.accumulation, run.ranks)
    if on_signal:
        listen(on_signal)
    check_locks(2 * args.workers)  # those of training and of an evaluation
    numbers = sample_numbers(now.samples, args.batch_size, s.micro_batch, run.rank, run.ranks, args.steps - now.step)
    batches = iter(DataLoader(s.data, batch_sampler=numbers, num_workers=args.workers, collate_fn=collate,
                              prefetch_factor=4 if args.workers else None, pin_memory=run.on_gpu,
                              worker_init_fn=ignore_signals))
    bar = tqdm(total=args.steps, initial=now.step, desc="train", unit="step", disable=None if run.rank == 0 else True)
    tick, timed, interrupted = time.time(), 0, 0
    s.last_finite = now.sums  # statistics of the last step that was
    while now.step < args.steps and not interrupted:
        unread = step(s, batches, *step_parts)
        timed += 1
        bar.update()
        interrupted = check(s, unread)

        due = lambda every: now.step == args.steps or every and now.step % every == 0  # all three also at the end
        logging, evaluating = due(args.log_every), due(args.eval_every)
        saving = due(args.save_every) or due(args.keep_every)
        if logging:
            log(s, (time.time() - tick) / timed)
        if evaluating:
            evaluate(s)
        if saving or interrupted:
            save(s)
        if logging or evaluating or saving:
            tick, timed = time.time(), 0
    bar.close()
    if interrupted:
        run.write(kind="interrupted", step=now.step)
        run.say(f"interrupted and saved at step {now.step:,}: the same command goes on from there")
    else:
        model = run.path("model.safetensors")
        run.say(f"done: {model}, pictures in {run.path('samples')}; try: python sample.py YOUR.png --weights {model}")
    run.close()


def run():
    """main() for the command line."""
    command_line(main, "train.py")


if __name__ == "__main__":
    run()
