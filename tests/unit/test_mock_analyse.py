"""The analyser reads true clips correctly, also from files, and reports nothing that is not there."""

from pathlib import Path

import numpy as np
import pytest

from titans_video.media.probe import probe
from titans_video.media.reading import read_indices
from titans_video.media.writing import write_video
from titans_video.mock import world
from titans_video.mock.analyse import STRICT_OVERLAP, UNKNOWN, analyse, object_centres
from titans_video.mock.world import COLOURS, SHAPES, Clip, sample_clip


def through_a_file(frames: np.ndarray, path: Path) -> np.ndarray:
    write_video(path, frames, 8)
    return read_indices(path, probe(path), range(len(frames)))


def shares_right(clips, frames_of) -> np.ndarray:
    """Return the shares of clips with the right colour, shape, direction and strict shape."""
    rights = []
    for clip in clips:
        read, true = analyse(frames_of(clip)), clip.combination
        rights.append(
            (
                read.colour == true.colour,
                read.shape == true.shape,
                read.direction == true.direction,
                read.strict_shape == true.shape,
            )
        )
    return np.mean(rights, axis=0)


def sample_clips(seed: int, count: int, size: int = 32, frames: int = 8) -> list[Clip]:
    return [sample_clip(seed, index, None, size, frames) for index in range(count)]


def ground(frames: np.ndarray) -> np.ndarray:
    return np.median(frames.reshape(-1, 3), axis=0)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clips():
    return sample_clips(11, 96)


def test_reads_true_clips_from_files(tmp_path):
    shares = shares_right(sample_clips(21, 240), lambda c: through_a_file(c.frames, tmp_path / "a.mp4"))
    assert (shares >= 0.99).all(), shares


@pytest.mark.long
def test_reads_2000_true_clips_from_files(tmp_path):
    shares = shares_right(sample_clips(22, 2000), lambda c: through_a_file(c.frames, tmp_path / "a.mp4"))
    assert (shares >= 0.99).all(), shares


@pytest.mark.parametrize(("size", "frames"), [(24, 8), (64, 8), (32, 17)])
def test_reads_other_sizes_and_lengths(size, frames):
    assert (shares_right(sample_clips(2, 48, size, frames), lambda c: c.frames) >= 0.99).all()


def test_bears_mild_noise(clips):
    rng = np.random.default_rng(0)
    assert (shares_right(clips, lambda c: to_bytes(c.frames + rng.normal(0, 6, c.frames.shape))) >= 0.99).all()


def test_reversed_clips_move_the_other_way(clips):
    other = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert all(analyse(c.frames[::-1]).direction == other[c.combination.direction] for c in clips)


def test_frozen_clips_have_no_direction(clips):
    reads = [analyse(np.repeat(c.frames[:1], 8, axis=0)) for c in clips]
    assert all(r.direction == UNKNOWN for r in reads)
    assert all(r.shape == c.combination.shape for r, c in zip(reads, clips, strict=True))


def test_jumping_objects_have_no_direction(clips):
    rng = np.random.default_rng(1)
    reads = [analyse(c.frames[rng.permutation(8)]) for c in clips]
    assert np.mean([r.direction == c.combination.direction for r, c in zip(reads, clips, strict=True)]) < 0.15


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((8, 32, 32, 3), dtype=np.uint8),
        np.full((8, 32, 32, 3), 200, dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
        np.repeat(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), dtype=np.uint8), 3, axis=3),
        np.random.default_rng(0).integers(0, 60, (8, 32, 32, 3), dtype=np.uint8),
    ],
    ids=["black", "bright", "colour noise", "grey noise", "dark noise"],
)
def test_nothing_is_seen_in_nothing(frames):
    read = analyse(frames)
    assert (read.colour, read.shape, read.direction) == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert np.isnan(object_centres(frames)).all()


def test_paints_that_are_no_colour_of_the_world(clips):
    for paint in ((200, 200, 200), (200, 40, 200), (40, 200, 200)):
        masks = world.coverage("circle", np.array([[8.0 + i, 16.0] for i in range(8)]), 6.5, 32, 32)[..., None]
        read = analyse(to_bytes(30 + masks * (np.array(paint) - 30.0)))
        assert read.colour == UNKNOWN
        assert (read.shape, read.direction) == ("circle", "right")


def strict_share(clips, change) -> float:
    return float(np.mean([analyse(change(c.frames)).strict_shape == c.combination.shape for c in clips]))


def test_two_objects_are_no_shape(clips):
    assert strict_share(clips, lambda f: np.maximum(f, np.roll(f, 16, axis=2))) == 0
    assert strict_share(clips, lambda f: np.maximum(f, np.roll(f, 14, axis=1))) == 0


def test_faded_and_vanishing_objects_are_not_strictly_right(clips):
    assert strict_share(clips, lambda f: to_bytes(ground(f) + 0.6 * (f - ground(f)))) == 0
    assert strict_share(clips, lambda f: np.concatenate([f[:5], np.full_like(f[:3], 25)])) == 0


def test_an_object_of_one_frame_has_no_colour(clips):
    for clip in clips[:8]:
        dark = np.full_like(clip.frames[1:], 25)
        assert analyse(np.concatenate([clip.frames[:1], dark])).colour == UNKNOWN


def test_holes_and_confetti_are_not_strictly_right(clips):
    rng = np.random.default_rng(2)

    def with_holes(frames):
        return np.where(rng.random((*frames.shape[:3], 1)) < 0.2, ground(frames), frames).astype(np.uint8)

    def with_confetti(frames):
        paint = frames.reshape(-1, 3)[frames.reshape(-1, 3).astype(int).sum(axis=1).argmax()]
        return np.where(rng.random((*frames.shape[:3], 1)) < 0.04, paint, frames).astype(np.uint8)

    assert strict_share(clips, with_holes) == 0
    assert strict_share(clips, with_confetti) == 0


def test_half_of_the_object_in_another_colour_is_no_colour():
    masks = world.coverage("square", np.array([[8.0 + i, 16.0] for i in range(8)]), 7.0, 32, 32)[..., None]
    upper = (np.arange(32) < 16)[None, :, None, None]
    paint = np.where(upper, np.array(COLOURS["red"]), np.array(COLOURS["blue"]))
    assert analyse(to_bytes(30 + masks * (paint - 30.0))).colour == UNKNOWN


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_overlaps_others_less_than_itself(shape):
    masks = world.coverage(shape, np.array([[9.0 + i, 16.0] for i in range(8)]), 7.0, 32, 32)[..., None]
    read = analyse(to_bytes(30 + masks * (np.array(COLOURS["green"]) - 30.0)))
    assert (read.shape, read.strict_shape) == (shape, shape)
    assert read.overlap > STRICT_OVERLAP + 0.1


def test_place_is_the_centre_to_a_fraction_of_a_pixel():
    centres = np.array([[9.3 + 1.2 * i, 15.7] for i in range(8)])
    for shape in SHAPES:
        masks = world.coverage(shape, centres, 6.0, 32, 32)[..., None]
        frames = to_bytes(25 + masks * (np.array(COLOURS["blue"]) - 25.0))
        assert np.abs(object_centres(frames) - centres).max() < 0.2
