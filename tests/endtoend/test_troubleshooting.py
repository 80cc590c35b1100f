"""The commands of docs/troubleshooting.md run as those of the READMEs do, except in blocks marked `needs: weights`."""

import re
import shlex

import pytest

from tests.conftest import REPOSITORY
from tests.endtoend.test_readme import Workspace

PAGE = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(<!-- needs: weights -->\n)?```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """One command each, in the order of the page, without the marked blocks."""
    lines = "\n".join(body for marked, body in BLOCK.findall(PAGE) if not marked).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("trouble"))


@pytest.mark.parametrize("command", commands())
def test_command(command: str, workspace: Workspace) -> None:
    done = workspace.run(command)
    assert done.code == 0, f"{shlex.join(workspace.words(command))}\n{done.output[-3000:]}"


def test_the_page_has_twelve_problems_and_links_to_each() -> None:
    problems = re.findall(r"^## (\d+)\. ", PAGE, re.MULTILINE)
    assert problems == [str(number) for number in range(1, 13)]
    for number in problems:
        assert re.search(rf"\[{number}\]\(#{number}-", PAGE)
