"""Forged files end in one message or in a correct result, within 10 seconds and 2 GB.

Each case changes a valid file at one to three places (see `forging`). 200 cases of each format run by default, and
2,000 with `-m long`.
"""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from tests import factories
from tests.unit.forging import (
    CHANGES,
    Change,
    bounded,
    forge,
    safetensors_bytes,
    split_safetensors,
    to_json,
)
from tests.unit.generation_parts import as_checkpoint, tiny_model
from tests.unit.test_generation_stream import streaming_model
from tests.unit.test_reporting import make_run
from titans_video import checkpoint as checkpoints
from titans_video.config.generation import GenerateOptions, Overrides
from titans_video.data.bad_rows import BadRows
from titans_video.generation import long_video
from titans_video.generation.model import VideoModel, load_model
from titans_video.generation.request import build_request
from titans_video.models import lora, lora_io
from titans_video.models.registry import build_network
from titans_video.reporting import report
from titans_video.training import checkpointing, metrics, tracking
from titans_video.training.resume import find_resume, open_resume

MOST_VALUES = 20_000
"""Latent values times steps of a video that a test generates; larger ones are only planned."""


def check_generation(model: VideoModel, **flags: Any) -> None:
    """Plan the video that `generate` makes without further flags, and make it if it is small."""
    options = GenerateOptions(prompt="a", **flags)
    request, _ = build_request(options, model)
    generate, _ = long_video.plan_generation(model, request, options, None)
    pixels = request.frames * request.height * request.width
    if pixels > MOST_VALUES or request.steps > 8 or (request.continue_steps or 0) > 8:
        return
    video = torch.cat(list(generate(request)), dim=2)
    assert video.shape == (1, 3, request.frames, request.height, request.width)


class Format:
    """A kind of file: a valid tree of its contents, and how a forged tree is written and read."""

    tree: Any

    def write(self, tree: Any) -> None:
        raise NotImplementedError

    def read(self) -> None:
        raise NotImplementedError


class CheckpointFormat(Format):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.pt"
        model = streaming_model()
        self.tree = checkpoints.as_dict(as_checkpoint(model))
        self.tree["model"] = dict(self.tree["model"])
        self.tree = json_like(self.tree)

    def write(self, tree: Any) -> None:
        torch.save(tree, self.path)

    def read(self) -> None:
        check_generation(load_model(str(self.path), Overrides(), "cpu"), num_frames=4)


class ExportedFormat(Format):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "exported"
        model = tiny_model()
        config = model.config["model"] | {"text_widths": [8]}
        network = build_network(config)
        options = model.config["text"]["options"] | {"text_model": "t5", "text_dtype": "fp32", "local_files_only": True}
        described = model.config | {
            "model": config,
            "text": {"options": options, "fingerprints": [None], "widths": [8]},
        }
        checkpoints.write(checkpoints.Checkpoint(network.state_dict(), described, 7), self.path)
        header, self.data = split_safetensors((self.path / "model.safetensors").read_bytes())
        encoder = factories.make_t5(self.path / "text_encoder", width=8)
        self.tree = {
            "config": json.loads((self.path / "config.json").read_text()),
            "header": header,
            "encoder": json.loads((encoder / "config.json").read_text()),
        }

    def write(self, tree: Any) -> None:
        tree = tree if isinstance(tree, dict) else {}
        (self.path / "config.json").write_bytes(to_json(tree.get("config")))
        (self.path / "model.safetensors").write_bytes(safetensors_bytes(tree.get("header"), self.data))
        (self.path / "text_encoder" / "config.json").write_bytes(to_json(tree.get("encoder")))

    def read(self) -> None:
        check_generation(load_model(str(self.path), Overrides(), "cpu"), num_frames=4)


class MemoryFormat(Format):
    def __init__(self, folder: Path) -> None:
        self.path, self.model = folder / "memory.safetensors", streaming_model("neural")
        options = GenerateOptions(prompt="a", num_frames=3, steps=1, memory_out=str(self.path))
        request, _ = build_request(options, self.model)
        generate, _ = long_video.plan_generation(self.model, request, options, None)
        list(generate(request))
        header, self.data = split_safetensors(self.path.read_bytes())
        self.tree = header

    def write(self, tree: Any) -> None:
        self.path.write_bytes(safetensors_bytes(tree, self.data))

    def read(self) -> None:
        check_generation(self.model, num_frames=3, steps=1, memory_in=str(self.path))


class LoraFormat(Format):
    def __init__(self, folder: Path) -> None:
        self.path, self.network = folder / lora_io.WEIGHTS, Blocks()
        lora.inject(self.network, lora.LoraConfig(2, 5.0, targets=["to_q", "ff"]))
        sizes = lora.layer_sizes(self.network)
        sizes["blocks.0.to_q"] = (2, 3.0)
        about = {"base": {"pipeline": "x", "fingerprint": "0"}, "data": {"num_frames": 9}, "sample": {"steps": 5}}
        lora_io.write(self.path, lora.state_dict(self.network), sizes, about={lora_io.OWN: json.dumps(about)})
        lora.remove(self.network)
        self.header, self.data = split_safetensors(self.path.read_bytes())
        notes = self.header["__metadata__"]
        self.tree = {
            "header": {k: v for k, v in self.header.items() if k != "__metadata__"},
            "lora": json.loads(notes[lora_io.HEADER]),
            "own": about,
        }

    def write(self, tree: Any) -> None:
        tree = tree if isinstance(tree, dict) else {}
        notes = {lora_io.HEADER: to_json(tree.get("lora")).decode(), lora_io.OWN: to_json(tree.get("own")).decode()}
        header = tree.get("header")
        header = {"__metadata__": notes, **header} if isinstance(header, dict) else header
        self.path.write_bytes(safetensors_bytes(header, self.data))

    def read(self) -> None:
        file = lora_io.read(self.path)
        network = Blocks()
        lora.load(network, file.tensors, file.alphas)
        x = torch.ones(1, 4)
        assert network(x).shape == (1, 4)


class RunFormat(Format):
    draw = True

    def __init__(self, folder: Path) -> None:
        self.folder = make_run(folder / "run")
        shutil.rmtree(self.folder / "samples")
        lines = {name: self.lines(name) for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl")}
        row = {"id": "1", "video": "a.mp4", "reason": "damaged", "detail": "", "batch": 3, "bucket": "8x8x4"}
        state: dict[str, Any] = {
            "settings": {"--lr": 0.1, "--betas": [0.9, 0.99], "--resume": None},
            "batching": {"batch_size": 2, "tokens_per_batch": None, "grad_accum": 1},
            "stream": {"step": 2, "rows": {"8x8x4": 2}, "left_out": [row]},
            "guard": {"bad_in_a_row": 0, "skipped": 0, "mean": 0.1, "variance": 0.1, "seen": 2, "accused": []},
            "processes": 1,
            "scaler": None,
            "optimizer": {"w/exp_avg": torch.zeros(2, 2), "w/step": torch.zeros(())},
        }
        model = checkpoints.Checkpoint({"w": torch.zeros(2, 2)}, {"recipe": "sora"}, 2)
        self.checkpoint = checkpointing.save(self.folder, 2, {checkpoints.MODEL: model}, state, 0)
        self.tree = {
            **lines,
            "run.json": json.loads((self.folder / "run.json").read_text()),
            "prompts": ["a", "b"],
            "rows": [row],
            "manifest": json.loads((self.checkpoint / "manifest.json").read_text()),
            "state": {"format": checkpointing.STATE_FORMAT, "step": 2, **state},
        }

    def lines(self, name: str) -> list[Any]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines() if line.endswith("}")]

    def write(self, tree: Any) -> None:
        tree = tree if isinstance(tree, dict) else {}
        self.draw = crc32(to_json(tree.get("validation.jsonl")) + to_json(tree.get("metrics.jsonl"))) % 10 == 0
        for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl"):
            self.write_lines(name, tree.get(name))
        self.write_lines("broken.rank0.jsonl", tree.get("rows"))
        (self.folder / "run.json").write_bytes(to_json(tree.get("run.json")))
        samples = self.folder / "samples" / "step-0000008"
        samples.mkdir(parents=True, exist_ok=True)
        (samples / "prompts.json").write_bytes(to_json(tree.get("prompts")))
        (self.checkpoint / "manifest.json").write_bytes(to_json(tree.get("manifest")))
        torch.save(tree.get("state"), self.checkpoint / "training_state.pt")

    def write_lines(self, name: str, lines: Any) -> None:
        lines = lines if isinstance(lines, list) else [lines]
        (self.folder / name).write_bytes(b"".join(to_json(line) + b"\n" for line in lines))

    def read(self) -> None:
        tracking.read_run_record(self.folder)
        metrics.last_line(self.folder / "metrics.jsonl")
        BadRows(self.folder).load()
        bounded(self.resume)
        # Drawing takes most of the time, and most changes do not reach it.
        drawn = contextlib.nullcontext() if self.draw else patch.object(report, "chart", no_chart)
        with drawn:
            report.write_report(self.folder)

    def resume(self) -> None:
        from titans_video.config.options import TrainOptions
        from titans_video.training.guards import Guard

        options = TrainOptions(output_dir=str(self.folder), resume=str(self.checkpoint))
        resume = open_resume(self.checkpoint, options)
        assert resume is not None
        Guard().load_state_dict(resume.state.get("guard", {}))
        BadRows(None).load(resume.state.get("stream", {}).get("left_out", ()))
        find_resume(replace(options, resume="auto"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.ff = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.ff(self.to_q(x))
        return out


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def no_chart(title: str, lines: Any, **settings: Any) -> str:
    return title


def json_like(value: Any) -> Any:
    """Return nested containers with lists and dicts only."""
    if isinstance(value, dict):
        return {key: json_like(part) for key, part in value.items()}
    return [json_like(part) for part in value] if isinstance(value, list | tuple) else value


FORMATS = {
    "checkpoint": CheckpointFormat,
    "exported": ExportedFormat,
    "memory": MemoryFormat,
    "lora": LoraFormat,
    "run": RunFormat,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    return {}


@pytest.fixture
def form(request: pytest.FixtureRequest, made: dict[str, Format], tmp_path_factory: pytest.TempPathFactory) -> Format:
    name = request.param
    if name not in made:
        made[name] = FORMATS[name](tmp_path_factory.mktemp(name))  # type: ignore[abstract]
    return made[name]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the progress bars and warnings of thousands of cases."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())


def cases(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.mark.parametrize("form", FORMATS, indirect=True)
def test_the_valid_file_is_read(form: Format, quiet: None) -> None:
    form.write(form.tree)
    assert bounded(form.read) is None


@pytest.mark.parametrize("form", FORMATS, indirect=True)
@given(changes=CHANGES)
@cases(200)
def test_a_forged_file_is_refused_or_read(form: Format, quiet: None, changes: list[Change]) -> None:
    form.write(forge(form.tree, changes))
    bounded(form.read)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMATS, indirect=True)
@given(changes=CHANGES)
@cases(2000)
def test_many_forged_files_are_refused_or_read(form: Format, quiet: None, changes: list[Change]) -> None:
    form.write(forge(form.tree, changes))
    bounded(form.read)
