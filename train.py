"""Train UniFlow (Sec. 3): a student encoder that stays near its frozen teacher, and a pixel flow decoder, end to end.

    L = lambda_d L_dist + lambda_f L_flow            eq. 6; L_dist is in distill.py, L_flow in decoder.py

    python train.py                                  # tiny on drawn pictures: less than four minutes on two cores
    python train.py --data train.zip --val val.zip   # your own pictures: folders or .zip archives
    torchrun --nproc_per_node=8 train.py --teacher internvit --data imagenet/train --val imagenet/val
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py --teacher internvit --data ...

The same command again resumes from out/state.pt, to the same result. Leaves out/model.safetensors, out/log.jsonl,
out/samples/*.png, and out/bad_images*.txt if pictures could not be read. SIGTERM, SIGINT, SIGHUP and SIGUSR1 save and
stop. The flags and the recipes are in tools/recipes.py.
"""
import copy
import hashlib
import math
import os
import time
import uuid
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import ImageDataset
from decoder import Decoder, DecoderConfig, sample_t
from distill import distill_loss, layer_distances
from encoder import (Encoder, UserError, ViT, load_exactly, load_teacher, parameter_groups, read_config,
                     write_atomically, write_model)
from tools.drawn import ProceduralDataset
from tools.recipes import parse_args
from tools.run import (INTERRUPTS, Run, average_weights, capture_graph, collate, command_line, listen, rate_factor,
                       restore_optimizer, sample_numbers, saving, seed_step, split_batch)
from tools.script import check_locks, commit, find_weights, ignore_signals
from tools.validate import spread, validate

# When a run is resumed these may differ; the name of the recipe, too, but none of the values that it stands for.
MAY_DIFFER = set("data val out recipe steps epochs workers micro_batch compile log_every eval_every save_every "
                 "keep_every max_bad_images resume_anyway".split())
STATE = "encoder decoder optimizer latent_mean latent_std step samples sums faults unreadable args id config".split()
TOO_MANY_SKIPPED = 10  # steps in a row with a loss or gradient that is not finite


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
        path = find_weights(args.init)
        encoder, decoder = Encoder.from_pretrained(path), Decoder.from_pretrained(path)
        have = {**asdict(encoder.vit.config), **asdict(decoder.config)}
        differ = [f"{k} {have[k]}, not {wanted[k]}" for k in have if have[k] != wanted[k] and k != "grid"]  # resized
        if differ:
            raise UserError(f"{args.init} has {', '.join(differ)}: pass what it was trained with")
        if (encoder.latent_mean.any() or (encoder.latent_std != 1).any()) and os.environ.get("RANK", "0") == "0":
            print(f"{args.init} has latent statistics: set back, as training moves the latent; afterwards run "
                  "`python -m tools.latents stats` again")
        for module in (encoder, decoder):
            module.latent_mean.zero_()
            module.latent_std.fill_(1)
    encoder.vit.requires_grad_(not args.freeze_encoder)
    # the distances are taken before the final norm, so L_flow alone would move it, and features() with it
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
    """AdamW; only the pretrained part's rate is scaled."""
    groups = [parameter_groups(module, args.lr * scale, args.weight_decay) for module, scale in
              ((encoder.vit, args.encoder_lr_scale), (encoder.latent_down, 1.0), (decoder, 1.0))]
    return torch.optim.AdamW(sum(groups, []), betas=(args.beta1, args.beta2), fused=True)


def training_step(args, teacher, encoder, decoder, optimizer, autocast, micro_batch, accumulation, ranks=1):
    """The training step: micro_step, which adds a micro-batch's gradients, and update, which follows the last."""
    device, trained = decoder.mean.device, [p for group in optimizer.param_groups for p in group["params"]]
    on_gpu = device.type == "cuda"
    graphed = args.compile and on_gpu and ranks == 1
    overwrites = graphed and accumulation == 1  # the last step's gradients: nothing to clear, and one pass less
    distances = layer_distances
    if args.compile:  # block by block: all blocks of a kind share one compilation
        for block in (*teacher.blocks, *encoder.vit.blocks, *decoder.blocks, decoder.head):
            block.compile(dynamic=False)
        distances = torch.compile(layer_distances, dynamic=False)  # in one pass over the tokens
    student, flow_decoder = encoder, decoder
    if ranks > 1:  # the teacher stays outside
        student, flow_decoder = (DistributedDataParallel(m, [device] if on_gpu else None, gradient_as_bucket_view=True)
                                 for m in (encoder, decoder))
        student.require_forward_param_sync = flow_decoder.require_forward_param_sync = False  # buffers are constants

    def micro_step(img, last=True):
        """Add the gradients of a uint8 micro-batch; returns L_flow, L_dist, alpha and w of each layer, (2 + 2L,)."""
        student.require_backward_grad_sync = flow_decoder.require_backward_grad_sync = last
        with autocast:
            loss_dist, loss_flow, weight, alpha = losses(teacher, student, flow_decoder, img / 255, args,
                                                          distances=distances)
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


def step(s, batches, micro_step, update):
    """One optimizer step from `accumulation` micro-batches; its statistics (L_flow, L_dist, alpha and w of each layer,
    gradient norm, 1) are added to now.sums. Returns the image numbers of this rank's samples that could not be read."""
    args, now, run = s.args, s.now, s.run
    factor = rate_factor(now.step, args)
    for group, rate in zip(s.optimizer.param_groups, s.rates):
        group["lr"] = rate * factor
    stats, unreadable = 0, []
    for m in range(s.accumulation):
        img, labels = next(batches)
        unreadable += [-1 - y for y in labels if y < 0]  # so data.py tells of a picture that another stands in for
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
    L, grid = len(s.teacher.blocks), args.size // s.teacher.config.patch
    s.now = SimpleNamespace(  # what state.pt holds beside weights, optimizer and arguments
        id=uuid.uuid4().hex[:12], step=0, samples=0,
        unreadable=0,  # samples that could not be read
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
    if state := run.load(STATE, args, MAY_DIFFER):
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
    if now.step >= args.steps:
        longer = f"--epochs {math.ceil(2 * now.samples / len(s.data))}" if args.epochs else f"--steps {2 * now.step}"
        run.say(f"the run is finished: {model_path}; to extend it, the same command with {longer}")
    return now.step < args.steps


def check(s, unreadable):
    """After a step: tell of pictures that cannot be read, stop a run that is not finite; whether signals came."""
    args, now, run = s.args, s.now, s.run
    new = run.list_unreadable([s.data.path(i) for i in unreadable])
    interrupted, new, found = run.sum(len(INTERRUPTS), new, len(unreadable))
    now.unreadable += found
    said = f"{now.unreadable:,} of the {now.samples:,} images so far could not be read"
    if new:
        run.say(f"{said}, others stood in for them: see {run.path('bad_images*.txt')}")
    epochs = math.ceil(now.samples / len(s.data))  # begun; each reads an image once, so no rank need know the others'
    if now.unreadable > args.max_bad_images * len(s.data) * epochs:
        raise UserError(f"{said}, more than --max_bad_images {args.max_bad_images} allows in {epochs} passes over "
                        f"{len(s.data):,} images: see {run.path('bad_images*.txt')}")
    if (not run.on_gpu or now.step % 10 == 0) and now.faults[1] >= TOO_MANY_SKIPPED:  # a GPU would be waited for
        flow, distance, *_ = (s.last_finite / s.last_finite[-1]).tolist()  # nan if there was none since the start
        batch = range(now.samples - args.batch_size, now.samples)
        run.stop_not_finite(now.step, int(now.faults[1]), f"flow {flow:.4f}, distillation {distance:.4f}",
                            [s.data.path(s.data.index(n)) for n in batch] if args.data else ["drawn pictures"])
    return interrupted


def as_text(x, steps, eta):
    """A training line of log.jsonl, to be read: alpha and w of the first, middle and last layer; eta in seconds."""
    three = lambda layers: " ".join(f"{layers[l]:.3f}" for l in (0, len(layers) // 2, -1))
    return (f"step {x['step']:6d}/{steps} | loss {x['loss']:.4f} | flow {x['loss_flow']:.4f} | "
            f"dist {x['loss_dist']:.4f} | alpha {three(x['alpha'])} | w {three(x['weight'])} | "
            f"grad {x['grad_norm']:.2f} | lr {x['lr']:.1e} | {x['img_s']:,.{int(x['img_s'] < 100)}f} img/s | "
            f"{x['tflops_per_gpu']:.1f} TFLOP/s | "
            + (f"{x['memory_gib']:.1f} GiB | " if x["memory_gib"] else "")
            + (f"{x['skipped']} steps skipped | " if x["skipped"] else "")
            + f"eta {tqdm.format_interval(eta)}")


def log(s, seconds_a_step):
    """A line of log.jsonl and of the screen: the means since the last one."""
    args, now, run, L = s.args, s.now, s.run, len(s.teacher.blocks)
    loss_flow, loss_dist, *layers, grad_norm, _ = (now.sums / now.sums[-1]).tolist()
    img_s, memory = args.batch_size / seconds_a_step, torch.cuda.max_memory_allocated() / 2**30 if run.on_gpu else None
    line = dict(step=now.step, loss=args.lambda_d * loss_dist + args.lambda_f * loss_flow, loss_flow=loss_flow,
                loss_dist=loss_dist, alpha=layers[:L], weight=layers[L:], grad_norm=grad_norm,
                lr=args.lr * rate_factor(now.step - 1, args), skipped=int(now.faults[0]), img_s=img_s,
                tflops_per_gpu=img_s / run.ranks * s.flops / 1e12, memory_gib=memory)
    run.say(as_text(line, args.steps, (args.steps - now.step) * seconds_a_step))
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


def export(state, path):
    """The self-describing tokenizer file of a state."""
    weights = state.get("averaged", state)  # with --ema the averages
    tensors = {f"{part}.{k}": v for part in ("encoder", "decoder") for k, v in weights[part].items()}
    tensors.update(latent_mean=state["latent_mean"], latent_std=state["latent_std"])
    write_model(path, {**state["config"], "step": state["step"], "id": state["id"]}, tensors)


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
        unreadable = step(s, batches, *step_parts)
        timed += 1
        bar.update()
        interrupted = check(s, unreadable)

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
