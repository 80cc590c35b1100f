"""Stable Video Diffusion, fine-tuned: EDM with v-prediction, conditioned on an image, and on text through a branch.

An i2v row gets its image as in the diffusers pipeline: the embedding of the clean image, the latents of a noisy one,
its frame rate, motion and noise level. A t2v row has a blank image, as guidance has. Every frame carries loss.

Legend: B batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, S pixel frames of one
latent frame.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from titans_video.checkpoint import read_json
from titans_video.codecs.base import flags_to_name_again
from titans_video.codecs.image_encoder import ImageEncoder
from titans_video.config.fields import flag_of
from titans_video.config.generation import GenerateOptions
from titans_video.config.recipes import SVDOptions, TuneOptions
from titans_video.data.batches import scaled
from titans_video.data.dataset import VideoDataset
from titans_video.diffusion.base import NoisySample, Prepared
from titans_video.diffusion.v_prediction import EDM
from titans_video.errors import CheckpointError, ConfigError
from titans_video.generation.image_conditioning import NOISE, encode_first_frames
from titans_video.generation.long_video import Sampled, sample
from titans_video.generation.model import VideoModel
from titans_video.hub import load_pretrained
from titans_video.media.colour import cover_crop, to_tensor, to_uint8
from titans_video.media.motion import motion_bucket
from titans_video.models.flops import svd_flops
from titans_video.models.registry import network_config
from titans_video.models.svd_unet import BRANCH, SVDUNet, choose_trainable
from titans_video.recipes.base import ClipGeometry, DiffusionRecipe, Draws, Makers, noise_of, prompt_encoder
from titans_video.recipes.setup import (
    RunParts,
    checkpoint_config,
    frame_count_notes,
    generation_defaults,
    network_note,
    open_encoders,
    open_parts,
    sample_prompt,
    train_recipe,
)
from titans_video.recipes.sora import init_network, train_sora
from titans_video.schema import shown
from titans_video.seeding import derive_seed, seeded_randn, seeded_uniform
from titans_video.text.base import TextEncoder
from titans_video.training.recipe import VideoSampler
from titans_video.training.setup import start_run
from titans_video.training.trainer import TrainResult
from titans_video.types import Batch, Condition, ImageCondition, TextCondition

STEPS = 25  # the pipeline's denoising steps, used without --sample-steps
CLIP_GRID = (1, 1, 1)
UNET, SCHEDULER = "unet", "scheduler"


def holds_unet(folder: str | None) -> bool:
    """Return whether a folder of diffusers weights has a UNet."""
    return folder is not None and (Path(folder).expanduser() / UNET / "config.json").is_file()


def unet_config(folder: str | None) -> dict[str, object]:
    """Return the UNet's configuration; raise ConfigError if it is missing, unreadable, or of another class."""
    if not folder:
        raise ConfigError(
            "--pretrained-model is missing: a folder of Stable Video Diffusion with unet/ and vae/ in it."
        )
    path = Path(folder).expanduser() / UNET / "config.json"
    config = _read(path)
    name = config.get("_class_name")
    if name != "UNetSpatioTemporalConditionModel":
        raise ConfigError(
            f"{path} describes the class {shown(name)}; Stable Video Diffusion's is UNetSpatioTemporalConditionModel. "
            "--architecture sora-dit trains SoraDiT on the folder's VAE."
        )
    return {key: value for key, value in config.items() if not key.startswith("_")}


def load_unet(network: SVDUNet, folder: str) -> None:
    """Load the folder's UNet weights; raise CheckpointError if any are missing, misshapen or unreadable."""
    from diffusers import UNetSpatioTemporalConditionModel

    path = Path(folder).expanduser() / UNET
    unet = load_pretrained(UNetSpatioTemporalConditionModel, path, "UNet", CheckpointError)
    left = network.unet.load_state_dict(unet.state_dict(), strict=False)
    assert all(BRANCH in name for name in left.missing_keys)
    assert not left.unexpected_keys


def folder_process(folder: str, sigma_mean: float, sigma_std: float) -> EDM:
    """Return the noise process of the folder's scheduler; raise ConfigError if it is for another kind of model.

    `sigma_mean` and `sigma_std` are of the logarithm of sigma in training.
    """
    path = Path(folder).expanduser() / SCHEDULER / "scheduler_config.json"
    config = _read(path)
    wanted = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    other = [f"{name} {shown(config.get(name))}" for name, value in wanted.items() if config.get(name) != value]
    if other:
        raise ConfigError(f"{path} has {', '.join(other)}; Stable Video Diffusion's scheduler has {wanted}.")
    default = EDM()
    low, high = (cast(float, config.get(key)) for key in ("sigma_min", "sigma_max"))
    return EDM(sigma_mean, sigma_std, low or default.sigma_min, high or default.sigma_max)


def _read(path: Path) -> dict[str, object]:
    missing = (
        "is missing: --pretrained-model must name a folder of Stable Video Diffusion with unet/, vae/, image_encoder/, "
        "feature_extractor/ and scheduler/ in it (`hf download NAME --local-dir DIR` fetches one)."
    )
    return read_json(path, missing, ConfigError)


@dataclass(frozen=True)
class ImageDraws(Draws):
    """An image gets noise of its own strength; motion and frame rate are numbers that the UNet receives."""

    tune: TuneOptions = field(kw_only=True)

    def makers(self, batch: Batch) -> Makers:
        rows = batch.num_cond_frames.nonzero()[:, 0]
        given = replace(batch, seeds=[batch.seeds[i] for i in rows.tolist()])
        picture = (3, batch.height, batch.width)
        return {
            **super().makers(batch),
            "drop image": lambda: seeded_uniform(batch.seeds, "drop picture") < self.tune.image_drop_prob,
            "no caption": lambda: torch.tensor([not caption for caption in batch.captions]),
            "ids": partial(self._ids, batch),
            "image rows": lambda: rows,  # (K,)
            "image noise": lambda: noise_of(picture, given, NOISE) if len(rows) else torch.zeros(0, *picture),
        }

    def _ids(self, batch: Batch) -> Tensor:
        """Return (B, 3): frame rate, motion and noise level."""
        mean, std = self.tune.noise_aug
        z = seeded_randn((), [derive_seed(seed, "picture strength") for seed in batch.seeds])
        return torch.stack([batch.fps - 1, self._motion(batch), torch.exp(mean + std * z)], dim=1)

    def _motion(self, batch: Batch) -> Tensor:
        if self.tune.motion_bucket != "auto":
            return torch.full((len(batch),), float(self.tune.motion_bucket))
        if batch.motion is not None:
            return batch.motion.cpu()
        assert batch.pixels is not None  # a batch carries one of them
        return motion_bucket(scaled(batch.pixels), batch.fps).cpu()


@dataclass
class SVDRecipe(DiffusionRecipe[Prepared]):
    """The UNet gets an image condition; every frame carries loss."""

    image: ImageEncoder = field(kw_only=True)  # frozen
    tune: TuneOptions = field(kw_only=True)  # how image and motion are given in training

    def prepare(self, batch: Batch, *, train: bool) -> Prepared:
        image = self.image_condition(batch)
        if train:
            image = image.without(self.value(batch, "drop image"))
        latents = self.encode_latents(batch)
        condition = Condition(text=self.captions(batch, train=train), image=image)
        timesteps = self.value(batch, "time")[:, None].expand(-1, latents.shape[2])
        return Prepared(latents, timesteps, condition, self.geometry.row_tokens(batch))

    def forward(self, model: nn.Module, noisy: NoisySample, prepared: Prepared) -> Tensor:
        value: Tensor = model(noisy.model_input, noisy.timesteps, prepared.condition).value
        return value.float()

    def captions(self, batch: Batch, *, train: bool) -> TextCondition:
        """Return encoded captions; dropped and empty ones are masked entirely.

        Such a row trains the model without the text branch, which is what an export contains.
        """
        text = self.encode_text(batch)
        text = text.without(self.value(batch, "no caption"))
        return text.without(self.value(batch, "drop")) if train else text

    def image_condition(self, batch: Batch) -> ImageCondition:
        """Return embeddings, latents, frame rate, motion and noise level of first frames; blank ones for t2v rows."""
        c, _, h, w = self.geometry.latent_shape(batch)
        embedding = torch.zeros(len(batch), 1, self.image.width, device=self.device)
        latents = torch.zeros(len(batch), c, h, w, device=self.device)
        ids, rows = self.value(batch, "ids"), self.value(batch, "image rows")
        if len(rows):
            pixels = self.cond_pixels(batch)
            assert pixels is not None  # some row has an image
            noise, strength = self.value(batch, "image noise"), ids[rows, 2]
            given = encode_first_frames(self.image, self.codec, pixels[rows, :, 0], noise, strength)
            embedding.index_copy_(0, rows, given[0])
            latents.index_copy_(0, rows, given[1])
        return ImageCondition(embedding, latents, ids)

    def draws(self) -> ImageDraws:
        return ImageDraws(**vars(super().draws()), tune=self.tune)


def train_svd(options: SVDOptions) -> TrainResult:
    """Build every part of a run from its options, and train.

    Raises:
        UserError: a fault of the flags, the data, the folder or the encoders.
    """
    refuse_unused(options)
    if not trains_unet(options):
        note = f"{options.codec.pretrained_model} has no unet/: SoraDiT is trained from scratch on its VAE."
        surprising = options.tune.architecture == "auto" and options.codec.vae_backend == "diffusers"
        return train_sora(options, (note,) if surprising else ())
    check_folder(options)
    options = replace(options, model=replace(options.model, patch_size=CLIP_GRID))
    options, run = start_run(options)
    device = run.accelerator.device
    options, text, codec = open_encoders(options, run, needed=False)
    if not text.widths:
        options = replace(options, data=replace(options.data, empty_captions="keep"))  # captions are not used
    check = partial(refuse_tasks, text=text)
    parts = open_parts(options, options.codec, run, codec, text, CLIP_GRID, check=check, image_condition=True)
    recipe = build_svd(options, parts, device)
    lines = [*frame_count_notes(options.data, 1, parts), network_note(recipe.network)]
    return train_recipe(options, run, recipe, parts, lines)


def check_folder(options: SVDOptions) -> None:
    """Read the configurations of the folder's parts, before anything slow is done.

    Raises:
        UserError: a configuration is missing, unreadable, or of another kind of model.
    """
    folder = options.codec.pretrained_model
    unet_config(folder)
    assert folder is not None  # unet_config checks it
    ImageEncoder(folder, weights=False)
    folder_process(folder, options.tune.sigma_mean, options.tune.sigma_std)


def trains_unet(options: SVDOptions) -> bool:
    """Return whether `--architecture` selects the UNet."""
    return options.tune.architecture == "svd" or (
        options.tune.architecture == "auto"
        and options.codec.vae_backend == "diffusers"
        and (options.codec.pretrained_model is None or holds_unet(options.codec.pretrained_model))
    )


def refuse_unused(options: SVDOptions) -> None:
    """Raise ConfigError for flags that the network selected by `--architecture` does not use."""
    unet = trains_unet(options)
    kept = {"compile"} if unet else {"architecture"}
    default = SVDOptions()
    unused = [
        flag_of(f.name)
        for group in (("model", "process") if unet else ("tune",))
        for f in fields(getattr(default, group))
        if f.name not in kept and getattr(getattr(options, group), f.name) != getattr(getattr(default, group), f.name)
    ]
    if unet:
        unused += options.generation_defaults.continuation_flags
    if unused:
        trained, other = ("Stable Video Diffusion's UNet", "SoraDiT") if unet else ("SoraDiT", "that UNet")
        raise ConfigError(
            f"{' and '.join(unused)}: {trained} is trained here, and this is an option of {other}. Leave it out, or "
            "choose the network with --architecture svd|sora-dit."
        )


def build_svd(options: SVDOptions, parts: RunParts, device: torch.device) -> SVDRecipe:
    """Build the recipe with the folder's weights; raise UserError if a part is missing or damaged."""
    folder, tune, text = options.codec.pretrained_model, options.tune, parts.text
    assert folder is not None  # see check_folder
    image = ImageEncoder(folder, options.codec.vae_dtype).to(device)
    arguments = {"network": SVDUNet.__name__, "unet_config": unet_config(folder), "text_widths": tuple(text.widths)}
    network = init_network(options, arguments)
    assert isinstance(network, SVDUNet)
    load_unet(network, folder)
    choose_trainable(network, tune.trainable)
    process = folder_process(folder, tune.sigma_mean, tune.sigma_std)
    prompt = sample_prompt(parts.data)
    defaults = {"steps": STEPS} | generation_defaults(options.generation_defaults, prompt)
    config = checkpoint_config("svd", network_config(network), parts, process, defaults)
    config["image"] = image.describe()
    flags = flags_to_name_again(options.codec)
    return SVDRecipe(
        network=network,
        codec=parts.codec,
        text=text,
        process=process,
        config=config,
        device=device,
        geometry=ClipGeometry(parts.codec.spec, cond_frames_have_loss=True),
        count_flops=svd_flops(network),
        make_sampler=image_sampler(parts, process, config, image),
        cfg_drop_prob=options.train.cfg_drop_prob,
        cfg_drop_each=options.train.cfg_drop_each,
        sample_prompt=prompt if text.widths else None,
        sample_flags=flags if text.widths else (*flags, "--image", "first.png"),
        cache=parts.cache,
        codec_in_use=True,
        image=image,
        tune=tune,
    )


def image_sampler(
    parts: RunParts, process: EDM, config: dict[str, object], image: ImageEncoder
) -> Callable[[nn.Module, int], VideoSampler]:
    """Return a function that opens the network for validation videos; without text they start from a clip's image."""
    frame = None if parts.text.widths else parts.data.sample_pixels(1)[0, :, :1]
    usual = (parts.data.main_bucket.height, parts.data.main_bucket.width)

    def open_sampler(network: nn.Module, step: int) -> VideoSampler:
        encoder = prompt_encoder(parts.text, parts.cache)
        model = VideoModel(network, parts.codec, encoder, process, config, step, image=image)

        def make(options: GenerateOptions) -> Sampled:
            size = options.height or usual[0], options.width or usual[1]
            image = None if frame is None else to_tensor(cover_crop(to_uint8(frame), *size))[None]
            return sample(model, options, image)

        return make

    return open_sampler


def refuse_tasks(data: VideoDataset, text: TextEncoder) -> None:
    """Reject rows with a task that the network cannot be trained on.

    Raises:
        ConfigError: v2v, t2v without text, or i2v of a clip of one frame; names the row.
    """
    drawn = data.mix.shares
    reasons = {"v2v": "Stable Video Diffusion takes one first frame, never several: make it i2v"}
    if not text.widths:
        reasons["t2v"] = (
            "without a text encoder (--text-model none) nothing describes the video: make it i2v, or give "
            "--text-model builtin"
        )
    for task in (task for task in data.tasks if task in reasons):
        row = None if drawn else data.first_row(task)
        where = f"--task-mix {data.options.task_mix}" if row is None else f"{row.where()}"
        raise ConfigError(f"{where}: {task} cannot be trained here, as {reasons[task]}.")
    # The scan leaves out i2v rows of one frame; tasks drawn by --task-mix are not checked there.
    single = [bucket for bucket in data.buckets if bucket.frames < 2 and "t2v" not in data.tasks]
    if single:
        entry = data.records[min(int(data.records.in_bucket(bucket)[0]) for bucket in single)]
        raise ConfigError(
            f"{entry.row.where()}: i2v cannot be trained on a clip of one frame, as nothing follows its image. "
            f"Give --num-frames 2 or more; --buckets {entry.bucket.height}x{entry.bucket.width}x2 also leaves "
            "shorter clips out."
        )
