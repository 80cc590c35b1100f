"""Launchers. Importing this package makes titans_video importable from src/ if it is not installed."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("titans_video") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
