"""Dropout written by users: one function, which their own layers call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lightning_dropreg.checks import check_drop_prob
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.interception.sites import Mode
from lightning_dropreg.numerics.torch_private import a_mode_is_on

__all__ = ["HANDLERS", "drop"]


def drop(
    h: Tensor, p: float, mask_shape: Sequence[int] | None = None, training: bool = True, kind: str = "custom"
) -> Tensor:
    """Drop entries of a tensor with a mask of any shape; what a dropout layer of your own calls.

    Args:
        h: What to drop from: activations, or weights (DropConnect).
        p: Drop probability, in ``[0, 1)``.
        mask_shape: Shape of the mask, with as many dimensions as `h` and 1 where one mask entry is shared (over time,
            for example); that of `h` by default.
        training: Whether to drop at all.
        kind: Name of the kind of dropout, for people to read.

    Returns:
        ``h * mask / (1 - p)`` with a Bernoulli(``1 - p``) mask; within a pass of this package, what the pass wants.

    Raises:
        InvalidArgumentError: If `p` is outside ``[0, 1)`` or `mask_shape` does not fit.

    Example:
        >>> from lightning_dropreg.functional import find_sites
        >>> h = torch.ones(5, 7, 3, requires_grad=True)  # batch, time, features
        >>> [(site.kind, site.mask_shape) for site in find_sites(lambda: drop(h, 0.4, (5, 1, 3), kind="locked").sum())]
        [('locked', (5, 1, 3))]
        >>> drop(h, 0.4, training=False) is h
        True
    """
    check_drop_prob(p, kind)
    shape = tuple(h.shape if mask_shape is None else mask_shape)
    if len(shape) != h.ndim or any(m not in {1, n} for m, n in zip(shape, h.shape, strict=True)):
        raise InvalidArgumentError(
            f"mask_shape={shape} of {kind} does not fit a tensor of shape {tuple(h.shape)}: it needs as many "
            "dimensions, each of the same size or 1."
        )
    if not training:
        return h
    if has_torch_function((h,)) or a_mode_is_on():  # also where p is 0 at the moment: the pass counts it
        result: Tensor = handle_torch_function(drop, (h,), h, p, shape, training, kind)
        return result
    if p == 0:
        return h
    return h * torch.empty(shape, dtype=h.dtype, device=h.device).bernoulli_(1 - p).div_(1 - p)


def _drop(
    mode: Mode, func: Callable[..., Tensor], h: Tensor, p: float, shape: tuple[int, ...], _: bool, kind: str
) -> Tensor:
    return mode.site(h, p, shape, kind, inplace=False)


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {drop: _drop}
