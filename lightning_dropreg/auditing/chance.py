"""How probable it is that chance alone looks like a fault."""

from __future__ import annotations

import math

import torch

__all__ = ["binomial_tail", "log_agreement", "percent", "power_of_ten"]

_EXACT = 1 << 20  # up to so many trials all terms are summed


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """Bound the probability that a binomial count deviates from its mean as far as the one seen, to either side.

    Twice the exact tail up to a million trials; beyond, twice Chernoff's bound ``exp(-n KL)``, which is never below
    the exact one.

    Args:
        successes: The count seen.
        trials: Number of trials.
        probability: Probability of a success, in ``[0, 1]``.

    Returns:
        The probability, at most 1.

    Example:
        >>> round(binomial_tail(0, 10, 0.5), 6)  # 2 / 2^10
        0.001953
        >>> binomial_tail(5, 10, 0.5)
        1.0
    """
    if trials == 0:
        return 1.0
    if probability in {0.0, 1.0}:
        return float(successes == trials * probability)
    rate = successes / trials
    if trials > _EXACT:
        divergence = _term(rate, probability) + _term(1 - rate, 1 - probability)
        return min(1.0, 2 * math.exp(-trials * divergence))
    tail = range(successes + 1) if rate < probability else range(successes, trials + 1)
    k = torch.arange(tail.start, tail.stop, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    logs = choose + k * math.log(probability) + (n - k) * math.log1p(-probability)
    return min(1.0, 2 * math.exp(min(float(torch.logsumexp(logs, 0)), 0.0)))


def _term(a: float, b: float) -> float:
    return a * math.log(a / b) if a > 0 else 0.0


def log_agreement(p: float, entries: int) -> float:
    """Return the log of the probability that two independent masks agree in so many entries."""
    return entries * math.log(p**2 + (1 - p) ** 2)


def power_of_ten(log: float) -> str:
    """Write the probability with this natural logarithm for people to read.

    Returns:
        A number of two digits, or a power of ten not below it.

    Example:
        >>> power_of_ten(math.log(0.02)), power_of_ten(-1000.0), power_of_ten(-math.inf)
        ('0.02', '1e-434', '0')
    """
    if log > math.log(1e-3):
        return f"{math.exp(log):.2g}"
    return "0" if log == -math.inf else f"1e{math.ceil(log / math.log(10))}"


def percent(share: float) -> str:
    """Write a share in per cent."""
    return f"{100 * share:.3g} %"
