"""The metrics against automatic differentiation, and over two gloo processes against one."""

import math
import os

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer
from ranks import run_on_two_ranks
from torch import nn

from lightning_dropreg import errors
from lightning_dropreg.functional import explicit_penalty, implicit_noise, plain_loss
from lightning_dropreg.metrics import (
    LinearModelBound,
    LossHessianSize,
    LossJacobianSize,
    MeanExplicitPenalty,
    NoiseScale,
    functional,
)
from lightning_dropreg.numerics.noise import fold_key


def example(n=12):
    g = torch.Generator().manual_seed(5)
    return (
        torch.randn(n, 4, generator=g, dtype=torch.float64),
        torch.randint(3, (n,), generator=g),
        torch.randn(3, 4, generator=g, dtype=torch.float64),
    )


def test_sizes_are_those_of_the_derivatives():
    x, y, w = example()
    jacobians, traces = [], []
    for z, target in zip(x @ w.T, y):
        loss = lambda z, target=target: F.cross_entropy(z, target)
        jacobians.append(torch.autograd.functional.jacobian(loss, z).norm())
        traces.append(torch.autograd.functional.hessian(loss, z).trace())
    mu, nu = torch.stack(jacobians).mean(), torch.stack(traces).mean()
    z = x @ w.T
    torch.testing.assert_close(functional.loss_jacobian_size(z, y), mu)
    torch.testing.assert_close(functional.loss_hessian_size(z, y), nu)
    ignored = torch.cat([y[:6], torch.full((6,), -100)])
    torch.testing.assert_close(functional.loss_jacobian_size(z, ignored), torch.stack(jacobians[:6]).mean())
    torch.testing.assert_close(functional.loss_hessian_size(z, ignored), torch.stack(traces[:6]).mean())
    for metric, value in ((LossJacobianSize(), mu), (LossHessianSize(), nu)):
        for rows in (slice(0, 7), slice(7, 12)):
            metric.update(z[rows], y[rows])
        torch.testing.assert_close(metric.compute().double(), value, rtol=1e-6, atol=0)
    with pytest.raises(errors.InvalidArgumentError, match="logits"):
        functional.loss_jacobian_size(z, z)


def test_bound_by_hand():
    x, y, w = example()
    n, c, b, delta = 12, 3, 4.0, 0.1
    z = x @ w.T
    mu, nu = functional.loss_jacobian_size(z, y).item(), functional.loss_hessian_size(z, y).item()
    a = sum(math.sqrt(sum(v**2 for v in row)) for row in w.tolist())  # columns of W^T
    theta = math.log(n * c) ** 3 * max(sum(v**2 for v in row) for row in x.tolist())
    expected = {
        "mu": mu,
        "nu": nu,
        "norm": a,
        "theta": theta,
        "jacobian": (a * mu) ** (2 / 3) * (theta * b) ** (1 / 3) / n ** (1 / 3),
        "hessian": a * math.sqrt(b * nu * theta) / math.sqrt(n),
        "norms": b * a**2 * theta / (n * (math.log(b * a**2 * theta / (nu * n)) ** 2 + 1)),
        "zeta": b * (math.log(1 / delta) + math.log(math.log(n))) / n,
    }
    terms = functional.linear_model_bound(x, w, y, loss_bound=b, delta=delta)._asdict()
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-6)
    metric = LinearModelBound(3, b, delta)
    for rows in (slice(0, 7), slice(7, 12)):
        metric.update(x[rows], w, y[rows])
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-6)


def test_units_of_the_bound():
    """Logits in other units: x smaller and W larger by the same factor leave loss and bound alone."""
    x, y, w = example()
    one, other = functional.linear_model_bound(x, w, y), functional.linear_model_bound(x / 7, 7 * w, y)
    for name in ("jacobian", "hessian", "norms", "zeta"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    confident = functional.linear_model_bound(x, 1000 * w, (x @ w.T).argmax(1))  # no Hessian, no infinity
    assert all(torch.isfinite(value) for value in confident)


def test_the_third_term_does_not_grow_with_weights_that_separate_the_classes():
    """The remark after Theorem 4.1: with aligned weights it is O(B log^3(nc) / n), here with the constant c^2."""
    x, y = torch.eye(3, dtype=torch.float64).repeat(20, 1), torch.arange(3).repeat(20)
    limit = 3**2 * 10.0 * math.log(60 * 3) ** 3 / 60
    small, large = (functional.linear_model_bound(x, t * torch.eye(3, dtype=torch.float64), y) for t in (150.0, 600.0))
    assert large.norm == 4 * small.norm
    assert 0.7 * limit < small.norms < large.norms < limit
    assert large.hessian < small.hessian < 1e-25


def small_model():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)).double()
    net(torch.randn(20, 4, dtype=torch.float64))  # statistics
    return net.eval()


def test_effects_of_a_batch():
    """The penalty is the exact one; the trace of the noise is the sum over all sign patterns of a single example."""
    net = small_model()
    x, y, _ = example(1)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    closure = lambda: F.cross_entropy(net(x), y)
    random = torch.get_rng_state()
    found = functional.dropout_effects(closure, net, draws=300, step_size=1e-3)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module.training for module in net.modules())
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    net[3].train()
    penalty = explicit_penalty(closure, estimator="exact")
    parameters = list(net.parameters())
    norms = []
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 5):
        factors = torch.ones(5, dtype=torch.float64, requires_grad=True)
        z = net[4](net[2](net[1](net[0](x))) * factors)
        (slope,) = torch.autograd.grad(F.cross_entropy(z, y), factors, create_graph=True)
        xi = torch.autograd.grad((slope * signs * math.sqrt(0.3 / 0.7)).sum(), parameters, allow_unused=True)
        norms.append(sum(g.square().sum() for g in xi if g is not None))
    norms = torch.stack(norms)
    for value, exact, std in ((found.noise, norms.mean(), norms.std()), (found.explicit_penalty, penalty, penalty)):
        assert (value - exact).abs() < 4.5 * std / math.sqrt(300)  # error below 1e-5
    gradient = torch.autograd.grad(plain_loss(closure), parameters)
    torch.testing.assert_close(found.gradient, sum(g.square().sum() for g in gradient))


def test_metrics_of_effects():
    net = small_model()
    closures = [lambda x=x, y=y: F.cross_entropy(net(x), y) for x, y in make_loader()]
    penalty, ratio, size = MeanExplicitPenalty(seed=3), NoiseScale(seed=3), NoiseScale(relative=False, seed=3)
    for position, closure in enumerate(closures):
        penalty.update(closure, net, examples=position + 1)
        ratio.update(closure, net)
        size.update(closure, net)
    each = [functional.dropout_effects(c, net, key=fold_key(3, 0, i + 1)) for i, c in enumerate(closures)]
    mean = sum((i + 1) * e.explicit_penalty for i, e in enumerate(each)) / 10
    noise, gradient = sum(e.noise for e in each), sum(e.gradient for e in each)
    torch.testing.assert_close(penalty.compute().double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio.compute().double(), (noise / gradient).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(size.compute().double(), (noise / 4).sqrt(), rtol=1e-6, atol=0)
    with pytest.raises(errors.NoDropoutSiteError):
        linear = nn.Linear(4, 3).double()
        ratio.update(lambda: linear(example()[0]).sum(), linear)


def on_a_rank():
    dist.init_process_group("gloo", rank=(rank := int(os.environ["LOCAL_RANK"])))
    x, y, w = example()
    rows = slice(0, 5) if rank == 0 else slice(5, 12)
    net = small_model()
    metrics = [LossJacobianSize(), LossHessianSize(), LinearModelBound(3), MeanExplicitPenalty(draws=2), NoiseScale()]
    for metric in metrics[:2]:
        metric.update((x @ w.T)[rows], y[rows])
    metrics[2].update(x[rows], w, y[rows])
    closure = lambda: F.cross_entropy(net(x[rows]), y[rows])
    metrics[3].update(closure, net, examples=len(y[rows]))
    metrics[4].update(closure, net)
    same = MeanExplicitPenalty()
    same.update(lambda: F.cross_entropy(net(x), y), net, examples=12)
    local = [
        {name: getattr(metric, name).clone() for name in metric._defaults} for metric in [*metrics[3:], same]
    ]  # `metric_state` is not in torchmetrics 1.0
    return [metric.compute() for metric in metrics], local


def test_two_processes_are_one(tmp_path):
    found = run_on_two_ranks({"metrics": on_a_rank}, tmp_path)
    (values, one), (others, two) = (rank["metrics"] for rank in found)
    torch.testing.assert_close(values, others, rtol=0, atol=0)
    x, y, w = example()
    whole = [LossJacobianSize(), LossHessianSize(), LinearModelBound(3)]
    whole[0].update(x @ w.T, y)
    whole[1].update(x @ w.T, y)
    whole[2].update(x, w, y)
    torch.testing.assert_close(values[:3], [metric.compute() for metric in whole])
    assert one[2]["total"] != two[2]["total"]  # on the same data ranks draw directions of their own
    penalty = (one[0]["total"] + two[0]["total"]) / 12
    scale = ((one[1]["noise"] + two[1]["noise"]) / (one[1]["gradient"] + two[1]["gradient"])).sqrt()
    torch.testing.assert_close(values[3:], [penalty.float(), scale.float()])


class Measured(Classifier):
    """A metric of the effects in a validation step."""

    clone = True

    def __init__(self):
        super().__init__()
        self.penalty, self.scale = MeanExplicitPenalty(), NoiseScale()

    def validation_step(self, batch, batch_idx):
        def closure():
            x, y = (t.clone() for t in batch) if self.clone else batch
            return F.cross_entropy(self.net(x), y)

        self.penalty.update(closure, self, examples=len(batch[1]))
        self.scale.update(closure, self)
        self.log("penalty", self.penalty)
        self.log("scale", self.scale)


def test_in_a_validation_step():
    L.seed_everything(0, verbose=False)
    model, trainer = Measured(), make_trainer()
    (values,) = trainer.validate(model, make_loader(), verbose=False)
    assert values["penalty"] > 0
    assert values["scale"] > 0
    model.clone = False
    with pytest.raises(errors.UnsupportedOperationError, match="inference_mode=False"):
        trainer.validate(model, make_loader(), verbose=False)
    assert make_trainer(inference_mode=False).validate(model, make_loader(), verbose=False)[0]["penalty"] > 0


def test_noise_is_that_of_the_functional():
    """One direction: the squared norm of the gradient of `implicit_noise` has the mean that the metric has."""
    net = small_model()
    x, y, _ = example()
    net[3].train()
    closure = lambda: F.cross_entropy(net(x), y)
    squares = []
    for _ in range(200):
        xi = torch.autograd.grad(implicit_noise(closure), list(net.parameters()), allow_unused=True)
        squares.append(sum(g.square().sum() for g in xi if g is not None))
    squares = torch.stack(squares)
    found = functional.dropout_effects(closure, net, draws=200, penalty=False).noise
    assert (found - squares.mean()).abs() < 4.5 * squares.std() * math.sqrt(2 / 200)
