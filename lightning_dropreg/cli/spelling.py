"""What somebody meant who misspelt a key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["ATTRIBUTE", "check_keys", "nearest", "owner", "parameters"]

# How jsonargparse says that it does not know something.
_KEY = re.compile(r"(?:[Oo]ption|[Kk]ey) ['\"]([\w.]+)['\"] is not accepted|does not accept option ['\"]([\w.]+)['\"]")
_ARGUMENT = re.compile(r"unrecognized arguments: --([\w.]+)")
_CLASS = re.compile(r"class_path ['\"]([\w.]+)['\"]")
_VALUE = re.compile(r"Got value: Namespace\((?:init_args=.*, )?class_path=['\"]([\w.]+)['\"]")
ATTRIBUTE = re.compile(r"module ['\"]([\w.]+)['\"] has no attribute ['\"](\w+)['\"]")
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


def nearest(message: str, parser: Any) -> str | None:
    """Find the key or class of a parser that is nearest to the one its message complains about; None if none is."""
    if found := ATTRIBUTE.search(message):
        module, name = found.groups()
        close = _close(name, getattr(import_module(module), "__all__", dir(import_module(module))))
        return f"{module}.{close}" if close else None
    key = _KEY.search(message) or _ARGUMENT.search(message)
    if key is None:
        return None
    given: str = next(group for group in key.groups() if group)
    if kind := owner(message, key):
        return _close(given.partition(".")[0], {*parameters(kind), *_OF_A_CLASS})
    group = re.search(r"Group ['\"]([\w.]+)['\"]", message)
    parts = [*(group[1].split(".") if group else ()), *given.split(".")]
    known = [name.split(".") for name in _destinations(parser)]
    for depth in range(1, len(parts) + 1):  # the first part of the key that is wrong
        there = {".".join(name[:depth]) for name in known if len(name) >= depth}
        if ".".join(parts[:depth]) not in there:
            return _close(".".join(parts[:depth]), there)
    return None


def owner(message: str, key: re.Match[str]) -> str | None:
    """Find the class whose argument a parser's message complains about.

    Returns:
        The class with the value that was given, or named last before the key; None if it is no argument of a class.
    """
    rest, before = message[key.end() :].lstrip(". "), _CLASS.findall(message[: key.start()])
    if given := _VALUE.match(rest) or (None if before else _VALUE.search(rest)):
        return given[1]
    return before[-1] if before else None


def _close(name: str, known: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.5)), None)


def _destinations(parser: Any) -> set[str]:
    """Every option of a parser and of its commands."""
    found = {action.dest for action in parser._actions}
    for action in parser._actions:
        for name, child in action.choices.items() if isinstance(action.choices, dict) else ():
            found |= {name, *_destinations(child)}
    return found


def parameters(path: str) -> set[str]:
    """Name what the class of a dotted path takes, its bases' arguments included where it passes them on."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name, None)
    except (ImportError, ValueError):  # "" and a name without a module are no path
        return set()  # the parser says so
    names: set[str] = set()
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        if "__init__" not in base.__dict__:
            continue
        parameters = inspect.signature(base.__dict__["__init__"]).parameters
        names |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return names - {"self", "args", "kwargs"}


def check_keys(layers: Sequence[tuple[str, Any]], parser: Any, before: dict[str, Any]) -> None:
    """Refuse a key in a configuration file that nothing reads, before the parser buries it under what it tried.

    Args:
        layers: Names and contents of the files, each of which changes those before it.
        parser: The parser that will read them.
        before: What earlier files and options have set.

    Raises:
        InvalidArgumentError: If a key of the first level or of the trainer is unknown, one looks like ``class_path`` or
            ``init_args`` and is not, or a class does not take an argument.
    """
    known = [name.split(".") for name in _destinations(parser)]
    merged = before
    for file, content in layers:
        if not isinstance(content, dict):
            continue
        merged = _merged(merged, content)
        for path in _paths(content):
            close = get_close_matches(path[-1], _OF_A_CLASS, n=1, cutoff=0.8)
            if close and path[-1] not in _OF_A_CLASS:
                raise InvalidArgumentError(_misspelt(file, path, close[0]))
            if len(path) == 1 or path[:-1] == ("trainer",):
                there = {
                    name[len(path) - 1]
                    for name in known
                    if name[: len(path) - 1] == list(path[:-1]) and len(name) >= len(path)
                }
                if path[-1].rstrip("+") not in there:
                    raise InvalidArgumentError(_misspelt(file, path, _close(path[-1], there)))
        for path, kind in _arguments(merged):
            taken = parameters(kind)
            if taken and path[-1] not in taken and path in set(_paths(content)):
                raise InvalidArgumentError(_misspelt(file, path, _close(path[-1], taken), f" to {kind}"))


def _misspelt(file: str, path: Sequence[str], close: str | None, reader: str = "") -> str:
    return f"{file}: the key {'.'.join(path)!r} is unknown{reader}." + (f" Did you mean {close!r}?" if close else "")


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _arguments(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The way to every key of every ``init_args``, and the class that takes it."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "init_args" and isinstance(value, dict) and "." in str(node.get("class_path", "")):
            for name in value:
                yield (*above, "init_args", str(name)), node["class_path"]
        if isinstance(value, (dict, list)):
            yield from _arguments(value, (*above, str(key)))


def _paths(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every key below `node`."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        path = (*above, str(key))
        if isinstance(node, dict):
            yield path
        if isinstance(value, (dict, list)):
            yield from _paths(value, path)
