"""Decides what the paper claims of dropout's two effects, on 32 networks at once, in about ten minutes.

pip install "lightning-dropreg[plot,examples]";  python -m examples.claims [--seeds 32] [--setting A] [--out DIR]

From the root of a clone. Written to DIR: runs.jsonl (what was measured, with machine and versions), claims.md and
claims.png. Finished runs are kept: a command that was stopped goes on. `--setting` is a name of SETTINGS below, in
which the strengths of the ablations and of weight decay were tuned for A alone. Rules: examples/benchmarks/PROTOCOL.md.

All arms run through this package's callbacks in an ordinary Trainer (examples/benchmarks/training.py); that networks
in one module get the gradients that each would get alone is tests/examples/test_many_networks.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # python examples/claims.py
    sys.path.insert(0, str(Path(__file__).parents[1]))
    __package__ = "examples"

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.benchmarks.figures import differences
from examples.benchmarks.paired import Mean, difference
from examples.benchmarks.records import Records, Run
from examples.benchmarks.studies import SEEDS, A, claims
from examples.benchmarks.style import plain_label

SETTINGS = {
    "A": A,  # the whole training set as one batch: no noise but dropout's
    "small batches": replace(A, batch_size=10, rate=0.2),  # plenty of noise besides dropout's
    "slow": replace(A, rate=0.1, passes=4000),  # little noise of any kind
    "10 % random labels": replace(A, label_noise=0.1),
}
K1, K8, K8_N, K8_XI = "dropout", "DROPOUT_k", "DROPOUT_k + 3.1", "DROPOUT_k + xi"
COMPARISONS = [  # finding of the paper, first, second, what it expects of the difference
    ("(a) averaging the noise away makes it worse", K8, K1, "above 0"),
    ("(b) the noise of section 3.1 helps DROPOUT_8", K8_N, K8, "below 0"),
    ("(b) and brings it back to DROPOUT_1", K8_N, K1, "near 0"),
    ("(c) so does ξ", K8_XI, K8, "below 0"),
    ("(c) and brings it back to DROPOUT_1", K8_XI, K1, "near 0"),
    ("(d) R has the explicit effect and beats DROPOUT_8", "R", K8, "below 0"),
    ("(d) but not DROPOUT_1", "R", K1, "above 0"),
    ("(e) Algorithm 2 is as good as DROPOUT_1", "Algorithm 2", K1, "near 0"),
    ("(e) ξ adds to R", "Algorithm 2", "R", "below 0"),
    ("(f) the identity is no substitute for the Hessian", "identity", "R", "above 0"),
    ("(f) the loss Jacobian is", "loss Jacobian", "R", "near 0"),
    ("(g) weight decay is far behind R", "l2", "R", "above 0"),
    ("dropout regularizes at all", K1, "none", "below 0"),
]


def main(args: Sequence[str] | None = None) -> None:
    options = parse(args)
    quiet()
    setting = SETTINGS[options.setting]
    if options.fast:
        setting = replace(setting, passes=4, evaluations=2)
    seeds = [SEEDS["claims"][0] + n for n in range(options.seeds)]
    runs = claims(setting, seeds)
    if options.fast:
        runs = [replace(run, options={"widths": (8, 8)}) for run in runs]
    records = Records(options.out / "runs.jsonl")
    found = make(runs, records)
    if not any("failed" in record for record in found.values()):
        report(found, options.setting, options.out)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=32, help="networks; the first of the 32 that the claims are made of"
    )
    parser.add_argument("--setting", choices=SETTINGS, default="A")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="where runs, table and figure go")
    parser.add_argument("--fast", action="store_true", help="a few steps of tiny networks, to see that it runs")
    return parser.parse_args(args)


def quiet() -> None:
    """One thread, for the tensors are small, and no word from Lightning between the lines of the progress bar."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def make(runs: Sequence[Run], records: Records) -> dict[str, dict[str, Any]]:
    """Make the runs that have not been made, under a progress bar.

    Returns:
        The records by method.
    """
    columns = (TextColumn("{task.description:24}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    found = {}
    with Progress(*columns, TimeRemainingColumn(compact=True)) as progress:
        whole = progress.add_task("all", total=len(runs))
        for run in runs:
            length = run.setting.passes
            task = progress.add_task(plain_label(run.method, run.parameters), total=length)
            made = records.make(run, on_step=lambda task=task: progress.advance(task))
            progress.update(task, completed=length)
            progress.advance(whole)
            found[run.method] = made
    return found


def report(found: dict[str, dict[str, Any]], name: str, folder: Path) -> None:
    """Write and print the table, and draw the figure."""
    seeds = len(found[K1]["seeds"])
    text = "\n".join(tables(found, name)) + "\n"
    (folder / "claims.md").write_text(text, encoding="utf-8")
    print(text)
    rows = [
        (method, record["parameters"], difference(record, found[K1]))
        for method, record in found.items()
        if method != K1
    ]
    noise = found[K1]["setting"]["label_noise"]
    title = f"Digits, {100 * noise:g} % random training labels, setting {name}: test NLL by method"
    differences(rows, title, "DROPOUT_1", folder / "claims")
    print(f"{seeds} seeds; written to {folder}: claims.md, claims.png, runs.jsonl")


def tables(found: dict[str, dict[str, Any]], name: str) -> list[str]:
    """Return what was measured as Markdown."""
    first = next(iter(found.values()))
    made, seeds = first["provenance"], len(first["seeds"])
    spread = "" if seeds == 1 else " ± is the standard error over seeds."
    lines = [
        f"Setting {name}, {seeds} seed{'s' * (seeds > 1)}. Test negative log-likelihood and accuracy at the best",
        f"held-out point, test NLL at the last step, CPU seconds for all seeds together.{spread}",
        "",
        "| method | test NLL | accuracy | at the last step | best step | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for method, record in found.items():
        label = plain_label(method, record["parameters"], strength=True)
        cells = [
            Mean.of(record["test"]).text(),
            Mean.of(record["accuracy"]).text(3),
            Mean.of(record["last_test"]).text(),
            f"{Mean.of(record['best_step']).mean:.0f}",
            f"{record['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "Paired differences in test NLL (negative: the first is better), in standard errors, and seeds on which the",
        "first is better. *Expected* is what the paper's finding says of the sign.",
        "",
        "| finding of the paper | difference | expected | here | in standard errors | wins |",
        "|---|---|---|---|---|---|",
    ]
    for finding, one, other, expected in COMPARISONS:
        names = " - ".join(plain_label(method, found[method]["parameters"]) for method in (one, other))
        lines.append(f"| {finding} | {names} | {expected} | {difference(found[one], found[other]).row()} |")
    load = max(float(record["provenance"]["load"] or 0) for record in found.values())
    machine = f"{made['cpu']}, {made['cores']} cores, one thread, load up to {load:g}"
    versions = f"python {made['python']}, torch {made['torch']}, lightning {made['lightning']}"
    commits = ", ".join(sorted({record["provenance"]["commit"] for record in found.values()}))
    return [*lines, "", f"`{made['command']}` on {made['date']}, commit {commits}; {machine}; {versions}."]


if __name__ == "__main__":
    main()
