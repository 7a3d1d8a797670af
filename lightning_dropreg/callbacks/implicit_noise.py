"""The implicit regularization effect of dropout, as noise in the gradient."""

from __future__ import annotations

from lightning_dropreg.checks import check_choice, check_strength
from lightning_dropreg.session.base import RegularizerCallback, estimation
from lightning_dropreg.step.plan import NoiseSettings

__all__ = ["ImplicitNoise"]

SOURCES = ("taylor", "dropout")
INJECTIONS = ("auto", "after_backward", "loss")


class ImplicitNoise(RegularizerCallback):
    r"""Adds to every gradient the noise that dropout would have brought.

    Alone it trains with the loss without dropout and the noise: the implicit effect alone. With `ExplicitPenalty`
    beside it, dropout is replaced altogether (Algorithm 2). With ``MiniBatchDropout(k)`` it restores the covariance
    that the average over k draws took away, scaled by ``sqrt(1 - 1/k)`` (Algorithm 4, or section 3.1 with
    ``source="dropout"``).

    Args:
        strength: Factor ``lambda_2`` of the noise's standard deviation, at least 0.
        source: ``"taylor"`` for ``xi_approx`` (4.6), ``"dropout"`` for the difference of two dropout gradients, scaled
            to the covariance of one.
        injection: ``"after_backward"`` computes the noise and adds it to the gradients in ``on_after_backward``;
            ``"loss"`` adds a scalar with that gradient to the loss; ``"auto"`` takes the cheaper. The gradient is the
            same.
        estimator: ``"auto"``, ``"antithetic"``, ``"forward"``, ``"double_backward"`` or ``"exact"``, see
            `ExplicitPenalty`; for ``source="taylor"``.
        step_size: Step of the antithetic pair, from 1e-8 to 1.
        batch_fraction: Fraction of the rows on which the noise is drawn, see `ExplicitPenalty`; it is scaled so that
            its covariance stays that of the whole batch. Refused where all rows share a mask (DropConnect, position
            embeddings): no noise made of some of the rows has the covariance of that of all.
        batch_dim: Dimension of the rows in the tensors of a batch.
        mask: ``"as_model"`` or ``"elementwise"``.
        low_memory: With ``estimator="antithetic"``: keep one autograd graph at a time instead of two, for one more
            forward pass (about 1.2 times the time).
        attention: What becomes of dropout on attention probabilities: ``"site"``, with attention written out, or
            ``"ignore"``: it is left out, and fused kernels stay. The same for all callbacks of a Trainer; see
            `lightning_dropreg.attention_dropout`.
        accept_checkpoint_settings: Whether a run may resume from a checkpoint that was written with other settings, or
            without this callback; refused otherwise.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.

    Example:
        >>> import lightning
        >>> from lightning_dropreg import ExplicitPenalty
        >>> trainer = lightning.Trainer(
        ...     callbacks=[ExplicitPenalty(), ImplicitNoise()], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False
        ... )
    """

    def __init__(
        self,
        strength: float = 1.0,
        source: str = "taylor",
        injection: str = "auto",
        estimator: str = "auto",
        step_size: float = 0.1,
        batch_fraction: float | str | None = None,
        batch_dim: int = 0,
        mask: str = "as_model",
        low_memory: bool = False,
        attention: str = "site",
        *,
        accept_checkpoint_settings: bool = False,
    ) -> None:
        super().__init__(attention, accept_checkpoint_settings)
        check_choice("source", source, SOURCES)
        check_choice("injection", injection, INJECTIONS)
        self.noise = NoiseSettings(
            strength=check_strength(strength),
            source=source,
            injection=injection,
            estimation=estimation(estimator, step_size, batch_fraction, batch_dim, mask, low_memory),
        )
