"""Losses of the outputs of the small networks, which every estimator is tried on. A new loss is a row here."""

import torch
import torch.nn.functional as F


def weights(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) + 0.5


LOSSES = {
    "cross_entropy": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4),
    "cross_entropy_sum": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4, reduction="sum"),
    "cross_entropy_all_options": lambda z: F.cross_entropy(
        z, torch.tensor([0, 1, -7, 3, 2]), weight=weights(4), ignore_index=-7, label_smoothing=0.2
    ),
    "cross_entropy_soft_targets": lambda z: F.cross_entropy(
        z, weights(5, 4).softmax(-1), weight=weights(4), label_smoothing=0.1
    ),
    "cross_entropy_masked": lambda z: (
        (F.cross_entropy(z, torch.arange(len(z)) % 4, reduction="none") * torch.tensor([1.0, 0, 2, 1, 0])).sum() / 4
    ),
    "cross_entropy_spatial": lambda z: F.cross_entropy(z.T.reshape(1, 4, 5), torch.arange(5)[None] % 4),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(-1), torch.arange(len(z)) % 4, weight=weights(4)),
    "bce_with_logits": lambda z: F.binary_cross_entropy_with_logits(
        z, (weights(5, 4) > 1).double(), weight=weights(5, 1), pos_weight=weights(4)
    ),
    "mse_loss": lambda z: F.mse_loss(z, weights(5, 4)),
    "mse_loss_sum": lambda z: F.mse_loss(z[:, 0], weights(5), reduction="sum"),
    "two_weighted_losses": lambda z: (
        F.cross_entropy(z[:, :2], torch.arange(5) % 2) + 0.3 * F.mse_loss(z[:, 2:], weights(5, 2))
    ),
}
