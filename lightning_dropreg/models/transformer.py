"""A word-level transformer language model on independent windows of text."""

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics.text import Perplexity

from lightning_dropreg.checks import below_floor, is_integer, is_probability
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.models.language_model import adam

__all__ = ["TransformerLanguageModel"]

Batch = tuple[Tensor, Tensor]


class TransformerLanguageModel(LightningModule):
    """``nn.TransformerEncoder`` with a causal mask, learned positions and a tied decoder.

    Dropout acts on the embedding and, in every layer, on the attention probabilities, the attention output, the
    feed-forward activation and the feed-forward output. Logs ``train_loss``, ``val_loss``, ``val_ppl`` and
    ``test_ppl``.

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
        super().__init__()
        floors = {"vocab_size": 2, "num_layers": 1, "num_heads": 1, "feedforward_dim": 1, "max_length": 1}
        given = locals()
        wrong = below_floor(given, floors)
        if not is_probability(drop_prob):
            wrong.append(f"drop_prob={drop_prob} (in [0, 1))")
        if not is_integer(width, 1) or (is_integer(num_heads, 1) and width % num_heads):
            wrong.append(f"width={width} (a positive multiple of num_heads={num_heads})")
        if wrong:
            raise InvalidArgumentError(f"TransformerLanguageModel: out of range: {', '.join(wrong)}.")
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
        self.val_ppl = Perplexity()
        self.test_ppl = Perplexity()
        self._make_optimizer = optimizer

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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch of windows.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.

        Returns:
            Mean cross entropy per word, a scalar.
        """
        loss = self._loss(batch)[0]
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=batch[1].numel())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation loss and perplexity.

        Args:
            batch: Words and the words after them, each of shape ``(batch, time)``.
            batch_idx: Unused.
        """
        self._evaluate("val", self.val_ppl, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the test loss and perplexity.

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
        return -F.cross_entropy(self(text).transpose(1, 2), target, reduction="none")

    def configure_optimizers(self) -> Optimizer:
        """Return the optimizer that ``optimizer`` makes."""
        return self._make_optimizer(self.parameters())

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        text, target = batch
        logits = self(text)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten()), logits

    def _evaluate(self, stage: str, metric: Perplexity, batch: Batch) -> None:
        loss, logits = self._loss(batch)
        metric.update(logits, batch[1])
        self.log(f"{stage}_loss", loss, batch_size=batch[1].numel(), sync_dist=True)
        self.log(f"{stage}_ppl", metric, prog_bar=True)
