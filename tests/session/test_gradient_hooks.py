"""What the user hangs on gradients sees gradient and noise as one, whichever way the noise goes in."""

import lightning as L
import pytest
import torch
from fits import Classifier, make_loader, make_trainer

import lightning_dropreg as dr

LIMIT = 0.02
METHODS = {
    "loss": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="loss")],
    "after_backward": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")],
    "noise alone": lambda: [dr.ImplicitNoise(source="dropout", injection="after_backward")],
    "algorithm 4": lambda: [dr.MiniBatchDropout(4), dr.ImplicitNoise()],
}


def clamping(model):
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-LIMIT, LIMIT))


def clamping_once_complete(model):
    def clamp(p):
        p.grad.clamp_(-LIMIT, LIMIT)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(clamp)


class Clamp(L.Callback):
    def on_after_backward(self, trainer, module):
        for p in module.parameters():
            p.grad.clamp_(-LIMIT, LIMIT)


WAYS = {
    "hooks": (clamping, []),
    "post-accumulate hooks": (clamping_once_complete, []),
    "a callback before ours": (lambda model: None, [Clamp()]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_the_sum_is_clamped(method, way):
    prepare, first = WAYS[way]
    L.seed_everything(1, verbose=False)
    model = Classifier()
    prepare(model)
    make_trainer([*first, *METHODS[method]()], max_epochs=2).fit(model, make_loader())
    largest = torch.stack(model.gradients).abs().max()
    assert 0.999 * LIMIT < largest <= LIMIT * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_step_within_the_backward_has_the_noise(method):
    """Each parameter is stepped as soon as its gradient is complete: the weights of the ordinary way."""
    models = []
    for within in (True, False):
        L.seed_everything(1, verbose=False)
        model = Classifier()
        if within:
            model.on_before_optimizer_step = lambda optimizer: None

            def hook(p):
                p.data.sub_(0.1 * p.grad)
                p.grad = None

            for p in model.parameters():
                p.register_post_accumulate_grad_hook(hook)
        make_trainer(METHODS[method]()).fit(model, make_loader())
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p, q)
