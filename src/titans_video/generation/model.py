"""Load the parts that generate a video from a checkpoint."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from titans_video import checkpoint as checkpoints
from titans_video.checkpoint import fingerprint_tensors, warn_if_changed
from titans_video.codecs.base import Codec, codec_from_checkpoint
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.fields import Dtype
from titans_video.config.generation import Overrides, RunOptions
from titans_video.device import COMPILE_FLAGS, TF32_FLAGS, Choice, compiles, fast_defaults, read_facts
from titans_video.diffusion.base import SamplingProcess, build_process
from titans_video.errors import CheckpointError, ConfigError, first_line
from titans_video.generation.windows import Capabilities, check_flags
from titans_video.hub import stored_folder
from titans_video.models.attention import check_attention_backend, set_attention_backend
from titans_video.models.compiling import compile_blocks
from titans_video.models.registry import load_network
from titans_video.tensor_files import BUILDING_ERRORS
from titans_video.text.base import TextEncoder, text_from_checkpoint
from titans_video.types import PRECISIONS, TextCondition

PartT = TypeVar("PartT")
LATEST = "latest"
ALL_PARTS = frozenset({"text", "codec", "image", "network"})

BUNDLED = {"pretrained_model": "vae", "text_model": "text_encoder", "llm_model": "llm"}
"""Subfolders of an exported folder that hold copies of the frozen parts, by the override that names each part."""


class PromptEncoder(Protocol):
    """Encode prompts; `text.base.TextEncoder` is one."""

    def __call__(self, prompts: Sequence[str]) -> TextCondition: ...
    def empty(self, n: int) -> TextCondition: ...


class LoadedModel(ABC):
    """A model that planning and requests can query, however it generates.

    Attributes:
        network, codec: on the device of the computation, unless offloaded or set otherwise by the codec's options.
        config: as `titans_video.checkpoint` lists it; `step`: optimizer steps of its training.
        path: of the checkpoint or pipeline, for messages.
        run_on: the device of the computation, if weights wait elsewhere (offloading).
        loras: files and weights of the adapters on the network.
    """

    network: nn.Module
    codec: Codec
    config: dict[str, Any]
    step: int
    path: Path | None
    run_on: torch.device | None
    loras: Sequence[tuple[Path, float]] = ()

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    @abstractmethod
    def patch_size(self) -> tuple[int, int, int]:
        """Latent cells along time, height and width that clips must be multiples of."""

    @abstractmethod
    def cut_note(self, prompts: Sequence[str]) -> str | None:
        """Return a line about prompts that are longer than the model reads; None if there are none."""

    @property
    def device(self) -> torch.device:
        return self.run_on or next(self.network.parameters()).device

    def trained(self, name: str) -> Any:
        """Return a value of `formats.DATA`, which describes the clips of training; None if it is not recorded."""
        return self.config.get("data", {}).get(name)


@dataclass
class VideoModel(LoadedModel):
    """The parts of a checkpoint of this project; `process` is the noise process of training.

    `image` encodes the image condition of a network that has one; `turns` are parts that use the device by turns.
    """

    network: nn.Module
    codec: Codec
    text: PromptEncoder
    process: SamplingProcess
    config: dict[str, Any]
    step: int = 0
    path: Path | None = None
    run_on: torch.device | None = None
    image: ImageEncoder | None = None
    turns: frozenset[str] = frozenset()

    @property
    def capabilities(self) -> Capabilities:
        tasks = self.trained("tasks")
        text, image = bool(self.config.get("text", {}).get("widths", [0])), self.image is not None
        return Capabilities(
            per_frame_time=bool(getattr(self.network, "per_frame_time", True)),
            tasks=None if tasks is None else frozenset(tasks),
            text=text,
            image_condition=image,
            segments=self.segments is not None,
            # With --offload group, a layer fetches the weights of the next one, which a cache may skip.
            step_cache=bool(getattr(self.network, "step_cache", False)) and self.turns in (frozenset(), ALL_PARTS),
            time_shift="shift" in self.process.config(),
            most_cond_frames=1 if image else None,
            image_required=not text,
        )

    @property
    def patch_size(self) -> tuple[int, int, int]:
        t, h, w = self.config["model"].get("patch_size", (1, 1, 1))
        return t, h, w

    def cut_note(self, prompts: Sequence[str]) -> str | None:
        return self.text.cut_note(prompts, "prompts") if isinstance(self.text, TextEncoder) else None

    @property
    def segments(self) -> dict[str, int] | None:
        """Return `latents` and `overlap` of a segment, in latent frames, if the network has a memory."""
        return self.config.get("segments")

    @property
    def image_encoder(self) -> ImageEncoder:
        """Return the encoder of a model with the capability `image_condition`."""
        assert self.image, "this model has no image condition"
        return self.image

    @contextmanager
    def on_device(self, part: Literal["text", "codec", "image", "network"]) -> Iterator[None]:
        """Keep a part on the device of the computation within the block, if parts take turns there."""
        if part not in self.turns:
            yield
            return
        moved: Any = getattr(self, part)
        moved.to(self.device)
        try:
            yield
        finally:
            moved.to("cpu")


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name` (default: CUDA if available, else the CPU); ConfigError if there is none."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: there is no such kind of device; use cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def run_device(run: RunOptions) -> torch.device:
    """Return the device of the options; ConfigError if it is missing or cannot compute in their precision."""
    device = choose_device(run.device)
    if run.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16: CPUs compute in fp32 or bf16; use --dtype bf16.")
    return device


def choose_defaults(run: RunOptions, calls: int = 0) -> tuple[RunOptions, list[Choice]]:
    """Return the options with each `auto` resolved, and the choices to show; raises as `run_device`.

    `calls` is about how often the network will be called, which decides whether `auto` compiles it.
    """
    device = run_device(run)
    best = fast_defaults(read_facts(device))
    dtype: Dtype = best.dtype if run.dtype == "auto" else run.dtype
    compiled = compiles(run.compile, best, calls, allowed=run.offload == "none")
    choices = [Choice("precision", dtype, "--dtype"), Choice("compilation", "on" if compiled else "off", COMPILE_FLAGS)]
    if device.type == "cuda":
        choices.insert(1, Choice("float32 products", "in TF32" if run.tf32 else "in float32", TF32_FLAGS))
    return replace(run, dtype=dtype, compile="on" if compiled else "off"), choices


def find_checkpoint(name: str | None) -> Path:
    """Return the path of a checkpoint: a path, `latest`, or None for the package's weights. Raises CheckpointError."""
    if name is None:
        shipped = Path(str(files("titans_video"))) / "assets" / "tiny"
        if not (shipped / "config.json").exists():
            raise CheckpointError(
                f"This installation has no weights of its own ({shipped} is missing or empty). Train a model with "
                "`python train.py --mode train` and pass --checkpoint latest, or pass the --checkpoint you have."
            )
        return shipped
    if name != LATEST:
        return Path(name)
    here = Path.cwd()
    found = [path for path in here.glob("outputs*/**/last.pt") if path.is_file()]
    if not found:
        raise CheckpointError(
            f"--checkpoint {LATEST}: there is no last.pt in {here}/outputs*/ or below. Train a model first "
            "(`python train.py --mode train`), or name the checkpoint's file or folder."
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def load_model(
    checkpoint: str | None, overrides: Overrides, device: torch.device | str, *, run_on: torch.device | None = None
) -> VideoModel:
    """Read a checkpoint (see `find_checkpoint`) and build its model in evaluation mode on `device`.

    `overrides` has new paths of the encoders and the VAE. `run_on` is the device of the computation if it is another.
    Raises CheckpointError if it is missing or unreadable, or its parts do not fit; CodecError or TextError if its VAE
    or text encoder is missing.
    """
    path = find_checkpoint(checkpoint)
    read = checkpoints.read(path)
    config = read.config
    if "lora" in config:
        base = config.get("base", {}).get("pipeline", "DIR")
        raise CheckpointError(
            f"{path} is a LoRA, not a whole model. Use "
            f"{shlex.join(['--pretrained-model', str(base), '--lora', str(path)])} instead of --checkpoint."
        )
    if "base" in config:
        base = shlex.quote(str(config["base"].get("pipeline", "DIR")))
        raise CheckpointError(
            f"{path} is the network of a fine-tuned pipeline. Give that pipeline too: --pretrained-model {base}."
        )
    if "vae" in config:
        raise CheckpointError(
            f"{path} is a VAE, which makes no videos. Train a model on its latents with --pretrained-model."
        )
    overrides = with_bundled(path, overrides)
    network = _part(path, "model", lambda: load_network(config["model"], read.model))
    model = VideoModel(
        network=network.to(device).eval(),
        codec=_part(
            path,
            "codec",
            lambda: codec_from_checkpoint(config["codec"], read.codec, overrides, device=run_on or device),
        ).to(device),
        text=_part(path, "text", lambda: text_from_checkpoint(config["text"], overrides, device)),
        process=_part(path, "process", lambda: build_process(config["process"])),
        config=config,
        step=read.step,
        path=path,
        image=_part(path, "image", lambda: _image_encoder(config.get("image"), overrides, device)),
    )
    _check_together(model)
    return model


def _check_together(model: VideoModel) -> None:
    """Raise CheckpointError if the parts of a checkpoint belong to different models."""
    network: Any = model.network
    made, spec = network.config, model.codec.spec
    unet, variance = made.get("unet_config"), getattr(model.process, "variance", None)
    widths = model.config["text"].get("widths", made["text_widths"])
    is_alike = {
        "the channels of its codec": spec.channels == (unet["out_channels"] if unet else made["in_channels"]),
        "the temporal stride of its codec": bool(unet) or spec.stride[0] == made["time_stride"],
        "the widths of its text encoders": list(widths) == list(made["text_widths"]),
        "its image encoder": (model.image is not None) == bool(unet),
        "the segments": model.segments is None or hasattr(network, "start"),
        "the variances of its noise process": variance is None or len(variance) == spec.channels,
    }
    wrong = [name for name, alike in is_alike.items() if not alike]
    if wrong:
        raise CheckpointError(f"{model.path}: {' and '.join(wrong)} do not belong to its {type(network).__name__}.")


def _image_encoder(
    config: dict[str, Any] | None, overrides: Overrides, device: torch.device | str
) -> ImageEncoder | None:
    if config is None:
        return None
    given = overrides.pretrained_model
    folder = given or stored_folder(config["pretrained_model"], "--pretrained-model", "image encoder")
    encoder = ImageEncoder(folder, config["dtype"]).to(device)
    warn_if_changed("image encoder", folder, config["fingerprint"], encoder.fingerprint())
    return encoder


def with_bundled(path: Path, overrides: Overrides) -> Overrides:
    """Return the overrides with the frozen parts of an exported folder, unless a flag names others."""
    found: dict[str, Any] = {
        name: str(path / folder)
        for name, folder in BUNDLED.items()
        if getattr(overrides, name) is None and (path / folder).is_dir()
    }
    return replace(overrides, **found)


def _part(path: Path, name: str, build: Callable[[], PartT]) -> PartT:
    """Call `build`; an unusable description becomes an error that names the file and the part."""
    try:
        return build()
    except (ConfigError, CheckpointError) as e:
        raise CheckpointError(f"{path}: {e}") from None
    except BUILDING_ERRORS as e:
        reason = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) and e.args else first_line(e)
        raise CheckpointError(f'{path}: config["{name}"] cannot be built: {reason}.') from e


def load_for(run: RunOptions, checkpoint: str | None, overrides: Overrides) -> VideoModel:
    """Load a model and cast, offload and compile its network as the options ask.

    Raises UserError as `load_model`, or if a device or precision is not available.
    """
    run, _ = choose_defaults(run)
    device = run_device(run)
    check_attention_backend(run.attention_backend, device, training=False)
    model = load_model(checkpoint, overrides, device if run.offload == "none" else "cpu", run_on=device)
    if run.dtype != "fp32":
        # Not `ModelMixin.to`: it warns of modules to keep in float32 even if there are none.
        nn.Module.to(model.network, PRECISIONS[run.dtype])
    set_attention_backend(model.network, run.attention_backend, PRECISIONS[run.dtype])
    if run.offload != "none":
        turns = ALL_PARTS if run.offload == "model" else ALL_PARTS - {"network"}
        model = replace(model, run_on=device, turns=turns)
    if run.offload == "group":
        model.network.enable_group_offload(  # type: ignore[operator]  # diffusers' ModelMixin
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    if run.compile == "on":
        compile_blocks(model.network, training=False)
    return model


def with_shift(model: VideoModel, shift: float | None) -> VideoModel:
    """Return the model with another time shift in sampling (None: training's); ConfigError if it cannot have it."""
    if shift is None:
        return model
    check_flags({"shift": shift}, model.capabilities)
    return replace(model, process=build_process({**model.process.config(), "shift": shift}))


_SAMPLED = 1024  # values of each weight that go into the fingerprint


def fingerprint(model: LoadedModel) -> str:
    """Hash the first values of each weight of the network, so that another file under the same path is noticed."""
    return fingerprint_tensors({k: v.flatten()[:_SAMPLED].float() for k, v in model.network.state_dict().items()})
