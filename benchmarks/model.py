"""Forward and backward of SoraDiT against diffusers' transformers of the same width, depth and tokens.

    python benchmarks/model.py [--device cuda --dtype bf16 --compile --width 1152 --depth 28 --heads 9 ...]
    python benchmarks/model.py --traffic --width 128 --heads 2 --frames 4 --size 64

`st` is compared with LatteTransformer3DModel (one of its layers is a spatial and a temporal block; one block of ours
has spatial and temporal attention). `full` is compared with WanTransformer3DModel and with CogVideoXTransformer3DModel,
which joins text and video in one attention and so computes no cross-attention. Each candidate has its own process. The
parent asks them for one step each in turn, so a slow minute of the machine affects all equally. Time is the median
step, and a ratio of times is the median over the turns. Memory is the process's peak minus the memory before the
network was built (on CUDA: torch's peak). Torch counts the FLOPs with attention as plain products (a backward pass is
twice a forward pass). --compile compiles the blocks of every candidate, as training does by default on CUDA.

--traffic counts instead what one block in bf16 reads and writes, forward and backward, in units of its residual stream:
eager as the sum over torch's operations, compiled as Inductor counts it on a CPU. It times nothing. Weights count too,
so the tokens should be many more than the width.
"""

import argparse
import logging
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import measuring
from common.measuring import Parent, Worker, map_large_blocks, resident, show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

GROUPS = (("SoraDiT st", "Latte"), ("SoraDiT full", "Wan", "CogVideoX"))  # ours, then its peers
CHANNELS, TEXT_WIDTH = 16, 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8, help="latent frames")
    parser.add_argument("--size", type=int, default=32, help="latent height and width; a token is 2x2 cells")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the blocks, one graph for each kind")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--traffic", action="store_true", help="count what a block reads and writes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, a: argparse.Namespace) -> tuple[Any, Callable[[Any, str], Any]]:
    """Return a network, and a function of it and a device that runs its forward pass on random inputs."""
    import torch

    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    head = a.width // a.heads

    def inputs(device: str) -> tuple[Any, Any, Any]:
        shape = (a.batch, CHANNELS, a.frames, a.size, a.size)
        text = torch.randn(a.batch, a.text_tokens, TEXT_WIDTH, device=device, dtype=dtype)
        return torch.randn(shape, device=device, dtype=dtype), torch.rand(a.batch, device=device), text

    if name == "Latte":
        from diffusers import LatteTransformer3DModel

        net = LatteTransformer3DModel(
            num_attention_heads=a.heads,
            attention_head_dim=head,
            in_channels=CHANNELS,
            num_layers=a.depth,
            cross_attention_dim=a.width,
            attention_bias=True,
            sample_size=a.size,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=TEXT_WIDTH,
            video_length=a.frames,
        )

        def run(net: Any, device: str) -> Any:
            x, t, text = inputs(device)
            return net(x, timestep=1000 * t, encoder_hidden_states=text).sample
    elif name == "Wan":
        from diffusers import WanTransformer3DModel

        net = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=a.heads,
            attention_head_dim=head,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_WIDTH,
            ffn_dim=4 * a.width,
            num_layers=a.depth,
        )

        def run(net: Any, device: str) -> Any:
            x, t, text = inputs(device)
            return net(x, timestep=1000 * t, encoder_hidden_states=text).sample
    elif name == "CogVideoX":
        from diffusers import CogVideoXTransformer3DModel

        net = CogVideoXTransformer3DModel(
            num_attention_heads=a.heads,
            attention_head_dim=head,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=a.depth,
            text_embed_dim=TEXT_WIDTH,
            max_text_seq_length=a.text_tokens,
            sample_width=a.size,
            sample_height=a.size,
            sample_frames=4 * (a.frames - 1) + 1,
        )

        def run(net: Any, device: str) -> Any:
            x, t, text = inputs(device)
            return net(x.transpose(1, 2), text, 1000 * t).sample
    else:
        from titans_video.models.sora_dit import SoraDiT
        from titans_video.types import Condition, TextCondition

        net = SoraDiT(
            in_channels=CHANNELS,
            time_stride=4,
            patch_size=(1, 2, 2),
            model_dim=a.width,
            depth=a.depth,
            heads=a.heads,
            attention_type=name.split()[1],
            text_widths=(TEXT_WIDTH,),
        )

        def run(net: Any, device: str) -> Any:
            x, t, text = inputs(device)
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
            return net(x, t, Condition(TextCondition((text,), (mask,)))).value

    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return net, run


def candidate(a: argparse.Namespace) -> tuple[Any, Callable[[Any, str], Any]]:
    """Return `build`'s network and function for this worker, on the device, compiled with --compile."""
    net, run = build(a.worker, a)
    net = net.to(a.device).train()
    if a.compile:
        lists = [part for part in net.children() if type(part).__name__ == "ModuleList" and len(part) == a.depth]
        for block in [block for part in lists for block in part]:
            block.compile(dynamic=False)
    return net, run


def count_flops(name: str, a: argparse.Namespace) -> int:
    """Count the FLOPs of one forward and backward pass on the meta device."""
    import torch

    with torch.device("meta"):
        net, run = build(name, a)
    return measuring.count_flops(lambda: run(net.to("meta"), "meta"))


def worker(a: argparse.Namespace) -> None:
    """Take a step of one candidate for each line on stdin and answer with its seconds; report at the end.

    With --memory, take two steps and report the peak of the process, with malloc returning freed blocks.
    """
    import torch

    parent = Parent()
    map_large_blocks(a.memory)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    cuda = a.device.startswith("cuda")
    small = argparse.Namespace(**{**vars(a), "width": 8 * a.heads, "depth": 1, "frames": 1, "size": 8})
    # Run a small network first: libraries and compiler load on first use and must not count as the network's memory.
    net, run = candidate(small)
    run(net, a.device).float().mean().backward()
    before = resident()
    net, run = candidate(a)

    def step() -> float:
        start = time.perf_counter()
        net.zero_grad(set_to_none=True)
        run(net, a.device).float().square().mean().backward()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    warm_up = [step() for _ in range(2)]
    if a.memory:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        parent.tell({"peak": torch.cuda.max_memory_allocated() if cuda else peak})
        return
    parent.tell({"seconds": warm_up})
    while parent.order() == "step":
        parent.tell({"seconds": step()})
    report = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "flops": count_flops(a.worker, a),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {a.threads} threads",
        "torch": torch.__version__,
    }
    parent.tell(report)


def start(name: str, *flags: str) -> Worker:
    """Start a worker with this command's flags."""
    return Worker([sys.executable, __file__, *sys.argv[1:], "--worker", name, *flags])


def measure(a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure the memory of each candidate separately, then the time of all, interleaved."""
    names = [name for group in GROUPS for name in group]
    results = {name: start(name, "--memory").ask() for name in names}
    workers: dict[str, Worker] = {}
    for name in names:
        workers[name] = start(name)
        workers[name].ask()  # one at a time: together they would slow each other
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(a.repeats):
        for name in names:
            seconds[name].append(workers[name].ask("step")["seconds"])
    for name in names:
        results[name] |= {"seconds": seconds[name]} | workers[name].ask("end")
    return results


def ratio_of_times(ours: dict[str, Any], its: dict[str, Any]) -> float:
    """Return the median over the turns of our time relative to its time."""
    return statistics.median(a / b for a, b in zip(ours["seconds"], its["seconds"], strict=True))


def table(a: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """Format the results as Markdown."""
    from titans_video.training.flops import peak_flops

    first = next(iter(results.values()))
    tokens = a.frames * (a.size // 2) ** 2
    lines = [
        f"Forward + backward, {first['device']}, {a.dtype}, torch {first['torch']}: width {a.width}, depth {a.depth}, "
        f"{a.heads} heads, {tokens} tokens x batch {a.batch}, {a.text_tokens} text tokens; median of {a.repeats}; "
        f"blocks {'compiled' if a.compile else 'eager'}.",
        "",
        "| | parameters | ms | GFLOP | TFLOP/s | MFU | peak MiB | time, ours : its | time per FLOP | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    peak_rate = peak_flops(first["device"], "bf16" if a.dtype == "bf16" else "no")
    for group in GROUPS:
        ours = results[group[0]]
        for name in group:
            r = results[name]
            seconds, ratio = statistics.median(r["seconds"]), ratio_of_times(ours, r)
            rate = r["flops"] / seconds
            mfu = f"{rate / peak_rate:.1%}" if peak_rate and a.dtype == "bf16" else "-"
            lines.append(
                f"| {name} | {r['parameters'] / 1e6:.1f}M | {seconds * 1e3:.1f} | {r['flops'] / 1e9:.1f} "
                f"| {rate / 1e12:.3f} | {mfu} | {r['peak'] / 2**20:.0f} | {ratio:.2f} "
                f"| {ratio * r['flops'] / ours['flops']:.2f} | {ours['peak'] / r['peak']:.2f} |"
            )
    return "\n".join(lines)


def block_traffic(a: argparse.Namespace, kind: str) -> tuple[dict[str, float], float, int]:
    """Return units of eager traffic by kind of operation, Inductor's units, and the number of eager operations."""
    import torch
    from torch._inductor import config, metrics
    from torch.utils._python_dispatch import TorchDispatchMode

    from titans_video.models.layers import freqs_cis_3d
    from titans_video.models.sora_dit import SoraBlock, modulation_width

    def size(x: torch.Tensor) -> int:
        return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: dict[str, int] = {}
            self.operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            read = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            storages = {x.untyped_storage()._cdata for x in read}
            is_view = not func._schema.is_mutable and any(x.untyped_storage()._cdata in storages for x in made)
            name = func._schema.name
            if not is_view and "empty" not in name:
                heavy = any(word in name for word in ("mm", "attention", "convolution"))
                where = "matrix products and attention" if heavy else "elementwise"
                self.bytes[where] = self.bytes.get(where, 0) + sum(map(size, [*read, *made]))
                self.operations += 1
            return result

    torch.manual_seed(0)
    s, side = a.frames, a.size // 2
    block = SoraBlock(a.width, a.heads, attention_type=kind).to(torch.bfloat16)  # type: ignore[arg-type]
    c = torch.randn(1, s, modulation_width(kind, a.width)).bfloat16().requires_grad_()  # type: ignore[arg-type]
    x = torch.randn(1, s, side * side, a.width).bfloat16().requires_grad_()
    text = torch.randn(1, a.text_tokens, a.width).bfloat16().requires_grad_()
    freqs_cis = freqs_cis_3d((s, side, side), a.width // a.heads, 256.0)

    def step() -> None:
        block(x, c, freqs_cis, side, text, None)[0].backward(torch.ones_like(x))

    with Counter() as counter:
        step()
    unit = x.numel() * x.element_size()
    metrics.reset()
    # Inductor counts only if it may log the result.
    logging.getLogger("torch._inductor.compile_fx.__inductor_metrics").setLevel(logging.INFO)
    with config.patch(force_disable_caches=True):
        block.compile(dynamic=False)
        step()
    return {k: v / unit for k, v in counter.bytes.items()}, metrics.num_bytes_accessed / unit, counter.operations


def traffic_table(a: argparse.Namespace) -> str:
    """Format the traffic of both kinds of block as Markdown."""
    tokens = a.frames * (a.size // 2) ** 2
    lines = [
        "Reads and writes of a block, forward and backward, in units of its residual stream in bf16: "
        f"{tokens} tokens of width {a.width}, {a.heads} heads, {a.text_tokens} text tokens.",
        "",
        "| | eager: elementwise | eager: products and attention | operations | compiled, all | eager : compiled |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in ("st", "full"):
        eager, compiled, operations = block_traffic(a, kind)
        elementwise, heavy = eager["elementwise"], eager["matrix products and attention"]
        lines.append(
            f"| SoraDiT {kind} | {elementwise:.0f} | {heavy:.0f} | {operations} | {compiled:.0f} "
            f"| {(elementwise + heavy) / compiled:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    a = arguments()
    if a.traffic:
        show(traffic_table(a), a.out)
        return
    if a.worker:
        worker(a)
        return
    show(table(a, measure(a)), a.out)


if __name__ == "__main__":
    main()
