"""A causal video VAE: convolutions on the latent grid around a linear codec, and streaming of videos of any length.

Pixels are folded into patches (space to depth), so all blocks run on the latent grid, or on a grid that is a few times
finer. Encoder and decoder are a linear map of a patch plus a network whose last layer starts at zero. Fitted by
`set_linear`, they start as a linear codec.
No layer normalises over time or space, so a frame depends only on earlier frames and on its surroundings.

Legend: B batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, S pixel frames and s
pixels (height, width) of one latent cell, P = 3 S s s values of a patch, D width of a network, K >= C components, L
features of a noise level.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from titans_video.errors import ConfigError

State = dict[str, Tensor]
"""The tensors that a stream keeps between two chunks, by name; of constant size. Empty before the first chunk."""

LOG_VARIANCE = -6.0
"""The log-variance of the latents before training: noise of 0.05 beside a mean of variance 1."""

TILE = 512  # pixels of a side of a tile
CHUNK = 32  # latent frames that a whole clip is processed in at once, without gradients
HISTORY = 2  # earlier frames that a causal convolution reads
JOIN_WIDTH = 24
PIXEL_REACH = 5  # pixels on each side that a decoded pixel depends on, besides its cell: of `refine` and `Join`
LEVEL_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def set_zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def set_rows(layer: nn.Conv3d, rows: Tensor, bias: Tensor, first: int = 0) -> None:
    """Set some outputs of a linear layer of cells, from number `first` on, to `rows` (N, inputs) and `bias` (N,)."""
    assert layer.bias is not None
    chosen = slice(first, first + len(rows))
    layer.weight[chosen] = rows[..., None, None, None]
    layer.bias[chosen] = bias


def level_features(noise: Tensor) -> Tensor:
    """Return features (B, L) of noise levels (B,). At level 0 they are 0, so a linear layer of them has no effect."""
    return torch.tanh(noise[:, None] * torch.tensor(LEVEL_SCALES).to(noise))


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of each cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + 1e-6)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class CausalBlock(nn.Module):
    """A residual block: a convolution within each frame, then one over a frame and the two before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(width, width, (HISTORY + 1, 1, 1))
        set_zero(self.time)

    def forward(
        self, x: Tensor, before: Tensor | None = None, modulation: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (B, D, t, h, w) of the same shape, and the last frames that the next chunk needs as `before`.

        Before a video, its first frame is repeated. `modulation` (B, 2D) is added to scale and shift of the norm.
        """
        y = self.norm(x)
        if modulation is not None:
            scale, shift = modulation[..., None, None, None].to(y.dtype).chunk(2, dim=1)
            y = torch.addcmul(shift, y, 1 + scale)
        y = F.silu(self.space(y))
        before = y[:, :, :1].expand(-1, -1, HISTORY, -1, -1) if before is None else before
        y = torch.cat((before, y), dim=2)
        return x + self.time(y), y[:, :, -HISTORY:].clone()


class CausalNetwork(nn.Module):
    """A linear map of each cell, plus residual blocks whose sum starts at zero.

    The blocks work on a grid that is `finer` times finer along height and width. With `has_levels` a noise level scales
    the inputs of the linear map and modulates the blocks. Level 0 changes nothing.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, blocks: int, finer: int = 1, has_levels: bool = False
    ) -> None:
        super().__init__()
        self.finer = finer
        self.sizes = (inputs, *[2 * width] * blocks)
        self.levels = nn.Linear(len(LEVEL_SCALES), sum(self.sizes), bias=False) if has_levels else None
        self.linear = nn.Conv3d(inputs, outputs, 1)
        self.conv_in = nn.Conv3d(inputs, width * finer**2, 1)
        self.blocks = nn.ModuleList([CausalBlock(width) for _ in range(blocks)])
        self.norm = ChannelNorm(width)
        self.conv_out = nn.Conv3d(width * finer**2, outputs, 1)
        set_zero(self.conv_out)
        if self.levels is not None:
            set_zero(self.levels)
        self.gradient_checkpointing = False  # set by `enable_gradient_checkpointing`
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def forward(self, x: Tensor, state: Mapping[str, Tensor], noise: Tensor | None = None) -> tuple[Tensor, State]:
        """Run the network on (B, inputs, t, h, w); `noise` (B,) are noise levels."""
        kept: State = {}
        parts: Sequence[Tensor | None] = [None] * len(self.sizes)
        if self.levels is not None and noise is not None:
            parts = self.levels(level_features(noise).to(self.levels.weight.dtype)).split(self.sizes, dim=1)
        y = unfold(self.conv_in(x), 1, self.finer)
        for i, (block, modulation) in enumerate(zip(self.blocks, parts[1:], strict=True)):
            before = state.get(f"block{i}")
            if self.gradient_checkpointing and torch.is_grad_enabled() and self._gradient_checkpointing_func:
                y, kept[f"block{i}"] = self._gradient_checkpointing_func(block, y, before, modulation)
            else:
                y, kept[f"block{i}"] = block(y, before, modulation)
        if parts[0] is not None:
            x = x * (1 + parts[0][..., None, None, None].to(x.dtype))
        return self.linear(x) + self.conv_out(fold(F.silu(self.norm(y)), 1, self.finer)), kept


class Join(nn.Module):
    """Let the frames of each latent frame begin at the last one before them, where that hides errors of the latents.

    The jump d between the two frames is added to the S frames with gates g of each pixel: x_i + g_i d. The gates come
    from d and from the motion before and after it, and are 0 at noise level 0.
    """

    def __init__(self, frames: int, width: int = JOIN_WIDTH) -> None:
        super().__init__()
        self.frames = frames
        self.conv_in = nn.Conv2d(12, width, 5, padding=2)
        self.levels = nn.Linear(len(LEVEL_SCALES), width, bias=False)
        self.conv_out = nn.Conv2d(width, frames, 3, padding=1, bias=False)
        set_zero(self.conv_out)

    def forward(self, pixels: Tensor, before: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return pixels (B, 3, S t, H, W), and the last group as `before` of the next chunk, as it was given."""
        x = pixels.unflatten(2, (-1, self.frames)).transpose(1, 2)  # (B, t, 3, S, H, W)
        last = x[:, -1].clone()  # (B, 3, S, H, W)
        if noise is None:
            return pixels, last
        if before is None:  # a video begins without a jump
            before = x[:, 0, :, :1].expand_as(last)
        earlier = torch.cat((before[:, None], x[:, :-1]), dim=1)
        jump = earlier[..., -1, :, :] - x[..., 0, :, :]  # (B, t, 3, H, W)
        motions = [(y[..., -1, :, :] - y[..., 0, :, :]).abs() for y in (earlier, x)]
        seen = torch.cat((jump, jump.abs(), *motions), dim=2)
        strength = self.levels(level_features(noise).to(self.levels.weight.dtype)).repeat_interleave(x.shape[1], dim=0)
        hidden = F.silu(self.conv_in(seen.flatten(0, 1))) * strength[..., None, None].to(x.dtype)
        gates = torch.tanh(self.conv_out(hidden)).unflatten(0, x.shape[:2])  # (B, t, S, H, W)
        joined = x + gates[:, :, None] * jump[:, :, :, None]
        return joined.transpose(1, 2).flatten(2, 3), last


class Encoder(CausalNetwork):
    """Map folded pixels (B, P, t, h, w) to moments (B, 2C, t, h, w)."""


class Decoder(CausalNetwork):
    """Map latents (B, C, t, h, w) to pixels (B, 3, S t, H, W); a small convolution then refines each full frame."""

    def __init__(
        self, inputs: int, strides: tuple[int, int], width: int, blocks: int, finer: int, refine: int, has_levels: bool
    ) -> None:
        super().__init__(inputs, 3 * strides[0] * strides[1] ** 2, width, blocks, finer, has_levels)
        self.strides = strides
        self.join = Join(strides[0]) if has_levels else None
        self.refine = (
            nn.Sequential(
                nn.Conv3d(3, refine, (1, 3, 3), padding=(0, 1, 1)),
                nn.SiLU(),
                nn.Conv3d(refine, 3, (1, 3, 3), padding=(0, 1, 1)),
            )
            if refine
            else None
        )
        if self.refine is not None:
            set_zero(self.refine[2])

    def forward(self, x: Tensor, state: Mapping[str, Tensor], noise: Tensor | None = None) -> tuple[Tensor, State]:
        folded, kept = super().forward(x, state, noise)
        pixels = unfold(folded, *self.strides)
        if self.refine is not None:
            pixels = pixels + self.refine(pixels)
        if self.join is not None:
            pixels, kept["frames"] = self.join(pixels, state.get("frames"), noise)
        return pixels, kept


class TitansVideoVAE(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """A causal VAE for clips of 1 + S k frames, in the style of diffusers' AutoencoderKL.

    `encode_chunk` and `decode_chunk` process a video of any length chunk by chunk, in constant memory, with the same
    result as the whole video at once. Tiles overlap by all cells that reach them, so they leave no seams.

    Args:
        spatial_stride, temporal_stride: s, 4 to 32, and S, 1 to 8.
        encoder_width, decoder_width, encoder_blocks, decoder_blocks: of the residual blocks.
        block_stride: pixels of a cell of the grid that the blocks work on, a divisor of s; None: s, the latent grid.
        refine_width: channels of the refinement of full frames; 0: none.
        latents_mean, latents_std: statistics of the latents on the training data, with which networks normalise them.
        noise_conditioning: the decoder gets the noise level of its latents, as that of LTX-Video does.
        latents_weight: factors of the normalised latents by channel; see `training.vae_network.latent_weights`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["CausalBlock"]
    _repeated_blocks: ClassVar = ["CausalBlock"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        spatial_stride: int = 4,
        temporal_stride: int = 4,
        encoder_width: int = 128,
        decoder_width: int = 128,
        encoder_blocks: int = 3,
        decoder_blocks: int = 5,
        refine_width: int = 16,
        noise_conditioning: bool = False,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        latents_weight: Sequence[float] | None = None,
        block_stride: int | None = None,
    ) -> None:
        super().__init__()
        if not 4 <= spatial_stride <= 32 or not 1 <= temporal_stride <= 8:
            raise ConfigError(
                "A video VAE has a spatial stride from 4 to 32 and a temporal stride from 1 to 8; got "
                f"{spatial_stride} and {temporal_stride}."
            )
        values = 3 * temporal_stride * spatial_stride**2
        if not 1 <= latent_channels <= values:
            raise ConfigError(f"{latent_channels} latent channels: a patch has {values} values; give 1 to {values}.")
        cell = spatial_stride if block_stride is None else block_stride
        if cell < 1 or spatial_stride % cell:
            raise ConfigError(
                f"A block stride of {cell} does not divide the spatial stride {spatial_stride}. Change --block-stride."
            )
        finer = spatial_stride // cell
        strides = temporal_stride, spatial_stride
        self.encoder = Encoder(values, 2 * latent_channels, encoder_width, encoder_blocks, finer)
        self.decoder = Decoder(
            latent_channels, strides, decoder_width, decoder_blocks, finer, refine_width, noise_conditioning
        )
        rows = torch.zeros(latent_channels, values)
        set_rows(self.encoder.linear, rows, torch.full((latent_channels,), LOG_VARIANCE), latent_channels)
        self.use_tiling = self.use_slicing = False
        self.tile_size, self.chunk_size = TILE, CHUNK

    @property
    def spatial_compression_ratio(self) -> int:
        return int(self.config.spatial_stride)

    @property
    def temporal_compression_ratio(self) -> int:
        return int(self.config.temporal_stride)

    def enable_tiling(self, tile_size: int = TILE) -> None:
        """Process frames in tiles of about `tile_size` pixels, whose results are those of whole frames."""
        self.use_tiling, self.tile_size = True, tile_size

    def with_noise_conditioning(self) -> "TitansVideoVAE":
        """Return this VAE with noise conditioning, which is new and has no effect yet unless it had some."""
        if self.config.noise_conditioning:
            return self
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        conditioned = TitansVideoVAE(**{**config, "noise_conditioning": True})
        conditioned.load_state_dict(conditioned.state_dict() | self.state_dict())
        return conditioned

    def set_linear(self, mean: Tensor, basis: Tensor, std: Tensor) -> None:
        """Start as the linear codec of these principal components, the leading C of them.

        `mean` is (P,), `basis` (P, K) with orthonormal columns, and `std` (K,) the components' standard deviations.
        Latents get unit variance. The first layer of the encoder also gets the leading components, up to its width.
        """
        channels, encoder = self.config.latent_channels, self.encoder
        whitening = (basis / std).T  # (K, P)
        set_rows(encoder.linear, whitening[:channels], -(whitening[:channels] @ mean))
        rows = whitening[: encoder.conv_in.out_channels]
        set_rows(encoder.conv_in, rows, -(rows @ mean))
        set_rows(self.decoder.linear, (basis * std)[:, :channels], mean)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode clips (B, 3, T, H, W) in [-1, 1]; `latent_dist` is of latents (B, C, t, h, w), not normalised.

        Raises ConfigError if T is not 1 + S k, or a size is off the stride.
        """
        strides = self.temporal_compression_ratio, self.spatial_compression_ratio
        if x.dim() != 5 or (x.shape[2] - 1) % strides[0] or x.shape[3] % strides[1] or x.shape[4] % strides[1]:
            raise ConfigError(
                f"A video VAE with strides {strides} encodes (B, 3, 1 + {strides[0]} k, H, W) with H and W multiples "
                f"of {strides[1]}; got {tuple(x.shape)}."
            )
        rows = x.split(1) if self.use_slicing else [x]
        moments = torch.cat([self._whole(self.encode_chunk, row, self.chunk_size * strides[0]) for row in rows])
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(
        self, z: Tensor, noise: Tensor | float | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, C, t, h, w), not normalised, to pixels (B, 3, 1 + S (t - 1), H, W), not clamped.

        `noise`, (B,) or a number, is the standard deviation of the latents' errors in the scale in which networks see
        latents. A decoder with `noise_conditioning` smooths them. ConfigError: it has none.
        """
        rows = z.split(1) if self.use_slicing else [z]
        levels = self._levels(noise, z)
        parts = [None] * len(rows) if levels is None else levels.split([len(row) for row in rows])
        made = [
            self._whole(partial(self.decode_chunk, noise=part), row, self.chunk_size)
            for row, part in zip(rows, parts, strict=True)
        ]
        pixels = torch.cat(made)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def encode_chunk(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encode the next frames (B, 3, n, H, W) of a video, from the `state` after the frames before them.

        Returns moments (B, 2C, m, h, w) of the latent frames that are complete, m >= 0, and the new state. The first
        frame of a video is a latent frame of its own.
        """
        stride = self.temporal_compression_ratio
        before = x[:, :, :1].expand(-1, -1, stride - 1, -1, -1) if not state else state["pending"]
        x = torch.cat((before, x), dim=2)
        whole = x.shape[2] // stride * stride
        folded = fold(x[:, :, :whole], stride, self.spatial_compression_ratio)
        moments, kept = self._tiled(self.encoder, folded, state or {}, 0, 2 * self.config.latent_channels)
        return moments, kept | {"pending": x[:, :, whole:].clone()}

    def decode_chunk(
        self, z: Tensor, state: State | None = None, noise: Tensor | float | None = None
    ) -> tuple[Tensor, State]:
        """Decode the next latent frames (B, C, m, h, w), from the `state` after those before them.

        Returns pixels (B, 3, n, H, W) and the new state: n = S m, and S - 1 fewer in the first chunk of a video.
        `noise` is as in `decode`.
        """
        side, levels = self.spatial_compression_ratio, self._levels(noise, z)
        pixels, kept = self._tiled(self.decoder, z, state or {}, side, 3, levels)
        return pixels if state else pixels[:, :, self.temporal_compression_ratio - 1 :], kept

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode clips, as diffusers' AutoencoderKL does."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _levels(self, noise: Tensor | float | None, z: Tensor) -> Tensor | None:
        """Return noise levels (B,) on the device of the latents; None if nothing is to be smoothed."""
        if noise is None or (not isinstance(noise, Tensor) and noise == 0):
            return None
        if not self.config.noise_conditioning:
            raise ConfigError("This VAE was trained without noise_conditioning, so it decodes without a noise level.")
        return torch.as_tensor(noise, dtype=torch.float32, device=z.device).expand(len(z))

    def _whole(self, step: Callable[[Tensor, State | None], tuple[Tensor, State]], x: Tensor, size: int) -> Tensor:
        """Process whole clips, in chunks of `size` frames unless gradients are needed."""
        state: State | None = None
        parts = []
        for chunk in x.split(x.shape[2] if torch.is_grad_enabled() else size, dim=2):
            part, state = step(chunk, state)
            parts.append(part)
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _tiled(
        self,
        network: CausalNetwork,
        x: Tensor,
        state: State,
        pixels: int,
        outputs: int,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Run a network on cells (B, ., t, h, w), tile by tile if that is on; a cell gives `pixels` or 0: one cell."""
        b, _, t, h, w = x.shape
        scale = pixels or 1
        if t == 0:
            kept = {name: value for name, value in state.items() if name != "pending"}
            return x.new_empty(b, outputs, 0, h * scale, w * scale), kept
        tile = max(self.tile_size // self.spatial_compression_ratio, 1) if self.use_tiling else max(h, w)
        if max(h, w) <= tile:
            found: tuple[Tensor, State] = network(x, state, noise)
            return found
        # Cells around a tile that its result depends on.
        reach = -(-len(network.blocks) // network.finer) + (-(-PIXEL_REACH // pixels) if pixels else 0)
        rows, kept = [], {}
        for i in range(0, h, tile):
            columns = []
            for j in range(0, w, tile):
                top, left, name = max(i - reach, 0), max(j - reach, 0), f"{i}.{j}."
                part = x[..., top : i + tile + reach, left : j + tile + reach]
                own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
                y, after = network(part, own, noise)
                kept |= {name + key: value for key, value in after.items()}
                down, right = (i - top) * scale, (j - left) * scale
                columns.append(y[..., down : down + tile * scale, right : right + tile * scale])
            rows.append(torch.cat(columns, dim=-1))
        return torch.cat(rows, dim=-2), kept


def fold(x: Tensor, frames: int, side: int) -> Tensor:
    """Fold blocks into channels: (B, c, T, H, W) -> (B, P, t, h, w); P in the order (c, S, s, s)."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // frames, frames, h // side, side, w // side, side)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * frames * side * side, t // frames, h // side, w // side)


def unfold(x: Tensor, frames: int, side: int) -> Tensor:
    """Invert `fold`."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, -1, frames, side, side, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // (frames * side**2), t * frames, h * side, w * side)
