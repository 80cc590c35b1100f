"""Which codecs there are, and how a checkpoint's is found again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from titans_video.checkpoint import restore_options
from titans_video.codecs.base import Codec
from titans_video.config.generation import Overrides, override
from titans_video.config.options import CodecOptions
from titans_video.errors import CheckpointError, CodecError
from titans_video.fingerprint import warn_if_changed


def _diffusers(options: CodecOptions, init: dict[str, Any], load: bool) -> Codec:
    if not options.pretrained_model:
        raise CodecError(
            "--vae-backend diffusers needs --pretrained-model: a folder of diffusers weights with vae/ in it, or the "
            "VAE's own folder (config.json and *.safetensors). Without a VAE, --vae-backend identity trains on pixels."
        )
    if init:
        raise CodecError(
            "--vae-init-json is for --vae-backend external or identity; a diffusers VAE has its own config."
        )
    from titans_video.codecs.diffusers import DiffusersCodec

    return DiffusersCodec.load(options.pretrained_model, dtype=options.vae_dtype, weights=load)


def _external(options: CodecOptions, init: dict[str, Any], load: bool) -> Codec:
    if not options.vae_module or not options.vae_class:
        raise CodecError(
            "--vae-backend external needs --vae-module and --vae-class, for example --vae-module "
            "train.videos.cogvideox_vae_adapter --vae-class CogVideoXVAEWrapper; docs/codecs.md says what a class "
            "needs."
        )
    from titans_video.codecs.external import load_external

    return load_external(options.vae_module, options.vae_class, init, load=load)


def _identity(options: CodecOptions, init: dict[str, Any], load: bool) -> Codec:
    from titans_video.codecs.identity import IdentityCodec

    return IdentityCodec.from_init(init)


def _patch(options: CodecOptions, init: dict[str, Any], load: bool) -> Codec:
    raise CodecError(
        "--vae-backend patch is fitted to clips by training and lives in its checkpoint; it cannot be built from flags."
    )


BACKENDS: dict[str, Callable[[CodecOptions, dict[str, Any], bool], Codec]] = {
    "diffusers": _diffusers,
    "external": _external,
    "identity": _identity,
    "patch": _patch,
}

OWN_MODULES: dict[tuple[str | None, str | None], str] = {
    ("train.videos.cogvideox_vae_adapter", "CogVideoXVAEWrapper"): "titans_video.codecs.diffusers",
}
"""Documented external codecs that are this project's own, and where the class really stands."""


def flags_to_name_again(options: CodecOptions) -> tuple[str, ...]:
    """The flags that generating from a checkpoint of this codec needs: those of a module that is not this project's."""
    if options.vae_backend != "external" or (options.vae_module, options.vae_class) in OWN_MODULES:
        return ()
    return "--vae-module", str(options.vae_module), "--vae-class", str(options.vae_class)


def parse_init(text: str | None) -> dict[str, Any]:
    """`--vae-init-json` as a dict; {} where it is not given.

    Raises:
        CodecError: not JSON, or not an object.
    """
    try:
        init = json.loads(text) if text else {}
    except ValueError as e:
        raise CodecError(f"--vae-init-json is not JSON ({e}): {text}") from None
    if not isinstance(init, dict):
        raise CodecError(f'--vae-init-json must be a JSON object such as {{"space_to_depth": 4}}; got {text}')
    return init


def build_codec(options: CodecOptions, *, device: torch.device | str = "cpu", load: bool = True) -> Codec:
    """The codec that flags name (a `patch` codec is fitted, see codecs/patch.py).

    Args:
        options: what to build.
        device: where it runs.
        load: read the weights now; otherwise when a clip is first encoded or decoded (a run on cached latents never
            needs them).
    Raises:
        CodecError: weights, module or class are missing or malformed, or flags are.
    """
    return BACKENDS[options.vae_backend](options, parse_init(options.vae_init_json), load).to(device)


def describe_codec(codec: Codec, options: CodecOptions) -> dict[str, Any]:
    """What a checkpoint stores as config["codec"]; its tensors are `codec.state_dict()`."""
    spec = json.loads(json.dumps(asdict(codec.spec)))
    return {"options": asdict(options), "spec": spec, "config": codec.config(), "fingerprint": codec.fingerprint()}


def codec_from_checkpoint(
    config: Mapping[str, Any], state: Mapping[str, Tensor], overrides: Overrides, *, device: torch.device | str = "cpu"
) -> Codec:
    """The codec that a checkpoint was trained with, at the paths that `overrides` may give.

    Args:
        config: a checkpoint's config["codec"].
        state: a checkpoint's codec tensors (of a fitted codec).
        overrides: `pretrained_model`, `vae_*` take the stored ones' place. A module that the checkpoint names and that
            is not this project's is imported only when `overrides.vae_module` names one too.
        device: where the codec runs.
    Raises:
        CheckpointError: it names a module that was not named again, or the codec found has another latent shape.
        CodecError: as `build_codec`.
    """
    options = override(restore_options(CodecOptions, config["options"]), overrides)
    if options.vae_backend == "patch":
        from titans_video.codecs.pca import PCACodec

        codec: Codec = PCACodec.from_config(config["config"], dict(state)).to(device)
    else:
        if options.vae_backend == "external" and overrides.vae_module is None:
            options = replace(options, vae_module=_own_module(options))
        codec = build_codec(options, device=device)
    _same_latents(codec, config["spec"])
    path = options.pretrained_model if options.vae_backend == "diffusers" else options.vae_module
    warn_if_changed("codec", path or options.vae_backend, config.get("fingerprint"), codec.fingerprint())
    return codec


def _own_module(options: CodecOptions) -> str:
    """Where this project has the class that a checkpoint names; never a module found by a name from a checkpoint.

    Raises:
        CheckpointError: the module is not this project's.
    """
    own = OWN_MODULES.get((options.vae_module, options.vae_class))
    if own is None:
        raise CheckpointError(
            f"The checkpoint's codec is the class {options.vae_class} of the module {options.vae_module}. Modules that "
            "a checkpoint names are never imported unasked: if you trust it, name it yourself with "
            f"--vae-module {options.vae_module} --vae-class {options.vae_class}."
        )
    return own


def _same_latents(codec: Codec, stored: Mapping[str, Any]) -> None:
    spec = codec.spec
    now = {"channels": spec.channels, "stride": list(spec.stride), "frame_rule": spec.frame_rule}
    before = {k: stored[k] for k in now} | {"stride": list(stored["stride"])}
    if now != before:
        raise CheckpointError(
            f"The checkpoint was trained on the codec {stored['name']} with {before}; the one given, {spec.name}, has "
            f"{now}. Give the same VAE with --pretrained-model or the --vae-* flags."
        )
