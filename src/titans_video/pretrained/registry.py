"""Which pretrained families there are: a new one is a file and a line here."""

import json
from importlib import import_module
from pathlib import Path

from titans_video.errors import ConfigError
from titans_video.pretrained.base import ModelSpec

MODEL_SPECS = {
    "CogVideoXPipeline": "titans_video.pretrained.cogvideox:CogVideoX",
    "CogVideoXImageToVideoPipeline": "titans_video.pretrained.cogvideox:CogVideoX",
}
"""The class of a diffusers pipeline, and the module and class that know its family."""

INDEX = "model_index.json"


def is_pipeline(folder: str | Path | None) -> bool:
    """Whether a folder is a whole diffusers pipeline."""
    return folder is not None and (Path(folder).expanduser() / INDEX).is_file()


def open_model_spec(folder: str | Path) -> ModelSpec:
    """The family of a diffusers pipeline, from the configurations in its folder.

    Raises:
        ConfigError: no pipeline, or of a family that is not known here.
    """
    path = Path(folder).expanduser()
    try:
        name = json.loads((path / INDEX).read_text(encoding="utf-8")).get("_class_name")
    except FileNotFoundError:
        what = f"has no {INDEX}" if path.is_dir() else "is not a folder here"
        raise ConfigError(
            f"--pretrained-model {path} {what}. The folder of a whole diffusers pipeline is expected, as `hf download "
            "NAME --local-dir DIR` fetches it; nothing is downloaded here."
        ) from None
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"--pretrained-model: {path / INDEX} cannot be read: {e}") from None
    if name not in MODEL_SPECS:
        raise ConfigError(
            f"--pretrained-model {path} is a {name}; the pipelines known here are {', '.join(MODEL_SPECS)}."
        )
    module, _, kind = MODEL_SPECS[name].partition(":")
    made: ModelSpec = getattr(import_module(module), kind)(path)
    return made
