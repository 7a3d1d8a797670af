"""One pass with forward-mode dual numbers: the directional derivatives without a step size."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.estimators.base import Estimate, inactive
from lightning_dropreg.estimators.curvature import FULL, differentiated_outputs, element_weights, quadratic_form
from lightning_dropreg.estimators.double_backward import directional_derivative
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.passes import Closure, Directions, Tangent, TappedTangent, run_pass

__all__ = ["forward"]


def forward(closure: Closure, *, curvature: str | None, noise: bool, step_size: float, mask: str, key: int) -> Estimate:
    """Estimate loss, penalty and noise from the tangents of outputs and loss.

    Each site's activation ``h`` carries the tangent ``h r``; the outputs' tangent is then ``u = sum_i J_i (h_i r_i)``
    and the loss's tangent the noise ``s``. With ``curvature="full"`` that is differentiated once more, backward, in the
    same direction. See `lightning_dropreg.estimators.base.Estimator` for the arguments.

    Returns:
        Loss, penalty and noise.

    Raises:
        UnsupportedOperationError: If an operation of the model has no forward-mode formula.
        RuntimeError: If the step raises it for other reasons.
    """
    directions = Directions(key, mask)
    rule = TappedTangent(directions) if curvature == FULL else Tangent(directions)
    with forward_ad.dual_level():
        try:
            done = run_pass(closure, rule, record_losses=curvature is not None and curvature != FULL)
        except RuntimeError as error:  # in torch.vmap it is a batching rule that lacks
            if not (isinstance(error, NotImplementedError) or "Batching rule" in str(error)):
                raise
            raise UnsupportedOperationError(
                f"The model has an operation without a forward-mode derivative, which estimator='forward' needs: "
                f"{_place(error)} ({str(error).splitlines()[0]}). Use estimator='antithetic', which needs only a "
                "backward."
            ) from error
        if not done.sites:
            return inactive(done.loss, curvature, noise)
        loss, slope = _split(done.loss)
        penalty = None
        if isinstance(rule, TappedTangent):
            penalty = directional_derivative(slope, rule) / 2
        elif curvature is not None:
            penalty = loss.new_zeros(())
            for recorded, weights in zip(done.losses, element_weights(done.loss, done.losses), strict=True):
                z, u = _split(differentiated_outputs(curvature, recorded))
                _, elements_slope = _split(recorded.elements)
                penalty = penalty + quadratic_form(
                    curvature, recorded, _wide(z), _wide(u), recorded.per_element(elements_slope), _split(weights)[0]
                ) / 2  # fmt: skip
    return Estimate(loss=loss, penalty=penalty, noise=slope if noise else None)


def _place(error: BaseException) -> str:
    """The innermost line of the user's code in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/lightning_dropreg/" not in f.filename]
    frame = (own or list(frames))[-1]
    return f"`{frame.line}` in {frame.filename.rsplit('/', 1)[-1]}, line {frame.lineno}"


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    """Primal and tangent, the latter zero for what no site acts on."""
    primal, tangent = forward_ad.unpack_dual(value)
    if tangent is None:
        return primal, torch.zeros_like(primal)
    return primal, tangent.to(primal.dtype)  # torch 2.6 makes some float64


def _wide(value: Tensor) -> Tensor:
    return value.to(noise_dtype(value.dtype))
