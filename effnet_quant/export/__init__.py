"""Leaving PyTorch: tracing, passes on the traced graph, and the writers of file formats."""
