"""The FLOPs of a clip in training, from formulas over a network's layers; nothing is run.

A layer of P weights costs 2 P for each row (token, pixel) that it is applied to, and attention of L queries to M keys
of width D costs 4 L M D, as torch's FlopCounterMode counts. The backward pass costs as much again for the gradients of
inputs, and once more for those of trained weights. What checkpointing repeats is not counted (PaLM, appendix B).

Legend: C latent channels, t h w latent grid, s slots, p tokens of a slot, N = s p, R registers, L tokens of a text
stream, M of all streams, D width, F hidden width of a neural memory, n latent pixels of a frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from titans_video.models.memory import EXPANSION

CountFlops = Callable[[Sequence[int], Sequence[int]], int]
"""(C, t, h, w) and the tokens of each text stream -> the FLOPs of one clip's training."""


class Layer(NamedTuple):
    """A linear or convolutional layer and the number of its weights."""

    name: str
    weights: int
    trained: bool


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward pass: of trained and of frozen layers, and of products of activations such as attention."""

    trained: int = 0
    frozen: int = 0
    products: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.trained + other.trained, self.frozen + other.frozen, self.products + other.products)

    @property
    def forward(self) -> int:
        return self.trained + self.frozen + self.products

    @property
    def training(self) -> int:
        """The FLOPs of a forward and a backward pass."""
        return 3 * self.trained + 2 * self.frozen + 3 * self.products


def layers_of(network: nn.Module) -> list[Layer]:
    """List the layers; before they are sharded, with the parameters that are trained."""
    return [
        Layer(name, module.weight.numel(), module.weight.requires_grad)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    ]


def cost_of(layers: Sequence[Layer], rows: Callable[[str], int], products: int) -> Cost:
    """Return the cost of layers, each applied to `rows(name)` rows, and of `products` FLOPs of activations."""
    each = [(2 * layer.weights * rows(layer.name), layer.trained) for layer in layers]
    return Cost(sum(n for n, trained in each if trained), sum(n for n, trained in each if not trained), products)


def attention(queries: int, keys: int, width: int) -> int:
    """Return the FLOPs of softmax(Q K^T) V."""
    return 4 * queries * keys * width


def sora_flops(network: Any) -> CountFlops:
    """Return a function that counts the training FLOPs of a SoraDiT for one clip."""
    layers, config = layers_of(network), network.config

    def count(latent_shape: Sequence[int], lengths: Sequence[int]) -> int:
        slots, tokens = _grid(config, latent_shape)
        rows = _Rows(slots, tokens, lengths)
        return cost_of(layers, rows, backbone_products(config, rows)).training

    return count


def titans_flops(network: Any, segment: int, overlap: int, horizon: int) -> CountFlops:
    """Return a function that counts those of a TitansVideoDiT; the other arguments are of `SegmentRollout`."""
    layers, config, neural = layers_of(network), network.config, len(network.memory_layers)
    memory = config.mem_tokens if network.tokens is not None else 0

    def one(frames: int, latent_shape: Sequence[int], lengths: Sequence[int], write: bool) -> Cost:
        slots, tokens = _grid(config, (latent_shape[0], frames, *latent_shape[2:]))
        rows = _Rows(slots, tokens, lengths, config.persistent_tokens + memory, memory, write)
        inner = EXPANSION * config.model_dim * (config.model_dim // config.heads)  # D F
        recall = neural * 4 * (memory + rows.all) * inner
        surprise = neural * 14 * rows.all * inner if write else 0
        return cost_of(layers, rows, backbone_products(config, rows) + recall + surprise)

    def count(latent_shape: Sequence[int], lengths: Sequence[int]) -> int:
        segments = latent_shape[1] // segment
        reads = [one(segment + (overlap if i else 0), latent_shape, lengths, False) for i in range(segments)]
        total = sum(read.training for read in reads)
        if not memory:
            return total
        write = one(segment, latent_shape, lengths, True)
        detached = [(i + 1) % horizon == 0 for i in range(segments - 1)]
        total += sum(write.forward if without else write.training for without in detached)
        return total if not all(detached) else total + write.training  # see TitansVideoDiT: the last write

    return count


@dataclass(frozen=True)
class _Rows:
    """The rows that each layer of a `Backbone` is applied to in one pass over a clip."""

    slots: int
    tokens: int
    lengths: Sequence[int]
    registers: int = 0
    memory: int = 0
    write: bool = False

    @property
    def all(self) -> int:
        return self.slots * self.tokens

    def __call__(self, name: str) -> int:
        part, *rest = name.split(".")
        times = self.slots + (self.registers > 0)  # registers have a time of their own
        if part == "blocks":
            return self._of_block(rest[1], rest[-1], times)
        if part == "neural":
            on_write = {"kv": self.all, "gates": self.slots}
            return on_write[rest[1]] * self.write if rest[1] in on_write else self.memory + self.all
        if part == "text_embed":
            return self.lengths[int(rest[0])]
        fixed = {"patch_embed": self.all, "time_embed": times, "modulation": times, "text_pool": 1}
        fixed["tokens"] = self.memory * self.write
        return fixed[part] if part in fixed else 0 if self.write else self._of_final(rest[0])

    def _of_block(self, part: str, layer: str, times: int) -> int:
        if part == "modulation":
            return times
        if part == "cross_attn" and layer == "kv":
            return sum(self.lengths)
        return self.all + self.registers if part in ("attn", "mlp") else self.all

    def _of_final(self, part: str) -> int:
        return self.slots if part == "modulation" else self.all


def backbone_products(config: Any, rows: _Rows) -> int:
    """Return the FLOPs of attention and pooling in one pass of a `Backbone`."""
    slots, tokens, registers, width = rows.slots, rows.tokens, rows.registers, config.model_dim
    block = attention(registers, registers + rows.all, width)
    if config.attention_type == "st":
        block += slots * attention(tokens, registers + tokens, width) + tokens * attention(slots, slots, width)
    else:
        block += attention(rows.all, registers + rows.all, width)
    block += attention(rows.all, sum(rows.lengths), width)
    pooling = sum(2 * length * width for length in rows.lengths)
    return config.depth * block + pooling + byte_attention(config, rows.lengths, width)


def byte_attention(config: Any, lengths: Sequence[int], width: int) -> int:
    """Return the FLOPs of attention in the built-in text encoder."""
    streams = [length for length, kind in zip(lengths, config.text_widths, strict=True) if not kind]
    return config.text_layers * sum(attention(length, length, width) for length in streams)


def _grid(config: Any, latent_shape: Sequence[int]) -> tuple[int, int]:
    """Return s and p."""
    t, h, w = (n // patch for n, patch in zip(latent_shape[1:], config.patch_size, strict=True))
    return t, h * w


def svd_flops(network: Any) -> CountFlops:
    """Return a function that counts the training FLOPs of an SVDUNet for one clip."""
    layers, config, levels = layers_of(network), network.config, len(network.unet.down_blocks)
    modules: list[tuple[str, Any]] = list(network.unet.named_modules())
    attentions = [(name, module.inner_dim) for name, module in modules if name.endswith((".attn1", ".attn2"))]
    queries = 2 if config.text_widths else 1  # each cross-attention asks for the image, and for the text

    def count(latent_shape: Sequence[int], lengths: Sequence[int]) -> int:
        _, t, *side = latent_shape
        sizes = [-(-side[0] // 2**i) * -(-side[1] // 2**i) for i in range(levels)]  # n of each level

        def rows(name: str) -> int:
            part, *rest = name.removeprefix("unet.").split(".")
            if part == "text_embed":
                return lengths[int(rest[0])]
            if part in ("time_embedding", "add_embedding"):
                return 1
            if "time_emb_proj" in rest or "time_pos_embed" in rest:
                return t
            level = _level(part, rest, levels)
            if "downsamplers" in rest or "upsamplers" in rest:
                return t * sizes[level + (1 if "downsamplers" in rest else -1)]
            if "attn2" in rest and rest[-1] in ("to_k", "to_v"):
                context = sizes[level] if "temporal_transformer_blocks" in rest else t  # one token each
                return sum(lengths) if "processor" in rest else context
            asked = queries if rest[-2:] == ["attn2", "to_q"] else 1
            return t * sizes[level] * asked

        products = byte_attention(config, lengths, network.width)
        for name, width in attentions:
            part, *rest = name.split(".")
            n = sizes[_level(part, rest, levels)]
            if rest[-1] == "attn2":
                products += attention(t * n, 1 + sum(lengths), width)
            elif "temporal_transformer_blocks" in rest:
                products += n * attention(t, t, width)
            else:
                products += t * attention(n, n, width)
        return cost_of(layers, rows, products).training

    return count


def _level(part: str, rest: Sequence[str], levels: int) -> int:
    """Return the level of a part of the UNet; each halves height and width."""
    if part == "down_blocks":
        return int(rest[0])
    return levels - 1 - (int(rest[0]) if part == "up_blocks" else 0) if "block" in part else 0
