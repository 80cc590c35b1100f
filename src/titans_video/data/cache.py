"""The content-addressed store of cached encodings.

A clip's moments, the moments of what it is conditioned on, and each prompt's hidden states are safetensors files of
their own, named by a hash of everything that they depend on. A file is therefore right or absent, never stale; it is
written beside and renamed, so any number of processes may fill one store at once.

Legend: C latent channels, t h w the latent grid, L tokens, E width of a text stream.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_video.checkpoint import atomic_path
from titans_video.data.clip_plan import PLAN_VERSION
from titans_video.data.reader import BrokenRow, Sample
from titans_video.errors import DataError
from titans_video.media.motion import MOTION_VERSION
from titans_video.types import TextCondition

STORE_VERSION = 1  # raise it when the same clip would give other pixels
KINDS = CLIPS, KNOWN, PICTURES, MOTION, TEXT = "clips", "known", "pictures", "motion", "text"
KEPT_TEXTS = 4096


class EncodingStore:
    """Encodings of one codec and of some text encoders in a folder that any number of both may share.

    Args:
        folder: of the store.
        codec: what tells the codec from any other: fingerprint of weights and configuration, and its precision.
        texts: the same of each text stream; () where text is not cached because the network reads bytes itself.
        pictures: first frames are kept as pixels in place of moments, as they get noise before they are encoded, and so
            is how much moves in each clip (Stable Video Diffusion).
    """

    def __init__(self, folder: Path, codec: str, texts: Sequence[str] = (), pictures: bool = False) -> None:
        self.folder, self.codec, self.texts, self.pictures = folder, codec, tuple(texts), pictures
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def has_text(self) -> bool:
        return bool(self.texts)

    def clip_fields(self, sample: Sample) -> dict[str, Any]:
        """Everything that a clip's moments depend on."""
        plan = sample.plan
        return {
            "kind": CLIPS,
            "version": [STORE_VERSION, PLAN_VERSION],
            "file": sample.entry.digest,
            "times": [round(t, 6) for t in plan.times],
            "frames": list(plan.indices),
            "size": [plan.bucket.height, plan.bucket.width],
            "crop": list(plan.crop),
            "codec": self.codec,
        }

    def cond_fields(self, sample: Sample) -> dict[str, Any]:
        """Everything that the moments of what a sample is conditioned on depend on."""
        picture = sample.entry.image_digest if sample.picture else None
        return {**self.clip_fields(sample), "kind": KNOWN, "known": sample.num_cond_frames, "picture": picture}

    def image_fields(self, sample: Sample, kind: str) -> dict[str, Any]:
        """Everything that a sample's first frame, or its motion, depends on; no codec is among it."""
        seen = {key: value for key, value in self.clip_fields(sample).items() if key != "codec"} | {"kind": kind}
        if kind == MOTION:
            return {**seen, "fps": round(sample.plan.fps, 6), "measure": MOTION_VERSION}
        return {**seen, "picture": sample.entry.image_digest if sample.picture else None}

    def wanted(self, sample: Sample) -> list[dict[str, Any]]:
        """The fields of all that is kept of a sample."""
        found = [self.clip_fields(sample)]
        if self.pictures:
            found.append(self.image_fields(sample, MOTION))
        if sample.num_cond_frames:
            found.append(self.image_fields(sample, PICTURES) if self.pictures else self.cond_fields(sample))
        return found

    def text_fields(self, prompt: str, stream: int) -> dict[str, Any]:
        """Everything that a prompt's hidden states depend on."""
        return {"kind": TEXT, "version": STORE_VERSION, "prompt": prompt, "encoder": self.texts[stream]}

    def path(self, fields: Mapping[str, Any]) -> Path:
        """Where the tensors with these fields lie."""
        key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:40]
        return self.folder / fields["kind"] / key[:2] / f"{key}.safetensors"

    def write(self, fields: Mapping[str, Any], tensor: Tensor) -> None:
        """Keep one tensor with what it was made from, atomically."""
        with atomic_path(self.path(fields)) as temporary:
            save_file(
                {"data": tensor.contiguous().cpu()},
                temporary,
                {"made_from": json.dumps(fields, sort_keys=True), "sha256": _digest(tensor)},
            )

    def read(self, fields: Mapping[str, Any]) -> Tensor:
        """What `write` kept.

        Raises:
            BrokenRow: it is missing or unreadable.
        """
        path = self.path(fields)
        try:
            with safe_open(path, framework="pt") as f:
                tensor: Tensor = f.get_tensor("data")
        except FileNotFoundError:
            raise BrokenRow("not-in-cache", f"{path} is missing; fill the cache again.") from None
        except (SafetensorError, OSError) as e:
            raise BrokenRow("not-in-cache", f"{path} cannot be read ({e}); verify the cache.") from None
        return tensor

    def read_clip(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Moments (2C, t, h, w) of a sample, and those of its known frames if it has any.

        Raises:
            BrokenRow: one is missing or unreadable.
        """
        known = self.read(self.cond_fields(sample)) if sample.num_cond_frames and not self.pictures else None
        return self.read(self.clip_fields(sample)), known

    def read_image_fields(self, sample: Sample) -> tuple[Tensor | None, Tensor | None]:
        """The picture (H, W, 3) uint8 of a sample, if it has one, and the bucket of its motion (); None where pictures
        are not kept.

        Raises:
            BrokenRow: one is missing or unreadable.
        """
        if not self.pictures:
            return None, None
        picture = self.read(self.image_fields(sample, PICTURES)) if sample.num_cond_frames else None
        return picture, self.read(self.image_fields(sample, MOTION))

    def text(self, prompts: Sequence[str]) -> TextCondition:
        """Hidden states of prompts as their encoders gave them, padded to the longest.

        Raises:
            DataError: one is missing or unreadable.
        """
        streams, masks = [], []
        for stream in range(len(self.texts)):
            states = [self._prompt(p, stream) for p in prompts]
            length = max(s.shape[0] for s in states)
            streams.append(torch.stack([_lengthen(s, length) for s in states]))
            masks.append(torch.stack([torch.arange(length) < s.shape[0] for s in states]))
        return TextCondition(tuple(streams), tuple(masks))

    def _prompt(self, prompt: str, stream: int) -> Tensor:
        key = f"{stream}\0{prompt}"
        if key not in self._kept:
            try:
                self._kept[key] = self.read(self.text_fields(prompt, stream))
            except BrokenRow as e:
                raise DataError(f"The prompt {prompt[:80]!r} is not in the cache {self.folder}: {e.detail}") from None
            if len(self._kept) > KEPT_TEXTS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class StoredText:
    """Encodes prompts as a text encoder does, as far as they are in a store."""

    def __init__(self, store: EncodingStore) -> None:
        self.store = store

    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        return self.store.text(prompts)

    def empty(self, n: int) -> TextCondition:
        return self([""] * n)


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[int, list[str]]:
    """Read every file of a store and check it against its name and its checksum.

    Args:
        progress: told how many of how many files are done.
    Returns:
        How many files are sound, and of each other one its path with what is wrong.
    Raises:
        DataError: there is no such store, or nothing in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such cache.")
    paths = sorted(p for kind in KINDS for p in (folder / kind).glob("*/*.safetensors"))
    if not paths:
        raise DataError(f"{folder}: there is no cached file in it; it is no cache, or nothing was cached yet.")
    store = EncodingStore(folder, "")
    wrong = []
    for done, path in enumerate(paths, 1):
        problem = _problem(store, path)
        if problem is not None:
            wrong.append(f"{path}: {problem}")
        if progress is not None:
            progress(done, len(paths))
    return len(paths) - len(wrong), wrong


def _problem(store: EncodingStore, path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as f:
            tensor, notes = f.get_tensor("data"), f.metadata() or {}
        fields = json.loads(notes["made_from"])
        named = store.path(fields)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        return f"unreadable ({type(e).__name__}: {e})"
    if named.name != path.name:
        return f"its name does not agree with what it was made from ({named.name} was expected)"
    if notes.get("sha256") != _digest(tensor):
        return "its content does not agree with its checksum"
    if not bool(torch.isfinite(tensor).all()):
        return "it holds values that are not finite"
    return None


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().cpu()
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes() if data.dim() else b"").hexdigest()


def _lengthen(states: Tensor, length: int) -> Tensor:
    missing = length - states.shape[0]
    return torch.cat([states, states.new_zeros(missing, *states.shape[1:])]) if missing else states
