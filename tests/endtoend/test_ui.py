"""The page in headless Chromium: check data, train, watch, stop, resume and generate, on a desktop and on a phone.

The server is a thread of this process, and the commands that it starts are real processes. Chromium is not installed by
the tests: set $CHROMIUM to its path if it is not found.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.conftest import REPOSITORY
from titans_video.access import Access
from titans_video.cli.ui import address_of, bind
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.mock.analyse import analyse
from titans_video.mock.dataset import make_dataset
from titans_video.ui import jobs, runs, videos
from titans_video.ui.server import make_app

playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
CLIPS = 24
SECONDS = 600
"""Time limit of each wait; CI is slower than any browser's default."""
PAGES = ("data", "train", "runs", "generate")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it, or set CHROMIUM to its path")


@dataclass
class Site:
    """A server and a browser: `errors` are the console's, `requests` all addresses that the pages asked for."""

    base: str
    address: str
    folder: Path
    browser: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, page: str, width: int = 1280, scheme: str = "light") -> Any:
        context = self.browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab = context.new_page()
        tab.set_default_timeout(SECONDS * 1000)
        tab.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.goto(f"{self.address}#/{page}")
        tab.wait_for_selector("#page h1")
        return tab


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A working folder with clips, of which one is broken, and the page in a browser."""
    folder = tmp_path_factory.mktemp("site")
    manifest = make_dataset(folder / "clips", clips=CLIPS, progress=False)
    (manifest.parent / "videos" / "broken.mp4").write_bytes(b"no video")
    with manifest.open("a") as f:
        f.write(json.dumps({"video": "videos/broken.mp4", "caption": "nothing"}) + "\n")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    children: list[BaseProcess] = []

    def fork(program: Sequence[str], log: Path, cwd: Path | None = None) -> int:
        for name in ("stdout", "stderr"):
            (log.parent / name).unlink(missing_ok=True)
            (log.parent / name).symlink_to(log.name)
        words = (list(program[1:]), str(cwd or folder), {**os.environ, **processes.ONE_THREAD}, str(log.parent))
        child = processes.server().Process(target=processes.execute, args=words)
        child.start()
        children.append(child)
        assert child.pid is not None
        return child.pid

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(jobs, "spawn", fork)
        bound = bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        app = make_app([Path("outputs")], Access("a-token"), port)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM)
            yield Site(f"http://127.0.0.1:{port}/", address_of("127.0.0.1", port, token="a-token"), folder, browser)
            browser.close()
        server.should_exit = True
        thread.join()
        for child in children:
            child.kill()


def until(reached: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def plays(tab: Any, selector: str) -> bool:
    """Whether the browser has decoded a frame of a video."""
    return bool(tab.locator(selector).first.evaluate("video => video.readyState >= 2"))


def command_of(tab: Any) -> str:
    return str(tab.locator(".code pre").first.text_content())


def test_a_data_set_is_checked(site: Site) -> None:
    tab = site.open("data")
    tab.fill("#field-manifest", "clips/manifest.jsonl")
    tab.fill("#field-height", "32")
    tab.fill("#field-width", "32")
    tab.fill("#field-num_frames", "8")
    tab.click("button:has-text('Check')")
    tab.wait_for_selector(".stats")
    numbers = dict(
        zip(tab.locator(".stats dt").all_text_contents(), tab.locator(".stats dd").all_text_contents(), strict=True)
    )
    assert (numbers["Usable"], numbers["Left out"]) == (str(CLIPS), "1")
    row = tab.locator("tr", has_text="broken.mp4")
    assert f"line {CLIPS + 1}" in row.text_content()
    before = Path("clips/manifest.jsonl").read_text().splitlines()
    tab.click("button:has-text('Captions')")
    first = tab.locator(".clip").first
    until(lambda: first.locator("img").evaluate("strip => strip.naturalWidth > 0"))
    assert first.locator("textarea").input_value() == json.loads(before[0])["caption"]
    first.locator("textarea").fill("a shape that I describe")
    first.locator("button:has-text('Save')").click()
    tab.wait_for_selector(".toast:has-text('Saved in the manifest.')")
    after = Path("clips/manifest.jsonl").read_text().splitlines()
    assert json.loads(after[0])["caption"] == "a shape that I describe"
    assert after[1:] == before[1:]
    tab.click("button:has-text('Report')")
    report = tab.frame_locator("iframe.report")
    assert "Data report" in report.locator("h1").text_content()
    tab.context.close()


def test_a_training_starts_stops_and_resumes(site: Site) -> None:
    tab = site.open("train")
    tab.select_option("#preset", label="tiny")
    until(lambda: tab.get_attribute("#field-batch_size", "placeholder") == "32")
    tab.fill("#field-manifest", "clips/manifest.jsonl")
    tab.click("summary:has-text('All options')")
    small = {
        "model_dim": "24",
        "depth": "1",
        "heads": "2",
        "batch_size": "4",
        "validate_every": "20",
        "sample_steps": "2",
    }
    for name, value in small.items():
        tab.fill(f"#field-{name}", value)
    tab.fill("#field-lr", "0")
    tab.wait_for_selector("text=--lr 0: it must be above 0.")
    assert tab.locator("[data-name=lr].wrong").count() == 1
    tab.fill("#field-lr", "")
    tab.wait_for_selector("text=--lr 0: it must be above 0.", state="hidden")
    assert "--config configs/sora/tiny.yaml" in command_of(tab)
    assert "--model-dim 24" in command_of(tab)
    tab.wait_for_selector("text=It fits.")
    tab.click("button:has-text('YAML')")
    assert "model_dim: 24" in command_of(tab)
    tab.click("button:has-text('Start training')")
    tab.wait_for_selector("text=Stop")

    def shown(name: str) -> str:
        return str(tab.locator(".stats div", has_text=name).first.locator("dd").text_content())

    until(lambda: shown("Step").split()[0] not in ("0", "") and shown("Loss") != "–")
    first = shown("Loss")
    until(lambda: shown("Loss") != first)
    tab.wait_for_selector(".chart polyline")
    tab.wait_for_selector("figure.shot video")
    until(lambda: plays(tab, "figure.shot video"))
    run = Path("outputs/sora-1")
    assert runs.summary(run, runs.RunReader())["state"] == "running"  # a server that starts now finds it
    tab.click("button:has-text('Stop')")
    tab.wait_for_selector(".badge.stopped")
    stopped = last_step(run)
    assert [path.name for path in run.glob("checkpoint-*")][-1] == f"checkpoint-{stopped}"
    tab.click("button:has-text('Resume')")
    tab.wait_for_selector(".badge.running")
    until(lambda: last_step(run) > stopped)
    tab.click("button:has-text('Stop')")
    tab.wait_for_selector(".badge.stopped")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, steps[-1] + 1))
    assert not list(run.glob("previous-*"))
    tab.context.close()


def last_step(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def test_a_video_shows_what_the_prompt_says(site: Site) -> None:
    tab = site.open("generate")
    tab.fill("#field-prompt", "a blue square moving up")
    tab.click("button:has-text('Generate')")
    tab.wait_for_selector(".player a:has-text('Download')")
    until(lambda: plays(tab, ".player video"))
    (video,) = videos.history()
    path = videos.GENERATED / video["name"] / video["videos"][0]
    info = probe(path)
    found = analyse(read_indices(path, info, range(info.frames)))
    assert (found.colour, found.shape, found.direction) == ("blue", "square", "up")
    details = videos.read_video(videos.GENERATED / video["name"])
    assert details is not None
    assert details["settings"]["prompt"] == "a blue square moving up"
    assert (videos.GENERATED / video["name"] / jobs.JOB / "preview.jpg").is_file()
    tab.fill("#field-prompt", "")
    tab.click("button:has-text('Use these settings')")
    assert tab.input_value("#field-prompt") == "a blue square moving up"
    with tab.expect_download() as download:
        tab.click(".player a:has-text('Download')")
    assert download.value.path().read_bytes() == path.read_bytes()
    tab.context.close()


def test_progress_does_not_draw_the_history_again(site: Site) -> None:
    folder = videos.GENERATED / "99990101-000000-running"  # the newest
    (folder / jobs.JOB).mkdir(parents=True)
    own = {"pid": os.getpid(), "created": jobs.created_at(os.getpid()), "host": socket.gethostname()}
    record = {"words": ["generate"], "started": "t", "about": {"values": {"prompt": "x"}}, **own}
    (folder / jobs.JOB / jobs.RECORD).write_text(json.dumps(record))

    def progress(done: int) -> None:
        task = {"what": "denoising", "unit": "step", "done": done, "total": 9}
        (folder / jobs.JOB / jobs.STATUS).write_text(json.dumps({"code": None, "progress": task}))

    try:
        progress(1)
        tab = site.open("generate")
        tab.wait_for_selector(".player:has-text('1 of 9')")
        tab.locator(".history button").first.evaluate("button => button.dataset.same = 'yes'")
        progress(2)
        tab.wait_for_selector(".player:has-text('2 of 9')")
        tab.wait_for_timeout(1500)
        assert tab.locator(".history button").first.get_attribute("data-same") == "yes"
        tab.context.close()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_every_page_fits_the_screen(site: Site, width: int, scheme: str) -> None:
    folder = os.environ.get("UI_SCREENSHOTS")
    for page in (*PAGES, "run?path=outputs/sora-1"):
        tab = site.open(page, width, scheme)
        tab.wait_for_load_state("networkidle")
        assert tab.locator("html").evaluate("page => page.scrollWidth") <= width
        tab.click("#theme")
        tab.click("#theme")
        if folder:
            tab.wait_for_timeout(2000)
            tab.screenshot(path=Path(folder, f"{page.partition('?')[0]}-{width}.png"), full_page=True)
        tab.context.close()


def test_nothing_is_loaded_from_elsewhere(site: Site) -> None:
    assert len(site.requests) > 20
    assert [url for url in site.requests if not url.startswith((site.base, "data:", "blob:"))] == []
    assert site.errors == []
