"""A word-level language model of quasi-recurrent layers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_dropreg.nn import QRNN, AdaptiveSoftmax, LockedDropout
from lightning_dropreg.paper.models.language_model import RecurrentLanguageModel, Reduction, adam, check_ranges

__all__ = ["QRNNLanguageModel"]

State = list[tuple[Tensor, Tensor | None]]


class QRNNLanguageModel(RecurrentLanguageModel):
    """Embedding, QRNN layers and tied decoder, with locked dropout before and after every layer.

    The first layer sees two words at a time, the others one. The state (each layer's cell, and the first layer's last
    input) is carried as in `lightning_dropreg.paper.models.LSTMLanguageModel`. The paper's model for WikiText-103 is
    that of Merity et al. (2018): four layers, ``embedding_dim=400``, ``hidden_dim=2500``, all drop probabilities 0.1.

    Args:
        vocab_size: Number of words, at least 2.
        embedding_dim: Width of the word vectors and of the last layer, at least 1.
        hidden_dim: Width of the other layers, at least 1.
        num_layers: Number of layers, at least 1.
        input_drop_prob: Drop probability, in ``[0, 1)``, of the word vectors.
        hidden_drop_prob: Drop probability, in ``[0, 1)``, between the layers.
        output_drop_prob: Drop probability, in ``[0, 1)``, of the last layer's output.
        init_range: Word vectors start uniform in ``[-init_range, init_range]``, positive.
        optimizer: Makes the optimizer from the parameters.
        window: Length of the batches that take a full step, see
            `lightning_dropreg.paper.models.language_model.RecurrentLanguageModel`.
        lr_scheduler: Makes a schedule, stepped every epoch, from the optimizer; none by default.
        cutoffs: Number of the first word of each cluster of an adaptive softmax, rising, for words numbered by falling
            frequency; none for a plain softmax. Merity et al. use one for WikiText-103.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> model = QRNNLanguageModel(vocab_size=50, embedding_dim=8, hidden_dim=16)
        >>> logits, state = model(torch.randint(50, (4, 7)))
        >>> logits.shape
        torch.Size([4, 7, 50])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 200,
        hidden_dim: int = 400,
        num_layers: int = 4,
        input_drop_prob: float = 0.1,
        hidden_drop_prob: float = 0.1,
        output_drop_prob: float = 0.1,
        init_range: float = 0.1,
        optimizer: OptimizerCallable = adam,
        window: int | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        cutoffs: Sequence[int] = (),
    ) -> None:
        floors = {"vocab_size": 2, "embedding_dim": 1, "hidden_dim": 1, "num_layers": 1}
        probabilities = ["input_drop_prob", "hidden_drop_prob", "output_drop_prob"]
        check_ranges("QRNNLanguageModel", locals(), floors, probabilities)
        super().__init__(vocab_size, window, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        widths = [embedding_dim, *[hidden_dim] * (num_layers - 1), embedding_dim]
        between = [hidden_drop_prob] * (num_layers - 1)
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.layers = nn.ModuleList(
            QRNN(width, next_width, window=1 if index else 2)
            for index, (width, next_width) in enumerate(pairwise(widths))
        )
        self.dropouts = nn.ModuleList(map(LockedDropout, [input_drop_prob, *between, output_drop_prob]))
        self.decoder: nn.Linear | AdaptiveSoftmax
        if cutoffs:
            self.decoder = AdaptiveSoftmax(embedding_dim, vocab_size, cutoffs)
        else:
            self.decoder = nn.Linear(embedding_dim, vocab_size)
        nn.init.uniform_(self.embedding.weight, -init_range, init_range)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = cast("nn.Parameter", self.embedding.weight)

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predict the word after each word.

        Args:
            text: Word numbers, of shape ``(batch, time)``.
            state: Each layer's cell, of shape ``(batch, width)``, and the first layer's last input; the start of a
                text by default.

        Returns:
            Logits, of shape ``(batch, time, vocab_size)``, log-probabilities with `cutoffs`, and the state after the
            last word.
        """
        hidden, state = self.hidden(text, state)
        if isinstance(self.decoder, nn.Linear):
            return self.decoder(hidden), state
        return self.decoder.log_prob(hidden), state

    def cross_entropy(
        self, text: Tensor, target: Tensor, state: State | None, reduction: Reduction
    ) -> tuple[Tensor, State]:
        """See `RecurrentLanguageModel.cross_entropy`; with `cutoffs` it takes the clusters that the targets lie in."""
        if isinstance(self.decoder, nn.Linear):
            return super().cross_entropy(text, target, state, reduction)
        hidden, state = self.hidden(text, state)
        losses = self.decoder(hidden, target)
        return losses.mean() if reduction == "mean" else losses, state
