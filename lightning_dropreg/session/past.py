"""What parameters and gradients were earlier in a manual step, and a way back there for the length of a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_dropreg.errors import UnsupportedModuleError
from lightning_dropreg.numerics.context import patched
from lightning_dropreg.numerics.torch_private import set_version

__all__ = ["Accesses", "Habits", "Past", "all_optimizers", "parameters_of"]


@dataclass
class Habits:
    """What a manual step was seen to do in its rehearsal; what is kept for replays depends on it.

    Attributes:
        by_hand: Parameters that it changes otherwise than by an optimizer's step (sharpness-aware minimization, weight
            clipping, moving averages).
        reads: Whether it looks at gradients.
        rehearsed: Whether there was a rehearsal.
    """

    by_hand: set[nn.Parameter] = field(default_factory=set)
    reads: bool = False
    rehearsed: bool = False


class Accesses(TorchFunctionMode):
    """Notes that a step looks at gradients of parameters, or takes their values into its own hands.

    Attributes:
        reads: Whether the ``.grad`` of one was read.
        touched: Those whose ``.data`` was.
        began: Whether the step has called a backward.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._ids = {id(parameter) for parameter in parameters}
        self._paused = False
        self.reads = self.began = False
        self.touched: set[nn.Parameter] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`.

        Returns:
            What that returns.

        Raises:
            UnsupportedModuleError: If it reads the gradient of something that is no parameter.
        """
        if func in _ACCESSES and not self._paused:
            if id(args[0]) in self._ids:
                self.reads = self.reads or func == _GRAD
                if func == _DATA:
                    self.touched.add(args[0])
            elif func == _GRAD and self.began and args[0].requires_grad and (args[0].is_leaf or args[0].retains_grad):
                raise UnsupportedModuleError(
                    f"After a backward, training_step reads the gradient (.grad) of a tensor of shape "
                    f"{tuple(args[0].shape)} that is no parameter: an input with requires_grad_(), or what it has "
                    "called retain_grad() on. What is back-propagated here is the loss of passes of their own, which "
                    "leave nothing there. Take it before the backward: torch.autograd.grad(loss, tensor, "
                    "retain_graph=True)."
                )
        return func(*args, **(kwargs or {}))

    def paused(self) -> AbstractContextManager[None]:
        """Note nothing."""
        return patched((self, "_paused", True))


_GRAD, _DATA = Tensor.grad.__get__, Tensor.data.__get__  # type: ignore[union-attr, attr-defined]
_ACCESSES = frozenset({_GRAD, _DATA})


class Past:
    """Values and gradients at the start of one step, after each optimizer step and after each backward."""

    def __init__(self, module: nn.Module, optimizers: Sequence[Any], habits: Habits) -> None:
        self.stepping = False
        found = dict.fromkeys(module.parameters())
        found.update(dict.fromkeys(p for optimizer in optimizers for p in parameters_of(optimizer)))
        self.parameters = [p for p in found if not isinstance(p, UninitializedParameter)]
        self._names = {p: name for name, p in module.named_parameters()}
        self._optimizers = list({id(optimizer.state): optimizer for optimizer in optimizers}.values())
        self._habits = habits
        self._trained = [parameter.requires_grad for parameter in self.parameters]  # before any toggle_optimizer
        self._start = {p: p.detach().clone() for p in self.parameters if p in habits.by_hand}
        self._after: dict[nn.Parameter, list[Tensor]] = {}
        self._versions = {p: [p._version] for p in self._start}  # with which autograd knows these values
        self._gradients = [self._now()] if habits.reads else []

    def _now(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the values that an optimizer is about to change."""
        for parameter in parameters:
            if parameter in self._habits.by_hand:
                continue
            if parameter in self._start:
                self._after.setdefault(parameter, []).append(parameter.detach().clone())
            else:
                self._start[parameter] = parameter.detach().clone()

    def keep_result(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the values that an optimizer has made, where the step may change them further."""
        for parameter in parameters:
            if parameter in self._start and parameter in self._habits.by_hand:
                self._after.setdefault(parameter, []).append(parameter.detach().clone())
                self._versions[parameter].append(parameter._version)

    def keep_gradients(self) -> None:
        """Remember what a backward has left."""
        if self._gradients:
            self._gradients.append(self._now())

    def put_gradients(self, number: int) -> None:
        """Put in place the gradients that were there after so many backwards."""
        if self._gradients:
            for parameter, gradient in zip(self.parameters, self._gradients[number], strict=True):
                parameter.grad = None if gradient is None else gradient.clone()  # the step may change it in place

    @contextmanager
    def revisited(self, whole: bool = False) -> Iterator[Callable[[list[nn.Parameter]], None]]:
        """Put parameters, their gradients, optimizers' state and what is toggled where they were at the start.

        Args:
            whole: Whether no parameter at all may really be changed by what runs inside.

        Yields:
            Moves the parameters that it is given on by one optimizer step.

        Raises:
            UnsupportedModuleError: If a parameter was changed by hand that had not been in the rehearsal.
        """
        now = [(p, p.grad, p.requires_grad, p.data, p._version) for p in self.parameters]
        states = [_copied(optimizer.state) for optimizer in self._optimizers]
        by_hand = self._habits.by_hand
        values = {p: [start, *self._after.get(p, [])] for p, start in self._start.items()}
        for parameter, past in values.items():
            if parameter not in by_hand:
                past.append(parameter.data)
        if whole:
            values.update({p: [p.data] for p in self.parameters if p not in values})
        versions = [(p, p._version) for p in self.parameters if p not in values]
        position = dict.fromkeys(values, 0)

        def put(parameter: nn.Parameter) -> None:
            value = values[parameter][position[parameter]]
            _set(parameter, value.clone() if whole or parameter in by_hand else value)
            if parameter in self._versions:
                set_version(parameter, self._versions[parameter][position[parameter]])

        def advance(parameters: list[nn.Parameter]) -> None:
            for parameter in parameters:
                if position.get(parameter, len(values)) + 1 < len(values.get(parameter, ())):
                    position[parameter] += 1  # in a rehearsal no step was taken
                    put(parameter)

        try:
            for (parameter, *_), trained in zip(now, self._trained, strict=True):
                parameter.requires_grad_(trained)
            for parameter in values:
                put(parameter)
            self.put_gradients(0)
            yield advance
            self._check_untouched(versions)
        finally:
            for parameter, gradient, trained, data, version in now:
                if parameter in values:
                    _set(parameter, data)
                    set_version(parameter, version)
                parameter.grad = gradient
                parameter.requires_grad_(trained)
            for optimizer, state in zip(self._optimizers, states, strict=True):
                _restore(optimizer.state, state)

    def _check_untouched(self, versions: Sequence[tuple[nn.Parameter, int]]) -> None:
        changed = [self._names.get(p, "a parameter") for p, version in versions if p._version != version]
        if changed:
            raise UnsupportedModuleError(
                f"training_step changes parameters by hand ({', '.join(changed)}), and it did not in the first step, "
                "so they cannot be put back. Do it in every step, or in on_train_batch_end."
            )


def all_optimizers(optimizers: Iterable[Any]) -> list[Any]:
    """Return optimizers and those that they hold, as sharpness-aware minimization holds the one that it wraps."""
    found: dict[int, Any] = {}
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if id(optimizer) in found:
            continue
        found[id(optimizer)] = optimizer
        for value in vars(optimizer).values():
            held = value if isinstance(value, (list, tuple)) else [value]
            waiting += [each for each in held if isinstance(each, Optimizer)]
    return list(found.values())


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    # The storage is exchanged, not written to: autograd graphs and optimizers hold the parameter itself.
    parameter.data = value
    torch.clear_autocast_cache()


_State = MutableMapping[Any, Any]


def _copied(states: _State) -> dict[Any, tuple[Any, Any]]:
    """What an optimizer keeps for each parameter: the very object, and its content if that is a dict."""
    return {key: (state, dict(state) if isinstance(state, dict) else state) for key, state in states.items()}


def _restore(states: _State, before: dict[Any, tuple[Any, Any]]) -> None:
    states.clear()
    for key, (state, content) in before.items():
        if isinstance(state, dict):  # an optimizer in the midst of its step holds on to it
            state.clear()
            state.update(content)
        states[key] = state
