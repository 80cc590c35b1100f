"""`titans-video demo` and `score` from end to end: tiny runs in real processes, their files and figures checked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from titans_video.cli.generate import main_demo, main_score
from titans_video.config.generation import DemoOptions
from titans_video.demo import scoring
from titans_video.demo.run import training_command
from titans_video.errors import ConfigError, DataError
from titans_video.mock.world import COLOURS, HELD_OUT, SEEN, SHAPES, Combination, sample_clip

SCORES = {"colour", "direction", "shape", "shape_strict", "all", "videos"}


@pytest.fixture(autouse=True)
def in_the_repository(repository, monkeypatch):
    """Run the demo in the repository, whose files it uses."""
    monkeypatch.chdir(repository)


@pytest.fixture
def small_config(repository, tmp_path) -> Path:
    """The tiny preset with a narrower network and a smaller batch."""
    import yaml

    values = yaml.safe_load((repository / "configs" / "sora" / "tiny.yaml").read_text())
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values | {"batch_size": 8, "depth": 1, "model_dim": 32, "lr_warmup_steps": 1}))
    return path


def run(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the function of the console script in another process, in the root of the repository."""
    code = "import sys; from titans_video.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(repository / "src")}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_writes_everything_that_it_names_twice(repository, tmp_path, small_config):
    out = tmp_path / "demo"
    words = ["demo", "--quick", "--output-dir", str(out), "--train-config", str(small_config)]
    first = run(repository, *words, "--processes", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "accelerate launch" in first.stdout
    named = [Path(path) for path in re.findall(r"^  (?:[\w ]+?)\s{2,}(\S*demo\S*)$", first.stdout, flags=re.MULTILINE)]
    assert {p.name for p in named} >= {"videos", "contact_sheet.png", "loss_curve.png", "report.html", "scores.json"}
    assert all(path.exists() for path in named)
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {*scoring.TEXT_SPLITS, *scoring.IMAGE_SPLITS}
    assert all(set(scores[split]) == SCORES for split in scoring.TEXT_SPLITS)
    assert all(set(scores[split]) == SCORES | {"kept", "place", "continues"} for split in scoring.IMAGE_SPLITS)
    assert all(0 <= scores[split][name] <= 1 for split in scores for name in SCORES - {"videos"})
    assert len(list((out / "videos").glob("*/*.mp4"))) == sum(scores[split]["videos"] for split in scores) == 24
    page = (out / "report.html").read_text()
    assert all((out / source).is_file() for source in re.findall(r"src='?([^' >]+)", page))

    (out / "notes.txt").write_text("mine")
    command = ["-m", "titans_video.cli.main"]
    processes.run(*command, *words, "--processes", "1", cwd=repository)
    assert (out / "notes.txt").read_text() == "mine"

    score = ["score", "--checkpoint", str(out / "run"), "--videos", "2", "--steps", "2", "--out", str(tmp_path / "s")]
    processes.run(*command, *score, cwd=repository)
    assert set(json.loads((tmp_path / "s" / "scores.json").read_text())) == {*scoring.TEXT_SPLITS}


def test_two_processes_share_the_batch(small_config, tmp_path):
    single = training_command(DemoOptions(train_config=str(small_config), processes=1), tmp_path)
    shared = training_command(DemoOptions(train_config=str(small_config), processes=2), tmp_path)
    assert "--batch-size" not in single.words
    assert shared.words[shared.words.index("--batch-size") + 1] == "4"
    assert shared.text.startswith("OMP_NUM_THREADS=")
    with pytest.raises(ConfigError, match="cannot be shared"):
        training_command(DemoOptions(train_config=str(small_config), processes=3), tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--videos", "0"], "--videos 0"),
        (["--train-config", "nowhere.yaml"], "nowhere.yaml"),
        (["--stepz", "3"], "--steps"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        main_demo(["--output-dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_other_folders_are_not_touched(tmp_path, small_config):
    (tmp_path / "mine" / "videos").mkdir(parents=True)
    holiday = tmp_path / "mine" / "videos" / "holiday.mp4"
    holiday.write_bytes(b"mine")
    with pytest.raises(DataError, match="nothing in it was touched"):
        main_demo(["--output-dir", str(tmp_path / "mine"), "--train-config", str(small_config)])
    assert holiday.exists()


def test_score_reports_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="--steps 0"):
        main_score(["--steps", "0", "--out", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()


def scored(split: scoring.Split, wanted: Combination, shown: Combination, near: bool | None = None) -> scoring.Scored:
    """Score a perfect clip of `shown` as the video of a prompt for `wanted`."""
    pool = SEEN if shown in SEEN else HELD_OUT
    index = next(i for i in range(len(pool)) if sample_clip(0, i, held_out=pool is HELD_OUT).combination == shown)
    frames = sample_clip(0, index, held_out=pool is HELD_OUT).frames
    return scoring.Scored(split, wanted, wanted.caption, scoring.analyse(frames), Path("x.mp4"), frames, near)


def test_shares_are_counted_by_word():
    wanted = Combination("red", "circle", "left")
    shown = [
        wanted,
        Combination("green", "circle", "left"),
        Combination("red", "square", "left"),
        Combination("red", "circle", "up"),
    ]
    shares = scoring.summary([scored("seen", wanted, each) for each in shown])
    assert shares == {"colour": 0.75, "shape": 0.75, "direction": 0.75, "shape_strict": 0.75, "all": 0.25, "videos": 4}


def test_continuing_counts_colour_shape_and_place():
    wanted = Combination("blue", "triangle", "down")
    videos = [scored("i2v", wanted, wanted, near) for near in (True, True, False)]
    videos.append(scored("i2v", wanted, Combination("blue", "square", "down"), True))
    shares = scoring.summary(videos)
    assert (shares["kept"], shares["place"], shares["continues"], shares["all"]) == (0.75, 0.75, 0.5, 0.75)


@pytest.mark.parametrize("wanted", [Combination("red", "circle", "left"), HELD_OUT[0], SEEN[17]])
def test_prompts_of_a_split_say_what_it_is_called(wanted):
    for index in range(30):
        said = {split: scoring.prompt_of(split, wanted, 3, index) for split in scoring.IMAGE_SPLITS}
        assert said["i2v"] == wanted.caption
        neutral = said["neutral"].lower()
        assert not any(word in neutral for word in (*COLOURS, *SHAPES))
        other = said["contradicting"].split()
        assert (other[1] in COLOURS, other[2] in SHAPES, other[4]) == (True, True, wanted.direction)
        assert wanted.colour != other[1]
        assert wanted.shape != other[2]
        assert said["contradicting"] not in {k.caption for k in HELD_OUT}
