"""Train or generate: python train.py --mode train|inference. Without a mode it prints its usage."""

import sys
from pathlib import Path

import train  # noqa: F401  makes titans_video importable from src/ if it is not installed
from titans_video.cli.launchers import train_script

if __name__ == "__main__":
    sys.exit(train_script(Path(__file__).resolve().parent))
