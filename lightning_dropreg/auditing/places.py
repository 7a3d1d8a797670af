"""Where something is: path of the module, and file and line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

__all__ = ["Paths", "Place", "current_line", "defined_at", "made_at"]

# code of others that only passes calls on
_PASSING = (
    "torch.",
    "contextlib",
    "functools",
    "lightning.",
    "lightning_dropreg.auditing",
    "lightning_dropreg.callbacks",
    "lightning_dropreg.interception",
    "lightning_dropreg.nn",
    "lightning_dropreg.passes",
    "lightning_dropreg.placing",
    "lightning_dropreg.session",
)


class Place(NamedTuple):
    """Path of a module, and file and line; either may be empty."""

    path: str
    line: str

    def __str__(self) -> str:
        """Write both."""
        return f"{self.path} ({self.line})" if self.path and self.line else self.path or self.line


class Paths:
    """The paths of all modules below some roots."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.roots = list(roots)
        self._paths: dict[int, str] = {}
        self._parents: dict[int, nn.Module] = {}
        for root in self.roots:
            prefix = f"{type(root).__name__}." if len(self.roots) > 1 else ""
            for path, module in root.named_modules():
                self._paths.setdefault(id(module), prefix + path if path else type(root).__name__)
                for child in module.children():
                    self._parents.setdefault(id(child), module)

    def of(self, module: nn.Module, within: Sequence[nn.Module] = ()) -> str:
        """Return the path of a module; one that is made on the fly is known by its class and who made it."""
        if id(module) in self._paths:
            path = self._paths[id(module)]
            # a parametrization is known by the name of its weight
            return re.sub(r"parametrizations\.(\w+)\.\d+$", r"\1", path)
        outer = next((self._paths[id(one)] for one in reversed(within) if id(one) in self._paths), "")
        return f"{outer}.{type(module).__name__}" if outer else type(module).__name__

    def parent(self, module: nn.Module) -> nn.Module | None:
        """Return the module that a module is a child of; None for a root."""
        return self._parents.get(id(module))


def current_line() -> str:
    """Return file and line of the user's code that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_PASSING):
            return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def defined_at(module: nn.Module, attribute: str = "") -> str:
    """Return file and line where the class of a module sets an attribute, or else where its forward begins."""
    kind = type(module)
    try:
        lines, start = inspect.getsourcelines(kind)
        file = _short(inspect.getsourcefile(kind) or "")
    except (OSError, TypeError):
        return ""
    patterns = [rf"\bself\.{re.escape(attribute)}\b.*="] if attribute else []
    for pattern in [*patterns, r"\bdef (forward|training_step)\b"]:
        for number, line in enumerate(lines):
            if re.search(pattern, line):
                return f"{file}:{start + number}"
    return f"{file}:{start}"


def made_at(paths: Paths, module: nn.Module) -> str:
    """Return file and line where a module is made, if that is in the class of one above it that is not torch's."""
    below, above = module, paths.parent(module)
    while above is not None and type(above).__module__.startswith("torch.nn"):
        below, above = above, paths.parent(above)
    if above is None:
        return defined_at(module)
    return defined_at(above, next((name for name, child in above.named_children() if child is below), ""))


def _short(file: str) -> str:
    """A path from the current directory, or the name of a file of somewhere else."""
    path = Path(file)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return path.relative_to(Path.cwd()).as_posix()
    return path.name
