"""Scores of a vision-language model's answers: the benchmarks of Table 2, as their authors compute them.

    python -m downstream.vqa questions pope coco_pope_*.json --out pope.jsonl   # for downstream.llava answer
    python -m downstream.vqa pope answers.jsonl pope.jsonl                      # a name and a value in each line
    python -m downstream.vqa submit mmvet answers.jsonl --out mmvet.json        # for a server: nothing is scored here

The answers are JSON lines as LLaVA writes them: {"question_id", "prompt", "text", ..}. The labels are the benchmark's
own files (downstream/questions.py names them), or the question file that `questions` has made of these. Each question
must have exactly one answer.

    pope       accuracy precision recall f1 yes_ratio, from 0 to 1. Of several files each of these, and mean_f1, which
               Table 2 shows
    mme        of each task 100 (accuracy + the part of the images with both answers right); perception and cognition
               are the sums over their tasks
    gqa        accuracy in percent, also of binary and of open questions
    textvqa    soft accuracy in percent: one annotator after another is left out, and the mean taken of
               min(1, matches among the other nine / 3)
    vqav2      the same, also by type of answer (val; test-dev's labels are on a server)
    mmbench    vanilla_accuracy in percent, which is NOT the official figure: that asks each question in all rotations
    exact      accuracy in percent, also of yes/no and of other questions (easy-VQA)

Every scorer is a function of two lists: the texts, and their questions, which are dicts with "question_id", "label" and
what else the function names.
"""
import argparse
import json
import os
import re
from collections import Counter

from downstream.questions import MME_ASKS, MME_TASKS, READERS, parse_lines, read_questions
from encoder import UserError, one_line
from tools.script import check_output, run_command, write_file

ALL_MME_TASKS = MME_TASKS["perception"] + MME_TASKS["cognition"]
BY_PICTURE = "mme", "textvqa"  # in LLaVA's own question files for these, question_id is that of the picture
SERVERS = {"mmvet": "MM-Vet's online evaluator, where GPT-4 judges", "vqav2": "VQA's challenge on EvalAI, test-dev"}

# ---- what VQA's and TextVQA's scorers make of an answer before they compare it ----

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've""".split()
# a spelling that lacks one apostrophe -> the right one; the published table has one entry the wrong way round
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in CONTRACTED for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


def strip_punctuation(text):
    """Punctuation becomes a space; nothing, where the same sign also stands beside a space, or where the text has a
    comma between digits. A period goes unless a digit follows."""
    joined = re.search(r"\d,\d", text)
    found = text
    for sign in PUNCTUATION:
        found = found.replace(sign, "" if joined or sign + " " in text or " " + sign in text else " ")
    return re.sub(r"\.(?!\d)", "", found, count=32)  # their re.sub has a flag, 32, where it takes the count


def plain_words(text):
    """Lower case, number words as digits, no articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def normalise(text):
    """An answer as TextVQA's scorer reads it, and as LLaVA sends it to VQAv2's."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return plain_words(strip_punctuation(one_spaced(text)))


def one_spaced(text):
    """Without line breaks, tabs, and space at its ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(text, answers):
    """Mean over the annotators of min(1, matches among the other annotators / 3)."""
    matches = [answer == text for answer in answers]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / len(answers)


# ---- scorers: texts (what the model says) and questions, in the same order -> {name: figure} ----

def mean(values):
    values = list(values)
    return sum(values) / len(values)


def percentages(scores, groups):
    """Mean score in percent: of all, and of each group. groups: a name for each score."""
    found = {"accuracy": 100 * mean(scores)}
    for name in sorted(set(groups)):
        found[name] = 100 * mean(score for score, group in zip(scores, groups) if group == name)
    return found


def pope_says_yes(text):
    """Yes, unless the first sentence has one of three words, between spaces: "no!" and "NO" are no such words."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def pope_of_one_file(texts, questions):
    pairs = Counter((pope_says_yes(text), question["label"] == "yes") for text, question in zip(texts, questions))
    right, wrong, missed = pairs[True, True], pairs[True, False], pairs[False, True]
    precision = right / max(1, right + wrong)  # 0 where the authors' code divides by 0, and so below
    recall = right / max(1, right + missed)
    return {"accuracy": (right + pairs[False, False]) / len(texts), "precision": precision, "recall": recall,
            "f1": 2 * right / max(1, 2 * right + wrong + missed), "yes_ratio": (right + wrong) / len(texts)}


def pope(texts, questions):
    """"label" is yes or no. Questions with a "category" are scored by category."""
    check(questions, "label", "yes or no", lambda x: x in ("yes", "no"))
    check(questions, "category", "none that is a task of MME", lambda x: x not in ALL_MME_TASKS)
    categories = [question.get("category") for question in questions]
    if set(categories) == {None}:
        return pope_of_one_file(texts, questions)
    found, f1 = {}, []
    for category in sorted(set(categories), key=str):
        chosen = [i for i, x in enumerate(categories) if x == category]
        figures = pope_of_one_file([texts[i] for i in chosen], [questions[i] for i in chosen])
        found.update((f"{category}_{name}", value) for name, value in figures.items())
        f1.append(figures["f1"])
    return found | {"mean_f1": mean(f1)}


def mme_reads(text):
    """yes, no or other, by the first four characters."""
    start = text.lower().strip().replace(".", "")[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(texts, questions):
    """"label" is yes or no, "category" the task; each "image" has two questions."""
    check(questions, "label", "yes or no", lambda x: x in ("yes", "no"))
    check(questions, "category", f"one of {' '.join(ALL_MME_TASKS)}", lambda x: x in ALL_MME_TASKS)
    right = {}  # task -> image -> whether each of its answers is right
    for text, question in zip(texts, questions):
        images = right.setdefault(question["category"], {})
        images.setdefault(question["image"], []).append(mme_reads(text) == question["label"])
    found = {}
    for task, images in right.items():
        odd = [image for image, answers in images.items() if len(answers) != 2]
        if odd:
            raise UserError(f"MME's task {task} has {len(images[odd[0]])} questions on {odd[0]}; expected two")
        found[task] = 100 * (mean(mean(answers) for answers in images.values()) + mean(map(all, images.values())))
    for name, tasks in MME_TASKS.items():
        missing = [task for task in tasks if task not in found]
        if not missing:
            found[name] = sum(found[task] for task in tasks)
        elif len(missing) < len(tasks):
            raise UserError(f"MME's {name} needs all of its tasks; missing: {' '.join(missing)}")
    return found


def gqa(texts, questions):
    """"category" is binary or open."""
    check(questions, "category", "binary or open", lambda x: x in ("binary", "open"))
    scores = [text.rstrip(".").lower() == question["label"] for text, question in zip(texts, questions)]
    return percentages(scores, [question["category"] for question in questions])


def textvqa(texts, questions):
    """"label" is the list of ten annotators' answers; there is no "category"."""
    check(questions, "label", "10 annotators' answers", lambda x: isinstance(x, list) and len(x) == 10)
    check(questions, "category", "none", lambda x: x is None)
    return {"accuracy": 100 * mean(soft_accuracy(normalise(text), list(map(normalise, question["label"])))
                                   for text, question in zip(texts, questions))}


def vqav2_score(text, answers):
    """Soft accuracy as VQA's own scorer computes it. Where all annotators agree it compares the letters as they are."""
    text, answers = one_spaced(text), list(map(one_spaced, answers))
    if len(set(answers)) > 1:
        text, *answers = (plain_words(strip_punctuation(x)) for x in (text, *answers))
    return soft_accuracy(text, answers)


def vqav2(texts, questions):
    """"label" is the list of ten annotators' answers, "category" the type of answer. The model's answers
    are normalised first, as LLaVA does before it sends them to the server."""
    check(questions, "label", "10 annotators' answers", lambda x: isinstance(x, list) and len(x) == 10)
    check(questions, "category", "yes_no, number or other", lambda x: x in ("yes_no", "number", "other"))
    scores = [vqav2_score(normalise(text), question["label"]) for text, question in zip(texts, questions)]
    return percentages(scores, [question["category"] for question in questions])


def read_letter(text):
    """The option that an answer names, as LLaVA finds it: "B", "B. ..", or one "The answer is B" that goes on (with a
    period, say). None for any other answer."""
    if text in ("A", "B", "C", "D", "E") or text[:1] in ("A", "B", "C", "D", "E") and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def mmbench(texts, questions):
    """"label" is a letter. unread: the part of the answers that name no letter, and so are wrong."""
    check(questions, "label", "a letter from A to E", lambda x: x in list("ABCDE"))
    letters = [read_letter(text) for text in texts]
    return {"vanilla_accuracy": 100 * mean(x == question["label"] for x, question in zip(letters, questions)),
            "unread": 100 * letters.count(None) / len(letters)}


def exact(texts, questions):
    """Whether an answer is the label, apart from case, space at the ends, and a period at the end."""
    check(questions, "label", "a text", lambda x: isinstance(x, str))
    plain = lambda x: x.strip().rstrip(".").lower()
    scores = [plain(text) == plain(question["label"]) for text, question in zip(texts, questions)]
    return percentages(scores, ["yes_no" if plain(question["label"]) in ("yes", "no") else "other"
                                for question in questions])


def check(questions, key, expected, right):
    """Raise UserError for a question that has another value there, such as one of another benchmark."""
    for question in questions:
        if not right(question.get(key)):
            raise UserError(f"question {question['question_id']} has the {key} {one_line(question.get(key))}; expected "
                            f"{expected}: give this benchmark's own files")


SCORERS = {"pope": pope, "mme": mme, "gqa": gqa, "textvqa": textvqa, "vqav2": vqav2, "mmbench": mmbench, "exact": exact}


# ---- the command line ----

def read_answers(path):
    """The lines of an answers file, each with its question_id and text."""
    answers = parse_lines(path)
    for n, answer in enumerate(answers, 1):
        if not isinstance(answer.get("text"), str) or "question_id" not in answer:
            raise UserError(f"{path}: answer {n} has no question_id or no text; expected JSON lines as "
                            "downstream.llava answer writes them")
    return answers


def picture_key(name, text):
    """What names a question where question_id is the picture's: task, picture and the first line of the prompt."""
    task, _, image = name.rpartition("/")
    text = text.split("\n")[0].replace(MME_ASKS, "").strip().lower()
    return task.split("/")[0], os.path.splitext(image)[0], text


def by_id(path, items, key):
    """{key(item): item}, where two items must not have one key."""
    found = {key(item): item for item in items}
    if len(found) < len(items):
        (twice, n), = Counter(map(key, items)).most_common(1)
        raise UserError(f"{path} has question {one_line(twice)} {n} times; expected once")
    return found


def match(answers_file, answers, labels_file, questions, by_picture=False):
    """(texts, questions), in the order of the questions. Raises UserError unless each question has one answer."""
    key = wanted = lambda item: str(item["question_id"])
    if by_picture and not set(map(key, answers)) & set(map(key, questions)):
        key = lambda item: picture_key(str(item["question_id"]), item.get("prompt", ""))
        wanted = lambda item: picture_key(item.get("image", ""), item.get("text", ""))
    answers, questions = by_id(answers_file, answers, key), by_id(labels_file, questions, wanted)
    for one, other, words in ((questions, answers, "{0} lacks {n} of the {1} questions of {2}"),
                              (answers, questions, "{0} has {n} answers to questions that {2} does not ask")):
        gone = [x for x in one if x not in other]
        if gone:
            raise UserError(words.format(answers_file, len(one), labels_file, n=len(gone))
                            + f", the first is {one_line(gone[0])}: answer exactly these questions")
    return [answers[x]["text"] for x in questions], list(questions.values())


def score(args):
    questions = read_questions(args.command, args.labels)
    unlabelled = [x["question_id"] for x in questions if "label" not in x]
    if unlabelled:
        raise UserError(f"{args.labels[0]} has no label for question {unlabelled[0]}: give the benchmark's annotations")
    found = SCORERS[args.command](*match(args.answers, read_answers(args.answers), args.labels[0], questions,
                                         args.command in BY_PICTURE))
    for name, value in found.items():
        print(f"{name} {value:.4f}")
    if args.out:
        write_file(args.out, json.dumps(found, indent=1).encode())


def write_questions(args):
    options = {name: getattr(args, name) for name in ("ocr", "images") if getattr(args, name)}
    for name, benchmark in ("ocr", "textvqa"), ("images", "mmbench"):
        if name in options and args.benchmark != benchmark:
            raise UserError(f"--{name} is for {benchmark}; leave it out")
    questions = read_questions(args.benchmark, args.files, **options)
    asked = [x for x in questions if "text" in x]
    if not asked:
        raise UserError(f"{args.files[0]} has labels, but no questions: give the benchmark's questions too")
    write_file(args.out, "".join(json.dumps(x) + "\n" for x in asked).encode())
    print(f"{args.out}: {len(asked)} questions")


def submit(args):
    """MM-Vet: {"v1_0": text}. VQAv2: a normalised answer to each question of the test set, "" where there is none."""
    if bool(args.questions) != (args.benchmark == "vqav2"):
        raise UserError("VQAv2's server wants every question of the test set, so give "
                        "v2_OpenEnded_mscoco_test2015_questions.json too; MM-Vet's takes the answers alone")
    answers = by_id(args.answers, read_answers(args.answers), lambda x: str(x["question_id"]))
    if args.benchmark == "mmvet":
        found = {"v1_" + key.removeprefix("v1_"): answer["text"] for key, answer in answers.items()}
    else:
        asked = by_id(args.questions, read_questions("vqav2", [args.questions]), lambda x: str(x["question_id"]))
        surplus = [x for x in answers if x not in asked]
        if surplus:
            raise UserError(f"{args.answers} answers question {surplus[0]}, which {args.questions} does not ask")
        found = [{"question_id": x["question_id"], "answer": normalise(answers[key]["text"]) if key in answers else ""}
                 for key, x in asked.items()]
    write_file(args.out, json.dumps(found, indent=1).encode())
    print(f"{args.out}: {len(answers)} answers, for {SERVERS[args.benchmark]}. Nothing was scored here.")


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True, metavar="BENCHMARK | questions | submit")
    for name in SCORERS:
        scorer = commands.add_parser(name, help=f"score answers to {name}'s questions")
        scorer.add_argument("answers", metavar="ANSWERS", help="JSON lines, as downstream.llava answer writes them")
        scorer.add_argument("labels", metavar="LABELS", nargs="+", help="the benchmark's files, or the question file")
        scorer.add_argument("--out", metavar="FILE", help="also write the figures as JSON")
    questions = commands.add_parser("questions", help="make the question file for downstream.llava answer")
    questions.add_argument("benchmark", choices=READERS)
    questions.add_argument("files", metavar="FILE", nargs="+", help="the benchmark's own files")
    questions.add_argument("--ocr", metavar="FILE", help="textvqa: TextVQA_Rosetta_OCR_v0.2_val.json, words to show")
    questions.add_argument("--images", metavar="FOLDER", help="mmbench: write the pictures of its table there")
    questions.add_argument("--out", required=True, metavar="FILE")
    server = commands.add_parser("submit", help="write what a benchmark's server takes")
    server.add_argument("benchmark", choices=SERVERS)
    server.add_argument("answers", metavar="ANSWERS")
    server.add_argument("questions", metavar="QUESTIONS", nargs="?", help="vqav2: all questions of the test set")
    server.add_argument("--out", required=True, metavar="FILE")
    args = ap.parse_args(argv)
    given = [x for name, x in vars(args).items() if x and name not in ("out", "images", "command", "benchmark")]
    check_output(args.out, *(path for x in given for path in (x if isinstance(x, list) else [x])))
    {"questions": write_questions, "submit": submit}.get(args.command, score)(args)


if __name__ == "__main__":
    run_command(main, "downstream/vqa.py")
