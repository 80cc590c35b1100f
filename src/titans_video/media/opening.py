"""Open video files and iterate over their frames, with a reason for every failure.

The probe and the reader both use `walk_frames`, so the reader finds exactly what the probe counted.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from titans_video.media.failures import REASONS, Reason, UnreadableMedia
from titans_video.media.headers import alpha_decoder
from titans_video.storage.fetching import Facts
from titans_video.storage.files import open_file, status
from titans_video.storage.places import is_plain

__all__ = ["REASONS", "Reason", "UnreadableMedia"]

# Raised for files that are damaged or do not fit in memory. Any other exception is a mistake in a program.
DECODING_ERRORS = (av.FFmpegError, OSError, MemoryError)


# The demuxers that may read a file. FFmpeg has many more: playlists, which open the files that they name, session
# descriptions, scripts, devices and plain text. It checks this list before a demuxer reads anything.
_VIDEO = (
    "mov,matroska,avi,asf,flv,live_flv,mpegts,mpeg,mpegvideo,ogg,nut,mxf,gxf,dv,rm,wtv,ivf,obu,av1,h261,h263,h264,hevc,"
    "vvc,evc,m4v,vc1,vc1test,mjpeg,mjpeg_2000,smjpeg,apv,avs2,avs3,cavsvideo,dirac,dnxhd,yuv4mpegpipe,swf,nuv,pva,pmp,"
    "lxf,cine,roq,bink,smk,flic,film_cpk,gif,apng,jpegxl_anim"
)
_IMAGE = (
    "image2,ico,bmp_pipe,dds_pipe,dpx_pipe,exr_pipe,gif_pipe,hdr_pipe,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,"
    "pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,pgmyuv_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,sunrast_pipe,"
    "tiff_pipe,webp_pipe"
)
_SOUND = "aac,ac3,aiff,amr,ape,au,caf,dts,eac3,flac,loas,mlp,mp3,truehd,tta,w64,wav,wv"  # to say what such a file is
FORMATS = f"{_VIDEO},{_IMAGE},{_SOUND}"

# The formats that Pillow may read. Others start programs (EPS) or only describe a file.
IMAGE_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000"),
    *("ICO", "TGA", "QOI", "PSD", "SGI", "PCX", "DDS"),
)
_PLAYLISTS = (b"#extm3u", b"ffconcat", b"v=0", b"[reference]", b"[playlist]", b"<mpd", b"<asx", b"<smil", b"<playlist")


PASSES = 8  # how often a file may be read with progress, by `Deadline`


class Deadline:
    """Limit the time spent on one file.

    Args:
        renewed: it limits the time without progress, so that a long file may take long but a stalled one may not.
            Progress is data that was read, up to a few times the file's size, so a looping index gets no more time.
        beat: called at most once a second while there is progress.
    """

    def __init__(
        self, path: Path, seconds: float, *, renewed: bool = False, beat: Callable[[], None] | None = None
    ) -> None:
        self.path, self.seconds, self.end = path, seconds, time.monotonic() + seconds
        self._renewed, self._beat, self._last_beat = renewed, beat, time.monotonic()
        self._bytes, self._most = 0, 0

    def check(self) -> None:
        if time.monotonic() <= self.end:
            return
        what = "made no progress for" if self._renewed else "exceeded the time limit of"
        raise UnreadableMedia("timeout", self.path, f"reading {what} {self.seconds:g} s.")

    def advance(self, size: int) -> None:
        """Record that `size` bytes were read; raise UnreadableMedia if the time had run out before."""
        self.check()
        if not self._renewed:
            return
        self._bytes += size
        self._most = self._most or PASSES * status(self.path).size
        if self._bytes > self._most:
            return
        now = time.monotonic()
        self.end = now + self.seconds
        if self._beat is not None and now > self._last_beat + 1:
            self._last_beat = now
            self._beat()


def check_file(path: Path) -> Facts:
    """Return the file's size and modification time.

    Raises:
        UnreadableMedia: it is missing, a directory, not a plain file, empty, or not readable for this user.
    """
    try:
        found = path.stat() if is_plain(path) else None
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableMedia("missing", path, "there is no such file.") from None
    except (PermissionError, OSError, ValueError) as error:
        raise UnreadableMedia("no-permission", path, f"cannot be looked at ({error}).") from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise UnreadableMedia("directory", path, "this is a directory, not a media file.")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UnreadableMedia("not-a-file", path, "this is a pipe, a socket or a device, not a plain file.")
    facts = status(path) if found is None else Facts(found.st_size, found.st_mtime_ns)
    if facts.size == 0:
        raise UnreadableMedia("empty-file", path, "the file has 0 bytes; fetch or copy it again.")
    if found is not None and not os.access(path, os.R_OK):
        raise UnreadableMedia("no-permission", path, "the file may not be read by this user.")
    return facts


_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""A tag that is not UTF-8 is no reason to refuse a file. PyAV 19 has no setting, and keeps its bytes as surrogates."""


def open_container(path: Path, deadline: Deadline) -> InputContainer:
    """Open a file with FFmpeg.

    FFmpeg itself treats no name as a URL or a pattern, and it refuses every format that could name other files
    (`FORMATS`) before it reads more than the file's beginning.

    Raises:
        UnreadableMedia: see `REASONS`.
    """
    check_file(path)
    try:
        container = av.open(
            f"file:{path}" if is_plain(path) else open_file(path),
            options={"protocol_whitelist": "file", "format_whitelist": FORMATS, "pattern_type": "none"},
            **_METADATA,
            timeout=max(deadline.end - time.monotonic(), 0.1),
        )
    except PermissionError as error:
        raise UnreadableMedia("no-permission", path, f"cannot be opened ({error}).") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        deadline.check()
        raise _not_a_video(path) from error
    return container


def _not_a_video(path: Path) -> UnreadableMedia:
    """Describe a file that FFmpeg did not open, by its beginning."""
    with open_file(path) as file:
        head = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(_PLAYLISTS) or b"<mpd" in head:
        explanation = "this is a playlist, not a video; give the path of the video itself."
        return UnreadableMedia("playlist", path, explanation)
    if head.startswith(b"version https://git-lfs"):
        explanation = "this is a Git LFS pointer, not the video; run `git lfs pull`."
    elif head.startswith((b"<!doctype", b"<html", b"<?xml")):
        explanation = "this is a web page saved under a video's name; download the video again."
    else:
        explanation = "FFmpeg finds no video in it (another kind of file, or a download cut off before its index)."
    return UnreadableMedia("not-a-video", path, explanation)


def pick_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the video stream that players show: marked as default, else the largest; cover art does not count.

    A video comes before a still image (in animated AVIF, the first frame is stored a second time as one).

    Raises:
        UnreadableMedia: there is none, or FFmpeg has no decoder for it.
    """
    streams = list(container.streams.video)
    real = [s for s in streams if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise UnreadableMedia("no-video-stream", path, "the file has no video stream (sound only?).")
    if not real:
        raise UnreadableMedia("cover-art-only", path, "its only image is cover art; there is no video stream.")
    usable = [s for s in real if s.codec_context is not None and s.codec_context.width > 0]
    if not usable:
        raise UnreadableMedia("no-decoder", path, "this build of FFmpeg cannot decode its video stream.")
    return max(usable, key=lambda s: (bool(s.disposition & av.stream.Disposition.default), s.frames != 1, *_size(s)))


def largest_stream(container: InputContainer) -> int:
    """Return the index of the largest video stream."""
    return max((s for s in container.streams.video if s.codec_context is not None), key=_size).index


def _size(stream: VideoStream) -> tuple[int, int]:
    return stream.codec_context.width * stream.codec_context.height, -stream.index


def use_one_thread(stream: VideoStream) -> None:
    """Decode on one thread: workers run in parallel anyway, and errors then occur at a reproducible frame."""
    stream.codec_context.thread_count = 1
    stream.thread_type = "NONE"


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """Return the stream's decoder, or one that also decodes its transparency."""
    name = alpha_decoder(stream)
    if name is None:
        return stream.codec_context
    if name not in av.codecs_available:
        path = Path(stream.container.name.removeprefix("file:"))
        raise UnreadableMedia("unsupported-alpha", path, f"its transparency needs FFmpeg's decoder {name}.")
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    return decoder


class Walked(NamedTuple):
    """One decoded frame, or a packet that failed to decode (`frame` is None).

    Attributes:
        pts: its timestamp, if it has one.
        clean: False from the first damage up to the next undamaged key frame.
        packet: the number of the packet that carried it, in the order of decoding.
    """

    frame: VideoFrame | None
    pts: int | None
    clean: bool
    packet: int


def walk_frames(
    container: InputContainer,
    stream: VideoStream,
    deadline: Deadline,
    before_decoding: Callable[[VideoStream, Packet], None] | None = None,
) -> Iterator[Walked]:
    """Yield frames in presentation order, starting at the first key frame at or after the container's position.

    A frame is clean unless FFmpeg marks it as corrupt, or it was decoded after a failed packet and before the next key
    frame. Failed packets are yielded in the order of decoding. A frame that is shown before a corrupt one, but was
    decoded after it, is called clean here; `Decoded` corrects this.
    """
    decoder, keys = _decoder(stream), set[int]()  # numbers of key packets: libvpx does not mark key frames
    order: dict[int, int] = {}  # presentation timestamp -> number of the packet that carried it
    broken_at: int | None = None  # number of the first packet whose frames cannot be trusted
    started, leading = False, True
    first_pts: int | None = None
    number = -1
    for packet in _demux(container, stream):
        number += 1
        if packet is None:
            deadline.check()
            broken_at = number if broken_at is None else broken_at
        else:
            deadline.advance(packet.size)
        if packet is not None and packet.size:
            if not started and not packet.is_keyframe:
                continue
            if not started:
                started, first_pts = True, packet.pts
            if packet.pts is not None:
                order[packet.pts] = number
            if packet.is_keyframe and decoder is not stream.codec_context:
                keys.add(number)
            if before_decoding is not None:
                before_decoding(stream, packet)
        try:
            frames = decoder.decode(packet)
        except av.FFmpegError:
            broken_at = number if broken_at is None else broken_at
            yield Walked(None, packet.pts if packet is not None else None, False, number)
            continue
        for frame in frames:
            if frame.pts is not None and first_pts is not None and frame.pts < first_pts and leading:
                continue
            leading = False
            carried = order.get(frame.pts, number) if frame.pts is not None else number
            is_key = frame.key_frame or carried in keys
            if broken_at is not None and carried > broken_at and is_key and not frame.is_corrupt:
                broken_at = None
            if frame.is_corrupt:
                broken_at = carried if broken_at is None else min(broken_at, carried)
            yield Walked(frame, frame.pts, broken_at is None or carried < broken_at, carried)


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet | None]:
    """Yield the stream's packets and the final flush; None if reading itself failed (the disk, a broken index)."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError):
            yield None
            return
        if packet is None:
            return
        yield packet
