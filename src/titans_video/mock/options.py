"""Flags of `titans-video data mock`."""

from dataclasses import dataclass
from typing import Literal

World = Literal["moving", "bounce"]


@dataclass(frozen=True)
class MockOptions:
    """What clips, and how many."""

    world: World = "moving"
    """moving: a shape that goes one way; bounce: one that bounces off the borders for ever, for long video."""
    out: str = "outputs/mock"
    """Folder to write; an earlier data set of this command in it is replaced, anything else is refused."""
    clips: int = 1000
    """How many clips."""
    seed: int = 0
    """Seed of everything random: equal flags give equal clips."""
    size: int = 32
    """Side of the square frames in pixels."""
    frames: int = 8
    """Frames of a clip."""
    fps: float = 8.0
    """Frames a second."""
    i2v_share: float = 0.25
    """Share of the rows with task i2v and a reference picture, the clip's first frame."""
    include_held_out: bool = False
    """Draw from all 48 combinations, also from the 8 that are kept back to test composition (moving)."""
    workers: int = 1
    """Threads that render and encode."""
