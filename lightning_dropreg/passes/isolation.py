"""Repeating a training step within one batch, so that the batch leaves the traces of one step.

A step has side effects: batch-norm statistics, a hidden state kept as an attribute, metrics, random numbers. When it
is run several times for one batch, every run must start from the same state (or the runs could not be compared) and
the state must advance once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_dropreg.passes.copies import SMALL, copy_of, is_copied, mean_of
from lightning_dropreg.passes.randomness import RandomState
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.passes.structure import Structure

__all__ = ["Isolation"]

T = TypeVar("T")

# Attributes that every nn.Module has: structure and hooks, not state (buffers are looked at by themselves).
_STRUCTURE = frozenset(nn.Module().__dict__)
# Of larger buffers only those that were written to are averaged.
_LARGE = 1 << 16
_CONTAINERS = frozenset({dict, list, tuple})


class Isolation:
    """Gives every run of a step the same random and module state, and settles what state is left in the end.

    The first run is the one whose random numbers count. Module state is that of the first run; with ``mean=True``,
    what is a floating-point tensor (batch-norm statistics, a hidden state, a metric) becomes the mean of all runs': for
    an antithetic pair that is the state of the model without dropout up to second order, as in the paper's experiments.

    Args:
        module: The module whose state is kept: buffers, attributes that are tensors, numbers, plain containers of
            them, or metrics, and what it is made of (`lightning_dropreg.passes.structure`). None keeps only the random
            state.
        mean: Whether floating-point state is averaged over the runs.
        late: Collects buffers, other than those of norms, with the means to write into them when no autograd graph
            holds them any more. None writes at once, and torch says so in the backward if a graph does.
        reach: What else is put back: generators and plain objects; by default those that `module` holds.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> x = torch.randn(4, 2)
        >>> with Isolation(layer) as isolation:
        ...     for _ in range(3):
        ...         y = isolation.run(lambda: layer(x))
        >>> int(layer.num_batches_tracked)
        1
    """

    def __init__(
        self,
        module: nn.Module | None,
        mean: bool = False,
        late: list[tuple[Tensor, Tensor]] | None = None,
        reach: Reach | None = None,
    ) -> None:
        self._modules = _modules(module)
        if reach is None:
            reach = Reach({} if module is None else {"self": module})
        self._reach = reach
        # in the order of their states
        self._holders: list[Any] = [*self._modules, *reach.objects.values()]
        self._late = late
        self._structure = Structure([])
        self._end_structure: Structure | None = None
        self._mean = mean
        self._original: list[_ModuleState] = []
        self._versions: dict[int, int] = {}
        self._start: list[_ModuleState] = []
        self._plain = _Plain([], [])
        self._start_random: RandomState | None = None
        self._ends: list[list[_ModuleState]] = []
        self._end_random: RandomState | None = None
        self._untouched = True

    def __enter__(self) -> Isolation:
        """Remember the state in which every run starts."""
        self._structure = Structure(self._modules)
        self._original = [_ModuleState.referenced(holder) for holder in self._holders]
        self._versions = {
            id(buffer): buffer._version
            for module in self._modules
            for buffer in module._buffers.values()
            if buffer is not None and buffer.numel() > _LARGE and not buffer.is_inference()
        }
        self._start = _fresh(self._original)
        self._plain = _Plain(self._holders, self._start)
        self._start_random = RandomState([found for _, found in self._reach.generators()])
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
            self._structure.restore()
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
                assert self._start_random is not None
                self._end_random = self._end_random or self._start_random.again()
                self._end_structure = self._end_structure or self._structure_now()
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

    def drawn_generators(self) -> list[str]:
        """Return the places of the generators of the step's own that the last run drew from."""
        moved = [] if self._start_random is None else self._start_random.moved()
        places = [place for place, _ in self._reach.generators()]
        return [places[number - 4] for number in moved if 4 <= number < 4 + len(places)]

    def outcome(self, cuts: Sequence[Callable[[], None]] = ()) -> list[dict[str, Any]]:
        """Return buffers and attributes of every module as the last run would leave them, had it counted.

        Args:
            cuts: See `run`.

        Returns:
            One dict for each module.
        """
        ends = self._cut(cuts) if cuts else [self._current()]
        memo: dict[tuple[int, ...], Any] = {}
        states = ends[0] if len(ends) == 1 else [_ModuleState.mean(e, memo) for e in zip(*ends, strict=True)]
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
        self._structure.restore()
        self._ends, self._end_random, self._end_structure = [], None, None

    def settle(self) -> None:
        """Put the state that one step leaves in place: nothing has happened if no run counted."""
        (self._end_structure or self._structure).restore()
        if self._ends:
            memo: dict[tuple[int, ...], Any] = {}
            if self._mean and len(self._ends) > 1:
                columns = list(zip(*self._ends, strict=True))
                self._ends = [[_ModuleState.mean(ends, memo) for ends in columns]]
                for module, ends in zip(self._modules, columns, strict=False):
                    self._average_buffers(module, ends)
            self._install(self._ends[0])
        else:
            self._install(self._original)
        random_state = self._end_random or self._start_random
        assert random_state is not None
        random_state.restore()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run further steps (with ``trace=False``) after `settle` and put everything back as it is now."""
        assert self._start_random is not None
        current, current_random = self._current(), self._start_random.again()
        structure = self._structure_now()
        try:
            yield
        finally:
            structure.restore()
            self._install(current)
            current_random.restore()

    def _average_buffers(self, module: nn.Module, ends: Sequence[_ModuleState]) -> None:
        """Let the buffers that a module is left with be the means; others hold on to them (DDP, to broadcast them)."""
        for name, first in ends[0].buffers.items():
            values = [end.buffers.get(name) for end in ends]
            if first is None or not first.is_floating_point() or (first.requires_grad and first.is_leaf):
                continue
            if any(value is None or value.shape != first.shape or value is first for value in values[1:]):
                continue
            if first.numel() > _LARGE and self._versions.get(id(first)) == first._version:
                continue  # nothing was written to it, and it is no statistic of a kernel's
            with torch.no_grad():
                mean = torch.stack([value for value in values if value is not None]).mean(0)
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
                first.data.copy_(mean)  # in training no backward reads it
            elif self._late is not None:
                self._late.append((first, mean))
            elif not torch.equal(mean, first):
                first.detach().copy_(mean)

    def _structure_now(self) -> Structure:
        return self._structure if self._structure.is_current() else Structure(self._modules)

    def _current(self) -> list[_ModuleState]:
        if not self._plain.is_current():
            return [_ModuleState.referenced(holder) for holder in self._holders]
        states = self._start.copy()
        for number in self._plain.others:
            states[number] = _ModuleState.referenced(self._holders[number])
        return states

    def _install(self, states: list[_ModuleState]) -> None:
        kept = self._plain.is_current() and all(states[n] is self._start[n] for n in self._plain.numbers)
        for number in self._plain.others if kept else range(len(self._holders)):
            states[number].install(self._holders[number])


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
            # a script cannot be taken apart; `module_problems` refuses one with state
            if id(value) not in found and not isinstance(value, torch.jit.ScriptModule):
                found[id(value)] = value
                stack.extend(value._modules.values())
                attributes = value.__dict__
                stack.extend(attributes[name] for name in _kinds_of(attributes).may_hold_modules)
        elif type(value) in _CONTAINERS and len(value) <= SMALL and id(value) not in seen:
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
        tuple(name for name, kind in state if is_copied(kind)),
    )


class _Plain:
    """The holders of state that have nothing in them to copy: they are the same as long as they hold the same.

    Most are so and stay so, and all are compared at once.

    Args:
        holders: All holders.
        states: Their states.

    Attributes:
        numbers: Which of them are plain.
        others: Which are not.
    """

    def __init__(self, holders: Sequence[Any], states: Sequence[_ModuleState]) -> None:
        self.numbers = [number for number, state in enumerate(states) if state.is_plain]
        self.others = [number for number, state in enumerate(states) if not state.is_plain]
        self._holders = [holders[number] for number in self.numbers]
        self._buffers = [h._buffers for h in self._holders if isinstance(h, nn.Module)]
        attributes = [states[number].attributes for number in self.numbers]
        self._names = list(chain.from_iterable(attributes))
        self._values = _values(attributes)
        self._sizes = list(map(len, attributes))

    def is_current(self) -> bool:
        """Whether they hold the very same."""
        now = [holder.__dict__ for holder in self._holders]
        return (
            self._sizes == list(map(len, now))
            and all(map(is_, _values(now), self._values))
            and self._names == list(chain.from_iterable(now))
            and not any(self._buffers)
        )


def _values(dicts: Sequence[dict[str, Any]]) -> list[Any]:
    return [value for each in dicts for value in each.values()]


class _ModuleState:
    """Buffers and attributes of one module.

    The attributes are those of the whole ``__dict__``, which is faster to copy than to pick from; what is structure
    in it is passed over when they are put back.
    """

    def __init__(self, buffers: dict[str, Tensor | None], attributes: dict[str, Any]) -> None:
        self.buffers = buffers
        self.attributes = attributes

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing in it to copy: it is the same as long as it holds the same."""
        return not (self.buffers or _kinds_of(self.attributes).copied)

    @classmethod
    def referenced(cls, holder: Any) -> _ModuleState:
        """The state itself, of a module or another object."""
        buffers = holder._buffers.copy() if isinstance(holder, nn.Module) else {}
        return cls(buffers, holder.__dict__.copy())

    def fresh(self, memo: dict[int, Any]) -> _ModuleState:
        """A copy that changes in place do not reach; `memo` keeps what is shared between modules shared."""
        if self.is_plain:
            return self
        attributes = self.attributes.copy()
        attributes.update({name: copy_of(attributes[name], memo) for name in _kinds_of(self.attributes).copied})
        return _ModuleState({k: copy_of(v, memo) for k, v in self.buffers.items()}, attributes)

    @classmethod
    def mean(cls, states: Sequence[_ModuleState], memo: dict[tuple[int, ...], Any]) -> _ModuleState:
        """The mean of attributes that are floating-point tensors, the first state for the rest.

        Buffers stay those of the first run, the very objects; see `Isolation._average_buffers`.

        Returns:
            The state to leave.
        """
        first, *others = states
        if all(first is other or _same(first.attributes, other.attributes) for other in others):
            return first
        averaged = _kinds_of(first.attributes).copied
        means = {name: mean_of([state.attributes.get(name) for state in states], memo) for name in averaged}
        return cls(first.buffers, {**first.attributes, **means})

    def install(self, holder: Any) -> None:
        """Make this the state of `holder`; nothing is written in place, so autograd graphs stay valid."""
        if isinstance(holder, nn.Module) and (self.buffers or holder._buffers):
            holder._buffers.clear()
            holder._buffers.update(self.buffers)
        current = holder.__dict__
        if _same(current, self.attributes):
            return
        for name in [k for k in current if k not in _STRUCTURE and k not in self.attributes]:
            del current[name]
        current.update({k: v for k, v in self.attributes.items() if k not in _STRUCTURE})


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts hold the very same objects by the same names."""
    return len(one) == len(other) and all(map(is_, one.values(), other.values())) and list(one) == list(other)
