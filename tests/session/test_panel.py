"""What a fit says at its start."""

import pytest
import torch
from fits import Classifier, train

import lightning_dropreg as dr
from lightning_dropreg.session.panel import SILENT
from lightning_dropreg.step.description import expected_cost, name_method


def shown(capsys, callbacks, make=Classifier, **options):
    """What is printed, with the lines of the panel joined."""
    train(callbacks, make=make, enable_model_summary=True, max_steps=1, **options)
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_fit_begins_with_a_panel(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    told = shown(capsys, [dr.ExplicitPenalty(strength=2, batch_fraction="auto"), dr.ImplicitNoise(strength=1.5)])
    assert told.count("╭─ lightning_dropreg " + 58 * "─" + "╮") == 1
    for words in (
        "Algorithm 2",
        "1: net.3 (p = 0.4)",
        "antithetic: the network is smooth behind its dropout",
        "all: penalty and noise are estimated in different ways",
        "penalty 2 (1 is the second-order value), noise 1.5",
        "about 2 dropout steps",
    ):
        assert words in told


class HandMade(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x * (torch.rand_like(x) > 0.1), y), batch_idx)


@pytest.mark.filterwarnings("ignore:.*random numbers")
def test_it_names_what_is_not_regularized(capsys):
    told = shown(capsys, [dr.ExplicitPenalty()], make=HandMade)
    assert "left alone" in told
    assert "rand_like in HandMade (test_panel.py" in told


def test_it_can_be_silenced(capsys, monkeypatch):
    monkeypatch.setenv(SILENT, "0")
    assert "lightning_dropreg" not in shown(capsys, [dr.ExplicitPenalty()])
    monkeypatch.delenv(SILENT)
    train([dr.ExplicitPenalty()], max_steps=1)  # enable_model_summary=False
    assert "lightning_dropreg" not in capsys.readouterr().out


def test_a_plan_that_changes_nothing_says_nothing(capsys):
    assert "lightning_dropreg" not in shown(capsys, [dr.MiniBatchDropout(1)])


A = {"estimator": "antithetic"}
Q = {**A, "batch_fraction": 0.25}
COSTS = [
    ([dr.ExplicitPenalty(**A), dr.ImplicitNoise(**A)], "Algorithm 2", 2),
    ([dr.ExplicitPenalty(**Q), dr.ImplicitNoise(**Q)], "Algorithm 2", 1.25),
    ([dr.ExplicitPenalty(**A), dr.ImplicitNoise(injection="after_backward", **A)], "Algorithm 2", 3),
    ([dr.ExplicitPenalty(**A), dr.ImplicitNoise(injection="after_backward", **Q)], "Algorithm 2", 2.5),
    ([dr.ExplicitPenalty(estimator="forward")], "penalty in the place of dropout", 2),
    ([dr.ExplicitPenalty(estimator="forward", batch_fraction=0.25)], "penalty", 1.5),
    ([dr.ExplicitPenalty(every_n_steps=4, **A)], "penalty", 1.25),
    ([dr.ExplicitPenalty(curvature="full", **A)], "penalty", 3),
    ([dr.ExplicitPenalty(low_memory=True)], "penalty", 2.33),
    ([dr.ExplicitPenalty(strength=0)], "no dropout", 1),
    ([dr.ImplicitNoise(**A)], "noise alone", 2),
    ([dr.ImplicitNoise(**Q)], "noise alone", 1.25),
    ([dr.ImplicitNoise(source="dropout")], "noise alone", 3),
    ([dr.MiniBatchDropout(4)], "DROPOUT_4 (Algorithm 1)", 4),
    ([dr.MiniBatchDropout(4), dr.ImplicitNoise(**A)], "Algorithm 4", 6),
    ([dr.MiniBatchDropout(4), dr.ImplicitNoise(source="dropout")], "section 3.1", 4),
    ([dr.RDrop(1.0)], "R-Drop", 2),
]


@pytest.mark.parametrize(("callbacks", "name", "cost"), COSTS, ids=range(len(COSTS)))
def test_what_a_method_is_called_and_costs(callbacks, name, cost):
    trainer = type("Trainer", (), {"callbacks": callbacks})()
    plan = callbacks[0].plan(trainer)
    assert name in name_method(plan)
    told = "a dropout step" if cost == 1 else f"{cost:g} dropout steps"
    assert expected_cost(plan).startswith(f"about {told},")


def test_nobody_knows_what_exact_costs():
    plan = dr.ExplicitPenalty(estimator="exact").plan(
        type("Trainer", (), {"callbacks": [dr.ExplicitPenalty(estimator="exact")]})()
    )
    assert "as many backward passes" in expected_cost(plan)
