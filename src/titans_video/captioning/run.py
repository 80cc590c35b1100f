"""`titans-video caption`: write captions for the rows of a manifest, and resume at any instant.

Each batch of captions is appended to a file beside the manifest and synced. When the command ends, for whatever reason,
the captions move into the manifest; after a kill, the next start does it.
"""

import hashlib
import json
import logging
import os
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from titans_video.captioning.captioner import REFUSALS, Caption, Captioner, ClipFrames, read_sample, refusal
from titans_video.config.generation import CaptionOptions, RunOptions
from titans_video.config.options import DataOptions
from titans_video.console import Progress
from titans_video.data.manifest_edit import ManifestText, read_manifest
from titans_video.data.reader import ClipRecord
from titans_video.data.row_scan import open_scan
from titans_video.errors import ConfigError, DataError, counted, few
from titans_video.files import append_lines
from titans_video.generation.model import choose_defaults, choose_device
from titans_video.media.opening import DECODING_ERRORS, UnreadableMedia
from titans_video.parsing import read_json_lines
from titans_video.storage.locks import try_locked
from titans_video.types import PRECISIONS, CodecSpec

PIXELS = CodecSpec("pixels", 3, (1, 1, 1))
READERS = 4
"""Threads that read clips ahead of the model."""
MOST_LISTED = 10
_SETTINGS = ("model", "prompt", "caption_prefix", "frames", "frame_size", "input", "max_new_tokens")
"""The options that decide the text of a caption."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A caption in the journal: the key of its row, its writer, and a hash of the settings that it depends on."""

    row: str
    caption: str
    writer: str
    settings: str


class Journal:
    """The captions that are not in the manifest yet, one line of JSON each."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.captions")
        self.lock = self.path.with_name(f"{self.path.name}.lock")  # of the command that fills it
        self.found: dict[str, Finished] = {}
        for line in read_json_lines(self.path) if self.path.exists() else ():
            if set(line) == set(Finished.__annotations__) and all(isinstance(value, str) for value in line.values()):
                self.found[line["row"]] = Finished(**line)

    def add(self, captions: Sequence[Finished]) -> None:
        """Append captions; they survive a kill once this returns. Raises WriteError."""
        append_lines(self.path, (json.dumps(asdict(c), ensure_ascii=False) for c in captions))
        self.found |= {c.row: c for c in captions}

    def merge(self, manifest: ManifestText, *, replace: bool = False) -> ManifestText:
        """Return the manifest with the captions; those of rows that have one only if `replace`."""
        new = {
            number: (self.found[key].caption, self.found[key].writer)
            for number, (key, row) in enumerate(zip(manifest.keys, manifest.rows, strict=True))
            if key in self.found and (replace or not row.caption)
        }
        return manifest.with_captions(new)

    def finish(self, manifest: Path) -> None:
        """Move the captions into the rows without one of the manifest as it is now, and remove the journal."""
        if self.found:
            self.merge(ManifestText(manifest)).write()
        self.path.unlink(missing_ok=True)


def finish_interrupted(manifest: Path) -> int | None:
    """Move the captions that a killed command left beside a manifest into it; return how many there were.

    None: a command that writes captions is running. It moves its captions itself, into the manifest as it is then.
    """
    journal = Journal(Path(os.path.realpath(manifest)))
    if not journal.path.exists():
        return 0
    with try_locked(journal.lock) as is_mine:
        return _finish(manifest) if is_mine else None


def _finish(manifest: Path) -> int:
    journal = Journal(Path(os.path.realpath(manifest)))  # read under the lock
    if journal.path.exists():
        journal.finish(manifest)
    return len(journal.found)


@dataclass
class Result:
    """The outcome of a run.

    Attributes:
        written: how many captions.
        cut: the videos whose captions have as many tokens as they may have.
        failed: rows that got no caption and why, by their place in the manifest.
        refusal: why the model did not accept the latest clip that it did not accept.
    """

    path: Path
    rows: int
    written: int
    cut: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    refusal: str = ""


def write_captions(options: CaptionOptions) -> Result:
    """Write the captions that are missing, or with `all` every one; show the progress.

    Raises:
        ConfigError: a flag is wrong, the model cannot be loaded, or it does not accept the first clip.
        DataError: the manifest is wrong, or no clip of a row without a caption can be read.
    """
    target = _check(options)
    with try_locked(Journal(target).lock) as is_mine:
        if not is_mine:
            raise ConfigError(f"{target}: another command writes captions for it. Wait for it, or end it with Ctrl-C.")
        return _write_captions(options, target)


def _write_captions(options: CaptionOptions, target: Path) -> Result:
    if options.out is None and (before := _finish(target)):
        logger.info(f"{counted(before, 'caption')} of a command that was killed moved into {options.manifest}.")
    manifest, _ = read_manifest(str(options.manifest), options.data_root, allow_outside_root=options.allow_outside_root)
    journal = Journal(target)
    if journal.found:
        logger.info(f"{counted(len(journal.found), 'caption')} from {journal.path}: continuing.")
    _refuse_other_settings(journal, options)
    todo = {
        number
        for number, row in enumerate(manifest.rows)
        if (options.all or not row.caption) and manifest.keys[number] not in journal.found
    }
    result = Result(Path(options.out or str(options.manifest)), len(manifest.rows), 0)
    try:
        if todo:
            _describe_rows(todo, manifest, options, journal, result)
    finally:
        if options.out is None:
            journal.finish(manifest.path)
    if options.out is not None:
        journal.merge(ManifestText(manifest.path), replace=options.all).write(target)
        journal.path.unlink(missing_ok=True)
    return result


def _check(options: CaptionOptions) -> Path:
    """Return the file to write; ConfigError if the flags contradict each other or the file."""
    source = Path(os.path.realpath(str(options.manifest)))
    if options.all and options.out is None:
        raise ConfigError("--all replaces captions that you have. Give the new manifest's name with --out FILE.")
    if options.out is None:
        return source
    out = Path(options.out).absolute()
    if out.resolve() == source:
        raise ConfigError(f"--out {options.out} is the manifest itself. Omit --out to add captions to it.")
    if out.parent.resolve() != Path(str(options.manifest)).absolute().parent.resolve() and options.data_root is None:
        raise ConfigError(
            f"--out {options.out}: paths in a manifest start at its folder, so the new one must be in the same folder "
            f"({Path(str(options.manifest)).parent / out.name}). Or give --data-root, here and when you train."
        )
    if out.exists() and not Journal(out).path.exists():
        raise ConfigError(f"--out {options.out} exists. Choose another name, or give it as the manifest to complete.")
    return out


def _refuse_other_settings(journal: Journal, options: CaptionOptions) -> None:
    others = [c for c in journal.found.values() if c.settings != settings_hash(options)]
    if others:
        raise ConfigError(
            f"{journal.path} has {counted(len(others), 'caption')} of an interrupted command with another model or "
            "prompt, or other frames. Repeat that command to continue, or remove the file to begin again."
        )


def settings_hash(options: CaptionOptions) -> str:
    """Return a hash of the options that decide the text of a caption."""
    chosen = {name: value for name, value in asdict(options).items() if name in _SETTINGS}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _describe_rows(
    todo: set[int], manifest: ManifestText, options: CaptionOptions, journal: Journal, result: Result
) -> None:
    records = _readable(todo, options, result)
    if not records:
        raise DataError(
            f"{options.manifest}: no clip of {counted(len(todo), 'row')} without a caption can be read: "
            f"{few(result.failed.values())}"
        )
    captioner, settings, failed = load_captioner(options), settings_hash(options), len(result.failed)
    with Progress("captions", "clip", len(records)) as bar:
        for batch in _batches(records, options, result):
            finished = []
            for record, caption in _describe(captioner, batch, options, result):
                text = options.caption_prefix + caption.text
                finished.append(Finished(manifest.keys[record.row_number], text, captioner.name, settings))
                result.cut += [str(record.row.video)] if caption.is_cut else []
            result.written += len(finished)
            if not result.written and result.refusal:  # so it is not the clips
                raise ConfigError(result.refusal)
            journal.add(finished)
            bar.move_to(result.written + len(result.failed) - failed)


def load_captioner(options: CaptionOptions) -> Captioner:
    """Load the model on the device of the options. Raises ConfigError."""
    run, _ = choose_defaults(RunOptions(device=options.device, dtype=options.dtype))
    assert run.dtype != "auto", "it was resolved"
    captioner = Captioner(options, PRECISIONS[run.dtype], choose_device(options.device))
    form = "one video" if captioner.sees_video else counted(options.frames, "image")
    logger.info(f"{captioner.name} on {captioner.device} in {run.dtype} gets each clip as {form}.")
    return captioner


def _readable(todo: set[int], options: CaptionOptions, result: Result) -> list[ClipRecord]:
    """Return the rows whose files can be read; the others are noted in the result."""
    data = DataOptions(
        manifest=(str(options.manifest),),
        data_root=options.data_root,
        allow_outside_root=options.allow_outside_root,
        num_frames=1,
        task_mix="t2v=1",  # every row is read from its own start, whatever its task
        empty_captions="keep",
    )
    scan, _ = open_scan(data, PIXELS, (1, 1, 1), progress=True)
    result.failed |= {q.row.where(): f"{q.row.video}: {q.detail}" for q in scan.quarantined if q.row_number in todo}
    return [record for record in scan.records if record.row_number in todo]


Clip = tuple[ClipRecord, ClipFrames]


def _batches(records: Sequence[ClipRecord], options: CaptionOptions, result: Result) -> Iterator[list[Clip]]:
    """Yield the frames of the rows in batches, read ahead by threads; note what cannot be read in the result."""
    batch: list[Clip] = []
    for record, future in _read_ahead(records, options):
        try:
            batch.append((record, future.result()))
        except (UnreadableMedia, *DECODING_ERRORS) as e:
            result.failed[record.row.where()] = str(e)
        if len(batch) == options.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_ahead(
    records: Sequence[ClipRecord], options: CaptionOptions
) -> Iterator[tuple[ClipRecord, Future[ClipFrames]]]:
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[ClipRecord, Future[ClipFrames]]] = deque()
        for record in records:
            waiting.append((record, pool.submit(read_sample, record, options.frames, options.frame_size)))
            if len(waiting) > READERS + options.batch_size:
                yield waiting.popleft()
        yield from waiting


def _describe(
    captioner: Captioner, batch: Sequence[Clip], options: CaptionOptions, result: Result
) -> list[tuple[ClipRecord, Caption]]:
    """Describe a batch; if the model does not accept it, clip by clip."""
    try:
        captions = captioner.describe([clip for _, clip in batch])
    except REFUSALS as e:
        if len(batch) > 1:
            return [found for clip in batch for found in _describe(captioner, [clip], options, result)]
        record, result.refusal = batch[0][0], refusal(e, options)
        result.failed[record.row.where()] = f"{record.row.video}: {result.refusal}"
        return []
    found = []
    for (record, _), caption in zip(batch, captions, strict=True):
        if caption.text:
            found.append((record, caption))
        else:
            result.failed[record.row.where()] = f"{record.row.video}: the model wrote nothing."
    return found


def format_result(result: Result, options: CaptionOptions) -> str:
    """Return the outcome for the terminal."""
    lines = [f"{counted(result.written, 'caption')} written: {result.path} ({counted(result.rows, 'row')})."]
    if not result.written and not result.failed:
        lines = [f"{result.path}: nothing to do, all {counted(result.rows, 'row')} have captions."]
    if result.cut:
        lines.append(
            f"{counted(len(result.cut), 'caption')} may end in the middle of a sentence, because the model reached "
            f"--max-new-tokens {options.max_new_tokens}: {few(result.cut)}"
        )
    if result.failed:
        lines.append(f"{counted(len(result.failed), 'row')} without a caption:")
        lines += [f"  {where}: {why}" for where, why in list(result.failed.items())[:MOST_LISTED]]
        lines += ["  ..."] if len(result.failed) > MOST_LISTED else []
    return "\n".join([*lines, f"Read and edit them: titans-video caption --review {shlex.quote(str(result.path))}"])
