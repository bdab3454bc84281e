"""How fast a network on an encoder trains and predicts on this machine, with random weights: the tasks' `bench`.

    measure_speed("ViT-L", model, (img, labels), lambda: model.logits(img / 255), {"160,000 steps of 16": 2_560_000})
    bench_detector(Detector(encoder, 80), [4, 8])    # seconds of a step at each batch

Beside each figure of measure_speed stands its share of what a large matrix product reaches in the same run, which can
be compared between machines. FLOPs are those of matrix products, convolutions and attention, as torch counts them.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode

from encoder import parameter_groups
from tools.speed import matrix_ceiling, seconds

COCO = 118_287  # training images


def measure_speed(name, model, batch, predict, schedules):
    """Print the speed of training and of predict(). model(*batch) gives a dict of losses, model.backbone is an Encoder,
    and schedules {what: images} are extrapolated to hours."""
    B, device = len(batch[0]), batch[0].device
    on_gpu = device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    side, ceiling = matrix_ceiling(device)
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
    for what, step, share in ("training", train, 1 if frozen else 3), ("prediction", use, 1):
        model.train(what == "training")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        took = seconds(step)
        done = share * flops / took
        print(f"{what:10s} | {B / took:8.4g} img/s | {done / 1e12:6.4g} TFLOP/s | {done / ceiling:.3f} of the ceiling"
              + (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""), flush=True)
        if what == "training":
            for schedule, images in schedules.items():
                print(f"  extrapolated: {images / B * took / 3600:,.1f} hours for {schedule}", flush=True)


def bench_detector(model, batches):
    """Print seconds and memory of a training step of a detect.Detector, for each size of a batch, on random pictures
    with seven objects, as many as COCO's have."""
    device, S = torch.device("cuda" if torch.cuda.is_available() else "cpu"), model.size
    model, on_gpu = model.to(device).train(), device.type == "cuda"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    for block in model.backbone.vit.blocks if on_gpu else ():
        block.compile()
    print(f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, {S} px", flush=True)
    for B in batches:
        sides, masks = S / 16 + torch.rand(7 * B, 2) * S / 2, torch.zeros(7 * B, S, S, dtype=torch.uint8)
        start = torch.rand(7 * B, 2) * (S - sides)
        boxes = torch.cat([start, start + sides], dim=1)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist()):
            mask[y1:y2, x1:x2] = 1
        batch = [x.to(device) for x in (torch.randint(0, 256, (B, 3, S, S), dtype=torch.uint8), boxes,
                                        torch.randint(1, 81, (7 * B,)), torch.full((B,), 7), masks)]

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = sum(model(*batch).values())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        took = seconds(step, 20)
        print(f"batch {B} | {took:.3f} s an iteration | {B / took:.2f} img/s"
              + (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else "")
              + f" | extrapolated: {100 * COCO / B * took / 3600:,.0f} hours for 100 epochs of COCO", flush=True)
