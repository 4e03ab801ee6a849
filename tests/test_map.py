"""`camrt map` on one machine: sources, rows, resuming, workers that die. On a cluster: test_map_ray.py."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import camrt
from camrt.cli import main
from camrt.demo.scenes import draw_scene
from camrt.kernels import minmax
from camrt.mapping.places import RUN, Place, find
from camrt.mapping.rows import Wanted
from camrt.mapping.run import Means, Summary, map_images
from camrt.mapping.tasks import plan
from camrt.runtime.errors import InputError

ONE = Means("onnxruntime", workers=1)
SHAPES = Path(camrt.__file__).parent / "demo" / "shapes.camrt"


def encoded(seed: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(draw_scene(seed)[0]).save(out, kind)
    return out.getvalue()


PICTURES = [encoded(i) for i in range(20)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for i, data in enumerate(PICTURES):
        (folder / ("inner" if i % 3 == 0 else ".") / f"p{i:02d}.png").write_bytes(data)
    return folder


def rows_of(out: Path | str) -> dict[str, dict[str, Any]]:
    """By path; no path twice."""
    rows = pq.read_table(out).to_pylist()
    assert len({r["path"] for r in rows}) == len(rows)
    return {r["path"]: r for r in rows}


def explained(data: bytes, **arguments: Any) -> camrt.Explanation:
    return camrt.load(SHAPES, "onnxruntime", threads=1).explain(data, **arguments)


# ---- sources


def test_folders_patterns_tables_and_shards_hold_the_same_pictures(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "data" / "t.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"image": PICTURES, "label": list(range(20))}), table, row_group_size=6)
    hugging = tmp_path / "data" / "hf.parquet"
    structs = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(PICTURES)]
    pq.write_table(pa.table({"image": structs}), hugging)
    for name, mode in (("s.tar", "w"), ("s.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / "data" / name, mode) as tar:  # type: ignore[call-overload]
            for i, data in enumerate(PICTURES):
                for suffix, content in ((".png", data), (".cls", b"1")):
                    member = tarfile.TarInfo(f"a/{i:02d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    sources = {
        "folder": str(photos),
        "pattern": f"{photos}/**/*.png",
        "table": str(table),
        "hugging": str(hugging),
        "tar": str(tmp_path / "data" / "s.tar"),
        "gz": str(tmp_path / "data" / "s.tar.gz"),
    }
    found = {}
    for name, source in sources.items():
        summary = map_images(SHAPES, [source], str(tmp_path / name), Wanted(), ONE, part=7)
        assert (summary.images, summary.failed) == (20, 0), name
        found[name] = rows_of(tmp_path / name)
    assert sorted(found["folder"]) == sorted(map(str, photos.rglob("*.png")))
    assert next(iter(found["table"])) == f"{table}#0" and f"{hugging}#3:3.png" in found["hugging"]
    assert f"{tmp_path}/data/s.tar/a/07.png" in found["tar"]
    targets = [sorted(tuple(np.round(r["probabilities"], 4)) for r in rows.values()) for rows in found.values()]
    assert all(t == targets[0] for t in targets)


def test_a_pattern_is_of_names_and_parts_of_paths(photos: Path, tmp_path: Path) -> None:
    def names(pattern: str) -> int:
        return len(find(pattern))

    assert names(f"{photos}/*.png") == 13 and names(f"{photos}/**") == 20 and names(f"{photos}/*/p*.png") == 7
    assert names(f"{photos}/p0[12].png") == 2
    odd = photos / "[a].png"
    odd.write_bytes(PICTURES[0])
    assert names(str(odd)) == 1, "a file that is there is no pattern"
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "_mark.png").write_bytes(b"")
    assert names(str(photos)) == 21
    for wrong in (f"{photos}/*.gif", f"{photos}/none", str(tmp_path / "empty*")):
        with pytest.raises(InputError, match="no"):
            find(wrong)


def test_a_source_that_is_named_twice_is_explained_once(photos: Path, tmp_path: Path) -> None:
    summary = map_images(SHAPES, [str(photos), f"{photos}/*.png"], str(tmp_path / "o"), Wanted(map="none"), ONE)
    assert summary.images == len(rows_of(tmp_path / "o")) == 20


def test_each_file_once_whatever_links_and_spellings_there_are(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "loop").symlink_to(".")
    (photos / "inner" / "up").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    spellings = [
        "photos",
        "photos/",
        "./photos",
        "inner/../photos",
        f"file://{photos}",
        "photos/*.png",
        "photos/p0?.png",
    ]
    (tmp_path / "inner").mkdir()
    assert sum(t.images for t in plan(spellings, 100)) == 20
    assert len(find("photos/p0?.png")) == 6
    odd = tmp_path / "a b#[c] %41"
    odd.mkdir()
    raw = os.fsencode(odd) + b"/bad\xff.png"
    with open(raw, "wb") as file:  # noqa: PTH123  # a name that is not UTF-8
        file.write(PICTURES[0])
    (odd / "q?.PNG").write_bytes(PICTURES[1])
    address = "file://localhost" + quote(str(odd))
    assert [p.label for p, _ in find(address)] == [p.label for p, _ in find(str(odd))]
    assert map_images(SHAPES, [str(odd)], str(tmp_path / "o"), Wanted(map="none"), ONE).failed == 0
    assert sorted(Path(p).name for p in rows_of(tmp_path / "o")) == ["bad\\xff.png", "q?.PNG"]


def test_columns_that_hold_pictures(tmp_path: Path) -> None:
    pictures = pa.array(PICTURES[:3])
    kinds = {
        "large": pictures.cast(pa.large_binary()),
        "view": pictures.cast(pa.binary_view()),
        "dictionary": pictures.dictionary_encode(),
    }
    for name, column in kinds.items():
        pq.write_table(pa.table({"label": [1, 2, 3], "anything": column}), tmp_path / f"{name}.parquet")
    summary = map_images(SHAPES, [str(tmp_path)], str(tmp_path.parent / f"{tmp_path.name}-o"), Wanted(map="none"), ONE)
    assert (summary.images, summary.failed) == (9, 0)
    unclear = [
        pa.table({"image": ["a.png"], "thumb": [PICTURES[0]]}),
        pa.table({"a": [PICTURES[0]], "b": [PICTURES[1]]}),
    ]
    for i, table in enumerate(unclear):
        pq.write_table(table, tmp_path / "unclear.parquet")
        out = str(tmp_path / f"o{i}")
        assert map_images(SHAPES, [f"{tmp_path}/unclear.parquet"], out, Wanted(map="none"), ONE).failed == 1
        (row,) = rows_of(out).values()
        assert "no column that is certain to hold pictures" in row["error"]


def test_members_of_a_shard_have_paths_of_their_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i, name in enumerate(("a.png", "a.png", "__MACOSX/._a.png", ".hidden.png", "./b.JPG")):
            member = tarfile.TarInfo(name)
            member.size = len(PICTURES[i])
            tar.addfile(member, io.BytesIO(PICTURES[i]))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    map_images(SHAPES, [str(tmp_path / "s.tar")], str(tmp_path / "o"), Wanted(map="none"), ONE)
    names = [p.removeprefix(f"{tmp_path}/s.tar/") for p in rows_of(tmp_path / "o")]
    assert names == ["a.png", "a.png#2", "./b.JPG"]


# ---- rows


def test_rows_are_what_explain_gives(photos: Path, tmp_path: Path) -> None:
    wanted = Wanted(options={"percentile": 60}, target=2, map="float32", overlay=True)
    map_images(SHAPES, [str(photos)], str(tmp_path / "o"), wanted, ONE)
    for path, row in rows_of(tmp_path / "o").items():
        want = explained(Path(path).read_bytes(), target=2, percentile=60)
        got = np.array(row["map"], np.float32).reshape(128, 128)
        np.testing.assert_allclose(minmax(got), minmax(want.maps[0]), atol=1e-5)
        np.testing.assert_allclose(row["probabilities"], want.probabilities[0], atol=1e-5)
        np.testing.assert_allclose(row["layer_weights"], want.layer_weights[0], atol=1e-4)
        assert row["target"] == 2 and row["error"] is None
        shown = np.asarray(Image.open(io.BytesIO(row["overlay"])), np.int16)
        assert np.abs(shown - np.asarray(Image.open(io.BytesIO(want.png(0))), np.int16)).max() <= 2


def test_rows_of_the_same_batch_have_the_same_bits(photos: Path, tmp_path: Path) -> None:
    map_images(SHAPES, [f"{photos}/*.png"], str(tmp_path / "o"), Wanted(), Means("onnxruntime", 1, batch=13))
    rows = rows_of(tmp_path / "o")
    want = camrt.load(SHAPES, "onnxruntime", threads=1).explain([Path(p).read_bytes() for p in rows])
    for row, full in zip(rows.values(), want.maps, strict=True):
        np.testing.assert_array_equal(np.array(row["map"], np.float16), full.astype(np.float16).ravel())


@pytest.mark.parametrize("kind", ["png", "none"])
def test_maps_are_pictures_or_left_out(kind: str, photos: Path, tmp_path: Path) -> None:
    wanted = Wanted("grad_cam", map=kind)
    map_images(SHAPES, [f"{photos}/p01.png"], str(tmp_path / "o"), wanted, ONE)
    (row,) = rows_of(tmp_path / "o").values()
    if kind == "none":
        assert "map" not in row
        return
    got = np.asarray(Image.open(io.BytesIO(row["map"])), np.float32) / 255
    assert np.abs(got - minmax(explained(PICTURES[1], method="grad_cam").maps[0])).max() < 0.003


def test_what_cannot_be_explained_is_a_row(photos: Path, tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    bad = {
        "a.png": (b"", "not a readable image"),
        "b.png": (b"GIF89a", "not a readable image"),
        "c.png": (PICTURES[0][: len(PICTURES[0]) // 2], "not a readable image"),
        "d.png": (bomb.getvalue(), "at most 50000000 are allowed"),
    }
    for name, (data, _) in bad.items():
        (photos / name).write_bytes(data)
    (photos / "e.png").symlink_to("nowhere.png")
    (photos / "broken.tar").write_bytes(b"no tar file")
    with tarfile.open(photos / "cut.tar", "w") as tar:
        for i in range(4):
            member = tarfile.TarInfo(f"../../{i}.png")
            member.size = len(PICTURES[i])
            tar.addfile(member, io.BytesIO(PICTURES[i]))
    cut = (photos / "cut.tar").read_bytes()
    (photos / "cut.tar").write_bytes(cut[: 2 * 512 + len(PICTURES[0]) + 2000])
    pq.write_table(pa.table({"image": [PICTURES[0], None, b"", b"x"]}), photos / "t.parquet")
    pq.write_table(pa.table({"label": [1, 2]}), photos / "u.parquet")
    (photos / "broken.parquet").write_bytes(b"no table")
    summary = map_images(SHAPES, [str(photos)], str(tmp_path / "o"), Wanted(), ONE, part=5)
    rows = rows_of(tmp_path / "o")
    assert rows[str(photos / "e.png")]["error"] == "no such file"
    assert "not a Parquet file" in rows[str(photos / "broken.parquet")]["error"]
    for name, (_, message) in bad.items():
        row = rows[str(photos / name)]
        assert message in row["error"] and row["map"] is row["target"] is row["probabilities"] is None, name
    assert sum(r["error"] is None for r in rows.values()) == summary.images - summary.failed >= 21
    assert "cannot be read" in rows[str(photos / "broken.tar")]["error"]
    assert rows[f"{photos}/cut.tar/../../0.png"]["error"] is None and not (tmp_path.parent / "0.png").exists()
    assert [rows[f"{photos}/t.parquet#{i}"]["error"] is None for i in range(4)] == [True, False, False, False]
    assert "no column that is certain to hold pictures" in rows[str(photos / "u.parquet")]["error"]
    assert sum(summary.problems.values()) == summary.failed and all("/" not in reason for reason in summary.problems)


# ---- runs


def test_another_run_is_not_mixed_in(photos: Path, tmp_path: Path, bundle: Path) -> None:
    out = str(tmp_path / "o")
    source = [str(photos)]
    map_images(SHAPES, source, out, Wanted(map="none"), ONE, part=9)
    before = {p.name: p.read_bytes() for p in Path(out).iterdir()}
    with pytest.raises(InputError, match="holds this run already: go on with it"):
        map_images(SHAPES, source, out, Wanted(map="none"), ONE, part=9)
    others: list[tuple[Any, Wanted, int]] = [
        (SHAPES, Wanted("grad_cam", map="none"), 9),
        (SHAPES, Wanted(map="png"), 9),
        (SHAPES, Wanted(map="none", target=1), 9),
        (SHAPES, Wanted(map="none", layers=["block1"]), 9),
        (SHAPES, Wanted(map="none"), 10),
        (bundle, Wanted(map="none"), 9),
    ]
    for path, wanted, part in others:
        with pytest.raises(camrt.CamrtError, match=r"holds another run|no layer"):
            map_images(path, source, out, wanted, ONE, part=part, resume=True)
    (photos / "new.png").write_bytes(PICTURES[3])
    with pytest.raises(InputError, match=r"holds another run .*files_sha256"):
        map_images(SHAPES, source, out, Wanted(map="none"), ONE, part=9, resume=True)
    assert {p.name: p.read_bytes() for p in Path(out).iterdir()} == before
    (tmp_path / "o" / RUN).unlink()
    with pytest.raises(InputError, match=r"holds part-.*choose another folder"):
        map_images(SHAPES, source, out, Wanted(map="none"), ONE, part=9)


def test_a_killed_run_is_resumed_and_no_image_is_lost_or_doubled(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = [sys.executable, "-m", "camrt", "map", str(SHAPES), str(photos), "--out", str(out), "--part", "2"]
    command += ["--batch", "1", "--method", "score_cam_pp", "--backend", "onnxruntime"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 60
    while len(list(out.glob("part-*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*.parquet")}
    assert 3 <= len(written) < 10, "it was killed in the middle"
    assert len(pq.read_table(out)) == 2 * len(written), "what is not whole is hidden from those who read the folder"
    assert main([*command[3:], "--resume"]) == 0
    assert not list(out.glob(".*.unfinished"))
    assert len(rows_of(out)) == 20 and all(r["error"] is None for r in rows_of(out).values())
    assert all((out / name).stat().st_mtime_ns == at for name, at in written.items()), "what was there stays"
    assert json.loads((out / "_summary.json").read_text())["images"] == 20


def test_what_a_killed_run_leaves_behind_ends(photos: Path, tmp_path: Path) -> None:
    import psutil

    out = tmp_path / "o"
    command = [sys.executable, "-m", "camrt", "map", str(SHAPES), str(photos), "--out", str(out), "--part", "2"]
    process = subprocess.Popen([*command, "--batch", "1", "--actors", "2"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(out.glob("part-*.parquet")) and time.monotonic() < until:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert not alive


def test_a_worker_that_starts_when_the_run_is_gone_ends() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = f"import time; from camrt.mapping.processes import _end_with; _end_with({gone.pid}); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 1


def test_resuming_counts_what_failed_before_and_mends_damaged_parts(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.png").write_bytes(b"x")
    out = tmp_path / "o"
    command = ["map", str(SHAPES), str(photos), "--out", str(out), "--part", "6", "--actors", "1", "--map", "none"]
    assert main(command) == 1
    assert main([*command, "--resume"]) == 1, "also when nothing is left to do"
    assert main([*command, "--resume", "--allow-failures"]) == 0
    (out / "part-000001.parquet").write_bytes(b"")
    (out / "part-000002.parquet").unlink()
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1
    said = capsys.readouterr().out
    assert "2 parts with 9 images were there before" in said and "12 images in" in said and "1 not explained" in said
    assert len(rows_of(out)) == 21
    told = json.loads((out / "_summary.json").read_text())
    assert (told["images"], sum(told["problems"].values())) == (21, 1)


def test_folders_that_cannot_take_the_run(photos: Path, tmp_path: Path) -> None:
    wanted = Wanted(map="none")
    for out in (photos, photos / "maps", photos / "inner" / ".." / "o"):
        with pytest.raises(InputError, match="would lie among the images"):
            map_images(SHAPES, [str(photos)], str(out), wanted, ONE)
    map_images(SHAPES, [f"{photos}/*.png"], str(photos / "maps"), wanted, ONE)  # which this pattern does not name
    with pytest.raises(InputError, match="an empty path"):
        map_images(SHAPES, [str(photos)], "", wanted, ONE)
    out = str(tmp_path / "o")
    with pytest.raises(camrt.CamrtError):
        map_images(SHAPES, [str(photos)], out, wanted, Means("tensorrt", 1))
    with Place.of(out).for_one_run(), pytest.raises(InputError, match="another run writes there"):
        map_images(SHAPES, [str(photos)], out, wanted, ONE)
    assert map_images(SHAPES, [str(photos)], out, wanted, ONE).images == 20, "a start that failed leaves it free"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "winsor_cam:percentile=101"],
        ["--method", "winsor_cam:percentile=abc"],
        ["--actors", "0"],
        ["--threads", "0"],
        ["--price", "-1"],
        ["--price", "nan"],
    ],
)
def test_what_no_image_can_be_asked_is_refused_at_once(
    wrong: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["map", str(SHAPES), str(photos), "--out", str(tmp_path / "o"), *wrong]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("percentile" if wrong[0] == "--method" else wrong[0].strip("-")) in said
    assert not (tmp_path / "o").exists()


def test_a_worker_that_dies_is_replaced(photos: Path, tmp_path: Path) -> None:
    import psutil

    means, killed = Means("onnxruntime", workers=2, batch=1), []

    def progress(summary: Summary, _: int) -> None:
        if summary.parts == 2 and not killed:
            workers = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
            killed.append(workers[0].pid)
            workers[0].kill()

    summary = map_images(
        SHAPES, [str(photos)], str(tmp_path / "o"), Wanted("score_cam_pp"), means, part=2, progress=progress
    )
    assert killed and summary.images == len(rows_of(tmp_path / "o")) == 20


def test_workers_that_always_die_end_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their environment stops them before they run: each start fails."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import os\nif os.environ.get('DIES') == str(os.getppid()): os._exit(9)\n")
    monkeypatch.setenv("DIES", str(os.getpid()))
    monkeypatch.setenv("PYTHONPATH", str(broken))
    command = ["map", str(SHAPES), str(photos), "--out", str(tmp_path / "o"), "--actors", "2"]
    assert main([*command, "--backend", "onnxruntime", "--part", "2"]) == 2
    assert "workers died 3 times" in capsys.readouterr().err


@contextmanager
def object_store(bucket: str) -> Iterator[tuple[Place, str]]:
    """A bucket with the pictures in BUCKET/in, and the options of its address: a server of S3's protocol on this host,
    where moto is installed (make cluster).
    """
    server = pytest.importorskip("moto.server", reason="make cluster installs moto")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        options = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
        store = Place.of(f"s3://key:secret@{bucket}{options}")
        store.make_folder()
        for i, data in enumerate(PICTURES):
            store.child(f"in/{i:02d}.png").write(data)
        yield store, options
    finally:
        running.stop()


def test_an_object_store_is_read_and_written(photos: Path, tmp_path: Path) -> None:
    with object_store("bucket") as (store, tail):
        source, out = f"s3://key:secret@bucket/in{tail}", f"s3://key:secret@bucket/out{tail}"
        summary = map_images(SHAPES, [source], out, Wanted(), ONE, part=8)
        assert (summary.images, summary.failed) == (20, 0)
        again = map_images(SHAPES, [source], out, Wanted(), ONE, part=8, resume=True)
        assert again.parts_before == 3 and again.images == again.before == 20
        rows = pq.read_table("bucket/out", filesystem=store.filesystem).to_pylist()
        assert sorted(r["path"] for r in rows) == [f"s3://bucket/in/{i:02d}.png" for i in range(20)]
        told = store.child(f"out/{RUN}").read().decode()
        assert "secret" not in told and "key" not in told
        pattern = f"s3://key:secret@bucket/in/0*.png{tail}"
        assert map_images(SHAPES, [pattern], str(tmp_path / "o"), Wanted(), ONE).images == 10
        with pytest.raises(InputError, match=r"s3://bucket/nothing: no") as caught:
            find(f"s3://key:secret@bucket/nothing{tail}")
        assert "secret" not in str(caught.value)


def test_a_full_disk_or_a_folder_without_rights_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in (str(tmp_path / "file" / "o"), "/proc/nothing/o"):
        assert main(["map", str(SHAPES), str(photos), "--out", out, "--actors", "1"]) == 2
        assert capsys.readouterr().err.count("camrt:") == 1


def test_command_sums_up(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "bad.png").write_bytes(b"x")
    command = ["map", str(SHAPES), str(photos), "--out", str(tmp_path / "o"), "--actors", "1"]
    assert main([*command, "--price", "2", "--target", "star"]) == 1
    said = capsys.readouterr().out
    assert "21 images in" in said and "1 not explained: not a readable image" in said and "a million images" in said
    for wrong in (["--target", "99"], ["--map", "none", "--method", "gradcam"], ["--part", "0"], ["--batch", "0"]):
        assert main([*command[:-1], "1", "--out", str(tmp_path / "p"), *wrong]) == 2
    assert not (tmp_path / "p").exists()


def test_tasks_are_the_same_for_the_same_source(photos: Path) -> None:
    first, second = plan([str(photos)], 6), plan([str(photos)], 6)
    assert [t.identity() for t in first] == [t.identity() for t in second]
    assert [t.images for t in first] == [6, 6, 6, 2]
    shutil.rmtree(photos / "inner")
    assert [t.identity() for t in plan([str(photos)], 6)] != [t.identity() for t in first]


def test_reading_stops_with_the_run(photos: Path, tmp_path: Path) -> None:
    """No thread that reads is left when writing fails."""

    class Stop(Exception):
        pass

    def progress(summary: Summary, _: int) -> None:
        if summary.parts:
            raise Stop

    before = set(threading.enumerate())
    with pytest.raises(Stop):
        map_images(SHAPES, [str(photos)], str(tmp_path / "o"), Wanted(), ONE, part=2, progress=progress)
    time.sleep(0.5)
    left = [t for t in set(threading.enumerate()) - before if t.name.startswith("camrt-")]
    assert not [t for t in left if not t.name.startswith("camrt-lane")], "lanes live as long as the explainer"
