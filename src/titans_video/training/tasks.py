"""Each task's own loss in a step, where a recipe says what each row's is.

Legend: B rows of a micro-batch, K tasks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titans_video.data.manifest import TASKS
from titans_video.types import Batch

SUMS = 3
"""Of a task: summed loss, supervised elements, rows."""


def task_sums(recipe: Any, micro: Sequence[Batch], losses: Sequence[Tensor]) -> Tensor:
    """(K * SUMS,) float32 of one process's micro-batches, to be added up over the processes; zeros where `losses` are
    sums over all rows.

    Args:
        recipe: has `row_elements` if its losses are of rows; see `training.recipe.Recipe`.
        losses: of each micro-batch, (B,) or a scalar.
    """
    sums = torch.zeros(len(TASKS), SUMS, device=losses[0].device)
    for batch, loss in zip(micro, losses, strict=True):
        if loss.ndim == 0:
            continue
        kinds = torch.tensor([TASKS.index(task) for task in batch.tasks], device=loss.device)
        elements = recipe.row_elements(batch).to(loss)
        sums.index_add_(0, kinds, torch.stack([loss.float(), elements, torch.ones_like(elements)], dim=1))
    return sums.flatten()


def task_losses(sums: Sequence[float]) -> dict[str, float | int]:
    """What metrics.jsonl says of a step's tasks: `loss_<task>`, the mean over its supervised elements, and
    `rows_<task>`, of the tasks that the step had."""
    line: dict[str, float | int] = {}
    for i, task in enumerate(TASKS):
        loss, elements, rows = sums[i * SUMS : (i + 1) * SUMS]
        if elements:
            line |= {f"loss_{task}": loss / elements, f"rows_{task}": round(rows)}
    return line
