"""A few kills of tests/endtoend/kill_and_resume.py; use --kills 50 or more by hand."""

import subprocess
import sys
from pathlib import Path

KILLS = 6


def test_killed_at_random_instants() -> None:
    script = Path(__file__).with_name("kill_and_resume.py")  # in a separate process, because it forks
    words = [sys.executable, str(script), "--kills", str(KILLS), "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bitwise the same") == KILLS
    assert done.stdout.count("in a save") == KILLS // 2
