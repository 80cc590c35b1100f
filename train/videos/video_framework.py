"""Train SoraDiT: video_framework.py --manifest ...; or generate a video: video_framework.py infer --checkpoint ..."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository, not from this folder
    import train  # noqa: F401
    from titans_video.cli.launchers import video_framework

    sys.exit(video_framework())
