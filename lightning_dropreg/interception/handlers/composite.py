"""Functions of torch that are written in Python: their inside must be seen too.

Such a function offers itself to the mode as a whole, before it calls anything. While its handler runs, the mode is off,
and a call with the mode on would come right back. So the handler calls a copy of it that does not offer itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.interception.sites import Mode
from lightning_dropreg.numerics.torch_private import FUSED_WEIGHT_NORM

__all__ = ["HANDLERS", "open_up"]


def _never(*_: object) -> bool:
    return False


def _transparent(func: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a Python function of torch so that it does not offer itself to modes, while what it calls still does."""
    assert isinstance(func, types.FunctionType)
    hooks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(hooks, _never)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


TRANSPARENT = {
    func: _transparent(func)
    for func in (
        F.multi_head_attention_forward, F.gumbel_softmax, F.softmin, F.normalize,
        *filter(None, (getattr(F, "linear_cross_entropy", None),)),
    )
}  # fmt: skip
"""The copies, made before a compiler sees the functions."""


def open_up(mode: Mode, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `func` with `mode` seeing what it calls."""
    with mode:
        return TRANSPARENT[func](*args, **kwargs)


def weight_norm(mode: Mode, func: Callable[..., Tensor], v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`, written out where its second derivatives are needed: torch's own are wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim)) if mode.written_out else func(v, g, dim)


def linear_cross_entropy(
    mode: Mode, func: Callable[..., Tensor], *args: Any, options: Any = None, **kwargs: Any
) -> Tensor:
    """`F.linear_cross_entropy` (torch 2.13): a linear layer and `cross_entropy`, where that is to be seen.

    In chunks (``options``) it has no logits to look at, and derivatives of first order only.

    Returns:
        The loss.
    """
    if mode.record_losses or mode.written_out:
        return open_up(mode, func, *args, **kwargs)  # type: ignore[no-any-return]
    return func(*args, options=options, **kwargs)


# attention is in attention.py; the others hold a softmax or a norm, which a pass with dual numbers replaces
HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.gumbel_softmax: open_up,
    F.softmin: open_up,
    F.normalize: open_up,
    **dict.fromkeys(FUSED_WEIGHT_NORM, weight_norm),
}
if hasattr(F, "linear_cross_entropy"):
    HANDLERS[F.linear_cross_entropy] = linear_cross_entropy
