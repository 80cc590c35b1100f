"""Every variant of Wan learns four clips by heart, with a LoRA and with all of its weights."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import REPOSITORY
from tests.wan_pipelines import WAN_VARIANTS, make_wan
from titans_video.config.options import CodecOptions, DataOptions, TrainOptions
from titans_video.config.recipes import BaseOptions, FinetuneOptions, LoraOptions, LoraRunOptions
from titans_video.pretrained.base import open_model_spec
from titans_video.recipes.finetune import build_finetune
from titans_video.recipes.lora import build_lora
from titans_video.recipes.pretrained import PretrainedRecipe
from titans_video.recipes.setup import RunParts, encode_cache, open_clips, with_last_frame
from titans_video.training import distributed
from titans_video.types import Batch

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
RATES = {"lora": 0.02, "finetune": 0.005}


def clips() -> tuple[Path, Path]:
    """Manifest and folder of real clips, or of the mock data where there are none."""
    import os

    real = Path(os.environ.get("TITANS_REAL_CLIPS", REPOSITORY.parent / "shared" / "real_clips"))
    folder = real if (real / "manifest.jsonl").is_file() else REPOSITORY / "train" / "videos" / "mock_data"
    return folder / "manifest.jsonl", folder


def recipe_of(folder: Path, kind: str, work: Path) -> tuple[PretrainedRecipe, Batch]:
    """A recipe and four clips, encoded once."""
    source, root = clips()
    manifest = work / "four.jsonl"
    manifest.write_text("\n".join(source.read_text().splitlines()[:4]))
    spec = open_model_spec(folder)
    side = 2 * spec.codec_spec.stride[1] * spec.patch_size[1]
    groups: dict[str, Any] = {
        "data": DataOptions(
            manifest=(str(manifest),), data_root=str(root), height=side, width=side, num_frames=5, batch_size=4,
            cond_frames=1, cache=str(work / "cache"),
            task_mix=f"{spec.tasks[0]}=1" if len(spec.tasks) == 1 else "t2v=0.5,i2v=0.5",
        ),
        "base": BaseOptions(pretrained_model=str(folder), text_dtype="fp32"),
        "train": TrainOptions(cfg_drop_prob=0.0),
    }  # fmt: skip
    adapter = LoraOptions(rank=32, target_modules="blocks,proj_out")
    options = FinetuneOptions(**groups) if kind == "finetune" else LoraRunOptions(**groups, lora=adapter)
    accelerator = distributed.start(options.train)
    codec, text = spec.codec("fp32", "cpu", load=True), spec.text("fp32", "cpu")
    image, codec_options = spec.image_encoder("fp32", "cpu"), CodecOptions(pretrained_model=str(folder))
    data, _ = open_clips(options, codec_options, codec, spec.clip_grid, accelerator)
    data = with_last_frame(data) if spec.end_frame == "required" else data
    filled = encode_cache(options, codec_options, codec, text, accelerator, data, image=image)
    parts = RunParts(filled.data, None, codec, codec_options, text, filled.cache, image=image)
    build: Any = build_finetune if kind == "finetune" else build_lora
    recipe = build(options, parts, spec, accelerator)
    return recipe, next(iter(filled.data.stream(cache=filled.cache)))


class Silent(nn.Module):
    """Says nothing of the noise: what is learned by merely falling silent does not count."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.zeros_like(hidden_states[:, : self.channels]),)


@pytest.mark.parametrize("kind", list(RATES))
@pytest.mark.parametrize("variant", WAN_VARIANTS)
def test_four_clips_are_learned(variant: str, kind: str, tmp_path: Path) -> None:
    before, after, _ = learned(make_wan(tmp_path / variant, variant), kind, tmp_path, steps=40)
    assert after < 0.7 * before


@pytest.mark.long
@pytest.mark.parametrize("kind", list(RATES))
@pytest.mark.parametrize("variant", WAN_VARIANTS)
def test_four_clips_are_learned_by_heart(variant: str, kind: str, tmp_path: Path) -> None:
    """By networks that are large enough for it; an adapter on random weights learns less."""
    changes = {"num_attention_heads": 4, "attention_head_dim": 24}
    changes |= {"added_kv_proj_dim": 96} if variant in ("i2v-2.1", "flf-2.1") else {}
    before, after, silent = learned(make_wan(tmp_path / variant, variant, **changes), kind, tmp_path, steps=400)
    assert after < 0.7 * before
    assert after < (0.7 if kind == "finetune" else 1.0) * silent


def learned(folder: Path, kind: str, work: Path, steps: int) -> tuple[float, float, float]:
    """The loss at fixed noise and times before and after a training, and that of a silent network."""
    recipe, batch = recipe_of(folder, kind, work)
    network = recipe.network

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            sums, elements = recipe.held_out(model, batch, QUANTILES)
        return float(sums.sum() / (len(QUANTILES) * elements.sum()))

    before, silent = loss_of(network), loss_of(Silent(recipe.spec.codec_spec.channels))
    base = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATES[kind], weight_decay=0.0)
    began = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATES[kind] * (1 - 0.9 * step / steps)
        own = replace(batch, step=step, seeds=[1000 * step + i for i in range(4)], drawn={})
        loss = recipe.loss(network, own).sum() / recipe.row_elements(own).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after, seconds = loss_of(network), time.perf_counter() - began
    print(f"{recipe.spec.name} {kind}: {before:.3f}, silent {silent:.3f}, after {after:.3f}; {seconds:.1f} s")
    assert all(torch.equal(p, base[name]) for name, p in network.named_parameters() if not p.requires_grad)
    return before, after, silent
