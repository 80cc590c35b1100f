"""Which task an occurrence of a row trains, and how many of its frames are known."""

from dataclasses import dataclass

from titans_video.config.options import DataOptions
from titans_video.data.manifest import TASKS, Row
from titans_video.errors import ConfigError
from titans_video.seeding import uniform


@dataclass(frozen=True)
class TaskMix:
    """Shares of t2v, i2v and v2v that sum to 1; none: each row's own task."""

    shares: tuple[tuple[str, float], ...] = ()

    def draw(self, row: Row, seed: int) -> str:
        """The task of one occurrence; `seed` is the occurrence's own."""
        if not self.shares:
            return row.task
        u = uniform(seed, "task")
        for task, share in self.shares:
            u -= share
            if u < 0:
                return task
        return self.shares[-1][0]


def parse_task_mix(text: str | None) -> TaskMix:
    """Read `t2v=0.5,i2v=0.4,v2v=0.1`.

    Raises:
        ConfigError: an unknown or repeated task, or shares that are no numbers or do not sum to 1.
    """
    if text is None:
        return TaskMix()
    shares: dict[str, float] = {}
    for part in text.split(","):
        task, _, value = (p.strip() for p in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if task not in TASKS or task in shares or not 0 <= share <= 1:
            raise ConfigError(
                f"--task-mix: {part.strip()!r} is not TASK=SHARE with a task among {', '.join(TASKS)}, each once, and "
                "a share from 0 to 1, e.g. t2v=0.5,i2v=0.4,v2v=0.1."
            )
        shares[task] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ConfigError(f"--task-mix {text}: the shares sum to {sum(shares.values()):g}; they must sum to 1.")
    return TaskMix(tuple((t, s) for t, s in shares.items() if s > 0))


def num_cond_frames(task: str, row: Row, options: DataOptions, frames: int, seed: int) -> int:
    """How many leading frames are given: t2v none, i2v one, v2v the row's `cond_frames`, else `--cond-frames`, else
    drawn evenly from 1 to all but one. At least one frame is always left to make; a clip of one frame is t2v."""
    if task == "t2v" or frames < 2:
        return 0
    if task == "i2v":
        return 1
    asked = row.cond_frames if row.cond_frames is not None else options.cond_frames
    if asked is None:
        asked = 1 + int(uniform(seed, "known-frames") * (frames - 1))
    return min(asked, frames - 1)


def needs_picture(row: Row, mix: TaskMix) -> bool:
    """Whether a row's own picture, if it has one, may be what it is conditioned on."""
    return any(task == "i2v" for task, _ in mix.shares) if mix.shares else row.task == "i2v"
