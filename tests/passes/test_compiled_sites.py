"""What a compiled part gives in a pass, for every kind of site: what it gives uncompiled."""

import pytest
import torch
import torch.nn.functional as F
from compiled_models import OLD
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.nn import EmbeddingDropout, LockedDropout, WeightDrop
from lightning_dropreg.passes import Directions, Drop, Off, Perturb, run_pass
from lightning_dropreg.passes.compiled import CompiledParts, uncompiled

RULES = {
    "off": Off,
    "perturb": lambda: Perturb(Directions(7), 0.5),
    "elementwise": lambda: Perturb(Directions(7, "elementwise"), -0.5),
    "drop": lambda: Drop(7),
    "mirrored": lambda: Drop(7, mirrored=True),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


class Of(nn.Module):
    """A module of a function of its layers and an input ``(4, 6, 8)``."""

    def __init__(self, function, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def run(module, x, rule, parts=None):
    def closure():
        return F.mse_loss(module(x), torch.zeros((), dtype=x.dtype).expand_as(x[..., :1]).expand(*x.shape[:-1], 8))

    if parts is None:
        with uncompiled():
            return run_pass(closure, rule, record_losses=True)
    with parts.running():
        return run_pass(closure, rule, record_losses=True)


def compare(module, x, rules=RULES, fullgraph=True, backend="aot_eager", rtol=1e-10, wrapped=False, refused=None):
    module = module.to(x.dtype)
    if wrapped:
        module = torch.compile(module, backend=backend, fullgraph=fullgraph)
    else:
        module.compile(backend=backend, fullgraph=fullgraph)
    parts = CompiledParts(nn.ModuleDict({"part": module}))
    for rule in rules:
        expected, found = run(module, x, RULES[rule]()), run(module, x, RULES[rule](), parts)
        assert found.sites == expected.sites
        assert found.sites
        torch.testing.assert_close(found.loss, expected.loss, rtol=rtol, atol=rtol)
        for a, b in zip(gradients(expected.loss, module), gradients(found.loss, module), strict=True):
            torch.testing.assert_close(b, a, rtol=rtol, atol=rtol)
    (part,) = parts.parts.values()
    if OLD and part.refused and not refused:
        pytest.skip(f"the values agree; torch {torch.__version__} runs it uncompiled: {part.refused}")
    assert part.refused is None if refused is None else refused in part.refused, part.refused
    return part


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


def linear():
    return nn.Linear(8, 8)


def in_place(self, x):
    h = self.a(x)
    for p in (0.1, 0.2):
        F.dropout(h, p, inplace=True)
    return self.a(h)


def images(layer):
    return lambda self, x: layer(self.a(x).view(4, 6, 4, 2)).flatten(-2)


def attention(self, x):
    heads = self.a(x).unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3).transpose(1, 2).flatten(-2)


KINDS = {
    "dropout": lambda: Of(lambda self, x: self.b(self.d(self.a(x))), a=linear(), b=linear(), d=nn.Dropout(0.3)),
    "in place, in a loop": lambda: Of(in_place, a=linear()),
    "made inside": lambda: Of(lambda self, x: nn.Dropout(0.4)(self.a(x)), a=linear()),
    "dropout1d": lambda: Of(lambda self, x: F.dropout1d(self.a(x), 0.3), a=linear()),
    "dropout2d": lambda: Of(images(nn.Dropout2d(0.3)), a=linear()),
    "alpha": lambda: Of(lambda self, x: F.alpha_dropout(self.a(x), 0.3, True), a=linear()),
    "feature alpha": lambda: Of(lambda self, x: nn.FeatureAlphaDropout(0.3)(self.a(x)), a=linear()),
    "attention": lambda: Of(attention, a=linear()),
    "multi-head": lambda: Of(lambda self, x: self.m(x, x, x)[0], m=nn.MultiheadAttention(8, 2, 0.3, batch_first=True)),
    "encoder layer": lambda: Of(lambda self, x: self.m(x), m=nn.TransformerEncoderLayer(8, 2, 16, 0.2)),
    "normalize": lambda: Of(lambda self, x: F.normalize(F.dropout(self.a(x), 0.2), dim=-1), a=linear()),
    "drop": lambda: Of(lambda self, x: dr.drop(self.a(x), 0.3, (4, 1, 8)), a=linear()),
    "locked": lambda: Of(lambda self, x: self.d(self.a(x)), a=linear(), d=LockedDropout(0.3)),
    "weight drop": lambda: Of(lambda self, x: self.d(self.a(x)), a=linear(), d=WeightDrop(linear(), "weight", 0.3)),
    "embedding dropout": lambda: Of(
        lambda self, x: self.a(x) + self.e((x[..., 0] > 0).long()),
        a=linear(),
        e=EmbeddingDropout(nn.Embedding(2, 8), 0.3),
    ),
    "checkpoint": lambda: Of(
        lambda self, x: F.dropout(checkpoint(lambda h: F.dropout(self.a(h), 0.3).tanh(), x, use_reentrant=False), 0.1),
        a=linear(),
    ),
    "two checkpoints": lambda: Of(
        lambda self, x: checkpoint(
            self.b, checkpoint(lambda h: F.dropout(self.a(h), 0.3).tanh(), x, use_reentrant=False), use_reentrant=False
        ),
        a=linear(),
        b=nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_site(kind):
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    compare(KINDS[kind](), x, rules=("perturb", "drop"))
    assert not counters["graph_break"]


class Returns(nn.Module):
    """A module whose forward returns a loss, as those of transformers do."""

    def __init__(self, loss):
        super().__init__()
        self.a, self.b, self.loss = linear(), linear(), loss

    def forward(self, x):
        z = self.b(F.dropout(self.a(x).tanh(), 0.3))
        return self.loss(z.flatten(0, 1), torch.arange(24) % 8)


def test_losses_inside():
    """The graph breaks at a loss, which is taken apart outside it."""
    own = dr.recognize(lambda z, y: F.cross_entropy(z, y, reduction="none"))
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1), lambda z, y: own(z, y).mean()):
        module = Returns(loss).double()
        x = torch.randn(4, 6, 8, dtype=torch.float64)
        module.compile(backend="aot_eager")
        parts = CompiledParts(nn.ModuleDict({"part": module}))
        with uncompiled():
            expected = run_pass(lambda: module(x), RULES["perturb"](), record_losses=True)
        with parts.running():
            found = run_pass(lambda: module(x), RULES["perturb"](), record_losses=True)
        assert found.sites == expected.sites
        assert [each.name for each in found.losses] == [each.name for each in expected.losses]
        weights = [torch.autograd.grad(each.loss, each.losses[0].elements)[0] for each in (expected, found)]
        torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)
        assert parts.parts["part"].refused is None


def test_a_loss_inside_a_whole_graph_is_taken_apart_uncompiled(recwarn):
    module = Returns(F.cross_entropy).double()
    module.compile(backend="aot_eager", fullgraph=True)
    parts = CompiledParts(nn.ModuleDict({"part": module}))
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    with parts.running():
        found = run_pass(lambda: module(x), RULES["perturb"](), record_losses=True)
        assert len(found.losses) == len(found.sites) == 1
    assert "part was compiled" in str(recwarn.pop(errors.CompiledPartWarning).message)


def test_a_loss_that_the_graph_hides_is_found(recwarn):
    def made_inside(z, y):  # Dynamo offers it to no mode
        loss = nn.CrossEntropyLoss()
        return loss(z, y)

    module = Returns(made_inside).double()
    module.compile(backend="aot_eager")
    parts = CompiledParts(nn.ModuleDict({"part": module}))
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    with parts.running():
        found = run_pass(lambda: module(x), RULES["perturb"](), record_losses=True)
        assert [each.name for each in found.losses] == ["cross_entropy"]
    assert "other losses are seen" in str(recwarn.pop(errors.CompiledPartWarning).message)


def test_recurrent_layers_stay_outside_the_graph():
    module = Of(lambda self, x: self.m(self.a(x))[0], a=linear(), m=nn.LSTM(8, 8, 3, dropout=0.2, batch_first=True))
    part = compare(module, torch.randn(4, 6, 8, dtype=torch.float64), rules=("perturb", "drop"), fullgraph=False)
    assert counters["graph_break"]
    assert part.refused is None


class WithRecurrent(nn.Module):
    """A forward that calls a recurrent layer, which torch skips whole, and a layer of somebody's own or of torch's."""

    def __init__(self, first):
        super().__init__()
        self.first, self.m = first, nn.LSTM(8, 8, 2, dropout=0.2, batch_first=True)

    def forward(self, x):
        return F.dropout(self.m(self.first(x))[0], 0.1)


def test_what_runs_in_no_graph_is_not_called_compiled():
    """Twice, for the second of two that are alike has the graph of the first."""
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    for _ in range(2):
        none = compare(WithRecurrent(nn.Linear(8, 8)), x, rules=("perturb",), fullgraph=False)
        assert none.told() == "part runs uncompiled: torch has made no graph of it (recurrent layers)."
        assert not none.runs_compiled
    assert not counters["stats"].get("unique_graphs")
    torch._dynamo.reset()
    for _ in range(2):
        some = compare(WithRecurrent(Of(lambda self, x: self.a(x).tanh(), a=linear())), x, ("perturb",), False)
        assert some.told() == "part runs compiled, with 2 dropout sites in it; outside the graph: recurrent layers."
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("traceable", [True, False])
def test_stochastic_depth_breaks_the_graph_or_runs_uncompiled(traceable):
    """Who draws is asked on the stack; in a graph the variables of that function may be gone."""

    def drop_path(h, drop_prob=0.2):
        keep_prob = 1 - drop_prob
        if traceable:
            return h * h.new_empty(len(h), 1, 1).bernoulli_(keep_prob).div_(keep_prob)
        return h.div(keep_prob) * (keep_prob + torch.rand(len(h), 1, 1, dtype=h.dtype)).floor_()

    module = Of(lambda self, x: x + drop_path(self.a(x)), a=linear())
    why = None if traceable else "keep probability is not where"
    compare(module, torch.randn(4, 6, 8, dtype=torch.float64), ("perturb", "drop"), fullgraph=False, refused=why)
    assert not traceable or counters["graph_break"]


@pytest.mark.skipif(OLD, reason="has no guard_filter_fn")
def test_guards_that_are_dropped_are_found(recwarn):
    """A graph from before, reused although a mode is on, has real dropout in it, or none."""
    module = KINDS["dropout"]().double()
    options = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled = torch.compile(module, backend="aot_eager", options=options)
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    compiled(x)
    parts = CompiledParts(nn.ModuleDict({"part": compiled}))
    expected, found = run(compiled, x, RULES["perturb"]()), run(compiled, x, RULES["perturb"](), parts)
    assert found.sites == expected.sites
    torch.testing.assert_close(found.loss, expected.loss)
    assert "other dropout sites are met (none)" in str(recwarn.pop(errors.CompiledPartWarning).message)


def test_attention_that_is_ignored_stays_fused_in_the_graph():
    with attention_dropout("ignore"):
        module = Of(lambda self, x: F.dropout(attention(self, x), 0.1), a=linear())
        compare(module, torch.randn(4, 6, 8, dtype=torch.float64), rules=("perturb",))


def test_what_no_callback_has_looked_at_runs_uncompiled():
    """Functions, and modules in a loop of one's own: nobody can see into a graph."""
    layers = nn.ModuleList(linear().double() for _ in range(2))

    def forward(x):
        return F.dropout(layers[1](F.dropout(layers[0](x), 0.3).tanh()), 0.2)

    compiled = torch.compile(forward, backend="aot_eager")
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    losses = [run_pass(lambda f=f: f(x).square().mean(), RULES["perturb"]()) for f in (forward, compiled)]
    assert losses[0].sites == losses[1].sites
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert not counters["stats"].get("unique_graphs")
    compiled(x)
    assert counters["stats"]["unique_graphs"] == 1


def test_other_sites_from_call_to_call():
    """What decides in Python where to drop has a graph for each way: every new one is compared, a few times."""
    module = Of(lambda self, x: F.dropout(self.a(x), 0.3) if self.drops else self.a(x), a=linear()).double()
    module.drops = True
    module.compile(backend="aot_eager")
    parts = CompiledParts(nn.ModuleDict({"part": module}))
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    with parts.running():
        assert len(run_pass(lambda: module(x).sum(), Off()).sites) == 1
        module.drops = False
        with pytest.raises(errors.CompiledPartError, match="part met other dropout sites"):
            run_pass(lambda: module(x).sum(), Off(), need_sites=False)
        parts.parts["part"].surprised()
        assert not run_pass(lambda: module(x).sum(), Off(), need_sites=False).sites
        module.drops = True
        assert len(run_pass(lambda: module(x).sum(), Off()).sites) == 1


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule):
    compare(KINDS["dropout"](), torch.randn(4, 6, 8, dtype=torch.float64), rules=(rule,), wrapped=True)
