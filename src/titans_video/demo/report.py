"""One page, beside the files that it shows: figures, the loss curve, the dozen, and every video that went wrong."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from titans_video.demo.scoring import Scored, Split, summary
from titans_video.media.plots import page

_TITLES: dict[Split, str] = {
    "seen": "seen combinations",
    "held_out": "held-out combinations",
    "i2v": "given a first frame",
}

_STYLE = """
td,th{border:1px solid var(--line);padding:.3rem .7rem;text-align:right}th{font-size:inherit}
img{max-width:100%}video{width:128px;height:128px;image-rendering:pixelated;background:#000}
figure{display:inline-block;width:150px;margin:.5rem;vertical-align:top;font-size:13px}
"""


def caption_of(video: Scored) -> str:
    """The prompt, marked where training never showed it or a first frame was given."""
    note = {"seen": "", "held_out": " (never trained on)", "i2v": " (first frame given)"}[video.split]
    return video.wanted.caption + note


def write_report(path: Path, scored: Mapping[Split, Sequence[Scored]], shown: Sequence[Scored]) -> None:
    """Write the page.

    Args:
        path: of the HTML file; videos and pictures are linked relative to it.
        scored: the videos of each split.
        shown: those that are shown in any case.
    """
    wrong = [video for videos in scored.values() for video in videos if not video.right]
    parts = [
        "<h1>Titans Video: the mock world</h1>",
        "<p>Shares of the generated videos whose file, read back, shows what the prompt says. <em>shape</em> is the "
        "nearest template, <em>shape_strict</em> also asks for its overlap, <em>all</em> for colour, direction and "
        "strict shape.</p>",
        _table(scored),
        *(
            f"<h2>{title}</h2><img src={name} alt='{title}'>"
            for name, title in (("loss_curve.png", "Loss"), ("contact_sheet.png", "Contact sheet"))
            if (path.parent / name).exists()
        ),
        "<h2>A dozen</h2>",
        *(_figure(path, video) for video in shown),
        f"<h2>Not wholly right: {len(wrong)}</h2>",
        *(_figure(path, video) for video in wrong),
    ]
    path.write_text(page("Titans Video: the mock world", parts, _STYLE), encoding="utf-8")


def _table(scored: Mapping[Split, Sequence[Scored]]) -> str:
    summaries = {split: summary(videos) for split, videos in scored.items()}
    names = list(dict.fromkeys(name for row in summaries.values() for name in row))
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr><th>{_TITLES[split]}</th>" + "".join(f"<td>{row.get(name, '')}</td>" for name in names) + "</tr>"
        for split, row in summaries.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _figure(report: Path, video: Scored) -> str:
    reading = video.reading
    read = f"{reading.colour} {reading.shape} {reading.direction}, overlap {reading.overlap:.2f}"
    source = html.escape(os.path.relpath(video.path, report.parent))
    return (
        f"<figure><video src='{source}' autoplay loop muted playsinline></video>"
        f"<figcaption>{html.escape(caption_of(video))}<br><small>read: {read}</small></figcaption></figure>"
    )
