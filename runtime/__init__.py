"""Bundle -> maps. Never imports torch or onnx."""
