"""What goes beside dropout: max-norm, scaled pretrained weights, and others' own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from companions import METHODS, Watched
from fits import Classifier, make_loader, make_trainer, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.callbacks.max_norm import project_units

EVERYTHING = {  # what may stand beside a method, all at once
    **METHODS,
    "companions": lambda: [
        *METHODS["algorithm 2"](),
        dr.MaxNorm(3.0),
        dr.DropProbSchedule("linear", 4, "step", start=0.5),
        dr.DropoutDiagnostics(draws=4, at_end=False, verbose=False),
        dr.DivergenceDetector(),
    ],
}


def norms_by_unit_response(layer):
    """Incoming norms found by what the layer does to unit impulses: a unit's weights are its responses."""
    copy = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, bias=False
    ).double()
    copy.weight.data.copy_(layer.weight.data)
    size = tuple(k if not copy.transposed else 1 for k in layer.kernel_size)
    total = torch.zeros(layer.out_channels, dtype=torch.float64)
    for impulse in torch.eye(layer.in_channels * torch.Size(size).numel(), dtype=torch.float64):
        total += copy(impulse.view(1, layer.in_channels, *size)).square().flatten(2).sum((0, 2))
    return total.sqrt()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv1d(4, 6, 2, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
    ],
    ids=lambda layer: f"{type(layer).__name__}, {layer.groups} groups",
)
def test_projection_is_onto_each_units_ball(layer):
    layer = layer.double()
    before, old = norms_by_unit_response(layer).detach(), layer.weight.detach().clone()
    radius = before.median().item()
    project_units(layer, radius)
    torch.testing.assert_close(norms_by_unit_response(layer), before.clamp_max(radius), rtol=1e-6, atol=0)
    assert (old != layer.weight).any()
    assert (old == layer.weight).any()  # who was inside stays


UNITS = {  # a layer, and what makes its weights into rows of which each is one unit's
    "embedding": (nn.Embedding(7, 4), lambda w: [w["weight"]]),
    "bilinear": (nn.Bilinear(2, 3, 4), lambda w: [w["weight"].flatten(1)]),
    "attention": (nn.MultiheadAttention(4, 2, kdim=3), lambda w: [w[f"{name}_proj_weight"] for name in "qkv"]),
    "cell": (nn.GRUCell(3, 4), lambda w: [torch.cat([w["weight_ih"], w["weight_hh"]], 1)]),
    "lstm": (
        nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
        lambda w: [
            rows
            for at in ("l0", "l0_reverse", "l1", "l1_reverse")
            for rows in (torch.cat([w[f"weight_ih_{at}"], w[f"weight_hh_{at}"]], 1), w[f"weight_hr_{at}"])
        ],
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_of_other_layers(name):
    layer, rows_of = UNITS[name]
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    radius = torch.cat([rows.norm(dim=1) for rows in rows_of(weights)]).median().item()
    project_units(layer, radius)
    after = dict(layer.named_parameters())
    for old, new in zip(rows_of(weights), rows_of(after)):
        expected = old * (radius / old.norm(dim=1, keepdim=True)).clamp_max(1)
        torch.testing.assert_close(new.detach(), expected)
    assert all(torch.equal(p, weights[n]) for n, p in after.items() if "bias" in n)


class Tied(Classifier):
    """An embedding whose vectors are the last layer's weights, and a layer of the user's own."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding, self.odd = nn.Embedding(3, 8).double(), nn.Module()
        self.odd.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
        if tied:
            self.net[4].weight = self.embedding.weight

    def on_before_optimizer_step(self, optimizer):
        pass  # what has no gradient cannot be noted


def test_max_norm_of_tied_weights_embeddings_and_unknown_layers():
    radius = 0.6
    with pytest.warns(UserWarning, match=r"what the units of odd \(Module\) are, and leaves them"):
        model = train([dr.MaxNorm(radius)], make=Tied, model_options={"tied": False})
    assert model.embedding.weight.norm(dim=1).max() > radius  # only where it is named
    assert model.net[4].weight.norm(dim=1).max() <= radius + 1e-9
    for modules in (["embedding"], ["net.4"], ["embedding", "net.*"]):
        callback, model = dr.MaxNorm(radius, modules=modules), Tied()
        assert len(callback._find(model)) == len(modules)
        train([callback], make=lambda model=model: model)
        assert model.embedding.weight.norm(dim=1).max() <= radius + 1e-9
    with pytest.raises(errors.UnsupportedModuleError, match=r"odd \(Module\) are. It acts on linear and bilinear"):
        train([dr.MaxNorm(modules=["odd"])], make=Tied)
    with pytest.raises(errors.UnsupportedModuleError, match="units of a ReLU are not known"):
        project_units(nn.ReLU(), 1.0)
    tied = Tied()
    tied.up = nn.ConvTranspose1d(3, 8, 1).double()
    tied.net[4].weight = nn.Parameter(tied.up.weight.data[:, :, 0])
    tied.up.weight = tied.net[4].weight
    with pytest.raises(errors.UnsupportedModuleError, match="shares weights with net.4"):
        dr.MaxNorm(modules=["net.4", "up"])._find(tied)


@pytest.mark.parametrize("method", ["algorithm 2", "algorithm 4", "nothing"])
def test_max_norm(method):
    free = torch.tensor(train(METHODS[method](), make=Watched).norms)
    callback = dr.MaxNorm(0.6, modules=["net.0"])
    bound = train([*METHODS[method](), callback], make=Watched)
    norms = torch.tensor(bound.norms)
    assert free[:, 0].max() > 1
    assert norms[:, 0].max() <= 0.6 + 1e-9
    assert norms[:, 1].max() > 0.6  # not chosen
    assert not callback._handles
    torch.testing.assert_close(bound.gradients[0], train(METHODS[method](), make=Watched).gradients[0])


def test_max_norm_is_the_same_on_every_replica(tmp_path):
    class Saving(Watched):
        def on_fit_end(self):
            torch.save((self.net.state_dict(), self.norms), tmp_path / f"rank{self.global_rank}.pt")

    callbacks = [dr.MaxNorm(0.6), *METHODS["algorithm 2"]()]
    make_trainer(callbacks, devices=2, strategy="ddp_fork").fit(Saving(), make_loader())
    (weights, norms), (others, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.tensor(norms).max() <= 0.6 + 1e-9
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_max_norm_refuses():
    class Parametrized(Classifier):
        def __init__(self):
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.net[0])

    with pytest.raises(errors.UnsupportedModuleError, match=r"net\.0 are computed by a parametrization"):
        train([dr.MaxNorm()], make=Parametrized)
    with pytest.raises(errors.UnsupportedModuleError, match=r"patterns encoder\.\*; there are: net\.0, net\.4"):
        train([dr.MaxNorm(modules=["encoder.*"])])
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "3"):
        with pytest.raises(errors.InvalidArgumentError, match="max_norm"):
            dr.MaxNorm(wrong)


@pytest.mark.parametrize(
    ("pretrained", "dropout", "factor"),
    [("none", "unscaled", 2.5), ("none", "inverted", 1.0), ("unscaled", "inverted", 0.4), ("unscaled", "unscaled", 1)],
)
def test_scaled_weights_keep_the_expected_input(pretrained, dropout, factor):
    """By enumerating all masks: the mean input of each unit is what it was in (or after) pretraining."""
    q, masks = 0.6, torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    probability = ((1 - q) * masks + q * (1 - masks)).prod(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    h = torch.randn(4, dtype=torch.float64)

    def mean_input(form):
        kept = masks if form == "unscaled" else masks / (1 - q)
        return h @ net[1].weight.T if form == "none" else probability @ ((kept * h) @ net[1].weight.T)

    before, first, bias = mean_input(pretrained), net[0].weight.clone(), net[1].bias.clone()
    assert dr.scale_pretrained_for_dropout(net, {"1": q}, pretrained=pretrained, dropout=dropout) == {
        "1": pytest.approx(factor)
    }
    torch.testing.assert_close(mean_input(dropout), before)
    assert torch.equal(net[0].weight, first)
    assert torch.equal(net[1].bias, bias)


def test_scaling_refuses():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[3].weight = net[2].weight
    with pytest.raises(errors.InvalidArgumentError, match="divide by 1 - p"):
        dr.scale_pretrained_for_dropout(net, {"1": 0.5})
    with pytest.raises(errors.UnsupportedModuleError, match="tied"):
        dr.scale_pretrained_for_dropout(net, {"1": 0.5, "2": 0.5}, dropout="inverted")
    with pytest.raises(errors.UnsupportedModuleError, match="no layer 'head'"):
        dr.scale_pretrained_for_dropout(net, {"head": 0.5}, dropout="inverted")
    with pytest.raises(errors.InvalidArgumentError, match=r"drop probability 1\.5"):
        dr.scale_pretrained_for_dropout(net, {"1": 1.5}, dropout="inverted")


class Smoothed(Classifier):
    """Label smoothing by torch's argument, or written as soft targets."""

    def __init__(self, soft):
        super().__init__()
        self.soft = soft

    def training_step(self, batch, batch_idx):
        x, y = batch
        if not self.soft:
            return F.cross_entropy(self.net(x), y, label_smoothing=0.1)
        return F.cross_entropy(self.net(x), 0.9 * F.one_hot(y, 3).to(x.dtype) + 0.1 / 3)


class Mixed(Classifier):
    """Mixup, drawn in the step: by two losses, or by soft targets."""

    def __init__(self, soft):
        super().__init__()
        self.soft = soft
        self.shares = {}

    def training_step(self, batch, batch_idx):
        x, y = batch
        share, order = torch.distributions.Beta(0.4, 0.4).sample().to(x.dtype), torch.randperm(len(y))
        self.shares.setdefault(batch_idx, set()).add(share.item())
        z = self.net(share * x + (1 - share) * x[order])
        if not self.soft:
            return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[order])
        y = F.one_hot(y, 3).to(x.dtype)
        return F.cross_entropy(z, share * y + (1 - share) * y[order])


class CutOut(Classifier):
    """Cutout: a stretch of every example is set to zero, drawn in the step by numpy, in place or not."""

    def __init__(self, soft):
        super().__init__()
        self.inplace = soft

    def training_step(self, batch, batch_idx):
        x, y = batch
        start = np.random.randint(0, 3)
        if self.inplace:
            x[:, start : start + 2] = 0
        else:
            keep = torch.ones(4, dtype=x.dtype)
            keep[start : start + 2] = 0
            x = x * keep
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("method", EVERYTHING)
@pytest.mark.parametrize("make", [Smoothed, Mixed, CutOut])
def test_two_ways_to_write_it_train_the_same(make, method):
    """What is not ours to write composes: written in two ways, it gives the same gradients in every step."""
    callbacks = EVERYTHING[method]
    if make is Mixed and method == "double backward":  # samples labels once for each loss: other draws
        callbacks = lambda: [dr.ImplicitNoise(estimator="double_backward")]
    one, other = (train(callbacks(), make=make, model_options={"soft": soft}) for soft in (False, True))
    torch.testing.assert_close(one.gradients, other.gradients, rtol=1e-7, atol=1e-9)
    assert len({float(loss) for loss in one.losses}) == 4
    if make is Mixed:
        assert all(len(shares) == 1 for shares in one.shares.values())  # the same in all passes of a batch
        assert len(set.union(*one.shares.values())) == 4


@pytest.mark.parametrize("method", EVERYTHING)
def test_weight_decay_is_added_to_the_regularized_gradient(method):
    class Decayed(Classifier):
        decay = 0.3

        def configure_optimizers(self):
            self.start = torch.cat([p.detach().reshape(-1) for p in self.parameters()])
            return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.decay)

    decayed = train(EVERYTHING[method](), make=Decayed, max_steps=1)
    torch.testing.assert_close(decayed.gradients[0], train(EVERYTHING[method](), max_steps=1).gradients[0])
    expected = decayed.start - 0.1 * (decayed.gradients[0] + 0.3 * decayed.start)
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in decayed.parameters()]), expected)
