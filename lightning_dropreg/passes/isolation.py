"""Repeating a training step within one batch, so that the batch leaves the traces of one step.

A step has side effects: batch-norm statistics, a hidden state kept as an attribute, metrics, random numbers. When it
is run several times for one batch, every run must start from the same state (or the runs could not be compared) and
the state must advance once.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Isolation", "RandomState"]

T = TypeVar("T")

# Attributes that every nn.Module has: structure and hooks, not state (buffers are looked at by themselves).
_STRUCTURE = frozenset(nn.Module().__dict__)
# Longer containers are data (a vocabulary): what is added to them is undone, what is in them is not looked at.
_SMALL = 256
_ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device})

_CONTAINERS = frozenset({dict, list, tuple})


class Isolation:
    """Gives every run of a step the same random and module state, and settles what state is left in the end.

    The first run is the one whose random numbers count. Module state is that of the first run; with ``mean=True``,
    attributes that are floating-point tensors (a hidden state, a metric) become the mean of all runs': for an
    antithetic pair that is the state of the model without dropout up to second order, as in the paper's experiments.

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
        self._start_random: RandomState | None = None
        self._ends: list[list[_ModuleState]] = []
        self._end_random: RandomState | None = None
        self._untouched = True

    def __enter__(self) -> Isolation:
        """Remember the state in which every run starts."""
        self._original = self._current()
        self._start = _fresh(self._original)
        self._start_random = RandomState()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the state of one step."""
        self.settle()

    def run(self, step: Callable[[], T], trace: bool = True, cuts: Sequence[Callable[[], None]] = ()) -> T:
        """Call `step`, starting from the state at the beginning of the batch.

        Args:
            step: The step; called with no arguments.
            trace: Whether this run counts for the state that is left in the end.
            cuts: A run that did the work of several leaves the state that each of these makes of its own.

        Returns:
            What `step` returned.
        """
        if not (trace and self._untouched):
            # the first run that counts works on the objects themselves, the others on copies
            self._install(self._original if trace and not self._ends else _fresh(self._start))
            assert self._start_random is not None
            self._start_random.restore()
        self._untouched = False
        try:
            result = step()
        except BaseException:
            cuts = ()
            raise
        finally:
            if trace:
                self._end_random = self._end_random or RandomState()
                self._ends += self._cut(cuts) if cuts else [self._current()]
        return result

    def _cut(self, cuts: Sequence[Callable[[], None]]) -> list[list[_ModuleState]]:
        whole, ends = self._current(), []
        for cut in cuts:
            # buffers are the same objects in all: others hold on to them
            copies = [_ModuleState(a.buffers, b.attributes) for a, b in zip(whole, _fresh(whole), strict=True)]
            self._install(copies)
            cut()
            ends.append(self._current())
        return ends

    def drew_randomness(self) -> bool:
        """Whether the last run drew from the global random states."""
        return self._start_random is not None and not self._start_random.is_current()

    def outcome(self, cuts: Sequence[Callable[[], None]] = ()) -> list[dict[str, Any]]:
        """Return buffers and attributes of every module as the last run would leave them, had it counted.

        Args:
            cuts: See `run`.

        Returns:
            One dict for each module.
        """
        ends = self._cut(cuts) if cuts else [self._current()]
        memo: dict[tuple[int, ...], Any] = {}
        states = ends[0] if len(ends) == 1 else [_ModuleState.mean(list(e), memo) for e in zip(*ends, strict=True)]
        return [
            {**state.buffers, **{name: value for name, value in state.attributes.items() if name not in _STRUCTURE}}
            for state in states
        ]

    def restart(self) -> None:
        """Forget the runs so far: the next one is the first."""
        for original, start in zip(self._original, _fresh(self._start), strict=True):
            for name, buffer in original.buffers.items():
                before = start.buffers[name]
                if buffer is not None and before is not None:
                    buffer.detach().copy_(before)  # the very objects are kept, as in `_ModuleState.mean`
            original.attributes = start.attributes
        self._ends, self._end_random = [], None

    def settle(self) -> None:
        """Put the state that one step leaves in place: nothing has happened if no run counted."""
        if self._ends:
            memo: dict[tuple[int, ...], Any] = {}
            if self._mean and len(self._ends) > 1:
                self._ends = [[_ModuleState.mean(list(ends), memo) for ends in zip(*self._ends, strict=True)]]
            self._install(self._ends[0])
        else:
            self._install(self._original)
        random_state = self._end_random or self._start_random
        assert random_state is not None
        random_state.restore()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run further steps (with ``trace=False``) after `settle` and put everything back as it is now."""
        current, current_random = self._current(), RandomState()
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


def _fresh(states: list[_ModuleState]) -> list[_ModuleState]:
    memo: dict[int, Any] = {}
    return [state.fresh(memo) for state in states]


def _modules(root: nn.Module | None) -> list[nn.Module]:
    """All modules below `root`, those in plain containers (a list of metrics, say) included."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, nn.Module):
            if id(value) not in found:
                found[id(value)] = value
                stack.extend(value._modules.values())
                attributes = value.__dict__
                stack.extend(attributes[name] for name in _kinds_of(attributes).may_hold_modules)
        elif type(value) in _CONTAINERS and len(value) <= _SMALL and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if type(value) is dict else value)
    return list(found.values())


class _Kinds(NamedTuple):
    """Names of a module's attributes whose types ask for something to be done; most modules have none."""

    may_hold_modules: tuple[str, ...]
    copied: tuple[str, ...]


def _kinds_of(attributes: dict[str, Any]) -> _Kinds:
    return _kinds_of_types(tuple(attributes), tuple(map(type, attributes.values())))


@functools.lru_cache(maxsize=1024)  # the same from one step to the next, and for all layers of one class
def _kinds_of_types(names: tuple[str, ...], types: tuple[type, ...]) -> _Kinds:
    state = [(name, kind) for name, kind in zip(names, types, strict=True) if name not in _STRUCTURE]
    return _Kinds(
        tuple(name for name, kind in state if kind in _CONTAINERS or issubclass(kind, nn.Module)),
        tuple(name for name, kind in state if _is_copied(kind)),
    )


class _ModuleState:
    """Buffers and attributes of one module.

    The attributes are those of the whole ``__dict__``, which is faster to copy than to pick from; what is structure
    in it is passed over when they are put back.
    """

    def __init__(self, buffers: dict[str, Tensor | None], attributes: dict[str, Any]) -> None:
        self.buffers = buffers
        self.attributes = attributes

    @classmethod
    def referenced(cls, module: nn.Module) -> _ModuleState:
        """The state itself."""
        return cls(module._buffers.copy(), module.__dict__.copy())

    def fresh(self, memo: dict[int, Any]) -> _ModuleState:
        """A copy that changes in place do not reach; `memo` keeps what is shared between modules shared."""
        copied = _kinds_of(self.attributes).copied
        if not (copied or self.buffers):
            return self
        attributes = self.attributes.copy()
        attributes.update({name: _copy(attributes[name], memo) for name in copied})
        return _ModuleState({k: _copy(v, memo) for k, v in self.buffers.items()}, attributes)

    @classmethod
    def mean(cls, states: list[_ModuleState], memo: dict[tuple[int, ...], Any]) -> _ModuleState:
        """The mean of attributes that are floating-point tensors, the first state for the rest.

        Buffers stay those of the first run, the very objects: others hold on to them (DDP, to broadcast them).

        Returns:
            The state to leave.
        """
        first, *others = states
        if all(_same(first.attributes, other.attributes) for other in others):
            return first
        averaged = _kinds_of(first.attributes).copied
        means = {name: _mean([state.attributes.get(name) for state in states], memo) for name in averaged}
        return cls(first.buffers, {**first.attributes, **means})

    def install(self, module: nn.Module) -> None:
        """Make this the state of `module`; nothing is written in place, so autograd graphs stay valid."""
        if self.buffers or module._buffers:
            module._buffers.clear()
            module._buffers.update(self.buffers)
        current = module.__dict__
        if _same(current, self.attributes):
            return
        for name in [k for k in current if k not in _STRUCTURE and k not in self.attributes]:
            del current[name]
        current.update({k: v for k, v in self.attributes.items() if k not in _STRUCTURE})


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts hold the very same objects by the same names."""
    return len(one) == len(other) and all(map(is_, one.values(), other.values())) and list(one) == list(other)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and type(value).__module__ in {"builtins", "collections"}


def _is_copied(kind: type) -> bool:
    """Whether values of this type are copied; everything else is shared."""
    return (
        issubclass(kind, (Tensor, list, set, deque, tuple))
        or (issubclass(kind, dict) and kind.__module__ in {"builtins", "collections"})
        or kind.__module__ == "numpy"
    )


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy tensors, arrays and plain containers; everything else is shared."""
    if type(value) in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)][1]
    copied = value
    if isinstance(value, Tensor):
        # parameters and other leaves that are trained are not state of a batch
        copied = value if value.is_leaf and value.requires_grad else value.clone()
    elif isinstance(value, (list, set, deque)) or _is_dict(value):
        copied = value.copy() if type(value).__module__ in {"builtins", "collections"} else value
        memo[id(value)] = (value, copied)  # before its contents, where it holds itself
        if copied is not value and len(value) <= _SMALL and not isinstance(value, set):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                copied[k] = _copy(v, memo)
    elif isinstance(value, tuple) and len(value) <= _SMALL:
        items = [_copy(v, memo) for v in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            copied = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif type(value).__module__ == "numpy" and hasattr(value, "copy"):
        copied = value.copy()
    memo[id(value)] = (value, copied)  # the original too, so that its id stays its own
    return copied


def _mean(values: list[Any], memo: dict[tuple[int, ...], Any]) -> Any:
    """The mean of tensors within equal containers; the first value where that makes no sense."""
    first = values[0]
    key = tuple(map(id, values))
    if type(first) in _ATOMS or any(type(v) is not type(first) or v is first for v in values[1:]):
        return first
    if key not in memo:
        memo[key] = (values, first)  # where a container holds itself
        memo[key] = (values, _mean_of_distinct(values, memo))
    return memo[key][1]


def _mean_of_distinct(values: list[Any], memo: dict[tuple[int, ...], Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        same = first.is_floating_point() and all(v.shape == first.shape for v in values)
        trained = first.is_leaf and first.requires_grad
        return sum(values[1:], first) / len(values) if same and not trained else first
    if not (_is_dict(first) or isinstance(first, (list, tuple))) or len(first) > _SMALL:
        return first
    if any(len(v) != len(first) for v in values):
        return first
    if isinstance(first, dict):
        if any(v.keys() != first.keys() for v in values):
            return first
        for k in first:
            first[k] = _mean([v[k] for v in values], memo)
        return first
    items = [_mean(list(column), memo) for column in zip(*values, strict=True)]
    if isinstance(first, list):
        first[:] = items
        return first
    if all(a is b for a, b in zip(items, first, strict=True)):
        return first
    return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)


class RandomState:
    """The global random states of torch, Python and numpy at the moment of creation."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        self.python = random.getstate()
        self.numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now = RandomState()
        if now.numpy is not None and self.numpy is not None and repr(now.numpy[2:]) != repr(self.numpy[2:]):
            return False
        return _equal(self.torch, now.torch) and _equal(self.cuda, now.cuda) and self.python == now.python

    def restore(self) -> None:
        """Make them current again."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
