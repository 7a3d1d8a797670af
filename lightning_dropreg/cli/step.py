"""One training step of a configured model, to be looked at instead of taken."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_dropreg.callbacks import PlaceDropout
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.cli.mistakes import check_checkpoint
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.session.base import RegularizerCallback
from lightning_dropreg.session.session import own_step

__all__ = ["QUIET_TRAINER", "FirstStep", "load_weights", "look_at_first_batch", "placing"]

T = TypeVar("T")

QUIET_TRAINER: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "max_epochs": 1,
    "max_steps": -1,
    "max_time": None,
    "accumulate_grad_batches": 1,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "barebones": False,
    "profiler": None,
    "use_distributed_sampler": True,
}
"""Trainer arguments for a run that writes and prints nothing."""


@dataclass(frozen=True)
class FirstStep:
    """The first training batch of a configuration, and the user's step on it.

    Attributes:
        trainer: The trainer that brought it.
        model: The model, set up as ``fit`` does.
        step: Its ``training_step``, in the precision of the trainer.
        args: What the trainer calls it with.
        callbacks: This package's callbacks that mixins of the model brought; they do not act.
    """

    trainer: Trainer
    model: LightningModule
    step: Callable[..., Any]
    args: tuple[Any, ...]
    callbacks: list[RegularizerCallback]

    def loss(self) -> Tensor:
        """Run the step and return its loss."""
        output = self.step(*self.args)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise InvalidArgumentError(
                f"{type(self.model).__name__}.training_step returned {type(loss).__name__}, not a loss: "
                "this command needs automatic optimization."
            )
        return loss


class _Look(Callback):
    def __init__(self, look: Callable[[FirstStep], Any]) -> None:
        self._look = look
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = [callback for callback in callbacks if isinstance(callback, RegularizerCallback)]
        original = own_step(pl_module)  # the step is to be looked at as it is without them
        for callback in ours:
            callback.on_fit_end(trainer, pl_module)  # and the batch goes on without them, which may refuse it
        named = is_param_in_hook_signature(original, "batch_idx", min_args=2)

        def step(*args: Any, **kwargs: Any) -> Any:
            with trainer.precision_plugin.train_step_context():
                return original(*args, **kwargs)

        args = (batch, batch_idx) if named else (batch,)
        self.seen.append(self._look(FirstStep(trainer, pl_module, step, args, ours)))


def look_at_first_batch(cli: DropregCLI, look: Callable[[FirstStep], T]) -> T:
    """Bring the model to its first training batch as ``fit`` would, and call `look` with all that is there."""
    load_weights(cli)
    watcher = _Look(look)
    trainer = cli.instantiate_trainer(callbacks=[*placing(cli), watcher], **{**QUIET_TRAINER, "limit_train_batches": 1})
    trainer.fit(cli.model, datamodule=cli.datamodule)
    if not watcher.seen:
        raise InvalidArgumentError("The training data has no batch.")
    found: T = watcher.seen[0]
    return found


def placing(cli: DropregCLI) -> list[Callback]:
    """Return the configured callbacks that give the model its dropout."""
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, PlaceDropout)]  # type: ignore[attr-defined]


def load_weights(cli: DropregCLI) -> None:
    """Load the weights of the checkpoint that the configuration names, if it names one."""
    path = cli.config.get("ckpt_path")
    if not path:
        return
    check_checkpoint(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        cli.model.load_state_dict(weights["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise InvalidArgumentError(f"--ckpt_path {path} does not fit the configured model: {error}") from error
