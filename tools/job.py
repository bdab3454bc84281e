"""A command over many images, on one or several ranks: what eval.py, tools/fid.py and tools/latents.py have in common.

    job = Job(args)                                    # args: weights, batch_size, workers, bf16, out
    enc, dec, info, images, about = load_tokenizer(job)                   # reads args.data and args.size, too
    for numbers, img, labels in job.images("encode", images):             # this rank's share
        ...
    total = sum(job.gather(mine))                      # `mine` of every rank
    return job.finish({**about, "total": total}, [f"total {total}"])      # rank 0 writes it to args.out and prints it
"""
import json
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import encoder
from data import ImageDataset
from decoder import Decoder
from eval import Moments, UserError, sha256
from tools.script import (USER_ERRORS, check_locks, check_report, check_size, commit, find_weights, name_weights,
                          rank_and_device, write_file)


class ImagesOrReasons(Dataset):
    """Items of datasets of the same files: (number, images, label, None), or (number, None, None, why) for a file that
    cannot be used, so that a command can name all of these. A batch has one size, so an image of another size than the
    first readable one cannot be used either."""

    def __init__(self, *datasets):
        self.datasets, self.shape = datasets, None  # None: an image of any shape can be used
        items = (self[n] for n in range(len(self)))
        self.shape = next((images[0].shape for _, images, _, why in items if not why), None)

    def __len__(self):
        return len(self.datasets[0])

    def __getitem__(self, n):
        try:
            images, labels = zip(*(dataset[n] for dataset in self.datasets))
        except USER_ERRORS as e:
            return n, None, None, str(e)
        if self.shape and images[0].shape != self.shape:
            this, first = (f"{shape[2]}x{shape[1]}" for shape in (images[0].shape, self.shape))
            return n, None, None, (f"{self.datasets[0].path(n)} is {this}, the first is {first}: "
                                   "--resolution 256 crops all to 256x256")
        return n, images, labels[0], None


def collate(items):
    """Items of ImagesOrReasons -> (numbers, a uint8 batch (b, 3, H, W) of each dataset, labels, reasons).

    Workers send arrays through a pipe. They would send tensors through /dev/shm, in a thread whose errors are lost: if
    /dev/shm is small (64 MB in Docker) or there are too few file descriptors, the main process would wait for ever.
    """
    reasons, usable = [x[3] for x in items if x[3]], [x for x in items if not x[3]]
    numbers, images, labels, _ = zip(*usable) if usable else ((), (), (), ())
    return list(numbers), [np.stack(x) for x in zip(*images)], list(labels), reasons


class Job:
    """A command's arguments, this rank's share of the images, the exchange among ranks, and the report."""

    def __init__(self, args, *read):
        """read: what a command reads whose report, --out FILE, may not overwrite that."""
        if read:
            check_report(args.out, *read)
        self.args, self.start = args, time.time()
        self.rank, self.ranks, self.device = rank_and_device()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16)
        self.precision = "bf16 autocast" if args.bf16 else "fp32 without TF32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
        if self.ranks > 1 and not dist.is_initialized():
            # gloo is enough: little is exchanged. Ranks may wait for rank 0 longer than the usual 30 minutes
            dist.init_process_group("gloo", timeout=timedelta(days=1))

    def gather(self, x, everywhere=True):
        """Every rank's x, in rank order, on every rank; or on rank 0 alone, and an empty list elsewhere."""
        parts = [x] * self.ranks
        if self.ranks > 1 and everywhere:
            dist.all_gather_object(parts, x)
        elif self.ranks > 1:
            dist.gather_object(x, parts if self.rank == 0 else None)
        return parts if everywhere or self.rank == 0 else []

    def merge_ranks(self, moments):
        """The Moments of all ranks' rows, on the CPU."""
        merged = Moments()
        for count, mean, scatter in self.gather((moments.count, moments.mean.cpu(), moments.scatter.cpu())):
            if count:
                merged.merge(count, mean, scatter)
        return merged

    def crops(self, paths, size):
        """The ADM centre crops of the images in these folders and archives; size None: the images as they are."""
        return ImageDataset(paths, size, train=False)

    def images(self, note, *datasets, numbers=None):
        """Yields this rank's images: (numbers, a batch (b, 3, H, W) in [0, 1] of each dataset, labels). All ranks must
        use up this generator.

        No image is left out in silence. After one that cannot be used nothing more is yielded. The others are still
        read, so that a UserError at the end names all that cannot be used.
        """
        numbers = range(self.rank, len(datasets[0]), self.ranks) if numbers is None else numbers
        on_gpu = self.device.type == "cuda"  # then a thread receives the batches, while the GPU works
        loader = DataLoader(Subset(ImagesOrReasons(*datasets), numbers), self.args.batch_size,
                            num_workers=self.args.workers, collate_fn=collate, pin_memory=on_gpu)
        check_locks(self.args.workers)
        bad = []
        quiet = None if self.rank == 0 else True  # tqdm's None: show the bar if this is a terminal
        with tqdm(total=len(numbers), desc=note, unit="img", disable=quiet, leave=False) as bar:
            for n, batches, labels, reasons in loader:
                bad += reasons
                bar.update(len(n) + len(reasons))
                if n and not bad:
                    yield n, *(torch.from_numpy(x).to(self.device) / 255 for x in batches), torch.tensor(labels)
        bad = sum(self.gather(bad), [])
        if bad:
            raise UserError(f"{len(bad)} of {len(datasets[0])} images cannot be used, so there are no figures: "
                            + "; ".join(bad[:10]) + "; ..." * (len(bad) > 10))

    def finish(self, report, table):
        """Add the circumstances to the report and return it. Rank 0 writes it to args.out as JSON, and prints it with
        the lines of `table`."""
        on_gpu = self.device.type == "cuda"
        report.update(code=commit(), torch=torch.__version__, ranks=self.ranks,
                      seconds=round(time.time() - self.start, 1),
                      device=torch.cuda.get_device_name() if on_gpu else "cpu",
                      memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None)
        if self.rank == 0:
            try:
                if self.args.out:
                    self.write_json(report)
            finally:  # also if the disk is full
                self.print_report(report, table)
        if self.ranks > 1:
            dist.barrier()
        return report

    def write_json(self, report):
        """Write the report to args.out, whole or not at all, with null for what is not finite."""
        finite = json.loads(json.dumps(report), parse_constant=lambda name: None)  # JSON has no NaN and no Infinity
        write_file(self.args.out, json.dumps(finite, indent=1, allow_nan=False).encode())

    def print_report(self, report, table):
        """Print to standard output; if that is closed or broken, to standard error."""
        lines = []
        for key in ("weights", "step", "teacher", "data", "fit", "images", "protocol", "warning"):
            if report.get(key) is not None:
                value = name_weights(self.args.weights, report[key]) if key == "weights" else report[key]
                lines.append(f"{key:9s} {' '.join(value) if isinstance(value, list) else value}")
        text = "\n".join([*lines, "", *table])
        try:
            print(text, file=sys.stdout or sys.stderr, flush=True)  # None: it was closed before the start
        except (OSError, ValueError) as e:
            print(text, file=sys.stderr)
            raise UserError(f"standard output cannot be written ({e}): the report is above"
                            + f" and in {self.args.out}" * bool(self.args.out)) from None


def load_tokenizer(job):
    """The tokenizer and images that the command line names: (encoder, decoder, the file's configuration, dataset of the
    crops that go in, the first entries of the report)."""
    args, weights = job.args, find_weights(job.args.weights)
    digest = sha256(weights)
    enc, dec = (part.from_pretrained(weights).to(job.device) for part in (encoder.Encoder, Decoder))
    info = encoder.read_config(weights)
    if sha256(weights) != digest:
        raise UserError(f"{weights} was written anew while it was read: run this again")
    size = args.size or info["size"]
    check_size(size, dec.config.patch, f" of {weights}")
    images = job.crops(args.data, size)
    about = {"weights": weights, "weights_sha256": digest, "step": info.get("step"), "teacher": info.get("teacher"),
             "commit": info.get("commit"), "data": args.data, "images": len(images)}
    return enc, dec, info, images, about
