"""Compares a bundle with PyTorch: the reference model in float64 and float32, methods in PyTorch, and comparisons."""
