"""What a fit with the callbacks leaves behind, how it is interrupted and resumed, and whose noise it has."""

import copy

import lightning
import pytest
import torch
from fits import Classifier, make_loader, make_trainer, same, train

import lightning_dropreg as dr


def test_noise_differs_between_steps_and_seeds_and_repeats():
    runs = [train([dr.ImplicitNoise()], seed=s) for s in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0].gradients[0], runs[2].gradients[0])
    one_batch = make_loader(6)  # the same in every epoch, with weights that stay: only the noise differs
    still = train([dr.ImplicitNoise()], loader=one_batch, model_options={"lr": 0.0}, max_epochs=2)
    assert not torch.equal(*still.gradients)


def test_fit_leaves_the_module_as_it_was():
    model, plain = Classifier(), Classifier()
    make_trainer().fit(plain, make_loader())
    make_trainer([dr.ExplicitPenalty(), dr.ImplicitNoise()]).fit(model, make_loader())
    assert set(model.__dict__) == set(plain.__dict__)
    trainer = make_trainer([dr.ExplicitPenalty(), dr.ImplicitNoise()])
    trainer.fit(model, make_loader())
    assert len(model.gradients) == 8


def test_own_training_step_attribute_comes_back():
    model = Classifier()
    own = model.training_step
    model.training_step = own
    make_trainer([dr.ExplicitPenalty()]).fit(model, make_loader())
    assert model.__dict__["training_step"] is own


@pytest.mark.parametrize("when", [0, 3])  # step 2 is looked at before it is taken
def test_fit_that_raises_leaves_the_module_as_it_was(when):
    class Raising(Classifier):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            if batch_idx == when:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Raising()
    with pytest.raises(ZeroDivisionError):
        make_trainer([dr.ExplicitPenalty()]).fit(model, make_loader())
    assert "training_step" not in model.__dict__
    assert "log" not in model.__dict__
    assert model.calls == (when + 1 if when else 0)  # the look at the first step leaves no trace


def test_deepcopy_during_and_after_fit_trains_by_itself():
    copies = []

    class Copying(Classifier):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if not copies:
                self.losses.clear()
                trainer, self._trainer = self._trainer, None
                copies.append(copy.deepcopy(self))
                self._trainer = trainer

    model = Copying()
    make_trainer([dr.ExplicitPenalty()]).fit(model, make_loader())
    copies.append(copy.deepcopy(model))
    for copied in copies:
        copied.log = lambda *args, **kwargs: None
        batch = next(iter(make_loader()))
        assert copied.training_step(batch, 0).requires_grad  # the user's own step, on the copy
        copied.__dict__.pop("log")
        copied.__dict__.pop("training_step", None)
        make_trainer([dr.ExplicitPenalty()]).fit(copied, make_loader())


def test_dict_outputs_and_skipped_batches():
    class Dict(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                return None
            return {"loss": super().training_step(batch, batch_idx), "extra": batch_idx}

        def on_before_optimizer_step(self, optimizer):
            assert (self.net[0].weight.grad is None) == (self.trainer.fit_loop.epoch_loop.batch_idx == 0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx:
                assert outputs["extra"] == batch_idx
                super().on_train_batch_end(outputs, batch, batch_idx)

    assert len(train([dr.ExplicitPenalty(), dr.ImplicitNoise()], make=Dict).losses) == 3


@pytest.mark.parametrize("callbacks", ["algorithm 2", "algorithm 4"])
def test_resume_continues_bit_for_bit(tmp_path, callbacks):
    def make():
        if callbacks == "algorithm 2":
            return [dr.ExplicitPenalty(), dr.ImplicitNoise()]
        return [dr.MiniBatchDropout(2), dr.ImplicitNoise()]

    whole = train(make(), max_epochs=2, seed=3)
    first = train(make(), max_epochs=1, seed=3)
    first.trainer.save_checkpoint(tmp_path / "one.ckpt")
    lightning.seed_everything(4, verbose=False)  # the noise goes on with the seed in the checkpoint
    resumed = Classifier()
    make_trainer(make(), max_epochs=2).fit(resumed, make_loader(), ckpt_path=tmp_path / "one.ckpt")
    assert [torch.equal(a, b) for a, b in zip(whole.gradients[4:], resumed.gradients)] == [True] * 4


def test_seeds_are_those_of_the_run_not_of_the_callback():
    callback = dr.ImplicitNoise()
    first, second = train([callback], seed=1), train([callback], seed=2)
    assert same(first, train([dr.ImplicitNoise()], seed=1))
    assert same(second, train([dr.ImplicitNoise()], seed=2))


def test_micro_batches_have_noise_of_their_own_without_batch_idx():
    keys = []

    class NoIndex(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    from lightning_dropreg.session import session

    class Spy(session.Batch):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            keys.append(kwargs["key"])

    original, session.Batch = session.Batch, Spy
    try:
        train([dr.ImplicitNoise()], make=NoIndex, accumulate_grad_batches=4)
    finally:
        session.Batch = original
    assert len(keys) == len(set(keys)) == 4  # a key for every micro-batch
