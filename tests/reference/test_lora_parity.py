"""The parity gate on every variant of Wan: each format, kind of adapter and expert, and files that are wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.test_lora_formats import LOKR_LOADS, with_adapter
from tests.wan_pipelines import WAN_VARIANTS, make_wan
from titans_video.errors import CheckpointError
from titans_video.models import lora, lora_formats, lora_io
from titans_video.models.lora_formats import FORMATS, names_of
from titans_video.pretrained.base import ModelSpec, open_model_spec
from titans_video.recipes import lora_parity
from titans_video.recipes.lora_parity import check_parity

pytest.importorskip("peft")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    root = tmp_path_factory.mktemp("wan")
    return {variant: open_model_spec(make_wan(root / variant, variant)) for variant in WAN_VARIANTS}


def gate(
    spec: ModelSpec, folder: Path, formats: Sequence[str] = FORMATS, spoil: Any = None, **config: Any
) -> list[str]:
    network: Any = spec.load_network(torch.float32)
    tensors, sizes = with_adapter(network, **{"rank": 2, "alpha": 3.0, **config}), lora.layer_sizes(network)
    files = lora_formats.files_of(folder, sizes, spec.lora_prefixes, formats, spec.experts)
    lora_io.export(files, tensors, sizes, names=names_of(network))
    if spoil is not None:
        spoil(files[-1].path)
    message = check_parity(spec, tensors, sizes, files)
    assert message is not None
    return message.splitlines()


def shares(lines: Sequence[str]) -> list[float]:
    """The differences in the messages, relative to the adapter's effect."""
    return [0.0 if "to the bit" in line else float(line.partition("(to ")[2].split()[0]) for line in lines]


@pytest.mark.parametrize("variant", WAN_VARIANTS)
def test_stock_diffusers_computes_the_same_from_every_file(
    variant: str, specs: dict[str, ModelSpec], tmp_path: Path
) -> None:
    spec = specs[variant]
    images = ("add_k_proj", "add_v_proj") if variant in ("i2v-2.1", "flf-2.1") else ()
    lines = gate(spec, tmp_path, targets=(*ATTENTION, "ffn", *images), ranks={"attn2": 1})
    assert len(lines) == 3 * max(len(spec.experts), 1)
    assert all("stock diffusers loads it and computes the same (" in line for line in lines)
    assert max(shares(lines)) <= 1e-5


def test_files_that_diffusers_cannot_convert_are_read_back(specs: dict[str, ModelSpec], tmp_path: Path) -> None:
    diffusers, comfyui, kohya = gate(specs["t2v-2.1"], tmp_path, targets=ATTENTION)
    assert "stock diffusers loads it" in diffusers
    assert "stock diffusers loads it" in comfyui
    assert kohya.startswith("kohya.safetensors: diffusers does not load it (KeyError")
    assert max(shares((diffusers, comfyui, kohya))) <= 1e-5


@pytest.mark.parametrize("kind", ["rslora", "dora", "lokr"])
def test_other_kinds(kind: str, specs: dict[str, ModelSpec], tmp_path: Path) -> None:
    formats = FORMATS[:1] if kind == "dora" else FORMATS
    lines = gate(specs["i2v-a14b"], tmp_path, formats, targets=(*ATTENTION, "ffn"), kind=kind)
    assert len(lines) == 2 * len(formats)
    assert max(shares(lines)) <= 1e-5
    read_back = [line.split()[0] for line in lines if "read back here" in line]
    assert bool(read_back) == (kind == "lokr")
    assert not LOKR_LOADS or all(name.startswith(("comfyui", "kohya")) for name in read_back)


def test_a_large_network_is_compared_in_two_blocks(
    specs: dict[str, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_parity, "LARGE", 0)
    monkeypatch.setattr(lora_parity, "BLOCKS", 1)
    lines = gate(specs["t2v-a14b"], tmp_path, targets=(*ATTENTION, "ffn", "condition_embedder", "proj_out"))
    assert len(lines) == 6
    assert all(" the same in blocks 0 (" in line for line in lines)


def other_layers(path: Path) -> None:
    save_file({key.replace("blocks.0.", "blocks.7."): x for key, x in load_file(path).items()}, path)


def swapped(path: Path) -> None:
    found = load_file(path)
    q, k = (f"diffusion_model.blocks.0.self_attn.{x}.lora_B.weight" for x in "qk")
    save_file({**found, q: found[k], k: found[q]}, path)


def no_alpha(path: Path) -> None:
    save_file({key: x for key, x in load_file(path).items() if not key.endswith(".alpha")}, path)


@pytest.mark.parametrize("spoil", [other_layers, swapped, no_alpha])
@pytest.mark.parametrize("large", [False, True])
def test_a_wrong_file_stops_the_run(
    spoil: Any, large: bool, specs: dict[str, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(lora_parity, "LARGE", 0)
    with pytest.raises(
        CheckpointError, match=r"comfyui.*(computes something else|does not hold what was trained|for another)"
    ):
        gate(specs["t2v-2.1"], tmp_path, FORMATS[:2], spoil=spoil, targets=ATTENTION)
