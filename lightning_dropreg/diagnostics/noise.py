r"""The gradient noise of dropout beside its approximation: how much of it, in which layers, in which directions.

For two dropout gradients, ``(g_1 - g_2) / sqrt(2)`` is a draw of ``xi_drop`` (section 3.1) and ``<g_1, g_2>`` has the
mean ``|E g|^2``, the signal. The scalar ``s`` of (4.6) has the gradient ``xi_approx``. Draws of noise are independent
with mean zero, so mean squared norms are traces of covariances and mean squared inner products are traces of products
of covariances:

.. math::
    E \langle \xi, \xi' \rangle^2 = \mathrm{tr}(\Sigma \Sigma'), \qquad
    \text{alignment} = \frac{\mathrm{tr}(\Sigma_{drop} \Sigma_{approx})}
        {\sqrt{\mathrm{tr}(\Sigma_{drop}^2) \, \mathrm{tr}(\Sigma_{approx}^2)}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dropreg.diagnostics.effect import MIN_DRAWS
from lightning_dropreg.diagnostics.sketch import SKETCH_WIDTH, sketch
from lightning_dropreg.diagnostics.statistics import Interval, check_confidence, jackknife_interval, mean_interval
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.functional import check_count, check_estimation, draw_key
from lightning_dropreg.isolation import Isolation
from lightning_dropreg.passes import Closure, Drop, run_pass
from lightning_dropreg.sites import fold_key

__all__ = ["NoiseReport", "measure_noise"]

Gradients = list[Tensor]
DROP, APPROX, SIGNAL = 0, 1, 2
NOISE_STEP = 0.1  # what the callbacks train with by default: in networks with kinks the noise depends on it


@dataclass(frozen=True)
class NoiseReport:
    """The gradient noise that dropout makes on one batch (that of drawing batches is not in it).

    Attributes:
        layers: Paths of the modules that own parameters.
        samples: Shape ``(draws, layers, 3)``, float64, on the CPU: squared norms of ``xi_drop`` and ``xi_approx``, and
            the signal ``<g_1, g_2>``.
        products: Shape ``(3, draws, draws)``: inner products of ``xi_drop`` with itself, ``xi_approx`` with itself, and
            ``xi_drop`` with ``xi_approx``.
        sketched: Whether the inner products are those of sketches (`lightning_dropreg.diagnostics.sketch`).
        confidence: Probability with which each interval covers its value, one at a time.
    """

    layers: tuple[str, ...]
    samples: Tensor
    products: Tensor
    sketched: bool
    confidence: float

    @property
    def draws(self) -> int:
        """Number of draws of either noise; one of ``xi_drop`` takes two of dropout."""
        return len(self.samples)

    def trace_drop(self, layer: int | None = None) -> Interval:
        """Trace of the covariance of ``xi_drop``, in all parameters or those of one layer."""
        return mean_interval(self._column(DROP, layer), self.confidence)

    def trace_approx(self, layer: int | None = None) -> Interval:
        """Trace of the covariance of ``xi_approx``, in all parameters or those of one layer."""
        return mean_interval(self._column(APPROX, layer), self.confidence)

    def trace_ratio(self, layer: int | None = None) -> Interval:
        """Trace of ``xi_approx`` over trace of ``xi_drop``: 1 if the approximation has the right size."""
        return self._ratio(APPROX, DROP, layer)

    def signal_to_noise(self, layer: int | None = None) -> Interval:
        """``|E g|^2`` over the trace of the covariance of the dropout gradient ``g`` of this batch."""
        return self._ratio(SIGNAL, DROP, layer)

    def alignment(self) -> Interval:
        """Cosine between the two covariances: 1 if proportional, 0 if no direction is shared; by chance above 1."""
        return jackknife_interval(self._alignment, self.draws, self.confidence)

    def _column(self, column: int, layer: int | None) -> Tensor:
        found = self.samples[:, :, column]
        return found.sum(1) if layer is None else found[:, layer]

    def _ratio(self, above: int, below: int, layer: int | None) -> Interval:
        a, b = self._column(above, layer), self._column(below, layer)
        return jackknife_interval(lambda j: a[j].mean() / b[j].mean(), self.draws, self.confidence)

    def _alignment(self, draws: Tensor) -> Tensor:
        drop, approx, both = self.products[:, draws][:, :, draws].square()
        n = len(draws)
        own = [(square.sum() - square.diagonal().sum()) / (n * (n - 1)) for square in (drop, approx)]
        cosine: Tensor = both.mean() / (own[0] * own[1]).sqrt()
        return cosine


def measure_noise(
    closure: Closure,
    module: nn.Module,
    *,
    draws: int = 32,
    step_size: float = NOISE_STEP,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    reduce: Callable[[Gradients], Gradients] | None = None,
    on_draw: Callable[[], object] | None = None,
) -> NoiseReport:
    """Measure the covariance of the gradient noise of dropout and of its approximation on one batch.

    Costs, for each draw, four forward and four backward passes. Gradients are not left in ``.grad``.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        module: The module whose parameters count, and whose state must not change.
        draws: Number of draws of each noise, at least 4.
        step_size: Step of the antithetic pair that gives ``xi_approx``, in ``(0, 1]``.
        confidence: Probability with which an interval covers its value.
        generator: Source of the seed of the noise; the global one by default.
        reduce: Averages gradients over processes, in a distributed run.
        on_draw: Called after every draw.

    Returns:
        The report.

    Raises:
        InvalidArgumentError: If an argument is out of range, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.

    Example:
        A linear loss, where the approximation is exact: the noise of the gradient is ``eta x``.

        >>> layer, x = nn.Linear(50, 1, bias=False), torch.ones(50)
        >>> closure = lambda: layer(nn.functional.dropout(x, 0.5)).sum()
        >>> report = measure_noise(closure, layer, draws=8)
        >>> report.layers, round(report.trace_approx().value)
        (('Linear',), 50)
    """
    check_count("draws", draws, MIN_DRAWS)
    check_confidence(confidence)
    check_estimation("antithetic", step_size, "as_model")
    key = draw_key(generator)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    owners = [name.rpartition(".")[0] or type(module).__name__ for name, _ in named]
    layers = tuple(dict.fromkeys(owners))

    samples, drops, approxes = [], [], []
    with Isolation(module) as isolation:
        run: Closure = lambda: isolation.run(closure, trace=False)  # noqa: E731

        def gradients(loss: Tensor) -> Gradients:
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            dense = [g.to_dense() if g.is_sparse else g for g in found]
            return dense if reduce is None else reduce(dense)

        for j in range(draws):
            first, second = (gradients(run_pass(run, Drop(fold_key(key, j, i))).loss) for i in range(2))
            drop = [(a - b) / math.sqrt(2) for a, b in zip(first, second, strict=True)]
            noise = ESTIMATORS["antithetic"](
                run, curvature=None, noise=True, step_size=step_size, mask="as_model", key=fold_key(key, j, 2)
            ).noise
            assert noise is not None
            approx = gradients(noise)
            pairs = ((drop, drop), (approx, approx), (first, second))
            samples.append(torch.stack([_by_layer(a, b, owners, layers) for a, b in pairs], dim=1))
            drops.append(sketch(drop))
            approxes.append(sketch(approx))
            if on_draw is not None:
                on_draw()
    x, y = torch.stack(drops).double(), torch.stack(approxes).double()
    return NoiseReport(
        layers,
        torch.stack(samples),
        torch.stack([x @ x.T, y @ y.T, x @ y.T]).cpu(),
        sum(p.numel() for p in parameters) > SKETCH_WIDTH,
        confidence,
    )


def _by_layer(a: Gradients, b: Gradients, owners: Sequence[str], layers: Sequence[str]) -> Tensor:
    """Inner product of two gradients in each layer, ``(layers,)``."""
    totals = dict.fromkeys(layers, 0.0)
    for one, other, owner in zip(a, b, owners, strict=True):
        totals[owner] += float((one.double() * other.double()).sum())
    return torch.tensor(list(totals.values()), dtype=torch.float64)
