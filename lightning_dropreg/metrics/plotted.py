"""What the metrics have in common with those of torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

__all__ = ["PlottedMetric"]


class PlottedMetric(Metric):
    """A metric whose value, or several of them in their order, can be drawn."""

    def plot(self, val: Tensor | Sequence[Tensor] | dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw a value, or several in their order.

        Args:
            val: What `compute` or `forward` returned, or a list of that; the present value if None.
            ax: Axes of matplotlib to draw into; new ones if None.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed (the extra `plot`).
        """
        return self._plot(val, ax)
