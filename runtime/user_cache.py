"""The user's own folder for what camrt makes or fetches again when it is lost: engines, files of the page."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import CamrtError

FOLDER_VARIABLE = "CAMRT_CACHE"


def cache_folder() -> Path:
    """$CAMRT_CACHE, or camrt/ in the user's cache folder. CamrtError if the user has no home."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return Path(folder)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home, as in containers
        raise CamrtError(f"no cache folder ({error}): set {FOLDER_VARIABLE}") from error
    return home / "camrt"
