"""Keep most blocks of a frozen network in main memory, and copy each to the device just before it is used.

A block's weights are one piece of page-locked memory. They are copied into one of two places on the device, while the
block before computes. The backward pass goes through the blocks in reverse order. A block that is recomputed in the
backward pass (gradient checkpointing) reads its weights again, so nothing keeps them in between; without it, saved
views of a place would later show another block's weights. Diffusers' group offloading puts a block away after its
forward pass, also after the recomputed one, before its gradients are computed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from titans_video.errors import ConfigError
from titans_video.models.activations import blocks_of

ALIGNMENT = 256
"""Bytes that a tensor's start in a place is a multiple of, as in CUDA's allocator."""


def stream_blocks(network: nn.Module, device: torch.device, keep: int = 0) -> list["BlockStream"]:
    """Stream the frozen weights of the blocks, except `keep` blocks; move everything else to the device.

    Each list of blocks has a stream. All share two places on the device, so of several networks the idle ones need
    none, and `keep` is divided evenly among the blocks of all lists. Call it after adapters are added: trained weights
    stay on the device. Raises ConfigError if the network has no blocks.
    """
    network.offloaded = True  # type: ignore[assignment]  # read by `training.distributed.prepare`
    blocks = list(blocks_of(network))
    if not blocks:
        raise ConfigError(f"--offload blocks: {type(network).__name__} has no list of blocks. Use --offload group.")
    resident = spread(keep, len(blocks))
    streamed = [block for i, block in enumerate(blocks) if i not in resident]
    inside = {id(tensor) for block in streamed for tensor in _frozen(block)}
    for tensor in [*network.parameters(), *network.buffers()]:
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    wanted = set(streamed)
    lists = [
        [block for block in part if block in wanted] for part in network.modules() if isinstance(part, nn.ModuleList)
    ]
    parts = [[Block(block, device.type == "cuda") for block in part] for part in lists if part]
    places = Places([block for part in parts for block in part], device)
    return [BlockStream(part, places) for part in parts]


def spread(keep: int, count: int) -> set[int]:
    """Return which of `count` blocks stay: evenly spread, so that copies have the time of other blocks to arrive."""
    return {i for i in range(count) if (i + 1) * keep // count > i * keep // count}


def _frozen(block: nn.Module) -> list[Tensor]:
    return [p for p in block.parameters() if not p.requires_grad] + list(block.buffers())


class Block:
    """The frozen tensors of a block, and their values in main memory."""

    def __init__(self, module: nn.Module, pinned: bool) -> None:
        self.module, self.tensors = module, _frozen(module)
        self.starts = [0]
        for tensor in self.tensors:
            end = self.starts[-1] + tensor.numel() * tensor.element_size()
            self.starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        self.host = torch.empty(self.starts[-1], dtype=torch.uint8, pin_memory=pinned)
        for tensor, view in zip(self.tensors, self.views(self.host), strict=True):
            view.copy_(tensor.data)
        self.put(self.host)
        self.place: Place | None = None

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return the block's tensors as views of a piece of memory, uint8."""
        return [
            memory[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
            for start, t in zip(self.starts, self.tensors, strict=False)
        ]

    def put(self, memory: Tensor) -> None:
        """Let the block's tensors be views of a piece of memory."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view


class Place:
    """A piece of the device's memory for the weights of one block."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: Block | None = None
        self.arrived: Any = None  # event of the copying stream
        self.left: Any = None  # event of the computing stream, after the last use of the block before


class Places:
    """The places on the device, which blocks are copied to."""

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        size = max((len(block.host) for block in blocks), default=0)
        self.all = [Place(size, device) for _ in blocks[:2]]
        if self.stream is not None:
            for place in self.all:  # what had this memory before may still be in use
                place.left = torch.cuda.current_stream(device).record_event()

    def wait_for(self, block: Block) -> None:
        """Let the device wait until a block has arrived; copy it now if nobody did before."""
        place = block.place or self.copy(block, needed=None)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(place.arrived)

    def copy(self, block: Block, needed: Block | None) -> Place:
        """Copy a block to a place that is free, or has another block than the one that is needed."""
        places = (place for place in self.all if place.block is None or place.block is not needed)
        place = min(places, key=lambda place: place.block is not None)
        if place.block is not None:
            self._put_away(place)
        if self.stream is None:
            place.memory[: len(block.host)].copy_(block.host)
        else:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(place.left)
                place.memory[: len(block.host)].copy_(block.host, non_blocking=True)
                place.arrived = self.stream.record_event()
        block.put(place.memory)
        place.block, block.place = block, place
        return place

    def _put_away(self, place: Place) -> None:
        assert place.block is not None
        if self.stream is not None:
            place.left = torch.cuda.current_stream(self.device).record_event()
        place.block.put(place.block.host)
        place.block.place, place.block = None, None


class BlockStream:
    """Has the blocks of one list copied to the device, one ahead of the one that computes."""

    def __init__(self, blocks: Sequence[Block], places: Places) -> None:
        self.blocks, self.places = blocks, places
        for at, block in enumerate(blocks):
            block.module.register_forward_pre_hook(partial(self._before, at), prepend=True)
            block.module.register_forward_hook(partial(self._after, at))

    def _before(self, at: int, module: nn.Module, inputs: Any) -> None:
        following = at + 1
        if following == len(self.blocks) and not torch.is_grad_enabled():
            following = 0  # of the next forward pass; a backward pass begins with the last block
        self._use(at, following)

    def _after(self, at: int, module: nn.Module, inputs: Any, output: Any) -> None:
        results = [x for x in (output if isinstance(output, tuple) else [output]) if x.requires_grad]
        if results:
            register_multi_grad_hook(results, lambda _: self._use(at, at - 1), mode="any")

    def _use(self, at: int, following: int) -> None:
        """Wait for a block, and begin to copy the one that is used after it."""
        self.places.wait_for(self.blocks[at])
        if 0 <= following < len(self.blocks) and self.blocks[following].place is None:
            self.places.copy(self.blocks[following], needed=self.blocks[at])
