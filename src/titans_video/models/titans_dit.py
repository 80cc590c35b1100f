"""Memory tokens: a fixed number of vectors that a segment's forward pass rewrites through a gate.

Legend: B batch, M memory tokens, D width.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from titans_video.errors import ConfigError
from titans_video.models.layers import AttentionType, norm, without_autocast
from titans_video.models.memory import Memory
from titans_video.models.neural_memory import NeuralMemory
from titans_video.models.sora_dit import Backbone
from titans_video.types import Condition, Prediction, TextCondition

GATE_BIAS = -1.0


class GatedTokens(nn.Module):
    """The learned start of M memory tokens, and how a segment changes them.

    With H the LayerNorm of the tokens as the network gives them back after they stood among the segment's own,
    g = sigmoid(W_g [m; H]) and m' = (1 - g) m + g tanh(W_o H). The gate starts a quarter open, so that what is
    written first is neither lost nor final.

    Source: the Recurrent Memory Transformer (Bulatov et al. 2022); for video MALT (2025); the gate is a GRU's.
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
        """(B, M, D) float32, before anything was written."""
        return self.first.float().expand(batch, -1, -1)

    def read(self, tokens: Tensor) -> Tensor:
        """What enters the network: the state, each token marked as the one that it is."""
        return tokens + self.place.float()

    def write(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The state after a segment.

        Args:
            tokens: (B, M, D) float32, the state before it.
            seen: (B, M, D), the tokens as they leave the network's last block.
        Returns:
            (B, M, D) float32.
        """
        with without_autocast(tokens.device.type):
            hidden = norm(hidden.float())
            gate = torch.sigmoid(_linear(self.gate, torch.cat((tokens, hidden), dim=-1)))
            return torch.lerp(tokens, torch.tanh(_linear(self.out, hidden)), gate)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In float32 whatever the layer's weights are kept in."""
    bias: Tensor = layer.bias
    return F.linear(x, layer.weight.float(), bias.float())


def default_layers(depth: int) -> tuple[int, ...]:
    """Which blocks have a neural memory where nobody says: a third of them, evenly spread, the last one included."""
    count = math.ceil(depth / 3)
    return tuple(sorted({depth - 1 - i * depth // count for i in range(count)}))


MemoryKind = Literal["tokens", "neural", "none"]


@dataclass(frozen=True)
class SegmentRollout:
    """A clip of n segments that one forward reads and writes in turn, as training does.

    Attributes:
        segment: latent frames of a segment; they divide the clip's.
        written: (B, C, t, h, w), what each segment's write sees: its frames, clean or nearly, in the network's scale.
        written_time: (B, t), their times.
        shown, shown_time: the same for frames that the next segment sees as its overlap; a row that is to do without
            has noise at time 1 there.
        overlap: latent frames of the segment before that a read sees.
        horizon: segments that gradients flow through: the state is detached at every `horizon`-th edge.
        state_noise: (B, n, M, D) added to the memory tokens that each segment reads; None: nothing.
        texts: a text for each segment; None: the condition's, for all.
        write_last: write the last segment too, so that the memory given back is of the whole clip.
        read: which segments are read; None: all. The others are only written, and missing in the value.
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
    """A video transformer with a memory: what it is told of the past is a `Memory`, which it also gives back.

    Args:
        memory: `tokens`: gated memory tokens; `neural`: these, and Titans' neural memory in some blocks, which the
            memory tokens and, gated, all video tokens query; `none`: nothing but the overlap, a sliding window.
        mem_tokens: M.
        memory_layers: blocks with a neural memory before them; None: a third of them, evenly spread.
        memory_chunk: slots whose inner gradients are taken at the same weights; None: a whole segment.
        persistent_tokens: P learned tokens that stand beside those of every segment.
        in_channels ... rope_theta: as in `SoraDiT`.
    Raises:
        ConfigError: sizes that do not go together.
    Source: Titans (Behrouz et al. 2025), memory as a context; the Recurrent Memory Transformer (Bulatov et al. 2022).
    """

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
        _check(memory, mem_tokens, persistent_tokens, memory_layers, depth)
        self.build()
        self.persistent = nn.Embedding(persistent_tokens, model_dim) if persistent_tokens else None
        self.tokens = GatedTokens(mem_tokens, model_dim) if memory != "none" else None
        layers = memory_layers or default_layers(depth)
        self.memory_layers = tuple(layers) if memory == "neural" else ()
        self.neural: Any = nn.ModuleList(NeuralMemory(model_dim, heads, memory_chunk) for _ in self.memory_layers)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As SoraDiT; memories have their own starting values, whose gates are never shut."""
        super().initialise()
        for part in self.modules():
            if isinstance(part, GatedTokens | NeuralMemory):
                part.initialise()

    def start(self, batch: int) -> Memory:
        """The memory of `batch` videos before their first segment."""
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
        """
        Args:
            latents: (B, C, t, h, w): a segment, behind its `overlap` frames where it is read; with `rollout` the noisy
                frames of a whole clip.
            time: (B,) or (B, t) in [0, 1], 0 clean.
            condition: text and known frames. A write sees its frames as they are, so of it only the text counts.
            memory: of the segments before; None: there were none.
            overlap: how many leading latent frames are the segment before's; they stand before time 0.
            write: the frames are finished: remember them.
            rollout: read and write the clip's segments one after another, in this one call: wrapped for distributed
                training, a network is called once a step.
        Returns:
            Prediction with value (B, C, t, h, w) (of a write: the latents as given), and the memory: of a read the one
            that was given, else the new one.
        Raises:
            ConfigError: a size that the patch or the segment does not divide, or other text than in training.
        """
        memory = self.start(latents.shape[0]) if memory is None else memory
        if rollout is not None:
            return self._roll(latents, time, condition, memory, rollout)
        if write:
            return Prediction(latents, self._write(latents, time, condition, memory))
        return Prediction(self._read(latents, time, condition, memory, overlap), memory)

    def _read(self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, overlap: int) -> Tensor:
        x, c, _, _ = self._run(latents, time, condition, memory, overlap, write=False)
        return self.to_value(x, c, latents)

    def _write(self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory) -> Memory:
        if self.tokens is None or memory.tokens is None:
            return memory
        *_, registers, written = self._run(latents, time, Condition(condition.text), memory, 0, write=True)
        assert registers is not None  # there are memory tokens among them
        return replace(written, tokens=self.tokens.write(memory.tokens, registers[:, -memory.tokens.shape[1] :]))

    def _run(
        self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, overlap: int, write: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Memory]:
        """All blocks: tokens (B, s, p, D), their conditioning (B, s, D), registers (B, R, D), neural memories."""
        self.check_inputs(latents, condition)
        if overlap % self.patch[0]:
            raise ConfigError(f"An overlap of {overlap} latent frames is no multiple of the patch's {self.patch[0]}.")
        grid = self.grid(latents)
        x = self.embed_patches(latents, condition)
        registers = self._registers(memory, x)
        c, text, mask = self.embed_conditioning(latents, time, condition, registers is not None)
        freqs_cis = self.freqs_cis(grid, x.device, -overlap // self.patch[0])
        c_block = c if self.modulation is None else self.modulation(c)
        weights, momentum = list(memory.weights), list(memory.momentum)
        for i, block in enumerate(self.blocks):
            if i in self.memory_layers and registers is not None:
                at = self.memory_layers.index(i)
                mine, pair = self.neural[at], slice(2 * at, 2 * at + 2)
                hidden = x
                x, registers = self._retrieve(mine, memory.weights[pair], x, registers)
                if write:
                    weights[pair], momentum[pair] = mine.write(hidden, memory.weights[pair], memory.momentum[pair])
            x, registers = self.run_block(block, x, c_block, freqs_cis, grid[2], (text, mask), registers)
        return x, c[:, : grid[0]], registers, Memory(memory.tokens, tuple(weights), tuple(momentum))

    def _registers(self, memory: Memory, x: Tensor) -> Tensor | None:
        """Persistent and memory tokens (B, R, D); None where there are neither."""
        parts = []
        if self.persistent is not None:
            parts.append(self.persistent.weight.to(x.dtype).expand(x.shape[0], -1, -1))
        if self.tokens is not None and memory.tokens is not None:
            parts.append(self.tokens.read(memory.tokens).to(x.dtype))
        return torch.cat(parts, dim=1) if parts else None

    def _retrieve(self, neural: Any, weights: Any, x: Tensor, registers: Tensor) -> tuple[Tensor, Tensor]:
        """Memory tokens and video tokens ask the neural memory, in one call."""
        first = registers.shape[1] - self.config.mem_tokens
        asking = torch.cat((registers[:, first:], x.flatten(1, 2)), dim=1)
        found = neural.read(asking, weights)
        context, hidden = found.split((self.config.mem_tokens, asking.shape[1] - self.config.mem_tokens), dim=1)
        return x + hidden.view_as(x), registers + F.pad(context, (0, 0, first, 0))

    def _roll(
        self, latents: Tensor, time: Tensor, condition: Condition, memory: Memory, plan: SegmentRollout
    ) -> Prediction:
        """See `SegmentRollout`."""
        t = latents.shape[2]
        if t % plan.segment:
            raise ConfigError(f"Segments of {plan.segment} latent frames do not divide a clip of {t}.")
        time = time[:, None].expand(-1, t) if time.ndim == 1 else time
        count = t // plan.segment
        values, learned = [], False
        for i in range(count):
            start, stop = i * plan.segment, (i + 1) * plan.segment
            front = max(start - plan.overlap, 0)
            text = condition.text if plan.texts is None else plan.texts[i]
            if plan.read is None or i in plan.read:
                value = self._read(
                    torch.cat((plan.shown[:, :, front:start], latents[:, :, start:stop]), dim=2),
                    torch.cat((plan.shown_time[:, front:start], time[:, start:stop]), dim=1),
                    part_of(replace(condition, text=text), start, stop, start - front),
                    _disturbed(memory, plan.state_noise, i),
                    start - front,
                )
                values.append(value[:, :, start - front :])
            last = i == count - 1
            if last and learned and not plan.write_last:
                break
            edge = not last and (i + 1) % plan.horizon == 0
            with torch.no_grad() if edge else nullcontext():
                written = plan.written[:, :, start:stop], plan.written_time[:, start:stop]
                memory = self._write(*written, Condition(text), memory)
            learned |= not (edge or last)
        value = torch.cat(values, dim=2)
        if not learned:
            # Nothing that was written with gradients was read. A write takes part with no weight, so that every
            # parameter has a gradient on every process.
            value = value + 0.0 * sum(x.sum() for x in memory.tensors().values())
        return Prediction(value, memory)


def _disturbed(memory: Memory, noise: Tensor | None, segment: int) -> Memory:
    """The memory as a segment reads it in training: tokens as inexact as those of a generated past."""
    if noise is None or memory.tokens is None:
        return memory
    return replace(memory, tokens=memory.tokens + noise[:, segment])


def part_of(condition: Condition, start: int, stop: int, overlap: int) -> Condition:
    """What is known of latent frames [start, stop); the overlap before them is seen as it is, not as known."""
    if condition.cond_latents is None or condition.cond_mask is None:
        return condition
    cond_latents = F.pad(condition.cond_latents[:, :, start:stop], (0, 0, 0, 0, overlap, 0))
    mask = F.pad(condition.cond_mask[:, :, start:stop], (overlap, 0))
    return replace(condition, cond_latents=cond_latents, cond_mask=mask)


def _check(memory: str, tokens: int, persistent: int, layers: tuple[int, ...] | None, depth: int) -> None:
    if memory not in ("tokens", "neural", "none"):
        raise ConfigError(f"memory is tokens, neural or none, not {memory!r}.")
    if memory != "none" and tokens < 1:
        raise ConfigError(f"--mem-tokens {tokens}: at least 1 is needed; --memory none has no memory.")
    if persistent < 0:
        raise ConfigError(f"--persistent-tokens {persistent}: it must be at least 0.")
    off = [i for i in layers or () if not 0 <= i < depth]
    if off or len(set(layers or ())) != len(layers or ()):
        raise ConfigError(
            f"--memory-layers {','.join(map(str, layers or ()))}: different numbers from 0 to {depth - 1}."
        )
