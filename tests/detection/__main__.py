"""The tests of detection: the second step of .ci/run, in an environment of its own (requirements.txt beside this file).

    python -m tests.detection [NAME ...] [--after "226 passed, 0 failed"]

--after: how the tests before these ended; the closing line counts both.
"""
import argparse
import re
import sys
import time
import traceback

from tests.detection import test_detect

if __name__ == "__main__":
    ap = argparse.ArgumentParser("python -m tests.detection", description="Run the tests of downstream/detect.py.")
    ap.add_argument("names", nargs="*", metavar="NAME", help="part of a test's name [all]")
    ap.add_argument("--after", default="", metavar="LINE", help="how the tests before these ended")
    args = ap.parse_args()
    before = re.fullmatch(r"(\d+) passed, (\d+) failed", args.after or "0 passed, 0 failed")
    if not before:
        ap.error(f"the tests before these have not ended: {args.after}")
    passed, failed = map(int, before.groups())
    chosen = [k for k in vars(test_detect) if k.startswith("test_") and (
        not args.names or any(part in k for part in args.names))]
    if not chosen:
        ap.error(f"no test's name contains {' or '.join(args.names)}")
    for name in chosen:
        start = time.time()
        try:
            getattr(test_detect, name)()
            passed += 1
            print(f"ok      {name} ({time.time() - start:.1f} s)", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"FAILED  {name} ({time.time() - start:.1f} s)\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)
