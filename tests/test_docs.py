"""The pages in docs/: complete, and without a broken link. `make docs` builds the site of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ROOT

from camrt.runtime.cams import METHODS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
MADE = {"commands.md", "changelog.md", "contributing.md"}  # by the site


def test_every_method_has_its_section_and_its_picture() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert f"(pictures/{name}.png)" in text and f"`{name}`" in text, name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"\S+\.md", navigation))
    assert listed == MADE | {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http") and not target.startswith("pictures/") and target not in MADE:
            assert (page.parent / target).exists() or Path(target).name in MADE, target
