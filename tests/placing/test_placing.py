"""Dropout set by pattern, placed on outputs, taken away."""

import copy
import pickle

import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError, PatternError
from lightning_dropreg.functional import find_sites


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, 2, dropout=0.1)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1)
        self.attention_dropout = 0.1
        self.layer_drop = 0.1
        self.drop = nn.Dropout(0.1)


def test_every_place_is_reached():
    net = Mixed()
    assert dr.set_drop_prob(net, {"*": 0.3}) == dict.fromkeys(
        ["attention_dropout", "rnn.dropout", "attention.dropout", "drop.p"], 0.3
    )
    assert net.layer_drop == 0.1
    dr.set_drop_prob(net, {"rnn": 0.0, "*attention_dropout": 0.2})
    assert (net.rnn.dropout, net.attention.dropout, net.attention_dropout) == (0.0, 0.3, 0.2)


def test_unmatched_patterns_change_nothing():
    net = Mixed()
    with pytest.raises(PatternError, match="nearest are 'attention"):
        dr.set_drop_prob(net, {"drop": 0.5, "atention": 0.2})
    assert net.drop.p == 0.1
    with pytest.raises(PatternError, match="add_dropout"):
        dr.set_drop_prob(nn.Sequential(nn.Linear(2, 2)), {"0": 0.2})
    with pytest.raises(PatternError, match="nearest are 'drop'"):
        dr.add_dropout(net, {"drpo": 0.2})
    for wrong in ({}, {"drop": 1.0}, {"drop": "x"}):
        with pytest.raises(InvalidArgumentError):
            dr.set_drop_prob(net, wrong)
    with pytest.raises(InvalidArgumentError, match="kind"):
        dr.add_dropout(net, {"drop": 0.2}, kind="dropuot")


def test_placed_dropout():
    net = nn.Sequential(nn.Linear(4, 50), nn.Tanh())
    x, keys = torch.ones(2, 4), list(net.state_dict())
    assert dr.add_dropout(net, {"1": 0.5}) == dr.add_dropout(net, {"1": 0.5}) == {"1": 0.5}
    for one in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert list(one.state_dict()) == keys
        assert [(site.name, site.p) for site in find_sites(lambda one=one: one(x).sum())] == [
            ("1.placed_dropout.drop", 0.5)
        ]
        assert (one(x) == 0).any()
        assert (one.eval()(x) != 0).all()
        assert dr.remove_dropout(one) == ["1"]
        assert not (one.train()(x) == 0).any()
        assert not one[1]._forward_hooks


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant):
    net = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    dr.add_dropout(net, {"1": 0.5})
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        net.zero_grad()
        run(x).sum().backward()
        gradients.append(net[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_compiled():
    net = nn.Sequential(nn.Linear(4, 50), nn.Tanh())
    dr.add_dropout(net, {"1": 0.5})
    out = torch.compile(net, backend="aot_eager", fullgraph=True)(torch.ones(8, 4))
    assert 100 < int((out == 0).sum()) < 300


def test_callback():
    seen = []

    class Watching(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append("placed_dropout" in self.net[0]._modules)

    module = Watching(p=0.0)
    make_trainer([dr.PlaceDropout({"net.0": 0.2}), dr.ExplicitPenalty()]).fit(module, make_loader())
    assert all(seen)
    assert "placed_dropout" not in module.net[0]._modules


def test_rates_of_peft():
    peft = pytest.importorskip("peft")
    net = nn.Sequential()
    net.add_module("q", nn.Linear(4, 4))
    net.add_module("v", nn.Linear(4, 4))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q", "v"], lora_dropout=0.1))
    assert list(dr.set_drop_prob(model, {"*.q": 0.3}).values()) == [0.3]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.1]
