"""A word-level LSTM language model: with its defaults a small one, with all its options the paper's."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_dropreg.checks import check_flags, is_one_of
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.nn import LockedDropout, WeightDrop
from lightning_dropreg.paper.models.language_model import RecurrentLanguageModel, adam, check_ranges

__all__ = ["LSTMLanguageModel"]

State = list[tuple[Tensor, Tensor]]
DROPOUTS: dict[str, Callable[[float], nn.Module]] = {"elementwise": nn.Dropout, "locked": LockedDropout}


class LSTMLanguageModel(RecurrentLanguageModel):
    """Embedding, LSTM layers and decoder, with dropout before and after every layer.

    The hidden state is carried, detached, from one training batch to the next and starts at zero in every
    epoch; evaluation carries one of its own. Logs ``train_loss``, ``val_loss``, ``val_ppl`` and ``test_ppl``.

    The paper's model is that of Merity et al. (2018): three layers, ``embedding_dim=400``, ``hidden_dim=1150``,
    ``dropout="locked"``, ``weight_drop_prob=0.4``. The initial weights depend on the seed and the sizes alone, not on
    what is dropped.

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
        dropout: ``"elementwise"``, or ``"locked"``: one mask for all words of a window.
        weight_drop_prob: Probability, in ``[0, 1)``, with which DropConnect zeroes an entry of each layer's
            hidden-to-hidden matrix.
        window: Length of the batches that take a full step, see
            `lightning_dropreg.paper.models.language_model.RecurrentLanguageModel`; None takes the same step
            whatever the length.
        lr_scheduler: Makes a schedule, stepped every epoch, from the optimizer; none by default.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> model = LSTMLanguageModel(vocab_size=50, embedding_dim=8, hidden_dim=16)
        >>> logits, state = model(torch.randint(50, (4, 7)))
        >>> logits.shape
        torch.Size([4, 7, 50])
    """

    rows_of_state = 1

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
        dropout: Literal["elementwise", "locked"] = "elementwise",
        weight_drop_prob: float = 0.0,
        window: int | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        floors = {"vocab_size": 2, "embedding_dim": 1, "hidden_dim": 1, "num_layers": 1}
        check_ranges("LSTMLanguageModel", locals(), floors, ["drop_prob", "weight_drop_prob"])
        super().__init__(vocab_size, window, optimizer, lr_scheduler)
        check_flags(tie_weights=tie_weights)
        if not is_one_of(dropout, DROPOUTS):
            raise InvalidArgumentError(f"LSTMLanguageModel: dropout={dropout!r} is not one of {', '.join(DROPOUTS)}.")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        widths = [
            embedding_dim,
            *[hidden_dim] * (num_layers - 1),
            embedding_dim if tie_weights else hidden_dim,
        ]
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        # One nn.LSTM per layer: between the layers of a single one, dropout is out of a module's sight.
        layers: list[nn.Module] = [nn.LSTM(*pair, batch_first=True) for pair in pairwise(widths)]
        if weight_drop_prob > 0:
            layers = [WeightDrop(layer, "weight_hh_l0", weight_drop_prob) for layer in layers]
        self.layers = nn.ModuleList(layers)
        # One dropout per place, so that each has a name of its own in `dropreg inspect`.
        self.dropouts = nn.ModuleList(DROPOUTS[dropout](drop_prob) for _ in widths)
        self.decoder = nn.Linear(widths[-1], vocab_size)
        nn.init.uniform_(self.embedding.weight, -init_range, init_range)
        nn.init.uniform_(self.decoder.weight, -init_range, init_range)
        nn.init.zeros_(self.decoder.bias)
        if tie_weights:
            self.decoder.weight = self.embedding.weight

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Predict the word after each word.

        Args:
            text: Word numbers, of shape ``(batch, time)``.
            state: Hidden and cell state of each layer, each of shape ``(1, batch, width)``; zero by default.

        Returns:
            Logits, of shape ``(batch, time, vocab_size)``, and the state after the last word.
        """
        hidden, state = self.hidden(text, state)
        return self.decoder(hidden), state
