"""Captions, compared with transformers' own `generate` called by hand on the frames at the right times."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.factories import make_captioner
from tests.unit.media_clips import encode, moving_bars
from titans_video.captioning import run
from titans_video.captioning.captioner import Caption, Captioner, ClipFrames
from titans_video.captioning.run import finish_interrupted, write_captions
from titans_video.cli.main import main
from titans_video.config.generation import CaptionOptions
from titans_video.errors import ConfigError
from titans_video.media.probe import probe
from titans_video.media.reading import read_indices

FAMILIES = ("Qwen2_5_VL", "Llava")
needs_pictures = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.5") and not transformers.utils.is_torchvision_available(),
    reason="transformers before 5.5 prepares pictures with torchvision only",
)
PROMPT = "a red circle moving right"
SIZES = ((56, 84), (84, 56), (60, 60))
NEW = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_captioner(family, tmp_path_factory.mktemp(family) / "tiny") for family in FAMILIES}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three clips of 24 frames at 8 frames per second; the second row is a part of its clip."""
    lines: list[dict[str, Any]] = []
    for i, size in enumerate(SIZES):
        encode(tmp_path / f"{i}.mp4", moving_bars(24, *size)[:, :, :: 1 - 2 * (i % 2)], fps=8)
        lines.append({"video": f"{i}.mp4", "fresh": {"n": i}})
    lines[1] |= {"start": 1.0, "end": 2.0, "caption": " "}
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def frames_by_hand(path: Path, numbers: Sequence[int]) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in read_indices(path, probe(path), numbers)]


def caption_by_hand(family: str, folder: Path, images: list[Image.Image]) -> str:
    """Call the image processor, the tokenizer and `generate`, without a processor and a batch."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # In older versions `transformers.AutoImageProcessor` needs torchvision.
    pictures = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    if family == "Llava":  # (28 / 14)^2 patches a picture
        text = "user: " + f"{'<image>' * 4}\n" * len(images) + f"{PROMPT} assistant:"
    else:  # four patches are merged into one token
        counts = (pictures["image_grid_thw"].prod(1) // 4).tolist()
        marks = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in counts)
        text = f"<|im_start|>user\n{marks}{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = {"mm_token_type_ids": (ids == model.config.image_token_id).int()} if family != "Llava" else {}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=mask, **pictures, **kinds, max_new_tokens=NEW, do_sample=False
        )
    return " ".join(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).split())


@needs_pictures
@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_those_of_generate(family: str, models: dict[str, Path], manifest: Path) -> None:
    """In one batch of clips of different sizes, only the rows without a caption, and nothing else in the file."""
    before = [json.loads(line) for line in manifest.read_text().splitlines()]
    # The middles of four equal parts: of 3 s, frame 3 is on screen at 0.375 s; of 1 s from 1 s on, frame 9 at 1.125 s.
    numbers = [[3, 9, 15, 21], [9, 11, 13, 15], [3, 9, 15, 21]]
    expected = [
        caption_by_hand(family, models[family], frames_by_hand(manifest.parent / f"{i}.mp4", numbers[i]))
        for i in range(3)
    ]
    assert len(set(expected)) == 3, "the text does not depend on the clip, so the test shows nothing"
    words = ["--model", str(models[family]), "--prompt", PROMPT, "--frames", "4", "--max-new-tokens", str(NEW)]
    assert main(["caption", str(manifest), *words, "--batch-size", "3", "--device", "cpu"]) == 0
    after = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["caption"] for row in after] == expected
    assert after == [row | {"caption": text, "caption_by": "tiny"} for row, text in zip(before, expected, strict=True)]
    assert sorted(p.name for p in manifest.parent.iterdir()) == ["0.mp4", "1.mp4", "2.mp4", "manifest.jsonl"]


class FakeCaptioner:
    """Names the number of the first frame that it sees and counts its calls; dies after `lives` of them."""

    name, device, sees_video = "fake", "cpu", False

    def __init__(self, lives: int = 10**6) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.lives = lives

    def describe(self, clips: Sequence[ClipFrames]) -> list[Caption]:
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        self.seen += [clip.pixels.shape[1:3] for clip in clips]
        return [Caption(f"{clip.pixels.shape[1]} high", False) for clip in clips]


def use(fake: FakeCaptioner, monkeypatch: pytest.MonkeyPatch) -> FakeCaptioner:
    monkeypatch.setattr(run, "load_captioner", lambda options: fake)
    return fake


@pytest.mark.parametrize("out", [None, "new.jsonl"])
def test_a_kill_at_any_instant_keeps_finished_captions(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    """A kill leaves the journal torn at any byte; the next start keeps its whole lines and writes the rest."""
    options = CaptionOptions(str(manifest), "fake", out=out and str(manifest.parent / out))
    use(FakeCaptioner(lives=2), monkeypatch)
    with monkeypatch.context() as killed:
        killed.setattr(run.Journal, "finish", lambda *_: None)  # a process that is killed runs no `finally`
        with pytest.raises(KeyboardInterrupt):
            write_captions(options)
    target = manifest.parent / (out or manifest.name)
    journal, source = target.with_name(f"{target.name}.captions"), manifest.read_bytes()
    whole = journal.read_bytes()
    assert whole.count(b"\n") == 2
    assert (target == manifest) or not target.exists()
    expected = [json.loads(line) | {"caption": f"{h} high", "caption_by": "fake"}
                for line, (h, _) in zip(source.splitlines(), SIZES, strict=True)]  # fmt: skip
    for length in {*range(0, len(whole), 23), whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1, len(whole)}:
        journal.write_bytes(whole[:length])
        manifest.write_bytes(source)
        target.unlink() if out and target.exists() else None
        fake = use(FakeCaptioner(), monkeypatch)
        write_captions(options)
        assert [json.loads(line) for line in target.read_text().splitlines()] == expected, length
        kept = sum(whole[:length].count(end) for end in (b"}\n",)) + whole[:length].endswith(b"}")
        assert len(fake.seen) == 3 - kept, length
        assert not journal.exists()
        assert not out or manifest.read_bytes() == source


def test_an_interruption_moves_the_captions_into_the_manifest(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the user changed, added or captioned in the meantime stay as they are."""
    use(FakeCaptioner(lives=2), monkeypatch)
    describe = FakeCaptioner.describe

    def and_edit(self: FakeCaptioner, clips: Sequence[ClipFrames]) -> list[Caption]:
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        rows[-1]["caption"] = "mine"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in ({"video": "0.mp4", "end": 1}, *rows[-3:])))
        return describe(self, clips)

    monkeypatch.setattr(FakeCaptioner, "describe", and_edit)
    with pytest.raises(KeyboardInterrupt):
        write_captions(CaptionOptions(str(manifest), "fake"))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row.get("caption") for row in rows] == [None, "56 high", "84 high", "mine"]
    assert finish_interrupted(manifest) == 0


def test_a_new_manifest_and_all_rows(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["caption"] = "mine"
    manifest.write_text(json.dumps(rows))  # a JSON list
    source, out = manifest.read_bytes(), manifest.parent / "new.json"
    use(FakeCaptioner(), monkeypatch)
    options = CaptionOptions(str(manifest), "fake", out=str(out), all=True, caption_prefix="sks, ")
    with pytest.raises(ConfigError, match=r"--all .* --out"):
        write_captions(CaptionOptions(str(manifest), "fake", all=True))
    with pytest.raises(ConfigError, match="must be in the same folder"):
        write_captions(CaptionOptions(str(manifest), "fake", out=str(out.parent.parent / "new.json")))
    assert write_captions(options).written == 3
    assert [row["caption"] for row in json.loads(out.read_text())] == [f"sks, {h} high" for h, _ in SIZES]
    assert manifest.read_bytes() == source
    with pytest.raises(ConfigError, match="exists"):
        write_captions(options)


def test_clips_that_cannot_be_described(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named, their rows stay, and the others get their captions."""
    (manifest.parent / "1.mp4").write_bytes(b"not a video")
    fake = use(FakeCaptioner(), monkeypatch)
    describe = FakeCaptioner.describe

    def refuse(self: FakeCaptioner, clips: Sequence[ClipFrames]) -> list[Caption]:
        if any(clip.pixels.shape[1] == 60 for clip in clips):
            raise ValueError("an odd shape")
        return describe(self, clips)

    monkeypatch.setattr(FakeCaptioner, "describe", refuse)
    assert main(["caption", str(manifest), "--model", "fake", "--batch-size", "3"]) == 1
    said = capsys.readouterr().out
    assert "1 caption written" in said
    assert "line 2" in said
    assert "1.mp4" in said
    assert "line 3" in said
    assert "an odd shape" in said
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row.get("caption") for row in rows] == ["56 high", " ", None]
    assert len(fake.seen) == 1
    assert main(["caption", str(manifest), "--model", "fake"]) == 2  # the model accepts nothing that is left


@needs_pictures
def test_what_is_not_a_captioner_is_an_error(models: dict[str, Path], manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model, match in (("empty", "cannot be loaded"), ("./nowhere", "no such folder"), ("a/b", "hub access is off")):
        name = str(tmp_path / model) if model == "empty" else model
        with pytest.raises(ConfigError, match=f"--model .*{match}"):
            write_captions(CaptionOptions(str(manifest), name, device="cpu"))
    if not transformers.utils.is_torchvision_available():
        with pytest.raises(ConfigError, match=r"--input video.*torchvision"):
            write_captions(CaptionOptions(str(manifest), str(models["Qwen2_5_VL"]), input="video", device="cpu"))


def test_a_caption_that_reached_the_limit_is_reported(models: dict[str, Path]) -> None:
    captioner = Captioner(
        CaptionOptions(model=str(models["Llava"]), max_new_tokens=3), torch.float32, torch.device("cpu")
    )
    clip = ClipFrames(np.zeros((1, 28, 28, 3), np.uint8), (0,), 1, 8.0)
    assert captioner.describe([clip])[0].is_cut == True  # noqa: E712
    captioner.model.generation_config.eos_token_id = list(range(320))  # any token ends the text
    assert not captioner.describe([clip])[0].is_cut
