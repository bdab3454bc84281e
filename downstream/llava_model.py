"""A language model that sees: a tokenizer's encoder, a projector of two layers, a causal language model (LLaVA).

    f = features(img, layer -2)          (T, N, D)        tokens of T square tiles, by a student or its teacher
    v = projector(f)                     (T, h, w, M)     M the language model's width
    x = embeddings of the text, with v in the place of IMAGE; loss = cross entropy of what comes after, on the answers

LLaVA-1.5 (Liu et al. 2024) gives one tile for a picture, N tokens. AnyRes (LLaVA-OneVision, Li et al. 2024) gives the
whole picture squashed to a square, and tiles of it at its own resolution: `merge` lays the tiles side by side, takes
away the padding, shrinks what is more than `cap` tiles, and ends each row by a learned `newline`.

Symbols: B samples, S their ids, T tiles, h, w the token grid of a tile, M width of the language model. ids hold IMAGE
once for every visual token, so that a sequence has its final length before the model sees it; count_tokens, which says
how many there are, calls `merge` itself. transformers is imported by load_llm alone, see downstream/requirements.txt.
"""
import functools
import inspect
import math
import os
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from encoder import (Encoder, UserError, ViT, ViTConfig, load_exactly, load_teacher, one_line, open_weights,
                     read_config)
from eval import sha256
from tools.script import commit, find_weights

PARTS = ("encoder", "projector", "llm")
IGNORE, IMAGE = -100, -200  # the label of what is not a target, and the id in the place of a visual token


class LLaVA(nn.Module):
    """encoder: of a tokenizer, or around a teacher's ViT. llm: a causal language model of transformers.

    layer: the encoder's block that is read. pool: p joins p x p neighbouring tokens to one, with the channels of all
    (InternVL's pixel shuffle). cap: AnyRes, where a picture's tiles give at most so many tiles' tokens; 0 is LLaVA-1.5.
    """

    def __init__(self, encoder, llm, layer=-2, pool=1, cap=0):
        super().__init__()
        self.encoder, self.llm, self.layer, self.pool, self.cap = encoder, llm, layer, pool, cap
        width, llm_width = encoder.vit.config.width * pool ** 2, llm.get_input_embeddings().weight.shape[1]
        self.projector = nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))
        self.newline = nn.Parameter(torch.randn(llm_width) / llm_width ** 0.5) if cap else None
        depth = len(encoder.vit.blocks)
        if layer not in range(-depth, depth):
            raise UserError(f"the encoder has {depth} blocks, so there is no block {layer}: give another --layer")

    def see(self, tiles):
        """uint8 tiles (T, 3, H, W) -> their visual tokens (T, h, w, M)."""
        f = self.encoder.features(tiles / 255, self.layer)  # (T, N, D)
        T, N, D = f.shape
        h, p = tiles.shape[2] // self.encoder.vit.config.patch, self.pool
        f = f.view(T, h // p, p, N // h // p, p, D).transpose(2, 3)  # (T, h/p, w/p, p, p, D)
        return self.projector(f.flatten(3))

    def embed(self, ids, tiles, layouts):
        """ids (B, S), uint8 tiles (T, 3, H, W) and a layout of each picture, in order -> embeddings (B, S, M).

        layouts: (tiles, grid, size, tokens) as llava_data.py makes them. tokens: how many of the picture's are in ids:
        fewer than it has, where a long sample was cut.
        """
        x = self.llm.get_input_embeddings()(ids.clamp(min=0))  # (B, S, M)
        visual = self.see(tiles)
        parts = visual.split([layout[0] for layout in layouts] + [len(visual) - sum(layout[0] for layout in layouts)])
        tokens = [merge(part, grid, size, self.newline, self.cap)[:n] for part, (_, grid, size, n) in
                  zip(parts, layouts)]
        if any(len(v) != layout[3] for v, layout in zip(tokens, layouts)):
            raise ValueError(f"a picture has {[len(v) for v in tokens]} tokens, ids expect {[x[3] for x in layouts]}")
        # A batch of text alone brings a black tile that nothing reads, and has no newline: with several ranks all must
        # run all parts, and each parameter must have a gradient on all ranks or on none.
        unread = [parts[-1]] if self.newline is None else [parts[-1], self.newline]
        x = x + 0 * sum(part.sum() for part in unread).to(x.dtype)
        if tokens:
            x = x.masked_scatter((ids == IMAGE)[:, :, None], torch.cat(tokens).to(x.dtype))
        return x

    def forward(self, ids, places, targets, tiles, layouts):
        """The sum of the cross entropies of `targets` (B, K), where IGNORE is none, by what comes after the places (K,)
        of the sequences. These are padded at their right, and attention is causal, so that it needs no mask."""
        x = self.embed(ids, tiles, layouts)
        logits = self.llm(inputs_embeds=x, logits_to_keep=places, use_cache=False).logits  # (B, K, vocabulary)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    @torch.no_grad()
    def generate(self, prompts, tiles, layouts, limit, stop):
        """Yields the next token of every prompt, (B,), greedily, at most `limit` times; -1 after the end of an answer.

        prompts: a list of ids (S_b,). They are padded at their left, so that all continue at the same place. stop: ids
        that end an answer. A cache keeps keys and values.
        """
        from transformers import DynamicCache
        device, longest = self.projector[0].weight.device, max(len(ids) for ids in prompts)
        ids = torch.stack([F.pad(x, (longest - len(x), 0)) for x in prompts]).to(device)  # (B, S)
        seen = torch.stack([F.pad(torch.ones_like(x), (longest - len(x), 0)) for x in prompts]).to(device)
        x, positions = self.embed(ids, tiles.to(device), layouts), (seen.cumsum(1) - 1).clamp(min=0)
        # newer versions of transformers say `cache`
        name = "cache" if "cache" in inspect.signature(self.llm.forward).parameters else "past_key_values"
        cache, ended = {name: DynamicCache(config=self.llm.config)}, torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(limit):
            logits = self.llm(inputs_embeds=x, attention_mask=seen, position_ids=positions, use_cache=True,
                              logits_to_keep=1, **cache).logits
            token = logits[:, -1].argmax(1)  # (B,)
            said = token.cpu()  # here Python waits for the GPU, once a token
            ended |= torch.isin(said, torch.tensor(stop))
            yield torch.where(ended, -1, said)
            if ended.all():
                return
            x = self.llm.get_input_embeddings()(token[:, None])
            seen, positions = F.pad(seen, (0, 1), value=1), positions[:, -1:] + 1


def merge(tiles, grid, size, newline, cap):
    """The visual tokens of a picture in the order in which the language model reads them: (T, h, w, M) -> (n, M).

    newline None: LLaVA-1.5, the one tile. grid (rows, columns) of tiles[1:], which show a picture of `size` (W, H);
    None: there are none. Roundings are those of LLaVA-OneVision, whose models count on them.
    """
    base = tiles[0].flatten(0, 1)
    if newline is None:
        return base
    if grid is None:
        return torch.cat([base, newline[None].to(base.dtype)])
    T, h, w, M = tiles.shape
    rows, columns = grid
    x = tiles[1:].unflatten(0, grid).transpose(1, 2).reshape(rows * h, columns * w, M)
    H, W = x.shape[:2]
    if size[0] * H > size[1] * W:  # wider than the grid: padded above and below
        above = (H - int(size[1] * (W / size[0]))) // 2
        x = x[above:H - above]
    else:
        left = (W - int(size[0] * (H / size[1]))) // 2
        x = x[:, left:W - left]
    H, W = x.shape[:2]
    times = math.sqrt(H * W / (cap * h * w))
    if times > 1.1:
        H, W = int(H // times), int(W // times)
        x = F.interpolate(x.permute(2, 0, 1)[None], size=(H, W), mode="bilinear")[0].permute(1, 2, 0)
    x = torch.cat([x, newline.to(x.dtype).expand(H, 1, M)], dim=1)  # (H, W + 1, M)
    return torch.cat([base, x.flatten(0, 1)])


@functools.lru_cache(maxsize=4096)
def count_tokens(tiles, grid, size, side, cap):
    """How many tokens `merge` makes of a picture of so many tiles, each of side x side tokens."""
    newline = torch.zeros(1) if cap else None
    return len(merge(torch.zeros(tiles, side, side, 1), grid, size, newline, cap))


def import_transformers():
    try:
        import transformers
    except ImportError as e:
        raise UserError(f"it needs transformers ({e}): pip install -r downstream/requirements.txt") from None
    return transformers


def load_llm(name, device=None):
    """A causal language model of transformers, from a folder or by its name on the hub, in the precision of its files.
    device: on it, with random parameters: of the folder the configuration alone is read."""
    library = import_transformers()
    library.logging.disable_progress_bar()
    try:
        if device is None:
            return library.AutoModelForCausalLM.from_pretrained(name, dtype="auto", attn_implementation="sdpa")
        config = library.AutoConfig.from_pretrained(name)
        with torch.device(device):
            return library.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"no language model can be loaded from {name}: it takes a folder or a hub name that "
                        f"transformers' AutoModelForCausalLM knows ({one_line(e)})") from None


def load_tokenizer(name):
    """The text tokenizer of a language model."""
    library = import_transformers()
    try:
        return library.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"no text tokenizer can be loaded from {name} ({one_line(e)})") from None


def build(config, llm, encoder=None):
    """The model that `config` (of a run's model.safetensors) describes, around a language model and an encoder."""
    if encoder is None:
        encoder = Encoder(ViT(ViTConfig(**config["vit"])), latent_dim=1, projector="linear").eval()
    llava = config["llava"]
    return LLaVA(encoder, llm, llava["layer"], llava["pool"], llava["cap"])


def load_eye(args):
    """(encoder, the size of its images, where it is from) of --weights or --teacher."""
    if args.weights:
        path = find_weights(args.weights)
        enc = Encoder.from_pretrained(path)
        return enc, enc.size, f"{path} {sha256(path)[:12]}"
    vit = load_teacher(args.teacher, args.teacher_weights)
    return Encoder(vit, 1, "linear").eval(), vit.config.size, f"{args.teacher} {args.teacher_weights or ''}".strip()


def build_stage(args, device):
    """(the model of a stage of training, what its file says of it). --llm, --weights and --teacher name the parts as
    they were before any stage; --init then brings the tensors of the stage before."""
    path = os.path.join(args.init, "model.safetensors") if args.init else None
    config = read_config(path) if path else {}
    if path and "llava" not in config:
        raise UserError(f"--init {args.init} is no run of downstream.llava")
    before = config.get("llava", {})
    enc, size, eye = load_eye(args) if args.weights or args.teacher else (None, before["size"], before["eye"])
    known = (lambda eye: eye.split()[-1]) if args.weights else str  # a tokenizer by its digest: its file may have moved
    if before and known(before["eye"]) != known(eye):
        raise UserError(f"--init {args.init} was trained with the encoder {before['eye']}, not with {eye}")
    llm_name = os.path.abspath(args.llm) if args.llm and os.path.isdir(args.llm) else args.llm or before["llm"]
    if before.get("trains_llm") and llm_name != before["llm"]:
        raise UserError(f"--init {args.init} has trained {before['llm']}, not {llm_name}: leave out --llm")
    size, cap = args.size or before.get("size", size), args.tiles if args.variant == "xl" else 0
    layer, pool = (before.get(name, value) if getattr(args, name) is None else getattr(args, name)
                   for name, value in (("layer", -2), ("pool", 1)))
    llava = dict(
        variant=args.variant, stage=args.stage, llm=llm_name, eye=eye, size=size, cap=cap, aspect=args.aspect,
        layer=layer, pool=pool, template=args.template, system=args.system,
        trains_llm="llm" in args.trains or before.get("trains_llm", False))
    if before and before["variant"] != args.variant:
        raise UserError(f"--init {args.init} is of --variant {before['variant']}")
    vit = asdict(enc.vit.config) if enc else config["vit"]
    unit = vit["patch"] * pool
    if size % unit:
        near = max(1, round(size / unit)) * unit
        raise UserError(f"--size {size} is no multiple of {unit}, the patch times --pool: try {near}")
    config = {"vit": vit, "llava": llava, "commit": commit()}
    if before.get("trains_llm"):
        llm = load_llm(os.path.join(args.init, "llm"), device)
    else:
        llm = load_llm(llm_name)
    torch.manual_seed(args.seed)
    model = build(config, llm, enc)
    if path:
        load_tensors(model, path)
    set_trained(model, args.trains, args.checkpoint_activations)
    return model, config


def set_trained(model, parts, checkpoint_activations):
    """Let `parts`, names of PARTS, learn and no others. checkpoint_activations: the backward pass computes each block
    again, instead of keeping its activations."""
    model.train()
    model.encoder.train("encoder" in parts)
    for part in PARTS:
        getattr(model, part).requires_grad_(part in parts)
    model.encoder.latent_down.requires_grad_(False)  # a block's features need neither this nor the final norm
    model.encoder.vit.norm.requires_grad_(False)
    model.encoder.vit.checkpoint = checkpoint_activations
    if checkpoint_activations:
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # transformers renames it
        getattr(model.llm, new if hasattr(model.llm, new) else old)({"use_reentrant": False})


def saved(name):
    """Whether a parameter of that name belongs into the file: all but the encoder's projection to latents."""
    return not name.startswith("encoder.latent_")


def load_tensors(model, path):
    """Copy what a run's model.safetensors holds into a model: encoder and projector, and the language model if it was
    trained. Raises UserError if a tensor does not fit."""
    names, get = open_weights(path)
    own = {k: p for k, p in model.named_parameters() if saved(k)}
    if not any(k.startswith("llm.") for k in names):
        own = {k: p for k, p in own.items() if not k.startswith("llm.")}
    load_exactly(own, {k: get(k) for k in names}, path)


def load_run(folder, device, llm=None):
    """(model, text tokenizer, configuration) of a run of `train`, for answers. llm: where the language model is, if it
    is no longer where it was, and was not trained."""
    path = os.path.join(folder, "model.safetensors")
    config = read_config(path)
    if "llava" not in config:
        raise UserError(f"{path} is a model file, but none of downstream.llava")
    if config["llava"]["trains_llm"]:
        llm = load_llm(os.path.join(folder, "llm"), device)
    else:
        llm = load_llm(llm or config["llava"]["llm"])
    model = build(config, llm)
    load_tensors(model, path)
    return model.to(device).eval().requires_grad_(False), load_tokenizer(os.path.join(folder, "llm")), config


def blocks_of(llm):
    """The blocks of a language model of any kind: its longest list of modules."""
    return max((m for m in llm.modules() if isinstance(m, nn.ModuleList)), key=len)


def shard(model, run, compiled):
    """Put the model on this process's device, in fp32. Of several ranks each holds a part of every block (FSDP2), and
    on GPUs computes in bf16. compiled: block by block."""
    blocks = [*model.encoder.vit.blocks, *blocks_of(model.llm)]
    for block in blocks if compiled else []:
        block.compile(dynamic=True)
    if run.ranks == 1:
        model.to(run.device, torch.float32)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(run.device.type, (run.ranks,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if run.on_gpu else None, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block.float(), mesh=mesh, mp_policy=precision)
    fully_shard(model.float(), mesh=mesh, mp_policy=precision)
