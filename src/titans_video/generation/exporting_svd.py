"""A fine-tuned Stable Video Diffusion as the folder that diffusers' own pipeline loads; the text stays behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers

from titans_video.codecs.image_encoder import ENCODER, EXTRACTOR
from titans_video.errors import CheckpointError
from titans_video.generation.loading import VideoModel
from titans_video.models.svd import plain_unet

SCHEDULER = "scheduler"
LEFT_OUT = (
    "The branch for text is left out, as the pipeline has no place for it: the folder goes on from pictures alone."
)

CARD = """# {name}

Stable Video Diffusion, fine-tuned by Titans Video: {step} optimizer steps on clips of {data}.

```python
from diffusers import StableVideoDiffusionPipeline
from diffusers.utils import load_image

pipe = StableVideoDiffusionPipeline.from_pretrained("{name}")
frames = pipe(load_image("picture.png"), height={height}, width={width}, num_frames={frames}).frames[0]
```

{left_out} With text: `titans-video generate --checkpoint` of the training run.
"""


def write_pipeline(model: VideoModel, folder: Path, name: str) -> None:
    """Write unet, vae, image_encoder, feature_extractor, scheduler and model_index.json into a new folder.

    Args:
        model: whose network is an SVDUNet.
        name: of the folder that it becomes, for its card.
    Raises:
        CheckpointError: a part of the pipeline is not where the checkpoint says.
    """
    vae: Any = getattr(model.codec, "folder", None)
    assert model.image is not None  # callers looked
    sources = {"vae": vae} | {part: model.image.pipeline / part for part in (ENCODER, EXTRACTOR, SCHEDULER)}
    for part, source in sources.items():
        if source is None or not source.is_dir():
            raise CheckpointError(
                f"{source or part} is missing: the export copies {part}/ from the folder that the model was trained "
                "with; --pretrained-model says where that is now."
            )
    plain_unet(model.network).save_pretrained(folder / "unet")  # type: ignore[arg-type]
    for part, source in sources.items():
        shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns(".*"))
    (folder / "model_index.json").write_text(json.dumps(_index(), indent=2) + "\n")
    data = model.config.get("data", {})
    size = {key: data.get(key, "?") for key in ("height", "width")}
    frames = data.get("num_frames", "?")
    card = CARD.format(
        name=name,
        step=model.step,
        data=f"{frames} frames of {size['height']}x{size['width']}",
        frames=frames,
        left_out=LEFT_OUT,
        **size,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


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
