"""Parts of a model that are compiled and have no dropout in them stay compiled."""

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, train
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import errors

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "after the backward": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")],
    "some rows": lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.5)],
    "low memory": lambda: [dr.ExplicitPenalty(low_memory=True)],
    "k": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise(source="dropout")],
    "every second step": lambda: [dr.ExplicitPenalty(every_n_steps=2)],
}


class Layers(nn.Module):
    """In a class of its own: compiled in place, torch's own containers are run as they are."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.first(x).tanh())


GRAPHS, RUNS = [], []  # not in the module, whose attributes are put back between passes


class Body(Classifier):
    """A body without dropout, compiled or not, and dropout around it."""

    def __init__(self, how=None):
        super().__init__()
        self.body = Layers().double()
        if how == "in place":
            self.body.compile(backend=self.backend)
        elif how == "wrapped":
            self.body = torch.compile(self.body, backend=self.backend)

    def backend(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        GRAPHS.append([node.target for node in graph.graph.nodes])
        run = aot_eager(graph, inputs)

        def counted(*args):
            RUNS.append(None)
            return run(*args)

        return counted

    def training_step(self, batch, batch_idx):
        h = self.net[:4](batch[0])
        return F.cross_entropy(self.net[4](F.dropout(self.body(h), 0.2)), batch[1])


@pytest.mark.parametrize("how", ["in place", "wrapped"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_body_stays_in_use_and_gives_the_same(method, how):
    torch._dynamo.reset()
    GRAPHS.clear()
    RUNS.clear()
    options = {"log_every_n_steps": 2}
    plain = train(METHODS[method](), make=Body, **options)
    compiled = train(METHODS[method](), make=Body, model_options={"how": how}, **options)
    assert GRAPHS
    assert len(RUNS) >= 4  # a step each
    for a, b in zip(plain.gradients, compiled.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for graph in GRAPHS:  # nothing of the interception was traced
        assert len(graph) <= 12
    assert "_compiled_call_impl" not in plain.body.__dict__
    with torch.no_grad():
        compiled.body(torch.randn(2, 8, dtype=torch.float64))  # as it was


@pytest.mark.parametrize("estimator", ["forward", "double_backward"])
def test_other_estimators_are_refused_there(estimator):
    with pytest.raises(errors.UnsupportedModuleError, match="body is compiled .* estimator='antithetic'"):
        train([dr.ExplicitPenalty(estimator=estimator)], make=Body, model_options={"how": "in place"})


def test_dropout_in_it_is_refused():
    class Inside(Body):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)).double(), backend="eager")

    with pytest.raises(errors.UnsupportedModuleError, match="body is compiled .* without dropout"):
        train([dr.ExplicitPenalty()], make=Inside)
