"""The interface of a codec (pixels to latents and back), and building one from flags or from a checkpoint.

Legend: B batch, C latent channels, T pixel frames, H W pixel size, t h w the latent grid.
A codec's moments are the mean and log-variance of its *unscaled* latents. `scale` turns unscaled latents into the
unit-variance latents that networks are trained on; `unscale` is its inverse.
"""

import importlib
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Self

import torch
from torch import Tensor

from titans_video.checkpoint import override, restore_options, warn_if_changed
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.device import fast_defaults, read_facts
from titans_video.errors import CheckpointError, CodecError
from titans_video.hub import stored_folder
from titans_video.parsing import Malformed, parse_json
from titans_video.schema import PLAIN, MapOf, fits
from titans_video.seeding import seeded_randn
from titans_video.types import PRECISIONS, CodecSpec

NO_NOISE = -30.0
"""The log-variance of a deterministic codec: `from_moments` then returns exactly the mean."""

MAX_LOGVAR = 20.0
"""Log-variances are clamped to [NO_NOISE, MAX_LOGVAR], as in diffusers' DiagonalGaussianDistribution."""

CONTEXT = 4
"""The default of `Codec.decode_context` for codecs whose frames mix in time."""


def without_noise(mean: Tensor) -> Tensor:
    """Return the moments (B, 2C, t, h, w) of a deterministic codec from its mean (B, C, t, h, w)."""
    return torch.cat([mean, torch.full_like(mean, NO_NOISE)], dim=1)


class Codec(ABC):
    """Encode pixels to latents and decode them. A codec implements `spec`, `moments_of` and `pixels_of`.

    It is not an `nn.Module`, so a frozen VAE never ends up in a network's state dict, optimizer or shards.
    """

    spec: CodecSpec
    device: torch.device = torch.device("cpu")

    @classmethod
    def from_options(cls, options: CodecOptions, init: Mapping[str, Any], *, load: bool) -> "Codec":
        """Build the codec that flags describe; `init` is `--vae-init-json`, parsed. Raises CodecError."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "Codec":
        """Rebuild a fitted codec from its `config` and `state_dict`; CodecError if a tensor is missing or misfits."""
        raise NotImplementedError

    @abstractmethod
    def moments_of(self, pixels: Tensor) -> Tensor:
        """Return the unscaled moments (B, 2C, t, h, w) of (B, 3, T, H, W) pixels, whose shape is checked already."""

    @abstractmethod
    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        """Decode unscaled latents (B, C, t, h, w), whose shape is checked already, to (B, 3, frames, H, W)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of weights and configuration; it differs when the codec would give other latents."""

    @property
    def decode_context(self) -> int:
        """How many latent frames before a chunk are decoded together with it, so that a stream has no codec seams."""
        return 0 if self.spec.frame_rule in ("each", "blocks") else CONTEXT

    @property
    def streams(self) -> bool:
        """Whether `decode_chunk` decodes a video chunk by chunk; then no latent frame has to be decoded again."""
        return False

    def decode_chunk(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode the next scaled latents (B, C, m, h, w) of a video; return pixels (B, 3, n, H, W) and the new state.

        `state` is that after the latents before them, empty at first. Only for a codec that `streams`.
        """
        raise NotImplementedError

    def scale(self, unscaled: Tensor) -> Tensor:
        """Turn unscaled latents into the network's latents."""
        return unscaled

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn the network's latents into unscaled latents."""
        return latents

    def config(self) -> dict[str, Any]:
        """Return plain values from which, with `state_dict`, a fitted codec is rebuilt."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a fitted codec for checkpoints; empty if the weights are kept elsewhere."""
        return {}

    def to(self, device: torch.device | str) -> Self:
        """Move to `device`, in place."""
        self.device = torch.device(device)
        return self

    def release(self) -> None:  # noqa: B027 - a codec without frozen weights has nothing to free
        """Free frozen weights, e.g. once all clips are cached; the next use loads them again."""

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance, (B, 2C, t, h, w) float32, unscaled, of a clip (B, 3, T, H, W) in [-1, 1].

        Raises CodecError if a size is off the stride, T does not round-trip, or the codec contradicts its spec.
        """
        if pixels.dim() != 5 or pixels.shape[1] != 3:
            raise CodecError(f"The codec {self.spec.name} takes (B, 3, T, H, W) pixels; it got {tuple(pixels.shape)}.")
        b, _, frames, height, width = pixels.shape
        c, t, h, w = self.spec.latent_shape(frames, height, width)
        moments = self.moments_of(pixels.to(self.device)).float()
        self._expect("encoding", moments, (b, 2 * c, t, h, w), pixels)
        return moments

    def from_moments(
        self,
        moments: Tensor,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample scaled latents with (B, C, t, h, w) `noise`, or noise from one seed per sample or a CPU `generator`.

        Without any of them the noise is zero.
        """
        mean, logvar = moments.chunk(2, dim=1)
        if seeds is not None:
            noise = seeded_randn(mean.shape[1:], seeds)
        elif generator is not None:
            noise = torch.randn(mean.shape, generator=generator)
        if noise is None:
            return self.scale(mean)
        std = torch.exp(0.5 * logvar.clamp(NO_NOISE, MAX_LOGVAR)).masked_fill(logvar <= NO_NOISE, 0.0)
        return self.scale(mean + std * noise.to(mean))

    def encode(
        self, pixels: Tensor, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Encode a clip to scaled latents: `from_moments` of `encode_moments`."""
        return self.from_moments(self.encode_moments(pixels), generator, seeds)

    def encode_cond_frames(self, pixels: Tensor) -> Tensor:
        """Return the moments of conditioning frames (the other frames are blank) as networks on this codec see them."""
        return self.encode_moments(pixels)

    def encode_unscaled(self, pixels: Tensor) -> Tensor:
        """Return the unscaled mean, for pipelines that condition on raw latents (Stable Video Diffusion)."""
        return self.encode_moments(pixels).chunk(2, dim=1)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int) -> Tensor:
        """Decode scaled latents (B, C, t, h, w) to pixels (B, 3, frames, H, W) float32, not clamped.

        Raises CodecError if `frames` does not belong to t latent frames, or the codec contradicts its spec.
        """
        if latents.dim() != 5 or latents.shape[1] != self.spec.channels:
            raise CodecError(
                f"The codec {self.spec.name} decodes (B, {self.spec.channels}, t, h, w) latents; "
                f"it got {tuple(latents.shape)}."
            )
        b, _, t, h, w = latents.shape
        expected = len(self.spec.frame_groups(frames))
        if expected != t:
            raise CodecError(
                f"{frames} frames are {expected} latent frames of the codec {self.spec.name}; it was given {t}."
            )
        _, sh, sw = self.spec.stride
        pixels = self.pixels_of(self.unscale(latents.to(self.device)), frames).float()
        self._expect("decoding", pixels, (b, 3, frames, h * sh, w * sw), latents)
        return pixels

    def _expect(self, doing: str, got: Tensor, shape: tuple[int, ...], source: Tensor) -> None:
        if tuple(got.shape) != shape:
            raise CodecError(
                f"The codec {self.spec.name} gave {tuple(got.shape)} when {doing} {tuple(source.shape)}; its spec "
                f"(channels {self.spec.channels}, stride {self.spec.stride}, frame rule {self.spec.frame_rule}) "
                f"says {shape}."
            )


BACKENDS: dict[str, str] = {
    "diffusers": "titans_video.codecs.diffusers:DiffusersCodec",
    "external": "titans_video.codecs.external:ExternalCodec",
    "identity": "titans_video.codecs.base:IdentityCodec",
    "patch": "titans_video.codecs.pca:PCACodec",
    "tiny": "titans_video.codecs.diffusers:TinyCodec",
}
"""The class of each `--vae-backend`, imported when it is needed."""

OWN_MODULES: dict[tuple[str | None, str | None], str] = {
    ("train.videos.cogvideox_vae_adapter", "CogVideoXVAEWrapper"): "titans_video.codecs.diffusers",
}
"""Documented external codecs that this project itself contains, and the module of each class."""


def backend_class(backend: str) -> type[Codec]:
    """Import the class of a `--vae-backend`."""
    module, _, name = BACKENDS[backend].partition(":")
    found: type[Codec] = getattr(importlib.import_module(module), name)
    return found


def flags_to_name_again(options: CodecOptions) -> tuple[str, ...]:
    """Return the flags that generating from a checkpoint of this codec needs: those that name the user's own module."""
    if options.vae_backend != "external" or (options.vae_module, options.vae_class) in OWN_MODULES:
        return ()
    return "--vae-module", str(options.vae_module), "--vae-class", str(options.vae_class)


def parse_init(text: str | None) -> dict[str, Any]:
    """Parse `--vae-init-json` ({} if it is not given); CodecError if it is not a JSON object."""
    try:
        init = parse_json(text) if text else {}
    except Malformed as e:
        raise CodecError(f"--vae-init-json is not JSON ({e}): {text}") from None
    if not fits(MapOf(PLAIN), init):
        raise CodecError(f'--vae-init-json must be a JSON object such as {{"space_to_depth": 4}}; got {text}')
    return init


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of fp32, bf16, fp16, or of torch's own names of these; CodecError for another name.

    `auto` is float32: commands put the choice for their device in its place.
    """
    if dtype == "auto":
        return torch.float32
    names = PRECISIONS | {str(value).removeprefix("torch."): value for value in PRECISIONS.values()}
    found = names.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise CodecError(f"The VAE's dtype {dtype!r} is none of {', '.join(names)}.")
    return found


def build_codec(options: CodecOptions, *, device: torch.device | str = "cpu", load: bool = True) -> Codec:
    """Build the codec that flags describe (the `patch` codec is fitted instead, see `codecs.pca.PCACodec.fit`).

    `load` reads the weights now; otherwise at first use. `device` decides an `auto` precision. Errors: as
    `Codec.from_options`.
    """
    init = parse_init(options.vae_init_json)
    if options.vae_dtype == "auto":
        options = replace(options, vae_dtype=fast_defaults(read_facts(torch.device(device))).dtype)
    return backend_class(options.vae_backend).from_options(options, init, load=load).to(device)


def describe_codec(codec: Codec, options: CodecOptions) -> dict[str, Any]:
    """Return what a checkpoint stores as config["codec"]; its tensors are `codec.state_dict()`."""
    spec = json.loads(json.dumps(asdict(codec.spec)))
    return {"options": asdict(options), "spec": spec, "config": codec.config(), "fingerprint": codec.fingerprint()}


def codec_from_checkpoint(
    config: Mapping[str, Any], state: Mapping[str, Tensor], overrides: Overrides, *, device: torch.device | str = "cpu"
) -> Codec:
    """Build the codec that a checkpoint was trained with, from its config["codec"] and codec tensors.

    `overrides` may replace `pretrained_model` and `vae_*`. A foreign module is imported only if it names it again.
    Raises CheckpointError if it does not, the VAE is not a folder, or the latent shape differs; or CodecError.
    """
    options = override(restore_options(CodecOptions, config["options"]), overrides)
    if options.vae_backend == "patch":
        codec = backend_class("patch").from_config(config["config"], state).to(device)
    else:
        if options.vae_backend == "external" and overrides.vae_module is None:
            options = replace(options, vae_module=_own_module(options))
        if options.vae_backend == "diffusers" and overrides.pretrained_model is None and options.pretrained_model:
            folder = stored_folder(options.pretrained_model, "--pretrained-model", "VAE")
            options = replace(options, pretrained_model=folder)
        codec = build_codec(options, device=device)
    _check_same_latents(codec, config["spec"])
    path = options.pretrained_model if options.vae_backend == "diffusers" else options.vae_module
    warn_if_changed("codec", path or options.vae_backend, config.get("fingerprint"), codec.fingerprint())
    return codec


def _own_module(options: CodecOptions) -> str:
    """Return this project's module for the class that a checkpoint names; CheckpointError for any other module."""
    own = OWN_MODULES.get((options.vae_module, options.vae_class))
    if own is None:
        raise CheckpointError(
            f"The checkpoint's codec is the class {options.vae_class} of the module {options.vae_module}. A module "
            "that a checkpoint names is not imported unless you name it too. If you trust it, add "
            f"{shlex.join(['--vae-module', str(options.vae_module), '--vae-class', str(options.vae_class)])}."
        )
    return own


def _check_same_latents(codec: Codec, stored: Mapping[str, Any]) -> None:
    spec = codec.spec
    now = {"channels": spec.channels, "stride": list(spec.stride), "frame_rule": spec.frame_rule}
    before = {k: stored[k] for k in now} | {"stride": list(stored["stride"])}
    if now != before:
        raise CheckpointError(
            f"The checkpoint was trained on the codec {stored['name']} with {before}; the one given, {spec.name}, has "
            f"{now}. Give the same VAE with --pretrained-model or the --vae-* flags."
        )


class IdentityCodec(Codec):
    """Keep pixels as latents, or fold blocks of `factor` pixels into channels; lossless, without weights."""

    def __init__(self, factor: tuple[int, int, int] = (1, 1, 1)) -> None:
        ft, fh, fw = self.factor = factor
        self.spec = CodecSpec("identity", 3 * ft * fh * fw, factor, "blocks" if ft > 1 else "each")

    @classmethod
    def from_options(cls, options: CodecOptions, init: Mapping[str, Any], *, load: bool) -> "IdentityCodec":
        """Build it from `--vae-init-json`: {}, {"space_to_depth": 4} or {"factor": [2, 4, 4]}; else CodecError."""
        unknown = sorted(set(init) - {"space_to_depth", "factor"})
        if unknown or len(init) > 1:
            raise CodecError(
                f"--vae-init-json {dict(init)} is not for --vae-backend identity, which takes nothing, "
                '{"space_to_depth": 4} or {"factor": [2, 4, 4]} (frames, height, width).'
            )
        side = init.get("space_to_depth", 1)
        factor = init.get("factor", [1, side, side])
        whole = isinstance(factor, list | tuple) and all(type(n) is int and 0 < n <= 1024 for n in factor)
        if not whole or len(factor) != 3:
            raise CodecError(
                f"--vae-init-json {dict(init)}: whole numbers from 1 to 1024 are expected, three of them in a factor."
            )
        return cls((factor[0], factor[1], factor[2]))

    def moments_of(self, pixels: Tensor) -> Tensor:
        return without_noise(to_patches(pixels, self.factor).movedim(-1, 1).contiguous())

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        return from_patches(unscaled.movedim(1, -1), self.factor)

    def config(self) -> dict[str, Any]:
        return {"factor": list(self.factor)}

    def fingerprint(self) -> str:
        return "identity-" + "x".join(map(str, self.factor))


def to_patches(pixels: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, 3, T, H, W) -> (B, t, h, w, P)."""
    b, c, t, h, w = pixels.shape
    pt, ph, pw = patch
    x = pixels.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // pt, h // ph, w // pw, c * pt * ph * pw)


def from_patches(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, t, h, w, P) -> (B, 3, T, H, W)."""
    b, t, h, w, _ = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, t, h, w, 3, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(b, 3, t * pt, h * ph, w * pw)
