"""downstream/llava.py: prompts, AnyRes, the spliced sequence, training on one process and on two, answers, refusals."""
from tests.helpers import (  # first: it sets the environment that torch reads
    HERE, MICRO_VIT, close, demands, free_port, killed_in_step, log_lines, micro_models, picture, raises, refused,
    run, run_ranks, tokenizer_file)

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
import types
import unittest.mock
from dataclasses import asdict, replace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from downstream import llava, llava_data, llava_model, llava_prompts, llava_speed, llava_use
from downstream.llava_data import Looker
from downstream.llava_model import IGNORE, IMAGE
from downstream.llava_prompts import Prompter, picture_first
from experiments.understanding import study
from data import center_crop
from encoder import MissingFile, UserError, read_config
from eval import sha256
from tools.checkpoint import load_checkpoint
from tools.run import INTERRUPTS

WORDS = ["A", "chat", "USER", "ASSISTANT", ":", "?", ".", "What", "is", "it", "cat", "dog", "red", "blue", "system",
         "user", "assistant", "You", "are", "helpful"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@functools.cache
def tokenizer(llama=True, template=CHATML):
    """A text tokenizer of whole words. llama: spaces are part of the words, as ▁; one is set before a text, but not
    after </s>. Else spaces are tokens of their own, as bytes are. Every other letter is a token, too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    space = "\u2581" if llama else "_"
    letters = [chr(c) for c in range(33, 127)] + ["\n", space]
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {}
    for word in names + WORDS + ([space + word for word in WORDS] if llama else []) + letters:
        vocabulary.setdefault(word, len(vocabulary))
    costs = [(word, -100 if word in names else -20 / len(word)) for word in vocabulary]  # the longest words win
    made = Tokenizer(models.Unigram(costs, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="first" if llama else "never", split=False)
    made.decoder = decoders.Metaspace(space, prepend_scheme="first" if llama else "never")
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if llama:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   chat_template=template)


def llm_folder(folder, name="llm", llama=True, width=32, template=CHATML, seed=0):
    """Path of a random Llama of two blocks with its text tokenizer, as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging
    logging.disable_progress_bar()
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        torch.manual_seed(seed)
        words = tokenizer(llama, template)
        words.save_pretrained(path)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
            initializer_range=0.3)).save_pretrained(path)
    return path


def conversations(folder, n=16):
    """(path of a LLaVA file, folder of its pictures): the first half shows pictures, whose answers are letters of their
    own; then come texts alone. One has two turns."""
    os.makedirs(os.path.join(folder, "pictures"), exist_ok=True)
    samples = []
    for k in range(n):
        question, said = f"What is {chr(65 + k)}?", chr(97 + k)
        turns = [("human", question), ("gpt", said)] + [("human", "is it?"), ("gpt", "it is")] * (k == 1)
        if k < n // 2:
            picture(k, 16 + k, 16).save(os.path.join(folder, "pictures", f"{k}.png"))
            turns[0] = "human", "<image>\nWhat?"
        samples.append({"id": str(k), "conversations": [{"from": who, "value": text} for who, text in turns],
                        **({"image": f"{k}.png"} if k < n // 2 else {})})
    path = os.path.join(folder, "data.json")
    with open(path, "w") as f:
        json.dump(samples, f)
    return path, os.path.join(folder, "pictures")


def quietly(*flags):
    """What downstream.llava prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        llava.main(list(map(str, flags)))
    return out.getvalue()


def training(folder, *flags, stage=2, variant="lv"):
    """Flags of a run on the conversations of a folder, which are made if they are not there."""
    if not os.path.exists(os.path.join(folder, "data.json")):
        conversations(folder)
    weights = os.path.join(folder, "tokenizer.safetensors")
    weights = weights if os.path.exists(weights) else tokenizer_file(folder)
    return ["train", "--variant", variant, "--stage", stage, "--llm", llm_folder(folder), "--weights", weights,
            "--data", os.path.join(folder, "data.json"), "--images", os.path.join(folder, "pictures"), "--workers", 0,
            "--batch_size", 4, "--micro_batch", 2, "--log_every", 1, *flags]


def spelled(prompter, turns):
    """A sample as a line of tokens; targets have = before them."""
    ids, labels = prompter.sample(turns)
    assert len(ids) == len(labels) and all(label in (IGNORE, i) for i, label in zip(ids, labels)), (ids, labels)
    words = ["IMAGE" if i == IMAGE else prompter.tokenizer.convert_ids_to_tokens(i).replace("\n", "\\n") for i in ids]
    return " ".join("=" * (label != IGNORE) + word for word, label in zip(words, labels))


def test_ids_and_labels_of_vicunas_template():
    """Worked out by hand. Llama's tokenizer sets a space before a text, and none after </s>; the other one never."""
    p, turns = Prompter(tokenizer(), "vicuna", "A chat."), [("<image>\nWhat is it?", "cat"), ("What?", "dog.")]
    first = r"<s> ▁A ▁chat . ▁USER : ▁ IMAGE ▁ \n What ▁is ▁it ? ▁ASSISTANT : =▁cat =</s>"
    assert spelled(p, turns) == first + " USER : ▁What ? ▁ASSISTANT : =▁dog =. =</s>"
    assert spelled(p, [("What is <image> it?", "cat")]) == first.replace("▁is", "▁is ▁"), "the picture is moved"
    assert spelled(p, [turns[0], ("What?", "")]) == first + " USER : ▁What ? ▁ASSISTANT : =</s>", "an empty answer"
    assert spelled(p, [("What is it?", "</s>c</</s>s>at<s>"), ("What?", "dog.")]) == (
        first.replace(r"▁ IMAGE ▁ \n What", "▁What")
        + " USER : ▁What ? ▁ASSISTANT : =▁dog =. =</s>"), "text alone; an answer cannot end itself"
    assert spelled(p, [("<image> is <image>?", "a <image>")]) == (
        "<s> ▁A ▁chat . ▁USER : ▁ IMAGE "
        "▁is ▁ IMAGE ▁? ▁ASSISTANT : =▁ =a =▁ =< =i =m =a =g =e => =</s>"), (
            "two pictures stay where they are; one in an answer is a word")
    assert [p.tokenizer.convert_ids_to_tokens(i) for i in p.prompt(turns) if i != IMAGE] == (
        first.replace("=", "").replace("IMAGE ", "").replace(r"\n", "\n").split(" ")
        + "USER : ▁What ? ▁ASSISTANT :".split()), "an answer is asked for by what a target follows in training"
    assert p.stop == [2]
    bytes_ = Prompter(tokenizer(False), "vicuna", "A chat.")
    assert spelled(bytes_, turns) == (
        r"A _ chat . _ USER : _ IMAGE \n What _ is _ it ? _ ASSISTANT : =_ =cat =</s>"
        " USER : _ What ? _ ASSISTANT : =_ =dog =. =</s>"), "its answers get their space from the template"
    assert spelled(bytes_, [("What?", "")]).endswith("ASSISTANT : =</s>")
    for first, answer in ("\u2581b", "x"), ("a", " x"):  # what a text begins with tells, however many tokens it has
        parts = types.SimpleNamespace(convert_ids_to_tokens=lambda ids: [first, "a"], eos_token="E")
        with unittest.mock.patch.object(llava_prompts, "encode", lambda tokenizer, text: [5, 6]):
            assert llava_prompts.vicuna([("q", "x")], parts, "S") == ["S USER: q ASSISTANT:", answer, "E"]
    text = Prompter(tokenizer(), "vicuna").pieces([("q", "a")])[0]
    assert text == ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                    "helpful, detailed, and polite answers to the user's questions. USER: q ASSISTANT:")
    assert Prompter(tokenizer(), "vicuna", "").pieces([("q", "a"), ("r", "b")]) == [
        "USER: q ASSISTANT:", "a", "</s>USER: r ASSISTANT:", "b", "</s>"], "without a system's text"
    for question, moved in (("<image>", "<image>"), ("What <image> ", "<image>\nWhat"), ("What?", "What?"),
                            ("<image> or <image> ", "<image> or <image> "), ("  <image>\n\nWhat?", "<image>\nWhat?")):
        assert picture_first(question) == moved, question
    assert p.encode_text("<image>a<image><image>").count(IMAGE) == 3
    assert p.text([1, *p.encode_text(" What is it?"), 2]) == "What is it?"
    from transformers import PreTrainedTokenizerFast
    from tokenizers import AddedToken, processors
    odd = PreTrainedTokenizerFast(tokenizer_object=tokenizer()._tokenizer, bos_token="<s>", unk_token="<unk>",
                                  chat_template=CHATML)  # names no end
    refused(UserError, Prompter, odd, "vicuna", says=(
        "the language model's tokenizer has no end token, which --template vicuna needs"))
    assert Prompter(odd, "chat").stop == [4] and Prompter(odd, "plain").stop == [odd.convert_tokens_to_ids("\n")]
    odd.add_tokens([AddedToken(name, special=name != "<tool>") for name in ("<tool>", "<x>", "<x>y", "<image>")])
    assert Prompter(odd, "chat").clean("a<tool><x></s>b<image>") == "a<tool>b<image>", "control tokens alone go"
    assert Prompter(odd, "chat").clean("a<x>yb<x>z") == "abz", "the longer of two goes whole"
    with unittest.mock.patch.object(llava_prompts, "special_tokens", lambda tokenizer: ["<image>"]):
        assert Prompter(odd, "plain").control is None and Prompter(odd, "plain").clean("a</s>") == "a</s>"
    odd._tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert odd("").input_ids == [1, 2] and Prompter(odd, "chat").start == [1], "an end is not for the start"
    assert bytes_.text(bytes_.encode_text(" cat ")) == "cat"


def test_ids_and_labels_of_the_plain_and_the_chat_template():
    plain = Prompter(tokenizer(), "plain")
    assert spelled(plain, [("<image>\nWhat is it?", "A cat.")]) == r"<s> IMAGE =▁A =▁cat =. =\n"
    newline = tokenizer().convert_tokens_to_ids("\n")
    assert plain.stop == sorted([2, newline]) and plain.prompt([("<image>\nWhat?", "")]) == [1, IMAGE]
    refused(UserError, plain.sample, [("What?", "cat"), ("What?", "dog")], says=(
        "the plain template takes one question and its answer, not 2"))
    assert plain.pieces([("What is it?", "A cat.")]) == ["", "A cat.\n", ""]
    assert plain.pieces([("<image> or <image>?", "A</s> cat.")]) == ["<image><image>", "A cat.\n", ""]
    chat = Prompter(tokenizer(False), "chat", "You are.")
    system = r"<|im_start|> system \n You _ are . <|im_end|> \n "
    first = system + (r"<|im_start|> user \n IMAGE \n What _ is ? <|im_end|> \n <|im_start|> assistant \n "
                      r"=cat =<|im_end|> \n")
    assert spelled(chat, [("<image>\nWhat is?", "cat")]) == first
    assert spelled(chat, [("<image>\nWhat is?", "cat"), ("it?", "<|im_end|>")]) == first + (
        r" <|im_start|> user \n it ? <|im_end|> \n <|im_start|> assistant \n =<|im_end|> \n"), "two turns"
    ids = chat.prompt([("<image>\nWhat is?", "cat"), ("it?", "")])
    assert [chat.tokenizer.convert_ids_to_tokens(i) for i in ids if i != IMAGE][-6:] == [
        "?", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert chat.stop == [2, 4], "</s> and <|im_end|>"
    assert spelled(chat, [("<image>\nWhat is?", "cat")] + 6 * [("it?", "<|im_end|>")]) == first + 6 * (
        r" <|im_start|> user \n it ? <|im_end|> \n <|im_start|> assistant \n =<|im_end|> \n"), "more than ten texts"
    assert spelled(Prompter(tokenizer(False), "chat", ""), [("it", "cat")]).startswith(r"<|im_start|> user \n it")
    assert "You _ are _ a _ helpful" in spelled(Prompter(tokenizer(False), "chat"), [("it", "cat")])
    # a template that writes <s> itself, with a space before the end of an answer
    spaced = tokenizer(True, "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} </s>{% endfor %}")
    assert spelled(Prompter(spaced, "chat", ""), [("it", "cat")]) == (
        "<s> user : ▁it ▁ </s> assistant : ▁ =▁cat =</s>")
    spaced = Prompter(tokenizer(True, "{% for m in messages %} {{ m['content'] }} </s>{% endfor %}"), "chat", "")
    assert spaced.pieces([("q", "a"), ("r", "b")]) == ["q </s> ", "a", "</s> r </s> ", "b", "</s>"]
    fails, once = "the chat template refuses the conversation (", "the chat template does not show every message once"
    show, mine = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "S"
    for template, system, words in (
            (None, mine, "the language model has no chat template: take --template vicuna, or an instruct model"),
            ("{{ raise_exception('no') }}", mine, fails + 'no): try --system ""'),
            ("{{ raise_exception('no') }}", "", fails + "no): take --template vicuna"),
            ("{{ messages[-1]['content'] }}</s>", mine, once + ": take --template vicuna"),
            (show + "{{ messages[0]['content'] }}", "", once + ": take --template vicuna"),
            (show + "{{ messages[-1]['content'] }}", "", once + ": take --template vicuna"),
            ("{% for m in messages %}{{ m['content'] }}. And this is the end{% endfor %}", mine,
             "the chat template ends an answer by '. And this is the en', which is no special token: take "
             "--template vicuna")):
        refused(UserError, Prompter, tokenizer(True, template), "chat", system, says=words)
    lost = Prompter(tokenizer(True, "{% for m in messages %}{{ (messages[2] if loop.index0 == 3 else m)['content'] }}"
                                    "</s>{% endfor %}"), "chat", "")
    refused(UserError, lost.sample, [("q", "a"), ("r", "b")], says=once + ": take --template vicuna")


def test_files_that_are_no_conversations():
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}
    text = {"from": "human", "value": "What?"}
    good = [dict(id="a", image="a.png", conversations=[human, gpt]), dict(conversations=[text, gpt])]
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "a.json")

        def read(content):
            with open(path, "w") as f:
                f.write(content if isinstance(content, str) else json.dumps(content))
            return list(llava_data.read_conversations(path))
        assert read(good) == [(["a.png"], [("<image>\nWhat?", "cat")]), ([], [("What?", "cat")])]
        # ShareGPT's odd ones: they begin in the middle, or end by a question
        assert read([dict(conversations=[gpt, text, gpt, text])]) == [([], [("What?", "cat")])]
        assert read([dict(image="", conversations=[text, gpt])]) == [([], [("What?", "cat")])], "no picture"
        two = {"from": "human", "value": "<image> or <image>?"}
        assert read([dict(image=["a.png", "b.png"], conversations=[two, gpt])])[0][0] == ["a.png", "b.png"]
        for content, words in (
                ("{", "a.json is no JSON (Expecting property name"), ({"a": 1}, "no list of samples"),
                ([], "no list of samples"),
                ([*good, "text"], "sample 3 is not LLaVA's"), ([dict(image="a.png")], "sample 1 is not LLaVA's"),
                ([dict(conversations=[{"role": "user", "content": "What?"}])], "sample 1 is not LLaVA's"),
                ([dict(image=7, conversations=[human, gpt])], "sample 1 is not LLaVA's"),
                ([dict(image=["a.png", 7], conversations=[two, gpt])], "image is no path, nor a list of paths"),
                ([dict(conversations=[{"from": "human", "value": None}, gpt])], "sample 1 is not LLaVA's"),
                ([dict(id="x", conversations=[human, gpt])], "(id x) has 0 pictures and 1 <image>"),
                ([dict(image="a.png", conversations=[text, gpt])], "has 1 pictures and 0 <image>"),
                ([dict(image="a.png", conversations=[two, gpt])], "has 1 pictures and 2 <image>"),
                ([dict(conversations=[text, text, gpt, gpt])], "do not take turns"),
                ([dict(conversations=[{**human, "from": "system"}, text, gpt])], "do not take turns"),
                ([dict(conversations=[])], "do not take turns")):
            raises(UserError, read, content, words=words)
        assert read([dict(conversations=[text, {**gpt, "value": "an <image>"}])]) == [([], [("What?", "an <image>")])]
        refused(UserError, read, [*good, dict(id="x", conversations=[human, gpt])], says=(
            f"--data {path}, sample 3 (id x) has 0 pictures and 1 <image> in its questions: one for each"))
        refused(UserError, read, [*good, dict(id="y", conversations=[text])], says=(
            f"--data {path}, sample 3 (id y): human and gpt do not take turns"))
        refused(UserError, read, [*good, {}], says=(
            f"--data {path}, sample 3 is not LLaVA's: "
            '{"image": .., "conversations": [{"from": .., "value": ..}, ..]} (KeyError: \'conversations\')'))
        none = os.path.join(tmp, "none.json")
        refused(MissingFile, list, llava_data.read_conversations(none), says=(
            f"--data {none} cannot be read (No such file or directory)"))


def test_anyres_grids_tiles_and_token_counts():
    grids = {(448, 448): (1, 1), (100, 50): (1, 1), (1000, 500): (2, 3), (500, 1000): (3, 2), (3000, 200): (1, 6),
             (1344, 1344): (3, 3), (4000, 4000): (6, 6), (897, 448): (1, 3), (896, 448): (1, 2)}
    for size, grid in grids.items():  # by hand: the most pixels that fit, then the fewest that are wasted
        assert llava_data.choose_grid(*size, 448) == grid, size
    # base + rows of the unpadded grid, each with a newline; 32 x 32 tokens a tile
    def count(W, H, cap=9):
        grid = llava_data.choose_grid(W, H, 448)
        return llava_model.count_tokens(1 + grid[0] * grid[1], grid, (W, H), 32, cap)
    assert count(448, 448) == 1024 + 32 * 33
    assert count(1344, 1344) == 1024 + 96 * 97, "nine tiles: the most that are not shrunk"
    assert count(1000, 500) == 1024 + 48 * 97, "16 of 64 rows are padding"
    assert count(1000, 490) == 1024 + 48 * 97, "47.04 rows: half of 17 is 8, so 48 stay"
    assert count(1000, 510) == 1024 + 48 * 97, "48.96 rows count as 48: half of 16 is 8"
    assert count(500, 1000) == 1024 + 96 * 49
    assert count(510, 1000) == 1024 + 96 * 49, "columns, too: 48.96 count as 48"
    assert count(1400, 1344) == 1024 + 96 * 101, "of 3 x 4 tiles; 1.02 times too long is not shrunk"
    assert count(4000, 4000) == 1024 + 96 * 97, "192 x 192 shrunk by 2"
    # 6 x 6 tiles of 27 x 27: LLaVA-OneVision's 729 * (9 + 1) and 81 newlines
    assert llava_model.count_tokens(37, (6, 6), (2304, 2304), 27, 9) == 729 * 10 + 81
    assert count(3000, 1700, cap=4) == 1024 + 48 * 86, (
        "of 4 x 6 tiles 108 of 128 rows stay, 108 x 192; shrunk by sqrt(108 * 192 / 4096) = 2.25: 48 x 85")
    assert llava_model.count_tokens(1, None, (9, 9), 32, 9) == 1025 and llava_model.count_tokens(
        1, None, (9, 9), 32, 0) == 1024
    # which pixels: a quarter of each colour; 40 x 20 in 2 x 3 tiles of 16 is 48 x 24, with 4 black rows above and below
    img = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)).resize(
        (40, 20), Image.Resampling.NEAREST)
    look = Looker(dict(aspect="anyres", size=16, cap=9, pool=1), MICRO_VIT)
    tiles, layouts = look([img])
    assert layouts == [(7, (2, 3), (40, 20), 16 + 6 * 13)] and tiles.shape == (7, 3, 16, 16)
    corner = lambda tile, y, x: tiles[tile, :, y, x].tolist()
    assert corner(0, 1, 1) == [255, 0, 0] and corner(0, 14, 14) == [255, 255, 0], "the base is squashed, not padded"
    assert corner(1, 3, 1) == [0, 0, 0] and corner(1, 5, 1) == [255, 0, 0] and corner(3, 5, 14) == [0, 255, 0]
    assert corner(4, 10, 1) == [0, 0, 255] and corner(4, 12, 1) == [0, 0, 0] and corner(6, 10, 14) == [255, 255, 0]
    # 41 x 20 in 48 x 32: 23.4 rows become 24, 4 below the edge; 45 x 20: 21.3 become 22; upright the same
    for width, rows, above in (41, 24, 4), (45, 22, 5), (31, 31, 0):
        img = picture(width, width, 20)
        for turned in False, True:
            img = img.transpose(Image.Transpose.TRANSPOSE) if turned else img
            small = np.array(img.resize((rows, 48) if turned else (48, rows), Image.Resampling.BICUBIC))
            whole = np.zeros((48, 32, 3) if turned else (32, 48, 3), np.uint8)
            whole[(slice(None), slice(above, above + rows)) if turned else slice(above, above + rows)] = small
            for n, tile in enumerate(llava_data.cut_tiles(img, (3, 2) if turned else (2, 3), 16)):
                y, x = divmod(n, 2 if turned else 3)
                assert (np.array(tile) == whole[16 * y:16 * y + 16, 16 * x:16 * x + 16]).all(), (width, turned, n)
    for turned in False, True:  # 26 x 20 in 48 x 32 is as high as the grid: 41.6 columns become 42, 3 from the edge
        img = picture(26, 26, 20)
        img = img.transpose(Image.Transpose.TRANSPOSE) if turned else img
        small = np.array(img.resize((32, 42) if turned else (42, 32), Image.Resampling.BICUBIC))
        tiles = [np.array(x) for x in llava_data.cut_tiles(img, (3, 2) if turned else (2, 3), 16)]
        whole = np.concatenate([np.concatenate(tiles[k:k + 3 - turned], 1) for k in range(0, 6, 3 - turned)])
        whole = whole.transpose(1, 0, 2) if turned else whole
        assert (whole[:, 3:45] == (small.transpose(1, 0, 2) if turned else small)).all()
        assert not whole[:, :3].any() and not whole[:, 45:].any()
    img = picture(25, 25, 25)  # 25 * (14 / 25) is a little more than 14 in floating point
    tile, = llava_data.cut_tiles(img, (1, 1), 14)
    assert (np.array(tile) == np.array(img.resize((14, 14), Image.Resampling.BICUBIC))).all()
    looks = Looker(dict(aspect="anyres", size=16, cap=2, pool=1), MICRO_VIT)([picture(0, 40, 20)])[1]
    assert looks == [(7, (2, 3), (40, 20), 16 + 4 * 9)], "6 rows of 12 are 1.5 times too long for 2 tiles: 4 of 8"


def test_merge_lays_the_tiles_side_by_side():
    """Each token says its tile, row and column, so that the order can be read from the result."""
    rows, columns, h, w = 2, 3, 4, 4
    tiles = torch.tensor([[[[100 * t + 10 * y + x] for x in range(w)] for y in range(h)] for t in range(7)]).float()
    newline = torch.tensor([-1.0])
    got = llava_model.merge(tiles, (rows, columns), (40, 20), newline, 9)[:, 0].tolist()
    expected = [10 * y + x for y in range(h) for x in range(w)]  # the base, then rows 1 to 6 of 8
    for y in range(1, 7):
        expected += [100 * (1 + y // h * columns + x // w) + 10 * (y % h) + x % w for x in range(columns * w)] + [-1]
    assert got == expected
    upright = llava_model.merge(tiles, (3, 2), (20, 40), newline, 9)[16:, 0].view(12, 7)
    assert upright[:, -1].eq(-1).all() and upright[0, :-1].tolist() == [101, 102, 103, 200, 201, 202]
    # shrunk: 8 x 12 tokens, but at most 1 tile's 16: sqrt(6) smaller, 3 x 4, by bilinear interpolation
    small = llava_model.merge(tiles, (rows, columns), (24, 16), newline, 1)[16:, 0].view(3, 5)
    whole = tiles[1:].view(2, 3, 4, 4).permute(0, 2, 1, 3).reshape(8, 12).numpy()
    at = lambda n, size: np.clip((np.arange(n) + 0.5) * size / n - 0.5, 0, size - 1)
    lerp = lambda a, x: a[np.floor(x).astype(int)] * (1 - x % 1)[:, None] + a[np.ceil(x).astype(int)] * (x % 1)[:, None]
    expected = lerp(lerp(whole, at(3, 8)).T, at(4, 12)).T
    assert small[:, 4].eq(-1).all() and np.allclose(small[:, :4], expected, atol=1e-3)
    assert llava_model.merge(tiles[:1], None, (9, 9), newline, 9)[:, 0].tolist() == [*tiles[0].flatten().tolist(), -1]
    assert llava_model.merge(tiles[:1], None, (9, 9), None, 0)[:, 0].tolist() == tiles[0].flatten().tolist()
    plain = llava_model.merge  # one change of merge changes features and counts alike
    with unittest.mock.patch.object(llava_model, "merge", lambda *a: plain(*a)[:-3]):
        llava_model.count_tokens.cache_clear()
        assert llava_model.count_tokens(7, (2, 3), (40, 20), 4, 9) == 16 + 6 * 13 - 3
    llava_model.count_tokens.cache_clear()
    # tiles that are no squares: 2 x 3 of them, each 2 x 4 tokens, fill the picture, and then half of the width
    tiles = torch.arange(56.0).view(7, 2, 4, 1)
    rows = [[8 * (1 + 3 * (y // 2) + x // 4) + 4 * (y % 2) + x % 4 for x in range(12)] for y in range(4)]
    for size, columns in ((12, 4), range(12)), ((6, 4), range(3, 9)):
        got = llava_model.merge(tiles, (2, 3), size, newline, 9)[:, 0].tolist()
        assert got == [*range(8), *(n for row in rows for n in [*(row[x] for x in columns), -1])], got
    assert len(llava_model.merge(tiles, (2, 3), (12, 4), newline, 1)) == 8 + 1 * 5, "48 tokens, sqrt(6) times too long"
    # 11 x 11 are exactly 1.1 times too long for 100 tiles of one token, which is not shrunk yet
    assert llava_model.count_tokens(122, (11, 11), (11, 11), 1, 100) == 1 + 11 * 12
    assert llava_model.count_tokens(122, (11, 11), (11, 11), 1, 99) == 1 + 9 * 10


def test_one_picture_is_cropped_padded_or_squashed():
    img = Image.fromarray(np.zeros((8, 16, 3), np.uint8))
    look = lambda aspect, images, cap=0: Looker(dict(aspect=aspect, size=16, cap=cap, pool=2), MICRO_VIT)(images)
    for aspect, values in (("crop", {0}), ("squash", {0}), ("pad", {0, *(int(255 * x) for x in (.485, .456, .406))})):
        tiles, layouts = look(aspect, [img])
        assert layouts == [(1, None, (16, 8), 4)] and tiles.shape == (1, 3, 16, 16)
        assert values <= set(tiles.flatten().tolist()) and (aspect == "pad" or values == set(tiles.flatten().tolist()))
    assert tiles[0, :, 0, 8].tolist() == [123, 116, 103] and tiles[0, :, 8, 8].tolist() == [0, 0, 0], "in the middle"
    tiles, layouts = look("anyres", [img, img], 9)
    assert layouts == [(1, None, (16, 8), 5)] * 2 and tiles[:, 0, 0, 8].tolist() == [123, 123], "several are padded"
    tiles, layouts = look("pad", [])
    assert tiles.shape == (0, 3, 16, 16) and tiles.dtype == torch.uint8 and layouts == []
    for size in (31, 20), (20, 31), (9, 7):
        img = picture(1, *size)
        square = Image.new("RGB", (max(size),) * 2, (123, 116, 103))
        square.paste(img, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
        for aspect, seen in (("pad", square), ("squash", img), ("crop", None)):
            seen = center_crop(img, 16) if seen is None else seen.resize((16, 16), Image.Resampling.BICUBIC)
            assert np.array_equal(look(aspect, [img])[0][0].permute(1, 2, 0), np.array(seen)), (size, aspect)
    for kind, colour in (("half", [127, 127, 127]), ("openai", [122, 116, 104])):
        eye = Looker(dict(aspect="pad", size=16, cap=0, pool=1), replace(MICRO_VIT, pixel_stats=kind))
        assert eye([Image.new("RGB", (16, 8))])[0][0, :, 0, 8].tolist() == colour


def micro_llava(cap=0, pool=1, seed=0):
    """A model with random parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    _, enc, _ = micro_models(seed)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                       num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3))
    return llava_model.LLaVA(enc.eval(), llm.eval(), -2, pool, cap)


def test_visual_tokens_take_their_places_and_the_loss_is_of_the_targets():
    """Position by position: the embeddings, and the loss as a loop over the targets, each sample alone."""
    for cap, pool in ((0, 1), (9, 2)):
        model, n = micro_llava(cap, pool), 16 // pool ** 2 + (cap > 0)
        tiles = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
        layouts = [(1, None, (16, 16), n)] * 3
        expand = lambda ids, labels, layouts, limit=99: llava_data.expand(ids, labels, layouts, limit)
        i = IGNORE
        samples = [expand([1, IMAGE, 5, 6, 7], [i, i, i, 6, 7], layouts[:1]),
                   expand([1, 3, IMAGE, 4, IMAGE, 8], [i, i, i, 4, i, 8], layouts[1:]),
                   expand([9, 0, 11], [i, 0, 11], [])]
        assert samples[0][1].tolist() == [i] * (n + 2) + [6, 7] and not samples[0][3]
        batch = llava_data.collate([dict(ids=ids, labels=labels, layouts=kept, was_cut=cut, unreadable=[],
                                         tiles=tiles[:1] if k == 0 else tiles[1:] if k == 1 else tiles[:0])
                                    for k, (ids, labels, kept, cut) in enumerate(samples)])
        assert (batch["tokens"], batch["cut"]) == (4 + n + 4 + 2 * n + 3, 0)
        f = model.encoder.features(tiles / 255, -2).view(3, 4, 4, 32)
        if pool == 2:  # a token and the three beside and below it
            f = torch.cat([f[:, ::2, ::2], f[:, ::2, 1::2], f[:, 1::2, ::2], f[:, 1::2, 1::2]], dim=3)
        visual = model.projector(f.flatten(1, 2))
        if cap:
            visual = torch.cat([visual, model.newline.expand(3, 1, -1)], dim=1)
        word = model.llm.get_input_embeddings().weight
        rows = [[word[1], *visual[0], *word[5:8]], [word[1], word[3], *visual[1], word[4], *visual[2], word[8]],
                [word[9], word[0], word[11]]]
        with torch.no_grad():
            x, total = model.embed(batch["ids"], batch["tiles"], batch["layouts"]), 0
            for k, (row, (ids, labels, _, _)) in enumerate(zip(rows, samples)):
                close(x[k, :len(row)], torch.stack(row), 1e-5)
                logits = model.llm(inputs_embeds=torch.stack(row)[None]).logits[0].log_softmax(1)
                total -= sum(logits[at - 1, label] for at, label in enumerate(labels.tolist()) if label != IGNORE)
            close(model(**{k: batch[k] for k in ("ids", "places", "targets", "tiles", "layouts")}), total, 1e-5)
        assert expand([1, 2], [i, 2], [], 2)[3] is False and expand([1, 2, 3], [i, 2, 3], [], 2)[3] is True
        raises(ValueError, model.embed, batch["ids"], tiles, [(1, None, (16, 16), n + 1)] * 3, words="ids expect")
        # a sample that is cut within its second picture
        ids, labels, kept, cut = expand([1, IMAGE, 4, IMAGE, 8], [i, i, 4, i, 8], layouts[1:], n + 5)
        assert cut and [x[3] for x in kept] == [n, 3] and ids.tolist() == [1] + [IMAGE] * n + [4] + [IMAGE] * 3
        with torch.no_grad():
            close(model.embed(ids[None], tiles[1:], kept)[0, -3:], visual[2, :3], 1e-5)
        # text alone: all parts run, so that several ranks agree; their gradients are 0
        model.train()
        alone = llava_data.collate([dict(ids=ids, labels=labels, layouts=[], was_cut=False, unreadable=[],
                                         tiles=tiles[:0]) for ids, labels, *_ in samples[2:]])
        model(**{k: alone[k] for k in ("ids", "places", "targets", "tiles", "layouts")}).backward()
        assert alone["tiles"].shape == (1, 3, 16, 16) and not model.projector[0].weight.grad.any()
        assert not cap or model.newline.grad is not None and not model.newline.grad.any()
        assert model.projector[0].weight.grad is not None and all(
            p.grad is not None for p in model.encoder.vit.blocks[0].parameters())
        assert torch.equal(model.projector[1](tiles[0] / 99), torch.nn.functional.gelu(tiles[0] / 99))
        model.llm.bfloat16()  # its logits are summed up in fp32
        loss = model(**{k: batch[k] for k in ("ids", "places", "targets", "tiles", "layouts")})
        assert loss.dtype == torch.float32 and abs(loss.item() / total.item() - 1) < 0.05


def test_batches_are_of_one_kind_and_dealt_out_by_length():
    rng = np.random.default_rng(0)
    lengths, pictured = rng.integers(1, 50, 203), rng.random(203) < 0.7
    order = llava_data.grouped_order(lengths, pictured, 8, 2, np.random.default_rng([3, 0]))
    batches = order.reshape(-1, 8)
    assert len(batches) == 203 // 8 and len(set(order.tolist())) == len(order), "no sample twice"
    mixed = [b for b in batches if len(set(pictured[b].tolist())) == 2]
    assert len(mixed) <= 1 and len(batches) - len(mixed) == pictured.sum() // 8 + (~pictured).sum() // 8
    for b in batches:  # the ranks' shares are the even and the odd places of the sorted batch
        assert lengths[np.stack([b[:4], b[4:]], 1).flatten()].tolist() == sorted(lengths[b].tolist(), reverse=True)
    kinds = [bool(pictured[b[0]]) for b in batches]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True), "in a random order"
    alone = llava_data.grouped_order(lengths, pictured, 8, 1, np.random.default_rng([3, 0])).reshape(-1, 8)
    assert [set(b) for b in alone.tolist()] == [set(b) for b in batches.tolist()], "ranks do not change the batches"
    assert all((np.diff(lengths[b]) <= 0).all() for b in alone)
    # 7 with pictures and 6 without make two batches of 4; of the other 3 and 2 a random four make the third
    kinds, at, whole = set(), set(), set()
    for seed in range(30):
        few = llava_data.grouped_order(np.ones(13), np.arange(13) < 7, 4, 1, np.random.default_rng(seed)).reshape(3, 4)
        shown = (few < 7).sum(1).tolist()
        mixed, = [k for k, n in enumerate(shown) if 0 < n < 4]
        kinds.add(shown[mixed]), at.add(mixed), whole.add(frozenset(few[shown.index(4)].tolist()))
    assert kinds == {2, 3} and at == {0, 1, 2} and len(whole) > 10
    # of one kind: the draws themselves, on which a resume counts; equally long ones stay in the drawn order
    rng = np.random.default_rng(5)
    got = llava_data.grouped_order(np.arange(128) % 3, np.ones(128) > 0, 64, 1, np.random.default_rng(5))
    drawn = rng.permutation(128).reshape(2, 64)
    longest_first = [sorted(b.tolist(), key=lambda i: -(i % 3)) for b in drawn[rng.permutation(2)]]
    assert got.reshape(2, 64).tolist() == longest_first
    with tempfile.TemporaryDirectory() as tmp:
        path, folder = conversations(tmp)
        make = lambda seed=0: llava_data.Conversations([path, path], folder, Prompter(tokenizer(), "vicuna"),
                                                       Looker(dict(aspect="pad", size=16, cap=0, pool=1), MICRO_VIT),
                                                       6, seed, 99)
        data = make()
        first, second = [data.index(n) for n in range(30)], [data.index(n) for n in range(30, 60)]
        assert len(data) == 32 and sorted(first) != sorted(range(30)) and first != second and len(set(second)) == 30
        assert [make().index(n) for n in (37, 3, 12)] == [second[7], first[3], first[12]], "a function of (seed, n)"
        assert [make(1).index(n) for n in range(30)] != first
        assert data.lengths.tolist() == 2 * [3, 3 + 4, *[3] * 6, *[4] * 8]
        assert data.pictured.tolist() == 2 * [*[True] * 8, *[False] * 8]
        assert data.read(17) == data.read(1) == [["1.png"], [["<image>\nWhat?", "b"], ["is it?", "it is"]]]
        words = Prompter(tokenizer(), "vicuna")
        raises(UserError, llava_data.Conversations, [path], folder, words, None, 17, 0, 99, words="no batch of 17")
        refused(UserError, llava_data.Conversations, [path], folder, Prompter(tokenizer(), "plain"), None, 4, 0, 99,
                says="sample 2 of --data has 2 questions, and the plain template takes one with its answer: give "
                "captions, or another --template")
        assert sorted(map(llava_data.Conversations([path], folder, words, None, 16, 0, 99).index, range(16))) == list(
            range(16)), "one batch is enough"


def test_a_picture_that_cannot_be_read_is_named_and_another_takes_its_place():
    with tempfile.TemporaryDirectory() as tmp:
        path, folder = conversations(tmp)
        os.remove(os.path.join(folder, "2.png"))
        with open(os.path.join(folder, "3.png"), "w") as f:
            f.write("no picture")
        data = llava_data.Conversations([path], folder, Prompter(tokenizer(), "vicuna", "A"),
                                        Looker(dict(aspect="pad", size=16, cap=0, pool=1), MICRO_VIT), 4, 0, 99)
        with unittest.mock.patch.object(data, "index", lambda n: n):
            sample = data[2]
            assert [os.path.basename(x.split()[0]) for x in sample["unreadable"]] == ["2.png", "3.png"], sample
            assert torch.equal(sample["ids"], data[4]["ids"]) and torch.equal(sample["tiles"], data[4]["tiles"])
            assert data[9]["unreadable"] == [] and len(data[9]["tiles"]) == 0
            os.remove(os.path.join(folder, "7.png"))
            assert torch.equal(data[7]["tiles"], data[0]["tiles"]), "texts alone do not replace a picture"
            picture(7, 23, 16).save(os.path.join(folder, "7.png"))
        said = quietly(*training(tmp, "--steps", 4, "--out", os.path.join(tmp, "out")))
        listed = sorted(os.path.basename(x.split()[0]) for x in open(os.path.join(tmp, "out", "bad_images.txt")))
        assert listed == ["2.png", "3.png"], listed
        bad = [x.split(" ", 1) for x in said.splitlines() if "could not" in x]
        assert sum(int(n) for n, _ in bad) == 2 and {x for _, x in bad} == {
            "pictures could not be read, others took their places: see "
            + os.path.join(tmp, "out", "bad_images*.txt")}, bad
        picture(3, 23, 16).save(os.path.join(folder, "3.png"))
        said = quietly(*training(tmp, "--steps", 4, "--out", os.path.join(tmp, "one")))
        assert "\n1 pictures could not be read" in said, "one is told of, too"
        shutil.rmtree(folder)
        os.makedirs(folder)
        raises(UserError, quietly, *training(tmp, "--steps", 4, "--out", os.path.join(tmp, "b")), words="no picture of")
        with unittest.mock.patch.object(data, "index", lambda n: n):
            gone = lambda n: f"{os.path.join(folder, f'{n}.png')} cannot be opened (No such file or directory)"
            refused(UserError, data.__getitem__, 5, says=f"no picture of --data can be read: {gone(5)}")
        data.pictured, data.ends = np.array([True] * 101), np.arange(101)  # a hundred in a row
        for missing in 99, 100:
            data.read, data.index = lambda j: ([f"{j}.png"], [("<image>", "a")]), lambda n: n
            picture(0, 16, 16).save(os.path.join(folder, f"{missing}.png"))
            if missing == 99:
                assert len(data[0]["unreadable"]) == 99
                os.remove(os.path.join(folder, "99.png"))
            else:
                refused(UserError, data.__getitem__, 0, says=(
                    f"100 pictures in a row cannot be read: is --images {folder} right? {gone(0)}"))


def test_stages_have_the_published_settings():
    assert llava_speed.SAMPLES == {("lv", 1): 558_000, ("lv", 2): 665_000, ("xl", 1): 558_000, ("xl", 2): 4_000_000,
                                   ("xl", 3): 2_100_000} and llava_speed.A800 == 250e12
    parse = lambda variant, stage, *flags: llava.parse_args(
        ["train", "--variant", variant, "--stage", str(stage), "--llm", "x", "--weights", "y", "--data", "z", *flags])
    found = {(v, n): parse(v, n) for v, n in llava.STAGES}
    get = lambda name: [getattr(found[key], name) for key in sorted(found)]
    assert sorted(found) == [("lv", 1), ("lv", 2), ("xl", 1), ("xl", 2), ("xl", 3)]
    assert get("lr") == [1e-3, 2e-5, 1e-3, 1e-5, 1e-5] and set(get("encoder_lr")) == {2e-6}
    assert get("batch_size") == [256, 128, 512, 512, 512]
    assert get("template") == ["plain", "vicuna", "plain", "chat", "chat"]
    assert get("aspect") == ["crop", "pad", "squash", "anyres", "anyres"]
    assert get("max_length") == [2048, 2048, 8192, 32768, 32768]
    assert get("trains") == [("projector",), ("projector", "llm"), ("projector",), llava_model.PARTS, llava_model.PARTS]
    assert set(get("epochs")) == {1} and set(get("weight_decay")) == {0} and set(get("clip")) == {1}
    assert llava.BETAS == {"llava": (0.9, 0.999), "paper": (0.5, 0.95)} and set(get("recipe")) == {"llava"}
    mine = parse("xl", 2, "--batch_size", "8", "--template", "vicuna", "--lr", "3e-4", "--max_length", "100")
    assert (mine.batch_size, mine.template, mine.lr, mine.max_length) == (8, "vicuna", 3e-4, 100)


def test_each_part_learns_at_its_rate_or_not_at_all():
    """AdamW's first step moves every weight by the rate, up to its epsilon; frozen ones stay, bit for bit."""
    with tempfile.TemporaryDirectory() as tmp:
        before = None
        for name, stage, variant, rates in (("a", 1, "lv", (0, 0.01, 0)), ("b", 2, "lv", (0, 0.01, 0.01)),
                                            ("c", 2, "xl", (0.003, 0.01, 0.01))):
            flags = ["--out", os.path.join(tmp, name), "--steps", 1, "--warmup", 0, "--clip", 0, "--template",
                     "plain" if stage == 1 else "vicuna", "--system", "A"]
            with unittest.mock.patch.object(llava, "rate_factor", lambda step, args: 1.0):
                holds, build = [], llava_model.build
                with unittest.mock.patch.object(llava_model, "build", lambda *a: holds.append(build(*a)) or holds[0]):
                    if stage == 1:
                        only_pictures(tmp)
                    quietly(*training(tmp, "--lr", 0.01, "--encoder_lr", 0.003, *flags, stage=stage, variant=variant))
                moved = dict(holds[0].named_parameters())
                with contextlib.redirect_stdout(io.StringIO()):
                    args = llava.parse_args([str(x) for x in training(tmp, *flags, stage=stage, variant=variant)])
                    before = dict(llava_model.build_stage(args, "cpu")[0].named_parameters())
            for part, rate in zip(llava_model.PARTS, rates):
                part = {"encoder": "encoder.vit.blocks.0"}.get(part, part)
                change = max((moved[k] - before[k]).abs().max().item() for k in moved if k.startswith(part))
                assert abs(change - rate) < 1e-5, (name, part, change)
            parts = [f"{part}." for part, rate in zip(llava_model.PARTS, rates) if rate]
            learns = [k for k in moved if k.startswith(("newline", *parts))
                      and not k.startswith(("encoder.latent_down", "encoder.vit.norm"))]
            state = torch.load(os.path.join(tmp, name, "state.pt"))["tensors"]
            assert state.keys() == {f"{key}{k}" for k in learns for key in ("", "step ", "exp_avg ", "exp_avg_sq ")}
            assert (holds[0].encoder.training, holds[0].llm.training) == (variant == "xl", True)
            if variant == "xl":
                assert abs((moved["newline"] - before["newline"]).abs().max().item() - 0.01) < 1e-5
            assert torch.equal(moved["encoder.vit.norm.weight"], before["encoder.vit.norm.weight"])
            saved = load_file(os.path.join(tmp, name, "model.safetensors"))
            assert {k.split(".")[0] for k in saved} == {"encoder", "projector", *["llm"] * (stage > 1),
                                                        *["newline"] * (variant == "xl")}
            assert all(torch.equal(x, moved[k]) for k, x in saved.items()) and "encoder.latent_down.weight" not in saved


def only_pictures(folder):
    """Leave the conversations about pictures alone, and of these the first turn: for the plain template."""
    path, _ = conversations(folder)
    samples = [{**x, "conversations": x["conversations"][:2]} for x in json.load(open(path)) if "image" in x]
    json.dump(samples, open(path, "w"))
    return path


def test_rates_warm_up_and_fall_as_a_cosine():
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "out")
        said = quietly(*training(tmp, "--epochs", 3, "--warmup", 3, "--lr", 1.0, "--max_length", 60, "--out", out))
        assert log_lines(out)[-1]["cut"] == 48 and "48 cut at 60" in said, "all of them: the template begins with more"
        assert all(x["loss"] == 0 and x["tokens"] == 4 * 60 for x in log_lines(out)), "nothing is left to learn"
        expected = [1 / 3, 2 / 3, 1] + [(1 + np.cos(np.pi * k / 9)) / 2 for k in range(9)]
        assert np.allclose([x["lr"] for x in log_lines(out)], expected, atol=1e-6), "12 steps: 3 epochs of 16 by 4"
        args = llava.parse_args([str(x) for x in training(tmp, "--steps", 200)])
        with contextlib.redirect_stdout(io.StringIO()):
            s = llava.setup(args, llava.Run(out))
        assert args.warmup == 6 and abs(args.lr_decay - 0.97) < 1e-9, "3% of all"
        for given, steps, warmup, decay in ((["--epochs", 3, "--batch_size", 3], 15, 0, 1.0),
                                            (["--steps", 200, "--warmup", 0], 200, 0, 1.0)):
            args = llava.parse_args([str(x) for x in training(tmp, *given)])
            with contextlib.redirect_stdout(io.StringIO()):
                llava.setup(args, llava.Run(out))
            assert (args.steps, args.warmup, args.lr_decay) == (steps, warmup, decay), "5 whole batches of 16 an epoch"
        assert [group["betas"] for group in s.optimizer.param_groups] == [(0.9, 0.999)]
        flags = without(training(tmp, "--teacher", "tiny", "--teacher_weights", "random", "--size", 16, variant="xl"),
                        "--weights")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            s = llava.setup(llava.parse_args(list(map(str, flags))), llava.Run(out))
        learns, everything = (sum(p.numel() for p in s.model.parameters() if p.requires_grad >= least) / 1e6
                              for least in (True, False))
        assert 5 < learns < everything and (f"seeing by tiny random, a new projector; trains encoder, projector, llm: "
                                            f"{learns:.1f}M of {everything:.1f}M parameters") in said.getvalue()
        # two ranks share a batch; bf16 is autocast's on one GPU alone
        for ranks, on_gpu in (2, True), (1, True), (1, False):
            rank = llava.Run(out)
            rank.ranks, rank.on_gpu, rank.connect = ranks, on_gpu, lambda: None
            with contextlib.redirect_stdout(io.StringIO()) as said, unittest.mock.patch.object(
                    llava, "shard", lambda *a: None):
                s = llava.setup(llava.parse_args([str(x) for x in training(tmp, "--steps", 200)]), rank)
            assert (s.data.ranks, s.micro_batch, s.accumulation) == (ranks, 2, 2 // ranks)
            with s.autocast:
                assert torch.is_autocast_enabled("cpu") == (on_gpu and ranks == 1)
            words = {1: "accumulation 2 x 1 rank on cpu", 2: "accumulation 1 x 2 ranks on cpu"}[ranks]
            assert "run: 200 steps of 4 = micro-batch 2 x " + words in said.getvalue(), said.getvalue()


def test_neither_micro_batches_nor_recomputation_change_the_loss():
    with tempfile.TemporaryDirectory() as tmp:
        runs = []
        for n, flags in enumerate((["--micro_batch", 4], ["--micro_batch", 1], ["--checkpoint_activations"])):
            out = os.path.join(tmp, str(n))
            quietly(*training(tmp, "--steps", 4, "--lr", 1e-3, *flags, "--out", out))
            runs.append(([x["loss"] for x in log_lines(out)], load_file(os.path.join(out, "model.safetensors"))))
        (losses, weights), *others = runs
        for other, moved in others:
            assert np.allclose(other, losses, rtol=1e-4), (other, losses)
            assert all(torch.allclose(moved[k], weights[k], atol=2e-4) for k in weights)


RANKS = """
import contextlib, os, sys
import torch.distributed as dist
sys.path.insert(0, {here!r})
from tests.helpers import killed_in_step
from downstream import llava
flags, ask, out, ports = {flags!r}, {ask!r}, {out!r}, {ports!r}
for folder, killed, port in zip(("whole", "killed", "killed"), (False, True, False), ports):
    os.environ["MASTER_PORT"] = port
    with killed_in_step(llava, 4) if killed else contextlib.nullcontext():
        llava.main([*flags, "--out", os.path.join(out, folder)])
    dist.destroy_process_group()
os.environ["MASTER_PORT"] = ports[3]
llava.main([*ask, os.path.join(out, "ranks.jsonl")])
"""


def test_two_ranks_are_as_one_process_and_resume_exactly():
    """FSDP2 over gloo: all parts learn; the second run is killed after a step that no save has seen, and resumed. Then
    they answer, about none, one or two pictures."""
    with tempfile.TemporaryDirectory() as tmp:
        one, script = os.path.join(tmp, "one"), os.path.join(tmp, "ranks.py")
        flags = list(map(str, training(tmp, "--steps", 4, "--save_every", 2, "--lr", 1e-3, "--encoder_lr", 1e-3,
                                       "--system", "A", "--template", "vicuna", variant="xl")))
        with open(os.path.join(tmp, "q.jsonl"), "w") as f:
            for k in range(16):
                shown = {"image": [f"{k % 8}.png"] * (k // 6)} if k > 5 else {}
                f.write(json.dumps({"question_id": k, "text": "What is it?"[:3 + k], **shown}) + "\n")
        ask = ["answer", "--run", os.path.join(tmp, "whole"), "--questions", os.path.join(tmp, "q.jsonl"), "--images",
               os.path.join(tmp, "pictures"), "--workers", "0", "--max_new_tokens", "3", "--batch_size", "3",
               "--answers"]
        with open(script, "w") as f:
            f.write(RANKS.format(here=HERE, flags=flags, ask=ask, out=tmp, ports=[free_port() for _ in range(4)]))
        for done in run_ranks(2, "python", script):
            assert done.returncode == 0, done.stderr[-2000:]
        quietly(*flags, "--out", one)
        quietly(*ask, os.path.join(tmp, "one.jsonl"))
        assert answered(os.path.join(tmp, "ranks.jsonl")) == answered(os.path.join(tmp, "one.jsonl"))
        assert [x["question_id"] for x in answered(os.path.join(tmp, "one.jsonl"))] == list(range(16))
        whole, killed = (os.path.join(tmp, name) for name in ("whole", "killed"))
        a, b, c = (load_file(os.path.join(folder, "model.safetensors")) for folder in (one, whole, killed))
        assert a.keys() == b.keys() == c.keys() and all(torch.equal(b[k], c[k]) for k in b)
        assert log_lines(whole) == log_lines(killed) and len(log_lines(whole)) == 4
        for k in a:
            assert torch.allclose(a[k], b[k], atol=3e-4), (k, (a[k] - b[k]).abs().max())
        for key in "loss", "grad_norm", "tokens":
            assert np.allclose([x[key] for x in log_lines(one)], [x[key] for x in log_lines(whole)], rtol=1e-3), key
        assert sorted(x for x in os.listdir(whole) if x.startswith("state")) == ["state.pt", "state_0000004"]


def test_llava_resumes_exactly():
    with tempfile.TemporaryDirectory() as tmp:
        flags = training(tmp, "--steps", 6, "--save_every", 2, "--lr", 1e-3)
        whole, killed = os.path.join(tmp, "whole"), os.path.join(tmp, "killed")
        quietly(*flags, "--out", whole, "--save_every", 1, "--keep_every", 3)
        with killed_in_step(llava, 4):
            quietly(*flags, "--out", killed)
        assert torch.load(os.path.join(killed, "state.pt"))["step"] == 2 and len(log_lines(killed)) == 3
        os.remove(os.path.join(killed, "model.safetensors"))  # as if the kill had come before it
        assert "resumed" in quietly(*flags, "--out", killed)
        assert log_lines(killed) == log_lines(whole) and len(log_lines(whole)) == 6
        a, b = (torch.load(os.path.join(folder, "state.pt"))["tensors"] for folder in (whole, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and "exp_avg projector.0.bias" in a
        kept = load_file(os.path.join(whole, "model_0000003.safetensors"))
        final = load_file(os.path.join(whole, "model.safetensors"))
        assert not torch.equal(kept["projector.0.bias"], final["projector.0.bias"])
        assert [read_config(os.path.join(whole, name))["step"] for name in (
            "model_0000003.safetensors", "model.safetensors")] == [3, 6]
        assert "finished" in quietly(*flags, "--out", whole)
        raises(UserError, quietly, *flags, "--lr", 1e-2, "--out", whole, words="lr was 0.001, is now 0.01")
        # what is frozen is not in the checkpoint: the same file may lie elsewhere, another one is refused
        path = lambda name: os.path.join(tmp, name)
        shutil.copy(path("tokenizer.safetensors"), path("moved.safetensors"))
        shutil.copytree(path("llm"), path("elsewhere/llm"))
        moved = [*flags, "--weights", path("moved.safetensors"), "--llm", path("elsewhere/llm")]
        assert "finished" in quietly(*moved, "--out", whole)
        llava.write_model(path("other.safetensors"), read_config(path("moved.safetensors")),
                          {k: 2 * x for k, x in load_file(path("moved.safetensors")).items()})
        one, two = (sha256(path(f"{name}.safetensors"))[:12] for name in ("moved", "other"))
        raises(UserError, quietly, *flags, "--weights", path("other.safetensors"), "--out", whole, words=(
            f"parts was llm seeing by {one}, is now llm seeing by {two}"))
        raises(UserError, quietly, *flags, "--llm", llm_folder(tmp, "other", seed=1), "--out", whole, words=(
            f"parts was llm seeing by {one}, is now other seeing by {one}"))
        assert "finished" in quietly(*flags, "--weights", path("other.safetensors"), "--out", whole, "--resume_anyway")


def test_a_longer_run_of_llava_goes_on():
    """3% of 20 and of 30 steps are one of warm-up, and so its part, and that of the decay, is another one."""
    with tempfile.TemporaryDirectory() as tmp:
        flags = training(tmp, "--out", os.path.join(tmp, "run"))
        for steps in 20, 30:
            quietly(*flags, "--steps", steps)
            state = torch.load(os.path.join(tmp, "run", "state.pt"))
            assert (state["step"], state["args"]["warmup"], state["args"]["lr_decay"]) == (steps, 1, 1 - 1 / steps)


def answered(path):
    return [json.loads(line) for line in open(path)]


def test_sixteen_conversations_are_learnt_and_answered():
    """Two stages; answers in batches of 5, one by one and after a crash are the same, and all right."""
    with tempfile.TemporaryDirectory() as tmp:
        path = lambda name: os.path.join(tmp, name)
        conversations(tmp)
        base = ["--system", "A", "--batch_size", 16, "--micro_batch", 16, "--log_every", 20]
        quietly(*training(tmp, "--template", "vicuna", "--steps", 5, "--out", path("first"), *base, stage=1))
        ready = [x for x in training(tmp, *base, "--init", path("first"), "--out", path("out"), "--lr", 4e-3, "--steps",
                                     120, "--clip", 0)]
        at = ready.index("--weights")
        quietly(*ready[:at], *ready[at + 2:])  # --init brings the encoder
        assert log_lines(path("out"))[-1]["loss"] < 0.05, log_lines(path("out"))[-1]
        assert "llm.model.embed_tokens.weight" not in load_file(path("first/model.safetensors"))
        shutil.move(path("llm"), path("gone"))  # a language model that was trained is in the run
        samples = json.load(open(path("data.json")))
        with open(path("q.jsonl"), "w") as f:
            for k, x in enumerate(samples):
                text = x["conversations"][0]["value"].removeprefix("<image>\n")
                f.write(json.dumps({"question_id": 100 - k, "text": text, **({"image": x["image"]} if k < 8 else {})})
                        + "\n")
        ask = ["answer", "--run", path("out"), "--questions", path("q.jsonl"), "--images", path("pictures"),
               "--workers", 0, "--max_new_tokens", 4, "--answers"]
        quietly(*ask, path("many.jsonl"), "--batch_size", 5)
        many = answered(path("many.jsonl"))
        assert [x["text"] for x in many] == [x["conversations"][1]["value"] for x in samples], many
        assert [x["question_id"] for x in many] == list(range(100, 84, -1)) and many[0]["prompt"] == "What?"
        assert set(many[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert [(x["answer_id"], x["metadata"]) for x in many] == [
            (str(k), {"max_new_tokens": 4, "bf16": False}) for k in range(16)]
        assert "-120" in many[0]["model_id"] and not [x for x in os.listdir(tmp) if ".part" in x]
        quietly(*ask, path("single.jsonl"), "--batch_size", 1)
        assert answered(path("single.jsonl")) == many
        plain, calls = llava_use.Speaker.tokens, []

        def tokens(self, asked):
            calls.append(len(asked))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return plain(self, asked)
        with unittest.mock.patch.object(llava_use.Speaker, "tokens", tokens):
            with contextlib.suppress(KeyboardInterrupt):
                quietly(*ask, path("again.jsonl"), "--batch_size", 4)
            with open(path("again.jsonl.part0"), "a") as f:
                f.write('[12, {"question_id": 1')  # a torn line
            quietly(*ask, path("again.jsonl"), "--batch_size", 4)
        assert calls == [4, 4, 4, 4, 4] and answered(path("again.jsonl")) == many
        raises(UserError, quietly, *ask, path("many.jsonl"), words="is there already")
        with open(path("other.jsonl.part0"), "w") as f:
            f.write(json.dumps([0, {**many[0], "model_id": "another"}]) + "\n")
        raises(UserError, quietly, *ask, path("other.jsonl"), words="of another model (another")
        for line, words in (('{"question_id": 1}', "is no file of JSON lines"), ("", "is empty"), ("{", "JSON lines"),
                            ('{"question_id": 1, "text": "<image>?"}', "question 1: 0 pictures, but 1 <image>"),
                            ('{"question_id": 1, "text": "?", "image": "no.png"}', "no.png cannot be opened")):
            with open(path("bad.jsonl"), "w") as f:
                f.write(line)
            raises(UserError, quietly, *ask, path("x.jsonl"), "--questions", path("bad.jsonl"), words=words)
        # chat: the answer comes in pieces; then a question with another picture, and one about both
        shown = lambda k: os.path.join(tmp, "pictures", f"{k}.png")
        asked, plain_ask = [], llava_use.ask
        with unittest.mock.patch("sys.stdin", io.StringIO(f"{shown(2)} What?\n\nand?\n")):
            with unittest.mock.patch.object(llava_use, "ask", lambda *a: asked.append((a[2][:], len(a[3]))) or
                                            plain_ask(*a)):
                out = quietly("chat", "--run", path("out"), shown(1), "What?", "--max_new_tokens", 4).split("\n")
        assert out[0] == "b" and [n for _, n in asked] == [1, 2, 2], out
        assert asked[2][0][:2] == [("<image>\nWhat?", "b"), ("<image>\nWhat?", out[1])] and asked[2][0][2][0] == "and?"


def test_answers_in_a_batch_are_those_of_one_alone():
    """Random weights, prompts of several lengths, in fp32: the same tokens, and the same as without a cache."""
    for cap in 0, 9:
        model = micro_llava(cap, seed=3)
        n, torch_ids = 16 + (cap > 0), lambda *x: torch.tensor(x)
        tiles = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
        prompts = [torch_ids(1, 2, 3), torch_ids(4, *[IMAGE] * n, 5, 6, 7), torch_ids(*[IMAGE] * n, 9)]
        layouts, lengths = [(1, None, (16, 16), n)] * 2, set()
        free = torch.stack(list(model.generate(prompts, tiles, layouts, 12, [])))
        stop = [free[4, 0].item(), free[7, 1].item()]  # so that the answers have several lengths
        many = torch.stack(list(model.generate(prompts, tiles, layouts, 12, stop)))
        for k, (ids, mine, shown) in enumerate(zip(prompts, ([], layouts[:1], layouts[1:]),
                                                   (tiles[:1], tiles[:1], tiles[1:]))):
            alone = torch.stack(list(model.generate([ids], shown, mine, 12, stop)))[:, 0].tolist()
            with torch.no_grad():
                x, plain = model.embed(ids[None], shown, mine), []
                while len(plain) < 12 and (not plain or plain[-1] != -1):
                    token = model.llm(inputs_embeds=x).logits[0, -1].argmax().item()
                    plain.append(-1 if token in stop else token)
                    x = torch.cat([x, model.llm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
            assert alone == plain and many[:len(alone), k].tolist() == alone, (many[:, k], alone, plain)
            assert (many[len(alone):, k] == -1).all()
            lengths.add(len(alone))
        assert len(lengths) > 1, lengths


def test_what_does_not_fit_is_said_in_one_line():
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "out")
        quietly(*training(tmp, "--steps", 1, "--system", "A", "--template", "vicuna", "--out", out, stage=1))
        wide, mute = llm_folder(tmp, "wide", width=64), llm_folder(tmp, "mute", template=None)
        again = ["--init", out, "--steps", 1, "--out", os.path.join(tmp, "x")]
        refuse = lambda *flags, words, stage=2, variant="lv": raises(
            UserError, quietly, *training(tmp, *flags, stage=stage, variant=variant), words=words)
        refuse(*again, "--llm", wide, words=("does not fit", "projector.0.weight is (32, 32), expected (64, 32)"))
        refuse("--llm", mute, "--template", "chat", words="no chat template")
        refuse("--llm", os.path.join(tmp, "none"), words="no language model can be loaded")
        refuse("--size", 18, words="--size 18 is no multiple of 4")
        refuse("--layer", -4, words="there is no block -4")
        refuse(*again, words="is of --variant lv", variant="xl")
        refuse("--init", tmp, words="no such file")
        second = os.path.join(tmp, "second")
        quietly(*training(tmp, *again[:4], "--out", second))
        refuse("--init", second, "--llm", mute, words=("has trained", "leave out --llm"))
        refuse("--batch_size", 17, words="no batch of 17")
        flags = training(tmp, *again)
        at = flags.index("--weights")
        flags[at:at + 2] = ["--teacher", os.path.join(tmp, "teacher.safetensors")]
        raises(UserError, quietly, *flags, words="was trained with the encoder")
        done = run("python", "-m", "downstream.llava", *map(str, training(tmp, "--images", out, "--data", "no.json")))
        assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "no.json" in done.stderr, done.stderr
        for flags, words in ((["--stage", 3], "stages 1 and 2"), (["--teacher", "tiny"], "--weights"),
                             (["--teacher_weights", "random"], "random is of a --teacher, and there is none"),
                             (["--data"], "expected at least one")):
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(SystemExit):
                llava.parse_args(list(map(str, training(tmp, *flags))))
            assert words in err.getvalue(), err.getvalue()
        flags = training(tmp)
        with unittest.mock.patch.dict("sys.modules", transformers=None):
            refused(UserError, quietly, *flags, says=(
                "it needs transformers (import of transformers halted; None in sys.modules): pip install -r "
                "downstream/requirements.txt"))
        # the control, a teacher with random weights
        flags = training(tmp, "--steps", 1, "--out", os.path.join(tmp, "control"), "--teacher", "tiny",
                         "--teacher_weights", "random", "--size", 16)
        at = flags.index("--weights")
        assert "seeing by tiny random" in quietly(*flags[:at], *flags[at + 2:])


def test_llavas_bench_counts_what_is_computed():
    """The FLOPs of a sample by hand: what learns costs three times its forward pass, a frozen language model twice, a
    frozen encoder once; attention below the diagonal alone."""
    vit = 11 * (2 * 65 * (4 * 192 ** 2 + 2 * 192 * 768) + 4 * 65 ** 2 * 192) + 2 * 64 * 192 * 192  # to block -2
    projector = 64 * 2 * (192 * 32 + 32 * 32)
    for variant, stage, tiles, length, factors in (("lv", 1, 1, 94, (1, 2)), ("lv", 2, 1, 94, (1, 3)),
                                                   ("xl", 3, 4, 294, (3, 3))):
        args = llava.parse_args(["bench", "--llm", "micro", "--encoder", "tiny", "--size", "64", "--variant", variant,
                                 "--stage", str(stage), "--micro_batch", "1", "--text", "30", "--answer", "10"])
        llm = 2 * (2 * length * (4 * 32 * 32 + 3 * 32 * 64) + 2 * length ** 2 * 32) + 2 * 10 * 128 * 32
        ours = llava_speed.training_flops(llava_speed.make_model(args, "cpu"), args, length, 10, tiles)
        assert ours == tiles * (factors[0] * vit + 3 * projector) + factors[1] * llm, (variant, stage)
    for flags, says in (
            (["--text", 29, "--answer", 20], "--text 29 is all of a sample's text, and --answer 20 a part of it: give "
             "--text 30 or more"),
            (["--size", 72, "--pool", 2], "--size 72 is no multiple of the patch 16 of tiny times --pool 2: try --size "
             "64"),
            (["--size", 60], "--size 60 is no multiple of the patch 8 of tiny times --pool 1: try --size 64"),
            (["--variant", "lv", "--stage", 3], "--variant lv has no --stage 3: see llava.STAGES")):
        refused(UserError, quietly, "bench", "--llm", "micro", "--encoder", "tiny", "--size", 64, *flags, says=says)
    said = quietly("bench", "--llm", "micro", "--encoder", "tiny", "--size", 64, "--variant", "lv", "--stage", 2,
                   "--text", 30, "--answer", 20, "--micro_batch", 1, "--new_tokens", 1, "--generate_batch", 1)
    assert "samples of 64 visual and 30 other tokens" in said
    said = quietly("bench", "--llm", "micro", "--encoder", "tiny", "--size", 64, "--variant", "xl", "--stage", 3,
                   "--text", 30, "--answer", 10, "--micro_batch", 1, "--new_tokens", 3, "--generate_batch", 1, 2)
    assert "samples of 264 visual and 30 other tokens" in said and "of the ceiling" in said
    assert "hours for 2,100,000 such samples on eight A800" in said and said.count("answers, batch") == 2


def test_the_study_gives_each_row_its_encoder_its_questions_and_its_line():
    """With scripts that only record their commands: what they would be asked to do, and what stays."""
    with tempfile.TemporaryDirectory() as tmp:
        commands, results = [], os.path.join(tmp, "results.jsonl")
        for name in "llm", "easy_vqa", "coco_mini", "tiny_imagenet":
            os.makedirs(os.path.join(tmp, name))

        def run_module(folder, *command):
            commands.append(list(map(str, command)))
            if command[0] == "downstream.vqa":
                assert command[-2] == "--out"
                with open(command[-1], "w") as f:
                    f.write('{"accuracy": 91.5}')
                return
            args = llava.parse_args(commands[-1][1:])
            if args.command == "train":
                os.makedirs(args.out)
                for name, text in (("log.jsonl", '{"step": 7, "loss": 0.5}'), ("state.pt", ""),
                                   ("model.safetensors", "")):
                    with open(os.path.join(args.out, name), "w") as f:
                        f.write(text + "\n")
        flags = ["--llm", os.path.join(tmp, "llm"), "--data", tmp, "--weights", "W", "--pixels", __file__, "--work",
                 os.path.join(tmp, "work"), "--results", results, "--parallel", "1", "--seeds", "3", "--sizes", "32"]
        rows = ["easy_vqa", "coco_mini@32:random", "tiny_imagenet@32:teacher", *flags]
        with unittest.mock.patch.object(study, "run_module", run_module), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            study.main(rows)
            lines, first = [json.loads(x) for x in open(results)], len(commands)
            study.main(rows)
            said = refused_by(study.main, "easy_vqa", "student:4", *flags)
        assert "no such rows: student:4; there are easy_vqa@32:student:3 easy_vqa@32:teacher:3 " in said, said
        assert len(commands) == first, "rows that stand there are not run again"
        assert [x["row"] for x in lines] == [
            *(f"easy_vqa@32:{eye}:3" for eye in study.EYES), "coco_mini@32:random:3", "tiny_imagenet@32:teacher:3"]
        assert lines[0]["accuracy"] == 91.5 and lines[0]["steps"] == 7 and lines[0]["asked_shuffled_accuracy"] == 91.5
        assert "asked_shuffled_accuracy" not in lines[1] and "accuracy 91.5" in out.getvalue()
        trained = [llava.parse_args(x[1:]) for x in commands if x[1] == "train"]
        eyes = [(a.weights, a.teacher, a.teacher_weights) for a in trained[1::2]]
        assert eyes == [("W", None, None), (None, "tiny", None), (__file__, None, None), (None, "tiny", "random"),
                        ("W", None, None), ("W", None, None), (None, "tiny", "random"), (None, "tiny", None)], eyes
        for k, (one, two) in enumerate(zip(trained[::2], trained[1::2])):
            control = {4: "_no_picture", 5: "_shuffled"}.get(k, "")
            data = {6: "coco_mini/train/llava_train.json", 7: "tiny_imagenet/train/llava.json"}.get(
                k, f"easy_vqa/train/llava{control}.json")
            assert one.data == two.data == [os.path.join(tmp, data)] and two.init == one.out and one.init is None
            assert (one.stage, two.stage, one.template, two.template) == (1, 2, "chat", "chat")
            assert (one.lr, two.lr, one.epochs, two.epochs, one.seed, two.size) == (1e-3, 1e-4, 1, 2, 3, 32)
        asked = [llava.parse_args(x[1:]).questions for x in commands if x[1] == "answer"]
        assert [os.path.relpath(x, tmp) for x in asked] == [f"easy_vqa/questions{x}.jsonl" for x in (
            "", "_shuffled", "", "", "", "_no_picture", "_shuffled")] + [
                "coco_mini/questions.jsonl", "tiny_imagenet/questions.jsonl"]
        assert [x[1] for x in commands if x[0] == "downstream.vqa"] == ["exact"] * 7 + ["pope", "exact"]
        left = [name for _, _, names in os.walk(os.path.join(tmp, "work")) for name in names]
        assert "log.jsonl" in left and "state.pt" not in left and "model.safetensors" not in left
        raises(UserError, study.main, ["easy_vqa@64:pixels", *flags[:6], "--results", results + "2"],
               words="--pixels FILE")
        raises(UserError, study.main, ["all", *flags[:2], "--data", "none"], words="is no folder")


def without(flags, name):
    """The flags without this one and its value."""
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2:]]


def refused_by(parse, *flags):
    """What argparse says before it exits."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            parse(list(map(str, flags)))
        except SystemExit as e:
            assert e.code == 2
            return err.getvalue()
    raise AssertionError(f"{flags} are taken")


def test_flags_have_their_defaults_and_their_ranges():
    need = {"train": ["train", "--variant", "xl", "--stage", 2, "--llm", "x", "--weights", "y", "--data", "z"],
            "answer": ["answer", "--run", "r", "--questions", "q", "--answers", "a"], "chat": ["chat", "--run", "r"]}
    parse = lambda command, *flags: vars(llava.parse_args(list(map(str, [*need[command], *flags]))))
    with unittest.mock.patch.object(llava, "default_workers", lambda most: 100 + most):
        train, ask, talk = (parse(command) for command in need)
    assert train == dict(
        command="train", variant="xl", stage=2, llm="x", weights="y", teacher=None, teacher_weights=None, init=None,
        data=["z"], images=".", out="out/llava", size=None, layer=None, pool=None, tiles=9, template="chat",
        system=None, max_length=32768, recipe="llava", batch_size=512, micro_batch=4, steps=None, epochs=1, lr=1e-5,
        encoder_lr=2e-6, warmup=None, weight_decay=0.0, clip=1.0, seed=0, workers=108, compile=False,
        checkpoint_activations=False, log_every=10, save_every=500, keep_every=None, resume_anyway=False,
        trains=("encoder", "projector", "llm"), aspect="anyres", lr_decay=1.0, decay_shape="cosine", eval_every=0)
    assert ask == dict(command="answer", run="r", llm=None, bf16=False, questions="q", images=".", answers="a",
                       batch_size=16, max_new_tokens=128, workers=108)
    assert talk == dict(command="chat", run="r", llm=None, bf16=False, inputs=[], max_new_tokens=512)
    with unittest.mock.patch("torch.cuda.is_available", lambda: True):
        assert parse("train")["checkpoint_activations"] and parse("answer")["bf16"] and parse("chat")["bf16"]
    demands(llava.parse_args, {command: list(map(str, flags[1:])) for command, flags in need.items()}, "--variant",
            "--stage", "--data", "--run", "--questions", "--answers")
    lowest = dict(size=1, tiles=1, max_length=2, batch_size=1, micro_batch=1, steps=1, epochs=1, lr=0.0, encoder_lr=0.0,
                  warmup=0, weight_decay=0.0, clip=0.0, seed=0, workers=0, log_every=1, save_every=0, keep_every=0)
    for command, ranges in (("train", lowest), ("answer", dict(batch_size=1, max_new_tokens=1, workers=0)),
                            ("chat", dict(max_new_tokens=1))):
        for name, low in ranges.items():
            assert parse(command, f"--{name}", low)[name] == low, name
            said = refused_by(llava.parse_args, *need[command], f"--{name}={low - 1}")
            assert f"argument --{name}: it is {low - 1}; it must be at least {low:.0f}" in said, said
    assert parse("train", "--seed", 2 ** 63 - 1)["seed"] == 2 ** 63 - 1
    assert "at most 9223372036854775807" in refused_by(llava.parse_args, *need["train"], "--seed", 2 ** 63)
    for flags, words in ((["--pool", 3], "--pool"), (["--stage", 4], "--stage"), (["--template", "x"], "--template"),
                         (["--steps", 1, "--epochs", 2], "not allowed with"), (["--recipe", "x"], "--recipe")):
        assert words in refused_by(llava.parse_args, *need["train"], *flags), flags
    for name, values in ("pool", (1, 2)), ("stage", (1, 2, 3)), ("variant", ("lv", "xl")):
        for value in values:
            assert vars(llava.parse_args(["bench", f"--{name}", str(value)]))[name] == value
            assert name == "variant" or parse("train", f"--{name}", value)[name] == value
    for flag in "--llm", "--encoder", "--variant", "--stage", "--pool":
        assert f"argument {flag}: invalid choice: " in refused_by(llava.parse_args, "bench", flag, 4), flag
    assert "argument --variant: invalid choice: " in refused_by(llava.parse_args, *need["train"], "--variant", "l")
    for names, words in ((["--weights"], "give the tokenizer's --weights, or for the control a --teacher, or --init\n"),
                         (["--llm"], "give a language model, --llm, or --init\n")):
        assert refused_by(llava.parse_args, *without(need["train"], *names)).endswith(words), words
        assert vars(llava.parse_args(list(map(str, without(need["train"], *names) + ["--init", "i"]))))["init"] == "i"
    # what a resume may change
    free = set("llm weights teacher teacher_weights images data init out steps epochs workers micro_batch compile "
               "checkpoint_activations log_every save_every keep_every resume_anyway warmup lr_decay".split())
    state = {**dict.fromkeys("tensors step samples sums faults cut id config".split(), 0), "args": train}
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "state.pt")
        torch.save(state, path)
        for name in train:
            now = llava.SimpleNamespace(**{**train, name: "other", "resume_anyway": False})
            try:
                load_checkpoint(path, llava.STATE, now, llava.MAY_DIFFER)
                assert name in free, name
            except UserError as e:
                assert f"({name} was {train[name]}, is now other)" in str(e) and name not in free, name
        for name in state:
            torch.save({k: v for k, v in state.items() if k != name}, path)
            raises(UserError, load_checkpoint, path, llava.STATE, llava.SimpleNamespace(**train), llava.MAY_DIFFER,
                   words=f"(it lacks {name})")


def built(folder, *flags, **stage):
    """(model, what its file says of it) of a stage that these flags of `training` ask for."""
    return llava_model.build_stage(llava.parse_args(list(map(str, training(folder, *flags, **stage)))), "cpu")


def recomputes(llm):
    return any(getattr(m, "gradient_checkpointing", False) for m in llm.modules())


def test_a_stage_is_built_as_the_command_line_says():
    with tempfile.TemporaryDirectory() as tmp:
        path = lambda name: os.path.join(tmp, name)
        flags = ["--size", 32, "--layer", 1, "--pool", 2, "--tiles", 4, "--seed", 3, "--template", "plain", "--system",
                 "S", "--checkpoint_activations"]
        model, config = built(tmp, *flags, variant="xl", stage=1)
        eye = f"{path('tokenizer.safetensors')} {sha256(path('tokenizer.safetensors'))[:12]}"
        mine = dict(variant="xl", stage=1, llm=path("llm"), eye=eye, size=32, cap=4, aspect="squash", layer=1, pool=2,
                    template="plain", system="S", trains_llm=False)
        assert config == {"vit": asdict(MICRO_VIT), "llava": mine, "commit": llava_model.commit()}, config
        assert (model.layer, model.pool, model.cap) == (1, 2, 4) and model.projector[0].in_features == 4 * 32
        torch.manual_seed(3)  # the newline's draws come last
        for layer in torch.nn.Linear(128, 32), torch.nn.Linear(32, 32):
            assert any(torch.equal(layer.weight, x.weight) for x in (model.projector[0], model.projector[2]))
        assert torch.equal(model.newline, torch.randn(32) / 32 ** 0.5)
        assert model.encoder.vit.checkpoint and recomputes(model.llm)
        assert not model.encoder.training and model.llm.training and model.projector.training
        img = torch.randint(256, (1, 3, 16, 24), dtype=torch.uint8)
        f = model.encoder.features(img / 255, 1)  # the last of the three blocks but one
        f = torch.stack([torch.cat([f[0, y * 6 + x], f[0, y * 6 + x + 1], f[0, y * 6 + x + 6], f[0, y * 6 + x + 7]])
                         for y in (0, 2) for x in (0, 2, 4)])
        close(model.see(img)[0].flatten(0, 1), model.projector(f), 1e-5)
        # the next stage: what is not said is that of --init
        out = path("one")
        quietly(*training(tmp, *flags[:6], "--system", "S", "--steps", 1, "--out", out, "--template", "vicuna",
                          variant="xl", stage=1))
        model, config = built(tmp, "--init", out, variant="xl", stage=2)
        assert config["llava"] == {**mine, "stage": 2, "cap": 9, "aspect": "anyres", "template": "chat", "system": None,
                                   "trains_llm": True} and model.encoder.training
        assert not model.encoder.vit.checkpoint and not recomputes(model.llm)
        given = ["--init", out, "--size", 16, "--layer", -1, "--pool", 2]
        mine = built(tmp, *given, variant="xl", stage=1)[1]["llava"]
        assert (mine["size"], mine["layer"], mine["pool"], mine["trains_llm"]) == (16, -1, 2, False)
        second = path("two")
        quietly(*training(tmp, "--init", out, "--steps", 1, "--out", second, variant="xl", stage=2))
        third = built(tmp, "--init", second, variant="xl", stage=1)[1]["llava"]
        assert third["trains_llm"], "once it was trained, its tensors belong to the run"
        flags = without(training(tmp, "--init", second, variant="xl"), "--llm")
        os.rename(path("llm"), path("away"))  # it is in the run
        model, _ = llava_model.build_stage(llava.parse_args(list(map(str, flags))), "cpu")
        found = load_file(os.path.join(second, "model.safetensors"))
        assert all(torch.equal(p, found[k]) for k, p in model.named_parameters() if k in found)
        os.rename(path("away"), path("llm"))
        # the same file elsewhere is the same encoder; another is not
        shutil.copy(path("tokenizer.safetensors"), path("moved.safetensors"))
        built(tmp, "--init", out, "--weights", path("moved.safetensors"), variant="xl")
        raises(UserError, built, tmp, "--init", tmp, words="no such file")
        shutil.copy(path("tokenizer.safetensors"), path("model.safetensors"))
        raises(UserError, built, tmp, "--init", tmp, words=f"--init {tmp} is no run of downstream.llava")
        refused(UserError, llava_model.load_run, tmp, "cpu", says=(
            f"{path('model.safetensors')} is a model file, but none of downstream.llava"))
        refused(UserError, built, tmp, "--init", out, says=f"--init {out} is of --variant xl")
        flags = without(training(tmp, "--init", out, variant="xl"), "--weights")
        raises(UserError, lambda: llava_model.build_stage(llava.parse_args(list(map(
            str, [*flags, "--teacher", path("teacher.safetensors")]))), "cpu"), words=(
            f"--init {out} was trained with the encoder {eye}, not with {path('teacher.safetensors')}"))
        shutil.copytree(out, path("earlier"))  # two teachers in folders whose names end alike are two
        found = read_config(os.path.join(out, "model.safetensors"))
        found["llava"]["eye"] = path("a run/teacher.safetensors")
        llava.write_model(path("earlier/model.safetensors"), found, load_file(os.path.join(out, "model.safetensors")))
        os.mkdir(path("b run"))
        flags = [*without(flags, "--init"), "--init", path("earlier"), "--teacher",
                 shutil.copy(path("teacher.safetensors"), path("b run"))]
        raises(UserError, lambda: llava_model.build_stage(llava.parse_args(list(map(str, flags))), "cpu"), words=(
            f"the encoder {path('a run/teacher.safetensors')}, not with {path('b run/teacher.safetensors')}"))
        llm = built(tmp)[0].llm
        with unittest.mock.patch.object(llava_model, "load_llm", lambda name: llm):
            named = built(tmp, "--llm", "hub/name")[1]["llava"]
            assert built(tmp, "--layer", 0)[1]["llava"]["layer"] == 0, "the first block is a choice, too"
        assert named["llm"] == "hub/name", "a name is no path"
        for size, pool, near in ((18, 1, 16), (19, 1, 20), (1, 1, 4), (20, 2, 16), (23, 2, 24), (3, 2, 8)):
            refused(UserError, built, tmp, "--size", size, "--pool", pool, says=(
                f"--size {size} is no multiple of {4 * pool}, the patch times --pool: try {near}"))
        for layer in 3, -4:
            refused(UserError, built, tmp, "--layer", layer, says=(
                f"the encoder has 3 blocks, so there is no block {layer}: give another --layer"))
        flags = without(without(training(tmp, "--teacher", path("teacher.safetensors")), "--weights"), "--llm")
        control = llava.parse_args(list(map(str, [*flags, "--llm", os.path.relpath(path("llm"))])))
        mine = llava_model.build_stage(control, "cpu")[1]["llava"]
        assert (mine["llm"], mine["eye"], mine["size"]) == (path("llm"), path("teacher.safetensors"), 16)
        plain = built(tmp)[0]
        assert (plain.layer, plain.pool, plain.cap) == (-2, 1, 0), "as LLaVA-1.5"
        assert built(tmp, "--layer", 2)[0].layer == 2 and built(tmp, "--layer", -3)[0].layer == -3
        raises(UserError, llava_model.load_tokenizer, path("none"),
               words=f"no text tokenizer can be loaded from {path('none')}")


def alone(data, numbers, model):
    """(sum of the losses, targets, tokens) of samples, each as a batch of its own."""
    total, targets, tokens = 0, 0, 0
    for n in numbers:
        batch = llava_data.collate([data[n]])
        keep = {k: batch[k] for k in ("ids", "places", "targets", "tiles", "layouts")}
        total, tokens = total + model(**keep), tokens + len(data[n]["ids"])
        targets += int((data[n]["labels"][1:] != IGNORE).sum())
    return total, targets, tokens


def test_a_run_says_and_logs_what_it_does():
    """Of three steps that take two seconds each: every line on the screen and every number in the log."""
    with tempfile.TemporaryDirectory() as tmp:
        out, plain, order = os.path.join(tmp, "my out"), llava.log, []
        flags = training(tmp, "--steps", 3, "--warmup", 2, "--lr", 1e-3, "--system", "A", "--max_length", 29,
                         "--seed", 7, "--recipe", "paper", "--weight_decay", 0.25, "--out", out)

        def recorded(name, kind=llava.Run):
            method = getattr(kind, name)
            return unittest.mock.patch.object(kind, name, lambda self, *a: order.append((name, *a)) or method(self, *a))
        with contextlib.ExitStack() as stack:
            for name in "hold_folder", "load", "open_log":
                stack.enter_context(recorded(name))
            for name in "listen", "check_locks":
                stack.enter_context(unittest.mock.patch.object(
                    llava, name, lambda x, name=name: order.append((name, x))))
            stack.enter_context(unittest.mock.patch.object(llava, "log", lambda s, seconds: plain(s, 2.0)))
            setup, shard, kept = llava.setup, llava.shard, []
            stack.enter_context(unittest.mock.patch.object(
                llava, "setup", lambda *a: kept.append(setup(*a)) or kept[0]))
            stack.enter_context(unittest.mock.patch.object(
                llava, "shard", lambda model, run, how: order.append(("shard", how)) or shard(model, run, False)))
            screen = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            llava.main(list(map(str, [*flags, "--compile"])), on_signal="handler")
        args = kept[0].args
        assert order == [("shard", True), ("hold_folder",), ("load", llava.STATE, args, llava.MAY_DIFFER),
                         ("open_log", 0), ("listen", "handler"), ("check_locks", 0)], order
        group, = kept[0].optimizer.param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.5, 0.95), 0.25)
        # by hand: the samples of each step, and the first step's loss and gradient
        first = llava.parse_args(list(map(str, flags)))
        model, config = llava_model.build_stage(first, "cpu")
        data = llava_data.Conversations(first.data, first.images, Prompter(tokenizer(), "vicuna", "A"),
                                        Looker(config["llava"], MICRO_VIT), 4, 7, 29)
        total, targets, _ = alone(data, range(4), model)
        (total / targets).backward()
        norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) ** 0.5
        tokens = [sum(len(data[n]["ids"]) for n in range(k, k + 4)) for k in (0, 4, 8)]
        cut = np.cumsum([sum(data[n]["was_cut"] for n in range(k, k + 4)) for k in (0, 4, 8)]).tolist()
        assert cut == [4, 4, 8], "what shows pictures, in the first and the third step"
        lines = log_lines(out, timing=True)
        assert abs(lines[0]["loss"] / (total / targets).item() - 1) < 1e-4
        assert abs(lines[0]["grad_norm"] / norm.item() - 1) < 1e-3
        rates = [0.5e-3, 1e-3, 1e-3]  # warm-up, then a cosine over the last step alone
        for k, line in enumerate(lines):
            assert {k: x for k, x in line.items() if k not in ("loss", "grad_norm")} == dict(
                step=k + 1, lr=rates[k], tokens=tokens[k], cut=cut[k], skipped=0, img_s=2.0, tokens_s=tokens[k] / 2,
                memory_gib=None), line
        learns = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("llm.", "projector.")))
        everything = sum(p.numel() for p in model.parameters())
        eye = config["llava"]["eye"]
        expected = [
            "data: 16 conversations, 8 with pictures; template vicuna, pictures: pad, at most 29 tokens",
            f"model: {os.path.join(tmp, 'llm')} seeing by {eye}, a new projector; trains projector, llm: "
            f"{learns / 1e6:.1f}M of {everything / 1e6:.1f}M parameters",
            "run: 3 steps of 4 = micro-batch 2 x accumulation 2 x 1 rank on cpu; rate 1.00e-03 after 2 steps of "
            "warm-up, then a cosine; --recipe paper: AdamW's betas (0.5, 0.95)"]
        for k, (line, eta) in enumerate(zip(lines, ("00:04", "00:02", "00:00"))):
            expected.append(f"step      {k + 1}/3 | loss {line['loss']:.4f} | grad {line['grad_norm']:.2f} | lr "
                            f"{rates[k]:.1e} | {tokens[k] / 2:,.0f} tokens/s | {cut[k]} cut at 29 | eta {eta}")
        expected.append(f"done: {out}/model.safetensors; try: python -m downstream.llava chat --run '{out}' IMAGE "
                        '"What is in the picture?"')
        assert screen.getvalue().splitlines() == expected, screen.getvalue()
        final = load_file(os.path.join(out, "model.safetensors"))
        os.remove(os.path.join(out, "model.safetensors"))  # as if a kill had come before it
        said = quietly(*flags).splitlines()
        again = load_file(os.path.join(out, "model.safetensors"))
        assert again.keys() == final.keys() and all(torch.equal(again[k], final[k]) for k in final)
        assert said[-2:] == [
            f"resumed from {out}/state.pt at step 3",
            f"the run is finished: {out}/model.safetensors; to extend it, give more --steps or --epochs"], said
        state = torch.load(os.path.join(out, "state.pt"))
        assert set(state) == {*llava.STATE} and state["samples"] == 12 and state["cut"] == cut[2]
        assert state["config"] == config and state["args"] == vars(args)
        # signals save and stop; what is read is what two ranks would have to agree on
        step = llava.step

        def signalled(s, batches):
            if s.now.step == 1:
                INTERRUPTS.append(15)
            return step(s, batches)
        try:
            with unittest.mock.patch.object(llava, "step", signalled):
                said = quietly(*flags, "--out", out + "2", "--save_every", 0)
        finally:
            INTERRUPTS.clear()
        assert said.splitlines()[-1] == ("interrupted and saved at step 2: the same command goes on from there"), said
        assert torch.load(os.path.join(out + "2", "state.pt"))["step"] == 2
        state = types.SimpleNamespace(load=lambda *a: dict(tensors={}), ranks=2, path=lambda x: "R/" + x)
        refused(UserError, llava.resume, types.SimpleNamespace(args=args, run=state, now=None),
                says="R/state.pt was saved by one process: go on with one, or start from RUN as --init")


def test_a_line_of_llavas_log_by_hand():
    """Two steps of 8 samples and 900 tokens each; on a GPU with its memory; what was cut or skipped is told."""
    wrote, said = [], []
    run = types.SimpleNamespace(write=lambda **line: wrote.append(line), say=said.append, on_gpu=False)
    args = types.SimpleNamespace(batch_size=8, steps=40, lr=0.5, warmup=10, lr_decay=0.75, decay_shape="cosine",
                                 log_every=2, max_length=2048)
    now = types.SimpleNamespace(step=6, cut=0, faults=torch.tensor([0.0, 1.0]))
    s = types.SimpleNamespace(args=args, now=now, run=run)
    sums, start = torch.tensor([3.0, 5.0, 1800.0, 2.0]).double(), "/40 | loss 1.5000 | grad 2.50 | lr 3.0e-01 | "
    line = dict(step=6, loss=1.5, grad_norm=2.5, lr=0.3, tokens=900.0, cut=0, skipped=0, img_s=32.0, tokens_s=3600.0,
                memory_gib=None)
    for run.on_gpu, now.cut, now.faults[0], more, words in (
            (False, 0, 0, {}, ""), (False, 1234, 0, dict(cut=1234), " | 1,234 cut at 2,048"),
            (True, 0, 3, dict(skipped=3, memory_gib=1.25), " | 3 steps skipped | 1.2 GiB")):
        now.sums = sums.clone()
        with unittest.mock.patch.object(torch.cuda, "max_memory_allocated", lambda: 5 * 2 ** 28):
            llava.log(s, 0.25)
        assert wrote[-1] == {**line, **more} and not now.sums.any(), wrote
        assert said[-1] == f"step      6{start}3,600 tokens/s{words} | eta 00:08", said


def test_a_save_of_llava_in_its_order():
    """The copy that is kept, the checkpoint, the model; of several ranks first the parts in a folder of their own, and
    the folders before it go; a full disk is told."""
    did = []

    def write(path, work):
        file = io.BytesIO()
        work(file)
        did.append((os.path.basename(path), torch.load(io.BytesIO(file.getvalue()))))

    def write_parts(x, checkpoint_id, process_group):
        did.append((os.path.basename(checkpoint_id), sorted(os.listdir(tmp)), process_group))
        os.makedirs(checkpoint_id, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp, unittest.mock.patch.multiple(
            llava, tensors=lambda s: {"p": torch.ones(2)}, write_atomically=write,
            export=lambda s, path: did.append(os.path.basename(path))), unittest.mock.patch.object(
            llava.dist, "barrier", lambda group: did.append(group)), unittest.mock.patch(
            "torch.distributed.checkpoint.save", write_parts):
        run = types.SimpleNamespace(ranks=1, rank=0, out=tmp, control="C", path=lambda name: os.path.join(tmp, name))
        s = types.SimpleNamespace(run=run, now=types.SimpleNamespace(step=6, id="i"), config={"c": 1},
                                  args=types.SimpleNamespace(keep_every=3))
        for s.now.step, s.args.keep_every in (6, 3), (7, 3), (6, 0), (6, None):
            did.clear(), llava.save(s)
            *kept, (name, state), last = did
            assert kept == ["model_0000006.safetensors"] * (s.now.step == 6 and s.args.keep_every == 3)
            assert (name, last) == ("state.pt", "model.safetensors") and torch.equal(
                state.pop("tensors")["p"], torch.ones(2))
            assert state == {"step": s.now.step, "id": "i", "config": {"c": 1}, "args": vars(s.args)}
        for run.rank in 0, 1:
            for name in "state_0000003", "state_0000006", "other":
                os.makedirs(f"{tmp}/{name}", exist_ok=True)
            open(f"{tmp}/state_file", "w").close()
            run.ranks = 2
            did.clear(), llava.save(s)
            there = ["other", "state_0000003", *["state_0000006"] * run.rank, "state_file"]  # rank 0 removes a torn one
            assert did[:2] == ["C", ("state_0000006", there, "C")] and did[-1] == "model.safetensors"
            assert [x[1]["tensors"] for x in did[2:-1]] == ["state_0000006"] * (1 - run.rank)
            assert sorted(os.listdir(tmp)) == ["other", *["state_0000003"] * run.rank, "state_0000006", "state_file"]
        run.rank = 0
        with unittest.mock.patch.object(llava, "write_atomically", side_effect=OSError(28, "No space")):
            refused(UserError, llava.save, s, says=(
                f"step 6 could not be saved ([Errno 28] No space); {tmp}/state.pt, if there is one, is of the last "
                "save and whole: make room, and run the same command again"))


def test_prompts_and_tiles_reach_the_model():
    """Of several questions at once; a batch of text alone gets one black tile."""
    given, speaker = [], object.__new__(llava_use.Speaker)
    vars(speaker).update(limit=7, autocast=torch.autocast("cpu", torch.bfloat16),
                         prompter=types.SimpleNamespace(stop=[2]), model=types.SimpleNamespace(
        generate=lambda *what: given.append((torch.is_autocast_enabled("cpu"), *what)) or iter([5, 6])))
    a, b = torch.ones(2, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    none = torch.empty(0, 3, 4, 4, dtype=torch.uint8)
    assert list(speaker.tokens([("ids1", a, [1, 2]), ("ids2", none, []), ("ids3", b, [3])])) == [5, 6]
    assert list(speaker.tokens([("ids1", none, []), ("ids2", none, [])])) == [5, 6]
    (bf16, prompts, tiles, *rest), (_, texts, black, *others) = given
    assert bf16 and prompts == ("ids1", "ids2", "ids3") and torch.equal(tiles, torch.cat([a, b]))
    assert rest == [[1, 2, 3], 7, [2]] and others == [[], 7, [2]] and texts == ("ids1", "ids2")
    assert black.shape == (1, 3, 4, 4) and black.dtype == torch.uint8 and not black.any()
    for llama, pictures in ((False, 1), (True, 0)):  # one of two tokenizers begins by <s>, which is enough
        ids, *_ = llava_use.ask(Prompter(tokenizer(llama), "plain"), lambda x: ([], [(1, None, (4, 4), 2)] * len(x)),
                                [(pictures * "<image>" + "What?", "")], pictures * ["a picture"])
        assert ids.tolist() == [1] * llama + pictures * 2 * [IMAGE]
    refused(UserError, llava_use.ask, Prompter(tokenizer(False), "plain"), lambda pictures: ([], []), [("What?", "")],
            [], says="nothing is left to ask: a model of --template plain is shown a picture, and no words")


def test_what_is_clipped_and_what_is_not_finite():
    with tempfile.TemporaryDirectory() as tmp:
        only_pictures(tmp)
        out = os.path.join(tmp, "out")
        flags = training(tmp, "--steps", 1, "--warmup", 0, "--lr", 1, "--encoder_lr", 1, "--template", "vicuna",
                         "--system", "A", "--clip", 0.01, "--out", out, variant="xl")
        model, config = built(tmp, *flags[1:], variant="xl")
        data = llava_data.Conversations(
            [os.path.join(tmp, "data.json")], os.path.join(tmp, "pictures"), Prompter(tokenizer(), "vicuna", "A"),
            Looker(config["llava"], MICRO_VIT), 4, 0, 32768)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        total, targets, _ = alone(data, range(4), model)
        (total / targets).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = sum(x.square().sum() for x in grads.values()) ** 0.5
        # plain gradient descent at the rate 1 moves all parts together by the limit
        asked = []

        def descent(groups, **how):
            asked.append(([sorted(group) for group in groups], [group["lr"] for group in groups], how))
            return torch.optim.SGD(groups)
        with unittest.mock.patch("torch.optim.AdamW", descent):
            quietly(*flags)
        assert asked == [([["lr", "params"]] * 2, [1, 1], dict(betas=(0.9, 0.999), weight_decay=0.0, fused=True))]
        moved = torch.load(os.path.join(out, "state.pt"))["tensors"]
        assert any(name.startswith("encoder.") for name in grads)
        for name, grad in grads.items():
            assert torch.allclose(moved[name], before[name] - 0.01 * grad / norm, atol=1e-6), name
        assert abs(log_lines(out)[0]["grad_norm"] / norm.item() - 1) < 1e-3, "as it was before the clipping"
        assert abs(log_lines(out)[0]["loss"] / (total / targets).item() - 1) < 1e-4
        # a loss may be finite and its gradient not: the square root of 0
        forward, steps, bad = llava_model.LLaVA.forward, [], {2}
        kept, setup = [], llava.setup

        def sometimes(self, **batch):
            steps.append(1)
            loss, step = forward(self, **batch), (len(steps) + 1) // 2  # of two micro-batches
            return loss + (0 * self.projector[0].bias.sum()).sqrt() if step in bad else loss
        weights = lambda: kept[-1].model.projector[0].bias.detach().clone()
        seen, step = [], llava.step
        with unittest.mock.patch.object(llava_model.LLaVA, "forward", sometimes), unittest.mock.patch.object(
                llava, "setup", lambda *a: kept.append(setup(*a)) or kept[-1]), unittest.mock.patch.object(
                llava, "step", lambda s, batches: step(s, batches) or seen.append(weights())):
            flags = training(tmp, "--steps", 3, "--warmup", 0, "--lr", 1e-3, "--template", "vicuna", "--system", "A")
            said = quietly(*flags, "--out", out + "2").splitlines()
            assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
            lines = log_lines(out + "2")
            assert [x["skipped"] for x in lines] == [0, 1, 1] and lines[1]["loss"] is None and lines[2]["loss"] > 0
            assert ["1 steps skipped" in x for x in said if x.startswith("step ")] == [False, True, True], said
            steps.clear(), bad.update(range(3, 20))
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    llava.main(list(map(str, [*flags, "--steps", 30, "--out", out + "3"])))
                    raise AssertionError("it goes on")
                except UserError as e:
                    said = str(e)
        last = [f"sample {kept[-1].data.index(n)}" for n in range(40, 44)]
        finite = log_lines(out + "3")[0]["loss"]
        assert said.startswith("at step 11 the loss or its gradient is not finite, 10 steps in a row (the last finite "
                               f"one: {finite:.4f}); the last batch is {', '.join(last[:3])} .."), said
        assert open(os.path.join(out + "3", "not_finite.txt")).read().splitlines() == last


def test_files_in_half_precision():
    """A language model whose file is bf16 is trained in fp32, and written as bf16; answers come in either."""
    with tempfile.TemporaryDirectory() as tmp:
        llm_folder(tmp)
        from transformers import AutoModelForCausalLM
        path = lambda name: os.path.join(tmp, name)
        AutoModelForCausalLM.from_pretrained(path("llm"), dtype=torch.bfloat16).save_pretrained(path("llm"))
        kept, setup = [], llava.setup
        with unittest.mock.patch.object(llava, "setup", lambda *a: kept.append(setup(*a)) or kept[-1]):
            quietly(*training(tmp, "--steps", 1, "--system", "A", "--out", path("two")))
            quietly(*training(tmp, "--steps", 1, "--template", "vicuna", "--system", "A", "--out", path("one"),
                              stage=1))
        of = lambda s: {id(p) for group in s.optimizer.param_groups for p in group["params"]}
        assert of(kept[1]) == {id(p) for p in kept[1].model.projector.parameters()}, "the rest has no moments"
        moved = dict(kept[0].model.named_parameters())
        assert {p.dtype for p in moved.values()} == {torch.float32}
        found = load_file(path("two/model.safetensors"))
        for name, x in found.items():
            kind = torch.bfloat16 if name.startswith("llm.") else torch.float32
            assert x.dtype == kind and torch.equal(x, moved[name].to(kind)), name
        assert read_config(path("two/model.safetensors"))["step"] == 1
        flags = without(training(tmp, "--steps", 1, "--system", "A", "--init", path("two")), "--llm")
        os.rename(path("llm"), path("moved"))
        quietly(*flags, "--out", path("three"))
        assert {name.startswith("llm."): x.dtype for name, x in load_file(path("three/model.safetensors")).items()} == {
            True: torch.bfloat16, False: torch.float32}
        assert not any(name.startswith("llm.") for name in load_file(path("one/model.safetensors")))
        names, load = [], llava_model.load_llm
        with unittest.mock.patch.object(llava_model, "load_llm", lambda *given: names.append(given) or load(
                path("moved"))):
            for run, llm in ("one", None), ("one", "L"), ("two", None), ("two", "L"):
                llava_model.load_run(path(run), "cpu", llm)
        assert names == [(path("llm"),), ("L",), *2 * [(path("two/llm"), "cpu")]], "what was trained is in the run"
        shape = load(path("two/llm"), "meta")
        assert {(p.device.type, p.dtype) for p in shape.parameters()} == {("meta", torch.bfloat16)}, "of no tensors"
        args = lambda run, bf16: types.SimpleNamespace(run=path(run) + "/", llm=path("moved"), max_new_tokens=2,
                                                       bf16=bf16)
        for run in "one", "two":
            for bf16 in True, False:
                speaker, modes = llava_use.Speaker(args(run, bf16), torch.device("cpu")), []
                assert {p.dtype for p in speaker.model.llm.parameters()} == {torch.bfloat16 if bf16 else torch.float32}
                assert {p.dtype for p in speaker.model.projector.parameters()} == {torch.float32}
                # in bf16 they would turn the 1,000th token by 0.18 radians too far; Qwen's by 1.2
                turns = torch.tensor([10000 ** (-k / 8) for k in range(8)])
                assert torch.allclose(speaker.model.llm.model.rotary_emb.inv_freq, turns, rtol=1e-6, atol=0)
                assert not speaker.model.training and not any(p.requires_grad for p in speaker.model.parameters())
                assert speaker.prompter.system == "A" and speaker.name.startswith(f"{run}-{speaker.config['id']}-1")
                see = speaker.model.see
                speaker.model.see = lambda tiles: modes.append(torch.is_autocast_enabled("cpu")) or see(tiles)
                asked = llava_use.ask(speaker.prompter, speaker.looker, [("What?", "")], [])
                assert len(list(speaker.tokens([asked]))) <= 2 and modes == [bf16]


def test_how_several_ranks_hold_the_model():
    """Recorded calls: FSDP gets every block and then the whole, fp32 before, bf16 inside on GPUs alone."""
    model = micro_llava().bfloat16()
    blocks, calls = [*model.encoder.vit.blocks, *model.llm.model.layers], []
    wrap = lambda module, **how: calls.append((module, how, {p.dtype for p in module.parameters()}))
    with unittest.mock.patch("torch.distributed.fsdp.fully_shard", wrap), unittest.mock.patch(
            "torch.distributed.device_mesh.init_device_mesh", lambda *a: a), unittest.mock.patch.object(
            torch.nn.Module, "compile", lambda self, **how: calls.append((self, how))):
        for on_gpu, inside in ((True, torch.bfloat16), (False, None)):
            calls.clear()
            run = types.SimpleNamespace(ranks=2, on_gpu=on_gpu, device=torch.device("cpu"))
            llava_model.shard(model, run, False)
            assert [x[0] for x in calls] == [*blocks, model]
            for _, how, dtypes in calls:
                assert how["mesh"] == ("cpu", (2,)) and dtypes == {torch.float32}
                assert (how["mp_policy"].param_dtype, how["mp_policy"].reduce_dtype) == (inside, torch.float32)
        calls.clear()
        model.bfloat16()
        llava_model.shard(model, types.SimpleNamespace(ranks=1, device=torch.device("cpu")), True)
        assert calls == [(block, {"dynamic": True}) for block in blocks]
        assert {p.dtype for p in model.parameters()} == {torch.float32}


class Mute:
    """In place of Speaker: to a prompt it answers the number 0 and then its count of ids, within two steps of the
    longest; text is the numbers."""
    name = "run-0-7"

    def __init__(self, args, device):
        self.prompter = Prompter(tokenizer(), "vicuna", "A")
        self.prompter.text = lambda ids: " ".join(map(str, ids)) + " \u00e9"
        self.looker = Looker(dict(aspect="pad", size=16, cap=0, pool=1), MICRO_VIT)

    def tokens(self, asked):
        yield torch.zeros(len(asked), dtype=torch.long)
        yield torch.tensor([len(ids) for ids, _, _ in asked])
        yield torch.full((len(asked),), -1)


@unittest.mock.patch.object(llava_use, "Speaker", Mute)
def test_answers_are_written_as_they_come():
    with tempfile.TemporaryDirectory() as tmp:
        conversations(tmp)
        path, out = lambda name: os.path.join(tmp, name), os.path.join(tmp, "new", "a[1].jsonl")
        lines = [dict(question_id=f"q{k}", text="What \u00e9?" + 40 * k * " is",
                      **({"image": f"{k}.png"} if k % 2 else {"image": ""} if k == 2 else {}))
                 for k in range(7)]

        def questions(lines):
            with open(path("q.jsonl"), "w") as f:
                f.write("\n\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
        ask = ["answer", "--run", "r", "--questions", path("q.jsonl"), "--images", path("pictures"), "--workers", 3,
               "--batch_size", 2, "--answers", out]
        made, locks, bars, flushed = [], [], [], []

        def loader(*args, **how):
            made.append(how)
            return torch.utils.data.DataLoader(*args, **{**how, "num_workers": 0})

        def bar(batches, **how):
            bars.append(how)
            for batch in batches:  # what was answered before this batch is in the file
                flushed.append(len(llava_use.read_parts(out)))
                yield batch
        with unittest.mock.patch.object(llava_use, "DataLoader", loader), unittest.mock.patch.object(
                llava_use, "check_locks", locks.append), unittest.mock.patch.object(llava_use, "tqdm", bar):
            questions(lines)
            assert quietly(*ask) == f"{out}: 7 answers by run-0-7\n" and os.listdir(path("new")) == ["a[1].jsonl"]
            prompter = Prompter(tokenizer(), "vicuna", "A")
            ids = [len(prompter.prompt([("<image>\n" * (k % 2) + x["text"], "")])) + 15 * (k % 2)
                   for k, x in enumerate(lines)]
            expected = [dict(question_id=f"q{k}", prompt=x["text"], answer_id=str(k), model_id="run-0-7",
                             text=f"0 {ids[k]} \u00e9", metadata={"max_new_tokens": 128, "bf16": False})
                        for k, x in enumerate(lines)]
            assert open(out, encoding="utf-8").read() == "".join(
                json.dumps(x, ensure_ascii=False) + "\n" for x in expected)
            assert made[0]["num_workers"] == 3 and made[0]["batch_sampler"] == [[0, 1], [2, 3], [4, 5], [6]]
            assert locks == [3] and bars == [dict(desc="answer", unit="batch", disable=None)]
            assert flushed == [0, 2, 4, 6], "a killed run loses no batch but the last"
            refused(UserError, quietly, *ask, says=f"--answers {out} is there already: move it away to answer again")
            # a part of another run of the same command: of three questions, and a torn line
            os.remove(out)
            mine = [out + end for end in (".part", ".partial", ".part0.bak", ".part-1")]  # of somebody else
            for name in mine:
                with open(name, "w") as f:
                    f.write("5\n")
            with open(out + ".part3", "w") as f:
                f.write("".join(json.dumps([k, expected[k]]) + "\n" for k in (5, 0, 2)) + '[1, {"quest')
            assert quietly(*ask).endswith("7 answers by run-0-7\n") and answered(out) == expected
            assert made[-1]["batch_sampler"] == [[1, 3], [4, 6]]
            assert sorted(os.listdir(path("new"))) == sorted(map(os.path.basename, [out, *mine]))
            for name in mine:
                os.remove(name)
            os.remove(out)
            for number, change in ((0, dict(prompt="x")), (0, dict(model_id="other-1")), (7, {})):
                old = {**expected[0], **change}
                with open(out + ".part0", "w") as f:
                    f.write(json.dumps([1, expected[1]]) + "\n" + json.dumps([number, old]) + "\n")
                refused(UserError, quietly, *ask, says=(
                    f"{out}.part* are of other questions or of another model ({old['model_id']}, not run-0-7): remove "
                    "them to answer again"))
            with open(out + ".part0", "w") as f:
                f.write(json.dumps([1, expected[1]]) + "\n")
            for flags, other in ((("--max_new_tokens", 2), {"max_new_tokens": 2, "bf16": False}),
                                 (("--bf16",), {"max_new_tokens": 128, "bf16": True})):
                refused(UserError, quietly, *ask, *flags, says=(
                    f"{out}.part* were answered with {expected[1]['metadata']}, not with {other}: give the same flags, "
                    "or remove them to answer again"))
            os.remove(out + ".part0")
        refused(UserError, quietly, *without(ask, "--answers"), "--answers", path("data.json/a.jsonl"), says=(
            f"{path('data.json')} cannot be made a folder, because a file is in its place: give another one"))
        with contextlib.chdir(tmp):
            assert quietly(*without(without(ask, "--answers"), "--workers"), "--workers", 0, "--answers",
                           "here.jsonl") == "here.jsonl: 7 answers by run-0-7\n"
        form = f"--questions {path('q.jsonl')} is no file of JSON lines with question_id, text and image "
        for lines, says in (([], f"--questions {path('q.jsonl')} is empty"), (["7"], form + "(TypeError: "),
                            ([dict(question_id=1, text=2)], form + "(TypeError: "),
                            ([dict(question_id=1)], form + "(KeyError: 'text')"), (["{"], form + "(JSONDecodeError: "),
                            *(([dict(question_id=1, text="?", image=image)], form + (
                                f"(TypeError: image is {shown}, not a path, nor a list of paths)"))
                              for image, shown in ((5, "5"), ({"a": 1}, '{"a": 1}'), (["0.png", 3], '["0.png", 3]'))),
                            ([dict(question_id="b", text="?", image=["0.png", "no.png"])],
                             f"question b: {path('pictures/no.png')} cannot be opened (No such file or directory); "
                             "what is answered so far stays in .part files beside --answers, and the same command goes "
                             "on from there"),
                            ([dict(question_id="c", text="<image>?", image=["0.png", "1.png"])],
                             "question c: 2 pictures, but 1 <image> in the questions: one for each, or none")):
            questions(lines)
            raises(UserError, quietly, *without(ask, "--workers"), "--workers", 0, words=says)
        lines = [dict(question_id=k, text="?", image=[f"{k}.png"]) for k in range(3)]
        questions(lines)
        picture = os.path.join(tmp, "pictures", "2.png")
        os.rename(picture, picture + ".away")
        alone = [*without(without(ask, "--workers"), "--batch_size"), "--workers", 0, "--batch_size", 1]
        raises(UserError, quietly, *alone, words="question 2: ")
        first = llava_use.read_parts(out)
        assert sorted(first) == [0, 1], "it says so, and they do stay"
        os.rename(picture + ".away", picture)
        assert quietly(*alone).startswith(out) and answered(out)[:2] == [first[0], first[1]]
        os.remove(out)
        gone = path("gone.jsonl")
        refused(MissingFile, quietly, *without(ask, "--questions"), "--questions", gone, says=(
            f"--questions {gone} cannot be read (No such file or directory)"))
        shutil.rmtree(path("new"))  # the second of two ranks: its share, its file, and no more
        questions([dict(question_id=k, text="?") for k in range(7)])
        job = types.SimpleNamespace(rank=1, ranks=2, device="cpu", gather=lambda x: [x, {}])
        with unittest.mock.patch.object(llava_use, "Job", lambda args: job), unittest.mock.patch.object(
                llava_use.dist, "barrier") as barrier, unittest.mock.patch.object(llava_use, "tqdm", bar):
            assert quietly(*without(ask, "--workers"), "--workers", 0) == "" and barrier.call_count == 1
        assert bars[-1]["disable"] is True and os.listdir(path("new")) == ["a[1].jsonl.part1"]
        assert sorted(llava_use.read_parts(out)) == [2, 3, 6]


def test_a_chat_shows_pictures_and_prints_what_is_new():
    spoken = {0: "A", 2: "\ufffd", 3: "\u00e9", 4: " b"}
    text = lambda ids: "".join(spoken[i] for i in ids).replace("\ufffd\u00e9", "\u00e9")
    tokens = lambda asked: map(torch.tensor, ([0], [2], [3], [4], [-1]))  # 0 is a token
    pictures = []
    mute = types.SimpleNamespace(tokens=tokens, looker=lambda x: pictures.append(list(x)) or (torch.zeros(0), []),
                                 prompter=types.SimpleNamespace(text=text, prompt=lambda turns: [1]))
    printed = []
    with unittest.mock.patch("builtins.print", lambda *a, end="\n", flush=False: printed.append("".join(a) + end)):
        assert llava_use.say(mute, [("q", "")], []) == "A\u00e9 b" and printed == ["A", "\u00e9", " b", "", "\n"]
        printed.clear()
        mute.tokens = lambda asked: map(torch.tensor, ([0], [2]))
        assert llava_use.say(mute, [("q", "")], []) == "A\ufffd" and printed == ["A", "\n"], "half of a character"
    with tempfile.TemporaryDirectory() as tmp:
        shown = [os.path.join(tmp, f"{k}.png") for k in range(2)] + [os.path.join(tmp, "2 \u00fc.png")]
        for k, path in enumerate(shown):
            picture(k, 16 + k, 16).save(path)
        asked = []

        def say(speaker, turns, pictures):
            asked.append((list(turns), [img.width for img in pictures]))
            return f"a{len(asked)}"

        class Typed(io.StringIO):
            isatty = lambda self: True
        mark = "<image>\n"
        for given, typed, expected in (
                ([shown[0]], f"What?\n{shown[1]} {shown[2]} And  these?\n",
                 [(mark + "What?", 1), (2 * mark + "And these?", 3)]),
                (shown[:2], "<image> or <image>?\n\nlast\n", [("<image> or <image>?", 2), ("last", 2)]),
                ([*shown[:2], "Both?"], "", [(2 * mark + "Both?", 2)]),
                (["What?"], "Why?\n", [("What?", 0), ("Why?", 0)]),
                (["What?"], f"Why?\n{shown[0]} How?\n", [("What?", 0), ("Why?", 0), (mark + "How?", 1)]),
                ([], f"{shown[2]} What?\n", [(mark + "What?", 1)]), ([], "", [])):
            for kind, sign in (io.StringIO, ""), (Typed, "> "):
                asked.clear()
                if sign and "\n\n" in typed:  # where somebody types an empty line ends it, in a file it is none
                    expected = expected[:1]
                with unittest.mock.patch.object(llava_use, "Speaker", lambda *a: None), unittest.mock.patch.object(
                        llava_use, "say", say), unittest.mock.patch("sys.stdin", kind(typed)):
                    out = quietly("chat", "--run", "r", *given)
                assert [(turns[-1][0], len(widths)) for turns, widths in asked] == expected, (given, asked)
                assert all(widths == [16 + k for k in range(3)][:len(widths)] or widths == [18] for _, widths in asked)
                assert all(turns == [(expected[k][0], f"a{k + 1}" * (k < n)) for k in range(n + 1)]
                           for n, (turns, _) in enumerate(asked)), asked
                lines = len(expected) - (bool(given) and not os.path.isfile(given[-1])) + 1
                assert out == sign * lines, (given, out)
