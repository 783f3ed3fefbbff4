"""Codes: one file each, found by its name (`affine4` = the class Affine of affine.py, with its first field 4)."""
