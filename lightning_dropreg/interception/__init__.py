"""Finding dropout sites and losses in code that knows nothing of this package."""

__all__: list[str] = []
