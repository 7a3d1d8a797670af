"""Softmax and its kin for dual numbers whose tangents are differentiated backward.

The forward-mode formulas that torch 2.13 has for ``softmax``, ``log_softmax`` and ``logsumexp`` overwrite a value that
their own backward needs, and fused attention has none. These have both. A pass with dual numbers puts them in place of
torch's (`REPLACEMENTS`); on plain tensors they call torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["REPLACEMENTS", "log_softmax"]

_softmax, _log_softmax, _logsumexp = torch.softmax, torch.log_softmax, torch.logsumexp


def softmax(input: Tensor, dim: int, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """`torch.softmax` and `F.softmax`; the tangent is ``p (t - sum p t)``."""
    dtype = _dtype(rest, dtype)
    x, t = forward_ad.unpack_dual(input)
    p = _softmax(x, dim, dtype=dtype)
    if t is None:
        return p
    t = t.to(p.dtype)
    return forward_ad.make_dual(p, p * (t - (p * t).sum(dim, keepdim=True)))


def log_softmax(input: Tensor, dim: int, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """`torch.log_softmax` and `F.log_softmax`; the tangent is ``t - sum p t``."""
    dtype = _dtype(rest, dtype)
    x, t = forward_ad.unpack_dual(input) if forward_ad._current_level >= 0 else (input, None)
    log_p = _log_softmax(x, dim, dtype=dtype)
    if t is None:
        return log_p
    t = t.to(log_p.dtype)
    return forward_ad.make_dual(log_p, t - (log_p.exp() * t).sum(dim, keepdim=True))


def _dtype(rest: tuple[Any, ...], dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype among positional arguments: `F.softmax` has a stack level before it, `torch.softmax` does not."""
    return next((value for value in rest if isinstance(value, torch.dtype)), dtype)


def logsumexp(input: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """`torch.logsumexp`; the tangent is ``sum p t``."""
    x, t = forward_ad.unpack_dual(input)
    value = _logsumexp(x, dim, keepdim=True)
    result = value if keepdim else value.squeeze(dim)
    if t is None:
        return result
    tangent = ((x - value).exp() * t).sum(dim, keepdim=keepdim)
    return forward_ad.make_dual(result, tangent)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without dropout, written out."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros(attn_mask.shape, dtype=scores.dtype, device=scores.device)
            bias = bias.masked_fill(~attn_mask, -math.inf)
        scores = scores + bias
    return softmax(scores, -1) @ value


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax), softmax),
    **dict.fromkeys(
        (F.log_softmax, torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax), log_softmax
    ),
    **dict.fromkeys((torch.logsumexp, torch.special.logsumexp, Tensor.logsumexp), logsumexp),
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}
