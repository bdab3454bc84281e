"""Train UniFlow (Sec. 3): a student encoder that stays near its frozen teacher, and a pixel flow decoder, end to end.

    L = lambda_d L_dist + lambda_f L_flow            eq. 6; L_dist is in distill.py, L_flow in decoder.py

    python train.py                                  # tiny on drawn pictures: less than four minutes on two cores
    python train.py --data train.zip --val val.zip   # your own pictures: folders or .zip archives
    torchrun --nproc_per_node=8 train.py --teacher internvit --data imagenet/train --val imagenet/val
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py --teacher internvit --data ...

Run the same command again to resume from out/state.pt; the result is the same. A run leaves out/model.safetensors,
out/log.jsonl, out/samples/*.png, and out/bad_images*.txt if pictures could not be read. On SIGTERM, SIGINT, SIGHUP and
SIGUSR1 it saves and stops. The flags and the recipes are in tools/recipes.py.
"""
import copy
import hashlib
import math
import os
import shlex
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import ImageDataset
from decoder import Decoder, DecoderConfig, sample_t
from distill import distill_loss, layer_distances
from encoder import (Encoder, UserError, ViT, load_exactly, load_teacher, parameter_groups, read_config,
                     write_atomically, write_model)
from tools.batches import load_batches, split_batch
from tools.checkpoint import has_checkpoint
from tools.drawn import ProceduralDataset
from tools.optimizer import average_weights, capture_graph, join_gradients, rate_factor, take_means, update_weights
from tools.recipes import parse_args
from tools.run import INTERRUPTS, Run, command_line, listen, loop, seed_step
from tools.script import check_locks, commit, find_weights
from tools.validate import spread, validate

# These arguments may differ when a run is resumed. Of the recipe only the name may: its values are arguments, too.
MAY_DIFFER = set("data val out recipe steps epochs workers micro_batch compile checkpoint_activations log_every "
                 "eval_every save_every keep_every max_bad_images resume_anyway".split())
STATE = "encoder decoder optimizer latent_mean latent_std step samples sums faults unreadable args id config".split()


def build_data(args):
    """(training set, evaluation set, the latter's name). Without --val, a run evaluates on its training images, or on
    other drawn pictures if it trains on drawn ones."""
    if args.data:
        data = ImageDataset(args.data, args.size, True, args.seed, tuple(args.crop_scale))
    else:
        data = ProceduralDataset(args.size, True, args.seed)
    if not (args.val or args.data):
        return data, ProceduralDataset(args.size, False, args.seed), "other drawn pictures"
    val = ImageDataset(args.val or args.data, args.size, False)
    val.replace = not args.val  # a bad image of --val is an error; a bad training image is replaced by the next one
    if args.val and os.environ.get("RANK", "0") == "0":
        for n in spread(len(val)):  # what evaluations read: a bad image among them is an error now, not hours later
            val[n]
    return data, val, " ".join(args.val) if args.val else "the training images"


def build_models(args):
    """(teacher, encoder, decoder). The encoder is the student, a copy of its teacher; with --init, encoder and decoder
    come from that file instead, unless there is a checkpoint to go on from, which has their weights."""
    teacher = load_teacher(args.teacher, args.teacher_weights)
    torch.manual_seed(args.seed)
    c = teacher.config
    encoder = Encoder(copy.deepcopy(teacher), args.latent_dim, args.projector)
    decoder = Decoder(DecoderConfig(
        latent_dim=args.latent_dim, width=c.width, heads=c.heads, gtb_depth=args.gtb_depth, flow_depth=args.flow_depth,
        flow_width=args.flow_width, patch=c.patch, grid=args.size // c.patch, projector=args.projector,
        objective=args.decoder, pixel_stats=c.pixel_stats))
    if args.init and not has_checkpoint(args.out):
        wanted = {**asdict(c), **asdict(decoder.config)}
        path = find_weights(args.init)
        encoder, decoder = Encoder.from_pretrained(path), Decoder.from_pretrained(path)
        have = {**asdict(encoder.vit.config), **asdict(decoder.config)}
        # another grid does not matter, because position grids are resized
        differ = [f"{k} {have[k]}, not {wanted[k]}" for k in have if have[k] != wanted[k] and k != "grid"]
        if differ:
            raise UserError(f"{args.init} has {', '.join(differ)}: pass what it was trained with")
        if (encoder.latent_mean.any() or (encoder.latent_std != 1).any()) and os.environ.get("RANK", "0") == "0":
            print(f"{args.init} has latent statistics: they are set back, because training moves the latent; run "
                  "`python -m tools.latents stats` again afterwards")
        for module in (encoder, decoder):
            module.latent_mean.zero_()
            module.latent_std.fill_(1)
    encoder.vit.requires_grad_(not args.freeze_encoder)
    # L_dist compares tokens before the final norm, so L_flow alone would train this norm, and change features()
    encoder.vit.norm.requires_grad_(False)
    encoder.vit.drop_path = args.drop_path
    encoder.vit.checkpoint = decoder.checkpoint = args.checkpoint_activations
    return teacher, encoder.train(), decoder.train()


def losses(teacher, encoder, decoder, img, args, t=None, noise=None, distances=layer_distances):
    """Section 3 on one micro-batch: img (B, 3, H, W) in [0, 1] -> L_dist, L_flow, layer weights and distances (L,)."""
    P, p = teacher.num_prefix, teacher.config.patch
    with torch.no_grad():
        h_teacher = [h[:, P:] for h in teacher(img)]  # H_T: L x (B, N, D), without CLS
    z, h_student = encoder(img)  # z (B, C, h, w) = P_down(H_U^(L))
    h_student = [h[:, P:] for h in h_student]  # H_U: L x (B, N, D)
    loss_dist, weight, alpha = distill_loss(h_student, h_teacher, args.beta, args.strategy, distances)
    if t is None:
        t = sample_t((len(img), img.shape[2] * img.shape[3] // p ** 2), args.endpoint, img.device)  # per patch (B, N)
    loss_flow = decoder(z, img, t, noise)
    return loss_dist, loss_flow, weight, alpha


def build_optimizer(args, encoder, decoder):
    """AdamW, fused into few kernels. --encoder_lr_scale scales the learning rate of the pretrained part alone."""
    groups = [parameter_groups(module, args.lr * scale, args.weight_decay) for module, scale in
              ((encoder.vit, args.encoder_lr_scale), (encoder.latent_down, 1.0), (decoder, 1.0))]
    return torch.optim.AdamW(sum(groups, []), betas=(args.beta1, args.beta2), fused=True)


def training_step(args, teacher, encoder, decoder, optimizer, autocast, micro_batch, accumulation, ranks=1):
    """The two functions of a training step: micro_step adds the gradients of a micro-batch; update follows the last
    micro-batch and moves the weights. Gradients and statistics are means over a step's micro-batches, of all ranks."""
    device, micro_batches = decoder.mean.device, accumulation * ranks
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # a CUDA graph launches all kernels at once: Python launches those of a small model more slowly than they run
    graphed = args.compile and device.type == "cuda"
    # with one micro-batch a step, the graph overwrites the last gradients: no passes over memory to clear and to add
    overwrites = graphed and micro_batches == 1
    distances = layer_distances
    if args.compile:  # block by block: all blocks of a kind share one compilation
        for block in (*teacher.blocks, *encoder.vit.blocks, *decoder.blocks, decoder.head):
            block.compile(dynamic=False)
        distances = torch.compile(layer_distances, dynamic=False)  # one pass over the tokens, not one per operation
    # the ranks exchange gradients after the last micro-batch, not within its backward pass as DistributedDataParallel
    # does, so that one graph serves all micro-batches
    gradients = join_gradients(trained) if ranks > 1 else None

    def micro_step(img):
        """Add the gradients of a uint8 micro-batch. Returns its part of the step's statistics, (2 + 2L,): L_flow,
        L_dist, alpha and w of each layer."""
        with autocast:
            loss_dist, loss_flow, weight, alpha = losses(teacher, encoder, decoder, img / 255, args,
                                                          distances=distances)
            loss = args.lambda_d * loss_dist + args.lambda_f * loss_flow  # eq. 6
        (loss / micro_batches).backward()
        return torch.cat([torch.stack([loss_flow, loss_dist]), alpha, weight]).detach() / micro_batches

    def update(stats):
        """Add up gradients and `stats` over the ranks, clip the gradients, move the weights, clear the gradients.
        Returns `stats`, the gradient norm, and 1."""
        if ranks > 1:
            dist.all_reduce(gradients)
            dist.all_reduce(stats)
        row = update_weights(optimizer, trained, args.clip, stats)
        if not overwrites:  # a graph and the ranks' exchange know the gradients by their place in memory: keep it
            optimizer.zero_grad(set_to_none=not graphed and ranks == 1)
        return row

    if graphed:
        img = torch.zeros(micro_batch, 3, args.size, args.size, dtype=torch.uint8, device=device)
        # recorded while .grad is None, the backward pass writes gradients; recorded with zeros there, it adds to them
        micro_step = capture_graph(micro_step, img, lambda: optimizer.zero_grad(set_to_none=overwrites))
    return micro_step, update


def step(s, batches, micro_step, update):
    """One optimizer step from `accumulation` micro-batches. Adds its statistics (L_flow, L_dist, alpha and w of each
    layer, gradient norm, 1) to now.sums. Returns the numbers of this rank's images that could not be read."""
    args, now, run = s.args, s.now, s.run
    factor = rate_factor(now.step, args)
    for group, rate in zip(s.optimizer.param_groups, s.rates):
        group["lr"] = rate * factor
    stats, unreadable = 0, []
    for m in range(s.accumulation):
        img, labels = next(batches)
        unreadable += [-1 - y for y in labels if y < 0]  # data.py labels the replacement of bad image i by -1 - i
        # draws depend on the seed, the step and which of its micro-batches it is: not on the ranks that share them
        seed_step(args.seed, now.step, run.rank * s.accumulation + m)
        stats = stats + micro_step(img.to(run.device, non_blocking=True))
    row = update(stats)
    if args.ema:
        average_weights(s.averages, s.weights, now.step, args.ema)
    run.count(now, row, args.batch_size)
    return unreadable


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


def describe_images(data, paths):
    """What a resume compares of a data set: how many images, and a hash of their names below `paths`."""
    count = f"{len(data):,} images"
    return f"{count} ({hashlib.sha256(data.names).hexdigest()[:8]})" if paths else count


def setup(args, run):
    """All that a run holds, as a namespace `s`: data, models, optimizer. s.now is what changes and is saved."""
    s = SimpleNamespace(args=args, run=run)
    s.micro_batch, s.accumulation = split_batch(args.batch_size, args.micro_batch, run.ranks)
    s.data, s.val, s.val_name = build_data(args)  # first, so that a wrong path is an error before a download
    run.hold_folder()  # likewise; and before resume reads it, so that no other run writes to it meanwhile
    s.teacher, s.encoder, s.decoder = (m.to(run.device) for m in build_models(args))
    s.optimizer = build_optimizer(args, s.encoder, s.decoder)
    s.rates = [group["lr"] for group in s.optimizer.param_groups]
    s.models = {"encoder": s.encoder, "decoder": s.decoder}
    s.averaged = s.models  # what is evaluated and exported: the models, or with --ema copies that hold the averages
    if args.ema:
        s.averaged = {part: copy.deepcopy(module).requires_grad_(False) for part, module in s.models.items()}
        pairs = [(average, weight) for part, module in s.models.items()
                 for average, weight in zip(s.averaged[part].parameters(), module.parameters()) if weight.requires_grad]
        s.averages, s.weights = zip(*pairs)
    run.connect()
    run.agree_on_weights(s.teacher, s.encoder, s.decoder)
    args.steps = args.steps or max(1, args.epochs * len(s.data) // args.batch_size)
    args.images, args.val_images = describe_images(s.data, args.data), describe_images(s.val, args.val)
    s.config = {"vit": asdict(s.teacher.config), "decoder": asdict(s.decoder.config), "size": args.size,
                "teacher": args.teacher, "teacher_weights": args.teacher_weights, "commit": commit()}
    s.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_gpu)  # losses and flow stay fp32
    s.flops = model_flops(s.encoder, s.decoder, args.size)
    L, grid = len(s.teacher.blocks), args.size // s.teacher.config.patch
    s.now = run.counts(4 + 2 * L)
    s.now.unreadable = 0  # samples that could not be read
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
    """Restore the run from out/state.pt if there is one, the same on all ranks. Returns whether steps are left."""
    args, run, now = s.args, s.run, s.now
    path, model_path = run.path("state.pt"), run.path("model.safetensors")
    if state := run.load(STATE, args, MAY_DIFFER):
        for part, module in s.models.items():
            load_exactly(dict(module.named_parameters()), state[part], path)
        if args.ema:
            saved = state.get("averaged", state)  # a run that had no --ema so far begins its averages at its weights
            for part, module in s.averaged.items():
                load_exactly(dict(module.named_parameters()), saved[part], path)
        run.restore(state, now, s.optimizer)
        try:
            exported = read_config(model_path)
        except UserError:  # absent or damaged: state.pt is enough to write it again
            exported = {}
        if run.rank == 0 and (exported.get("id"), exported.get("step")) != (now.id, now.step):
            run.say(f"{model_path} is not of that step (it is of {exported.get('step', 'none')}): it is written again")
            export(state, model_path)
    if now.step >= args.steps:
        longer = f"--epochs {math.ceil(2 * now.samples / len(s.data))}" if args.epochs else f"--steps {2 * now.step}"
        run.say(f"the run is finished: {model_path}; to extend it, the same command with {longer}")
    return now.step < args.steps


def check(s, unreadable):
    """After a step: report images that cannot be read, and stop the run if there are too many, or too many steps that
    are not finite. Returns whether a signal asks some rank to save and stop."""
    args, now, run = s.args, s.now, s.run
    new = run.list_unreadable([s.data.path(i) for i in unreadable])
    interrupted, new, found = run.sum(len(INTERRUPTS), new, len(unreadable))
    now.unreadable += found
    how_many = f"{now.unreadable:,} of the {now.samples:,} images so far could not be read"
    if new:
        run.say(f"{how_many}, other images replaced them: see {run.path('bad_images*.txt')}")
    passes = math.ceil(now.samples / len(s.data))  # over the data, begun so far; each reads a bad image once
    if now.unreadable > args.max_bad_images * len(s.data) * passes:
        raise UserError(f"{how_many}, more than --max_bad_images {args.max_bad_images} allows in {passes} "
                        f"pass{'es' * (passes > 1)} over {len(s.data):,} images: see {run.path('bad_images*.txt')}")
    if run.must_stop(now):
        flow, distance, *_ = (run.last_finite / run.last_finite[-1]).tolist()  # nan if no step was finite
        batch = range(now.samples - args.batch_size, now.samples)
        run.stop_not_finite(now, f"flow {flow:.4f}, distillation {distance:.4f}",
                            [s.data.path(s.data.index(n)) for n in batch] if args.data else ["drawn pictures"])
    return interrupted


def as_text(x, steps, eta):
    """A training line of log.jsonl, for the screen: alpha and w of the first, middle and last layer; eta in seconds."""
    three = lambda layers: " ".join(f"{layers[l]:.3f}" for l in (0, len(layers) // 2, -1))
    decimals = 1 if x["img_s"] < 100 else 0
    return (f"step {x['step']:6d}/{steps} | loss {x['loss']:.4f} | flow {x['loss_flow']:.4f} | "
            f"dist {x['loss_dist']:.4f} | alpha {three(x['alpha'])} | w {three(x['weight'])} | "
            f"grad {x['grad_norm']:.2f} | lr {x['lr']:.1e} | {x['img_s']:,.{decimals}f} img/s | "
            f"{x['tflops_per_gpu']:.1f} TFLOP/s | "
            + (f"{x['memory_gib']:.1f} GiB | " if x["memory_gib"] else "")
            + (f"{x['skipped']} steps skipped | " if x["skipped"] else "")
            + f"eta {tqdm.format_interval(eta)}")


def log(s, seconds_a_step):
    """Write the means since the last line to log.jsonl and to the screen."""
    args, now, run, L = s.args, s.now, s.run, len(s.teacher.blocks)
    loss_flow, loss_dist, *layers, grad_norm, _ = take_means(now, args.log_every)
    img_s = args.batch_size / seconds_a_step
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.on_gpu else None
    line = dict(step=now.step, loss=args.lambda_d * loss_dist + args.lambda_f * loss_flow, loss_flow=loss_flow,
                loss_dist=loss_dist, alpha=layers[:L], weight=layers[L:], grad_norm=grad_norm,
                lr=args.lr * rate_factor(now.step - 1, args), skipped=int(now.faults[0]), img_s=img_s,
                tflops_per_gpu=img_s / run.ranks * s.flops / 1e12, memory_gib=memory)
    run.say(as_text(line, args.steps, (args.steps - now.step) * seconds_a_step))
    run.write(**line)


def evaluate(s):
    """Log the one-step PSNR and the flow loss over t on --val, and leave a picture in out/samples/."""
    args, now, run = s.args, s.now, s.run
    try:
        quality, flow_by_t, picture = validate(*s.averaged.values(), s.val, s.micro_batch, args.seed, s.autocast,
                                               args.workers, run.rank, run.ranks)
    except Exception:  # no step may be lost to an evaluation that fails
        save(s)
        raise
    run.say(f"eval {now.step:6d} | one-step PSNR {quality:.2f} dB on {s.val_name} | "
            "flow loss by tenth of t, image to noise: " + " ".join(f"{x:.3f}" for x in flow_by_t))
    run.write(kind="eval", step=now.step, psnr=quality, flow_by_t=flow_by_t, on=s.val_name)
    if run.rank == 0:
        path = run.path("samples", f"step_{now.step:06d}.png")
        write_atomically(path, lambda f: Image.fromarray(picture).save(f, "PNG"))


def export(state, path):
    """Write the self-describing tokenizer file of a state."""
    weights = state.get("averaged", state)  # the averages of a run with --ema
    tensors = {f"{part}.{k}": v for part in ("encoder", "decoder") for k, v in weights[part].items()}
    tensors.update(latent_mean=state["latent_mean"], latent_std=state["latent_std"])
    write_model(path, {**state["config"], "step": state["step"], "id": state["id"]}, tensors)


def save(s):
    """Write state.pt, and the tokenizer exported from it."""
    weights = lambda models: {part: {k: p.detach() for k, p in m.named_parameters()} for part, m in models.items()}
    state = {**vars(s.now), **weights(s.models), "optimizer": s.optimizer.state_dict(), "args": vars(s.args),
             "latent_mean": s.encoder.latent_mean.flatten(), "latent_std": s.encoder.latent_std.flatten(),
             "config": s.config}
    if s.args.ema:
        state["averaged"] = weights(s.averaged)
    s.run.save(state, s.args.keep_every, lambda path: export(state, path))


def main(argv=None, on_signal=None):
    """Train as the command line asks. on_signal: handles signals from the first step on."""
    args = parse_args(argv)
    run = Run(args.out)
    s = setup(args, run)
    if not resume(s):
        return
    now = s.now
    run.open_log(now.step)
    micro_step, update = training_step(args, s.teacher, s.encoder, s.decoder, s.optimizer, s.autocast, s.micro_batch,
                                       s.accumulation, run.ranks)
    if on_signal:
        listen(on_signal)
    check_locks(2 * args.workers)  # an evaluation has workers of its own beside those of training
    batches = load_batches(run, s.data, args, now, s.micro_batch)
    interrupted = loop(run, now, args, step=lambda: check(s, step(s, batches, micro_step, update)),
                       log=lambda seconds: log(s, seconds), evaluate=lambda: evaluate(s), save=lambda: save(s))
    model = run.path("model.safetensors")
    run.end(now.step, interrupted, f"{model}, pictures in {run.path('samples')}; try: python sample.py YOUR.png "
            f"--weights {shlex.quote(model)}")


def run():
    """main() as a command: see command_line."""
    command_line(main, "train.py")


if __name__ == "__main__":
    run()
