"""The mask of conditioning frames on the latent grid, compared with its definition."""

import pytest
import torch

from titans_video.errors import CodecError
from titans_video.types import CodecSpec, Condition, FrameRule, fold_frame_mask

CODECS = [
    ("each", 1, 7),
    ("blocks", 4, 8),
    ("causal", 4, 9),
    ("causal", 8, 17),
    ("causal", 4, 1),
    ("cogvideox", 4, 8),
    ("cogvideox", 4, 17),
]


@pytest.mark.parametrize(("rule", "stride", "frames"), CODECS)
def test_each_place_says_whether_its_pixel_frame_is_known(rule: FrameRule, stride: int, frames: int) -> None:
    spec = CodecSpec("c", 4, (stride, 8, 8), rule)
    known = torch.rand(3, frames) < 0.5
    folded = fold_frame_mask(known, spec)
    groups = spec.frame_groups(frames)
    assert folded.shape == (3, stride, len(groups))
    for i, (start, stop) in enumerate(groups):
        for place in range(stride):
            frame = start if stop - start == 1 else start + place
            assert torch.equal(folded[:, place, i], known[:, frame])


def test_clean_mask_needs_all_pixel_frames() -> None:
    causal, blocks = CodecSpec("wan", 16, (4, 8, 8), "causal"), CodecSpec("patch", 96, (4, 4, 4), "blocks")
    known = torch.arange(9)[None] < torch.tensor([[0], [1], [4], [5]])
    whole = Condition(cond_mask=fold_frame_mask(known, causal)).clean_mask()
    assert whole is not None
    assert whole.tolist() == [[False] * 3, [True, False, False], [True, False, False], [True, True, False]]
    whole = Condition(cond_mask=fold_frame_mask(known[:, :8], blocks)).clean_mask()
    assert whole is not None
    assert whole.tolist() == [[False, False], [False, False], [True, False], [True, False]]


def test_illegal_frame_counts_are_refused_with_the_nearest() -> None:
    with pytest.raises(CodecError, match="5 and 9"):
        fold_frame_mask(torch.ones(1, 7, dtype=torch.bool), CodecSpec("wan", 16, (4, 8, 8), "causal"))
