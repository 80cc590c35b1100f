"""The page to review captions: real requests to it, and once a real browser."""

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.media_clips import encode, moving_bars
from titans_video.captioning.review import STRIP_FRAMES, STRIP_HEIGHT, CaptionReview, ReviewServer, serve_review
from titans_video.captioning.run import Finished, Journal, finish_interrupted, write_captions
from titans_video.cli.main import main
from titans_video.config.generation import CaptionOptions
from titans_video.errors import ConfigError
from titans_video.storage.locks import try_locked

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "caption": "a cat", "origin": "clips/a.txt", "fresh": [1.50]},
    {"video": "a.mp4", "start": 0.5, "end": 1.0, "caption": "<b>a dog</b>", "caption_by": "Qwen"},
    {"video": "none.mp4"},
]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    encode(tmp_path / "a.mp4", moving_bars(16), fps=8)
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def server(manifest: Path) -> Iterator[ReviewServer]:
    with ReviewServer(CaptionReview(manifest)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: ReviewServer, path: str, body: object = None, *, token: str | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    sent = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if sent is not None else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    address = f"/{server.token if token is None else token}/{path}"
    connection.request("GET" if sent is None else "POST", address, sent, given | named)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def rows(server: ReviewServer, query: str = "") -> list[dict[str, Any]]:
    status, answer = ask(server, f"rows{query}")
    assert status == 200
    found: list[dict[str, Any]] = json.loads(answer)["rows"]
    return found


def test_rows_show_their_origin_and_their_writer(server: ReviewServer) -> None:
    found = rows(server)
    assert [row["caption"] for row in found] == ["a cat", "<b>a dog</b>", ""]
    assert [row["writer"] for row in found] == ["", "Qwen", ""]
    assert [row["origin"] for row in found] == ["clips/a.txt", "manifest.jsonl, line 2", "manifest.jsonl, line 3"]
    assert found[1]["seconds"] == "from 0.5 s to 1 s"
    for query, numbers in (("which=missing", [2]), ("which=model", [1]), ("which=given", [0]), ("words=DOG", [1])):
        assert [row["number"] for row in rows(server, f"?{query}")] == numbers
    assert rows(server, "?start=2")[0]["number"] == 2


def test_a_strip_shows_the_frames_of_the_row(server: ReviewServer, tmp_path: Path) -> None:
    keys = [row["key"] for row in rows(server)]
    status, strip = ask(server, f"strip?row={keys[0]}")
    assert status == 200
    (tmp_path / "s.jpg").write_bytes(strip)
    with Image.open(tmp_path / "s.jpg") as image:
        assert image.size == (STRIP_FRAMES * STRIP_HEIGHT * 64 // 48, STRIP_HEIGHT)
        blue = np.asarray(image)[20:100, :, 2].reshape(80, STRIP_FRAMES, -1).mean((0, 2))
    # The middles of six parts of 2 s at 8 frames per second: frames 1, 4, 6, 9, 12, 14; the bars' blue is 37 t mod 256.
    assert np.abs(blue - [37 * t % 256 for t in (1, 4, 6, 9, 12, 14)]).max() < 12
    status, why = ask(server, f"strip?row={keys[2]}")
    assert status == 400
    assert b"cannot be read" in why
    assert ask(server, "strip?row=unknown")[0] == 400


def test_an_edit_is_in_the_file_at_once(server: ReviewServer, manifest: Path) -> None:
    first, second, third = rows(server)
    lines = manifest.read_text().splitlines()
    edit = {"key": second["key"], "before": second["caption"], "caption": 'ein Hund, "groß" \n'}
    status, answer = ask(server, "caption", edit)
    assert status == 200
    assert json.loads(answer)["writer"] == "Qwen, edited"
    changed = lines[1].replace('"<b>a dog</b>"', '"ein Hund, \\"groß\\""').replace('"Qwen"', '"Qwen, edited"')
    assert manifest.read_text() == "\n".join([lines[0], changed, lines[2], ""])
    ask(server, "caption", {"key": third["key"], "before": "", "caption": "new"})
    again = {"key": second["key"], "before": 'ein Hund, "groß"', "caption": "a dog"}
    assert json.loads(ask(server, "caption", again)[1])["writer"] == "Qwen, edited"
    assert [row["writer"] for row in rows(server)] == ["", "Qwen, edited", "edited"]
    assert [row["number"] for row in rows(server, "?which=edited")] == [1, 2]
    # The same words are no edit.
    before = manifest.read_bytes()
    assert ask(server, "caption", {"key": first["key"], "before": "a cat", "caption": "a cat"})[0] == 200
    assert manifest.read_bytes() == before


def test_an_edit_of_a_caption_that_changed_meanwhile_is_refused(server: ReviewServer, manifest: Path) -> None:
    first = rows(server)[0]
    manifest.write_text(manifest.read_text().replace("a cat", "a lion"))
    edit = {"key": first["key"], "before": "a cat", "caption": "a tiger"}
    status, answer = ask(server, "caption", edit)
    assert (status, json.loads(answer)["caption"]) == (409, "a lion")
    assert "a lion" in manifest.read_text()
    assert ask(server, "caption", edit | {"before": "a lion"})[0] == 200
    manifest.write_text('{"video": "a.mp4", "end": 1.0}\n')  # the row has gone
    assert ask(server, "caption", edit)[0] == 400


def test_other_sites_and_other_machines_get_nothing(server: ReviewServer, manifest: Path) -> None:
    key = rows(server)[0]["key"]
    edit = {"key": key, "before": "a cat", "caption": "spam"}
    before, port = manifest.read_bytes(), server.server_port
    assert server.server_address[0] == "127.0.0.1"
    refused = [
        ask(server, "caption", edit, token="wrong"),
        ask(server, "", token=""),
        ask(server, "rows", Host="evil.example"),
        ask(server, "caption", edit, Host=f"evil.example:{port}"),
        ask(server, "caption", edit, Origin="http://evil.example"),
        ask(server, "caption", edit, Content_Type="text/plain"),  # what a form of another site can send
        ask(server, "../../etc/passwd"),
        ask(server, "strip/../rows"),
        ask(server, "nothing"),
        ask(server, "rows?which=odd"),
        ask(server, "caption", b"x" * 2**21),
        ask(server, "caption", b"{"),
        ask(server, "caption", {"key": key}),
        ask(server, "caption", edit | {"caption": "\ud800"}),
        ask(server, "caption", edit | {"caption": "x" * 100_001}),
        ask(server, "rows", {}),
        ask(server, "caption"),
    ]
    assert [status for status, _ in refused] == [
        *(404, 404, 403, 403, 403, 415, 404, 404, 404, 400, 413, 400, 400, 400, 400, 404, 404)
    ]
    assert manifest.read_bytes() == before
    assert ask(server, "caption", edit, Origin=f"http://127.0.0.1:{port}")[0] == 200
    with pytest.raises(ConfigError, match=f"--port {port}"):
        ReviewServer(server.review, port)


def test_the_browser_is_opened_with_a_code_that_works_once(
    server: ReviewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("titans_video.captioning.review.webbrowser.open", opened.append)
    monkeypatch.setattr(ReviewServer, "serve_forever", lambda self, poll_interval: None)
    with ReviewServer(server.review) as other:
        serve_review(other, open_browser=True)
        assert other.token not in opened[0]
    server.access = other.access
    code = opened[0].split("/")[3]
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", f"/{code}/")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Location"]) == (303, f"/{server.token}/")
    connection.close()
    assert ask(server, "", token=code)[0] == 404
    assert ask(server, "rows")[0] == 200


def test_captions_of_a_killed_command_are_moved_first(manifest: Path) -> None:
    key = CaptionReview(manifest).rows("missing")[0].key
    line = {"row": key, "caption": "found", "writer": "Qwen", "settings": "x"}
    manifest.with_name("manifest.jsonl.captions").write_text(json.dumps(line) + "\n")
    assert [row.caption for row in CaptionReview(manifest).rows()][2] == "found"


def test_captions_of_a_running_command_stay_its_own(
    manifest: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    key = CaptionReview(manifest).rows("missing")[0].key
    line = {"row": key, "caption": "found", "writer": "Qwen", "settings": "x"}
    journal = manifest.with_name("manifest.jsonl.captions")
    journal.write_text(json.dumps(line) + "\n")
    before = manifest.read_bytes()
    with try_locked(Journal(manifest).lock) as is_locked, caplog.at_level("INFO"):
        assert is_locked
        assert [row.caption for row in CaptionReview(manifest).rows()][2] == ""
        assert "A command writes captions for" in caplog.text
        assert main(["caption", str(manifest), "--model", "x"]) == 2
        assert "another command writes captions for it" in capsys.readouterr().err
    assert manifest.read_bytes() == before
    assert json.loads(journal.read_text()) == line
    assert [row.caption for row in CaptionReview(manifest).rows()][2] == "found"
    assert {path.name for path in manifest.parent.iterdir()} == {"a.mp4", "manifest.jsonl"}


def test_a_command_locks_its_captions_while_it_writes(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(todo: set[int], *rest: Any) -> None:
        assert todo == {2}
        assert finish_interrupted(manifest) == 0  # no journal yet
        Journal(manifest).add([Finished(CaptionReview(manifest).rows("missing")[0].key, "new", "Qwen", "x")])
        assert finish_interrupted(manifest) is None

    monkeypatch.setattr("titans_video.captioning.run._describe_rows", describe)
    write_captions(CaptionOptions(manifest=str(manifest), model="x"))
    assert not Journal(manifest).lock.exists()


def test_the_command_serves_until_ctrl_c(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def serve(server: ReviewServer, poll_interval: float) -> None:
        asked.append(server.server_port)
        raise KeyboardInterrupt

    monkeypatch.setattr(ReviewServer, "serve_forever", serve)
    assert main(["caption", "--review", str(manifest), "--no-browser"]) == 0
    printed = capsys.readouterr().out
    assert f"http://127.0.0.1:{asked[0]}/" in printed
    assert "The page is closed." in printed
    assert main(["caption", "--review", str(manifest.parent / "none.jsonl")]) == 2


def until(page: Any, condition: str) -> None:
    """Wait until an expression is true; playwright's own `wait_for_function` needs `eval`, which the page forbids."""
    for _ in range(6000):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {condition}")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(server: ReviewServer, manifest: Path, tmp_path: Path) -> None:
    """Read, edit with the keyboard alone, save; no errors, no request to another place."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=300_000)
        page = browser.new_page(viewport={"width": 1200, "height": 700})
        page.set_default_timeout(300_000)  # a machine may be busy
        errors: list[str] = []
        addresses: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(server.url)
        until(page, "document.querySelectorAll('.strip img').length >= 2")
        until(page, "[...document.querySelectorAll('.strip img')].slice(0, 2).every(i => i.naturalWidth > 0)")
        until(page, "document.body.innerText.includes('This clip cannot be read')")
        assert page.locator("textarea").nth(1).input_value() == "<b>a dog</b>"  # text, never markup
        page.keyboard.press("j")
        page.keyboard.press("e")
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type("a brown dog")
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelectorAll('.state')[1].textContent === 'saved'")
        assert "a brown dog" in manifest.read_text()
        page.keyboard.type("not this")  # the next row has the focus
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        page.keyboard.type("brown")
        until(page, "document.querySelectorAll('article').length === 1")
        page.keyboard.press("Escape")
        page.locator("#words").fill("")
        until(page, "document.querySelectorAll('article').length === 3")
        until(page, "[...document.querySelectorAll('.strip img')].slice(0, 2).every(i => i.naturalWidth > 0)")
        page.screenshot(path=tmp_path / "wide.png")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=tmp_path / "phone.png")
        browser.close()
    assert [json.loads(line).get("caption") for line in manifest.read_text().splitlines()] == [
        "a cat",
        "a brown dog",
        None,
    ]
    assert all(address.startswith(server.url) for address in addresses)
    # The clip that does not exist is the one failed request of the page.
    assert all("400" in error for error in errors), errors
