"""Manual steps that look at gradients and move parameters themselves train, at drop probability 0, as without us."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, train

import lightning_dropreg as dr
from lightning_dropreg import errors

METHODS = {
    "k": lambda: [dr.MiniBatchDropout(2)],
    "penalty": lambda: [dr.ExplicitPenalty()],
    "noise": lambda: [dr.ImplicitNoise()],
    "algorithm 2": lambda: [dr.ExplicitPenalty(low_memory=True), dr.ImplicitNoise(low_memory=True)],
}


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization as its users have it: two methods, and the optimizer that it wraps."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"rho": 0.2})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.5)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["before"] = p.data.clone()
            p.add_(p.grad * 0.2 / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = self.state[p]["before"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure=None):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class ByHand(Classifier):
    def __init__(self, way, p=1e-9):
        super().__init__(p)
        self.automatic_optimization, self.way = False, way
        self.average = torch.nn.Linear(4, 8).double().requires_grad_(False)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return Sam(trained, 0.1) if self.way.startswith("sam") else torch.optim.SGD(trained, 0.1, momentum=0.5)

    def on_before_optimizer_step(self, optimizer):
        """Nothing to write down."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        """Nothing to write down."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        loss = lambda scale=1.0: F.cross_entropy(scale * self.net(x), y)
        getattr(self, self.way.replace(" ", "_"))(optimizer, loss)

    def parts(self):
        return list(self.net.parameters())

    def normalized(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        norm = torch.stack([p.grad.norm() for p in self.parts()]).norm()
        for p in self.parts():
            p.grad.div_(norm)
        optimizer.step()

    def surgery(self, optimizer, loss):
        """Two tasks whose gradients are projected on each other's normal plane."""
        found = []
        for scale in (1.0, -0.5):
            optimizer.zero_grad()
            self.manual_backward(loss(scale))
            found.append([p.grad.clone() for p in self.parts()])
        for p, a, b in zip(self.parts(), *found):
            p.grad = a + b - torch.clamp((a * b).sum(), max=0.0) / b.square().sum() * b
        optimizer.step()

    def weighted_by_gradients(self, optimizer, loss):
        """The second loss depends on the gradient of the first, and on parameters that were stepped in between."""
        optimizer.zero_grad()
        self.manual_backward(loss())
        weight = self.net[0].weight.grad.norm().detach()
        optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(weight * loss(2.0))
        optimizer.step()

    def averaged(self, optimizer, loss):
        """A moving average of parameters, kept by hand, on which the second loss depends."""
        for _ in range(2):
            optimizer.zero_grad()
            with torch.no_grad():
                distance = (self.average.weight - self.net[0].weight).square().mean()
            self.manual_backward((1 + distance) * loss())
            optimizer.step()
            self.average.weight.data.mul_(0.5).add_(self.net[0].weight.data, alpha=0.5)

    def clamped(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        self.net[0].weight.data.clamp_(-0.1, 0.1)
        optimizer.step()
        for p in self.parts():
            p.data.clamp_(-0.3, 0.3)

    def sam(self, optimizer, loss):
        self.manual_backward(loss())
        optimizer.first_step(zero_grad=True)
        self.manual_backward(loss())
        optimizer.second_step(zero_grad=True)

    def sam_in_place(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        moves = [0.2 * p.grad / (1 + p.grad.norm()) for p in self.parts()]
        with torch.no_grad():
            torch._foreach_add_(self.parts(), moves)
        optimizer.zero_grad()
        self.manual_backward(loss())
        with torch.no_grad():
            torch._foreach_sub_(self.parts(), moves)
        optimizer.base_optimizer.step()

    def sam_closure(self, optimizer, loss):
        self.manual_backward(loss())
        optimizer.step(lambda: [optimizer.zero_grad(), self.manual_backward(loss())])


def fit(way, callbacks, p=1e-9, make=None):
    L.seed_everything(1, verbose=False)
    model = (make or ByHand)(way, p)
    make_trainer(callbacks).fit(model, make_loader())
    return model


WAYS = ("normalized", "surgery", "weighted by gradients", "averaged", "clamped", "sam", "sam in place")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_dropped_is_nothing_changed(method, way):
    ours, plain = fit(way, METHODS[method]()), fit(way, [])
    for p, q in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_one_draw_of_dropout_leaves_all_as_it_is(way):
    ours, plain = fit(way, [dr.MiniBatchDropout(1)], 0.4), fit(way, [], 0.4)
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_an_optimizer_that_moves_before_it_calls_its_closure_is_refused():
    with pytest.raises(errors.UnsupportedModuleError, match="first_step, manual_backward, second_step"):
        fit("sam closure", [dr.ImplicitNoise()])


class Later(ByHand):
    def training_step(self, batch, batch_idx):
        self.way = "normalized" if self.trainer.global_step == 2 else "plain"
        super().training_step(batch, batch_idx)

    def plain(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()


def test_what_begins_to_read_gradients_later_is_right_after_its_only_backward():
    """Reading after the last backward concerns no pass."""
    models = []
    for callbacks in ([dr.MiniBatchDropout(2)], []):
        L.seed_everything(1, verbose=False)
        models.append(Later("plain"))
        make_trainer(callbacks).fit(models[-1], make_loader())
    for p, q in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


class Intermediate(ByHand):
    """Reads a gradient that no pass can leave: of hidden features, or of the input (adversarial training)."""

    def hidden(self, optimizer, loss):
        h = self.net[:3](self.x)
        h.retain_grad()
        self.manual_backward(F.cross_entropy(self.net[3:](h), self.y))
        self.scale_by(h.grad, optimizer)

    def input(self, optimizer, loss):
        x = self.x.clone().requires_grad_()
        self.manual_backward(F.cross_entropy(self.net(x), self.y))
        self.scale_by(x.grad, optimizer)

    def scale_by(self, gradient, optimizer):
        if gradient is not None:  # silently left out
            for parameter in self.parts():
                parameter.grad.div_(1 + gradient.norm())
        optimizer.step()
        optimizer.zero_grad()

    def asked(self, optimizer, loss):
        x = self.x.clone().requires_grad_()
        value = F.cross_entropy(self.net(x), self.y)
        gradient = torch.autograd.grad(value, x, retain_graph=True)[0]
        self.manual_backward(value)
        self.scale_by(gradient, optimizer)

    def training_step(self, batch, batch_idx):
        self.x, self.y = batch
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("way", ["hidden", "input"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_what_is_no_parameter_are_refused_before_training(method, way):
    with pytest.raises(errors.UnsupportedModuleError, match=r"no parameter.*torch\.autograd\.grad"):
        fit(way, METHODS[method](), make=Intermediate)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_an_input_by_autograd_are_no_trouble(method):
    ours, plain = fit("asked", METHODS[method](), make=Intermediate), fit("asked", [], make=Intermediate)
    for p, q in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_retained_gradients_of_an_automatic_step_are_warned_of():
    class Retains(Classifier):
        def training_step(self, batch, batch_idx):
            self.hidden = self.net[:3](batch[0])
            self.hidden.retain_grad()
            return F.cross_entropy(self.net[3:](self.hidden), batch[1])

    with pytest.warns(UserWarning, match=r"calls retain_grad\(\) in Retains \(test_manual"):
        train([dr.ExplicitPenalty()], make=Retains)
