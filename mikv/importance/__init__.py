"""Importance scores: who deserves the better tier."""
