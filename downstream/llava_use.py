"""Answers from a trained model: `answer` for files of questions, `chat` for people. The command line is llava.py's.

    answer   questions, JSON lines {"question_id", "text", "image": path, a list of them, or none} -> JSON lines as
             LLaVA writes them and downstream.vqa reads them, in the order of the questions
    chat     the words come as they are made; a line that begins with names of pictures shows these

Answers are greedy. In fp32 they do not depend on the batch: prompts are padded at their left and hidden there.
"""
import argparse
import contextlib
import glob
import itertools
import json
import os
import re
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from downstream.llava_data import Looker, expand, open_pictures, picture_names
from downstream.llava_model import load_run
from downstream.llava_prompts import MARK, Prompter
from encoder import MissingFile, UserError, one_line, write_atomically
from tools.job import Job
from tools.script import check_locks, make_folder, number, rank_and_device

NO_LIMIT = 10 ** 9


def add_commands(commands, on_gpu, workers):
    """answer and chat for the parser of the command line."""
    answer = commands.add_parser("answer", help="a file of questions -> a file of answers; the same command resumes")
    chat = commands.add_parser("chat", help="talk about pictures")
    for part in answer, chat:
        add = part.add_argument
        add("--run", required=True, metavar="FOLDER", help="of training")
        add("--llm", metavar="FOLDER|NAME", help="where its language model is now, if it was not trained")
        add("--bf16", action=argparse.BooleanOptionalAction, default=on_gpu, help="[%(default)s: with a GPU]")
    add = answer.add_argument
    add("--questions", required=True, metavar="FILE", help="JSON lines")
    add("--images", default=".", metavar="FOLDER", help="what the paths in --questions start from [%(default)s]")
    add("--answers", required=True, metavar="FILE", help="JSON lines")
    add("--batch_size", type=number(int, 1), default=16, help="per rank [%(default)s]")
    add("--max_new_tokens", type=number(int, 1), default=128, help="of an answer [%(default)s]")
    add("--workers", type=number(int, 0), default=workers, help="that load pictures, per rank [%(default)s]")
    add = chat.add_argument
    add("inputs", nargs="*", metavar="PICTURE .. QUESTION", help="more questions are read from standard input")
    add("--max_new_tokens", type=number(int, 1), default=512, help="of an answer [%(default)s]")


class Speaker:
    """A trained model with its prompts and its eyes."""

    def __init__(self, args, device):
        self.model, tokenizer, self.config = load_run(args.run, device, args.llm)
        llava = self.config["llava"]
        self.prompter = Prompter(tokenizer, llava["template"], llava["system"])
        self.looker = Looker(llava, self.model.encoder.vit.config)
        self.limit = args.max_new_tokens
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
        self.name = f"{os.path.basename(os.path.abspath(args.run))}-{self.config['id']}-{self.config['step']}"
        for p in self.model.llm.parameters():  # not the buffers: rotary frequencies need fp32
            p.data = p.data.to(torch.bfloat16 if args.bf16 else torch.float32)

    def tokens(self, asked):
        """Yields the next token of each of several prompts of `ask`, (B,); -1 after the end of an answer."""
        prompts, tiles, layouts = zip(*asked)
        tiles = torch.cat(tiles)
        if not len(tiles):  # see LLaVA.embed
            tiles = torch.zeros(1, *tiles.shape[1:], dtype=torch.uint8)
        with self.autocast:
            yield from self.model.generate(prompts, tiles, sum(map(list, layouts), []), self.limit,
                                           self.prompter.stop)


def ask(prompter, looker, turns, pictures):
    """(ids, tiles, layouts) of a conversation whose last answer is wanted."""
    tiles, layouts = looker(pictures)
    marks = sum(question.count(MARK) for question, _ in turns)
    if marks != len(pictures):
        raise UserError(f"{len(pictures)} pictures, but {marks} {MARK} in the questions: one for each, or none")
    ids = prompter.prompt(turns)
    if not ids:  # the plain template shows no words of a question, and not every tokenizer has a token that begins
        raise UserError("nothing is left to ask: a model of --template plain is shown a picture, and no words")
    return expand(ids, ids, layouts, NO_LIMIT)[0], tiles, layouts


def with_marks(text, pictures):
    """The question with MARK for each of its pictures, if it has none."""
    return text if MARK in text else (MARK + "\n") * pictures + text


def names_of(question):
    """The names of a question's pictures, a list. TypeError if "image" is neither a name, nor a list of names."""
    names = picture_names(question)
    if names is None:
        raise TypeError(f"image is {json.dumps(question['image'])}, not a path, nor a list of paths")
    return names


class Questions(Dataset):
    """The questions of a file, ready for the model: item n is (n, what `ask` makes)."""

    def __init__(self, path, folder, prompter, looker):
        self.folder, self.prompter, self.looker = folder, prompter, looker
        try:
            with open(path, encoding="utf-8") as f:
                self.lines = [json.loads(line) for line in f if line.strip()]
            self.asked = [(line["question_id"], line["text"] + "", names_of(line)) for line in self.lines]
        except OSError as e:
            raise MissingFile(f"--questions {path} cannot be read ({e.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"--questions {path} is no file of JSON lines with question_id, text and image "
                            f"({type(e).__name__}: {one_line(e)})") from None
        if not self.lines:
            raise UserError(f"--questions {path} is empty")

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, n):
        name, text, pictures = self.asked[n]
        try:
            turns = [(with_marks(text, len(pictures)), "")]
            return n, ask(self.prompter, self.looker, turns, open_pictures(pictures, self.folder))
        except UserError as e:
            raise UserError(f"question {name}: {e}; what is answered so far stays in .part files beside --answers, and "
                            "the same command goes on from there") from None


def list_parts(path):
    """The files of ranks beside an answers file: its name, .part, and digits alone."""
    beside = sorted(glob.glob(glob.escape(path) + ".part*"))
    return [name for name in beside if re.fullmatch(r"\d+", name.removeprefix(path + ".part"))]


def read_parts(path):
    """{number of the question: answer} of what ranks have answered so far. A line torn by a crash does not count."""
    found = {}
    for part in list_parts(path):
        with open(part, encoding="utf-8", errors="replace") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    n, found[n] = json.loads(line)
    return found


def answer(args):
    """Answer the questions that have no answer yet; several ranks share them. Each appends to a file of its own, and at
    the end rank 0 writes all in order."""
    args.out = None
    job = Job(args)
    if os.path.exists(args.answers):
        raise UserError(f"--answers {args.answers} is there already: move it away to answer again")
    make_folder(os.path.dirname(args.answers))
    speaker = Speaker(args, job.device)
    questions = Questions(args.questions, args.images, speaker.prompter, speaker.looker)
    settings = {"max_new_tokens": args.max_new_tokens, "bf16": args.bf16}
    done = job.gather(read_parts(args.answers))[0]
    for n, old in done.items():
        if n >= len(questions) or old["prompt"] != questions.asked[n][1] or old["model_id"] != speaker.name:
            raise UserError(f"{args.answers}.part* are of other questions or of another model ({old['model_id']}, not "
                            f"{speaker.name}): remove them to answer again")
        if old["metadata"] != settings:
            raise UserError(f"{args.answers}.part* were answered with {old['metadata']}, not with {settings}: give the "
                            "same flags, or remove them to answer again")
    left = [n for n in range(len(questions)) if n not in done]
    batches = [left[i:i + args.batch_size] for i in range(0, len(left), args.batch_size)][job.rank::job.ranks]
    check_locks(args.workers)
    loader = DataLoader(questions, batch_sampler=batches, num_workers=args.workers, collate_fn=list)
    part = f"{args.answers}.part{job.rank}"
    with open(part, "a", encoding="utf-8") as f:
        if f.tell():
            f.write("\n")  # ends a torn line
        for batch in tqdm(loader, desc="answer", unit="batch", disable=None if job.rank == 0 else True):
            tokens = torch.stack(list(speaker.tokens([asked for _, asked in batch])))  # (steps, B)
            for (n, _), ids in zip(batch, tokens.T.tolist()):
                question_id, prompt, _ = questions.asked[n]
                found = dict(question_id=question_id, prompt=prompt, answer_id=str(n), model_id=speaker.name,
                             text=speaker.prompter.text([i for i in ids if i >= 0]), metadata=settings)
                f.write(json.dumps([n, found]) + "\n")
            f.flush()
    job.gather(None)  # all have written
    if job.rank == 0:
        found = read_parts(args.answers)
        text = "".join(json.dumps(found[n], ensure_ascii=False) + "\n" for n in range(len(questions)))
        write_atomically(args.answers, lambda f: f.write(text.encode(errors="surrogatepass")))
        for path in list_parts(args.answers):
            os.remove(path)
        print(f"{args.answers}: {len(questions):,} answers by {speaker.name}")
    if job.ranks > 1:
        dist.barrier()


def say(speaker, turns, pictures):
    """Print the answer while it is made, and return it."""
    ids, shown = [], ""
    for token in speaker.tokens([ask(speaker.prompter, speaker.looker, turns, pictures)]):
        ids += [i for i in token.tolist() if i >= 0]
        text = speaker.prompter.text(ids)
        if not text.endswith("\ufffd"):  # half of a character
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()
    return speaker.prompter.text(ids)


def chat(args):
    """A conversation: the question of the command line, then those of standard input, each a line, which may begin with
    the paths of pictures. Where somebody types, an empty line ends it."""
    speaker = Speaker(args, rank_and_device()[2])
    *names, last = args.inputs or [""]
    if os.path.isfile(last):
        names, last = [*names, last], ""
    turns, pictures, interactive = [], [], sys.stdin.isatty()
    for first in itertools.count():
        if first or not last:
            if interactive:
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line or interactive and not line.strip():
                return
            words = line.split()
            if not words:
                continue
            is_file = lambda k: os.path.isfile(" ".join(words[:k]))  # a name may hold spaces
            while shown := next(filter(is_file, range(len(words), 0, -1)), 0):
                names, words = [*names, " ".join(words[:shown])], words[shown:]
            last = " ".join(words)
        pictures += open_pictures(names, "")
        turns.append((with_marks(last, len(names)), ""))
        turns[-1] = turns[-1][0], say(speaker, turns, pictures)
        names = []
