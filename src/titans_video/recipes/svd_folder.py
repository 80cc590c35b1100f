"""A pipeline's folder of Stable Video Diffusion: what is in it, its UNet's weights and its scheduler's settings."""

from pathlib import Path
from typing import Any

from titans_video.diffusion.edm import EDM
from titans_video.errors import CheckpointError, ConfigError
from titans_video.frozen import load_whole, read_json
from titans_video.models.svd import BRANCH, SVDUNet

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
    unet = load_whole(UNetSpatioTemporalConditionModel, path, "UNet", CheckpointError)
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
