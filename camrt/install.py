"""The pip command that messages give for a missing package."""

from __future__ import annotations


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


def _origin() -> dict:
    """What pip recorded (PEP 610); empty where camrt came from a package index, or without pip."""
    import importlib.metadata
    import json

    # in a clone, setuptools' metadata are beside the code and are found first; they have no direct_url.json
    records = (d.read_text("direct_url.json") for d in importlib.metadata.distributions(name="camrt"))
    return json.loads(next(filter(None, records), "{}"))
