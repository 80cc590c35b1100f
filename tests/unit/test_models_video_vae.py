"""The causal video VAE: streaming, causality, tiles, and its start as a linear codec."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from scripts.tiny_vae import coarsen
from titans_video.codecs.pca import PCACodec
from titans_video.errors import ConfigError
from titans_video.media.writing import write_video
from titans_video.models.video_vae import LEVEL_SCALES, Join, TitansVideoVAE, unfold

FRAMES = (1, 5, 17, 257)
CHUNKS = (1, 4, 16)


def tiny(**changes: Any) -> TitansVideoVAE:
    """Build a VAE with random weights everywhere, so that no zero hides an input."""
    sizes = {"encoder_width": 8, "decoder_width": 8, "encoder_blocks": 2, "decoder_blocks": 2, "refine_width": 4}
    vae = TitansVideoVAE(**({"latent_channels": 6} | sizes | changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in vae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return vae.eval().requires_grad_(False)


def clip(frames: int, side: int = 8, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def stream(step: Any, x: Tensor, size: int) -> tuple[Tensor, int]:
    """Return the result of a stream in chunks of `size`, and the largest state in bytes."""
    state, parts, largest = None, [], 0
    for chunk in x.split(size, dim=2):
        part, state = step(chunk, state)
        parts.append(part)
        largest = max(largest, sum(value.numel() for value in state.values()))
    return torch.cat(parts, dim=2), largest


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize(("stride", "blocks"), [(1, None), (4, None), (4, 2)])
def test_streaming_equals_the_whole_clip(frames: int, stride: int, blocks: int | None) -> None:
    vae, x = tiny(temporal_stride=stride, block_stride=blocks), clip(frames)
    vae.chunk_size = 1000
    moments = vae.encode(x).latent_dist.parameters
    z = moments.chunk(2, dim=1)[0]
    pixels = vae.decode(z).sample
    assert moments.shape == (1, 12, 1 + (frames - 1) // stride, 2, 2)
    assert pixels.shape == x.shape
    for size in CHUNKS:
        assert_close(stream(vae.encode_chunk, x, size)[0], moments, atol=1e-5, rtol=0)
        assert_close(stream(vae.decode_chunk, z, size)[0], pixels, atol=1e-5, rtol=0)
    vae.chunk_size = 2
    assert_close(vae.decode(z).sample, pixels, atol=1e-5, rtol=0)
    assert_close(vae.encode(x).latent_dist.parameters, moments, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["whole", "chunks", "slices", "tiles"])
def test_each_row_is_decoded_for_its_own_noise_level(way: str) -> None:
    vae, levels = tiny(noise_conditioning=True), torch.tensor([0.0, 0.1, 0.7])
    z = torch.randn(3, 6, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    singly = [vae.decode(row, float(level)).sample for row, level in zip(z.split(1), levels, strict=True)]
    assert torch.equal(singly[0], vae.decode(z[:1]).sample)
    assert (vae.decode(z[2:]).sample - singly[2]).abs().max() > 0.01
    vae.use_slicing, vae.chunk_size = way == "slices", 2 if way == "chunks" else 1000
    if way == "tiles":
        vae.enable_tiling(8)
    assert_close(vae.decode(z, levels).sample, torch.cat(singly), atol=1e-4, rtol=0)


def test_frames_begin_at_the_frame_before_as_far_as_the_gates_let_them() -> None:
    join = Join(3, width=2)
    with torch.no_grad():
        for parameter in join.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before, pixels = torch.randn(1, 3, 3, 4, 4), torch.randn(1, 3, 6, 4, 4)
    made, last = join(pixels, before, torch.tensor([0.5]))
    x = pixels[0].unflatten(1, (2, 3)).transpose(0, 1)  # (group, 3, frame, H, W)
    for group, earlier in ((0, before[0]), (1, x[0])):
        jump = earlier[:, 2] - x[group][:, 0]
        seen = [jump, jump.abs(), (earlier[:, 2] - earlier[:, 0]).abs(), (x[group][:, 2] - x[group][:, 0]).abs()]
        strength = join.levels.weight @ torch.tanh(0.5 * torch.tensor(LEVEL_SCALES))
        hidden = torch.nn.functional.silu(join.conv_in(torch.cat(seen)[None])) * strength.view(1, 2, 1, 1)
        gates = torch.tanh(join.conv_out(hidden))[0]
        for i in range(3):
            assert_close(made[0, :, 3 * group + i], x[group][:, i] + gates[i] * jump)
    assert torch.equal(last[0], x[1])
    assert join(pixels, before, None)[0] is pixels
    assert torch.equal(join(pixels, None, torch.tensor([0.5]))[0][:, :, :3], pixels[:, :, :3])


def test_a_decoder_without_noise_conditioning_rejects_a_level() -> None:
    with pytest.raises(ConfigError, match="noise_conditioning"):
        tiny().decode(torch.zeros(1, 6, 1, 2, 2), 0.1)


def test_the_state_does_not_grow() -> None:
    vae = tiny()
    sizes = {stream(vae.encode_chunk, clip(frames), 4)[1] for frames in (17, 65, 257)}
    assert len(sizes) == 1
    z = torch.zeros(1, 6, 65, 2, 2)
    assert stream(vae.decode_chunk, z[:, :, :9], 1)[1] == stream(vae.decode_chunk, z, 1)[1]


def test_a_frame_depends_on_no_later_frame() -> None:
    vae, x = tiny(), clip(17)
    base = vae.encode(x).latent_dist.mean
    for frame in (0, 1, 4, 5, 16):
        changed = x.clone()
        changed[:, :, frame] += 1
        differs = (vae.encode(changed).latent_dist.mean - base).abs().amax((0, 1, 3, 4)) > 0
        first = -(-frame // 4)
        assert not differs[:first].any()
        assert differs[first]
    pixels = vae.decode(base).sample
    for latent in (1, 3):
        changed = base.clone()
        changed[:, :, latent] += 1
        differs = (vae.decode(changed).sample - pixels).abs().amax((0, 1, 3, 4)) > 0
        first = 4 * latent - 3
        assert not differs[:first].any()
        assert differs[first : first + 4].all()


@pytest.mark.parametrize(("frames", "side", "channels", "grid"), [(4, 4, 6, None), (2, 8, 12, None), (2, 8, 12, 4)])
@torch.no_grad()
def test_the_linear_start_is_the_fitted_codec(frames: int, side: int, channels: int, grid: int | None) -> None:
    size = 3 * frames * side * side
    mixed = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.01, size)
    noise = torch.randn(24, size, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    blocks = unfold(torch.einsum("ij,bj...->bi...", mixed, noise), frames, side)
    codec = PCACodec.fit(blocks, (frames, side, side), 32)
    vae = TitansVideoVAE(channels, side, frames, encoder_width=16, decoder_width=16, block_stride=grid)
    vae.set_linear(codec.mean, codec.basis, codec.variance.sqrt() / codec.scales)
    x = torch.cat([blocks[:, :, :1], blocks], dim=2)  # its latent frames after the first are the fitted blocks
    posterior = vae.encode(x).latent_dist
    decoded = vae.decode(posterior.mode()).sample
    fewer = PCACodec.fit(blocks, (frames, side, side), channels)
    first = torch.cat([blocks[:, :, :1]] * frames, dim=2)
    expected = fewer.decode(fewer.encode(torch.cat([first, blocks], dim=2)), 3 * frames)[:, :, frames - 1 :]
    scale = float(expected.abs().max())
    assert_close(decoded / scale, expected / scale, atol=2e-5, rtol=0)
    assert_close(posterior.mean[:, :, 1:].std((0, 2, 3, 4)), torch.ones(channels), atol=0.02, rtol=0)
    assert posterior.logvar.std() == 0


@pytest.mark.parametrize(("chunk", "blocks"), [(1, {}), (8, {}), (8, {"block_stride": 2, "decoder_blocks": 3})])
def test_tiles_give_the_whole_frame(chunk: int, blocks: dict[str, int]) -> None:
    vae, x = tiny(**blocks), clip(9, 48)
    moments = vae.encode(x).latent_dist.parameters
    z = moments[:, :6]
    pixels = vae.decode(z).sample
    vae.enable_tiling(16)
    assert_close(vae.encode(x).latent_dist.parameters, moments, atol=1e-5, rtol=0)
    assert_close(vae.decode(z).sample, pixels, atol=1e-5, rtol=0)
    assert_close(stream(vae.encode_chunk, x, chunk)[0], moments, atol=1e-5, rtol=0)
    assert_close(stream(vae.decode_chunk, z, chunk)[0], pixels, atol=1e-5, rtol=0)
    vae.disable_tiling()
    vae.enable_slicing()
    both = torch.cat([x, x.flip(2)])
    assert_close(vae.encode(both).latent_dist.mean[:1], z, atol=1e-5, rtol=0)


@torch.no_grad()
def test_blocks_on_a_finer_grid_are_those_of_a_vae_with_that_stride(tmp_path: Path) -> None:
    """Latents of 2 x 2 cells with all components: nothing is lost, so pixels are those of the VAE with small cells."""
    statistics = {"latents_mean": [0.1] * 6, "latents_std": [0.5, 1.0, 2.0, 1.0, 1.0, 3.0]}
    tiny(**statistics, latents_weight=[2.0, 1.0, 1.0, 0.5, 1.0, 1.0]).save_pretrained(tmp_path / "fine")
    (tmp_path / "train.jsonl").write_text('{"video": "clip.mp4"}\n')
    write_video(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), np.uint8), 8)
    coarsen(tmp_path / "fine", tmp_path, 24, tmp_path / "coarse")
    fine, coarse = (TitansVideoVAE.from_pretrained(tmp_path / name).eval() for name in ("fine", "coarse"))
    x = clip(9, 16)
    assert coarse.encode(x).latent_dist.mean.shape == (1, 24, 3, 2, 2)
    expected = fine(x).sample
    assert_close(coarse(x).sample / expected.std(), expected / expected.std(), atol=1e-4, rtol=0)


def test_a_saved_folder_gives_the_same_model(tmp_path: Path) -> None:
    vae, x = tiny(latents_mean=[0.5] * 6, latents_std=[2.0] * 6), clip(5)
    vae.save_pretrained(tmp_path)
    again = TitansVideoVAE.from_pretrained(tmp_path)
    assert again.config.latents_std == [2.0] * 6
    assert torch.equal(again(x).sample, vae(x).sample)
    half = TitansVideoVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_close(half(x.bfloat16()).sample.float(), vae(x).sample, atol=0.1, rtol=0.1)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        vae = tiny().requires_grad_(True).train()
        if on:
            vae.enable_gradient_checkpointing()
        vae(clip(9)).sample.square().sum().backward()
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(plain, recomputed)


def test_sizes_that_cannot_be_encoded_are_refused() -> None:
    for changes, words in (
        ({"spatial_stride": 2}, "spatial stride"),
        ({"latent_channels": 500}, "1 to 192"),
        ({"block_stride": 3}, "block stride of 3 does not divide"),
        ({"block_stride": 0}, "block stride of 0 does not divide"),
    ):
        with pytest.raises(ConfigError, match=words):
            TitansVideoVAE(**changes)
    for shape in ((1, 3, 4, 8, 8), (1, 3, 5, 10, 8)):
        with pytest.raises(ConfigError, match="multiples of 4"):
            tiny().encode(torch.zeros(shape))
