"""What cannot work is refused by a typed error that says what was found and what to do."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.functional import dropout_loss, explicit_penalty, implicit_noise

ALL = [dr.ExplicitPenalty, dr.ImplicitNoise, lambda: dr.MiniBatchDropout(2), lambda: dr.MiniBatchDropout(1)]


@pytest.mark.parametrize("make", ALL)
def test_no_dropout_site(make):
    class Plain(Classifier):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Identity()

    with pytest.raises(errors.NoDropoutSiteError, match="nothing to regularize"):
        train([make()], make=Plain)


ECONOMICAL = [
    lambda: dr.ExplicitPenalty(batch_fraction=0.25),
    lambda: dr.ImplicitNoise(batch_fraction="auto"),
    dr.RDrop,
]


@pytest.mark.parametrize("make", [*ALL, *ECONOMICAL])
def test_drop_probability_zero(make):
    """Dropout that is off at the moment is no error: the plain loss, and a word about it."""
    with pytest.warns(errors.NoDropoutWarning, match="drop probability 0"):
        model = train([make()], model_options={"p": 0.0})
    torch.testing.assert_close(model.losses, train(model_options={"p": 0.0}).losses)


CALLBACKS = [dr.ExplicitPenalty, dr.ImplicitNoise, dr.MiniBatchDropout, dr.RDrop, dr.MaxNorm, dr.DropoutDiagnostics]


@pytest.mark.parametrize("make", CALLBACKS)
def test_a_misspelt_argument_is_answered_with_the_nearest(make):
    name = next(iter(inspect.signature(make).parameters))
    with pytest.raises(TypeError, match=f"{make.__name__} takes no '{name}e'. Did you mean '{name}'?"):
        make(**{f"{name}e": 1})
    copy.deepcopy(make(*([2] if make is dr.MaxNorm else [])))


def test_evaluation_mode_is_no_dropout():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    with pytest.raises(errors.NoDropoutSiteError, match="training mode"):
        implicit_noise(lambda: net(torch.ones(1, 2)).sum())


NUMBERS = st.one_of(st.floats(), st.integers(), st.booleans(), st.text(max_size=3), st.none())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(value=NUMBERS)
def test_bad_arguments(value):
    """Whatever is passed, a constructor either takes it because it is in range or raises its own error."""

    def number(low, high, closed_low):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        return ok and (low <= value if closed_low else low < value) and value <= high

    def count(low):
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    largest = float.fromhex("0x1.fffffffffffffp+1023")
    cases = [
        (dr.ExplicitPenalty, "strength", number(0, largest, True)),
        (dr.ExplicitPenalty, "step_size", number(1e-8, 1, True)),
        (dr.ExplicitPenalty, "batch_fraction", value is None or number(0, 1, False)),
        (dr.ExplicitPenalty, "batch_dim", count(0)),
        (dr.ExplicitPenalty, "every_n_steps", count(1)),
        (dr.ExplicitPenalty, "curvature", False),
        (dr.ExplicitPenalty, "estimator", False),
        (dr.ExplicitPenalty, "mask", False),
        (dr.ImplicitNoise, "strength", number(0, largest, True)),
        (dr.ImplicitNoise, "source", False),
        (dr.ImplicitNoise, "injection", False),
        (dr.MiniBatchDropout, "k", count(1)),
        *((callback, "attention", False) for callback in (dr.ExplicitPenalty, dr.ImplicitNoise, dr.MiniBatchDropout)),
    ]
    for callback, name, valid in cases:
        if valid:
            callback(**{name: value})
        else:
            with pytest.raises(errors.InvalidArgumentError, match=name):
                callback(**{name: value})


def closure_of(loss):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    return lambda: loss(net(x))


@pytest.mark.parametrize(
    "options", [{"curvature": "hessian"}, {"estimator": "x"}, {"step_size": 0}, {"step_size": 1e-200}, {"mask": "x"}]
)
def test_bad_functional_arguments(options):
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(options))):
        explicit_penalty(closure_of(lambda z: F.mse_loss(z, torch.zeros(5, 2))), **options)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_bad_k(k):
    with pytest.raises(errors.InvalidArgumentError, match="k="):
        dropout_loss(closure_of(torch.sum), k=k)


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
def test_unrecognized_loss(estimator):
    with pytest.raises(errors.LossNotRecognizedError, match="cross_entropy"):
        explicit_penalty(closure_of(lambda z: z.square().sum()), estimator=estimator)
    implicit_noise(closure_of(lambda z: z.square().sum()), estimator=estimator)  # needs no curvature


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
def test_partly_unrecognized_loss(estimator):
    loss = lambda z: F.mse_loss(z, torch.zeros(5, 2)) + 0.1 * z.abs().mean()
    with pytest.raises(errors.LossNotRecognizedError, match="does not lead through a recognized loss"):
        explicit_penalty(closure_of(loss), estimator=estimator)


def test_unrecognized_part_on_a_site_of_the_input():
    class Input(Classifier):
        def training_step(self, batch, batch_idx):
            z = self.net(F.dropout(batch[0], 0.2))
            return F.cross_entropy(z, batch[1]) + z.square().mean()

    with pytest.raises(errors.LossNotRecognizedError):
        train([dr.ExplicitPenalty()], make=Input, model_options={"p": 0.0})


@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
def test_unrecognized_part_on_a_site_of_the_input_without_lightning(estimator):
    net, x = nn.Linear(3, 2), torch.randn(5, 3)

    def closure(weight=0.0):
        h = F.dropout(x, 0.3)
        return F.mse_loss(net(h), torch.zeros(5, 2)) + weight * (net.weight.sum() * h).square().mean()

    with pytest.raises(errors.LossNotRecognizedError, match="does not lead through"):
        explicit_penalty(lambda: closure(1.0), estimator=estimator)
    assert explicit_penalty(lambda: F.mse_loss(net(F.dropout(x, 0.3)), x[:, :2]), estimator=estimator) > 0
    assert x.grad is None
    assert not x.requires_grad


def test_native_dropout():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(errors.UnsupportedSiteError, match=r"native_dropout in .*test_errors.*mask"):
        implicit_noise(lambda: 2 * torch.native_dropout(x, 0.5, True)[0].sum())
    assert implicit_noise(lambda: F.dropout(torch.native_dropout(x, 0.5, False)[0], 0.1).sum()).requires_grad


def test_weight_decay_in_the_loss_is_no_unrecognized_part():
    class Decayed(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.01 * self.net[0].weight.square().sum()

    train([dr.ExplicitPenalty()], make=Decayed)


def test_returned_loss_does_not_depend_on_the_recognized_one():
    def loss(z):
        F.mse_loss(z, torch.zeros(5, 2))
        return nn.Parameter(torch.ones(())) * 2

    with pytest.raises(errors.LossNotRecognizedError, match="does not depend on"):
        explicit_penalty(closure_of(loss))


@pytest.mark.parametrize(
    "loss", [lambda z: 1.0, lambda z: z, lambda z: z.sum().detach(), lambda z: torch.ones(1, dtype=torch.int)]
)
def test_no_scalar_loss(loss):
    with pytest.raises(errors.InvalidArgumentError, match="scalar loss"):
        implicit_noise(closure_of(loss))


def test_training_step_without_loss():
    class NoLoss(Classifier):
        def training_step(self, batch, batch_idx):
            return {"output": 1}

    with pytest.raises(errors.InvalidArgumentError, match="training_step"):
        train([dr.ExplicitPenalty()], make=NoLoss)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


@pytest.mark.parametrize("estimator", ["forward", "double_backward", "exact"])
def test_operation_that_the_estimator_does_not_support(estimator):
    closure = closure_of(lambda z: F.mse_loss(NoForwardMode.apply(z).exp(), torch.zeros(5, 2)))
    with pytest.raises(errors.UnsupportedOperationError, match="(?s)NoForwardMode.*antithetic"):
        explicit_penalty(closure, estimator=estimator)
    assert explicit_penalty(closure, estimator="antithetic").requires_grad


def test_same_callback_twice():
    with pytest.raises(errors.CompositionError, match="2 callbacks of type ExplicitPenalty"):
        train([dr.ExplicitPenalty(), dr.ExplicitPenalty(strength=2.0)])


def test_minibatch_dropout_with_penalty():
    with pytest.raises(errors.CompositionError, match="Algorithm 2"):
        train([dr.MiniBatchDropout(2), dr.ExplicitPenalty()])


def test_callbacks_that_disagree_about_attention():
    with pytest.raises(errors.CompositionError, match=r"ImplicitNoise\(attention='ignore'\)"):
        train([dr.ExplicitPenalty(), dr.ImplicitNoise(attention="ignore")])


def test_all_problems_at_once():
    class Troubled(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net.compile()
            self.net[3].compile()

        def training_step(self, batch, batch_idx):
            z = self.net(DropInside.apply(batch[0]))
            self.manual_backward(F.cross_entropy(z, batch[1]) + z.square().mean())
            self.optimizers().step()

    with pytest.raises(errors.UnsupportedModuleError) as raised:
        train([dr.ExplicitPenalty(estimator="forward")], make=Troubled)
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("has 4 problems:")
    found = ("net is compiled", "net.3 is compiled", "test_errors.py", "does not lead through")
    assert all(part in line for part, line in zip(found, lines[1:], strict=True))


def test_non_finite_penalty_names_step_and_site():
    class Exploding(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.net[0].weight.data.fill_(float("nan"))

    with pytest.raises(errors.NonFinitePenaltyError, match=r"step 2, .*from site net\.3 \(dropout\) on"):
        train([dr.ExplicitPenalty()], make=Exploding)


def test_overflowing_penalty_names_the_largest_site():
    class Exploding(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.net[4].weight.data.mul_(1e200)

    with pytest.raises(errors.NonFinitePenaltyError, match=r"step 1, .*largest is .* at site net\.3"):
        train([dr.ExplicitPenalty(curvature="identity")], make=Exploding)


class DropInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.dropout(x, 0.5)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_dropout_that_is_not_understood():
    layer = nn.Linear(3, 2)
    with pytest.raises(errors.UnsupportedSiteError, match=r"inside the forward of a custom torch\.autograd\.Function"):
        explicit_penalty(lambda: F.mse_loss(DropInside.apply(layer(torch.randn(5, 3))), torch.zeros(5, 2)))


def test_drop_probability_one():
    with pytest.raises(errors.InvalidArgumentError, match="drop probability 1"):
        implicit_noise(lambda: F.dropout(torch.ones(2, requires_grad=True), 1.0).sum())


def test_step_that_does_something_else_every_time():
    calls = []

    def loss(z):
        calls.append(1)
        return F.mse_loss(z if len(calls) % 2 else F.dropout(z, 0.5), torch.zeros(5, 2))

    with pytest.raises(errors.InconsistentPassesError, match="same thing every time"):
        explicit_penalty(closure_of(loss))


def test_every_error_is_one_of_ours():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), (errors.DropregError, Warning))


@pytest.mark.parametrize(
    "loss", [lambda z: F.mse_loss(z, torch.zeros(5, 2)).sqrt(), lambda z: F.mse_loss(z, z * 0) ** 2]
)
@pytest.mark.parametrize("estimator", ["antithetic", "forward", "double_backward", "exact"])
def test_loss_that_is_no_weighted_sum(loss, estimator):
    with pytest.raises(errors.LossNotRecognizedError, match="weighted sum"):
        explicit_penalty(closure_of(loss), estimator=estimator)


@pytest.mark.parametrize("curvature", ["loss_hessian", "identity", "loss_jacobian"])
def test_learned_loss_weight_has_the_right_gradient(curvature):
    net, scale = (
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)).double(),
        nn.Parameter(torch.zeros(())),
    )
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, -100, 1])
    closure = lambda: (-scale).exp().double() * F.cross_entropy(net(x), y) + scale
    values = [explicit_penalty(closure, curvature=curvature, estimator=e) for e in ("exact", "double_backward")]
    for value in values:
        (gradient,) = torch.autograd.grad(value, scale)
        torch.testing.assert_close(gradient.double(), -value.detach())  # R is proportional to exp(-s)


def test_parameters_changed_in_the_step():
    class Averaging(Classifier):
        def training_step(self, batch, batch_idx):
            self.net[4].bias.data.mul_(0.9)
            with torch.no_grad():
                self.net[4].weight.mul_(0.9)
            return super().training_step(batch, batch_idx)

    with pytest.raises(errors.UnsupportedModuleError, match=r"net\.4\.weight.*net\.4\.bias.*on_train_batch_end"):
        train([dr.ExplicitPenalty()], make=Averaging)


@pytest.mark.parametrize("change", ["sorted", "two entries", "rows", "one bit", "sign of nothing"])
def test_parameters_permuted_in_the_step(change):
    """What leaves norm and sum as they are."""

    class Permuting(Classifier):
        def training_step(self, batch, batch_idx):
            weight = self.net[4].weight.data
            if change == "one bit":
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.ones((), dtype=weight.dtype))
            elif change == "sign of nothing":
                weight[0, 0] = -0.0 if str(weight[0, 0].item()) == "0.0" else 0.0
            else:
                made = {"sorted": weight.flatten().sort().values.view_as(weight), "rows": weight.roll(1, 0)}
                first = weight.clone()
                first[0, 0], first[2, 5] = weight[2, 5], weight[0, 0]
                weight.copy_(made.get(change, first))
            return super().training_step(batch, batch_idx)

    with pytest.raises(errors.UnsupportedModuleError, match=r"changes parameters \(net\.4\.weight\)"):
        train([dr.ExplicitPenalty()], make=Permuting)
