"""The campaign in small, and that it can find something."""

import campaign_oracle
import campaign_run
import pytest
import torch
from campaign_problems import CAMPAIGN_LOSSES, Net

from lightning_dropreg.estimators import antithetic as module_of_pairs


@pytest.mark.parametrize("seed", range(5))
def test_random_runs_are_right_or_refused(seed):
    made, verdict, why = campaign_run.trial(seed, steps=40)
    assert verdict != "wrong", (made, why)


@pytest.mark.slow
def test_five_hundred_random_runs():
    wrong = []
    for seed in range(700_000, 700_500):
        made, verdict, why = campaign_run.trial(seed)
        if verdict == "wrong":
            wrong.append((made, why))
    assert not wrong


def test_the_campaign_finds_a_wrong_factor(monkeypatch):
    """With a penalty that is twice too large, and with such noise."""
    penalty = next(s for s in range(3000) if is_plain(s, "penalty"))
    noise = next(s for s in range(3000) if is_plain(s, "noise"))
    assert [campaign_run.trial(seed, steps=30)[1] for seed in (penalty, noise)] == ["right", "right"]
    combine = module_of_pairs.__globals__["combine"]

    def off(*args):
        found = combine(*args)
        scaled = lambda value: None if value is None else 2 * value
        return type(found)(found.loss, scaled(found.penalty), scaled(found.noise))

    monkeypatch.setitem(module_of_pairs.__globals__, "combine", off)
    assert [campaign_run.trial(seed, steps=30)[1] for seed in (penalty, noise)] == ["wrong", "wrong"]


def is_plain(seed, method):
    made = campaign_run.draw(seed)
    usual = not CAMPAIGN_LOSSES[made["loss"]].odd and made["network"] == "plain" and made["source"] == "taylor"
    whole = made["batch_fraction"] is None and not made["low_memory"] and not made["compiled"]
    return usual and whole and (made["method"], made["estimator"]) == (method, "antithetic")


def test_the_oracle_agrees_with_itself():
    """Differences and autograd, for one problem with two sites."""
    torch.set_default_dtype(torch.float64)
    net, x, y = Net("two", torch.tanh, 3, 3, 2, 0.4), torch.randn(2, 3), torch.tensor([0, 1])
    oracle = campaign_oracle.Oracle(net, x, y, CAMPAIGN_LOSSES["ce"])
    torch.testing.assert_close(oracle.penalty("loss_hessian")[0], oracle.penalty_value(), rtol=1e-6, atol=1e-10)


def test_an_error_of_second_order_in_the_step_is_no_fault_and_one_of_first_order_is(monkeypatch):
    """The loss of this problem is small: with the step 0.02 it is 5 % off, and right in the limit of no step."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(campaign_run, "widened", lambda made, r: made)
    made, combine = campaign_run.draw(800473), module_of_pairs.__globals__["combine"]
    assert campaign_run.off(made, campaign_run.expected(made), *campaign_run.fit(made, 40))
    assert campaign_run.trial(made["seed"], steps=40)[1] == "right"

    def off(*args):  # by 2 % at this step
        found = combine(*args)
        return type(found)((1 + args[-1]) * found.loss, found.penalty, found.noise)

    monkeypatch.setitem(module_of_pairs.__globals__, "combine", off)
    assert campaign_run.trial(made["seed"], steps=40)[1] == "wrong"
