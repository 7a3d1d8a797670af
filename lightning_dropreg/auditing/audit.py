"""The audit: measures a step, and lets every check look at what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning_dropreg.auditing.coverage import Findings, coverage_of
from lightning_dropreg.auditing.findings import SEVERITIES, Finding
from lightning_dropreg.auditing.others import check_optimizers, check_output, check_random, check_variance
from lightning_dropreg.auditing.rates import (
    check_backward,
    check_certain,
    check_evaluation,
    check_frozen,
    check_ranks,
    check_rates,
)
from lightning_dropreg.auditing.reach import check_modes, check_reached, check_restored
from lightning_dropreg.auditing.record import DRAWS, ERROR_PROBABILITY, Record, measure
from lightning_dropreg.auditing.subject import subject_of
from lightning_dropreg.checks import check_count

__all__ = ["audit"]

CHECKS: tuple[Callable[[Record], Iterator[Finding]], ...] = (
    check_reached,
    check_modes,
    check_restored,
    check_rates,
    check_frozen,
    check_backward,
    check_output,
    check_evaluation,
    check_variance,
    check_optimizers,
    check_certain,
    check_ranks,
    check_random,
)


def audit(
    module: Any,
    batch: Any = None,
    *,
    validation_batch: Any = None,
    draws: int = DRAWS,
    error_probability: float = ERROR_PROBABILITY,
) -> Findings:
    """Look for dropout that does not do what it should, in a step as it really runs.

    The step runs `draws` + 3 times at most and each evaluation step twice; modules, random states and gradients are
    left as they were.

    Args:
        module: A LightningModule (its ``training_step`` and ``validation_step``), another `nn.Module`, or a closure
            that runs forward and loss (it is called with the batch if it takes one; its modules are put in evaluation
            mode for the other checks).
        batch: A training batch.
        validation_batch: A batch for the evaluation steps; `batch` by default.
        draws: Draws of the training step, at least 2.
        error_probability: Probability that chance alone makes a finding about masks (their rate, scale, and whether
            they are new), all tests of the audit together (Bonferroni).

    Returns:
        The findings, a list, errors first; empty if nothing was found. Its ``coverage`` says what was looked at.

    Raises:
        InvalidArgumentError: If an argument is out of range or `module` cannot be called.
        UnsupportedModuleError: If the module optimizes manually.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Forgetful(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.dropout(x, 0.5).sum()  # also in evaluation
        >>> for finding in audit(Forgetful(), torch.ones(8, 64)):
        ...     print(finding.id, finding.severity)
        active-in-eval error
        >>> print(audit(nn.Dropout(0.0), torch.ones(8, 64)).coverage.zero)
        1
    """
    check_count("draws", draws, 2)
    subject = subject_of(module, batch, batch if validation_batch is None else validation_batch)
    record = measure(subject, draws, error_probability)
    findings = [finding for check in CHECKS for finding in check(record)]
    findings += [
        Finding("incomplete", "note", subject.name, f"the {stage} step failed: {why}", "Audit with DropoutAudit.")
        for stage, why in record.incomplete.items()
    ]
    in_order = sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))
    return Findings(in_order, coverage_of(record))
