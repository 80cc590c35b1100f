"""Structure limits of the package, measured from its source: sizes of files and functions, importers, docstrings.

`python -m tests.unit.test_structure` prints the measurements and every offender.

Definitions:

- Files are all `.py` files below `src/titans_video`, `__init__.py` included.
- The median counts the lines of files that are not a bare `__init__.py`. A bare one holds no statement other than its
  docstring and assignments; it is a marker of a package and would pull the median down whatever the modules look like.
  One with imports or code counts like any other file.
- A line is a line of the file: blank lines, comments and docstrings count. The length of a function runs from its `def`
  to its last line; decorators do not count, nested functions also count on their own.
- An importer of a module is another module of the package with an import of it anywhere in its file (at the top, in a
  function, under TYPE_CHECKING). Tests, scripts, launchers and names in strings are not importers.
"""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from tests.unit.test_layers import FILES, GRAPH, PACKAGE, cycles, name_of

MOST_FILES = 240
LEAST_MEDIAN_LINES = 180
MOST_FILE_LINES = 450
LONG_FUNCTION_LINES = 60
MOST_LONG_FUNCTIONS_PERCENT = 0.5
MOST_SINGLE_IMPORTERS_PERCENT = 15
MOST_CYCLES = 0
BAD_OPENING = "What "
MOST_BAD_OPENINGS = 0

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Measure(NamedTuple):
    """One measurement against its limit.

    Attributes:
        least: the limit is a minimum.
        offenders: one line each.
        note: further figures.
    """

    name: str
    value: float
    limit: float
    offenders: list[str]
    least: bool = False
    note: str = ""

    @property
    def passes(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit


def is_bare_init(name: str, source: str) -> bool:
    """Tell whether a file is an `__init__.py` without imports, functions or classes."""
    plain = (ast.Expr, ast.Assign, ast.AnnAssign)
    return Path(name).name == "__init__.py" and all(isinstance(node, plain) for node in ast.parse(source).body)


def lines_of(source: str) -> int:
    return len(source.splitlines())


def functions_of(source: str) -> list[tuple[str, int, int]]:
    """Return name, first line and number of lines of every function, nested ones included."""
    return [
        (node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function)
    ]


def bad_openings(source: str) -> list[tuple[str, int]]:
    """Return name and line of every function and class whose docstring starts with `BAD_OPENING`."""
    return [
        (node.name, node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function | ast.ClassDef) and (ast.get_docstring(node) or "").startswith(BAD_OPENING)
    ]


def single_importers(graph: Mapping[str, set[str]]) -> dict[str, str]:
    """Return each module that exactly one module imports, with that module."""
    importers: dict[str, list[str]] = {module: [] for module in graph}
    for importer, imported in graph.items():
        for module in imported - {importer}:
            importers[module].append(importer)
    return {module: found[0] for module, found in sorted(importers.items()) if len(found) == 1}


def size_measures(sources: Mapping[str, str]) -> list[Measure]:
    """Measure numbers and lengths of files, by name and source."""
    counted = {name: lines_of(text) for name, text in sources.items() if not is_bare_init(name, text)}
    inits = len(sources) - len(counted)
    every = median(map(lines_of, sources.values()))
    short = [f"{n}: {x} lines" for n, x in sorted(counted.items(), key=lambda p: p[1]) if x < LEAST_MEDIAN_LINES]
    long = [f"{n}: {x} lines" for n, x in sorted(counted.items(), key=lambda p: -p[1]) if x > MOST_FILE_LINES]
    total = sum(map(lines_of, sources.values()))
    return [
        Measure("files", len(sources), MOST_FILES, [], note=f"{inits} bare __init__.py among them; {total} lines"),
        Measure(
            "median lines of a file",
            median(counted.values()),
            LEAST_MEDIAN_LINES,
            short,
            least=True,
            note=f"without bare __init__.py; with them {every:g}; offenders are the files below the limit",
        ),
        Measure("longest file", max(counted.values()), MOST_FILE_LINES, long),
    ]


def function_measure(sources: Mapping[str, str]) -> Measure:
    """Measure the share of long functions, in percent."""
    found = [
        (f"{name}:{line} {f}: {n} lines", n) for name, text in sources.items() for f, line, n in functions_of(text)
    ]
    long = [text for text, n in found if n > LONG_FUNCTION_LINES]
    return Measure(
        f"functions > {LONG_FUNCTION_LINES} lines (%)",
        100 * len(long) / len(found),
        MOST_LONG_FUNCTIONS_PERCENT,
        long,
        note=f"{len(long)} of {len(found)}; median {median(n for _, n in found):g} lines",
    )


def opening_measure(sources: Mapping[str, str]) -> Measure:
    """Count the docstrings of functions and classes that start with `BAD_OPENING`."""
    found = [f"{name}:{line} {owner}" for name, text in sources.items() for owner, line in bad_openings(text)]
    every = sum(text.count(f'"""{BAD_OPENING}') for text in sources.values())
    note = f"{every} with those of modules and attributes"
    return Measure(f"docstrings that open: {BAD_OPENING.strip()}", len(found), MOST_BAD_OPENINGS, found, note=note)


def import_measures(graph: Mapping[str, set[str]], lines: Mapping[str, int]) -> list[Measure]:
    """Count import cycles and modules with a single importer."""
    groups = [" <-> ".join(group) for group in cycles(dict(graph))]
    single = single_importers(graph)
    share = 100 * sum(lines[module] for module in single) / sum(lines.values())
    offenders = [f"{module} <- {importer}" for module, importer in single.items()]
    return [
        Measure("import cycles", len(groups), MOST_CYCLES, groups),
        Measure(
            "modules with one importer (%)",
            100 * len(single) / len(graph),
            MOST_SINGLE_IMPORTERS_PERCENT,
            offenders,
            note=f"{len(single)} of {len(graph)}; {share:.0f} % of the lines",
        ),
    ]


def measures() -> list[Measure]:
    """Measure the package."""
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    sources = {path.relative_to(PACKAGE).as_posix(): text for path, text in texts.items()}
    lines = {name_of(path): lines_of(text) for path, text in texts.items()}
    return [
        *size_measures(sources),
        function_measure(sources),
        *import_measures(GRAPH, lines),
        opening_measure(sources),
    ]


MEASURES = measures()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_the_package_keeps_its_limits(measure: Measure) -> None:
    sign = ">=" if measure.least else "<="
    assert measure.passes, f"{measure.value:g}, expected {sign} {measure.limit:g}\n" + "\n".join(measure.offenders)


def test_lines_and_bare_inits_are_counted() -> None:
    assert is_bare_init("a/__init__.py", '"""Doc."""\n__version__ = "1"\n')
    assert not is_bare_init("a/__init__.py", "from a.b import c\n")
    assert not is_bare_init("a/b.py", '"""Doc."""\n')
    long = "x = 1\n" * (MOST_FILE_LINES + 1)
    files, middle, longest = size_measures({"a/__init__.py": "", "a/b.py": long, "a/c.py": "x = 1\n\n# y\n"})
    assert (files.value, files.passes) == (3, True)
    assert middle.value == (MOST_FILE_LINES + 1 + 3) / 2
    assert middle.offenders == ["a/c.py: 3 lines"]
    assert longest.offenders == [f"a/b.py: {MOST_FILE_LINES + 1} lines"]
    assert not longest.passes
    assert not size_measures({f"{i}.py": "x = 1\n" for i in range(MOST_FILES + 1)})[0].passes


def test_long_functions_are_found() -> None:
    body = "        x = 1\n"
    source = "class A:\n    @staticmethod\n    def f():\n" + body * LONG_FUNCTION_LINES + "\ndef g(): ...\n"
    assert functions_of(source) == [("g", LONG_FUNCTION_LINES + 5, 1), ("f", 3, LONG_FUNCTION_LINES + 1)]
    measure = function_measure({"a.py": source})
    assert measure.value == 50
    assert not measure.passes
    assert len(measure.offenders) == 1
    assert function_measure({"a.py": source.replace(body, "", 1)}).value == 0


def test_docstring_openings_are_found() -> None:
    source = (
        '"""What a module may say."""\n'
        'class A:\n    """What it is."""\n    async def f(self):\n        """What.\n\n        What else."""\n'
        'def g():\n    """What it does."""\n    x = "What else"\n    def h():\n        """\n        What it hides."""\n'
        'def k():\n    """Whatever."""\n    """What is after."""\n'
    )
    assert sorted(name for name, _ in bad_openings(source)) == ["A", "g", "h"]


def test_single_importers_are_found() -> None:
    graph = {"p": set(), "p.a": {"p.b", "p.c"}, "p.b": {"p.c"}, "p.c": {"p.c"}, "p.d": set[str]()}
    assert single_importers(graph) == {"p.b": "p.a"}
    cyclic, single = import_measures({"p.a": {"p.b"}, "p.b": {"p.a"}}, {"p.a": 1, "p.b": 1})
    assert cyclic.offenders == ["p.a <-> p.b"]
    assert not cyclic.passes
    assert single.value == 100


def main() -> int:
    """Print the measurements as a table, then the offenders; return 1 when a limit is broken."""
    print(f"{'measure':28} {'value':>8} {'limit':>8}  result  note")
    for m in MEASURES:
        limit = f"{'>=' if m.least else '<='} {m.limit:g}"
        print(f"{m.name:28} {m.value:>8.4g} {limit:>8}  {'ok' if m.passes else 'FAILS':6}  {m.note}")
    for m in MEASURES:
        if m.offenders and not m.passes:
            print(f"\n{m.name} ({len(m.offenders)}):")
            print("\n".join(f"  {offender}" for offender in m.offenders))
    return int(not all(m.passes for m in MEASURES))


if __name__ == "__main__":
    sys.exit(main())
