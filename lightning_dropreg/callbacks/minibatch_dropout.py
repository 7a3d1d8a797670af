"""Dropout averaged over several draws per example."""

from __future__ import annotations

from lightning_dropreg.checks import SITES, check_choice, check_draws
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.session.base import RegularizerCallback

__all__ = ["MiniBatchDropout"]


class MiniBatchDropout(RegularizerCallback):
    """Trains with the loss averaged over `k` draws of dropout: ``DROPOUT_k``, Algorithm 1.

    The step runs k times with fresh dropout masks and everything else the same. The explicit effect of dropout stays,
    the covariance of its gradient noise falls as 1/k; `ImplicitNoise` beside it puts that back. With `antithetic` two
    draws take away far more of it: the explicit effect nearly alone, for two forward and backward passes.

    Args:
        k: Number of draws, at least 1; 1 leaves the run as it is.
        low_memory: Differentiate every draw before the next one is made, so that memory does not grow with `k`. The
            gradient reaches the parameters in the one backward of the Trainer as always, but cannot be differentiated
            again (an optimizer that needs ``create_graph=True``): False is for those.
        antithetic: Let every second draw have the masks opposite to those of the one before, so that of the noise what
            is linear in the masks (usually most) cancels: all of it with drop probability 1/2, where opposite masks are
            complements; otherwise as much is left as with ``k / (1 - min(q, 1-q) / max(q, 1-q))`` independent draws
            (6 for ``q = 0.4``, ``k = 2``). What is even in the masks is the same in both draws of a pair, so that it is
            left as with ``k / 2`` draws. Every single draw is dropout as always.
        attention: What becomes of dropout on attention probabilities: ``"site"``, with attention written out, or
            ``"ignore"``: it is left out, for ``k=1`` too, and fused kernels stay. The same for all callbacks of a
            Trainer; see `lightning_dropreg.attention_dropout`.
        sites: ``"all"``, or ``"last"``: the draws differ at the last dropout site only, the earlier sites share one
            mask of each example: multi-sample dropout (Inoue, 2019), the average of k heads' losses. What comes before
            that site then runs once, forward and backward, and the rest k times. The gradient is that of k whole passes
            with the earlier masks repeated, and that is what is done where the body cannot be shared, which is tried
            with the first batch: under checkpointing, manual optimization or FSDP, and where the step writes into the
            body's tensors in place behind it (``nn.Dropout(inplace=True)`` does). Everything that the body computes
            stays in memory until the last draw, and `low_memory` has no effect. `ImplicitNoise(source="dropout")`
            beside it restores the covariance of one draw; other noise would restore what was never taken.
        accept_checkpoint_settings: Whether a run may resume from a checkpoint that was written with other settings, or
            without this callback; refused otherwise.

    Raises:
        InvalidArgumentError: If ``k < 1``, `k` is odd with `antithetic`, a flag is no bool or `attention` is unknown.

    Example:
        >>> MiniBatchDropout(k=8).k
        8
    """

    def __init__(
        self,
        k: int = 4,
        low_memory: bool = True,
        attention: str = "site",
        antithetic: bool = False,
        sites: str = "all",
        *,
        accept_checkpoint_settings: bool = False,
    ) -> None:
        super().__init__(attention, accept_checkpoint_settings)
        check_draws(k, antithetic)
        check_choice("sites", sites, SITES)
        if not isinstance(low_memory, bool):
            raise InvalidArgumentError(f"low_memory={low_memory!r} must be True or False.")
        self.k = k
        self.antithetic = antithetic
        self.sites = sites
        self.low_memory = low_memory
