"""Imports go down only: checks every import of the package, also lazy ones inside functions, against the layers."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from titans_video.cli.main import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "titans_video"
LAUNCHERS = [REPOSITORY / "train.py", *sorted((REPOSITORY / "train" / "videos").glob("*.py"))]
LAUNCHER_LINES = 15

LAYERS: dict[str, int] = {
    **dict.fromkeys(["types", "errors", "files", "finite", "formats", "parsing", "schema", "seeding"], 0),
    **dict.fromkeys(["access", "checkpoint", "config", "console", "device", "hub", "media", "processes", "storage"], 0),
    "tensor_files": 0,
    **dict.fromkeys(["data", "codecs", "text", "models", "mock"], 1),
    "diffusion": 2,
    "pretrained": 3,
    **dict.fromkeys(["training", "generation"], 4),
    **dict.fromkeys(["recipes", "planning", "reporting", "demo", "captioning"], 5),
    **dict.fromkeys(["api", "cli", "ui", "__main__"], 6),
}
APART = 1
"""The layer whose packages do not import one another."""
LIGHT = ["titans_video", "titans_video.config.options", "titans_video.errors"]
"""Modules that `--help` imports, besides cli/ and the modules of the commands; none of them may import torch."""

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "matplotlib", "av"}
"""Packages that take seconds to import."""


class Import(NamedTuple):
    file: str
    line: int
    module: str


def imports(path: Path, package: str) -> list[Import]:
    """Return every module that a file imports anywhere, with relative imports resolved against `package`."""
    name = str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)
    found: list[Import] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(name, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            # `from titans_video import media` names a layer only together with what it takes
            found += [Import(name, node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def part(module: str) -> str | None:
    """Return `media` of `titans_video.media.probe`; None for the bare package and for other distributions."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "titans_video" and len(pieces) > 1 and pieces[1] != "__version__" else None


def part_of_file(path: Path) -> str | None:
    relative = path.relative_to(PACKAGE)
    return (
        None if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0].removesuffix(".py")
    )


def package_of(path: Path) -> str:
    return ".".join(("titans_video", *path.relative_to(PACKAGE).parent.parts))


def violation(importer: str, imported: str) -> str | None:
    """Return why `importer` may not import `imported`, or None."""
    if importer == imported:
        return None
    for name in (importer, imported):
        if name not in LAYERS:
            return f"{name} is in no layer: add it to LAYERS"
    if LAYERS[imported] > LAYERS[importer]:
        return f"{importer} (layer {LAYERS[importer]}) imports {imported} (layer {LAYERS[imported]}), which is above it"
    if LAYERS[imported] == LAYERS[importer] == APART:
        return f"{importer} and {imported} are both in layer {APART}, whose packages do not import one another"
    return None


def name_of(path: Path) -> str:
    """Return the module name of a file of the package; `__init__.py` has the name of its folder."""
    return ".".join((package_of(path), *([] if path.name == "__init__.py" else [path.stem])))


def resolve(module: str, known: set[str]) -> str | None:
    """Return the longest prefix of an imported name that is a known module."""
    while module and module not in known:
        module = module.rpartition(".")[0]
    return module or None


def import_graph(found: dict[str, list[Import]]) -> dict[str, set[str]]:
    """Return the modules that each module imports, anywhere in its file.

    The `__init__.py` that Python loads before a submodule is not an edge. An import that names it, or a name in it, is.
    """
    known = set(found)
    return {m: {r for i in items if (r := resolve(i.module, known))} - {m} for m, items in found.items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another: strongly connected components, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                groups.append(sorted(stack[at:]))
            del stack[at:]

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return groups


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {path: imports(path, package_of(path)) for path in FILES}
GRAPH = import_graph({name_of(path): found for path, found in IMPORTS.items()})


def test_imports_go_down_only() -> None:
    assert len(FILES) > 10
    wrong = []
    for path, found in IMPORTS.items():
        importer = part_of_file(path)
        for item in found:
            imported = part(item.module)
            if imported is None:
                continue
            reason = violation(importer, imported) if importer else f"titans_video/__init__.py imports {imported}"
            if reason:
                wrong.append(f"{item.file}:{item.line}: {reason}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_modules_import_one_another() -> None:
    assert sum(map(len, GRAPH.values())) > len(FILES)
    found = cycles(GRAPH)
    assert not found, "\n" + "\n".join(" <-> ".join(group) for group in found)


def test_only_training_imports_accelerate() -> None:
    wrong = [
        f"{i.file}:{i.line}"
        for path, found in IMPORTS.items()
        for i in found
        if i.module.split(".")[0] == "accelerate" and part_of_file(path) != "training"
    ]
    assert not wrong, wrong


def test_the_package_never_imports_the_launchers() -> None:
    wrong = [f"{i.file}:{i.line}" for found in IMPORTS.values() for i in found if i.module.split(".")[0] == "train"]
    assert not wrong, wrong


def test_every_folder_of_the_package_is_a_package() -> None:
    missing = {str(p.parent.relative_to(PACKAGE)) for p in FILES if not (p.parent / "__init__.py").exists()}
    assert not missing


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_launchers_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LAUNCHER_LINES


def light_modules() -> list[str]:
    """Return the modules that are imported before the flags of a command are parsed."""
    commands = {module.partition(":")[0] for module, _ in COMMANDS.values()}
    own = {f"titans_video.cli.{p.stem}" for p in (PACKAGE / "cli").glob("*.py") if p.stem != "__init__"}
    return LIGHT + sorted(commands | own)


@pytest.mark.parametrize("module", light_modules())
def test_help_needs_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit(', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, f"importing {module} imports {done.stderr.strip()}"


def test_help_of_every_command_imports_no_torch() -> None:
    program = (
        "import contextlib, io, sys\n"
        "from titans_video.cli.main import COMMANDS, main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    for name in COMMANDS:\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main([*name.split(), '--help'])\n"
        f"sys.exit(', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, f"--help imports {done.stderr.strip()}"


def test_the_rule_itself_sees_what_it_forbids(tmp_path: Path) -> None:
    source = tmp_path / "probe.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from titans_video.training.trainer import Trainer\n"
        "def lazy():\n    from titans_video import cli\n    import titans_video.media.probe\n"
        "    from ..codecs import base\n"
    )
    found = {part(i.module) for i in imports(source, "titans_video.text")} - {None}
    assert found == {"training", "cli", "media", "codecs"}
    assert violation("models", "training")
    assert violation("text", "codecs")
    assert violation("media", "data")
    assert violation("media", "unheard_of")
    assert violation("training", "generation") is None
    assert violation("data", "media") is None


def test_cycles_are_found_through_lazy_and_typing_imports(tmp_path: Path) -> None:
    sources = {
        "a": "from p import b\n",
        "b": "def lazy():\n    import p.c\n",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import Thing\n",
        "d": "from p.a import Thing\nfrom p.e import other\n",
        "e": "import os\n",
    }
    found: dict[str, list[Import]] = {"p": []}
    for name, text in sources.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        found[f"p.{name}"] = imports(path, "p")
    graph = import_graph(found)
    assert graph["p.d"] == {"p.a", "p.e"}
    assert graph["p.e"] == set()
    assert cycles(graph) == [["p.a", "p.b", "p.c"]]
    assert not cycles(graph | {"p.c": set()})
    assert cycles({"x": {"y"}, "y": {"x"}, "z": {"x"}}) == [["x", "y"]]
