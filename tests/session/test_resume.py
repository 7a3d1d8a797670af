"""Resuming: after kill -9 the run goes on bit for bit; other settings are refused; other numbers of ranks work."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from fits import Classifier, make_loader, make_trainer, train
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_dropreg as dr
from lightning_dropreg import errors

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "after backward": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
    "rows": lambda: [dr.ExplicitPenalty(batch_fraction=0.5, every_n_steps=2), dr.ImplicitNoise(source="dropout")],
}


class Stateful(torch.utils.data.DataLoader):
    """Goes on in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    at = 0

    def __iter__(self):
        start, self.at = self.at, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.at = (index + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Recorded(Classifier):
    """Writes every loss down, and dies in a given step."""

    def __init__(self, folder, die_at=None, norm=True):
        super().__init__(norm=norm)
        self.folder, self.die_at = Path(folder), die_at

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with (self.folder / "losses.txt").open("a") as file:
            print(self.trainer.global_step, float(outputs["loss"]).hex(), file=file)


def fit(folder, method, die_at=None, resume=False):
    import lightning as L

    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    keep = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False)
    callbacks = [*METHODS[method](), keep]
    L.seed_everything(6 if resume else 5, verbose=False)  # the seed of the checkpoint counts
    model = Recorded(folder, die_at, norm=method != "rows")
    trainer = make_trainer(callbacks, max_epochs=2, enable_checkpointing=True, accumulate_grad_batches=2)
    data = Stateful(make_loader(48, 6).dataset, batch_size=6)
    trainer.fit(model, data, ckpt_path=folder / "last.ckpt" if resume else None)
    torch.save(model.state_dict(), folder / "weights.pt")


@pytest.mark.parametrize("method", METHODS)
def test_after_kill_9_the_run_goes_on_bit_for_bit(tmp_path, method):
    die_at = random.Random(method).randint(2, 6)
    fit(tmp_path / "whole", method)
    child = multiprocessing.get_context("fork").Process(target=fit, args=(tmp_path / "killed", method, die_at))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    fit(tmp_path / "killed", method, resume=True)

    lines = [set((tmp_path / run / "losses.txt").read_text().splitlines()) for run in ("whole", "killed")]
    assert lines[0] == lines[1]  # micro-batches done again after the resumption gave the same once more
    assert len(lines[0]) == 16
    weights = [torch.load(tmp_path / run / "weights.pt") for run in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def checkpoint(path, callbacks):
    train(callbacks, seed=3).trainer.save_checkpoint(path)
    return path


def resume(path, callbacks):
    model = Classifier()
    make_trainer(callbacks, max_epochs=2).fit(model, make_loader(), ckpt_path=path)
    return model


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ([{"strength": 2.0}], [{}], r"ExplicitPenalty had strength=2.0 and has strength=1.0"),
        ([{}], [{"curvature": "identity", "step_size": 0.2}], "curvature='identity'; .*step_size=0.2"),
        ([{}], [{}, None], "written without ImplicitNoise"),
        ([], [{}], "written without ExplicitPenalty"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_unless_told_to_accept(tmp_path, old, new, message):
    def make(options, **more):
        kinds = (dr.ExplicitPenalty, dr.ImplicitNoise)
        return [kind(**{**(given or {}), **more}) for kind, given in zip(kinds, options, strict=False)]

    path = checkpoint(tmp_path / "old.ckpt", make(old))
    with pytest.raises(errors.CheckpointSettingsError, match=message):
        resume(path, make(new))
    assert len(resume(path, make(new, accept_checkpoint_settings=True)).gradients) == 4
    resume(checkpoint(tmp_path / "new.ckpt", make(new)), make(new))


def test_what_only_costs_less_is_no_other_setting(tmp_path):
    path = checkpoint(tmp_path / "one.ckpt", [dr.MiniBatchDropout(2, low_memory=False)])
    resume(path, [dr.MiniBatchDropout(2)])


def test_a_state_of_another_version_is_refused(tmp_path):
    path = checkpoint(tmp_path / "one.ckpt", [dr.MiniBatchDropout(2)])
    content = torch.load(path, weights_only=True)
    content["lightning_dropreg"]["MiniBatchDropout"]["version"] = 99
    torch.save(content, path)
    with pytest.raises(errors.CheckpointSettingsError, match="version 99"):
        resume(path, [dr.MiniBatchDropout(2)])


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_load_with_weights_only(tmp_path, method):
    callbacks = [*METHODS[method](), dr.DivergenceDetector()]
    state = torch.load(checkpoint(tmp_path / "one.ckpt", callbacks), weights_only=True)
    assert {state["lightning_dropreg"][type(c).__name__]["seed"] for c in METHODS[method]()} == {3}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_with_any_number_of_data_workers(workers):
    def run(workers):
        data = torch.utils.data.DataLoader(
            make_loader().dataset, batch_size=6, shuffle=True, num_workers=workers, persistent_workers=False
        )
        return train(METHODS["algorithm 2"](), loader=data)

    ours, alone = run(workers), run(0)
    assert all(torch.equal(a, b) for a, b in zip(ours.gradients + ours.losses, alone.gradients + alone.losses))
