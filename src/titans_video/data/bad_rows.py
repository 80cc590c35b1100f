"""Rows that break during training: what is left out from which batch on, kept beside the run.

Each rank writes a file of its own, so that nothing is written twice or torn; all ranks read all files when a run is
resumed. A record says from which batch on its row is left out, so that a run resumed at an earlier batch reads there
what it read before.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PATTERN = "broken.rank{rank}.jsonl"


@dataclass(frozen=True)
class Broken:
    """A row left out.

    Attributes:
        id: of the row.
        video: its file.
        reason: one of `plan.REASONS`.
        detail: in words.
        batch: number of the first global batch that did without it.
        bucket: where it stood, HxWxT.
    """

    id: str
    video: str
    reason: str
    detail: str
    batch: int
    bucket: str


class BrokenRows:
    """What is left out so far, by row id.

    Args:
        folder: of the run; None: nothing is kept.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.known: dict[str, Broken] = {}

    def start_afresh(self, world: int) -> None:
        """Forget what an earlier run in this folder left out. Each of `world` ranks forgets its own file, and the first
        those of ranks that this run does not have, so that none removes what another has just written."""
        self.known.clear()
        for path in self._files():
            rank = path.name.split(".")[1].removeprefix("rank")
            if rank == str(self.rank) or (self.rank == 0 and rank.isdigit() and int(rank) >= world):
                path.unlink(missing_ok=True)

    def load(self) -> None:
        """Read what all ranks of the run left out. A last line torn by a kill is passed over: its row breaks again."""
        for path in self._files():
            for line in path.read_text().splitlines():
                try:
                    found = Broken(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                first = self.known.get(found.id)
                if first is None or found.batch < first.batch:
                    self.known[found.id] = found

    def add(self, broken: Broken) -> bool:
        """Keep a record; False where the row was already known at that batch."""
        before = self.known.get(broken.id)
        if before is not None and before.batch <= broken.batch:
            return False
        self.known[broken.id] = broken
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / PATTERN.format(rank=self.rank)).open("a") as f:
                f.write(json.dumps(asdict(broken)) + "\n")
        return True

    def leaves_out(self, row_id: str, batch: int) -> bool:
        """Whether a row is left out of this global batch."""
        found = self.known.get(row_id)
        return found is not None and found.batch <= batch

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(PATTERN.format(rank="*"))) if self.folder is not None else []
