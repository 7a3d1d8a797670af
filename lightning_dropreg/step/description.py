"""A plan in words: which passes run over a batch, and what is added to its loss."""

from __future__ import annotations

from lightning_dropreg.estimators import AUTO
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.step.plan import Estimation, Plan

__all__ = ["describe", "expected_cost", "name_method"]

_PASSES = {
    AUTO: "2 forward passes or 1 with dual numbers (chosen with the first batch)",
    "antithetic": "2 forward passes, with site factors 1 + {0:g} r and 1 - {0:g} r",
    "forward": "1 forward pass with dual numbers",
    "double_backward": "1 forward pass, back-propagated to the sites and then again",
    "exact": "1 forward pass, and a backward pass for every output",
}
_FULL = {
    AUTO: "3 forward passes or 1 with dual numbers (chosen with the first batch)",
    "antithetic": "3 forward passes, one without noise and two with site factors 1 + {0:g} r and 1 - {0:g} r",
    "forward": "1 forward pass with dual numbers, back-propagated to the sites and then again",
    "double_backward": "1 forward pass, back-propagated to the sites twice and then again",
    "exact": "1 forward pass, and a backward pass for every entry of the masks",
}
_CURVATURES = {
    "loss_hessian": "R_approx",
    "identity": "R_approx with H = I/C",
    "loss_jacobian": "R_approx of (5.1)",
    "full": "half the second derivative of the loss",
}


def describe(plan: Plan) -> list[str]:
    """Say what a plan does with every batch.

    Returns:
        Sentences.

    Example:
        >>> from lightning_dropreg import ExplicitPenalty
        >>> for sentence in describe(Plan(penalty=ExplicitPenalty(strength=2, estimator="antithetic").penalty)):
        ...     print(sentence)
        Dropout drops nothing.
        2 forward passes, with site factors 1 + 0.1 r and 1 - 0.1 r, for loss and penalty.
        Back-propagated: loss + 2 R_approx.
    """
    if plan.untouched:
        return ["Every step stays exactly as it is."]
    sentences = [] if plan.attention == "site" else ["Dropout on attention probabilities is left out."]
    terms = ["loss"]
    if plan.alpha is not None:
        sentences.append("2 forward passes with fresh dropout masks, for their losses and how they disagree (R-Drop).")
        terms = ["mean of the 2 losses", f"{plan.alpha:g} (KL_12 + KL_21)/2"]
    elif plan.k is not None and plan.sites == "last":
        sentences.append(
            f"1 forward pass up to the last dropout site, and {plan.k} with fresh masks from there on (whole passes "
            "with the earlier masks repeated where what comes before cannot be shared)."
        )
        terms = [f"mean of the {plan.k} losses"]
    elif plan.k is not None:
        how = "each differentiated before the next" if plan.low_memory else "one backward of all"
        sentences.append(f"{plan.k} forward passes with fresh dropout masks (DROPOUT_{plan.k}), {how}.")
        terms = [f"mean of the {plan.k} losses"]
    else:
        sentences.append("Dropout drops nothing.")
        sentences += _passes(plan)
    if plan.penalty is not None and plan.penalty.strength:
        often = plan.penalty.every_n_steps
        where = "" if often == 1 else f" (in every {often}th step; nothing in the others)"
        terms.append(f"{plan.penalty.strength * often:g} {_CURVATURES[plan.penalty.curvature]}{where}")
    if plan.noise_in_loss:
        if plan.noise is not None and plan.k is not None and plan.noise.source == "taylor":
            sentences.append(f"For the noise {_of(plan.noise.estimation)}.")
        terms.append(f"{plan.noise_scale:.3g} {_noise(plan)}")
    sentences.append(f"Back-propagated: {' + '.join(terms)}.")
    if plan.noise_after_backward and plan.noise is not None:
        draws = "2 more passes with dropout" if plan.noise.source == "dropout" else _of(plan.noise.estimation)
        sentences.append(
            f"After the backward: {draws}; the gradient of {plan.noise_scale:.3g} {_noise(plan)} is added."
        )
    return sentences


def name_method(plan: Plan) -> str:
    """Say what a plan is, in the paper's words.

    Returns:
        A few words.

    Example:
        >>> name_method(Plan(k=4))
        'DROPOUT_4 (Algorithm 1)'
    """
    noise = plan.noise if plan.noise_scale else None
    if plan.alpha is not None:
        return "R-Drop" + (" and noise" if noise else "")
    if plan.k is not None and noise is not None:
        of_draws = noise.source == "dropout"
        return f"DROPOUT_{plan.k} and {'the noise of section 3.1' if of_draws else 'xi_approx (Algorithm 4)'}"
    if plan.k is not None:
        return f"DROPOUT_{plan.k} (Algorithm 1)"
    if plan.penalizes and noise is not None:
        return "Algorithm 2: penalty and noise in the place of dropout"
    if plan.penalizes:
        return "penalty in the place of dropout"
    return "noise alone, without dropout's explicit effect" if noise else "no dropout"


def expected_cost(plan: Plan) -> str:
    """Say what a step will cost, by the number of its passes; in dropout steps, which are one forward and one backward.

    Returns:
        A few words.

    Example:
        >>> from lightning_dropreg import ExplicitPenalty
        >>> how = ExplicitPenalty(estimator="antithetic", batch_fraction=0.25).penalty
        >>> expected_cost(Plan(penalty=how))
        'about 1.25 dropout steps, by its passes (dropreg bench measures it)'
    """
    if "exact" in plan.estimators:
        return "as many backward passes as there are outputs"
    cost = _cost(plan)
    times = "a dropout step" if cost == 1 else f"{cost:.3g} dropout steps"
    return f"about {times}, by its passes (dropreg bench measures it)"


def _cost(plan: Plan) -> float:
    """Passes, forward and backward counted together, one of each being 1."""
    noise = plan.noise if plan.noise_scale else None
    draws = 2.0 if plan.alpha is not None else float(plan.k or 0)
    if plan.k is not None or plan.alpha is not None:
        if noise is not None and noise.source == "taylor":
            return draws + _passes_of(noise.estimation)
        return draws + (2.0 if plan.noise_after_backward else 0.0)
    one_pass = plan.in_one_pass
    full = plan.curvature == FULL
    if one_pass is not None and one_pass.batch_fraction is not None:
        return 1 + (2 if full else 1) * one_pass.batch_fraction
    shares: dict[Estimation, float] = {}
    if plan.penalty is not None and plan.penalizes:
        shares[plan.penalty.estimation] = _passes_of(plan.penalty.estimation, full)
    if noise is not None and noise.source == "taylor":
        shares.setdefault(noise.estimation, _passes_of(noise.estimation))
    cost = sum(shares.values()) + (0.0 if any(e.batch_fraction is None for e in shares) else 1.0)
    if noise is not None and noise.source == "dropout":
        cost += 2
    elif noise is not None and plan.noise_after_backward and noise.estimation in shares and len(shares) == 1:
        cost += 1  # another backward through the pair
    if plan.penalty is not None and plan.penalizes and noise is None:
        often = plan.penalty.every_n_steps
        cost = (cost + often - 1) / often
    return cost


def _passes_of(chosen: Estimation, full: bool = False) -> float:
    cost = {"double_backward": 3.0}.get(chosen.estimator, 2.0) + full + chosen.low_memory / 3
    return cost * (1.0 if chosen.batch_fraction is None else chosen.batch_fraction)


def _passes(plan: Plan) -> list[str]:
    """The passes without dropout of its own."""
    wanted: dict[Estimation, list[str]] = {}
    if plan.penalty is not None and plan.penalty.strength:
        wanted[plan.penalty.estimation] = ["penalty"]
    taylor = plan.noise is not None and plan.noise_in_loss and plan.noise.source == "taylor"
    if plan.noise is not None and taylor:
        wanted.setdefault(plan.noise.estimation, []).append("noise")
    sentences, gives_loss = [], False
    for estimation, results in wanted.items():
        first = estimation.batch_fraction is None and not gives_loss
        gives_loss = gives_loss or first
        full = "penalty" in results and plan.curvature == FULL
        sentences.append(f"{_of(estimation, full)}, for {' and '.join([*['loss'] * first, *results])}.")
    if not gives_loss:
        sentences.insert(0, "1 forward pass, for the loss.")
    if plan.noise is not None and plan.noise_in_loss and not taylor:
        sentences.append("2 forward passes with dropout, for the noise.")
    return sentences


def _of(estimation: Estimation, full: bool = False) -> str:
    passes = (_FULL if full else _PASSES)[estimation.estimator].format(estimation.step_size)
    fraction = estimation.batch_fraction
    return passes if fraction is None else f"{passes} over a random {fraction:.0%} of the rows"


def _noise(plan: Plan) -> str:
    source = plan.noise.source if plan.noise is not None else ""
    return "s (whose gradient is xi_approx)" if source == "taylor" else "(loss_1 - loss_2) of two draws of dropout"
