"""The wheel's CUDA kernels: compiled where nvcc is, else left out with a message. The rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout: python -m camrt.kernels.build puts them beside their sources
            return
        spec = importlib.util.spec_from_file_location("kernels_build", Path(__file__).parent / "kernels" / "build.py")
        assert spec is not None and spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            kernels.build(Path(self.build_lib) / "camrt" / "kernels" / "cuda")
        except kernels.BuildError as error:
            print(f"camrt: this wheel has no CUDA kernels: {error}", file=sys.stderr)


setup(cmdclass={"build_py": BuildWithKernels})
