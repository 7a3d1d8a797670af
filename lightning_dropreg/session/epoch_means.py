"""Means over an epoch, for a tensor addition per step and value; Lightning's own cost a call of ``log`` each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["EpochMeans"]


class EpochMeans:
    """Sums up values until they are taken.

    Args:
        names: What to sum up; other values are ignored.

    Example:
        >>> means = EpochMeans(["loss", "explicit_penalty"])
        >>> for loss in (1.0, 2.0):
        ...     means.add({"loss": torch.tensor(loss)})
        >>> means.take()
        {'loss': tensor(1.5000), 'explicit_penalty': tensor(nan)}
        >>> means.take()
        {}
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the values of one step.

        Args:
            values: Scalars by name, without graphs.
        """
        for name in self._names:
            if name in values:
                total, count = self._sums.get(name, (None, 0))
                self._sums[name] = values[name] if total is None else total + values[name], count + 1

    def take(self) -> dict[str, Tensor]:
        """Return the means and start again; nan where there was no value, and nothing where there was none at all."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        return {n: sums[n][0] / sums[n][1] if n in sums else torch.tensor(torch.nan) for n in self._names}
