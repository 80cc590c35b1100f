"""Training a VAE: losses and measures, the discriminator's part, crops, and runs from flags to a finished folder."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from tests.endtoend.distributed_jobs import make_batch
from tests.factories import VAE_KINDS, make_vae, tiny_vae
from titans_video import checkpoint as files
from titans_video.cli.main import main
from titans_video.codecs.base import to_patches
from titans_video.codecs.diffusers import VAE_SPECS, DiffusersCodec
from titans_video.codecs.pca import PCACodec
from titans_video.config.generation import Overrides
from titans_video.config.options import ActivationOptions, DataOptions
from titans_video.config.recipes import TrainVaeOptions, VaeLossOptions, VaeOptions
from titans_video.data.dataset import open_data
from titans_video.errors import CheckpointError, CodecError, ConfigError
from titans_video.generation.model import load_model
from titans_video.media.writing import write_video
from titans_video.models import reconstruction as measures
from titans_video.models.activations import limit_activations
from titans_video.models.reconstruction import LPIPS, VGG16, hinge
from titans_video.models.video_vae import TitansVideoVAE
from titans_video.recipes.vae import MEASURES, VaeRecipe, crop_clips
from titans_video.training.optim import build_optimizer
from titans_video.training.vae_network import (
    VaeNetwork,
    latent_statistics,
    latent_weights,
    principal_components,
    set_statistics,
)
from titans_video.types import CodecSpec

SMALL = "--vae-width 8 --encoder-blocks 1 --decoder-blocks 1 --refine-width 4 --latent-channels 4 --spatial-stride 4"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trained(kind: str = "titans", **options: Any) -> VaeNetwork:
    """Return a network of a random VAE."""
    vae = tiny_vae(kind)
    generator = torch.Generator().manual_seed(1)
    if kind == "titans":
        for parameter in vae.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return VaeNetwork(vae, VAE_SPECS[type(vae).__name__], VaeLossOptions(**options))


def test_measures_are_those_of_plain_loops() -> None:
    a, b = noise(2, 3, 3, 13, 12), noise(2, 3, 3, 13, 12, seed=1)
    x, y = a.double().numpy(), b.double().numpy()
    error = x - y
    mse = (error**2).reshape(2, -1).mean(1)
    assert_close(measures.psnr(a, b), torch.from_numpy(10 * np.log10(4 / mse)).float())
    changes = np.abs(np.diff(error, axis=2)).reshape(2, -1).mean(1)
    assert_close(measures.flicker(a, b), torch.from_numpy(changes * 127.5).float())
    squares = (np.diff(error, axis=2) ** 2).reshape(2, -1).mean(1)
    assert_close(measures.temporal_error(a - b, is_squared=True), torch.from_numpy(squares**0.5).float())
    scales = []
    for scale in (1, 2, 4):
        part = error[..., : 13 // scale * scale, : 12 // scale * scale]
        pooled = part.reshape(2, 3, 3, 13 // scale, scale, 12 // scale, scale).mean((4, 6))
        scales.append(sum(np.abs(np.diff(pooled, axis=axis)).reshape(2, -1).mean(1) for axis in (-1, -2)))
    assert_close(measures.gradient_error(a - b), torch.from_numpy(sum(scales) / 3).float())
    mean, logvar = noise(2, 4, 2, 3, 3), noise(2, 4, 2, 3, 3, seed=2)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0))
    assert_close(measures.kl_divergence(mean, logvar), divergence.flatten(1).mean(1))
    assert measures.flicker(a[:, :, :1], b[:, :, :1]).tolist() == [0, 0]


def test_ssim_is_that_of_the_paper() -> None:
    a, b = noise(1, 3, 2, 14, 13), noise(1, 3, 2, 14, 13, seed=1) * 0.3
    b = a * 0.7 + b
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for frame in range(2):
        for colour in range(3):
            x, y = (z[0, colour, frame].double().numpy() for z in (a, b))
            for i in range(4):
                for j in range(3):
                    p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    both = (window * (p - mp) * (q - mq)).sum()
                    c1, c2 = 0.02**2, 0.06**2
                    found.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert_close(float(measures.ssim(a, b)), float(np.mean(found)), rtol=1e-4, atol=1e-5)
    assert float(measures.ssim(a, a)) == pytest.approx(1)


def test_lpips_reads_the_published_names_and_computes_the_published_distance(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # of torchvision's vgg16().features
    state: dict[str, Tensor] = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    layers, inputs = [], 3
    for stage, (places, widths) in enumerate(zip(numbers, VGG16, strict=True)):
        for place, width in zip(places, widths, strict=True):
            weight = torch.randn(width, inputs, 3, 3, generator=generator) / math.sqrt(9 * inputs)
            bias = torch.randn(width, generator=generator) * 0.1
            state |= {f"net.slice{stage + 1}.{place}.weight": weight, f"net.slice{stage + 1}.{place}.bias": bias}
            layers.append((weight, bias, place in (0, 5, 10, 17, 24) and place > 0, place == places[-1]))
            inputs = width
        state[f"lin{stage}.model.1.weight"] = torch.rand(1, widths[-1], 1, 1, generator=generator)
    torch.save(state, tmp_path / "lpips.pt")
    network = LPIPS.load(tmp_path / "lpips.pt")
    a, b = noise(1, 3, 2, 32, 32), noise(1, 3, 2, 32, 32, seed=1)
    total = 0.0
    for frame in range(2):
        features = []
        for x in (a[:, :, frame], b[:, :, frame]):
            shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
            x, own = (x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1), []
            for weight, bias, pools, is_last in layers:
                x = F.relu(F.conv2d(F.max_pool2d(x, 2) if pools else x, weight, bias, padding=1))
                if is_last:
                    own.append(F.normalize(x, dim=1))
            features.append(own)
        for stage, (f, g) in enumerate(zip(*features, strict=True)):
            total += float(((f - g).square() * state[f"lin{stage}.model.1.weight"]).sum(1).mean()) / 2
    assert float(network(a, b)) == pytest.approx(total, rel=1e-4)
    del state["lin3.model.1.weight"]
    torch.save(state, tmp_path / "lpips.pt")
    with pytest.raises(ConfigError, match=r"lin3.model.1.weight are missing"):
        LPIPS.load(tmp_path / "lpips.pt")


def test_each_side_of_the_gan_gets_its_own_gradient() -> None:
    """Against two losses: the VAE's with fixed discriminator weights, and the discriminator's with fixed pixels."""
    network = trained(gan_start=0, gan_width=4, gan_weight=0.5)
    x, z = noise(2, 3, 5, 16, 16), noise(2, 4, 2, 4, 4)
    found = network(x, z, adversarial=True)
    plain = network(x, z)
    assert_close(found.loss, plain.loss)
    found.loss.sum().backward()
    got = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert got.keys() == dict(network.named_parameters()).keys()
    network.zero_grad()

    critic: Any = network.discriminator
    made = network(x, z)
    distance = network._distance(made.pixels, x)
    critic.requires_grad_(False)
    adversarial = -critic(made.pixels).flatten(1).mean(1)
    factors = []
    for row in range(2):
        usual = torch.autograd.grad(distance[row], made.pixels, retain_graph=True)[0]
        wanted = torch.autograd.grad(adversarial[row], made.pixels, retain_graph=True)[0]
        factors.append(0.5 * usual.norm() / wanted.norm())
    (made.loss + torch.stack(factors) * adversarial).sum().backward()
    for name, parameter in network.vae.named_parameters():
        assert_close(got[f"vae.{name}"], parameter.grad, rtol=1e-4, atol=1e-5)
    critic.requires_grad_(True)
    hinge(critic(x), critic(made.pixels.detach())).sum().backward()
    for name, parameter in critic.named_parameters():
        assert_close(got[f"discriminator.{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_before_the_gan_starts_its_gradient_is_zero() -> None:
    network = trained(gan_start=5, gan_width=4)
    network(noise(1, 3, 1, 16, 16), noise(1, 4, 1, 4, 4)).loss.sum().backward()
    assert network.discriminator is not None
    assert all(p.grad is not None and not p.grad.any() for p in network.discriminator.parameters())


def test_crops_are_functions_of_the_row() -> None:
    clips = (noise(3, 3, 9, 24, 40) * 127.5 + 127.5).round().to(torch.uint8)
    options = VaeOptions(crop_size=8, crop_scale=(1.0, 3.0))
    cut = crop_clips(clips, [1, 2, 3], (5, 8, 8), options)
    assert cut.shape == (3, 3, 5, 8, 8)
    assert torch.equal(crop_clips(clips[1:], [2, 3], (5, 8, 8), options), cut[1:])
    exact = crop_clips(clips, [1, 2, 3], (9, 8, 8), VaeOptions(crop_size=8))
    for row in range(3):
        whole = clips[row].float() / 127.5 - 1
        windows = whole.unfold(2, 8, 1).unfold(3, 8, 1).permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
        assert ((windows - exact[row]).abs().amax((1, 2, 3, 4)) < 1e-6).any()
    assert torch.equal(crop_clips(clips, [1, 2, 3], (9, 24, 40), VaeOptions()), clips.float().div(127.5).sub(1))


def test_the_components_of_large_patches_are_those_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = F.interpolate(noise(12, 3, 5, 6, 6), (9, 24, 24), mode="trilinear")
    mean, basis, std = principal_components(x, (2, 4, 4), 8)
    monkeypatch.setattr("titans_video.training.vae_network.MOST_EXACT", 0)
    torch.manual_seed(0)
    again = principal_components(x, (2, 4, 4), 8)
    assert_close(again[0], mean, atol=1e-4, rtol=1e-4)
    assert_close(again[2], std, atol=1e-3, rtol=0.02)
    patches = to_patches(torch.cat([x[:, :, :1], x], dim=2), (2, 4, 4)).reshape(-1, 96) - mean
    assert float((patches @ again[1]).square().sum()) > 0.999 * float((patches @ basis).square().sum())


@pytest.mark.parametrize("kind", ["titans", "wan", "ltx", "kl", "svd"])
def test_latents_get_unit_variance(kind: str) -> None:
    network = trained(kind)
    side = 64 if kind == "ltx" else 32
    clips = [noise(1, 3, 9, side, side, seed=i) * (0.2 + 0.1 * i) for i in range(3)]
    network.eval()
    set_statistics(network.vae, *latent_statistics(network, clips))
    codec = DiffusersCodec(network.vae)
    with torch.no_grad():
        moments = torch.cat([codec.encode_moments(clip) for clip in clips])
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([codec.from_moments(moments, generator) for _ in range(20)])
    per_channel = z.std((0, 2, 3, 4))
    if kind in ("kl", "svd"):  # one factor for all channels
        assert float(z.square().mean().sqrt()) == pytest.approx(1, abs=0.05)
    else:
        assert_close(per_channel, torch.ones_like(per_channel), atol=0.1, rtol=0)
        assert_close(z.mean((0, 2, 3, 4)), torch.zeros_like(per_channel), atol=0.1, rtol=0)


def test_the_weights_of_a_linear_vae_are_those_of_the_linear_codec() -> None:
    """At its start the VAE is linear, so its scaled latents are those of `PCACodec` on the same patches."""
    clips = F.interpolate(noise(12, 3, 5, 6, 6), (9, 24, 24), mode="trilinear")
    vae = TitansVideoVAE(latent_channels=6, spatial_stride=4, temporal_stride=2, encoder_width=8, decoder_width=8)
    vae.set_linear(*principal_components(clips, (2, 4, 4), 8))
    network = VaeNetwork(vae, VAE_SPECS["TitansVideoVAE"], VaeLossOptions()).eval()
    vae.register_to_config(latents_weight=latent_weights(network, list(clips.split(1)), torch.ones(6)).tolist())
    repeated = torch.cat([clips[:, :, :1], clips], dim=2)
    linear, codec = PCACodec.fit(repeated, (2, 4, 4), 6), DiffusersCodec(vae.eval())
    assert linear.spec.variance is not None
    assert codec.spec.variance == pytest.approx(linear.spec.variance, rel=0.05)  # ours leaves out the repeated frame
    ours, theirs = codec.encode(clips), linear.encode(repeated)
    assert_close(ours, theirs - theirs.mean((0, 2, 3, 4), keepdim=True), atol=0.05, rtol=0.05)
    assert_close(codec.decode(ours, 9), linear.decode(theirs, 10)[:, :, 1:], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["titans", "kl", "told"])
def test_errors_are_added_in_the_scale_of_networks(kind: str) -> None:
    """Training decodes the latents, and the noise level, that generation decodes after a network with these errors."""
    if kind == "told":
        vae = TitansVideoVAE(4, 4, 4, 8, 8, 1, 2, 4, noise_conditioning=True)
        for parameter in vae.parameters():
            parameter.data = 0.2 * noise(*parameter.shape, seed=2)
        network = VaeNetwork(vae, VAE_SPECS["TitansVideoVAE"], VaeLossOptions()).eval()
    else:
        network = trained(kind).eval()
    if kind == "titans":
        network.vae.register_to_config(latents_std=[0.5, 1.0, 2.0, 3.0], latents_weight=[1.0, 1.5, 0.5, 0.2])
    codec = DiffusersCodec(network.vae)
    x = noise(1, 3, 5, 32, 32)
    shape = (1, *codec.spec.latent_shape(5, 32, 32))
    errors, zeros = 0.3 * noise(*shape, seed=1), torch.zeros(shape)
    with torch.no_grad():
        made = network(x, zeros, errors=errors, levels=torch.tensor([0.3])).pixels
        wrong = codec.encode(x) + errors
        if kind == "told":
            assert (codec.decode(wrong, 5) - made).abs().max() > 0.01
            codec.set_smooth(0.3)
        assert_close(made, codec.decode(wrong, 5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("latent_noise", [0.0, 0.5])
@pytest.mark.parametrize("trainable", ["all", "decoder"])
def test_every_trained_parameter_gets_a_gradient(trainable: str, latent_noise: float) -> None:
    """DDP waits for all of them."""
    vae = tiny_vae("titans").with_noise_conditioning()
    for parameter in vae.parameters():
        parameter.data = 0.2 * noise(*parameter.shape, seed=2)
    losses = VaeLossOptions(latent_noise=latent_noise)
    x = noise(1, 3, 5, 32, 32)
    z = noise(1, *DiffusersCodec(vae).spec.latent_shape(5, 32, 32), seed=1)
    network = VaeNetwork(vae, VAE_SPECS["TitansVideoVAE"], losses, trainable=trainable)
    errors, levels = (0.1 * z, torch.tensor([0.1])) if latent_noise else (None, None)
    network(x, z, False, errors, levels).loss.sum().backward()
    trained = {name: p for name, p in vae.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert any(name.startswith("decoder.join") for name in trained) == (latent_noise > 0)


def test_a_third_of_the_rows_has_no_latent_noise_and_the_others_a_uniform_strength() -> None:
    options = TrainVaeOptions(losses=VaeLossOptions(latent_noise=0.5))
    network = trained()
    recipe = VaeRecipe(network, DiffusersCodec(network.vae).spec, options, {}, torch.device("cpu"))
    batch = make_batch(range(300), (5, 32, 32))
    _, _, errors, levels = recipe.prepare(batch)
    assert errors is not None
    assert levels is not None
    strengths = errors.flatten(1).std(1)
    assert_close(strengths, levels, atol=0.05, rtol=0.1)
    assert torch.equal(errors, recipe.prepare(batch)[2])
    assert float(levels.max()) < 0.5
    assert float((levels == 0).float().mean()) == pytest.approx(1 / 3, abs=0.06)
    assert float(levels[levels > 0].mean()) == pytest.approx(0.25, abs=0.03)


def wave(number: int, side: int, frames: int) -> Any:
    """Return a moving pattern, (T, H, W, 3) uint8."""
    y, x, t = np.meshgrid(np.arange(side), np.arange(side), np.arange(frames), indexing="ij")
    found = 120 + 60 * np.sin((x + number + t) / (3 + number)) + 50 * np.cos((y - t) / (4 + number))
    colours = np.stack([found, found[::-1], 255 - found], axis=-1).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(colours.transpose(2, 0, 1, 3))


def write_waves(folder: Path, count: int, side: int, frames: int) -> Path:
    """Write clips and two images without captions; return their manifest."""
    rows = []
    for i in range(count):
        write_video(folder / f"{i}.mp4", wave(i, side, frames), fps=8, crf=1)
        rows.append({"video": f"{i}.mp4", "id": f"clip{i}"})
    for i in range(2):
        Image.fromarray(np.full((side, side, 3), 60 * (i + 1), np.uint8)).save(folder / f"{i}.png")
        rows.append({"video": f"{i}.png", "id": f"image{i}"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_waves(tmp_path_factory.mktemp("clips"), 6, 32, 9)


def train(clips: Path, out: Path, more: str) -> None:
    words = f"train vae --manifest {clips} --buckets 32x32x9,32x32x1 --output-dir {out} --batch-size 2 --num-workers 0"
    assert main(f"{words} {more}".split()) == 0


def test_a_run_is_the_same_in_one_piece_and_resumed_and_leaves_a_vae(clips: Path, tmp_path: Path) -> None:
    flags = f"{SMALL} --block-stride 2 --gan-start 2 --gan-width 4 --crop-size 16 --crop-scale 1,2 --frame-counts 1,5,9"
    watched = f"{flags} --validate-every 2 --validation-split 0.3 --save-every 100 --lr-schedule constant"
    train(clips, tmp_path / "straight", f"{watched} --max-steps 4")
    train(clips, tmp_path / "broken", f"{watched} --max-steps 3")
    train(clips, tmp_path / "broken", f"{watched} --max-steps 4 --resume auto")
    one, two = (torch.load(tmp_path / name / "checkpoint-4/model.pt") for name in ("straight", "broken"))
    assert one["model"].keys() == two["model"].keys()
    assert any(name.startswith("discriminator.") for name in one["model"])
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    states = [torch.load(tmp_path / n / "checkpoint-4/training_state.pt")["optimizer"] for n in ("straight", "broken")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    lines = [json.loads(line) for line in (tmp_path / "straight/validation.jsonl").read_text().splitlines()]
    assert [line["measures"] for line in lines] == [list(MEASURES)] * len(lines)
    assert all(math.isfinite(x) for line in lines for x in line["losses"])
    assert (tmp_path / "straight" / lines[0]["samples"] / "sheet.png").is_file()
    assert main(["report", str(tmp_path / "straight")]) == 0
    assert "Held-out clips" in (tmp_path / "straight/report.html").read_text()
    vae = TitansVideoVAE.from_pretrained(tmp_path / "broken/vae")
    averaged = files.read(tmp_path / "broken").model
    assert all(torch.equal(value, averaged[f"vae.{name}"]) for name, value in vae.state_dict().items())
    assert vae.config.block_stride == 2
    assert len(vae.config.latents_std) == 4
    assert sum(weight**2 for weight in vae.config.latents_weight) == pytest.approx(4, rel=1e-3)
    with pytest.raises(CheckpointError, match="is a VAE, which makes no videos"):
        load_model(str(tmp_path / "broken"), Overrides(), "cpu")


def test_the_first_step_is_the_linear_codec(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it learns anything, the VAE reconstructs as principal components do, and every recipe takes its folder."""
    run, rates = tmp_path / "run", {}

    def spy(network: Any, options: Any) -> Any:
        made = build_optimizer(network, options)
        names = {p: name for name, p in network.named_parameters()}
        rates.update({names[p]: group["base_lr"] for group in made.param_groups for p in group["params"]})
        return made

    monkeypatch.setattr("titans_video.training.trainer.build_optimizer", spy)
    train(clips, run, f"{SMALL} --max-steps 1 --lr 1e-9 --validate-every 1 --validation-manifest {clips}")
    line = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    found = dict(zip(line["measures"], line["cells"][-1]["losses"], strict=True))
    assert found["PSNR dB"] > 25
    assert rates["vae.encoder.linear.weight"] == rates["vae.decoder.linear.weight"] == pytest.approx(1e-10)
    assert rates["vae.encoder.conv_in.weight"] == 1e-9
    monkeypatch.undo()
    words = f"train --manifest {clips} --pretrained-model {run} --empty-captions keep --resolution 32 --num-frames 9"
    more = f"--preset tiny --patch-size 1,2,2 --max-steps 1 --output-dir {tmp_path / 'sora'}"
    assert main(f"{words} {more}".split()) == 0


def test_a_pretrained_decoder_is_tuned_and_its_encoder_is_not(tmp_path: Path) -> None:
    folder, clips = make_vae("wan", tmp_path / "wan"), write_waves(tmp_path, 4, 16, 5)
    flags = "--buckets 16x16x5,16x16x1 --batch-size 4 --max-steps 30 --lr 1e-2 --ema-decay 0"
    train(clips, tmp_path / "run", f"--init-from {folder} --trainable decoder {flags}")
    before, after = DiffusersCodec.load(folder), DiffusersCodec.load(tmp_path / "run")
    assert after.vae.config.latents_mean == before.vae.config.latents_mean
    for name, value in before.vae.state_dict().items():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            assert torch.equal(value, after.vae.state_dict()[name]), name
    x = torch.from_numpy(np.stack([wave(i, 16, 5) for i in range(4)])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    errors = [float((codec.decode(codec.encode(x), 5) - x).square().mean()) for codec in (before, after)]
    assert errors[1] < 0.8 * errors[0]


def test_noise_conditioning_is_added_to_a_finished_vae(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exact latents are decoded as before, and noisy ones better than without."""
    train(clips, tmp_path / "first", f"{SMALL} --max-steps 2")
    flags = "--latent-noise 1 --noise-conditioning --trainable noise --temporal-loss rms --max-steps 60 --lr 1e-2"
    words = f"train vae --manifest {clips} --init-from {tmp_path / 'first'} --output-dir {tmp_path / 'x'} {flags}"
    assert main([*words.split(), "--buckets", "32x32x9"]) == 2
    assert f"--init-from {tmp_path / 'first'}/vae" in capsys.readouterr().err.replace("\n", " ")
    held_out = f"--validate-every 60 --validation-manifest {clips} --ema-decay 0"
    train(clips, tmp_path / "second", f"--init-from {tmp_path / 'first' / 'vae'} {flags} {held_out}")
    lines = [json.loads(line) for line in (tmp_path / "second" / "validation.jsonl").read_text().splitlines()]
    first, last = (dict(zip(line["measures"], line["losses"], strict=True))["PSNR dB"] for line in lines)
    assert last > first + 1
    before, after = (DiffusersCodec.load(tmp_path / name) for name in ("first", "second"))
    stored = {name: dict(codec.vae.config) for name, codec in (("before", before), ("after", after))}
    assert stored["after"]["latents_weight"] == stored["before"]["latents_weight"]
    for name, value in before.vae.state_dict().items():
        assert torch.equal(value, after.vae.state_dict()[name]), name
    x = torch.from_numpy(np.stack([wave(i, 32, 9) for i in range(6)])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    z = after.encode(x)
    assert torch.equal(after.decode(z, 9), before.decode(z, 9))
    wrong = z + noise(*z.shape, seed=3)
    plain = float((after.decode(wrong, 9) - x).square().mean())
    after.set_smooth(1.0)
    assert float((after.decode(wrong, 9) - x).square().mean()) < 0.8 * plain
    with pytest.raises(CodecError, match="takes no noise level"):
        before.set_smooth(0.1)


def test_flags_that_do_not_fit_are_refused(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"train vae --manifest {clips} --resolution 32 --output-dir {tmp_path}"
    for more, words in (
        ("--cache c", "--cache: a VAE is trained on pixels"),
        ("--trainable decoder", "give --init-from"),
        ("--trainable decoder --resume auto", "there is no run to resume from"),
        ("--trainable noise --resume auto", "--trainable noise trains what --noise-conditioning adds"),
        ("--noise-conditioning", "needs --latent-noise"),
        ("--crop-scale 1,2", "give --crop-size"),
        ("--crop-size 16 --crop-scale 3,2", "must not be above"),
        ("--crop-size 20", "must be a multiple of the VAE's stride"),
        ("--crop-size 64", "larger than the clips"),
        ("--frame-counts 4", "the nearest legal counts"),
        ("--block-stride 3", "block stride of 3 does not divide"),
        (f"--init-from {make_vae('wan', tmp_path / 'blocks')} --block-stride 2", "keeps its own shape"),
        ("--lpips nowhere.pt", "there is no such file"),
        ("--lpips-weight 1", "--lpips-weight: this loss is not used; give --lpips FILE too"),
        ("--gan-lr 1e-3 --gan-width 8", "--gan-lr and --gan-width: this loss is not used; give --gan-start N too"),
        (f"--init-from {make_vae('wan', tmp_path / 'wan')} --vae-width 8", "keeps its own shape"),
    ):
        assert main(f"{base} {more}".split()) == 2, more
        assert words in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("kind", ["titans", "ltx", "wan"])
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    side = 64 if kind == "ltx" else 16
    gradients = []
    for checkpointed in (False, True):
        network = trained(kind)
        if checkpointed:
            limit_activations(network, ActivationOptions(gradient_checkpointing=True))
            if kind == "wan":
                with pytest.raises(ConfigError, match="AutoencoderKLWan does not support it"):
                    network.recompute_activations()
                return
            network.recompute_activations()
        latents = DiffusersCodec(tiny_vae(kind)).spec.latent_shape(9, side, side)
        network(noise(1, 3, 9, side, side), noise(1, *latents)).loss.sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("kind", VAE_KINDS)
def test_every_kind_of_vae_is_trained_whole_or_by_its_decoder(kind: str) -> None:
    side, frames = (64, 9) if kind == "ltx" else (16, 5)
    vae = tiny_vae(kind)
    codec = DiffusersCodec(vae)
    frames = codec.spec.frames_at_most(frames) or 1
    x, z = noise(2, 3, frames, side, side), noise(2, *codec.spec.latent_shape(frames, side, side), seed=1)
    whole = VaeNetwork(vae, codec.vae_spec, VaeLossOptions())
    found = whole(x, z)
    moments = codec.encode_moments(x)
    assert_close(found.moments, moments, atol=1e-4, rtol=1e-3)
    mean, logvar = moments.chunk(2, dim=1)
    unscaled = mean + (logvar / 2).exp() * z
    assert_close(found.pixels, codec.decode(codec.scale(unscaled), frames), atol=1e-3, rtol=1e-3)
    found.loss.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in vae.encoder.parameters())
    decoder = VaeNetwork(vae, codec.vae_spec, VaeLossOptions(), trainable="decoder")
    decoder.zero_grad()
    decoder(x, z).loss.sum().backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert any(p.grad is not None and p.grad.any() for p in vae.decoder.parameters())


def test_the_start_is_fitted_to_clips_even_if_there_are_more_images(tmp_path: Path) -> None:
    manifest = write_waves(tmp_path, 1, 16, 5)
    options = DataOptions(manifest=(str(manifest),), buckets="16x16x5,16x16x1", empty_captions="keep")
    data = open_data(options, CodecSpec("plain", 3, (1, 4, 4), "causal"), (1, 1, 1), seed=0)
    assert data.sample_pixels(4).shape == (2, 3, 1, 16, 16)
    assert data.sample_pixels(4, longest=True).shape == (1, 3, 5, 16, 16)
