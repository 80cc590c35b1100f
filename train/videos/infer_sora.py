"""Generate a video from a SoraDiT checkpoint: infer_sora.py --checkpoint outputs_sora/last.pt --prompt ..."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository, not from this folder
    import train  # noqa: F401
    from titans_video.cli.launchers import infer_sora

    sys.exit(infer_sora())
