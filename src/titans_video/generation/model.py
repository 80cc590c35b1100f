"""From a checkpoint to the parts that make a video."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from titans_video import checkpoint as checkpoints
from titans_video.checkpoint import Checkpoint
from titans_video.codecs.base import Codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.codecs.registry import codec_from_checkpoint
from titans_video.config.generation import Overrides, RunOptions
from titans_video.diffusion.base import NoiseProcess
from titans_video.diffusion.registry import build_process
from titans_video.errors import CheckpointError, ConfigError
from titans_video.fingerprint import fingerprint_tensors, warn_if_changed
from titans_video.generation.windows import WindowingSupport
from titans_video.models.registry import build_network
from titans_video.text.registry import text_from_checkpoint
from titans_video.types import PRECISIONS, TextCondition

PartT = TypeVar("PartT")
LATEST = "latest"

BUNDLED = {"pretrained_model": "vae", "text_model": "text_encoder", "llm_model": "llm"}
"""Where an exported folder has its own copies of the frozen parts, by the override that names them."""


class PromptEncoder(Protocol):
    """What makes a condition of prompts; see `text.table.TextEncoder`."""

    def __call__(self, prompts: Sequence[str]) -> TextCondition: ...
    def empty(self, n: int) -> TextCondition: ...


@dataclass
class VideoModel:
    """Everything that a prompt needs to become a video.

    Attributes:
        network: on the device that generation runs on.
        codec, text: on the same, unless their own options keep them elsewhere.
        process: what the network's values stand for.
        config: the checkpoint's, as `titans_video.checkpoint` lists it.
        step: optimizer steps that the network has seen.
        path: where it came from, for messages.
        run_on: the device of the computation, where weights wait elsewhere (offloading).
        image: what encodes the picture, for a network that is told one; else None.
        turns: which of `text`, `codec`, `image` and `network` are on that device only while they are used.
    """

    network: nn.Module
    codec: Codec
    text: PromptEncoder
    process: NoiseProcess
    config: dict[str, Any]
    step: int = 0
    path: Path | None = None
    run_on: torch.device | None = None
    image: ImageEncoder | None = None
    turns: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return self.run_on or next(self.network.parameters()).device

    @contextmanager
    def on_device(self, part: Literal["text", "codec", "image", "network"]) -> Iterator[None]:
        """That part is on the device of the computation: always, or where it takes turns for as long as the block."""
        if part not in self.turns:
            yield
            return
        moved: Any = getattr(self, part)
        moved.to(self.device)
        try:
            yield
        finally:
            moved.to("cpu")

    @property
    def joins(self) -> WindowingSupport:
        """What the network can do about the frames that it is to go on from."""
        tasks = self.trained("tasks")
        return WindowingSupport(
            bool(getattr(self.network, "frame_times", True)), None if tasks is None else frozenset(tasks)
        )

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent cells of one token along time, height and width."""
        t, h, w = self.config["model"].get("patch_size", (1, 1, 1))
        return t, h, w

    @property
    def segments(self) -> dict[str, int] | None:
        """`latents` and `overlap` of a segment, in latent frames, of a network with a memory; else None."""
        return self.config.get("segments")

    def trained(self, name: str) -> Any:
        """`num_frames`, `height`, `width`, `fps` or `tasks` of training; None where the checkpoint does not say."""
        return self.config.get("data", {}).get(name)


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; without a name CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: there is no such kind of device; try cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def find_checkpoint(name: str | None) -> Path:
    """Where a checkpoint lies: a path, `latest`, or None for the weights that come with the package.

    Raises:
        CheckpointError: nothing there, and where it looked.
    """
    if name is None:
        shipped = Path(str(files("titans_video"))) / "assets" / "tiny"
        if not (shipped / "config.json").exists():
            raise CheckpointError(
                f"This installation has no weights of its own ({shipped} is missing or empty). Train a model with "
                "`python train.py --mode train`, then give --checkpoint latest; or give the --checkpoint you have."
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


def load_model(checkpoint: str | None, overrides: Overrides, device: torch.device | str) -> VideoModel:
    """Read a checkpoint and build what it describes, in evaluation mode on `device`.

    Args:
        checkpoint: a `.pt` file, a folder, `latest`, or None for the weights that come with the package.
        overrides: where the encoders and the VAE are now.
        device: of the network, the codec and the encoders.
    Raises:
        CheckpointError: nothing there, unreadable, or its parts do not fit together.
        CodecError, TextError: the VAE or a text encoder that it names is not there.
    """
    path = find_checkpoint(checkpoint)
    read = checkpoints.read(path)
    config = read.config
    if "lora" in config:
        base = config.get("base", {}).get("pipeline", "DIR")
        raise CheckpointError(
            f"{path} is a LoRA and no whole model: give --pretrained-model {base} --lora {path}, and no --checkpoint."
        )
    overrides = with_bundled(path, overrides)
    network = _part(path, "model", lambda: build_network(config["model"]))
    _load_weights(network, read, path)
    return VideoModel(
        network=network.to(device).eval(),
        codec=_part(
            path, "codec", lambda: codec_from_checkpoint(config["codec"], read.codec, overrides, device=device)
        ),
        text=_part(path, "text", lambda: text_from_checkpoint(config["text"], overrides, device)),
        process=_part(path, "process", lambda: build_process(config["process"])),
        config=config,
        step=read.step,
        path=path,
        image=_part(path, "image", lambda: _image_encoder(config.get("image"), overrides, device)),
    )


def _image_encoder(
    config: dict[str, Any] | None, overrides: Overrides, device: torch.device | str
) -> ImageEncoder | None:
    """The encoder that a checkpoint's network was told pictures by, at the place that `overrides` may give."""
    if config is None:
        return None
    folder = overrides.pretrained_model or config["pretrained_model"]
    encoder = ImageEncoder(folder, config["dtype"]).to(device)
    warn_if_changed("image encoder", folder, config["fingerprint"], encoder.fingerprint())
    return encoder


def with_bundled(path: Path, overrides: Overrides) -> Overrides:
    """The frozen parts that an exported folder brings along, where no flag names others."""
    found: dict[str, Any] = {
        name: str(path / folder)
        for name, folder in BUNDLED.items()
        if getattr(overrides, name) is None and (path / folder).is_dir()
    }
    return replace(overrides, **found)


def _part(path: Path, name: str, build: Callable[[], PartT]) -> PartT:
    """What `build` makes; an unusable description becomes an error that names the file and the part."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        said = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) and e.args else str(e)
        raise CheckpointError(f'{path}: config["{name}"] cannot be built: {said}.') from e
    except (ConfigError, CheckpointError) as e:
        raise CheckpointError(f"{path}: {e}") from None


def _load_weights(network: nn.Module, read: Checkpoint, path: Path) -> None:
    own = network.state_dict()
    odd = sorted(k for k in own.keys() & read.model.keys() if own[k].shape != read.model[k].shape)
    missing, foreign = sorted(own.keys() - read.model.keys()), sorted(read.model.keys() - own.keys())
    wrong = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", foreign), ("of another shape", odd))
        if names
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: the weights do not fit the model that its config describes: {'; '.join(wrong)}."
        )
    network.load_state_dict(read.model, strict=True)


def load_for(run: RunOptions, checkpoint: str | None, overrides: Overrides) -> VideoModel:
    """`loading.load_model`, and the network cast, offloaded and compiled as asked for.

    With an `offload` everything is read into main memory, and each part is on the device only while it is used.

    Raises:
        UserError: as `loading.load_model`, or a precision or way of offloading that the device does not know.
    """
    device = choose_device(run.device)
    if run.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16: CPUs compute in fp32 or bf16; use --dtype bf16.")
    model = load_model(checkpoint, overrides, device if run.offload == "none" else "cpu")
    if run.dtype != "fp32":
        model.network.to(PRECISIONS[run.dtype])
    if run.offload != "none":
        turns = {"text", "codec", "image"} | ({"network"} if run.offload == "model" else set())
        model = replace(model, run_on=device, turns=frozenset(turns))
    if run.offload == "group":
        model.network.enable_group_offload(  # type: ignore[operator]  # diffusers' ModelMixin
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    if run.compile:
        model.network.compile_repeated_blocks()  # type: ignore[operator]
    return model


_SAMPLED = 1024  # values of each weight that the fingerprint looks at


def fingerprint(model: VideoModel) -> str:
    """A hash of the network's weights (the first values of each), so that another file under the same path is seen."""
    return fingerprint_tensors({k: v.flatten()[:_SAMPLED].float() for k, v in model.network.state_dict().items()})
