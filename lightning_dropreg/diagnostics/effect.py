r"""The true explicit effect of dropout beside its second-order approximation, together and site by site.

For one draw ``eta`` of dropout, with ``L(step)`` the loss on the path ``h (1 + step eta)``,

.. math::
    \underbrace{L(1) - L(0)}_{\text{effect of this draw}} = \underbrace{s}_{\text{mean } 0}
        + \underbrace{\tfrac12 u^\top H u}_{\text{mean } R_{approx}}
        + \underbrace{\tfrac12 \tfrac{\partial \ell}{\partial z} F''[\delta, \delta]}_{\text{left out by (4.3)}}
        + \text{higher orders}

so ``L(1) - L(0) - s`` has the mean ``R_drop`` with far less spread than ``L(1) - L(0)`` (``s``, known exactly, is a
control variate). Truth and approximation come from the same draws, and so does their difference, the remainder. It has
two parts: the second-order term with the curvature of the model, which the paper leaves out because it is not positive,
and the higher orders, which grow with ``q``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dropreg.diagnostics.directions import DropoutDirections
from lightning_dropreg.diagnostics.sampling import OnDraw, Probe, measure_draws
from lightning_dropreg.diagnostics.statistics import Interval, jackknife_interval, mean_interval
from lightning_dropreg.errors import InvalidArgumentError, LossNotRecognizedError, UnsupportedSiteError
from lightning_dropreg.estimators.antithetic import combine
from lightning_dropreg.estimators.curvature import OF_OUTPUTS, element_weights
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Closure, Directions, Pass, Perturb, PerturbSome, Tap, run_pass

__all__ = ["EffectProbe", "EffectReport", "measure_effect"]

STEPS = {torch.float64: 1e-3, torch.float32: 0.05}
"""Step of the central differences by precision: neither rounding nor the curvature of the path may show."""
HALF_STEP = 0.1
TRUTH, SECOND, APPROX = 0, 1, 2  # columns of the samples


@dataclass(frozen=True)
class EffectReport:
    """What dropout adds to the expected loss of one batch.

    Attributes:
        sites: The dropout sites, named. Empty if only the total was measured.
        loss: The loss without dropout.
        samples: Shape ``(draws, 1 + sites, 2 + curvatures)``, float64, on the CPU. Row 0 is all sites together, row
            ``i`` site ``i - 1`` alone. Column 0 samples ``R_drop``, column 1 the whole second-order term (NaN in half
            precision, which has too few digits for it), the others ``R_approx`` and its ablations in the order of
            `lightning_dropreg.estimators.curvature.OF_OUTPUTS` (NaN where the curvature of the loss is not known).
        confidence: Probability with which each interval covers its value, one at a time.
        problem: Why there is no approximation; empty if there is one.
    """

    sites: tuple[Site, ...]
    loss: float
    samples: Tensor
    confidence: float
    problem: str = ""

    @property
    def draws(self) -> int:
        """Number of draws of dropout."""
        return len(self.samples)

    @property
    def names(self) -> list[str]:
        """Names of the sites, numbered where a module drops several times."""
        names = [site.name or f"site {i}" for i, site in enumerate(self.sites)]
        return [
            f"{name} #{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]

    def truth(self, site: int | None = None) -> Interval:
        """``R_drop``: the mean dropout loss minus the loss without, of all sites together or of one alone."""
        return self._mean(self.samples[:, _row(site), TRUTH])

    def approximation(self, curvature: str = "loss_hessian", site: int | None = None) -> Interval:
        """``R_approx`` (4.4), or an ablation of it, of all sites together or of one alone."""
        return self._mean(self.samples[:, _row(site), APPROX + OF_OUTPUTS.index(curvature)])

    def remainder(self, site: int | None = None) -> Interval:
        """``R_drop - R_approx``: `left_out` and `higher_orders`."""
        return self._difference(TRUTH, APPROX, site)

    def left_out(self, site: int | None = None) -> Interval:
        """Second-order term with the curvature of the model, which ``R_approx`` leaves out."""
        return self._difference(SECOND, APPROX, site)

    def higher_orders(self, site: int | None = None) -> Interval:
        """Terms of third and higher order in the noise."""
        return self._difference(TRUTH, SECOND, site)

    def interaction(self) -> Interval:
        """``R_drop`` of all sites together minus the sum of the sites' own: `R_approx` is additive, the truth not."""
        return self._mean(self.samples[:, 0, TRUTH] - self.samples[:, 1:, TRUTH].sum(1))

    def share(self, site: int) -> Interval:
        """``R_drop`` of a site alone as a fraction of the sum over sites."""
        own = self.samples[:, 1 + site, TRUTH]
        everything = self.samples[:, 1:, TRUTH].sum(1)
        return jackknife_interval(lambda j: own[j].mean() / everything[j].mean(), self.draws, self.confidence)

    def matching_strength(self) -> Interval:
        """The strength at which ``R_approx`` is as large as ``R_drop``."""
        truth, approximation = self.samples[:, 0, TRUTH], self.samples[:, 0, APPROX]
        return jackknife_interval(lambda j: truth[j].mean() / approximation[j].mean(), self.draws, self.confidence)

    def excess(self, fraction: float, site: int | None = None) -> tuple[Interval, Interval]:
        """How far the remainder lies outside ``±fraction * R_drop``, on either side: negative is inside."""
        truth = self.samples[:, _row(site), TRUTH]
        remainder = truth - self.samples[:, _row(site), APPROX]
        allowed = fraction * truth * (1 if truth.mean() >= 0 else -1)
        return self._mean(remainder - allowed), self._mean(-remainder - allowed)

    def _difference(self, first: int, second: int, site: int | None) -> Interval:
        row = self.samples[:, _row(site)]
        return self._mean(row[:, first] - row[:, second])

    def _mean(self, samples: Tensor) -> Interval:
        return mean_interval(samples, self.confidence)


def _row(site: int | None) -> int:
    return 0 if site is None else 1 + site


def measure_effect(
    closure: Closure,
    *,
    draws: int = 32,
    per_site: bool = True,
    drop_prob: float | None = None,
    step_size: float | None = None,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
    reduce: Callable[[list[Tensor]], list[Tensor]] | None = None,
    on_draw: OnDraw | None = None,
) -> EffectReport:
    """Measure what dropout adds to the expected loss of one batch, and what the approximations say it adds.

    Costs three forward passes per draw for the total and three more for every site.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        draws: Number of draws of dropout, at least 4. Intervals shrink as its square root.
        per_site: Whether to perturb also one site at a time.
        drop_prob: Drop with this probability, in ``(0, 1)``, at every site instead of its own.
        step_size: Step of the central differences, relative to the noise; by default one that suits the precision.
        confidence: Probability with which an interval covers its value.
        generator: Source of the seed of the noise; the global one by default.
        module: A module whose state must not change.
        reduce: Averages tensors over processes, in a distributed run.
        on_draw: Called after every draw.

    Returns:
        The report.

    Raises:
        InvalidArgumentError: If an argument is out of range, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.

    Example:
        One linear layer under squared error: the expansion ends at the second order, ``R = c x^2 w^2``.

        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.ones(100, 1)
        >>> closure = lambda: nn.functional.mse_loss(nn.functional.dropout(x, 0.5) * w, torch.zeros(100, 1))
        >>> report = measure_effect(closure, draws=8)
        >>> round(report.truth().value, 3), round(report.approximation().value, 3)
        (4.0, 4.0)
    """
    for name, value in (("drop_prob", drop_prob), ("step_size", step_size)):
        if value is not None and not 0 < value < 1:
            raise InvalidArgumentError(f"{name}={value!r} must be a number in (0, 1).")
    probe = measure_draws(
        lambda run: EffectProbe(run, per_site, step_size, drop_prob),
        closure,
        draws=draws,
        confidence=confidence,
        generator=generator,
        module=module,
        on_draw=on_draw,
    )
    samples, loss = torch.stack(probe.rows), torch.tensor(probe.loss, dtype=torch.float64)
    if reduce is not None:  # on the model's device, between which processes can send
        samples, loss = (t.cpu() for t in reduce([t.to(probe.device) for t in (samples, loss)]))
    return EffectReport(tuple(probe.sites) if per_site else (), loss.item(), samples, confidence, probe.problem)


class EffectProbe(Probe):
    """Runs a step along the paths that start at the model without dropout.

    Args:
        closure: Runs the step, always from the same state.
        per_site: Whether to go also along the paths of one site at a time.
        step_size: Step of the central differences; None for one that suits the precision of the activations.
        drop_prob: Drop probability of all sites instead of their own.

    Attributes:
        rows: What was measured, one row for each draw.
        loss: The loss without dropout.
        device: Where it is.
        sites: The dropout sites.
        step_size: The step.
        problem: Why there is no approximation; empty if there is one.
    """

    def __init__(
        self,
        closure: Closure,
        per_site: bool = True,
        step_size: float | None = None,
        drop_prob: float | None = None,
    ) -> None:
        self.closure = closure
        self.rows: list[Tensor] = []
        self._drop_prob = drop_prob
        self.problem = ""
        try:
            tap, clean = self._look(record_losses=True)
            element_weights(clean.loss, clean.losses)  # raises if the loss is no weighted sum
        except LossNotRecognizedError as error:
            self.problem = str(error)
            tap, clean = self._look(record_losses=False)
        self._clean = self._value(clean)
        self._slopes = torch.autograd.grad(clean.loss, tap.taps, allow_unused=True)
        self.loss = clean.loss.item()
        self.device = clean.loss.device
        self.sites = clean.sites
        self.step_size = step_size if step_size is not None else tap.step_size
        self._paths: list[int | None] = [None, *range(len(self.sites))] if per_site else [None]

    def draw(self, key: int) -> None:
        """See `lightning_dropreg.diagnostics.sampling.Probe`."""
        self.rows.append(self.measure(DropoutDirections(key, self._drop_prob)))

    def measure(self, directions: Directions) -> Tensor:
        """Go along the paths of one draw; return one row of `EffectReport.samples`, ``(1 + sites, 2 + curvatures)``."""
        return torch.tensor([self._follow(directions, only) for only in self._paths], dtype=torch.float64)

    def _look(self, record_losses: bool) -> tuple[_Look, Pass]:
        tap = _Look(Directions(0))
        return tap, run_pass(self.closure, tap, record_losses=record_losses, name_sites=True, written_out=False)

    def _follow(self, directions: Directions, only: int | None) -> list[float]:
        step = self.step_size
        end, plus, minus = (self._pass(directions, at, only) for at in (1.0, step, -step))
        truth = self._value(end) - self._clean - self._first_order(directions, only)
        if self.problem:
            return [truth, math.nan, *[math.nan] * len(OF_OUTPUTS)]
        bend = (self._value(plus) - 2 * self._clean + self._value(minus)) / (2 * step**2)
        of_both = zip(element_weights(plus.loss, plus.losses), element_weights(minus.loss, minus.losses), strict=False)
        weights = [(a + b) / 2 for a, b in of_both]
        pairs = [combine(plus, minus, weights, curvature, False, step).penalty for curvature in OF_OUTPUTS]
        forms = [penalty.item() for penalty in pairs if penalty is not None]
        return [truth, bend if step < HALF_STEP else math.nan, *forms]

    def _pass(self, directions: Directions, step: float, only: int | None) -> Pass:
        rule = Perturb(directions, step) if only is None else PerturbSome(directions, step, [only])
        done = run_pass(self.closure, rule, record_losses=not self.problem)
        directions.rewind()
        return done

    def _value(self, done: Pass) -> float:
        """The loss, its elements added up in float64: the effect can be smaller than the last digit of the loss."""
        if self.problem:
            return done.loss.item()
        weighted = zip(element_weights(done.loss, done.losses), done.losses, strict=True)
        return sum((w.double() * loss.per_element(loss.elements).double()).sum().item() for w, loss in weighted)

    def _first_order(self, directions: Directions, only: int | None) -> float:
        """``s`` of the sites on the path."""
        chosen = range(len(self.sites)) if only is None else [only]
        slopes = [(i, self._slopes[i]) for i in chosen]
        try:
            return sum(float((slope * directions.at(i)).sum()) for i, slope in slopes if slope is not None)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise UnsupportedSiteError(
                "A dropout is called inside torch.vmap, where each slice has a slope of its own that cannot be had "
                "outside of it. Call the dropout outside of vmap, on the whole tensor."
            ) from error


class _Look(Tap):
    """Taps that note in which precision the sites' activations are."""

    def __init__(self, directions: Directions) -> None:
        super().__init__(directions)
        self._dtypes: set[torch.dtype] = set()

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.sites.Rule`."""
        self._dtypes.add(h.dtype)
        return super().__call__(site, h)

    @property
    def step_size(self) -> float:
        """The step that suits the coarsest of them."""
        return max(STEPS.get(dtype, HALF_STEP) for dtype in self._dtypes)
