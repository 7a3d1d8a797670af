"""A word-level LSTM language model trained by truncated back-propagation through time."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.text import Perplexity

from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["LSTMLanguageModel"]

Batch = tuple[Tensor, Tensor]
State = list[tuple[Tensor, Tensor]]


def adam(params: Iterable[nn.Parameter]) -> Optimizer:
    """Return the default optimizer: Adam with learning rate 0.002.

    Args:
        params: What to optimize.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=2e-3)


class LSTMLanguageModel(LightningModule):
    """Embedding, LSTM layers and decoder, with dropout before and after every layer.

    The hidden state is carried, detached, from one training batch to the next and starts at zero in every
    epoch; evaluation carries one of its own. Logs ``train_loss``, ``val_loss``, ``val_ppl`` and ``test_ppl``.

    Args:
        vocab_size: Number of words, at least 2.
        embedding_dim: Width of the word vectors, at least 1.
        hidden_dim: Width of every LSTM layer, at least 1. With ``tie_weights`` the last one is
            ``embedding_dim`` wide.
        num_layers: Number of LSTM layers, at least 1.
        drop_prob: Probability, in ``[0, 1)``, with which dropout zeroes an entry of the word vectors and of
            each layer's output.
        tie_weights: Decode with the transposed embedding.
        init_range: Word vectors and decoder start uniform in ``[-init_range, init_range]``, positive.
        optimizer: Makes the optimizer from the parameters.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> model = LSTMLanguageModel(vocab_size=50, embedding_dim=8, hidden_dim=16)
        >>> logits, state = model(torch.randint(50, (4, 7)))
        >>> logits.shape
        torch.Size([4, 7, 50])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 200,
        hidden_dim: int = 200,
        num_layers: int = 2,
        drop_prob: float = 0.4,
        tie_weights: bool = True,
        init_range: float = 0.1,
        optimizer: OptimizerCallable = adam,
    ) -> None:
        super().__init__()
        floors = {"vocab_size": 2, "embedding_dim": 1, "hidden_dim": 1, "num_layers": 1}
        given = locals()
        wrong = [f"{name}={given[name]} (at least {floor})" for name, floor in floors.items() if given[name] < floor]
        if not 0 <= drop_prob < 1:
            wrong.append(f"drop_prob={drop_prob} (in [0, 1))")
        if init_range <= 0:
            wrong.append(f"init_range={init_range} (above 0)")
        if wrong:
            raise InvalidArgumentError(f"LSTMLanguageModel: out of range: {', '.join(wrong)}.")
        self.save_hyperparameters(ignore=["optimizer"])
        self.vocab_size = vocab_size
        widths = [
            embedding_dim,
            *[hidden_dim] * (num_layers - 1),
            embedding_dim if tie_weights else hidden_dim,
        ]
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        # One nn.LSTM per layer: between the layers of a single one, dropout is out of a module's sight.
        self.layers = nn.ModuleList(
            nn.LSTM(width, next_width, batch_first=True) for width, next_width in pairwise(widths)
        )
        # One nn.Dropout per place, so that each has a name of its own in `dropreg inspect`.
        self.dropouts = nn.ModuleList(nn.Dropout(drop_prob) for _ in widths)
        self.decoder = nn.Linear(widths[-1], vocab_size)
        nn.init.uniform_(self.embedding.weight, -init_range, init_range)
        nn.init.uniform_(self.decoder.weight, -init_range, init_range)
        nn.init.zeros_(self.decoder.bias)
        if tie_weights:
            self.decoder.weight = self.embedding.weight
        self.val_ppl = Perplexity()
        self.test_ppl = Perplexity()
        self._make_optimizer = optimizer
        self._train_state: State | None = None
        self._eval_state: State | None = None

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predict the word after each word.

        Args:
            text: Word numbers, of shape ``(batch, time)``.
            state: Hidden and cell state of each layer, each of shape ``(1, batch, width)``; zero by default.

        Returns:
            Logits, of shape ``(batch, time, vocab_size)``, and the state after the last word.
        """
        hidden = self.dropouts[0](self.embedding(text))
        new_state: State = []
        for index, layer in enumerate(self.layers):
            output, layer_state = layer(hidden, None if state is None else state[index])
            hidden = self.dropouts[index + 1](output)
            new_state.append(layer_state)
        return self.decoder(hidden), new_state

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
        self._train_state = _detached(state)
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

    def configure_optimizers(self) -> Optimizer:
        """Return the optimizer that ``optimizer`` makes."""
        return self._make_optimizer(self.parameters())

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
        """Keep the hidden state of some rows of the batch, for callbacks that run the step on a part of it.

        Args:
            rows: Indices of the rows.
            dim: Their dimension in the batch.
        """
        if self._train_state is not None and dim == 0:
            rows = rows.to(self.device)
            self._train_state = [(hidden[:, rows], cell[:, rows]) for hidden, cell in self._train_state]

    def on_train_epoch_start(self) -> None:
        """Start the epoch without a past."""
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

    def _evaluate(self, stage: str, metric: Perplexity, batch: Batch) -> None:
        text, target = batch
        logits, self._eval_state = self(text, self._eval_state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        metric.update(logits, target)
        self.log(f"{stage}_loss", loss, batch_size=target.numel(), sync_dist=True)
        self.log(f"{stage}_ppl", metric, prog_bar=True)


def _detached(state: State) -> State:
    return [(hidden.detach(), cell.detach()) for hidden, cell in state]
