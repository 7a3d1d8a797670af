"""Proof by breaking: breaks the code behind each guarantee, and shows that the test that stands beside it fails.

    python scripts/mutations.py            # all, a minute or two; docs/mutations.json holds the result

Every mutation replaces one passage of one file in a temporary copy of the tree. A mutation that no test notices ends
the script with an error: then the guarantee is not tested.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "mutations.json"


@dataclass(frozen=True)
class Mutation:
    """A guarantee, what is broken, and the tests of which at least one must fail."""

    guarantee: str
    file: str
    old: str
    new: str
    tests: str


S, T = "lightning_dropreg/session/", "tests/session/"
MUTATIONS = [
    Mutation(
        "a run extended past the end of an epoch goes on bit for bit",
        S + "position.py",
        "self._batches if step == self._step else 0)",
        "self._trainer.fit_loop.epoch_loop.batch_idx)",
        T + "test_beside_lightning.py -k past_the_end",
    ),
    Mutation(
        "a checkpoint of other settings is refused",
        S + "resume.py",
        "    if problems:\n        raise",
        "    if not problems:\n        raise",
        T + "test_resume.py -k other_settings",
    ),
    Mutation(
        "a search has our callbacks",
        S + "searches.py",
        "        if missing:",
        "        if False:",
        T + "test_beside_lightning.py -k 'rate_is_searched or in_the_search_too'",
    ),
    Mutation(
        "a finder's own checkpoint is no resumption",
        S + "searches.py",
        "    if not finders:\n        return",
        "    if finders:\n        return",
        T + "test_beside_lightning.py -k search_is_made",
    ),
    Mutation(
        "a search leaves nothing behind",
        S + "base.py",
        "if self._session.search.is_over:",
        "if False:",
        T + "test_beside_lightning.py -k 'search_is_made or in_the_midst'",
    ),
    Mutation(
        "a later step without dropout is the plain one",
        S + "session.py",
        "except NoDropoutSiteError:  # by chance",
        "except ZeroDivisionError:  # by chance",
        T + "test_beside_lightning.py -k later_step",
    ),
    Mutation(
        "strength 0 needs no recognized loss",
        "lightning_dropreg/step/plan.py",
        "(self.penalizes and self.curvature != FULL)",
        "(self.penalty is not None and self.curvature != FULL)",
        T + "test_beside_lightning.py -k strength_zero",
    ),
    Mutation(
        "the classes of pytorch_lightning are known",
        S + "twins.py",
        "return (kind,) if twin is None or twin is kind else (kind, twin)",
        "return (kind,)",
        T + "test_beside_lightning.py -k other_package",
    ),
    Mutation(
        "a lost graph is named",
        S + "problems.py",
        "if loss.grad_fn is None or sharded or _leads_to(loss, parameters):",
        "if True:",
        T + "test_beside_lightning.py -k lost_its_graph",
    ),
    Mutation(
        "what is in eval mode is named",
        "lightning_dropreg/inspection/at_rest.py",
        "    if not parts:",
        "    if parts:",
        T + "test_beside_lightning.py -k eval_mode",
    ),
    Mutation(
        "hooks on gradients see the noise once",
        S + "session.py",
        "self.looks.plan = self.plan.with_noise_in_loss()",
        "pass",
        T + "test_gradient_hooks.py",
    ),
    Mutation(
        "manual steps find the gradients that they had",
        S + "past.py",
        "                parameter.grad = None if gradient is None else gradient.clone()  # the step",
        "                parameter.grad = None if gradient is None else 2 * gradient  # the step",
        T + "test_manual_by_hand.py -k 'surgery or weighted or sam'",
    ),
    Mutation(
        "parameters moved by hand are put back",
        S + "past.py",
        "value.clone() if whole or parameter in by_hand else value)",
        "value)",
        T + "test_manual_by_hand.py",
    ),
    Mutation(
        "losses of an earlier backward do not count in the penalty",
        "lightning_dropreg/passes/run.py",
        "            interception.losses = used_losses(loss, interception.losses)\n",
        "",
        T + "test_manual_by_hand.py -k 'penalty and sam'",
    ),
    Mutation(
        "finished runs of other options are kept",
        "lightning_dropreg/cli/compare.py",
        "    if worth_keeping and before != fingerprint:",
        "    if False:",
        "tests/cli/test_late_refusals.py -k kept",
    ),
    Mutation(
        "figures are refused before training",
        "lightning_dropreg/callbacks/diagnostics.py",
        '            make_directory("figures", self.figures)\n',
        "",
        "tests/cli/test_late_refusals.py -k figures_are_refused",
    ),
    Mutation(
        "checkpoints are recomputed with the same noise",
        "lightning_dropreg/interception/checkpointing.py",
        "        with mode.replaying(start):\n            return fn(*args, **kwargs)",
        "        return fn(*args, **kwargs)",
        "tests/numerics/test_torch_private.py -k checkpoints_are_known",
    ),
    Mutation(
        "checkpoints of unknown make are refused",
        "lightning_dropreg/interception/checkpointing.py",
        "    if in_checkpoint():",
        "    if False:",
        "tests/numerics/test_torch_private.py -k 'unknown_make or other_doors'",
    ),
    Mutation(
        "clipping acts after the noise, scaled gradients get scaled noise",
        S + "parameters.py",
        "scaled = scalar if scaler is None else scaler(scalar)",
        "scaled = scalar",
        T + "test_precision.py -k scaled_noise",
    ),
]


def caught(mutation: Mutation, tree: Path) -> tuple[bool, str]:
    """Apply a mutation, run its tests and undo it.

    Returns:
        Whether a test failed, and the last line of pytest.
    """
    file = tree / mutation.file
    whole = file.read_text()
    if whole.count(mutation.old) != 1:
        return False, f"the passage is {whole.count(mutation.old)} times in {mutation.file}"
    file.write_text(whole.replace(mutation.old, mutation.new))
    command = f"{sys.executable} -m pytest -q -n 0 -x -p no:cacheprovider {mutation.tests}"
    surroundings = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, shell=True, cwd=tree, capture_output=True, text=True, env=surroundings, check=False, timeout=600
    )
    file.write_text(whole)
    return done.returncode == 1, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]


def main() -> None:
    """Break everything, one after the other."""
    results, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", ".venv", "__pycache__", "runs"))
        for mutation in MUTATIONS:
            found, said = caught(mutation, tree)
            missed += not found
            results.append({**asdict(mutation), "caught": found, "said": said})
            print("caught" if found else "MISSED", "-", mutation.guarantee, "-", said, flush=True)
    RECORD.write_text(
        json.dumps({"caught": len(results) - missed, "missed": missed, "mutations": results}, indent=2) + "\n"
    )
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
