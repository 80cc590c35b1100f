"""Contact sheets: clips as rows of frames with their captions, in one PNG; and the still of a video."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from titans_video.files import atomic_path
from titans_video.media.colour import Pixels
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAPER, _INK = (250, 250, 248), (28, 28, 30)
_SMALLEST, _LARGEST = 96, 240  # pixels: smaller heights are enlarged to the first, longer sides reduced to the second
_MARGIN, _GAP, _BETWEEN = 20, 2, 14
_CAPTION, _TITLE = 15, 20
_MOST_LINES = 2
_READABLE = 192  # pixels of the shorter side of clips with captions below

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
    """Lay clips out as strips of frames, each under its caption; return the path of the PNG.

    Small clips are enlarged by whole numbers without smoothing; large ones are reduced.

    Args:
        clips: each uint8 (T, H, W, 3); sizes and lengths may differ.
        captions: one per clip, wrapped to two lines, then cut with an ellipsis.
        columns: strips per row.
        frames: at most this many per clip, evenly spread from the first to the last.
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
    with atomic_path(Path(path)) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return Path(path)


def side_by_side(clips: Sequence[Pixels], captions: Sequence[str]) -> Pixels:
    """Return one clip, uint8 (T, H, W, 3), with the clips next to each other and a caption below each.

    Small clips are enlarged by whole numbers, so that captions can be read. All have the height of the first one, and
    the last frame of a shorter clip stays.
    """
    times = max(1, -(-_READABLE // min(clips[0].shape[1:3])))
    height = clips[0].shape[1] * times
    widths = [round(clip.shape[2] * height / clip.shape[1]) for clip in clips]
    font = _font(_CAPTION, captions)
    texts = [_wrap(caption, font, width) for caption, width in zip(captions, widths, strict=True)]
    line = _line_height(font)
    size = sum(widths) + _GAP * (len(clips) - 1), height + line * max(map(len, texts)) + _GAP
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    lefts = [sum(widths[:i]) + _GAP * i for i in range(len(clips))]
    for left, lines in zip(lefts, texts, strict=True):
        for k, text in enumerate(lines):
            draw.text((left, height + _GAP + k * line), text, fill=_INK, font=font)
    frames = []
    for number in range(max(map(len, clips))):
        for clip, left, width in zip(clips, lefts, widths, strict=True):
            image = Image.fromarray(clip[min(number, len(clip) - 1)])
            page.paste(image.resize((width, height), Image.Resampling.NEAREST if times > 1 else None), (left, 0))
        frames.append(np.asarray(page).copy())
    return np.stack(frames)


def frames_strip(clip: Pixels, frames: int = 8) -> Image.Image:
    """Return at most `frames` frames of a clip, uint8 (T, H, W, 3), next to each other, at a viewable size."""
    count = min(frames, len(clip))
    picked = np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))
    images = [_sized(Image.fromarray(clip[i])) for i in picked]
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * (width + _GAP) - _GAP, height), _PAPER)
    for k, image in enumerate(images):
        strip.paste(image, (k * (width + _GAP), 0))
    return strip


def _sized(image: Image.Image) -> Image.Image:
    """Enlarge by a whole number, or reduce with antialiasing so that the longer side fits."""
    width, height = image.size
    if height < _SMALLEST:
        times = max(1, min(-(-_SMALLEST // height), 3 * _LARGEST // width))
        return image.resize((width * times, height * times), Image.Resampling.NEAREST)
    scale = min(1.0, _LARGEST / max(width, height))
    if scale == 1.0:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _font(size: int, texts: Sequence[str]) -> Font:
    """Return Pillow's own font, or for Chinese, Japanese or Korean texts the first suitable font of the system."""
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
    """Wrap to at most `_MOST_LINES` lines of `width`; the last ends in an ellipsis if text is missing."""
    rest = " ".join(text.split())
    lines: list[str] = []
    while len(lines) < _MOST_LINES - 1 and (fits := _letters_that_fit(rest, font, width)) < len(rest):
        space = rest.rfind(" ", 0, fits + 1)
        end = space if space > 0 else max(fits, 1)  # without spaces, as in Chinese, it breaks anywhere
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, _fit(rest, font, width)]


def _fit(text: str, font: Font, width: int) -> str:
    fits = _letters_that_fit(text, font, width)
    if fits == len(text):
        return text
    return text[: _letters_that_fit(text[:fits], font, width - int(font.getlength("…")) - 1)].rstrip() + "…"


def _letters_that_fit(text: str, font: Font, width: int) -> int:
    return bisect_right(range(1, len(text) + 1), width, key=lambda count: ceil(font.getlength(text[:count])))


def middle_still(path: Path, side: int) -> bytes:
    """Return the middle frame of a video as JPEG, whose longest side is at most `side` pixels."""
    info = probe(path)
    picture = Image.fromarray(read_indices(path, info, [info.frames // 2])[0])
    scale = min(1.0, side / max(picture.size))
    if scale < 1:
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
