"""Four ways to estimate the same penalty and the same noise, one file each, all with one signature.

| estimator                  | how                                       | works with                             |
|----------------------------|-------------------------------------------|----------------------------------------|
| `antithetic`               | two passes, ``1 + step r``, ``1 - step r``| everything that has a backward         |
| `forward`                  | one pass with dual numbers                | operations with a forward-mode formula |
| `double_backward`          | the paper's: back-propagate twice         | operations with a double backward      |
| `exact`                    | the full Jacobian                         | small problems; the oracle of the rest |

`antithetic_in_turn` is the first with one graph alive at a time, `one_pass` the first for some rows of the batch within
the pass over all of them. `r_drop` compares two draws of dropout itself.
"""

from lightning_dropreg.estimators.antithetic import antithetic
from lightning_dropreg.estimators.base import AUTO, Estimate, Estimator
from lightning_dropreg.estimators.double_backward import double_backward
from lightning_dropreg.estimators.exact import exact
from lightning_dropreg.estimators.forward import forward
from lightning_dropreg.estimators.in_turn import antithetic_in_turn
from lightning_dropreg.estimators.one_pass import one_pass
from lightning_dropreg.estimators.pairs import Pairs
from lightning_dropreg.estimators.r_drop import TwoDraws, two_draws

__all__ = [
    "AUTO",
    "ESTIMATORS",
    "Estimate",
    "Estimator",
    "Pairs",
    "TwoDraws",
    "antithetic",
    "antithetic_in_turn",
    "double_backward",
    "exact",
    "forward",
    "one_pass",
    "two_draws",
]

ESTIMATORS: dict[str, Estimator] = {
    "antithetic": antithetic,
    "forward": forward,
    "double_backward": double_backward,
    "exact": exact,
}
"""The estimators by name."""
