"""Read what files declare about their pictures and PyAV does not hand out."""

from functools import cache
from typing import Any

from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame


def side_data(frame: VideoFrame, kind: SideDataType) -> bytes | None:
    """Return a frame's side data of one kind, or None. Kinds that PyAV has no name for (EXIF) are ignored."""
    _accept_unnamed_kinds()
    every: Any = frame.side_data  # a mapping by type, but its stubs declare a mapping by name
    found = every.get(kind)
    return None if found is None else bytes(found)


@cache
def _accept_unnamed_kinds() -> None:
    """Let PyAV list side data of kinds that its enumeration lacks; it raises ValueError for all data of the frame."""

    def unnamed(kinds: Any, value: int) -> Any:
        member = object.__new__(kinds)
        member._name_, member._value_ = f"UNNAMED_{value}", value
        return member

    enumeration: Any = SideDataType
    enumeration._missing_ = classmethod(unnamed)
