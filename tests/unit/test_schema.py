"""Schemas: what they accept, and the path and the reason of what they refuse."""

from dataclasses import asdict
from typing import Any

import pytest

from titans_video.config.fields import Range
from titans_video.config.options import CodecOptions, GenerationDefaults, MemoryOptions, ModelOptions, TextOptions
from titans_video.errors import CheckpointError
from titans_video.schema import (
    FLAG,
    PLAIN,
    Either,
    Instance,
    ListOf,
    MapOf,
    OneOf,
    Plain,
    Real,
    Record,
    Schema,
    Text,
    Whole,
    check,
    fits,
    of_options,
    optional,
)

SIZE = Whole(1, 512)
MODEL = Record(
    {"heads": SIZE},
    {"widths": ListOf(Whole(0, 8), 0, 3), "ratio": Real(Range(above=0, most=8)), "kind": OneOf(("st", "full"))},
)


@pytest.mark.parametrize(
    ("schema", "legal", "illegal"),
    [
        (SIZE, [1, 512], [0, 513, 1.0, True, "1", None, 10**5000]),
        (Whole(), [0, -(2**63)], [2**63 + 1, False]),
        (Real(), [0, -1.5, 2**62], [float("nan"), float("inf"), True, "1", 10**5000, 1e301]),
        (Real(Range(least=0, below=1)), [0, 0.5], [1, -0.1]),
        (Text(3), ["", "äöü"], ["abcd", b"abc", None]),
        (FLAG, [True, False], [1, 0, None, "true"]),
        (OneOf((None, 1, "a")), [None, 1, "a"], [True, 1.0, "b"]),
        (optional(SIZE), [None, 3], [0, "x"]),
        (Either((SIZE, ListOf(SIZE))), [3, [3, 4]], [[0], "x", None]),
        (ListOf(SIZE, 1, 3), [[1], (1, 2, 3)], [[], [1] * 4, [0], 1, {"a": 1}, "12"]),
        (MapOf(SIZE, 2), [{}, {"a": 1}], [{"a": 0}, {1: 1}, {"a": 1, "b": 1, "c": 1}, {"a" * 2000: 1}, []]),
        (Instance(set, "a set"), [set()], [[], None]),
        (PLAIN, [None, True, 1.5, "a", [[{"a": [None]}]], {"a": ()}], [float("nan"), {1: 2}, set(), [b""], 10**400]),
        (MODEL, [{"heads": 1}, {"heads": 2, "new": [1]}], [{}, [], {"heads": 0}, {"heads": 1, "new": b""}]),
    ],
)
def test_values_are_accepted_or_refused(schema: Schema, legal: list[Any], illegal: list[Any]) -> None:
    assert [value for value in legal if not fits(schema, value)] == []
    assert [value for value in illegal if fits(schema, value)] == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"heads": 0}, "a.pt: config.model.heads: expected an integer from 1 to 512, found 0."),
        ({"heads": 1, "widths": [0, 9]}, "a.pt: config.model.widths[1]: expected an integer from 0 to 8, found 9."),
        ({"heads": 1, "widths": [0] * 10**5}, "a.pt: config.model.widths: expected a list of 0 to 3 values, found"),
        ({"heads": 1, "ratio": 0}, "a.pt: config.model.ratio: expected a number, above 0 and at most 8, found 0."),
        ({"heads": 1, "kind": "x" * 100}, "a.pt: config.model.kind: expected 'st' or 'full', found 'xxx"),
        ({"heads": 10**5000}, "found a larger number."),
        ({"heads": {"a": 1}}, "found an object of 1 keys."),
        ({"heads": 1, "\x1b[2J": set()}, r"a.pt: config.model.'\x1b[2J': expected a plain value, found a set."),
        ({}, "a.pt: config.model: 'heads' is missing."),
        (3, "a.pt: config.model: expected an object, found 3."),
    ],
)
def test_messages_name_the_file_and_the_path(value: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(MODEL, value, "a.pt", CheckpointError, "config.model")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_plain_values_are_bounded_in_depth_and_number() -> None:
    deep: Any = 0
    for _ in range(50_000):
        deep = [deep]
    shared: Any = [0] * 10
    for _ in range(15):  # 10^16 values, if they were visited one by one
        shared = [shared] * 10
    endless: list[Any] = []
    endless.append(endless)
    for value in (deep, shared, endless, [0] * 10**6, [[0] * 99_000] * 99_000):
        assert not fits(PLAIN, value)
    assert fits(Plain(depth=2, nodes=3), [[0]])
    assert not fits(Plain(depth=1, nodes=3), [[0]])
    assert not fits(Plain(depth=2, nodes=2), [[0]])


def test_a_rule_compares_values() -> None:
    schema = Record(
        {"a": ListOf(SIZE), "b": ListOf(SIZE)}, rule=lambda v: "other lengths" * (len(v["a"]) != len(v["b"]))
    )
    assert fits(schema, {"a": [1], "b": [2]})
    assert not fits(schema, {"a": [1], "b": []})


@pytest.mark.parametrize("kind", [CodecOptions, TextOptions, ModelOptions, MemoryOptions, GenerationDefaults])
def test_options_have_the_schema_of_their_types(kind: type) -> None:
    values = asdict(kind())
    assert fits(of_options(kind), values)
    for name in values:
        assert not fits(of_options(kind), {**values, name: {"a": 1}}), name


@pytest.mark.parametrize(
    ("kind", "values", "legal"),
    [
        (ModelOptions, {"depth": 3, "patch_size": [1, 2, 2]}, True),
        (ModelOptions, {"depth": 0}, False),
        (ModelOptions, {"patch_size": [1, 2]}, False),
        (ModelOptions, {"patch_size": [0, 1, 1]}, False),
        (ModelOptions, {"attention_type": "none"}, False),
        (GenerationDefaults, {"sample_guidance_interval": (0.0, 1.5)}, False),
        (MemoryOptions, {"memory_layers": (1, 2)}, True),
    ],
)
def test_ranges_of_options_are_checked(kind: type, values: dict[str, Any], legal: bool) -> None:
    assert fits(of_options(kind), values) == legal
    assert not fits(of_options(ModelOptions, most=512), {"depth": 513})
