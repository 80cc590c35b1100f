"""Forge files from valid ones: change types, ranges, sizes and nesting at some places of their contents.

`forged` draws a case for hypothesis. `bounded` runs a reader as a command does, within the limits of every file.
"""

import contextlib
import copy
import json
import math
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

from titans_video.errors import UserError
from titans_video.schema import shown

SECONDS, BYTES = 10.0, 2 * 2**30
"""The limits of a case."""


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


HUGE: list[Any] = ["x" * 100_000, [0] * 100_000, {str(i): i for i in range(10_000)}, _deep(900)]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 511, 513, 10**5, 10**9, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, 0.5, -1.5, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "builtin", "none", "../..", "\x1b[2J", "<script>", "(a+)+$", "9" * 5000, "\ud800"),
    *([], [0], [1, 2, 2], [-1], ["x"], [None], [[]] * 3, {}, {"a": 1}, {"": None}),
    *(_deep(3), _deep(100), *HUGE),
]
FACTORS = (0, -1, 2, 3, 10, 1000, 10**6, 10**9, 0.5)
TENSORS: list[Callable[[Tensor], Any]] = [
    lambda x: x.flatten(),
    lambda x: x[None],
    lambda x: x[:0],
    lambda x: x.to(torch.float16),
    lambda x: x.to(torch.int32),
    lambda x: x.to(torch.complex64),
    lambda x: x.bool(),
    lambda x: torch.zeros(()),
    lambda x: torch.zeros(1).expand(100_000, 100_000),
    lambda x: torch.cat([x, x]) if x.dim() else x,
    lambda x: x.transpose(0, -1) if x.dim() else x,
    lambda x: x.to_sparse() if x.dim() else x,
    lambda x: x.detach().tolist(),
    lambda x: torch.zeros(1).as_strided((2, 2), (0, 0)),
]


@dataclass(frozen=True)
class Change:
    """One change: at a place, of a kind, with a choice among the variants of the kind."""

    place: int
    kind: str
    variant: int


KINDS = ("type", "range", "size", "nesting", "key")
CHANGES = st.lists(
    st.builds(Change, st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(0, 10**6)), min_size=1, max_size=3
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in nested dicts and lists."""
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left and len(found) < 10_000:
        value = left.pop()
        keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        found += [(value, key) for key in keys]
        left += [value[key] for key in keys]
    return found


def forge(valid: Any, changes: list[Change]) -> Any:
    """Return a forged copy of a tree of dicts, lists, plain values and tensors."""
    tree = copy.deepcopy(valid)
    small = False
    for change in changes:
        found = places(tree)
        if not found:
            return tree
        container, key = found[change.place % len(found)]
        before = container[key]
        if change.kind == "key" and isinstance(container, dict):
            container.pop(key)
            if change.variant % 3:
                container[("", "x", "a.b.c", str(key) + "0", "other")[change.variant % 5]] = before
        else:
            container[key] = after = _changed(before, change, small)
            small = small or _is_huge(after)  # two huge parts inside each other would not fit into memory
        now = container.get(key, "removed") if isinstance(container, dict) else container[key]
        note(f"{key!r}: {shown(before)} -> {shown(now)}")
    return tree


def _is_huge(value: Any) -> bool:
    if isinstance(value, dict):
        return value in HUGE
    return isinstance(value, list | str) and (len(value) > 1000 or _depth(value) > 100)


def _depth(value: Any) -> int:
    levels = 0
    while isinstance(value, list) and value:
        value, levels = value[0], levels + 1
    return levels


def _changed(value: Any, change: Change, small: bool) -> Any:
    """Return another value; with `small` none that is much larger."""
    n = change.variant
    if change.kind == "nesting":
        return [value[0] if isinstance(value, list) and value else value, [value], {"a": value}, [[[value]]]][n % 4]
    if isinstance(value, Tensor):
        return TENSORS[n % len(TENSORS)](value) if value.layout == torch.strided and value.numel() < 10**6 else 0
    if change.kind == "range" and type(value) in (int, float):
        factor = FACTORS[n % len(FACTORS)]
        return value // 2 if type(value) is int and type(factor) is float else value * factor
    if change.kind == "size" and isinstance(value, list | str) and value:
        return [value[1:], value[:-1], value * 2, value * (2 if small else 10**5 // len(value) + 1)][n % 4]
    if change.kind == "size" and isinstance(value, int):
        return value + [1, -1, 7, 64][n % 4]
    return copy.deepcopy(ODD[n % (len(ODD) - len(HUGE) * small)])


class TooSlow(BaseException):
    """A case exceeded its time. Nothing but the test may catch it."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS:g} seconds of computation")

    # Of this process: other programs on the machine do not count.
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _capped() -> Iterator[None]:
    """Let a huge allocation fail instead of the machine, and check the memory that was used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert used < BYTES, f"{used / 2**30:.1f} GiB"


def bounded(read: Callable[[], None]) -> str | None:
    """Run a reader; return the error that the command would print, or None if there is none.

    Anything but a user error fails, as do the time and the memory beyond the limits.
    """
    with _alarm(), _capped():
        try:
            read()
        except UserError as e:
            message = str(e)
        else:
            return None
    assert message.strip()
    assert len(message) < 2000, message
    assert "\n\n" not in message
    assert "allocate" not in message
    assert "MemoryError" not in message
    return message


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """Return a safetensors file with any header."""
    text = to_json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def to_json(value: Any) -> bytes:
    """Return JSON as a forger writes it: with NaN, Infinity and surrogates."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
