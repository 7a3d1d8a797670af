"""What holds the state of a step: modules, and objects that it can reach."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from itertools import chain
from operator import is_, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_dropreg.passes.copies import SMALL, copy_of, is_copied, mean_of
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.passes.structure import Structure

__all__ = ["STRUCTURE", "Holders", "ModuleState", "storage_of"]

STRUCTURE = frozenset(nn.Module().__dict__)
"""Attributes that every module has: structure and hooks, not state (buffers are looked at by themselves)."""
_values_of = methodcaller("values")
_CONTAINERS = frozenset({dict, list, tuple})


class Holders:
    """Everything that holds state, and the state that it is in when a batch begins.

    Most of it stays the same from one batch to the next: `again` looks at that all at once.

    Args:
        root: The module; None where there is none.
        reach: What else is put back.
        unsteady: The ids of those whose state was seen to change from batch to batch.

    Attributes:
        modules: The module and all below it.
        structure: What they are made of.
        all: Modules and objects, in the order of the states.
        states: Their states.
        others: Which of them have something in them that is copied, or are unsteady.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> before = Holders(layer, Reach({}))
        >>> before.again().modules is before.modules
        True
        >>> layer.p = 0.25
        >>> before.again().modules is before.modules, before.again().states[0].attributes["p"]
        (False, 0.25)
    """

    def __init__(self, root: nn.Module | None, reach: Reach, unsteady: frozenset[int] = frozenset()) -> None:
        self._root = root
        self.reach = reach
        self.modules = _modules(root)
        self.structure = Structure(self.modules)
        self.all: list[Any] = [*self.modules, *reach.objects.values()]
        self.states = [ModuleState.referenced(holder) for holder in self.all]
        self._unsteady = unsteady
        steady = [s.is_plain and id(h) not in unsteady for h, s in zip(self.all, self.states, strict=True)]
        self._plain = [number for number, is_steady in enumerate(steady) if is_steady]
        self.others = [number for number, is_steady in enumerate(steady) if not is_steady]
        self._unchanging = [self.all[number] for number in self._plain]
        self._buffers = [holder._buffers for holder in self._unchanging if isinstance(holder, nn.Module)]
        attributes = [self.states[number].attributes for number in self._plain]
        self._names = list(chain.from_iterable(attributes))
        self._values = list(chain.from_iterable(map(_values_of, attributes)))
        self._sizes = list(map(len, attributes))
        self._inside = self._modules_inside()
        self._lazy = [number for number, module in enumerate(self.modules) if isinstance(module, LazyModuleMixin)]
        # FSDP2 exchanges parameters in every forward, and the structure leaves them alone
        self._is_sharded = any(isinstance(module, FSDPModule) for module in self.modules)

    def again(self) -> Holders:
        """Return the holders of another batch: the same, if they are still all there are."""
        changed = [] if self._are_as_before() else [n for n in self._plain if not self.states[n].is_in(self.all[n])]
        inside = self._modules_inside()
        inside_as_before = len(inside) == len(self._inside) and all(map(is_, inside, self._inside))
        if changed or not inside_as_before or self._is_sharded or not self.structure.is_current():
            return Holders(self._root, self.reach, self._unsteady.union(id(self.all[number]) for number in changed))
        same = Holders.__new__(Holders)  # copy.copy takes ten times as long
        same.__dict__.update(self.__dict__, states=self._now())
        return same

    def _are_as_before(self) -> bool:
        """Whether those with nothing to copy hold the very same."""
        now = [holder.__dict__ for holder in self._unchanging]
        return (
            self._sizes == list(map(len, now))
            and all(map(is_, chain.from_iterable(map(_values_of, now)), self._values))
            and self._names == list(chain.from_iterable(now))
            and not any(self._buffers)
        )

    def now(self) -> list[ModuleState]:
        """Return the states, themselves, that they are in now."""
        return self._now() if self._are_as_before() else [ModuleState.referenced(holder) for holder in self.all]

    def _now(self) -> list[ModuleState]:
        states = self.states.copy()
        for number in self.others:
            states[number] = ModuleState.referenced(self.all[number])
        return states

    def copies(self, states: Sequence[ModuleState], memo: dict[int, Any] | None = None) -> list[ModuleState]:
        """Return copies that changes in place do not reach; what shares memory with a parameter moves with it.

        Args:
            states: The states.
            memo: What has which copy, by id; it is told of those that are made.

        Returns:
            The copies.
        """
        memo = {} if memo is None else memo
        plain = {id(self.states[number]) for number in self._plain}  # most, and known to be
        copied = {id(state): state for state in states if id(state) not in plain and not state.is_plain}
        for state in copied.values():
            for tensor in state.tensors:
                if storage_of(tensor) in self._of_parameters:
                    memo[id(tensor)] = tensor, tensor
        # buffers first: views follow
        buffers = {key: {k: copy_of(v, memo) for k, v in state.buffers.items()} for key, state in copied.items()}
        return [state.fresh(memo, buffers[id(state)]) if id(state) in copied else state for state in states]

    @functools.cached_property
    def _of_parameters(self) -> frozenset[int]:
        """Where the parameters lie in memory."""
        return frozenset(storage_of(p) for module in self.modules for p in module._parameters.values() if p is not None)

    def place_of(self, tensor: Tensor) -> str:
        """Return what holds a tensor that is copied, as a name to look for."""
        for holder, state in zip(self.all, self.states, strict=True):
            for name in (*state.buffers, *state._copied):
                value = state.buffers.get(name, state.attributes.get(name))
                inside = (
                    value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
                )
                if value is tensor or any(each is tensor for each in inside):
                    return f"{name} of {type(holder).__name__}"
        return f"a tensor of shape {tuple(tensor.shape)}"

    def install(self, states: Sequence[ModuleState]) -> None:
        """Make these the states that they are in."""
        grown = {n: vars(self.all[n]).copy() for n in self._lazy if not isinstance(self.all[n], LazyModuleMixin)}
        kept = self._are_as_before() and all(states[n] is self.states[n] for n in self._plain)
        for number in self.others if kept else range(len(self.all)):
            states[number].install(self.all[number])
        for number, found in grown.items():  # into what they are, for which there is no way back
            ModuleState({}, found).install(self.all[number], buffers=False)

    def _modules_inside(self) -> list[nn.Module]:
        """The modules that lie in containers, which only those have that are copied."""
        found: list[nn.Module] = []
        for number in self.others:
            attributes = self.all[number].__dict__
            if isinstance(self.all[number], nn.Module):
                found += _modules_in([attributes[name] for name in _kinds_of(attributes).may_hold_modules])
        return found


def _modules(root: nn.Module | None) -> list[nn.Module]:
    """All modules below `root`, those in plain containers (a list of metrics, say) included."""
    found: dict[int, nn.Module] = {}
    stack: list[Any] = [] if root is None else [root]
    while stack:
        module = stack.pop()
        # a script cannot be taken apart; `module_problems` refuses one with state
        if id(module) not in found and not isinstance(module, torch.jit.ScriptModule):
            found[id(module)] = module
            attributes = module.__dict__
            stack += [child for child in module._modules.values() if child is not None]
            stack += _modules_in([attributes[name] for name in _kinds_of(attributes).may_hold_modules])
    return list(found.values())


def _modules_in(values: list[Any]) -> list[nn.Module]:
    """The modules among values and in plain containers among them."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    while values:
        value = values.pop()
        if isinstance(value, nn.Module):
            found.append(value)
        elif type(value) in _CONTAINERS and len(value) <= SMALL and id(value) not in seen:
            seen.add(id(value))
            values.extend(value.values() if type(value) is dict else value)
    return found


class _Kinds(NamedTuple):
    """Names of a module's attributes whose types ask for something to be done; most modules have none."""

    may_hold_modules: tuple[str, ...]
    copied: tuple[str, ...]


def _kinds_of(attributes: dict[str, Any]) -> _Kinds:
    return _kinds_of_types(tuple(attributes), tuple(map(type, attributes.values())))


@functools.lru_cache(maxsize=1024)  # the same from one step to the next, and for all layers of one class
def _kinds_of_types(names: tuple[str, ...], types: tuple[type, ...]) -> _Kinds:
    state = [(name, kind) for name, kind in zip(names, types, strict=True) if name not in STRUCTURE]
    return _Kinds(
        tuple(name for name, kind in state if kind in _CONTAINERS or issubclass(kind, nn.Module)),
        tuple(name for name, kind in state if is_copied(kind)),
    )


class ModuleState:
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
        return not (self.buffers or self._copied)

    @functools.cached_property
    def _copied(self) -> tuple[str, ...]:
        """Names of the attributes that are copied."""
        return _kinds_of(self.attributes).copied

    @classmethod
    def referenced(cls, holder: Any) -> ModuleState:
        """The state itself, of a module or another object."""
        buffers = holder._buffers.copy() if isinstance(holder, nn.Module) else {}
        return cls(buffers, holder.__dict__.copy())

    def is_in(self, holder: Any) -> bool:
        """Whether this, with nothing to copy in it, is the state of `holder`."""
        return _same(holder.__dict__, self.attributes) and not getattr(holder, "_buffers", None)

    @property
    def tensors(self) -> list[Tensor]:
        """The attributes that are tensors."""
        values = (self.attributes[name] for name in self._copied)
        return [value for value in values if isinstance(value, Tensor)]

    def fresh(self, memo: dict[int, Any], buffers: dict[str, Tensor | None]) -> ModuleState:
        """A copy that changes in place do not reach, given that of the buffers; `memo`: what is shared stays so."""
        attributes = self.attributes.copy()
        for name in self._copied:
            attributes[name] = copy_of(attributes[name], memo)
        return ModuleState(buffers, attributes)

    @classmethod
    def mean(
        cls, states: Sequence[ModuleState], memo: dict[tuple[int, ...], Any], buffers: Collection[int] = ()
    ) -> ModuleState:
        """The mean of attributes that are floating-point tensors, the first state for the rest.

        Buffers stay those of the first run, the very objects, and views of them too; see `Isolation._average_buffers`.

        Args:
            states: Of the runs.
            memo: Keeps what is shared between modules shared.
            buffers: The ids of all buffers of the first run.

        Returns:
            The state to leave.
        """
        first, *others = states
        if all(first is other or _same(first.attributes, other.attributes) for other in others):
            return first
        means = {n: mean_of([state.attributes.get(n) for state in states], memo, buffers) for n in first._copied}
        return cls(first.buffers, {**first.attributes, **means})

    def install(self, holder: Any, buffers: bool = True) -> None:
        """Make this the state of `holder`; nothing is written in place, so autograd graphs stay valid."""
        if buffers and isinstance(holder, nn.Module) and (self.buffers or holder._buffers):
            holder._buffers.clear()
            holder._buffers.update(self.buffers)
        current = holder.__dict__
        if _same(current, self.attributes):
            return
        for name in [k for k in current if k not in self.attributes and k not in STRUCTURE]:
            del current[name]
        current.update({k: v for k, v in self.attributes.items() if k not in STRUCTURE})


def storage_of(tensor: Tensor) -> int:
    """Return what tells where in memory a tensor lies."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)  # what is empty lies nowhere
    except (NotImplementedError, RuntimeError, ValueError):  # sparse tensors have none
        return id(tensor)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts hold the very same objects by the same names."""
    return len(one) == len(other) and all(map(is_, one.values(), other.values())) and list(one) == list(other)
