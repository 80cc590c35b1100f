"""Text encoders: prompts to `TextCondition`, one stream per encoder, never concatenated.

Legend: B prompts, L tokens, E width of a stream.
"""

import importlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_video.checkpoint import override, restore_options, warn_if_changed
from titans_video.config.generation import Overrides
from titans_video.config.options import TextOptions
from titans_video.errors import CheckpointError, TextError
from titans_video.hub import stored_folder
from titans_video.types import END_OF_TEXT, TextCondition, token_counts

MOST_MEASURED = 50_000  # captions whose length is measured at the start of a run


class Stream(Protocol):
    """One text encoder. `width` is E of its hidden states, 0 if it returns byte ids that the network embeds itself."""

    width: int

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return states (B, L, E) float or ids (B, L) int64, padded on the right, and their mask (B, L) bool.

        The mask stays on the CPU, so that the host knows the lengths without waiting for the device.
        """

    def measure(self, prompts: Sequence[str]) -> "Lengths":
        """Measure prompts before they are cut; needs no weights."""

    def fingerprint(self) -> str | None:
        """Return a hash of the encoder's weights; None if it has none."""

    def to(self, device: torch.device | str) -> None:
        """Move the encoder; its results are on `device`."""

    def release(self) -> None:
        """Free the weights; `width` and `fingerprint` stay available, and the next `encode` loads them again."""


@dataclass(frozen=True)
class Lengths:
    """Lengths `found` of prompts, the `longest` that one encoder reads, and their `unit` with the flag that sets it."""

    longest: int
    unit: str
    found: list[int]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor; from pinned memory, so that this process does not wait for a GPU's earlier work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def drop_captions(
    condition: TextCondition, empty: TextCondition, drop: Tensor, on_host: Tensor | None = None
) -> TextCondition:
    """Replace the captions chosen by `drop` with the empty prompt, of which `empty` is one row.

    `drop` is (B,) bool for all streams together, or (B, number of streams) for each separately. `on_host` is a copy on
    the CPU if `drop` is on a device, so that the lengths stay known.
    """
    drop, known = (
        x[:, None].expand(-1, len(condition.streams)) if x.dim() == 1 else x
        for x in (drop, drop if on_host is None else on_host)
    )
    pairs = [
        _drop_rows(*parts, drop[:, i])
        for i, parts in enumerate(zip(condition.streams, condition.masks, empty.streams, empty.masks, strict=True))
    ]
    lengths = None
    if condition.lengths is not None and empty.lengths is not None and known.device.type == "cpu":
        columns = zip(condition.lengths, empty.lengths, known.T.tolist(), strict=True)
        lengths = tuple(tuple(b[0] if d else n for n, d in zip(rows, drops, strict=True)) for rows, b, drops in columns)
    return TextCondition(tuple(s for s, _ in pairs), tuple(m for _, m in pairs), lengths)


def _drop_rows(states: Tensor, mask: Tensor, blank: Tensor, blank_mask: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    length = max(states.shape[1], blank.shape[1])
    drop = drop.to(mask.device)
    rows = drop.view(-1, *[1] * (states.dim() - 1))
    states = torch.where(rows, lengthen(blank.to(states), length), lengthen(states, length))
    mask = torch.where(drop[:, None], lengthen(blank_mask.to(mask.device), length), lengthen(mask, length))
    return states, mask


def lengthen(x: Tensor, length: int) -> Tensor:
    """Pad (B, L, ...) with zeros on the right to (B, length, ...)."""
    extra = length - x.shape[1]
    return pad(x, (*[0] * (2 * (x.dim() - 2)), 0, extra)) if extra else x


PADDING = 0


class ByteStream:
    """Encode prompts as byte ids, ended by END_OF_TEXT (so an empty prompt has a token), padded with 0 on the right."""

    width = 0

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.device = torch.device("cpu")

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return byte ids; what exceeds `max_length` - 1 bytes is cut, never inside a character."""
        rows = [[byte + 1 for byte in self._cut(text)] + [END_OF_TEXT] for text in prompts]
        length = max((len(row) for row in rows), default=1)
        ids = torch.tensor([row + [PADDING] * (length - len(row)) for row in rows]).reshape(len(rows), length)
        return to_device(ids, self.device), ids != PADDING

    def _cut(self, text: str) -> bytes:
        data = text.encode()
        if len(data) < self.max_length:
            return data
        return data[: self.max_length - 1].decode(errors="ignore").encode()  # without half a character at the end

    def measure(self, prompts: Sequence[str]) -> Lengths:
        return Lengths(self.max_length - 1, "bytes (--text-max-length)", [len(text.encode()) for text in prompts])

    def fingerprint(self) -> None:
        """Return None: the weights belong to the network."""

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def release(self) -> None:
        """Do nothing: there are no weights here."""


class TextEncoder:
    """All text streams of a run: that of the text model and optionally that of the LLM, with their `widths` E."""

    def __init__(self, streams: Sequence[Stream], options: TextOptions) -> None:
        self.streams = tuple(streams)
        self.options = options
        self.widths = [s.width for s in self.streams]

    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts: each stream (B, L, E) float or (B, L) ids with its (B, L) mask, L the batch's longest."""
        pairs = [s.encode(prompts) for s in self.streams]
        masks = tuple(to_device(mask, x.device) for x, mask in pairs)
        return TextCondition(tuple(x for x, _ in pairs), masks, token_counts([mask for _, mask in pairs]))

    def cut_note(self, prompts: Iterable[str], what: str = "captions") -> str | None:
        """Return a line that counts the prompts (named `what`) that are cut off; None if there are none."""
        prompts = list(dict.fromkeys(prompts))
        lines = []
        for lengths in (stream.measure(prompts) for stream in self.streams):
            long = [i for i, length in enumerate(lengths.found) if length > lengths.longest]
            if long:
                worst = max(long, key=lambda i: lengths.found[i])
                lines.append(
                    f"Warning: {len(long)} of {len(prompts)} different {what} are longer than {lengths.longest} "
                    f"{lengths.unit}; the rest of each is ignored. The longest has {lengths.found[worst]}: "
                    f"{prompts[worst][:60]!r}..."
                )
        return "\n".join(lines) or None

    def cut_captions_note(self, captions: Iterable[str], is_cached: bool) -> str | None:
        """Return `cut_note` of a run's captions; if they are cached, it may also be that the tokenizer is missing."""
        different = list(islice(_distinct(captions), MOST_MEASURED + 1))
        what = "captions" if len(different) <= MOST_MEASURED else "captions (only these were measured)"
        try:
            return self.cut_note(different[:MOST_MEASURED], what)
        except TextError as e:
            if not is_cached:
                raise
            return f"Captions that are too long for the text encoder are not counted: {e}"

    def empty(self, n: int) -> TextCondition:
        """Return the empty prompt n times, for dropped captions and unconditional guidance."""
        return self([""] * n)

    def fingerprints(self) -> list[str | None]:
        """Return a hash of each stream's weights; None for `builtin`."""
        return [s.fingerprint() for s in self.streams]

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint stores as config["text"]."""
        return {"options": asdict(self.options), "fingerprints": self.fingerprints(), "widths": self.widths}

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the encoders and their results (with --text-offload cpu, only the results)."""
        for s in self.streams:
            s.to(device)
        return self

    def for_workers(self) -> "TextEncoder | None":
        """Return the same streams on the CPU, for data workers; None if there are none, or one has frozen weights."""
        lengths = [s.max_length for s in self.streams if isinstance(s, ByteStream)]
        if not lengths or len(lengths) < len(self.streams):
            return None
        return TextEncoder([ByteStream(length) for length in lengths], self.options)

    def release(self) -> None:
        """Free all frozen weights, e.g. once the captions are cached."""
        for s in self.streams:
            s.release()


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def build_text(
    options: TextOptions, device: torch.device | str = "cpu", *, load: bool = True, needed: bool = True
) -> TextEncoder:
    """Build the encoders that flags name (`needed`: the network requires text); their states are on `device`.

    `load` reads the weights now, otherwise at the first prompt. Raises TextError: missing, incomplete or contradictory.
    """
    options = options.with_length()
    streams: list[Stream] = []
    if options.text_model == "builtin":
        assert options.text_max_length is not None  # with_length
        streams.append(ByteStream(options.text_max_length))
        streams[0].to(device)
    elif options.text_model != "none":
        streams.append(_huggingface().text_stream(options, device, load))
    if options.llm_model is not None:
        streams.append(_huggingface().llm_stream(options, device, load))
    if not streams and needed:
        raise TextError("--text-model none leaves no text encoder: give --llm-model, or --text-model builtin.")
    return TextEncoder(streams, options)


def _huggingface() -> ModuleType:
    """Import the frozen encoders; runs without one do not need transformers."""
    return importlib.import_module("titans_video.text.huggingface")


def _local(stored: TextOptions, overrides: Overrides) -> TextOptions:
    """Return the options with the folders of the encoders that `overrides` does not replace."""
    found: dict[str, Any] = {}
    if overrides.text_model is None and stored.text_model not in ("builtin", "none"):
        found["text_model"] = stored_folder(stored.text_model, "--text-model", "text encoder")
    if overrides.llm_model is None and stored.llm_model is not None:
        found["llm_model"] = stored_folder(stored.llm_model, "--llm-model", "LLM")
    return replace(stored, **found)


def text_from_checkpoint(
    config: Mapping[str, Any], overrides: Overrides, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Build the encoders of a checkpoint's config["text"]; `overrides` may give other paths.

    Raises CheckpointError if a stored name is not a folder, or the number or widths of the encoders differ from the
    network's; TextError as `build_text`.
    """
    stored = restore_options(TextOptions, config["options"])
    options = override(_local(stored, overrides), overrides)
    if options.llm_model is not None and stored.llm_model is None:
        raise CheckpointError("--llm-model: the checkpoint was trained without an LLM, so it cannot use one.")
    if ("builtin" in (stored.text_model, options.text_model)) and stored.text_model != options.text_model:
        raise CheckpointError(
            f"--text-model {options.text_model}: the checkpoint was trained with {stored.text_model!r}; "
            "a frozen encoder and the built-in one cannot replace each other."
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


MOST_WORDS = 2000
"""Captions of more different words are open text: the list would be long, and a missing word would say little."""

MOST_LETTERS = 100
"""A longer word is no word of a language either. `formats.DATA` has both limits."""

_SHOWN = 6
# Scripts without spaces between words: each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|(?:(?![\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])\w)+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in order, with their case, because bytes have one too."""
    return _WORD.findall(text)


def vocabulary(captions: Iterable[str]) -> list[str] | None:
    """Return the sorted words of all captions; None if there are none, too many or too long ones."""
    words: set[str] = set()
    for caption in captions:
        found = words_of(caption)
        words.update(found)
        if len(words) > MOST_WORDS or any(len(word) > MOST_LETTERS for word in found):
            return None
    return sorted(words) or None


def unknown_words_note(prompts: Sequence[str], known: Collection[str] | None) -> str | None:
    """Return a line with the words of prompts that no caption in `known` has; None if there are none."""
    if known is None:
        return None
    known = set(known)
    unknown = list(dict.fromkeys(word for prompt in prompts for word in words_of(prompt) if word not in known))
    if not unknown:
        return None
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    shown = ", ".join(repr(word[:MOST_LETTERS]) for word in unknown[:_SHOWN])
    return f"Note: the model does not know {shown}{more}: no caption of its training has such words."


def text_keys(text: TextEncoder) -> tuple[str, ...]:
    """Return what distinguishes each stream's states from any other's; () if no stream is frozen."""
    prints, options = text.fingerprints(), text.options
    if all(p is None for p in prints):
        return ()
    settings: list[list[object]] = [
        [options.text_dtype, options.text_max_length],
        [options.llm_dtype, options.llm_max_length, options.llm_layer, options.llm_template],
    ]
    if options.text_model == "none":
        settings = settings[1:]
    return tuple(json.dumps([p or "builtin", *s]) for p, s in zip(prints, settings, strict=False))
