"""R-Drop's divergence over the explicit penalty of dropout: to second order 2, measured at several drop probabilities.

    python -m examples.benchmarks.r_drop_ratio [--draws 64]

A tanh network of two sites and random weights, 3,000 random rows, double precision, means over the draws with their
standard errors. Written to r_drop_ratio.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lightning_dropreg.functional import explicit_penalty, r_drop

PROBABILITIES = (0.01, 0.05, 0.1, 0.3)


def measure(q: float, draws: int, rows: int = 3000) -> tuple[float, float]:
    """Return the ratio at drop probability `q` and its standard error."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Dropout(q), nn.Linear(32, 32), nn.Tanh(), nn.Dropout(q), nn.Linear(32, 5)
    ).double()
    with torch.no_grad():
        for layer in (net[3], net[6]):
            layer.weight *= 3
    x = torch.randn(rows, 16, dtype=torch.float64)

    def closure() -> torch.Tensor:
        return F.cross_entropy(net(x), torch.arange(rows) % 5)

    generator = torch.Generator().manual_seed(2)
    pairs = [
        (
            r_drop(closure, generator=generator).divergence.item(),
            explicit_penalty(closure, step_size=0.02, generator=generator).item(),
        )
        for _ in range(draws)
    ]
    kl, penalty = torch.tensor(pairs, dtype=torch.float64).T
    ratio = kl.mean() / penalty.mean()
    return ratio.item(), ((kl - ratio * penalty).std() / penalty.mean() / draws**0.5).item()


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=64)
    draws = parser.parse_args().draws
    found = [dict(zip(("q", "ratio", "error"), (q, *measure(q, draws)), strict=True)) for q in PROBABILITIES]
    Path(__file__).with_suffix(".json").write_text(json.dumps({"draws": draws, "ratios": found}, indent=2) + "\n")
    for one in found:
        print(f"q = {one['q']}: {one['ratio']:.3f} +- {one['error']:.3f}")


if __name__ == "__main__":
    main()
