"""`masks="fixed"`: each draw is one sampled network, the same for all examples of all batches."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedSiteError
from lightning_dropreg.nn import LockedDropout, WeightDrop
from lightning_dropreg.uncertainty import draw_predictions, moments


class Sequence(nn.Module):
    """(B, T, C), (T, B, C) and (B T, C) within, heads of attention, and masks shared over time."""

    def __init__(self):
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(4, 8), nn.LSTM(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.locked = LockedDropout(0.3)

    def forward(self, x):
        h = self.locked(self.a(x))
        h = F.dropout(self.rnn(h.transpose(0, 1))[0], 0.3, self.training).transpose(0, 1)
        h = h + self.attention(h, h, h)[0]
        flat = F.dropout(self.b(h.flatten(0, 1)).tanh(), 0.4, self.training)
        return flat.view(h.shape).sum(1)


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4 * 9, 3)
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x):
        return self.b(F.dropout(self.drop(self.a(x)).flatten(1), 0.3, self.training))


class Dense(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


class Connected(nn.Module):
    """DropConnect, which has one mask for all rows anyway."""

    def __init__(self):
        super().__init__()
        self.rnn = WeightDrop(nn.LSTM(4, 4, batch_first=True), "weight_hh_l0", 0.4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.rnn(x)[0])[:, -1]


MODELS = {
    "dense": (Dense, (3,)),
    "image": (Image, (1, 5, 5)),
    "sequence": (Sequence, (5, 4)),
    "dropconnect": (Connected, (5, 4)),
}


def problem(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make().double().eval(), torch.randn(6, *shape, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_it_does_not_matter_how_examples_are_put_in_batches(name, chunk):
    net, x = problem(name)
    options = dict(module=net, passes=4, key=5, masks="fixed")
    whole = draw_predictions(net, x, chunk=4, **options)
    parts = [draw_predictions(net, part, chunk=chunk, **options) for part in (x[:3], x[3:5], x[5:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert len({tuple(draw[0].tolist()) for draw in whole}) == 4  # the draws differ


@pytest.mark.parametrize("name", MODELS)
def test_equal_examples_get_equal_predictions(name):
    net, x = problem(name)
    x[4] = x[1]
    fixed = draw_predictions(net, x, module=net, passes=3, masks="fixed")
    torch.testing.assert_close(fixed[:, 4], fixed[:, 1])
    if name != "dropconnect":
        free = draw_predictions(net, x, module=net, passes=3)
        assert not torch.allclose(free[:, 4], free[:, 1])


def test_a_draw_is_dropout():
    """Mean over many draws of a linear net is its output; the kept fraction is 1 - q."""
    net = nn.Sequential(nn.Dropout(0.4), nn.Linear(50, 1, bias=False)).eval()
    nn.init.ones_(net[1].weight)
    draws = draw_predictions(net, torch.ones(2, 50), module=net, passes=2000, chunk=100, masks="fixed")
    # standard error of the mean: sqrt(50 c / 2000) = 0.13; 5 of them are passed with probability 6e-7
    assert abs(draws[:, 0].mean().item() - 50) < 5 * 0.13
    torch.testing.assert_close(draws[:, 0], draws[:, 1])


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Dense()

    def forward(self, x):
        return self.net(x)


def predict(size, **options):
    L.seed_everything(1, verbose=False)
    callback = dr.MonteCarloDropout(passes=4, **options)
    trainer = L.Trainer(
        callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    return torch.cat([batch.mean for batch in trainer.predict(Model(), DataLoader(x, batch_size=size))])


def test_in_a_trainer():
    torch.testing.assert_close(predict(2, masks="fixed"), predict(3, masks="fixed"))
    assert not torch.allclose(predict(2), predict(3))
    assert torch.equal(predict(2), predict(2, masks="per_batch"))


def test_without_a_trainer():
    net, x = problem("dense")
    callback = dr.MonteCarloDropout(passes=4, masks="fixed", seed=3)
    found = callback.predict(net, net, x, key=7)
    draws = draw_predictions(net, x, module=net, passes=4, key=7, masks="fixed")
    torch.testing.assert_close(found.mean, moments(draws, "categorical").mean)
    torch.testing.assert_close(found.outputs, net(x))


def test_what_is_refused():
    net, x = problem("dense")
    with pytest.raises(InvalidArgumentError, match="masks"):
        draw_predictions(net, x, module=net, masks="none")
    with pytest.raises(InvalidArgumentError, match="masks"):
        dr.MonteCarloDropout(masks="none")

    class Rigid(nn.Module):
        def forward(self, x):
            return F.dropout(x + torch.ones(6, 3), 0.5, self.training)

    with pytest.raises(UnsupportedSiteError, match="number of rows"):
        draw_predictions(Rigid(), torch.ones(6, 3), module=Rigid(), masks="fixed")

    class Mixed(nn.Module):
        """Rows that no order tells apart: three entries of each, in an order of their own."""

        def forward(self, x):
            flat = x.reshape(-1)[torch.arange(3 * len(x)) * 7 % (3 * len(x))]
            return F.dropout(flat, 0.5, self.training).reshape(x.shape)

    with pytest.raises(UnsupportedSiteError, match="cannot be told"):
        draw_predictions(Mixed(), torch.randn(10, 3), module=Mixed(), masks="fixed")
