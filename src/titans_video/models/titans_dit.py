"""TitansVideoDiT: SoraDiT's blocks, applied segment by segment, with a memory of fixed size instead of a cache.

A segment is READ at every denoising step: the network sees [persistent tokens | memory tokens | last frames of the
previous segment, clean | noisy frames]. It is WRITTEN once: the network sees its clean frames and updates the memory.

Legend: B batch, C latent channels, t h w latent grid, S pixel frames of one latent frame, o overlap frames, s slots, p
tokens of a slot, D width, M memory tokens, P persistent tokens, R = P + M registers, n segments.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from titans_video.errors import ConfigError
from titans_video.models.context_parallel import TokenExchange
from titans_video.models.layers import norm, without_autocast
from titans_video.models.memory import Memory, NeuralMemory
from titans_video.models.sora_dit import AttentionType, Backbone
from titans_video.types import Condition, Prediction, TextCondition

MemoryKind = Literal["tokens", "neural", "none"]
GATE_BIAS = -1.0


class GatedTokens(nn.Module):
    """Memory tokens: M vectors with learned initial values, which each segment updates through a gate.

    With H the LayerNorm of the network's output, g = sigmoid(W_g [m; H]) and m' = (1 - g) m + g tanh(W_o H).
    Source: the Recurrent Memory Transformer (Bulatov et al. 2022); for video MALT (2025).
    """

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.first = nn.Parameter(torch.empty(tokens, dim))
        self.place = nn.Parameter(torch.empty(tokens, dim))
        self.gate = nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, dim)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        nn.init.normal_(self.first, std=0.02)
        nn.init.normal_(self.place, std=0.5)
        nn.init.constant_(self.gate.bias, GATE_BIAS)

    def start(self, batch: int) -> Tensor:
        """Return the initial tokens, (B, M, D) float32."""
        return self.first.float().expand(batch, -1, -1)

    def read(self, tokens: Tensor) -> Tensor:
        """Return the network's input: the tokens plus a learned embedding of each one's index."""
        return tokens + self.place.float()

    def write(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Update tokens (B, M, D) float32 after a segment; `hidden` (B, M, D) is the last block's output for them."""
        with without_autocast(tokens.device.type):
            hidden = norm(hidden.float())
            gate = torch.sigmoid(_linear(self.gate, torch.cat((tokens, hidden), dim=-1)))
            return torch.lerp(tokens, torch.tanh(_linear(self.out, hidden)), gate)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    bias: Tensor = layer.bias
    return F.linear(x, layer.weight.float(), bias.float())


def default_layers(depth: int) -> tuple[int, ...]:
    """Return the blocks with a neural memory by default: a third, evenly spread, including the last."""
    count = math.ceil(depth / 3)
    return tuple(sorted({depth - 1 - i * depth // count for i in range(count)}))


@dataclass(frozen=True)
class SegmentRollout:
    """How one forward pass reads and writes the n segments of a clip one after another, as in training.

    Attributes:
        segment, overlap: latent frames of a segment, which divide the clip's, and of the previous one that a read sees.
        written, written_time: (B, C, t, h, w), the (nearly) clean frames of the writes, and their times (B, t).
        shown, shown_time: the same for the overlap of the next segment; noise at time 1 in a row without overlap.
        horizon: segments that gradients flow through: the state is detached after every `horizon`-th segment.
        state_noise: (B, n, M, D), added to the memory tokens that each segment reads, or None.
        texts: one text per segment. None: all segments use the condition's.
        write_last: also write the last segment, so the returned memory covers the whole clip.
        read: the segments to read; None: all. The others are only written and are missing in the value.
    """

    segment: int
    written: Tensor
    written_time: Tensor
    shown: Tensor
    shown_time: Tensor
    overlap: int = 0
    horizon: int = 4
    state_noise: Tensor | None = None
    texts: tuple[TextCondition, ...] | None = None
    write_last: bool = False
    read: tuple[int, ...] | None = None


class TitansVideoDiT(Backbone):
    """A video transformer with a memory of the past: a `Memory` comes in and goes out.

    Args:
        memory: `tokens`: gated memory tokens. `neural`: also Titans' neural memory in some blocks, queried by the
            memory tokens and, gated, by all video tokens. `none`: only the overlap, a sliding window.
        mem_tokens, persistent_tokens: M; P learned tokens that every segment attends to.
        memory_layers: blocks with a neural memory before them. None: as `default_layers`.
        memory_chunk: slots whose inner gradients are taken at the same weights. None: a whole segment.
    Raises ConfigError for sizes that do not fit together. The other arguments are those of `SoraDiT`.
    Source: Titans (Behrouz et al. 2025), memory as a context; the Recurrent Memory Transformer (Bulatov et al. 2022).
    """

    varying_axes: ClassVar = {0: 1, 1: 1, 2: 0, **Backbone.varying_axes}
    """Also the slots: a segment has more with an overlap."""

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        time_stride: int = 1,
        patch_size: tuple[int, int, int] = (2, 4, 4),
        model_dim: int = 1024,
        depth: int = 12,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        attention_type: AttentionType = "st",
        text_widths: tuple[int, ...] = (0,),
        text_layers: int = 2,
        text_buckets: int = 4096,
        qk_norm: bool = True,
        adaln: Literal["block", "shared"] = "shared",
        conv: bool = False,
        gated_skip: bool = False,
        sine_positions: bool = False,
        rope_theta: float = 256.0,
        memory: MemoryKind = "tokens",
        mem_tokens: int = 64,
        memory_layers: tuple[int, ...] | None = None,
        memory_chunk: int | None = None,
        persistent_tokens: int = 4,
    ):
        super().__init__()
        _check_config(memory, mem_tokens, persistent_tokens, memory_layers, depth)
        self.build()
        self.persistent = nn.Embedding(persistent_tokens, model_dim) if persistent_tokens else None
        self.tokens = GatedTokens(mem_tokens, model_dim) if memory != "none" else None
        layers = memory_layers or default_layers(depth)
        self.memory_layers = tuple(layers) if memory == "neural" else ()
        self.neural: Any = nn.ModuleList(NeuralMemory(model_dim, heads, memory_chunk) for _ in self.memory_layers)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise as SoraDiT; memories have their own initial values, and their gates never start closed."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, GatedTokens | NeuralMemory):
                module.initialise()

    def start(self, batch: int) -> Memory:
        """Return the memory of `batch` videos before their first segment."""
        if self.tokens is None:
            return Memory()
        states = [memory.start(batch) for memory in self.neural]
        return Memory(
            self.tokens.start(batch),
            tuple(w for weights, _ in states for w in weights),
            tuple(m for _, momentum in states for m in momentum),
        )

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Condition,
        memory: Memory | None = None,
        *,
        overlap: int = 0,
        write: bool = False,
        rollout: SegmentRollout | None = None,
    ) -> Prediction:
        """Read a segment, write a segment, or run a whole rollout; return the prediction and the memory.

        Args:
            latents: (B, C, t, h, w): a segment, for a read after its `overlap` frames; for a `rollout` the whole clip.
            time: (B,) or (B, t) in [0, 1], 0 clean.
            condition: text and conditioning frames; a write uses only the text.
            memory: the state after the previous segments, or None before the first. A read returns it unchanged.
            overlap: how many leading latent frames are the previous segment's. Their positions are before slot 0.
            write: write the finished frames to the memory and return them unchanged.
        Raises ConfigError if the patch or segment does not divide a size, or for other text than in training.
        """
        memory = self.start(latents.shape[0]) if memory is None else memory
        if rollout is not None:
            return self._roll(latents, time, condition, memory, rollout)
        if write:
            return Prediction(latents, self._write(latents, time, condition, memory))
        return Prediction(self._read(latents, time, condition, memory, overlap), memory)

    def _attach(self, exchange: TokenExchange) -> None:
        super()._attach(exchange)
        for memory in self.neural:
            memory.exchange = exchange

    def _read(self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, overlap: int) -> Tensor:
        x, c, _, _ = self._run(latents, time, condition, memory, overlap, write=False)
        return self.to_value(x, c, latents)

    def _write(self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory) -> Memory:
        if self.tokens is None or memory.tokens is None:
            return memory
        _, _, registers, written = self._run(latents, time, Condition(condition.text), memory, 0, write=True)
        assert registers is not None  # the memory tokens are registers
        return replace(written, tokens=self.tokens.write(memory.tokens, registers[:, -memory.tokens.shape[1] :]))

    def _run(
        self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, overlap: int, write: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Memory]:
        """Run all blocks; return tokens (B, s, p, D), conditioning (B, s, D), registers (B, R, D), and the memory."""
        self.check_inputs(latents, condition)
        if overlap % self.patch[0]:
            raise ConfigError(
                f"An overlap of {overlap} latent frames must be a multiple of the patch's {self.patch[0]}."
            )
        grid = self.grid(latents)
        x = self.embed_patches(latents, condition)
        registers = self._registers(memory, x)
        c, text, text_mask = self.embed_conditioning(latents, time, condition, registers is not None)
        freqs_cis = self.freqs_cis(grid, x.device, -overlap // self.patch[0])
        c_block = c if self.modulation is None else self.modulation(c)
        for i, block in enumerate(self.blocks):
            if i in self.memory_layers and registers is not None:
                x, registers, memory = self._use_neural_memory(self.memory_layers.index(i), memory, x, registers, write)
            x, registers = self.run_block(block, x, c_block, freqs_cis, grid[2], text, text_mask, registers)
        return x, c[:, : grid[0]], registers, memory

    def _registers(self, memory: Memory, x: Tensor) -> Tensor | None:
        parts = []
        if self.persistent is not None:
            parts.append(self.persistent.weight.to(x.dtype).expand(x.shape[0], -1, -1))
        if self.tokens is not None and memory.tokens is not None:
            parts.append(self.tokens.read(memory.tokens).to(x.dtype))
        return torch.cat(parts, dim=1) if parts else None

    def _use_neural_memory(
        self, index: int, memory: Memory, x: Tensor, registers: Tensor, write: bool
    ) -> tuple[Tensor, Tensor, Memory]:
        """Add what a neural memory retrieves to video and memory tokens. With `write`, then store the video tokens."""
        neural, weights, momentum = self.neural[index], *memory.layer(index)
        persistent, M = registers.shape[1] - self.config.mem_tokens, self.config.mem_tokens
        queries = torch.cat((registers[:, persistent:], x.flatten(1, 2)), dim=1)  # (B, M + s p, D)
        for_tokens, for_x = neural.read(queries, weights).split((M, queries.shape[1] - M), dim=1)
        read_x, registers = x + for_x.view_as(x), registers + F.pad(for_tokens, (0, 0, persistent, 0))
        if write:
            memory = memory.with_layer(index, *neural.write(x, weights, momentum))
        return read_x, registers, memory

    def _roll(
        self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, plan: SegmentRollout
    ) -> Prediction:
        """Read and write the segments of a clip in turn; see `SegmentRollout`."""
        t = latents.shape[2]
        if t % plan.segment:
            raise ConfigError(f"Segments of {plan.segment} latent frames do not divide a clip of {t}.")
        time = time[:, None].expand(-1, t) if time.ndim == 1 else time
        count = t // plan.segment
        values, gradient_reaches_loss = [], False
        for i in range(count):
            given = condition if plan.texts is None else replace(condition, text=plan.texts[i])
            if plan.read is None or i in plan.read:
                values.append(self._read_in_rollout(i, latents, time, given, memory, plan))
            last = i == count - 1
            if last and gradient_reaches_loss and not plan.write_last:
                break
            detach = not last and (i + 1) % plan.horizon == 0
            frames = slice(i * plan.segment, (i + 1) * plan.segment)
            with torch.no_grad() if detach else nullcontext():
                memory = self._write(plan.written[:, :, frames], plan.written_time[:, frames], given, memory)
            gradient_reaches_loss |= not (detach or last)
        value = torch.cat(values, dim=2)
        if not gradient_reaches_loss:
            # No segment read a state that was written with gradients. Add the memory with weight 0, so every parameter
            # has a gradient on every process.
            value = value + 0.0 * sum(x.sum() for x in memory.tensors().values())
        return Prediction(value, memory)

    def _read_in_rollout(
        self, index: int, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, plan: SegmentRollout
    ) -> Tensor:
        """Read segment `index` after its overlap; return only the segment's own frames."""
        start, stop = index * plan.segment, (index + 1) * plan.segment
        front = max(start - plan.overlap, 0)
        o = start - front
        if plan.state_noise is not None and memory.tokens is not None:  # as inexact as the memory of a generated past
            memory = replace(memory, tokens=memory.tokens + plan.state_noise[:, index])
        value = self._read(
            torch.cat((plan.shown[:, :, front:start], latents[:, :, start:stop]), dim=2),
            torch.cat((plan.shown_time[:, front:start], time[:, start:stop]), dim=1),
            part_of(condition, start, stop, o),
            memory,
            o,
        )
        return value[:, :, o:]


def part_of(condition: Condition, start: int, stop: int, overlap: int) -> Condition:
    """Return the condition of latent frames [start, stop) after `overlap` frames, which are not conditioning frames."""
    if condition.cond_latents is None or condition.cond_mask is None:
        return condition
    cond_latents = F.pad(condition.cond_latents[:, :, start:stop], (0, 0, 0, 0, overlap, 0))
    cond_mask = F.pad(condition.cond_mask[:, :, start:stop], (overlap, 0))
    return replace(condition, cond_latents=cond_latents, cond_mask=cond_mask)


def _check_config(memory: str, tokens: int, persistent: int, layers: tuple[int, ...] | None, depth: int) -> None:
    if memory not in ("tokens", "neural", "none"):
        raise ConfigError(f"memory is {memory!r}; it must be tokens, neural or none.")
    if memory != "none" and tokens < 1:
        raise ConfigError(f"--mem-tokens {tokens}: it must be at least 1. Use --memory none for no memory.")
    if persistent < 0:
        raise ConfigError(f"--persistent-tokens {persistent}: it must be at least 0.")
    chosen = layers or ()
    if any(not 0 <= i < depth for i in chosen) or len(set(chosen)) != len(chosen):
        raise ConfigError(f"--memory-layers {','.join(map(str, chosen))}: give distinct numbers from 0 to {depth - 1}.")
