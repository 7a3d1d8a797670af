"""What penalty and noise are to be, and how they are estimated."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dropreg.checks import check_choice, check_step_size, is_number
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.estimators import AUTO, ESTIMATORS
from lightning_dropreg.estimators.curvature import CURVATURES

__all__ = [
    "AUTO_FRACTION",
    "Estimation",
    "NoiseSettings",
    "PenaltySettings",
    "check_curvature",
    "check_estimation",
    "check_fraction",
]

MASKS = ("as_model", "elementwise")
AUTO_FRACTION = 0.25
"""What ``batch_fraction="auto"`` is where fewer rows than all will do."""


@dataclass(frozen=True)
class Estimation:
    """How something is estimated. Penalty and noise with equal settings come from the same passes.

    Attributes:
        estimator: Name of the estimator.
        step_size: Step of the antithetic pair.
        mask: ``"as_model"`` or ``"elementwise"``.
        batch_fraction: Fraction of the batch's rows to estimate on, or None for all.
        batch_dim: Dimension along which the rows lie.
        low_memory: Whether only one graph of the antithetic pair is alive at a time.
        fraction_is_open: Whether the fraction is to be chosen with the first batch (``batch_fraction="auto"``); it is
            None until then.
    """

    estimator: str
    step_size: float
    mask: str
    batch_fraction: float | None
    batch_dim: int
    low_memory: bool = False
    fraction_is_open: bool = False

    @property
    def may_be_one_pass(self) -> bool:
        """Whether this may be estimated in the pass that gives the loss, with some rows in it twice."""
        return self.batch_fraction is not None and self.estimator == "antithetic" and not self.low_memory


@dataclass(frozen=True)
class PenaltySettings:
    """Explicit penalty: factor (1 is the second-order value), curvature, how often, and how it is estimated."""

    strength: float
    curvature: str
    every_n_steps: int
    estimation: Estimation


@dataclass(frozen=True)
class NoiseSettings:
    """Implicit noise: factor of its standard deviation, where it comes from and goes, and how it is estimated."""

    strength: float
    source: str
    injection: str
    estimation: Estimation


def check_curvature(curvature: str) -> None:
    """Refuse an unknown name."""
    check_choice("curvature", curvature, CURVATURES)


def check_estimation(estimator: str, step_size: float, mask: str) -> None:
    """Refuse unknown names and impossible steps."""
    check_choice("estimator", estimator, (AUTO, *ESTIMATORS))
    check_choice("mask", mask, MASKS)
    check_step_size(step_size)


def check_fraction(batch_fraction: float | str | None) -> float | None:
    """Refuse what is no fraction of a batch; None is the whole batch, and ``"auto"`` as long as nothing is chosen."""
    if batch_fraction is None or batch_fraction == AUTO:
        return None
    if is_number(batch_fraction) and 0 < float(batch_fraction) <= 1:
        return float(batch_fraction)
    raise InvalidArgumentError(f"batch_fraction={batch_fraction!r} must be None, 'auto' or a number in (0, 1].")
