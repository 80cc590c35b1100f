"""Codecs of the user: any class with `encode`, `decode` and a `spec`, as described in docs/guides/codecs.md.

Legend: B batch, C latent channels, T H W pixels, t h w the latent grid.
"""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from titans_video.checkpoint import fingerprint_tensors
from titans_video.codecs.base import Codec, without_noise
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError, UserError
from titans_video.finite import refuse_non_finite
from titans_video.types import CodecSpec

PROBE_SIDE = 64
"""A new class is tried on a blank clip of about this size, so that errors appear before training."""


class ExternalCodec(Codec):
    """Wrap an object whose `encode` returns scaled latents (B, C, t, h, w) and whose `decode` accepts them."""

    def __init__(self, inner: Any, name: str) -> None:
        missing = [m for m in ("encode", "decode") if not callable(getattr(inner, m, None))]
        if missing or not hasattr(inner, "spec"):
            missing += [] if hasattr(inner, "spec") else ["spec"]
            raise CodecError(
                f"The codec {name} has no {' and no '.join(missing)}; docs/guides/codecs.md lists what it needs."
            )
        self.inner = inner
        self.spec = _read_spec(inner.spec, name)
        self._passes_frames = _takes_frames(inner.decode)
        if isinstance(inner, torch.nn.Module):
            inner.eval().requires_grad_(False)

    @classmethod
    def from_options(cls, options: CodecOptions, init: Mapping[str, Any], *, load: bool) -> Codec:
        if not options.vae_module or not options.vae_class:
            raise CodecError(
                "--vae-backend external needs --vae-module and --vae-class, for example --vae-module "
                "train.videos.cogvideox_vae_adapter --vae-class CogVideoXVAEWrapper; docs/guides/codecs.md describes "
                "what such a class needs."
            )
        return load_external(options.vae_module, options.vae_class, init, load=load)

    def to(self, device: torch.device | str) -> Self:
        if hasattr(self.inner, "to"):
            self.inner.to(torch.device(device))
        return super().to(device)

    def moments_of(self, pixels: Tensor) -> Tensor:
        return without_noise(self._tensor("encode", self.inner.encode(pixels)))

    def pixels_of(self, unscaled: Tensor, frames: int) -> Tensor:
        extra = (frames,) if self._passes_frames else ()
        return self._tensor("decode", self.inner.decode(unscaled, *extra))

    def fingerprint(self) -> str:
        if hasattr(self.inner, "fingerprint"):
            return str(self.inner.fingerprint())
        tensors = self.inner.state_dict() if isinstance(self.inner, torch.nn.Module) else {}
        return fingerprint_tensors(tensors, self.spec.name)

    def _tensor(self, method: str, got: Any) -> Tensor:
        if not isinstance(got, Tensor):
            raise CodecError(f"{self.spec.name}.{method} returned a {type(got).__name__}; a tensor is expected.")
        return got


def load_external(module: str, name: str, init: Mapping[str, Any], *, load: bool = True) -> Codec:
    """Import `module`, create its class `name` with `init` as arguments, and try it on a blank clip.

    With `load` False, a class with an argument `load` gets False and is not tried.
    Raises CodecError if module, class, method or spec is missing or malformed, the class fails, or it is not finite.
    """
    kind = getattr(_import(module), name, None)
    where = f"--vae-module {module} --vae-class {name}"
    if not isinstance(kind, type) or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        what = "does not exist" if kind is None else "is not a class with encode and decode"
        raise CodecError(f"{where}: {module}.{name} {what}. docs/guides/codecs.md lists what a codec's class needs.")
    extra = {} if load or "load" not in _parameters(kind) else {"load": False}
    codec = _guard(f"{where}: building it with --vae-init-json {dict(init)}", lambda: _build(kind, name, init, extra))
    if load:
        inner = getattr(codec, "inner", codec)
        if isinstance(inner, torch.nn.Module):
            refuse_non_finite(dict(inner.named_parameters()), where, CodecError, "Load its weights again, or in bf16.")
        _guard(f"{where}: trying it on a blank clip", lambda: _probe(codec))
    return codec


def source_digest(codec: Codec) -> str:
    """Return the `cache_version` of the user's class, or a hash of its source file; empty if it has neither."""
    kind = type(getattr(codec, "inner", codec))
    version = getattr(kind, "cache_version", None)
    if isinstance(version, str):
        return version
    try:
        source = inspect.getsourcefile(kind)
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:32] if source else ""
    except (TypeError, OSError):
        return ""


def _import(module: str) -> Any:
    # A command installed as a script does not have the current folder on its path, but the user's module is there.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name and (module == e.name or module.startswith(e.name + ".")):
            raise CodecError(
                f"--vae-module {module}: there is no module {e.name} in this folder ({os.getcwd()}) or on PYTHONPATH."
            ) from None
        raise CodecError(f"--vae-module {module} needs the module {e.name}, which is not installed.") from None
    except Exception as e:  # a user's module may raise anything
        raise CodecError(f"--vae-module {module} fails when imported: {type(e).__name__}: {e}") from None


def _build(kind: type, name: str, init: Mapping[str, Any], extra: Mapping[str, Any]) -> Codec:
    inner = kind(**init, **extra)
    return inner if isinstance(inner, Codec) else ExternalCodec(inner, name)


def _probe(codec: Codec) -> None:
    _, sh, sw = codec.spec.stride
    frames = codec.spec.frames_at_least(1)
    blank = torch.zeros(1, 3, frames, sh * -(-PROBE_SIDE // sh), sw * -(-PROBE_SIDE // sw))
    codec.decode(codec.encode(blank), frames)


def _guard(doing: str, action: Any) -> Any:
    try:
        return action()
    except UserError as e:
        raise CodecError(f"{doing}: {e}") from None
    except Exception as e:  # as above
        raise CodecError(f"{doing} raises {type(e).__name__}: {e}") from None


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _takes_frames(decode: Any) -> bool:
    positional = [p for p in _parameters(decode).values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1


def _read_spec(spec: Any, name: str) -> CodecSpec:
    """Accept a `CodecSpec`, or a mapping or object with channels, stride and optionally frame_rule."""
    if isinstance(spec, CodecSpec):
        return spec
    names = ("channels", "stride", "frame_rule", "name")
    values = spec if isinstance(spec, Mapping) else {n: getattr(spec, n) for n in names if hasattr(spec, n)}
    try:
        channels, (s, sh, sw) = int(values["channels"]), (int(n) for n in values["stride"])
        rule = values.get("frame_rule", "each" if s == 1 else "causal")
        if min(channels, s, sh, sw) < 1 or rule not in ("each", "blocks", "causal", "cogvideox"):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CodecError(
            f"The spec of {name} is {spec!r}; a CodecSpec is expected, or a dict with channels, stride (three whole "
            "numbers: frames, height, width) and frame_rule (each, blocks, causal or cogvideox)."
        ) from None
    return CodecSpec(str(values.get("name", name)), channels, (s, sh, sw), rule)
