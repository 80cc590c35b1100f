"""The memory of one process and of a machine during training, part by part.

Weights, gradients, optimizer state and averages are counted; activations come from `planning.simulation`. With several
GPUs, DDP keeps all gradients in its buckets, and FSDP2 divides everything that is trained or frozen and gathers two
blocks at a time. Nothing here was measured on a GPU; `benchmarks/plan.py` measures it on a CPU.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from titans_video.codecs.base import Codec
from titans_video.codecs.diffusers import DiffusersCodec, meta_vae
from titans_video.config.options import ActivationOptions
from titans_video.config.recipes import BaseOptions, PretrainedOptions
from titans_video.models.activations import blocks_of
from titans_video.models.live_memory import Peak
from titans_video.planning.simulation import OptimizerMemory, Precision, inference_peak, optimizer_memory, step_peak
from titans_video.planning.subject import IMAGE_ENCODER, Clip, Encoder, Subject, size_of
from titans_video.training.distributed import AUTOCAST

GIB = 2**30
CONTEXT = 3 * GIB // 4
"""Memory of a GPU that CUDA, its kernels and the libraries take."""
LIBRARIES, WORKER = GIB, GIB // 4
"""Main memory of a process with torch and its libraries, and of a data worker beside what it shares."""
PLACES = 2  # blocks on the device with --offload blocks, and gathered ones with FSDP2


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one GPU, or of a CPU's own memory, at the peak of a step.

    Attributes:
        weights: trained and frozen ones, and with FSDP2 the gathered blocks.
        encoders: the frozen text encoders and image encoder; `vae` is apart.
        activations: what blocks keep, and temporary results; also those of encoding, if that needs more.
        context: of CUDA and the libraries.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    activations: int = 0
    encoders: int = 0
    vae: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class MainMemory:
    """Bytes of main memory of all processes on one machine.

    Attributes:
        loading: weights on their way to the GPUs, only at the start.
        weights, activations, encoders: those that are kept here by --offload, --idle-expert, --activation-offload and
            --text-offload.
        checkpoint: copies of the state while a thread writes them.
        clips: decoded clips that are kept, at most.
    """

    libraries: int = 0
    loading: int = 0
    weights: int = 0
    activations: int = 0
    encoders: int = 0
    checkpoint: int = 0
    clips: int = 0

    @property
    def total(self) -> int:
        """The most at once: loading is over when steps begin."""
        steady = self.activations + self.checkpoint + self.clips
        return self.libraries + self.weights + self.encoders + max(self.loading, steady)


@dataclass(frozen=True)
class Layout:
    """The processes of a run: `gpus` of them (0: one on the CPU), and whether FSDP2 shards the weights."""

    gpus: int = 0
    sharded: bool = False

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)


@dataclass
class Memory:
    """Computes the memory of a subject; peaks are remembered.

    Attributes:
        options: of the recipe, with no value `auto`.
    """

    subject: Subject
    options: Any
    optimizer: OptimizerMemory = field(init=False)
    _peaks: dict[Any, Peak] = field(default_factory=dict)
    _vae: dict[Clip, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimizer = optimizer_memory(self.subject.network, self.options.train)
        network = self.subject.network
        self.trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        self.averages = self.trained_values * 4 if self.options.train.ema_decay else 0

    @property
    def trained_values(self) -> int:
        return _trained_values(self.subject.network)

    @property
    def base(self) -> BaseOptions | None:
        """The options of a frozen base; None if the network has none."""
        found = getattr(self.options, "base", None)
        return found if isinstance(found, BaseOptions) else None

    def with_options(self, options: Any) -> "Memory":
        """Return the same network with other options, which leave its shapes and its optimizer."""
        other = copy.copy(self)
        other.options = options
        other.averages = self.trained_values * 4 if options.train.ema_decay else 0
        return other

    def moved(self, clip: Clip, layout: Layout, activations: ActivationOptions) -> int:
        """Return the bytes of activations in main memory."""
        return self.peak(clip, activations, self.precision(layout)).moved

    def precision(self, layout: Layout) -> Precision:
        """Return how the network computes."""
        autocast = AUTOCAST.get(self.options.train.mixed_precision)
        return Precision(autocast, autocast if layout.sharded else None, on_cpu=not layout.gpus)

    def peak(self, clip: Clip, activations: ActivationOptions, precision: Precision) -> Peak:
        """Return the peak of a forward and backward pass besides weights and state."""
        key = clip, activations.checkpointing, activations.activation_offload, precision
        if key not in self._peaks:
            s = self.subject
            self._peaks[key] = step_peak(s.network, s.stacks, s.step(clip), activations, precision)
        return self._peaks[key]

    def device(self, clip: Clip, layout: Layout, activations: ActivationOptions | None = None) -> DeviceMemory:
        """Return the memory of one process on its device for steps with these clips."""
        activations = activations or self.options.activations
        n = layout.processes if layout.sharded else 1
        precision = self.precision(layout)
        peak = self.peak(clip, activations, precision)
        weights, gradients = self._weights(layout), self.trained // n
        if layout.sharded:
            weights += self._gathered(precision.autocast)
            live, held = peak.others + self._unreduced(), gradients
        elif layout.gpus > 1 or self.options.train.grad_accum > 1:
            # In the buckets of DDP, or of the micro-batches before: also while nothing is computed.
            live, held = peak.others, gradients
        else:
            live, held = peak.total, 0
        own = self._own_encoders(layout)
        vae = sum(e.size for e in own if e.name == "VAE")
        encoding = self._encoding(clip, on_cpu=precision.on_cpu) if vae else 0
        shown = held or peak.gradients
        most = max(live + held, encoding + held, gradients + self.optimizer.step // n)
        return DeviceMemory(
            weights=weights,
            gradients=shown,
            optimizer=self.optimizer.state // n,
            averages=self.averages // n,
            activations=most - shown,
            encoders=sum(e.size for e in own) - vae,
            vae=vae,
            context=CONTEXT if layout.gpus else 0,
        )

    def least(self, layout: Layout) -> int:
        """Return the bytes on a device without gradients and activations."""
        n = layout.processes if layout.sharded else 1
        state = (self.optimizer.state + self.averages) // n + sum(e.size for e in self._own_encoders(layout))
        return self._weights(layout) + state + (CONTEXT if layout.gpus else 0)

    def main(self, clip: Clip, layout: Layout, clips: int = 0, workers: int = 0) -> MainMemory:
        """Return the main memory of a machine; `clips`: bytes of decoded clips that a process keeps at most."""
        n, o, on_gpu = layout.processes, self.options, bool(layout.gpus)
        state = 0 if self.subject.is_adapter or not o.train.async_save else self._state()
        moved = self.moved(clip, layout, o.activations) if o.activations.activation_offload else 0
        used = [e for e in self.subject.encoders if self._is_used(e.name)]
        return MainMemory(
            libraries=n * (LIBRARIES + workers * WORKER),
            loading=n * size_of(self.subject.network) if on_gpu else 0,
            weights=n * self._kept_in_main_memory() if on_gpu else 0,
            activations=n * moved,
            encoders=n * sum(e.size for e in used if e.on_cpu) if on_gpu else 0,
            checkpoint=state,
            clips=n * clips,
        )

    def checkpoint_size(self) -> int:
        """Return the bytes of a checkpoint: weights, averages and optimizer state."""
        trained = self.trained_values * 4
        if self.subject.is_adapter:
            return 2 * trained + self.averages + self.optimizer.state  # the adapter is also written for other programs
        return self._state()

    def _state(self) -> int:
        """Return the bytes of all weights, as they are and averaged, and of the optimizer state."""
        weights = size_of(self.subject.network)
        return weights * (2 if self.averages else 1) + self.optimizer.state

    def _own_encoders(self, layout: Layout) -> list[Encoder]:
        """Return the encoders on a device."""
        return [e for e in self.subject.encoders if not (e.on_cpu and layout.gpus) and self._is_used(e.name)]

    def _is_used(self, name: str) -> bool:
        """Whether an encoder is loaded during training. With a cache only the image condition of SVD is encoded."""
        kept = name in ("VAE", IMAGE_ENCODER) if self.subject.recipe == "train svd" else False
        return self.options.data.cache is None or kept

    def _weights(self, layout: Layout) -> int:
        """Return the bytes of the network on a device."""
        network, base = self.subject.network, self.base
        whole = size_of(network)
        if layout.sharded:
            return -(-whole // layout.processes)
        if base is None or not layout.gpus:
            return whole
        if base.layerwise_casting != "none":
            linear = [m.weight for b in blocks_of(network) for m in b.modules() if type(m) is nn.Linear]
            whole -= sum(w.numel() * (w.element_size() - 1) for w in linear if not w.requires_grad)
        return whole - self._kept_in_main_memory() + self._places()

    def _places(self) -> int:
        """Return the bytes of the weights that are on the device for a while, of those kept in main memory."""
        base, network = self.base, self.subject.network
        if base is not None and base.offload == "blocks":
            return PLACES * max(map(frozen_size, blocks_of(network)), default=0)
        if base is not None and base.offload == "group":
            return max((frozen_size(m) for m in network.modules() if isinstance(m, nn.Linear)), default=0)
        if self._waits():
            return max(frozen_size(part) for part in network.children())
        return 0

    def _waits(self) -> bool:
        """Whether the frozen weights of an expert wait in main memory."""
        o = self.options
        return isinstance(o, PretrainedOptions) and o.experts.idle_expert == "cpu" and bool(self.subject.experts)

    def _kept_in_main_memory(self) -> int:
        """Return the bytes of frozen weights that one process keeps in main memory."""
        base, network = self.base, self.subject.network
        blocks = [frozen_size(block) for block in blocks_of(network)]
        if base is not None and base.offload == "blocks":
            return sum(blocks) * max(len(blocks) - base.offload_keep, 0) // max(len(blocks), 1)
        if base is not None and base.offload == "group":
            return sum(frozen_size(m) for b in blocks_of(network) for m in b.modules() if isinstance(m, nn.Linear))
        return frozen_size(network) if self._waits() else 0

    def _gathered(self, dtype: torch.dtype | None) -> int:
        """Return the bytes of whole blocks that FSDP2 gathers, and of the weights outside of blocks."""
        network = self.subject.network
        blocks = [_gathered_size(block, dtype) for block in blocks_of(network)]
        outside = _gathered_size(network, dtype) - sum(blocks)
        return outside + PLACES * max(blocks, default=0)

    def _unreduced(self) -> int:
        """Return the bytes of a block's gradients before FSDP2 has reduced them, in float32 and lower precision."""
        return 6 * max((_trained_values(block) for block in blocks_of(self.subject.network)), default=0)

    def _encoding(self, clip: Clip, *, on_cpu: bool) -> int:
        """Return the peak of encoding one clip with the VAE."""
        one = replace(clip, rows=1, lengths=())
        if one not in self._vae:
            self._vae[one] = encoding_peak(self.subject.codec, one, on_cpu=on_cpu)
        return self._vae[one]


def encoding_peak(codec: Codec | None, clip: Clip, *, on_cpu: bool) -> int:
    """Return the most bytes that encoding a clip takes besides the VAE; 0 for a codec that is not one of diffusers."""
    if not isinstance(codec, DiffusersCodec) or codec.folder is None:
        return 0
    vae = meta_vae(codec.folder, codec._dtype)
    if vae is None:
        return 0
    own = type(codec).__new__(type(codec))
    vars(own).update(vars(codec))
    vae = nn.Module.to(vae, codec._dtype).eval()  # that of diffusers warns
    own._vae = vae
    pixels = 1, 3, clip.frames, clip.height, clip.width
    return inference_peak(lambda: own.encode_moments(torch.empty(*pixels)), vae, on_cpu=on_cpu)


def frozen_size(module: nn.Module) -> int:
    return _size(p for p in [*module.parameters(), *module.buffers()] if not p.requires_grad)


def _trained_values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _gathered_size(module: nn.Module, dtype: torch.dtype | None) -> int:
    item = None if dtype is None else dtype.itemsize
    return sum(p.numel() * (item if item and p.is_floating_point() else p.element_size()) for p in module.parameters())


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
