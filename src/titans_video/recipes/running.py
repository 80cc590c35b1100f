"""From the parts of a run to its end; the same for every recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_video.data.store import EncodingStore
from titans_video.preparing.check import QUARANTINE, write_quarantine
from titans_video.preparing.opening import Data
from titans_video.recipes.watching import watch
from titans_video.training import engine
from titans_video.training.resuming import prepare_folder
from titans_video.training.starting import Start, settle
from titans_video.training.trainer import Outcome, Trainer


def train_recipe(
    options: Any,
    run: Start,
    recipe: Any,
    data: Data,
    held_out: Data | None,
    store: EncodingStore | None,
    notes: Sequence[str] = (),
) -> Outcome:
    """Settle what is trained, make the folder ready, say what there is, and train.

    Args:
        options: of the command, with `data`, `train` and `watch` groups.
        run: from `training.starting.begin`.
        recipe: both a `Recipe` and `Validated`, with a `config`.
        held_out: rows to measure the loss of.
        store: the cache that all rows are in, where there is one.
        notes: more to say.
    Raises:
        UserError: whatever `settle`, `watch` and the trainer raise.
    """
    accelerator, resume, say = run.engine, run.resume, run.say
    data, train, about = settle(options, data, recipe.config, run)
    moved = engine.once(accelerator, lambda: prepare_folder(options.train, resume))
    if moved:
        say(f"Earlier checkpoints of {options.train.output_dir} were moved to {moved}.")
    say(data.summary(train.grad_accum))
    left_out = Path(options.train.output_dir) / QUARANTINE
    engine.once(accelerator, lambda: write_quarantine(left_out, data.quarantined))
    if data.quarantined:
        say(f"Which rows, and why: {left_out}")
    say("\n".join(notes))
    watched = watch(
        options,
        type(options)(),
        recipe,
        accelerator,
        data,
        held_out,
        step=resume.step if resume else 0,
        store=store,
        running=run.running,
        say=say,
    )
    stream = data.stream(grad_accum=train.grad_accum, store=store, folder=train.output_dir, say=tqdm.write)
    outcome = Trainer(recipe, stream, train, accelerator, resume, say, about, watched).run()
    engine.finish(accelerator)
    return outcome
