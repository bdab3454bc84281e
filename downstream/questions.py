"""The published files of the benchmarks of vqa.py -> questions, as LLaVA puts them to a model.

    benchmark  its files
    pope       coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (JSON lines): one or several
    mme        the folder MME_Benchmark_release_version, a folder for each task
    gqa        testdev_balanced_questions.json
    textvqa    TextVQA_0.5.1_val.json; --ocr TextVQA_Rosetta_OCR_v0.2_val.json: words that LLaVA's prompt shows
    vqav2      v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, or both; of the test set
               v2_OpenEnded_mscoco_test-dev2015_questions.json
    mmbench    mmbench_dev_20230712.tsv; --images FOLDER: where to write its pictures
    exact      a list of LLaVA conversations with one question each (easy-VQA)
    mmvet      mm-vet.json

A question is a dict with "question_id", "image" (below the folder of the images), "text", and where the files tell,
"label" and "category". A file of such dicts, JSON lines (.jsonl), is read for every benchmark: it is what
`python -m downstream.vqa questions` writes.
"""
import base64
import csv
import io
import itertools
import json
import os

from encoder import UserError, one_line
from tools.script import write_file

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MME_TASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()}
MME_ASKS = "Please answer yes or no."  # LLaVA asks with SHORT instead
ROTATED = 10 ** 6  # rows of MMBench from this number on repeat a question with its options in another order


def read_text(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            return f.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise UserError(f"{path}: {e.strerror.lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text (UTF-8)") from None


def read_json(path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is no JSON ({e})") from None


def parse_lines(path):
    """The dicts of a file of JSON lines."""
    found = []
    for n, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would also split within a text
        try:
            item = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as e:
            raise UserError(f"{path}, line {n}, is no JSON ({e})") from None
        if item is not None and not isinstance(item, dict):
            raise UserError(f"{path}, line {n}, is no JSON object")
        found += [item] * (item is not None)
    if not found:
        raise UserError(f"{path} is empty")
    return found


def pope(*paths):
    questions = []
    for path in paths:
        category = os.path.splitext(os.path.basename(path))[0].split("_")[-1]
        for line in parse_lines(path):
            question = dict(line)
            if "text" in line:
                question["text"] = line["text"].removesuffix(SHORT) + SHORT
            if len(paths) > 1:
                question |= {"question_id": f"{category}-{line['question_id']}", "category": category}
            questions.append(question)
    return questions


def mme(folder):
    questions = []
    for task in sorted({*MME_TASKS["perception"], *MME_TASKS["cognition"]}.intersection(os.listdir(folder))):
        apart = os.path.isdir(os.path.join(folder, task, "images"))  # from the texts
        pictures = f"{task}/images" if apart else task
        texts = os.path.join(folder, task, "questions_answers_YN") if apart else os.path.join(folder, task)
        images = {os.path.splitext(name)[0]: name for name in os.listdir(os.path.join(folder, pictures))
                  if not name.endswith(".txt")}
        for name in sorted(name for name in os.listdir(texts) if name.endswith(".txt")):
            image = images[name[:-4]]
            lines = read_text(os.path.join(texts, name)).split("\n")
            for n, line in enumerate(filter(str.strip, lines), 1):
                text, label = line.strip().split("\t")
                questions.append({"question_id": f"{task}/{image}#{n}", "image": f"{pictures}/{image}",
                                  "text": text.replace(MME_ASKS, "").strip() + SHORT,
                                  "label": label.strip().lower(), "category": task})
    return questions


def gqa(path):
    return [{"question_id": key, "image": x["imageId"] + ".jpg", "text": x["question"] + SHORT, "label": x["answer"],
             "category": "open" if x["types"]["structural"] == "query" else "binary"}
            for key, x in read_json(path).items() if x["isBalanced"]]


def textvqa(path, ocr=None):
    words = {x["image_id"]: ", ".join(x["ocr_tokens"]) for x in read_json(ocr)["data"]} if ocr else None
    questions = []
    for x in read_json(path)["data"]:
        hint = f"\nReference OCR token: {words[x['image_id']]}" if ocr else ""
        questions.append({"question_id": x["question_id"], "image": x["image_id"] + ".jpg",
                          "text": x["question"] + hint + SHORT})
        if "answers" in x:
            questions[-1]["label"] = x["answers"]
    return questions


def vqav2(*paths):
    questions = {}
    for file in map(read_json, paths):
        split = file["data_subtype"].replace("test-dev", "test")
        for x in file["questions"] if "questions" in file else file["annotations"]:
            question = questions.setdefault(x["question_id"], {"question_id": x["question_id"]})
            question["image"] = f"COCO_{split}_{x['image_id']:012d}.jpg"
            if "question" in x:
                question["text"] = x["question"] + SHORT
            if "answers" in x:
                question["label"] = [one["answer"] for one in x["answers"]]
                question["category"] = x["answer_type"].replace("/", "_")
    return list(questions.values())


def mmbench(path, images=None):
    csv.field_size_limit(2 ** 31 - 1)  # a field holds a picture
    questions = []
    for row in csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"):
        if int(row["index"]) >= ROTATED:
            continue
        empty = lambda name: (row.get(name) or "").lower() in ("", "nan", "none")
        letters = itertools.takewhile(lambda letter: not empty(letter), "ABCD")
        lines = [row["question"], *(f"{letter}. {row[letter]}" for letter in letters)]
        if not empty("hint"):
            lines.insert(0, row["hint"])
        name = row["index"] + ".jpg"
        questions.append({"question_id": int(row["index"]), "image": name, "text": "\n".join(lines) + LETTER})
        if not empty("answer"):
            questions[-1]["label"] = row["answer"]
        if images:
            write_file(os.path.join(images, name), base64.b64decode(row["image"]))
    return questions


def exact(path):
    questions = []
    for x in read_json(path):
        asked, answered = x["conversations"]
        question = {"question_id": x["id"], "text": asked["value"].replace("<image>", "").strip(),
                    "label": answered["value"]}
        questions.append({**question, **({"image": x["image"]} if "image" in x else {})})
    return questions


def mmvet(path):
    return [{"question_id": key, "image": x["imagename"], "text": x["question"]} for key, x in read_json(path).items()]


READERS = {"pope": pope, "mme": mme, "gqa": gqa, "textvqa": textvqa, "vqav2": vqav2, "mmbench": mmbench,
           "exact": exact, "mmvet": mmvet}


def read_questions(benchmark, paths, **options):
    """The questions of a benchmark's files, or of one question file (.jsonl). options: see `textvqa` and `mmbench`."""
    if len(paths) == 1 and paths[0].endswith(".jsonl") and benchmark != "pope":
        if options:
            raise UserError(f"--{' --'.join(options)} cannot change {paths[0]}, which is a question file already: give "
                            f"{benchmark}'s own files")
        questions = parse_lines(paths[0])
    else:
        try:
            questions = READERS[benchmark](*paths, **options)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            if isinstance(e, UserError):
                raise
            lacks = f", it has no {one_line(e)}" * isinstance(e, KeyError)
            raise UserError(f"{' '.join(paths)}: not in the format of {benchmark}{lacks}; downstream/questions.py "
                            "names the files that it takes") from None
        except (FileNotFoundError, NotADirectoryError) as e:
            raise UserError(f"{e.filename}: {e.strerror.lower()}") from None
    if not questions or any("question_id" not in x for x in questions):
        raise UserError(f"{' '.join(paths)}: no questions, or one without a question_id")
    return questions
