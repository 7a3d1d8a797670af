"""Mean and standard deviation over seeds, and how far apart two of them are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["Spread"]


@dataclass
class Spread:
    """Mean and standard deviation over seeds; the latter is None for one seed."""

    mean: float
    deviation: float | None
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Summarize `values`, those that are no number left out.

        Args:
            values: One for every seed.

        Returns:
            The spread; None if there is no number.
        """
        numbers = [v for v in values if math.isfinite(v)]
        if not numbers:
            return None
        return cls(mean(numbers), stdev(numbers) if len(numbers) > 1 else None, len(numbers))

    def distance_from(self, reference: "Spread") -> float:
        """Return the difference of the means in pooled standard deviations, ``(mean - reference.mean) / sd``.

        Args:
            reference: What to compare with.

        Returns:
            The distance; nan if neither has more than one seed, or there is neither difference nor spread.

        Example:
            >>> Spread.of([5.0, 7.0]).distance_from(Spread.of([2.0, 4.0]))  # sd: the square root of 2
            2.1213203435596424
        """
        squares = sum((s.count - 1) * s.deviation**2 for s in (self, reference) if s.deviation is not None)
        freedom = self.count + reference.count - 2
        difference = self.mean - reference.mean
        if freedom == 0 or difference == squares == 0:
            return math.nan
        return math.copysign(math.inf, difference) if squares == 0 else difference / math.sqrt(squares / freedom)

    def __str__(self) -> str:
        """``mean ± deviation``."""
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"
