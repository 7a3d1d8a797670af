"""The LSTM language model."""

import math

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from texts import numbers
from torch.nn import functional as F

from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.data import LanguageModelingData
from lightning_dropreg.paper.models import LSTMLanguageModel, TransformerLanguageModel, TransformerXLLanguageModel
from lightning_dropreg.paper.models.perplexity import MeanPerplexity

SIZES = {"vocab_size": 60, "embedding_dim": 6, "hidden_dim": 9}


def trainer(**options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options)


def batch(rows: int = 3, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(60, (rows, length + 1))
    return text[:, :-1], text[:, 1:]


@pytest.mark.parametrize(("tied", "layers"), [(True, 1), (True, 3), (False, 2)])
def test_shapes(tied, layers):
    model = LSTMLanguageModel(**SIZES, num_layers=layers, tie_weights=tied)
    logits, state = model(batch()[0])
    assert logits.shape == (3, 5, 60)
    assert [h.shape[-1] for h, _ in state] == [9] * (layers - 1) + [6 if tied else 9]
    assert (model.decoder.weight is model.embedding.weight) == tied


def test_forward_in_two_windows_with_the_state_carried_is_forward_in_one():
    model = LSTMLanguageModel(**SIZES).eval()
    text, _ = batch(length=8)
    whole, _ = model(text)
    first, state = model(text[:, :3])
    second, _ = model(text[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


def test_loss_equals_a_hand_computation():
    model = LSTMLanguageModel(**SIZES, num_layers=1, drop_prob=0.0)
    text, target = batch()
    with torch.no_grad():
        output, _ = model.layers[0](model.embedding(text))
        logits = output @ model.embedding.weight.T + model.decoder.bias
        by_hand = -sum(
            torch.log(torch.exp(logits[r, t, target[r, t]]) / torch.exp(logits[r, t]).sum())
            for r in range(3)
            for t in range(5)
        )
        loss = model.training_step((text, target), 0)
    torch.testing.assert_close(loss, by_hand / 15)


def test_the_state_is_carried_and_detached():
    model = LSTMLanguageModel(**SIZES, drop_prob=0.0)
    one, two = batch(), batch()
    first = model.training_step(one, 0)
    second = model.training_step(two, 1)
    _, state = model(one[0])
    torch.testing.assert_close(second, F.cross_entropy(model(two[0], state)[0].flatten(0, 1), two[1].flatten()))
    second.backward()  # and not through the first window, whose graph is gone
    first.backward()
    assert all(not h.requires_grad for pair in model._train_state for h in pair)


def test_the_state_starts_at_zero_in_every_epoch_and_evaluation_has_its_own():
    states: list[object] = []

    class Watched(LSTMLanguageModel):
        def training_step(self, batch, batch_idx):
            states.append(("train", batch_idx, self._train_state is None))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            before = self._train_state
            states.append(("val", batch_idx, self._eval_state is None))
            super().validation_step(batch, batch_idx)
            assert self._train_state is before

    data = LanguageModelingData(numbers(400), batch_size=5, eval_batch_size=2, window=7, vocab_size=60)
    fit = trainer(num_sanity_val_steps=0, limit_train_batches=3, val_check_interval=2)
    fit.fit_loop.max_epochs = 2
    fit.fit(Watched(**SIZES), datamodule=data)
    assert {(stage, index) for stage, index, fresh in states if fresh} == {("train", 0), ("val", 0)}
    assert len([s for s in states if s == ("train", 0, True)]) == 2


def test_validation_and_test_perplexity_are_exp_of_the_mean_loss_per_word():
    data = LanguageModelingData(numbers(400), eval_batch_size=1, window=7, vocab_size=60)
    model = LSTMLanguageModel(**SIZES)
    [metrics] = trainer().validate(model, datamodule=data, verbose=False)
    assert metrics["val_ppl"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)
    [metrics] = trainer().test(model, datamodule=data, verbose=False)
    assert metrics["test_ppl"] == pytest.approx(math.exp(metrics["test_loss"]), rel=1e-4)


def test_predict_scores_every_word():
    data = LanguageModelingData(numbers(400), eval_batch_size=1, window=7, vocab_size=60)
    model = LSTMLanguageModel(**SIZES)
    scores = torch.cat(trainer().predict(model, datamodule=data), dim=1)
    [metrics] = trainer().test(model, datamodule=data, verbose=False)
    assert scores.shape == (1, sum(text.shape[1] for text, _ in data.test_dataloader()))
    assert -scores.mean().item() == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_the_initial_weights_depend_on_the_seed_alone():
    def weights(drop_prob: float) -> list[torch.Tensor]:
        seed_everything(3, verbose=False)
        return list(LSTMLanguageModel(**SIZES, drop_prob=drop_prob).state_dict().values())

    assert all(a.equal(b) for a, b in zip(weights(0.0), weights(0.5), strict=True))


@pytest.mark.parametrize("wrong", [{"drop_prob": 1.0}, {"drop_prob": -0.1}, {"vocab_size": 1}, {"num_layers": 0}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        LSTMLanguageModel(**{**SIZES, **wrong})


@pytest.mark.parametrize("kind", [LSTMLanguageModel, TransformerLanguageModel, TransformerXLLanguageModel])
def test_a_vocabulary_larger_than_the_model_is_refused(kind):
    data = LanguageModelingData(numbers(400), vocab_size=61)
    with pytest.raises(InvalidArgumentError, match="vocab_size=60"):
        trainer(fast_dev_run=True).fit(kind(vocab_size=60, num_layers=1), datamodule=data)


def test_a_model_that_diverged_has_no_perplexity():
    metric = MeanPerplexity()
    metric.update(torch.tensor([1.0, math.nan]))
    assert metric.compute().isnan()
