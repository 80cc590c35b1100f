"""The clips, the codec and the cache of a run, from its options; the same for every recipe."""

import json
import math
from functools import partial
from typing import Any

from titans_video.codecs.base import Codec
from titans_video.codecs.patch import PatchCodec
from titans_video.codecs.table import build_codec, codec_from_checkpoint, parse_init
from titans_video.errors import CodecError
from titans_video.options import CodecOptions, Overrides, SoraOptions
from titans_video.preparing.fill import Encoders, Filled, codec_key, fill_cache, text_keys
from titans_video.preparing.held_out import split
from titans_video.preparing.opening import Data, Together, open_data
from titans_video.recipes.watching import prompts_of
from titans_video.text.table import TextEncoder
from titans_video.training import engine
from titans_video.training.resuming import Resume
from titans_video.types import CodecSpec

FIT_CLIPS = 512
PATCH_CODEC: dict[str, Any] = {"patch": [8, 4, 4], "channels": 96, "smooth": 0.0}


def open_data_and_codec(
    options: SoraOptions,
    accelerator: engine.Engine,
    resume: Resume | None,
    clip_grid: tuple[int, int, int] | None = None,
) -> tuple[Data, Codec]:
    """The clips and the codec. A patch codec is fitted to the clips unless the run goes on from one that has it."""
    fitted = options.codec.vae_backend == "patch"
    codec: Codec | None = None
    if resume and fitted:
        fitted_codec = resume.model()
        codec = codec_from_checkpoint(fitted_codec.config["codec"], fitted_codec.codec, Overrides())
    elif not fitted:
        codec = build_codec(options.codec, device=accelerator.device, load=options.data.cache is None)
    data = open_data(
        options.data,
        codec.spec if codec else spec_of(options.codec),
        clip_grid or options.model.patch_size,
        seed=options.train.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        together=together(accelerator),
    )
    if options.watch.validation_split:
        data = split(data, options.watch.validation_split)
    return data, (codec or _fit(options.codec, data, accelerator)).to(accelerator.device)


def together(accelerator: engine.Engine) -> Together:
    """How these processes share what one of them knows."""
    return Together(partial(engine.once, accelerator), partial(engine.gather, accelerator))


def _patch_arguments(options: CodecOptions) -> tuple[tuple[int, int, int], int, float]:
    """(patch, channels, smooth) of the patch codec: the defaults, changed by --vae-init-json."""
    given = {**PATCH_CODEC, **parse_init(options.vae_init_json)}
    patch, channels, smooth = given["patch"], given["channels"], given["smooth"]
    whole = isinstance(patch, list) and all(type(n) is int and n > 0 for n in [*patch, channels])
    number = type(smooth) in (int, float) and math.isfinite(smooth) and smooth >= 0
    if not whole or not number or len(patch) != 3 or given.keys() != PATCH_CODEC.keys():
        raise CodecError(
            f"--vae-init-json {options.vae_init_json} is not for --vae-backend patch, which takes "
            f"{json.dumps(PATCH_CODEC)} (frames, height and width of a patch in pixels, components kept, and the "
            "errors for which blocks are joined, as a standard deviation of pixels in [-1, 1])."
        )
    if smooth and patch[0] == 1:
        raise CodecError(
            f"--vae-init-json {options.vae_init_json}: blocks of one frame are not joined; leave smooth out, or give "
            "patches of two frames or more."
        )
    return (patch[0], patch[1], patch[2]), channels, float(smooth)


def spec_of(options: CodecOptions) -> CodecSpec:
    """The shapes of a codec's latents; of a patch codec before it has seen a clip."""
    if options.vae_backend != "patch":
        return build_codec(options, load=False).spec
    patch, channels, _ = _patch_arguments(options)
    return CodecSpec("patch", channels, patch, "blocks")


def _fit(options: CodecOptions, data: Data, accelerator: engine.Engine) -> Codec:
    arguments = _patch_arguments(options)
    codec = engine.once(accelerator, lambda: PatchCodec.fit(data.sample_pixels(FIT_CLIPS), *arguments))
    return PatchCodec.from_config(codec.config(), codec.state_dict())  # as a run that goes on will have it


def frames_in_words(options: SoraOptions, data: Data, spec: CodecSpec) -> list[str]:
    """A line that says so where clips have another length than `--num-frames`."""
    asked, patch = options.data.num_frames, options.model.patch_size[0]
    used = data.buckets[0].frames
    if options.data.buckets is not None or spec.is_legal(asked, patch):
        return []
    return [
        f"--num-frames {asked} is not legal for the codec {spec.name} and a temporal patch of {patch} together; "
        f"{used} is used, {spec.frames_at_least(asked, patch)} would be the next."
    ]


def fill(
    options: SoraOptions,
    data: Data,
    codec: Codec,
    text: TextEncoder,
    accelerator: engine.Engine,
    pictures: bool = False,
) -> Filled:
    """Encode what the cache lacks, the prompts of validation too, shared out over the processes; whole when this
    returns.

    Args:
        pictures: as `data.store.EncodingStore`.
    """
    encoders = Encoders(codec_key(codec, options.codec), lambda: codec, text_keys(text), text, pictures)
    assert options.data.cache is not None  # callers checked
    prompts = prompts_of(options.watch, data)
    filled = fill_cache(data, options.data.cache, encoders, prompts=prompts, together=together(accelerator))
    accelerator.print(filled.summary())
    return filled
