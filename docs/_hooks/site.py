"""What the site has besides the pages in docs/: formulas as MathML, a picture of each method, the command line's help,
the files of the top folder that are pages too, and the package in the layout that its docstrings are read from.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import warnings
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports]
from mkdocs.plugins import event_priority  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

PLACE = "<!-- programs -->"  # in docs/programs.md
ROOT = Path(__file__).parent.parent.parent
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
SCENES = (1, 6)  # of the demo
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config: Any) -> Any:
    """Lays the package out as it is imported: copies in build/package of the folders that pyproject.toml maps."""
    package, skipped = ROOT / "build" / "package" / "camrt", shutil.ignore_patterns("__pycache__", "*.camrt")
    shutil.rmtree(package, ignore_errors=True)
    for name in ("camrt", "export", "runtime", "kernels"):
        target = package if name == "camrt" else package / name
        shutil.copytree(ROOT / name, target, ignore=skipped, dirs_exist_ok=True)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages and pictures."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    files.append(File.generated(config, "commands.md", content=commands()))
    for name, picture in pictures().items():
        files.append(File.generated(config, f"pictures/{name}.png", content=picture))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the table of programs in its place."""
    return markdown.replace(PLACE, programs()) if PLACE in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Typesets the formulas: browsers draw MathML without a script."""
    return _FORMULA.sub(lambda m: convert(unescape(m[2]), display="block" if m[1] == "div" else "inline"), html)


def commands() -> str:
    """The help of every command."""
    from camrt.cli import parser

    os.environ["COLUMNS"] = "100"
    subparsers = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    help_of = {action.dest: action.help for action in subparsers._choices_actions}
    text = "# Command line\n\nExit codes: 0 success, 1 a check failed, 2 an error (one line), 130 interrupted.\n"
    for name, command in subparsers.choices.items():
        text += f"\n## camrt {name}\n\n{help_of[name]}\n\n```text\n{command.format_help()}```\n"
    return text


def programs() -> str:
    """What every kind of program takes and gives: a table of the kinds, and one of the tensors' meanings."""
    from camrt.demo.run import BUNDLE
    from camrt.runtime.bundle.contracts import MEANINGS
    from camrt.runtime.bundle.kinds import KINDS, Kind
    from camrt.runtime.bundle.manifest import Normalized
    from camrt.runtime.bundle.reading import read_bundle

    def named(tensor: str) -> str:
        kind, colon, _ = tensor.partition(":")
        return f"{kind}:LAYER" if colon else kind

    manifest = read_bundle(BUNDLE).manifest
    manifest = replace(manifest, normalized=Normalized("normalized", manifest.input_shape))  # which the demo's lacks
    lines = ["| kind | what it computes | inputs | outputs |", "| --- | --- | --- | --- |"]
    for kind in Kind:
        taps = manifest.taps[:1]
        inputs, outputs = ([named(n) for n in part] for part in KINDS[kind].interface(manifest, taps))
        extra = {Kind.TRUNK: "context:I", Kind.FULL_GRAD: "grid:HxW"}.get(kind)
        inputs += ["context:I"] if kind == Kind.HEAD else []
        outputs += [extra] if extra else []
        columns = (", ".join(f"`{n}`" for n in part) for part in (inputs, outputs))
        lines.append(f"| `{kind}` | {KINDS[kind].purpose} | {' | '.join(columns)} |")
    lines += ["", "| tensor | what it is |", "| --- | --- |"]
    lines += [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in MEANINGS.items()]
    return "\n".join(lines) + "\n"


def pictures() -> dict[str, bytes]:
    """PNG files by method: two scenes of the demo under the method's map."""
    from PIL import Image

    import camrt
    from camrt.demo.run import BUNDLE, FIRST_SEED
    from camrt.demo.scenes import draw_scene
    from camrt.runtime.cams import METHODS, method_named

    method_named("winsor_cam")
    explainer, scenes = camrt.load(BUNDLE), [draw_scene(FIRST_SEED + i, label=i)[0] for i in SCENES]
    drawn = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in METHODS:
            result = explainer.explain(scenes, name)
            parts = [part for i, scene in enumerate(scenes) for part in (Image.fromarray(scene), result.overlay(i))]
            drawn[name] = side_by_side([p if isinstance(p, Image.Image) else Image.fromarray(p) for p in parts])
    return drawn


def side_by_side(parts: list[Any], gap: int = 6) -> bytes:
    from PIL import Image

    width, height = sum(p.width for p in parts) + gap * (len(parts) - 1), max(p.height for p in parts)
    whole = Image.new("RGB", (width, height), "white")
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + gap
    stream = io.BytesIO()
    whole.save(stream, "PNG")
    return stream.getvalue()
