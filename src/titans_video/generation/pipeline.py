"""Text to video: noise in the codec's latents, denoised under a condition, decoded.

Legend: B videos of one batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, k known
frames, S pixel frames of one latent frame.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_video.diffusion.flow import count_tokens
from titans_video.diffusion.guidance import Predict, guided
from titans_video.diffusion.samplers import sampler_by_name
from titans_video.errors import ConfigError
from titans_video.generation.loading import VideoModel
from titans_video.models.conditioning import fold_known_mask
from titans_video.seeding import derive, keyed_normal
from titans_video.types import CodecSpec, Condition, TextCondition


@dataclass(frozen=True)
class Request:
    """What to make: B videos of one size.

    Attributes:
        prompts: B prompts.
        frames, height, width: of each video, exactly.
        seeds: B seeds; a video's noise depends on its own seed alone.
        steps: denoising steps.
        guidance_scale: 1: none.
        guidance_interval: (lo, hi) times between which guidance acts; None: all.
        sampler: a name of `diffusion.samplers`.
        negative_prompt: what guidance leans away from.
        known: (B, 3, k, H, W) in [-1, 1], the first k frames of each video; None: nothing is known.
    """

    prompts: list[str]
    frames: int
    height: int
    width: int
    seeds: list[int]
    steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "euler"
    negative_prompt: str = ""
    known: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How a request is met: frames that are made (some may be cut), the latents' shape (C, t, h, w), tokens of a video,
    and what the person should be told."""

    frames: int
    latent_shape: tuple[int, int, int, int]
    tokens: int
    notes: list[str] = field(default_factory=list)


def plan(model: VideoModel, request: Request) -> Plan:
    """Check a request against the codec, the network's patch and the length trained on.

    Raises:
        ConfigError: a size off the grid, more frames than the model was trained on, or lists that do not match.
    """
    _check_lists(request)
    spec, patch = model.codec.spec, model.patch_size
    for name, size, axis in (("height", request.height, 1), ("width", request.width, 2)):
        _check_size(name, size, spec.stride[axis] * patch[axis], spec)
    longest = model.trained("num_frames")
    if request.frames < 1:
        raise ConfigError(f"{request.frames} frames were asked for; at least 1 is needed.")
    if longest is not None and request.frames > longest:
        raise ConfigError(
            f"{request.frames} frames were asked for, but the model was trained on clips of {longest} frames and makes "
            f"at most that many at once. Use --num-frames {longest} or less."
        )
    notes = []
    frames = spec.frames_at_least(request.frames, patch[0])
    if frames != request.frames:
        notes.append(f"Codec and patch make {frames} frames together; they are cut to the {request.frames} asked for.")
    trained = model.trained("height"), model.trained("width")
    if None not in trained and trained != (request.height, request.width):
        notes.append(
            f"The model was trained at {trained[0]}x{trained[1]}; {request.height}x{request.width} may look worse."
        )
    if request.negative_prompt and request.guidance_scale == 1.0:
        notes.append("The negative prompt does nothing at a guidance scale of 1.")
    shape = spec.latent_shape(frames, request.height, request.width)
    return Plan(frames, shape, count_tokens(shape[1:], patch), notes)


def generate(model: VideoModel, request: Request, progress: bool = True) -> Tensor:
    """Make the videos of a request, all in one batch.

    Args:
        model: its weights are used as they are; its training mode is given back.
        request: what to make.
        progress: show a bar and what the plan has to say, on stderr.
    Returns:
        (B, 3, T, H, W) float32 in [-1, 1] on the CPU, T exactly `request.frames`; known frames as they were given.
    Raises:
        ConfigError: as `plan`.
    """
    made = plan(model, request)
    if progress:
        for note in made.notes:
            tqdm.write(note, file=sys.stderr)
    # Not inference_mode: a table that the network caches on the way must still serve training afterwards.
    with torch.no_grad(), _evaluating(model.network):
        condition = _condition(model, request, made)
        negative = _negative_text(model, request) if request.guidance_scale != 1.0 else None
        denoise = guided(_predictor(model), condition, negative, request.guidance_scale, request.guidance_interval)
        noise = keyed_normal(made.latent_shape, [derive(seed, "noise") for seed in request.seeds]).to(model.device)
        schedule = model.process.schedule(request.steps, made.tokens)
        with tqdm(total=request.steps, desc="denoising", unit="step", file=sys.stderr, disable=not progress) as bar:
            latents = sampler_by_name(request.sampler)(denoise, noise, schedule, lambda _: bar.update())
        video = model.codec.decode(latents, made.frames).float().clamp(-1, 1).cpu()
    video = video[:, :, : request.frames].clone()
    if request.known is not None:
        video[:, :, : request.known.shape[2]] = request.known.to(video)
    return video


def _predictor(model: VideoModel) -> Predict:
    """x0 of the network, with latent frames that are wholly known held clean, at time 0."""

    def predict(x_t: Tensor, time: float, condition: Condition) -> Tensor:
        held = condition.wholly_known()  # (B, t)
        times = torch.full((x_t.shape[0],), time, device=x_t.device, dtype=x_t.dtype)
        if held is None or condition.known is None:
            value = model.network(model.process.model_input(x_t, times), times, condition).value
            return model.process.to_x0(value, x_t, times)
        keep = held[:, None, :, None, None]
        x_t = torch.where(keep, condition.known, x_t)
        times = times[:, None].masked_fill(held, 0.0)
        value = model.network(model.process.model_input(x_t, times), times, condition).value
        return torch.where(keep, condition.known, model.process.to_x0(value, x_t, times))

    return predict


def _condition(model: VideoModel, request: Request, made: Plan) -> Condition:
    text = model.text(request.prompts).to(model.device)
    if request.known is None:
        return Condition(text=text)
    b, k = len(request.prompts), request.known.shape[2]
    pixels = torch.zeros(b, 3, made.frames, request.height, request.width, device=model.device)
    pixels[:, :, :k] = request.known.to(pixels)
    given = (torch.arange(made.frames, device=model.device) < k).expand(b, made.frames)
    mask = fold_known_mask(given, model.codec.spec)
    return Condition(text=text, known=model.codec.encode(pixels).to(model.device, torch.float32), known_mask=mask)


def _negative_text(model: VideoModel, request: Request) -> TextCondition:
    """The negative prompt, encoded once, for every row. The empty one is what caption dropout trained."""
    text = model.text([request.negative_prompt]) if request.negative_prompt else model.text.empty(1)
    rows = len(request.prompts)

    def repeat(x: Tensor) -> Tensor:
        return x.expand(rows, *x.shape[1:])

    return TextCondition(tuple(map(repeat, text.streams)), tuple(map(repeat, text.masks))).to(model.device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _check_lists(request: Request) -> None:
    rows = len(request.prompts)
    if rows < 1 or len(request.seeds) != rows:
        raise ConfigError(f"{rows} prompts and {len(request.seeds)} seeds: there must be as many, and at least one.")
    if request.known is None:
        return
    shape = tuple(request.known.shape)
    if len(shape) != 5 or (shape[0], shape[1], *shape[3:]) != (rows, 3, request.height, request.width):
        raise ConfigError(
            f"known frames of shape {shape} do not go with {rows} videos of {request.height}x{request.width}."
        )
    if not 1 <= shape[2] < request.frames:
        raise ConfigError(f"{shape[2]} of {request.frames} frames are given: at least 1, and at least 1 left to make.")


def _check_size(name: str, size: int, step: int, spec: CodecSpec) -> None:
    if size >= step and size % step == 0:
        return
    below = size // step * step
    near = f"{below} and {below + step}" if below > 0 else f"{step}"
    raise ConfigError(
        f"--{name} {size}: the codec {spec.name} and the model's patch need multiples of {step}; "
        f"the nearest legal: {near}."
    )
