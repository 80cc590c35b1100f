"""python train.py --mode train|inference; without a mode it says what it can do."""

import sys
from pathlib import Path

import train  # noqa: F401  the folder beside this file: it finds src/ where titans-video is not installed
from titans_video.cli.launchers import train_script

if __name__ == "__main__":
    sys.exit(train_script(Path(__file__).resolve().parent))
