"""Tiny random models in the true on-disk format, written by the libraries' own `save_pretrained`.

Each `make_*` writes into a folder and returns it as a Path; none needs a network.
"""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["a red circle moving right", "a blue square moving up", "two cats asleep on a warm stone wall at dusk"]


def make_tokenizer(folder: Path, *, eos: bool = False, bos: bool = False, pad: bool = True, side: str = "right") -> Any:
    """A byte-level BPE trained in memory; returns the tokenizer, 300 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(WORDS * 4, trainer)
    if eos or bos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 2)])
    names: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, padding_side=side, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


def make_t5(folder: Path, *, umt5: bool = False, width: int = 16) -> Path:
    """T5 or UMT5, the whole encoder-decoder as released."""
    import transformers

    torch.manual_seed(0)
    name = "UMT5" if umt5 else "T5"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=320, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2
    )
    make_tokenizer(folder, eos=True)
    return _save(getattr(transformers, f"{name}ForConditionalGeneration")(config), folder)


_SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def make_llm(family: str, folder: Path, *, pad: bool = True, side: str = "left", **changes: Any) -> Path:
    """A causal language model; `family` is Qwen2, Qwen3, Mistral, Llama or Gemma3 (text)."""
    import transformers

    torch.manual_seed(0)
    kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**(_SMALL | changes))
    make_tokenizer(folder, bos=family in ("Llama", "Mistral", "Gemma3"), pad=pad, side=side)
    return _save(getattr(transformers, f"{family}ForCausalLM")(config), folder)


def make_qwen2(folder: Path) -> Path:
    """The LLM that end-to-end tests use."""
    return make_llm("Qwen2", folder)


def make_multimodal(family: str, folder: Path) -> Path:
    """A language model with eyes; `family` is Gemma3, Qwen2VL or Qwen2_5_VL."""
    import transformers

    torch.manual_seed(0)
    make_tokenizer(folder, bos=family == "Gemma3", side="left")
    if family == "Gemma3":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        gemma = transformers.Gemma3Config(text_config=_SMALL, vision_config=vision, mm_tokens_per_image=4)
        return _save(transformers.Gemma3ForConditionalGeneration(gemma), folder)
    text = _SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 1, "num_heads": 2, "patch_size": 14}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 16}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    return _save(getattr(transformers, f"{family}ForConditionalGeneration")(config), folder)


_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_captioner(family: str, folder: Path) -> Path:
    """A model that writes about images, with its processor, as on the hub; `family` is Qwen2_5_VL or Llava."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder, side="left")
    vision: dict[str, Any] = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    text = _SMALL | {"initializer_range": 0.5}  # large weights, so that the text depends on the pictures
    if family == "Llava":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.save_pretrained(folder)
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        strategy = {"vision_feature_select_strategy": "default"}
        settings = {"patch_size": 14, "num_additional_image_tokens": 1, "chat_template": _LLAVA_CHAT, **strategy}
        transformers.LlavaProcessor(images, tokenizer, **settings).save_pretrained(folder)
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, num_hidden_layers=2, image_size=28, patch_size=14),
            text_config=transformers.LlamaConfig(**text),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            **strategy,
        )
        return _save(transformers.LlavaForConditionalGeneration(config), folder)
    marks = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in marks]})
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84).save_pretrained(folder)
    path = folder / "preprocessor_config.json"  # the processor itself cannot be built without torchvision
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": _QWEN_CHAT}))
    numbers = dict(zip(marks, tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in marks]), strict=True))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    qwen = transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config={"depth": 1, "num_heads": 2, "patch_size": 14, "fullatt_block_indexes": [0]}
        | {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "initializer_range": 0.5},
        image_token_id=numbers["image_pad"],
        video_token_id=numbers["video_pad"],
        vision_start_token_id=numbers["vision_start"],
        vision_end_token_id=numbers["vision_end"],
    )
    return _save(transformers.Qwen2_5_VLForConditionalGeneration(qwen), folder)


def tiny_vae(kind: str, **changes: Any) -> Any:
    """A random VAE: kl, svd, cogvideox, wan, hunyuan, ltx or titans, with statistics that are not trivial."""
    import diffusers

    from titans_video.models.video_vae import TitansVideoVAE

    torch.manual_seed(0)
    blocks4: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 4}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "kl": (
            "AutoencoderKL",
            {
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "norm_num_groups": 4,
                "scaling_factor": 0.3,
                "shift_factor": 0.1,
            },
        ),
        "svd": (
            "AutoencoderKLTemporalDecoder",
            {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        ),
        "cogvideox": (
            "AutoencoderKLCogVideoX",
            blocks4
            | {
                "norm_num_groups": 2,
                "temporal_compression_ratio": 4,
                "down_block_types": ("CogVideoXDownBlock3D",) * 4,
                "up_block_types": ("CogVideoXUpBlock3D",) * 4,
                "sample_height": 64,
                "sample_width": 64,
            },
        ),
        "wan": ("AutoencoderKLWan", {"base_dim": 4, "z_dim": 16, "dim_mult": [1] * 4, "num_res_blocks": 1}),
        "hunyuan": ("AutoencoderKLHunyuanVideo", blocks4 | {"norm_num_groups": 4}),
        "ltx": (
            "AutoencoderKLLTXVideo",
            {
                "latent_channels": 8,
                "block_out_channels": (8, 8, 8, 8),
                "decoder_block_out_channels": (8, 8, 8, 8),
                "layers_per_block": (1, 1, 1, 1, 1),
                "decoder_layers_per_block": (1, 1, 1, 1, 1),
            },
        ),
    }
    if kind == "titans":
        widths = {"encoder_width": 8, "decoder_width": 8, "encoder_blocks": 1, "decoder_blocks": 1, "refine_width": 4}
        made = {"latent_channels": 4, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]}
        return TitansVideoVAE(**(widths | made | changes)).eval()
    name, config = configs[kind]
    vae = getattr(diffusers, name)(**(config | changes)).eval()
    if kind == "ltx":
        vae.latents_mean.copy_(torch.linspace(-0.2, 0.3, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    return vae


def make_vae(kind: str, folder: Path, **changes: Any) -> Path:
    """A diffusers pipeline's folder with vae/ in it; see `tiny_vae`."""
    tiny_vae(kind, **changes).save_pretrained(folder / "vae")
    return folder


VAE_KINDS = ("kl", "svd", "cogvideox", "wan", "hunyuan", "ltx", "titans")
LLM_FAMILIES = ("Qwen2", "Qwen3", "Mistral", "Llama", "Gemma3")
MULTIMODAL_FAMILIES = ("Gemma3", "Qwen2VL", "Qwen2_5_VL")


def make_cogvideox(folder: Path, kind: str = "2b", **changes: Any) -> Path:
    """A whole CogVideoX pipeline: `2b` (sincos positions), `5b` (rotary), `5b-i2v` (learned positions too), `1.5` or
    `1.5-i2v` (pairs of latent frames; `ofs`). Its LoRA layers start from weights that are not trivial."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    i2v, newer = kind.endswith("i2v"), kind.startswith("1.5")
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 8 if i2v else 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": 12,
        "use_rotary_positional_embeddings": kind != "2b",
        "use_learned_positional_embeddings": kind == "5b-i2v",
        "patch_size_t": 2 if newer else None,
        "patch_bias": not newer,
        "ofs_embed_dim": 8 if kind == "1.5-i2v" else None,
    }
    transformer = diffusers.CogVideoXTransformer3DModel(**(config | changes))
    for p in transformer.parameters():  # untrained, it would hardly look at its prompt, time and picture
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    t5 = transformers.T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = tiny_vae("cogvideox", scaling_factor=0.7, invert_scale_latents=kind == "5b-i2v")
    with torch.no_grad():  # a trained VAE is sure of its latents
        last = vae.encoder.conv_out.conv
        last.weight[4:] *= 0.1
        last.bias[4:] = -8.0
    pipeline = diffusers.CogVideoXImageToVideoPipeline if i2v else diffusers.CogVideoXPipeline
    scheduler = diffusers.CogVideoXDDIMScheduler if kind == "2b" else diffusers.CogVideoXDPMScheduler
    pipeline(
        tokenizer=make_tokenizer(folder / "tokenizer", eos=True),
        text_encoder=transformers.T5EncoderModel(t5).eval(),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=scheduler(
            prediction_type="v_prediction",
            snr_shift_scale=1.0 if newer else 3.0,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        ),
    ).save_pretrained(folder)
    return folder


COGVIDEOX_KINDS = ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v")
SVD_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}
"""The scheduler of the released Stable Video Diffusion."""


def make_svd(folder: Path, *, seed: int = 0) -> Path:
    """Stable Video Diffusion's folder: unet, vae, image_encoder, feature_extractor, scheduler, model_index.json.

    Its UNet has every kind of block, and weights that make all of its conditions count.
    """
    import diffusers
    import transformers

    torch.manual_seed(seed)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        transformer_layers_per_block=1,
        num_attention_heads=(2, 4),
        num_frames=6,
    )
    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            patch_size=56,
            projection_dim=16,
        )
    )
    diffusers.StableVideoDiffusionPipeline(
        vae=tiny_vae("svd"),
        image_encoder=clip.eval(),
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(**SVD_SCHEDULER),
        feature_extractor=transformers.CLIPImageProcessor(crop_size={"height": 224, "width": 224}),
    ).save_pretrained(folder)
    return folder
