"""``estimator="auto"``: which estimator that is, and that it stays so."""

import json

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import functional
from lightning_dropreg.cli import main


class Net(Classifier):
    def __init__(self, activation="ReLU", last="Identity"):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 8), getattr(nn, activation)(), nn.Linear(8, 3)
        ).double()
        self.last = (lambda z: z) if last == "Identity" else globals()[last].apply

    def train_dataloader(self):
        return make_loader()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.last(self.net(batch[0])), batch[1])


class NoTangent(torch.autograd.Function):
    """An identity that has a backward and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def gradients(callbacks, make, **options):
    return train(callbacks, make=make, max_steps=3, **options).gradients


@pytest.mark.parametrize(
    ("make", "chosen"),
    [
        (lambda: Net("Tanh"), "antithetic"),
        (lambda: Net("ReLU"), "forward"),
        (lambda: Net("ReLU", "NoTangent"), "antithetic"),
    ],
)
@pytest.mark.parametrize(
    "companions", [(dr.ExplicitPenalty,), (dr.ImplicitNoise,), (dr.ExplicitPenalty, dr.ImplicitNoise)]
)
@pytest.mark.filterwarnings("ignore:Net has kinks")
def test_auto_is_one_of_the_others(make, chosen, companions):
    found = gradients([kind() for kind in companions], make)
    expected = gradients([kind(estimator=chosen) for kind in companions], make)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_forward_mode_refuses_is_measured_and_said_once(recwarn, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        gradients([dr.ExplicitPenalty(), dr.ImplicitNoise()], lambda: Net("ReLU", "NoTangent"))
    [told] = [str(w.message) for w in recwarn if issubclass(w.category, dr.errors.KinkedNetworkWarning)]
    assert "times as large as xi_approx on the first batch" in told or "can be larger" in told
    assert "forward mode is not possible" in told
    assert sum("estimator antithetic: there are kinks" in record.message for record in caplog.records) == 1


def test_low_memory_is_antithetic():
    assert dr.ImplicitNoise(low_memory=True).noise.estimation.estimator == "antithetic"


def test_the_choice_is_part_of_a_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    train([dr.ImplicitNoise()], make=Net, max_steps=1, max_epochs=3).trainer.save_checkpoint(path)
    kept = torch.load(path, weights_only=True)["lightning_dropreg"]["ImplicitNoise"]["found"]["estimator"]
    assert kept["estimator"] == "forward"
    monkeypatch.setattr("lightning_dropreg.session.choosing.choose_estimator", lambda *_, **__: pytest.fail("again"))
    model = Net()
    make_trainer([dr.ImplicitNoise()], max_steps=3, max_epochs=3).fit(model, make_loader(), ckpt_path=path)
    assert len(model.gradients) == 2


@pytest.mark.parametrize(("activation", "chosen"), [(nn.ReLU, "forward"), (nn.Tanh, "antithetic")])
@pytest.mark.parametrize("function", [functional.explicit_penalty, functional.implicit_noise])
def test_without_lightning(activation, chosen, function):
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 8), activation(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    values = [
        function(lambda: F.cross_entropy(net(x), y), estimator=name, generator=torch.Generator().manual_seed(3))
        for name in ("auto", chosen)
    ]
    assert torch.equal(*values)


def test_inspect_says_what_and_why(capsys):
    model = [
        "--model=test_choice.Net",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks=lightning_dropreg.ImplicitNoise",
    ]
    assert main(["inspect", *model, "--json"]) == 0
    [plan] = json.loads(capsys.readouterr().out)["plans"]
    assert plan["plan"][0] == "Estimator forward: there are kinks behind the dropout (relu)."
