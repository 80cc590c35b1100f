"""The content-addressed cache of encodings.

A clip's moments, the moments of its conditioning frames, and each prompt's hidden states are separate safetensors
files. The name of a file is a hash of everything that its content depends on. A file is therefore correct or missing,
never outdated. It is written under a temporary name and renamed, so any number of processes may fill one cache at once.

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
from torch import Tensor

from titans_video.data.clip_plan import PLAN_VERSION
from titans_video.data.reader import BadRowError, Sample
from titans_video.errors import DataError
from titans_video.files import save_safetensors
from titans_video.media.motion import MOTION_VERSION
from titans_video.types import TextCondition

CACHE_VERSION = 1  # raise it when the same clip would give other pixels
KINDS = CLIPS, COND_FRAMES, COND_IMAGES, MOTION, TEXT = "clips", "known", "pictures", "motion", "text"
MAX_TEXTS = 4096


class EncodingCache:
    """A folder of encodings of codecs and text encoders; any number of them may share it.

    The names of its subfolders and the key fields ("known", "picture", ...) are a file format and never change.

    Args:
        folder: of the cache.
        codec: identifies the codec: fingerprint of weights and configuration, and its precision.
        texts: the same for each text stream; () if text is not cached because the network reads bytes itself.
        cond_images: save conditioning images as pixels instead of moments, because noise is added before they are
            encoded, and save the motion bucket of each clip (Stable Video Diffusion).
    """

    def __init__(self, folder: Path, codec: str, texts: Sequence[str] = (), cond_images: bool = False) -> None:
        self.folder, self.codec, self.texts, self.cond_images = folder, codec, tuple(texts), cond_images
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def has_text(self) -> bool:
        return bool(self.texts)

    def clip_fields(self, sample: Sample) -> dict[str, Any]:
        """Return everything that a clip's moments depend on."""
        plan, record = sample.plan, sample.record
        special = {"reading": record.reading} if record.reading else {}
        return {
            "kind": CLIPS,
            "version": [CACHE_VERSION, PLAN_VERSION],
            "file": record.digest,
            "times": [round(t, 6) for t in plan.times],
            "frames": list(plan.indices),
            "size": [plan.bucket.height, plan.bucket.width],
            "crop": list(plan.crop),
            "codec": self.codec,
            **special,
        }

    def cond_fields(self, sample: Sample) -> dict[str, Any]:
        """Return everything that the moments of a sample's conditioning frames depend on."""
        image = _image_key(sample)
        return {**self.clip_fields(sample), "kind": COND_FRAMES, "known": sample.num_cond_frames, "picture": image}

    def image_fields(self, sample: Sample, kind: str) -> dict[str, Any]:
        """Return everything that a sample's first frame, or its motion, depends on; the codec is not part of it."""
        fields = {key: value for key, value in self.clip_fields(sample).items() if key != "codec"} | {"kind": kind}
        if kind == MOTION:
            return {**fields, "fps": round(sample.plan.fps, 6), "measure": MOTION_VERSION}
        return {**fields, "picture": _image_key(sample)}

    def wanted(self, sample: Sample) -> list[dict[str, Any]]:
        """Return the key fields of everything that is cached for a sample."""
        found = [self.clip_fields(sample)]
        if self.cond_images:
            found.append(self.image_fields(sample, MOTION))
        if sample.num_cond_frames:
            found.append(self.image_fields(sample, COND_IMAGES) if self.cond_images else self.cond_fields(sample))
        return found

    def text_fields(self, prompt: str, stream: int) -> dict[str, Any]:
        """Return everything that a prompt's hidden states depend on."""
        return {"kind": TEXT, "version": CACHE_VERSION, "prompt": prompt, "encoder": self.texts[stream]}

    def path(self, fields: Mapping[str, Any]) -> Path:
        """Return the path of the tensor with these fields."""
        key = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:40]
        return self.folder / fields["kind"] / key[:2] / f"{key}.safetensors"

    def write(self, fields: Mapping[str, Any], tensor: Tensor) -> None:
        """Write one tensor with its key fields, atomically."""
        about = {"made_from": json.dumps(fields, sort_keys=True), "sha256": _digest(tensor)}
        save_safetensors({"data": tensor.contiguous().cpu()}, self.path(fields), about)

    def read(self, fields: Mapping[str, Any]) -> Tensor:
        """Read what `write` wrote.

        Raises:
            BadRowError: it is missing or unreadable.
        """
        path = self.path(fields)
        try:
            with safe_open(path, framework="pt") as f:
                tensor: Tensor = f.get_tensor("data")
        except FileNotFoundError:
            raise BadRowError("not-in-cache", f"{path} is missing; fill the cache again.") from None
        except (SafetensorError, OSError) as e:
            raise BadRowError("not-in-cache", f"{path} cannot be read ({e}); verify the cache.") from None
        return tensor

    def read_clip(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Read the moments (2C, t, h, w) of a sample, and those of its conditioning frames if it has any.

        Raises:
            BadRowError: one is missing or unreadable.
        """
        cond = self.read(self.cond_fields(sample)) if sample.num_cond_frames and not self.cond_images else None
        return self.read(self.clip_fields(sample)), cond

    def read_image_fields(self, sample: Sample) -> tuple[Tensor | None, Tensor | None]:
        """Read the conditioning image (H, W, 3) uint8 of a sample, if it has one, and its motion bucket ().

        Both are None if this cache has no images.

        Raises:
            BadRowError: one is missing or unreadable.
        """
        if not self.cond_images:
            return None, None
        image = self.read(self.image_fields(sample, COND_IMAGES)) if sample.num_cond_frames else None
        return image, self.read(self.image_fields(sample, MOTION))

    def text(self, prompts: Sequence[str]) -> TextCondition:
        """Read the hidden states of prompts as their encoders returned them, padded to the longest.

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
        if key not in self._texts:
            try:
                self._texts[key] = self.read(self.text_fields(prompt, stream))
            except BadRowError as e:
                raise DataError(f"The prompt {prompt[:80]!r} is not in the cache {self.folder}: {e.detail}") from None
            if len(self._texts) > MAX_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(key)
        return self._texts[key]


class CachedText:
    """Encode prompts like a text encoder, but from a cache."""

    def __init__(self, cache: EncodingCache) -> None:
        self.cache = cache

    def __call__(self, prompts: Sequence[str]) -> TextCondition:
        return self.cache.text(prompts)

    def empty(self, n: int) -> TextCondition:
        return self([""] * n)


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[int, list[str]]:
    """Read every file of a cache and check it against its name and its checksum.

    Args:
        progress: called with the number of finished files and of all files.
    Returns:
        The number of intact files, and for each other one its path and the problem.
    Raises:
        DataError: the cache does not exist, or is empty.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such cache.")
    paths = sorted(p for kind in KINDS for p in (folder / kind).glob("*/*.safetensors"))
    if not paths:
        raise DataError(f"{folder}: it contains no cached file. It is not a cache, or nothing has been cached yet.")
    cache = EncodingCache(folder, "")
    wrong = []
    for done, path in enumerate(paths, 1):
        problem = _problem(cache, path)
        if problem is not None:
            wrong.append(f"{path}: {problem}")
        if progress is not None:
            progress(done, len(paths))
    return len(paths) - len(wrong), wrong


def _problem(cache: EncodingCache, path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as f:
            tensor, notes = f.get_tensor("data"), f.metadata() or {}
        fields = json.loads(notes["made_from"])
        named = cache.path(fields)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        return f"unreadable ({type(e).__name__}: {e})"
    if named.name != path.name:
        return f"its name does not match the key fields in it ({named.name} was expected)"
    if notes.get("sha256") != _digest(tensor):
        return "its content does not match its checksum"
    if not bool(torch.isfinite(tensor).all()):
        return "it contains values that are not finite"
    return None


def _image_key(sample: Sample) -> str | None:
    """Return what identifies the pixels of the row's own image, if the sample uses it."""
    if not sample.own_image:
        return None
    record = sample.record
    return f"{record.image_digest} {record.image_reading}" if record.image_reading else record.image_digest


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().cpu()
    return hashlib.sha256(data.view(torch.uint8).numpy().tobytes() if data.dim() else b"").hexdigest()


def _lengthen(states: Tensor, length: int) -> Tensor:
    missing = length - states.shape[0]
    return torch.cat([states, states.new_zeros(missing, *states.shape[1:])]) if missing else states
