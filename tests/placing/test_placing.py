"""Dropout set by pattern, placed on outputs, taken away."""

import copy
import json
import pickle
from collections import OrderedDict

import lightning as L
import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg.cli import main
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


CONFIG = """
model: {class_path: test_placing.Saving, init_args: {folder: FOLDER}}
data: test_placing.Rows
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_dropreg.PlaceDropout
      init_args: {patterns: {net.2: 0.25}, kind: dropout}
    - class_path: lightning_dropreg.ExplicitPenalty
"""


class Saving(Classifier):
    """No dropout of its own; the body is recomputed in the backward."""

    def __init__(self, folder: str):
        super().__init__(p=0.0, dtype=torch.float32)
        self.folder = folder

    def training_step(self, batch, batch_idx):
        h = torch.utils.checkpoint.checkpoint(self.net[:3], batch[0], use_reentrant=False)
        return nn.functional.cross_entropy(self.net[4](h), batch[1])

    def on_fit_end(self):
        penalty = self.trainer.callback_metrics.get("dropreg/explicit_penalty")
        torch.save((self.net.state_dict(), penalty, self.gradients[0]), f"{self.folder}/rank{self.global_rank}.pt")


class Rows(L.LightningDataModule):
    def train_dataloader(self):
        return make_loader(dtype=torch.float32)


def test_in_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    assert main(["inspect", "--config", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    assert [site["name"] for site in json.loads(out[out.index("{") :])["sites"]] == ["net.2.placed_dropout.drop"]
    assert main(["fit", "--config", str(path)]) == 0
    assert torch.load(tmp_path / "rank0.pt")[1] > 0


@pytest.mark.parametrize("method", [[], [dr.ExplicitPenalty(), dr.ImplicitNoise()]], ids=["dropout", "algorithm 2"])
def test_two_processes_with_checkpointing(tmp_path, method):
    """Replicas stay equal, the keys of the weights too, and the gradient is another than without dropout."""
    L.seed_everything(0, verbose=False)
    start = copy.deepcopy(Saving(str(tmp_path)))
    for callbacks in ([dr.PlaceDropout({"net.2": 0.25}), *method], []):
        module = copy.deepcopy(start)
        make_trainer(callbacks, devices=2, strategy="ddp_fork", max_steps=2).fit(module, Rows())
        ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
        assert list(ranks[0][0]) == list(start.net.state_dict())
        assert all(torch.equal(weight, ranks[1][0][name]) for name, weight in ranks[0][0].items())
        if callbacks:
            dropped = ranks[0][2]
    assert not torch.equal(dropped, ranks[0][2])


@pytest.mark.parametrize("dora", [False, True])
def test_peft_without_dropout(dora):
    """peft has an `Identity` where its dropout is 0; dropout can be placed on it, but DoRA goes round it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q", "v"], lora_dropout=0.0, use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(OrderedDict(q=nn.Linear(4, 50), v=nn.Linear(50, 4))), config)
    with pytest.raises(PatternError, match="add_dropout.*'base_model.model.q.lora_dropout.default'"):
        dr.set_drop_prob(model, {"*.q": 0.3})
    dr.add_dropout(model, {"*.q.lora_dropout.default": 0.3, "*.v.lora_dropout.default": 0.1})
    dr.set_drop_prob(model, {"*.v": 0.2})
    assert not [name for name in peft.get_peft_model_state_dict(model) if "placed" in name]
    closure = lambda: model(torch.ones(3, 4)).square().mean()
    if dora:
        assert {one.id for one in dr.audit(closure)} == {"unreached"}
        return
    assert [site.p for site in find_sites(closure)] == [0.3, 0.2]
    assert not torch.equal(closure(), closure())
    dr.remove_dropout(model)
    assert torch.equal(closure(), closure())


def test_rates_of_peft():
    peft = pytest.importorskip("peft")
    net = nn.Sequential()
    net.add_module("q", nn.Linear(4, 4))
    net.add_module("v", nn.Linear(4, 4))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q", "v"], lora_dropout=0.1))
    assert list(dr.set_drop_prob(model, {"*.q": 0.3}).values()) == [0.3]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.1]
