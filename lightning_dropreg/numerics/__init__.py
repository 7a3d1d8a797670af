"""Numbers: what is known of dtypes, random streams and dual numbers, and nothing of dropout."""

__all__: list[str] = []
