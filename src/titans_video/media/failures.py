"""Why a media file cannot be used."""

from pathlib import Path
from typing import Literal, get_args

from titans_video.errors import DataError

Reason = Literal[
    "missing",
    "directory",
    "not-a-file",
    "no-permission",
    "empty-file",
    "unreachable",
    "not-a-video",
    "not-an-image",
    "playlist",
    "no-video-stream",
    "cover-art-only",
    "no-decoder",
    "no-frames",
    "damaged",
    "tilted",
    "unsupported-colour",
    "unsupported-alpha",
    "changed",
    "timeout",
]

REASONS: tuple[Reason, ...] = get_args(Reason)


class UnreadableMedia(DataError):
    """Raised for a media file that cannot be used; `reason` is one of `REASONS`."""

    def __init__(self, reason: Reason, path: Path | str, explanation: str) -> None:
        super().__init__(f"{path}: {explanation}")
        self.reason: Reason = reason
        self.path = Path(path)
        self.explanation = explanation

    def __reduce__(self) -> tuple[type["UnreadableMedia"], tuple[Reason, Path, str]]:
        return type(self), (self.reason, self.path, self.explanation)
