"""The operations for dual numbers: values, tangents, and the gradients of the tangents, which torch gets wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from lightning_dropreg.numerics.dual import REPLACEMENTS

CASES = {
    F.softmax: lambda f, x: f(x, -1),
    torch.log_softmax: lambda f, x: f(x, 0),
    torch.logsumexp: lambda f, x: f(x, -1),
    F.layer_norm: lambda f, x: f(x, (4,), torch.arange(4.0) + 1, torch.ones(4)),
    F.batch_norm: lambda f, x: f(x, torch.zeros(4), torch.ones(4), torch.arange(4.0) + 1, None, True),
    F.instance_norm: lambda f, x: f(x.reshape(1, 3, 4), torch.zeros(3), torch.ones(3), torch.arange(3.0) + 1),
    F.linear: lambda f, x: f(x.square(), torch.arange(8.0).reshape(2, 4), torch.ones(2)),
    torch.mul: lambda f, x: f(x.square(), torch.arange(4.0)),
    torch.div: lambda f, x: f(x.square(), 3),
    torch.add: lambda f, x: f(x.square(), torch.ones(2, 1, 1)),  # broadcast
    torch.sub: lambda f, x: f(x.square(), torch.ones(4)),
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_replacement(function):
    torch.set_default_dtype(torch.float64)
    call, replacement = CASES[function], REPLACEMENTS[function]
    x, direction = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    value = call(function, x)
    # central differences, whose gradient is an ordinary backward: torch's third derivatives of norms are wrong too
    tangent = (call(function, x + 1e-4 * direction) - call(function, x - 1e-4 * direction)) / 2e-4
    cotangent = torch.randn_like(tangent)
    (gradient,) = torch.autograd.grad((tangent * cotangent).sum(), x)
    with forward_ad.dual_level():
        ours, our_tangent = forward_ad.unpack_dual(call(replacement, forward_ad.make_dual(x * 1, direction)))
    (our_gradient,) = torch.autograd.grad((our_tangent * cotangent).sum(), x)
    torch.testing.assert_close(ours, value)
    torch.testing.assert_close(our_tangent, tangent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-5)


def test_batch_norm_statistics():
    torch.set_default_dtype(torch.float64)
    x = torch.randn(5, 4, 3)
    expected, ours = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    expected(x)
    with forward_ad.dual_level():
        REPLACEMENTS[F.batch_norm](
            forward_ad.make_dual(x, x), ours.running_mean, ours.running_var, ours.weight, ours.bias, True
        )
    torch.testing.assert_close(ours.running_mean, expected.running_mean)
    torch.testing.assert_close(ours.running_var, expected.running_var)
