"""Tensors and context variables do not become more with the number of steps, compiled or not."""

import gc
from contextvars import copy_context

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import make_trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(estimator="antithetic"), dr.ImplicitNoise(estimator="antithetic")],
    "some rows": lambda: [dr.ExplicitPenalty(estimator="antithetic", batch_fraction=0.25)],
    "k draws with noise": lambda: [dr.MiniBatchDropout(4), dr.ImplicitNoise(estimator="antithetic")],
    "low memory": lambda: [dr.ExplicitPenalty(estimator="antithetic", low_memory=True)],
}
COUNTED = (100, 300)  # behind the last of the first looks, between two of the later ones


class Counting(L.LightningModule):
    def __init__(self, compiled):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        if compiled:
            self.net.compile(backend="aot_eager")
        self.alive = {}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch), (batch[:, 0] > 0).long())

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step in COUNTED:
            gc.collect()
            tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            self.alive = {**self.alive, self.global_step: (tensors, len(copy_context()))}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_alive_does_not_grow(method, compiled):
    torch._dynamo.reset()
    module = Counting(compiled)
    make_trainer(METHODS[method]()).fit(module, DataLoader(torch.randn(16 * 302, 4), 16))
    early, late = (module.alive[step] for step in COUNTED)
    assert all(after <= before for before, after in zip(early, late, strict=True))  # what tests before left may go
