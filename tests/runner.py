"""What runs and lists the tests: test_all.py, `python -m tests.downstream` and `python -m tests.detection` are its
commands."""
import argparse
import ast
import glob
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback

from tests.helpers import HERE


def first_sentence(doc):
    return re.split(r"\.(?=\s+[A-Z`]|$)", " ".join((doc or "").split()))[0]


def tests_of(names):
    """Those of the names, or of a module's dict {name: function}, that are tests."""
    return [name for name in names if name.startswith(("test_", "slow_"))]


def sections(folder):
    """[(name, what it guards, its tests)] of each file of a folder, like "tests/downstream"."""
    found = []
    for path in sorted(glob.glob(os.path.join(HERE, folder, "test_*.py"))):
        with open(path) as f:
            text = f.read()
        found.append((os.path.relpath(path, HERE), first_sentence(ast.get_docstring(ast.parse(text))),
                      tests_of(re.findall(r"^def (\w+)\(", text, re.M))))
    return found


def load(folder):
    """{name: test} of the files of a folder."""
    modules = [importlib.import_module(path[:-3].replace(os.sep, ".")) for path, _, _ in sections(folder)]
    return {name: vars(module)[name] for module in modules for name in tests_of(vars(module))}


def show_list(contents, tests, names):
    for section, what, names_here in contents:
        chosen = [name for name in names_here if not names or any(part in name for part in names)]
        if chosen:
            print(f"{section}: {what}")
        for name in chosen:
            note = "(by name only) " * name.startswith("slow_") + first_sentence(tests[name].__doc__)
            print(f"    {name:60} {note}".rstrip())


def run_tests(tests, names, folder):
    """(passed, failed) of the tests that no other process has claimed: a claim is a file in the folder."""
    passed = failed = 0
    for name in names:
        try:
            os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        start = time.time()
        try:
            tests[name]()
            passed += 1
            print(f"ok      {name} ({time.time() - start:.1f} s)", flush=True)
        except (Exception, SystemExit):
            failed += 1
            print(f"FAILED  {name} ({time.time() - start:.1f} s)\n{traceback.format_exc()}", flush=True)
    return passed, failed


def main(command, contents, tests, argv, claims=None):
    """Run the tests, two at a time if they are many: a second process of the command, what follows `python`, then works
    on the same list.

    UNIFLOW_CLAIMS tells it the folder of the claims, where it writes how many of its tests passed and failed.
    """
    ap = argparse.ArgumentParser("python " + " ".join(map(os.path.basename, command)),
                                 description="Run the tests, or list them.")
    ap.add_argument("names", nargs="*", metavar="NAME",
                    help="part of a test's name, or the whole name of a slow_ one [all that are not slow_]")
    ap.add_argument("--list", action="store_true", help="print the tests by section, with their purpose, and run none")
    ap.add_argument("--after", metavar="LINE", default="0 passed, 0 failed",
                    help="how the tests before these ended: the closing line counts them, too")
    args = ap.parse_args(argv)
    before = re.fullmatch(r"(\d+) passed, (\d+) failed", args.after)
    if not before:
        ap.error(f"the tests before these have not ended: {args.after}")
    if args.list:
        show_list(contents, tests, args.names)
        return 0
    chosen = [name for name in tests if name.startswith("slow_") and name in args.names
              or name.startswith("test_") and (not args.names or any(part in name for part in args.names))]
    if not chosen:
        ap.error(f"no test's name contains {' or '.join(args.names)}: --list shows the names")
    if claims:
        passed, failed = run_tests(tests, chosen, claims)
        with open(os.path.join(claims, "counts"), "w") as f:
            f.write(f"{passed} {failed}")
        return 0
    counts = [before.groups()]
    with tempfile.TemporaryDirectory() as claims:
        env, second = {**os.environ, "UNIFLOW_CLAIMS": claims}, None
        if len(chosen) > 20:
            second = subprocess.Popen([sys.executable, *command, *args.names], env=env)
        counts.append(run_tests(tests, chosen, claims))
        if second:
            assert second.wait() == 0, "the second process ended before its tests did"
            with open(os.path.join(claims, "counts")) as f:
                counts.append(f.read().split())
    passed, failed = (sum(map(int, column)) for column in zip(*counts))
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def run_folder(package):
    """What `python -m tests.downstream` does, of that package."""
    folder = package.replace(".", "/")
    return main(["-m", package], sections(folder), load(folder), sys.argv[1:], os.environ.pop("UNIFLOW_CLAIMS", None))
