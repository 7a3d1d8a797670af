"""What a step of a small model costs with each method, as a ratio to the same step with plain dropout.

    python examples/benchmarks/small_step.py [ROUNDS]

Two-layer MLP of width 64, batches of 64 rows, one thread, a Lightning Trainer without logger and progress bar. Several
fits are under way at once, one for each method, each in a thread of its own; they take turns, `STEPS` steps at a time,
so all see the same machine. A figure is the median over the rounds of the processor time of a step over that of the
plain step in the same round. Written to small_step.json.
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dropreg import ExplicitPenalty, ImplicitNoise, MiniBatchDropout
from lightning_dropreg.cli.machine import describe_machine

STEPS, ROUNDS, WARM = 25, 40, 40
WIDTH = ROWS = 64
PLAIN = "plain dropout"


def of_pairs(**options: Any) -> list[lightning.Callback]:
    """Algorithm 2 with antithetic pairs, which is what networks without kinks get by themselves."""
    pairs: Any = {"estimator": "antithetic", **options}
    return [ExplicitPenalty(**pairs), ImplicitNoise(**pairs)]


METHODS: dict[str, Callable[[], list[lightning.Callback]]] = {
    PLAIN: lambda: [],
    "Algorithm 2, forward mode": lambda: [ExplicitPenalty(), ImplicitNoise()],  # what "auto" is where there are ReLUs
    "Algorithm 2, antithetic": of_pairs,
    "economical": lambda: of_pairs(batch_fraction=0.125),
    "DROPOUT_4 and noise": lambda: [MiniBatchDropout(k=4), ImplicitNoise()],
}


class Network(lightning.LightningModule):
    """A two-layer network with dropout behind both layers' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(WIDTH, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Turns(lightning.Callback):
    """Lets a fit go on only when it is told to, and keeps the time of every turn."""

    trainer: lightning.Trainer
    thread: threading.Thread

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds: list[float] = []
        self.left = 0

    def turn(self, steps: int) -> None:
        """Let it take so many steps."""
        self.left = steps
        self.go.release()
        self.done.acquire()

    def finish(self) -> None:
        """Let the fit end."""
        self.trainer.should_stop = True
        self.go.release()
        self.thread.join()

    def on_train_start(self, *_: Any) -> None:
        self.go.acquire()
        self._start = time.thread_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.seconds.append(time.thread_time() - self._start)
            self.done.release()
            self.go.acquire()
            self._start = time.thread_time()


def begin(callbacks: list[lightning.Callback]) -> Turns:
    """Begin a fit that waits for its turns."""
    torch.manual_seed(0)
    turns = Turns()
    x, y = torch.randn(50 * ROWS, WIDTH), torch.randint(0, 10, (50 * ROWS,))
    turns.trainer = lightning.Trainer(
        max_epochs=-1, callbacks=[*callbacks, turns], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", devices=1,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), ROWS)
    turns.thread = threading.Thread(target=turns.trainer.fit, args=(Network(), loader), daemon=True)
    turns.thread.start()
    return turns


def measure(rounds: int, steps: int = STEPS, warm: int = WARM) -> dict[str, Any]:
    """Let the methods take turns and compare them with plain dropout, round by round."""
    running = {name: begin(make()) for name, make in METHODS.items()}
    for turns in running.values():
        turns.turn(warm)  # looks at steps 0, 1, 2, 4, 8, ... 32
    for _ in range(rounds):
        for turns in running.values():
            turns.turn(steps)
    for turns in running.values():
        turns.finish()
    plain = running[PLAIN].seconds[1 : rounds + 1]
    return {
        name: {
            "milliseconds of a step": 1e3 * statistics.median(turns.seconds[1 : rounds + 1]) / steps,
            "ratio": statistics.median(a / b for a, b in zip(turns.seconds[1 : rounds + 1], plain, strict=True)),
        }
        for name, turns in running.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    found = {
        "command": " ".join(["python", "examples/benchmarks/small_step.py", *sys.argv[1:]]),
        "machine": describe_machine(Network()),
        "rounds": rounds,
        "steps a round": STEPS,
        "methods": measure(rounds),
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(target.read_text())
