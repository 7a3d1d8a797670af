"""Max-norm regularization: each unit's incoming weights stay within a ball."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_dropreg.checks import check_instance
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedModuleError

__all__ = ["MaxNorm", "project_units"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@torch.no_grad()
def project_units(layer: nn.Module, max_norm: float) -> None:
    r"""Project the incoming weights of every unit onto the ball of radius `max_norm`, in place.

    .. math::
        w \leftarrow w \, \min(1, c / \lVert w \rVert_2)

    A unit of a linear layer is a row of its weight; a unit of a convolution is an output channel, with the weights
    that lead to it from all the input channels of its group and all the places of the kernel. Biases stay.

    Args:
        layer: An `nn.Linear`, `nn.Conv1d` to `nn.Conv3d` or `nn.ConvTranspose1d` to `nn.ConvTranspose3d`.
        max_norm: Radius ``c``, positive.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> project_units(layer, 1.0)
        >>> [round(norm, 3) for norm in layer.weight.norm(dim=1).tolist()]
        [1.0, 0.5]
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, _ConvTransposeNd):
        weight.copy_(torch.renorm(weight, 2, 0, max_norm))
        return
    # (in, out/groups, *kernel): bring each group's outputs to the front
    grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    projected = torch.renorm(grouped.flatten(0, 1), 2, 0, max_norm)
    weight.copy_(projected.view_as(grouped).transpose(1, 2).flatten(0, 1))


class MaxNorm(Callback):
    r"""Keeps each unit's incoming weight vector within a ball: max-norm regularization.

    Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting* (JMLR 2014), section 5.1,
    found it particularly useful beside dropout, with large learning rates; they used radii of 3 to 4, chosen by
    validation. After every optimizer step, and before anything looks at the weights, those of a unit whose norm is
    above the radius are scaled back to it (`project_units`). Under DDP every replica does the same to the same weights.

    Args:
        max_norm: Radius ``c``, positive.
        modules: Patterns of the paths of the layers to act on (``["encoder.*"]``), linear ones and convolutions;
            None for all. A last layer, whose scale is the confidence of the model, is often better left out.

    Raises:
        InvalidArgumentError: If `max_norm` is not a finite positive number.

    Example:
        >>> MaxNorm(max_norm=3.0, modules=["encoder.*"]).max_norm
        3.0
    """

    def __init__(self, max_norm: float = 3.0, modules: Sequence[str] | None = None) -> None:
        if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not 0 < max_norm < float("inf"):
            raise InvalidArgumentError(f"max_norm={max_norm!r} must be a finite number above 0; 3 is usual.")
        if isinstance(modules, str):
            raise InvalidArgumentError(f"modules={modules!r} must be a list of patterns, [{modules!r}] for one.")
        if modules is not None:
            check_instance("modules", modules, Sequence, "a list of patterns")
            for pattern in modules:
                check_instance("modules", pattern, str, "a list of patterns, which are strings")
        self.max_norm = float(max_norm)
        self.modules = modules
        self._layers: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and follow every optimizer.

        Raises:
            UnsupportedModuleError: If the weights of a layer cannot be projected.
        """
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise UnsupportedModuleError(
                f"MaxNorm needs a unit's weights in one place, and {type(trainer.strategy).__name__} may shard them. "
                "Train with one device or with DDP."
            )
        self._layers = self._find(pl_module)
        # after the step itself: a step that the gradient scaler skips is none, manual optimization has steps too
        self._handles = [optimizer.register_step_post_hook(self._project) for optimizer in trainer.optimizers]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._release()

    def _find(self, root: nn.Module) -> list[nn.Module]:
        layers = [(path, layer) for path, layer in root.named_modules() if isinstance(layer, _LAYERS)]
        # a pattern such as "encoder.*" takes in activations and containers too
        named = [
            (path, layer)
            for path, layer in layers
            if self.modules is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in self.modules)
        ]
        if not named:
            there = ", ".join(path for path, _ in layers) or "none"
            by = "" if self.modules is None else f" by the patterns {', '.join(self.modules)}"
            raise UnsupportedModuleError(
                f"MaxNorm found no linear layer or convolution in {type(root).__name__}{by}; there are: {there}."
            )
        computed = [path for path, layer in named if is_parametrized(layer, "weight")]
        if computed:
            raise UnsupportedModuleError(
                f"The weights of {', '.join(computed)} are computed by a parametrization, so they cannot be set. "
                "Choose other layers with modules=."
            )
        # tied weights once
        return list({id(layer.weight): layer for _, layer in named}.values())

    def _project(self, *_: Any) -> None:
        for layer in self._layers:
            project_units(layer, self.max_norm)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._layers = []
