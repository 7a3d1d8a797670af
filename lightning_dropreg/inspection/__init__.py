"""Looking at a step before anything is trained with it: what it drops, what it assumes, which estimator suits it."""

__all__: list[str] = []
