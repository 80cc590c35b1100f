"""The byte encoder and its word prefixes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from titans_video.models.byte_encoder import BASE, PRIME, SPACE, ByteEncoder, prefix_hashes
from titans_video.types import END_OF_TEXT


def plain_hashes(ids: list[int]) -> list[int]:
    """Hash one byte after the other, with Python's unbounded integers."""
    out, total, power = [], 0, 1
    for i in ids:
        if i in (SPACE, END_OF_TEXT):
            out.append(i % PRIME)
            total, power = 0, 1
        else:
            total = (total + i * power) % PRIME
            power = power * BASE % PRIME
            out.append(total)
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 257), st.just(SPACE)), min_size=1, max_size=300))
def test_hashes_equal_the_plain_loop(ids: list[int]) -> None:
    assert prefix_hashes(torch.tensor([ids]))[0].tolist() == plain_hashes(ids)


def encode(text: str) -> torch.Tensor:
    return torch.tensor([[byte + 1 for byte in text.encode()] + [END_OF_TEXT]])


def test_the_hash_of_a_word_does_not_depend_on_its_position() -> None:
    a, b = prefix_hashes(encode("red"))[0], prefix_hashes(encode("a blue red"))[0]
    assert a[:3].tolist() == b[7:10].tolist()
    assert a[-1] == b[-1]
    assert prefix_hashes(encode("circle circles"))[0, 5] == prefix_hashes(encode("circle circles"))[0, 12]
    assert len(set(prefix_hashes(encode("der red"))[0].tolist())) == 8  # the same letters in another order


def encoder() -> ByteEncoder:
    net = ByteEncoder(24, 2, 2, 128)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    return net


def test_padding_never_matters_and_order_does() -> None:
    net, ids = encoder(), encode("red blue")
    length = ids.shape[1]
    alone = net(ids, torch.ones_like(ids, dtype=torch.bool))
    padded = torch.cat((ids, torch.full((1, 4), 50)), 1)
    mask = torch.arange(length + 4)[None] < length
    assert_close(net(padded, mask)[:, :length], alone, atol=1e-5, rtol=1e-5)
    swapped = encode("blue red")
    difference = net(swapped, torch.ones_like(swapped, dtype=torch.bool)).mean(1) - alone.mean(1)
    assert difference.abs().max() > 1e-3
