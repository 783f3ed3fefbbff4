"""Accuracy and divergence against bytes, over several tasks: one run of panel=paper each, one figure.

python -m experiments.pareto model=smollm2-recall
"""
