"""Weights of the whole batch for passes over some of its rows, by enumeration: unbiased penalty, exact covariance."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dropreg.errors import UnsupportedRowsError
from lightning_dropreg.estimators import exact
from lightning_dropreg.estimators.counts import Counting, Counts, Rows
from lightning_dropreg.inspection.rows import measure_rows
from lightning_dropreg.passes import Directions, Off, Tap, run_pass
from lightning_dropreg.passes.run import recounted

N, M, T, P = 4, 2, 3, 0.3
CLASSES = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)


def labels():
    """One, three, no and two of the tokens of a row have a label."""
    y = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 0, 1]])
    return y.masked_fill(torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool(), -100)


def masked(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.clamp_min(0).flatten(), reduction="none").view(y.shape), y >= 0


def of_one_row(z, y):
    """The others have no target: a mean over two outputs, which count 1 in passes over half of all, as in a sum."""
    z, mask = z.mean(1)[:, :2], (y >= 0).all(1, keepdim=True)
    return (F.mse_loss(z, torch.ones_like(z), reduction="none") * mask).sum() / 2


def packed(z, y):
    return F.cross_entropy(z[y >= 0], y[y >= 0])


def by_hand(z, y):
    elements, mask = masked(z, y)
    return (elements * mask).sum() / mask.sum()


def by_hand_with_weights(z, y):
    elements, mask = masked(z, y)
    weights = mask / (1 + y.clamp_min(0))
    return (elements * weights).sum() / weights.sum()


COUNTED_LOSSES = {
    "ignore_index": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "classes": lambda z, y: F.cross_entropy(z.transpose(1, 2), y, weight=CLASSES, label_smoothing=0.1),
    "time first": lambda z, y: F.cross_entropy(z.transpose(0, 1).flatten(0, 1), y.T.flatten()),
    "only labelled tokens": packed,
    "sum": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"),
    "sum over a given number": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / 7,
    "mask by hand": by_hand,
    "weights by hand": by_hand_with_weights,
    "time first, by hand": lambda z, y: by_hand_with_weights(z.transpose(0, 1), y.T),
    "rows without a target": of_one_row,
    "two": lambda z, y: packed(z, y) + 0.3 * F.mse_loss(z.mean(1), torch.ones(len(z), 3, dtype=z.dtype)),
}


def problem(loss):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(P), nn.Linear(3, 3))
    x, y = torch.randn(N, T, 2), labels()

    def on(rows):
        return lambda: COUNTED_LOSSES[loss](net(x[rows]), y[rows])

    return net, on


def found_in(on):
    whole, rows = on(torch.arange(N)), Rows(torch.tensor([0, 1]), N)
    found = measure_rows(whole, on, rows, noise=True)
    assert found.problem is None, found.problem
    counts = Counts()
    with recounted(counts.note):
        run_pass(whole, Off())
    return counts, found.counting


@pytest.mark.parametrize("curvature", ["loss_hessian", "identity", "loss_jacobian"])
@pytest.mark.parametrize("loss", COUNTED_LOSSES)
def test_the_mean_penalty_over_all_sets_of_rows_is_that_of_the_batch(loss, curvature):
    _, on = problem(loss)
    counts, counting = found_in(on)
    options = dict(curvature=curvature, noise=False, step_size=0.1, mask="as_model", key=0)
    found = []
    for chosen in map(list, combinations(range(N), M)):
        with recounted(counts.on(Rows(torch.tensor(chosen), N), counting)):
            found.append(exact(on(torch.tensor(chosen)), **options).penalty)
    assert all(torch.isfinite(value) for value in found)
    torch.testing.assert_close(torch.stack(found).mean(0), exact(on(torch.arange(N)), **options).penalty)


@pytest.mark.parametrize("loss", COUNTED_LOSSES)
def test_the_mean_covariance_of_the_scaled_noise_is_that_of_the_batch(loss):
    net, on = problem(loss)
    counts, counting = found_in(on)
    found = []
    for chosen in map(list, combinations(range(N), M)):
        with recounted(counts.on(Rows(torch.tensor(chosen), N), counting)):
            found.append(M / N * covariance(net, on(torch.tensor(chosen))))
    torch.testing.assert_close(torch.stack(found).mean(0), covariance(net, on(torch.arange(N))))


def covariance(net, closure):
    """``c B B^T`` with the derivatives B of all gradients in the noise of the only site."""
    rule = Tap(Directions(0))
    loss = run_pass(closure, rule).loss
    gradient = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    b = torch.stack([in_noise(entry, rule.taps[0]) for entry in torch.cat([g.flatten() for g in gradient])])
    return P / (1 - P) * b @ b.T


def in_noise(entry, tap):
    if not entry.requires_grad:
        return torch.zeros(tap.numel())
    (derivative,) = torch.autograd.grad(entry, tap, retain_graph=True, allow_unused=True)
    return torch.zeros(tap.numel()) if derivative is None else derivative.flatten()


def test_a_trained_weight_has_its_gradient():
    """Uncertainty weighting: the penalty of the rows moves the weight as that of the batch does, on average."""
    _, on = problem("mask by hand")
    log_weight = torch.tensor(0.3, requires_grad=True)

    def weighted(rows):
        return lambda: log_weight.exp() * on(rows)()

    counts, counting = found_in(weighted)
    options = dict(curvature="loss_hessian", noise=False, step_size=0.1, mask="as_model", key=0)
    found = []
    for chosen in map(list, combinations(range(N), M)):
        with recounted(counts.on(Rows(torch.tensor(chosen), N), counting)):
            penalty = exact(weighted(torch.tensor(chosen)), **options).penalty
        found.append(torch.autograd.grad(penalty, log_weight)[0])
    whole = exact(weighted(torch.arange(N)), **options).penalty
    torch.testing.assert_close(torch.stack(found).mean(0), torch.autograd.grad(whole, log_weight)[0])


def test_other_losses_on_some_rows_are_refused():
    _, on = problem("ignore_index")
    counts, _ = found_in(on)
    closure = lambda: on(torch.tensor([0, 1]))() + F.mse_loss(*2 * [torch.ones(1, requires_grad=True) * 2.0])
    with (
        pytest.raises(UnsupportedRowsError, match="the losses cross_entropy on the whole batch"),
        recounted(counts.on(Rows(torch.tensor([0, 1]), N), Counting(("mean",)))),
    ):
        run_pass(closure, Off())


def test_elements_that_count_differently_and_belong_to_nobody_are_refused():
    """Only the labelled tokens, with weights of the batch: their number says nothing of their rows."""
    COUNTED_LOSSES["odd"] = lambda z, y: (
        F.cross_entropy(z[y >= 0], y[y >= 0], reduction="none") * (1 + y[y >= 0])
    ).mean()
    _, on = problem("odd")
    found = measure_rows(on(torch.arange(N)), on, Rows(torch.tensor([0, 1]), N), noise=False)
    with pytest.raises(UnsupportedRowsError, match="which belong to which row"):
        raise found.problem
    del COUNTED_LOSSES["odd"]
