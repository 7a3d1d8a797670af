"""What dropout says about the certainty of a prediction.

* `draw_predictions`: predictions with dropout on, several passes at once where the model allows it;
* `moments`: mean, variance, predictive entropy and mutual information of such draws;
* `first_order_variance`: what the variance of the outputs is to first order, without drawing a mask.

`lightning_dropreg.MonteCarloDropout` is all of it for ``trainer.predict``.
"""

from lightning_dropreg.uncertainty.first_order import first_order_variance
from lightning_dropreg.uncertainty.moments import LIKELIHOODS, Moments, moments
from lightning_dropreg.uncertainty.monte_carlo import draw_predictions

__all__ = ["LIKELIHOODS", "Moments", "draw_predictions", "first_order_variance", "moments"]
