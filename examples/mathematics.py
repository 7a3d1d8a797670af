# %% [markdown]
# # The two effects of dropout, checked numerically
#
# A walk through the mathematics of Wei, Kakade and Ma, *The Implicit and Explicit Regularization Effects of Dropout*
# (ICML 2020), on a network so small that every dropout mask can be enumerated. Each cell ends with an assertion.
#
# Open it as a notebook (VS Code and Jupytext know the `# %%` cells), or run it:
#
#     python examples/mathematics.py [--fast]

# %%
import itertools
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian, jacobian

from lightning_dropreg.functional import dropout_loss, explicit_penalty, implicit_noise, plain_loss

FAST = "--fast" in sys.argv
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
q = 0.1

# %% [markdown]
# ## A network with one dropout site
#
# `h` are the activations that dropout acts on, `F_i` is what comes after them, `z` the logits.

# %%
body, head = nn.Sequential(nn.Linear(3, 8), nn.Tanh()), nn.Linear(8, 3)
nn.init.normal_(head.weight, std=1.0)
net = nn.Sequential(body, nn.Dropout(q), head)
x, y = torch.randn(1, 3), torch.tensor([1])
parameters = list(net.parameters())


def closure():
    return F.cross_entropy(net(x), y)


def gradient(value):
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


# %% [markdown]
# ## Dropout is multiplicative noise
#
# Dropout computes `h * (1 + eta)` with `eta = -1` with probability `q` and `q/(1-q)` otherwise. Its mean is 0 and its
# variance `c = q/(1-q)`. (The paper prints `q/(q-1)`: a slip of the sign.)

# %%
values, chances = torch.tensor([-1.0, q / (1 - q)]), torch.tensor([q, 1 - q])
c = q / (1 - q)
assert abs(float((chances * values).sum())) < 1e-15
assert math.isclose(float((chances * values**2).sum()), c)

masks = torch.tensor(list(itertools.product([0, 1], repeat=8)))  # all 256 of them
etas, probability = values[masks], chances[masks].prod(1)
h = body(x)


def loss_at(eta):
    return F.cross_entropy(head(h * (1 + eta)), y)


clean = loss_at(torch.zeros(8))
assert torch.equal(clean, plain_loss(closure))

# %% [markdown]
# ## The explicit effect
#
# Dropout changes the expected loss. The change is `R_drop`, here a sum over 256 masks.

# %%
losses = torch.stack([loss_at(eta) for eta in etas])
r_drop = (probability * losses).sum() - clean
print(f"R_drop   = {r_drop:.6f}   (loss {clean:.4f})")

# %% [markdown]
# To second order in `eta` it is (4.2): half the trace of the Hessian of the loss in `h`, weighted by `c h^2`. The paper
# keeps the part of that Hessian that is nonnegative, `J^T H_out J` (4.3):
#
# $$ R_{approx} = \tfrac12 \, c \, \langle J^\top H_{out} J, \mathrm{diag}(h^2) \rangle $$
#
# where `H_out = diag(p) - p p^T` is the Hessian of cross entropy in the logits. The part left out has the second
# derivative of the network in it, which is zero here: what follows `h` is linear.

# %%
J = jacobian(head, h[0])
p = head(h)[0].softmax(0)
H_out = torch.diag(p) - torch.outer(p, p)
torch.testing.assert_close(H_out, hessian(lambda z: F.cross_entropy(z[None], y), head(h)[0]))
gauss_newton = J.T @ H_out @ J
r_approx = c / 2 * (gauss_newton.diagonal() * h[0] ** 2).sum()

full = hessian(lambda a: F.cross_entropy(head(a[None]), y), h[0])
torch.testing.assert_close(full, gauss_newton)
torch.testing.assert_close(explicit_penalty(closure, estimator="exact"), r_approx)
print(f"R_approx = {r_approx:.6f}")

# %% [markdown]
# ## Where the expansion is to be trusted
#
# What is left out are the third and higher powers of `eta`. They do not vanish with `q`: even a small `q` drops entries
# whole, `eta = -1`. They vanish as each entry matters less, that is with the width of the layer.


# %%
def remainder(width, q):
    """Mean of |R_drop - R_approx| over that of R_drop, over random networks (logits linear in h)."""
    values, chances = torch.tensor([-1.0, q / (1 - q)]), torch.tensor([q, 1 - q])
    masks = torch.tensor(list(itertools.product([0, 1], repeat=width)))
    left, true = 0.0, 0.0
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        h, weight = torch.randn(width, generator=g), 2 * torch.randn(3, width, generator=g) / math.sqrt(width)
        drop = (chances[masks].prod(1) * -((h * (1 + values[masks])) @ weight.T).log_softmax(1)[:, 0]).sum()
        drop = drop + (weight @ h).log_softmax(0)[0]
        p = (weight @ h).softmax(0)
        u = weight * h
        approx = q / (1 - q) / 2 * ((p[:, None] * u**2).sum() - ((p[:, None] * u).sum(0) ** 2).sum())
        left, true = left + abs(drop - approx), true + drop
    return float(left / true)


by_width = {width: remainder(width, q) for width in (2, 4, 8, 12)}
print("remainder by width:", ", ".join(f"{width}: {100 * left:.0f} %" for width, left in by_width.items()))
assert by_width[12] < 0.6 * by_width[2]

# %% [markdown]
# ## How the penalty is estimated
#
# With `u = J (eta * h)`, `R_approx = 1/2 E[u^T H_out u]`, and under cross entropy `u^T H_out u` is the variance of
# `u_y` over `y ~ softmax(z)`. Signs `±sqrt(c)` have the right mean and variance, and few enough to average over all.

# %%
signs = math.sqrt(c) * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)))
u = (signs * h) @ J.T
variance = (p * u**2).sum(1) - (p * u).sum(1) ** 2
torch.testing.assert_close(variance.mean() / 2, r_approx)

# %% [markdown]
# `u` needs no Jacobian: two passes with site factors `1 ± eps r` give it by a central difference, and one ordinary
# backward differentiates the result. That is the antithetic estimator, the default.

# %%
step = 1e-3
pairs = [(head(h * (1 + step * r)) - head(h * (1 - step * r)))[0] / (2 * step) for r in signs]
torch.testing.assert_close(torch.stack(pairs), u, rtol=1e-4, atol=1e-7)

draws = torch.stack([explicit_penalty(closure, step_size=step).detach() for _ in range(50 if FAST else 500)])
standard_error = draws.std() / math.sqrt(len(draws))
print(f"antithetic: {draws.mean():.6f} ± {standard_error:.6f}")
assert (draws.mean() - r_approx).abs() < 5 * standard_error

# %% [markdown]
# ## The implicit effect
#
# Dropout also makes the gradient noisy: `xi_drop = grad loss(eta) - E grad loss`. Its covariance, over all masks:

# %%
gradients = torch.stack([gradient(loss) for loss in losses])
mean = probability @ gradients
torch.testing.assert_close(mean, gradient(clean + r_drop))  # the mean belongs to the explicit effect
xi_drop = gradients - mean
covariance = torch.einsum("m,mi,mj->ij", probability, xi_drop, xi_drop)

# %% [markdown]
# To first order in `eta` it is the gradient of `s = J_loss (eta * h)` (4.5), which has mean zero: pure noise.

# %%
(J_loss,) = torch.autograd.grad(clean, h, create_graph=True)
slopes = [(J_loss * r * h).sum() for r in signs]
xi_approx = torch.stack([gradient(s) for s in slopes])
torch.testing.assert_close(xi_approx.mean(0), torch.zeros(xi_approx.shape[1]), rtol=0, atol=1e-12)
covariance_approx = xi_approx.T @ xi_approx / len(xi_approx)


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


print(f"trace of the covariance: {covariance.trace():.5f} of dropout, {covariance_approx.trace():.5f} of xi_approx")
print(f"cosine between the two covariances: {cosine(covariance, covariance_approx):.4f}")
assert cosine(covariance, covariance_approx) > 0.9

# %% [markdown]
# The package draws one such scalar per batch; its gradient is one sample of `xi_approx`.

# %%
norms = torch.stack([gradient(implicit_noise(closure)).square().sum() for _ in range(50 if FAST else 500)])
standard_error = norms.std() / math.sqrt(len(norms))
assert (norms.mean() - covariance_approx.trace()).abs() < 5 * standard_error + 0.01 * covariance_approx.trace()

# %% [markdown]
# ## Taking the two apart
#
# `DROPOUT_k` averages over `k` masks: the mean of the gradient, and so the explicit effect, stays; the covariance falls
# as `1/k`. Adding `sqrt(1 - 1/k) xi` puts the rest of it back: `1/k + (1 - 1/k) = 1` (Algorithm 4).

# %%
k = 4
several = torch.stack([gradient(dropout_loss(closure, k=k)) for _ in range(100 if FAST else 1000)])
ratio = several.var(0).sum() / covariance.trace()
print(f"covariance of DROPOUT_{k}: {ratio:.3f} of that of dropout (1/k = {1 / k})")
assert abs(ratio * k - 1) < (0.6 if FAST else 0.2)

# %% [markdown]
# And Algorithm 2 leaves dropout out altogether: `loss + R_approx + s`, whose gradient has, to this order, the mean and
# the covariance of dropout's.

# %%
total = plain_loss(closure) + explicit_penalty(closure, estimator="exact") + implicit_noise(closure)
total.backward()
without, with_penalty = gradient(clean), gradient(clean + r_approx)
print(f"distance to dropout's mean gradient: {(without - mean).norm():.5f} without the penalty,", end=" ")
print(f"{(with_penalty - mean).norm():.5f} with it")
assert (with_penalty - mean).norm() < (without - mean).norm()
