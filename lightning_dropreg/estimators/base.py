"""What every estimator takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_dropreg.passes import Closure

__all__ = ["AUTO", "Estimate", "Estimator", "inactive"]

AUTO = "auto"
"""The name of no estimator, but of leaving the choice to `lightning_dropreg.inspection.choice`."""


@dataclass(frozen=True)
class Estimate:
    """What an estimator found in one batch. All are scalars with an autograd graph.

    Attributes:
        loss: The loss without dropout (`antithetic`: up to ``O(step_size**2)``).
        penalty: The explicit penalty ``R``, or None if no curvature was asked for.
        noise: ``s = sum_i J_loss,i (eta_i * h_i)``, whose parameter gradient is ``xi_approx``, or None.
    """

    loss: Tensor
    penalty: Tensor | None
    noise: Tensor | None


def inactive(loss: Tensor, curvature: str | None, noise: bool) -> Estimate:
    """Return the loss of a pass whose dropouts all have probability 0, and zeros that can be differentiated."""
    # a zero of its own, not 0 * loss: that would be NaN where the loss overflows
    zero = loss.new_zeros(()).requires_grad_()
    return Estimate(loss=loss, penalty=None if curvature is None else zero, noise=zero if noise else None)


class Estimator(Protocol):
    """The signature of an estimator."""

    def __call__(
        self, closure: Closure, *, curvature: str | None, noise: bool, step_size: float, mask: str, key: int
    ) -> Estimate:
        """Estimate loss, penalty and noise of one batch.

        Args:
            closure: Runs forward and loss and returns the scalar loss.
            curvature: One of `lightning_dropreg.estimators.curvature.CURVATURES`, or None for no penalty.
            noise: Whether the noise is wanted.
            step_size: Step ``eps`` of finite differences; only `antithetic` uses it.
            mask: ``"as_model"`` or ``"elementwise"``, see `lightning_dropreg.passes.Directions`.
            key: Seed of the directions; all estimators draw the same ones from the same key.
        """
