"""What somebody meant who misspelt a key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["check_keys", "nearest"]

# How jsonargparse says that it does not know something.
_KEY = re.compile(r"(?:[Oo]ption|[Kk]ey) ['\"]([\w.]+)['\"] is not accepted|does not accept option ['\"]([\w.]+)['\"]")
_ARGUMENT = re.compile(r"unrecognized arguments: --([\w.]+)")
_CLASS = re.compile(r"class_path ['\"]([\w.]+)['\"]")
_VALUE = re.compile(r"Got value: Namespace\(class_path=['\"]([\w.]+)['\"]")
_ATTRIBUTE = re.compile(r"module ['\"]([\w.]+)['\"] has no attribute ['\"](\w+)['\"]")
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


def nearest(message: str, parser: Any) -> str | None:
    """Find the known key that is nearest to the one that a parser's message complains about.

    Args:
        message: What the parser says.
        parser: The parser: one of jsonargparse.

    Returns:
        The nearest key or class, or None if nothing is near.
    """
    if found := _ATTRIBUTE.search(message):
        module, name = found.groups()
        close = _close(name, getattr(import_module(module), "__all__", dir(import_module(module))))
        return f"{module}.{close}" if close else None
    key = _KEY.search(message) or _ARGUMENT.search(message)
    if key is None:
        return None
    given: str = next(group for group in key.groups() if group)
    # the class whose argument it is: named last before the key, or with the value that was given
    classes = _CLASS.findall(message[: key.start()]) + _VALUE.findall(message[key.end() :])[:1]
    if classes:
        return _close(given.partition(".")[0], {*_parameters(classes[-1]), *_OF_A_CLASS})
    group = re.search(r"Group ['\"]([\w.]+)['\"]", message)
    parts = [*(group[1].split(".") if group else ()), *given.split(".")]
    known = [name.split(".") for name in _destinations(parser)]
    for depth in range(1, len(parts) + 1):  # the first part of the key that is wrong
        there = {".".join(name[:depth]) for name in known if len(name) >= depth}
        if ".".join(parts[:depth]) not in there:
            return _close(".".join(parts[:depth]), there)
    return None


def _close(name: str, known: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.5)), None)


def _destinations(parser: Any) -> set[str]:
    """Every option of a parser and of its commands."""
    found = {action.dest for action in parser._actions}
    for action in parser._actions:
        for name, child in action.choices.items() if isinstance(action.choices, dict) else ():
            found |= {name, *_destinations(child)}
    return found


def _parameters(path: str) -> set[str]:
    """What a class takes, its bases' arguments included where it passes them on."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name, None)
    names: set[str] = set()
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        if "__init__" in base.__dict__:
            names |= set(inspect.signature(base.__dict__["__init__"]).parameters)
    return names - {"self", "args", "kwargs"}


def check_keys(content: Any, parser: Any, file: str) -> None:
    """Refuse what the parser would not find words for: a misspelt part of the structure of a configuration file.

    Args:
        content: What the file holds.
        parser: The parser that will read it.
        file: Its name, for the message.

    Raises:
        InvalidArgumentError: If a key of the first level is unknown, or one looks like ``class_path`` or ``init_args``
            and is not.
    """
    if not isinstance(content, dict):
        return
    first_level = {name.partition(".")[0] for name in _destinations(parser)}
    for key in content:
        if key not in first_level:
            raise InvalidArgumentError(_misspelt(file, str(key), _close(str(key), first_level)))
    for path in _paths(content):
        key = path[-1]
        close = get_close_matches(key, _OF_A_CLASS, n=1, cutoff=0.8)
        if close and key not in _OF_A_CLASS:
            raise InvalidArgumentError(_misspelt(file, ".".join(path), close[0]))


def _misspelt(file: str, key: str, close: str | None) -> str:
    return f"{file}: the key {key!r} is unknown." + (f" Did you mean {close!r}?" if close else "")


def _paths(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every key below `node`."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        path = (*above, str(key))
        if isinstance(node, dict):
            yield path
        if isinstance(value, (dict, list)):
            yield from _paths(value, path)
