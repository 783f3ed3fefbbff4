"""Models: where weights come from, and what of an architecture the cache must know."""
