"""Fixtures: bundles that many tests use, exported once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import small_net

import camrt

PREPROCESS = camrt.Preprocess(resize=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the small network. Not to be changed: `bundle` is a copy."""
    path = tmp_path_factory.mktemp("bundles") / "small.camrt"
    return camrt.export_model(small_net(), path, (3, 32, 32), name="small", classes=CLASSES, preprocess=PREPROCESS)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A fresh copy of the small network's bundle, to damage at will."""
    return Path(shutil.copytree(exported, tmp_path / "small.camrt"))


@pytest.fixture(scope="session")
def explainer(exported: Path) -> camrt.Explainer:
    return camrt.load(exported)
