"""One fit: what wraps `training_step` and keeps account of what happens around it."""

__all__: list[str] = []
