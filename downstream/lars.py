"""Two parts of MAE's linear probe that torch lacks: LARS, and a batch norm over all ranks that also works on CPUs."""
import torch
import torch.distributed as dist
from torch import nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum, in which a matrix W with gradient g has the rate lr * trust * |W| / |g| (You et al. 2017).

    v <- momentum v + q g;  W <- W - lr v,  where q = trust |W| / |g|, or 1 for vectors and where one of the two is 0.
    """

    def __init__(self, params, lr, momentum=0.9, trust=0.001, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    size, slope = p.norm(), g.norm()
                    g = g * torch.where((size > 0) & (slope > 0), group["trust"] * size / slope, 1)
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * state["velocity"])


class BatchNorm(nn.Module):
    """Batch norm without gain and bias, of inputs (B, D) that need no gradient, with the statistics of all ranks."""

    def __init__(self, D, eps=1e-6, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(D))
        self.register_buffer("running_var", torch.ones(D))

    def forward(self, x):
        if not self.training:
            return (x - self.running_mean) / (self.running_var + self.eps).sqrt()
        rows = x.double()
        moments = torch.stack([rows.sum(0), (rows ** 2).sum(0), torch.full_like(rows[0], len(rows))])
        if dist.is_initialized():
            dist.all_reduce(moments)
        n, mean = moments[2], moments[0] / moments[2]
        variance = moments[1] / n - mean ** 2
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_((variance * n / (n - 1).clamp_min(1)).float(), self.momentum)
        return ((rows - mean) / (variance + self.eps).sqrt()).float()
