"""The content-addressed cache of encodings.

A clip's moments, the moments of its conditioning frames, and each prompt's hidden states are separate encodings, each
in a safetensors file of its own or in a shard with others (`shards`). The name of an encoding is a hash of everything
that its content depends on, so it is never outdated. A file is renamed when complete, so any number of processes may
fill one cache. The first read of an encoding in a process checks its checksum, type and shape; a damaged one counts as
missing and is made again.

Legend: C latent channels, t h w the latent grid, L tokens, E width of a text stream.
"""

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_video.data.clip_plan import PLAN_VERSION
from titans_video.data.reader import BadRowError, Sample
from titans_video.data.shards import FOLDER, Shards, each
from titans_video.errors import DataError
from titans_video.files import save_safetensors
from titans_video.finite import is_finite
from titans_video.media.motion import MOTION_VERSION
from titans_video.parsing import parse_json
from titans_video.types import PRECISIONS, CodecSpec, TextCondition

CACHE_VERSION = 1  # raise it when the same clip would give other pixels
NO_BYTES = hashlib.sha256(b"").hexdigest()
KINDS = CLIPS, COND_FRAMES, COND_IMAGES, IMAGE_STATES, MOTION, TEXT = (
    "clips", "known", "pictures", "image-states", "motion", "text"
)  # fmt: skip
NOT_IN_CACHE = "not-in-cache"
MOST_TEXT_BYTES = 2**28  # of hidden states that a process keeps in memory


class Repair(Protocol):
    """Makes single encodings again. Its encoders are loaded when they are needed."""

    def __call__(self, fields: Mapping[str, Any], sample: Sample | None) -> Tensor:
        """Return the encoding that the key fields describe; `sample` is None for a prompt.

        Raises:
            BadRowError: its file is unreadable, or the encoding is not finite.
        """

    def release(self) -> None:
        """Free the encoders."""


class NeedsRepair(BadRowError):
    """A file is damaged, and the process that has the encoders must read it."""


class PromptError(DataError):
    """A prompt has no usable hidden states. `reason` is one of `clip_plan.REASONS`."""

    def __init__(self, message: str, prompt: str, reason: str, detail: str) -> None:
        super().__init__(message)
        self.prompt, self.reason, self.detail = prompt, reason, detail


def precisions_in(folder: Path, most: int = 16) -> set[str]:
    """Return the precisions of the codecs that encoded a few clips of a cache."""
    found: set[str] = set()
    for path in islice((folder / CLIPS).glob("*/*.safetensors"), most):
        with contextlib.suppress(SafetensorError, OSError, ValueError, LookupError, TypeError):
            with safe_open(path, framework="pt") as f:
                made_from = parse_json(f.metadata()["made_from"])
            found.add(str(parse_json(made_from["codec"])[2]))
    return found & PRECISIONS.keys()


@dataclass(frozen=True)
class ImageKey:
    """The identity of an image encoder, and the shape (M, E) of its states for the conditioning images of a clip."""

    encoder: str
    shape: tuple[int, int]


class EncodingCache:
    """A folder of encodings of codecs and text encoders; any number of them may share it.

    The names of its subfolders and the key fields ("known", "picture", ...) are a file format and never change.

    Args:
        codec: identifies the codec: a JSON list of its name, its fingerprint, its precision, and more for a user's own.
        texts: the same for each text stream; () if text is not cached because the network reads bytes itself.
        cond_images: save conditioning images as pixels instead of moments, because noise is added before encoding, and
            save the motion bucket of each clip (Stable Video Diffusion).
        spec: of the codec; moments must have its shapes. None accepts any shape.
        widths: E of each text stream, 0 for byte ids; () accepts any width.
        dtype: of stored moments and image states, fp32 | bf16; they are read as float32.
        image: of the image encoder whose states of the conditioning images are cached; None: there is none.
    Attributes:
        sharded: `put` writes shards instead of single files.
        repair: makes damaged files again; None: they count as missing.
        process: the one process that may repair; data workers may not.
    """

    def __init__(
        self,
        folder: Path,
        codec: str,
        texts: Sequence[str] = (),
        cond_images: bool = False,
        *,
        spec: CodecSpec | None = None,
        widths: Sequence[int] = (),
        dtype: str = "fp32",
        image: ImageKey | None = None,
    ) -> None:
        self.folder, self.codec, self.texts, self.cond_images = folder, codec, tuple(texts), cond_images
        self.spec, self.widths, self.dtype, self.image, self.sharded = spec, tuple(widths), dtype, image, False
        self.shards = {kind: Shards(folder / kind) for kind in KINDS}
        self.repair: Repair | None = None
        self.process, self._has_repaired = os.getpid(), False
        self._checked: set[Path] = set()
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._text_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a data worker, which has no encoders."""
        return {**self.__dict__, "repair": None}

    @property
    def has_text(self) -> bool:
        return bool(self.texts)

    def clip_fields(self, sample: Sample) -> dict[str, Any]:
        """Return everything that a clip's moments depend on."""
        plan, record = sample.plan, sample.record
        special = {"reading": record.reading} if record.reading else {}
        if self.dtype != "fp32":
            special["dtype"] = self.dtype
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
        fields = {**self.clip_fields(sample), "kind": COND_FRAMES, "known": sample.num_cond_frames}
        return {**fields, "picture": _image_key(sample), **_last(sample)}

    def state_fields(self, sample: Sample) -> dict[str, Any]:
        """Return everything that the image encoder's states of a sample's conditioning images depend on."""
        assert self.image is not None  # callers check
        fields = {k: v for k, v in self.clip_fields(sample).items() if k != "codec"} | {"kind": IMAGE_STATES}
        return {**fields, "encoder": self.image.encoder, "picture": _image_key(sample), **_last(sample)}

    def image_fields(self, sample: Sample, kind: str) -> dict[str, Any]:
        """Return everything that a sample's first frame, or its motion, depends on; the codec is not part of it."""
        fields = {k: v for k, v in self.clip_fields(sample).items() if k not in ("codec", "dtype")} | {"kind": kind}
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
            if self.image is not None:
                found.append(self.state_fields(sample))
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
        path, (stored, notes) = self.path(fields), _stored(fields, tensor)
        save_safetensors({"data": stored}, path, notes)
        self._checked.add(path)

    def put(self, fields: Mapping[str, Any], tensor: Tensor) -> None:
        """Write one tensor, or let it wait for its shard; see `flush`."""
        if not self.sharded:
            self.write(fields, tensor)
            return
        self.shards[fields["kind"]].add(self.path(fields).stem, *_stored(fields, tensor))

    def flush(self) -> None:
        """Write the tensors that wait for their shards."""
        for shards in self.shards.values():
            shards.flush()

    def refresh(self) -> None:
        """Find the shards that other processes have written."""
        for shards in self.shards.values():
            shards.refresh()

    def has(self, fields: Mapping[str, Any]) -> bool:
        """Check whether there is a tensor with these fields, damaged or not."""
        path = self.path(fields)
        return self.shards[fields["kind"]].find(path.stem) is not None or path.exists()

    def read(self, fields: Mapping[str, Any], sample: Sample | None = None) -> Tensor:
        """Read what `write` wrote; if it is missing or damaged, try to make it again. `sample` is None for a prompt.

        Raises:
            BadRowError: it is missing or damaged, and cannot be made again.
            NeedsRepair: as that, but `process` may be able to make it again.
        """
        try:
            return self._read(fields)
        except BadRowError as e:
            if os.getpid() != self.process:
                raise NeedsRepair(e.reason, e.detail) from None
            if self.repair is None:
                raise
        self._has_repaired = True
        tensor = self.repair(fields, sample).cpu()
        with contextlib.suppress(OSError):  # a full disk costs the next run some time, but must not end this one
            self.write(fields, tensor)
        return _as_read(fields, _stored(fields, tensor)[0])

    def release(self) -> None:
        """Free the encoders if `read` needed them."""
        if self._has_repaired and self.repair is not None:
            self.repair.release()
        self._has_repaired = False

    def _read(self, fields: Mapping[str, Any]) -> Tensor:
        path = self.path(fields)
        try:
            tensor, notes = self._load(path, fields["kind"])
        except FileNotFoundError:
            raise BadRowError(NOT_IN_CACHE, f"{path} is missing; fill the cache again.") from None
        except (SafetensorError, OSError) as e:
            raise BadRowError(NOT_IN_CACHE, f"{path} cannot be read ({e}); verify the cache.") from None
        if path not in self._checked:
            own = json.dumps(fields, sort_keys=True)
            other = "it belongs to another row" if notes.get("made_from", own) != own else None
            if problem := other or self._misfit(fields, tensor) or _damage(tensor, notes):
                raise BadRowError(NOT_IN_CACHE, f"{path} is damaged: {problem}. Fill the cache again.")
            self._checked.add(path)
        return _as_read(fields, tensor)

    def _load(self, path: Path, kind: str) -> tuple[Tensor, dict[str, str]]:
        """Return a tensor and its notes, from its own file or else from a shard."""
        shard = self.shards[kind].find(path.stem)
        if shard is not None and not path.exists():
            return self.shards[kind].read(shard, path.stem)
        with safe_open(path, framework="pt") as f:
            return f.get_tensor("data"), {} if path in self._checked else f.metadata() or {}

    def _misfit(self, fields: Mapping[str, Any], tensor: Tensor) -> str | None:
        """Return how a tensor's type or shape differs from the one that its key fields describe."""
        kind, shape = fields["kind"], tuple(tensor.shape)
        expected = PRECISIONS[fields.get("dtype", "fp32")]
        if kind in (CLIPS, COND_FRAMES):
            if self.spec is None:
                fits = tensor.dim() == 4
            else:
                channels, *grid = self.spec.latent_shape(len(fields["frames"]), *fields["size"])
                fits = shape == (2 * channels, *grid)
        elif kind == COND_IMAGES:
            expected, fits = torch.uint8, shape == (*fields["size"], 3)
        elif kind == MOTION:
            fits = shape == ()
        elif kind == IMAGE_STATES:
            fits = self.image is None or shape == self.image.shape
        else:
            width = self.widths[self.texts.index(fields["encoder"])] if self.widths else shape[-1] if shape[1:] else 0
            expected = torch.int64 if not width else tensor.dtype if tensor.is_floating_point() else torch.float32
            fits = shape[1:] == ((width,) if width else ()) and bool(shape) and shape[0] > 0
        if tensor.dtype == expected and fits:
            return None
        return f"its type {str(tensor.dtype).removeprefix('torch.')} or its shape {shape} is wrong"

    def read_clip(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Read a sample's moments (2C, t, h, w), and those of its conditioning frames if any; BadRowError as `read`."""
        needs_cond = sample.num_cond_frames and not self.cond_images
        cond = self.read(self.cond_fields(sample), sample) if needs_cond else None
        return self.read(self.clip_fields(sample), sample), cond

    def read_image_fields(self, sample: Sample) -> tuple[Tensor | None, Tensor | None]:
        """Read a sample's first image (H, W, 3) uint8, if it has one, and motion bucket (); BadRowError as `read`.

        Both are None if this cache has no images.
        """
        if not self.cond_images:
            return None, None
        image = self.read(self.image_fields(sample, COND_IMAGES), sample) if sample.num_cond_frames else None
        return image, self.read(self.image_fields(sample, MOTION), sample)

    def read_image_states(self, sample: Sample) -> Tensor | None:
        """Read the image encoder's states (M, E), if there are any; BadRowError as `read`."""
        if self.image is None or not sample.num_cond_frames:
            return None
        return self.read(self.state_fields(sample), sample)

    def text(self, prompts: Sequence[str]) -> TextCondition:
        """Read prompts' hidden states, padded to the longest; PromptError if one cannot be read or made again."""
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
            except NeedsRepair:
                raise
            except BadRowError as e:
                text = f"The prompt {prompt[:80]!r} is not in the cache {self.folder}: {e.detail}"
                raise PromptError(text, prompt, e.reason, e.detail) from None
            self._text_bytes += self._texts[key].nbytes
            while self._text_bytes > MOST_TEXT_BYTES and len(self._texts) > 1:
                self._text_bytes -= self._texts.popitem(last=False)[1].nbytes
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

    `progress` gets the number of finished files and of all files. Return the number of intact files, and for each other
    one its path and the problem.

    Raises:
        DataError: the cache does not exist, or is empty.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such cache.")
    paths = sorted(p for kind in KINDS for p in (folder / kind).glob("*/*.safetensors"))
    if not paths:
        raise DataError(f"{folder}: it contains no cached file. It is not a cache, or nothing has been cached yet.")
    cache = EncodingCache(folder, "")
    intact, wrong = 0, []
    for done, path in enumerate(paths, 1):
        try:
            for name, tensor, notes in _encodings(path):
                problem = _problem(cache, name or path.stem, tensor, notes)
                intact += problem is None
                if problem is not None:
                    wrong.append(f"{path}: {name}{': ' * bool(name)}{problem}")
        except (SafetensorError, OSError, ValueError) as e:
            wrong.append(f"{path}: unreadable ({type(e).__name__}: {e})")
        if progress is not None:
            progress(done, len(paths))
    return intact, wrong


def _encodings(path: Path) -> Iterator[tuple[str, Tensor, dict[str, str]]]:
    """Yield the encodings of a file, with their names if it is a shard."""
    if path.parent.name == FOLDER:
        yield from each(path)
        return
    with safe_open(path, framework="pt") as f:
        yield "", f.get_tensor("data"), f.metadata() or {}


def _problem(cache: EncodingCache, name: str, tensor: Tensor, notes: Mapping[str, str]) -> str | None:
    try:
        named = cache.path(parse_json(notes["made_from"])).stem
    except (ValueError, KeyError, TypeError) as e:
        return f"unreadable ({type(e).__name__}: {e})"
    if named != name:
        return f"its name does not match the key fields in it ({named} was expected)"
    return _damage(tensor, notes)


def _stored(fields: Mapping[str, Any], tensor: Tensor) -> tuple[Tensor, dict[str, str]]:
    """Return a tensor as it is stored, and its notes."""
    stored = tensor.contiguous().cpu()
    if "dtype" in fields:
        stored = stored.to(PRECISIONS[fields["dtype"]])
    return stored, {"made_from": json.dumps(fields, sort_keys=True), "sha256": _digest(stored)}


def _as_read(fields: Mapping[str, Any], stored: Tensor) -> Tensor:
    return stored.float() if "dtype" in fields else stored


def _damage(tensor: Tensor, notes: Mapping[str, str]) -> str | None:
    scalar = notes.get("sha256") == NO_BYTES and not tensor.dim()  # earlier versions did not hash single numbers
    if "sha256" in notes and notes["sha256"] != _digest(tensor) and not scalar:
        return "its content does not match its checksum"
    return None if is_finite(tensor) else "it contains values that are not finite"


def _image_key(sample: Sample) -> str | None:
    if not sample.own_image:
        return None
    record = sample.record
    return f"{record.image_digest} {record.image_reading}" if record.image_reading else record.image_digest


def _last(sample: Sample) -> dict[str, bool]:
    return {"last": True} if sample.last_frame else {}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().cpu()
    return hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _lengthen(states: Tensor, length: int) -> Tensor:
    missing = length - states.shape[0]
    return torch.cat([states, states.new_zeros(missing, *states.shape[1:])]) if missing else states
