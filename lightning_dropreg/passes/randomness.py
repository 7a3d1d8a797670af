"""Random states at a moment, to be made current again: the global ones, and those of generators of a step's own."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["RandomState"]


class RandomState:
    """The global random states of torch, Python and numpy, and those of some generators, at the moment of creation.

    Args:
        generators: More generators, by name: ``torch.Generator``, ``random.Random``, numpy's ``Generator``,
            ``RandomState`` and bit generators.

    Example:
        >>> dice = random.Random(1)
        >>> before = RandomState([("self.dice", dice)])
        >>> first = dice.random(), random.random()
        >>> before.moved()
        ["Python's random", 'self.dice']
        >>> before.restore()
        >>> (dice.random(), random.random()) == first
        True
    """

    def __init__(self, generators: Sequence[tuple[str, Any]] = ()) -> None:
        known = _global_parts()
        self._global = len(known)
        self._names = [*known, *(name for name, _ in generators)]
        self._parts = [*known.values(), *(_part(generator) for _, generator in generators)]
        self._states = [get() for get, _ in self._parts]

    def restore(self) -> None:
        """Make them current again."""
        for (_, put), state in zip(self._parts, self._states, strict=True):
            put(state)

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        return not self.moved()

    def moved(self, own: bool = False) -> list[str]:
        """Name those that have changed since; of the `own` generators alone, if that is asked for."""
        start = self._global if own else 0
        now = zip(self._names[start:], self._parts[start:], self._states[start:], strict=True)
        return [name for name, (get, _), state in now if not _equal(get(), state)]

    def again(self) -> RandomState:
        """Return the states of the same generators now."""
        now = RandomState.__new__(RandomState)
        now.__dict__.update(self.__dict__, _states=[get() for get, _ in self._parts])
        return now


Part = tuple[Callable[[], Any], Callable[[Any], None]]


def _global_parts() -> dict[str, Part]:
    parts: dict[str, Part] = {
        "torch": (torch.get_rng_state, torch.set_rng_state),
        "Python's random": (_pythons.get, _pythons.put),
    }
    if "numpy" in sys.modules:
        numpys = _numpys()
        parts["numpy.random"] = numpys.get, numpys.put
    if torch.cuda.is_initialized():
        parts["torch on CUDA"] = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    return parts


class _Seldom:
    """A generator whose state takes long to copy (tens of microseconds, several times a step) and is seldom used.

    Whether it was used since its state was copied or set is seen from its memory.

    Args:
        get: Copies the state.
        put: Sets it.
        look: Given the state copied or set last, returns what is different after every use; None if nothing is.
    """

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None], look: Callable[[Any], Any]) -> None:
        self._get, self._put, self._look = get, put, look
        self._state: Any = None
        self._seen: Any = None

    def get(self) -> Any:
        """Return the state."""
        seen = self._look(self._state)
        if seen is None or seen != self._seen:
            self._state, self._seen = self._get(), seen
        return self._state

    def put(self, state: Any) -> None:
        """Make a state current that `get` returned."""
        if state is self._state and self._seen is not None and self._look(state) == self._seen:
            return
        self._put(state)
        self._state, self._seen = state, self._look(state)


_WORDS = 625  # the Mersenne Twister's, and its position


def _look_at_pythons(_: Any = None) -> Any:
    generator: Any = random._inst
    return ctypes.string_at(id(generator) + object.__basicsize__, 4 * _WORDS), generator.gauss_next


def _pythons_can_be_looked_at() -> bool:
    """Whether Python's generator is in memory what it is in CPython."""
    if sys.implementation.name != "cpython" or not isinstance(getattr(random, "_inst", None), random.Random):
        return False
    if random.Random.__basicsize__ < object.__basicsize__ + 4 * _WORDS:
        return False
    position, *words = struct.unpack(f"{_WORDS}I", _look_at_pythons()[0])
    return bool((*words, position) == random.getstate()[1])


_pythons = _Seldom(
    random.getstate, random.setstate, _look_at_pythons if _pythons_can_be_looked_at() else lambda _: None
)


@functools.cache
def _numpys() -> _Seldom:
    numpy = sys.modules["numpy"]
    current = getattr(numpy.random, "get_bit_generator", lambda: None)
    places: list[Any] = [None, 0]  # a generator and the address of its state

    def look(state: Any) -> Any:
        generator: Any = current()
        # the second of a pair of normal numbers, drawn in advance, is given out without any change in that memory
        if type(generator) is not numpy.random.MT19937 or not isinstance(state, tuple) or state[3]:
            return None
        if generator is not places[0]:
            places[:] = generator, generator.ctypes.state_address
        return ctypes.string_at(places[1], 4 * _WORDS)

    return _Seldom(numpy.random.get_state, numpy.random.set_state, look)


def _part(generator: Any) -> Part:
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if hasattr(generator, "get_state"):  # torch's, and numpy's RandomState
        return generator.get_state, generator.set_state
    bits = getattr(generator, "bit_generator", generator)

    def put(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, put


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if type(a).__module__ == "numpy":
        return bool((a == b).all())
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and len(a) < 16:
        return all(map(_equal, a, b))
    return bool(a == b)
