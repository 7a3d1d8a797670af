"""A step that meets no dropout on one of two ranks: the mean of the noise is taken all the same, and nobody waits."""

import os

import lightning as L
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer
from ranks import run_on_two_ranks

import lightning_dropreg as dr

METHODS = {
    "after": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")],
    "draws": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise(injection="after_backward")],
    "loss": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="loss")],
}


class Dropping(Classifier):
    """Layer drop, drawn by every rank: on rank 0 odd batches reach no dropout."""

    def training_step(self, batch, batch_idx):
        h = self.net[:3](batch[0])
        if batch_idx % 2 == 0 or os.environ.get("LOCAL_RANK") == "1":
            h = self.net[3](h)
        return F.cross_entropy(self.net[4](h), batch[1])


def fit(callbacks, p, accumulate):
    L.seed_everything(1, verbose=False)
    model = Dropping(p)
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "accumulate_grad_batches": accumulate}
    make_trainer(callbacks, **options).fit(model, make_loader(n=36, batch_size=3))
    return {"gradients": model.gradients, "weights": model.state_dict()}


def test_ranks_without_dropout_take_part(tmp_path):
    cases = {f"{name}, {count}": (make, count) for name, make in METHODS.items() for count in (1, 2)}
    checks = {
        **{f"plain, {count}": lambda count=count: fit([], 0.0, count) for count in (1, 2)},
        **{name: lambda make=make, count=count: fit(make(), 1e-12, count) for name, (make, count) in cases.items()},
        **{f"{n}, noisy": lambda make=make, count=count: fit(make(), 0.4, count) for n, (make, count) in cases.items()},
    }
    one, two = run_on_two_ranks(checks, tmp_path)
    for name in checks:
        assert not isinstance(one[name], str), (name, one[name])
        for key, weight in one[name]["weights"].items():  # replicas stay equal
            torch.testing.assert_close(weight, two[name]["weights"][key], rtol=0, atol=0, msg=f"{name}: {key}")
    for name, (_, count) in cases.items():
        plain = one[f"plain, {count}"]["gradients"]
        assert len(plain) == len(one[name]["gradients"])
        for ours, right in zip(one[name]["gradients"], plain, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5, msg=name)
