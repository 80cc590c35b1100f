"""The site builds without warnings and requests, pages render as written, and every code block is checked.

A block of commands (```bash) runs in tests/endtoend/test_readme.py or tests/endtoend/test_documentation.py. A block
that needs more than a test has is marked by a line above it: `<!-- needs: weights -->`, `gpu`, or `time` (it takes
minutes or hours). A block of text (```text) shows output and no commands, except a pattern with `...` in it.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "README.zh-CN.md", REPOSITORY / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"^(?:<!-- needs: (?P<needs>.*) -->\n)?```(?P<language>.*)\n(?P<body>(?:.*\n)*?)```$", re.MULTILINE)
NEEDS = {"weights", "gpu", "time"}
RUN = {"bash"}  # the commands are collected from the pages themselves
TESTED = {"python", "json", "jsonl", "yaml"}  # a test reads the page, or the block is on docs/commands.md
COMMAND = re.compile(r"^\$? *(titans-video|python3?|accelerate|torchrun|make|pip|export|git) ", re.MULTILINE)

REFERENCE = DOCS / "reference" / "commands.md"  # tests/unit/test_cli_help.py reads its examples
SETUP = "make setup\nsource .venv/bin/activate\n"  # the tests run after it


def names(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=names)


@every_document
def test_every_code_block_runs_or_says_what_it_needs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks), "a block is indented, or not closed"
    commands_page = (DOCS / "commands.md").read_text(encoding="utf-8")
    wrong = []
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        language, body = block["language"], block["body"]
        if block["needs"]:
            if block["needs"] not in NEEDS:
                wrong.append(f"{line}: needs {block['needs']}; known are {', '.join(sorted(NEEDS))}")
        elif language == "text":
            if COMMAND.search(body) and body != SETUP and " ..." not in body and path != REFERENCE:
                wrong.append(f"{line}: a command in a block of text; write ```bash, so that it runs, or mark it")
        elif language in TESTED:
            if body not in commands_page and not read_by_a_test(path):
                wrong.append(f"{line}: no test reads the {language} of this page")
        elif language not in RUN:
            wrong.append(f"{line}: the language {language!r} is not one of text, {', '.join(sorted(RUN | TESTED))}")
    assert not wrong, "\n".join(wrong)


def read_by_a_test(page: Path) -> bool:
    return any(page.name in file.read_text(encoding="utf-8") for file in (REPOSITORY / "tests").rglob("test_*.py"))


def prose(path: Path) -> list[str]:
    """Return the lines of a page with those of code blocks emptied."""
    blank = FENCE.sub(lambda block: "\n" * block[0].count("\n"), path.read_text(encoding="utf-8"))
    return blank.splitlines()


@every_document
def test_nothing_is_there_twice(path: Path) -> None:
    """A section with the title of another one has no anchor of its own; a paragraph twice is a slip of an edit."""
    headings = [line for line in prose(path) if line.startswith("#")]
    paragraphs = [text for text in "\n".join(prose(path)).split("\n\n") if len(text) > 200]
    for parts in (headings, paragraphs):
        assert not [part for part, count in Counter(parts).items() if count > 1]


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_lists_render_on_the_site(path: Path) -> None:
    """Python-Markdown needs an empty line before a list, and four spaces before a list inside it."""
    wrong, before, inside = [], "", False
    for number, line in enumerate(prose(path), 1):
        item = re.match(r"( *)(?:[-*]|\d+\.) ", line)
        if item and ((not inside and before.strip()) or len(item[1]) % 4):
            wrong.append(f"{number}: {line[:80]}")
        inside = bool(item or (inside and line.strip()))
        before = line
    assert not wrong, "\n".join(wrong)


@every_document
def test_pictures_have_a_text(path: Path) -> None:
    text = "\n".join(prose(path))
    assert not re.findall(r"!\[\s*\]\(.*?\)", text)
    assert "<img" not in text, "write a picture as ![text](file)"


@every_document
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", "\n".join(prose(path)))):
        if not urlsplit(target).scheme and (file := target.partition("#")[0]):
            assert (path.parent / file).exists(), target


LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """The resources, links and anchors of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.without_alt: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in LOADS and LOADS[tag] in values:
            self.loads.append(values[LOADS[tag]])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img" and not values.get("alt", "").strip():
            self.without_alt.append(values.get("src", ""))
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None:
        pytest.skip("the site is not built: mkdocs-material is missing (make setup, or pip install -e '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in site.rglob("*.html")}


def test_every_page_is_built(built: dict[str, Page]) -> None:
    assert set(built) == {str(p.relative_to(DOCS).with_suffix(".html")) for p in PAGES} | {"404.html"}


def test_the_site_loads_nothing_from_elsewhere(site: Path, built: dict[str, Page]) -> None:
    outside = [f"{name}: {url}" for name, page in built.items() for url in page.loads if urlsplit(url).netloc]
    for style in site.rglob("*.css"):
        found = re.findall(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", style.read_text(encoding="utf-8"))
        outside += [f"{style.name}: {url}" for url in found]
    assert not outside, "\n".join(outside)


def test_links_and_anchors_of_the_site_exist(site: Path, built: dict[str, Page]) -> None:
    broken = []
    for name, page in built.items():
        if name == "404.html":  # its links start at the root of a server
            continue
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(url.path))) if url.path else name
            if not (site / target).is_file():
                broken.append(f"{name}: {link}")
            elif url.fragment and target in built and unquote(url.fragment) not in built[target].anchors:
                broken.append(f"{name}: {link} (no such anchor)")
        broken += [
            f"{name}: {src}" for src in page.loads if not (site / os.path.dirname(name) / src).resolve().exists()
        ]
    assert not broken, "\n".join(broken)


def test_every_picture_of_the_site_has_a_text(built: dict[str, Page]) -> None:
    assert not {name: page.without_alt for name, page in built.items() if page.without_alt}
