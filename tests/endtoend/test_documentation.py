"""Run the commands that are on other pages of the documentation than docs/commands.md, as test_readme.py runs those."""

import shlex
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.endtoend.test_readme import COMMANDS, Done, Workspace, commands

PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
ELSEWHERE = ("scripts/", "-m pytest")  # these need the repository itself


def others() -> list[str]:
    """Return each command that docs/commands.md does not have, once, in the order of the pages."""
    known = set(commands(COMMANDS))
    return list(dict.fromkeys(c for page in PAGES for c in commands(page) if c not in known))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("reader"))


def run(command: str, workspace: Workspace) -> Done:
    words = shlex.split(command, comments=True)
    if words[0] == "source":
        return Done(0 if words[1:] == [".venv/bin/activate"] else 1, "")
    if words[0] in ("python", "python3") and any(name in command for name in ELSEWHERE):
        if "pytest" in words:  # these run with the tests
            words.append("--collect-only")
        done = subprocess.run([sys.executable, *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        return Done(done.returncode, done.stdout + done.stderr)
    return workspace.run(shlex.join(words))


@pytest.mark.parametrize("command", others())
def test_command(command: str, workspace: Workspace) -> None:
    done = run(command, workspace)
    assert done.code == 0, f"{shlex.join(workspace.words(command))}\n{done.output[-3000:]}"
