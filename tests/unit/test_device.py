"""The values of `auto`: a table of device facts, and where flags, launchers, earlier runs and caches come first."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.factories import make_vae
from titans_video import processes
from titans_video.codecs import base as codecs
from titans_video.codecs.base import build_codec, codec_from_checkpoint, describe_codec
from titans_video.config.generation import Overrides, RunOptions
from titans_video.config.options import CodecOptions, DataOptions, ModelOptions, TrainOptions
from titans_video.config.recipes import BaseOptions, ExpertOptions, LoraRunOptions, SoraOptions
from titans_video.data.cache import CLIPS, EncodingCache, precisions_in
from titans_video.device import (
    Choice,
    DeviceFacts,
    FastDefaults,
    compiles,
    fast_defaults,
    format_choices,
    read_facts,
    use_tf32,
)
from titans_video.generation import model as generation
from titans_video.training import distributed
from titans_video.training import setup as training

CPU = DeviceFacts(cores=64)
H200 = DeviceFacts("cuda", "NVIDIA H200", has_bf16=True, can_compile=True, cores=16)
V100 = DeviceFacts("cuda", "Tesla V100", has_bf16=False, can_compile=True, cores=10)


@pytest.mark.parametrize(
    ("facts", "best"),
    [
        (DeviceFacts(), FastDefaults("no", "fp32", False, 0)),
        (CPU, FastDefaults("no", "fp32", False, 0)),
        (replace(CPU, local_ranks=2), FastDefaults("no", "fp32", False, 0)),
        (DeviceFacts("mps", "MPS", cores=8), FastDefaults("no", "fp32", False, 0)),
        (H200, FastDefaults("bf16", "bf16", True, 8)),
        (replace(H200, local_ranks=2), FastDefaults("bf16", "bf16", True, 7)),
        (replace(H200, cores=128, local_ranks=8), FastDefaults("bf16", "bf16", True, 8)),
        (replace(H200, cores=24, local_ranks=8), FastDefaults("bf16", "bf16", True, 2)),
        (replace(H200, cores=8, local_ranks=8), FastDefaults("bf16", "bf16", True, 1)),
        (replace(H200, cores=1), FastDefaults("bf16", "bf16", True, 1)),
        (replace(H200, can_compile=False), FastDefaults("bf16", "bf16", False, 8)),
        (V100, FastDefaults("no", "fp32", True, 8)),
        (replace(V100, cores=4), FastDefaults("no", "fp32", True, 3)),
    ],
)
def test_what_suits_a_device(facts: DeviceFacts, best: FastDefaults) -> None:
    assert fast_defaults(facts) == best


def test_compiling_must_pay_and_be_possible() -> None:
    able, unable = FastDefaults(compile=True), FastDefaults(compile=False)
    assert [compiles("auto", able, calls) for calls in (0, 399, 400)] == [False, False, True]
    assert not compiles("auto", unable, 10**6)
    assert not compiles("auto", able, 10**6, allowed=False)
    assert compiles("on", unable, 0, allowed=False)
    assert not compiles("off", able, 10**6)


@pytest.mark.parametrize(("quota", "least"), [("max 100000", None), ("100000 100000", 1), ("20000 100000", 1)])
def test_a_container_has_fewer_cores(
    quota: str, least: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "CPU_QUOTA", tmp_path / "missing")
    whole = processes.usable_cores()
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(processes, "CPU_QUOTA", tmp_path / "cpu.max")
    assert processes.usable_cores() == (whole if least is None else least)


def test_a_cpu_is_described_without_looking_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    facts = read_facts(torch.device("cpu"))
    assert facts == DeviceFacts("cpu", "CPU", cores=processes.usable_cores(), local_ranks=2)


def test_tf32_is_set_for_products_and_convolutions() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for wanted, precision in ((False, "highest"), (True, "high")):
            use_tf32(wanted)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, wanted)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_each_choice_has_its_flag() -> None:
    text = format_choices(
        H200, [Choice("precision", "bf16", "--mixed-precision"), Choice("VAE", "fp32", "--vae-dtype")]
    )
    assert text.splitlines() == [
        "Settings on NVIDIA H200 (16 cores), and the flags that change them:",
        "  precision  bf16  --mixed-precision",
        "  VAE        fp32  --vae-dtype",
    ]


def chosen(options: Any, facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch, resume: Any = None) -> dict[str, Any]:
    """Return what a training run on a device decides, by the name of the option."""
    monkeypatch.setattr(training, "read_facts", lambda device: facts)
    accelerator: Any = SimpleNamespace(
        device=torch.device(facts.kind), mixed_precision=fast_defaults(facts).mixed_precision, num_processes=1
    )
    decided, choices = training.choose_defaults(options, accelerator, resume)
    assert all(choice.flag.startswith("--") for choice in choices)
    found = training.flat(decided)
    assert "auto" not in [found[name] for name in ("mixed_precision", "vae_dtype", "compile", "num_workers")]
    return found


def test_a_training_run_takes_what_suits_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (SoraOptions(), LoraRunOptions()):
        found = chosen(options, H200, monkeypatch)
        assert (found["vae_dtype"], found["compile"], found["num_workers"]) == ("bf16", "on", 8)
        found = chosen(options, CPU, monkeypatch)
        assert (found["vae_dtype"], found["compile"], found["num_workers"]) == ("fp32", "off", 0)


def test_a_given_flag_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SoraOptions(
        codec=CodecOptions(vae_dtype="fp32"), model=ModelOptions(compile="off"), data=DataOptions(num_workers=0)
    )
    found = chosen(options, H200, monkeypatch)
    assert (found["vae_dtype"], found["compile"], found["num_workers"]) == ("fp32", "off", 0)
    assert chosen(SoraOptions(model=ModelOptions(compile="on")), CPU, monkeypatch)["compile"] == "on"
    assert chosen(SoraOptions(codec=CodecOptions(vae_dtype="bf16")), CPU, monkeypatch)["vae_dtype"] == "bf16"


@pytest.mark.parametrize(
    "options",
    [
        SoraOptions(train=TrainOptions(max_steps=20)),
        SoraOptions(train=TrainOptions(deterministic=True)),
        LoraRunOptions(base=BaseOptions(offload="group")),
        LoraRunOptions(base=BaseOptions(layerwise_casting="fp8_e4m3")),
        LoraRunOptions(experts=ExpertOptions(idle_expert="cpu")),
    ],
)
def test_where_a_gpu_does_not_compile(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(options, H200, monkeypatch)["compile"] == "off"


def test_codecs_without_a_precision_keep_their_cache_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SoraOptions(codec=CodecOptions(vae_backend="identity"))
    assert chosen(options, H200, monkeypatch)["vae_dtype"] == "fp32"


def test_a_resumed_run_and_a_cache_decide_before_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resume = SimpleNamespace(state={"settings": {"--vae-dtype": "fp32"}})
    assert chosen(SoraOptions(), H200, monkeypatch, resume)["vae_dtype"] == "fp32"
    for kind in ("fp32", "bf16"):
        EncodingCache(tmp_path / kind, f'["wan", "0a", "{kind}"]').write(
            {"kind": CLIPS, "codec": f'["wan", "0a", "{kind}"]'}, torch.zeros(1)
        )
        assert precisions_in(tmp_path / kind) == {kind}
        cached = SoraOptions(data=DataOptions(cache=str(tmp_path / kind)))
        assert chosen(cached, H200, monkeypatch)["vae_dtype"] == kind
    EncodingCache(tmp_path / "fp32", "mine").write({"kind": CLIPS, "codec": "mine"}, torch.zeros(1))
    (tmp_path / "fp32" / CLIPS / "00").mkdir(exist_ok=True)
    (tmp_path / "fp32" / CLIPS / "00" / "a.safetensors").write_bytes(b"cut off")
    assert precisions_in(tmp_path / "fp32") == {"fp32"}
    assert precisions_in(tmp_path / "none") == set()


def test_generation_takes_what_suits_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert generation.choose_defaults(RunOptions(device="cpu"), 10**6)[0] == RunOptions(
        device="cpu", dtype="fp32", tf32=True, compile="off"
    )
    given = RunOptions(device="cpu", dtype="bf16", compile="on")
    assert generation.choose_defaults(given)[0] == given
    monkeypatch.setattr(generation, "read_facts", lambda device: H200)
    run = RunOptions(device="cpu")
    assert generation.choose_defaults(run, 50)[0] == replace(run, dtype="bf16", compile="off")
    assert generation.choose_defaults(run, 400)[0] == replace(run, dtype="bf16", compile="on")
    assert generation.choose_defaults(replace(run, offload="model"), 400)[0].compile == "off"
    assert generation.choose_defaults(replace(run, dtype="fp32"), 400)[0].dtype == "fp32"


def test_a_stored_auto_is_decided_where_the_codec_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CodecOptions(pretrained_model=str(make_vae("wan", tmp_path)))
    stored = describe_codec(build_codec(options), options)
    old = describe_codec(build_codec(options), replace(options, vae_dtype="fp32"))
    assert vae_dtype(codec_from_checkpoint(stored, {}, Overrides())) == torch.float32
    monkeypatch.setattr(codecs, "read_facts", lambda device: H200)
    assert vae_dtype(codec_from_checkpoint(stored, {}, Overrides())) == torch.bfloat16
    assert vae_dtype(codec_from_checkpoint(stored, {}, Overrides(vae_dtype="fp16"))) == torch.float16
    assert vae_dtype(codec_from_checkpoint(old, {}, Overrides())) == torch.float32
    assert vae_dtype(codec_from_checkpoint(old, {}, Overrides(vae_dtype="auto"))) == torch.bfloat16


def vae_dtype(codec: Any) -> torch.dtype:
    found: torch.dtype = codec.vae.dtype
    return found


LAUNCH = ["/usr/bin/python3", "/opt/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("words", "config", "named"),
    [
        ([*LAUNCH, "train.py"], None, False),
        ([*LAUNCH, "train.py"], "distributed_type: 'NO'\n", False),
        ([*LAUNCH, "train.py"], "mixed_precision: 'no'\n", True),
        ([*LAUNCH, "--config_file", "CONFIG", "train.py"], "mixed_precision: 'no'\n", True),
        ([*LAUNCH, "--config-file=CONFIG", "train.py"], "distributed_type: 'NO'\n", False),
        ([*LAUNCH, "--mixed_precision", "no", "train.py"], None, True),
        ([*LAUNCH, "--mixed-precision=no", "train.py"], None, True),
        ([*LAUNCH, "train.py"], "- not a mapping\n", True),
        (["bash", "run.sh"], None, True),  # whoever set the variable meant it
    ],
)
def test_a_no_that_accelerate_invented_is_no_choice(
    words: list[str], config: str | None, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    if config is not None:
        path.write_text(config)
    monkeypatch.setattr(distributed, "default_config_file", str(path))
    monkeypatch.setattr(distributed, "_parent_command_line", lambda: [w.replace("CONFIG", str(path)) for w in words])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert distributed.launcher_precision() == ("no" if named else None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert distributed.launcher_precision() == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert distributed.launcher_precision() is None
