"""Planted faults are found, each in its place; models that people train have none."""

import re
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, same, train
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function
from zoo import CLEAN, ZOO, Always, Body, ByHand

import lightning_dropreg as dr
from lightning_dropreg.auditing.functions import OBSERVED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "plant", "place"), ZOO, ids=[f"{row[0]}-{i}" for i, row in enumerate(ZOO)])
def test_planted(name, plant, place):
    found = dr.audit(plant(), torch.randn(48, 16))
    assert [one for one in found if one.id == name and one.where.replace("tests/support/", "").startswith(place)], found
    others = {one.id for one in found if one.severity != "note"} - {name}
    assert not others - {"wrong-scale", "wrong-rate", "unreached", "hand-made"} or name in {"stuck-at-zero"}, found
    if isinstance(getattr(plant(), "inner", None), ByHand):
        assert "warning" in {one.severity for one in found if one.id == "hand-made"}


@pytest.mark.parametrize("name", CLEAN)
def test_clean(name):
    assert [one for one in dr.audit(CLEAN[name](), torch.randn(48, 16)) if one.severity != "note"] == []


def test_every_id_is_planted_twice():
    planted = Counter(name for name, *_ in ZOO) + Counter({"ranks-share-masks": 2})
    table = (ROOT / "docs" / "audit.md").read_text()
    assert set(planted) == set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    assert min(planted.values()) >= 2
    tests = (ROOT / "tests" / name for name in ("test_clients.py", "audit/test_clean_models.py"))
    lists = [re.search(r"^(?:CLIENTS|MODELS) = \[(.*?)\]", test.read_text(), re.S | re.M)[1] for test in tests]
    clean = len(CLEAN) + sum(len(re.findall(r"\w+", one)) for one in lists)
    told = (
        f"finds {planted.total()} of {planted.total()} planted faults in their places and none in {clean} clean models"
    )
    assert told in " ".join((ROOT / "README.md").read_text().split())


class Fused(torch.autograd.Function):
    """Attention in one operation, as a kernel with a faulty backward might be."""

    @staticmethod
    def forward(ctx, weights, value, same):
        masks = [(torch.rand_like(weights) >= 0.4) / 0.6 for _ in range(2)]
        ctx.save_for_backward(weights * masks[0 if same else 1], value, masks[0])
        return (weights * masks[0]) @ value

    @staticmethod
    def backward(ctx, grad):
        weights, value, mask = ctx.saved_tensors
        return grad @ value.mT * mask, weights.mT @ grad, None


@pytest.mark.parametrize("same", [True, False])
def test_attention_is_compared_as_a_whole(same, monkeypatch):
    def attention(query, key, value, attn_mask=None, dropout_p=0.0):
        if has_torch_function((query,)):
            return handle_torch_function(attention, (query,), query, key, value, attn_mask, dropout_p)
        weights = (query @ key.mT).softmax(-1)
        return Fused.apply(weights, value, same) if dropout_p else weights @ value

    class Attending(nn.Module):
        def forward(self, h):
            return attention(h, h, h.sigmoid(), None, 0.4 if self.training else 0.0)

    monkeypatch.setitem(OBSERVED, attention, OBSERVED[F.scaled_dot_product_attention])
    found = dr.audit(Body(Attending()), torch.randn(12, 16))
    assert [one.where[:7] for one in found if one.id == "backward-mask"] == ["inner ("] * (not same), found


def test_closure():
    net, x = Body(Always()), torch.randn(48, 16)
    assert [one.id for one in dr.audit(lambda: net(x))] == ["active-in-eval"]
    assert [one.id for one in dr.audit(net.forward, x)] == ["active-in-eval"]


class Faulty(Classifier):
    def validation_step(self, batch, batch_idx):
        self.net.train()
        self.net(batch[0])
        self.net.eval()


def test_callback_leaves_the_run_as_it_is():
    callback = dr.DropoutAudit()
    L.seed_everything(0, verbose=False)
    module = Faulty(norm=True)
    with pytest.warns(UserWarning, match="active-in-eval"):
        make_trainer([callback]).fit(module, make_loader(), make_loader())
    assert {"active-in-eval"} <= {one.id for one in callback.findings}
    L.seed_everything(0, verbose=False)
    plain = Faulty(norm=True)
    make_trainer().fit(plain, make_loader(), make_loader())
    assert same(module, plain)
    assert callback._trained
    assert same(train([dr.DropoutAudit()]), train())


def test_refuses_manual_optimization():
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(dr.errors.UnsupportedModuleError, match="optimizes manually"):
        dr.audit(module, None)
