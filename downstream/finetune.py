"""The trainer of segment, depth, linear_probe and detect: a backbone, a head on it, and a run that resumes exactly.

    finetune.add_flags(parser, epochs=20, lr=1e-4)        # other defaults than these
    backbone = finetune.load_backbone(args)               # an Encoder, of --weights or around a --teacher
    model = Head(backbone)                                # model.backbone is the Encoder, model(*batch) the loss
    finetune.train(args, model, data, evaluate, config)
    model, config = finetune.load_model("RUN", build, device)          # for test and predict

A batch is a function of (seed, sample number) alone, and random draws are one of (seed, step, micro-batch, rank).
Training leaves RUN/state.pt, RUN/log.jsonl, RUN/samples/*.png, and RUN/model.safetensors: all tensors of the model, its
config, the backbone's, and where that came from. Nothing else is needed to load it.

Several ranks are one: gradients are averaged over them. A batch norm sees the micro-batches of all ranks at once on
GPUs (SyncBatchNorm); on CPUs, which lack that, it sees its rank's, and the ranks average their running statistics after
each step. With accumulation it sees one micro-batch at a time.
"""
import argparse
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from tqdm import tqdm

from downstream.backbone import build_backbone, load_backbone, load_model, load_tensors  # the first three for the tasks
from encoder import parameter_groups, write_atomically, write_model
from tools.batches import load_batches, split_batch
from tools.optimizer import rate_factor, take_means, update_weights
from tools.run import INTERRUPTS, Run, listen, loop, seed_step
from tools.script import check_locks, commit, default_workers, number

# These arguments may differ when a run is resumed; how many samples there are, and the backbone's weights, may not.
MAY_DIFFER = set("data val weights teacher_weights init out steps epochs workers micro_batch compile log_every "
                 "eval_every save_every keep_every resume_anyway by_length".split())
STATE = "model optimizer step samples sums faults args id config".split()


class Length(argparse.Action):
    """--steps or --epochs, given instead of a default of either."""

    def __call__(self, parser, args, value, option=None):
        args.steps = args.epochs = None
        setattr(args, self.dest, value)


def add_flags(parser, **defaults):
    """Add the flags of training to an argparse parser. defaults: {name of a flag: its default}, in place of these."""
    group = parser.add_argument_group("backbone")
    source, add = group.add_mutually_exclusive_group(required=True), group.add_argument
    source.add_argument("--weights", metavar="FILE", help="a tokenizer's encoder: of train.py, or uniflow-internvit")
    source.add_argument("--teacher", metavar="NAME", help="or, as the control, a foundation model as it was published")
    add("--teacher_weights", metavar="PATH|random", help="the teacher's file [the published one, downloaded]")
    add("--frozen", action="store_true", help="train the head alone [%(default)s]")
    add("--drop_path", type=number(float, 0, 0.9), default=0.0, help="stochastic depth, last block [%(default)s]")
    add = parser.add_argument_group("optimization").add_argument
    count, part, every = number(int, 1), number(float, 0, 1), dict(type=number(int, 0), metavar="STEPS")
    add("--batch_size", type=count, default=16, help="global batch [%(default)s]")
    add("--micro_batch", type=count, help="samples per rank and forward pass [a rank's share]")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, action=Length, help="in optimizer steps [%(default)s]")
    length.add_argument("--epochs", type=count, action=Length, help="or in passes over the data [%(default)s]")
    add("--lr", type=number(float, 0), default=1e-4, help="learning rate of AdamW [%(default)s]")
    add("--weight_decay", type=number(float, 0), default=0.05, help="of linear layers and convolutions [%(default)s]")
    add("--layer_decay", type=part, default=1.0, help="factor of the rate from block to earlier block [%(default)s]")
    add("--warmup", **every, default=0, help="the first steps, over which the rate rises from 0 [%(default)s]")
    add("--lr_decay", type=part, default=0.0, metavar="FRACTION", help="last part, in which it falls [%(default)s]")
    add("--decay_shape", default="linear", choices=["linear", "cosine"], help="how it falls there [%(default)s]")
    add("--clip", type=number(float, 0), default=1.0, help="gradient norm limit, 0 for none [%(default)s]")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of initialisation, order, draws [%(default)s]")
    add = parser.add_argument_group("machine and output").add_argument
    workers = default_workers(16)
    add("--workers", type=number(int, 0), default=workers, help="data loading processes per rank [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compile the backbone's blocks [%(default)s: with a GPU]")
    add("--out", default="run", metavar="FOLDER", help="where the run lives [%(default)s]")
    add("--log_every", type=count, default=50, metavar="STEPS", help="log a line [%(default)s]")
    add("--eval_every", **every, default=1000, help="measure; also at the end, 0: only then [%(default)s]")
    add("--save_every", **every, default=1000, help="save; also at the end, 0: only then [%(default)s]")
    add("--keep_every", **every, help="keep a copy of the model for good [never]")
    add("--resume_anyway", action="store_true", help="resume although arguments differ")
    flags = {action.dest for action in parser._actions}
    assert defaults.keys() <= flags, f"no such flag: {defaults.keys() - flags}"
    parser.set_defaults(**defaults)


def follow_length(args, **values):
    """Set flags that were not given to values that follow from the length of the run. Where a resumed run has another
    length, these flags may differ, too."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            args.by_length = [*getattr(args, "by_length", []), name]


def to_device(x, device):
    """A batch, or a part of it, on the device: tensors, and lists or dicts of them; the rest as it is."""
    if isinstance(x, torch.Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    return [to_device(v, device) for v in x] if isinstance(x, (list, tuple)) else x


def set_training(model, args):
    """The model in training mode, but a frozen backbone in eval mode."""
    model.train()
    model.backbone.train(not args.frozen)
    return model


def setup(args, model, data, evaluate, config, optimizer, picture):
    """All that a run holds, as a namespace `s`; s.now is what changes and is saved."""
    run = Run(args.out)
    s = SimpleNamespace(args=args, run=run, data=data, evaluate=evaluate, picture=picture)
    args.micro_batch = args.micro_batch or args.batch_size
    s.micro_batch, s.accumulation = split_batch(args.batch_size, args.micro_batch, run.ranks)
    args.steps = args.steps or max(1, args.epochs * len(data) // args.batch_size)
    args.task, args.training_samples = type(model).__name__, f"{len(data):,}"  # a resume compares them
    run.connect()
    s.model = set_training(model.to(run.device), args)
    s.optimizer = optimizer or torch.optim.AdamW(
        parameter_groups(s.model, args.lr, args.weight_decay, args.layer_decay), fused=True)
    s.rates = [group["lr"] for group in s.optimizer.param_groups]
    s.weights = [p for group in s.optimizer.param_groups for p in group["params"]]
    s.autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.on_gpu)
    backbone, c = s.model.backbone, s.model.backbone.vit.config
    source = args.weights or " ".join(filter(None, (args.teacher, args.teacher_weights)))
    s.config = {"vit": asdict(c), "latent_dim": backbone.latent_dim, "projector": backbone.projector, **config,
                "task": args.task, "source": source, "backbone_sha256": args.backbone_sha256, "frozen": args.frozen,
                "commit": commit()}
    s.now = run.counts(3)  # loss, gradient norm, steps
    s.names, s.unchecked = [], True  # the names of the losses, if there are several; whether a step was checked
    millions = lambda weights: sum(p.numel() for p in weights) / 1e6
    run.say(f"data: {args.training_samples} samples")
    if args.batch_size > len(data):
        run.say(f"warning: a batch of {args.batch_size:,} has each of them several times: give a smaller --batch_size")
    run.say(f"model: {args.task} of {millions(s.model.parameters()):.1f}M parameters, {millions(s.weights):.1f}M in "
            f"the optimizer; backbone of {source}{', frozen' * args.frozen}")
    run.say(f"run: {args.steps:,} steps of {args.batch_size} = micro-batch {s.micro_batch} x accumulation "
            f"{s.accumulation} x {run.ranks} rank{'s' * (run.ranks > 1)} on {run.device.type}")
    return s


def spread_over_ranks(s):
    """Compile the backbone, and let the ranks exchange gradients."""
    run = s.run
    norms = [m for m in s.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    s.statistics = [x for m in norms for x in (m.running_mean, m.running_var)]
    if s.args.compile:  # block by block: all blocks share one compilation
        for block in s.model.backbone.vit.blocks:
            block.compile()
    s.trained = s.model
    if run.ranks > 1:
        if run.on_gpu:
            s.trained = nn.SyncBatchNorm.convert_sync_batchnorm(s.model)  # it keeps the parameters and the buffers
        s.trained = DistributedDataParallel(s.trained, [run.device] if run.on_gpu else None,
                                            gradient_as_bucket_view=True)
        s.trained.require_forward_param_sync = False  # the ranks' buffers are equal: see step


def resume(s):
    """Go on from RUN/state.pt if there is one, on all ranks from the same; whether there are steps left."""
    args, run, now, path = s.args, s.run, s.now, s.run.path("state.pt")
    if state := run.load(STATE, args, MAY_DIFFER.union(getattr(args, "by_length", ()))):
        load_tensors(s.model, state["model"], path)
        run.restore(state, now, s.optimizer)
        if run.rank == 0:  # a run that was killed between the two has not written it
            export(s, run.path("model.safetensors"))
    if now.step >= args.steps:
        run.say(f"the run is finished: {run.path('model.safetensors')}; to extend it, give more --steps or --epochs")
    return now.step < args.steps


def step(s, batches):
    """One optimizer step from `accumulation` micro-batches. Returns whether some rank received a signal."""
    args, now, run, stats = s.args, s.now, s.run, 0
    factor = rate_factor(now.step, args)
    for group, rate in zip(s.optimizer.param_groups, s.rates):
        group["lr"] = rate * factor
    for m in range(s.accumulation):
        batch = to_device(next(batches), run.device)
        seed_step(args.seed, now.step, run.rank * s.accumulation + m)  # as in train.py
        s.trained.require_backward_grad_sync = m == s.accumulation - 1
        with s.autocast:
            losses = s.trained(*batch)
        losses = losses if isinstance(losses, dict) else {"loss": losses}
        loss = sum(losses.values())
        (loss / s.accumulation).backward()
        s.names = list(losses) if len(losses) > 1 else []
        stats = stats + torch.stack([x.detach().float() for x in (loss, *map(losses.get, s.names))]) / s.accumulation
    if s.unchecked:
        check_gradients(s)
    if run.ranks > 1:
        dist.all_reduce(stats)
    row = update_weights(s.optimizer, s.weights, args.clip, stats / run.ranks)
    s.optimizer.zero_grad()
    if run.ranks > 1 and s.statistics:
        average_statistics(s.statistics, run.ranks)
    if now.step == 0:  # only now it is known how many losses there are
        now.sums = run.last_finite = torch.zeros_like(row, dtype=torch.float64)
    run.count(now, row, args.batch_size)
    if run.must_stop(now):
        batch = range(now.samples - args.batch_size, now.samples)
        run.stop_not_finite(now, f"{(run.last_finite[0] / run.last_finite[-1]).item():.4f}",
                            [s.data.path(s.data.index(n)) for n in batch])
    return run.sum(len(INTERRUPTS))[0] > 0


def check_gradients(s):
    """Raise ValueError if some parameter has no gradient after the first step: several ranks would wait for it."""
    idle = [name for name, p in s.model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ValueError(f"the loss does not depend on {', '.join(idle[:3])} ({len(idle)} parameters): set "
                         "requires_grad_(False) where the model is built")
    s.unchecked = False


def average_statistics(statistics, ranks):
    """Make the batch norms' running statistics their mean over the ranks."""
    joined = torch.cat([x.flatten() for x in statistics])
    dist.all_reduce(joined)
    for x, mean in zip(statistics, (joined / ranks).split([x.numel() for x in statistics])):
        x.copy_(mean.view_as(x))


def log(s, seconds_a_step):
    """A line of log.jsonl and of the screen: the means since the last one."""
    args, now, run = s.args, s.now, s.run
    loss, *parts, norm, _ = take_means(now, args.log_every)
    losses, img_s = dict(zip(s.names, parts)), args.batch_size / seconds_a_step
    lr, memory = args.lr * rate_factor(now.step - 1, args), torch.cuda.max_memory_allocated() / 2**30
    run.write(step=now.step, loss=loss, **losses, grad_norm=norm, lr=lr, skipped=int(now.faults[0]), img_s=img_s,
              memory_gib=memory if run.on_gpu else None)
    shown = [f"loss {loss:.4f}", *(f"{k} {x:.4f}" for k, x in losses.items()), f"grad {norm:.2f}", f"lr {lr:.1e}",
             f"{img_s:,.1f} img/s", *[f"{memory:.1f} GiB"] * run.on_gpu,
             f"eta {tqdm.format_interval((args.steps - now.step) * seconds_a_step)}"]
    run.say(f"step {now.step:6d}/{args.steps} | " + " | ".join(shown))


@torch.no_grad()
def measure(s):
    """Log the task's figures, and leave its picture in RUN/samples/."""
    args, now, run = s.args, s.now, s.run
    s.model.eval()
    try:
        with s.autocast:
            figures = s.evaluate() if s.evaluate else {}
            picture = s.picture() if s.picture and run.rank == 0 else None
    except Exception:  # no step may be lost to an evaluation that fails
        save(s)
        raise
    set_training(s.model, args)
    run.allow_tf32()
    if figures:
        run.write(kind="eval", step=now.step, **figures)
        shown = [f"{k} {x:.4g}" for k, x in figures.items() if isinstance(x, (int, float))]
        run.say(f"eval {now.step:6d} | " + " | ".join(shown))
    if picture:
        path = run.path("samples", f"step_{now.step:07d}.png")
        write_atomically(path, lambda f: picture.save(f, "PNG"))


def export(s, path):
    """The model as a file that says what it is."""
    write_model(path, {**s.config, "step": s.now.step, "id": s.now.id}, s.model.state_dict())


def save(s):
    """Write state.pt, and the model."""
    state = {**vars(s.now), "model": s.model.state_dict(), "optimizer": s.optimizer.state_dict(), "args": vars(s.args),
             "config": s.config}
    s.run.save(state, s.args.keep_every, lambda path: export(s, path))


def train(args, model, data, evaluate, config, collate=None, optimizer=None, on_signal=None, picture=None):
    """Train `model` as the flags of add_flags ask, or go on with the run in --out.

    model(*batch) is the loss, or a dict of losses, always of the same names, which are summed. Every parameter that
    requires a gradient must have one. data[n] is sample n of the whole run, a tuple of tensors, and its file is
    data.path(data.index(n)). collate: samples -> batch, a tuple of tensors, lists and dicts. evaluate: None, or a
    function () -> a dict of figures, which every rank calls in eval mode without gradients. config: what `build` of
    load_model needs. optimizer: instead of AdamW; its rates are scaled by warm-up and decay. on_signal: handles signals
    from the first step on. picture: a function () -> a PIL image for RUN/samples, which rank 0 calls when it evaluates.
    """
    s = setup(args, model, data, evaluate, config, optimizer, picture)
    run, now = s.run, s.now
    run.hold_folder()  # before anything in it is read
    if not resume(s):
        return
    run.open_log(now.step)
    spread_over_ranks(s)
    if on_signal:
        listen(on_signal)
    check_locks(2 * args.workers)  # an evaluation may have workers of its own beside those of training
    batches = load_batches(run, data, args, now, s.micro_batch, collate or default_collate)
    interrupted = loop(run, now, args, step=lambda: step(s, batches), log=lambda seconds: log(s, seconds),
                       evaluate=lambda: measure(s), save=lambda: save(s))
    run.end(now.step, interrupted, run.path("model.safetensors"))
