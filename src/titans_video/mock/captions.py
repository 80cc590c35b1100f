"""Other words for the captions of the moving world, and captions that leave the content of an image to the image.

A text encoder trained with the model knows only the wording that it has read, so some captions are rephrased. A model
whose images always show what their captions say may ignore the images, so some rows with an image have a neutral
caption (direction or nothing) or one with any colour and shape. The direction is always the caption's.
"""

import re
from typing import Literal

import numpy as np

from titans_video.mock.world import SEEN, Combination

RowKind = Literal["own", "neutral", "any"]
IMAGE_KINDS: tuple[RowKind, ...] = ("neutral", "any", "any")  # kinds of captions for rows with an image, in turn

_OBJECTS = (
    "a {colour} {shape}",
    "a {colour} {shape}",
    "the {colour} {shape}",
    "{colour} {shape}",
    "a {shape} that is {colour}",
    "a {shape}, {colour},",
    "a {shape} in {colour}",
)
_NEUTRAL_OBJECTS = ("", "", "an object", "the object", "a shape", "the shape", "something", "it")
_VERBS = (
    "moving",
    "moving",
    "moving",
    "going",
    "moves",
    "goes",
    "that moves",
    "is moving",
    "is going",
    "travelling",
    "",
)
_ALONE = ("moving", "moving", "going", "move", "go", "moves", "")  # verbs without an object before them
_WAYS: dict[str, tuple[str, ...]] = {
    "left": ("left", "left", "to the left", "to the left", "leftwards"),
    "right": ("right", "right", "to the right", "to the right", "rightwards"),
    "up": ("up", "up", "upwards", "to the top"),
    "down": ("down", "down", "downwards", "to the bottom"),
}
_NO_WAY = (
    "a moving object",
    "an object moving",
    "moving",
    "it moves",
    "the object moves",
    "something moves",
    "motion",
)
_OTHER_COLOURS = {
    "red": ("crimson", "scarlet", "ruby", "cherry-coloured", "tomato-coloured", "vermilion"),
    "green": ("emerald", "lime", "grass-coloured", "jade", "olive", "mint"),
    "blue": ("navy", "azure", "cobalt", "sapphire", "sky-coloured", "indigo"),
    "yellow": ("golden", "lemon", "canary", "amber", "mustard-coloured", "sunflower"),
}
_OTHER_SHAPES = {
    "circle": ("ball", "disc", "round dot", "sphere", "ring-shaped blob", "coin"),
    "square": ("box", "block", "tile", "cube", "figure with four equal sides", "quadrangle"),
    "triangle": ("pyramid", "wedge", "figure with three corners", "three-sided shape", "tent shape", "cone"),
}
_OTHER_WAYS = {
    "left": (
        "leftward",
        "towards the left edge",
        "from east to west",
        "westward",
        "to the left-hand side",
        "leftwardly",
    ),
    "right": (
        *("rightward", "towards the right edge", "from west to east", "eastward", "to the right-hand side"),
        "rightwardly",
    ),
    "up": ("upward", "towards the ceiling", "higher and higher", "skyward", "to the upper edge", "from floor to roof"),
    "down": (
        "downward",
        "towards the floor",
        "lower and lower",
        "earthward",
        "to the lower edge",
        "from roof to floor",
    ),
}
_PARAPHRASES = (
    "a {colour} {shape} sliding {way}",
    "{colour} {shape} drifting {way}",
    "we see a {colour} {shape} that travels {way}",
    "one {colour} {shape} heading {way}",
    "there is a {shape}, {colour} all over, gliding {way}",
    "footage of some {colour} {shape} on its journey {way}",
)


def paraphrases(wanted: Combination) -> list[str]:
    """Return six sentences that mean a combination; no caption of the data set has their colours, shapes and verbs.

    Two of the six directions have the word `left` or `right` in another phrase.
    """
    colours, shapes, ways = _OTHER_COLOURS[wanted.colour], _OTHER_SHAPES[wanted.shape], _OTHER_WAYS[wanted.direction]
    parts = zip(_PARAPHRASES, colours, shapes, ways, strict=True)
    found = (text.format(colour=colour, shape=shape, way=way) for text, colour, shape, way in parts)
    return [re.sub(r"\ba (?=[aeiou])", "an ", text) for text in found]


def rephrase(wanted: Combination, rng: np.random.Generator) -> str:
    """Return a caption that says the same in other words, order, case and punctuation."""
    thing = _pick(rng, _OBJECTS).format(colour=wanted.colour, shape=wanted.shape)
    return _spelt(_sentence(thing, wanted.direction, rng), wanted, rng)


def neutral(direction: str | None, rng: np.random.Generator) -> str:
    """Return a caption without colour and shape, and with None also without direction."""
    if direction is None:
        return _cased(_pick(rng, _NO_WAY), rng)
    return _cased(_sentence(_pick(rng, _NEUTRAL_OBJECTS), direction, rng), rng)


def contradict(wanted: Combination, rng: np.random.Generator) -> Combination:
    """Return a trained combination of the same direction with another colour and another shape."""
    others = [c for c in _trained(wanted.direction) if c.colour != wanted.colour and c.shape != wanted.shape]
    return others[int(rng.integers(len(others)))]


def row_caption(wanted: Combination, kind: RowKind, reworded: bool, rng: np.random.Generator) -> str:
    """Return the caption of a row whose clip shows `wanted`.

    `kind` is the relation of caption and clip; `reworded` rephrases it (neutral captions always are).
    """
    if kind == "neutral":
        return neutral(wanted.direction if rng.random() < 0.75 else None, rng)
    pool = [wanted] if kind == "own" else _trained(wanted.direction)
    said = pool[int(rng.integers(len(pool)))]
    return rephrase(said, rng) if reworded else said.caption


def _trained(direction: str) -> list[Combination]:
    return [c for c in SEEN if c.direction == direction]


def _sentence(thing: str, direction: str, rng: np.random.Generator) -> str:
    """Join an object, which may be missing, and its direction: object first, or direction first."""
    way = _pick(rng, _WAYS[direction])
    if not thing:
        return f"{_pick(rng, _ALONE)} {way}".strip()
    comma = "," if rng.random() < 0.25 and not thing.endswith(",") else ""
    if rng.random() < 0.15:
        return f"{_pick(rng, ('moving', 'going', ''))} {way}{comma or ':'} {thing.rstrip(',')}".strip()
    return f"{thing}{comma} {_pick(rng, _VERBS)} {way}".replace("  ", " ")


def _spelt(text: str, wanted: Combination, rng: np.random.Generator) -> str:
    if rng.random() < 0.25:
        word = _pick(rng, (wanted.colour, wanted.shape, wanted.direction))
        text = re.sub(rf"\b{word}\b", word.upper() if rng.random() < 0.7 else word.capitalize(), text)
    return _cased(text, rng)


def _cased(text: str, rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.3:
        text = text[:1].upper() + text[1:]
    elif draw < 0.4:
        text = text.upper()
    return text + ("." if rng.random() < 0.2 else "")


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
