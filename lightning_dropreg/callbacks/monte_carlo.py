"""Predictions with dropout on, by ``trainer.predict``."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_dropreg.checks import SpellsArguments, check_choice, check_count, check_integer
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.numerics.context import patched
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.session.others import UndoneAtEnd
from lightning_dropreg.uncertainty import LIKELIHOODS, draw_predictions, first_order_variance, moments
from lightning_dropreg.uncertainty.mode import check_training
from lightning_dropreg.uncertainty.monte_carlo import MASKS

__all__ = ["MonteCarloDropout", "MonteCarloPrediction"]


class MonteCarloPrediction(NamedTuple):
    """What `MonteCarloDropout` predicts for a batch of ``N`` examples; entropies are in nats.

    Attributes:
        outputs: The model's own prediction, without dropout: logits, or values for ``"none"``, ``(N, ...)``.
        mean: Mean over the draws, of probabilities unless the likelihood is ``"none"``.
        variance: Variance over the draws of the same.
        entropy: Predictive entropy; None for ``"none"``.
        mutual_information: The part of it that is disagreement between the draws; None for ``"none"``.
        output_variance: Variance over the draws of the outputs themselves.
        first_order_variance: What that is to first order in the noise, if asked for.
    """

    outputs: Tensor
    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    output_variance: Tensor
    first_order_variance: Tensor | None

    def to_dict(self) -> dict[str, Tensor]:
        """Return what there is by name, without what is None."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __repr__(self) -> str:
        """Return names and shapes; the numbers would fill screens."""
        shapes = (f"{name} {' × '.join(map(str, value.shape))}" for name, value in self.to_dict().items())
        return f"MonteCarloPrediction({', '.join(shapes)})"


class MonteCarloDropout(SpellsArguments, UndoneAtEnd):
    """Lets ``trainer.predict`` return what several draws of dropout say of each example.

    The module's ``predict_step`` is called once as it is and then with dropout on, `passes` times, several of them at
    once by repeating the rows of the batch (not where a mask is shared between rows, or rows depend on each other;
    that is found out by trying). Batch norm stays in evaluation mode; a branch ``if self.training:`` of the module's
    own runs as in training unless `training` says otherwise. Mode, state and random state of the module are
    what they would be after the one plain call. Masks are drawn from a seed, rank, data loader and batch, so a
    prediction can be repeated.

    Gal and Ghahramani, *Dropout as a Bayesian Approximation* (ICML 2016). `outputs` of the result beside `mean` tells
    whether the draws are worth their cost: calibrate both (torchmetrics' ``CalibrationError``, see
    `lightning_dropreg.uncertainty.figures.calibration`).

    Args:
        passes: Number of draws, at least 2.
        chunk: Up to how many draws are made at once, at least 1; fewer where memory runs out.
        likelihood: What the outputs are: ``"categorical"`` or ``"bernoulli"`` logits, or ``"none"`` for values.
        class_dim: Dimension of the classes for ``"categorical"``; 1 for images ``(N, C, H, W)``.
        output: Name (or number) of the field with the outputs, if ``predict_step`` returns a mapping, a tuple or list,
            or an object with attributes; by default ``"logits"``, if there is one.
        first_order: Number of random directions for `lightning_dropreg.uncertainty.first_order_variance`; 0 for none.
        estimator: How these are followed, ``"forward"`` or ``"antithetic"``.
        seed: Seed of the masks; None for that of ``seed_everything``.
        training: Which modules are in training mode while dropout is on: ``"all"`` but batch norm; ``"dropout"``, only
            layers that do nothing but drop, so that branches ``if self.training:`` do what they do in evaluation (and
            functional dropout with ``training=self.training`` drops nothing); or patterns of paths. See
            `lightning_dropreg.uncertainty.mode.dropout_mode`.
        masks: ``"per_batch"``: every example has masks of its own. ``"fixed"``: every draw is one sampled network, the
            same for all examples of all batches, data loaders and ranks, as comparisons between examples need it
            (BatchBALD, a smooth curve over a grid). Needs two passes more for each batch.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.

    Example:
        >>> import lightning
        >>> from torch.utils.data import DataLoader
        >>> class Model(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
        ...     def forward(self, x):
        ...         return self.net(x)
        >>> trainer = lightning.Trainer(
        ...     callbacks=[MonteCarloDropout(passes=16)], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False
        ... )
        >>> batches = trainer.predict(Model(), DataLoader(torch.randn(10, 4), batch_size=5))
        >>> batches[0].mean.shape, batches[0].entropy.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        passes: int = 32,
        chunk: int = 8,
        likelihood: str = "categorical",
        class_dim: int = -1,
        output: str | int | None = None,
        first_order: int = 0,
        estimator: str = "forward",
        seed: int | None = None,
        training: str | Sequence[str] = "all",
        masks: str = "per_batch",
    ) -> None:
        check_count("passes", passes, 2)
        check_count("chunk", chunk)
        check_count("first_order", first_order, 0)
        check_choice("likelihood", likelihood, LIKELIHOODS)
        check_choice("estimator", estimator, ("forward", "antithetic"))
        check_training(training)
        check_choice("masks", masks, MASKS)
        if isinstance(output, bool) or not isinstance(output, (str, int, type(None))):
            raise InvalidArgumentError(f"output={output!r} must be the name or the number of a field, or None.")
        check_integer("class_dim", class_dim)
        if seed is not None:
            check_integer("seed", seed)
        self.passes = passes
        self.chunk = chunk
        self.likelihood = likelihood
        self.class_dim = class_dim
        self.output = output
        self.first_order = first_order
        self.estimator = estimator
        self.seed = seed
        self.training = training
        self.masks = masks
        self._position = (0, 0)
        self._wrapped = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``predict_step`` on the instance."""
        original = pl_module.predict_step
        callback, seed = self, self.seed
        if seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))

        @functools.wraps(getattr(original, "__func__", original))
        def predict_step(self: LightningModule, batch: Any, *args: Any, **kwargs: Any) -> MonteCarloPrediction:
            position = () if callback.masks == "fixed" else (trainer.global_rank, *callback._position)
            key = fold_key(seed, *position)
            return callback.predict(self, lambda b: original(b, *args, **kwargs), batch, key)

        bound = types.MethodType(predict_step, pl_module)
        self._wrapped.enter_context(patched((pl_module, "predict_step", bound)))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which batch it is, whatever arguments ``predict_step`` takes."""
        self._position = (batch_idx, dataloader_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unwrap ``predict_step``."""
        self.undo()

    def predict(self, module: nn.Module, step: Any, batch: Any, key: int) -> MonteCarloPrediction:
        """Predict one batch, without a Trainer too: ``MonteCarloDropout().predict(net, net, x, key=0)``.

        Args:
            module: The module.
            step: Maps a batch to what ``predict_step`` returns.
            batch: The batch.
            key: Seed of the masks.

        Returns:
            The prediction.
        """

        def forward(b: Any) -> Tensor:
            outputs: Tensor = self._outputs_of(step(b))
            return outputs

        draws = draw_predictions(
            forward,
            batch,
            module=module,
            passes=self.passes,
            key=key,
            chunk=self.chunk,
            training=self.training,
            masks=self.masks,
        )
        first_order = None
        if self.first_order:
            first_order = first_order_variance(
                forward,
                batch,
                module=module,
                directions=self.first_order,
                key=fold_key(key, -1),
                chunk=self.chunk,
                estimator=self.estimator,
                training=self.training,
            )
        outputs = forward(batch)  # last, for it leaves the module's state as the next batch is to find it
        found = moments(draws, self.likelihood, self.class_dim)
        return MonteCarloPrediction(outputs, *found, moments(draws, "none").variance, first_order)

    def _outputs_of(self, prediction: Any) -> Any:
        fields = _fields(prediction)
        name = self.output
        if name is None:
            return fields.get("logits", prediction)
        if name in fields:
            return fields[name]
        told = f"the fields {', '.join(map(str, fields))}" if fields else "no fields"
        raise InvalidArgumentError(
            f"output={name!r}, but predict_step returned a {type(prediction).__name__} with {told}."
        )

    def undo(self) -> None:
        """Unwrap ``predict_step``."""
        self._wrapped.close()


def _fields(prediction: Any) -> Mapping[str | int, Any]:
    """What a prediction consists of, by name, and by number in a tuple or list."""
    if isinstance(prediction, Tensor):
        return {}
    if isinstance(prediction, Mapping):
        return prediction
    fields: dict[str | int, Any] = dict(getattr(prediction, "__dict__", {}))
    if isinstance(prediction, (tuple, list)):
        fields |= dict(enumerate(prediction))
        fields |= {name: getattr(prediction, name) for name in getattr(prediction, "_fields", ())}
    return fields
