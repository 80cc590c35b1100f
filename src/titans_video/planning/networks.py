"""Build the `Subject` of each recipe that trains a network of this project: SoraDiT, TitansVideoDiT, SVD, the VAE."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_video import checkpoint
from titans_video.codecs.diffusers import DiffusersCodec, find_vae, meta_vae
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.recipes import SoraOptions, SVDOptions, TitansOptions, TrainVaeOptions
from titans_video.diffusion.base import NoisySample
from titans_video.errors import ConfigError
from titans_video.models.flops import cost_of, layers_of, sora_flops, svd_flops, titans_flops
from titans_video.models.registry import build_network, sora_config, titans_config
from titans_video.models.svd_unet import choose_trainable
from titans_video.models.titans_dit import SegmentRollout
from titans_video.models.video_vae import TitansVideoVAE
from titans_video.planning.simulation import Run
from titans_video.planning.subject import (
    Clip,
    Subject,
    encoders_of,
    latent_shape,
    network_step,
    open_codec,
    open_text,
    tokens_of,
)
from titans_video.recipes.base import ClipGeometry
from titans_video.recipes.codec import codec_spec
from titans_video.recipes.svd import CLIP_GRID, check_folder, refuse_unused, trains_unet, unet_config
from titans_video.recipes.titans import plan_segments, trained_frames, with_vae
from titans_video.recipes.vae import EACH, conditioned, is_vae_folder, new_vae, rows_of_layer
from titans_video.training.vae_network import VaeNetwork, restored_vae
from titans_video.types import PRECISIONS, ImageCondition


def sora_subject(options: SoraOptions, recipe: str = "train") -> Subject:
    """Return SoraDiT with its codec and text encoders."""
    text = open_text(options.text)
    codec, spec = open_codec(options.codec)
    widths, patch = tuple(text.widths), options.model.patch_size
    network = _on_meta(sora_config(options.model, spec, widths))
    geometry = ClipGeometry(spec, patch)
    count = sora_flops(network)
    encoders, unknown = encoders_of(codec, text, None, PRECISIONS[options.codec.vae_dtype])
    return Subject(
        recipe=recipe,
        name="SoraDiT",
        network=network,
        stacks=("blocks",),
        spec=spec,
        clip_grid=patch,
        step=network_step(geometry, widths),
        tokens=partial(tokens_of, geometry),
        flops=lambda clip: float(count(latent_shape(geometry, clip), clip.lengths)),
        codec=codec,
        encoders=encoders,
        widths=widths,
        unknown=unknown,
    )


def titans_subject(options: TitansOptions) -> tuple[Subject, TitansOptions]:
    """Return TitansVideoDiT, and the options with the frames and the budget of tokens that its segments use."""
    options = with_vae(options)
    spec, memory, (pt, ph, pw) = codec_spec(options.codec), options.memory, options.model.patch_size
    plan = plan_segments(memory, options.data.num_frames, spec, pt)
    budget = options.data.tokens_per_batch
    budget = budget and max(budget * pt // plan.latents, 1)
    options = replace(options, data=replace(options.data, num_frames=plan.frames, tokens_per_batch=budget))
    text = open_text(options.text)
    codec, _ = open_codec(options.codec)
    widths = tuple(text.widths)
    network: Any = _on_meta(titans_config(memory, options.model, spec, widths))
    geometry = ClipGeometry(spec, (pt, ph, pw), partial(trained_frames, plan, 0))  # after the curriculum
    count = titans_flops(network, plan.latents, plan.overlap, memory.bptt_segments)

    def rollout(noisy: NoisySample) -> dict[str, Any]:
        B, t = noisy.timesteps.shape
        x, time = noisy.model_input, noisy.timesteps
        state = None
        if memory.memory != "none" and memory.write_noise:
            state = torch.empty(B, t // plan.latents, memory.mem_tokens, network.config.model_dim)
        written, shown = torch.empty_like(x), torch.empty_like(x)
        return {
            "rollout": SegmentRollout(
                plan.latents, written, time, shown, time, plan.overlap, memory.bptt_segments, state
            )
        }

    encoders, unknown = encoders_of(codec, text, None, PRECISIONS[options.codec.vae_dtype])
    subject = Subject(
        recipe="train titans",
        name="TitansVideoDiT",
        network=network,
        stacks=() if memory.memory == "neural" else ("blocks",),
        spec=spec,
        clip_grid=(plan.latents, ph, pw),
        step=network_step(geometry, widths, further=rollout),
        tokens=partial(tokens_of, geometry),
        flops=lambda clip: float(count(latent_shape(geometry, clip), clip.lengths)),
        codec=codec,
        encoders=encoders,
        widths=widths,
        unknown=unknown,
    )
    return subject, options


def svd_subject(options: SVDOptions) -> Subject:
    """Return Stable Video Diffusion's UNet, or SoraDiT if `--architecture` chooses it."""
    refuse_unused(options)
    if not trains_unet(options):
        return sora_subject(options, "train svd")
    check_folder(options)
    folder = options.codec.pretrained_model
    assert folder is not None  # check_folder reads it
    text = open_text(options.text, needed=False)
    codec, spec = open_codec(options.codec)
    widths = tuple(text.widths)
    network: Any = _on_meta({"network": "SVDUNet", "unet_config": unet_config(folder), "text_widths": widths})
    choose_trainable(network, options.tune.trainable)
    geometry = ClipGeometry(spec, cond_frames_have_loss=True)
    encoder = ImageEncoder(folder, options.codec.vae_dtype, weights=False)

    def image(clip: Clip) -> ImageCondition:
        c, _, h, w = latent_shape(geometry, clip)
        B = clip.rows
        return ImageCondition(torch.empty(B, 1, encoder.width), torch.empty(B, c, h, w), torch.empty(B, 3))

    count = svd_flops(network)
    encoders, unknown = encoders_of(codec, text, encoder, PRECISIONS[options.codec.vae_dtype])
    return Subject(
        recipe="train svd",
        name="Stable Video Diffusion",
        network=network,
        stacks=(),
        spec=spec,
        clip_grid=CLIP_GRID,
        step=network_step(geometry, widths, clean=False, image=image),
        tokens=partial(tokens_of, geometry),
        flops=lambda clip: float(count(latent_shape(geometry, clip), clip.lengths)),
        codec=codec,
        encoders=encoders,
        widths=widths,
        unknown=unknown,
    )


def vae_subject(options: TrainVaeOptions) -> Subject:
    """Return the VAE that is trained, with its discriminator."""
    with torch.device("meta"):
        vae: Any = _vae(options)
    codec, o = DiffusersCodec(vae), options.vae
    spec = codec.spec
    with torch.device("meta"):
        network = VaeNetwork(vae, codec.vae_spec, options.losses, trainable=o.trainable)
    if options.activations.every:
        network.recompute_activations()
    layers = layers_of(vae) if isinstance(vae, TitansVideoVAE) else []

    def pixels_of(clip: Clip) -> tuple[int, int, int]:
        return (clip.frames, *((o.crop_size, o.crop_size) if o.crop_size else (clip.height, clip.width)))

    def tokens(clip: Clip) -> int:
        _, t, h, w = spec.latent_shape(*pixels_of(clip))
        return t * h * w

    def flops(clip: Clip) -> float:
        t, h, w = pixels_of(clip)
        rows = partial(rows_of_layer, clips=1, cells=tokens(clip), pixels=t * h * w, side=spec.stride[1])
        return float(cost_of(layers, rows, 0).training)

    def step(clip: Clip) -> Run:
        size, whole = pixels_of(clip), (clip.frames, clip.height, clip.width)

        def run(network: nn.Module) -> Tensor:
            network.batch = torch.empty(clip.rows, 3, *whole, dtype=torch.uint8)
            pixels, noise = torch.empty(clip.rows, 3, *size), torch.empty(clip.rows, *spec.latent_shape(*size))
            adversarial = options.losses.gan_start is not None
            noisy = options.losses.latent_noise > 0
            errors, levels = (torch.empty_like(noise), torch.empty(clip.rows)) if noisy else (None, None)
            loss: Tensor = network(pixels, noise, adversarial, errors, levels).loss.sum()
            return loss

        return run

    return Subject(
        recipe="train vae",
        name=type(vae).__name__,
        network=network,
        stacks=(),
        spec=spec,
        clip_grid=EACH,
        step=step,
        tokens=tokens,
        flops=flops if layers else None,
    )


def _on_meta(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = build_network(config).to("meta")
    return network


def _vae(options: TrainVaeOptions) -> nn.Module:
    """Return the VAE of `--init-from`, or a new one."""
    init_from = options.train.init_from
    if init_from is None:
        return new_vae(options.vae)
    if not is_vae_folder(init_from):
        found = restored_vae(checkpoint.read(Path(init_from).expanduser()).config)
    else:
        found = meta_vae(find_vae(init_from), torch.float32)
    if found is None:
        raise ConfigError(f"--init-from {init_from}: the VAE cannot be planned from its configuration.")
    return conditioned(found, options.vae)
