"""Variables outside of objects that a step may change: globals, attributes of classes, what closures hold.

They are put back between the passes over a batch as the attributes of modules are: what a function assigns (``global``,
``nonlocal``), and plain containers and iterators that it names, whose contents it may change.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from lightning_dropreg.passes.copies import ATOMS, CONTAINERS, ITERATORS, SMALL

__all__ = ["Variables", "assigned", "in_cell", "in_class", "in_globals", "in_slots", "is_kept", "slots_of"]


class Variables:
    """Some variables as an object that has them as attributes.

    Example:
        >>> space = {"count": 1}
        >>> held = in_globals(space, ["count"])
        >>> vars(held)["count"] = 2
        >>> space, dict(vars(held))
        ({'count': 2}, {'count': 2})
    """

    __slots__ = ("_view",)

    def __init__(self, view: _View) -> None:
        self._view = view

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        """The variables by name."""
        return self._view


class _View(MutableMapping[str, Any]):
    def __init__(
        self,
        names: Iterable[str],
        get: Callable[[str], Any],
        put: Callable[[str, Any], None],
        drop: Callable[[str], None],
    ) -> None:
        self._names, self._get, self._put, self._drop = dict.fromkeys(names), get, put, drop

    def __getitem__(self, name: str) -> Any:
        return self._get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        try:
            if self._get(name) is value:
                return
        except LookupError:
            pass
        self._put(name, value)

    def __delitem__(self, name: str) -> None:
        self._drop(name)

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            try:
                self._get(name)
            except LookupError:
                continue
            yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        """The values now."""
        return dict(self)


def in_globals(space: dict[str, Any], names: Iterable[str]) -> Variables:
    """Return global variables of a module."""
    return Variables(_View(names, space.__getitem__, space.__setitem__, space.__delitem__))


def in_class(cls: type, names: Iterable[str]) -> Variables:
    """Return attributes of a class."""
    put, drop = functools.partial(setattr, cls), functools.partial(delattr, cls)
    return Variables(_View(names, lambda name: vars(cls)[name], put, drop))


def in_cell(name: str, cell: types.CellType) -> Variables:
    """Return a variable that a closure holds."""

    def get(_: str) -> Any:
        try:
            return cell.cell_contents
        except ValueError:
            raise LookupError(name) from None

    def put(_: str, value: Any) -> None:
        cell.cell_contents = value

    def drop(_: str) -> None:
        del cell.cell_contents

    return Variables(_View([name], get, put, drop))


@functools.lru_cache(maxsize=4096)
def slots_of(cls: Any) -> tuple[str, ...]:
    """Return the names of what objects of a class hold in ``__slots__``, as they are called from outside of it.

    Args:
        cls: The class.

    Returns:
        The names, those of its bases included.

    Example:
        >>> class Count:
        ...     __slots__ = ("calls", "__last", "__weakref__")
        >>> slots_of(Count)
        ('calls', '_Count__last')
    """
    return tuple(
        name if not name.startswith("__") or name.endswith("__") else f"_{owner.__name__.lstrip('_')}{name}"
        for owner in cls.__mro__
        for name in _names(owner.__dict__.get("__slots__", ()))
        if name not in {"__dict__", "__weakref__"}
    )


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def in_slots(value: Any) -> Variables:
    """Return what an object holds in ``__slots__``."""

    def get(name: str) -> Any:
        try:
            return object.__getattribute__(value, name)
        except AttributeError:  # not set
            raise LookupError(name) from None

    cls: Any = type(value)
    put, drop = functools.partial(object.__setattr__, value), functools.partial(object.__delattr__, value)
    return Variables(_View(slots_of(cls), get, put, drop))


def is_kept(value: Any) -> bool:
    """Whether a variable is kept because of what it is: a short container of plain values, or a plain iterator."""
    if type(value) in ITERATORS:
        return True
    if type(value) not in CONTAINERS or len(value) > SMALL:
        return False
    return all(type(each) in ATOMS for each in (value.values() if isinstance(value, dict) else value))


_STORES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"})


@functools.lru_cache(maxsize=4096)
def assigned(code: types.CodeType) -> frozenset[str]:
    """Return the names outside of its own scope that code assigns, functions within it included.

    Returns:
        Names of globals, and of variables of functions around it.

    Example:
        >>> def count():
        ...     global calls
        ...     calls += 1
        >>> assigned(count.__code__)
        frozenset({'calls'})
    """
    own = {*code.co_varnames, *code.co_cellvars}
    found = {i.argval for i in dis.get_instructions(code) if i.opname in _STORES and i.argval not in own}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= assigned(constant) - own
    return frozenset(found)
