"""`dropreg bench` says which fused kernels a step keeps, and the antithetic pair keeps them."""

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.cli.measure import PassCounter


class Attending(Classifier):
    """Fused attention and an LSTM before the classifier."""

    def __init__(self):
        super().__init__(dtype=torch.float32)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = x[:, None, None].expand(-1, 1, 3, -1)
        h = F.scaled_dot_product_attention(h, h, h).squeeze(1)
        h, _ = self.recurrent(h)
        return F.cross_entropy(self.net(h[:, -1]), y)


def uses(callbacks, **options):
    model, counter = Attending(), PassCounter()
    model.training_step = counter.count(model.training_step)
    trainer = make_trainer([*callbacks, counter], limit_train_batches=2, **options)
    trainer.fit(model, make_loader(dtype=torch.float32))
    return counter.uses


def test_kernels_are_named_and_kept(monkeypatch):
    monkeypatch.setattr("lightning_dropreg.session.looking.Looks.again", False)  # looks write nothing out
    plain = uses([])
    assert plain == ["flash attention", "oneDNN RNN"]
    assert uses([dr.ExplicitPenalty(), dr.ImplicitNoise()]) == plain
    assert uses([dr.MiniBatchDropout(k=2)]) == plain
    # a second derivative needs what is written out
    assert uses([dr.ExplicitPenalty(estimator="double_backward")]) == []


@pytest.mark.parametrize("callbacks", [[], [dr.ImplicitNoise()]])
def test_autocast_is_named(callbacks):
    assert "bfloat16 autocast" in uses(callbacks, precision="bf16-mixed")
