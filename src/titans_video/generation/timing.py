"""How long a video is: frames and rates, as asked for and as generated. Arithmetic only."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from titans_video.errors import ConfigError
from titans_video.generate_options import GenerateOptions
from titans_video.generation.loading import VideoModel
from titans_video.media.interpolating import frames_needed
from titans_video.media.writing import exact_rate

DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class Timing:
    """Attributes:
    frames, fps: of the file.
    made, gen_fps: of what the model makes; equal to the file's where nothing is interpolated.
    notes: what the person should be told.
    """

    frames: int
    fps: float
    made: int
    gen_fps: float
    notes: list[str] = field(default_factory=list)

    @property
    def interpolated(self) -> bool:
        return self.gen_fps != self.fps


def exact_frames(seconds: float, fps: float) -> int:
    """ceil(seconds x fps) of the decimal numbers as they were written: 0.07 x 100 is 7, not 7.000000000000001."""
    # A rate such as 24000/1001 comes out of a checkpoint as the nearest float; this finds it again.
    return math.ceil(Fraction(str(seconds)) * Fraction(str(fps)).limit_denominator(1001))


def timing(options: GenerateOptions, model: VideoModel) -> Timing:
    """Frames and rates that the flags ask for; what they leave open is as the model was trained.

    Raises:
        ConfigError: neither the flags nor the checkpoint say a length, or --gen-fps is above --fps.
    """
    fps = float(next(v for v in (options.fps, model.trained("fps"), DEFAULT_FPS) if v is not None))
    gen_fps = fps if options.gen_fps is None else options.gen_fps
    if gen_fps > fps:
        raise ConfigError(f"--gen-fps {gen_fps:g} is above --fps {fps:g}: frames are only ever put in, never left out.")
    trained = model.trained("num_frames")
    if options.seconds is not None:
        frames = exact_frames(options.seconds, fps)
    elif options.num_frames is not None:
        frames = options.num_frames
    elif trained is not None:
        frames = math.floor((int(trained) - 1) * exact_rate(fps) / exact_rate(gen_fps)) + 1
    else:
        raise ConfigError(f"{model.path} does not say the num_frames it was trained on: give --num-frames.")
    if gen_fps == fps:
        return Timing(frames, fps, frames, fps)
    made, least = frames_needed(frames, fps, gen_fps), math.ceil(frames * exact_rate(gen_fps) / exact_rate(fps))
    notes = []
    longest = options.window or trained
    if longest is not None and least <= longest < made:  # one frame more would take a second window
        made = least
        notes.append(f"The last of {made} generated frames is held for what remains of {frames}.")
    return Timing(frames, fps, made, gen_fps, [f"{made} frames are made at {gen_fps:g} a second.", *notes])
