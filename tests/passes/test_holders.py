"""What holds state is taken over from batch to batch, and everything that has changed in between is seen."""

import pytest
import torch
from torch import nn

from lightning_dropreg.passes.holders import Holders
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.passes.reach import Reach


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
        self.norms = []

    def forward(self, x):
        self.body[-1].calls = getattr(self.body[-1], "calls", 0) + 1
        for norm in self.norms:
            x = norm(x)
        return self.body(x)


def batches(net, change, number=4):
    """Two runs for every batch, with `change` before each batch; returns the holders of the last."""
    reach, before, x = Reach({"self": net}), None, torch.randn(4, 2)
    for batch in range(number):
        change(batch)
        with Isolation(net, reach=reach, before=before) as isolation:
            first, second = (isolation.run(lambda: net(x)) for _ in range(2))
            assert torch.equal(first, second)
            before = isolation.holders
    return before


def test_a_count_on_a_layer_goes_up_by_one_a_batch():
    net = Net()
    batches(net, lambda batch: None)
    assert net.body[-1].calls == 4


def in_another_list(net, norm):
    net.norms = [*net.norms, norm]


def in_the_same_list(net, norm):
    net.norms.append(norm)


def as_a_part(net, norm):
    net.body = nn.Sequential(norm, *net.body)


@pytest.mark.parametrize("grow", [in_another_list, in_the_same_list, as_a_part])
def test_a_module_that_comes_later_is_put_back_too(grow):
    net, norm = Net(), nn.BatchNorm1d(2)
    batches(net, lambda batch: grow(net, norm) if batch == 2 else None)
    assert int(norm.num_batches_tracked) == 2


def test_hooks_between_batches_stay():
    net = Net()
    batches(net, lambda batch: net.body.register_forward_hook(lambda *_: None) if batch == 1 else None)
    assert len(net.body._forward_hooks) == 1


def test_what_has_not_changed_is_not_looked_for_again():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    first = Holders(net, Reach({}))
    assert first.again().modules is first.modules
    net[1].count = 1
    second = first.again()
    assert second.modules is not first.modules
    net[1].count = 2  # changes with every batch
    third = second.again()
    net[1].count = 3
    assert third.again().modules is third.modules
    assert third.again().states[third.all.index(net[1])].attributes["count"] == 3


def test_a_run_alone_stands_until_another_follows():
    """Its end is noted only then; random numbers and state are those that it left."""
    found = []
    for alone in (False, True):
        for others in (0, 1):
            net = Net().train()
            net.norms = [nn.BatchNorm1d(2)]
            torch.manual_seed(0)
            with Isolation(net, reach=Reach({"self": net})) as isolation:
                isolation.run(lambda net=net: net(torch.rand(4, 2)), alone=alone)
                for _ in range(others):
                    isolation.run(lambda net=net: (net(torch.rand(9, 2)), setattr(net, "more", 1)), trace=False)
            found.append((net.body[1].calls, net.norms[0].running_mean.clone(), torch.rand(1), hasattr(net, "more")))
    for each in found:
        torch.testing.assert_close(each, found[0])
    assert found[0][0] == 1
    assert not found[0][3]
