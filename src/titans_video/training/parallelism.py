"""How the processes of a run share the work, as the launcher's configuration asks for it.

Accelerate's launcher passes its configuration as environment variables. A mode that this project does not support is
rejected before anything starts: Accelerate would ignore some of them, and with others the processes of one group would
train on different rows.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator, ParallelismConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titans_video.errors import ConfigError, DataError
from titans_video.seeding import derive_seed

USE = "ACCELERATE_USE_PARALLELISM_CONFIG"
SIZE = "PARALLELISM_CONFIG_{}_SIZE"
FSDP2_FILE = "configs/accelerate/fsdp2.yaml"
UNSUPPORTED = {
    "TP": "tensor parallelism",
    "SP": "DeepSpeed's sequence parallelism",
}


@dataclass(frozen=True)
class Parallelism:
    """Sizes of the groups of processes; their product is the number of processes.

    `shard` groups have one copy of the weights together (FSDP2). With several copies (`replicate`), gradients are
    averaged over the copies too (HSDP). `context` processes form a group that shares the tokens of its clips; the
    weights are sharded over them too.
    """

    shard: int
    replicate: int = 1
    context: int = 1

    @classmethod
    def requested(cls, world: int) -> "Parallelism | None":
        """Return the sizes in the launcher's `parallelism_config`, or None if it has none.

        Raises ConfigError for a mode that is not supported, or sizes that do not fit the `world` processes.
        """
        sizes = {name: _size(name) for name in ("DP_SHARD", "DP_REPLICATE", "CP", *UNSUPPORTED)}
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
        found = cls(sizes["DP_SHARD"], sizes["DP_REPLICATE"], sizes["CP"])
        found.check(world)
        return found

    def check(self, world: int) -> None:
        """Raise ConfigError if the sizes do not fit the number of processes, or would shard nothing."""
        product = self.replicate * self.shard * self.context
        if product != world:
            raise ConfigError(
                f"The sizes in the Accelerate configuration's parallelism_config multiply to {product}, but "
                f"{world} {'process is' if world == 1 else 'processes are'} running. Change "
                "parallelism_config_dp_replicate_size, parallelism_config_dp_shard_size, parallelism_config_cp_size or "
                "--num_processes."
            )
        if self.replicate > 1 and self.shard * self.context == 1:
            raise ConfigError(
                f"The Accelerate configuration asks for {self.replicate} copies of the weights that are not sharded "
                "(parallelism_config_dp_shard_size: 1). Use configs/accelerate/ddp.yaml, or raise the shard size."
            )

    def for_accelerate(self) -> ParallelismConfig:
        """Return the sizes from which Accelerate builds the mesh of FSDP2."""
        return ParallelismConfig(
            self.replicate,
            self.shard * self.context,  # Accelerate's own context parallelism is for language models
            tp_size=1,
            cp_size=1,
            cp_backend="torch",
            sp_size=1,
            sp_backend="deepspeed",
        )

    def __str__(self) -> str:
        return f"HSDP {self.replicate}x{self.shard * self.context}" if self.replicate > 1 else "FSDP2"


@dataclass(frozen=True)
class DataGroup:
    """The `size` processes that train on the same rows as this one: the `index`-th of `count` groups."""

    index: int
    count: int
    size: int
    is_first: bool  # this process is the first of its group

    def checksum(self, seeds: Sequence[int]) -> int:
        """Return a number whose sum over a group is 0 if all its processes have rows with the same seeds."""
        own = derive_seed(0, "rows", *seeds) % 2**31
        return own * (self.size - 1 if self.is_first else -1) if self.size > 1 else 0

    def different_rows(self, step: int) -> DataError:
        """Return the error of a step for which the sum of `checksum` is not 0."""
        return DataError(
            f"Step {step}: the processes that share a clip read different rows, because a file was readable for some "
            "of them only. Pass --resume auto to continue."
        )


def context_size() -> int:
    """Return how many processes share a clip, as the launcher's configuration asks."""
    return _size("CP") if _is_set(USE) else 1


def data_group(accelerator: Accelerator) -> DataGroup:
    """Return this process's group. Without context parallelism every process is a group."""
    size = context_size()
    index, place = divmod(accelerator.process_index, size)
    return DataGroup(index, accelerator.num_processes // size, size, place == 0)


def context_mesh(accelerator: Accelerator) -> DeviceMesh:
    """Return the mesh whose dimension `ulysses` has the processes that share a clip; on every process."""
    group = data_group(accelerator)
    shape = (group.count, 1, group.size)
    return init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))


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
