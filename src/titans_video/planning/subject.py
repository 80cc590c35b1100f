"""The network of a run and its frozen encoders, built on `meta` from the options and from configuration files only.

Legend: B clips, C latent channels, T H W pixel frames, height and width, t h w the latent grid, S pixel frames of a
latent frame, L text tokens, M memory tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.codecs.base import Codec, build_codec
from titans_video.codecs.diffusers import DiffusersCodec, meta_vae
from titans_video.codecs.image_encoder import FrozenEncoder
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.diffusion.base import NoisySample, Prepared, count_tokens
from titans_video.errors import ConfigError, TextError
from titans_video.hub import built
from titans_video.models.activations import blocks_of
from titans_video.planning.simulation import Run
from titans_video.recipes.base import ClipGeometry, Grid, squared_error
from titans_video.recipes.codec import codec_spec
from titans_video.text.base import TextEncoder, build_text
from titans_video.types import CodecSpec, Condition, TextCondition

IMAGE_ENCODER = "image encoder"
NEEDS_CONFIG = (
    "A plan reads configuration files only. Download them without the weights: `hf download NAME --include '*.json' "
    "--local-dir DIR`, and give this folder."
)


@dataclass(frozen=True)
class Clip:
    """A micro-batch of one process: its clips' size in pixels, their number, and the tokens of each text stream."""

    frames: int
    height: int
    width: int
    rows: int
    lengths: tuple[int, ...] = ()
    has_given_frames: bool = False

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


@dataclass(frozen=True)
class Encoder:
    """A frozen part that encodes clips or captions: its parameters and their bytes, and whether it is on the CPU."""

    name: str
    parameters: int
    size: int
    on_cpu: bool = False


@dataclass(frozen=True)
class Subject:
    """The parts of a run whose memory and work are planned.

    Attributes:
        recipe: words of the command, e.g. `train lora`.
        name: of the network.
        network: on `meta`, with the precision and the trained parameters of the run.
        stacks: names of its lists of equal blocks, which are called one after the other.
        spec, clip_grid: of the codec; latent cells that clips are multiples of.
        step: returns a function that makes the inputs for a clip, calls the network and returns the loss.
        tokens: of one clip.
        flops: of one clip in training; None: there is no formula for this network.
        codec: without weights; None for a codec that is fitted to the clips, or that is trained.
        widths: of the text streams.
        is_adapter: checkpoints have only the trained weights.
        experts: names of the networks of which each step trains one.
        unknown: parts whose memory cannot be planned.
    """

    recipe: str
    name: str
    network: nn.Module
    stacks: tuple[str, ...]
    spec: CodecSpec
    clip_grid: Grid
    step: Callable[[Clip], Run]
    tokens: Callable[[Clip], int]
    flops: Callable[[Clip], float] | None
    codec: Codec | None = None
    encoders: tuple[Encoder, ...] = ()
    widths: tuple[int, ...] = ()
    is_adapter: bool = False
    experts: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def has_blocks(self) -> bool:
        """Whether the network has blocks whose activations can be recomputed or moved."""
        return any(True for _ in blocks_of(self.network))


def size_of(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in [*network.parameters(), *network.buffers()])


def open_text(options: TextOptions, *, needed: bool = True) -> TextEncoder:
    """Return the encoders without weights; ConfigError if a configuration is not on this machine."""
    try:
        return build_text(replace(options.with_length(), local_files_only=True), load=False, needed=needed)
    except TextError as e:
        raise ConfigError(f"{e} {NEEDS_CONFIG}") from None


def open_codec(options: CodecOptions) -> tuple[Codec | None, CodecSpec]:
    """Return the codec without weights, None if it is fitted to the clips, and its shapes."""
    if options.vae_backend == "patch":
        return None, codec_spec(options)
    codec = build_codec(options, load=False)
    return codec, codec.spec


def encoders_of(
    codec: Codec | None, text: TextEncoder, image: FrozenEncoder | None, dtype: torch.dtype
) -> tuple[tuple[Encoder, ...], tuple[str, ...]]:
    """Return the frozen encoders of a run, and the names of those whose size is unknown. The VAE is in `dtype`."""
    found, unknown = [], []
    if isinstance(codec, DiffusersCodec):
        vae = None if codec.folder is None else meta_vae(codec.folder, dtype)
        if vae is None:
            unknown.append("the VAE, whose configuration lacks the scale of its latents")
        else:
            found.append(_encoder("VAE", nn.Module.to(vae, dtype)))  # that of diffusers warns
    elif codec is not None and codec.spec.name not in ("identity", "patch"):
        unknown.append("the codec of --vae-module")
    for stream in text.streams:
        if stream.width:
            name = type(model := stream.meta_model()).__name__  # type: ignore[attr-defined]  # a PretrainedStream
            found.append(_encoder(name, model, on_cpu=text.options.text_offload == "cpu"))
    if image is not None:
        with torch.device("meta"):
            found.append(_encoder(IMAGE_ENCODER, nn.Module.to(built(image._kind(), image.folder), image.dtype)))
    return tuple(found), tuple(unknown)


def _encoder(name: str, network: nn.Module, *, on_cpu: bool = False) -> Encoder:
    return Encoder(name, sum(p.numel() for p in network.parameters()), size_of(network), on_cpu)


def text_condition(clip: Clip, widths: tuple[int, ...]) -> TextCondition | None:
    """Return empty text of a clip's lengths; with one clip without padding, otherwise with it."""
    if not widths:
        return None
    B = clip.rows
    streams = tuple(
        torch.empty(B, n, width) if width else torch.empty(B, n, dtype=torch.int64)
        for n, width in zip(clip.lengths, widths, strict=True)
    )
    masks = tuple(torch.empty(B, n, dtype=torch.bool) for n in clip.lengths)
    return TextCondition(streams, masks, tuple((n,) for n in clip.lengths) if B == 1 else None)


def network_step(
    geometry: ClipGeometry,
    widths: tuple[int, ...],
    *,
    clean: bool = True,
    image: Callable[[Clip], Any] | None = None,
    further: Callable[[NoisySample], Mapping[str, Any]] = lambda noisy: {},
) -> Callable[[Clip], Run]:
    """Return the `step` of a network of this project.

    Args:
        clean: given frames are further inputs, and have no loss.
        image: makes an image condition.
        further: makes more arguments of the network.
    """

    def step(clip: Clip) -> Run:
        shape = latent_shape(geometry, clip)

        def run(network: nn.Module) -> Tensor:
            B, t = clip.rows, shape[1]
            noisy, prepared = noisy_sample(B, shape)
            given = torch.empty(B, *shape) if clean and clip.has_given_frames else None
            mask = None if given is None else torch.empty(B, geometry.codec.stride[0], t, dtype=torch.bool)
            condition = Condition(
                text=text_condition(clip, widths),
                cond_latents=given,
                cond_mask=mask,
                image=None if image is None else image(clip),
            )
            value: Tensor = network(noisy.model_input, noisy.timesteps, condition, **further(noisy)).value
            return squared_error(value.float(), noisy, prepared).flatten(1).sum(dim=1).sum()

        return with_batch(run, clip, shape)

    return step


def noisy_sample(rows: int, shape: tuple[int, ...]) -> tuple[NoisySample, Prepared]:
    """Return the latents of a step without values."""
    clean, noisy, target = (torch.empty(rows, *shape) for _ in range(3))
    times = torch.empty(rows, shape[1])
    sample = NoisySample(noisy, times, target, torch.empty(()))
    return sample, Prepared(clean, times, Condition(), 1)


def with_batch(run: Run, clip: Clip, shape: tuple[int, ...]) -> Run:
    """Let the tensors of a batch, with the noise that was drawn for it, exist during the whole step."""

    def with_tensors(network: nn.Module) -> Tensor:
        network.batch = [torch.empty(clip.rows, *shape) for _ in range(4)]  # type: ignore[assignment]
        return run(network)

    return with_tensors


def latent_shape(geometry: ClipGeometry, clip: Clip) -> tuple[int, int, int, int]:
    """Return (C, t, h, w) of whole clips."""
    return geometry.codec.channels, *geometry.grid(clip.frames, clip.height, clip.width)


def tokens_of(geometry: ClipGeometry, clip: Clip) -> int:
    return count_tokens(latent_shape(geometry, clip)[1:], geometry.patch_size)
