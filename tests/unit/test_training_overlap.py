"""Nothing in a training step waits for the device: batches cross in one copy, and nothing is read back."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference.test_pretrained_wan import recipe_of as wan_parts
from tests.toy_models import REGISTRY, make_toy
from tests.unit.test_pretrained_toys import recipe_of as toy_parts
from tests.unit.test_recipes_draws import PARTS, bytes_of
from tests.unit.test_training_guards import Sabotaged, events
from tests.unit.test_training_trainer import lines, no_pictures, options, train
from tests.unit.training_fakes import ToyRecipe, ToyStream
from tests.wan_pipelines import make_wan
from titans_video.pretrained import base
from titans_video.recipes.base import DiffusionRecipe
from titans_video.training import distributed, overlap
from titans_video.training.overlap import Feeder, LateValues, pack, unpack
from titans_video.training.trainer import Trainer
from titans_video.types import Batch

__all__ = ["no_pictures"]

META = torch.device("meta")  # stands for an accelerator: a value on it cannot be read at all


class Blocking(TorchDispatchMode):
    """Count the operations that would make this process wait for an accelerator.

    They are copies between the CPU and the device, also of the indices of an operation on the device, and operations
    that read a value, or whose result's shape depends on values.
    """

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, dict(kwargs or {}))) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        on_device = [x for x in given if x.device.type == "meta"]
        if on_device and name in self.READS:
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        crosses = any(x.device.type == "cpu" and x.dim() for x in given) and any(x.device == META for x in made)
        if crosses or (on_device and any(x.device.type == "cpu" for x in made)):
            self.found.append(f"{name} of {[tuple(x.shape) for x in given]}")
        return result


@contextmanager
def counted() -> Iterator[list[str]]:
    """Count also tensors that are made on the device from Python's numbers."""
    made = torch.tensor
    with pytest.MonkeyPatch.context() as patch, Blocking() as mode:

        def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if device is not None and torch.device(device) == META:
                mode.found.append("torch.tensor")
            return made(data, *args, device=device, **kwargs)

        patch.setattr(torch, "tensor", tensor)
        yield mode.found


def on_meta(recipe: DiffusionRecipe[Any]) -> DiffusionRecipe[Any]:
    """Move the network and the frozen parts."""
    recipe.network.to(META)
    recipe.codec.to(META)
    recipe.text.to(META)
    recipe.device, recipe.empty = META, recipe.empty.to(META)
    if getattr(recipe, "image", None) is not None:  # a pretrained model may have none
        recipe.image.to(META)  # type: ignore[attr-defined]
    return recipe


def step(recipe: DiffusionRecipe[Any], batch: Batch) -> None:
    recipe.loss(recipe.network, batch).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("cached", [False, True])
def test_a_micro_batch_is_one_copy(tmp_path: Path, make: Any, cached: bool) -> None:
    recipe, batch = make(tmp_path)
    batch = bytes_of(batch)
    if cached:
        moments = recipe.moments(None, batch.pixels)
        has_images = hasattr(recipe, "image")
        cond = moments if any(batch.num_cond_frames.tolist()) and not has_images else None
        images = {} if has_images else {"images": None, "image_rows": ()}
        motion = torch.ones(len(batch)) if has_images else None
        batch = replace(batch, pixels=None, moments=moments, cond_moments=cond, motion=motion, **images)
    draws = recipe.draws()
    recipe, feeder = on_meta(recipe), Feeder(META)
    step(recipe, feeder.one(draws(batch)))  # constants are copied once
    with counted() as found:
        step(recipe, batch)
    assert len(found) >= 9, found  # as without readers that draw, and without one copy
    with counted() as found:
        on_device = feeder.one(draws(batch))
        assert len(found) == 1
        step(recipe, on_device)
    assert len(found) == 1, found


@pytest.mark.parametrize("name", ["ToyFramesPipeline", "ToyDuetPipeline"])
def test_a_micro_batch_of_a_pretrained_model_is_one_copy(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MODEL_SPECS", {**base.MODEL_SPECS, **REGISTRY})
    recipe, batch = toy_parts(make_toy(tmp_path, name))
    batch = recipe.draws()(replace(batch, text=recipe.text(batch.captions)))  # text as from a cache
    on_meta(recipe)
    with counted() as found:
        step(recipe, Feeder(META).one(batch))
    drawn_late = 2 if name == "ToyDuetPipeline" else 0  # its latents are packed, and it has audio
    assert len(found) == 1 + drawn_late, found


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
def test_a_micro_batch_of_wan_is_one_copy(tmp_path: Path, variant: str) -> None:
    recipe, batch = wan_parts(make_wan(tmp_path, variant))
    batch = recipe.draws()(replace(batch, text=recipe.text(batch.captions)))
    on_meta(recipe)
    step(recipe, Feeder(META).one(batch))  # constants are copied once
    with counted() as found:
        step(recipe, Feeder(META).one(batch))
    assert len(found) == 1, found


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 5, generator=g),
        torch.randint(0, 255, (7,), generator=g, dtype=torch.uint8),
        torch.tensor(True),
        torch.randn(2, 3, generator=g).to(torch.bfloat16),
        torch.zeros(0, 4),
        torch.arange(5),
        torch.randn(4, 6, generator=g).T,
    ]


def test_packed_tensors_come_back_bit_for_bit() -> None:
    given = tensors()
    found = unpack(pack(given), given)
    for a, b in zip(found, given, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
        assert a.is_contiguous()
        assert a.data_ptr() % 64 == 0


def test_a_batch_is_copied_before_the_one_ahead_of_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, batch = PARTS[0](tmp_path)
    batches = [replace(recipe.draws()(batch), ids=[str(i)]) for i in range(3)]
    events = []
    plain = overlap.pack
    monkeypatch.setattr(overlap, "pack", lambda *a, **k: (events.append("copy"), plain(*a, **k))[1])
    for fed in Feeder(META)(batches):
        events.append(fed.ids[0])
        assert {x.device for x in fed.tensors()} == {META}
        assert [x.shape for x in fed.tensors()] == [x.shape for x in batch.tensors()] or fed.drawn
        assert fed.fps.device.type == "cpu"
    assert events == ["copy", "copy", "0", "copy", "1", "2"]
    assert next(Feeder(torch.device("cpu"))(batches)) is batches[0]
    assert list(Feeder(META)([])) == []


def test_late_values_are_those_of_the_device() -> None:
    assert LateValues(torch.tensor([1.5, float("inf")])).read() == [1.5, float("inf")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fed_batch_has_the_bits_of_the_host(tmp_path: Path) -> None:
    recipe, batch = PARTS[0](tmp_path)
    drawn = recipe.draws()(bytes_of(batch))
    for fed in Feeder(torch.device("cuda"))([drawn] * 3):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(fed.tensors(), drawn.tensors(), strict=True))
    assert LateValues(torch.arange(3.0, device="cuda")).read() == [0.0, 1.0, 2.0]


class Reads(TorchDispatchMode):
    """Count reads of values that a device would have computed. The integers of a batch's rows never leave the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_local_scalar_dense" and args[0].dtype != torch.int64:
            self.count += 1
        return func(*args, **(kwargs or {}))


def reads_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> int:
    """Return how many values a run of the toy reads; `tolist` is not dispatched, so it is replaced."""
    with monkeypatch.context() as patch, Reads() as mode:
        plain = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            mode.count += tensor.dtype != torch.int64
            return plain(tensor)

        patch.setattr(Tensor, "tolist", tolist)
        train(options(folder, **changes), ToyStream(2))
    return mode.count


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_steady_step_reads_once(tmp_path: Path, optimizer: str, clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"optimizer": optimizer, "max_grad_norm": clip, "grad_accum": 2, "save_every": 1000}
    few, many = (reads_of(tmp_path / str(n), monkeypatch, max_steps=n, **given) for n in (4, 10))
    assert many - few == 6


def order_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    """Return when batches are taken, losses computed and results read in a run of four steps."""
    happened: list[str] = []

    class Noted(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                happened.append("batch")
                yield batch

    class NotedRecipe(ToyRecipe):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            happened.append("loss" if torch.is_grad_enabled() else "trial")
            return super().loss(model, batch)

    read = LateValues.read
    with monkeypatch.context() as patch:
        patch.setattr(LateValues, "read", lambda self: (happened.append("read"), read(self))[1])
        given = options(folder, max_steps=4, **changes)
        Trainer(NotedRecipe(), Noted(2), given, distributed.start(given)).run()
    return happened[1:]  # without the trial of the largest bucket


def test_a_step_is_read_when_the_next_has_started_and_before_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, late = ["batch", "loss"], ["batch", "loss", "read"]
    assert order_of(tmp_path / "a", monkeypatch) == [*step, *late, *late, *late, "read", "trial"]
    saved = [*step, *late, "read", "trial"]
    assert order_of(tmp_path / "b", monkeypatch, save_every=2) == saved * 2


def test_a_bad_row_is_left_out_from_the_same_step_however_often_a_run_saves(tmp_path: Path) -> None:
    """It is found after the next step has its rows, so that step keeps them, also after a save that finds it early."""
    for every in (1, 2, 3, 100):
        stream = ToyStream(2)
        given = options(tmp_path / str(every), max_steps=6, save_every=every)
        Trainer(Sabotaged({"5": float("nan")}), stream, given, distributed.start(given)).run()
        assert (stream.left_out, stream.left_out_at) == (["5"], [4])
        assert [event["step"] for event in events(tmp_path / str(every))] == [3]


def test_the_step_that_follows_a_bad_one_trains_and_is_reported(tmp_path: Path) -> None:
    """Two bad steps in a row, then a good one: each is recorded under its own number, with its own rows."""
    given = options(tmp_path, max_steps=5)
    Trainer(Sabotaged({"3": float("nan"), "5": float("inf")}), ToyStream(2), given, distributed.start(given)).run()
    assert [(e["step"], e["rows"]) for e in events(tmp_path)] == [(2, ["3"]), (3, ["5"])]
    assert [line["loss"] is None for line in lines(tmp_path)] == [False, True, True, False, False]
    alone = ToyRecipe()  # the same good steps, without the others
    other = options(tmp_path / "alone", max_steps=1)
    Trainer(alone, ToyStream(2), other, distributed.start(other)).run()
    assert lines(tmp_path / "alone")[0]["loss"] == lines(tmp_path)[0]["loss"]


def test_the_allocator_may_grow_its_segments_unless_you_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for given, expected in ((None, "expandable_segments:True"), (names[0], "yours"), (names[1], None)):
        with monkeypatch.context() as patch:
            for name in names:
                patch.setenv(name, "yours")
                if name != given:
                    patch.delenv(name)
            distributed.start(options(tmp_path))
            assert os.environ.get(names[0]) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_steady_step_on_a_gpu_never_synchronises(tmp_path: Path) -> None:
    """The one wait is for an event, of which CUDA's debug mode does not complain."""
    given = options(tmp_path, max_steps=8, save_every=1000)
    accelerator = distributed.start(given)
    recipe, batch = PARTS[0](tmp_path)
    recipe.network.to(accelerator.device)
    recipe.codec.to(accelerator.device)
    recipe.device, recipe.empty = accelerator.device, recipe.empty.to(accelerator.device)

    class Watched(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            for i in range(99):
                torch.cuda.set_sync_debug_mode("error" if 3 <= i < 7 else "default")
                yield recipe.draws()(bytes_of(replace(batch, seeds=[4 * i + k for k in range(4)])))

        def largest(self) -> Batch:
            return recipe.draws()(bytes_of(batch))

    try:
        Trainer(recipe, Watched(4), given, accelerator).run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
