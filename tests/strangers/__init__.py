"""Policies that the project does not have: each is one file and one YAML, and needs nothing else to be changed."""
