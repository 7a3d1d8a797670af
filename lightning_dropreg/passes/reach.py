"""What a step can reach: random generators of its own, objects and variables, and things that only move on.

Attributes of modules and objects are followed, the closures of functions, and the globals that they name. Only code
of the user's is read; objects of installed packages are looked into for what they hold, not for what they call.
"""

from __future__ import annotations

import functools
import io
import itertools
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.passes.copies import ATOMS
from lightning_dropreg.passes.still import Still
from lightning_dropreg.passes.variables import assigned, in_cell, in_class, in_globals, in_slots, is_kept, slots_of

__all__ = ["Reach", "is_generator"]

_LARGEST = 256  # longer containers are data
_LOOKED_AT = 4096
_DEEPEST = 12
_MOST = 20_000
_CLOSED = frozenset({"torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "pandas"})
_ATOMS = (int, float, bool, str, bytes, complex, type(None), Tensor, torch.dtype, torch.device)
_FUNCTIONS = (types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial)


def is_generator(value: Any) -> bool:
    """Whether `value` is a random generator whose state can be put back."""
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    kinds = (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator) if numpy is not None else ()
    return isinstance(value, kinds)


class Reach:
    """Everything that can be reached from some roots and is not put back with the modules.

    Args:
        roots: Where to begin, by the name that messages call it: ``{"self": module, "training_step": step}``.
        before: What was reached at the look before.

    Attributes:
        objects: Plain objects of classes of the user's, by place, and variables that the step may change.
        moving: What cannot be put back and may move on: iterators, open streams, by place.
        long: Containers taken for data, by place: what is in their entries is not put back.
        still: Large tensors that passes share, as far as they were looked at.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> net.augment = types.SimpleNamespace(rng=random.Random(0), rows=iter([1, 2]))
        >>> found = Reach({"self": net})
        >>> [place for place, _ in found.generators()], list(found.moving)
        (['self.augment.rng'], ['self.augment.rows'])
    """

    def __init__(self, roots: Mapping[str, Any], before: Reach | None = None) -> None:
        self.still: Still = Still(None if before is None else before.still)
        self.objects: dict[str, Any] = {}
        self.moving: dict[str, Any] = {}
        self.long: dict[str, Any] = {}
        # by the place that holds it, for another may be put there for every epoch
        self._generators: list[tuple[str, Any, Any]] = []
        self._seen: dict[int, Any] = {}
        self._globals: dict[int, set[str]] = {}
        self._own = {type(root).__module__.partition(".")[0] for root in roots.values()}
        self._queue: deque[tuple[str, Any, Any, Any, int]] = deque()
        for name, root in roots.items():
            self._queue.append((name, root, (root,), 0, 0))
        while self._queue and len(self._seen) < _MOST:
            self._visit(*self._queue.popleft())

    def generators(self) -> list[tuple[str, Any]]:
        """Return the random generators that are in these places now, each once, and where."""
        found: dict[int, tuple[str, Any]] = {}
        for place, holder, key in self._generators:
            try:
                value = holder[key]
            except (LookupError, TypeError, ValueError):
                continue
            if is_generator(value):
                found.setdefault(id(value), (place, value))
        return list(found.values())

    def positions(self) -> dict[str, Any]:
        """Return where each thing in `moving` is, of which that can be told: what is elsewhere later has moved on."""
        found = {place: _position(value) for place, value in self.moving.items()}
        return {place: position for place, position in found.items() if position is not None}

    def insides(self) -> dict[str, list[Any]]:
        """Return what is in the entries of `long`: of some thousand of each, evenly apart."""
        return {place: _inside_of(value) for place, value in self.long.items()}

    def _visit(self, place: str, value: Any, holder: Any, key: Any, depth: int) -> None:
        if id(value) in self._seen or type(value) in ATOMS or isinstance(value, _ATOMS):
            return
        if is_generator(value):
            self._generators.append((place, holder, key))
            return
        if depth > _DEEPEST:
            return
        self._seen[id(value)] = value
        for name, child, where, at in self._inside(place, value):
            self._queue.append((name, child, where, at, depth + 1))

    def _inside(self, place: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        kind = type(value)
        if isinstance(value, _FUNCTIONS):
            yield from self._of_function(place, value)
        elif isinstance(value, type):
            if self._is_own(value):
                yield from self._of_class(place, value)
        elif isinstance(value, (list, tuple, deque, set, frozenset)):
            if len(value) > _LARGEST:
                self.long[place] = value
            else:
                held = value if isinstance(value, Sequence) else list(value)
                yield from ((f"{place}[{i}]", child, held, i) for i, child in enumerate(held))
            yield from self._of_object(place, value)
        elif isinstance(value, dict):
            if len(value) > _LARGEST:
                self.long[place] = value
            else:
                yield from ((f"{place}[{k!r}]", child, value, k) for k, child in list(value.items()))
            yield from self._of_object(place, value)
        elif isinstance(value, (io.IOBase, random.SystemRandom)) or hasattr(kind, "__next__"):
            self.moving[place] = value
            if self._is_own(kind):
                yield from self._of_object(place, value)
        elif not isinstance(value, types.ModuleType):
            yield from self._of_object(place, value)

    def _of_object(self, place: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        kind: Any = type(value)
        own = self._is_own(kind)
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict and (own or not _is_closed(kind) or isinstance(value, nn.Module)):
            if own and not isinstance(value, (nn.Module, types.ModuleType)):
                self.objects[place] = value
            yield from ((f"{place}.{name}", child, attributes, name) for name, child in list(attributes.items()))
            if isinstance(value, nn.Module):
                modules = value._modules
                yield from ((f"{place}.{name}", child, modules, name) for name, child in list(modules.items()))
        if own and slots_of(kind):
            held = in_slots(value)
            self.objects[f"{place} {id(value)}"] = held
            yield from ((f"{place}.{name}", child, vars(held), name) for name, child in vars(held).copy().items())
        for cls in kind.__mro__ if own or isinstance(value, nn.Module) else ():
            if self._is_own(cls):
                yield from self._of_class(place, cls)

    def _of_class(self, place: str, cls: type) -> Iterator[tuple[str, Any, Any, Any]]:
        kept = [name for name, child in vars(cls).items() if type(child) in ATOMS or is_kept(child)]
        kept = [name for name in kept if not name.startswith("__")]
        if kept:
            self.objects[f"class {cls.__qualname__} {id(cls)}"] = in_class(cls, kept)
        # methods have no place of their own that anybody would look for
        for name, child in list(vars(cls).items()):
            yield (place if isinstance(child, _FUNCTIONS) else f"{place}.{name}"), child, vars(cls), name

    def _of_function(self, place: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        for part in _parts(value):
            yield place, part, (part,), 0
        function = getattr(value, "__func__", value)
        if not isinstance(function, types.FunctionType) or not self._is_own(function):
            return
        changed = assigned(function.__code__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                content = cell.cell_contents
            except ValueError:
                continue  # empty
            if name in changed or is_kept(content):
                self.objects[f"{name} {id(cell)}"] = in_cell(name, cell)
            yield name, content, _Cell(cell), 0
        names, space = set(_names(function.__code__)), function.__globals__
        kept = {name for name in names & space.keys() if name in changed or is_kept(space[name])}
        if kept:
            shared = self._globals.setdefault(id(space), set())
            shared |= kept
            self.objects[f"globals {id(space)}"] = in_globals(space, shared)
        for name in names & space.keys():
            if isinstance(space[name], types.ModuleType):
                attributes = vars(space[name])
                if _is_closed(space[name]):
                    continue
                yield from ((f"{name}.{n}", attributes[n], attributes, n) for n in names & attributes.keys())
            else:
                yield name, space[name], space, name

    def _is_own(self, value: Any) -> bool:
        """Whether a class or function is of the user's own code."""
        module = getattr(value, "__module__", None)
        if not isinstance(module, str):
            return False
        root = module.partition(".")[0]
        if root == "lightning_dropreg":
            return module.startswith(("lightning_dropreg.paper", "lightning_dropreg.nn"))
        return not _is_closed_root(root) and (root in self._own or not _is_installed(root))


def _inside_of(value: Any) -> list[Any]:
    entries = value.values() if isinstance(value, dict) else value
    apart = itertools.islice(entries, 0, None, max(1, len(value) // _LOOKED_AT))
    return [_content(entry) for entry in apart if type(entry) not in ATOMS]


def _content(entry: Any) -> Any:
    """Something that is another when an entry has been changed in place, as far as its first level shows it."""
    if isinstance(entry, Tensor):
        return id(entry), 0 if entry.is_inference() else entry._version
    held = entry if isinstance(entry, (list, tuple, deque, set, dict)) else getattr(entry, "__dict__", ())
    values = held.values() if isinstance(held, dict) else held
    return len(held), [v if type(v) in ATOMS else id(v) for v in itertools.islice(values, _LARGEST)]


def _position(value: Any, depth: int = 0) -> Any:
    """Something that is equal as long as an iterator or a stream does not move on; None if there is no such thing."""
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return "ended"
        return frame.f_lasti, {name: id(each) for name, each in frame.f_locals.items()}
    try:
        if isinstance(value, io.IOBase):
            return value.tell()
        _, arguments, *state = value.__reduce__()
    except Exception:
        return None  # of a kind that does not tell
    inside = [_position(each, depth + 1) for each in arguments if hasattr(type(each), "__next__") and depth < 4]
    return _plain((arguments, state)), inside


def _plain(value: Any) -> Any:
    """What of it is plain values; other objects may be made anew by whoever tells them."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value if type(value) in ATOMS else None


def _parts(value: Any) -> list[Any]:
    """What a function, or what wraps one, holds."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, property):
        return [value.fget, value.fset]
    function = getattr(value, "__func__", value)
    names = ("__wrapped__", "__defaults__", "__kwdefaults__")
    parts = [getattr(value, "__self__", None), *(getattr(function, name, None) for name in names)]
    return [part for part in parts if part is not None]


class _Cell:
    """A cell of a closure as something to index."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def __getitem__(self, _: int) -> Any:
        return self._cell.cell_contents


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_closed(value: Any) -> bool:
    module = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    root = str(module).partition(".")[0]
    if root == "lightning_dropreg":
        return not str(module).startswith(("lightning_dropreg.paper", "lightning_dropreg.nn"))
    return root != "types" and _is_closed_root(root)


def _is_closed_root(root: str) -> bool:
    return root in _CLOSED or (root in sys.stdlib_module_names and root != "__main__")


@functools.lru_cache(maxsize=4096)
def _is_installed(root: str) -> bool:
    file = getattr(sys.modules.get(root), "__file__", None)
    paths = getattr(sys.modules.get(root), "__path__", None)
    places = [file] if file else list(paths or [])
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(str(place).startswith(folder) for place in places for folder in installed if folder)
