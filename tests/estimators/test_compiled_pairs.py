"""Penalty and noise on some rows within the one pass over all of them, in the graph of a compiled part."""

import pytest
import torch
import torch.nn.functional as F
from compiled_models import OLD
from torch import nn
from torch._dynamo.utils import counters

from lightning_dropreg.estimators import Pairs, one_pass
from lightning_dropreg.estimators.layout import Layout, RowAxis, RowsNotFoundError, find_layout
from lightning_dropreg.nn import LockedDropout
from lightning_dropreg.passes.compiled import CompiledParts, uncompiled

pytestmark = pytest.mark.skipif(OLD, reason="runs uncompiled there")
ROWS, CHOSEN, ALONE = 5, torch.tensor([1, 4]), torch.tensor([0, 2, 3])
OPTIONS = dict(curvature="loss_hessian", noise=True, step_size=0.1, key=5)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


class Mixed(nn.Module):
    """Rows first, second, and as the slow and the fast index of a dimension; a mask shared over time."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.locked = LockedDropout(0.3)
        self.mixes = False

    def forward(self, x):
        rows = len(x)
        h = self.a(x).tanh()
        if self.mixes:
            h = h + torch.arange(rows, dtype=h.dtype).view(-1, 1, 1)
        h = F.dropout(self.locked(h).transpose(0, 1), 0.2)
        h = F.dropout(h.reshape(-1, 4), 0.4).view(-1, rows, 4).transpose(0, 1)
        h = F.dropout(h.reshape(-1, 4).sin(), 0.1)
        return self.b(h)


def estimate(module, layout, parts, rows=None, first=None, **options):
    torch.manual_seed(0)
    x, y = torch.randn(8, 2, 4, dtype=torch.float64), torch.arange(16).view(8, 2) % 3
    rows = torch.cat([ALONE, CHOSEN, CHOSEN]) if rows is None else rows

    def on_rows(rows):
        def closure():
            inputs = x[rows] if first is None else F.dropout(x[rows], first)
            return F.cross_entropy(module(inputs), y[rows].flatten())

        return closure

    with uncompiled():
        layout = layout or find_layout(on_rows, ROWS)
    pairs = Pairs(len(rows) - 4, 2)
    with parts.running():
        found = one_pass(on_rows(rows), layout, pairs, **{"mask": "as_model", **OPTIONS, **options})
        both = found.loss, found.penalty, found.noise
        return [*both, *(torch.autograd.grad(v, list(module.parameters()), retain_graph=True) for v in both)]


def parts_of(module, **options):
    module.compile(backend="aot_eager", fullgraph=True, **options)
    return CompiledParts(nn.ModuleDict({"part": module}))


@pytest.mark.parametrize("first", [None, 0.5], ids=["the first site inside", "the first site outside"])
@pytest.mark.parametrize("mask", ["as_model", "elementwise"])
def test_a_whole_graph_gives_what_uncompiled_code_gives(mask, first):
    module = Mixed().double()
    expected = estimate(module, None, CompiledParts(nn.ModuleDict()), mask=mask, first=first)
    parts = parts_of(module)
    for step_size in (0.1, 0.1, 0.2):
        found = estimate(module, None, parts, mask=mask, first=first, step_size=step_size)
        if step_size == 0.1:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert parts.parts["part"].told().startswith("part runs compiled, with 4 dropout sites")
    assert counters["stats"]["unique_graphs"] == 1  # another key, step or batch needs no other
    assert not counters["graph_break"]


@pytest.mark.parametrize("change", [{"mixes": True}, {"wide": True}])
def test_rows_that_are_not_as_they_were_are_found_in_the_graph(change):
    """The two of a pair differ where nothing is perturbed yet; or a site has not its rows where they were."""
    module = Mixed().double()
    parts = parts_of(module)
    estimate(module, None, parts)
    layout = Layout(
        (RowAxis(0, True, 1), RowAxis(1, True, 1), RowAxis(0, False, 2), RowAxis(0, True, 2)), (RowAxis(0, True, 2),)
    )
    estimate(module, layout, parts)  # that is where they are
    if "wide" in change:
        layout = Layout((layout.sites[1], *layout.sites[1:]), layout.losses)
    else:
        module.mixes = True
    with pytest.raises(RowsNotFoundError):
        estimate(module, layout, parts)
    assert parts.parts["part"].refused is None
