"""Which packages are installed, and the pip command that messages give for a missing one; the CPU's name."""

from __future__ import annotations

_RUNTIME = ("camrt", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings")


def extra(name: str) -> str:
    """The pip command that installs an extra (`cpu`, `cuda`, `export`, ...) of camrt, from this camrt's own source:
    a folder, a file, a repository, or a package index.
    """
    import shlex
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    where = _origin()
    url = str(where.get("url", ""))
    if "dir_info" in where:
        folder = url2pathname(urlsplit(url).path)
        editable = "-e " if where["dir_info"].get("editable") else ""
        return f"pip install {editable}{shlex.quote(f'{folder}[{name}]')}"
    if url:
        scheme = where["vcs_info"]["vcs"] + "+" if "vcs_info" in where else ""
        return f"pip install {shlex.quote(f'camrt[{name}] @ {scheme}{url}')}"
    return f"pip install 'camrt[{name}]'"


def repair(purpose: str, package: str, name: str, error: ImportError) -> str:
    """The message for a package of the extra `name` that cannot be imported: it is not installed, or it is broken.

    purpose: what needs it, e.g. "export".
    """
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        return f"{purpose} needs {package}: {extra(name)}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{purpose} needs {package}, which cannot be imported ({reason}): install it again"


def versions() -> dict[str, str]:
    """Of camrt, and of the packages on which the last bits of maps depend, those that are installed."""
    import importlib.metadata

    found = {}
    for package in _RUNTIME:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name of this machine's CPU."""
    import platform
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _origin() -> dict:
    """What pip recorded (PEP 610); empty where camrt came from a package index, or without pip."""
    import importlib.metadata
    import json

    # in a clone, setuptools' metadata are beside the code and are found first; they have no direct_url.json
    records = (d.read_text("direct_url.json") for d in importlib.metadata.distributions(name="camrt"))
    return json.loads(next(filter(None, records), "{}"))
