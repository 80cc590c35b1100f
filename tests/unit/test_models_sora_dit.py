"""SoraDiT as a whole: what it must ignore, what it must use, what it returns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from titans_video.errors import CheckpointError, ConfigError
from titans_video.models.layers import patchify, unpatchify
from titans_video.models.registry import build_network, network_config
from titans_video.models.sora_dit import SoraDiT
from titans_video.types import Condition, TextCondition

B, C, S, WIDTH = 2, 3, 4, 20


def network(**changes: Any) -> SoraDiT:
    """Build a tiny network with random weights everywhere, so that no zero hides an input."""
    arguments: dict[str, Any] = {
        "in_channels": C,
        "time_stride": S,
        "patch_size": (1, 2, 2),
        "model_dim": 24,
        "depth": 2,
        "heads": 2,
        "text_layers": 1,
        "text_buckets": 64,
    }
    net = SoraDiT(**(arguments | changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return net


def prompt(ids: list[list[int]]) -> TextCondition:
    stream = torch.tensor(ids)
    return TextCondition((stream,), (stream != 0,))


BYTES = prompt([[115, 102, 101, 33, 99, 257], [99, 33, 257, 0, 0, 0]])
LATENTS = (B, C, 4, 4, 6)


def states(length: int = 5, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    mask = torch.arange(length)[None] < torch.tensor([[length], [2]])
    return torch.randn(B, length, width), mask


@pytest.mark.parametrize("attention_type", ["st", "full"])
@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_value_has_the_latents_shape_and_starts_at_zero(attention_type: str, patch: tuple[int, int, int]) -> None:
    net = SoraDiT(C, S, patch, 24, 1, 2, attention_type=attention_type, text_layers=1, text_buckets=8)
    x = torch.randn(LATENTS)
    memory = object()
    prediction = net(x, torch.rand(B), Condition(BYTES), memory)
    assert torch.equal(prediction.value, torch.zeros(LATENTS))
    assert prediction.memory is memory
    assert network(patch_size=patch, attention_type=attention_type)(x, torch.rand(B), Condition(BYTES)).value.any()


def test_sine_positions_distinguish_the_tokens_of_a_frame() -> None:
    x = torch.ones(LATENTS)  # constant, so tokens differ only by their position
    times = torch.full((B,), 0.5)
    without = network()(x, times, Condition(BYTES)).value.unflatten(-1, (3, 2)).unflatten(-3, (2, 2))
    assert_close(without, without[:, :, :, :1, :, :1].expand_as(without), atol=1e-5, rtol=1e-5)
    net = network(sine_positions=True)
    value = net(x, times, Condition(BYTES)).value.unflatten(-1, (3, 2)).unflatten(-3, (2, 2))
    tokens = value.movedim((3, 5), (0, 1)).flatten(2).flatten(0, 1)
    assert min(torch.pdist(tokens)) > 1e-2
    added = net.embed_patches(x, Condition(BYTES)) - network().embed_patches(x, Condition(BYTES))  # (B, s, p, D)
    positions = [(16 * row / 2, 16 * column / 3) for row in range(2) for column in range(3)]  # a frame is 16 long
    waves = torch.tensor([[10_000 ** (-k / 6) for k in range(6)]])
    angles = [torch.tensor([[position[axis]] for position in positions]) * waves for axis in (1, 0)]
    expected = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    assert_close(added, expected.expand_as(added), atol=1e-5, rtol=1e-5)


def test_sine_positions_need_a_width_that_is_a_multiple_of_4() -> None:
    with pytest.raises(ConfigError, match="--model-dim 18 must be 16 or 20"):
        SoraDiT(C, S, model_dim=18, depth=1, heads=3, sine_positions=True)


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 2, 2), (1, 2, 2), (4, 2, 3)])
def test_patches_are_a_strided_convolution_and_fold_back(patch: tuple[int, int, int]) -> None:
    x = torch.randn(B, C, 4, 4, 6)
    weight = torch.randn(8, C, *patch)
    convolved = torch.nn.functional.conv3d(x, weight, stride=patch)  # (B, 8, s, rows, columns)
    linear = patchify(x, patch) @ weight.flatten(1).T
    assert_close(linear, convolved.flatten(3).permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(unpatchify(patchify(x, patch), patch, 4 // patch[1]), x)


@pytest.mark.parametrize("attention_type", ["st", "full"])
def test_padding_never_matters(attention_type: str) -> None:
    net = network(text_widths=(WIDTH, 0), attention_type=attention_type)
    x, time, (hidden, mask) = torch.randn(LATENTS), torch.rand(B), states()
    ids, id_mask = BYTES.streams[0], BYTES.masks[0]
    expected = net(x, time, Condition(TextCondition((hidden, ids), (mask, id_mask)))).value

    garbage = torch.where(mask[..., None], hidden, torch.nan)
    other_ids = torch.where(id_mask, ids, 77)
    assert_close(net(x, time, Condition(TextCondition((garbage, other_ids), (mask, id_mask)))).value, expected)

    longer = torch.cat((hidden, torch.randn(B, 3, WIDTH)), 1)
    longer_mask = torch.cat((mask, torch.zeros(B, 3, dtype=torch.bool)), 1)
    got = net(x, time, Condition(TextCondition((longer, ids), (longer_mask, id_mask)))).value
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_garbage_in_padding_has_no_gradient() -> None:
    net, (hidden, mask) = network(text_widths=(WIDTH,)), states()
    text = TextCondition((torch.where(mask[..., None], hidden, torch.nan),), (mask,))
    net(torch.randn(LATENTS), torch.rand(B), Condition(text)).value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_every_stream_and_every_real_token_matters() -> None:
    net = network(text_widths=(WIDTH, 12))
    x, time = torch.randn(LATENTS), torch.rand(B)
    (a, mask_a), (b, mask_b) = states(), states(7, 12)
    text = TextCondition((a, b), (mask_a, mask_b))
    expected = net(x, time, Condition(text)).value
    for i in (0, 1):
        changed = [a.clone(), b.clone()]
        changed[i][0, 3] += 1
        got = net(x, time, Condition(replace(text, streams=tuple(changed)))).value
        assert (got[0] - expected[0]).abs().max() > 1e-4
        assert_close(got[1], expected[1])


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    net, x, time = network(), torch.randn(LATENTS), torch.rand(B)
    together = net(x, time, Condition(BYTES)).value
    for row in range(B):
        alone = TextCondition((BYTES.streams[0][row : row + 1],), (BYTES.masks[0][row : row + 1],))
        got = net(x[row : row + 1], time[row : row + 1], Condition(alone)).value
        assert_close(got[0], together[row], atol=1e-5, rtol=1e-5)


def test_one_time_a_sample_is_the_same_time_for_each_frame() -> None:
    net, x, time = network(), torch.randn(LATENTS), torch.tensor([0.3, 0.9])
    each = time[:, None].expand(B, 4)
    expected = net(x, time, Condition(BYTES)).value
    assert torch.equal(net(x, each, Condition(BYTES)).value, expected)
    other = each.clone()
    other[0, 2] = 0.31
    got = net(x, other, Condition(BYTES)).value
    assert (got[0] - expected[0]).abs().max() > 1e-5
    assert torch.equal(got[1], expected[1])


def test_a_tokens_time_is_that_of_its_noisiest_frame() -> None:
    net, x = network(patch_size=(2, 2, 2)), torch.randn(LATENTS)

    def value(times: list[float], given: list[bool] | None = None) -> Tensor:
        condition = Condition(BYTES)
        if given is not None:
            mask = torch.tensor(given).expand(B, S, 4)
            condition = Condition(BYTES, torch.zeros(LATENTS), mask)
        return net(x, torch.tensor([times, times]), condition).value

    assert torch.equal(value([0.2, 0.7, 0.5, 0.5]), value([0.7, 0.1, 0.5, 0.0]))
    assert not torch.equal(value([0.2, 0.7, 0.5, 0.5]), value([0.2, 0.6, 0.5, 0.5]))
    whole, half = [True, True, False, False], [True, False, False, False]
    assert torch.equal(value([0.9, 0.8, 0.5, 0.5], whole), value([0.0, 0.0, 0.5, 0.5], whole))
    assert torch.equal(value([0.9, 0.8, 0.5, 0.5], half), value([0.0, 0.8, 0.5, 0.5], half))
    assert not torch.equal(value([0.9, 0.8, 0.5, 0.5], half), value([0.0, 0.0, 0.5, 0.5], half))


def test_a_partly_given_latent_frame_keeps_its_time() -> None:
    net, x = network(), torch.randn(LATENTS)
    mask = torch.ones(B, S, 4, dtype=torch.bool)
    mask[:, 1:, 0] = False  # one pixel frame of four
    mask[:, :, 2:] = False
    cond_latents = torch.randn(LATENTS)
    a = net(x, torch.tensor([[0.5, 0.5, 0.5, 0.5]] * B), Condition(BYTES, cond_latents, mask)).value
    b = net(x, torch.tensor([[0.5, 0.0, 0.5, 0.5]] * B), Condition(BYTES, cond_latents, mask)).value
    c = net(x, torch.tensor([[0.0, 0.5, 0.5, 0.5]] * B), Condition(BYTES, cond_latents, mask)).value
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_conditioning_latents_and_mask_are_used_row_by_row() -> None:
    net, x, time = network(), torch.randn(LATENTS), torch.rand(B)
    nothing = net(x, time, Condition(BYTES)).value
    mask, cond_latents = torch.zeros(B, S, 4, dtype=torch.bool), torch.zeros(LATENTS)
    assert torch.equal(net(x, time, Condition(BYTES, cond_latents, mask)).value, nothing)
    mask[0, 0, 0] = True
    masked = net(x, time, Condition(BYTES, cond_latents, mask)).value
    assert not torch.equal(masked[0], nothing[0])
    assert torch.equal(masked[1], nothing[1])
    cond_latents[0, :, 0] = 1.0
    assert not torch.equal(net(x, time, Condition(BYTES, cond_latents, mask)).value[0], masked[0])


@pytest.mark.parametrize("changes", [{}, {"text_widths": (WIDTH, 0), "adaln": "block", "conv": True}])
def test_saved_and_loaded_is_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    net = network(**changes)
    net.save_pretrained(tmp_path)
    loaded = SoraDiT.from_pretrained(tmp_path)
    text = BYTES if not changes else TextCondition((states()[0], BYTES.streams[0]), (states()[1], BYTES.masks[0]))
    x, time = torch.randn(LATENTS), torch.rand(B)
    assert torch.equal(loaded(x, time, Condition(text)).value, net(x, time, Condition(text)).value)

    config = json.loads(json.dumps(network_config(net)))
    rebuilt = build_network(config)
    rebuilt.load_state_dict(net.state_dict())
    assert network_config(rebuilt) == network_config(net) or json.dumps(network_config(rebuilt)) == json.dumps(config)
    assert torch.equal(rebuilt(x, time, Condition(text)).value, net(x, time, Condition(text)).value)


def test_the_gated_skip_adds_each_tokens_own_noisy_patch() -> None:
    net = SoraDiT(C, S, (1, 2, 2), 24, 1, 2, gated_skip=True, text_layers=1, text_buckets=8)
    x, time = torch.randn(LATENTS), torch.rand(B)
    assert not net(x, time, Condition(BYTES)).value.any()  # both halves start at zero
    gate = torch.randn(C * 4)
    net.final.linear.bias.data[C * 4 :] = gate
    by_channel_and_cell = gate.view(1, C, 1, 1, 2, 1, 2).expand(B, C, 4, 2, 2, 3, 2).reshape(LATENTS)
    assert_close(net(x, time, Condition(BYTES)).value, by_channel_and_cell * x)


def known_condition(known: list[list[int]], latents: tuple[int, ...] = LATENTS) -> Condition:
    """Return conditioning latents of which each row knows some frames."""
    mask = torch.zeros(B, S, latents[2])
    for row, frames in enumerate(known):
        mask[row, :, frames] = 1
    given = torch.randn(latents) * mask[:, :1, :, None, None]
    return Condition(BYTES, cond_latents=given, cond_mask=mask)


def test_unknown_frames_show_the_last_known_one() -> None:
    net = network(hold_last=True)
    condition = known_condition([[0, 1], []])
    shown, given = net.show_last(condition).cond_latents, condition.cond_latents
    assert shown is not None
    assert given is not None
    assert torch.equal(shown[0, :, :2], given[0, :, :2])
    assert torch.equal(shown[0, :, 2:], given[0, :, 1:2].expand(-1, 2, -1, -1))
    assert not shown[1].any()
    between = net.show_last(known_condition([[0, 3], [1]])).cond_latents
    assert between is not None
    assert torch.equal(between[0, :, 2], between[0, :, 0])
    assert not between[1, :, 0].any()
    assert torch.equal(between[1, :, 3], between[1, :, 1])
    assert net.show_last(Condition(BYTES)).cond_latents is None


def test_a_token_can_add_what_it_is_shown() -> None:
    net = SoraDiT(C, S, (1, 2, 2), 24, 1, 2, gated_skip=True, hold_last=True, text_layers=1, text_buckets=8)
    condition, x, time = known_condition([[0], [0, 1]]), torch.randn(LATENTS), torch.rand(B)
    net.final.linear.bias.data[2 * C * 4 :] = 1.0
    shown = net.show_last(condition).cond_latents
    assert shown is not None
    assert_close(net(x, time, condition).value, shown)
    assert not net(x, time, Condition(BYTES)).value.any()


@pytest.mark.parametrize("attention_type", ["st", "full"])
def test_bf16_is_close_to_float32(attention_type: str) -> None:
    net = network(attention_type=attention_type, conv=True, gated_skip=True)
    x, time = torch.randn(LATENTS), torch.rand(B)
    expected = net(x, time, Condition(BYTES)).value
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, time, Condition(BYTES)).value
    half = net.to(torch.bfloat16)(x, time, Condition(BYTES)).value
    for value in (mixed, half):
        assert value.dtype == torch.float32
        assert (value - expected).norm() / expected.norm() < 0.03


def test_attention_goes_through_the_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    from titans_video.models import attention

    net, calls = network(), []
    original = attention.dispatch_attention_fn

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(str(kwargs["backend"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", counted)
    x, time = torch.randn(LATENTS), torch.rand(B)
    expected = net(x, time, Condition(BYTES)).value
    assert len(calls) == 2 * 3 + 1  # spatial, temporal and cross in each block, one in the byte encoder
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)  # restored
    net.set_attention_backend("_native_math")
    calls.clear()
    assert_close(net(x, time, Condition(BYTES)).value, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 7
    assert all("MATH" in name for name in calls)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((B, C, 3, 4, 4), "3 -> 2 or 4"),
        ((B, C, 2, 5, 4), "5 -> 4 or 6"),
        ((B, C, 2, 4, 1), "1 -> 2"),
        ((B, C + 1, 2, 4, 4), "codec must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        network(patch_size=(2, 2, 2))(torch.zeros(shape), torch.rand(B), Condition(BYTES))


@pytest.mark.parametrize("text", [None, TextCondition((torch.zeros(B, 3, 8),), (torch.ones(B, 3).bool(),))])
def test_other_text_than_in_training_is_refused(text: TextCondition | None) -> None:
    with pytest.raises(ConfigError, match="--text-model"):
        network()(torch.zeros(LATENTS), torch.rand(B), Condition(text))


def test_a_network_without_text_needs_none() -> None:
    assert network(text_widths=())(torch.randn(LATENTS), torch.rand(B), Condition()).value.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_dim": 25}, "24 and 28"),
        ({"model_dim": 8}, "--heads"),
        ({"attention_type": "window"}, "st or full"),
        ({"adaln": "none"}, "block or shared"),
        ({"patch_size": (0, 2, 2)}, "positive"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        network(**changes)


def test_foreign_configurations_are_refused() -> None:
    with pytest.raises(CheckpointError, match="network 'os"):
        build_network({"network": "os.system"})
    with pytest.raises(CheckpointError, match="not of this version"):
        build_network({"in_channels": 3, "no_such_argument": 1})
