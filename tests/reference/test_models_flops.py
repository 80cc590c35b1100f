"""The formulas of `models.flops` against torch's FlopCounterMode, on the meta device, where nothing is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests import factories, toy_models, wan_pipelines
from tests.unit.svd_parts import svd_folder
from titans_video.models import lora
from titans_video.models.flops import sora_flops, svd_flops, titans_flops
from titans_video.models.registry import build_network
from titans_video.models.svd_unet import choose_trainable
from titans_video.models.titans_dit import SegmentRollout
from titans_video.pretrained import base as pretrained
from titans_video.pretrained.base import open_model_spec
from titans_video.recipes.pretrained import training_flops
from titans_video.recipes.svd import unet_config
from titans_video.types import Condition, TextCondition

SIZE: dict[str, Any] = {"in_channels": 4, "time_stride": 4, "model_dim": 48, "depth": 3, "heads": 2}
SHAPES = [((4, 4, 8, 8), 7, 20), ((4, 6, 12, 4), 64, 1), ((4, 2, 4, 20), 1, 130)]
"""Latents, tokens of an encoder's states, bytes."""


def counted(run: Callable[[], object], backward: bool = False) -> int:
    """Count with torch; attention as matrix products, so that its backward pass is not a recomputation."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        value: Any = run()
        if backward:
            value.sum().backward()
    return int(counter.get_total_flops())


def on_meta(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return build_network(config).to("meta")


def text_of(lengths: tuple[int, ...], widths: tuple[int, ...]) -> Condition:
    states = tuple(
        torch.empty(1, n, width, device="meta") if width else torch.empty(1, n, dtype=torch.int64, device="meta")
        for n, width in zip(lengths, widths, strict=True)
    )
    masks = tuple(torch.empty(1, n, dtype=torch.bool, device="meta") for n in lengths)
    return Condition(text=TextCondition(states, masks))


def clip(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.empty(1, *shape, device="meta"), torch.empty(1, shape[1], device="meta")


@pytest.mark.parametrize(("shape", "tokens", "letters"), SHAPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_type": "full"},
        {"adaln": "block", "conv": True, "gated_skip": True, "hold_last": True},
        {"text_widths": (), "patch_size": (1, 2, 4), "mlp_ratio": 2.5, "qk_norm": False},
        {"text_widths": (32, 0, 16), "sine_positions": True, "text_layers": 3},
    ],
)
def test_sora_dit(changes: dict[str, Any], shape: tuple[int, ...], tokens: int, letters: int) -> None:
    network = on_meta({**SIZE, **changes})
    widths = network.config.text_widths
    lengths = tuple(tokens if width else letters for width in widths)
    forward = counted(lambda: network(*clip(shape), text_of(lengths, widths)).value)
    assert sora_flops(network)(shape, lengths) == 3 * forward


def test_the_backward_pass_costs_twice_the_forward_pass() -> None:
    """A little less: nothing is passed back to latents, times and text."""
    network = on_meta({**SIZE, "model_dim": 256, "depth": 12, "text_widths": (32,)})
    both = counted(lambda: network(*clip((4, 4, 16, 16)), text_of((8,), (32,))).value, backward=True)
    assert 1.0 <= sora_flops(network)((4, 4, 16, 16), (8,)) / both < 1.01


def test_a_deep_network_costs_six_flops_a_parameter_and_token() -> None:
    """The usual rule (Kaplan et al. 2020), where attention and text are small beside the matrices."""
    network = on_meta({**SIZE, "model_dim": 512, "depth": 8, "heads": 4, "patch_size": (1, 2, 2), "text_widths": (64,)})
    # Cross-attention's keys and values are made of text tokens, of which there are few.
    matrices = sum(p.numel() for n, p in network.blocks.named_parameters() if p.ndim == 2 and ".kv." not in n)
    assert sora_flops(network)((4, 3, 16, 16), (8,)) == pytest.approx(6 * matrices * 3 * 8 * 8, rel=0.05)


@pytest.mark.parametrize("attention_type", ["st", "full"])
@pytest.mark.parametrize("changes", [{"memory": "tokens"}, {"memory": "neural"}, {"memory": "none"}])
@pytest.mark.parametrize(("segments", "overlap", "horizon"), [(4, 2, 4), (3, 0, 8), (1, 2, 4), (5, 4, 2)])
def test_titans_video_dit(
    changes: dict[str, Any], attention_type: str, segments: int, overlap: int, horizon: int
) -> None:
    """A write without gradients costs only its forward pass."""
    config = {"network": "TitansVideoDiT", **SIZE, "mem_tokens": 5, "attention_type": attention_type, **changes}
    network, shape = on_meta({**config, "patch_size": (2, 2, 2)}), (4, 4 * segments, 8, 12)
    latents, time = clip(shape)
    plan = SegmentRollout(4, latents, time, latents, time, overlap, horizon)
    condition = text_of((20,), (0,))
    forward = counted(lambda: network(latents, time, condition, rollout=plan).value)
    write = counted(lambda: network(*clip((4, 4, 8, 12)), condition, write=True))
    detached = (segments - 1) // horizon
    assert titans_flops(network, 4, overlap, horizon)(shape, (20,)) == 3 * forward - 2 * detached * write


@pytest.mark.parametrize("widths", [(0,), (), (12, 0)])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1, 16, 4), (4, 5, 12, 24)])
def test_svd_unet(widths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    network = on_meta({"network": "SVDUNet", "unet_config": unet_config(str(svd_folder())), "text_widths": widths})
    lengths = (20, 7)[: len(widths)]
    forward = counted(lambda: network(*clip(shape), text_of(lengths, widths)).value)
    assert svd_flops(network)(shape, lengths) == 3 * forward


def test_frozen_layers_have_no_gradients_of_weights() -> None:
    network = on_meta({"network": "SVDUNet", "unet_config": unet_config(str(svd_folder()))})
    choose_trainable(network, "temporal")
    both = counted(lambda: network(*clip((4, 3, 16, 16)), text_of((20,), (0,))).value, backward=True)
    assert svd_flops(network)((4, 3, 16, 16), (20,)) == pytest.approx(both, rel=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def with_adapter(spec: Any, targets: Any, rank: int = 5) -> nn.Module:
    network: nn.Module = spec.meta_model()
    lora.inject(network, lora.LoraConfig(rank, targets=targets))
    return network.to("meta")


def predicted(spec: Any, network: nn.Module, shape: tuple[int, ...]) -> Any:
    value = spec.predict(network, *spec.example(shape, "meta"), torch.float32)
    return value if isinstance(value, Tensor) else sum(part.sum() for part in value.values())


@pytest.mark.parametrize("kind", factories.COGVIDEOX_KINDS)
def test_cogvideox(kind: str, folder: Path) -> None:
    spec = open_model_spec(factories.make_cogvideox(folder / kind, kind))
    network, knows_one_size = spec.meta_model(), kind not in ("2b", "5b")
    for shape in ((4, 2, 4, 4), (4, 6, 4, 4 if knows_one_size else 12)):
        forward = counted(lambda shape=shape: predicted(spec, network, shape))
        assert training_flops(network, spec)(shape, ()) == 3 * forward


@pytest.mark.parametrize("variant", wan_pipelines.WAN_VARIANTS)
def test_wan(variant: str, folder: Path) -> None:
    """One of two experts predicts a clip."""
    spec = open_model_spec(wan_pipelines.make_wan(folder / variant, variant))
    for shape in ((spec.codec_spec.channels, 2, 4, 4), (spec.codec_spec.channels, 3, 6, 4)):
        network = spec.meta_model()
        forward = counted(lambda network=network, shape=shape: predicted(spec, network, shape))
        assert training_flops(network, spec)(shape, ()) == 3 * forward


@pytest.mark.parametrize("name", toy_models.TOYS)
def test_toys(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "MODEL_SPECS", toy_models.REGISTRY)
    spec = open_model_spec(toy_models.make_toy(folder / name, name))
    for shape in ((48, 2, 2, 2), (48, 5, 2, 6)):
        network = spec.meta_model()
        forward = counted(lambda network=network, shape=shape: predicted(spec, network, shape))
        assert training_flops(network, spec)(shape, ()) == 3 * forward


@pytest.mark.parametrize("targets", [("to_q", "to_out.0", "ff"), ".*"])
def test_an_adapter(targets: Any, folder: Path) -> None:
    spec = open_model_spec(factories.make_cogvideox(folder / "adapted", "1.5-i2v"))
    network = with_adapter(spec, targets).requires_grad_(True)
    forward = counted(lambda: predicted(spec, network, (4, 6, 4, 4)))
    assert training_flops(network, spec)((4, 6, 4, 4), ()) == 3 * forward


def test_an_adapter_on_a_frozen_network(folder: Path) -> None:
    """A little more than torch counts: the first block passes nothing back (0.25 % of 16 blocks, 0.1 % of 42)."""
    spec: Any = open_model_spec(factories.make_cogvideox(folder / "wide", "5b"))
    sizes = {"num_attention_heads": 30, "attention_head_dim": 64, "num_layers": 16, "time_embed_dim": 512}
    spec.config = {**spec.config, **sizes}
    network, shape = with_adapter(spec, lora.ATTENTION, rank=64), (4, 13, 60, 90)
    both = counted(lambda: predicted(spec, network, shape), backward=True)
    assert 1.0 <= training_flops(network, spec)(shape, ()) / both < 1.004
