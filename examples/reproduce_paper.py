"""Makes the paper's Figures 1 to 5 and Table 1 at small size: configs/small, a little of Penn Treebank, two CPU cores.

python examples/reproduce_paper.py --root FOLDER_WITH_PTB [--figures 1 2 3 4 5 table] [--seeds 1 2 3] [--out DIR]
python examples/reproduce_paper.py --corpus wt2 --root FOLDER_WITH_WIKITEXT_2     the figures' right halves
python examples/reproduce_paper.py --from DIR     draws what an earlier `dropreg compare` left in DIR, trains nothing

Written to DIR: one figure_N.png and .svg for each figure, table_1.md, and orderings.md, which says for each finding of
the paper whether it holds here. Finished runs are kept: a command that was stopped goes on. Options for every run
follow after --, as for `dropreg compare`. DROPOUT_k takes k times as long as dropout.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # python examples/reproduce_paper.py
    sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.benchmarks.style import style_of_row
from lightning_dropreg.cli import compare
from lightning_dropreg.cli.comparison import Comparison
from lightning_dropreg.cli.curves import draw_bands
from lightning_dropreg.cli.spread import Spread

CONFIGS = Path(__file__).parents[1] / "configs" / "small"
FIGURES = {  # title and rows: names of files in configs/small
    "1": ("DROPOUT_k", ["dropout_1", "dropout_2", "dropout_4", "dropout_8"]),
    "2": (
        "DROPOUT_k and the noise of section 3.1",
        ["dropout_1", "dropout_4", "dropout_8", "dropout_4_noise", "dropout_8_noise"],
    ),
    "3": ("R_approx and the explicit effect of dropout", ["dropout_1", "dropout_8", "r_approx"]),
    "4": (
        "DROPOUT_k and ξ (Algorithm 4)",
        ["dropout_1", "dropout_2", "dropout_4", "dropout_8", "dropout_2_xi", "dropout_4_xi", "dropout_8_xi"],
    ),
    "5": ("dropout and Algorithm 2", ["dropout_1", "r_approx_xi", "none"]),
}
TABLE_1 = {  # the paper's best validation perplexity: Penn Treebank, whole, 3 x 1150 LSTM
    "none": "about 120",
    "l2": "112.04",
    "identity": "108.76",
    "loss_jacobian": "84.06",
    "r_approx": "84.52",
    "dropout_1": "73.76",
    "loss_jacobian_xi": "79.54",
    "r_approx_xi": "72.99",
}


@dataclass
class Claim:
    """What a finding says of two configurations, and how its margin decides (`RULE`)."""

    first: str
    relation: str
    second: str

    def verdict(self, margin: float) -> str:
        """Decide by the margin: how much lower the first is, in pooled standard deviations over seeds."""
        if math.isnan(margin):
            return "undecided"
        needed = {"better than": 2.0, "at least as good as": 0.0, "back at": -2.0}[self.relation]
        return "holds" if margin > needed else "does not hold" if margin <= -2.0 else "undecided"


BETTER, AS_GOOD, LIKE = "better than", "at least as good as", "back at"
ORDERINGS = {
    "(a) perplexity worsens with k": [("dropout_1", BETTER, "dropout_2"), ("dropout_2", BETTER, "dropout_8")],
    "(b) the noise of section 3.1 brings k = 8 back to k = 1": [
        ("dropout_8_noise", BETTER, "dropout_8"),
        ("dropout_8_noise", LIKE, "dropout_1"),
    ],
    "(c) so does xi_approx": [("dropout_8_xi", BETTER, "dropout_8"), ("dropout_8_xi", LIKE, "dropout_1")],
    "(d) R_approx beats DROPOUT_8": [("r_approx", BETTER, "dropout_8")],
    "(e) Algorithm 2 is at least as good as DROPOUT_1": [("r_approx_xi", AS_GOOD, "dropout_1")],
    "(f) the identity is much worse than the Hessian of the loss, its Jacobian is not": [
        ("r_approx", BETTER, "identity"),
        ("loss_jacobian", BETTER, "identity"),
    ],
    "(g) weight decay is far behind": [("r_approx", BETTER, "l2"), ("dropout_1", BETTER, "l2")],
}
RULE = """\
Margin: how much lower the mean over seeds of the best validation perplexity of the first is, in standard deviations
over seeds (pooled over the two; that of the other where one has a single seed). A finding holds if all of its lines do.
Later: how the curves of the paper's figures go on after their best point. The difference after the last epoch that both
runs of a seed reached, averaged over seeds; its margin is in standard deviations of that difference. Nothing is decided
by it.

| | holds | does not hold | undecided |
|---|---|---|---|
| better than | margin above 2 | -2 or less | between, or one seed each |
| at least as good as | above 0 | -2 or less | between, or one seed each |
| back at | above -2 | -2 or less | one seed each |
"""


def main(args: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    cut = args.index("--") if "--" in args else len(args)
    options = parse(args[:cut])
    if options.source is None:
        rows = dict.fromkeys(row for part in options.figures for row in rows_of(part))
        files = [str(file) for row in rows if (file := CONFIGS / f"{options.corpus}_{row}.yaml").is_file()]
        seeds = [str(seed) for seed in options.seeds]
        more = ["--data.root", options.root, *args[cut + 1 :]]
        compare.main([*files, "--seeds", *seeds, "--out", str(options.out), "--", *more])
    comparison = Comparison.read(options.source or options.out)
    report(comparison, options.out, options.corpus, options.figures)


def report(comparison: Comparison, out: Path, corpus: str = "ptb", figures: Sequence[str] = tuple(FIGURES)) -> None:
    """Draw the figures and write the tables of what there is."""
    out.mkdir(parents=True, exist_ok=True)
    for number in [part for part in figures if part in FIGURES]:
        title, rows = FIGURES[number]
        shown = Comparison(comparison.runs, [f"{corpus}_{row}" for row in rows])
        if len(shown.configs) > 1:
            styles = {config: style_of_row(config.partition("_")[2]) for config in shown.configs}
            draw_bands(shown, f"The paper's Figure {number} at small size: {title}", out / f"figure_{number}", styles)
    texts = {"orderings": orderings(comparison, corpus)}
    if corpus == "ptb":
        texts = {"table_1": table_1(comparison), **texts}
    for name, lines in texts.items():
        (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("", *lines, sep="\n")
    print(f"\nfigures and tables: {out}")


def parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*FIGURES, "table"]
    parser.add_argument("--figures", nargs="+", choices=parts, default=parts, help="all of them by default")
    parser.add_argument("--corpus", choices=["ptb", "wt2"], default="ptb", help="Penn Treebank or WikiText-2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="where runs and figures go")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", help="folder or archive of the corpus")
    source.add_argument("--from", dest="source", type=Path, metavar="DIR", help="an output folder of compare")
    return parser.parse_args(args)


def rows_of(part: str) -> list[str]:
    return list(TABLE_1) if part == "table" else FIGURES[part][1]


def table_1(comparison: Comparison) -> list[str]:
    titles = ["best validation perplexity", "paper, full size", "here, small size (± standard deviation)", "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|"]
    for row, paper in TABLE_1.items():
        ours = comparison.best(f"ptb_{row}")
        lines.append(f"| {row} | {paper} | {ours or ''} | {ours.count if ours else ''} |")
    return lines


def orderings(comparison: Comparison, corpus: str = "ptb") -> list[str]:
    """Judge the findings whose rows are all there."""
    titles = ["finding", "", "best: difference", "margin", "", "later: difference", "margin", "epoch"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for finding, parts in ORDERINGS.items():
        verdicts, details = [], []
        for claim in [Claim(*part) for part in parts]:
            configs = [f"{corpus}_{row}" for row in (claim.first, claim.second)]
            first, second = (comparison.best(config) for config in configs)
            if first and second:
                margin = -in_deviations(first, second)
                verdicts.append(claim.verdict(margin))
                what = f"{claim.first} {claim.relation} {claim.second}"
                best = f"{first.mean - second.mean:+.2f} | {margin:.1f} | {verdicts[-1]}"
                details.append(f"| | {what} | {best} | {later(comparison, *configs)} |")
        if len(verdicts) == len(parts):
            whole = next((v for v in ("does not hold", "undecided") if v in verdicts), "holds")
            lines += [f"| {finding} | | | | **{whole}** | | | |", *details]
    return [*lines, "", *RULE.splitlines()]


def in_deviations(first: Spread, second: Spread) -> float:
    """The difference of two means in pooled standard deviations; nan if neither has more than one seed."""
    squares = sum((s.count - 1) * s.deviation**2 for s in (first, second) if s.deviation is not None)
    freedom = first.count + second.count - 2
    difference = first.mean - second.mean
    if freedom == 0 or difference == squares == 0:
        return math.nan
    return math.copysign(math.inf, difference) if squares == 0 else difference / math.sqrt(squares / freedom)


def later(comparison: Comparison, first: str, second: str) -> str:
    """Compare two configurations, seed by seed, after the last epoch that both runs reached."""
    histories = [
        {run.seed: {epoch: value for epoch, value, _ in run.result.history} for run in comparison.of(config)}
        for config in (first, second)
    ]
    differences, epochs = [], []
    for seed in histories[0].keys() & histories[1].keys():
        one, other = histories[0][seed], histories[1][seed]
        epochs.append(min(max(one, default=0), max(other, default=0)))
        differences.append(one.get(epochs[-1], math.nan) - other.get(epochs[-1], math.nan))
    spread = Spread.of(differences)
    if spread is None:
        return " | | "
    margin = -spread.mean / spread.deviation if spread.deviation else math.nan
    return f"{spread.mean:+.2f} | {margin:.1f} | {', '.join(str(epoch) for epoch in sorted(set(epochs)))}"


if __name__ == "__main__":
    main()
