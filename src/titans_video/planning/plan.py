"""The plan of a run as data: what `planning.make` returns, the command prints, and the page shows. Bytes are bytes."""

from dataclasses import asdict, dataclass
from typing import Any

from titans_video.planning.memory import DeviceMemory, MainMemory


@dataclass(frozen=True)
class Hardware:
    """The machine that is planned for.

    Attributes:
        gpus: 0: this machine's CPU.
        name: of a GPU, or CPU.
        memory: of one GPU; with a CPU the free main memory; None: unknown.
        main_memory: free in this machine; None: unknown, or another machine is planned for.
        peak: FLOP/s of one GPU in the precision of the run; None: unknown.
    """

    gpus: int
    name: str
    memory: int | None
    main_memory: int | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Part:
    """A part of the network, or a frozen encoder, and its parameters."""

    name: str
    parameters: int
    trained: int = 0


@dataclass(frozen=True)
class BucketPlan:
    """One size of clips, HxWxT.

    Attributes:
        rows: of the manifests; None: not read.
        clips: of a micro-batch on one process.
        tokens: of one clip.
        flops: of training on one clip; None: no formula.
        activations: bytes, with the options as they are.
        memory: of the device, in all.
    """

    size: str
    rows: int | None
    clips: int
    tokens: int
    flops: float | None
    activations: int
    memory: int


@dataclass(frozen=True)
class Mode:
    """The memory of one way to keep activations, for the largest clips.

    Attributes:
        flags: that choose it.
        activations: on the device; `moved` is in main memory.
        memory: bytes in all of each layout: "one GPU" or "DDP", and "FSDP2".
    """

    flags: str
    activations: int
    moved: int
    memory: dict[str, int]


@dataclass(frozen=True)
class Change:
    """Flags that make the run fit: the memory with them, and the time of a step as a multiple (an estimate)."""

    flags: tuple[str, ...]
    memory: int
    slowdown: float


@dataclass(frozen=True)
class Speed:
    """The work of an optimizer step over all processes, and its time.

    Attributes:
        source: of the seconds, in words.
        measured_memory: peak of a GPU in the measured steps.
    """

    clips: int
    tokens: int
    flops: float | None
    seconds: float | None
    source: str
    steps: int
    measured_memory: int | None = None

    @property
    def hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.steps / 3600


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk: one checkpoint, all that are kept (with the one being written), the cache, what is free.

    `cache` is None without a cache, or if the number of rows is unknown.
    """

    checkpoint: int
    checkpoints: int
    cache: int | None
    free: int | None


@dataclass(frozen=True)
class Plan:
    """Everything about a run that follows from its options.

    Attributes:
        command: words of the training command, e.g. `train lora`.
        network: its name.
        parameters, trained: of the network.
        parts: of the network, then the frozen encoders.
        buckets: the largest first.
        device, main: memory for the largest clips.
        fits: both.
        modes: other ways to keep activations.
        change: the fastest change that makes it fit; None if it fits, or nothing does.
        passes: over each clip; None if no manifest was read.
        notes: sentences on what was assumed.
    """

    command: str
    network: str
    hardware: Hardware
    parameters: int
    trained: int
    parts: tuple[Part, ...]
    buckets: tuple[BucketPlan, ...]
    device: DeviceMemory
    main: MainMemory
    fits: bool
    modes: tuple[Mode, ...]
    change: Change | None
    speed: Speed
    disk: Disk
    passes: float | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, with the totals."""
        found = asdict(self)
        found["device"]["total"], found["main"]["total"] = self.device.total, self.main.total
        found["speed"]["hours"] = self.speed.hours
        return found
