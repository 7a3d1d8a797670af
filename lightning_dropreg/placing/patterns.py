"""Patterns of module paths: what they match, and what was meant where they match nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from lightning_dropreg.checks import check_drop_prob, check_instance, is_probability
from lightning_dropreg.errors import InvalidArgumentError, PatternError

__all__ = ["Match", "check_patterns", "covers", "match", "nearest_paths"]


class Match(NamedTuple):
    """A module that a pattern matches: its path, the module, the pattern, and the drop probability asked for."""

    path: str
    module: nn.Module
    pattern: str
    p: float


def check_patterns(patterns: object, name: str = "patterns") -> None:
    """Refuse what is no mapping from patterns to drop probabilities.

    Raises:
        InvalidArgumentError: If it is none, or empty, or a probability is outside ``[0, 1)``.
    """
    check_instance(name, patterns, Mapping, 'a dict of patterns and drop probabilities, {"encoder.*": 0.1}')
    assert isinstance(patterns, Mapping)
    if not patterns:
        raise InvalidArgumentError(f'{name} is empty; name what to act on, for example {{"*": 0.1}}.')
    for pattern, p in patterns.items():
        check_instance(f"a key of {name}", pattern, str, "a pattern of module paths")
        if not is_probability(p):
            check_drop_prob(p, f"the pattern {pattern!r}")
            raise InvalidArgumentError(f"{name}[{pattern!r}]={p!r} must be a number in [0, 1).")


def covers(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path or the path of something above it.

    Returns:
        True if it does.

    Example:
        >>> covers("*.mlp", "layers.3.mlp"), covers("*.mlp", "layers.3.mlp.drop"), covers("*.mlp", "layers.3.mlp2")
        (True, True, False)
    """
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(len(parts), 0, -1))


def match(module: nn.Module, patterns: Mapping[str, float]) -> list[Match]:
    """Find the modules whose own paths match; where several patterns do, the last one counts.

    Args:
        module: The model.
        patterns: Patterns of paths as in a shell (``"model.layers.*.mlp"``; ``*`` also spans dots), with drop
            probabilities.

    Returns:
        The modules, in the order of ``named_modules``.

    Raises:
        PatternError: If a pattern matches no module; the message names the nearest paths.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [(found.path, found.p) for found in match(net, {"*": 0.1, "1": 0.2})]
        [('0', 0.1), ('1', 0.2)]
    """
    check_patterns(patterns)
    found: dict[str, Match] = {}
    used = set()
    named = [(path, child) for path, child in module.named_modules() if path]
    for path, child in named:
        for pattern, p in patterns.items():
            if fnmatch.fnmatchcase(path, pattern):
                found[path] = Match(path, child, pattern, float(p))
                used.add(pattern)
    for pattern in patterns:
        if pattern not in used:
            raise PatternError(
                f"No module of {type(module).__name__} has a path like {pattern!r}"
                f"{nearest_paths(pattern, [path for path, _ in named])}."
            )
    return list(found.values())


def nearest_paths(pattern: str, paths: Iterable[str]) -> str:
    """Say which of `paths` are nearest to a pattern, for the end of a message.

    Returns:
        A clause that begins with a semicolon; empty if there is no path at all.
    """
    paths = list(dict.fromkeys(paths))
    close = get_close_matches(pattern, paths, n=3, cutoff=0.4) or _by_last_name(pattern, paths)
    if close:
        return f"; the nearest are {', '.join(map(repr, close))}"
    return f"; there are {', '.join(map(repr, paths[:5]))}{' …' * (len(paths) > 5)}" if paths else ""


def _by_last_name(pattern: str, paths: Sequence[str]) -> list[str]:
    names = {path.rsplit(".", 1)[-1]: path for path in reversed(paths)}
    return [names[name] for name in get_close_matches(pattern.rsplit(".", 1)[-1], list(names), n=3, cutoff=0.4)]
