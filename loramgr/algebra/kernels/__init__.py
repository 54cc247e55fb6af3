"""The fast numerics as Triton kernels: one pass over a weight merges, unmerges or switches it."""
