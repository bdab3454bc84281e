"""Prompts: a conversation about pictures as the ids and labels that a language model is trained on.

    prompter = Prompter(tokenizer, "vicuna")
    ids, labels = prompter.sample([("<image>\nWhat is it?", "A cat.")])     # one <image> for each picture
    ids = prompter.prompt([("<image>\nWhat is it?", "")])                   # what an answer is asked for by

A template turns a conversation into pieces: text, answer, text, answer, .., text. Every piece is encoded alone, and its
labels are written with its ids: an answer is a target, and so is the token that ends it, which is the first one of the
text that follows. Nothing is counted, so no tokenizer can make a sample's labels slip.
"""
import re

from downstream.llava_model import IGNORE, IMAGE
from encoder import UserError, one_line

MARK = "<image>"
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")
SYSTEMS = {"plain": "", "vicuna": VICUNA, "chat": "You are a helpful assistant."}  # what a prompt begins with


# ---- templates: turns, a list of (question, answer) -> [text, answer, text, answer, .., text] ----


def plain(turns, tokenizer, system):
    """LLaVA's first stage: picture and caption, without a question."""
    if len(turns) != 1:
        raise UserError(f"the plain template takes one question and its answer, not {len(turns)}")
    return [MARK * turns[0][0].count(MARK), turns[0][1] + "\n", ""]


def vicuna(turns, tokenizer, system):
    """Vicuna 1.1 and 1.5: the end of an answer is also what parts it from the next question."""
    # the answer follows a space. Llama's tokenizer sets one before every text; others must be given it
    sets_space = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))[0].startswith("\u2581")
    pieces, before = [], system + " " if system else ""
    for question, answer in turns:
        pieces += [f"{before}USER: {question} ASSISTANT:", answer if sets_space or not answer else " " + answer]
        before = tokenizer.eos_token
    return [*pieces, before]


def chat(turns, tokenizer, system):
    """The template that comes with the tokenizer: Qwen's, SmolLM's, Llama's. It is asked once, about placeholders: it
    may change or trim the texts, and these must be found again."""
    if not tokenizer.chat_template:
        raise UserError("the language model has no chat template: take --template vicuna, or an instruct model")
    mark = "\u27e6{}\u27e7".format
    messages = [{"role": "system", "content": system}] if system else []
    for k in range(len(turns)):
        messages += [{"role": role, "content": mark(2 * k + n)} for n, role in enumerate(("user", "assistant"))]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as e:  # a template may raise anything
        hint = 'try --system ""' if system else "take --template vicuna"
        raise UserError(f"the chat template refuses the conversation ({one_line(e)}): {hint}") from None
    pieces = re.split("|".join(mark(n) for n in range(2 * len(turns))), text)
    if len(pieces) != 2 * len(turns) + 1 or any(text.count(mark(n)) != 1 for n in range(2 * len(turns))):
        raise UserError("the chat template does not show every message once: take --template vicuna")
    result = []
    for k, (question, answer) in enumerate(turns):  # some templates set a blank before the token that ends an answer
        result += [pieces[2 * k].lstrip(" ") + question + pieces[2 * k + 1], answer]
    result.append(pieces[-1].lstrip(" "))
    if not result[-1].startswith(tuple(special_tokens(tokenizer))):  # the model must learn where an answer ends
        raise UserError(f"the chat template ends an answer by {pieces[-1][:20]!r}, which is no special token: take "
                        "--template vicuna")
    return result


TEMPLATES = {"plain": plain, "vicuna": vicuna, "chat": chat}


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def special_tokens(tokenizer):
    """The texts that a tokenizer takes for one of its control tokens, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)


class Prompter:
    """Makes ids and labels of conversations, by one of TEMPLATES. system: None for the template's own."""

    def __init__(self, tokenizer, template, system=None):
        self.tokenizer, self.template = tokenizer, TEMPLATES[template]
        self.system = SYSTEMS[template] if system is None else system
        if template == "vicuna" and not tokenizer.eos_token:
            raise UserError("the language model's tokenizer has no end token, which --template vicuna needs")
        control = [re.escape(token) for token in special_tokens(tokenizer) if token != MARK]
        self.control = re.compile("|".join(control)) if control else None
        self.start = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
        ends = self.pieces([("a", "b")])[2] or "\n"  # the plain template ends a caption by a new line
        self.stop = sorted({encode(tokenizer, ends)[-1 if template == "plain" else 0], tokenizer.eos_token_id} - {None})

    def pieces(self, turns):
        turns = [(picture_first(self.clean(question)), self.clean(answer)) for question, answer in turns]
        return self.template(turns, self.tokenizer, self.system)

    def clean(self, text):
        """The text without what the tokenizer would take for a control token: </s> in an answer would end it."""
        while self.control and self.control.search(text):  # again, as the rest may form a new one
            text = self.control.sub("", text)
        return text

    def encode(self, turns):
        """The ids of every piece, as lists. A picture is one IMAGE."""
        found = [encode(self.tokenizer, piece) if k % 2 else self.encode_text(piece)
                 for k, piece in enumerate(self.pieces(turns))]
        if found[0][:1] != self.start:  # some chat templates write it themselves
            found[0] = self.start + found[0]
        return found

    def encode_text(self, text):
        """Ids of a text with IMAGE for each MARK. What is between two pictures is encoded alone, as LLaVA does."""
        ids = []
        for k, part in enumerate(text.split(MARK)):
            ids += [IMAGE] * (k > 0) + encode(self.tokenizer, part)
        return ids

    def sample(self, turns):
        """(ids, labels) of a conversation, as lists."""
        ids, labels = [], []
        for k, piece in enumerate(self.encode(turns)):
            ids += piece
            trained = len(piece) if k % 2 else min(k, len(piece), 1)  # an answer; what ends it
            labels += piece[:trained] + [IGNORE] * (len(piece) - trained)
        return ids, labels

    def prompt(self, turns):
        """Ids up to the place of the last answer, which is not looked at."""
        return sum(self.encode([*turns[:-1], (turns[-1][0], "a")])[:-2], [])

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def picture_first(question):
    """LLaVA's place of a single picture: before the question, on a line of its own. Several stay where they are."""
    if question.count(MARK) != 1:
        return question
    return f"{MARK}\n{question.replace(MARK, '').strip()}".strip()
