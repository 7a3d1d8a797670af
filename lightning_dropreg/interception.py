"""Finds dropout sites and losses in code that knows nothing of this package.

A `torch.overrides.TorchFunctionMode` sees every call of a function of ``torch`` while it is active, from whatever
module or line. `Interception` replaces what the dropouts do by a rule of the caller's choice and notes what the
losses were given; everything else runs as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dropreg.errors import UnsupportedSiteError
from lightning_dropreg.losses import RECOGNIZED, Loss
from lightning_dropreg.sites import Site, check_drop_prob

__all__ = ["Interception", "Rule"]


class Rule(Protocol):
    """What happens at a dropout site in one pass."""

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """Return what takes the place of ``dropout(h)``; `h` itself must not be modified."""


class Interception(TorchFunctionMode):
    """Applies a rule at the dropout sites and records the losses of the code that runs inside it.

    Args:
        rule: What to do at each site.
        record_losses: Whether to take recognized losses apart; without, they are left alone.
        replacements: Functions to run in place of others.
        name_sites: Whether to look up which module each site belongs to (slow, for people to read).

    Attributes:
        sites: The sites in the order in which they were reached.
        site_nodes: The node of the autograd graph at which each site's result was made; None for a constant.
        losses: The losses in the order in which they were computed.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        record_losses: bool = False,
        name_sites: bool = False,
        replacements: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.record_losses = record_losses
        self.name_sites = name_sites
        self.replacements = replacements or {}
        self.sites: list[Site] = []
        self.site_nodes: list[Any] = []
        self.losses: list[Loss] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route one call; `args` and `kwargs` are those of `func`."""
        kwargs = kwargs or {}
        dropout = DROPOUTS.get(func)
        if dropout is not None:
            return dropout(self, func, *args, **kwargs)
        if self.record_losses:
            loss = RECOGNIZED.get(func)
            if loss is not None:
                return self._loss(loss, *args, **kwargs)
        return self.replacements.get(func, func)(*args, **kwargs)

    def _loss(self, compute: Callable[..., tuple[Tensor, Loss]], *args: Any, **kwargs: Any) -> Tensor:
        reduced, loss = compute(*args, **kwargs)
        if not loss.elements.requires_grad:
            return reduced
        self.losses.append(loss)
        return reduced

    def site(self, h: Tensor, p: float, mask_shape: tuple[int, ...], kind: str, inplace: bool) -> Tensor:
        """Apply the rule at a site with ``0 < p``.

        Args:
            h: The tensor to drop from.
            p: Drop probability.
            mask_shape: Shape of the mask, broadcastable to the shape of `h`.
            kind: Name of the kind of dropout.
            inplace: Whether the caller expects `h` itself to change.

        Returns:
            What takes the place of the dropout's result.
        """
        check_drop_prob(p, kind)
        if p == 0.0:
            return h
        site = Site(_name_caller() if self.name_sites else "", p, tuple(h.shape), mask_shape, kind)
        self.sites.append(site)
        dropped = self.rule(site, h.clone() if inplace else h)
        self.site_nodes.append(dropped.grad_fn)
        return h.copy_(dropped) if inplace else dropped


# --- dropout ----------------------------------------------------------------------------------------------------


def _dropout(
    mode: Interception, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    """`F.dropout`: every entry has a mask of its own."""
    return mode.site(input, p, tuple(input.shape), "dropout", inplace) if training else input


def _feature_dropout(kind: str, unbatched_ndim: int | None) -> Callable[..., Tensor]:
    """`F.dropout1d` and its relatives: one mask entry per example and channel, shared over space.

    Args:
        kind: Name of the kind.
        unbatched_ndim: Number of dimensions of an input without batch dimension, whose first is the channels;
            None where torch knows no such input.

    Returns:
        The handler.
    """

    def handle(
        mode: Interception, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        if not training:
            return input
        own = 1 if input.ndim == unbatched_ndim else 2
        mask_shape = tuple(input.shape[:own]) + (1,) * (input.ndim - own)
        return mode.site(input, p, mask_shape, kind, inplace)

    return handle


def _torch_dropout(handler: Callable[..., Tensor], inplace: bool) -> Callable[..., Tensor]:
    """The functions of ``torch`` itself, whose arguments have other names."""

    def handle(mode: Interception, func: Callable[..., Tensor], input: Tensor, p: float, train: bool) -> Tensor:
        return handler(mode, func, input, p, train, inplace)

    return handle


def _refused(kind: str, reason: str, active: Callable[..., bool]) -> Callable[..., Any]:
    """A kind of dropout for which there is no rule, refused when it would drop something."""

    def handle(mode: Interception, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if active(*args, **kwargs):
            raise UnsupportedSiteError(
                f"{kind} was called with a positive drop probability in {_name_caller()}. {reason} "
                "Set that probability to 0 or put a plain nn.Dropout in its place."
            )
        return mode.replacements.get(func, func)(*args, **kwargs)

    return handle


def _alpha_active(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> bool:
    return training and p > 0


def _rnn_active(*args: Any) -> bool:
    # lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first), or the packed form
    # lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)
    packed = isinstance(args[1], Tensor) and not isinstance(args[2], Tensor) and isinstance(args[3], (list, tuple))
    start = 6 if packed else 5
    layers, p, train = args[start - 1 : start + 2]
    return bool(train) and p > 0 and layers > 1


def _attention_active(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> bool:
    return dropout_p > 0


def _multi_head_active(*args: Any, **kwargs: Any) -> bool:
    # dropout_p is the 11th positional argument, training the 14th
    p = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
    training = kwargs.get("training", args[13] if len(args) > 13 else True)
    return bool(training) and p > 0


_RNN = "The dropout between its layers happens inside one fused operation."
_ATTENTION = "The dropout of attention probabilities happens inside one fused operation."
_ALPHA = "Alpha dropout changes mean and scale of what it keeps; its noise is not of the form h * (1 + eta)."

DROPOUTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _dropout,
    F.dropout1d: _feature_dropout("dropout1d", 2),
    F.dropout2d: _feature_dropout("dropout2d", None),
    F.dropout3d: _feature_dropout("dropout3d", 4),
    torch.dropout: _torch_dropout(_dropout, inplace=False),
    torch.dropout_: _torch_dropout(_dropout, inplace=True),
    torch.feature_dropout: _torch_dropout(_feature_dropout("feature_dropout", None), inplace=False),
    torch.feature_dropout_: _torch_dropout(_feature_dropout("feature_dropout", None), inplace=True),
    F.alpha_dropout: _refused("F.alpha_dropout", _ALPHA, _alpha_active),
    F.feature_alpha_dropout: _refused("F.feature_alpha_dropout", _ALPHA, _alpha_active),
    torch.lstm: _refused("nn.LSTM(dropout=...)", _RNN, _rnn_active),
    torch.gru: _refused("nn.GRU(dropout=...)", _RNN, _rnn_active),
    torch.rnn_tanh: _refused("nn.RNN(dropout=...)", _RNN, _rnn_active),
    torch.rnn_relu: _refused("nn.RNN(dropout=...)", _RNN, _rnn_active),
    F.scaled_dot_product_attention: _refused("F.scaled_dot_product_attention", _ATTENTION, _attention_active),
    F.multi_head_attention_forward: _refused("nn.MultiheadAttention", _ATTENTION, _multi_head_active),
}


# --- names ------------------------------------------------------------------------------------------------------


def _name_caller() -> str:
    """Say where in the user's code the current call comes from: module path, and the line where that is needed.

    The stack of Python frames holds the modules that are running as the ``self`` of their ``forward``s; the outermost
    of them knows the innermost one's path.

    Returns:
        For example ``"encoder.2"`` or ``"encoder (model.py:17)"``.
    """
    frame = sys._getframe(1)
    modules: list[nn.Module] = []
    line = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("lightning_dropreg.passes"):  # what lies further out is not the pass's
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not (modules and modules[-1] is owner):
            modules.append(owner)
        if not line and not name.startswith(("torch.", "lightning_dropreg.interception")):
            line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return line
    paths = {id(module): path for path, module in modules[-1].named_modules(remove_duplicate=False)}
    path = paths.get(id(modules[0])) or type(modules[0]).__name__
    return path if isinstance(modules[0], nn.modules.dropout._DropoutNd) else f"{path} ({line})"
