"""Synthetic clips whose next segment depends on more than the last window, so only a memory can predict it.

Legend: B clips, n segments, F frames of a segment, L side in pixels; clips are (B, 3, n F, L, L) in [-1, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_video.types import TextCondition

SIDE, FRAMES, SQUARE = 16, 4, 7
PHASES = ("show", "hidden", "reveal")
BACKGROUND = -0.6
COLOURS = torch.tensor(
    [
        [1.0, -0.8, -0.8],  # red
        [-0.8, 1.0, -0.8],  # green
        [-0.8, -0.8, 1.0],  # blue
        [1.0, 1.0, -0.8],  # yellow
        [1.0, -0.8, 1.0],  # magenta
        [-0.8, 1.0, 1.0],  # cyan
        [1.0, 1.0, 1.0],  # white
        [1.0, 0.1, -0.8],  # orange
    ]
)


@dataclass(frozen=True)
class Clips:
    """A batch of clips.

    Attributes:
        pixels: (B, 3, n F, L, L).
        identity: the colours to recall: (B,) of one object, (B, n / 2) of a code.
        texts: of each segment; it contains only the phase.
        asked: the segments that need a memory.
    """

    pixels: Tensor
    identity: Tensor
    texts: tuple[TextCondition, ...]
    asked: range


def phase_text(phase: str, batch: int) -> TextCondition:
    """Encode the phase of a segment as one token."""
    one_hot = torch.zeros(batch, 1, len(PHASES))
    one_hot[..., PHASES.index(phase)] = 1.0
    return TextCondition((one_hot,), (torch.ones(batch, 1, dtype=torch.bool),))


def occluded_identity(
    batch: int, hidden: int, generator: torch.Generator, colours: int = len(COLOURS), square: int = SQUARE
) -> Clips:
    """Draw clips of occluded identity recall: a moving coloured square, `hidden` segments of curtain, the square again.

    The curtain's stripes and the square's positions and directions are random and independent of the colour.
    """
    colour = torch.randint(colours, (batch,), generator=generator)
    show = _squares(colour, generator, square)
    curtain = _curtain(batch, hidden * FRAMES, generator)
    reveal = _squares(colour, generator, square)
    phases = ["show"] + ["hidden"] * hidden + ["reveal"]
    texts = tuple(phase_text(p, batch) for p in phases)
    return Clips(torch.cat((show, curtain, reveal), 2), colour, texts, range(hidden + 1, hidden + 2))


def code_replay(batch: int, length: int, colours: int, generator: torch.Generator) -> Clips:
    """Draw a code of colours, one per segment, then the same code again: log2(colours) bits per segment."""
    code = torch.randint(colours, (batch, length), generator=generator)
    shown = [_squares(code[:, i], generator) for i in range(length)]
    asked = [_squares(code[:, i], generator) for i in range(length)]
    phases = ["show"] * length + ["reveal"] * length
    texts = tuple(phase_text(p, batch) for p in phases)
    return Clips(torch.cat(shown + asked, 2), code, texts, range(length, 2 * length))


def read_colour(pixels: Tensor, colours: int = len(COLOURS)) -> Tensor:
    """Return the colour of a segment's square: the one that most pixels are nearest to, without the background.

    Args:
        pixels: (B, 3, F, L, L).
    Returns:
        (B,) int64.
    """
    palette = torch.cat((torch.full((1, 3), BACKGROUND), COLOURS[:colours]))  # (1 + colours, 3)
    x = pixels.clamp(-1, 1).flatten(2).transpose(1, 2)  # (B, F L L, 3)
    nearest = torch.cdist(x, palette.expand(len(x), -1, -1)).argmin(-1)
    votes = torch.nn.functional.one_hot(nearest, len(palette)).sum(1)[:, 1:]
    return votes.argmax(-1)


def _squares(colour: Tensor, generator: torch.Generator, square: int = SQUARE) -> Tensor:
    """Draw a square that moves a pixel per frame from a random position: (B, 3, F, L, L)."""
    batch = len(colour)
    step = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])[torch.randint(4, (batch,), generator=generator)]
    room = SIDE - square - 2 * (FRAMES - 1)
    start = torch.randint(room + 1, (batch, 2), generator=generator) + FRAMES - 1
    at = start[:, None] + step[:, None] * torch.arange(FRAMES)[:, None]  # (B, F, 2)
    line = torch.arange(SIDE)
    inside = [(line >= at[..., i, None]) & (line < at[..., i, None] + square) for i in (0, 1)]  # each (B, F, L)
    mask = (inside[0][..., :, None] & inside[1][..., None, :])[:, None]  # (B, 1, F, L, L)
    paint = COLOURS[colour][:, :, None, None, None]
    return torch.where(mask, paint, torch.tensor(BACKGROUND))


def _curtain(batch: int, frames: int, generator: torch.Generator) -> Tensor:
    """Draw drifting stripes of random greys that cover everything."""
    greys = torch.rand(batch, SIDE, generator=generator) * 1.6 - 0.8
    shift = torch.randint(1, 4, (batch,), generator=generator)
    column = (torch.arange(SIDE) + shift[:, None, None] * torch.arange(frames)[:, None]) % SIDE  # (B, frames, L)
    stripes = greys[:, None].expand(-1, frames, -1).gather(2, column)
    return stripes[:, None, :, None, :].expand(-1, 3, -1, SIDE, -1)
