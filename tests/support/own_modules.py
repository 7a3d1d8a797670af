"""Modules that do more by themselves: manual optimization, and predictions with traces."""

import lightning as L
import torch
import torch.nn.functional as F
from fits import Classifier
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError


def network(inputs, outputs):
    layers = nn.Linear(inputs, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, outputs)
    return nn.Sequential(*layers).double()


def bce(z, target):
    return F.binary_cross_entropy_with_logits(z, torch.full_like(z, target))


class GAN(L.LightningModule):
    """Two losses, the second made of what the first network was before its step (fake) and after it (again)."""

    def __init__(self, toggles=True):
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = network(4, 3), network(3, 1)
        self.toggles = toggles
        self.events = []

    def configure_optimizers(self):
        make = lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5)
        optimizers = [make(self.g), make(self.d)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.5)]

    def training_step(self, batch, batch_idx):
        x, _ = batch
        opt_g, opt_d = self.optimizers()
        if self.toggles:
            self.toggle_optimizer(opt_g)
        fake = self.g(x)
        loss = bce(self.d(fake), 1.0)
        self.log("g", loss, on_epoch=True, reduce_fx="sum")
        opt_g.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt_g, 0.1, "norm")
        nn.utils.clip_grad_norm_(self.g.parameters(), 0.1)  # not Lightning's: replays do it too, to copies
        gradient = self.g[0].weight.grad.clone() if batch_idx else None
        opt_g.step()
        self.lr_schedulers().step()
        if self.toggles:
            self.untoggle_optimizer(opt_g)
            self.toggle_optimizer(opt_d)
        again = self.g(x)
        loss = bce(self.d(fake.detach()), 0.0) + 0.5 * bce(self.d(again.detach()), 0.0) + bce(self.d(x[:, 1:]), 1.0)
        opt_d.zero_grad()
        self.manual_backward(loss)
        opt_d.step()
        if self.toggles:
            self.untoggle_optimizer(opt_d)
        assert gradient is None or torch.equal(self.g[0].weight.grad, gradient)
        assert all(p.requires_grad for p in self.parameters())


class Manual(Classifier):
    """The classifier of the other tests, optimizing by itself in one of several ways."""

    def __init__(self, p=0.4, way="plain", norm=False):
        super().__init__(p, norm=norm)
        self.automatic_optimization, self.way = False, way

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.way != "raw")
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.way == "closure":
            optimizer.step(lambda: [optimizer.zero_grad(), self.manual_backward(loss)] and loss)
            return {"loss": loss}
        optimizer.zero_grad()
        if self.way == "direct":
            loss.backward()
        else:
            self.manual_backward(loss)
        if self.way == "raises" and batch_idx == 1:
            raise RuntimeError("the user's own")
        if self.way == "clips":
            self.net[0].weight.data.clamp_(-0.1, 0.1)
        optimizer.step()
        return {"loss": loss}


class Predicting(Classifier):
    """A user's module, with batch norm, metrics and a count of its own."""

    def __init__(self, output=lambda z: z):
        super().__init__(norm=True)
        self.calibration = MulticlassCalibrationError(3)
        self.seen, self.output = 0, output

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen += 1
        self.calibration.update(self.net(batch[0]), batch[1])
        torch.rand(())
        return self.output(self.net(batch[0]))
