"""Declared ranges of options: which values pass, the messages about others, and that every number has a range."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.cli.data import CheckFlags, VerifyFlags
from titans_video.cli.generate import ExportFlags, GenerateFlags
from titans_video.cli.main import main
from titans_video.cli.train import ReportFlags
from titans_video.config.fields import OptionGroup, Range, flag_of, is_group, validate
from titans_video.config.generation import DemoOptions, MockOptions, ScoreOptions
from titans_video.config.options import DataOptions, GenerationDefaults, TrainOptions, ValidationOptions
from titans_video.config.recipes import (
    FinetuneOptions,
    LoraRunOptions,
    SoraOptions,
    SVDOptions,
    TitansOptions,
    TuneOptions,
)
from titans_video.errors import ConfigError

EVERY_COMMAND: tuple[OptionGroup, ...] = (
    SoraOptions(),
    TitansOptions(),
    SVDOptions(),
    LoraRunOptions(),
    FinetuneOptions(),
    CheckFlags(),
    VerifyFlags(),
    GenerateFlags(),
    ExportFlags(),
    DemoOptions(),
    ScoreOptions(),
    MockOptions(),
    ReportFlags(),
)


def groups_of(options: OptionGroup) -> Iterator[OptionGroup]:
    """Yield a dataclass and all dataclasses in it."""
    yield options
    for field in fields(options):
        if is_group(value := getattr(options, field.name)):
            yield from groups_of(value)


def numeric_types(hint: Any) -> set[type]:
    """Return which of int and float occur in a type."""
    inner = set().union(*map(numeric_types, get_args(hint)), set())
    return inner | ({hint} if hint in (int, float) else set())


def ranges_of(hint: Any) -> list[Range]:
    return [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]


GROUPS = {type(group): group for command in EVERY_COMMAND for group in groups_of(command)}
NUMBERS = [
    (group, name, hint)
    for group in GROUPS.values()
    for name, hint in get_type_hints(type(group), include_extras=True).items()
    if numeric_types(hint)
]


def test_every_numeric_option_declares_its_range() -> None:
    assert len(NUMBERS) > 90
    assert [name for _, name, hint in NUMBERS if not ranges_of(hint)] == []


def numbers_in(legal: Range, kind: type) -> st.SearchStrategy[Any]:
    low = legal.least if legal.least is not None else legal.above
    high = legal.most if legal.most is not None else legal.below
    if kind is int:
        assert (legal.above, legal.below) == (None, None)
        return st.integers(None if low is None else math.ceil(low), None if high is None else math.floor(high))
    return st.floats(
        low,
        high,
        exclude_min=legal.above is not None,
        exclude_max=legal.below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


def numbers_outside(legal: Range, kind: type) -> st.SearchStrategy[Any]:
    outside = [] if kind is int else [st.sampled_from([math.nan, math.inf, -math.inf])]
    anything: Any = st.integers if kind is int else st.floats
    if legal.least is not None:
        outside.append(anything(max_value=legal.least).filter(lambda x: x < legal.least))
    if legal.above is not None:
        outside.append(anything(max_value=legal.above))
    if legal.most is not None:
        outside.append(anything(min_value=legal.most).filter(lambda x: x > legal.most))
    if legal.below is not None:
        outside.append(anything(min_value=legal.below))
    return st.one_of(outside)


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize(("group", "name", "hint"), NUMBERS, ids=[f"{type(g).__name__}-{n}" for g, n, _ in NUMBERS])
def test_a_value_passes_exactly_if_it_is_in_its_range(group: Any, name: str, hint: Any, data: st.DataObject) -> None:
    (kind,) = numeric_types(hint)
    ranges, default = ranges_of(hint), getattr(group, name)
    is_tuple = "tuple" in str(hint)
    count = len(default) if isinstance(default, tuple) else 2 if is_tuple else 1
    each = ranges * count if len(ranges) == 1 else ranges
    inside = [data.draw(numbers_in(legal, kind)) for legal in each]
    validate(replace(group, **{name: tuple(inside) if is_tuple else inside[0]}))
    if each == [Range()] and kind is int:  # every integer is legal
        return
    at = data.draw(st.sampled_from([i for i, legal in enumerate(each) if legal != Range() or kind is float]))
    inside[at] = data.draw(numbers_outside(each[at], kind))
    with pytest.raises(ConfigError, match=f"^{flag_of(name)} .*must be {each[at]}"):
        validate(replace(group, **{name: tuple(inside) if is_tuple else inside[0]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(lr=0), "--lr 0: it must be above 0."),
        (TrainOptions(betas=(0.9, 1.5)), "--betas 0.9,1.5: 1.5 must be at least 0 and below 1."),
        (TuneOptions(noise_aug=(-3.0, -1.0)), "--noise-aug -3,-1: -1 must be at least 0."),
        (DataOptions(max_bad=math.nan), "--max-bad nan: it must be at least 0 and at most 1."),
        (SoraOptions(validation=ValidationOptions(validation_times=0)), "--validation-times 0: it must be at least 1."),
        (GenerationDefaults(sample_guidance_interval=(-0.5, 1)), "--sample-guidance-interval -0.5,1: -0.5 must be"),
    ],
)
def test_a_message_has_flag_value_and_bounds(options: OptionGroup, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        validate(options)
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate --steps 0", "--steps 0: it must be at least 1."),
        ("score --batch-size 0", "--batch-size 0: it must be at least 1."),
        ("demo --clips 0", "--clips 0: it must be at least 1."),
        ("data mock --seed -1", "--seed -1: it must be at least 0."),
        ("data check --fps 0", "--fps 0: it must be above 0."),
        ("train titans --heads 0", "--heads 0: it must be at least 1."),
        ("train svd --sigma-std 0", "--sigma-std 0: it must be above 0."),
        ("train cogvideox-lora --rank 0", "--rank 0: it must be at least 1."),
    ],
)
def test_every_command_checks_its_ranges(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
