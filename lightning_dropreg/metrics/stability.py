"""``mu(W)`` and ``nu(W)`` of Theorem 4.1 over a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.checks import check_integer
from lightning_dropreg.metrics.functional import loss_hessian_size, loss_jacobian_size
from lightning_dropreg.metrics.plotted import PlottedMetric

__all__ = ["LossHessianSize", "LossJacobianSize"]


class _MeanOverExamples(PlottedMetric):
    """Mean of a function of logits and targets over all examples of all batches and processes."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("ignore_index", ignore_index)
        self.ignore_index = ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _mean(self, logits: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: ``(N, c)``.
            target: ``(N,)``.
        """
        value, count = self._mean(logits, target), (target != self.ignore_index).sum()
        if count:
            self.total = self.total + value * count
            self.count = self.count + count

    def compute(self) -> Tensor:
        """Return the mean over the examples so far; NaN if there were none."""
        return (self.total / self.count).to(torch.get_default_dtype())


class LossJacobianSize(_MeanOverExamples):
    """``mu(W)``, see `lightning_dropreg.metrics.functional.loss_jacobian_size`.

    Args:
        ignore_index: Target of examples that do not count.
        kwargs: Those of `torchmetrics.Metric`.

    Example:
        >>> metric = LossJacobianSize()
        >>> metric.update(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
        >>> round(metric.compute().item(), 4)
        0.7071
    """

    def _mean(self, logits: Tensor, target: Tensor) -> Tensor:
        return loss_jacobian_size(logits, target, self.ignore_index)


class LossHessianSize(_MeanOverExamples):
    """``nu(W)``, see `lightning_dropreg.metrics.functional.loss_hessian_size`.

    Args:
        ignore_index: Target of examples that do not count.
        kwargs: Those of `torchmetrics.Metric`.

    Example:
        >>> metric = LossHessianSize()
        >>> metric.update(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
        >>> metric.compute()
        tensor(0.5000)
    """

    def _mean(self, logits: Tensor, target: Tensor) -> Tensor:
        return loss_hessian_size(logits, target, self.ignore_index)
