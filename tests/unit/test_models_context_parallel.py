"""Sizes and networks that context parallelism cannot divide; tests/endtoend/test_parallelism.py computes with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import factories
from tests.wan_pipelines import make_wan
from titans_video.errors import ConfigError
from titans_video.models.attention import BACKENDS, set_attention_backend
from titans_video.models.context_parallel import check_plan
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.titans_dit import TitansVideoDiT
from titans_video.pretrained.base import open_model_spec

SIZE: dict[str, Any] = {"in_channels": 4, "patch_size": (1, 2, 2), "model_dim": 48, "depth": 1, "heads": 6}


@pytest.mark.parametrize("kind", [SoraDiT, TitansVideoDiT])
def test_tokens_of_a_frame_are_divided(kind: Any) -> None:
    plan = kind(**SIZE).context_plan()
    check_plan(plan, 6, {"64x96x9": (3, 8, 12)})  # 24 tokens
    with pytest.raises(ConfigError, match=r"5 processes .*6 attention heads. Sizes that do: 2, 3, 6"):
        check_plan(plan, 5, {})
    with pytest.raises(ConfigError, match=r"6 processes .*8 tokens of clips of 32x64x9. .*for these clips: 2"):
        check_plan(plan, 6, {"64x96x9": (3, 8, 12), "32x64x9": (3, 4, 8)})
    with pytest.raises(ConfigError, match="for these clips: none"):
        check_plan(plan, 2, {"2x10x1": (3, 2, 10)})


def test_a_convolution_needs_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="--preset tiny"):
        SoraDiT(**SIZE, conv=True).context_plan()


def test_all_tokens_of_cogvideox_are_divided(tmp_path: Path) -> None:
    spec = open_model_spec(factories.make_cogvideox(tmp_path, "1.5"))
    plan = spec.context_plan(spec.meta_model())
    check_plan(plan, 2, {"48x48x9": (4, 6, 6)})  # 2 x 3 x 3 tokens
    with pytest.raises(ConfigError, match="9 tokens"):
        check_plan(plan, 2, {"48x48x5": (2, 6, 6)})


@pytest.mark.parametrize("first", ["kernel", "exchange"])
@pytest.mark.parametrize("kind", ["SoraDiT", "TitansVideoDiT", "CogVideoX", "Wan"])
def test_shared_attention_uses_the_chosen_kernel(kind: str, first: str, tmp_path: Path) -> None:
    if kind in ("CogVideoX", "Wan"):
        make = make_wan if kind == "Wan" else factories.make_cogvideox
        spec = open_model_spec(make(tmp_path, "i2v-a14b" if kind == "Wan" else "1.5"))
        network = spec.load_network(torch.float32)
        plan = spec.context_plan(network)
    else:
        network = {"SoraDiT": SoraDiT, "TitansVideoDiT": TitansVideoDiT}[kind](**SIZE)
        plan = network.context_plan()
    exchange: Any = SimpleNamespace(size=2, rank=0)
    steps = [lambda: set_attention_backend(network, "math", torch.float32), lambda: plan.attach(exchange)]
    for step in steps if first == "kernel" else steps[::-1]:
        step()
    shared = [m.processor for m in network.modules() if hasattr(getattr(m, "processor", None), "exchange")]
    assert shared
    assert all(x._attention_backend == BACKENDS["math"] for x in shared)
