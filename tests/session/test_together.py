"""Two processes, bfloat16, accumulation and resuming, all at once."""

import contextlib

import lightning as L
import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from ranks import run_on_two_ranks

import lightning_dropreg as dr


class Crash(L.Callback):
    """Saves after a step and ends the run there, as a crash does."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def run(injection, callbacks=(), **kwargs):
    L.seed_everything(1, verbose=False)
    model = Classifier(dtype=torch.float32)
    found = [dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection), *callbacks]
    options = {"devices": 2, "strategy": "ddp", "precision": "bf16-mixed", "accumulate_grad_batches": 2}
    trainer = make_trainer(found, max_epochs=4, use_distributed_sampler=False, **options)
    loader = torch.utils.data.DataLoader(float_data(), batch_size=4)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(model, loader, **kwargs)
    return model


def float_data():
    x, y = make_loader(16, 4).dataset.tensors
    return torch.utils.data.TensorDataset(x.float(), y)


@pytest.mark.parametrize("injection", ["loss", "after_backward"])
def test_a_run_in_bfloat16_on_two_ranks_that_crashed_goes_on_bit_for_bit(tmp_path, injection):
    def check():
        whole = run(injection)
        crashed = run(injection, [Crash(tmp_path / "crash.ckpt")])
        rest = run(injection, ckpt_path=tmp_path / "crash.ckpt")
        return [(m.gradients, m.losses, m.state_dict()) for m in (whole, crashed, rest)]

    ranks = run_on_two_ranks({"runs": check}, tmp_path)
    for rank in ranks:
        assert not isinstance(rank["runs"], str), rank["runs"]
        (whole, _, weights), (first, _, _), (rest, _, resumed) = rank["runs"]
        assert (len(whole), len(first), len(rest)) == (8, 4, 4)
        assert all(torch.equal(a, b) for a, b in zip(whole, first + rest, strict=True))
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    one, two = (rank["runs"][0] for rank in ranks)
    assert all(torch.equal(one[2][name], two[2][name]) for name in one[2])
    assert not torch.equal(one[1][0], two[1][0])  # noise of its own on each
