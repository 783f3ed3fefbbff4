"""The kernels themselves, in Triton: importing a module of this package imports triton."""
