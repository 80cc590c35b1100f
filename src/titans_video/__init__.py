"""Titans Video: train, tune and run video diffusion transformers.

    from titans_video import VideoPipeline, train

The names are imported when they are first used, so `import titans_video` loads nothing else.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "TrainedRun": "titans_video.api",
    "VideoPipeline": "titans_video.generation.video_pipeline",
    "train": "titans_video.api",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
