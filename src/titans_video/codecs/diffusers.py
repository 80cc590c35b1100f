"""VAEs from diffusers, read from a pipeline's folder, each with its own scaling, strides and frame rule.

Legend: B batch, C latent channels, T pixel frames, H W pixel size, t h w the latent grid, N frames of all samples.
Samples are processed one by one, and frame-by-frame VAEs in chunks of frames, to bound memory.
"""

import gc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from torch import Tensor

from titans_video.checkpoint import fingerprint_folder, fingerprint_tensors
from titans_video.codecs.base import CONTEXT, Codec, parse_dtype, without_noise
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError, first_line
from titans_video.hub import load_pretrained
from titans_video.parsing import Malformed, read_json
from titans_video.schema import shown
from titans_video.tensor_files import BUILDING_ERRORS, check_model_config
from titans_video.types import CodecSpec, FrameRule

TILE_ABOVE = 640 * 640
"""Frames of more pixels than this are encoded and decoded in blended spatial tiles."""

CHUNK_PIXELS = 8 * 512 * 512
"""Frame-by-frame VAEs take at most this many pixels at once (always at least one frame)."""

TEMPORAL_PIXELS = 33 * 576 * 1024
"""The decoder of Stable Video Diffusion takes at most this many pixels at once."""

FRAMEWISE_ABOVE = 121 * 512 * 768
"""LTX clips of more pixels than this (all frames together) are also processed in blended temporal tiles."""

TINY = Path(str(files("titans_video"))) / "assets" / "vae_4x4x4"
"""The folder of the package's own VAE."""

MOST_SMOOTH, TINY_SMOOTH = 10.0, 0.1
WEIGHTS = "diffusion_pytorch_model.safetensors"
INSTALL = "needs the packages diffusers and accelerate: pip install diffusers accelerate"


@dataclass(frozen=True)
class VaeSpec:
    """How one VAE class is used.

    Attributes:
        stride: (S, sh, sw) of a loaded VAE.
        shift_and_factor: as in its pipeline: latents = (unscaled - shift) * factor, each a scalar or C values.
        encode, decode: (vae, (1, 3, T, H, W)) -> (1, 2C, t, h, w), and (vae, (1, C, t, h, w)) -> (1, 3, T, H, W).
        has_levels: its decoder may take the standard deviation of the latents' errors; see `TitansVideoVAE.decode`.
    """

    frame_rule: FrameRule
    stride: Callable[[Any], tuple[int, int, int]]
    shift_and_factor: Callable[[Any], tuple[Any, Any]]
    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    context: int = CONTEXT
    has_levels: bool = False

    def takes_noise(self, vae: Any) -> bool:
        return self.has_levels and bool(vae.config.noise_conditioning)

    def decode_at(self, vae: Any, z: Tensor, levels: Tensor | float | None) -> Tensor:
        """Decode latents with errors of these standard deviations, which the VAE gets if it takes them."""
        if levels is None or not self.takes_noise(vae):
            return self.decode(vae, z)
        pixels: Tensor = vae.decode(z, levels).sample
        return pixels


def _moments(vae: Any, x: Tensor) -> Tensor:
    posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def _as_frames(x: Tensor) -> Tensor:
    """(1, C, T, H, W) -> (T, C, H, W)."""
    return x[0].transpose(0, 1)


def _as_clip(frames: list[Tensor]) -> Tensor:
    """Chunks of (N, C, H, W) -> (1, C, T, H, W)."""
    return torch.cat(frames).transpose(0, 1)[None]


def _encode_framewise(vae: Any, x: Tensor) -> Tensor:
    size = max(1, CHUNK_PIXELS // (x.shape[-2] * x.shape[-1]))
    return _as_clip([_moments(vae, chunk) for chunk in _as_frames(x).split(size)])


def _decode_framewise(vae: Any, z: Tensor) -> Tensor:
    s = _spatial(vae) ** 2
    size = max(1, CHUNK_PIXELS // (z.shape[-2] * z.shape[-1] * s))
    return _as_clip([vae.decode(chunk).sample for chunk in _as_frames(z).split(size)])


def _decode_temporal(vae: Any, z: Tensor) -> Tensor:
    # The decoder's convolutions mix all frames of a clip, so a clip is decoded whole, as its pipeline does by default.
    # A long video is decoded in chunks, each with a few more frames on either side.
    frames, pixels = z.shape[2], z.shape[-2] * z.shape[-1] * _spatial(vae) ** 2
    most = max(TEMPORAL_PIXELS // pixels, 4 * CONTEXT)
    if frames <= most:
        return _as_clip([vae.decode(_as_frames(z), num_frames=frames).sample])
    step, found = most - 2 * CONTEXT, []
    for start in range(0, frames, step):
        first, stop = max(start - CONTEXT, 0), min(start + step + CONTEXT, frames)
        decoded = vae.decode(_as_frames(z[:, :, first:stop]), num_frames=stop - first).sample
        found.append(decoded[start - first : start - first + step])
    return _as_clip(found)


def _decode_clip(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z).sample


def _decode_ltx(vae: Any, z: Tensor) -> Tensor:
    # Later LTX decoders take a noise level; 0 with no added noise is their pipeline's default.
    time = z.new_zeros(1) if vae.config.timestep_conditioning else None
    return vae.decode(z, time).sample


def _spatial(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _framewise_stride(vae: Any) -> tuple[int, int, int]:
    return 1, _spatial(vae), _spatial(vae)


def _cog_stride(vae: Any) -> tuple[int, int, int]:
    return int(vae.config.temporal_compression_ratio), _spatial(vae), _spatial(vae)


def _wan_stride(vae: Any) -> tuple[int, int, int]:
    side = int(vae.config.scale_factor_spatial)
    return int(vae.config.scale_factor_temporal), side, side


def _ratio_stride(vae: Any) -> tuple[int, int, int]:
    side = int(vae.spatial_compression_ratio)
    return int(vae.temporal_compression_ratio), side, side


def _by_factor(vae: Any) -> tuple[Any, Any]:
    return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor


def _by_wan_statistics(vae: Any) -> tuple[Any, Any]:
    return vae.config.latents_mean, 1.0 / torch.tensor(vae.config.latents_std)


def _by_own_statistics(vae: Any) -> tuple[Any, Any]:
    weight = torch.tensor(vae.config.latents_weight or 1.0)
    return vae.config.latents_mean or 0.0, weight / torch.tensor(vae.config.latents_std or 1.0)


def _by_ltx_statistics(vae: Any) -> tuple[Any, Any]:
    return vae.latents_mean.float(), vae.config.scaling_factor / vae.latents_std.float()


VAE_SPECS = {
    "AutoencoderKL": VaeSpec("each", _framewise_stride, _by_factor, _encode_framewise, _decode_framewise, 0),
    "AutoencoderKLTemporalDecoder": VaeSpec("each", _framewise_stride, _by_factor, _encode_framewise, _decode_temporal),
    "AutoencoderKLCogVideoX": VaeSpec("cogvideox", _cog_stride, _by_factor, _moments, _decode_clip),
    "AutoencoderKLWan": VaeSpec("causal", _wan_stride, _by_wan_statistics, _moments, _decode_clip),
    "AutoencoderKLHunyuanVideo": VaeSpec("causal", _ratio_stride, _by_factor, _moments, _decode_clip),
    "AutoencoderKLLTXVideo": VaeSpec("causal", _ratio_stride, _by_ltx_statistics, _moments, _decode_ltx),
    "TitansVideoVAE": VaeSpec("causal", _ratio_stride, _by_own_statistics, _moments, _decode_clip, 0, True),
}
OWN = {"TitansVideoVAE": "titans_video.models.video_vae"}
"""The modules of classes that diffusers does not have."""


class DiffusersCodec(Codec):
    """A frozen VAE of a class in `VAE_SPECS`, scaled as its diffusers pipeline scales it.

    `smooth` is the standard deviation of errors of latents that decoding removes; see `TitansVideoVAE.decode`.
    """

    smooth = 0.0

    def __init__(self, vae: Any, folder: Path | None = None) -> None:
        self._vae: Any = vae.eval().requires_grad_(False)
        self._dtype = vae.dtype
        self._describe(vae, folder)

    def _describe(self, vae: Any, folder: Path | None) -> None:
        """Set everything that can be determined without the weights."""
        name = type(vae).__name__
        self.vae_spec = VAE_SPECS[name]
        self.folder = folder
        self.noise_conditioning = self.vae_spec.takes_noise(vae)
        self._fingerprint: str | None = None
        channels = vae.config.get("latent_channels") or vae.config.z_dim
        weight = vae.config.get("latents_weight")
        variance = None if weight is None else tuple(w**2 for w in weight)
        self.spec = CodecSpec(name, int(channels), self.vae_spec.stride(vae), self.vae_spec.frame_rule, variance)
        shift, factor = self.vae_spec.shift_and_factor(vae)
        self.shift = torch.as_tensor(shift, dtype=torch.float32).detach().cpu().reshape(1, -1, 1, 1, 1)
        self.factor = torch.as_tensor(factor, dtype=torch.float32).detach().cpu().reshape(1, -1, 1, 1, 1)

    @classmethod
    def load(cls, path: str | Path, dtype: str | torch.dtype = "fp32", *, weights: bool = True) -> Self:
        """Read a VAE from a folder with vae/config.json or config.json; nothing is downloaded.

        `dtype` is as in `parse_dtype`; `weights` reads them now, otherwise at first use.
        Raises CodecError if the folder has no VAE, an unknown class, or missing or misshapen weights.
        """
        codec = cls.__new__(cls)
        codec._open(find_vae(path), parse_dtype(dtype), weights)
        return codec

    @classmethod
    def from_options(cls, options: CodecOptions, init: Mapping[str, Any], *, load: bool) -> Self:
        if not options.pretrained_model:
            raise CodecError(
                "--vae-backend diffusers needs --pretrained-model: a folder of diffusers weights with vae/ in it, or "
                "the VAE's own folder (config.json and *.safetensors). Without a VAE, --vae-backend identity trains on "
                "pixels."
            )
        smooth = parse_smooth(init)
        codec = cls.load(options.pretrained_model, dtype=options.vae_dtype, weights=load)
        codec.set_smooth(smooth)
        return codec

    def set_smooth(self, smooth: float) -> None:
        """Set how much decoding smooths; CodecError if the decoder cannot."""
        if smooth and not self.noise_conditioning:
            raise CodecError(
                f'--vae-init-json {{"smooth": {smooth:g}}}: this {self.spec.name} takes no noise level. Leave smooth '
                "out, or train a VAE with --noise-conditioning."
            )
        self.smooth = smooth

    def _open(self, folder: Path, dtype: torch.dtype, weights: bool) -> None:
        vae = load_vae(folder, dtype) if weights else meta_vae(folder, dtype) or load_vae(folder, dtype)
        self._vae = None if vae.device.type == "meta" else vae.eval().requires_grad_(False)
        self._dtype = dtype
        self._describe(vae, folder)

    @property
    def decode_context(self) -> int:
        return self.vae_spec.context

    @property
    def vae(self) -> Any:
        """The VAE, loaded at first use and again after `release`."""
        if self._vae is None:
            assert self.folder is not None  # a VAE without a folder is never released
            self._vae = load_vae(self.folder, self._dtype).eval().requires_grad_(False).to(self.device)
        return self._vae

    def release(self) -> None:
        if self.folder is not None:
            self._vae = None
            gc.collect()

    def to(self, device: torch.device | str) -> Self:
        if self._vae is not None:
            self._vae.to(torch.device(device))
        self.shift, self.factor = self.shift.to(device), self.factor.to(device)  # not at each use
        return super().to(device)

    def scale(self, unscaled: Tensor) -> Tensor:
        return (unscaled - self.shift.to(unscaled)) * self.factor.to(unscaled)

    def unscale(self, latents: Tensor) -> Tensor:
        return latents / self.factor.to(latents) + self.shift.to(latents)

    def moments_of(self, pixels: Tensor) -> Tensor:
        self._bound_memory(pixels.shape[-2] * pixels.shape[-1], pixels.shape[-3])
        return torch.cat([self.vae_spec.encode(self.vae, x.to(self.vae.dtype)) for x in pixels.split(1)])

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        _, sh, sw = self.spec.stride
        self._bound_memory(unscaled.shape[-2] * sh * unscaled.shape[-1] * sw, frames)
        rows = unscaled.split(1)
        return torch.cat([self.vae_spec.decode_at(self.vae, z.to(self.vae.dtype), self.smooth) for z in rows])

    @property
    def streams(self) -> bool:
        return self.spec.name in OWN

    @torch.no_grad()
    def decode_chunk(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        _, sh, sw = self.spec.stride
        self._bound_memory(latents.shape[-2] * sh * latents.shape[-1] * sw, latents.shape[2])
        kept = {name: value.to(self.device) for name, value in state.items()}
        unscaled = self.unscale(latents.to(self.device)).to(self.vae.dtype)
        pixels, after = self.vae.decode_chunk(unscaled, kept, self.smooth)
        return pixels.float(), after

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = (
                fingerprint_folder(self.folder) if self.folder else fingerprint_tensors(self.vae.state_dict())
            )
        return self._fingerprint

    def _bound_memory(self, frame_pixels: int, frames: int) -> None:
        """Use tiles for large frames, and temporal tiles for LTX, which else processes a whole clip at once."""
        if hasattr(self.vae, "use_tiling"):
            if frame_pixels > TILE_ABOVE:
                self.vae.enable_tiling()
            else:
                self.vae.use_tiling = False
        if self.spec.name == "AutoencoderKLLTXVideo":
            # Its encoder reads the decoder's switch.
            self.vae.use_framewise_decoding = self.vae.use_framewise_encoding = frames * frame_pixels > FRAMEWISE_ABOVE


def parse_smooth(init: Mapping[str, Any]) -> float:
    """Return `smooth` of `--vae-init-json`: {} or {"smooth": 0.2}; CodecError for anything else."""
    smooth = init.get("smooth", 0.0)
    if set(init) - {"smooth"} or type(smooth) not in (int, float) or not 0 <= smooth <= MOST_SMOOTH:
        raise CodecError(
            f'--vae-init-json {dict(init)}: a VAE has its own config, and takes nothing or {{"smooth": 0.2}}: the '
            f"standard deviation of the errors that decoding smooths, from 0 to {MOST_SMOOTH:g}."
        )
    return float(smooth)


def find_vae(path: str | Path) -> Path:
    """Return the VAE's own folder: `path`/vae or `path`; CodecError if neither has a config.json."""
    path = Path(path).expanduser()
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    what = "has neither vae/config.json nor config.json" if path.is_dir() else "is not a folder here"
    raise CodecError(
        f"{path} {what}. A folder of diffusers weights with vae/ in it (config.json and *.safetensors), or the VAE's "
        "own folder, is expected; nothing is downloaded (`hf download NAME --local-dir DIR` fetches one). "
        "Without a VAE, --vae-backend identity trains on pixels."
    )


def class_name(folder: Path) -> str:
    """Return the class that a VAE's folder describes; CodecError if it is unreadable or not in `VAE_SPECS`."""
    try:
        check_model_config(folder)
        name = read_json(folder / "config.json", strict=False).get("_class_name")
    except (OSError, Malformed) as e:
        raise CodecError(f"{folder / 'config.json'} cannot be read: {e}.") from None
    if not isinstance(name, str) or name not in VAE_SPECS:
        raise CodecError(
            f"{folder / 'config.json'} describes the class {shown(name)}; the supported VAEs are "
            f"{', '.join(VAE_SPECS)}. Another one can be wrapped with --vae-backend external (docs/guides/codecs.md)."
        )
    return str(name)


def vae_class(name: str) -> Any:
    """Import the class of a name in `VAE_SPECS`; CodecError without diffusers."""
    if name in OWN:
        return getattr(importlib.import_module(OWN[name]), name)
    try:
        import diffusers
    except ImportError:
        raise CodecError(f"--vae-backend diffusers {INSTALL}") from None
    return getattr(diffusers, name)


def meta_vae(folder: Path, dtype: torch.dtype) -> Any:
    """Return a VAE without weights, on `meta`; None if its scaling is among weights that are not in one file."""
    kind = vae_class(class_name(folder))
    try:
        with torch.device("meta"):
            vae = kind.from_config(kind.load_config(folder, local_files_only=True, trust_remote_code=False))
    except BUILDING_ERRORS as e:
        raise CodecError(f"The {kind.__name__} in {folder} cannot be built: {first_line(e)}") from None
    wanted = [name for name, _ in vae.named_buffers() if name in ("latents_mean", "latents_std")]
    if not wanted:
        return vae
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as f:
            for name in wanted:
                setattr(vae, name, f.get_tensor(name).to(dtype))
    except BUILDING_ERRORS:
        return None
    return vae


def load_vae(folder: Path, dtype: torch.dtype) -> Any:
    kind = vae_class(class_name(folder))
    return load_pretrained(kind, folder, kind.__name__, CodecError, torch_dtype=dtype)


class TinyCodec(DiffusersCodec):
    """The VAE of the package: a `TitansVideoVAE` for small videos, with strides 4x4x4 and 16 channels."""

    @classmethod
    def from_options(cls, options: CodecOptions, init: Mapping[str, Any], *, load: bool) -> Self:
        if options.pretrained_model:
            raise CodecError(
                "--vae-backend tiny is the package's own VAE. Leave out --pretrained-model, or use --vae-backend "
                "diffusers."
            )
        init = {"smooth": TINY_SMOOTH} | dict(init)
        return super().from_options(replace(options, pretrained_model=str(TINY)), init, load=load)


class FirstFrameCodec(DiffusersCodec):
    """A VAE that encodes the first frame, the only conditioning frame, as a clip of one frame, without blank frames.

    Source: `prepare_latents` of CogVideoXImageToVideoPipeline in diffusers.
    """

    @torch.no_grad()
    def encode_cond_frames(self, pixels: Tensor) -> Tensor:
        """Return (B, 2C, t, h, w) of (B, 3, T, H, W): the first frame's moments, then zeros without noise."""
        first = self.encode_moments(pixels[:, :, :1])
        t = len(self.spec.frame_groups(pixels.shape[2]))
        blank = without_noise(first.new_zeros(first.shape[0], first.shape[1] // 2, t - 1, *first.shape[3:]))
        return torch.cat([first, blank], dim=2)

    def fingerprint(self) -> str:
        """Return the VAE's fingerprint with a suffix, because a cache must separate these conditioning frames."""
        return f"{super().fingerprint()} first frame alone"


class CogVideoXVAEWrapper(DiffusersCodec):
    """CogVideoX's VAE from a local folder; arguments and errors are those of `DiffusersCodec.load`."""

    cache_version: ClassVar = "b1ea7a00087a443f769b2627d22f31a9"
    """Part of the keys of cached latents; see `codecs.external.source_digest`. Change it only if the latents change."""

    def __init__(
        self,
        pretrained_path: str | Path,
        dtype: str | torch.dtype = "float32",
        device: torch.device | str = "cpu",
        load: bool = True,
    ) -> None:
        folder = find_vae(pretrained_path)
        name = class_name(folder)
        if name != "AutoencoderKLCogVideoX":
            raise CodecError(
                f"{folder} contains an {name}, not CogVideoX's VAE; load it with --vae-backend diffusers "
                "--pretrained-model."
            )
        self._open(folder, parse_dtype(dtype), load)
        self.to(device)
