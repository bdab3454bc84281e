"""Run the tests of detection, in an environment with tests/detection/requirements.txt: the second step of .ci/run.

    python -m tests.detection [NAME ...]     # all tests, or those whose name contains NAME
"""
import os
import sys
import tempfile

import test_all
from tests.detection import test_detect

if __name__ == "__main__":
    tests = {k: f for k, f in vars(test_detect).items() if k.startswith("test_")}
    chosen = [k for k in tests if not sys.argv[1:] or any(part in k for part in sys.argv[1:])]
