"""Flags, configuration files, rules across flags, and their error messages."""

import errno
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from titans_video.cli import launchers
from titans_video.cli.generate import GenerateFlags
from titans_video.cli.launchers import take_mode, with_defaults
from titans_video.cli.main import COMMANDS, dispatch, main
from titans_video.cli.run import guarded
from titans_video.config.parse import flags_from_yaml, parse
from titans_video.config.recipes import LoraRunOptions, SoraOptions, SVDOptions, TitansOptions
from titans_video.config.rules import check_lora, check_svd, check_titans, check_training
from titans_video.errors import ConfigError

TRAINING_SCRIPTS = (
    "video_framework",
    "train_sora_accelerate",
    "train_titans_video_dit_accelerate",
    "train_cogvideox_lora_accelerate",
    "train_lora_accelerate",
    "train_finetune_accelerate",
    "train_video_accelerate",
)
DOCUMENTED_TRAINING = [
    """--manifest train/videos/mock_data/manifest.jsonl --pretrained-model /path/to/diffusers_weights
    --text-model google/umt5-xxl --llm-model /path/to/qwen_or_mistral_or_llama --llm-dtype bf16 --llm-max-length 256
    --attention-type st --patch-size 2,2,2 --local-files-only""",
    """--manifest train/videos/mock_data/manifest.jsonl --pretrained-model . --vae-backend external
    --vae-module train.videos.cogvideox_vae_adapter --vae-class CogVideoXVAEWrapper
    --vae-init-json '{"pretrained_path":"/path/to/CogVideoX-2b","dtype":"float16"}'
    --attention-type st --patch-size 2,2,2 --text-model google/umt5-xxl
    --llm-model /path/to/mistral_or_qwen --llm-dtype bf16 --local-files-only""",
    """--manifest /path/to/manifest.jsonl --pretrained-model /path/to/diffusers_weights_or_dummy
    --output-dir outputs_sora --max-steps 100000 --batch-size 1 --grad-accum 4 --mixed-precision bf16
    --lr-schedule cosine --lr-warmup-steps 1000 --min-lr 0.0 --cfg-drop-prob 0.1 --attention-type st
    --patch-size 2,2,2 --save-limit 3""",
    """--manifest train/videos/mock_data/manifest.jsonl --pretrained-model . --output-dir outputs_sora
    --max-steps 20000 --batch-size 1 --grad-accum 4 --mixed-precision bf16 --text-model google/umt5-xxl
    --text-dtype bf16 --text-max-length 256 --llm-model /path/to/Qwen2.5-3B-or-7B --llm-dtype bf16
    --llm-max-length 256 --vae-backend external --vae-module train.videos.cogvideox_vae_adapter
    --vae-class CogVideoXVAEWrapper --vae-init-json '{"pretrained_path":"/path/to/CogVideoX-2b","dtype":"float16"}'
    --attention-type st --patch-size 2,2,2 --local-files-only""",
]
DOCUMENTED_GENERATION = [
    """--checkpoint outputs_sora/last.pt --prompt "a cat walking, cinematic" --num-frames 16 --height 512 --width 512
    --steps 50 --guidance-scale 1.0 --out out.mp4""",
    """--checkpoint outputs_sora/last.pt --prompt "a cat walking, cinematic" --fps 24 --seconds 8 --height 512
    --width 512 --out out_8s_24fps.mp4""",
]


def training(words: str | list[str]) -> SoraOptions:
    argv = shlex.split(words) if isinstance(words, str) else words
    return parse(SoraOptions(), argv, prog="train")


@pytest.mark.parametrize("words", DOCUMENTED_TRAINING)
def test_documented_training_commands_parse(words: str) -> None:
    options = training(words)
    check_training(options)
    assert options.model.patch_size == (2, 2, 2)
    assert options.model.attention_type == "st"
    assert len(options.data.manifest) == 1


@pytest.mark.parametrize("words", DOCUMENTED_GENERATION)
def test_documented_generation_commands_parse(words: str) -> None:
    flags = parse(GenerateFlags(), shlex.split(words), prog="infer")
    assert flags.generate.checkpoint == "outputs_sora/last.pt"
    assert flags.generate.prompt == "a cat walking, cinematic"
    assert flags.overrides.local_files_only is None


def test_underscores_repeats_and_negative_numbers() -> None:
    options = training("--manifest a.jsonl --manifest b.jsonl:2 --batch_size 3 --time-mean -1.4 --betas 0.9,0.95")
    assert options.data.manifest == ("a.jsonl", "b.jsonl:2")
    assert options.data.batch_size == 3
    assert options.process.time_mean == -1.4
    assert options.train.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bach-size 3", "--bach-size.*--batch-size"),
        ("--patch-size 2,2", "--patch-size.*three positive whole numbers"),
        ("--patch-size 2,0,2", "--patch-size.*three positive whole numbers"),
        ("--batch-size two", "--batch-size.*two"),
        ("--vae-backend magic", "--vae-backend.*diffusers"),
        ("--height", "--height"),
        ("--config", "--config needs"),
        ("--config a.yaml --config b.yaml", "more than once"),
        ("--config missing.yaml", r"missing\.yaml: there is no such file"),
    ],
)
def test_messages_about_mistakes_on_the_command_line(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        training(words)
    assert len(str(e.value).splitlines()) == 1
    assert "─" not in str(e.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-steps abc", "--max-steps abc: it must be a whole number, at least 1."),
        ("--max-steps=1.5", "--max-steps 1.5: it must be a whole number, at least 1."),
        ("--lr fast", "--lr fast: it must be a number, above 0."),
        ("--height ''", "--height '': it must be a whole number, at least 1."),
        ("--betas 0.9,x", "--betas 0.9,x: it must be two numbers such as 0.9,0.95."),
        ("--betas 0.9", "--betas 0.9: it must be two numbers such as 0.9,0.95."),
        ("--sample-guidance-interval x", "--sample-guidance-interval x: it must be two numbers such as 0.9,0.95."),
        ("--remote-cache-size big", "--remote-cache-size big: it must be a size such as 50GB, 500MB or 20GiB."),
        ("--mixed-precision 8", "--mixed-precision 8: it must be auto, no, fp16 or bf16."),
        ("--max-steps --seed 1", "--max-steps needs a value."),
        ("--random-crop=yes", "--random-crop takes no value: write --random-crop or --no-random-crop."),
        ("--no-random-crop true", "--no-random-crop takes no value: write --random-crop or --no-random-crop."),
        ("--seed 1 --lr " + "9" * 70 + "x", f"--lr {'9' * 60}: it must be a number, above 0."),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_flag_and_what_is_expected(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        training(words)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1e4", "--max-steps 1e4: it must be a whole number, at least 1."),
        ("lr: [1, 2]", "--lr 1,2: it must be a number, above 0."),
        ("betas: [0.9, x]", "--betas 0.9,x: it must be two numbers such as 0.9,0.95."),
        ("mixed_precision: 5", "--mixed-precision 5: it must be auto, no, fp16 or bf16."),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as e:
        training(f"--config {tmp_path}/a.yaml --seed 1")
    assert str(e.value) == f"--config {tmp_path}/a.yaml: {message}"


@pytest.mark.parametrize(
    ("words", "position"),
    [
        ("", "auto"),
        ("--compile", "on"),
        ("--compile --preset tiny", "on"),
        ("--preset tiny --compile", "on"),
        ("--no-compile", "off"),
        ("--no_compile", "off"),
        ("--compile --no-compile", "off"),
        ("--compile on", "on"),
        ("--compile=off", "off"),
        ("--compile auto", "auto"),
    ],
)
def test_a_switch_with_three_positions(words: str, position: str, tmp_path: Path) -> None:
    assert training(words).model.compile == position
    for text, other in (("true", "on"), ("false", "off"), ("auto", "auto"), ("on", "on"), ("off", "off")):
        (tmp_path / "a.yaml").write_text(f"compile: {text}\n")
        from_file = f"--config {tmp_path / 'a.yaml'} {words}"
        assert training(from_file).model.compile == (position if words else other)


@pytest.mark.parametrize("words", ["--compile maybe", "--compile=maybe --preset tiny", "--compile="])
def test_a_switch_without_such_a_position(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--compile (maybe|''): it must be auto, on or off\.$"):
        training(words)


def test_a_number_or_auto() -> None:
    assert training("").data.num_workers == "auto"
    assert training("--num-workers auto").data.num_workers == "auto"
    assert training("--num-workers 3").data.num_workers == 3
    with pytest.raises(ConfigError, match=r"^--num-workers many: it must be auto or a whole number\.$"):
        training("--num-workers many")


@pytest.mark.parametrize(
    "words",
    [
        "--batch-size 0",
        "--max-steps 0",
        "--lr 0",
        "--lr nan",
        "--ema-decay 1",
        "--betas 0.9,1.5",
        "--cfg-drop-prob 1.5",
        "--min-lr 1 --lr 0.1",
        "--num-workers -1",
        "--fps 0",
        "--grad-accum 0",
    ],
)
def test_numbers_without_meaning_are_rejected_by_their_flag(words: str) -> None:
    with pytest.raises(ConfigError, match=words.split()[0]):
        check_training(training("--manifest a.jsonl " + words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output-dir=", "--output-dir is empty"),
        ("--resume=", "--resume is empty"),
        ("--lr 0.1 --min-lr 0.2", "--min-lr 0.2: it must be at least 0 and at most --lr 0.1"),
        ("--validation-split 0.1 --validation-manifest x", "give only one"),
        ("--validation-prompts x --validation-prompt y", "put them all in the file"),
        ("--validation-prompt y", "nothing is validated"),
        ("--cache-dtype bf16", "nothing is cached; give --cache"),
        ("--cache-variants 3", "nothing is cached; give --cache"),
        ("--activation-checkpointing some", "--activation-checkpointing some: it is none, selective, full, or"),
        ("--activation-checkpointing 0", "--activation-checkpointing 0: it is none"),
        ("--gradient-checkpointing --activation-checkpointing none", "give only one of them"),
        ("--gradient-checkpointing --activation-checkpointing 2", "give only one of them"),
    ],
)
def test_rules_across_flags_of_every_training(words: str, message: str) -> None:
    argv = ["--manifest", "m.jsonl", *words.split()]
    for default, check in ((SoraOptions(), check_training), (TitansOptions(), check_titans), (SVDOptions(), check_svd)):
        with pytest.raises(ConfigError, match=message):
            check(parse(default, argv, prog="train"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        check_lora(parse(LoraRunOptions(), argv, prog="train"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mem-tokens 0", "--mem-tokens 0: it must be at least 1"),
        ("--bptt-segments 1", "--bptt-segments 1: it must be at least 2"),
        ("--sample-continue-steps 4", "--sample-continue-steps: a model with a memory"),
    ],
)
def test_rules_of_the_memory(words: str, message: str) -> None:
    argv = ["--manifest", "m.jsonl", *words.split()]
    with pytest.raises(ConfigError, match=message):
        check_titans(parse(TitansOptions(), argv, prog="train"))
    if "sample" not in words:
        check_titans(parse(TitansOptions(), [*argv, "--memory", "none"], prog="train"))


def test_a_training_without_clips_is_rejected() -> None:
    with pytest.raises(ConfigError, match="--manifest"):
        check_training(training(""))


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text(
        "# a comment\nmanifest: [a.jsonl, b.jsonl]\nlr: 1e-3\npatch-size: [1, 2, 2]\nrandom_crop: true\n"
        "height: 32\nwidth: 64\nbetas: [0.9, 0.95]\nfps:\nvae_init_json: {space_to_depth: 4}\n"
    )
    return path


def test_a_configuration_file_sets_flags(preset: Path) -> None:
    options = training(["--config", str(preset), "--width", "48"])
    assert options.data.manifest == ("a.jsonl", "b.jsonl")
    assert options.train.lr == 1e-3
    assert options.model.patch_size == (1, 2, 2)
    assert options.data.random_crop
    assert (options.data.height, options.data.width) == (32, 48)
    assert options.train.betas == (0.9, 0.95)
    assert options.data.fps is None
    assert options.codec.vae_init_json == '{"space_to_depth": 4}'


def test_the_command_line_wins_over_the_file(preset: Path) -> None:
    options = training(["--config=" + str(preset), "--metadata", "m.json", "--resolution", "64", "--no-random-crop"])
    assert (options.data.manifest, options.data.metadata) == ((), "m.json")
    assert (options.data.height, options.data.width, options.data.resolution) == (None, None, 64)
    assert not options.data.random_crop


@pytest.mark.parametrize(
    ("words", "mode", "every"),
    [
        ("", "none", 0),
        ("--gradient-checkpointing", "full", 1),
        ("--gradient-checkpointing --activation-checkpointing full", "full", 1),
        ("--activation-checkpointing selective", "selective", 1),
        ("--activation-checkpointing 3", "3", 3),
        ("--config {file}", "full", 1),
        ("--config {file} --activation-checkpointing selective", "selective", 1),
        ("--config {file} --no-gradient-checkpointing", "none", 0),
    ],
)
def test_modes_of_checkpointing(tmp_path: Path, words: str, mode: str, every: int) -> None:
    (tmp_path / "preset.yaml").write_text("gradient_checkpointing: true\n")
    options = training("--manifest m.jsonl " + words.format(file=tmp_path / "preset.yaml"))
    check_training(options)
    assert (options.activations.checkpointing, options.activations.every) == (mode, every)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 3", "bach_size.*batch_size"),
        ("- a\n- b", "contains a list"),
        ("a: [", "is not YAML"),
        ("batch_size: 0.5", "--batch-size"),
        ("batch_size: [[1]]", "neither a plain value"),
        ("config: other.yaml", "config"),
        ("mixed_precision: no", r"mixed_precision is not .* write quotes"),
        ("activation_checkpointing: true", r"activation_checkpointing is not .* write quotes"),
        ("tf32: 'no'", "tf32 is true or false"),
        ("compile: 1", "compile is true, false or auto"),
    ],
)
def test_messages_about_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as e:
        training(["--config", str(path)])
    assert message == "--batch-size" or str(path) in str(e.value)


def test_an_empty_file_is_no_flags(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert flags_from_yaml(path, {"lr": False}) == []


@pytest.mark.parametrize(
    ("words", "mode", "rest"),
    [
        ("", None, ""),
        ("--mode train --lr 1", "train", "--lr 1"),
        ("--lr 1 --mode=inference", "inference", "--lr 1"),
        ("--mode", "", ""),
    ],
)
def test_the_mode_may_be_anywhere(words: str, mode: str | None, rest: str) -> None:
    assert take_mode(words.split()) == (mode, rest.split())


def test_flags_override_the_defaults_of_the_script(repository: Path) -> None:
    def added(words: str) -> set[str]:
        given = words.split()
        return {w for w in with_defaults(given, repository)[: -len(given) or None] if w.startswith("--")}

    assert added("") == {"--config", "--manifest"}
    assert added("--metadata m.json") == {"--config"}
    assert added("--output-dir out") == {"--config", "--manifest"}
    assert added("--resume auto") == {"--config", "--manifest"}
    assert added("--config mine.yaml") == set()


@pytest.mark.parametrize(("words", "said"), [("", True), ("--metadata m.json", False), ("--config mine.yaml", False)])
def test_training_on_made_up_clips_is_said(
    words: str, said: bool, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launchers, "load_entry", lambda _: lambda *_: 0)
    assert launchers.train_script(repository, ["--mode", "train", *words.split()]) == 0
    assert ("made-up clips" in "".join(capsys.readouterr())) is said


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="titans-video train"):
        dispatch(["trian"])
    with pytest.raises(ConfigError, match=r"no command 'data mok'.*titans-video data mock"):
        dispatch(["data", "mok"])
    for words in ([], ["--help"], ["data"], ["data", "--help"]):
        assert dispatch(words) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_errors_of_the_system_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def too_long() -> int:
        return len((tmp_path / ("a" * 300)).read_bytes())

    def full() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def ours() -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    assert guarded(too_long) == 2
    assert capsys.readouterr().err.endswith("aaa: File name too long.\n")
    assert guarded(full) == 2
    assert capsys.readouterr().err == "Error: cannot write: No space left on device.\n"
    with pytest.raises(OSError, match="Invalid argument"):
        guarded(ours)


def test_a_command_gets_the_words_after_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("titans_video.cli.train.train_sora", lambda argv: calls.append(argv) or 7)
    assert dispatch(["train", "--lr", "1"]) == 7
    assert calls == [["--lr", "1"]]


@pytest.mark.parametrize("interval", ["1,0.2", "-0.1,0.5", "0.5,1.1"])
def test_a_guidance_interval_that_means_nothing_is_rejected(interval: str) -> None:
    with pytest.raises(ConfigError, match="--sample-guidance-interval"):
        check_training(training(f"--manifest m.jsonl --sample-guidance-interval={interval}"))


@pytest.mark.parametrize(
    ("entry", "words", "ends"),
    [
        (main, "train --max-steps 1", True),
        (main, "train svd --max-steps 1", True),
        (main, "data cache --cache x", True),
        (main, "data check x", False),
        (main, "generate --prompt x", False),
        (lambda: launchers.train_script(Path()), "--mode train --max-steps 1", True),
        (lambda: launchers.train_script(Path()), "--mode inference", False),
        *((getattr(launchers, name), "--max-steps 1", True) for name in TRAINING_SCRIPTS),
        (launchers.video_framework, "infer --prompt x", False),
        (launchers.infer_sora, "--prompt x", False),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_of_a_launcher_ends_at_once_after_training(
    processes: str, entry: Any, words: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not if another program called the command, because that program continues."""
    ended: list[int] = []
    monkeypatch.setattr("titans_video.cli.run.os._exit", ended.append)
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("sys.argv", ["x", *shlex.split(words)])
    for module in ("main", "launchers"):
        monkeypatch.setattr(f"titans_video.cli.{module}.guarded", lambda command: 3)
    assert entry() == 3
    assert ended == ([3] if ends and processes == "2" else [])
    if entry is main:
        assert main(shlex.split(words)) == 3
        assert len(ended) <= 1


MISSING = [
    "train --vae-backend identity --manifest {no}",
    "train --vae-backend identity --metadata {no}",
    "train --manifest {yes} --pretrained-model {no}",
    "train --vae-backend identity --manifest {yes}:2 --validate-every 1 --validation-manifest {no}",
    "train titans --vae-backend identity --manifest {yes} --data-root {no}",
    "train svd --manifest {yes} --resume {no}",
    "train lora --manifest {yes} --pretrained-model {no}",
    "train cogvideox-lora --manifest {yes} --pretrained-model {no}",
    "data check {no}",
    "data cache {no} --cache x",
    "cache verify {no}",
    "report {no}",
    "generate --checkpoint {no}",
    "generate --image {no}",
    "generate --prompt-file {no}",
    "generate --pretrained-model {no}",
    "export {no} out",
    "score --checkpoint {no}",
]
WITHOUT_TORCH = """
import contextlib, io, json, sys
from titans_video.cli.main import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(command.split())
    loaded = sorted({"torch", "diffusers", "transformers", "numpy", "av"} & set(sys.modules))
    print(json.dumps([code, printed.getvalue(), loaded]))
"""


def test_missing_files_are_reported_without_torch(tmp_path: Path) -> None:
    (tmp_path / "yes").write_text("{}")
    commands = [text.format(no=tmp_path / "no", yes=tmp_path / "yes") for text in MISSING]
    words = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    for command, line in zip(commands, done.stdout.splitlines(), strict=True):
        code, printed, loaded = json.loads(line)
        assert (code, loaded) == (2, []), f"{command}\n{printed}"
        assert str(tmp_path / "no") in printed, command
        assert printed.count("\n") == 1
