"""What the launcher did, against what it was asked to do: where the two differ in silence, the run stops and says so.

Accelerate reads its orders from environment variables that `accelerate launch` sets from flags or from a configuration
file. Some orders it cannot follow it drops: several processes on a machine without a GPU become one, FSDP on a CPU
becomes DDP, fp16 on a CPU becomes no precision at all. Two days later somebody finds out.
"""

import os
from pathlib import Path

from titans_video.errors import ConfigError
from titans_video.options import TrainOptions

CPU_FILE = "configs/accelerate/cpu2.yaml"


def world_size() -> int:
    """Processes that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return world_size() > 1 or any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))


def fsdp_asked() -> bool:
    """Whether the launcher was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_fsdp1() -> None:
    """FSDP1 is being retired by torch, and a run that is sharded by it could not be resumed on another number of ranks.

    Raises:
        ConfigError: with the command that converts the configuration.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if fsdp_asked() and version != "2":
        raise ConfigError(
            f"The Accelerate configuration asks for FSDP{version}; this project shards by FSDP2. Convert the file: "
            "`accelerate to-fsdp2 --config_file OLD.yaml --output_file NEW.yaml`, or use configs/accelerate/fsdp2.yaml "
            "(by flags: --fsdp_version 2)."
        )


def refuse_lost_processes(options: TrainOptions) -> None:
    """Compare the number of processes with what was asked for, before any of them waits for another.

    Raises:
        ConfigError: `--expect-processes` says otherwise, or the launcher was told to start more than it did.
    """
    world = world_size()
    expected = options.expect_processes
    if expected is not None and expected != world:
        raise ConfigError(
            f"--expect-processes {expected}, but {world} {'is' if world == 1 else 'are'} running. On a machine without "
            f"GPUs `accelerate launch` starts several only with --config_file {CPU_FILE}; torchrun takes "
            "--nproc_per_node."
        )
    if world == 1 and "RANK" not in os.environ:
        asked = _asked_of_launcher(_parents_words())
        if asked > 1:
            raise ConfigError(
                f"`accelerate launch` was asked for {asked} processes and started one: it sees no GPUs to put them on. "
                f"On a CPU add `--config_file {CPU_FILE}` (and keep --num_processes {asked}), or leave "
                "--num_processes away to train in one process."
            )


def _parents_words() -> list[str]:
    """The command line of the process that started this one; empty where the system does not tell."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [w.decode(errors="replace") for w in words]


def _asked_of_launcher(words: list[str]) -> int:
    """--num_processes of an `accelerate launch` command line, 1 where it is none or does not say."""
    names = [word.rpartition("/")[2] for word in words[:3]]  # of the interpreter, the launcher, its first word
    if not ({"accelerate-launch", "accelerate.commands.launch"} & set(names) or {"accelerate", "launch"} <= set(names)):
        return 1
    for i, word in enumerate(words):
        name, _, value = word.replace("-", "_").partition("=")
        if name in ("__num_processes", "__num_process"):
            number = value or next(iter(words[i + 1 : i + 2]), "")
            return int(number) if number.isdigit() else 1
    return 1
