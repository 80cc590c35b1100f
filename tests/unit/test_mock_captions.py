"""Reworded, neutral and contradicting captions: what they say, and that equal seeds give equal words."""

import numpy as np
import pytest

from titans_video.mock import captions
from titans_video.mock.world import COLOURS, HELD_OUT, SEEN, SHAPES, Combination

EVERY = (*SEEN[::7], *HELD_OUT[::3])


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("wanted", EVERY, ids=lambda wanted: wanted.caption)
def test_reworded_captions_keep_the_three_words(wanted: Combination) -> None:
    made = {captions.rephrase(wanted, rng(seed)) for seed in range(60)}
    assert len(made) > 40
    for text in made:
        words = text.lower()
        assert wanted.colour in words
        assert wanted.shape in words
        assert not any(other in words.split() for other in {*COLOURS, *SHAPES} - {wanted.colour, wanted.shape})
        assert text == " ".join(text.split())
    assert any(text.isupper() for text in made)
    assert any("," in text for text in made)


@pytest.mark.parametrize("direction", ["left", "up", None])
def test_neutral_captions_name_no_colour_and_no_shape(direction: str | None) -> None:
    made = {captions.neutral(direction, rng(seed)) for seed in range(200)}
    assert len(made) > 15
    assert not any(word in text.lower() for text in made for word in (*COLOURS, *SHAPES))
    assert all((direction or "") in text.lower() or direction == "up" for text in made)
    assert ("" in made) == (direction is None)


@pytest.mark.parametrize("wanted", EVERY, ids=lambda wanted: wanted.caption)
def test_contradicting_combinations_are_trained_ones_of_the_same_direction(wanted: Combination) -> None:
    some = [captions.contradict(wanted, rng(seed)) for seed in range(100)]
    both = [captions.contradict(wanted, rng(seed), both=True) for seed in range(100)]
    assert all(c in SEEN and c.direction == wanted.direction and c != wanted for c in (*some, *both))
    assert all(c.colour != wanted.colour and c.shape != wanted.shape for c in both)
    assert any(c.colour == wanted.colour or c.shape == wanted.shape for c in some)


def test_equal_seeds_give_equal_captions_and_plain_ones_stay_plain() -> None:
    wanted = SEEN[3]
    for kind in captions.KINDS:
        assert captions.row_caption(wanted, kind, True, rng(1)) == captions.row_caption(wanted, kind, True, rng(1))
    assert captions.row_caption(wanted, "own", False, rng(1)) == wanted.caption
