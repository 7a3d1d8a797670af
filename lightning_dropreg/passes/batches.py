"""The containers of a batch, whatever it is made of: looked through, and built anew with other things in them.

torch's pytree takes everything but lists, tuples and dicts for a leaf. A batch may as well be a dataclass, a Hugging
Face ``BatchEncoding``, a graph of PyTorch Geometric, a subclass of dict or any object with tensors in its attributes.
All of these are containers here.
"""

from __future__ import annotations

import copy
import enum
import functools
import io
import itertools
import sys
import types
from collections import Counter, OrderedDict, UserString, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dropreg.passes.copies import ATOMS, ITERATORS
from lightning_dropreg.passes.variables import slots_of

__all__ = ["batch_tensors", "fresh_batch", "is_array", "map_batch", "read_once", "rereadable", "walk_batch"]

_DEEPEST = 32
"""What lies deeper is shared and not looked at."""

_BASES = (OrderedDict, defaultdict, Counter, dict, list, deque, tuple, set)
"""Built-in containers, subclasses before their bases."""

_CLOSED = (
    Tensor,
    nn.Module,
    torch.utils.data.Dataset,
    torch.utils.data.DataLoader,
    torch.utils.data.Sampler,
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    enum.Enum,
    io.IOBase,
    UserString,
    BaseException,
)
"""Never looked into: they are data themselves, or no data at all."""

_OPEN_MODULES = frozenset(
    {*("__main__", "abc", "argparse", "builtins", "collections", "collections.abc", "types", "typing")}
)
_CLOSED_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "pandas", "lightning"}
"""What is made of their classes is no container of a batch (a thread, a data set), but for these modules."""

_TEE: Any = type(itertools.tee(())[0])
_PLAIN = frozenset({list, tuple, dict})
_ATOMS = ATOMS | {torch.Size}


def map_batch(exchange: Callable[[Any], Any], batch: Any) -> Any:
    """Build a batch anew, with other things in it.

    Containers are dicts, lists, tuples, deques, sets (whose elements are not looked at) and their subclasses, and
    objects with attributes of classes that are no part of Python, torch or numpy: dataclasses, ``BatchEncoding``,
    PyG's ``Data``. They are copied without calling constructors, but for a ``__copy__`` of their own, and what is
    in several places, or contains itself, is so in the copy. What cannot be copied (a handle, a lock) is shared.

    Args:
        exchange: Called with everything in the batch but numbers, texts and the like, containers before what is in
            them. What it returns takes the place; ``NotImplemented`` leaves a leaf as it is and lets a container be
            built anew.
        batch: Any batch.

    Returns:
        A batch of the same make.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Rows:
        ...     x: Tensor
        ...     names: list
        >>> first = lambda value: value[:1] if isinstance(value, (Tensor, list)) else NotImplemented
        >>> map_batch(first, {"rows": Rows(torch.tensor([1, 2]), ["a", "b"]), "scale": 2})
        {'rows': Rows(x=tensor([1]), names=['a']), 'scale': 2}
    """
    return _Mapping(exchange).of(batch, 0)


def walk_batch(batch: Any) -> Iterator[tuple[str, Any]]:
    """Go through everything in a batch that is no container, each once, in order.

    Yields:
        Where it is, as one would write it in code behind the name of the batch, and what is there.

    Example:
        >>> list(walk_batch({"x": [1, 2], "y": types.SimpleNamespace(z=3)}))
        [("['x'][0]", 1), ("['x'][1]", 2), ("['y'].z", 3)]
    """
    seen: dict[int, Any] = {}
    stack = [("", batch, 0)]
    while stack:
        path, value, depth = stack.pop()
        if type(value) in _ATOMS:
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen[id(value)] = value
        kind = _kind_of(value)
        if depth > _DEEPEST or not (kind.base or kind.is_object):
            yield path, value
            continue
        inside = [(path + name, child, depth + 1) for name, child in _children(value, kind)]
        stack.extend(reversed(inside))


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch, each once, in order.

    Returns:
        The tensors.

    Example:
        >>> len(batch_tensors([torch.zeros(1), {"x": torch.ones(2)}, "text"]))
        2
    """
    return _found(batch, lambda value: isinstance(value, Tensor))


def _found(batch: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """What in a batch is wanted, as `walk_batch` has it, without the names of the places."""
    found: list[Any] = []
    seen: dict[int, Any] = {}
    stack = [(batch, 0)]
    while stack:
        value, depth = stack.pop()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen[id(value)] = value
        if wanted(value):
            found.append(value)
        elif depth <= _DEEPEST:
            stack.extend((child, depth + 1) for child in reversed(_held(value, _kind_of(value))))
    return found


def fresh_batch(batch: Any, tensors: bool, found: list[Tensor] | None = None) -> Any:
    """Return a batch that shares no container and no array with the first, so that changes in one leave the other.

    Args:
        batch: Any batch; see `map_batch`.
        tensors: Whether tensors are copied, too; otherwise they are shared.
        found: Gets the tensors in the copy, as `batch_tensors` has them.

    Returns:
        The copy.

    Example:
        >>> batch = {"x": torch.zeros(1)}
        >>> fresh_batch(batch, tensors=False).pop("x") is batch["x"]
        True
    """
    bases: dict[int, Tensor] = {}

    def exchange(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = _clone(value, bases) if tensors else value
            if found is not None:
                found.append(value)
            return value
        if type(value) in _PLAIN:
            return NotImplemented
        if type(value) is _TEE or type(value) in ITERATORS:
            return copy.copy(value)
        if is_array(value) or type(value).__module__.partition(".")[0] == "pandas":
            return value.copy()
        return bytearray(value) if type(value) is bytearray else NotImplemented

    return map_batch(exchange, batch)


def rereadable(batch: Any) -> Any:
    """Return a batch whose iterators can be gone through again, in copies (`fresh_batch`); itself, if it has none.

    Args:
        batch: Any batch; see `map_batch`.

    Returns:
        A batch in which generators, ``map``, ``zip`` and the like remember what they gave.

    Example:
        >>> batch = rereadable([(x for x in "ab")])
        >>> [list(fresh_batch(batch, tensors=False)[0]) for _ in range(2)]
        [['a', 'b'], ['a', 'b']]
    """
    if not _found(batch, _is_read_once):
        return batch
    return map_batch(lambda value: itertools.tee(value, 1)[0] if _is_read_once(value) else NotImplemented, batch)


def read_once(batch: Any) -> list[str]:
    """Return where in a batch iterators are that can be gone through once.

    Example:
        >>> read_once({"x": map(str, [1, 2])})
        ["batch['x'] (map)"]
    """
    return [f"batch{path} ({type(leaf).__name__})" for path, leaf in walk_batch(batch) if _is_read_once(leaf)]


def _is_read_once(value: Any) -> bool:
    kind = type(value)
    if kind.__module__ not in {"builtins", "itertools"} or kind in ITERATORS or kind is _TEE:
        return False
    return hasattr(kind, "__next__")


def is_array(value: Any) -> bool:
    """Whether `value` is a numpy array in memory."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and not isinstance(value, numpy.memmap)


def _clone(tensor: Tensor, bases: dict[int, Tensor]) -> Tensor:
    base = tensor._base
    if base is None or base.layout is not torch.strided or base.numel() > 4 * tensor.numel():
        base = tensor  # a row of a data set
    if id(base) not in bases:
        bases[id(base)] = base.detach().clone()
    copied = bases[id(base)]
    if base is not tensor and copied.stride() == base.stride():  # what shares memory does so in the copy
        copied = copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - base.storage_offset())
    elif base is not tensor:
        copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.requires_grad and tensor.is_leaf else copied


class _Kind(NamedTuple):
    """What is done with values of a type: a built-in container, attributes, both (a subclass), or neither (a leaf)."""

    base: type | None
    is_object: bool
    slots: tuple[str, ...] = ()
    copies_itself: bool = False


_LEAF = _Kind(None, False)


def _kind_of(value: Any) -> _Kind:
    cls: Any = type(value)
    return _kind(cls)


@functools.lru_cache(maxsize=512)
def _kind(cls: Any) -> _Kind:
    if cls in _ATOMS or issubclass(cls, _CLOSED):
        return _LEAF
    base = next((known for known in _BASES if issubclass(cls, known)), None)
    if any(map(_is_closed, cls.__mro__)):
        return _Kind(base, False) if base is not None else _LEAF
    slots = slots_of(cls)
    attributes = any("__dict__" in owner.__dict__ for owner in cls.__mro__) or bool(slots)
    if base is None and not attributes:
        return _LEAF
    return _Kind(base, attributes, slots, hasattr(cls, "__copy__") and base is None)


def _is_closed(cls: Any) -> bool:
    module: str = cls.__module__
    return module not in _OPEN_MODULES and module.partition(".")[0] in _CLOSED_LIBRARIES


def _attributes(value: Any, kind: _Kind) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for name in kind.slots:
        try:
            yield name, object.__getattribute__(value, name)
        except AttributeError:
            continue  # not set


def _children(value: Any, kind: _Kind) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    base: Any = kind.base
    if base is not None and issubclass(base, dict):
        found += [(f"[{key!r}]", child) for key, child in base.items(value)]
    elif base is not None and base is not set:
        names = getattr(value, "_fields", None) if base is tuple else None
        found += [(f".{names[i]}" if names else f"[{i}]", child) for i, child in enumerate(base.__iter__(value))]
    return found + [(f".{name}", child) for name, child in _attributes(value, kind)] if kind.is_object else found


def _held(value: Any, kind: _Kind) -> list[Any]:
    base: Any = kind.base
    if base is None or base is set:
        found: list[Any] = []
    else:
        found = list(base.values(value) if issubclass(base, dict) else base.__iter__(value))
    return found + [child for _, child in _attributes(value, kind)] if kind.is_object else found


class _Mapping:
    """One `map_batch`: remembers what became of everything."""

    def __init__(self, exchange: Callable[[Any], Any]) -> None:
        self._exchange = exchange
        # with the originals, so that their ids stay their own
        self._memo: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, depth: int) -> Any:
        if type(value) in _ATOMS:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known[1]
        new = self._exchange(value)
        if new is NotImplemented:
            kind = _kind_of(value)
            inside = depth <= _DEEPEST and (kind.base is not None or kind.is_object)
            new = self._rebuilt(value, kind, depth + 1) if inside else value
        self._memo[id(value)] = value, new
        return new

    def _rebuilt(self, value: Any, kind: _Kind, depth: int) -> Any:
        base = kind.base
        if base is tuple:
            new = tuple.__new__(type(value), [self.of(child, depth) for child in tuple.__iter__(value)])
        elif type(value) is list or type(value) is dict:
            new = value.copy()
            self._memo[id(value)] = value, new
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                new[key] = self.of(child, depth)
        else:
            try:
                new = _emptied(value, kind)
            except Exception:  # whatever a class of somebody else's may raise
                return value
            self._memo[id(value)] = value, new
            if base is not None:
                self._fill(new, value, base, depth)
        if not kind.is_object:
            return new
        # of what copies itself, the attributes of the copy count: it may have put references to itself right
        source = new if kind.copies_itself else value
        for name, child in _attributes(source, kind):
            mapped = self.of(child, depth)
            if name in kind.slots:
                object.__setattr__(new, name, mapped)
            else:
                new.__dict__[name] = mapped
        return new

    def _fill(self, new: Any, value: Any, base: Any, depth: int) -> None:
        if issubclass(base, dict):
            set_item = OrderedDict.__setitem__ if base is OrderedDict else dict.__setitem__
            for key, child in list(base.items(value)):
                set_item(new, key, self.of(child, depth))
        elif base is set:
            set.update(new, value)
        else:
            base.extend(new, [self.of(child, depth) for child in base.__iter__(value)])


def _emptied(value: Any, kind: _Kind) -> Any:
    """A new object of the same class without what is in it, or, of what copies itself, a copy."""
    cls, base = type(value), kind.base  # type: type, Any
    if kind.copies_itself:
        new = copy.copy(value)
        if new is value:
            raise TypeError("no copy")
        return new
    if base is None:
        # past constructors, which may want arguments; of a class that is made in C only a copy can be had
        return copy.copy(value) if issubclass(cls, types.SimpleNamespace) else object.__new__(cls)
    new = base.__new__(cls)
    if base is defaultdict:
        defaultdict.__init__(new, value.default_factory)
    elif base is deque:
        deque.__init__(new, (), value.maxlen)
    return new
