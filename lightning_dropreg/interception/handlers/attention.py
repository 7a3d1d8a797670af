"""Attention that drops probabilities inside one fused operation: written out, with a site on the probabilities.

Where a user prefers fused attention without that dropout, `attention_dropout` leaves it out, by choice.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dropreg.checks import check_choice
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.interception.handlers.composite import open_up
from lightning_dropreg.interception.sites import Mode
from lightning_dropreg.numerics import dual
from lightning_dropreg.numerics.context import holding

__all__ = ["ATTENTION", "HANDLERS", "attention_dropout", "attention_is_ignored"]

ATTENTION = ("site", "ignore")
_ignored: ContextVar[bool] = ContextVar("attention_ignored", default=False)


def attention_dropout(treatment: str) -> AbstractContextManager[None]:
    """Choose what becomes of dropout on attention probabilities in the passes run inside.

    Args:
        treatment: ``"site"``: it is a dropout site, and attention is written out (memory grows with the square of the
            length, as it does without a fused kernel). ``"ignore"``: it is switched off and has no part in penalty and
            noise. This concerns `torch.nn.functional.scaled_dot_product_attention` and
            `torch.nn.functional.multi_head_attention_forward` (`nn.MultiheadAttention` and the layers built of it);
            attention that calls `torch.nn.functional.dropout` itself is an ordinary site.

    Returns:
        Does so for the length of a ``with``.

    Raises:
        InvalidArgumentError: If `treatment` is neither.

    Example:
        >>> from lightning_dropreg.functional import find_sites
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
        >>> def loss():
        ...     return layer(torch.ones(4, 5, 8)).sum()
        >>> with attention_dropout("ignore"):
        ...     ignored = find_sites(loss)
        >>> len(find_sites(loss)) - len(ignored)
        1
    """
    check_choice("attention", treatment, ATTENTION)
    return holding(_ignored, treatment == "ignore")


def attention_is_ignored() -> bool:
    """Whether passes that begin now leave out dropout on attention probabilities."""
    return _ignored.get()


def fused(
    mode: Mode,
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`: a site on the probabilities ``(..., queries, keys)``."""
    drops = dropout_p > 0 and not mode.ignores_attention
    if not (drops or mode.written_out):
        options = {"enable_gqa": True} if enable_gqa else {}  # an argument that older torch has not
        result: Tensor = func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, **options)
        return result
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    p = _probabilities(scores, attn_mask, is_causal)
    if drops:
        p = mode.site(p, dropout_p, tuple(p.shape), "attention", inplace=False)
    return p.to(value.dtype) @ value


def _probabilities(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Softmax over the keys that a query sees; zeros for a query that sees none, as fused attention has it.

    Returns:
        Probabilities, in the shape of `scores`.

    Raises:
        InvalidArgumentError: If there are two masks, which torch refuses too.
    """
    if is_causal:
        if attn_mask is not None:
            raise InvalidArgumentError(
                "scaled_dot_product_attention was called with both attn_mask and is_causal=True, which torch refuses. "
                "Give one of them."
            )
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return dual.softmax(scores, -1)
    is_bool = attn_mask.dtype == torch.bool
    scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
    blind = (scores.detach() == -math.inf).all(-1, keepdim=True)
    return dual.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)


_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def multi_head(mode: Mode, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward`, whose only dropout is that of the probabilities."""
    call = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    if mode.ignores_attention:
        call["dropout_p"] = 0.0
    if not call.get("training", True):
        mode.at_rest(call["dropout_p"], "attention")
    with mode.sites_of_kind("attention"):
        return open_up(mode, func, **call)


HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: fused,
    F.multi_head_attention_forward: multi_head,
}
