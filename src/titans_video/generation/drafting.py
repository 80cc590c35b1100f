"""Videos from nothing that begin with a few frames of a draft.

Frames that are made of noise together agree less with one another than frames that go on from known ones: in the
bouncing world the two blocks of a first window keep to one path half as often as a later window keeps to the one before
it. So the first window may be made twice: of the first making, the draft, its leading frames are kept; the rest is made
again, going on from these as every later window goes on from the one before it.
"""

from titans_video.errors import ConfigError
from titans_video.generation.joining import Joins
from titans_video.generation.windows import legal_overlaps
from titans_video.types import CodecSpec


def check_draft(flag: str, draft: int, joins: Joins, spec: CodecSpec, frames: int) -> None:
    """Refuse a draft that a network cannot go on from.

    Args:
        flag: that says it.
        draft: how many leading frames are kept.
        joins: what the network can do about given frames; it takes a time for each.
        spec: of the codec.
        frames: of the first window, more than `draft`.
    Raises:
        ConfigError: the network was not trained to go on from so many frames, or they are no whole latent frames.
    """
    if not (joins.goes_on_from_frames or (draft == 1 and joins.goes_on_from_one)):
        raise ConfigError(
            f"{flag} {draft}: this model was not trained to go on from {draft} frames (v2v rows or --task-mix), and "
            "cannot make the rest of a draft again; leave it out (0: no draft)."
        )
    legal = legal_overlaps(spec, frames, "continue")
    if draft not in legal:
        near = [max((n for n in legal if n < draft), default=None), min((n for n in legal if n > draft), default=None)]
        raise ConfigError(
            f"{flag} {draft}: a draft's frames are whole latent frames of the codec {spec.name}; the nearest legal: "
            f"{' and '.join(str(n) for n in near if n is not None) or 0}."
        )
