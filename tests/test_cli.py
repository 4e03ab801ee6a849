"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, import_torchvision, small_net

import camrt
from camrt.cli import main
from camrt.image_files import find_images
from camrt.runtime.bundle.reading import read_bundle

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def build():
    return Net()

def broken():
    raise RuntimeError("no weights here")

number = 3
Holder = list
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module that makes a model, and photos, one of them no image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    (tmp_path / "mymodels.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name in ("photos/a.png", "photos/deep/a.png", "photos/b.jpg", "other.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("camrt: ") and "Traceback" not in error
    return error


RECIPE = ["--resize", "32", "32", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]


def test_export_info_verify_explain_a_callable(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    command = [
        "export",
        "mymodels:build",
        "net.camrt",
        "--input-shape",
        "3",
        "32",
        "32",
        "--classes",
        "names.txt",
        *RECIPE,
    ]
    assert main(command) == 0
    assert "net.camrt: 2 layers, 11 programs" in capsys.readouterr().out

    assert main(["info", "net.camrt"]) == 0
    shown = capsys.readouterr().out
    assert "build: 3 x 32 x 32 -> 4 classes" in shown and "from torch mymodels:build" in shown
    assert "body.0" in shown and "conv, before batch norm" in shown and "layer_maps.onnx" in shown
    assert main(["info", "net.camrt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_classes"] == 4

    assert main(["verify", "net.camrt"]) == 0  # the source is built again, with the same random weights
    table = capsys.readouterr().out
    assert "reference: mymodels:build in PyTorch, in float64" in table and "winsor_cam max p" in table
    assert "comparisons passed" in table and "FAIL" not in table

    command = ["explain", "net.camrt", "photos", "other.png", "--out", "maps", "--percentile", "50", "--batch", "2"]
    assert main(command) == 0
    assert "4 of 4 images explained with winsor_cam: maps" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "maps/explanations.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["photos/a.png", "photos/b.jpg", "photos/deep/a.png", "other.png"]
    assert {p.relative_to(folder / "maps").as_posix() for p in (folder / "maps").rglob("*.*")} == {
        *("explanations.json", "explanations.jsonl"),
        *(f"{stem}.{kind}" for stem in ("a", "b", "deep/a", "other") for kind in ("npy", "png")),
    }
    explainer = camrt.load("net.camrt")
    want = explainer.explain("photos/b.jpg", percentile=50)
    np.testing.assert_allclose(np.load("maps/b.npy"), want.maps[0], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(Image.open("maps/b.png")), want.overlay(0))
    assert Image.open("maps/b.png").size == Image.open("photos/b.jpg").size
    second = lines[1]
    assert second["target"] == int(want.logits[0].argmax()) == second["top"][0]["class"]
    assert second["top"][0]["name"] in ("ant", "bee", "cat", "dog") and second["options"]["percentile"] == 50
    assert abs(sum(t["probability"] for t in second["top"]) - 1) < 1e-4
    np.testing.assert_allclose(second["layer_weights"]["body.0"], want.layer_weights[0, 0], atol=1e-5)


def test_targets_by_name_and_number(folder: Path, exported: Path) -> None:
    assert (
        main(["explain", str(exported), "other.png", "--target", "cat", "3", "--method", "grad_cam", "--no-overlay"])
        == 0
    )
    maps = np.load("explanations/other.npy")
    explainer = camrt.load(exported)
    np.testing.assert_allclose(maps, explainer.explain("other.png", "grad_cam", [[2, 3]]).maps[0], atol=1e-5)
    assert not list(Path("explanations").glob("*.png"))
    record = json.loads(Path("explanations/explanations.jsonl").read_text())
    assert record["target"] == [2, 3]


def test_layers_are_chosen_by_name(folder: Path, exported: Path) -> None:
    assert main(["explain", str(exported), "other.png", "--layers", "stem", "head.0", "--no-maps"]) == 0
    record = json.loads(Path("explanations/explanations.jsonl").read_text())
    assert list(record["layer_weights"]) == ["stem", "head.0"] and not list(Path("explanations").glob("*.npy"))


def test_an_unreadable_image_is_named_and_the_others_are_explained(
    folder: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos/aa.png").write_text("no pixels")
    assert main(["explain", str(exported), "photos"]) == 1
    printed = capsys.readouterr()
    assert "photos/aa.png: not a readable image" in printed.err and "3 of 4 images explained" in printed.out


def test_images_by_file_folder_and_pattern(folder: Path) -> None:
    assert find_images(["photos/*.png", "photos", "other.png", "photos/a.png"]) == [
        Path(p) for p in ("photos/a.png", "photos/b.jpg", "photos/deep/a.png", "other.png")
    ]


def test_export_of_a_saved_program(folder: Path) -> None:
    program = torch.export.export(
        small_net(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("b")},)
    )
    torch.export.save(program, "small.pt2")
    assert main(["export", "small.pt2", "small.camrt", "--layers", "conv"]) == 0
    explainer = camrt.load("small.camrt")
    assert explainer.layers == ("stem", "block.0", "head.0")
    direct = camrt.load(camrt.export_model(small_net(), "direct.camrt", (3, 32, 32), "conv"))
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(explainer.explain(image).maps, direct.explain(image).maps, atol=1e-5)
    assert main(["verify", "small.camrt"]) == 0


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """camrt in a process of its own, where torchvision is made importable first."""
    code = (
        "from support import import_torchvision; import_torchvision(); from camrt.cli import main; raise "
        "SystemExit(main())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_export_and_verify_torchvision(folder: Path) -> None:
    done = run(
        folder,
        "export",
        "torchvision:shufflenet_v2_x0_5",
        "net.camrt",
        "--input-shape",
        "3",
        "64",
        "64",
        "--layers",
        "last",
    )
    assert done.returncode == 0, done.stderr
    assert "It records no preprocessing" in done.stdout and "tracing the model" in done.stderr
    done = run(folder, "verify", "net.camrt")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(folder, "verify", "net.camrt", "torchvision:shufflenet_v2_x1_0")
    assert done.returncode == 2 and "torchvision:shufflenet_v2_x1_0 has other weights than the bundle" in done.stderr


def test_export_timm(folder: Path) -> None:
    """An architecture that timm has no weights for, so that nothing is downloaded; its preprocessing is timm's."""
    done = run(folder, "export", "timm:lcnet_035", "net.camrt", "--layers", "last")
    assert done.returncode == 0, done.stderr
    recipe = camrt.load(folder / "net.camrt").manifest.preprocess
    assert recipe == camrt.Preprocess(256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), "bilinear")
    done = run(folder, "export", "timm:resnet5000", "other.camrt")
    assert done.returncode == 2 and "timm could not make 'resnet5000'" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet50", "'resnet50' names no model: use package.module:callable"),
        ("mymodels:missing", "module 'mymodels' has no 'missing'"),
        ("mymodels:broken", "mymodels:broken raised RuntimeError: no weights here"),
        ("mymodels:number", "'int' object is not callable"),
        ("nowhere:build", "cannot import 'nowhere'"),
        ("missing.pt2", "missing.pt2: no such file"),
        ("torchvision:resnet5000", "torchvision has no classification model 'resnet5000'"),
        ("torchvision:resnet18:BEST", "torchvision has no weights 'BEST' for resnet18: it has IMAGENET1K_V1, DEFAULT"),
        ("mymodels:Holder", "mymodels:Holder gave a list, not a torch.nn.Module"),
        ("mymodels.py.pt2", "no such file"),
        ("missing.onnx", "missing.onnx: no such file"),
        ("mymodels:build", "does not record its input's size: pass e.g. --input-shape 3 224 224"),
    ],
)
def test_sources_that_cannot_be_opened(
    folder: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    if source.startswith("torchvision:"):
        import_torchvision()
    assert message in refusal(capsys, "export", source, "out.camrt")
    assert not (folder / "out.camrt").exists()


def test_a_file_that_is_no_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "damaged.pt2").write_bytes(b"not a zip")
    assert "damaged.pt2: not a torch.export program" in refusal(capsys, "export", "damaged.pt2", "out.camrt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "0.5"], "preprocessing needs both --mean and --std"),
        (["--resize", "1", "2", "3", *RECIPE[3:]], "--resize [1, 2, 3]: one number for the shorter side"),
        (["--resize", "30", "30", *RECIPE[3:]], "preprocess gives (30, 30), the network takes (32, 32)"),
        ([*RECIPE, "--interpolation", "cubic"], "preprocess interpolation 'cubic'"),
        (["--layers", "body.1", "boddy.0"], "the model has no layer 'boddy.0': did you mean 'body.0'"),
        (["--classes", "missing.json"], "missing.json: no class names"),
    ],
)
def test_export_options_that_do_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = ("export", "mymodels:build", "out.camrt", "--input-shape", "3", "32", "32", *options)
    assert message in refusal(capsys, *command)


def test_explain_refusals(folder: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(exported)
    assert "nothing.png: no such file" in refusal(capsys, "explain", bundle, "nothing.png")
    assert "no class 'cow' of this bundle: it has 'ant', 'bee'" in refusal(
        capsys, "explain", bundle, "other.png", "--target", "cow"
    )
    assert "class 9 is out of range" in refusal(capsys, "explain", bundle, "other.png", "--target", "9")
    assert "percentile 120.0 is outside" in refusal(capsys, "explain", bundle, "other.png", "--percentile", "120")
    assert "no method 'gradcam': did you mean 'grad_cam'" in refusal(
        capsys, "explain", bundle, "other.png", "--method", "gradcam"
    )
    (folder / "empty").mkdir()
    assert "empty: no images there" in refusal(capsys, "explain", bundle, "empty")
    assert "no such bundle" in refusal(capsys, "explain", "none.camrt", "other.png")
    assert "max_batch 0" in refusal(capsys, "explain", bundle, "other.png", "--batch", "0")
    (folder / "taken").write_text("")
    assert "taken: cannot be written" in refusal(capsys, "explain", bundle, "other.png", "--out", "taken")


def test_verify_fails_with_an_exit_code_and_rows(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle whose rule was wrong when it was exported."""
    from camrt.export.autodiff import RULES

    right = RULES["Relu"]
    RULES["Relu"] = lambda op, node, g: (g,)
    monkeypatch.setattr("camrt.export.check.GRADIENT_LIMIT", np.inf)  # export itself would refuse it
    try:
        assert main(["export", "mymodels:build", "net.camrt", "--input-shape", "3", "32", "32"]) == 0
    finally:
        RULES["Relu"] = right
    capsys.readouterr()
    assert main(["verify", "net.camrt", "--all"]) == 1
    table = capsys.readouterr().out
    assert "FAIL gradients.onnx" in table and "gradient body.0" in table


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(c in shown for c in ("export", "info", "explain", "verify", "demo"))


def test_a_refused_run_leaves_earlier_results(folder: Path, exported: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save("photo.png")
    assert main(["explain", str(exported), "photo.png"]) == 0
    before = Path("explanations/explanations.jsonl").read_text()
    assert before and main(["explain", str(exported), "photo.png", "--layers", "nope"]) == 2
    assert main(["explain", str(exported), "photo.png", "--target=--5"]) == 2
    assert Path("explanations/explanations.jsonl").read_text() == before
    names = sorted(p.name for p in Path("explanations").iterdir())
    assert names == ["explanations.json", "explanations.jsonl", "photo.npy", "photo.png"]


def test_torchvision_weights_that_were_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own file in its own place, with numbers of ours: classes and preprocessing come with the
    weights.
    """
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    models = import_torchvision().models
    weights = models.SqueezeNet1_1_Weights.DEFAULT
    torch.manual_seed(3)
    file = folder / "torch" / "hub" / "checkpoints" / Path(weights.url).name
    file.parent.mkdir(parents=True)
    torch.save(models.squeezenet1_1().state_dict(), file)
    assert main(["export", "torchvision:squeezenet1_1:DEFAULT", "net.camrt", "--layers", "last"]) == 0
    manifest = camrt.load("net.camrt").manifest
    assert manifest.classes is not None and manifest.classes[340] == "zebra" and manifest.preprocess is not None
    assert (manifest.preprocess.resize, manifest.preprocess.crop) == (256, (224, 224))
    assert manifest.preprocess.mean == (0.485, 0.456, 0.406)


def test_the_module_is_the_command(exported: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "camrt", "info", str(exported)], capture_output=True, text=True)
    assert done.returncode == 0 and "block.0" in done.stdout


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "camrt: interrupted\n"),
        (PermissionError(13, "Permission denied", "x.png"), 2, "camrt: x.png: Permission denied\n"),
        (BrokenPipeError(), 0, ""),
    ],
    ids=["interrupt", "permission", "pipe"],
)
def test_how_a_command_ends(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: object) -> int:
        raise raised

    monkeypatch.setattr("camrt.commands.info.run", command)
    assert main(["info", "x.camrt"]) == code
    assert capsys.readouterr().err == said


def test_info_says_what_programs_take_and_give(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For whoever runs them without camrt: every tensor of every program, as text and as JSON."""
    assert main(["info", str(exported), "--programs"]) == 0
    text = capsys.readouterr().out
    assert "layer_maps.onnx (layer_maps, float32): the mean gradients of layers" in text
    assert "  in  seed [seeds, 5]\n" in text and "  out gradient:LAYER [seeds, K, h, w] for each layer\n" in text
    assert "seed: the cotangent of the logits" in text and "A row of zeros stands for the image's top class" in text
    assert main(["info", str(exported), "--programs", "--json"]) == 0
    programs = json.loads(capsys.readouterr().out)
    manifest = read_bundle(exported).manifest
    assert [p["file"] for p in programs] == [p.file for p in manifest.programs]
    for said, program in zip(programs, manifest.programs, strict=True):
        assert said["layers"] == list(program.taps) and said["purpose"]
        for part in ("inputs", "outputs"):
            assert {n: t["shape"] for n, t in said[part].items()} == getattr(program, part)
            assert all(t["meaning"] and t["type"] == "float32" for t in said[part].values())


def test_info_lists_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("auto ->")] and any(
        "onnxruntime " in x for x in lines
    )
    assert "name a bundle" in refusal(capsys, "info")


def test_verify_on_given_images(folder: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported), "support:small_net", "--images", "photos", "other.png"]) == 0
    assert "passed" in capsys.readouterr().out


def test_class_names_and_sizes_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "names.json").write_text('{"0": "ant"}')
    shape = ["--input-shape", "3", "32", "32"]
    said = refusal(capsys, "export", "mymodels:build", "a.camrt", *shape, "--classes", "names.json")
    assert "expected a JSON list of names" in said
    mean = ["--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1"]
    assert main(["export", "mymodels:build", "b.camrt", *shape, *mean]) == 0  # resized to the input
    recipe = camrt.load("b.camrt").manifest.preprocess
    assert recipe is not None and recipe.resize == (32, 32)
    assert main(["export", "mymodels:build", "c.camrt", *shape, *mean, "--resize", "40", "--crop", "32", "32"]) == 0
    recipe = camrt.load("c.camrt").manifest.preprocess
    assert recipe is not None and recipe.resize == 40


def test_a_model_that_ends_in_a_softmax_is_verified_by_its_own_weights(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mymodels.py").write_text(
        MODULE + "\ndef softmaxed(seed=0):\n    torch.manual_seed(seed)\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(6, 4), nn.Softmax(1)).eval()\n\ndef other():\n    return softmaxed(1)\n"
    )
    assert main(["export", "mymodels:softmaxed", "s.camrt", "--input-shape", "3", "32", "32"]) == 0
    assert main(["verify", "s.camrt", "mymodels:softmaxed"]) == 0
    assert "the bundle's own forward graph" in capsys.readouterr().out  # no module of it returns the logits
    assert "other weights than the bundle" in refusal(capsys, "verify", "s.camrt", "mymodels:other")
