"""What stands before and behind the blocks: patches, time, text projections, the last layer.

Legend: B batch, C channels, t h w latent grid, s = t / pt slots, p = (h / ph)(w / pw) tokens of a slot, D width,
L text tokens, E text width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_video.models.fused import modulated_norm

Patch = tuple[int, int, int]
TIME_CHANNELS = 256


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """(B, C, t, h, w) -> (B, s, p, C pt ph pw); a Linear on it is a Conv3d whose stride is its kernel."""
    B, C, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.view(B, C, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(B, t // pt, (h // ph) * (w // pw), C * pt * ph * pw)


def unpatchify(x: Tensor, patch: Patch, rows: int) -> Tensor:
    """The inverse of `patchify`; `rows` = h / ph."""
    B, s, p, values = x.shape
    pt, ph, pw = patch
    C = values // (pt * ph * pw)
    x = x.view(B, s, rows, p // rows, C, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(B, C, s * pt, rows * ph, (p // rows) * pw)


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 x time (float32), then Linear, SiLU, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(TIME_CHANNELS, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        """(B, s) in [0, 1] -> (B, s, D)."""
        half = TIME_CHANNELS // 2
        frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=time.device, dtype=torch.float32))
        angle = 1000 * time.float()[..., None] * frequency
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)  # (B, s, 256)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class TextProjection(nn.Module):
    """A frozen encoder's states to the network's width: RMSNorm, Linear, GELU, Linear.

    The norm comes first because encoders differ in scale by orders: an LLM's states carry a few huge channels.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, L, E), (B, L) bool -> (B, L, D). Padding is blanked first: whatever stands there has no gradient."""
        states = states.to(self.fc1.weight.dtype).masked_fill(~mask[..., None], 0)
        return self.fc2(F.gelu(self.fc1(self.norm(states)), approximate="tanh"))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, L, D) over the tokens where (B, L) is True -> (B, D)."""
    weights = mask.to(x.dtype)[:, None]  # (B, 1, L)
    return (weights @ x).squeeze(1) / weights.sum(-1).clamp(min=1)


class FinalLayer(nn.Module):
    """Modulated norm and a Linear to patches, zero at initialisation (DiT).

    With `gated_skip` each token also says how much of its own noisy patch belongs in the answer, value by value. What a
    network is asked for is mostly noise that stands in its input. Without this, all of it has to pass through the D
    channels of the residual stream, which narrow networks need for what they have to say.
    """

    def __init__(self, dim: int, values: int, gated_skip: bool = False):
        super().__init__()
        self.gated_skip = gated_skip
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, values * (2 if gated_skip else 1))

    def forward(self, x_BspD: Tensor, c_BsD: Tensor, noisy_BspV: Tensor) -> Tensor:
        shift, scale = self.modulation(c_BsD)[:, :, None].chunk(2, dim=-1)
        out = self.linear(modulated_norm(x_BspD, shift, scale))
        if not self.gated_skip:
            return out
        value, gate = out.chunk(2, dim=-1)  # each (B, s, p, V)
        return torch.addcmul(value, gate, noisy_BspV.to(gate.dtype))
