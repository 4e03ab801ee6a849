"""Many requests, with clients that vanish, stall and send garbage between them: nothing may be lost, nothing may leak.

python benchmarks/rude_clients.py [BUNDLE] [--requests 100000] [--out rude_clients.json]

Every answer is compared with the first one to the same question. Exit code 1 if one differs or is missing, if the
server's memory grows by more than 32 MB after the first tenth, or if it holds connections or images at the end.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from camrt.demo.run import BUNDLE
from camrt.demo.scenes import draw_scene

QUESTIONS = ("method=grad_cam", "percentile=30", "percentile=90&target=2", "method=layer_cam&layers=last", "target=1")
PICTURES = 20
RUDE = 0.1  # of all requests
GROWTH = 32e6  # bytes


def pictures() -> list[bytes]:
    found = []
    for i in range(PICTURES):
        out = io.BytesIO()
        Image.fromarray(draw_scene(i)[0]).save(out, "JPEG", quality=90)
        found.append(out.getvalue())
    return found


class Load:
    """The clients, and what they saw."""

    def __init__(self, host: str, port: int, requests: int) -> None:
        self.host, self.port, self.left = host, port, requests
        self.statuses: Counter[str] = Counter()
        self.first: dict[tuple[int, str], bytes] = {}
        self.pictures, self.lock = pictures(), threading.Lock()
        self.times: list[float] = []

    def taken(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left >= 0

    def polite(self, seed: int) -> None:
        rng, connection = random.Random(seed), http.client.HTTPConnection(self.host, self.port, timeout=60)
        while self.taken():
            if rng.random() < RUDE:
                self.rude(rng)
                continue
            key = rng.randrange(PICTURES), rng.choice(QUESTIONS)
            path = f"/v1/models/net/explain?format=npy&{key[1]}"
            began = time.perf_counter()
            try:
                connection.request("POST", path, self.pictures[key[0]], {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                body = answer.read()
            except OSError as error:
                self.note(f"lost: {type(error).__name__}")
                connection.close()
                continue
            took = time.perf_counter() - began
            if answer.status == 200:
                got = np.load(io.BytesIO(body))
                with self.lock:
                    want = self.first.setdefault(key, body)
                    self.times.append(took)
                same = np.abs(np.load(io.BytesIO(want)) - got).max() <= 1e-5
                self.note("answered" if same else "another map")
            else:
                self.note(str(answer.status))

    def rude(self, rng: random.Random) -> None:
        picture = rng.choice(self.pictures)
        head = "POST /v1/models/net/explain HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        head += f"Content-Length: {len(picture)}\r\n\r\n"
        kind = rng.choice(("garbage", "half", "vanish", "stall"))
        try:
            with socket.create_connection((self.host, self.port), timeout=30) as connection:
                if kind == "garbage":
                    connection.sendall(rng.randbytes(300) + b"\r\n\r\n")
                elif kind == "half":
                    connection.sendall(head.encode() + picture[: len(picture) // 2])
                elif kind == "vanish":
                    connection.sendall(head.encode() + picture)
                else:
                    connection.sendall(head.encode()[:40])
                    time.sleep(0.2)
            self.note(f"rude: {kind}")
        except OSError as error:
            self.note(f"rude: refused ({type(error).__name__})")

    def note(self, what: str) -> None:
        with self.lock:
            self.statuses[what] += 1


def state(pid: int) -> tuple[int, int]:
    """(resident bytes, open files)."""
    text = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
    return resident, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLE)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "camrt", "serve", f"net={options.bundle}", "--port", "0", "--threads", "1"]
    with Path(os.devnull).open("w") as nowhere:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=nowhere, text=True)
    assert process.stdout is not None
    host, port = re.search(r"http://(\S+):(\d+)/", process.stdout.readline()).groups()  # type: ignore[union-attr]
    time.sleep(3)
    report: dict[str, Any] = {"requests": options.requests}
    parts, began = [options.requests // 10, options.requests - options.requests // 10], time.perf_counter()
    total: Counter[str] = Counter()
    times: list[float] = []
    for part in parts:
        load = Load(host, int(port), part)
        clients = [threading.Thread(target=load.polite, args=(i,)) for i in range(options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        total += load.statuses
        times = load.times
        time.sleep(6)  # longer than a connection is kept open
        report.setdefault("resident_bytes", []).append(state(process.pid)[0])
        report.setdefault("open_files", []).append(state(process.pid)[1])
        print(dict(total), state(process.pid), flush=True)
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", "/metrics")
    metrics = connection.getresponse().read().decode()
    waiting = re.search(r'camrt_waiting_images\{model="net"\} (\S+)', metrics)
    report["waiting_images"] = None if waiting is None else float(waiting[1])
    report["seconds"] = round(time.perf_counter() - began, 1)
    report["statuses"] = dict(total)
    report["p50_ms"], report["p99_ms"] = (round(float(q) * 1e3, 1) for q in np.quantile(times, [0.5, 0.99]))
    process.terminate()
    report["exit_code"] = process.wait(60)
    print(json.dumps(report))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    lost = [what for what in total if what != "answered" and not what.startswith("rude")]
    growth, files = report["resident_bytes"][1] - report["resident_bytes"][0], report["open_files"]
    fine = not lost and growth < GROWTH and files[1] <= files[0] + 2 and report["waiting_images"] == 0
    return 0 if fine and report["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
