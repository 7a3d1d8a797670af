"""In a network with kinks the noise of finite steps is larger than the definition: found, measured, and said."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, train
from own_modules import GAN
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.cli import main
from lightning_dropreg.errors import KinkedNetworkWarning
from lightning_dropreg.functional import find_support
from lightning_dropreg.inspection.kinks import noise_excess

KINKED = {
    "relu": F.relu,
    "relu in place": lambda h: F.relu_(h * 1),
    "hardtanh": F.relu6,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda h: F.prelu(h, torch.tensor(0.3)),
    "threshold": lambda h: F.threshold(h, 0.1, 0.0),
    "elu": F.selu,
    "max_pool": lambda h: F.max_pool1d(h[:, None], 2)[:, 0],
    "abs": torch.abs,
    "maximum": lambda h: torch.maximum(h, h.flip(1)),
    "max": lambda h: h.max(1, keepdim=True)[0],
    "amax": lambda h: h.amax(1, keepdim=True),
    "topk": lambda h: h.topk(2)[0],
    "scatter_reduce": lambda h: h.new_zeros(h.shape).scatter_reduce(1, torch.zeros_like(h).long(), h, "amax"),
}
SMOOTH = {
    "elu": F.elu,
    "silu": F.silu,
    "sum": lambda h: h.new_zeros(h.shape).scatter_reduce(1, torch.zeros_like(h).long(), h, "sum"),
    "normalize": F.normalize,
}


@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_found_behind_dropout_and_only_there(name):
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(5, 4)
    behind = find_support(lambda: KINKED[name](F.dropout(x @ w)).square().mean())
    before = find_support(lambda: F.dropout(KINKED[name](x @ w)).square().mean())
    assert behind.kinks == {name.split()[0]: 1}
    assert before.kinks == {}


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_smooth_is_no_kink(name):
    w = torch.randn(4, 4, requires_grad=True)
    assert not find_support(lambda: SMOOTH[name](F.dropout(torch.randn(5, 4) @ w)).square().mean()).kinks


def test_the_excess_is_that_of_one_unit_worked_out_by_hand():
    """``relu(w d - 0.95)`` with ``d = 1 +- eps``: the slope in ``w`` is 1.1 in one pass of step 0.1, 0 in the other."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, dtype=torch.float64)
    closure = lambda: (w * F.dropout(x, 0.5) - 0.95).relu().sum()
    assert noise_excess(closure, [w], step_size=0.1) == pytest.approx(1.1 / 0.2, rel=1e-12)
    assert noise_excess(closure, [w], step_size=0.04) == pytest.approx(1.0, rel=1e-12)


class Kinked(Classifier):
    """A ReLU behind its dropout; with `behind=False`, before it."""

    def __init__(self, activation="relu", behind=True):
        super().__init__(dtype=torch.float32)
        kink = nn.ReLU() if activation == "relu" else nn.SiLU()
        parts = [nn.Dropout(0.1), nn.Linear(4, 16), kink] if behind else [nn.Linear(4, 16), kink, nn.Dropout(0.1)]
        self.net = nn.Sequential(*parts, nn.Linear(16, 3))

    def train_dataloader(self):
        return make_loader(256, 256, dtype=torch.float32)


def warned(callbacks, make=Kinked, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(callbacks, make=make, loader=make_loader(dtype=torch.float32), model_options=options)
    return [str(warning.message) for warning in caught if warning.category is KinkedNetworkWarning]


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [dr.ImplicitNoise(estimator="antithetic")],
        lambda: [dr.ImplicitNoise(estimator="antithetic", injection="after_backward")],
        lambda: [dr.ExplicitPenalty(estimator="antithetic"), dr.ImplicitNoise(estimator="antithetic")],
        lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise(estimator="antithetic")],
        lambda: [dr.ImplicitNoise(low_memory=True)],
    ],
)
def test_training_warns_once_and_names_kinks_and_remedy(callbacks):
    [message] = warned(callbacks())
    assert "Kinked has kinks behind its dropout: relu (1)." in message
    assert "estimator='forward'" in message
    assert "step_size" in message


def test_manual_optimization_warns_too():
    class ReLUs(GAN):
        def __init__(self):
            super().__init__()
            self.d[1] = nn.ReLU()
            self.float()

    [message] = warned([dr.ImplicitNoise(estimator="antithetic")], make=ReLUs)
    assert "relu" in message


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ([dr.ImplicitNoise(estimator="forward")], {}),
        ([dr.ImplicitNoise(step_size=0.5)], {}),
        ([dr.ImplicitNoise(source="dropout")], {}),
        ([dr.ImplicitNoise(strength=0.0)], {}),
        ([dr.ExplicitPenalty()], {}),
        ([dr.MiniBatchDropout(2)], {}),
        ([dr.ImplicitNoise()], {"activation": "silu"}),
        ([dr.ImplicitNoise()], {"behind": False}),
    ],
)
def test_nothing_is_said_where_nothing_is_wrong(callbacks, options):
    assert warned(callbacks, **options) == []


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_inspect_measures_the_excess(activation, capsys):
    model = ["--model=test_kinks.Kinked", f"--model.activation={activation}", "--trainer.accelerator=cpu"]
    model += ["--trainer.callbacks=lightning_dropreg.ImplicitNoise", "--trainer.callbacks.estimator=antithetic"]
    assert main(["inspect", *model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinks"] == ({"relu": 1} if activation == "relu" else {})
    [plan] = [plan for plan in found["plans"] if plan["callbacks"] == ["ImplicitNoise"]]
    ratio = plan["values"]["noise over xi_approx"]
    if activation == "relu":
        assert ratio > 1.2
        assert f"{ratio:.2f} times as large as xi_approx: kinks (relu)" in plan["warning"]
    else:
        assert ratio == pytest.approx(1, abs=0.01)
        assert plan["warning"] == ""
