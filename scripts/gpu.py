"""Everything that needs a CUDA device: tests, costs, memory, and the paper's language model for a stated time.

    python scripts/gpu.py                                  # tests and costs, in an environment with the extra `test`
    python scripts/gpu.py --root FOLDER --minutes 20       # and the Penn Treebank of FOLDER, 20 minutes for each row
    python scripts/gpu.py --rehearse                       # the same path on a CPU, as small as it gets

Writes ``build/gpu/results.json`` and ``build/gpu/results.md``: for each part the command, the
seconds, what came of it. A part that fails does not keep the others from running; the exit status is 1 if one did.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ROWS = ("ptb_dropout_1", "ptb_dropout_8", "ptb_r_approx", "ptb_r_approx_xi")
FEW_WINDOWS = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=2", "--trainer.max_epochs=1"]
TINY = ["--model.init_args.embedding_dim=16", "--model.init_args.hidden_dim=16"]
DROPREG = [sys.executable, "-m", "lightning_dropreg"]


@dataclass
class Part:
    """One command, and what came of it."""

    name: str
    command: list[str]
    json_output: bool = False
    status: int = 0
    seconds: float = 0.0
    tail: str = ""
    found: Any = field(default=None)

    def run(self, log: Path) -> None:
        """Run it, with what it prints in a file."""
        print(f"{self.name} …", flush=True)
        begun = time.monotonic()
        with log.open("w") as stderr:
            done = subprocess.run(self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
        self.status, self.seconds = done.returncode, round(time.monotonic() - begun, 1)
        with log.open("a") as file:
            file.write(done.stdout)
        self.tail = "\n".join(log.read_text().strip().splitlines()[-5:])
        if self.json_output and done.returncode == 0:
            self.found = json.loads(done.stdout)
        print(f"  status {self.status}, {self.seconds:.0f} s", flush=True)


def parts(rehearse: bool, root: Path | None, minutes: float) -> Iterator[Part]:
    """List what is run."""
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu"]
    # the tests themselves go through fp32, bf16, fp16 and fp64, cuDNN's LSTM, and the profiler's view of every step
    yield Part("tests that need a GPU", [*tests, "--collect-only"] if rehearse else tests)
    device = "cpu" if rehearse else "gpu"
    for config in sorted((ROOT / "configs" / "bench").glob("*.yaml")):
        for precision in PRECISIONS[:1] if rehearse else PRECISIONS:
            command = [*DROPREG, "bench", "--config", str(config), "--json", f"--trainer.accelerator={device}"]
            command += ["--trainer.devices=1", f"--trainer.precision={precision}"]
            command += ["--steps=2", "--repeats=1", "--warmup=0"] if rehearse else ["--memory"]
            yield Part(f"costs: {config.stem}, {precision}", command, json_output=True)
            if config.stem == "transformer":
                for how in ("aot_eager",) if rehearse else ("default", "reduce-overhead"):
                    compiled = [*command, f"--compile={how}", "--methods=alg2_anti,alg2_lean,alg2_eco,k4"]
                    yield Part(f"costs: {config.stem}, {precision}, compiled, {how}", compiled, json_output=True)
    if root is None and not rehearse:
        return
    for row in ROWS[-1:] if rehearse else ROWS:
        command = [*DROPREG, "fit", "--config", str(ROOT / "configs" / "paper" / f"{row}.yaml")]
        command += [
            f"--trainer.accelerator={device}",
            "--trainer.devices=1",
            f"--trainer.logger.init_args.name=gpu_{row}",
        ]
        command += [f"--trainer.default_root_dir={ROOT / 'build' / 'gpu' / row}"]
        if rehearse:
            command += [*FEW_WINDOWS, *TINY, "--data.corpus=python_manual", "--trainer.enable_progress_bar=false"]
        else:
            seconds = round(60 * minutes)
            limit = f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            command += [f"--data.root={root}", f"--trainer.max_time={limit}"]
        yield Part(f"language model: {row}", command)


def machine() -> dict[str, Any]:
    """Say where this ran."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {name: version(name) for name in ("torch", "lightning", "torchmetrics")}
    return {
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        **versions,
    }


def markdown(where: dict[str, Any], done: list[Part]) -> str:
    """Write the results for people."""
    lines = ["# On a GPU", "", ", ".join(f"{name} {value}" for name, value in where.items() if value), ""]
    lines += ["| part | status | seconds |", "|---|---|---|"]
    lines += [f"| {part.name} | {'ok' if part.status == 0 else part.status} | {part.seconds:g} |" for part in done]
    for part in done:
        costs = part.found.get("costs", []) if isinstance(part.found, dict) else []
        if costs:
            lines += [
                "",
                f"## {part.name}",
                "",
                "| method | ms | of a dropout step | peak MB | uses |",
                "|---|---|---|---|---|",
            ]
        for cost in [one for pair in costs for one in (pair, pair.get("compiled")) if one]:
            uses = ", ".join(cost["uses"]) or cost["problem"]
            if cost["compile_s"] is not None:
                uses = f"compiled, {cost['compile_s']:.0f} s for its first two steps"
            ratio = cost.get("ratio_to_dropout")
            numbers = [cost.get("median_ms"), ratio, cost["peak_mb"]]
            shown = ["–" if number is None else f"{number:.3g}" for number in numbers]
            lines.append(f"| {cost['method']} | {' | '.join(shown)} | {uses} |")
        if not costs:
            lines += ["", f"## {part.name}", "", "```", part.tail, "```"]
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder or archive of the Penn Treebank; none: no language model")
    parser.add_argument("--minutes", type=float, default=20.0, help="for each row of the language model (default: 20)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, as small as it gets")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    given = parser.parse_args(args)
    if not given.rehearse and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here. Try --rehearse, or another machine.", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    where, done = machine(), []
    for number, part in enumerate(parts(given.rehearse, given.root, given.minutes)):
        part.run(given.out / f"{number}.log")
        done.append(part)
        # written after every part: a machine that is taken away leaves what it has done
        results = {"machine": where, "parts": [asdict(one) for one in done]}
        (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.out / "results.md").write_text(markdown(where, done))
    print(f"{given.out / 'results.md'}")
    return int(any(part.status for part in done))


if __name__ == "__main__":
    sys.exit(main())
