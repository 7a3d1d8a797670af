"""What penalty and noise are to be, and how they are estimated."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Estimation", "NoiseSettings", "PenaltySettings"]


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
    """

    estimator: str
    step_size: float
    mask: str
    batch_fraction: float | None
    batch_dim: int
    low_memory: bool = False


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
