"""Our image-to-video of Stable Video Diffusion against diffusers' own pipeline, from the same noise."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image

from tests.unit.svd_parts import FRAMES, HEIGHT, WIDTH, picture, pipeline_video, svd_folder, svd_model
from titans_video.codecs.image_encoder import resized
from titans_video.generation import long_video
from titans_video.generation.denoise import frame_noise, generate
from titans_video.generation.image_conditioning import NOISE, SVDSettings
from titans_video.generation.request import Request
from titans_video.generation.video_pipeline import VideoPipeline, draw_seeds
from titans_video.media.colour import to_tensor
from titans_video.media.probe import probe
from titans_video.media.reading import read_clip
from titans_video.media.writing import write_video
from titans_video.models.svd_unet import TextCrossAttention
from titans_video.seeding import derive_seed, seeded_randn

SEED = 11


def request(prompt: str = "", **changes: object) -> Request:
    cond_pixels = to_tensor(picture()[None])[None]
    usual = Request([prompt], FRAMES, HEIGHT, WIDTH, [SEED], steps=4, cond_pixels=cond_pixels)
    return replace(usual, **changes)  # type: ignore[arg-type]


@lru_cache
def theirs(settings: SVDSettings, steps: int = 4) -> torch.Tensor:
    image_noise = seeded_randn((3, HEIGHT, WIDTH), [derive_seed(SEED, NOISE, 0)])
    noise = frame_noise((4, FRAMES, HEIGHT // 2, WIDTH // 2), [SEED])
    return pipeline_video(
        svd_folder(),
        image_noise,
        noise,
        num_inference_steps=steps,
        fps=int(settings.fps),
        motion_bucket_id=int(settings.motion_bucket),
        noise_aug_strength=settings.noise_aug,
        min_guidance_scale=settings.guidance[0],
        max_guidance_scale=settings.guidance[1],
    )


@pytest.mark.parametrize("text", ["builtin", "none"])
@pytest.mark.parametrize(
    "settings",
    [
        SVDSettings(),
        SVDSettings(fps=24, motion_bucket=40, noise_aug=0.3, guidance=(1.5, 6.0)),
        SVDSettings(guidance=(1.0, 1.0)),
    ],
    ids=["usual", "other", "unguided"],
)
def test_an_untouched_model_makes_the_pipelines_video(text: str, settings: SVDSettings) -> None:
    """Whatever the prompt says: the branch for text gives exactly nothing."""
    model, expected = svd_model(text=text), theirs(settings)
    for prompt in ("", "a red circle") if text == "builtin" else ("",):
        ours = generate(model, request(prompt, svd=settings), progress=False)
        torch.testing.assert_close(ours, expected.clamp(-1, 1), rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize(
    "change", [{"fps": 8.0}, {"motion_bucket": 150.0}, {"noise_aug": 0.1}, {"guidance": (1.0, 4.0)}]
)
def test_every_setting_counts(change: dict[str, Any]) -> None:
    """So that agreeing with the pipeline means something."""
    usual, other = theirs(SVDSettings(), 2), theirs(replace(SVDSettings(), **change), 2)
    assert float((usual - other).abs().max()) > 1e-2


def test_the_text_branch_is_heard_once_it_says_something() -> None:
    model = svd_model()
    for module in model.network.modules():
        if isinstance(module, TextCrossAttention):
            torch.nn.init.normal_(module.to_out.weight, std=0.3)
    videos = [generate(model, request(prompt), progress=False) for prompt in ("", "a red circle", "a blue square")]
    for a, b in ((0, 1), (1, 2)):
        assert float((videos[a] - videos[b]).abs().max()) > 1e-3
    guided = generate(model, request("a red circle", guidance_scale=4.0), progress=False)
    assert float((guided - videos[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 48), (224, 224), (300, 520), (576, 1024)])
def test_pictures_are_resized_as_the_pipeline_does(height: int, width: int) -> None:
    pictures = torch.rand(2, 3, height, width)
    torch.testing.assert_close(resized(pictures, 224), _resize_with_antialiasing(pictures, (224, 224)))


def test_programs_get_the_same_video() -> None:
    """Through `VideoPipeline`, with its images and settings."""
    model = svd_model()
    seed = draw_seeds(torch.Generator().manual_seed(5), 1)[0]
    settings = SVDSettings(fps=8.0, motion_bucket=90.0, noise_aug=0.1, guidance=(1.0, 2.0))
    expected = generate(model, request(svd=settings, seeds=[seed], steps=2), progress=False)
    made = VideoPipeline.of(model)(
        "",
        image=Image.fromarray(picture()),
        num_inference_steps=2,
        motion_bucket=90.0,
        noise_aug=0.1,
        image_guidance=(1.0, 2.0),
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames
    torch.testing.assert_close(made.transpose(1, 2) * 2 - 1, expected, rtol=0, atol=1e-5)


def test_a_picture_alone_is_enough_in_any_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prompt none is encoded, not even the one that the checkpoint recommends."""
    model, told = svd_model(), list[str]()
    model.config["sample"]["prompt"] = "a red circle"
    encode = long_video.encode_prompts
    monkeypatch.setattr(
        long_video, "encode_prompts", lambda m, prompts, *rest: told.extend(prompts) or encode(m, prompts, *rest)
    )
    Image.fromarray(picture()).save(tmp_path / "p.png")
    pipe, call = VideoPipeline.of(model), {"num_inference_steps": 1, "output_type": "pt"}
    pipe(image=Image.fromarray(picture()), **call)
    pipe(image=to_tensor(picture()[None])[:, 0], num_videos_per_prompt=2, **call)
    pipe(image=tmp_path / "p.png", **call)
    pipe(video=picture()[None], **call)
    assert told == [""] * 5
    pipe(**call)
    assert told[5:] == ["a red circle"]


def test_a_clip_is_gone_on_from_as_its_last_frame_is(tmp_path: Path) -> None:
    """Whatever windows share: blended ones too."""
    frames = np.stack([np.roll(picture(), k, axis=1) for k in range(4)])
    write_video(tmp_path / "c.mp4", frames, fps=8, crf=1)
    Image.fromarray(read_clip(tmp_path / "c.mp4", probe(tmp_path / "c.mp4"), [3], HEIGHT, WIDTH)[0]).save(
        tmp_path / "last.png"
    )
    pipe, call = VideoPipeline.of(svd_model()), {"num_inference_steps": 1, "output_type": "pt"}
    windows = {"num_frames": 8, "window": FRAMES, "overlap": 2}
    made = [
        pipe(**given, **windows, **call, generator=torch.Generator().manual_seed(5)).frames
        for given in ({"video": tmp_path / "c.mp4"}, {"image": tmp_path / "last.png"})
    ]
    assert made[0].shape[1] == 8
    assert torch.equal(*made)
