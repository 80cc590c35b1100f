"""Frozen blocks in main memory: results to the bit, and how many blocks are on the device."""

import copy

import pytest
import torch
from torch import Tensor, nn

from titans_video.config.options import ActivationOptions
from titans_video.models import lora
from titans_video.models.activations import limit_activations
from titans_video.models.streaming import Block, Place, Places, spread, stream_blocks

CPU = torch.device("cpu")
BLOCKS, WIDTH = 5, 64


class Part(nn.Module):
    """A block with every kind of frozen weight: of a norm too, whose gradients need it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_q, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.register_buffer("table", torch.rand(WIDTH))

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.out(self.to_q(self.norm(x) * self.table).tanh())
        return x, text + x.mean()


class Stack(nn.Module):
    _no_split_modules = ("Part",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(4, WIDTH), nn.ModuleList(Part() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x, text = self.first(x), torch.zeros(1)
        for block in self.blocks:
            x, text = block(x, text)
        return x.square().mean() + text.mean()


def network() -> Stack:
    torch.manual_seed(0)
    made = Stack()
    lora.inject(made, lora.LoraConfig(2, targets=("to_q",)))
    for _, layer in lora.layers(made):
        nn.init.normal_(layer.lora_B[lora.DEFAULT].weight)
    limit_activations(made, ActivationOptions(gradient_checkpointing=True))
    return made


def frozen(part: nn.Module) -> list[Tensor]:
    return [t for t in [*part.parameters(), *part.buffers()] if not t.requires_grad]


def trained(made: nn.Module) -> list[nn.Parameter]:
    return [p for p in made.parameters() if p.requires_grad]


@pytest.mark.parametrize("keep", [0, 1, 2, 4, 5])
def test_results_are_those_of_a_network_on_the_device(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation and training again, to the bit; each pass copies a block once, and few are there at once."""
    plain, streamed = network(), network()
    before = copy.deepcopy(plain.state_dict())
    copies: list[int] = []
    real = Places.copy

    def counted(places: Places, block: Block, needed: Block | None) -> Place:
        copies.append(1)
        return real(places, block, needed)

    monkeypatch.setattr(Places, "copy", counted)
    streams = stream_blocks(streamed, CPU, keep)
    optimizers = [torch.optim.SGD(trained(made), lr=0.1) for made in (plain, streamed)]
    x = torch.randn(3, 4)
    counts = []
    for _ in range(3):
        losses = [made(x) for made in (plain, streamed)]
        assert torch.equal(*losses)
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*map(trained, (plain, streamed)), strict=True))  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            assert torch.equal(*[made(2 * x) for made in (plain, streamed)])
        counts.append(len(copies))
    moving = BLOCKS - keep
    assert len([b for stream in streams for b in stream.blocks]) == moving
    assert sum(len(stream.places.all) for stream in streams) == min(2, moving)
    if moving > 2:  # of three passes, each begins with the two blocks that the one before ended with
        assert counts[2] - counts[1] <= 3 * (moving - 2) + 2
    elif moving:
        assert counts[2] == moving
    after = streamed.state_dict()
    fixed = [name for name, p in streamed.named_parameters() if not p.requires_grad]
    assert all(torch.equal(after[name], before[name]) for name in fixed)


@pytest.mark.parametrize("keep", [0, 2])
def test_memory_on_the_device(keep: int) -> None:
    """Two places, and the blocks that stay: all other frozen weights of blocks have their storage in main memory."""
    made = network()
    block = sum(t.numel() * t.element_size() for t in frozen(made.blocks[0]))
    (stream,) = stream_blocks(made, CPU, keep)
    made(torch.randn(3, 4)).backward()
    hosts = {part.host.untyped_storage().data_ptr() for part in stream.blocks}
    storages = [t.untyped_storage() for part in made.blocks for t in frozen(part)]
    there = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in hosts}
    assert {part.memory.data_ptr() for part in stream.places.all} <= there.keys()
    assert (keep + 2) * block <= sum(there.values()) < (keep + 2) * block * 1.05  # tensors begin at multiples of 256


def test_two_networks_share_the_places() -> None:
    """Each call is for one of them, with gradients of its own adapter."""
    torch.manual_seed(0)
    both = nn.ModuleDict({"high": network(), "low": network()})
    both._no_split_modules = ("Part",)  # type: ignore[assignment]  # as the routers of pretrained models have
    plain = copy.deepcopy(both)
    streams = stream_blocks(both, CPU)
    assert [len(stream.blocks) for stream in streams] == [BLOCKS, BLOCKS]
    assert streams[0].places is streams[1].places
    assert len(streams[0].places.all) == 2
    for name in ("high", "low", "low", "high"):
        x = torch.randn(3, 4)
        for made in (plain, both):
            made[name](x).backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*(trained(m[name]) for m in (plain, both)), strict=True))  # type: ignore[arg-type]


def test_blocks_that_stay_are_spread_evenly() -> None:
    assert spread(0, 4) == set()
    assert spread(2, 4) == {1, 3}
    assert spread(3, 8) == {2, 5, 7}
    assert spread(9, 4) == {0, 1, 2, 3}
