"""Two gloo processes: replicas stay equal, ranks draw different noise, the noise is what one process would add."""

import pytest
import torch
from fits import Classifier, make_loader, make_trainer

import lightning_dropreg as dr


class Saving(Classifier):
    """Writes what each rank ends with, for the parent process to read."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_batch_start(self, batch, batch_idx):
        if not hasattr(self, "first"):
            self.first = batch

    def on_fit_end(self):
        state = {
            "batch": self.first,
            "weights": self.net.state_dict(),
            "gradients": self.gradients,
            "losses": self.losses,
        }
        torch.save(state, f"{self.folder}/rank{self.global_rank}.pt")


def test_replicas_stay_equal_under_ddp_spawn(tmp_path):
    """Everything else about replicas is in test_ranks.py, in one process group."""
    import lightning as L

    L.seed_everything(1, verbose=False)
    callbacks = [dr.ExplicitPenalty(), dr.ImplicitNoise(injection="after_backward")]
    trainer = make_trainer(callbacks, devices=2, strategy="ddp_spawn", max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Saving(str(tmp_path)), make_loader(24, 4))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["gradients"], ranks[1]["gradients"]))
    assert not torch.equal(ranks[0]["losses"][0], ranks[1]["losses"][0])


@pytest.mark.parametrize("injection", ["loss", "after_backward"])
def test_the_gradient_is_the_mean_over_ranks(tmp_path, injection):
    """Redo the first step of both ranks in this process, from their keys."""
    import lightning as L
    import torch.nn.functional as F

    from lightning_dropreg.estimators import antithetic
    from lightning_dropreg.numerics.noise import fold_key

    L.seed_everything(1, verbose=False)
    model = Saving(str(tmp_path))
    net = Classifier().net
    net.load_state_dict(model.net.state_dict())
    callbacks = [dr.ExplicitPenalty(), dr.ImplicitNoise(injection=injection)]
    make_trainer(callbacks, devices=2, strategy="ddp_fork", max_steps=1).fit(model, make_loader(24, 4))
    seen = torch.load(tmp_path / "rank0.pt")["gradients"][0]
    expected = 0.0
    for rank in range(2):
        x, y = torch.load(tmp_path / f"rank{rank}.pt")["batch"]
        e = antithetic(
            lambda x=x, y=y: F.cross_entropy(net(x), y),
            curvature="loss_hessian",
            noise=True,
            step_size=0.1,
            mask="as_model",
            key=fold_key(1, rank, 0, 0),
        )
        gradients = torch.autograd.grad(e.loss + e.penalty + e.noise, list(net.parameters()))
        expected = expected + torch.cat([g.reshape(-1) for g in gradients]) / 2
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)
