"""The methods by name, each as what it changes in the run of `benchmarks.training.train`.

Whatever is the package's is a list of its callbacks in an ordinary Trainer. The baselines are those of
``examples/baselines``, in their authors' form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

import lightning_dropreg as dr

from ..baselines.generalized_cross_entropy import generalized_cross_entropy
from ..baselines.label_smoothing import label_smoothing_loss
from ..baselines.mixup import mixup_loss
from ..baselines.noise_stability import NoiseStability
from ..baselines.r_drop import r_drop_loss
from ..baselines.sam import SAM, AdamSAM
from .many_networks import Losses, ManyNetworks

__all__ = ["ADAM", "METHODS", "Recipe", "recipe"]

ADAM: dict[Callable[..., torch.optim.Optimizer], Callable[..., torch.optim.Optimizer]] = {
    torch.optim.SGD: torch.optim.Adam,
    SAM: AdamSAM,
}
"""What a method's optimizer becomes in a setting with Adam."""


@dataclass
class Recipe:
    """What a method changes.

    Attributes:
        callbacks: Of the package.
        dropout: Whether the model has dropout (that the callbacks may replace).
        optimizer: Makes it from the parameters; SGD if None.
        options: More arguments of the optimizer, besides the learning rate.
        losses: The loss of every row; cross entropy if None.
        passes: Forward and backward passes of the whole batch in one step: what equal budgets are counted in.
    """

    callbacks: list[L.Callback] = field(default_factory=list)
    dropout: bool = True
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)
    losses: Losses | None = None
    passes: float = 1


def _smoothed(networks: ManyNetworks, x: Tensor, y: Tensor, amount: float) -> Tensor:
    return label_smoothing_loss(networks(x).flatten(0, 1), y.flatten(), amount)


def _r_drop(networks: ManyNetworks, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return r_drop_loss(networks(x).flatten(0, -2), networks(x).flatten(0, -2), y.flatten(), alpha)


def _generalized(networks: ManyNetworks, x: Tensor, y: Tensor, power: float) -> Tensor:
    return generalized_cross_entropy(networks(x).flatten(0, 1), y.flatten(), power)


def _averaged(k: int, noise: str | None = None, strength: float = 1.0) -> Recipe:
    callbacks: list[L.Callback] = [dr.MiniBatchDropout(k)]
    if noise is not None:
        callbacks.append(dr.ImplicitNoise(strength, source=noise))
    return Recipe(callbacks, passes=k + 2 * (noise == "taylor"))  # that of section 3.1 is made of the k


def _penalty(strength: float = 1.0, noise: float | None = None, **options: Any) -> Recipe:
    callbacks: list[L.Callback] = [dr.ExplicitPenalty(strength, **options)]
    passes = 3 if options.get("curvature") == "full" else 2
    return Recipe(callbacks if noise is None else [*callbacks, dr.ImplicitNoise(noise)], passes=passes)


def _full(strength: float = 1.0, clip: float | None = None, fade: int | None = None) -> Recipe:
    found = _penalty(strength, curvature="full")
    if clip is not None:
        found.optimizer, found.options = ClippedSGD, {"clip": clip}
    if fade is not None:
        found.callbacks.insert(0, Fading(fade))
    return found


class ClippedSGD(torch.optim.SGD):
    """Shortens the gradient of every network to `clip`, where it is longer; the first dimension numbers networks."""

    def __init__(self, params: Iterable[Tensor], clip: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.clip = clip

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        for g in gradients:
            g.mul_((self.clip / norm).clamp(max=1).reshape(-1, *[1] * (g.ndim - 1)))
        super().step()
        return loss


class Fading(L.Callback):
    """Lets ``q / (1 - q)``, to which penalties are proportional, fall linearly to a fifth in `length` steps."""

    def __init__(self, length: int) -> None:
        self.length = length

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = pl_module.drop_probs

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        factor = 1 - 0.8 * min(1, trainer.global_step / self.length)
        ratios = [factor * q / (1 - q) for q in self.start]
        pl_module.drop_probs = [c / (1 + c) for c in ratios]


def _sam(rho: float, dropout: bool) -> Recipe:
    return Recipe(dropout=dropout, optimizer=SAM, options={"rho": rho, "networks": True}, passes=2)


QUARTER: dict[str, Any] = {"batch_fraction": 0.25, "batch_dim": 1}

METHODS: dict[str, Callable[..., Recipe]] = {
    "none": lambda: Recipe(dropout=False),
    "dropout": Recipe,
    "DROPOUT_k": _averaged,
    "DROPOUT_k + 3.1": partial(_averaged, noise="dropout"),
    "DROPOUT_k + xi": partial(_averaged, noise="taylor"),
    "xi": lambda strength=1.0: Recipe([dr.ImplicitNoise(strength)], passes=2),
    "R": _penalty,
    "Algorithm 2": partial(_penalty, noise=1.0),
    "R, quarter": lambda strength=1.0: Recipe([dr.ExplicitPenalty(strength, **QUARTER)], passes=1.5),
    "Algorithm 2, quarter": lambda strength=1.0: Recipe(
        [dr.ExplicitPenalty(strength, **QUARTER), dr.ImplicitNoise(**QUARTER)], passes=1.5
    ),
    "curvature full": _full,
    "mixup": lambda alpha: Recipe(dropout=False, losses=partial(mixup_loss, alpha=alpha)),
    "generalized CE": lambda power: Recipe(dropout=False, losses=partial(_generalized, power=power)),
    "generalized CE with dropout": lambda power: Recipe(losses=partial(_generalized, power=power)),
    "identity": partial(_penalty, curvature="identity"),
    "loss Jacobian": partial(_penalty, curvature="loss_jacobian"),
    "loss Jacobian + xi": partial(_penalty, curvature="loss_jacobian", noise=1.0),
    "l2": lambda strength: Recipe(dropout=False, options={"weight_decay": strength}),
    "label smoothing": lambda amount: Recipe(dropout=False, losses=partial(_smoothed, amount=amount)),
    "R-Drop": lambda alpha: Recipe(losses=partial(_r_drop, alpha=alpha), passes=2),
    "SAM": partial(_sam, dropout=False),
    "SAM with dropout": partial(_sam, dropout=True),
    "noise stability": lambda sigma: Recipe(
        dropout=False, optimizer=NoiseStability, options={"sigma": sigma}, passes=2
    ),
}


def recipe(method: str, **parameters: Any) -> Recipe:
    """Return the recipe of a method.

    Args:
        method: A key of `METHODS`.
        parameters: Its parameters.
    """
    return METHODS[method](**parameters)
