"""Importance scores: which tokens get the better tier."""
