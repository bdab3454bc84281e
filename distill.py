"""Layer-wise adaptive self-distillation (UniFlow, Sec. 3.1): keeps a student encoder near its frozen teacher.

    alpha_l = 1 - mean over batch and tokens of cos(H_U^(l), H_T^(l))              the misalignment of layer l
    w_l     = (l/L) exp(beta alpha_l) / sum_k (k/L) exp(beta alpha_k)              eq. 1, no gradient through w
    L_dist  = sum_l w_l alpha_l                                                    eq. 2

H_U, H_T: student and teacher tokens after block l = 1..L, (B, N, D), spatial tokens only: the caller drops CLS.

    loss, weights, distances = distill_loss(student_tokens, teacher_tokens)

`python distill.py` prints the weights over layers for several beta (paper, Fig. 16). Needs torch alone.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

STRATEGIES = ("final", "uniform", "progressive", "adaptive")  # the paper's Table 5a


def cosine(student, teacher):
    """Cosine of every token with the teacher's, in fp32. Two (B, N, D) -> (B, N)."""
    return F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def layer_distances(student, teacher):
    """alpha of every layer. Two lists of L tensors (B, N, D) -> (L,) in [0, 2].

    Raises ValueError if student and teacher differ in a shape, because cosines of broadcast tensors mean nothing, if
    a layer has no token, or if there is no layer.
    """
    ours = [tuple(x.shape) for x in student]
    theirs = [tuple(x.shape) for x in teacher]
    if not ours or ours != theirs or any(len(shape) != 3 or shape[1] == 0 for shape in ours):
        raise ValueError(f"student has {len(ours)} layers of {sorted(set(ours))}, teacher {len(theirs)} of "
                         f"{sorted(set(theirs))}; expected the same (B, N, D) for every layer of both, N at least 1")
    return 1 - torch.stack([cosine(s, t) for s, t in zip(student, teacher)]).mean((1, 2))


def layer_weights(distances, beta=2.0, strategy="adaptive"):
    """w_l of eq. 1 from distances (L,): (L,), summing to 1, detached.

    strategy (Table 5a): "final", all weight on the last layer; "uniform", 1/L each; "progressive", eq. 1 with beta = 0;
    "adaptive", eq. 1. Raises ValueError for any other.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not one of {' '.join(STRATEGIES)}")
    alpha = distances.detach().float()
    L = len(alpha)
    depth = torch.arange(1, L + 1, dtype=torch.float32, device=alpha.device) / L  # l/L
    if strategy == "final":
        return (depth == 1).float()
    if strategy == "uniform":
        return torch.full_like(alpha, 1 / L)
    if strategy == "progressive":
        beta = 0.0
    # exp(log(l/L) + beta alpha) normalised is eq. 1 itself, safe from overflow at large beta.
    # One public copy has softmax(l/L * beta * alpha), which is another function.
    return torch.softmax(depth.log() + beta * alpha, dim=0)


def distill_loss(student, teacher, beta=2.0, strategy="adaptive", measure=layer_distances):
    """L_dist of eq. 2. Two lists of L tensors (B, N, D) -> (loss, weights (L,), distances (L,)).

    measure: the function that computes the distances, layer_distances or its compiled form.
    The weights and distances that are returned are detached. Under torch.distributed the distances are averaged over
    the ranks before the weights are formed. So if all ranks have batches of one size, the weights, and the ranks' mean
    loss and gradients, are those of one rank with the joined batch.
    """
    alpha = measure(student, teacher)  # of this rank's batch, with gradients
    mean_alpha = alpha.detach().clone()  # of all ranks' batches
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean_alpha)
        mean_alpha /= dist.get_world_size()
    weights = layer_weights(mean_alpha, beta, strategy)
    return (weights * alpha).sum(), weights, mean_alpha


if __name__ == "__main__":
    L, betas = 24, (0.5, 1.0, 2.0, 5.0)
    alpha = torch.linspace(0.9, 0.1, L)  # simulated: shallow layers drift furthest from the teacher
    w = [layer_weights(alpha, beta) for beta in betas]
    print("layer  alpha  " + "  ".join(f"w(beta={b})" for b in betas) + "   w(beta=2.0)")
    for l in range(L):
        bar = "#" * round(600 * w[2][l].item())
        print(f"{l + 1:5d}  {alpha[l]:.3f}  " + "  ".join(f"{x[l]:11.4f}" for x in w) + f"   {bar}")
    tokens = [torch.randn(2, 64, 192) for _ in range(L)]
    loss, weights, distances = distill_loss([t + 0.3 * torch.randn_like(t) for t in tokens], tokens)
    print(f"tokens {L} x {tuple(tokens[0].shape)} -> loss {loss:.4f}, weights {tuple(weights.shape)}")
