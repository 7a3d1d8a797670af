"""What was found, in words: short, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_dropreg.diagnostics.diagnosis import Diagnosis, trusted
from lightning_dropreg.diagnostics.effect import EffectReport
from lightning_dropreg.diagnostics.numbers import percent_range, with_margin

__all__ = ["read"]

SITES_NAMED = 4


def read(diagnosis: Diagnosis, costs: Mapping[str, float] | None = None) -> list[str]:
    """Say which sites carry the effect, where the expansion can be trusted, and what the methods cost.

    Args:
        diagnosis: What was measured.
        costs: Measured cost of a step by method, as a multiple of a dropout step.

    Returns:
        Sentences, one paragraph each.
    """
    effect = diagnosis.effect
    lines = [_size(effect)]
    if effect.sites:
        lines.append(_carriers(effect))
    if effect.problem:
        lines.append(f"R_approx could not be computed: {effect.problem}")
    else:
        lines += _trust(diagnosis)
    if diagnosis.noise is not None:
        lines.append(_noise(diagnosis))
    lines.append(_costs(costs))
    return lines


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
    if lower or total <= 0:
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


def _noise(diagnosis: Diagnosis) -> str:
    noise = diagnosis.noise
    assert noise is not None
    return (
        f"Gradient noise: the variance of xi_approx is {percent_range(noise.trace_ratio())} of that of xi_drop; cosine "
        f"of their covariances {with_margin(noise.alignment())}{', by sketches' if noise.sketched else ''}; "
        f"signal-to-noise of the gradient under dropout {with_margin(noise.signal_to_noise())}, {noise.draws} draws."
    )


def _costs(costs: Mapping[str, float] | None) -> str:
    if not costs:
        return "Costs: not measured here; `dropreg bench --json` measures them, and --bench FILE shows them here."
    told = ", ".join(f"{method} {ratio:.2g}x" for method, ratio in costs.items())
    return f"Costs of one step, measured by bench, dropout being 1: {told}."


def _listed(names: list[str]) -> str:
    shown = names[:SITES_NAMED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
