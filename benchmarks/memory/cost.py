"""The cost of length: the state, the peak memory and time of generation, and the FLOPs of training.

    python -m benchmarks.memory.cost --out docs/memory

State: bytes of the streaming state after 10 and after 1000 segments. Generation: 64, 256 and 1024 frames from random
weights through the command's own path, including mp4, each in its own process: peak resident memory, and CPU seconds
per frame. Training: FLOPs of one step (torch's counter, on the meta device) at the size of the documented command, for
clips of 2 to 32 segments, compared with SoraDiT with `full` and with `st` attention over the whole clip. The exponent
is the slope in log space between the two longest.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FRAMES = (64, 256, 1024)
SEGMENT, OVERLAP = 4, 2
SEGMENTS = (2, 4, 8, 16, 32)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs="+", default=["tokens", "neural"])
    parser.add_argument("--size", type=int, default=32, help="pixels of the generated videos")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("outputs/memory"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(memory: str, size: int) -> Any:
    """Build a streaming model with random weights on pixels folded 8 by 8."""
    import torch

    from titans_video.codecs.base import IdentityCodec
    from titans_video.config.options import TextOptions
    from titans_video.diffusion.rectified_flow import RectifiedFlow
    from titans_video.generation.model import VideoModel
    from titans_video.models.registry import network_config
    from titans_video.models.titans_dit import TitansVideoDiT
    from titans_video.text.base import build_text

    torch.manual_seed(0)
    codec = IdentityCodec((1, 8, 8))
    network = TitansVideoDiT(codec.spec.channels, 1, (2, 1, 1), 64, 2, 4, memory=memory, mem_tokens=16, text_layers=1)
    config = {
        "model": network_config(network),
        "data": {"num_frames": 16, "height": size, "width": size, "fps": 24.0},
        "segments": {"latents": SEGMENT, "overlap": OVERLAP},
    }
    return VideoModel(network.eval(), codec, build_text(TextOptions()), RectifiedFlow(), config)


def generate(memory: str, frames: int, size: int) -> dict[str, float]:
    """Generate a video with this many frames into a file, in this process."""
    from titans_video.generation.long_video import generate_long, plan_video
    from titans_video.generation.request import Request
    from titans_video.media.colour import to_uint8
    from titans_video.media.streaming import open_sink

    model = make_model(memory, size)

    def run(count: int, folder: str) -> None:
        request = Request(["a"], count, size, size, [0], steps=2)
        plan, _ = plan_video(model, request)
        with open_sink(f"{folder}/o.mp4", size, size, 24.0) as sink:
            for chunk in generate_long(model, request, plan, progress=False):
                sink.write(to_uint8(chunk[0]))

    with tempfile.TemporaryDirectory() as folder:
        run(16, folder)  # warm up
        began = time.process_time()
        run(frames, folder)
    return {
        "seconds_a_frame": (time.process_time() - began) / frames,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def state_bytes(memory: str, size: int) -> dict[int, int]:
    """Return the bytes of the streaming state after 10 and 1000 segments."""
    import torch

    from titans_video.generation import stream
    from titans_video.generation.denoise import encode_prompts, eval_mode
    from titans_video.generation.long_video import plan_video
    from titans_video.generation.request import Request

    model = make_model(memory, size)
    request = Request(["a"], SEGMENT, size, size, [0], steps=1)
    plan: Any = plan_video(model, request)[0]
    state, found = stream._initial_state(model, request), {}
    bar = argparse.Namespace(update=lambda: None)
    with eval_mode(model.network), torch.no_grad():
        prompts = encode_prompts(model, request.prompts, "", request.uses_cfg)
        for i in range(1, 1001):
            state = stream.next_segment(model, request, plan, state, prompts, bar)
            if i in (10, 1000):
                found[i] = state.bytes
    return found


def training_flops() -> dict[str, list[int]]:
    """Count the FLOPs of one step for each length, at the documented command's size and 256 pixels with an 8x VAE."""
    import torch

    from titans_video.models.flops import sora_flops, titans_flops
    from titans_video.models.registry import build_network

    size: dict[str, Any] = {"in_channels": 4, "patch_size": (2, 4, 4), "model_dim": 1024, "depth": 12, "heads": 16}
    kinds: dict[str, dict[str, Any]] = {
        "memory tokens": {"network": "TitansVideoDiT", "memory": "tokens", **size},
        "neural memory": {"network": "TitansVideoDiT", "memory": "neural", **size},
        "no memory (sliding window)": {"network": "TitansVideoDiT", "memory": "none", **size},
        "SoraDiT, full attention": {"network": "SoraDiT", "attention_type": "full", **size},
        "SoraDiT, st attention": {"network": "SoraDiT", "attention_type": "st", **size},
    }

    found = {}
    for name, config in kinds.items():
        with torch.device("meta"):
            network = build_network(config)
        is_sora = config["network"] == "SoraDiT"
        count = sora_flops(network) if is_sora else titans_flops(network, SEGMENT, OVERLAP, horizon=4)
        found[name] = [count((4, n * SEGMENT, 32, 32), [64]) for n in SEGMENTS]
    return found


def main() -> None:
    a = arguments()
    if a.worker:
        import torch

        torch.set_num_threads(a.threads)
        print(json.dumps(generate(a.worker[0], int(a.worker[1]), a.size)))
        return
    from benchmarks.memory.reporting import figure, save, table

    numbers: dict[str, Any] = {"state": {}, "generating": {}}
    for memory in a.memory:
        numbers["state"][memory] = state_bytes(memory, a.size)
        for frames in FRAMES:
            command = [sys.executable, "-m", "benchmarks.memory.cost", "--worker", memory, str(frames)]
            command += ["--size", str(a.size), "--threads", str(a.threads)]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            numbers["generating"].setdefault(memory, {})[frames] = json.loads(said.splitlines()[-1])
    flops = numbers["training_flops"] = training_flops()

    states = table(
        ["state", "after 10 segments", "after 1000"], [[m, s[10], s[1000]] for m, s in numbers["state"].items()]
    )
    made = []
    for memory, by_length in numbers["generating"].items():
        for key, said in (("peak_mib", "peak MiB"), ("seconds_a_frame", "CPU-s a frame")):
            values = [by_length[f][key] for f in FRAMES]
            made.append([f"{memory}: {said}", *(f"{v:.4g}" for v in values), f"{max(values) / min(values) - 1:.1%}"])
    generating = table(["generating", *(f"{f} frames" for f in FRAMES), "spread"], made)
    slopes = {name: math.log(f[-1] / f[-2]) / math.log(SEGMENTS[-1] / SEGMENTS[-2]) for name, f in flops.items()}
    rows = [[name, *(f"{x / 1e12:.2f}" for x in f), f"{slopes[name]:.3f}"] for name, f in flops.items()]
    training = table(["training, TFLOP a step", *(f"{n * SEGMENT} frames" for n in SEGMENTS), "exponent"], rows)
    save(a.out, "cost", "python -m benchmarks.memory.cost", "\n\n".join((states, generating, training)), numbers)
    fig, axis = figure()
    for name, values in flops.items():
        axis.plot([n * SEGMENT for n in SEGMENTS], [v / 1e12 for v in values], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="frames of a clip", ylabel="TFLOP a training step")
    axis.legend(frameon=False, fontsize=8)
    fig.savefig(a.out / "cost.png")


if __name__ == "__main__":
    main()
