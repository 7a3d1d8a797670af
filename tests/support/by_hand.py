"""The gradient of one step, made by hand of passes, to compare that of a fit with."""

import copy

import torch
import torch.nn.functional as F
from fits import Classifier, train

from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Directions, Drop, Perturb, run_pass


class Recording(Classifier):
    """Keeps the batch and the weights of the first step, so that a test can redo it by hand."""

    def on_train_batch_start(self, batch, batch_idx):
        if not hasattr(self, "first"):
            self.first = (batch, copy.deepcopy(self.net.state_dict()))


def by_hand(callbacks, expected, **kwargs):
    """Compare the gradient of the first step with that of ``expected(closure, key)`` at the same weights."""
    model = train(callbacks, make=Recording, seed=7, **kwargs)
    (x, y), weights = model.first
    net = Recording().net
    net.load_state_dict(weights)
    total = expected(lambda: F.cross_entropy(net(x), y), fold_key(7, 0, 0, 0))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(net.parameters()))])
    torch.testing.assert_close(model.gradients[0], gradient, rtol=1e-10, atol=1e-12)


def drop(closure, key, j):
    return run_pass(closure, Drop(fold_key(key, j))).loss


def pair(closure, key, step=0.1):
    directions = Directions(key)
    plus = run_pass(closure, Perturb(directions, step)).loss
    directions.rewind()
    return plus, run_pass(closure, Perturb(directions, -step)).loss


def estimate(closure, key, estimator="antithetic", **options):
    options = {"curvature": "loss_hessian", "noise": True, "step_size": 0.1, "mask": "as_model", **options}
    return ESTIMATORS[estimator](closure, key=key, **options)
