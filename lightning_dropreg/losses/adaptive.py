r"""Cross entropy of an adaptive softmax: frequent words in the head, the others in clusters that the head names.

With ``p_h`` the head's distribution over frequent words and clusters and ``p_c`` that over the words of cluster ``c``,
a word ``y`` of cluster ``c`` has ``log p(y) = log p_h(c) + log p_c(y)``. What is ``H_out``, the Hessian of the loss in
the outputs? That depends on what one calls the outputs:

* the logits of head and clusters: then it is ``diag(p_h) - p_h p_h^T``, and for the cluster *that the target lies in*
  ``diag(p_c) - p_c p_c^T``: it depends on the label;
* the log-probabilities of all words, as for any softmax: then it is ``diag(p) - p p^T`` over the whole vocabulary, and
  depends on no label.

The second is the mean of the first over labels drawn from the model, since (total variance)
``Var_p(u) = Var_{p_h}(u_h) + sum_c p_h(c) Var_{p_c}(u_c)``. It is the curvature of (4.3), whose labels are the model's
own, and it is the same however the words are put in clusters, so it is the one used here: outputs are the
log-probabilities of all words. They are as large as those of a plain softmax; a pass that needs no curvature computes
only the clusters that its targets lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lightning_dropreg.losses.base import Loss
from lightning_dropreg.losses.categorical import CategoricalLoss
from lightning_dropreg.numerics.dtypes import noise_dtype
from lightning_dropreg.numerics.dual import log_softmax

__all__ = ["adaptive_log_probs", "adaptive_softmax_loss", "describe_adaptive_softmax_loss"]


def adaptive_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor, cluster_weight: Tensor, cluster_bias: Tensor, cutoffs: Sequence[int]
) -> Tensor:
    """Log-probabilities of all words.

    Args:
        hidden: Last hidden states, ``(T, d)``.
        weight: Word vectors, ``(V, d)``, frequent words first.
        bias: Biases of the words, ``(V,)``.
        cluster_weight: Vectors of the clusters, ``(n, d)``.
        cluster_bias: Biases of the clusters, ``(n,)``.
        cutoffs: Number of the first word of each of the ``n`` clusters, rising, above 0.

    Returns:
        Tensor ``(T, V)``; every row sums to 1 when exponentiated.

    Example:
        >>> parameters = torch.randn(5, 3), torch.randn(5), torch.randn(2, 3), torch.randn(2)
        >>> adaptive_log_probs(torch.randn(4, 3), *parameters, cutoffs=(2, 4)).exp().sum(-1).allclose(torch.ones(4))
        True
    """
    head = _head(hidden, weight, bias, cluster_weight, cluster_bias, cutoffs)
    short = weight.shape[0] if not cutoffs else cutoffs[0]
    parts = [head[:, :short]]
    for index, words in enumerate(_clusters(cutoffs, weight.shape[0])):
        within = log_softmax(F.linear(hidden, weight[words], bias[words]), -1)
        parts.append(within + head[:, short + index, None])
    return torch.cat(parts, -1)


def adaptive_softmax_loss(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor,
    cluster_weight: Tensor,
    cluster_bias: Tensor,
    cutoffs: Sequence[int],
) -> Tensor:
    """Cross entropy of an adaptive softmax, recognized by this package as a loss.

    Args:
        hidden: See `adaptive_log_probs`, as for the others.
        target: Numbers of the words, ``(T,)``, int64.
        weight: Word vectors.
        bias: Biases of the words.
        cluster_weight: Vectors of the clusters.
        cluster_bias: Biases of the clusters.
        cutoffs: Where the clusters begin.

    Returns:
        ``-log p(target)``, ``(T,)``; reduce it as you like.

    Example:
        >>> parameters = torch.randn(5, 3), torch.randn(5), torch.randn(2, 3), torch.randn(2)
        >>> hidden, target = torch.randn(4, 3), torch.tensor([0, 4, 1, 2])
        >>> loss = adaptive_softmax_loss(hidden, target, *parameters, cutoffs=(2, 4))
        >>> loss.allclose(-adaptive_log_probs(hidden, *parameters, cutoffs=(2, 4))[range(4), target])
        True
    """
    parameters = (weight, bias, cluster_weight, cluster_bias)
    if has_torch_function((hidden, target, *parameters)):
        result: Tensor = handle_torch_function(
            adaptive_softmax_loss, (hidden, target, *parameters), hidden, target, *parameters, cutoffs
        )
        return result
    head = _head(hidden, *parameters, cutoffs)
    entry = target.clone()  # of the head: the word, or its cluster
    for index, words in enumerate(_clusters(cutoffs, weight.shape[0])):
        entry[(target >= words.start) & (target < words.stop)] = cutoffs[0] + index
    loss = -head.gather(-1, entry.unsqueeze(-1)).squeeze(-1)
    for words in _clusters(cutoffs, weight.shape[0]):
        rows = ((target >= words.start) & (target < words.stop)).nonzero().squeeze(-1)
        if rows.numel():
            logits = F.linear(hidden[rows], weight[words], bias[words])
            within = F.cross_entropy(logits, target[rows] - words.start, reduction="none")
            loss = loss.index_add(0, rows, within.to(loss.dtype))
    return loss


def describe_adaptive_softmax_loss(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor,
    cluster_weight: Tensor,
    cluster_bias: Tensor,
    cutoffs: Sequence[int],
) -> tuple[Tensor, Loss]:
    """`adaptive_softmax_loss` with its description: that of a softmax over the whole vocabulary."""
    outputs = adaptive_log_probs(hidden, weight, bias, cluster_weight, cluster_bias, cutoffs)
    elements = _chosen(outputs, target)
    function: Callable[[Tensor], Tensor] = lambda z: _chosen(log_softmax(z, -1), target)  # noqa: E731
    ones = torch.ones(target.shape, dtype=noise_dtype(outputs.dtype), device=outputs.device)
    return elements.clone(), CategoricalLoss("adaptive_softmax_loss", outputs, elements, function, ones, ones)


def _chosen(log_probs: Tensor, target: Tensor) -> Tensor:
    return -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor, cluster_weight: Tensor, cluster_bias: Tensor, cutoffs: Sequence[int]
) -> Tensor:
    short = weight.shape[0] if not cutoffs else cutoffs[0]
    logits = F.linear(hidden, torch.cat([weight[:short], cluster_weight]), torch.cat([bias[:short], cluster_bias]))
    return log_softmax(logits, -1)


def _clusters(cutoffs: Sequence[int], vocabulary: int) -> list[slice]:
    ends = [*cutoffs[1:], vocabulary]
    return [slice(start, stop) for start, stop in zip(cutoffs, ends, strict=True)] if cutoffs else []
