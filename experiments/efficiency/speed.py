"""How long does a training step take alone on this GPU? study.py reads it to plan runs of several sizes.

    python -m experiments.efficiency.study speed
"""
import copy

import torch

import train
from tools.optimizer import average_weights
from tools.speed import seconds

SHAPES = ("tiny/64/64 tiny/64/128 tiny/64/256 small/64/64 small/64/128 small/64/256 tiny/128/64 tiny/256/16 "
          "tiny/256/32 tiny/256/64").split()  # teacher/size/batch


def measure_speed(shape):
    """Seconds of a training step alone on this GPU, from images on it, and of its teacher: a line of speeds.jsonl."""
    torch.set_float32_matmul_precision("high")  # TF32, as in training
    teacher, size, batch = shape.split("/")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    args = train.parse_args(["--teacher", teacher, "--teacher_weights", "random", "--size", size, "--steps", "1",
                             "--batch_size", batch, "--micro_batch", batch])
    torch.compiler.reset()
    teacher, encoder, decoder = (m.to(device) for m in train.build_models(args))
    weights = [p.detach() for m in (encoder, decoder) for p in m.parameters()]
    averages = copy.deepcopy(weights)
    optimizer = train.build_optimizer(args, encoder, decoder)
    micro_step, update = train.training_step(args, teacher, encoder, decoder, optimizer, autocast, args.batch_size, 1)
    img = torch.randint(256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8, device=device)

    def step():
        update(micro_step(img))

    def step_with_averages():
        step()
        average_weights(averages, weights, 9, 0.9)

    line = {"shape": shape, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "torch": torch.__version__, "seconds": seconds(step, 50), "seconds_ema": seconds(step_with_averages, 50)}
    with torch.no_grad(), autocast:
        line["seconds_teacher"] = seconds(lambda: teacher(img / 255), 50)  # not as a graph: launches count
    line["gflop"] = train.model_flops(encoder, decoder, args.size) / 1e9
    print(f"{shape}: {1e3 * line['seconds']:.2f} ms a step, {args.batch_size / line['seconds']:,.0f} img/s; "
          f"{1e3 * line['seconds_ema']:.2f} with --ema; teacher {1e3 * line['seconds_teacher']:.2f}", flush=True)
    return line
