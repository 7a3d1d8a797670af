"""Runs that are made once and kept: one line of JSON for each, with the machine and the versions it was made with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lightning_dropreg.cli.machine import describe_machine

from .training import Setting, train

__all__ = ["Records", "Run", "provenance"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """A method in a setting, on some seeds.

    Attributes:
        method: A key of `benchmarks.methods.METHODS`.
        parameters: Of the method.
        setting: What it shares with others.
        seeds: One for each network.
        part: What of a study it belongs to, ``"tuning"`` or ``"fresh"``, say.
    """

    method: str
    parameters: dict[str, Any]
    setting: Setting
    seeds: Sequence[int]
    part: str = "fresh"
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> dict[str, Any]:
        """Return all that makes it another run than others, in plain values."""
        key: dict[str, Any] = {
            "part": self.part,
            "method": self.method,
            "parameters": self.parameters,
            "setting": asdict(self.setting),
        }
        key |= {"options": self.options} if self.options else {}
        plain: dict[str, Any] = json.loads(json.dumps({**key, "seeds": list(self.seeds)}))
        return plain


class Records:
    """A file of finished runs, which grows line by line: what was stopped goes on where it was.

    Args:
        path: The file; made with the first run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.lines = [json.loads(line) for line in lines]

    def find(self, run: Run) -> dict[str, Any] | None:
        """Return the record of a run; None if it has not been made."""
        return self._with(run.key())

    def of(self, **what: Any) -> list[dict[str, Any]]:
        """Return the records with these values (``method``, ``part``, ...), in the order in which they were made."""
        return [line for line in self.lines if all(line.get(name) == value for name, value in what.items())]

    def make(self, run: Run, on_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Return the record of a run, which is made if it is not there."""
        return self.keep(
            run.key(), lambda: train(run.setting, run.method, run.parameters, run.seeds, on_step, **run.options)
        )

    def keep(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the record with these values, which is measured and written if it is not there."""
        found = self._with(key)
        if found is not None:
            return found
        line = {**key, **measure(), "provenance": provenance()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line

    def _with(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((line for line in self.lines if all(line.get(name) == value for name, value in key.items())), None)


def provenance() -> dict[str, Any]:
    """Return what a number depends on besides its setting: commit, command, machine, versions, what else ran."""
    machine = describe_machine(nn.Module())
    machine.pop("parameters")
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "command": " ".join([Path(sys.executable).name, "-m", *_command()]),
        **machine,
        "scikit-learn": version("scikit-learn"),
        "system": platform.system(),
    }


def _command() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).with_suffix("").parts if script.is_relative_to(ROOT) else (script.name,)
    return [".".join(name), *sys.argv[1:]]


def _commit() -> str:
    def git(*args: str) -> str:
        found = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", "lightning_dropreg", "examples/benchmarks/*.py", "examples/baselines")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
