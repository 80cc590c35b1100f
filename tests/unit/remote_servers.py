"""Servers for the tests of remote files: a web server with ranges and faults, and moto's S3."""

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class WebServer:
    """Serve a folder.

    Attributes:
        cut: the next GETs send only so many bytes and drop the connection.
        status: the next requests get these statuses.
        ranges: whether parts of files are sent.
        delay: seconds between two pieces of 1000 bytes.
        requests: (method, path, first byte or None) of each request.
        sent: bytes of bodies.
    """

    folder: Path
    url: str = ""
    cut: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    ranges: bool = True
    delay: float = 0.0
    requests: list[tuple[str, str, int | None]] = field(default_factory=list)
    sent: int = 0

    def gets(self, name: str = "") -> int:
        return sum(method == "GET" and name in path for method, path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: WebServer, *args: object) -> None:
        self.web = server
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, has_body: bool) -> None:
        asked = self.headers.get("Range") if self.web.ranges else None
        first, _, last = (asked or "").removeprefix("bytes=").partition("-")
        self.web.requests.append((self.command, self.path, int(first) if first else None))
        path = self.web.folder / unquote(urlsplit(self.path).path).lstrip("/")
        status = self.web.status.pop(0) if self.web.status else 200 if path.is_file() else 404
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        size, tag = len(data), hashlib.md5(data).hexdigest()
        if asked:
            begin, end = int(first), min(int(last or size), size - 1) + 1
            data = data[begin:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if not has_body:
            return
        cut = self.web.cut.pop(0) if self.web.cut else len(data)
        for at in range(0, min(cut, len(data)), 1000):
            self.wfile.write(data[at : min(at + 1000, cut)])
            self.web.sent += len(data[at : min(at + 1000, cut)])
            time.sleep(self.web.delay)
        if cut < len(data):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    """Serve a folder on this machine until the context ends."""
    found = WebServer(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, found)) as server:
        server.daemon_threads = True
        found.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield found
        finally:
            server.shutdown()


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run moto's S3 server until the context ends, and set the environment of its clients; give its address."""
    s3fs = pytest.importorskip("s3fs", reason="no s3fs: pip install -e '.[remote]'")
    server = pytest.importorskip("moto.server", reason="no moto: pip install -e '.[dev]'")
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of an earlier server
    try:
        yield address
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        running.stop()
