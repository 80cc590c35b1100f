"""SoraDiT: a spatio-temporal diffusion transformer over video latents.

Legend: B batch, C latent channels, t h w latent grid, S pixel frames of one latent frame, (pt, ph, pw) patch,
s = t / pt temporal slots, p = (h / ph)(w / pw) tokens of a slot, D width, M text tokens of all streams.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from titans_video.errors import ConfigError
from titans_video.models.blocks import AttentionType, SoraBlock, modulations
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
from titans_video.types import Condition, Prediction, TextCondition


class SoraDiT(ModelMixin, ConfigMixin):
    """Predicts from noisy latents, a time for each latent frame, text and known frames.

    Known frames come as extra input channels (as in Wan's image-to-video): their latents with the rest blank, and the
    mask of known pixel frames folded to the latent grid.

    Args:
        in_channels: latent channels C.
        time_stride: pixel frames S of one latent frame; the folded mask has S channels.
        patch_size: latent cells (pt, ph, pw) of one token.
        model_dim, depth, heads: width, blocks, attention heads.
        mlp_ratio: hidden width of the MLPs over D.
        attention_type: `st` (spatial, then temporal attention in each block) or `full`.
        text_widths: width of each text stream's states; 0: byte ids, whose encoder is then a part of this network;
            empty: no text.
        text_layers, text_buckets: depth of the byte encoder and size of its table of word prefixes.
        qk_norm: RMSNorm on each head's queries and keys.
        adaln: modulation from a Linear of each `block`, or from one `shared` Linear and a table a block.
        conv: a 3x3 depthwise convolution over each slot's tokens at the start of each block.
        gated_skip: each token adds its own noisy patch to its answer, gated (see `FinalLayer`): for networks that are
            narrow against the values of a patch.
        rope_theta: base of the rotary frequencies (256 as in HunyuanVideo: token grids are tens of cells, not
            thousands).
    Raises:
        ConfigError: sizes that do not go together.
    """

    frame_times: ClassVar[bool] = True
    """Takes a time for each latent frame, so that given frames are clean while others are noisy."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SoraBlock", "EncoderLayer"]
    _repeated_blocks: ClassVar = ["SoraBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "time_embed", "norm", "final"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        time_stride: int = 1,
        patch_size: tuple[int, int, int] = (2, 2, 2),
        model_dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        attention_type: AttentionType = "st",
        text_widths: tuple[int, ...] = (0,),
        text_layers: int = 2,
        text_buckets: int = 4096,
        qk_norm: bool = True,
        adaln: Literal["block", "shared"] = "shared",
        conv: bool = False,
        gated_skip: bool = False,
        rope_theta: float = 256.0,
    ):
        super().__init__()
        _check(model_dim, heads, attention_type, adaln, patch_size)
        self.patch: tuple[int, int, int] = tuple(patch_size)  # type: ignore[assignment]  # JSON gives a list back
        cells = patch_size[0] * patch_size[1] * patch_size[2]
        self.patch_embed = nn.Linear((2 * in_channels + time_stride) * cells, model_dim)
        self.time_embed = TimeEmbedding(model_dim)
        self.text_embed = nn.ModuleList(
            TextProjection(width, model_dim) if width else ByteEncoder(model_dim, heads, text_layers, text_buckets)
            for width in text_widths
        )
        self.text_pool = nn.ModuleList(nn.Linear(model_dim, model_dim) for _ in text_widths)
        shared = 3 * modulations(attention_type) * model_dim
        self.modulation = nn.Linear(model_dim, shared) if adaln == "shared" else None
        self.blocks = nn.ModuleList(
            SoraBlock(model_dim, heads, mlp_ratio, attention_type, bool(text_widths), qk_norm, adaln, conv)
            for _ in range(depth)
        )
        self.final = FinalLayer(model_dim, in_channels * cells, gated_skip)
        self.gradient_checkpointing = False
        self.initialise()

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

    def forward(self, latents: Tensor, time: Tensor, condition: Condition, memory: Any = None) -> Prediction:
        """
        Args:
            latents: (B, C, t, h, w), noisy; t, h, w multiples of the patch.
            time: (B,) or (B, t) in [0, 1], 0 clean. Wholly known latent frames count as 0 whatever is given.
            condition: text and known frames.
            memory: handed back as it came; SoraDiT has none.
        Returns:
            Prediction with value (B, C, t, h, w) in the latents' dtype.
        Raises:
            ConfigError: a size that the patch does not divide, or other text streams than the network was built for.
        """
        self._check_inputs(latents, condition)
        (_, _, t, h, w), (pt, ph, pw) = latents.shape, self.patch
        grid = (t // pt, h // ph, w // pw)
        x = self.embed_patches(latents, condition)  # (B, s, p, D)
        c, text, text_mask = self.embed_conditioning(latents, time, condition)
        rotation = rotation_3d(grid, x.shape[-1] // self.config.heads, self.config.rope_theta, x.device)
        c_block = c if self.modulation is None else self.modulation(c)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c_block, rotation, grid[2], text, text_mask)
            else:
                x = block(x, c_block, rotation, grid[2], text, text_mask)
        value = unpatchify(self.final(x, c, patchify(latents, self.patch)), self.patch, grid[1])
        return Prediction(value.to(latents.dtype), memory)

    def embed_patches(self, latents: Tensor, condition: Condition) -> Tensor:
        """Noisy latents, known latents and mask, folded to patches -> (B, s, p, D)."""
        B, C, t, h, w = latents.shape
        channels = latents.new_zeros(B, 2 * C + self.config.time_stride, t, h, w)
        channels[:, :C] = latents
        if condition.known is not None and condition.known_mask is not None:
            channels[:, C : 2 * C] = condition.known
            channels[:, 2 * C :] = condition.known_mask[..., None, None]
        return self.patch_embed(patchify(channels.to(self.patch_embed.weight.dtype), self.patch))

    def embed_conditioning(
        self, latents: Tensor, time: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """adaLN's input (B, s, D), text (B, M, D) and its mask (B, 1, 1, M)."""
        B, t = latents.shape[0], latents.shape[2]
        time = time[:, None].expand(B, t) if time.ndim == 1 else time
        known = condition.wholly_known()
        if known is not None:
            time = time.masked_fill(known, 0)
        # A token is as noisy as its noisiest frame; only one whose frames are all known is clean.
        c = self.time_embed(time.unflatten(1, (-1, self.patch[0])).amax(dim=2))  # (B, s, D)
        if not self.text_embed:
            return F.silu(c), None, None
        text = condition.text
        assert text is not None  # checked on entry
        streams = [embed(x, mask) for embed, x, mask in zip(self.text_embed, text.streams, text.masks, strict=True)]
        for pool, x, mask in zip(self.text_pool, streams, text.masks, strict=True):
            c = c + pool(masked_mean(x, mask))[:, None]
        return F.silu(c), torch.cat(streams, dim=1), torch.cat(text.masks, dim=1)[:, None, None]

    def _check_inputs(self, latents: Tensor, condition: Condition) -> None:
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
        _check_text(condition.text, self.config.text_widths)


def _check_text(text: TextCondition | None, expected: tuple[int, ...]) -> None:
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
