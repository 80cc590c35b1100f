"""The configuration files of the package: presets of training, and settings for `accelerate launch`.

A wheel has them as `titans_video/assets/configs`, a clone of the repository as `configs`.
"""

from pathlib import Path

from titans_video.console import note

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (_PACKAGE / "assets" / "configs", _PACKAGE.parents[1] / "configs")


def configs_folder() -> Path:
    """Return the folder of the configuration files of the package."""
    return next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])


def shipped_configs() -> list[str]:
    """Return the names of the package's presets of training, e.g. `sora/tiny`."""
    folder = configs_folder()
    found = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml")]
    return sorted(name for name in found if not name.startswith("accelerate/"))


def find_config(path: str | Path, *, quiet: bool = False) -> Path:
    """Return the path of a configuration file, which need not exist.

    If there is no file at `path`, it may name a file of the package, as `sora/tiny` or as `configs/sora/tiny.yaml`.
    That file is then returned, with a note on stderr unless `quiet`.
    """
    given = Path(path)
    name = Path(given.as_posix().removeprefix("configs/")).with_suffix(".yaml")
    inside = configs_folder() / name
    if given.exists() or given.is_absolute() or ".." in name.parts or not inside.is_file():
        return given
    if not quiet:
        note(f"There is no file {given} here. Using {inside}, of the package.")
    return inside
