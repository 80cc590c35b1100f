"""A checkpoint as a diffusers pipeline: what goes in, what comes out, and that it is the commands' own video."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests import factories
from tests.unit.disks import full_disk
from tests.unit.generation_parts import as_checkpoint, tiny_model
from titans_video import checkpoint as checkpoints
from titans_video.cli.main import main
from titans_video.config.generation import Overrides, RunOptions
from titans_video.errors import CheckpointError, ConfigError
from titans_video.generation.denoise import generate
from titans_video.generation.long_video import generate_long, plan_video
from titans_video.generation.model import load_for, load_model
from titans_video.generation.request import Request
from titans_video.generation.video_pipeline import VideoPipeline, draw_seeds

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe() -> VideoPipeline:
    made = VideoPipeline.of(tiny_model())
    made.set_progress_bar_config(disable=True)
    return made


def test_it_is_a_diffusers_pipeline(pipe):
    assert isinstance(pipe, DiffusionPipeline)
    assert set(pipe.components) == {"transformer"}
    assert pipe.device.type == "cpu"
    with pytest.raises(ValueError, match="from_pretrained"):
        VideoPipeline(pipe.transformer)


def test_what_comes_out(pipe, capfd):
    shapes = {"np": (2, 5, 16, 24, 3), "pt": (2, 5, 3, 16, 24)}
    for kind, shape in shapes.items():
        frames = pipe("a cat", num_videos_per_prompt=2, num_frames=5, **CALL | {"output_type": kind}).frames
        assert frames.shape == shape
        assert 0 <= frames.min() < frames.max() <= 1
    pictures = pipe(["a", "b"], num_frames=3, **CALL | {"output_type": "pil"}).frames
    assert [len(row) for row in pictures] == [3, 3]
    assert isinstance(pictures[0][0], Image.Image)
    assert pictures[0][0].size == (24, 16)
    (plain,) = pipe("a cat", num_frames=3, return_dict=False, **CALL)
    assert plain.shape == (1, 3, 3, 16, 24)
    assert "denoising" not in capfd.readouterr().err


def test_it_makes_what_generate_makes(pipe):
    (seed,) = draw_seeds(seeded(4), 1)
    request = Request(["a cat"], 8, 16, 24, [seed], steps=2, guidance_scale=2.0, guidance_interval=(0.5, 1.0))
    plain = generate(pipe.model, request, progress=False)
    made = pipe("a cat", generator=seeded(4), **CALL | {"guidance_scale": 2.0}).frames
    torch.testing.assert_close(made, (plain.transpose(1, 2) + 1) / 2, rtol=0, atol=1e-6)


def test_a_draft_and_windows_that_go_on_in_their_own_way(pipe):
    (seed,) = draw_seeds(seeded(4), 1)
    own = {"draft_frames": 2, "continue_steps": 3, "continue_guidance": 1.5}
    request = Request(["a cat"], 8, 16, 24, [seed], steps=2, guidance_interval=(0.5, 1.0), **own)
    plain = generate(pipe.model, request, progress=False)
    steps = []
    made = pipe(
        "a cat", generator=seeded(4), callback_on_step_end=lambda _, step, *rest: steps.append(step), **CALL | own
    ).frames
    torch.testing.assert_close(made, (plain.transpose(1, 2) + 1) / 2, rtol=0, atol=1e-6)
    assert steps == [0, 1, 2, 3, 4], "2 of the draft, 3 of what goes on from it"


def test_generators_are_seeds(pipe):
    one = pipe("a cat", generator=seeded(1), **CALL).frames
    assert torch.equal(one, pipe("a cat", generator=seeded(1), **CALL).frames)
    assert not torch.equal(one, pipe("a cat", generator=seeded(2), **CALL).frames)
    both = pipe(["a cat", "a cat"], generator=[seeded(2), seeded(1)], **CALL).frames
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)
    used = seeded(1)
    assert draw_seeds(used, 2) == draw_seeds(seeded(1), 2)
    assert draw_seeds(used, 2) != draw_seeds(seeded(1), 2)
    with pytest.raises(ConfigError, match="1 generators were given for 2 videos"):
        pipe(["a", "b"], generator=[seeded()], **CALL)


def test_windows_and_given_frames(pipe, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    tensor = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
    made = [
        pipe("on", image=image, num_frames=20, window=8, overlap=2, generator=seeded(), **CALL).frames
        for image in (picture, Image.fromarray(picture), tmp_path / "first.png", tensor)
    ]
    assert made[0].shape[1] == 20
    first = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(made[0][0, 0], first, rtol=0, atol=1e-6)
    assert all(torch.equal(other, made[0]) for other in made[1:])
    clip = np.random.default_rng(1).integers(0, 256, (4, 16, 24, 3), np.uint8)
    on = pipe("on", video=clip, num_frames=8, **CALL).frames
    torch.testing.assert_close(on[0, :4], torch.from_numpy(clip).permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="frames have the shape"):
        pipe("on", video=clip[..., :1], num_frames=8, **CALL)


def test_the_callback_sees_every_step_and_may_change_it(pipe):
    seen = []

    def watch(pipeline, step, time, kwargs):
        seen.append((pipeline is pipe, step, round(time, 3), kwargs["latents"].shape[2]))
        return kwargs

    plain = pipe("a", num_frames=20, window=8, overlap=2, generator=seeded(), **CALL).frames
    watched = pipe("a", num_frames=20, window=8, overlap=2, generator=seeded(), callback_on_step_end=watch, **CALL)
    assert torch.equal(watched.frames, plain)
    assert [s[1] for s in seen] == list(range(6)), "2 steps of each of 3 windows"
    assert all(s[0] and s[3] == 8 for s in seen)
    assert [s[2] for s in seen][1::2] == [0.0] * 3
    dark = pipe(
        "a", callback_on_step_end=lambda p, i, t, kwargs: {"latents": torch.full_like(kwargs["latents"], -1)}, **CALL
    ).frames
    assert (dark == 0).all()
    with pytest.raises(ConfigError, match="can only be"):
        pipe("a", callback_on_step_end_tensor_inputs=["prompt_embeds"], **CALL)


def test_what_is_refused(pipe):
    with pytest.raises(ConfigError, match="output_type is 'mp4'"):
        pipe("a", output_type="mp4")
    with pytest.raises(ConfigError, match="no sampler 'ddim'"):
        pipe("a", sampler="ddim")
    with pytest.raises(ConfigError, match="offload 'disk'"):
        VideoPipeline.from_pretrained("x", offload="disk")


def made_by(model, seed: int = 3) -> torch.Tensor:
    request = Request(["a cat"], 20, 16, 24, [seed], steps=2)
    windows, _ = plan_video(model, request, 8, 2)
    return torch.cat(list(generate_long(model, request, windows, progress=False)), 2)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    checkpoints.write(as_checkpoint(tiny_model()), tmp_path / "last.pt")
    return str(tmp_path / "last.pt")


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_offloading_changes_no_bit(checkpoint, offload, monkeypatch):
    model = load_for(RunOptions(device="cpu", offload=offload), checkpoint, Overrides())
    moves = []
    for part in ("codec", "network", "text"):
        real = getattr(model, part).to
        monkeypatch.setattr(
            getattr(model, part), "to", lambda where, p=part, r=real: (moves.append((p, str(where))), r(where))[1],
            raising=False,
        )  # fmt: skip
    assert torch.equal(made_by(model), made_by(load_model(checkpoint, Overrides(), "cpu")))
    parts = [p for p, _ in moves][::2]
    window = ["network", "codec"] if offload == "model" else ["codec"]
    expected = ["text", *window, *(["codec", *window] * 2)]
    assert parts == ([] if offload == "none" else expected)


def test_precisions(checkpoint, monkeypatch):
    exact = made_by(load_model(checkpoint, Overrides(), "cpu"))
    warned = []
    monkeypatch.setattr(diffusers.models.modeling_utils.logger, "warning", warned.append)
    model = load_for(RunOptions(device="cpu", dtype="bf16"), checkpoint, Overrides())
    assert warned == []
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    rough = made_by(model)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.05
    with pytest.raises(ConfigError, match="fp16"):
        load_for(RunOptions(device="cpu", dtype="fp16"), checkpoint, Overrides())


@pytest.mark.long
def test_compiled_blocks_make_the_same(checkpoint):
    exact = made_by(load_model(checkpoint, Overrides(), "cpu"))
    made = made_by(load_for(RunOptions(device="cpu", compile="on"), checkpoint, Overrides()))
    torch.testing.assert_close(made, exact, rtol=1e-3, atol=1e-3)


def test_a_folder_that_needs_nothing_else(tmp_path, monkeypatch, capsys, repository):
    monkeypatch.chdir(tmp_path)
    factories.make_vae("kl", tmp_path / "pipeline")
    factories.make_t5(tmp_path / "umt5", umt5=True)
    words = (
        "train --vae-backend diffusers --pretrained-model pipeline --text-model umt5 --text-dtype fp32 --preset tiny "
        "--model-dim 24 --depth 1 --heads 2 --height 16 --width 16 --num-frames 4 --batch-size 2 --max-steps 1 "
        "--output-dir run --local-files-only --task-mix t2v=0.5,v2v=0.5 --manifest"
    )
    assert main([*words.split(), str(repository / "train/videos/mock_data/manifest.jsonl")]) == 0
    before = VideoPipeline.from_pretrained("run")("a cat", num_frames=8, generator=seeded(), **CALL).frames
    assert before.shape[1] == 8
    assert main(["export", "run", "exported"]) == 0
    assert "exported" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "exported").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "vae", "text_encoder"
    }  # fmt: skip
    for name in ("pipeline", "umt5", "run"):
        (tmp_path / name).rename(tmp_path / f"gone-{name}")
    moved = (tmp_path / "exported").rename(tmp_path / "elsewhere")
    pipe = VideoPipeline.from_pretrained(moved)
    assert torch.equal(pipe("a cat", num_frames=8, generator=seeded(), **CALL).frames, before)
    assert "warning" not in capsys.readouterr().err
    pipe.save_pretrained("again")
    again = VideoPipeline.from_pretrained("again")("a cat", num_frames=8, generator=seeded(), **CALL).frames
    assert torch.equal(again, before)
    with pytest.raises(CheckpointError, match="not an empty folder"):
        pipe.save_pretrained("again")
    assert not list(tmp_path.glob(".*tmp"))
    assert (moved / "README.md").read_text().startswith("# exported\n")


def test_export_without_encoders_and_wrong_words(checkpoint, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["export", checkpoint, str(out), "--no-encoders"]) == 0
    assert load_model(str(out), Overrides(), "cpu").step == 7
    for words in ([], [checkpoint], [checkpoint, str(out)], [checkpoint, str(tmp_path / "b"), "c"]):
        assert main(["export", *words]) == 2
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("size", [0, 3000])
def test_an_export_to_a_full_disk(checkpoint, tmp_path, capsys, size):
    """Before the first byte, and within the weights."""
    with full_disk(size):
        assert main(["export", checkpoint, str(tmp_path / "out"), "--no-encoders"]) == 2
    error = capsys.readouterr().err
    assert f"Error: {tmp_path / 'out'}/model.safetensors cannot be written: File too large (" in error
    assert "Traceback" not in error
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
