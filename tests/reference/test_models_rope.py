"""Rotary positions against the definition in complex numbers and against diffusers."""

import cmath
import math

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch.testing import assert_close

from titans_video.errors import ConfigError
from titans_video.models.layers import apply_rotary, axis_pairs, freqs_cis_1d, freqs_cis_3d

GRIDS = [(1, 1, 1), (3, 2, 5), (2, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("head_dim", [6, 24, 64])
def test_rotation_is_the_definition_in_complex_numbers(grid: tuple[int, int, int], head_dim: int) -> None:
    s, rows, columns = grid
    x = torch.randn(s, rows * columns, head_dim)
    turned = apply_rotary(x, freqs_cis_3d(grid, head_dim, 256.0))
    pairs = axis_pairs(head_dim)
    assert sum(pairs) == head_dim // 2
    for slot in range(s):
        for row in range(rows):
            for column in range(columns):
                token, channel = row * columns + column, 0
                for position, count in zip((slot, row, column), pairs, strict=True):
                    for k in range(count):
                        value = complex(*x[slot, token, 2 * channel : 2 * channel + 2].tolist())
                        expected = value * cmath.exp(1j * position * 256.0 ** (-k / count))
                        got = turned[slot, token, 2 * channel : 2 * channel + 2]
                        assert math.isclose(got[0].item(), expected.real, abs_tol=1e-5)
                        assert math.isclose(got[1].item(), expected.imag, abs_tol=1e-5)
                        channel += 1


def test_one_axis_equals_diffusers() -> None:
    x = torch.randn(2, 3, 40, 16)  # batch, heads, length, head dim
    reference = apply_rotary_emb(x, get_1d_rotary_pos_embed(16, 40, theta=10_000.0, use_real=True))
    assert_close(apply_rotary(x, freqs_cis_1d(40, 8, 10_000.0)), reference, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_relative_places_only() -> None:
    grid, d = (4, 5, 6), 24
    q, k = torch.randn(d), torch.randn(d)
    freqs_cis = freqs_cis_3d(grid, d, 256.0).view(*grid, d // 2)

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> torch.Tensor:
        return apply_rotary(q, freqs_cis[a]) @ apply_rotary(k, freqs_cis[b])

    assert_close(score((0, 1, 2), (2, 0, 3)), score((1, 3, 4), (3, 2, 5)), atol=1e-4, rtol=1e-4)
    assert abs(score((0, 0, 0), (1, 0, 0)) - score((0, 0, 0), (0, 0, 0))) > 1e-3


def test_larger_grids_begin_like_smaller_ones() -> None:
    small = freqs_cis_3d((2, 2, 3), 24, 256.0).view(2, 2, 3, 12)
    large = freqs_cis_3d((5, 4, 7), 24, 256.0).view(5, 4, 7, 12)
    assert torch.equal(small, large[:2, :2, :3])


@pytest.mark.parametrize("head_dim", [4, 7, 15])
def test_heads_without_room_for_three_axes_are_refused(head_dim: int) -> None:
    with pytest.raises(ConfigError, match="--heads"):
        axis_pairs(head_dim)
