"""Byte ids, caption dropout, and how the built-in encoder is described and restored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_video.config.generation import Overrides
from titans_video.config.options import TextOptions
from titans_video.diffusion.samplers import join_text
from titans_video.errors import CheckpointError, TextError
from titans_video.text.base import ByteStream, TextEncoder, build_text, drop_captions, text_from_checkpoint
from titans_video.types import BYTE_VOCABULARY, END_OF_TEXT, TextCondition


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_ids_are_bytes_and_an_end(prompts: list[str]) -> None:
    ids, mask = ByteStream(256).encode(prompts)
    assert ids.dtype == torch.int64
    assert int(ids.max()) < BYTE_VOCABULARY
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
        tokens = row[real].tolist()
        assert tokens[-1] == END_OF_TEXT
        assert bytes(t - 1 for t in tokens[:-1]).decode() == prompt
        assert not row[~real].any()


def test_an_empty_prompt_is_one_token_and_long_ones_are_cut() -> None:
    ids, mask = ByteStream(4).encode(["", "abcdef"])
    assert ids.tolist() == [[END_OF_TEXT, 0, 0, 0], [98, 99, 100, END_OF_TEXT]]
    assert mask.sum(1).tolist() == [1, 4]


@given(st.text(max_size=20), st.integers(min_value=1, max_value=20))
def test_a_prompt_is_never_cut_inside_a_character(prompt: str, longest: int) -> None:
    ids, mask = ByteStream(longest).encode([prompt])
    kept = bytes(t - 1 for t in ids[0][mask[0]].tolist()[:-1]).decode()  # would raise on half a character
    assert prompt.startswith(kept)
    rest = prompt[len(kept) :]
    assert not rest or len((kept + rest[0]).encode()) > longest - 1


@pytest.mark.parametrize("caption", ["a" * 1000, "猫" * 1000, "Ein Kätzchen läuft. " * 50, "\U0001f408" * 700])
def test_a_caption_of_a_thousand_characters_fits_by_default(caption: str) -> None:
    text = build_text(TextOptions())
    ids, mask = text([caption]).streams[0][0], text([caption]).masks[0][0]
    assert bytes(t - 1 for t in ids[mask].tolist()[:-1]).decode() == caption
    assert text.cut_note([caption]) is None


def test_captions_that_are_cut_are_counted() -> None:
    text = build_text(TextOptions(text_max_length=9))
    assert text.cut_note(["12345678", "猫猫", ""]) is None
    assert text.cut_note(["123456789", "猫猫猫", "猫猫猫", "short"]) == (
        "Warning: 2 of 3 different captions are longer than 8 bytes (--text-max-length); the rest of each is ignored. "
        "The longest has 9: '123456789'..."
    )
    assert build_text(TextOptions(text_model="none"), needed=False).cut_note(["a" * 9999]) is None


def test_description_restores_the_encoder() -> None:
    text = build_text(TextOptions(text_max_length=8))
    stored = text.describe()
    assert stored["widths"] == [0]
    assert stored["fingerprints"] == [None]
    again = text_from_checkpoint(stored, Overrides())
    assert torch.equal(again(["a long prompt"]).streams[0], text(["a long prompt"]).streams[0])
    assert len(text.empty(3)) == 3


def test_builtin_and_frozen_do_not_take_each_others_place() -> None:
    stored = build_text(TextOptions()).describe()
    with pytest.raises(CheckpointError, match="trained with 'builtin'"):
        text_from_checkpoint(stored, Overrides(text_model="google/umt5-xxl"))
    with pytest.raises(CheckpointError, match="trained without an LLM"):
        text_from_checkpoint(stored, Overrides(llm_model="somewhere"))
    with pytest.raises(TextError, match="leaves no text encoder"):
        build_text(TextOptions(text_model="none"))


def test_dropped_captions_become_the_empty_prompt() -> None:
    text = build_text(TextOptions())
    prompts = ["ab", "cdef", "g"]
    dropped = drop_captions(text(prompts), text.empty(1), torch.tensor([False, True, False]))
    expected = text(["ab", "", "g"])
    length = expected.streams[0].shape[1]
    assert torch.equal(dropped.streams[0][:, :length], expected.streams[0])
    assert torch.equal(dropped.masks[0][:, :length], expected.masks[0])
    assert not dropped.masks[0][:, length:].any()


def test_streams_drop_separately_and_a_longer_empty_prompt_fits() -> None:
    states = TextCondition(
        (torch.ones(2, 1, 3), torch.ones(2, 2, 5)), (torch.ones(2, 1).bool(), torch.ones(2, 2).bool())
    )
    empty = TextCondition(
        (torch.zeros(1, 4, 3), torch.zeros(1, 1, 5)), (torch.ones(1, 4).bool(), torch.ones(1, 1).bool())
    )
    dropped = drop_captions(states, empty, torch.tensor([[True, False], [False, True]]))
    assert dropped.masks[0].tolist() == [[True] * 4, [True, False, False, False]]
    assert dropped.masks[1].tolist() == [[True, True], [True, False]]
    assert dropped.streams[0].sum((1, 2)).tolist() == [0, 3]
    assert dropped.streams[1].sum((1, 2)).tolist() == [10, 0]


def test_the_host_knows_the_lengths_without_asking_the_device() -> None:
    text = TextEncoder([ByteStream(9)], TextOptions())(["abc", "a", ""])
    assert text.lengths == ((4, 2, 1),)
    assert text.unpadded() is None
    empty = TextEncoder([ByteStream(9)], TextOptions()).empty(1)
    assert drop_captions(text, empty, torch.tensor([True, False, False])).lengths == ((1, 2, 1),)
    assert drop_captions(text, empty, torch.tensor([True, True, True])).unpadded().streams[0].shape == (3, 1)
    assert text.without(torch.tensor([True, False, False])).lengths == ((0, 2, 1),)
    assert join_text(text, empty).lengths == ((4, 2, 1, 1),)
    gap = torch.tensor([[True, False, True]])
    assert TextCondition((torch.ones(1, 3, 2),), (gap,)).to("cpu").lengths is None
