"""Metrics are drawn and updated as those of torchmetrics are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MetricCollection

from lightning_dropreg.metrics import (
    LinearModelBound,
    LossHessianSize,
    LossJacobianSize,
    MeanExplicitPenalty,
    NoiseScale,
)

pytest.importorskip("matplotlib").use("agg")


def of_dropout():
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)), torch.randn(6, 3)
    return lambda: F.cross_entropy(net(x), torch.ones(6, dtype=torch.long)), net, 6


def of_logits():
    return torch.randn(4, 2), torch.ones(4, dtype=torch.long)


METRICS = [
    (LinearModelBound(num_classes=2), lambda: (torch.randn(6, 3), torch.ones(2, 3), torch.ones(6, dtype=torch.long))),
    (LossHessianSize(), of_logits),
    (LossJacobianSize(), of_logits),
    (MeanExplicitPenalty(), of_dropout),
    (NoiseScale(), of_dropout),
]


@pytest.mark.parametrize(("metric", "batch"), METRICS, ids=lambda each: type(each).__name__)
def test_a_metric_draws_its_value_and_several(metric, batch):
    values = [metric(*batch()) for _ in range(2)]
    _, axes = metric.plot()
    assert axes is not None
    assert metric.plot(values)[1] is not None


def test_one_call_updates_both_effects():
    both = MetricCollection([MeanExplicitPenalty(), NoiseScale()])
    both.update(*of_dropout())
    assert both.compute().keys() == {"MeanExplicitPenalty", "NoiseScale"}
