"""CogVideoX as we train it against its own pipelines and scheduler: latents, noise, positions, prompts."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests import factories
from titans_video.errors import ConfigError
from titans_video.pretrained.base import PipelineCall, is_pipeline, open_model_spec
from titans_video.text.base import drop_captions


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cogvideox")
    return {kind: factories.make_cogvideox(root / kind, kind) for kind in factories.COGVIDEOX_KINDS}


def stock(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", factories.COGVIDEOX_KINDS)
def test_a_pipeline_is_described_by_its_configuration(kind: str, pipelines: dict[str, Path]) -> None:
    spec = open_model_spec(pipelines[kind])
    assert spec.tasks == (("i2v",) if kind.endswith("i2v") else ("t2v",))
    assert spec.takes_image == spec.needs_image == kind.endswith("i2v")
    assert spec.patch_size == (2 if kind.startswith("1.5") else 1, 2, 2)
    assert spec.clip_grid == (1, 2, 2)
    assert (spec.text_length, spec.trained) == (12, (9, 32, 32))


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_noise_and_target_are_the_schedulers(kind: str, pipelines: dict[str, Path]) -> None:
    spec, pipe = open_model_spec(pipelines[kind]), stock(pipelines[kind])
    process = spec.process()
    x0, noise = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    time = torch.tensor([0, 512, 999])
    made = process.add_noise(x0, noise, time)
    torch.testing.assert_close(made.model_input, pipe.scheduler.add_noise(x0, noise, time), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.target, pipe.scheduler.get_velocity(x0, noise, time), rtol=1e-6, atol=1e-6)
    assert torch.equal(made.target[2], -x0[2])  # zero terminal SNR
    # The x0 form of the loss, weighted by 1 / (1 - a), as diffusers' own training has it.
    value = torch.randn_like(x0)
    guess = pipe.scheduler.get_velocity(value, made.model_input, time)
    weight = 1 / (1 - pipe.scheduler.alphas_cumprod[time]).float()[:, None, None, None, None]
    torch.testing.assert_close(weight * (guess - x0) ** 2, (value - made.target) ** 2, rtol=1e-3, atol=1e-4)


def test_times_are_even_and_a_function_of_the_seed(pipelines: dict[str, Path]) -> None:
    process = open_model_spec(pipelines["2b"]).process()
    times = process.sample_timesteps(range(4000), tokens=8).double()
    assert torch.equal(process.sample_timesteps([7, 9], tokens=64), times[[7, 9]].long())  # whatever the size
    assert 0 <= times.min() < 5
    assert 995 <= times.max() <= 999
    assert times.mean().item() == pytest.approx(499.5, abs=15)
    assert [process.timestep_quantile(q, 8) for q in (0.1, 0.5, 0.9)] == [100, 500, 900]


@pytest.mark.parametrize(
    ("kind", "t", "height", "width"),
    [("5b", 3, 32, 32), ("5b", 4, 32, 48), ("5b", 2, 64, 32), ("1.5", 3, 32, 32), ("1.5", 4, 32, 16)],
)
def test_rotary_positions_are_the_pipelines(
    kind: str, t: int, height: int, width: int, pipelines: dict[str, Path]
) -> None:
    spec, pipe = open_model_spec(pipelines[kind]), stock(pipelines[kind])
    t = spec.padded_frames(t)
    expected = pipe._prepare_rotary_positional_embeddings(height, width, t, torch.device("cpu"))
    found = spec.positions(t, height // 8, width // 8, torch.device("cpu"))["image_rotary_emb"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = spec.positions(t, height // 8, width // 8, torch.device("cpu"))["image_rotary_emb"]
    assert all(a is b for a, b in zip(again, found, strict=True))  # computed once for each size
    other = spec.positions(t, height // 16, width // 8, torch.device("cpu"))["image_rotary_emb"]
    assert other[0].shape != found[0].shape


def test_prompts_are_padded_and_unmasked_as_in_the_pipeline(pipelines: dict[str, Path]) -> None:
    spec, pipe = open_model_spec(pipelines["2b"]), stock(pipelines["2b"])
    prompts = ["a red circle", "", "two cats asleep on a warm stone wall at dusk and much more than twelve tokens"]
    text = spec.text("fp32", "cpu")
    states = text(prompts).streams[0]
    expected, empty = pipe.encode_prompt(prompts, "", max_sequence_length=12)
    torch.testing.assert_close(states, expected.detach(), rtol=0, atol=1e-6)
    assert bool(text(prompts).masks[0].all())
    dropped = drop_captions(text(prompts), text.empty(1), torch.tensor([True, False, True]))
    torch.testing.assert_close(dropped.streams[0][[0, 2]], empty[[0, 2]].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["5b-i2v", "1.5-i2v"])
def test_image_latents_are_the_pipelines(kind: str, pipelines: dict[str, Path]) -> None:
    """The first frame, encoded as a clip of one frame, scaled as the VAE's configuration says."""
    spec, pipe = open_model_spec(pipelines[kind]), stock(pipelines[kind])
    clip = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    codec = spec.codec("fp32", "cpu", load=True)
    moments = codec.encode_cond_frames(clip)
    assert moments.shape == (2, 8, 3, 4, 4)
    seeds = [3, 4]
    t = spec.padded_frames(3)
    drawn = spec.image_latents(codec.unscale(codec.from_moments(moments, seeds=seeds))[:, :, :1], t)

    class Fixed:
        def __init__(self, parameters: Any) -> None:
            self.parameters = parameters

        def sample(self, generator: Any) -> torch.Tensor:
            number = len(seen)
            seen.append(number)
            full = codec.from_moments(moments, seeds=seeds)
            return codec.unscale(full)[number : number + 1, :, :1]

    seen: list[int] = []

    class Output:
        def __init__(self, x: torch.Tensor) -> None:
            torch.testing.assert_close(x[:, :, 0], clip[len(seen) : len(seen) + 1, :, 0])
            self.latent_dist = Fixed(None)

    pipe.vae.encode = Output
    frames = (t - 1) * 4 + 1  # as `__call__` enlarges it
    shape: Any = {"num_channels_latents": 4, "num_frames": frames, "height": 32, "width": 32, "dtype": torch.float32}
    _, expected = pipe.prepare_latents(clip[:, :, 0], 2, **shape, device=torch.device("cpu"))
    torch.testing.assert_close(drawn.transpose(1, 2), expected, rtol=1e-6, atol=1e-6)


def test_a_first_frame_is_encoded_as_a_clip_of_one_frame(pipelines: dict[str, Path]) -> None:
    codec = open_model_spec(pipelines["5b-i2v"]).codec("fp32", "cpu", load=True)
    clip = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    blank = torch.cat([clip[:, :, :1], torch.zeros_like(clip[:, :, 1:])], dim=2)
    alone = codec.encode_cond_frames(blank)
    assert torch.equal(alone[:, :, :1], codec.encode_moments(clip[:, :, :1]))
    assert not torch.allclose(alone[:, :, :1], codec.encode_moments(blank)[:, :, :1], atol=1e-3)


def test_sizes_without_learned_positions_are_rejected(pipelines: dict[str, Path]) -> None:
    spec = open_model_spec(pipelines["5b-i2v"])
    spec.check_size(9, 32, 32)
    for wrong in ((17, 32, 32), (9, 32, 48), (8, 32, 32)):
        with pytest.raises(ConfigError, match="--height 32 --width 32 --num-frames 9"):
            spec.check_size(*wrong)
    open_model_spec(pipelines["5b"]).check_size(17, 64, 32)
    open_model_spec(pipelines["1.5"]).check_size(17, 32, 16)
    with pytest.raises(ConfigError, match="up to 32x32; 48x32 is larger"):
        open_model_spec(pipelines["1.5"]).check_size(9, 48, 32)


def test_image_to_video_clips_of_one_frame_are_rejected(pipelines: dict[str, Path]) -> None:
    for kind in factories.COGVIDEOX_KINDS:
        spec = open_model_spec(pipelines[kind])
        if not spec.takes_image:
            spec.check_size(1, 32, 32)
            continue
        with pytest.raises(ConfigError, match=r"--num-frames 8 or more.*--buckets 32x32x8"):
            spec.check_size(1, 32, 32)


@pytest.mark.parametrize("kind", factories.COGVIDEOX_KINDS)
def test_calls_are_the_stock_pipelines(kind: str, pipelines: dict[str, Path]) -> None:
    """With encoded prompts, and with its own text encoder."""
    spec, pipe = open_model_spec(pipelines[kind]), stock(pipelines[kind])
    t = spec.padded_frames(3)
    noise = torch.randn(1, 4, t, 4, 4)
    image = torch.rand(1, 3, 1, 32, 32) * 2 - 1 if spec.takes_image else None
    first = {} if image is None else {"image": (image[:, :, 0] + 1) / 2}
    expected = pipe(
        prompt="a red circle", **first, height=32, width=32, num_frames=9, num_inference_steps=3, guidance_scale=3.0,
        latents=noise.transpose(1, 2), generator=torch.Generator().manual_seed(5), max_sequence_length=12,
        output_type="pt",
    ).frames  # fmt: skip
    network = spec.load_network(torch.float32)
    codec = spec.codec("fp32", "cpu", load=True)
    text = spec.text("fp32", "cpu")
    prompts = text(["a red circle"]), text.empty(1)
    call = PipelineCall(9, 32, 32, 3, 3.0, noise, *prompts, image=image, seed=5)
    ours = spec.run(spec.pipeline(network, codec, text=False, dtype=torch.float32), call)
    torch.testing.assert_close((ours.transpose(1, 2) + 1) / 2, expected, rtol=0, atol=1e-5)
    own = spec.encode(spec.pipeline(network, codec, text=True, dtype=torch.float32), "a red circle", "")
    for a, b in zip(own, prompts, strict=True):
        torch.testing.assert_close(a.streams, b.streams, rtol=0, atol=1e-6)
        assert torch.equal(a.masks[0], b.masks[0])


def test_folders_that_are_no_known_pipeline(pipelines: dict[str, Path], tmp_path: Path) -> None:
    assert is_pipeline(pipelines["2b"])
    assert not is_pipeline(tmp_path)
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        open_model_spec(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        open_model_spec(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text('{"_class_name": "MochiPipeline"}')
    with pytest.raises(
        ConfigError, match="describes the class 'MochiPipeline'; the supported pipelines are CogVideoXPipeline"
    ):
        open_model_spec(tmp_path)


def test_a_tiny_model_is_read_from_all_that_diffusers_reads(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """From safetensors and torch's .bin; skipped blocks change nothing."""
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines["5b"], folder)
    whole = open_model_spec(folder).load_network(torch.float32)
    shutil.rmtree(folder / "transformer")
    whole.save_pretrained(folder / "transformer", safe_serialization=False)  # type: ignore[operator]
    assert not list((folder / "transformer").glob("*.safetensors"))
    for spec in (open_model_spec(pipelines["5b"]), open_model_spec(folder)):
        spec.load_network(torch.float32)
        small = spec.tiny_model([1])
        values, there = whole.state_dict(), small.state_dict()
        assert {k for k in values if not k.startswith("transformer_blocks.0.")} == there.keys()
        assert all(torch.equal(v, values[k]) for k, v in there.items() if k != "patch_embed.pos_embedding")
        noisy, prepared = spec.example()
        found = spec.predict(small, noisy, prepared, torch.float32)
        for other in (spec.tiny_model(None), small):
            del other.transformer_blocks[0]  # type: ignore[operator,union-attr]
            assert torch.equal(spec.predict(other, noisy, prepared, torch.float32), found)
