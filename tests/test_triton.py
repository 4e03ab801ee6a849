"""`camrt deploy triton`: what it writes, and a real server of it where TRITON names its environment (make triton)."""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from support import SmallNet, warmed_up
from triton_server import Server, serving
from tritonclient import grpc, http
from tritonclient.grpc import model_config_pb2

import camrt
from camrt.cli import main
from camrt.deploy.triton.repository import Deployment, write_repository
from camrt.export.probes import smooth_images
from camrt.runtime.errors import BundleError, CamrtError, InputError, UnknownMethod, UnknownName

IMAGES = smooth_images((3, 32, 32), 6)
KINDS = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}


def config_of(place: Path) -> Any:
    """Parsed by the server's own definition: a name that it does not know is an error."""
    definition: Any = model_config_pb2
    return text_format.Parse((place / "config.pbtxt").read_text(), definition.ModelConfig())


# ---- what is written


def test_repository_has_what_a_server_needs(exported: Path, tmp_path: Path) -> None:
    (place,) = write_repository(exported, tmp_path / "models", Deployment(max_batch=8, delay=5, threads=1))
    config = config_of(place)
    assert (config.name, config.backend, config.max_batch_size) == ("small", "python", 8)
    assert [(i.name, list(i.dims), i.optional) for i in config.input] == [
        ("image", [3, 32, 32], True),
        ("picture", [1], True),
        ("target", [1], True),
        ("percentile", [1], True),
    ]
    assert [(o.name, list(o.dims)) for o in config.output] == [
        ("map", [32, 32]),
        ("logits", [5]),
        ("layer_weights", [-1]),
        ("class", [1]),
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 5000
    assert [w.batch_size for w in config.model_warmup] == [1, 8]
    assert config.instance_group[0].kind == 2, "KIND_CPU"
    assert config.parameters["threads"].string_value == "1"
    assert camrt.load(place / "1" / "bundle.camrt").manifest.name == "small", "the bundle travels with it"
    text = (tmp_path / "models" / "Dockerfile").read_text()
    assert "FROM nvcr.io/nvidia/tritonserver:" in text and f"'numpy=={np.__version__}'" in text


def test_repository_for_gpus_and_of_a_bundle_for_single_images(exported: Path, tmp_path: Path) -> None:
    (place,) = write_repository(exported, tmp_path, Deployment("on.gpu-1", gpu=True, instances=2))
    config = config_of(place)
    assert (config.instance_group[0].kind, config.instance_group[0].count) == (1, 2)
    assert config.parameters["backend"].string_value == "auto"
    assert "--gpus all" in (tmp_path / "Dockerfile").read_text() and "pycuda==" in (tmp_path / "Dockerfile").read_text()


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("method", ["winsor_cam", "grad_cam", "eigen_cam"])
def test_compiled_file_stands_beside_the_explainer(engine: str, method: str, exported: Path, tmp_path: Path) -> None:
    how = Deployment(method=method, compiled=engine, max_batch=4)
    if method == "eigen_cam":
        with pytest.raises(UnknownMethod, match="cannot be compiled"):
            write_repository(exported, tmp_path, how)
        assert not list(tmp_path.glob("*_eigen_cam")) and not list(tmp_path.glob(".*"))
        return
    _, place = write_repository(exported, tmp_path, how)
    config = config_of(place)
    assert (config.name, config.backend) == (f"small_{method}", engine)
    assert [i.name for i in config.input] == ["image", "target", *(["percentile"] if method == "winsor_cam" else [])]
    assert [(i.HasField("reshape"), list(i.reshape.shape)) for i in config.input][:2] == [(False, []), (True, [])]
    assert all(set(w.inputs) == {i.name for i in config.input} for w in config.model_warmup)
    script = place / "1" / "build_engine.sh"
    assert script.exists() == (engine == "tensorrt")
    if engine == "tensorrt":
        assert "--maxShapes=image:4x3x32x32,target:4" in script.read_text()


def test_names_and_folders_that_would_do_harm_are_refused(exported: Path, bundle: Path, tmp_path: Path) -> None:
    for name in ("../up", "a/b", "", ".", "..", "a b", 'x"', "ä", "a" * 200):
        with pytest.raises(InputError, match="cannot be a model's"):
            write_repository(exported, tmp_path, Deployment(name))
    with pytest.raises(InputError, match="lies in the bundle"):
        write_repository(bundle, bundle / "models")
    (place,) = write_repository(exported, tmp_path)
    (place / "mine").write_text("x")
    with pytest.raises(InputError, match="exists"):
        write_repository(exported, tmp_path)
    assert (place / "mine").exists()
    write_repository(exported, tmp_path, overwrite=True)
    assert not (place / "mine").exists()
    (bundle / "classify.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match="damaged"):
        write_repository(bundle, tmp_path, Deployment("damaged"))
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        (Deployment(instances=0), InputError),
        (Deployment(instances=10**12), InputError),
        (Deployment(max_batch=10**9), InputError),
        (Deployment(method="winsor_cam:percentile=500"), InputError),
        (Deployment(max_batch=0), InputError),
        (Deployment(delay=float("nan")), InputError),
        (Deployment(backend="tpu"), UnknownName),
        (Deployment(compiled="openvino"), UnknownName),
        (Deployment(method="gradcam"), UnknownMethod),
        (Deployment(precision="fp16"), InputError),
    ],
)
def test_what_cannot_be_served_is_refused(how: Deployment, error: type, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        write_repository(exported, tmp_path, how)
    assert isinstance(caught.value, CamrtError) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_dockerfile_is_of_the_last_kind_unless_it_is_the_users(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    write_repository(exported, tmp_path)
    write_repository(exported, tmp_path, Deployment("gpu", gpu=True))
    assert "onnxruntime-gpu" in file.read_text()
    write_repository(exported, tmp_path, Deployment("cpu"))
    assert "onnxruntime-gpu" in file.read_text(), "it serves on the CPU as well"
    file.write_text("FROM mine\n")
    write_repository(exported, tmp_path, Deployment("more"))
    assert file.read_text() == "FROM mine\n"
    with pytest.raises(InputError, match="cannot be a model's"):
        write_repository(exported, tmp_path, Deployment("Dockerfile"))
    with pytest.raises(InputError, match="not a folder"):
        write_repository(exported, file)


def test_check_of_a_server_that_answers_anything(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Anything(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Anything) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert main(["deploy", "triton", str(exported), "--check", url]) == 1
        assert "WRONG" in capsys.readouterr().out
        server.shutdown()
    for port in ("99999", "abc"):
        assert main(["deploy", "triton", str(exported), "--check", f"http://127.0.0.1:{port}"]) == 2
        assert "its port is no number" in capsys.readouterr().err


def test_check_says_that_no_server_answers(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:9", "grpc://127.0.0.1:9"):
        assert main(["deploy", "triton", str(exported), "--check", url]) == 2
        assert "no Triton server answers there" in capsys.readouterr().err
    assert main(["deploy", "triton", str(exported), "--check", "127.0.0.1:8000"]) == 2
    assert "use http://HOST:8000 or grpc://HOST:8001" in capsys.readouterr().err
    assert main(["deploy", "triton", str(exported)]) == 2


# ---- a server


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = os.environ.get("TRITON")
    if environment is None:
        pytest.skip("make triton runs these, with a server in an environment of its own")
    folder = tmp_path_factory.mktemp("triton")
    write_repository(exported, folder / "models", Deployment(threads=1, max_batch=8, delay=20))
    write_repository(exported, folder / "models", Deployment("layered", threads=1, method="layer_cam"))
    broken = Path(shutil.copytree(exported, folder / "broken.camrt"))
    (place,) = write_repository(broken, folder / "models")
    (place / "1" / "bundle.camrt" / "weights.bin").write_bytes(b"changed")
    with serving(Path(environment), folder / "models", folder) as running:
        yield running


def ask(url: str, inputs: dict[str, np.ndarray], model: str = "small", **parameters: Any) -> Any:
    library: Any = grpc if url.startswith("grpc") else http
    given = []
    for name, array in inputs.items():
        tensor = library.InferInput(name, list(array.shape), KINDS[array.dtype.name])
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    with library.InferenceServerClient(url.partition("://")[2]) as client:
        return client.infer(model, given, parameters=parameters or None)


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return getattr(server, request.param)


def test_check_finds_every_map_equal(url: str, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "triton", str(exported), "--name", "small", "--check", url]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "WRONG" not in said and "picture 3" in said and "a class out of range" in said


def test_check_finds_a_server_of_another_network(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(9)
    other = camrt.export_model(warmed_up(SmallNet(5), (3, 32, 32), seed=9), tmp_path / "other.camrt", (3, 32, 32))
    assert main(["deploy", "triton", str(other), "--name", "small", "--check", url]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_every_method_and_layer_is_answered_as_explain_answers(url: str, explainer: camrt.Explainer) -> None:
    for method in ("winsor_cam", "score_cam_pp:baseline=zero", "layer_cam", "ablation_cam"):
        name, _, _ = method.partition(":")
        options: dict[str, Any] = {"baseline": "zero"} if ":" in method else {}
        want = explainer.explain(IMAGES[:2], name, [1, 3], **options)
        got = ask(url, {"image": IMAGES[:2], "target": np.array([[1], [3]])}, method=method)
        np.testing.assert_allclose(got.as_numpy("map"), want.maps, atol=1e-5)
        np.testing.assert_array_equal(got.as_numpy("class").ravel(), [1, 3])
        np.testing.assert_allclose(got.as_numpy("layer_weights"), want.layer_weights, atol=1e-5)
    want = explainer.explain(IMAGES[:1], "grad_cam", layers="conv")
    got = ask(url, {"image": IMAGES[:1]}, method="grad_cam", layers="conv")
    np.testing.assert_allclose(got.as_numpy("map"), want.maps, atol=1e-5)
    layered = ask(url, {"image": IMAGES[:1]}, "layered")
    np.testing.assert_allclose(layered.as_numpy("map"), explainer.explain(IMAGES[:1], "layer_cam").maps, atol=1e-5)


def _png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    return out.getvalue()


WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("NaN", {"image": IMAGES[:1] * np.float32(np.nan)}, {}, "NaN or infinity"),
    ("no method", {"image": IMAGES[:1]}, {"method": "gradcam"}, "did you mean 'grad_cam'"),
    ("no layer", {"image": IMAGES[:1]}, {"method": "grad_cam", "layers": "stom"}, "stom"),
    ("class", {"image": IMAGES[:1], "target": np.array([[99]])}, {}, "out of range"),
    ("percentile", {"image": IMAGES[:1], "percentile": np.array([[400]], np.float32)}, {}, "percentile"),
    ("not its option", {"image": IMAGES[:1]}, {"method": "grad_cam", "percentile": 5}, "has no percentile"),
    ("both", {"image": IMAGES[:1], "picture": np.array([[b"x"]], object)}, {}, "pass image or picture"),
    ("neither", {"target": np.array([[1]])}, {}, "pass image or picture"),
    ("no picture", {"picture": np.array([[b"GIF89a"]], object)}, {}, "not a readable image"),
    ("bomb", {"picture": np.array([[_png((9000, 9000), "1")]], object)}, {}, "at most 50000000 are allowed"),
    ("bigger bomb", {"picture": np.array([[_png((30000, 30000), "1")]], object)}, {}, "50000000 pixels"),
]


@pytest.mark.parametrize(("inputs", "parameters", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_requests_are_told_so(url: str, inputs: Any, parameters: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        ask(url, inputs, **parameters)
    assert "INVALID_ARG" in str(caught.value) or url.startswith("http")
    assert ask(url, {"image": IMAGES[:1]}).as_numpy("map").shape == (1, 32, 32), "and goes on"


def test_requests_share_runs_and_spoil_no_other(server: Server, explainer: camrt.Explainer) -> None:
    """Sixteen clients with targets and percentiles of their own; every fourth sends NaN."""

    def client(i: int) -> tuple[int, Any]:
        image = IMAGES[i % 6][None] * np.float32(np.nan if i % 4 == 3 else 1)
        inputs = {
            "image": image,
            "target": np.array([[i % 5]]),
            "percentile": np.array([[10 * (i % 10)]], np.float32),
        }
        try:
            return i, ask(server.http, inputs).as_numpy("map")
        except Exception as error:
            return i, error

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(client, range(96)))
    for i, got in answers:
        if i % 4 == 3:
            assert "NaN" in str(got)
            continue
        want = explainer.explain(IMAGES[i % 6][None], target=i % 5, percentile=10 * (i % 10)).maps
        np.testing.assert_allclose(got, want, atol=1e-5)
    with http.InferenceServerClient(server.http.partition("://")[2]) as connection:
        statistics: Any = connection.get_inference_statistics("small")
    stats = statistics["model_stats"][0]
    assert int(stats["execution_count"]) < int(stats["inference_count"]), "requests were batched"


def test_a_changed_bundle_is_not_served(server: Server) -> None:
    with http.InferenceServerClient(server.http.partition("://")[2]) as connection:
        assert connection.is_model_ready("small") and not connection.is_model_ready("broken")
    assert "damaged" in server.log.read_text()
