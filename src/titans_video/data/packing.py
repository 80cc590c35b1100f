"""Copy the clips of a manifest into tars in the form of WebDataset, their bytes unchanged.

A clip is a sample: its file, `.txt` with its caption, and `.json` with its rows. Beside each tar is its index, and
`manifest.jsonl` lists all rows in their order. What a tar contains is a function of the rows, the files' versions and
the shard size, so an interrupted pack continues with the first tar that is missing.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_video.config.options import DataOptions
from titans_video.console import Progress
from titans_video.data.manifest import Row, read_rows, split_weight
from titans_video.data.tar_rows import ROW
from titans_video.errors import ConfigError, DataError, WriteError
from titans_video.files import atomic_path, make_folder, write_text
from titans_video.media.failures import UnreadableMedia
from titans_video.parsing import Malformed, parse_json
from titans_video.storage.ahead import fetched_ahead, stamps
from titans_video.storage.fetching import Facts
from titans_video.storage.files import INDEX, in_use, open_file, stamp, status, use_remote_cache
from titans_video.storage.places import is_remote, shown
from titans_video.storage.tars import members

VERSION = 1
MANIFEST, LEFT_OUT = "manifest.jsonl", "left_out.jsonl"
_PADDING = 4 * tarfile.BLOCKSIZE  # headers and padding of a sample, about


@dataclass
class _Clip:
    """A clip with its rows: member names by path, in order, and the facts of these files."""

    number: int
    rows: list[Row] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(facts.size + _PADDING for facts in self.facts.values())

    def add(self, row: Row, known: dict[str, Facts]) -> None:
        self.rows.append(row)
        for path, kind in ((row.video, ""), (row.cond_image, f".image{len(self.names)}")):
            if path is not None and str(path) not in self.names:
                self.names[str(path)] = f"{self.number:09d}{kind}{Path(shown(path)).suffix}"
                self.facts[str(path)] = known[str(path)]

    def items(self) -> list[dict[str, Any]]:
        """Return the rows as a manifest beside the members has them."""
        return [_item(row, self.names) for row in self.rows]


@dataclass(frozen=True)
class Packed:
    """The result: the manifest, the number of tars and rows, and the rows that were left out, as JSON objects."""

    manifest: Path
    shards: int
    rows: int
    left_out: list[dict[str, str]]


def pack(options: DataOptions, out: Path, shard_size: int) -> Packed:
    """Copy all rows of the manifests into tars of about `shard_size` bytes in a folder.

    Rows whose files cannot be had are listed in `left_out.jsonl`.

    Raises:
        ConfigError: the folder has the tars of another pack.
        DataError: a manifest is wrong, no clip can be had, or a file changes meanwhile.
        WriteError: the folder cannot be written.
    """
    _refuse_sources(options, out)
    use_remote_cache(options.remote_cache, options.remote_cache_size)
    rows = list(read_rows(options))
    known = _known(rows)
    clips, left_out = _clips(rows, known)
    if not clips:
        raise DataError(f"No clip of {len(rows)} rows can be had. The first: {left_out[0]['detail']}")
    shards = _divide(clips, shard_size)
    names = [f"{number:06d}.tar" for number in range(len(shards))]
    make_folder(out)
    done = [_is_done(out / name, shard) for name, shard in zip(names, shards, strict=True)]
    _refuse_others(out, names)
    lines: dict[str, dict[str, Any]] = {}
    with Progress("packing", "clip", len(clips)) as bar:
        for name, shard, is_done in zip(names, shards, done, strict=True):
            lost = _lost_of(out / name) if is_done else _write(out / name, shard, bar)
            if is_done:
                bar.update(len(shard))
            gone = {entry["id"] for entry in lost}
            left_out += lost
            for item in (item for clip in shard for item in clip.items() if item["id"] not in gone):
                places = {key: f"{name}/{item[key]}" for key in ("video", "cond_image") if key in item}
                lines[item["id"]] = item | places
    kept = [lines[row.id] for row in rows if row.id in lines]
    write_text(out / LEFT_OUT, _json_lines(left_out))
    write_text(out / MANIFEST, _json_lines(kept))
    return Packed(out / MANIFEST, len(shards), len(kept), left_out)


def _refuse_sources(options: DataOptions, out: Path) -> None:
    """Raise ConfigError if the manifest of the tars would replace one that is read, or that is not of a pack."""
    made = out / MANIFEST
    sources = [split_weight(text)[0] for text in (*options.manifest, *filter(None, [options.metadata]))]
    if any(not is_remote(str(path)) and Path(path).resolve() in (made.resolve(), out.resolve()) for path in sources):
        raise ConfigError(f"--out {out}: its {MANIFEST} is read by this command. Give another folder.")
    if made.exists() and not any(out.glob("*.tar")):
        raise ConfigError(f"--out {out}: it already has a {MANIFEST}, and no tars. Give another folder.")


def _json_lines(items: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def _item(row: Row, names: dict[str, str]) -> dict[str, Any]:
    item: dict[str, Any] = {"video": names[str(row.video)], "caption": row.caption, "task": row.task, "id": row.id}
    if row.cond_image is not None:
        item["cond_image"] = names[str(row.cond_image)]
    defaults = {"start": 0.0, "end": None, "fps": None, "weight": 1.0, "cond_frames": None}
    return item | {key: getattr(row, key) for key, usual in defaults.items() if getattr(row, key) != usual}


def _known(rows: Sequence[Row]) -> dict[str, Facts]:
    paths = [str(path) for row in rows for path in (row.video, row.cond_image) if path is not None]
    known = dict(stamps(paths, progress=True))
    for path in paths:
        if not is_remote(path) and path not in known:
            known[path] = stamp(path)
    return {path: facts for path, facts in known.items() if facts.size > 0}


def _clips(rows: Sequence[Row], known: dict[str, Facts]) -> tuple[list[_Clip], list[dict[str, str]]]:
    """Return the clips in the order of their first rows, and the rows whose files are missing."""
    clips: dict[str, _Clip] = {}
    left_out = []
    for row in rows:
        missing = [p for p in (row.video, row.cond_image) if p is not None and str(p) not in known]
        if missing:
            left_out.append(_entry(row, _reason(missing[0])))
        else:
            clips.setdefault(str(row.video), _Clip(len(clips))).add(row, known)
    return list(clips.values()), left_out


def _reason(path: Path) -> UnreadableMedia:
    try:
        return UnreadableMedia("empty-file" if status(path).size == 0 else "unreachable", path, "it has no bytes.")
    except UnreadableMedia as e:
        return e
    except OSError as e:
        return UnreadableMedia("missing", path, f"{e.strerror or e}.")


def _entry(row: Row, error: UnreadableMedia) -> dict[str, str]:
    return {"id": row.id, "where": row.where(), "reason": error.reason, "detail": str(error)}


def _divide(clips: Sequence[_Clip], shard_size: int) -> list[list[_Clip]]:
    shards: list[list[_Clip]] = [[]]
    size = 0
    for clip in clips:
        if shards[-1] and size + clip.size > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(clip)
        size += clip.size
    return shards


def _plan(shard: Sequence[_Clip]) -> str:
    """Return a hash of all that the bytes of a tar depend on."""
    digest = hashlib.sha256(str(VERSION).encode())
    for clip in shard:
        digest.update(repr((clip.number, clip.items(), clip.facts)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _index(tar: Path) -> Path:
    return tar.with_name(tar.name + INDEX)


def _read_index(tar: Path) -> dict[str, Any]:
    try:
        found = parse_json(_index(tar).read_bytes())
    except (OSError, Malformed):
        return {}
    return found if isinstance(found, dict) else {}


def _is_done(tar: Path, shard: Sequence[_Clip]) -> bool:
    """Check whether a tar is complete; ConfigError if it is not of this pack."""
    if not tar.exists():
        return False
    index = _read_index(tar)
    if index.get("plan") != _plan(shard) or index.get("tar_bytes") != tar.stat().st_size:
        raise ConfigError(
            f"{tar} is the tar of other rows, of clips that have changed since, or of another --shard-size. Delete it "
            "and the files beside it, or choose another --out."
        )
    return True


def _refuse_others(out: Path, names: Sequence[str]) -> None:
    others = sorted(path.name for path in out.glob("*.tar") if path.name not in names)
    if others:
        raise ConfigError(f"{out} has a tar of another pack, {others[0]}. Choose another --out.")


def _lost_of(tar: Path) -> list[dict[str, str]]:
    found = _read_index(tar).get("left_out", [])
    return [entry for entry in found if isinstance(entry, dict) and "id" in entry]


def _write(path: Path, shard: Sequence[_Clip], bar: Progress) -> list[dict[str, str]]:
    """Write a tar, and its index before the tar gets its name; return the rows that were left out."""
    lost: list[dict[str, str]] = []
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file, tarfile.TarFile(fileobj=file, mode="w") as tar:
            for clip in fetched_ahead(shard, lambda c: ((Path(p), facts) for p, facts in c.facts.items())):
                try:
                    for name, size, source in _members(clip):
                        tar.addfile(_header(name, size), source)
                except UnreadableMedia as e:
                    lost += [_entry(row, e) for row in clip.rows]
                bar.update()
        with temporary.open("rb", buffering=0) as raw:
            entries = [list(member) for member in members(raw)]  # type: ignore[arg-type]
        facts = {"tar_bytes": temporary.stat().st_size, "plan": _plan(shard), "members": entries, "left_out": lost}
        write_text(_index(path), json.dumps(facts))
    return lost


def _members(clip: _Clip) -> Iterator[tuple[str, int, Any]]:
    """Yield the name, size and content of each member of a sample.

    Raises:
        UnreadableMedia: a remote file cannot be fetched; before the first member.
        DataError: a file has changed since the sizes were looked up.
    """
    paths = [Path(path) for path in clip.facts]
    for path in paths:
        try:
            with in_use(path, clip.facts[str(path)]), open_file(path) as source:
                source.read(1)
        except WriteError:  # of the copy of a remote file
            raise
        except OSError as e:
            raise UnreadableMedia("no-permission", path, f"{e.strerror or e}.") from None
    for path in paths:
        facts = clip.facts[str(path)]
        with in_use(path, facts), open_file(path) as source:
            yield clip.names[str(path)], facts.size, source
            if source.read(1) or status(path) != facts:
                raise DataError(f"{shown(path)} was changed while it was packed. Start the command again.")
    caption = next((row.caption for row in clip.rows if row.caption), "")
    texts = {".txt": caption} if caption else {}
    about: dict[str, Any] = {"caption": caption, ROW: clip.items()}
    for ending, text in (texts | {".json": json.dumps(about, ensure_ascii=False)}).items():
        data = text.encode("utf-8", "surrogatepass")
        yield f"{clip.number:09d}{ending}", len(data), io.BytesIO(data)


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    return header
