"""R-Drop: two draws of dropout that must agree."""

from __future__ import annotations

from lightning_dropreg.checks import check_strength
from lightning_dropreg.session.base import RegularizerCallback

__all__ = ["RDrop"]


class RDrop(RegularizerCallback):
    r"""Trains with R-Drop: the mean loss of two draws of dropout, plus ``alpha`` times their symmetric divergence.

    .. math::
        \tfrac12 (\ell_1 + \ell_2) + \alpha \, \tfrac12 \big( KL(p_1 \| p_2) + KL(p_2 \| p_1) \big)

    The step runs twice with fresh masks and everything else the same, so nothing in the model changes. The losses must
    be between categorical (or binary) distributions and recognized: cross entropy in all its forms, ``nll_loss``,
    ``kl_div``, binary cross entropy. An example's divergence counts what its loss counts. It is logged, without
    alpha, as ``dropreg/explicit_penalty``, the mean loss as ``dropreg/loss``.

    To second order the divergence is twice the explicit penalty of dropout, so R-Drop has the explicit effect
    ``1 + 2 alpha`` times; ``ExplicitPenalty(strength=1 + 2 * alpha)`` is its deterministic stand-in, at the same cost
    (``docs/rdrop.md``). `ImplicitNoise` beside it adds the noise that the mean over two draws lacks, as with
    ``MiniBatchDropout(k=2)``; `MiniBatchDropout` and `ExplicitPenalty` cannot be combined with it.

    Wu et al., *R-Drop: Regularized Dropout for Neural Networks* (NeurIPS 2021). Its code adds the two losses up instead
    of taking the mean: its alpha is twice this one, and its learning rate half.

    Args:
        alpha: Factor of the divergence, at least 0; 0 is ``MiniBatchDropout(k=2)``.
        attention: What becomes of dropout on attention probabilities, see `MiniBatchDropout`.
        accept_checkpoint_settings: Whether a run may resume from a checkpoint that was written with other settings, or
            without this callback; refused otherwise.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.

    Example:
        >>> RDrop(alpha=0.5).alpha
        0.5
    """

    def __init__(
        self, alpha: float = 1.0, attention: str = "site", *, accept_checkpoint_settings: bool = False
    ) -> None:
        super().__init__(attention, accept_checkpoint_settings)
        self.alpha = check_strength(alpha, "alpha")
        self.k = 2
