"""Reworded, neutral and contradicting captions: what they say, and that equal seeds give equal words."""

from itertools import pairwise

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
    assert all(caption.strip() for caption in made)  # a row without a caption would be left out
    assert len(made) > 15
    assert not any(word in text.lower() for text in made for word in (*COLOURS, *SHAPES))
    assert all((direction or "") in text.lower() or direction == "up" for text in made)


@pytest.mark.parametrize("wanted", EVERY, ids=lambda wanted: wanted.caption)
def test_contradicting_combinations_are_trained_ones_of_the_same_direction(wanted: Combination) -> None:
    made = [captions.contradict(wanted, rng(seed)) for seed in range(50)]
    assert all(c in SEEN and c.direction == wanted.direction for c in made)
    assert all(c.colour != wanted.colour and c.shape != wanted.shape for c in made)
    assert len(set(made)) > 2


def test_captions_of_any_content_say_nothing_about_the_clip() -> None:
    """Shares of agreement are those of chance: 1 of 4 colours and 1 of 3 shapes."""
    rows = [(wanted, captions.row_caption(wanted, "any", False, rng(seed))) for seed in range(50) for wanted in SEEN]
    assert {caption for _, caption in rows} == {c.caption for c in SEEN}
    assert all(wanted.direction == caption.split()[-1] for wanted, caption in rows)
    assert np.mean([wanted.colour in caption for wanted, caption in rows]) == pytest.approx(1 / 4, abs=0.04)
    assert np.mean([wanted.shape in caption for wanted, caption in rows]) == pytest.approx(1 / 3, abs=0.04)


def test_equal_seeds_give_equal_captions_and_plain_ones_stay_plain() -> None:
    wanted = SEEN[3]
    for kind in captions.IMAGE_KINDS:
        assert captions.row_caption(wanted, kind, True, rng(1)) == captions.row_caption(wanted, kind, True, rng(1))
    assert captions.row_caption(wanted, "own", False, rng(1)) == wanted.caption


def test_paraphrases_have_the_right_article() -> None:
    words = [sentence.split() for wanted in SEEN for sentence in captions.paraphrases(wanted)]
    pairs = [(a, b) for sentence in words for a, b in pairwise(sentence) if a in ("a", "an")]
    assert ("an", "emerald") in pairs
    assert all((article == "an") == (word[0] in "aeiou") for article, word in pairs)
