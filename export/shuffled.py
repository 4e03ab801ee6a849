"""A network with its own weights in random order, to see whether its maps depend on what was learned.

Adebayo et al., Sanity Checks for Saliency Maps, arXiv 1810.03292, draw random weights; shuffled ones keep each tensor's
distribution, so that activations stay in range.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn


def shuffled_module(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model in which the elements of every parameter with two axes or more are in random order."""
    import torch

    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                order = torch.randperm(parameter.numel(), generator=generator)
                parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))
    return model


def shuffled_file(source: Path, folder: Path, seed: int) -> Path:
    """Writes a copy of an ONNX file into `folder`, its weights shuffled in the same way, and returns its path."""
    import onnx

    model, rng = onnx.load(str(source)), np.random.default_rng(seed)
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8)
    for tensor in model.graph.initializer:
        if len(tensor.dims) >= 2 and tensor.data_type in kinds:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(rng.permutation(array.ravel()).reshape(array.shape), tensor.name)
            )
    path = folder / source.name
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{source.name}.data")
    return path
