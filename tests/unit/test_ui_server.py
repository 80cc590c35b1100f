"""The page's server: who may use it, which files it gives, and processes that are found again by their folders."""

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.generation_parts import tiny_model
from titans_video import console
from titans_video.access import Access, is_loopback
from titans_video.cli.ui import address_of, bind, main
from titans_video.config.generation import GenerateOptions
from titans_video.console import Progress
from titans_video.errors import ConfigError
from titans_video.generation import denoise, long_video
from titans_video.generation.request import build_request
from titans_video.media.plots import smoothed
from titans_video.reporting.report import write_report
from titans_video.training import tracking
from titans_video.training.run_folder import LOCK
from titans_video.ui import jobs, runs, training, videos
from titans_video.ui.server import HEADER, make_app

LINES = 3000
TOKEN, PORT = "a-token", 8765
COOKIE = f"titans-video-{PORT}={TOKEN}"


def call(
    app: Any, path: str, *, method: str = "GET", body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request to an ASGI application, as the browser of its owner; return status, headers and body."""
    given = {
        "host": "127.0.0.1:8765",
        "cookie": COOKIE,
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        "server": ("127.0.0.1", 8765),
        "client": ("127.0.0.1", 5),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    sent: list[dict[str, Any]] = []
    bodies = [body]

    async def receive() -> dict[str, Any]:
        while not bodies:  # the browser stays connected
            await asyncio.sleep(60)
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


def post(app: Any, path: str, given: Any, **headers: str) -> tuple[int, Any]:
    status, _, body = call(app, path, method="POST", body=json.dumps(given).encode(), **{HEADER: "1", **headers})
    return status, json.loads(body) if body[:1] == b"{" else body


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run in outputs/a."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "a"
    (run / "samples" / "step-0000010").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = [
        {"step": n, "loss": float(2 / n + rng.random() / 10), "loss_smooth": 2 / n, "lr": 1e-4, "eta_seconds": 5.0}
        for n in range(1, LINES + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "format": "titans-video-run/1",
        "options": {"max_steps": 4000, "lr": 0.1, "preset": "S", "output_dir": "outputs/a"},
        "defaults": {"max_steps": 100, "lr": 0.2, "preset": "S", "output_dir": "outputs/a"},
        "starts": [
            {
                "at": "2026-01-01T00:00:00+00:00",
                "step": 0,
                "processes": 1,
                "device": "CPU",
                "running": "1 process",
                "platform": "x",
                "versions": {},
                "command": ["titans-video", "train", "--max-steps", "4000", "--resume=none", "--lr", "0.1"],
            }
        ],
    }
    (run / "run.json").write_text(json.dumps(record))
    (run / "samples" / "step-0000010" / "prompts.json").write_text('["a cat", "a dog"]')
    (run / "samples" / "step-0000010" / "01.mp4").write_bytes(b"film")
    held = [{"step": 10, "samples": "samples/step-0000010"}]
    (run / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    (tmp_path / "secret.json").write_text("{}")
    (run / "link.json").symlink_to(tmp_path / "secret.json")
    return tmp_path


@pytest.fixture
def app(place: Path) -> Any:
    return make_app([Path("outputs")], Access(TOKEN), PORT)


def test_the_page_and_its_parts_are_served_with_a_policy(app: Any) -> None:
    status, headers, body = call(app, "/")
    assert (status, b"Titans Video" in body) == (200, True)
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    for name in ("app.js", "style.css", "dom.js", "icon.svg"):
        assert call(app, f"/ui/{name}")[0] == 200
    assert call(app, "/ui/../server.py")[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "0.0.0.0:8765"])
def test_a_foreign_name_for_this_machine_is_refused(app: Any, host: str) -> None:
    assert call(app, "/api/runs", host=host)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765"])
def test_names_of_this_machine_are_answered(app: Any, host: str) -> None:
    assert call(app, "/api/about", host=host)[0] == 200


def test_a_change_must_come_from_the_page(app: Any) -> None:
    words: dict[str, Any] = {"values": {}}
    assert post(app, "/api/generate/explain", words)[0] == 200
    body = json.dumps(words).encode()
    assert call(app, "/api/generate/explain", method="POST", body=body)[0] == 403
    assert post(app, "/api/generate/explain", words, origin="http://evil.example")[0] == 403
    assert post(app, "/api/generate/explain", words, origin="http://127.0.0.1:8765")[0] == 200


@pytest.mark.parametrize(("name", "local"), [("127.0.0.1:9000", True), ("workstation:9000", False)])
def test_a_browser_needs_the_token_once(place: Path, name: str, local: bool) -> None:
    """Other users of this machine can connect to 127.0.0.1, but they do not know the token."""
    app, host = make_app([Path("outputs")], Access("a-token", local=local), 9000), {"host": name}
    for path in ("/", "/?token=wrong", "/?token=", "/api/runs", "/ui/app.js"):
        assert call(app, path, cookie="", **host)[0] == 403
    assert post(app, "/api/generate/explain", {"values": {}}, cookie="", **host)[0] == 403
    status, headers, _ = call(app, "/?token=a-token", cookie="", **host)
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()
    cookie = headers["set-cookie"].partition(";")[0]
    assert call(app, "/api/runs", cookie=cookie, **host)[0] == 200
    assert call(app, "/api/runs", cookie=cookie.replace("a-token", "b-token"), **host)[0] == 403


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_addresses(address: str, here: bool) -> None:
    assert is_loopback(address) == here


def test_a_run_is_listed_with_its_last_values(app: Any) -> None:
    (run,) = json.loads(call(app, "/api/runs")[2])["runs"]
    assert (run["path"], run["step"], run["max_steps"], run["state"]) == ("outputs/a", LINES, 4000, "stopped")
    assert run["loss"] == pytest.approx(2 / LINES)
    found = json.loads(call(app, "/api/run?run=outputs/a")[2])
    assert found["options"] == {"--max-steps": "4000", "--lr": "0.1"}
    video = {"prompt": "a cat", "file": "samples/step-0000010/01.mp4"}
    assert found["samples"] == [{"step": 10, "videos": [video | {"original": None}]}]
    report = write_report(Path("outputs/a")).read_text()
    assert f"<b>{found['verdict']['state']}</b>" in report  # the same words as in the run's report
    originals = Path("outputs/a/samples/original")
    originals.mkdir()
    (originals / "01.mp4").write_bytes(b"clip")
    for prompts, original in (('["another"]', None), ('["a cat"]', "samples/original/01.mp4")):
        (originals / "prompts.json").write_text(prompts)
        found = json.loads(call(app, "/api/run?run=outputs/a")[2])
        assert found["samples"][0]["videos"][0]["original"] == original


def test_curves_are_the_values_of_the_file(app: Any, place: Path) -> None:
    found = json.loads(call(app, "/api/run/curves?run=outputs/a")[2])
    lines = [json.loads(line) for line in (place / "outputs/a/metrics.jsonl").read_text().splitlines()]
    losses = np.array([line["loss"] for line in lines])
    assert len(found["loss"]["x"]) <= 1501
    assert found["loss"]["x"][-1] == LINES
    assert max(found["loss"]["y"]) == losses.max()
    assert all(losses[x - 1] == y for x, y in zip(map(int, found["loss"]["x"]), found["loss"]["y"], strict=True))
    assert found["smooth"]["y"][-1] == pytest.approx(smoothed(losses)[-1])
    with (place / "outputs/a/metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": LINES + 1, "loss": 99.0}) + "\n")
    reader = runs.RunReader()
    assert runs.curves(place / "outputs/a", reader)["loss"]["y"][-1] == 99.0


@pytest.mark.parametrize("recipe", training.FORMS)
def test_the_recipe_of_a_run_is_known_by_its_options(recipe: str) -> None:
    options = tracking.flat(training.FORMS[recipe].about.options())
    assert runs.recipe_of({"options": options}) == recipe
    assert runs.recipe_of({}) is None


@pytest.mark.parametrize(
    "name", ["../../secret.json", "/etc/passwd", "link.json", "run.lock", "samples", "nothing.mp4", ""]
)
def test_only_the_runs_own_files_are_given(app: Any, place: Path, name: str) -> None:
    (place / "outputs/a/run.lock").write_text("x")
    assert call(app, f"/api/run/file?run=outputs/a&name={name}")[0] == 400
    assert call(app, "/api/run/file?run=outputs/a&name=samples/step-0000010/01.mp4")[2] == b"film"


@pytest.mark.parametrize("run", ["outputs", "..", "/", "outputs/b", "outputs/a/../../..", ""])
def test_only_folders_of_runs_are_runs(app: Any, run: str) -> None:
    status, _, body = call(app, f"/api/run?run={run}")
    assert (status, "there is no such run" in json.loads(body)["error"]) == (400, True)


def test_a_damaged_request_is_an_error_and_no_crash(app: Any) -> None:
    assert call(app, "/api/run")[0] == 400
    assert call(app, "/api/run/stop", method="POST", body=b"{", **{HEADER: "1"})[0] == 400
    assert post(app, "/api/train/start", {"recipe": "none", "values": {}})[0] == 400
    assert post(app, "/api/run/stop", {"run": "outputs/a"})[0] == 400
    assert "not a picture" in json.loads(call(app, "/api/upload?name=x.sh", method="POST", **{HEADER: "1"})[2])["error"]


def test_an_upload_is_kept_under_its_content(app: Any) -> None:
    found = [
        json.loads(call(app, f"/api/upload?name=../{n}.PNG", method="POST", body=b"12", **{HEADER: "1"})[2])
        for n in "ab"
    ]
    assert found[0] == found[1]
    assert Path(found[0]["path"]).parent == videos.GENERATED / videos.UPLOADS
    assert Path(found[0]["path"]).read_bytes() == b"12"


def test_a_resume_repeats_the_runs_own_command(place: Path) -> None:
    run = Path("outputs/a")
    assert runs.resume_words(run) == (["train", "--max-steps", "4000", "--lr", "0.1", "--resume", "auto"], 1, place)
    longer = runs.resume_words(run, "5000")[0]
    assert longer == ["train", "--lr", "0.1", "--max-steps", "5000", "--resume", "auto"]
    record = json.loads((run / "run.json").read_text())
    record["starts"][0]["command"] = ["train.py", "--mode", "train"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="Repeat it in a terminal"):
        runs.resume_words(run)


def test_a_resume_repeats_the_newest_start(place: Path) -> None:
    run = Path("outputs/a")
    (_made(run) / jobs.RECORD).write_text(json.dumps({"words": ["train", "--lr", "9"], "pid": 1, "cwd": str(place)}))
    assert "9" not in runs.resume_words(run)[0]  # a terminal has resumed it since
    (run / "run.json").unlink()
    assert runs.resume_words(run)[0] == ["train", "--lr", "9", "--resume", "auto"]


def test_a_resume_runs_where_the_run_was_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, record = place / "outputs/a", json.loads((place / "outputs/a/run.json").read_text())
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    with pytest.raises(ConfigError, match="--output-dir outputs/a, which is another folder"):
        runs.resume_words(run)  # not recorded, as by older versions
    record["starts"][0]["cwd"] = str(place)
    (run / "run.json").write_text(json.dumps(record))
    assert runs.resume_words(run)[2] == place
    started: list[Any] = []

    class Process:
        pid = 2**22 + 1  # no process has this number

        def __init__(self, words: Any, **given: Any) -> None:
            started.append(given["cwd"])

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("subprocess.Popen", Process)
    assert post(make_app([place / "outputs"], Access(TOKEN), PORT), "/api/run/resume", {"run": str(run)})[0] == 200
    assert started == [place]
    assert _job(run).cwd == str(place)
    moved = run.rename(place / "outputs/b")
    with pytest.raises(ConfigError, match="--output-dir outputs/a"):
        runs.resume_words(moved)  # it would begin another run in outputs/a


def test_folders_of_outputs_that_appear_later_are_listed(place: Path) -> None:
    app = make_app([], Access(TOKEN), PORT)
    (place / "outputs_b").mkdir()
    (place / "outputs_b" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    paths = {run["path"] for run in json.loads(call(app, "/api/runs")[2])["runs"]}
    assert paths == {"outputs/a", "outputs_b"}


def test_the_address_is_for_a_browser() -> None:
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    with pytest.raises(ConfigError, match=f"--port {port}: .* Pass another --port"):
        bind("127.0.0.1", port)
    bound.close()
    assert address_of("127.0.0.1", 80, token="a&b") == "http://127.0.0.1:80/?token=a%26b"
    assert address_of("::1", 80, token="t") == "http://[::1]:80/?token=t"
    assert address_of("0.0.0.0", 80, token="t") == f"http://{socket.gethostname()}:80/?token=t"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_printed_address_opens_the_page(
    place: Path, host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apps: list[Any] = []

    class Server:
        def __init__(self, config: Any) -> None:
            apps.append(config.app)

        def run(self, sockets: list[socket.socket]) -> None:
            sockets[0].close()

    monkeypatch.setattr("uvicorn.Server", Server)
    addresses = []
    for _ in range(2):
        assert main(["--host", host, "--port", "0"]) == 0
        addresses.append(capsys.readouterr().out.partition("http://")[2].split()[0])
    name, _, words = addresses[0].partition("/")
    assert call(apps[0], f"/{words}", cookie="", host=name)[0] == 303
    assert call(apps[0], "/", cookie="", host=name)[0] == 403
    assert call(apps[1], f"/{words}", cookie="", host=name)[0] == 403  # each start has its own token


def test_a_process_is_found_by_its_folder_and_start(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    pid = jobs.spawn([sys.executable, "-c", "print('hello'); input()"], _made(folder) / jobs.LOG)
    record = {"words": ["x"], "pid": pid, "created": jobs.created_at(pid), "host": socket.gethostname(), "started": "t"}
    (folder / jobs.JOB / jobs.RECORD).write_text(json.dumps(record))
    _wait(lambda: _state(folder) == "killed")  # the input is at its end; nobody wrote an exit code
    assert _job(folder).error().startswith("hello")
    own = record | {"pid": os.getpid(), "created": jobs.created_at(os.getpid())}
    for changed, state in (({}, "running"), ({"created": 1.0}, "killed"), ({"host": "elsewhere"}, "killed")):
        (folder / jobs.JOB / jobs.RECORD).write_text(json.dumps(own | changed))
        assert _state(folder) == state
    (folder / jobs.JOB / jobs.RECORD).write_text(json.dumps(own))
    with pytest.raises(ConfigError, match="a run is active there"):
        jobs.start(folder, ["train"])
    jobs.stop(folder)
    assert (folder / jobs.JOB / jobs.STOP).exists()


def _made(folder: Path) -> Path:
    (folder / jobs.JOB).mkdir(parents=True)
    return folder / jobs.JOB


def _job(folder: Path) -> jobs.Job:
    job = jobs.read_job(folder)
    assert job is not None
    return job


def _state(folder: Path) -> str:
    return _job(folder).state


def _wait(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_of_a_terminal_is_found_by_its_lock(place: Path) -> None:
    run = Path("outputs/a")
    reader = runs.RunReader()
    for host, later, state in ((socket.gethostname(), 5.0, "running"), ("elsewhere", 5.0, "stopped")):
        (run / LOCK).write_text(f"process {os.getpid()} on {host}\n")
        os.utime(run / LOCK, (time.time() + later,) * 2)
        assert runs.summary(run, reader)["state"] == state
    created = jobs.created_at(os.getpid())
    assert created is not None
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    os.utime(run / LOCK, (created - 60,) * 2)  # written before this process began: its number was used again
    assert runs.summary(run, reader)["state"] == "stopped"


def test_a_job_reports_progress_and_stops_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def work(words: list[str]) -> int:
        with Progress("working", "step", 10_000, show=False) as bar:
            console.show_picture(np.zeros((8, 8, 3), np.uint8))
            for _ in range(10_000):
                bar.update()
                if (tmp_path / jobs.STATUS).exists() and not seen:
                    seen.append(json.loads((tmp_path / jobs.STATUS).read_text()))
                    (tmp_path / jobs.STOP).touch()
                time.sleep(0.01)
        return 0

    monkeypatch.setattr(jobs, "dispatch", work)
    monkeypatch.setattr(jobs, "WRITE_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert jobs.main([str(tmp_path), "train", "--x"]) in jobs.STOPPED
    assert sys.argv == ["titans-video", "train", "--x"]
    assert seen[0]["progress"] | {"done": 0} == {"what": "working", "unit": "step", "done": 0, "total": 10_000}
    assert json.loads((tmp_path / jobs.STATUS).read_text())["code"] in jobs.STOPPED
    assert (tmp_path / jobs.PREVIEW).read_bytes()[:2] == b"\xff\xd8"
    assert not (tmp_path / jobs.STOP).exists()
    assert not console.is_observed()


def test_previews_do_not_change_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    class Album:
        def __init__(self) -> None:
            self.pictures: list[np.ndarray] = []

        def on_progress(self, progress: Progress) -> None:
            pass

        def on_picture(self, picture: np.ndarray) -> None:
            self.pictures.append(picture)

    model, album = tiny_model(), Album()
    monkeypatch.setattr(denoise, "PREVIEW_SECONDS", 0.0)
    options = GenerateOptions(prompt="a cat", num_frames=12, window=8, steps=3)
    request, _ = build_request(options, model)

    def generate() -> torch.Tensor:
        return torch.cat(list(long_video.plan_generation(model, request, options, None)[0](request)), dim=2)

    plain = generate()
    with console.observed(album):
        assert torch.equal(generate(), plain)
    assert len(album.pictures) == 6  # three steps of two windows
    assert {picture.shape for picture in album.pictures} == {(16, 24, 3)}
    assert all(picture.dtype == np.uint8 for picture in album.pictures)


def test_a_thread_for_stopping_ends_with_the_command() -> None:
    _wait(lambda: not any(thread.name == "stop" for thread in threading.enumerate()))


def test_the_history_has_no_logs_and_a_video_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        place = videos.GENERATED / name / jobs.JOB
        place.mkdir(parents=True)
        record = {"words": ["generate"], "pid": 2**22 + 1, "started": "t", "about": {"values": {"prompt": name}}}
        (place / jobs.RECORD).write_text(json.dumps(record))
        (place / jobs.LOG).write_text(f"Error: {name} went wrong.\n" + "x" * 50_000)
    app = make_app([], Access(TOKEN), PORT)
    listed = call(app, "/api/generate/list")[2]
    assert [video["prompt"] for video in json.loads(listed)["videos"]] == ["b", "a"]
    assert len(listed) < 1000
    shown = json.loads(call(app, "/api/generate/video?name=a")[2])
    assert shown["log"] == "x" * jobs.LOG_BYTES
    assert shown["values"] == {"prompt": "a"}


def test_a_browser_is_opened_with_a_code_that_works_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every user of a machine can read the command line of the browser."""
    opened: list[str] = []
    served: list[Access] = []
    monkeypatch.setattr("titans_video.cli.ui.webbrowser.open", opened.append)
    monkeypatch.setattr("titans_video.cli.ui.threading.Timer", lambda seconds, do: threading.Thread(target=do))
    monkeypatch.setattr(
        "titans_video.ui.server.serve", lambda roots, bound, access: (bound.close(), served.append(access))
    )
    assert main(["--open", "--port", "0"]) == 0
    for _ in range(1000):
        if opened:
            break
        time.sleep(0.01)
    (access,) = served
    path = "/?" + opened[0].partition("?")[2]
    assert access.token not in opened[0]
    app = make_app([], access, PORT)
    status, headers, _ = call(app, path, cookie="")
    assert (status, headers["location"]) == (303, "/")
    assert call(app, "/api/about", cookie=headers["set-cookie"].partition(";")[0])[0] == 200
    assert not caplog.messages
    assert call(app, path, cookie="")[0] == 403
    assert "used twice" in caplog.text
    monkeypatch.setattr("titans_video.access.CODE_SECONDS", -1.0)
    assert call(app, f"/?code={access.new_code()}", cookie="")[0] == 403
    assert call(app, "/?code=", cookie="")[0] == 403
