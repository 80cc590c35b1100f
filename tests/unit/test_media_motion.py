"""The measured motion of synthetic clips with known motion."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titans_video.media.motion import HALF, motion, motion_bucket

HEIGHT, WIDTH = 96, 128


def moving(speed: float, fps: float, count: int = 8, angle: float = 0.7) -> Tensor:
    """Return (1, 3, T, H, W): a texture that moves `speed` short sides per second."""
    texture = F.interpolate(torch.randn(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)), (320, 480)).clamp(
        -1, 1
    )
    texture = F.avg_pool2d(texture, 3, 1, 1)
    direction = torch.tensor([angle, 1 - angle**2]) / (angle**2 + (1 - angle**2) ** 2) ** 0.5
    frames = []
    for i in range(count):
        down, right = (direction * speed * HEIGHT * i / fps).tolist()
        y, x = torch.meshgrid(torch.arange(HEIGHT) + 20 + down, torch.arange(WIDTH) + 20 + right, indexing="ij")
        places = torch.stack([x / 479 * 2 - 1, y / 319 * 2 - 1], dim=-1)[None]
        frames.append(F.grid_sample(texture, places, align_corners=True, padding_mode="reflection")[0])
    return torch.stack(frames, dim=1)[None]


@pytest.mark.parametrize("fps", [6.0, 8.0, 24.0])
@pytest.mark.parametrize("speed", [0.1, 0.2, 0.4])
def test_speed_is_measured_whatever_the_rate(speed: float, fps: float) -> None:
    found = float(motion(moving(speed, fps), torch.tensor([fps])))
    assert found == pytest.approx(speed, rel=0.3)


def test_faster_is_more_up_to_255() -> None:
    rate = torch.tensor([8.0])
    buckets = [float(motion_bucket(moving(speed, 8.0), rate)) for speed in (0.0, 0.03, 0.1, 0.3, 0.7)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) == 5
    assert buckets[0] == 0
    assert 90 < buckets[2] < 165
    assert buckets[-1] <= 255
    assert all(b == round(b) for b in buckets)


def test_a_still_clip_with_noise_hardly_moves() -> None:
    noisy = moving(0.0, 8.0) + 0.01 * torch.randn(1, 3, 8, HEIGHT, WIDTH)
    flat = torch.zeros(1, 3, 8, HEIGHT, WIDTH) + 0.01 * torch.randn(1, 3, 8, HEIGHT, WIDTH)
    for clip in (noisy, flat):
        assert float(motion(clip, torch.tensor([8.0]))) < HALF / 10


def test_each_clip_by_itself() -> None:
    slow, fast = moving(0.1, 8.0), moving(0.3, 8.0)
    both = motion(torch.cat([slow, fast]), torch.tensor([8.0, 16.0]))
    assert float(both[0]) == float(motion(slow, torch.tensor([8.0])))
    assert float(both[1]) == float(motion(fast, torch.tensor([16.0])))


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 8, 8), (3, 4, 60)])
def test_small_and_short_clips(shape: tuple[int, int, int]) -> None:
    found = motion_bucket(torch.rand(1, 3, *shape), torch.tensor([8.0]))
    assert bool(found.isfinite().all())
    if shape[0] == 1:
        assert float(found) == 0
