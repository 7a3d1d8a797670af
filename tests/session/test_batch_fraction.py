"""``batch_fraction`` in a real Trainer; its mathematics is in test_rows.py."""

import torch
import torch.nn.functional as F
from fits import Classifier, make_loader, train

import lightning_dropreg as dr


def test_batch_fraction_of_one_gives_the_whole_batch():
    whole = train([dr.ExplicitPenalty(step_size=1e-3), dr.ImplicitNoise(step_size=1e-3)], max_steps=1)
    rows = train(
        [dr.ExplicitPenalty(step_size=1e-3, batch_fraction=1.0), dr.ImplicitNoise(step_size=1e-3, batch_fraction=1.0)],
        max_steps=1,
    )
    torch.testing.assert_close(rows.gradients[0], whole.gradients[0], rtol=1e-4, atol=1e-6)


def test_batch_fraction_is_unbiased_and_keeps_the_noise():
    """Over 300 keys, the mean penalty on a third of the rows and the mean squared noise: three standard errors."""
    torch.set_default_dtype(torch.float64)
    from lightning_dropreg.session.batch import Batch
    from lightning_dropreg.step.plan import Estimation, NoiseSettings, PenaltySettings, Plan

    model, batch = Classifier(), next(iter(make_loader(12, 12)))
    module = type("Silent", (Classifier,), {"log": lambda self, *a, **k: None})()

    def sample(fraction):
        e = Estimation("forward", 0.1, "as_model", fraction, 0)
        plan = Plan(penalty=PenaltySettings(1.0, "loss_hessian", 1, e), noise=NoiseSettings(1.0, "taylor", "loss", e))
        values = []
        for key in range(300):
            runner = Batch(type(module).training_step.__get__(module), (batch, 0), {}, module, True, key)
            with runner.isolation:
                result = plan.run(runner, key, 0)
            gradients = torch.autograd.grad(result.noise, list(module.parameters()), allow_unused=True)
            values.append(
                torch.stack([result.penalty.detach(), sum(g.square().sum() for g in gradients if g is not None)])
            )
        return torch.stack(values)

    whole, third = sample(None), sample(1 / 3)
    error = (whole.mean(0) - third.mean(0)).abs()
    assert (error < 3 * ((whole.var(0) + third.var(0)) / 300).sqrt()).all()
    assert model is not module


def test_noise_on_rows_is_scaled_by_the_fraction_that_was_drawn():
    from lightning_dropreg.estimators.counts import Counts, Rows
    from lightning_dropreg.step.plan import Estimation, NoiseSettings, Plan

    class Runner:
        counting = None

        def __init__(self):
            self.counts = Counts()

        def whole(self, rows=4):
            return F.mse_loss(F.dropout(torch.ones(rows, 1, requires_grad=True), 0.5), torch.zeros(rows, 1))

        run_without_trace = whole

        def rows(self, fraction, dim, key):
            return lambda: self.whole(1), Rows(torch.tensor([0]), 4)

        def forget(self):
            pass

        def paired(self, fraction, dim, key, clean=False):
            return None

        pairs = paired

    plan = Plan(noise=NoiseSettings(1.0, "taylor", "loss", Estimation("antithetic", 0.1, "as_model", 0.1, 0)))
    # sqrt(1/4) (l+ - l-) / 2 eps with l = (1 + eps r)^2 and r = +1 or -1
    torch.testing.assert_close(plan.run(Runner(), 0, 0).noise.abs(), torch.tensor(1.0))
