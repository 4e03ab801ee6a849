"""How what is missing gets installed: one place for every message that advises it."""

from __future__ import annotations


def extra(name: str) -> str:
    """The command that adds an extra (`cpu`, `cuda`, `export`, ...) to camrt from where this camrt came: a folder, a
    file, a repository, or a package index.
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

    # in a clone, the metadata of setuptools lie beside the code and come first; they say nothing of where from
    said = (d.read_text("direct_url.json") for d in importlib.metadata.distributions(name="camrt"))
    return json.loads(next(filter(None, said), "{}"))
