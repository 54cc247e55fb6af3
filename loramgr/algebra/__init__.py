"""Tensors in, tensors out: the arithmetic of adapters, which knows nothing of files and formats."""
