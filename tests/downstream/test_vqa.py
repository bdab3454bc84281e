"""downstream/vqa.py: scores worked by hand, the benchmarks' files, what a user gets wrong."""
from tests.helpers import raises, refused, run  # first: it sets the environment that torch reads

import base64
import contextlib
import io
import json
import os
import tempfile
import unittest.mock
import zipfile
import zlib

import numpy as np

import encoder
from downstream import questions, vqa
from encoder import UserError
from experiments.understanding import prepare, tsne
from tools.script import write_file

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write(folder, name, content):
    """Path of a file: of lines if its name ends in .jsonl, else of JSON; a str is written as it is."""
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not isinstance(content, str):
        lines = name.endswith(".jsonl")
        content = "".join(json.dumps(x) + "\n" for x in content) if lines else json.dumps(content)
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(content)
    return path


def answers_of(texts):
    return [{"question_id": key, "prompt": "", "text": text} for key, text in texts.items()]


def labelled(labels, **more):
    """Questions with these labels; more: a list for each further key."""
    return [{"question_id": n, "label": label, **{key: values[n] for key, values in more.items()}}
            for n, label in enumerate(labels)]


def quietly(*flags):
    """What downstream.vqa prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        vqa.main(list(map(str, flags)))
    return out.getvalue()


def same(found, expected):
    assert list(found) == list(expected), (list(found), list(expected))
    for name, value in expected.items():
        assert abs(found[name] - value) < 1e-9, (name, found[name], value)


def test_answers_are_normalised_as_published():
    """By hand, as VQA's and TextVQA's scorers do: case, numbers, articles, contractions, punctuation."""
    for text, expected in {
            "Two.": "2", "None": "0", "zero": "0", "ten cats": "10 cats", "eleven": "eleven",
            "The  Cat\tand a\ndog ": "cat and dog", "an": "", "another": "another", "theatre": "theatre",
            "dont": "don't", "DONT": "don't", "don't": "don't", "couldnt've": "couldn't've",
            "couldn'tve": "couldn't've",
            "couldntve": "couldntve", "yall'd've": "y'all'd've", "'ow'sat": "'ow 'sat", "oclock": "o'clock",
            "twas": "'twas", "somebody'd": "somebodyd", "somebodyd've": "somebody'd've", "hes": "he's", "wed": "wed",
            "shes": "shes", "Im": "im", "lets": "lets",
            "it's": "it 's", "what's the time?": "what 's time", "cats'": "cats'",
            "red-blue": "red blue", "red - blue": "red blue", "left-hand - side": "lefthand side", "a-b": "b",
            "yes/no": "yes no", "yes/no / x": "yesno x", "x-y -z": "xy z", "(x)-y-z": "x y z",
            "(yes)": "yes", "what?!": "what", "x!y": "x y",
            "1,000": "1000", "1,000-2": "1000 2", "one,two": "onetwo", "one, two": "1 2",
            "3.5 m.": "3.5 m", "p.m.": "pm", ".5": ".5", "...5": ".5", "no. 5": "no 5",
            "$5": "$5", "5%": "5%", "a&b": "a&b", "a:b": "a:b", "what*": "what*", "100°": "100°",
            "[x]{y}=z+w\\v_u>t<s@r`q": "x y z w v u t s r q", '"quoted"': "quoted", ";": ""}.items():
        assert vqa.normalise(text) == expected, (text, vqa.normalise(text), expected)
    # VQA's own scorer keeps commas until then: one between digits joins everything
    for text, expected in {"1,000 (x-y)": "1000 xy", "a,b": "a b", "a, b": "a b", "1,x": "1 x", "x,1": "x 1",
                           33 * "a.": 33 * "a" + "."}.items():
        assert vqa.strip_punctuation(text) == expected, (text, vqa.strip_punctuation(text))
    assert vqa.plain_words("'ow'sat Yall'll it's What's") == "'ow's'at y'all'll it's what's"
    # a word with n apostrophes has n wrong spellings
    assert len(vqa.CONTRACTIONS) == len(vqa.CONTRACTED) + sum(word.count("'") - 1 for word in vqa.CONTRACTED) + 1
    assert all(value.replace("'", "") == key.replace("'", "") for key, value in vqa.CONTRACTIONS.items())
    assert [key for key, value in vqa.CONTRACTIONS.items() if len(key) != len(value) - 1] == ["somebody'd"]
    # compared by hand with the published table, without its entries in capitals and those that change nothing
    assert len(vqa.CONTRACTIONS) == 114 and zlib.crc32(" ".join(sorted(vqa.CONTRACTIONS)).encode()) == 3717871021
    for sign in vqa.PUNCTUATION:
        assert vqa.strip_punctuation(f"x{sign}y") == "x y" and vqa.strip_punctuation(f"x{sign} y") == "x y"
    assert sorted(vqa.PUNCTUATION) == sorted("""!"()+,-/;<=>?@[\\]_`{}""")
    numbers = "none one two three four five six seven eight nine ten".split()
    assert vqa.NUMBERS == {word: str(n) for n, word in enumerate(numbers)} | {"zero": "0"}


def test_soft_accuracy_by_hand():
    """k of ten annotators agree: 0, .3, .6, .9, 1: of nine others min(1, k / 3), or (k - 1) / 3 for those who agree."""
    for k, expected in enumerate((0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1)):
        assert abs(vqa.soft_accuracy("x", ["x"] * k + list("abcdefghij")[k:]) - expected) < 1e-12, k
    assert abs(vqa.soft_accuracy("x", list("xxy")) - (1 / 3 + 1 / 3 + 2 / 3) / 3) < 1e-12


def test_textvqa_by_hand():
    ten = lambda *some: [*some, *(f"other {n}" for n in range(10 - len(some)))]
    found = vqa.textvqa(["Nokia.", "the 3", "STOP", "unanswerable"],
                        labelled([ten("nokia", "Nokia", "NOKIA "), ten("three", "3"), ten("stop!"), ten("x")]))
    same(found, {"accuracy": 100 * (0.9 + 0.6 + 0.3 + 0) / 4})
    raises(UserError, vqa.textvqa, ["x"], labelled([["x"] * 9]), words=["10 annotators"])
    raises(UserError, vqa.textvqa, ["x"] * 2, labelled([["x"] * 10, ["x"] * 11]), words=["10 annotators"])


def test_vqav2_by_hand():
    """Where all annotators wrote the same, VQA's scorer compares letters; else it normalises both sides."""
    assert vqa.vqav2_score("The Dog", ["The Dog"] * 10) == 1 and vqa.vqav2_score("dog", ["The Dog"] * 10) == 0
    assert vqa.vqav2_score("dog", ["The Dog\n"] * 9 + ["cat"]) == 1 and vqa.vqav2_score(" a\tb ", ["a b\n"] * 10) == 1
    assert abs(vqa.vqav2_score("two", ["2"] * 2 + ["two"] + ["five"] * 7) - 0.9) < 1e-12
    assert vqa.vqav2_score("1000 xy", ["1,000 (x-y)"] * 9 + ["z"]) == 1
    found = vqa.vqav2(["Yes.", "the 2", "A red-ish one", "No"],
                      labelled([["yes"] * 10, ["2"] * 4 + ["two"] * 6, ["red ish 1"] * 2 + list("bcdefghi"),
                                ["yes"] * 10], category=["yes_no", "number", "other", "yes_no"]))
    same(found, {"accuracy": 100 * (1 + 1 + 0.6 + 0) / 4, "number": 100, "other": 60, "yes_no": 50})


def test_pope_by_hand():
    for text, yes in {"Yes": True, "yes.": True, "No": False, "no": False, "No, there is none": False, "NO": True,
                      "no!": True, "No\n": True, "Not really": True, "It is not": False, "There is no dog. Yes": False,
                      "Yes. No": True, "nothing": True, "": True, ". No": True, "Well,no": True, "So, no": False,
                      "I do n,o": False, "none": True, "cannot": True}.items():
        assert vqa.pope_says_yes(text) is yes, text
    labels = ["yes"] * 5 + ["no"] * 5
    texts = ["Yes", "Yes", "yes", "No", "no"] + ["Yes", "No", "No", "no", "There is no cat"]  # TP 3, FN 2, FP 1, TN 4
    one = {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes_ratio": 0.4}
    same(vqa.pope(texts, labelled(labels)), one)
    same(vqa.pope(["no"] * 2, labelled(["yes", "no"])), dict(accuracy=0.5, precision=0, recall=0, f1=0, yes_ratio=0))
    same(vqa.pope(["yes"] * 2, labelled(["no"] * 2)), dict(accuracy=0, precision=0, recall=0, f1=0, yes_ratio=1))
    two = vqa.pope(texts + ["Yes", "No"], labelled(labels + ["yes", "no"], category=["b"] * 10 + ["a"] * 2))
    perfect = {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
    same(two, {**{f"a_{k}": v for k, v in perfect.items()}, **{f"b_{k}": v for k, v in one.items()},
               "mean_f1": (1 + 2 / 3) / 2})
    same(vqa.pope(["no", "yes"], [*labelled(["no"], category=["b"]), *labelled(["no"])]), {
        **{f"None_{k}": v for k, v in dict(accuracy=0, precision=0, recall=0, f1=0, yes_ratio=1).items()},
        **{f"b_{k}": v for k, v in dict(accuracy=1, precision=0, recall=0, f1=0, yes_ratio=0).items()}, "mean_f1": 0})
    refused(UserError, vqa.pope, ["no"], labelled(["No"]), says=(
        "question 0 has the label No; expected yes or no: give this benchmark's own files"))
    refused(UserError, vqa.pope, ["no", "no"], labelled(["yes", "maybe"]), says=(
        "question 1 has the label maybe; expected yes or no: give this benchmark's own files"))


def mme_set(**wrong):
    """(texts, questions) of all of MME's tasks, two images each; wrong: task -> how many of its four answers are wrong,
    those of the first image first."""
    texts, asked = [], []
    for tasks in vqa.MME_TASKS.values():
        for task in tasks:
            for n in range(4):
                label = "yes" if n % 2 else "no"
                right = n >= wrong.get(task, 0)
                texts.append({"yes": "no", "no": "yes"}[label] if not right else label)
                asked.append(dict(question_id=f"{task}{n}", image=f"{task}/{n // 2}.jpg", label=label, category=task))
    return texts, asked


def test_mme_by_hand():
    for text, word in {"Yes": "yes", " NO. ": "no", "yes, it is": "yes", "Not": "no", "know": "no", "a no": "no",
                       "The answer is no": "other", "": "other", "n.o": "no", "ah, no": "other", "noyes": "no",
                       "yes no": "yes", "xyes": "yes", "xxyes": "other", "nyes": "yes"}.items():
        assert vqa.mme_reads(text) == word, (text, vqa.mme_reads(text))
    found = vqa.mme(*mme_set())
    assert found["perception"] == 2000 and found["cognition"] == 800 and len(found) == 16 and found["OCR"] == 200
    # existence: 3 of 4 right, one image of two; OCR: 2 of 4 (one image wholly wrong); code: 1 of 4, none
    found = vqa.mme(*mme_set(existence=1, OCR=2, code_reasoning=3))
    assert (found["existence"], found["OCR"], found["code_reasoning"]) == (75 + 50, 50 + 50, 25 + 0)
    assert (found["perception"], found["cognition"]) == (2000 - 75 - 100, 800 - 175)
    texts, asked = mme_set()
    order = np.random.default_rng(0).permutation(len(asked))  # an image's questions need not follow each other
    assert vqa.mme([texts[n] for n in order], [asked[n] for n in order])["perception"] == 2000
    one_part = [n for n, x in enumerate(asked) if x["category"] in vqa.MME_TASKS["cognition"]]
    found = vqa.mme([texts[n] for n in one_part], [asked[n] for n in one_part])
    assert found["cognition"] == 800 and "perception" not in found
    assert set(vqa.MME_TASKS["perception"]) == {"OCR", "artwork", "celebrity", "color", "count", "existence",
                                                "landmark", "position", "posters", "scene"}, "the folders' names"
    assert set(vqa.MME_TASKS["cognition"]) == {"code_reasoning", "commonsense_reasoning", "numerical_calculation",
                                               "text_translation"}
    gone = [n for n, x in enumerate(asked) if x["category"] not in ("existence", "OCR")]
    refused(UserError, vqa.mme, [texts[n] for n in gone], [asked[n] for n in gone], says=(
        "MME's perception needs all of its tasks; missing: existence OCR"))
    refused(UserError, vqa.mme, [*texts, "yes"], [*asked, asked[0]], says=(
        "MME's task existence has 3 questions on existence/0.jpg; expected two"))
    raises(UserError, vqa.mme, texts[4:], asked[4:], words=["perception", "existence"])
    raises(UserError, vqa.mme, texts[1:], asked[1:], words=["1 questions", "existence/0.jpg", "two"])
    raises(UserError, vqa.mme, texts[:3] + texts[4:], asked[:3] + asked[4:], words=["1 questions", "existence/1.jpg"])
    odd = [{**asked[0], "label": "Yes"}, *asked[1:]]
    raises(UserError, vqa.mme, texts, odd, words=["existence0", "label Yes"])


def test_gqa_mmbench_and_exact_by_hand():
    asked = labelled(["yes", "red", "yes", "cat", "left"], category=["binary", "open", "binary", "open", "open"])
    same(vqa.gqa(["Yes.", "RED...", " yes", "cats", "left. "], asked),
         {"accuracy": 40, "binary": 50, "open": 100 / 3})
    for text, letter in {"B": "B", "B. a cat": "B", "B.": None, "b": None, "B a": None, "B) x": None, " B": None,
                         "F": None, "E": "E", "E. x": "E", "F. x": None,
                         "The answer is C.": "C", "The answer is C": None,
                         "So: The answer is D, I think": "D", "The answer is A. The answer is B.": None,
                         "the answer is A.": None, "The answer is Z.": "Z", "": None, "A. or B": "A"}.items():
        assert vqa.read_letter(text) == letter, (text, vqa.read_letter(text))
    assert all(vqa.read_letter(x) == vqa.read_letter(x + ". x") == x for x in "ABCDE")
    same(vqa.mmbench(["A", "B. x", "C", "d"], labelled("ABDD")), {"vanilla_accuracy": 50, "unread": 25})
    same(vqa.exact(["Yes.", " RED ", "no", "blue green"], labelled(["yes", "red", "yes", "blue"])),
         {"accuracy": 50, "other": 50, "yes_no": 50})
    same(vqa.exact(["x", "y"], labelled(["No.", "yes"])), {"accuracy": 0, "yes_no": 0})


def published(folder):
    """{benchmark: its files}, small, in the published formats."""
    pope = [{"question_id": n, "image": f"COCO_val2014_{n}.jpg", "text": f"Is there a cat {n}?", "label": label}
            for n, label in ((1, "yes"), (2, "no"))]
    lines = "".join(json.dumps(x) + "\n" for x in pope)
    mme = os.path.join(folder, "MME")
    write(mme, "count/000.txt", "Is there one? Please answer yes or no.\tYes\r\n"
                                "Are there two?  Please answer yes or no.\tNo\n\n")
    write(mme, "count/000.jpg", "x")
    write(mme, "artwork/questions_answers_YN/7.txt", "Is it\u2028old? Please answer yes or no.\tNo\nNew?\tYes")
    write(mme, "artwork/images/7.png", "x")
    write(mme, "README.txt", "x")
    write(mme, "artwork/images/.DS_Store", "x")
    write(mme, "eval_tool/calculation.py", "x")
    gqa = {"05": {"imageId": "n1", "question": "Is it red?", "answer": "no", "isBalanced": True,
                  "types": {"structural": "verify"}},
           "06": {"imageId": "n1", "question": "And?", "answer": "x", "isBalanced": False,
                  "types": {"structural": "query"}},
           "07": {"imageId": "n2", "question": "What is it?", "answer": "cat", "isBalanced": True,
                  "types": {"structural": "query"}}}
    textvqa = {"data": [{"question_id": 34602, "image_id": "0a", "question": "what brand?", "answers": ["nokia"] * 10},
                        {"question_id": 34603, "image_id": "0a", "question": "what year?", "answers": ["1999"] * 10}]}
    vqa_questions = {"data_subtype": "val2014", "questions": [
        {"question_id": 42000, "image_id": 42, "question": "What colour?"},
        {"question_id": 42001, "image_id": 42, "question": "Is it?"}]}
    annotations = {"data_subtype": "val2014", "annotations": [
        {"question_id": n, "image_id": 42, "answer_type": kind, "answers": [{"answer": x} for x in answers]}
        for n, kind, answers in ((42000, "other", ["red"] * 6 + ["pink"] * 4), (42001, "yes/no", ["yes"] * 10))]}
    image = base64.b64encode(b"a picture").decode()
    mmbench = ("index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\n"
               f'7\t"Which ""one""?"\tLook.\tcat\tdog\tbird\t\tB\tx\t{image * 20_000}\ts\n'
               f"8\tTwo?\tnan\tup\tNone\tdown\t\tA\tx\t{image}\ts\n"
               f"1000007\tRotated?\t\tdog\tcat\t\t\tA\tx\t{image}\ts\n")
    conversations = [{"id": "9", "image": "val/9.png", "conversations": [
        {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "circle"}]},
        {"id": "10", "conversations": [{"from": "human", "value": "is it?"}, {"value": "yes", "from": "gpt"}]}]
    mmvet = {"v1_0": {"imagename": "v1_0.png", "question": "Why?", "answer": "so"},
             "v1_1": {"imagename": "b.png", "question": "How?", "answer": "x"}}
    return {
        "pope": [write(folder, "coco_pope_random.json", lines), write(folder, "coco_pope_popular.json", lines)],
        "mme": [mme], "gqa": [write(folder, "testdev_balanced_questions.json", gqa)],
        "textvqa": [write(folder, "TextVQA_0.5.1_val.json", textvqa)],
        "vqav2": [write(folder, "questions.json", vqa_questions), write(folder, "annotations.json", annotations)],
        "mmbench": [write(folder, "mmbench.tsv", mmbench)], "exact": [write(folder, "llava.json", conversations)],
        "mmvet": [write(folder, "mm-vet.json", mmvet)]}


def test_questions_are_those_of_the_published_files():
    with tempfile.TemporaryDirectory() as tmp:
        files = published(tmp)
        read = lambda name, *paths, **options: questions.read_questions(name, paths or files[name], **options)
        cat = lambda n: {"image": f"COCO_val2014_{n}.jpg", "text": f"Is there a cat {n}?{SHORT}",
                         "label": {1: "yes", 2: "no"}[n]}
        assert read("pope", files["pope"][0]) == [{"question_id": n, **cat(n)} for n in (1, 2)]
        assert read("pope") == [{"question_id": f"{kind}-{n}", **cat(n), "category": kind}
                                for kind in ("random", "popular") for n in (1, 2)]
        assert read("mme") == [
            {"question_id": "artwork/7.png#1", "image": "artwork/images/7.png", "text": f"Is it\u2028old?{SHORT}",
             "label": "no", "category": "artwork"},
            {"question_id": "artwork/7.png#2", "image": "artwork/images/7.png", "text": f"New?{SHORT}",
             "label": "yes", "category": "artwork"},
            {"question_id": "count/000.jpg#1", "image": "count/000.jpg", "text": f"Is there one?{SHORT}",
             "label": "yes", "category": "count"},
            {"question_id": "count/000.jpg#2", "image": "count/000.jpg", "text": f"Are there two?{SHORT}",
             "label": "no", "category": "count"}]
        listed, found = os.listdir, read("mme")
        for order in 1, -1:  # a text beside its picture, of the same name, is never taken for it
            with unittest.mock.patch.object(os, "listdir", lambda folder: sorted(listed(folder))[::order]):
                assert read("mme") == found
        assert read("gqa") == [
            {"question_id": "05", "image": "n1.jpg", "text": f"Is it red?{SHORT}", "label": "no", "category": "binary"},
            {"question_id": "07", "image": "n2.jpg", "text": f"What is it?{SHORT}", "label": "cat", "category": "open"}]
        ocr = write(tmp, "ocr.json", {"data": [{"image_id": "0a", "ocr_tokens": ["NOKIA", "n 95"]}]})
        plain, shown = read("textvqa"), read("textvqa", ocr=ocr)  # both questions are about one picture
        assert plain == [{"question_id": 34602 + n, "image": "0a.jpg", "text": text + SHORT, "label": [label] * 10}
                         for n, (text, label) in enumerate((("what brand?", "nokia"), ("what year?", "1999")))]
        assert shown[0] == {**plain[0], "text": f"what brand?\nReference OCR token: NOKIA, n 95{SHORT}"}
        image = {"image": "COCO_val2014_000000000042.jpg"}
        labels = [{"label": ["red"] * 6 + ["pink"] * 4, "category": "other"},
                  {"label": ["yes"] * 10, "category": "yes_no"}]
        assert read("vqav2") == [{"question_id": 42000 + n, **image, "text": text + SHORT, **labels[n]}
                                 for n, text in enumerate(("What colour?", "Is it?"))]
        assert read("vqav2", files["vqav2"][1]) == [{"question_id": 42000 + n, **image, **labels[n]} for n in (0, 1)]
        test = {"data_subtype": "test-dev2015", "questions": [{"question_id": 1, "image_id": 1, "question": "Q"}]}
        assert read("vqav2", write(tmp, "test.json", test))[0]["image"] == "COCO_test2015_000000000001.jpg"
        images = os.path.join(tmp, "pictures", "new")
        assert read("mmbench", images=images) == read("mmbench") == [
            {"question_id": 7, "image": "7.jpg", "text": f'Look.\nWhich "one"?\nA. cat\nB. dog\nC. bird{LETTER}',
             "label": "B"}, {"question_id": 8, "image": "8.jpg", "text": f"Two?\nA. up{LETTER}", "label": "A"}]
        assert sorted(os.listdir(images)) == ["7.jpg", "8.jpg"]
        assert open(os.path.join(images, "8.jpg"), "rb").read() == b"a picture"
        assert read("exact") == [{"question_id": "9", "text": "what is it?", "label": "circle", "image": "val/9.png"},
                                 {"question_id": "10", "text": "is it?", "label": "yes"}]
        assert read("mmvet") == [{"question_id": "v1_0", "image": "v1_0.png", "text": "Why?"},
                                 {"question_id": "v1_1", "image": "b.png", "text": "How?"}]
        rows = [f"{n}\tQ\tNaN\tup\t\t\t\t{answer}\tx\t\ts\n"
                for n, answer in ((3, "NAN"), (10 ** 6, "A"), (999_999, "C"))]
        table = write(tmp, "more.tsv", open(files["mmbench"][0]).readline() + "".join(rows))
        assert read("mmbench", table) == [{"question_id": 3, "image": "3.jpg", "text": f"Q\nA. up{LETTER}"}, {
            "question_id": 999_999, "image": "999999.jpg", "text": f"Q\nA. up{LETTER}", "label": "C"}]
        kinds = {str(n): {"imageId": "n", "question": "Q", "answer": "Red", "isBalanced": True, "types": {
            "structural": kind}} for n, kind in enumerate("query verify choose logical compare".split())}
        assert [(x["label"], x["category"]) for x in read("gqa", write(tmp, "kinds.json", kinds))] == [
            ("Red", "open")] + [("Red", "binary")] * 4
        published_lines = write(tmp, "mine.jsonl", [{"question_id": 1, "image": "a", "text": "Q?"}])
        assert read("pope", published_lines)[0]["text"] == "Q?" + SHORT, "POPE's own files are JSON lines, too"
        assert read("gqa", published_lines)[0]["text"] == "Q?"
        asked = {"data": [{"question_id": 1, "image_id": "b", "question": "Q"}]}  # of the test set
        assert read("textvqa", write(tmp, "test2.json", asked)) == [
            {"question_id": 1, "image": "b.jpg", "text": "Q" + SHORT}]
        three = write(tmp, "three.json", [{"id": 1, "conversations": [{"from": "human", "value": "Q"}] * 3}])
        refused(UserError, questions.read_questions, "exact", [three], says=(
            f"{three}: not in the format of exact; "
            "downstream/questions.py names the files that it takes"))
        own = [write(tmp, f"{n}.jsonl", [{"question_id": n}]) for n in range(2)]
        raises(UserError, questions.read_questions, "gqa", own, words=[" ".join(own), "not in the format of gqa"])
        empty = write(tmp, "empty.json", [])
        refused(UserError, questions.read_questions, "exact", [empty], says=(
            f"{empty}: no questions, or one without a question_id"))
        half = write(tmp, "half.jsonl", [{"question_id": 1}, {"text": "Q"}])
        refused(UserError, questions.read_questions, "gqa", [half], says=(
            f"{half}: no questions, or one without a question_id"))
        bad = write(tmp, "bad.json", "{")
        refused(UserError, questions.read_questions, "gqa", [bad], says=(
            f"{bad} is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"))
        with unittest.mock.patch.object(encoder, "write_atomically") as writes, unittest.mock.patch.object(
                os, "makedirs") as makes:
            write_file("here.json", b"x")
        assert makes.call_args == unittest.mock.call(".", exist_ok=True) and writes.call_args[0][0] == "here.json"
        one = {"data_subtype": "val2014", "questions": [{"question_id": 42001, "image_id": 42, "question": "Is it?"}]}
        out = os.path.join(tmp, "one.jsonl")
        said = quietly("questions", "vqav2", files["vqav2"][1], write(tmp, "one.json", one), "--out", out)
        assert said == f"{out}: 1 questions\n" and [x["text"] for x in vqa.parse_lines(out)] == ["Is it?" + SHORT]
        for name, paths in files.items():  # what `questions` writes is read back, for every benchmark
            out = os.path.join(tmp, "made", f"{name}.jsonl")
            assert quietly("questions", name, *paths, "--out", out) == f"{out}: {len(read(name))} questions\n"
            assert questions.read_questions(name, [out]) == read(name), name
        quietly("questions", "textvqa", *files["textvqa"], "--ocr", ocr, "--out", out)
        assert questions.read_questions("textvqa", [out]) == shown
        quietly("questions", "mmbench", *files["mmbench"], "--images", os.path.join(tmp, "more"), "--out", out)
        assert sorted(os.listdir(os.path.join(tmp, "more"))) == sorted(os.listdir(images))


def test_scores_on_the_command_line():
    """The figures are the same by the published files and by the question file, and in any order of the answers."""
    with tempfile.TemporaryDirectory() as tmp:
        files, out = published(tmp), os.path.join(tmp, "score.json")
        texts = {"gqa": {"07": "Cat.", "05": "yes"}, "textvqa": {34603: "1999", 34602: "no"},
                 "vqav2": {"42001": "Yes", "42000": "pink"}, "mmbench": {8: "A", 7: "C"},
                 "exact": {"10": "Yes", "9": "x"}}
        shown = {"gqa": "accuracy 50.0000\nbinary 0.0000\nopen 100.0000\n", "textvqa": "accuracy 50.0000\n",
                 "vqav2": "accuracy 100.0000\nother 100.0000\nyes_no 100.0000\n",
                 "mmbench": "vanilla_accuracy 50.0000\nunread 0.0000\n",
                 "exact": "accuracy 50.0000\nother 0.0000\nyes_no 100.0000\n"}
        for name, said in texts.items():
            answers, made = write(tmp, f"{name}-a.jsonl", answers_of(said)), os.path.join(tmp, f"{name}-q.jsonl")
            assert quietly(name, answers, files[name][-1]) == shown[name], name
            quietly("questions", name, *files[name], "--out", made)
            assert quietly(name, answers, made, "--out", out) == shown[name], name
            assert {k: f"{v:.4f}" for k, v in json.load(open(out)).items()} == dict(
                line.split() for line in shown[name].splitlines())
        both = {"random-1": "yes", "random-2": "yes", "popular-2": "No", "popular-1": "no"}
        found = quietly("pope", write(tmp, "both.jsonl", answers_of(both)), *files["pope"]).split()
        assert found[::2][-1] == "mean_f1" and found[-1] == f"{(2 / 3 + 0) / 2:.4f}" and len(found) == 22
        answers = write(tmp, "pope.jsonl", answers_of({2: "There is no cat.", "1": "Yes"}))
        said = quietly("pope", answers, files["pope"][0], "--out", out)
        assert said == "accuracy 1.0000\nprecision 1.0000\nrecall 1.0000\nf1 1.0000\nyes_ratio 0.5000\n"
        assert json.load(open(out)) == dict(accuracy=1, precision=1, recall=1, f1=1, yes_ratio=0.5)
        half = write(tmp, "half.jsonl", answers_of({1: "Yes"}))
        done = run("python", "-m", "downstream.vqa", "pope", half, files["pope"][0])
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        assert done.stderr.startswith(f"downstream/vqa.py: {half} lacks 1 of the 2 questions of "), done
        # LLaVA's own question files name a question of MME and TextVQA by its picture
        prompts = {("0a", f"What Brand?\nReference OCR token: x{SHORT}"): "Nokia", ("0a", f"what year?{SHORT}"): "2000"}
        lines = [{"question_id": key, "prompt": prompt, "text": text} for (key, prompt), text in prompts.items()]
        assert quietly("textvqa", write(tmp, "l.jsonl", lines), *files["textvqa"]) == "accuracy 50.0000\n"
        texts, asked = mme_set(existence=1)
        rows = [{**x, "text": f"Question {n}?{SHORT}"} for n, x in enumerate(asked)]
        lines = [{"question_id": x["image"], "prompt": f"Question {n}? Please answer yes or no.{SHORT}", "text": text}
                 for n, (x, text) in enumerate(zip(asked, texts))]
        assert vqa.picture_key("OCR/images/7.png", "Q? Please answer yes or no.\nWhy") == ("OCR", "7", "q?")
        said = quietly("mme", write(tmp, "m.jsonl", lines), write(tmp, "mme.jsonl", rows)).splitlines()
        assert said[0] == "existence 125.0000" and said[-2:] == ["perception 1925.0000", "cognition 800.0000"]
        raises(UserError, quietly, "mme", write(tmp, "m2.jsonl", lines + lines[:1]), os.path.join(tmp, "mme.jsonl"),
               words=["m2.jsonl", "question 0?", "2 times"])


def test_what_each_command_needs():
    """Left out alone, each argument that a command needs is asked for by its name."""
    def asks(*flags):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            raises(SystemExit, vqa.main, list(flags), words="2")
        return err.getvalue().splitlines()[-1].split(": ")[-1]
    for name in "pope mme gqa textvqa vqav2 mmbench exact".split():
        assert asks(name) == "ANSWERS, LABELS" and asks(name, "a.jsonl") == "LABELS", name
    for name in "mmvet", "pope":
        assert asks("questions", name, "--out", "o") == "FILE" and asks("questions", name, "f") == "--out"
    assert asks("questions") == "benchmark, FILE, --out" and asks() == "BENCHMARK | questions | submit"
    for name in "mmvet", "vqav2":
        assert asks("submit", name, "--out", "o") == "ANSWERS" and asks("submit", name, "a") == "--out"
    assert asks("submit", "--out", "o") == "benchmark, ANSWERS"


def test_files_for_servers():
    with tempfile.TemporaryDirectory() as tmp:
        out = os.path.join(tmp, "new", "out.json")
        said = quietly("submit", "mmvet", write(tmp, "v.jsonl", answers_of({"v1_0": "So.", 1: "Thus"})), "--out", out)
        assert json.load(open(out)) == {"v1_0": "So.", "v1_1": "Thus"}
        assert said == (f"{out}: 2 answers, for MM-Vet's online evaluator, where GPT-4 judges. Nothing was scored "
                        "here.\n")
        asked = {"data_subtype": "test2015", "questions": [
            {"question_id": n, "image_id": n, "question": "Q"} for n in (5, 6, 7)]}
        asked = write(tmp, "q.json", asked)
        answers = write(tmp, "a.jsonl", answers_of({7: "The Two cats.", "5": "Yes"}))
        said = quietly("submit", "vqav2", answers, asked, "--out", out)
        assert json.load(open(out)) == [{"question_id": 5, "answer": "yes"}, {"question_id": 6, "answer": ""},
                                        {"question_id": 7, "answer": "2 cats"}]
        assert said == f"{out}: 2 answers, for VQA's challenge on EvalAI, test-dev. Nothing was scored here.\n"
        raises(UserError, quietly, "submit", "vqav2", answers, "--out", out, words=["every question of the test set"])
        twice = write(tmp, "twice.jsonl", [{"question_id": 5}, {"question_id": 7}, {"question_id": 5}])
        raises(UserError, quietly, "submit", "vqav2", answers, twice, "--out", out, words="twice.jsonl has question 5")
        surplus = write(tmp, "s.jsonl", answers_of({8: "x"}))
        raises(UserError, quietly, "submit", "vqav2", surplus, asked, "--out", out, words=["s.jsonl", "question 8"])


def test_results_do_not_overwrite_what_they_are_of():
    """--out with the name of any file that the command reads, also by a link, is refused, and the file stays."""
    with tempfile.TemporaryDirectory() as tmp:
        lines = [{"question_id": k, "text": "yes", "label": "yes"} for k in (1, 2)]
        answers, labels, words = (write(tmp, name, lines) for name in ("a.jsonl", "q.jsonl", "ocr.json"))
        link, before = os.path.join(tmp, "link.jsonl"), {path: open(path).read() for path in (answers, labels, words)}
        os.symlink(answers, link)
        for path, *flags in ((answers, "pope", answers, labels), (labels, "pope", answers, labels),
                             (link, "pope", answers, labels), (labels, "questions", "pope", labels),
                             (words, "questions", "textvqa", labels, "--ocr", words),
                             (answers, "submit", "mmvet", answers), (labels, "submit", "vqav2", answers, labels)):
            refused(UserError, quietly, *flags, "--out", path,
                    says=f"{path} would be read and overwritten: give another name")
            assert {path: open(path).read() for path in before} == before
        refused(UserError, quietly, "pope", answers, labels, "--out", f"{labels}/x.json", says=(
            f"{labels} cannot be made a folder, because a file is in its place: give another one"))
        refused(UserError, quietly, "pope", answers, labels, "--out", f"{labels}/x/y.json", says=(
            f"{labels}/x cannot be made a folder, because a file is in its place: give another one"))
        out = os.path.join(tmp, "out.json")
        for benchmark, flag in ("textvqa", "--ocr"), ("mmbench", "--images"):
            refused(UserError, quietly, "questions", benchmark, labels, flag, words, "--out", out, says=(
                f"{flag} cannot change {labels}, which is a question file already: give {benchmark}'s own files"))
        raises(UserError, quietly, "submit", "mmvet", answers, labels, "--out", out, words="takes the answers alone")
        assert not os.path.exists(out)


def test_bad_answers_and_labels_are_one_line():
    with tempfile.TemporaryDirectory() as tmp:
        files = published(tmp)
        labels, pope = files["pope"][0], lambda name, content: ["pope", write(tmp, name, content), files["pope"][0]]
        good = answers_of({1: "yes", 2: "no"})
        plain, gqa = write(tmp, "k.jsonl", good), files["gqa"][0]
        for flags, words in [
                (pope("a.jsonl", good[:1]), ["a.jsonl lacks 1 of the 2", labels, "the first is 2"]),
                (pope("b.jsonl", good + answers_of({3: "x"})), ["b.jsonl has 1 answers", "not ask", "the first is 3"]),
                (pope("b2.jsonl", good + answers_of({7: "x", 5: "x"})), ["b2.jsonl has 2 answers", "the first is 7"]),
                (pope("c.jsonl", good + good[1:]), ["c.jsonl has question 2 2 times"]),
                (pope("d.jsonl", [*good[:1], {"question_id": "1", "text": "x"}]), ["d.jsonl", "question 1 2 times"]),
                (pope("e.jsonl", [{"question_id": 1}]), ["e.jsonl", "answer 1", "no text"]),
                (pope("e2.jsonl", [{}]), ["e2.jsonl: answer 1 has no question_id"]),
                (pope("f.jsonl", [{"text": "x"}]), ["f.jsonl", "answer 1", "question_id"]),
                (pope("g.jsonl", [{"question_id": 1, "text": 3}]), ["g.jsonl", "answer 1"]),
                (pope("g2.jsonl", [good[0], {"question_id": 2}]), ["g2.jsonl: answer 2 has"]),
                (["exact", plain, write(tmp, "some.jsonl", [{"question_id": 1, "label": "x"}, {"question_id": 2}])],
                 ["some.jsonl has no label for question 2: give"]),
                (pope("h.jsonl", '{"question_id": 1, "text": "x"}\nno JSON'), ["h.jsonl, line 2", "no JSON"]),
                (pope("i.jsonl", "[1]\n"), ["i.jsonl, line 1", "object"]),
                (pope("i2.jsonl", json.dumps(good[0]) + "\n\n[]\n"), ["i2.jsonl, line 3, is no JSON object"]),
                (pope("j.jsonl", "\n"), ["j.jsonl is empty"]),
                (["pope", os.path.join(tmp, "gone.jsonl"), labels], ["gone.jsonl: no such file"]),
                (["pope", tmp, labels], [tmp, "directory"]),
                (["pope", files["mme"][0], labels], [files["mme"][0], "directory"]),
                (["pope", plain + "/x.jsonl", labels], ["k.jsonl/x.jsonl: not a directory"]),
                (["pope", plain, gqa], [gqa, "no questions, or one without a question_id"]),
                (["exact", plain, gqa], [gqa, "not in the format of exact"]),
                (["mmbench", plain, files["exact"][0]], ["no questions"]),
                (["mmbench", plain, write(tmp, "other.tsv", "a\tb\n1\t2\n")], ["not in the format of mmbench"]),
                (["mme", plain, gqa], [gqa, "not a directory"]),
                (["mme", plain, os.path.join(tmp, "nowhere")], ["nowhere: no such file"]),
                (["gqa", plain, labels], ["is no JSON"]),
                (["gqa", plain, files["textvqa"][0]], ["not in the format of gqa"]),
                (["textvqa", plain, gqa], ["not in the format of textvqa"]),
                (["textvqa", plain, write(tmp, "bare.jsonl", [{"question_id": 5, "label": ["x"] * 10}])],
                 ["k.jsonl lacks 1 of the 1 questions of", "bare.jsonl"]),
                (["textvqa", write(tmp, "k2.jsonl", [{"question_id": 9, "text": "x"}]), files["textvqa"][0]],
                 ["k2.jsonl lacks 2 of the 2 questions of"]),
                (["vqav2", plain, files["vqav2"][0]], ["has no label for question 42000"]),
                (["vqav2", plain, *files["vqav2"]], [f"questions of {files['vqav2'][0]}, the first is 42000"]),
                (["questions", "vqav2", files["vqav2"][1], "--out", "x"], ["labels, but no questions"]),
                (["questions", "gqa", gqa, "--ocr", "x", "--out", "y"], ["--ocr is for textvqa"]),
                (["questions", "gqa", gqa, "--images", "x", "--out", "y"], ["--images is for mmbench"])]:
            raises(UserError, quietly, *flags, words=words)
        latin = os.path.join(tmp, "latin.jsonl")
        open(latin, "wb").write(b'{"question_id": 1, "text": "\xe9"}')
        raises(UserError, quietly, "pope", latin, labels, words=["latin.jsonl is no text"])
        line = '{"question_id": 1, "text": "yes\u2028no"}\n{"question_id": 2, "text": "x"}\r\n\n'  # two lines
        assert [x["text"] for x in vqa.read_answers(write(tmp, "l.jsonl", "\ufeff" + line))] == ["yes\u2028no", "x"]


def test_files_of_another_benchmark_have_no_score():
    """Each scorer on each other benchmark's files, in the published format and as `questions` writes them. Of the
    latter `exact` takes all whose labels are texts."""
    with tempfile.TemporaryDirectory() as tmp:
        files, made, seen = published(tmp), {}, 0
        files["one file of pope"] = files["pope"][:1]
        for name, paths in files.items():
            made[name] = os.path.join(tmp, "made", f"{name}.jsonl")
            quietly("questions", name.split()[-1], *paths, "--out", made[name])
        for scorer in vqa.SCORERS:
            for name in files.keys() - {scorer}:
                ids = [x["question_id"] for x in questions.parse_lines(made[name])]
                answers = write(tmp, "a.jsonl", answers_of({key: "yes" for key in ids}))
                as_published, as_made = (scorer, answers, *files[name]), (scorer, answers, made[name])
                for flags in as_published, as_made:
                    if name.endswith(scorer) or flags == as_made and scorer == "exact" and name not in (
                            "textvqa", "vqav2", "mmvet"):
                        continue
                    seen += 1
                    said = str(raises(UserError, quietly, *flags))
                    assert "Error" not in said and "\n" not in said, (flags, said)
        assert seen == 7 * 7 * 2 + 6 * 2 - 5, "seven others, for six of them POPE's one file, less those of exact"
        for name, other, says in (
                ("mme", "pope", "question random-1 has the category random; expected one of existence count position "
                 "color posters celebrity scene landmark artwork OCR commonsense_reasoning numerical_calculation "
                 "text_translation code_reasoning: give this benchmark's own files"),
                ("pope", "mme", "question artwork/7.png#1 has the category artwork; expected none that is a task of "
                 "MME: give this benchmark's own files"),
                ("gqa", "mmbench", "question 7 has the category None; expected binary or open: give this benchmark's "
                 "own files"),
                ("mmbench", "gqa", "question 05 has the label no; expected a letter from A to E: give this benchmark's "
                 "own files")):
            keys = [x["question_id"] for x in questions.parse_lines(made[other])]
            answers = write(tmp, "b.jsonl", answers_of({key: "yes" for key in keys}))
            refused(UserError, quietly, name, answers, made[other], says=says)
            done = run("python", "-m", "downstream.vqa", name, answers, made[other])
            assert (done.returncode, done.stdout, done.stderr) == (2, "", f"downstream/vqa.py: {says}\n"), done
        mmvet, ends = files["mmvet"][0], "; downstream/questions.py names the files that it takes"
        for other, says in ((files["exact"][0], ""), (mmvet, ", it has no 'isBalanced'")):
            refused(UserError, quietly, "gqa", answers, other, says=f"{other}: not in the format of gqa{says}{ends}")


def test_small_sets_and_their_controls():
    """No picture leaves no mark of it; shuffled ones all move, and the questions of one stay together."""
    talks = [{"id": f"{image}_{n}", "image": f"train/images/{image}.png", "kind": "caption" if n else "count",
              "conversations": [{"from": "human", "value": f"<image>\nq{n}"}, {"from": "gpt", "value": "a"}]}
             for image in range(9) for n in range(2)]
    with tempfile.TemporaryDirectory() as tmp:
        for name, train in ("easy_vqa", "llava"), ("coco_mini", "llava_train"):
            with zipfile.ZipFile(os.path.join(tmp, f"{name}.zip"), "w") as f:
                f.writestr(f"train/{train}.json", json.dumps(talks))
                f.writestr("val/llava.json", json.dumps(talks))
                for kind in ("random", "popular"):
                    lines = [{"question_id": n, "image": f"val/{n}.jpg", "text": "q", "label": "no"} for n in range(3)]
                    f.writestr(f"val/pope_{kind}.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
                captions = [{"image_id": 5, "file_name": "val/5.jpg", "captions": ["a", "b"]}]
                f.writestr("val/captions.json", json.dumps(captions))
        out = os.path.join(tmp, "out")
        archives = [os.path.join(tmp, f"{name}.zip") for name in ("easy_vqa", "coco_mini")]
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.main([*archives, "--out", out])
        load = lambda *names: questions.read_json(os.path.join(out, *names))
        lines = lambda *names: questions.parse_lines(os.path.join(out, *names))
        assert load("easy_vqa", "train", "llava.json") == talks
        bare = load("easy_vqa", "train", "llava_no_picture.json")
        assert [x["id"] for x in bare] == [x["id"] for x in talks] and "image" not in json.dumps([
            {**x, "id": 0} for x in bare])
        assert bare[3]["conversations"] == [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a"}]
        moved = load("easy_vqa", "train", "llava_shuffled.json")
        pairs = {(a["image"], b["image"]) for a, b in zip(talks, moved)}
        assert len(pairs) == 9 and len({b for _, b in pairs}) == 9 and not any(a == b for a, b in pairs)
        assert [{**x, "image": 0} for x in moved] == [{**x, "image": 0} for x in talks]
        assert prepare.with_others_pictures(talks, 0) == moved != prepare.with_others_pictures(talks, 1)
        asked = lines("easy_vqa", "questions.jsonl")
        assert len(asked) == 18 and asked[1] == {"question_id": "0_1", "text": "q1", "label": "a",
                                                 "image": "train/images/0.png"}
        assert lines("easy_vqa", "questions_no_picture.jsonl")[1] == {"question_id": "0_1", "text": "q1", "label": "a"}
        assert {x["image"] for x in lines("easy_vqa", "questions_shuffled.jsonl")} == {x["image"] for x in asked}
        asked = lines("coco_mini", "questions.jsonl")
        assert [x["question_id"] for x in asked] == [f"{kind}-{n}" for kind in ("popular", "random") for n in range(3)]
        assert asked[0]["text"] == "q" + SHORT and asked[0]["category"] == "popular"
        assert load("coco_mini", "captions.json") == talks[1::2]
        assert lines("coco_mini", "captions.jsonl") == [{
            "question_id": 5, "image": "val/5.jpg", "label": ["a", "b"],
            "text": "Provide a one-sentence caption for the provided image."}]
        other = os.path.join(tmp, "other.zip")
        os.rename(archives[0], other)
        raises(UserError, prepare.main, [other], words=["other.zip is none of easy_vqa.zip, coco_mini.zip, tiny-im"])
        raises(UserError, prepare.main, [archives[0]], words=[archives[0], "no archive"])


def test_names_of_tiny_imagenet():
    """Archives of one part lie together; each picture is asked for, its answer is the name of its folder's class."""
    parts = {"train-0": "n02403003/a.png", "train-1": "n12267677/b.png", "val": "n02403003/v.png"}
    with tempfile.TemporaryDirectory() as tmp:
        archives = [os.path.join(tmp, f"tiny-imagenet-100-{part}.zip") for part in parts]
        for archive, name in zip(archives, parts.values()):
            with zipfile.ZipFile(archive, "w") as f:
                f.writestr(name, "pixels")
        with contextlib.redirect_stdout(io.StringIO()):
            prepare.main([*archives, "--out", tmp])
        folder = os.path.join(tmp, "tiny_imagenet")
        ask, train = "What is in the picture?" + SHORT, questions.read_json(os.path.join(folder, "train", "llava.json"))
        assert [(x["image"], *(turn["value"] for turn in x["conversations"])) for x in train] == [
            ("train/n02403003/a.png", "<image>\n" + ask, "ox"), ("train/n12267677/b.png", "<image>\n" + ask, "acorn")]
        asked, = questions.parse_lines(os.path.join(folder, "questions.jsonl"))
        assert (asked["image"], asked["text"], asked["label"]) == ("val/n02403003/v.png", ask, "ox")
        assert all(os.path.isfile(os.path.join(folder, x["image"])) for x in [*train, asked])


def test_cluster_figures_by_hand():
    assert tsne.spread_classes([5, 5, 1, 2, 3, 4], 2).tolist() == [1, 3]
    assert tsne.spread_classes(list("abcabc"), 3).tolist() == list("abc")
    raises(UserError, tsne.spread_classes, [1, 2], 3, words=["--classes 3", "2"])
    angle = np.radians([0, 10, 20, 90, 100, 15])  # the last one lies among those of the other class
    x, labels = np.stack([np.cos(angle), np.sin(angle)], 1), np.array([0, 0, 0, 1, 1, 1])
    # by one neighbour 0, 90 and 100 are right: 10 and 20 have that last one nearest. By three only the last is wrong
    assert abs(tsne.neighbours_accuracy(x, labels, 1) - 100 * 3 / 6) < 1e-9
    assert abs(tsne.neighbours_accuracy(x, labels, 3) - 100 * 5 / 6) < 1e-9
    assert tsne.neighbours_accuracy(x[:5], labels[:5], 1) == 100
    y = tsne.directions(np.array([[3.0, 0], [1, 0], [2, 3]]))
    assert np.allclose(y[0], np.array([1, -1]) / 2 ** 0.5) and np.allclose(np.linalg.norm(y, axis=1), 1)
