"""The page of `camrt page`, in a real browser: `make browser` installs what these tests need, else they are skipped."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import camrt
from camrt.cli import main
from camrt.compiling.methods import COMPILED
from camrt.demo.scenes import draw_scene
from camrt.export.probes import smooth_images
from camrt.kernels import minmax
from camrt.method_choice import parse_method
from camrt.page import web_runtime
from camrt.page.serving import server
from camrt.page.site import METHODS, make_page
from camrt.runtime.bundle.manifest import Preprocess
from camrt.runtime.images.opening import open_image
from camrt.runtime.images.preprocess import preprocess

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
needs_runtime = pytest.mark.skipif(not web_runtime.is_at_hand(), reason="npm is missing: make system installs it")
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None or not web_runtime.is_at_hand(),
    reason="chromium, playwright or npm is missing: make system and make browser install them",
)


@pytest.fixture(scope="module")
def shapes() -> Path:
    from camrt.demo.run import BUNDLE

    return BUNDLE


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "a scene.png"
    Image.fromarray(draw_scene(1_000_003, 3)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def site(shapes: Path, scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    methods = [*METHODS, "recipro_cam", "winsor_cam:layer_aggregation=max"]
    return make_page(shapes, tmp_path_factory.mktemp("page") / "site", methods, [scene])


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with server(site, port=0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        yield playwright.chromium


@pytest.fixture(scope="module")
def browser(chromium: Any) -> Iterator[Any]:
    opened = chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Opened and ready; fails if it wrote errors, or asked another host."""
    context = browser.new_context()
    opened, errors, asked = context.new_page(), [], []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("body[data-ready=yes]")
    yield opened
    context.close()
    assert not errors and all(url.startswith((address, "blob:", "data:")) for url in asked), (errors, asked)


def wait(page: Any, expression: str) -> None:
    """Until an expression is true. The page's security policy forbids Playwright's own way."""
    for _ in range(300):
        if page.evaluate(f"Boolean({expression})"):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{expression} stays false: {page.text_content('#problem')}")


def explained(page: Any, action: Any) -> None:
    """Runs what starts an explanation, and waits for the end of it."""
    runs = page.evaluate("camrt.state.networkRuns")
    action()
    wait(page, f"camrt.state.networkRuns > {runs} && camrt.state.result?.map")
    page.wait_for_selector("#view[aria-busy=false]")


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float32)


AS_TEXT = """(array) => {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  let text = '';
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}"""


def picture_files() -> dict[str, bytes]:
    """Pictures in the forms that people have, as the bytes of files."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (61, 83, 4), dtype=np.uint8))
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
        (500, 321), Image.Resampling.BICUBIC
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "rgb.png": noise.convert("RGB"),
        "rgba.png": noise,
        "grey.png": noise.convert("L"),
        "palette.png": noise.convert("RGB").convert("P"),
        "photo.jpg": smooth,
        "tall.png": smooth.convert("RGB").resize((40, 600)),
    }
    encoded = {}
    for name, image in files.items():
        out = io.BytesIO()
        image.save(out, "JPEG" if name.endswith("jpg") else "PNG")
        encoded[name] = out.getvalue()
    out = io.BytesIO()
    smooth.save(out, "JPEG", exif=turned)
    return encoded | {"turned.jpg": out.getvalue()}


PLAIN = Preprocess((64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RECIPES = {
    "stretched": PLAIN,
    "cropped": replace(PLAIN, resize=72, crop=(64, 64)),
    "odd crop": replace(PLAIN, resize=(81, 70), crop=(64, 64), interpolation="lanczos"),
    "bicubic": replace(PLAIN, interpolation="bicubic"),
    "nearest": replace(PLAIN, interpolation="nearest"),
    "letterbox": replace(PLAIN, fit="letterbox"),
    "bgr": replace(PLAIN, channels="BGR"),
    "grey": replace(PLAIN, mean=(0.5,), std=(0.25,)),
}


@needs_browser
def test_the_network_gets_the_bits_of_pillow(page: Any, shapes: Path) -> None:
    manifest = camrt.load(shapes).manifest
    turns = page.evaluate("camrt.site.turns")
    for name, recipe in RECIPES.items():
        channels = len(recipe.mean)
        known = replace(manifest, preprocess=recipe, input_shape=(channels, 64, 64))
        for file, data in picture_files().items():
            want = preprocess(open_image(data, channels, file), known)
            got = page.evaluate(
                f"""async ([data, recipe, channels, turns]) => {{
                  const blob = new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))]);
                  const {{input}} = camrt.prepare(await camrt.decode(blob), recipe, channels, turns);
                  return ({AS_TEXT})(input);
                }}""",
                [base64.b64encode(data).decode(), asdict(recipe), channels, turns],
            )
            np.testing.assert_array_equal(floats(got), want.ravel(), err_msg=f"{name}, {file}")


@needs_browser
def test_every_method_gives_the_map_of_python(page: Any, shapes: Path, scene: Path) -> None:
    explainer = camrt.load(shapes)
    explained(page, lambda: page.set_input_files("#file", scene))
    for name in [*METHODS, "recipro_cam", "winsor_cam:layer_aggregation=max"]:
        if name != page.input_value("#method"):
            explained(page, lambda name=name: page.select_option("#method", name))
        choice = parse_method(name)
        want = explainer.explain(scene, choice.name, **choice.options)
        got = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.map)")).reshape(want.maps[0].shape)
        np.testing.assert_allclose(minmax(got), minmax(want.maps[0]), atol=1e-3, err_msg=name)
        weights = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.layerWeights)"))
        np.testing.assert_allclose(weights, want.layer_weights[0], atol=1e-4, err_msg=name)
        logits = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.logits)"))
        np.testing.assert_allclose(logits, want.logits[0], atol=1e-4)
        assert page.evaluate("camrt.state.checks")[name]["difference"] < 1e-3


@needs_browser
def test_the_slider_changes_the_map_without_the_network(page: Any, shapes: Path, scene: Path) -> None:
    explained(page, lambda: page.set_input_files("#file", scene))
    result = camrt.load(shapes).explain(scene)
    runs, pictures = page.evaluate("camrt.state.networkRuns"), set()
    for percentile in (0, 50, 75, 100):
        retunes = page.evaluate("camrt.state.retunes")
        page.fill("#percentile", str(percentile))
        wait(page, f"camrt.state.retunes > {retunes}")
        wait(page, f"document.querySelector('#title').textContent.endsWith('percentile {percentile}')")
        got = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.map)"))
        want = result.retune(percentile=percentile).maps[0]
        np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-3)
        pictures.add(page.evaluate("document.querySelector('#canvas').toDataURL()"))
    assert page.evaluate("camrt.state.networkRuns") == runs and len(pictures) == 4
    assert page.text_content("#percentile-value") == "100"
    page.locator("#percentile").focus()
    page.keyboard.press("ArrowLeft")
    wait(page, "document.querySelector('#title').textContent.endsWith('percentile 99')")


@needs_browser
def test_classes(page: Any, shapes: Path, scene: Path) -> None:
    explained(page, lambda: page.click("#examples button"))
    result = camrt.load(shapes).explain(scene)
    order = [name for _, name, _ in result.top(5)[0]]
    assert [n.strip() for n in page.locator("#classes .name").all_text_contents()] == order
    assert page.get_attribute("#classes button >> nth=0", "aria-pressed") == "true"
    page.locator("#classes button >> nth=1").focus()
    explained(page, lambda: page.keyboard.press("Enter"))
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert order[1] in str(page.text_content("#title"))
    last = camrt.load(shapes).manifest.classes
    assert last is not None
    explained(page, lambda: (page.fill("#any", last[-1].upper()), page.press("#any", "Enter")))
    assert last[-1] in str(page.text_content("#title"))
    want = camrt.load(shapes).explain(scene, target=last[-1]).maps[0]
    got = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.map)")).reshape(want.shape)
    np.testing.assert_allclose(minmax(got), minmax(want), atol=1e-3)
    page.fill("#any", "no such class")
    page.press("#any", "Enter")
    assert "There is no class “no such class”" in str(page.text_content("#problem"))


@needs_browser
def test_files_that_are_no_pictures_are_refused_by_a_sentence(page: Any, scene: Path, tmp_path: Path) -> None:
    bad = {"notes.txt": b"hello", "empty.png": b"", "cut.png": scene.read_bytes()[:40], "page.html": b"<p>x"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#file", tmp_path / name)
        wait(page, f"document.querySelector('#problem').textContent.startsWith('{name} is not a picture')")
        assert page.is_visible("#problem") and page.is_visible("#empty")
    explained(page, lambda: page.set_input_files("#file", scene))
    assert page.is_hidden("#problem") and page.is_visible("#results")


@needs_browser
def test_pictures_are_saved(page: Any, scene: Path, tmp_path: Path) -> None:
    explained(page, lambda: page.set_input_files("#file", scene))
    title = str(page.text_content("#title"))
    for button, ending in (("#save-png", "png"), ("#save-npy", "npy")):
        with page.expect_download() as waiting:
            page.click(button)
        name = waiting.value.suggested_filename
        assert name.startswith("a-scene-winsor_cam-") and name.endswith(ending) and name.split("-")[3][:-4] in title
        waiting.value.save_as(tmp_path / ending)
    saved = np.load(tmp_path / "npy")
    np.testing.assert_array_equal(saved.ravel(), floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.map)")))
    assert saved.shape == (128, 128) and Image.open(tmp_path / "png").size == Image.open(scene).size


@needs_browser
def test_drop_paste_and_camera(page: Any, scene: Path) -> None:
    data = base64.b64encode(scene.read_bytes()).decode()
    transfer = """(data) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], 'x.png', {type: 'image/png'}));
      return transfer;
    }"""
    drop = f"(d) => window.dispatchEvent(new DragEvent('drop', {{dataTransfer: ({transfer})(d), cancelable: true}}))"
    explained(page, lambda: page.evaluate(drop, data))
    paste = f"(d) => window.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: ({transfer})(d)}}))"
    explained(page, lambda: page.evaluate(paste, data))
    page.click("#open-camera")
    wait(page, "document.querySelector('#video').videoWidth > 0")
    explained(page, lambda: page.click("#shoot"))
    assert page.is_hidden("#camera") and "camera" in str(page.get_attribute("#canvas", "aria-label"))
    assert page.evaluate("document.querySelector('#video').srcObject === null")


@needs_browser
def test_controls_have_names_and_can_be_reached_by_keys(page: Any, scene: Path) -> None:
    explained(page, lambda: page.set_input_files("#file", scene))
    unnamed = page.evaluate(
        """Array.from(document.querySelectorAll('input, select, button')).filter((e) => !e.hidden && !(
          e.labels?.length || e.textContent.trim() || e.ariaLabel || e.querySelector('img[alt]'))).map((e) => e.id)"""
    )
    assert unnamed == []
    reached = set()
    page.locator("#file").focus()
    for _ in range(30):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert {
        "file",
        "open-camera",
        "method",
        "percentile",
        "opacity",
        "colormap",
        "choice",
        "any",
        "save-png",
    } <= reached


@needs_browser
def test_quick_changes_end_at_the_last_one(page: Any, shapes: Path, scene: Path) -> None:
    """Of method, class and percentile, while the network runs; and an earlier picture that is read slowly."""
    explained(page, lambda: page.set_input_files("#file", scene))
    page.evaluate(
        """async () => {
          const set = (id, value, event) => {
            const element = document.getElementById(id);
            element.value = value;
            element.dispatchEvent(new Event(event));
          };
          const methods = ['grad_cam', 'winsor_cam', 'layer_cam', 'winsor_cam:layer_aggregation=max', 'finer_cam'];
          for (let i = 0; i < 60; i++) {
            set('method', methods[i % methods.length], 'change');
            set('percentile', (i * 7) % 100, 'input');
            if (i % 3 === 0) document.querySelector('#classes button:nth-child(2)').click();
            await new Promise((resolve) => setTimeout(resolve, (i * 13) % 40));
          }
          set('method', 'winsor_cam', 'change');
          set('percentile', 40, 'input');
        }"""
    )
    wait(page, "document.querySelector('#title').textContent.endsWith('percentile 40')")
    page.wait_for_selector("#view[aria-busy=false]")
    target = int(page.evaluate("camrt.state.result.target"))
    want = camrt.load(shapes).explain(scene, target=target, percentile=40).maps[0]
    got = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.map)")).reshape(want.shape)
    np.testing.assert_allclose(minmax(got), minmax(want), atol=1e-3)
    assert all(c["difference"] < 1e-3 for c in page.evaluate("camrt.state.checks").values())


@needs_browser
def test_a_picture_that_is_read_slowly_does_not_replace_a_later_one(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.fromarray(np.zeros((6000, 6000, 3), np.uint8)).save(large, compress_level=1)
    page.set_input_files("#file", large)
    explained(page, lambda: page.click("#examples button"))
    page.wait_for_timeout(3000)
    assert "a scene" in str(page.text_content("#photo"))


@needs_browser
def test_nothing_overflows_on_a_phone(browser: Any, address: str, scene: Path) -> None:
    page = browser.new_page(viewport={"width": 320, "height": 640})
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    explained(page, lambda: page.set_input_files("#file", scene))
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.close()


@needs_browser
def test_an_engine_that_gives_another_map_is_not_used(browser: Any, address: str, site: Path) -> None:
    page = browser.new_page()
    other = np.roll(np.frombuffer((site / "model" / "0-check.bin").read_bytes(), np.float32), 999).tobytes()
    page.route("**/0-check.bin", lambda route: route.fulfill(body=other))
    page.goto(address)
    page.wait_for_selector("body[data-ready=no]")
    assert "differs from the reference" in str(page.text_content("#problem"))
    page.close()


@needs_browser
def test_webgpu(chromium: Any, shapes: Path, address: str, scene: Path) -> None:
    """By a software adapter: the map is that of Python, or the page says why it uses the processor instead."""
    opened = chromium.launch(executable_path=BROWSER, args=[*ARGUMENTS, *SOFTWARE_GPU])
    try:
        page = opened.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        if page.evaluate("camrt.state.engine.provider") != "webgpu":
            pytest.skip(f"this browser has no software adapter: {page.text_content('#problem')}")
        explained(page, lambda: page.set_input_files("#file", scene))
        want = camrt.load(shapes).explain(scene).maps[0]
        got = floats(page.evaluate(f"({AS_TEXT})(camrt.state.result.map)")).reshape(want.shape)
        np.testing.assert_allclose(minmax(got), minmax(want), atol=1e-3)
    finally:
        opened.close()


@needs_browser
@pytest.mark.parametrize("text", COMPILED)
def test_compiled_files_in_onnxruntime_web(text: str, page: Any, site: Path, exported: Path, tmp_path: Path) -> None:
    path = camrt.compile(exported, site / "one_file.onnx", text)
    images, targets = smooth_images((3, 32, 32), 2), [1, 3]
    feeds: dict[str, Any] = {"image": [images.ravel().tolist(), [2, 3, 32, 32]]}
    feeds |= {"percentile": [[70, 70], [2]]} if text == "winsor_cam" else {}
    out = page.evaluate(
        f"""async ([feeds, targets]) => {{
          const ort = await import('./ort/ort.wasm.min.mjs');
          ort.env.wasm.wasmPaths = new URL('ort/', location.href).href;
          ort.env.wasm.numThreads = 1;
          const session = await ort.InferenceSession.create('one_file.onnx?' + Math.random());
          const inputs = {{target: new ort.Tensor('int64', BigInt64Array.from(targets.map(BigInt)), [2])}};
          for (const [name, [data, dims]] of Object.entries(feeds)) {{
            inputs[name] = new ort.Tensor('float32', Float32Array.from(data), dims);
          }}
          const {{map}} = await session.run(inputs);
          await session.release();
          return ({AS_TEXT})(map.data);
        }}""",
        [feeds, targets],
    )
    options: dict[str, Any] = {"percentile": 70} if text == "winsor_cam" else {}
    want = camrt.load(exported).explain(images, text, targets, **options).maps
    np.testing.assert_allclose(minmax(floats(out).reshape(want.shape)), minmax(want), atol=1e-4)
    path.unlink()


# ---- the folder


@needs_runtime
def test_a_page_is_replaced_and_nothing_else_is(shapes: Path, tmp_path: Path) -> None:
    first = make_page(shapes, tmp_path / "site", ["grad_cam"])
    (first / "left over").write_text("x")
    make_page(shapes, tmp_path / "site", ["winsor_cam:layer_aggregation=max", "layer_cam"])
    said = json.loads((first / "site.json").read_text())
    assert [m["label"] for m in said["methods"]] == ["Winsor-CAM (layer_aggregation max)", "LayerCAM"]
    assert not (first / "left over").exists() and sorted(f.name for f in tmp_path.iterdir()) == ["site"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(camrt.CamrtError, match="exists, and is not a page"):
            make_page(shapes, taken)
    with pytest.raises(camrt.CamrtError, match="lies in the bundle"):
        make_page(shapes, shapes / "site")
    make_page(shapes, tmp_path / "mine" / "new" / "site", ["grad_cam"])


@needs_runtime
def test_what_a_page_cannot_be(
    shapes: Path, bundle: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"preprocess": None}))
    out = ["--out", str(tmp_path / "site")]
    for arguments, message in (
        ([str(bundle)], "does not say how to preprocess"),
        ([str(shapes), "--methods", "eigen_cam"], "cannot be compiled to one file"),
        ([str(shapes), "--methods", "grad_cams"], "did you mean 'grad_cam'"),
        ([str(shapes), "--examples", "none.png"], "none.png: no such file"),
        ([str(shapes), "--runtime", str(tmp_path)], "lacks onnxruntime-web's files"),
        ([str(shapes), "--serve", "here"], "--serve here: use HOST:PORT"),
        ([str(tmp_path / "no.camrt")], "no such bundle"),
    ):
        assert main(["page", *arguments, *out]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "site").exists(), arguments


def test_without_npm_a_message_says_what_to_do(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CAMRT_CACHE", str(tmp_path / "cache"))
    assert main(["page", str(shapes), "--out", str(tmp_path / "site")]) == 2
    assert "npm, which fetches it, is missing: install npm" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


def test_what_npm_brings_is_checked(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command in npm's place writes another file, or fails."""
    monkeypatch.setenv("CAMRT_CACHE", str(tmp_path / "cache"))
    npm = tmp_path / "npm"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, message in (
        (f"echo other > onnxruntime-web-{web_runtime.VERSION}.tgz", "fetched another onnxruntime-web"),
        ("echo no network >&2; exit 1", "npm could not fetch onnxruntime-web 1.30.0: no network"),
    ):
        npm.write_text(f"#!/bin/sh\n{script}\n")
        npm.chmod(0o755)
        assert main(["page", str(shapes), "--out", str(tmp_path / "site")]) == 2
        assert message in capsys.readouterr().err and not list((tmp_path / "cache").iterdir())


def test_the_server_sends_types_and_headers_and_no_listing(tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    (tmp_path / "a.mjs").write_text("1")
    (tmp_path / "folder").mkdir()
    with server(tmp_path, port=0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_address[1]}/"
        with urllib.request.urlopen(address + "a.mjs") as answer:
            assert answer.headers["Content-Type"] == "text/javascript"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        for path in ("folder/", "../tests/conftest.py", "none"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)
        with pytest.raises(camrt.CamrtError, match="cannot be served"):
            server(tmp_path, port=running.server_address[1])
        running.shutdown()
