"""Write clips in formats that play everywhere: mp4 (H.264), gif, or a folder of PNGs.

Every file is renamed when complete, so an interrupted write leaves nothing behind.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from titans_video.errors import UserError
from titans_video.files import atomic_folder, atomic_path
from titans_video.media.colour import ACCURATE, Pixels

Kind = Literal["mp4", "gif", "png"]
Metadata = dict[str, Any]
_GIF_TICKS = 100  # per second; GIF has no finer time
GIF_FASTEST = 50  # frames per second; browsers slow anything faster down to 10


@dataclass(frozen=True)
class Written:
    """Describe a written clip, exactly as in the file.

    `path` is the file or the folder of PNGs; `padded` the rows and columns added at the bottom and right, 0 or 1 each.
    """

    path: Path
    frames: int
    fps: Fraction
    height: int
    width: int
    padded: tuple[int, int] = (0, 0)

    @property
    def note(self) -> str:
        """A message for the user, or an empty text."""
        down, right = self.padded
        if not (down or right):
            return ""
        return (
            f"{self.width - right}x{self.height - down} was edge-padded to {self.width}x{self.height} "
            "(width x height): H.264 in yuv420p has even sizes only."
        )


def output_kind(path: Path | str) -> Kind:
    """Return the format of a path by its suffix; call it before hours of work.

    Raises:
        UserError: the suffix is not .mp4, .gif or empty (a folder of PNGs), or the path exists and must be kept.
    """
    path = Path(path)
    kinds: dict[str, Kind] = {".mp4": "mp4", ".gif": "gif", "": "png"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{path}: cannot write {path.suffix} files. Give a name that ends in .mp4 or .gif, or one without a suffix "
            "for a folder of PNGs."
        )
    if kind != "png" and path.is_dir():
        raise UserError(f"{path}: this is a folder; give the name of a file in it, such as {path / 'video'}.{kind}.")
    if kind == "png" and path.exists() and not (path.is_dir() and all(map(_is_our_frame, path.iterdir()))):
        raise UserError(
            f"{path}: this exists and is not a folder of frames written before. Give the name of a new folder, "
            "or one that ends in .mp4 or .gif for a file."
        )
    return kind


def write_video(
    path: Path | str, frames: Pixels, fps: float | Fraction, crf: int = 16, metadata: Metadata | None = None
) -> Written:
    """Write a clip; show the `.note` of the result.

    Args:
        path: .mp4, .gif, or without a suffix for a folder `frame_00000.png`, ...
        frames: uint8 (T, H, W, 3), RGB.
        fps: frames per second; 23.976 and similar rates become 24000/1001 etc.
        crf: H.264's quality, 0 (lossless) to 51.
        metadata: of the clip: JSON in an mp4's comment, `metadata.json` in a folder; a gif has no field for it.
    Raises:
        UserError: no frames, a bad rate, or a path that `output_kind` refuses.
    """
    path, rate, kind = Path(path), exact_rate(fps), output_kind(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 frames (T, H, W, 3), got {frames.dtype} {frames.shape}")
    if len(frames) == 0:
        raise UserError(f"{path}: there is no frame to write.")
    height, width = frames.shape[1:3]
    if kind == "mp4":
        with VideoWriter(path, height, width, rate, crf=crf, metadata=metadata) as writer:
            writer.write(frames)
        return writer.written
    if kind == "gif":
        _write_gif(path, frames, rate)
    else:
        _write_pngs(path, frames, rate, metadata)
    return Written(path, len(frames), rate, height, width)


def numbered(path: Path, number: int, count: int) -> Path:
    """Return the path of one of several videos: out-000.mp4, out-001.mp4, ...; of a single one `path` itself."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{number:0{max(3, len(str(count - 1)))}d}{path.suffix}")


def exact_rate(fps: float | Fraction) -> Fraction:
    """Return the intended rate as a fraction, 23.976 as 24000/1001; raise UserError if it is not in (0, 1000]."""
    try:
        rate = Fraction(fps)
    except (ValueError, OverflowError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise UserError(f"A rate of {fps} frames per second cannot be written; it must be above 0 and at most 1000.")
    if isinstance(fps, Fraction) and fps.denominator <= 10**6:
        return fps
    for whole in (24, 30, 48, 60, 120, 240):
        ntsc = Fraction(whole * 1000, 1001)
        if abs(rate - ntsc) < ntsc / 20_000:
            return ntsc
    return rate.limit_denominator(1001)


class VideoWriter:
    """Write an mp4 frame by frame: H.264, yuv420p, BT.709 limited range, index first.

    The file appears under its name when the `with` block ends without an exception. Odd sizes are padded to even ones
    by repeating the last row and column. For `fps`, `crf` and `metadata` see `write_video`.

    Raises:
        UserError: a bad path (it ends in .mp4) or rate.
    """

    def __init__(
        self,
        path: Path | str,
        height: int,
        width: int,
        fps: float | Fraction,
        *,
        crf: int = 16,
        metadata: Metadata | None = None,
    ) -> None:
        self.path, self.height, self.width = Path(path), height, width
        self.rate, self.crf, self.metadata = exact_rate(fps), crf, metadata
        if output_kind(self.path) != "mp4":
            raise UserError(f"{self.path}: frames can be added one by one to .mp4 files only.")
        self.padded = padding(height, width)
        self.count = 0

    def __enter__(self) -> Self:
        self._place = atomic_path(self.path)
        temporary = self._place.__enter__()
        try:
            options = {"movflags": "+faststart", **clock(self.rate)}
            self._container = av.open(str(temporary), "w", format="mp4", options=options)
            self._stream = self._container.add_stream(CODEC, rate=self.rate)
            down, right = self.padded
            configure(self._stream.codec_context, self.height + down, self.width + right, self.rate, self.crf)
            self._stream.time_base = 1 / self.rate
            if self.metadata is not None:
                self._container.metadata["comment"] = as_comment(self.metadata)
        except BaseException as error:
            self._place.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, frames: Pixels) -> None:
        """Add frames, uint8 (T, H, W, 3)."""
        check_frames(frames, self.height, self.width)
        for frame in to_yuv(frames, self.count, self.rate):
            self._container.mux(self._stream.encode(frame))
            self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if self.count == 0:
                    raise UserError(f"{self.path}: there is no frame to write.")
                self._container.mux(self._stream.encode(None))
            self._container.close()
        except BaseException as failure:
            self._place.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._place.__exit__(kind, error, trace)

    @property
    def written(self) -> Written:
        """The clip so far."""
        down, right = self.padded
        return Written(self.path, self.count, self.rate, self.height + down, self.width + right, self.padded)


def check_frames(frames: Pixels, height: int, width: int) -> None:
    """Raise ValueError if frames are not uint8 (T, height, width, 3)."""
    if frames.shape[1:] != (height, width, 3) or frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 (T, {height}, {width}, 3), got {frames.dtype} {frames.shape}")


def as_comment(metadata: Metadata) -> str:
    """Return the metadata as an mp4's comment."""
    return json.dumps(metadata, ensure_ascii=False)


def _write_gif(path: Path, frames: Pixels, rate: Fraction) -> None:
    """Write a looping GIF with one palette; times are rounded to hundredths of a second without accumulating errors."""
    if rate > GIF_FASTEST:
        raise UserError(
            f"{path}: a gif can have at most {GIF_FASTEST} frames per second, not {float(rate):g}; write an .mp4."
        )
    height, width = frames.shape[1:3]
    shown_at = [round(number * _GIF_TICKS / rate) for number in range(len(frames) + 1)]
    options = {"loop": "0", "final_delay": str(shown_at[-1] - shown_at[-2])}
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="gif", options=options) as container:
        stream = container.add_stream("gif", rate=_GIF_TICKS)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.time_base = Fraction(1, _GIF_TICKS)
        stream.options = {"gifflags": "-transdiff"}
        for number, frame in enumerate(_with_palette(frames)):
            frame.pts, frame.time_base = shown_at[number], Fraction(1, _GIF_TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _with_palette(frames: Pixels) -> Iterator[VideoFrame]:
    graph = av.filter.Graph()
    height, width = frames.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, 1))
    split = graph.add("split")
    palette, use = graph.add("palettegen", "reserve_transparent=0"), graph.add("paletteuse")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    palette.link_to(use, 0, 1)
    split.link_to(use, 1, 0)
    use.link_to(graph.add("buffersink"))
    graph.configure()
    for number, image in enumerate(frames):
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, 1)
        graph.push(frame)
    graph.push(None)
    for _ in frames:
        yield graph.pull()


def _write_pngs(path: Path, frames: Pixels, rate: Fraction, metadata: Metadata | None) -> None:
    with atomic_folder(path) as temporary:
        for number, image in enumerate(frames):
            Image.fromarray(image).save(temporary / f"frame_{number:05d}.png")
        about = {"fps": str(rate), **(metadata or {})}
        (temporary / "metadata.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")


def _is_our_frame(path: Path) -> bool:
    return path.name == "metadata.json" or (path.name.startswith("frame_") and path.suffix == ".png")


CODEC = "libx264"
_BT709 = 1  # FFmpeg's number of BT.709 as matrix, as primaries and as transfer function


def clock(rate: Fraction) -> dict[str, str]:
    """Return options that make a frame a whole number of ticks of the one clock of an mp4's track and movie.

    With the usual milliseconds the edit list is rounded and may cut off the last frame.
    """
    ticks = str(rate.numerator * -(-10_000 // rate.numerator))
    return {"video_track_timescale": ticks, "movie_timescale": ticks}


def configure(context: Any, height: int, width: int, rate: Fraction, crf: int) -> None:
    """Configure PyAV's unopened codec context (or a stream, which forwards the values) for frames of an even size."""
    context.height, context.width = height, width
    context.pix_fmt, context.time_base, context.framerate = "yuv420p", 1 / rate, rate
    # No macroblock trees: with them x264 reads uninitialised memory. Without them equal frames give equal files.
    context.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG


def padding(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns that make a size even, 0 or 1 each."""
    return height % 2, width % 2


def to_yuv(frames: Pixels, first: int, rate: Fraction) -> Iterator[VideoFrame]:
    """Yield uint8 RGB frames (T, H, W, 3) for the encoder, numbered from `first` and padded to even sizes."""
    scaler = VideoReformatter()
    down, right = padding(*frames.shape[1:3])
    for number, image in enumerate(frames, first):
        if down or right:
            image = np.pad(image, ((0, down), (0, right), (0, 0)), mode="edge")
        frame = scaler.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
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
