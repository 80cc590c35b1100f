"""Little videos made on the spot, and a decoder that shares nothing with the package's reader."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation


def moving_bars(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (T, H, W, 3): every frame differs from every other."""
    y, x = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([(5 * x + 11 * t) % 256, (7 * y + 5 * t) % 256, np.full_like(x, (t * 37) % 256)], -1)
        for t in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    ticks: int = 15360,
    fps: int = 30,
    matrix: np.ndarray | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Write RGB frames with any codec and any timestamps (in ticks)."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = options or {}
        stream.codec_context.time_base = Fraction(1, ticks)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for t, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = (times[t] if times else t * ticks // fps), Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def encode_planes(path: Path, planes: list[np.ndarray], pix_fmt: str, **tags: int) -> Path:
    """One lossless H.264 frame of given values; `tags` are colorspace, color_range, color_trc, color_primaries."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *planes[0].shape, pix_fmt
        stream.options = {"qp": "0"}
        frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], pix_fmt)
        for plane, values in zip(frame.planes, planes, strict=True):
            row = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
            row[:, : values.shape[1]] = values
            plane.update(row.tobytes())
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path, stream_index: int | None = None) -> tuple[list[int], np.ndarray, Fraction]:
    """Timestamps, RGB frames as stored, and the time base, by one pass from start to end."""
    with av.open(str(path)) as container:
        streams: Any = container.streams
        stream = streams[stream_index] if stream_index is not None else streams.video[0]
        stamps, pictures = [], []
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                break
            for frame in frames:
                stamps.append(frame.pts)
                pictures.append(to_rgb(frame))
        return stamps, np.stack(pictures), stream.time_base


def to_rgb(frame: Any) -> np.ndarray:
    """By the frame's own tags; what is not tagged is BT.601, as in every small clip."""
    matrix = {1: Colorspace.ITU709, 9: Colorspace.BT2020}.get(frame.colorspace, Colorspace.ITU601)
    full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
    return frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
    ).to_ndarray()
