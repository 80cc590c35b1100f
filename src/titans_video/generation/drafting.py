"""Videos from nothing that begin with a few frames of a draft.

Frames that are made of noise together may agree less with one another than frames that go on from known ones do with
these; in the bouncing world by far (docs/long-video.md). So the first window may be made twice: of the first making,
the draft, its leading frames are kept; the rest is made again, going on from these as every later window goes on from
the one before it.
"""

from titans_video.errors import ConfigError
from titans_video.generation.joining import Joins
from titans_video.generation.windows import check_overlap
from titans_video.types import CodecSpec


def check_draft(flag: str, draft: int, joins: Joins, spec: CodecSpec, frames: int) -> None:
    """Refuse a draft that a network cannot go on from.

    Args:
        flag: that says it.
        draft: how many leading frames are kept.
        joins: what the network can do about given frames; it takes a time for each.
        spec: of the codec.
        frames: of the first window.
    Raises:
        ConfigError: the network was not trained to go on from so many frames, or they are no whole latent frames, or
            none are left to make.
    """
    if not (joins.goes_on_from_frames or (draft == 1 and joins.goes_on_from_one)):
        from_one = "; it can from one" if joins.goes_on_from_one else ""
        raise ConfigError(
            f"{flag} {draft}: this model was not trained to go on from {draft} frames (v2v rows or "
            f"--task-mix){from_one}. {flag} 0 makes no draft."
        )
    check_overlap(spec, frames, draft, "continue", flag)
