"""Whether a loss is a weighted sum of recorded elements is seen in its graph, on the short way too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dropreg.errors import LossNotRecognizedError
from lightning_dropreg.estimators.antithetic import antithetic


def test_a_denominator_that_depends_on_dropout_is_refused():
    """The mean of a weighted loss divides by the sum of the weights; here these are computed with dropout."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4)).double()
    weigh = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.4)).double()
    x, y = torch.randn(16, 3).double(), torch.randn(16, 4).double()

    def closure(weights):
        return F.mse_loss(net(x), y, weight=weights().expand(16, 4))

    how = dict(curvature="loss_hessian", noise=False, step_size=0.01, mask="as_model", key=0)
    with pytest.raises(LossNotRecognizedError):
        antithetic(lambda: closure(lambda: weigh(x).exp()), **how)
    assert antithetic(lambda: closure(lambda: x.new_ones(16, 1)), **how).penalty > 0
