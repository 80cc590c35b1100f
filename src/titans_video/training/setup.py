"""The beginning of every training run: where it runs, what it goes on from, and what that obliges it to."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from titans_video.config.options import DataOptions, TrainOptions
from titans_video.errors import ConfigError
from titans_video.training import distributed
from titans_video.training.checkpointing import Resume
from titans_video.training.distributed import Accelerator
from titans_video.training.resume import find_resume, open_resume


class Rows(Protocol):
    """What a run's data says of its global batches."""

    world: int

    def rows_of_step(self, grad_accum: int) -> dict[str, int]: ...
    def divided(self, rows: Mapping[str, int]) -> "tuple[Any, int]": ...
    def fingerprint(self) -> str: ...


UNCOMPARED = ("generation_defaults", "validation")
"""Groups of options that do not change what is learned."""

DataT = TypeVar("DataT", bound=Rows)


@dataclass(frozen=True)
class RunContext:
    """A run that has begun.

    Attributes:
        engine: of this process.
        resume: the checkpoint to go on from; None starts anew.
        say: how to speak: once, on the main process.
        running: the first line that was said: what runs.
    """

    accelerator: Accelerator
    resume: Resume | None
    say: Callable[[str], None]
    running: str


def start_run(data: DataOptions, train: TrainOptions) -> RunContext:
    """Make the engine, find the checkpoint to go on from, and say first of all what runs.

    Raises:
        UserError: as `distributed.start` and `resuming.find_resume`.
    """
    accelerator = distributed.start(train)
    say: Callable[[str], None] = print if accelerator.is_main_process else lambda text: None
    folder, notes = distributed.run_on_main(accelerator, lambda: find_resume(train))
    resume = open_resume(folder, train)
    running = distributed.describe(accelerator, _batch_in_words(data, train, accelerator.num_processes, resume))
    say("\n".join([running, *notes]))
    return RunContext(accelerator, resume, say, running)


def _batch_in_words(data: DataOptions, train: TrainOptions, processes: int, resume: Resume | None) -> str:
    """The rows of an optimizer step: as before where a run goes on with the same flags, on any number of processes."""
    if resume and resume.state["batching"] == _batching(data, train):
        rows = sorted(set(resume.state["stream"]["rows"].values()), reverse=True)
        return f"{' or '.join(map(str, rows))} clips as before"
    parts = f"{processes} x {{}} x {train.grad_accum} accumulated"
    if data.tokens_per_batch:
        return parts.format(f"{data.tokens_per_batch} tokens")
    return f"{processes * data.batch_size * train.grad_accum} clips = " + parts.format(data.batch_size)


def _batching(data: DataOptions, train: TrainOptions) -> dict[str, int | None]:
    """The flags that make the global batch."""
    size = None if data.tokens_per_batch else data.batch_size
    return {"batch_size": size, "tokens_per_batch": data.tokens_per_batch, "grad_accum": train.grad_accum}


def reconcile_resume(
    options: Any, data: DataT, config: Mapping[str, Any], start: RunContext
) -> tuple[DataT, TrainOptions, dict[str, Any]]:
    """Hold a run against the checkpoint that it goes on from, and divide its global batch among its processes.

    Args:
        options: of the recipe, groups of flags.
        data: the usable rows, on this number of processes.
        config: of the recipe's checkpoints; fingerprints of frozen parts are compared.
        start: from `begin`; its `say` is told what was changed or adapted.
    Returns:
        The data with the micro-batches of this number of processes, the options with the accumulation that makes the
        same global batches, and what checkpoints keep to compare with.
    Raises:
        ConfigError: something is another without `--allow-changes`, or the global batch cannot be divided.
    """
    train: TrainOptions = options.train
    resume, say = start.resume, start.say
    groups = {k: v for k, v in asdict(options).items() if isinstance(v, dict) and k not in UNCOMPARED}
    facts = {
        "the manifest": data.fingerprint(),
        "--validation-split": options.validation.validation_split,
        "--mixed-precision": start.accelerator.mixed_precision,  # by flag or by the launcher
    }
    parts = (("codec", "fingerprint"), ("text", "fingerprints"), ("base", "fingerprint"), ("image", "fingerprint"))
    for part, name in parts:
        facts[f"the weights of the {part}"] = config.get(part, {}).get(name)
    settings = settings_of(groups, facts)
    batching = _batching(options.data, train)
    about = {"settings": settings, "batching": batching}
    rows = data.rows_of_step(train.grad_accum)
    if resume is None:
        return data, train, about
    for line in refuse_changes(resume.state["settings"], settings, train.allow_changes):
        say(f"Changed, as allowed: {line}.")
    before: dict[str, int] = resume.state["stream"]["rows"]
    other = sorted(name for name in rows.keys() & before.keys() if rows[name] != before[name])
    if not other:
        return data, train, about
    if batching != resume.state["batching"]:
        name = other[0]
        words = f"optimizer steps of {before[name]} rows (bucket {name}) would become ones of {rows[name]}"
        if not train.allow_changes:
            raise ConfigError(
                f"--resume: {words}, by another --batch-size or --grad-accum. Give those of before (another number of "
                "processes is adapted to by itself), or --allow-changes."
            )
        say(f"Changed, as allowed: {words}.")
        return data, train, about
    data, accum = data.divided(before)
    clips = " or ".join(str(n) for n in sorted({n // (data.world * accum) for n in before.values()}))
    say(
        f"{resume.state['processes']} processes before, {data.world} now: each takes {clips} clips at once, {accum} "
        "times a step, so that optimizer steps keep their rows."
    )
    # The flags stay the run's own: its next resume may be on any number of processes again.
    return data, replace(train, grad_accum=accum), about


SHOWN = 12
Settings = dict[str, Any]

FREE = frozenset(
    {
        # where things lie: what lies there is compared by its content
        *("config", "output_dir", "manifest", "metadata", "data_root", "allow_outside_root", "cache"),
        *("pretrained_model", "text_model", "llm_model", "local_files_only", "text_offload", "offload", "parity_gate"),
        # how the work is done and shown, not what it is
        *("max_steps", "save_every", "save_limit", "log_every", "resume", "num_workers", "ram_cache_mb", "max_bad"),
        *("max_bad_steps", "expect_processes", "deterministic", "allow_changes", "gradient_checkpointing", "compile"),
        # compared as the global batch that they make
        *("batch_size", "tokens_per_batch", "grad_accum"),
        # compared as it is in force
        "mixed_precision",
    }
)
"""Options that may be another on a resume; `max_steps` too, though schedules end there: to train longer is no slip."""


def settings_of(groups: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Settings:
    """What a run is, as flat plain values: its flags, and facts that flags do not show.

    Args:
        groups: options as dicts, by group.
        facts: by a name in words, e.g. "the manifest's rows".
    """
    flags = {
        "--" + name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for group in groups.values()
        for name, value in group.items()
        if name not in FREE
    }
    return {**flags, **facts}


def differences(before: Settings, now: Settings) -> list[str]:
    """A line for each setting that both runs have and that is another now. What only one of two versions of this
    project knows cannot be compared."""
    return [f"{name}: {_brief(before[name])}, now {_brief(now[name])}" for name in before.keys() & now.keys()
            if before[name] != now[name]]  # fmt: skip


def refuse_changes(before: Settings, now: Settings, allow: bool) -> list[str]:
    """Compare the settings of a checkpoint with those of the run that would go on from it.

    Returns:
        The changes, where they are allowed.
    Raises:
        ConfigError: listing them, where they are not.
    """
    changed = sorted(differences(before, now))
    if changed and not allow:
        more = f"\n  and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            "--resume: this would be another run than the one that wrote the checkpoint:\n  "
            + "\n  ".join(changed[:SHOWN])
            + more
            + "\nGive the settings of before, or --allow-changes to go on with the new ones."
        )
    return changed


def _brief(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
