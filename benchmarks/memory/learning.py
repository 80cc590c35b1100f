"""Train small networks with and without memory on synthetic clips and measure what they recall.

Legend: B clips, n segments, F frames of a segment. Pixels are the latents; t = n F.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.memory.worlds import FRAMES, PHASES, Clips, read_colour
from titans_video.config.options import TrainOptions
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.diffusion.samplers import euler
from titans_video.models.memory import Memory
from titans_video.models.titans_dit import SegmentRollout, TitansVideoDiT
from titans_video.training.optim import build_optimizer, learning_rate_factor, set_learning_rates
from titans_video.types import Condition

SHIFT = 12.0
PROCESS = RectifiedFlow("x0", shift=SHIFT, variance=(0.35, 0.35, 0.35))
STEPS = 8
OVERLAP = 4
Draw = Callable[[torch.Generator, float], Clips]
"""Draws clips from a generator and the finished share of training (1 in tests)."""


def tiny_model(seed: int = 0, **changes: Any) -> TitansVideoDiT:
    """Build a network with about a quarter of a million parameters for 16x16 pixels."""
    arguments: dict[str, Any] = {
        "in_channels": 3,
        "patch_size": (4, 4, 4),
        "mlp_ratio": 2.0,
        "qk_norm": False,
        "model_dim": 64,
        "depth": 3,
        "heads": 4,
        "attention_type": "full",
        "text_widths": (len(PHASES),),
        "gated_skip": True,
        "mem_tokens": 8,
        "persistent_tokens": 2,
    }
    torch.manual_seed(seed)
    return TitansVideoDiT(**(arguments | changes))


@dataclass(frozen=True)
class Trained:
    """A trained network and the cost of its training."""

    network: TitansVideoDiT
    steps: int
    cpu_seconds: float
    loss: float


def train(
    network: TitansVideoDiT,
    draw: Draw,
    *,
    steps: int = 10**9,
    cpu_seconds: float = float("inf"),
    lr: float = 2e-3,
    muon_lr: float = 0.02,
    overlap: int = OVERLAP,
    seed: int = 0,
    label: str = "training",
) -> Trained:
    """Minimise the recipe's loss for this many steps or CPU seconds (of all threads).

    The learning rate falls linearly over the steps, or over the time if only that is given. CPU seconds are used
    because other work on the machine changes the wall-clock time.
    """
    options = TrainOptions(optimizer="muon", lr=lr, muon_lr=muon_lr, weight_decay=0.0, lr_warmup_steps=20)
    optimizer = build_optimizer(network, options)
    generator = torch.Generator().manual_seed(seed)
    began, used, done, smooth = time.process_time(), 0.0, 0, 0.0
    with tqdm(total=min(steps, 100_000), desc=label, unit="step", leave=False) as bar:
        while done < steps and used < cpu_seconds:
            progress = max(done / steps, used / cpu_seconds)
            set_learning_rates(optimizer, learning_rate_factor(min(done, 19), options) * (1 - progress))
            loss = rollout_loss(network, draw(generator, progress), overlap, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done, used = done + 1, time.process_time() - began
            smooth = 0.98 * smooth + 0.02 * float(loss.detach()) if done > 1 else float(loss.detach())
            bar.set_postfix_str(f"loss {smooth:.4f}, {used:.0f} CPU-s", refresh=False)
            bar.update()
    return Trained(network, done, used, smooth)


def rollout_loss(network: TitansVideoDiT, clips: Clips, overlap: int, generator: torch.Generator) -> Tensor:
    """Return the mean weighted error of the asked segments, each at its own time, as in `recipes.titans`.

    If a clip asks for several segments, the last one and a random one take part.
    """
    clean = clips.pixels
    B, n = len(clean), len(clips.texts)
    z = torch.randn(B, n, generator=generator)
    t = torch.sigmoid(z)
    t = (SHIFT * t / (1 + (SHIFT - 1) * t)).repeat_interleave(FRAMES, dim=1)  # (B, n F)
    noise = torch.randn(clean.shape, generator=generator)
    sample = PROCESS.add_noise(clean, noise, t)
    level = (0.1 * torch.rand(B, n, generator=generator)).repeat_interleave(FRAMES, dim=1)
    written = PROCESS.add_noise(clean, torch.randn(clean.shape, generator=generator), level).model_input
    drawn = clips.asked[int(torch.randint(len(clips.asked), (), generator=generator))]
    read = tuple(sorted({drawn, clips.asked[-1]}))
    rollout = SegmentRollout(FRAMES, written, level, written, level, overlap, horizon=n, texts=clips.texts, read=read)
    value = network(sample.model_input, t, Condition(clips.texts[0]), rollout=rollout).value
    frames = torch.cat([torch.arange(i * FRAMES, (i + 1) * FRAMES) for i in read])
    target, weight = sample.target[:, :, frames], sample.weight[:, :, frames]
    return (weight * (value - target).square()).mean()


@torch.no_grad()
def remember(network: TitansVideoDiT, clips: Clips, segments: int) -> Memory:
    """Return the memory after the first segments of true clips."""
    memory = network.start(len(clips.pixels))
    for i in range(segments):
        part = PROCESS.model_input(clips.pixels[:, :, i * FRAMES : (i + 1) * FRAMES], torch.zeros(len(clips.pixels)))
        memory = network(part, torch.zeros(len(part)), Condition(clips.texts[i]), memory, write=True).memory
    return memory


@torch.no_grad()
def generate(
    network: TitansVideoDiT, clips: Clips, segment: int, memory: Memory, overlap: int, generator: torch.Generator
) -> Tensor:
    """Generate segment `segment` after true frames and this memory: (B, 3, F, L, L)."""
    start = segment * FRAMES
    front = clips.pixels[:, :, max(start - overlap, 0) : start]
    o, B = front.shape[2], len(front)
    condition = Condition(clips.texts[segment])

    def denoise(x: Tensor, time: float) -> Tensor:
        times = torch.full((B, o + FRAMES), time)
        times[:, :o] = 0.0
        both = torch.cat((front, x), dim=2)
        value = network(PROCESS.model_input(both, times), times, condition, memory, overlap=o).value
        return PROCESS.to_x0(value, both, times)[:, :, o:]

    noise = torch.randn((B, 3, FRAMES, *front.shape[3:]), generator=generator)
    return euler(denoise, noise, PROCESS.schedule(STEPS, 1))


@torch.no_grad()
def recall_of(
    network: TitansVideoDiT,
    draw: Draw,
    samples: int,
    change: Callable[[Memory], Memory] = lambda m: m,
    *,
    overlap: int = OVERLAP,
    donor: bool = False,
    seed: int = 10_000,
) -> float:
    """Return the share of clips whose generated last segment has the colour of the first.

    Args:
        change: applied to the memory before the last segment.
        donor: compare with the colour of the previous clip in the batch, whose memory `swap` gives.
    """
    network.eval()
    generator, right, done = torch.Generator().manual_seed(seed), 0, 0
    while done < samples:
        clips = draw(generator, 1.0)
        last = len(clips.texts) - 1
        memory = change(remember(network, clips, last))
        colour = read_colour(generate(network, clips, last, memory, overlap, generator))
        wanted = clips.identity.roll(1) if donor else clips.identity
        right, done = right + int((colour == wanted).sum()), done + len(colour)
    network.train()
    return right / done


def swap(memory: Memory) -> Memory:
    """Give each sample the memory of the previous one in the batch."""
    size = next(iter(memory.tensors().values())).shape[0] if memory.tensors() else 0
    return memory.rows(torch.arange(size).roll(1)) if size else memory


def zero(memory: Memory) -> Memory:
    """Set the memory to zero."""
    return memory.map(torch.zeros_like)
