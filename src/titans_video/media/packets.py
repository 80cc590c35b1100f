"""Read what a container says about a video, without decoding: its stream, its timestamps and any oddity."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
from av import FFmpegError
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from titans_video.media.colour import icc_transform
from titans_video.media.headers import alpha_decoder, declared_crop, has_alpha_layer, has_alpha_track
from titans_video.media.images import icc_profile
from titans_video.media.info import Crop, own_rate
from titans_video.media.opening import Deadline, UnreadableMedia, largest_stream, open_container, pick_stream

_ALPHA_LAYER = (
    "PyAV cannot read the alpha layer of HEVC, and without it hidden colours would be seen. Convert the file: "
    "`ffmpeg -i in.mov -c:v prores_ks -profile:v 4444 out.mov`."
)


@dataclass
class Packets:
    """The container's own description, without decoding."""

    container: str
    stream: int
    codec: str
    time_base: Fraction
    pixel_aspect: Fraction | None
    guessed_rate: Fraction
    area: int
    videos: int
    start: int | None
    promised: int = 0  # frames, by the header; 0 if the header has no count
    count: int = 0
    shown: list[int] = field(default_factory=list)  # timestamps of the packets to be shown, sorted
    keys: list[int] = field(default_factory=list)  # timestamps of key frames, sorted
    oddities: list[str] = field(default_factory=list)
    crop: Crop = field(default_factory=Crop)
    has_profile: bool = False
    reading: list[str] = field(default_factory=list)
    suspects: list[int] = field(default_factory=list)  # timestamps near which a long file is decoded
    untimed: int = 0  # packets without a timestamp
    headless: bool = False  # the first packet is not a key frame, so that what it shows cannot be decoded
    jumps_back: bool = False  # a key frame is earlier than the one before it

    @property
    def interval(self) -> int:
        """The usual ticks between two frames."""
        tick = self.time_base
        rate = own_rate(self.shown, 1 / tick, Fraction(0)) if len(set(self.shown)) > 1 else self.guessed_rate
        return max(round(1 / (rate * tick)), 1)

    @property
    def safe_keys(self) -> list[int]:
        """The timestamps of key frames that no other frame shares; decoding can start there."""
        doubled = {a for a, b in pairwise(self.shown) if a == b}
        return [k for k in self.keys if k not in doubled]

    def spans(self, times: Iterable[int]) -> list[tuple[int, int]]:
        """Return the pieces, from a key frame to another, that contain the given times, without overlaps.

        A key frame at the time in question is not trusted to begin or end a piece.
        """
        keys, shown = self.safe_keys, self.shown
        found: list[tuple[int, int]] = []
        for time in sorted(set(times)):
            at = bisect_left(keys, time)
            low = keys[at - 1] if at else min(shown[0], time)
            at = bisect_right(keys, time)
            high = keys[at] if at < len(keys) else shown[-1] + 1
            if found and low < found[-1][1]:
                found[-1] = found[-1][0], max(high, found[-1][1])
            else:
                found.append((low, high))
        return found


def read_packets(path: Path, deadline: Deadline) -> Packets:
    with open_container(path, deadline) as container:
        stream = pick_stream(container, path)
        context = stream.codec_context
        found = Packets(
            container=container.format.name,
            stream=stream.index,
            codec=context.name,
            time_base=stream.time_base or Fraction(1, 25),
            pixel_aspect=stream.sample_aspect_ratio,
            guessed_rate=stream.guessed_rate or stream.average_rate or Fraction(25),
            area=context.width * context.height,
            videos=len(container.streams.video),
            start=stream.start_time,
            promised=stream.frames,
            crop=declared_crop(path, container, stream),
            has_profile=icc_transform(icc_profile(path, container, stream)) is not None,
        )
        _note_reading(container, stream, found)
        if has_alpha_track(path, container, stream):
            raise UnreadableMedia("unsupported-alpha", path, "its transparency is in another track, which is not read.")
        _read_timestamps(container, stream, deadline, found)
        if stream.duration:
            promised_seconds = stream.duration * found.time_base
        else:
            promised_seconds = Fraction(container.duration or 0, av.time_base)
    _look_for_oddities(found, promised_seconds)
    return found


def _read_timestamps(container: InputContainer, stream: VideoStream, deadline: Deadline, found: Packets) -> None:
    try:
        for packet in container.demux(stream):
            deadline.advance(packet.size)
            if not packet.size:
                continue
            found.count += 1
            if found.count == 1 and not packet.is_keyframe:
                found.oddities.append("the first packet is not a key frame")
                found.headless = True
            if found.count == 1 and has_alpha_layer(stream, packet):
                raise UnreadableMedia("unsupported-alpha", deadline.path, _ALPHA_LAYER)
            if packet.is_corrupt:
                found.oddities.append("a packet is marked as corrupt")
                found.suspects.append(_time_of(packet, found))
            if packet.pts is None:
                found.oddities.append("a packet has no timestamp")
                found.untimed += 1
                found.suspects.append(_time_of(packet, found))
                continue
            if packet.is_keyframe:
                found.jumps_back |= bool(found.keys) and packet.pts < found.keys[-1]
                found.keys.append(packet.pts)
            if not packet.is_discard:
                found.shown.append(packet.pts)
    except (FFmpegError, OSError) as error:
        deadline.check()
        found.oddities.append(f"reading stopped: {error}")


def _note_reading(container: InputContainer, stream: VideoStream, found: Packets) -> None:
    if stream.index != largest_stream(container):
        found.reading.append(f"stream {stream.index}")
    if found.crop != Crop():
        found.reading.append(f"crop {found.crop.left} {found.crop.top} {found.crop.right} {found.crop.bottom}")
    if alpha_decoder(stream):
        found.reading.append("alpha")


def _time_of(packet: Packet, found: Packets) -> int:
    if packet.pts is not None:
        return packet.pts
    return found.shown[-1] if found.shown else 0


def _look_for_oddities(found: Packets, promised_seconds: Fraction) -> None:
    """Record every reason not to trust the packets without decoding."""
    found.shown.sort()
    found.keys.sort()
    ended_early = False
    if found.promised and found.promised != found.count:
        found.oddities.append(f"the header promises {found.promised} frames, the file has {found.count}")
        ended_early = True
    doubled = [a for a, b in pairwise(found.shown) if a == b]
    if doubled:
        found.oddities.append("two packets have one timestamp")
        found.suspects += doubled
    if found.shown:
        there = (found.shown[-1] - found.shown[0]) * found.time_base
        if there < promised_seconds * Fraction(9, 10) - 1:
            found.oddities.append(
                f"the header promises {float(promised_seconds):.1f} s, the file has {float(there):.1f} s"
            )
            ended_early = True
        if ended_early or any(text.startswith("reading stopped") for text in found.oddities):
            found.suspects.append(found.shown[-1])
