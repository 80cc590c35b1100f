"""The command that generates: flags to files, video after video, stretch after stretch.

Legend: T H W frames, height and width.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from titans_video.errors import ConfigError
from titans_video.families.table import is_pipeline
from titans_video.generate_options import GenerateOptions
from titans_video.generation.loading import VideoModel
from titans_video.generation.long import plan_video
from titans_video.generation.pipeline import Request
from titans_video.generation.pretrained import PretrainedModel, PretrainedPipeline, plan_pretrained
from titans_video.generation.pretrained_loading import load_pretrained
from titans_video.generation.record import fingerprint, full_record, write_side_file
from titans_video.generation.requests import build_request, check_options, read_prompts
from titans_video.generation.running import load_for
from titans_video.generation.saving import check_out, in_words, numbered
from titans_video.generation.stream_state import StreamPlan, read_segment_prompts, with_state
from titans_video.generation.timing import Timing, timing
from titans_video.generation.video_pipeline import VideoPipeline, with_shift
from titans_video.generation.windows import WindowPlan
from titans_video.media.colour import Pixels
from titans_video.media.interpolating import Interpolator
from titans_video.media.pixels import to_uint8
from titans_video.media.sheets import contact_sheet
from titans_video.media.streaming import open_sink, partial_path
from titans_video.media.writing import Written
from titans_video.options import Overrides, RunOptions

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
        windows = with_state(model, windows, options, texts)
    if usual.known is not None and not model.joins.goes_on_from_one:
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
