"""How fast a network on an encoder trains and predicts on this machine, with random weights: the tasks' `bench`.

    measure_speed("ViT-L", model, (img, labels), lambda: model.logits(img / 255), {"160,000 steps of 16": 2_560_000})

Beside each figure stands its share of what a large matrix product reaches in the same run, which can be compared
between machines. FLOPs are those of matrix products, convolutions and attention, as torch counts them.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode

from encoder import parameter_groups
from tools.speed import seconds


def measure_speed(name, model, batch, predict, schedules):
    """Print the speed of training and of predict(). model(*batch) gives a dict of losses, model.backbone is an Encoder,
    and schedules {what: images} are extrapolated to hours."""
    B, device = len(batch[0]), batch[0].device
    on_gpu = device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    side, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    ceiling = 2 * side ** 3 / seconds(lambda: a @ b, 50)
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {name}, "
          f"{batch[0].shape[3]}x{batch[0].shape[2]} px, batch {B}; a matrix product of {side} reaches "
          f"{ceiling / 1e12:.3g} TFLOP/s", flush=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5), fused=True)

    def train():
        with autocast:
            loss = sum(model(*batch).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def use():
        with autocast:
            predict()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*batch)
    flops = counter.get_total_flops()
    frozen = not any(p.requires_grad for p in model.backbone.parameters())
    if on_gpu:
        for block in model.backbone.vit.blocks:
            block.compile(dynamic=False)
        torch.cuda.reset_peak_memory_stats()
    for what, step, share in ("training", train, 1 if frozen else 3), ("prediction", use, 1):
        model.train(what == "training")
        took = seconds(step)
        done = share * flops / took
        print(f"{what:10s} | {B / took:8.4g} img/s | {done / 1e12:6.4g} TFLOP/s | {done / ceiling:.3f} of the ceiling"
              + (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""), flush=True)
        if what == "training":
            for schedule, images in schedules.items():
                print(f"  extrapolated: {images / B * took / 3600:,.1f} hours for {schedule}", flush=True)
