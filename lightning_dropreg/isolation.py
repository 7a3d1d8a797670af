"""Repeating a training step within one batch, so that the batch leaves the traces of one step.

A step has side effects: batch-norm statistics, a hidden state kept as an attribute, metrics, random numbers. When it
is run several times for one batch, every run must start from the same state (or the runs could not be compared) and
the state must advance once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Isolation"]

T = TypeVar("T")

# Attributes that every nn.Module has: structure and hooks, not state (buffers are looked at by themselves).
_STRUCTURE = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set, tuple)


class Isolation:
    """Gives every run of a step the same random and module state, and settles what state is left in the end.

    The first run is the one whose random numbers count. Module state is that of the first run or, with ``mean=True``,
    the mean of all runs' floating-point states: for an antithetic pair that is the state of the model without dropout
    up to second order, as the paper's experiments have it.

    Args:
        module: The module whose state is kept: buffers, and attributes that are tensors, numbers, plain containers of
            them, or metrics. None keeps only the random state.
        mean: Whether floating-point state is averaged over the runs.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> x = torch.randn(4, 2)
        >>> with Isolation(layer) as isolation:
        ...     for _ in range(3):
        ...         y = isolation.run(lambda: layer(x))
        >>> int(layer.num_batches_tracked)
        1
    """

    def __init__(self, module: nn.Module | None, mean: bool = False) -> None:
        self._modules = _modules(module)
        self._mean = mean
        self._original: list[_ModuleState] = []
        self._start: list[_ModuleState] = []
        self._start_random: _RandomState | None = None
        self._ends: list[list[_ModuleState]] = []
        self._end_random: _RandomState | None = None
        self._untouched = True

    def __enter__(self) -> Isolation:
        """Remember the state in which every run starts."""
        self._original = self._current()
        self._start = [state.fresh() for state in self._original]
        self._start_random = _RandomState()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the state of one step."""
        self.settle()

    def run(self, step: Callable[[], T], trace: bool = True) -> T:
        """Call `step`, starting from the state at the beginning of the batch.

        Args:
            step: The step; called with no arguments.
            trace: Whether this run counts for the state that is left in the end.

        Returns:
            What `step` returned.
        """
        if not (trace and self._untouched):
            # the first run that counts works on the objects themselves, the others on copies
            self._install(self._original if trace and not self._ends else [state.fresh() for state in self._start])
            assert self._start_random is not None
            self._start_random.restore()
        self._untouched = False
        try:
            return step()
        finally:
            if trace:
                self._ends.append(self._current())
                self._end_random = self._end_random or _RandomState()

    def settle(self) -> None:
        """Put the state that one step leaves in place: nothing has happened if no run counted."""
        if self._ends:
            means = [_ModuleState.mean(list(states)) for states in zip(*self._ends, strict=True)]
            self._install(means if self._mean and len(self._ends) > 1 else self._ends[0])
        else:
            self._install(self._original)
        random_state = self._end_random or self._start_random
        assert random_state is not None
        random_state.restore()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run further steps (with ``trace=False``) after `settle` and put everything back as it is now."""
        current, current_random = self._current(), _RandomState()
        try:
            yield
        finally:
            self._install(current)
            current_random.restore()

    def _current(self) -> list[_ModuleState]:
        return [_ModuleState.referenced(module) for module in self._modules]

    def _install(self, states: list[_ModuleState]) -> None:
        for state, module in zip(states, self._modules, strict=True):
            state.install(module)


def _modules(root: nn.Module | None) -> list[nn.Module]:
    """All modules below `root`, those in plain containers (a list of metrics, say) included."""
    if root is None:
        return []
    found: dict[int, nn.Module] = {}
    stack: list[object] = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) in found:
                    continue
                found[id(module)] = module
                stack.extend(v for k, v in module.__dict__.items() if k not in _STRUCTURE)
        elif type(value) is dict:
            stack.extend(value.values())
        elif type(value) in {list, tuple}:
            stack.extend(value)  # type: ignore[arg-type]
    return list(found.values())


class _ModuleState:
    """Buffers and attributes of one module."""

    def __init__(self, buffers: dict[str, Tensor | None], attributes: dict[str, Any]) -> None:
        self.buffers = buffers
        self.attributes = attributes

    @classmethod
    def referenced(cls, module: nn.Module) -> _ModuleState:
        """The state itself."""
        attributes = {k: v for k, v in module.__dict__.items() if k not in _STRUCTURE}
        return cls(dict(module._buffers), attributes)

    def fresh(self) -> _ModuleState:
        """A copy that changes in place do not reach."""
        return _ModuleState(
            {k: _copy(v) for k, v in self.buffers.items()}, {k: _copy(v) for k, v in self.attributes.items()}
        )

    @classmethod
    def mean(cls, states: list[_ModuleState]) -> _ModuleState:
        """The mean of floating-point tensors, the first state for the rest."""
        first = states[0]
        return cls(
            {k: _mean([s.buffers.get(k) for s in states]) for k in first.buffers},
            {k: _mean([s.attributes.get(k) for s in states]) for k in first.attributes},
        )

    def install(self, module: nn.Module) -> None:
        """Make this the state of `module`; nothing is written in place, so autograd graphs stay valid."""
        module._buffers.clear()
        module._buffers.update(self.buffers)
        for name in [k for k in module.__dict__ if k not in _STRUCTURE and k not in self.attributes]:
            del module.__dict__[name]
        module.__dict__.update(self.attributes)


def _copy(value: Any) -> Any:
    """Copy tensors and plain containers; everything else is shared."""
    if isinstance(value, Tensor):
        # parameters and other leaves that are trained are not state of a batch
        return value if value.is_leaf and value.requires_grad else value.clone()
    if type(value) in {list, set}:
        return type(value)(_copy(v) for v in value)
    if isinstance(value, dict) and type(value).__module__ in {"builtins", "collections"}:
        copied = value.copy()
        for k, v in value.items():
            copied[k] = _copy(v)
        return copied
    if isinstance(value, tuple) and any(isinstance(v, (Tensor, *_CONTAINERS)) for v in value):
        return type(value)(*map(_copy, value)) if hasattr(value, "_fields") else type(value)(map(_copy, value))
    return value


def _mean(values: list[Any]) -> Any:
    """The mean of tensors within equal containers; the first value where that makes no sense."""
    first = values[0]
    if any(v is first for v in values[1:]):
        return first
    if any(type(v) is not type(first) for v in values):
        return first
    if isinstance(first, Tensor):
        same = all(v.shape == first.shape for v in values)
        if not (same and first.is_floating_point()) or (first.is_leaf and first.requires_grad):
            return first
        return sum(values[1:], first) / len(values)
    if isinstance(first, dict) and type(first).__module__ in {"builtins", "collections"}:
        if any(v.keys() != first.keys() for v in values):
            return first
        merged = first.copy()
        for k in first:
            merged[k] = _mean([v[k] for v in values])
        return merged
    if isinstance(first, (list, tuple)) and all(len(v) == len(first) for v in values):
        merged_items = [_mean(list(column)) for column in zip(*values, strict=True)]
        if hasattr(first, "_fields"):
            return type(first)(*merged_items)
        return type(first)(merged_items) if type(first) in {list, tuple} else first
    return first


class _RandomState:
    """The global random states of torch, Python and numpy at the moment of creation."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        self.python = random.getstate()
        self.numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def restore(self) -> None:
        """Make them current again."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
