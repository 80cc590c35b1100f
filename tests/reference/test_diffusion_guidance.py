"""Guidance against two separate forwards."""

import pytest
import torch

from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.diffusion.samplers import euler, guided, join_text
from titans_video.errors import ConfigError
from titans_video.types import Condition, ImageCondition, TextCondition


def text(rows: int, length: int, seed: int) -> TextCondition:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 259, (rows, length), generator=generator)
    states = torch.randn(rows, length + 1, 3, generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    return TextCondition((ids, states), (mask, torch.ones(rows, length + 1, dtype=torch.bool)))


class Network:
    """A value that depends on everything it is given, and blind to padding; counts its rows."""

    def __init__(self, process: RectifiedFlow | None = None) -> None:
        self.rows: list[int] = []
        self.process = process

    def value(self, x, time, condition):
        ids, states = condition.text.streams
        a = (ids * condition.text.masks[0]).sum(1).float() / 100
        b = (states * condition.text.masks[1][..., None]).sum((1, 2))
        y = torch.tanh(x * time + (a + b).view(-1, 1, 1, 1, 1))
        if condition.cond_latents is None:
            return y
        return y + condition.cond_latents * condition.cond_mask.float().mean((1, 2)).view(-1, 1, 1, 1, 1)

    def __call__(self, x, time, condition):
        self.rows.append(x.shape[0])
        value = self.value(x, time, condition)
        return value if self.process is None else self.process.to_x0(value, x, torch.full((x.shape[0],), time))


def setting(known: bool = True):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 3, 2, 2, 2, generator=generator)
    frames = torch.randn(2, 3, 2, 2, 2, generator=generator) if known else None
    mask = torch.tensor([[[True, False]], [[False, False]]]) if known else None
    return x, Condition(text(2, 5, 1), frames, mask), text(2, 3, 2)


def test_one_batched_forward_equals_two():
    x, condition, negative = setting()
    network = Network()
    denoise = guided(network, condition, negative, scale=3.0)
    made = denoise(x, 0.5)
    assert network.rows == [4]
    yes = network(x, 0.5, condition)
    no = network(x, 0.5, Condition(negative, condition.cond_latents, condition.cond_mask))
    torch.testing.assert_close(made, no + 3.0 * (yes - no))


def test_scale_one_is_no_guidance_bitwise():
    x, condition, negative = setting()
    network = Network()
    denoise = guided(network, condition, negative, scale=1.0, interval=(0.2, 0.9))
    assert torch.equal(denoise(x, 0.5), network(x, 0.5, condition))
    assert network.rows == [2, 2]
    assert torch.equal(guided(network, condition)(x, 0.1), network(x, 0.1, condition))


def test_outside_the_interval_nothing_is_guided():
    x, condition, negative = setting(known=False)
    network = Network()
    denoise = guided(network, condition, negative, scale=4.0, interval=(0.7, 0.9))
    euler(denoise, x, torch.tensor([1.0, 0.8, 0.7, 0.4, 0.0], dtype=torch.float64))
    assert network.rows == [2, 4, 4, 2]
    assert torch.equal(denoise(x, 0.5), network(x, 0.5, condition))


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_guiding_x0_equals_guiding_the_value(prediction):
    x, condition, negative = setting()
    process = RectifiedFlow(prediction, variance=(0.5, 1.0, 2.0) if prediction == "x0" else None)
    raw = Network()
    value = guided(raw, condition, negative, scale=2.5)(x, 0.6)
    x0 = guided(Network(process), condition, negative, scale=2.5)(x, 0.6)
    torch.testing.assert_close(x0, process.to_x0(value, x, torch.full((2,), 0.6)), rtol=1e-5, atol=1e-5)


def test_joined_text_keeps_rows_and_masks():
    a, b = text(2, 5, 1), text(1, 3, 2)
    joined = join_text(a, b)
    assert len(joined) == 3
    for stream, mask, s_a, s_b in zip(joined.streams, joined.masks, a.streams, b.streams, strict=True):
        assert mask.dtype == torch.bool
        assert stream.dtype == s_a.dtype
        assert torch.equal(stream[:2], s_a)
        assert torch.equal(stream[2][mask[2]], s_b[0])
        assert mask.sum(1).tolist() == [s_a.shape[1]] * 2 + [s_b.shape[1]]
        assert (stream[~mask] == 0).all()


def test_guidance_without_text_is_refused():
    _, condition, negative = setting()
    for c, n in ((Condition(), negative), (condition, None)):
        with pytest.raises(ConfigError, match="needs a text condition"):
            guided(Network(), c, n, scale=2.0)


def test_picture_and_text_guide_by_the_sum_of_their_own_differences():
    """Against the formula, from separate calls; and fewer calls where there is nothing to tell apart."""
    text = TextCondition((torch.tensor([[1, 2, 3]]),), (torch.ones(1, 3, dtype=torch.bool),))
    empty = TextCondition((torch.tensor([[9]]),), (torch.ones(1, 1, dtype=torch.bool),))
    picture = ImageCondition(torch.randn(1, 1, 4), torch.randn(1, 2, 3, 3), torch.randn(1, 3))
    rows = []

    def predict(x, time, condition):
        rows.append(x.shape[0])
        told = (condition.text.streams[0] * condition.text.masks[0]).sum(1).float() if condition.text else 0
        said = told + condition.image.embedding.sum((1, 2)) * condition.image.latents.sum((1, 2, 3))
        return x * time + torch.as_tensor(said).view(-1, 1, 1, 1, 1)

    x, scale = torch.randn(1, 2, 5, 3, 3), torch.linspace(1, 3, 5)
    by = [(picture.without(), empty), (picture, empty), (picture, text)]
    none, with_picture, both = (predict(x, 0.5, Condition(text=t, image=p)) for p, t in by)
    rows.clear()
    p = scale.view(1, 1, 5, 1, 1)
    expected = none + p * (with_picture - none) + 4.0 * (both - with_picture)
    denoise = guided(predict, Condition(text=text, image=picture), empty, 4.0, image_scale=scale)
    torch.testing.assert_close(denoise(x, 0.5), expected)
    same = guided(predict, Condition(text=empty, image=picture), empty, 4.0, image_scale=scale)
    torch.testing.assert_close(same(x, 0.5), none + p * (with_picture - none))
    plain = guided(predict, Condition(image=picture), None, 1.0, image_scale=scale)(x, 0.5)
    torch.testing.assert_close(plain, none - 9 + p * (with_picture - none))
    outside = guided(predict, Condition(text=text, image=picture), empty, 4.0, (0.7, 1.0), image_scale=scale)
    torch.testing.assert_close(outside(x, 0.5), both)
    unguided = guided(predict, Condition(text=text, image=picture), empty, 1.0, image_scale=torch.ones(5))
    torch.testing.assert_close(unguided(x, 0.5), both)
    assert rows == [3, 2, 2, 1, 1]
