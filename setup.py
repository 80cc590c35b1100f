"""Put the configurations of the repository into the wheel; pyproject.toml has everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).resolve().parent / "configs"


class BuildWithConfigs(build_py):
    """Copy configs/ to titans_video/assets/configs; an editable installation reads the repository's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(CONFIGS, Path(self.build_lib, "titans_video", "assets", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
