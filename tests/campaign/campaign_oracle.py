"""What is right, by brute force: `F.dropout` is patched, masks are enumerated, derivatives are autograd's."""

import contextlib
import itertools

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def factors_are(factors, elementwise=False, seen=None):
    """Let the dropouts of a step multiply by given factors, one tensor each; note masks in `seen`."""
    saved, left = (F.dropout, F.dropout1d, F.dropout2d), list(factors or ())

    def of(mask_shape):
        def dropout(input, p=0.5, training=True, inplace=False):
            if not training or p == 0:
                return input
            shape = tuple(input.shape) if elementwise else mask_shape(input)
            if seen is not None:
                seen.append((shape, p))
            return input * left.pop(0) if factors is not None else input

        return dropout

    F.dropout, F.dropout1d = of(lambda h: tuple(h.shape)), of(lambda h: (*h.shape[:2], 1))
    F.dropout2d = of(lambda h: (*h.shape[:2], 1, 1))
    try:
        yield
    finally:
        F.dropout, F.dropout1d, F.dropout2d = saved


class Oracle:
    """Values of one problem; `outputs()` runs the network, `value(z, h)` the loss.

    Attributes:
        sites: Mask shape and drop probability of every site.
    """

    def __init__(self, net, x, t, kind, elementwise=False):
        self.net, self.x, self.t, self.kind, self.elementwise = net, x, t, kind, elementwise
        self.sites = []
        with factors_are(None, elementwise, self.sites):
            net(x)
        self.params = list(net.parameters())

    @property
    def entries(self):
        return sum(torch.Size(shape).numel() for shape, _ in self.sites)

    def run(self, factors=None):
        """Outputs, features and loss."""
        with factors_are(factors or [torch.ones(shape) for shape, _ in self.sites], self.elementwise):
            z, h = self.net(self.x)
            z = self.kind.inner(z)
            return z, h, self.kind.value(z, self.t, h, self.net)

    def gradient(self, value, graph=False):
        found = torch.autograd.grad(value, self.params, allow_unused=True, create_graph=graph, retain_graph=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(self.params, found)])

    def plain(self):
        """Loss and gradient without dropout."""
        loss = self.run()[2]
        return loss.detach(), self.gradient(loss).detach()

    def over_masks(self):
        """Mean of loss and gradient and trace of the covariance of the gradient, all masks enumerated."""
        first = second = loss = 0.0
        for bits in itertools.product((0.0, 1.0), repeat=self.entries):
            left, factors, probability = torch.tensor(bits), [], 1.0
            for shape, p in self.sites:
                kept, left = left[: torch.Size(shape).numel()], left[torch.Size(shape).numel() :]
                factors.append(kept.view(shape) / (1 - p))
                probability *= float(torch.where(kept > 0, 1 - p, p).prod())
            value = self.run(factors)[2]
            g = self.gradient(value).detach()
            loss, first = loss + probability * value.detach(), first + probability * g
            second = second + probability * g.square().sum()
        return loss, first, second - first.square().sum()

    def _pushes(self, step):
        for site, (shape, p) in enumerate(self.sites):
            for entry in range(torch.Size(shape).numel()):
                ends = []
                for sign in (1, -1):
                    factors = [torch.ones(s) for s, _ in self.sites]
                    factors[site].view(-1)[entry] += sign * step
                    ends.append(factors)
                yield p / (1 - p), *ends

    def noise_trace(self, step=1e-5):
        """Trace of the covariance of xi_approx: differences of the gradient, entry by entry."""
        total = 0.0
        for c, plus, minus in self._pushes(step):
            ends = [self.gradient(self.run(factors)[2]).detach() for factors in (plus, minus)]
            total = total + c * ((ends[0] - ends[1]) / (2 * step)).square().sum()
        return total

    def penalty_value(self, step=1e-5):
        """`penalty` for loss_hessian by differences, features included: what moves beside the outputs counts."""
        z, h, _ = self.run()
        z, h = z.detach(), h.detach()

        def joint(v):
            # what is detached in the loss is a variable here; what is not is the outputs'
            parts = v[: z.numel()].view(z.shape), v[z.numel() :].view(h.shape)
            return self.kind.value(parts[0], self.t, parts[1], _Undetached(self.net))

        with undetached():
            hessian = torch.autograd.functional.hessian(joint, torch.cat([z.flatten(), h.flatten()]))
        total = 0.0
        for c, plus, minus in self._pushes(step):
            ends = [torch.cat([v.detach().flatten() for v in self.run(f)[:2]]) for f in (plus, minus)]
            u = (ends[0] - ends[1]) / (2 * step)
            total = total + c / 2 * u @ hessian @ u
        return total

    def penalty(self, curvature):
        """``1/2 sum_i c_i <J_i^T H J_i, 1>`` in relative changes, and its gradient."""
        ones = tuple(torch.ones(shape) for shape, _ in self.sites)
        z = self.run()[0]
        jacobians = torch.autograd.functional.jacobian(lambda *f: self.run(list(f))[0], ones, create_graph=True)
        if curvature == "loss_hessian":
            value = lambda z: self.kind.value(z, self.t, None, self.net)
            h = torch.autograd.functional.hessian(value, z, create_graph=True).reshape(z.numel(), z.numel())
        else:
            h = self._ablation(curvature, z)
        total = 0.0
        for jacobian, (_, p) in zip(jacobians, self.sites):
            j = jacobian.reshape(z.numel(), -1)
            total = total + p / (1 - p) / 2 * (j * (h @ j)).sum()
        return total.detach(), self.gradient(total).detach()

    def _ablation(self, curvature, z):
        examples = self.kind.examples(z, self.t)
        blocks, size = z.reshape(len(examples), -1), z.numel() // len(examples)
        parts = []
        for block, (weight, own) in zip(blocks, examples):
            if not weight:
                parts.append(torch.zeros(size, size))
            elif curvature == "identity":
                parts.append(weight * torch.eye(size) / size)
            else:
                g = torch.autograd.functional.jacobian(own, block, create_graph=True)
                parts.append(weight * torch.outer(g, g))
        return torch.block_diag(*parts)


class _Undetached:
    def __init__(self, net):
        self.teacher, self.outputs = net.teacher, net.outputs


@contextlib.contextmanager
def undetached():
    original = torch.Tensor.detach
    torch.Tensor.detach = lambda self: self
    try:
        yield
    finally:
        torch.Tensor.detach = original
