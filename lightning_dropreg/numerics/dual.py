"""Operations for dual numbers whose tangents are differentiated backward, where torch's own are broken.

In torch 2.13 the forward-mode formulas of ``softmax``, ``log_softmax`` and ``logsumexp`` overwrite a value that their
own backward needs (an error), those of ``layer_norm``, ``batch_norm`` and ``instance_norm`` take mean and scale for
constants when they are differentiated backward (a wrong gradient, without a word). A pass with dual numbers puts these
in place of torch's (`REPLACEMENTS`; so does one that is differentiated backward three times, for which the same
formulas of norms are wrong), and refuses those of torch's that are wrong and have no stand-in here (`REFUSED`). A dual
and a constant are combined here as well: torch takes a millisecond, in Python, to see that a constant has no tangent.
``tests/numerics/test_dual.py`` compares what torch has, operation by operation, with finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.torch_private import FUSED_LOG_SOFTMAX, FUSED_SOFTMAX

__all__ = ["REFUSED", "REPLACEMENTS", "divided", "log_softmax", "make_dual"]

_softmax, _log_softmax, _logsumexp = torch.softmax, torch.log_softmax, torch.logsumexp


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """`forward_ad.make_dual`, typed."""
    dual: Tensor = forward_ad.make_dual(primal, tangent)
    return dual


def softmax(input: Tensor, dim: int, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """`torch.softmax` and `F.softmax`; the tangent is ``p (t - sum p t)``."""
    dtype = _dtype(rest, dtype)
    x, t = forward_ad.unpack_dual(input)
    p = _softmax(x, dim, dtype=dtype)
    if t is None:
        return p
    t = t.to(p.dtype)
    return make_dual(p, p * (t - (p * t).sum(dim, keepdim=True)))


def log_softmax(input: Tensor, dim: int, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    """`torch.log_softmax` and `F.log_softmax`; the tangent is ``t - sum p t``."""
    dtype = _dtype(rest, dtype)
    x, t = forward_ad.unpack_dual(input) if forward_ad._current_level >= 0 else (input, None)
    log_p = _log_softmax(x, dim, dtype=dtype)
    if t is None:
        return log_p
    t = t.to(log_p.dtype)
    return make_dual(log_p, t - (log_p.exp() * t).sum(dim, keepdim=True))


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
    return make_dual(result, tangent)


def _normalize(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Zero mean and unit variance over `dims`, of elementary operations; with mean and (biased) variance."""
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().mean(dims, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt(), mean, variance


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """`torch.nn.functional.layer_norm`, written out."""
    x, _, _ = _normalize(input.to(noise_dtype(input.dtype)), tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, written out."""
    return _channel_norm(
        input, (0, *range(2, input.ndim)), running_mean, running_var, weight, bias, training, momentum, eps
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, written out."""
    dims = tuple(range(2, input.ndim))
    return _channel_norm(input, dims, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _channel_norm(
    input: Tensor,
    dims: tuple[int, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    x = input.to(noise_dtype(input.dtype))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    if batch_statistics or running_mean is None or running_var is None:
        normal, mean, variance = _normalize(x, dims, eps)
        if running_mean is not None and running_var is not None:
            count = math.prod(x.shape[d] for d in dims)
            with torch.no_grad():
                new_mean = forward_ad.unpack_dual(mean).primal.mean((0, *range(2, x.ndim)))
                new_var = (
                    forward_ad.unpack_dual(variance).primal.mean((0, *range(2, x.ndim))) * count / max(count - 1, 1)
                )
                running_mean.lerp_(new_mean.to(running_mean.dtype), momentum)
                running_var.lerp_(new_var.to(running_var.dtype), momentum)
    else:
        normal = (x - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
    normal = normal if weight is None else normal * weight.view(shape)
    return (normal if bias is None else normal + bias.view(shape)).to(input.dtype)


def _of_torch(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.batch_norm` or `torch.instance_norm`, whose arguments are in another order, and one more."""

    def called(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, *more: Any, **named: Any,
    ) -> Tensor:  # fmt: skip
        named.pop("cudnn_enabled", None)
        return norm(input, running_mean, running_var, weight, bias, *more[:3], **named)

    return called


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """`torch.nn.functional.glu`, written out."""
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardsigmoid`, written out."""
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, without what torch does in Python for a weight and a bias that have no tangent.

    Returns:
        Value and tangent.
    """
    (x, t), constant = forward_ad.unpack_dual(input), not (_is_dual(weight) or _is_dual(bias))
    if t is None or not constant:
        return _linear(input, weight, bias)
    return make_dual(_linear(x, weight, bias), _linear(t, weight))


_linear = F.linear


def _with_constant(func: Callable[..., Tensor], shifts: bool = False) -> Callable[..., Tensor]:
    """Make what replaces an operation of two, for the same reason: one with a tangent and a constant behind it.

    Args:
        func: A product, a quotient, a sum or a difference.
        shifts: Whether the constant has no part in the tangent: a sum or a difference.

    Returns:
        What does the same.
    """

    def combined(input: Any, other: Any, **rest: Any) -> Tensor:
        x, t = forward_ad.unpack_dual(input) if isinstance(input, Tensor) else (input, None)
        if t is None or rest or _is_dual(other):
            return func(input, other, **rest)
        value = func(x, other)
        t = t if shifts else func(t, other)
        fits = t.shape == value.shape and t.dtype == value.dtype
        return make_dual(value, t) if fits else func(input, other)

    return combined


divided = _with_constant(torch.div)
"""`torch.div`."""


def detach(input: Tensor) -> Tensor:
    """`Tensor.detach`: no gradient, but the value moves with the noise all the same, and so has a tangent.

    The tangent is that of the function that is computed, not of the one that is differentiated; torch's own `detach`
    drops it.

    Returns:
        The value and the tangent, both without a graph.
    """
    x, t = forward_ad.unpack_dual(input)
    return _detach(x) if t is None else make_dual(_detach(x), _detach(t))


_detach = Tensor.detach


def _norm(func: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Make what replaces a vector norm: torch's formula for the sum of absolute values has no backward."""

    def norm(input: Tensor, order: Any = None, dim: Any = None, keepdim: bool = False, **rest: Any) -> Tensor:
        order = rest.pop(name, order)
        rest = {key: value for key, value in rest.items() if value is not None}
        if order == 1 and not rest and not isinstance(order, bool):
            dims = tuple(range(input.ndim)) if dim is None else dim
            return input.abs().sum(dims, keepdim=keepdim)
        options = {} if order is None else {name: order}
        return func(input, dim=dim, keepdim=keepdim, **options, **rest)

    return norm


def _refuse(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make what replaces a function that torch differentiates wrongly: constants go through, duals do not."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        problem, option = REFUSED[func]
        chosen = option is None or any(isinstance(leaf, str) and leaf == option for leaf in leaves)
        if chosen and any(_is_dual(leaf) for leaf in leaves):
            raise UnsupportedOperationError(
                f"The model calls {func.__name__}{f' with {option!r}' if option else ''}, whose forward-mode "
                f"derivative cannot be differentiated: in torch {problem}. Use estimator='antithetic' or "
                "'double_backward'."
            )
        return func(*args, **kwargs)

    return refused


def _is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


_WRONG = "its gradient is wrong, without an error", None
_NAN = "its gradient is nan", None
_FAILS = "its backward fails", None
_NO_GRADIENT = "its gradient is missing, without an error", "prod"  # of the reductions only this one

REFUSED: dict[Callable[..., Any], tuple[str, str | None]] = {
    **dict.fromkeys((torch.det, Tensor.det, torch.linalg.det), _WRONG),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _WRONG),
    **dict.fromkeys((torch.slogdet, Tensor.slogdet, torch.linalg.slogdet), _WRONG),
    **dict.fromkeys((torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve), _WRONG),
    **dict.fromkeys((torch.cholesky_inverse, Tensor.cholesky_inverse), _WRONG),
    **dict.fromkeys((torch.linalg.householder_product, torch.orgqr, Tensor.orgqr), _WRONG),
    **dict.fromkeys((torch.native_layer_norm, torch.native_batch_norm), _WRONG),
    torch.linalg.eigh: _NAN,  # eigvalsh is right
    **dict.fromkeys((torch.logcumsumexp, Tensor.logcumsumexp), _FAILS),
    **dict.fromkeys((torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_), _NO_GRADIENT),
}
"""What is wrong with each, and the option with which it is."""

REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax, *FUSED_SOFTMAX), softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax), log_softmax),
    **dict.fromkeys(FUSED_LOG_SOFTMAX, log_softmax),
    **dict.fromkeys((torch.logsumexp, torch.special.logsumexp, Tensor.logsumexp), logsumexp),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), layer_norm),
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    torch.batch_norm: _of_torch(batch_norm),
    torch.instance_norm: _of_torch(instance_norm),
    **dict.fromkeys((torch.detach, Tensor.detach, Tensor.data.__get__), detach),  # type: ignore[attr-defined]
    F.linear: linear,
    **{func: _with_constant(func) for func in (torch.mul, Tensor.mul, torch.div, Tensor.div)},
    **{func: _with_constant(func, shifts=True) for func in (torch.add, Tensor.add, torch.sub, Tensor.sub)},
    F.glu: glu,
    F.hardsigmoid: hardsigmoid,
    **{func: _norm(func, "p") for func in (torch.norm, Tensor.norm)},
    torch.linalg.vector_norm: _norm(torch.linalg.vector_norm, "ord"),
    **{func: _refuse(func) for func in REFUSED},
}
"""Functions whose forward-mode derivative torch lacks or has wrong, and what is called instead."""
