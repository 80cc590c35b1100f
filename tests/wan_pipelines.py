"""Tiny random Wan pipelines in the true on-disk format, one for each released variant.

    t2v-2.1   WanPipeline; a transformer of 16 channels.
    i2v-2.1   WanImageToVideoPipeline; 36 channels, and an image encoder.
    flf-2.1   the same with a first and a last frame.
    t2v-a14b  WanPipeline; two experts, with the boundary 0.875.
    i2v-a14b  WanImageToVideoPipeline; two experts of 36 channels, no image encoder, with the boundary 0.9.
    ti2v-5b   WanPipeline; 48 channels, a timestep for each token. WanImageToVideoPipeline opens the same folder.

Sizes are multiples of 16 pixels (32 for ti2v-5b), frame counts are 4k + 1, and text has 512 tokens of width 48.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.factories import make_tokenizer, tiny_vae

WAN_VARIANTS = ("t2v-2.1", "i2v-2.1", "flf-2.1", "t2v-a14b", "i2v-a14b", "ti2v-5b")
TEXT_WIDTH = 48
IMAGE_TOKENS = 17  # of the image encoder: 4 x 4 patches and the class token


def make_wan(folder: Path, variant: str, **changes: Any) -> Path:
    """Write a whole pipeline; `changes` are settings of its transformers. Every condition of the networks counts."""
    import diffusers

    torch.manual_seed(0)
    i2v, large = variant.startswith(("i2v", "flf")), variant == "ti2v-5b"
    kind = diffusers.WanImageToVideoPipeline if i2v else diffusers.WanPipeline
    pipe = kind(
        tokenizer=make_tokenizer(folder / "tokenizer", eos=True),
        text_encoder=_text_encoder(),
        vae=wan_vae(48 if large else 16),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if large else 3.0
        ),
        transformer=_transformer(variant, changes),
        transformer_2=_transformer(variant, changes) if variant.endswith("a14b") else None,
        boundary_ratio={"t2v-a14b": 0.875, "i2v-a14b": 0.9}.get(variant),
        expand_timesteps=large,
        **(_image_encoder() if variant in ("i2v-2.1", "flf-2.1") else {}),
    )
    pipe.save_pretrained(folder)
    return folder


def wan_vae(channels: int = 16) -> Any:
    """A VAE that is sure of its latents, as a trained one is; with 48 channels it is that of TI2V-5B."""
    sizes: dict[str, Any] = {"temperal_downsample": [False, True, True]}
    if channels == 48:
        sizes |= {"z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2}
        sizes |= {"latents_mean": torch.linspace(-0.2, 0.3, 48).tolist()}
        sizes |= {"latents_std": torch.linspace(0.5, 1.5, 48).tolist()}
        sizes |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
    vae = tiny_vae("wan", **sizes)
    with torch.no_grad():
        vae.quant_conv.weight[channels:] *= 0.1
        vae.quant_conv.bias[channels:] = -8.0
    return vae


def _transformer(variant: str, changes: dict[str, Any]) -> Any:
    import diffusers

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": {"t": 16, "i": 36, "f": 36}[variant[0]],
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    if variant == "ti2v-5b":
        config |= {"in_channels": 48, "out_channels": 48}
    if variant in ("i2v-2.1", "flf-2.1"):
        config |= {"image_dim": 16, "added_kv_proj_dim": 24}
    if variant == "flf-2.1":
        config |= {"pos_embed_seq_len": 2 * IMAGE_TOKENS}
    network = diffusers.WanTransformer3DModel(**(config | changes))
    for p in network.parameters():  # untrained, it would hardly look at its prompt, time and picture
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return network.eval()


def _text_encoder() -> Any:
    import transformers

    config = transformers.UMT5Config(
        vocab_size=320, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2
    )
    return transformers.UMT5EncoderModel(config).eval()


def _image_encoder() -> dict[str, Any]:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return {"image_encoder": transformers.CLIPVisionModel(config).eval(), "image_processor": processor}
