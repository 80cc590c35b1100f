"""The server of the page: its files, and the calls with which it reads runs and starts commands."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.cookies import CookieError, SimpleCookie
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from titans_video import __version__
from titans_video.access import Access
from titans_video.errors import ConfigError, DataError, UserError
from titans_video.parsing import Malformed, parse_json
from titans_video.ui import data, jobs, training, videos

if TYPE_CHECKING:
    from titans_video.ui.runs import RunReader

SERVED = {".mp4", ".gif", ".png", ".jpg", ".json", ".html", ".safetensors", ".yaml", ".jsonl"}
"""Kinds of files of a run that the page may load."""

FRAMED = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
"""Policy of a report, whose texts come from data that somebody else may have written."""

MOST_BODY_BYTES = 2**20

HEADER = "x-titans-video"
"""Header of every request that changes something. Browsers do not let another site's page set it."""

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
FORBIDDEN = "Open the address that `titans-video ui` printed: it has a token."


@dataclass
class Pages:
    """The state of the server: where runs are, and what was read of them."""

    roots: list[Path]
    """Empty: all folders whose names begin with `outputs`."""
    started: list[Path] = field(default_factory=list)
    """Runs that the page started, which may be outside the roots."""
    planning: threading.Lock = field(default_factory=threading.Lock)
    """A plan takes seconds of all cores, so one is made at a time."""
    captions: data.Captions = field(default_factory=data.Captions)

    @cached_property
    def reader(self) -> "RunReader":
        from titans_video.ui.runs import RunReader

        return RunReader()

    def find(self) -> list[Path]:
        """Return the folders of all runs, the newest first."""
        from titans_video.ui.runs import find_runs

        return find_runs(self.places())

    def places(self) -> list[Path]:
        """Return the folders in which runs are looked for."""
        return [*(self.roots or [path for path in Path().glob("outputs*") if path.is_dir()]), *self.started]

    def run(self, name: Any) -> Path:
        """Return the folder of a run in the output folders; ConfigError for any other."""
        from titans_video.ui.runs import is_run

        folder = Path(str(name))
        places = [place.resolve() for place in self.places()]
        if not any(folder.resolve().is_relative_to(place) for place in places) or not is_run(folder):
            raise ConfigError(f"{folder}: there is no such run.")
        return folder

    def file(self, folder: Path, name: str) -> Response:
        """Return a file of a folder; nothing outside it, whatever the name or a link says."""
        path = folder / name
        inside = path.resolve().is_relative_to(folder.resolve())
        if not inside or path.suffix.lower() not in SERVED or not path.is_file():
            raise ConfigError(f"{name}: there is no such file.")
        headers = {"cache-control": "no-cache"}
        if path.suffix == ".html":
            headers["content-security-policy"] = FRAMED
        return FileResponse(path, headers=headers)


Call = Callable[[Pages, dict[str, Any]], Any]
"""Answer a call of the page: plain values in, plain values or a response out. It runs in a thread."""


def list_runs(pages: Pages, given: dict[str, Any]) -> Any:
    from titans_video.ui.runs import summary

    return {"runs": [summary(folder, pages.reader) for folder in pages.find()]}


def show_run(pages: Pages, given: dict[str, Any]) -> Any:
    from titans_video.ui.runs import details

    return details(pages.run(given["run"]), pages.reader)


def show_curves(pages: Pages, given: dict[str, Any]) -> Any:
    from titans_video.ui.runs import curves

    return curves(pages.run(given["run"]), pages.reader)


def run_file(pages: Pages, given: dict[str, Any]) -> Any:
    return pages.file(pages.run(given["run"]), given["name"])


def stop_run(pages: Pages, given: dict[str, Any]) -> Any:
    jobs.stop(pages.run(given["run"]))
    return {}


def resume_run(pages: Pages, given: dict[str, Any]) -> Any:
    from titans_video.ui.runs import resume_words

    folder = pages.run(given["run"])
    words, processes, cwd = resume_words(folder, given.get("max_steps"))
    jobs.start(folder, words, processes=processes, cwd=cwd)
    return {"run": folder.as_posix()}


def generate_form(pages: Pages, given: dict[str, Any]) -> Any:
    return {"groups": videos.form()}


def list_models(pages: Pages, given: dict[str, Any]) -> Any:
    return {"models": videos.models(pages.find())}


def explain_generate(pages: Pages, given: dict[str, Any]) -> Any:
    return videos.FORM.explain({k: v for k, v in given["values"].items() if v.strip()})


def start_generate(pages: Pages, given: dict[str, Any]) -> Any:
    return {"name": videos.start(given["values"])}


def list_videos(pages: Pages, given: dict[str, Any]) -> Any:
    return {"videos": videos.history()}


def _generated(name: Any) -> Path:
    folder = videos.GENERATED / Path(str(name)).name
    if jobs.read_job(folder) is None:
        raise ConfigError(f"{folder}: there is no such video.")
    return folder


def show_video(pages: Pages, given: dict[str, Any]) -> Any:
    return videos.read_video(_generated(given["name"]))


def video_file(pages: Pages, given: dict[str, Any]) -> Any:
    return pages.file(_generated(given["video"]), given["name"])


def stop_video(pages: Pages, given: dict[str, Any]) -> Any:
    jobs.stop(_generated(given["name"]))
    return {}


def list_recipes(pages: Pages, given: dict[str, Any]) -> Any:
    return {"recipes": training.recipes()}


def train_form(pages: Pages, given: dict[str, Any]) -> Any:
    return training.fields(given["recipe"], given.get("preset") or None)


def explain_train(pages: Pages, given: dict[str, Any]) -> Any:
    return training.explain(given["recipe"], given.get("preset") or None, given["values"])


def plan_train(pages: Pages, given: dict[str, Any]) -> Any:
    words = given["recipe"], given.get("preset") or None, given["values"], given["gpus"], given["gpu_memory"]
    with pages.planning:
        try:
            return training.plan(*words)
        except UserError as e:  # an unfinished form, which is no failure of the request
            return {"error": str(e)}


def start_train(pages: Pages, given: dict[str, Any]) -> Any:
    folder = training.start(
        given["recipe"], given.get("preset") or None, given["values"], int(given.get("processes", 1))
    )
    pages.started.append(folder)
    return {"run": folder.as_posix()}


def data_form(pages: Pages, given: dict[str, Any]) -> Any:
    return {"groups": data.form(), "checks": data.checks()}


def explain_check(pages: Pages, given: dict[str, Any]) -> Any:
    return data.FORM.explain({k: v for k, v in given["values"].items() if v.strip()})


def start_check(pages: Pages, given: dict[str, Any]) -> Any:
    return {"name": data.start(given["values"])}


def show_check(pages: Pages, given: dict[str, Any]) -> Any:
    return data.show(given["name"])


def stop_check(pages: Pages, given: dict[str, Any]) -> Any:
    jobs.stop(data.folder_of(given["name"]))
    return {}


def check_file(pages: Pages, given: dict[str, Any]) -> Any:
    return pages.file(data.folder_of(given["check"]), given["name"])


def list_captions(pages: Pages, given: dict[str, Any]) -> Any:
    return pages.captions.page(given)


def save_caption(pages: Pages, given: dict[str, Any]) -> Any:
    return pages.captions.save(given)


def caption_strip(pages: Pages, given: dict[str, Any]) -> Any:
    try:
        strip = pages.captions.of(given["manifest"], given.get("root")).strip(given["key"])
    except DataError:  # a row that is left out; the list of those has the reason
        return Response(data.NO_STRIP, media_type="image/svg+xml")
    return Response(strip, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


READING: dict[str, Call] = {
    "runs": list_runs,
    "run": show_run,
    "run/curves": show_curves,
    "run/file": run_file,
    "train/recipes": list_recipes,
    "train/form": train_form,
    "data/form": data_form,
    "data/check": show_check,
    "data/file": check_file,
    "data/captions": list_captions,
    "data/strip": caption_strip,
    "generate/form": generate_form,
    "generate/models": list_models,
    "generate/list": list_videos,
    "generate/video": show_video,
    "generate/file": video_file,
}
"""Calls that change nothing, with their arguments in the address."""

CHANGING: dict[str, Call] = {
    "run/stop": stop_run,
    "run/resume": resume_run,
    "train/explain": explain_train,
    "train/plan": plan_train,
    "train/start": start_train,
    "data/explain": explain_check,
    "data/start": start_check,
    "data/stop": stop_check,
    "data/caption": save_caption,
    "generate/explain": explain_generate,
    "generate/start": start_generate,
    "generate/stop": stop_video,
}
"""Calls with their arguments as JSON."""


class Guard:
    """Answer only requests with the token, and keep the page from loading anything from elsewhere.

    Args:
        access: its token, or a code, is in the address of the first visit; then the token is in a cookie.
        port: names the cookie; browsers send the cookies of one port to all ports.
    """

    def __init__(self, app: ASGIApp, access: Access, port: int) -> None:
        self.app, self.access, self.cookie = app, access, f"titans-video-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                extra = {b"content-security-policy": POLICY.encode(), b"x-content-type-options": b"nosniff"}
                extra |= {b"referrer-policy": b"no-referrer"}
                message["headers"] = [*message["headers"], *((k, v) for k, v in extra.items() if k not in names)]
            await send(message)

        await self.app(scope, receive, with_policy)

    def _refuse(self, scope: Scope) -> Response | None:
        """Return the answer to a request that must not reach the page."""
        headers, given = Headers(scope=scope), QueryParams(scope["query_string"])
        host = headers.get("host", "")
        if not self.access.names_server(host):
            return PlainTextResponse("This server only answers on 127.0.0.1 and localhost.", 403)
        if self.access.has_token(given.get("token")) or self.access.take_code(given.get("code")):
            answer: Response = RedirectResponse(scope["path"] or "/", 303)
            answer.set_cookie(self.cookie, self.access.token, httponly=True, samesite="strict", max_age=30 * 86400)
            return answer
        if not self.access.has_token(self._cookie(headers)):
            return PlainTextResponse(FORBIDDEN, 403)
        foreign = self.access.is_foreign(headers.get("origin"), host)
        if scope["method"] not in ("GET", "HEAD") and (foreign or headers.get(HEADER) is None):
            return PlainTextResponse("This request does not come from the page.", 403)
        return None

    def _cookie(self, headers: Headers) -> str:
        cookies = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return ""
        found = cookies.get(self.cookie)
        return found.value if found else ""


def make_app(roots: list[Path], access: Access, port: int) -> Any:
    """Return the ASGI application, see `Guard`."""
    pages = Pages(roots)
    assets = Path(str(files("titans_video"))) / "assets" / "ui"
    routes: list[Any] = [Route("/", lambda request: _page(assets / "index.html"))]
    routes += [Route(f"/api/{n}", partial(_read, pages, call)) for n, call in READING.items()]
    routes += [
        Route(f"/api/{name}", partial(_change, pages, call), methods=["POST"]) for name, call in CHANGING.items()
    ]
    routes += [Route("/api/about", _about), Route("/api/upload", _upload, methods=["POST"])]
    routes += [Mount("/ui", StaticFiles(directory=assets))]
    return Guard(Starlette(routes=routes), access, port)


def _page(path: Path) -> Response:
    return FileResponse(path, headers={"cache-control": "no-cache"})


async def _about(request: Request) -> Response:
    return JSONResponse({"version": __version__, "folder": str(Path.cwd())})


async def _read(pages: Pages, call: Call, request: Request) -> Response:
    return await _answer(pages, call, dict(request.query_params))


async def _change(pages: Pages, call: Call, request: Request) -> Response:
    try:
        given = parse_json(await _body(request, MOST_BODY_BYTES) or b"{}")
    except (Malformed, ConfigError) as e:
        return _refused(f"The request cannot be read: {e}")
    return await _answer(pages, call, given if isinstance(given, dict) else {})


async def _answer(pages: Pages, call: Call, given: dict[str, Any]) -> Response:
    """Call in a thread; a user's error is an answer with its message, and the flag that it names."""
    try:
        found = await run_in_threadpool(call, pages, given)
    except UserError as e:
        return _refused(str(e))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        return _refused(f"The request is incomplete: {type(e).__name__} {e}.")
    return found if isinstance(found, Response) else JSONResponse(found)


def _refused(message: str) -> Response:
    return JSONResponse({"error": message}, 400)


async def _upload(request: Request) -> Response:
    try:
        body = await _body(request, videos.MOST_UPLOAD_BYTES)
        path = await run_in_threadpool(videos.upload, request.query_params.get("name", ""), body)
    except UserError as e:
        return _refused(str(e))
    return JSONResponse({"path": path})


async def _body(request: Request, most: int) -> bytes:
    """Return the body of a request; ConfigError if it is longer than `most`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise ConfigError(f"The file is larger than {most // 2**20} MiB.")
    return bytes(body)


def serve(roots: list[Path], bound: socket.socket, access: Access) -> None:
    """Answer requests until Ctrl-C."""
    import uvicorn

    # Reading runs imports torch, which takes seconds; the page is there at once.
    threading.Thread(target=import_module, args=["titans_video.ui.runs"], daemon=True).start()
    app = make_app(roots, access, bound.getsockname()[1])
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[bound])
