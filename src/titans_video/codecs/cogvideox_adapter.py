"""CogVideoX's VAE as an external codec: the documented `train.videos.cogvideox_vae_adapter`."""

from pathlib import Path

import torch

from titans_video.codecs.diffusers_vae import DiffusersCodec, class_name, find_vae, parse_dtype
from titans_video.errors import CodecError


class CogVideoXVAEWrapper(DiffusersCodec):
    """CogVideoX's VAE from a local folder.

    Args:
        pretrained_path: a CogVideoX pipeline's folder (with vae/ in it) or the VAE's own.
        dtype: float32, float16 or bfloat16 (or fp32, fp16, bf16).
        device: where it runs.
        load: read the weights now; otherwise when a clip is first encoded or decoded.
    Raises:
        CodecError: the folder holds no CogVideoX VAE, or an incomplete one.
    """

    def __init__(
        self,
        pretrained_path: str | Path,
        dtype: str | torch.dtype = "float32",
        device: torch.device | str = "cpu",
        load: bool = True,
    ) -> None:
        folder = find_vae(pretrained_path)
        name = class_name(folder)
        if name != "AutoencoderKLCogVideoX":
            raise CodecError(
                f"{folder} holds an {name}, not CogVideoX's VAE; --vae-backend diffusers --pretrained-model loads it."
            )
        self._open(folder, parse_dtype(dtype), load)
        self.to(device)
