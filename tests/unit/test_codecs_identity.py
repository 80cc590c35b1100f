"""The identity codec: exact in both directions, its fold compared with loops, and seeded sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_video.codecs.base import Codec, IdentityCodec, without_noise
from titans_video.config.options import CodecOptions
from titans_video.errors import CodecError
from titans_video.types import CodecSpec


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3))
def test_fold_is_exact_both_ways(factor: tuple[int, int, int], cells: int) -> None:
    ft, fh, fw = factor
    codec = IdentityCodec(factor)
    x = torch.rand(2, 3, ft * cells, fh * cells, fw * cells) * 2 - 1
    z = codec.encode(x)
    assert z.shape[1:] == codec.spec.latent_shape(*x.shape[2:])
    assert torch.equal(codec.decode(z, x.shape[2]), x)


def test_fold_puts_each_pixel_of_a_block_in_its_own_channel() -> None:
    codec = IdentityCodec((2, 2, 3))
    x = torch.arange(3 * 4 * 4 * 6, dtype=torch.float32).reshape(1, 3, 4, 4, 6)
    z = codec.encode(x)
    for c in range(3):
        for i, j, k in [(0, 0, 0), (1, 0, 2), (0, 1, 1), (1, 1, 2)]:
            channel = ((c * 2 + i) * 2 + j) * 3 + k
            assert torch.equal(z[0, channel], x[0, c, i::2, j::2, k::3])


def test_without_noise_sampling_gives_the_mean() -> None:
    codec = IdentityCodec()
    x = torch.rand(2, 3, 2, 4, 4)
    assert torch.equal(codec.encode(x, seeds=[1, 2]), x)
    assert torch.equal(codec.encode(x, generator=torch.Generator().manual_seed(3)), x)
    assert torch.equal(codec.encode_unscaled(x), x)


class Noisy(Codec):
    """Latents 2 x pixels + noise of variance 0.25, scaled by 3."""

    spec = CodecSpec("noisy", 3, (1, 1, 1))

    def moments_of(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = 2 * pixels
        return torch.cat([mean, torch.full_like(mean, 0.25).log()], dim=1)

    def pixels_of(self, unscaled: torch.Tensor, frames: int) -> torch.Tensor:
        return unscaled / 2

    def scale(self, unscaled: torch.Tensor) -> torch.Tensor:
        return 3 * unscaled

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 3

    def fingerprint(self) -> str:
        return "noisy"


def test_sampled_latents_depend_on_a_rows_own_seed() -> None:
    codec = Noisy()
    x = torch.zeros(2, 3, 4, 16, 16)
    both = codec.encode(x, seeds=[5, 6])
    assert torch.equal(codec.encode(x[1:], seeds=[6])[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert both.std().item() == pytest.approx(3 * 0.5, rel=0.05)
    assert torch.equal(codec.decode(codec.encode(x + 0.5), 4), x + 0.5)


def test_shapes_off_the_spec_are_refused() -> None:
    codec = IdentityCodec((2, 4, 4))
    with pytest.raises(CodecError, match="multiples of 4"):
        codec.encode(torch.zeros(1, 3, 2, 6, 8))
    with pytest.raises(CodecError, match="multiples of 2"):
        codec.encode(torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(CodecError, match="4 frames are 2 latent frames"):
        codec.decode(torch.zeros(1, 96, 1, 2, 2), 4)
    with pytest.raises(CodecError, match="takes \\(B, 3, T, H, W\\)"):
        codec.encode(torch.zeros(1, 4, 2, 8, 8))


def test_a_codec_that_breaks_its_own_spec_is_named() -> None:
    codec = Noisy()
    codec.spec = CodecSpec("liar", 4, (1, 1, 1))
    with pytest.raises(CodecError, match=r"liar gave .*channels 4"):
        codec.encode(torch.zeros(1, 3, 2, 4, 4))


@pytest.mark.parametrize("init", [{"space_to_depth": 0}, {"factor": [1, 2]}, {"factor": 4}, {"side": 2}])
def test_wrong_arguments_are_refused(init: dict[str, object]) -> None:
    with pytest.raises(CodecError, match="vae-init-json"):
        IdentityCodec.from_options(CodecOptions(), init, load=True)


def test_default_backend_is_diffusers_and_space_to_depth_is_spatial() -> None:
    assert CodecOptions().vae_backend == "diffusers"
    assert IdentityCodec.from_options(CodecOptions(), {"space_to_depth": 4}, load=True).spec == CodecSpec(
        "identity", 48, (1, 4, 4)
    )
    assert without_noise(torch.zeros(1, 2, 1, 1, 1)).shape == (1, 4, 1, 1, 1)
