"""Scaling pretrained weights for fine-tuning with dropout.

Dropout comes in two forms. *Unscaled* dropout (Srivastava et al., JMLR 2014) multiplies by the mask alone: what the
next layer receives is smaller by the factor ``1 - q`` on average, and at test time the weights are multiplied by that.
*Inverted* dropout, which is torch's and everybody's today, divides by ``1 - q`` in training: the next layer receives
the same on average with and without.

Srivastava et al. scale pretrained weights by ``1/p``, their ``p`` being the probability to keep, ``1 - q``. That makes
up for unscaled dropout. **Before inverted dropout nothing must be scaled**: it would count twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_dropreg.checks import check_choice, check_drop_prob
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedModuleError
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS

__all__ = ["scale_pretrained_for_dropout"]

_FORMS = ("none", "inverted", "unscaled")


@torch.no_grad()
def scale_pretrained_for_dropout(
    model: nn.Module, drop_probs: Mapping[str, float], *, pretrained: str = "none", dropout: str = "unscaled"
) -> dict[str, float]:
    """Scale pretrained weights, in place, so that each unit's expected input stays what it was.

    Scaled are the weights of the layers named in `drop_probs`: those *after* a dropout, which receive what it dropped
    from. Biases are not scaled, for nothing is dropped from them, and no other layers.

    | `pretrained` with | fine-tuned with  | factor    |
    |-------------------|------------------|-----------|
    | none or inverted  | inverted (torch) | 1         |
    | none or inverted  | unscaled         | 1/(1 - q) |
    | unscaled          | inverted (torch) | 1 - q     |
    | unscaled          | unscaled         | 1         |

    The third row is for weights of old, as they were in training, that go into a torch model.

    Args:
        model: The model with the pretrained weights.
        drop_probs: For the path of each layer with a ``weight`` the probability ``q`` with which its input is dropped,
            in ``[0, 1)``.
        pretrained: Dropout with which the weights were trained: ``"none"``, ``"inverted"`` or ``"unscaled"``.
        dropout: Dropout with which they will be trained: ``"unscaled"`` or ``"inverted"``.

    Returns:
        The factor of each layer.

    Raises:
        InvalidArgumentError: If an argument is out of range, or `dropout` is ``"unscaled"`` and the model has dropout
            layers of torch, which are inverted.
        UnsupportedModuleError: If a layer has no weight of its own to scale.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> scale_pretrained_for_dropout(net, {"2": 0.5})
        {'2': 2.0}
        >>> scale_pretrained_for_dropout(net, {"2": 0.5}, dropout="inverted")  # torch.nn.Dropout: nothing to do
        {'2': 1.0}
    """
    check_choice("pretrained", pretrained, _FORMS)
    check_choice("dropout", dropout, _FORMS[1:])
    for path, q in drop_probs.items():
        check_drop_prob(q, f"scale_pretrained_for_dropout, at {path},")
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, DROPOUT_LAYERS)]
    inverted = [path for path, layer in layers if float(getattr(layer, "p", 0.0)) > 0]
    if dropout == "unscaled" and inverted:
        raise InvalidArgumentError(
            f"dropout='unscaled', but {', '.join(inverted)} are dropout layers of torch, which divide by 1 - p in "
            "training (inverted dropout): scaled weights would make up for it a second time. Use dropout='inverted'."
        )
    weights = {path: _weight(model, path) for path in drop_probs}  # all are checked before one is changed
    exponent = (pretrained == "unscaled") - (dropout == "unscaled")
    factors = {path: (1.0 - q) ** exponent for path, q in drop_probs.items()}
    for path, weight in weights.items():
        weight.mul_(factors[path])
    return factors


def _weight(model: nn.Module, path: str) -> Tensor:
    layers = dict(model.named_modules(remove_duplicate=False))
    if path not in layers:
        raise UnsupportedModuleError(f"{type(model).__name__} has no layer {path!r}; it has {', '.join(layers)}.")
    layer = layers[path]
    weight: Tensor | None = layer._parameters.get("weight")
    if weight is None:
        how = "computes its weight by a parametrization" if is_parametrized(layer) else "has no parameter 'weight'"
        raise UnsupportedModuleError(f"{path} ({type(layer).__name__}) {how}, so it cannot be scaled.")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if uses[id(weight)] > 1:
        raise UnsupportedModuleError(
            f"The weight of {path} is tied to another layer's, which would be scaled with it. Untie them first."
        )
    return weight
