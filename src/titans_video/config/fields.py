"""Types of command-line options: how a value is read from one word, which values are legal, and their check.

No torch here: `--help` imports this file.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import tyro

from titans_video.errors import ConfigError

Dtype = Literal["fp32", "bf16", "fp16"]
AutoDtype = Literal["auto", "fp32", "bf16", "fp16"]
Switch = Literal["auto", "on", "off"]
"""A switch with a third position. `--compile` is `--compile on`, and `--no-compile` is `--compile off`."""
VaeBackend = Literal["diffusers", "external", "identity", "patch", "tiny"]
AttentionBackend = Literal["auto", "cudnn", "flash", "flash2", "flash3", "sage", "efficient", "math"]


class OptionGroup(Protocol):
    """Any dataclass of options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def is_group(value: object) -> TypeGuard[OptionGroup]:
    return is_dataclass(value)


@dataclass(frozen=True)
class Range:
    """The bounds of a number, declared with its option: `lr: Annotated[float, Range(above=0)] = 1e-4`.

    An option of several numbers takes one range for all of them, or one range for each. Every number must be finite,
    also without bounds. None and words such as `auto` are always legal.

    Attributes:
        least, most: inclusive bounds.
        above, below: exclusive bounds.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Return the bounds as the end of a sentence: "at least 0 and below 1"."""
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {b:g}" for name, b in bounds.items() if b is not None) or "a finite number"


@dataclass(frozen=True)
class Metavar:
    """The word for a value in the help, declared with its type: `Annotated[str, Metavar("FOLDER")]`."""

    metavar: str


FilePath = Annotated[str, Metavar("FILE")]
FolderPath = Annotated[str, Metavar("FOLDER")]
AnyPath = Annotated[str, Metavar("PATH")]
ManifestPath = Annotated[str, Metavar("MANIFEST")]
RunPath = Annotated[str, Metavar("RUN")]
Name = Annotated[str, Metavar("NAME")]
Json = Annotated[str, Metavar("JSON")]


def validate(options: OptionGroup) -> None:
    """Check every number of a dataclass, and of the dataclasses in it, against its declared `Range`.

    Raises:
        ConfigError: a value is out of range; the message has its flag, the value and the bounds.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for option in fields(options):
        value = getattr(options, option.name)
        if is_group(value):
            validate(value)
        elif value is not None and not isinstance(value, str):
            ranges = [m for m in getattr(hints[option.name], "__metadata__", ()) if isinstance(m, Range)]
            if ranges:
                check_value(flag_of(option.name), value, *ranges)


def check_value(flag: str, value: Any, *ranges: Range) -> None:
    """Check one value against its range, or each number of a tuple against its own.

    Raises:
        ConfigError: as `validate`.
    """
    numbers = value if isinstance(value, tuple | list) else (value,)
    for number, legal in zip(numbers, ranges * len(numbers) if len(ranges) == 1 else ranges, strict=True):
        if number not in legal:
            named = "it" if len(numbers) == 1 else _format(number)
            raise ConfigError(f"{flag} {','.join(map(_format, numbers))}: {named} must be {legal}.")


def _format(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def flag_of(name: str) -> str:
    """Return the flag of an option's field: `--max-steps` of `max_steps`."""
    return "--" + name.replace("_", "-")


def one_of(words: Sequence[str]) -> str:
    """Return choices as the end of a sentence: "auto, on or off"."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def expected_value(hint: Any, word: str) -> str:
    """Return what a word must be to be a value of a type, as the end of a sentence; empty if it is one.

    A constructor declared in this file raises a ValueError whose message is that end.
    """
    metadata = getattr(hint, "__metadata__", ())
    try:
        for part in metadata:
            if isinstance(part, tyro.constructors.PrimitiveConstructorSpec):
                part.instance_from_str([word])
                return ""
    except ValueError as e:
        return str(e)
    if metadata:
        bounds = [f", {part}" for part in metadata if isinstance(part, Range) and part != Range()]
        expected = expected_value(hint.__origin__, word)
        return expected + "".join(bounds) if expected in NUMBERS.values() else expected
    if get_origin(hint) is Literal:
        return "" if word in get_args(hint) else one_of(get_args(hint))
    if hint in NUMBERS:
        try:
            hint(word)
        except ValueError:
            return NUMBERS[hint]
    inner = [part for part in get_args(hint) if part not in (NoneType, Ellipsis)]
    return expected_value(inner[0], word) if inner else ""


NUMBERS = {int: "a whole number", float: "a number"}
"""Type of a number: its name in messages."""
ValueT = TypeVar("ValueT", bound=tuple[float, ...])


def _triple(args: list[str]) -> tuple[int, int, int]:
    parts = args[0].split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError("three positive whole numbers T,H,W such as 2,2,2")
    t, h, w = (int(p) for p in parts)
    return t, h, w


def _pair(args: list[str]) -> tuple[float, float]:
    try:
        first, second = map(float, args[0].split(","))
    except ValueError:
        raise ValueError("two numbers such as 0.9,0.95") from None
    return first, second


def _integers(args: list[str]) -> tuple[int, ...]:
    parts = args[0].split(",")
    if not all(p.strip().isdigit() for p in parts):
        raise ValueError("whole numbers such as 2,5,8")
    return tuple(int(p) for p in parts)


def _count(args: list[str]) -> int | Literal["auto"]:
    if args[0] == "auto":
        return "auto"
    if not args[0].strip().removeprefix("-").isdecimal():
        raise ValueError("auto or a whole number")
    return int(args[0])


SIZE = "SIZE"
"""The word for a number of bytes in the help."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _size(args: list[str]) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", args[0].strip())
    try:
        assert found is not None
        return int(float(found[1]) * _UNITS[found[2].upper()])
    except (AssertionError, ValueError, KeyError, OverflowError):
        raise ValueError("a size such as 50GB, 500MB or 20GiB") from None


def format_size(size: int) -> str:
    """Return a number of bytes with the largest decimal unit that gives at most three digits behind the point."""
    unit, scale = next((u, _UNITS[u]) for u in ("TB", "GB", "MB", "KB", "B") if size >= _UNITS[u] or u == "B")
    return f"{size / scale:.3f}".rstrip("0").rstrip(".") + unit


def _comma_separated(
    metavar: str, parse: Callable[[list[str]], ValueT], length: int | None
) -> tyro.constructors.PrimitiveConstructorSpec[ValueT]:
    """Return tyro's description of a tuple written as one word with commas.

    Args:
        length: of the tuple, or None for any length.
    """
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda x: isinstance(x, tuple) and length in (None, len(x)),
        str_from_instance=lambda x: [",".join(map(str, x))],
    )


PatchSize = Annotated[tuple[int, int, int], _comma_separated("T,H,W", _triple, 3), Range(least=1)]
Pair = Annotated[tuple[float, float], _comma_separated("A,B", _pair, 2)]
Integers = Annotated[tuple[int, ...], _comma_separated("N,N,...", _integers, None)]
Count = Annotated[
    int | Literal["auto"],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="auto|N",
        instance_from_str=_count,
        is_instance=lambda x: isinstance(x, int) or x == "auto",
        str_from_instance=lambda x: [str(x)],
    ),
]
Size = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=SIZE,
        instance_from_str=_size,
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda x: [format_size(x)],
    ),
]
