"""Stable Video Diffusion, fine-tuned as a whole: EDM with v-prediction, told a picture, and text through a branch.

An i2v row is told its picture as the pipeline tells it: the embedding of the clean one, the latents of a noisy one, its
frame rate, motion and noise. A t2v row has these blank, as guidance has them. Every frame carries loss: the picture is
a hint, not a frame that stands.

Legend: B batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, S pixel frames of one
latent frame.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titans_video.codecs.base import Codec
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.data.store import EncodingStore
from titans_video.errors import ConfigError
from titans_video.generation.loading import VideoModel
from titans_video.generation.pictures import NOISE, picture_of
from titans_video.generation.requests import sample
from titans_video.media.motion import motion_bucket
from titans_video.media.pixels import to_tensor, to_uint8
from titans_video.media.resize import cover_crop
from titans_video.models.svd import SVDUNet, choose_trainable
from titans_video.options import ModelOptions
from titans_video.preparing.opening import Data
from titans_video.recipes.sora import SoraRecipe, Variant, build_recipe, train_sora
from titans_video.recipes.svd_folder import holds_unet, load_unet, process_of, unet_config
from titans_video.recipes.svd_options import SVDOptions, TuneOptions
from titans_video.seeding import derive, keyed_normal
from titans_video.text.table import TextEncoder
from titans_video.training.recipe import Sampler
from titans_video.training.trainer import Outcome
from titans_video.types import Batch, CodecSpec, Condition, Picture, TextCondition

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
            picture = picture.without(_uniform(batch, "drop picture") < self.tune.image_drop_prob)
        return self.clean(batch), Condition(text=self.texts(batch, drop), picture=picture)

    def texts(self, batch: Batch, drop: bool) -> TextCondition:
        """Encoded captions. Those that are dropped, and empty ones, are not heard at all: what is then trained is the
        model without text, which an export gives."""
        text = (batch.text or self.text(batch.captions)).to(self.device)
        text = text.silent(torch.tensor([not caption for caption in batch.captions]))
        return text.silent(self.drawn(batch, len(text.streams))) if drop else text

    def picture(self, batch: Batch) -> Picture:
        """What the network is told of first frames, rates, motion and noise; blank frames for t2v rows."""
        mean, spread = self.tune.noise_aug
        z = keyed_normal((), [derive(seed, "picture strength") for seed in batch.seeds])
        strength, bucket = torch.exp(mean + spread * z), self._motion(batch)
        told = (batch.known_frames > 0).nonzero()[:, 0]
        c, _, h, w = self._latent_shape(batch)
        rows = len(batch)
        picture = Picture(
            torch.zeros(rows, 1, self.image.width),
            torch.zeros(rows, c, h, w),
            torch.stack([batch.fps - 1, bucket, strength], dim=1),
        )
        if len(told):
            assert batch.known_pixels is not None  # some row has a picture
            frames = batch.known_pixels[told, :, 0]
            noise = keyed_normal(frames.shape[1:], [derive(batch.seeds[i], NOISE) for i in told.tolist()])
            own = picture_of(
                self.image,
                self.codec,
                frames.to(self.device),
                noise.to(self.device),
                strength[told].to(self.device),
                batch.fps[told].to(self.device),
                bucket[told].to(self.device),
            )
            picture.embedding[told], picture.latents[told] = own.embedding, own.latents
        return Picture(*(x.to(self.device) for x in (picture.embedding, picture.latents, picture.ids)))

    def _motion(self, batch: Batch) -> Tensor:
        if self.tune.motion_bucket != "auto":
            return torch.full((len(batch),), float(self.tune.motion_bucket))
        if batch.motion is not None:
            return batch.motion
        assert batch.pixels is not None  # a batch carries the one or the other
        return motion_bucket(batch.pixels, batch.fps)

    def _known_mask(self, batch: Batch) -> Tensor:
        """No frame stands: (B, S, t), all False."""
        return torch.zeros(len(batch), self.codec.spec.stride[0], self._latent_shape(batch)[1], dtype=torch.bool)

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[Sampler]:
        model = VideoModel(network, self.codec, self.prompt_encoder, self.process, self.config, step, image=self.image)
        known = None if self.sample_picture is None else self.sample_picture[None, :, None]
        yield partial(sample, model, known=known)


def train_svd(options: SVDOptions) -> Outcome:
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
        unused += options.advice.continuation_flags
    if unused:
        trained, other = ("Stable Video Diffusion's UNet", "SoraDiT") if unet else ("SoraDiT", "that UNet")
        raise ConfigError(
            f"{' and '.join(unused)}: {trained} is trained here, and that belongs to {other}. Leave it out, or choose "
            "by --architecture svd|sora-dit."
        )


def build_svd(
    options: SVDOptions,
    data: Data,
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


def refuse_tasks(data: Data, text: TextEncoder) -> None:
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


def _uniform(batch: Batch, purpose: str) -> Tensor:
    """(B,) in [0, 1), each a function of its row's seed."""
    return torch.tensor([derive(seed, purpose) / 2**63 for seed in batch.seeds])
