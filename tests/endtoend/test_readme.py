"""Run every command of docs/commands.md, in its order, in a copy of the repository, at sizes that take a CPU seconds.

The READMEs and the first pages of the documentation show commands of that page, word for word. The tables below have
the stand-ins for the reader's models and clips, and the small sizes. Everything else of a command is unchanged.
A block below a line `<!-- needs: ... -->` does not run.
"""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from tests import factories
from tests.conftest import REPOSITORY
from titans_video.config.options import DataOptions, ModelOptions
from titans_video.data.manifest import read_rows
from titans_video.models.registry import PRESETS, build_network, sora_config
from titans_video.types import CodecSpec

README = REPOSITORY / "README.md"
CHINESE = REPOSITORY / "README.zh-CN.md"
DOCS = REPOSITORY / "docs"
COMMANDS = DOCS / "commands.md"
PAGES = (README, CHINESE, DOCS / "index.md", DOCS / "start.md")
BLOCK = re.compile(r"^(<!-- needs: .* -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TRAINING = {
    "--preset": "tiny",
    "--height": "32",
    "--width": "32",
    "--num-frames": "8",
    "--max-steps": "2",
    "--lr-warmup-steps": "1",
    "--grad-accum": "2",
}
LONG = {"--num-frames": "20", "--window": "8", "--overlap": "4"}
TITANS = {
    "--resolution": "32",
    "--num-frames": "8",
    "--model-dim": "24",
    "--depth": "2",
    "--heads": "2",
    "--max-steps": "2",
    "--grad-accum": "2",
}
LORA = {"--height": "32", "--width": "32", "--num-frames": "8", "--max-steps": "2", "--grad-accum": "2"}
GENERATING = {"--height": "32", "--width": "32", "--num-frames": "8", "--steps": "2"}
MODELS = {
    "/path/to/diffusers_weights_or_dummy": "models/kl",
    "/path/to/diffusers_weights": "models/kl",
    "/path/to/CogVideoX-2b": "models/cogvideox",
    "/path/to/cogvideox_diffusers_pipeline": "models/cogvideox_pipeline",
    "google/umt5-xxl": "models/umt5",
    "/path/to/qwen_or_mistral_or_llama": "models/qwen2",
    "/path/to/mistral_or_qwen": "models/qwen2",
    "/path/to/Qwen2.5-3B-or-7B": "models/qwen2",
    "/path/to/manifest.jsonl": "train/videos/mock_data/manifest.jsonl",
    "/path/to/svd_or_sd_diffusers": "models/svd",
    "/path/to/data": "train/videos/mock_data",
    "/path/to/svd": "models/svd",
    "outputs_video/checkpoint-5000": "outputs_video/checkpoint-2",
}


def blocks(path: Path, language: str) -> list[str]:
    """Return the code blocks of a language that are not marked as needing something."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [body for needs, name, body in found if name == language and not needs]


def commands(path: Path) -> list[str]:
    """One command each: continued lines joined, comments and empty lines left out."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def with_flags(words: list[str], values: dict[str, str], *, add: bool) -> list[str]:
    """`words` with the value of each flag replaced, and with `add` the flags that are not there put at the end."""
    words = list(words)
    for flag, value in values.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        elif add:
            words += [flag, value]
    return words


def smaller(words: list[str]) -> list[str]:
    """The same command at a tiny size."""
    words = with_flags(words, {"--buckets": "32x64,64x32,32x32", "--clips": "12"}, add=False)
    script = " ".join(words[:6])
    if "--seconds" in words:
        words = with_flags(words, {**GENERATING, "--fps": "16", "--seconds": "0.5"}, add=False)
        return with_flags(words, {"--steps": "2"}, add=True)
    if "infer_sora" in script or "infer" in words:
        small = GENERATING | (LONG if "--window" in words else {})
        return with_flags(with_flags(words, small, add=False), {"--steps": "2"}, add=True)
    if "train_titans_video_dit" in script:
        return with_flags(words, TITANS, add=False)
    if "train_cogvideox_lora" in script:
        return with_flags(words, LORA, add=False)
    if "train_video_accelerate" in script:
        sizes = {} if "--buckets" in words else {"--height": "32", "--width": "32"}
        return with_flags(words, {"--num-frames": "4", "--max-steps": "2", "--grad-accum": "2", **sizes}, add=True)
    if words[1:3] == ["train", "titans"]:
        return with_flags(words, {"--max-steps": "2", "--model-dim": "24", "--depth": "1"}, add=True)
    if words[:2] == ["titans-video", "init"]:
        return [*words, "--no-open"]
    if words[:3] == ["titans-video", "train", "--config"]:
        return with_flags(words, {"--max-steps": "2", "--batch-size": "2"}, add=True)
    if words[0] == "titans-video":
        return with_flags(words, GENERATING, add=False)
    if "--mode" in words:
        return with_flags(words, {"--max-steps": "2", "--batch-size": "2"}, add="train" in words)
    if "train/videos" not in script:
        return words
    if "--validate-every" in words:
        words = with_flags(words, {"--sample-steps": "2"}, add=True)
    sizes = {k: v for k, v in TRAINING.items() if "--buckets" not in words or k not in ("--height", "--width")}
    return with_flags(words, {**sizes, "--text-model": "models/umt5"}, add=True)


@dataclass(frozen=True)
class Done:
    code: int
    output: str


class Workspace:
    """A copy of what the commands need, and stand-ins for what the reader brings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("train", "configs", "Makefile", "train.py", "pyproject.toml"):
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder / name)
        factories.make_vae("kl", folder / "models/kl")
        factories.make_svd(folder / "models/svd")
        factories.make_vae("cogvideox", folder / "models/cogvideox")
        factories.make_cogvideox(folder / "models/cogvideox_pipeline")
        factories.make_t5(folder / "models/umt5", umt5=True)
        factories.make_qwen2(folder / "models/qwen2")
        mock = folder / "train/videos/mock_data"
        rows = json.loads((mock / "metadata.json").read_text())
        for row in rows:
            row["video_path"] = f"train/videos/mock_data/{row['video_path']}"
        (folder / "metadata.json").write_text(json.dumps(rows))
        (folder / "clips").mkdir()
        for row in rows:
            clip = shutil.copy2(folder / row["video_path"], folder / "clips")
            Path(clip).with_suffix(".txt").write_text(row["caption"])

    def words(self, command: str) -> list[str]:
        for theirs, ours in MODELS.items():
            command = command.replace(theirs, ours)
        return smaller(shlex.split(command))

    def run(self, command: str) -> Done:
        words = self.words(command)
        if words[0] == "make":
            return self.spawn(["make", "--dry-run", "--old-file=.venv/.ready", *words[1:]])
        if words[0] == "torchrun":
            return self.spawn([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words[3:]])
        if "--config_file" in words:  # its counterpart for a CPU, and nothing else changed
            at = words.index("--config_file") + 1
            words[at] = words[at].replace("/fsdp2", "/cpu2_fsdp2").replace("/ddp", "/cpu2")
            words = with_flags(words, {"--expect-processes": "2"}, add=False)
            return self.spawn([sys.executable, "-m", "accelerate.commands.launch", *words[2:]])
        if words[:2] == ["accelerate", "launch"]:
            rest = with_flags(words[2:], {"--num_processes": "2"}, add=True)
            return self.spawn([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *rest])
        if words[0] in ("python", "python3"):
            return self.inside(words[1:], lambda: runpy.run_path(words[1], run_name="__main__"))
        assert words[0] == "titans-video", f"this test cannot run the documented command: {command}"
        from titans_video.cli.main import main

        return self.inside(words, main)

    def spawn(self, words: list[str]) -> Done:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=200)
        return Done(done.returncode, done.stdout + done.stderr)

    def inside(self, argv: list[str], call: Callable[[], object]) -> Done:
        """Run in this process: importing torch and transformers for each command would take most of the time."""
        output, path, before = io.StringIO(), list(sys.path), Path.cwd()
        sys.argv, kept = list(argv), sys.argv
        sys.path.insert(0, str((self.folder / argv[0]).parent))  # as Python does for a script
        os.chdir(self.folder)
        try:
            with redirect_stdout(output), redirect_stderr(output):
                code = call()
        except SystemExit as e:
            code = e.code
        finally:
            os.chdir(before)
            sys.argv, sys.path[:] = kept, path
            AcceleratorState._reset_state(reset_partial_state=True)  # as a process of its own would begin
        return Done(code if isinstance(code, int) else 0 if not isinstance(code, str) else 1, output.getvalue())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_show_commands_that_run(path: Path) -> None:
    assert not set(commands(path)) - set(commands(COMMANDS))
    assert not set(blocks(path, "python")) - set(blocks(COMMANDS, "python"))


@pytest.mark.parametrize("path", [COMMANDS, *PAGES], ids=lambda path: path.name)
def test_manifests_are_read(path: Path, tmp_path: Path) -> None:
    for language in ("json", "jsonl"):
        for number, block in enumerate(blocks(path, language)):
            manifest = tmp_path / f"{number}.{language}"
            manifest.write_text(block, encoding="utf-8")
            rows = list(read_rows(DataOptions(manifest=(str(manifest),))))
            assert all(row.caption for row in rows)


@pytest.mark.parametrize("command", commands(COMMANDS))
def test_command(command: str, workspace: Workspace) -> None:
    done = workspace.run(command)
    assert done.code == 0, f"{shlex.join(workspace.words(command))}\n{done.output[-3000:]}"
    for made in re.findall(r"--out (\S+)", command):
        assert (workspace.folder / made).exists(), f"{made} was not made\n{done.output[-2000:]}"


SMALL_CALL = {"num_frames=64": "num_frames=20", "=512": "=32", "num_inference_steps=50": "num_inference_steps=2"}


@pytest.mark.parametrize("code", blocks(COMMANDS, "python"), ids=["shipped weights", "exported"])
def test_the_python_code_runs(code: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported folder is that of the commands."""
    exported = "exported" in code
    if exported:
        for theirs, ours in SMALL_CALL.items():
            assert theirs in code
            code = code.replace(theirs, ours)
    monkeypatch.chdir(workspace.folder)
    names: dict[str, object] = {}
    exec(code, names)
    frames = names["frames"]
    assert isinstance(frames, np.ndarray)
    assert frames.shape == (20 if exported else 8, 32, 32, 3)
    assert exported or Path("triangle.mp4").is_file()


def sizes(path: Path) -> list[tuple[str, ...]]:
    """The rows of the table of presets: name, width, depth, heads, millions of parameters."""
    row = r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \|$"
    return re.findall(row, path.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_table_of_sizes_is_right() -> None:
    tables = [rows for path in (README, CHINESE, *DOCS.rglob("*.md")) if (rows := sizes(path))]
    assert tables
    rows = tables[0]
    assert all(table == rows for table in tables)
    assert [row[0] for row in rows] == list(PRESETS)
    spec = CodecSpec("vae", 16, (4, 8, 8), "causal")
    for name, width, depth, heads, millions in rows:
        with torch.device("meta"):
            network = build_network(sora_config(ModelOptions(preset=name, patch_size=(2, 2, 2)), spec, (4096,)))
        assert [int(width), int(depth), int(heads)] == [PRESETS[name][k] for k in ("model_dim", "depth", "heads")]
        count = sum(p.numel() for p in network.parameters()) / 1e6
        assert float(millions) == round(count, 1 if "." in millions else 0), name


@pytest.mark.parametrize("path", [COMMANDS, *PAGES], ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target
