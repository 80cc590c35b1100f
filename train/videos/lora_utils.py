"""LoRA for any linear layer of any network, and its files; see docs/guides/lora.md."""
# ruff: noqa: F401, I001

from titans_video.models.lora import LoraConfig, LoraLinear, adapters, find_targets, inject, layer_sizes, load, merge
from titans_video.models.lora import remove, set_adapters, state_dict, train_only, unmerge
from titans_video.models.lora_io import LoraFile, read, write
