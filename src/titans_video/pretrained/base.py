"""The interface of a pretrained video model for training and generation, and the list of known models.

A new model is a subclass of `ModelSpec` in a file of its own and a line in `MODEL_SPECS`.

Legend: B batch, C latent channels, t h w the latent grid, t' its frames as the network takes them, N tokens of packed
latents, T H W pixel frames, height and width, L text tokens, E text width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from titans_video.checkpoint import fingerprint_folder
from titans_video.codecs.base import Codec
from titans_video.diffusion.base import NoiseProcess, NoisySample, Prepared
from titans_video.errors import ConfigError, first_line
from titans_video.parsing import read_json
from titans_video.tensor_files import BUILDING_ERRORS
from titans_video.text.base import TextEncoder
from titans_video.types import CodecSpec, TextCondition

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODEL_SPECS = {
    "CogVideoXPipeline": "titans_video.pretrained.cogvideox:CogVideoX",
    "CogVideoXImageToVideoPipeline": "titans_video.pretrained.cogvideox:CogVideoX",
}
"""The spec, `module:Class`, for each class of diffusers pipeline."""
INDEX = "model_index.json"


@dataclass(frozen=True)
class PipelineCall:
    """One call of a diffusers pipeline, which makes one video.

    Attributes:
        text, negative: the prompt and the negative prompt, one row each, in the dtype of the VAE and the latents.
        noise: the initial noise, of the shape of the network's latents.
        image: (1, 3, 1, H, W) in [-1, 1], the first frame; None for a text-to-video model.
        seed: of everything else that is drawn.
        on_step: called after each denoising step with the number of steps done.
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    noise: Tensor
    text: TextCondition
    negative: TextCondition
    image: Tensor | None = None
    seed: int = 0
    on_step: Callable[[int], object] | None = None


class ModelSpec(ABC):
    """Everything that distinguishes one pretrained model from another.

    A spec knows its model by the pipeline's folder, and loads nothing large before it is asked to.

    Attributes:
        name: for messages.
        folder: of the diffusers pipeline.
        image_to_video: the model needs a first frame.
        codec_spec: shapes of its VAE's latents.
        clip_grid: latent cells that clips must be multiples of.
        patch_size: latent cells of a token.
        text_length: tokens of every prompt.
        trained: frames, height and width of its pretraining.
        fps: frames per second of its videos.
        steps, guidance_scale: defaults of generation.
        blocks: names of the lists of blocks in the network. Their classes are the network's `_no_split_modules`, which
            sharding, compilation and streaming use.
        time_axis: the axis of latent frames in the network's `hidden_states` and prediction, by which a long video is
            cut into windows; None for packed tokens, which cannot be cut.
        lora_prefixes: the prefix in an adapter file for each prefix of the network's module names. A model with two
            networks has two entries, e.g. {"high.": "transformer", "low.": "transformer_2"}.
    """

    name: str
    folder: Path
    image_to_video: bool
    codec_spec: CodecSpec
    clip_grid: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    text_length: int
    trained: tuple[int, int, int]
    fps: float
    steps: int
    guidance_scale: float
    blocks: tuple[str, ...]
    time_axis: int | None
    lora_prefixes: ClassVar[Mapping[str, str]] = {"": "transformer"}

    @property
    def task(self) -> str:
        """The task that every clip trains."""
        return "i2v" if self.image_to_video else "t2v"

    @property
    def cond_frames_have_loss(self) -> bool:
        """Whether a first frame is a hint that is denoised like the rest; otherwise it stays clean, without loss."""
        return True

    @abstractmethod
    def check_size(self, frames: int, height: int, width: int) -> None:
        """Reject clips whose positions the network does not know.

        Raises:
            ConfigError: with the sizes that work.
        """

    @abstractmethod
    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """Load the pretrained network, frozen. A model with several networks returns one module that routes to them."""

    @abstractmethod
    def meta_model(self) -> nn.Module:
        """Return the network without weights, on the device `meta`."""

    @abstractmethod
    def tiny_model(self, blocks: Sequence[int] | None) -> nn.Module:
        """Return a copy of the network in float32, for tiny latents.

        Args:
            blocks: the numbers of the blocks to keep, under their own names; the others are replaced by modules without
                weights that change nothing. None: all.
        """

    @abstractmethod
    def codec(self, dtype: str, device: torch.device | str, *, load: bool) -> Codec:
        """Return the VAE; without `load` its weights are read at first use."""

    @abstractmethod
    def text(self, dtype: str, device: torch.device | str, *, offload: bool = False) -> TextEncoder:
        """Return the text encoders; their weights are read at first use."""

    @abstractmethod
    def process(self) -> NoiseProcess:
        """Return the noise process of training, in the model's own timesteps and shift."""

    def padded_frames(self, t: int) -> int:
        """Return t' for t latent frames."""
        return t

    @abstractmethod
    def prepare(
        self,
        latents: Tensor,
        text: TextCondition,
        first_frame: Tensor | None,
        process: NoiseProcess,
        seeds: Sequence[int],
    ) -> Prepared:
        """Turn encoded clips into what the network is trained on: layout, padding, conditioning, timesteps.

        Args:
            latents: (B, C, t, h, w), clean.
            text: encoded captions.
            first_frame: (B, C, 1, h, w) unscaled latents of the first frames; None for a text-to-video model.
            seeds: of the rows; everything random is a function of them.
        """

    @abstractmethod
    def predict(
        self, model: nn.Module, noisy: NoisySample, prepared: Prepared, dtype: torch.dtype
    ) -> Tensor | Mapping[str, Tensor]:
        """Call the network once; return its prediction, float32, in the terms of the noise process.

        Args:
            model: the network, possibly wrapped.
            dtype: of its weights; inputs are cast to it.
        Returns:
            One tensor, or one for each modality: `video` and the names in `prepared.others`.
        """

    @abstractmethod
    def example(
        self, latent_shape: Sequence[int] | None = None, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[NoisySample, Prepared]:
        """Return random inputs of `predict` for one clip; on the device `meta` without values.

        Args:
            latent_shape: (C, t', h, w); None: the shape that `tiny_model` takes.
        """

    @abstractmethod
    def pipeline(self, network: nn.Module, codec: Codec, *, text: bool, dtype: torch.dtype) -> "DiffusionPipeline":
        """Return the diffusers pipeline around a network.

        Args:
            text: with the text encoder.
        """

    @abstractmethod
    def encode(self, pipeline: "DiffusionPipeline", prompt: str, negative: str) -> tuple[TextCondition, TextCondition]:
        """Encode two prompts with the pipeline's own text encoders, one row each."""

    @abstractmethod
    def run(self, pipeline: "DiffusionPipeline", call: PipelineCall) -> Tensor:
        """Call the pipeline once; return (1, 3, T, H, W) float32 in [-1, 1] on the CPU."""

    def fingerprint(self) -> str:
        """Return a hash of the network's files."""
        return fingerprint_folder(self.folder / "transformer")

    @abstractmethod
    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, object]:
        """Return the network's arguments that depend on the latent grid (t', h, w)."""

    @abstractmethod
    def load_with_diffusers(self, network: nn.Module, folder: Path, only: set[str] | None) -> str:
        """Load a LoRA file into a bare network as diffusers does.

        Args:
            folder: with the file in it.
            only: the layers to keep, for a network that has no others.
        Returns:
            The adapter's name.
        """


def is_pipeline(folder: str | Path | None) -> bool:
    """Return whether a folder is a whole diffusers pipeline."""
    return folder is not None and (Path(folder).expanduser() / INDEX).is_file()


def open_model_spec(folder: str | Path) -> ModelSpec:
    """Return the spec of a diffusers pipeline, from the configurations in its folder.

    Raises:
        ConfigError: the folder is no pipeline, or of an unknown class.
    """
    path = Path(folder).expanduser()
    try:
        name = read_json(path / INDEX, strict=False).get("_class_name")
    except FileNotFoundError:
        what = f"has no {INDEX}" if path.is_dir() else "is not a folder on this machine"
        raise ConfigError(
            f"--pretrained-model {path} {what}. Give the folder of a whole diffusers pipeline, as `hf download NAME "
            "--local-dir DIR` writes it; nothing is downloaded here."
        ) from None
    except (OSError, ValueError, AttributeError) as e:
        raise ConfigError(f"--pretrained-model: {path / INDEX} cannot be read: {e}") from None
    if name not in MODEL_SPECS:
        known = ", ".join(MODEL_SPECS)
        raise ConfigError(f"--pretrained-model {path} is a {name}; the supported pipelines are {known}.")
    module, _, kind = MODEL_SPECS[name].partition(":")
    try:
        return cast(ModelSpec, getattr(import_module(module), kind)(path))
    except BUILDING_ERRORS as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else first_line(e)
        raise ConfigError(f"--pretrained-model {path}: its configuration is not that of a {name}: {reason}.") from None
