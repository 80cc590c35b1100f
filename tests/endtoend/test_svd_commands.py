"""Fine-tuning Stable Video Diffusion as a person types it: the documented commands, sizes scaled down by flags."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from tests import factories, processes
from tests.endtoend.test_sora_commands import frames_of, metrics, run
from tests.unit.svd_parts import picture, pipeline_video
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.codecs.base import build_codec
from titans_video.config.generation import Overrides
from titans_video.config.parse import parse
from titans_video.config.recipes import SVDOptions
from titans_video.data.dataset import open_data
from titans_video.data.held_out import HeldOut
from titans_video.generation.denoise import frame_noise, generate
from titans_video.generation.image_conditioning import NOISE
from titans_video.generation.model import load_model
from titans_video.generation.request import Request
from titans_video.media.colour import to_tensor
from titans_video.media.writing import write_video
from titans_video.models.svd_unet import TextCrossAttention
from titans_video.recipes.setup import RunParts
from titans_video.recipes.svd import SVDRecipe, build_svd
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.text.base import build_text
from titans_video.types import Batch

BUCKETS = "28x48,48x28,14x24,24x14"
"""576x1024,1024x576,432x768,768x432 made small: two sizes of each aspect."""
DOCUMENTED = """--pretrained-model {svd} --output-dir {out}
  --buckets 576x1024,1024x576,432x768,768x432
  --batch-size 1 --grad-accum 4 --mixed-precision bf16"""
SCALED = f"--buckets {BUCKETS} --num-frames 4 --grad-accum 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("svd")


@pytest.fixture(scope="module")
def svd(folder: Path) -> Path:
    return factories.make_svd(folder / "svd")


@pytest.fixture(scope="module")
def clips(folder: Path) -> Path:
    """A manifest as documented: half t2v, half i2v, one with a picture of its own; wide and tall, large and small."""
    rows = []
    for i, (height, width) in enumerate([(28, 48), (48, 28), (14, 24), (24, 14)] * 2):
        rng = np.random.default_rng(i)
        scene = rng.integers(0, 255, (height + 8, width, 3), dtype=np.uint8)
        write_video(folder / f"videos/{i}.mp4", np.stack([scene[k : k + height] for k in range(6)]), fps=8)
        rows.append({"video": f"videos/{i}.mp4", "caption": f"scene {i}", "task": "i2v" if i >= 4 else "t2v"})
    (folder / "refs").mkdir()
    Image.fromarray(picture(48, 28)).save(folder / "refs/5.png")
    rows[5]["cond_image"] = "refs/5.png"
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(svd: Path, clips: Path, out: Path, more: str = "") -> list[str]:
    """The documented flags, then those that make them small: the last of each counts."""
    documented = shlex.split(DOCUMENTED.format(svd=svd, out=out))
    small = shlex.split(f"{SCALED} {more}")
    where = ["--manifest", str(clips), "--data-root", str(clips.parent)]
    given = set(small[::2])
    kept = [w for a, b in zip(documented[::2], documented[1::2], strict=True) if a not in given for w in (a, b)]
    return [*where, *kept, *small]


@pytest.fixture(scope="module")
def trained(svd: Path, clips: Path, folder: Path) -> Path:
    """A run of eight steps in one process, and the sizes and tasks of its micro-batches."""
    out, seen, loss = folder / "trained", [], SVDRecipe.loss

    def look(self: SVDRecipe, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        assert batch.pixels is not None
        if torch.is_grad_enabled():  # not the trial of the weights before a save
            seen.append([*batch.pixels.shape[-2:], *batch.tasks])
        return loss(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SVDRecipe, "loss", look)
        more = "--batch-size 2 --max-steps 8 --mixed-precision no --lr 1e-3 --ema-decay 0.5 --save-every 4"
        assert main(["train", "svd", *words(svd, clips, out, more)]) == 0
    (out / "seen.json").write_text(json.dumps(seen))
    return out


def test_all_buckets_in_one_run_on_two_processes(
    repository: Path, svd: Path, clips: Path, trained: Path, tmp_path: Path
) -> None:
    """Every batch of one size, the same on both processes: equal to the run of one process, step by step."""
    seen = json.loads((trained / "seen.json").read_text())[1:]  # the first is the trial of the largest
    assert {(h, w) for h, w, *_ in seen} == {tuple(map(int, b.split("x"))) for b in BUCKETS.split(",")}
    assert all(seen[i][:2] == seen[i + 1][:2] for i in range(0, len(seen), 2))  # the two micro-batches of a step
    config = repository / "configs" / "accelerate" / "cpu2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    script = repository / "train" / "videos" / "train_video_accelerate.py"
    more = "--max-steps 8 --mixed-precision no --lr 1e-3 --ema-decay 0.5"
    done = processes.run(*launch, script, *words(svd, clips, tmp_path / "two", more), cwd=tmp_path)
    assert "Running on 2 processes" in done.stdout
    for one, two in zip(metrics(trained), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "elements", "loss_t2v", "rows_t2v", "loss_i2v", "rows_i2v"):
            assert one.get(name) == pytest.approx(two.get(name), rel=1e-3), name


def test_tasks_are_mixed_and_each_has_its_own_loss(trained: Path) -> None:
    lines = metrics(trained)
    rows = {task: sum(line.get(f"rows_{task}", 0) for line in lines) for task in ("t2v", "i2v")}
    total = sum(rows.values())
    assert total == 8 * 4
    assert abs(rows["i2v"] / total - 0.5) <= 4 * (0.25 / total) ** 0.5
    for line in lines:
        parts = [(line[f"loss_{task}"], line[f"rows_{task}"]) for task in ("t2v", "i2v") if f"rows_{task}" in line]
        assert line["loss"] == pytest.approx(sum(x * n for x, n in parts) / 4, rel=1e-4)


def test_the_documented_command(repository: Path, svd: Path, clips: Path, tmp_path: Path) -> None:
    """Word for word but for its sizes, in bf16, and gone on with; sharded on two processes."""
    script = repository / "train" / "videos" / "train_video_accelerate.py"
    config = repository / "configs" / "accelerate" / "cpu2_fsdp2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    flags = words(svd, clips, tmp_path / "out", "--max-steps 1 --gradient-checkpointing")
    flags.remove("--gradient-checkpointing")
    done = run(*launch, script, *flags, "--gradient-checkpointing", cwd=tmp_path)
    assert "FSDP2" in done.stdout
    AcceleratorState._reset_state(reset_partial_state=True)  # as a process of its own would begin
    again = words(svd, clips, tmp_path / "out", "--max-steps 2 --resume auto")
    assert main(["train", "svd", *again]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]


def test_a_resumed_run_is_the_run(svd: Path, clips: Path, trained: Path, tmp_path: Path) -> None:
    """Bit for bit: four steps, then four more."""
    more = "--batch-size 2 --mixed-precision no --lr 1e-3 --ema-decay 0.5 --save-every 4"
    for steps, resume in ((4, "none"), (8, "auto")):
        flags = words(svd, clips, tmp_path / "out", f"{more} --max-steps {steps} --resume {resume}")
        assert main(["train", "svd", *flags]) == 0
    for name in ("model.pt", "model_ema.pt"):
        one, two = (files.read(f / "checkpoint-8" / name).model for f in (trained, tmp_path / "out"))
        assert all(torch.equal(two[key], value) for key, value in one.items())


def test_a_run_from_a_cache_is_the_run(svd: Path, clips: Path, trained: Path, tmp_path: Path) -> None:
    """Pictures get the noise that they would have got; one frame of each is encoded, and nothing else."""
    more = f"--batch-size 2 --mixed-precision no --lr 1e-3 --ema-decay 0.5 --max-steps 2 --cache {tmp_path / 'cache'}"
    assert main(["train", "svd", *words(svd, clips, tmp_path / "out", more)]) == 0
    for one, two in zip(metrics(trained), metrics(tmp_path / "out"), strict=False):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_the_export_is_ours_without_text(svd: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(trained / "checkpoint-8" / "model.pt"), str(tmp_path / "exported")]) == 0
    assert "text branch is left out" in capsys.readouterr().out
    model = load_model(str(trained / "checkpoint-8" / "model.pt"), Overrides(), "cpu")
    assert any(bool(m.to_out.weight.any()) for m in model.network.modules() if isinstance(m, TextCrossAttention))
    seed, frames, height, width = 3, 4, 32, 48
    known = to_tensor(picture(height, width)[None])[None]
    request = Request([""], frames, height, width, [seed], steps=3, cond_pixels=known)
    ours = generate(model, request, progress=False)
    image_noise = seeded_randn((3, height, width), [derive_seed(seed, NOISE, 0)])
    noise = frame_noise((4, frames, height // 2, width // 2), [seed])
    theirs = pipeline_video(tmp_path / "exported", image_noise, noise, num_inference_steps=3).clamp(-1, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    before = pipeline_video(svd, image_noise, noise, num_inference_steps=3).clamp(-1, 1)
    assert (before - theirs).abs().max() > 1e-2  # it was trained
    spoken = Request(["scene 5"], frames, height, width, [seed], steps=3, cond_pixels=known)
    assert (generate(model, spoken, progress=False) - ours).abs().max() > 1e-4


def test_the_long_video_command(repository: Path, svd: Path, trained: Path, tmp_path: Path) -> None:
    """Of 192 frames, from a folder that was moved elsewhere."""
    script = repository / "train" / "videos" / "video_framework.py"
    flags = (
        f'infer --pretrained-model {svd} --checkpoint {trained}/checkpoint-8/model.pt --prompt "..." '
        "--height 16 --width 24 --fps 24 --num-frames 192 --window 32 --overlap 8 --out out_8s.mp4 --steps 2"
    )
    done = processes.run(script, *shlex.split(flags), cwd=tmp_path)
    assert frames_of(tmp_path / "out_8s.mp4") == (192, 16, 24)
    assert "blend" in done.stderr
    Image.fromarray(picture()).save(tmp_path / "p.png")
    small = f"--checkpoint {trained} --pretrained-model {svd} --image {tmp_path}/p.png --height 16 --width 24 --steps 2"
    chained = f"{small} --num-frames 20 --window 8 --out {tmp_path}/chained.mp4"
    assert main(["generate", *shlex.split(chained)]) == 0
    assert frames_of(tmp_path / "chained.mp4") == (20, 16, 24)


def test_the_loss_on_real_clips_falls(svd: Path, real_clips: Path, tmp_path: Path) -> None:
    """At fixed noise and times, of each task, against the pretrained weights."""
    rows = [json.loads(line) for line in (real_clips / "manifest.jsonl").read_text().splitlines()]
    chosen = [r for r in rows if r["video"] in ("bear_cage.mp4", "rooftop_pan.mp4", "letter_blocks.mp4")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))
    flags = "--height 24 --width 40 --num-frames 4 --fps 8 --max-steps 30 --lr 2e-3 --task-mix t2v=0.5,i2v=0.5"
    where = ["--manifest", str(tmp_path / "m.jsonl"), "--data-root", str(real_clips), "--pretrained-model", str(svd)]
    given = [*where, *shlex.split(flags), "--output-dir", str(tmp_path / "out")]
    assert main(["train", "svd", *given]) == 0
    options = parse(SVDOptions(), given, prog="")
    codec = build_codec(options.codec)
    data = open_data(options.data, codec.spec, (1, 1, 1), seed=0)
    parts = RunParts(data, None, codec, options.codec, build_text(options.text), None)
    recipe = build_svd(options, parts, torch.device("cpu"))
    held = HeldOut(data)

    def losses() -> dict[str, float]:
        found: dict[str, float] = {}
        for piece in held.pieces():
            sums, elements = recipe.held_out(recipe.network.eval(), held.read(piece)[0], (0.25, 0.5, 0.75))
            found[piece.task] = found.get(piece.task, 0.0) + float(sums.sum() / elements.sum())
        return found

    with torch.no_grad():
        before = losses()
        recipe.network.load_state_dict(files.read(tmp_path / "out").model)
        after = losses()
    assert before.keys() == {"t2v", "i2v"}
    assert all(after[task] < 0.8 * before[task] for task in before), (before, after)


@pytest.fixture(scope="module")
def vae_alone(svd: Path, folder: Path) -> Path:
    shutil.copytree(svd / "vae", folder / "alone" / "vae")
    return folder / "alone"


def test_a_folder_with_a_vae_alone_trains_sora_dit(
    vae_alone: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--max-steps 1 --mixed-precision no --preset tiny --num-frames 2 --buckets 16x24"
    assert main(["train", "svd", *words(vae_alone, clips, tmp_path / "out", more)]) == 0
    assert "has no unet/: SoraDiT is trained" in capsys.readouterr().out
    config = files.read(tmp_path / "out").config
    assert config["recipe"] == "sora"
    out = ["--steps", "1", "--out", str(tmp_path / "o.mp4")]
    assert main(["generate", "--checkpoint", str(tmp_path / "out"), "--motion-bucket", "3", *out]) == 2
    assert "--motion-bucket 3: only Stable Video Diffusion" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["--architecture sora-dit", "--vae-backend identity"])
def test_whoever_asks_for_sora_dit_is_not_told_that_a_unet_is_missing(
    more: str, svd: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--max-steps 1 --mixed-precision no --preset tiny --num-frames 2 --buckets 16x24"
    given = words(svd, clips, tmp_path / "out", f"{small} {more}")
    if "identity" in more:
        at = given.index("--pretrained-model")
        del given[at : at + 2]
    assert main(["train", "svd", *given]) == 0
    assert "has no unet/" not in capsys.readouterr().out
    assert files.read(tmp_path / "out").config["recipe"] == "sora"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--architecture svd", "unet/config.json is missing"),
        ("--trainable temporal", "--trainable: SoraDiT is trained here"),
        ("--motion-bucket 300", "--motion-bucket 300: it must be at least 0 and at most 255"),
        ("--motion-bucket fast", "it is auto, or a number"),
        ("--image-drop-prob 2", "--image-drop-prob 2"),
    ],
)
def test_mistakes(
    more: str, said: str, vae_alone: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "svd", *words(vae_alone, clips, tmp_path / "out", more)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["image_encoder", "feature_extractor", "scheduler"])
def test_a_part_that_is_missing(
    part: str, svd: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before a clip is looked at or encoded."""
    for other in svd.iterdir():
        if other.name != part:
            (tmp_path / other.name).symlink_to(other)
    more = f"--max-steps 1 --mixed-precision no --cache {tmp_path / 'cache'}"
    assert main(["train", "svd", *words(tmp_path, clips, tmp_path / "out", more)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / part}/" in said
    assert "is missing" in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_that_cannot_be_trained_are_refused_before_any_is_encoded(
    held_out: bool, svd: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of --validation-manifest, whose loss would be of something else."""
    rows = [json.loads(line) | {"task": "v2v"} for line in clips.read_text().splitlines()]
    other = clips.with_name(f"v2v-{held_out}.jsonl")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = f"--max-steps 1 --mixed-precision no --cache {tmp_path / 'cache'}"
    more += f" --validate-every 1 --validation-manifest {other}" if held_out else ""
    assert main(["train", "svd", *words(svd, clips if held_out else other, tmp_path / "out", more)]) == 2
    assert f"{other}, line 1: v2v cannot be trained here" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
