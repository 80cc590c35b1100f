"""Train a video VAE: accelerate launch --num_processes 8 train_vae_accelerate.py --manifest ..."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository, not from this folder
    import train  # noqa: F401
    from titans_video.cli.launchers import train_vae_accelerate

    sys.exit(train_vae_accelerate())
