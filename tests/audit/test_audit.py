"""Planted faults are found, each in its place; models that people train have none."""

import lightning as L
import pytest
import torch
from fits import Classifier, make_loader, make_trainer, same, train
from torch import nn
from zoo import ZOO, Always, Body

import lightning_dropreg as dr


@pytest.mark.parametrize(("name", "plant", "place"), ZOO, ids=[f"{row[0]}-{i}" for i, row in enumerate(ZOO)])
def test_planted(name, plant, place):
    found = dr.audit(plant(), torch.randn(48, 16))
    assert [one for one in found if one.id == name and one.where.replace("tests/support/", "").startswith(place)], found
    others = {one.id for one in found if one.severity != "note"} - {name}
    assert not others - {"wrong-scale", "wrong-rate", "unreached"} or name in {"stuck-at-zero"}, found


def test_clean_body():
    assert dr.audit(Body(nn.Dropout(0.4)), torch.randn(48, 16)) == []


def test_closure():
    net, x = Body(Always()), torch.randn(48, 16)
    assert [one.id for one in dr.audit(lambda: net(x))] == ["active-in-eval"]
    assert [one.id for one in dr.audit(net.forward, x)] == ["active-in-eval"]


def test_line_search():
    class Searching(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    batch = next(iter(make_loader()))
    assert [one.id for one in dr.audit(Searching(), batch)] == ["noise-on-line-search"]
    assert dr.audit(Classifier(), batch) == []


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
