"""Frozen encoders, compared with transformers' own calls on folders that transformers wrote."""

import io
import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.factories import LLM_FAMILIES, MULTIMODAL_FAMILIES, WORDS, make_llm, make_multimodal, make_t5
from titans_video import hub
from titans_video.config.fields import Dtype
from titans_video.config.generation import Overrides
from titans_video.config.options import TextOptions
from titans_video.errors import CheckpointError, TextError
from titans_video.text.base import TextEncoder, build_text, text_from_checkpoint
from titans_video.text.huggingface import PretrainedStream
from titans_video.types import PRECISIONS

MAKERS: dict[str, Callable[[Path], Path]] = {
    "T5": make_t5,
    "UMT5": lambda folder: make_t5(folder, umt5=True),
    **{f: lambda folder, f=f: make_llm(f, folder) for f in LLM_FAMILIES},
    **{f"{f} multimodal": lambda folder, f=f: make_multimodal(f, folder) for f in MULTIMODAL_FAMILIES},
}


def as_text(folder: Path, **changes: Any) -> TextEncoder:
    return build_text(TextOptions(text_model=str(folder), text_dtype="fp32", **changes))


def as_llm(folder: Path, **changes: Any) -> TextEncoder:
    return build_text(TextOptions(text_model="none", llm_model=str(folder), llm_dtype="fp32", **changes))


def library(folder: Path, name: str) -> Any:
    """Load the library's own model: only the encoder for T5s, the whole model otherwise."""
    kind = {"T5": "T5EncoderModel", "UMT5": "UMT5EncoderModel"}.get(name, "AutoModel")
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_states_are_the_librarys_own(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path)
    model, tokenizer = library(folder, name), transformers.AutoTokenizer.from_pretrained(folder)
    texts = as_text(folder), as_llm(folder)
    for prompt in WORDS:
        expected = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
        for text in texts:
            condition = text([prompt])
            assert torch.equal(condition.streams[0], expected)
            assert condition.masks[0].all()
    assert texts[0].widths == [16]


@pytest.mark.parametrize("name", MAKERS)
def test_padded_equals_unpadded(name: str, tmp_path: Path) -> None:
    text = as_llm(MAKERS[name](tmp_path))
    prompts = [*WORDS, ""]
    batch = text(prompts)
    for states, mask, prompt in zip(batch.streams[0], batch.masks[0], prompts, strict=True):
        alone = text([prompt]).streams[0][0]
        assert mask.sum() == len(alone) >= 1
        torch.testing.assert_close(states[mask], alone, atol=1e-5, rtol=0)
        assert not states[~mask].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False])
def test_a_tokenizers_padding_side_and_token_do_not_matter(side: str, pad: bool, tmp_path: Path) -> None:
    usual = as_llm(make_llm("Qwen2", tmp_path / "usual"))(WORDS)
    other = as_llm(make_llm("Qwen2", tmp_path / "other", side=side, pad=pad))(WORDS)
    assert torch.equal(other.masks[0], usual.masks[0])
    torch.testing.assert_close(other.streams[0], usual.streams[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_other_layers_are_the_librarys_hidden_states(tmp_path: Path) -> None:
    folder = make_llm("Llama", tmp_path)
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(WORDS[0], return_tensors="pt")
    hidden = library(folder, "Llama")(**inputs, output_hidden_states=True).hidden_states
    for layer in (-3, -2, -1, 0, 1, 2):
        assert torch.equal(as_llm(folder, llm_layer=layer)([WORDS[0]]).streams[0], hidden[layer])
    for layer in (3, -4):
        with pytest.raises(TextError, match="has 2 layers"):
            as_llm(folder, llm_layer=layer)


@torch.no_grad()
def test_template_tokens_before_the_prompt_are_cut(tmp_path: Path) -> None:
    folder = make_llm("Llama", tmp_path)
    before = "Describe the video:\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(before)["input_ids"])
    text = as_llm(folder, llm_template=before + "{prompt}!")
    prompts = [WORDS[0], WORDS[2], ""]
    batch = text(prompts)
    for states, mask, prompt in zip(batch.streams[0], batch.masks[0], prompts, strict=True):
        inputs = tokenizer(before + prompt + "!", return_tensors="pt")
        expected = library(folder, "Llama")(**inputs).last_hidden_state[0, start:]
        torch.testing.assert_close(states[mask], expected, atol=1e-5, rtol=0)
    assert as_llm(folder, llm_template=before + "{prompt}")([""]).masks[0].sum() == 1
    with pytest.raises(TextError, match="llm-template must contain"):
        as_llm(folder, llm_template="no place")


def test_long_prompts_are_cut_to_the_maximum(tmp_path: Path) -> None:
    t5, llm = as_text(make_t5(tmp_path / "t5"), text_max_length=5), as_llm(make_llm("Qwen3", tmp_path / "llm"))
    long = " ".join(WORDS * 9)
    assert t5([long]).streams[0].shape == (1, 5, 16)
    assert llm([long]).streams[0].shape[1] <= 256
    template = as_llm(tmp_path / "llm", llm_template="Describe: {prompt}", llm_max_length=6)
    assert template([long]).streams[0].shape[1] == 6


@pytest.mark.parametrize("name", ["T5", "Qwen3", "Llama"])
def test_long_prompts_are_counted_as_the_tokenizer_counts_them(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [" ".join(WORDS[:1] * n) for n in range(1, 9)]
    found = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    longest = found[4]
    text = as_llm(folder, llm_max_length=longest)
    note = text.cut_note([*prompts, *prompts], "prompts")
    assert note is not None
    assert note.startswith(f"Warning: 3 of 8 different prompts are longer than {longest} tokens (--llm-max-length)")
    assert f"The longest has {found[-1]}" in note
    assert text.cut_note(prompts[:5]) is None
    assert [stream._model for stream in text.streams if isinstance(stream, PretrainedStream)] != []


@pytest.mark.parametrize("name", ["T5", "Qwen3", "Llama"])
@pytest.mark.parametrize("prompt", ["猫狗鸟鱼虫", "aéèêëïô", "\U0001f408\U0001f415\U0001f401"])
def test_a_token_limit_never_splits_a_character(name: str, prompt: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream = as_llm(folder).streams[0]
    assert isinstance(stream, PretrainedStream)
    allowed = [tokenizer(prompt[:n])["input_ids"] for n in range(len(prompt) + 1)]
    for longest in range(len(allowed[0]) + 1, len(allowed[-1]) + 1):
        # The longest beginning of whole characters that fits.
        assert stream._ids(prompt, longest) == max((ids for ids in allowed if len(ids) <= longest), key=len)


def test_two_streams_stay_apart(tmp_path: Path) -> None:
    options = TextOptions(
        text_model=str(make_t5(tmp_path / "t5", width=32)), llm_model=str(make_llm("Mistral", tmp_path / "llm"))
    )
    text = build_text(options)
    condition = text(WORDS)
    assert text.widths == [32, 16]
    assert [s.shape[-1] for s in condition.streams] == [32, 16]
    assert condition.streams[0].dtype == torch.bfloat16
    assert not torch.equal(condition.masks[0].sum(1), condition.masks[1].sum(1) + 1)
    stored = json.loads(json.dumps(text.describe()))
    text_from_checkpoint(stored, Overrides())
    with pytest.raises(CheckpointError, match=r"widths \[32, 16\]; the given ones have \[16, 16\]"):
        text_from_checkpoint(stored, Overrides(text_model=str(make_t5(tmp_path / "narrow"))))


def test_changed_weights_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = as_llm(make_llm("Qwen2", tmp_path / "a")).describe()
    text_from_checkpoint(stored, Overrides(llm_model=str(make_llm("Qwen2", tmp_path / "same"))))
    assert "warning" not in capsys.readouterr().err
    text_from_checkpoint(stored, Overrides(llm_model=str(make_llm("Qwen3", tmp_path / "other"))))
    assert "warning: the text encoder" in capsys.readouterr().err


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_is_kept_and_close(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path)
    full = as_text(folder)(WORDS)
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16")
    for dtype in dtypes:
        half = build_text(TextOptions(text_model=str(folder), text_dtype=dtype))(WORDS)
        assert half.streams[0].dtype == PRECISIONS[dtype]
        assert torch.equal(half.masks[0], full.masks[0])
        torch.testing.assert_close(half.streams[0].float(), full.streams[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("umt5", [False, True])
@pytest.mark.parametrize("says", [False, True])
def test_a_t5_saved_from_its_encoder_only(umt5: bool, says: bool, tmp_path: Path) -> None:
    whole = make_t5(tmp_path, umt5=umt5)
    expected = as_text(whole)(WORDS).streams[0]
    library(whole, "UMT5" if umt5 else "T5").save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": says}))
    assert torch.equal(as_text(whole)(WORDS).streams[0], expected)


@pytest.mark.parametrize("form", ["shards", "bin", "bin shards"])
def test_weights_in_other_files(form: str, tmp_path: Path) -> None:
    folder = make_t5(tmp_path, umt5=True) if form == "bin" else make_llm("Qwen2", tmp_path)
    expected = as_text(folder)(WORDS).streams[0]
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if form == "shards":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        weights.unlink()
        model.save_pretrained(folder, max_shard_size="8KB")
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        index = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(tensors)}
        for file in set(index.values()):
            torch.save({n: tensors[n] for n in tensors if index[n] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    weights.unlink(missing_ok=True)
    assert torch.equal(as_text(folder)(WORDS).streams[0], expected)


@pytest.mark.parametrize("umt5", [False, True])
def test_a_t5_with_only_a_sentencepiece_vocabulary(umt5: bool, tmp_path: Path) -> None:
    folder = make_t5(tmp_path, umt5=umt5)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 50),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    (stream,) = as_text(folder).streams
    assert isinstance(stream, PretrainedStream)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    for prompt in WORDS:
        assert stream._tokens(prompt)[0] == [*theirs.encode(prompt), theirs.eos_id()]


@pytest.mark.parametrize("family", MULTIMODAL_FAMILIES)
def test_only_the_text_part_of_a_multimodal_model_is_kept(family: str, tmp_path: Path) -> None:
    (stream,) = as_llm(make_multimodal(family, tmp_path)).streams
    assert isinstance(stream, PretrainedStream)
    names = [name for name, _ in stream.model.named_parameters()]
    assert names
    assert not [name for name in names if "vis" in name or "multi_modal" in name]


def test_encoders_are_frozen_load_late_and_can_be_released(tmp_path: Path) -> None:
    options = TextOptions(text_model=str(make_t5(tmp_path)), text_dtype="fp32", text_offload="cpu")
    text = build_text(options, load=False)
    (stream,) = text.streams
    assert isinstance(stream, PretrainedStream)
    assert text.widths == [16]
    assert stream._model is None
    before = text(WORDS).streams[0]
    assert not before.requires_grad
    assert not stream.model.training
    assert not any(p.requires_grad for p in stream.model.parameters())
    text.release()
    assert stream._model is None
    assert torch.equal(text(WORDS).streams[0], before)


def test_states_go_to_the_device_and_an_offloaded_encoder_stays(tmp_path: Path) -> None:
    folder = make_t5(tmp_path)
    away = build_text(TextOptions(text_model=str(folder), text_offload="cpu"), "meta")
    assert away(WORDS).streams[0].device.type == "meta"
    assert isinstance(away.streams[0], PretrainedStream)
    assert away.streams[0].model.device.type == "cpu"


def test_hidden_size_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llm("Qwen2", tmp_path)
    assert as_llm(folder, llm_hidden_size=16).widths == [16]
    with pytest.raises(TextError, match=r"--llm-hidden-size 24: the config of .* says 16"):
        as_llm(folder, llm_hidden_size=24)
    without = SimpleNamespace(is_encoder_decoder=False)
    without.get_text_config = lambda: SimpleNamespace()
    read = PretrainedStream._read

    def without_width(self: PretrainedStream, kind: Any, **options: Any) -> Any:
        return without if kind is transformers.AutoConfig else read(self, kind, **options)

    monkeypatch.setattr(PretrainedStream, "_read", without_width)
    with pytest.raises(TextError, match="give it with --llm-hidden-size"):
        as_llm(folder)
    assert as_llm(folder, llm_hidden_size=16)(WORDS).streams[0].shape[-1] == 16
    with pytest.raises(TextError, match=r"--llm-hidden-size 24: the hidden states of .* are 16 wide"):
        as_llm(folder, llm_hidden_size=24)(WORDS)


def test_missing_or_misshapen_weights_are_an_error(tmp_path: Path) -> None:
    folder = make_llm("Llama", tmp_path)
    weights = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(weights).items()}  # not mapped from the file that is written below
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    with pytest.raises(TextError, match=r"layers\.1\.mlp\.up_proj\.weight.*would be random"):
        as_llm(folder)
    save_file(tensors | {name: torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(TextError, match="--llm-model"):
        as_llm(folder)
    weights.unlink()
    with pytest.raises(TextError, match="cannot be loaded"):
        as_llm(folder)


def test_missing_models_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (TextOptions(text_model="google/umt5-xxl"), TextOptions("google/umt5-xxl", local_files_only=True)):
        with pytest.raises(TextError, match=r"not on this machine and hub access is off.*--text-model builtin"):
            build_text(options)
    with pytest.raises(TextError, match=r"--llm-model \./nowhere: there is no such folder"):
        build_text(TextOptions(llm_model="./nowhere"))
    monkeypatch.setattr(hub, "_hub_is_off", lambda: False)
    monkeypatch.setattr(hub, "_hub_problem", lambda: "no route")
    with pytest.raises(TextError, match=r"the hub does not respond \(no route\).*--text-model builtin"):
        build_text(TextOptions(text_model="google/umt5-xxl"))


def test_a_folder_without_a_tokenizer_or_of_an_unknown_kind_is_reported(tmp_path: Path) -> None:
    folder = make_llm("Qwen2", tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TextError, match="tokenizer does not know plain English"):
        as_llm(folder)
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(TextError, match="cannot be loaded"):
        as_llm(folder)


@torch.no_grad()
def test_an_encoder_with_few_positions_takes_no_more(tmp_path: Path) -> None:
    folder = make_llm("Qwen2", tmp_path, max_position_embeddings=7)
    assert as_text(folder)([WORDS[2]]).streams[0].shape == (1, 7, 16)


def test_a_missing_package_is_one_line_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TextError, match="pip install transformers"):
        build_text(TextOptions(text_model="google/umt5-xxl"))


def test_without_an_llm_nothing_of_it_is_imported(tmp_path: Path) -> None:
    make_t5(tmp_path)
    code = (
        "import sys; from titans_video.config.options import TextOptions; "
        "from titans_video.text.base import build_text; "
        "build_text(TextOptions())(['a']); assert 'transformers' not in sys.modules; "
        "build_text(TextOptions(text_model=sys.argv[1]))(['a']); "
        "kinds = {m.split('.')[2] for m in sys.modules if '.modeling_' in m and m.startswith('transformers.models.')}; "
        "assert kinds == {'auto', 't5'}, kinds"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def anonymous_bytes() -> int:
    """Return this process's own memory, without pages of mapped files, which the kernel may reclaim at any time."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def peak_of_loading(folder: str, warm: str) -> int:
    """Return the peak memory of loading an LLM beyond what was in use before; run it in a separate process."""
    as_llm(Path(warm))(["libraries allocate what they need once"])
    before = anonymous_bytes()
    peak, stop = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    text = build_text(TextOptions(text_model="none", llm_model=folder, llm_dtype="bf16"))
    stop.set()
    watcher.join()
    assert text.widths == [512]
    return max(peak, anonymous_bytes()) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("stored", "least", "most"), [(torch.bfloat16, 0.0, 0.5), (torch.float32, 0.9, 1.5)])
def test_weights_are_in_memory_once(stored: torch.dtype, least: float, most: float, tmp_path: Path) -> None:
    # As stored they stay in the mapped file; converted they are copied once, tensor by tensor.
    folder = make_llm("Llama", tmp_path, hidden_size=512, intermediate_size=4096, num_hidden_layers=6)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored)
    model.save_pretrained(folder)
    size = sum(p.numel() * 2 for p in model.model.parameters())
    warm = make_llm("Llama", tmp_path / "warm")
    # In this process memory that earlier tests gave back would be taken again, unseen.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_of_loading, (str(folder), str(warm)))
    assert least * size <= peak <= most * size
