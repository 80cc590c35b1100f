"""The fitted linear codec: its components compared with numpy's, and how decoded blocks are joined."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from titans_video.codecs.base import to_patches
from titans_video.codecs.pca import PCACodec
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError
from titans_video.mock.dataset import sample_bounce
from titans_video.recipes.codec import codec_spec

SMOOTH = 0.1


def clips(seed: int, count: int, frames: int = 16) -> Tensor:
    """Return (N, 3, T, 32, 32) in [-1, 1] of the bouncing world."""
    shown = np.stack([sample_bounce(seed, i, frames=frames).frames for i in range(count)])
    return torch.from_numpy(shown).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def fit(smooth: float = SMOOTH, channels: int = 48, patch: tuple[int, int, int] = (4, 4, 4)) -> PCACodec:
    return PCACodec.fit(clips(0, 60), patch, channels, smooth)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    codec, x = fit(0.0), clips(0, 60)
    patches = to_patches(x, codec.patch).reshape(-1, 192).double().numpy()
    _, _, rows = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    kept = rows[:48].T @ rows[:48]
    nearest = torch.from_numpy((patches - patches.mean(0)) @ kept + patches.mean(0)).float()
    decoded = to_patches(codec.decode(codec.encode(x), 16), codec.patch).reshape(-1, 192)
    torch.testing.assert_close(decoded, nearest, rtol=0, atol=1e-4)
    latents = codec.encode(x)
    torch.testing.assert_close(latents.var((0, 2, 3, 4), unbiased=False), codec.variance, rtol=1e-3, atol=1e-4)


def test_latents_are_the_same_with_joins_and_without(tmp_path: Path) -> None:
    plain, joined = fit(0.0), fit()
    x = clips(1, 2)
    assert torch.equal(plain.encode(x), joined.encode(x))
    assert plain.fingerprint() == joined.fingerprint()  # so that caches serve both
    assert (plain.decode_context, joined.decode_context) == (0, 1)
    again = PCACodec.from_config(joined.config(), joined.state_dict())
    latents = joined.encode(x)
    assert torch.equal(again.decode(latents, 16), joined.decode(latents, 16))
    assert not torch.equal(plain.decode(latents, 16), joined.decode(latents, 16))
    lacking = {k: v for k, v in joined.state_dict().items() if k != "gain"}
    with pytest.raises(CodecError, match=r"incomplete: 'gain'"):
        PCACodec.from_config(joined.config(), lacking)
    with pytest.raises(CodecError, match="a gain of"):
        PCACodec.from_config(joined.config(), joined.state_dict() | {"gain": torch.zeros(3, 192)})


@pytest.mark.parametrize(("patch", "channels"), [((2, 1, 1), 4), ((3, 2, 1), 11)])
def test_the_gain_is_the_regression_of_true_pixels_on_decoded_ones(patch: tuple[int, int, int], channels: int) -> None:
    """Compare with least squares on pixels drawn from a Gaussian; their errors differ before and after the join."""
    generator = torch.Generator().manual_seed(0)
    pt, size = patch[0], 3 * patch[0] * patch[1] * patch[2]
    # What is kept of it, and the same spread of everything else.
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q[:, :channels] * torch.linspace(
        0.3, 0.1, channels
    )
    world = torch.randn(400_000, channels, generator=generator) @ basis.T
    world += 0.03 * torch.randn(world.shape, generator=generator)
    codec = PCACodec.fit(_from_patches(world, patch), patch, channels, 0.05)
    assert codec.gain is not None
    behind = torch.zeros(3, pt, patch[1] * patch[2], dtype=torch.bool)
    behind[:, pt - pt // 2 :] = True
    behind = behind.flatten()
    lost = (world - world.mean(0) - (world - world.mean(0)) @ codec.basis @ codec.basis.T).square().mean().sqrt()
    spread = torch.where(behind, 0.05, max(float(lost), 0.025))
    seen = world + spread * torch.randn(world.shape, generator=generator)
    truth = (world - world.mean(0))[:, behind]
    found = torch.linalg.lstsq((seen - seen.mean(0)).double(), truth.double()).solution.T
    torch.testing.assert_close(codec.gain.double(), found, rtol=0, atol=0.02)


def _from_patches(patches: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(N, P) as clips of one patch each."""
    return patches.reshape(len(patches), 3, *patch)


def test_a_join_changes_the_first_frames_of_a_block_and_only_after_another_block() -> None:
    plain, joined = fit(0.0), fit()
    latents = joined.encode(clips(1, 3))
    change = (joined.decode(latents, 16) - plain.decode(latents, 16)).abs().amax((0, 1, 3, 4))  # (T,)
    assert (change > 1e-3).tolist() == [False] * 4 + [True, True, False, False] * 3
    # What is decoded with the block before it in view is what the whole has there.
    whole = joined.decode(latents, 16)
    torch.testing.assert_close(joined.decode(latents[:, :, 1:], 12)[:, :, 4:], whole[:, :, 8:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("patch", "channels", "count"), [((8, 4, 4), 128, 4), ((4, 4, 4), 150, 4), ((8, 4, 4), 96, 60)]
)
def test_joins_do_no_harm_however_few_the_clips(patch: tuple[int, int, int], channels: int, count: int) -> None:
    plain, joined = (PCACodec.fit(clips(0, count), patch, channels, smooth) for smooth in (0.0, SMOOTH))
    truth = clips(1, 24)
    latents = plain.encode(truth)
    generator = torch.Generator().manual_seed(0)
    wrong = latents + SMOOTH * torch.randn(latents.shape, generator=generator) * plain.scales.view(1, -1, 1, 1, 1)
    firsts = [f for f in range(patch[0], 16) if f % patch[0] < patch[0] // 2]
    before, after = (psnr(codec.decode(wrong, 16)[:, :, firsts], truth[:, :, firsts]) for codec in (plain, joined))
    assert after > before


def test_blocks_with_errors_of_their_own_are_nearer_to_the_truth_and_to_one_another() -> None:
    plain, joined = fit(0.0), fit()
    truth = clips(1, 24)
    latents = plain.encode(truth)
    generator = torch.Generator().manual_seed(0)
    wrong = latents + SMOOTH * torch.randn(latents.shape, generator=generator) * plain.scales.view(1, -1, 1, 1, 1)
    before, after = plain.decode(wrong, 16), joined.decode(wrong, 16)
    firsts = [4, 8, 12]
    assert psnr(after[:, :, firsts], truth[:, :, firsts]) > psnr(before[:, :, firsts], truth[:, :, firsts])

    def step(x: Tensor) -> float:
        change = x.diff(dim=2).abs().mean((1, 3, 4))
        elsewhere = [k for k in range(15) if k + 1 not in firsts]
        return float(change[:, [f - 1 for f in firsts]].median() / change[:, elsewhere].median())

    assert step(after) < 1 + 0.6 * (step(before) - 1)


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ('{"smooth": -0.1}', "of the errors that joining blocks smooths"),
        ('{"smooth": "much"}', "of the errors that joining blocks smooths"),
        ('{"smoth": 0.1}', "of the errors that joining blocks smooths"),
        ('{"patch": [1, 4, 4], "channels": 8, "smooth": 0.1}', "leave smooth out"),
    ],
)
def test_a_smoothness_that_means_nothing_is_refused(init: str, said: str) -> None:
    with pytest.raises(CodecError, match=said):
        codec_spec(CodecOptions(vae_backend="patch", vae_init_json=init))


def test_blocks_of_one_frame_cannot_be_joined() -> None:
    with pytest.raises(CodecError, match="joined blocks need two"):
        fit(patch=(1, 4, 4))
