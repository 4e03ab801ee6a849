"""The Kubernetes manifests of examples/kubernetes: KUBE names an environment with the validators (make manifests)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from camrt import __version__
from camrt.cli import parser

yaml: Any = pytest.importorskip("yaml", reason="make manifests installs PyYAML")
FOLDER = ROOT / "examples" / "kubernetes"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.fixture
def environment() -> Path:
    if "KUBE" not in os.environ:
        pytest.skip("make manifests runs this, with validators in an environment of their own")
    return Path(os.environ["KUBE"])


def test_core_kinds_are_valid(environment: Path) -> None:
    command = [str(environment / "bin" / "kubernetes-validate"), "--strict", str(FOLDER / "serve.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CHECK = """
import json, sys
from kserve import V1beta1InferenceService
from kubernetes.client import ApiClient
import kserve.models, kubernetes.client.models as core
for name in dir(kserve.models):
    setattr(core, name, getattr(kserve.models, name))
given = json.load(sys.stdin)
client = ApiClient()
read = client._ApiClient__deserialize(given, V1beta1InferenceService)
print(json.dumps(client.sanitize_for_serialization(read)))
"""


def test_inference_service_is_what_kserve_reads(environment: Path) -> None:
    """Read by KServe's own classes and written again, nothing is lost: an unknown name would be."""
    (given,) = documents("inferenceservice.yaml")
    command = [str(environment / "bin" / "python"), "-c", CHECK]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == given


def test_commands_in_manifests_are_camrts(tmp_path: Path) -> None:
    """Every option exists, and probes ask where the server answers."""
    container = documents("serve.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    served = parser().parse_args(container["args"])
    assert served.port == container["ports"][0]["containerPort"] == 8080
    job = documents("rayjob.yaml")[0]["spec"]
    mapped = parser().parse_args(job["entrypoint"].split()[1:])
    assert mapped.resume and mapped.address == "auto"
    images = {container["image"], job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]}
    assert images == {f"registry.example/camrt:{__version__}"}
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}\n" in constraints
