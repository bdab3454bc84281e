"""How train.py evaluates while it runs: one-step PSNR, flow loss by time, and a picture, on some images of --val.

    quality, flow_by_t, picture = validate(encoder, decoder, dataset, batch=32, seed=0, autocast=nullcontext())
"""
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from eval import PERFECT, comparison, image_noise, psnr, round_uint8
from tools.script import ignore_signals


def pixels(items):
    """Pairs of a uint8 image (3, H, W) and a label -> the images as an array (b, 3, H, W). Workers send arrays through
    a pipe; tools/job.py says why."""
    return torch.stack([img for img, _ in items]).numpy()


def spread(n, images=512):
    """The numbers of at most `images` of n images, at even distances from 0 on. `validate` looks at these."""
    count = min(n, images)
    return [i * n // count for i in range(count)]


@torch.no_grad()
def validate(encoder, decoder, dataset, batch, seed, autocast, workers=0, rank=0, ranks=1):
    """Evaluate on 512 images spread over `dataset`, whose items are pairs of uint8 (3, S, S) and a label.

    Returns the one-step PSNR in dB, the flow loss in each tenth of t (on the first batch), and on rank 0 a uint8
    picture (H, W, 3) of eight of the images, again spread evenly: original | reconstruction | error x4, two triples a
    row. The ranks share the images, and the decoding noise is a function of (seed, image number).
    """
    device, p = decoder.mean.device, decoder.config.patch
    numbers = spread(len(dataset))
    shown = [numbers[k] for k in spread(len(numbers), 8)]
    numbers = numbers[rank::ranks]
    count = -(-len(numbers) // batch)
    batches = [numbers[k::count] for k in range(count)]  # so the first batch is spread over all images, too
    if rank == 0:  # it decodes the eight shown again, because other ranks may have them
        batches += [shown[k:k + batch] for k in range(0, len(shown), batch)]
    total = torch.zeros(12, dtype=torch.float64, device=device)  # sums over images: PSNR, 1, flow loss of ten tenths
    triples = []
    encoder.eval(), decoder.eval()
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=pixels, num_workers=workers,
                        worker_init_fn=ignore_signals)
    for i, (n, img) in enumerate(zip(batches, loader)):
        img = torch.from_numpy(img).to(device) / 255
        N = img.shape[2] * img.shape[3] // p ** 2
        noise = image_noise(n, N, 3 * p * p, seed).to(device)
        with autocast:
            z = encoder.encode(img)  # the raw latent: in training the statistics are mean 0 and deviation 1
            rec = round_uint8(decoder.decode(z, noise=noise))
            for k in range(10) if i == 0 else ():
                t = (k + torch.rand(len(img), N, generator=torch.Generator().manual_seed(k)).to(device)) / 10
                total[2 + k] = decoder.loss(z, img, t, noise) * len(numbers)  # a rank counts as its images
        if i >= count:  # images to show
            triples += [comparison(*pair) for pair in zip(img, rec)]
            continue
        total[0] += psnr(img, rec).clamp(max=PERFECT).sum()
        total[1] += len(img)
    encoder.train(), decoder.train()
    if ranks > 1:
        dist.all_reduce(total)
    psnr_mean, _, *flow_by_t = (total / total[1]).tolist()
    if rank > 0:
        return psnr_mean, flow_by_t, None
    triples += [torch.zeros_like(triples[0])] * (len(triples) % 2)
    grid = torch.cat([torch.cat(triples[i::2], dim=1) for i in (0, 1)], dim=2)  # (3, H, W)
    return psnr_mean, flow_by_t, (grid * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
