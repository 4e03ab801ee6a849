"""The served throughput beside the plain loop's, and latencies under load.

python benchmarks/serving.py BUNDLE [--seconds 20] [--out serving.json]

The server has one core, with one thread of the network; the client has another core. The plain loop is `explain` of
batches of the same size, on the server's core, from preprocessed arrays: it neither reads pictures nor sends maps.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

import camrt
from camrt.export.probes import smooth_images
from camrt.install import processor

SERVER_CORE, CLIENT_CORE = 0, 1
METHODS = ("grad_cam", "winsor_cam")


def plain_loop(bundle: Path, method: str, batch: int, seconds: float) -> float:
    """Images per second of `explain`."""
    explainer = camrt.load(bundle, "onnxruntime", max_batch=batch, threads=1)
    images = smooth_images(explainer.manifest.input_shape, batch)
    explainer.explain(images, method)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        explainer.explain(images, method)
        done += batch
    return done / (time.perf_counter() - began)


def served(address: str, method: str, shape: tuple[int, int, int], clients: int, seconds: float) -> dict[str, Any]:
    """Images per second, and quantiles of the latency in milliseconds, of clients that ask one image at a time."""
    image = smooth_images(shape, 1)
    sent = {"name": "image", "datatype": "FP32", "shape": list(image.shape)}
    said = {
        "inputs": [sent | {"parameters": {"binary_data_size": image.nbytes}}],
        "outputs": [{"name": "map", "parameters": {"binary_data": True}}],
        "parameters": {"method": method},
    }
    head = json.dumps(said).encode()
    body, headers = head + image.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    times: list[float] = []
    end = time.perf_counter() + seconds

    def ask() -> None:
        connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
        while time.perf_counter() < end:
            began = time.perf_counter()
            connection.request("POST", "/v2/models/net/infer", body, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}")
            times.append(time.perf_counter() - began)

    began = time.perf_counter()
    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1e3
    return {"images_per_second": len(times) / took, "p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}readyz"):
            return True
    except urllib.error.HTTPError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape, rows = camrt.load(options.bundle, "onnxruntime").manifest.input_shape, []
    os.environ["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "camrt", "serve", f"net={options.bundle}", "--port", "0", "--threads", "1"]
    for method in METHODS:
        os.sched_setaffinity(0, {SERVER_CORE})
        loop = plain_loop(options.bundle, method, options.batch, options.seconds / 2)
        process = subprocess.Popen(
            [*command, "--batch", str(options.batch)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        os.sched_setaffinity(0, {CLIENT_CORE})
        assert process.stdout is not None
        address = re.search(r"http://\S+/", process.stdout.readline())[0]  # type: ignore[index]
        while not ready(address):
            time.sleep(0.1)
        served(address, method, shape, options.clients, 2)
        found = served(address, method, shape, options.clients, options.seconds)
        process.terminate()
        process.wait()
        os.sched_setaffinity(0, {SERVER_CORE})
        loop = (loop + plain_loop(options.bundle, method, options.batch, options.seconds / 2)) / 2
        rows.append({"method": method, "loop_images_per_second": loop, **found})
        rows[-1]["ratio"] = round(found["images_per_second"] / loop, 3)
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        said = {"cpu": processor(), "batch": options.batch, "clients": options.clients, "rows": rows}
        options.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
