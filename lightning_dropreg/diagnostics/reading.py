"""What was found, in words: short, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dropreg.diagnostics.diagnosis import Diagnosis, trusted
from lightning_dropreg.diagnostics.effect import EffectReport
from lightning_dropreg.diagnostics.noise import NoiseReport
from lightning_dropreg.diagnostics.numbers import percent_range, with_margin
from lightning_dropreg.diagnostics.penalty import PenaltyReport

__all__ = ["Costs", "read", "recommend_strength"]

SITES_NAMED = 4
_FAR = 3
"""A penalty that must be so many times larger or smaller than the expansion says is none that the expansion gives."""
_MEASURED = "1.2 (of 0.7, 1.2, 2, 3.5) on digits with wrong labels, 2 to 3 on a small LSTM: docs/start-here.md"


@dataclass(frozen=True)
class Costs:
    """What one optimization step costs with each method, a step with dropout being 1.

    Attributes:
        ratios: Ratio by method, with the lowest and the highest of the rounds: ``(ratio, low, high)``.
        refused: Methods with which the model cannot be trained, and why.
        rounds: How it was measured, in words.
    """

    ratios: Mapping[str, tuple[float, float, float]]
    refused: Mapping[str, str]
    rounds: str


def read(diagnosis: Diagnosis, costs: Costs | str = "not measured here") -> list[str]:
    """Say which sites carry the effect, where the expansion can be trusted, and what the methods cost."""
    effect = diagnosis.effect
    lines = [_size(effect)]
    if effect.sites:
        lines.append(_carriers(effect))
    if effect.problem:
        lines.append(f"R_approx could not be computed: {effect.problem}")
    else:
        lines += _trust(diagnosis)
        if diagnosis.penalty is not None:
            lines.append(_penalty(diagnosis.penalty, effect))
    if diagnosis.noise is not None:
        lines.append(_noise(diagnosis))
    lines.append(_costs(costs))
    return lines


def recommend_strength(effect: EffectReport, trained: bool) -> str:
    """Say with which strengths of `ExplicitPenalty` to begin, or why nothing that was measured tells.

    Args:
        effect: What was measured.
        trained: Whether that was on trained weights.

    Returns:
        A paragraph.
    """
    begin = "Strength: begin with 1, the second-order value"
    if effect.problem:
        return f"{begin}. Nothing more can be recommended, since R_approx could not be computed."
    if not trained:
        return f"{begin}. The initial weights tell no more; the best ones measured so far were {_MEASURED}."
    truth, approximation = effect.truth(), effect.approximation()
    if not truth.excludes_zero or not approximation.excludes_zero:
        which = "R_approx" if truth.excludes_zero else "R_drop"
        return (
            f"{begin}. Nothing more can be recommended, since {which} cannot be told from 0 with {effect.draws} draws."
        )
    if truth.value < 0:
        return f"{begin}. Nothing more can be recommended: dropout lowers the loss of this batch, and no penalty does."
    matching = effect.matching_strength()
    told = f"R_approx is as large as R_drop at {with_margin(matching)}"
    if matching.low > _FAR or matching.high < 1 / _FAR:
        return f"{begin}. Nothing more can be recommended: {told}, so far from 1 that the expansion does not hold here."
    tried = "" if matching.low <= 1 <= matching.high else f" and {matching.value:.2g}"
    return (
        f"{begin}; {told}, so try 1{tried}, then 1.5 and 2, on held-out data. Which is best is not measured here; the "
        f"best ones so far were {_MEASURED}."
    )


_WIDE = 2
"""A share whose interval goes below -100 % or beyond 200 % tells nothing."""


def _size(effect: EffectReport) -> str:
    truth = effect.truth()
    told = f"R_drop = {with_margin(truth)}, {effect.draws} draws"
    if not truth.excludes_zero:
        return f"Explicit effect: {told}. It cannot be told from 0; more draws would tell."
    verb = "adds" if truth.value > 0 else "takes"
    where = "to" if truth.value > 0 else "from"
    share = abs(truth.value / effect.loss) if effect.loss else float("nan")
    return f"Explicit effect: {told}: dropout {verb} {100 * share:.2g} % {where} the loss of this batch."


def _carriers(effect: EffectReport) -> str:
    effects = [effect.truth(i) for i in range(len(effect.sites))]
    names = effect.names
    if len(names) == 1:
        return f"Sites: {names[0]} is the only one."
    lower = [names[i] for i, one in enumerate(effects) if one.high < 0]
    total = sum(one.value for one in effects)
    shares = [effect.share(i) for i in range(len(effect.sites))]
    if lower or total <= 0 or any(one.low < -1 or one.high > _WIDE for one in shares):
        told = ", ".join(f"{name} {with_margin(one)}" for name, one in zip(names, effects, strict=True))
        note = f"; alone, {_listed(lower)} would lower the loss" if lower else ""
        return f"Sites: {told}{note}, so shares of the sum would mean nothing."
    order = sorted(range(len(names)), key=lambda i: -effects[i].value)
    told = ", ".join(f"{names[i]} {percent_range(effect.share(i))}" for i in order[:SITES_NAMED])
    if len(order) > SITES_NAMED:
        rest = sum(effect.share(i).value for i in order[SITES_NAMED:])
        told += f", the other {len(order) - SITES_NAMED} together {100 * rest:.0f} %"
    first, second = effect.share(order[0]), effect.share(order[1])
    if first.low <= second.high:
        told += f". {names[order[0]]} and {names[order[1]]} cannot be ranked with {effect.draws} draws"
    return f"Sites: of the sum of what each does alone, {told}.{_interaction(effect)}"


def _interaction(effect: EffectReport) -> str:
    interaction, truth = effect.interaction(), effect.truth()
    if not interaction.excludes_zero:
        return " Together they do what they do alone, as far as can be told."
    more = "more" if interaction.value > 0 else "less"
    size = abs(interaction.value / (truth.value - interaction.value))
    return f" Together they do {100 * size:.2g} % {more}; R_approx, a sum over sites, cannot show that."


def _trust(diagnosis: Diagnosis) -> list[str]:
    effect, tolerance = diagnosis.effect, diagnosis.tolerance
    within = f"within {100 * tolerance:g} % of R_drop"
    told = {
        "yes": f"is {within}",
        "no": f"is not {within}",
        "unclear": f"may or may not be {within}: {effect.draws} draws do not tell",
    }
    verdict = trusted(effect, tolerance)
    line = f"Trust: for all sites together R_approx {told[verdict]}"
    if verdict == "no":
        parts = {"the left-out curvature of the model": effect.left_out(), "the higher orders": effect.higher_orders()}
        shown = [f"{name} {with_margin(part)}" for name, part in parts.items() if part.value == part.value]
        line += f" (it misses {', '.join(shown)})" if shown else f" (it misses {with_margin(effect.remainder())})"
    lines = [line + "."]
    for_sites = _by_verdict(
        [
            (f"{name} (q = {site.p:g})", trusted(effect, tolerance, i))
            for i, (name, site) in enumerate(zip(effect.names, effect.sites, strict=True))
        ]
    )
    if for_sites:
        lines.append(f"Trust, each site alone: {for_sites}.")
    if diagnosis.sweep:
        by_q = _by_verdict([(f"{q:g}", trusted(report, tolerance)) for q, report in diagnosis.sweep])
        lines.append(f"Trust, all sites at one q: {by_q}.")
    return lines


def _by_verdict(verdicts: list[tuple[str, str]]) -> str:
    words = {"yes": "within", "no": "outside", "unclear": "cannot be told"}
    found = {word: [name for name, given in verdicts if given == verdict] for verdict, word in words.items()}
    return "; ".join(f"{word}: {_listed(names)}" for word, names in found.items() if names)


def _penalty(penalty: PenaltyReport, effect: EffectReport) -> str:
    value = penalty.value()
    found = f"The penalty as configured ({penalty.curvature}, {_how(penalty)}) is {with_margin(value)}"
    if not value.excludes_zero or not effect.truth().excludes_zero:
        return f"{found}, before its strength of {penalty.strength:g}."
    total = penalty.strength * value.value
    times = f"times its strength of {penalty.strength:g}: {100 * total / effect.truth().value:.0f} % of R_drop"
    return f"{found}; {times}."


def _noise(diagnosis: Diagnosis) -> str:
    noise = diagnosis.noise
    assert noise is not None
    told = (
        f"Gradient noise ({_how(noise)}): the variance of xi_approx is {percent_range(noise.trace_ratio())} of that of "
        f"xi_drop; cosine of their covariances {with_margin(noise.alignment())}"
        f"{', by random projections' if noise.sketched else ''}; "
        f"signal-to-noise of the gradient under dropout {with_margin(noise.signal_to_noise())}, {noise.draws} draws."
    )
    by_layer = [(noise.alignment(i), name) for i, name in enumerate(noise.layers)]
    known = sorted(((found, name) for found, name in by_layer if found.value == found.value), key=lambda f: f[0].value)
    if len(known) < 2 or known[0][0].high >= known[-1][0].low:
        return told
    (lowest, name), (highest, other) = known[0], known[-1]
    return f"{told} By layer the cosine goes from {with_margin(lowest)} in {name} to {with_margin(highest)} in {other}."


def _how(measured: PenaltyReport | NoiseReport) -> str:
    step = f" with step {measured.step_size:g}" if measured.estimator == "antithetic" else ""
    mask = "" if measured.mask == "as_model" else f", mask {measured.mask}"
    return f"{measured.estimator}{step}{mask}"


def _costs(costs: Costs | str) -> str:
    if isinstance(costs, str):
        return f"Costs: {costs}."
    told = [
        f"{method} {ratio:.2f}" + (f" ({low:.2f} to {high:.2f})" if high > low else "")
        for method, (ratio, low, high) in costs.ratios.items()
    ]
    refused = f" Not possible here: {', '.join(costs.refused)}." if costs.refused else ""
    return f"Costs of one step, a step with dropout being 1 ({costs.rounds}): {'; '.join(told)}.{refused}"


def _listed(names: list[str]) -> str:
    shown = names[:SITES_NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
