"""Attention over exact keys (prefill) and over a compressed cache (decoding), and its registration in transformers."""
