"""Two gloo processes: compiled parts inside DDP, and DDP inside what is compiled, as without compiling."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from compiled_models import OLD, fit
from fits import make_loader
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_on_two_ranks
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import lightning_dropreg as dr
from lightning_dropreg.functional import explicit_penalty

ORDERS = {
    "plain": DistributedDataParallel,
    "outside": lambda net: torch.compile(DistributedDataParallel(net), backend="aot_eager"),
    "inside": lambda net: DistributedDataParallel(torch.compile(net, backend="aot_eager")),
}


class CompiledDDP(DDPStrategy):
    """Compiles what DDP has made, as one may do in a strategy of one's own."""

    def configure_ddp(self):
        super().configure_ddp()
        self.model = torch.compile(self.model, backend="aot_eager")


def fitted(how, strategy=DDPStrategy):
    def check():
        callbacks = [dr.ExplicitPenalty(estimator="antithetic"), dr.ImplicitNoise(estimator="antithetic")]
        options = {"devices": 2, "use_distributed_sampler": False}
        model, logged = fit(
            callbacks, "layers", how, strategy=strategy() if callable(strategy) else strategy, **options
        )
        return model.gradients, model.losses, logged, model.graphs

    return check


def by_hand(order):
    def check():
        L.seed_everything(0, verbose=False)
        torch._dynamo.reset()
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3)).double()
        model = ORDERS[order](net)
        x, y = next(iter(make_loader()))
        step = lambda: F.cross_entropy(model(x), y)
        found = []
        for key in range(2):
            net.zero_grad()
            generator = torch.Generator().manual_seed(10 * distributed.get_rank() + key)
            explicit_penalty(step, generator=generator).backward()
            found.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
        return found

    return check


CHECKS = {
    **{f"trainer, {how}": fitted(how) for how in (None, "parts", "whole")},
    "trainer, outside": fitted(None, CompiledDDP),
    **{f"by hand, {order}": by_hand(order) for order in ORDERS},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_on_two_ranks(CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_as_uncompiled(ranks, name):
    kind = name.partition(",")[0]
    for rank in ranks:
        expected, found = rank[f"{kind}, {'None' if kind == 'trainer' else 'plain'}"], rank[name]
        torch.testing.assert_close(found[:3], expected[:3], rtol=1e-10, atol=1e-10)
    if name in ("trainer, parts", "trainer, whole") and not OLD:
        assert all(rank[name][3][-1] == 1 for rank in ranks)  # graphs, all of the first step
