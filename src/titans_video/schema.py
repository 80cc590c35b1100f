"""Describe what a file may contain, and check values against it: types, ranges, lengths and nesting.

A schema checks plain values as JSON and checkpoints have them. A mismatch names the file and the path inside it:
`model.pt: config.model.heads: expected an integer from 1 to 512, found 0`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from titans_video.config.fields import Range
from titans_video.errors import UserError

LARGEST = 2**63
FINITE = Range(least=-1e300, most=1e300)
MOST_TEXT = 2**16


class Mismatch(ValueError):
    """A value that is not as its schema says."""


class Schema(ABC):
    """A description of legal values."""

    @abstractmethod
    def check(self, value: Any, at: str) -> None:
        """Raise `Mismatch` if the value at the path `at` is not as described."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the description of a legal value, as the object of "expected"."""

    def refuse(self, value: Any, at: str) -> None:
        raise Mismatch(f"{at or 'the content'}: expected {self}, found {shown(value)}")


def check(schema: Schema, value: Any, where: object, error: type[UserError], at: str = "") -> None:
    """Check the content of a file (`where`); raise `error` if a value has another type, or is out of range."""
    try:
        schema.check(value, at)
    except Mismatch as e:
        raise error(f"{where}: {e}.") from None


def fits(schema: Schema, value: Any) -> bool:
    """Check whether a value is as described."""
    try:
        schema.check(value, "")
    except Mismatch:
        return False
    return True


def shown(value: Any) -> str:
    """Return a short description of any value, for a message."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, bool | NoneType):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a larger number"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Whole(Schema):
    """An integer; not a boolean."""

    least: int = -LARGEST
    most: int = LARGEST

    def check(self, value: Any, at: str) -> None:
        if type(value) is not int or not self.least <= value <= self.most:
            self.refuse(value, at)

    def __str__(self) -> str:
        if self.most < LARGEST:
            return f"an integer from {self.least} to {self.most}"
        return "an integer" if self.least <= -LARGEST else f"an integer of at least {self.least}"


@dataclass(frozen=True)
class Real(Schema):
    """A finite number; not a boolean."""

    range: Range = FINITE

    def check(self, value: Any, at: str) -> None:
        if type(value) not in (int, float) or abs(value) > 1e300 or value not in self.range:
            self.refuse(value, at)

    def __str__(self) -> str:
        return f"a number, {self.range}" if self.range != FINITE else "a finite number"


@dataclass(frozen=True)
class Text(Schema):
    """A string."""

    most: int = MOST_TEXT

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, str) or len(value) > self.most:
            self.refuse(value, at)

    def __str__(self) -> str:
        return f"a text of at most {self.most} characters"


@dataclass(frozen=True)
class OneOf(Schema):
    """One of several plain values."""

    values: tuple[Any, ...]

    def check(self, value: Any, at: str) -> None:
        if not any(type(value) is type(legal) and value == legal for legal in self.values):
            self.refuse(value, at)

    def __str__(self) -> str:
        return " or ".join(str(v) if v is None or isinstance(v, bool) else repr(v) for v in self.values)


FLAG = OneOf((True, False))
NOTHING = OneOf((None,))


@dataclass(frozen=True)
class Either(Schema):
    """A value of one of several schemas."""

    schemas: tuple[Schema, ...]

    def check(self, value: Any, at: str) -> None:
        if value is None and NOTHING in self.schemas:
            return
        others = [s for s in self.schemas if s != NOTHING]
        if len(others) == 1:  # its message is more precise
            others[0].check(value, at)
        elif not any(fits(s, value) for s in others):
            self.refuse(value, at)

    def __str__(self) -> str:
        return " or ".join(map(str, self.schemas))


def optional(schema: Schema) -> Either:
    """Return a schema that also allows None."""
    return Either((schema, NOTHING))


@dataclass(frozen=True)
class ListOf(Schema):
    """A list of values of one schema."""

    item: Schema
    least: int = 0
    most: int = 1024

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            self.refuse(value, at)
        for i, part in enumerate(value):
            self.item.check(part, f"{at}[{i}]")

    def __str__(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"a list of {count} values"


@dataclass(frozen=True)
class MapOf(Schema):
    """An object with any keys, and values of one schema."""

    value: Schema
    most: int = 4096

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, Mapping) or len(value) > self.most:
            self.refuse(value, at)
        for key, part in value.items():
            if not isinstance(key, str) or len(key) > 1024:
                raise Mismatch(f"{at or 'the content'}: expected texts as keys, found {shown(key)}")
            self.value.check(part, _join(at, key))

    def __str__(self) -> str:
        return f"an object of at most {self.most} keys"


@dataclass(frozen=True)
class Instance(Schema):
    """An object of a class, such as a tensor."""

    kind: type
    name: str

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, self.kind):
            self.refuse(value, at)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Plain(Schema):
    """Any plain value: `depth` of lists and objects in one another, `nodes` in total, only `finite` numbers."""

    depth: int = 16
    nodes: int = 100_000
    finite: bool = True

    def check(self, value: Any, at: str) -> None:
        level, seen = [(value, at)], 1
        for _ in range(self.depth + 1):
            below: list[tuple[Any, str]] = []
            for one, place in level:
                seen += len(one) if isinstance(one, Mapping | list | tuple) else 0
                if seen > self.nodes:  # a pickle may contain the same list many times
                    raise Mismatch(f"{at or 'the content'}: expected at most {self.nodes} values, found more")
                below += self._parts(one, place)
            if not below:
                return
            level = below
        raise Mismatch(f"{at or 'the content'}: expected at most {self.depth} levels of nesting, found more")

    def _parts(self, value: Any, at: str) -> list[tuple[Any, str]]:
        if isinstance(value, Mapping):
            MapOf(_ANYTHING, self.nodes).check(value, at)
            return [(part, _join(at, key)) for key, part in value.items()]
        if isinstance(value, list | tuple):
            return [(part, f"{at}[{i}]") for i, part in enumerate(value)]
        if isinstance(value, float | int):
            legal = abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value) or not self.finite
            if legal:
                return []
        elif value is None or (isinstance(value, str) and len(value) <= 2**20):
            return []
        self.refuse(value, at)
        return []

    def __str__(self) -> str:
        return "a plain value"


class _Anything(Schema):
    def check(self, value: Any, at: str) -> None:
        pass

    def __str__(self) -> str:
        return "anything"


_ANYTHING = _Anything()
PLAIN = Plain()


@dataclass(frozen=True)
class Record(Schema):
    """An object with known keys; `others` is the schema of unknown keys, which a newer version may have written.

    `rule` returns an error of values that are legal one by one, or None.
    """

    required: Mapping[str, Schema] = field(default_factory=dict)
    optional: Mapping[str, Schema] = field(default_factory=dict)
    others: Schema = PLAIN
    rule: Callable[[Mapping[str, Any]], str | None] | None = None

    def check(self, value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            self.refuse(value, at)
        for key in self.required:
            if key not in value:
                raise Mismatch(f"{at or 'the content'}: {key!r} is missing")
        MapOf(_ANYTHING).check(value, at)
        for key, part in value.items():
            schema = self.required.get(key) or self.optional.get(key) or self.others
            schema.check(part, _join(at, key))
        if self.rule and (problem := self.rule(value)):
            raise Mismatch(f"{at or 'the content'}: {problem}")

    def __str__(self) -> str:
        return "an object"


def _join(at: str, key: str) -> str:
    key = key if key.isidentifier() and len(key) <= 60 else repr(key[:60])
    return f"{at}.{key}" if at else key


def of_options(kind: type, *, most: int = LARGEST) -> Record:
    """Return the schema of a dataclass of options as `asdict` makes it; `most` bounds otherwise unbounded integers."""
    hints = get_type_hints(kind, include_extras=True)
    return Record(optional={f.name: _of_hint(hints[f.name], [], most) for f in fields(kind)})


def _of_hint(hint: Any, ranges: Sequence[Range], most: int) -> Schema:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _of_hint(arguments[0], [*ranges, *(m for m in hint.__metadata__ if isinstance(m, Range))], most)
    if origin in (Union, UnionType):
        return Either(tuple(_of_hint(part, ranges, most) for part in arguments))
    if origin is Literal:
        return OneOf(arguments)
    if origin is tuple:
        item = _of_hint(arguments[0], ranges, most)
        return ListOf(item) if arguments[-1] is Ellipsis else ListOf(item, len(arguments), len(arguments))
    known = next(iter(ranges), Range())
    if hint is int:
        low = -LARGEST if known.least is None else int(known.least)
        return Whole(low, most if known.most is None else int(known.most))
    plain: dict[Any, Schema] = {bool: FLAG, NoneType: NOTHING, str: Text(), float: Real(known)}
    return plain[hint]
