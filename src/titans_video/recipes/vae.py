"""Train a video VAE, or fine-tune one of diffusers, on clips and images.

Legend: B rows of a batch, C latent channels, T H W pixel frames, height and width, t h w the latent grid, M measures.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_video import checkpoint as files
from titans_video.checkpoint import Checkpoint
from titans_video.codecs.diffusers import DiffusersCodec, find_vae, load_vae
from titans_video.config.fields import flag_of
from titans_video.config.generation import GenerateOptions
from titans_video.config.recipes import TrainVaeOptions, VaeOptions
from titans_video.data.batches import scaled
from titans_video.data.dataset import VideoDataset, open_data
from titans_video.data.held_out import HeldOut, Piece, open_validation, split
from titans_video.data.loader import LAST_STEP
from titans_video.errors import ConfigError, UserError, counted
from titans_video.files import atomic_folder
from titans_video.generation.long_video import Sampled
from titans_video.models.activations import limit_activations
from titans_video.models.flops import cost_of, layers_of
from titans_video.models.reconstruction import flicker, kl_divergence, psnr, ssim
from titans_video.models.video_vae import TitansVideoVAE
from titans_video.recipes.setup import ClipParts, network_note, run_trainer
from titans_video.seeding import derive_seed, seeded_randn, uniform
from titans_video.training.distributed import finish, process_group, run_on_main
from titans_video.training.init_from import start_from
from titans_video.training.parallelism import context_size, data_group
from titans_video.training.recipe import AdapterFiles, VideoSampler
from titans_video.training.run_folder import VAE, weights_of
from titans_video.training.samples import SamplePrompt
from titans_video.training.setup import RunContext, start_run
from titans_video.training.trainer import TrainResult
from titans_video.training.vae_network import (
    Reconstructed,
    VaeNetwork,
    describe_vae,
    latent_statistics,
    latent_weights,
    plain_config,
    principal_components,
    restored_vae,
    set_statistics,
)
from titans_video.types import Batch, CodecSpec

logger = logging.getLogger(__name__)

MEASURES = ("loss", "PSNR dB", "SSIM", "flicker", "KL nats")
FIT_CLIPS = 64  # to which the linear start is fitted
EXACT = 1 / 3  # share of the clips whose latents stay exact, with --latent-noise
STATISTICS_CLIPS = 256  # from which the statistics of latents are measured
WEIGHTS_CLIPS = 16  # from which the weights of latents are measured
SHEETS = 4  # held-out clips that validation shows
EACH = (1, 1, 1)
SHAPE = (
    *("latent_channels", "spatial_stride", "temporal_stride"),
    *("vae_width", "encoder_blocks", "decoder_blocks", "block_stride", "refine_width", "noise_conditioning"),
)
"""The options that decide the shape of a new VAE."""
LINEAR_RATE = 0.1
"""Learning rate of a linear codec that is already fitted, as a multiple of that of the other layers. At the full rate,
the first steps of AdamW would undo the fit."""


@dataclass
class VaeRecipe:
    """A VAE, the part of each clip that it is trained on, and its measures; see `training.recipe.Recipe`."""

    network: nn.Module  # a VaeNetwork
    spec: CodecSpec
    options: TrainVaeOptions
    config: dict[str, object]
    device: torch.device
    shown: Sequence[Piece] = ()  # held-out clips, one each
    held_out_rows: HeldOut | None = None
    sample_prompt: str | None = None
    sample_flags: tuple[str, ...] = ()
    adapter: AdapterFiles | None = None
    measures: tuple[str, ...] = MEASURES

    def size_of(self, batch: Batch) -> tuple[int, int, int]:
        """Return (T, H, W) of what a batch trains on: a function of the run's seed and the step."""
        counts = [n for n in self.options.vae.frame_counts or () if n <= batch.frames]
        frames = batch.frames
        if counts and batch.step != LAST_STEP:  # a trial batch has all frames
            frames = counts[int(uniform(self.options.train.seed, "frames", batch.step) * len(counts))]
        side = self.options.vae.crop_size
        return (frames, side, side) if side else (frames, batch.height, batch.width)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return pixels (B, 3, T, H, W) float32, posterior noise (B, C, t, h, w), and errors like it, of levels (B,).

        Errors and levels are None without --latent-noise. All are functions of the rows' seeds.
        """
        assert batch.pixels is not None  # there is no cache
        size = self.size_of(batch)
        pixels = crop_clips(batch.pixels.to(self.device), batch.seeds, size, self.options.vae)
        seeds = [derive_seed(seed, "posterior") for seed in batch.seeds]
        noise = seeded_randn(self.spec.latent_shape(*size), seeds).to(self.device)
        most = self.options.losses.latent_noise
        if not most:
            return pixels, noise, None, None
        exact = 0.0 if self.options.vae.trainable == "noise" else EXACT  # without noise it has nothing to learn
        drawn = [uniform(seed, "error level") for seed in batch.seeds]
        levels = torch.tensor([most * max(u - exact, 0.0) / (1 - exact) for u in drawn], device=self.device)
        return pixels, noise, self._errors(batch, noise.shape[1:], levels), levels

    def row_elements(self, batch: Batch) -> Tensor:
        t, h, w = self.size_of(batch)
        return torch.full((len(batch),), 3 * t * h * w)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        start = self.options.losses.gan_start
        pixels, noise, errors, levels = self.prepare(batch)
        found: Reconstructed = model(pixels, noise, start is not None and batch.step >= start, errors, levels)
        return found.loss * self.row_elements(batch).to(found.loss)

    def experts_at(self, quantiles: Sequence[float]) -> list[str] | None:
        return None

    def held_out(self, model: nn.Module, batch: Batch, quantiles: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return `MEASURES` of whole clips, decoded from the latents' means, (M, B) times their elements.

        With `--trainable noise` the latents have errors of half of --latent-noise.
        """
        made, pixels = self._reconstruct(model, batch)
        mean, logvar = made.moments.chunk(2, dim=1)
        shown = made.pixels.clamp(-1, 1)
        pairs = (psnr(shown, pixels), ssim(shown, pixels), flicker(shown, pixels))
        found = torch.stack([made.loss, *pairs, kl_divergence(mean, logvar)]).double().cpu()
        elements = torch.full((len(batch),), pixels[0].numel())
        return found * elements, elements

    def _reconstruct(self, model: nn.Module, batch: Batch) -> tuple[Reconstructed, Tensor]:
        assert batch.pixels is not None
        pixels = scaled(batch.pixels.to(self.device))
        noise = pixels.new_zeros(len(batch), *self.spec.latent_shape(*pixels.shape[2:]))
        if self.options.vae.trainable != "noise":
            return model(pixels, noise), pixels
        levels = pixels.new_full((len(batch),), self.options.losses.latent_noise / 2)
        return model(pixels, noise, False, self._errors(batch, noise.shape[1:], levels), levels), pixels

    def _errors(self, batch: Batch, shape: Sequence[int], levels: Tensor) -> Tensor:
        """Return errors (B, C, t, h, w) of latents, of the standard deviations `levels` (B,)."""
        errors = seeded_randn(shape, [derive_seed(seed, "errors") for seed in batch.seeds]).to(self.device)
        return errors * levels.view(-1, 1, 1, 1, 1)

    def checkpoint(self, model: dict[str, Tensor], step: int) -> Checkpoint:
        return Checkpoint(model=model, config=self.config, step=step)

    def tokens(self, batch: Batch) -> int:
        _, t, h, w = self.spec.latent_shape(*self.size_of(batch))
        return len(batch) * t * h * w

    def flops(self, batch: Batch) -> float:
        """Return 0 for VAEs of diffusers, whose layers work on grids of several sizes."""
        if not isinstance(self.network, VaeNetwork) or not isinstance(self.network.vae, TitansVideoVAE):
            return 0.0
        t, h, w = self.size_of(batch)
        cells, pixels, side = self.tokens(batch), len(batch) * t * h * w, self.spec.stride[1]
        rows = partial(rows_of_layer, clips=len(batch), cells=cells, pixels=pixels, side=side)
        return float(cost_of(layers_of(self.network.vae), rows, 0).training)

    @contextmanager
    def sampler(self, network: nn.Module, step: int) -> Iterator[VideoSampler]:
        """Yield a function that shows a held-out clip above its reconstruction; `seed` is its number."""

        def sample(options: GenerateOptions) -> Sampled:
            assert self.held_out_rows is not None
            batch, _ = self.held_out_rows.read(self.shown[options.seed])
            made, pixels = self._reconstruct(network, batch)
            video = torch.cat([pixels, made.pixels.clamp(-1, 1)], dim=3)[0].cpu()
            return Sampled(video, float(batch.fps[0]), {"clip": options.prompt, "step": step})

        yield sample


def rows_of_layer(name: str, clips: int, cells: int, pixels: int, side: int) -> int:
    """Return at how many places a layer of a `TitansVideoVAE` with cells of `side` pixels computes."""
    if "levels" in name:
        return clips
    if "join" in name:  # all pixels of a latent frame, its S frames at once
        return cells * side**2
    return pixels if "refine" in name else cells


def crop_clips(clips: Tensor, seeds: Sequence[int], size: tuple[int, int, int], options: VaeOptions) -> Tensor:
    """Return parts (B, 3, T, H, W) float32 in [-1, 1] of clips (B, 3, ., ., .), uint8 or float32.

    Time, place and scale of each row's part are functions of its seed. Larger parts are averaged down to `size`.
    """
    frames, height, width = size
    parts = []
    for clip, seed in zip(clips, seeds, strict=True):
        start = int(uniform(seed, "first frame") * (clip.shape[1] - frames + 1))
        clip = clip[:, start : start + frames]
        if options.crop_size:
            low, high = options.crop_scale
            most = min(clip.shape[2] / height, clip.shape[3] / width)
            factor = min(low * (high / low) ** uniform(seed, "scale"), most)
            h, w = max(round(height * factor), 1), max(round(width * factor), 1)
            top = int(uniform(seed, "top") * (clip.shape[2] - h + 1))
            left = int(uniform(seed, "left") * (clip.shape[3] - w + 1))
            clip = clip[:, :, top : top + h, left : left + w]
        part = scaled(clip)
        if part.shape[2:] != (height, width):
            part = F.interpolate(part, (height, width), mode="bilinear", antialias=True)
        parts.append(part)
    return torch.stack(parts)


def train_vae(options: TrainVaeOptions) -> TrainResult:
    """Open the clips, build or load the VAE, train it, and write the folder of the finished VAE.

    Raises:
        UserError: a fault of the flags, the data or the VAE.
    """
    if context_size() > 1:
        raise ConfigError("A VAE has no tokens to share; use a configuration without context parallelism.")
    options = replace(options, data=replace(options.data, task_mix="t2v=1"))  # conditioning frames are not used
    options, run = start_run(options)
    vae = open_vae(options, run)
    codec = DiffusersCodec(vae)
    parts = open_clip_parts(options, run, codec.spec)
    check_sizes(options.vae, codec.spec, parts.data)
    network = VaeNetwork(vae, codec.vae_spec, options.losses, trainable=options.vae.trainable)
    if options.vae.linear_start and isinstance(vae, TitansVideoVAE):
        for layer in (vae.encoder.linear, vae.decoder.linear):
            layer.learning_rate_ratio = LINEAR_RATE  # read by `training.optim`
        if run.resume is None and options.train.init_from is None:
            start_linear(vae, options, parts.data, run)
    limit_activations(network, options.activations)
    if options.activations.every:
        network.recompute_activations()
    shown, rows = clips_to_show(options, parts)
    recipe = VaeRecipe(
        network=network,
        spec=codec.spec,
        options=options,
        config=checkpoint_config(vae, parts.data),
        device=run.accelerator.device,
        shown=shown,
        held_out_rows=rows,
    )
    notes = [network_note(network)]
    if options.train.init_from and run.resume is None and not is_vae_folder(options.train.init_from):
        notes += start_from(options.train.init_from, recipe)
    prompts = [SamplePrompt(piece.records[0].row.id) for piece in shown]
    result = run_trainer(options, run, recipe, parts, notes, prompts)
    if not result.exit_code:
        finished = partial(write_vae, recipe, parts.data, result)
        folder = run_on_main(run.accelerator, finished)
        logger.info(f"The finished VAE: {folder}. Use it with --pretrained-model {folder}.")
    finish(run.accelerator)
    return result


def open_clip_parts(options: TrainVaeOptions, run: RunContext, spec: CodecSpec) -> ClipParts:
    """Open the clips and the held-out clips."""
    group, processes = data_group(run.accelerator), process_group(run.accelerator)
    seed, rank, world = options.train.seed, group.index, group.count
    data = open_data(options.data, spec, EACH, seed=seed, rank=rank, world=world, processes=processes)
    if options.validation.validation_split:
        data = split(data, options.validation.validation_split)
    return ClipParts(data, open_validation(data, options.validation.validation_manifest, processes))


def check_sizes(options: VaeOptions, spec: CodecSpec, data: VideoDataset) -> None:
    """Raise ConfigError if a crop or a number of frames does not fit the VAE or the clips."""
    side, (_, sh, sw) = options.crop_size, spec.stride
    if side and (side % sh or side % sw):
        raise ConfigError(f"--crop-size {side}: it must be a multiple of the VAE's stride, {sh}x{sw}.")
    small = [str(b) for b in data.buckets if side and min(b.height, b.width) < side]
    if small:
        raise ConfigError(f"--crop-size {side} is larger than the clips of {small[0]}; raise --resolution.")
    for frames in options.frame_counts or ():
        if not spec.is_legal(frames):
            raise ConfigError(
                f"--frame-counts {frames}: it does not round-trip through the VAE; the nearest legal counts are "
                f"{spec.format_nearest_frames(frames)}."
            )


def is_vae_folder(path: str) -> bool:
    """Whether `--init-from` names a VAE of diffusers or of this project, and not a run or a checkpoint."""
    try:
        files.read(Path(path).expanduser())
    except UserError:
        return True  # `open_vae` says what is wrong with it
    return False


def open_vae(options: TrainVaeOptions, run: RunContext) -> nn.Module:
    """Return the VAE of the resumed run, of `--init-from`, or a new one."""
    o, init_from = options.vae, options.train.init_from
    torch.manual_seed(derive_seed(options.train.seed, "initialisation"))
    if run.resume:
        found = restored_vae(run.resume.model().config)
        if found is None:
            raise ConfigError(f"--resume: {run.resume.folder} is not a checkpoint of `train vae`.")
        return found
    if init_from and is_vae_folder(init_from):
        loaded: nn.Module = load_vae(find_vae(init_from), torch.float32)
        loaded = conditioned(loaded, o)
        check_shape(loaded, o)
        return loaded
    if init_from:
        found = restored_vae(files.read(Path(init_from).expanduser()).config)
        if found is None:
            raise ConfigError(f"--init-from {init_from} is neither a VAE nor a run of `train vae`.")
        if conditioned(found, o) is not found:
            raise ConfigError(
                f"--noise-conditioning is added to a finished VAE; give that of the run, --init-from {init_from}/{VAE}."
            )
        check_shape(found, o)
        return found
    if o.trainable != "all":
        raise ConfigError(f"--trainable {o.trainable}: there is no run to resume from; give --init-from FOLDER too.")
    return new_vae(o)


def new_vae(o: VaeOptions) -> TitansVideoVAE:
    """Return an untrained VAE of the shape that the options describe."""
    return TitansVideoVAE(
        latent_channels=o.latent_channels,
        spatial_stride=o.spatial_stride,
        temporal_stride=o.temporal_stride,
        encoder_width=o.vae_width,
        decoder_width=o.vae_width,
        encoder_blocks=o.encoder_blocks,
        decoder_blocks=o.decoder_blocks,
        block_stride=o.block_stride,
        refine_width=o.refine_width,
        noise_conditioning=o.noise_conditioning,
    )


def conditioned(vae: nn.Module, options: VaeOptions) -> nn.Module:
    """Return a VAE with noise conditioning if the options ask for it and its class can have it, else the same one."""
    if options.noise_conditioning and isinstance(vae, TitansVideoVAE):
        return vae.with_noise_conditioning()
    return vae


def check_shape(vae: nn.Module, options: VaeOptions) -> None:
    """Raise ConfigError for an option that the VAE of `--init-from` would ignore."""
    usual, config = VaeOptions(), plain_config(vae)
    for name in SHAPE:
        given, setting = getattr(options, name), "encoder_width" if name == "vae_width" else name
        if given not in (getattr(usual, name), config.get(setting)):
            raise ConfigError(f"{flag_of(name)} {given}: the VAE of --init-from keeps its own shape; leave it out.")


def start_linear(vae: TitansVideoVAE, options: TrainVaeOptions, data: VideoDataset, run: RunContext) -> None:
    """Fit the linear start of a new VAE to parts of the clips as in training; the same on every process."""
    strides = vae.temporal_compression_ratio, vae.spatial_compression_ratio, vae.spatial_compression_ratio
    count = max(options.vae.latent_channels, options.vae.vae_width)

    def fit() -> tuple[Tensor, Tensor, Tensor]:
        return principal_components(training_parts(options, data, FIT_CLIPS, "fit"), strides, count)

    vae.set_linear(*run_on_main(run.accelerator, fit))


def training_parts(options: TrainVaeOptions, data: VideoDataset, count: int, key: str) -> Tensor:
    """Return parts (N, 3, T, H, W) of clips of one size and of the most frames, cut as in training."""
    clips = data.sample_pixels(count, longest=True)
    side = options.vae.crop_size
    size = (clips.shape[2], *((side, side) if side else clips.shape[3:]))
    seeds = [derive_seed(options.train.seed, key, i) for i in range(len(clips))]
    return crop_clips(clips, seeds, size, options.vae)


def checkpoint_config(vae: nn.Module, data: VideoDataset) -> dict[str, object]:
    """Return the config of checkpoints, from which the VAE is rebuilt."""
    bucket = data.main_bucket
    size = {"num_frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": data.fps}
    return {"recipe": "vae", "vae": describe_vae(vae), "data": size}


def clips_to_show(options: TrainVaeOptions, parts: ClipParts) -> tuple[list[Piece], HeldOut | None]:
    """Return the held-out clips of which validation makes sheets, and their reader."""
    if parts.held_out is None or not options.validation.validate_every:
        return [], None
    rows = HeldOut(parts.held_out, max_rows=SHEETS)
    pieces = [replace(p, records=p.records[i : i + 1]) for p in rows.pieces() for i in range(len(p.records))]
    return pieces[:SHEETS], rows


def write_vae(recipe: VaeRecipe, data: VideoDataset, result: TrainResult) -> Path:
    """Write the VAE of the last checkpoint, averaged if there is an average, as a folder of diffusers; return it.

    Unless the encoder stayed as it was, the statistics of its latents on training clips are measured and stored.
    """
    run = Path(recipe.options.train.output_dir)
    source = weights_of(run, result.folder)
    assert source is not None  # a run that ended well has a checkpoint
    weights = files.read(source)
    vae = restored_vae(weights.config)
    assert vae is not None
    assert isinstance(recipe.network, VaeNetwork)
    losses = replace(recipe.options.losses, lpips=None, gan_start=None)
    network = VaeNetwork(vae, recipe.network.spec, losses)
    network.load_vae_weights(weights.model)
    if recipe.options.vae.trainable == "all":
        network.to(recipe.device).eval()
        clips = training_parts(recipe.options, data, STATISTICS_CLIPS, "statistics")
        logger.info(f"Measuring the latents of {counted(len(clips), 'clip')}.")
        singly = [clip.to(recipe.device) for clip in clips.split(1)]
        mean, std = latent_statistics(network, singly)
        set_statistics(vae, mean.cpu(), std.cpu())
        if isinstance(vae, TitansVideoVAE):
            weights_of_latents = latent_weights(network, singly[:WEIGHTS_CLIPS], std)
            vae.register_to_config(latents_weight=weights_of_latents.tolist())
    with atomic_folder(run / VAE) as temporary:
        vae.cpu().eval().save_pretrained(temporary)  # type: ignore[operator]
    return run / VAE
