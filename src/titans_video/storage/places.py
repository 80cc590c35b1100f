"""Paths of files that are not plain local files: URLs, and members of tars.

Both are written as a `Path`, so that everything which passes paths on works for them too. A URL `s3://bucket/a.mp4` is
`Path("s3:/bucket/a.mp4")`. A member is a path through its tar, as if the tar were a folder: `shards/0001.tar/a.mp4`.
"""

import os
import re
from pathlib import Path

SCHEMES = ("s3", "https", "http", "hf")
"""The beginnings of URLs that are read."""
_URL = re.compile(r"(?i)([a-z][a-z0-9+.-]+)://+(.*)", re.DOTALL)
_REMOTE = re.compile(rf"({'|'.join(SCHEMES)}):[/\\]")
TAR = ".tar"


def scheme_of(text: str) -> str | None:
    """Return the scheme of a URL that is read, in lower case; None for every other text."""
    found = _URL.match(text)
    scheme = found[1].lower() if found else None
    return scheme if scheme in SCHEMES else None


def place(text: str) -> Path:
    """Return the path of a file that a user names by its path or its URL.

    Raises:
        ValueError: it is a URL that a path cannot represent, with the explanation.
    """
    scheme = scheme_of(text)
    if scheme is None:
        return Path(text)
    rest = text.partition("://")[2]
    path = Path(f"{scheme}:/{rest}")
    if url_of(path) != f"{scheme}://{rest}" or any(part == ".." for part in path.parts):
        raise ValueError("the URL must have no empty, `.` or `..` part; write %2F for a slash that belongs to a name")
    return path


def is_remote(path: Path | str) -> bool:
    """Check whether a path stands for a URL."""
    return _REMOTE.match(str(path)) is not None


def url_of(path: Path | str) -> str:
    """Return the URL of a remote path; `place` is the inverse."""
    text = str(path).replace("\\", "/") if os.sep == "\\" else str(path)
    scheme, _, rest = text.partition(":/")
    return f"{scheme}://{rest}"


def shown(path: Path | str) -> str:
    """Return a path as a user writes it: the URL of a remote one, without the secrets of its query."""
    return url_of(path).partition("?")[0] if is_remote(path) else str(path)


def split_tar(path: Path | str) -> tuple[Path, str] | None:
    """Return the tar that a path leads through and the member's name; None for every other path.

    Locally, a folder with the name of a tar is a folder. On a server, whatever is named `*.tar` is a tar.
    """
    text = str(path)
    if TAR not in text.lower():
        return None
    whole = Path(path)
    for tar in whole.parents:  # the innermost one first
        if tar.suffix.lower() == TAR and (is_remote(text) or tar.is_file()):
            return tar, whole.relative_to(tar).as_posix()
    return None


def is_plain(path: Path | str) -> bool:
    """Check whether a path is an ordinary local path."""
    return not is_remote(path) and split_tar(path) is None


def real_path(path: Path | str) -> str:
    """Return the path without symbolic links; a remote one is as it is."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def absolute_path(path: Path | str) -> Path:
    """Return the absolute path; a remote one is as it is."""
    return Path(path) if is_remote(path) else Path(os.path.abspath(path))
