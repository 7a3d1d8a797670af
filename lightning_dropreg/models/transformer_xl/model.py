"""Transformer-XL as a language model to train."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dropreg.checks import below_floor, check_flags, is_integer, is_probability
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.models.perplexity import MeanPerplexity
from lightning_dropreg.models.transformer_xl.adaptive_softmax import AdaptiveSoftmax
from lightning_dropreg.models.transformer_xl.memory import Memory
from lightning_dropreg.models.transformer_xl.network import TransformerXL

__all__ = ["TransformerXLLanguageModel"]

Batch = tuple[Tensor, Tensor]


def adam(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the default optimizer: Adam with learning rate 0.00025.

    Args:
        params: What to optimize.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=2.5e-4)


class TransformerXLLanguageModel(LightningModule):
    """Transformer-XL with an adaptive softmax; the default sizes are those of the paper.

    The memory is carried from one training batch to the next and is empty at the start of every epoch (a run of one
    process that is resumed within an epoch takes it from the checkpoint); evaluation carries one of its own. Logs
    ``train_loss``, ``val_loss``, ``val_ppl``, ``test_loss`` and ``test_ppl``.

    Args:
        vocab_size: Number of words, at least 2, numbered by falling frequency.
        dim: Width of the hidden states and word vectors, even.
        num_layers: Number of layers, at least 1.
        heads: Number of attention heads, at least 1.
        head_dim: Width of each head, at least 1.
        inner_dim: Width of the feed-forward activation, at least 1.
        memory_length: How many earlier words can be attended to, at least 0.
        cutoffs: Number of the first word of each cluster of the adaptive softmax, rising; none for a plain softmax.
        drop_prob: Drop probability, in ``[0, 1)``.
        attention_drop_prob: Drop probability of attention probabilities, in ``[0, 1)``.
        tie_weights: Whether word vectors and output layer are the same.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the schedule of the learning rate, which advances at every step; none by default.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> sizes = {"dim": 8, "num_layers": 2, "heads": 2, "head_dim": 4, "inner_dim": 16, "memory_length": 5}
        >>> model = TransformerXLLanguageModel(vocab_size=50, cutoffs=[10, 30], **sizes)
        >>> loss, memory = model(torch.randint(50, (3, 7)), torch.randint(50, (3, 7)))
        >>> loss.shape
        torch.Size([3, 7])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 410,
        num_layers: int = 16,
        heads: int = 10,
        head_dim: int = 41,
        inner_dim: int = 2100,
        memory_length: int = 150,
        cutoffs: Sequence[int] = (),
        drop_prob: float = 0.1,
        attention_drop_prob: float = 0.0,
        tie_weights: bool = True,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        floors = {"vocab_size": 2, "num_layers": 1, "heads": 1, "head_dim": 1, "inner_dim": 1, "memory_length": 0}
        given = locals()
        wrong = below_floor(given, floors)
        wrong += [
            f"{name}={given[name]} (in [0, 1))"
            for name in ("drop_prob", "attention_drop_prob")
            if not is_probability(given[name])
        ]
        if not is_integer(dim, 2) or dim % 2:
            wrong.append(f"dim={dim} (even, at least 2)")
        check_flags(tie_weights=tie_weights)
        if wrong:
            raise InvalidArgumentError(f"TransformerXLLanguageModel: out of range: {', '.join(wrong)}.")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.vocab_size = vocab_size
        self.network = TransformerXL(
            vocab_size, dim, num_layers, heads, head_dim, inner_dim, memory_length, drop_prob, attention_drop_prob
        )
        self.softmax = AdaptiveSoftmax(dim, vocab_size, cutoffs)
        if tie_weights:
            self.softmax.weight = cast("nn.Parameter", self.network.embedding.weight)
        self.val_ppl = MeanPerplexity()
        self.test_ppl = MeanPerplexity()
        self._make_optimizer = optimizer
        self._make_schedule = lr_scheduler
        self._train_memory: Memory | None = None
        self._eval_memory: Memory | None = None

    def forward(self, text: Tensor, target: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Score the word after each word.

        Args:
            text: Word numbers, ``(batch, time)``.
            target: The words after them, ``(batch, time)``.
            memory: What the last window left; None at the beginning of a text.

        Returns:
            Cross entropy of each target, ``(batch, time)``, and the memory for the next window.
        """
        hidden, memory = self.network(text, memory)
        return self.softmax(hidden, target), memory

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one window and remember it.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.

        Returns:
            Mean cross entropy per word, a scalar.
        """
        text, target = batch
        losses, self._train_memory = self(text, target, self._train_memory)
        loss: Tensor = losses.mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=target.numel())
        return loss

    def select_rows(self, rows: Tensor, dim: int) -> None:
        """Cut the memory down to some rows of a batch; ``batch_fraction`` of the callbacks needs it.

        Args:
            rows: Numbers of the rows.
            dim: Dimension of the batch along which they lie: 0.
        """
        if self._train_memory is not None:
            self._train_memory = [layer.index_select(dim, rows.to(layer.device)) for layer in self._train_memory]

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
        losses: Tensor
        losses, self._eval_memory = self(text, target, self._eval_memory)
        return -losses

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the schedule of its learning rate if there is one."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_schedule is None:
            return optimizer
        schedule = {"scheduler": self._make_schedule(optimizer), "interval": "step"}
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

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the epoch without a past.

        Args:
            batch: Unused.
            batch_idx: Number of the batch in the epoch.
        """
        if batch_idx == 0:  # not on_train_epoch_start, which a run resumed between two epochs does not call
            self._train_memory = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the memory that the next training batch starts with.

        Args:
            checkpoint: What is saved.
        """
        if self.trainer.world_size == 1:  # one process writes it, and each has a memory of its own
            checkpoint["memory"] = self._train_memory

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the memory that the next training batch starts with.

        Args:
            checkpoint: What was saved.
        """
        memory: Memory | None = checkpoint.get("memory")
        self._train_memory = None if memory is None else [layer.to(self.device) for layer in memory]

    def on_validation_epoch_start(self) -> None:
        """Start the epoch without a past."""
        self._eval_memory = None

    def on_test_epoch_start(self) -> None:
        """Start the epoch without a past."""
        self._eval_memory = None

    def on_predict_epoch_start(self) -> None:
        """Start the epoch without a past."""
        self._eval_memory = None

    def _evaluate(self, stage: str, metric: MeanPerplexity, batch: Batch) -> None:
        text, target = batch
        losses, self._eval_memory = self(text, target, self._eval_memory)
        metric.update(losses)
        self.log(f"{stage}_loss", losses.mean(), batch_size=target.numel(), sync_dist=True)
        self.log(f"{stage}_ppl", metric, prog_bar=True)
