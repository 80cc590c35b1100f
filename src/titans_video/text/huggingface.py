"""Frozen text encoders and LLMs, loaded by transformers from a folder or by hub name.

Legend: B prompts, L tokens of the longest prompt, E width. Prompts are padded here, on the right, so real tokens are at
positions 0, 1, ... for every tokenizer, and a causal model never sees padding.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_video.checkpoint import fingerprint_folder
from titans_video.config.options import TextOptions
from titans_video.errors import TextError, few
from titans_video.finite import refuse_non_finite
from titans_video.hub import NON_FINITE_REMEDY, from_folder_or_hub, packaged_folder
from titans_video.text.base import Lengths, to_device
from titans_video.types import PRECISIONS

ENCODERS = ("t5", "umt5", "mt5")
"""Model types with a separate encoder; a config saved with the encoder only may no longer mention the decoder."""

TEXT_PARTS = ("language_model", "text_model")
"""The attributes in which multimodal models keep their text model."""

PLAIN_WORDS = "a red circle moving right"


@dataclass(frozen=True)
class Source:
    """The flags of one encoder; `flag` (--text-model or --llm-model) is for messages, the rest as in `TextOptions`."""

    flag: str
    path: str
    dtype: torch.dtype
    max_length: int
    local_files_only: bool
    offload: bool
    layer: int = -1
    template: str | None = None
    width: int | None = None


def text_stream(options: TextOptions, device: torch.device | str, load: bool) -> "PretrainedStream":
    """Return the stream of --text-model."""
    source = Source(
        "--text-model",
        packaged_folder(options.text_model, "--text-model", TextError),
        PRECISIONS[options.text_dtype],
        options.with_length().text_max_length or 0,
        options.local_files_only,
        options.text_offload == "cpu",
    )
    return PretrainedStream(source, device, load)


def llm_stream(options: TextOptions, device: torch.device | str, load: bool) -> "PretrainedStream":
    """Return the stream of --llm-model; TextError if --llm-template does not contain {prompt}."""
    if options.llm_template is not None and options.llm_template.count("{prompt}") != 1:
        raise TextError(f"--llm-template must contain {{prompt}} exactly once; got {options.llm_template!r}.")
    source = Source(
        "--llm-model",
        packaged_folder(str(options.llm_model), "--llm-model", TextError),
        PRECISIONS[options.llm_dtype],
        options.llm_max_length,
        options.local_files_only,
        options.text_offload == "cpu",
        options.llm_layer,
        options.llm_template,
        options.llm_hidden_size,
    )
    return PretrainedStream(source, device, load)


class PretrainedStream:
    """A frozen encoder in eval mode, without gradients, not stored in checkpoints."""

    def __init__(self, source: Source, device: torch.device | str, load: bool = True) -> None:
        self.source = source
        self.device = torch.device(device)
        self.config = self._read(_transformers().AutoConfig)
        self.width = self._find_width()
        self._check_layer()
        self._model: Any = None
        self._tokenizer: Any = None
        self._fingerprint: str | None = None
        if load:
            self.model, self.tokenizer  # noqa: B018 - properties that load

    @property
    def model(self) -> Any:
        """The encoder, loaded at first use."""
        if self._model is None:
            self._model = self._load_model().to(self._where())
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return states (B, L, E) in the encoder's precision, 0 on padding, and the mask (B, L) on the CPU.

        Tokens beyond the maximum, and a template's tokens before the prompt, are cut; an empty prompt keeps one token.
        """
        rows, cuts = zip(*(self._tokens(p) for p in prompts), strict=True)
        length = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        ids = torch.tensor([row + [self._spare_token()] * (length - len(row)) for row in rows])
        states = self._states(*(to_device(x, self._where()) for x in (ids, mask))).to(self.device)
        mask = mask.bool()
        if any(cuts):
            states, mask = _cut(states, mask, [(cut, len(row)) for cut, row in zip(cuts, rows, strict=True)])
        return states.masked_fill(~to_device(mask, states.device)[..., None], 0.0), mask

    def measure(self, prompts: Sequence[str]) -> Lengths:
        s = self.source
        before, after = s.template.split("{prompt}") if s.template else ("", "")
        found = self.tokenizer([before + prompt + after for prompt in prompts])["input_ids"] if prompts else []
        cut = self._template_tokens(before, before + after) if before else 0
        return Lengths(self._longest(s.max_length + cut) - cut, self._unit, [len(ids) - cut for ids in found])

    @property
    def _unit(self) -> str:
        return f"tokens ({'--llm' if self.source.flag == '--llm-model' else '--text'}-max-length)"

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint_folder(self.folder)
        return self._fingerprint

    def to(self, device: torch.device | str) -> None:
        """Move the encoder; with --text-offload cpu it stays on the CPU and only its results are on `device`."""
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self._where())

    def release(self) -> None:
        self._model = None
        gc.collect()

    def _where(self) -> torch.device:
        return torch.device("cpu") if self.source.offload else self.device

    def _tokens(self, prompt: str) -> tuple[list[int], int]:
        """Return the token ids of one prompt, and how many template tokens precede it."""
        s = self.source
        before, after = s.template.split("{prompt}") if s.template else ("", "")
        cut = self._template_tokens(before, before + prompt + after) if before else 0
        ids = self._ids(before + prompt + after, s.max_length + cut)
        return (ids, cut) if len(ids) > cut else ([*ids, self._spare_token()], cut)

    def _template_tokens(self, before: str, text: str) -> int:
        """Return how many tokens of `text` precede the prompt; a token across the border belongs to the prompt."""
        pairs = list(zip(self._ids(before, None), self._ids(text, None), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))

    def _ids(self, text: str, max_length: int | None) -> list[int]:
        if max_length is None:
            return list(self.tokenizer(text)["input_ids"])
        longest = self._longest(max_length)
        ids = list(self.tokenizer(text, truncation=True, max_length=longest)["input_ids"])
        split = self._split_character(text, longest) if len(ids) >= longest else None
        return ids if split is None else self._ids(text[:split], max_length)

    def _longest(self, max_length: int) -> int:
        return min(max_length, getattr(self.config.get_text_config(), "max_position_embeddings", None) or max_length)

    def _split_character(self, text: str, longest: int) -> int | None:
        """Return the position of the character that the limit splits, as only some of its bytes' tokens are kept."""
        if not self.tokenizer.is_fast:
            return None  # tells no positions
        whole, cut = (
            self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **limit)
            for limit in ({}, {"truncation": True, "max_length": longest})
        )
        spans, kept = (
            [span for span, special in zip(t["offset_mapping"], t["special_tokens_mask"], strict=True) if not special]
            for t in (whole, cut)
        )
        if not 0 < len(kept) < len(spans) or spans[len(kept)][0] >= kept[-1][1]:
            return None
        return int(spans[len(kept)][0])

    def _spare_token(self) -> int:
        """Return a token for padding, and for an empty prompt that the tokenizer gives no token at all."""
        t = self.tokenizer
        return next((i for i in (t.pad_token_id, t.eos_token_id, t.bos_token_id) if i is not None), 0)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        last = self.source.layer in (-1, self._layers())
        extra = {} if self._is_encoder() else {"use_cache": False}
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=not last, **extra)
        states: Tensor = out.last_hidden_state if last else out.hidden_states[self.source.layer]
        if states.shape[-1] != self.width:
            s = self.source
            claim = f"--llm-hidden-size {self.width}" if s.width else f"The config of {s.path} says {self.width}"
            raise TextError(f"{claim}: the hidden states of {s.path} are {states.shape[-1]} wide.")
        return states

    def _is_encoder(self) -> bool:
        return self.config.is_encoder_decoder or getattr(self.config, "model_type", None) in ENCODERS

    def _layers(self) -> int | None:
        layers: int | None = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        return layers

    def _check_layer(self) -> None:
        layers = self._layers()
        if layers is not None and not -layers - 1 <= self.source.layer <= layers:
            raise TextError(
                f"--llm-layer {self.source.layer}: {self.source.path} has {layers} layers, so 0 (the embeddings) to "
                f"{layers} can be chosen, or {-layers - 1} to -1 from the end."
            )

    def _find_width(self) -> int:
        s = self.source
        config = self.config.get_text_config()
        found = next((w for n in ("hidden_size", "d_model") if isinstance(w := getattr(config, n, None), int)), None)
        if found is None and s.width is None:
            hint = "give it with --llm-hidden-size." if s.flag == "--llm-model" else "this model is not supported."
            raise TextError(f"{s.flag} {s.path}: its config does not give the width of its hidden states; {hint}")
        if found is not None and s.width is not None and found != s.width:
            raise TextError(f"--llm-hidden-size {s.width}: the config of {s.path} says {found}.")
        return int(found or s.width or 0)

    def _read(self, kind: Any, **options: Any) -> Any:
        """Call `kind.from_pretrained`; turn its errors into messages for the user."""
        s = self.source
        builtin = ", or train with --text-model builtin, which needs none"
        instead = builtin if s.flag == "--text-model" else ", or train without it"
        return from_folder_or_hub(
            kind, s.path, s.flag, TextError, instead=instead, local_files_only=s.local_files_only, **options
        )

    def meta_model(self) -> Any:
        """Return the encoder without weights, on `meta`, from its configuration only."""
        with _quiet(_transformers()), torch.device("meta"):
            model = self._kind_of_model().from_config(self.config, dtype=self.source.dtype, trust_remote_code=False)
        return _text_part(model)

    def _kind_of_model(self) -> Any:
        transformers = _transformers()
        return transformers.AutoModelForTextEncoding if self._is_encoder() else transformers.AutoModel

    def _load_model(self) -> Any:
        with _quiet(_transformers()):
            model, info = self._read(self._kind_of_model(), dtype=self.source.dtype, output_loading_info=True)
        bad = {str(k[0] if isinstance(k, tuple) else k) for k in (*info["missing_keys"], *info["mismatched_keys"])}
        if bad:
            raise TextError(
                f"{self.source.flag} {self.source.path}: its weights do not fill the {type(model).__name__} that its "
                f"config describes: missing or misshapen are {few(bad)}. They would be random; copy the folder again."
            )
        part = _text_part(model)
        where = f"{self.source.flag} {self.source.path}"
        refuse_non_finite(dict(part.named_parameters()), where, TextError, NON_FINITE_REMEDY)
        return part.eval().requires_grad_(False)

    def _load_tokenizer(self) -> Any:
        tokenizer = self._read(self._tokenizer_kind())
        tokenizer.truncation_side = "right"
        # If its files are missing, transformers silently creates some tokenizers with almost no vocabulary.
        if len(set(tokenizer(PLAIN_WORDS)["input_ids"]) - set(tokenizer.all_special_ids)) < 3:
            raise TextError(
                f"{self.source.flag} {self.source.path}: its tokenizer does not know plain English words. Its files "
                "(tokenizer.json, or spiece.model, vocab.json, merges.txt) may be missing; copy the folder again."
            )
        return tokenizer

    def _tokenizer_kind(self) -> Any:
        # For UMT5 the automatic class requires tokenizer.json; copies with only spiece.model are in T5's format.
        folder = Path(self.source.path)
        only_spiece = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
        return _transformers().T5Tokenizer if self._is_encoder() and only_spiece else _transformers().AutoTokenizer

    @property
    def folder(self) -> Path:
        """The folder of the encoder's files: its own folder, or that of the hub cache."""
        if Path(self.source.path).is_dir():
            return Path(self.source.path)
        from transformers.utils import cached_file

        return Path(cached_file(self.source.path, "config.json", local_files_only=True)).parent


def _text_part(model: Any) -> Any:
    return next((getattr(model, n) for n in TEXT_PARTS if getattr(model, n, None) is not None), model)


def _cut(states: Tensor, mask: Tensor, kept: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Keep the tokens [start, stop) of each row and pad again: (B, L, E), (B, L) -> (B, L', E), (B, L')."""
    length = max(stop - start for start, stop in kept)
    new_states, new_mask = states.new_zeros(len(kept), length, states.shape[-1]), mask.new_zeros(len(kept), length)
    for i, (start, stop) in enumerate(kept):
        new_states[i, : stop - start] = states[i, start:stop]
        new_mask[i, : stop - start] = True
    return new_states, new_mask


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise TextError(
            "--text-model and --llm-model need the package transformers: pip install transformers"
        ) from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the report of unused weights (a decoder's, a head's); missing weights raise an error here anyway."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
