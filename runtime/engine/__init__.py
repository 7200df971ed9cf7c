"""The engine decides what runs next, and owns the cache and every request on its way."""
