"""Networks by the name that a checkpoint's config carries."""

from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from titans_video.errors import CheckpointError, ConfigError
from titans_video.models.sora import SoraDiT
from titans_video.models.svd import SVDUNet
from titans_video.models.titans import TitansVideoDiT

NETWORKS: dict[str, type[ModelMixin]] = {"SoraDiT": SoraDiT, "TitansVideoDiT": TitansVideoDiT, "SVDUNet": SVDUNet}


def build_network(config: dict[str, Any]) -> Any:
    """A freshly initialised network from its configuration (`network` names the class; default SoraDiT).

    Raises:
        CheckpointError: an unknown network, or arguments that it does not take.
        ConfigError: sizes that do not go together.
    """
    arguments = dict(config)
    name = arguments.pop("network", "SoraDiT")
    if name not in NETWORKS:
        raise CheckpointError(f"The network {name!r} is not one of this version's: {', '.join(NETWORKS)}.")
    try:
        return NETWORKS[name](**arguments)
    except ConfigError:
        raise
    except TypeError as e:
        raise CheckpointError(f"The configuration of the network {name} is not of this version: {e}.") from None


def network_config(network: Any) -> dict[str, Any]:
    """The configuration from which `build_network` makes this network again, of plain values."""
    arguments = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return {"network": type(network).__name__, **arguments}
