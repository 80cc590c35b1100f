"""A VAE as it is trained: its losses and its discriminator in one forward pass, its start, its latents' statistics.

Legend: B clips, C latent channels, T H W pixel frames, height and width, t h w the latent grid, S s strides of a latent
cell, P = 3 S s s values of a patch, K principal components.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_video.codecs.base import to_patches
from titans_video.codecs.diffusers import VaeSpec, vae_class
from titans_video.codecs.pca import PCACodec
from titans_video.config.recipes import VaeLossOptions
from titans_video.errors import CheckpointError, ConfigError, first_line
from titans_video.models.reconstruction import (
    LPIPS,
    PatchDiscriminator,
    charbonnier,
    gradient_error,
    hinge,
    kl_divergence,
    l1,
    temporal_error,
)
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.tensor_files import BUILDING_ERRORS

GAN_BETAS = 0.5, 0.9
MOST_GAN = 1e4  # the largest factor of the discriminator's gradient
NUDGE = 0.1  # standard deviations by which latents are moved to see their effect
MOST_EXACT = 4096  # values of a patch whose principal components are computed exactly
TRAINED = {
    "decoder": ("decoder.", "post_quant_conv."),
    "noise": ("decoder.levels.", "decoder.join."),
}
"""Parameters of a VAE that `--trainable` names; for `all`, all of them."""


class Reconstructed(NamedTuple):
    """A reconstruction: `loss` (B,) for each clip, `pixels` (B, 3, T, H, W), `moments` (B, 2C, t, h, w), float32."""

    loss: Tensor
    pixels: Tensor
    moments: Tensor


class VaeNetwork(nn.Module):
    """Encode, decode and judge clips.

    A discriminator and the VAE are trained in the same backward pass. The VAE gets the discriminator's gradient at its
    pixels as a constant, and the discriminator gets the VAE's pixels as constants. So neither trains the other's
    weights, and a step needs one call, as DDP and FSDP2 require.
    """

    is_convolutional = True  # read by `training.optim`

    def __init__(self, vae: Any, spec: VaeSpec, options: VaeLossOptions, *, trainable: str = "all") -> None:
        super().__init__()
        self.vae = vae.train().requires_grad_(True)
        self.spec, self.options, self.trainable = spec, options, trainable
        self.discriminator = None if options.gan_start is None else PatchDiscriminator(options.gan_width)
        for name, parameter in vae.named_parameters() if trainable in TRAINED else ():
            parameter.requires_grad_(name.startswith(TRAINED[trainable]))
        if not options.latent_noise:  # it would get no gradient
            for name, parameter in vae.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not name.startswith(TRAINED["noise"]))
        # Frozen weights do not belong into checkpoints, so this is not a submodule.
        self._perceptual = [] if options.lpips is None else [LPIPS.load(options.lpips)]
        self._no_split_modules = list(getattr(vae, "_no_split_modules", None) or ())

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the discriminator's parameters, which have an optimizer of their own."""
        if self.discriminator is None:
            return []
        return [{"params": list(self.discriminator.parameters()), "lr": self.options.gan_lr, "betas": GAN_BETAS}]

    def forward(
        self,
        pixels: Tensor,
        noise: Tensor,
        adversarial: bool = False,
        errors: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Reconstructed:
        """Encode clips, sample latents with `noise` (B, C, t, h, w), decode them, and compare.

        `errors`, of the same shape and in the scale in which networks see latents, are added before decoding. A decoder
        with noise conditioning gets their standard deviations, `levels` (B,).
        With gradients and `adversarial`, `loss` has the gradient, but not the value, of the discriminator's terms.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable == "all"):
            moments = self._rows(self.spec.encode, pixels).float()
        mean, logvar = moments.chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
        if errors is not None:
            factor = torch.as_tensor(self.spec.shift_and_factor(self.vae)[1]).to(z)
            z = z + errors / factor.reshape(1, -1, 1, 1, 1)
        made = self._rows(partial(self.spec.decode_at, levels=levels), z).float()
        distance = self._distance(made, pixels)
        loss = distance
        if self.trainable == "all":
            loss = loss + self.options.kl_weight * kl_divergence(mean, logvar)
        if self.discriminator is not None and torch.is_grad_enabled():
            loss = loss + (self._adversarial(distance, made, pixels) if adversarial else self._untouched())
        return Reconstructed(loss, made, moments)

    def recompute_activations(self) -> None:
        """Recompute activations in the backward pass, in a VAE whose blocks `limit_activations` does not know.

        Raises ConfigError if its class cannot.
        """
        if self._no_split_modules:
            return
        if not getattr(self.vae, "_supports_gradient_checkpointing", False):
            raise ConfigError(f"--gradient-checkpointing: {type(self.vae).__name__} does not support it; leave it out.")
        self.vae.enable_gradient_checkpointing()  # type: ignore[operator]

    def load_vae_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load the VAE's weights of a checkpoint, whose discriminator is left out."""
        vae = {name.removeprefix("vae."): value for name, value in weights.items() if name.startswith("vae.")}
        self.vae.load_state_dict(vae)

    def _rows(self, function: Any, x: Tensor) -> Tensor:
        """Call one of `VaeSpec`'s functions; those of VAEs for images take one clip at a time."""
        rows = x.split(1) if self.spec.frame_rule == "each" else (x,)
        return torch.cat([function(self.vae, row) for row in rows])

    def _distance(self, made: Tensor, pixels: Tensor) -> Tensor:
        o, error = self.options, made - pixels
        total = charbonnier(error) if o.pixel_loss == "charbonnier" else l1(error)
        if o.gradient_weight:
            total = total + o.gradient_weight * gradient_error(error)
        if o.temporal_weight:
            total = total + o.temporal_weight * temporal_error(error, is_squared=o.temporal_loss == "rms")
        for network in self._perceptual:
            total = total + o.lpips_weight * network.to(made.device)(made, pixels)
        return total

    def _adversarial(self, distance: Tensor, made: Tensor, pixels: Tensor) -> Tensor:
        """Return zeros (B,) with the gradients of the discriminator's hinge loss and of the VAE's adversarial loss.

        The adversarial gradient of each clip is scaled to `gan_weight` times that of its distance, at its pixels. This
        is the adaptive weight of VQGAN (Esser et al. 2021), for each clip instead of the last layer, so that it does
        not depend on how a batch is divided among processes.
        """
        assert self.discriminator is not None
        fixed = made.detach().requires_grad_(True)
        (wanted,) = torch.autograd.grad(-self.discriminator(fixed).mean(dim=(1, 2, 3, 4)).sum(), fixed)
        (usual,) = torch.autograd.grad(distance.sum(), made, retain_graph=True)
        sizes = [x.flatten(1).norm(dim=1) for x in (usual, wanted)]
        factor = (self.options.gan_weight * sizes[0] / sizes[1].clamp(min=1e-12)).clamp(max=MOST_GAN)
        pull = (wanted * factor.view(-1, 1, 1, 1, 1) * made).flatten(1).sum(dim=1)
        judged = hinge(self.discriminator(pixels), self.discriminator(made.detach()))
        total = pull + judged
        return total - total.detach()

    def _untouched(self) -> Tensor:
        """Return 0 with zero gradients of the discriminator, because DDP waits for the gradient of every parameter."""
        assert self.discriminator is not None
        return torch.stack([p.sum() for p in self.discriminator.parameters()]).sum() * 0.0


def rebuild_vae(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a VAE with random weights from its class and config; CheckpointError if it cannot be built."""
    try:
        vae: nn.Module = vae_class(name).from_config(dict(config))
        return vae
    except BUILDING_ERRORS as e:
        raise CheckpointError(f"The {name} of the checkpoint cannot be built: {first_line(e)}") from None


def restored_vae(config: Mapping[str, Any]) -> nn.Module | None:
    """Build the VAE of a checkpoint's config with random weights; None if the config has none."""
    stored = config.get("vae")
    return None if stored is None else rebuild_vae(stored["class"], stored["config"])


def describe_vae(vae: Any) -> dict[str, object]:
    """Return the class and the config of a VAE, for the config of checkpoints."""
    return {"class": type(vae).__name__, "config": plain_config(vae)}


def plain_config(vae: Any) -> dict[str, Any]:
    """Return a VAE's config as plain values."""
    found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in vae.config.items() if not k.startswith("_")}))
    return found


def principal_components(pixels: Tensor, patch: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (P,), basis (P, K) and standard deviations (K,) of the patches of clips (N, 3, T, H, W).

    The first frame is repeated, as the VAE does. Patches of more than `MOST_EXACT` values get a randomised
    decomposition (Halko et al. 2011).
    """
    pixels = torch.cat([pixels[:, :, :1]] * (patch[0] - 1) + [pixels], dim=2)
    size = 3 * patch[0] * patch[1] * patch[2]
    if size <= MOST_EXACT:
        codec = PCACodec.fit(pixels, patch, min(count, size))
        return codec.mean, codec.basis, codec.variance.sqrt() / codec.scales
    x = to_patches(pixels, patch).reshape(-1, size)
    mean = x.mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, basis = torch.svd_lowrank(x - mean, q=min(count + 16, *x.shape), niter=4)
    std, basis = values[:count] / len(x) ** 0.5, basis[:, :count]
    return mean, basis, std.clamp(min=float(std[0]) * 3e-3)


@torch.no_grad()
def latent_statistics(network: VaeNetwork, clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of sampled latents of clips, each (1, 3, T, H, W)."""
    count = 0
    total, squares = torch.zeros(()), torch.zeros(())
    for clip in clips:
        mean, logvar = network.spec.encode(network.vae, clip).double().chunk(2, dim=1)
        over = (0, 2, 3, 4)
        count += mean[:, 0].numel()
        total = total + mean.sum(over)
        squares = squares + (mean.square() + logvar.clamp(-30.0, 20.0).exp()).sum(over)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=1e-12).sqrt()


@torch.no_grad()
def latent_weights(network: VaeNetwork, clips: list[Tensor], std: Tensor) -> Tensor:
    """Return a factor (C,) for each latent channel, of mean square 1, from its effect on pixels.

    The energy of a channel is the change of pixels, squared and summed, for each of its cells that moves by its
    standard deviation `std` (C,). Its factor is energy^(1/4), as `PCACodec` has it for linear codecs. At unit variance,
    networks would learn fine detail as accurately as the brightness of a cell, whose errors are seen as mosaics.
    """
    energy = torch.zeros(len(std), dtype=torch.float64)
    for number, clip in enumerate(clips):
        z = network.spec.encode(network.vae, clip).chunk(2, dim=1)[0]
        exact = network.spec.decode(network.vae, z)
        moves = NUDGE * seeded_randn((1, *z.shape[2:]), [derive_seed(number, "nudge")]).to(z)
        for channel, spread in enumerate(std.tolist()):
            moved = z.clone()
            moved[:, channel] += spread * moves[0]
            change = network.spec.decode(network.vae, moved) - exact
            energy[channel] += float(change.double().square().sum() / moves.double().square().sum())
    energy = energy.clamp(min=float(energy.max()) * 1e-5)
    return (energy**0.25 / energy.sqrt().mean().sqrt()).float()


def set_statistics(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Store mean and standard deviation (C,) of latents as the VAE's class has them: per channel, else one of each."""
    if "latents_mean" in dict(vae.named_buffers()):
        vae.latents_mean.copy_(mean)
        vae.latents_std.copy_(std * vae.config.scaling_factor)
    elif "scaling_factor" in vae.config:
        shift = float(mean.mean()) if vae.config.get("shift_factor") is not None else 0.0
        spread = float(((mean - shift).square() + std.square()).mean().sqrt())
        vae.register_to_config(scaling_factor=1.0 / spread, **({"shift_factor": shift} if shift else {}))
    else:
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
