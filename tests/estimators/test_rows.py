"""Noise on some rows of a batch: its covariance, by enumeration of the rows and of the signs."""

from itertools import combinations, product

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import make_trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import UnsupportedSiteError
from lightning_dropreg.nn import WeightDrop
from lightning_dropreg.passes import Directions, Tap, run_pass

N, M, P = 4, 2, 0.3
C = P / (1 - P)


def jacobian(net, x, y):
    """Derivatives of all gradients in the noise of the only site, ``(parameters, entries of the mask)``."""
    rule = Tap(Directions(0))
    loss = run_pass(lambda: F.cross_entropy(net(x), y), rule).loss
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), create_graph=True)])
    return torch.stack([_in_noise(g, rule.taps[0]) for g in gradient])


def _in_noise(g, tap):
    (derivative,) = torch.autograd.grad(g, tap, retain_graph=True, allow_unused=True)
    return torch.zeros(tap.numel()) if derivative is None else derivative.flatten()


def covariance(b):
    """Mean of ``(B r) (B r)^T`` over all signs ``r = ±sqrt(c)``."""
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=b.shape[1])))
    noise = signs * C**0.5 @ b.T
    return noise.T @ noise / len(signs)


def batch():
    torch.set_default_dtype(torch.float64)
    return torch.randn(N, 2), torch.randint(2, (N,))


def of_some_rows(net, x, y):
    """Mean covariance over all sets of M rows."""
    chosen = [list(rows) for rows in combinations(range(N), M)]
    return torch.stack([covariance(jacobian(net, x[rows], y[rows])) for rows in chosen]).mean(0)


def test_masks_of_their_own_are_exact_when_scaled():
    x, y = batch()
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout(P), nn.Linear(2, 2))
    torch.testing.assert_close(M / N * of_some_rows(net, x, y), covariance(jacobian(net, x, y)))


def test_a_shared_mask_has_too_much_covariance_by_no_single_factor():
    x, y = batch()
    net = nn.Sequential(WeightDrop(nn.Linear(2, 2), "weight", P), nn.Tanh(), nn.Linear(2, 2))
    whole, some = covariance(jacobian(net, x, y)), of_some_rows(net, x, y)
    of_rows = torch.stack([jacobian(net, x[[b]], y[[b]]) for b in range(N)])
    away = of_rows - of_rows.mean(0)
    excess = (1 - M / N) / M * C / (N - 1) * (away @ away.mT).sum(0)
    torch.testing.assert_close(some, whole + excess)
    factors = (some.diagonal() / whole.diagonal())[whole.diagonal() > 1e-12]
    assert factors.max() > 1.5 * factors.min()


class Positions(nn.Module):
    """Adds what is the same for all rows, its mask shared or not."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.position, self.out = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x):
        added = self.position.expand(len(x), 3)
        return self.out(x + dr.drop(added, P, (1, 3) if self.shared else None))


@pytest.mark.parametrize(("shared", "mask"), [(True, "elementwise"), (False, "as_model")])
def test_noise_of_some_rows_is_taken_where_rows_differ(shared, mask):
    fit(Positions(shared), mask)


def test_noise_of_some_rows_is_refused_where_rows_share_it():
    with pytest.raises(UnsupportedSiteError, match=r"share the noise of net.*batch_fraction=None"):
        fit(Positions(shared=True), "as_model")
    with pytest.raises(UnsupportedSiteError, match=r"share the noise of net.0.*batch_fraction=None"):
        fit(nn.Sequential(WeightDrop(nn.Linear(3, 2), "weight", P)), "elementwise")


def fit(net, mask):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = DataLoader([(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))], batch_size=None)
    make_trainer([dr.ImplicitNoise(batch_fraction=0.5, mask=mask)]).fit(Module(), loader)
