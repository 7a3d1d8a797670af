"""Proof by breaking: breaks the code behind each guarantee, and shows that the test that stands beside it fails.

    python scripts/mutations.py            # all: half an hour; docs/mutations.json holds the result
    python scripts/mutations.py NAME ...   # some: the record keeps what it has of the others

Every mutation of `mutation_table` replaces one passage of one file in a temporary copy of the tree. A mutation that no
test notices ends the script with an error: then the guarantee is not tested.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from mutation_table import MUTATIONS
from versions import commit

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "mutations.json"


def caught(name: str, tree: Path) -> tuple[bool | None, str]:
    """Make a mutation, run its tests and undo it.

    Args:
        name: Of the mutation.
        tree: A copy of the repository.

    Returns:
        Whether a test failed (None if this machine skips them all), and the last line of pytest.
    """
    path, old, new, tests = MUTATIONS[name]
    file = tree / "lightning_dropreg" / path
    whole = file.read_text()
    if whole.count(old) != 1:
        return False, f"the passage is {whole.count(old)} times in {path}"
    file.write_text(whole.replace(old, new))
    output = tree / "said.txt"
    try:
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests, tree, output))
        process.start()
        process.join()
    finally:
        file.write_text(whole)
    said = (output.read_text().strip().splitlines() or ["nothing was said"])[-1]
    skipped = "skipped" in said and "passed" not in said and "failed" not in said
    return None if skipped else process.exitcode == 1, said


def run_tests(tests: str, tree: Path, output: Path) -> None:
    """Run tests in a process of their own, in which what takes long to import is there already, and leave it."""
    os.chdir(tree)
    sys.path[:0] = [str(tree)]
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = True
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        code = pytest.main(["-q", "-n", "0", "-x", "-p", "no:cacheprovider", *shlex.split(f"tests/{tests}")])
        sys.stdout.flush()
    os._exit(int(code))


_WORDS = {"caught": True, "missed": False, "not run": None}


def note(name: str, found: bool | None, said: str, at: str) -> None:
    """Write down what came of a mutation, in the order of the table."""
    known = json.loads(RECORD.read_text())["mutations"] if RECORD.is_file() else []
    rows = {each["name"]: each for each in known if "name" in each}
    kept = []
    for each, row in MUTATIONS.items():
        written = dict(zip(("file", "old", "new", "tests"), row, strict=True))
        known_row = rows.get(each, {})
        same = all(known_row.get(key) == value for key, value in written.items())
        result = {"caught": None, "said": "not run"}
        if same:
            result = {key: known_row[key] for key in ("caught", "said", "commit") if key in known_row}
        if each == name:
            result = {"caught": found, "said": said, "commit": at}
        kept.append({"name": each, **written, **result})
    counts = {word: sum(e["caught"] is is_so for e in kept) for word, is_so in _WORDS.items()}
    RECORD.write_text(json.dumps({**counts, "mutations": kept}, indent=1) + "\n")


def main() -> None:
    """Break everything, or what was named, one after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("hypothesis", "jsonargparse", "lightning.pytorch.cli", "pdoc", "torchmetrics"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    missed, at = 0, commit()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", ".venv", "__pycache__", "runs"))
        for name in sys.argv[1:] or MUTATIONS:
            found, said = caught(name, tree)
            missed += found is False
            note(name, found, said, at)
            word = next(word for word, is_so in _WORDS.items() if found is is_so)
            print(word, "-", name, "-", said, flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
