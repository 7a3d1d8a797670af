"""Runs the test suite with the oldest and the newest versions that `pyproject.toml` admits; writes down what happened.

    python scripts/versions.py oldest newest                      # makes environments in build/versions: some GB
    python scripts/versions.py oldest --interpreter python3.10    # with another Python
    python scripts/versions.py newest --python .venv/bin/python   # in an environment that is there
    python scripts/versions.py newest --python .venv/bin/python -- tests/numerics     # arguments for pytest

The oldest versions are the bounds themselves, those of every extra included, so that a bound is what was run. The
result is `docs/versions.json`: for each set the commit, the machine, what was installed, how many tests passed, were
skipped and failed, and why each was skipped. Why a test failed is written into it by hand, and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "versions.json"
BOUND = re.compile(r'"([\w-]+)(\[\w+\])?(>=|==)([\d.]+)[^"]*"')
TOOLS = {"setuptools", "ruff", "mypy", "import-linter", "docutils", "furo", "myst-nb", "sphinx", "sphinx-design"}
TOOLS |= {"sphinx-copybutton"}
"""What no test runs: the build, the linters, the site."""


def bounds() -> dict[str, tuple[str, str, str]]:
    """Read the lower bounds of ``pyproject.toml``: for each name its extras, the sign and the version."""
    found = {name: tuple(of) for name, *of in BOUND.findall((ROOT / "pyproject.toml").read_text())}
    # the lightning package installs the newest of this beside itself, and it may be what a user's modules are made of
    found["pytorch-lightning"] = ("", *found["lightning"][1:])
    return {name: value for name, value in found.items() if name not in TOOLS}


def wanted(name: str) -> list[str]:
    """Return what pip is to install."""
    found = bounds().items()
    return [
        f"{package}{extras}{'==' if name == 'oldest' else sign}{version}" for package, (extras, sign, version) in found
    ]


def environment(name: str, interpreter: str) -> Path:
    """Make a virtual environment, if it is not there, and return its Python."""
    folder = ROOT / "build" / "versions" / name
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    for what in (wanted(name), ["--no-deps", "--editable", str(ROOT)]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *what], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Return which Python it is, and what is installed of the packages that have a bound."""
    names = sorted({*bounds(), "numpy"})
    code = (
        "import importlib.metadata as m, json, platform\n"
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    printed = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    found = json.loads(printed)
    return {name: found.get(name.lower().replace("_", "-"), "absent") for name in ("python", *names)}


def run(python: Path, arguments: list[str]) -> str:
    """Run the suite and return what it printed."""
    command = [str(python), "-m", "pytest", "-q", "--tb=line", "-rfEs", *arguments]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=surroundings, check=False).stdout


def outcome(printed: str, reasons: dict[str, str]) -> dict[str, object]:
    """Read what pytest printed: the last line, and the lines on what failed and was skipped."""
    last = next(line for line in reversed(printed.splitlines()) if re.search(r"\d+ (passed|failed)", line))
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, flags=re.MULTILINE)
    skipped: Counter[str] = Counter()
    for n, why in re.findall(r"^SKIPPED \[(\d+)\] [^:]+:(?:\d+:)? (.+)$", printed, flags=re.MULTILINE):
        skipped[why] += int(n)
    return {
        **{kind: counts.get(kind, 0) for kind in ("passed", "failed", "error", "skipped")},
        "failures": {test: reasons.get(test, "") for test in dict.fromkeys(failed)},
        "skips": dict(skipped.most_common()),
    }


def commit() -> str:
    """Return the commit that is checked out, and whether anything was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run the sets that are asked for and update the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET", help="oldest or newest; with --python any name.")
    parser.add_argument("--python", type=Path, help="Python of an environment that is there.")
    parser.add_argument("--interpreter", default=sys.executable, help="Python to make environments with.")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, extra = parser.parse_args(given[:cut]), given[cut + 1 :]
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    code = commit()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    for name in options.sets:
        python = options.python or environment(name, options.interpreter)
        found = outcome(run(python, extra), record.get(name, {}).get("failures", {}))
        record[name] = {"commit": code, "machine": machine, "versions": installed(python), **found}
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        print(name, {kind: found[kind] for kind in ("passed", "failed", "error", "skipped")})


if __name__ == "__main__":
    main()
