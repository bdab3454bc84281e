"""downstream/: generation, MAR and DiT as models."""
from tests.helpers import close, raises, refused  # first: it sets the environment that torch reads

import argparse
import math
import os
import tempfile

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F

from decoder import patchify, unpatchify
from downstream import dit, mar
from encoder import MissingFile, UserError

MICRO = dict(channels=3, grid=4, classes=8, width=32, depth=2, heads=2)
MICRO_MAR = mar.MARConfig(**MICRO, head_width=48, head_depth=2, buffer=3)
MICRO_DIT = dit.DiTConfig(**MICRO)


def micro(kind, config=None, seed=0):
    """A model with every parameter random, in eval mode: zero-initialised ones would hide what is tested."""
    torch.manual_seed(seed)
    model = mar.MAR(config or MICRO_MAR) if kind == "mar" else dit.DiT(config or MICRO_DIT)
    for p in model.parameters():
        p.data = 0.2 * torch.randn_like(p)
    return model.eval()


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def attention(x, weight, bias, heads):
    """Multi-head self-attention before its output projection, with its softmax written out: x (N, D) -> (N, D)."""
    N, D = x.shape
    out = []
    for q, k, v in zip(*(part.view(N, heads, D // heads).unbind(1) for part in (x @ weight.T + bias).split(D, dim=1))):
        out.append((q @ k.T / math.sqrt(D // heads)).softmax(1) @ v)
    return torch.cat(out, dim=1)


# ---- MAR ----

def test_mask_ratio_is_the_truncated_normal_of_mar():
    u = np.linspace(0, 0.999999, 2001)
    ours = np.array([mar.mask_ratio(0.7, torch.tensor(x, dtype=torch.float64)) for x in u])
    theirs = scipy.stats.truncnorm((0.7 - 1) / 0.25, 0, loc=1, scale=0.25).ppf(u)
    assert np.abs(ours - theirs).max() < 1e-9 and ours.min() == 0.7 and ours.max() <= 1
    nothing = torch.tensor(0.0, dtype=torch.float64)
    assert all(mar.mask_ratio(least, nothing) >= least for least in (0.02, 0.15, 0.58)), "not rounded down"
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    mean = 1 - 0.25 * (density(0) - density(1.2)) / (0.5 - 0.11506967)  # Phi(-1.2)
    assert abs(ours.mean() - mean) < 1e-3 and abs(mean - 0.867) < 5e-4, (ours.mean(), mean)


def published_iterations(N, iterations):
    """For each iteration of MAR's sampler: the order's numbers of the tokens that it predicts, and how many it leaves
    masked, with the published masks. There the order's first are predicted last."""
    mask, found = np.ones(N, bool), []
    for step in range(iterations):
        length = max(1, min(mask.sum() - 1, math.floor(N * math.cos(math.pi / 2 * (step + 1) / iterations))))
        after = np.zeros(N, bool)
        after[:length] = True  # mask_by_order
        asked = mask if step >= iterations - 1 else mask ^ after
        found.append((sorted(N - 1 - np.flatnonzero(asked)), length))
        mask = after
    return [x for x in found if x[0]]


def test_every_token_is_predicted_exactly_once():
    for N in (4, 9, 64, 1024):
        for iterations in (1, 2, 3, 5, 8, 63, 64, 256, 1024, 1500):
            ours = [(list(range(done, until)), masked) for done, until, masked in mar.portions(N, iterations)]
            assert ours == published_iterations(N, iterations), (N, iterations)
            assert sum((tokens for tokens, _ in ours), []) == list(range(N))
    model, asked = micro("mar"), []
    plain = model.condition

    def spy(x, labels, visible, wanted):
        asked.append((visible, wanted))
        assert (x.gather(1, wanted[..., None].expand(-1, -1, 3)) == 0).all(), "a token is known before it is predicted"
        return plain(x, labels, visible, wanted)
    model.condition = spy
    order = torch.rand(2, 16).argsort(1)
    out = model.sample(torch.tensor([1, 2]), torch.randn(2, 3, 4, 4), order, iterations=5, steps=2)
    for b in range(2):
        seen = []
        for visible, wanted in asked:
            assert visible[b].tolist() == seen, "the encoder must see all that is predicted, and nothing else"
            seen += wanted[b].tolist()
        assert seen == order[b].tolist()
    assert len(asked) == 5 and (out != 0).all()


def mar_condition(model, x, label, visible):
    """MAR's encoder and decoder of one image x (N, C), as its paper and code put it, with a mask over all tokens: the
    conditions (N, D), those of masked tokens are used. visible: a set of token numbers; label: None for none."""
    p, c = dict(model.named_parameters()), model.config
    norm = lambda y, name: F.layer_norm(y, (c.width,), p[name + ".weight"], p[name + ".bias"], 1e-6)
    linear = lambda y, name: y @ p[name + ".weight"].T + p[name + ".bias"]

    def blocks(y, part):
        for i in range(c.depth):
            name = f"{part}.{i}."
            qkv = p[name + "qkv.weight"], p[name + "qkv.bias"]
            y = y + linear(attention(norm(y, name + "norm1"), *qkv, c.heads), name + "proj")
            hidden = linear(norm(y, name + "norm2"), name + "fc1")
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            y = y + linear(hidden, name + "fc2")
        return norm(y, part + "_norm")
    N, b = len(x), c.buffer
    kept = torch.tensor([True] * b + [n in visible for n in range(N)])  # the buffer counts as visible
    y = torch.cat([torch.zeros(b, c.width), linear(x, "token_proj")])
    y[:b] = p["no_class"][0] if label is None else p["class_embed.weight"][label]
    y = norm(y + p["encoder_pos"][0], "token_norm")[kept]
    y = linear(blocks(y, "encoder"), "decoder_proj")
    full = p["mask_token"][0].repeat(b + N, 1)
    full[kept] = y
    return blocks(full + p["decoder_pos"][0], "decoder")[b:] + p["head_pos"][0]


def test_mar_is_what_it_says():
    model, x = micro("mar"), torch.randn(2, 16, 3)
    order = torch.rand(2, 16).argsort(1)
    for V, y in (0, 4), (1, 0), (5, 7), (15, 4):
        visible, wanted = order[:, :V], order[:, V:]
        ours = model.condition(x, torch.tensor([y, -1]), visible, wanted)
        for b, label in enumerate((y, None)):
            close(ours[b], mar_condition(model, x[b], label, set(visible[b].tolist()))[wanted[b]], 1e-5)
    changed = x.clone()
    changed.scatter_(1, wanted[..., None].expand(-1, -1, 3), torch.randn(2, 1, 3))
    assert torch.equal(model.condition(changed, torch.tensor([4, -1]), visible, wanted), ours), "a masked token is seen"


def test_mar_loss_is_the_flow_of_masked_tokens():
    model = micro("mar", mar.replace(MICRO_MAR, label_drop=0.0))
    latent, labels, heard, masked = torch.randn(3, 3, 4, 4), torch.tensor([0, 5, 7]), {}, []
    tokens, plain = latent.flatten(2).mT, model.condition

    def condition(x, labels, visible, wanted):
        heard.update(wanted=wanted, visible=visible, out=plain(x, labels, visible, wanted))
        return heard["out"]

    def still(x_t, t, c):
        heard.update(x_t=x_t, t=t, c=c)
        return torch.zeros_like(x_t)
    model.condition, model.velocity = condition, still
    for seed in range(200):
        torch.manual_seed(seed)
        loss = model(latent, labels)
        M = heard["wanted"].shape[1]
        masked.append(M)
        every = torch.cat([heard["visible"], heard["wanted"]], dim=1).sort(1)[0]
        assert torch.equal(every, torch.arange(16).expand(3, 16)), "a token is neither visible nor masked, or both"
    assert min(masked) == 12 and max(masked) == 16  # ceil(16 * 0.7), and all of them
    expected = sum(math.ceil(16 * mar.mask_ratio(0.7, torch.tensor(u))) for u in np.linspace(0, 1, 1000, False)) / 1000
    assert abs(np.mean(masked) - expected) < 0.25, (np.mean(masked), expected)
    # the last one: x_t = (1 - t) x + t eps tells eps, and the loss of v = 0 is the mean of (eps - x)^2
    assert heard["t"].shape == (4 * 3, M) and heard["t"].unique().numel() == 12 * M, "a time for each token and repeat"
    t = heard["t"].view(4, 3, M, 1)
    x = torch.stack([tokens[b][heard["wanted"][b]] for b in range(3)])
    eps = (heard["x_t"].view(4, 3, M, 3) - (1 - t) * x) / t
    close(loss, (eps - x).square().mean(), 1e-4)
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.15
    assert all(torch.equal(c, heard["out"]) for c in heard["c"].view(4, 3, M, -1)), "a repeat has another condition"


def test_mar_samples_by_its_schedule_of_guidance():
    model, labels = micro("mar"), torch.tensor([3, 6])
    noise, order = torch.randn(2, 3, 4, 4), torch.rand(2, 16).argsort(1)
    eps = noise.flatten(2).mT

    def literal(cfg, schedule, iterations, steps, temperature=1.0):
        """One image after the other, with the published masks, and the head's steps written out."""
        out = torch.zeros(2, 16, 3)
        for b in range(2):
            for numbers, masked in published_iterations(16, iterations):
                wanted = order[b][numbers]
                visible = set(order[b][:numbers[0]].tolist())
                scale = 1 + (cfg - 1) * (16 - masked) / 16 if schedule == "linear" else cfg
                c, none = (mar_condition(model, out[b], y, visible)[wanted] for y in (labels[b], None))
                x = temperature * eps[b][wanted]
                for i in range(steps):
                    t = torch.full((len(x),), 1 - i / steps)
                    v, v_none = model.head(x, t, c), model.head(x, t, none)
                    x = x - (v_none + scale * (v - v_none)) / steps
                out[b][wanted] = x
        return out.mT.reshape(2, 3, 4, 4)
    with torch.no_grad():
        for options in (dict(cfg=3.0, schedule="linear"), dict(cfg=2.0, schedule="constant"),
                        dict(cfg=1.0, schedule="linear", temperature=0.7)):
            ours = model.sample(labels, noise, order, iterations=4, steps=3, **options)
            close(ours, literal(iterations=4, steps=3, **options), 1e-4)
    # guidance 1 is no guidance, bit for bit: what stands for "no class" is not even looked at
    plain = model.sample(labels, noise, order, iterations=4, steps=3)
    model.no_class.data.fill_(math.nan)
    assert torch.equal(plain, model.sample(labels, noise, order, iterations=4, steps=3, cfg=1.0))
    assert model.sample(labels, noise, order, iterations=4, steps=3, cfg=1.5).isnan().any()


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        # the released models, in millions: a latent of 16 channels on 16 x 16. Their head gives noise and variance, 2 C
        # numbers from `head_width`, ours the velocity, C of them: C weights of head_width, and C biases, fewer
        for name, published, head_width in ("mar-b", 207.9, 1024), ("mar-l", 478.3, 1280), ("mar-h", 942.4, 1536):
            model = mar.MAR(mar.config(name, channels=16, grid=16))
            theirs = parameters(model) + 16 * (head_width + 1)
            assert round(theirs / 1e6, 1) == published, (name, theirs)
        paper = mar.MAR(mar.config("mar-l", channels=64, grid=32))  # on UniFlow's latents
        assert round((parameters(paper) + 64 * 1281) / 1e6, 1) == 480.9
        small_head = mar.MAR(mar.config("mar-l", channels=16, grid=16, head_width=1024, head_depth=3))
        assert round((parameters(small_head) + 16 * 1025) / 1e6) == 426
        xl = dit.DiT(dit.config("dit-xl", channels=64, grid=32))
    D, d = 1152, 72
    block = (6 * D * D + 6 * D) + (3 * D * D + 3 * D) + 2 * d + (D * D + D) + (D * 6144 + 6144) + (3072 * D + D)
    ends = (256 * D + D) + (1001 * D) + (256 * D + D) + (D * D + D) + (2 * D * D + 2 * D) + (256 * D + 256)
    assert parameters(xl) == 28 * block + ends and round(parameters(xl) / 1e6) == 675


def test_released_mar_initialises_the_blocks():
    D, W, N, C = 32, 48, 9, 5  # another latent: 3 x 3 tokens of 5 channels
    shapes = {"class_emb.weight": (8, D), "fake_latent": (1, D), "mask_token": (1, 1, D), "z_proj.weight": (D, C)}
    shapes |= {f"{part}_pos_embed_learned": (1, n, D)
               for part, n in (("encoder", N + 3), ("decoder", N + 3), ("diffusion", N))}
    square = ["decoder_embed"]
    for part in ("encoder", "decoder"):
        shapes |= {f"{part}_norm.weight": (D,), f"{part}_norm.bias": (D,)}
        for i in range(2):
            block = f"{part}_blocks.{i}."
            shapes |= {block + f"norm{k}.{x}": (D,) for k in (1, 2) for x in ("weight", "bias")}
            shapes |= {block + "attn.qkv.weight": (3 * D, D), block + "attn.qkv.bias": (3 * D,),
                       block + "mlp.fc1.weight": (4 * D, D), block + "mlp.fc1.bias": (4 * D,),
                       block + "mlp.fc2.weight": (D, 4 * D), block + "mlp.fc2.bias": (D,)}
            square.append(block + "attn.proj")
    shapes |= {f"{k}.{x}": (D, D) if x == "weight" else (D,) for k in square for x in ("weight", "bias")}
    shapes |= {"z_proj.bias": (D,), "z_proj_ln.weight": (D,), "z_proj_ln.bias": (D,)}
    net = "diffloss.net."
    for name, out, into in [("time_embed.mlp.0", W, 256), ("time_embed.mlp.2", W, W), ("cond_embed", W, D),
                            ("input_proj", W, C), ("final_layer.linear", 2 * C, W),
                            ("final_layer.adaLN_modulation.1", 2 * W, W)]:
        shapes |= {net + name + ".weight": (out, into), net + name + ".bias": (out,)}
    for i in range(2):
        block = f"{net}res_blocks.{i}."
        shapes |= {block + f"in_ln.{x}": (W,) for x in ("weight", "bias")}
        for name, out in ("mlp.0", W), ("mlp.2", W), ("adaLN_modulation.1", 3 * W):
            shapes |= {block + name + ".weight": (out, W), block + name + ".bias": (out,)}
    theirs = {k: torch.randn(shape) for k, shape in shapes.items()}
    model = micro("mar")
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "checkpoint-last.pth")
        torch.save({"model": {}, "model_ema": theirs, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}, path)
        left = mar.load_released(model, path)
        own = dict(model.named_parameters())
        assert {k for k in left if not k.startswith("head.")} == {
            "encoder_pos", "decoder_pos", "head_pos", "token_proj.weight"}
        assert {k for k in own if k.startswith("head.")} < set(left)
        assert all(torch.equal(own[k], before[k]) for k in left)
        for name, ours in [("encoder_blocks.1.attn.qkv.weight", "encoder.1.qkv.weight"), ("fake_latent", "no_class"),
                           ("decoder_blocks.0.mlp.fc2.bias", "decoder.0.fc2.bias"), ("z_proj.bias", "token_proj.bias")]:
            assert torch.equal(own[ours], theirs[name]), name
        taken = [k for k in theirs if mar.released_name(k) not in left]
        assert len(taken) + len(left) == len(own)
        assert all(torch.equal(own[mar.released_name(k)], theirs[k]) for k in taken)
        torch.save({"model_ema": {k: v for k, v in theirs.items() if "encoder_blocks.1" not in k}}, path)
        raises(UserError, mar.load_released, model, path, words="another size")
        refused(MissingFile, mar.load_released, model, "no.pth", says=(
            "no.pth: no such file; expected a released checkpoint-last.pth"))
        torch.save({"weights": theirs}, path)
        raises(UserError, mar.load_released, model, path, words="no checkpoint of MAR")
        open(path, "wb").write(b"no pickle")
        raises(UserError, mar.load_released, model, path, words="no checkpoint of MAR")


# ---- DiT ----

def test_rope_turns_pairs_by_row_and_column():
    angles = dit.rotary_angles(3, 8)  # 4 pairs: two by the row, two by the column, at frequencies 1 and 1/100
    assert angles.shape == (9, 4)
    close(angles[5], torch.tensor([1, 0.01, 2, 0.02]))  # place 5 of 3 x 3: row 1, column 2
    x = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1])  # pairs (0, 4), (1, 5), (2, 6), (3, 7)
    turned = dit.rotate(x.expand(1, 1, 9, 8), angles.cos(), angles.sin())[0, 0, 5]
    close(turned, torch.tensor([math.cos(1), 0, 0, -math.sin(0.02), math.sin(1), 0, 0, math.cos(0.02)]))
    # what attention sees depends on the distance alone
    angles = dit.rotary_angles(4, 16)
    q, k = (dit.rotate(torch.randn(16).expand(1, 1, 16, 16), angles.cos(), angles.sin())[0, 0] for _ in "qk")
    close(q[5] @ k[6], q[9] @ k[10], 1e-4)
    close(q[2] @ k[8], q[7] @ k[13], 1e-4)
    assert abs(q[5] @ k[6] - q[5] @ k[9]) > 1e-3, "rows and columns must differ"


def test_dit_is_what_it_says():
    latent = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    # the second patch of the first row: channel, row, column
    assert patchify(latent, 2)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert torch.equal(unpatchify(patchify(latent, 2), 2, 4, 4), latent)

    model, c = micro("dit"), MICRO_DIT
    p, D, d = dict(model.named_parameters()), c.width, c.width // c.heads
    x_t, t, labels = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.01]), torch.tensor([5, -1])
    rms = lambda y: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    linear = lambda y, name: y @ p[name + ".weight"].T + p[name + ".bias"]
    silu = lambda y: y / (1 + (-y).exp())
    expected = []
    for b in range(2):
        freqs = 10000.0 ** (-torch.arange(128) / 128)
        time = torch.cat([(1000 * t[b] * freqs).cos(), (1000 * t[b] * freqs).sin()])
        known = p["no_class"][0] if labels[b] < 0 else p["class_embed.weight"][labels[b]]
        y = silu(linear(silu(linear(time, "time_fc1")), "time_fc2") + known)
        places = [(i, j) for i in range(2) for j in range(2)]
        h = torch.stack([x_t[b, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].reshape(-1) for i, j in places])
        h = linear(h, "token_proj")
        waves = 10000.0 ** (-torch.arange(D // 4) / (D // 4))
        side = lambda n: torch.cat([(n * waves).cos(), (n * waves).sin()])
        h = h + torch.stack([torch.cat([side(i), side(j)]) for i, j in places])
        for i in range(c.depth):
            name = f"blocks.{i}."
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(y, name + "modulation").split(D)
            qkv = linear(rms(h) * (1 + scale1) + shift1, name + "qkv")
            q, k, v = (a.view(4, c.heads, d) for a in qkv.split(D, dim=1))
            out = torch.zeros(4, c.heads, d)
            for head in range(c.heads):
                turned = []
                for a, gain in (q, "q_gain"), (k, "k_gain"):
                    a = rms(a[:, head]) * p[name + gain]
                    numbers = torch.view_as_complex(torch.stack([a[:, :d // 2], a[:, d // 2:]], dim=-1).contiguous())
                    turn = torch.stack([torch.cat([r * 10000.0 ** (-torch.arange(d // 4) / (d // 4)) for r in place])
                                        for place in places])
                    numbers = numbers * torch.polar(torch.ones_like(turn), turn)
                    turned.append(torch.cat([numbers.real, numbers.imag], dim=1))
                out[:, head] = (turned[0] @ turned[1].T / math.sqrt(d)).softmax(1) @ v[:, head]
            h = h + gate1 * linear(out.reshape(4, D), name + "proj")
            gate, value = linear(rms(h) * (1 + scale2) + shift2, name + "fc1").chunk(2, dim=1)
            h = h + gate2 * linear(silu(gate) * value, name + "fc2")
        shift, scale = linear(y, "final_modulation").split(D)
        out = linear(rms(h) * (1 + scale) + shift, "output")  # (4, 12)
        picture = torch.zeros(3, 4, 4)
        for n in range(4):
            i, j = divmod(n, 2)
            picture[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2] = out[n].view(3, 2, 2)
        expected.append(picture)
    expected = torch.stack(expected)
    close(model.net(x_t, t, labels), expected, 1e-5)
    v = torch.stack([(x_t[0] - expected[0]) / 0.3, (x_t[1] - expected[1]) / 0.05])
    close(model.velocity(x_t, t, labels), v, 1e-5)
    model.class_embed.weight.data[0] = model.class_embed.weight.data[5]
    close(model.net(x_t, t, torch.tensor([0, -1])), expected, 1e-5)  # the first class is one
    plain = micro("dit", dit.replace(MICRO_DIT, prediction="v"))
    assert torch.equal(plain.velocity(x_t, t, labels), plain.net(x_t, t, labels))
    raises(ValueError, model.loss, torch.randn(2, 3, 4, 5), labels, words="expected (B, 3, 4, 4)")


def test_dit_times_are_shifted():
    for channels, grid, s in (64, 32, 4.0), (64, 16, 2.0), (16, 8, 1.0):
        with torch.device("meta"):
            assert dit.DiT(dit.config("dit-s", channels=channels, grid=grid)).shift == s
    assert dit.shift_time(0.5, 4.0) == 0.8 and dit.shift_time(0.0, 4.0) == 0 and dit.shift_time(1.0, 4.0) == 1
    assert dit.shift_time(0.3, 1.0) == 0.3
    model = micro("dit", dit.replace(MICRO_DIT, shift=4.0))
    times = []
    model.velocity = lambda x_t, t, labels: times.append(t) or torch.zeros_like(x_t)
    torch.manual_seed(0)
    model(torch.randn(4000, 3, 4, 4), torch.zeros(4000, dtype=torch.long))
    t = times[0]
    u = t / (4 - 3 * t)  # the shift undone: sigmoid(N(0, 1)), whose logit has mean 0 and deviation 1
    logit = torch.log(u / (1 - u))
    assert abs(logit.mean()) < 0.06 and abs(logit.std() - 1) < 0.05, (logit.mean(), logit.std())
    times.clear()
    model.sample(torch.zeros(1, dtype=torch.long), torch.randn(1, 3, 4, 4), steps=2)
    assert [x.item() for x in times] == [1.0, np.float32(0.8), np.float32(0.8)]  # a half of the way is shifted to 0.8


def test_heun_is_of_second_order_and_guides_on_its_interval():
    # dx/dt = x from x(1) = e to x(0) = 1; a quadratic error: doubling the steps divides it by four
    times = lambda n: [1 - i / n for i in range(n)] + [1e-9]  # not to 0, which would make the last step Euler's
    errors = [abs(dit.heun(lambda x, t: x, math.e, times(n)) - math.exp(1e-9)) for n in (20, 40)]
    assert 3.7 < errors[0] / errors[1] < 4.3, errors
    # one Heun step and the Euler step that ends, by hand: v = t, from 2 at t = 1, over 0.5, to 0
    assert dit.heun(lambda x, t: t, 2.0, [1.0, 0.5, 0.0]) == 2 - 0.5 * (1 + 0.5) / 2 - 0.5 * 0.5

    model, asked = micro("dit", dit.replace(MICRO_DIT, shift=1.0)), []
    plain = model.velocity

    def spy(x, t, labels):
        asked.append((round(t[0].item(), 6), labels.tolist()))
        return plain(x, t, labels)
    model.velocity = spy
    noise, labels = torch.randn(2, 3, 4, 4), torch.tensor([3, 6])
    model.sample(labels, noise, steps=4, cfg=3.0, interval=(0.25, 0.75))
    both = [3, 6, -1, -1]
    assert asked == [(1.0, [3, 6]), (0.75, both), (0.75, both), (0.5, both), (0.5, both), (0.25, both), (0.25, both)]
    v = lambda x, t, y: plain(x, torch.full((2,), t), torch.tensor(y))
    x, guided = noise, lambda x, t: v(x, t, [-1, -1]) + 3 * (v(x, t, [3, 6]) - v(x, t, [-1, -1]))
    x = x - (guided(x, 1.0) + guided(x - guided(x, 1.0) / 2, 0.5)) / 4
    close(model.sample(labels, noise, steps=2, cfg=3.0, interval=(0, 1)), x - guided(x, 0.5) / 2, 1e-4)
    unguided = model.sample(labels, noise, steps=3)
    model.no_class.data.fill_(math.nan)  # guidance 1 does not look at it
    assert torch.equal(unguided, model.sample(labels, noise, steps=3, cfg=1.0))
    assert model.sample(labels, noise, steps=3, cfg=1.5).isnan().any()
    warm = dit.heun(lambda x, t: plain(x, torch.full((2,), t), labels), 0.5 * noise, [1, 2 / 3, 1 / 3, 0])
    close(model.sample(labels, noise, steps=3, temperature=0.5), warm, 1e-4)


# ---- both ----

def test_labels_are_dropped_at_their_rate():
    torch.manual_seed(0)
    dropped = mar.drop_labels(torch.arange(8).repeat(2500), 0.1)
    assert abs((dropped < 0).float().mean() - 0.1) < 0.01  # four deviations of 20,000 draws
    assert set((dropped - torch.arange(8).repeat(2500))[dropped >= 0].tolist()) == {0}
    for kind in ("mar", "dit"):
        model, seen = micro(kind), []
        plain = model.class_embed.forward
        model.class_embed.forward = lambda labels: seen.append(labels) or plain(labels)
        grads = []
        for seed in range(60):
            torch.manual_seed(seed)
            model.no_class.grad = None
            model(torch.randn(1, 3, 4, 4), torch.tensor([5])).backward()
            grads.append(model.no_class.grad is not None and bool(model.no_class.grad.any()))
        assert 1 <= sum(grads) <= 14, (kind, sum(grads))  # of 60 at a rate of 0.1


def test_overfitted_generators_return_their_latents():
    for kind, allowed in ("mar", 0.2), ("dit", 0.05):
        torch.manual_seed(0)
        latents, labels = torch.randn(8, 3, 4, 4), torch.arange(8)
        model = (mar.MAR(mar.replace(MICRO_MAR, dropout=0.0, label_drop=0.0)) if kind == "mar" else
                 dit.DiT(dit.replace(MICRO_DIT, label_drop=0.0, shift=4.0)))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1, 2 - 2 * step / 200)
            model(latents, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        order = (torch.rand(8, 16).argsort(1), 8) if kind == "mar" else ()
        out = model.eval().sample(labels, torch.randn(8, 3, 4, 4), *order)
        nearest = torch.cdist(out.flatten(1), latents.flatten(1)).argmin(1)
        error = (out - latents).square().mean().item()
        assert nearest.tolist() == list(range(8)) and error < allowed, (kind, error, nearest)
