"""How a run is watched, built from its options: run.json, a tracker, validation. The same for every recipe."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from titans_video.config import read_prompts
from titans_video.data.store import EncodingStore
from titans_video.options import TrainOptions, WatchOptions
from titans_video.preparing.held_out import HeldOut, shared_files
from titans_video.preparing.opening import Data
from titans_video.seeding import derive
from titans_video.training import run_record
from titans_video.training.engine import Engine, once
from titans_video.training.recipe import Recipe, Validated
from titans_video.training.tracking import Tracker, open_tracker
from titans_video.training.validation import Validator, Watched

OWN_PROMPTS = 4
"""Captions of the data that stand in where no prompts are named."""


def prompts_of(options: WatchOptions, data: Data) -> list[str]:
    """What validation makes videos of: the prompts that the options name, else a few captions of the data, chosen by
    the rows' ids."""
    if not options.validate_every:
        return []
    if options.validation_prompts is not None:
        return list(read_prompts(options.validation_prompts))
    if options.validation_prompt:
        return list(options.validation_prompt)
    rows = sorted(data.rows, key=lambda row: derive(0, "prompt", row.id))
    return list(dict.fromkeys(row.caption for row in rows if row.caption))[:OWN_PROMPTS] or [""]


def watch(
    options: Any,
    defaults: Any,
    recipe: Any,
    machine: Engine,
    data: Data,
    held_out: Data | None,
    *,
    step: int,
    store: EncodingStore | None = None,
    running: str = "",
    say: Callable[[str], None],
) -> Watched:
    """Write run.json, start the tracker, and get validation ready.

    Args:
        options, defaults: of the command, with `train` and `watch` groups.
        recipe: both a `Recipe` and `Validated`.
        held_out: rows to measure the loss of.
        step: that the run begins at, or goes on from.
        store: the cache that all rows are in, where there is one.
        running: the first line of the run: processes, devices, batch.
    Raises:
        ConfigError: the tracker cannot be started.
    """
    train, chosen = options.train, options.watch
    run = Path(train.output_dir)

    def record() -> str:
        environment, about = run_record.environment(machine, running), describe(recipe, data, held_out)
        return run_record.write_start(run, step, options, defaults, about, environment)

    run_id = once(machine, record)
    tracker = open_tracker(machine, chosen.log_with, run, step, run_id, run_record.flat(options))
    return Watched(tracker, _validator(chosen, train, recipe, machine, data, held_out, store, tracker, say))


def _validator(
    options: WatchOptions,
    train: TrainOptions,
    recipe: Validated,
    machine: Engine,
    data: Data,
    held_out: Data | None,
    store: EncodingStore | None,
    tracker: Tracker,
    say: Callable[[str], None],
) -> Validator | None:
    if not options.validate_every:
        return None
    prompts = prompts_of(options, data)
    rows = None if held_out is None else HeldOut(held_out, store, options.validation_rows or None)
    say(_in_words(options, data, held_out, prompts))
    return Validator(recipe, machine, Path(train.output_dir), options, train.max_steps, prompts, rows, tracker)


def _in_words(options: WatchOptions, data: Data, held_out: Data | None, prompts: Sequence[str]) -> str:
    """What validation will do, for the person at the keyboard."""
    videos = f"{len(prompts)} video{'s' * (len(prompts) != 1)}"
    if held_out is None:
        return (
            f"Validation every {options.validate_every} steps: {videos}. No clips are held out, so no loss is "
            "measured: --validation-split 0.05 or --validation-manifest FILE gives some."
        )
    rows = min(len(held_out.entries), options.validation_rows or len(held_out.entries))
    said = f"Validation every {options.validate_every} steps: {videos}, and the loss of {rows} held-out rows."
    both = shared_files(data, held_out)
    return said + (f" {both} of their clips are trained on too, so their loss says little." if both else "")


def describe(recipe: Recipe, data: Data, held_out: Data | None) -> dict[str, Any]:
    """What run.json says of the model and the data."""
    options = data.options
    return {
        "network": type(recipe.network).__name__,
        "parameters": sum(p.numel() for p in recipe.network.parameters()),
        "data": {
            "manifests": [*options.manifest, *([options.metadata] if options.metadata else [])],
            "rows": len(data.entries),
            "held_out": len(held_out.entries) if held_out else 0,
            "fps": data.fps,
            "buckets": dict(Counter(str(e.bucket) for e in data.entries).most_common()),
            "tasks": options.task_mix or dict(Counter(row.task for row in data.rows).most_common()),
            "left_out": dict(Counter(q.reason for q in data.quarantined).most_common()),
        },
    }
