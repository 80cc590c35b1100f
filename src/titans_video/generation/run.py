"""Run the `generate` command: flags to files, video after video, chunk after chunk."""

import json
import re
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import Tensor

from titans_video import __version__, console
from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.config.parse import read_segment_prompts
from titans_video.config.prompts import read_prompts, with_line
from titans_video.device import format_choices, read_facts, use_tf32
from titans_video.errors import ConfigError
from titans_video.files import write_text
from titans_video.finite import NonFiniteFrames, finite_frames
from titans_video.generation import diffusers_backend, long_video
from titans_video.generation.long_video import Generate
from titans_video.generation.model import (
    LoadedModel,
    choose_defaults,
    fingerprint,
    load_for,
    run_device,
    with_shift,
)
from titans_video.generation.request import (
    DEFAULT_STEPS,
    Request,
    Timing,
    about,
    build_request,
    check_options,
    check_out,
    timing,
)
from titans_video.media.colour import Pixels, to_uint8
from titans_video.media.interpolating import Interpolator
from titans_video.media.sheets import contact_sheet
from titans_video.media.streaming import open_sink, partial_path
from titans_video.media.writing import Written, numbered
from titans_video.models.attention import kernel_note
from titans_video.pretrained.base import is_pipeline
from titans_video.text.base import unknown_words_note
from titans_video.types import PRECISIONS

SHEET_FRAMES, SHEET_ROWS = 8, 32
MOST_SIZES = 6  # sizes of training that a note names

PlanGeneration = Callable[[Request, GenerateOptions, list[tuple[int, str]] | None], tuple[Generate, list[str]]]
"""`plan_generation` of a backend, for its loaded model."""


@dataclass
class _SheetFrames:
    """The few frames of a video that its sheet shows, picked as they are generated."""

    total: int
    seen: int = 0

    def __post_init__(self) -> None:
        count = min(SHEET_FRAMES, self.total)
        self.wanted = {round(i * (self.total - 1) / max(count - 1, 1)) for i in range(count)}
        self.frames: list[Pixels] = []

    def pick(self, frames: Pixels) -> None:
        self.frames += [frame.copy() for number, frame in enumerate(frames, self.seen) if number in self.wanted]
        self.seen += len(frames)


def run_generate(options: GenerateOptions, overrides: Overrides, run: RunOptions | None = None) -> Path:
    """Generate the videos of the flags, write them, print their paths, and return the path of `--out`.

    Beside each video this writes `<name>.json`, all that is needed to generate it again, and contact sheets.
    Raises UserError for wrong flags or inputs, before any denoising; NonFiniteFrames if a video has no finite frame.
    """
    out = check_options(options)
    texts = None if options.segment_prompts is None else read_segment_prompts(options.segment_prompts)
    if texts is not None:
        length = options.num_frames if options.seconds or options.num_frames else sum(n for n, _ in texts)
        options = replace(options, prompt=texts[0][1], num_frames=length)
    run = _choose(options, run or RunOptions())
    model, plan_generation, lora_notes = _load(options, overrides, run)
    kernel = kernel_note(model.network, run.attention_backend, model.device, PRECISIONS[run.dtype])
    lines = [{}] if options.prompt_file is None else read_prompts(options.prompt_file, "--prompt-file")
    plans = _plan_lines(options, lines, model, plan_generation, texts)
    first, notes = plans[0].request, [note for plan in plans for note in plan.notes]
    if first.cond_pixels is not None and not model.capabilities.continues_from_one:
        notes.append("The model was not trained to continue from given frames; the video may leave them at once.")
    if options.prompt is None and options.prompt_file is None:
        notes.append(f'No --prompt was given; generating "{first.prompts[0]}".')
    sizes = model.trained("sizes")
    if sizes and any(plan.options.height is None and plan.options.width is None for plan in plans):
        named = ", ".join(f"{height}x{width}" for height, width in sizes[:MOST_SIZES])
        notes.append(
            f"The model was trained on {len(sizes)} sizes (HxW), most often {named}. This video is "
            f"{first.height}x{first.width}. A prompt works best at the size of its clips: set --height and --width."
        )
    every = [plan.request.prompts[0] for plan in plans] if texts is None else [text for _, text in texts]
    about_prompts = (unknown_words_note(every, model.trained("words")), model.cut_note([*every, first.negative_prompt]))
    notes += [note for note in about_prompts if note]
    if about_prompts[0] and options.checkpoint is None:
        notes.append("The shipped model is used. For a model that you trained, pass --checkpoint with its folder.")
    for note in dict.fromkeys([*lora_notes, kernel, *notes]):
        console.note(note)
    jobs = [(plan, plan.options.seed + i) for plan in plans for i in range(options.num_videos)]
    places = [check_out(str(place)) for place in choose_places(out, len(jobs), options.overwrite)]
    weights = fingerprint(model)
    rows: list[tuple[str, Pixels]] = []
    for (plan, seed), place in zip(jobs, places, strict=True):
        request, when, prompt = replace(plan.request, seeds=[seed]), plan.when, plan.request.prompts[0]
        one = prompt if texts is None else None  # --segment-prompts has them
        own = replace(plan.options, prompt=one, seed=seed, num_videos=1, out=str(place), overwrite=True)
        record = full_record(own, overrides, run, request, model, weights)
        shown, replaced = _SheetFrames(when.frames), place.exists()
        chunks = _at_full_rate(_checked(plan.generate, request), request, when, own.interpolation)
        written = _write(chunks, request, when.fps, own, record, shown)
        write_side_file(place, record)
        rows.append((prompt, np.stack(shown.frames)))
        print(format_written(written, request.height, request.width, replaced=replaced))
    sheets = _write_sheets(out if options.overwrite else places[0], rows)
    memory = [] if options.memory_out is None else [options.memory_out]
    records = name_range([f"{place.name}.json" for place in places])
    print(f"Also written: {', '.join([records, *(sheet.name for sheet in sheets), *memory])}")
    return out


@dataclass(frozen=True)
class _PlannedLine:
    """The video of a prompt, checked and planned, and notes for the user."""

    options: GenerateOptions
    request: Request
    when: Timing
    generate: Generate
    notes: list[str]


def _plan_lines(
    options: GenerateOptions,
    lines: Sequence[Mapping[str, Any]],
    model: LoadedModel,
    plan_generation: PlanGeneration,
    texts: list[tuple[int, str]] | None,
) -> list[_PlannedLine]:
    """Plan the video of each line of --prompt-file, whose settings replace the flags; an empty line is the flags' own.

    Lines that differ only in prompt and seed share a plan. Raises ConfigError, with the prompt of the line.
    """
    planned: dict[str, _PlannedLine] = {}
    found = []
    for line in lines:
        own, shape = with_line(options, line), repr({k: v for k, v in line.items() if k not in ("prompt", "seed")})
        if shape not in planned:
            try:
                request, when = build_request(own, model)[0], timing(own, model)
                generate, notes = plan_generation(request, own, texts)
            except ConfigError as e:
                if len(line) < 2:  # without settings of its own
                    raise
                raise ConfigError(f"--prompt-file {options.prompt_file}, {line['prompt']!r}: {e}") from None
            planned[shape] = _PlannedLine(own, request, when, generate, [*when.notes, *notes])
        plan = planned[shape]
        prompts = [line["prompt"]] if line else plan.request.prompts
        found.append(replace(plan, options=own, request=replace(plan.request, prompts=prompts)))
    return found


def _choose(options: GenerateOptions, run: RunOptions) -> RunOptions:
    """Return the options with each `auto` resolved, print the choices, and set the precision of products."""
    prompts = 1 if options.prompt_file is None else len(read_prompts(options.prompt_file, "--prompt-file"))
    run, choices = choose_defaults(run, prompts * options.num_videos * (options.steps or DEFAULT_STEPS))
    device = run_device(run)
    if device.type == "cuda":
        use_tf32(run.tf32)
    console.note(format_choices(read_facts(device), choices))
    return run


def _write_sheets(out: Path, rows: Sequence[tuple[str, Pixels]]) -> list[Path]:
    """Write contact sheets of at most `SHEET_ROWS` videos each: `<name>.sheet.png`, `<name>.sheet-2.png`, ..."""
    pages = [rows[first : first + SHEET_ROWS] for first in range(0, len(rows), SHEET_ROWS)]
    return [
        contact_sheet(
            out.with_name(f"{out.name}.sheet{f'-{number}' if number > 1 else ''}.png"),
            [frames for _, frames in page],
            [prompt for prompt, _ in page],
            frames=SHEET_FRAMES,
        )
        for number, page in enumerate(pages, 1)
    ]


def name_range(names: Sequence[str]) -> str:
    """Return up to three names, or the first and the last one with the number of all."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} files)"


def _load(
    options: GenerateOptions, overrides: Overrides, run: RunOptions
) -> tuple[LoadedModel, PlanGeneration, list[str]]:
    """Load a checkpoint, the pipeline of --pretrained-model or both; return it, its `plan_generation`, and notes."""
    folder = overrides.pretrained_model
    finetuned = diffusers_backend.find_finetuned(options.checkpoint) if is_pipeline(folder) else None
    alone = options.checkpoint is None and (options.lora or is_pipeline(folder))
    if folder is not None and (alone or finetuned):
        pretrained, notes = diffusers_backend.load_pipeline(
            run, folder, options.lora, overrides, finetuned, options.base_file, options
        )
        pretrained = diffusers_backend.with_scheduler_shift(pretrained, options.shift)
        return pretrained, partial(diffusers_backend.plan_generation, pretrained), notes
    for flag, is_given in {"--lora": options.lora, "--base-file": options.base_file}.items():
        if is_given:
            raise ConfigError(
                f"{flag} needs a pretrained pipeline: give its folder with --pretrained-model DIR, and no --checkpoint."
            )
    if run.quantize != "none":
        raise ConfigError(f"--quantize {run.quantize} is for pretrained pipelines (--pretrained-model); leave it out.")
    model = with_shift(load_for(run, options.checkpoint, overrides), options.shift)
    return model, partial(long_video.plan_generation, model), []


def _write(
    chunks: Generator[Pixels, None, None],
    request: Request,
    fps: float,
    options: GenerateOptions,
    record: dict[str, object],
    shown: _SheetFrames,
) -> Written:
    """Write one video as its frames are finished."""
    sink = open_sink(options.out, request.height, request.width, fps, crf=options.crf, metadata=record)
    try:
        with sink, closing(chunks):  # closes the progress bar too, before the message below
            for frames in chunks:
                shown.pick(frames)
                sink.write(frames)
                if len(frames):
                    console.show_picture(frames[-1])
    except BaseException as e:
        finished = partial_path(Path(options.out))
        if isinstance(e, NonFiniteFrames):
            finished.unlink(missing_ok=True)
        elif finished.is_file():
            console.note(f"Stopped; the finished frames are in {finished}.")
        raise
    return sink.written


def _checked(generate: Generate, request: Request) -> Iterator[Tensor]:
    return finite_frames(generate(request), console.note, given=request.num_cond_frames)


def _at_full_rate(
    generated: Iterator[Tensor], request: Request, when: Timing, interpolation: Literal["motion", "fade"]
) -> Generator[Pixels, None, None]:
    """Yield the frames of the file, uint8 (n, H, W, 3), chunk by chunk."""
    made = (to_uint8(chunk[0]) for chunk in generated)
    if not when.interpolated:
        yield from made
        return
    interpolator = Interpolator(request.height, request.width, when.gen_fps, when.fps, when.frames, interpolation)
    for frames in made:
        yield interpolator.feed(frames)
    yield interpolator.finish()


def command(options: GenerateOptions, overrides: Overrides, run: RunOptions) -> str:
    """Return the command line of these options, without those that have their defaults."""
    words = ["titans-video", "generate"]
    for given, default in ((options, GenerateOptions()), (overrides, Overrides()), (run, RunOptions())):
        for f in fields(given):
            value = getattr(given, f.name)
            if value == getattr(default, f.name):
                continue
            flag = "--" + f.name.replace("_", "-")
            if f.name in ("lora", "base_file"):
                words += [word for one in value for word in (flag, one)]
            elif isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def full_record(
    options: GenerateOptions, overrides: Overrides, run: RunOptions, request: Request, model: LoadedModel, weights: str
) -> dict[str, Any]:
    """Return everything that is needed to generate one video again; `weights` is from `fingerprint`."""
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
    """Write `record` as JSON beside a video: `<name>.json`."""
    place = path.with_name(f"{path.name}.json")
    write_text(place, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return place


def format_written(written: Written, height: int, width: int, *, replaced: bool = False) -> str:
    """Return a line with the path and the properties of a video, and a second one if something was changed for it."""
    rate = float(written.fps)
    line = (
        f"{written.path}: {written.frames} frames of {height}x{width} at {rate:g} fps ({written.frames / rate:.2f} s)"
    )
    line += "; replaced the existing file" if replaced else ""
    return f"{line}\n{written.note}" if written.note else line


def choose_places(out: Path, count: int, overwrite: bool) -> list[Path]:
    """Return the paths of the videos of `--out`; without `overwrite` numbered after all existing ones."""
    if overwrite or (count == 1 and not out.exists()):
        return [numbered(out, i, count) for i in range(count)]
    pattern = re.compile(rf"{re.escape(out.stem)}-(\d+){re.escape(out.suffix)}")
    beside = out.parent.iterdir() if out.parent.is_dir() else ()
    taken = [int(found[1]) for path in beside if (found := pattern.fullmatch(path.name))]
    first = max(taken, default=0 if out.exists() else -1) + 1
    return [out.with_name(f"{out.stem}-{first + i:03d}{out.suffix}") for i in range(count)]
