"""CogVideoX 1.0 (2B, 5B) and 1.5, text-to-video and image-to-video, as their diffusers pipelines run them.

Legend: B batch, C latent channels, t h w the latent grid, t' its frames with padding, T H W pixel frames, height and
width, p and p_t the spatial and temporal patch, L text tokens, E text width.
Source: CogVideoXPipeline, CogVideoXImageToVideoPipeline and CogVideoXTransformer3DModel in diffusers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.hooks.context_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

from titans_video.codecs.base import Codec
from titans_video.codecs.diffusers import FirstFrameCodec
from titans_video.diffusion.base import NoisySample, Prepared, count_tokens
from titans_video.diffusion.v_prediction import VPredictionDDPM
from titans_video.errors import ConfigError
from titans_video.hub import from_folder
from titans_video.models.attention import CogVideoXProcessor
from titans_video.models.context_parallel import ContextPlan
from titans_video.models.flops import attention
from titans_video.pretrained.base import Conditioning, ModelSpec, PipelineCall, tiny_network
from titans_video.pretrained.loading import fill, load_part, lora_of, read_config
from titans_video.pretrained.sharing import JointAttention, share_attention
from titans_video.schema import shown
from titans_video.seeding import generator
from titans_video.text.base import TextEncoder
from titans_video.text.pipelines import PaddedStream, pipeline_text
from titans_video.types import PRECISIONS, Condition, TextCondition

MOST_TABLES = 16  # rotary tables to keep: one for each size of clips
OFS = 2.0  # the `ofs` argument of image-to-video models of version 1.5


class CogVideoX(ModelSpec):
    """CogVideoX, from the configurations in its folder; raises ConfigError if one is missing or malformed."""

    fps, steps, guidance_scale = 8.0, 50, 6.0
    blocks, time_axis, first_layer = ("transformer_blocks",), 1, "patch_embed"
    samples_first_frame = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder / "transformer")
        c = self.config
        self.tasks = ("i2v",) if c["in_channels"] != c["out_channels"] else ("t2v",)
        self.p_t = c.get("patch_size_t")
        self.name = f"CogVideoX {'1.5' if self.p_t else '1.0'}{' I2V' if self.takes_image else ''}"
        self.fps = 16.0 if self.p_t else 8.0
        p = int(c["patch_size"])
        self.clip_grid, self.patch_size = (1, p, p), (self.p_t or 1, p, p)
        self.text_length = int(c["max_text_seq_length"])
        self.tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        codec = self.codec("fp32", "cpu", load=False)
        self.codec_spec, self.vae_config = codec.spec, read_config(codec.folder or folder / "vae")
        _, side, _ = self.codec_spec.stride
        self.trained = int(c["sample_frames"]), int(c["sample_height"]) * side, int(c["sample_width"]) * side

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Reject image-to-video clips of one frame, and clips whose positions the network does not know.

        Learned positions have one size, and diffusers silently uses others elsewhere. Version 1.5 has a finite table.
        """
        if self.takes_image and frames < 2:
            least = self.codec_spec.frames_at_least(2)
            raise ConfigError(
                f"{self.folder} continues a first frame, so a clip of 1 frame has nothing to train on. Give "
                f"--num-frames {least} or more (other numbers are rounded down to a legal one); in training --buckets "
                f"{height}x{width}x{least} also leaves shorter clips out."
            )
        if self.p_t and (height > self.trained[1] or width > self.trained[2]):
            raise ConfigError(
                f"{self.folder} knows positions up to {self.trained[1]}x{self.trained[2]}; {height}x{width} is larger."
            )
        t = len(self.codec_spec.frame_groups(frames))
        if not self.config.get("use_learned_positional_embeddings"):
            return
        known_t = (self.trained[0] - 1) // self.codec_spec.stride[0] + 1
        if (t, height, width) == (known_t, *self.trained[1:]):
            return
        legal = (f for f in range(1, 8 * known_t) if self.codec_spec.is_legal(f))
        counts = [f for f in legal if len(self.codec_spec.frame_groups(f)) == known_t]
        raise ConfigError(
            f"{self.folder} has learned positions for {self.trained[1]}x{self.trained[2]} and "
            f"{' or '.join(map(str, counts))} frames only; at {height}x{width} and {frames} frames it would get "
            f"positions that it was not trained on. Give --height {self.trained[1]} --width {self.trained[2]} "
            f"--num-frames {counts[-1]}; in training --buckets {self.trained[1]}x{self.trained[2]}x{counts[-1]} also "
            "leaves shorter clips out."
        )

    def load_network(self, dtype: torch.dtype, experts: Sequence[str] = ()) -> nn.Module:
        return _with_processor(load_part(self._kind(), self.folder, "transformer", dtype, self.loading))

    def meta_model(self) -> nn.Module:
        with torch.device("meta"):
            return _with_processor(self._kind().from_config(self.config))

    def tiny_model(self, blocks: Sequence[int] | None) -> nn.Module:
        side = 2 * self.patch_size[1]
        config = {**self.config, "sample_height": side, "sample_width": side}
        network = tiny_network(self._kind().from_config, config, self.blocks[0], blocks, SkippedBlock)
        return fill(network, self.loading.weights(self.folder, "transformer"), lacking={"patch_embed.pos_embedding"})

    def codec(self, dtype: str, device: torch.device | str, *, load: bool) -> FirstFrameCodec:
        return FirstFrameCodec.load(self.folder, dtype, weights=load).to(device)

    def text(self, dtype: str, device: torch.device | str, *, offload: bool = False) -> TextEncoder:
        return pipeline_text(PaddedStream, self.folder, dtype, self.text_length, device, offload=offload)

    def scheduler(self) -> Any:
        import diffusers

        name = str(read_config(self.folder / "scheduler", "scheduler_config.json").get("_class_name"))
        if name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
            raise ConfigError(
                f"{self.folder / 'scheduler'} describes the class {shown(name)}, which is none of CogVideoX's."
            )
        return from_folder(getattr(diffusers, name), self.folder / "scheduler")

    def process(self, frame: tuple[int, int] | None = None, shift: float | None = None) -> VPredictionDDPM:
        if shift is not None:
            raise ConfigError(f"--shift {shift:g}: the timesteps of {self.name} are even and cannot be shifted.")
        return VPredictionDDPM.from_scheduler(self.scheduler())

    def padded_frames(self, t: int) -> int:
        p_t = self.patch_size[0]
        return -(-t // p_t) * p_t

    def prepare(
        self,
        latents: Tensor,
        text: TextCondition,
        given: Conditioning | None,
        timesteps: Tensor,
    ) -> Prepared:
        latents = self.pad(latents)
        image = None if given is None else self.image_latents(given.latents, latents.shape[2])
        tokens = count_tokens(latents.shape[2:], self.patch_size)
        return Prepared(latents, timesteps, Condition(text=text, cond_latents=image), tokens)

    def pad(self, latents: Tensor) -> Tensor:
        """Pad (B, C, t, h, w) to (B, C, t', h, w): version 1.5 takes pairs of latent frames.

        If t is odd the first frame is repeated, as in pretraining; the pipeline drops the copy after denoising.
        """
        missing = self.padded_frames(latents.shape[2]) - latents.shape[2]
        return torch.cat([latents[:, :, :1].expand(-1, -1, missing, -1, -1), latents], dim=2) if missing else latents

    def image_latents(self, unscaled: Tensor, frames: int) -> Tensor:
        """Return (B, C, t', h, w): the first frame's unscaled latents (B, C, 1, h, w), scaled, then zeros.

        `invert_scale_latents` in the VAE's configuration marks models trained on latents divided by the scaling factor.
        """
        factor = float(self.vae_config["scaling_factor"])
        first = unscaled / factor if self.vae_config.get("invert_scale_latents") else unscaled * factor
        b, c, _, h, w = first.shape
        return torch.cat([first, first.new_zeros(b, c, frames - 1, h, w)], dim=2)

    def predict(self, model: nn.Module, noisy: NoisySample, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        assert prepared.condition.text is not None
        (states,), image = prepared.condition.text.streams, prepared.condition.cond_latents
        x = noisy.model_input if image is None else torch.cat([noisy.model_input, image], dim=1)
        t, h, w = x.shape[2:]
        value = model(
            hidden_states=x.transpose(1, 2).to(dtype),  # (B, t', C or 2C, h, w)
            encoder_hidden_states=states.to(dtype),
            timestep=noisy.timesteps,
            ofs=x.new_full((1,), OFS, dtype=dtype) if self.config.get("ofs_embed_dim") is not None else None,
            return_dict=False,
            **self.positions(t, h, w, x.device),
        )[0]
        prediction: Tensor = value.transpose(1, 2).float()
        return prediction

    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, Any]:
        return {"image_rotary_emb": self.rotary(t, h, w, device)}

    def rotary(self, t: int, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines for a grid of padded t' frames; None for a model without rotary embedding.

        Version 1.0 rescales a grid of another size to its own; 1.5 counts from the corner.
        Source: `_prepare_rotary_positional_embeddings` of the pipelines.
        """
        if not self.config.get("use_rotary_positional_embeddings"):
            return None
        key = (t, h, w, device)
        if key not in self.tables:
            if len(self.tables) >= MOST_TABLES:
                self.tables.clear()
            self.tables[key] = self._rotary(t, h, w, device)
        return self.tables[key]

    def _rotary(self, t: int, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        p_t, p, _ = self.patch_size
        grid, known = (h // p, w // p), (int(self.config["sample_height"]) // p, int(self.config["sample_width"]) // p)
        width = int(self.config["attention_head_dim"])
        if self.p_t is None:
            crops = get_resize_crop_region_for_grid(grid, known[1], known[0])
            table = get_3d_rotary_pos_embed(width, crops, grid, t, device=device)
        else:
            table = get_3d_rotary_pos_embed(
                width, None, grid, (t + p_t - 1) // p_t, grid_type="slice", max_size=known, device=device
            )
        return cast(tuple[Tensor, Tensor], table)

    def layer_rows(self, name: str, latent_shape: Sequence[int]) -> int:
        video = count_tokens(latent_shape[1:], self.patch_size)
        if ".attn1." in name or ".ff." in name:
            return video + self.text_length  # both streams in one sequence
        if name.startswith("patch_embed.text_proj"):
            return self.text_length
        return video if name.startswith(("patch_embed.proj", "proj_out")) else 1

    def attention_flops(self, latent_shape: Sequence[int]) -> int:
        sequence = count_tokens(latent_shape[1:], self.patch_size) + self.text_length
        width = int(self.config["num_attention_heads"]) * int(self.config["attention_head_dim"])
        return int(self.config["num_layers"]) * attention(sequence, sequence, width)

    def pipeline(self, network: nn.Module, codec: Codec, *, text: bool, dtype: torch.dtype) -> Any:
        from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

        assert isinstance(codec, FirstFrameCodec)  # from `self.codec`
        kind = CogVideoXImageToVideoPipeline if self.takes_image else CogVideoXPipeline
        tokenizer, encoder = None, None
        if text:
            (stream,) = self.text(next(name for name, kind in PRECISIONS.items() if kind == dtype), "cpu").streams
            tokenizer, encoder = stream.tokenizer, stream.model  # type: ignore[attr-defined]
        return kind(
            tokenizer=tokenizer, text_encoder=encoder, vae=codec.vae, transformer=network, scheduler=self.scheduler()
        )

    @torch.no_grad()
    def encode(self, pipeline: Any, prompt: str, negative: str) -> tuple[TextCondition, TextCondition]:
        states = pipeline.encode_prompt(prompt, negative, True, max_sequence_length=self.text_length)
        first, second = (TextCondition((x,), (torch.ones(x.shape[:2], dtype=torch.bool),)) for x in states)
        return first, second

    def run(self, pipeline: Any, call: PipelineCall) -> Tensor:
        first_frame = {} if call.image is None else {"image": (call.image[:, :, 0] + 1) / 2}

        frames = pipeline(
            **first_frame,
            prompt_embeds=call.text.streams[0],
            negative_prompt_embeds=call.negative.streams[0],
            height=call.height,
            width=call.width,
            num_frames=call.frames,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance_scale,
            generator=torch.Generator().manual_seed(call.seed),
            latents=call.noise.transpose(1, 2),
            max_sequence_length=self.text_length,
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
        side = 2 * self.patch_size[1]
        shape = latent_shape or (self.config["out_channels"], 2 * self.patch_size[0], side, side)
        states = (1, self.text_length, self.config["text_embed_dim"])
        meta, g = torch.device(device).type == "meta", generator(seed, "small inputs")

        def normal(*size: int) -> Tensor:
            return torch.empty(size, device=device) if meta else torch.randn(size, generator=g).to(device)

        noise, timesteps = normal(1, *shape), torch.full((1,), 500, device=device)
        text = TextCondition((normal(*states),), (torch.ones(states[:2], dtype=torch.bool, device=device),))
        image = normal(1, *shape) if self.takes_image else None
        prepared = Prepared(
            noise, timesteps, Condition(text=text, cond_latents=image), count_tokens(shape[1:], self.patch_size)
        )
        return NoisySample(noise, timesteps, noise, noise.new_ones(())), prepared

    def context_plan(self, network: nn.Module) -> ContextPlan:
        blocks, rotary = self.blocks[0], ContextParallelInput(split_dim=0, expected_dims=2)
        return ContextPlan(
            heads=int(self.config["num_attention_heads"]),
            tokens=lambda grid: count_tokens(grid, self.patch_size),
            split={
                f"{blocks}.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
                f"{blocks}.*": {"image_rotary_emb": [rotary, rotary]},
            },
            join={"proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)},
            attach=lambda exchange: share_attention(network, self.blocks, JointAttention, exchange),
        )

    def load_with_diffusers(self, network: nn.Module, file: Path, only: set[str] | None) -> str:
        from diffusers import CogVideoXPipeline

        return lora_of(CogVideoXPipeline, network, file, only)

    def _kind(self) -> Any:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel


def _with_processor(network: Any) -> nn.Module:
    network.set_attn_processor(CogVideoXProcessor())  # of diffusers' AttentionMixin
    made: nn.Module = network
    return made


class SkippedBlock(nn.Module):
    """Replace a block that a tiny model leaves out."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return hidden_states, encoder_hidden_states
