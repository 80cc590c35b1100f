"""SoraDiT: a spatio-temporal diffusion transformer over video latents.

Legend: B batch, C latent channels, t h w latent grid, S pixel frames of one latent frame, (pt, ph, pw) patch.
"""

from typing import Any, Literal

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from titans_video.models.backbone import Backbone
from titans_video.models.blocks import AttentionType
from titans_video.types import Condition, Prediction


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
        rotation = self.rotation(grid, x.device)
        c_block = c if self.modulation is None else self.modulation(c)
        for block in self.blocks:
            x, _ = self.run_block(block, x, c_block, rotation, grid[2], (text[0], text[1]))
        return Prediction(self.to_value(x, c, latents), memory)
