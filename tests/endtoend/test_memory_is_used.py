"""Occluded identity recall, small: what was seen before the curtain is what comes after it, and only by the memory.

Two colours (chance is a half) and one segment of curtain; the same code at full size is benchmarks/memory/recall.py.
"""

import pytest
import torch

from benchmarks.memory.learning import Draw, recall_of, swap, tiny_model, train, zero
from benchmarks.memory.worlds import Clips, occluded_identity, read_colour
from titans_video.models.titans_dit import TitansVideoDiT

COLOURS, SAMPLES = 2, 128


def clips(batch: int) -> Draw:
    def draw(generator: torch.Generator, progress: float) -> Clips:
        return occluded_identity(batch, 1, generator, COLOURS)

    return draw


@pytest.fixture(scope="module")
def remembering() -> TitansVideoDiT:
    network = tiny_model(model_dim=48, depth=2, heads=2, mem_tokens=4)
    return train(network, clips(16), steps=300, lr=5e-3, muon_lr=0.04).network


def test_the_analyser_reads_true_clips() -> None:
    for hidden in (0, 2):
        true = occluded_identity(64, hidden, torch.Generator().manual_seed(1))
        for segment in (0, hidden + 1):
            assert torch.equal(read_colour(true.pixels[:, :, 4 * segment : 4 * segment + 4]), true.identity)
        assert len(true.texts) == hidden + 2


def test_the_last_window_tells_nothing() -> None:
    """The mean curtain of each colour is the mean curtain of all."""
    true = occluded_identity(256, 1, torch.Generator().manual_seed(2))
    curtain = true.pixels[:, :, 4:8].flatten(1)
    by_colour = torch.stack([curtain[true.identity == c].mean(0) for c in range(8)])
    spread = curtain.std(0) / (256 / 8) ** 0.5
    assert ((by_colour - curtain.mean(0)).abs() < 5 * spread).all()


def test_memory_carries_the_identity(remembering: TitansVideoDiT) -> None:
    own = recall_of(remembering, clips(64), SAMPLES)
    assert own >= 0.9


def test_another_memory_is_another_identity(remembering: TitansVideoDiT) -> None:
    """The causal proof. By chance half of the donors have the own colour, so own and donor must part ways."""
    assert recall_of(remembering, clips(64), SAMPLES, swap, donor=True) >= 0.9
    assert recall_of(remembering, clips(64), SAMPLES, swap) <= 0.7


def test_without_it_there_is_nothing_but_chance(remembering: TitansVideoDiT) -> None:
    assert 0.3 <= recall_of(remembering, clips(64), SAMPLES, zero) <= 0.7
    forgetful = tiny_model(model_dim=48, depth=2, heads=2, memory="none")
    train(forgetful, clips(16), steps=60, lr=5e-3, muon_lr=0.04)
    assert recall_of(forgetful, clips(64), SAMPLES) <= 0.7
