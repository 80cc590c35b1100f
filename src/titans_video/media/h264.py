"""H.264 as every player takes it: yuv420p, BT.709 limited range, and a clock in which frames are whole ticks.

Legend: T frames, H W pixel height and width.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from titans_video.media.colour import ACCURATE, Pixels

CODEC = "libx264"
_BT709 = 1  # FFmpeg's number of BT.709 as matrix, as primaries and as transfer function


def clock(rate: Fraction) -> dict[str, str]:
    """Options of an mp4 whose track and movie share a clock in which a frame is a whole number of ticks.

    With the usual milliseconds the edit list is rounded and may cut off the last frame.
    """
    ticks = str(rate.numerator * -(-10_000 // rate.numerator))
    return {"video_track_timescale": ticks, "movie_timescale": ticks}


def configure(context: Any, height: int, width: int, rate: Fraction, crf: int) -> None:
    """Set an encoder (or a stream, which hands it on) up for frames of an even size.

    Args:
        context: PyAV's codec context, not open yet.
        height, width, rate: of the frames to come.
        crf: quality, 0 (lossless) to 51.
    """
    context.height, context.width = height, width
    context.pix_fmt, context.time_base, context.framerate = "yuv420p", 1 / rate, rate
    # Without macroblock trees, which make x264 read what it did not write: equal frames give equal files.
    context.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG


def padding(height: int, width: int) -> tuple[int, int]:
    """Rows and columns that make a size even, 0 or 1 each."""
    return height % 2, width % 2


def to_yuv(frames: Pixels, first: int, rate: Fraction) -> Iterator[VideoFrame]:
    """Frames for the encoder, numbered from `first`; odd sizes are padded by repeating the last row and column.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
    """
    scaler = VideoReformatter()
    down, right = padding(*frames.shape[1:3])
    for number, picture in enumerate(frames, first):
        if down or right:
            picture = np.pad(picture, ((0, down), (0, right), (0, 0)), mode="edge")
        frame = scaler.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=ACCURATE,
            threads=1,
        )
        frame.colorspace = frame.color_primaries = frame.color_trc = _BT709
        frame.color_range = ColorRange.MPEG
        frame.pts, frame.time_base = number, 1 / rate
        yield frame
