"""The Chinese pages: commands that run elsewhere, links that lead somewhere, and one word for one thing."""

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.endtoend.test_readme import COMMANDS, blocks, commands

PAGES = (REPOSITORY / "README.zh-CN.md", *sorted((REPOSITORY / "docs/zh").glob("*.md")))
OTHER_WORDS = {
    "字幕": "描述文本 or 标注",
    "联系表": "预览拼图",
    "总览图": "预览拼图",
    "跟踪器": "实验跟踪",
    "模型说明": "模型卡片",
    "模型卡。": "模型卡片",
    "继续训练": "断点续训, or 接着训练",
    "恢复训练": "断点续训",
    "提示语": "提示词",
}
LINK = re.compile(r"\]\(([^)#\s]+)")
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def test_all_pages_are_here() -> None:
    names = {path.stem for path in PAGES[1:]}
    assert names >= {"index", "start", "train", "tune", "data", "long-video", "faq"}


@every_page
def test_commands_are_those_of_the_command_page(path: Path) -> None:
    """There they run; a block below `<!-- needs: weights -->` downloads a model and does not run."""
    assert not set(commands(path)) - set(commands(COMMANDS))
    for language in ("python", "json", "jsonl"):
        assert not set(blocks(path, language)) - set(blocks(COMMANDS, language))


@every_page
def test_one_word_for_one_thing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not {f"{word}: write {better}" for word, better in OTHER_WORDS.items() if word in text}


@every_page
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    assert not [target for target in targets if "://" not in target and not (path.parent / target).exists()]


@every_page
def test_pictures_have_a_text(path: Path) -> None:
    assert "![](" not in path.read_text(encoding="utf-8")
