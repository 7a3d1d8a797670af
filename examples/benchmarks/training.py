"""One run: a method in a setting, on many seeds at once, through an ordinary Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_dropreg.errors import DropregError
from lightning_dropreg.paper.data import WikiText2

from .attention import ManyTransformers
from .data import Batches, Data, diabetes, digits, friedman
from .many_networks import ManyNetworks
from .methods import ADAM, recipe
from .text import ManyLSTMs, ptb, python_manual

__all__ = ["DATA", "Setting", "train"]

DATA: dict[str, Callable[..., Data]] = {
    "digits": digits,
    "friedman": friedman,
    "diabetes": diabetes,
    "ptb": ptb,
    "python manual": python_manual,
    "ptb 240": partial(ptb, rows=240),
    "wikitext2 240": partial(ptb, corpus=WikiText2, rows=240),
    "ptb 240 x 24": partial(ptb, rows=240, length=24),
}
TEXTS: dict[str, type[ManyNetworks]] = {
    **dict.fromkeys(("ptb", "python manual", "ptb 240", "wikitext2 240"), ManyLSTMs),
    "ptb 240 x 24": ManyTransformers,
}
"""Text, and what learns it."""
TEXT_WIDTH = 32
NOISE_SEED = 1
"""The seed of the Trainer's randomness: what is drawn in training depends on it and on nothing else."""


@dataclass(frozen=True)
class Setting:
    """All that methods which are compared with each other have in common.

    Attributes:
        data: A key of `DATA`.
        label_noise: Probability of a random training label (digits).
        drop_probs: Of the input and of both hidden layers.
        batch_size: Rows of a training batch.
        rate: Learning rate, constant.
        passes: Length of a run: forward and backward passes of a batch. A method that needs two for a step takes half
            as many steps, unless `count_steps`.
        count_steps: Whether `passes` counts steps, whatever they cost.
        evaluations: So many in a run, equally far apart.
        adam: Adam instead of plain SGD, in SAM too.
        silu: SiLU instead of tanh.
    """

    data: str = "digits"
    label_noise: float = 0.4
    drop_probs: tuple[float, float, float] = (0.2, 0.5, 0.5)
    batch_size: int = 200
    rate: float = 0.5
    passes: int = 1000
    count_steps: bool = True
    evaluations: int = 20
    adam: bool = False
    silu: bool = False

    def rows(self, seeds: Sequence[int]) -> Data:
        """Return the data of these seeds."""
        options = {"label_noise": self.label_noise} if self.data == "digits" else {}
        return DATA[self.data](seeds, **options)

    def with_drop_prob(self, q: float) -> Setting:
        """Return the setting with another drop probability; that of the input stays at the same fraction of it."""
        first, hidden, _ = self.drop_probs
        return replace(self, drop_probs=(first / hidden * q, q, q))


def train(
    setting: Setting,
    method: str,
    parameters: dict[str, Any],
    seeds: Sequence[int],
    on_step: Callable[[], None] = lambda: None,
    widths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    each: bool = False,
) -> dict[str, Any]:
    """Train one network for every seed and return what was measured.

    Every network stops by itself: what counts is the test loss at the evaluation where its held-out loss is least.

    Args:
        setting: See `Setting`.
        method: A key of `benchmarks.methods.METHODS`.
        parameters: Of the method; besides, ``q`` and ``rate`` may replace the setting's.
        seeds: One for each network: its split, initial weights and order of the rows, the same for every method.
        on_step: Called after every optimizer step.
        widths: Of the hidden layers.
        dtype: Of the parameters.
        each: Whether to keep the loss of every seed at every evaluation too.

    Returns:
        Lists over seeds (``test``, ``accuracy``, ``held_out``, ``best_step``, ``last_test``), means over seeds at every
        evaluation (``steps``, ``mean_held_out``, ``mean_test``; if `each`, lists of lists, ``each_held_out`` and
        ``each_test``), ``cpu_seconds`` and ``seconds``; ``failed`` instead of all of these if a network's loss became
        infinite.
    """
    parameters = dict(parameters)
    if "q" in parameters:
        setting = setting.with_drop_prob(parameters.pop("q"))
    rate = parameters.pop("rate", setting.rate)
    how = recipe(method, **parameters)
    steps = setting.passes if setting.count_steps else int(setting.passes / how.passes)
    every = max(1, steps // setting.evaluations)
    data = setting.rows(seeds)
    optimizer = ADAM[how.optimizer] if setting.adam else how.optimizer
    networks = TEXTS.get(setting.data, ManyNetworks)(
        data,
        seeds,
        widths or ((TEXT_WIDTH,) if setting.data in TEXTS else (64, 64)),
        drop_probs=setting.drop_probs if how.dropout else (0.0, 0.0, 0.0),
        activation=F.silu if setting.silu else torch.tanh,
        optimizer=lambda parameters: optimizer(parameters, lr=rate, **how.options),
        losses=how.losses,
    ).to(dtype)
    L.seed_everything(NOISE_SEED, verbose=False)
    trainer = L.Trainer(
        max_epochs=max(1, steps // every),
        callbacks=[*how.callbacks, _Steps(on_step)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    nothing = DataLoader(TensorDataset(torch.zeros(1)))  # the module evaluates on rows of its own
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(does not have many workers|is not a DataLoader).*")
            trainer.fit(networks, Batches(data, setting.batch_size, every, seeds), nothing)
    except DropregError as error:  # NonFinitePenaltyError
        return {"failed": str(error)}
    spent = {"cpu_seconds": round(time.process_time() - cpu, 2), "seconds": round(time.perf_counter() - wall, 2)}
    found = best(networks.history, every)
    if each and "failed" not in found:
        parts = {"each_held_out": "held_out_loss", "each_test": "test_loss"}
        found |= {name: [_rounded(point[part]) for point in networks.history] for name, part in parts.items()}
    return {**found, **spent}


def best(history: list[dict[str, Tensor]], every: int) -> dict[str, Any]:
    """Pick for every network the evaluation where its held-out loss is least.

    Args:
        history: See `ManyNetworks`.
        every: Steps between two evaluations.

    Returns:
        See `train`.
    """
    curves = {name: torch.stack([point[name] for point in history]) for name in history[0]}
    held_out = curves["held_out_loss"].nan_to_num(nan=torch.inf)
    if not bool(held_out.isfinite().all()):
        return {"failed": "the held-out loss of a network is not finite"}
    at = held_out.argmin(0)

    def there(name: str) -> list[float]:
        return _rounded(curves[name].gather(0, at[None])[0])

    accuracy = {"accuracy": there("test_accuracy")} if "test_accuracy" in curves else {}
    fitted = {f"mean_{name}": _rounded(curves[name].mean(1)) for name in curves if name.startswith("fitted")}
    return {
        "test": there("test_loss"),
        **accuracy,
        "held_out": there("held_out_loss"),
        "best_step": [every * (int(i) + 1) for i in at],
        "last_test": _rounded(curves["test_loss"][-1]),
        "steps": [every * (i + 1) for i in range(len(history))],
        "mean_held_out": _rounded(held_out.mean(1)),
        "mean_test": _rounded(curves["test_loss"].mean(1)),
        **fitted,
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


class _Steps(L.Callback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_step()


def describe(setting: Setting) -> dict[str, Any]:
    """Return the setting as plain values, for a record."""
    return asdict(setting)
