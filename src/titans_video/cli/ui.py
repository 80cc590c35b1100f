"""`titans-video ui`: the web page."""

import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

from titans_video.config.fields import FolderPath, Metavar, Range
from titans_video.config.help import About
from titans_video.config.parse import parse
from titans_video.errors import ConfigError

NEEDED = ("starlette", "uvicorn")
"""Packages of the extra `ui`."""


@dataclass(frozen=True)
class UiFlags:
    """The address of the page, and the runs that it shows."""

    host: Annotated[str, Metavar("ADDRESS")] = "127.0.0.1"
    """Address to listen on. At another one than 127.0.0.1, other machines can connect."""
    port: Annotated[int, Range(least=0, most=65535)] = 8765
    """Port to listen on; 0: any free one."""
    token: str | None = None
    """Token of the page, without which nobody can open it (default: a new one at each start). Every user of this
    machine can read the one that you give, in the list of processes."""
    runs: tuple[FolderPath, ...] = ()
    """Folder in which runs are looked for (default: all folders whose names begin with outputs)."""
    open: bool = False
    """Open the page in your browser."""


UI = About(
    UiFlags,
    "Show a web page to look at data, to train, to watch runs and to generate videos.",
    (
        ("Serve the page for the browser of this machine", ""),
        ("Let other machines of your network open it, with the printed token", "--host 0.0.0.0 --port 9000"),
    ),
    notes="Trainings are processes of their own. They continue when you close the page or this command, and the page "
    "finds them again.\nEnd the command with Ctrl-C.",
)


def main(argv: Sequence[str], prog: str = "titans-video ui") -> int:
    """Serve the page until Ctrl-C; return the exit code."""
    flags = parse(UiFlags(), argv, prog=prog, about=UI)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing. Run `pip install -e '.[ui]'` in the repository.")
    bound = bind(flags.host, flags.port)
    from titans_video.access import Access, is_loopback
    from titans_video.ui import server

    access = Access(flags.token, local=is_loopback(flags.host))
    port = bound.getsockname()[1]
    address = address_of(flags.host, port, token=access.token)
    print(f"The page is at {address}\nPress Ctrl-C to end it. Trainings continue.", flush=True)
    if flags.open:
        threading.Timer(1.0, lambda: webbrowser.open(address_of(flags.host, port, code=access.new_code()))).start()
    server.serve(list(map(Path, flags.runs)), bound, access)
    return 0


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; ConfigError if the address is not one of this machine, or the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    if sys.platform != "win32":  # where it would let two servers share the port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as e:
        bound.close()
        raise ConfigError(
            f"--host {host} --port {port}: {e.strerror or e}. Pass another --port, or an address of this machine."
        ) from None
    bound.listen(128)
    return bound


def address_of(host: str, port: int, **given: str) -> str:
    """Return the address to open in a browser, with a token or a code."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/?{urlencode(given)}"
