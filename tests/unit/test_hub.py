"""No code of a model folder runs, and only a user's own flag may download."""

import ast
import builtins
import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import factories
from tests.unit.test_layers import FILES, LAUNCHERS
from titans_video import hub
from titans_video.codecs.base import build_codec, codec_from_checkpoint, describe_codec
from titans_video.codecs.diffusers import meta_vae
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.generation import Overrides
from titans_video.config.options import CodecOptions, TextOptions
from titans_video.errors import CheckpointError, CodecError, TextError, UserError
from titans_video.generation.export import export
from titans_video.generation.model import _image_encoder, load_model
from titans_video.pretrained.base import open_model_spec
from titans_video.text.base import build_text, text_from_checkpoint

LOADS = {"from_pretrained", "load_config"}
READS = LOADS | {"cached_file", "lora_state_dict"}
FORBIDDEN = {
    "from_single_file",
    "hf_hub_download",
    "snapshot_download",
    "load_lora_weights",
    "load_dataset",
    "pipeline",
}
OWN = ("VideoPipeline",)
"""Classes whose `from_pretrained` is this project's, and only reads local files."""
MAY_DOWNLOAD = ["hub.py"]
"""Files with one call that may reach the hub: that of a flag."""


def calls(path: Path) -> list[tuple[str, int, dict[str, object]]]:
    """Return name, line and constant keyword arguments of each call of a method, or of a plain name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in OWN:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            constants = {
                k.arg: k.value.value for k in node.keywords if k.arg is not None and isinstance(k.value, ast.Constant)
            }
            found.append((name, node.lineno, constants))
    return found


def faults(path: Path) -> list[str]:
    found = []
    for name, line, constants in calls(path):
        if name in LOADS and constants.get("trust_remote_code") is not False:
            found.append(f"{path.name}:{line}: {name} without trust_remote_code=False")
        if name in READS and constants.get("local_files_only") is not True:
            found.append(f"{path.name}:{line}: {name} without local_files_only=True")
        if name in FORBIDDEN - {"pipeline"} or (name == "pipeline" and "task" in constants):
            found.append(f"{path.name}:{line}: {name} may download")
    return found


def test_every_load_refuses_code_and_stays_local() -> None:
    found = [fault for path in (*FILES, *LAUNCHERS) for fault in faults(path)]
    online = [fault for fault in found if fault.split(":")[0] in MAY_DOWNLOAD and "local_files_only" in fault]
    assert len(online) == len(MAY_DOWNLOAD)
    assert [fault for fault in found if fault not in online] == []


@pytest.mark.parametrize(
    "line",
    [
        "X.from_pretrained(a)",
        "X.from_pretrained(a, trust_remote_code=None)",
        "X.load_config(a)",
        "snapshot_download(a)",
    ],
)
def test_a_new_load_without_the_flag_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(line)
    assert faults(tmp_path / "new.py")


CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "foreign"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""

AUTO_MAP = {
    "AutoConfig": "foreign.Config",
    "AutoModel": "foreign.Model",
    "AutoModelForTextEncoding": "foreign.Model",
    "AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"],
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that the code of a folder would write; every question is answered with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return tmp_path / "ran"


def add_code(folder: Path, marker: Path, *names: str, **changes: Any) -> None:
    """Add a module to a folder, and name it in the JSON files `names`."""
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker)))
    for name in names:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"auto_map": AUTO_MAP} | changes))


def encode(**options: Any) -> None:
    build_text(TextOptions(**options))(["a red circle"])


UNKNOWN = {"model_type": "foreign"}


def unknown_t5(folder: Path, marker: Path) -> None:
    factories.make_t5(folder)
    add_code(folder, marker, "config.json", **UNKNOWN)
    encode(text_model=str(folder), text_dtype="fp32")


def unknown_llm(folder: Path, marker: Path) -> None:
    factories.make_qwen2(folder)
    add_code(folder, marker, "config.json", **UNKNOWN)
    encode(text_model="none", llm_model=str(folder), llm_dtype="fp32")


def tokenizer(folder: Path, marker: Path) -> None:
    factories.make_t5(folder)
    add_code(folder, marker, "tokenizer_config.json", tokenizer_class="Tokenizer")
    encode(text_model=str(folder), text_dtype="fp32")


def known_t5(folder: Path, marker: Path) -> None:
    factories.make_t5(folder)
    add_code(folder, marker, "config.json", "tokenizer_config.json")
    encode(text_model=str(folder), text_dtype="fp32")


def stored_in_a_checkpoint(folder: Path, marker: Path) -> None:
    factories.make_t5(folder)
    stored = build_text(TextOptions(text_model=str(folder), text_dtype="fp32")).describe()
    add_code(folder, marker, "config.json", **UNKNOWN)
    text_from_checkpoint(stored, Overrides())


def vae(folder: Path, marker: Path) -> None:
    factories.make_vae("svd", folder)
    add_code(folder / "vae", marker, "config.json", **UNKNOWN)
    meta_vae(folder / "vae", torch.float32)
    build_codec(CodecOptions(vae_backend="diffusers", pretrained_model=str(folder)))


def image_encoder(folder: Path, marker: Path) -> None:
    factories.make_svd(folder)
    add_code(folder / "image_encoder", marker, "config.json", **UNKNOWN)
    ImageEncoder(folder)


def pipeline(folder: Path, marker: Path) -> None:
    factories.make_cogvideox(folder)
    for part, name in (("transformer", "config.json"), ("scheduler", "scheduler_config.json")):
        add_code(folder / part, marker, name)
    spec = open_model_spec(folder)
    spec.load_network(torch.float32)
    spec.process()
    add_code(folder / "text_encoder", marker, "config.json", **UNKNOWN)
    spec.text("fp32", "cpu")(["a red circle"])


FOLDERS = [unknown_t5, unknown_llm, tokenizer, known_t5, stored_in_a_checkpoint, vae, image_encoder, pipeline]


@pytest.mark.parametrize("load", FOLDERS)
def test_code_in_a_folder_never_runs(load: Callable[[Path, Path], None], tmp_path: Path, marker: Path) -> None:
    with contextlib.suppress(UserError):
        load(tmp_path / "model", marker)
    assert not marker.exists()


@pytest.mark.parametrize("load", [unknown_t5, unknown_llm, stored_in_a_checkpoint])
def test_the_message_says_that_code_is_not_run(
    load: Callable[[Path, Path], None], tmp_path: Path, marker: Path
) -> None:
    with pytest.raises(TextError, match=r"auto_map.* never run"):
        load(tmp_path / "model", marker)


def test_loads_from_a_folder_cannot_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen: list[tuple[bool, dict[str, Any]]] = []

    class Kind:
        @staticmethod
        def from_pretrained(folder: Path, **given: Any) -> None:
            seen.append((constants.is_offline_mode(), given))

    hub.from_folder(Kind, tmp_path)
    assert seen == [(True, {"local_files_only": True, "trust_remote_code": False})]
    assert not constants.is_offline_mode()
    with pytest.raises(OSError, match="not a folder"):
        hub.from_folder(Kind, "google/umt5-xxl")


@pytest.mark.parametrize(("name", "flag"), [("text_model", "--text-model"), ("llm_model", "--llm-model")])
def test_a_checkpoint_cannot_name_a_text_encoder_of_the_hub(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = factories.make_t5 if name == "text_model" else factories.make_qwen2
    folder = make(tmp_path / "model")
    options = TextOptions(**({"text_model": "builtin"} | {name: str(folder)}))
    stored = build_text(options).describe()
    stored["options"][name] = "google/umt5-xxl"
    reached: list[object] = []
    monkeypatch.setattr("titans_video.hub._hub_is_off", lambda: False)
    monkeypatch.setattr("titans_video.hub._hub_problem", lambda: reached.append(1) or "stop here")
    with pytest.raises(CheckpointError, match=rf"'google/umt5-xxl'.* not downloaded.*{flag}"):
        text_from_checkpoint(stored, Overrides())
    assert not reached
    with pytest.raises(TextError, match="stop here"):  # the user's own flag may
        text_from_checkpoint(stored, Overrides(**{name: "google/umt5-xxl"}))
    assert text_from_checkpoint(stored, Overrides(**{name: str(folder)})).widths == stored["widths"]


def test_a_checkpoint_cannot_name_a_vae_or_an_image_encoder_of_the_hub(tmp_path: Path) -> None:
    options = CodecOptions(vae_backend="diffusers", pretrained_model=str(factories.make_vae("svd", tmp_path / "vae")))
    stored = describe_codec(build_codec(options), options)
    stored["options"]["pretrained_model"] = "THUDM/CogVideoX-2b"
    with pytest.raises(CheckpointError, match=r"'THUDM/CogVideoX-2b'.*--pretrained-model"):
        codec_from_checkpoint(stored, {}, Overrides())
    assert codec_from_checkpoint(stored, {}, Overrides(pretrained_model=options.pretrained_model)).spec.channels
    with pytest.raises(CheckpointError, match=r"'stabilityai/svd'.*--pretrained-model"):
        _image_encoder({"pretrained_model": "stabilityai/svd", "dtype": "fp32"}, Overrides(), "cpu")
    with pytest.raises(CodecError, match="is not a folder here"):  # a flag's name gives the flag's message
        codec_from_checkpoint(stored, {}, Overrides(pretrained_model="THUDM/CogVideoX-2b"))


def test_an_exported_folder_cannot_name_a_model_of_the_hub(tmp_path: Path) -> None:
    folder = export(load_model(None, Overrides(), "cpu"), tmp_path / "exported")
    about = json.loads((folder / "config.json").read_text())
    about["config"]["text"]["options"]["text_model"] = "google/umt5-xxl"
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"google/umt5-xxl.*--text-model"):
        load_model(str(folder), Overrides(), "cpu")
