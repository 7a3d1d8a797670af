"""The explicit penalty exactly as it is trained with: with its estimator, step and mask, not in the limit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_choice
from lightning_dropreg.diagnostics.sampling import OnDraw, Probe, measure_draws
from lightning_dropreg.diagnostics.statistics import Interval, mean_interval
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.estimators.curvature import CURVATURES
from lightning_dropreg.passes import Closure
from lightning_dropreg.step.settings import check_estimation

__all__ = ["PenaltyReport", "measure_penalty"]


@dataclass(frozen=True)
class PenaltyReport:
    """The penalty of a configuration, on one batch.

    Attributes:
        samples: One value for each draw of directions, before `strength`, shape ``(draws,)``, float64, on the CPU.
        confidence: Probability with which the interval covers its value.
        strength: Factor with which it enters the loss.
        curvature: See `lightning_dropreg.functional.explicit_penalty`.
        estimator: See there.
        step_size: See there.
        mask: See there.
    """

    samples: Tensor
    confidence: float
    strength: float = 1.0
    curvature: str = "loss_hessian"
    estimator: str = "antithetic"
    step_size: float = 0.1
    mask: str = "as_model"

    def value(self) -> Interval:
        """The mean over directions: what the penalty is on average, before `strength`."""
        return mean_interval(self.samples, self.confidence)


def measure_penalty(
    closure: Closure,
    *,
    draws: int = 32,
    strength: float = 1.0,
    curvature: str = "loss_hessian",
    estimator: str = "antithetic",
    step_size: float = 0.1,
    mask: str = "as_model",
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
    reduce: Callable[[list[Tensor]], list[Tensor]] | None = None,
    on_draw: OnDraw | None = None,
) -> PenaltyReport:
    """Measure the explicit penalty on one batch as a training step would estimate it, several times.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        draws: Number of draws of directions, at least 4.
        strength: Factor with which the penalty enters the loss; noted in the report.
        curvature: See `lightning_dropreg.functional.explicit_penalty`.
        estimator: See there.
        step_size: See there.
        mask: See there.
        confidence: See `PenaltyReport`.
        generator: Source of the seed of the directions; the global one by default.
        module: A module whose state must not change.
        reduce: Averages tensors over processes, in a distributed run.
        on_draw: Called after every draw.

    Returns:
        The report.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.
        LossNotRecognizedError: If the curvature of the loss is unknown.
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.ones(100, 1)
        >>> closure = lambda: nn.functional.mse_loss(nn.functional.dropout(x, 0.5) * w, torch.zeros(100, 1))
        >>> round(measure_penalty(closure, draws=4).value().value, 3)
        4.0
    """
    check_choice("curvature", curvature, CURVATURES)
    check_estimation(estimator, step_size, mask)
    probe = measure_draws(
        lambda run: _PenaltyProbe(run, estimator, curvature=curvature, step_size=step_size, mask=mask),
        closure,
        draws=draws,
        confidence=confidence,
        generator=generator,
        module=module,
        on_draw=on_draw,
    )
    [samples] = [torch.stack(probe.samples)] if reduce is None else reduce([torch.stack(probe.samples)])
    return PenaltyReport(samples.cpu(), confidence, strength, curvature, estimator, step_size, mask)


class _PenaltyProbe(Probe):
    """Estimates the penalty once for every draw."""

    def __init__(self, closure: Closure, estimator: str, **options: Any) -> None:
        self.samples: list[Tensor] = []
        self._estimate = functools.partial(ESTIMATORS[estimator], closure, noise=False, **options)

    def draw(self, key: int) -> None:
        """See `lightning_dropreg.diagnostics.sampling.Probe`."""
        penalty = self._estimate(key=key).penalty
        assert penalty is not None
        self.samples.append(penalty.detach().double())
