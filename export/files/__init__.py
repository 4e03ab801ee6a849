"""ONNX files as users bring them: read, brought to one form, their sizes found, their batch freed."""
