"""Tables and figures of the studies on text: the findings, the rows of the paper's first table, R-Drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from examples.benchmarks import studies
from examples.benchmarks.figures import differences
from examples.benchmarks.later_reports import COULD_BE_SEEN, arm_of
from examples.benchmarks.paired import Mean, difference
from examples.benchmarks.records import Records
from examples.benchmarks.reports import PLUS_MINUS, head, made_of, write

__all__ = ["r_drop_text", "table_1", "text", "text_tuned", "wikitext"]

ONE, AVERAGED, RESTORED = "DROPOUT_1", "DROPOUT_4", "DROPOUT_4 + noise of 3.1"
BESIDE_XI = "DROPOUT_4 + ξ"
COMPARISONS = [  # finding of the paper, first, second, what it expects of the difference
    ("(a) averaging the noise away makes it worse", AVERAGED, ONE, "above 0"),
    ("(b) the noise of section 3.1 helps", RESTORED, AVERAGED, "below 0"),
    ("(b) and brings it back", RESTORED, ONE, "near 0"),
    ("(c) so does ξ", BESIDE_XI, AVERAGED, "below 0"),
    ("(c) and brings it back", BESIDE_XI, ONE, "near 0"),
    ("(d) R beats averaged dropout", "R", AVERAGED, "below 0"),
    ("(d) but not dropout", "R", ONE, "above 0"),
    ("(e) Algorithm 2 is as good as dropout", "Algorithm 2", ONE, "near 0"),
    ("(e) ξ adds to R", "Algorithm 2", "R", "below 0"),
    ("twice the noise", "Algorithm 2 (noise 2)", "R", "-"),
    ("ξ adds to the loss Jacobian", "loss Jacobian + ξ", "loss Jacobian", "below 0"),
    ("(f) the identity is no substitute for the Hessian", "identity", "R", "above 0"),
    ("(f) the loss Jacobian is", "loss Jacobian", "R", "near 0"),
    ("(g) weight decay is far behind R", "ℓ2", "R", "above 0"),
    ("dropout regularizes at all", ONE, "none", "below 0"),
]
PAPER = {  # best validation perplexity in the paper's first table (none: in its text), 3 x 1150 LSTM, all of the corpus
    "none": "about 120",
    "ℓ2": "112.04",
    "identity": "108.76",
    "loss Jacobian": "84.06",
    "R": "84.52",
    "DROPOUT_1": "73.76",
    "loss Jacobian + ξ": "79.54",
    "Algorithm 2": "72.99",
}


def text(made: Records) -> None:
    """Write and draw the findings on text, one table for each corpus."""
    for data, name, corpus in (("ptb", "ptb", "Penn Treebank"), ("python manual",) * 2 + ("the embedded corpus",)):
        found = made_of(made, studies.text(data))
        if len(found) == len(studies.text(data)):
            title = [f"Small LSTMs on windows of {corpus}, the training set as one batch, {_seeds(found)} fresh seeds."]
            arms = {arm_of(record): record for record in found}
            _findings(made, arms, title, name.replace(" ", "_"), f"Small LSTMs on {corpus}: test NLL by method")


def table_1(made: Records) -> None:
    """Write and draw the rows of the paper's first table."""
    found = made_of(made, [*studies.table_1(), *studies.table_1_chosen(made)])
    if len(found) < 5:
        return
    title = [
        f"The rows of the paper's first table: small LSTMs on windows of Penn Treebank, q = 0.4, {_seeds(found)} fresh",
        "seeds, 600 steps for every row and no patience; R with strength 2, as in the paper's runs.",
    ]
    tried = made_of(made, studies.table_1_tuning())
    more = ["", "Strengths that were tried, four tuning seeds; the least held-out loss of a method is chosen.", ""]
    more += head("method", "held-out NLL", "test NLL")
    more += [f"| {arm_of(r)} | {' | '.join(Mean.of(r[key]).text() for key in ('held_out', 'test'))} |" for r in tried]
    _findings(made, _by_row(found), title, "table_1", "Rows of Table 1, small LSTMs on Penn Treebank: test NLL", more)


def wikitext(made: Records) -> None:
    """Write and draw the cheaper rows on WikiText-2."""
    found = made_of(made, studies.wikitext())
    missing = [arm_of(run.key()) for run in studies.wikitext() if made.find(run) is None]
    if len(found) > 1:
        title = [f"The setting of Table 1 on windows of WikiText-2, {_seeds(found)} fresh seeds, untuned."]
        more = ["", f"Not run, for want of time: {', '.join(missing)}."] if missing else []
        _findings(made, _by_row(found), title, "wikitext", "Small LSTMs on WikiText-2: test NLL by method", more)


def _by_row(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {arm_of(record).partition(" (")[0]: record for record in found}


def _seeds(found: Sequence[dict[str, Any]]) -> int:
    return len(found[0]["seeds"])


def _findings(
    made: Records,
    arms: dict[str, dict[str, Any]],
    title: Sequence[str],
    name: str,
    above: str,
    more: Sequence[str] = (),
) -> None:
    paper = name == "table_1"
    lines = [
        *title[:-1],
        f"{title[-1]} Test NLL in nats per",
        "token at the best held-out point, perplexity its exponential.",
        "",
        *head(
            "method", *["paper, perplexity"] * paper, "test NLL", "perplexity", "at the last step", "best step", "CPU s"
        ),
    ]
    for label, record in arms.items():
        test = Mean.of(record["test"])
        cells = [arm_of(record), *[PAPER.get(label, "")] * paper]
        cells += [test.text(), f"{math.exp(test.mean):.1f}", Mean.of(record["last_test"]).text()]
        cells += [f"{Mean.of(record['best_step']).mean:.0f}", f"{record['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| finding of the paper | difference | expected | here | in standard errors | wins | could be seen |",
        "|---|---|---|---|---|---|---|",
    ]
    for finding, first, second, expected in COMPARISONS:
        if first in arms and second in arms:
            d = difference(arms[first], arms[second])
            least = "" if d.error is None else f"{3 * d.error:.4f}"
            lines.append(f"| {finding} | {first} - {second} | {expected} | {d.row()} | {least} |")
    lines += [*more, "", PLUS_MINUS, COULD_BE_SEEN]
    write(made.path.parent / f"{name}.md", lines, list(arms.values()))
    rows = [(r["method"], r["parameters"], difference(r, arms[ONE])) for r in arms.values() if r is not arms[ONE]]
    differences(rows, above, ONE, made.path.parent / name)


def r_drop_text(made: Records) -> None:
    """Write R-Drop on text beside Algorithm 2 with a penalty of the same strength."""
    found = made_of(made, studies.r_drop_text())
    if len(found) < len(studies.r_drop_text()):
        return
    dropout = found[0]
    columns = ["alpha", "method", "test NLL", "at the last step"]
    columns += ["minus R-Drop", "could be seen", "minus dropout", "CPU s"]
    lines = [
        f"The setting of Table 1, {_seeds(found)} fresh seeds, 600 steps for all: R-Drop, and Algorithm 2 with",
        f"a penalty of strength 1 + 2 alpha. Nothing is tuned. Dropout alone: {Mean.of(dropout['test']).text()}.",
        "",
        *head(*columns),
    ]
    for record in found[1:]:
        own = record["parameters"]
        alpha = own.get("alpha", (own.get("strength", 1.0) - 1) / 2)
        rival = next(r for r in found if r["parameters"].get("alpha") == alpha)
        d = difference(record, rival)
        versus = [" | | ", ""] if record is rival else [d.row(), f"{3 * (d.error or 0):.4f}"]
        cells = [f"{alpha:g}", record["method"], Mean.of(record["test"]).text(), Mean.of(record["last_test"]).text()]
        cells += [*versus, difference(record, dropout).row(), f"{record['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    write(made.path.parent / "r_drop_text.md", [*lines, "", PLUS_MINUS, COULD_BE_SEEN], found)


def text_tuned(made: Records) -> None:
    """Write dropout, R-Drop and Algorithm 2 on text, each tuned."""
    grid = studies.text_tuned()
    found = made_of(made, studies.chosen(grid, made, studies.SEEDS["text_tuned"]))
    if len(found) < 3:
        return
    lines = [
        f"The setting of Table 1, the best of four configurations on four tuning seeds, {_seeds(found)} fresh seeds,",
        "600 steps for all (R-Drop and Algorithm 2 take two passes for a step).",
        "",
        *head("method", "test NLL", "at the last step", "minus dropout", "could be seen", "best step", "CPU s"),
    ]
    for record in found:
        d = difference(record, found[0])
        versus = [" | | ", ""] if record is found[0] else [d.row(), f"{3 * (d.error or 0):.4f}"]
        cells = [arm_of(record), Mean.of(record["test"]).text(), Mean.of(record["last_test"]).text(), *versus]
        cells += [f"{Mean.of(record['best_step']).mean:.0f}", f"{record['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    d = difference(found[2], found[1])
    lines += ["", *head("Algorithm 2 minus R-Drop", "could be seen"), f"| {d.row()} | {3 * (d.error or 0):.4f} |"]
    tried = made_of(made, grid)
    spent = {m: sum(r["cpu_seconds"] for r in tried if r["method"] == m) for m in [r["method"] for r in found]}
    told = ", ".join(f"{method} {seconds:.0f}" for method, seconds in spent.items())
    lines += ["", *_mean_curves_at_equal_time(found), "", f"Tuning seeds (CPU seconds: {told}):", ""]
    lines += head("method", "held-out NLL", "test NLL")
    lines += [f"| {arm_of(r)} | {' | '.join(Mean.of(r[key]).text() for key in ('held_out', 'test'))} |" for r in tried]
    write(made.path.parent / "text_tuned.md", [*lines, "", PLUS_MINUS, COULD_BE_SEEN], [*found, *tried])


def _mean_curves_at_equal_time(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the means over seeds were at by the time of each run; of single seeds the records have no curves."""
    times = sorted(record["cpu_seconds"] for record in found)[:: len(found) - 1]  # of the cheapest and of the dearest
    lines = [
        "At equal time, by the means over seeds (so without a spread): test NLL at the evaluation with the least",
        "held-out NLL among those that each had reached after so many CPU seconds, and its step.",
        "",
        *head("method", *[f"{time:.0f} s" for time in times]),
    ]
    for record in found:
        cells = []
        for time in times:
            per_step = record["cpu_seconds"] / record["steps"][-1]
            reached = [at for at, step in enumerate(record["steps"]) if step * per_step <= time]
            if not reached:
                cells.append("–")
                continue
            at = min(reached, key=lambda at: record["mean_held_out"][at])
            cells.append(f"{record['mean_test'][at]:.4f} ({record['steps'][at]})")
        lines.append(f"| {arm_of(record)} | {' | '.join(cells)} |")
    return lines
