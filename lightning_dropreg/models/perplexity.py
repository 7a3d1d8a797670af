"""Perplexity of a model that gives the loss of each word, not the logits of all of them."""

from torch import Tensor
from torchmetrics.aggregation import MeanMetric

__all__ = ["MeanPerplexity"]


class MeanPerplexity(MeanMetric):
    """``exp`` of the mean of the losses (natural logarithm, per word) that it was updated with.

    Example:
        >>> import torch
        >>> metric = MeanPerplexity()
        >>> metric.update(torch.tensor([2.0, 8.0]).log())
        >>> round(metric.compute().item(), 3)
        4.0
    """

    def compute(self) -> Tensor:
        """Return the perplexity over everything since the last reset."""
        return super().compute().exp()
