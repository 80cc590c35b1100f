"""What training and generation need to know of a pretrained family of video transformers.

Legend: B batch, C latent channels, t h w the latent grid, t' its frames as the network takes them, T H W pixel frames,
height and width, L text tokens, E text width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titans_video.codecs.diffusers import DiffusersCodec
from titans_video.diffusion.base import NoisySample
from titans_video.text.base import TextEncoder
from titans_video.types import CodecSpec


class Process(Protocol):
    """A noise process that has one time a clip."""

    def sample_timesteps(self, seeds: Sequence[int]) -> Tensor: ...
    def timestep_quantile(self, quantile: float) -> float: ...
    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> NoisySample: ...
    def config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PipelineCall:
    """One call of a family's diffusers pipeline, which makes one video.

    Attributes:
        states, negative_states: (1, L, E) of the prompt and of what guidance leans away from, in the VAE's precision,
            which is that of the latents too.
        noise: (1, C, t', h, w).
        image: (1, 3, 1, H, W) in [-1, 1], the first frame; None for a family without.
        seed: of whatever else is drawn.
        on_step: called after each denoising step.
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    noise: Tensor
    states: Tensor
    negative_states: Tensor
    image: Tensor | None = None
    seed: int = 0
    on_step: Any = None


class ModelSpec(ABC):
    """A pretrained pipeline in diffusers' format, known by its folder; nothing large is read before it is asked for.

    Attributes:
        name: for messages.
        folder: of the pipeline.
        config: of its transformer.
        image_to_video: it is told of a first frame, and cannot do without.
        codec_spec: of its VAE's latents.
        clip_grid: latent cells that clips must be multiples of.
        patch_size: latent cells of a token.
        text_length: tokens of every prompt.
        trained: frames, height and width that it was pretrained on.
        fps: frames a second of what it makes.
        steps, guidance_scale: what generation does by default.
        blocks: name of the list of blocks in the transformer.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    image_to_video: bool
    codec_spec: CodecSpec
    clip_grid: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    text_length: int
    trained: tuple[int, int, int]
    fps: float
    steps: int
    guidance_scale: float
    blocks: str

    @property
    def task(self) -> str:
        """What every clip trains."""
        return "i2v" if self.image_to_video else "t2v"

    @abstractmethod
    def check_size(self, frames: int, height: int, width: int) -> None:
        """Refuse clips whose positions the network does not know.

        Raises:
            ConfigError: with the sizes that work.
        """

    @abstractmethod
    def load_network(self, dtype: torch.dtype) -> nn.Module:
        """The pretrained transformer, frozen."""

    @abstractmethod
    def meta_model(self) -> nn.Module:
        """The transformer without weights, on the device `meta`."""

    @abstractmethod
    def tiny_model(self, blocks: Sequence[int] | None) -> nn.Module:
        """A copy of the transformer in float32, for tiny latents.

        Args:
            blocks: the numbers of those that it has, under the names that they have in the whole one; what stands in
                the others' places has no weights, and changes nothing. None: all.
        """

    @abstractmethod
    def codec(self, dtype: str, device: torch.device | str, *, load: bool) -> DiffusersCodec: ...

    @abstractmethod
    def text(self, dtype: str, device: torch.device | str, *, offload: bool = False) -> TextEncoder: ...

    @abstractmethod
    def process(self) -> Process: ...

    @abstractmethod
    def padded_frames(self, t: int) -> int:
        """t' of t latent frames."""

    @abstractmethod
    def pad(self, latents: Tensor) -> Tensor:
        """(B, C, t, h, w) -> (B, C, t', h, w), as the network was trained on clips."""

    @abstractmethod
    def image_latents(self, unscaled: Tensor, frames: int) -> Tensor:
        """What tells of the first frame.

        Args:
            unscaled: (B, C, 1, h, w), as the VAE gives it.
            frames: t'.
        Returns:
            (B, C, t', h, w).
        """

    @abstractmethod
    def predict(
        self, model: nn.Module, noisy: Tensor, time: Tensor, text: Tensor, image: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """One call of the transformer.

        Args:
            model: it, perhaps wrapped.
            noisy, image: (B, C, t', h, w).
            time: (B,) of the noise process.
            text: (B, L, E).
            dtype: of its weights; what it is given is cast.
        Returns:
            (B, C, t', h, w) float32, what the process calls the network's value.
        """

    @abstractmethod
    def pipeline(self, network: nn.Module, vae: Any, *, text: bool, dtype: torch.dtype) -> Any:
        """The diffusers pipeline around a transformer.

        Args:
            text: with the text encoder.
        """

    @abstractmethod
    def encode(self, pipeline: Any, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """(1, L, E) states of two prompts by the pipeline's own text encoder."""

    @abstractmethod
    def run(self, pipeline: Any, call: PipelineCall) -> Tensor:
        """One call of the pipeline: (1, 3, T, H, W) float32 in [-1, 1] on the CPU."""

    @abstractmethod
    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, Any]:
        """The arguments of the transformer that depend on the latent grid (t', h, w)."""

    @abstractmethod
    def tiny_inputs(self, network: nn.Module, seed: int) -> Iterator[Tensor]:
        """Noisy latents, times, states and, for image-to-video, image latents that fit `tiny_model`."""

    @abstractmethod
    def load_with_diffusers(self, network: nn.Module, folder: Path, only: set[str] | None) -> str:
        """Load a LoRA file into a bare transformer by diffusers' own means.

        Args:
            folder: with the file in it.
            only: layers to keep of the file, for a network that has no others.
        Returns:
            The adapter's name.
        """
