"""Wan 2.1 (T2V, I2V, FLF2V) and 2.2 (T2V-A14B, I2V-A14B, TI2V-5B), as their diffusers pipelines run them.

An image-to-video network has further input channels: a mask of the given frames, and the latents of a clip that is
blank elsewhere. TI2V-5B has a timestep for each token instead, and given frames stay clean in its input.

Legend: B batch, C latent channels, t h w the latent grid, S pixel frames of a latent frame, N video tokens, M image
tokens, L text tokens, E width. Times are in [0, 1]; the network gets 1000 times as much.
Source: WanPipeline, WanImageToVideoPipeline and WanTransformer3DModel in diffusers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.context_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

from titans_video.codecs.base import Codec
from titans_video.codecs.diffusers import DiffusersCodec
from titans_video.codecs.image_encoder import VisionEncoder, to_pictures
from titans_video.diffusion.base import Constant, NoisySample, Prepared, count_tokens
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.errors import ConfigError, nearest_multiples
from titans_video.hub import from_folder
from titans_video.models.attention import WanProcessor
from titans_video.models.context_parallel import ContextPlan
from titans_video.models.flops import attention
from titans_video.pretrained.base import INDEX, Conditioning, ModelSpec, PipelineCall, tiny_network
from titans_video.pretrained.loading import Router, fill, load_part, lora_of, read_config
from titans_video.pretrained.sharing import SelfAttention, share_attention
from titans_video.schema import shown
from titans_video.seeding import generator
from titans_video.text.base import TextEncoder, lengthen
from titans_video.text.pipelines import CleanedStream, pipeline_text
from titans_video.types import PRECISIONS, Condition, TextCondition

TEXT_LENGTH = 512  # of every prompt; the attention to images counts on it
EXPERTS = {"high": "transformer", "low": "transformer_2"}
"""The folder of each expert, and its name in the pipeline and in the network."""
SHIFTS = ((600_000, 3.0), (10**12, 5.0))
"""The shift of training times up to so many pixels of a frame: 480p and 720p."""
SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


class Wan(ModelSpec):
    """Any Wan model, told apart by the configurations in its folder; raises ConfigError if they do not fit together."""

    blocks, time_axis, first_layer, text_length = ("blocks",), 2, "patch_embedding", TEXT_LENGTH

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_config(folder, INDEX)
        present = {name: part for name, part in EXPERTS.items() if (self.index.get(part) or [None])[0] is not None}
        self.boundary = self.index.get("boundary_ratio")
        if self.boundary is not None:
            self.experts = tuple(present)
        elif "high" not in present or "low" in present:
            raise ConfigError(f"{folder / INDEX}: two transformers need a boundary_ratio, and a single one none.")
        self.parts = tuple(present.values())
        self.config = read_config(folder / self.parts[0])
        self.patch_size = self.clip_grid = tuple(self.config["patch_size"])
        self.lora_prefixes = {f"{part}.": part for part in self.parts} if self.experts else {"": self.parts[0]}
        codec = self.codec("fp32", "cpu", load=False)
        self.codec_spec, self.mean, self.factor = codec.spec, Constant(codec.shift), Constant(codec.factor)
        self._describe()
        for part in self.parts:
            self._check_channels(part)
        self.image = VisionEncoder(folder) if self.config.get("image_dim") is not None else None

    def _describe(self) -> None:
        """Set what the variant decides."""
        self.per_token, is_image = bool(self.index.get("expand_timesteps")), "ImageToVideo" in self.index["_class_name"]
        self.fps, self.steps, self.guidance_scale, self.trained = 16.0, 50, 5.0, (81, 480, 832)
        newer = self.boundary is not None
        if self.per_token:
            self.name, self.tasks = "Wan 2.2 TI2V-5B", ("t2v", "i2v", "v2v")
            self.fps, self.trained = 24.0, (121, 704, 1280)
        elif not is_image:
            self.name, self.tasks = f"Wan {'2.2 T2V-A14B' if newer else '2.1 T2V'}", ("t2v",)
        else:
            self.name, self.tasks, self.end_frame = "Wan 2.1 I2V", ("i2v",), "no"
            if self.config.get("pos_embed_seq_len") is not None:
                self.name, self.end_frame = "Wan 2.1 FLF2V", "required"
            elif self.config.get("image_dim") is None:
                self.name, self.end_frame = "Wan 2.2 I2V-A14B", "optional"
        if newer:
            self.steps = 40
            self.guidance_scale, self.guidance_scale_2 = (3.5, 3.5) if is_image else (4.0, 3.0)

    def _check_channels(self, part: str) -> None:
        config, c = read_config(self.folder / part), self.codec_spec.channels
        if config.get("_class_name") != "WanTransformer3DModel":
            raise ConfigError(
                f"{self.folder / part / 'config.json'} describes the class {shown(config.get('_class_name'))}; "
                "WanTransformer3DModel is supported."
            )
        wanted = 2 * c + self.codec_spec.stride[0] if self.needs_image else c
        if (config["in_channels"], config["out_channels"]) != (wanted, c):
            raise ConfigError(
                f"{self.folder / part} has {config['in_channels']} input and {config['out_channels']} output channels, "
                f"but {self.index['_class_name']} on this VAE ({c} channels) needs {wanted} and {c}. An image-to-video "
                f"transformer ({2 * c + self.codec_spec.stride[0]} channels) belongs to WanImageToVideoPipeline, a "
                f"text-to-video one ({c}) to WanPipeline (_class_name in {INDEX}). Copy the whole folder of one model."
            )

    @property
    def cond_frames_have_loss(self) -> bool:
        return not self.per_token

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Reject sizes off the grid of tokens, beyond the known positions, and clips with nothing after a first frame.

        Raises CodecError for a frame count that is not 4k + 1.
        """
        grid = (len(self.codec_spec.frame_groups(frames)), height, width)
        steps = (1, *(s * p for s, p in zip(self.codec_spec.stride[1:], self.patch_size[1:], strict=True)))
        for name, size, step in zip(("--num-frames", "--height", "--width"), grid, steps, strict=True):
            if size % step:
                near = " and ".join(map(str, nearest_multiples(size, step)))
                raise ConfigError(f"{name} {size}: {self.name} needs multiples of {step}; the nearest are {near}.")
            known = int(self.config["rope_max_seq_len"])
            if size // step > known:
                raise ConfigError(f"{name} is too large: {self.name} knows {known} positions, not {size // step}.")
        if self.needs_image and grid[0] < 2:
            least = self.codec_spec.frames_at_least(2)
            raise ConfigError(
                f"{self.folder} continues a first frame, so a clip of 1 frame has nothing to train on. Give "
                f"--num-frames {least} or more; in training --buckets {height}x{width}x{least} also leaves shorter "
                "clips out."
            )

    def load_network(self, dtype: torch.dtype, experts: Sequence[str] = ()) -> nn.Module:
        return self._joined({part: self._load(part, dtype) for part in self._chosen(experts)})

    def _load(self, part: str, dtype: torch.dtype) -> nn.Module:
        return _with_processor(load_part(self._kind(), self.folder, part, dtype, self.loading))

    def _chosen(self, experts: Sequence[str]) -> list[str]:
        missing = [name for name in experts if name not in self.experts]
        if missing:
            known = ", ".join(self.experts) or "none, as it has one transformer"
            raise ConfigError(f"{self.folder} has no expert {missing[0]!r}; its experts are {known}.")
        return [EXPERTS[name] for name in self.experts if not experts or name in experts] or list(self.parts)

    def _joined(self, parts: dict[str, nn.Module]) -> nn.Module:
        return Router(parts) if self.experts else next(iter(parts.values()))

    def networks(self, network: nn.Module) -> dict[str, nn.Module]:
        if not self.experts:
            return {"": network}
        children = dict(network.named_children())
        return {name: children[part] for name, part in EXPERTS.items() if part in children}

    def meta_model(self) -> nn.Module:
        with torch.device("meta"):
            return self._joined({part: _with_processor(self._kind().from_config(self.config)) for part in self.parts})

    def tiny_model(self, blocks: Sequence[int] | None) -> nn.Module:
        return self._joined({part: self._tiny(part, blocks) for part in self.parts})

    def _tiny(self, part: str, blocks: Sequence[int] | None) -> nn.Module:
        network = tiny_network(self._kind().from_config, self.config, self.blocks[0], blocks, SkippedBlock)
        return fill(network, self.loading.weights(self.folder, part), lacking=set())

    def codec(self, dtype: str, device: torch.device | str, *, load: bool) -> DiffusersCodec:
        return DiffusersCodec.load(self.folder, dtype, weights=load).to(device)

    def text(self, dtype: str, device: torch.device | str, *, offload: bool = False) -> TextEncoder:
        return pipeline_text(CleanedStream, self.folder, dtype, TEXT_LENGTH, device, offload=offload)

    def image_encoder(self, dtype: str, device: torch.device | str) -> VisionEncoder | None:
        return None if self.image is None else VisionEncoder(self.folder, dtype).to(device)

    def scheduler(self) -> Any:
        import diffusers

        config = read_config(self.folder / "scheduler", "scheduler_config.json")
        name = str(config.get("_class_name"))
        flow = "FlowMatch" in name or config.get("prediction_type") == "flow_prediction"
        if name not in SCHEDULERS or not flow:
            raise ConfigError(
                f"{self.folder / 'scheduler'} describes {shown(name)} with prediction_type "
                f"{shown(config.get('prediction_type'))}; Wan's is {' or '.join(SCHEDULERS)} for flow_prediction."
            )
        return from_folder(getattr(diffusers, name), self.folder / "scheduler")

    def process(self, frame: tuple[int, int] | None = None, shift: float | None = None) -> RectifiedFlow:
        self.scheduler()
        area = frame or self.trained[1:]
        return RectifiedFlow(shift=shift or next(s for most, s in SHIFTS if area[0] * area[1] <= most))

    def prepare(self, latents: Tensor, text: TextCondition, given: Conditioning | None, timesteps: Tensor) -> Prepared:
        condition = Condition(text=self._padded(text))
        tokens = count_tokens(latents.shape[2:], self.patch_size)
        if self.per_token:
            return self._with_clean_frames(latents, condition, given, timesteps, tokens)
        if self.needs_image:
            assert given is not None  # every row is i2v
            image = self.image_latents(given)
            condition = Condition(text=condition.text, cond_latents=image, image_states=given.image)
        return Prepared(latents, timesteps, condition, tokens)

    def image_latents(self, given: Conditioning) -> Tensor:
        """Return (B, S + C, t, h, w): a mask of the given pixel frames, and the latents of clips with only these."""
        latents = self._scaled(given.latents)
        mask = given.mask[..., None, None].expand(-1, -1, *latents.shape[2:]).to(latents)
        return torch.cat([mask, latents], dim=1)

    def _with_clean_frames(
        self, latents: Tensor, condition: Condition, given: Conditioning | None, timesteps: Tensor, tokens: int
    ) -> Prepared:
        times = timesteps[:, None].expand(-1, latents.shape[2])  # (B, t)
        if given is None:
            return Prepared(latents, times, condition, tokens, torch.zeros_like(times, dtype=torch.bool))
        clean = given.mask.all(dim=1)
        cells = clean[:, None, :, None, None]
        latents = torch.where(cells, self._scaled(given.latents), latents)
        return Prepared(latents, times.masked_fill(clean, 0.0), condition, tokens, clean, ~cells)

    def _scaled(self, unscaled: Tensor) -> Tensor:
        return (unscaled - self.mean.on(unscaled.device)) * self.factor.on(unscaled.device)

    def _padded(self, text: TextCondition) -> TextCondition:
        (states,), (mask,) = text.streams, text.masks
        return TextCondition((lengthen(states, TEXT_LENGTH),), (lengthen(mask, TEXT_LENGTH),), text.lengths)

    def predict(self, model: nn.Module, noisy: NoisySample, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        condition, x, times = prepared.condition, noisy.model_input, noisy.timesteps * 1000
        assert condition.text is not None
        if condition.cond_latents is not None:
            x = torch.cat([x, condition.cond_latents], dim=1)
        if times.ndim == 2:  # of frames -> of tokens
            _, p, q = self.patch_size
            times = times.repeat_interleave(x.shape[3] // p * (x.shape[4] // q), dim=1)
        inputs: dict[str, Any] = {"part": EXPERTS.get(prepared.expert or "")} if self.experts else {}
        image = condition.image_states
        if image is not None:
            # A network for two images takes each as a row of its own.
            image = image.unflatten(1, (2, -1)).flatten(0, 1) if self.end_frame == "required" else image
            inputs["encoder_hidden_states_image"] = image.to(dtype)
        value: Tensor = model(
            hidden_states=x.to(dtype),
            timestep=times,
            encoder_hidden_states=condition.text.streams[0].to(dtype),
            return_dict=False,
            **inputs,
        )[0]
        return value.float()

    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, object]:
        return {}

    def layer_rows(self, name: str, latent_shape: Sequence[int]) -> int:
        video, (part, *rest) = count_tokens(latent_shape[1:], self.patch_size), self._own_name(name).split(".")
        if part == "condition_embedder":
            times = video if self.per_token else 1
            return {"text_embedder": TEXT_LENGTH, "image_embedder": self._image_tokens()}.get(rest[0], times)
        if "attn2" in rest and {"to_k", "to_v"} & set(rest):
            return TEXT_LENGTH
        return self._image_tokens() if {"add_k_proj", "add_v_proj"} & set(rest) else video

    def attention_flops(self, latent_shape: Sequence[int]) -> int:
        video = count_tokens(latent_shape[1:], self.patch_size)
        width = int(self.config["num_attention_heads"]) * int(self.config["attention_head_dim"])
        keys = video + TEXT_LENGTH + self._image_tokens()
        return int(self.config["num_layers"]) * attention(video, keys, width)

    def _own_name(self, name: str) -> str:
        """Return the name of a layer in its own network."""
        return next((name.removeprefix(p) for p in self.lora_prefixes if p and name.startswith(p)), name)

    def _image_tokens(self) -> int:
        """Return M, of all images of a clip."""
        return 0 if self.image is None else self.image.tokens * (2 if self.end_frame == "required" else 1)

    def pipeline(self, network: nn.Module, codec: Codec, *, text: bool, dtype: torch.dtype) -> Any:
        """Return the pipeline; with one of two experts, that one denoises every step."""
        import diffusers

        assert isinstance(codec, DiffusersCodec)  # from `self.codec`
        names, networks = {kind: name for name, kind in PRECISIONS.items()}, self.networks(network)
        parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
        if text:
            (stream,) = self.text(names[dtype], "cpu").streams
            parts = {"tokenizer": stream.tokenizer, "text_encoder": stream.model}  # type: ignore[attr-defined]
        image = self.image_encoder(names[codec.vae.dtype], codec.device)
        if image is not None:
            parts |= {"image_encoder": image.model, "image_processor": image.processor}
        first, *second = networks.values()
        return getattr(diffusers, self.index["_class_name"])(
            vae=codec.vae,
            scheduler=self.scheduler(),
            transformer=first,
            transformer_2=second[0] if second else None,
            boundary_ratio=self.boundary if second else None,
            expand_timesteps=self.per_token,
            **parts,
        )

    @torch.no_grad()
    def encode(self, pipeline: Any, prompt: str, negative: str) -> tuple[TextCondition, TextCondition]:
        from diffusers import WanPipeline

        # The image pipeline's own method fails without the package ftfy.
        states = WanPipeline._get_t5_prompt_embeds(pipeline, [prompt, negative], max_sequence_length=TEXT_LENGTH)
        first, second = (TextCondition((x,), (x.ne(0).any(dim=2),)) for x in states.split(1))
        return first, second

    def run(self, pipeline: Any, call: PipelineCall) -> Tensor:
        if self.end_frame == "required" and call.last_image is None:
            raise ConfigError(f"{self.name} generates between a first and a last frame, and the last one is missing.")
        given = {"image": call.image, "last_image": call.last_image}
        pictures = {name: to_pictures(x)[0] for name, x in given.items() if x is not None}
        if self.per_token:
            pipeline = _for_task(pipeline, bool(pictures))
        elif pipeline.config.boundary_ratio is not None:
            pictures["guidance_scale_2"] = call.guidance_scale_2

        frames = pipeline(
            **pictures,
            prompt_embeds=self._padded(call.text).streams[0],
            negative_prompt_embeds=self._padded(call.negative).streams[0],
            height=call.height,
            width=call.width,
            num_frames=call.frames,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance_scale,
            generator=torch.Generator().manual_seed(call.seed),
            latents=call.noise,
            output_type="pt",
            callback_on_step_end=call.after_step,
        ).frames  # (1, T, 3, H, W) in [0, 1]
        return frames.transpose(1, 2).float().cpu() * 2 - 1

    def example(
        self,
        latent_shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        expert: str | None = None,
    ) -> tuple[NoisySample, Prepared]:
        _, p, q = self.patch_size
        shape, g = latent_shape or (self.config["out_channels"], 2, 2 * p, 2 * q), generator(seed, "small inputs")
        meta = torch.device(device).type == "meta"

        def normal(*size: int) -> Tensor:
            return torch.empty(size, device=device) if meta else torch.randn(size, generator=g).to(device)

        low = 0.0 if self.boundary is None else self.boundary
        expert = expert or next(iter(self.experts), None)
        noise, times = normal(1, *shape), torch.full((1,), low / 2 if expert == "low" else (1 + low) / 2, device=device)
        states = normal(1, TEXT_LENGTH, self.config["text_dim"])
        text = TextCondition((states,), (torch.ones(states.shape[:2], dtype=torch.bool, device=device),))
        further = self.config["in_channels"] - self.config["out_channels"]
        image = normal(1, further, *shape[1:]) if further else None
        seen = None if self.image is None else normal(1, self._image_tokens(), self.image.width)
        clean = None
        if self.per_token:
            clean = torch.arange(shape[1], device=device)[None] == 0
            times = times[:, None].expand(-1, shape[1]).masked_fill(clean, 0.0)
        condition = Condition(text=text, cond_latents=image, image_states=seen)
        prepared = Prepared(noise, times, condition, count_tokens(shape[1:], self.patch_size), clean, expert=expert)
        return NoisySample(noise, times, noise, noise.new_ones(())), prepared

    def context_plan(self, network: nn.Module) -> ContextPlan:
        hidden, table = (ContextParallelInput(1, expected_dims=n, split_output=n == 4) for n in (3, 4))
        split: dict[str, Any] = {}
        join: dict[str, Any] = {}
        parts = self.networks(network)
        for name in parts:
            part = EXPERTS.get(name, "")
            prefix = part and f"{part}."
            split |= {f"{prefix}rope": {0: table, 1: table}, f"{prefix}blocks.0": {"hidden_states": hidden}}
            join[f"{prefix}proj_out"] = ContextParallelOutput(1, expected_dims=3)
            if self.per_token:
                split[part] = {"timestep": ContextParallelInput(1, expected_dims=2)}
        blocks = [f"{EXPERTS[name]}.blocks" if name else "blocks" for name in parts]
        return ContextPlan(
            heads=int(self.config["num_attention_heads"]),
            tokens=lambda grid: count_tokens(grid, self.patch_size),
            split=split,
            join=join,
            attach=lambda exchange: share_attention(network, blocks, SelfAttention, exchange),
        )

    def load_with_diffusers(self, network: nn.Module, file: Path, only: set[str] | None) -> str:
        from diffusers import WanPipeline

        return lora_of(WanPipeline, network, file, only)

    def _kind(self) -> Any:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel


def _with_processor(network: Any) -> nn.Module:
    network.set_attn_processor(WanProcessor())  # of diffusers' AttentionMixin
    made: nn.Module = network
    return made


def _for_task(pipeline: Any, image: bool) -> Any:
    """Return TI2V-5B's pipeline for text or for an image, with the same parts and the same offloading."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    kind: Any = WanImageToVideoPipeline if image else WanPipeline
    if isinstance(pipeline, kind):
        return pipeline
    parts = {name: part for name, part in pipeline.components.items() if "image" not in name}
    other = kind(**parts, expand_timesteps=True)
    offloading = ("_all_hooks", "_offload_device", "_offload_gpu_id", "_progress_bar_config")
    vars(other).update({name: value for name, value in vars(pipeline).items() if name in offloading})
    return other


class SkippedBlock(nn.Module):
    """Replace a block that a tiny model leaves out."""

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        return hidden_states
