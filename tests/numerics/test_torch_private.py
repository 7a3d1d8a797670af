"""What torch does not promise: as it is in this release, and as if it were not there."""

import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint as checkpoint_by_another_door
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import checkpoint

from lightning_dropreg.errors import UnsupportedSiteError
from lightning_dropreg.functional import explicit_penalty, find_sites
from lightning_dropreg.interception import checkpointing
from lightning_dropreg.numerics import torch_private
from lightning_dropreg.passes import Drop, run_pass
from lightning_dropreg.passes.compiled import CompiledParts

X, Y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3
REACHED = (
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._get_mkldnn_enabled",
    "_C._get_cudnn_enabled",
    "_foreach_norm",
    "_assert_async",
    "_C.DisableTorchFunction",
    "_dynamo.eval_frame.OptimizedModule",  # first: it imports what follows
    "_functorch.config.donated_buffer",
    "_dynamo.eval_frame.skip_code",
    "_dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint",
    "_dynamo.config.recompile_limit",
    "_dynamo.utils.counters",
    "_guards.TracingContext.try_get",
    "overrides._get_current_function_mode",
    "overrides._get_current_function_mode_stack",
    "overrides._pop_mode",
    "overrides._push_mode",
)


@pytest.fixture(params=[True, False], ids=["there", "lacking"])
def without(request, monkeypatch):
    """Make every private name of torch unknown, or leave all as they are."""
    if not request.param:
        monkeypatch.setattr(torch_private, "_attribute", lambda root, path: None)
    return not request.param


def test_this_release_has_what_is_looked_for():
    """A name that torch has given up is not noticed otherwise: the fallback takes its place. Torch 2.6 lacks three."""
    lacking = [name for name in REACHED if torch_private._attribute(torch, name) is None]
    assert lacking in ([], [REACHED[0], *(name for name in REACHED if name.startswith("_dynamo.config."))])
    assert set(torch_private.checkpoint_entrances()) == {"generator", "function"}
    assert torch_private.recompile_limits()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_known(without, reentrant):
    model = net()

    def penalty(call):
        generator = torch.Generator().manual_seed(1)
        return explicit_penalty(
            lambda: F.cross_entropy(call(model, X.clone().requires_grad_()), Y), generator=generator
        )

    ours = penalty(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    plain = penalty(lambda f, x: f(x))
    ours.backward()
    got = [p.grad for p in model.parameters()]
    torch.testing.assert_close(got, list(torch.autograd.grad(plain, list(model.parameters()))))


def test_checkpoints_of_unknown_make_are_refused(without):
    model = net()
    checkpoint_by_another_door(model)
    with pytest.raises(UnsupportedSiteError, match="not made by torch"):
        find_sites(lambda: F.cross_entropy(model(X), Y))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_release_whose_checkpoints_have_other_doors(monkeypatch, reentrant):
    """Nothing to replace: what will be computed again is refused, never computed with other noise."""
    monkeypatch.setattr(checkpointing, "_ENTRANCES", {})
    model = net()
    with pytest.raises(UnsupportedSiteError, match="not made by torch" if not reentrant else "custom torch"):
        find_sites(lambda: F.cross_entropy(checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant), Y))


def test_torch_is_left_as_it_was(without):
    names = list(torch_private.checkpoint_entrances().values())
    before = [getattr(torch_checkpoint, name) for name in names]
    hooks = torch.autograd.graph.saved_tensors_hooks
    methods = hooks.__enter__, hooks.__exit__
    find_sites(lambda: F.cross_entropy(net()(X), Y))
    assert [getattr(torch_checkpoint, name) for name in names] == before
    assert (hooks.__enter__, hooks.__exit__) == methods
    assert not torch_private.in_checkpoint()


def test_recurrent_networks_are_differentiated_twice(without):
    """Not with the fused kernel, whose second derivatives torch does not have."""
    lstm, before = nn.LSTM(3, 3, 2, dropout=0.5), torch.backends.mkldnn.is_available()
    closure = lambda: F.mse_loss(
        lstm(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))[0][-1], X[:4].float()
    )
    penalty = explicit_penalty(closure, estimator="double_backward", curvature="identity")
    penalty.backward()
    assert penalty > 0
    assert torch.backends.mkldnn.is_available() == before
    assert torch.backends.cudnn.enabled


def test_norms(without):
    tensors = [X, X[0], X.float().half()]
    torch.testing.assert_close(torch_private.norms_of(tensors), [t.norm() for t in tensors])
    assert torch_private.norms_of([]) == []


def test_assertion(without):
    torch_private.assert_on_device(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        torch_private.assert_on_device(torch.tensor(False), "not fine")


def test_compiled_wrappers(without):
    model = net()
    assert torch_private.is_compiled_wrapper(torch.compile(model))
    assert not torch_private.is_compiled_wrapper(model)
    with torch_private.keeping_donated_buffers(), torch_private.many_graphs(), torch_private.hidden_from_modes():
        assert model(X).shape == (5, 3)


def test_dropout_in_compiled_parts(without):
    """Where torch has not what it takes, they run uncompiled, and give the same."""
    model = net()
    model[2].compile(backend="eager")
    parts = CompiledParts(model)
    expected = run_pass(lambda: F.cross_entropy(net()(X), Y), Drop(3))
    with parts.running():
        found = run_pass(lambda: F.cross_entropy(model(X), Y), Drop(3))
    assert found.sites == expected.sites
    assert torch.equal(found.loss, expected.loss)


def test_modes_are_set_aside(without):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch() as outer, DeviceContext(torch.device("cpu")):
        seen.clear()
        if without:
            assert not torch_private.active_modes()
            return
        with torch_private.modes_aside(Watch):
            assert [type(mode) for mode in torch_private.active_modes()] == [DeviceContext]
            torch.ones(1).exp()
        assert not seen
        assert outer in torch_private.active_modes()
        torch.ones(1).exp()
        assert seen


def test_layers_by_their_names_alone(monkeypatch):
    """Without the common base, the classes are named one by one: none that torch has is missing."""
    for known, base, home in (
        (torch_private.DROPOUT_LAYERS, "modules.dropout._DropoutNd", nn.modules.dropout),
        (torch_private.NORM_LAYERS, "modules.batchnorm._NormBase", nn),
    ):
        (common,) = known
        listed = {"modules.dropout._DropoutNd": DROPOUTS, "modules.batchnorm._NormBase": NORMS}[base]
        there = {c for c in vars(home).values() if isinstance(c, type) and issubclass(c, common)}
        public = {c for c in there if not c.__name__.startswith(("_", "Lazy"))}
        assert public == set(listed)
        with monkeypatch.context() as context:
            context.setattr(torch_private, "_attribute", lambda root, path: None)
            assert torch_private._layers(base, " ".join(c.__name__ for c in listed)) == listed


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def test_hooks_on_a_gradient():
    weight = nn.Parameter(X.clone())
    assert not torch_private.has_gradient_hooks(weight)
    weight.register_post_accumulate_grad_hook(lambda p: None)
    assert torch_private.has_hooks_after_accumulation(weight)
    assert not torch_private.has_gradient_hooks(weight)
    weight.register_hook(lambda g: g)
    assert torch_private.has_gradient_hooks(weight)


def test_none_is_not_used_up(monkeypatch):
    """In torch 2.6 every change of the stance took a reference from None; after some thousand Python 3.11 ends."""
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    compiled(X)
    weight = nn.Parameter(X.clone())
    before = sys.getrefcount(None)
    for _ in range(200):
        run_pass(lambda: F.dropout(weight, 0.5).sum(), Drop(7))
    assert before - sys.getrefcount(None) < 150
    for lost in (False, True):
        monkeypatch.setattr(torch_private, "_loses_none", lambda lost=lost: lost)
        seen = []
        compiled = torch.compile(lambda x: x * 3, backend=lambda graph, _, seen=seen: seen.append(graph) or graph)
        with torch_private.stance("force_eager"):
            compiled(X)
        assert not seen
        compiled(X)
        assert len(seen) == 1
        torch._dynamo.reset()
