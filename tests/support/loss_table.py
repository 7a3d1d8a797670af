"""The losses that tests run through. A new recognized loss is a row of `LOSS_TABLE`."""

import torch
import torch.nn.functional as F

from lightning_dropreg import recognize

T, C = 5, 4


def fixed(*shape, seed=5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


SIGNS = (fixed(T, C) > 1).double()
COUNTS = (3 * fixed(T, C)).floor()
SOFT = fixed(T, C).softmax(-1)
focal = recognize(lambda z, y: (1 - z.softmax(-1)[range(len(y)), y]) ** 2 * F.cross_entropy(z, y, reduction="none"))
cosh = recognize(lambda z, y: (z - y).cosh().log())

# each takes the outputs z (T, C) and a reduction; the Hessian in z of the scalar it returns is the reference
LOSS_TABLE = {
    "cross_entropy": lambda z, r: F.cross_entropy(
        z, torch.arange(T) % C, fixed(C).to(z.dtype), label_smoothing=0.2, reduction=r
    ),
    "mse": lambda z, r: F.mse_loss(z, fixed(T, C), reduction=r),
    "huber": lambda z, r: F.huber_loss(z, fixed(T, C), reduction=r, delta=0.7),
    "smooth_l1": lambda z, r: F.smooth_l1_loss(z, fixed(T, C), reduction=r, beta=0.6),
    "poisson": lambda z, r: F.poisson_nll_loss(z, COUNTS, reduction=r, full=True),
    "poisson_positive": lambda z, r: F.poisson_nll_loss(z.exp(), COUNTS, log_input=False, reduction=r),
    "gaussian": lambda z, r: F.gaussian_nll_loss(z, fixed(T, C), fixed(T, 1, seed=6), full=True, reduction=r),
    "bce": lambda z, r: F.binary_cross_entropy(z.sigmoid(), SIGNS, fixed(T, 1), reduction=r),
    "bce_with_logits": lambda z, r: F.binary_cross_entropy_with_logits(z, SIGNS, reduction=r, pos_weight=fixed(C)),
    "soft_margin": lambda z, r: F.soft_margin_loss(z, 2 * SIGNS - 1, reduction=r),
    "kl_div": lambda z, r: F.kl_div(z.log_softmax(-1), SOFT, reduction="batchmean" if r == "mean" else r),
    "kl_div_log": lambda z, r: F.kl_div(F.log_softmax(z, -1), SOFT.log(), log_target=True, reduction=r),
    "nll": lambda z, r: F.nll_loss(z.log_softmax(-1), torch.arange(T) % C, fixed(C).to(z.dtype), reduction=r),
    "mse_weighted": lambda z, r: F.mse_loss(z, fixed(T, C), reduction=r, weight=fixed(T, C, seed=7)),
    "recognized": lambda z, r: reduce_as(r, focal(z, torch.arange(T) % C)),
    "recognized_elementwise": lambda z, r: reduce_as(r, cosh(z, fixed(T, C))),
    "gaussian_trained_variance": lambda z, r: F.gaussian_nll_loss(
        z[:, :2], fixed(T, 2), z[:, 2:].exp() + 0.1, reduction=r
    ),
}
NO_ROOT = {"recognized", "recognized_elementwise", "gaussian_trained_variance"}
# outputs are what the loss is given, here not z: the reference differentiates in that
OUTPUTS = {
    "poisson_positive": (torch.exp, lambda e, r: F.poisson_nll_loss(e, COUNTS, log_input=False, reduction=r)),
    "gaussian_trained_variance": (
        lambda z: torch.cat([z[:, :2], z[:, 2:].exp() + 0.1], 1),
        lambda o, r: F.gaussian_nll_loss(o[:, :2], fixed(T, 2), o[:, 2:], reduction=r),
    ),
}


def reduce_as(reduction, elements):
    return elements if reduction == "none" else getattr(elements, reduction)()


# the commonest with every option, as users reduce them: for the statistical tests of the estimators, which are slow
LOSS_OPTIONS = {
    "cross_entropy": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4),
    "cross_entropy_sum": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 4, reduction="sum"),
    "cross_entropy_all_options": lambda z: F.cross_entropy(
        z, torch.tensor([0, 1, -7, 3, 2]), weight=fixed(4), ignore_index=-7, label_smoothing=0.2
    ),
    "cross_entropy_soft_targets": lambda z: F.cross_entropy(
        z, fixed(5, 4).softmax(-1), weight=fixed(4), label_smoothing=0.1
    ),
    "cross_entropy_masked": lambda z: (
        (F.cross_entropy(z, torch.arange(len(z)) % 4, reduction="none") * torch.tensor([1.0, 0, 2, 1, 0])).sum() / 4
    ),
    "cross_entropy_spatial": lambda z: F.cross_entropy(z.T.reshape(1, 4, 5), torch.arange(5)[None] % 4),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(-1), torch.arange(len(z)) % 4, weight=fixed(4)),
    "bce_with_logits": lambda z: F.binary_cross_entropy_with_logits(
        z, (fixed(5, 4) > 1).double(), weight=fixed(5, 1), pos_weight=fixed(4)
    ),
    "mse_loss": lambda z: F.mse_loss(z, fixed(5, 4)),
    "mse_loss_sum": lambda z: F.mse_loss(z[:, 0], fixed(5), reduction="sum"),
    "two_weighted_losses": lambda z: (
        F.cross_entropy(z[:, :2], torch.arange(5) % 2) + 0.3 * F.mse_loss(z[:, 2:], fixed(5, 2))
    ),
}
