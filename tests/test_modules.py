"""The models in other people's code: state dicts, precisions, wrappers, interfaces."""
from tests.helpers import (
    FORKS, HERE, MICRO_DECODER, MICRO_VIT, REFUSE_OTHER, REFUSE_PICKLE, close, free_port, micro_models, raises, run,
    tokenizer_file)

import copy
import os
import pathlib
import pickle
import tempfile
import types
import unittest.mock
from dataclasses import asdict, replace

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.nn.parallel import DistributedDataParallel

import decoder
import distill
import encoder
import eval as evaluation
from tools import convert

REGISTERS = replace(MICRO_VIT, num_prefix=5, layer_scale=0.5)


def with_statistics(seed=0):
    """Micro models whose latent statistics are far from the identity, in eval mode."""
    _, enc, dec = micro_models(seed)
    mean, std = torch.randn(8, 1, 1), torch.rand(8, 1, 1) + 2
    for module in (enc, dec):
        module.latent_mean.copy_(mean), module.latent_std.copy_(std)
    return enc.eval(), dec.eval()


@torch.no_grad()
def round_trip(enc, dec):
    """An image through encode and decode, one noise for all: (latent, image)."""
    torch.manual_seed(5)
    img, noise = torch.rand(2, 3, 16, 20), torch.randn(2, 20, 48)
    device = next(enc.parameters()).device
    latent = enc.encode(img.to(device))
    return latent, dec.decode(latent, 2, noise.to(device))


def test_state_dict_carries_all_that_encode_and_decode_need():
    enc, dec = with_statistics()
    expected = round_trip(enc, dec)

    def check(enc2, dec2, why):
        for a, b in zip(round_trip(enc2.eval(), dec2.eval()), expected):
            assert torch.equal(a, b), why
    fresh = micro_models(seed=1)[1:]
    for module, source in zip(fresh, (enc, dec)):
        module.load_state_dict(source.state_dict())
    check(*fresh, "state_dict -> load_state_dict must keep the latent statistics")
    for assign in (False, True):
        with torch.device("meta"):
            empty = encoder.Encoder(encoder.ViT(MICRO_VIT), 8), decoder.Decoder(MICRO_DECODER)
        for module, source in zip(empty, (enc, dec)):
            if not assign:
                module.to_empty(device="cpu")
                for x in (*module.parameters(), *module.buffers()):
                    x.data.fill_(7.0)  # what uninitialised memory may hold
            module.load_state_dict(source.state_dict(), assign=assign)
        check(*empty, f"made on meta, then loaded with assign={assign}")
    check(*copy.deepcopy((enc, dec)), "deepcopy")
    check(*pickle.loads(pickle.dumps((enc, dec))), "pickle")
    for name in encoder.ACTIVATIONS:
        pickle.dumps(encoder.ViT(replace(MICRO_VIT, activation=name)))


def test_a_file_made_of_state_dicts_is_read_and_training_writes_parameters_alone():
    enc, dec = with_statistics()
    with tempfile.TemporaryDirectory() as tmp:
        path, config = tokenizer_file(tmp), {"vit": asdict(MICRO_VIT), "decoder": asdict(MICRO_DECODER), "size": 16}
        tensors = {f"{part}.{k}": x for part, m in (("encoder", enc), ("decoder", dec))
                   for k, x in m.state_dict().items()}
        stats = {"latent_mean": enc.latent_mean.flatten() + 1, "latent_std": enc.latent_std.flatten() * 2}
        for file in (tensors | stats,
                     {k: x for k, x in tensors.items() if k.split(".")[-1] not in ("mean", "std", *stats)} | stats):
            encoder.write_model(path, config, file)
            loaded = encoder.Encoder.from_pretrained(path), decoder.Decoder.from_pretrained(path)
            for module in loaded:  # the file's own statistics count, those of a module's state_dict are older
                assert torch.equal(module.latent_mean.flatten(), stats["latent_mean"]), "the file's latent_mean"
                assert torch.equal(module.latent_std.flatten(), stats["latent_std"])
                assert torch.equal((module if module is loaded[1] else module.vit).std.flatten(),
                                   torch.tensor([0.229, 0.224, 0.225]))
    names = {name for name, _ in (*enc.named_parameters(), *dec.named_parameters())}
    assert not {"vit.mean", "vit.std", "mean", "std", "latent_mean", "latent_std"} & names


def test_precisions():
    """bfloat16 keeps 8 bits and half 11: their images and losses differ from fp32's by little more; double by fp32's
    rounding."""
    img, noise = torch.rand(2, 3, 16, 20), torch.randn(2, 20, 48)
    t = torch.rand(2, 20)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.01)):
        torch.manual_seed(0)
        enc, dec = encoder.Encoder(encoder.ViT(MICRO_VIT), 8).eval(), decoder.Decoder(MICRO_DECODER).eval()
        for b in (*dec.head.blocks, dec.head):
            torch.nn.init.normal_((b.modulation if b is not dec.head else b.output).weight, std=0.1)
        with torch.no_grad():
            z, hidden = enc(img)
            expected = hidden[-1], dec.decode(enc.encode(img), 2, noise), dec(z, img, t, noise), enc.features(img)
            enc, dec = enc.to(dtype), dec.to(dtype)
            for given in (img, img.to(dtype)):  # the caller's images may be of either type
                z, hidden = enc(given)
                got = hidden[-1], dec.decode(enc.encode(given), 2, noise), dec(z, given, t, noise), enc.features(given)
                for a, b in zip(got, expected):
                    close(a.double(), b.double(), tolerance)
                assert (hidden[-1].dtype == dtype
                        and got[2].dtype == (dtype if dtype == torch.float64 else torch.float32))
                assert dec.decode(z).shape == img.shape, "noise that is not given is drawn"
                # the flow's state is never of few bits
                v = dec.velocity(noise.to(dtype), t.to(dtype), dec.condition(z))
                assert v.dtype == (dtype if dtype == torch.float64 else torch.float32)
    enc, dec = enc.double(), dec.double()
    enc(img)[0].sum().backward(), dec(z, img).backward()


def test_made_or_used_where_another_type_is_the_default():
    """As transformers' from_pretrained makes modules: parameters of that type; what is computed in fp32 stays so."""
    _, enc, dec = micro_models()
    img, noise, alpha = torch.rand(2, 3, 8, 12), torch.randn(2, 6, 48), torch.rand(3)
    latent = enc.encode(img)
    with torch.no_grad():
        expected = dec.decode(latent, 3, noise), distill.layer_weights(alpha)
        try:
            torch.set_default_dtype(torch.bfloat16)
            got = dec.decode(latent, 3, noise), distill.layer_weights(alpha)
            enc, dec = encoder.Encoder(encoder.ViT(MICRO_VIT), 8), decoder.Decoder(MICRO_DECODER)
            z = enc(img)[0]
            assert z.dtype == torch.bfloat16 and dec.decode(z).shape == img.shape and dec(z, img).dtype == torch.float32
            assert {p.dtype for p in (*enc.parameters(), *dec.parameters())} == {torch.bfloat16}
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    close(dec.pos_embed.float(), decoder.Decoder(MICRO_DECODER).pos_embed, 4e-3)  # rounded once


class LowRank(torch.nn.Module):
    """As LoRA's layers: the linear layer, whose weight it shows, and an update."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        self.update = torch.nn.Parameter(torch.randn_like(linear.weight))

    def forward(self, x):
        return self.linear(x) + x @ self.update.T


def test_layers_that_stand_in_for_linear_ones():
    """The update counts in every layer, layer scale or not: as if it were added to the weight."""
    for config in MICRO_VIT, replace(MICRO_VIT, layer_scale=0.5):
        vit, img = encoder.ViT(config), torch.rand(1, 3, 8, 8)
        added = copy.deepcopy(vit)
        for block, other in zip(vit.blocks, added.blocks):
            for name in "qkv", "proj", "fc1", "fc2":
                setattr(block, name, LowRank(getattr(block, name)))
                getattr(other, name).weight.data += getattr(block, name).update.data
        close(vit(img)[-1], added(img)[-1], 1e-4)


def test_compile():
    enc, dec = with_statistics()
    expected = round_trip(enc, dec)
    whole = types.SimpleNamespace(encode=torch.compile(enc.encode, backend="eager", fullgraph=True),
                                  parameters=enc.parameters)
    parts = types.SimpleNamespace(decode=torch.compile(dec.decode, backend="eager", fullgraph=True))
    for a, b in zip(round_trip(whole, parts), expected):
        close(a, b, 1e-5)
    loss = torch.compile(dec, backend="eager", fullgraph=True)
    img, t, noise = torch.rand(2, 3, 16, 20), torch.rand(2, 20), torch.randn(2, 20, 48)
    z = enc(img)[0].detach()
    close(loss(z, img, t, noise), dec(z, img, t, noise), 1e-5)


def test_transforms_and_exports():
    """torch.func, fake tensors and torch.export: values or gradients one image at a time are those of the batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call, grad, vmap
    enc, dec = with_statistics()
    img, t, noise = torch.rand(2, 3, 8, 12), torch.rand(2, 6), torch.randn(2, 6, 48)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        latent, z = enc.encode(img).detach(), enc(img)[0].detach()
        close(vmap(lambda x: enc.encode(x[None])[0])(img), latent, 1e-5)
        close(vmap(lambda x: enc.features(x[None], 1)[0])(img), enc.features(img, 1), 1e-5)
        params = {k: p.detach() for k, p in dec.named_parameters()}
        one = lambda params, *args: functional_call(dec, params, tuple(x[None] for x in args))
        each = vmap(grad(one), (None, 0, 0, 0, 0))(params, z, img, t, noise)["head.output.weight"]
        for b in range(2):
            sample = torch.autograd.grad(dec(*(x[b:b + 1] for x in (z, img, t, noise))), dec.head.output.weight)[0]
            close(each[b], sample, 1e-4)
        forward = torch.func.jvp(lambda x: dec.decode(x, 1, noise).sum(), (latent,), (torch.ones_like(latent),))[1]
        x = latent.clone().requires_grad_()
        close(forward, torch.autograd.grad(dec.decode(x, 1, noise).sum(), x)[0].sum(), 1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert enc.encode(mode.from_tensor(img)).shape == (2, 8, 2, 3), "shapes without values"

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dec = dec

        def forward(self, latent, noise):
            return self.dec.decode(latent, 1, noise)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Decode(), (latent, noise), dynamic_shapes=({0: batch}, {0: batch})).module()
    many = latent.repeat(3, 1, 1, 1), noise.repeat(3, 1, 1)
    close(exported(*many), dec.decode(many[0], 1, many[1]), 1e-5)


def test_empty_batches_and_what_would_be_broadcast():
    _, enc, dec = micro_models()
    empty = torch.rand(0, 3, 8, 12)
    z, hidden = enc(empty)
    assert z.shape == (0, 8, 2, 3) and hidden[-1].shape == (0, 7, 32)
    assert enc.features(empty, grid=True).shape == (0, 32, 2, 3)
    assert dec.decode(z).shape == empty.shape
    for wrong in [torch.rand(3, 8, 12)], "img.png":
        raises(ValueError, enc, wrong, words=f"img is {type(wrong).__name__}")
    img, c = torch.rand(4, 3, 8, 12), torch.randn(4, 6, 32)
    assert [x.shape[1] for x in enc.features(img, range(2))] == [6, 6]
    for wrong in 1.5, "last", [None, "0"]:
        raises(ValueError, enc.features, img, wrong, words=["layer is", "integers from -3 to 2"])
    x, t, noise, same = torch.randn(4, 6, 48), torch.rand(4, 6), torch.randn(4, 6, 48), lambda x, t: x
    needed = "expected a floating-point tensor "
    for wrong, words in (((x, t[:1], noise), f"t is torch.float32 (1, 6); {needed}(4, 6)"),
                         ((x, t, noise[:1]), f"noise is torch.float32 (1, 6, 48); {needed}(4, 6, 48)"),
                         ((x, t, noise[..., :1]), f"noise is torch.float32 (4, 6, 1); {needed}(4, 6, 48)"),
                         ((x, torch.rand(6), noise), f"t is torch.float32 (6,); {needed}(4)")):
        raises(ValueError, decoder.flow_loss, same, *wrong, words=words)
    for one in (lambda x, t: x[..., :1]), (lambda x, t: x[:1]), (lambda x, t: x[None]):
        raises(ValueError, decoder.flow_loss, one, x, t, noise, words=["velocity is", needed + "(4, 6, 48)"])
        raises(ValueError, decoder.euler, one, noise, words=["velocity is", needed + "(4, 6, 48)"])
    raises(ValueError, decoder.euler, same, noise, 0, words="steps is 0")
    for wrong in (x[:1], t, c), (x, t[:1], c), (x, t, c[:1]), (x, t[:, :1], c), (x, t, c[:, :1]), (x, t[:, 0], c):
        raises(ValueError, dec.velocity, *wrong, words=needed)
    raises(ValueError, distill.layer_distances, [c[:, :0]], [c[:, :0]], words="N at least 1")


def sharded(port, path):
    """A process of test_ddp_and_fully_shard: the round trip and a training step of sharded modules."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    enc, dec = with_statistics()
    img, t, noise = torch.rand(2, 3, 16, 20), torch.rand(2, 20), torch.randn(2, 20, 48)
    expected = *round_trip(enc, dec), enc.features(img), dec(enc(img)[0], img, t, noise)
    ddp = DistributedDataParallel(enc), DistributedDataParallel(dec)
    ddp[1](ddp[0](img)[0], img, t, noise).backward()
    gradients = [p.grad.clone() for p in (*enc.parameters(), *dec.parameters()) if p.grad is not None]
    results = [*round_trip(ddp[0].module, ddp[1].module)]
    if not hasattr(torch.distributed.fsdp, "fully_shard"):  # torch 2.5 has it for CUDA alone
        torch.save([expected[:2], results, gradients, gradients], path)
        os._exit(0)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for m in (enc, dec):
        m.zero_grad()
        for block in (m.vit if m is enc else m).blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(m, mesh=mesh)
    register_fsdp_forward_method(enc, "features")
    for name in "decode", "condition", "velocity":
        register_fsdp_forward_method(dec, name)
    results += [*round_trip(enc, dec), enc.features(img), dec(enc(img)[0], img, t, noise)]
    results[-1].backward()
    sums = [p.grad.full_tensor() for p in (*enc.parameters(), *dec.parameters()) if p.grad is not None]
    torch.save([[*expected[:2], *expected], results, gradients, sums], path)
    dist.destroy_process_group()
    os._exit(0)


def test_ddp_and_fully_shard():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "results.pt")
        process = FORKS.Process(target=sharded, args=(free_port(), path))
        process.start(), process.join()
        assert process.exitcode == 0
        expected, results, gradients, sums = torch.load(path)
    assert len(gradients) == len(sums) and len(results) == len(expected)
    for a, b in zip([*results, *sums], [*expected, *gradients]):
        close(a.detach(), b.detach(), 1e-5)


def test_what_is_no_image_or_latent_is_refused():
    _, enc, dec = micro_models()
    img, z, noise = torch.rand(2, 3, 16, 32), torch.randn(2, 8, 4, 8), torch.randn(2, 32, 48)
    wrong_sizes = {
        "30x16 pixels; sides must be multiples of the patch 4: try 32x16": img[..., :30],
        "32x14 pixels; sides must be multiples of the patch 4: try 32x16": img[:, :, :14], "0x16 pixels": img[..., :0]}
    for words, wrong in wrong_sizes.items():
        for call in (enc, enc.encode, enc.features):
            raises(ValueError, call, wrong, words=words)
        raises(ValueError, dec.loss, z, wrong, words=[str(tuple(wrong.shape)), "(2, 3, 16, 32)"])
    wrong_images = {
        "torch.uint8 (2, 3, 16, 32)": (255 * img).byte(), "(2, 1, 16, 32)": img[:, :1], "(3, 16, 32)": img[0],
        "from 0 to 255": torch.tensor([0.0, 255]).repeat(2, 3, 16, 16),
        "from -1 to 1": torch.tensor([-1.0, 1]).repeat(2, 3, 16, 16), "nan": img + float("nan"),
        "torch.int64": img.long(), "ndarray": img.numpy()}
    for words, wrong in wrong_images.items():
        for call in (enc, enc.encode, enc.features, lambda x: dec.loss(z, x)):
            raises(ValueError, call, wrong, words=words)
    wrong_latents = {"(2, 7, 4, 8)": z[:, :7], "(8, 4, 8)": z[0], "(2, 8, 32)": z.flatten(2), "torch.int64": z.long(),
                     "(2, 8, 0, 8)": z[:, :, :0], "ndarray": z.numpy()}
    for words, wrong in wrong_latents.items():
        for call in (dec.condition, dec.decode, lambda x: dec.loss(x, img)):
            raises(ValueError, call, wrong, words=words)
    # as many patches, another grid
    raises(ValueError, dec.loss, z.transpose(2, 3), img, words=["(2, 3, 16, 32)", "(2, 3, 32, 16)"])
    raises(ValueError, dec.loss, z[:1], img, words=["is torch.float32 (2, 3, 16, 32)", "tensor (1, 3, 16, 32)"])
    raises(ValueError, dec.loss, z, img[:1], words=["is torch.float32 (1, 3, 16, 32)", "tensor (2, 3, 16, 32)"])
    raises(ValueError, dec.loss, z, img, torch.rand(2, 1), words=["t is torch.float32 (2, 1)", "(2, 32)"])
    raises(ValueError, dec.loss, z, img, None, noise[:1], words=["noise is torch.float32 (1, 32, 48)"])
    raises(ValueError, dec.decode, z, 1, noise[:1], words=["(1, 32, 48)", "(2, 32, 48)"])
    raises(ValueError, dec.decode, z, 0, words="steps is 0")
    enc(img * 1.2 - 0.1), dec.loss(z, img * 1.2 - 0.1)  # what a bicubic resize overshoots is no fault
    tokens = [torch.randn(4, 6, 8) for _ in range(3)]
    for teacher in ([x[:1] for x in tokens], [x[:, :5] for x in tokens], [x[..., :1] for x in tokens], tokens[:2],
                    [x[0] for x in tokens]):
        raises(ValueError, distill.distill_loss, tokens, teacher, words="expected the same (B, N, D)")
    with torch.device("meta"):  # nothing is read, so nothing waits for a device
        vit = encoder.ViT(MICRO_VIT)
        assert vit(torch.empty(2, 3, 16, 16))[-1].shape == (2, 17, 32)
    # what is drawn is drawn where the module is: masks, times, noise
    enc, img = enc.to("meta").train(), img.to("meta")
    enc.vit.drop_path = 0.5
    for objective in "flow", "pixel":
        dec = decoder.Decoder(replace(MICRO_DECODER, objective=objective)).to("meta")
        assert dec(enc(img)[0], img).device == dec.decode(enc.encode(img), 2).device == torch.device("meta")


def test_features_of_several_layers():
    _, enc, _ = micro_models()
    img = torch.rand(2, 3, 8, 12)
    with torch.no_grad():
        hidden = enc.vit(img)
        last, second = enc.vit.norm(hidden[-1])[:, 1:], hidden[-2][:, 1:]
        assert torch.equal(enc.features(img), last) and torch.equal(enc.features(img, -2), second)
        assert torch.equal(enc.features(img, -1), hidden[-1][:, 1:]), "a layer asked for by number is not normed"
        assert torch.equal(enc.features(img, -3), hidden[0][:, 1:]), "the first of three"
        for layers in [None, -2, 0], (None, -2, 0):
            got = enc.features(img, layers)
            assert all(torch.equal(a, b) for a, b in zip(got, (last, second, hidden[0][:, 1:]), strict=True))
        for h in range(2):
            for w in range(3):  # row-major: token 3h + w is at (h, w)
                assert torch.equal(enc.features(img, -2, grid=True)[:, :, h, w], second[:, 3 * h + w])
        assert enc.features(img, [0], grid=True)[0].shape == (2, 32, 2, 3)
        calls = []
        handles = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(enc.vit.blocks)]
        enc.features(img, [0, -2])
        assert calls == [0, 1], "one pass, which stops after the deepest layer asked for"
        for handle in handles:
            handle.remove()
    for wrong in (3, -4, [0, 7], []):
        raises(ValueError, enc.features, img, wrong, words="integers from -3 to 2")


def test_gradients_reach_pixels_and_weights():
    """No call stops gradients, and callers decide: derivatives along a direction, against differences of values, in
    fp64."""
    _, enc, dec = micro_models()
    enc, dec = enc.double(), dec.double()
    for x in (*enc.parameters(), *dec.parameters()):
        x.data *= 0.5
    img = (0.25 + 0.5 * torch.rand(1, 3, 8, 8)).double()
    z, noise = torch.randn(1, 8, 2, 2).double(), 0.1 * torch.randn(1, 4, 48).double()
    calls = {"encode": (lambda x: enc.encode(x).sin().sum(), img),
             "features": (lambda x: enc.features(x, 1).sin().sum(), img),
             "decode": (lambda x: dec.decode(x, 2, noise).sin().sum(), z)}
    for name, (f, x) in calls.items():
        x = x.clone().requires_grad_()
        direction = torch.randn_like(x)
        slope, = torch.autograd.grad(f(x), x)
        with torch.no_grad():
            numeric = (f(x + 1e-5 * direction) - f(x - 1e-5 * direction)) / 2e-5
        assert abs((slope * direction).sum() - numeric) < 1e-5 * (1 + numeric.abs()), name
    enc.features(img).sum().backward(), dec.decode(z, noise=noise).sum().backward()
    assert enc.vit.patch_embed.weight.grad.abs().sum() > 0 and dec.latent_up[0].weight.grad.abs().sum() > 0


def test_flow_in_twelve_lines():
    """flow_loss and euler against the paper's equations on single numbers, for both shapes of t."""
    x, noise = torch.tensor([[[1.0, -2.0]], [[0.5, 3.0]]]), torch.tensor([[[0.0, 4.0]], [[2.0, -1.0]]])  # (2, 1, 2)
    seen = []

    def velocity(x_t, t):
        seen.append((x_t, t))
        return torch.full_like(x_t, 2.0)
    loss = decoder.flow_loss(velocity, x, torch.tensor([[0.25], [0.75]]), noise)
    # x_t: 0.75 * (1, -2) + 0.25 * (0, 4) = (0.75, -0.5); 0.25 * (0.5, 3) + 0.75 * (2, -1) = (1.625, 0)
    assert seen[0][0].flatten().tolist() == [0.75, -0.5, 1.625, 0.0]
    # u = eps - x: (-1, 6), (1.5, -4); (2 - u)^2: 9, 16, 0.25, 36; mean 15.3125
    assert loss.item() == 15.3125
    assert decoder.flow_loss(velocity, x, torch.tensor([0.25, 0.75]), noise).item() == 15.3125, "one t for each image"
    assert torch.equal(seen[1][0], seen[0][0])
    # dx/dt = x: two steps from 1: 1 - 1/2 = 1/2, then 1/2 - 1/4 = 1/4, at t = 1 and 1/2
    times = []
    end = decoder.euler(lambda x, t: times.append(t) or x, torch.ones(2, 3, 5), steps=2)
    assert (end == 0.25).all() and [t.unique().tolist() for t in times] == [[1.0], [0.5]] and times[0].shape == (2, 3)


def test_flow_head_runs_in_the_papers_direction():
    """Against the same MLP written out in the released direction, s = 1 - t with s = 0 noise, whose output is x - eps =
    -v."""
    torch.manual_seed(0)
    head = decoder.FlowHead(6, 10, 16, 2)
    x, t, c = torch.randn(4, 6), torch.rand(4), torch.randn(4, 10)
    assert not head(x, t, c).any(), "a new head's velocity is 0"
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    w = dict(head.named_parameters())
    linear = lambda name, x: x @ w[name + ".weight"].T + w[name + ".bias"]
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    silu = lambda x: x / (1 + (-x).exp())
    angles = 1000 * (1 - t)[:, None] * 10000 ** (-torch.arange(128) / 128)
    y = silu(linear("time_fc2", silu(linear("time_fc1", torch.cat([angles.cos(), angles.sin()], 1))))
             + linear("cond_proj", c))
    h = linear("input_proj", x)
    for k in range(2):
        shift, scale, gate = linear(f"blocks.{k}.modulation", y).split(16, 1)
        inner = (norm(h) * w[f"blocks.{k}.norm.weight"] + w[f"blocks.{k}.norm.bias"]) * (1 + scale) + shift
        h = h + gate * linear(f"blocks.{k}.fc2", silu(linear(f"blocks.{k}.fc1", inner)))
    shift, scale = linear("final_modulation", y).split(16, 1)
    close(head(x, t, c), -linear("output", norm(h) * (1 + scale) + shift), 1e-4)
    close(head(x[None], t[None], c[None])[0], head(x, t, c), 1e-6)


def test_parameter_groups_with_layer_decay():
    vit = encoder.ViT(REGISTERS)  # three blocks
    head = torch.nn.Sequential(torch.nn.Linear(32, 5), torch.nn.LayerNorm(5))
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    whole = torch.nn.ModuleDict({"backbone": encoder.Encoder(vit, 5), "head": head})  # which holds the ViT further in
    del whole.backbone.latent_down
    by_hand = {vit.patch_embed.weight: (0.0625, 0.1), vit.pos_embed: (0.0625, 0), vit.cls_token: (0.0625, 0),
               vit.register_tokens: (0.0625, 0), vit.blocks[0].qkv.weight: (0.125, 0.1),
               vit.blocks[1].fc1.bias: (0.25, 0), vit.blocks[2].proj.weight: (0.5, 0.1), vit.blocks[2].scale1: (0.5, 0),
               vit.norm.weight: (1, 0), head[0].weight: (1, 0.1), head[1].weight: (1, 0)}
    for modules in [vit, head, frozen, head], whole:
        groups = encoder.parameter_groups(modules, lr=1.0, weight_decay=0.1, layer_decay=0.5)
        rate = {p: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert sum(len(g["params"]) for g in groups) == len(rate) == len([*vit.parameters(), *head.parameters()])
        assert {p: rate[p] for p in by_hand} == by_hand
    assert len(encoder.parameter_groups(head, 1.0)) == 2, "a module alone, too"
    assert len(encoder.parameter_groups(iter([frozen, head]), 1.0)) == 2, "and what can be read but once"
    other = torch.nn.ModuleDict({"mha": torch.nn.MultiheadAttention(4, 2), "conv": torch.nn.Conv1d(2, 3, 1),
                                 "classes": torch.nn.Embedding(5, 4)})
    other.queries = torch.nn.Parameter(torch.zeros(7, 4))
    decays = {p for g in encoder.parameter_groups(other, 1.0, 0.1) for p in g["params"] if g["weight_decay"]}
    names = {name for name, p in other.named_parameters() if p in decays}
    assert names == {"mha.in_proj_weight", "mha.out_proj.weight", "conv.weight"}, "classes and queries are tokens"


def test_registers_equal_transformers_and_the_original_layout():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4,
        num_register_tokens=4)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    img = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in encoder.PIXEL_STATS["imagenet"])
    with torch.no_grad(), tempfile.TemporaryDirectory() as tmp:
        reference = model(pixel_values=(img - mean) / std, output_hidden_states=True)
        model.save_pretrained(tmp)
        files = [os.path.join(tmp, "model.safetensors")]
        names, get = encoder.open_weights(files[0])
        original = {"register_tokens": get("embeddings.register_tokens"), "mask_token": get("embeddings.mask_token")}
        rules = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
                 "layernorm": "norm", "embeddings.patch_embeddings.projection": "patch_embed.proj",
                 "encoder.layer": "blocks", "attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma",
                 "layer_scale2.lambda1": "ls2.gamma"}
        for name in sorted(names - {"embeddings.register_tokens", "embeddings.mask_token"}):
            if "attention.attention" in name:
                if ".query." in name:
                    stacked = [get(name.replace("query", x)) for x in ("query", "key", "value")]
                    key = name.replace("encoder.layer", "blocks").replace("attention.attention.query", "attn.qkv")
                    original[key] = torch.cat(stacked)
                continue
            key = name
            for theirs, ours in rules.items():
                key = key.replace(theirs, ours)
            original[key] = get(name)
        files.append(os.path.join(tmp, "dinov2_vits4_reg4_pretrain.pth"))
        torch.save(original, files[1])
        for file in files:
            vit = encoder.ViT(replace(MICRO_VIT, num_prefix=5, layer_scale=1.0)).eval()
            with unittest.mock.patch.dict(encoder.TEACHERS, registers=vit.config):
                vit = encoder.load_teacher("registers", file)
            hidden = vit(img)
            for a, b in zip(hidden, reference.hidden_states[1:], strict=True):
                assert (a - b).abs().max() < 5e-6, file
            enc = encoder.Encoder(vit, 8)
            assert (enc.features(img) - reference.last_hidden_state[:, 5:]).abs().max() < 5e-6
        assert encoder.TEACHERS["dinov2-reg"] == replace(encoder.TEACHERS["dinov2"], num_prefix=5)


def test_export_of_plain_vits_registers_and_odd_mlps():
    from transformers import AutoModel
    torch.manual_seed(0)
    configs = {"vit": MICRO_VIT, "dinov2_with_registers": REGISTERS,
               "siglip_vision_model": replace(MICRO_VIT, num_prefix=0, mlp_width=85)}
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in encoder.PIXEL_STATS["imagenet"])
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        shipped = encoder.Encoder(encoder.load_teacher("tiny")).eval()
        encoders = (
            {name: encoder.Encoder(encoder.ViT(c)).eval() for name, c in configs.items()} | {"vit of tiny": shipped})
        for name, enc in encoders.items():
            convert.save_hf(enc, os.path.join(tmp, name))
            model, problems = AutoModel.from_pretrained(os.path.join(tmp, name), output_loading_info=True)
            assert model.config.model_type == name.split()[0]
            assert not problems["unexpected_keys"] and all("pooler" in k for k in problems["missing_keys"]), problems
            img = torch.rand(2, 3, enc.size, enc.size)
            tokens = model.eval()(pixel_values=(img - mean) / std).last_hidden_state[:, enc.vit.num_prefix:]
            assert (tokens - enc.features(img)).abs().max() < 3e-6 * max(1, tokens.abs().max()), name
        for wrong, words in ((replace(MICRO_VIT, pre_norm=True), "pre_norm patch_bias"),
                             (replace(REGISTERS, mlp_width=85), "mlp_width 85")):
            # 85 / 32 is not rounded down
            raises(encoder.UserError, convert.save_hf, encoder.Encoder(encoder.ViT(wrong)), tmp, words=words)


def test_vision_towers_of_larger_models():
    """A classifier of transformers, and the same names as CLIP, LLaVA, old and new, keep their tower under."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar(), torch.manual_seed(0)
    c = MICRO_VIT
    whole = ViTForImageClassification(ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.mlp_width,
        image_size=c.size, patch_size=c.patch, layer_norm_eps=c.eps)).eval()
    for p in whole.parameters():
        p.data = 0.2 * torch.randn_like(p)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in encoder.PIXEL_STATS["imagenet"])
    img = torch.rand(2, 3, c.size, c.size)
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        path, expected = os.path.join(tmp, "model.safetensors"), whole.vit((img - mean) / std).last_hidden_state
        whole.save_pretrained(tmp)
        state = safetensors.torch.load_file(path)
        for prefix in "vit.", "", "vision_model.", "vision_tower.", "model.vision_tower.":
            named = {k.replace("vit.", prefix, 1): x for k, x in state.items() if prefix == "vit."
                     or k.startswith("vit.")}
            safetensors.torch.save_file({k: x.clone() for k, x in named.items()}, path)
            vit = encoder.ViT(c).eval()
            encoder.load_vit(vit, path)
            close(vit.norm(vit(img)[-1]), expected, 1e-5)


def test_half_precision_comes_from_files_and_leaves_for_hugging_face_as_fp32():
    torch.manual_seed(0)
    vit = encoder.ViT(MICRO_VIT).half()
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "half.safetensors")
        encoder.write_model(path, {"vit": asdict(MICRO_VIT)}, dict(vit.named_parameters()))
        read = encoder.load_teacher(path)  # 2 bytes a number are no damage
        for name, x in vit.named_parameters():
            got = read.get_parameter(name)
            assert got.dtype == torch.float32 and torch.equal(got, x.float()), name
        convert.save_hf(encoder.Encoder(vit), tmp)  # whose config.json says float32
        written = safetensors.torch.load_file(os.path.join(tmp, "model.safetensors"))
        assert {x.dtype for x in written.values()} == {torch.float32}


def test_a_mirror_is_asked_at_its_address():
    with tempfile.TemporaryDirectory() as tmp:
        for endpoint in "https://mirror.example/hf", "https://mirror.example/hf/":
            with unittest.mock.patch.dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=tmp, TORCH_HOME=tmp):
                url = "https://mirror.example/hf/facebook/dinov2-large/resolve/main/model.safetensors"
                raises(encoder.MissingFile, encoder.fetch, "dinov2", True, words=f"{url} is not on this machine")


def test_pickles_where_torch_does_not_read_them_safely():
    with tempfile.TemporaryDirectory() as tmp:
        plain = os.path.join(tmp, "weights.pth")
        torch.save({"x": torch.ones(2)}, plain)
        published = "pt_inception-2015-12-05-6726825d.pth"  # torch.hub's rule: the name ends in digits of the SHA-256
        assert evaluation.INCEPTION_URL.endswith(published) and evaluation.INCEPTION_SHA256 == "6726825d"
        old = unittest.mock.patch.object(torch, "__version__", "2.9.1")  # eval.py knows one pickle, by its content
        with old, unittest.mock.patch.object(evaluation, "INCEPTION_SHA256", evaluation.sha256(plain)[:8]):
            REFUSE_OTHER(plain)
            raises(evaluation.UserError, REFUSE_OTHER, os.path.join(HERE, "LICENSE"), words=["torch 2.9.1", "2.10"])
        for version, safe in {"2.5.1": False, "2.6.0": False, "2.9.1+cu128": False, "2.10.0": True, "2.13.0+cpu": True,
                              "3.0.0": True}.items():
            if safe:
                REFUSE_PICKLE(plain, version)
            else:
                raises(encoder.UserError, REFUSE_PICKLE, plain, version, words=["pickle", f"torch {version}", "2.10"])
        with unittest.mock.patch.object(encoder, "refuse_pickle", side_effect=encoder.UserError("refused")):
            raises(encoder.UserError, encoder.open_weights, plain, words="refused")
        assert encoder.open_weights(pathlib.Path(plain))[0] == {"x"}  # a path of pathlib
        raises(encoder.MissingFile, encoder.fetch, pathlib.Path(tmp, "missing.pth"), words="missing.pth")
        open(plain, "wb").write(b"abc")
        raises(encoder.UserError, encoder.open_weights, pathlib.Path(plain), words=["weights.pth", "not executed"])
        assert evaluation.sha256(plain).startswith("ba7816bf"), "FIPS 180-4's example"


def test_two_writers_of_one_file():
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "n" * 250)  # as long as a name may be

        def outer(f):
            encoder.write_atomically(path, lambda g: g.write(b"second"))  # another writer begins and ends meanwhile
            f.write(b"first")
        encoder.write_atomically(path, outer)
        assert open(path, "rb").read() == b"first" and os.listdir(tmp) == ["n" * 250]
        raises(ZeroDivisionError, encoder.write_atomically, path, lambda f: 1 / 0)
        assert open(path, "rb").read() == b"first" and os.listdir(tmp) == ["n" * 250]


def test_encoder_decoder_and_distill_import_where_posix_is_missing():
    code = ("import sys, os, signal\nfor name in ('fcntl', 'resource', 'pwd', 'termios'): sys.modules[name] = None\n"
            "for name in ('pread', 'sched_getaffinity', 'fork', 'O_NONBLOCK'): vars(os).pop(name, None)\n"
            "for name in ('SIGHUP', 'SIGUSR1', 'SIGCHLD'): vars(signal).pop(name, None)\n"
            "import encoder, decoder, distill, torch\n"
            "encoder.os.name = 'nt'\n"
            "vit = encoder.load_teacher('tiny'); z = encoder.Encoder(vit, 16).encode(torch.rand(1, 3, 64, 64)); "
            "print(tuple(z.shape))")
    done = run("python", "-c", code)
    assert done.stdout == "(1, 16, 8, 8)\n", done.stderr
