"""The frozen transformer of a LoRA run: its precision, what its weights are stored in, and where they wait."""

import torch
from torch import nn

from titans_video.config.options import BaseOptions
from titans_video.errors import ConfigError
from titans_video.models import lora
from titans_video.pretrained.base import ModelSpec
from titans_video.pretrained.loading import compile_blocks
from titans_video.training.distributed import AUTOCAST, Accelerator, all_gather_object
from titans_video.types import PRECISIONS

STORAGE = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def precision_of(options: BaseOptions, accelerator: Accelerator) -> torch.dtype:
    """What the transformer computes in.

    Raises:
        ConfigError: the flags ask for what the engine or the device cannot do.
    """
    dtype = (
        PRECISIONS[options.base_dtype]
        if options.base_dtype
        else AUTOCAST.get(accelerator.mixed_precision, torch.float32)
    )
    if dtype == torch.float16 and accelerator.device.type == "cpu":
        raise ConfigError("--base-dtype fp16: CPUs compute in fp32 or bf16; use --base-dtype bf16.")
    if accelerator.is_fsdp2 and (options.layerwise_casting != "none" or options.offload != "none"):
        raise ConfigError(
            "--layerwise-casting and --offload move weights layer by layer, and so does FSDP2; give one of them."
        )
    if options.offload == "group" and accelerator.num_processes > 1:
        raise ConfigError(
            "--offload group is for one process; several share the weights by FSDP2 "
            "(--config_file configs/accelerate/fsdp2.yaml)."
        )
    return dtype


def load_base(options: BaseOptions, spec: ModelSpec, accelerator: Accelerator) -> tuple[nn.Module, torch.dtype]:
    """The transformer as the flags ask for it, and the precision that it computes in.

    Layers are cast and offloaded by diffusers' own hooks, which stay on them when adapters are put beside.

    Raises:
        ConfigError: as `precision_of`.
    """
    dtype = precision_of(options, accelerator)
    network = spec.load_network(dtype)
    if options.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' ModelMixin
    if options.layerwise_casting != "none":
        network.enable_layerwise_casting(  # type: ignore[operator]
            storage_dtype=STORAGE[options.layerwise_casting], compute_dtype=dtype
        )
    if options.offload == "group":
        offload_blocks(network, accelerator.device)
    if options.compile:
        compile_blocks(network)
    return network, dtype


def offload_blocks(network: nn.Module, device: torch.device) -> None:
    """Let the linear layers of the blocks wait in main memory; the rest, which is little, lies on the device.

    A layer that is sent away after its forward takes along the weights that its backward pass needs. A linear layer's
    backward pass holds on to a view of its own, which checkpointing makes anew; a norm's would compute with whatever
    lies in the norm by then, in silence or on the wrong device. Nothing is fetched ahead (`use_stream`): that knows one
    order of layers, and the backward pass has another.
    """
    from diffusers.hooks import apply_group_offloading

    network.offloaded = True  # type: ignore[assignment]  # told to `training.accelerator.prepare`
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


def move_adapter(network: nn.Module, device: torch.device) -> None:
    """What is trained lies on the device, wherever the frozen weights wait."""
    for _, layer in lora.layers(network):
        layer.lora_A.to(device)
        layer.lora_B.to(device)


def share_adapter_alone(network: nn.Module, fingerprint: str, accelerator: Accelerator) -> None:
    """Let DDP send only what is trained from process to process: each has read the frozen weights itself, and gloo
    cannot send those of 8 bits.

    Args:
        fingerprint: of the files that this process read.
    Raises:
        ConfigError: the processes have read different ones.
    """
    if len(set(all_gather_object(accelerator, fingerprint))) > 1:
        raise ConfigError("--pretrained-model: the machines of this run have different transformers in this folder.")
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    network._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]  # DDP's own name for them
