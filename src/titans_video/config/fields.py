"""Types of command-line options: how a value is read from one word, and which values are legal. No torch here."""

from typing import Annotated, Any, Literal

import tyro

Dtype = Literal["fp32", "bf16", "fp16"]
VaeBackend = Literal["diffusers", "external", "identity", "patch"]


def _triple(args: list[str]) -> tuple[int, int, int]:
    parts = args[0].split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"expected three positive whole numbers T,H,W such as 2,2,2; got {args[0]!r}")
    t, h, w = (int(p) for p in parts)
    return t, h, w


def _pair(args: list[str]) -> tuple[float, float]:
    parts = args[0].split(",")
    if len(parts) != 2:
        raise ValueError(f"expected two numbers such as 0.9,0.95; got {args[0]!r}")
    return float(parts[0]), float(parts[1])


def _integers(args: list[str]) -> tuple[int, ...]:
    parts = args[0].split(",")
    if not all(p.strip().isdigit() for p in parts):
        raise ValueError(f"expected whole numbers such as 2,5,8; got {args[0]!r}")
    return tuple(int(p) for p in parts)


def _joined(metavar: str, parse: Any, length: int | None) -> Any:
    """A tuple of `length` (None: any number of) values written in one word, with commas."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda x: isinstance(x, tuple) and length in (None, len(x)),
        str_from_instance=lambda x: [",".join(map(str, x))],
    )


PatchSize = Annotated[tuple[int, int, int], _joined("T,H,W", _triple, 3)]
Pair = Annotated[tuple[float, float], _joined("A,B", _pair, 2)]
Integers = Annotated[tuple[int, ...], _joined("N,N,...", _integers, None)]
