"""Dropout of whole words: rows of an embedding matrix."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dropreg.checks import check_drop_prob, check_instance
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.interception.handlers.custom import drop

__all__ = ["EmbeddingDropout"]


class EmbeddingDropout(nn.Module):
    """Look words up in an embedding of which whole rows are dropped: a word is gone wherever it occurs in the batch.

    Gal and Ghahramani (2016). What is dropped from is the matrix, so a decoder tied to it is not touched.

    Args:
        embedding: The embedding; neither ``sparse`` nor with ``max_norm``.
        p: Drop probability of a row, in ``[0, 1)``.

    Raises:
        InvalidArgumentError: If `p` is outside its range, or the embedding is of such a kind.

    Example:
        >>> import torch
        >>> lookup = EmbeddingDropout(nn.Embedding(10, 3), p=0.5)
        >>> vectors = lookup(torch.tensor([4, 1, 4]))
        >>> bool((vectors[0] == vectors[2]).all())
        True
    """

    def __init__(self, embedding: nn.Embedding, p: float = 0.1) -> None:
        super().__init__()
        check_drop_prob(p, "EmbeddingDropout")
        check_instance("embedding", embedding, nn.Embedding, "an nn.Embedding")
        if embedding.sparse or embedding.max_norm is not None:
            raise InvalidArgumentError(
                "EmbeddingDropout was given an nn.Embedding with sparse=True or max_norm; a masked copy of the matrix "
                "has neither sparse gradients nor a norm to keep. Use a plain nn.Embedding."
            )
        self.embedding = embedding
        self.p = p

    def forward(self, text: Tensor) -> Tensor:
        """Look words up.

        Args:
            text: Word numbers, of any shape.

        Returns:
            Their vectors, of shape ``(*text.shape, embedding_dim)``.
        """
        matrix = self.embedding.weight
        rows = drop(matrix, self.p, (len(matrix), 1), self.training, kind="embedding_dropout")
        return F.embedding(text, rows, self.embedding.padding_idx, scale_grad_by_freq=self.embedding.scale_grad_by_freq)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}"
