"""Export a model as one self-contained folder: weights, configuration, VAE, text encoders and a model card."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import diffusers

from titans_video import checkpoint as checkpoints
from titans_video.checkpoint import Checkpoint, read_json, restore_options
from titans_video.codecs.base import flags_to_name_again
from titans_video.codecs.image_encoder import ENCODER, EXTRACTOR
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions
from titans_video.errors import CheckpointError, ConfigError, printable
from titans_video.files import atomic_folder, write_text
from titans_video.generation.diffusers_backend import NOTES, find_finetuned
from titans_video.generation.model import BUNDLED, VideoModel
from titans_video.hub import stored_folder
from titans_video.models.svd_unet import plain_unet
from titans_video.pretrained.base import INDEX, ModelSpec, open_model_spec

CARD = """# {name}

A video diffusion model of Titans Video: {size:.1f} million parameters, {step} optimizer steps on clips of {data}.

```python
from titans_video import VideoPipeline

pipe = VideoPipeline.from_pretrained({name!r}{arguments})
frames = pipe({prompt!r}).frames[0]  # (T, H, W, 3), floats in [0, 1]
```

or

```bash
{command}
```
"""

_IGNORED = shutil.ignore_patterns(".*", "*.msgpack", "*.h5", "*.onnx", "*.ot", "*.pb")


def export(model: VideoModel, folder: Path, *, encoders: bool = True) -> Path:
    """Write a model as a new or empty folder, atomically; return the folder.

    With `encoders`, it has copies of a diffusers VAE and the text encoders, else their paths. Diffusers' own pipeline
    loads an exported Stable Video Diffusion, without the text branch.
    Raises CheckpointError if the folder is not empty or a part of Stable Video Diffusion is missing, ConfigError for
    Stable Video Diffusion without `encoders`, WriteError if the disk is full.
    """
    if model.capabilities.image_condition and not encoders:
        raise ConfigError("--no-encoders: the pipeline of Stable Video Diffusion needs all of its parts; leave it out.")
    _require_empty(folder)
    with atomic_folder(folder.absolute()) as temporary:
        if model.capabilities.image_condition:
            write_pipeline(model, temporary, folder.name)
        else:
            _write(model, temporary, folder.name, encoders)
    return folder


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder; name a new one.")


def _write(model: VideoModel, temporary: Path, name: str, encoders: bool) -> None:
    weights = {k: v.detach().cpu() for k, v in model.network.state_dict().items()}
    checkpoints.write(Checkpoint(weights, model.config, model.step, model.codec.state_dict()), temporary)
    if encoders:
        for part, source in _sources(model).items():
            shutil.copytree(source, temporary / BUNDLED[part], ignore=_IGNORED)
    write_text(temporary / "README.md", _card(model, name))


def _sources(model: VideoModel) -> dict[str, Path]:
    """Return the folders of the frozen parts, by the option that names them."""
    found: dict[str, Path] = {}
    vae: Any = getattr(model.codec, "folder", None)
    if vae is not None:
        found["pretrained_model"] = vae
    for stream in getattr(model.text, "streams", ()):
        source = getattr(stream, "source", None)
        if source is not None:
            found[source.flag[2:].replace("-", "_")] = stream.folder
    return found


def _card(model: VideoModel, name: str) -> str:
    options = restore_options(CodecOptions, model.config["codec"]["options"])
    flags = flags_to_name_again(options)
    named = dict(zip(flags[::2], flags[1::2], strict=True))
    data = model.config.get("data", {})
    prompt = printable(str((model.config.get("sample") or {}).get("prompt") or "a cat walking"), lines=False)
    return CARD.format(
        name=name,
        step=model.step,
        size=sum(p.numel() for p in model.network.parameters()) / 1e6,
        data=f"{data.get('num_frames', '?')} frames of {data.get('height', '?')}x{data.get('width', '?')}",
        prompt=prompt,
        arguments="".join(f", {flag[2:].replace('-', '_')}={value!r}" for flag, value in named.items()),
        command=shlex.join(["titans-video", "generate", "--checkpoint", name, "--prompt", prompt, *flags]),
    )


SCHEDULER = "scheduler"

LEFT_OUT = "The text branch is left out, because the pipeline has no place for it: the folder needs an image."
"""Note in the card and the message of an exported Stable Video Diffusion."""

SVD_CARD = """# {name}

Stable Video Diffusion, fine-tuned by Titans Video: {step} optimizer steps on clips of {data}.

```python
from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image

pipe = StableVideoDiffusionPipeline.from_pretrained({name!r})
frames = pipe(load_image("picture.png"), height={height}, width={width}, num_frames={frames}).frames[0]
```

{left_out} With text: `titans-video generate --checkpoint` of the training run.
"""


def write_pipeline(model: VideoModel, temporary: Path, name: str) -> None:
    """Write unet, vae, image_encoder, feature_extractor, scheduler and model_index.json of an SVDUNet.

    Raises CheckpointError if a part of the pipeline is missing where the checkpoint refers to it.
    """
    vae: Any = getattr(model.codec, "folder", None)
    pipeline = model.image_encoder.pipeline
    sources = {"vae": vae} | {part: pipeline / part for part in (ENCODER, EXTRACTOR, SCHEDULER)}
    for part, source in sources.items():
        if source is None or not source.is_dir():
            raise CheckpointError(
                f"{source or part} is missing: the export copies {part}/ from the pipeline that the model was trained "
                "from. Give its folder with --pretrained-model."
            )
    plain_unet(model.network).save_pretrained(temporary / "unet")  # type: ignore[arg-type]
    for part, source in sources.items():
        shutil.copytree(source, temporary / part, ignore=shutil.ignore_patterns(".*"))
    write_text(temporary / "model_index.json", json.dumps(_index(), indent=2) + "\n")
    data = model.config.get("data", {})
    size = {key: data.get(key, "?") for key in ("height", "width")}
    frames = data.get("num_frames", "?")
    card = SVD_CARD.format(
        name=name,
        step=model.step,
        data=f"{frames} frames of {size['height']}x{size['width']}",
        frames=frames,
        left_out=LEFT_OUT,
        **size,
    )
    write_text(temporary / "README.md", card)


def _index() -> dict[str, Any]:
    return {
        "_class_name": "StableVideoDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
    }


FINETUNED_CARD = """# {name}

{model}, fine-tuned by Titans Video: {step} optimizer steps on clips of {data}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name!r})
```

```text
{command}
```
"""


def export_checkpoint(name: str | None, overrides: Overrides, folder: Path, *, encoders: bool = True) -> Path | None:
    """Write a checkpoint of `train finetune` as a new or empty folder; return None for any other checkpoint.

    Raises as `export` and `export_finetuned`.
    """
    read = find_finetuned(name)
    if read is None:
        return None
    if not encoders:
        raise ConfigError("--no-encoders: a diffusers pipeline needs all of its parts; leave it out.")
    _require_empty(folder)
    base = overrides.pretrained_model or stored_folder(
        read.config["base"].get("pipeline"), "--pretrained-model", "pipeline"
    )
    return export_finetuned(read, open_model_spec(base), folder)


def export_finetuned(read: Checkpoint, spec: ModelSpec, folder: Path) -> Path:
    """Write a fine-tuned network as a whole diffusers pipeline, atomically; an existing folder is replaced.

    The network's files have the precision of the pretrained ones, of the folder or of `--base-file`. The other parts
    are hard links to the files of the pretrained pipeline, or copies where links are impossible.
    Raises CheckpointError if the checkpoint is of another network, WriteError if the disk is full.
    """
    index = read_json(spec.folder / INDEX, "is missing.", ConfigError)
    with atomic_folder(folder.absolute()) as temporary:
        trained = _write_networks(read, spec, temporary)
        for part, value in index.items():
            if isinstance(value, list) and any(value) and part not in trained:
                shutil.copytree(spec.folder / part, temporary / part, ignore=_IGNORED, copy_function=_link)
        _link(spec.folder / INDEX, temporary / INDEX)
        data = read.config.get("data", {})
        notes = {key: read.config[key] for key in ("base", "data", "sample") if key in read.config}
        write_text(temporary / NOTES, json.dumps(notes, indent=1) + "\n")
        card = FINETUNED_CARD.format(
            name=folder.name,
            model=spec.name,
            step=read.step,
            data=f"{data.get('num_frames', '?')} frames of {data.get('height', '?')}x{data.get('width', '?')}",
            command=shlex.join(["titans-video", "generate", "--pretrained-model", folder.name]),
        )
        write_text(temporary / "README.md", card)
    return folder


def _write_networks(read: Checkpoint, spec: ModelSpec, temporary: Path) -> list[str]:
    """Write each network of which the checkpoint has weights, as diffusers does; return the names of their folders."""
    network, written = spec.meta_model(), list[str]()
    for prefix, part in spec.lora_prefixes.items():
        weights = {key.removeprefix(prefix): value for key, value in read.model.items() if key.startswith(prefix)}
        if not weights:
            continue
        module: Any = network.get_submodule(prefix.rstrip(".")) if prefix else network
        dtypes = spec.loading.weights(spec.folder, part).dtypes(module)
        try:
            module.load_state_dict({k: v.to(dtypes.get(k, v.dtype)) for k, v in weights.items()}, assign=True)
        except RuntimeError as e:
            reason = " ".join(str(e).split())[:200]
            raise CheckpointError(f"{read.path} is not of the network in {spec.folder / part}: {reason}") from None
        module.save_pretrained(temporary / part)
        written.append(part)
    return written


def _link(source: str | Path, temporary: str | Path) -> None:
    file = Path(source).resolve()  # not the link to it that a download cache has
    try:
        os.link(file, temporary)
    except OSError:
        shutil.copyfile(file, temporary)
