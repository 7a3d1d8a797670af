"""What all language models share: carried state, steps, perplexity, optimizer; and what the recurrent ones add."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_dropreg.checks import below_floor, is_integer, is_number, is_probability
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.models.perplexity import MeanPerplexity

__all__ = ["Batch", "LanguageModel", "RecurrentLanguageModel", "Reduction", "adam", "check_ranges", "cross_entropy"]

Batch = tuple[Tensor, Tensor]
Reduction = Literal["mean", "none"]


def adam(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the default optimizer: Adam with learning rate 0.002.

    Args:
        params: What to optimize.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=2e-3)


class LanguageModel(LightningModule):
    """Base of word-level language models; a model says what its cross entropy is, and what state it carries.

    The state is carried, detached, from one training batch to the next and starts as None in every epoch (a run of one
    process that is resumed within an epoch takes it from the checkpoint); evaluation carries one of its own.
    Logs ``train_loss``, ``val_loss``, ``val_ppl``, ``test_loss`` and ``test_ppl``.

    Args:
        vocab_size: Number of words.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes a schedule, stepped every `schedule_interval`, from the optimizer; none by default.
    """

    rows_of_state: ClassVar[int] = 0
    """The dimension of the state's tensors along which the rows of the batch lie."""
    schedule_interval: ClassVar[str] = "epoch"
    """When the schedule of the learning rate advances: ``"epoch"`` or ``"step"``."""

    def __init__(
        self, vocab_size: int, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.val_ppl = MeanPerplexity()
        self.test_ppl = MeanPerplexity()
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        self._train_state: Any = None
        self._eval_state: Any = None

    @abstractmethod
    def cross_entropy(self, text: Tensor, target: Tensor, state: Any, reduction: Reduction) -> tuple[Tensor, Any]:
        """Compute what the model is trained on.

        Args:
            text: Word numbers, ``(batch, time)``.
            target: The words after them, ``(batch, time)``.
            state: What a call for the words before returned; None at the start of a text.
            reduction: ``"mean"`` over all words, or ``"none"``.

        Returns:
            The cross entropy, a scalar or of shape ``(batch, time)``, and the state after the last word.
        """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one window and carry the state on.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.

        Returns:
            Mean cross entropy per word, a scalar.
        """
        text, target = batch
        loss, state = self.cross_entropy(text, target, self._train_state, "mean")
        self._train_state = tree_map(_detached, state)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=target.numel())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one window to the validation loss and perplexity.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.
        """
        self._evaluate("val", self.val_ppl, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one window to the test loss and perplexity.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.
        """
        self._evaluate("test", self.test_ppl, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Score each word after the first.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.

        Returns:
            Log-probability of each following word, of shape ``(batch, time)``.
        """
        losses, self._eval_state = self.cross_entropy(*batch, self._eval_state, "none")
        return -losses

    def configure_optimizers(self) -> Any:
        """Return the optimizer that ``optimizer`` makes, with the schedule that ``lr_scheduler`` makes."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        schedule = {"scheduler": self._make_scheduler(optimizer), "interval": self.schedule_interval}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def setup(self, stage: str) -> None:
        """Check that the data's vocabulary fits the model.

        Args:
            stage: Unused.

        Raises:
            InvalidArgumentError: If the data numbers more words than the model has.
        """
        data = getattr(self.trainer, "datamodule", None)
        words = getattr(data, "vocab_size", self.vocab_size)
        if words > self.vocab_size:
            raise InvalidArgumentError(
                f"{type(data).__name__} numbers up to {words} words, {type(self).__name__} was built for "
                f"vocab_size={self.vocab_size}: give both the same vocab_size."
            )

    def select_rows(self, rows: Tensor, dim: int) -> None:
        """Keep the state of some rows of the batch, for callbacks that run the step on a part of it.

        Args:
            rows: Indices of the rows.
            dim: Their dimension in the batch.
        """
        if dim == 0:
            self._train_state = tree_map(lambda leaf: _select(leaf, self.rows_of_state, rows), self._train_state)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start an epoch without a past.

        Args:
            batch: Unused.
            batch_idx: Number of the batch in the epoch.
        """
        if batch_idx == 0:  # not on_train_epoch_start, which a run resumed between two epochs does not call
            self._train_state = None

    def on_validation_epoch_start(self) -> None:
        """Start the epoch without a past."""
        self._eval_state = None

    def on_test_epoch_start(self) -> None:
        """Start the epoch without a past."""
        self._eval_state = None

    def on_predict_epoch_start(self) -> None:
        """Start the epoch without a past."""
        self._eval_state = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state that the next training batch starts from.

        Args:
            checkpoint: What is saved.
        """
        if self.trainer.world_size == 1:  # a checkpoint is written by one process, and each carries its own
            checkpoint["carried_state"] = self._train_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state that the next training batch starts from.

        Args:
            checkpoint: What was saved.
        """
        state = checkpoint.get("carried_state", checkpoint.get("memory"))  # Transformer-XL once called it memory
        self._train_state = tree_map(lambda leaf: _on(leaf, self.device), state)

    def _evaluate(self, stage: str, metric: MeanPerplexity, batch: Batch) -> None:
        losses, self._eval_state = self.cross_entropy(*batch, self._eval_state, "none")
        metric.update(losses)
        self.log(f"{stage}_loss", losses.mean(), batch_size=losses.numel(), sync_dist=True)
        self.log(f"{stage}_ppl", metric, prog_bar=True)


class RecurrentLanguageModel(LanguageModel):
    """Base of recurrent language models, trained by truncated back-propagation through time.

    A model makes an `embedding`, `layers` that take and return a state, and one dropout more than layers.

    Args:
        vocab_size: Number of words.
        window: Length of the batches that take a full step: others take one with the learning rate times
            length / `window`, which makes up for jittered lengths. None takes the same step whatever the length.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes a schedule, stepped every epoch, from the optimizer; none by default.

    Raises:
        InvalidArgumentError: If `window` is less than 1.
    """

    embedding: nn.Embedding
    layers: nn.ModuleList
    dropouts: nn.ModuleList

    def __init__(
        self,
        vocab_size: int,
        window: int | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(vocab_size, optimizer, lr_scheduler)
        if window is not None and not is_integer(window, 1):
            raise InvalidArgumentError(f"{type(self).__name__}: window={window} must be None or at least 1.")
        self.window = window
        self._length = 0

    @abstractmethod
    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Predict the word after each word.

        Args:
            text: Word numbers, of shape ``(batch, time)``.
            state: What a call for the words before returned; the start of a text by default.

        Returns:
            Logits, of shape ``(batch, time, vocab_size)``, and the state after the last word.
        """

    def hidden(self, text: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run the embedding and the layers, with dropout before and after every layer.

        Args:
            text: Word numbers, of shape ``(batch, time)``.
            state: What a call for the words before returned; None at the start of a text.

        Returns:
            The output of the last layer, ``(batch, time, width)``, and the state of every layer after the last word.
        """
        hidden = self.dropouts[0](self.embedding(text))
        new_state = []
        for index, layer in enumerate(self.layers):
            output, layer_state = layer(hidden, None if state is None else state[index])
            hidden = self.dropouts[index + 1](output)
            new_state.append(layer_state)
        return hidden, new_state

    def cross_entropy(self, text: Tensor, target: Tensor, state: Any, reduction: Reduction) -> tuple[Tensor, Any]:
        """See `LanguageModel.cross_entropy`."""
        logits, state = self(text, state)
        return cross_entropy(logits, target, reduction), state

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, further the longer the window is.

        Args:
            epoch: Unused.
            batch_idx: Unused.
            optimizer: The optimizer.
            optimizer_closure: Computes the gradients.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.window is not None:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self._length / self.window
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start an epoch without a past, and remember the length of the window.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Number of the batch in the epoch.
        """
        super().on_train_batch_start(batch, batch_idx)
        self._length = batch[0].shape[1]


def cross_entropy(logits: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
    """Compute the cross entropy of words.

    Args:
        logits: ``(batch, time, vocab_size)``.
        target: ``(batch, time)``.
        reduction: ``"mean"`` over all words, or ``"none"``.

    Returns:
        A scalar, or a tensor of the shape of `target`.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)
    return losses if reduction == "mean" else losses.view_as(target)


def check_ranges(
    model: str,
    given: Mapping[str, Any],
    floors: Mapping[str, int],
    probabilities: Iterable[str],
    others: Sequence[str] = (),
) -> None:
    """Refuse arguments outside their range, all in one message.

    Args:
        model: Name of the model.
        given: The arguments; ``init_range``, if it is among them, must be above 0.
        floors: The least value of some.
        probabilities: Names of those that must be in ``[0, 1)``.
        others: What else is wrong.

    Raises:
        InvalidArgumentError: If one is outside its range.
    """
    wrong = below_floor(given, floors)
    wrong += [f"{name}={given[name]} (in [0, 1))" for name in probabilities if not is_probability(given[name])]
    if "init_range" in given and (not is_number(given["init_range"]) or given["init_range"] <= 0):
        wrong.append(f"init_range={given['init_range']} (above 0)")
    wrong += others
    if wrong:
        raise InvalidArgumentError(f"{model}: out of range: {', '.join(wrong)}.")


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _select(leaf: Any, dim: int, rows: Tensor) -> Any:
    return leaf.index_select(dim, rows.to(leaf.device)) if isinstance(leaf, Tensor) else leaf


def _on(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
