"""Moments of predictions over draws of dropout, and how the uncertainty in them divides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dropreg.checks import check_choice
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["LIKELIHOODS", "Moments", "moments"]

LIKELIHOODS = ("categorical", "bernoulli", "none")


class Moments(NamedTuple):
    """What several draws of a prediction say.

    Attributes:
        mean: Mean over the draws of what is predicted (probabilities; for ``"none"`` the outputs themselves).
        variance: Variance of that over the draws, unbiased; the shape of `mean`.
        entropy: Entropy of `mean` in nats: all of the uncertainty. Without the class dimension for
            ``"categorical"``; None for ``"none"``.
        mutual_information: The part of it that is disagreement between the draws, in nats, at least 0: what more data
            could take away. Shape of `entropy`.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None


def moments(draws: Tensor, likelihood: str = "categorical", class_dim: int = -1) -> Moments:
    r"""Take mean, variance, predictive entropy and mutual information over draws.

    .. math::
        \bar p = \frac1T \sum_t p_t, \qquad H[\bar p] = \underbrace{H[\bar p] - \frac1T \sum_t H[p_t]}_{\text{mutual
        information}} + \frac1T \sum_t H[p_t]

    as in Gal and Ghahramani, *Dropout as a Bayesian Approximation* (ICML 2016), and Houlsby et al. (2011).

    Args:
        draws: Outputs of the model, shape ``(T, N, ...)`` with ``T >= 2``: logits, or anything for ``"none"``.
        likelihood: ``"categorical"`` (softmax over `class_dim`), ``"bernoulli"`` (sigmoid of each output) or
            ``"none"``.
        class_dim: Dimension of the classes in one draw ``(N, ...)``: -1, or 1 for images ``(N, C, H, W)``.

    Returns:
        The moments.

    Raises:
        InvalidArgumentError: If `likelihood` is unknown or there are fewer than two draws.

    Example:
        Two draws that are sure of different classes: all of the uncertainty is disagreement.

        >>> found = moments(torch.tensor([[[20.0, -20.0]], [[-20.0, 20.0]]]))
        >>> found.mean.tolist(), round(found.entropy.item(), 3), round(found.mutual_information.item(), 3)
        ([[0.5, 0.5]], 0.693, 0.693)
    """
    check_choice("likelihood", likelihood, LIKELIHOODS)
    if len(draws) < 2:
        raise InvalidArgumentError(f"The variance over draws needs at least 2 of them, found {len(draws)}.")
    draws = draws if draws.dtype == torch.float64 else draws.float()
    if likelihood == "none":
        return Moments(draws.mean(0), draws.var(0), None, None)
    if likelihood == "bernoulli":
        p = draws.sigmoid()
        entropies, entropy = _binary_entropy(p), _binary_entropy(p.mean(0))
    else:
        dim = class_dim if class_dim < 0 else class_dim + 1  # the draws are a dimension more
        p = draws.softmax(dim)
        entropies = torch.special.entr(p).sum(dim)
        entropy = torch.special.entr(p.mean(0)).sum(class_dim)
    # nonnegative by Jensen's inequality, but for rounding
    return Moments(p.mean(0), p.var(0), entropy, (entropy - entropies.mean(0)).clamp_min(0))


def _binary_entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy
