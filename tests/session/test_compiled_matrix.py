"""Ways to compile, methods and kinds of sites together: gradients, logs and module state are those without compiling.

The rest of the matrix is slow, Inductor and float32: ``pytest -n 0 -m slow tests/session/test_compiled_matrix.py``, 8
minutes of one core where Inductor's caches are empty.
"""

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer
from lightning import seed_everything
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.nn import LockedDropout

ANTITHETIC = {"estimator": "antithetic"}
METHODS = {
    "penalty": lambda: [dr.ExplicitPenalty(**ANTITHETIC)],
    "penalty of full curvature": lambda: [dr.ExplicitPenalty(curvature="full", **ANTITHETIC)],
    "noise in the loss": lambda: [dr.ImplicitNoise(injection="loss", **ANTITHETIC)],
    "noise after the backward": lambda: [
        dr.ImplicitNoise(injection="after_backward", mask="elementwise", **ANTITHETIC)
    ],
    "algorithm 2": lambda: [dr.ExplicitPenalty(**ANTITHETIC), dr.ImplicitNoise(**ANTITHETIC)],
    "algorithm 2 in little memory": lambda: [dr.ExplicitPenalty(low_memory=True), dr.ImplicitNoise(low_memory=True)],
    "economical": lambda: [dr.ExplicitPenalty(every_n_steps=2, **ANTITHETIC), dr.ImplicitNoise(**ANTITHETIC)],
    "some rows apart": lambda: [dr.ExplicitPenalty(batch_fraction=0.5, low_memory=True)],
    "some rows in one pass": lambda: [
        dr.ExplicitPenalty(batch_fraction=0.5, **ANTITHETIC),
        dr.ImplicitNoise(batch_fraction=0.5, **ANTITHETIC),
    ],
    "k draws": lambda: [dr.MiniBatchDropout(2)],
    "antithetic draws": lambda: [dr.MiniBatchDropout(2, antithetic=True, low_memory=False)],
    "k draws and noise of dropout": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise(source="dropout")],
    "penalty and noise of dropout": lambda: [dr.ExplicitPenalty(**ANTITHETIC), dr.ImplicitNoise(source="dropout")],
}


class Block(nn.Module):
    """``(rows, 4, 8)`` to the same, with sites of one kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        layers = {
            "layers": nn.Sequential(nn.Dropout(0.3), nn.LayerNorm(8), nn.AlphaDropout(0.1)),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True),
            "images": nn.Sequential(nn.BatchNorm2d(4), nn.Dropout2d(0.3)),
            "own": LockedDropout(0.3),
            "recurrent": nn.LSTM(8, 8, 2, batch_first=True, dropout=0.3),
        }
        self.layer = layers.get(kind, nn.Identity())

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(getattr(self, f"_{self.kind}")(h))

    def _layers(self, h):
        return F.dropout(self.layer(h), 0.2, self.training)

    def _encoder(self, h):
        return self.layer(h)

    def _images(self, h):
        return self.layer(h.unflatten(-1, (4, 2))).flatten(-2)

    def _own(self, h):
        return dr.drop(self.layer(h), 0.2, (len(h), 1, 8))

    def _recurrent(self, h):
        return self.layer(h)[0]

    def _attention(self, h):
        heads = h.unflatten(-1, (2, 4)).transpose(1, 2)
        h = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3, is_causal=True)
        return F.dropout(h.transpose(1, 2).flatten(-2), 0.1, inplace=True)

    def _checkpoints(self, h):
        return h + checkpoint(lambda h: F.dropout(self.first(h), 0.3), h, use_reentrant=False)

    def _depth(self, h):  # as in timm
        kept = h.new_empty((len(h), 1, 1)).bernoulli_(0.8)
        return h + self.first(h) * kept.div_(0.8)


class Model(Classifier):
    """Blocks between dropouts, compiled in one of the ways or not."""

    def __init__(self, kinds, how, backend, dtype):
        super().__init__()
        self.embed, self.net = nn.Linear(4, 32), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds.split("+"))
        self.to(dtype)
        self.graphs = []
        if how == "part":
            self.blocks[0] = torch.compile(self.blocks[0], backend=backend)
        elif how == "parts":
            for number, block in enumerate(self.blocks):
                self.blocks[number] = torch.compile(block, backend=backend)
        elif how == "parts in place":
            for block in self.blocks:
                block.compile(backend=backend)
        elif how == "in place":
            self.compile(backend=backend)

    def forward(self, x):
        h = F.dropout(self.embed(x), 0.1, self.training).view(-1, 4, 8)
        for block in self.blocks:
            h = block(h)
        return self.net(h.mean(1))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log_dict({"train_loss": loss, "size": logits.detach().square().mean()})
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.graphs = [*self.graphs, counters["stats"].get("unique_graphs", 0)]


def fit(callbacks, kinds, how=None, backend="aot_eager", dtype=torch.float64):
    torch._dynamo.reset()
    counters.clear()
    seed_everything(0, verbose=False)
    model = Model(kinds, how, backend, dtype)
    trainer = make_trainer(callbacks, log_every_n_steps=1)
    trainer.fit(torch.compile(model, backend=backend) if how == "whole" else model, make_loader(dtype=dtype))
    return model, {name: float(value) for name, value in trainer.logged_metrics.items()}


CASES = [
    ("part", "penalty", "layers"),
    ("parts", "penalty of full curvature", "layers+attention"),
    ("whole", "noise in the loss", "layers+encoder"),
    ("in place", "noise after the backward", "own+checkpoints"),
    ("parts in place", "algorithm 2", "images+encoder"),
    ("whole", "algorithm 2 in little memory", "attention+images"),
    ("parts", "economical", "checkpoints+own"),
    ("parts in place", "some rows apart", "layers+own"),
    ("part", "some rows in one pass", "own"),
    ("in place", "k draws", "layers+images"),
    ("whole", "antithetic draws", "encoder+own"),
    ("parts", "k draws and noise of dropout", "attention+checkpoints"),
    ("part", "penalty and noise of dropout", "images"),
    ("parts", "algorithm 2", "recurrent+depth"),
]
BREAKS = {"recurrent+depth"}


@pytest.mark.parametrize(("how", "method", "kinds"), CASES, ids=map(" ".join, CASES))
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float64),
        pytest.param("aot_eager", torch.float32, marks=pytest.mark.slow),
        pytest.param("inductor", torch.float64, marks=pytest.mark.slow),
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compiled_as_uncompiled(how, method, kinds, backend, dtype, recwarn):
    plain, logged = fit(METHODS[method](), kinds, dtype=dtype)
    compiled, found = fit(METHODS[method](), kinds, how, backend, dtype)
    near = 1e-10 if dtype == torch.float64 else 1e-5 if "full" in method else 1e-6  # full: divided by step_size squared
    tolerance = {"rtol": near, "atol": near}
    torch.testing.assert_close(compiled.gradients, plain.gradients, **tolerance)
    torch.testing.assert_close(compiled.losses, plain.losses, **tolerance)
    torch.testing.assert_close(found, logged, **tolerance)
    states = [{name.replace("_orig_mod.", ""): t for name, t in m.state_dict().items()} for m in (compiled, plain)]
    torch.testing.assert_close(*states, **tolerance)
    warned = [str(w.message) for w in recwarn if w.category is errors.CompiledPartWarning]
    if torch.__version__ < "2.7":
        assert all("torch compiles it anew for every pass" in text for text in warned)
        return
    assert not warned
    assert compiled.graphs[1] == compiled.graphs[-1] > 0, compiled.graphs
    assert not counters["graph_break"] or kinds in BREAKS, counters["graph_break"]
