"""Transformer-XL as a language model to train."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dropreg.checks import check_flags, is_integer
from lightning_dropreg.nn.adaptive_softmax import AdaptiveSoftmax
from lightning_dropreg.paper.models.language_model import LanguageModel, Reduction, check_ranges
from lightning_dropreg.paper.models.transformer_xl.memory import Memory
from lightning_dropreg.paper.models.transformer_xl.network import TransformerXL

__all__ = ["TransformerXLLanguageModel"]


def adam(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the default optimizer: Adam with learning rate 0.00025.

    Args:
        params: What to optimize.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=2.5e-4)


class TransformerXLLanguageModel(LanguageModel):
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

    schedule_interval = "step"

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
        floors = {"vocab_size": 2, "num_layers": 1, "heads": 1, "head_dim": 1, "inner_dim": 1, "memory_length": 0}
        others = [] if is_integer(dim, 2) and dim % 2 == 0 else [f"dim={dim} (even, at least 2)"]
        check_ranges("TransformerXLLanguageModel", locals(), floors, ["drop_prob", "attention_drop_prob"], others)
        check_flags(tie_weights=tie_weights)
        super().__init__(vocab_size, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.network = TransformerXL(
            vocab_size, dim, num_layers, heads, head_dim, inner_dim, memory_length, drop_prob, attention_drop_prob
        )
        self.softmax = AdaptiveSoftmax(dim, vocab_size, cutoffs)
        if tie_weights:
            self.softmax.weight = cast("nn.Parameter", self.network.embedding.weight)

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

    def cross_entropy(
        self, text: Tensor, target: Tensor, state: Memory | None, reduction: Reduction
    ) -> tuple[Tensor, Memory]:
        """See `LanguageModel.cross_entropy`; the state is the memory."""
        losses, memory = self(text, target, state)
        return losses.mean() if reduction == "mean" else losses, memory
