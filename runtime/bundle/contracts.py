"""What the programs of a bundle take and give, for whoever runs their ONNX files without camrt."""

from __future__ import annotations

from typing import Any

from .kinds import KINDS
from .manifest import Manifest, Program

MEANINGS = {
    "image": "the network's input, preprocessed as the manifest's recipe says",
    "seed": "the cotangent of the logits: the gradient is that of the sum of seed times logits. A row of zeros stands "
    "for the image's top class (the first, in a tie). One row for each image; or, where the manifest says "
    "seeds_share_image, several rows for one image",
    "ratio": "|f'''(S) / f''(S)| of the smooth function f of the score, for each row of the seed: 0 for the identity, "
    "1 for exp; large, but finite, where f'' is 0",
    "logits": "the class scores of each image, before the final activation that the manifest names",
    "activation": "the layer's activation, channels first whatever its layout in the network is, without prefix tokens",
    "means": "the activation's mean over the grid: where the network reads nothing else of the layer",
    "gradient": "the gradient by the layer's activation, in the same layout, for each row of the seed",
    "alphas": "the mean over the grid of the gradient, per channel; layers side by side in the order of `taps`",
    "maps": "per layer a map of h times w numbers, not rectified; layers side by side in the order of `taps`. Of "
    "layer_maps: sum_k alpha_k A_k; of signed_maps: sum_k u_k y_k",
    "magnitudes": "sum_k,mn |u_k y_k| of each layer, in the order of `taps`",
    "masked": "what masks multiply (the image; or `normalized`, where the network has that program), masked",
    "normalized": "the tensor that the network's first layer reads, behind the network's own normalisation",
    "context": "what else the head reads of the trunk: give it back as it came, repeated to the number of activations",
    "grid": "the sum of FullGrad's maps of this size, for each row of the seed",
}
SIZES = {"batch": "the number of images", "seeds": "the number of rows of the seed"}


def meaning(tensor: str) -> str:
    """Of a program's input or output; of activation:LAYER that of activation."""
    return MEANINGS[tensor.partition(":")[0]]


def contract(program: Program) -> dict[str, Any]:
    """A program's file, purpose and layers, and of each tensor its shape, type and meaning, as JSON can hold it."""

    def tensors(shapes: dict[str, list[Any]], dtype: str = "float32") -> dict[str, Any]:
        return {n: {"shape": shape, "type": dtype, "meaning": meaning(n)} for n, shape in shapes.items()}

    return {
        "file": program.file,
        "kind": program.kind,
        "purpose": KINDS[program.kind].purpose,
        "precision": program.precision,
        "inputs": tensors(program.inputs, program.input_dtype),
        "outputs": tensors(program.outputs),
        "layers": list(program.taps),
    }


def contracts_as_text(manifest: Manifest) -> str:
    """Every program, then what the tensors mean. Tensors that a program has for each layer are one line."""
    lines = []
    for program in manifest.programs:
        lines.append(f"{program.file} ({program.kind}, {program.precision}): {KINDS[program.kind].purpose}")
        for word, shapes in (("in ", program.inputs), ("out", program.outputs)):
            lines += [f"  {word} {text}" for text in _lines(shapes)]
        if program.taps:
            more = f", ... ({len(program.taps)} layers)" if len(program.taps) > 3 else ""
            lines.append(f"  layers: {', '.join(program.taps[:3])}{more}")
        lines.append("")
    used = {n.partition(":")[0] for p in manifest.programs for n in (*p.inputs, *p.outputs)}
    lines += [f"{name}: {text}." for name, text in MEANINGS.items() if name in used]
    lines += [
        "",
        f"All tensors are float32{', but `masked` is float16' if 'masked' in used else ''}. "
        + "; ".join(f"{name}: {text}" for name, text in SIZES.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _lines(shapes: dict[str, list[Any]]) -> list[str]:
    """Name and shape of each tensor; tensors of several layers in one line."""
    layers = [n for n in shapes if n.startswith(("activation:", "gradient:"))]
    if len(layers) <= 2:
        return [f"{name} {_shape(shape)}" for name, shape in shapes.items()]
    kinds = list(dict.fromkeys(n.partition(":")[0] for n in layers))
    lines = [f"{name} {_shape(shape)}" for name, shape in shapes.items() if name not in layers]
    return lines + [f"{k}:LAYER [{shapes[_first(layers, k)][0]}, K, h, w] for each layer" for k in kinds]


def _first(names: list[str], kind: str) -> str:
    return next(n for n in names if n.startswith(f"{kind}:"))


def _shape(shape: list[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"
