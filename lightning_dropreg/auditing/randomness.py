"""The random states that code may draw from, and whether it did."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["RandomStates"]


class RandomStates:
    """Watches the global generators of torch, Python and numpy, and those that modules keep as attributes.

    Args:
        roots: The modules.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._own = _own_generators(roots)
        self._last = self._now()

    def changed(self) -> list[str]:
        """Return the names of those that were drawn from since the last call."""
        now, last = self._now(), self._last
        self._last = now
        return [name for name, state in now.items() if last.get(name) != state]

    def _now(self) -> dict[str, Any]:
        states: dict[str, Any] = {"torch": torch.default_generator.get_state().numpy().tobytes()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["torch on the GPU"] = torch.cuda.get_rng_state().numpy().tobytes()
        states["Python's random"] = random.getstate()
        if "numpy" in sys.modules:
            kind, key, position, *rest = sys.modules["numpy"].random.get_state()
            states["numpy.random"] = (kind, key.tobytes(), position, rest)
        for name, generator in self._own.items():
            states[name] = state_of(generator)
        return states

    def save(self) -> list[tuple[Any, Any]]:
        """Return the states of the generators that modules keep."""
        return [(generator, state_of(generator, whole=True)) for generator in self._own.values()]

    @staticmethod
    def restore(saved: list[tuple[Any, Any]]) -> None:
        """Put back what `save` returned."""
        for generator, state in saved:
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            elif hasattr(generator, "bit_generator"):
                generator.bit_generator.state = state
            else:
                generator.set_state(state)


def state_of(generator: Any, whole: bool = False) -> Any:
    """Return the state of a generator, in a form that can be compared, or `whole`."""
    if isinstance(generator, torch.Generator):
        return generator.get_state() if whole else generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()
    return state if whole else repr(state)


def _own_generators(roots: Sequence[nn.Module]) -> dict[str, Any]:
    found = {}
    for root in roots:
        for path, module in root.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, (torch.Generator, random.Random)) or _is_numpy(value):
                    found[f"{path}.{name}" if path else name] = value
    return found


def _is_numpy(value: Any) -> bool:
    kind = type(value)
    return kind.__module__.startswith("numpy.random") and kind.__name__ in {"Generator", "RandomState"}
