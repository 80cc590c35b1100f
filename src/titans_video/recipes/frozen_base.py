"""The frozen network of a LoRA run: its precision, and where its weights are."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from titans_video.config.options import ActivationOptions
from titans_video.config.recipes import BaseOptions, ExpertOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.models.activations import limit_activations
from titans_video.models.streaming import stream_blocks
from titans_video.pretrained.base import ModelSpec, open_model_spec
from titans_video.recipes.pretrained import compile_network
from titans_video.training.distributed import AUTOCAST, Accelerator
from titans_video.types import PRECISIONS

STORAGE = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}  # torch dtype of each --layerwise-casting


def precision_of(options: BaseOptions, accelerator: Accelerator) -> torch.dtype:
    """Return the network's precision; raise ConfigError if the accelerator or the device cannot follow the flags."""
    dtype = (
        PRECISIONS[options.base_dtype]
        if options.base_dtype
        else AUTOCAST.get(accelerator.mixed_precision, torch.float32)
    )
    if dtype == torch.float16 and accelerator.device.type == "cpu":
        raise ConfigError("--base-dtype fp16: CPUs compute in fp32 or bf16; use --base-dtype bf16.")
    if accelerator.is_fsdp2 and (options.layerwise_casting != "none" or options.offload != "none"):
        raise ConfigError(
            "--layerwise-casting and --offload move weights layer by layer, and so does FSDP2; use one of them."
        )
    if accelerator.is_fsdp2 and options.quantize != "none" and torch.__version__ < "2.13":
        raise ConfigError(
            f"--quantize {options.quantize} with FSDP2 needs torch 2.13 or newer, and this is torch "
            f"{torch.__version__}: FSDP2 of older versions shards no integers. Update torch, or leave one of them out."
        )
    if options.offload == "group" and accelerator.num_processes > 1:
        raise ConfigError(
            "--offload group is for one process; several processes share the weights with FSDP2 "
            "(--config_file configs/accelerate/fsdp2.yaml)."
        )
    return dtype


def open_base(options: BaseOptions, accelerator: Accelerator, experts: ExpertOptions | None = None) -> ModelSpec:
    """Return the spec of `--pretrained-model`, which quantizes the blocks as it loads them if the flags ask for it.

    Raises ConfigError as `open_model_spec` and `precision_of`.
    """
    precision_of(options, accelerator)
    assert options.pretrained_model is not None  # checked with the flags
    experts = experts or ExpertOptions()
    spec = open_model_spec(options.pretrained_model, options.base_file, experts.experts)
    if options.quantize != "none":
        stays = options.offload == "none" and experts.idle_expert == "device" and not accelerator.is_fsdp2
        spec.loading = replace(
            spec.loading, quantize=options.quantize, device=accelerator.device if stays else torch.device("cpu")
        )
    return spec


def load_base(
    options: BaseOptions,
    activations: ActivationOptions,
    spec: ModelSpec,
    accelerator: Accelerator,
    experts: Sequence[str] = (),
) -> tuple[nn.Module, torch.dtype]:
    """Load the network as the flags ask, and return it with its precision; raises as `precision_of`.

    diffusers' own hooks cast and offload layers. They remain when adapters are injected. Only the `experts` of a model
    that has several networks are loaded.
    """
    dtype = precision_of(options, accelerator)
    network = spec.load_network(dtype, experts)
    limit_activations(network, activations)
    if options.layerwise_casting != "none":
        for part in spec.networks(network).values():
            part.enable_layerwise_casting(  # type: ignore[operator]
                storage_dtype=STORAGE[options.layerwise_casting], compute_dtype=dtype
            )
    if options.offload == "group":
        for part in spec.networks(network).values():
            offload_blocks(part, accelerator.device)
        network.offloaded = True  # type: ignore[assignment]  # read by `training.distributed.prepare`
    if options.compile == "on":
        compile_network(network, spec)
    return network, dtype


def offload_blocks(network: nn.Module, device: torch.device) -> None:
    """Keep the linear layers of the blocks in main memory while they are not used; the rest stays on the device.

    Offloading a layer after its forward removes weights that its backward pass uses. A linear layer's backward pass
    keeps a view, which checkpointing recreates. A norm's would silently use the norm's later contents, or the wrong
    device. `use_stream` would prefetch in one order of layers, but the backward pass has another.
    """
    from diffusers.hooks import apply_group_offloading

    for part in network.children():
        if not isinstance(part, nn.ModuleList):
            part.to(device)
            continue
        for module in part.modules():
            if isinstance(module, nn.Linear):
                apply_group_offloading(
                    module, onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
                )
            else:
                for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                    tensor.data = tensor.data.to(device)


def place(network: nn.Module, options: BaseOptions, device: torch.device) -> None:
    """Move adapters to the device, wherever the frozen weights are, and the frozen blocks to where they wait."""
    for _, layer in lora.layers(network):
        layer.move_adapters(device)
    if options.offload == "blocks":
        stream_blocks(network, device, options.offload_keep)
