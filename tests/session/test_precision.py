"""Reduced precision, gradient scaling, accumulation, and optimizers that do things their own way."""

import contextlib
import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, make_trainer, train
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import errors
from lightning_dropreg.functional import explicit_penalty, implicit_noise
from lightning_dropreg.numerics.noise import fold_key

ALGORITHM_2 = {
    injection: lambda injection=injection: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection)]
    for injection in ("loss", "after_backward")
}


class Transformer(Classifier):
    """A pre-norm block with small outputs: hard on numbers of 8 bits."""

    def __init__(self, p=0.1):
        super().__init__(dtype=torch.float32)
        block = nn.TransformerEncoderLayer(32, 4, 64, p, nn.functional.gelu, batch_first=True)
        self.net = nn.Sequential(nn.Embedding(50, 32), block, nn.Linear(32, 50))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())


def words(rows=32):
    g = torch.Generator().manual_seed(3)
    text = torch.randint(50, (rows, 9), generator=g)
    return torch.utils.data.DataLoader([(text[:, :-1], text[:, 1:])], batch_size=None)


def precision_options(precision, device="cpu"):
    if precision == "16-mixed":
        return {"plugins": MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=2.0**10))}
    return {"precision": precision}


def measured(p, precision, seed, injection, **options):
    model = train(
        ALGORITHM_2[injection](),
        make=Transformer,
        loader=words(),
        seed=seed,
        model_options={"p": p},
        log_every_n_steps=1,
        **precision_options(precision, options.get("accelerator", "cpu").replace("gpu", "cuda")),
        **options,
    )
    metrics = model.trainer.callback_metrics
    return torch.stack([metrics[f"dropreg/{name}"].double().cpu() for name in ("explicit_penalty", "noise_norm")])


def check_against_float32(p, precision, injection, **options):
    seeds = range(3)
    found, expected = (
        torch.stack([measured(p, one, seed, injection, **options) for seed in seeds]).mean(0)
        for one in (precision, "32-true")
    )
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("injection", ALGORITHM_2)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.4])
def test_penalty_and_noise_are_those_of_float32(p, precision, injection):
    """Within 2 %, at the shipped step size; in bfloat16 that adapts to the drop probability."""
    check_against_float32(p, precision, injection)


@pytest.mark.gpu
@pytest.mark.parametrize("injection", ALGORITHM_2)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_penalty_and_noise_are_those_of_float32_on_cuda(precision, injection):
    check_against_float32(0.1, precision, injection, accelerator="gpu")


@pytest.mark.parametrize("how", ["around", "inside", "true"])
def test_the_functions_adapt_the_step_to_bfloat16(how):
    """Penalty and noise as in float32, however the bfloat16 came about; and the pass more leaves no trace."""
    text, targets = next(iter(words()))
    autocast = lambda on: torch.autocast("cpu", torch.bfloat16, enabled=on)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = Transformer(p=0.05).net, nn.BatchNorm1d(50)
            self.hidden = torch.zeros(())

        def forward(self, text, inside):
            with autocast(inside) if inside else contextlib.nullcontext():
                z = self.norm(self.net(text).flatten(0, 1)) / 10
            self.hidden = self.hidden + z.detach().float().square().mean()
            return F.cross_entropy(z, targets.flatten())

    def measured(function, module, how, seed):
        module = copy.deepcopy(module).to(torch.bfloat16 if how == "true" else torch.float32)
        closure = lambda: module(text, how == "inside")
        with autocast(how == "around") if how == "around" else contextlib.nullcontext():
            value = function(closure, module=module, generator=torch.Generator().manual_seed(seed))
        value.backward()
        norm = torch.stack([p.grad.float().norm() for p in module.parameters() if p.grad is not None]).norm()
        return torch.stack([value.detach().float(), norm]), module

    module = Counting()
    for function, part in ((explicit_penalty, 0), (implicit_noise, 1)):
        found = [measured(function, module, how, seed) for seed in range(4)]
        plain = [measured(function, module, "", seed) for seed in range(4)]
        values = [torch.stack([values for values, _ in runs]).mean(0)[part] for runs in (found, plain)]
        torch.testing.assert_close(*values, rtol=0.03, atol=0)
        for (_, a), (_, b) in zip(found, plain, strict=True):
            assert a.norm.num_batches_tracked == 1
            torch.testing.assert_close(a.hidden, b.hidden, rtol=0.01, atol=0)
            torch.testing.assert_close(a.norm.running_var.float(), b.norm.running_var, rtol=0.02, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("injection", ALGORITHM_2)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_waits_for_the_device(precision, injection):
    """Neither a step nor a detector between its checks; the first step is looked at, so it is left out."""

    class Strict(Transformer):
        def on_train_batch_start(self, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx in {2, 3} else "default")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    text = next(iter(words()))
    loader = torch.utils.data.DataLoader([text] * 5, batch_size=None)
    callbacks = [*ALGORITHM_2[injection](), dr.DivergenceDetector(every_n_steps=50)]
    train(callbacks, make=Strict, loader=loader, accelerator="gpu", precision=precision, log_every_n_steps=100)


class Small(Classifier):
    def __init__(self, **options):
        super().__init__(dtype=torch.float32, **options)


FLOATS = {"make": Small, "loader": make_loader(dtype=torch.float32)}


@pytest.mark.parametrize("injection", ALGORITHM_2)
def test_scaled_gradients_get_scaled_noise(injection):
    """With a scaler alone (no autocast) the gradients are those without one, and so are the logged norms."""

    class OnlyScaler(MixedPrecision):
        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

    plugin = OnlyScaler("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    scaled = train(ALGORITHM_2[injection](), plugins=plugin, log_every_n_steps=1, **FLOATS)
    plain = train(ALGORITHM_2[injection](), log_every_n_steps=1, **FLOATS)
    for a, b in zip(scaled.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in ("noise_norm", "grad_norm"):
        metrics = [model.trainer.callback_metrics[f"dropreg/{name}"] for model in (scaled, plain)]
        torch.testing.assert_close(*metrics, rtol=1e-4, atol=0)


@pytest.mark.parametrize("injection", ALGORITHM_2)
def test_a_step_that_the_scaler_skips_is_skipped_whole(injection):
    """A scale beyond float32: every gradient overflows until the scaler has come down."""

    class Weighing(Small):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append([p.detach().clone() for p in self.parameters()])

    plugin = MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    )
    model = train(ALGORITHM_2[injection](), make=Weighing, loader=FLOATS["loader"], plugins=plugin)
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in zip(model.losses, model.losses[1:])]
    assert not torch.isfinite(model.gradients[0]).all()
    L.seed_everything(0, verbose=False)
    fresh = Weighing()
    assert all(torch.equal(a, b) for a, b in zip(model.losses[0], fresh.parameters()))
    assert moved[-1]


@pytest.mark.parametrize("injection", ALGORITHM_2)
def test_a_fused_optimizer_under_a_scaler(injection):
    class Fused(Small):
        fused = True

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01, fused=self.fused)

    class Usual(Fused):
        fused = False

    runs = []
    for make in (Fused, Usual):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        runs.append(
            train(ALGORITHM_2[injection](), make=make, loader=FLOATS["loader"], plugins=plugin, log_every_n_steps=1)
        )
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    norms = [run.trainer.callback_metrics["dropreg/grad_norm"] for run in runs]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=0)
    with pytest.raises(errors.UnsupportedModuleError, match="fused"):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        callbacks = [*ALGORITHM_2[injection](), dr.DivergenceDetector(action="skip")]
        train(callbacks, make=Fused, loader=FLOATS["loader"], plugins=plugin)


class SharedSigns:
    """Gives every example its own noise, whatever batch it comes in."""

    def __init__(self, monkeypatch):
        from lightning_dropreg.passes import directions

        self.noise = torch.randn(24, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64).sign()
        self.at = 0
        monkeypatch.setattr(directions, "random_signs", self.draw)

    def draw(self, shape, dtype, generator, size=1.0):
        if not self.at and generator.initial_seed() in {fold_key(0, position) for position in range(8)}:
            return torch.full(shape, size, dtype=dtype)
        start, self.at = self.at, self.at + shape[0]
        return self.noise[start : start + shape[0]].to(dtype) * size


@pytest.mark.parametrize("injection", ALGORITHM_2)
@pytest.mark.parametrize("rows", [24, 18], ids=["whole window", "short window"])
def test_accumulating_four_batches_is_one_batch_four_times_as_large(injection, rows, monkeypatch):
    """The same noise for every example; a last, shorter window is divided by 4 all the same, as Lightning does."""

    def run(size, n):
        SharedSigns(monkeypatch)
        callbacks = ALGORITHM_2[injection]()
        data = make_loader(24, 24).dataset[:rows]
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=size)
        return train(callbacks, loader=loader, accumulate_grad_batches=n).gradients

    accumulated, whole = run(6, 4), run(rows, 1)
    assert len(accumulated) == len(whole) == 1
    torch.testing.assert_close(accumulated[0], whole[0] * rows / 24, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("injection", ALGORITHM_2)
def test_clipping_acts_after_the_noise(injection):
    class Clipped(Classifier):
        def on_before_zero_grad(self, optimizer):
            if self.net[0].weight.grad is not None:
                self.losses.append(torch.cat([p.grad.reshape(-1) for p in self.parameters()]).norm())

        def on_train_batch_end(self, *_):
            pass

    model = train(ALGORITHM_2[injection](), make=Clipped, gradient_clip_val=1e-3)
    assert all(norm <= 1e-3 * (1 + 1e-6) for norm in model.losses)
    assert all(gradient.norm() > 1e-2 for gradient in model.gradients)  # before clipping


@pytest.mark.parametrize("injection", ALGORITHM_2)
def test_lbfgs_minimizes_one_function_within_a_step(injection):
    """Its closure runs several times in a step, each time with the same noise: as LBFGS by hand."""
    from lightning_dropreg.estimators import antithetic
    from lightning_dropreg.numerics.noise import fold_key

    class Newton(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

        def on_train_batch_start(self, batch, batch_idx):
            self.start = [copy.deepcopy(self.net)]

        def on_train_batch_end(self, *_):
            pass

    model = train(ALGORITHM_2[injection](), make=Newton, max_steps=1, seed=7)
    net, (x, y) = model.start[0], next(iter(make_loader()))
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4)

    def closure():
        optimizer.zero_grad()
        e = antithetic(
            lambda: F.cross_entropy(net(x), y),
            curvature="loss_hessian",
            noise=True,
            step_size=0.1,
            mask="as_model",
            key=fold_key(7, 0, 0, 0),
        )
        # what LBFGS sees as the value does not change its steps without a line search
        (e.loss + e.penalty + e.noise).backward()
        return e.loss

    optimizer.step(closure)
    for a, b in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class LineSearching(Classifier):
    def __init__(self, search=None):
        super().__init__()
        self.search = search

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=2, line_search_fn=self.search)


@pytest.mark.parametrize(
    ("callbacks", "warns"),
    [
        ([dr.ExplicitPenalty()], False),
        ([dr.MiniBatchDropout(1)], False),
        ([dr.ExplicitPenalty(), dr.ImplicitNoise()], True),
        ([dr.MiniBatchDropout(2)], True),
        ([dr.ExplicitPenalty(batch_fraction=0.5)], True),
    ],
    ids=["penalty", "nothing", "noise", "draws", "rows"],
)
def test_noise_that_lbfgs_takes_for_curvature_is_told(callbacks, warns):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(callbacks, make=LineSearching, max_steps=1)
    assert any(issubclass(one.category, errors.NoisySearchWarning) for one in seen) == warns


@pytest.mark.filterwarnings("ignore::lightning_dropreg.errors.NoisySearchWarning")
def test_a_line_search_that_does_not_see_the_noise_is_refused():
    options = {"make": LineSearching, "model_options": {"search": "strong_wolfe"}, "max_steps": 1}
    after = [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")]
    with pytest.raises(errors.UnsupportedModuleError, match="searches along a line"):
        train(after, **options)
    train([dr.ExplicitPenalty(), dr.ImplicitNoise(injection="loss")], **options)


def test_several_optimizers_are_refused_by_lightning_itself():
    class Two(Classifier):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        train(ALGORITHM_2["loss"](), make=Two)


def test_the_step_is_wider_in_bfloat16_only():
    steps = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        model = Transformer()
        trainer = make_trainer([callback := dr.ExplicitPenalty()], max_steps=1, precision=precision)
        seen = []
        model.on_train_batch_end = lambda *_, callback=callback, seen=seen: seen.append(callback._session.plan)
        trainer.fit(model, words())
        steps[precision] = seen[0].penalty.estimation.step_size
    assert steps == {"32-true": 0.1, "bf16-mixed": pytest.approx(0.3), "bf16-true": pytest.approx(0.3)}


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_the_second_derivative_is_that_of_float32(p):
    """It takes a wider step in bfloat16, whose rounding a second difference divides by the square of the step."""
    options = {"make": Classifier, "model_options": {"p": p, "lr": 0.0, "dtype": torch.float32}}
    runs = (
        train(
            [dr.ExplicitPenalty(curvature="full")], loader=make_loader(dtype=torch.float32), precision=name, **options
        )
        for name in ("bf16-mixed", "32-true")
    )
    for one, other in zip(*(run.gradients for run in runs), strict=True):
        assert (one - other).norm() < 0.06 * other.norm()
