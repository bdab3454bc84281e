"""How fast is it? Measure the training step, tokenizing, or the loading of pictures, on this machine.

    python -m tools.speed train --teacher internvit --teacher_weights random    # any flag of train.py; no data
    torchrun --nproc_per_node=2 -m tools.speed train --teacher internvit --teacher_weights random
    python -m tools.speed sample                                                # on a GPU: InternViT's size at random
    python -m tools.speed sample --weights weights/uniflow-tiny.safetensors --size 256
    python -m tools.speed data imagenet.zip --size 448                          # decoded, cropped, sent to the device

`train` also says which share of a large matrix product's speed, measured in the same run, the step reaches: that can be
compared between machines. docs/speed.md has results.
"""
import argparse
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

import distill
from data import ImageDataset, cores, sample_numbers
from decoder import Decoder, DecoderConfig
from encoder import TEACHERS, Encoder, ViT, read_config
from sample import fast
from tools.run import Run, command_line
from tools.script import find_weights
from train import build_models, build_optimizer, model_flops, parse_args, training_step


def seconds(f, repeats=10):
    """Mean wall-clock time of f(), after calls to warm up; on a CPU of a single one."""
    for n in (3, repeats) if torch.cuda.is_available() else (1, 1):
        start = time.perf_counter()
        for _ in range(n):
            f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def train_speed(flags):
    """Print what the training step does in a second on random pictures: several micro-batches, modes, and its parts."""
    args, run = parse_args(flags), Run(None)
    device, n, on_gpu, ranks = run.device, args.micro_batch, run.on_gpu, run.ranks
    teacher, encoder, decoder = (m.to(device) for m in build_models(args))
    optimizer = build_optimizer(args, encoder, decoder)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    run.connect()
    side, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    ceiling = 2 * side ** 3 / seconds(lambda: a @ b, 50) / 1e12
    tflop = model_flops(encoder, decoder, args.size) / 1e12
    run.say(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {args.teacher} at "
            f"{args.size} px, {tflop:.2f} TFLOP an image, {ranks} rank{'s' * (ranks > 1)}; a matrix product of {side} "
            f"reaches {ceiling:.3g} TFLOP/s")

    def row(name, images, took):
        rate = images / took
        run.say(f"{name:36s} | {rate * ranks:8,.1f} img/s | {took * 1e3:7.1f} ms | {rate * tflop:6.4g} TFLOP/s a GPU | "
                f"{rate * tflop / ceiling:.3f} of the ceiling"
                + (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""))

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
        name = f"{micro:4d} x {accumulation}{'' if compiled else ', not compiled'}"
        name += ", checkpoint_activations" * checkpointed
        try:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            img = torch.randint(256, (micro, 3, args.size, args.size), dtype=torch.uint8, device=device)
            micro_step, update = training_step(args, teacher, encoder, decoder, optimizer, autocast, micro,
                                               accumulation, ranks)
            took = seconds(lambda: update(sum(micro_step(img, m == accumulation - 1) for m in range(accumulation))))
            row(name, micro * accumulation, took)
        except torch.OutOfMemoryError:
            run.say(f"{name:36s} | out of memory")
    if ranks > 1 or not took:
        return

    # the last row's parts, one after the other
    adding, batch = seconds(lambda: micro_step(img)), args.batch_size
    row(f"{batch} images a step (micro-batch x {batch / n:g})", batch, batch / n * adding + took - adding)
    micro_step = None  # frees its graph
    with autocast:
        x = img / 255
        h_teacher, (z, h) = teacher(x), encoder(x)
        z, h = z.detach().requires_grad_(), [y.detach().requires_grad_() for y in h]

        def student():
            y, hidden = encoder(x)
            torch.autograd.backward([y, *hidden], [z, *h])

        def distance():
            loss, *_ = distill.distill_loss(h, h_teacher, args.beta, args.strategy, teacher.num_prefix)
            torch.autograd.grad(loss, h)
        parts = {"teacher": lambda: teacher(x), "student": student, "decoder": lambda: decoder(z, x).backward(),
                 "distance": distance}
        times = {name: 1e3 * seconds(part) for name, part in parts.items()} | {"optimizer": 1e3 * (took - adding)}
    optimizer.zero_grad()
    run.say("parts: " + ", ".join(f"{name} {t:.1f} ms" for name, t in times.items())
            + f"; sum {sum(times.values()):.1f} ms of {1e3 * took:.1f}")


@torch.no_grad()
def sample_speed(weights, size):
    """Print how many random pictures a second are encoded and decoded: batches of 32 and 1; several steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not weights and device.type == "cuda":
        print("RANDOM weights of the InternViT tokenizer's size, for measuring")
        enc, dec, info = Encoder(ViT(TEACHERS["internvit"])).eval(), Decoder(DecoderConfig()).eval(), {"size": 448}
    else:
        path = find_weights(weights)
        enc, dec, info = Encoder.from_pretrained(path), Decoder.from_pretrained(path), read_config(path)
    enc, dec, size = enc.to(device), dec.to(device), size or info["size"]
    on_gpu = device.type == "cuda"
    name = f"{torch.cuda.get_device_name()}, bf16, compiled, CUDA graphs" if on_gpu else "CPU, fp32, not compiled"
    print(f"{name}, torch {torch.__version__}, {size} px")
    for B, steps in ((32, (1, 2, 4, 25)), (1, (1,))) if on_gpu else ((2, (1, 2)),):
        img = torch.rand(B, 3, size, size, device=device)
        for n in steps:
            encode, decode = fast(enc, dec, img, n)
            latent = encode(img)
            both = (("encode + decode", lambda: decode(encode(img))), ("encode", lambda: encode(img))) if n == 1 else ()
            for what, f in (*both, (f"decode in {n} step{'s' * (n > 1)}", lambda: decode(latent))):
                took = []
                for _ in range(25):
                    start = time.perf_counter()
                    f()
                    if on_gpu:
                        torch.cuda.synchronize()
                    took.append(time.perf_counter() - start)
                took = sorted(took)[len(took) // 2]  # the first ones warm up
                print(f"batch {B:2d} | {what:18s} | {B / took:8.1f} img/s | {took * 1e3:7.2f} ms", flush=True)


def data_speed(roots, size, duration):
    """Print how many training samples a second are decoded, cropped and brought to the device, by 1, 2, 4.. workers."""
    data, on_gpu = ImageDataset(roots, size, train=True), torch.cuda.is_available()
    start = time.perf_counter()
    np.random.default_rng([0, 0]).permutation(1_281_167)
    took = 1e3 * (time.perf_counter() - start)
    print(f"{len(data):,} images at {size} px; the order of an epoch of ImageNet takes {took:.0f} ms and "
          f"{1_281_167 * 8 / 2**20:.0f} MiB a worker")
    for workers in sorted({2 ** k for k in range(cores().bit_length())} | {cores()}):
        loader = iter(DataLoader(data, num_workers=workers, pin_memory=on_gpu, prefetch_factor=4,
                                 batch_sampler=sample_numbers(0, 32, 32, 0, 1, 1_000_000)))
        for _ in range(2 * workers):  # until all are at work
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
    tokenizing.add_argument("--size", type=int, help="pixels of a side [the model's native size]")
    loading = parts.add_parser("data", help="the loading of pictures")
    loading.add_argument("paths", nargs="+", metavar="PATH", help="folders or .zip archives")
    loading.add_argument("--size", type=int, default=448, help="of the crops [%(default)s]")
    loading.add_argument("--seconds", type=float, default=5.0, help="of each measurement [%(default)s]")
    args = ap.parse_args(argv)
    if args.part == "data":
        data_speed(args.paths, args.size, args.seconds)
    else:
        sample_speed(args.weights, args.size)


if __name__ == "__main__":
    command_line(main, "tools.speed")
