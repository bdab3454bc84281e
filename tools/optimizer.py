"""How a step moves the weights: the learning rate, an update that skips what is not finite, averages, CUDA graphs,
gradients that several ranks add up.

    factor = rate_factor(step, args)                       # of the learning rates: warm-up and decay
    row = update_weights(optimizer, weights, clip, stats)  # clips, steps; not if a number is not finite
    average_weights(averages, weights, step, decay)
    means = take_means(now, log_every)                     # of these rows, for a line of the log
    micro_step = capture_graph(micro_step, img, clear)     # before the first step
    gradients = join_gradients(weights)                    # likewise; dist.all_reduce(gradients) in each step
"""
import math

import torch


def rate_factor(step, args):
    """The factor of the learning rates at a step (0 is the first): the warm-up times the decay at the end."""
    left = min(1.0, (args.steps - step) / max(1.0, args.lr_decay * args.steps))
    if args.decay_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return left * min(1.0, (step + 1) / max(1, args.warmup))


def average_weights(averages, weights, step, decay):
    """After a step (0 is the first) move each average toward its weight: a <- d a + (1 - d) w. In the first steps
    d = (step + 1) / (step + 10) is below `decay`, so that the averages of a short run forget its initial weights."""
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (step + 1) / (step + 10)))


def update_weights(optimizer, weights, clip, stats):
    """Clip the gradients of `weights` and step the optimizer. stats: the step's statistics, a vector. Returns them, the
    gradient norm, and 1.

    If one of these numbers is not finite, the weights and the optimizer stay as they are. The numbers are the same on
    all ranks, so all ranks skip the same steps.
    """
    norm = torch.nn.utils.clip_grad_norm_(weights, clip or math.inf)
    row = torch.cat([stats, norm[None], torch.ones_like(stats[:1])])
    finite = row.isfinite().all()
    if optimizer.defaults.get("fused"):  # it skips its step where found_inf is 1: Python need not wait for the GPU
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()
    return row


def take_means(now, log_every):
    """The means of the statistics since the last log line, as a list. Then the sums start anew; but a last line that
    comes before its interval is over keeps them for a longer run."""
    means = (now.sums / now.sums[-1]).tolist()
    if now.step % log_every == 0:
        now.sums = torch.zeros_like(now.sums)
    return means


def join_gradients(weights):
    """Set the gradients of `weights` to zeros that lie in one tensor (n,), and return it: ranks add it up at once.
    Backward passes add to it in place. Clear it by optimizer.zero_grad(set_to_none=False), so that it stays theirs."""
    sizes = [w.numel() for w in weights]
    joined = torch.zeros(sum(sizes), device=weights[0].device)
    for w, part in zip(weights, joined.split(sizes)):
        w.grad = part.view_as(w)
    return joined


def capture_graph(micro_step, img, clear):
    """Record micro_step (a batch of images or latents -> statistics) as a CUDA graph. Returns a function that replays
    it on batches of that shape. Python launches the kernels of a small model more slowly than the GPU runs them.

    clear() clears the gradients just before the recording. Where it leaves None, the graph writes gradients; where it
    leaves zeros, the graph adds to them.
    """
    img, side = img.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and let the libraries set up
        for _ in range(3):
            micro_step(img)
    torch.cuda.current_stream().wait_stream(side)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = micro_step(img)

    def replay(batch):
        img.copy_(batch)
        graph.replay()
        return stats
    return replay
