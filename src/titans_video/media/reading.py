"""Read frames by timestamp: exactly the frame on screen at each requested time.

The reader seeks to the key frame before a requested frame and decodes from there. It takes a frame only if its
timestamp is exactly the one that the probe listed; otherwise it decodes the file from its start. A file with unreliable
timestamps (doubled, jumping, missing) is always decoded from its start, and its frames are counted.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from titans_video.media.colour import FrameReader, Pixels, cover_crop
from titans_video.media.heif import read_heif
from titans_video.media.images import Still, has_wide_png_colours, icc_profile, read_still, read_with_pillow
from titans_video.media.info import Seconds, VideoInfo
from titans_video.media.opening import (
    Deadline,
    UnreadableMedia,
    check_file,
    open_container,
    use_one_thread,
    walk_frames,
)
from titans_video.media.probe import probe
from titans_video.media.timeline import positions
from titans_video.storage.fetching import Facts
from titans_video.storage.files import in_use

# Decoders that can skip frames which no other frame needs.
_CAN_SKIP = {"h264", "hevc", "mpeg2video", "mpeg4", "vvc"}


def read_frames(path: Path | str, info: VideoInfo, times: Iterable[Seconds], *, seconds: float = 120.0) -> Pixels:
    """Read the frames on screen at the given times.

    Args:
        times: seconds from the file's first frame, in any order, repeats allowed.
        seconds: the time limit.
    Returns:
        uint8 (T, H, W, 3): RGB, upright, square pixels, `info.height` x `info.width`.
    Raises:
        UnreadableMedia: the file is damaged at one of the times, or has changed since it was probed.
    """
    times = list(times)
    for time in times:
        gap = info.gap_between(time, time)
        if gap is not None:
            raise UnreadableMedia("damaged", path, f"{info.describe_gap(gap)}; second {float(time):g} is not usable.")
    return read_indices(path, info, info.indices_at(times), seconds=seconds)


def read_indices(path: Path | str, info: VideoInfo, indices: Sequence[int], *, seconds: float = 120.0) -> Pixels:
    """Read the frames with the given numbers (0 is the first). Otherwise as `read_frames`."""
    frames = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    for number, image in iterate(path, info, indices, seconds=seconds):
        frames[[i for i, wanted in enumerate(indices) if wanted == number]] = image
    return frames


def read_clip(
    path: Path | str,
    info: VideoInfo,
    indices: Sequence[int],
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    *,
    seconds: float = 120.0,
) -> Pixels:
    """Read frames by number as uint8 (T, height, width, 3); each is scaled and cropped as soon as it is decoded.

    `crop` is (down, right), each 0..1; see `cover_crop`.

    Raises:
        UnreadableMedia: as `read_frames`.
    """
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    for number, image in iterate(path, info, indices, seconds=seconds):
        resized = cover_crop(image[None], height, width, crop)[0]
        frames[[i for i, wanted in enumerate(indices) if wanted == number]] = resized
    return frames


def iterate(
    path: Path | str, info: VideoInfo, indices: Iterable[int], *, seconds: float = 120.0
) -> Iterator[tuple[int, Pixels]]:
    """Yield (number, uint8 (H, W, 3)) for each requested frame once, in ascending order.

    Raises:
        UnreadableMedia: a requested frame is damaged or missing.
        IndexError: a number is not in 0..`info.frames` - 1.
    """
    path = Path(path)
    wanted = sorted(set(indices))
    if not wanted:
        return
    if wanted[0] < 0 or wanted[-1] >= info.frames:
        raise IndexError(f"{path} has frames 0 to {info.frames - 1}; asked for {wanted[0]} to {wanted[-1]}.")
    with in_use(path, Facts(info.file_size, info.modified_ns)):
        yield from _iterate(path, info, wanted, Deadline(path, seconds))


def _iterate(path: Path, info: VideoInfo, wanted: list[int], deadline: Deadline) -> Iterator[tuple[int, Pixels]]:
    if info.still:
        still = read_still(path, deadline)
        if still is None or still.pixels.shape[:2] != (info.height, info.width):
            raise _changed(path)
        yield 0, still.pixels
        return
    with open_container(path, deadline) as container:
        stream = _same_stream(container, info, path)
        to_rgb = FrameReader(info, icc_profile(path, container, stream) if info.colour.profile else b"")
        for number, frame in _decode(container, stream, info, wanted, deadline):
            yield number, to_rgb(frame)


def _changed(path: Path) -> UnreadableMedia:
    return UnreadableMedia("changed", path, "the file was replaced after it was probed; run the data check again.")


def _same_stream(container: InputContainer, info: VideoInfo, path: Path) -> VideoStream:
    stream = container.streams[info.stream] if info.stream < len(container.streams) else None
    if not isinstance(stream, VideoStream) or stream.codec_context is None:
        raise _changed(path)
    use_one_thread(stream)
    return stream


def _decode(
    container: InputContainer, stream: VideoStream, info: VideoInfo, wanted: list[int], deadline: Deadline
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield requested frames in ascending order, by seeking if the timestamps allow it, else from the file's start."""
    for key, chunk in _chunks(info, wanted):
        if key > 0:
            container.seek(info.key_pts[key], stream=stream)
        missing = list(chunk)
        for number, frame in _pick(container, stream, info, chunk, deadline):
            missing.remove(number)
            yield number, frame
        if missing and key > 0:
            with open_container(deadline.path, deadline) as again:
                from_start = _same_stream(again, info, deadline.path)
                for number, frame in _pick(again, from_start, info, list(missing), deadline):
                    missing.remove(number)
                    yield number, frame
        if missing:
            raise UnreadableMedia(
                "damaged",
                deadline.path,
                f"frame {missing[0]} of {info.frames}, at {float(info.times[missing[0]]):.2f} s, does not decode.",
            )


def _chunks(info: VideoInfo, wanted: list[int]) -> list[tuple[int, list[int]]]:
    """Group requested numbers by decoding pass, each with its first key frame; skip whole spans without any."""
    if not info.key_pts:
        return [(0, wanted)]
    chunks: list[tuple[int, list[int]]] = []
    last = -2
    for number in wanted:
        needed = max(number - 1, 0) if info.interlaced else number
        key = max(bisect_right(info.key_pts, info.pts[needed]) - 1, 0)
        if key > last + 1:
            chunks.append((key, []))
        chunks[-1][1].append(number)
        last = key
    return chunks


def _pick(
    container: InputContainer, stream: VideoStream, info: VideoInfo, wanted: list[int], deadline: Deadline
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from the container's position; end early at a requested frame that is damaged or was passed."""
    remaining = set(wanted)
    last = wanted[-1]
    weaver = Deinterlacer(stream) if info.interlaced else None
    after_gaps = {gap.before for gap in info.gaps}
    for number, frame, clean in _numbered(container, stream, info, wanted, deadline):
        if number in remaining and not clean:
            return
        if weaver and number in after_gaps:  # the frames on both sides of a gap are no neighbours
            for done, image in weaver.finish():
                if done in remaining:
                    remaining.discard(done)
                    yield done, image
            weaver = Deinterlacer(stream)
        for done, image in weaver.feed(number, frame) if weaver else [(number, frame)]:
            if done in remaining:
                remaining.discard(done)
                yield done, image
        if not remaining or number > last + 1:
            return
    if weaver:
        for done, image in weaver.finish():
            if done in remaining:
                yield done, image


def _numbered(
    container: InputContainer, stream: VideoStream, info: VideoInfo, wanted: list[int], deadline: Deadline
) -> Iterator[tuple[int, VideoFrame, bool]]:
    """Yield decoded frames with their numbers: looked up by timestamp, or counted if timestamps are unreliable."""
    if not info.key_pts:
        numbers = positions(info)
        for frame, _, clean, _ in walk_frames(container, stream, deadline):
            number = next(numbers, None) if frame is not None else None
            if frame is not None and number is not None:
                yield number, frame, clean
        return
    number_of = info.numbers
    # How many frames with this timestamp were seen, if several have it.
    doubled = {} if len(number_of) == info.frames else {a: 0 for a, b in pairwise(info.pts) if a == b}
    needed = {info.pts[number] for number in wanted}

    def leave_out(stream: VideoStream, packet: Packet) -> None:
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"

    skipping = leave_out if stream.codec_context.name in _CAN_SKIP and not info.interlaced else None
    for frame, pts, clean, _ in walk_frames(container, stream, deadline, skipping):
        if frame is None or pts not in number_of:
            continue
        number = number_of[pts]
        if pts in doubled:
            number += doubled[pts]
            doubled[pts] += 1
        yield number, frame, clean


def read_image(path: Path | str) -> Pixels:
    """Read an image file as uint8 (H, W, 3): sRGB, upright, black where transparent; raise UnreadableMedia."""
    return read_picture(Path(path)).pixels


def read_picture(path: Path, *, seconds: float = 60.0) -> Still:
    """Read an image file as `read_image` does; also return what is special about how it was read."""
    with in_use(path):
        return _read_picture(path, seconds)


def _read_picture(path: Path, seconds: float) -> Still:
    check_file(path)
    heif = read_heif(path)
    if heif is None or (heif.is_avif and not heif.is_wide):
        still = None if has_wide_png_colours(path) else read_with_pillow(path)
        if still is not None:
            return still
    try:
        info = probe(path, seconds=seconds)
    except UnreadableMedia as error:
        if error.reason in ("damaged", "timeout", "tilted", "unsupported-colour", "unsupported-alpha"):
            raise
        explanation = f"this is not an image that Pillow or FFmpeg reads ({error.explanation})"
        raise UnreadableMedia("not-an-image", path, explanation) from error
    if info.frames != 1:
        raise UnreadableMedia("not-an-image", path, f"this is a video of {info.frames} frames, not an image.")
    return Still(read_indices(path, info, [0], seconds=seconds)[0], info.reading)


class Deinterlacer:
    """Deinterlace each frame using only the frame before and the frame after it, one frame late.

    So a reader that starts one frame early gets the same frames as a reader from the start of the file.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self._graph: Graph | None = None
        self._waiting: deque[int] = deque()

    def feed(self, number: int, frame: VideoFrame) -> Iterator[tuple[int, VideoFrame]]:
        """Add a frame; yield the finished frames with their numbers."""
        if self._graph is None:
            self._graph = self._build(frame)
        self._waiting.append(number)
        self._graph.vpush(frame)
        yield from self._finished()

    def finish(self) -> Iterator[tuple[int, VideoFrame]]:
        """Yield the remaining frames."""
        if self._graph is not None:
            self._graph.vpush(None)
            yield from self._finished()

    def _build(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self._stream.time_base
        )
        bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        source.link_to(bwdif)
        bwdif.link_to(graph.add("buffersink"))
        graph.configure()
        return graph

    def _finished(self) -> Iterator[tuple[int, VideoFrame]]:
        assert self._graph is not None
        while True:
            try:
                frame = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield self._waiting.popleft(), frame
