"""TensorRT and TensorRT for RTX: programs become engines, which run on a GPU. One package: their Python APIs agree."""
