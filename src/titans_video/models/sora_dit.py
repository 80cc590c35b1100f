"""SoraDiT: a spatio-temporal diffusion transformer over video latents (DiT, Peebles & Xie 2023).

Legend: B batch, C latent channels, t h w latent grid, S pixel frames of one latent frame, (pt, ph, pw) patch,
s = t / pt temporal slots, p = (h / ph)(w / pw) tokens of a slot, D width, M text tokens of all streams, R registers:
tokens without a place, such as a memory's, beside the video's.
Tokens are carried as (B, s, p, D), so that spatial attention is a view and a slot's modulation a broadcast.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from titans_video.errors import ConfigError, nearest_multiples
from titans_video.models.byte_encoder import ByteEncoder
from titans_video.models.layers import (
    MLP,
    AttentionType,
    CrossAttention,
    FinalLayer,
    SelfAttention,
    SpatialConv,
    TextProjection,
    TimeEmbedding,
    ada_layer_norm,
    axis_pairs,
    freqs_cis_3d,
    masked_mean,
    modulations,
    norm,
    patchify,
    unpatchify,
)
from titans_video.types import Condition, Prediction, TextCondition


class SoraBlock(nn.Module):
    """adaLN-zero block (DiT, Peebles & Xie 2023): the identity at initialisation.

    `st`: spatial self-attention within a slot, then temporal self-attention of each place across slots (Latte,
    OpenSora); `full`: one self-attention over all tokens. Then cross-attention to text, then the MLP.

    adaLN comes in two forms. "block": the block's own Linear from the conditioning, as in DiT. "shared": one Linear of
    the network serves all blocks and each adds a learned table (PixArt's adaLN-single; Wan found that the weights
    saved, a third of a DiT, do more as depth).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention_type: AttentionType = "st",
        cross_attention: bool = True,
        qk_norm: bool = True,
        adaln: Literal["block", "shared"] = "shared",
        conv: bool = False,
    ):
        super().__init__()
        self.dim = dim
        n = 3 * modulations(attention_type) * dim
        self.modulation = nn.Linear(dim, n) if adaln == "block" else None
        self.modulation_table = nn.Parameter(torch.zeros(n)) if adaln == "shared" else None
        self.conv = SpatialConv(dim) if conv else None
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.temporal_attn = SelfAttention(dim, heads, qk_norm) if attention_type == "st" else None
        self.cross_attn = CrossAttention(dim, heads, qk_norm) if cross_attention else None
        self.mlp = MLP(dim, mlp_ratio)

    def zero_initialised(self) -> list[nn.Module]:
        """The layers that must start at zero for the block to start as the identity."""
        parts = (
            self.modulation,
            self.cross_attn.out if self.cross_attn is not None else None,
            self.conv.conv if self.conv is not None else None,
        )
        return [part for part in parts if part is not None]

    def forward(
        self,
        x_BspD: Tensor,
        condition: Tensor,
        freqs_cis: Tensor,
        grid_width: int,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        registers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x_BspD: tokens.
            condition: (B, s, D) for adaLN "block"; (B, s, 9 D or 6 D) from the network's Linear for "shared". With
                registers (B, s + 1, ...), the last of it theirs.
            rotation: complex (s, p, d / 2).
            columns: tokens of one row of the grid.
            text, text_mask: (B, M, D), and (B, 1, 1, M) bool.
            registers: (B, R, D). The temporal attention and the convolution, which go by place, pass them over.
        Returns:
            (B, s, p, D), and the registers or None.
        """
        x, r = x_BspD, None if registers is None else registers[:, None]  # (B, 1, R, D)
        B, s, p, D = x.shape
        ada = condition if self.modulation is None else self.modulation(condition)
        if self.modulation_table is not None:
            ada = ada + self.modulation_table
        ada = ada.view(B, ada.shape[1], 1, -1, 3, D)
        of_x = ada[:, :s].unbind(3)  # one (B, s, 1, 3, D) a sub-layer
        of_r = ada[:, s:].unbind(3)
        if self.conv is not None:
            x = x + self.conv(x, grid_width)

        shift, scale, gate = of_x[0].unbind(3)
        hidden, turn = ada_layer_norm(x, shift, scale), freqs_cis
        if self.temporal_attn is None:
            hidden, turn = hidden.reshape(B, 1, s * p, D), freqs_cis.reshape(1, s * p, -1)
        if r is None:
            y = self.attn(hidden, turn)
        else:
            shift, scale, register_gate = of_r[0].unbind(3)
            y, z = self.attn.with_registers(hidden, ada_layer_norm(r, shift, scale)[:, 0], turn)
            r = torch.addcmul(r, register_gate, z[:, None])
        x = torch.addcmul(x, gate, y.view(B, s, p, D))
        if self.temporal_attn is not None:
            shift, scale, gate = of_x[1].unbind(3)
            across = ada_layer_norm(x, shift, scale).transpose(1, 2).contiguous()  # (B, p, s, D)
            y = self.temporal_attn(across, freqs_cis.transpose(0, 1))
            x = torch.addcmul(x, gate, y.transpose(1, 2))

        if self.cross_attn is not None:
            x = x + self.cross_attn(norm(x).view(B, s * p, D), text, text_mask).view(B, s, p, D)

        x = self._mlp(x, of_x[-1])
        return x, None if r is None else self._mlp(r, of_r[-1])[:, 0]

    def _mlp(self, x: Tensor, ada: Tensor) -> Tensor:
        shift, scale, gate = ada.unbind(3)
        return torch.addcmul(x, gate, self.mlp(ada_layer_norm(x, shift, scale)))


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
                f"{' or '.join(str(m) for m in nearest_multiples(dim, 4))}."
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
        freqs_cis: Tensor,
        grid_width: int,
        text: tuple[Tensor | None, Tensor | None],
        registers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block, its activations recomputed in the backward pass where gradient checkpointing is on."""
        arguments = (x, c_block, freqs_cis, grid_width, *text, registers)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def grid(self, latents: Tensor) -> Grid:
        """Slots, rows and columns of tokens."""
        t, h, w = (n // p for n, p in zip(latents.shape[2:], self.patch, strict=True))
        return t, h, w

    def freqs_cis(self, grid: Grid, device: torch.device, first_slot: int = 0) -> Tensor:
        """Complex (s, p, d / 2)."""
        return freqs_cis_3d(
            grid, self.config.model_dim // self.config.heads, self.config.rope_theta, device, first_slot
        )

    def to_value(self, x: Tensor, c: Tensor, latents: Tensor) -> Tensor:
        """Tokens (B, s, p, D) to (B, C, t, h, w), in the latents' dtype."""
        out = self.final(x, c, patchify(latents, self.patch))
        return unpatchify(out, self.patch, latents.shape[3] // self.patch[1]).to(latents.dtype)

    def embed_patches(self, latents: Tensor, condition: Condition) -> Tensor:
        """Noisy latents, known latents and mask, folded to patches -> (B, s, p, D)."""
        B, C, t, h, w = latents.shape
        channels = latents.new_zeros(B, 2 * C + self.config.time_stride, t, h, w)
        channels[:, :C] = latents
        if condition.cond_latents is not None and condition.cond_mask is not None:
            channels[:, C : 2 * C] = condition.cond_latents
            channels[:, 2 * C :] = condition.cond_mask[..., None, None]
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
        cond_latents = condition.clean_mask()
        if cond_latents is not None:
            time = time.masked_fill(cond_latents, 0)
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
            nearest = [f"{n} -> {' or '.join(str(m) for m in nearest_multiples(n, p))}" for n, p in off]
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
            f"{' and '.join(str(m) for m in nearest_multiples(dim, 2 * heads))}."
        )
    axis_pairs(dim // heads)
    if attention_type not in ("st", "full"):
        raise ConfigError(f"attention_type is st or full, not {attention_type!r}.")
    if adaln not in ("block", "shared"):
        raise ConfigError(f"adaln is block or shared, not {adaln!r}.")
    if len(patch) != 3 or min(patch) < 1:
        raise ConfigError(f"patch_size is three positive numbers T,H,W, not {patch}.")


def _cross(sizes: Any) -> str:
    return "x".join(str(int(n)) for n in sizes)


class SoraDiT(Backbone):
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
        sine_positions: each token is told its place in the frame by fixed sines (DiT) as well: rotary positions only
            say where tokens lie to one another, and some things depend on the borders.
        rope_theta: base of the rotary frequencies (256 as in HunyuanVideo: token grids are tens of cells, not
            thousands).
    Raises:
        ConfigError: sizes that do not go together.
    """

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
        sine_positions: bool = False,
        rope_theta: float = 256.0,
    ):
        super().__init__()
        self.build()
        self.initialise()

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
        self.check_inputs(latents, condition)
        grid = self.grid(latents)
        x = self.embed_patches(latents, condition)  # (B, s, p, D)
        c, *text = self.embed_conditioning(latents, time, condition)
        freqs_cis = self.freqs_cis(grid, x.device)
        c_block = c if self.modulation is None else self.modulation(c)
        for block in self.blocks:
            x, _ = self.run_block(block, x, c_block, freqs_cis, grid[2], (text[0], text[1]))
        return Prediction(self.to_value(x, c, latents), memory)
