"""Transforms: one file each, found by its name (`balance` = the class Balance of balance.py)."""
