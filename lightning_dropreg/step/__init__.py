"""Which runs of the user's step (passes) a batch needs, and how what they gave is put together."""

__all__: list[str] = []
