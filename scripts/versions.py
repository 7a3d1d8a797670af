"""Runs the test suite with the oldest and the newest versions that are supported, and writes down what happened.

    python scripts/versions.py oldest newest            # makes environments in build/versions: minutes, some GB
    python scripts/versions.py newest --python .venv/bin/python   # in an environment that is there

The result is `docs/versions.json`: for each set of versions what was installed, how many tests passed, were skipped or
failed, and for each failure why it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "versions.json"
TOOLS = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "matplotlib", "scikit-learn", "torchtext==0.6.0"]
SETS = {
    "oldest": [
        "torch==2.6.0",
        "lightning==2.5.0",
        "pytorch-lightning==2.5.0",
        "torchmetrics==1.0.0",
        "rich==12.3.0",
        "jsonargparse[signatures]==4.45.0",
        "numpy<2.3",
        "setuptools<81",  # Lightning 2.5.0 imports pkg_resources
    ],
    "newest": [
        "torch==2.14.1",
        "lightning",
        "torchmetrics",
        "rich",
        "jsonargparse[signatures]",
        "transformers",
        "peft",
    ],
}
"""The lower bounds of ``pyproject.toml``, and the newest that could be installed when this was run last."""
SHOWN = (
    "torch", "lightning", "pytorch-lightning", "torchmetrics", "rich", "jsonargparse", "numpy", "transformers",
)  # fmt: skip


def environment(name: str) -> Path:
    """Make a virtual environment, if it is not there, and return its Python."""
    folder = ROOT / "build" / "versions" / name
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *SETS[name], *TOOLS], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Return what is installed of the packages that matter."""
    code = (
        "import importlib.metadata as m, json\n"
        f"print(json.dumps({{d.metadata['Name'].lower(): d.version for d in m.distributions()"
        f" if d.metadata['Name'].lower() in {SHOWN}}}))"
    )
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(sorted(json.loads(found).items()))


def run(python: Path, arguments: list[str]) -> str:
    """Run the suite and return what it printed."""
    command = [str(python), "-m", "pytest", "-q", "--tb=line", "-rf", *arguments]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=surroundings, check=False).stdout


def counts(printed: str) -> dict[str, int]:
    """Read the last line of pytest."""
    last = next(line for line in reversed(printed.splitlines()) if re.search(r"\d+ (passed|failed)", line))
    found = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {kind: found.get(kind, 0) for kind in ("passed", "failed", "skipped", "error", "errors")}


def main() -> None:
    """Run the sets that are asked for and update the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--python", type=Path, help="Python of an environment that is there.")
    parser.add_argument("--log", type=Path, help="What the suite printed already, instead of running it.")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, extra = parser.parse_args(given[:cut]), given[cut + 1 :]
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for name in options.sets:
        python = options.python or environment(name)
        printed = options.log.read_text() if options.log else run(python, extra)
        failed = dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, flags=re.MULTILINE))
        reasons = record.get(name, {}).get("failures", {})
        record[name] = {
            "versions": installed(python),
            **{kind: n for kind, n in counts(printed).items() if n or kind in {"passed", "failed"}},
            "failures": {test: reasons.get(test, "") for test in failed},
        }
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        print(name, counts(printed))


if __name__ == "__main__":
    main()
