"""What must hold between the estimators, and between two ways of writing one model."""

import math

import torch

from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.functional import dropout_loss, find_sites, plain_loss


def gradients(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])


def run(estimator, closure, key=3, step_size=1e-4, curvature="loss_hessian"):
    return ESTIMATORS[estimator](
        closure, curvature=curvature, noise=True, step_size=step_size, mask="as_model", key=key
    )


def check_agreement(closure, parameters):
    """Forward mode and the antithetic pair see the same directions; noise is the same from all four."""
    a, f, d, e = (run(name, closure) for name in ("antithetic", "forward", "double_backward", "exact"))
    for one in (f, d, e):
        torch.testing.assert_close(a.loss, one.loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a.noise, one.noise, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            gradients(a.noise, parameters), gradients(one.noise, parameters), rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(a.penalty, f.penalty, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradients(a.penalty, parameters), gradients(f.penalty, parameters), rtol=1e-4, atol=1e-6)
    # the estimators that draw have the exact value as their mean
    for name in ("forward", "double_backward"):
        sample = torch.stack([run(name, closure, key=k).penalty.detach() for k in range(60)])
        assert (sample.mean() - e.penalty).abs() < 4 * sample.std() / math.sqrt(60) + 1e-9, name


def check_pair(closure, by_hand, parameters):
    """Two closures that mean the same: the same sites, losses, penalties and gradients."""
    ours, theirs = find_sites(closure), find_sites(by_hand)
    assert [(s.p, s.shape, s.mask_shape) for s in ours] == [(s.p, s.shape, s.mask_shape) for s in theirs]
    torch.testing.assert_close(plain_loss(closure), plain_loss(by_hand))
    for curvature in ("loss_hessian", "identity", "loss_jacobian"):
        a = run("exact", closure, curvature=curvature)
        b = run("exact", by_hand, curvature=curvature)
        for one, other in ((a.penalty, b.penalty), (a.noise, b.noise)):
            torch.testing.assert_close(one, other)
            torch.testing.assert_close(gradients(one, parameters), gradients(other, parameters))
    draws = [dropout_loss(c, k=2, generator=torch.Generator().manual_seed(4)) for c in (closure, by_hand)]
    torch.testing.assert_close(*draws)
