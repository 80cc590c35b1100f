"""A page on this machine to read and edit the captions of a manifest beside film strips of the clips.

`CaptionReview` has what the page shows and does; `ReviewServer` puts it behind HTTP. The address contains a random
token, so no other site can read or post anything, and requests must name this machine as their host.
"""

import io
import json
import logging
import os
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from titans_video.access import Access
from titans_video.captioning.captioner import sample_frames
from titans_video.captioning.run import finish_interrupted
from titans_video.data.manifest import Row
from titans_video.data.manifest_edit import EDITED, ManifestText, read_manifest
from titans_video.errors import ConfigError, DataError, WriteError, counted
from titans_video.media.opening import DECODING_ERRORS, UnreadableMedia
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip
from titans_video.parsing import Malformed, parse_json

Which = Literal["all", "missing", "model", "edited", "given"]
STRIP_FRAMES, STRIP_HEIGHT = 6, 120
KEPT_STRIPS = 256
MOST_ROWS = 200
MOST_BYTES = 2**20
MOST_CHARACTERS = 100_000
HOST = "127.0.0.1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReviewRow:
    """A row as the page shows it.

    Attributes:
        key: a name of the row that stays when its caption changes.
        writer: who wrote the caption: a model, `edited`, both, or nobody known.
        origin: where the row comes from.
    """

    key: str
    number: int
    video: str
    seconds: str
    caption: str
    writer: str
    origin: str


class CaptionChanged(Exception):
    """The caption is no longer what the page showed; `row` is the row as it is now."""

    def __init__(self, row: ReviewRow) -> None:
        super().__init__("The manifest was changed meanwhile.")
        self.row = row


class CaptionReview:
    """The rows of one manifest, their film strips, and edits that are saved at once."""

    def __init__(self, manifest: Path | str, data_root: str | None = None, *, allow_outside_root: bool = False) -> None:
        """Open a manifest; captions of a killed command are moved into it first. Raises DataError."""
        self.path = Path(manifest)
        found = finish_interrupted(self.path)
        if found is None:
            logger.info(f"A command writes captions for {manifest}. They are there when it ends; load the page again.")
        elif found:
            logger.info(f"{counted(found, 'caption')} of a command that was killed moved into {manifest}.")
        text, rows = read_manifest(manifest, data_root, allow_outside_root=allow_outside_root)
        self._rows: Mapping[str, Row] = dict(zip(text.keys, rows, strict=True))
        self._lock = threading.Lock()
        self.strip = lru_cache(KEPT_STRIPS)(self._strip)

    def rows(self, which: Which = "all", words: str = "") -> list[ReviewRow]:
        """Return the rows, as the file has them now, of one kind and whose video or caption contains `words`."""
        text, wanted = ManifestText(self.path), words.casefold().strip()
        found = [self._shown(text, number) for number, key in enumerate(text.keys) if key in self._rows]
        return [
            row
            for row in found
            if _is_kind(row, which) and (wanted in row.caption.casefold() or wanted in row.video.casefold())
        ]

    def save(self, key: str, before: str, caption: str) -> ReviewRow:
        """Write a row's caption into the manifest and return the row.

        Args:
            before: the caption that the user changed.
        Raises:
            CaptionChanged: the file has another caption now; nothing is written.
            DataError: there is no such row, or the caption is no text that a manifest can hold.
            WriteError: the manifest cannot be written.
        """
        if len(caption) > MOST_CHARACTERS:
            raise DataError(f"A caption has {MOST_CHARACTERS} characters at most.")
        if any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise DataError("The caption contains half of a surrogate pair, which is not text.")
        with self._lock:
            text = ManifestText(self.path)
            if key not in text.keys:
                raise DataError(f"{self.path} has no such row any more. Load the page again.")
            number = text.keys.index(key)
            shown = self._shown(text, number)
            if shown.caption == caption.strip():
                return shown
            if shown.caption != before.strip():
                raise CaptionChanged(shown)
            writer = shown.writer.removesuffix(EDITED).rstrip(", ")
            writer = f"{writer}, {EDITED}" if writer else EDITED
            text.with_captions({number: (caption.strip(), writer)}).write()
            return replace(shown, caption=caption.strip(), writer=writer)

    def _shown(self, text: ManifestText, number: int) -> ReviewRow:
        row, key = text.rows[number], text.keys[number]
        known = self._rows.get(key)
        video = str(row.values.get("video") or row.values.get("video_path") or "")
        seconds = "" if known is None or (not known.start and known.end is None) else f"from {known.start:g} s"
        seconds += f" to {known.end:g} s" if known is not None and known.end is not None else ""
        origin = str(row.values.get("origin") or f"{self.path.name}, line {row.line}")
        return ReviewRow(key, number, video, seconds, row.caption.strip(), row.writer, origin)

    def _strip(self, key: str) -> bytes:
        """Return a JPEG of frames next to each other. DataError: there is no such row, or its clip cannot be read."""
        row = self._rows.get(key)
        if row is None:
            raise DataError("There is no such row. Load the page again.")
        try:
            info = probe(row.video)
            _, _, chosen = sample_frames(info, row.start, row.end, STRIP_FRAMES)
            width = max(round(STRIP_HEIGHT * info.width / info.height), 1)
            pixels = read_clip(row.video, info, chosen, STRIP_HEIGHT, width)
        except (UnreadableMedia, OSError, *DECODING_ERRORS) as e:
            raise DataError(f"This clip cannot be read: {e}") from None
        written = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 0, 2, 3).reshape(STRIP_HEIGHT, -1, 3)).save(written, "JPEG", quality=85)
        return written.getvalue()


def _is_kind(row: ReviewRow, which: Which) -> bool:
    is_edited = row.writer.endswith(EDITED)
    kinds = {
        "all": True,
        "missing": not row.caption,
        "edited": is_edited,
        "model": bool(row.caption and row.writer) and not is_edited,
        "given": bool(row.caption) and not row.writer,
    }
    return kinds[which]


class ReviewServer(ThreadingHTTPServer):
    """The page at `url`; `serve_forever` answers until `shutdown`."""

    daemon_threads = True

    def __init__(self, review: CaptionReview, port: int = 0) -> None:
        """Listen on this machine only. ConfigError if the port is taken."""
        self.review, self.access = review, Access()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as e:
            raise ConfigError(f"--port {port} cannot be used: {e.strerror}. Use another one, or 0.") from None

    @property
    def token(self) -> str:
        return self.access.token

    @property
    def url(self) -> str:
        return self.address(self.token)

    def address(self, word: str) -> str:
        """Return the address of the page with the token or a code."""
        return f"http://{HOST}:{self.server_port}/{word}/"


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """Answer one request."""

    server: ReviewServer
    server_version, sys_version = "titans-video", ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer({"": self._page, "rows": self._rows, "strip": self._strip})

    def do_POST(self) -> None:
        self._answer({"caption": self._save})

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _answer(self, actions: Mapping[str, Callable[[dict[str, str]], tuple[int, str, bytes]]]) -> None:
        try:
            parts = urlsplit(self.path)
            _, token, *rest = parts.path.split("/")
            if not self.server.access.names_server(self.headers.get("Host")):
                raise _Refused(403, "This page is only for this machine.")
            if self.server.access.take_code(token):
                self._send(303, "text/plain", b"", {"Location": f"/{self.server.token}/"})
                return
            if not self.server.access.has_token(token) or len(rest) != 1:
                raise _Refused(404, "There is no such page. Use the address that the command printed.")
            if rest[0] not in actions:
                raise _Refused(404, "There is no such page.")
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            self._send(*actions[rest[0]](query))
        except _Refused as e:
            self._send(e.status, "text/plain", str(e).encode())
        except CaptionChanged as e:
            self._send(409, "application/json", json.dumps(asdict(e.row)).encode())
        except (DataError, WriteError) as e:
            self._send(500 if isinstance(e, WriteError) else 400, "text/plain", str(e).encode())
        except (BrokenPipeError, ConnectionResetError):  # the browser has left
            self.close_connection = True

    def _send(self, status: int, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{self.server.token}'; "
        )
        headers = {
            "Content-Type": f"{kind}; charset=utf-8" if kind != "image/jpeg" else kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy}style-src 'nonce-{self.server.token}'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store" if kind != "image/jpeg" else "private, max-age=3600",
        }
        for name, value in {**headers, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _page(self, query: dict[str, str]) -> tuple[int, str, bytes]:
        page = (files("titans_video") / "assets" / "review.html").read_text(encoding="utf-8")
        return 200, "text/html", page.replace("NONCE", self.server.token).encode()

    def _rows(self, query: dict[str, str]) -> tuple[int, str, bytes]:
        which = next((kind for kind in get_args(Which) if kind == query.get("which", "all")), None)
        if which is None or not query.get("start", "0").isdecimal():
            raise _Refused(400, "There is no such list.")
        found = self.server.review.rows(which, query.get("words", ""))
        start = int(query.get("start", "0"))
        shown = [asdict(row) for row in found[start : start + MOST_ROWS]]
        answer = {"manifest": str(self.server.review.path), "count": len(found), "rows": shown}
        return 200, "application/json", json.dumps(answer).encode()

    def _strip(self, query: dict[str, str]) -> tuple[int, str, bytes]:
        return 200, "image/jpeg", self.server.review.strip(query.get("row", ""))

    def _save(self, query: dict[str, str]) -> tuple[int, str, bytes]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "Send JSON.")
        if self.server.access.is_foreign(self.headers.get("Origin"), self.headers.get("Host")):
            raise _Refused(403, "This page is only for this machine.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            raise _Refused(413, "The caption is too long.")
        try:
            sent: Any = parse_json(self.rfile.read(int(length)))
        except Malformed as e:
            raise _Refused(400, f"The request cannot be read: {e}.") from None
        names = ("key", "before", "caption")
        if not isinstance(sent, dict) or not all(isinstance(sent.get(name), str) for name in names):
            raise _Refused(400, f"Send {', '.join(names)}.")
        row = self.server.review.save(*(sent[name] for name in names))
        return 200, "application/json", json.dumps(asdict(row)).encode()


def serve_review(server: ReviewServer, *, open_browser: bool) -> None:
    """Print the address and serve until Ctrl-C."""
    print(f"Captions of {server.review.path}: {server.url}\nEdits are saved at once. Press Ctrl-C to end.", flush=True)
    has_screen = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
    if open_browser and has_screen:  # without a screen, Python would start a browser in this terminal
        webbrowser.open(server.address(server.access.new_code()))
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
