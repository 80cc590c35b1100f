"""Opening media: one file is read, and no other file, address or program, whatever that file contains."""

import ast
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import pytest
from av.format import ContainerFormat
from PIL import Image

import titans_video
from tests.unit.media_clips import encode, moving_bars
from titans_video.media import opening
from titans_video.media.opening import FORMATS, UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_image

SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{0}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>"
)
IMF = '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"><Id>{0}</Id></CompositionPlaylist>'
POINTING = {
    "a.m3u8": HLS,
    "hidden.mp4": HLS,
    "key.m3u8": HLS.replace("#EXTINF", '#EXT-X-KEY:METHOD=AES-128,URI="{0}"\n#EXTINF'),
    "bom.m3u8": "\ufeff" + HLS,
    "list.ffconcat": "ffconcat version 1.0\nfile '{0}'\n",
    "a.sdp": SDP,
    "a.mpd": DASH,
    "a.cpl": IMF,
    "a.asx": '<asx version="3.0"><entry><ref href="{0}"/></entry></asx>',
    "ref.asf": "[Reference]\nRef1={0}\n",
    "a.txt": "{0}\n",
}
PLAYLISTS = {"a.m3u8", "hidden.mp4", "key.m3u8", "bom.m3u8", "list.ffconcat", "a.sdp", "a.mpd", "a.asx", "ref.asf"}


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *values: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/segment.ts", asked
        found.shutdown()
        thread.join()


def opens(path: Path) -> bool:
    """Check whether a process has opened a pipe to read: only then can it be opened to write without waiting."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", POINTING)
def test_a_file_that_names_others_opens_none_of_them(tmp_path: Path, name: str, server: tuple[str, list[str]]) -> None:
    address, asked = server
    segment = encode(tmp_path / "segment.mp4", moving_bars(3))
    os.utime(segment, ns=(0, segment.stat().st_mtime_ns))  # an access sets it to the present, also under relatime
    os.mkfifo(tmp_path / "pipe.mp4")
    path = tmp_path / name
    for target in (segment.name, str(segment), f"file:{segment}", address, str(tmp_path / "pipe.mp4"), "data:,x"):
        path.write_text(POINTING[name].format(target))
        watched = threading.Event()
        reason: list[str] = []

        def look(watched: threading.Event = watched, reason: list[str] = reason) -> None:
            with pytest.raises(UnreadableMedia) as caught:
                probe(path)
            reason.append(caught.value.reason)
            watched.set()

        thread = threading.Thread(target=look)
        thread.start()
        while not watched.wait(0.001):
            assert not opens(tmp_path / "pipe.mp4")
        thread.join()
        assert reason == ["playlist" if name in PLAYLISTS else "not-a-video"]
    assert asked == []
    assert segment.stat().st_atime_ns == 0


@pytest.mark.parametrize("name", ["s%d.png", "s%03d.png", "s?.png", "s*.png", "s[0-9].png"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    for number in range(5):
        Image.new("RGB", (32, 32), (50 * number, 0, 0)).save(tmp_path / f"s{number}.png")
        Image.new("RGB", (32, 32), (50 * number, 0, 0)).save(tmp_path / f"s{number:03d}.png")
    Image.new("RGB", (64, 48), "blue").save(tmp_path / name)
    assert (probe(tmp_path / name).frames, probe(tmp_path / name).width) == (1, 64)


@pytest.mark.parametrize("name", ["concat:a.mp4|a.mp4", "http:a.mp4", "data:video,a.mp4", "pipe:0", "crypto:a.mp4"])
def test_a_name_is_no_address(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "a.mp4", moving_bars(5))
    with pytest.raises(UnreadableMedia) as caught:
        probe(name)
    assert caught.value.reason == "missing"
    (tmp_path / "a.mp4").rename(tmp_path / name)
    assert probe(name).frames == 5


def test_every_listed_format_exists_and_none_opens_others() -> None:
    listed = set(FORMATS.split(","))
    names = {n for known in av.formats_available for n in _names(known)}
    assert listed <= names
    others = "concat hls dash imf sdp rtsp rtp sap lavfi tty webm_dash_manifest vobsub mlv ffmetadata aqtitle svg_pipe"
    assert not listed & set(others.split())


def _names(known: str) -> list[str]:
    try:
        return ContainerFormat(known, "r").name.split(",")
    except ValueError:
        return []


@pytest.mark.filterwarnings("ignore:IM image format")
@pytest.mark.parametrize("kind", ["EPS", "IM", "MSP", "XBM"])
def test_image_formats_outside_the_list_are_refused(tmp_path: Path, kind: str) -> None:
    mode = {"MSP": "1", "XBM": "1"}.get(kind, "RGB")
    Image.new(mode, (16, 16)).save(tmp_path / "a.png", kind)
    with pytest.raises(UnreadableMedia) as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.reason == "not-an-image"


def test_media_are_opened_in_one_place() -> None:
    """Every file that is read goes through `open_container`, and every image through `images.py`."""
    source = Path(titans_video.__file__).parent
    found: dict[str, list[str]] = {"av.open": [], "Image.open": []}
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in found:
                mode = node.args[1] if len(node.args) > 1 else None
                if not (isinstance(mode, ast.Constant) and mode.value == "w"):
                    found[name].append(path.relative_to(source).as_posix())
    assert set(found["av.open"]) == {Path(opening.__file__).relative_to(source).as_posix()}
    assert set(found["Image.open"]) == {"media/images.py", "training/tracking.py"}  # the latter: a sheet of its own
