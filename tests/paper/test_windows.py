"""Windows of random length, and runs that are resumed within an epoch."""

import pytest
import torch
from fits import make_trainer
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from texts import numbers

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.data import LanguageModelingData
from lightning_dropreg.paper.data.windows import StreamWindows, jittered_ends
from lightning_dropreg.paper.models import LSTMLanguageModel, QRNNLanguageModel


def test_lengths_have_their_distribution():
    """Of about 20,500 windows; each bound is more than five standard errors wide."""
    ends = torch.tensor(jittered_ends(20_000 * 70, 70, key=1))
    lengths = ends.diff(prepend=torch.tensor([0])).double()
    assert ends[-1] == 20_000 * 70
    assert lengths.min() >= 5
    short = lengths < 52.5  # three and a half standard deviations from either mean
    assert short.double().mean().item() == pytest.approx(0.05, abs=0.01)
    for part, mean in ((lengths[~short], 70), (lengths[short], 35)):
        assert part.mean().item() == pytest.approx(mean, abs=0.9)
        assert part.std().item() == pytest.approx(5, abs=0.6)


@pytest.mark.parametrize("tokens", [2, 11, 69, 70, 200, 4001])
@pytest.mark.parametrize("window", [10, 70])
def test_every_epoch_is_cut_elsewhere_into_as_many_windows_and_loses_nothing(tokens, window):
    stream = torch.arange(3 * tokens)
    windows = StreamWindows(stream, batch_size=3, window=window, jitter=7)
    epochs = [windows.spans(epoch) for epoch in range(20)]
    assert {len(spans) for spans in epochs} == {len(windows)}
    for spans in epochs:
        pieces = [windows[span] for span in spans]
        assert torch.cat([text for text, _ in pieces], 1).equal(stream.view(3, -1)[:, :-1])
        assert torch.cat([target for _, target in pieces], 1).equal(stream.view(3, -1)[:, 1:])
        assert all(text.shape[1] >= 1 for text, _ in pieces)
    assert epochs[:3] == [StreamWindows(stream, 3, window, jitter=7).spans(epoch) for epoch in range(3)]
    if tokens > 200:
        assert len({tuple(spans) for spans in epochs}) == 20
        assert epochs[0] != StreamWindows(stream, 3, window, jitter=8).spans(0)


def data(**options):
    return LanguageModelingData(
        numbers(400), batch_size=3, eval_batch_size=1, window=20, vocab_size=60, jitter=True, **options
    )


class Watching:
    """Notes the words of every training batch."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), batch[0].flatten().tolist()]


class LSTM(Watching, LSTMLanguageModel):
    pass


class QRNN(Watching, QRNNLanguageModel):
    pass


def fit(make, callbacks=(), **options):
    seed_everything(1, verbose=False)
    model = make(60, 4, 5, window=20)
    callbacks = [*callbacks, dr.ExplicitPenalty(), dr.ImplicitNoise()]
    trainer = make_trainer(callbacks, max_epochs=3, enable_checkpointing=None)
    trainer.fit(model, datamodule=data(), **options)
    return model


@pytest.mark.parametrize("make", [LSTM, QRNN])
def test_a_run_resumed_anywhere_goes_on_as_if_it_had_not_stopped(make, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(make, callbacks=[keep])
    per_epoch = len(whole.seen) // 3
    assert per_epoch > 3
    for step in (1, per_epoch, per_epoch + 2) if make is LSTM else [per_epoch + 2]:
        resumed = fit(make, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert resumed.seen == whole.seen[step:], step
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
            assert a.equal(b), step


def test_windows_depend_on_seed_and_epoch_alone():
    def epochs(num_workers=0, seed=1):
        seed_everything(seed, verbose=False)
        source = data(num_workers=num_workers)
        source.setup("fit")
        loader = source.train_dataloader()
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)  # as Lightning does
            yield [text.tolist() for text, _ in loader]

    first, second = epochs()
    assert [first, second] == list(epochs(num_workers=1))
    assert first != second
    assert first != next(epochs(seed=2))


def test_a_window_too_short_for_jitter():
    with pytest.raises(InvalidArgumentError, match=r"window=9 \(an integer of at least 10\)"):
        LanguageModelingData(numbers(100), window=9, jitter=True)
    with pytest.raises(InvalidArgumentError, match="at least 10"):
        StreamWindows(torch.arange(50), 2, 9, jitter=1)
