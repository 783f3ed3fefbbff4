"""GPU kernels, each beside a torch reference of the same signature; `mikv.kernels.pick` chooses between the two.

Nothing outside this package imports triton, and nothing inside it does before a kernel is wanted: a machine without a GPU
needs no triton at all.
"""
