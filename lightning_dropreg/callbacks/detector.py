"""Notices when penalty or noise run away from the loss and the gradient they belong to."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_dropreg.checks import SpellsArguments, check_choice, check_count
from lightning_dropreg.errors import DivergenceError, InvalidArgumentError, UnsupportedModuleError

__all__ = ["DivergenceDetector"]

ACTIONS = ("raise", "skip")


class DivergenceDetector(SpellsArguments, Callback):
    """Raises, or skips optimizer steps, when penalty or noise stay far above what they are added to.

    Every `every_n_steps` optimizer steps it compares the penalty (with its strength) with the loss, and the norm of the
    noise in the gradient with the norm of the gradient without it; once something is above its ratio, in every step
    until nothing is. A check costs a backward pass or two and waits for the device; the steps between cost nothing and
    wait for nothing. NaN and infinity count as above everything. With several processes, the check of one counts for
    all. Not checked are the noise under FSDP2, and modules that optimize manually, which are refused.

    Args:
        penalty_ratio: The penalty, or what it is below 0, may be this many times the absolute loss; positive.
        noise_ratio: The noise may be this many times the gradient; positive. A gradient shrinks during training and
            the noise does not, so leave room.
        patience: After how many optimizer steps above a ratio, one after another, something is done; at least 1.
        every_n_steps: Optimizer steps from one check to the next while all is well; at least 1.
        action: ``"raise"``, or ``"skip"``: no step is taken until the ratios are small again. ``dropreg/skipped`` logs
            how many were skipped.

    Raises:
        InvalidArgumentError: If an argument is out of range.

    Example:
        >>> from lightning_dropreg import ExplicitPenalty, ImplicitNoise
        >>> callbacks = [ExplicitPenalty(), ImplicitNoise(), DivergenceDetector(penalty_ratio=5.0)]
    """

    def __init__(
        self,
        penalty_ratio: float = 10.0,
        noise_ratio: float = 100.0,
        patience: int = 3,
        every_n_steps: int = 50,
        action: str = "raise",
    ) -> None:
        for name, ratio in (("penalty_ratio", penalty_ratio), ("noise_ratio", noise_ratio)):
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < float("inf"):
                raise InvalidArgumentError(f"{name}={ratio!r} must be a finite number above 0.")
        check_count("patience", patience)
        check_count("every_n_steps", every_n_steps)
        check_choice("action", action, ACTIONS)
        self.penalty_ratio = penalty_ratio
        self.noise_ratio = noise_ratio
        self.patience = patience
        self.every_n_steps = every_n_steps
        self.action = action
        self._seen: list[Tensor] = []
        self._streak = 0
        self._skipped = 0

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` is checked."""
        return self._streak > 0 or step % self.every_n_steps == self.every_n_steps - 1

    def see_penalty(self, penalty: Tensor, loss: Tensor) -> None:
        """Take note of one batch's penalty and loss; nothing is read yet."""
        self._seen.append(torch.stack([penalty.detach().abs(), self.penalty_ratio * loss.detach().abs()]).float())

    def see_noise(self, noise_norm: Tensor, gradient_norm: Tensor) -> None:
        """Take note of the norms of one batch's noise and gradient; nothing is read yet."""
        self._seen.append(torch.stack([noise_norm, self.noise_ratio * gradient_norm]).float())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be skipped.

        Raises:
            UnsupportedModuleError: If an optimizer unscales its gradients itself, or the module optimizes manually.
        """
        self._seen.clear()
        if not pl_module.automatic_optimization:
            raise UnsupportedModuleError(
                f"{type(pl_module).__name__} optimizes manually, and DivergenceDetector sees automatic steps only. "
                "Leave it out, and watch what is logged as dropreg/explicit_penalty and dropreg/noise_norm."
            )
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        fused = [type(o).__name__ for o in trainer.optimizers if getattr(o, "_step_supports_amp_scaling", False)]
        if self.action == "skip" and scaled and fused:
            raise UnsupportedModuleError(
                f"DivergenceDetector(action='skip') cannot skip the steps of a fused {fused[0]} under a gradient "
                "scaler. Use action='raise', or fused=False."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge what the batches of this step have shown.

        Raises:
            DivergenceError: If that was too much for the last time.
        """
        if not self.due(trainer.global_step):
            return
        pairs = torch.stack(self._seen) if self._seen else torch.zeros(1, 2)
        self._seen.clear()
        value, limit = pairs.T
        above = bool((~(value <= limit)).any())
        if trainer.world_size > 1:
            above = trainer.strategy.reduce_boolean_decision(above, all=False)
        self._streak = self._streak + 1 if above else 0
        if self._streak < self.patience:
            return
        found = (
            f"penalty or noise were above {self.penalty_ratio:g} times the loss or {self.noise_ratio:g} times the "
            f"gradient in {self._streak} optimizer steps, the last of them step {trainer.global_step}"
        )
        if self.action == "raise":
            raise DivergenceError(
                f"Training diverges: {found}. Lower the learning rate or the strength, clip gradients, or raise the "
                "ratios of DivergenceDetector if that is meant."
            )
        if not self._skipped:
            rank_zero_warn(f"DivergenceDetector skips optimizer steps: {found}.")
        self._skipped += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # which optimizers pass over
        pl_module.log("dropreg/skipped", float(self._skipped), on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the batch that raised."""
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the streak, so that a resumed run is judged as an uninterrupted one."""
        return {"streak": self._streak, "skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the streak."""
        self._streak, self._skipped = state_dict["streak"], state_dict["skipped"]
