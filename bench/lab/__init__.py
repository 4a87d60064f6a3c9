"""The project's own measurements; users need none of it."""
