"""Differences between two methods, seed by seed.

Two runs with the same seed share split, initial weights and the order of the rows, so their difference varies far
less than either does. The test rows of different seeds overlap: a standard error here speaks of splits, starts
and noise, not of other data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

__all__ = ["Difference", "Mean", "difference"]


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, with its standard error; None for one seed, which has no spread."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Take the mean of one value per seed."""
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def text(self, digits: int = 4, signed: bool = False) -> str:
        """``mean ± standard error``, or the mean alone."""
        sign = "+" if signed else ""
        shown = f"{self.mean:{sign}.{digits}f}"
        return shown if self.error is None else f"{shown} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Difference(Mean):
    """Of the first minus the second, seed by seed."""

    wins: int
    """Seeds on which the first is lower."""
    seeds: int

    @property
    def in_errors(self) -> float:
        """The difference in standard errors; nan for one seed, or without spread."""
        return self.mean / self.error if self.error else math.nan

    def row(self) -> str:
        """Three cells of a table: difference, in standard errors, wins."""
        errors = "" if math.isnan(self.in_errors) else f"{self.in_errors:+.1f}"
        return f"{self.text(signed=True)} | {errors} | {self.wins}/{self.seeds}"


def difference(first: Mapping[str, Any], second: Mapping[str, Any], value: str = "test") -> Difference:
    """Compare two records of the same seeds.

    Args:
        first: A record of `benchmarks.records.Records`.
        second: Another.
        value: What of them; lower counts as better.

    Returns:
        The difference, ``first - second``.

    Raises:
        ValueError: If their seeds differ.
    """
    if first["seeds"] != second["seeds"]:
        raise ValueError(f"not the same seeds: {first['seeds']} and {second['seeds']}")
    values = [a - b for a, b in zip(first[value], second[value], strict=True)]
    mean = Mean.of(values)
    return Difference(mean.mean, mean.error, sum(v < 0 for v in values), len(values))
