"""Every text encoder and every VAE through the documented commands: trained for 3 steps, then generated from.

The commands are read from docs/commands.md; only paths and sizes are changed. The models are tiny and random, in the
format that their own libraries write.
"""

import contextlib
import json
import math
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from accelerate.state import AcceleratorState

from tests import factories
from tests.endtoend.test_readme import COMMANDS, commands, with_flags
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.config.generation import Overrides
from titans_video.generation.denoise import generate
from titans_video.generation.long_video import MOST_BEYOND
from titans_video.generation.model import load_model
from titans_video.generation.request import Request
from titans_video.models.registry import build_network
from titans_video.text.huggingface import PretrainedStream
from titans_video.training.trainer import Trainer

TRAINING = {
    "--preset": "tiny",
    "--model-dim": "24",
    "--depth": "1",
    "--heads": "2",
    "--height": "32",
    "--width": "32",
    "--num-frames": "8",
    "--max-steps": "3",
    "--batch-size": "2",
    "--output-dir": "run",
}
GENERATING = {"--checkpoint": "run/last.pt", "--height": "32", "--width": "32", "--num-frames": "8", "--steps": "2"}


def documented(words: str) -> list[str]:
    """Return the first documented command that contains some words."""
    return shlex.split(next(c for c in commands(COMMANDS) if words in c))


def without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


class Desk:
    """A folder with the repository's scripts, in which commands are typed."""

    def __init__(self, folder: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        for name in ("train", "train.py"):
            (folder / name).symlink_to(repository / name)

    def type(self, words: list[str], code: int = 0) -> str:
        """Run `python3 SCRIPT ...` in this process; what it prints."""
        kept, self_path = sys.argv, list(sys.path)
        sys.argv = words[1:]
        sys.path.insert(0, str((self.folder / words[1]).parent))  # as Python does for a script
        self.capsys.readouterr()
        try:
            with contextlib.chdir(self.folder), pytest.raises(SystemExit) as done:
                runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv, sys.path[:] = kept, self_path
            AcceleratorState._reset_state(reset_partial_state=True)  # as a process of its own would begin
        said = "".join(self.capsys.readouterr())
        assert done.value.code == code, f"{shlex.join(words)}\n{said[-3000:]}"
        return said

    def train(self, words: list[str], **changes: str) -> str:
        sizes = TRAINING | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
        return self.type(with_flags(words, sizes, add=True))

    def infer(self, **changes: str) -> str:
        sizes = GENERATING | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
        return self.type(with_flags(documented("infer_sora.py"), sizes, add=True))

    def frames(self, name: str = "out.mp4") -> tuple[int, int, int]:
        with av.open(str(self.folder / name)) as container:
            shapes = [(f.height, f.width) for f in container.decode(video=0)]
        return len(shapes), *shapes[0]


@pytest.fixture
def desk(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, repository, capsys)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "T5": factories.make_t5,
    "UMT5": partial(factories.make_t5, umt5=True),
    **{f: partial(factories.make_llm, f) for f in factories.LLM_FAMILIES},
    **{f"{f} multimodal": partial(factories.make_multimodal, f) for f in factories.MULTIMODAL_FAMILIES},
}
AS_TEXT = ["T5", "UMT5", "Qwen3"]
AS_LLM = [name for name in MAKERS if name not in ("T5", "UMT5")]


def with_encoders(desk: Desk, text: str | None, llm: str | None) -> list[str]:
    """Return the documented command of two encoders, with a folder instead of each name (None: without it)."""
    factories.make_vae("kl", desk.folder / "vae")
    words = with_flags(documented("qwen_or_mistral_or_llama"), {"--pretrained-model": "vae"}, add=False)
    for flag, name in (("--text-model", text), ("--llm-model", llm)):
        if name is not None:
            words = with_flags(words, {flag: str(MAKERS[name](desk.folder / flag.strip("-")).name)}, add=False)
    return words if llm else without(words, "--llm-model")


def assert_trained_and_generated(desk: Desk, streams: int) -> None:
    """Three finite steps, a checkpoint of the network alone that names its encoders, and a video."""
    lines = [json.loads(line) for line in (desk.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines)
    saved = files.read(desk.folder / "run" / "last.pt")
    assert saved.model.keys() == build_network(saved.config["model"]).state_dict().keys()
    assert saved.codec == {}
    projections = {name.split(".")[1] for name in saved.model if name.startswith("text_embed.")}
    assert len(projections) == streams
    assert saved.config["text"]["widths"] == [16] * streams
    options = saved.config["text"]["options"]
    assert len({options["text_model"], options["llm_model"]} & {"text-model", "llm-model"}) == streams  # the paths
    assert all(re.fullmatch("[0-9a-f]{32}", f) for f in saved.config["text"]["fingerprints"])
    desk.infer()
    assert desk.frames() == (8, 32, 32)


@pytest.mark.parametrize("name", AS_LLM)
def test_an_llm_beside_umt5(name: str, desk: Desk) -> None:
    desk.train(with_encoders(desk, "UMT5", name))
    assert_trained_and_generated(desk, 2)


@pytest.mark.parametrize("name", AS_TEXT)
def test_a_text_model_alone(name: str, desk: Desk) -> None:
    desk.train(with_encoders(desk, name, None))
    assert_trained_and_generated(desk, 1)


def test_an_llm_alone(desk: Desk) -> None:
    desk.train(with_encoders(desk, None, "Mistral"), text_model="none")
    assert_trained_and_generated(desk, 1)


def test_both_streams_are_dropped_each_alone_offloaded_and_steered_away_from(desk: Desk) -> None:
    words = [*with_encoders(desk, "T5", "Gemma3"), "--cfg-drop-each"]
    desk.train(words, cfg_drop_prob="0.5", text_offload="cpu")
    with contextlib.chdir(desk.folder):
        model = load_model("run/last.pt", Overrides(), "cpu")
    assert model.config["text"]["options"]["text_offload"] == "cpu"
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    request = Request(["a red circle"], frames=8, height=32, width=32, seeds=[0], steps=2, guidance_scale=3.0)
    plain, other, same = (
        generate(model, replace(request, negative_prompt=p), progress=False) for p in ("", "blurry, dark", "")
    )
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other, atol=1e-3)
    desk.infer(negative_prompt="blurry, dark", guidance_scale="3.0")


def test_cached_captions_and_clips_leave_no_encoder_in_memory(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    words = with_encoders(desk, "T5", "Llama")
    desk.train(words, output_dir="plain")
    loads: list[str] = []
    load, run = PretrainedStream._load_model, Trainer.run

    def counted(self: PretrainedStream) -> Any:
        loads.append(self.source.flag)
        return load(self)

    def checked(self: Trainer) -> Any:
        outcome = run(self)
        recipe: Any = self.recipe
        assert [s._model for s in recipe.text.streams] == [None, None]
        assert recipe.codec._vae is None
        return outcome

    monkeypatch.setattr(PretrainedStream, "_load_model", counted)
    monkeypatch.setattr(Trainer, "run", checked)
    desk.train(words, cache="cache", output_dir="first")
    assert sorted(loads) == ["--llm-model", "--text-model"]
    said = desk.train(words, cache="cache", output_dir="second")
    assert " 0 encodings made" in said
    assert len(loads) == 2
    plain, first, second = (files.read(desk.folder / n / "last.pt").model for n in ("plain", "first", "second"))
    for name, weight in plain.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, atol=1e-4, rtol=1e-4)


CODECS = {
    "kl": (16, 16, 32),
    "svd": (16, 16, 32),
    "cogvideox": (16, 16, 32),
    "wan": (13, 21, 32),
    "hunyuan": (13, 21, 32),
    "ltx": (9, 25, 64),
}
"""With a patch of 2,2,2 and --num-frames 16: frames trained on, frames that generation makes, side."""


@pytest.mark.parametrize("kind", CODECS)
def test_num_frames_16_with_every_vae(kind: str, desk: Desk) -> None:
    trained, made, side = CODECS[kind]
    factories.make_vae(kind, desk.folder / "vae")
    words = without(documented("qwen_or_mistral_or_llama"), "--llm-model")
    size = {"height": str(side), "width": str(side), "num_frames": "16"}
    said = desk.train(words, pretrained_model="vae", text_model="builtin", batch_size="1", **size)
    assert said.count(f"{side}x{side}x{trained} ") == 1
    used = None if trained == 16 else f"{trained} is used; the next legal count is {made}"
    assert_said_once(said, "--num-frames 16", used)
    said = desk.infer(**size)
    in_windows = made > MOST_BEYOND * trained
    assert_said_once(said, "The model was trained on", "generated in windows of that many." if in_windows else None)
    assert_said_once(said, " are kept.", None if made == 16 or in_windows else f"generate {made} frames together")
    assert desk.frames() == (16, side, side)


def assert_said_once(said: str, about: str, words: str | None) -> None:
    lines = [line for line in said.splitlines() if about in line]
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]


def test_num_frames_16_with_the_cogvideox_adapter_word_for_word(desk: Desk) -> None:
    init = {"pretrained_path": "cog", "dtype": "float16"}
    factories.make_vae("cogvideox", desk.folder / "cog")
    MAKERS["UMT5"](desk.folder / "umt5")
    MAKERS["Mistral"](desk.folder / "mistral")
    paths = {"--text-model": "umt5", "--llm-model": "mistral", "--vae-init-json": json.dumps(init)}
    words = with_flags(documented("CogVideoXVAEWrapper"), paths, add=False)
    desk.train(words, num_frames="16", batch_size="1")
    desk.infer(num_frames="16")
    assert desk.frames() == (16, 32, 32)


def test_a_codec_of_ones_own_and_the_command_that_is_printed(desk: Desk, repository: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (repository / "docs/guides/codecs.md").read_text(), re.DOTALL)
    (desk.folder / "half_size.py").write_text(example)
    words = without(documented("CogVideoXVAEWrapper"), "--llm-model")
    init = {"vae_module": "half_size", "vae_class": "HalfSize", "vae_init_json": '{"gain": 2.0}'}
    said = desk.train(words, text_model="builtin", **init)
    printed = next(line.strip() for line in said.splitlines() if "titans-video generate" in line)
    assert "--vae-module half_size --vae-class HalfSize" in printed
    script = "python3 train.py --mode inference"
    printed = printed.replace("titans-video generate", script)
    desk.type([*shlex.split(printed), "--steps", "2"])
    assert desk.frames() == (8, 32, 32)
    shorter = shlex.split(printed.replace("--vae-module half_size --vae-class HalfSize", ""))
    assert "--vae-module half_size --vae-class HalfSize" in desk.type(shorter, code=2)


BROKEN = """
class NoDecode:
    spec = {"channels": 3, "stride": [1, 1, 1]}
    def encode(self, pixels): return pixels
class WrongShape:
    spec = {"channels": 4, "stride": [1, 8, 8]}
    def encode(self, pixels): return pixels
    def decode(self, latents): return latents
class Raises(WrongShape):
    def __init__(self): raise ZeroDivisionError("by zero")
"""


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("broken", "NoDecode", "NoDecode is not a class with encode and decode"),
        ("broken", "WrongShape", "gave (1, 6, 1, 64, 64) when encoding (1, 3, 1, 64, 64)"),
        ("broken", "Raises", "ZeroDivisionError: by zero"),
        ("broken", "Absent", "Absent does not exist"),
        ("absent_module", "C", "there is no module absent_module"),
    ],
)
def test_a_broken_class_is_exit_code_2_and_one_paragraph(module: str, name: str, said: str, desk: Desk) -> None:
    (desk.folder / "broken.py").write_text(BROKEN)
    sys.modules.pop("broken", None)  # of an earlier case, in another folder
    words = without(without(documented("CogVideoXVAEWrapper"), "--llm-model"), "--vae-init-json")
    given = {"--vae-module": module, "--vae-class": name, "--text-model": "builtin"}
    assert_one_paragraph(desk.type(with_flags(words, given, add=False), code=2), said)


def assert_one_paragraph(output: str, *said: str) -> None:
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert "Traceback" not in output
    assert all(s in errors[0] for s in said), errors[0]


def test_a_model_that_is_not_there_is_said_before_anything_slow_and_without_a_try(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no clip is looked at and no connection is tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("titans_video.recipes.setup.open_data", refuse)
    factories.make_vae("kl", desk.folder / "vae")
    words = with_flags(documented("qwen_or_mistral_or_llama"), {"--pretrained-model": "vae"}, add=False)
    words.remove("--local-files-only")
    off, ways = "hub access is off", ("--text-model builtin", "the path of a folder")
    assert_one_paragraph(desk.type(words, code=2), "--text-model google/umt5-xxl", off, *ways)
    default = without(without(words, "--text-model"), "--llm-model")
    assert_one_paragraph(desk.type(default, code=2), "--text-model google/umt5-xxl", off, *ways)
    llm = with_flags(words, {"--text-model": "builtin", "--llm-model": "Qwen/Qwen2.5-7B"}, add=False)
    assert_one_paragraph(desk.type(llm, code=2), "--llm-model Qwen/Qwen2.5-7B", off, "train without it")


def test_a_wrong_llm_hidden_size_names_both_numbers(desk: Desk) -> None:
    words = with_encoders(desk, "T5", "Qwen2")
    output = desk.type([*words, "--llm-hidden-size", "24"], code=2)
    assert_one_paragraph(output, "--llm-hidden-size 24", "says 16")
    assert main(["train", "--manifest", "x", "--llm-hidden-size", "0"]) == 2
