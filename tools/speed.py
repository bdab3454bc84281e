"""How fast is it? Measure the training step, tokenizing, or the loading of pictures, on this machine.

    python -m tools.speed train --teacher internvit --teacher_weights random    # any flag of train.py; no data
    torchrun --nproc_per_node=2 -m tools.speed train --teacher internvit --teacher_weights random
    python -m tools.speed sample                                                # on a GPU: InternViT's size at random
    python -m tools.speed sample --weights weights/uniflow-tiny.safetensors --size 256
    python -m tools.speed data imagenet.zip --size 448                          # decoded, cropped, sent to the device

`train` also measures a large matrix product, and says which share of that speed the step reaches. This share can be
compared between machines. docs/speed.md has results.
"""
import argparse
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

import distill
from data import ImageDataset, cores
from decoder import Decoder, DecoderConfig
from encoder import TEACHERS, Encoder, ViT, read_config
from tools.batches import sample_numbers
from tools.run import Run, command_line
from tools.script import check_size, find_weights, number
from train import build_models, build_optimizer, model_flops, parse_args, training_step


def seconds(f, repeats=10):
    """Mean time of a call of f(). On a GPU three calls warm up and `repeats` are timed, on a CPU one and one."""
    on_gpu = torch.cuda.is_available()
    for n in (3, repeats) if on_gpu else (1, 1):
        start = time.perf_counter()
        for _ in range(n):
            f()
        if on_gpu:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def matrix_ceiling(device):
    """(side, FLOP/s) of a large square matrix product on the device, in bf16 on a GPU: what all speeds stand beside."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return side, 2 * side ** 3 / seconds(lambda: a @ b, 50)


def train_speed(flags):
    """Print how many random pictures a second the training step takes, in several settings, and what its parts take."""
    args, run = parse_args(flags), Run(None)
    on_gpu, micro_batch = run.on_gpu, args.micro_batch
    models = teacher, encoder, decoder = [m.to(run.device) for m in build_models(args)]
    optimizer = build_optimizer(args, encoder, decoder)
    autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=on_gpu)
    run.connect()
    side, ceiling = matrix_ceiling(run.device)
    ceiling /= 1e12
    tflop = model_flops(encoder, decoder, args.size) / 1e12
    run.say(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {args.teacher} at "
            f"{args.size} px, {tflop:.2f} TFLOP an image, {run.ranks} rank{'s' * (run.ranks > 1)}; a matrix product of "
            f"{side} reaches {ceiling:.3g} TFLOP/s")

    def say_row(name, images, took):
        rate = images / took
        memory = f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
        run.say(f"{name:36s} | {rate * run.ranks:8,.1f} img/s | {took * 1e3:7.1f} ms | "
                f"{rate * tflop:6.4g} TFLOP/s a GPU | {rate * tflop / ceiling:.3f} of the ceiling{memory}")

    # micro-batch, accumulation, compiled, --checkpoint_activations; the parts are measured in the last setting
    settings = [(micro_batch, 1, False, False), (max(micro_batch // 2, 1), 1, args.compile, False),
                (2 * micro_batch, 1, args.compile, False), (max(micro_batch // 4, 1), 1, args.compile, True),
                (micro_batch, 1, args.compile, True), (micro_batch, 1, args.compile, False)]
    if run.ranks > 1:
        settings = [(micro_batch, 1, args.compile, False), (micro_batch, 2, args.compile, False)]
    for micro, accumulation, compiled, checkpointed in settings:
        args.compile, encoder.vit.checkpoint, decoder.checkpoint = compiled, checkpointed, checkpointed
        micro_step = update = took = None  # frees the graph of the setting before
        optimizer.zero_grad()
        torch.compiler.reset()
        name = f"{micro:4d} x {accumulation}"
        name += ", not compiled" * (not compiled) + ", checkpoint_activations" * checkpointed
        try:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            img = torch.randint(256, (micro, 3, args.size, args.size), dtype=torch.uint8, device=run.device)
            micro_step, update = training_step(args, *models, optimizer, autocast, micro, accumulation, run.ranks)
            took = seconds(lambda: update(sum(micro_step(img) for _ in range(accumulation))))
            say_row(name, micro * accumulation, took)
        except torch.OutOfMemoryError:
            run.say(f"{name:36s} | out of memory")
    if run.ranks > 1 or not took:
        return

    adding = seconds(lambda: micro_step(img))  # a micro-batch's gradients, without the optimizer's step
    count = args.batch_size / micro_batch
    if count > 1:
        # a step of `count` micro-batches: their gradients, and once the optimizer
        say_row(f"{args.batch_size} images a step (micro-batch x {count:g})", args.batch_size,
                count * adding + took - adding)
    micro_step = update = None  # frees their graph
    with autocast:
        times = {name: seconds(part) for name, part in training_parts(args, *models, img / 255).items()}
    times["optimizer"] = took - adding
    run.say("parts: " + ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in times.items())
            + f"; sum {1e3 * sum(times.values()):.1f} ms of {1e3 * took:.1f}")


def training_parts(args, teacher, encoder, decoder, x):
    """{name: function that runs this part of a micro-batch of images x, forward and backward}"""
    P, (z, h) = teacher.num_prefix, encoder(x)
    h_teacher = [y[:, P:] for y in teacher(x)]  # without CLS
    z, h = z.detach().requires_grad_(), [y.detach().requires_grad_() for y in h]
    distances = torch.compile(distill.layer_distances, dynamic=False) if args.compile else distill.layer_distances

    def student():
        y, hidden = encoder(x)
        torch.autograd.backward([y, *hidden], [z, *h])  # any gradients would do

    def distance():
        loss, *_ = distill.distill_loss([y[:, P:] for y in h], h_teacher, args.beta, args.strategy, distances)
        torch.autograd.grad(loss, h)

    return {"teacher": lambda: teacher(x), "student": student, "decoder": lambda: decoder(z, x).backward(),
            "distance": distance}


def fast(enc, dec, img, steps=1):
    """(encode, decode) for images of one shape (B, 3, H, W) on a GPU: bf16, compiled, each replayed as a CUDA graph.

    Casts the matrices of enc and dec to bf16, for good. A result stays valid until the next call of the same function.
    Without a GPU nothing is gained by this: then they are enc.encode and dec.decode.
    """
    if img.device.type != "cuda":
        return torch.no_grad()(enc.encode), torch.no_grad()(lambda latent: dec.decode(latent, steps))
    for x in (*enc.parameters(), *dec.parameters()):
        if x.ndim in (2, 4):
            x.data = x.data.bfloat16()
    enc.compile(dynamic=False)
    dec.condition, dec.velocity = (torch.compile(f, dynamic=False) for f in (dec.condition, dec.velocity))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        latent = enc.encode(img)
        return torch.cuda.make_graphed_callables((enc.encode, lambda z: dec.decode(z, steps)), ((img,), (latent,)))


def median_seconds(f, repeats=25):
    """Median time of a call of f(); the first calls, which warm up, are outliers."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return sorted(took)[repeats // 2]


@torch.no_grad()
def sample_speed(weights, size):
    """Print how many random pictures a second are encoded and decoded: batches of 32 and 1, in several steps."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu and not weights:
        print("RANDOM weights of the InternViT tokenizer's size, for measuring")
        enc, dec, info = Encoder(ViT(TEACHERS["internvit"])).eval(), Decoder(DecoderConfig()).eval(), {"size": 448}
    else:
        path = find_weights(weights)
        enc, dec, info = Encoder.from_pretrained(path), Decoder.from_pretrained(path), read_config(path)
    enc, dec, size = enc.to(device), dec.to(device), size or info["size"]
    check_size(size, dec.config.patch)
    name = f"{torch.cuda.get_device_name()}, bf16, compiled, CUDA graphs" if on_gpu else "CPU, fp32, not compiled"
    print(f"{name}, torch {torch.__version__}, {size} px")

    def say_row(B, name, f):
        took = median_seconds(f)
        print(f"batch {B:2d} | {name:18s} | {B / took:8.1f} img/s | {took * 1e3:7.2f} ms", flush=True)

    batches = {32: (1, 2, 4, 25), 1: (1,)} if on_gpu else {2: (1, 2)}  # {batch: numbers of decoding steps}
    for B, several_steps in batches.items():
        img = torch.rand(B, 3, size, size, device=device)
        for steps in several_steps:
            encode, decode = fast(enc, dec, img, steps)
            latent = encode(img)
            if steps == 1:
                say_row(B, "encode + decode", lambda: decode(encode(img)))
                say_row(B, "encode", lambda: encode(img))
            say_row(B, f"decode in {steps} step{'s' * (steps > 1)}", lambda: decode(latent))


def data_speed(roots, size, duration):
    """Print how many training samples a second 1, 2, 4.. workers decode and crop, and bring to the device."""
    data, on_gpu = ImageDataset(roots, size, train=True), torch.cuda.is_available()
    start = time.perf_counter()
    np.random.default_rng([0, 0]).permutation(1_281_167)
    took = 1e3 * (time.perf_counter() - start)
    print(f"{len(data):,} images at {size} px; the order of an epoch of ImageNet takes {took:.0f} ms and "
          f"{1_281_167 * 8 / 2**20:.0f} MiB a worker")
    for workers in sorted({2 ** k for k in range(cores().bit_length())} | {cores()}):
        loader = iter(DataLoader(data, num_workers=workers, pin_memory=on_gpu, prefetch_factor=4,
                                 batch_sampler=sample_numbers(0, 32, 32, 0, 1, 1_000_000)))
        for _ in range(2 * workers):  # until all workers have begun
            next(loader)
        start, n = time.perf_counter(), 0
        while (took := time.perf_counter() - start) < duration:
            img = next(loader)[0]
            n += len(img.cuda(non_blocking=True) if on_gpu else img)
        print(f"{workers:3d} workers | {n / took:8.1f} img/s | {n / took / workers:7.1f} a worker", flush=True)
        del loader


def main(argv=None, on_signal=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train_speed(argv[1:])
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ap.add_subparsers(dest="part", required=True)
    parts.add_parser("train", help="the training step: any flag of train.py")
    tokenizing = parts.add_parser("sample", help="encoding and decoding")
    tokenizing.add_argument("--weights", metavar="FILE",
                            help="[on a GPU random ones of InternViT's size, else as sample.py]")
    tokenizing.add_argument("--size", type=number(int, 1), help="pixels of a side [the model's native size]")
    loading = parts.add_parser("data", help="the loading of pictures")
    loading.add_argument("paths", nargs="+", metavar="PATH", help="folders or .zip archives")
    loading.add_argument("--size", type=number(int, 1), default=448, help="of the crops [%(default)s]")
    loading.add_argument("--seconds", type=number(float, 0.01), default=5.0, help="of each measurement [%(default)s]")
    args = ap.parse_args(argv)
    if args.part == "data":
        data_speed(args.paths, args.size, args.seconds)
    else:
        sample_speed(args.weights, args.size)


if __name__ == "__main__":
    command_line(main, "tools.speed")
