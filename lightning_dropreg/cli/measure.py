"""Time, memory and passes of one optimization step."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_dropreg.cli.fast_paths import find_fast_paths
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS

__all__ = ["Cost", "MemoryWatch", "PassCounter", "ProcessorTime", "Stopwatch", "without_dropout"]


@dataclass
class Cost:
    """What one method costs.

    Attributes:
        method: Its name.
        rounds: Milliseconds of every timed step, by round.
        peak_mb: Peak memory of its steps above what was there before the first, in MiB, or None.
        forwards: Times that the step runs forward.
        backwards: Times that its heaviest operation runs backward, in units of one dropout step; None if unknown.
        uses: Fused kernels and autocast that its step runs with.
        problem: Why the model cannot be trained with it, or empty.
        compile_s: Seconds of its first two steps, looks and compiling included; None if it was not compiled.
        compiled: What it costs with the model compiled, if that was measured.
    """

    method: str
    rounds: list[list[float]] = field(default_factory=list)
    peak_mb: float | None = None
    forwards: int | None = None
    backwards: float | None = None
    uses: list[str] = field(default_factory=list)
    problem: str = ""
    compile_s: float | None = None
    compiled: "Cost | None" = None

    def quantiles(self) -> list[float]:
        """Return lower quartile, median and upper quartile over all steps."""
        return statistics.quantiles([ms for one in self.rounds for ms in one], n=4)

    def ratio(self, reference: "Cost") -> float:
        """Median over rounds of the ratio of the mean times in one round: not all steps of a method cost the same."""
        return statistics.median(self.ratios(reference))

    def ratios(self, reference: "Cost") -> list[float]:
        """Return the ratio of the mean times in every round."""
        pairs = zip(self.rounds, reference.rounds, strict=True)
        return [statistics.mean(mine) / statistics.mean(theirs) for mine, theirs in pairs]


class Stopwatch(Callback):
    """Measures every training step, from the batch on the device to the optimizer's step."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the watch."""
        self._start = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the watch."""
        self.ms.append(1000 * (self._now(pl_module) - self._start))

    @staticmethod
    def _now(pl_module: LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()


class ProcessorTime(Stopwatch):
    """Does not count what else the machine does; for one thread and no GPU."""

    @staticmethod
    def _now(pl_module: LightningModule) -> float:
        return time.process_time()


class MemoryWatch(Callback):
    """Measures the peak of the memory that the steps take above what is there before the first one.

    On CUDA, what torch has allocated; on a CPU, what the process holds resident, which means something only in a
    process that did nothing else before.
    """

    def __init__(self) -> None:
        self.peak_mb: float | None = None
        self._before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier peaks."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            self._before = torch.cuda.memory_allocated(pl_module.device) / 2**20
        else:
            _forget_peak()
            self._before = _resident("VmRSS") or 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peak."""
        if pl_module.device.type == "cuda":
            self.peak_mb = torch.cuda.max_memory_allocated(pl_module.device) / 2**20 - self._before
        else:
            peak = _resident("VmHWM")
            self.peak_mb = None if peak is None else peak - self._before


def _forget_peak() -> None:
    """Let the kernel start a new peak at the present size (Linux; elsewhere memory is not reported)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _resident(key: str) -> float | None:
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    values = [int(line.split()[1]) / 1024 for line in lines if line.startswith(key)]
    return values[0] if values else None


class PassCounter(Callback):
    """Counts, in the last of a few steps, forward passes and executions of every autograd node.

    Args:
        step: Number of the step that is counted, after the first, which the callbacks look at.

    Attributes:
        forwards: How often the step ran forward.
        nodes: How often each autograd node ran.
        heaviest: The node that took most time.
        uses: Fused kernels and autocast that the step ran with.
    """

    def __init__(self, step: int = 1) -> None:
        self.forwards = 0
        self.nodes: Counter[str] = Counter()
        self.heaviest = ""
        self.uses: list[str] = []
        self._autocast: set[torch.dtype] = set()
        self._step = step
        self._profile: Any = None

    def count(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a training step."""

        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self._profile is not None:
                self.forwards += 1
                self._autocast |= {torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
            return step(*args, **kwargs)

        return training_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to count."""
        if batch_idx == self._step:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop."""
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        prefix = "autograd::engine::evaluate_function: "
        averages = self._profile.key_averages()
        precisions = [f"{str(dtype).removeprefix('torch.')} autocast" for dtype in self._autocast]
        self.uses = find_fast_paths(e.key for e in averages) + precisions
        events = [e for e in averages if e.key.startswith(prefix)]
        self.nodes = Counter({e.key.removeprefix(prefix): e.count for e in events})
        if events:
            self.heaviest = max(events, key=lambda e: e.cpu_time_total).key.removeprefix(prefix)
        self._profile = None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every drop probability of the model's modules to 0 for the length of a ``with``."""
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, DROPOUT_LAYERS) else "dropout"
        if isinstance(getattr(module, name, None), float):
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
