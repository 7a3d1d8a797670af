"""The explicit regularization effect of dropout, as a penalty."""

from __future__ import annotations

from lightning_dropreg.checks import check_count, check_strength
from lightning_dropreg.session.base import RegularizerCallback, estimation
from lightning_dropreg.step.plan import PenaltySettings
from lightning_dropreg.step.settings import check_curvature

__all__ = ["ExplicitPenalty"]


class ExplicitPenalty(RegularizerCallback):
    r"""Trains with ``loss + strength * R_approx``, dropout itself off.

    ``R_approx`` (4.4) is what dropout adds to the expected loss, to second order: see
    `lightning_dropreg.functional.explicit_penalty`. With `ImplicitNoise` beside it, dropout is replaced altogether
    (Algorithm 2); it cannot be combined with `MiniBatchDropout`, which has the explicit effect already.

    Args:
        strength: Factor ``lambda_1``, at least 0; 1 is the second-order value. (The paper's runs seem to have left out
            the factor 1/2 of (4.2): that is 2 here.)
        curvature: ``"loss_hessian"`` (4.4), ``"identity"`` or ``"loss_jacobian"`` (5.1), or ``"full"``: half the second
            derivative of the loss itself in the noise, that is (4.2) with the term ``dl/dz d2z/dh2`` that (4.3) drops.
            It needs no recognized loss, so any differentiable one will do (a part of the loss that is no recognized
            function too); the antithetic estimator takes a third pass, without noise. It is **not bounded below**:
            it may be negative, and fall without end on examples that the model has wrong. In one small study (digits,
            40 % wrong labels) its best point was far better than that of the others and its last far worse, and the
            range of good strengths (around 1) narrow; with few wrong labels it was no better. Its estimate varies two
            to three times as much as that of ``R_approx``. Where there are kinks (ReLU), its gradient by finite steps
            is wild, and training warns: take ``"auto"``, ``"forward"`` or ``"double_backward"`` there. Training also
            warns unless a `DivergenceDetector` watches it.
        estimator: ``"antithetic"``, ``"forward"``, ``"double_backward"`` or ``"exact"``, see
            `lightning_dropreg.estimators`; ``"auto"`` takes the first, or the second where there are kinks (ReLU)
            behind the dropout and the model allows it. What it took, and why, is logged when the fit starts, shown by
            ``dropreg inspect``, and kept in checkpoints.
        step_size: Step of the antithetic pair, from 1e-8 to 1.
        batch_fraction: Fraction ``f`` of the batch's rows, drawn afresh every step, on which the penalty is estimated,
            in ``(0, 1]``; None for the whole batch, without an extra pass; ``"auto"`` for a quarter where that takes
            part in the one pass over the batch and pays, else the whole batch: small batches and tiny models gain
            nothing. What was taken, and why, is logged when the fit starts, shown by ``dropreg inspect``, and kept in
            checkpoints. What the elements of the loss count is that
            of the whole batch. Rows that depend on one another (in-batch negatives, batch norm) or cannot be cut are
            refused before training. Where rows have nothing to do with one another and the step leaves the same traces
            (a batch of every shape is tried), it runs once, on ``(1 + f)`` times the rows
            (`lightning_dropreg.estimators.one_pass`); elsewhere (metrics or randomness in the step, a loss reduced by
            hand) it runs on the batch and on the drawn rows. A module that carries a state with rows of its
            own defines ``select_rows(rows, dim)``, which picks rows of that state by number, some perhaps twice; the
            state is put back afterwards.
        batch_dim: Dimension of the rows in the tensors of a batch.
        every_n_steps: The penalty acts in every n-th optimizer step, with n times the strength.
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
        >>> trainer = lightning.Trainer(
        ...     callbacks=[ExplicitPenalty()], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False
        ... )
    """

    def __init__(
        self,
        strength: float = 1.0,
        curvature: str = "loss_hessian",
        estimator: str = "auto",
        step_size: float = 0.1,
        batch_fraction: float | str | None = None,
        batch_dim: int = 0,
        every_n_steps: int = 1,
        mask: str = "as_model",
        low_memory: bool = False,
        attention: str = "site",
        *,
        accept_checkpoint_settings: bool = False,
    ) -> None:
        super().__init__(attention, accept_checkpoint_settings)
        check_curvature(curvature)
        check_count("every_n_steps", every_n_steps)
        self.penalty = PenaltySettings(
            strength=check_strength(strength),
            curvature=curvature,
            every_n_steps=every_n_steps,
            estimation=estimation(estimator, step_size, batch_fraction, batch_dim, mask, low_memory),
        )
