"""Max-norm regularization: each unit's incoming weights stay within a ball."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils.hooks import RemovableHandle

from lightning_dropreg.checks import SpellsArguments, check_instance
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedModuleError
from lightning_dropreg.session.others import UndoneAtEnd
from lightning_dropreg.session.twins import is_a

__all__ = ["MaxNorm", "project_units"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, *_RECURRENT, *_EMBEDDINGS)
_SUPPORTED = (
    "linear and bilinear layers, convolutions and transposed convolutions, RNN, LSTM and GRU layers and cells, "
    "MultiheadAttention, Embedding and EmbeddingBag"
)


@torch.no_grad()
def project_units(layer: nn.Module, max_norm: float) -> None:
    r"""Project the incoming weights of every unit onto the ball of radius `max_norm`, in place.

    .. math::
        w \leftarrow w \, \min(1, c / \lVert w \rVert_2)

    | layer            | incoming weights of a unit                                                        |
    |------------------|-----------------------------------------------------------------------------------|
    | linear, bilinear | a row of the weight (for bilinear, of all pairs of inputs)                        |
    | convolution      | those to an output channel, from the inputs of its group and the whole kernel     |
    | RNN, LSTM, GRU   | for a unit of a gate, its row of the input weights and its row of the recurrent   |
    | (also cells)     | weights, together one vector; of a projection (``proj_size``), a row              |
    | attention        | a row of the projection to queries, keys or values                                |
    | embedding        | a row, the vector of one token, as `nn.Embedding` does with its own ``max_norm``  |

    Biases stay.

    Args:
        layer: One of these.
        max_norm: Radius ``c``, positive.

    Raises:
        UnsupportedModuleError: If it is something else.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> project_units(layer, 1.0)
        >>> [round(norm, 3) for norm in layer.weight.norm(dim=1).tolist()]
        [1.0, 0.5]
    """
    for parts in _units(layer):
        dtypes = [torch.promote_types(part.dtype, torch.float32) for part in parts]
        norms = [torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=d) for p, d in zip(parts, dtypes, strict=True)]
        squares = sum(norm**2 for norm in norms)
        assert isinstance(squares, Tensor)
        factor = (max_norm / squares.sqrt()).clamp_max(1)
        for part in parts:
            part.mul_(factor.to(part.dtype).view(-1, *[1] * (part.ndim - 1)))


def _units(layer: nn.Module) -> list[list[Tensor]]:
    """Views of a layer's weights with the units in the first dimension; those in one list belong to the same units.

    Returns:
        The weights.

    Raises:
        UnsupportedModuleError: If the layer is of no known kind.
    """
    if isinstance(layer, _ConvTransposeNd):  # (in, out/groups, *kernel): the outputs of each group to the front
        grouped = layer.weight.unflatten(0, (layer.groups, -1))
        return [[group.transpose(0, 1)] for group in grouped]
    own = layer._parameters
    if isinstance(layer, nn.RNNBase):
        return [
            [weight for kind in kinds if (weight := own.get(f"weight_{kind}_{suffix}")) is not None]
            for suffix in (name.removeprefix("weight_ih_") for name in own if name.startswith("weight_ih_"))
            for kinds in ((("ih", "hh"), ("hr",)) if layer.proj_size else (("ih", "hh"),))
        ]
    if isinstance(layer, nn.RNNCellBase):
        return [[layer.weight_ih, layer.weight_hh]]
    if isinstance(layer, nn.MultiheadAttention):
        return [[weight] for name, weight in own.items() if name.endswith("proj_weight") and weight is not None]
    if not isinstance(layer, _LAYERS):
        raise UnsupportedModuleError(
            f"The units of a {type(layer).__name__} are not known, so their norms cannot be bounded. Known are "
            f"{_SUPPORTED}."
        )
    assert isinstance(layer.weight, Tensor)
    return [[layer.weight]]


class MaxNorm(SpellsArguments, UndoneAtEnd):
    r"""Keeps each unit's incoming weight vector within a ball: max-norm regularization.

    Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting* (JMLR 2014), section 5.1,
    found it particularly useful beside dropout, with large learning rates; they used radii of 3 to 4, chosen by
    validation. After every optimizer step, and before anything looks at the weights, those of a unit whose norm is
    above the radius are scaled back to it (`project_units`, which says what the units of each kind of layer are). Under
    DDP every replica does the same to the same weights. Weights that several layers share (tied) are projected once.

    Args:
        max_norm: Radius ``c``, positive.
        modules: Patterns of the paths of the layers to act on (``["encoder.*"]``); None for all but embeddings, whose
            vectors are no unit's incoming weights: name them to bound them. A last layer, whose scale is the
            confidence of the model, is often better left out.

    Raises:
        InvalidArgumentError: If `max_norm` is not a finite positive number.

    Example:
        >>> MaxNorm(max_norm=3.0, modules=["encoder.*"]).max_norm
        3.0
    """

    acts_on_training = True

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
        if not is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy):
            raise UnsupportedModuleError(
                f"MaxNorm needs a unit's weights in one place, and {type(trainer.strategy).__name__} may shard them. "
                "Train with one device or with DDP."
            )
        self._layers = self._find(pl_module)
        # after the step itself: a step that the gradient scaler skips is none, manual optimization has steps too
        self._handles = [optimizer.register_step_post_hook(self._project) for optimizer in trainer.optimizers]

    def _find(self, root: nn.Module) -> list[nn.Module]:
        owners = [(path, layer) for path, layer in root.named_modules() if _has_matrix(layer)]
        layers = [(path, layer) for path, layer in owners if isinstance(layer, _LAYERS)]
        # a pattern such as "encoder.*" takes in activations and containers too
        named = [(path, layer) for path, layer in layers if self._chooses(path, layer)]
        unknown = [
            f"{path or 'the module itself'} ({type(layer).__name__})"
            for path, layer in owners
            if not isinstance(layer, _LAYERS) and self._chooses(path, layer)
        ]
        if unknown and self.modules is not None:
            raise UnsupportedModuleError(
                f"MaxNorm does not know what the units of {', '.join(unknown)} are. It acts on {_SUPPORTED}: choose "
                "those with modules=."
            )
        if not named:
            there = ", ".join(path for path, _ in layers) or "none"
            by = "" if self.modules is None else f" by the patterns {', '.join(self.modules)}"
            raise UnsupportedModuleError(
                f"MaxNorm found no layer that it acts on in {type(root).__name__}{by}; there are: {there}. It acts on "
                f"{_SUPPORTED}."
            )
        computed = [path for path, layer in named if is_parametrized(layer)]
        if computed:
            raise UnsupportedModuleError(
                f"The weights of {', '.join(computed)} are computed by a parametrization, so they cannot be set. "
                "Choose other layers with modules=."
            )
        if unknown:
            rank_zero_warn(
                f"MaxNorm does not know what the units of {', '.join(unknown)} are, and leaves them as they are. It "
                f"acts on {_SUPPORTED}."
            )
        return _untied(named)

    def _chooses(self, path: str, layer: nn.Module) -> bool:
        if self.modules is None:
            return not isinstance(layer, _EMBEDDINGS)
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.modules)

    def _project(self, *_: Any) -> None:
        for layer in self._layers:
            project_units(layer, self.max_norm)

    def undo(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._layers = []


def _has_matrix(layer: nn.Module) -> bool:
    """Whether a layer has weights of its own, more than a number for each unit."""
    if isinstance(layer, ParametrizationList):
        return False  # the layer that it belongs to tells of it
    return is_parametrized(layer) or any(p is not None and p.ndim > 1 for p in layer._parameters.values())


def _untied(layers: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Keep one of the layers that share their weights.

    Returns:
        The layers.

    Raises:
        UnsupportedModuleError: If the units of two of them are not the same.
    """
    found: list[nn.Module] = []
    owners: dict[int, tuple[str, list[list[tuple[int, ...]]]]] = {}
    for path, layer in layers:
        units = [
            [(id(part._base if part._base is not None else part), *part.shape) for part in parts]
            for parts in _units(layer)
        ]
        weights = {part[0] for parts in units for part in parts}
        shared = [owners[weight] for weight in weights if weight in owners]
        for other, theirs in shared:
            if theirs != units:
                raise UnsupportedModuleError(
                    f"{path} shares weights with {other}, but they are not the incoming weights of the same units. "
                    "Choose one of the two with modules=."
                )
        if not shared:
            found.append(layer)
        owners |= dict.fromkeys(weights, (path, units))
    return found
