"""onnxruntime-web's files: from npm's package, checked, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ..runtime.errors import CamrtError, InputError, first_line
from ..runtime.user_cache import cache_folder

VERSION = "1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
PATIENCE = 600.0  # seconds for npm, which downloads 33 MB


def web_runtime(folder: Path | None = None) -> Path:
    """The folder with onnxruntime-web's files. folder: of an unpacked package, or of its dist/; by default the user's
    cache, which npm fills.

    CamrtError without npm, or where it fails; InputError for a folder that lacks the files.
    """
    if folder is not None:
        for place in (folder, folder / "dist", folder / "package" / "dist"):
            if _complete(place):
                return place
        raise InputError(f"{folder}: lacks onnxruntime-web's files ({FILES['wasm'][0]}, ...): unpack its package there")
    kept = cache_folder() / f"onnxruntime-web-{VERSION}"
    if not _complete(kept):
        _fetch(kept)
    return kept


def is_at_hand() -> bool:
    """Whether `web_runtime` can be expected to work."""
    return shutil.which("npm") is not None or _complete(cache_folder() / f"onnxruntime-web-{VERSION}")


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for names in FILES.values() for name in names)


def _fetch(kept: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise CamrtError(
            f"the page needs onnxruntime-web {VERSION}, and npm, which fetches it, is missing: install npm (Debian: "
            "apt install npm), or unpack the package elsewhere and name its folder with --runtime"
        )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".web-", dir=kept.parent) as temporary:
            command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", temporary]
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, timeout=PATIENCE)
            packed = Path(temporary) / f"onnxruntime-web-{VERSION}.tgz"
            if done.returncode or not packed.is_file():
                lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
                raise CamrtError(f"npm could not fetch onnxruntime-web {VERSION}: {lines[-1][:200]}")
            if hashlib.sha512(packed.read_bytes()).hexdigest() != SHA512:
                raise CamrtError(
                    f"npm fetched another onnxruntime-web {VERSION} than was published: check its registry"
                )
            unpacked = Path(temporary) / "unpacked"
            unpacked.mkdir()
            with tarfile.open(packed) as archive:
                for name in (name for names in FILES.values() for name in names):
                    source = archive.extractfile(f"package/dist/{name}")
                    assert source is not None
                    (unpacked / name).write_bytes(source.read())
            shutil.rmtree(kept, ignore_errors=True)
            unpacked.replace(kept)
    except subprocess.TimeoutExpired:
        raise CamrtError(f"npm did not fetch onnxruntime-web {VERSION} within {PATIENCE / 60:.0f} minutes") from None
    except OSError as error:
        raise CamrtError(f"{kept}: onnxruntime-web's files cannot be kept there ({first_line(error)})") from None
