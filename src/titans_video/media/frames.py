"""Tell from a decoded frame how it is displayed: turned, with which pixels, in which colours."""

import struct
from fractions import Fraction
from pathlib import Path

from av.video.frame import VideoFrame

from titans_video.media.headers import display_matrix, has_alpha
from titans_video.media.info import Colour, Matrix, Orientation, Primaries, Transfer, VideoInfo
from titans_video.media.opening import UnreadableMedia
from titans_video.storage.files import status

_MATRICES: dict[int, Matrix] = {
    0: "rgb",
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}

_UNSPECIFIED = 2
_BT2020 = 9
_SRGB, _PQ, _HLG = 13, 16, 18
_BT2020_MATRICES, _BT2020_TRANSFERS = (9, 10), (14, 15, _PQ, _HLG)
_PRIMARIES: dict[int, Primaries] = {4: "bt470m", 8: "film", _BT2020: "bt2020", 11: "dci-p3", 12: "p3"}


def pixel_aspect(ratio: Fraction | None) -> Fraction:
    """Return width over height of a pixel; 1 if none or an implausible one is given."""
    return ratio if ratio and Fraction(1, 8) <= ratio <= 8 else Fraction(1)


def orientation_of(frame: VideoFrame, path: Path) -> Orientation:
    """Read the display matrix: nine 16.16 numbers (a b u, c d v, x y w), x' = a x + c y, y' = b x + d y."""
    matrix = display_matrix(frame)
    if matrix is None:
        return Orientation()
    a, b, _, c, d = struct.unpack_from("5i", matrix)
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) * 20 > max(straight, turned):
        raise UnreadableMedia("tilted", path, "it is rotated by an angle other than 90, 180 or 270 degrees.")
    if turned > straight:
        return Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Orientation(flip_x=a < 0, flip_y=d < 0)


def colour_of(frame: VideoFrame, path: Path, *, has_profile: bool = False) -> Colour:
    """Return how to read the frame's colours, with the usual guess if the file does not say.

    Unmarked high-definition video (longer side at least 1280, or shorter side above 576) is BT.709, other video BT.601.
    This is the rule of players, made independent of the camera's orientation.
    """
    transfer: Transfer = "pq" if frame.color_trc == _PQ else "hlg" if frame.color_trc == _HLG else "sdr"
    primaries = _primaries(frame)
    if frame.format.is_rgb or frame.format.has_palette:
        matrix: Matrix = "rgb"
    elif frame.colorspace != _UNSPECIFIED:
        if frame.colorspace not in _MATRICES:
            raise UnreadableMedia(
                "unsupported-colour", path, f"its colour matrix (code {frame.colorspace}) is unknown."
            )
        matrix = _MATRICES[frame.colorspace]
    elif primaries == "bt2020":
        matrix = "bt2020"
    else:
        longer, shorter = max(frame.width, frame.height), min(frame.width, frame.height)
        matrix = "bt709" if longer >= 1280 or shorter > 576 else "bt601"
    full = matrix == "rgb" or frame.color_range == 2 or frame.format.name.startswith("yuvj")
    if transfer == "sdr" and has_profile:
        return Colour(matrix, full, transfer, profile=True)
    if transfer == "sdr" and primaries != "bt709" and frame.color_trc == _SRGB:
        transfer = "srgb"
    return Colour(matrix, full, transfer, primaries)


def _primaries(frame: VideoFrame) -> Primaries:
    if frame.color_primaries != _UNSPECIFIED:
        return _PRIMARIES.get(frame.color_primaries, "bt709")
    is_wide = frame.colorspace in _BT2020_MATRICES or frame.color_trc in _BT2020_TRANSFERS
    return "bt2020" if is_wide else "bt709"


def unusual_colours(frame: VideoFrame, codec: str, colour: Colour) -> list[str]:
    """Return what an earlier version of the reader would have ignored about colours."""
    found = []
    if colour.profile:
        found.append("icc")
    elif colour.primaries != "bt709" and frame.color_primaries != _BT2020:
        found.append(f"primaries {colour.primaries}")
    mapped = colour.primaries != "bt709" or colour.transfer != "sdr"
    if has_alpha(frame, codec) and (mapped or frame.format.has_palette):
        found.append("alpha")
    return found


def still_info(path: Path, height: int, width: int, colour: Colour, *, codec: str, pix_fmt: str) -> VideoInfo:
    """Describe one upright picture with square pixels, as a video of one frame."""
    found = status(path)
    return VideoInfo(
        path=path,
        stream=0,
        container="image",
        codec=codec,
        pix_fmt=pix_fmt,
        stored_width=width,
        stored_height=height,
        pixel_aspect=Fraction(1),
        orientation=Orientation(),
        colour=colour,
        interlaced=False,
        pts=(0,),
        origin=0,
        gaps=(),
        jumps_back=False,
        ticks_per_second=Fraction(25),
        last_ticks=1,
        key_pts=(0,),
        skip=0,
        verified=True,
        file_size=found.size,
        modified_ns=found.modified,
        notes=(),
    )
