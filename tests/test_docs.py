"""The pages in docs/: complete, and without a broken link. `make docs` builds the site of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import onnx
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


def emitted_operators() -> dict[str, set[str]]:
    """{operator: attributes} of every node that the code adds to a graph: calls of a tape, and ir.node."""
    found: dict[str, set[str]] = {}
    for folder in ("export", "camrt/compiling"):
        for file in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(file.read_text())):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                owner, name = ast.unparse(call.func.value), call.func.attr
                arguments = [k.arg for k in call.keywords if k.arg not in (None, "outputs", "name", "num_outputs")]
                if (owner, name) == ("ir", "node") and isinstance(call.args[0], ast.Constant):
                    name, arguments = str(call.args[0].value), []
                    if len(call.args) > 2 and isinstance(call.args[2], ast.Dict):
                        arguments = [k.value for k in call.args[2].keys if isinstance(k, ast.Constant)]
                elif owner.rpartition(".")[2] not in ("tape", "op", "self", "inside") or not name[:1].isupper():
                    continue
                found.setdefault(name, set()).update(str(a) for a in arguments)
    return found


def test_the_page_of_operators_is_complete() -> None:
    """docs/operators.md has a row for each operator that the code writes, with its attributes, and no other row."""
    rows = {}
    for line in (ROOT / "docs" / "operators.md").read_text().splitlines():
        columns = [c.strip() for c in line.strip("|").split("|")]
        if len(columns) == 9 and columns[0] not in ("operator", "---"):
            rows[columns[0]] = columns
            versions = [onnx.defs.get_schema(columns[0], opset).since_version for opset in (17, 18)]
            assert columns[2] == str(versions[1]) and columns[3].startswith(("same", f"{versions[0]};")), line
            assert (columns[3] == "same") == (versions[0] == versions[1]), line
    emitted = emitted_operators()
    assert set(rows) == set(emitted), set(rows) ^ set(emitted)
    for name, attributes in emitted.items():
        assert attributes <= set(re.findall(r"`(\w+)`", rows[name][1])), (name, attributes)
