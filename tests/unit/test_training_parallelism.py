"""The launcher's requests for parallelism: every one that would not happen stops the run."""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.unit.svd_parts import svd_model
from titans_video.config.options import ModelOptions, TrainOptions
from titans_video.config.recipes import BaseOptions, SoraOptions
from titans_video.data.buckets import Bucket
from titans_video.errors import ConfigError
from titans_video.models.sora_dit import SoraDiT
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe
from titans_video.recipes.frozen_base import precision_of
from titans_video.recipes.setup import share_clips
from titans_video.training import distributed
from titans_video.training.parallelism import DataGroup, Parallelism, data_group, refuse_other_engines
from titans_video.types import CodecSpec

USE = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def sizes(**given: int | str) -> dict[str, str]:
    return {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(value) for name, value in given.items()}


def ask(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], world: int) -> Parallelism | None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Parallelism.requested(world)


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, {}, 4) is None
    assert ask(monkeypatch, sizes(dp_shard=1, tp=1, sp=1), 4) is None
    assert ask(monkeypatch, {**USE, **FSDP2, **sizes(dp_shard=4)}, 4) == Parallelism(4)
    assert data_group(Engine(5, 8)) == DataGroup(5, 8, 1, True)
    assert ask(monkeypatch, {**USE, **FSDP2, **sizes(dp_shard=4, dp_replicate=2)}, 8) == Parallelism(4, 2)


def test_every_unsupported_size_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """No combination of sizes other than those of FSDP2, HSDP and context parallelism gets through."""
    names = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    allowed = {
        (1, 1, 1, 1, 1): Parallelism(1),
        (1, 2, 1, 1, 1): Parallelism(2),
        (2, 2, 1, 1, 1): Parallelism(2, 2),
        (1, 1, 1, 2, 1): Parallelism(1, 1, 2),
        (1, 2, 1, 2, 1): Parallelism(2, 1, 2),
        (2, 1, 1, 2, 1): Parallelism(1, 2, 2),
        (2, 2, 1, 2, 1): Parallelism(2, 2, 2),
    }
    for values in itertools.product((1, 2), repeat=len(names)):
        environment = {**USE, **FSDP2, **sizes(**dict(zip(names, values, strict=True)))}
        if values in allowed:
            assert ask(monkeypatch, environment, math.prod(values)) == allowed[values]
            continue
        with pytest.raises(ConfigError):
            ask(monkeypatch, environment, math.prod(values))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**USE, **FSDP2, **sizes(tp=2)}, r"tensor parallelism \(parallelism_config_tp_size: 2\)"),
        ({**USE, **FSDP2, **sizes(sp=4)}, "DeepSpeed's sequence parallelism"),
        ({**USE, **FSDP2, **sizes(dp_shard=2)}, "multiply to 2, but 4 processes are running"),
        ({**USE, **FSDP2, **sizes(dp_replicate=4)}, "4 copies of the weights that are not sharded"),
        ({**USE, **sizes(dp_shard=4)}, "a parallelism_config without FSDP2"),
        ({**FSDP2, **sizes(tp=2)}, "ignores it without ACCELERATE_USE_PARALLELISM_CONFIG=true"),
        ({**USE, **FSDP2, **sizes(dp_shard="none")}, "PARALLELISM_CONFIG_DP_SHARD_SIZE=none must be an integer"),
        ({**USE, **FSDP2, **sizes(dp_shard=0)}, "must be an integer of at least 1"),
    ],
)
def test_the_message_names_the_fix(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(monkeypatch, environment, 4)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "accelerate to-fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
    ],
)
def test_other_engines_are_rejected(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        refuse_other_engines()


def test_an_older_torch_shards_no_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    engine: Any = SimpleNamespace(is_fsdp2=True, mixed_precision="no", num_processes=2, device=torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"--quantize nf4 with FSDP2 needs torch 2\.13 or newer, and this is torch 2\.11"
    ):
        precision_of(BaseOptions(quantize="nf4"), engine)
    assert precision_of(BaseOptions(), engine) == torch.float32
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    assert precision_of(BaseOptions(quantize="nf4"), engine) == torch.float32


def test_every_process_reads_its_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # transformers obeys it
    distributed.start(TrainOptions())
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@dataclass
class Engine:
    process_index: int
    num_processes: int


def test_groups_read_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, {**USE, **FSDP2, **sizes(cp=4, dp_shard=2)}, 8)
    groups = [data_group(Engine(rank, 8)) for rank in range(8)]
    assert [group.index for group in groups] == [0] * 4 + [1] * 4
    assert [group.is_first for group in groups] == [True, False, False, False] * 2
    assert {(group.count, group.size) for group in groups} == {(2, 4)}


def test_a_group_with_other_rows_is_noticed() -> None:
    groups = [DataGroup(rank // 2, 2, 2, rank % 2 == 0) for rank in range(4)]
    rows = [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert sum(group.checksum(seeds) for group, seeds in zip(groups, rows, strict=True)) == 0
    rows[3] = [3, 5]
    assert sum(group.checksum(seeds) for group, seeds in zip(groups, rows, strict=True)) != 0
    assert DataGroup(1, 4, 1, True).checksum([1, 2]) == 0


@pytest.mark.parametrize("changes", [{"compile": "on"}, {"fp8_linear": True}])
def test_options_that_were_not_tested_with_shared_clips(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    ask(monkeypatch, {**USE, **FSDP2, **sizes(cp=2)}, 2)
    with pytest.raises(ConfigError, match="was not tested with context parallelism"):
        share_clips(SoraOptions(model=ModelOptions(**changes)), *[None] * 3)  # type: ignore[arg-type]


class Recipe:
    """The parts of a recipe that say how its network divides the tokens of clips."""

    geometry = ClipGeometry(CodecSpec("wan", 4, (4, 8, 8), "causal"), (1, 2, 2))
    context_plan = DiffusionRecipe.context_plan

    def __init__(self, network: Any) -> None:
        self.network = network


SIZE: dict[str, Any] = {"in_channels": 4, "patch_size": (1, 2, 2), "model_dim": 48, "depth": 1, "heads": 6}


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda: SoraDiT(**SIZE), r"3 processes .*8 tokens of clips of 32x64x9\. .*for these clips: 2\."),
        (lambda: SoraDiT(**SIZE, conv=True), "does not support convolutions"),
        (lambda: svd_model().network, "SVDUNet does not support context parallelism"),
    ],
)
def test_networks_and_sizes_that_cannot_be_shared(
    monkeypatch: pytest.MonkeyPatch, network: Callable[[], Any], said: str
) -> None:
    """The size that does not fit is one of held-out clips."""
    ask(monkeypatch, {**USE, **FSDP2, **sizes(cp=3)}, 3)
    trained, held_out = (SimpleNamespace(buckets=[Bucket(9, *size)]) for size in ((96, 64), (32, 64)))
    parts: Any = SimpleNamespace(data=trained, held_out=held_out)
    with pytest.raises(ConfigError, match=said):
        share_clips(SoraOptions(), Recipe(network()), parts, None)  # type: ignore[arg-type]
