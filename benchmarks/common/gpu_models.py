"""Measure networks on one GPU: training steps with MFU and memory, attention kernels, VAE, generation.

All weights are random. Shapes are those of 81 frames of 480x832 on the latents of Wan's VAE: 32,760 tokens.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.gpu_hardware import SdpaCalls, chosen_backend, kernel_of, seconds, wait
from common.measuring import Rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from titans_video.config.fields import AttentionBackend
from titans_video.config.options import ActivationOptions, MemoryOptions, ModelOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.models.activations import limit_activations
from titans_video.models.attention import check_attention_backend, set_attention_backend
from titans_video.models.compiling import compile_blocks
from titans_video.models.flops import sora_flops, titans_flops
from titans_video.models.registry import build_network, sora_config, titans_config
from titans_video.models.titans_dit import SegmentRollout
from titans_video.training.flops import peak_flops
from titans_video.types import CodecSpec, Condition, TextCondition

SPEC = CodecSpec("wan", 16, (4, 8, 8), "causal")
PATCH = (1, 2, 2)
SMALL_MODEL = {"model_dim": 48, "depth": 2, "heads": 2}
WARM_UP, STEPS = 2, 3
FEW_BLOCKS = 4
"""Blocks on which choices are compared; the others would give the same ratios."""
GIB = 2**30


class Shapes:
    """Sizes of latents, text and models; tiny ones with --small."""

    def __init__(self, small: bool) -> None:
        self.latents = (16, 4, 8, 8) if small else (16, 21, 60, 104)
        self.text, self.text_width = (8, 32) if small else (512, 4096)
        self.small = small

    def options(self, preset: str, attention: Any = "st") -> ModelOptions:
        size: dict[str, Any] = SMALL_MODEL if self.small else {"preset": preset}
        return ModelOptions(attention_type=attention, patch_size=PATCH, **size)

    def sora(self, preset: str, attention: str = "st") -> dict[str, Any]:
        return sora_config(self.options(preset, attention), SPEC, (self.text_width,))

    def inputs(self, device: str, frames: int | None = None) -> tuple[Tensor, Tensor, Condition]:
        """Return latents, times of the latent frames, and the text."""
        c, t, h, w = self.latents
        latents = torch.randn(1, c, frames or t, h, w, device=device)
        states = torch.randn(1, self.text, self.text_width, device=device)
        mask = torch.ones(1, self.text, dtype=torch.bool, device=device)
        return latents, torch.rand(1, latents.shape[2], device=device), Condition(TextCondition((states,), (mask,)))


def on_device(build: Callable[[], Any], device: str) -> Any:
    with torch.device(device):
        return build().to(device)


def compile_network(network: nn.Module, small: bool, training: bool = True) -> None:
    """Compile each block, except in a small run, where that would take longer than everything else."""
    if not small:
        compile_blocks(network, training=training)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Step:
    """A training step in bf16: forward, backward, AdamW."""

    def __init__(self, network: nn.Module, run: Callable[[], Tensor], device: str) -> None:
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        self.run, self.device = run, device

    def __call__(self) -> None:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            loss = self.run().float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self) -> tuple[float, float | None]:
        """Return the median seconds, and the peak of memory in GiB."""
        cuda = self.device != "cpu"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP):
            self()
        wait(self.device)
        taken = []
        for _ in range(STEPS):
            start = time.perf_counter()
            self()
            wait(self.device)
            taken.append(time.perf_counter() - start)
        return sorted(taken)[STEPS // 2], torch.cuda.max_memory_allocated() / GIB if cuda else None


def report(rows: Rows, what: str, step: Step, flops: int) -> None:
    """Measure a step and add its time, MFU and memory."""
    taken, peak = step.measure()
    best = peak_flops(torch.cuda.get_device_name(), "bf16") if rows.device != "cpu" else None
    mfu = f"MFU {flops / taken / best:.1%}, " if best else ""
    memory = f", peak {peak:.1f} GiB" if peak is not None else ""
    rows.add(what, 1e3 * taken, "ms", f"{mfu}{flops / taken / 1e12:.4g} TFLOP/s of {flops / 1e12:.4g} TFLOP{memory}")


def least_memory_that_fits(rows: Rows, what: str, network: Any, step: Step, flops: int) -> None:
    """Measure a step; if it does not fit, measure it with gradient checkpointing."""
    try:
        report(rows, what, step, flops)
    except torch.OutOfMemoryError:
        step.optimizer.zero_grad(set_to_none=True)
        free()
        limit_activations(network, ActivationOptions(gradient_checkpointing=True))
        report(rows, f"{what}, --gradient-checkpointing (does not fit without it)", step, flops)


def sora_step(rows: Rows, preset: str, attention: str, depth: int | None = None) -> tuple[Any, Step, int]:
    """Return a SoraDiT, its training step, and the FLOPs of that."""
    shapes = Shapes(rows.small)
    config = shapes.sora(preset, attention)
    config["depth"] = depth or config["depth"]
    network = on_device(lambda: build_network(config), rows.device).train()
    latents, times, condition = shapes.inputs(rows.device)
    step = Step(network, lambda: network(latents, times, condition).value, rows.device)
    return network, step, sora_flops(network)(shapes.latents, (shapes.text,))


def measure_sora(rows: Rows, preset: str, attention: str, *, eager: bool = False, checkpointing: bool = False) -> None:
    """Measure SoraDiT, first `eager` if asked, then compiled."""
    network, step, flops = sora_step(rows, preset, attention)
    if checkpointing:
        limit_activations(network, ActivationOptions(gradient_checkpointing=True))
    what = f"{preset} {attention}{', --gradient-checkpointing' if checkpointing else ''}"
    if eager:
        least_memory_that_fits(rows, f"{what}, --no-compile", network, step, flops)
    compile_network(network, rows.small)
    least_memory_that_fits(rows, f"{what}, --compile", network, step, flops)


def step_1b(rows: Rows) -> None:
    for attention in ("st", "full"):
        rows.attempt(f"1B {attention}", lambda a=attention: measure_sora(rows, "1B", a, eager=a == "st"))
        free()


def step_3b(rows: Rows) -> None:
    for attention in ("st", "full"):
        rows.attempt(f"3B {attention}", lambda a=attention: measure_sora(rows, "3B", a, checkpointing=True))
        free()


def choices(rows: Rows) -> None:
    """Measure a few blocks of 1B full: each attention kernel, and compiled what is kept of the activations."""
    for name in get_args(AttentionBackend):
        what = f"--attention-backend {name}"
        try:
            check_attention_backend(name, torch.device(rows.device), training=True)
        except ConfigError as e:
            rows.add(what, "not available", "", str(e))
        else:
            if name != "math" or rows.small:  # it stores all scores
                rows.attempt(what, lambda w=what, n=name: measure_choice(rows, w, n))
    for mode in ("none", "selective", "full"):
        what = f"--activation-checkpointing {mode}, --compile"
        rows.attempt(what, lambda w=what, m=mode: measure_choice(rows, w, "auto", m))


def measure_choice(rows: Rows, what: str, backend: AttentionBackend, activations: str | None = None) -> None:
    network, step, flops = sora_step(rows, "1B", "full", FEW_BLOCKS)
    set_attention_backend(network, backend, torch.bfloat16)
    if activations:
        limit_activations(network, ActivationOptions(activation_checkpointing=activations))
        compile_network(network, rows.small)
    report(rows, what, step, flops)
    free()


def titans(shapes: Shapes, preset: str, device: str) -> tuple[Any, Callable[..., Any], Any]:
    """Return TitansVideoDiT, its rollout of four segments, and inputs."""
    frames = shapes.latents[1] // 4 * 4
    memory = MemoryOptions(memory="neural", mem_tokens=4 if shapes.small else 64)
    config = titans_config(memory, shapes.options(preset), SPEC, (shapes.text_width,))

    def rollout(latents: Tensor, times: Tensor) -> dict[str, Any]:
        return {"rollout": SegmentRollout(frames // 4, latents, times, latents, times, overlap=1)}

    return on_device(lambda: build_network(config), device), rollout, shapes.inputs(device, frames)


def step_titans(rows: Rows) -> None:
    """Measure TitansVideoDiT with neural memory on four segments, each read and written."""
    shapes = Shapes(rows.small)
    network, rollout, (latents, times, condition) = titans(shapes, "L", rows.device)
    flops = titans_flops(network, latents.shape[2] // 4, 1, 4)(latents.shape[1:], (shapes.text,))
    step = Step(
        network.train(), lambda: network(latents, times, condition, **rollout(latents, times)).value, rows.device
    )
    compile_network(network, rows.small)
    least_memory_that_fits(rows, "L, neural memory, 4 segments, --compile", network, step, flops)


def cogvideox(small: bool, depth: int | None = None) -> tuple[Callable[[], Any], Callable[[Any, str], Tensor]]:
    """Return a function that builds a transformer of the shape of CogVideoX-5B, and one that calls it."""
    from diffusers import CogVideoXTransformer3DModel

    heads, width, layers, frames, height, side, text, states = (
        (2, 16, 2, 2, 8, 8, 8, 32) if small else (48, 64, 42, 13, 60, 90, 226, 4096)
    )

    def build() -> Any:
        return CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width,
            num_layers=depth or layers,
            text_embed_dim=states,
            max_text_seq_length=text,
            use_rotary_positional_embeddings=True,
        )

    def run(network: Any, device: str) -> Tensor:
        tokens = frames * height * side // 4
        rotary = torch.ones(tokens, width, device=device), torch.zeros(tokens, width, device=device)
        x = torch.randn(1, frames, 16, height, side, device=device, dtype=network.dtype)
        prompt = torch.randn(1, text, states, device=device, dtype=network.dtype)
        at = torch.full((1,), 500, device=device)
        value: Tensor = network(x, prompt, at, image_rotary_emb=rotary, return_dict=False)[0]
        return value

    return build, run


def wan(small: bool, depth: int | None = None) -> tuple[Callable[[], Any], Callable[[Any, str], Tensor]]:
    """Return the same for Wan-14B."""
    from diffusers import WanTransformer3DModel

    heads, width, inner, layers = (2, 24, 96, 2) if small else (40, 128, 13824, 40)
    shapes = Shapes(small)

    def build() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width,
            text_dim=shapes.text_width,
            ffn_dim=inner,
            num_layers=depth or layers,
        )

    def run(network: Any, device: str) -> Tensor:
        x = torch.randn(1, *shapes.latents, device=device, dtype=network.dtype)
        prompt = torch.randn(1, shapes.text, shapes.text_width, device=device, dtype=network.dtype)
        at = torch.full((1,), 500, device=device)
        value: Tensor = network(x, timestep=at, encoder_hidden_states=prompt, return_dict=False)[0]
        return value

    return build, run


def count_step(network: Any, run: Callable[[Any, str], Tensor]) -> int:
    """Count the FLOPs of a training step on the meta device; frozen weights have no gradient."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(network, "meta").sum().backward()
    return int(counter.get_total_flops())


def measure_lora(rows: Rows, what: str, model: Callable[[bool], Any]) -> None:
    """Measure a step of a LoRA of rank 64 on attention, on a frozen base in bf16 with gradient checkpointing."""
    build, run = model(rows.small)

    def adapted(device: str) -> Any:
        network = on_device(build, device).to(torch.bfloat16).requires_grad_(False)
        lora.inject(network, lora.LoraConfig(4 if rows.small else 64))
        return network.to(device).train()

    flops = count_step(adapted("meta"), run)
    network = adapted(rows.device)
    network.enable_gradient_checkpointing()
    report(
        rows,
        f"{what}, rank 64, --gradient-checkpointing",
        Step(network, lambda: run(network, rows.device), rows.device),
        flops,
    )


def lora_cogvideox(rows: Rows) -> None:
    measure_lora(rows, "49 frames of 480x720, 17,776 tokens", cogvideox)


def lora_wan(rows: Rows) -> None:
    measure_lora(rows, "81 frames of 480x832, 32,760 tokens", wan)


def kernels(rows: Rows) -> None:
    """Name the backend that torch selects for each different attention of each model, and its kernel."""
    shapes = Shapes(rows.small)
    latents, times, condition = shapes.inputs(rows.device)

    def sora(attention: str) -> None:
        config = {**shapes.sora("1B", attention), "depth": 1}
        network = on_device(lambda: build_network(config), rows.device)
        _trace(rows, f"SoraDiT {attention}", lambda: network(latents, times, condition))

    def memory() -> None:
        network, rollout, (x, at, text) = titans(shapes, "L", rows.device)
        network.blocks = network.blocks[: max(network.memory_layers) + 1]
        _trace(rows, "TitansVideoDiT", lambda: network(x, at, text, **rollout(x, at)))

    def other(name: str, model: Callable[..., Any]) -> None:
        build, run = model(rows.small, 1)
        network = on_device(build, rows.device).to(torch.bfloat16)
        _trace(rows, name, lambda: run(network, rows.device))

    rows.attempt("SoraDiT st", lambda: sora("st"))
    rows.attempt("SoraDiT full", lambda: sora("full"))
    rows.attempt("TitansVideoDiT", memory)
    rows.attempt("CogVideoX", lambda: other("CogVideoX", cogvideox))
    rows.attempt("Wan", lambda: other("Wan", wan))


def _trace(rows: Rows, name: str, run: Callable[[], object]) -> None:
    calls = SdpaCalls()
    with torch.autocast(torch.device(rows.device).type, torch.bfloat16), calls, torch.no_grad():
        run()
    for (q, k, *_), (tensors, named) in calls.calls.items():
        mask = ", mask" if named.get("attn_mask") is not None else ""
        what = f"{name}: {tuple(q[0])} to {k[0][2]} keys{mask}"
        rows.attempt(what, lambda w=what, t=tensors, n=named: rows.add(w, chosen_backend(t, n), "", kernel_of(t, n)))


def wan_vae(small: bool, device: str) -> Any:
    """Return Wan's VAE with random weights, in bf16 on a GPU."""
    from diffusers import AutoencoderKLWan

    from titans_video.codecs.diffusers import DiffusersCodec

    size: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1} if small else {}
    made = on_device(lambda: AutoencoderKLWan(**size), device)
    return DiffusersCodec(made if device == "cpu" else made.to(torch.bfloat16)).to(device)


def clip_of(small: bool) -> tuple[int, int, int]:
    return (9, 32, 32) if small else (81, 480, 832)


def vae(rows: Rows) -> None:
    """Measure encoding and decoding of one clip, as training and generation do it."""
    codec, clip = wan_vae(rows.small, rows.device), clip_of(rows.small)
    pixels = torch.rand(1, 3, *clip, device=rows.device) * 2 - 1
    latents = codec.encode(pixels)
    for what, run in (
        ("encode", lambda: codec.encode_moments(pixels)),
        ("decode", lambda: codec.decode(latents, clip[0])),
    ):
        if rows.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        taken = seconds(run, rows.device, least=0.0, fewest=2, warm_up=1)
        peak = f"peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if rows.device != "cpu" else ""
        rows.add(f"{what} {clip[0]} frames of {clip[1]}x{clip[2]}", taken, "s", peak)


class RandomText:
    """Encode each prompt as random states."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        self.shapes, self.device = shapes, device

    def __call__(self, prompts: Any) -> TextCondition:
        return self.empty(len(prompts))

    def empty(self, n: int) -> TextCondition:
        shape = (n, self.shapes.text)
        states = torch.randn(*shape, self.shapes.text_width, device=self.device)
        return TextCondition((states,), (torch.ones(shape, dtype=torch.bool, device=self.device),))


def generation(rows: Rows) -> None:
    """Measure two videos with guidance of different numbers of steps; the difference is the time of the steps."""
    from titans_video.config.generation import GenerateOptions
    from titans_video.diffusion.rectified_flow import RectifiedFlow
    from titans_video.generation.long_video import sample
    from titans_video.generation.model import VideoModel

    shapes, (frames, height, width) = Shapes(rows.small), clip_of(rows.small)
    config = shapes.sora("1B")
    network = on_device(lambda: build_network(config), rows.device).eval()
    if rows.device != "cpu":
        network.to(torch.bfloat16)
    data = {"num_frames": frames, "height": height, "width": width, "fps": 16.0, "tasks": ["t2v"]}
    about = {"model": config, "data": data, "text": {"widths": [shapes.text_width]}, "sample": {"guidance_scale": 5.0}}
    codec, text = wan_vae(rows.small, rows.device), RandomText(shapes, rows.device)
    model = VideoModel(network, codec, text, RectifiedFlow(), about)
    compile_network(network, rows.small, training=False)

    def video(steps: int) -> float:
        about["sample"] = {"guidance_scale": 5.0, "steps": steps}
        start = time.perf_counter()
        sample(model, GenerateOptions(prompt="a white dog runs along a beach"))
        wait(rows.device)
        return time.perf_counter() - start

    few, many = (1, 2) if rows.small else (2, 10)
    rows.add("first video, with compilation", video(few), "s", f"{few} steps")
    short, long = video(few), video(many)
    each = (long - short) / (many - few)
    rows.add("a step with guidance", 1e3 * each, "ms", f"from videos of {few} and {many} steps")
    rows.add("text, decoding and the rest", short - few * each, "s")
    rows.add(f"{frames} frames of {height}x{width}, 50 steps", short + (50 - few) * each, "s", "computed from these")
