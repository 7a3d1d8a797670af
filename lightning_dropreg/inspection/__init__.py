"""Looking at a step before it is trained."""

__all__: list[str] = []
