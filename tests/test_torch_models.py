"""PyTorch models as users bring them: what stops gradients, what wraps them, what they return, and what cannot be
traced.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

import camrt
from camrt.export.probes import smooth_images
from camrt.export.pytorch.autograd import record
from camrt.export.pytorch.modules import prepare_module
from camrt.runtime.errors import ExportError
from camrt.verification.methods import combined
from camrt.verification.oracle import module_oracle
from camrt.verification.verify import verify, verify_bundle

SHAPE = (3, 16, 20)
IMAGES = smooth_images(SHAPE, 3)


class Net(nn.Module):
    """Two convolutions; `middle` says what happens between and behind them."""

    def __init__(self, middle: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
        self.middle = middle

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.second(x).relu() if self.middle is None else self.middle(self, x)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.features(x).mean((2, 3)))


def exported(model: Any, path: Path, **arguments: Any) -> tuple[camrt.Explainer, str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        camrt.export_model(model, path, SHAPE, **arguments)
    return camrt.load(path), "\n".join(str(w.message) for w in seen if w.category is UserWarning)


def assert_verified(explainer: camrt.Explainer, model: Any, output: str | None = None) -> None:
    report = verify_bundle(explainer.bundle, module_oracle(prepare_module(model, output), "the model"))
    assert report.passed, [r for r in report.rows if not r.passed][:4]


# ---- pooling


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, 4, ceil_mode=True),
        nn.MaxPool2d(3, 3, 1, ceil_mode=True),
        nn.AvgPool2d(2, 4, ceil_mode=True),
        nn.AvgPool2d(3, 3, 1, ceil_mode=True),
        nn.AvgPool2d(3, 3, 1, ceil_mode=True, count_include_pad=False),
        nn.MaxPool2d((2, 3), (4, 2), ceil_mode=True),
        nn.AvgPool2d((2, 3), (4, 2), ceil_mode=True),
        nn.AvgPool2d(1, (7, 3), ceil_mode=True),
    ],
    ids=str,
)
def test_ceil_mode_without_the_window_that_starts_in_the_padding(pool: nn.Module, tmp_path: Path) -> None:
    net = Net(lambda net, h: torch.tanh(net.second(pool(h))))
    explainer, _ = exported(net, tmp_path / "a.camrt", layers=["first"])
    assert_verified(explainer, net)


# ---- stop-gradient


def straight_through(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.second(h + (torch.tanh(3 * h) - h).detach()).relu()


def detached_gate(net: Net, h: torch.Tensor) -> torch.Tensor:
    return h * torch.sigmoid(net.second(h)).detach()


def gate_without_gradient(net: Net, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        a, b = net.second(h).chunk(2, 1)
    return h * torch.sigmoid(torch.cat([a, b], 1))


def data_of(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.second(h * h.data).relu()


def detached_in_place(net: Net, h: torch.Tensor) -> torch.Tensor:
    h = h * 1
    h.detach_()
    return net.second(h).relu()


STOPS = [straight_through, detached_gate, gate_without_gradient, data_of, detached_in_place]


@pytest.mark.parametrize("middle", STOPS)
def test_gradients_stop_where_pytorch_stops_them(middle: Callable, tmp_path: Path) -> None:
    model = Net(middle).eval()
    explainer, said = exported(model, tmp_path / "net.camrt")
    assert "the model stops gradients (detach, no_grad or .data) in" in said
    assert_verified(explainer, model)
    without = {"detached_gate": "second", "gate_without_gradient": "second", "detached_in_place": "first"}.get(
        middle.__name__
    )
    assert (without is None) == ("no gradient reaches them" not in said)
    assert without not in explainer.layers
    if without is not None:
        with pytest.raises(camrt.CamrtError, match=f"no gradient reaches layer '{without}'"):
            camrt.export_model(model, tmp_path / "named.camrt", SHAPE, [without])


def written_through(net: Net, h: torch.Tensor) -> torch.Tensor:
    h.detach().mul_(2)
    return net.second(h).relu()


def assigned_data(net: Net, h: torch.Tensor) -> torch.Tensor:
    h = h * 1
    h.data = torch.tanh(h)
    return net.second(h).relu()


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, *g: torch.Tensor) -> torch.Tensor:
        return g[0]


def own_backward(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.second(Rounding.apply(h) + 0.5 * h).relu()  # type: ignore[operator]


def hooked(net: Net, h: torch.Tensor) -> torch.Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: 3 * g)
    return net.second(h).relu()


def hooked_in_float32(net: Net, h: torch.Tensor) -> torch.Tensor:
    """A model that does not run in float64: a convolution's weights are float64 there, its input is not."""
    if h.requires_grad:
        h.register_hook(lambda g: 3 * g)
    return net.second(h.float()).relu()


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (hooked_in_float32, "the gradients of first are not PyTorch's: .*hooks on gradients"),
        (written_through, r"writes in place \(aten\.mul_\.Tensor\) to a tensor that it detached"),
        (assigned_data, r"assigns to \.data of a tensor"),
        (hooked, "the gradients of first are not PyTorch's: .*hooks on gradients"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(middle: Callable, message: str, tmp_path: Path) -> None:
    with pytest.raises(camrt.CamrtError, match=message):
        camrt.export_model(Net(middle).eval(), tmp_path / "net.camrt", SHAPE)
    assert not (tmp_path / "net.camrt").exists()


def test_a_backward_pass_of_its_own_is_warned_of_by_name(tmp_path: Path) -> None:
    model = Net(own_backward).eval()
    explainer, said = exported(model, tmp_path / "net.camrt")
    assert "Rounding has a backward pass of its own" in said
    assert "the gradients of first are not PyTorch's, because of Rounding" in said
    report = verify_bundle(explainer.bundle, module_oracle(model, "the model"))
    assert report.own_backward == ("Rounding",) and not report.passed


def checkpointed(net: Net, h: torch.Tensor) -> torch.Tensor:
    result = checkpoint.checkpoint(lambda t: net.second(t).relu(), h, use_reentrant=True)
    assert isinstance(result, torch.Tensor)
    return result


def scaled_dot_products(net: Net, h: torch.Tensor) -> torch.Tensor:
    """Attention with a computed mask, on tensors without an axis of heads."""
    tokens = h.flatten(2).transpose(1, 2)
    mask = net.second.weight.mean() * torch.ones(tokens.shape[1], tokens.shape[1])
    return F.scaled_dot_product_attention(tokens, tokens, tokens, mask).transpose(1, 2).reshape(h.shape)


def by_length(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.second(h.reshape(len(h), 8, 16, 20)).relu()


def in_bfloat16(net: Net, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.second(h).relu().to(h.dtype)


def windowed(net: Net, h: torch.Tensor, mask: torch.Tensor | None, scale: float | None = None) -> torch.Tensor:
    """Attention within windows of four rows: five axes."""
    tokens = h.reshape(-1, 8, 4, 4, 20).permute(0, 2, 3, 4, 1).reshape(-1, 4, 1, 80, 8)
    mixed = F.scaled_dot_product_attention(tokens, 2 * tokens, tokens, mask, scale=scale)
    return mixed.reshape(-1, 4, 4, 20, 8).permute(0, 4, 1, 2, 3).reshape(h.shape)


def windowed_by_bool(net: Net, h: torch.Tensor) -> torch.Tensor:
    return windowed(net, h, torch.arange(80) % 3 != net.first.weight.argmax() % 3)


def windowed_by_float(net: Net, h: torch.Tensor) -> torch.Tensor:
    return windowed(net, h, torch.linspace(-1, 1, 6400).reshape(80, 80) * net.first.weight.mean(), 0.5)


def normalised_by_constants(net: Net, h: torch.Tensor) -> torch.Tensor:
    """As torchvision's Normalize and nn.TransformerEncoder, which look at numbers that the image does not change."""
    std = torch.tensor([0.5] * 8)
    if (std == 0).any():
        raise ValueError("std is zero")
    for weight in net.fc.bias.tolist():
        h = h + weight * h.tanh()
    return h / std[:, None, None] * (std + net.fc.weight[0]).sum().item()


@pytest.mark.parametrize(
    "middle",
    [
        *[checkpointed, scaled_dot_products, by_length, in_bfloat16],
        *[windowed_by_bool, windowed_by_float, normalised_by_constants],
    ],
)
def test_corners_of_pytorch_go_in(middle: Callable, tmp_path: Path) -> None:
    model = Net(middle).eval()
    explainer, _ = exported(model, tmp_path / "net.camrt")
    assert explainer.manifest.batch == "dynamic"
    assert_verified(explainer, model)


def by_total(net: Net, h: torch.Tensor) -> torch.Tensor:
    return 2 * h if h.sum() > 0 else h


def by_written_total(net: Net, h: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(1)
    total.view(-1).add_(h.sum())
    return 2 * h if total > 0 else h


def by_chance(net: Net, h: torch.Tensor) -> torch.Tensor:
    return 2 * h if torch.rand(1) > 0.5 else h


@pytest.mark.parametrize("middle", [by_total, by_written_total, by_chance])
def test_a_way_that_the_image_or_chance_decides_is_refused(middle: Callable, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="an if, a loop or a size depends on computed numbers"):
        exported(Net(middle).eval(), tmp_path / "net.camrt")


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda net, h: F.dropout(h, 0.5), "draws random numbers"),
        (lambda net, h: h * torch.bernoulli(torch.full((8, 1, 1), 0.5)), "draws random numbers"),
        (lambda net, h: _over_itself(net, h.clone()), "in place overwrites what the gradient needs"),
    ],
    ids=["dropout", "bernoulli", "in place"],
)
def test_what_pytorch_itself_cannot_repeat_or_differentiate_is_refused(
    middle: Callable, message: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(), pytest.raises(ExportError, match=message):
        warnings.simplefilter("ignore")
        camrt.export_model(Net(middle).eval(), tmp_path / "net.camrt", SHAPE)


def _over_itself(net: Net, h: torch.Tensor) -> torch.Tensor:
    h[:, :3] = h[:, :3].sin() * F.conv2d(h[:, :3], net.first.weight[:3], padding=1)
    return net.second(h).relu()


class _Twice(Net):
    """Calls its trunk twice on the same image, as heads with a trunk of their own do."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.features(x), self.features(x)
        return self.fc(a.mean((2, 3))) + self.other(b.amax((2, 3)))


def test_calls_on_the_same_tensor_stay_apart(tmp_path: Path) -> None:
    model = _Twice().eval()
    explainer, _ = exported(model, tmp_path / "net.camrt", layers=["first", "second", "first_1", "second_1"])
    assert_verified(explainer, model)


class _Scores(Net):
    """A network that returns probabilities."""

    def __init__(
        self, middle: Callable[..., torch.Tensor] | None, scores: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(middle)
        self.scores = scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(super().forward(x))


@pytest.mark.parametrize("scores", [torch.sigmoid, lambda z: z.softmax(1), lambda z: z.log_softmax(1)])
def test_gradients_are_compared_through_a_final_activation(
    scores: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    exported(_Scores(None, scores).eval(), tmp_path / "net.camrt")
    with pytest.raises(ExportError, match="the gradients of first are not PyTorch's"):
        exported(_Scores(hooked, scores).eval(), tmp_path / "hooked.camrt")


def dead_channels(net: Net, h: torch.Tensor) -> torch.Tensor:
    """Behind the rectifier two channels are 0 everywhere: all of their elements are the largest."""
    return net.second(h).sub(torch.tensor([99.0, 99, 0, 0, 0, 0, 0, 0])[:, None, None]).relu()


POOLINGS = {
    "adaptive": lambda h: F.adaptive_max_pool2d(h, 1).flatten(1),
    "max": lambda h: h.flatten(2).max(-1)[0],
    "max of max": lambda h: h.max(-1, keepdim=True).values.max(2)[0][:, :, 0],
    "min": lambda h: -(-h).flatten(2).min(-1)[0],
    "amax": lambda h: h.amax((2, 3)),
    "deviation": lambda h: h.std((2, 3)) + h.flatten(2).std(2, correction=0),
    "vmap": lambda h: torch.vmap(lambda part: part.mean((1, 2)))(h),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_equal_elements_have_pytorchs_gradient(pooling: str, tmp_path: Path) -> None:
    model = Net(dead_channels).eval()
    model.forward = lambda x: model.fc(POOLINGS[pooling](model.features(x)))  # type: ignore[method-assign]
    explainer, _ = exported(model, tmp_path / "net.camrt")
    assert_verified(explainer, model)


def test_a_layer_that_gradients_do_not_reach_is_no_last_layer(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="no gradient reaches the last tensor on a grid, which the logits read only through"
    ):
        camrt.export_model(Net(lambda net, h: net.second(h).relu().detach()).eval(), tmp_path / "net.camrt", SHAPE)


def strips(net: Net, h: torch.Tensor) -> torch.Tensor:
    """As in re-identification: what each stripe of a person shows."""
    return F.adaptive_avg_pool2d(net.second(h).relu(), (4, 1)) * torch.tensor([1.0, 2, 3, 4])[:, None]


def involution(net: Net, h: torch.Tensor) -> torch.Tensor:
    windows = F.unfold(h, 3, padding=1).reshape(-1, 8, 9, 16, 20)
    return (net.second(h)[:, :, None] * windows).sum(2)


def key_and_value(net: Net, h: torch.Tensor) -> torch.Tensor:
    tokens = h.flatten(2).transpose(1, 2)
    keys, values = (tokens @ torch.cat([net.fc.weight.T, net.fc.weight.T], 1)).chunk(2, -1)
    mixed = (net.fc.bias[None, None] @ keys.transpose(1, 2)).softmax(-1) @ values
    return (mixed @ net.fc.weight)[:, 0, :, None, None]


@pytest.mark.parametrize(
    ("middle", "last"), [(strips, "relu_1"), (involution, None), (key_and_value, "relu")], ids=lambda v: str(v)[:20]
)
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_the_last_layer_before_unusual_ends(middle: Callable, last: str | None, source: str, tmp_path: Path) -> None:
    model = Net(middle).eval()
    if source == "torch":
        explainer, said = exported(model, tmp_path / "net.camrt")
        assert explainer.manifest.last_layer == last
    else:
        file = str(tmp_path / "net.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (torch.zeros(1, *SHAPE),), file, dynamo=False)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            explainer = camrt.load(camrt.export_onnx(file, tmp_path / "net.camrt"))
        said = "\n".join(str(w.message) for w in seen)
        assert (explainer.manifest.last_layer is None) == (last is None)
        assert last is None or "Relu" in str(explainer.manifest.last_layer)
    assert ("so the bundle has no last layer" in said) == (last is None) and "through the deeper" not in said


def other_for_one(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.second(2 * h if h.shape[0] == 1 else h).relu()


def sum_of_batch(net: Net, h: torch.Tensor) -> torch.Tensor:
    return net.second(h - h.mean(0)).relu()


@pytest.mark.parametrize("middle", [other_for_one, sum_of_batch])
def test_a_batch_that_changes_its_images_is_explained_one_by_one(middle: Callable, tmp_path: Path) -> None:
    model = Net(middle).eval()
    explainer, said = exported(model, tmp_path / "net.camrt")
    assert explainer.manifest.batch == 1 and "one image at a time (batch 1)" in said
    alone = np.concatenate([model(torch.from_numpy(x[None])).detach().numpy() for x in IMAGES])
    np.testing.assert_allclose(explainer.classify(IMAGES), alone, rtol=1e-4, atol=1e-5)


# ---- wrappers, precisions, returns


def test_wrapped_and_other_precisions_are_read(tmp_path: Path) -> None:
    plain, _ = exported(Net().eval(), tmp_path / "plain.camrt")
    want = plain.explain(IMAGES, "grad_cam", 1).maps
    kinds = {
        "parallel": (nn.DataParallel(Net().eval()), 1e-6),
        "compiled": (torch.compile(Net().eval()), 1e-6),
        "double": (Net().eval().double(), 1e-5),
        "half": (Net().eval().half(), 0.02),
        "bfloat16": (Net().eval().bfloat16(), 0.2),
    }
    for name, (model, tolerance) in kinds.items():
        explainer, said = exported(model, tmp_path / f"{name}.camrt")
        np.testing.assert_allclose(explainer.explain(IMAGES, "grad_cam", 1).maps, want, atol=tolerance, err_msg=name)
        assert ("it is read as float32" in said) == (name in ("double", "half", "bfloat16"))
        assert explainer.layers == plain.layers


def test_frozen_models_and_no_grad_around_export(tmp_path: Path) -> None:
    frozen = Net(own_backward).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    assert "Rounding has a backward pass" in exported(frozen, tmp_path / "frozen.camrt")[1]
    with torch.no_grad():
        explainer, _ = exported(Net().eval(), tmp_path / "net.camrt")
    assert_verified(explainer, Net().eval())


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    embedding: torch.Tensor


class Returning(Net):
    def __init__(self, form: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        embedding = self.features(x).mean((2, 3))
        return self.form(self.fc(embedding), embedding)


@pytest.mark.parametrize(
    ("form", "output", "listed"),
    [
        (lambda a, b: {"logits": a, "embedding": b}, "logits", r"dict of logits \(2, 5\), embedding \(2, 8\)"),
        (lambda a, b: (b, a), "1", r"tuple of 0 \(2, 8\), 1 \(2, 5\)"),
        (Output, "logits", r"Output of logits \(2, 5\), embedding \(2, 8\)"),
    ],
    ids=["dict", "tuple", "dataclass"],
)
def test_one_of_several_outputs_is_named(form: Any, output: str, listed: str, tmp_path: Path) -> None:
    model = Returning(form).eval()
    with pytest.raises(camrt.CamrtError, match=f"returns a {listed}: name the one that holds the logits with output="):
        camrt.export_model(model, tmp_path / "net.camrt", SHAPE)
    explainer, _ = exported(model, tmp_path / "net.camrt", output=output)
    assert explainer.layers[:2] == ("first", "second")  # as in the model, whatever wraps it
    assert_verified(explainer, model, output)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: torch.jit.script(Net(None).fc),
            "is, or holds, TorchScript, which torch.export does not trace: pass the nn.Module",
        ),
        (
            lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(5)),
            "has lazy layers without weights yet",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
            "layer '1' normalises each image by",
        ),
        (lambda: "a name", r"takes a torch\.nn\.Module, not str"),
    ],
    ids=["script", "lazy", "batch statistics", "text"],
)
def test_models_that_cannot_be_taken_say_what_to_do(model: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(camrt.CamrtError, match=message) as caught:
        camrt.export_model(model(), tmp_path / "net.camrt", SHAPE)
    assert "\n" not in str(caught.value)


class WithState(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_a_state_that_is_no_tensor_is_part_of_the_digest(tmp_path: Path) -> None:
    first = exported(WithState().eval(), tmp_path / "a.camrt")[0].manifest.source["weights_sha256"]
    WithState.get_extra_state = lambda self: {"version": 4}  # type: ignore[method-assign]
    assert exported(WithState().eval(), tmp_path / "b.camrt")[0].manifest.source["weights_sha256"] != first


# ---- layers and roles


class Reused(nn.Module):
    """One activation module in three places, and a function; its last convolution is a subclass with a module
    inside.
    """

    class Padded(nn.Conv2d):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.padding_module = nn.Identity()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(self.padding_module(input))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.c, self.norm = self.Padded(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.relu, self.fc = nn.ReLU(), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.a(x))
        x = self.relu(self.b(x)) + x
        return self.fc(F.silu(self.norm(self.c(x))).mean((2, 3)))


def test_any_call_of_a_module_or_function_can_be_a_layer(tmp_path: Path) -> None:
    model = Reused().eval()
    layers = ["relu", "relu_1", "add", "norm", "silu"]
    explainer, _ = exported(model, tmp_path / "net.camrt", layers=layers)
    assert list(explainer.layers) == layers
    assert [t.name for t in explainer.manifest.taps if "last" in t.roles] == ["silu"]
    assert_verified(explainer, model)


def test_the_last_layer_lies_behind_norm_and_activation_from_pytorch_and_onnx_alike(tmp_path: Path) -> None:
    model = Reused().eval()
    source = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n"}, "y": {0: "n"}}
        example = (torch.zeros(1, *SHAPE),)
        torch.onnx.export(
            model,
            example,
            source,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
        )
    from_torch, _ = exported(model, tmp_path / "torch.camrt")
    from_onnx = camrt.load(camrt.export_onnx(source, tmp_path / "onnx.camrt"))
    assert from_torch.manifest.last_layer == "silu"
    got, want = (e.explain(IMAGES, "grad_cam", 1).maps for e in (from_torch, from_onnx))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_among_named_layers_the_deepest_finished_one_stands_for_the_last(tmp_path: Path) -> None:
    explainer, said = exported(Reused().eval(), tmp_path / "net.camrt", layers=["relu", "add", "c"])
    assert [t.name for t in explainer.manifest.taps if "last" in t.roles] == ["add"]
    assert "layer 'add' is used as the last layer" in said and "the network's own is 'silu'" in said
    bare, said = exported(Reused().eval(), tmp_path / "bare.camrt", layers=["a", "c"])
    assert "is used as the last layer" not in said
    with pytest.raises(
        camrt.CamrtError, match=r"score_cam needs the layers 'last', .*: export it with layer 'silu' as well"
    ):
        bare.explain(IMAGES, "score_cam", 1)


class _Trunk(nn.Module):
    """A trunk of 12 channels on an 8 x 8 grid, and one of eight ways from there to the logits."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.gate, self.other = nn.Conv2d(12, 1, 1), nn.Conv2d(3, 12, 5, 4, 2)
        wide = {"bilinear": 144, "pyramid": 12 * 5, "towers": 24, "levels": 20}
        self.head = nn.Linear(wide.get(way, 12), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = torch.relu(self.a(x))
        self.tap = t = torch.relu(self.b(early))
        rows = t.flatten(2)
        if self.way == "gated":
            return self.head((rows * self.gate(t).flatten(2).softmax(-1)).sum(-1))
        if self.way == "gated_by_product":
            return self.head((rows @ self.gate(t).flatten(2).softmax(-1).transpose(1, 2)).squeeze(-1))
        if self.way == "bilinear":
            return self.head((rows @ rows.transpose(1, 2)).flatten(1))
        if self.way == "pyramid":
            pools = [nn.functional.adaptive_max_pool2d(t, n).flatten(1) for n in (1, 2)]
            return self.head(torch.cat(pools, 1))
        if self.way == "towers":
            return self.head(torch.cat([t.mean((2, 3)), torch.relu(self.other(x)).mean((2, 3))], 1))
        return self.head(t.mean((2, 3)))


@pytest.mark.parametrize("way", ["gated", "gated_by_product", "bilinear", "pyramid", "pooled"])
def test_the_last_layer_carries_the_whole_gradient(way: str, tmp_path: Path) -> None:
    """A side branch (a gate, one factor of a product, one of several pools) carries a part of it, and its map looks
    right.
    """
    torch.manual_seed(0)
    net = _Trunk(way).eval()
    image = torch.randn(2, 3, 32, 32)
    explainer = camrt.load(camrt.export_model(net, tmp_path / "n.camrt", (3, 32, 32)))
    result = explainer.explain(image.numpy(), "grad_cam", 1)
    net = net.double()
    logits = net(image.double())
    gradient = torch.autograd.grad(logits[:, 1].sum(), net.tap)[0]
    cams = (gradient.mean((2, 3), keepdim=True) * net.tap).sum(1).relu().detach()
    want = nn.functional.interpolate(cams[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0].numpy()
    low, high = want.min((1, 2), keepdims=True), want.max((1, 2), keepdims=True)
    np.testing.assert_allclose(result.maps, (want - low) / (high - low), atol=1e-4)


def test_of_several_branches_none_is_the_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the logits read the image on several branches"):
        path = camrt.export_model(_Trunk("towers").eval(), tmp_path / "n.camrt", (3, 32, 32))
    assert camrt.load(path).manifest.last_layer is None


class _OtherOrder(nn.Module):
    """layer: of tokens that stand column by column, or from the last to the first."""

    def __init__(self, layer: nn.Module, reverse: bool) -> None:
        super().__init__()
        self.patches, self.layer, self.head, self.reverse = nn.Conv2d(3, 8, 8, 8), layer, nn.Linear(8, 5), reverse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.patches(x).relu()
        h = h if self.reverse else h.transpose(2, 3)
        tokens = h.flatten(2).transpose(1, 2)
        return self.head(self.layer(tokens.flip(1) if self.reverse else tokens).mean(1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU())], ids=["norm", "linear"])
def test_a_later_layer_in_another_order_is_not_passed_over(layer: nn.Module, reverse: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="so the bundle has no last layer"):
        path = camrt.export_model(_OtherOrder(layer, reverse).eval(), tmp_path / "n.camrt", (3, 32, 32))
    assert camrt.load(path).manifest.last_layer is None


class _Framed(nn.Module):
    """A network that changes its picture's frame first."""

    def __init__(self, frame: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.frame = frame
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.frame(x)).relu().mean((2, 3)))


def _framed(frame: Callable[[torch.Tensor], torch.Tensor], source: str, folder: Path) -> camrt.Explainer:
    torch.manual_seed(0)
    model, path = _Framed(frame).eval(), folder / "framed.camrt"
    if source == "torch":
        camrt.export_model(model, path, (3, 32, 32))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = str(folder / "framed.onnx")
            torch.onnx.export(model, (torch.zeros(1, 3, 32, 32),), file, input_names=["image"], dynamo=False)
        camrt.export_onnx(file, path)
    return camrt.load(path)


@pytest.mark.parametrize("source", ["torch", "onnx"])
@pytest.mark.parametrize(
    "frame",
    [
        lambda x: F.pad(x, (0, 8, 0, 8)),
        lambda x: F.pad(x, (8, 8, 8, 8), mode="reflect"),
        lambda x: F.pad(F.interpolate(x, size=(32, 24), mode="bilinear"), (4, 4, 0, 0)),
        lambda x: F.pad(x, (-4, -4, -4, -4)),
        lambda x: x[:, :, 2:30, 2:30],
        lambda x: x[:, :, :, :16],
        lambda x: F.conv2d(x, torch.ones(3, 3, 1, 1), padding=6),
        lambda x: F.conv2d(F.pad(x, (0, 0, 6, 6)), torch.ones(3, 3, 8, 8), stride=8),
        lambda x: F.conv2d(x, torch.ones(3, 3, 12, 12), stride=12),
        lambda x: F.group_norm(x[:, :, 4:-4, 4:-4], 3),
        lambda x: F.interpolate(x[:, :, 8:-8, 8:-8], size=(32, 32)) + 0.01 * x,
        lambda x: x[:, :, 8:-8, 8:-8] * x.mean((2, 3), keepdim=True).sigmoid(),
    ],
    ids=[
        *["right and below", "reflected", "letterbox", "negative", "crop", "half", "convolution"],
        *[
            "letterbox before patches",
            "unread rest of patches",
            "crop before a reshape",
            "crop on the whole",
            "crop and gate",
        ],
    ],
)
def test_a_frame_that_the_network_changes_is_refused(
    frame: Callable[[torch.Tensor], torch.Tensor], source: str, tmp_path: Path
) -> None:
    """A map of the padded canvas, stretched over the picture, would lie beside what it explains."""
    with pytest.raises(ExportError, match="pads or crops the picture within the network"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _framed(frame, source, tmp_path)


@pytest.mark.parametrize("source", ["torch", "onnx"])
@pytest.mark.parametrize(
    "frame",
    [
        lambda x: F.pad(x, (0, 1, 0, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.pad(x, (8, 8, 8, 8))[:, :, 8:40, 8:40],
        lambda x: F.max_pool2d(F.pad(x, (3, 3, 3, 3)), 7, 2),
    ],
    ids=["one below", "one around", "and back", "of a pooling"],
)
def test_the_padding_of_a_window_leaves_the_frame(
    frame: Callable[[torch.Tensor], torch.Tensor], source: str, tmp_path: Path
) -> None:
    assert _framed(frame, source, tmp_path).manifest.last_layer is not None


class _Block(nn.Module):
    """The last block of a vision transformer, with a feed-forward part that takes its tokens apart."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.widen, self.narrow = nn.Linear(12, 24), nn.Linear(12, 12)
        self.filter = nn.Conv1d(12, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.second(x)
        if self.kind == "gated":
            value, gate = self.widen(y).chunk(2, -1)
            return x + self.narrow(value * gate.sigmoid())
        return x + self.filter(y.transpose(1, 2)).transpose(1, 2)


class _Tokens(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.patches, self.token = kind, nn.Conv2d(3, 12, 8, 8), nn.Parameter(torch.randn(1, 1, 12))
        self.block, self.norm, self.head = _Block(kind), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1)))
        return self.head(x.unbind(1)[0] if self.kind == "unbound" else x.transpose(1, 2)[:, :, 0])


@pytest.mark.parametrize("kind", ["gated", "filtered", "unbound"])
def test_the_last_layer_of_tokens_is_one_that_the_logits_read(kind: str, tmp_path: Path) -> None:
    """Where the graph's structure does not show that only the class token is read, the gradient does."""
    torch.manual_seed(0)
    model, images = _Tokens(kind).eval(), smooth_images((3, 32, 32), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer = camrt.load(camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32), layers="last"))
    assert explainer.manifest.last_layer == "block.first"
    recorded = record(model.double(), torch.from_numpy(images).double(), 2, ["block.first"])
    a, g = (t["block.first"][:, 1:] for t in (recorded.activations, recorded.gradients))
    want = combined([(a * g).sum(2).reshape(3, 4, 4)], (32, 32)).numpy()
    assert all(np.ptp(w) > 0.5 for w in want)
    np.testing.assert_allclose(explainer.explain(images, "hires_cam", 2).maps, want, atol=1e-4)


class _Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"image": image[None]} for image in smooth_images((3, 32, 32), 8, seed=3)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("seed", [0, 1])
def test_a_quantised_transformer_is_verified(seed: int, tmp_path: Path) -> None:
    """Engines that compute with its integers round elsewhere than float64, by as much as a small change of the image
    does.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, path = str(tmp_path / "plain.onnx"), tmp_path / "quantised.onnx"
        torch.onnx.export(
            _Tokens("gated").eval(), (torch.zeros(1, 3, 32, 32),), plain, input_names=["image"], dynamo=False
        )
        quantize_static(plain, path, _Calibration(), quant_format=QuantFormat.QDQ)
        report = verify(camrt.export_onnx(path, tmp_path / "n.camrt"))
    assert report.passed, [r for r in report.rows if not r.passed][:4]


class _PowerMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
        self.power, self.head = nn.Parameter(torch.tensor(3.0)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x).clamp(min=1e-6).pow(self.power)
        return self.head(F.adaptive_avg_pool2d(x, 1).pow(1 / self.power).flatten(1))


class _TwoLevels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(torch.cat([x.mean((2, 3)), self.second(x).mean((2, 3))], 1))


def test_the_power_of_a_mean_is_no_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = camrt.export_model(_PowerMean().eval(), tmp_path / "n.camrt", (3, 32, 32))
    assert camrt.load(path).manifest.last_layer == "body"


def test_a_head_on_two_levels_says_which_is_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the logits read 'first' directly and also through the deeper 'second'"):
        path = camrt.export_model(_TwoLevels().eval(), tmp_path / "n.camrt", (3, 32, 32))
    assert camrt.load(path).manifest.last_layer == "first"


class _Refusing(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.body(x).mean((2, 3))
        if self.kind == "squeezed":
            return self.head(x.squeeze().unsqueeze(0))
        if self.kind == "branch" and x.sum() > 0:
            x = x * 2
        z = self.head(x)
        return {"scores": z, "features": x} if self.kind == "parts" else z


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("branch", None, "an if, a loop or a size depends on computed numbers: .*torch.where"),
        ("parts", "score", r"returns a dict of scores \(2, 5\), features \(2, 8\), without a part 'score'"),
        ("plain", "scores", r"returns one tensor \(2, 5\), without a part 'scores': leave output=, --output out"),
    ],
)
def test_models_that_cannot_be_taken_say_why(
    kind: str, output: str | None, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=message), warnings.catch_warnings():
        warnings.simplefilter("error")
        camrt.export_model(_Refusing(kind).eval(), tmp_path / "n.camrt", (3, 32, 32), output=output)
    assert capfd.readouterr() == ("", "")


def test_a_model_for_one_image_is_explained_one_image_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = _Refusing("squeezed").eval(), smooth_images((3, 32, 32), 1)
    with pytest.warns(UserWarning, match=r"one image at a time \(batch 1\): .* has its batch on another axis"):
        path = camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32))
    with torch.no_grad():
        want = model(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(camrt.load(path).classify(image), want, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_norm_before_tokens_has_its_own_gradient(norm: type[nn.Module], tmp_path: Path) -> None:
    """PyTorch 2.13 confuses the elements of one image's gradient there; the reference must not, nor be taken for the
    truth.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), norm(8, affine=True), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
            return self.head((x * x.softmax(1)).sum(1))

    torch.manual_seed(0)
    model = Net().eval()
    path = camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32))
    recorded = record(model.double(), torch.from_numpy(smooth_images((3, 32, 32), 1)).double(), 1, ["patches"])
    gradient, moved = recorded.gradients["patches"], torch.randn(1, 8, 4, 4, dtype=torch.float64)
    scores = []
    for step in (1e-6, -1e-6):
        handle = model.patches.register_forward_hook(lambda m, x, y, step=step: y + step * moved)
        with torch.no_grad():
            scores.append(model(torch.from_numpy(smooth_images((3, 32, 32), 1)).double())[0, 1])
        handle.remove()
    assert float((scores[0] - scores[1]) / 2e-6) == pytest.approx(float((gradient * moved).sum()), rel=1e-5)
    report = verify_bundle(camrt.load(path).bundle, module_oracle(model.float(), "the model"))
    assert report.passed, [r for r in report.rows if not r.passed][:3]


class _Root(nn.Module):
    def __init__(self, small: float, in_place: bool) -> None:
        super().__init__()
        self.small, self.in_place = small, in_place
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.ReLU()), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x).mean((2, 3))
        if self.in_place:
            x.add_(self.small)
        else:
            x = x + self.small
        return self.head(torch.sqrt(x))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("small", [1e-8, 1e-10, 1e-6])
def test_a_small_number_under_a_root_stays(small: float, in_place: bool, tmp_path: Path) -> None:
    """A dark picture has an activation of 0, at which a root alone has no gradient."""
    torch.manual_seed(0)
    model, black = _Root(small, in_place).eval(), np.zeros((1, 3, 32, 32), np.float32)
    explainer = camrt.load(camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32)))
    with torch.no_grad():
        want = model(torch.from_numpy(black)).numpy()
    np.testing.assert_allclose(explainer.classify(black), want, rtol=1e-6)
    assert np.isfinite(explainer.explain(black, "hires_cam", 0).maps).all()
    assert_verified(explainer, model)


class _ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with its activation, as timm's networks have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps).relu()


def test_the_constants_of_a_norm_with_its_activation_are_before_that(tmp_path: Path) -> None:
    torch.manual_seed(0)
    norm = _ActivatedNorm(8)
    with torch.no_grad():
        norm.bias.normal_()
        assert norm.running_mean is not None
        norm.running_mean.normal_()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        norm,
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    explainer = camrt.load(camrt.export_model(model.eval(), tmp_path / "n.camrt", (3, 32, 32)))
    assert_verified(explainer, model)


@pytest.mark.parametrize("kind", ["whole", "in place", "a layer", "forward"])
def test_compiled_models_go_in_or_say_what_to_pass(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    image = smooth_images((3, 32, 32), 1)
    with torch.no_grad():
        want = model(torch.from_numpy(image)).numpy()
    if kind == "whole":
        model = torch.compile(model, backend="eager")
    elif kind == "in place":
        model.compile(backend="eager")
    elif kind == "a layer":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    if kind in ("whole", "in place"):
        explainer = camrt.load(camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32)))
        np.testing.assert_allclose(explainer.classify(image), want, atol=1e-6)
    else:
        with pytest.raises(ExportError, match=r"is compiled \(torch.compile\), which torch.export cannot trace"):
            camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32))


class _Shared(nn.Module):
    """Modules that have several names, as where a backbone's layers are put together again beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 12, 8, 8), _Residual(), nn.Linear(12, 5)
        self.body = nn.Sequential(self.stem, self.block, *([self.block] if kind == "twice" else []))
        self.target = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv2d(12, 12, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.filter(x) + x)


@pytest.mark.parametrize("kind", ["once", "twice"])
def test_a_module_with_several_names_goes_in_by_its_first(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Shared(kind).eval()
    explainer = camrt.load(camrt.export_model(model, tmp_path / "n.camrt", (3, 32, 32)))
    assert explainer.manifest.last_layer == ("block" if kind == "once" else "block_1")
    assert_verified(explainer, model)
