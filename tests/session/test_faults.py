"""When something goes wrong: nothing half-patched is left, the state is that of a Lightning run; divergence is seen."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from fits import Classifier, make_loader, make_trainer, train

import lightning_dropreg as dr
from lightning_dropreg import errors

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "after backward": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
    "low memory": lambda: [dr.ExplicitPenalty(low_memory=True), dr.ImplicitNoise(low_memory=True)],
    "rows": lambda: [dr.ExplicitPenalty(batch_fraction=0.5)],
    "forward": lambda: [dr.ExplicitPenalty(estimator="forward")],
    "double backward": lambda: [dr.ExplicitPenalty(estimator="double_backward")],
}


class Fragile(Classifier):
    """Has every kind of state, and raises in one of the passes over its second batch."""

    def __init__(self, fault, in_pass, p=0.4, norm=True):
        super().__init__(p=p, norm=norm)
        self.metric = torchmetrics.MeanMetric()
        self.hidden = torch.zeros(())
        self.fault = fault
        self.in_pass = in_pass
        self.count = itertools.count(1).__next__  # a bound method: other counters are put back for every pass

    def training_step(self, batch, batch_idx):
        self.hidden = self.hidden + 1
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss)
        random.random()
        if batch_idx == 1 and self.in_pass == self.count():
            raise self.fault
        return loss


def torch_patches():
    """What the package replaces in torch while a pass runs."""
    import torch.utils.checkpoint as checkpoint

    return (checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction, F.dropout)


def fit_until_the_fault(callbacks, fault, in_pass, **options):
    model = Fragile(fault, in_pass, **options)
    before = torch_patches()
    with pytest.raises(SystemExit if isinstance(fault, KeyboardInterrupt) else type(fault)):
        train(callbacks, make=lambda: model)
    assert torch_patches() == before
    assert not torch.overrides._get_current_function_mode_stack()
    assert not {"training_step", "log"} & set(model.__dict__)
    counts = model.hidden, getattr(model.net[1], "num_batches_tracked", model.hidden), model.metric.weight
    return model, [int(count) for count in counts], (torch.rand(3).tolist(), random.random())


@pytest.mark.parametrize("method", METHODS)
def test_a_fault_in_any_pass_leaves_the_state_of_a_lightning_run(method, monkeypatch):
    """The second step has begun: its state and random numbers are those of the run without dropout that fails there."""
    monkeypatch.setattr("lightning_dropreg.session.looking.is_due", lambda step: False)  # or it would not have begun
    faults = ZeroDivisionError(), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")
    passes = {"forward": (1,), "double backward": (1,), "rows": (1, 2, 3)}.get(method, (1, 2))
    norm = method != "rows"  # which it would refuse
    _, *expected = fit_until_the_fault([], faults[0], 1, p=0.0)
    for fault, in_pass in itertools.product(faults, passes):
        model, *left = fit_until_the_fault(METHODS[method](), fault, in_pass, norm=norm)
        assert left == expected
    model.in_pass = None  # no more faults
    make_trainer([]).fit(model, make_loader())
    assert not norm or model.net[1].num_batches_tracked == 6


def test_a_loss_that_is_not_a_number_is_named_and_nothing_is_trained():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 1 else 1.0)

    for callbacks in (METHODS["algorithm 2"](), METHODS["low memory"](), METHODS["rows"]()):
        with pytest.raises(errors.NonFinitePenaltyError, match="optimizer step 1"):
            train(callbacks, make=Broken)
    model = train([dr.MiniBatchDropout(2)], make=Broken)  # no penalty, no noise: as Lightning, which goes on
    assert len(model.gradients) == 4


def detect(callbacks, make=Classifier, **options):
    detector = dr.DivergenceDetector(**{"every_n_steps": 1, "patience": 2, **options})
    return train([*callbacks, detector], make=make, loader=make_loader(60, 6)), detector


@pytest.mark.parametrize("method", METHODS)
def test_the_detector_is_silent_while_all_is_well_and_changes_nothing(method):
    model, _ = detect(METHODS[method]())
    plain = train(METHODS[method](), loader=make_loader(60, 6))
    for a, b in zip(model.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["algorithm 2", "after backward", "algorithm 4", "low memory"])
def test_the_detector_sees_noise_far_above_the_gradient(method):
    with pytest.raises(errors.DivergenceError, match=r"in 2 optimizer steps, the last of them step 1\."):
        detect(METHODS[method](), noise_ratio=1e-6)


def test_the_detector_sees_a_penalty_far_above_the_loss():
    with pytest.raises(errors.DivergenceError, match="3 optimizer steps, the last of them step 5"):
        detect([dr.ExplicitPenalty()], penalty_ratio=1e-6, every_n_steps=4, patience=3)


def test_the_detector_looks_at_every_step_from_the_first_bad_one_on_and_forgets_after_a_good_one():
    class Loud(dr.DivergenceDetector):
        bad, checked = {3, 4, 6, 7}, []

        def see_penalty(self, penalty, loss):
            step = len(self.checked)
            super().see_penalty(penalty * (1e9 if step in self.bad else 0), loss)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.checked.append(self.due(trainer.global_step))
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    train([dr.ExplicitPenalty(), Loud(every_n_steps=4, patience=3)], loader=make_loader(60, 6))
    # after the regular check of step 3 also 4 and 5, which is good; 6 is not looked at, 7 is
    assert [step for step, due in enumerate(Loud.checked) if due] == [3, 4, 5, 7, 8]


def test_the_detector_refuses_manual_optimization():
    class Manual(Classifier):
        automatic_optimization = False

    with pytest.raises(errors.UnsupportedModuleError, match="Manual optimizes manually"):
        train([dr.ImplicitNoise(), dr.DivergenceDetector()], make=Manual)


def test_the_ratios_are_those_of_their_definition():
    """Just below and just above the value computed by hand in the first step."""
    model = train([dr.ExplicitPenalty(strength=3.0)], max_steps=1)
    metrics = model.trainer.callback_metrics
    ratio = 3 * (metrics["dropreg/explicit_penalty"] / metrics["dropreg/loss"]).item()
    for factor, raises in ((0.999, True), (1.001, False)):
        detector = dr.DivergenceDetector(penalty_ratio=factor * ratio, patience=1, every_n_steps=1)
        callbacks = [dr.ExplicitPenalty(strength=3.0), detector]
        if raises:
            with pytest.raises(errors.DivergenceError):
                train(callbacks, max_steps=1)
        else:
            train(callbacks, max_steps=1)


def test_a_skipped_step_is_not_taken():
    class Weighing(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append(self.net[4].weight.detach().clone())

        def on_before_optimizer_step(self, optimizer):
            pass

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), weight_decay=0.1)

    model, detector = detect(METHODS["algorithm 2"](), make=Weighing, noise_ratio=1e-6, patience=3, action="skip")
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(model.losses)]
    assert moved == [True] + [False] * 8  # the third check and all after it
    assert detector.state_dict() == {"streak": 10, "skipped": 8}
    assert model.trainer.callback_metrics["dropreg/skipped"] == 8


def test_other_strategies_are_refused():
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    from lightning_dropreg.session.ranks import unsupported_strategy
    from lightning_dropreg.step.plan import Plan

    for kind in (DeepSpeedStrategy, FSDPStrategy):
        assert "DDPStrategy" in unsupported_strategy(kind.__new__(kind), Plan(k=2))[0]
        assert not unsupported_strategy(kind.__new__(kind), Plan(k=1))
