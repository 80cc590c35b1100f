"""What has changed between the start of a run and a resume that would make it another run."""

from collections.abc import Mapping
from typing import Any

from titans_video.errors import ConfigError

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
