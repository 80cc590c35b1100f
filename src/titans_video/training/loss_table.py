"""Held-out loss as a table: task x bucket x quantile of the training times, or measure of a recipe that has its own.

Legend: Q quantiles or measures, B rows of a piece.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from titans_video.data.held_out import HeldOut, Piece
from titans_video.training import distributed
from titans_video.training.parallelism import data_group
from titans_video.training.recipe import Recipe

Cell = tuple[str, str]  # a task and a bucket


@dataclass
class Sums:
    """Of the rows of one cell: the summed loss at each quantile, the number of elements, the number of rows."""

    losses: list[float]
    elements: int = 0
    rows: int = 0

    def add(self, losses: Sequence[float], elements: int, rows: int) -> None:
        self.losses = [a + b for a, b in zip(self.losses, losses, strict=True)]
        self.elements += elements
        self.rows += rows

    def means(self) -> list[float | None]:
        return [x / self.elements if self.elements else None for x in self.losses]


def quantiles(count: int) -> list[float]:
    """Return `count` evenly spaced quantiles without the ends: 9 are 0.1, 0.2, ... 0.9."""
    return [round((i + 1) / (count + 1), 6) for i in range(count)]


def measure(
    recipe: Recipe,
    model: nn.Module,
    rows: HeldOut,
    count: int,
    accelerator: Accelerator,
    on_piece: Callable[[], bool],
) -> dict[Cell, Sums] | None:
    """Measure the sums of every cell, equal on all processes; None if `on_piece` stops it by returning False.

    Pieces are assigned to the processes in turns, bucket by bucket. Every process calls `on_piece` before each turn.
    Repeated, uncounted pieces fill the last turn of a bucket, because a sharded model must be called equally often.
    The sums are added in the order of the pieces, so they do not depend on the number of processes.
    """
    times, pieces = quantiles(count), rows.pieces()
    columns = len(recipe.measures) or count
    found: list[tuple[int, list[float], int, int]] = []
    group = data_group(accelerator)
    for turn in assign(pieces, group.count):
        if not on_piece():
            return None
        number, piece, counts = turn[group.index]
        batch, good = rows.read(piece)
        losses, elements = recipe.held_out(model, batch, times)  # (Q, B), (B,)
        if counts and group.is_first and any(good):
            found.append((number, losses[:, good].sum(dim=1).tolist(), int(elements[good].sum()), sum(good)))
    cells: dict[Cell, Sums] = {}
    for number, sums, total, kept in sorted(
        part for own in distributed.all_gather_object(accelerator, found) for part in own
    ):
        cell = pieces[number].task, str(pieces[number].bucket)
        cells.setdefault(cell, Sums([0.0] * columns)).add(sums, total, kept)
    return cells


def assign(pieces: Sequence[Piece], world: int) -> list[list[tuple[int, Piece, bool]]]:
    """Return turns of one piece for each process, all of one bucket, with its number and whether it is counted."""
    turns: list[list[tuple[int, Piece, bool]]] = []
    buckets = dict.fromkeys(piece.bucket for piece in pieces)
    for bucket in buckets:
        numbered = [(i, piece, True) for i, piece in enumerate(pieces) if piece.bucket == bucket]
        for start in range(0, len(numbered), world):
            turn = numbered[start : start + world]
            turns.append(turn + [(i, piece, False) for i, piece, _ in turn[:1]] * (world - len(turn)))
    return turns


def as_line(
    cells: dict[Cell, Sums], count: int, measures: Sequence[str] = (), experts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the values for validation.jsonl; losses are means over the supervised elements.

    `measures` are those of the recipe; with them, the first one is the loss. `experts` has the network that predicts at
    each quantile, of a model with several.
    """
    total = sum_cells(cells, len(measures) or count)

    def loss(sums: Sums) -> float | None:
        return sums.means()[0] if measures else _mean(sums)

    return {
        "loss": loss(total),
        **({"measures": list(measures)} if measures else {"quantiles": quantiles(count)}),
        "losses": total.means(),
        "rows": total.rows,
        **({} if experts is None else {"expert_of": list(experts), "experts": by_expert(total.means(), experts)}),
        "cells": [
            {
                "task": task,
                "bucket": bucket,
                "rows": s.rows,
                "elements": s.elements,
                "loss": loss(s),
                "losses": s.means(),
            }
            for (task, bucket), s in sorted(cells.items())
        ],
    }


def sum_cells(cells: dict[Cell, Sums], count: int) -> Sums:
    """Return the sums over all cells."""
    total = Sums([0.0] * count)
    for sums in cells.values():
        total.add(sums.losses, sums.elements, sums.rows)
    return total


def _mean(sums: Sums) -> float | None:
    return sum(sums.losses) / (sums.elements * len(sums.losses)) if sums.elements else None


def by_expert(losses: Sequence[float | None], experts: Sequence[str]) -> dict[str, float | None]:
    """Return the mean loss of each expert over its quantiles; None if there was no loss."""
    found: dict[str, list[float]] = {name: [] for name in experts}
    for loss, name in zip(losses, experts, strict=True):
        if loss is not None:
            found[name].append(loss)
    return {name: sum(own) / len(own) if own else None for name, own in found.items()}


def columns(line: Mapping[str, Any]) -> list[str]:
    """Return the names of a line's `losses`: the measures, or the quantiles, each with its expert if there are any."""
    experts = line.get("expert_of")
    measures = list(line.get("measures", ()))
    return measures or [f"{q:g}{f' {experts[i]}' if experts else ''}" for i, q in enumerate(line["quantiles"])]


def as_table(line: Mapping[str, Any]) -> list[list[Any]]:
    """Return the table of a line of validation.jsonl: a header, a row for each cell, and the total of several cells.

    With experts, the last columns have the mean of each over its quantiles.
    """
    mean = () if line.get("measures") else ("mean",)  # of different measures there is none
    experts: Sequence[str] = line.get("expert_of", ())
    means = list(dict.fromkeys(experts))

    def row(*first: Any, part: Mapping[str, Any]) -> list[Any]:
        own = by_expert(part["losses"], experts) if experts else {}
        return [*first, *part["losses"], *[part["loss"] for _ in mean], *[own[name] for name in means]]

    rows = [row(c["task"], c["bucket"], c["rows"], part=c) for c in line["cells"]]
    if len(rows) > 1:
        rows.append(row("all", "", line["rows"], part=line))
    return [["task", "bucket", "rows", *columns(line), *mean, *(f"mean {name}" for name in means)], *rows]


def format_cell(value: Any) -> str:
    """Return a value of `as_table` as text; losses have four decimal places."""
    if value is None:
        return "-"
    return str(value) if not isinstance(value, float) else f"{value:.4f}" if value < 100 else f"{value:.4g}"


def format_table(line: Mapping[str, Any]) -> str:
    """Return the table of a line of validation.jsonl for the terminal."""
    rows = [[format_cell(x) for x in row] for row in as_table(line)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        return "  " + "  ".join(cells).rstrip()

    return "\n".join(map(aligned, rows))
