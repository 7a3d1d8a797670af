"""Stochastic depth: whole branches of examples are dropped, by a few lines that every vision library writes itself.

There is no function of torch to intercept, only the drawing of the mask: ``bernoulli_(keep)`` (torchvision, timm) or
``floor(keep + uniform)`` (transformers, efficientnet_pytorch). What is drawn is multiplied to a branch and divided by
``keep``. So the mask itself is a site: it is ``keep (1 + eta)``, dropout of the constant ``keep``, and whatever is
done with it linearly follows. Drawings are taken for such a mask only within functions and modules that are known by
name to be stochastic depth; others (data augmentation, sampling) are left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.errors import UnsupportedSiteError
from lightning_dropreg.interception.naming import name_caller
from lightning_dropreg.interception.sites import Mode

__all__ = ["HANDLERS"]

_FUNCTIONS = frozenset({"drop_path", "drop_connect", "stochastic_depth"})
_BETWEEN = ("lightning_dropreg.interception.", "torch._dynamo.")
"""Modules of the functions that stand between a handler and the call that it handles."""
_KEEP = ("keep_prob", "survival_rate", "survival_prob")


def _caller() -> dict[str, Any] | None:
    """The variables of the function that draws, if it is stochastic depth."""
    frame: Any = sys._getframe(2)  # _caller, handler
    while frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    name, variables = frame.f_code.co_name, frame.f_locals
    if name == "forward":
        name = type(variables.get("self")).__name__
    return dict(variables) if name in _FUNCTIONS or name.endswith(("DropPath", "StochasticDepth")) else None


def _mask(mode: Mode, like: Tensor, keep: float) -> Tensor:
    shape = tuple(like.shape)
    return mode.site(torch.full_like(like, keep), 1 - keep, shape, "stochastic_depth", inplace=False)


def bernoulli_(mode: Mode, func: Callable[..., Tensor], self: Tensor, p: Any = 0.5, **kwargs: Any) -> Tensor:
    """`Tensor.bernoulli_`, as torchvision and timm draw; the tensor itself becomes the mask."""
    if _caller() is None or not isinstance(p, (int, float)):
        return func(self, p, **kwargs)
    return self.copy_(_mask(mode, self, float(p)))


def floor(mode: Mode, func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.floor` and `Tensor.floor_`, with which ``keep + uniform`` becomes a mask."""
    variables = _caller()
    if variables is None:
        return func(input, *args, **kwargs)
    keep = next((variables[name] for name in _KEEP if isinstance(variables.get(name), (int, float))), None)
    if keep is None:
        raise UnsupportedSiteError(
            f"{name_caller()} drops whole branches (stochastic depth), but its keep probability is not where this "
            f"package looks for it (a variable {' or '.join(_KEEP)}). Use the function of torchvision or timm."
        )
    mask = _mask(mode, input, float(keep))
    return input.copy_(mask) if func is Tensor.floor_ or func is torch.floor_ else mask


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.bernoulli_: bernoulli_,
    **dict.fromkeys((Tensor.floor, Tensor.floor_, torch.floor, torch.floor_), floor),
}
