"""Check the layout, dtype and mask of all attention calls against the rules of FlashAttention and cuDNN."""

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from tests import factories
from tests.unit.svd_parts import svd_model
from titans_video.errors import ConfigError
from titans_video.models import attention
from titans_video.models.attention import check_attention_backend, kernel_note, set_attention_backend
from titans_video.models.sora_dit import SoraDiT
from titans_video.models.titans_dit import SegmentRollout, TitansVideoDiT
from titans_video.pretrained.base import open_model_spec
from titans_video.types import Condition, TextCondition

C, S, WIDTH = 3, 2, 20
SMALL: dict[str, Any] = {"in_channels": C, "time_stride": S, "patch_size": (1, 2, 2), "model_dim": 32, "depth": 2}
SMALL |= {"heads": 2, "text_layers": 1, "text_buckets": 64}


def text(rows: int, lengths: tuple[int, ...], widths: tuple[int, ...]) -> TextCondition:
    """Text with these real tokens in each row, as a batch brings it to the device."""
    length = max(lengths) + 2
    mask = torch.arange(length)[None] < torch.tensor(lengths[:rows])[:, None]
    streams = [torch.randn(rows, length, w) if w else mask * torch.randint(1, 99, (rows, length)) for w in widths]
    return TextCondition(tuple(streams), (mask,) * len(widths)).to("cpu")


def sora(kind: str, rows: int, lengths: tuple[int, ...]) -> None:
    net = SoraDiT(**SMALL, attention_type=kind, text_widths=(0, WIDTH))
    net(torch.randn(rows, C, 4, 4, 6), torch.rand(rows), Condition(text(rows, lengths, (0, WIDTH)))).value.sum()


def titans(kind: str, rows: int, lengths: tuple[int, ...]) -> None:
    net = TitansVideoDiT(**SMALL, attention_type=kind, memory="neural", mem_tokens=3, persistent_tokens=2)
    clean, time = torch.randn(rows, C, 6, 4, 6), torch.rand(rows, 6)
    plan = SegmentRollout(2, clean, time, clean, time, overlap=1, horizon=1)
    net(clean, time, Condition(text(rows, lengths, (0,))), rollout=plan)


def svd(_: str, rows: int, lengths: tuple[int, ...]) -> None:
    net = svd_model().network
    net(torch.randn(rows, 4, 3, 8, 8), torch.rand(rows), Condition(text(rows, lengths, (0,))))


def cogvideox(kind: str, rows: int, lengths: tuple[int, ...]) -> None:
    spec = open_model_spec(cogvideox_folder(kind))
    net = spec.load_network(torch.float32)
    noisy, prepared = spec.example()
    spec.predict(net, noisy, prepared, torch.float32)


@functools.cache
def cogvideox_folder(kind: str) -> Path:
    return factories.make_cogvideox(Path(mkdtemp()) / kind, kind)


NETWORKS = [
    *((sora, kind) for kind in ("st", "full")),
    *((titans, kind) for kind in ("st", "full")),
    (svd, ""),
    *((cogvideox, kind) for kind in ("2b", "5b", "1.5-i2v")),
]


def cudnn_accepts(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return `check_cudnn_layout` of torch's sdp_utils.cpp for (B, H, S, d); axes of length 1 have no stride."""

    def has(x: Tensor, strides: tuple[int, ...]) -> bool:
        return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))

    def unpacked(x: Tensor) -> bool:
        _, h, s, d = x.shape
        return has(x, (s * h * d, d, h * d, 1))

    def packed(x: Tensor) -> bool:
        _, h, s, d = x.shape
        return has(x, (3 * s * h * d, d, 3 * h * d, 1))

    return unpacked(q) and unpacked(k) and (unpacked(v) or packed(v))


@pytest.mark.parametrize(("run", "kind"), NETWORKS)
@pytest.mark.parametrize("lengths", [(4,), (4, 4), (4, 2)])
def test_fast_kernels_accept_every_attention(
    run: Callable[..., None], kind: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        calls.append((query, key, value, attn_mask))
        return scaled_dot_product_attention(query, key, value, attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        run(kind, len(lengths), lengths)
    assert calls
    for q, k, v, mask in calls:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.shape[-1] % 8 == 0
        assert cudnn_accepts(q, k, v), (q.shape, q.stride(), k.stride(), v.stride())
        assert mask is None or lengths == (4, 2)
    masked = sum(mask is not None for *_, mask in calls)
    assert (masked > 0) == (lengths == (4, 2) and run is not cogvideox)


def test_an_unmasked_text_gives_what_a_full_mask_gives() -> None:
    net, x, time = SoraDiT(**SMALL), torch.randn(1, C, 4, 4, 6), torch.rand(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    given = text(1, (4,), (0,))
    with torch.autocast("cpu", torch.bfloat16):
        bare = net(x, time, Condition(given)).value
        masked = net(x, time, Condition(TextCondition(given.streams, given.masks))).value
    assert (bare - masked).norm() < 0.01 * masked.norm()


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-i2v"])
def test_cogvideox_attention_is_diffusers(kind: str) -> None:
    from diffusers import CogVideoXTransformer3DModel

    spec = open_model_spec(cogvideox_folder(kind))
    stock = CogVideoXTransformer3DModel.from_pretrained(spec.folder / "transformer").eval()
    noisy, prepared = spec.example()
    ours = spec.predict(spec.load_network(torch.float32), noisy, prepared, torch.float32)
    assert_close(ours, spec.predict(stock, noisy, prepared, torch.float32), rtol=1e-5, atol=1e-6)


def test_a_kernel_is_chosen_checked_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net, cpu, cuda = SoraDiT(**SMALL), torch.device("cpu"), torch.device("cuda")
    check_attention_backend("auto", cpu, training=True)
    check_attention_backend("math", cpu, training=True)
    for name, device, training, words in (
        ("cudnn", cpu, True, "needs a CUDA device"),
        ("sage", cuda, True, "no backward pass"),
        ("sage", cuda, False, "pip install sageattention"),
        ("flash2", cuda, False, "pip install flash-attn"),
        ("flash3", cuda, True, "folder hopper"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_attention_backend(name, device, training=training)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bf16 or fp16 only"):
        set_attention_backend(net, "cudnn", torch.float32)
    with pytest.raises(ConfigError, match="cannot change their kernel"):
        set_attention_backend(nn.Linear(1, 1), "math", torch.float32)

    found = []
    original = attention.dispatch_attention_fn
    monkeypatch.setattr(
        attention, "dispatch_attention_fn", lambda *a, **k: found.append(k["backend"]) or original(*a, **k)
    )
    set_attention_backend(net, "math", torch.float32)
    net(torch.randn(1, C, 4, 4, 6), torch.rand(1), Condition(text(1, (4,), (0,))))
    assert {x.value for x in found} == {"_native_math"}
    assert "Attention: math, heads of 16, float32" in kernel_note(net, "math", cpu, torch.float32)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: SDPBackend.CUDNN_ATTENTION.value)
    assert "torch's cuDNN attention, heads of 16, bfloat16" in kernel_note(net, "auto", cpu, torch.bfloat16)


def test_a_mask_goes_to_a_kernel_that_accepts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *_, backend, **__: used.append(backend))
    x, mask = torch.zeros(1, 2, 1, 8), torch.ones(1, 1, 1, 2, dtype=torch.bool)
    for name in ("flash", "cudnn"):
        attention.attend(x, x, x, None, attention.BACKENDS[name])
        attention.attend(x, x, x, mask, attention.BACKENDS[name])
    assert [x.value for x in used] == ["_native_flash", "native", "_native_cudnn", "_native_cudnn"]
