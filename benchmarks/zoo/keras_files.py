"""Writes the networks of keras.applications with tf2onnx; the image is channels-last, as in TensorFlow.

python benchmarks/zoo/keras_files.py FOLDER        with random weights; needs tensorflow-cpu and tf2onnx, in a separate
environment
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")

import keras  # type: ignore[import-not-found]
import numpy as np
import tensorflow as tf  # type: ignore[import-not-found]
import tf2onnx  # type: ignore[import-not-found]

# class in keras.applications, size, opset, whether the batch is free
NETWORKS = [
    ("MobileNet", 64, 17, True),
    ("MobileNet", 64, 11, False),
    ("MobileNetV2", 64, 13, True),
    ("MobileNetV3Small", 64, 17, True),
    ("EfficientNetB0", 64, 17, True),
    ("EfficientNetV2B0", 64, 17, True),
    ("ResNet50", 64, 17, True),
    ("ResNet50V2", 64, 17, True),
    ("DenseNet121", 64, 13, True),
    ("InceptionV3", 96, 17, True),
    ("Xception", 96, 17, True),
    ("NASNetMobile", 64, 17, True),
    ("ConvNeXtTiny", 64, 17, True),
]


def build(name: str, size: int) -> Any:
    """A Keras network with fixed random weights and batch norm statistics of random images."""
    keras.utils.set_random_seed(1)
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    rng = np.random.default_rng(1)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    for _ in range(2):
        model(rng.normal(128, 60, (16, size, size, 3)).clip(0, 255).astype(np.float32), training=True)
    return model


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, opset, free in NETWORKS:
        spec = (tf.TensorSpec((None if free else 1, size, size, 3), tf.float32, name="image"),)
        path = folder / f"Keras-{name}@tf2onnx@{opset}@{'free' if free else '1'}.onnx"
        try:
            tf2onnx.convert.from_keras(build(name, size), input_signature=spec, opset=opset, output_path=str(path))
            print(path.name, flush=True)
        except Exception as error:  # tf2onnx's own limits
            print(f"{name}: tf2onnx refuses it ({type(error).__name__})", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
