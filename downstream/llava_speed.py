"""How fast a stage trains and how fast answers come on this machine, with random weights: `downstream.llava bench`.

    torchrun --nproc_per_node=4 -m downstream.llava bench --llm vicuna-7b --variant lv --stage 2
    torchrun --nproc_per_node=4 -m downstream.llava bench --llm qwen2.5-7b --variant xl --stage 3 --show 3

Beside each figure stands its share of what a large matrix product reaches in the same run, which can be compared
between machines. FLOPs are those of matrix products and of the attention below its diagonal; what is computed twice,
because activations were not kept, counts once. Every sample has the same length.
"""
import argparse
import gc
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from downstream.llava_model import IMAGE, PARTS, LLaVA, blocks_of, count_tokens, set_trained, shard
from encoder import TEACHERS, Encoder, UserError, ViT
from tools.run import Run
from tools.script import check_size, number
from tools.speed import matrix_ceiling, seconds

# transformers' name of the kind, and the sizes of its configuration
SHAPES = {
    "vicuna-7b": ("llama", dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                                num_key_value_heads=32, vocab_size=32000)),
    "qwen2.5-7b": ("qwen2", dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                 num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)),
    "qwen2.5-1.5b": ("qwen2", dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                   num_attention_heads=12, num_key_value_heads=2, vocab_size=151936,
                                   tie_word_embeddings=True)),
    "smollm2-135m": ("llama", dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                                   num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)),
    "micro": ("llama", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                            num_key_value_heads=2, vocab_size=128)),
}
A800 = 250e12  # FLOP/s that a large matrix product in bf16 reaches there, of 312 that are promised: assumed
SAMPLES = {("lv", 1): 558_000, ("lv", 2): 665_000, ("xl", 1): 558_000, ("xl", 2): 4_000_000, ("xl", 3): 2_100_000}


def add_command(commands, on_gpu):
    """bench for the parser of the command line."""
    part = commands.add_parser("bench", help="speed of a stage and of answers, with random weights")
    add, count = part.add_argument, number(int, 1)
    add("--llm", choices=SHAPES, default="vicuna-7b", help="its shape [%(default)s]")
    add("--encoder", choices=TEACHERS, default="internvit", help="[%(default)s]")
    add("--variant", choices=["lv", "xl"], default="lv", help="[%(default)s]")
    add("--stage", type=int, choices=[1, 2, 3], default=2, help="selects what is trained [%(default)s]")
    add("--size", type=count, default=448, help="pixels of a tile [%(default)s]")
    add("--pool", type=int, choices=[1, 2], default=1, help="2: four neighbouring tokens become one [%(default)s]")
    add("--show", type=count, default=3, metavar="TILES", help="xl: tiles of a picture beside its base [%(default)s]")
    add("--text", type=count, default=320, metavar="TOKENS", help="of a sample [%(default)s]")
    add("--answer", type=count, default=160, metavar="TOKENS", help="of them that are targets [%(default)s]")
    add("--micro_batch", type=count, default=8, help="samples per rank and forward pass [%(default)s]")
    add("--steps", type=count, default=5, help="to measure [%(default)s]")
    add("--new_tokens", type=count, default=64, help="of an answer [%(default)s]")
    add("--generate_batch", type=count, nargs="+", default=[1, 32], metavar="BATCH", help="[1 32]")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="the blocks [%(default)s]")
    add("--checkpoint_activations", action=argparse.BooleanOptionalAction, default=on_gpu, help="[%(default)s]")


def make_model(args, device):
    """The model with random weights, on the device; its language model in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM
    kind, shape = SHAPES[args.llm]
    config = replace(TEACHERS[args.encoder], size=args.size)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.bfloat16)
        model = LLaVA(Encoder(ViT(config), 1, "linear"), llm, -2, args.pool, 9 if args.variant == "xl" else 0)
    return model


def training_flops(model, args, length, places, tiles):
    """Matrix-product FLOPs of a sample of `length` tokens, with targets after `places` of them and so many tiles."""
    linear = lambda module: sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    c, layers = model.llm.config, blocks_of(model.llm)
    heads = c.num_attention_heads * (c.hidden_size // c.num_attention_heads)
    llm = 2 * length * linear(layers) + len(layers) * 2 * length ** 2 * heads  # 4 S^2, of which half is computed
    llm += 2 * places * c.vocab_size * c.hidden_size
    with torch.device("meta"), FlopCounterMode(display=False) as eye:
        vit = ViT(model.encoder.vit.config)
        vit(torch.empty(1, 3, args.size, args.size), len(vit.blocks) - 1)
    projector = 2 * linear(model.projector) * (args.size // model.encoder.vit.config.patch // args.pool) ** 2
    trains = trained(args)
    # backward: gradients of inputs and of weights; of a frozen language model of inputs alone
    return (tiles * eye.get_total_flops() * (3 if "encoder" in trains else 1) + 3 * tiles * projector
            + llm * (3 if "llm" in trains else 2))


def trained(args):
    return PARTS[1:2] if args.stage == 1 else PARTS[1:] if args.variant == "lv" else PARTS


def bench(args):
    """Print what training and answering reach on this machine, beside a large matrix product."""
    if args.answer > args.text - 10:  # train_steps has ten tokens before the picture
        raise UserError(f"--text {args.text} is all of a sample's text, and --answer {args.answer} a part of it: give "
                        f"--text {args.answer + 10} or more")
    check_size(args.size, TEACHERS[args.encoder].patch * args.pool, f" of {args.encoder} times --pool {args.pool}")
    if (args.variant, args.stage) not in SAMPLES:
        raise UserError(f"--variant {args.variant} has no --stage {args.stage}: see llava.STAGES")
    run = Run("")
    run.connect()
    device = run.device
    side, ceiling = matrix_ceiling(device)
    model = make_model(args, device)
    grid = (1, args.show) if args.variant == "xl" and args.stage > 1 else None
    tiles = 1 + (args.show if grid else 0)
    picture = (tiles, grid, (args.size * args.show, args.size))
    visual = count_tokens(*picture, args.size // model.encoder.vit.config.patch // args.pool, model.cap)
    length = visual + args.text
    flops = training_flops(model, args, length, args.answer, tiles)
    name = torch.cuda.get_device_name() if run.on_gpu else "CPU"
    run.say(f"{run.ranks} x {name}, torch {torch.__version__}: {args.llm}, {args.encoder} at {args.size} px, "
            f"{args.variant} stage {args.stage}; samples of {visual:,} visual and {args.text} other tokens; a matrix "
            f"product of {side} reaches {ceiling / 1e12:.3g} TFLOP/s")
    train_steps(args, run, model, tiles, (*picture, visual), length, flops, ceiling)
    del model
    gc.collect()  # FSDP's modules and their hooks hold each other
    if run.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if run.rank == 0:
        generate(args, run, visual, picture)
    if run.ranks > 1:
        dist.barrier(run.control)


def memory(run):
    return f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if run.on_gpu else ""


def train_steps(args, run, model, tiles, layout, length, flops, ceiling):
    """Measure steps of one micro-batch a rank, as llava.py makes them."""
    device, B, visual = run.device, args.micro_batch, layout[3]
    set_trained(model, trained(args), args.checkpoint_activations)
    shard(model, run, args.compile)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-5, fused=True)
    ids = torch.arange(B * length, device=device).view(B, length) % 100
    ids[:, 10:10 + visual] = IMAGE
    places = torch.arange(length - args.answer - 1, length - 1, device=device)
    batch = dict(ids=ids, places=places, targets=ids[:, places + 1], layouts=[layout] * B,
                 tiles=torch.randint(256, (B * tiles, 3, args.size, args.size), device=device, dtype=torch.uint8))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.on_gpu and run.ranks == 1)

    def step():
        with autocast:
            loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    took = seconds(step, args.steps)
    share = B * flops / took / ceiling
    run.say(f"training, {B} x {run.ranks} samples a step | {B * run.ranks * length / took:,.0f} tokens/s | "
            f"{B * flops / took / 1e12:.4g} TFLOP/s a card | {share:.3f} of the ceiling" + memory(run))
    samples = SAMPLES[args.variant, args.stage]
    run.say(f"  extrapolated: {samples * flops / (8 * share * A800) / 3600:,.1f} hours for {samples:,} such samples on "
            f"eight A800, if they reach the same share of {A800 / 1e12:.0f} TFLOP/s")


def generate(args, run, visual, picture):
    """Measure answers, on one card, in bf16."""
    model = make_model(args, run.device).to(torch.bfloat16 if run.on_gpu else torch.float32).eval()
    ids = torch.tensor([1] * 10 + [IMAGE] * visual + [2] * 30)
    for batch in args.generate_batch:
        shown = torch.zeros(batch * picture[0], 3, args.size, args.size, dtype=torch.uint8)

        def answer(limit):
            for token in model.generate([ids] * batch, shown, [(*picture, visual)] * batch, limit, []):
                pass  # a token is read from the GPU, so it is there
        answer(2)
        start = time.perf_counter()
        answer(1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        answer(args.new_tokens + 1)
        took = time.perf_counter() - start - first
        run.say(f"answers, batch {batch} | first token after {first:.3g} s | "
                f"{batch * args.new_tokens / took:,.4g} tokens/s" + memory(run))
