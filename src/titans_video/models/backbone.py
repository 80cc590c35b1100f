"""What SoraDiT and the networks built like it share: the parts before, between and behind the blocks.

Legend: B batch, C latent channels, t h w latent grid, S pixel frames of one latent frame, (pt, ph, pw) patch,
s = t / pt temporal slots, p = (h / ph)(w / pw) tokens of a slot, D width, M text tokens of all streams, R registers.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from titans_video.errors import ConfigError
from titans_video.models.blocks import SoraBlock, modulations
from titans_video.models.embeddings import (
    FinalLayer,
    TextProjection,
    TimeEmbedding,
    masked_mean,
    patchify,
    unpatchify,
)
from titans_video.models.rope import axis_pairs, rotation_3d
from titans_video.models.text_encoder import ByteEncoder
from titans_video.types import Condition, TextCondition

Grid = tuple[int, int, int]


class Backbone(ModelMixin, ConfigMixin):
    """Patches, time and text to tokens, a stack of `SoraBlock`s, and tokens back to patches.

    A subclass registers its configuration, whose names are those of `SoraDiT`, and then calls `build`.
    """

    frame_times: ClassVar[bool] = True
    """Takes a time for each latent frame, so that given frames are clean while others are noisy."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SoraBlock", "EncoderLayer"]
    _repeated_blocks: ClassVar = ["SoraBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "time_embed", "norm", "final"]

    def build(self) -> None:
        """Make the modules that the registered configuration describes.

        Raises:
            ConfigError: sizes that do not go together.
        """
        c = self.config
        dim, heads = c.model_dim, c.heads
        _check(dim, heads, c.attention_type, c.adaln, c.patch_size)
        if c.sine_positions and dim % 4:
            raise ConfigError(
                f"--sine-positions needs a width of sines and cosines of two axes: --model-dim {dim} must be "
                f"{' or '.join(str(m) for m in _multiples(dim, 4))}."
            )
        self.patch: Grid = tuple(c.patch_size)  # type: ignore[assignment]  # JSON gives a list back
        cells = self.patch[0] * self.patch[1] * self.patch[2]
        self.patch_embed = nn.Linear((2 * c.in_channels + c.time_stride) * cells, dim)
        self.time_embed = TimeEmbedding(dim)
        self.text_embed = nn.ModuleList(
            TextProjection(width, dim) if width else ByteEncoder(dim, heads, c.text_layers, c.text_buckets)
            for width in c.text_widths
        )
        self.text_pool = nn.ModuleList(nn.Linear(dim, dim) for _ in c.text_widths)
        shared = 3 * modulations(c.attention_type) * dim
        self.modulation = nn.Linear(dim, shared) if c.adaln == "shared" else None
        self.blocks = nn.ModuleList(
            SoraBlock(dim, heads, c.mlp_ratio, c.attention_type, bool(c.text_widths), c.qk_norm, c.adaln, c.conv)
            for _ in range(c.depth)
        )
        self.final = FinalLayer(dim, c.in_channels * cells, c.gated_skip)
        self.gradient_checkpointing = False

    @torch.no_grad()
    def initialise(self) -> None:
        """Xavier for matrices, 0.02 for embeddings, and zero for all that makes a block the identity at the start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        zero: list[nn.Module] = [self.final.modulation, self.final.linear]
        if self.modulation is not None:
            zero.append(self.modulation)
        for module in self.modules():
            if isinstance(module, SoraBlock):
                zero += module.zero_initialised()
        for layer in zero:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        c_block: Tensor,
        rotation: Tensor,
        columns: int,
        text: tuple[Tensor | None, Tensor | None],
        registers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block, its activations recomputed in the backward pass where gradient checkpointing is on."""
        arguments = (x, c_block, rotation, columns, *text, registers)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def grid(self, latents: Tensor) -> Grid:
        """Slots, rows and columns of tokens."""
        t, h, w = (n // p for n, p in zip(latents.shape[2:], self.patch, strict=True))
        return t, h, w

    def rotation(self, grid: Grid, device: torch.device, first_slot: int = 0) -> Tensor:
        """Complex (s, p, d / 2)."""
        return rotation_3d(grid, self.config.model_dim // self.config.heads, self.config.rope_theta, device, first_slot)

    def to_value(self, x: Tensor, c: Tensor, latents: Tensor) -> Tensor:
        """Tokens (B, s, p, D) to (B, C, t, h, w), in the latents' dtype."""
        out = self.final(x, c, patchify(latents, self.patch))
        return unpatchify(out, self.patch, latents.shape[3] // self.patch[1]).to(latents.dtype)

    def embed_patches(self, latents: Tensor, condition: Condition) -> Tensor:
        """Noisy latents, known latents and mask, folded to patches -> (B, s, p, D)."""
        B, C, t, h, w = latents.shape
        channels = latents.new_zeros(B, 2 * C + self.config.time_stride, t, h, w)
        channels[:, :C] = latents
        if condition.known is not None and condition.known_mask is not None:
            channels[:, C : 2 * C] = condition.known
            channels[:, 2 * C :] = condition.known_mask[..., None, None]
        x = self.patch_embed(patchify(channels.to(self.patch_embed.weight.dtype), self.patch))
        if not self.config.sine_positions:
            return x
        return x + get_2d_sincos_pos_embed(x.shape[-1], self.grid(latents)[1:], device=x.device).to(x.dtype)

    def embed_conditioning(
        self, latents: Tensor, time: Tensor, condition: Condition, registers: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """adaLN's input (B, s, D), with one more slot at time 0 for registers; text (B, M, D); mask (B, 1, 1, M)."""
        B, t = latents.shape[0], latents.shape[2]
        time = time[:, None].expand(B, t) if time.ndim == 1 else time
        known = condition.wholly_known()
        if known is not None:
            time = time.masked_fill(known, 0)
        # A token is as noisy as its noisiest frame; only one whose frames are all known is clean.
        time = time.unflatten(1, (-1, self.patch[0])).amax(dim=2)  # (B, s)
        c = self.time_embed(F.pad(time, (0, 1)) if registers else time)  # (B, s or s + 1, D)
        if not self.text_embed:
            return F.silu(c), None, None
        text = condition.text
        assert text is not None  # checked on entry
        streams = [embed(x, mask) for embed, x, mask in zip(self.text_embed, text.streams, text.masks, strict=True)]
        for pool, x, mask in zip(self.text_pool, streams, text.masks, strict=True):
            c = c + pool(masked_mean(x, mask))[:, None]
        return F.silu(c), torch.cat(streams, dim=1), torch.cat(text.masks, dim=1)[:, None, None]

    def check_inputs(self, latents: Tensor, condition: Condition) -> None:
        off = [(n, p) for n, p in zip(latents.shape[2:], self.patch, strict=True) if n % p or not n]
        if off:
            nearest = [f"{n} -> {' or '.join(str(m) for m in _multiples(n, p))}" for n, p in off]
            raise ConfigError(
                f"Latents of {_cross(latents.shape[2:])} (frames x height x width) do not divide into patches of "
                f"{_cross(self.patch)}. Nearest legal sizes: {', '.join(nearest)} (latent cells; times the codec's "
                "stride in pixels). Change --num-frames, --height, --width or --patch-size."
            )
        if latents.shape[1] != self.config.in_channels:
            raise ConfigError(
                f"The network was built for latents of {self.config.in_channels} channels and got {latents.shape[1]}: "
                "the codec is another than the one it was trained with."
            )
        check_text(condition.text, self.config.text_widths)


def check_text(text: TextCondition | None, expected: tuple[int, ...]) -> None:
    """Raises ConfigError where `text` has other streams than a network was built for."""
    given = [] if text is None else [x.shape[-1] if x.is_floating_point() else 0 for x in text.streams]
    if given != list(expected):
        raise ConfigError(
            f"The network was built for text streams of widths {list(expected)} (0: the built-in encoder) and got "
            f"{given}: --text-model and --llm-model must be given as they were in training."
        )


def _check(dim: int, heads: int, attention_type: str, adaln: str, patch: tuple[int, int, int]) -> None:
    if dim % heads:
        raise ConfigError(
            f"--model-dim {dim} does not divide into --heads {heads}; the nearest widths that do are "
            f"{' and '.join(str(m) for m in _multiples(dim, 2 * heads))}."
        )
    axis_pairs(dim // heads)
    if attention_type not in ("st", "full"):
        raise ConfigError(f"attention_type is st or full, not {attention_type!r}.")
    if adaln not in ("block", "shared"):
        raise ConfigError(f"adaln is block or shared, not {adaln!r}.")
    if len(patch) != 3 or min(patch) < 1:
        raise ConfigError(f"patch_size is three positive numbers T,H,W, not {patch}.")


def _multiples(n: int, step: int) -> list[int]:
    """The nearest positive multiples of `step` below and above n."""
    return [m for m in (n // step * step, n // step * step + step) if m]


def _cross(sizes: Any) -> str:
    return "x".join(str(int(n)) for n in sizes)
