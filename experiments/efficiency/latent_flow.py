"""The paper's Table 5c, row D_latent-flow: a flow in the space of a frozen autoencoder, and the pixel flow beside it.

    x = (patch - mean) basis / deviation      a per-patch PCA with twice the latent's components, frozen
    v(x_t, t, c), one Euler step, then patch = x deviation basis^T + mean

    T="--data TRAIN-0.zip .. TRAIN-3.zip --val VAL.zip --teacher_weights teacher-small.safetensors"
    python -m experiments.efficiency.latent_flow --space pca --seed 0 $T        # and --space pixel, --seed 1
    python -m experiments.efficiency.latent_flow --space pca --gtb_depth 0 $T   # the paper's row has no global blocks

The paper's autoencoder is SDXL's VAE; the PCA stands in for it. Student, distillation, condition and flow head are
those of the pixel flow (train.py, decoder.py), with the settings of row "default" of ../tiny_imagenet/study.py. Other
flags go to train.py. Appends one line to latent_flow.jsonl: figures of all --val by eval.py's functions (--bf16 on a
GPU), and the ceiling: what the PCA alone gives (25.23 dB, ssim 0.8513 on Tiny-ImageNet-100). Not resumable; nothing
but that line is written.
"""
import argparse
import json
import os
import time

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import eval as evaluation
import train
from decoder import Decoder, FlowHead, at_least_fp32, euler, flow_loss, patchify, sample_t, unpatchify
from tools.batches import collate, sample_numbers
from tools.job import Job
from tools.optimizer import rate_factor
from tools.run import seed_step
from tools.script import commit, ignore_signals, run_command
from tools.validate import validate

RESULTS = os.path.join(os.path.dirname(os.path.relpath(__file__)), "latent_flow.jsonl")
# written out, whatever train.py's defaults become
ALWAYS = ("--teacher small --recipe paper --size 64 --batch_size 64 --micro_batch 64 --steps 10000 --lr 5e-4 "
          "--lr_decay 0.5 --warmup 0 --beta1 0.5 --beta2 0.95 --endpoint 0")


class LatentFlow(Decoder):
    """A Decoder whose flow runs over K standardised coefficients of a frozen per-patch PCA instead of pixels.

    mean (3p^2,), basis (3p^2, K) orthonormal, deviation (K,). Noise that is given may be the pixel flow's (B, N, 3p^2):
    its first K numbers are used.
    """

    def __init__(self, config, mean, basis, deviation):
        super().__init__(config)
        self.head = FlowHead(len(deviation), config.width, config.flow_width, config.flow_depth)
        for m in self.head.modules():  # as the pixel flow's head starts
            if isinstance(m, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(m.weight)
                torch.nn.init.zeros_(m.bias)
        self.head.zero_init()
        for name, x in ("patch_mean", mean), ("basis", basis), ("deviation", deviation):
            self.register_buffer(name, x.float())

    def code(self, img):
        """Images (B, 3, H, W) in [0, 1] -> coefficients (B, N, K)."""
        with torch.autocast(img.device.type, enabled=False):  # fp32, as pixels are
            return (patchify(at_least_fp32(img), self.config.patch) - self.patch_mean) @ self.basis / self.deviation

    def picture(self, x, H, W):
        """Coefficients (B, N, K) -> images (B, 3, H, W), clamped to [0, 1]."""
        with torch.autocast(x.device.type, enabled=False):
            patches = (x * self.deviation) @ self.basis.T + self.patch_mean
        return unpatchify(patches, self.config.patch, H, W).clamp(0, 1)

    def loss(self, z, img, t=None, noise=None):
        x, c = self.code(img), self.condition(z)
        if t is None:
            t = sample_t(x.shape[:2], device=x.device)
        noise = torch.randn_like(x) if noise is None else noise[..., :x.shape[2]]
        return flow_loss(lambda x_t, t: self.velocity(x_t, t, c), x, t, noise)

    forward = loss

    def decode(self, latent, steps=1, noise=None):
        (B, _, h, w), p, K = latent.shape, self.config.patch, len(self.deviation)
        noise = torch.randn(B, h * w, K, device=latent.device) if noise is None else noise[..., :K]
        c = self.condition(latent * self.latent_std + self.latent_mean)
        return self.picture(euler(lambda x, t: self.velocity(x, t, c), noise, steps), h * p, w * p)


def fit_space(batches, p, K, isotropic=False):
    """mean, basis and deviation of LatentFlow from batches of images in [0, 1]. isotropic: one deviation for all
    coefficients, so that distances between codes are those between patches; else each has its own."""
    kept = []

    def keep(moments):  # they also tell the variance of every coefficient
        kept.append(moments)
        return moments

    mean, basis = evaluation.fit_patch_pca(batches, p, K, keep)
    variance = (basis.T @ kept[0].covariance @ basis).diagonal()
    if isotropic:
        variance = variance.mean().expand(K)
    return mean, basis, variance.sqrt()


class PatchPCA:
    """What the PCA alone gives, behind the interface of an encoder and a decoder: all is done in decode."""

    def __init__(self, config, mean, basis):
        self.config, self.mean, self.basis = config, mean, basis

    def encode(self, img):
        return img

    def decode(self, img, steps=1, noise=None):
        return evaluation.patch_pca(img, self.mean, self.basis, self.config.patch)


def fit(args, teacher, encoder, decoder, data, val, device):
    """Train as train.py does on one device; the mean L_flow and L_dist of each quarter, with a PSNR at its end."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    optimizer = train.build_optimizer(args, encoder, decoder)
    rates = [group["lr"] for group in optimizer.param_groups]
    micro_step, update = train.training_step(args, teacher, encoder, decoder, optimizer, autocast, args.batch_size, 1)
    batches = DataLoader(data, num_workers=args.workers, collate_fn=collate, worker_init_fn=ignore_signals,
                         batch_sampler=sample_numbers(0, args.batch_size, args.batch_size, 0, 1, args.steps))
    curve = []
    sums, every = 0, max(1, args.steps // 4)
    for step, (img, _) in enumerate(tqdm(batches, "train", args.steps, mininterval=5)):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * rate_factor(step, args)
        seed_step(args.seed, step, 0)
        sums = sums + update(micro_step(img.to(device)))
        if (step + 1) % every == 0:
            loss_flow, loss_dist = (sums[:2] / every).tolist()
            psnr, *_ = validate(encoder, decoder, val, args.batch_size, args.seed, autocast, args.workers)
            curve.append({"step": step + 1, "loss_flow": loss_flow, "loss_dist": loss_dist, "psnr": psnr})
            tqdm.write(f"step {step + 1}: flow {loss_flow:.4f}, dist {loss_dist:.4f}, PSNR of 512 images {psnr:.2f}")
            sums = 0
    return curve


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Other flags go to train.py.")
    ap.add_argument("--space", required=True, choices=["pixel", "pca", "pca-isotropic"], help="where the flow runs; "
                    "pca: every coefficient standardised; pca-isotropic: all divided by one number")
    ap.add_argument("--results", default=RESULTS, metavar="FILE", help="[%(default)s]")
    ap.add_argument("--commit", default=commit(), help="what the results say of the code [%(default)s]")
    own, flags = ap.parse_known_args(argv)
    args, start = train.parse_args([*ALWAYS.split(), *flags]), time.time()
    if not (args.data and args.val):
        ap.error("--data and --val are needed")
    job = Job(evaluation.parse_args(
        ["--data", *args.val, "--inception", "none", "--batch_size", "250", "--workers",
         str(args.workers), *["--bf16"] * torch.cuda.is_available()]))
    data, val, _ = train.build_data(args)
    inputs, fitted_on = job.crops(args.val, args.size), job.crops(args.data, args.size)
    teacher, encoder, decoder = train.build_models(args)
    line = {"space": own.space, "seed": args.seed, "flags": " ".join(flags), "settings": ALWAYS}
    if own.space != "pixel":
        K = 2 * args.latent_dim
        images = (img for _, img, _ in job.images("fit PCA", fitted_on))
        mean, basis, deviation = fit_space(images, decoder.config.patch, K, own.space == "pca-isotropic")
        decoder = LatentFlow(decoder.config, mean, basis, deviation).train()
        pca = PatchPCA(decoder.config, mean, basis)
        alone = evaluation.measure_reconstructions(job, pca, pca, inputs, None)[0]["tokenizer"]
        print(f"ceiling: the PCA of {K} components alone has {alone['psnr']:.2f} dB, ssim {alone['ssim']:.4f}",
              flush=True)
        line.update(components=K, ceiling=alone)
    teacher, encoder, decoder = (m.to(job.device) for m in (teacher, encoder, decoder))
    began = time.time()
    curve = fit(args, teacher, encoder, decoder, data, val, job.device)
    line.update(curve=curve, seconds_train=time.time() - began)
    encoder.eval()
    decoder.eval()
    results, protocol = evaluation.measure_reconstructions(job, encoder, decoder, inputs, None)
    probe, cosines = evaluation.measure_features(job, encoder, teacher, inputs, fitted_on)
    line.update(results["tokenizer"], probe=probe, cosine=cosines, protocol=protocol, commit=own.commit,
                torch=torch.__version__, seconds=time.time() - start,
                device=torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu")
    with open(own.results, "a") as f:
        f.write(json.dumps(line) + "\n")
    last = probe["last layer"]["student"]
    print(f"{own.space}, seed {args.seed}: {line['psnr']:.2f} dB, ssim {line['ssim']:.4f}, linear probe "
          f"{last['linear']:.2f}, 20-NN {last['knn']:.2f}, {line['seconds_train']:.0f} s of training")


if __name__ == "__main__":
    run_command(main, "experiments.efficiency.latent_flow")
