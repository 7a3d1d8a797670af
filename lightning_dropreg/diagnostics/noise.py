r"""The gradient noise of dropout beside its approximation: how much of it, in which layers, in which directions.

For two dropout gradients, ``(g_1 - g_2) / sqrt(2)`` is a draw of ``xi_drop`` (section 3.1) and ``<g_1, g_2>`` has the
mean ``|E g|^2``, the signal. The scalar ``s`` of (4.6) has the gradient ``xi_approx``. Draws of noise are independent
with mean zero, so mean squared norms are traces of covariances and mean squared inner products are traces of products
of covariances:

.. math::
    E \langle \xi, \xi' \rangle^2 = \mathrm{tr}(\Sigma \Sigma'), \qquad
    \text{alignment} = \frac{\mathrm{tr}(\Sigma_{drop} \Sigma_{approx})}
        {\sqrt{\mathrm{tr}(\Sigma_{drop}^2) \, \mathrm{tr}(\Sigma_{approx}^2)}}

Inner products of layers with many parameters are those of sketches. What that adds to the mean of their squares,
``|xi|^2 |xi'|^2 / width`` (`lightning_dropreg.diagnostics.sketch`), is known and taken off again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.diagnostics.sampling import OnDraw, Probe, measure_draws
from lightning_dropreg.diagnostics.sketch import SKETCH_WIDTH, sketch
from lightning_dropreg.diagnostics.statistics import Interval, jackknife_interval, mean_interval
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Closure, Drop, Off, run_pass
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.step.settings import check_estimation

__all__ = ["NoiseReport", "measure_batch_noise", "measure_noise"]

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
        products: Shape ``(layers, 3, draws, draws)``: inner products of ``xi_drop`` with itself, ``xi_approx`` with
            itself, and ``xi_drop`` with ``xi_approx``, in every layer.
        widths: For every layer the length of the sketches that the inner products are of, 0 where they are exact.
        confidence: Probability with which each interval covers its value, one at a time.
        estimator: Estimator of ``xi_approx``.
        step_size: Its step, for ``"antithetic"``.
        mask: Its mask, ``"as_model"`` or ``"elementwise"``.
    """

    layers: tuple[str, ...]
    samples: Tensor
    products: Tensor
    widths: tuple[int, ...]
    confidence: float
    estimator: str = "antithetic"
    step_size: float = NOISE_STEP
    mask: str = "as_model"

    @property
    def draws(self) -> int:
        """Number of draws of either noise; one of ``xi_drop`` takes two of dropout."""
        return len(self.samples)

    @property
    def sketched(self) -> bool:
        """Whether some inner products are those of sketches."""
        return any(self.widths)

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

    def alignment(self, layer: int | None = None) -> Interval:
        """Cosine between the two covariances: 1 if proportional, 0 if no direction is shared; by chance above 1.

        Args:
            layer: Number of the layer, or None for all parameters together.

        Returns:
            The cosine; NaN where there is no noise, or too little in common between draws to be told by sketches.
        """
        squares = self._squared_products(layer)

        def cosine(draws: Tensor) -> Tensor:
            drop, approx, both = squares[:, draws][:, :, draws]
            n = len(draws)
            own = [(square.sum() - square.diagonal().sum()) / (n * (n - 1)) for square in (drop, approx)]
            found: Tensor = both.mean() / (own[0] * own[1]).sqrt()
            return found if min(own) > 0 else found.new_tensor(math.nan)

        return jackknife_interval(cosine, self.draws, self.confidence)

    def _squared_products(self, layer: int | None) -> Tensor:
        """Squares of the inner products, ``(3, draws, draws)``, less what the sketches add to them on average."""
        chosen = range(len(self.layers)) if layer is None else [layer]
        squares: Tensor = self.products[list(chosen)].sum(0).square()
        for i in chosen:
            if self.widths[i]:
                drop, approx = self.samples[:, i, DROP], self.samples[:, i, APPROX]
                sizes = [torch.outer(drop, drop), torch.outer(approx, approx), torch.outer(drop, approx)]
                squares = squares - torch.stack(sizes) / self.widths[i]
        return squares

    def _column(self, column: int, layer: int | None) -> Tensor:
        found = self.samples[:, :, column]
        return found.sum(1) if layer is None else found[:, layer]

    def _ratio(self, above: int, below: int, layer: int | None) -> Interval:
        a, b = self._column(above, layer), self._column(below, layer)
        return jackknife_interval(lambda j: a[j].mean() / b[j].mean(), self.draws, self.confidence)


def measure_noise(
    closure: Closure,
    module: nn.Module,
    *,
    draws: int = 32,
    estimator: str = "antithetic",
    step_size: float = NOISE_STEP,
    mask: str = "as_model",
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    reduce: Callable[[Gradients], Gradients] | None = None,
    on_draw: OnDraw | None = None,
) -> NoiseReport:
    """Measure the covariance of the gradient noise of dropout and of its approximation on one batch.

    Costs, for each draw, two forward and two backward passes and what a step with the noise costs. Gradients are not
    left in ``.grad``.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        module: The module whose parameters count, and whose state must not change.
        draws: Number of draws of each noise, at least 4.
        estimator: What gives ``xi_approx``, see `lightning_dropreg.functional.implicit_noise`.
        step_size: Step of the antithetic pair, from 1e-8 to 1.
        mask: ``"as_model"`` or ``"elementwise"``.
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
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        A linear loss, where the approximation is exact: the noise of the gradient is ``eta x``.

        >>> layer, x = nn.Linear(50, 1, bias=False), torch.ones(50)
        >>> closure = lambda: layer(nn.functional.dropout(x, 0.5)).sum()
        >>> report = measure_noise(closure, layer, draws=8)
        >>> report.layers, round(report.trace_approx().value)
        (('Linear',), 50)
    """
    check_estimation(estimator, step_size, mask)
    probe = measure_draws(
        lambda run: _NoiseProbe(run, module, reduce, estimator=estimator, step_size=step_size, mask=mask),
        closure,
        draws=draws,
        confidence=confidence,
        generator=generator,
        module=module,
        on_draw=on_draw,
    )
    samples, products, widths = torch.stack(probe.samples), probe.products(), probe.widths
    return NoiseReport(tuple(probe.layers), samples, products, widths, confidence, estimator, step_size, mask)


def measure_batch_noise(closures: Sequence[Closure], module: nn.Module, confidence: float = 0.95) -> Interval:
    """Measure the gradient noise that comes from drawing batches, without dropout, to set beside that of dropout.

    Args:
        closures: Each runs forward (with dropout in it) and loss on a batch of its own; an even number of
            them, 4 at least.
        module: The module whose parameters count, and whose state must not change.
        confidence: Probability with which the interval covers the value.

    Returns:
        Trace of the covariance of one batch's gradient, from disjoint pairs; compare `NoiseReport.trace_drop`.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> batches = torch.tensor([[1.0], [3.0], [2.0], [4.0]])  # the gradient is the input
        >>> measure_batch_noise([lambda x=x: layer(nn.functional.dropout(x)).sum() for x in batches], layer).value
        2.0
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    found: list[float] = []
    with Isolation(module) as isolation:

        def gradient(closure: Closure) -> Gradients:
            loss = run_pass(lambda: isolation.run(closure, trace=False), Off()).loss
            return _dense(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

        for first, second in zip(closures[::2], closures[1::2], strict=True):
            apart = [a - b for a, b in zip(gradient(first), gradient(second), strict=True)]
            found.append(_inner(apart, apart) / 2)
    return mean_interval(torch.tensor(found), confidence)


def _dense(gradients: Sequence[Tensor]) -> Gradients:
    return [g.to_dense() if g.is_sparse else g for g in gradients]


class _NoiseProbe(Probe):
    """Differentiates two losses with dropout and one ``s`` for every draw; see `measure_noise` for the arguments."""

    def __init__(
        self, closure: Closure, module: nn.Module, reduce: Callable[[Gradients], Gradients] | None, **options: Any
    ) -> None:
        self._closure, self._reduce = closure, reduce
        self._estimate = functools.partial(ESTIMATORS[options.pop("estimator")], closure, curvature=None, noise=True)
        self._options = options
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in named]
        self._owners = [name.rpartition(".")[0] or type(module).__name__ for name, _ in named]
        self.layers = dict.fromkeys(self._owners, 0)
        for owner, p in zip(self._owners, self._parameters, strict=True):
            self.layers[owner] += p.numel()
        self.samples: list[Tensor] = []
        self._sketches: list[list[list[Tensor]]] = []

    @property
    def widths(self) -> tuple[int, ...]:
        """See `NoiseReport`."""
        return tuple(SKETCH_WIDTH if count > SKETCH_WIDTH else 0 for count in self.layers.values())

    def draw(self, key: int) -> None:
        """See `lightning_dropreg.diagnostics.sampling.Probe`."""
        first, second = (self._gradients(run_pass(self._closure, Drop(fold_key(key, i))).loss) for i in range(2))
        drop = [(a - b) / math.sqrt(2) for a, b in zip(first, second, strict=True)]
        noise = self._estimate(**self._options, key=fold_key(key, 2)).noise
        assert noise is not None
        approx = self._gradients(noise)
        by_layer = [self._by_layer(gradients) for gradients in (drop, approx, first, second)]
        pairs = ((by_layer[0], by_layer[0]), (by_layer[1], by_layer[1]), (by_layer[2], by_layer[3]))
        rows = [[_inner(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
        self.samples.append(torch.tensor(rows, dtype=torch.float64).T)
        self._sketches.append([[sketch(g, seed=i) for i, g in enumerate(part)] for part in by_layer[:2]])

    def products(self) -> Tensor:
        """Return the inner products of all draws, see `NoiseReport`."""
        found = []
        for i in range(len(self.layers)):
            x, y = (torch.stack([draw[part][i] for draw in self._sketches]).double() for part in (0, 1))
            found.append(torch.stack([x @ x.T, y @ y.T, x @ y.T]).cpu())
        return torch.stack(found)

    def _gradients(self, loss: Tensor) -> Gradients:
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        dense = _dense(found)
        return dense if self._reduce is None else self._reduce(dense)

    def _by_layer(self, gradients: Gradients) -> list[Gradients]:
        found: dict[str, Gradients] = {owner: [] for owner in self.layers}
        for owner, gradient in zip(self._owners, gradients, strict=True):
            found[owner].append(gradient)
        return list(found.values())


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((one.double() * other.double()).sum()) for one, other in zip(a, b, strict=True))
