"""The terms of Theorem 4.1 over a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dropreg.checks import check_count
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.metrics.functional import (
    bound_terms,
    check_bound_arguments,
    check_linear,
    loss_hessian_size,
    loss_jacobian_size,
    norm_2_1,
)
from lightning_dropreg.metrics.plotted import PlottedMetric

__all__ = ["LinearModelBound"]


class LinearModelBound(PlottedMetric):
    """The data-dependent terms of the bound, see `lightning_dropreg.metrics.functional.linear_model_bound`.

    The weight must be the same in all batches (that of a trained model).

    Args:
        num_classes: Number of classes ``c``, at least 2.
        loss_bound: ``B``, at which the loss is truncated, above 0.
        delta: Probability of failure, in ``(0, 1)``.
        kwargs: Those of `torchmetrics.Metric`.

    Raises:
        InvalidArgumentError: If an argument is out of range.

    Example:
        >>> metric = LinearModelBound(num_classes=2)
        >>> metric.update(torch.randn(100, 3), torch.zeros(2, 3), torch.randint(2, (100,)))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items() if name in {"nu", "norm"}}
        {'nu': 0.5, 'norm': 0.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    jacobian: Tensor
    hessian: Tensor
    count: Tensor
    norm: Tensor
    largest: Tensor

    def __init__(self, num_classes: int, loss_bound: float = 10.0, delta: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_classes", num_classes, 2)
        check_bound_arguments(loss_bound, delta)
        self.num_classes = num_classes
        self.loss_bound = loss_bound
        self.delta = delta
        for name, how in (
            ("jacobian", "sum"),
            ("hessian", "sum"),
            ("count", "sum"),
            ("norm", "max"),
            ("largest", "max"),
        ):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx=how)

    def update(self, inputs: Tensor, weight: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            inputs: Examples ``x``, ``(N, d)``; for a bias, with a 1 appended.
            weight: ``W``, ``(c, d)``.
            target: Classes, ``(N,)``.

        Raises:
            InvalidArgumentError: If the shapes do not fit.
        """
        check_linear(inputs, weight)
        if len(weight) != self.num_classes:
            raise InvalidArgumentError(f"The weight has {len(weight)} classes, num_classes={self.num_classes}.")
        if not len(inputs):
            return
        logits = inputs @ weight.T
        self.jacobian = self.jacobian + loss_jacobian_size(logits, target) * len(inputs)
        self.hessian = self.hessian + loss_hessian_size(logits, target) * len(inputs)
        self.count = self.count + len(inputs)
        self.norm = torch.maximum(self.norm, norm_2_1(weight.detach().T).double())
        self.largest = torch.maximum(self.largest, inputs.norm(dim=1).max().double())

    def compute(self) -> dict[str, Tensor]:
        """Return the terms by name."""
        terms = bound_terms(
            n=self.count,
            classes=self.num_classes,
            mu=self.jacobian / self.count,
            nu=self.hessian / self.count,
            norm=self.norm,
            largest=self.largest,
            loss_bound=self.loss_bound,
            delta=self.delta,
        )
        return {name: value.to(torch.get_default_dtype()) for name, value in terms._asdict().items()}
