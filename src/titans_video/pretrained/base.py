"""The interface of pretrained video models. Add one as a subclass of `ModelSpec` and a line in `MODEL_SPECS`.

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
from titans_video.models.context_parallel import SIZE_SETTING, ContextPlan
from titans_video.parsing import read_json
from titans_video.schema import shown
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
    """One call of a diffusers pipeline, which makes one video."""

    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    noise: Tensor  # of the shape of the network's latents
    text: TextCondition  # one row, in the dtype of the VAE and the latents; `negative` likewise
    negative: TextCondition
    image: Tensor | None = None  # (1, 3, 1, H, W) in [-1, 1], the first frame; None for a text-to-video model
    seed: int = 0  # of everything random except the noise
    on_step: Callable[[int], object] | None = None  # called after each denoising step with the number of steps done


class ModelSpec(ABC):
    """Everything that distinguishes one pretrained model from another; loads nothing large before it is needed.

    Attributes:
        blocks: names of the lists of blocks. Their classes are the network's `_no_split_modules`, which sharding,
            compilation and streaming use.
        time_axis: the axis of latent frames in the network's `hidden_states` and prediction, along which long videos
            are cut into windows; None for packed tokens, which cannot be cut.
        first_layer: name of the layer whose output the first block takes; None if there is no single one.
        lora_prefixes: the prefix in an adapter file for each prefix of the network's module names. A model with two
            networks has two entries, e.g. {"high.": "transformer", "low.": "transformer_2"}.
    """

    name: str
    folder: Path
    image_to_video: bool  # needs a first frame
    codec_spec: CodecSpec
    clip_grid: tuple[int, int, int]  # latent cells that clips must be multiples of
    patch_size: tuple[int, int, int]  # latent cells of a token
    text_length: int  # tokens of every prompt
    trained: tuple[int, int, int]  # frames, height and width of its pretraining
    fps: float
    steps: int  # default of generation, like `guidance_scale`
    guidance_scale: float
    blocks: tuple[str, ...]
    time_axis: int | None
    first_layer: ClassVar[str | None] = None
    lora_prefixes: ClassVar[Mapping[str, str]] = {"": "transformer"}

    @property
    def task(self) -> str:
        """The task that every clip trains."""
        return "i2v" if self.image_to_video else "t2v"

    @property
    def cond_frames_have_loss(self) -> bool:
        """Whether a first frame is denoised like the rest; otherwise it stays clean, without loss."""
        return True

    @abstractmethod
    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raise ConfigError, with sizes that work, for clips whose positions the network does not know."""

    @abstractmethod
    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """Load the pretrained network, frozen. A model with several networks returns one module that routes to them."""

    @abstractmethod
    def meta_model(self) -> nn.Module:
        """Return the network without weights, on the device `meta`."""

    @abstractmethod
    def tiny_model(self, blocks: Sequence[int] | None) -> nn.Module:
        """Return a float32 copy for tiny latents. Blocks not in `blocks` (None: all) become empty and do nothing."""

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
        timesteps: Tensor,
    ) -> Prepared:
        """Turn clips into the network's training inputs: layout, padding, conditioning, the timestep of each part.

        Args:
            latents: (B, C, t, h, w), clean.
            first_frame: (B, C, 1, h, w) unscaled latents of the first frames; None for a text-to-video model.
            timesteps: (B,), drawn by the noise process for each row, on the device of the latents.
        """

    @abstractmethod
    def predict(
        self, model: nn.Module, noisy: NoisySample, prepared: Prepared, dtype: torch.dtype
    ) -> Tensor | Mapping[str, Tensor]:
        """Call the (wrapped) network once, inputs cast to `dtype`; return its float32 prediction for the noise process.

        With several modalities return one tensor for each: `video` and the names in `prepared.others`.
        """

    @abstractmethod
    def example(
        self, latent_shape: Sequence[int] | None = None, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[NoisySample, Prepared]:
        """Return random inputs of `predict` for (C, t', h, w) latents (None: tiny ones); on `meta` without values."""

    @abstractmethod
    def pipeline(self, network: nn.Module, codec: Codec, *, text: bool, dtype: torch.dtype) -> "DiffusionPipeline":
        """Return the diffusers pipeline around a network, with or without the text encoder."""

    @abstractmethod
    def encode(self, pipeline: "DiffusionPipeline", prompt: str, negative: str) -> tuple[TextCondition, TextCondition]:
        """Encode two prompts with the pipeline's own text encoders, one row each."""

    @abstractmethod
    def run(self, pipeline: "DiffusionPipeline", call: PipelineCall) -> Tensor:
        """Call the pipeline once; return (1, 3, T, H, W) float32 in [-1, 1] on the CPU."""

    @abstractmethod
    def layer_rows(self, name: str, latent_shape: Sequence[int]) -> int:
        """Return the rows (tokens) that a linear layer or convolution is applied to for one clip of (C, t', h, w)."""

    @abstractmethod
    def attention_flops(self, latent_shape: Sequence[int]) -> int:
        """Return the FLOPs of all attention products in a forward pass over one clip of (C, t', h, w)."""

    def fingerprint(self) -> str:
        """Return a hash of the network's files."""
        return fingerprint_folder(self.folder / "transformer")

    @abstractmethod
    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, object]:
        """Return the network's arguments that depend on the latent grid (t', h, w)."""

    def context_plan(self, network: nn.Module) -> ContextPlan:
        """Return how several processes share the tokens of a clip; raise ConfigError if they cannot."""
        raise ConfigError(f"{self.name} does not support context parallelism ({SIZE_SETTING}). Remove it.")

    @abstractmethod
    def load_with_diffusers(self, network: nn.Module, folder: Path, only: set[str] | None) -> str:
        """Load a folder's LoRA (only these layers) as diffusers does; return the adapter's name."""


def is_pipeline(folder: str | Path | None) -> bool:
    """Return whether a folder is a whole diffusers pipeline."""
    return folder is not None and (Path(folder).expanduser() / INDEX).is_file()


def open_model_spec(folder: str | Path) -> ModelSpec:
    """Return the spec of a diffusers pipeline; raise ConfigError if the folder is none or of an unknown class."""
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
    if not isinstance(name, str) or name not in MODEL_SPECS:
        known = ", ".join(MODEL_SPECS)
        raise ConfigError(
            f"--pretrained-model {path} describes the class {shown(name)}; the supported pipelines are {known}."
        )
    module, _, kind = MODEL_SPECS[name].partition(":")
    try:
        return cast(ModelSpec, getattr(import_module(module), kind)(path))
    except BUILDING_ERRORS as e:
        reason = f"{e} is missing" if isinstance(e, KeyError) else first_line(e)
        raise ConfigError(f"--pretrained-model {path}: its configuration is not that of a {name}: {reason}.") from None
