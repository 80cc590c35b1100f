"""Change what the parts of a pretrained pipeline do in its calls: its networks, and its scheduler.

Legend: B videos, C latent channels, t h w the latent grid, N tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.diffusion.samplers import Solving, sampler_by_name
from titans_video.generation.long_video import window_weights
from titans_video.pretrained.base import ModelSpec


@contextmanager
def cast_inputs(networks: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Cast the networks' input tensors to their precision, except timesteps and what is inside tuples (positions)."""

    def casting(whole: Callable[..., Any]) -> Callable[..., Any]:
        def cast(name: str, value: Any) -> Any:
            is_input = isinstance(value, Tensor) and value.is_floating_point() and name != "timestep"
            return value.to(dtype) if is_input else value

        def forward(*given: Any, **named: Any) -> Any:
            return whole(*(cast("", value) for value in given), **{name: cast(name, named[name]) for name in named})

        return forward

    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(_replaced(network, "forward", casting(network.forward)))
        yield


@contextmanager
def windowed(spec: ModelSpec, networks: Sequence[Any], starts: Sequence[int], length: int) -> Iterator[None]:
    """Within the block, call the networks on windows and average their predictions on shared frames.

    `starts` are the first latent frames of the windows, rising; `length` is t of a window. A scheduler's step is
    affine in the prediction, so this is MultiDiffusion (Bar-Tal et al. 2023, equation 5, along time).
    """
    assert spec.time_axis is not None, "packed tokens cannot be cut into windows"
    with ExitStack() as stack:
        for network in networks:
            windows = _Windows(spec, network, starts, length, spec.time_axis)
            stack.enter_context(_replaced(network, "forward", windows.forward))
            stack.enter_context(_replaced(network, "cache_context", windows.cache_context))
        yield


@contextmanager
def _replaced(network: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Replace a method of one object within the block."""
    own = network.__dict__.get(name)
    setattr(network, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(network, name)
        else:
            setattr(network, name, own)


class _Windows:
    """The methods of one network that `windowed` replaces."""

    def __init__(self, spec: ModelSpec, network: Any, starts: Sequence[int], length: int, axis: int) -> None:
        self.spec, self.starts, self.length, self.axis = spec, starts, length, axis
        self.weights = window_weights(starts, length)
        self.whole, self.enter = network.forward, network.cache_context
        self.context: tuple[str, dict[str, Any]] = "", {}

    @contextmanager
    def cache_context(self, name: str, **named: Any) -> Iterator[None]:
        """Remember the pipeline's context; each window has one of its own in it, with its own step cache."""
        self.context = name, named
        with self.enter(name, **named):
            yield

    def forward(self, *, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True, **others: Any) -> Any:
        frames, (height, width) = hidden_states.shape[self.axis], hidden_states.shape[3:]
        own = self.spec.positions(self.length, height, width, hidden_states.device)
        name, named = self.context
        mean: Tensor | None = None
        for start, weight in zip(self.starts, self.weights, strict=True):
            part = hidden_states.narrow(self.axis, start, self.length)
            time = timestep if timestep.ndim == 1 else self._times(timestep, frames, start)
            arguments = {**others, **own, "hidden_states": part, "timestep": time, "return_dict": False}
            with self.enter(f"{name} {start}", **named):
                (value,) = self.whole(**arguments)
            if mean is None:
                shape = (*value.shape[: self.axis], frames, *value.shape[self.axis + 1 :])
                mean = torch.zeros(shape, device=value.device)
            column = weight.to(value.device).view(-1, *[1] * (value.ndim - self.axis - 1))
            mean.narrow(self.axis, start, self.length).add_(column * value.float())
        assert mean is not None  # there is at least one window
        return (mean.to(hidden_states.dtype),)

    def _times(self, timestep: Tensor, frames: int, start: int) -> Tensor:
        """Return a window's part of (B, N) times, one for each token."""
        tokens = timestep.shape[1] // (frames // self.spec.patch_size[0])  # of a frame of the network
        first, count = (n // self.spec.patch_size[0] * tokens for n in (start, self.length))
        return timestep[:, first : first + count]


def shift_key(scheduler: Any) -> str | None:
    """Return the setting of a scheduler that is the time shift of a rectified flow; None if it has none."""
    config = scheduler.config
    if config.get("use_dynamic_shifting") or config.get("invert_sigmas"):
        return None
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "shift"
    flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    return "flow_shift" if flow else None


def with_flow_shift(scheduler: Any, shift: float) -> Any:
    """Return a copy of a scheduler with another time shift; it must have a `shift_key`."""
    key = shift_key(scheduler)
    assert key is not None, "the caller checked the flag"
    return type(scheduler).from_config(scheduler.config, **{key: shift})


@contextmanager
def solved_by(pipeline: Any, sampler: str, on_step: Callable[[int], object]) -> Iterator[None]:
    """Within the block, let one of our samplers take the steps of a pipeline, at the times of its own scheduler.

    `on_step` is called with the number of steps done. Raises ConfigError for an unknown sampler.
    """
    own = pipeline.scheduler
    pipeline.scheduler = SolverScheduler(own, sampler, on_step)
    try:
        yield
    finally:
        pipeline.scheduler = own


class SolverScheduler:
    """One of our samplers in the form of a diffusers scheduler, for a network that predicts noise - x0.

    The pipeline asks the network, as always; each `step` sends what the network said to the solver, and returns the
    state at which the solver needs the next prediction.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, own: Any, sampler: str, on_step: Callable[[int], object]) -> None:
        self.own, self.config = own, own.config
        self.sampler, self.on_step = sampler_by_name(sampler), on_step
        self.solving: Solving | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **others: Any) -> None:
        self.own.set_timesteps(num_inference_steps, device=device, **others)
        self.schedule = self.own.sigmas.double().cpu()  # (steps + 1,), of which the last is 0
        # A run on nothing tells how often, and when, the solver needs a prediction.
        times, zero = [], torch.zeros(())
        dry = self.sampler.solve(zero, self.schedule, lambda done, x, time: x)
        try:
            _, time = next(dry)
            while True:
                times.append(time)
                _, time = dry.send(zero)
        except StopIteration:
            self.sigmas = torch.tensor([*times, float(self.schedule[-1])], dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self.solving = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at the first time; pipelines call this with 0."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the next state, (B, C, t, h, w) float32, from a prediction at `sample`."""
        if self.solving is None:
            self.solving = self.sampler.solve(sample.float(), self.schedule, self._after_step)
            self.at = next(self.solving)
        x, time = self.at
        try:
            self.at = self.solving.send(x - time * model_output.float())
        except StopIteration as end:
            return (end.value,)
        return (self.at[0],)

    def _after_step(self, done: int, x: Tensor, time: float) -> Tensor:
        self.on_step(done)
        return x
