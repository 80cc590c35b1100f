"""Samplers and step caches: time, share of the blocks that run, and distance from the exact or the uncached videos.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --checkpoint RUN --device cuda --dtype bf16 --videos 1

The first table compares samplers with the solution of the sampling equation, by Heun's method with many steps. The
second one compares step caches with the same sampler without a cache. PSNR is of all decoded videos, for a range of 2.
Times are of the denoising and the decoding, the shortest of the repeats, which alternate. On a CPU they are
seconds of a core, which hardly depend on the machine's other load.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from common.measuring import show
from torch import Tensor, nn

from titans_video.config.generation import GenerateOptions, Overrides, RunOptions
from titans_video.generation.denoise import encode_prompts, eval_mode, make_clip
from titans_video.generation.model import VideoModel, load_for
from titans_video.generation.request import Request, build_request, plan
from titans_video.generation.step_cache import KINDS

PROMPTS = [f"a {colour} {shape} moving {way}" for colour, shape, way in (
    ("red", "circle", "right"), ("blue", "square", "up"), ("green", "triangle", "left"), ("yellow", "circle", "down"),
)]  # fmt: skip
SAMPLERS = {"euler": 1, "heun": 2, "dpm++": 1, "unipc": 1}
"""Network calls of a step."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="default: the weights of the package")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--videos", type=int, default=8, help="videos in a batch")
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 16, 32, 64], help="network calls of the samplers")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 50], help="steps of the step caches")
    parser.add_argument("--exact", type=int, default=100, help="steps of the exact solution")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="do little, to check that it runs")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    a = parser.parse_args()
    if a.quick:
        a.videos, a.calls, a.steps, a.exact, a.repeats = 1, [4], [8], 8, 1
    return a


@dataclass
class Counter:
    """Count the blocks that run."""

    blocks: nn.ModuleList
    ran: int = field(default=0)

    def __post_init__(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.ran += 1


@dataclass
class Result:
    video: Tensor
    seconds: float
    blocks: int


def generate(model: VideoModel, request: Request, counter: Counter) -> Result:
    """Generate the videos of a request once."""
    made = plan(model, request)
    with eval_mode(model.network):
        prompts = encode_prompts(model, request.prompts, request.negative_prompt, request.uses_cfg)
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        counter.ran, began = 0, clock()
        video = make_clip(model, request, made, prompts)  # on the CPU, so the device is done
        return Result(video, clock() - began, counter.ran)


def compare(model: VideoModel, requests: list[Request], counter: Counter, repeats: int) -> list[Result]:
    """Generate each request several times in turn; return its last video and its shortest time."""
    runs = [[generate(model, request, counter) for request in requests] for _ in range(repeats + 1)][1:]
    return [replace(runs[-1][i], seconds=min(run[i].seconds for run in runs)) for i in range(len(requests))]


def psnr(video: Tensor, reference: Tensor) -> str:
    error = float((video - reference).square().mean())
    return f"{10 * math.log10(4 / error):.1f}" if error else "equal"


def samplers_table(model: VideoModel, request: Request, counter: Counter, a: argparse.Namespace) -> list[str]:
    exact = generate(model, replace(request, sampler="heun", steps=a.exact), counter).video
    lines = [f"| Sampler | {' | '.join(f'PSNR, {n} calls' for n in a.calls)} |", f"| --- |{' --- |' * len(a.calls)}"]
    for sampler, calls in SAMPLERS.items():
        # The last step of Heun's method needs one call.
        requests = [replace(request, sampler=sampler, steps=max(n // calls, 1)) for n in a.calls]
        videos = [generate(model, one, counter).video for one in requests]
        lines.append(f"| `{sampler}` | {' | '.join(psnr(video, exact) for video in videos)} |")
    return lines


def caches_table(model: VideoModel, request: Request, counter: Counter, a: argparse.Namespace) -> list[str]:
    lines = ["| Steps | `--step-cache` | s | ratio | blocks run | PSNR to uncached |", "| --- |" + " --- |" * 5]
    for steps in a.steps:
        requests = [replace(request, steps=steps, step_cache=kind) for kind in KINDS]
        results = compare(model, requests, counter, a.repeats)
        whole = results[0]
        for kind, result in zip(KINDS, results, strict=True):
            share = 100 * result.blocks / whole.blocks
            ratio = result.seconds / whole.seconds
            near = psnr(result.video, whole.video)
            lines.append(f"| {steps} | {kind} | {result.seconds:.3f} | {ratio:.2f} | {share:.0f} % | {near} |")
    return lines


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    load = os.getloadavg()[0]
    model = load_for(RunOptions(device=a.device, dtype=a.dtype), a.checkpoint, Overrides())
    request, _ = build_request(GenerateOptions(), model)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(a.videos)]
    request = replace(request, prompts=prompts, seeds=list(range(a.videos)))
    counter = Counter(model.network.blocks)  # type: ignore[arg-type]
    weights = sum(p.numel() for p in model.network.parameters()) / 1e6
    where = (
        torch.cuda.get_device_name() if a.device.startswith("cuda") else f"CPU, {a.threads} threads, load {load:.1f}"
    )
    lines = [
        f"{weights:.2f} million parameters, {len(counter.blocks)} blocks, {a.videos} videos of {request.frames} frames "
        f"of {request.height}x{request.width}, {a.dtype}, guidance {request.guidance_scale:g} in "
        f"{request.guidance_interval}; {where}, torch {torch.__version__}.",
        "",
        *samplers_table(model, request, counter, a),
        "",
        *caches_table(model, request, counter, a),
    ]
    show("\n".join(lines), a.out)


if __name__ == "__main__":
    main()
