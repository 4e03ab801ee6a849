"""`camrt map` on a Ray cluster of several nodes on this machine, with nodes, workers and drivers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_map import PICTURES, SHAPES, explained, object_store, rows_of

from camrt.mapping.places import Place
from camrt.mapping.rows import Wanted
from camrt.mapping.run import Means, Summary, map_images

ray: Any = pytest.importorskip("ray", reason="make cluster installs Ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head of one CPU and two workers of two."""
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    memory = 150 * 2**20
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False},
    )
    for _ in range(2):
        made.add_node(num_cpus=2, object_store_memory=memory)
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        (folder / f"p{i:02d}.png").write_bytes(PICTURES[i % 20])
    (folder / "bad.png").write_bytes(b"x")
    return folder


@pytest.fixture
def means(cluster: Any) -> Means:
    return Means("onnxruntime", workers=3, batch=2, address=cluster.address)


def same_rows(one: Path, other: Path) -> None:
    first, second = rows_of(one), rows_of(other)
    assert first.keys() == second.keys()
    for path, row in first.items():
        assert row == second[path], path


def test_rows_are_those_of_one_machine(means: Means, photos: Path, tmp_path: Path) -> None:
    summary = map_images(SHAPES, [str(photos)], str(tmp_path / "ray"), Wanted(), means, part=5)
    assert (summary.images, summary.failed, summary.machines, summary.workers) == (61, 1, 3, 3)
    one = Means("onnxruntime", workers=1, batch=2)
    map_images(SHAPES, [str(photos)], str(tmp_path / "one"), Wanted(), one, part=5)
    same_rows(tmp_path / "ray", tmp_path / "one")


def actors() -> list[Any]:
    import psutil

    return [p for p in psutil.process_iter(["cmdline"]) if "TaskActor" in " ".join(p.info["cmdline"] or [])]


def test_a_worker_that_dies_loses_no_image(means: Means, photos: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def progress(summary: Summary, _: int) -> None:
        if summary.parts == 3 and not killed:
            victim = actors()[0]
            killed.append(victim.pid)
            victim.kill()

    wanted = Wanted("score_cam_pp")
    summary = map_images(SHAPES, [str(photos)], str(tmp_path / "o"), wanted, means, part=2, progress=progress)
    rows = rows_of(tmp_path / "o")
    assert killed and len(rows) == 61 and sum(r["error"] is None for r in rows.values()) == 60
    assert summary.images >= 61


def test_a_node_that_is_lost_loses_no_image(means: Means, cluster: Any, photos: Path, tmp_path: Path) -> None:
    lost: list[Any] = []

    def progress(summary: Summary, _: int) -> None:
        if summary.parts == 3 and not lost:
            lost.append(list(cluster.worker_nodes)[0])  # noqa: RUF015  # a set-like
            threading.Thread(target=cluster.remove_node, args=(lost[0], False)).start()

    wanted = Wanted("score_cam_pp")
    map_images(SHAPES, [str(photos)], str(tmp_path / "o"), wanted, means, part=2, progress=progress)
    rows = rows_of(tmp_path / "o")
    assert lost and len(rows) == 61 and sum(r["error"] is None for r in rows.values()) == 60
    cluster.add_node(num_cpus=2, object_store_memory=150 * 2**20)
    cluster.wait_for_nodes()


def test_a_driver_that_is_killed_is_resumed(means: Means, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = [sys.executable, "-m", "camrt", "map", str(SHAPES), str(photos), "--out", str(out), "--part", "2"]
    command += ["--method", "score_cam_pp", "--address", str(means.address)]
    command += ["--batch", "2", "--actors", "3", "--backend", "onnxruntime"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while len(list(out.glob("part-*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the cluster ends what it had begun
    written = {p.name: p.stat().st_mtime_ns for p in out.glob("part-*.parquet")}
    assert 3 <= len(written) < 31, "it was killed in the middle"
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 1 and "images were there before" in done.stdout, done.stderr[-2000:]
    assert len(rows_of(out)) == 61
    assert all((out / name).stat().st_mtime_ns == at for name, at in written.items()), "what was there stays"


def test_the_bundle_travels_to_nodes_that_do_not_have_it(cluster: Any, photos: Path, tmp_path: Path) -> None:
    import pickle
    from dataclasses import replace

    from camrt.mapping.cluster import TaskActor
    from camrt.mapping.tasks import plan
    from camrt.mapping.worker import Job

    contents = ray.put({f.name: f.read_bytes() for f in SHAPES.iterdir()})
    (tmp_path / "o").mkdir()
    job = Job(str(SHAPES), Place.of(str(tmp_path / "o")), Wanted(map="none"), "onnxruntime", threads=1)
    actor = TaskActor(replace(job, bundle="/nowhere/net.camrt"), [contents])
    (task,) = plan([f"{photos}/p0*.png"], 100)
    actor({"task": [pickle.dumps(task)]})
    assert len(rows_of(tmp_path / "o")) == 10
    folder = Path(actor._folder or "")
    assert (folder / "manifest.json").is_file()
    actor.__del__()
    assert not folder.exists()


def test_an_object_store_is_read_and_written_by_actors(means: Means) -> None:
    with object_store("cluster") as (store, tail):
        source, out = f"s3://key:secret@cluster/in{tail}", f"s3://key:secret@cluster/out{tail}"
        assert map_images(SHAPES, [source], out, Wanted(map="png"), means, part=6).images == 20
        assert len(pq.read_table("cluster/out", filesystem=store.filesystem)) == 20


def test_actor_explains_in_a_pipeline_of_ones_own(cluster: Any, photos: Path) -> None:
    import camrt.ray

    data = ray.data.read_binary_files(str(photos), include_paths=True).map_batches(
        camrt.ray.Explain,
        fn_constructor_args=(str(SHAPES), "winsor_cam:percentile=70"),
        batch_size=8,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    rows = {Path(row["path"]).name: row for row in data.take_all()}
    assert len(rows) == 61
    assert rows["bad.png"]["target"] == -1 and np.isnan(rows["bad.png"]["map"]).all() and rows["bad.png"]["error"]
    want = explained(PICTURES[4], percentile=70)
    np.testing.assert_allclose(rows["p04.png"]["map"], want.maps[0], atol=1e-4)
    assert rows["p04.png"]["target"] == want.target[0] and rows["p04.png"]["error"] == ""  # type: ignore[index]


def test_a_cluster_that_is_not_there_is_one_line(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "camrt", "map", str(SHAPES), str(photos), "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, "--address", "127.0.0.1:9"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("camrt: --address 127.0.0.1:9: no")
