"""The language of documentation and messages: plain words, short sentences, few commas, and guides that address you.

`python -m tests.unit.test_language` prints the measures and every offender.

Definitions:

- Pages are README.md, CONTRIBUTING.md and all `.md` files below docs/. Chinese pages only count for banned phrases and
  long lines.
- Prose is the text of a page without code blocks, comments, headings and tables. A piece of inline code, a formula or
  a link counts as one word or as its text. An item of a list is a paragraph of its own.
- Messages are the string constants of `src/titans_video` with at least four words that are not docstrings: errors, log
  lines, prints, pages. The docstrings of `config/` and `cli/` count too, because `--help` prints them.
- A sentence ends with `.`, `!` or `?` before a capital, or with its paragraph. A list of names is no sentence: at least
  a third of its words are inline code or at least a third of them end with a comma.
- A comma is one before a space: `1,000` has none.
- A line is long above 120 characters. Rows of Markdown tables are no lines: they cannot be broken.
- The docstrings of a file are those of its module, classes and functions; strings below attributes count on their own.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY
from tests.unit.test_layers import FILES, PACKAGE

MOST_WORDS = 35
MOST_LINE = 120
MOST_LONG_LINES_PERCENT = 2
LEAST_YOU_PER_1000 = 10
MOST_COMMAS_PER_SENTENCE = 1.5
MOST_DOCSTRINGS_PERCENT = 14

BANNED = {
    "told": r"\b(is|are|was|were|be|been|being) told\b",
    "go on": r"\b(go|goes|gone|going|went) on\b",
    "stand": r"\b(stand|stands|stood)\b",
    "lie": r"\b(lie|lies|lay|lain)\b",
    "held": r"\bheld\b",
    "alone": r"\balone\b",
    "in place of": r"\bin (the )?place of\b",
    "anew": r"\banew\b",
    "what is known": r"\bwhat is (known|told|said)\b",
    "says which": r"\b(say|says|said) (which|so)\b",
    "is said": r"\b(is|are) said\b",
    "in silence": r"\bin silence\b",
    "with a word": r"\b(stops?|ends?)( \S+){0,3} with a word\b",
    "; none:": r"; none\b",
    "archaic": r"\b(thereof|therein|thereby|hence|henceforth|whence|whereby|wherein|whilst|amongst|lest|hitherto|upon"
    r"|shall|nought|aught|herein|hereby|thus)\b",
    "filler": r"\b(please note|it should be noted|as well as|in order to|due to the fact|utili[sz]e[sd]?)\b",
    "字幕": "字幕",
}
"""The phrases that readers stumble over, by name, as regular expressions that ignore case."""

ALLOWED = (
    r"\bheld[- ]out\b",  # the field's term for data that training does not see
    r"\bstands? (for|out)\b",
    r"\bstand-ins?\b",
)
"""Terms that contain a banned phrase and may stay."""

VALUE = "`none` is a value of this flag, in a list of its values"
EXCEPTIONS = {
    ("src/titans_video/codecs/diffusers.py", "first frame alone"): "part of a fingerprint in caches and checkpoints",
    ("src/titans_video/config/options.py", "; none: only the LLM"): VALUE,
    ("src/titans_video/config/options.py", "; none: only the overlap"): VALUE,
    ("docs/reference/commands.md", "; none: only the LLM"): VALUE,
    ("docs/reference/commands.md", "; none: only the overlap"): VALUE,
}
"""Why a banned phrase stays, by file and the words around it."""

ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|cf|et al|approx|Fig|Eq|No)\.")
STYLE_SHEET = re.compile(r"[\w)]\{[\w-]+:")
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s|[-*] |\w+: )|</?(?:p|h\d|div|t[dhr]|li|small|figure|details|summary)\b[^<>]*>")
"""Where a paragraph of a message ends: an empty or indented line, an item of a list, a block of HTML."""
TABLE_ROW = re.compile(r"^\s*\|")


class Text(NamedTuple):
    """A paragraph or a message, and where it is.

    Attributes:
        place: file, and line where it starts.
    """

    place: str
    text: str


def pages() -> dict[str, str]:
    """Return the source of each page by its path in the repository."""
    found = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in sorted(found)}


def is_chinese(name: str) -> bool:
    return name.startswith("docs/zh/") or ".zh-" in name


def paragraphs(name: str, page: str) -> Iterator[Text]:
    """Yield the paragraphs of a page: prose without markup."""
    blank = lambda found: "\n" * found.group().count("\n")  # noqa: E731
    for pattern in (r"<!--.*?-->", r"^( *)```.*?^\1```$", r"^( *)~~~.*?^\1~~~$", r"\$\$.*?\$\$", r"\A---\n.*?^---$"):
        page = re.sub(pattern, blank, page, flags=re.MULTILINE | re.DOTALL)
    lines: list[str] = []
    start = 0
    for number, line in enumerate([*page.splitlines(), ""], 1):
        item = re.match(r"\s*([-*+]|\d+\.)\s+", line)
        ends = not line.strip() or TABLE_ROW.match(line) or re.match(r"\s*(#|!!!|\?\?\?|===|<)", line)
        if (item or ends) and lines:
            yield Text(f"{name}:{start}", plain(" ".join(lines)))
            lines = []
        if not ends:
            start = start if lines else number
            lines.append(line[item.end() :] if item else line.strip())


def plain(text: str) -> str:
    """Return Markdown or HTML as words: `Code` for inline code, its text for a link."""
    text = re.sub(r"``.+?``|`[^`]+`|\\\(.+?\\\)|\$[^$\s][^$]*\$", "Code", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"</?[a-zA-Z][^<>]*>|\*\*|__", "", text)).strip()


def sentences(text: str) -> list[str]:
    text = ABBREVIATIONS.sub(r"\1", text)
    return [s for s in re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9*])", text) if words(s)]


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def is_list_of_names(sentence: str) -> bool:
    found = words(sentence)
    codes = sum("Code" in word for word in found)
    return 3 * max(codes, sum(word.endswith(",") for word in found)) >= len(found)


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, bool]]:
    """Yield each docstring, and whether it belongs to an attribute."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        owns = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for i, child in enumerate(body if isinstance(body, list) else []):
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield child, not (owns and i == 0)


def messages(name: str, source: str, is_helped: bool) -> Iterator[Text]:
    """Yield the messages of a module.

    Args:
        is_helped: `--help` prints its docstrings.
    """
    tree = ast.parse(source)
    docs = {id(doc.value): doc for doc, _ in docstrings(tree)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "Value" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        if len(text.split()) >= 4 and not STYLE_SHEET.search(text) and (id(node) not in docs or is_helped):
            line = getattr(node, "lineno", 0)
            for part in PARAGRAPH.split(cleandoc(text)):
                yield Text(f"{name}:{line}", plain(part))


def all_messages() -> list[Text]:
    found: list[Text] = []
    for path, source in SOURCES.items():
        helped = path.startswith(("src/titans_video/config/", "src/titans_video/cli/"))
        found += messages(path, source, helped)
    return found


def banned_in(texts: list[Text]) -> list[str]:
    """Return the places with a banned phrase, except the named ones."""
    found = []
    for place, text in texts:
        rest = re.sub("|".join(ALLOWED), "", text, flags=re.IGNORECASE)
        for name, words_around in EXCEPTIONS:
            rest = rest.replace(words_around, "") if place.startswith(f"{name}:") else rest
        for phrase, pattern in BANNED.items():
            hit = re.search(pattern, rest, re.IGNORECASE)
            if hit:
                found.append(f"{place} ({phrase}): ...{rest[max(0, hit.start() - 60) : hit.end() + 40]}...")
    return found


def too_long(texts: list[Text]) -> list[str]:
    return [
        f"{place}: {len(words(sentence))} words: {sentence}"
        for place, text in texts
        for sentence in sentences(text)
        if len(words(sentence)) > MOST_WORDS and not is_list_of_names(sentence)
    ]


def long_lines(texts: Mapping[str, str]) -> tuple[list[str], int]:
    """Return the long lines, and the number of all lines that count."""
    counted = [
        (f"{name}:{number}: {len(line)}", len(line))
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if not (name.endswith(".md") and TABLE_ROW.match(line))
    ]
    return [place for place, length in counted if length > MOST_LINE], len(counted)


class Style(NamedTuple):
    """How a page reads."""

    words: int
    words_per_sentence: float
    commas_per_sentence: float
    you_per_1000: float


def style(texts: list[Text]) -> Style:
    every = [sentence for text in texts for sentence in sentences(text.text)]
    n = sum(len(words(sentence)) for sentence in every)
    commas = sum(len(re.findall(r",(?=\s)", sentence)) for sentence in every)
    you = sum(len(re.findall(r"\b(you|your|yours|yourself)\b", sentence, re.IGNORECASE)) for sentence in every)
    return Style(n, n / max(1, len(every)), commas / max(1, len(every)), 1000 * you / max(1, n))


def docstring_shares() -> tuple[float, float]:
    """Return the percentages of lines in docstrings, and in strings below attributes."""
    lines = sum(len(source.splitlines()) for source in SOURCES.values())
    shares = [0, 0]
    for source in SOURCES.values():
        for doc, of_attribute in docstrings(ast.parse(source)):
            shares[of_attribute] += (doc.end_lineno or doc.lineno) - doc.lineno + 1
    return 100 * shares[0] / lines, 100 * shares[1] / lines


SOURCES = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
PAGES = pages()
PROSE = {name: list(paragraphs(name, page)) for name, page in PAGES.items()}
ENGLISH = {name: prose for name, prose in PROSE.items() if not is_chinese(name)}
GUIDES = [name for name in PAGES if name.startswith("docs/guides/")]
MESSAGES = all_messages()


def rows_and_headings() -> list[Text]:
    """Return the rows of tables and the headings of the pages."""
    fence = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
    return [
        Text(f"{name}:{number}", plain(line))
        for name, page in PAGES.items()
        for number, line in enumerate(fence.sub(lambda m: "\n" * m.group().count("\n"), page).splitlines(), 1)
        if line.lstrip().startswith(("|", "#"))
    ]


def test_pages_have_no_banned_phrase() -> None:
    found = banned_in([*rows_and_headings(), *(text for prose in PROSE.values() for text in prose)])
    assert not found, "\n".join(found)


def test_messages_have_no_banned_phrase() -> None:
    found = banned_in(MESSAGES)
    assert not found, "\n".join(found)


def test_sentences_of_pages_are_short() -> None:
    found = too_long([text for prose in ENGLISH.values() for text in prose])
    assert not found, "\n".join(found)


def test_sentences_of_messages_are_short() -> None:
    found = too_long(MESSAGES)
    assert not found, "\n".join(found)


def test_no_docstring_starts_with_what() -> None:
    found = [
        f"{name}:{doc.lineno}"
        for name, source in SOURCES.items()
        for doc, _ in docstrings(ast.parse(source))
        if isinstance(doc.value, ast.Constant) and str(doc.value.value).lstrip().startswith("What ")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("texts", [PAGES, SOURCES], ids=["pages", "sources"])
def test_few_lines_are_long(texts: dict[str, str]) -> None:
    found, count = long_lines(texts)
    assert 100 * len(found) <= MOST_LONG_LINES_PERCENT * count, "\n".join(found)


@pytest.mark.parametrize("name", GUIDES, ids=lambda name: Path(name).name)
def test_guides_address_the_reader_in_simple_sentences(name: str) -> None:
    found = style(PROSE[name])
    assert found.you_per_1000 >= LEAST_YOU_PER_1000
    assert found.commas_per_sentence <= MOST_COMMAS_PER_SENTENCE


def test_each_exception_is_needed() -> None:
    texts = [*rows_and_headings(), *MESSAGES]
    for (name, words_around), reason in EXCEPTIONS.items():
        assert reason
        assert any(t.place.startswith(f"{name}:") and words_around in t.text for t in texts), words_around


def test_prose_is_found() -> None:
    page = (
        "# Title\n\nUse `a, b` for\nthis. See [the page](x.md).\n\n- one\n- two\n\n| a |\n```py\nx\n```\n<!-- n -->\n"
    )
    assert list(paragraphs("p", page)) == [
        Text("p:3", "Use Code for this. See the page."),
        Text("p:6", "one"),
        Text("p:7", "two"),
    ]
    assert sentences("Use Code, e.g. This. See 1.5 and v.2 here. Then!") == [
        "Use Code, e.g This.",
        "See 1.5 and v.2 here.",
        "Then!",
    ]
    assert style([Text("p", "You, and your 1,000 words. None.")]) == Style(6, 3, 0.5, 1000 / 3)


def test_offenders_are_found() -> None:
    text = [Text("a.md:1", "The held-out loss stands for itself."), Text("a.md:2", "A frame is held. It lies there.")]
    assert [found.split(":")[1] for found in banned_in(text)] == ["2 (lie)", "2 (held)"]
    assert len(too_long([Text("p", "word " * MOST_WORDS), Text("p", "word " * (MOST_WORDS + 1))])) == 1
    assert not too_long([Text("p", "name, " * (MOST_WORDS + 1))])
    assert long_lines({"a.md": "|" + "x" * 200 + "\n" + "x" * 121, "b.py": "|" + "x" * 120}) == (
        ["a.md:2: 121", "b.py:1: 121"],
        2,
    )


def test_messages_are_found() -> None:
    source = (
        '"""A docstring of a module here."""\nclass A:\n    b: int\n    """Help of one flag here."""\n'
        'raise X(f"{a} is not a number" " in this file")\nname = "too short"\n'
    )
    assert [t.text for t in messages("a.py", source, False)] == ["Value is not a number in this file"]
    assert len(list(messages("a.py", source, True))) == 3


def main() -> int:
    """Print the measures and every offender; return 1 when there is one."""
    print(f"{'page':34} {'words':>6} {'words/sentence':>15} {'commas/sentence':>16} {'you/1,000':>10}")
    guides = [text for name in GUIDES for text in PROSE[name]]
    every = [text for prose in ENGLISH.values() for text in prose]
    for name, texts in (ENGLISH | {"guides": guides, "all pages": every, "messages": MESSAGES}).items():
        s = style(texts)
        print(
            f"{name:34} {s.words:6} {s.words_per_sentence:15.1f} {s.commas_per_sentence:16.2f} {s.you_per_1000:10.1f}"
        )
    own, attributes = docstring_shares()
    print(f"docstrings of {PACKAGE.name}: {own:.1f} % of all lines, and {attributes:.1f} % below attributes")
    for name, texts_ in (("pages", PAGES), ("sources", SOURCES)):
        found, count = long_lines(texts_)
        print(f"lines above {MOST_LINE} characters in {name}: {len(found)} of {count}")
    offenders = banned_in([*rows_and_headings(), *every, *MESSAGES]) + too_long([*every, *MESSAGES])
    print("\n".join(offenders))
    print(f"{len(offenders)} offenders")
    return int(bool(offenders))


def test_docstrings_are_short() -> None:
    assert docstring_shares()[0] <= MOST_DOCSTRINGS_PERCENT


if __name__ == "__main__":
    sys.exit(main())
