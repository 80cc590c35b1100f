"""A pipeline's folder of Stable Video Diffusion: what is in it, its UNet's weights and its scheduler's settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.checkpoint import load_pretrained, read_json
from titans_video.codecs.base import Codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.options import ModelOptions, SVDOptions, TuneOptions
from titans_video.data.cache import EncodingStore
from titans_video.data.dataset import VideoDataset
from titans_video.diffusion.edm import EDM
from titans_video.errors import CheckpointError, ConfigError
from titans_video.generation.image_conditioning import NOISE, make_image_condition
from titans_video.generation.long_video import sample
from titans_video.generation.model import VideoModel
from titans_video.media.motion import motion_bucket
from titans_video.media.resize import cover_crop, to_tensor, to_uint8
from titans_video.models.svd_unet import BRANCH, SVDUNet, choose_trainable
from titans_video.recipes.sora import SoraRecipe, Variant, build_recipe, train_sora
from titans_video.seeding import derive_seed, seeded_randn, seeded_uniform
from titans_video.text.base import TextEncoder
from titans_video.training.recipe import Sampler
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, CodecSpec, Condition, ImageCondition, TextCondition

UNET, SCHEDULER = "unet", "scheduler"


def holds_unet(folder: str | None) -> bool:
    """Whether there is a UNet in a folder of diffusers weights."""
    return folder is not None and (Path(folder).expanduser() / UNET / "config.json").is_file()


def unet_config(folder: str | None) -> dict[str, Any]:
    """The configuration of the folder's UNet, of plain values.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another class.
    """
    if not folder:
        raise ConfigError(
            "--pretrained-model is missing: a folder of Stable Video Diffusion with unet/ and vae/ in it."
        )
    path = Path(folder).expanduser() / UNET / "config.json"
    config = _read(path)
    name = config.get("_class_name")
    if name != "UNetSpatioTemporalConditionModel":
        raise ConfigError(
            f"{path} describes the class {name}; Stable Video Diffusion's is UNetSpatioTemporalConditionModel. "
            "--architecture sora-dit trains SoraDiT on the folder's VAE alone."
        )
    return {key: value for key, value in config.items() if not key.startswith("_")}


def load_unet(network: SVDUNet, folder: str) -> None:
    """Load the folder's weights into a network that was built from its configuration.

    Raises:
        CheckpointError: weights are missing, misshapen or unreadable.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    path = Path(folder).expanduser() / UNET
    unet = load_pretrained(UNetSpatioTemporalConditionModel, path, "UNet", CheckpointError)
    left = network.unet.load_state_dict(unet.state_dict(), strict=False)
    assert all(BRANCH in name for name in left.missing_keys)
    assert not left.unexpected_keys


def process_of(folder: str, sigma_mean: float, sigma_std: float) -> EDM:
    """The noise process of the folder's scheduler.

    Args:
        sigma_mean, sigma_std: of the logarithm of sigma in training.
    Raises:
        ConfigError: the scheduler is of another kind of model, or has no range of sigma.
    """
    path = Path(folder).expanduser() / SCHEDULER / "scheduler_config.json"
    config = _read(path)
    wanted = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    other = {name: config.get(name) for name, value in wanted.items() if config.get(name) != value}
    if other:
        raise ConfigError(f"{path} has {other}; Stable Video Diffusion's scheduler has {wanted}.")
    usual = EDM()
    low, high = config.get("sigma_min"), config.get("sigma_max")
    return EDM(sigma_mean, sigma_std, low or usual.sigma_min, high or usual.sigma_max)


def _read(path: Path) -> dict[str, Any]:
    missing = (
        "is missing: --pretrained-model must name a folder of Stable Video Diffusion with unet/, vae/, image_encoder/, "
        "feature_extractor/ and scheduler/ in it (`hf download NAME --local-dir DIR` fetches one)."
    )
    return read_json(path, missing, ConfigError)


STEPS = 25
"""Of the pipeline, where --sample-steps says nothing."""


@dataclass
class SVDRecipe(SoraRecipe):
    """SoraDiT's recipe with a picture in place of known frames.

    Attributes:
        image: frozen; embeds pictures.
        tune: how the picture and the motion are told in training.
        sample_picture: (3, H, W) in [-1, 1], what validation goes on from where there is no text to go by.
    """

    image: ImageEncoder = field(kw_only=True)
    tune: TuneOptions = field(kw_only=True)
    sample_picture: Tensor | None = None

    def encode(self, batch: Batch, drop: bool = True) -> tuple[Tensor, Condition]:
        """See `SoraRecipe.encode`; pictures are left out by their own share, whatever becomes of the captions."""
        picture = self.picture(batch)
        if drop:
            picture = picture.without(seeded_uniform(batch.seeds, "drop picture") < self.tune.image_drop_prob)
        return self.clean(batch), Condition(text=self.texts(batch, drop), image=picture)

    def texts(self, batch: Batch, drop: bool) -> TextCondition:
        """Encoded captions. Those that are dropped, and empty ones, are not heard at all: what is then trained is the
        model without text, which an export gives."""
        text = (batch.text or self.text(batch.captions)).to(self.device)
        text = text.without(torch.tensor([not caption for caption in batch.captions]))
        return text.without(self.drawn(batch, len(text.streams))) if drop else text

    def picture(self, batch: Batch) -> ImageCondition:
        """What the network is told of first frames, rates, motion and noise; blank frames for t2v rows."""
        mean, spread = self.tune.noise_aug
        z = seeded_randn((), [derive_seed(seed, "picture strength") for seed in batch.seeds])
        strength, bucket = torch.exp(mean + spread * z), self._motion(batch)
        told = (batch.num_cond_frames > 0).nonzero()[:, 0]
        c, _, h, w = self._latent_shape(batch)
        rows = len(batch)
        picture = ImageCondition(
            torch.zeros(rows, 1, self.image.width),
            torch.zeros(rows, c, h, w),
            torch.stack([batch.fps - 1, bucket, strength], dim=1),
        )
        if len(told):
            assert batch.cond_pixels is not None  # some row has a picture
            frames = batch.cond_pixels[told, :, 0]
            noise = seeded_randn(frames.shape[1:], [derive_seed(batch.seeds[i], NOISE) for i in told.tolist()])
            own = make_image_condition(
                self.image,
                self.codec,
                frames.to(self.device),
                noise.to(self.device),
                strength[told].to(self.device),
                batch.fps[told].to(self.device),
                bucket[told].to(self.device),
            )
            picture.embedding[told], picture.latents[told] = own.embedding, own.latents
        return ImageCondition(*(x.to(self.device) for x in (picture.embedding, picture.latents, picture.ids)))

    def _motion(self, batch: Batch) -> Tensor:
        if self.tune.motion_bucket != "auto":
            return torch.full((len(batch),), float(self.tune.motion_bucket))
        if batch.motion is not None:
            return batch.motion
        assert batch.pixels is not None  # a batch carries the one or the other
        return motion_bucket(batch.pixels, batch.fps)

    def _cond_mask(self, batch: Batch) -> Tensor:
        """No frame stands: (B, S, t), all False."""
        return torch.zeros(len(batch), self.codec.spec.stride[0], self._latent_shape(batch)[1], dtype=torch.bool)

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[Sampler]:
        model = VideoModel(network, self.codec, self.prompt_encoder, self.process, self.config, step, image=self.image)
        known = None if self.sample_picture is None else self.sample_picture[None, :, None]
        yield partial(sample, model, cond_pixels=known)


def train_svd(options: SVDOptions) -> TrainResult:
    """Build every part of a run from its options, and train.

    Raises:
        UserError: whatever the flags, the data, the folder or the encoders have wrong.
    """
    refuse_unused(options)
    if not trains_unet(options):
        note = f"{options.codec.pretrained_model} holds no unet/: SoraDiT is trained from scratch on its VAE."
        surprising = options.tune.architecture == "auto" and options.codec.vae_backend == "diffusers"
        return train_sora(options, Variant(build_recipe, notes=(note,) if surprising else ()))
    check_folder(options)
    variant = Variant(build_svd, (1, 1, 1), needs_text=False, pictures=True, check=refuse_tasks)
    return train_sora(replace(options, model=replace(options.model, patch_size=(1, 1, 1))), variant)


def check_folder(options: SVDOptions) -> None:
    """Read what describes the folder's parts, none of their weights: what is wrong there is said before anything slow
    is done.

    Raises:
        UserError: a description is missing, cannot be read, or is of another kind of model.
    """
    folder = options.codec.pretrained_model
    unet_config(folder)
    assert folder is not None  # its UNet was looked at
    ImageEncoder(folder, options.codec.vae_dtype, weights=False)
    process_of(folder, options.tune.sigma_mean, options.tune.sigma_std)


def trains_unet(options: SVDOptions) -> bool:
    """Whether `--architecture` comes out as the UNet."""
    return options.tune.architecture == "svd" or (
        options.tune.architecture == "auto"
        and options.codec.vae_backend == "diffusers"
        and (options.codec.pretrained_model is None or holds_unet(options.codec.pretrained_model))
    )


def refuse_unused(options: SVDOptions) -> None:
    """Stop where flags are given that the network that comes out of `--architecture` has no use for.

    Raises:
        ConfigError: naming them.
    """
    unet = trains_unet(options)
    kept = {"gradient_checkpointing", "compile"} if unet else {"architecture"}
    usual = SVDOptions()
    unused = [
        "--" + f.name.replace("_", "-")
        for group in (("model", "process") if unet else ("tune",))
        for f in fields(getattr(usual, group))
        if f.name not in kept and getattr(getattr(options, group), f.name) != getattr(getattr(usual, group), f.name)
    ]
    if unet:
        unused += options.generation_defaults.continuation_flags
    if unused:
        trained, other = ("Stable Video Diffusion's UNet", "SoraDiT") if unet else ("SoraDiT", "that UNet")
        raise ConfigError(
            f"{' and '.join(unused)}: {trained} is trained here, and that belongs to {other}. Leave it out, or choose "
            "by --architecture svd|sora-dit."
        )


def build_svd(
    options: SVDOptions,
    data: VideoDataset,
    codec: Codec,
    text: TextEncoder,
    device: torch.device,
    store: EncodingStore | None = None,
) -> SVDRecipe:
    """As `recipes.sora.build_recipe`, with the folder's weights.

    Raises:
        UserError: something in the folder is missing or damaged.
    """
    folder, tune = options.codec.pretrained_model, options.tune
    assert folder is not None  # see check_folder
    image = ImageEncoder(folder, options.codec.vae_dtype).to(device)
    base = build_recipe(options, data, codec, text, device, store, partial(svd_config, folder))
    load_unet(base.network, folder)  # type: ignore[arg-type]  # what svd_config names
    choose_trainable(base.network, tune.trainable)  # type: ignore[arg-type]
    process = process_of(folder, tune.sigma_mean, tune.sigma_std)
    config = base.config | {"recipe": "svd", "process": process.config(), "image": image.describe()}
    config["sample"] = {"steps": STEPS} | config["sample"]
    parts = {f.name: getattr(base, f.name) for f in fields(base)} | {"config": config, "process": process}
    if text.widths:
        return SVDRecipe(**parts, image=image, tune=tune)
    parts |= {"sample_prompt": None, "sample_flags": (*base.sample_flags, "--image", "first.png")}
    # Of the fullest bucket, while videos are as large as the largest.
    frame, size = data.sample_pixels(1)[0, :, :1], (config["data"]["height"], config["data"]["width"])
    return SVDRecipe(
        **parts, image=image, tune=tune, sample_picture=to_tensor(cover_crop(to_uint8(frame), *size))[:, 0]
    )


def svd_config(
    folder: str, model: ModelOptions, spec: CodecSpec, text_widths: tuple[int, ...] | list[int]
) -> dict[str, Any]:
    """Arguments of the network: the folder's UNet, and the widths of the text encoders."""
    return {"network": SVDUNet.__name__, "unet_config": unet_config(folder), "text_widths": tuple(text_widths)}


def refuse_tasks(data: VideoDataset, text: TextEncoder) -> None:
    """Stop where rows ask for what the network cannot do.

    Raises:
        ConfigError: v2v, t2v without text, or i2v of a clip of one frame; with the row.
    """
    drawn = data.mix.shares
    reasons = {"v2v": "Stable Video Diffusion is told one first frame, never several: make it i2v"}
    if not text.widths:
        reasons["t2v"] = (
            "without a text encoder (--text-model none) nothing would say what to make of it: make it i2v, or give "
            "--text-model builtin"
        )
    for task in (task for task in data.tasks if task in reasons):
        row = None if drawn else next(row for row in data.rows if row.task == task)
        where = f"--task-mix {data.options.task_mix}" if row is None else f"{row.where()}"
        raise ConfigError(f"{where}: {task} cannot be trained here, as {reasons[task]}.")
    # Rows that call themselves i2v are left out where they have one frame; what --task-mix draws is not looked at.
    for entry in data.entries if "t2v" not in data.tasks else ():
        if entry.bucket.frames < 2:
            raise ConfigError(
                f"{entry.row.where()}: i2v cannot be trained on a clip of one frame, as nothing follows upon its "
                f"picture. Give --num-frames 2 or more; --buckets {entry.bucket.height}x{entry.bucket.width}x2 also "
                "leaves shorter clips out."
            )
