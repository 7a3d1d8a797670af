"""What few digits ask of an antithetic pair."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_dropreg.interception.sites import Site

__all__ = ["bfloat16_step_size"]

SEEN = 0.1  # a relative change of activations of which bfloat16 leaves penalty and noise two good digits


SEEN_TWICE = 0.3  # the same of a second difference, which divides rounding by the square of the step


def bfloat16_step_size(step_size: float, sites: Sequence[Site], second: bool = False) -> float:
    r"""Widen the step of an antithetic pair so that bfloat16 can see it.

    The pair multiplies activations by :math:`1 \pm \varepsilon \sqrt{c_i}`. Two outputs that differ by less than the
    8 bits of bfloat16 leave a slope of rounding errors, and its square in the penalty; that happens where all drop
    probabilities are small, just where a wider step does no harm, because its error falls as
    :math:`\varepsilon^2 c`. So the step is measured at the largest variance: the activations there change by a tenth,
    never by less.

    Args:
        step_size: The step asked for, from 1e-8 to 1.
        sites: The sites that the step reaches.
        second: Whether the second derivative of the loss is wanted (``curvature="full"``).

    Returns:
        The step, at least `step_size`, at most 1; given to this function again, the same.

    Example:
        >>> site = Site("", 0.1, (4,), (4,), "dropout")  # c = 1/9
        >>> round(bfloat16_step_size(0.1, [site]), 3)
        0.3
        >>> bfloat16_step_size(0.1, [Site("", 0.5, (4,), (4,), "dropout")])
        0.1
    """
    largest = max((site.variance for site in sites), default=1.0)
    seen = SEEN_TWICE if second else SEEN
    return min(1.0, max(step_size, seen / math.sqrt(largest)))
