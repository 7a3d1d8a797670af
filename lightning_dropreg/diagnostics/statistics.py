"""Confidence intervals of means, ratios and functions of a sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["Interval", "check_confidence", "jackknife_interval", "mean_interval", "student_quantile"]


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided confidence interval, symmetric about it.

    Attributes:
        value: The estimate.
        margin: Half the width of the interval; NaN where it is not known.
    """

    value: float
    margin: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.value - self.margin

    @property
    def high(self) -> float:
        """Upper end."""
        return self.value + self.margin

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside, so that the sign of the true value is known."""
        return abs(self.value) > self.margin


def mean_interval(samples: Tensor, confidence: float = 0.95) -> Interval:
    """Estimate a mean from independent samples, with Student's t interval.

    Args:
        samples: Shape ``(n,)``, ``n >= 2``.
        confidence: Probability that the interval covers the mean, in ``(0, 1)``; exact for normal samples.

    Returns:
        The interval.

    Example:
        >>> found = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> found.value, round(found.margin, 2)
        (2.5, 2.04)
    """
    samples = samples.double()
    error = samples.std().item() / math.sqrt(len(samples))
    return Interval(samples.mean().item(), student_quantile(confidence, len(samples) - 1) * error)


def jackknife_interval(function: Callable[[Tensor], Tensor], count: int, confidence: float = 0.95) -> Interval:
    """Estimate a smooth function of a sample, with an interval from leaving out one draw at a time.

    Args:
        function: Maps the numbers of the draws to use, shape ``(m,)``, to the estimate, a scalar.
        count: Number of draws, at least 3.
        confidence: See `mean_interval`.

    Returns:
        The interval.

    Example:
        The ratio of two means:

        >>> x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
        >>> jackknife_interval(lambda draws: x[draws].mean() / y[draws].mean(), 3)
        Interval(value=0.5, margin=0.0)
    """
    everything = torch.arange(count)
    without = torch.stack([function(everything[everything != j]).double() for j in everything])
    error = math.sqrt((count - 1) * float(without.var(correction=0)))
    return Interval(float(function(everything)), student_quantile(confidence, count - 1) * error)


def student_quantile(confidence: float, degrees: int) -> float:
    """Return ``t`` with ``P(|T| < t) = confidence`` for Student's distribution.

    Exact for one and two degrees of freedom (two and three samples); by the expansion of Cornish and Fisher about the
    normal quantile for more, where its error at 95 % is below 1 %.

    Args:
        confidence: In ``(0, 1)``.
        degrees: Degrees of freedom, at least 1.

    Returns:
        The quantile.

    Example:
        >>> round(student_quantile(0.95, 10), 3)
        2.228
    """
    if degrees == 1:
        return math.tan(math.pi * confidence / 2)
    if degrees == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z, n = NormalDist().inv_cdf((1 + confidence) / 2), degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def check_confidence(confidence: object) -> None:
    """Refuse what is no number in ``(0, 1)``."""
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        raise InvalidArgumentError(f"confidence={confidence!r} must be a number between 0 and 1, for example 0.95.")
