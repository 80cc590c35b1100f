"""The cache of encodings: correct or missing records, no partial files, and training from it."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.unit.data_sets import FRAMES, PATCH, PLAIN, make_set, write_clip
from tests.unit.disks import full_disk
from titans_video.codecs.base import IdentityCodec
from titans_video.codecs.external import load_external
from titans_video.config.options import CodecOptions, DataOptions, TextOptions
from titans_video.data import cache as store_module
from titans_video.data.batches import cond_pixels, scaled
from titans_video.data.cache import EncodingCache, verify
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.precompute import Encoders, Filled, fill_cache
from titans_video.data.reader import RowReader
from titans_video.errors import DataError
from titans_video.recipes.codec import codec_key
from titans_video.text.base import TextEncoder, build_text, text_keys
from titans_video.types import TextCondition


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


class Codec:
    """Mean and a constant log-variance."""

    calls = 0

    def encode_moments(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([pixels, torch.full_like(pixels, -1.0)], dim=1)

    def encode_cond_frames(self, pixels: Tensor) -> Tensor:
        return self.encode_moments(pixels)


def text(prompts: Sequence[str]) -> TextCondition:
    """Encode two streams: the code of each letter as a token, and half as many tokens in bf16."""
    longest = max(map(len, prompts)) + 1
    mask = torch.stack([torch.arange(longest) <= len(p) for p in prompts])
    codes = torch.tensor([[float(ord(c)) for c in p] + [0.0] * (longest - len(p)) for p in prompts])[..., None]
    return TextCondition((codes * mask[..., None], codes[:, ::2].bfloat16()), (mask, mask[:, ::2]))


def encoders(codec: Codec | None = None, codec_key: str = "codec-a") -> Encoders:
    found = codec or Codec()
    return Encoders(codec_key, lambda: found, ("t5", "llm"), text)


def refuse_to_load() -> Any:
    raise AssertionError("a full cache needs no codec and no text encoder")


def opened(manifest: Path, **options: Any) -> VideoDataset:
    given = {"height": 16, "width": 16, "num_frames": FRAMES, "batch_size": 3, **options}
    return open_data(DataOptions(manifest=(str(manifest),), **given), PLAIN, PATCH, seed=0)


TASKS = {"row1": {"task": "i2v"}, "row2": {"task": "i2v", "cond_image": "white.png"}, "row3": {"task": "v2v"}}


def test_cached_batches_equal_encoded_ones_and_nothing_is_loaded(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=5, wide=0, **TASKS))
    codec = Codec()
    filled = fill_cache(data, tmp_path / "cache", encoders(codec), progress=False)
    assert filled.made == 5 + 3 + 2 * 6  # clips, what three rows are conditioned on, six prompts in two streams
    assert codec.calls == 8
    again = fill_cache(data, tmp_path / "cache", Encoders("codec-a", refuse_to_load, ("t5", "llm"), refuse_to_load))
    assert (again.made, again.found) == (0, filled.made)
    assert verify(tmp_path / "cache") == (filled.made, [])
    cached, plain = again.data.stream(cache=again.cache), data.stream()
    for _ in range(6):
        a, b = next(cached), next(plain)
        assert (a.ids, a.seeds, a.tasks) == (b.ids, b.seeds, b.tasks)
        assert a.pixels is None
        torch.testing.assert_close(a.moments, Codec().encode_moments(scaled(b.pixels)))
        if "row3" not in a.ids:  # its share of known frames belongs to the variant, not to the occurrence
            assert torch.equal(a.num_cond_frames, b.num_cond_frames)
        for i, known in enumerate(a.num_cond_frames.tolist()):
            if known and a.ids[i] != "row3":
                torch.testing.assert_close(a.cond_moments[i, :3], cond_pixels(b)[i])
            if known:
                assert not a.cond_moments[i, :3, known:].any()
        expected = text(a.captions)
        for stream, mask, right, right_mask in zip(
            a.text.streams, a.text.masks, expected.streams, expected.masks, strict=True
        ):
            assert torch.equal(mask, right_mask)
            assert torch.equal(stream[mask], right[right_mask])
            assert stream.dtype == right.dtype
    assert [m.tolist() for m in again.cache.text([""]).masks] == [[[True]], [[True]]]


def test_each_field_of_the_key_misses_exactly_the_rows_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_set(tmp_path / "set", rows=4, wide=0, row1={"task": "i2v", "cond_image": "white.png"})
    folder = tmp_path / "cache"

    def made(data: VideoDataset | None = None, key: str = "codec-a", text_keys: tuple[str, ...] = ("t5", "llm")) -> int:
        given = replace(encoders(codec_key=key), text_keys=text_keys)
        return fill_cache(data or opened(manifest), folder, given, progress=False).made

    assert made() == 4 + 1 + 2 * 5
    assert made() == 0
    assert made(key="codec-b") == 5  # only the clips
    assert made(text_keys=("t5", "llm-b")) == 5  # only one stream
    assert made(opened(manifest, height=12)) == 5
    assert made(opened(manifest, fps=4)) == 5  # three of six frames, with others' times
    assert made(opened(manifest, num_frames=4)) == 5
    assert made(opened(manifest, stride=2)) == 0  # the frames of --fps 4, the rate is no part of pixels
    write_clip(tmp_path / "set" / "3.mp4", 9)
    assert made() == 1
    (tmp_path / "set" / "white.png").write_bytes((tmp_path / "set" / "white.png").read_bytes() + b" ")
    assert made() == 1  # what row 1 is conditioned on
    manifest.write_text(manifest.read_text().replace("grey 2", "gray 2"))
    assert made() == 2
    (tmp_path / "set" / "0.mp4").rename(tmp_path / "set" / "zero.mp4")
    manifest.write_text(manifest.read_text().replace("0.mp4", "zero.mp4"))
    assert made() == 0  # the content counts, not the name
    manifest.write_text(manifest.read_text().replace('"id": "row2"', '"id": "row2", "task": "v2v", "cond_frames": 3'))
    assert made() == 1  # what row 2 is now conditioned on
    manifest.write_text(manifest.read_text().replace('"cond_frames": 3', '"cond_frames": 4'))
    assert made() == 1
    assert made(opened(manifest, random_crop=True, width=12)) == 6  # crops of their own, and for rows 1 and 2 both
    monkeypatch.setattr(store_module, "PLAN_VERSION", 99)
    assert made() == 6  # no text
    monkeypatch.setattr(store_module, "CACHE_VERSION", 99)
    assert made() == 16


def test_variants_of_random_crops_and_starts(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "set", rows=2, wide=0)
    data = opened(
        manifest, num_frames=2, random_start=True, cache_variants=3, batch_size=1, height=12, random_crop=True
    )
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    assert len(list((tmp_path / "cache" / "clips").rglob("*.safetensors"))) == 6
    stream = filled.data.stream(cache=filled.cache)
    seen = {(b.ids[0], round(float(b.moments.sum()), 3)) for b in (next(stream) for _ in range(40))}
    assert 4 <= len(seen) <= 6


def test_task_mix_is_cached_for_every_task(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=3, wide=0), task_mix="t2v=0.2,i2v=0.4,v2v=0.4", batch_size=1)
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    stream = filled.data.stream(cache=filled.cache)
    batches = [next(stream) for _ in range(40)]
    assert {b.tasks[0] for b in batches} == {"t2v", "i2v", "v2v"}
    assert not stream.bad_rows.records
    assert all((b.cond_moments is None) == (b.tasks == ["t2v"]) for b in batches)


def test_ranks_share_the_work(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=5, wide=0))
    parts = [
        fill_cache(replace(data, rank=r, world=2), tmp_path / "cache", encoders(), progress=False) for r in range(2)
    ]
    assert [p.found for p in parts] == [0, 0]
    assert sum(p.made for p in parts) == 5 + 2 * 6


class Slow(Codec):
    def encode_moments(self, pixels: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().encode_moments(pixels)


def _fill_slowly(data: VideoDataset, folder: Path) -> None:
    fill_cache(data, folder, encoders(Slow()), progress=False)


def test_two_at_once_and_kills_leave_no_unreadable_file(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=8, wide=0, **TASKS))
    folder = tmp_path / "cache"
    fill_cache(data, tmp_path / "other", encoders(), progress=False)  # digests are remembered from here on
    context = multiprocessing.get_context("fork")
    for wait in (0.02, 0.05, 0.1, 0.2):
        pair = [context.Process(target=_fill_slowly, args=(data, folder)) for _ in range(2)]
        for process in pair:
            process.start()
        time.sleep(wait)
        for process in pair:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if any(folder.glob("*/*/*.safetensors")):
            assert verify(folder)[1] == []
    pair = [context.Process(target=_fill_slowly, args=(data, folder)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
        assert process.exitcode == 0
    assert verify(folder) == (8 + 3 + 2 * 9, [])


def test_verify_and_training_find_damage(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=4, wide=0), batch_size=1, max_bad=0.9)
    folder = tmp_path / "cache"
    filled = fill_cache(data, folder, encoders(), progress=False)
    paths = sorted((folder / "clips").rglob("*.safetensors"))
    cut = paths[0].read_bytes()
    paths[0].write_bytes(cut[: len(cut) // 2])
    changed = bytearray(paths[1].read_bytes())
    changed[-3] ^= 1
    paths[1].write_bytes(bytes(changed))
    paths[2].rename(paths[2].with_name("0" * 40 + ".safetensors"))
    sound, wrong = verify(folder)
    assert (sound, len(wrong)) == (1 + 2 * 5, 3)
    assert "unreadable" in "".join(wrong)
    assert "checksum" in "".join(wrong)
    assert "name" in "".join(wrong)
    cache = unchecked(filled)
    stream = filled.data.stream(cache=cache)
    for _ in range(8):
        next(stream)
    assert {b.reason for b in stream.bad_rows.records.values()} == {"not-in-cache"}
    assert len(stream.bad_rows.records) == 3
    with pytest.raises(DataError, match="no such cache"):
        verify(tmp_path / "nothing")
    with pytest.raises(DataError, match="'a prompt' is not in the cache"):
        cache.text(["a prompt"])


def unchecked(filled: Filled, **options: Any) -> EncodingCache:
    """Return the cache as a later run without encoders opens it."""
    given = {"spec": filled.data.table.spec, "widths": (1, 1), **options}
    return EncodingCache(filled.cache.folder, filled.cache.codec, filled.cache.texts, **given)


def rewrite(path: Path, change: Callable[[Tensor], Tensor], notes: bool = True) -> None:
    """Change the tensor of a file; its header stays as it was, or is lost."""
    with safe_open(path, framework="pt") as f:
        tensor, header = f.get_tensor("data").clone(), f.metadata()
    save_file({"data": change(tensor).contiguous()}, path, header if notes else {"format": "pt"})


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "other values": lambda x: x + 5,
    "bytes": lambda x: x.contiguous().view(torch.int8),
    "type": lambda x: x.to(torch.float64),
    "turned": lambda x: x.transpose(0, 1),
    "longer": lambda x: torch.cat([x, x]),
    "empty": lambda x: x[:0],
    "nan": lambda x: torch.full_like(x, torch.nan),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["clips", "known", "text"])
def test_damaged_files_are_made_again(tmp_path: Path, kind: str, workers: int) -> None:
    """Every damage, in another file each time; the batches are bitwise those of the sound cache."""
    rows = {f"row{i}": {"task": "v2v", "cond_frames": 2} for i in range(7)}
    data = opened(make_set(tmp_path / "set", rows=7, wide=0, **rows), num_workers=workers)
    fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)  # as a later run opens it
    sound = filled.data.stream(cache=unchecked(filled))
    expected = [next(sound) for _ in range(6)]
    for path, damage in zip(sorted((tmp_path / "cache" / kind).rglob("*.safetensors")), DAMAGES.values(), strict=False):
        rewrite(path, damage)
    stream = filled.data.stream(cache=filled.cache)
    for batch, right in zip([next(stream) for _ in range(6)], expected, strict=True):
        assert (batch.ids, batch.seeds) == (right.ids, right.seeds)
        assert torch.equal(batch.moments, right.moments)
        assert torch.equal(batch.cond_moments, right.cond_moments)
        assert all(torch.equal(a, b) for a, b in zip(batch.text.streams, right.text.streams, strict=True))
    assert not stream.bad_rows.records
    damaged = [path.split(":")[0] for path in verify(tmp_path / "cache")[1]]
    assert all(kind in path for path in damaged)
    assert len(damaged) <= (1 if kind == "text" else 0)  # the states of the empty prompt, which no batch has asked for


@pytest.mark.parametrize("kind", ["clips", "text"])
@pytest.mark.parametrize("notes", [True, False])
def test_damaged_files_count_as_missing_without_encoders(tmp_path: Path, kind: str, notes: bool) -> None:
    """Without notes in the header, as in the oldest caches, types and shapes are still checked."""
    data = opened(make_set(tmp_path / "set", rows=9, wide=0), batch_size=1, max_bad=0.9)
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    cache = unchecked(filled)
    reader = replace(data.reader(), cached=True)
    damages = {name: change for name, change in DAMAGES.items() if notes or name not in ("other values", "turned")}
    if not notes:
        damages.pop("longer" if kind == "text" else "nan")
        damages.pop("type" if kind == "text" else "empty")
    for record, damage in zip(filled.data.records, damages.values(), strict=False):
        sample = reader.decide(record, "t2v", 0)
        fields = cache.clip_fields(sample) if kind == "clips" else cache.text_fields(record.row.caption, 0)
        rewrite(cache.path(fields), damage, notes)
    for record in filled.data.records[len(damages) :]:
        rewrite(cache.path(cache.clip_fields(reader.decide(record, "t2v", 0))), lambda x: x, notes)
    stream = filled.data.stream(cache=cache, folder=tmp_path / "run")
    seen = {next(stream).ids[0] for _ in range(27)}
    lost = {f"row{i}" for i in range(len(damages))}
    assert set(stream.bad_rows.records) == lost
    assert {b.reason for b in stream.bad_rows.records.values()} == {"not-in-cache"}
    assert seen == {f"row{i}" for i in range(9)} - lost
    again = filled.data.stream(cache=unchecked(filled), folder=tmp_path / "run")
    again.load_state_dict({"step": 27, "rows": {}})
    assert [next(again).ids for _ in range(9)] == [next(stream).ids for _ in range(9)]


class Overflowing(Codec):
    """Gives infinity for a bright pixel, as a VAE in fp16 does; `known` only for conditioning frames."""

    def __init__(self, known: bool = False) -> None:
        self.known = known

    def encode_moments(self, pixels: Tensor) -> Tensor:
        moments = super().encode_moments(pixels)
        return moments if self.known else moments.masked_fill(pixels.mean() > 0.1, torch.inf)

    def encode_cond_frames(self, pixels: Tensor) -> Tensor:
        return super().encode_moments(pixels).masked_fill(pixels.amax() > 0.1, torch.nan)


@pytest.mark.parametrize("known", [True, False])
def test_rows_whose_latents_are_not_finite_are_left_out_with_the_remedy(tmp_path: Path, known: bool) -> None:
    rows = {f"row{i}": {"task": "i2v"} for i in range(9)}
    data = opened(make_set(tmp_path / "set", rows=9, wide=0, **rows), batch_size=1)
    filled = fill_cache(data, tmp_path / "cache", encoders(Overflowing(known)), progress=False)
    assert {(q.row.id, q.reason) for q in filled.bad_rows} == {("row7", "not-finite"), ("row8", "not-finite")}
    assert all("--vae-dtype bf16" in q.detail and "mp4" in q.detail for q in filled.bad_rows)
    assert "2 not-finite" in filled.summary()
    assert "--vae-dtype bf16" in filled.summary()
    assert verify(tmp_path / "cache")[1] == []
    assert set(filled.data.records.ids()) == {f"row{i}" for i in range(7)}
    with pytest.raises(DataError, match=r"2 of 9 rows .* --max-bad 0.1 .* --vae-dtype bf16"):
        fill_cache(opened_again(data, 0.1), tmp_path / "cache", encoders(Overflowing(known)), progress=False)


def opened_again(data: VideoDataset, max_bad: float) -> VideoDataset:
    return replace(data, options=replace(data.options, max_bad=max_bad))


@pytest.mark.parametrize("prompt", ["grey 2", "", "asked for"])
def test_prompts_whose_states_are_not_finite(tmp_path: Path, prompt: str) -> None:
    def overflowing(prompts: Sequence[str]) -> TextCondition:
        found = text(prompts)
        return found if prompts != [prompt] else replace(found, streams=(found.streams[0], found.streams[1] / 0))

    data = opened(make_set(tmp_path / "set", rows=4, wide=0))
    given = replace(encoders(), text=overflowing)
    if prompt != "grey 2":
        with pytest.raises(DataError, match=r"not finite.*--text-dtype bf16"):
            fill_cache(data, tmp_path / "cache", given, prompts=["asked for"], progress=False)
        return
    filled = fill_cache(data, tmp_path / "cache", given, prompts=["asked for"], progress=False)
    assert [(q.row.id, q.reason) for q in filled.bad_rows] == [("row2", "not-finite")]
    assert "--text-dtype bf16" in filled.bad_rows[0].detail
    assert verify(tmp_path / "cache")[1] == []


def test_an_encoding_of_an_earlier_version_that_is_not_finite_is_left_out_in_training(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=8, wide=0), batch_size=1)
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    reader = replace(data.reader(), cached=True)
    fields = filled.cache.clip_fields(reader.decide(filled.data.records[7], "t2v", 0))
    filled.cache.write(fields, torch.full((6, FRAMES, 16, 16), torch.nan))  # earlier versions stored them
    filled = fill_cache(data, tmp_path / "cache", encoders(Overflowing()), progress=False)
    assert not filled.bad_rows
    stream = filled.data.stream(cache=filled.cache)
    assert "row7" not in {next(stream).ids[0] for _ in range(16)}
    assert {(b.id, b.reason) for b in stream.bad_rows.records.values()} == {("row7", "not-finite")}


@pytest.mark.parametrize("size", [0, 600])
def test_a_cache_on_a_full_disk(tmp_path: Path, size: int) -> None:
    data = opened(make_set(tmp_path / "set", rows=2, wide=0))
    with (
        full_disk(size),
        pytest.raises(DataError, match=r"cache .*cache cannot be filled: .*safetensors cannot be wri"),
    ):
        fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert fill_cache(data, tmp_path / "cache", encoders(), progress=False).made


def test_a_row_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=4, wide=0))
    (tmp_path / "set" / "2.mp4").write_bytes(b"gone")
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    assert [(q.row.id, q.reason) for q in filled.bad_rows] == [("row2", "changed")]
    assert "1 row left out, unreadable or not encodable: 1 changed" in filled.summary()
    assert [q.row.id for q in filled.data.quarantined] == ["row2"]
    (tmp_path / "set" / "3.mp4").unlink()
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    assert [(q.row.id, q.reason) for q in filled.bad_rows] == [("row3", "missing"), ("row2", "changed")]
    (tmp_path / "set" / "1.mp4").unlink()
    with pytest.raises(DataError, match=r"3 of 4 rows could not be read .* --max-bad 0\.5"):
        fill_cache(data, tmp_path / "cache", encoders(), progress=False)


def test_files_say_what_they_were_made_from(tmp_path: Path) -> None:
    data = opened(make_set(tmp_path / "set", rows=1, wide=0))
    filled = fill_cache(data, tmp_path / "cache", encoders(), progress=False)
    reader = RowReader(data.options, data.table, data.mix, cached=True)
    sample = reader.sample(filled.data.records[0], 5)
    fields = filled.cache.clip_fields(sample)
    assert json.loads(json.dumps(fields)) == fields
    assert (fields["codec"], fields["size"], len(fields["file"])) == ("codec-a", [16, 16], 64)
    assert EncodingCache(tmp_path / "cache", "codec-a").path(fields).exists()


def test_keys_of_real_encoders() -> None:
    codec, options = IdentityCodec(), CodecOptions()
    assert codec_key(codec, options) == codec_key(IdentityCodec(), options)
    assert codec_key(codec, options) != codec_key(codec, CodecOptions(vae_dtype="bf16"))
    mine = [CodecOptions("external", vae_module="m", vae_class="C", vae_init_json=x) for x in ("{}", '{"gain": 2}')]
    assert codec_key(codec, mine[0]) != codec_key(codec, mine[1])
    assert text_keys(build_text(TextOptions())) == ()  # the network reads bytes itself
    frozen = TextEncoder([Frozen(), Frozen()], TextOptions(text_model="t5", llm_model="llm"))
    other = TextEncoder([Frozen(), Frozen()], TextOptions(text_model="t5", llm_model="llm", llm_layer=-2))
    first, second = text_keys(frozen), text_keys(other)
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)
    assert len(text_keys(TextEncoder([Frozen()], TextOptions(text_model="none", llm_model="llm")))) == 1


def test_the_code_of_an_external_codec_is_a_part_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "codec_of_ones_own.py"
    file.write_text(
        "class Own:\n"
        "    spec = {'channels': 3, 'stride': [1, 1, 1]}\n"
        "    def encode(self, pixels): return pixels\n"
        "    def decode(self, latents): return latents\n"
    )
    options = CodecOptions("external", vae_module=file.stem, vae_class="Own")
    codec = load_external(file.stem, "Own", {})
    before = codec_key(codec, options)
    assert codec_key(codec, options) == before
    file.write_text(file.read_text().replace("return pixels", "return pixels / 2"))
    assert codec_key(codec, options) != before


class Frozen:
    """A stream with weights."""

    width = 4

    def fingerprint(self) -> str:
        return "abc"

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise AssertionError("keys need no encoding")

    def to(self, device: torch.device | str) -> None: ...

    def release(self) -> None: ...
