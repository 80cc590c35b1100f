"""Rows that turn out to be unusable during training: each is left out from a recorded batch on.

Each rank writes its own file, so that no line is written twice or torn; on resume all ranks read all files. A record
stores from which batch on its row is left out, so that a run resumed at an earlier batch reads the same rows as before.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titans_video.errors import WriteError
from titans_video.files import make_folder, writing
from titans_video.formats import LEFT_OUT_ROW
from titans_video.parsing import read_json_lines
from titans_video.schema import fits

logger = logging.getLogger(__name__)

PATTERN = "broken.rank{rank}.jsonl"


@dataclass(frozen=True)
class BadRow:
    """One row that is left out.

    Attributes:
        reason: one of `clip_plan.REASONS`; `detail` explains it.
        batch: number of the first global batch without the row.
        bucket: the row's bucket, HxWxT.
    """

    id: str
    video: str
    reason: str
    detail: str
    batch: int
    bucket: str


class BadRows:
    """The rows left out so far, by row id; without a folder (of the run) the records stay in memory.

    Of the processes with the rows of one rank, one `writes` the file.
    """

    def __init__(self, folder: Path | None, rank: int = 0, writes: bool = True) -> None:
        self.folder, self.rank, self.writes = folder, rank, writes
        self.records: dict[str, BadRow] = {}
        self._pending = ""
        self._is_reported = False

    def reset(self, world: int) -> None:
        """Delete the files of an earlier run: each of `world` ranks its own, the first also those of further ranks."""
        self.records.clear()
        for path in self._files() if self.writes else []:
            rank = path.name.split(".")[1].removeprefix("rank")
            if rank == str(self.rank) or (self.rank == 0 and rank.isdigit() and int(rank) >= world):
                path.unlink(missing_ok=True)

    def load(self, others: Iterable[Mapping[str, Any]] = ()) -> None:
        """Read the records of all ranks, and `others` from a checkpoint; a last line torn by a kill is skipped."""
        lines = [line for path in self._files() for line in read_json_lines(path)]
        for record in [*lines, *others]:
            if not fits(LEFT_OUT_ROW, record):
                continue
            found = BadRow(**{name: record[name] for name in LEFT_OUT_ROW.required})
            first = self.records.get(found.id)
            if first is None or found.batch < first.batch:
                self.records[found.id] = found

    def add(self, row: BadRow, write: bool = True) -> bool:
        """Store a record, in this rank's file if `write`; return False if the row was left out at that batch before."""
        before = self.records.get(row.id)
        if before is not None and before.batch <= row.batch:
            return False
        self.records[row.id] = row
        if write and self.writes and self.folder is not None:
            self._pending += json.dumps(asdict(row)) + "\n"
            self.flush()
        return True

    def flush(self) -> None:
        """Append the lines that are not in the file yet; after a failure they are kept in memory."""
        if self.folder is None or not self._pending:
            return
        path = self.folder / PATTERN.format(rank=self.rank)
        try:
            with writing(path):
                make_folder(path.parent)
                with path.open("a") as f:
                    f.write(self._pending)
            self._pending = ""
        except WriteError as e:
            if not self._is_reported:
                logger.warning(f"{e} Until then, rows that are left out are not recorded; training continues.")
            self._is_reported = True

    def leaves_out(self, row_id: str, batch: int) -> bool:
        """Check whether a row is left out of this global batch."""
        found = self.records.get(row_id)
        return found is not None and found.batch <= batch

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(PATTERN.format(rank="*"))) if self.folder is not None else []
