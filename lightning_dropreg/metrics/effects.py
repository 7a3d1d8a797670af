"""The two effects of dropout over a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import check_count, check_flags, check_integer
from lightning_dropreg.metrics.functional import Effects, dropout_effects
from lightning_dropreg.metrics.plotted import PlottedMetric
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes import Closure
from lightning_dropreg.step.settings import check_curvature, check_estimation

__all__ = ["MeanExplicitPenalty", "NoiseScale"]


class _DropoutEffect(PlottedMetric):
    """Weighted sums of the effects of dropout on batches.

    Args:
        draws: Random directions for a batch, at least 1.
        seed: Seed of the directions.
        estimator: See `lightning_dropreg.functional.explicit_penalty`.
        step_size: See there.
        kwargs: Those of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    examples: Tensor
    batches: Tensor

    def __init__(
        self,
        draws: int = 1,
        seed: int = 0,
        estimator: str = "antithetic",
        step_size: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_count("draws", draws)
        check_integer("seed", seed)
        check_estimation(estimator, step_size, "as_model")
        self.draws = draws
        self.seed = seed
        self.estimator = estimator
        self.step_size = step_size
        self.add_state("examples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _effects(self, closure: Closure, module: nn.Module, examples: int, **options: Any) -> Effects:
        check_count("examples", examples)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        effects = dropout_effects(
            closure,
            module,
            draws=self.draws,
            key=fold_key(self.seed, rank, self._update_count),
            estimator=self.estimator,
            step_size=self.step_size,
            **options,
        )
        self.examples = self.examples + examples
        self.batches = self.batches + 1
        return Effects(*(value.to(self.examples.device) for value in effects))  # the metric may be kept elsewhere


class MeanExplicitPenalty(_DropoutEffect):
    """Mean of ``R_approx`` (4.4), or of an ablation, over the examples of a data set.

    Args:
        curvature: See `lightning_dropreg.functional.explicit_penalty`.
        kwargs: ``draws``, ``seed``, ``estimator`` and ``step_size``, see
            `lightning_dropreg.metrics.functional.dropout_effects`, and those of `torchmetrics.Metric`.

    Example:
        In a ``validation_step``, where the module is in evaluation mode:

        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)).eval()
        >>> metric = MeanExplicitPenalty(draws=4)
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> metric.update(lambda: nn.functional.cross_entropy(net(x), y), net, examples=16)
        >>> bool(metric.compute() > 0)
        True
    """

    total: Tensor

    def __init__(self, curvature: str = "loss_hessian", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_curvature(curvature)
        self.curvature = curvature
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, closure: Closure, module: nn.Module, examples: int) -> None:
        """Take in a batch.

        Args:
            closure: Runs forward and loss (a mean over the examples) and returns the loss.
            module: The model; no trace of this is left in it.
            examples: Number of examples in the batch: its weight.
        """
        effects = self._effects(closure, module, examples, curvature=self.curvature, noise=False)
        self.total = self.total + effects.explicit_penalty * examples

    def compute(self) -> Tensor:
        """Return the mean penalty, in units of the loss."""
        return (self.total / self.examples).to(torch.get_default_dtype())


class NoiseScale(_DropoutEffect):
    r"""Size of the implicit noise of dropout, relative to the gradient or not.

    .. math::
        \sqrt{E \lVert \xi_{approx} \rVert^2 / E \lVert \nabla \ell \rVert^2}

    with the means over draws and batches: the noise that dropout adds to the gradient of a batch, as a multiple of that
    gradient. Like every noise of a mean it falls as the root of the batch's size.

    Args:
        relative: Whether to divide by the gradient; if not, the root of the mean trace of the noise's covariance.
        kwargs: See `MeanExplicitPenalty`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)).eval()
        >>> metric = NoiseScale(draws=4)
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> metric.update(lambda: nn.functional.cross_entropy(net(x), y), net)
        >>> bool(metric.compute() > 0)
        True
    """

    noise: Tensor
    gradient: Tensor

    def __init__(self, relative: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_flags(relative=relative)
        self.relative = relative
        self.add_state("noise", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gradient", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, closure: Closure, module: nn.Module, examples: int = 1) -> None:
        """Take in a batch; every batch counts the same.

        Args:
            closure: Runs forward and loss and returns the loss, any loss.
            module: The model; no trace of this is left in it.
            examples: As for `MeanExplicitPenalty`, so that one call updates both; it changes nothing.
        """
        effects = self._effects(closure, module, examples, penalty=False)
        self.noise = self.noise + effects.noise
        self.gradient = self.gradient + effects.gradient

    def compute(self) -> Tensor:
        """Return the scale: a ratio, or in units of the gradient."""
        square = self.noise / (self.gradient if self.relative else self.batches)
        return square.sqrt().to(torch.get_default_dtype())
