"""The plain transformer language model, and models that carry a state while the step runs on some rows."""

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, make_trainer
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.models import LSTMLanguageModel, TransformerLanguageModel


def tiny(**options):
    return TransformerLanguageModel(
        **{"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 2, "feedforward_dim": 12, **options}
    ).double()


def test_no_word_sees_the_future():
    model, text = tiny().eval(), torch.randint(11, (3, 6))
    other = text.clone()
    other[:, 4:] = 0
    torch.testing.assert_close(model(text)[:, :4], model(other)[:, :4])
    assert not torch.allclose(model(text)[:, 5], model(other)[:, 5])


def test_sites_and_estimators():
    model, text = tiny(), torch.randint(11, (3, 6))
    closure = lambda: F.cross_entropy(model(text).flatten(0, 1), text.flatten())
    assert len(dr.functional.find_sites(closure)) == 1 + 2 * 4
    values = []
    for estimator in ("antithetic", "forward"):
        generator = torch.Generator().manual_seed(1)
        values.append(dr.functional.explicit_penalty(closure, estimator=estimator, step_size=1e-4, generator=generator))
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{"width": 7}, {"drop_prob": 1.0}, {"num_layers": 0}, {"max_length": 0}])
def test_bad_arguments(options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        tiny(**options)


def test_long_windows_are_refused():
    with pytest.raises(InvalidArgumentError, match="max_length"):
        tiny(max_length=3)(torch.zeros(1, 4, dtype=torch.long))


def batches(rows=4):
    text = torch.randint(11, (3, rows, 6))
    return DataLoader([(t, t) for t in text], batch_size=None)


def test_carried_state_of_some_rows():
    """The hidden state is cut down for the rows and comes back whole."""
    model = LSTMLanguageModel(11, 4, 4)
    make_trainer([dr.ExplicitPenalty(batch_fraction=0.5)]).fit(model, batches())
    assert model._train_state[0][0].shape == (1, 4, 4)


def test_carried_state_without_the_hook_is_estimated_on_whole_batches():
    class Carrying(Classifier):
        state = 0.0

        def training_step(self, batch, batch_idx):
            z = self.net(batch[0][:, :4].double()) + self.state
            self.state = z.detach()
            return F.cross_entropy(z, batch[1][:, 0] % 3)

    with pytest.warns(UserWarning, match="the whole batch is taken.*select_rows"):  # from the batch that has a state
        make_trainer([dr.ExplicitPenalty(batch_fraction=0.5)]).fit(Carrying(), batches())
