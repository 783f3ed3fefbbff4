"""Caches: the exact state of a prefill, and compressed caches made of it."""
