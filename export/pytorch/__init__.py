"""PyTorch models as users bring them: found, traced, and held against PyTorch's own gradients."""
