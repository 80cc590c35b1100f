"""`python -m titans_video`: the same as `titans-video`."""

import sys

from titans_video.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
