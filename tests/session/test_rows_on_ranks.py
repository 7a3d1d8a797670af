"""Rows that stop to stand for all of a batch in one of two processes: it goes its own way and nobody waits for it."""

import os
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer
from ranks import run_on_two_ranks

import lightning_dropreg as dr
from lightning_dropreg.step.plan import Plan

CASES = {
    "noise": lambda: [dr.ImplicitNoise(batch_fraction=0.5)],
    "both": lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.5)],
    "two fractions": lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.25)],
    "after": lambda: [
        dr.ExplicitPenalty(batch_fraction=0.5),
        dr.ImplicitNoise(batch_fraction=0.5, injection="after_backward"),
    ],
}


class Mixing(Classifier):
    """On rank 1, from the third step on, every row's output depends on the other rows."""

    def training_step(self, batch, batch_idx):
        z = self.net(batch[0])
        if os.environ.get("LOCAL_RANK") == "1" and self.trainer.global_step >= 2:
            z = z - z.mean(0)
        return F.cross_entropy(z, batch[1])


def fit(callbacks):
    L.seed_everything(1, verbose=False)
    model = Mixing()
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "use_distributed_sampler": False}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make_trainer(callbacks(), **options).fit(model, make_loader())
    given_up = any("batch_fraction is given up" in str(warning.message) for warning in told)
    return model.state_dict(), given_up


@pytest.mark.parametrize("case", CASES)
def test_the_noise_keeps_its_way_into_the_gradient(case):
    made = {type(callback): callback for callback in CASES[case]()}
    penalty = made[dr.ExplicitPenalty].penalty if dr.ExplicitPenalty in made else None
    plan = Plan(penalty=penalty, noise=made[dr.ImplicitNoise].noise)
    assert plan.on_whole_batches().noise_in_loss == plan.noise_in_loss
    assert not plan.on_whole_batches().on_rows


def test_one_process_alone_takes_whole_batches(tmp_path):
    checks = {case: lambda make=make: fit(make) for case, make in CASES.items()}
    for case, (one, two) in zip(CASES, zip(*(r.values() for r in run_on_two_ranks(checks, tmp_path))), strict=True):
        assert not isinstance(one, str), (case, one)
        assert not isinstance(two, str), (case, two)
        assert (one[1], two[1]) == (False, True), case
        for name, weight in one[0].items():
            torch.testing.assert_close(weight, two[0][name], rtol=0, atol=0, msg=f"{case}: {name}")
