"""Watches one run of a step: every dropout as it really happens, and every other random number.

Unlike an interception it replaces nothing. A function mode sees the functions of torch, hooks on all modules see what
goes into dropout layers, written by whomever, and what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_dropreg.auditing.calls import Call, Draw, HandMask, LossCall
from lightning_dropreg.auditing.functions import OBSERVED
from lightning_dropreg.auditing.masks import digest, read_mask
from lightning_dropreg.auditing.places import Paths, Place, current_line
from lightning_dropreg.interception.handlers.dropout import channel_mask
from lightning_dropreg.losses import RECOGNIZED
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS, hidden_from_modes
from lightning_dropreg.passes.randomness import RandomState
from lightning_dropreg.passes.reach import Reach
from lightning_dropreg.placing import drop_prob_attributes

__all__ = ["Watch", "is_dropout", "layer_drop_prob", "watching"]

_DROPS = re.compile(r"drop|stochastic_?depth", re.IGNORECASE)
_SHARES = re.compile(
    r"lock|variational|spatial|path|depth|connect|channel|row|token|patch|word|embed|block|shared|\dd|feature|layer",
    re.IGNORECASE,
)
# functions by which a mask may act, and where in their arguments they have it and what it acts on
_MASKING = {
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"), ((0, 1), (1, 0))),
    "where": ((0, 1), (0, 2)),
    "masked_fill": ((1, 0),),
    "masked_fill_": ((1, 0),),
}


@dataclass
class _Frame:
    """A module that is running."""

    module: nn.Module
    h: Tensor | None = None
    before: GradientEdge | None = None
    calls: int = 0


class Watch(TorchFunctionMode):
    """Notes what happens while it is active; use it by `watching`.

    Args:
        paths: The paths of the modules.
        masks: Whether to read masks.
        gradients: Whether the gradients at the dropouts will be asked for.
        by_hand: Whether to look for masks that no dropout made.

    Attributes:
        calls: The calls of dropouts in order.
        drawn: What else drew random numbers.
        losses: The losses that were called.
        hand_masks: Tensors that might be masks made by hand.
        seen: The modules that ran, and whether in training mode.
    """

    def __init__(self, paths: Paths, masks: bool = True, gradients: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.paths = paths
        self.masks = masks
        self.gradients = gradients
        self.by_hand = by_hand
        self.calls: list[Call] = []
        self.drawn: list[Draw] = []
        self.losses: list[LossCall] = []
        self.seen: dict[nn.Module, bool] = {}
        self.backward = False
        self.hand_masks: list[HandMask] = []
        self._masks: list[HandMask] = []
        self._random = RandomState(Reach({type(root).__name__: root for root in paths.roots}).generators())
        self._stack: list[_Frame] = []
        self.norm_inputs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and note what it did."""
        kwargs = kwargs or {}
        self._note("random numbers drawn before this line")
        handler = OBSERVED.get(func)
        if handler is not None:
            result = handler(self, func, *args, **kwargs)
            self._random = self._random.again()  # they have changed as they should
            return result
        name = str(getattr(func, "__name__", func))
        if self.by_hand:
            # what no parameter acts on any more is no activation: it is masked in a loss
            if self._masks and any(isinstance(one, nn.Parameter) for one in tree_leaves((args, kwargs))):
                self.hand_masks += self._masks
                self._masks = []
            if name in _MASKING:
                self._note_hand_mask(name, args)
        result = func(*args, **kwargs)
        self._note(name, drew=kwargs.get("generator") is not None)
        if func in RECOGNIZED:
            # prediction and target may stand the other way round
            given = [one for one in (*args[:2], kwargs.get("input")) if isinstance(one, Tensor)]
            made = next((one for one in given if one.grad_fn is not None), None)
            if made is not None:
                self.losses.append(LossCall(func.__name__, made.grad_fn, tuple(made.shape)))
        return result

    def _note_hand_mask(self, name: str, args: tuple[Any, ...]) -> None:
        fills = args[1:3] if name == "where" else args[2:]
        if fills and not any(bool((torch.as_tensor(fill) == 0).all()) for fill in fills):
            return  # something else is put in its place
        for mask, h in ((args[i], args[j]) for i, j in _MASKING[name] if max(i, j) < len(args)):
            if not (isinstance(mask, Tensor) and isinstance(h, Tensor) and h.is_floating_point()):
                continue
            # a gradient tells an activation from data
            if mask.requires_grad or (torch.is_grad_enabled() and not h.requires_grad) or self._in_dropout():
                continue
            zero = mask == 0
            dropped, entries = int(zero.sum()), mask.numel()
            if 0 < dropped < entries and bool((mask[~zero] == mask[~zero][0]).all()):
                self._masks.append(HandMask(self.place(), self.layer(), digest(zero), dropped, entries))

    def place(self) -> Place:
        """Return where the current call comes from."""
        return Place(self.module_path(), current_line())

    def module_path(self) -> str:
        """Return the path of the module that is running."""
        if not self._stack:
            return ""
        modules = [frame.module for frame in self._stack]
        return self.paths.of(modules[-1], modules)

    def layer(self) -> nn.Module | None:
        """Return the module that is running."""
        return self._stack[-1].module if self._stack else None

    def record(self, kind: str, p: float | None, drops: bool, **known: Any) -> Call:
        """Note a call of a function that drops, and what else is `known` of it (see `Call`)."""
        layer = self.layer()
        training, inner = (True, False) if layer is None else (layer.training, is_dropout(layer))
        self.calls.append(Call(self.place(), kind, p, drops, training, layer, inner=inner, **known))
        return self.calls[-1]

    def _note(self, what: str, drew: bool = False) -> None:
        moved = self._random.moved()
        if moved:
            self._random = self._random.again()
        if self.backward or self._in_dropout():
            return
        for source in moved or [""] * drew:
            self.drawn.append(Draw(what if source in {"", "torch"} else f"{source} ({what})", self.place()))

    def _in_dropout(self) -> bool:
        return any(is_dropout(frame.module) for frame in self._stack)

    def enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Note that a module begins to run; return its arguments where one had to be replaced."""
        self._note("drawn by Python code")
        self.seen[module] = self.seen.get(module, False) or module.training
        frame = _Frame(module, calls=len(self.calls))
        self._stack.append(frame)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and args and isinstance(args[0], Tensor):
            _note_statistics(self.norm_inputs, module, args[0])
        if not (self.masks and is_dropout(module) and args and isinstance(args[0], Tensor)):
            return None
        h = args[0]
        inplace = bool(getattr(module, "inplace", False))
        frame.h = h.detach().clone() if inplace else h
        if not (self.gradients and h.requires_grad and torch.is_grad_enabled()) or inplace:
            return None
        own = h.view_as(h)
        frame.h, frame.before = own, get_gradient_edge(own)
        return (own, *args[1:])

    def leave_module(self, module: nn.Module, output: Any) -> None:
        """Note that a module has run."""
        self._note("drawn by Python code")
        while self._stack:
            frame = self._stack.pop()
            if frame.module is module:
                break
        else:
            return
        if not (self.masks and is_dropout(module) and frame.h is not None and isinstance(output, Tensor)):
            return
        p = layer_drop_prob(module)
        inside = self.calls[frame.calls :]
        expected: tuple[int, ...] | None = tuple(frame.h.shape)
        if isinstance(module, (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            unbatched = {nn.Dropout1d: 2, nn.Dropout3d: 4}.get(type(module))
            expected = channel_mask(frame.h, unbatched)
        elif not isinstance(module, nn.Dropout):
            if _SHARES.search(type(module).__name__):
                expected = None
            for call in inside:
                expected = call.expected
        modules = [one.module for one in self._stack]
        after = get_gradient_edge(output) if frame.before and output.grad_fn is not None else None
        mask = read_mask(frame.h, output)
        call = Call(
            Place(self.paths.of(module, modules), current_line()),
            type(module).__name__,
            p,
            any(call.drops for call in inside) or (mask is not None and mask.dropped > 0),
            module.training,
            module,
            mask=mask,
            expected=expected,
            before=frame.before,
            after=after,
        )
        self.calls.append(call)


def _note_statistics(into: dict[nn.Module, list[tuple[Tensor, Tensor]]], norm: nn.Module, h: Tensor) -> None:
    h = h.detach().double()
    dims = [dim for dim in range(h.ndim) if dim != 1]
    if h.ndim >= 2 and h.numel() > h.shape[1]:
        into.setdefault(norm, []).append((h.mean(dims), h.square().mean(dims)))


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Let `watch` see what runs inside."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> Any:
        with hidden_from_modes():
            return watch.enter_module(module, args)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        with hidden_from_modes():
            watch.leave_module(module, output)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is a dropout layer: one of torch's, or one that is called so and has no parameters."""
    if isinstance(module, DROPOUT_LAYERS):
        return True
    if not _DROPS.search(type(module).__name__) or isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        return False
    return next(module.parameters(), None) is None


def layer_drop_prob(module: nn.Module) -> float | None:
    """Return the drop probability that a dropout layer keeps; None if it has none that is known."""
    for _, layer, name in drop_prob_attributes(module):
        if layer is module:
            return float(getattr(layer, name))
    for name in ("p", "prob", "rate", "drop_prob"):
        value = getattr(module, name, None)
        if isinstance(value, float) and 0 <= value <= 1:
            return value
    return None
