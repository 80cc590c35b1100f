"""Named attacks on each format: each is refused with one message that says what is wrong and where."""

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import factories
from tests.unit.forging import bounded, split_safetensors
from tests.unit.generation_parts import as_checkpoint, tiny_model
from tests.unit.test_forged_files import LoraFormat
from titans_video import checkpoint as checkpoints
from titans_video.codecs.base import IdentityCodec, parse_init
from titans_video.codecs.diffusers import DiffusersCodec, class_name
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.config.parse import flags_from_yaml, read_segment_prompts
from titans_video.diffusion.v_prediction import VPredictionDDPM
from titans_video.errors import UserError
from titans_video.generation.model import load_model
from titans_video.models import lora_io, registry
from titans_video.pretrained.base import open_model_spec
from titans_video.text.base import build_text
from titans_video.training import checkpointing

CONFIGS = [
    (("model", "heads"), 0, "config.model.heads: expected an integer from 1 to 512, found 0"),
    (("model", "depth"), 10**9, "config.model.depth: expected an integer from 1 to 512"),
    (("model", "depth"), 500, "describes 501 layers, but it has only"),
    (("model", "model_dim"), 60_000, "of another shape"),
    (("model", "text_widths"), [0] * 10**5, "config.model.text_widths: expected a list of 0 to 8 values"),
    (("model", "rope_theta"), float("nan"), "config.model.rope_theta"),
    (("sample", "steps"), 10**9, "config.sample.steps: expected an integer from 1 to 10000, found 1000000000"),
    (("sample", "guidance_interval"), [0.5], "config.sample.guidance_interval: expected a list of 2 values"),
    (("data", "num_frames"), 10**9, "config.data.num_frames"),
    (("data", "fps"), "8", "config.data.fps: expected a number, above 0 and at most 1000, found '8'"),
    (("data", "height"), True, "config.data.height"),
    (("codec", "spec", "stride"), [1, 2], "config.codec.spec.stride: expected a list of 3 values, found a list of 2"),
    (("codec", "spec"), 3, "config.codec.spec: expected an object, found 3"),
    (("process", "time_std"), 0, "config.process.time_std"),
    (("segments",), {"latents": 2, "overlap": 1}, "the segments do not belong to its SoraDiT"),
]


@pytest.mark.parametrize("name", ["model.pt", "exported"])
@pytest.mark.parametrize(("path", "value", "said"), CONFIGS)
def test_a_config_out_of_range_is_refused(
    path: tuple[str, ...], value: Any, said: str, name: str, tmp_path: Path
) -> None:
    saved = as_checkpoint(tiny_model())
    saved.config = copy.deepcopy(saved.config)
    place = saved.config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    checkpoints.write(saved, tmp_path / name)
    error = bounded(lambda: load_model(str(tmp_path / name), Overrides(), "cpu") and None)
    assert error is not None
    assert said in error or "nan is not a finite number" in error.lower()
    assert name in error


def archive(path: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> None:
    """Write the entries of a `.pt` file again."""
    with zipfile.ZipFile(path) as source:
        entries = [(info, source.read(info.filename)) for info in source.infolist()]
    with zipfile.ZipFile(path, "w") as out:
        for info, data in entries:
            change(out, info, data)


@pytest.mark.parametrize("packed", ["data/0", "data.pkl", "version"])
def test_compressed_entries_are_refused(packed: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(2**20)}, path)

    def change(out: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes) -> None:
        kind = zipfile.ZIP_DEFLATED if info.filename.endswith(packed) else zipfile.ZIP_STORED
        out.writestr(info.filename, data, kind)

    archive(path, change)
    with pytest.raises(UserError, match="is compressed"):
        checkpoints.load_tensors(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.zeros(1).expand(10**5, 10**5)}, "larger than the file"),
        ({"a": torch.zeros(4).as_strided((10**5, 10**4), (0, 0))}, "larger than the file"),
        ({str(i): x for x in [torch.zeros(10**5)] for i in range(100)}, "larger than the file"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "sparse"),
        ({"a": torch.zeros(3, device="meta")}, "without values"),
    ],
)
def test_tensors_that_expand_are_refused(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=said):
        checkpoints.load_tensors(tmp_path / "m.pt")


PATTERNS = ["(a+)+$", "(.*a){25}", r"(\w+\s?)*x", "to_q|to_k"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_regular_expression_of_a_lora_runs(pattern: str, tmp_path: Path) -> None:
    form = LoraFormat(tmp_path)
    form.tree["lora"]["transformer.alpha_pattern"] = {pattern: 3.0}
    form.write(form.tree)
    error = bounded(lambda: lora_io.read(form.path) and None)
    assert error is not None
    assert "is a regular expression" in error


@pytest.mark.parametrize("key", ["^blocks.0.to_q$", r"blocks\.0\.to_q", "0.to_q"])
def test_names_in_alpha_patterns_select_their_layers(key: str, tmp_path: Path) -> None:
    form = LoraFormat(tmp_path)
    form.tree["lora"]["transformer.alpha_pattern"] = {key: 7.0}
    form.write(form.tree)
    alphas = lora_io.read(form.path).alphas
    assert {name: a for name, a in alphas.items() if a == 7} == {"blocks.0.to_q": 7.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": -1}, "step: expected an integer"),
        ({"guard": {"variance": -1.0}}, "guard.variance"),
        ({"stream": {"rows": {"8x8x4": 0}}}, "stream.rows"),
        ({"optimizer": {"w/step": 3}}, "optimizer.'w/step': expected a tensor, found 3"),
    ],
)
def test_a_training_state_out_of_range_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    torch.save({"format": checkpointing.STATE_FORMAT, "step": 1} | change, tmp_path / "training_state.pt")
    with pytest.raises(UserError, match=said):
        checkpointing.read_state(tmp_path)


@pytest.mark.parametrize("key", ["num_layers", "num_heads", "num_decoder_layers"])
def test_a_text_encoder_without_end_is_refused(key: str, tmp_path: Path) -> None:
    folder = factories.make_t5(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: 10**9}))
    with pytest.raises(UserError, match=f"{key}: expected an integer of at most 2048"):
        build_text(TextOptions(text_model=str(folder), local_files_only=True))


@pytest.mark.parametrize("changes", [{"vocab_size": 10**8}, {"d_model": 10**6}, {"d_ff": 10**8}])
def test_a_text_encoder_larger_than_its_files_is_refused(changes: dict[str, int], tmp_path: Path) -> None:
    folder = factories.make_t5(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    options = TextOptions(text_model=str(folder), local_files_only=True)
    error = bounded(lambda: build_text(options) and None)
    assert error is not None
    assert "but its weight files have" in error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers_per_block": 10**9}, "layers_per_block: expected an integer of at most 2048"),
        ({"latent_channels": 10**6}, "but its weight files have"),
        ({"block_out_channels": [[[[[[[[[[[[[8]]]]]]]]]]]]]}, "levels of nesting"),
    ],
)
def test_a_vae_out_of_range_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    factories.tiny_vae("kl").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    error = bounded(lambda: DiffusersCodec.load(tmp_path) and None)
    assert error is not None
    assert said in error


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a": NaN}', '{"a": 1, "a": 2}', "[1]", '{"a": ' + "[" * 80 + "]" * 80 + "}"]
)
def test_vae_init_json_is_bounded(text: str) -> None:
    with pytest.raises(UserError, match="--vae-init-json"):
        parse_init(text)


@pytest.mark.parametrize("init", [{"space_to_depth": 10**9}, {"factor": [1, 1]}, {"factor": [1, 0, 1]}])
def test_sizes_in_vae_init_json_are_bounded(init: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="from 1 to 1024"):
        IdentityCodec.from_options(CodecOptions(vae_backend="identity"), init, load=True)


@pytest.mark.parametrize("value", ["2001-01-01", "{a: 2001-01-01}", "!!set {a, b}", "[[1]]", "!!binary aaaa"])
def test_yaml_values_that_are_no_flags_are_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"lr: {value}\n")
    with pytest.raises(UserError, match="lr is neither a plain value"):
        flags_from_yaml(tmp_path / "a.yaml", {"lr": False})


@pytest.mark.parametrize("line", ["9" * 5000 + ": a", "9999999999: a", "0: a", "x: a"])
def test_segment_prompts_are_bounded(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"8: b\n{line}\n")
    with pytest.raises(UserError, match=r"line 2: expected `frames: prompt`") as caught:
        read_segment_prompts(str(tmp_path / "a.txt"))
    assert len(str(caught.value)) < 500


def test_the_header_of_a_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="header is larger"):
        lora_io.read(path)
    assert split_safetensors((8).to_bytes(8, "little") + b'{"a": 1}xy') == ({"a": 1}, b"xy")


NAMED_IN_FILES: dict[str, Callable[[Path, Any], object]] = {
    "a checkpoint's format": lambda folder, name: checkpoints.read(
        _saved(folder / "a.pt", {"model": {}, "config": {}, "step": 0, "format": name})
    ),
    "a network": lambda folder, name: registry.build_network({"network": name}),
    "a VAE": lambda folder, name: class_name(_described(folder, "config.json", name)),
    "a pipeline": lambda folder, name: open_model_spec(_described(folder, "model_index.json", name)),
    "a scheduler": lambda folder, name: VPredictionDDPM.from_scheduler(
        SimpleNamespace(config={"prediction_type": name})
    ),
}


def _saved(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def _described(folder: Path, file: str, name: Any) -> Path:
    (folder / file).write_text(json.dumps({"_class_name": name}))
    return folder


@pytest.mark.parametrize("name", ["x" * 10**5, ["x"], {"a": 1}, 10**19, None], ids=lambda name: type(name).__name__)
@pytest.mark.parametrize("kind", NAMED_IN_FILES)
def test_names_in_files_are_shown_shortened(kind: str, name: Any, tmp_path: Path) -> None:
    error = bounded(lambda: NAMED_IN_FILES[kind](tmp_path, name) and None)
    assert error is not None
    assert len(error) < 600
