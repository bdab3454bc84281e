"""The tests of downstream/, but those of detection: the second step of .ci/run.

    python -m tests.downstream [NAME ...]           # all, or those whose name contains NAME
    python -m tests.downstream --list [NAME ...]    # what there is, by file, with the purpose of each
"""
import sys

from tests.runner import run_folder

if __name__ == "__main__":
    sys.exit(run_folder("tests.downstream"))
