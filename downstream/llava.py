"""Understanding: a language model that sees through the tokenizer, UniFlow-LV (LLaVA-1.5) and -XL (LLaVA-OneVision).

    L="torchrun --nproc_per_node=8 -m downstream.llava" V="--llm lmsys/vicuna-7b-v1.5 --weights W --variant lv"
    $L train $V --stage 1 --data 558k.json --images FOLDER --out out/lv1
    $L train $V --stage 2 --init out/lv1 --data 665k.json --images FOLDER --out out/lv
    $L answer --run out/lv --questions q.jsonl --images FOLDER --answers a.jsonl
    python -m downstream.llava chat --run out/lv img.png "What is in the picture?"
    $L bench --llm vicuna-7b --variant lv --stage 2

The model is in llava_model.py, data in llava_data.py, prompts in llava_prompts.py, what uses a trained model in
llava_use.py, bench in llava_speed.py; this is training. Weights and moments are fp32, products bf16 on a GPU. One
process trains the model whole, several share it by FSDP2. The loss is the mean over all targets of a global batch, so
that neither ranks nor micro-batches change it (LLaVA's is the mean of the micro-batches' means). RUN/model.safetensors
holds what answer, chat and --init need: the encoder, the projector and, if it was trained, the language model; RUN/llm
its text tokenizer. RUN/state.pt is what a resume needs; with several ranks it names a folder beside it that holds the
tensors.
"""
import argparse
import math
import os
import shlex
import shutil
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from downstream import llava_speed, llava_use
from downstream.llava_data import Conversations, Looker, collate
from downstream.llava_model import IGNORE, PARTS, build_stage, load_tokenizer, saved, shard
from downstream.llava_prompts import TEMPLATES, Prompter
from encoder import UserError, load_exactly, write_atomically, write_model
from tools.batches import load_batches, split_batch
from tools.checkpoint import explain_failed_save
from tools.optimizer import rate_factor, take_means
from tools.run import INTERRUPTS, Run, command_line, listen, loop
from tools.script import check_locks, default_workers, number

# what a stage trains, and LLaVA's and LLaVA-OneVision's settings of it; the paper's are the same but for AdamW's betas
STAGES = {
    ("lv", 1): dict(trains=PARTS[1:2], template="plain", aspect="crop", batch_size=256, lr=1e-3, max_length=2048),
    ("lv", 2): dict(trains=PARTS[1:], template="vicuna", aspect="pad", batch_size=128, lr=2e-5, max_length=2048),
    ("xl", 1): dict(trains=PARTS[1:2], template="plain", aspect="squash", batch_size=512, lr=1e-3, max_length=8192),
    ("xl", 2): dict(trains=PARTS, template="chat", aspect="anyres", batch_size=512, lr=1e-5, max_length=32768),
    ("xl", 3): dict(trains=PARTS, template="chat", aspect="anyres", batch_size=512, lr=1e-5, max_length=32768),
}
BETAS = {"llava": (0.9, 0.999), "paper": (0.5, 0.95)}
MAY_DIFFER = set("llm weights teacher teacher_weights images data init out steps epochs workers micro_batch compile "
                 "checkpoint_activations log_every save_every keep_every resume_anyway warmup lr_decay".split())
STATE = "tensors step samples sums faults cut args id config".split()


def parse_args(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="train | answer | chat | bench")
    workers = default_workers(8)
    on_gpu, count = torch.cuda.is_available(), number(int, 1)
    every = dict(type=number(int, 0), metavar="STEPS")

    train = commands.add_parser("train", help="train a stage; the same command again resumes")
    add = train.add_argument
    add("--variant", choices=["lv", "xl"], required=True, help="LLaVA-1.5 or LLaVA-OneVision")
    add("--stage", type=int, choices=[1, 2, 3], required=True, help="lv has 2; selects what is trained, and defaults")
    add("--llm", metavar="FOLDER|NAME", help="a causal language model of transformers [that of --init]")
    add("--weights", metavar="FILE", help="the tokenizer [that of --init]")
    add("--teacher", metavar="NAME|FILE", help="or, for the control, a foundation model")
    add("--teacher_weights", metavar="FILE|random", help="its weights [the published ones]")
    add("--init", metavar="RUN", help="the stage before, whose tensors this one starts from")
    add("--data", nargs="+", required=True, metavar="FILE", help="conversations in LLaVA's JSON")
    add("--images", default=".", metavar="FOLDER", help="what the paths in --data start from [%(default)s]")
    add("--out", default="out/llava", metavar="FOLDER", help="where the run lives [%(default)s]")
    add("--size", type=count, help="pixels of a tile [the tokenizer's native size]")
    add("--layer", type=int, help="the encoder's block that is read [that of --init, or -2]")
    add("--pool", type=int, choices=[1, 2], help="2: four neighbouring tokens become one [that of --init, or 1]")
    add("--tiles", type=count, default=9, help="xl: a picture has at most so many tiles' tokens [%(default)s]")
    add("--template", choices=TEMPLATES, help="of the prompt [the stage's]")
    add("--system", metavar="TEXT", help="what a prompt begins with [the template's]")
    add("--max_length", type=number(int, 2), help="in tokens, with the visual ones [the stage's]")
    add("--recipe", choices=BETAS, default="llava", help="AdamW's betas: 0.9, 0.999, or the paper's [%(default)s]")
    add("--batch_size", type=count, help="global batch [the stage's]")
    add("--micro_batch", type=count, default=4, help="samples per rank and forward pass [%(default)s]")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="in optimizer steps")
    length.add_argument("--epochs", type=count, default=1, help="or in passes over the data [1]")
    add("--lr", type=number(float, 0), help="of the projector and the language model [the stage's]")
    add("--encoder_lr", type=number(float, 0), default=2e-6, help="of the encoder, where it is trained [%(default)s]")
    add("--warmup", type=number(int, 0), metavar="STEPS", help="then the rate falls as a cosine [3%% of all]")
    add("--weight_decay", type=number(float, 0), default=0.0, help="[%(default)s]")
    add("--clip", type=number(float, 0), default=1.0, help="gradient norm limit, 0 for none [%(default)s]")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the projector and the order [%(default)s]")
    add("--workers", type=number(int, 0), default=workers, help="data loading processes per rank [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="the blocks [%(default)s]")
    add("--checkpoint_activations", action=argparse.BooleanOptionalAction, default=on_gpu,
        help="recompute each block in the backward pass [with a GPU]")
    add("--log_every", type=count, default=10, metavar="STEPS", help="[%(default)s]")
    add("--save_every", **every, default=500, help="state.pt and model.safetensors, also at the end [%(default)s]")
    add("--keep_every", **every, help="keep a copy of the model for good [never]")
    add("--resume_anyway", action="store_true", help="resume although arguments differ")
    llava_use.add_commands(commands, on_gpu, workers)
    llava_speed.add_command(commands, on_gpu)

    args = ap.parse_args(argv)
    if args.command != "train":
        return args
    stage = STAGES.get((args.variant, args.stage)) or train.error("--variant lv has the stages 1 and 2")
    for name, value in stage.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if bool(args.weights) + bool(args.teacher) > 1 or not (args.weights or args.teacher or args.init):
        train.error("give the tokenizer's --weights, or for the control a --teacher, or --init")
    if args.teacher_weights and not args.teacher:
        train.error(f"--teacher_weights {args.teacher_weights} is of a --teacher, and there is none")
    if not (args.llm or args.init):
        train.error("give a language model, --llm, or --init")
    args.lr_decay, args.decay_shape, args.eval_every = 1.0, "cosine", 0
    return args


def setup(args, run):
    """All that a run holds, as a namespace `s`: data, model, optimizer, and in `s.now` what changes and is saved."""
    s = SimpleNamespace(args=args, run=run)
    s.micro_batch, s.accumulation = split_batch(args.batch_size, args.micro_batch, run.ranks)
    s.model, s.config = build_stage(args, run.device)
    c, vit = s.config["llava"], s.model.encoder.vit
    s.tokenizer = load_tokenizer(c["llm"] if args.llm else os.path.join(args.init, "llm"))
    prompter = Prompter(s.tokenizer, args.template, args.system)
    s.data = Conversations(args.data, args.images, prompter, Looker(c, vit.config), args.batch_size, args.seed,
                           args.max_length, run.ranks)
    s.llm_dtype = s.model.llm.get_input_embeddings().weight.dtype  # in which the files have it
    run.connect()
    shard(s.model, run, args.compile)
    s.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_gpu and run.ranks == 1)
    encoder = [p for p in vit.parameters() if p.requires_grad]
    rest = [p for name, p in s.model.named_parameters() if p.requires_grad and not name.startswith("encoder.")]
    groups = [dict(params=rest, lr=args.lr), dict(params=encoder, lr=args.encoder_lr)]
    s.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS[args.recipe],
                                    weight_decay=args.weight_decay, fused=True)
    s.rates = [group["lr"] for group in s.optimizer.param_groups]
    for p in rest + encoder:  # AdamW's own first values, here already, as a place to load a checkpoint into
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        s.optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    args.steps = args.steps or args.epochs * (len(s.data) // args.batch_size)
    args.warmup = round(0.03 * args.steps) if args.warmup is None else args.warmup
    args.lr_decay = 1 - args.warmup / args.steps
    s.now = run.counts(4)  # loss, gradient norm, tokens, steps
    s.now.cut = 0  # samples that were too long
    # a resume compares both: --llm and --weights may name other places, but frozen parts are not in state.pt
    args.samples = f"{len(s.data):,} conversations, {s.data.pictured.sum():,} with pictures"
    args.parts = f"{os.path.basename(c['llm'])} seeing by {os.path.basename(c['eye'].split()[-1])}"
    run.say(f"data: {args.samples}; template {args.template}, pictures: {args.aspect}, at most {args.max_length:,} "
            "tokens")
    run.say(f"model: {c['llm']} seeing by {c['eye']}, " + (f"from {args.init}" if args.init else "a new projector")
            + f"; trains {', '.join(args.trains)}: "
            f"{sum(p.numel() for p in rest + encoder) / 1e6:.1f}M of "
            f"{sum(p.numel() for p in s.model.parameters()) / 1e6:.1f}M parameters")
    run.say(f"run: {args.steps:,} steps of {args.batch_size} = micro-batch {s.micro_batch} x accumulation "
            f"{s.accumulation} x {run.ranks} rank{'s' * (run.ranks > 1)} on {run.device.type}; rate {args.lr:.2e} "
            f"after {args.warmup:,} steps of warm-up, then a cosine; --recipe {args.recipe}: AdamW's betas "
            f"{BETAS[args.recipe]}")
    return s


def tensors(s):
    """{name: tensor} of what training moves: weights and moments. With several ranks they are parts (DTensors)."""
    found = {}
    for name, p in s.model.named_parameters():
        if p.requires_grad:
            found[name] = p.detach()
            found.update({f"{key} {name}": x for key, x in s.optimizer.state[p].items()})
    return found


def resume(s):
    """Go on from RUN/state.pt if there is one, on all ranks from the same; whether there are steps left."""
    args, run, now, path = s.args, s.run, s.now, s.run.path("state.pt")
    if state := run.load(STATE, args, MAY_DIFFER):
        if isinstance(state["tensors"], str):
            from torch.distributed import checkpoint
            checkpoint.load(tensors(s), checkpoint_id=run.path(state["tensors"]), process_group=run.control)
        elif run.ranks > 1:
            raise UserError(f"{path} was saved by one process: go on with one, or start from RUN as --init")
        else:
            load_exactly(tensors(s), state["tensors"], path)
        run.restore(state, now)
        export(s, run.path("model.safetensors"))  # a run that was killed between the two has not written it
    if now.step >= args.steps:
        run.say(f"the run is finished: {run.path('model.safetensors')}; to extend it, give more --steps or --epochs")
    return now.step < args.steps


def step(s, batches):
    """One optimizer step from `accumulation` micro-batches. Returns whether some rank received a signal."""
    args, now, run = s.args, s.now, s.run
    for group, rate in zip(s.optimizer.param_groups, s.rates):
        group["lr"] = rate * rate_factor(now.step, args)
    parts, loss = [next(batches) for _ in range(s.accumulation)], 0
    bad = run.list_unreadable(sum([part.pop("unreadable") for part in parts], []))
    targets = sum(int((part["targets"] != IGNORE).sum()) for part in parts)
    tokens, cut = (sum(part.pop(key) for part in parts) for key in ("tokens", "cut"))
    interrupts, targets, tokens, cut, bad = run.sum(len(INTERRUPTS), targets, tokens, cut, bad)
    for part in parts:
        part = {k: x.to(run.device, non_blocking=True) if isinstance(x, torch.Tensor) else x for k, x in part.items()}
        with s.autocast:
            each = s.model(**part) / max(1, targets)
        (each * run.ranks).backward()  # FSDP takes the mean over ranks
        loss = loss + each.detach()
    if run.ranks > 1:
        dist.all_reduce(loss)
    weights = [p for group in s.optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, args.clip or math.inf)
    norm = norm.full_tensor() if run.ranks > 1 else norm
    row = torch.stack([loss.double(), norm.double(), torch.full_like(norm, tokens, dtype=torch.float64),
                       torch.ones_like(norm, dtype=torch.float64)])
    if row.isfinite().all():  # a step takes seconds: waiting for the GPU here does not count
        s.optimizer.step()
    s.optimizer.zero_grad()
    now.cut += cut
    run.count(now, row, args.batch_size)
    if bad:
        run.say(f"{bad} pictures could not be read, others took their places: see {run.path('bad_images*.txt')}")
    if run.must_stop(now):
        batch = range(now.samples - args.batch_size, now.samples)
        run.stop_not_finite(now, f"{(run.last_finite[0] / run.last_finite[3]).item():.4f}",
                            [f"sample {s.data.index(n)}" for n in batch])
    return interrupts > 0


def log(s, seconds_a_step):
    """A line of log.jsonl and of the screen: the means since the last one."""
    args, now, run = s.args, s.now, s.run
    loss, norm, tokens, _ = take_means(now, args.log_every)
    lr, skipped = args.lr * rate_factor(now.step - 1, args), int(now.faults[0])
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.on_gpu else None
    run.write(step=now.step, loss=loss, grad_norm=norm, lr=lr, tokens=tokens, cut=now.cut, skipped=skipped,
              img_s=args.batch_size / seconds_a_step, tokens_s=tokens / seconds_a_step, memory_gib=memory)
    eta = tqdm.format_interval((args.steps - now.step) * seconds_a_step)
    run.say(f"step {now.step:6d}/{args.steps} | loss {loss:.4f} | grad {norm:.2f} | lr {lr:.1e} | "
            f"{tokens / seconds_a_step:,.0f} tokens/s" + f" | {now.cut:,} cut at {args.max_length:,}" * (now.cut > 0)
            + (f" | {skipped} steps skipped" if skipped else "") + (f" | {memory:.1f} GiB" if run.on_gpu else "")
            + f" | eta {eta}")


def whole(p):
    """A parameter as one tensor on the CPU; if ranks share it, all must call this."""
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu()


def export(s, path):
    """The model as a file that says what it is, and its text tokenizer in RUN/llm."""
    found = {}
    for name, p in s.model.named_parameters():
        if saved(name) and (not name.startswith("llm.") or s.config["llava"]["trains_llm"]):
            x = whole(p)
            if s.run.rank == 0:
                found[name] = x.to(s.llm_dtype) if name.startswith("llm.") else x
    if s.run.rank == 0:
        s.tokenizer.save_pretrained(s.run.path("llm"))
        s.model.llm.config.save_pretrained(s.run.path("llm"))
        write_model(path, {**s.config, "step": s.now.step, "id": s.now.id}, found)


def save(s):
    """Write the checkpoint and the model. Several ranks write a folder first; state.pt then names it, so that at any
    moment there is a whole checkpoint."""
    run, now, every = s.run, s.now, s.args.keep_every
    state = {**vars(now), "config": s.config, "args": vars(s.args), "tensors": tensors(s)}
    path = run.path("state.pt")
    with explain_failed_save(path, now.step):
        if every and now.step % every == 0:  # first, as a resume from this step would not write it again
            export(s, run.path(f"model_{now.step:07d}.safetensors"))
        if run.ranks > 1:
            from torch.distributed import checkpoint
            folder = f"state_{now.step:07d}"
            if run.rank == 0:  # of a run that was killed here
                shutil.rmtree(run.path(folder), ignore_errors=True)
            dist.barrier(run.control)
            checkpoint.save(state["tensors"], checkpoint_id=run.path(folder), process_group=run.control)
            state["tensors"] = folder
        if run.rank == 0:
            write_atomically(path, lambda f: torch.save(state, f))
            for name in os.listdir(run.out):
                if name.startswith("state_") and name != state["tensors"] and os.path.isdir(run.path(name)):
                    shutil.rmtree(run.path(name), ignore_errors=True)
        export(s, run.path("model.safetensors"))


def train(args, on_signal=None):
    """Train as the command line asks. on_signal: handles signals, once there is something to save."""
    run = Run(args.out)
    s = setup(args, run)
    run.hold_folder()  # before anything in it is read
    if not resume(s):
        return
    run.open_log(s.now.step)
    if on_signal:
        listen(on_signal)
    check_locks(args.workers)
    batches = load_batches(run, s.data, args, s.now, s.micro_batch, collate)
    interrupted = loop(run, s.now, args, lambda: step(s, batches), lambda seconds: log(s, seconds), lambda: None,
                       lambda: save(s))
    run.end(s.now.step, interrupted, f"{run.path('model.safetensors')}; try: python -m downstream.llava chat --run "
            f"{shlex.quote(args.out)} IMAGE \"What is in the picture?\"")


def main(argv=None, on_signal=None):
    args = parse_args(argv)
    other = {"answer": llava_use.answer, "chat": llava_use.chat, "bench": llava_speed.bench}
    return other[args.command](args) if args.command in other else train(args, on_signal)


if __name__ == "__main__":
    command_line(main, "downstream.llava")
