"""A word-level transformer language model on independent windows of text."""

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_dropreg.checks import is_integer
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.paper.models.language_model import LanguageModel, Reduction, adam, check_ranges, cross_entropy

__all__ = ["TransformerLanguageModel"]


class TransformerLanguageModel(LanguageModel):
    """``nn.TransformerEncoder`` with a causal mask, learned positions and a tied decoder.

    Dropout acts on the embedding and, in every layer, on the attention probabilities, the attention output, the
    feed-forward activation and the feed-forward output. Logs ``train_loss``, ``val_loss``, ``val_ppl``,
    ``test_loss`` and ``test_ppl``.

    Args:
        vocab_size: Number of words, at least 2.
        width: Width of the model, a positive multiple of `num_heads`.
        num_layers: Number of layers, at least 1.
        num_heads: Attention heads of each layer, at least 1.
        feedforward_dim: Width of the feed-forward layers, at least 1.
        max_length: Longest window, at least 1.
        drop_prob: Drop probability of all sites, in ``[0, 1)``.
        optimizer: Makes the optimizer from the parameters.

    Raises:
        InvalidArgumentError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> model = TransformerLanguageModel(vocab_size=50, width=8, num_layers=1, num_heads=2, feedforward_dim=16)
        >>> model(torch.randint(50, (4, 7))).shape
        torch.Size([4, 7, 50])
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        feedforward_dim: int = 1024,
        max_length: int = 256,
        drop_prob: float = 0.1,
        optimizer: OptimizerCallable = adam,
    ) -> None:
        floors = {"vocab_size": 2, "num_layers": 1, "num_heads": 1, "feedforward_dim": 1, "max_length": 1}
        fits = is_integer(width, 1) and (not is_integer(num_heads, 1) or width % num_heads == 0)
        others = [] if fits else [f"width={width} (a positive multiple of num_heads={num_heads})"]
        check_ranges("TransformerLanguageModel", locals(), floors, ["drop_prob"], others)
        super().__init__(vocab_size, optimizer)
        self.save_hyperparameters(ignore=["optimizer"])
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(drop_prob)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, feedforward_dim, drop_prob, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.Linear(width, vocab_size)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        """Predict the word after each word.

        Args:
            text: Word numbers, of shape ``(batch, time)``, ``time`` at most ``max_length``.

        Returns:
            Logits, of shape ``(batch, time, vocab_size)``.

        Raises:
            InvalidArgumentError: If the text is longer than ``max_length``.
        """
        length = text.shape[1]
        if length > self.positions.num_embeddings:
            raise InvalidArgumentError(
                f"TransformerLanguageModel was built for windows of max_length={self.positions.num_embeddings} words "
                f"and got {length}: raise max_length, or lower the window of the data."
            )
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        hidden = self.dropout(self.embedding(text) + self.positions.weight[:length])
        logits: Tensor = self.decoder(self.encoder(hidden, mask=causal, is_causal=True))
        return logits

    def cross_entropy(self, text: Tensor, target: Tensor, state: Any, reduction: Reduction) -> tuple[Tensor, None]:
        """See `LanguageModel.cross_entropy`; windows are independent, so that there is no state."""
        return cross_entropy(self(text), target, reduction), None
