"""Tables and figures of the studies that were added later: wrong labels and their remedies, R-Drop at half price."""

from __future__ import annotations

from typing import Any

from examples.benchmarks import studies
from examples.benchmarks.figures import fitted
from examples.benchmarks.paired import Mean, difference
from examples.benchmarks.records import Records
from examples.benchmarks.reports import PLUS_MINUS, head, made_of, write
from examples.benchmarks.style import plain_label

__all__ = ["COULD_BE_SEEN", "arm_of", "labels", "r_drop", "remedies"]

COULD_BE_SEEN = "*Could be seen*: three standard errors, the smallest difference that would have stood out."


def arm_of(record: dict[str, Any]) -> str:
    """Return what a table calls a run."""
    return plain_label(record["method"], record["parameters"], strength=True)


def labels(made: Records) -> None:
    """Write and draw what becomes of wrong labels."""
    found = made_of(made, studies.labels())
    if not found:
        return
    lines = [
        f"Digits, 40 % random labels, batches of 50, rate 0.4, 2,400 steps, {len(found[0]['seeds'])} fresh seeds.",
        "*Fitted*: the share of wrong (right) training labels that the network predicts, mean over seeds, at the",
        "evaluation with the least mean held-out loss, and at the last step.",
        "",
        *head(
            "method",
            "test NLL",
            "minus dropout",
            "accuracy",
            "best step",
            "at the last step",
            "wrong fitted",
            "right fitted",
            "wrong, last",
            "right, last",
            "CPU s",
        ),
    ]
    dropout = next((record for record in found if record["method"] == "dropout"), None)
    for record in found:
        at = min(range(len(record["steps"])), key=lambda i: record["mean_held_out"][i])
        shares = [record[f"mean_fitted_{which}"][i] for i in (at, -1) for which in ("wrong", "right")]
        cells = [
            arm_of(record).replace("DROPOUT_1", "dropout"),
            Mean.of(record["test"]).text(),
            difference(record, dropout).row() if dropout and record is not dropout else " | | ",
            Mean.of(record["accuracy"]).text(3),
            f"{Mean.of(record['best_step']).mean:.0f}",
            Mean.of(record["last_test"]).text(),
            *(f"{100 * share:.0f} %" for share in shares),
            f"{record['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    out = [arm_of(record) for run in studies.labels() if (record := made.find(run)) and "failed" in record]
    lines += ["", f"Out, because a network's loss became infinite: {', '.join(out)}."] if out else []
    by = {record["method"]: record for record in reversed(found)}  # of the whole curvature the first, left alone
    remedy, full = by.get("generalized CE with dropout"), by.get("curvature full")
    if remedy and full:
        lines += ["", *head(f"{arm_of(remedy)} minus {arm_of(full)}"), f"| {difference(remedy, full).row()} |"]
    write(made.path.parent / "labels.md", [*lines, "", PLUS_MINUS], found)
    shown = [r for r in found if not r["parameters"].keys() & {"clip", "fade", "rate"}]
    fitted(shown, "Digits, 40 % random labels: training labels predicted, by step", made.path.parent / "labels")


def r_drop(made: Records) -> None:
    """Write R-Drop beside the penalty of the same strength."""
    found = made_of(made, studies.r_drop())
    by = {(r["method"], r["part"], r["parameters"]["q"], _alpha(r)): r for r in found}
    keys = [(q, alpha) for method, part, q, alpha in by if method == "R-Drop"]
    lines = [
        "Digits, 10 % random labels, batches of 50, rate 0.4, 16 fresh seeds: R-Drop, and the penalty of strength",
        "1 + 2 alpha at the same q. R-Drop and R take 1,200 steps; R on a quarter of the rows 1,600 (as many passes)",
        "or 1,200 (as many steps). Nothing is tuned.",
        "",
        *head(
            "q",
            "alpha",
            "R-Drop",
            "CPU s",
            "R minus R-Drop",
            "quarter, equal passes, minus R-Drop",
            "quarter, equal steps, minus R-Drop",
            "its CPU s",
        ),
    ]
    for q, alpha in keys:
        own = by["R-Drop", "fresh", q, alpha]
        cells = [f"{q:g}", f"{alpha:g}", Mean.of(own["test"]).text(), f"{own['cpu_seconds']:.0f}"]
        for other in (("R", "fresh"), ("R, quarter", "fresh"), ("R, quarter", "equal steps")):
            record = by.get((*other, q, alpha))
            cells.append(difference(record, own).row() if record else "out: infinite | | ")
        equal = by.get(("R, quarter", "equal steps", q, alpha))
        lines.append(f"| {' | '.join(cells)} | {equal['cpu_seconds']:.0f} |" if equal else f"| {' | '.join(cells)} | |")
    if keys:
        write(made.path.parent / "r_drop.md", [*lines, "", PLUS_MINUS], found)


def _alpha(record: dict[str, Any]) -> float:
    parameters = record["parameters"]
    return float(parameters.get("alpha", (parameters.get("strength", 0) - 1) / 2))


def remedies(made: Records) -> None:
    """Write the whole curvature beside generalized cross entropy with dropout, both tuned."""
    grid = studies.remedies()
    fresh = made_of(made, studies.chosen(grid, made, studies.SEEDS["remedies"]))
    if len(fresh) < 2:
        return
    full, remedy = fresh
    d = difference(full, remedy)
    lines = [
        "Digits, 40 % random labels, batches of 50, rate 0.4, 2,400 forward and backward passes, the best of eight",
        f"configurations on 16 tuning seeds, {len(full['seeds'])} fresh seeds. Named before its runs.",
        "",
        *head("method", "test NLL", "accuracy", "at the last step", "best step", "CPU s"),
    ]
    for record in fresh:
        cells = [Mean.of(record["test"]).text(), Mean.of(record["accuracy"]).text(3)]
        cells += [Mean.of(record["last_test"]).text(), f"{Mean.of(record['best_step']).mean:.0f}"]
        lines.append(f"| {arm_of(record)} | {' | '.join(cells)} | {record['cpu_seconds']:.0f} |")
    lines += ["", *head(f"{full['method']} minus {remedy['method']}", "could be seen")]
    lines += [f"| {d.row()} | {3 * (d.error or 0):.4f} |", "", "Tuning seeds:", ""]
    lines += head("method", "held-out NLL", "test NLL", "at the last step")
    tried = made_of(made, grid)
    for record in tried:
        values = " | ".join(Mean.of(record[key]).text() for key in ("held_out", "test", "last_test"))
        lines.append(f"| {arm_of(record)} | {values} |")
    lines += ["", PLUS_MINUS, COULD_BE_SEEN]
    write(made.path.parent / "remedies.md", lines, [*fresh, *tried])
