"""The start of every training run: the accelerator, the checkpoint to resume from, and the comparison with it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from accelerate import Accelerator

from titans_video.config.fields import OptionGroup, flag_of, is_group
from titans_video.config.options import DataOptions, TrainOptions, ValidationOptions
from titans_video.data.cache import precisions_in
from titans_video.data.dataset import FILE_PATHS
from titans_video.device import (
    COMPILE_FLAGS,
    TF32_FLAGS,
    Choice,
    compiles,
    fast_defaults,
    format_choices,
    read_facts,
)
from titans_video.errors import CheckpointError, ConfigError, counted
from titans_video.formats import RESUMED_STATE
from titans_video.models.attention import check_attention_backend
from titans_video.schema import check
from titans_video.training import distributed
from titans_video.training.checkpointing import Resume
from titans_video.training.parallelism import context_size, data_group
from titans_video.training.resume import find_resume, open_resume, precision_of_run
from titans_video.training.tracking import flat

logger = logging.getLogger(__name__)

UNCOMPARED = ("generation_defaults", "validation", "activations")  # groups of options that do not affect training
VAE_FLAG = "--vae-dtype"
MAX_LISTED = 12  # changed settings that an error lists
FREE = frozenset(
    {
        # paths: the content of these files is compared
        *("config", "output_dir", "manifest", "metadata", "data_root", "allow_outside_root", "cache"),
        *("pretrained_model", "text_model", "llm_model", "local_files_only", "text_offload", "offload", "parity_gate"),
        *("adapter_formats", "base_file"),
        # options that do not affect the result
        *("max_steps", "save_every", "save_limit", "async_save", "log_every", "resume", "init_from"),
        *("num_workers", "ram_cache_mb", "max_bad", "file_timeout", "trust_scan"),
        *("remote_cache", "remote_cache_size"),
        *("max_bad_steps", "expect_processes", "deterministic", "allow_changes", "compile"),
        *("attention_backend", "idle_expert", "offload_keep"),
        # compared through the global batch
        *("batch_size", "tokens_per_batch", "grad_accum"),
        # compared as the accelerator uses it
        "mixed_precision",
    }
)
"""Options that may change on a resume; also `max_steps`, to allow longer training, although schedules end there."""

Settings = dict[str, Any]


class Rows(Protocol):
    """The global batches of a run, as the data divides them."""

    world: int

    def rows_of_step(self, grad_accum: int) -> dict[str, int]: ...
    def divided(self, rows: Mapping[str, int]) -> tuple[Self, int]: ...
    def fingerprint(self) -> str: ...
    def file_facts(self) -> dict[str, list[str] | str]: ...


DataT = TypeVar("DataT", bound=Rows)


class RecipeOptions(OptionGroup, Protocol):
    """The groups of options that every recipe has."""

    @property
    def data(self) -> DataOptions: ...
    @property
    def train(self) -> TrainOptions: ...
    @property
    def validation(self) -> ValidationOptions: ...


OptionsT = TypeVar("OptionsT", bound=RecipeOptions)


@dataclass(frozen=True)
class RunContext:
    """A run that has started."""

    accelerator: Accelerator
    resume: Resume | None  # None starts a new run
    running: str  # first line of the log: processes, devices, batch
    vae_auto: bool = False  # the flag --vae-dtype is auto, and generation decides again


def start_run(options: OptionsT) -> tuple[OptionsT, RunContext]:
    """Create the accelerator, find the checkpoint to resume from, choose the values of `auto`, and log what runs.

    Returns the options with each `auto` resolved. Raises UserError as `distributed.start` and
    `resume.find_resume`.
    """
    data, train = options.data, options.train
    accelerator = distributed.start(train, precision_of_run(train))
    check_attention_backend(train.attention_backend, accelerator.device, training=True)
    folder, notes = distributed.run_on_main(accelerator, lambda: find_resume(train))
    resume = open_resume(folder, train)
    if resume:
        check(RESUMED_STATE, resume.state, resume.folder, CheckpointError)
    running = distributed.describe(accelerator, _format_batch(data, train, data_group(accelerator).count, resume))
    chosen, choices = choose_defaults(options, accelerator, resume)
    logger.info("\n".join([running, *notes, format_choices(read_facts(accelerator.device), choices)]))
    vae_auto = flat(options).get("vae_dtype") == "auto" and any(choice.flag == VAE_FLAG for choice in choices)
    return chosen, RunContext(accelerator, resume, running, vae_auto)


def choose_defaults(
    options: OptionsT, accelerator: Accelerator, resume: Resume | None = None
) -> tuple[OptionsT, list[Choice]]:
    """Return the options with each `auto` resolved, and the choices for the log."""
    given, best = flat(options), fast_defaults(read_facts(accelerator.device))
    choices = [Choice("precision", accelerator.mixed_precision, "--mixed-precision")]
    if accelerator.device.type == "cuda":
        choices.append(Choice("float32 products", "in TF32" if given["tf32"] else "in float32", TF32_FLAGS))
    vae_dtype = given.get("vae_dtype")
    if vae_dtype and given.get("vae_backend", "diffusers") in ("diffusers", "tiny"):
        vae_dtype = _vae_dtype(given, accelerator, resume, best.dtype)
        choices.append(Choice("VAE", vae_dtype, VAE_FLAG))
    elif vae_dtype == "auto":
        vae_dtype = "fp32"  # the other codecs know no precision
    plain = given.get("offload", "none") == given.get("layerwise_casting", "none") == "none"
    # Compiled blocks were not tested with shared clips, nor with weights that move between steps.
    plain = plain and context_size() == 1 and given.get("idle_expert", "device") == "device"
    compiled = compiles(
        given.get("compile", "off"), best, given["max_steps"], allowed=plain and not given["deterministic"]
    )
    if "compile" in given:
        choices.append(Choice("compilation", "on" if compiled else "off", COMPILE_FLAGS))
    workers = best.num_workers if given["num_workers"] == "auto" else given["num_workers"]
    choices.append(Choice("data workers", f"{workers} for each process", "--num-workers"))
    values = {
        "mixed_precision": accelerator.mixed_precision,
        "vae_dtype": vae_dtype,
        "compile": "on" if compiled else "off",
        "num_workers": workers,
    }
    return with_values(options, values), choices


def _vae_dtype(given: Mapping[str, Any], accelerator: Accelerator, resume: Resume | None, best: str) -> str:
    """Return the precision of the VAE: of the flag, else of the resumed run, else of the cache, else of the device."""
    if given["vae_dtype"] != "auto":
        return str(given["vae_dtype"])
    if resume and (before := resume.state["settings"].get(VAE_FLAG)):
        return str(before)
    folder: str | None = given["cache"]
    found = set() if folder is None else distributed.run_on_main(accelerator, lambda: precisions_in(Path(folder)))
    return best if best in found or len(found) != 1 else found.pop()


def with_values(options: OptionsT, values: Mapping[str, object]) -> OptionsT:
    """Return the options with other values of some fields of its groups."""
    groups = {f.name: getattr(options, f.name) for f in fields(options)}
    changed = {
        name: replace(group, **{f.name: values[f.name] for f in fields(group) if f.name in values})
        for name, group in groups.items()
        if is_group(group)
    }
    return replace(options, **changed)


def _format_batch(data: DataOptions, train: TrainOptions, processes: int, resume: Resume | None) -> str:
    """Return the rows of an optimizer step as text. A resumed run keeps them on any number of processes."""
    if resume and resume.state["batching"] == _batching(data, train):
        rows = sorted(set(resume.state["stream"]["rows"].values()), reverse=True)
        return f"{' or '.join(map(str, rows))} clip{'s' * (rows != [1])} as before"
    parts = f"{processes} x {{}} x {train.grad_accum} accumulated"
    if data.tokens_per_batch:
        return parts.format(f"{data.tokens_per_batch} tokens")
    return f"{counted(processes * data.batch_size * train.grad_accum, 'clip')} = " + parts.format(data.batch_size)


def _batching(data: DataOptions, train: TrainOptions) -> dict[str, int | None]:
    size = None if data.tokens_per_batch else data.batch_size
    return {"batch_size": size, "tokens_per_batch": data.tokens_per_batch, "grad_accum": train.grad_accum}


def reconcile_resume(
    options: RecipeOptions, data: DataT, config: Mapping[str, Any], run: RunContext
) -> tuple[DataT, TrainOptions, dict[str, Any]]:
    """Compare a run with the checkpoint that it resumes from, and divide its global batch among its processes.

    Args:
        data: the usable rows, for this number of processes.
        config: of the recipe's checkpoints; the fingerprints of frozen parts are compared.
    Returns:
        The data in micro-batches for this number of processes, the options with the accumulation that keeps global
        batches, and the values that checkpoints store for this comparison.
    Raises:
        ConfigError: a setting changed without `--allow-changes`, or the global batch cannot be divided.
    """
    train, resume = options.train, run.resume
    settings = _all_settings(options, data, config, run.accelerator.mixed_precision)
    batching = _batching(options.data, train)
    about = {"settings": settings, "batching": batching}
    rows = data.rows_of_step(train.grad_accum)
    if resume is None:
        return data, train, about
    for line in refuse_changes(resume.state["settings"], settings, train.allow_changes):
        logger.info(f"Changed with --allow-changes: {line}.")
    before: dict[str, int] = resume.state["stream"]["rows"]
    changed = sorted(name for name in rows.keys() & before.keys() if rows[name] != before[name])
    if not changed:
        return data, train, about
    if batching != resume.state["batching"]:
        name = changed[0]
        text = f"optimizer steps of {before[name]} rows (bucket {name}) would become ones of {rows[name]}"
        if not train.allow_changes:
            raise ConfigError(
                f"--resume: {text}, because --batch-size or --grad-accum changed. Pass the earlier values (another "
                "number of processes needs no change), or --allow-changes."
            )
        logger.info(f"Changed with --allow-changes: {text}.")
        return data, train, about
    data, accum = data.divided(before)
    clips = " or ".join(str(n) for n in sorted({n // (data.world * accum) for n in before.values()}))
    before_now = (
        f"{resume.state['processes']} process{'es' * (resume.state['processes'] != 1)} before, {data.world} now"
    )
    logger.info(
        f"{before_now}: each takes {clips} clip{'s' * (clips != '1')} at once, {counted(accum, 'time')} a step, so "
        "that optimizer steps keep their rows."
    )
    # `about` keeps the flags as given: the next resume may use any number of processes again.
    return data, replace(train, grad_accum=accum), about


def _all_settings(options: RecipeOptions, data: Rows, config: Mapping[str, Any], precision: str) -> Settings:
    groups = {
        name: group for name, group in asdict(options).items() if isinstance(group, dict) and name not in UNCOMPARED
    }
    facts = {
        "the manifest": data.fingerprint(),
        **data.file_facts(),
        "--validation-split": options.validation.validation_split,
        "--mixed-precision": precision,  # from the flag or the launcher
    }
    parts = (("codec", "fingerprint"), ("text", "fingerprints"), ("base", "fingerprint"), ("image", "fingerprint"))
    for part, name in parts:
        facts[f"the weights of the {part}"] = config.get(part, {}).get(name)
    return settings_of(groups, facts)


def settings_of(groups: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Settings:
    """Return flat settings of a run: flags by group, and facts that flags do not show, e.g. "the manifest"."""
    flags = {
        flag_of(name): list(value) if isinstance(value, tuple) else value
        for group in groups.values()
        for name, value in group.items()
        if name not in FREE
    }
    return {**flags, **facts}


def differences(before: Settings, now: Settings) -> list[str]:
    """Return a line for each setting that changed. A setting that only one of the versions has is not compared."""
    return [
        f"{name}: {_shortened(before[name])}, now {_shortened(now[name])}"
        for name in before.keys() & now.keys()
        if before[name] != now[name] and not (name == FILE_PATHS and set(before[name]) & set(now[name]))
    ]


def refuse_changes(before: Settings, now: Settings, allow: bool) -> list[str]:
    """Return the changes of settings since the checkpoint; raise ConfigError with them unless `allow`."""
    changed = sorted(differences(before, now))
    if changed and not allow:
        more = f"\n  and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        raise ConfigError(
            "--resume: these settings differ from those of the run that wrote the checkpoint:\n  "
            + "\n  ".join(changed[:MAX_LISTED])
            + more
            + "\nPass the earlier settings, or --allow-changes to resume with the new ones."
        )
    return changed


def _shortened(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
