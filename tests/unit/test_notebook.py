"""The notebook in examples/ and the code of the guide to Python, run as plain Python with fewer clips and steps."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_guides import DOCS, blocks

SMALLER = {"CLIPS, STEPS = 200, 300": "CLIPS, STEPS = 20, 2", "batch_size=16": "batch_size=4", "=100": "=2"}


def run_cell(source: str, names: dict[str, Any]) -> object:
    """Run a cell, and return the value of its last line if that is an expression, as a kernel does."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.fixture
def cells(repository: Path) -> dict[str, str]:
    book = json.loads((repository / "examples" / "python.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "clear the outputs"
    return {cell["id"]: "".join(cell["source"]) for cell in code}


def test_the_notebook_runs(cells: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = {}
    for name, source in cells.items():
        for before, after in SMALLER.items():
            source = source.replace(before, after)
        shown[name] = run_cell(source, names)
    pages = {name: value._repr_html_() for name, value in shown.items() if hasattr(value, "_repr_html_")}
    assert list(pages) == ["first", "both", "run", "own"]
    assert [pages[name].count("data:video/mp4;base64,") for name in pages] == [1, 2, 0, 1]
    assert shown["array"].size == (32, 32)  # type: ignore[attr-defined]
    assert len(shown["metrics"]) == 2  # type: ignore[arg-type]
    assert {p.name for p in (tmp_path / "notebook_files").iterdir()} == {"clips", "run", "triangle.mp4", "triangle.png"}
    assert Path(str(shown["report"])).is_file()


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generate, train = blocks(DOCS / "guides" / "python.md", "python")
    exec(generate, {})
    exec(train.replace("clips=100", "clips=8").replace("max_steps=100", "max_steps=1"), {})
    assert {p.name for p in tmp_path.iterdir()} == {"clips", "outputs_python", "circle.mp4", "triangle.mp4"}
