"""Build the `Subject` of the recipes that tune a pretrained pipeline, from the configurations in its folder."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_video.config.recipes import BaseOptions, FinetuneOptions, LoraRunOptions, PretrainedOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.models.activations import blocks_of
from titans_video.models.live_memory import fake_inputs
from titans_video.models.quantized import without_values
from titans_video.planning.simulation import Run
from titans_video.planning.subject import (
    NEEDS_CONFIG,
    Clip,
    Subject,
    encoders_of,
    latent_shape,
    tokens_of,
    with_batch,
)
from titans_video.pretrained.base import ModelSpec, open_model_spec
from titans_video.recipes.base import ClipGeometry, squared_error
from titans_video.recipes.experts import expert_schedule
from titans_video.recipes.finetune import choose_trainable
from titans_video.recipes.lora import adapter_config
from titans_video.recipes.pretrained import padded_frames, training_flops
from titans_video.training.distributed import AUTOCAST
from titans_video.types import PRECISIONS


def pretrained_subject(options: PretrainedOptions) -> Subject:
    """Return the network of `train lora` or `train finetune`; raise ConfigError if its folder lacks a configuration."""
    base = options.base
    folder = base.pretrained_model
    if folder is None or not Path(folder).expanduser().is_dir():
        raise ConfigError(f"--pretrained-model {folder} is not a folder on this machine. {NEEDS_CONFIG}")
    spec = open_model_spec(folder)  # --base-file has the same shapes
    schedule = expert_schedule(options.experts, spec, spec.process(shift=base.shift), options.train.seed)
    trained = schedule.trained if schedule else ()
    geometry = ClipGeometry(
        spec.codec_spec, spec.patch_size, lambda t, step: padded_frames(spec, t, step), spec.cond_frames_have_loss
    )
    dtype = AUTOCAST.get(options.train.mixed_precision, torch.float32)
    if isinstance(options, LoraRunOptions) and options.base.base_dtype:
        dtype = PRECISIONS[options.base.base_dtype]
    network = _network(options, spec, trained, dtype, quantized=True)
    count = training_flops(_network(options, spec, trained, dtype, quantized=False), spec)
    text, image = spec.text(base.text_dtype, "cpu", offload=base.text_offload == "cpu"), None
    codec = spec.codec(base.vae_dtype, "cpu", load=False)
    if spec.takes_image:
        image = spec.image_encoder(base.vae_dtype, "cpu")
    encoders, unknown = encoders_of(codec, text, image, PRECISIONS[base.vae_dtype])

    def step(clip: Clip) -> Run:
        spec.check_size(clip.frames, clip.height, clip.width)
        shape = latent_shape(geometry, clip)
        own = copy.copy(spec)
        if hasattr(own, "tables"):
            own.tables = {}  # a table without values must not be remembered
        example = spec.example(shape, "meta", expert=trained[0] if trained else None)

        def run(network: nn.Module) -> Tensor:
            noisy, prepared = fake_inputs(example, clip.rows)
            value = own.predict(network, noisy, prepared, dtype)
            parts = {"video": value} if isinstance(value, Tensor) else dict(value)
            losses = [
                squared_error(x, noisy.others.get(name, noisy), prepared.others.get(name, prepared)).flatten(1).sum()
                for name, x in parts.items()
            ]
            return torch.stack(losses).sum()

        return with_batch(run, clip, shape)

    return Subject(
        recipe="train lora" if isinstance(options, LoraRunOptions) else "train finetune",
        name=spec.name,
        network=network,
        stacks=tuple(_stacks(spec, network)),
        spec=spec.codec_spec,
        clip_grid=spec.clip_grid,
        step=step,
        tokens=lambda clip: tokens_of(geometry, clip),
        flops=lambda clip: float(count(latent_shape(geometry, clip), (spec.text_length,))),
        codec=codec,
        encoders=encoders,
        widths=tuple(text.widths),
        is_adapter=isinstance(options, LoraRunOptions),
        experts=trained if len(trained) > 1 else (),
        unknown=unknown,
    )


def _network(
    options: PretrainedOptions, spec: ModelSpec, trained: Sequence[str], dtype: torch.dtype, *, quantized: bool
) -> nn.Module:
    """Return the network as it is trained, on `meta`."""
    network = spec.meta_model()
    for expert, part in spec.network_parts.items() if trained else ():
        if expert not in trained:
            delattr(network, part)
    network.requires_grad_(False)
    if isinstance(options, FinetuneOptions):
        choose_trainable(network, options.weights.trainable, spec)
        return network
    assert isinstance(options, LoraRunOptions)
    _cast(network, spec, dtype)
    kind = options.base.quantize
    if quantized and kind != "none":
        inside = {id(layer) for block in blocks_of(network) for layer in block.modules()}
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.Linear) and id(layer) in inside:
                try:
                    network.set_submodule(name, without_values(layer, kind, dtype))
                except ValueError as e:
                    raise ConfigError(f"--quantize {kind}: {name} {e}.") from None
    adapter = adapter_config(options.lora)
    ranks = lora.ranks_of_targets(network, adapter)
    sizes = {name: (rank, adapter.alpha_of(rank)) for name, rank in ranks.items()}
    lora.add_adapter(network, lora.DEFAULT, sizes, dropout=adapter.dropout, kind=adapter.kind, factor=adapter.factor)
    lora.train_only(network)
    return network


def _cast(network: nn.Module, spec: ModelSpec, dtype: torch.dtype) -> None:
    """Give the weights the precision that diffusers' `from_pretrained` loads them in."""
    for part in spec.networks(network).values():
        kept = set(getattr(type(part), "_keep_in_fp32_modules", None) or ())
        for name, parameter in part.named_parameters():
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)


def _stacks(spec: ModelSpec, network: nn.Module) -> list[str]:
    """Return the names of the lists of blocks in all networks."""
    names = {id(part): name for name, part in network.named_modules()}
    prefixes = [names[id(part)] for part in spec.networks(network).values()]
    return [f"{prefix}.{blocks}".lstrip(".") for prefix in prefixes for blocks in spec.blocks]


def base_of(options: PretrainedOptions) -> BaseOptions | None:
    """Return the options of a frozen base; None if the whole network may be trained."""
    return options.base if isinstance(options.base, BaseOptions) else None
