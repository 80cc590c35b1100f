"""Which text encoders there are, and how a checkpoint's are found again."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from titans_video.checkpoint import restore_options
from titans_video.config.generation import Overrides, override
from titans_video.config.options import TextOptions
from titans_video.errors import CheckpointError, TextError
from titans_video.fingerprint import warn_if_changed
from titans_video.text.base import ByteStream, Stream, TextEncoder


def build_text(
    options: TextOptions, device: torch.device | str = "cpu", *, load: bool = True, needed: bool = True
) -> TextEncoder:
    """Encoders as flags name them.

    Args:
        options: `text_model` is `builtin`, `none`, a folder or a hub name; `llm_model` a folder or a hub name.
        device: where encoders run and their states lie.
        load: read the weights now; otherwise at the first prompt (a run on cached states never needs them).
        needed: the network cannot do without text.
    Raises:
        TextError: a model is missing, incomplete or disagrees with its flags.
    """
    streams: list[Stream] = []
    if options.text_model == "builtin":
        streams.append(ByteStream(options.text_max_length))
        streams[0].to(device)
    elif options.text_model != "none":
        streams.append(_pretrained().text_stream(options, device, load))
    if options.llm_model is not None:
        streams.append(_pretrained().llm_stream(options, device, load))
    if not streams and needed:
        raise TextError("--text-model none leaves no text encoder: give --llm-model, or --text-model builtin.")
    return TextEncoder(streams, options)


def _pretrained() -> ModuleType:
    """Imported only by runs that have a frozen encoder."""
    from titans_video.text import huggingface

    return huggingface


def text_from_checkpoint(
    config: Mapping[str, Any], overrides: Overrides, device: torch.device | str = "cpu"
) -> TextEncoder:
    """The encoders that a checkpoint was trained with, at the paths that `overrides` may give.

    Args:
        config: a checkpoint's config["text"].
        overrides: `text_model`, `llm_model`, `local_files_only` take the stored ones' place.
        device: as in `build_text`.
    Raises:
        CheckpointError: the encoders found have other widths, or are more or fewer, than the network's.
        TextError: as `build_text`.
    """
    stored = restore_options(TextOptions, config["options"])
    options = override(stored, overrides)
    if options.llm_model is not None and stored.llm_model is None:
        raise CheckpointError("--llm-model: the checkpoint was trained without an LLM, so it has no place for one.")
    if ("builtin" in (stored.text_model, options.text_model)) and stored.text_model != options.text_model:
        raise CheckpointError(
            f"--text-model {options.text_model}: the checkpoint was trained with {stored.text_model!r}; "
            "a frozen encoder and the built-in one cannot take each other's place."
        )
    text = build_text(options, device, needed=config.get("widths") != [])
    widths = config.get("widths", text.widths)
    if list(widths) != text.widths:
        raise CheckpointError(
            f"The checkpoint was trained with text encoders of widths {list(widths)}; the given ones have "
            f"{text.widths}. Give the folders of the same models with --text-model and --llm-model."
        )
    paths = [p for p in (options.text_model, options.llm_model) if p not in (None, "none")]
    for path, before, now in zip(paths, config["fingerprints"], text.fingerprints(), strict=True):
        warn_if_changed("text encoder", path, before, now)
    return text
