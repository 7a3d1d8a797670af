"""What the mathematics takes for granted about a user's step: every assumption by name, with how it is measured.

This is the one place where assumptions live. A method states what it assumes by a line in `METHODS`; what measures an
assumption gives a `Measured` with its name; ``docs/guarantees.md`` shows the table (``python -m
lightning_dropreg.inspection.assumptions docs/guarantees.md`` writes it there) and ``dropreg inspect`` the figures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_dropreg.checks import check_choice
from lightning_dropreg.errors import DropregError, InvalidArgumentError

__all__ = ["ASSUMPTIONS", "METHODS", "Assumption", "Measured", "assumed_by", "is_due", "report", "table"]


@dataclass(frozen=True)
class Assumption:
    """Something that a method takes for granted about a step, and what is done where it is not so.

    Attributes:
        name: How code, documentation and messages call it.
        statement: What is assumed, as a sentence that is true or false of a step.
        measured: How that is found out on the user's own step, and when.
        right: Where it does not hold by itself and the right value is had nevertheless: how. Empty if never.
        fallback: What safe way is taken instead, with or without a warning. Empty if none.
        error: What is refused, and by which error of `lightning_dropreg.errors`. Empty if nothing.
    """

    name: str
    statement: str
    measured: str
    right: str = ""
    fallback: str = ""
    error: str = ""

    @property
    def follows(self) -> str:
        """What follows where it does not hold, in one text."""
        answers = (("Right value", self.right), ("Fallback", self.fallback), ("Error", self.error))
        return " ".join(f"{answer}: {text}" for answer, text in answers if text)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that rely on it."""
        return tuple(method for method, names in METHODS.items() if self.name in names)


@dataclass(frozen=True)
class Measured:
    """What was found when an assumption was measured on a step.

    Attributes:
        name: Of the assumption.
        value: The figure, such as a relative difference; None where the answer is yes or no.
        tolerance: Up to what figure the assumption counts as held; None without a figure.
        outcome: ``"holds"``, ``"right value"`` (put right), ``"fallback"``, ``"warning"`` or ``"error"``.
        note: What was compared, and what was found, in words.
        problem: What to raise before training, if the outcome is ``"error"``.
    """

    name: str
    value: float | None = None
    tolerance: float | None = None
    outcome: str = "holds"
    note: str = ""
    problem: DropregError | None = None

    def __post_init__(self) -> None:
        """Refuse names that are not in the table, so that nothing is measured that nobody can look up."""
        if self.name not in ASSUMPTIONS:
            raise InvalidArgumentError(f"{self.name!r} is no assumption; add it to ASSUMPTIONS.")
        check_choice("outcome", self.outcome, _OUTCOMES)

    def plain(self) -> dict[str, object]:
        """Return it as plain values, for JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "tolerance": self.tolerance,
            "outcome": self.outcome,
            "note": self.note or (str(self.problem) if self.problem is not None else ""),
        }


_OUTCOMES = ("holds", "right value", "fallback", "warning", "error")

_TABLE = (
    # ------------------------------------------------------------------ the step
    Assumption(
        "repeatable",
        "The step does the same thing when it is called again with the same batch and the same state.",
        "Run twice from the same state, without dropout before training, and at steps 1, 2, 4, 8, …, where the first "
        "pass of an antithetic pair is made once more: loss, elements of the losses, sites, hooks and state are "
        "compared.",
        right="Random generators of the step's own (torch, numpy, Python) that can be found are put back, like the "
        "global ones.",
        error="`NotRepeatableError` names what differs and the objects that may have moved on.",
    ),
    Assumption(
        "whole_batch",
        "The batch is whole again in the next pass.",
        "Every pass gets containers of its own; versions of their tensors and contents of their arrays are compared "
        "after the first.",
        right="Where the step changes tensors in place, every pass gets tensors of its own, too.",
        error="`NotRepeatableError` where an object cannot be copied and the step changes it.",
    ),
    Assumption(
        "state_put_back",
        "The whole state of the module, hooks and parametrizations included, is what it was when the next pass starts.",
        "Compared with the run that `repeatable` makes.",
        right="Buffers, attributes, hooks and modules are put back after every pass; what is left is the state of one "
        "run, or the mean over an antithetic pair. Passes share large tensors that the step left alone in all looks, "
        "until their version says that it writes to them.",
        error="`NotRepeatableError` names what keeps changing, or a shared tensor that is written to past autograd.",
    ),
    Assumption(
        "fixed_parameters",
        "The step itself changes no parameter: only optimizers do.",
        "Where every parameter lies in memory, and a checksum of its values and of their order, before and after the "
        "first step. In manual optimization parameters that the step changes are put back for every pass.",
        error="`UnsupportedModuleError` names the parameters.",
    ),
    Assumption(
        "logged_once",
        "What the step logs counts once for a batch, and can be read back within the step.",
        "By construction: calls of `self.log` are held back and replayed as a mean.",
        right="Values that the step reads back are those that it logged.",
    ),
    Assumption(
        "known_dropout",
        "Everything random in the step that acts as dropout is known as dropout.",
        "States of torch's, numpy's and Python's global generators around every operation of the first step.",
        fallback="A warning names what draws and where; it stays as it is and is the same in passes that are compared.",
    ),
    Assumption(
        "reached_site",
        "At least one dropout is carried out when the step runs.",
        "The calls of dropout in the first step are counted; those with drop probability 0 or in eval mode drop "
        "nothing and do not count.",
        right="A later step without any (layer drop, another task) is trained as it is: there is nothing to "
        "regularize in it.",
        error="`NoDropoutSiteError` in the first step; it names modules that are in eval mode.",
    ),
    # ------------------------------------------------------------------ loss and derivative
    Assumption(
        "recognized_loss",
        "All of the loss that depends on dropout goes through loss functions whose curvature is known.",
        "The autograd graph from the returned loss to the sites, in every pass that records losses.",
        error="`LossNotRecognizedError` names the site and the losses.",
    ),
    Assumption(
        "derivative_is_of_the_function",
        "The derivative that autograd gives at a site is that of the function that is computed.",
        "Each site's tangent against a finite step, and the gradients of both, before training (in the functions once "
        "for each closure); all sites together again at steps 1, 2, 4, 8, ….",
        right="`forward` follows values through `.detach()`; `antithetic` takes finite steps of the function.",
        error="`UnsupportedOperationError` names the site and the reason.",
    ),
    Assumption(
        "fixed_target",
        "What the loss compares the output with, and the weights of its elements, do not depend on dropout.",
        "The loss as a function of its outputs in two passes with opposite noise, and what its elements leave of its "
        "change, before training and at steps 1, 2, 4, 8, … (in the functions every time).",
        right="In losses of a difference (`mse_loss`, `huber_loss`, `smooth_l1_loss`): that is the output.",
        error="`LossNotRecognizedError` says what moves.",
    ),
    Assumption(
        "smooth",
        "The network has no kinks behind its dropout.",
        "The autograd graph of the first step; `dropreg inspect` measures the noise against `xi_approx`.",
        fallback="`KinkedNetworkWarning` names the kinks and the remedy.",
    ),
    Assumption(
        "small_step",
        "The finite step is small against what the function bends over.",
        "A pair with half the step along the same directions, on the first batch: penalty, and, where there are no "
        "kinks, the gradients of penalty and noise.",
        fallback="A `WideStepWarning` with the error and what makes it smaller (batch norm behind dropout, over two or "
        "three rows).",
    ),
    Assumption(
        "finite",
        "Loss, penalty and noise are finite.",
        "In every step on a CPU; on CUDA by `DivergenceDetector`.",
        error="`NonFinitePenaltyError` names step and site.",
    ),
    # ------------------------------------------------------------------ rows
    Assumption(
        "rows_found",
        "The rows of the batch can be told apart and taken one by one.",
        "The batch's containers, and runs on two disjoint parts of the rows, before training.",
        error="`UnsupportedRowsError`.",
    ),
    Assumption(
        "independent_rows",
        "A row's part in the loss does not depend on the other rows.",
        "Without dropout, before training and at steps 1, 2, 4, 8, …: the elements of the losses in two disjoint parts "
        "of the rows against those of the whole batch.",
        fallback="Where it stops to hold, the whole batch is taken from then on, with a warning; a warning where the "
        "step draws random numbers, so that values do not show it.",
        error="`UnsupportedRowsError` before training; it names batch norm.",
    ),
    Assumption(
        "mean_over_rows",
        "The loss is a weighted sum over the rows, and nothing in it is left when rows are taken away.",
        "The same comparison: how many elements count, and how much; of a loss that is not recognized, the mean over "
        "the two parts against the whole.",
        right="What elements count is known from the whole batch, so that sums, ignored tokens and rows without any "
        "target are right.",
        fallback="Where it stops to hold, the whole batch is taken from then on, with a warning.",
        error="`UnsupportedRowsError` before training.",
    ),
    Assumption(
        "own_masks",
        "Rows do not share masks.",
        "The shapes of the masks on the whole batch and on some of its rows.",
        error="`UnsupportedSiteError` names the sites.",
    ),
    Assumption(
        "pairable",
        "With some rows in the batch twice, loss, state, logs and output stay the same.",
        "Tried for every new shape of a batch, and again at steps 1, 2, 4, 8, ….",
        fallback="Drawn rows get passes of their own.",
    ),
    Assumption(
        "compiled",
        "In its graph, a part that `torch.compile` has made does what it does uncompiled.",
        "The first two sizes of each kind of call, both ways, under noise that nothing can hide in: sites, losses, "
        "outputs and gradients. Sites again in every call.",
        right="What breaks the graph (recurrent layers, losses) runs between its pieces.",
        fallback="The part runs uncompiled, with a `CompiledPartWarning` that says why.",
    ),
    Assumption(
        "shared_body",
        "What the step computes before its last dropout site stays what it was, so that it need not be computed again.",
        "The loss of a second draw both ways, on the first batch.",
        fallback="Every draw is a whole pass with the earlier masks repeated.",
        error="A step that goes another way later: `InconsistentPassesError`.",
    ),
)

ASSUMPTIONS: Mapping[str, Assumption] = {assumption.name: assumption for assumption in _TABLE}
"""All assumptions by name."""

_SEVERAL_RUNS = ("repeatable", "whole_batch", "state_put_back", "fixed_parameters", "logged_once", "reached_site")
_TAYLOR = (*_SEVERAL_RUNS, "known_dropout", "finite")
_DERIVATIVES = ("derivative_is_of_the_function",)
_ROWS = ("rows_found", "independent_rows", "mean_over_rows")

METHODS: Mapping[str, tuple[str, ...]] = {
    "ExplicitPenalty": (*_TAYLOR, "recognized_loss", "fixed_target"),
    "ImplicitNoise": _TAYLOR,
    "MiniBatchDropout": _SEVERAL_RUNS,
    "MiniBatchDropout at the last site": (*_SEVERAL_RUNS, "shared_body"),
    "RDrop": (*_SEVERAL_RUNS, "recognized_loss", "fixed_target"),
    "curvature full": _TAYLOR,
    "DropoutDiagnostics": (*_TAYLOR, "recognized_loss", "fixed_target"),
    "MonteCarloDropout": ("whole_batch", "state_put_back"),
    "estimator antithetic": ("smooth", "small_step"),
    "estimator forward": _DERIVATIVES,
    "estimator double_backward": _DERIVATIVES,
    "estimator exact": _DERIVATIVES,
    "compiled parts": ("compiled",),
    "batch_fraction": (*_ROWS, "own_masks"),
    "batch_fraction in one pass": (*_ROWS, "own_masks", "pairable"),
}
"""What every method relies on. A new method states what it assumes by a line here."""


def assumed_by(methods: Iterable[str]) -> list[Assumption]:
    """Return what some methods together assume, in the order of the table.

    Args:
        methods: Names in `METHODS`.

    Returns:
        The assumptions.

    Raises:
        InvalidArgumentError: If a method is unknown.

    Example:
        >>> [each.name for each in assumed_by(["estimator antithetic"])]
        ['smooth', 'small_step']
    """
    wanted: set[str] = set()
    for method in methods:
        if method not in METHODS:
            raise InvalidArgumentError(f"{method!r} is no method; choose from {', '.join(METHODS)}.")
        wanted.update(METHODS[method])
    return [assumption for name, assumption in ASSUMPTIONS.items() if name in wanted]


def report(methods: Iterable[str], measured: Iterable[Measured], refused: bool = False) -> list[dict[str, object]]:
    """Put together what some methods assume and what was measured of it.

    Args:
        methods: Names; those that are not in `METHODS` assume nothing.
        measured: What was measured on a step.
        refused: Whether the look at the step ended before all was measured.

    Returns:
        One row for each assumption as plain values: ``name``, ``statement``, ``value``, ``tolerance``, ``outcome`` and
        ``note``. What was not measured now has the outcome ``"not measured"``, with why in the note.

    Example:
        >>> report(["estimator antithetic"], [Measured("smooth", 2.0, outcome="warning", note="relu")])[0]["value"]
        2.0
    """
    of = {each.name: each for each in measured}
    rows = []
    for each in assumed_by(method for method in methods if method in METHODS):
        why = "what was found before is refused already" if refused else f"nothing to measure here. {each.measured}"
        unknown = {"value": None, "tolerance": None, "outcome": "not measured", "note": why}
        found = of[each.name].plain() if each.name in of else unknown
        rows.append({"name": each.name, "statement": each.statement, **found})
    return rows


def is_due(step: int) -> bool:
    """Whether what was measured before training is measured again: at steps 1, 2, 4, 8, ….

    Args:
        step: Number of the optimizer step, from 0; at 0 everything was measured just now.

    Returns:
        Whether it is a power of two.

    Example:
        >>> [step for step in range(20) if is_due(step)]
        [1, 2, 4, 8, 16]
    """
    return step > 0 and step & (step - 1) == 0


def table() -> str:
    """Return the table of all assumptions in Markdown, as it stands in ``docs/guarantees.md``."""
    head = "| assumption | statement | how it is measured | where it does not hold | who relies on it |"
    rows = [
        f"| `{each.name}` | {each.statement} | {each.measured} | {each.follows} | {', '.join(each.methods)} |"
        for each in ASSUMPTIONS.values()
    ]
    return "\n".join([head, "|---|---|---|---|---|", *rows])


_BEGIN, _END = "<!-- assumptions: begin -->", "<!-- assumptions: end -->"


def with_table(page: str) -> str:
    """Return a page with the table between its two marks brought up to date; refuse one without the marks."""
    if _BEGIN not in page or _END not in page:
        raise InvalidArgumentError(f"The page has no marks {_BEGIN} and {_END} around a table.")
    before, rest = page.split(_BEGIN, 1)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{rest.split(_END, 1)[1]}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text()))
