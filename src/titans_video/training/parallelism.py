"""How the processes of a run share the work, as the launcher's configuration asks for it.

Accelerate's launcher passes its configuration as environment variables. A mode that this project does not support is
rejected before anything starts: Accelerate would ignore some of them, and with others the processes of one group would
train on different rows.
"""

import os
from dataclasses import dataclass

from accelerate import ParallelismConfig

from titans_video.errors import ConfigError

USE = "ACCELERATE_USE_PARALLELISM_CONFIG"
SIZE = "PARALLELISM_CONFIG_{}_SIZE"
FSDP2_FILE = "configs/accelerate/fsdp2.yaml"
UNSUPPORTED = {
    "TP": "tensor parallelism",
    "SP": "DeepSpeed's sequence parallelism",
    "CP": "context parallelism",
}


@dataclass(frozen=True)
class Parallelism:
    """Sizes of the groups of processes; their product is the number of processes.

    `shard` processes have one copy of the weights together (FSDP2). With several copies (`replicate`), gradients are
    averaged over the copies too (HSDP).
    """

    shard: int
    replicate: int = 1

    @classmethod
    def requested(cls, world: int) -> "Parallelism | None":
        """Return the sizes in the launcher's `parallelism_config`, or None if it has none.

        Raises ConfigError for a mode that is not supported, or sizes that do not fit the `world` processes.
        """
        sizes = {name: _size(name) for name in ("DP_SHARD", "DP_REPLICATE", *UNSUPPORTED)}
        larger = [SIZE.format(name) for name, size in sizes.items() if size > 1]
        if not _is_set(USE):
            if larger:
                raise ConfigError(
                    f"{larger[0]} is set, but Accelerate ignores it without {USE}=true. Set both, or neither."
                )
            return None
        for name, mode in UNSUPPORTED.items():
            if sizes[name] > 1:
                raise ConfigError(
                    f"The Accelerate configuration asks for {mode} (parallelism_config_{name.lower()}_size: "
                    f"{sizes[name]}), which this project does not support. Remove it. FSDP2 ({FSDP2_FILE}) shards "
                    "weights, gradients and optimizer over all processes."
                )
        if not fsdp_requested():
            raise ConfigError(
                f"The Accelerate configuration has a parallelism_config without FSDP2. Use {FSDP2_FILE}, or remove "
                "the parallelism_config."
            )
        found = cls(sizes["DP_SHARD"], sizes["DP_REPLICATE"])
        found.check(world)
        return found

    def check(self, world: int) -> None:
        """Raise ConfigError if the sizes do not fit the number of processes, or would shard nothing."""
        if self.replicate * self.shard != world:
            raise ConfigError(
                "The sizes in the Accelerate configuration's parallelism_config multiply to "
                f"{self.replicate * self.shard}, but {world} {'process is' if world == 1 else 'processes are'} "
                "running. Change parallelism_config_dp_replicate_size, parallelism_config_dp_shard_size or "
                "--num_processes."
            )
        if self.replicate > 1 and self.shard == 1:
            raise ConfigError(
                f"The Accelerate configuration asks for {self.replicate} copies of the weights that are not sharded "
                "(parallelism_config_dp_shard_size: 1). Use configs/accelerate/ddp.yaml, or raise the shard size."
            )

    def for_accelerate(self) -> ParallelismConfig:
        """Return the sizes from which Accelerate builds the mesh of FSDP2."""
        return ParallelismConfig(
            self.replicate, self.shard, tp_size=1, cp_size=1, cp_backend="torch", sp_size=1, sp_backend="deepspeed"
        )

    def __str__(self) -> str:
        return f"HSDP {self.replicate}x{self.shard}" if self.replicate > 1 else "FSDP2"


def fsdp_requested() -> bool:
    """Whether the launcher's configuration asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def refuse_other_engines() -> None:
    """Raise ConfigError for FSDP1, which torch deprecates, and for engines that cannot resume exactly."""
    version = os.environ.get("FSDP_VERSION", "1")
    if fsdp_requested() and version != "2":
        raise ConfigError(
            f"The Accelerate configuration asks for FSDP{version}; this project supports only FSDP2. Convert the file: "
            f"`accelerate to-fsdp2 --config_file OLD.yaml --output_file NEW.yaml`, or use {FSDP2_FILE} "
            "(on the command line: --fsdp_version 2)."
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "The Accelerate configuration asks for DeepSpeed, which would do an optimizer step for every micro-batch "
            f"and has a state that cannot be resumed exactly. FSDP2 shards the same tensors: use {FSDP2_FILE}."
        )
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError(
            "The Accelerate configuration asks for Megatron-LM, which this project does not support. FSDP2 shards "
            f"weights, gradients and optimizer: use {FSDP2_FILE}."
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _size(name: str) -> int:
    text = os.environ.get(SIZE.format(name), "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{SIZE.format(name)}={text} must be an integer of at least 1.")
    return int(text)
