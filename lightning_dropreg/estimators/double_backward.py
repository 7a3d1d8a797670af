"""The paper's way: the gradient of a random function of the outputs in every hidden layer, differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.estimators.base import Estimate, inactive
from lightning_dropreg.estimators.curvature import FULL, differentiated_outputs, element_weights, factor
from lightning_dropreg.numerics.graph import nodes_behind
from lightning_dropreg.numerics.noise import KeyedGenerators, fold_key
from lightning_dropreg.passes import Closure, Directions, Pass, Tap, TappedTangent, run_pass

__all__ = ["double_backward"]


def double_backward(
    closure: Closure, *, curvature: str | None, noise: bool, step_size: float, mask: str, key: int
) -> Estimate:
    """Estimate penalty and noise by back-propagating to the dropout sites with ``create_graph=True``.

    With random ``v`` such that ``E[v v^T] = w H`` (see `lightning_dropreg.estimators.curvature.factor`),
    ``1/2 sum_i c_i || (J_i^T v) * h_i ||^2`` is an unbiased estimate of the penalty (4.4). The noise needs no estimate:
    its scalar is ``sum_i <dL/dt_i, r_i>`` with ``t_i`` the relative change of ``h_i``. The loss is exact.

    With ``curvature="full"`` the noise's scalar is differentiated once more in the direction: ``1/2 r^T (d2L/dt2) r``.

    See `lightning_dropreg.estimators.base.Estimator` for the arguments.

    Returns:
        Loss, penalty and noise.
    """
    full = curvature == FULL
    tap = Tap(Directions(key, mask), draw=noise or full, thrice=full)
    done = run_pass(closure, tap, record_losses=curvature is not None and not full)
    if not done.sites:
        return inactive(done.loss, curvature, noise)
    if full:
        slope = directional_derivative(done.loss, tap)
        return Estimate(done.loss, directional_derivative(slope, tap) / 2, slope if noise else None)
    return Estimate(
        loss=done.loss,
        penalty=None if curvature is None else _penalty(curvature, done, tap, key),
        noise=directional_derivative(done.loss, tap) if noise else None,
    )


def _penalty(curvature: str, done: Pass, tap: Tap, key: int) -> Tensor:
    generators = KeyedGenerators(fold_key(key, 1))  # not the stream of the directions
    vectors = [
        factor(curvature, loss, weights, generators.on(loss.outputs.device))
        for loss, weights in zip(done.losses, element_weights(done.loss, done.losses), strict=True)
    ]
    outputs = [differentiated_outputs(curvature, loss) for loss in done.losses]
    vectors = [v.to(z.dtype) for v, z in zip(vectors, outputs, strict=True)]
    gradients = tap_gradients(outputs, tap, vectors)
    penalty = done.loss.new_zeros(())
    for site, gradient in zip(tap.sites, gradients, strict=True):
        penalty = penalty + site.variance / 2 * gradient.square().sum()
    return penalty


def directional_derivative(value: Tensor, tap: Tap | TappedTangent) -> Tensor:
    """Differentiate a scalar in the taps, along the directions that `tap` drew; of a loss that is the noise."""
    slope = value.new_zeros(()).requires_grad_()  # a graph also where nothing depends on the taps
    if not value.requires_grad:
        return slope
    for gradient, direction in zip(tap_gradients([value], tap, None), tap.draws, strict=True):
        slope = slope + (gradient * direction).sum()
    return slope


def tap_gradients(values: Sequence[Tensor], tap: Tap | TappedTangent, vectors: Sequence[Tensor] | None) -> list[Tensor]:
    """Differentiate `values` (times `vectors`) in the taps, keeping the graph."""
    gradients = torch.autograd.grad(
        list(values), tap.taps, None if vectors is None else list(vectors), create_graph=True, allow_unused=True
    )
    filled = [
        torch.zeros_like(t) if gradient is None else gradient for gradient, t in zip(gradients, tap.taps, strict=True)
    ]
    check_twice_differentiable(filled, values)
    return filled


def check_twice_differentiable(gradients: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Refuse gradients that would raise when they are differentiated, from deep inside the user's backward.

    Args:
        gradients: What was found with ``create_graph=True``.
        values: What was differentiated.

    Raises:
        UnsupportedOperationError: If an operation on the way from `values` cannot be differentiated twice.
    """
    if not any(node.name().rpartition("::")[2] in _UNDIFFERENTIABLE for node in nodes_behind(*gradients)):
        return
    reason = "it has no second derivative"
    try:
        inputs = [node.variable for node in nodes_behind(*values) if hasattr(node, "variable")]
        torch.autograd.grad([g.sum() for g in gradients if g.requires_grad], inputs, allow_unused=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    kind = torch.autograd.function.BackwardCFunction
    custom = {type(node).__name__ for node in nodes_behind(*values) if isinstance(node, kind)}
    also = f" Custom autograd functions in the model: {', '.join(sorted(custom))}." if custom else ""
    raise UnsupportedOperationError(
        f"The model has an operation that cannot be differentiated twice, which this estimator needs: {reason}.{also} "
        "Use estimator='antithetic', which needs only one backward. (Attention: torch.nn.attention.sdpa_kernel("
        "SDPBackend.MATH) around the forward has a double backward; so have RNNs with cuDNN switched off.)"
    )


_UNDIFFERENTIABLE = {
    "NotImplemented",
    "WarnNotImplemented",
    "Error",
    # these say so only when they are run
    "CdistBackwardBackward0",
    "PdistBackwardBackward0",
    "EmbeddingBagBackwardBackward0",
}
