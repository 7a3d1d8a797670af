"""`F.dropout` and its relatives: ``h (1 + eta)`` with one mask entry per tensor entry, or per example and channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.errors import UnsupportedSiteError
from lightning_dropreg.interception.naming import name_caller
from lightning_dropreg.interception.sites import Mode

__all__ = ["HANDLERS", "channel_mask", "torch_namespace"]


def elementwise(
    mode: Mode, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    """`F.dropout`: every entry has a mask of its own."""
    if not training:
        mode.at_rest(p, "dropout")
        return input
    return mode.site(input, p, tuple(input.shape), "dropout", inplace)


def channel_mask(input: Tensor, unbatched_ndim: int | None) -> tuple[int, ...]:
    """Shape of a mask with one entry per example and channel; one of `unbatched_ndim` has no examples."""
    own = 1 if input.ndim == unbatched_ndim else 2
    return tuple(input.shape[:own]) + (1,) * (input.ndim - own)


def featurewise(kind: str, unbatched_ndim: int | None) -> Callable[..., Tensor]:
    """Make the handler of `F.dropout1d`, `F.dropout2d` or `F.dropout3d`."""

    def handle(
        mode: Mode, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        if not training:
            mode.at_rest(p, kind)
            return input
        return mode.site(input, p, channel_mask(input, unbatched_ndim), kind, inplace)

    return handle


def torch_namespace(handler: Callable[..., Tensor], inplace: bool) -> Callable[..., Tensor]:
    """Make the handler of a function of ``torch`` itself, whose arguments have other names."""

    def handle(mode: Mode, func: Callable[..., Tensor], input: Tensor, p: float, train: bool) -> Tensor:
        return handler(mode, func, input, p, train, inplace)

    return handle


def native(
    mode: Mode, func: Callable[..., tuple[Tensor, Tensor]], input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    """`torch.native_dropout`, which gives its mask away: what is done with that is not known.

    Returns:
        What it returns when it drops nothing.

    Raises:
        UnsupportedSiteError: If it drops something.
    """
    if train is False or p == 0:
        return func(input, p, train)
    raise UnsupportedSiteError(
        f"torch.native_dropout in {name_caller()} returns the mask besides the result, so what the model does with the "
        "noise cannot be known. Use torch.nn.functional.dropout, or lightning_dropreg.drop."
    )


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: elementwise,
    F.dropout1d: featurewise("dropout1d", 2),
    F.dropout2d: featurewise("dropout2d", None),
    F.dropout3d: featurewise("dropout3d", 4),
    torch.dropout: torch_namespace(elementwise, inplace=False),
    torch.dropout_: torch_namespace(elementwise, inplace=True),
    torch.native_dropout: native,
    torch.feature_dropout: torch_namespace(featurewise("feature_dropout", None), inplace=False),
    torch.feature_dropout_: torch_namespace(featurewise("feature_dropout", None), inplace=True),
}
