"""Tables and figures of the studies, from their records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.benchmarks import studies
from examples.benchmarks.figures import curves, differences, doses, heat_map
from examples.benchmarks.paired import Difference, Mean, difference
from examples.benchmarks.records import Records, Run
from examples.benchmarks.style import plain_label

__all__ = ["ablations", "claims", "dose", "map_of_noise", "negative", "tuned"]

PLUS_MINUS = "± is the standard error over seeds; differences are paired by seed."


def provenance_of(records: Sequence[dict[str, Any]]) -> str:
    """Return one line about where records come from."""
    made = [record["provenance"] for record in records]
    parts = {
        name: ", ".join(sorted({str(m[name]) for m in made}))
        for name in ("commit", "date", "cpu", "torch", "lightning")
    }
    loads = [float(m["load"]) for m in made if m["load"]]
    return (
        f"Commit {parts['commit']}; {parts['date']}; {parts['cpu']}, {made[0]['cores']} cores, one thread, load "
        f"{min(loads)} to {max(loads)} (other work ran beside it); python {made[0]['python']}, torch {parts['torch']}, "
        f"lightning {parts['lightning']}."
    )


def head(*names: str) -> list[str]:
    """Return the first two lines of a table, with two more cells for a difference ("a minus b")."""
    cells = [cell for name in names for cell in ([name, "in standard errors", "wins"] if "minus" in name else [name])]
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def write(path: Path, lines: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Write a table and where it comes from."""
    path.write_text("\n".join([*lines, "", provenance_of(records)]) + "\n", encoding="utf-8")


def made_of(made: Records, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the records that there are of these runs, those that failed left out."""
    found = [made.find(run) for run in runs]
    return [record for record in found if record is not None and "failed" not in record]


def ablations(made: Records) -> None:
    """Write the strengths that were tried for the ablations."""
    found = [record for run in studies.tuning_of_ablations() if (record := made.find(run))]
    lines = ["Setting A, tuning seeds. The least held-out loss of each method is chosen.", ""]
    lines += head("method", "held-out NLL", "test NLL")
    for r in found:
        label = plain_label(r["method"], r["parameters"], strength=True)
        values = [Mean.of(r[key]).text() for key in ("held_out", "test") if key in r] or ["out: infinite", ""]
        lines.append(f"| {label} | {' | '.join(values)} |")
    if found:
        write(made.path.parent / "ablations.md", [*lines, "", PLUS_MINUS], found)


def claims(made: Records) -> None:
    """Write the claims' table and draw their figures."""
    from examples.claims import report

    found = made_of(made, studies.claims())
    if len(found) == len(studies.claims()):
        report({record["method"]: record for record in found}, "A", made.path.parent)
        shown = [
            r for r in found if r["method"] in {"none", "dropout", "DROPOUT_k", "DROPOUT_k + xi", "R", "Algorithm 2"}
        ]
        curves(shown, "Digits, setting A: mean test NLL over 32 seeds, by step", made.path.parent / "curves")


def dose(made: Records) -> None:
    """Write and draw the dose-response."""
    arms = {r["method"]: r for r in made_of(made, studies.claims())}
    if not {"R", "DROPOUT_k", "Algorithm 2", "DROPOUT_k + xi", "dropout"} <= arms.keys():
        return
    seeds = arms["R"]["seeds"]
    series: dict[str, list[tuple[float, dict[str, Any]]]] = {
        "Algorithm 2": [(0.0, arms["R"]), (1.0, arms["Algorithm 2"])],
        "DROPOUT_k + xi": [(0.0, arms["DROPOUT_k"]), (1.0, arms["DROPOUT_k + xi"])],
    }
    for record in made_of(made, studies.dose()):
        parameters = record["parameters"]
        series[record["method"]].append((parameters.get("noise", parameters.get("strength")), record))
    lines = [f"Setting A, {len(seeds)} seeds: `ImplicitNoise(strength=s)` beside `ExplicitPenalty()`, beside", ""]
    lines[0] = f"Setting A, {len(seeds)} seeds. Noise of strength s beside the penalty (R) and beside DROPOUT_8."
    lines += [
        *head("beside", "s", "test NLL", "minus s = 0", "minus DROPOUT_1"),
    ]
    drawn: dict[str, list[tuple[float, Difference]]] = {}
    records = []
    for method, points in series.items():
        points.sort(key=lambda point: point[0])
        none = points[0][1]
        drawn[method] = [(s, difference(record, none)) for s, record in points]
        for s, record in points:
            own = difference(record, none).row() if s else " | | "
            value = Mean.of(record["test"]).text()
            beside = {"Algorithm 2": "R", "DROPOUT_k + xi": "DROPOUT_8"}[method]
            lines.append(f"| {beside} | {s:g} | {value} | {own} | {difference(record, arms['dropout']).row()} |")
            records.append(record)
    folder = made.path.parent
    write(folder / "dose.md", [*lines, "", PLUS_MINUS], records)
    doses(
        drawn,
        f"Digits, setting A: test NLL by the strength of the noise, {len(seeds)} seeds, ± 2 standard errors",
        "strength s of ImplicitNoise (1: dropout's own)",
        "test NLL minus that of s = 0, same seed",
        folder / "dose",
    )


def map_of_noise(made: Records) -> None:
    """Write and draw where averaging the noise away hurts and where it helps."""
    cells: dict[tuple[float, int], Difference] = {}
    lines = [
        "Setting A with other rates and batches, rate x steps = 400, 16 seeds; test NLL at the best held-out point.",
        "Positive: averaging the noise away makes it worse.",
        "",
        *head(
            "rows in a batch",
            "rate",
            "steps",
            "DROPOUT_1",
            "DROPOUT_8",
            "DROPOUT_8 minus DROPOUT_1",
            "best step of DROPOUT_1",
        ),
    ]
    records = []
    for averaged, single in studies.map_of_noise():
        found = made_of(made, [averaged, single])
        if len(found) == 2:
            cell = difference(*found)
            setting = averaged.setting
            cells[setting.rate, setting.batch_size] = cell
            records += found
            one, eight = (Mean.of(found[i]["test"]).text() for i in (1, 0))
            best = f"{Mean.of(found[1]['best_step']).mean:.0f}"
            lines.append(
                f"| {setting.batch_size} | {setting.rate:g} | {setting.passes} "
                f"| {one} | {eight} | {cell.row()} | {best} |"
            )
    if cells:
        write(made.path.parent / "map.md", [*lines, "", PLUS_MINUS], records)
        title = "DROPOUT_8 minus DROPOUT_1, test NLL, 16 seeds (in brackets the difference)"
        heat_map(cells, title, "learning rate", "rows in a batch (of 200)", made.path.parent / "map")


def tuned(made: Records, grid: Sequence[Run], label_noise: float, name: str) -> None:
    """Write and draw tuned against tuned at one level of label noise."""
    fresh = made_of(made, studies.chosen(list(grid), made, studies.SEEDS["tuned"]))
    reference = next((record for record in fresh if record["method"] == "dropout"), None)
    if reference is None:
        return
    lines = [
        f"{100 * label_noise:g} % random labels, batches of 50, 2,400 forward and backward passes; the best of eight",
        f"configurations on 16 tuning seeds, on {len(reference['seeds'])} fresh seeds. Minus dropout: paired.",
        "",
        *head("method", "configuration", "tuning, held out", "fresh test NLL", "accuracy", "minus dropout", "CPU s"),
    ]
    rows = []
    for record in sorted(fresh, key=lambda r: Mean.of(r["test"]).mean):
        own = [r for r in made_of(made, grid) if r["method"] == record["method"]]
        tried = next(r for r in own if r["parameters"] == record["parameters"])
        edge = edges(record["parameters"], [run.parameters for run in grid if run.method == record["method"]])
        parameters = ", ".join(f"{n} {v:g}{'*' if n in edge else ''}" for n, v in record["parameters"].items())
        found = difference(record, reference)
        cells = [
            plain_label(record["method"], {}).replace("DROPOUT_1", "dropout"),
            parameters,
            Mean.of(tried["held_out"]).text(),
            Mean.of(record["test"]).text(),
            Mean.of(record["accuracy"]).text(3),
            " | | " if record is reference else found.row(),
            f"{record['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if record is not reference:
            rows.append((record["method"], {}, found))
    for method in ("R", "Algorithm 2", "curvature full"):
        lines += ["", *against(fresh, method)]
    done = {record["method"] for record in fresh}
    missing = [method for method in dict.fromkeys(run.method for run in grid) if method not in done]
    later = [method for method in studies.LATER if method in done]
    lines += ["", f"Not run to the end: {', '.join(missing)}."] if missing else []
    lines += ["", f"Added when the results of the others were known: {', '.join(later)}."] if later else []
    notes = ["", PLUS_MINUS, "An asterisk marks a value at the end of what was tried, where more might be had."]
    write(made.path.parent / f"{name}.md", [*lines, *notes], fresh)
    table_of_grid(made, grid, name)
    by_the_clock(made, grid, fresh, name)
    title = f"Digits, {100 * label_noise:g} % random labels: every method tuned, 2,400 passes"
    differences(rows, title, "tuned dropout", made.path.parent / name)


def against(fresh: Sequence[dict[str, Any]], method: str) -> list[str]:
    """Return a table of one method's differences to all others."""
    own = [record for record in fresh if record["method"] == method]
    if not own:
        return []
    lines = [f"| {method} minus | difference | in standard errors | wins |", "|---|---|---|---|"]
    for record in sorted(fresh, key=lambda r: Mean.of(r["test"]).mean):
        if record is not own[0]:
            label = plain_label(record["method"], {}).replace("DROPOUT_1", "dropout")
            lines.append(f"| {label} | {difference(own[0], record).row()} |")
    return lines


def edges(parameters: dict[str, Any], grid: Sequence[dict[str, Any]]) -> set[str]:
    """Return the parameters that are the least or the greatest that was tried, where more than two were."""
    found = set()
    for name, value in parameters.items():
        values = {other[name] for other in grid}
        if value in {min(values), max(values)}:
            found.add(name)
    return found


def table_of_grid(made: Records, grid: Sequence[Run], name: str) -> None:
    """Write all that was tried."""
    lines = ["All configurations on the tuning seeds; the least held-out loss of each method is chosen.", ""]
    lines += head("method", "held-out NLL", "test NLL", "at the last step")
    found = []
    for run in grid:
        record = made.find(run)
        if record is None:
            continue
        found.append(record)
        label = plain_label(run.method, run.parameters, strength=True).replace("DROPOUT_1", "dropout")
        values = [Mean.of(record[key]).text() for key in ("held_out", "test", "last_test") if key in record]
        lines.append(f"| {label} | {' | '.join(values or ['out: ' + record['failed'].split(':')[0], '', ''])} |")
    write(made.path.parent / f"{name}_grid.md", [*lines, "", PLUS_MINUS], found)


def by_the_clock(made: Records, grid: Sequence[Run], fresh: Sequence[dict[str, Any]], name: str) -> None:
    """Write what the equal number of passes took, the search included."""
    lines = [
        "What 2,400 passes took in CPU seconds, all seeds together: the fresh run, how far into it each seed's best",
        "point is (mean), and the search: eight configurations on tuning seeds (diverged ones left out), then the run.",
        "",
        *head("method", "fresh test NLL", "ms for a step", "run", "until the best point", "search and run"),
    ]
    for record in sorted(fresh, key=lambda r: Mean.of(r["test"]).mean):
        own = [r for r in made_of(made, grid) if r["method"] == record["method"]]
        seconds = record["cpu_seconds"]
        per_step = seconds / record["steps"][-1]
        label = plain_label(record["method"], {}).replace("DROPOUT_1", "dropout")
        cells = [
            Mean.of(record["test"]).text(),
            f"{1000 * per_step:.1f}",
            f"{seconds:.0f}",
            f"{Mean.of(record['best_step']).mean * per_step:.0f}",
            f"{seconds + sum(r['cpu_seconds'] for r in own):.0f}",
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    notes = [
        "Other work ran on the machine. A step of the penalty takes about twice as long from version d04b9e6 on,",
        "which copies the rows that this module keeps around every pass; the commits of the runs are in the records.",
    ]
    notes += ["", PLUS_MINUS]
    write(made.path.parent / f"{name}_time.md", [*lines, "", *notes], fresh)


def negative(made: Records) -> None:
    """Write the regression problems."""
    lines = [
        "Squared error as a fraction of the training variance, 32 fresh seeds; the best of four values on 16 others."
    ]
    records = []
    for problem in studies.PROBLEMS:
        fresh = made_of(made, studies.chosen(studies.negative(problem), made, studies.SEEDS["negative"]))
        by_method = {record["method"]: record for record in fresh}
        if "none" not in by_method or "dropout" not in by_method:
            continue
        records += fresh
        lines += ["", f"**{problem} steps**" if problem[-1].isdigit() else f"**{problem}**", ""]
        lines += [
            *head("method", "test error", "minus none", "minus dropout", "CPU s"),
        ]
        for record in sorted(fresh, key=lambda r: Mean.of(r["test"]).mean):
            versus = [
                " | | " if record is by_method[other] else difference(record, by_method[other]).row()
                for other in ("none", "dropout")
            ]
            label = plain_label(record["method"], record["parameters"], strength=True).replace("DROPOUT_1", "dropout")
            value = Mean.of(record["test"]).text()
            lines.append(f"| {label} | {value} | {' | '.join(versus)} | {record['cpu_seconds']:.0f} |")
    if records:
        write(made.path.parent / "negative.md", [*lines, "", PLUS_MINUS], records)
