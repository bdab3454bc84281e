"""A run's batches: how a global batch divides among ranks and micro-batches, and which samples each of them holds.

    micro_batch, accumulation = split_batch(512, 32, ranks)
    batches = load_batches(run, data, args, now, micro_batch)    # an iterator over this rank's micro-batches
    img, labels = next(batches)

Batches are a function of the sample number alone, so that a resume, more workers or more ranks change none of them.
"""
from torch.utils.data import DataLoader, default_collate

from encoder import UserError
from tools.script import ignore_signals


def split_batch(batch, micro_batch, ranks):
    """(micro-batch, accumulation steps) of each rank: micro-batch * accumulation * ranks = batch, exactly.

    A micro-batch that does not divide the rank's share becomes the largest divisor below it.
    """
    if batch % ranks:
        low = batch // ranks * ranks
        near = " or ".join(str(b) for b in (low, low + ranks) if b)
        raise UserError(f"batch_size {batch} does not divide among {ranks} ranks: try {near}")
    share = batch // ranks
    micro_batch = next(m for m in range(min(micro_batch, share), 0, -1) if share % m == 0)
    return micro_batch, share // micro_batch


def collate(samples):
    """Samples of a dataset -> (uint8 (B, 3, S, S), their labels as a list). A worker sends a list through a pipe; a
    tensor of labels would go through /dev/shm, by a thread that loses its errors."""
    images, labels = zip(*samples)
    return default_collate(images), list(labels)


def sample_numbers(first, batch, micro_batch, rank, ranks, batches):
    """Yields this rank's micro-batches as lists of global sample numbers: `batches` global batches from sample `first`.

    Whatever the ranks, the global batches are the same samples: rank r has the r-th contiguous share of each.
    """
    share = batch // ranks
    for start in range(first + rank * share, first + rank * share + batches * batch, batch):
        for m in range(start, start + share, micro_batch):
            yield list(range(m, m + micro_batch))


def load_batches(run, data, args, now, micro_batch, collate_fn=collate):
    """An iterator over this rank's micro-batches, from the sample now.samples to the end of the run."""
    numbers = sample_numbers(now.samples, args.batch_size, micro_batch, run.rank, run.ranks, args.steps - now.step)
    # pinned memory is copied to the GPU while it computes; four batches a worker bridge the change of an epoch
    return iter(DataLoader(data, batch_sampler=numbers, num_workers=args.workers, collate_fn=collate_fn,
                           prefetch_factor=4 if args.workers else None, pin_memory=run.on_gpu,
                           worker_init_fn=ignore_signals))
