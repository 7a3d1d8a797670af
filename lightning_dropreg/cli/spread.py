"""Mean and spread over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["Spread", "in_digits"]


@dataclass
class Spread:
    """Mean and standard deviation over seeds; the latter is None for one seed."""

    mean: float
    deviation: float | None
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Summarize `values`, those that are no number left out; None if there is none."""
        numbers = [v for v in values if math.isfinite(v)]
        if not numbers:
            return None
        return cls(mean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)

    def __str__(self) -> str:
        """``mean ± deviation``."""
        return in_digits(self.mean, self.deviation)


def in_digits(value: float, uncertainty: float | None = None, sign: str = "") -> str:
    """Write a number with the digits that mean something: two of its uncertainty, else four.

    Args:
        value: The number.
        uncertainty: Its standard deviation or error; None if it is not known.
        sign: ``"+"`` for a difference.

    Returns:
        For example ``"0.6712 ± 0.0034"``.

    Example:
        >>> in_digits(0.67123, 0.0034), in_digits(45.188, 0.4712), in_digits(0.67123), in_digits(-0.01, 0.0041, "+")
        ('0.6712 ± 0.0034', '45.19 ± 0.47', '0.6712', '-0.0100 ± 0.0041')
        >>> in_digits(1.0, 0.0), in_digits(812.4, 31.0), in_digits(269.1)
        ('1 ± 0', '812 ± 31', '269.1')
    """
    if not uncertainty or not math.isfinite(uncertainty):
        return f"{value:{sign}.4g}" + ("" if uncertainty is None else f" ± {uncertainty:g}")
    places = max(0, 1 - math.floor(math.log10(uncertainty)))
    return f"{value:{sign}.{places}f} ± {uncertainty:.{places}f}"
