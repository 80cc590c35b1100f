"""`titans-video init`: the manifest of every form of data, settings that suit the clips, and nothing else changed."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.factories import make_svd, make_vae
from tests.unit.data_sets import write_clip
from tests.unit.scenes import scene
from tests.unit.test_data_importing import FOLDERS, REFUSED, Files, make
from tests.wan_pipelines import make_wan
from titans_video.cli import init
from titans_video.cli.init import CONFIG, MANIFEST, REPORT, InitFlags, config_text, plan_for
from titans_video.cli.main import main
from titans_video.config.options import DataOptions
from titans_video.config.parse import parse
from titans_video.config.recipes import SoraOptions
from titans_video.data.manifest import read_rows
from titans_video.data.starting import Captions, Facts, Target, choose, import_rows, write_manifest
from titans_video.media.writing import write_video
from titans_video.parsing import read_json_lines
from titans_video.types import CodecSpec

WAN = CodecSpec("wan", 16, (4, 8, 8), "causal")
TILES = CodecSpec("patch", 96, (8, 4, 4), "blocks")
NOISE = np.random.default_rng(0)


@pytest.mark.parametrize(("files", "expected"), FOLDERS.values(), ids=FOLDERS)
def test_the_manifest_of_each_form(tmp_path: Path, files: Files, expected: dict[str, str]) -> None:
    """The written manifest has the same rows, with the same ids, as the form that it was made from."""
    folder = make(tmp_path / "clips", files)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    imported = import_rows(folder, DataOptions(), Captions())
    write_manifest(tmp_path / "clips" / "new.jsonl", imported.lines)
    rows = list(read_rows(DataOptions(manifest=(str(folder / "new.jsonl"),))))
    assert {row.video.relative_to(folder).as_posix(): row.caption for row in rows} == expected
    assert [replace(row, source=("", 0)) for row in rows] == [replace(row, source=("", 0)) for row in imported.rows]
    for line in read_json_lines(folder / "new.jsonl"):
        file, _, number = line["origin"].partition(", line ")
        assert (folder / file).is_file()
        assert not number or int(number) > 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "kind", ["an empty folder", "duplicate stems", "table and file differ", "a broken line of a table"]
)
def test_data_that_is_refused_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    files, words = REFUSED[kind]
    folder = tmp_path / "clips"
    folder.mkdir()
    before = sorted(make(folder, files).rglob("*"))
    assert main(["init", str(folder), "--no-open"]) == 2
    assert re.search(f"(?s)Error: .*{words}", capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before


@dataclass(frozen=True)
class Finished:
    folder: Path
    output: str
    opened: list[str]
    before: dict[Path, tuple[bytes, int]]


def state(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run on five clips of three shapes, with captions in two forms, and an image; with a display."""
    folder = tmp_path_factory.mktemp("data") / "my clips 猫"
    folder.mkdir()
    for row, size in enumerate([(48, 64), (48, 64), (64, 36), (48, 48), (48, 64)]):
        write_clip(folder / f"{row} ä.mp4", row, size, frames=12)
    Image.new("RGB", (64, 64)).save(folder / "thumb.png")
    files = {
        "0 ä.txt": "grey 0",
        "1 ä.mp4.txt": "grey 1",
        "t.csv": "file,text\n2 ä.mp4,grey 2\n3 ä.mp4,grey 3\n",
        "x.txt": "?",
    }
    before = state(make(folder, files))
    opened: list[str] = []
    out = folder.parent / "printed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init.webbrowser, "open", opened.append)
        patch.setattr(init, "_has_display", lambda: True)
        patch.setattr(init, "write_line", lambda text, stream: out.open("a").write(text + "\n"))
        assert main(["init", str(folder), "--trigger", "ohwx", "--lr", "1e-3", "--max-steps", "7"]) == 0
    return Finished(folder, out.read_text(), opened, before)


def test_clips_are_not_changed_and_files_are_written(finished: Finished) -> None:
    now = state(finished.folder)
    assert {path: now[path] for path in finished.before} == finished.before
    made = {path.relative_to(finished.folder).parts[0] for path in now} - {p.name for p in finished.before}
    assert made == {MANIFEST, CONFIG, REPORT}
    assert finished.opened == [(finished.folder / REPORT / "report.html").resolve().as_uri()]


def test_the_output_names_what_was_found_and_what_to_do(finished: Finished) -> None:
    text = finished.output
    assert "Imported 5 rows: 2 from t.csv, 2 from *.txt, 1 from *.mp4." in text
    assert "1 clip of 5 without a caption: 4 ä.mp4." in text
    assert "1 caption file without a clip: x.txt" in text
    assert "1 image without a caption among the videos: not used (thumb.png)" in text
    assert f"titans-video caption '{finished.folder / MANIFEST}'" in text
    assert text.rstrip().endswith(f"Next        titans-video train --config '{finished.folder / CONFIG}'")
    assert "Data: 4 of 5 rows usable" in text
    assert re.search(r"^Buckets +shape +frames +rows +batch", text, re.MULTILINE)


def test_the_configuration_is_complete(finished: Finished) -> None:
    path = finished.folder / CONFIG
    options = parse(SoraOptions(), ["--config", str(path)], prog="train")
    data = options.data
    assert data.manifest == (str((finished.folder / MANIFEST).resolve()),)
    assert (data.buckets, data.resolution, data.num_frames, data.fps, data.batch_size) == ("auto", 64, 9, 8, 8)
    assert (options.train.lr, options.train.max_steps, options.model.preset) == (1e-3, 7, "tiny")
    assert options.train.output_dir == "outputs/my clips 猫"
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert len(comments) > 8
    assert "9 frames at 8 per second are 1.12 s; 5 of 5 videos have them." in " ".join(c.strip("# ") for c in comments)
    rows = list(read_rows(data))
    assert sorted(row.caption for row in rows) == ["", *(f"ohwx, grey {i}" for i in range(4))]


def test_existing_files_are_only_replaced_with_force(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished.folder
    manifest = (folder / MANIFEST).read_text(encoding="utf-8")
    assert main(["init", str(folder), "--no-open"]) == 2
    assert f"already has {CONFIG} and {REPORT} and {MANIFEST}. --force replaces" in capsys.readouterr().err
    (folder / "4 ä.txt").write_text("grey 4")
    try:
        assert main(["init", str(folder), "--no-open", "--force", "--caption-prefix", "A film:"]) == 0
    finally:
        (folder / "4 ä.txt").unlink()
    captions = {line["video"]: line["caption"] for line in read_json_lines(folder / MANIFEST)}
    assert captions["4 ä.mp4"] == "A film: grey 4"
    assert captions["0 ä.mp4"] == "A film: grey 0"  # from its own file, and not from the earlier manifest
    assert (folder / f"{MANIFEST}.bak").read_text(encoding="utf-8") == manifest
    assert (folder / f"{CONFIG}.bak").is_file()


def test_every_earlier_file_is_kept(tmp_path: Path) -> None:
    for text in "abc":
        (tmp_path / MANIFEST).write_text(text)
        init._keep_earlier(tmp_path / MANIFEST)
    kept = [(tmp_path / f"{MANIFEST}.bak{number}").read_text() for number in ("", ".2", ".3")]
    assert kept == ["a", "b", "c"]


def test_a_manifest_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        "titans_video.data.starting.look_at_clips", lambda rows, options: facts([(64, 64)], [2.0], [8.0])
    )
    monkeypatch.setattr(init, "_report", lambda *args: written.append(args[3]) or 0)
    make(tmp_path, {"a.mp4": "", "m.jsonl": '{"video": "a.mp4", "caption": "a cat"}'})
    assert main(["init", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert written == [tmp_path / "m.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG]
    make(tmp_path, {"t/b.mp4": "", "t/t.csv": "path,text\nb.mp4,x"})
    assert main(["init", str(tmp_path / "t" / "t.csv"), "--out", str(tmp_path / "o2")]) == 0
    settings = yaml.safe_load((tmp_path / "o2" / CONFIG).read_text(encoding="utf-8"))
    assert (settings["manifest"], settings["data_root"]) == (str(tmp_path / "o2" / MANIFEST), str(tmp_path / "t"))


def facts(sizes: list[tuple[int, int]], seconds: list[float], rates: list[float]) -> Facts:
    frames = [round(s * r) for s, r in zip(seconds, rates, strict=True)]
    return Facts(np.array(sizes), np.array(seconds), np.array(rates), np.array(frames))


@pytest.mark.parametrize(
    ("found", "target", "spec", "chosen"),
    [
        # resolution, frames, rate and batch of clips that are large and long enough
        (facts([(480, 854)] * 40, [5.0] * 40, [30.0] * 40), Target(256, 33, 16, 4), WAN, (256, 33, 16, 4)),
        # most clips last 1.5 s: 24 frames at 16 a second, and 21 is the next legal number
        (facts([(480, 854)] * 40, [1.5] * 40, [30.0] * 40), Target(256, 33, 16, 4), WAN, (256, 21, 16, 4)),
        # up to a tenth of the clips may be shorter and smaller
        (facts([(480, 854)] * 38 + [(64, 64)] * 2, [5.0] * 38 + [0.5] * 2, [30.0] * 40), Target(256, 33, 16, 4), WAN,
         (256, 33, 16, 4)),
        # small clips are not enlarged
        (facts([(144, 176)] * 9, [5.0] * 9, [30.0] * 9), Target(480, 49, 16, 1), WAN, (128, 49, 16, 1)),
        # but up to the least size of the codec
        (facts([(48, 40)] * 9, [5.0] * 9, [30.0] * 9), Target(64, 9, 8, 8, least=64), WAN, (64, 9, 8, 8)),
        # a slow rate is not raised, because frames would only be repeated
        (facts([(480, 854)] * 9, [9.0] * 9, [6.0] * 9), Target(256, 33, 16, 4), WAN, (256, 33, 6, 4)),
        # half a second at 8 a second has 4 frames, so more of its 24 are read
        (facts([(480, 854)] * 9, [0.5] * 9, [24.0] * 9), Target(32, 8, 8, 32), TILES, (32, 8, 16, 16)),
        # images
        (facts([(480, 854)] * 3, [0.04] * 3, [25.0] * 3), Target(256, 33, 16, 4), WAN, (256, 1, 16, 4)),
    ],
)  # fmt: skip
def test_settings_suit_the_clips(found: Facts, target: Target, spec: CodecSpec, chosen: tuple[float, ...]) -> None:
    choice = choose(found, target, spec, 1)
    assert (choice.resolution, choice.num_frames, choice.fps, choice.batch_size) == chosen


@pytest.mark.parametrize(
    ("captions", "before", "after"),
    [
        (Captions("ohwx"), "a cat", "ohwx, a cat"),
        (Captions("ohwx"), "an OHWX cat", "an OHWX cat"),
        (Captions("cat"), "a catalogue", "cat, a catalogue"),
        (Captions(None, "In oil: "), "a cat", "In oil: a cat"),
        (Captions("ohwx", "In oil,"), "a cat", "ohwx, In oil, a cat"),
        (Captions("ohwx", "In oil,"), "", ""),
    ],
)
def test_trigger_and_prefix(captions: Captions, before: str, after: str) -> None:
    assert captions.changed(before) == after


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"buckets": "auto", "resolution": 64, "max_crop": 0.1}),
        ("--resolution 96 --max-crop 0.2", {"buckets": "auto", "resolution": 96, "max_crop": 0.2}),
        ("--buckets auto", {"buckets": "auto", "resolution": 64}),
        ("--buckets 32x32,32x64", {"buckets": "32x32,32x64", "resolution": None}),
        ("--height 32 --width 64", {"height": 32, "width": 64, "buckets": None, "resolution": None}),
        ("--tokens-per-batch 99", {"tokens_per_batch": 99, "batch_size": None}),
        ("--preset S --betas 0.9,0.95", {"preset": "S", "betas": [0.9, 0.95], "time_mean": 0.9}),
        ("--num-frames 16 --fps 12 --random-start", {"num_frames": 16, "fps": 12, "random_start": True}),
    ],
)
def test_given_flags_are_in_the_file(tmp_path: Path, flags: str, expected: dict[str, object]) -> None:
    words = flags.split()
    options = parse(InitFlags(), words, prog="init")
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    plan = plan_for(options, given)
    choice = choose(facts([(64, 64)] * 3, [2.0] * 3, [24.0] * 3), Target(64, 8, 8, 8), plan.spec, 1)
    text = config_text(options, given, plan, choice, tmp_path / MANIFEST, tmp_path)
    settings = yaml.safe_load(text)
    assert {name: settings.get(name) for name in expected} == expected
    (tmp_path / CONFIG).write_text(text)
    parse(SoraOptions(), ["--config", str(tmp_path / CONFIG)], prog="train")


def test_sizes_that_do_not_work_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "titans_video.data.starting.look_at_clips", lambda rows, options: facts([(64, 64)], [2.0], [8.0])
    )
    make(tmp_path, {"a.mp4": "", "a.txt": "a cat"})
    assert main(["init", str(tmp_path), "--resolution", "16"]) == 2
    assert "--buckets auto: with --resolution 16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.txt"]


@pytest.mark.parametrize("kind", ["wan", "kl", "svd"])
def test_the_recipe_follows_the_pretrained_model(tmp_path: Path, kind: str) -> None:
    """The clips are as large and as long as the model takes them, and its command reads the configuration."""
    folder, rows = tmp_path / kind, facts([(1080, 1920)] * 9, [9.0] * 9, [30.0] * 9)
    writers = {
        "wan": lambda: make_wan(folder, "t2v-2.1"),
        "kl": lambda: make_vae("kl", folder),
        "svd": lambda: make_svd(folder),
    }
    writers[kind]()
    given = parse(InitFlags(), ["--pretrained-model", str(folder)], prog="init")
    plan = plan_for(given, {"pretrained_model"})
    choice = choose(rows, plan.target, plan.spec, plan.patch_size[0])
    (tmp_path / CONFIG).write_text(
        config_text(given, {"pretrained_model"}, plan, choice, tmp_path / MANIFEST, tmp_path)
    )
    options = parse(plan.options, ["--config", str(tmp_path / CONFIG)], prog=plan.command)
    expected = {"wan": ("train lora", 16, 49), "kl": ("train", 16, 32), "svd": ("train svd", 7, 14)}[kind]
    assert (plan.command, options.data.fps, options.data.num_frames) == expected
    assert plan.spec.is_legal(options.data.num_frames, plan.patch_size[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init"], "The clips are missing. Use `titans-video init FOLDER`"),
        (["init", "no-such"], "no-such: there is no such folder or file"),
        (["init", ".", "--manifest", "m.jsonl"], "--manifest: titans-video init writes it"),
        (["init", ".", "--config", "a.yaml"], "--config"),
    ],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_cut_gives_each_shot_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "clips", {"a.txt": "two scenes", "b.txt": "one"})
    two = np.concatenate([scene(1, 16, 0.5, 64), scene(2, 20, 0.5, 64)])
    for name, frames in (("a", two), ("b", scene(3, 16, 0.5, 64))):
        write_video(folder / f"{name}.mp4", frames, fps=8)
    before = state(folder)
    assert main(["init", str(folder), "--cut", "--no-open"]) == 0
    assert {path: now for path, now in state(folder).items() if path in before} == before
    output = capsys.readouterr().out
    assert "Shots: 1 of 2 rows cut into 2 (1 cut)." in output
    assert "Each shot has the caption of its whole clip" in output
    rows = read_rows(DataOptions(manifest=(str(folder / MANIFEST),)))
    found = [(row.video.name, row.start, row.end, row.caption) for row in rows]
    assert found == [
        ("a.mp4", 0.0, 2.0, "two scenes"),
        ("a.mp4", 2.0, None, "two scenes"),
        ("b.mp4", 0.0, None, "one"),
    ]
    assert {path.suffix for path in folder.glob("*")} == {"", ".mp4", ".txt", ".jsonl", ".yaml"}
