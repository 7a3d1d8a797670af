"""Random states at a moment, to be made current again: the global ones, and those of generators of a step's own."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["RandomState"]


class RandomState:
    """The global random states of torch, Python and numpy, and those of some generators, at the moment of creation.

    Args:
        generators: More generators: ``torch.Generator``, ``random.Random``, numpy's ``Generator``, ``RandomState`` and
            bit generators.

    Example:
        >>> dice = random.Random(1)
        >>> before = RandomState([dice])
        >>> first = dice.random(), random.random()
        >>> before.is_current()
        False
        >>> before.restore()
        >>> (dice.random(), random.random()) == first
        True
    """

    def __init__(self, generators: Sequence[Any] = ()) -> None:
        self._generators = list(generators)
        self._parts = _global_parts() + [_part(generator) for generator in self._generators]
        self._states = [get() for get, _ in self._parts]

    def restore(self) -> None:
        """Make them current again."""
        for (_, put), state in zip(self._parts, self._states, strict=True):
            put(state)

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        return not self.moved()

    def moved(self) -> list[int]:
        """Return which states have changed: 0 torch, 1 Python, 2 numpy, 3 CUDA, then the generators from 4 on."""
        return [
            number if number < count else 4 + number - count
            for count in [len(self._parts) - len(self._generators)]
            for number, ((get, _), state) in enumerate(zip(self._parts, self._states, strict=True))
            if not _equal(get(), state)
        ]

    def again(self) -> RandomState:
        """Return the states of the same generators now."""
        return RandomState(self._generators)


Part = tuple[Callable[[], Any], Callable[[Any], None]]


def _global_parts() -> list[Part]:
    parts: list[Part] = [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        parts.append((numpy.random.get_state, numpy.random.set_state))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    return parts


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
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if type(a).__module__ == "numpy":
        return bool((a == b).all())
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and len(a) < 16:
        return all(map(_equal, a, b))
    return bool(a == b)
