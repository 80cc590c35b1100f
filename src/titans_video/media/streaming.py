"""Write a clip while it is being made: in constant memory, and playable at any moment.

Legend: T frames, H W pixel height and width.
"""

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np

from titans_video.errors import UserError
from titans_video.files import atomic_path, make_folder, writing
from titans_video.media.colour import Pixels
from titans_video.media.opening import Deadline, open_container
from titans_video.media.writing import (
    CODEC,
    Metadata,
    Written,
    as_comment,
    check_frames,
    clock,
    configure,
    exact_rate,
    output_kind,
    padding,
    to_yuv,
    write_video,
)


class Sink:
    """The target of the frames of one clip, in order. Leaving a `with` block closes it; an exception abandons it."""

    def write(self, frames: Pixels) -> None:
        """Add a chunk of frames, uint8 (T, H, W, 3)."""
        raise NotImplementedError

    def close(self) -> Written:
        """Finish the clip and move it to its path."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Stop without writing the clip to its path."""
        raise NotImplementedError

    @property
    def written(self) -> Written:
        """The finished clip, once closed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()


class StreamWriter(Sink):
    """Write an mp4 chunk by chunk; it can be watched at any time.

    Frames go into `<name>.partial.mp4` next to the path. This is a fragmented mp4 of which all frames but one are on
    disk when `write` returns, so a killed run leaves a playable file. `close` copies its packets (nothing is encoded
    again) into an ordinary mp4 with the index first, and renames that to the path; until then an existing file is
    unchanged. Memory does not grow with the length.

    Each `write` is encoded separately and starts with a key frame, so write chunks (a window, a segment) and not single
    frames. For `fps`, `crf` and `metadata` see `media.writing.write_video`.

    Raises:
        UserError: a bad path or rate; on `close`, no frames.
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
        self.partial = partial_path(self.path)
        self.padded = padding(height, width)
        self.count = 0
        self._open = True
        with writing(self.path):
            self._start()

    def _start(self) -> None:
        make_folder(self.path.parent)
        # One fragment per frame, each written to disk at once; times start at 0.
        options = {"movflags": "+frag_every_frame+empty_moov+default_base_moof+negative_cts_offsets"}
        options |= {"flush_packets": "1", **clock(self.rate)}
        self._container = av.open(str(self.partial), "w", format="mp4", options=options)
        self._stream = self._container.add_stream(CODEC, rate=self.rate)
        self._configure(self._stream.codec_context)
        self._stream.time_base = 1 / self.rate
        if self.metadata is not None:
            self._container.metadata["comment"] = as_comment(self.metadata)
        self._container.start_encoding()

    def write(self, frames: Pixels) -> None:
        check_frames(frames, self.height, self.width)
        # An encoder looks many frames ahead; with one encoder per chunk no frame is kept back.
        encoder = av.CodecContext.create(CODEC, "w")
        self._configure(encoder)
        encoder.flags |= av.codec.context.Flags.global_header
        for frame in to_yuv(frames, self.count, self.rate):
            self._mux(encoder.encode(frame))
            self.count += 1
        if len(frames):
            self._mux(encoder.encode(None))

    def close(self) -> Written:
        self.abandon()
        if self.count == 0:
            raise UserError(f"{self.path}: there is no frame to write.")
        with atomic_path(self.path) as temporary:
            self._copy_to(temporary)
        self.partial.unlink(missing_ok=True)
        return self.written

    def abandon(self) -> None:
        """Stop here; the frames written so far remain as the partial file."""
        if self._open:
            self._open = False
            try:
                with writing(self.path):
                    self._container.close()
            finally:
                if self.count == 0:
                    self.partial.unlink(missing_ok=True)

    @property
    def written(self) -> Written:
        down, right = self.padded
        return Written(self.path, self.count, self.rate, self.height + down, self.width + right, self.padded)

    def _configure(self, context: av.VideoCodecContext) -> None:
        configure(context, self.height + self.padded[0], self.width + self.padded[1], self.rate, self.crf)

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            packet.stream = self._stream
            packet.time_base = 1 / self.rate
            with writing(self.path):
                self._container.mux_one(packet)

    def _copy_to(self, temporary: Path) -> None:
        """Copy the partial file's packets into a file with its index first."""
        options = {"movflags": "+faststart", **clock(self.rate)}
        source = open_container(self.partial, Deadline(self.partial, 60.0))
        with source, av.open(str(temporary), "w", format="mp4", options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            if self.metadata is not None:
                target.metadata["comment"] = as_comment(self.metadata)
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last one only marks the end
                    packet.stream = stream
                    target.mux_one(packet)


class WholeWriter(Sink):
    """Write a gif or a folder of PNGs as a whole, with all frames in memory as bytes. Arguments as `StreamWriter`."""

    def __init__(self, path: Path | str, fps: float | Fraction, metadata: Metadata | None = None) -> None:
        self.path, self.rate, self.metadata = Path(path), exact_rate(fps), metadata
        self._frames: list[Pixels] = []
        self._written: Written | None = None

    def write(self, frames: Pixels) -> None:
        self._frames.append(frames)

    def close(self) -> Written:
        if not self._frames:
            raise UserError(f"{self.path}: there is no frame to write.")
        self._written = write_video(self.path, np.concatenate(self._frames), self.rate, metadata=self.metadata)
        return self._written

    def abandon(self) -> None:
        self._frames.clear()

    @property
    def written(self) -> Written:
        if self._written is None:
            raise ValueError(f"{self.path} is not closed yet")
        return self._written


def open_sink(
    path: Path | str,
    height: int,
    width: int,
    fps: float | Fraction,
    *,
    crf: int = 16,
    metadata: Metadata | None = None,
) -> Sink:
    """Open the writer for `path` by its suffix (see `media.writing.output_kind`); an mp4 needs constant memory."""
    if output_kind(path) == "mp4":
        return StreamWriter(path, height, width, fps, crf=crf, metadata=metadata)
    return WholeWriter(path, fps, metadata)


def partial_path(path: Path) -> Path:
    """Return the path of a clip while it is being written."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")
