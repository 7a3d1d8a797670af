r"""R-Drop: two draws of dropout, and how much their predictions disagree.

.. math::
    \tfrac12 (\ell_1 + \ell_2) + \alpha \, \tfrac12 \big( KL(p_1 \| p_2) + KL(p_2 \| p_1) \big)

with the losses' own weights in both parts. To second order in the noise the divergence is twice the explicit penalty:
both logits are ``z + J delta`` with noises of their own, so their difference ``d = J (delta_1 - delta_2)`` has twice
the covariance of one, and ``(KL_12 + KL_21) / 2 = 1/2 d^T H d`` with ``H = diag(p) - p p^T``, the Hessian of the cross
entropy: on average ``1/2 * 2 sum_i c_i <J_i^T H J_i, diag(h_i^2)> = 2 R_approx``. The mean loss of the draws has the
explicit effect ``R_approx`` once, so all of it has it ``1 + 2 alpha`` times.

Wu, Li, Wang, Meng, Qin, Chen, Zhang, Liu, *R-Drop: Regularized Dropout for Neural Networks* (NeurIPS 2021); it adds the
two losses up instead of taking their mean, so its alpha is twice this one (and its learning rate half).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_instance, check_strength
from lightning_dropreg.errors import InconsistentPassesError, LossNotRecognizedError
from lightning_dropreg.estimators.curvature import element_weights
from lightning_dropreg.interception.mode import constants_marked
from lightning_dropreg.numerics.noise import draw_key, of_this_rank
from lightning_dropreg.passes import Closure, draws_of_dropout, run_pass
from lightning_dropreg.passes.directions import SAME_EVERY_TIME
from lightning_dropreg.passes.isolation import Isolation

__all__ = ["RDropped", "TwoDraws", "r_drop", "two_draws"]


@dataclass(frozen=True)
class TwoDraws:
    """Two draws of dropout: scalars with an autograd graph.

    Attributes:
        first: The loss of the first.
        second: The loss of the second.
        divergence: ``(KL_12 + KL_21) / 2``, weighted as the losses are.
    """

    first: Tensor
    second: Tensor
    divergence: Tensor


def two_draws(closure: Closure, *, key: int) -> TwoDraws:
    """Run two passes with dropout, the first two of ``DROPOUT_k`` with this key, and compare their predictions."""
    one, two = (run_pass(closure, rule, record_losses=True) for rule in draws_of_dropout(key, 2, antithetic=False))
    kinds = [[(loss.name, loss.outputs.shape) for loss in done.losses] for done in (one, two)]
    if kinds[0] != kinds[1]:
        raise InconsistentPassesError(
            f"The two draws over this batch computed different losses: {kinds[0]} and {kinds[1]}. {SAME_EVERY_TIME}"
        )
    weights = [element_weights(done.loss, done.losses) for done in (one, two)]
    divergence = one.loss.new_zeros(())
    for a, b, of_a, of_b in zip(one.losses, two.losses, *weights, strict=True):
        try:
            divergence = divergence + a.symmetric_divergence(b, (of_a + of_b) / 2)
        except LossNotRecognizedError:
            if bool(of_a.any()) or bool(of_b.any()):  # else it has the weight 0 in the loss, and here, too
                raise
    return TwoDraws(one.loss, two.loss, divergence)


class RDropped(NamedTuple):
    """What `r_drop` found in one batch: scalars with an autograd graph.

    Attributes:
        loss: Mean loss of the two draws.
        divergence: ``(KL_12 + KL_21) / 2``.
        total: ``loss + alpha * divergence``, to be differentiated.
    """

    loss: Tensor
    divergence: Tensor
    total: Tensor


def r_drop(
    closure: Closure,
    *,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> RDropped:
    r"""Compute the loss of R-Drop on one batch: two passes with dropout.

    .. math::
        \tfrac12 (\ell_1 + \ell_2) + \alpha \, \tfrac12 \big( KL(p_1 \| p_2) + KL(p_2 \| p_1) \big)

    This is the *mean* loss of the draws (the published code adds them up: its alpha is twice this one). Every example's
    divergence counts what its loss counts, with class weights, masks and reduction.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        alpha: Factor of the divergence, at least 0. To second order the explicit effect of dropout is there
            ``1 + 2 alpha`` times: ``explicit_penalty`` with that factor is the deterministic stand-in.
        generator: Source of the seed of the masks; the global one by default.
        module: A module whose state must advance once although the closure is called twice.

    Returns:
        Loss, divergence and total.

    Raises:
        InvalidArgumentError: If an argument is out of range, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        LossNotRecognizedError: If the loss is no recognized one between categorical (or binary) distributions.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> found = r_drop(lambda: nn.functional.cross_entropy(net(x), y), alpha=0.5)
        >>> bool(found.divergence > 0), torch.equal(found.total, found.loss + 0.5 * found.divergence)
        (True, True)
    """
    check_strength(alpha, "alpha")
    check_instance("module", module, (nn.Module, type(None)), "an nn.Module or None")
    key = of_this_rank(draw_key(generator))
    with Isolation(module) as isolation, constants_marked():
        draws = two_draws(lambda: isolation.run(closure), key=key)
    loss = (draws.first + draws.second) / 2
    return RDropped(loss, draws.divergence, loss + alpha * draws.divergence)
