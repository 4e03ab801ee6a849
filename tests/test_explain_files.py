"""camrt explain over many files: names, resuming, what ends it early, what it reads and what it leaves out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import camrt
from camrt.cli import main
from camrt.image_files import ImageFiles, collect
from camrt.results_folder import distinct_stems
from camrt.runtime.images.preprocess import checked_recipe

RNG = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve photos in three folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "photos/a.jpg", "photos/b.bmp", "photos/sub/a.png", "photos/sub/deep/c.webp"):
        save(Path(name))
    for i in range(7):
        save(Path(f"photos/more/{i}.png"))
    return tmp_path / "photos"


def save(path: Path, size: tuple[int, int] = (40, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def explain(bundle: Path, *arguments: str) -> int:
    return main(["explain", str(bundle), *arguments])


def lines(out: str = "explanations") -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(Path(out).glob("*.jsonl")) for line in file.read_text().splitlines()]


def results(out: str = "explanations") -> set[str]:
    return {p.relative_to(out).as_posix() for p in Path(out).rglob("*") if p.suffix in (".png", ".npy")}


def test_folders_are_kept_and_lines_say_where_results_are(exported: Path, photos: Path) -> None:
    assert explain(exported, "photos", "--batch", "5") == 0
    stems = {"a", "a-2", "b", "sub/a", "sub/deep/c", *(f"more/{i}" for i in range(7))}
    assert results() == {f"{s}.{kind}" for s in stems for kind in ("png", "npy")}
    said = {line["image"]: line for line in lines()}
    assert len(said) == 12
    for image, line in said.items():
        assert line["sha256"] == hashlib.sha256(Path(image).read_bytes()).hexdigest()
        assert line["size"] == [40, 50] and Image.open(Path("explanations", line["overlay"])).size == (50, 40)
        assert np.load(Path("explanations", line["map"])).shape == (32, 32)
        assert line["bundle_sha256"] == hashlib.sha256((exported / "manifest.json").read_bytes()).hexdigest()
        assert line["camrt"] == camrt.__version__ and line["engine"] and line["precision"] == "fp32"
        weights = np.array(list(line["layer_weights"].values()), np.float32)
        assert all(len(repr(w)) < 14 for w in line["layer_weights"].values()) and weights.any()
    explainer = camrt.load(exported)
    want = explainer.explain("photos/sub/a.png")
    line = said["photos/sub/a.png"]
    assert line["target"] == int(want.logits[0].argmax())
    assert np.float32(line["top"][0]["probability"]) == pytest.approx(want.probabilities[0].max(), rel=1e-5)


def test_again_and_resumed(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(exported, "photos/more", "--percentile", "50") == 0
    first = lines()
    assert explain(exported, "photos/more", "--percentile", "50") == 0
    assert [line["image"] for line in lines()] == [line["image"] for line in first]
    capsys.readouterr()
    save(Path("photos/more/3.png"))  # another picture
    Path("explanations/5.npy").unlink()
    save(Path("photos/more/8.png"))
    assert explain(exported, "photos/more", "--percentile", "50", "--resume") == 0
    said = capsys.readouterr().out
    assert "3 of 8 images explained" in said and "5 were finished before" in said
    again = {line["image"]: line for line in lines()}
    assert len(lines()) == len(again) == 8
    for line in first:
        assert (again[line["image"]]["sha256"] == line["sha256"]) == (line["image"] != "photos/more/3.png")
    assert results() == {f"{i}.{kind}" for i in (*range(7), 8) for kind in ("png", "npy")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--percentile", "40"], "options {"),
        (["--method", "grad_cam"], 'method "winsor_cam", these have "grad_cam"'),
        (["--target", "1"], "target null, these have 1"),
        (["--layers", "last"], 'layers null, these have "last"'),
        (["--colormap", "jet"], "overlays {"),
        (["--no-maps"], "maps true, these have false"),
    ],
    ids=str,
)
def test_another_configuration_does_not_mix(
    arguments: list[str], said: str, exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(exported, "photos/a.png") == 0
    before = Path("explanations/explanations.jsonl").read_bytes()
    assert explain(exported, "photos/b.bmp", "--resume", *arguments) == 2
    assert f"explanations holds explanations with {said}" in capsys.readouterr().err
    assert Path("explanations/explanations.jsonl").read_bytes() == before and results() == {"a.png", "a.npy"}


def test_a_refused_run_leaves_nothing(exported: Path, photos: Path) -> None:
    assert explain(exported, "photos", "--percentile", "120") == 2
    assert explain(exported, "photos", "--opacity", "2") == 2
    assert explain(exported, "photos", "--colormap", "rainbow") == 2
    assert not Path("explanations").exists()
    assert explain(exported, "photos") == 0


def test_results_are_no_images(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(exported, "photos", "--out", "photos/maps") == 0
    assert explain(exported, "photos", "--out", "photos/maps", "--resume") == 0
    assert "12 were finished before" in capsys.readouterr().out
    assert explain(exported, "photos", "--out", "elsewhere") == 0  # what lies in photos/maps is left out
    said = capsys.readouterr().out
    assert "12 of 12 images explained" in said and "in a folder of earlier explanations" in said
    for out in ("photos", "photos/sub/.."):
        assert explain(exported, "photos", "--out", out) == 2
        assert "its results would lie among the images" in capsys.readouterr().err
    assert explain(exported, "photos/more/1.png", "--out", "photos/more") == 2


def test_what_is_skipped_is_counted_by_reason(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "notes.txt").write_text("x")
    (photos / "more" / "list.txt").write_text("x")
    (photos / ".hidden.png").write_bytes(b"x")
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    assert explain(exported, "photos") == 1
    captured = capsys.readouterr()
    assert "12 of 14 images explained" in captured.out
    assert "not explained: 2 not a readable image" in captured.out
    assert "skipped: 2 .txt, no image format, 1 hidden" in captured.out
    assert captured.err.count("not a readable image") == 2 and "photos/broken.png: not a readable" in captured.err
    assert explain(exported, "photos", "--resume") == 1
    assert "12 were finished before" in capsys.readouterr().out


def test_a_list_and_shards_make_the_same_results(exported: Path, photos: Path) -> None:
    assert explain(exported, "photos", "--out", "whole") == 0
    for i in (3, 1, 2):
        assert explain(exported, "photos", "--out", "parts", "--shard", f"{i}/3") == 0
    assert sorted(p.name for p in Path("parts").glob("*.jsonl")) == [f"explanations-{i}-of-3.jsonl" for i in (1, 2, 3)]
    assert results("parts") == results("whole")
    whole = {line["image"]: line for line in lines("whole")}
    assert {line["image"]: line for line in lines("parts")} == whole
    (photos / "list.txt").write_text("# some\na.png\nsub/a.png\n\n")
    assert explain(exported, "--list", "photos/list.txt", "--out", "listed") == 0
    assert [line["image"] for line in lines("listed")] == ["photos/a.png", "photos/sub/a.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photos", "--shard", "0/3"], "--shard 0/3: write 2/8"),
        (["photos", "--shard", "4/3"], "--shard 4/3: write 2/8"),
        ([], "name images, folders or patterns, or a --list"),
        (["--list", "none.txt"], "none.txt: no list of images"),
        (["photos", "--jobs", "0"], "batch and jobs: use 1 or more"),
        (["photos", "--opacity", "1.5"], "opacity 1.5: use a number from 0 to 1"),
        (["photos", "--colormap", "virids"], "no colour map 'virids': did you mean 'viridis'"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(
    arguments: list[str], said: str, exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(exported, *arguments) == 2
    assert said in capsys.readouterr().err


def test_names_of_a_million_files_take_seconds() -> None:
    """All of one stem, and each in the case of another: quadratic work would take hours."""
    images = ImageFiles({Path(f"{i}/x.png"): Path("X.png" if i % 2 else "x.png") for i in range(200_000)})
    stems = distinct_stems(images)
    assert len({s.casefold() for s in stems.values()}) == 200_000
    taken = ImageFiles({Path(n): Path(n) for n in ("x-2.png", "x.jpg", "x.png", "x.bmp")})
    assert list(distinct_stems(taken).values()) == ["x-2", "x", "x-3", "x-4"]


MANY = 400  # a few seconds' work, so that there is time to kill it


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_killed_run_keeps_what_was_finished(how: signal.Signals, exported: Path, photos: Path) -> None:
    save(Path("many/000.png"), (300, 400))
    for i in range(1, MANY):
        Path(f"many/{i:03}.png").hardlink_to("many/000.png")
    command = [sys.executable, "-m", "camrt", "explain", str(exported), "many", "--batch", "2", "--jobs", "1"]
    whole = Path("explanations/explanations.jsonl")

    def run_and_kill(at_least: int, *more: str) -> tuple[int, str]:
        process = subprocess.Popen(
            [*command, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for what runs behind
        )
        while process.poll() is None and (not whole.exists() or whole.read_bytes().count(b"\n") < at_least):
            time.sleep(0.005)
        process.send_signal(how)
        _, said = process.communicate()
        return process.returncode, said

    code, said = run_and_kill(5)
    assert code in {signal.SIGTERM: (143,), signal.SIGINT: (130,), signal.SIGKILL: (-9,)}[how], said
    assert "Traceback" not in said
    if how != signal.SIGKILL:
        assert all(json.loads(line)["image"] for line in whole.read_text().splitlines())
    finished = whole.read_bytes().split(b"\n")[:-1]
    assert 5 <= len(finished) < MANY
    whole.write_bytes(whole.read_bytes() + b'{"image": "torn')
    code, said = run_and_kill(10)  # again, not resumed: nothing that was finished is lost
    kept = {json.loads(line)["image"] for line in whole.read_bytes().split(b"\n")[:-1]}
    assert {json.loads(line)["image"] for line in finished} <= kept
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    assert len({line["image"] for line in lines()}) == len(lines()) == MANY
    assert results() == {f"{i:03}.{kind}" for i in range(MANY) for kind in ("png", "npy")}
    for line in lines():
        assert np.load(Path("explanations", line["map"])).shape == (32, 32)
        Image.open(Path("explanations", line["overlay"])).load()
    assert not [p for p in Path("explanations").iterdir() if p.suffix == ".part"] or how == signal.SIGKILL


def test_a_changed_picture_is_never_described_by_an_old_line(exported: Path, photos: Path) -> None:
    """Also where a run is killed between a picture's files and its line, and where size and time are the old ones."""
    for i in range(MANY // 2):
        save(Path(f"many/{i:03}.bmp"))
    assert explain(exported, "many") == 0
    for i in range(MANY // 2):
        before = Path(f"many/{i:03}.bmp").stat()
        save(Path(f"many/{i:03}.bmp"))
        os.utime(f"many/{i:03}.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    command = [sys.executable, "-m", "camrt", "explain", str(exported), "many", "--batch", "2"]
    whole, size = Path("explanations/explanations.jsonl"), Path("explanations/explanations.jsonl").stat().st_size
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and whole.stat().st_size < size + 2000:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    explainer = camrt.load(exported)
    last = {line["image"]: line for line in lines()}
    described = [line for line in last.values() if not line.get("unfinished")]
    for line in described:
        if line["sha256"] == hashlib.sha256(Path(line["image"]).read_bytes()).hexdigest():
            want = explainer.explain(line["image"]).maps[0]
            np.testing.assert_allclose(np.load(Path("explanations", line["map"])), want, atol=1e-5)
    old = [line for line in described if line["sha256"] != hashlib.sha256(Path(line["image"]).read_bytes()).hexdigest()]
    assert 0 < len(old) < MANY // 2
    for line in old[:20]:  # still the files of the old picture
        assert Path("explanations", line["map"]).stat().st_mtime < whole.stat().st_mtime
        new = explainer.explain(line["image"]).maps[0]
        assert np.abs(np.load(Path("explanations", line["map"])) - new).max() > 1e-4
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    for line in lines():
        assert line["sha256"] == hashlib.sha256(Path(line["image"]).read_bytes()).hexdigest()


def test_two_runs_do_not_share_a_folder_by_accident(
    exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    assert explain(exported, "photos/a.png") == 0
    with Path("explanations/explanations.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert explain(exported, "photos/b.bmp") == 2
    assert "another run writes there" in capsys.readouterr().err
    assert explain(exported, "photos/b.bmp") == 0


def test_shards_are_merged_by_a_run_without(exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (1, 2):
        assert explain(exported, "photos", "--shard", f"{i}/2") == 0
    save(photos / "b.bmp")
    capsys.readouterr()
    assert explain(exported, "photos", "--resume") == 0
    assert "11 were finished before" in capsys.readouterr().out
    assert [p.name for p in Path("explanations").glob("*.jsonl")] == ["explanations.jsonl"]
    assert len(lines()) == len({line["image"] for line in lines()}) == 12


def test_one_name_in_two_folders_is_two_images(exported: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(photos.parent / "out")
    for folder in ("more", "sub"):
        monkeypatch.chdir(photos / folder)
        save(Path("5.png"))
        assert explain(exported, "5.png", "--out", out) == 0
    assert results(out) == {"5.png", "5.npy", "5-2.png", "5-2.npy"} and len(lines(out)) == 2
    assert explain(exported, str(Path("5.png").absolute()), "--out", out, "--resume") == 0
    assert len(lines(out)) == 2


def test_names_that_make_trouble_are_a_line_each(
    exported: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file name that is no UTF-8, one of the greatest length, a folder called as a picture's overlay, a pipe."""
    source = photos / "a.png"
    os.link(os.fsencode(source), os.fsencode(photos) + b"/bad\xff.png")
    (photos / f"{'n' * 251}.png").hardlink_to(source)
    (photos / "x.jpg").hardlink_to(photos / "a.jpg")
    (photos / "x.png").mkdir()
    (photos / "x.png" / "y.png").hardlink_to(source)
    os.mkfifo(photos / "pipe.png")
    (photos / "zero.png").symlink_to("/dev/zero")
    assert explain(exported, "photos") == 0
    said = capsys.readouterr().out
    assert "16 of 16 images explained" in said and "2 neither a file nor a folder" in said
    assert len(lines()) == 16 and results() >= {"x-2.png", "x.png/y.png", f"{'n' * 251}.png"}
    assert explain(exported, "photos", "--resume") == 0
    assert "16 were finished before" in capsys.readouterr().out
    assert explain(exported, "photos/pipe.png") == 2
    Path("explanations/explanations.json").write_text("[]")
    assert explain(exported, "photos") == 2
    assert "it is no JSON object" in capsys.readouterr().err


def test_a_picture_that_would_grow_without_bound_is_refused(exported: Path) -> None:
    recipe = camrt.Preprocess(140, (0.5,) * 3, (0.25,) * 3, crop=(128, 128))
    with pytest.raises(camrt.CamrtError, match="1 x 65000 pixels become 140 x 9100000 by the recipe"):
        checked_recipe(dataclasses.replace(camrt.load(exported).manifest, preprocess=recipe), "it", (1, 65000))


def test_from_python(exported: Path, photos: Path) -> None:
    problems: list[str] = []
    (photos / "broken.png").write_bytes(b"no picture")
    summary = camrt.explain_files(
        exported, "photos", "out", "grad_cam", target=["cat", 3], problem=problems.append, overlays=False
    )
    assert summary.explained == 12 and summary.failed == 1 and "broken.png" in problems[0]
    want = camrt.load(exported).explain("photos/b.bmp", "grad_cam", [[2, 3]])
    np.testing.assert_allclose(np.load("out/b.npy"), want.maps[0], atol=1e-5)
    assert results("out") == {name for name in results("out") if name.endswith(".npy")}
    before = np.load("out/a.npy")  # of a.jpg: a.png is a-2, now as before
    again = camrt.explain_files(camrt.load(exported), ["photos/a.png"], "out", "grad_cam", ["cat", 3], overlays=False)
    assert again.explained == 1 and len(lines("out")) == 12 and results("out") >= {"a.npy", "a-2.npy"}
    np.testing.assert_array_equal(np.load("out/a.npy"), before)
    with pytest.raises(camrt.CamrtError, match="class 9 is out of range"):
        camrt.explain_files(exported, "photos", "out2", target=9)
    assert not Path("out2").exists()


def test_progress_without_a_terminal(exported: Path, photos: Path) -> None:
    code = (
        "import sys\nfrom camrt.commands import explain\nexplain.QUIET = 0.0\n"
        f"from camrt.cli import main\nsys.exit(main(['explain', {str(exported)!r}, 'photos/more']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "camrt: 7 of 7 images, " in done.stderr and " a second" in done.stderr


def test_collecting_follows_no_loop_and_takes_every_format(photos: Path) -> None:
    for suffix in ("tga", "ico", "jp2", "pcx", "ppm", "tiff", "gif", "sgi"):
        Image.new("RGB", (32, 32), "red").save(photos / f"x.{suffix}")
    (photos / "more" / "up").symlink_to(photos, target_is_directory=True)
    found = collect(["photos"])
    assert len(found.names) == 12 + 8
    assert len(collect(["photos", "photos"]).names) == len(found.names)
    assert os.fspath(next(iter(found.names.values()))) == "a.jpg"
