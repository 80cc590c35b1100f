"""Time and memory of training steps: our LoRA against PEFT's on the same transformer, in one run.

    python benchmarks/lora.py
    python benchmarks/lora.py --model wan
    python benchmarks/lora.py --weights
    python benchmarks/lora.py --device cuda --heads 48 --head-dim 64 --layers 42

The transformer of CogVideoX or Wan with random weights, the same for both, gets the same adapter (A and B included)
from `titans_video.models.lora` or from PEFT's `inject_adapter_in_model`. Ours has the attention processors of our
training, and PEFT's has diffusers' own. Each has its own process. Steps (forward, backward, clipping, AdamW) alternate,
so a slow minute of the machine affects both equally. The losses of all steps are compared too, since both compute the
same function. Needs the package peft.

With --weights nothing is measured: the memory of Wan's frozen weights with each option is counted from their shapes.

"Growth" is the memory of a step beyond what remains between steps: activations and gradients. It comes from torch's
allocator on CUDA and from the peak of the process's resident memory elsewhere, without malloc's free lists. "CPU s" is
the time that the step spent on cores: it varies less on a busy machine.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from common.measuring import Meter, Parent, Worker, map_large_blocks, show

SETUPS = {
    "float32": {},
    "gradient checkpointing": {"checkpointing": True},
    "base in bfloat16": {"dtype": "bfloat16"},
    "base in 8 bits (layerwise casting)": {"fp8": True, "checkpointing": True},
}
LIBRARIES = ("ours", "peft")
WARM_UP = 2
QUICK = {"heads": 2, "head_dim": 16, "layers": 2, "frames": 2, "side": 8, "repeats": 2, "rank": 4}
WANS = (
    {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    {},
)
"""The sizes of Wan's models of 1.3, 5 and 14 billion parameters, as far as they differ from diffusers' defaults."""
MIB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["cogvideox", "wan"], default="cogvideox")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--frames", type=int, default=4, help="latent frames")
    parser.add_argument("--side", type=int, default=24, help="latent height and width")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each whose median is taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", action="store_true", help="only count the memory of frozen weights")
    parser.add_argument("--quick", action="store_true", help="use a tiny size, to check that it runs")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.quick:
        vars(a).update(QUICK)
    return a


def count_weights() -> str:
    """Format as Markdown: GiB on the device for the frozen weights of each Wan model, by the options of a run."""
    import torch
    from diffusers import WanTransformer3DModel

    from titans_video.models.quantized import quantize

    def size(module: Any, kind: str | None = None) -> int:
        layers = [m for m in module.modules() if kind and isinstance(m, torch.nn.Linear)]
        small = [quantize(layer.weight, kind, torch.bfloat16) for layer in layers]
        stored = {layer.weight for layer in layers}
        rest = [*(p for p in module.parameters() if p not in stored), *(x for m in small for x in (m.weight, m.scale))]
        return sum(x.numel() * x.element_size() for x in rest)

    torch.set_default_dtype(torch.bfloat16)
    lines = ["| | Blocks on the device | Wan 1.3B | 5B | 14B |", "| --- | --- | --- | --- | --- |"]
    networks = []
    for sizes in WANS:
        with torch.device("meta"):
            networks.append(WanTransformer3DModel(**sizes))
    for kind in (None, "fp8", "int8", "int4", "nf4"):
        for share in (1, 0.5, 0):
            row = []
            for network in networks:
                kept, block = int(share * len(network.blocks)), size(network.blocks[0], kind)
                outside = size(network) - size(network.blocks)
                row.append((outside + block * (kept + 2 * (kept < len(network.blocks)))) / 2**30)
            where = {1: "all", 0.5: "half", 0: "two"}[share]
            lines.append(f"| {kind or 'bf16'} | {where} | {' | '.join(f'{gib:.1f}' for gib in row)} |")
    return "\n".join(lines)


def transformer(a: argparse.Namespace):
    """Return the transformer, with diffusers' attention processors."""
    from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

    sizes = {"num_attention_heads": a.heads, "attention_head_dim": a.head_dim, "num_layers": a.layers}
    if a.model == "wan":
        return WanTransformer3DModel(**sizes, text_dim=256, ffn_dim=4 * a.heads * a.head_dim)
    return CogVideoXTransformer3DModel(
        **sizes, text_embed_dim=256, max_text_seq_length=64, use_rotary_positional_embeddings=True
    )


def inputs(a: argparse.Namespace, kind: Any) -> tuple[dict[str, Any], Any]:
    """Return the arguments of a call, in the dtype of the weights, and the target of its output."""
    import torch

    g = torch.Generator().manual_seed(0)
    shape = (1, 16, a.frames, a.side, a.side) if a.model == "wan" else (1, a.frames, 16, a.side, a.side)
    x, target = (torch.randn(shape, generator=g).to(a.device) for _ in range(2))
    given = {
        "hidden_states": x.to(kind),
        "encoder_hidden_states": torch.randn(1, 64, 256, generator=g).to(a.device, kind),
        "timestep": torch.tensor([500], device=a.device),
    }
    if a.model == "cogvideox":
        table = torch.ones(a.frames * (a.side // 2) ** 2, a.head_dim, device=a.device)
        given["image_rotary_emb"] = table, torch.zeros_like(table)
    return given, target


def build(a: argparse.Namespace, library: str, checkpointing: bool = False, dtype: str = "float32", fp8: bool = False):
    """Return the transformer with an adapter, and the trained parameters."""
    import torch

    from titans_video.models import lora
    from titans_video.models.attention import CogVideoXProcessor, WanProcessor

    torch.manual_seed(0)
    network = transformer(a).to(a.device, getattr(torch, dtype))
    network.requires_grad_(False)
    if library == "ours":
        network.set_attn_processor(WanProcessor() if a.model == "wan" else CogVideoXProcessor())
    if checkpointing:
        network.enable_gradient_checkpointing()
    if fp8:
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    targets = lora.find_targets(network, lora.ATTENTION)
    if library == "ours":
        lora.inject(network, lora.LoraConfig(a.rank, targets=targets))
    else:
        import peft

        config = peft.LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules=targets)
        network = peft.inject_adapter_in_model(config, network)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    for number, p in enumerate(trained.values()):
        p.data = p.data.float()  # PEFT trains in float32 too with autocast_adapter_dtype
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator(a.device).manual_seed(number))
    return network, list(trained.values())


def work(a: argparse.Namespace) -> None:
    """Take a training step for each line on stdin, to the end."""
    parent = Parent()
    import torch

    torch.set_num_threads(a.threads)
    library, _, name = a.worker.partition(":")
    network, trained = build(a, library, **SETUPS[name])
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    cuda = a.device == "cuda"
    given, target = inputs(a, next(network.parameters()).dtype)
    parent.tell({"trained": sum(p.numel() for p in trained), "frozen": sum(p.numel() for p in network.parameters())})
    while order := parent.order():
        if not cuda:
            map_large_blocks(order == "memory")
        meter = Meter(cuda)
        meter.start()
        value = network(**given, return_dict=False)[0]
        loss = (value.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        parent.tell({**meter.stop(), "loss": loss.item()})


def measure(a: argparse.Namespace, name: str) -> dict[str, dict[str, Any]]:
    """Measure both libraries in one setup, with alternating steps."""
    workers = {
        library: Worker([sys.executable, __file__, *sys.argv[1:], f"--worker={library}:{name}"])
        for library in LIBRARIES
    }
    found: dict[str, dict[str, Any]] = {library: worker.ask() for library, worker in workers.items()}
    steps: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
    for order in ["memory"] * (WARM_UP + 1) + ["time"] * (1 + a.repeats):
        for library, worker in workers.items():
            steps[library].append({**worker.ask(order), "order": order})
    for library, worker in workers.items():
        worker.end()
        memory = [s for s in steps[library] if s["order"] == "memory"][-1]
        timed = [s for s in steps[library] if s["order"] == "time"][1:]
        found[library] |= {"growth": memory["growth"], "losses": [s["loss"] for s in steps[library]]}
        found[library] |= {k: statistics.median(s[k] for s in timed) for k in ("seconds", "cpu_seconds")}
    return found


def table(a: argparse.Namespace, results: dict[str, dict[str, dict[str, Any]]], load: float) -> str:
    """Format as Markdown: ours, PEFT's, and the ratio of ours to PEFT's."""
    import peft
    import torch

    millions = {k: next(iter(results.values()))["ours"][k] / 1e6 for k in ("frozen", "trained")}
    where = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {a.threads} threads, load {load:.1f} before"
    tokens = f"{a.frames * (a.side // 2) ** 2} tokens of the clip and 64 of the text"
    lines = [
        f"{'Wan' if a.model == 'wan' else 'CogVideoX'} transformer of {a.layers} blocks, {a.heads} heads of "
        f"{a.head_dim}, {millions['frozen']:.1f} million parameters, {tokens}; LoRA of rank {a.rank} on attention, "
        f"{millions['trained']:.2f} million; "
        f"{where}, torch {torch.__version__}, peft {peft.__version__}; median of {a.repeats} steps taken in turn.",
        "",
        "| | s/step, ours | PEFT | ratio | CPU s, ratio | growth MiB, ours | PEFT | ratio | losses apart by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        o, p = found["ours"], found["peft"]
        apart = max(abs(x - y) / abs(y) for x, y in zip(o["losses"], p["losses"], strict=True))
        lines.append(
            f"| {name} | {o['seconds']:.3f} | {p['seconds']:.3f} | {o['seconds'] / p['seconds']:.3f} "
            f"| {o['cpu_seconds'] / p['cpu_seconds']:.3f} | {o['growth'] / MIB:.1f} | {p['growth'] / MIB:.1f} "
            f"| {o['growth'] / max(p['growth'], 1):.3f} | {apart:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    a = arguments()
    if a.worker:
        work(a)
        return
    if a.weights:
        show(count_weights(), a.out)
        return
    load = os.getloadavg()[0]
    show(table(a, {name: measure(a, name) for name in SETUPS}, load), a.out)


if __name__ == "__main__":
    main()
