"""What the tests of companions share: the methods, and a module that notes what companions act on."""

from fits import Classifier

import lightning_dropreg as dr

METHODS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
    "noise after backward": lambda: [dr.ImplicitNoise(injection="after_backward")],
    "true noise": lambda: [dr.ImplicitNoise(source="dropout")],
    "algorithm 4": lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
    "forward": lambda: [dr.ExplicitPenalty(estimator="forward")],
    "double backward": lambda: [dr.ExplicitPenalty(estimator="double_backward"), dr.ImplicitNoise()],
    "exact": lambda: [dr.ExplicitPenalty(estimator="exact")],
    "nothing": list,
}


class Watched(Classifier):
    """Notes the largest incoming norm, and the drop probability, wherever weights may be seen."""

    def __init__(self, p=0.4, lr=2.0):
        super().__init__(p=p, lr=lr)
        self.norms, self.ps = [], []

    def training_step(self, batch, batch_idx):
        self.ps.append(self.net[3].p)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.norms.append([layer.weight.norm(dim=1).max().item() for layer in (self.net[0], self.net[4])])
