"""Contact sheets: clips as rows of frames with their captions, in one PNG to look at."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from titans_video.media.colour import Pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAPER, _INK, _FAINT = (250, 250, 248), (28, 28, 30), (120, 120, 124)
_SMALLEST, _LARGEST = 96, 240  # pixels: frames are enlarged to and reduced to heights about these
_MARGIN, _GAP, _BETWEEN = 20, 2, 14
_CAPTION, _TITLE = 15, 20
_MOST_LINES = 2

_EASTERN_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "msyh.ttc",
    "DroidSansFallbackFull.ttf",
)


def contact_sheet(
    path: Path | str,
    clips: Sequence[Pixels],
    captions: Sequence[str],
    *,
    columns: int = 1,
    frames: int = 8,
    title: str = "",
) -> Path:
    """Lay clips out as strips of frames, each under its caption.

    Small clips are enlarged by whole numbers without smoothing, so that their pixels are seen; large ones are reduced.

    Args:
        path: of the PNG; its folder is made.
        clips: each uint8 (T, H, W, 3); sizes and lengths may differ.
        captions: one a clip; wrapped to two lines, then cut with an ellipsis.
        columns: strips side by side.
        frames: of each clip at most, evenly spread from the first to the last.
    Returns:
        The path.
    """
    if len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips but {len(captions)} captions")
    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    strips = [frames_strip(clip, frames) for clip in clips]
    font, title_font = _font(_CAPTION, captions), _font(_TITLE, [title])
    width = max(strip.width for strip in strips)
    texts = [_wrap(caption, font, width) for caption in captions]
    line = _line_height(font)
    top = _MARGIN + (_line_height(title_font) + _BETWEEN if title else 0)
    rows = [range(start, min(start + columns, len(strips))) for start in range(0, len(strips), columns)]
    text_heights = [line * max(len(texts[i]) for i in row) for row in rows]
    heights = [text + max(strips[i].height for i in row) for text, row in zip(text_heights, rows, strict=True)]
    across = min(columns, len(strips))
    size = (
        2 * _MARGIN + across * width + (across - 1) * _MARGIN,
        top + sum(heights) + (len(rows) - 1) * _BETWEEN + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN), _fit(title, title_font, size[0] - 2 * _MARGIN), fill=_INK, font=title_font)
    y = top
    for row, text_height, height in zip(rows, text_heights, heights, strict=True):
        for column, i in enumerate(row):
            x = _MARGIN + column * (width + _MARGIN)
            first_line = y + text_height - line * len(texts[i])
            for k, text in enumerate(texts[i]):
                draw.text((x, first_line + k * line), text, fill=_INK, font=font)
            sheet.paste(strips[i], (x, y + text_height))
        y += height + _BETWEEN
    return _save(sheet, Path(path))


def frames_strip(clip: Pixels, frames: int = 8) -> Image.Image:
    """At most `frames` frames of a clip side by side, at a size that can be looked at.

    Args:
        clip: uint8 (T, H, W, 3).
    """
    count = min(frames, len(clip))
    picked = np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))
    pictures = [_sized(Image.fromarray(clip[i])) for i in picked]
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height), _PAPER)
    for k, picture in enumerate(pictures):
        strip.paste(picture, (k * (width + _GAP), 0))
    return strip


def _sized(picture: Image.Image) -> Image.Image:
    """Enlarged by a whole number, or reduced with antialiasing; the longer side counts when reducing."""
    width, height = picture.size
    if height < _SMALLEST:
        times = max(1, min(-(-_SMALLEST // height), 3 * _LARGEST // width))
        return picture.resize((width * times, height * times), Image.Resampling.NEAREST)
    scale = min(1.0, _LARGEST / max(width, height))
    if scale == 1.0:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _font(size: int, texts: Sequence[str]) -> Font:
    """Pillow's own font, or for texts with Chinese, Japanese or Korean the first font for them that the system has."""
    if any("\u2e80" <= letter <= "\uffef" for text in texts for letter in text):
        for name in _EASTERN_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size=size)


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Äg|")
    return int(bottom - min(top, 0)) + 5


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """At most `_MOST_LINES` lines no wider than `width`; the last ends in an ellipsis if more was to come."""
    rest = " ".join(text.split())
    lines: list[str] = []
    while len(lines) < _MOST_LINES - 1 and (fits := _letters_that_fit(rest, font, width)) < len(rest):
        space = rest.rfind(" ", 0, fits + 1)
        end = space if space > 0 else max(fits, 1)  # without spaces, as in Chinese, it breaks anywhere
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, _fit(rest, font, width)]


def _fit(text: str, font: Font, width: int) -> str:
    """The text, or its beginning with an ellipsis, in one line."""
    fits = _letters_that_fit(text, font, width)
    if fits == len(text):
        return text
    return text[: _letters_that_fit(text[:fits], font, width - int(font.getlength("…")) - 1)].rstrip() + "…"


def _letters_that_fit(text: str, font: Font, width: int) -> int:
    """How many letters from the start are no wider than `width`."""
    return bisect_right(range(1, len(text) + 1), width, key=lambda count: ceil(font.getlength(text[:count])))


def _save(sheet: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        sheet.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
