"""TensorRT and TensorRT for RTX: they build engines of programs and run them on a GPU. Their Python APIs are alike."""
