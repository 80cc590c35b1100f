"""Every VAE class, compared with diffusers' own calls and its pipeline's scaling."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.factories import VAE_KINDS, make_vae, tiny_vae
from titans_video.codecs import diffusers
from titans_video.codecs.diffusers import CogVideoXVAEWrapper, DiffusersCodec
from titans_video.errors import CodecError

SIDE = {"kl": 16, "svd": 16, "cogvideox": 32, "wan": 32, "hunyuan": 32, "ltx": 64, "titans": 16}
FRAMES = {"kl": 3, "svd": 4, "cogvideox": 9, "wan": 9, "hunyuan": 9, "ltx": 17, "titans": 9}

LEGAL = {
    "kl": list(range(1, 18)),
    "svd": list(range(1, 18)),
    "cogvideox": [1, 8, 9, 16, 17],
    "wan": [1, 5, 9, 13, 17],
    "hunyuan": [1, 5, 9, 13, 17],
    "ltx": [1, 9, 17],
    "titans": [1, 5, 9, 13, 17],
}


def clip(kind: str, frames: int | None = None, batch: int = 1) -> Tensor:
    side = SIDE[kind]
    return torch.rand(batch, 3, frames or FRAMES[kind], side, side) * 2 - 1


def column(values: Any) -> Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1, 1)


def pipeline_latents(kind: str, vae: Any, x: Tensor) -> Tensor:
    """Compute what each pipeline computes between its VAE's encoder and its transformer, with the mode."""
    if kind in ("kl", "svd"):
        z = torch.stack([vae.encode(x[:, :, i]).latent_dist.mode() for i in range(x.shape[2])], dim=2)
        return (z - vae.config.shift_factor) * vae.config.scaling_factor if kind == "kl" else z * 0.18215
    z = vae.encode(x).latent_dist.mode()
    if kind in ("wan", "titans"):
        return (z - column(vae.config.latents_mean)) / column(vae.config.latents_std)
    if kind == "ltx":
        return (z - column(vae.latents_mean)) * vae.config.scaling_factor / column(vae.latents_std)
    return z * vae.config.scaling_factor


def pipeline_pixels(kind: str, vae: Any, z: Tensor) -> Tensor:
    """Compute what each pipeline computes after its transformer."""
    if kind == "kl":
        z = z / vae.config.scaling_factor + vae.config.shift_factor
        return torch.stack([vae.decode(z[:, :, i]).sample for i in range(z.shape[2])], dim=2)
    if kind == "svd":
        frames = (z / 0.18215).transpose(1, 2).flatten(0, 1)
        decoded = vae.decode(frames, num_frames=z.shape[2]).sample
        return decoded.unflatten(0, (z.shape[0], z.shape[2])).transpose(1, 2)
    if kind in ("wan", "titans"):
        return vae.decode(z * column(vae.config.latents_std) + column(vae.config.latents_mean)).sample
    if kind == "ltx":
        return vae.decode(z * column(vae.latents_std) / vae.config.scaling_factor + column(vae.latents_mean)).sample
    return vae.decode(z / vae.config.scaling_factor).sample


@pytest.mark.parametrize("kind", VAE_KINDS)
@torch.no_grad()
def test_latents_and_pixels_are_the_pipelines(kind: str, tmp_path: Path) -> None:
    codec = DiffusersCodec.load(make_vae(kind, tmp_path))
    vae = tiny_vae(kind)
    x = clip(kind, batch=2)
    z = codec.encode(x)
    assert z.shape[1:] == codec.spec.latent_shape(*x.shape[2:])
    torch.testing.assert_close(z, pipeline_latents(kind, vae, x), atol=1e-5, rtol=0)
    # How much float32 loses in these random networks differs between CPUs: we may lose no more than the pipeline does.
    truth = pipeline_pixels(kind, tiny_vae(kind).double(), z.double())
    ours, theirs = ((p - truth).abs().max() for p in (codec.decode(z, x.shape[2]), pipeline_pixels(kind, vae, z)))
    assert theirs < 1e-3
    assert ours <= 2 * theirs + 1e-6


@pytest.mark.parametrize("kind", VAE_KINDS)
def test_every_legal_frame_count_comes_back_and_the_rest_are_refused(kind: str) -> None:
    codec = DiffusersCodec(tiny_vae(kind))
    _, side, _ = codec.spec.stride
    legal = [n for n in range(1, 18) if codec.spec.is_legal(n)]
    assert legal == LEGAL[kind]
    for frames in legal if len(legal) < 17 else (1, 2, 17):
        x = clip(kind, frames)[..., : 2 * side, : 2 * side]
        assert codec.decode(codec.encode(x), frames).shape == x.shape
    for frames in sorted(set(range(1, 18)) - set(legal)):
        with pytest.raises(CodecError, match="the nearest legal counts are"):
            codec.encode(clip(kind, frames))


@pytest.mark.parametrize("kind", VAE_KINDS)
def test_a_batch_equals_its_clips_one_by_one(kind: str) -> None:
    codec = DiffusersCodec(tiny_vae(kind))
    x = clip(kind, batch=2)
    both = codec.encode_moments(x)
    torch.testing.assert_close(torch.cat([codec.encode_moments(c) for c in x.split(1)]), both, atol=1e-6, rtol=0)


def test_frame_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = DiffusersCodec(tiny_vae("kl"))
    x = clip("kl", 5)
    whole = codec.encode(x)
    pixels = codec.decode(whole, 5)
    sizes: list[int] = []
    encode = codec.vae.encode
    monkeypatch.setattr(codec.vae, "encode", lambda chunk: sizes.append(len(chunk)) or encode(chunk))
    monkeypatch.setattr(diffusers, "CHUNK_PIXELS", 2 * 16 * 16)
    torch.testing.assert_close(codec.encode(x), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(whole, 5), pixels, atol=1e-5, rtol=0)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(("kind", "most"), [("wan", 4), ("cogvideox", 9)])
@torch.no_grad()
def test_temporal_chunks_equal_the_whole(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = DiffusersCodec(tiny_vae(kind))
    x = clip(kind, 17)
    seen: list[int] = []
    encoder = codec.vae.encoder.forward

    def spy(chunk: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(chunk.shape[2])
        return encoder(chunk, *args, **kwargs)

    monkeypatch.setattr(codec.vae.encoder, "forward", spy)
    whole = codec.encode(x)
    assert max(seen) <= most
    assert sum(seen) == 17
    # Causal: later frames change nothing, so the beginning of a clip is encoded the same without the rest.
    torch.testing.assert_close(codec.encode(x[:, :, :9]), whole[:, :, :3], atol=1e-5, rtol=0)


def set_tiles(kind: str, vae: Any) -> None:
    """Use tiles far smaller than the defaults, with overlaps that fall on whole latent cells."""
    if kind == "kl":
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
    elif kind == "cogvideox":
        vae.tile_sample_min_height, vae.tile_sample_min_width = 48, 40
        vae.tile_latent_min_height, vae.tile_latent_min_width = 6, 5
    else:
        tile = 64 if kind == "ltx" else 32
        vae.tile_sample_min_height = vae.tile_sample_min_width = tile
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = tile // 2


@pytest.mark.parametrize("frames", [17, 30, 41])
def test_long_clips_of_svd_are_decoded_in_chunks(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that chunks are nearly equal to whole clips: the decoder normalises over all frames that it gets."""
    codec, z = DiffusersCodec(tiny_vae("svd")), torch.randn(1, 4, frames, 6, 8)
    whole = codec.decode(z, frames)
    monkeypatch.setattr(diffusers, "TEMPORAL_PIXELS", 17 * 12 * 16)
    stretches = codec.decode(z, frames)
    assert (stretches - whole).abs().mean() < 0.05 * whole.std()
    assert torch.equal(stretches, whole) == (frames <= 17)


@pytest.mark.parametrize("kind", ["kl", "cogvideox", "wan", "hunyuan", "ltx"])
@torch.no_grad()
def test_large_frames_are_tiled_as_diffusers_tiles_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, vae = DiffusersCodec(tiny_vae(kind)), tiny_vae(kind)
    height, width = (128, 96) if kind == "ltx" else (64, 48)
    x = torch.rand(1, 3, 1, height, width) * 2 - 1
    plain = codec.encode(x)
    monkeypatch.setattr(diffusers, "TILE_ABOVE", 32 * 32)
    vae.enable_tiling()
    set_tiles(kind, vae)
    set_tiles(kind, codec.vae)
    tiled = codec.encode(x)
    torch.testing.assert_close(tiled, pipeline_latents(kind, vae, x), atol=1e-5, rtol=0)
    assert not torch.allclose(tiled, plain, atol=1e-5)
    torch.testing.assert_close(codec.decode(tiled, 1), pipeline_pixels(kind, vae, tiled), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(diffusers, "TILE_ABOVE", height * width)
    torch.testing.assert_close(codec.encode(x), plain)


def test_long_ltx_clips_go_in_temporal_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = DiffusersCodec(tiny_vae("ltx"))
    monkeypatch.setattr(diffusers, "FRAMEWISE_ABOVE", 0)
    longest = 0
    encoder = codec.vae.encoder.forward

    def spy(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal longest
        longest = max(longest, x.shape[2])
        result: Tensor = encoder(x, *args, **kwargs)
        return result

    monkeypatch.setattr(codec.vae.encoder, "forward", spy)
    x = clip("ltx", 49)[..., :32, :32]
    assert codec.decode(codec.encode(x), 49).shape == x.shape
    assert longest < 49


@torch.no_grad()
def test_ltx_decoders_that_want_a_time_get_their_pipelines_default() -> None:
    vae = tiny_vae("ltx", timestep_conditioning=True)
    codec = DiffusersCodec(vae)
    z = torch.randn(2, 8, 2, 1, 1)
    raw = z * column(vae.latents_std) + column(vae.latents_mean)
    torch.testing.assert_close(codec.decode(z, 9), vae.decode(raw, torch.zeros(2)).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sampling_follows_the_librarys_distribution() -> None:
    codec = DiffusersCodec(tiny_vae("wan"))
    x = clip("wan")
    noise_seed = 7
    posterior = codec.vae.encode(x).latent_dist
    library = posterior.sample(torch.Generator().manual_seed(noise_seed))
    ours = codec.encode(x, generator=torch.Generator().manual_seed(noise_seed))
    torch.testing.assert_close(ours, codec.scale(library), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_comes_close_and_comes_back_as_float32(dtype: str, tmp_path: Path) -> None:
    folder = make_vae("hunyuan", tmp_path)
    x = clip("hunyuan", 5)[..., :16, :16]
    half, full = DiffusersCodec.load(folder, dtype).encode(x), DiffusersCodec.load(folder).encode(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


def test_incomplete_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = make_vae("kl", tmp_path) / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "encoder.conv_in.weight"}, weights)
    with pytest.raises(CodecError, match=r"encoder\.conv_in\.weight"):
        DiffusersCodec.load(tmp_path)
    weights.write_bytes(b"not weights")
    with pytest.raises(CodecError, match="cannot be loaded"):
        DiffusersCodec.load(tmp_path)
    weights.unlink()
    with pytest.raises(CodecError, match="cannot be loaded"):
        DiffusersCodec.load(tmp_path)


def test_folders_without_a_known_vae_say_so(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match=r"neither vae/config\.json nor config\.json"):
        DiffusersCodec.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(CodecError, match="AutoencoderDC'; the supported VAEs are"):
        DiffusersCodec.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CodecError, match="cannot be read"):
        DiffusersCodec.load(tmp_path)


def test_a_missing_package_is_one_line_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_vae("kl", tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CodecError, match="pip install diffusers"):
        DiffusersCodec.load(folder)


def test_the_fingerprint_follows_contents_not_places(tmp_path: Path) -> None:
    first, same = make_vae("ltx", tmp_path / "a"), make_vae("ltx", tmp_path / "b")
    assert DiffusersCodec.load(first).fingerprint() == DiffusersCodec.load(same / "vae").fingerprint()
    scaled = make_vae("ltx", tmp_path / "c", scaling_factor=2.0)
    assert DiffusersCodec.load(first).fingerprint() != DiffusersCodec.load(scaled).fingerprint()


@pytest.mark.parametrize("kind", VAE_KINDS)
def test_without_its_weights_a_vae_tells_everything_but_latents(kind: str, tmp_path: Path) -> None:
    folder = make_vae(kind, tmp_path)
    x = clip(kind)
    whole, bare = DiffusersCodec.load(folder, "bf16"), DiffusersCodec.load(folder, "bf16", weights=False)
    assert bare._vae is None
    assert bare.spec == whole.spec
    assert bare.fingerprint() == whole.fingerprint()
    latents = whole.encode(x)
    assert torch.equal(bare.to("cpu").scale(bare.unscale(latents)), whole.scale(whole.unscale(latents)))
    assert bare._vae is None
    assert torch.equal(bare.encode(x), latents)
    bare.release()
    assert bare._vae is None
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CodecError, match="cannot be loaded"):
        DiffusersCodec.load(folder, weights=False).encode(x)


def test_cogvideox_wrapper_takes_a_pipeline_or_the_vae_and_no_other(tmp_path: Path) -> None:
    folder = make_vae("cogvideox", tmp_path / "cog")
    x = clip("cogvideox", 8)
    expected = DiffusersCodec.load(folder).encode(x)
    assert torch.equal(CogVideoXVAEWrapper(str(folder)).encode(x), expected)
    assert torch.equal(CogVideoXVAEWrapper(folder / "vae", dtype="float32").encode(x), expected)
    with pytest.raises(CodecError, match="not CogVideoX's VAE"):
        CogVideoXVAEWrapper(make_vae("wan", tmp_path / "wan"))
    with pytest.raises(CodecError, match="dtype 'float8'"):
        CogVideoXVAEWrapper(folder, dtype="float8")
