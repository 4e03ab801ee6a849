"""A bundle held against PyTorch: the reference, in float64 and float32, its methods, and the comparisons."""
