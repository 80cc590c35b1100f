"""`titans-video share`: a folder for the hub whose card is true, whose code works, and which tells nothing of here."""

import base64
import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open

from tests.unit.test_layers import REPOSITORY
from tests.wan_pipelines import make_wan
from titans_video.cli.main import main
from titans_video.errors import ConfigError, WriteError
from titans_video.generation.video_pipeline import VideoPipeline
from titans_video.media.probe import probe
from titans_video.reporting import sharing
from titans_video.reporting.model_card import (
    Contents,
    Publication,
    check_publication,
    name_on_the_hub,
    without_paths,
    write_card,
)
from titans_video.reporting.report import read_run

MOCK = REPOSITORY / "train" / "videos" / "mock_data"
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwx"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home-of-someone")


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A run of two steps from scratch, on clips with licences, with a sample."""
    shutil.copytree(MOCK, home / "clips")
    manifest = home / "clips" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:12]
    rows = [row | ({"license": "cc-by-4.0"} if i < 5 else {}) for i, row in enumerate(rows)]
    rows.append({"video": "gone.mp4", "caption": "not here"})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--config", str(REPOSITORY / "configs" / "sora" / "tiny.yaml"), "--manifest", str(manifest)]
    words += [
        "--max-steps",
        "2",
        "--depth",
        "1",
        "--model-dim",
        "32",
        "--heads",
        "2",
        "--batch-size",
        "2",
        "--validate-every",
        "2",
        "--sample-steps",
        "2",
    ]
    words += ["--validation-prompt", "a red circle moving up", "--output-dir", str(home / "run")]
    assert main(words) == 0
    return home / "run"


@pytest.fixture(scope="module")
def shared(run: Path, home: Path) -> Path:
    words = ["share", str(run), "--license", "apache-2.0", "--dataset", "someone/clips", "--out", str(home / "shared")]
    assert main(words) == 0
    return home / "shared"


def texts_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_has_what_a_reader_needs_and_nothing_else(shared: Path, run: Path) -> None:
    assert set(texts_of(shared)) == {
        *("README.md", "config.json", "model.safetensors", "loss.png", "sample.mp4", "sample.png"),
    }
    assert probe(shared / "sample.mp4").frames == 8
    with safe_open(shared / "model.safetensors", "pt") as f:
        assert all(name.startswith(("model.", "codec.")) for name in f.keys())  # noqa: SIM118
    ours, theirs = VideoPipeline.from_pretrained(run), VideoPipeline.from_pretrained(shared)
    for name, value in ours.model.network.state_dict().items():
        assert torch.equal(value, theirs.model.network.state_dict()[name])


def test_the_card_names_a_data_set_of_shards_once(run: Path, tmp_path: Path) -> None:
    manifests = []
    for n in range(3):
        manifests.append(str(tmp_path / f"clips-{n:05d}.jsonl"))
        Path(manifests[-1]).write_text('{"video": "a.mp4", "caption": "a", "license": "mit"}\n' * (n + 1))
    found = read_run(run)
    manifests[0] += ":2"
    record = found.record | {"options": found.record["options"] | {"manifest": manifests}}
    record["data"] = record["data"] | {"manifests": manifests}
    card = write_card(
        dataclasses.replace(found, record=record),
        "x",
        Publication("mit"),
        Contents("model"),
    )
    assert "| `--manifest` | `clips-00000.jsonl:2,clips-00001.jsonl (2 shards)` |" in card
    assert "| licences of the clips | mit: 6 |" in card


def test_the_card_is_read_by_the_hub_and_is_true(shared: Path) -> None:
    card = ModelCard.load(shared / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "titans-video",
        "tags": ["titans-video", "text-to-video", "image-to-video"],
        "pipeline_tag": "text-to-video",
        "datasets": ["someone/clips"],
        "widget": [{"text": "a red circle moving up", "output": {"url": "sample.mp4"}}],
    }
    for line in (
        "| rows trained on | 12 |",
        "| rows left out | 1 |",
        "| missing | 1 |",
        "| licences of the clips | cc-by-4.0: 5, not stated: 8 |",
        "| optimizer steps | 2 |",
        "| is it learning? | too early to say:",
        "| `--batch-size` | `2` |",
        "| video in one pass | 12 s |",
    ):
        assert line in card.text.replace("there is no such file.", ""), card.text


def test_the_code_of_the_card_runs(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shared, tmp_path / "shared")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (shared / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert probe(tmp_path / "video.mp4").frames == 8


def test_nothing_of_this_machine_is_in_the_folder(shared: Path, home: Path) -> None:
    for name, data in texts_of(shared).items():
        for word in (home.name, str(Path.home()) + "/", str(REPOSITORY)):
            assert word.encode() not in data, (name, word)


def test_a_relative_path_that_contains_the_working_folder_is_shared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setattr(Path, "cwd", lambda: Path("/srv/data"))
    (folder / "README.md").write_text("--manifest train/srv/data/clips.jsonl")
    sharing._refuse_leaks(folder, read_run(run))
    (folder / "README.md").write_text("--manifest /srv/data/clips.jsonl")
    with pytest.raises(WriteError, match="would share"):
        sharing._refuse_leaks(folder, read_run(run))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/data/someone/clips", "clips"),
        ("read /data/someone/a.mp4, then", "read a.mp4, then"),
        ("--manifest /a/b/c.jsonl=2,/d/e.jsonl", "--manifest c.jsonl=2,e.jsonl"),
        (r"C:\Users\Some One\run", "run"),
        (r"in C:\Users\me\run now", "in run now"),
        ("~/secret/run", "run"),
        ("../../someone/run", "run"),
        ("https://example.com/a/b", "https://example.com/a/b"),
        ("user/name and/or 3/4 a / b", "user/name and/or 3/4 a / b"),
        ("configs/sora/tiny.yaml", "configs/sora/tiny.yaml"),
        (f"token {TOKEN}", "token (removed)"),
    ],
)
def test_paths_and_keys_are_removed_from_texts(text: str, clean: str) -> None:
    assert without_paths(text) == clean


def test_a_secret_is_never_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "apache-2.0-is-my-key")
    monkeypatch.setattr(sharing, "write_card", lambda *_: f"key {os.environ['WANDB_API_KEY']}")
    with pytest.raises(WriteError, match=r"README\.md would share the value of WANDB_API_KEY"):
        sharing.share(run, tmp_path / "out", Publication("mit"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--license", "My Own"], "--license My Own"),
        (["--license", "other"], "--license-link"),
        ([], "--license is missing"),
        (["--license", "mit", "--to", "me"], "--to me"),
        (["--license", "mit", "--base-model", "/a/b"], "--base-model /a/b"),
        (["--license", "mit", "--dataset", "a b/c"], "--dataset a b/c"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["share", str(run), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_touched(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["share", str(run), "--license", "mit", "--out", str(tmp_path)]) == 2
    assert main(["share", str(tmp_path), "--license", "mit"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_names_of_the_hub() -> None:
    cached = "/x/hub/models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/snapshots/0a1b"
    assert name_on_the_hub(cached) == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert name_on_the_hub("weights/svd") is None
    assert name_on_the_hub(None) is None
    check_publication(Publication("other", "https://example.com/licence", "a/b", ("c/d",), "e/f"))
    with pytest.raises(ConfigError, match="no other licence takes one"):
        check_publication(Publication("mit", "https://example.com"))


def test_a_lora_is_shared_in_every_format(home: Path) -> None:
    base = make_wan(home / "weights" / "wan", "t2v-2.1")
    words = ["train", "lora", "--manifest", str(MOCK / "manifest.jsonl"), "--pretrained-model", str(base)]
    words += [
        "--height",
        "32",
        "--width",
        "32",
        "--num-frames",
        "5",
        "--rank",
        "2",
        "--max-steps",
        "1",
        "--parity-gate",
        "none",
        "--text-dtype",
        "fp32",
    ]
    assert main([*words, "--output-dir", str(home / "lora")]) == 0
    flags = ["--license", "mit", "--base-model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert main(["share", str(home / "lora"), *flags]) == 0
    folder = home / "lora-share"
    names = {"pytorch_lora_weights.safetensors", "comfyui.safetensors", "kohya.safetensors"}
    assert set(texts_of(folder)) == {*names, "README.md", "loss.png"}
    assert all(home.name.encode() not in data for data in texts_of(folder).values())
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "adapter")
    assert card.data.library_name == "diffusers"
    assert "The run has no sample videos" in card.text
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    assert pipeline.get_active_adapters()


def test_a_vae_is_shared(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pt", "checkpoint-*", "samples"))
    vae = tmp_path / "run" / "vae"
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "run"), "latent_channels": 4}))
    shutil.copyfile(REPOSITORY / "src/titans_video/assets/tiny/model.safetensors", vae / "model.safetensors")
    sharing.share(tmp_path / "run", tmp_path / "out", Publication("mit"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_name_or_path"] == "run"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag is None
    assert "vae" in card.data.tags


class Hub(BaseHTTPRequestHandler):
    """A hub that takes small files within the commit."""

    files: dict[str, bytes]
    asked: list[tuple[str, Any]]

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer: Any = {
                "commitUrl": "https://huggingface.co/me/model/commit/0",
                "commitOid": "0" * 40,
                "success": True,
            }
        else:
            asked = json.loads(body)
            self.asked.append((self.path, asked))
            answer = {"url": "https://huggingface.co/me/model", "name": "me/model", "id": "0"}
            if self.path.endswith("/preupload/main"):
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]
                answer = {"files": files}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, at which huggingface_hub looks."""
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_folder_is_uploaded_on_request(run: Path, tmp_path: Path, hub: type[Hub], capsys: Any) -> None:
    words = ["share", str(run), "--license", "mit", "--to", "me/model", "--private", "--out", str(tmp_path / "m")]
    assert main(words) == 0
    assert hub.files == texts_of(tmp_path / "m")
    (path, created) = hub.asked[0]
    assert path == "/api/repos/create"
    assert (created["name"], created["organization"]) == ("model", "me")
    assert created.get("private") or created.get("visibility") == "private"
    assert b'snapshot_download("me/model")' in hub.files["README.md"]
    assert "me/model" in capsys.readouterr().out


def test_an_upload_that_fails_keeps_the_folder(
    run: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    words = ["share", str(run), "--license", "mit", "--to", "me/model", "--out", str(tmp_path / "m")]
    assert main(words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert "hf upload me/model" in error
    assert (tmp_path / "m" / "README.md").is_file()
