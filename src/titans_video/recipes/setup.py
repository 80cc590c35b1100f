"""The parts of a run that every recipe needs: clips, codec, cache, validation; and the run from there to its end."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_video.codecs.base import Codec
from titans_video.codecs.external import source_digest
from titans_video.codecs.pca import PCACodec
from titans_video.codecs.registry import build_codec, codec_from_checkpoint, parse_init
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions, SoraOptions, TrainOptions, ValidationOptions
from titans_video.config.parse import read_prompts
from titans_video.data.cache import EncodingStore
from titans_video.data.dataset import ProcessGroup, VideoDataset, open_data
from titans_video.data.held_out import HeldOut, shared_files, split
from titans_video.data.precompute import Encoders, Filled, fill_cache
from titans_video.data.report import QUARANTINE, write_quarantine
from titans_video.errors import CodecError
from titans_video.seeding import derive_seed
from titans_video.text.base import TextEncoder
from titans_video.training import distributed, tracking
from titans_video.training.checkpointing import Resume
from titans_video.training.distributed import Accelerator, run_on_main
from titans_video.training.recipe import Recipe, Validated
from titans_video.training.resume import prepare_folder
from titans_video.training.setup import RunContext, reconcile_resume
from titans_video.training.tracking import Tracker, open_tracker
from titans_video.training.trainer import Trainer, TrainResult
from titans_video.training.validation import Monitoring, Validator
from titans_video.types import CodecSpec

FIT_CLIPS = 512
PCA_DEFAULTS: dict[str, Any] = {"patch": [8, 4, 4], "channels": 96, "smooth": 0.0}


def open_data_and_codec(
    options: SoraOptions,
    accelerator: distributed.Accelerator,
    resume: Resume | None,
    clip_grid: tuple[int, int, int] | None = None,
) -> tuple[VideoDataset, Codec]:
    """The clips and the codec. A patch codec is fitted to the clips unless the run goes on from one that has it."""
    fitted = options.codec.vae_backend == "patch"
    codec: Codec | None = None
    if resume and fitted:
        fitted_codec = resume.model()
        codec = codec_from_checkpoint(fitted_codec.config["codec"], fitted_codec.codec, Overrides())
    elif not fitted:
        codec = build_codec(options.codec, device=accelerator.device, load=options.data.cache is None)
    data = open_data(
        options.data,
        codec.spec if codec else spec_of(options.codec),
        clip_grid or options.model.patch_size,
        seed=options.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        processes=processes(accelerator),
    )
    if options.validation.validation_split:
        data = split(data, options.validation.validation_split)
    return data, (codec or _fit(options.codec, data, accelerator)).to(accelerator.device)


def processes(accelerator: distributed.Accelerator) -> ProcessGroup:
    """How these processes share what one of them knows."""
    return ProcessGroup(
        partial(distributed.run_on_main, accelerator), partial(distributed.all_gather_object, accelerator)
    )


def _pca_arguments(options: CodecOptions) -> tuple[tuple[int, int, int], int, float]:
    """(patch, channels, smooth) of the patch codec: the defaults, changed by --vae-init-json."""
    given = {**PCA_DEFAULTS, **parse_init(options.vae_init_json)}
    patch, channels, smooth = given["patch"], given["channels"], given["smooth"]
    whole = isinstance(patch, list) and all(type(n) is int and n > 0 for n in [*patch, channels])
    number = type(smooth) in (int, float) and math.isfinite(smooth) and smooth >= 0
    if not whole or not number or len(patch) != 3 or given.keys() != PCA_DEFAULTS.keys():
        raise CodecError(
            f"--vae-init-json {options.vae_init_json} is not for --vae-backend patch, which takes "
            f"{json.dumps(PCA_DEFAULTS)} (frames, height and width of a patch in pixels, components kept, and the "
            "errors for which blocks are joined, as a standard deviation of pixels in [-1, 1])."
        )
    if smooth and patch[0] == 1:
        raise CodecError(
            f"--vae-init-json {options.vae_init_json}: blocks of one frame are not joined; leave smooth out, or give "
            "patches of two frames or more."
        )
    return (patch[0], patch[1], patch[2]), channels, float(smooth)


def spec_of(options: CodecOptions) -> CodecSpec:
    """The shapes of a codec's latents; of a patch codec before it has seen a clip."""
    if options.vae_backend != "patch":
        return build_codec(options, load=False).spec
    patch, channels, _ = _pca_arguments(options)
    return CodecSpec("patch", channels, patch, "blocks")


def _fit(options: CodecOptions, data: VideoDataset, accelerator: distributed.Accelerator) -> Codec:
    arguments = _pca_arguments(options)
    codec = distributed.run_on_main(accelerator, lambda: PCACodec.fit(data.sample_pixels(FIT_CLIPS), *arguments))
    return PCACodec.from_config(codec.config(), codec.state_dict())  # as a run that goes on will have it


def frames_in_words(options: SoraOptions, data: VideoDataset, spec: CodecSpec) -> list[str]:
    """A line that says so where clips have another length than `--num-frames`."""
    asked, patch = options.data.num_frames, options.model.patch_size[0]
    used = data.buckets[0].frames
    if options.data.buckets is not None or spec.is_legal(asked, patch):
        return []
    return [
        f"--num-frames {asked} is not legal for the codec {spec.name} and a temporal patch of {patch} together; "
        f"{used} is used, {spec.frames_at_least(asked, patch)} would be the next."
    ]


def fill(
    options: SoraOptions,
    data: VideoDataset,
    codec: Codec,
    text: TextEncoder,
    accelerator: distributed.Accelerator,
    pictures: bool = False,
) -> Filled:
    """Encode what the cache lacks, the prompts of validation too, shared out over the processes; whole when this
    returns.

    Args:
        pictures: as `data.store.EncodingStore`.
    """
    encoders = Encoders(codec_key(codec, options.codec), lambda: codec, text_keys(text), text, pictures)
    assert options.data.cache is not None  # callers checked
    prompts = prompts_of(options.validation, data)
    filled = fill_cache(data, options.data.cache, encoders, prompts=prompts, processes=processes(accelerator))
    accelerator.print(filled.summary())
    return filled


def codec_key(codec: Codec, options: CodecOptions) -> str:
    """What tells a codec's latents from any other's: its fingerprint and its precision; of a class of the user's own
    also its code and the arguments that it is built with, which no fingerprint of weights covers."""
    known: list[str | None] = [codec.spec.name, codec.fingerprint(), options.vae_dtype]
    if options.vae_backend == "external":
        known += [options.vae_module, options.vae_class, options.vae_init_json, source_digest(codec)]
    return json.dumps(known)


def text_keys(text: TextEncoder) -> tuple[str, ...]:
    """What tells each stream's states from any other's; () where none is frozen and nothing is worth keeping."""
    prints, options = text.fingerprints(), text.options
    if all(p is None for p in prints):
        return ()
    settings: list[list[Any]] = [
        [options.text_dtype, options.text_max_length],
        [options.llm_dtype, options.llm_max_length, options.llm_layer, options.llm_template],
    ]
    if options.text_model == "none":
        settings = settings[1:]
    return tuple(json.dumps([p or "builtin", *s]) for p, s in zip(prints, settings, strict=False))


OWN_PROMPTS = 4
"""Captions of the data that stand in where no prompts are named."""


def prompts_of(options: ValidationOptions, data: VideoDataset) -> list[str]:
    """What validation makes videos of: the prompts that the options name, else a few captions of the data, chosen by
    the rows' ids."""
    if not options.validate_every:
        return []
    if options.validation_prompts is not None:
        return list(read_prompts(options.validation_prompts))
    if options.validation_prompt:
        return list(options.validation_prompt)
    rows = sorted(data.rows, key=lambda row: derive_seed(0, "prompt", row.id))
    return list(dict.fromkeys(row.caption for row in rows if row.caption))[:OWN_PROMPTS] or [""]


def watch(
    options: Any,
    defaults: Any,
    recipe: Any,
    accelerator: Accelerator,
    data: VideoDataset,
    held_out: VideoDataset | None,
    *,
    step: int,
    store: EncodingStore | None = None,
    running: str = "",
    say: Callable[[str], None],
) -> Monitoring:
    """Write run.json, start the tracker, and get validation ready.

    Args:
        options, defaults: of the command, with `train` and `validation` groups.
        recipe: both a `Recipe` and `Validated`.
        held_out: rows to measure the loss of.
        step: that the run begins at, or goes on from.
        store: the cache that all rows are in, where there is one.
        running: the first line of the run: processes, devices, batch.
    Raises:
        ConfigError: the tracker cannot be started.
    """
    train, chosen = options.train, options.validation
    run = Path(train.output_dir)

    def record() -> str:
        environment, about = tracking.environment(accelerator, running), describe(recipe, data, held_out)
        return tracking.write_start(run, step, options, defaults, about, environment)

    run_id = run_on_main(accelerator, record)
    tracker = open_tracker(accelerator, chosen.log_with, run, step, run_id, tracking.flat(options))
    return Monitoring(tracker, _validator(chosen, train, recipe, accelerator, data, held_out, store, tracker, say))


def _validator(
    options: ValidationOptions,
    train: TrainOptions,
    recipe: Validated,
    accelerator: Accelerator,
    data: VideoDataset,
    held_out: VideoDataset | None,
    store: EncodingStore | None,
    tracker: Tracker,
    say: Callable[[str], None],
) -> Validator | None:
    if not options.validate_every:
        return None
    prompts = prompts_of(options, data)
    rows = None if held_out is None else HeldOut(held_out, store, options.validation_rows or None)
    say(_in_words(options, data, held_out, prompts))
    return Validator(recipe, accelerator, Path(train.output_dir), options, train.max_steps, prompts, rows, tracker)


def _in_words(
    options: ValidationOptions, data: VideoDataset, held_out: VideoDataset | None, prompts: Sequence[str]
) -> str:
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


def describe(recipe: Recipe, data: VideoDataset, held_out: VideoDataset | None) -> dict[str, Any]:
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


def train_recipe(
    options: Any,
    run: RunContext,
    recipe: Any,
    data: VideoDataset,
    held_out: VideoDataset | None,
    store: EncodingStore | None,
    notes: Sequence[str] = (),
) -> TrainResult:
    """Settle what is trained, make the folder ready, say what there is, and train.

    Args:
        options: of the command, with `data`, `train` and `validation` groups.
        run: from `training.starting.begin`.
        recipe: both a `Recipe` and `Validated`, with a `config`.
        held_out: rows to measure the loss of.
        store: the cache that all rows are in, where there is one.
        notes: more to say.
    Raises:
        UserError: whatever `settle`, `watch` and the trainer raise.
    """
    accelerator, resume, say = run.accelerator, run.resume, run.say
    data, train, about = reconcile_resume(options, data, recipe.config, run)
    moved = distributed.run_on_main(accelerator, lambda: prepare_folder(options.train, resume))
    if moved:
        say(f"Earlier checkpoints of {options.train.output_dir} were moved to {moved}.")
    say(data.summary(train.grad_accum))
    left_out = Path(options.train.output_dir) / QUARANTINE
    distributed.run_on_main(accelerator, lambda: write_quarantine(left_out, data.quarantined))
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
    distributed.finish(accelerator)
    return outcome
