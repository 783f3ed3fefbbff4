"""MiKV: a laboratory for KV-cache compression. See README.md for the tour."""

__version__ = "0.1.0"
