"""The command that generates: flags to files, video after video, stretch after stretch.

Legend: T H W frames, height and width.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from titans_video import __version__
from titans_video.checkpoint import atomic_path
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions, read_prompts
from titans_video.errors import ConfigError
from titans_video.generation.diffusers_backend import (
    PretrainedModel,
    PretrainedPipeline,
    load_pretrained,
    plan_pretrained,
)
from titans_video.generation.long_video import plan_video
from titans_video.generation.model import VideoModel, fingerprint, load_for
from titans_video.generation.request import (
    Request,
    Timing,
    about,
    build_request,
    check_options,
    check_out,
    timing,
)
from titans_video.generation.stream import StreamPlan, apply_state_flags, read_segment_prompts
from titans_video.generation.video_pipeline import VideoPipeline, with_shift
from titans_video.generation.windows import WindowPlan
from titans_video.media.colour import Pixels
from titans_video.media.interpolating import Interpolator
from titans_video.media.resize import to_uint8
from titans_video.media.sheets import contact_sheet
from titans_video.media.streaming import open_sink, partial_path
from titans_video.media.writing import Written
from titans_video.pretrained.registry import is_pipeline

SHEET_FRAMES = 8
SHEET_ROWS = 32


@dataclass
class _Shown:
    """The few frames of a video that its sheet shows, picked as they come."""

    total: int
    seen: int = 0

    def __post_init__(self) -> None:
        count = min(SHEET_FRAMES, self.total)
        self.wanted = {round(i * (self.total - 1) / max(count - 1, 1)) for i in range(count)}
        self.frames: list[Pixels] = []

    def look(self, frames: Pixels) -> None:
        self.frames += [frame.copy() for number, frame in enumerate(frames, self.seen) if number in self.wanted]
        self.seen += len(frames)


def run_generate(options: GenerateOptions, overrides: Overrides, run: RunOptions | None = None) -> Path:
    """Make the videos that the flags ask for, write them, and say where they lie.

    Beside each lies `<name>.json`, all that is needed to make it again (an mp4 holds the same as its comment), and
    beside the first `<name>.sheet.png`, a row of frames of each.

    Returns:
        The path of `--out`.
    Raises:
        UserError: whatever the flags, the checkpoint, the picture or the clip have wrong, before any denoising.
    """
    run = run or RunOptions()
    out = check_options(options)
    texts = None if options.segment_prompts is None else read_segment_prompts(options.segment_prompts)
    if texts is not None:
        length = options.num_frames if options.seconds or options.num_frames else sum(n for n, _ in texts)
        options = replace(options, prompt=texts[0][1], num_frames=length)
    model, pipeline, said_of_loras = _load(options, overrides, run)
    usual, _ = build_request(options, model)
    when = timing(options, model)
    windows: WindowPlan | StreamPlan
    if isinstance(model, PretrainedModel):
        windows, notes = plan_pretrained(model, usual, options)
    else:
        windows, notes = plan_video(model, usual, options.window, options.overlap, options.window_mode)
        windows = apply_state_flags(model, windows, options, texts)
    if usual.cond_pixels is not None and not model.joins.goes_on_from_one:
        notes.append("The model was not trained to go on from given frames; the video may leave them at once.")
    if options.prompt is None and options.prompt_file is None:
        notes.append(f'No --prompt was given; making "{usual.prompts[0]}".')
    for note in [*said_of_loras, *when.notes, *notes]:
        tqdm.write(note, file=sys.stderr)
    prompts = usual.prompts if options.prompt_file is None else read_prompts(options.prompt_file)
    jobs = [(prompt, options.seed + i) for prompt in prompts for i in range(options.num_videos)]
    places = [check_out(str(numbered(out, i, len(jobs)))) for i in range(len(jobs))]
    weights = fingerprint(model)
    rows: list[tuple[str, Pixels]] = []
    for (prompt, seed), place in zip(jobs, places, strict=True):
        request = replace(usual, prompts=[prompt], seeds=[seed])
        said = prompt if texts is None else None  # they say it themselves
        own = replace(options, prompt=said, prompt_file=None, seed=seed, num_videos=1, out=str(place))
        record = full_record(own, overrides, run, request, model, weights)
        shown = _Shown(when.frames)
        written = _write(pipeline, request, windows, when, own, record, shown)
        write_side_file(place, record)
        rows.append((prompt, np.stack(shown.frames)))
        print(in_words(written, request.height, request.width))
    sheet = contact_sheet(
        out.with_name(f"{out.name}.sheet.png"),
        [frames for _, frames in rows[:SHEET_ROWS]],
        [prompt for prompt, _ in rows[:SHEET_ROWS]],
        frames=SHEET_FRAMES,
    )
    print(f"Beside it: {places[0].name}.json, {sheet.name}")
    return out


def _load(
    options: GenerateOptions, overrides: Overrides, run: RunOptions
) -> tuple[VideoModel, VideoPipeline | PretrainedPipeline, list[str]]:
    """A checkpoint of this project; or, without one, the pretrained pipeline of --pretrained-model, with LoRA."""
    folder = overrides.pretrained_model
    if options.checkpoint is None and folder is not None and (options.lora or is_pipeline(folder)):
        pretrained, notes = load_pretrained(run, folder, options.lora, overrides)
        return pretrained, PretrainedPipeline(pretrained), notes
    if options.lora:
        raise ConfigError(
            "--lora is put on a pretrained pipeline: give --pretrained-model DIR, the folder of that pipeline, and no "
            "--checkpoint."
        )
    model = with_shift(load_for(run, options.checkpoint, overrides), options.shift)
    return model, VideoPipeline.of(model), []


def _write(
    pipeline: VideoPipeline | PretrainedPipeline,
    request: Request,
    windows: WindowPlan | StreamPlan,
    when: Timing,
    options: GenerateOptions,
    record: dict[str, object],
    shown: _Shown,
) -> Written:
    """One video to its file, as its frames are finished."""
    sink = open_sink(options.out, request.height, request.width, when.fps, crf=options.crf, metadata=record)
    try:
        with sink:
            for frames in _at_full_rate(pipeline, request, windows, when, options):
                shown.look(frames)
                sink.write(frames)
    except BaseException:
        left = partial_path(Path(options.out))
        if left.is_file():
            tqdm.write(f"Stopped; the frames that were finished lie in {left}.", file=sys.stderr)
        raise
    return sink.written


def _at_full_rate(
    pipeline: VideoPipeline | PretrainedPipeline,
    request: Request,
    windows: WindowPlan | StreamPlan,
    when: Timing,
    options: GenerateOptions,
) -> Iterator[Pixels]:
    """The frames of the file, uint8 (n, H, W, 3), stretch by stretch."""
    made = (to_uint8(stretch[0]) for stretch in pipeline.stream(request, windows))  # type: ignore[arg-type]
    if not when.interpolated:
        yield from made
        return
    interpolator = Interpolator(
        request.height, request.width, when.gen_fps, when.fps, when.frames, options.interpolation
    )
    for frames in made:
        yield interpolator.feed(frames)
    yield interpolator.finish()


def command(options: GenerateOptions, overrides: Overrides, run: RunOptions) -> str:
    """The command line of these options: only what differs from the defaults."""
    words = ["titans-video", "generate"]
    for given, default in ((options, GenerateOptions()), (overrides, Overrides()), (run, RunOptions())):
        for f in fields(given):
            value = getattr(given, f.name)
            if value == getattr(default, f.name):
                continue
            flag = "--" + f.name.replace("_", "-")
            if f.name == "lora":
                words += [word for one in value for word in (flag, one)]
            elif isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def full_record(
    options: GenerateOptions, overrides: Overrides, run: RunOptions, request: Request, model: VideoModel, weights: str
) -> dict[str, Any]:
    """Everything needed to make one video again.

    Args:
        options: of this one video: its own prompt, seed and place.
        request: as it was carried out, with what the checkpoint recommends filled in.
        weights: from `fingerprint`.
    """
    return about(request, model) | {
        "command": command(options, overrides, run),
        "options": asdict(options),
        "run": asdict(run),
        "overrides": {k: v for k, v in asdict(overrides).items() if v is not None},
        "weights": weights,
        "device": str(model.device),
        "versions": {"titans-video": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def write_side_file(path: Path, record: Mapping[str, Any]) -> Path:
    """`record` as JSON beside a video: `<name>.json`."""
    place = path.with_name(f"{path.name}.json")
    with atomic_path(place) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return place


def in_words(written: Written, height: int, width: int) -> str:
    """A line that says where a video lies and what it is, and a second one where something had to be changed.

    Args:
        height, width: of the frames as they were made.
    """
    rate = float(written.fps)
    line = (
        f"{written.path}: {written.frames} frames of {height}x{width} at {rate:g} frames a second "
        f"({written.frames / rate:.2f} s)"
    )
    return f"{line}\n{written.note}" if written.note else line


def numbered(path: Path, number: int, count: int) -> Path:
    """The place of one of several videos: out-000.mp4, out-001.mp4, ...; of a single one `path` itself."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{number:0{max(3, len(str(count - 1)))}d}{path.suffix}")
