"""How the windows of a long video may be joined: by what a network can do, not by which network it is.

A new recipe says two things, and nothing here knows its name: that its network takes one time a clip, if it does (the
class attribute `frame_times = False`), and which tasks it was trained on (`config["data"]["tasks"]`).
"""

from dataclasses import dataclass
from typing import Literal

from titans_video.errors import ConfigError

Mode = Literal["continue", "blend"]
Wanted = Literal["auto", "continue", "blend"]


@dataclass(frozen=True)
class Joins:
    """What a network can do about frames that it is given.

    Attributes:
        frame_times: it takes a time for each latent frame, so that any number of given frames can be held clean.
            Otherwise it can at most be told a first frame, and windows are chained on their last frame.
        tasks: what it was trained on (t2v, i2v, v2v); None: the checkpoint does not say.
    """

    frame_times: bool
    tasks: frozenset[str] | None = None

    @property
    def goes_on_from_frames(self) -> bool:
        """From several leading frames."""
        return self.frame_times and (self.tasks is None or "v2v" in self.tasks)

    @property
    def makes_from_text(self) -> bool:
        """Without any frame given."""
        return self.tasks is None or "t2v" in self.tasks

    @property
    def goes_on_from_one(self) -> bool:
        """From a single first frame."""
        return self.tasks is None or bool(self.tasks & {"i2v", "v2v"})


def choose(joins: Joins, wanted: Wanted, overlap: int | None) -> tuple[Mode, int | None, list[str]]:
    """How to join, and by how much.

    Args:
        joins: of the network.
        wanted: `auto`: *continue* where training gave known frames, else *blend*.
        overlap: frames, or None for the default.
    Returns:
        The mode; the overlap, 1 where windows are to be chained on their last frame; what the person should be told.
    Raises:
        ConfigError: the network cannot do what was asked for.
    """
    if wanted == "blend":
        return "blend", overlap, []
    if wanted == "auto" and not joins.goes_on_from_one:
        return "blend", overlap, ["The model was not trained to go on from given frames, so windows are blended."]
    if not joins.frame_times:
        if not joins.goes_on_from_one:
            raise ConfigError(
                f"--window-mode {wanted}: this network cannot be told of a first frame, so no window can go on from "
                "another; use --window-mode blend."
            )
        # Without text there would be nothing that the later windows could go by.
        if wanted == "auto" and overlap not in (None, 1) and joins.makes_from_text:
            said = f"This network is told one first frame at most, so windows that share {overlap} frames are blended; "
            return "blend", overlap, [said + "--window-mode continue chains each on the last frame of the one before."]
        if overlap not in (None, 1):
            raise ConfigError(
                f"--overlap {overlap}: this network has one time for the whole clip and cannot hold {overlap} frames "
                "clean. Use --overlap 1, which chains each window on the last frame of the one before, or "
                "--window-mode blend."
            )
        return "continue", 1, ["Each window goes on from the last frame of the one before it."]
    if not joins.goes_on_from_frames and overlap is None and joins.goes_on_from_one:
        return "continue", 1, ["The model was trained to go on from one frame: windows are chained on their last one."]
    notes = []
    if not (joins.goes_on_from_frames or (overlap == 1 and joins.goes_on_from_one)):
        notes.append(
            "The model was not trained to go on from several frames (v2v rows or --task-mix), so the motion may break "
            "at the joins; --window-mode blend or --overlap 1 may do better."
        )
    return "continue", overlap, notes
