"""Three small sets of pictures and questions, for `downstream.llava train` and `answer`, and their controls.

    python -m experiments.understanding.prepare easy_vqa.zip coco_mini.zip --out out/understanding
    python -m experiments.understanding.prepare tiny-imagenet-100-*.zip --out out/understanding

Unpacks each archive into a folder of its name, which is what --images names; all parts of Tiny-ImageNet into
tiny_imagenet, where one question is asked of each picture: what is in it, of a hundred things. The folders hold LLaVA
conversations to train on (train/llava.json, of coco_mini train/llava_train.json), and get these files:

    questions.jsonl            questions of its val part with labels, for `answer` and downstream.vqa (exact; of
                               coco_mini pope, by POPE's rules on its 204 pictures, which is NOT POPE)
    captions.json              coco_mini: the captions alone, for a first stage
    captions.jsonl             coco_mini: asks for a caption of each picture of its val part, label: those that it has
    *_no_picture.json[l]       the control "no picture": the same without pictures
    *_shuffled.json[l]         the control "shuffled pictures": every picture has changed places with another one of
                               its part. Which one, --seed decides

Both controls are of the conversations and of the questions, so that a model can be trained on them, too.
"""
import argparse
import glob
import json
import os
import re
import zipfile

import numpy as np

from downstream.questions import SHORT, read_json, read_questions
from encoder import UserError
from tools.script import run_command, write_file

CAPTION = "Provide a one-sentence caption for the provided image."  # as coco_mini's conversations ask
NAMES = os.path.join(os.path.dirname(__file__), "tiny_imagenet_names.txt")  # WordNet's first


def without_pictures(samples):
    """Conversations or questions without their pictures."""
    found = []
    for sample in samples:
        sample = {key: value for key, value in sample.items() if key != "image"}
        if "conversations" in sample:
            sample["conversations"] = [{**turn, "value": re.sub("<image>\n?", "", turn["value"])}
                                       for turn in sample["conversations"]]
        found.append(sample)
    return found


def with_others_pictures(samples, seed):
    """Conversations or questions with the pictures of others. A picture's questions stay together, and all pictures
    are moved: along one circle, in an order of the seed."""
    names = sorted({sample["image"] for sample in samples})
    circle = np.random.default_rng(seed).permutation(names).tolist()
    other = dict(zip(circle, circle[1:] + circle[:1]))
    return [{**sample, "image": other[sample["image"]]} for sample in samples]


def write_samples(path, samples):
    """As a list (.json), or as lines (.jsonl)."""
    text = "".join(json.dumps(x) + "\n" for x in samples) if path.endswith(".jsonl") else json.dumps(samples)
    write_file(path, text.encode())
    print(f"{path}: {len(samples):,}")


def write_with_controls(path, samples, seed, itself=True):
    """The samples, unless they lie there already, and both controls."""
    stem, end = os.path.splitext(path)
    if itself:
        write_samples(path, samples)
    write_samples(f"{stem}_no_picture{end}", without_pictures(samples))
    write_samples(f"{stem}_shuffled{end}", with_others_pictures(samples, seed))


def prepare_easy_vqa(folder, seed):
    train = os.path.join(folder, "train", "llava.json")
    write_with_controls(train, read_json(train), seed, itself=False)
    questions = read_questions("exact", [os.path.join(folder, "val", "llava.json")])
    write_with_controls(os.path.join(folder, "questions.jsonl"), questions, seed)


def prepare_tiny_imagenet(folder, seed):
    with open(NAMES) as f:
        names = dict(line.rstrip("\n").split(" ", 1) for line in f)
    for part in "train", "val":
        samples = []
        for picture in sorted(glob.glob("*/*", root_dir=os.path.join(folder, part))):  # WNID/FILE
            talk = [{"from": "human", "value": "<image>\nWhat is in the picture?" + SHORT},
                    {"from": "gpt", "value": names[os.path.dirname(picture)]}]
            samples.append({"id": picture, "image": os.path.join(part, picture), "conversations": talk})
        write_samples(os.path.join(folder, part, "llava.json"), samples)
    prepare_easy_vqa(folder, seed)


def prepare_coco_mini(folder, seed):
    train = os.path.join(folder, "train", "llava_train.json")
    conversations = read_json(train)
    write_with_controls(train, conversations, seed, itself=False)
    captions = [sample for sample in conversations if sample["kind"] == "caption"]
    write_samples(os.path.join(folder, "captions.json"), captions)
    questions = read_questions("pope", sorted(glob.glob(os.path.join(glob.escape(folder), "val", "pope_*.jsonl"))))
    write_with_controls(os.path.join(folder, "questions.jsonl"), questions, seed)
    described = [{"question_id": x["image_id"], "image": x["file_name"], "text": CAPTION, "label": x["captions"]}
                 for x in read_json(os.path.join(folder, "val", "captions.json"))]
    write_samples(os.path.join(folder, "captions.jsonl"), described)


SETS = {"easy_vqa": prepare_easy_vqa, "coco_mini": prepare_coco_mini, "tiny_imagenet": prepare_tiny_imagenet}


def unpack(archive, folder):
    try:
        with zipfile.ZipFile(archive) as f:
            f.extractall(folder)
    except (FileNotFoundError, zipfile.BadZipFile) as e:
        raise UserError(f"{archive} is no archive ({e})") from None


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("archives", nargs="+", metavar="ARCHIVE",
                    help="easy_vqa.zip, coco_mini.zip, tiny-imagenet-100-*.zip")
    ap.add_argument("--out", default="out/understanding", metavar="FOLDER", help="[%(default)s]")
    ap.add_argument("--seed", type=int, default=0, help="of the shuffled pictures [%(default)s]")
    args = ap.parse_args(argv)
    found = set()
    for archive in args.archives:
        name = os.path.splitext(os.path.basename(archive))[0]
        part = re.fullmatch(r"tiny-imagenet-100-(train|val)(-\d+)?", name)
        if not part and name not in ("easy_vqa", "coco_mini"):
            raise UserError(f"{archive} is none of easy_vqa.zip, coco_mini.zip, tiny-imagenet-100-*.zip")
        found.add("tiny_imagenet" if part else name)
        unpack(archive, os.path.join(args.out, "tiny_imagenet", part[1]) if part else os.path.join(args.out, name))
    for name in sorted(found):
        SETS[name](os.path.join(args.out, name), args.seed)


if __name__ == "__main__":
    run_command(main, "prepare.py")
