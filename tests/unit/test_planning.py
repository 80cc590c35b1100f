"""`titans-video plan`: parameters and memory from shapes against small real networks and torch's own record of them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.conftest import REPOSITORY
from tests.unit.svd_parts import svd_folder
from tests.wan_pipelines import make_wan
from titans_video.cli.main import main
from titans_video.cli.plan import RECIPES, find_recipe, parse_size, split_words
from titans_video.codecs.diffusers import TINY
from titans_video.config.options import ActivationOptions
from titans_video.errors import ConfigError
from titans_video.models.activations import limit_activations
from titans_video.models.registry import build_network, network_config
from titans_video.planning import clips
from titans_video.planning.changes import NONE, SPARE, Case, Step, choices, find_change, slowdown
from titans_video.planning.make import Request, make_plan, resolved
from titans_video.planning.memory import Layout, Memory
from titans_video.planning.networks import sora_subject
from titans_video.planning.plan import Hardware
from titans_video.planning.simulation import Precision, shapes_only, step_peak
from titans_video.planning.subject import Clip, Subject
from titans_video.training.optim import build_optimizer
from titans_video.types import BYTE_VOCABULARY

FOLDED = ["--vae-backend", "identity", "--vae-init-json", '{"space_to_depth": 4}']
SIZE = ["--height", "32", "--width", "32", "--num-frames", "8"]
SMALL = [*SIZE, *FOLDED, *["--model-dim", "48", "--depth", "7", "--heads", "2"]]
VAE = [*SIZE[:4], *["--num-frames", "5", "--vae-width", "16"]]
GPUS = Request(gpus=1, memory=2**30)
OVER_FRAMES = 0.02 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 1 / 6
"""The error of a large convolution over frames: without AVX-512 oneDNN computes it in a way that is not modelled."""


def options_of(recipe: str, words: list[str]) -> Any:
    return RECIPES[recipe].parse(words)


@pytest.fixture(scope="module")
def sora() -> Subject:
    return sora_subject(resolved(options_of("sora", SMALL), on_gpu=False))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("plan") / "wan", "t2v-2.1")


def clip_of(subject: Subject, rows: int = 2) -> Clip:
    return Clip(8, 32, 32, rows, tuple(30 for _ in subject.widths))


def recorded_peak(network: nn.Module, subject: Subject, clip: Clip) -> int:
    """Return the most bytes that torch's allocator gave out at once in a real step."""
    run = subject.step(clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", torch.zeros)  # inputs without values would be no legal bytes of a text
        return allocated(lambda: run(network.train()).backward())


def allocated(run: Callable[[], object]) -> int:
    """Return the most bytes that torch's allocator gave out at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    del kept
    results: Any = found.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("mode", ["none", "selective", "full", "3"])
def test_the_peak_of_a_step_is_that_of_torchs_allocator(sora: Subject, mode: str) -> None:
    activations, clip = ActivationOptions(activation_checkpointing=mode), clip_of(sora)
    network = build_network(network_config(sora.network))
    limit_activations(network, activations)
    planned = step_peak(sora.network, sora.stacks, sora.step(clip), activations, Precision())
    assert planned.total == pytest.approx(recorded_peak(network, sora, clip), rel=0.03)


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "error"),
    [
        ((4, 16, 6, 32, 32), (16, 16, 3, 3, 3), 1, OVER_FRAMES),
        ((4, 3, 6, 32, 32), (16, 3, 1, 3, 3), 1, 0.02),
        ((4, 16, 6, 32, 32), (3, 16, 1, 3, 3), 1, 0.02),
        ((4, 20, 6, 32, 32), (40, 20, 3, 3, 3), 2, OVER_FRAMES),
        ((4, 20, 64, 64), (24, 20, 3, 3), 1, 0.02),
        ((1, 8, 5, 32, 32), (8, 8, 3, 3, 3), 1, 0.02),
    ],
)
def test_the_copies_of_a_convolution_are_counted(shape: Any, weight: Any, stride: int, error: float) -> None:
    """Blocks of channels are padded, pixels are not copied, and a small convolution is a matrix product."""

    def step() -> object:
        x, w = torch.zeros(shape, requires_grad=True), torch.zeros(weight, requires_grad=True)
        pad = [size // 2 for size in weight[2:]]
        y = torch.convolution(x, w, None, [stride] * len(pad), pad, [1] * len(pad), False, [0] * len(pad), 1)
        y.square().sum().backward()
        return x, w

    with shapes_only(on_cpu=True) as live:
        live.begin("step")
        step()
    assert live.peak.total == pytest.approx(allocated(step), rel=error)


def test_a_shortened_stack_has_the_peak_of_the_whole_one() -> None:
    deep = sora_subject(resolved(options_of("sora", [*SMALL, "--depth", "5"]), on_gpu=False))
    for mode in ("none", "full"):
        activations, run = ActivationOptions(activation_checkpointing=mode), deep.step(clip_of(deep))
        found = [step_peak(deep.network, s, run, activations, Precision(torch.bfloat16)) for s in (deep.stacks, ())]
        assert found[0] == found[1]


def test_activations_in_main_memory_are_not_on_the_device(sora: Subject) -> None:
    """Only tensors of a MiB or more move, so the clip is large."""
    clip = Clip(64, 64, 64, 4, (30,))
    run, full = sora.step(clip), ActivationOptions()
    moved = ActivationOptions(activation_offload=True)
    there, here = (step_peak(sora.network, sora.stacks, run, mode, Precision()) for mode in (moved, full))
    assert there.moved > 0.5 * here.others
    assert there.others < 0.5 * here.others


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_the_optimizer_is_counted(optimizer: str) -> None:
    """AdamW has two numbers for each weight, Muon one for each matrix in a list of modules."""
    options = resolved(options_of("sora", [*SMALL, "--optimizer", optimizer]), on_gpu=False)
    subject = sora_subject(options)
    lists = [m for m in subject.network.modules() if isinstance(m, nn.ModuleList)]
    matrices = {m.weight: m.weight.numel() for part in lists for m in part.modules() if isinstance(m, nn.Linear)}
    weights = sum(p.numel() for p in subject.network.parameters())
    expected = 4 * (2 * weights - (sum(matrices.values()) if optimizer == "muon" else 0))
    assert Memory(subject, options).optimizer.state == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_memory_of_the_optimizers_step_is_counted(sora: Subject, optimizer: str) -> None:
    options = resolved(options_of("sora", [*SMALL, "--optimizer", optimizer]), on_gpu=False)
    network = build_network(network_config(sora.network))
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    real: Any = build_optimizer(network, options.train)
    real.found_inf = torch.zeros(())
    real.step()  # makes the state
    assert Memory(sora, options).optimizer.step == pytest.approx(allocated(real.step), rel=0.03, abs=4096)


def test_fsdp2_divides_the_state_and_ddp_does_not(sora: Subject) -> None:
    options = resolved(options_of("sora", [*SMALL, "--ema-decay", "0.9"]), on_gpu=True)
    memory, clip = Memory(sora, options), clip_of(sora)
    one, ddp, fsdp = (memory.device(clip, layout) for layout in (Layout(1), Layout(4), Layout(4, sharded=True)))
    weights = sum(4 * p.numel() for p in sora.network.parameters())
    assert (ddp.weights, ddp.gradients, ddp.averages) == (weights, weights, weights)
    assert (fsdp.optimizer, fsdp.averages) == (ddp.optimizer // 4, ddp.averages // 4)
    assert weights / 4 < fsdp.weights < weights
    assert one.total <= ddp.total  # in one process, early gradients take the room of later activations


def test_micro_batches_keep_their_gradients(sora: Subject) -> None:
    one, four = (
        Memory(sora, resolved(options_of("sora", [*SMALL, "--grad-accum", count]), on_gpu=True)) for count in "14"
    )
    clip = clip_of(sora)
    peak = next(iter(one.device(clip, Layout(1)) and one._peaks.values()))
    more = four.device(clip, Layout(1)).total - one.device(clip, Layout(1)).total
    assert more == peak.others + one.trained - peak.total > 0


def test_manifests_that_are_found_when_they_are_read(monkeypatch: pytest.MonkeyPatch, sora: Subject) -> None:
    read: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        clips, "_from_manifests", lambda subject, options, processes: read.append(options.data.manifest)
    )
    for manifest in ("s3://bucket/clips.jsonl", "shards/{0000..0003}.tar"):
        clips.plan_clips(sora, options_of("sora", [*SMALL, "--manifest", manifest]), 1)
    clips.plan_clips(sora, options_of("sora", [*SMALL, "--manifest", "missing.jsonl"]), 1)
    assert read == [("s3://bucket/clips.jsonl",), ("shards/{0000..0003}.tar",)]


def stored_parameters(folder: Path) -> int:
    """Return the numbers in all safetensors files of a folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            total += sum(f.get_tensor(name).numel() for name in f.keys())  # noqa: SIM118  # not a mapping
    return total


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_a_lora_has_the_parameters_of_the_files_and_two_small_factors_a_layer(wan: Path, kind: str) -> None:
    flags = [*SIZE[:4], *["--num-frames", "9", "--rank", "4"], "--pretrained-model", str(wan), "--quantize", kind]
    made = make_plan("train lora", options_of("lora", flags), GPUS)
    width, blocks, layers = 24, 2, 8  # of both attentions: to_q, to_k, to_v, to_out.0
    adapter = blocks * layers * 4 * (width + width)
    assert made.trained == adapter
    assert made.parameters == stored_parameters(wan / "transformer") + adapter
    encoders = {part.name: part.parameters for part in made.parts if part.parameters and not part.trained}
    assert encoders["VAE"] == stored_parameters(wan / "vae")


def test_configuration_files_are_enough(wan: Path, tmp_path: Path) -> None:
    for file in wan.rglob("*.json"):
        target = tmp_path / file.relative_to(wan)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    flags = [*SIZE[:4], "--num-frames", "9", "--pretrained-model"]
    plans = [make_plan("train finetune", options_of("finetune", [*flags, str(f)]), GPUS) for f in (wan, tmp_path)]
    for name in ("parts", "buckets", "device", "modes", "speed", "notes"):
        assert getattr(plans[0], name) == getattr(plans[1], name)
    assert plans[0].parameters == plans[0].trained == stored_parameters(wan / "transformer")
    with pytest.raises(ConfigError, match="hf download NAME --include"):
        make_plan("train lora", options_of("lora", [*flags, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]), GPUS)


def test_an_unet_and_a_vae_are_planned_too() -> None:
    svd = ["--pretrained-model", str(svd_folder()), *["--height", "32", "--width", "48", "--num-frames", "5"]]
    made = make_plan("train svd", options_of("svd", [*svd, "--trainable", "temporal"]), Request(gpus=0))
    added = sum(part.parameters for part in made.parts if part.name == "text_embed")
    assert made.parameters > stored_parameters(svd_folder() / "unet") + added
    assert 0 < made.trained < made.parameters
    assert {"VAE", "image encoder"} <= {part.name for part in made.parts}
    vae = make_plan("train vae", options_of("vae", VAE), Request(gpus=0))
    assert vae.parameters == vae.trained > 0
    flags = f"--init-from {TINY} --noise-conditioning --latent-noise 0.5 --trainable noise".split()
    noise = make_plan("train vae", options_of("vae", [*VAE[:-2], *flags]), Request(gpus=0))
    assert 0 < noise.trained < 0.02 * noise.parameters
    assert not any(part.name == "VAE" for part in vae.parts)


def test_the_recipe_of_a_file_is_found() -> None:
    for name in ("sora", "titans", "lora"):
        for path in (REPOSITORY / "configs" / name).glob("*.yaml"):
            recipe, rest = find_recipe([str(path)])
            assert recipe is RECIPES[name]
            assert rest == ["--config", str(path)]


def test_words_are_divided_between_the_plan_and_the_training() -> None:
    words = ["train", "lora", "--gpus", "8", "--rank", "4", "--gpu-memory=24GB", "--json", "--compile"]
    own, rest = split_words(words)
    assert own == ["--gpus", "8", "--gpu-memory=24GB", "--json"]
    assert rest == ["train", "lora", "--rank", "4", "--compile"]
    assert find_recipe(rest)[0].command == "train lora"
    assert find_recipe(["train", "--preset", "S"])[0].command == "train"
    assert parse_size("24GB") == 24 * 2**30
    for wrong in ("many", "0GB", "-3"):
        with pytest.raises(ConfigError, match="24GB"):
            parse_size(wrong)


def test_the_change_is_the_cheapest_combination_that_fits(sora: Subject) -> None:
    """Three groups of steps with known savings, against all combinations."""
    costs = {"a": 1.5, "b": 1.1, "c": 1.2, "d": 1.05}
    savings = {"a": 50, "b": 10, "c": 25, "d": 5}

    def step(name: str) -> Step:
        def apply(case: Case) -> Case:
            return Case(case.options | {name}, case.layout)

        return Step(name, costs[name], apply)

    groups = [[NONE, step("a")], [NONE, step("b"), step("c")], [NONE, step("d")]]
    for limit in range(10, 110, 3):
        hardware = Hardware(1, "GPU", round(limit / 0.95) + 1)
        found = find_change(
            Case(frozenset(), Layout(1)), groups, lambda c: (100 - sum(savings[n] for n in c.options), 0), hardware
        )
        every = [set(s) - {None} for s in itertools.product([None, "a"], [None, "b", "c"], [None, "d"])]
        good = [s for s in every if s and 100 - sum(savings[n] for n in s) <= 0.95 * (hardware.memory or 0)]
        cost = lambda s: torch.tensor([costs[n] for n in s], dtype=torch.float64).prod().item()  # noqa: E731
        best = min(good, key=cost, default=None)
        assert (None if found is None else set(found.flags)) == best


def test_a_plan_that_does_not_fit_names_flags_with_which_it_does() -> None:
    flags = [*SMALL[:-4], *["--depth", "7", "--heads", "2", "--batch-size", "64"]]
    options = options_of("sora", flags)
    whole = make_plan("train", options, Request(gpus=1, memory=2**40))
    assert whole.fits
    assert whole.change is None
    small = make_plan("train", options, Request(gpus=1, memory=round(0.9 * whole.device.total)))
    assert not small.fits
    assert small.change is not None
    assert small.change.memory <= 0.95 * (small.hardware.memory or 0)
    assert all(flag.startswith(("--", "accelerate")) for flag in small.change.flags)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_move_only_if_blocks_are_recomputed(sora: Subject, mode: str) -> None:
    """Without recomputation, hundreds of GiB would move in each step of a large model."""
    case = Case(options_of("sora", [*SMALL, "--activation-checkpointing", mode]), Layout(1))
    steps = [step for group in choices(case, 1, sora) for step in group if "activation" in step.flags]
    changed = [(step.apply(case).options.activations, step.cost) for step in steps]
    moved = [(found.checkpointing, cost) for found, cost in changed if found.activation_offload]
    assert moved == [("full", pytest.approx(1.12 * (1.32 if mode == "none" else 1.0)))]
    assert len(steps) == (4 if mode == "none" else 1)


def test_options_that_cost_time_lower_the_share_of_the_peak() -> None:
    """A step with the flags of a change takes as many times as long as the change says."""
    plain = make_plan("train", options_of("sora", SMALL), Request(gpus=1, gpu="H100"))
    full = options_of("sora", [*SMALL, "--gradient-checkpointing"])
    assert plain.speed.seconds is not None
    for mfu, times in ((None, 1.32), (0.4, 1.0)):
        made = make_plan("train", full, Request(gpus=1, gpu="H100", mfu=mfu))
        assert made.speed.seconds == pytest.approx(times * plain.speed.seconds)
    every = [slowdown(Case(options_of("sora", [*SMALL, "--activation-checkpointing", n]), Layout(1))) for n in "1248"]
    assert every == sorted(every, reverse=True)


def test_an_expert_that_waits_is_the_fastest_change_of_two(tmp_path: Path) -> None:
    folder = make_wan(tmp_path / "wan", "t2v-a14b", ffn_dim=4096)
    flags = [*SIZE[:4], "--num-frames", "9", "--rank", "1", "--cache", "c", "--pretrained-model", str(folder)]
    words = ["--idle-expert", "cpu", "--expert-steps", "50"]
    waits = make_plan("train lora", options_of("lora", [*flags, *words]), Request(gpus=1, memory=2**40))
    enough = Request(gpus=1, memory=round(waits.device.total / SPARE) + 1)
    made = make_plan("train lora", options_of("lora", flags), enough)
    assert not made.fits
    assert made.change is not None
    assert made.change.flags == (" ".join(words),)
    assert made.change.memory == waits.device.total


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clips = REPOSITORY / "train/videos/mock_data/manifest.jsonl"
    words = [
        "plan",
        "train",
        "vae",
        *VAE,
        "--manifest",
        str(clips),
        "--output-dir",
        str(tmp_path / "out"),
        "--gpus",
        "2",
    ]
    assert main([*words, "--gpu", "H100", "--json", "--max-steps", "100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (bucket,) = plan["buckets"]
    assert plan["passes"] == pytest.approx(100 * 2 / bucket["rows"])
    assert plan["speed"]["flops"] == pytest.approx(2 * bucket["flops"])
    assert plan["speed"]["seconds"] == pytest.approx(bucket["flops"] / (0.4 * 989e12))
    assert plan["device"]["total"] == sum(v for k, v in plan["device"].items() if k != "total")
    assert not (tmp_path / "out").exists()
    assert main([*words[:-1], "0"]) == 0
    text = capsys.readouterr().out
    assert "It fits." in text
    assert "optimizer state" in text
    assert main(["plan", "train", "lora", "--pretrained-model", "Wan-AI/Wan2.1"]) == 2
    assert main(["plan"]) == 2
    assert main(["plan", "train", *FOLDED]) == 2


def test_tables_of_shapes_are_forgotten(sora: Subject) -> None:
    """A table without values would break the text encoder of a training in the same process."""
    from titans_video.models.byte_encoder import prefix_hashes

    step_peak(sora.network, sora.stacks, sora.step(clip_of(sora)), ActivationOptions(), Precision())
    hashes = prefix_hashes(torch.arange(30)[None] % BYTE_VOCABULARY)
    assert type(hashes) is torch.Tensor
    assert hashes.tolist()
