"""Published models as the tests know them, and where they come from.

transformers' networks at a small size, the layouts of published files, the authors' tokenizer written out from its
description, and a Hugging Face hub on loopback.
"""
import contextlib
import http.server
import io
import os
import re
import tempfile
import threading
import time
import unittest.mock
from dataclasses import asdict

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import encoder

FAMILIES = {  # name: (transformers' classes, our configuration at a small size, pixel mean and std as published)
    "internvit": (("InternVLVisionConfig", "InternVLVisionModel"), dict(final_norm=False, layer_scale=1.0),
                  ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "dinov2": (("Dinov2Config", "Dinov2Model"), dict(layer_scale=1.0), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "siglip2": (("SiglipVisionConfig", "SiglipVisionModel"),
                dict(num_prefix=0, activation="gelu_tanh", pixel_stats="half"), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    "clip": (("CLIPVisionConfig", "CLIPVisionModel"),
             dict(patch_bias=False, pre_norm=True, eps=1e-5, activation="quick_gelu", pixel_stats="openai"),
             ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))),
}


def reference(family, depth=3, width=72, heads=4, mlp=144, patch=7, size=28):
    """A random transformers model of the family, all its parameters drawn, and our configuration for it."""
    import transformers
    (config_class, model_class), ours, _ = FAMILIES[family]
    square = (lambda x: [x, x]) if family == "internvit" else (lambda x: x)
    kind = {"internvit": dict(attention_bias=True), "dinov2": dict(mlp_ratio=mlp // width)}.get(family, {})
    config = getattr(transformers, config_class)(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                                                 intermediate_size=mlp, image_size=square(size),
                                                 patch_size=square(patch), **kind)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    for name, p in model.named_parameters():  # norms and scales near 1; small embeddings, so that the epsilons matter
        p.data = (0.02 if "embeddings" in name else 0.1) * torch.randn_like(p) + (p.ndim == 1) * (p.data.mean() > 0.5)
    assert ours.items() <= asdict(encoder.TEACHERS[family]).items(), "the published model must be of this structure"
    return model, encoder.ViTConfig(width=width, depth=depth, heads=heads, mlp_width=mlp, patch=patch,
                                    size=size, **ours)


def reference_tokens(family, model, img):
    """transformers' own block outputs, and the tokens after its final norm where it has one."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in FAMILIES[family][2])
    resize = dict(interpolate_pos_encoding=True) if family in ("siglip2", "clip") else {}
    with torch.no_grad():
        out = model((img - mean) / std, output_hidden_states=True, **resize)
        last = model.post_layernorm(out.hidden_states[-1]) if family == "clip" else out.last_hidden_state
    return list(out.hidden_states[1:]), last


def loaded(config, path):
    """A ViT of the configuration with the file's weights."""
    vit = encoder.ViT(config).eval()
    encoder.load_vit(vit, path)
    return vit


def saved_by_transformers(model, folder):
    import transformers
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return load_file(os.path.join(folder, "model.safetensors"))


def fuse(state, pattern, fused):
    """Replace three projections, named by pattern with q, k and v filled in, by one."""
    state = dict(state)
    for name in [n for n in state if re.search(pattern.format("q"), n)]:
        parts = [state.pop(re.sub(pattern.format("q"), lambda m: m[0].replace(*swap), name)) for swap in
                 ((("q_proj", x + "_proj") if "q_proj" in name
                   else ("query", {"q": "query", "k": "key", "v": "value"}[x])) for x in "qkv")]
        state[re.sub(pattern.format("q"), fused, name)] = torch.cat(parts)
    return state


def renamed(state, *rules):
    for pattern, name in rules:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    return state


def layouts_of(family, hf):
    """The published layouts of a family made from transformers' file by the tables of TEACHERS.md, with what such files
    hold besides: {layout: state dict}."""
    extra = torch.zeros(2, 3)
    if family == "internvit":
        fused = fuse(hf, r"attention\.{}_proj", "attn.qkv")
        remote = renamed(fused, ("cls_token", "class_embedding"), ("position_embeddings", "position_embedding"),
                         (r"patch_embeddings\.projection", "patch_embedding"), (r"encoder\.layer\.", "encoder.layers."),
                         ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
                         (r"attention\.projection_layer", "attn.proj"), ("lambda_", "ls"))
        timm = renamed(remote, (r"embeddings\.class_embedding", "cls_token"),
                       (r"embeddings\.position_embedding", "pos_embed"),
                       (r"embeddings\.patch_embedding", "patch_embed.proj"), (r"encoder\.layers\.", "blocks."),
                       (r"(ls\d)", r"\1.gamma"))
        whole = {**renamed(hf, ("^", "vision_tower.")), "language_model.model.embed.weight": extra,
                 "multi_modal_projector.linear.bias": extra}
        return {"remote": remote, "hf": hf, "hf whole": whole, "timm": timm}
    if family == "dinov2":
        fused = fuse(hf, r"attention\.attention\.{}uery", "attn.qkv")
        timm = renamed(fused, (r"embeddings\.cls_token", "cls_token"), (r"embeddings\.mask_token", "mask_token"),
                       (r"embeddings\.position_embeddings", "pos_embed"),
                       (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
                       (r"encoder\.layer\.", "blocks."), (r"attention\.output\.dense", "attn.proj"),
                       (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"), ("^layernorm", "norm"))
        return {"hf": hf, "original": timm, "timm": {k: v for k, v in timm.items() if k != "mask_token"}}
    fused = fuse(hf, r"self_attn\.{}_proj", "attn.qkv")
    blocks = [(r"encoder\.layers\.", "blocks."), ("layer_norm", "norm"), (r"self_attn\.out_proj", "attn.proj"),
              ("post_layernorm", "norm"), (r"embeddings\.patch_embedding", "patch_embed.proj"),
              ("pre_layrnorm", "norm_pre")]
    timm = renamed(fused, *blocks, (r"embeddings\.position_embedding\.weight", "pos_embed"),
                   (r"embeddings\.class_embedding", "cls_token"))
    timm = {k: v for k, v in timm.items() if not k.startswith("head.")}
    timm["pos_embed"] = timm["pos_embed"][None]
    towers = {**renamed(hf, ("^", "vision_model.")), "logit_scale": extra,
              "text_model.encoder.layers.0.mlp.fc1.weight": extra,
              "text_model.embeddings.position_ids": torch.arange(3)}
    if family == "siglip2":
        timm["attn_pool.latent"] = extra
        return {"hf": hf, "two towers": {**towers, "logit_bias": extra}, "timm": timm}
    timm.update({"cls_token": timm["cls_token"].view(1, 1, -1), "head.weight": extra})
    openclip = renamed(fused, (r"embeddings\.class_embedding", "class_embedding"),
                       (r"embeddings\.position_embedding\.weight", "positional_embedding"),
                       (r"embeddings\.patch_embedding", "conv1"), ("pre_layrnorm", "ln_pre"),
                       ("post_layernorm", "ln_post"), (r"encoder\.layers\.", "transformer.resblocks."),
                       (r"layer_norm(\d)", r"ln_\1"), (r"attn\.qkv\.", "attn.in_proj_"),
                       (r"self_attn\.out_proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"),
                       (r"mlp\.fc2", "mlp.c_proj"), ("^", "visual."))
    openclip.update({"visual.proj": extra, "positional_embedding": extra,
                     "token_embedding.weight": extra, "ln_final.bias": extra,
                     "transformer.resblocks.0.ln_1.weight": extra,
                     "transformer.resblocks.0.attn.out_proj.weight": extra, "text_projection": extra,
                     "logit_scale": extra})
    towers = {**towers, "visual_projection.weight": extra, "vision_model.embeddings.position_ids": torch.arange(3)}
    return {"hf": hf, "two towers": towers, "timm": timm, "open_clip": openclip}


def released_forward(s, img, noise, heads, depth, gtb_depth, gtb_heads, flow_depth, p, steps=1):
    """The authors' tokenizer, written out from its description on a state dict with the released names: image ->
    latent, image."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    lin = lambda x, n: x @ s[n + ".weight"].T + s[n + ".bias"]
    norm = (lambda x, n, eps: F.layer_norm(x, x.shape[-1:], s[n + ".weight"], s[n + ".bias"], eps) if n
            else F.layer_norm(x, x.shape[-1:], eps=eps))

    def attention(x, n, heads):
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(-2, -3) for y in lin(x, n + ".qkv").chunk(3, -1))
        y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        return lin(y.transpose(-2, -3).flatten(-2), n + ".proj")
    x = F.conv2d((img - mean) / std, s["embeddings.patch_embedding.weight"], s["embeddings.patch_embedding.bias"],
                 stride=p).flatten(2).mT
    x = torch.cat([s["embeddings.class_embedding"].expand(len(x), -1, -1), x], 1) + s["embeddings.position_embedding"]
    for i in range(depth):
        n = f"encoder.layers.{i}."
        x = x + s[n + "ls1"] * attention(norm(x, n + "norm1", 1e-6), n + "attn", heads)
        x = x + s[n + "ls2"] * lin(F.gelu(lin(norm(x, n + "norm2", 1e-6), n + "mlp.fc1")), n + "mlp.fc2")
    z = lin(F.gelu(lin(x[:, 1:], "chal_proj.c_fc")), "chal_proj.c_proj")
    c = lin(F.gelu(lin(z, "chal_unproj.c_fc")), "chal_unproj.c_proj") + s["global_block_pos_embed"]
    for i in range(gtb_depth):
        n = f"global_blocks.{i}."
        c = c + attention(norm(c, n + "norm1", 1e-5), n + "attn", gtb_heads)
        c = c + lin(F.gelu(lin(norm(c, n + "norm2", 1e-5), n + "mlp.fc1")), n + "mlp.fc2")
    c = c + s["decoder_pos_embed"]
    n = "flow_head.net."
    freqs, pixels = 10000 ** (-torch.arange(128) / 128), noise
    for step in range(steps):
        t = step / steps  # 0 is noise
        time = torch.cat([torch.cos(1000 * t * freqs), torch.sin(1000 * t * freqs)])
        y = F.silu(lin(F.silu(lin(time, n + "time_embed.mlp.0")), n + "time_embed.mlp.2") + lin(c, n + "cond_embed"))
        h = lin(pixels, n + "input_proj")
        for i in range(flow_depth):
            b = f"{n}res_blocks.{i}."
            shift, scale, gate = lin(y, b + "adaLN_modulation.1").chunk(3, -1)
            h = h + gate * lin(F.silu(lin(norm(h, b + "in_ln", 1e-6) * (1 + scale) + shift, b + "mlp.0")), b + "mlp.2")
        shift, scale = lin(y, n + "final_layer.adaLN_modulation.1").chunk(2, -1)
        pixels = pixels + lin(norm(h, "", 1e-6) * (1 + scale) + shift, n + "final_layer.linear") / steps
    return z, (F.fold(pixels.mT, img.shape[2:], p, stride=p) * std + mean).clamp(0, 1)


def released_state(D=32, mlp=64, depth=2, gtb_depth=2, flow_depth=3, flow_width=40, p=4, grid=4, C=64):
    """Random tensors under the released names."""
    shapes = {"embeddings.class_embedding": (1, 1, D), "embeddings.position_embedding": (1, 1 + grid ** 2, D),
              "embeddings.patch_embedding.weight": (D, 3, p, p), "embeddings.patch_embedding.bias": (D,),
              "global_block_pos_embed": (1, grid ** 2, D), "decoder_pos_embed": (1, grid ** 2, D)}
    linears = {"chal_proj.c_fc": (D, D), "chal_proj.c_proj": (C, D), "chal_unproj.c_fc": (D, C),
               "chal_unproj.c_proj": (D, D)}
    norms = {}
    for i in range(depth):
        n = f"encoder.layers.{i}."
        shapes.update({n + "ls1": (D,), n + "ls2": (D,)})
        linears.update({n + "attn.qkv": (3 * D, D), n + "attn.proj": (D, D), n + "mlp.fc1": (mlp, D),
                        n + "mlp.fc2": (D, mlp)})
        norms.update({n + "norm1": D, n + "norm2": D})
    for i in range(gtb_depth):
        n = f"global_blocks.{i}."
        linears.update({n + "attn.qkv": (3 * D, D), n + "attn.proj": (D, D), n + "mlp.fc1": (4 * D, D),
                        n + "mlp.fc2": (D, 4 * D)})
        norms.update({n + "norm1": D, n + "norm2": D})
    n, W, q = "flow_head.net.", flow_width, 3 * p * p
    linears.update({n + "input_proj": (W, q), n + "time_embed.mlp.0": (W, 256), n + "time_embed.mlp.2": (W, W),
                    n + "cond_embed": (W, D), n + "final_layer.linear": (q, W),
                    n + "final_layer.adaLN_modulation.1": (2 * W, W)})
    for i in range(flow_depth):
        b = f"{n}res_blocks.{i}."
        linears.update({b + "mlp.0": (W, W), b + "mlp.2": (W, W), b + "adaLN_modulation.1": (3 * W, W)})
        norms[b + "in_ln"] = W
    shapes.update({k + ".weight": v for k, v in linears.items()})
    shapes.update({k + ".bias": v[:1] for k, v in linears.items()})
    shapes.update({k + end: (v,) for k, v in norms.items() for end in (".weight", ".bias")})
    torch.manual_seed(0)
    return {k: torch.randn(v) / (v[-1] ** 0.5 if len(v) > 1 else 2) for k, v in shapes.items()}


@contextlib.contextmanager
def hub(content, cut=None, fail=(), stall=0.0):
    """A Hugging Face hub on loopback that redirects to a storage server, as the true one does. cut: break the transfer
    after so many bytes; fail: status codes of the first requests. Yields the list of (method, path) seen, and a cache
    folder."""
    seen, fail = [], list(fail)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            seen.append((self.command, self.path))
            if self.path.startswith("/org") and fail:
                return self.send_error(fail.pop(0))
            if self.path.startswith("/org"):
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{server.server_port}/storage/blob")  # another host name
                self.send_header("Content-Length", "0")
                return self.end_headers()
            time.sleep(stall)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.wfile.write(content[:cut])
        do_HEAD = do_GET
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with (tempfile.TemporaryDirectory() as tmp,
          unittest.mock.patch.dict(encoder.PUBLISHED, model="org/repo/model.safetensors"),
          unittest.mock.patch.dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", TORCH_HOME=tmp,
                                   HF_HOME=os.path.join(tmp, "hf")),
          contextlib.redirect_stderr(io.StringIO())):
        try:
            yield seen, tmp
        finally:
            server.shutdown()
            server.server_close()
