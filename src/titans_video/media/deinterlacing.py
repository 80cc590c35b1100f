"""Interlaced video to full frames, one for each stored frame, with FFmpeg's bwdif."""

from collections import deque
from collections.abc import Iterator

import av
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream


class Deinterlacer:
    """Weaves the fields of each frame using the frame before and the one after it.

    It answers one frame late, in the order it was fed. A frame's picture therefore depends on its two neighbours and on
    nothing else: a reader that starts one frame early gets what a reader from the start of the file gets.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._stream = stream
        self._graph: Graph | None = None
        self._waiting: deque[int] = deque()

    def feed(self, number: int, frame: VideoFrame) -> Iterator[tuple[int, VideoFrame]]:
        """Take a frame, give back those that are finished, each with its number."""
        if self._graph is None:
            self._graph = self._build(frame)
        self._waiting.append(number)
        self._graph.vpush(frame)
        yield from self._finished()

    def finish(self) -> Iterator[tuple[int, VideoFrame]]:
        """The frames still held back."""
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
