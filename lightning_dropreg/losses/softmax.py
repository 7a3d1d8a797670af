"""The variance that softmax curvature is: ``u^T (diag(p) - p p^T) u = Var_{y ~ p}(u_y)``.

With a large vocabulary the outputs are the largest tensors of a model, and a formula of ten operations on them costs
more than the rest of the penalty. Here the value and its gradient are computed together, a few rows at a time that
stay in the cache: the only tensors as large as the outputs are the two gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_dropreg.numerics.dtypes import noise_dtype

__all__ = ["pair_variance", "symmetric_divergence", "variance"]

_ON_CPU = 1 << 18  # elements at a time: 1 MiB of float32 for each intermediate result
_ON_DEVICE = 1 << 24


def variance(z: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """Return ``sum_t s_t Var_{y ~ softmax(z_t)}(u_ty)``.

    Args:
        z: Logits, ``(T, C)``.
        u: Their directional derivative, ``(T, C)``.
        scale: ``s``, ``(T,)``.

    Returns:
        Scalar, once differentiable in all three.
    """
    value: Tensor = _Variance.apply(z, u, scale, None)  # type: ignore[no-untyped-call]
    return value


def pair_variance(plus: Tensor, minus: Tensor, scale: Tensor, step: float) -> Tensor:
    """Return `variance` at ``z = (plus + minus) / 2`` with ``u = (plus - minus) / (2 step)``.

    Args:
        plus: Logits of one pass, ``(T, C)``.
        minus: Logits of the opposite pass, ``(T, C)``.
        scale: ``s``, ``(T,)``.
        step: Step of the passes, positive.

    Returns:
        Scalar, once differentiable in the tensors; float32 at least, half-precision logits are converted row by row.
    """
    value: Tensor = _Variance.apply(plus, minus, scale, step)  # type: ignore[no-untyped-call]
    return value


def symmetric_divergence(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Return ``sum_t s_t (KL(p_t || q_t) + KL(q_t || p_t)) / 2`` with ``p = softmax(one)`` and ``q = softmax(other)``.

    Args:
        one: Logits, ``(T, C)``.
        other: Logits, ``(T, C)``.
        scale: ``s``, ``(T,)``.

    Returns:
        Scalar, differentiable in all three; float32 at least.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(symmetric_divergence(*z, torch.ones(1)).item(), 4)  # (p - q) (difference of the logits) / 2
        0.1155
    """
    dtype = noise_dtype(one.dtype)
    log_p, log_q = one.to(dtype).log_softmax(-1), other.to(dtype).log_softmax(-1)
    masked = log_p.isneginf() & log_q.isneginf()  # classes of which nobody asks
    log_p, log_q = log_p.masked_fill(masked, 0.0), log_q.masked_fill(masked, 0.0)
    return (scale * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)).sum() / 2


class _Variance(torch.autograd.Function):
    """With ``m = E[u]``, ``d = u - m`` and ``V = E[d^2]``: ``dV/du = 2 p d`` and ``dV/dz = p (d^2 - V)``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, step: float | None) -> Tensor:
        rows = max(1, (_ON_CPU if a.device.type == "cpu" else _ON_DEVICE) // max(1, a.shape[-1]))
        if len(a) <= rows:
            values, grad_a, grad_b = _variances(a, b, scale, step)
        else:
            grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
            values = torch.empty(scale.shape, dtype=noise_dtype(a.dtype), device=a.device)
            for start in range(0, len(a), rows):
                part = slice(start, start + rows)
                values[part], grad_a[part], grad_b[part] = _variances(a[part], b[part], scale[part], step)
        ctx.save_for_backward(grad_a, grad_b, values if ctx.needs_input_grad[2] else None)
        return (values * scale).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_a, grad_b, values = ctx.saved_tensors
        return grad_a * grad, grad_b * grad, None if values is None else values * grad, None


def _variances(a: Tensor, b: Tensor, scale: Tensor, step: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The variances of some rows, and the gradients of their sum in `a` and `b`."""
    dtype = noise_dtype(a.dtype)
    z, u = a.to(dtype), b.to(dtype)
    size = 1.0
    if step is not None:  # the difference is left as it is, and its variance divided
        z, u, size = (z + u).mul_(0.5), z - u, 0.25 / step**2
    # a class that is masked out with -inf has no change; what is no number in z is none in p
    p, u = z.softmax(-1), torch.nan_to_num(u, nan=0.0, out=None if step is None else u)
    d = u - (p * u).sum(-1, keepdim=True)
    pd = p * d
    v = (pd * d).sum(-1, keepdim=True)
    weight = scale.to(dtype).unsqueeze(-1) * size
    by_z = d.mul_(pd).addcmul_(p, v, value=-1).mul_(weight)
    by_u = pd.mul_(2 * weight)
    if step is not None:
        by_z, by_u = torch.add(by_u, by_z, alpha=0.5, out=p), by_z.mul_(0.5).sub_(by_u)
    return v.squeeze(-1) * size, by_z.to(a.dtype), by_u.to(b.dtype)
