"""The tests of detection: the last step of .ci/run, in an environment of its own (requirements.txt beside this file).

    python -m tests.detection [NAME ...]            # all, or those whose name contains NAME
    python -m tests.detection --list [NAME ...]     # what there is, with the purpose of each
"""
import sys

from tests.runner import run_folder

if __name__ == "__main__":
    sys.exit(run_folder("tests.detection"))
