"""Perplexity of a model that gives the loss of each word."""

import math
from typing import Any

from torch import Tensor
from torchmetrics.aggregation import MeanMetric

__all__ = ["MeanPerplexity"]


class MeanPerplexity(MeanMetric):
    """``exp`` of the mean of the losses (natural logarithm, per word) that it was updated with; nan if one is nan.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> import torch
        >>> metric = MeanPerplexity()
        >>> metric.update(torch.tensor([2.0, 8.0]).log())
        >>> round(metric.compute().item(), 3)
        4.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nan_strategy=math.nan, **kwargs)  # puts nan for nan, where the default would leave it out

    def compute(self) -> Tensor:
        """Return the perplexity over everything since the last reset."""
        return super().compute().exp()
