"""The rows of a data set as sequences over a shared table: a process only keeps numbers of rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from titans_video.data.buckets import Bucket
from titans_video.data.columns import Column
from titans_video.data.left_out import Quarantined
from titans_video.data.manifest import TASKS
from titans_video.data.reader import ClipRecord
from titans_video.data.row_table import RowTable
from titans_video.data.sampler import TaskMix, row_key
from titans_video.seeding import Key, derive_seed
from titans_video.storage.fetching import Facts

DIGEST_BYTES = 32


@dataclass(frozen=True, eq=False)
class ClipRecords(Sequence[ClipRecord]):
    """Usable rows of a table. A `ClipRecord` is made when it is asked for.

    Attributes:
        numbers: (rows,) their numbers in the table.
        bucket_ids: (rows,) the numbers of their buckets in `table.buckets`.
        placeholders: numbers of rows that only keep their position.
        digests: (files, 32) SHA-256 of each file of the table, zeros if unknown; None before `with_digests`.
    """

    table: RowTable
    numbers: Column
    bucket_ids: Column
    placeholders: frozenset[int] = frozenset()
    digests: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> ClipRecord: ...
    @overload
    def __getitem__(self, at: slice) -> "ClipRecords": ...
    def __getitem__(self, at: int | slice) -> "ClipRecord | ClipRecords":
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        number = int(self.numbers[at])
        files = (int(self.table.columns[name][number]) for name in ("video", "image"))
        record = self.table.record(number, int(self.bucket_ids[at]), *map(self._digest, files))
        return replace(record, packed=b"") if number in self.placeholders else record

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClipRecords):
            return NotImplemented
        same = self.table is other.table and self.placeholders == other.placeholders
        return same and all(
            np.array_equal(a, b) for a, b in ((self.numbers, other.numbers), (self.bucket_ids, other.bucket_ids))
        )

    def _digest(self, file: int) -> str | None:
        found = b"" if self.digests is None or file < 0 else self.digests[file].tobytes()
        return found.hex() if any(found) else None

    def take(self, positions: Column) -> "ClipRecords":
        """Return the records at these positions."""
        return replace(self, numbers=self.numbers[positions], bucket_ids=self.bucket_ids[positions])

    def column(self, name: str) -> Column:
        """Return a column of the table for these rows."""
        return self.table.columns[name][self.numbers]

    def files(self, at: int) -> Iterator[tuple[Path, Facts]]:
        """Yield the files of a row as they were scanned: its clip and its own image."""
        for name in ("video", "image"):
            file = int(self.table.columns[name][self.numbers[at]])
            if file >= 0:
                stamp = (int(self.table.columns[column][file]) for column in ("size", "modified"))
                yield Path(self.table.path_of_file(file)), Facts(*stamp)

    def bucket_counts(self) -> dict[Bucket, int]:
        """Return the number of rows of each bucket, in the order of their first rows."""
        counts = np.bincount(self.bucket_ids).tolist()
        first = {i: int((self.bucket_ids == i).argmax()) for i, count in enumerate(counts) if count}
        return {self.table.buckets[i]: counts[i] for i in sorted(first, key=lambda i: first[i])}

    def named_counts(self) -> Counter[str]:
        """Return the number of rows of each bucket by its name, HxWxT."""
        found = Counter[str]()
        for bucket, count in self.bucket_counts().items():
            found[str(bucket)] += count
        return found

    def in_bucket(self, bucket: Bucket) -> Column:
        """Return the positions of a bucket's records."""
        numbers = [i for i, b in enumerate(self.table.buckets) if b == bucket]
        return np.flatnonzero(np.isin(self.bucket_ids, numbers)).astype(np.int32)

    def ids(self) -> Iterator[str]:
        return self.table.ids.of(self.numbers)

    def captions(self, bucket: Bucket | None = None) -> Iterator[str]:
        """Return the captions of all rows, or of those of one bucket."""
        return self.table.captions.of(self.numbers if bucket is None else self.numbers[self.in_bucket(bucket)])

    def own_images(self, mix: TaskMix) -> Column:
        """Return the file numbers of the images that rows bring and that may condition them."""
        images = self.column("image")
        if mix.shares:
            used = np.full(len(self), any(task == "i2v" for task, _ in mix.shares))
        else:
            used = self.column("task") == TASKS.index("i2v")
        return images[used & (images >= 0)]

    def videos(self) -> Iterator[str]:
        """Yield the paths of the clips, each once."""
        return map(self.table.path_of_file, np.unique(self.column("video")).tolist())

    def contents(self) -> Iterator[tuple[str, str | None, str | None]]:
        """Yield the ids of the rows in their order, with the digests of their files."""
        for at in np.argsort(self.ranks()).tolist():
            number = int(self.numbers[at])
            files = (int(self.table.columns[name][number]) for name in ("video", "image"))
            yield self.table.ids[number], *map(self._digest, files)

    def seeds(self, seed: int, *names: Key) -> NDArray[np.uint64]:
        """Return `derive_seed(seed, *names, id)` of each row."""
        return np.fromiter((derive_seed(seed, *names, i) for i in self.ids()), np.uint64, len(self))

    def sorted_by(self, keys: Column) -> Column:
        """Return the positions in the order of the keys, equal ones in the order of their ids."""
        return np.lexsort((self.ranks(), keys))

    def ranks(self) -> Column:
        """Return the places of the rows in the order of all ids."""
        ranks = np.empty(len(self.table), np.int32)
        ranks[self.table.columns["by_id"]] = np.arange(len(self.table), dtype=np.int32)
        return ranks[self.numbers]

    def find(self, ids: Iterable[str]) -> list[int]:
        """Return the positions of the rows with these ids, in order; unknown ids are ignored."""
        found = set(_find(self.table, self.numbers, ids))
        return np.flatnonzero(np.isin(self.numbers, list(found))).tolist() if found else []

    def without(self, ids: Iterable[str]) -> "ClipRecords":
        """Return the records without the rows with these ids."""
        return self.take(np.delete(np.arange(len(self)), self.find(ids)))

    def put_back(self, buckets: Mapping[str, Bucket], left_out: "LeftOut") -> "ClipRecords":
        """Return the records with each of these rows in its bucket, by id; where it was not, as a placeholder.

        Rows that are neither here nor left out are ignored.
        """
        ids = self.table.ids
        numbers = {bucket: i for i, bucket in enumerate(self.table.buckets)}
        wanted = {i: numbers[bucket] for i, bucket in buckets.items()}
        bucket_ids, moved = self.bucket_ids.copy(), []
        here = self.find(wanted)
        for at in here:
            number = int(self.numbers[at])
            if bucket_ids[at] != wanted[ids[number]]:
                bucket_ids[at] = wanted[ids[number]]
                moved.append(number)
        others = left_out.find(wanted.keys() - {ids[int(self.numbers[at])] for at in here})
        together = np.concatenate([self.numbers, np.asarray(others, np.int32)])
        bucket_ids = np.concatenate([bucket_ids, np.asarray([wanted[ids[i]] for i in others], np.int32)])
        order = np.argsort(together, kind="stable")
        placeholders = self.placeholders | {*moved, *others}
        return replace(self, numbers=together[order], bucket_ids=bucket_ids[order], placeholders=placeholders)


@dataclass(frozen=True)
class LeftOut(Sequence[Quarantined]):
    """Rows of a table that are left out, and further ones."""

    table: RowTable
    numbers: Column
    more: tuple[Quarantined, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers) + len(self.more)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = at + len(self) if at < 0 else at
        if at < len(self.numbers):
            return self.table.left_out(int(self.numbers[at]))
        return self.more[at - len(self.numbers)]

    def find(self, ids: Iterable[str]) -> list[int]:
        """Return the numbers in the table of the rows with these ids."""
        more = [q.row_number for q in self.more]
        return _find(self.table, np.concatenate([self.numbers, np.asarray(more, np.int32)]), ids)

    def plus(self, more: Iterable[Quarantined]) -> "LeftOut":
        """Return these rows and further ones."""
        return replace(self, more=(*self.more, *more))


def _find(table: RowTable, numbers: Column, ids: Iterable[str]) -> list[int]:
    """Return those of the rows with these numbers that have one of the ids."""
    wanted = set(ids)
    keys = np.fromiter(map(row_key, wanted), np.uint64, len(wanted))
    found = numbers[np.isin(table.columns["key"][numbers], keys)].tolist()
    return [i for i in found if table.ids[i] in wanted]
