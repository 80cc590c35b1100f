"""Every form of a data set as the rows of a manifest: manifests, tables, lists of finetrainers, and folders of clips.

A manifest in JSON is read as it is written. The other forms become the same rows, each with its origin.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from titans_video.config.options import DataOptions
from titans_video.data.caption_files import list_of, list_rows
from titans_video.data.folders import Item, import_folder
from titans_video.data.json_rows import RowError, json_rows
from titans_video.data.tables import is_table, read_table
from titans_video.data.tar_rows import is_tar_set, shards_of, tar_items
from titans_video.errors import DataError
from titans_video.storage.files import in_use, local_copy, open_file, stamp
from titans_video.storage.places import is_remote, place

Form = Literal["manifest", "table", "lists", "folder", "tars"]


def form_of(path: Path) -> Form:
    """Return the form of a data set by its path; a file whose form is not known is a manifest in JSON.

    Raises:
        DataError: the path is one of two lists, and the other is missing.
    """
    if path.is_dir():
        return "folder"
    if is_tar_set(path):
        return "tars"
    if is_table(path):
        return "table"
    if path.suffix.lower() == ".txt" and path.is_file():
        with path.open("rb") as f:
            is_json = f.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
        if not is_json and list_of(path) is not None:
            return "lists"
    return "manifest"


def root_of(path: Path, options: DataOptions) -> Path:
    """Return the folder that paths in a data set start at: `--data-root`, else the manifest's or the clips' folder."""
    if is_tar_set(path):  # the clips are in the tars
        return path.parent
    return place(options.data_root) if options.data_root else path if path.is_dir() else path.parent


def read_items(path: Path, options: DataOptions, *, unused: Path | None = None) -> tuple[Iterator[Item], list[str]]:
    """Return the rows of a data set, and notes about files that are not used.

    A row has a file and a line (see `folders.Item`), and is a parsed value that is not checked yet, or a `RowError`.

    Args:
        unused: a table in a folder that is not read.
    Raises:
        DataError: the data set is missing, cannot be read, or has no clips.
    """
    try:
        form = form_of(path)
        if form == "folder":
            keep = options.empty_captions == "keep"
            items, notes = import_folder(path, root_of(path, options), all_images=keep, unused=unused)
            return iter(items), notes
        if form == "tars":
            return tar_items(path)
        if is_remote(path):
            with local_copy(path) as copy:
                rows = iter(list(read_table(copy) if form == "table" else json_rows(copy.read_bytes())))
        elif form == "table":
            rows = read_table(path)
        elif form == "lists":
            pair = list_of(path)
            assert pair is not None, "it is a list"
            path, rows = pair[0], list_rows(*pair)
        else:
            rows = json_rows(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such manifest.") from None
    except DataError:
        raise
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: the manifest cannot be read: {getattr(e, 'strerror', None) or e}.") from None
    return ((str(path), line, row) for line, row in rows), []


def digest_of(path: Path, options: DataOptions) -> str:
    """Return the SHA-256 of a data set's content, but not of its clips; "" if it cannot be read twice."""
    form, digest = form_of(path), hashlib.sha256()
    if form in ("manifest", "table"):
        if not is_remote(path) and not path.is_file():
            return ""
        with in_use(path, latest=True), open_file(path) as f:
            return hashlib.file_digest(f, "sha256").hexdigest()  # type: ignore[arg-type]
    if form == "tars":
        shards = [str(shard) for shard in shards_of(path)]
        digest.update(repr([(shard, *stamp(shard)) for shard in shards]).encode())
        return digest.hexdigest()
    for file, line, row in read_items(path, options)[0]:
        if isinstance(row, RowError):
            return ""
        digest.update(f"{(file, line, row)!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
