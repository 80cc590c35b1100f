"""Two toy pretrained models. Together they use every part of `ModelSpec`; see tests/unit/test_pretrained_toys.py.

`Duet` has packed tokens with a timestep each, two experts for two ranges of timesteps, two text streams (one of them a
pooled vector), a second modality with its own loss, and a reversed time and velocity. `Frames` has a timestep for each
latent frame and further input channels for a clean first frame.

Legend: B batch, C latent channels, t h w the latent grid, N = t h w tokens, M audio tokens, L text tokens, D width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from titans_video.checkpoint import fingerprint_folder
from titans_video.codecs.base import Codec, IdentityCodec
from titans_video.config.options import TextOptions
from titans_video.diffusion.base import NoisySample, Prepared
from titans_video.diffusion.rectified_flow import RectifiedFlow
from titans_video.diffusion.samplers import euler, guided
from titans_video.errors import ConfigError
from titans_video.models.flops import attention
from titans_video.pretrained.base import Conditioning, ModelSpec, PipelineCall
from titans_video.seeding import derive_seed, generator, seeded_randn
from titans_video.text.base import Lengths, TextEncoder
from titans_video.types import Condition, TextCondition

FACTOR = (1, 4, 4)
CHANNELS = 48
DIM, WORDS, POOLED, AUDIO = 16, 8, 6, 4
BOUNDARY = 0.6
"""The timestep from which Duet's `high` expert is used."""


class HashStream:
    """A text encoder whose states are noise that is a function of the prompt; one token for a pooled vector."""

    def __init__(self, width: int, length: int) -> None:
        self.width, self.length, self.device = width, length, torch.device("cpu")

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        states = seeded_randn((self.length, self.width), [derive_seed(0, "toy", prompt) for prompt in prompts])
        return states.to(self.device), torch.ones(len(prompts), self.length, dtype=torch.bool, device=self.device)

    def measure(self, prompts: Sequence[str]) -> Lengths:
        return Lengths(self.length, "tokens", [0 for _ in prompts])

    def fingerprint(self) -> str:
        return f"toy-{self.width}-{self.length}"

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def release(self) -> None: ...


class ToyBlock(nn.Module):
    """Attention of all tokens to all tokens and to the text, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(DIM, DIM)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        everything = torch.cat([x, text], dim=1)
        q, k, v = self.to_q(x), self.to_k(everything), self.to_v(everything)
        return x + self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v))


_SET_ADAPTER_SCALE_FN_MAPPING["ToyTransformer"] = lambda network, weights: weights  # diffusers 0.37 has no default


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Tokens of one or two modalities, each with its own timestep, and text."""

    _no_split_modules: ClassVar = ["ToyBlock"]

    @register_to_config
    def __init__(
        self, channels: int, out_channels: int, text_widths: list[int], audio: int = 0, depth: int = 2
    ) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(channels, DIM), nn.Linear(DIM, out_channels)
        self.audio_in = nn.Linear(audio, DIM) if audio else None
        self.audio_out = nn.Linear(DIM, audio) if audio else None
        self.text_in = nn.ModuleList(nn.Linear(width, DIM) for width in text_widths)
        self.time_in = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(depth))

    def forward(
        self,
        tokens: Tensor,
        timesteps: Tensor,
        texts: Sequence[Tensor],
        audio: Tensor | None = None,
        audio_timesteps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C), (B, N), each (B, L, E), (B, M, A), (B, M) -> (B, N, C), (B, M, A)."""  # fmt: skip
        x = self.proj_in(tokens) + self.time_in(timesteps[..., None])
        if self.audio_in is not None and audio is not None and audio_timesteps is not None:
            x = torch.cat([x, self.audio_in(audio) + self.time_in(audio_timesteps[..., None])], dim=1)
        text = torch.cat([layer(states) for layer, states in zip(self.text_in, texts, strict=True)], dim=1)
        for block in self.blocks:
            x = block(x, text)
        video, rest = x[:, : tokens.shape[1]], x[:, tokens.shape[1] :]
        return self.proj_out(video), None if self.audio_out is None else self.audio_out(rest)


class ToyExperts(nn.Module):
    """Two networks in one forward: each row goes to the expert of its range of timesteps."""

    _no_split_modules: ClassVar = ["ToyBlock"]

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(self, is_high: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        high, low = self.high(*inputs), self.low(*inputs)  # both, so that every parameter has a gradient
        rows = is_high[:, None, None]
        return torch.where(rows, high[0], low[0]), torch.where(rows, high[1], low[1])


class ToySpec(ModelSpec):
    """The parts that both toys share: folders, codec, process, and a pipeline with this project's own Euler sampler."""

    folders: ClassVar[tuple[str, ...]] = ("transformer",)
    streams: ClassVar[tuple[tuple[int, int], ...]] = ((WORDS, 3),)

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, type(self).__name__
        self.tasks = ("i2v",)
        self.codec_spec = IdentityCodec(FACTOR).spec
        self.clip_grid = self.patch_size = (1, 1, 1)
        self.text_length, self.trained = 3, (4, 16, 16)
        self.fps, self.steps, self.guidance_scale = 8.0, 2, 2.0
        self.configs = [json.loads((folder / name / "config.json").read_text()) for name in self.folders]

    @property
    def cond_frames_have_loss(self) -> bool:
        return False

    def check_size(self, frames: int, height: int, width: int) -> None:
        if frames < 2:
            raise ConfigError("a toy continues a first frame: give --num-frames 2 or more.")

    def load_network(self, dtype: torch.dtype, experts: Sequence[str] = ()) -> nn.Module:
        parts = [ToyTransformer.from_pretrained(self.folder / name, torch_dtype=dtype) for name in self.folders]
        return self.joined([part.eval().requires_grad_(False) for part in parts])

    def joined(self, parts: list[nn.Module]) -> nn.Module:
        return parts[0]

    def meta_model(self) -> nn.Module:
        with torch.device("meta"):
            return self.joined([ToyTransformer.from_config(config) for config in self.configs])

    def tiny_model(self, blocks: Sequence[int] | None) -> nn.Module:
        assert blocks is None, "a toy is never large"
        return self.load_network(torch.float32)

    def fingerprint(self) -> str:
        return "-".join(fingerprint_folder(self.folder / name) for name in self.folders)

    def codec(self, dtype: str, device: torch.device | str, *, load: bool) -> IdentityCodec:
        return IdentityCodec(FACTOR).to(device)

    def text(self, dtype: str, device: torch.device | str, *, offload: bool = False) -> TextEncoder:
        options = TextOptions(
            text_model=str(self.folder), llm_model=str(self.folder) if len(self.streams) > 1 else None
        )
        return TextEncoder([HashStream(*sizes) for sizes in self.streams], options).to(device)

    def process(self, frame: tuple[int, int] | None = None, shift: float | None = None) -> RectifiedFlow:
        return RectifiedFlow(shift=shift or 3.0)

    def scheduler(self) -> Any:
        return SimpleNamespace(config={})

    def pipeline(self, network: nn.Module, codec: Codec, *, text: bool, dtype: torch.dtype) -> Any:
        quiet = lambda **_: None  # noqa: E731
        return SimpleNamespace(
            transformer=network,
            codec=codec,
            vae=SimpleNamespace(dtype=torch.float32),
            scheduler=self.scheduler(),
            text_encoder=self.text("fp32", "cpu") if text else None,
            set_progress_bar_config=quiet,
            to=lambda device: None,
        )

    def encode(self, pipeline: Any, prompt: str, negative: str) -> tuple[TextCondition, TextCondition]:
        return pipeline.text_encoder([prompt]), pipeline.text_encoder([negative])

    @torch.no_grad()
    def run(self, pipeline: Any, call: PipelineCall) -> Tensor:
        process, network = self.process(), pipeline.transformer
        assert call.image is not None  # the backend checks it
        first = pipeline.codec.encode(call.image)
        shape = call.noise.shape

        def predict(x: Tensor, time: float, condition: Condition) -> Tensor:
            given = first_frame(first.expand(len(x), -1, -1, -1, -1))
            prepared = self.prepare(x, condition.text, given, x.new_zeros(len(x)))
            prepared = prepared.at(time)
            noisy = process.add_noise(prepared.latents, torch.zeros_like(prepared.latents), prepared.timesteps)
            state = NoisySample(prepared.latents, noisy.timesteps, noisy.target, noisy.weight, noisy_others(prepared))
            value = self.predict(network, state, prepared, torch.float32)
            value = value if isinstance(value, Tensor) else value["video"]
            return self.unpacked(process.to_x0(value, prepared.latents, prepared.timesteps), shape)

        denoise = guided(predict, Condition(text=call.text), call.negative, call.guidance_scale)
        schedule = process.schedule(call.steps, call.noise[0, 0].numel())
        latents = euler(denoise, call.noise, schedule, on_step=call.on_step)
        return pipeline.codec.decode(latents, call.frames).clamp(-1, 1)

    def unpacked(self, latents: Tensor, shape: torch.Size) -> Tensor:
        return latents

    def positions(self, t: int, h: int, w: int, device: torch.device) -> dict[str, object]:
        return {}

    def layer_rows(self, name: str, latent_shape: Sequence[int]) -> int:
        video, audio, text = self.sequence(latent_shape)
        if "text_in" in name:
            return self.streams[int(name.split("text_in.")[1][0])][1]
        rows = {"proj_in": video, "proj_out": video, "audio_in": audio, "audio_out": audio}
        found = [n for part, n in rows.items() if part in name]
        return found[0] if found else video + audio + (text if "to_k" in name or "to_v" in name else 0)

    def attention_flops(self, latent_shape: Sequence[int]) -> int:
        video, audio, text = self.sequence(latent_shape)
        blocks = sum(config["depth"] for config in self.configs)
        return blocks * attention(video + audio, video + audio + text, DIM)

    def sequence(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the tokens of the video, the audio and the text."""
        _, t, h, w = latent_shape
        return t * h * w, t if self.configs[0]["audio"] else 0, sum(length for _, length in self.streams)

    def load_with_diffusers(self, network: Any, file: Path, only: set[str] | None) -> str:
        """Load as diffusers does: one network at a time, each by its prefix."""
        tensors = load_file(file)
        for module, prefix in self.lora_prefixes.items():
            part = network.get_submodule(module.rstrip(".")) if module else network
            part.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name="file")
        if any(self.lora_prefixes):
            parts = [network.get_submodule(module.rstrip(".")) for module in self.lora_prefixes]
            network.set_adapters = lambda name, weights: [part.set_adapters(name, weights) for part in parts]
        return "file"


def first_frame(latents: Tensor) -> Conditioning:
    """The condition of first frames (B, C, 1, h, w)."""
    return Conditioning(latents, torch.ones(len(latents), 1, 1, dtype=torch.bool, device=latents.device))


def noisy_others(prepared: Prepared) -> dict[str, NoisySample]:
    return {
        name: NoisySample(part.latents, part.timesteps, part.latents, part.latents.new_ones(()))
        for name, part in prepared.others.items()
    }


class Frames(ToySpec):
    """Latents (B, C, t, h, w), a timestep for each frame; the first frame is clean and also on further channels."""

    blocks, time_axis = ("blocks",), 2

    def prepare(
        self, latents: Tensor, text: TextCondition | None, given: Conditioning | None, timesteps: Tensor
    ) -> Prepared:
        assert given is not None
        first_frame = given.latents[:, :, :1]
        b, c, t, h, w = latents.shape
        clean = torch.arange(t, device=latents.device).expand(b, t) == 0
        shown = torch.cat([first_frame, first_frame.new_zeros(b, c, t - 1, h, w)], dim=2)
        timesteps = timesteps[:, None].expand(b, t)
        cells = clean[:, None, :, None, None]
        condition = Condition(text=text, cond_latents=shown, cond_mask=clean[:, None])
        return Prepared(
            torch.where(cells, shown, latents), timesteps.masked_fill(clean, 0.0), condition, t * h * w, clean, ~cells
        )

    def predict(self, model: nn.Module, noisy: NoisySample, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        x, condition = noisy.model_input, prepared.condition
        assert condition.text is not None
        assert condition.cond_latents is not None
        assert condition.cond_mask is not None
        b, _, t, h, w = x.shape
        mask = condition.cond_mask[..., None, None].expand(b, 1, t, h, w).to(x)
        channels = torch.cat([x, condition.cond_latents, mask], dim=1)  # (B, 2C + 1, t, h, w)
        timesteps = noisy.timesteps[:, :, None].expand(b, t, h * w).flatten(1)
        value, _ = model(channels.flatten(2).mT.to(dtype), timesteps.to(dtype), [condition.text.streams[0].to(dtype)])
        return value.mT.unflatten(2, (t, h, w)).float()

    def example(
        self,
        latent_shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        expert: str | None = None,
    ) -> tuple[NoisySample, Prepared]:
        return example(self, latent_shape or (CHANNELS, 2, 2, 2), device, seed)


class Duet(ToySpec):
    """Packed tokens (B, N, C), two experts, two text streams, and audio."""

    folders = ("transformer", "transformer_2")
    streams = ((WORDS, 3), (POOLED, 1))
    blocks, time_axis = ("high.blocks", "low.blocks"), None
    lora_prefixes = {"high.": "transformer", "low.": "transformer_2"}  # noqa: RUF012 - as the base class

    def joined(self, parts: list[nn.Module]) -> nn.Module:
        return ToyExperts(*parts)

    def prepare(
        self, latents: Tensor, text: TextCondition | None, given: Conditioning | None, timesteps: Tensor
    ) -> Prepared:
        assert given is not None
        first_frame = given.latents[:, :, :1]
        b, _, t, h, w = latents.shape
        tokens = torch.cat([first_frame, latents[:, :, 1:]], dim=2).flatten(2).mT  # (B, N, C)
        clean = (torch.arange(t * h * w, device=latents.device) < h * w).expand(b, -1)
        sound = latents.mean(dim=(3, 4)).mT[..., :AUDIO]  # (B, t, A): a made-up sound of the picture
        audio = Prepared(sound, timesteps[:, None].expand(b, t), Condition(), t)
        return Prepared(
            tokens,
            timesteps[:, None].expand(b, t * h * w).masked_fill(clean, 0.0),
            Condition(text=text),
            t * h * w,
            clean,
            ~clean[..., None],
            {"audio": audio},
        )

    def predict(
        self, model: nn.Module, noisy: NoisySample, prepared: Prepared, dtype: torch.dtype
    ) -> Mapping[str, Tensor]:
        text, audio = prepared.condition.text, noisy.others["audio"]
        assert text is not None
        is_high = noisy.timesteps.amax(dim=1) >= BOUNDARY
        inputs = (noisy.model_input, 1 - noisy.timesteps, text.streams, audio.model_input, 1 - audio.timesteps)
        cast = [[x.to(dtype) for x in part] if isinstance(part, tuple) else part.to(dtype) for part in inputs]
        video, sound = model(is_high, *cast)
        return {"video": -video.float(), "audio": -sound.float()}  # it predicts x0 - noise

    def unpacked(self, latents: Tensor, shape: torch.Size) -> Tensor:
        return latents.mT.unflatten(2, shape[2:])

    def example(
        self,
        latent_shape: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        expert: str | None = None,
    ) -> tuple[NoisySample, Prepared]:
        return example(self, latent_shape or (CHANNELS, 2, 2, 2), device, seed)


def example(
    spec: ToySpec, latent_shape: Sequence[int], device: torch.device | str, seed: int
) -> tuple[NoisySample, Prepared]:
    """Random inputs of `predict`, through the spec's own `prepare`."""
    g = generator(seed, "toy example")
    latents = torch.randn(1, *latent_shape, generator=g)
    times = spec.process().sample_timesteps([seed], latents[0, 0].numel())
    prepared = spec.prepare(latents, spec.text("fp32", "cpu")(["a"]), first_frame(latents[:, :, :1]), times)
    noisy = NoisySample(
        prepared.latents, prepared.timesteps, prepared.latents, latents.new_ones(()), noisy_others(prepared)
    )
    return _to(noisy, device), _to(prepared, device)


def _to(value: Any, device: torch.device | str) -> Any:
    """Move every tensor in nested dataclasses."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: _to(getattr(value, name), device) for name in value.__dataclass_fields__})
    return value


TOYS = {"ToyFramesPipeline": Frames, "ToyDuetPipeline": Duet}
REGISTRY = {name: f"tests.toy_models:{kind.__name__}" for name, kind in TOYS.items()}
"""The lines of `pretrained.base.MODEL_SPECS` for the toys."""


def make_toy(folder: Path, name: str) -> Path:
    """Write a toy pipeline with random weights; returns its folder."""
    kind = TOYS[name]
    texts = [width for width, _ in kind.streams]
    channels, audio = (2 * CHANNELS + 1, 0) if kind is Frames else (CHANNELS, AUDIO)
    for seed, part in enumerate(kind.folders):
        torch.manual_seed(seed)
        ToyTransformer(channels, CHANNELS, texts, audio).save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder
