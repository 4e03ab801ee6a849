"""Trained model -> bundle: ONNX programs that expose activations and gradients. Needs onnx; torch for PyTorch
sources.
"""
