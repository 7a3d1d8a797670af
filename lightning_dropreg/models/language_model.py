"""What all recurrent language models share: the carried state, the steps, perplexity and the optimizer."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torchmetrics.text import Perplexity

from lightning_dropreg.checks import below_floor, is_integer, is_number, is_probability
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["Batch", "RecurrentLanguageModel", "adam", "check_ranges"]

Batch = tuple[Tensor, Tensor]


def adam(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the default optimizer: Adam with learning rate 0.002.

    Args:
        params: What to optimize.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=2e-3)


class RecurrentLanguageModel(LightningModule):
    """Base of word-level language models trained by truncated back-propagation through time.

    The state is carried, detached, from one training batch to the next and starts at zero in every epoch (a run of one
    process that is resumed within an epoch takes it from the checkpoint); evaluation carries one of its own.
    Logs ``train_loss``, ``val_loss``, ``val_ppl`` and ``test_ppl``.

    Args:
        vocab_size: Number of words.
        window: Length of the batches that take a full step: others take one with the learning rate times
            length / `window`, which makes up for jittered lengths. None takes the same step whatever the length.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes a schedule, stepped every epoch, from the optimizer; none by default.

    Raises:
        InvalidArgumentError: If `window` is less than 1.
    """

    rows_of_state: ClassVar[int] = 0
    """The dimension of the state's tensors along which the rows of the batch lie."""

    def __init__(
        self,
        vocab_size: int,
        window: int | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        if window is not None and not is_integer(window, 1):
            raise InvalidArgumentError(f"{type(self).__name__}: window={window} must be None or at least 1.")
        self.vocab_size = vocab_size
        self.window = window
        self.val_ppl = Perplexity()
        self.test_ppl = Perplexity()
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        self._train_state: Any = None
        self._eval_state: Any = None
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one window and carry the state on.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.

        Returns:
            Mean cross entropy per word, a scalar.
        """
        text, target = batch
        logits, state = self(text, self._train_state)
        self._train_state = tree_map(_detached, state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
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
        text, target = batch
        logits, self._eval_state = self(text, self._eval_state)
        return -F.cross_entropy(logits.transpose(1, 2), target, reduction="none")

    def configure_optimizers(self) -> Any:
        """Return the optimizer that ``optimizer`` makes, with the schedule that ``lr_scheduler`` makes."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}

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
        """Start an epoch without a past, and remember the length of the window.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Number of the batch in the epoch.
        """
        if batch_idx == 0:  # not on_train_epoch_start, which a run resumed between two epochs does not call
            self._train_state = None
        self._length = batch[0].shape[1]

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
        state = checkpoint.get("carried_state")
        self._train_state = tree_map(lambda leaf: _on(leaf, self.device), state)

    def _evaluate(self, stage: str, metric: Perplexity, batch: Batch) -> None:
        text, target = batch
        logits, self._eval_state = self(text, self._eval_state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        metric.update(logits, target)
        self.log(f"{stage}_loss", loss, batch_size=target.numel(), sync_dist=True)
        self.log(f"{stage}_ppl", metric, prog_bar=True)


def check_ranges(model: str, given: Mapping[str, Any], floors: Mapping[str, int], probabilities: Iterable[str]) -> None:
    """Refuse arguments outside their range, all in one message.

    Args:
        model: Name of the model.
        given: The arguments.
        floors: The least value of some.
        probabilities: Names of those that must be in ``[0, 1)``.

    Raises:
        InvalidArgumentError: If one is outside its range.
    """
    wrong = below_floor(given, floors)
    wrong += [f"{name}={given[name]} (in [0, 1))" for name in probabilities if not is_probability(given[name])]
    if not is_number(given["init_range"]) or given["init_range"] <= 0:
        wrong.append(f"init_range={given['init_range']} (above 0)")
    if wrong:
        raise InvalidArgumentError(f"{model}: out of range: {', '.join(wrong)}.")


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _select(leaf: Any, dim: int, rows: Tensor) -> Any:
    return leaf.index_select(dim, rows.to(leaf.device)) if isinstance(leaf, Tensor) else leaf


def _on(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
