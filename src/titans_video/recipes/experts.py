"""Two experts, each a network for a part of the training times: which one a step trains, and where the other waits.

An optimizer step trains one expert, on every process. All of its rows draw their times from that expert's part. The
expert is drawn with the probability of its part, so over all steps the times have the distribution of the process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_video.config.recipes import ExpertOptions
from titans_video.diffusion.base import NoiseProcess
from titans_video.errors import ConfigError
from titans_video.pretrained.base import ModelSpec
from titans_video.pretrained.loading import Router
from titans_video.seeding import derive_seed, uniform
from titans_video.training.distributed import Accelerator

HIGH, LOW = "high", "low"
"""The names in `ModelSpec.experts`: for much noise, and for little."""
HALVINGS = 60  # of the interval that contains a quantile
EDGE = 1e-9  # the ends of (0, 1), where times have no value


@dataclass(frozen=True)
class ExpertSchedule:
    """Which expert each optimizer step trains, a function of the run's seed and the step.

    Attributes:
        trained: the experts that are trained, of `HIGH` and `LOW`.
        split: the quantile of the training times from which the expert for much noise predicts.
        seed: of the run.
        steps: consecutive steps that train the same expert.
    """

    trained: tuple[str, ...]
    split: float
    seed: int = 0
    steps: int = 1

    def at_step(self, step: int) -> str:
        """Return the expert that an optimizer step trains."""
        if not self.is_mixed:
            return self.trained[0]
        draw = uniform(derive_seed(self.seed, "expert", step // self.steps))
        return HIGH if draw < 1 - self.split else LOW

    def part(self, expert: str) -> tuple[float, float]:
        """Return the first quantile of an expert's times, and the end."""
        return (self.split, 1.0) if expert == HIGH else (0.0, self.split)

    @property
    def is_mixed(self) -> bool:
        """Whether steps train different experts."""
        return len(self.trained) > 1

    def note(self, name: str) -> str:
        """Return a line for the log about the experts of the model `name`."""
        shares = {HIGH: 1 - self.split, LOW: self.split}
        if self.is_mixed:
            parts = " and ".join(f"{expert} in {100 * share:.0f} %" for expert, share in shares.items())
            return f"{name} has two experts; a step trains one of them: {parts} of the steps."
        (expert,) = self.trained
        return (
            f"Only the {expert}-noise expert of {name} is trained, on its own {100 * shares[expert]:.0f} % of the "
            "times; the other one stays as it is."
        )

    def place(self, quantile: float) -> tuple[str, float]:
        """Return the expert at a quantile of the times that are trained, and the quantile among all times."""
        if not self.is_mixed:
            low, high = self.part(self.trained[0])
            return self.trained[0], low + quantile * (high - low)
        return HIGH if quantile >= self.split else LOW, quantile

    def sample_timesteps(self, process: NoiseProcess, seeds: Sequence[int], tokens: int, step: int) -> Tensor:
        """Return (B,) times in the part of the step's expert, each a function of its clip's seed."""
        low, high = self.part(self.at_step(step))
        quantiles = [low + uniform(seed, "time") * (high - low) for seed in seeds]
        return torch.tensor([process.timestep_quantile(min(max(q, EDGE), 1 - EDGE), tokens) for q in quantiles])


def expert_schedule(options: ExpertOptions, spec: ModelSpec, process: NoiseProcess, seed: int) -> ExpertSchedule | None:
    """Return which expert each step trains; None for a model with one network.

    Raises ConfigError for options of experts that the model does not have.
    """
    if spec.boundary is None:
        if options != ExpertOptions():
            raise ConfigError(
                f"--experts, --expert-steps and --idle-expert: {spec.name} has one network; leave them out."
            )
        return None
    trained = spec.experts if options.experts == "both" else (options.experts,)
    return ExpertSchedule(trained, quantile_of(process, spec.boundary), seed, options.expert_steps)


def with_all_experts(network: nn.Module, spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """Return the network with the pretrained experts that a run does not train, for videos.

    They are read every time, to the device; after `keep_idle_on_cpu` only once, and then wait in main memory.
    """
    parts, idle = spec.networks(network), getattr(network, "idle", None)
    missing = [name for name in spec.experts if name not in parts]
    if not missing:
        return network
    if isinstance(idle, IdleExpert) and idle.networks:
        parts = idle.networks
    else:
        others = spec.load_network(dtype, missing)
        parts |= spec.networks(others)
        if isinstance(idle, IdleExpert):
            idle.keep(parts)
        else:
            others.to(next(network.parameters()).device)
    return Router({part: parts[name] for name, part in spec.network_parts.items()})


def quantile_of(process: NoiseProcess, time: float) -> float:
    """Return the share of training times below `time`, for a process whose times do not depend on a clip's tokens."""
    low, high = EDGE, 1 - EDGE
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if process.timestep_quantile(middle, 1) < time:
            low = middle
        else:
            high = middle
    return high


class IdleExpert:
    """Keep the frozen weights of the expert that does not run in main memory.

    Its weights are fetched when it is called, and those of the other one are dropped: frozen weights never change, so
    the copies in main memory stay valid.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.active: str | None = None
        self.networks: dict[str, nn.Module] = {}

    def keep(self, networks: dict[str, nn.Module]) -> None:
        """Move the frozen weights of all experts to main memory, and fetch those of each one from now on."""
        self.networks = networks
        self._kept = {name: [self._keep(p) for p in _frozen(network)] for name, network in networks.items()}
        for name, network in networks.items():
            for tensor in [*network.buffers(), *(p for p in network.parameters() if p.requires_grad)]:
                tensor.data = tensor.data.to(self.device)
            network.register_forward_pre_hook(lambda *_, name=name: self.bring(name))

    def bring(self, name: str) -> None:
        """Move an expert to the device, and drop the other one from it."""
        if name == self.active:
            return
        for other, kept in self._kept.items():
            if other != name:
                for parameter, copy in kept:
                    parameter.data = copy
        for parameter, copy in self._kept[name]:
            parameter.data = copy.to(self.device, non_blocking=True, copy=True)
        self.active = name

    def _keep(self, parameter: nn.Parameter) -> tuple[nn.Parameter, Tensor]:
        copy = parameter.data.to("cpu")
        parameter.data = copy.pin_memory() if self.device.type == "cuda" else copy
        return parameter, parameter.data


def keep_idle_on_cpu(network: nn.Module, spec: ModelSpec, accelerator: Accelerator) -> None:
    """Let the idle expert of a network wait in main memory; raise ConfigError for sharded weights.

    If one is trained, the other is idle except in videos; see `with_all_experts`.
    """
    if accelerator.is_fsdp2:
        raise ConfigError("--idle-expert cpu moves weights, and so does FSDP2; use one of them.")
    idle, networks = IdleExpert(accelerator.device), spec.networks(network)
    network.idle = idle  # type: ignore[assignment]  # read by `with_all_experts`
    if len(networks) > 1:
        idle.keep(networks)
        network.offloaded = True  # type: ignore[assignment]  # read by `training.distributed.prepare`


def _frozen(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if not p.requires_grad]
