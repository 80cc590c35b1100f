"""How far a reconstructed clip is from the original: losses to train a VAE on, and measures to judge one by.

Every loss and measure returns one value for each clip, (B,), which depends on that clip only. Two of them are networks:
LPIPS, with given weights, and a discriminator that is trained with the VAE.

Legend: B batch, C latent channels, T H W pixel frames, height and width. Pixels are in [-1, 1].
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from titans_video.checkpoint import load_tensors
from titans_video.errors import ConfigError, UserError, few, first_line
from titans_video.models.video_vae import ChannelNorm

SCALES = 3  # sizes of the gradient loss, each half of the one before
SMOOTH = 1e-3  # of the Charbonnier loss: below it, errors count quadratically
SSIM_SIDE, SSIM_SIGMA = 11, 1.5
RANGE = 2.0  # between the darkest and the brightest pixel
LEVELS = 255 / RANGE  # levels of an 8-bit picture in a unit of a pixel
SURE = -30.0  # the least log-variance that counts
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of VGG16, by stage."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10


def _row_means(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def charbonnier(error: Tensor) -> Tensor:
    """Return the mean of sqrt(e^2 + 0.001^2) of errors (B, 3, T, H, W); an L1 loss that is smooth at 0."""
    return _row_means((error.square() + SMOOTH**2).sqrt())


def l1(error: Tensor) -> Tensor:
    """Return the mean absolute error."""
    return _row_means(error.abs())


def gradient_error(error: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring errors, along height and width, averaged over three scales.

    It is the distance of the clips' gradients, so it keeps edges sharp. Frames of fewer than 2 pixels have none.
    """
    b, c, t, h, w = error.shape
    x = error.transpose(1, 2).reshape(b * t, c, h, w)
    found = []
    for scale in range(SCALES):
        if scale:
            x = F.avg_pool2d(x, 2)
        if min(x.shape[-2:]) < 2:
            break
        down, right = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
        found.append(_row_means(down.abs().reshape(b, -1)) + _row_means(right.abs().reshape(b, -1)))
    return torch.stack(found).mean(dim=0) if found else error.new_zeros(b)


def temporal_error(error: Tensor, *, is_squared: bool = False) -> Tensor:
    """Return the mean absolute change of the error from frame to frame: what is seen as flicker; 0 for one frame.

    With `is_squared` it is the root of the mean square, which is larger if few frames have most of the change.
    """
    if error.shape[2] < 2:
        return error.new_zeros(len(error))
    change = error[:, :, 1:] - error[:, :, :-1]
    return (_row_means(change.square()) + TINY).sqrt() if is_squared else _row_means(change.abs())


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the mean over latents (B, C, t, h, w) of KL(N(mean, exp(logvar)) || N(0, 1)), in nats."""
    logvar = logvar.clamp(SURE, 20.0)
    return _row_means(0.5 * (mean.square() + logvar.exp() - 1.0 - logvar))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB."""
    return 10 * torch.log10(RANGE**2 / _row_means((a - b).square()).clamp(min=1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004), averaged over frames and colours.

    Windows are Gaussian, 11 pixels wide with a standard deviation of 1.5, and lie within the frame.
    """
    side = min(SSIM_SIDE, *a.shape[-2:])
    at = torch.arange(side, dtype=a.dtype, device=a.device) - (side - 1) / 2
    line = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    x, y = (z.transpose(1, 2).reshape(-1, 1, *z.shape[-2:]) for z in (a, b))
    mx, my = blur(x), blur(y)
    vx, vy, both = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    small, less_small = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    found = (2 * mx * my + small) * (2 * both + less_small) / ((mx * mx + my * my + small) * (vx + vy + less_small))
    return found.reshape(len(a), -1).mean(dim=1)


def flicker(a: Tensor, b: Tensor) -> Tensor:
    """Return `temporal_error` in levels of an 8-bit picture."""
    return temporal_error(a - b) * LEVELS


class LPIPS(nn.Module):
    """The learned perceptual distance of Zhang et al. 2018 on VGG16; parameters are named as in the package `lpips`."""

    def __init__(self) -> None:
        super().__init__()
        self.net, inputs, number = nn.Module(), 3, 0
        for stage, widths in enumerate(VGG16):
            layers = nn.Module()
            number += stage > 0  # the pooling layer
            for width in widths:
                layers.add_module(str(number), nn.Conv2d(inputs, width, 3, padding=1))
                inputs, number = width, number + 2
            self.net.add_module(f"slice{stage + 1}", layers)
            line = nn.Module()
            line.model = nn.ModuleList([nn.Identity(), nn.Conv2d(widths[-1], 1, 1, bias=False)])
            self.add_module(f"lin{stage}", line)
        self.shift = nn.Buffer(torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.scale = nn.Buffer(torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, path: str | Path) -> "LPIPS":
        """Read a state dict of `lpips.LPIPS(net="vgg")`, .pt or .safetensors; ConfigError if it does not fit."""
        path = Path(path).expanduser()
        try:
            tensors = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
            network = cls()
            missing = network.load_state_dict(tensors, strict=False).missing_keys
        except (UserError, OSError, RuntimeError, ValueError) as e:
            raise ConfigError(f"--lpips {path} cannot be read: {first_line(e)}") from None
        if missing:
            raise ConfigError(
                f"--lpips {path} is not the state dict of lpips.LPIPS(net='vgg'): {few(missing)} are missing. Save it "
                "with torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips.pt')."
            )
        return network.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return (B,), the distance of clips (B, 3, T, H, W), averaged over their frames."""
        frames = torch.cat([a, b]).transpose(1, 2).flatten(0, 1)
        x, total = (frames - self.shift) / self.scale, None
        for stage in range(len(VGG16)):
            if stage:
                x = F.max_pool2d(x, 2)
            for layer in getattr(self.net, f"slice{stage + 1}").children():
                x = F.relu(layer(x))
            unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + TINY)
            first, second = unit.chunk(2)
            found = getattr(self, f"lin{stage}").model[1]((first - second).square()).mean(dim=(1, 2, 3))
            total = found if total is None else total + found
        assert total is not None
        return total.view(len(a), -1).mean(dim=1)


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches of a clip of any length (PatchGAN, Isola et al. 2017, with kernels over 3 frames).

    It normalises channels only, so its judgement of a clip does not depend on the others in the batch.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.first = nn.Conv3d(3, width, (3, 4, 4), (1, 2, 2), (1, 1, 1))
        self.layers = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = (1, 2, 2) if i == 0 else (1, 1, 1)
            kernel = (3, 4, 4) if i == 0 else (3, 3, 3)
            self.layers.append(
                nn.Sequential(nn.Conv3d(inputs, outputs, kernel, stride, 1), ChannelNorm(outputs), nn.LeakyReLU(0.2))
            )
        self.last = nn.Conv3d(widths[-1], 1, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 1, T, H / 4, W / 4): positive where clips (B, 3, T, H, W) look real."""
        x = F.leaky_relu(self.first(x), 0.2)
        for layer in self.layers:
            x = layer(x)
        judged: Tensor = self.last(x)
        return judged


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """Return the discriminator's loss of each clip, (B,), from its judgements of real and of made clips."""
    return F.relu(1 - real).flatten(1).mean(dim=1) + F.relu(1 + made).flatten(1).mean(dim=1)
