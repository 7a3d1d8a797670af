"""The output layer: an adaptive softmax over words numbered by frequency."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import is_integer
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.losses.adaptive import adaptive_log_probs, adaptive_softmax_loss

__all__ = ["AdaptiveSoftmax"]


class AdaptiveSoftmax(nn.Module):
    """Frequent words in a head, the others in clusters (Grave et al., 2017), all word vectors of full width.

    Args:
        dim: Width of the hidden states, at least 1.
        vocab_size: Number of words, numbered by falling frequency.
        cutoffs: Number of the first word of each cluster: rising, in ``[1, vocab_size)``; none for a plain softmax.

    Raises:
        InvalidArgumentError: If the cutoffs are not rising or out of range.

    Example:
        >>> softmax = AdaptiveSoftmax(dim=4, vocab_size=10, cutoffs=[3, 6])
        >>> softmax(torch.randn(2, 5, 4), torch.randint(10, (2, 5))).shape
        torch.Size([2, 5])
    """

    def __init__(self, dim: int, vocab_size: int, cutoffs: Sequence[int] = ()) -> None:
        super().__init__()
        whole = isinstance(cutoffs, (list, tuple)) and all(is_integer(cutoff, 1) for cutoff in cutoffs)
        if not whole or any(a >= b for a, b in pairwise([0, *cutoffs, vocab_size])):
            raise InvalidArgumentError(
                f"AdaptiveSoftmax: cutoffs={cutoffs!r} must be a list of integers that rise and lie in [1, "
                f"vocab_size={vocab_size})."
            )
        self.cutoffs = tuple(cutoffs)
        self.weight = nn.Parameter(torch.randn(vocab_size, dim) * 0.02)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.cluster_weight = nn.Parameter(torch.randn(len(cutoffs), dim) * 0.02)
        self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Compute the cross entropy of each word.

        Args:
            hidden: ``(..., dim)``.
            target: Numbers of the words, ``(...)``.

        Returns:
            ``-log p(target)``, of the shape of `target`.
        """
        flat = adaptive_softmax_loss(
            hidden.flatten(0, -2), target.flatten(), self.weight, self.bias, self.cluster_weight, self.cluster_bias,
            self.cutoffs,
        )  # fmt: skip
        return flat.view_as(target)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Compute the log-probabilities of all words.

        Args:
            hidden: ``(..., dim)``.

        Returns:
            ``(..., vocab_size)``.
        """
        flat = adaptive_log_probs(
            hidden.flatten(0, -2), self.weight, self.bias, self.cluster_weight, self.cluster_bias, self.cutoffs
        )
        return flat.view(*hidden.shape[:-1], -1)
