"""A toy recipe and stream for tests of the trainer: a two-layer network that learns a fixed map."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.checkpoint import Checkpoint
from titans_video.config.generation import GenerateOptions
from titans_video.config.options import TrainOptions
from titans_video.data.buckets import Bucket
from titans_video.data.held_out import Piece
from titans_video.generation.long_video import Sampled
from titans_video.seeding import derive_seed, seeded_randn
from titans_video.training import resume as resume_module
from titans_video.training.checkpointing import Resume
from titans_video.training.recipe import AdapterFiles, VideoSampler
from titans_video.types import Batch

logger = logging.getLogger("titans_video.tests")

WIDTH = 6


class Toy(nn.Module):
    """(B, WIDTH) -> (B, WIDTH), with a hidden matrix in a block, dropout, and an embedding-like first layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + self.dropout(torch.tanh(block(x)))
        out: Tensor = self.last(x)
        return out


class ToyRecipe:
    """Squared error on the first `count` outputs of each row, where the count is the row's own."""

    def __init__(self, dropout: float = 0.0, prompt: str | None = "a red circle") -> None:
        self.network: nn.Module = Toy(dropout)
        self.sample_prompt = prompt
        self.sample_flags: tuple[str, ...] = ()
        self.adapter: AdapterFiles | None = None
        self.measures: tuple[str, ...] = ()

    def row_elements(self, batch: Batch) -> Tensor:
        return self._mask(batch).sum(1).long()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x = seeded_randn((WIDTH,), [derive_seed(s, "x") for s in batch.seeds])
        return ((model(x) - x.flip(1)).square() * self._mask(batch)).sum(1)

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        return Checkpoint(model=model, config={"recipe": "toy"}, step=step)

    def tokens(self, batch: Batch) -> int:
        return 3 * len(batch)

    def flops(self, batch: Batch) -> float:
        return 1000.0 * len(batch)

    def experts_at(self, quantiles: Sequence[float]) -> list[str] | None:
        return None

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Careless with the global generator, as a library may be: validation must put it back."""
        torch.randn(7)
        x, mask = seeded_randn((WIDTH,), [derive_seed(s, "x") for s in batch.seeds]), self._mask(batch)
        rows = [((model(q * x) - x.flip(1)).square() * mask).sum(1).double() for q in quantiles]
        return torch.stack(rows), mask.sum(1).long()

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[VideoSampler]:
        """Videos whose grey is what the network says of the seed."""

        def sample(options: GenerateOptions) -> Sampled:
            torch.randn(5)
            grey = network(seeded_randn((WIDTH,), [options.seed])).mean().tanh()
            video = torch.stack([grey * k / 4 for k in range(4)])[None, :, None, None].expand(3, 4, 16, 16)
            return Sampled(video, 8.0, {"prompt": options.prompt, "seed": options.seed})

        yield sample

    def _mask(self, batch: Batch) -> Tensor:
        """(B, WIDTH): rows have 1 to WIDTH supervised elements, by their seed."""
        counts = torch.tensor([1 + s % WIDTH for s in batch.seeds])
        return (torch.arange(WIDTH)[None] < counts[:, None]).float()


def going_on(run: TrainOptions) -> Resume | None:
    """Do what recipes do before they train: find the checkpoint to resume from, and prepare the folder."""
    folder, notes = resume_module.find_resume(run)
    for note in notes:
        logger.info(note)
    resume = resume_module.open_resume(folder, run)
    resume_module.prepare_folder(run, resume)
    return resume


class Killed(BaseException):
    """Ends a run without a save, as SIGKILL does."""


class ToyStream:
    """Rows 0, 1, 2, ... forever, `batch` of each global micro-batch on this rank."""

    def __init__(self, batch: int, rank: int = 0, world: int = 1) -> None:
        self.batch, self.rank, self.world = batch, rank, world
        self.position = 0
        self.left_out: list[str] = []
        self.left_out_at: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = (self.position * self.world + self.rank) * self.batch
            self.position += 1
            yield toy_batch(range(start, start + self.batch))

    def stop_waiting_if(self, stop: Callable[[], bool]) -> None:
        pass

    def largest(self) -> Batch:
        return toy_batch(range(self.batch))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def leave_out(self, rows: Sequence[str], reason: str, detail: str, first: int) -> None:
        """Note the rows; they never come again, because every row comes once."""
        self.left_out += rows
        self.left_out_at += [first] * len(rows)


def toy_batch(rows: range) -> Batch:
    n = len(rows)
    return Batch(
        ids=[str(i) for i in rows],
        seeds=[derive_seed(0, "row", i) for i in rows],
        captions=[""] * n,
        tasks=["t2v"] * n,
        frames=1,
        height=1,
        width=1,
        fps=torch.ones(n),
        num_cond_frames=torch.zeros(n, dtype=torch.int64),
    )


class ToyRows:
    """Held-out rows in pieces of (task, frames of the bucket, numbers of the rows); those in `lost` cannot be read."""

    def __init__(self, *pieces: tuple[str, int, range], lost: Sequence[int] = ()) -> None:
        self.given, self.lost = pieces, lost
        self.bad_rows: dict[str, str] = {}

    def pieces(self) -> list[Piece]:
        numbers: Any = [rows for _, _, rows in self.given]
        return [Piece(task, Bucket(t, 1, 1), numbers[i]) for i, (task, t, _) in enumerate(self.given)]

    def read(self, piece: Piece) -> tuple[Batch, list[bool]]:
        rows: Any = piece.records
        self.bad_rows |= {str(i): "gone" for i in rows if i in self.lost}
        return toy_batch(rows), [i not in self.lost for i in rows]
