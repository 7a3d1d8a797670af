"""Where autograd's derivative is not that of the function: the right value, or a refusal that says where and why."""

import itertools

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import LossNotRecognizedError, UnsupportedOperationError
from lightning_dropreg.functional import explicit_penalty, find_support, implicit_noise
from lightning_dropreg.inspection.derivatives import compare_derivatives

Q = 0.2
FOLLOWING = ["forward", "double_backward", "exact"]
ALL = ["antithetic", *FOLLOWING]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


class Scale(torch.autograd.Function):
    """Gradient reversal with a factor."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -0.1 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


def hooked(h):
    if h.requires_grad:
        h.register_hook(lambda grad: 0.3 * grad)
    return h


def through_numbers(h):
    return torch.tensor(h.tolist())


def without_grad(h):
    with torch.no_grad():
        return h * 1.0


# what happens to the features behind the dropout; with the estimators that are right all the same
WAYS = {
    "no_grad": (without_grad, {"forward"}),
    "detach": (lambda h: h.detach(), {"forward"}),
    "data": (lambda h: h.data, {"forward"}),
    "half_detached": (lambda h: torch.cat([h[:, :2], h[:, 2:].detach()], 1), {"forward"}),
    "numbers": (through_numbers, set()),
    "reversal": (Scale.apply, set()),
    "hook": (hooked, set()),
    "straight_through": (lambda h: h + (h.tanh() - h).detach(), {"forward"}),
    "plain": (lambda h: h, set(FOLLOWING)),
}


class Model(nn.Module):
    """A head on dropped features, to which `way` does something."""

    def __init__(self, way):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.dropout = nn.Dropout(Q)
        self.x, self.y = torch.randn(2, 3), torch.tensor([0, 2])
        self.way = way

    def loss(self):
        return F.cross_entropy(self.head(self.way(self.dropout(torch.tanh(self.body(self.x))))), self.y)


def factors_of(closure, factors):
    """The loss with given factors in the place of dropout, and its gradient as autograd gives it."""
    original = F.dropout
    F.dropout = lambda h, p=0.5, training=True, inplace=False: h * factors
    try:
        return closure()
    finally:
        F.dropout = original


def penalty_by_signs(outputs, y, shape, step=1e-4):
    """Mean over all directions of ``1/2 sum_t w u^T H u``: u by finite steps, H of the cross entropy by autograd."""
    z = factors_of(outputs, torch.ones(shape)).detach()
    h = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), z)
    total, c = 0.0, Q / (1 - Q)
    for entry in range(shape[0] * shape[1]):
        push = torch.zeros(shape).flatten()
        push[entry] = step
        push = push.view(shape)
        u = (factors_of(outputs, 1 + push) - factors_of(outputs, 1 - push)).detach() / (2 * step)
        total = total + c / 2 * torch.einsum("ab,abcd,cd->", u, h, u)
    return total


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", ALL)
def test_the_penalty_is_right_or_refused(way, estimator):
    change, right = WAYS[way]
    model = Model(change)
    outputs = lambda: model.head(model.way(model.dropout(torch.tanh(model.body(model.x)))))
    expected = penalty_by_signs(outputs, model.y, (2, 4))
    value = lambda seed: explicit_penalty(
        model.loss, estimator=estimator, step_size=1e-2, generator=torch.Generator().manual_seed(seed)
    )
    if estimator in right or estimator == "antithetic":
        draws = 1 if estimator == "exact" else 200
        mean = torch.stack([value(seed).detach() for seed in range(draws)]).mean()
        # coefficient of variation below 1: two standard errors are below 0.15; the seeds are fixed
        torch.testing.assert_close(mean, expected, rtol=1e-6 if estimator == "exact" else 0.15, atol=1e-9)
    else:
        with pytest.raises(UnsupportedOperationError, match=r"dropout site .*antithetic|needs: "):
            value(0)


@pytest.mark.parametrize("way", WAYS)
def test_the_noise_is_that_of_the_gradient(way):
    """All estimators that do not refuse agree with central differences of the gradient, in the same directions."""
    change, right = WAYS[way]
    model = Model(change)
    parameters = list(model.parameters())

    def gradient(estimator, step_size=1e-4):
        scalar = implicit_noise(
            model.loss, estimator=estimator, step_size=step_size, generator=torch.Generator().manual_seed(1)
        )
        found = torch.autograd.grad(scalar, parameters, allow_unused=True)
        return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found)])

    expected = gradient("antithetic")
    for estimator in FOLLOWING:
        if estimator in right:
            torch.testing.assert_close(gradient(estimator), expected, rtol=1e-5, atol=1e-8)
        else:
            with pytest.raises(UnsupportedOperationError):
                gradient(estimator)


def test_refusals_say_what_they_found():
    told = {
        "no_grad": "it is 0.*stops",
        "reversal": "-0.1 times.*reverses",
        "hook": "0.3 times",
        "half_detached": "anoth",
    }
    for way, words in told.items():
        with pytest.raises(UnsupportedOperationError, match=words):
            explicit_penalty(Model(WAYS[way][0]).loss, estimator="double_backward")
    with pytest.raises(UnsupportedOperationError, match="3 times"):
        explicit_penalty(Model(Scale.apply).loss, estimator="forward")


def test_support_names_the_site():
    model = Model(Scale.apply)
    second = nn.Dropout(0.5)
    closure = lambda: model.loss() + F.cross_entropy(model.head(second(model.x.repeat(1, 2)[:, :4])), model.y)
    found = find_support(closure).sites
    assert [sorted(each.refused) for each in found] == [["double_backward", "exact", "forward"], []]
    assert "-0.1 times" in found[0].refused["exact"]


def test_a_network_with_kinks_is_not_refused():
    """Small steps hardly ever cross a kink, and where they do the two steps differ and nothing is concluded."""
    net = nn.Sequential(nn.Linear(3, 300), nn.Dropout(Q), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2))
    x, y = torch.randn(200, 3), torch.zeros(200, dtype=torch.long)
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        closure = lambda dtype=dtype: F.cross_entropy(net(x.to(dtype)), y)
        for estimator in ("forward", "double_backward"):
            explicit_penalty(closure, estimator=estimator)
            implicit_noise(closure, estimator=estimator)


class Kinked(nn.Module):
    """A few units with kinks, some of which lie within the finite step; `half` halves gradients on the way."""

    def __init__(self, seed, half=False):
        super().__init__()
        torch.manual_seed(seed)
        width, rows = 4 + seed % 30, 1 + seed % 19
        self.first, self.second, self.last = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.x, self.y, self.half = torch.randn(rows, 16), torch.randint(3, (rows,)), half

    def loss(self):
        h = F.dropout(F.relu(self.first(F.dropout(self.x, Q))), Q)
        if self.half:
            h = h / 2 + h.detach() / 2
        return F.cross_entropy(self.last(F.dropout(F.relu(self.second(h)), Q)), self.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_within_the_step_neither_refuse_nor_hide(dtype):
    """Of 960 networks with a wrong derivative (two losses, four ways) 10 are not seen, where a kink outweighs all.

    With 16 networks that is 0.2 on the average: more than two has a probability below 0.001. In the last four a unit
    stands so near its kink that both steps cross it.
    """
    torch.set_default_dtype(dtype)
    hidden = 0
    for seed in [*range(12), 47, 49, 67, 175]:
        for curvature in ("loss_hessian", None):
            fine = compare_derivatives(Kinked(seed).loss, "double_backward", curvature=curvature)
            assert fine.measured.outcome == "holds", (seed, curvature)
        wrong = compare_derivatives(Kinked(seed, half=True).loss, "double_backward", curvature="loss_hessian")
        hidden += wrong.measured.outcome != "error"
    assert hidden <= 2


def test_values_that_no_gradient_follows_are_no_reason():
    """What is only added to the value of the loss has no part in penalty or noise."""
    model = Model(lambda h: h)
    plus_value = lambda: model.loss() + model.dropout(model.x).square().sum().detach()
    for estimator in ALL:
        assert implicit_noise(plus_value, estimator=estimator).requires_grad
        assert explicit_penalty(plus_value, estimator=estimator) > 0


# --- targets and weights that move --------------------------------------------------------------------------------


def masks(count, q):
    for bits in itertools.product((0.0, 1.0), repeat=count):
        kept = torch.tensor(bits)
        yield kept / (1 - q), float(torch.where(kept > 0, 1 - q, q).prod())


X = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
V = torch.tensor([[0.5, 0.2, 0.1], [-0.3, 0.3, -0.2]], dtype=torch.float64)


def student_and_teacher(loss, own_site=False):
    weight = nn.Parameter(torch.tensor([[0.7, -0.3, 0.5], [0.2, 0.4, -0.6]]))

    def closure():
        h = F.dropout(X, Q)
        with torch.no_grad():
            target = (F.dropout(X, Q) if own_site else h) @ V.T
        return loss(h @ weight.T, target)

    return closure, weight


DIFFERENCES = {
    "mse": F.mse_loss,
    "mse_sum": lambda z, t: F.mse_loss(z, t, reduction="sum"),
    "huber": lambda z, t: F.huber_loss(z, t, delta=100.0),
    "smooth_l1": lambda z, t: F.smooth_l1_loss(z, t, beta=100.0),
}


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_moving_target_of_a_difference(name, estimator):
    """Linear student and teacher, quadratic loss: E[loss] - loss over all masks is what second order gives."""
    closure, weight = student_and_teacher(DIFFERENCES[name])
    expected = sum(probability * factors_of(closure, mask) for mask, probability in masks(3, Q))
    expected = expected - factors_of(closure, torch.ones(3))
    if estimator in {"double_backward", "exact"}:
        with pytest.raises(UnsupportedOperationError, match="detached"):
            explicit_penalty(closure, estimator=estimator)
        return
    values = [
        explicit_penalty(closure, estimator=estimator, generator=torch.Generator().manual_seed(seed))
        for seed in range(300)
    ]
    mean = torch.stack(values).mean()
    torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.0)
    found, right = (torch.autograd.grad(value, weight)[0] for value in (mean, expected))
    torch.testing.assert_close(found, right, rtol=0.15, atol=0.15 * float(right.abs().max()))


MOVING = {
    "soft cross entropy": lambda z, t: F.cross_entropy(z, t.softmax(-1)),
    "kl_div": lambda z, t: F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "bce": lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
    "poisson": lambda z, t: F.poisson_nll_loss(z, t.exp()),
    "gaussian target": lambda z, t: F.gaussian_nll_loss(z, t, torch.ones(1, 2)),
    "gaussian variance": lambda z, t: F.gaussian_nll_loss(z, torch.zeros(1, 2), t.exp()),
    "recognized": lambda z, t: dr.recognize(lambda z, t: (z - t).cosh().log().sum(-1))(z, t).mean(),
    "weighted mse": lambda z, t: F.mse_loss(z, torch.zeros(1, 2), weight=t.exp()),
    "confidence": lambda z, t: (t.sigmoid().amax() * F.cross_entropy(z, torch.tensor([1]), reduction="none")).mean(),
    "focal factor": lambda z, t: (
        (1 - z.detach().softmax(-1)[:, 1]) ** 2 * F.cross_entropy(z, torch.tensor([1]), reduction="none")
    ).mean(),
    "normalized": lambda z, t: F.cross_entropy(z, torch.tensor([1])) / F.cross_entropy(z, torch.tensor([1])).detach(),
    "unrecognized part": lambda z, t: F.cross_entropy(z, torch.tensor([1])) + (z.sum().detach() * PART).square(),
}
PART = nn.Parameter(torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("own_site", [False, True])
@pytest.mark.parametrize("name", MOVING)
def test_what_moves_beside_the_outputs_is_refused(name, own_site):
    closure, _ = student_and_teacher(MOVING[name], own_site)
    for estimator in ALL:
        with pytest.raises((LossNotRecognizedError, UnsupportedOperationError), match=r"noise|detach"):
            explicit_penalty(closure, estimator=estimator)
    # the noise needs nothing of the kind
    assert implicit_noise(closure, estimator="antithetic").isfinite()
    if name not in {"focal factor", "normalized", "unrecognized part"}:
        assert any("noise" in text for each in find_support(closure).losses for text in each.refused.values())


STILL = {
    "teacher in eval mode": lambda z, t: F.kl_div(z.log_softmax(-1), (X @ V.T).softmax(-1), reduction="batchmean"),
    "labels that are the largest": lambda z, t: F.cross_entropy(z, t.argmax(-1)),
    "the same as floats": lambda z, t: F.binary_cross_entropy_with_logits(z, (t > 0).double()),
    "mask": lambda z, t: (F.cross_entropy(z, torch.tensor([1]), reduction="none") * (t.sum(-1) < 9)).sum(),
    "trained scale": lambda z, t: PART.exp() * F.cross_entropy(z, torch.tensor([1])) + PART,
}


@pytest.mark.parametrize("name", STILL)
def test_what_stands_still_or_jumps_is_not_refused(name):
    closure, _ = student_and_teacher(STILL[name])
    for seed in range(30):  # at step 1 a label jumps now and then
        explicit_penalty(
            closure, step_size=1.0 if name != "mask" else 0.1, generator=torch.Generator().manual_seed(seed)
        )


# --- callbacks ----------------------------------------------------------------------------------------------------


class Lit(L.LightningModule):
    def __init__(self, loss):
        super().__init__()
        self.net, self.teacher = nn.Sequential(nn.Linear(3, 4), nn.Dropout(Q)), nn.Linear(4, 2)
        self.head, self.loss = nn.Linear(4, 2), loss

    def training_step(self, batch, batch_idx):
        h = self.net(batch)
        return self.loss(self.head(h), self.teacher(h).detach())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loss, *callbacks, make=Lit, steps=2):
    options = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=list(callbacks), **options)
    trainer.fit(make(loss), DataLoader(torch.randn(4 * steps, 3), batch_size=4))


def test_callbacks_look_before_training():
    fit(F.mse_loss, dr.ExplicitPenalty(), dr.ImplicitNoise())
    fit(F.mse_loss, dr.ExplicitPenalty(estimator="forward"), dr.ImplicitNoise(estimator="forward"))
    fit(MOVING["kl_div"], dr.ImplicitNoise())
    fit(MOVING["kl_div"], dr.MiniBatchDropout(2))
    with pytest.raises(UnsupportedOperationError, match=r"net\.1"):
        fit(F.mse_loss, dr.ExplicitPenalty(estimator="double_backward"))
    with pytest.raises(UnsupportedOperationError, match=r"net\.1"):
        fit(MOVING["kl_div"], dr.ImplicitNoise(estimator="exact"))
    for options in ({}, {"batch_fraction": 0.5}, {"low_memory": True}):
        with pytest.raises(LossNotRecognizedError, match="kl_div.*teacher"):
            fit(MOVING["kl_div"], dr.ExplicitPenalty(**options))


class Later(Lit):
    """After three batches something else begins: a teacher, or a part behind `detach`; or there is no dropout."""

    def training_step(self, batch, batch_idx):
        h = self.net(batch) if self.loss != "nothing dropped" or batch_idx < 3 else self.net[0](batch)
        stopped = h.detach() if self.loss == "stopped" and batch_idx >= 3 else h
        still = self.teacher(batch.new_ones(len(batch), 4)).detach()
        moves = self.loss == "moves" and batch_idx >= 3
        target = (self.teacher(h).detach() if moves else still).softmax(-1)
        return F.kl_div(self.head(stopped).log_softmax(-1), target, reduction="batchmean")


def test_what_begins_to_move_or_to_stop_later_is_refused_when_it_is_looked_at_again():
    with pytest.raises(LossNotRecognizedError, match="kl_div compares"):
        fit("moves", dr.ExplicitPenalty(estimator="antithetic"), make=Later, steps=6)
    for estimator in ("double_backward", "exact"):
        with pytest.raises(UnsupportedOperationError, match="site"):
            fit("stopped", dr.ExplicitPenalty(estimator=estimator), make=Later, steps=6)
    for callback in (dr.ExplicitPenalty(), dr.ExplicitPenalty(estimator="double_backward"), dr.MiniBatchDropout(2)):
        fit("nothing dropped", callback, make=Later, steps=6)
