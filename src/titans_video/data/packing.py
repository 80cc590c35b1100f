"""What a probe found, in little room: a few hundred bytes a clip, so that a million of them fit into memory and a file.

Timestamps of nearly every file rise by one step, or by a pattern of two or three: they are kept as runs of steps.
"""

import json
from collections.abc import Sequence
from itertools import groupby, pairwise

from titans_video.media.info import VideoInfo

_TIMES = ("pts", "key_pts")


def pack(info: VideoInfo) -> bytes:
    """`unpack` undoes it."""
    plain = info.to_dict()
    for name in _TIMES:
        plain[name] = _runs(plain[name])
    return json.dumps(plain, separators=(",", ":")).encode()


def unpack(packed: bytes) -> VideoInfo:
    """What `pack` was given.

    Raises:
        ValueError, KeyError, TypeError: `packed` is damaged, or of another version.
    """
    plain = json.loads(packed)
    for name in _TIMES:
        plain[name] = _values(plain[name])
    return VideoInfo.from_dict(plain)


def _runs(values: Sequence[int]) -> list[int]:
    """[first, step, count, step, count, ...]"""
    found = list(values[:1])
    for step, group in groupby(b - a for a, b in pairwise(values)):
        found += [step, sum(1 for _ in group)]
    return found


def _values(runs: Sequence[int]) -> list[int]:
    values = list(runs[:1])
    for step, count in zip(runs[1::2], runs[2::2], strict=True):
        last = values[-1]
        values.extend(range(last + step, last + step * count + 1, step) if step > 0 else [last] * count)
    return values
