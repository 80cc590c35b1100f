"""The interface of pretrained video models. Add one as a subclass of `ModelSpec` and a line in `MODEL_SPECS`.

Legend: B batch, C latent channels, t h w the latent grid, t' its frames as the network takes them, N tokens of packed
latents, T H W pixel frames, height and width, L text tokens, E text width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from titans_video.codecs.base import Codec
from titans_video.codecs.image_encoder import VisionEncoder
from titans_video.diffusion.base import NoiseProcess, NoisySample, Prepared
from titans_video.errors import ConfigError, first_line
from titans_video.models.context_parallel import SIZE_SETTING, ContextPlan
from titans_video.parsing import read_json
from titans_video.pretrained.loading import Loading, base_files
from titans_video.schema import shown
from titans_video.tensor_files import BUILDING_ERRORS
from titans_video.text.base import TextEncoder
from titans_video.types import CodecSpec, TextCondition

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

MODEL_SPECS = {
    "CogVideoXPipeline": "titans_video.pretrained.cogvideox:CogVideoX",
    "CogVideoXImageToVideoPipeline": "titans_video.pretrained.cogvideox:CogVideoX",
    "WanPipeline": "titans_video.pretrained.wan:Wan",
    "WanImageToVideoPipeline": "titans_video.pretrained.wan:Wan",
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
    image: Tensor | None = None  # (1, 3, 1, H, W) in [-1, 1], the first frame; None for a video from text alone
    last_image: Tensor | None = None  # the same for the last frame
    guidance_scale_2: float | None = None  # of the low-noise expert; None: `guidance_scale`
    seed: int = 0  # of everything random except the noise
    on_step: Callable[[int], object] | None = None  # called after each denoising step with the number of steps done

    def after_step(self, pipeline: object, step: int, time: object, values: object) -> dict[str, object]:
        """Call `on_step`; a `callback_on_step_end` of diffusers that changes nothing."""
        if self.on_step is not None:
            self.on_step(step + 1)
        return {}


@dataclass(frozen=True)
class Conditioning:
    """The frames of clips that are given, for `ModelSpec.prepare`.

    Attributes:
        latents: unscaled, of clips without their other frames: (B, C, t, h, w), or (B, C, 1, h, w) of first frames
            alone if `samples_first_frame`. Rows without given frames have any values.
        mask: (B, S, t) bool: for each latent frame, which of its pixel frames are given.
        image: (B, N, E) states of the image encoder for the given frames; None: the model has no image encoder.
    """

    latents: Tensor
    mask: Tensor
    image: Tensor | None = None


class ModelSpec(ABC):
    """Everything that distinguishes one pretrained model from another; loads nothing large before it is needed.

    Attributes:
        tasks: what rows can train: t2v, i2v, v2v. With a single one, every row trains it.
        experts: names of the networks for parts of the timesteps, the part with more noise first; () for one network.
            Each row of a batch is for one of them (`Prepared.expert`).
        boundary: the share of the time range from which the first expert predicts; None without experts.
        end_frame: whether the last frame can be given too; if it is required, it is also given in training.
        samples_first_frame: the first frame's latents are drawn from the posterior; otherwise its mean is used.
        guidance_scale_2: default of generation for the second expert.
        blocks: names of the lists of blocks in each of `networks`. Their classes are the network's `_no_split_modules`,
            which sharding, compilation and streaming use.
        time_axis: the axis of latent frames in the network's `hidden_states` and prediction, along which long videos
            are cut into windows; None for packed tokens, which cannot be cut.
        first_layer: name of the layer, in each network, whose output the first block takes; None: no single one.
        lora_prefixes: the prefix in an adapter file for each prefix of the network's module names. A model with two
            networks has two entries, e.g. {"high.": "transformer", "low.": "transformer_2"}. Its module has a child for
            each of them that is loaded.
        loading: where the weights are read from, and how they are stored; set it before the network is loaded.
    """

    name: str
    folder: Path
    tasks: tuple[str, ...]
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
    lora_prefixes: Mapping[str, str] = MappingProxyType({"": "transformer"})
    experts: tuple[str, ...] = ()
    boundary: float | None = None
    end_frame: Literal["no", "optional", "required"] = "no"
    samples_first_frame: ClassVar[bool] = False
    guidance_scale_2: float | None = None
    loading: Loading = Loading()

    @property
    def takes_image(self) -> bool:
        """Whether a first frame can be given."""
        return "i2v" in self.tasks

    @property
    def needs_image(self) -> bool:
        """Whether a first frame must be given."""
        return "t2v" not in self.tasks

    @property
    def network_parts(self) -> dict[str, str]:
        """The pipeline's part that each network is, by expert; without experts by its own name."""
        parts = self.lora_prefixes.values()
        return dict(zip(self.experts or parts, parts, strict=True))

    @property
    def cond_frames_have_loss(self) -> bool:
        """Whether given frames are denoised like the rest; otherwise they stay clean, without loss."""
        return True

    @abstractmethod
    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raise ConfigError, with sizes that work, for clips whose positions the network does not know."""

    @abstractmethod
    def load_network(self, dtype: torch.dtype, experts: Sequence[str] = ()) -> nn.Module:
        """Load the pretrained network, frozen. A model with several networks returns one module that routes to them.

        Only these `experts` are loaded; (): all.
        """

    def networks(self, network: nn.Module) -> dict[str, nn.Module]:
        """Return the networks that a pipeline calls, by expert; the key of a single network is ""."""
        return {"": network}

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
    def process(self, frame: tuple[int, int] | None = None, shift: float | None = None) -> NoiseProcess:
        """Return the noise process of training, in the model's own timesteps.

        Args:
            frame: height and width of most clips, which may decide the shift; None: those of the pretraining.
            shift: of the times towards noise; None: the model's own.
        Raises:
            ConfigError: the model's times cannot be shifted.
        """

    def image_encoder(self, dtype: str, device: torch.device | str) -> VisionEncoder | None:
        """Return the encoder of `Conditioning.image`; its weights are read at first use."""
        return None

    @abstractmethod
    def scheduler(self) -> "SchedulerMixin":
        """Return the pipeline's scheduler, from its configuration alone."""

    def padded_frames(self, t: int) -> int:
        """Return t' for t latent frames."""
        return t

    @abstractmethod
    def prepare(
        self,
        latents: Tensor,
        text: TextCondition,
        given: Conditioning | None,
        timesteps: Tensor,
    ) -> Prepared:
        """Turn clips into the network's training inputs: layout, padding, conditioning, the timestep of each part.

        Args:
            latents: (B, C, t, h, w), clean.
            given: the given frames; None if no row has any.
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
        self,
        latent_shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        expert: str | None = None,
    ) -> tuple[NoisySample, Prepared]:
        """Return random inputs of `predict` for (C, t', h, w) latents (None: tiny ones); on `meta` without values.

        `expert` is of `experts`; None: the first one.
        """

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
        """Return a hash of the networks' files."""
        return "-".join(self.loading.fingerprint(self.folder, part) for part in self.lora_prefixes.values())

    @abstractmethod
    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, object]:
        """Return the network's arguments that depend on the latent grid (t', h, w)."""

    def context_plan(self, network: nn.Module) -> ContextPlan:
        """Return how several processes share the tokens of a clip; raise ConfigError if they cannot."""
        raise ConfigError(f"{self.name} does not support context parallelism ({SIZE_SETTING}). Remove it.")

    @abstractmethod
    def load_with_diffusers(self, network: nn.Module, file: Path, only: set[str] | None) -> str:
        """Load a LoRA's file (only these layers) into one network as diffusers does; return the adapter's name."""


def tiny_network(
    build: Callable[[dict[str, object]], nn.Module],
    config: Mapping[str, object],
    name: str,
    blocks: Sequence[int] | None,
    skipped: Callable[[], nn.Module],
) -> nn.Module:
    """Build a network from its configuration with only these `blocks` (None: all) of its list `name`, untrained.

    `skipped` makes those in the other places.
    """
    layers = cast(int, config["num_layers"])
    kept = range(layers) if blocks is None else blocks
    network = build({**config, "num_layers": len(kept)})
    made = dict(zip(kept, network.get_submodule(name).children(), strict=True))
    setattr(network, name, nn.ModuleList(made[i] if i in made else skipped() for i in range(layers)))
    return network


def is_pipeline(folder: str | Path | None) -> bool:
    """Return whether a folder is a whole diffusers pipeline."""
    return folder is not None and (Path(folder).expanduser() / INDEX).is_file()


def open_model_spec(folder: str | Path, files: Sequence[str] = (), trained: str | None = None) -> ModelSpec:
    """Return the spec of a diffusers pipeline whose networks are in the folder, or in single `files` (`--base-file`).

    A single file may be that of one expert: of the one that it names, or of the `trained` one. The other is in the
    folder.

    Raises:
        ConfigError: the folder is no pipeline or of an unknown class, or the files do not fit its networks.
    """
    spec = _open(folder)
    if files:
        spec.loading = Loading(base_files(files, spec.network_parts, trained))
        for part in spec.network_parts.values():
            if not spec.loading.weights(spec.folder, part).exists():
                raise ConfigError(
                    f"--base-file: {spec.folder / part} has no weights. Put them into this folder, or give the files "
                    "of both experts, high=FILE and low=FILE (to fine-tune, with --experts both)."
                )
    return spec


def _open(folder: str | Path) -> ModelSpec:
    path = Path(folder).expanduser()
    try:
        name = read_json(path / INDEX, strict=False).get("_class_name")
    except FileNotFoundError:
        what = f"has no {INDEX}" if path.is_dir() else "is not a folder on this machine"
        hint = ""
        if (path.parent / INDEX).is_file():
            hint = f" Perhaps you mean {path.parent}."
        elif path.is_dir() and (path / "config.json").is_file():
            hint = (
                " It has a single config.json, as a model in another format than diffusers'. The same model is often "
                "published for diffusers too; the names of Wan's folders then end in -Diffusers."
            )
        raise ConfigError(
            f"--pretrained-model {path} {what}. Give the folder of a whole diffusers pipeline, as `hf download NAME "
            f"--local-dir DIR` writes it; nothing is downloaded here.{hint}"
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
