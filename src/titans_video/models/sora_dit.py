"""SoraDiT: a spatio-temporal diffusion transformer over video latents (DiT, Peebles & Xie 2023).

Legend: B batch, C latent channels, t h w latent grid, S pixel frames of one latent frame, (pt, ph, pw) patch, s = t /
pt temporal slots, p = (h / ph)(w / pw) tokens of a slot, V = C pt ph pw values of a patch, D width, d head dim, M text
tokens of all streams, R registers: tokens without a position, such as a memory's. Tokens have the shape (B, s, p, D).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks.context_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from titans_video.errors import ConfigError, nearest_multiples
from titans_video.models.attention import HALF
from titans_video.models.byte_encoder import check_text, text_embeddings
from titans_video.models.compiling import is_compiled
from titans_video.models.context_parallel import ContextPlan, TokenExchange, UlyssesDispatch
from titans_video.models.layers import (
    MLP,
    CrossAttention,
    Patch,
    SelfAttention,
    SpatialConv,
    TimeEmbedding,
    ada_layer_norm,
    axis_pairs,
    freqs_cis_3d,
    gated,
    lengths_for_graphs,
    masked_mean,
    norm,
    patchify,
    residual_dtype,
    unpatchify,
    xavier_init,
)
from titans_video.types import Condition, Prediction, TextCondition

AttentionType = Literal["st", "full"]
Grid = tuple[int, int, int]


def modulation_width(attention_type: AttentionType, dim: int) -> int:
    """Return the values of a block's adaLN: shift, scale and gate for each self-attention and for the MLP."""
    sub_layers = 3 if attention_type == "st" else 2
    return 3 * sub_layers * dim


class SoraBlock(nn.Module):
    """A transformer block with adaLN-zero (DiT, Peebles & Xie 2023): the identity at initialisation.

    `st`: spatial self-attention within a slot, then temporal self-attention across slots (Latte, OpenSora). `full`: one
    self-attention over all tokens. Then cross-attention to text, then the MLP.
    adaLN "block": the block's own Linear, as in DiT. "shared": one Linear of the network serves all blocks, and each
    block adds a learned table (PixArt's adaLN-single), which saves a third of the weights.
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
        width = modulation_width(attention_type, dim)
        self.modulation = nn.Linear(dim, width) if adaln == "block" else None
        self.modulation_table = nn.Parameter(torch.zeros(width)) if adaln == "shared" else None
        self.conv = SpatialConv(dim) if conv else None
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.temporal_attn = SelfAttention(dim, heads, qk_norm) if attention_type == "st" else None
        self.cross_attn = CrossAttention(dim, heads, qk_norm) if cross_attention else None
        self.mlp = MLP(dim, mlp_ratio)

    def zero_initialised(self) -> list[nn.Module]:
        """Return the layers that must start at zero for the block to start as the identity."""
        parts = (
            self.modulation,
            self.cross_attn.out if self.cross_attn is not None else None,
            self.conv.conv if self.conv is not None else None,
        )
        return [part for part in parts if part is not None]

    def forward(
        self,
        x_BspD: Tensor,
        c: Tensor,
        freqs_cis: Tensor,
        grid_width: int,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        registers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the block to tokens (B, s, p, D); return them, and the registers or None.

        Args:
            c: (B, s, D) for adaLN "block"; (B, s, 9 D or 6 D) for "shared"; one more slot at the end for registers.
            freqs_cis, grid_width: complex (s, p, d / 2), and the tokens of one row of the grid.
            text, text_mask: (B, M, D), and (B, 1, 1, M) bool or None.
            registers: (B, R, D). They skip the temporal attention and the convolution, which depend on positions.
        """
        x, r = x_BspD, None if registers is None else registers[:, None]  # r (B, 1, R, D)
        B, s, p, D = x.shape
        ada = c if self.modulation is None else self.modulation(c)
        if self.modulation_table is not None:
            ada = ada + self.modulation_table.to(ada.dtype)
        ada = ada.to(x.dtype)  # a gate of another dtype would change that of the residual stream
        ada = ada.view(B, ada.shape[1], 1, -1, 3, D)
        ada_x = ada[:, :s].unbind(3)  # (B, s, 1, 3, D) for each sub-layer: shift, scale, gate
        ada_r = ada[:, s:].unbind(3)  # (B, 1, 1, 3, D)

        if self.conv is not None:
            x = x + self.conv(x, grid_width)
        x, r = self._attend(x, r, ada_x[0], ada_r[0], freqs_cis)
        if self.temporal_attn is not None:
            x = self._attend_over_time(x, ada_x[1], freqs_cis)
        if self.cross_attn is not None:
            x = x + self.cross_attn(norm(x).view(B, s * p, D), text, text_mask).view(B, s, p, D)
        x = self._mlp(x, ada_x[-1])
        return x, None if r is None else self._mlp(r, ada_r[-1])[:, 0]

    def _attend(
        self, x: Tensor, r: Tensor | None, ada_x: Tensor, ada_r: Tensor, freqs_cis: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Apply self-attention within each slot ("st") or over all tokens ("full"), with the registers r if any."""
        shift, scale, gate = ada_x.unbind(3)
        hidden = ada_layer_norm(x, shift, scale)  # (B, s, p, D)
        if self.temporal_attn is None:
            hidden, freqs_cis = hidden.flatten(1, 2)[:, None], freqs_cis.flatten(0, 1)[None]  # one group of s p tokens
        if r is None:
            return gated(x, gate, self.attn(hidden, freqs_cis).view_as(x)), None
        shift, scale, gate_r = ada_r.unbind(3)
        y, z = self.attn.with_registers(hidden, ada_layer_norm(r, shift, scale)[:, 0], freqs_cis)
        r = gated(r, gate_r, z[:, None])
        return gated(x, gate, y.view_as(x)), r

    def _attend_over_time(self, x: Tensor, ada_x: Tensor, freqs_cis: Tensor) -> Tensor:
        assert self.temporal_attn is not None
        shift, scale, gate = ada_x.unbind(3)
        hidden = ada_layer_norm(x, shift, scale).transpose(1, 2).contiguous()  # (B, p, s, D)
        return gated(x, gate, self.temporal_attn(hidden, freqs_cis.transpose(0, 1)).transpose(1, 2))

    def _mlp(self, x: Tensor, ada: Tensor) -> Tensor:
        shift, scale, gate = ada.unbind(3)
        return gated(x, gate, self.mlp(ada_layer_norm(x, shift, scale)))


class FinalLayer(nn.Module):
    """Modulated norm and a Linear to patches, zero at initialisation (DiT).

    With `gated_skip` each token also predicts how much of its own noisy patch to add to each output value, and with
    `hold_last` how much of its conditioning patch.
    """

    def __init__(self, dim: int, values: int, gated_skip: bool = False, hold_last: bool = False):
        super().__init__()
        self.gated_skip, self.hold_last = gated_skip, hold_last
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, values * (1 + gated_skip + hold_last))

    def forward(self, x_BspD: Tensor, c_BsD: Tensor, noisy_BspV: Tensor, shown_BspV: Tensor | None = None) -> Tensor:
        shift, scale = self.modulation(c_BsD)[:, :, None].chunk(2, dim=-1)
        out: tuple[Tensor, ...] = self.linear(ada_layer_norm(x_BspD, shift, scale)).split(noisy_BspV.shape[-1], dim=-1)
        value, patches = out[0], [noisy_BspV] * self.gated_skip + [shown_BspV] * self.hold_last
        for gate, patch in zip(out[1:], patches, strict=True):  # each (B, s, p, V)
            value = value if patch is None else torch.addcmul(value, gate, patch.to(gate.dtype))
        return value


class Backbone(ModelMixin, ConfigMixin):
    """Embeddings of patches, time and text, a stack of `SoraBlock`s, and the final layer.

    A subclass registers its configuration, with the names of `SoraDiT`'s arguments, and then calls `build`.
    """

    per_frame_time: ClassVar[bool] = True
    """Whether each latent frame has its own time, so conditioning frames can be clean while others are noisy."""

    _no_split_modules: ClassVar = ["SoraBlock", "EncoderLayer"]
    _repeated_blocks: ClassVar = ["SoraBlock"]
    varying_axes: ClassVar = {4: 1, 5: 3}
    """Of the arguments of a block, by position: the axis whose length varies within a size of clip. Here the text."""
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "time_embed", "norm", "final"]

    def build(self) -> None:
        """Create the modules of the registered configuration; ConfigError for sizes that do not fit together."""
        c = self.config
        dim, heads = c.model_dim, c.heads
        _check_config(c)
        self.patch: Patch = tuple(c.patch_size)  # type: ignore[assignment]  # JSON gives a list back
        cells = self.patch[0] * self.patch[1] * self.patch[2]
        # Context parallelism divides the blocks' tokens and positions here.
        self.entry, self.positions = nn.Identity(), nn.Identity()
        self.patch_embed = nn.Linear((2 * c.in_channels + c.time_stride) * cells, dim)
        self.time_embed = TimeEmbedding(dim)
        self.text_embed = text_embeddings(c.text_widths, dim, heads, c.text_layers, c.text_buckets)
        self.text_pool = nn.ModuleList(nn.Linear(dim, dim) for _ in c.text_widths)
        self.modulation = nn.Linear(dim, modulation_width(c.attention_type, dim)) if c.adaln == "shared" else None
        self.blocks = nn.ModuleList(
            SoraBlock(dim, heads, c.mlp_ratio, c.attention_type, bool(c.text_widths), c.qk_norm, c.adaln, c.conv)
            for _ in range(c.depth)
        )
        self.final = FinalLayer(dim, c.in_channels * cells, c.gated_skip, bool(c.get("hold_last")))

    @torch.no_grad()
    def initialise(self) -> None:
        """Initialise as `xavier_init`, then set to zero all that must be zero for each block to be the identity."""
        xavier_init(self.modules())
        zero: list[nn.Module] = [self.final.modulation, self.final.linear]
        if self.modulation is not None:
            zero.append(self.modulation)
        for module in self.modules():
            if isinstance(module, SoraBlock):
                zero += module.zero_initialised()
        for layer in zero:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def check_inputs(self, latents: Tensor, condition: Condition) -> None:
        """Raise ConfigError if the patch does not divide a size, or channels or text streams are not the network's."""
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
                f"The network was built for latents of {self.config.in_channels} channels but got {latents.shape[1]}. "
                "The codec must be the one it was trained with."
            )
        check_text(condition.text, self.config.text_widths)

    def grid(self, latents: Tensor) -> Grid:
        """Return the slots, rows and columns of tokens."""
        t, h, w = (n // p for n, p in zip(latents.shape[2:], self.patch, strict=True))
        return t, h, w

    def show_last(self, condition: Condition) -> Condition:
        """Let the conditioning latents of unknown frames be those of the last known one, with `hold_last`."""
        given, mask = condition.cond_latents, condition.cond_mask
        if given is None or mask is None or not self.final.hold_last:
            return condition
        known = mask.bool().any(dim=1)  # (B, t)
        frames = torch.arange(known.shape[1], device=known.device)
        last = torch.where(known, frames, 0).cummax(dim=1).values
        return replace(condition, cond_latents=given.gather(2, last[:, None, :, None, None].expand_as(given)))

    def freqs_cis(self, grid: Grid, device: torch.device, first_slot: int = 0) -> Tensor:
        """Return the rotary positions, complex (s, p, d / 2)."""
        head_dim = self.config.model_dim // self.config.heads
        freqs: Tensor = self.positions(freqs_cis_3d(grid, head_dim, self.config.rope_theta, device, first_slot))
        return freqs

    def embed_patches(self, latents: Tensor, condition: Condition) -> Tensor:
        """Embed noisy latents, conditioning latents and mask, in patches -> (B, s, p, D), the residual stream."""
        B, C, t, h, w = latents.shape
        channels = latents.new_zeros(B, 2 * C + self.config.time_stride, t, h, w)
        channels[:, :C] = latents
        if condition.cond_latents is not None and condition.cond_mask is not None:
            channels[:, C : 2 * C] = condition.cond_latents
            channels[:, 2 * C :] = condition.cond_mask[..., None, None]
        x = self.patch_embed(patchify(channels.to(self.patch_embed.weight.dtype), self.patch))
        x = x.to(residual_dtype(x))
        if self.config.sine_positions:
            grid = self.grid(latents)[1:]
            positions = get_2d_sincos_pos_embed(x.shape[-1], grid, device=x.device, output_type="pt")
            x = x + positions.to(x.dtype)
        embedded: Tensor = self.entry(x)
        return embedded

    def embed_conditioning(
        self, latents: Tensor, time: Tensor, condition: Condition, registers: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embed time and text: adaLN's input (B, s, D), text (B, M, D), its mask (B, 1, 1, M), or None for no padding.

        With registers, adaLN's input has one more slot, at time 0.
        """
        B, t = latents.shape[0], latents.shape[2]
        time = time[:, None].expand(B, t) if time.ndim == 1 else time
        clean = condition.clean_mask()
        if clean is not None:
            time = time.masked_fill(clean, 0)
        # A token has the time of its noisiest frame. It is clean only if all its frames are.
        time = time.unflatten(1, (-1, self.patch[0])).amax(dim=2)  # (B, s)
        c = self.time_embed(F.pad(time, (0, 1)) if registers else time)  # (B, s or s + 1, D)
        if not self.text_embed:
            return F.silu(c), None, None
        given = condition.text
        assert given is not None  # see check_inputs
        whole = given.unpadded() if self._omits_masks(given, c.dtype) else None
        text, masks = (given, given.masks) if whole is None else (whole, [None] * len(whole.masks))
        streams = [embed(x, mask) for embed, x, mask in zip(self.text_embed, text.streams, masks, strict=True)]
        for pool, x, mask in zip(self.text_pool, streams, masks, strict=True):
            c = c + pool(masked_mean(x, mask))[:, None]
        tokens = torch.cat(streams, dim=1)
        token_mask = torch.cat(given.masks, dim=1)[:, None, None] if whole is None else None
        if is_compiled(self.blocks[0]):
            tokens, token_mask = lengths_for_graphs(tokens, token_mask)
        return F.silu(c), tokens, token_mask

    def _omits_masks(self, text: TextCondition, dtype: torch.dtype) -> bool:
        """Whether text without padding is used without a mask, which FlashAttention does not accept.

        Compiled blocks omit it only for one row, where every batch can: with and without it are two graphs. Float32 has
        no such kernel, and keeps its bits.
        """
        return len(text) == 1 if is_compiled(self.blocks[0]) else dtype in HALF

    def run_block(self, block: nn.Module, x: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
        """Run one block. A step cache (`generation.step_cache`) replaces this method."""
        made: tuple[Tensor, Tensor | None] = block(x, *others)
        return made

    def context_plan(self) -> ContextPlan:
        """Return how several processes share the tokens of a clip: each has a part of every slot.

        Temporal attention needs no exchange then, since a process has its tokens of all slots. Raises ConfigError for a
        network with convolutions, which need the neighbours of a token.
        """
        if self.config.conv:
            raise ConfigError(
                "Context parallelism does not support convolutions (--preset tiny), which need neighbouring tokens. "
                "Use another preset."
            )
        tokens = ContextParallelInput(split_dim=2, expected_dims=4)  # (B, s, p, _)
        return ContextPlan(
            heads=self.config.heads,
            tokens=lambda grid: grid[1] // self.patch[1] * (grid[2] // self.patch[2]),
            split={
                "entry": {"input": tokens},
                "positions": {"input": ContextParallelInput(split_dim=1, expected_dims=3)},
                "final": {"noisy_BspV": tokens, "shown_BspV": tokens},
            },
            join={"final": ContextParallelOutput(gather_dim=2, expected_dims=4)},
            attach=self._attach,
        )

    def _attach(self, exchange: TokenExchange) -> None:
        for block in self.blocks:
            attention: Any = block.attn
            attention.processor = UlyssesDispatch(attention.processor, exchange)

    def to_value(self, x: Tensor, c: Tensor, latents: Tensor, shown: Tensor | None = None) -> Tensor:
        """Map tokens (B, s, p, D) to the prediction (B, C, t, h, w), in the latents' dtype."""
        shown = patchify(shown, self.patch) if self.final.hold_last and shown is not None else None
        out = self.final(x, c, patchify(latents, self.patch), shown)
        return unpatchify(out, self.patch, latents.shape[3] // self.patch[1]).to(latents.dtype)


class SoraDiT(Backbone):
    """Predict from noisy latents, a time for each latent frame, text and conditioning frames.

    Conditioning frames are additional input channels (as in Wan's image-to-video): their latents with the rest zero,
    and their mask folded to the latent grid. Raises ConfigError for sizes that do not fit together.

    Args:
        in_channels, time_stride, patch_size: C; S, which is also the channels of the folded mask; (pt, ph, pw).
        attention_type: `st` (spatial, then temporal attention in each block) or `full`.
        text_widths: width of each text stream's states; 0 means byte ids, encoded by this network; empty means no text.
        text_layers, text_buckets: depth of the byte encoder and size of its table of word prefixes.
        qk_norm, conv: RMSNorm on queries and keys; a 3x3 depthwise convolution over each slot before each block.
        adaln: modulation from a Linear of each `block`, or from one `shared` Linear and a table per block.
        gated_skip: see `FinalLayer`; for networks whose width is small compared with V.
        sine_positions: also add fixed sinusoids of each token's position in the frame (DiT); rotary ones are relative.
        hold_last: unknown frames show the last known one (as in Stable Video Diffusion), and `FinalLayer` may add it.
        rope_theta: base of the rotary frequencies (256 as in HunyuanVideo: token grids are tens of cells).
    """

    step_cache: ClassVar[bool] = True
    """Whether a step cache can skip its blocks: they have no state besides the tokens."""

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
        hold_last: bool = False,
        rope_theta: float = 256.0,
    ):
        super().__init__()
        self.build()
        self.initialise()

    def forward(self, latents: Tensor, time: Tensor, condition: Condition, memory: Any = None) -> Prediction:
        """Predict (B, C, t, h, w) from noisy latents (B, C, t, h, w), in their dtype; errors as in `check_inputs`.

        `time` is (B,) or (B, t) in [0, 1], 0 clean; given latent frames count as 0. `memory` is returned unchanged.
        """
        self.check_inputs(latents, condition)
        grid, condition = self.grid(latents), self.show_last(condition)
        x = self.embed_patches(latents, condition)  # (B, s, p, D)
        c, text, text_mask = self.embed_conditioning(latents, time, condition)
        freqs_cis = self.freqs_cis(grid, x.device)
        c_block = c if self.modulation is None else self.modulation(c)
        for block in self.blocks:
            x, _ = self.run_block(block, x, c_block, freqs_cis, grid[2], text, text_mask)
        return Prediction(self.to_value(x, c, latents, condition.cond_latents), memory)


def _check_config(c: Any) -> None:
    if c.model_dim % c.heads:
        raise ConfigError(
            f"--model-dim {c.model_dim} does not divide into --heads {c.heads}; the nearest widths that do are "
            f"{' and '.join(str(m) for m in nearest_multiples(c.model_dim, 2 * c.heads))}."
        )
    axis_pairs(c.model_dim // c.heads)
    if c.attention_type not in ("st", "full"):
        raise ConfigError(f"attention_type is {c.attention_type!r}; it must be st or full.")
    if c.adaln not in ("block", "shared"):
        raise ConfigError(f"adaln is {c.adaln!r}; it must be block or shared.")
    if len(c.patch_size) != 3 or min(c.patch_size) < 1:
        raise ConfigError(f"patch_size is {c.patch_size}; it must be three positive numbers T,H,W.")
    if c.sine_positions and c.model_dim % 4:
        raise ConfigError(
            f"--sine-positions needs a width that is a multiple of 4 (sines and cosines of two axes): --model-dim "
            f"{c.model_dim} must be {' or '.join(str(m) for m in nearest_multiples(c.model_dim, 4))}."
        )


def _cross(sizes: Iterable[int]) -> str:
    return "x".join(str(int(n)) for n in sizes)
