"""Published weights: layouts of each family, the released file, the export, downloads.

The reference networks and the authors' tokenizer are in tests/published.py.
"""
import contextlib
import hashlib
import io
import json
import os
import tempfile
import unittest.mock
from dataclasses import replace

# first: tests.helpers sets the environment that torch reads when it is imported
from tests.helpers import close, raises, run_ranks, tokenizer_file
from tests.hostile import Payload
from tests.published import (
    FAMILIES, hub, layouts_of, loaded, reference, reference_tokens, released_forward, released_state,
    saved_by_transformers)

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import decoder
import encoder
import eval as evaluation
from tools import convert
from tools.script import find_weights


def test_published_layouts_equal_transformers():
    for family in FAMILIES:
        model, config = reference(family)
        with tempfile.TemporaryDirectory() as tmp:
            layouts = layouts_of(family, saved_by_transformers(model, tmp))
            for size in ((28, 28), (35, 63)):
                img = torch.rand(2, 3, *size)
                expected, last = reference_tokens(family, model, img)
                for name, state in layouts.items():
                    path = os.path.join(tmp, "weights.bin")
                    torch.save({"state_dict": {"module." + k: v for k, v in state.items()}} if name == "open_clip"
                               else state, path)
                    vit = loaded(config, path)
                    with torch.no_grad():
                        ours = vit(img)
                    for l, (a, b) in enumerate(zip(ours, expected, strict=True)):
                        assert (a - b).norm() / b.norm() <= 5e-6, f"{family}, {name} layout, {size}: block {l + 1}"
                    close(vit.norm(ours[-1]), last, 5e-6)
            for dtype in (torch.bfloat16, torch.float16):  # stored in half precision: equal to the rounded model
                path = os.path.join(tmp, "half.safetensors")
                save_file({k: v.to(dtype) for k, v in layouts["hf"].items()}, path)
                vit = loaded(config, path)
                model, _ = reference(family)
                model.load_state_dict({k: v.to(dtype).float() for k, v in model.state_dict().items()})
                with torch.no_grad():
                    close(vit(img)[-1], reference_tokens(family, model, img)[0][-1], 5e-6)
                    assert vit.pos_embed.dtype == torch.float32


def test_parity_sees_each_structural_mistake():
    """Every detail that a loader gets wrong in practice must move the output by more than the tolerance of the parity
    test."""
    swap = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "quick_gelu": "gelu"}
    for family in FAMILIES:
        model, config = reference(family)
        img = torch.rand(2, 3, 28, 28)
        expected = reference_tokens(family, model, img)[0][-1]
        with tempfile.TemporaryDirectory() as tmp:
            saved_by_transformers(model, tmp)
            mistakes = {"activation": dict(activation=swap[config.activation]),
                        "epsilon": dict(eps=1e-5 if config.eps == 1e-6 else 1e-6)}
            for name, change in mistakes.items():
                vit = loaded(replace(config, **change), os.path.join(tmp, "model.safetensors"))
                assert (vit(img)[-1] - expected).norm() / expected.norm() > 5e-6, (
                    f"{family}: a wrong {name} went unseen")
            vit = loaded(config, os.path.join(tmp, "model.safetensors"))
            if config.pre_norm:
                vit.norm_pre = nn.Identity()
            elif config.layer_scale:
                vit.blocks[1].scale2 = None
            else:
                continue
            assert (vit(img)[-1] - expected).norm() / expected.norm() > 5e-6, family


def test_published_models_at_full_depth():
    for family, depth in (("internvit", 24), ("dinov2", 24), ("siglip2", 27), ("clip", 24)):
        model, config = reference(family, depth=depth)
        img = torch.rand(1, 3, 28, 28)
        with tempfile.TemporaryDirectory() as tmp:
            saved_by_transformers(model, tmp)
            vit = loaded(config, os.path.join(tmp, "model.safetensors"))
        for a, b in zip(vit(img), reference_tokens(family, model, img)[0], strict=True):
            close(a, b, 1e-5)


def test_files_that_do_not_fit_are_refused():
    model, config = reference("clip")
    with tempfile.TemporaryDirectory() as tmp:
        state = saved_by_transformers(model, tmp)
        path = os.path.join(tmp, "x.safetensors")
        first, grid = "encoder.layers.1.mlp.fc1.weight", "embeddings.position_embedding.weight"
        cases = {"missing " + first: {k: v for k, v in state.items() if k != first},
                 "unknown surprise.weight": {**state, "surprise.weight": torch.zeros(1)},
                 first + " is (72, 144), expected (144, 72)": {**state, first: state[first].T.contiguous()},
                 grid + " is (72, 17)": {**state, grid: state[grid].T.contiguous()},
                 "no known layout": {"a": torch.zeros(1)}, "unknown blocks.0": {**state, "blocks.0": torch.zeros(1)}}
        for words, broken in cases.items():
            save_file(broken, path)
            vit = encoder.ViT(config)
            before = vit.patch_embed.weight.clone()
            raises(ValueError, encoder.load_vit, vit, path, words=words)
            assert torch.equal(vit.patch_embed.weight, before), "nothing may be copied before all was checked"
        torch.save({"state_dict": Payload(os.path.join(tmp, "executed"))}, os.path.join(tmp, "evil.pth"))
        raises(ValueError, encoder.load_vit, vit, os.path.join(tmp, "evil.pth"), words="not executed")
        assert not os.path.exists(os.path.join(tmp, "executed"))


def test_released_uniflow_file():
    """The authors' file, converted, is their tokenizer; the way back gives their file again, number by number."""
    small_vit = replace(encoder.TEACHERS["internvit"], width=32, depth=2, heads=2, mlp_width=64, patch=4, size=16)
    small_decoder = decoder.DecoderConfig(width=32, heads=2, gtb_depth=2, flow_depth=3, flow_width=40, patch=4, grid=4)
    state = released_state()
    img, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 16, 48)
    z, rec = released_forward(state, img, noise, 2, 2, 2, 2, 3, 4)
    # the same code at a small size
    small = unittest.mock.patch.multiple(convert, VIT=small_vit, DECODER=small_decoder, SIZE=16)
    with tempfile.TemporaryDirectory() as tmp, small, unittest.mock.patch.dict(os.environ, TORCH_HOME=tmp):
        path, ours, back = (os.path.join(tmp, name + ".safetensors") for name in ("theirs", "ours", "back"))
        extras = ["mlp1.0.weight", "encoder.extra", "chal_proj.norm.weight", "flow_head.net.extra"]
        save_file({**state, **{name: torch.zeros(3) for name in extras}}, path)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            found = find_weights(path)
        assert said.getvalue().splitlines() == [
            f"{path} is the authors' file: converting it, once, to {found}",
            f"{path}: ignored 4 tensors that the tokenizer does not use: {' '.join(sorted(extras))}"]
        enc, dec = encoder.Encoder.from_pretrained(found), decoder.Decoder.from_pretrained(found)
        config = encoder.read_config(found)
        assert (config["size"] == 16 and config["teacher"] == "internvit"
                and config["released"] == evaluation.sha256(path))
        close(enc.encode(img), z.mT.unflatten(-1, (4, 4)), 5e-6)
        close(dec.decode(enc.encode(img), noise=noise), rec, 5e-6)
        close(dec.decode(enc.encode(img), 3, noise),
              released_forward(state, img, noise, 2, 2, 2, 2, 3, 4, steps=3)[1], 5e-6)
        assert (rec > 0).float().mean() > 0.2 and (rec < 1).float().mean() > 0.2, (
            "the comparison must not be of clamped pixels")
        with contextlib.redirect_stderr(io.StringIO()) as said:  # once; a file of ours is itself
            assert find_weights(path) == found != path and find_weights(found) == found and not said.getvalue()
        assert os.path.dirname(found) == os.path.join(tmp, "hub", "checkpoints")
        for name, load in ("encoder", encoder.Encoder.from_pretrained), ("decoder", decoder.Decoder.from_pretrained):
            raises(ValueError, load, path, words=f"python -m tools.convert released {path} OUT.safetensors")
        save_file({k: x.bfloat16() for k, x in state.items()}, path)
        convert.from_released(path, ours)
        assert open(find_weights(path), "rb").read() == open(ours, "rb").read(), (
            "another file, and the same bytes each time")
        convert.to_released(ours, back)
        returned = load_file(back)
        assert returned.keys() == state.keys(), returned.keys() ^ state.keys()
        for name, x in returned.items():
            assert torch.equal(x, state[name].bfloat16()) and x.dtype == torch.bfloat16, name
        # statistics have no place there, which is said; another model is refused
        encoder.write_model(ours, encoder.read_config(ours), {**load_file(ours), "latent_std": torch.full((64,), 2.0)})
        with contextlib.redirect_stderr(io.StringIO()) as said:
            convert.to_released(ours, back)
        assert "statistics are left out" in said.getvalue() and load_file(back).keys() == state.keys()
        raises(ValueError, convert.to_released, tokenizer_file(tmp), back,
               words=["cannot build", "depth 3 instead of 2", "latent_dim 8 instead of 64"])
        moved = {k: x.T.contiguous() if k == "chal_unproj.c_fc.weight" else x for k, x in state.items()
                 if k != "decoder_pos_embed"}
        save_file(moved, path)
        raises(ValueError, convert.from_released, path, ours,
               words=["missing decoder_pos_embed", "chal_unproj.c_fc.weight is (64, 32), expected (32, 64)"])


def test_export_to_hugging_face():
    import transformers
    for family, ((_, model_class), _, _) in FAMILIES.items():
        _, config = reference(family)
        torch.manual_seed(3)
        enc = encoder.Encoder(encoder.ViT(config), 8).eval()
        for p in enc.parameters():
            p.data += 0.1 * torch.randn_like(p)
        with tempfile.TemporaryDirectory() as tmp:
            convert.save_hf(enc, tmp)
            model, info = getattr(transformers, model_class).from_pretrained(tmp, output_loading_info=True)
            assert (not info["missing_keys"] and not info["unexpected_keys"]
                    and not info["mismatched_keys"]), (family, info)
            for size in ((28, 28), (42, 21)):
                img = torch.rand(1, 3, *size)
                expected, last = reference_tokens(family, model.eval(), img)
                for a, b in zip(enc.vit(img), expected, strict=True):
                    close(a, b, 5e-6)
                close(enc.vit.norm(enc.vit(img)[-1]), last, 5e-6)
            said = json.load(open(os.path.join(tmp, "preprocessor_config.json")))
            assert (said.get("crop_size", said["size"])["height"] == 28
                    and said["resample"] == (2 if family == "siglip2" else 3))
            assert tuple(map(tuple, (said["image_mean"], said["image_std"]))) == FAMILIES[family][2]
            vit = loaded(config, os.path.join(tmp, "model.safetensors"))
            assert all(torch.equal(a, b)
                       for a, b in zip(vit.state_dict().values(), enc.vit.state_dict().values(), strict=True))
        with tempfile.TemporaryDirectory() as tmp:
            enc.size = 42  # trained at another size than its position grid's
            convert.save_hf(enc, tmp)
            model, img = getattr(transformers, model_class).from_pretrained(tmp), torch.rand(1, 3, 42, 42)
            close(enc.vit.norm(enc.vit(img)[-1]), reference_tokens(family, model.eval(), img)[1], 5e-6)
            said = json.load(open(os.path.join(tmp, "preprocessor_config.json")))
            assert said.get("crop_size", said["size"])["height"] == 42 and np.max(model.config.image_size) == 42


def test_downloads():
    content = np.random.default_rng(0).bytes(3_000_000)
    read = lambda path: open(path, "rb").read()
    left = lambda tmp: [f for _, _, files in os.walk(tmp) for f in files if not f.endswith(".lock")]
    with hub(content) as (seen, tmp):
        path = encoder.fetch("model")
        asked = "/org/repo/resolve/main/model.safetensors"
        assert read(path) == content and seen == [("GET", asked), ("GET", "/storage/blob")]
        assert encoder.fetch("model") == path and len(seen) == 2, "what is there is not downloaded again"
        assert encoder.fetch(path) == path, "a path given by the user always wins"
        assert left(tmp) == ["org--repo--model.safetensors"]
        storage = os.environ["HF_ENDPOINT"].replace("127.0.0.1", "localhost") + "/storage"
        a, b = (encoder.fetch(f"{storage}/{x}/resolve/main/model.safetensors") for x in "ab")
        assert a != b and read(a) == content, "two files of one name must not be taken for each other"
        digest = hashlib.sha256(f"{storage}/a/resolve/main/model.safetensors".encode()).hexdigest()
        assert os.path.basename(a) == f"{digest[:8]}--model.safetensors"
        # it does not have the hash in its name
        raises(FileNotFoundError, encoder.fetch, f"{storage}/model-0123abcd.pth", words="0123abcd")
        named = f"{storage}/model-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        assert read(encoder.fetch(named)) == content
        assert encoder.fetch(f"{storage}/vit-20240101.pth"), "a date is no hash"
    for code in 404, 503:
        with hub(content, fail=[code]) as (seen, tmp):
            words = [str(code), "curl", tmp, "/org/repo/resolve/main/model.safetensors", "run it again"]
            raises(FileNotFoundError, encoder.fetch, "model", words=words)
            assert not left(tmp), "a wrong file must not stay"
    with tempfile.TemporaryDirectory() as tmp:
        save_file({"x": torch.zeros(1000)}, whole := os.path.join(tmp, "whole.safetensors"))
        with hub(read(whole), cut=3000):
            raises(encoder.UserError, encoder.open_weights, encoder.fetch("model"), words="fetch it again")
    with hub(content) as (seen, tmp):
        raises(FileNotFoundError, encoder.fetch, "model", True, words=["is not on this machine", "put the file at"])
        os.environ["HF_HUB_OFFLINE"] = "1"
        raises(FileNotFoundError, encoder.fetch, "model", words="HF_HUB_OFFLINE")
        snapshot = os.path.join(tmp, "hf", "hub", "models--org--repo", "snapshots", "abc")
        os.makedirs(snapshot)
        open(os.path.join(snapshot, "model.safetensors"), "wb").write(b"cached")
        assert read(encoder.fetch("model")) == b"cached" and not seen, (
            "an existing Hugging Face cache comes before any download")
    with hub(content, stall=0.3) as (seen, tmp):
        script = os.path.join(tmp, "fetch.py")
        open(script, "w").write(
            "import encoder; encoder.PUBLISHED['model'] = 'org/repo/model.safetensors'; print(encoder.fetch('model'))")
        said = [done.stdout for done in run_ranks(3, "python", script)]
        assert len(set(said)) == 1 and read(said[0].strip()) == content and len(seen) == 2, (
            f"three processes must download once: {seen}")
