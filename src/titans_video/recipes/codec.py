"""The codec of a run: from its flags, from the run that is resumed or started from, or fitted to the clips."""

import json
import math

from titans_video.codecs.base import Codec, build_codec, codec_from_checkpoint, parse_init
from titans_video.codecs.external import source_digest
from titans_video.codecs.pca import PCACodec
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.data.dataset import VideoDataset
from titans_video.errors import CodecError
from titans_video.training.checkpointing import Resume
from titans_video.training.distributed import Accelerator, run_on_main
from titans_video.training.init_from import fitted_codec
from titans_video.types import CodecSpec

FIT_CLIPS = 512  # clips to which a PCA codec is fitted
PCA_DEFAULTS: dict[str, object] = {"patch": [8, 4, 4], "channels": 96, "smooth": 0.0}
"""Arguments of a PCA codec without --vae-init-json."""


def _pca_arguments(options: CodecOptions) -> tuple[tuple[int, int, int], int, float]:
    """Return (patch, channels, smooth) of the PCA codec: the defaults, changed by --vae-init-json."""
    given = {**PCA_DEFAULTS, **parse_init(options.vae_init_json)}
    patch, channels, smooth = given["patch"], given["channels"], given["smooth"]
    whole = isinstance(patch, list) and all(type(n) is int and n > 0 for n in [*patch, channels])
    number = type(smooth) in (int, float) and math.isfinite(smooth) and smooth >= 0
    if not whole or not number or len(patch) != 3 or given.keys() != PCA_DEFAULTS.keys():
        raise CodecError(
            f"--vae-init-json {options.vae_init_json} is not for --vae-backend patch, which takes "
            f"{json.dumps(PCA_DEFAULTS)}. A patch has frames, height and width in pixels. The channels are components, "
            "and smooth is the standard deviation of the errors that joining blocks smooths, for pixels in [-1, 1]."
        )
    if smooth and patch[0] == 1:
        raise CodecError(
            f"--vae-init-json {options.vae_init_json}: blocks of one frame cannot be joined; leave smooth out, or use "
            "patches of at least two frames."
        )
    return (patch[0], patch[1], patch[2]), channels, float(smooth)


def codec_spec(options: CodecOptions) -> CodecSpec:
    """Return the shapes of a codec's latents; a PCA codec's are known before it is fitted."""
    if options.vae_backend != "patch":
        return build_codec(options, load=False).spec
    patch, channels, _ = _pca_arguments(options)
    return CodecSpec("patch", channels, patch, "blocks")


def fit_codec(options: CodecOptions, data: VideoDataset, accelerator: Accelerator) -> Codec:
    arguments = _pca_arguments(options)
    codec = run_on_main(accelerator, lambda: PCACodec.fit(data.sample_pixels(FIT_CLIPS), *arguments))
    return PCACodec.from_config(codec.config(), codec.state_dict())  # exactly as a resumed run reads it


def open_codec(
    options: CodecOptions,
    accelerator: Accelerator,
    resume: Resume | None,
    *,
    init_from: str | None = None,
    load: bool,
) -> Codec | None:
    """Return the codec that the flags name; None for a PCA codec that must be fitted to the clips first.

    A fitted codec comes from the checkpoint that is resumed, or from the weights of `init_from` if it has the same
    latents. Without `load`, weights are read at first use.
    """
    if options.vae_backend != "patch":
        return build_codec(options, device=accelerator.device, load=load)
    if resume is None:
        return fitted_codec(init_from, codec_spec(options)) if init_from else None
    checkpoint = resume.model()
    return codec_from_checkpoint(checkpoint.config["codec"], checkpoint.codec, Overrides())


def codec_key(codec: Codec, options: CodecOptions) -> str:
    """Return what distinguishes a codec's latents from any other's: its fingerprint and precision.

    A user's own codec adds its code and constructor arguments, which no fingerprint of weights covers.
    """
    parts: list[str | None] = [codec.spec.name, codec.fingerprint(), options.vae_dtype]
    if options.vae_backend == "external":
        parts += [options.vae_module, options.vae_class, options.vae_init_json, source_digest(codec)]
    return json.dumps(parts)
